"""The CPU kernels of quant_matmul: every format, group and shape against float64, integers to the last bit.

Shape letters: M tokens, N outputs, K inputs.
"""

import itertools

import pytest
import torch
from conftest import at_levels

import scalekern
from scalekern import _native, reference
from scalekern.ops import _quant_matmul_cpu
from scalekern.quant import FORMATS, QuantizedTensor, quantize
from scalekern.quant._formats import BLOCK_FORMATS
from scalekern.quant._pack import pack, row_bytes

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")

FLOOR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}  # what the family promises, relative L2
GROUPS = (None, "tensor", 128, 32, 7)
VARIANTS = [(f, True) for f in (*FORMATS, *BLOCK_FORMATS)]
VARIANTS += [(f, False) for f, fmt in FORMATS.items() if fmt.is_integer and f != "ternary"]


@pytest.fixture(autouse=True)
def on_the_cpu_kernels():
    with scalekern.backend("cpu"):
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(N, K, format, group_size, symmetric=True, **options):
    return quantize(randn(N, K, seed=N + K), format, group_size=group_size, symmetric=symmetric, **options)


def error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


def same_bits_on_any_threads(cases):
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append([scalekern.quant_matmul(x, w) for w, x in cases])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def spoiled(w):
    """The same weight in rows that are part of wider ones, with ones in the bits after its last code."""
    wide = torch.full((w.data.shape[0], w.data.shape[1] + 13), 255, dtype=torch.uint8)
    wide[:, 5 : 5 + w.data.shape[1]] = w.data
    if left := w.columns * w.bits % 8:
        wide[:, 4 + w.data.shape[1]] |= 255 << left & 255
    return w.replace(data=wide[:, 5 : 5 + w.data.shape[1]])


@pytest.mark.parametrize("format, symmetric", VARIANTS, ids=lambda v: {True: "", False: "zeros"}.get(v, v))
def test_every_format_and_group(format, symmetric):
    """Each group size on its own shape: one token and few (registers), many (blocks); a row's end inside a byte."""
    shapes = itertools.cycle([(1, 17, 100), (5, 100, 50), (64, 1, 100), (33, 17, 50), (4, 17, 300)])
    for group, (M, N, K) in zip((*GROUPS, 128, 64), shapes):
        w = spoiled(weight(N, K, format, group, symmetric))
        exact = randn(M, K, seed=1).double() @ w.dequantize(torch.float64).mT
        for dtype in (torch.float32,) if group in (7, 64) else FLOOR:
            x = randn(M, K, seed=1).to(dtype)
            exact = x.double() @ w.dequantize(torch.float64).mT
            out = scalekern.quant_matmul(x, w)
            assert out.dtype == dtype and out.shape == (M, N)
            assert error(out, exact) <= FLOOR[dtype], (group, M, N, K, dtype)


IN_REGISTERS = (
    "int3", "int5", "int6", "int7", "nf4", "fp4_e2m1", "fp4_bnb", "fp6_e3m2", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2",
)  # fmt: skip


@pytest.mark.parametrize("format", IN_REGISTERS)
def test_few_tokens_in_many_groups(format):
    """A step is 16 or 32 columns: groups of one, of several, and a row that ends inside a step, a group and a byte."""
    symmetric = not FORMATS[format].is_integer
    shapes = itertools.cycle([(17, 333, 32), (6, 125, 16), (9, 1000, 64), (3, 9, None)])
    for M, (N, K, group) in zip((1, 2, 3, 4, 1, 2), shapes):
        w, x = spoiled(weight(N, K, format, group, symmetric)), randn(M, K, seed=1)
        assert error(scalekern.quant_matmul(x, w), x.double() @ w.dequantize(torch.float64).mT) <= 3e-7, (M, N, K)


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_a_weight_that_is_no_number_stays_in_its_row(format):
    w = weight(9, 200, format, 32)
    w.data[4, 77] = 0x7F  # a NaN of both
    out = scalekern.quant_matmul(randn(1, 200), w)[0]
    assert out[4].isnan() and out.isnan().sum() == 1


@pytest.mark.parametrize("M", [1, 257])
@pytest.mark.parametrize("format", ["int4", "int3", "nf4", "int8"])
def test_long_rows(format, M):
    w = weight(100, 7392, format, 128 if format != "int8" else None, symmetric=format != "int4")
    x = randn(M, 7392, seed=1)
    assert error(scalekern.quant_matmul(x, w), x.double() @ w.dequantize(torch.float64).mT) <= 1e-6
    with torch.no_grad():
        rounded = reference.quant_matmul(x.double(), w, activation="int8")
    assert error(scalekern.quant_matmul(x, w, activation="int8"), rounded) <= 1e-6


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group, K", [(256, 700), (64, 200), (32, 200), (16, 150), (7, 50), (2048, 4500)])
def test_integer_sums_are_exact(bits, group, K):
    """Scales are powers of two and sums stay below 2^24, so float32 holds every step: equal to int64, bit for bit."""
    generator = torch.Generator().manual_seed(bits)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)
    G = -(-K // group)
    for M, zeros in itertools.product((1, 3, 9), (False, True)):
        codes, x = draw(0, 1 << bits, 19, K), draw(-127 if K < 1000 else -7, 128 if K < 1000 else 8, M, K)
        scales, z = 2.0 ** -draw(0, 2, 19, G), draw(0, 1 << bits, 19, G)
        w = QuantizedTensor(
            pack(codes, bits), scales, z.float() if zeros else None, format=f"int{bits}", columns=K, group_size=group
        )
        by_group = lambda part: part.repeat_interleave(group, 1)[:, :K]
        if bits == 1:  # stands for -1 and 1
            values = 2 * codes - 1 - (by_group(z) if zeros else 0)
        else:
            values = codes - (by_group(z) if zeros else 1 << (bits - 1))
        exact = x.double() @ (values * by_group(scales)).double().mT
        out = scalekern.quant_matmul(x.float(), w, activation="int8", activation_scale=1.0)
        assert torch.equal(out.double(), exact), (M, zeros)


@pytest.mark.parametrize("code, number", [(0, 127), (255, -127), (0, -127)])
def test_the_largest_integers_do_not_overflow(code, number):
    K = 1 << 15
    codes = torch.full((5, K), code, dtype=torch.uint8)
    w = QuantizedTensor(codes, torch.ones(5, 1), format="int8", columns=K, group_size=K)
    for M in (1, 6):
        out = scalekern.quant_matmul(torch.full((M, K), float(number)), w, activation="int8")
        assert torch.equal(out, torch.full((M, 5), float((code - 128) * number * K)))


def test_the_order_of_scales_of_one_group():
    """float32(sum) times the weight's scale, times the token's: the same roundings as these three operations."""
    w, x = weight(33, 1000, "int8", None), randn(6, 1000, seed=1)
    scale = x.abs().amax(-1, keepdim=True) / 127
    sums = (x / scale).round().double() @ (w.data.double() - 128).mT
    exact = sums.float() * w.scales.mT * scale
    assert torch.equal(scalekern.quant_matmul(x, w, activation="int8"), exact)


def test_codes_that_mean_zero_give_zero():
    w = weight(5, 256, "int4", 64)
    w = w.replace(data=torch.full_like(w.data, 0x88))
    for activation in (None, "int8"):
        assert not scalekern.quant_matmul(randn(3, 256) + 100, w, activation=activation).any()


@pytest.mark.parametrize("activation", [None, "int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("M", [3, 9])
def test_what_is_not_finite_stays_in_its_token(activation, bad, M):
    w, x = weight(20, 70, "int4", 32), randn(M, 70)
    whole = scalekern.quant_matmul(x, w, activation=activation)
    x[1, 5] = bad
    out = scalekern.quant_matmul(x, w, activation=activation)
    others = torch.arange(M) != 1
    assert error(out[others], whole[others].double()) < 1e-6
    expected = reference.quant_matmul(x, w, activation=activation)
    assert torch.equal(out[1].isnan(), expected[1].isnan()) and not out[1].isfinite().any()


@pytest.mark.parametrize("activation", [None, "int8"])
def test_threads_change_no_bit(activation):
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = []
            for format, M in (("int4", 1), ("int4", 3), ("nf4", 1), ("int8", 9), ("int5", 2)):
                x = randn(M, 520).requires_grad_()
                out = scalekern.quant_matmul(x, weight(301, 520, format, 128), activation=activation)
                found += [out.detach(), *torch.autograd.grad(out.sum(), x)]
            runs.append(found)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("M", [1, 40])
def test_rows_in_many_shares_are_rows_alone(format, activation, M):
    """A thread that is done takes what another has left: each row once, by the same additions."""
    group = {"group_size": 64} if format == "int4" else {}
    w, x = quantize(torch.randn(1300, 640), format, **group), torch.randn(M, 640)
    for dtype in (torch.float32, torch.bfloat16):
        run = lambda rows: scalekern.quant_matmul(x.to(dtype), rows, activation=activation)  # noqa: B023
        out, alone = run(w), [run(w[i : i + 100]) for i in range(0, 1300, 100)]
        assert out.isfinite().all() and torch.equal(out, torch.cat(alone, 1))


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_parts_of_other_dtypes_and_strides(scale_dtype):
    w = weight(40, 96, "int4", 32, symmetric=False)
    w = w.replace(
        scales=w.scales.to(scale_dtype), zeros=w.zeros.to(torch.uint8).mT.contiguous().mT,
        offsets=(randn(40, 6) / 9)[:, ::2], outer=torch.rand(40, 1) + 0.5,
    )  # fmt: skip
    bias, x = randn(40).to(torch.float16), randn(96, 7).mT
    for view in (w, w[3:20], w[:, :64]):
        N, K = view.shape
        given = x[:, :K]
        exact = given.double() @ view.dequantize(torch.float64).mT + bias[:N].double()
        assert error(scalekern.quant_matmul(given, view, bias=bias[:N]), exact) <= 1e-6
        rounded = reference.quant_matmul(given.double(), view, bias=bias[:N], activation="int4")
        assert error(scalekern.quant_matmul(given, view, bias=bias[:N], activation="int4"), rounded) <= 1e-6


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.bfloat16])
def test_out_dtype(out_dtype):
    w, x = weight(17, 100, "int4", 32), randn(3, 100)
    out = scalekern.quant_matmul(x, w, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert error(out, x.double() @ w.dequantize(torch.float64).mT) <= FLOOR.get(out_dtype, 1e-6)


@pytest.mark.parametrize("format, group", [("int4", 128), ("int3", 7), ("nf4", 64), ("fp8_e4m3", None), ("int1", 32)])
@pytest.mark.parametrize("dtype", FLOOR)
def test_gradient_of_x(format, group, dtype):
    for M, N, K in ((1, 17, 50), (7, 300, 333)):
        w, x = spoiled(weight(N, K, format, group)), randn(M, K).to(dtype).requires_grad_()
        dout = randn(M, N, seed=2).to(dtype)
        (dx,) = torch.autograd.grad(scalekern.quant_matmul(x, w), x, dout)
        assert error(dx, dout.double() @ w.dequantize(torch.float64)) <= FLOOR[dtype]


def test_every_code_of_every_table():
    for name, fmt in FORMATS.items():
        K = 1 << fmt.bits
        codes = torch.arange(K)[None]
        w = QuantizedTensor(pack(codes, fmt.bits), torch.ones(1, 1), format=name, columns=K, group_size=1 << 9)
        finite = w.dequantize(torch.float64)[0].isfinite()
        x = torch.eye(K)[finite]
        clean = w.replace(data=pack(torch.where(finite, codes, 0), fmt.bits))
        out = scalekern.quant_matmul(x, clean)[:, 0]
        assert torch.equal(out, w.dequantize()[0][finite]), name
        if not finite.all():
            bad = codes[:, ~finite][:, :1].to(torch.uint8)
            out = scalekern.quant_matmul(torch.ones(1, 1), w[:, :1].replace(data=bad))
            assert not out.isfinite().any()


def test_none_of_these_ran_on_torch(monkeypatch):
    monkeypatch.setattr(_quant_matmul_cpu, "_quant_matmul", None)
    w, x = weight(9, 40, "int4", 16), randn(2, 40).requires_grad_()
    scalekern.quant_matmul(x, w).sum().backward()
    assert scalekern.quant_matmul(x[:0], w).shape == (0, 9) and row_bytes(40, 4) == w.data.shape[1]


@at_levels("baseline", "avx2", "avx512")
def test_few_tokens_in_groups():
    """Groups of a lane's columns, of some lanes, of a whole vector of words and of several; the last ones short."""
    kinds = [(f, s) for f in ("int1", "int2", "int4", "int8") for s in (True, False) if s or f != "int1"]
    for format, symmetric in kinds:
        for M, (K, group) in enumerate(itertools.product((300, 1040), (4, 8, 16, 32, 64, 128, 256))):
            w = spoiled(weight(9, K, format, group, symmetric))
            x = randn(M % 4 + 1, K, seed=1)
            found = error(scalekern.quant_matmul(x, w).double(), x.double() @ w.dequantize(torch.float64).mT)
            assert found <= 1e-6, f"{format} {group} {K} {M % 4 + 1}: {found:.1e}"
