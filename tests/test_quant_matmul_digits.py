"""Few float tokens with integer codes, whose numbers a CPU with VNNI takes as three or four bytes each (fixed point,
a unit a group): as exact as floats, whatever their sizes. The level below answers to the same floors.

Shape letters: M tokens, N outputs, K inputs, G groups.
"""

import itertools

import pytest
import torch
from conftest import at_levels
from test_quant_matmul_cpu import FLOOR, error, on_the_cpu_kernels, randn, spoiled, weight  # noqa: F401

import scalekern
from scalekern import _native, reference
from scalekern.quant import QuantizedTensor
from scalekern.quant._pack import pack

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")

BITS = tuple(range(1, 9))
lower_levels = at_levels("avx2", "avx512", "vnni")


def exact_product(x, w):
    return x.double() @ w.dequantize(torch.float64).mT


def spread(x, group, factor, column=3):
    """One column of each group so many times as large."""
    x = x.clone()
    x[:, column::group] *= factor
    return x


def without(w, group, column=3):
    """The same weight with codes of 0 in that column of each group: what the others give is all there is."""
    codes = scalekern.quant._pack.unpack(w.data, w.bits, w.columns)
    codes[:, column::group] = 1 << (w.bits - 1)
    return w.replace(data=pack(codes, w.bits))


@lower_levels
def test_whole_numbers_are_exact():
    """Numbers and scales of few bits: float32 holds every sum, and so do digits. Groups share lines, fill one, several,
    or make parts of up to 1024 columns; rows end inside a line, and strips of rows inside the four of a tile."""
    shapes = itertools.cycle([(17, 515), (6, 300), (33, 1040), (1, 131), (4, 2300)])
    groups = (4, 7, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 1536, None)
    for bits, zeros in itertools.product(BITS, (False, True)):
        for group, M in zip(groups, itertools.cycle((1, 2, 3, 4))):
            N, K = next(shapes)
            generator = torch.Generator().manual_seed(N + K + bits)
            draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: B023
            G, size = -(-K // (group or K)), group or K
            codes, x, halves = draw(0, 1 << bits, N, K), draw(-7, 8, M, K), draw(1, 3, N, G)
            z = draw(0, 1 << bits, N, G).float() if zeros else None
            w = QuantizedTensor(pack(codes, bits), halves / 2, z, format=f"int{bits}", columns=K, group_size=size)
            w = spoiled(w)
            exact = exact_product(x, w)
            assert torch.equal(scalekern.quant_matmul(x.float(), w).double(), exact), (bits, zeros, group, M, N, K)


def as_exact_as_float32(bits, N, cases):
    for group, M, K in cases:
        w, x = weight(N, K, f"int{bits}", group, symmetric=bits != 2), randn(M, K, seed=1)
        exact = exact_product(x, w)
        assert error(scalekern.quant_matmul(x, w), exact) <= min(3e-7, 2 * error(x @ w.dequantize().mT, exact)), group


@pytest.mark.parametrize("bits", BITS)
@at_levels("vnni")  # floats alone are not as exact as torch's product everywhere
def test_as_exact_as_float32(bits):
    as_exact_as_float32(bits, 70, ((128, 1, 4096), (64, 2, 1000), (None, 3, 5000), (2048, 4, 4096)))


@pytest.mark.parametrize("bits", BITS[1:])
def test_the_unit_is_as_small_as_may_be(bits):
    """A largest number of 1 is just above what 2^-7 holds: with 2^-6 the error is 1.6e-7, twice that of torch."""
    w, x = weight(300, 128, f"int{bits}", 128), torch.rand(4, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[:, 0] = 1
    assert error(scalekern.quant_matmul(x, w), exact_product(x, w)) <= 1.3e-7


FACTORS = (10.0, 100.0, 1e3, 1e4, 1e6, 1e9)


def one_large_column_in_every_group(factor, dtype, cases):
    for group, M in cases:
        w = weight(40, 1024, "int4", group)
        x = spread(randn(M, 1024, seed=1), group or 128, factor).to(dtype)
        for w in (w, without(w, group or 128)):
            exact = exact_product(x, w)
            if exact.to(dtype).isfinite().all():
                assert error(scalekern.quant_matmul(x, w), exact) <= FLOOR[dtype], (group, M)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", FLOOR)
@lower_levels
def test_one_large_column_in_every_group(factor, dtype):
    """Even where the weight has nothing for it: then all digits of the others have to be there."""
    one_large_column_in_every_group(factor, dtype, ((128, 1), (32, 3), (None, 2)))


@pytest.mark.parametrize("bits", BITS)
@lower_levels
def test_groups_of_any_size_of_numbers(bits):
    """A unit a group: the small ones keep their digits, as their scales show. And zeros, and a group of one number."""
    K, group = 2048, 128
    sizes = 10.0 ** torch.linspace(-18, 18, K // group)
    w = weight(20, K, f"int{bits}", group)
    for low, high in itertools.pairwise(range(0, K + 1, group)):  # all other groups are 0
        x = torch.zeros(2, K)
        x[:, low:high] = randn(2, group, seed=low) * sizes[low // group]
        x[1, low + 1 : high] = 0
        assert error(scalekern.quant_matmul(x, w), exact_product(x, w)) <= 3e-7, low
    assert not scalekern.quant_matmul(torch.zeros(1, K), w).any()
    x = randn(1, K) * sizes.repeat_interleave(group)
    w = w.replace(scales=w.scales / sizes)
    assert error(scalekern.quant_matmul(x, w), exact_product(x, w)) <= 3e-7


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-22, 1e22, 1e32])
def test_very_small_and_large_numbers(size):
    w, x = weight(20, 300, "int8", 64), randn(2, 300) * size
    unit = 1 / size if size > 1e-37 else 2.0**126
    exact = exact_product(x.double() * unit, w)
    floor = 1e-6 if size > 1e-37 else 1e-4 if size > 1e-39 else 1  # subnormal there, or a few units of those
    assert error(scalekern.quant_matmul(x, w).double() * unit, exact) <= floor


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@lower_levels
def test_what_is_not_finite_stays_in_its_token(bad, dtype):
    for group, M in ((128, 2), (32, 4), (None, 3)):
        w, x = weight(21, 300, "int4", group), randn(M, 300).to(dtype)
        whole = scalekern.quant_matmul(x, w)
        x[M // 2, 5] = bad
        out, expected = scalekern.quant_matmul(x, w), reference.quant_matmul(x, w)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
        assert torch.equal(out[M // 2].sign(), expected[M // 2].sign()) or bad != bad
        others = torch.arange(M) != M // 2
        assert error(out[others], whole[others].double()) <= FLOOR[dtype]


@lower_levels
def test_a_scale_that_is_no_number_stays_in_its_row():
    for group in (128, 32, None):
        w = weight(21, 300, "int4", group)
        clean, w = scalekern.quant_matmul(randn(2, 300), w), w.replace(scales=w.scales.clone())
        w.scales[13, -1] = float("nan")
        out = scalekern.quant_matmul(randn(2, 300), w)
        others = torch.arange(21) != 13
        assert out[:, 13].isnan().all() and torch.equal(out[:, others], clean[:, others])


@lower_levels
def test_a_token_is_the_same_in_any_company():
    """Tokens that take three digits, four, or none, in all orders: each is by itself what it is among others."""
    for format, group in (("int4", 128), ("int4", 32), ("int8", None), ("int2", 64)):
        w = weight(37, 1024, format, group, symmetric=group != 32)
        kinds = [randn(1, 1024), spread(randn(1, 1024, seed=1), 128, 500.0), spread(randn(1, 1024, seed=2), 128, 1e7)]
        alone = [scalekern.quant_matmul(x, w) for x in kinds]
        for order in itertools.chain(itertools.product(range(3), repeat=3), itertools.permutations((0, 1, 2, 0))):
            out = scalekern.quant_matmul(torch.cat([kinds[i] for i in order]), w)
            assert torch.equal(out, torch.cat([alone[i] for i in order])), (format, group, order)


@lower_levels
def test_strides_and_parts():
    w = weight(40, 512, "int4", 64, symmetric=False)
    w = w.replace(scales=w.scales.half(), zeros=w.zeros.mT.contiguous().mT, offsets=(randn(40, 16) / 9)[:, ::2],
                  outer=torch.rand(40, 1) + 0.5)  # fmt: skip
    plain = weight(40, 512, "int4", 64)
    plain = plain.replace(scales=plain.scales.mT.contiguous().mT)
    bias, x = randn(40).half(), randn(512, 9).mT
    for view in (w, w[3:20], w[:, :192], plain, plain[5:], plain.replace(scales=plain.scales[:1])):
        N, K = view.shape
        given = x[::3, :K]
        exact = exact_product(given, view) + bias[:N].double()
        assert error(scalekern.quant_matmul(given, view, bias=bias[:N]), exact) <= 1e-6
        out = scalekern.quant_matmul(spread(given, 64, 1e7), view, out_dtype=torch.float64)
        assert error(out, exact_product(spread(given, 64, 1e7), view)) <= 1e-6
