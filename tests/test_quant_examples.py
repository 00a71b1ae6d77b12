"""Models that live on low-bit weights, as they are described, each against a plain rendering of its own.

GLM-130B (Zeng et al., 2023, section 5): weights in INT8 or INT4, a scale for each row by its largest magnitude.
1-bit adapters (BitDelta and its like): a frozen layer of two values around a mean, a low-rank pair beside it.
MatFormer (Devvrit et al., 2023): one feed-forward layer whose first rows and columns are the smaller models.
"""

import pytest
import torch
from nn_modules import error
from torch import nn

from scalekern import quant_matmul
from scalekern.nn import QuantLinear
from scalekern.quant import quantize, quantize_model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
def test_glm_130b_row_wise(bits):
    """scale = max |w| / (2^(bits - 1) - 1) of a row, integers rounded to nearest, multiplied back in the product."""
    w, x = normal(30, 50), normal(3, 50, seed=1)
    w[7] *= 100  # a row of outliers harms no other
    top = 2 ** (bits - 1) - 1
    rows = []
    for row in w.tolist():
        scale = max(abs(v) for v in row) / top
        rows.append([scale * round(v / scale) for v in row])
    rendered = torch.tensor(rows)
    layer = nn.Linear(50, 30)
    with torch.no_grad():
        layer.weight.copy_(w)
    model = nn.Sequential(layer)
    quantize_model(model, {"format": f"int{bits}", "group_size": None})
    assert error(model[0].weight, rendered) < 1e-6
    assert error(model(x), x @ rendered.mT + layer.bias) < 1e-6
    assert model[0].quantized_weight.data.shape == (30, 50 * bits // 8) and model[0].weight_scales.shape == (30, 1)


def test_one_bit_adapters():
    """The layer keeps a bit a weight; what it has lost is trained back beside it."""
    w, x = normal(24, 40) + 0.2, normal(128, 40, seed=1)
    mean = w.mean(1, keepdim=True)
    scale = (w - mean).abs().mean(1, keepdim=True)
    rendered = mean + scale * torch.where(w - mean >= 0, 1.0, -1.0)
    binary = quantize(w, "int1", group_size=None)
    assert error(binary.dequantize(), rendered) < 1e-6 and binary.data.shape == (24, 5)
    # No other two values a row are nearer: the scale and the mean are those of the least squares.
    for changed in (mean + 1.02 * (rendered - mean), rendered + 0.02):
        assert (changed - w).square().sum() > (rendered - w).square().sum()

    layer = QuantLinear.from_quantized(binary).requires_grad_(False)
    down, up = nn.Parameter(normal(4, 40, seed=2) / 40**0.5), nn.Parameter(torch.zeros(24, 4))
    optimizer, target = torch.optim.Adam([down, up], lr=0.05), x @ w.mT
    losses = []
    for _ in range(60):
        losses.append((layer(x) + x @ down.mT @ up.mT - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    residue = torch.linalg.svdvals((w - rendered).double())
    least = residue[4:].square().sum() / residue.square().sum()  # what no pair of rank 4 can win back of the weight
    assert 0.5 * least < losses[-1] / losses[0] < 1.3 * least
    assert torch.equal(layer.weight_data, binary.data)


@pytest.mark.parametrize("format, group_size", [("int4", 16), ("int3", 8), ("nf4", 16), ("int1", 32), ("int8", 16)])
def test_matformer_widths_are_views_of_one_weight(format, group_size):
    """FFN_i(x) = W2[:, :m_i] act(W1[:m_i] x): every width reads a prefix of the same bytes."""
    width, hidden = 32, 128
    up, down = normal(hidden, width), normal(width, hidden, seed=1)
    packed = [quantize(w, format, group_size=group_size) for w in (up, down)]
    x = normal(5, width, seed=2)
    for m in (128, 64, 32):
        parts = packed[0][:m], packed[1][:, :m]
        out = quant_matmul(torch.relu(quant_matmul(x, parts[0])), parts[1])
        assert all(t.untyped_storage().data_ptr() == getattr(p, n).untyped_storage().data_ptr()
                   for part, p in zip(parts, packed) for n, t in part.tensors().items())  # fmt: skip
        # A slice of what is packed is the packed slice,
        for part, w in zip(parts, (up[:m], down[:, :m])):
            alone = quantize(w, format, group_size=group_size)
            assert torch.equal(alone.data, part.data) and torch.equal(alone.scales, part.scales)
        # and computes what the dense slice of the whole does.
        dense = [p.dequantize() for p in packed]
        assert error(out, torch.relu(x @ dense[0][:m].mT) @ dense[1][:, :m].mT) < 1e-6


def test_matformer_layers_share_memory():
    weight = quantize(normal(64, 32), "int4", group_size=16)
    layers = [QuantLinear.from_quantized(weight[:m]) for m in (64, 32, 16)]
    x = normal(2, 32, seed=1)
    assert all(torch.equal(layer(x), layers[0](x)[:, : layer.out_features]) for layer in layers)
    with torch.no_grad():
        layers[0].weight_scales[:16] *= 2
    assert torch.equal(layers[2].weight, layers[0].weight[:16])
