"""Products of many tokens with a low-bit weight on a CPU's tile registers, against float64 on the dequantized weight.

On a machine without them the float path answers, to the same floors. Shape letters: M tokens, N outputs, K inputs.
"""

import itertools

import pytest
import torch
from conftest import at_levels
from test_quant_matmul_cpu import (  # noqa: F401
    FLOOR,
    VARIANTS,
    error,
    on_the_cpu_kernels,
    randn,
    same_bits_on_any_threads,
    spoiled,
    weight,
)

import scalekern
from scalekern import _native, reference
from scalekern.quant import FORMATS

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")

# A tile is 16 rows or tokens and 32 columns; 512 tokens and 64 rows are a block, and 512 columns are decoded at once.
SHAPES = [(5, 17, 31), (16, 16, 512), (17, 33, 100), (33, 65, 545), (100, 5, 1030), (16, 100, 257), (48, 64, 96)]
GROUPS = (128, 32, None, 100, 64, 16, 7)


def exact_product(x, w):
    return x.double() @ w.dequantize(torch.float64).mT


@pytest.mark.parametrize("format, symmetric", VARIANTS, ids=lambda v: {True: "", False: "zeros"}.get(v, v))
@at_levels("avx512", "vnni", "bf16")
def test_every_format(format, symmetric):
    for (M, N, K), group, dtype in zip(SHAPES * 3, GROUPS * 4, itertools.chain(*([d] * 7 for d in FLOOR))):
        w, x = spoiled(weight(N, K, format, group, symmetric)), randn(M, K, seed=1).to(dtype)
        assert error(scalekern.quant_matmul(x, w), exact_product(x, w)) <= FLOOR[dtype], (M, N, K, group, dtype)


@pytest.mark.parametrize("format", ["int4", "int8", "nf4", "fp8_e4m3", "int3"])
def test_float32_keeps_its_digits(format):
    """Parts of both sides, sums of long rows, and rows and tokens of very different sizes, each held to the floor."""
    M, N, K = 33, 40, 7392
    w = weight(N, K, format, 128, symmetric=format != "int3")
    w = w.replace(scales=w.scales * 10.0 ** torch.linspace(-12, 12, N)[:, None])
    x = randn(M, K, seed=1) * 10.0 ** torch.linspace(-9, 9, M)[:, None]
    x[:, ::3] *= 1e-6
    out, exact = scalekern.quant_matmul(x, w).double(), exact_product(x, w)
    scaled = (10.0 ** torch.linspace(-9, 9, M, dtype=torch.float64))[:, None] * w.dequantize(torch.float64).norm(dim=1)
    assert error(out / scaled, exact / scaled) <= 6e-7


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e32])
def test_what_parts_cannot_hold(size):
    """Subnormal parts would be 0, and sums of codes Inf, in tiles: such calls are the float path's."""
    w, x = weight(20, 300, "int8", 64), randn(20, 300) * size
    unit = 1 / size if size > 1e-37 else 2.0**126
    exact = exact_product(x.double() * unit, w)
    floor = 1e-6 if size > 1e-37 else 1e-4  # x itself is subnormal there
    assert error(scalekern.quant_matmul(x, w).double() * unit, exact) <= floor


@pytest.mark.parametrize("activation", [None, "fp8"])
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(bad, dtype, activation):
    w, x = weight(70, 200, "int4", 64), randn(18, 200).to(dtype)
    x[17, 5] = bad
    out, expected = (q.quant_matmul(x, w, activation=activation) for q in (scalekern, reference))
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    assert out[:17].isfinite().all() and error(out[:17], expected[:17].double()) <= 2 * FLOOR[dtype]


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("size", [float("nan"), 1e-30, 1e32])
def test_what_one_token_needs_is_not_the_others_affair(size, dtype):
    """Tokens that tiles cannot hold go the float path, each by itself: nobody else's bits change."""
    for format, symmetric, group in (("nf4", True, 64), ("int4", False, 32)):
        w, x = weight(70, 200, format, group, symmetric), randn(530, 200)
        x[::2] *= 1000 if dtype != torch.float16 else 1
        whole = scalekern.quant_matmul(x.to(dtype), w)
        large = torch.tensor([3, 15, 16, 17, 511, 512, 529])  # edges of tiles and of blocks
        x[large] *= size
        given = x.to(dtype)
        out, exact = scalekern.quant_matmul(given, w), exact_product(given, w)
        others = torch.ones(530, dtype=torch.bool).index_fill(0, large, False)
        assert torch.equal(out[others], whole[others])
        assert torch.equal(out[large].isnan(), exact[large].isnan())
        if size == size and dtype != torch.float16:
            assert error(out[large].double() / size, exact[large] / size) <= FLOOR[dtype]


def test_scales_of_few_bits_are_exact_in_one_part():
    """Block formats: bfloat16 times a power of two, or a float8, holds all, and what is outside of them comes last."""
    for format, group in (("mxfp4", 32), ("mxfp8_e4m3", 32), ("mxfp8_e5m2", 32), ("mxfp6_e2m3", 32), ("nvfp4", 16)):
        w = weight(37, 300, format, group)
        G = w.scales.shape[1]
        scales = 2.0 ** torch.arange(-3, 4).repeat(37 * G)[: 37 * G].reshape(37, G)
        if format == "nvfp4":
            scales *= torch.arange(8, 15).repeat(37 * G)[: 37 * G].reshape(37, G) / 8  # all bits of a float8
        w = w.replace(scales=scales.to(w.scales.dtype))
        x = torch.eye(300)[torch.arange(40) * 7]  # one number of the weight each
        if w.outer is not None:
            w = w.replace(outer=torch.full_like(w.outer, 0.625))
        for dtype in FLOOR:
            assert torch.equal(scalekern.quant_matmul(x.to(dtype), w), exact_product(x, w).to(dtype))


@pytest.mark.parametrize("format, top", [("fp8_e4m3", 0x7F), ("fp8_e5m2", 0x7C)])
def test_every_code_of_eight_bits(format, top):
    """As it is, times a power of two, and times a number that makes it another; those that are not finite, one a row."""
    finite = torch.tensor([code for code in range(256) if code % 128 < top], dtype=torch.uint8)
    special = torch.tensor([code for code in range(256) if code % 128 >= top], dtype=torch.uint8)
    w = weight(40, len(finite), format, None).replace(data=torch.stack([finite.roll(i) for i in range(40)]))
    for scale in (1.0, 2.0**-20, 0.75 * 2.0**9):
        w = w.replace(scales=torch.full_like(w.scales, scale))
        exact = w.dequantize(torch.float64).mT
        assert torch.equal(scalekern.quant_matmul(torch.eye(len(finite)).bfloat16(), w), exact.bfloat16())
        data = w.data.clone()
        data[: len(special), 100] = special
        spoiled, ones = w.replace(data=data), torch.ones(5, len(finite)).bfloat16()
        out, exact = scalekern.quant_matmul(ones, spoiled), exact_product(ones, spoiled)
        assert (~exact[0].isfinite()).sum() == len(special) and torch.equal(out.isnan(), exact.isnan())
        assert torch.equal(out[out.isinf()].double(), exact[exact.isinf()])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("code", [0x7C, 0xFC, 0x7E])
def test_a_weight_that_is_not_finite_stays_in_its_row(code, dtype):
    w, x = weight(90, 100, "fp8_e5m2", 32), randn(20, 100).to(dtype)
    clean = scalekern.quant_matmul(x, w)
    w.data[66, 77] = code
    out, exact = scalekern.quant_matmul(x, w), exact_product(x, w)
    assert torch.equal(out[:, 66].isnan(), exact[:, 66].isnan())
    assert torch.equal(out[:, 66].sign(), exact[:, 66].sign().to(dtype))
    others = torch.arange(90) != 66
    assert out[:, others].isfinite().all() and error(out[:, others], clean[:, others].double()) <= 2 * FLOOR[dtype]


@pytest.mark.parametrize("dtype", FLOOR)
def test_float8_activations(dtype):
    for format, symmetric, M in (("int4", True, 17), ("int4", False, 16), ("nf4", True, 33), ("fp8_e4m3", True, 5)):
        w, x = weight(50, 300, format, 64, symmetric), randn(M, 300, seed=1).to(dtype)
        exact = reference.quant_matmul(x.double(), w, activation="fp8")
        # x's scale and quotient are float32's, there and here; a number between two float8 may go either way in float64
        assert error(scalekern.quant_matmul(x, w, activation="fp8"), exact) <= max(FLOOR[dtype], 1e-6)


@pytest.mark.parametrize("out_dtype", [torch.float64, *FLOOR])
@pytest.mark.parametrize("dtype", FLOOR)
def test_the_dtype_of_the_result_decides(dtype, out_dtype):
    for format in ("int4", "nf4"):
        w, x, bias = weight(40, 520, format, 128), randn(19, 520).to(dtype), randn(40)
        out = scalekern.quant_matmul(x, w, bias=bias, out_dtype=out_dtype)
        assert out.dtype == out_dtype
        assert error(out, exact_product(x, w) + bias.double()) <= FLOOR.get(out_dtype, 1e-6)


@at_levels("avx512", "vnni", "bf16")
def test_strides_and_parts():
    w = weight(40, 192, "int4", 64, symmetric=False)
    w = w.replace(scales=w.scales.half(), zeros=w.zeros.mT.contiguous().mT, offsets=(randn(40, 6) / 9)[:, ::2],
                  outer=torch.rand(40, 1) + 0.5)  # fmt: skip
    x = randn(192, 21).mT
    for view in (w, w[3:20], w[:, :128]):
        given = x[::2, : view.shape[1]]
        assert error(scalekern.quant_matmul(given, view), exact_product(given, view)) <= 1e-6
    assert scalekern.quant_matmul(x[:0], w).shape == (0, 40)


def test_threads_change_no_bit():
    cases = [(weight(301, 520, f, 128), randn(M, 520).to(d))
             for (f, M), d in itertools.product((("int4", 17), ("nf4", 530)), FLOOR)]  # fmt: skip
    same_bits_on_any_threads(cases)


def test_a_token_is_the_same_in_any_company():
    w, x = weight(100, 600, "int4", 128), randn(530, 600)
    whole = scalekern.quant_matmul(x, w)
    for some in (slice(0, 5), slice(250, 290), slice(17, 34)):
        assert torch.equal(scalekern.quant_matmul(x[some], w), whole[some])


def test_groups_that_begin_between_64_columns():
    """Floats of 8 bits come 64 at a time: two groups in one, a row that ends in its first half, blocks of columns."""
    for format, group in (("fp8_e4m3", 96), ("fp8_e5m2", 160), ("mxfp8_e4m3", 32)):
        for K in (800, 2144):
            w, x = weight(18, K, format, group), randn(20, K, seed=1).bfloat16()
            assert error(scalekern.quant_matmul(x, w), exact_product(x, w)) <= FLOOR[torch.bfloat16], (format, K)
