"""The Triton kernels of quant_matmul, run by Triton's interpreter on CPU tensors, against the float64 oracle.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton, like tests/test_triton_interpret.py.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import scalekern  # noqa: E402
from scalekern import reference  # noqa: E402
from scalekern.quant import FORMATS, QuantizedTensor, quantize  # noqa: E402
from scalekern.reference.quant_matmul import round_activation, scale_of  # noqa: E402
from scalekern.testing import error  # noqa: E402
from scalekern.triton_kernels import quant_matmul as kernels  # noqa: E402
from scalekern.triton_kernels import quant_matmul_dense as dense  # noqa: E402
from scalekern.triton_kernels.quantize_rows import quantize_rows  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# An output's rounding is 2e-4 in float16 and 1.7e-3 in bfloat16; weights of groups are not rounded at all.
TOLERANCE = {F64: 1e-14, F32: 5e-7, F16: 3e-4, BF16: 2.2e-3}
NAN = float("nan")


def inputs(M, N, K, format, group, dtype=F32, seed=0, **options):
    """(x, w), each row of its own size, so that permuted rows and scales are seen."""
    torch.manual_seed(seed)
    rows = lambda *shape: torch.randn(shape) * torch.rand(shape[0], 1).add(0.3)
    return rows(M, K).to(dtype), quantize(rows(N, K) / K**0.5, format, group_size=group, **options)


def run(x, w, **options):
    with scalekern.backend("triton"):
        return scalekern.quant_matmul(x, w, **options)


def check(x, w, tolerance=None, **options):
    exact = reference.quant_matmul(x.double(), w, **options)
    e = error(run(x, w, **options), exact)
    assert e <= (tolerance or TOLERANCE[x.dtype]), f"relative error {e:.2e} for {x.dtype}, {w}"


KINDS = [
    # in planes (or words), each code by itself (groups that no plane fits); short last groups, one group, one scale
    ("int1", 64, 11), ("ternary", None, 20), ("int2", 32, 9), ("int3", 16, 11), ("int4", 32, 7), ("int5", 8, 50),
    ("int6", None, 100), ("int7", 16, 30), ("int8", 16, 9), ("fp8_e4m3", 32, 11), ("fp8_e5m2", None, 13),
    ("fp6_e3m2", 64, 25), ("fp6_e2m3", None, 5), ("mxfp4", None, None), ("nvfp4", None, None), ("nf4", 64, 10),
    ("fp4_bnb", "tensor", 40),
]  # fmt: skip


@pytest.mark.parametrize("format, group, odd", KINDS, ids=[k[0] for k in KINDS])
def test_formats(format, group, odd):
    """Of one token in whole words or units, and of five in groups of both kinds."""
    check(*inputs(1, 17, 72, format, group))
    check(*inputs(5, 17, 50, format, odd))


@pytest.mark.parametrize("M", (1, 3, 6))
def test_zeros_offsets_outer_and_bias(M):
    x, w = inputs(M, 19, 100, "int4", 32, symmetric=False)
    torch.manual_seed(1)
    w = w.replace(
        zeros=w.zeros + 0.3, offsets=torch.randn_like(w.scales) * 0.1, outer=torch.rand(19, 1) + 0.5,
        scales=w.scales.to(BF16),
    )  # fmt: skip
    check(x, w, bias=torch.randn(19))
    check(x, w.replace(zeros=(w.zeros + 0.5).to(torch.uint8), offsets=w.offsets[:1], outer=w.outer[:1]))


@pytest.mark.parametrize("dtype", (F64, F16, BF16), ids=str)
def test_dtypes(dtype):
    for M in (2, 20):
        check(*inputs(M, 33, 130, "int4", 64, dtype, symmetric=False))
    check(*inputs(7, 20, 70, "int3", 11, dtype))


def test_scales_beyond_the_range_of_float16():
    """Exact integers are multiplied, not weights: 1e6 would be infinite and 1e-8 zero."""
    for factor in (1e6, 1e-8):
        for group in (32, 11):
            x, w = inputs(5, 17, 64, "int4", group, F16)
            check(x, w.replace(scales=w.scales * factor), tolerance=5e-7, out_dtype=F32)


# --- rounded activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ("int8", "int4", "fp8"))
@pytest.mark.parametrize("format, group", (("int8", None), ("int4", 64), ("int4", 20), ("fp4_e2m1", 32), ("nf4", 32)))
def test_activations(activation, format, group):
    x, w = inputs(6, 17, 100, format, group, symmetric=format[:3] != "int")
    check(x, w, activation=activation, activation_scale=0.03 if group == 20 else None)


@pytest.mark.parametrize("activation", ("int8", "fp8"))
@pytest.mark.parametrize("format, group", (("int4", 64), ("int4", 20), ("fp4_e2m1", 32)))
def test_activations_of_float64(activation, format, group):
    """What the products are summed in too: float32 holds the integers of small groups, and nothing of float8."""
    x, w = inputs(6, 17, 100, format, group, F64, symmetric=format[:3] != "int")
    check(x, w, activation=activation)


def test_rounded_tokens_are_the_oracles():
    """Ties, numbers of every binade, zeros, tokens that are not finite; all bits."""
    torch.manual_seed(2)
    x = torch.cat([
        torch.randn(3, 40), torch.zeros(1, 40), torch.randn(1, 40) * 1e-42,
        torch.exp2(torch.linspace(-20, 3, 40))[None],
        torch.arange(-20, 20)[None] * 0.5, torch.randn(1, 40).index_fill(1, torch.tensor([3]), NAN),
        torch.randn(1, 40).index_fill(1, torch.tensor([3]), -float("inf")),
    ])  # fmt: skip
    for activation in ("int8", "int4", "fp8"):
        for static in (None, 1.0, 0.02):
            q, tokens = quantize_rows(x, activation, static)
            scale = scale_of(x, activation, static).expand(len(x), 1)
            expected = round_activation(x, activation, scale) * scale
            broken = expected.isnan().any(1) if static is None or activation != "fp8" else torch.zeros(len(x)).bool()
            assert torch.equal(tokens.isnan() & True, x.isnan().any(1) if static else broken)
            found = q[:, 0].float() * tokens[:, None]
            assert torch.equal(found[~x.isnan().any(1) & ~broken], expected[~x.isnan().any(1) & ~broken])


@pytest.mark.parametrize("format, group", (("int8", None), ("int4", 32), ("int4", 11), ("int2", 520)))
def test_integers_are_exact(format, group):
    """Scales of 1 and whole zeros: what comes out is the sum of integers, to the last bit."""
    torch.manual_seed(3)
    bits, K = FORMATS[format].bits, 560 if group == 520 else 150
    groups = 1 if group is None else -(-K // group)
    data = torch.randint(0, 256, (5, -(-K * bits // 8)), dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (5, groups)).float()
    w = QuantizedTensor(data, torch.ones(5, groups), zeros, format=format, columns=K, group_size=group or K)
    x = torch.randint(-127, 128, (6, K)).float()
    assert torch.equal(run(x, w, activation="int8", activation_scale=1.0).double(), x.double() @ w.dequantize(F64).mT)


def test_the_largest_integer_sum(monkeypatch):
    """Twice the 2^15 columns of -128 x 127 that int32 holds."""
    K = 1 << 16
    monkeypatch.setattr(kernels, "config", lambda *a: {**a[3], "COLUMNS": 4096})
    w = QuantizedTensor(torch.zeros(1, K, dtype=torch.uint8), torch.ones(1, 1), format="int8", columns=K, group_size=K)
    for wanted in (1, 4):  # parts
        monkeypatch.setattr(kernels, "WANTED", wanted)
        assert run(torch.full((1, K), 127.0), w, activation="int8", activation_scale=1.0).item() == -128 * 127 * K


# --- what lies around -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", (1, 6))
@pytest.mark.parametrize("format, columns", (("int3", 37), ("int1", 33), ("int4", 45)))
def test_bits_behind_the_last_code_mean_nothing(format, columns, M):
    x, w = inputs(M, 9, columns, format, 16)
    used = columns * w.bits % 8
    dirty = w.data.clone()
    dirty[:, -1] ^= (0xFF << used) & 0xFF
    assert not torch.equal(dirty, w.data)
    assert torch.equal(run(x, w), run(x, w.replace(data=dirty)))


@pytest.mark.parametrize("M", (2, 7))
def test_views_strides_and_64_bit_offsets(M, monkeypatch):
    x, w = inputs(M, 40, 160, "int4", 32)
    cut = w[3:20, 32:128]
    plain = cut.replace(data=cut.data.contiguous(), scales=cut.scales.contiguous())
    x = x[:, :96].contiguous()
    expected = run(x, plain)
    spread = torch.full((96, 3 * M), NAN)[:, ::3].t().copy_(x)
    for forced in ("0", "1"):
        monkeypatch.setenv("SCALEKERN_FORCE_INT64", forced)
        assert error(run(spread, cut), expected) < 2e-7  # words or bytes: another order of the same terms
        bytes_apart = plain.data.repeat_interleave(2, 1)[:, ::2]
        scales = plain.scales.t().contiguous().t()
        assert error(run(x, plain.replace(data=bytes_apart, scales=scales)), expected) < 2e-7
    unaligned = w.data.new_full((17 * 48 + 1,), 77)[1:].view(17, 48).copy_(plain.data)
    assert error(run(x, plain.replace(data=unaligned)), expected) < 2e-7


@pytest.mark.parametrize("M", (2, 6))
@pytest.mark.parametrize("group", (32, 11))
def test_a_nan_reaches_its_own_token_and_row(M, group):
    x, w = inputs(M, 17, 70, "fp8_e4m3", group)
    clean = run(x, w)
    x[1, 7] = NAN
    w.data[4, 20] = 0x7F  # NaN
    found, expected = run(x, w), clean.clone()
    expected[1], expected[:, 4] = NAN, NAN
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("M, group", ((1, 32), (6, 32), (6, None)))
def test_parts_of_k_are_added(M, group, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_COLUMNS", 100)
    x, w = inputs(M, 17, 260, "int4", group)
    bias = torch.randn(17)
    check(x, w.replace(outer=torch.rand(17, 1)), bias=bias)
    check(x, w, bias=bias, activation="int8")


# --- backward ---------------------------------------------------------------------------------------------------------


def gradients(x, w, dout, package, **options):
    """(dx, dscales, dzeros, dbias) in float64 for the oracle."""
    leaves = [x.detach().clone(), w.scales.clone(), w.zeros.clone(), torch.ones(w.shape[0], dtype=w.scales.dtype)]
    leaves = [(t.double() if package is reference else t).requires_grad_() for t in leaves]
    weight = w.replace(scales=leaves[1], zeros=leaves[2])
    with scalekern.backend("triton"):
        out = package.quant_matmul(leaves[0], weight, bias=leaves[3], **options)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize("dtype, tolerance", ((F64, 1e-13), (F32, 1e-6), (F16, 6e-4), (BF16, 4e-3)), ids=str)
def test_backward(dtype, tolerance):
    """In half precision dx is of a weight that was rounded once."""
    x, w = inputs(6, 37, 70, "int4", 20, dtype, symmetric=False)
    dout = torch.randn(6, 37, dtype=F64).to(dtype).mT.contiguous().mT
    if dtype == F64:
        w = w.replace(scales=w.scales.double(), zeros=w.zeros.double())
    expected = gradients(x, w, dout, reference, activation="int8")
    for found, exact in zip(gradients(x, w, dout, scalekern, activation="int8"), expected):
        assert found.shape == exact.shape and error(found, exact) < tolerance


@pytest.mark.parametrize("format, group", (("int1", 64), ("int3", 11), ("nf4", 64), ("nvfp4", None), ("mxfp4", None)))
def test_backward_of_formats(format, group):
    x, w = inputs(3, 20, 70, format, group)
    dout = torch.randn(3, 20)
    with scalekern.backend("triton"):
        (dx,) = torch.autograd.grad(scalekern.quant_matmul(x.requires_grad_(), w), x, dout)
    assert error(dx, dout.double() @ w.dequantize(F64)) < 1e-6


def test_many_tokens_are_left_to_torch(monkeypatch):
    """Pieces of rows forward, of columns backward."""
    monkeypatch.setattr(dense, "DENSE_TOKENS", 8)
    monkeypatch.setattr(dense, "PIECE", 2400)
    x, w = inputs(9, 37, 70, "int4", 11, BF16)
    w = w.replace(outer=torch.rand(37, 1) + 0.5)
    bias, dout = torch.randn(37), torch.randn(9, 37).to(BF16)
    for b in (bias, None):
        check(x, w, bias=b, tolerance=5e-3)  # weight and bias are rounded as well
    with scalekern.backend("triton"):
        (dx,) = torch.autograd.grad(scalekern.quant_matmul(x.requires_grad_(), w), x, dout)
    assert error(dx, dout.double() @ w.dequantize(F64)) < 4e-3


@pytest.mark.parametrize(
    "format, group", (("int4", 64), ("int8", None), ("int3", 128), ("int2", 64), ("int1", 256), ("nf4", 64))
)
def test_weights_of_whole_tiles_are_the_oracles(format, group):
    """In tiles of one group each, with rows behind the last one, and in tiles that are not whole."""
    _, w = inputs(1, 37, 768, format, group, symmetric=format[:3] != "int" or format == "int1")
    w = w.replace(outer=torch.rand(37, 1) + 0.5, offsets=torch.randn_like(w.scales))
    parts = w.data, w.scales, w.zeros, w.offsets, w.outer, w.format, w.group_size, 768
    for first, columns, one_group in ((0, 768, True), (256, 512, True), (256, 510, False)):
        found = torch.full((37, columns), NAN, dtype=F32)
        launch = dense.plan_dequantize(found, *parts, first)
        assert launch.args["ONE_GROUP"] == one_group
        launch.run()
        assert error(found, w.dequantize(F64)[:, first : first + columns]) < 2e-7


BROKEN = (lambda x: x * 0, lambda x: x.roll(1, -1), lambda x: x.roll(1, 0), lambda x: x * 1.001)


@pytest.mark.parametrize("broken", BROKEN)
def test_the_check_can_fail(monkeypatch, broken):
    monkeypatch.setattr(scalekern, "quant_matmul", lambda *a, _f=scalekern.quant_matmul, **k: broken(_f(*a, **k)))
    with pytest.raises(AssertionError, match="relative error"):
        check(*inputs(2, 20, 40, "int4", 32))
