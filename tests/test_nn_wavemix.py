"""nn.WaveMixBlock against its equations in plain torch, sharing no code with the package."""

import pytest
import torch
import torch.nn.functional as F
from nn_modules import check_against, check_compiled, check_each_matters, check_loads, error, normal, perturbed, tensors
from test_nn_unireplknet import batch_norm, sub

from scalekern.nn import WaveMixBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
DIM = 8


def haar(x):
    """Sums and differences of the four pixels of a 2 x 2 square, halved; zeros beyond the image."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    a, b, c, d = (x[..., i::2, j::2] / 2 for i in (0, 1) for j in (0, 1))
    low, details = a + b + c + d, [a + b - c - d, a - b + c - d, a - b - c + d]  # along H, along W, both
    return low, torch.stack(details, 2).flatten(1, 2)


def upsample(weight, bias, x):
    """ConvTranspose2d 4 x 4, stride 2, padding 1, by what each input pixel adds to the output."""
    batch, _, height, width = x.shape
    out = x.new_zeros(batch, weight.shape[1], 2 * height + 2, 2 * width + 2)
    for i in range(4):
        for j in range(4):
            part = torch.einsum("bcpq,cd->bdpq", x, weight[:, :, i, j])
            spread = torch.zeros_like(out)
            spread[..., i : i + 2 * height : 2, j : j + 2 * width : 2] = part
            out = out + spread
    return out[..., 1:-1, 1:-1] + bias[:, None, None]


def point(p, name, x):
    return torch.einsum("bchw,dc->bdhw", x, p[f"{name}.weight"][:, :, 0, 0]) + p[f"{name}.bias"][:, None, None]


def mix(p, x, training):
    x = point(p, "0", x)
    x = point(p, "3", x * (1 + torch.erf(x / 2**0.5)) / 2)
    return batch_norm(sub(p, "5"), upsample(p["4.weight"], p["4.bias"], x), training)


def block(p, x, training=False, residual=True):
    """Jeevan et al. 2022, figure 1, with the levels one inside another: each comes back into the next finer one."""
    names = sorted({n.split(".")[0] for n in p if n.startswith("feedforward")})

    def level(low, j):
        low, details = haar(low)
        coefficients = [low, details]
        if j + 1 < len(names):
            coefficients.append(level(low, j + 1)[..., : low.shape[2], : low.shape[3]])
        return mix(sub(p, names[j]), torch.cat(coefficients, 1), training)

    out = level(point(p, "reduction", x), 0)[..., : x.shape[2], : x.shape[3]]
    return x + out if residual else out


def build(training=False, **options):
    torch.manual_seed(0)
    module = perturbed(WaveMixBlock(**{"final_dim": DIM, "ff_channel": 5, "dropout": 0.0, **options}))
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return module.train(training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "size, options",
    [((6, 4), {}), ((5, 7), {"level": 2, "mult": 3}), ((8, 16), {"level": 3, "residual": False}),
     ((9, 17), {"level": 4}), ((1, 1), {"level": 2})],
    ids=str,
)  # fmt: skip
def test_output_and_gradients_match_the_equations(size, options, training):
    module = build(training, **options)
    before = {name: t.clone() for name, t in tensors(module).items()}  # training moves the running statistics
    rendering = lambda p, x: block({**before, **p}, x, training, options.get("residual", True))
    check_against(rendering, module, normal(3, DIM, *size))


def test_a_changed_equation_is_noticed():
    names = ["reduction.bias", *(f"feedforward{j}.{i}" for j in (1, 2) for i in ("0.bias", "4.bias", "5.bias"))]
    check_each_matters(block, build(level=2), normal(2, DIM, 5, 6), names)


def layers(name, width, out):  # final_dim 8, mult 2, ff_channel 5
    found = {"0.weight": (16, width, 1, 1), "0.bias": (16,), "3.weight": (5, 16, 1, 1), "3.bias": (5,)}
    found |= {"4.weight": (5, out, 4, 4), "4.bias": (out,), "5.num_batches_tracked": ()}
    found |= {f"5.{n}": (out,) for n in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.{n}": shape for n, shape in found.items()}


REDUCTION = {"reduction.weight": (2, 8, 1, 1), "reduction.bias": (2,)}
STATE_DICTS = {  # of upstream's Level1Waveblock and Level3Waveblock
    1: REDUCTION | layers("feedforward", 8, 8),
    3: REDUCTION | layers("feedforward1", 12, 8) | layers("feedforward2", 12, 4) | layers("feedforward3", 8, 4),
}


@pytest.mark.parametrize("level", [1, 3])
def test_upstreams_checkpoints_load(level):
    check_loads(WaveMixBlock(mult=2, ff_channel=5, final_dim=8, level=level), STATE_DICTS[level])


@pytest.mark.parametrize("backend, training", [("eager", False), ("aot_eager", True)])
def test_compile_fullgraph(backend, training):
    check_compiled(build(training, level=2), normal(2, DIM, 5, 6), backend)


def test_low_precision_dropout_and_empty_batch():
    module, x = build(level=2, dropout=0.5), normal(2, DIM, 5, 6)
    expected = block(tensors(module), x)
    assert error(module(x), expected) < 1e-12
    module = module.float()
    assert error(module(x.float()), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(x.float()), expected) < 2e-2  # nine roundings to 8 bits, level by level
    assert module(torch.zeros(0, DIM, 5, 6)).shape == (0, DIM, 5, 6)
    assert error(module.train()(x.float()), module(x.float())) > 1e-2


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="final_dim must be a multiple of 4, got 6"):
        WaveMixBlock(final_dim=6)
    with pytest.raises(ValueError, match="level must be an integer of at least 1, got 0"):
        WaveMixBlock(level=0)
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 8, \*, \*\)"):
        build()(normal(1, 7, 4, 4))
