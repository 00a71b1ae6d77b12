"""The gradient of x through a low-bit weight on a CPU's tile registers, against float64 on the dequantized weight.

On a machine without them the float path answers, to the same floors. Shape letters: M tokens, N outputs, K inputs.
"""

import itertools

import pytest
import torch
from test_quant_matmul_cpu import (  # noqa: F401
    FLOOR,
    VARIANTS,
    error,
    on_the_cpu_kernels,
    randn,
    spoiled,
    weight,
)

import scalekern
from scalekern import _native

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")

# Tiles are 16 tokens and 32 rows or columns; 256 tokens, 128 rows and 512 columns of w are a block.
SHAPES = [(17, 31, 17), (16, 512, 16), (1, 100, 33), (33, 545, 65), (100, 129, 550), (257, 33, 100), (18, 257, 1030)]
GROUPS = (128, 32, None, 100, 64, 16, 7)


def gradient(w, dout, dtype=None):
    x = torch.zeros(len(dout), w.shape[1], dtype=dtype or dout.dtype, requires_grad=True)
    return torch.autograd.grad(scalekern.quant_matmul(x, w, out_dtype=dout.dtype), x, dout)[0]


def exact(w, dout):
    return dout.double() @ w.dequantize(torch.float64)


@pytest.mark.parametrize("format, symmetric", VARIANTS, ids=lambda v: {True: "", False: "zeros"}.get(v, v))
def test_every_format(format, symmetric):
    for (M, N, K), group, dtype in zip(SHAPES * 3, GROUPS * 4, itertools.chain(*([d] * 7 for d in FLOOR))):
        w, dout = spoiled(weight(N, K, format, group, symmetric)), randn(M, N, seed=1).to(dtype)
        assert error(gradient(w, dout), exact(w, dout)) <= FLOOR[dtype], (M, N, K, group, dtype)


@pytest.mark.parametrize("dtype, out_dtype", list(itertools.permutations(FLOOR, 2)), ids=str)
def test_the_dtype_of_the_gradient_decides(dtype, out_dtype):
    w, dout = weight(70, 200, "int4", 64), randn(40, 70, seed=1).to(out_dtype)
    assert error(gradient(w, dout, dtype), exact(w, dout)) <= FLOOR[dtype]


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e-20, 1e-37, 1e36])
@pytest.mark.parametrize("out_dtype", (torch.bfloat16, torch.float32))
def test_what_one_token_needs_is_not_the_others_affair(out_dtype, size):
    """Tokens far from 1 go the float path (parts of Inf are Inf and NaN, subnormal ones 0): their neighbours keep every
    bit, and they their digits."""
    w, dout = weight(100, 545, "int4", 64), randn(40, 100, seed=1).to(out_dtype)
    plain = gradient(w, dout, torch.bfloat16)
    dout[33] = dout[33].abs() * size
    found, expected = gradient(w, dout, torch.bfloat16), exact(w, dout)
    others = [m for m in range(40) if m != 33]
    assert torch.equal(found[others], plain[others])
    if 0 < size < float("inf"):
        floor = FLOOR[torch.bfloat16] if size > 1e-30 else 0.02  # numbers of some 1e-37 are subnormal at times
        assert error(found[33].double() / size, expected[33] / size) <= floor
    else:
        assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stays_in_its_columns(bad, dtype):
    w, dout = weight(70, 600, "int4", 64), randn(300, 70, seed=1).to(dtype)
    scales = w.scales.clone()
    scales[5, 3] = bad
    spoilt = w.replace(scales=scales)
    found, kept, expected = gradient(spoilt, dout), gradient(w, dout), exact(spoilt, dout)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    for part in (slice(0, 192), slice(256, 600)):
        assert error(found[:, part], kept[:, part].double()) <= 2 * FLOOR[dtype]


@pytest.mark.parametrize("code", ["int2", "int4"])
def test_one_scale_for_all_that_rounds_badly(code):
    """Rounded to bfloat16, all of a weight with one scale err the same way, by 2^-8 at worst: more than the floor."""
    w, dout = weight(100, 300, code, "tensor"), randn(64, 100, seed=1).bfloat16()
    w = w.replace(scales=torch.full_like(w.scales, 1 + 2.0**-8 - 2.0**-20))
    assert error(gradient(w, dout), exact(w, dout)) <= FLOOR[torch.bfloat16]


def test_threads_change_no_bit():
    w, dout = weight(300, 1600, "nf4", 64), randn(300, 300, seed=1).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(gradient(w, dout))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_strides():
    """dout from a sum (no strides at all), columns beside each other, a slice."""
    w, dout = weight(70, 200, "int4", 64), randn(40, 140, seed=1).bfloat16()
    for given in (dout[:1, :1].expand(40, 70), dout[:, ::2], dout[:, :70].t().contiguous().t()):
        assert error(gradient(w, given), exact(w, given)) <= FLOOR[torch.bfloat16]
