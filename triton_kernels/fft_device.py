"""What the fft_conv kernels share: the factored transform as device functions, its tables, and its sizes.

Shape letters: B batch, D channels, L length, M output length, N points of the transform, P pieces of it, R batch rows
in a tile. N = N1 N2 with N1 = P BLOCK; a row of N samples is P tiles [BLOCK, N2], time fastest; with R rows they lie
beside each other, [BLOCK, R N2], which is the same as [BLOCK R, N2] where the contraction is over N2.

The transform that a linear convolution needs (the "right angle" form) has a quarter of a bin of shift:

    X[k] = sum_n x[n] w^(n (k + 1/4)),  w = exp(-2 pi i / N)        so that w^(N (k + 1/4)) = -i for every k

A product of two such spectra is the product of polynomials modulo z^N = -i: what a cyclic transform would fold back
onto the result as c[t + N] and c[t - N] here carries a factor of -i or i. For real inputs the wanted c[t] is the real
part, untouched by either. So N points, and not 2 N, convolve N samples with a filter that reaches N - 1 taps to both
sides: no zero padding to multiply by, and one batch row by itself fills the complex points that a real FFT of twice
the length, or two rows packed as one, would need. The imaginary part holds the lags below zero: one inverse transform
gives dk and dk_reverse.

With n = n1 N2 + n2 and k = k1 + N1 k2, and the whole shift put into the first factor:

    X[k1, k2] = sum_n2 (sum_n1 exp(-2 pi i n1 (k1 + 1/4) / N1) x[n1, n2]) exp(-2 pi i n2 (k1 + 1/4) / N) w2^(n2 k2)

    first factor [N1, N1] on the left, real input         twiddles [N1, N2]        second factor [N2, N2] on the right

so nothing is transposed on the way there or back, and each block of BLOCK rows k1 goes the whole way by itself: only
one block of complex numbers is alive at a time.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .. import _env
from .common import index

# OPERANDS, what products are of: "fp16", "fp16x3" (float32 split in two) or "bf16". They are float16 for every dtype of
# u unless bfloat16 is asked for; tf32 has float16's eleven bits at half the rate, so it is "fp16" as well. A row is
# divided by its largest sample and the spectrum by the sum of its taps' magnitudes, which bounds every product of the
# two by N; times FULL / N it fills float16's range from the top, whatever the data. Float32 is split into a high and a
# low part, the low times LOW, since it would be subnormal: the three products cost half of what tf32x3 does, take half
# the shared memory, and the interpreter rounds them as a GPU does.
FULL: tl.constexpr = tl.constexpr(32768.0)
LOW: tl.constexpr = tl.constexpr(2048.0)
# The interpreter holds bfloat16 as integers and computes with those: there the rounded operands are widened, which
# changes no product, since one of two bfloat16 is exact in float32. It also truncates where a GPU rounds: `operand`
# rounds before (Dekker's splitting, which leaves eight bits).
INTERPRETED: tl.constexpr = tl.constexpr(_env.triton_interpret())


# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def rows_of(first, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """The batch rows of a tile's columns, 64-bit: a number, or [1, R N2]."""
    first = tl.cast(first, tl.int64)
    if R == 1:
        return first
    else:
        return first + (tl.arange(0, R * N2) // N2)[None, :]


@triton.jit
def times_of(piece, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """The places of a tile's elements in their row: [BLOCK, R N2]."""
    column = tl.arange(0, R * N2)
    if R > 1:
        column = column % N2
    return (piece * BLOCK + tl.arange(0, BLOCK))[:, None] * N2 + column[None, :]


@triton.jit
def masked(value, mask_ptr, stride_mask_b, stride_mask_l, b, t, inside, REPLACES: tl.constexpr):
    """A tile under mask (B, L): a boolean one replaces, so that NaN and Inf in padding go nowhere."""
    if mask_ptr is None:
        return value
    else:
        mask = tl.load(mask_ptr + b * stride_mask_b + t * stride_mask_l, mask=inside, other=0)  # [BLOCK, R N2]
        if REPLACES:
            return tl.where(mask != 0, value, 0.0)
        else:
            return value * mask.to(tl.float32)


@triton.jit
def load_signal(
    x_ptr, gate_ptr, mask_ptr, stride_x_b, stride_x_l, stride_gate_b, stride_gate_l, stride_mask_b, stride_mask_l,
    first, B, L, PIECES: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    REPLACES: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """x gate mask of R rows from row `first` on, zero outside of B and L: a tuple of PIECES tiles, float32."""
    b = rows_of(first, BLOCK, N2, R)
    tiles = ()
    for p in tl.static_range(PIECES):
        t = times_of(p, BLOCK, N2, R)
        inside = (t < L) & (b < B)
        t = index(t, INT64)
        x = tl.load(x_ptr + b * stride_x_b + t * stride_x_l, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, R N2]
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + b * stride_gate_b + t * stride_gate_l, mask=inside, other=0.0)  # [BLOCK, R N2]
            x *= gate.to(tl.float32)
        tiles = tiles + (masked(x, mask_ptr, stride_mask_b, stride_mask_l, b, t, inside, REPLACES),)
    return tiles


@triton.jit
def magnitudes(tiles, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr):
    """The largest magnitude of each row, 1 for a row of zeros: a number, or [R]."""
    largest = tl.abs(tiles[0])
    for p in tl.static_range(1, PIECES):
        largest = tl.maximum(largest, tl.abs(tiles[p]))
    if R == 1:
        scale = tl.max(largest)
    else:
        scale = tl.max(tl.max(tl.reshape(largest, [BLOCK, R, N2]), axis=2), axis=0)
    return tl.where(scale < 1e-30, 1.0, scale)


@triton.jit
def times_rows(tile, factor, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """A tile [BLOCK, R N2] or [BLOCK R, N2], each batch row times its factor [R]."""
    if R == 1:
        return tile * factor
    else:
        return tl.reshape(tl.reshape(tile, [BLOCK, R, N2]) * factor[None, :, None], tile.shape)


@triton.jit
def operand(x, OPERANDS: tl.constexpr):
    """A float32 tile as an operand (high, low): x = high + low / LOW for "fp16x3", otherwise low is not used."""
    if INTERPRETED and OPERANDS == "bf16":
        x = x * 65537.0 - (x * 65537.0 - x)
    high = x.to(tl.bfloat16 if OPERANDS == "bf16" else tl.float16)
    if OPERANDS == "fp16x3":
        return high, ((x - high.to(tl.float32)) * LOW).to(tl.float16)
    else:
        return high, high


@triton.jit
def negative(a):
    if INTERPRETED:
        return (-a[0].to(tl.float32)).to(a[0].dtype), (-a[1].to(tl.float32)).to(a[1].dtype)
    else:
        return -a[0], -a[1]


@triton.jit
def transposed(a):
    return tl.trans(a[0]), tl.trans(a[1])


@triton.jit
def add_product(acc, a, b, OPERANDS: tl.constexpr):
    """acc + a @ b for operands (high, low). "fp16x3": three products, 22 bits; the lows' product is below."""
    if OPERANDS == "fp16x3":
        acc = tl.dot(a[0], b[1], acc * LOW)
        acc = tl.dot(a[1], b[0], acc) * (1 / LOW)
    if INTERPRETED and OPERANDS == "bf16":
        return tl.dot(a[0].to(tl.float32), b[0].to(tl.float32), acc)
    else:
        return tl.dot(a[0], b[0], acc)


@triton.jit
def operands(tiles, scale, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr,
             OPERANDS: tl.constexpr):  # fmt: skip
    """The tiles divided by their rows' scales, as operands."""
    result = ()
    for p in tl.static_range(PIECES):
        result = result + (operand(times_rows(tiles[p], 1 / scale, BLOCK, N2, R), OPERANDS),)
    return result


@triton.jit
def _load_factor(ptr, at, plane: tl.constexpr, OPERANDS: tl.constexpr):
    """A table of planes (real, imaginary) and, for "fp16x3" their lows: two operands."""
    re, im = tl.load(ptr + at), tl.load(ptr + plane + at)
    if OPERANDS == "fp16x3":
        return (re, tl.load(ptr + 2 * plane + at)), (im, tl.load(ptr + 3 * plane + at))
    else:
        return (re, re), (im, im)


@triton.jit
def first_factor(first_ptr, q, p, N1: tl.constexpr, BLOCK: tl.constexpr, OPERANDS: tl.constexpr):
    """exp(-2 pi i n1 (k1 + 1/4) / N1) for block q of k1 and block p of n1: (real, imaginary), [BLOCK, BLOCK]."""
    at = (q * BLOCK + tl.arange(0, BLOCK))[:, None] * N1 + (p * BLOCK + tl.arange(0, BLOCK))[None, :]
    return _load_factor(first_ptr, at, N1 * N1, OPERANDS)


@triton.jit
def second_factor(second_ptr, N2: tl.constexpr, OPERANDS: tl.constexpr):
    """exp(-2 pi i n2 k2 / N2): (real, imaginary), [N2, N2], symmetric."""
    at = tl.arange(0, N2)[:, None] * N2 + tl.arange(0, N2)[None, :]
    return _load_factor(second_ptr, at, N2 * N2, OPERANDS)


@triton.jit
def twiddles(twiddle_ptr, q, N1: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """exp(-2 pi i n2 (k1 + 1/4) / N) for block q of k1: (real, imaginary), [BLOCK, R N2], float32."""
    at = times_of(q, BLOCK, N2, R)
    return tl.load(twiddle_ptr + at).to(tl.float32), tl.load(twiddle_ptr + N1 * N2 + at).to(tl.float32)


@triton.jit
def load_spectrum(ptr, q, N1: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """Block q of a spectrum (2, N1, N2), the same for every row: (real, imaginary), [BLOCK R, N2]."""
    at = (q * BLOCK + tl.arange(0, BLOCK * R) // R)[:, None] * N2 + tl.arange(0, N2)[None, :]
    return tl.load(ptr + at), tl.load(ptr + N1 * N2 + at)


@triton.jit
def beside_skip(scale_ptr, skip_ptr, stride_skip_d, d):
    """(total, share, constant): a channel's spectrum, which its scale divides, times share plus constant is that of the
    filters and of skip, a tap at lag 0, divided by total, which bounds it by 1. No skip_ptr: it is in the spectrum,
    where calls that make one put skip, since readers have no registers to spare (sm_90, 1,024 points: 170, not 148).
    """
    scale = tl.load(scale_ptr + d)
    if skip_ptr is None:
        return tl.where(scale < 1e-30, 1.0, scale), 1.0, 0.0
    else:
        skip = tl.load(skip_ptr + d * stride_skip_d).to(tl.float32)
        total = scale + tl.abs(skip)
        total = tl.where(total < 1e-30, 1.0, total)
        return total, scale / total, skip / total


@triton.jit
def transform(
    x, q, first_ptr, second_re, second_im, t_re, t_im, PIECES: tl.constexpr, N1: tl.constexpr, BLOCK: tl.constexpr,
    N2: tl.constexpr, R: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Block q of the spectrum of real rows, x a tuple of PIECES operands: (real, imaginary), [BLOCK R, N2], float32.

    Pieces that are all zero are left out of x, and with it out of the product.
    """
    acc_re = tl.zeros([BLOCK, R * N2], tl.float32)
    acc_im = tl.zeros([BLOCK, R * N2], tl.float32)
    for p in tl.static_range(PIECES):
        f_re, f_im = first_factor(first_ptr, q, p, N1, BLOCK, OPERANDS)
        acc_re = add_product(acc_re, f_re, x[p], OPERANDS)
        acc_im = add_product(acc_im, f_im, x[p], OPERANDS)
    return second_half(acc_re, acc_im, second_re, second_im, t_re, t_im, BLOCK, N2, R, OPERANDS)


@triton.jit
def second_half(
    acc_re, acc_im, second_re, second_im, t_re, t_im, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """What follows the first factor: twiddles and second factor, [BLOCK, R N2] to [BLOCK R, N2]."""
    a_re = operand(tl.reshape(acc_re * t_re - acc_im * t_im, [BLOCK * R, N2]), OPERANDS)
    a_im = operand(tl.reshape(acc_re * t_im + acc_im * t_re, [BLOCK * R, N2]), OPERANDS)
    zero = tl.zeros([BLOCK * R, N2], tl.float32)
    x_re = add_product(add_product(zero, a_re, second_re, OPERANDS), negative(a_im), second_im, OPERANDS)
    x_im = add_product(add_product(zero, a_re, second_im, OPERANDS), a_im, second_re, OPERANDS)
    return x_re, x_im


@triton.jit
def inverse_first_half(
    y_re, y_im, second_re, second_im, t_re, t_im, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """From a block of a spectrum [BLOCK R, N2] back over k2, divided by N2: operands (real, imaginary), [BLOCK, R N2].

    What remains is the first factor: block p of the result is the sum over the blocks q of `add_real_part`.
    """
    y_re, y_im = operand(y_re, OPERANDS), operand(y_im, OPERANDS)
    zero = tl.zeros([BLOCK * R, N2], tl.float32)
    b_re = add_product(add_product(zero, y_re, second_re, OPERANDS), y_im, second_im, OPERANDS)
    b_im = add_product(add_product(zero, y_im, second_re, OPERANDS), negative(y_re), second_im, OPERANDS)
    b_re = tl.reshape(b_re, [BLOCK, R * N2]) * (1.0 / N2)
    b_im = tl.reshape(b_im, [BLOCK, R * N2]) * (1.0 / N2)
    return operand(b_re * t_re + b_im * t_im, OPERANDS), operand(b_im * t_re - b_re * t_im, OPERANDS)


@triton.jit
def add_real_part(acc, b_re, b_im, first_ptr, q, p, N1: tl.constexpr, BLOCK: tl.constexpr, OPERANDS: tl.constexpr):
    """acc [BLOCK, R N2] plus what block q of k1 gives to the real part of block p of the result."""
    f_re, f_im = first_factor(first_ptr, q, p, N1, BLOCK, OPERANDS)
    acc = add_product(acc, transposed(f_re), b_re, OPERANDS)
    return add_product(acc, transposed(f_im), b_im, OPERANDS)


# --- host side ------------------------------------------------------------------------------------------------------

MAX_PIECES = 6
# The longest transform by a block's shared memory (read out of the cubins), the first number for half precision.
LIMITS = ((227 * 1024, (16384, 8192)), (163 * 1024, (8192, 4096)), (99 * 1024, (2048, 1024)), (0, (0, 0)))
# On sm_100 accumulators lie in tensor memory; what needs more than it holds, Triton compiles to a trap.
TENSOR_MEMORY_LIMIT = (4096, 1024)


def operands_of(dtype: torch.dtype, precision: str | None) -> str:
    """What the kernels multiply for rows of this dtype."""
    return "bf16" if precision == "bf16" else "fp16x3" if precision is None and dtype == torch.float32 else "fp16"


def limit(operands: str, device: torch.device) -> int:
    """The most points that one fused transform has on this device."""
    shared = LIMITS[0][0]
    if device.type == "cuda":
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if torch.cuda.get_device_capability(device)[0] == 10:
            return TENSOR_MEMORY_LIMIT[operands == "fp16x3"]
    return next(points for least, points in LIMITS if shared >= least)[operands == "fp16x3"]


def warps(block: int) -> int:
    """64 rows a warpgroup: with more warps than that, wgmma's layout computes rows twice."""
    return 8 if block > 64 else 4


@functools.cache
def sizes(points: int, most: int) -> tuple[int, int, int] | None:
    """(P, BLOCK, N2) of the cheapest transform of at least `points` points and at most `most`; None when there is none.

    By flops a row, 8 N1 + 16 N2 a point, plus what a point costs whatever the factors. BLOCK below 64 cannot use
    wgmma: counted as half the rate. N2 and P are bounded by what a thread has to hold and by shared memory (3 x
    128 x 32 asks for 236 KiB on sm_90).
    """
    best = None
    for block, widest in ((128, 64), (64, 32), (32, 32), (16, 16)):
        for n2 in (16, 32, 64):
            pieces = max(1, -(-points // (block * n2)))
            held = pieces * block * n2 // (32 * warps(block))
            if n2 > widest or pieces > (2 if block == 128 else MAX_PIECES) or held > 64 or pieces * block * n2 > most:
                continue
            cost = pieces * block * n2 * ((8 * pieces * block + 16 * n2) * (1 if block >= 64 else 2) + 512)
            if best is None or cost < best[0]:
                best = cost, (pieces, block, n2)
    return best and best[1]


@functools.lru_cache(maxsize=64)
def tables(n1: int, n2: int, operands: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The two factors and the twiddles, (planes, *, *): real, imaginary, and the lows of both for "fp16x3".

    Angles are exact in integers, then float64.
    """

    def unit(numerator: torch.Tensor, denominator: int) -> torch.Tensor:
        angle = (numerator % denominator).double() * (-2 * math.pi / denominator)
        return torch.stack([angle.cos(), angle.sin()])

    split, half = operands == "fp16x3", torch.bfloat16 if operands == "bf16" else torch.float16

    def factor(planes: torch.Tensor) -> torch.Tensor:
        high = planes.to(half)
        return torch.cat([high, ((planes - high.double()) * LOW.value).half()]).to(device) if split else high.to(device)

    first, second = torch.arange(n1), torch.arange(n2)
    shifted = 4 * first + 1  # 4 (k1 + 1/4)
    return {
        "first_ptr": factor(unit(shifted[:, None] * first, 4 * n1)),
        "second_ptr": factor(unit(second[:, None] * second, n2)),
        "twiddle_ptr": unit(shifted[:, None] * second, 4 * n1 * n2).to(device, torch.float32 if split else torch.half),
    }
