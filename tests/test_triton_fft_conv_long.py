"""The passes of the Triton FFT convolution beyond one fused transform, by the interpreter, against the float64 oracle.

Rows of 16 x 16 in place of 64 x 32 keep the interpreter quick: a column has two to nineteen of them.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import scalekern  # noqa: E402
from scalekern.triton_kernels import fft_conv, fft_device  # noqa: E402
from scalekern.triton_kernels import fft_conv_long as long  # noqa: E402
from scalekern.triton_kernels import fft_long_device as dev  # noqa: E402
from scalekern.triton_kernels import fft_long_filters as filters  # noqa: E402
from test_triton_fft_conv import (  # noqa: E402
    BF16,
    F16,
    F32,
    MODES,
    TOLERANCE,
    backward,
    case,
    check,
    double,
    error,
    forward,
    oracle_bwd,
    oracle_fwd,
    poisoned,
    randn,
)

ALL = "k_reverse skip bias pregate postgate"


@pytest.fixture
def short(monkeypatch):
    """Beyond 256 points these kernels run, with short rows; short(N1=.., C=..) changes them."""

    def rows(N1=16, N2=16, BLOCK0=16, C=128):
        size = lambda points, wide: {"N0": -(-points // (N1 * N2)), "N1": N1, "N2": N2, "BLOCK0": BLOCK0, "C": C}
        monkeypatch.setattr(dev, "sizes", size)

    monkeypatch.setattr(fft_device, "limit", lambda *_: 256)
    rows()
    return rows


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, L, K, dtype", (
    ("causal", 257, 600, F32), ("circular", 300, 700, F16), ("same", 513, 40, BF16), ("full", 200, 130, F32),
    ("causal", 300, 1, BF16), ("circular", 512, 20, F32), ("same", 260, 300, F16), ("full", 3, 290, F16),
))  # fmt: skip
def test_modes_and_lengths(short, mode, L, K, dtype):
    """One more than a column of rows, and columns that end within a tile; K from 1 to beyond 2 L."""
    torch.manual_seed(L)
    check(*case(2, 1, L, K, mode, dtype), kernels=long)


@pytest.mark.parametrize("option", ("", "skip numbers", "bias mask", "k_reverse pregate"))
def test_options(short, option):
    torch.manual_seed(2)
    check(*case(1, 1, 270, 300, "causal", F32, option), kernels=long)


@pytest.mark.parametrize("L, K, mode, dtype", ((4200, 9000, "causal", F16), (30, 4100, "full", F32)))
def test_several_pieces_of_a_column(short, L, K, mode, dtype):
    """More rows than a tile has, 17, with samples in both pieces or in one of them; the first may be the smaller."""
    torch.manual_seed(3)
    short(C=256)
    B, D = (2, 2) if L > 4096 else (1, 1)
    args, dout = case(B, D, L, K, mode, dtype, "bias")
    args[0][0, 0, :4096] *= 1e-6
    check(args, dout, kernels=long)


@pytest.mark.parametrize("N1, N2, BLOCK0, C", ((32, 16, 16, 32), (16, 32, 32, 64)))
def test_shapes_of_tiles(short, N1, N2, BLOCK0, C):
    torch.manual_seed(4)
    short(N1, N2, BLOCK0, C)
    check(*case(1, 1, 515, 500, "same", F16, "postgate"), kernels=long)


def test_strided_inputs(short):
    torch.manual_seed(6)
    args, dout = case(2, 2, 261, 20, "same", options=ALL + " mask")
    args[0] = randn(2, 261, 2).transpose(1, 2)  # channels-last
    args[1], args[2] = randn(20, 2).t(), randn(2, 22)[:, ::2]
    args[3], args[4] = randn(1, 4)[0, ::2], randn(1, 1)[0].expand(2)
    args[5], args[6] = randn(2, 1, 261).expand(2, 2, 261), randn(4, 4, 530)[::2, ::2, 3:525:2]
    args[7] = args[7].new_ones(1, 522)[:, ::2].expand(2, 261)
    check(args, dout.transpose(1, 2).contiguous().transpose(1, 2), kernels=long)


@pytest.mark.parametrize("dtype, L", ((F16, 16411), (BF16, 32768)))
def test_rows_as_they_are_on_a_gpu(dtype, L):
    """A prime beyond the longest fused transform, and a power of two, through the public function."""
    torch.manual_seed(7)
    u, gate, k = randn(1, 1, L, dtype=dtype), randn(1, 1, L, dtype=dtype), randn(1, L)
    assert fft_conv.supports(u, k, *[None] * 6, "causal") is not None
    with scalekern.backend("triton"):
        found = scalekern.fft_conv(u, k, pregate=gate)
    expected = oracle_fwd(u.double(), k.double(), None, None, None, gate.double(), None, None, "causal", "fft")
    assert error(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("precision, bound", (("tf32", 1.5e-3), ("bf16", 1e-2)))
def test_precision(short, precision, bound):
    torch.manual_seed(8)
    args, dout = case(1, 1, 300, 300, options="skip")
    out = poisoned(dout)
    long.fft_conv_fwd(out, *args, precision)
    assert bound / 20 < error(out, oracle_fwd(*[double(x) for x in args])) <= bound


@pytest.mark.parametrize("parts", (1, 2, 3))
def test_direct_sums_in_parts(parts):
    """dbias and dskip over three blocks of times, the last not full, in parts of one and more of them."""
    torch.manual_seed(15)
    args, dout = case(3, 2, 2300, 300, "full", F16)
    u, pregate, postgate, mask = args[0], *args[5:8]
    dbias, dskip = (torch.full((parts, 2), float("nan")) for _ in range(2))
    filters.plan_sums(dbias, dskip, dout, u, pregate, postgate, mask.view(torch.uint8), True).run()
    dy, v = dout.double() * postgate, u.double() * pregate * mask[:, None]
    assert error(dbias.sum(0), dy.sum((0, 2))) < 1e-5
    assert error(dskip.sum(0), (dy[..., :2300] * v).sum((0, 2))) < 1e-5


# --- scales -----------------------------------------------------------------------------------------------------------


def test_half_precision_keeps_its_range(short):
    """Tiles, rows and channels of very different magnitudes, some of zeros: nothing overflows, nothing is lost."""
    torch.manual_seed(9)
    args, dout = case(3, 2, 600, 600, "causal", BF16, "")
    args[0][0, :, 140:] = 0
    args[0][1] *= 1e-6
    args[0][1, :, torch.arange(600) % 256 >= 128] = 0  # a tile of it
    dout *= 1e3
    args[0][2, :, 300:] *= 1e4
    args[1][1] *= 1e5
    args[0][0, 1] = 0
    out, expected = forward(args, dout, long), oracle_fwd(*[double(x) for x in args])
    for b in range(3):
        for d in range(2):
            assert error(out[b, d], expected[b, d]) <= (TOLERANCE[BF16] if expected[b, d].any() else 0)
    (du, dk, *_), (expected_du, expected_dk, *_) = backward(args, dout, long), oracle_bwd(*map(double, (dout, *args)))
    for d in range(2):
        assert error(dk[d], expected_dk[d]) <= TOLERANCE[BF16]
        assert all(error(du[b, d], expected_du[b, d]) <= TOLERANCE[BF16] for b in range(3))


def test_a_tone_of_the_rows_in_the_middle(short):
    """Of three pieces of rows the first and the last have a millionth of the second's spectrum: the scale of the way
    back is the largest of all pieces, or the second's rows would overflow."""
    torch.manual_seed(17)
    L, bin_ = 48 * 256, 24.25  # of 48 rows; its mirror image is row 23
    args, dout = case(1, 1, L, L, "causal", F16, "")
    t = torch.arange(L, dtype=torch.float64)
    tone = torch.cos(2 * math.pi * bin_ / 48 * t / 256) * torch.sin(math.pi * (t + 0.5) / L) ** 4
    args[0], args[1] = tone.half()[None, None], tone.float()[None]
    assert error(forward(args, dout, long), oracle_fwd(*map(double, args[:8]), "causal", "fft")) <= TOLERANCE[F16]


def test_filters_of_very_different_magnitudes(short):
    """One of zeros, and ahead of the samples 1e6 times what is behind them."""
    torch.manual_seed(16)
    args, dout = case(1, 2, 300, 300, "causal", F16, "k_reverse")
    args[1][0], args[2][0] = 0, 0
    args[2][1] *= 1e6
    dout /= 1e3
    args[0] /= 1e3
    out, expected = forward(args, dout, long), oracle_fwd(*map(double, args))
    assert not out[:, 0].any() and error(out[:, 1], expected[:, 1]) <= TOLERANCE[F16]


def test_masked_nan_goes_nowhere_and_others_everywhere(short):
    torch.manual_seed(10)
    args, dout = case(2, 1, 300, 33)
    hidden = ~args[7][:, None].expand_as(args[0])
    args[0][hidden], args[5][hidden] = float("nan"), float("inf")
    check(args, dout, kernels=long)
    args[7] = None
    args[0], args[5] = randn(2, 1, 300), randn(2, 1, 300)
    args[0][1, 0, 99] = float("nan")
    out = forward(args, dout, long)
    assert out[0].isfinite().all() and out[1].isnan().any()


@pytest.mark.parametrize("N0, N1, N2", ((2048, 64, 32), (1000, 64, 64), (9, 64, 32)))
def test_tables(N0, N1, N2):
    """Every twiddle of the longest transforms within float32's rounding: no angle is computed in float32."""
    table = dev._tables(N0, 16 if N0 < 16 else 64, N1, N2, "fp16x3", torch.device("cpu"))
    wave = lambda name: torch.complex(*table[name].double())
    k1, n1, n2 = (torch.arange(n) for n in (N1, N1, N2))
    k0 = torch.cat([torch.arange(0, N0, 9), torch.arange(N0 - 9, N0)])
    exact = lambda numerator, denominator: torch.polar(
        torch.ones(numerator.shape, dtype=torch.float64),
        -2 * math.pi / denominator * (numerator % denominator).double(),
    )  # fmt: skip
    shifted = 4 * k0 + 1  # h = shifted / (4 N0)
    assert (wave("turn_ptr")[k0] - exact(shifted[:, None] * n1, 4 * N0 * N1)).abs().max() < 1e-7
    twiddles = wave("inner_ptr")[None] * wave("shift_ptr")[k0, None]
    numerator = (4 * N0 * k1[:, None] + shifted[:, None, None]) * n2
    assert (twiddles - exact(numerator, 4 * N0 * N1 * N2)).abs().max() < 2e-7


# --- behaviour --------------------------------------------------------------------------------------------------------


def test_memory_in_turns_and_parts(short, monkeypatch):
    """Few bytes at a time: channels, then rows, take turns. The signals' results are the same bits, the filters' sums
    are in another order. All buffers of a call together are within the bound, but for the scales."""
    torch.manual_seed(11)
    args, dout = case(3, 2, 258, 40, "causal", F16)
    whole = [forward(args, dout, long), *backward(args, dout, long)]
    sizes, empty = [], torch.Tensor.new_empty

    def seen(self, *shape, **kw):
        made = empty(self, *shape, **kw)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", seen)
    row = 2 * 512 * 2  # bytes of a workspace, and half of those of a spectrum
    scales = 2 * 512
    monkeypatch.setattr(long, "WANTED", 1)
    monkeypatch.setattr(long, "TIMES", 200)  # direct sums in two parts
    monkeypatch.setattr(long, "BOUND", 2 * row + 2 * row)
    found = [forward(args, dout, long)]
    assert 3 * row <= sum(sizes) <= long.BOUND + scales
    sizes.clear()
    monkeypatch.setattr(long, "BOUND", 2 * 2 * row + 3 * 2 * row)  # two rows at a time in the backward
    found += backward(args, dout, long)
    assert 8 * row <= sum(sizes) <= long.BOUND + scales
    for i, (a, b) in enumerate(zip(whole, found)):
        assert torch.equal(a, b) if i in (0, 1, 6, 7) else error(b, a) < 1e-6, i
    monkeypatch.setattr(long, "BOUND", 0)  # a row at a time
    _, dk, *_ = backward(args, dout, long)
    assert error(dk, whole[2]) < 1e-6


@pytest.mark.parametrize("wanted", (3, 4))
def test_groups_of_rows_end_with_the_batch(short, monkeypatch, wanted):
    """Three rows in groups of two, or in two parts of the gradient: no row is missed, taken twice or beyond them."""
    torch.manual_seed(14)
    monkeypatch.setattr(long, "WANTED", wanted)
    empty, tails = torch.Tensor.new_empty, []

    def guarded(self, *shape, **kw):
        """As it is, with numbers behind that must stay."""
        size = empty(self, *shape, **kw).shape
        whole = empty(self, size.numel() + 4096, **kw).fill_(7)
        tails.append(whole[size.numel() :])
        return whole[: size.numel()].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    check(*case(3, 1, 270, 60, "causal", F16, "postgate"), kernels=long)
    assert tails and all((tail == 7).all() for tail in tails)


def test_repeatable_and_64_bit_offsets(short, monkeypatch):
    torch.manual_seed(12)
    args, dout = case(1, 1, 300, 40, "circular", F16, "mask postgate")
    first = [forward(args, dout, long), *backward(args, dout, long)]
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    for a, b in zip(first, [forward(args, dout, long), *backward(args, dout, long)]):
        assert torch.equal(a, b)


def test_one_that_fits_is_fused(monkeypatch):
    torch.manual_seed(13)
    args, dout = case(1, 1, 40, 20, options="skip")
    plans = lambda *_: pytest.fail("passes for what one fused transform holds")
    monkeypatch.setattr(long, "_plan_fwd", plans)
    monkeypatch.setattr(long, "_plan_bwd", plans)
    check(args, dout, kernels=long)


def test_supports():
    u, k = torch.empty(1, 1, 2**17), torch.empty(1, 4)
    for call, reason in (
        ((u.double(), k), "float64"), ((u, k[None]), "k is a filter for every sample"),
        ((u.expand(1, 65536, 2**17), k.expand(65536, 4)), "65536 channels"),
        ((torch.empty(1, 1, 1).expand(1, 1, 2**22 + 1), k), "4194305 samples, more than 4194304"),
    ):  # fmt: skip
        assert reason in long.supports(*call, *[None] * 6, "causal")
    assert long.supports(u, k, *[None] * 6, "causal") is None


@pytest.mark.parametrize("wide", (False, True))
def test_sizes(wide):
    """Enough points, at most a row of an eighth too many; whole tiles of columns; powers of two exactly."""
    for points in (16385, 16411, 20000, 50000, 99991, 2**20 - 1, 2**20 + 1, 3 * 2**20, *(2**i for i in range(15, 23))):
        factors = dev.sizes(points, wide)
        N0, N1, N2, block, columns = (factors[name] for name in ("N0", "N1", "N2", "BLOCK0", "C"))
        assert points <= N0 * N1 * N2 <= points * 1.125 and N1 * N2 % columns == 0 and columns % N2 == 0
        assert block * columns <= 4096 and (points & (points - 1) or N0 * N1 * N2 == points)


def test_the_check_can_fail(short, monkeypatch):
    args, dout = case(1, 1, 257, 16)
    launch = long.fft_conv_fwd
    monkeypatch.setattr(long, "fft_conv_fwd", lambda out, *a: (launch(out, *a), out.zero_()))
    with pytest.raises(AssertionError, match="out: relative error"):
        check(args, dout, kernels=long)
