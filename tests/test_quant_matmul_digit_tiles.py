"""Many float tokens with integer codes as bytes on a CPU's tile registers, tokens in two to four digits: as exact as
floats, whatever their sizes. On a machine without them others answer, to the same floors.

Shape letters: M tokens, N outputs, K inputs, G groups.
"""

import itertools

import pytest
import torch
from conftest import at_levels
from test_quant_matmul_cpu import (  # noqa: F401
    FLOOR,
    error,
    on_the_cpu_kernels,
    randn,
    same_bits_on_any_threads,
    spoiled,
    weight,
)
from test_quant_matmul_digits import (
    BITS,
    FACTORS,
    as_exact_as_float32,
    exact_product,
    one_large_column_in_every_group,
    spread,
)

import scalekern
from scalekern import _native, reference
from scalekern.quant import QuantizedTensor
from scalekern.quant._pack import pack

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")


@pytest.mark.parametrize("bits", BITS)
@at_levels("avx512", "vnni", "bf16")
def test_whole_numbers_are_exact(bits):
    """Groups share lines, fill one, several, or make pieces; rows end inside a line and a pair of tiles, tokens inside
    a tile and the second block of them. Numbers of two digits and more."""
    shapes = itertools.cycle([(17, 515), (70, 300), (33, 1040), (5, 131), (130, 260)])
    groups = (4, 7, 16, 32, 64, 100, 128, 256, 512, 300, None)
    for zeros, group in itertools.product((False, True), groups):
        (N, K), M = next(shapes), (5, 17, 66)[(group or 0) % 3]
        generator = torch.Generator().manual_seed(N + K + bits)
        draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: B023
        G, size = -(-K // (group or K)), group or K
        codes, x, halves = draw(0, 1 << bits, N, K), draw(-9, 10, M, K), draw(1, 3, N, G)
        x[:, ::50] *= 33
        z = draw(0, 1 << bits, N, G).float() if zeros else None
        w = spoiled(QuantizedTensor(pack(codes, bits), halves / 2, z, format=f"int{bits}", columns=K, group_size=size))
        assert torch.equal(scalekern.quant_matmul(x.float(), w).double(), exact_product(x, w)), (zeros, group, M, N, K)


@pytest.mark.parametrize("bits", BITS)
def test_as_exact_as_float32(bits):
    as_exact_as_float32(bits, 40, ((128, 20, 4096), (64, 5, 1000), (None, 70, 3000), (2048, 16, 4096)))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", FLOOR)
def test_one_large_column_in_every_group(factor, dtype):
    one_large_column_in_every_group(factor, dtype, ((128, 9), (32, 17), (None, 5)))


@pytest.mark.parametrize("dtype", FLOOR)
def test_a_token_is_the_same_in_any_company(dtype):
    """Tokens of all numbers of digits, and of none, among others: a tile takes the most of any, part by part."""
    for format, group in (("int4", 128), ("int4", 32), ("int8", None), ("int2", 64)):
        w = weight(37, 1024, format, group, symmetric=group != 32)
        kinds = [randn(16, 1024)]
        for factor in (40.0, 500.0, 2e4, 1e7):  # in some groups of each token
            kinds.append(torch.cat([spread(randn(16, 512, seed=1), 128, factor), randn(16, 512, seed=2)], 1))
        kinds = [(kind.clamp(-1e4, 1e4) if dtype == torch.float16 else kind).to(dtype) for kind in kinds]
        alone = [scalekern.quant_matmul(x, w) for x in kinds]
        for shift in range(3):
            order = [(m + shift) * 7 % 5 for m in range(16)]
            x = torch.stack([kinds[k][m] for m, k in enumerate(order)])
            expected = torch.stack([alone[k][m] for m, k in enumerate(order)])
            for some in (slice(0, 16), slice(1, 7), slice(3, 16)):
                assert torch.equal(scalekern.quant_matmul(x[some], w), expected[some]), (format, group, order, some)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e22, 1e32])
def test_very_small_and_large_numbers(size):
    w, x = weight(20, 300, "int8", 64), randn(70, 300)
    x[::3] *= size
    unit = torch.ones(70, 1, dtype=torch.float64)
    unit[::3] = 1 / size if size > 1e-37 else 2.0**126
    exact = exact_product(x.double() * unit, w)
    floor = 1e-6 if size > 1e-37 else 1e-4  # subnormal there
    assert error(scalekern.quant_matmul(x, w).double() * unit, exact) <= floor


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(bad, dtype):
    for group, M in ((128, 7), (32, 40), (None, 64)):
        w, x = weight(21, 300, "int4", group), randn(M, 300).to(dtype)
        whole = scalekern.quant_matmul(x, w)
        x[M // 2, 5] = bad
        out, expected = scalekern.quant_matmul(x, w), reference.quant_matmul(x, w)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
        others = torch.arange(M) != M // 2
        assert torch.equal(out[others], whole[others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_stays_in_its_row(bad):
    for group in (128, 32, None):
        w, x = weight(90, 300, "int4", group), randn(9, 300)
        clean, w = scalekern.quant_matmul(x, w), w.replace(scales=w.scales.clone())
        w.scales[73, -1] = bad
        out, exact = scalekern.quant_matmul(x, w), exact_product(x, w)
        others = torch.arange(90) != 73
        assert torch.equal(out[:, 73].isnan(), exact[:, 73].isnan())
        assert error(out[:, others], clean[:, others].double()) <= 1e-6


@at_levels("avx512", "vnni", "bf16")
def test_strides_and_parts():
    w = weight(40, 512, "int4", 64, symmetric=False)
    w = w.replace(scales=w.scales.half(), zeros=w.zeros.mT.contiguous().mT, offsets=(randn(40, 16) / 9)[:, ::2],
                  outer=torch.rand(40, 1) + 0.5)  # fmt: skip
    bias, x = randn(40).half(), randn(512, 139).mT
    for view in (w, w[3:20], w[:, :192]):
        N, K = view.shape
        given = x[::2, :K]
        exact = exact_product(given, view) + bias[:N].double()
        for out_dtype in (torch.float32, torch.float64, torch.float16):
            out = scalekern.quant_matmul(given, view, bias=bias[:N], out_dtype=out_dtype)
            assert error(out, exact) <= FLOOR.get(out_dtype, 1e-6)


def test_threads_change_no_bit():
    cases = [(weight(301, 520, "int4", g), randn(M, 520).to(d)) for g, M, d in
             itertools.product((128, 32), (17, 100), FLOOR)]  # fmt: skip
    same_bits_on_any_threads(cases)
