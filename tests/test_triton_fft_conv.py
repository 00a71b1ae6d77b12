"""The Triton FFT convolution, run by Triton's interpreter on CPU tensors, against the float64 oracle.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton, like tests/test_triton_interpret.py.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import scalekern  # noqa: E402
from scalekern.reference.fft_conv import fft_conv_bwd as oracle_bwd  # noqa: E402
from scalekern.reference.fft_conv import fft_conv_fwd as oracle_fwd  # noqa: E402
from scalekern.triton_kernels import fft_conv, fft_device  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F16: 1.5e-3, BF16: 1e-2}
NAMES = ("du", "dk", "dk_reverse", "dskip", "dbias", "dpregate", "dpostgate")
MODES = ("causal", "circular", "same", "full")


def randn(*shape, dtype=F32):
    """Normal numbers, each leading index with its own scale, so that permuted rows or channels are seen."""
    value = torch.randn(shape, dtype=F64)
    return (value * torch.rand(shape[:2] + (1,) * (len(shape) - 2)).add(0.3)).to(dtype)


def case(B, D, L, K, mode="causal", dtype=F32, options="k_reverse skip bias pregate postgate mask", reverse=None):
    """The op's arguments, and a gradient of its output."""
    options, M = options.split(), L + K - 1 if mode == "full" else L
    return [
        randn(B, D, L, dtype=dtype),
        randn(D, K),
        randn(D, reverse or K // 2 + 1) if "k_reverse" in options and mode != "full" else None,
        randn(1, D)[0] if "skip" in options else None,
        randn(1, D)[0] if "bias" in options else None,
        randn(B, D, L, dtype=dtype) if "pregate" in options else None,
        randn(B, D, M, dtype=dtype) if "postgate" in options else None,
        torch.rand(B, L) > 0.3 if "mask" in options else torch.rand(B, L) if "numbers" in options else None,
        mode,
    ], randn(B, D, M, dtype=dtype)


def poisoned(x):
    return torch.empty(0) if x is None else torch.full_like(x, float("nan"))


def forward(args, dout, kernels=fft_conv):
    out = poisoned(dout)
    kernels.fft_conv_fwd(out, *args)
    return out


def backward(args, dout, kernels=fft_conv):
    gradients = [poisoned(x) for x in args[:7]]
    kernels.fft_conv_bwd(*gradients, dout, *args)
    return gradients


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def error(found, expected):
    """Relative L2 error by the reference's norm: an all-zero result fails."""
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / norm if norm > 0 else found.double().norm())


def check(args, dout, tolerance=None, kernels=fft_conv):
    """Forward and every gradient."""
    assert kernels.supports(*args) is None
    tolerance = tolerance or TOLERANCE[args[0].dtype]
    args64 = [double(x) for x in args]
    expected = {"out": oracle_fwd(*args64), **dict(zip(NAMES, oracle_bwd(dout.double(), *args64)))}
    found = {"out": forward(args, dout, kernels), **dict(zip(NAMES, backward(args, dout, kernels)))}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        e = error(found[name], value)
        assert e <= tolerance, f"{name}: relative error {e:.2e} for {args[0].dtype}"


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("L", (1, 2, 7, 16, 33, 60, 130))
def test_lengths_and_taps(L, mode):
    """K from 1 to 3 L, with an odd batch, whose last rows share a tile with nothing."""
    torch.manual_seed(L)
    for K in (1, L + 1, 3 * L) if L == 7 else (3 * L if L in (1, 16, 60) else L // 2 + 1,):
        check(*case(3, 2 if L == 2 else 1, L, K, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (F16, BF16))
def test_half_precision(dtype, mode):
    torch.manual_seed(1)
    check(*case(3, 2, 130, 90, mode, dtype))
    check(*case(2, 1, 300, 300, mode, dtype, "skip pregate postgate"))


@pytest.mark.parametrize("option", ("", "k_reverse", "skip", "bias", "pregate", "postgate", "mask", "numbers"))
def test_options(option):
    torch.manual_seed(2)
    check(*case(3, 2, 33, 20, "causal", F32, option))
    check(*case(2, 1, 20, 33, "circular", F16, option))


@pytest.mark.parametrize(
    "dtype, L, K, mode", ((F32, 600, 700, "same"), (F16, 520, 200, "full"), (F32, 520, 40, "full"))
)
def test_several_pieces(monkeypatch, dtype, L, K, mode):
    """A transform cut into blocks of rows, of which the last piece of the samples may be empty."""
    torch.manual_seed(3)
    monkeypatch.setattr(fft_device, "sizes", lambda points, most: (-(-points // 256) + (L == 520), 16, 16))
    check(*case(1, 1, L, K, mode, dtype, "k_reverse skip bias pregate postgate"))


@pytest.mark.parametrize("P, BLOCK, N2, R", ((1, 64, 16, 2), (3, 16, 16, 2), (2, 32, 16, 1), (2, 16, 64, 1)))
def test_every_shape_of_tile(monkeypatch, P, BLOCK, N2, R):
    torch.manual_seed(4)
    monkeypatch.setattr(fft_device, "sizes", lambda *_: (P, BLOCK, N2))
    monkeypatch.setattr(fft_conv, "_blocks", lambda *_: {"R": R, "num_warps": 4})
    for dtype in (F32, F16):
        check(*case(3, 1, 250, 100, "same", dtype))


@pytest.mark.parametrize("wanted", (1, 4))
def test_programs_take_turns(monkeypatch, wanted):
    """Few programs for many rows: each takes several, in the backward a part of the batch each."""
    torch.manual_seed(5)
    monkeypatch.setattr(fft_conv, "WANTED", wanted)
    monkeypatch.setattr(fft_conv, "_blocks", lambda *_: {"R": 2, "num_warps": 4})
    check(*case(7, 2, 20, 20))


def test_strided_inputs():
    torch.manual_seed(6)
    args, dout = case(3, 4, 33, 20, "same", options="k_reverse skip bias pregate postgate mask")
    args[0] = randn(3, 33, 4).transpose(1, 2)  # channels-last
    args[1], args[2] = randn(20, 4).t(), randn(4, 22)[:, ::2]
    args[3], args[4] = randn(1, 8)[0, ::2], randn(1, 1)[0].expand(4)
    args[5], args[6] = randn(3, 1, 33).expand(3, 4, 33), randn(6, 8, 40)[::2, ::2, 3:36]
    args[7] = args[7].new_ones(1, 66)[:, ::2].expand(3, 33)
    check(args, dout.transpose(1, 2).contiguous().transpose(1, 2))


def test_filters_and_gradients_in_half_precision():
    torch.manual_seed(7)
    args, dout = case(2, 2, 20, 20, dtype=BF16)
    check([x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == F32 else x for x in args], dout)


def test_precision():
    """Each setting within its own bound, output and gradients; float32 in three products is more exact than tf32's
    bits, those more than bfloat16's. "ieee" is not these kernels': what takes it is more exact still."""
    torch.manual_seed(7)
    args, dout = case(2, 2, 130, 130, options="skip pregate postgate")
    exact = [oracle_fwd(*[double(x) for x in args]), *oracle_bwd(dout.double(), *[double(x) for x in args])]
    errors = {}
    for precision, bound in ((None, 1e-5), ("tf32", 1.5e-3), ("bf16", 1e-2)):
        assert fft_conv.supports(*args, precision) is None
        out, gradients = poisoned(dout), [poisoned(x) for x in args[:7]]
        fft_conv.fft_conv_fwd(out, *args, precision)
        fft_conv.fft_conv_bwd(*gradients, dout, *args, precision)
        found = [error(a, e) for a, e in zip((out, *gradients), exact) if e.numel()]
        assert max(found) <= bound, (precision, found)
        errors[precision] = found[0]
    u, k, _, skip, _, pregate, postgate, _, mode = args
    ieee = scalekern.fft_conv(u, k, mode=mode, skip=skip, pregate=pregate, postgate=postgate, precision="ieee")
    errors["ieee"] = error(ieee, exact[0])
    assert errors["ieee"] < 1e-6 and 4 * errors[None] < errors["tf32"] and 4 * errors["tf32"] < errors["bf16"], errors
    with scalekern.backend("triton"), pytest.raises(scalekern.BackendError, match="precision 'ieee' was asked for"):
        scalekern.fft_conv(u, k, precision="ieee")


# --- what half precision could break ----------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", (1e-6, 1e4))
def test_half_precision_keeps_its_range(magnitude):
    """Rows and channels of very different magnitudes: no operand overflows, and none is lost beside others."""
    torch.manual_seed(8)
    args, dout = case(4, 2, 256, 256, "causal", BF16, "skip")
    args[0][1] *= magnitude
    args[1][1] *= magnitude
    args[3][1] *= magnitude
    args64 = [double(x) for x in args]
    out, expected = forward(args, dout), oracle_fwd(*args64)
    for b in range(4):
        for d in range(2):
            assert error(out[b, d], expected[b, d]) <= TOLERANCE[BF16]


def test_one_large_sample_and_a_constant():
    """A spectrum that is flat, and one that is a single peak."""
    torch.manual_seed(9)
    for row in (torch.zeros(256).index_fill(0, torch.tensor([9]), 6e4), torch.full((256,), 6e4)):
        args, dout = case(1, 1, 256, 256, "causal", F16, "")
        args[0] = row[None, None].half()
        args[1] = args[1] / 1e4
        assert error(forward(args, dout), oracle_fwd(*[double(x) for x in args])) <= TOLERANCE[F16]


# --- behaviour --------------------------------------------------------------------------------------------------------


def test_masked_nan_goes_nowhere():
    torch.manual_seed(10)
    args, dout = case(2, 2, 33, 33)
    hidden = ~args[7][:, None].expand_as(args[0])
    args[0][hidden], args[5][hidden] = float("nan"), float("inf")
    check(args, dout)


@pytest.mark.parametrize("mode", MODES)
def test_repeatable_and_64_bit_offsets(monkeypatch, mode):
    torch.manual_seed(11)
    args, dout = case(3, 2, 33, 40, mode, F16)
    first = [forward(args, dout), *backward(args, dout)]
    for forced in ("0", "1"):
        monkeypatch.setenv("SCALEKERN_FORCE_INT64", forced)
        for a, b in zip(first, [forward(args, dout), *backward(args, dout)]):
            assert torch.equal(a, b)


def test_rows_do_not_depend_on_their_neighbours():
    torch.manual_seed(12)
    args, dout = case(4, 2, 33, 33, dtype=F16, options="k_reverse skip bias pregate postgate")
    whole = forward(args, dout)
    for b in range(4):
        one = [x[b : b + 1] if i in (0, 5, 6) else x for i, x in enumerate(args)]
        assert torch.equal(forward(one, dout[b : b + 1]), whole[b : b + 1])


def test_no_rows():
    args, dout = case(0, 2, 9, 5, options="skip bias")
    assert forward(args, dout).shape == (0, 2, 9)
    for gradient in backward(args, dout)[1:5]:
        assert not gradient.any()


@pytest.mark.parametrize("broken", (lambda x: x * 0, lambda x: x.roll(1, -1), lambda x: x[:1].expand_as(x)))
def test_the_check_can_fail(monkeypatch, broken):
    args, dout = case(3, 2, 16, 16)
    launch = fft_conv.fft_conv_fwd
    monkeypatch.setattr(fft_conv, "fft_conv_fwd", lambda out, *a: (launch(out, *a), out.copy_(broken(out).clone())))
    with pytest.raises(AssertionError, match="out: relative error"):
        check(args, dout)


def test_supports():
    args, _ = case(2, 2, 9, 5)
    reasons = [
        ([args[0].double(), *args[1:]], "float64"),
        ([args[0], args[1][None].expand(2, 2, 5), *args[2:]], "k is a filter for every sample"),
        ([*args[:2], args[2].double(), *args[3:]], "k_reverse is float64"),
        ([torch.empty(1, 1, 2**16), torch.empty(1, 4), *args[2:]], "65536 samples"),
        ([torch.empty(1, 65536, 2), torch.empty(65536, 4), *args[2:]], "65536 channels, a grid has room for 65535"),
    ]
    for call, reason in reasons:
        assert reason in fft_conv.supports(*call)
    assert fft_conv.supports(*args) is None


@pytest.mark.parametrize("most", [n for _, both in fft_device.LIMITS[:-1] for n in both])
def test_sizes(most):
    """At least as many points as asked for, never twice that (256 at least), powers of two exactly."""
    for points in (*range(1, 2000, 7), *range(2000, most + 1, 257), *(2**i for i in range(8, 15))):
        if points > most:
            continue
        P, block, n2 = fft_device.sizes(points, most)
        assert points <= P * block * n2 <= max(256, 2 * points - 1) and P <= fft_device.MAX_PIECES
        if points & (points - 1) == 0 and points >= 256:
            assert P * block * n2 == points
    assert fft_device.sizes(most + 1, most) is None
