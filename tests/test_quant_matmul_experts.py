"""quant_matmul with offs: each expert's rows against a product of their own, through every backend here."""

import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern.quant import dequantize, quantize
from scalekern.testing import assert_close

ENDS = {
    "one": [70],
    "empty_between": [0, 33, 33, 130],
    "rows_left_over": [5, 80, 81],
    "none_at_all": [0, 0, 0],
    "many": [3, 3, 9, 9, 20, 33, 47, 64, 64, 100, 111, 150],
}


def weights(E, N, K, format, group_size, symmetric=True):
    generator = torch.Generator().manual_seed(E * N + K)
    return quantize(torch.randn(E * N, K, generator=generator), format, group_size=group_size, symmetric=symmetric)


@pytest.mark.parametrize("name", ENDS)
def test_each_expert_is_a_product_of_its_own(place, name):
    (device, _), ends, N, K = place, ENDS[name], 37, 72
    w, M = weights(len(ends), N, K, "int4", 24, symmetric=False), 150
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    bias = torch.randn(len(ends), N, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    with scalekern.backend(place[1]):
        out = scalekern.quant_matmul(x, w.to(device), bias=bias, offs=offs)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device)
        dx, dbias = torch.autograd.grad((out * weight).sum(), (x, bias))
    dense = dequantize(w, torch.float64).unflatten(0, (len(ends), N)).to(device)
    shapes = (out.shape, x.shape, bias.shape)
    wanted, wanted_dx, wanted_db = (torch.zeros(s, dtype=torch.float64, device=device) for s in shapes)
    for e, (a, b) in enumerate(zip([0, *ends], ends)):
        wanted[a:b] = x[a:b].detach().double() @ dense[e].mT + bias[e].detach()
        wanted_dx[a:b] = weight[a:b].double() @ dense[e]
        wanted_db[e] = weight[a:b].double().sum(0)
    for found, right in ((out, wanted), (dx, wanted_dx), (dbias, wanted_db)):
        assert_close(found.double(), right, tolerance=2e-6)
    assert torch.equal(out[ends[-1] :], torch.zeros_like(out[ends[-1] :]))


@pytest.mark.parametrize("format, group_size, options", [
    ("int8", None, {"activation": "int8"}), ("nf4", 64, {}), ("int3", 20, {}), ("int4", 32, {"activation": "int8"}),
])  # fmt: skip
def test_as_one_by_one(place, format, group_size, options):
    (device, _), N, K = place, 20, 100
    w = weights(3, N, K, format, group_size).to(device)
    x = torch.randn(29, K, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    with scalekern.backend(place[1]):
        offs = torch.tensor([9, 9, 29], dtype=torch.int32, device=device)
        grouped = scalekern.quant_matmul(x, w, offs=offs, **options)
        parts = ((0, 0, 9), (2, 9, 29))
        single = [scalekern.quant_matmul(x[a:b], w[e * N : e * N + N], **options) for e, a, b in parts]
    assert_close(grouped, torch.cat(single), tolerance=4e-3)  # tiles of other sizes round bfloat16 otherwise


def test_gradients_of_scales_stay_with_their_expert(place):
    (device, _), N, K, ends = place, 6, 40, (2, 2, 5)
    w = weights(3, N, K, "int8", 16).to(device)
    w = w.replace(scales=w.scales.double().requires_grad_())
    x = torch.randn(5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    dout = torch.randn(5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    with scalekern.backend(place[1]):
        out = scalekern.quant_matmul(x, w, offs=torch.tensor(ends, dtype=torch.int32, device=device))
        (grad,) = torch.autograd.grad(out, w.scales, dout)
    for e, (a, b) in enumerate(zip((0, *ends), ends)):
        scales = w.scales[e * N : e * N + N].detach().requires_grad_()
        own = dequantize(w[e * N : e * N + N].replace(scales=scales), torch.float64)
        (wanted,) = torch.autograd.grad(x[a:b] @ own.mT, scales, dout[a:b])
        assert_close(grad[e * N : e * N + N], wanted, tolerance=1e-12)


@pytest.mark.skipif(INTERPRET, reason="kernels on a GPU do not look")
def test_what_is_wrong_is_named():
    w, x = weights(2, 6, 40, "int4", 16), torch.zeros(5, 40)
    call = lambda *ends, x=x, dtype=torch.int32: scalekern.quant_matmul(x, w, offs=torch.tensor(ends, dtype=dtype))
    with pytest.raises(ValueError, match="offs must rise from 0 to at most 5"):
        call(4, 2)
    with pytest.raises(ValueError, match="offs must rise from 0 to at most 5"):
        call(4, 6)
    with pytest.raises(ValueError, match="as many elements as w has matrices, got 5 for 12 rows"):
        call(1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="x must have 2 dimensions when offs is given"):
        call(4, 5, x=x[None])
    with pytest.raises(TypeError, match="offs must have dtype int32"):
        call(4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="offs must rise from 0 to at most 0, the rows of x, got .0, 3."):
        call(0, 3, x=x[:0])
    assert call(0, 0, x=x[:0]).shape == (0, 6)
