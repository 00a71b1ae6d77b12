"""Up to four tokens with weights whose codes stand for numbers of a table: small integers of half a step (fp4), floats
that bfloat16 holds (fp8, fp6), any 16 (nf4). At every level of the CPU's instructions.

Shape letters: M tokens, N outputs, K inputs.
"""

import itertools

import pytest
import torch
from conftest import at_levels

import scalekern
from scalekern import _native, reference
from scalekern.quant import QuantizedTensor
from scalekern.quant._pack import pack
from test_quant_matmul_cpu import FLOOR, error, on_the_cpu_kernels, randn, spoiled, weight  # noqa: F401

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")

every_level = at_levels("avx2", "avx512", "vnni", "bf16")
FREE = ("fp4_e2m1", "nf4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3")
BLOCKS = ("mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3")
KINDS = [(format, group) for format in FREE for group in (None, 8, 16, 24, 32, 64, 100, 128)]
KINDS += [(format, None) for format in BLOCKS]


def made(N, K, format, group):
    return spoiled(weight(N, K, format, 128 if format in BLOCKS else group or K))


def check(x, w, activation=None, floor=None):
    """Each output row by row, so that a token cannot hide behind another."""
    out = scalekern.quant_matmul(x, w, activation=activation)
    exact = reference.quant_matmul(x.double(), w, activation=activation)
    for row, of_row in zip(out, exact):
        assert error(row, of_row) <= (floor or FLOOR[x.dtype]), (w.format, w.group_size, x.shape, activation)


@every_level
def test_every_format_and_group():
    shapes = itertools.cycle([(17, 515), (100, 640), (9, 1100), (33, 130), (16, 64), (5, 50), (18, 2048)])
    for (format, group), dtype in itertools.product(KINDS, FLOOR):
        N, K = next(shapes)
        w = made(N, K, format, group)
        for M in (1, 2, 3, 4):
            check(randn(M, K, seed=M).to(dtype), w)


@every_level
@pytest.mark.parametrize("activation", ["int8", "int4", "fp8"])
def test_rounded_tokens(activation):
    formats = [("fp4_e2m1", 32), ("nf4", 64), ("fp8_e4m3", 128), ("fp6_e2m3", 32), ("int4", 128), ("int3", 64)]
    for (format, group), M in itertools.product([*formats, ("mxfp4", None), ("nvfp4", None)], (1, 2, 3)):
        check(randn(M, 700, seed=M), made(20, 700, format, group), activation, floor=2e-6)


@every_level
@pytest.mark.parametrize("parts", ["zeros", "offsets", "both"])
def test_zeros_and_offsets(parts):
    for format, M in itertools.product(("fp4_e2m1", "nf4", "fp8_e4m3", "fp6_e3m2"), (1, 2)):
        w = made(20, 640, format, 64)
        extra = {"zeros": randn(20, 10, seed=3) * 0.3} if parts != "offsets" else {}
        extra |= {"offsets": randn(20, 10, seed=4) * 0.3} if parts != "zeros" else {}
        check(randn(M, 640, seed=M), w.replace(**extra))


@every_level
def test_scales_of_two_levels():
    """nvfp4's outer scale, and one beside any format."""
    for format, group in (("nvfp4", None), ("fp4_e2m1", 16), ("fp8_e4m3", 128), ("int4", 128), ("int1", 128)):
        w = made(20, 640, format, group)
        w = w.replace(outer=torch.linspace(0.3, 3, 20)[:, None])
        check(randn(1, 640, seed=5), w), check(randn(3, 640, seed=6), w)


@every_level
@pytest.mark.parametrize("size", [1e-44, 1e-37, 1e-30, 1e-19, 1e-10, 1e10, 1e28])
def test_very_small_and_large_numbers(size):
    for format, group in (("fp8_e4m3", 64), ("fp8_e5m2", 128), ("fp6_e3m2", 32), ("fp4_e2m1", 32), ("nf4", 64)):
        w = made(20, 300, format, group)
        w = w.replace(scales=torch.ones_like(w.scales))
        x = randn(2, 300) * size
        unit = 1 / size if size > 1e-37 else 2.0**126
        out = scalekern.quant_matmul(x, w).double() * unit
        floor = 1e-6 if size > 1e-36 else 1e-4 if size > 1e-39 else 1  # subnormal there, or a few units of those
        assert error(out, reference.quant_matmul(x.double() * unit, w)) <= floor, (format, size)


@every_level
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(bad):
    for format, group in (("fp8_e4m3", 64), ("fp6_e3m2", 32), ("fp4_e2m1", 32), ("nf4", 64), ("nvfp4", None)):
        w, x = made(20, 300, format, group), randn(3, 300)
        x[1, 77] = bad
        out, exact = scalekern.quant_matmul(x, w), reference.quant_matmul(x.double(), w)
        assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
        assert error(out[::2], exact[::2]) < 1e-6 and out[::2].isfinite().all()


@every_level
@pytest.mark.parametrize("code", [0x7C, 0xFC, 0x7F])
@pytest.mark.parametrize("dtype", FLOOR)
def test_a_weight_that_is_not_finite_stays_in_its_row(code, dtype):
    """Infinities of e5m2 too, whatever the parts of the numbers that they meet."""
    w, x = weight(19, 300, "fp8_e5m2", 64), randn(2, 300).to(dtype)
    w.data[4, 77] = code
    out, exact = scalekern.quant_matmul(x, w), reference.quant_matmul(x.double(), w)
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    assert not out[:, 4].isfinite().any() and out.isfinite().sum() == 2 * 18


@every_level
def test_every_code_alone():
    """One column that is not 0: what its code stands for, exactly, wherever in a row of codes."""
    for format in FREE:
        w = weight(1, 256, format, 64)
        codes = torch.arange(256) % (1 << w.bits)
        w = QuantizedTensor(pack(codes[None], w.bits), torch.ones(1, 4), format=format, columns=256, group_size=64)
        values = reference.quant_matmul(torch.eye(256).double(), w)[:, 0]
        got = torch.stack([scalekern.quant_matmul(x, w)[0, 0] for x in torch.eye(256).split(1)]).double()
        finite = values.isfinite()
        assert torch.equal(got[finite], values[finite]), format


@every_level
def test_a_token_is_the_same_in_any_company():
    for format, group in (("fp8_e4m3", 64), ("fp6_e2m3", 32), ("fp4_e2m1", 32), ("nf4", 64), ("mxfp4", None)):
        w, x = made(40, 640, format, group), randn(4, 640)
        x[2] *= 1e-30
        alone = torch.cat([scalekern.quant_matmul(x[i : i + 1], w) for i in range(4)])
        assert error(scalekern.quant_matmul(x[:2], w), alone[:2].double()) < 2e-7
        assert torch.equal(scalekern.quant_matmul(x, w)[[0, 3]].isfinite(), alone[[0, 3]].isfinite())


@at_levels("avx2", "avx512", "vnni")
def test_numbers_that_codes_alone_would_take_out_of_range():
    """Products are finite though those of codes, before their scales, are not."""
    for format in ("int3", "int4", "int8", "nf4", "fp4_e2m1", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4"):
        w = weight(20, 250, format, 32)
        for tokens, power, at, sign in itertools.product((1, 3, 20), (99, 100, 113, 124), (7, 249), (-1, 1)):
            x = randn(tokens, 250)
            x[0, at] = sign * 2.0**power
            out = scalekern.quant_matmul(x, w)
            assert out.isfinite().all(), (format, tokens, power, at, sign)
            assert error(out[:1], x[:1].double() @ w.dequantize(torch.float64).mT) <= 1e-6, format
