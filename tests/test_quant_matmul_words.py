"""Few float tokens with short rows of 1-, 2-, 4- or 8-bit codes, which the CPU takes as words of 32 bits, a lane each.

Shape letters: M tokens, N outputs, K inputs.
"""

import itertools

import pytest
import torch
from conftest import at_levels
from test_quant_matmul_cpu import error, randn, weight
from test_quant_matmul_digits import exact_product

import scalekern
from scalekern import _native

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")

# Formats of one word a lane, with group sizes: of vectors that several groups share, of whole ones, of a row.
CASES = [("int1", 64), ("int2", 32), ("int4", 32), ("int4", 64), ("int4", 128), ("int8", 32), ("int8", 64),
         ("int8", None)]  # fmt: skip


@at_levels("avx2", "avx512")
def test_ends_of_rows_and_blocks():
    """Rows and columns on both sides of the ends of vectors, groups, and blocks of 16 rows; parts of any layout."""
    for (format, group), K, N in itertools.product(CASES, (40, 128, 500), (9, 17, 35)):
        for symmetric in (True, False):
            w = weight(N, K, format, group, symmetric=symmetric or format == "int1")
            half = w.replace(scales=w.scales.half())  # rows side by side, read at once
            turned = w.replace(scales=w.scales.mT.contiguous().mT, outer=torch.rand(N, 1) + 0.5)  # row by row
            for view in (half, turned, half[N // 2 :], half[: N // 2 + 1]):
                for tokens in (1, 3):
                    x, bias = randn(tokens, K), randn(len(view.data), seed=3) / 4
                    exact = exact_product(x, view) + bias.double()
                    assert error(scalekern.quant_matmul(x, view, bias=bias), exact) <= 1e-6, (format, group, K, N)


def test_a_token_is_the_same_in_any_company():
    """One that is not finite goes another way, and the others do not go with it."""
    for format, group in CASES:
        w = weight(21, 256, format, group)
        kinds = [randn(1, 256), randn(1, 256, seed=1), randn(1, 256, seed=2)]
        kinds[2][0, 7] = torch.inf
        alone = [scalekern.quant_matmul(x, w) for x in kinds]
        assert not alone[2].isfinite().any()
        for order in itertools.product(range(3), repeat=3):
            out = scalekern.quant_matmul(torch.cat([kinds[i] for i in order]), w)
            expected = torch.cat([alone[i] for i in order])
            assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0)), (format, group, order)


@at_levels("avx2", "avx512")
def test_a_scale_that_is_no_number_stays_in_its_row():
    for format, group in CASES:
        w = weight(21, 200, format, group)
        clean, w = scalekern.quant_matmul(randn(2, 200), w), w.replace(scales=w.scales.clone())
        w.scales[13, 0] = float("nan")
        out = scalekern.quant_matmul(randn(2, 200), w)
        others = torch.arange(21) != 13
        assert out[:, 13].isnan().all() and torch.equal(out[:, others], clean[:, others])
