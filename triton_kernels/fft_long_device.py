"""What the passes of a long fft_conv share: device functions, tables and sizes. How they work is in fft_conv_long.py.

Shape letters: B batch, D channels, L length, M output length, N = N0 ROW points of the transform, ROW = N1 N2 of an
inner row, N0 of a column, P = cdiv(N0, BLOCK0) pieces of a column, C columns in a tile (C / N2 of n1).

With n = n0 ROW + n1 N2 + n2, k = k0 + N0 (k1 + N1 k2) and the shift h = (k0 + 1/4) / N0 of an inner row:

    Y[k0, n1, n2] = exp(-2 pi i n1 h / N1) sum_n0 exp(-2 pi i n0 (k0 + 1/4) / N0) x[n0, n1, n2]         columns, pass 1
    X[k0, k1, k2] = sum_n2 (sum_n1 w1^(n1 k1) Y[k0, n1, n2]) exp(-2 pi i n2 (k1 + h) / ROW) w2^(n2 k2)  rows, pass 2

The quarter of a bin that fft_device.py explains is in the column's factor and in h; the inner factors are plain and
symmetric, so that the way back needs no transposed copy. exp(-2 pi i n1 h / N1) depends on k0 and n1 alone: pass 1
puts it into its accumulators, so that what pass 2 loads is its operand already. exp(-2 pi i n2 (k1 + h) / ROW) is the
product of a table [N1, N2] and one [N0, N2]: no table has N entries, and every entry is float64's sine of an exact
fraction.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .common import Launch, index, meta
from .fft_device import LOW, add_product, inverse_first_half, masked, negative, operand, second_factor, second_half

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def power_below(x):
    """The largest power of two up to x, 1 for nothing: dividing by it rounds nothing. Inf for Inf and NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(x < 1e-30, 1.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def magnitude(a, b):
    return tl.maximum(tl.max(tl.abs(a)), tl.max(tl.abs(b)))


@triton.jit
def column_places(p, block, ROW: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr):
    """The places in its N points of piece p of a block of columns: [BLOCK0, C]."""
    return (p * BLOCK0 + tl.arange(0, BLOCK0))[:, None] * ROW + (block * C + tl.arange(0, C))[None, :]


@triton.jit
def load_columns(
    x_ptr, gate_ptr, mask_ptr, stride_x_l, stride_gate_l, stride_mask_l, p, block, L, ROW: tl.constexpr,
    BLOCK0: tl.constexpr, C: tl.constexpr, REPLACES: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """x gate mask of one row, zero outside of L: [BLOCK0, C], float32."""
    t = column_places(p, block, ROW, BLOCK0, C)
    inside = t < L
    t = index(t, INT64)
    x = tl.load(x_ptr + t * stride_x_l, mask=inside, other=0.0).to(tl.float32)  # [BLOCK0, C]
    if gate_ptr is not None:
        x *= tl.load(gate_ptr + t * stride_gate_l, mask=inside, other=0.0).to(tl.float32)  # [BLOCK0, C]
    return masked(x, mask_ptr, 0, stride_mask_l, 0, t, inside, REPLACES)


@triton.jit
def column_factor(column_ptr, q, p, P, BLOCK0: tl.constexpr, OPERANDS: tl.constexpr):
    """exp(-2 pi i n0 (k0 + 1/4) / N0) for piece q of k0 and p of n0, zero beyond N0: (real, imaginary) operands."""
    width = P * BLOCK0
    at = (q * BLOCK0 + tl.arange(0, BLOCK0))[:, None] * width + (p * BLOCK0 + tl.arange(0, BLOCK0))[None, :]
    plane = width * width
    re, im = tl.load(column_ptr + at), tl.load(column_ptr + plane + at)  # [BLOCK0, BLOCK0]
    if OPERANDS == "fp16x3":
        return (re, tl.load(column_ptr + 2 * plane + at)), (im, tl.load(column_ptr + 3 * plane + at))
    else:
        return (re, re), (im, im)


@triton.jit
def store_columns(
    ws_ptr, scale_ptr, turn_ptr, acc_re, acc_im, factor, q, block, N0, N1: tl.constexpr, N2: tl.constexpr,
    BLOCK0: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Piece q of Y, from the sums over n0, into a workspace (2, N0, ROW); its scale times factor into (P, ROW / C)."""
    ROW: tl.constexpr = N1 * N2
    k0 = q * BLOCK0 + tl.arange(0, BLOCK0)
    at = k0[:, None] * N1 + ((block * C + tl.arange(0, C)) // N2)[None, :]
    valid = (k0 < N0)[:, None]
    t_re = tl.load(turn_ptr + at, mask=valid, other=0.0)  # [BLOCK0, C]
    t_im = tl.load(turn_ptr + N0 * N1 + at, mask=valid, other=0.0)
    y_re, y_im = acc_re * t_re - acc_im * t_im, acc_re * t_im + acc_im * t_re
    largest = magnitude(y_re, y_im)
    scale = power_below(largest)
    at = column_places(q, block, ROW, BLOCK0, C)
    valid = at < N0 * ROW
    tl.store(ws_ptr + at, (y_re * (1 / scale)).to(ws_ptr.dtype.element_ty), mask=valid)
    tl.store(ws_ptr + N0 * ROW + at, (y_im * (1 / scale)).to(ws_ptr.dtype.element_ty), mask=valid)
    # A tile of zeros has no say in the scale of its row.
    tl.store(scale_ptr + q * (ROW // C) + block, tl.where(largest < 1e-30, 0.0, scale * factor))


@triton.jit
def row_places(k0, N1: tl.constexpr, N2: tl.constexpr):
    """The places of row k0 in a plane (N0, ROW): [N1, N2]."""
    return k0 * N1 * N2 + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]


@triton.jit
def row_factors(n1_ptr, n2_ptr, N1: tl.constexpr, N2: tl.constexpr, OPERANDS: tl.constexpr):
    """The inner factors: w1^(n1 k1) as (real, imaginary, minus imaginary), [N1, N1], and w2^(n2 k2), [N2, N2]."""
    one_re, one_im = second_factor(n1_ptr, N1, OPERANDS)
    two_re, two_im = second_factor(n2_ptr, N2, OPERANDS)
    return one_re, one_im, negative(one_im), two_re, two_im


@triton.jit
def row_twiddles(inner_ptr, shift_ptr, k0, N0, N1: tl.constexpr, N2: tl.constexpr):
    """exp(-2 pi i n2 (k1 + h) / ROW), (real, imaginary), [N1, N2], as k1's part times h's."""
    at, n2 = row_places(0, N1, N2), tl.arange(0, N2)
    a_re, a_im = tl.load(inner_ptr + at), tl.load(inner_ptr + N1 * N2 + at)  # [N1, N2]
    b_re = tl.load(shift_ptr + k0 * N2 + n2)[None, :]
    b_im = tl.load(shift_ptr + (N0 + k0) * N2 + n2)[None, :]
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def load_row(
    ws_ptr, scale_ptr, k0, N0, N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """Row k0 of a workspace as operands (real, imaginary) [N1, N2] below 2, and the scale to multiply them by."""
    own = tl.load(scale_ptr + (k0 // BLOCK0) * (N1 * N2 // C) + tl.arange(0, N1) * N2 // C)  # [N1]
    scale = tl.max(own)
    scale = tl.where(scale == 0, 1.0, scale)
    share = (own / scale)[:, None]
    at = row_places(k0, N1, N2)
    re = tl.load(ws_ptr + at).to(tl.float32) * share  # [N1, N2]
    im = tl.load(ws_ptr + N0 * N1 * N2 + at).to(tl.float32) * share
    return operand(re, OPERANDS), operand(im, OPERANDS), scale


@triton.jit
def row_transform(
    x_re, x_im, one_re, one_im, one_minus, two_re, two_im, t_re, t_im, N1: tl.constexpr, N2: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """The spectrum of a row, [N1, N2] by k1 and k2: (real, imaginary), float32."""
    zero = tl.zeros([N1, N2], tl.float32)
    a_re = add_product(add_product(zero, one_re, x_re, OPERANDS), one_minus, x_im, OPERANDS)
    a_im = add_product(add_product(zero, one_im, x_re, OPERANDS), one_re, x_im, OPERANDS)
    return second_half(a_re, a_im, two_re, two_im, t_re, t_im, N1, N2, 1, OPERANDS)


@triton.jit
def store_row(
    ws_ptr, scale_ptr, turn_ptr, y_re, y_im, factor, k0, N0, one_re, one_im, one_minus, two_re, two_im, t_re, t_im,
    N1: tl.constexpr, N2: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Row k0 of a spectrum back to Y, into the workspace; its scale times factor into (N0,)."""
    b_re, b_im = inverse_first_half(y_re, y_im, two_re, two_im, t_re, t_im, N1, N2, 1, OPERANDS)
    zero = tl.zeros([N1, N2], tl.float32)
    z_re = add_product(add_product(zero, one_re, b_re, OPERANDS), one_im, b_im, OPERANDS)
    z_im = add_product(add_product(zero, one_re, b_im, OPERANDS), one_minus, b_re, OPERANDS)
    n1 = k0 * N1 + tl.arange(0, N1)
    c = tl.load(turn_ptr + n1)[:, None] * (1.0 / N1)
    s = tl.load(turn_ptr + N0 * N1 + n1)[:, None] * (1.0 / N1)
    z_re, z_im = z_re * c + z_im * s, z_im * c - z_re * s
    largest = magnitude(z_re, z_im)
    scale = power_below(largest)
    at = row_places(k0, N1, N2)
    tl.store(ws_ptr + at, (z_re * (1 / scale)).to(ws_ptr.dtype.element_ty))
    tl.store(ws_ptr + N0 * N1 * N2 + at, (z_im * (1 / scale)).to(ws_ptr.dtype.element_ty))
    tl.store(scale_ptr + k0, tl.where(largest < 1e-30, 0.0, scale * factor))


@triton.jit
def largest_scale(scale_ptr, N0, P, BLOCK0: tl.constexpr):
    """Of the N0 rows of a workspace; 1 when all are zero."""
    found = tl.zeros([BLOCK0], tl.float32)
    for q in tl.range(P, num_stages=1):
        k0 = q * BLOCK0 + tl.arange(0, BLOCK0)
        found = tl.maximum(found, tl.load(scale_ptr + k0, mask=k0 < N0, other=0.0))
    scale = tl.max(found)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def load_back(
    ws_ptr, scale_ptr, scale, q, block, N0, ROW: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """Piece q of k0 of a block of columns, divided by scale: operands (real, imaginary), [BLOCK0, C]."""
    k0 = q * BLOCK0 + tl.arange(0, BLOCK0)
    share = (tl.load(scale_ptr + k0, mask=k0 < N0, other=0.0) / scale)[:, None]
    at = column_places(q, block, ROW, BLOCK0, C)
    valid = at < N0 * ROW
    re = tl.load(ws_ptr + at, mask=valid, other=0.0).to(tl.float32) * share  # [BLOCK0, C]
    im = tl.load(ws_ptr + N0 * ROW + at, mask=valid, other=0.0).to(tl.float32) * share
    return operand(re, OPERANDS), operand(im, OPERANDS)


@triton.jit
def add_back(acc, z_re, z_im, column_ptr, q, p, P, BLOCK0: tl.constexpr, OPERANDS: tl.constexpr):
    """acc [BLOCK0, C] plus what piece q of k0 gives to the real part of piece p of n0."""
    f_re, f_im = column_factor(column_ptr, q, p, P, BLOCK0, OPERANDS)
    acc = add_product(acc, (tl.trans(f_re[0]), tl.trans(f_re[1])), z_re, OPERANDS)
    return add_product(acc, (tl.trans(f_im[0]), tl.trans(f_im[1])), z_im, OPERANDS)


# --- host side ------------------------------------------------------------------------------------------------------

MOST = 1 << 22  # points; float32's tables and offsets are good for more, nothing was tried beyond
# (N1, N2). The larger one pays from 2^17 points on; sm_80 spills 13 KiB a thread with it, and the accumulators of
# sm_100 go beyond its tensor memory (Triton 3.7 puts a trap in the kernel's place), as they do with split operands.
ROWS, WIDE = (64, 32), (64, 64)


def takes_wide(operands: str, device: torch.device) -> bool:
    one = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    return one and operands != "fp16x3"


def fits(operands: str, device: torch.device) -> bool:
    """Whether a row's kernels compile to products: on sm_100 those of split operands become a trap at ROWS too."""
    return operands != "fp16x3" or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 10


@functools.cache
def sizes(points: int, wide: bool) -> dict[str, int]:
    """N0, N1, N2, BLOCK0 and C of the cheapest transform of at least `points` points: N is a multiple of ROW.

    By flops, 8 N0 + 16 (N1 + N2) a point; below 64 rows wgmma does not take a column, which counts as half the rate.
    """

    def cost(row):
        n0 = -(-points // (row[0] * row[1]))
        block = min(64, max(16, 1 << (n0 - 1).bit_length()))
        width = -(-n0 // block) * block
        flops = 8 * width * (1 if block == 64 else 2) + 16 * (row[0] + row[1]) + 1700  # and 16 bytes at 10 TFLOP/s
        return n0 * row[0] * row[1] * flops, {"N0": n0, "N1": row[0], "N2": row[1], "BLOCK0": block}

    factors = min((cost(row) for row in ((ROWS, WIDE) if wide else (ROWS,))), key=lambda found: found[0])[1]
    # The accumulators of a tile of columns, real and imaginary: 64 registers a thread of 4 warps.
    columns = min(256, 4096 // factors["BLOCK0"], factors["N1"] * factors["N2"])
    return {**factors, "C": max(columns, factors["N2"])}


def sizes_of(factors: dict[str, int]) -> tuple[int, int, int]:
    return factors["N0"], factors["N1"], factors["N2"]


def points_of(factors: dict[str, int]) -> int:
    return math.prod(sizes_of(factors))


def pieces(factors: dict[str, int]) -> int:
    return -(-factors["N0"] // factors["BLOCK0"])


@functools.lru_cache(maxsize=32)
def _tables(n0: int, block0: int, n1: int, n2: int, operands: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The factors, 16-bit with their lows for "fp16x3", and the twiddles, float32: planes (real, imaginary)."""

    def unit(numerator: torch.Tensor, denominator: int) -> torch.Tensor:
        angle = (numerator % denominator).double() * (-2 * math.pi / denominator)
        return torch.stack([angle.cos(), angle.sin()])

    def factor(planes: torch.Tensor) -> torch.Tensor:
        high = planes.to(torch.bfloat16 if operands == "bf16" else torch.float16)
        lows = [((planes - high.double()) * LOW.value).half()] if operands == "fp16x3" else []
        return torch.cat([high, *lows]).to(device)

    zero, one, two = torch.arange(n0), torch.arange(n1), torch.arange(n2)
    shifted = 4 * zero[:, None] + 1  # 4 (k0 + 1/4) = 4 N0 h
    column = torch.zeros(2, -(-n0 // block0) * block0, -(-n0 // block0) * block0, dtype=torch.float64)
    column[:, :n0, :n0] = unit(shifted * zero, 4 * n0)
    return {
        "column_ptr": factor(column),
        "turn_ptr": unit(shifted * one, 4 * n0 * n1).to(device, torch.float32),
        "shift_ptr": unit(shifted * two, 4 * n0 * n1 * n2).to(device, torch.float32),
        "inner_ptr": unit(one[:, None] * two, n1 * n2).to(device, torch.float32),
        "n1_ptr": factor(unit(one[:, None] * one, n1)),
        "n2_ptr": factor(unit(two[:, None] * two, n2)),
    }


def tables(factors: dict[str, int], operands: str, device: torch.device) -> dict:
    n0, n1, n2, block0 = (factors[name] for name in ("N0", "N1", "N2", "BLOCK0"))
    if device.type != "meta":
        return _tables(n0, block0, n1, n2, operands, device)
    half, planes = torch.bfloat16 if operands == "bf16" else torch.float16, 4 if operands == "fp16x3" else 2
    of_factors = {"column_ptr": (pieces(factors) * block0,) * 2, "n1_ptr": (n1, n1), "n2_ptr": (n2, n2)}
    of_twiddles = {"turn_ptr": (n0, n1), "shift_ptr": (n0, n2), "inner_ptr": (n1, n2)}
    return {name: meta(planes, *shape, dtype=half) for name, shape in of_factors.items()} | {
        name: meta(2, *shape) for name, shape in of_twiddles.items()
    }


def plan(kernel, grid, args: dict, factors: dict[str, int], operands: str, device: torch.device) -> Launch:
    """A launch with what of factors and tables its kernel takes."""
    known = {**tables(factors, operands, device), **factors, "P": pieces(factors), "OPERANDS": operands}
    return Launch(kernel, grid, {**{n: v for n, v in known.items() if n in kernel.arg_names}, **args}, 4)
