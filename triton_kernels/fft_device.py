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

from .common import index

# Half-precision operands: a row is divided by its largest sample and the spectrum by the sum of its taps' magnitudes,
# which bounds every product of the two by N; times FULL / N it fills float16's range from the top, whatever the data.
FULL: tl.constexpr = tl.constexpr(32768.0)


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
    """The largest magnitude of each row, 1 for a row of zeros: [R]."""
    largest = tl.abs(tiles[0])
    for p in tl.static_range(1, PIECES):
        largest = tl.maximum(largest, tl.abs(tiles[p]))
    scale = tl.max(tl.max(tl.reshape(largest, [BLOCK, R, N2]), axis=2), axis=0)
    return tl.where(scale < 1e-30, 1.0, scale)


@triton.jit
def times_rows(tile, factor, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """A tile [BLOCK, R N2] or [BLOCK R, N2], each batch row times its factor [R]."""
    return tl.reshape(tl.reshape(tile, [BLOCK, R, N2]) * factor[None, :, None], tile.shape)


@triton.jit
def normalized(tiles, scale, dtype: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
               PIECES: tl.constexpr):  # fmt: skip
    """The tiles as operands: divided by their rows' scales where those are given, and rounded."""
    operands = ()
    for p in tl.static_range(PIECES):
        tile = tiles[p]
        if scale is not None:
            tile = times_rows(tile, 1 / scale, BLOCK, N2, R)
        operands = operands + (tile.to(dtype),)
    return operands


@triton.jit
def first_factor(first_ptr, q, p, N1: tl.constexpr, BLOCK: tl.constexpr):
    """exp(-2 pi i n1 (k1 + 1/4) / N1) for block q of k1 and block p of n1: (real, imaginary), [BLOCK, BLOCK]."""
    at = (q * BLOCK + tl.arange(0, BLOCK))[:, None] * N1 + (p * BLOCK + tl.arange(0, BLOCK))[None, :]
    return tl.load(first_ptr + at), tl.load(first_ptr + N1 * N1 + at)


@triton.jit
def second_factor(second_ptr, N2: tl.constexpr):
    """exp(-2 pi i n2 k2 / N2): (real, imaginary), [N2, N2], symmetric."""
    at = tl.arange(0, N2)[:, None] * N2 + tl.arange(0, N2)[None, :]
    return tl.load(second_ptr + at), tl.load(second_ptr + N2 * N2 + at)


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
def transform(
    x, q, first_ptr, second_re, second_im, t_re, t_im, PIECES: tl.constexpr, N1: tl.constexpr, BLOCK: tl.constexpr,
    N2: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block q of the spectrum of real rows, x a tuple of PIECES operands: (real, imaginary), [BLOCK R, N2], float32.

    Pieces that are all zero are left out of x, and with it out of the product.
    """
    acc_re = tl.zeros([BLOCK, R * N2], tl.float32)
    acc_im = tl.zeros([BLOCK, R * N2], tl.float32)
    for p in tl.static_range(PIECES):
        f_re, f_im = first_factor(first_ptr, q, p, N1, BLOCK)
        acc_re = tl.dot(f_re, x[p], acc_re, input_precision=PRECISION)
        acc_im = tl.dot(f_im, x[p], acc_im, input_precision=PRECISION)
    dtype: tl.constexpr = first_ptr.dtype.element_ty
    a_re = tl.reshape((acc_re * t_re - acc_im * t_im).to(dtype), [BLOCK * R, N2])
    a_im = tl.reshape((acc_re * t_im + acc_im * t_re).to(dtype), [BLOCK * R, N2])
    x_re = tl.dot(a_re, second_re, input_precision=PRECISION)
    x_re = tl.dot(-a_im, second_im, x_re, input_precision=PRECISION)
    x_im = tl.dot(a_re, second_im, input_precision=PRECISION)
    x_im = tl.dot(a_im, second_re, x_im, input_precision=PRECISION)
    return x_re, x_im


@triton.jit
def inverse_first_half(
    y_re, y_im, second_re, second_im, t_re, t_im, dtype: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr,
    R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From a block of a spectrum [BLOCK R, N2] back over k2, divided by N2: operands (real, imaginary), [BLOCK, R N2].

    What remains is the first factor: block p of the result is the sum over the blocks q of `real_part`.
    """
    y_re, y_im = y_re.to(dtype), y_im.to(dtype)
    b_re = tl.dot(y_re, second_re, input_precision=PRECISION)
    b_re = tl.dot(y_im, second_im, b_re, input_precision=PRECISION)
    b_im = tl.dot(y_im, second_re, input_precision=PRECISION)
    b_im = tl.dot(-y_re, second_im, b_im, input_precision=PRECISION)
    b_re = tl.reshape(b_re, [BLOCK, R * N2]) * (1.0 / N2)
    b_im = tl.reshape(b_im, [BLOCK, R * N2]) * (1.0 / N2)
    return (b_re * t_re + b_im * t_im).to(dtype), (b_im * t_re - b_re * t_im).to(dtype)


@triton.jit
def real_part(acc, b_re, b_im, first_ptr, q, p, N1: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BLOCK, R N2] plus what block q of k1 gives to the real part of block p of the result."""
    f_re, f_im = first_factor(first_ptr, q, p, N1, BLOCK)
    acc = tl.dot(tl.trans(f_re), b_re, acc, input_precision=PRECISION)
    return tl.dot(tl.trans(f_im), b_im, acc, input_precision=PRECISION)


@triton.jit
def imaginary_part(acc, b_re, b_im, first_ptr, q, p, N1: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """As `real_part`, the imaginary one."""
    f_re, f_im = first_factor(first_ptr, q, p, N1, BLOCK)
    acc = tl.dot(tl.trans(f_re), b_im, acc, input_precision=PRECISION)
    return tl.dot(tl.trans(f_im), -b_re, acc, input_precision=PRECISION)


# --- host side ------------------------------------------------------------------------------------------------------

MAX_PIECES = 6
MAX_POINTS = {torch.float32: 16384, torch.float16: 32768, torch.bfloat16: 32768}  # accumulators stay in registers


@functools.cache
def sizes(points: int, most: int) -> tuple[int, int, int] | None:
    """(P, BLOCK, N2) of the cheapest transform of at least `points` points and at most `most`; None when there is none.

    By flops a row, 8 N1 + 16 N2 a point, plus what a point costs whatever the factors. BLOCK below 64 cannot use
    wgmma, whose tiles have 64 rows: counted as half the rate.
    """
    best = None
    for block in (64, 32, 16):
        for n2 in (16, 32, 64, 128):
            pieces = max(1, -(-points // (block * n2)))
            if pieces > MAX_PIECES or pieces * block * n2 > most or (block < 64 and block < n2):
                continue
            cost = pieces * block * n2 * ((8 * pieces * block + 16 * n2) * (1 if block == 64 else 2) + 512)
            if best is None or cost < best[0]:
                best = cost, (pieces, block, n2)
    return best and best[1]


@functools.lru_cache(maxsize=64)
def tables(n1: int, n2: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """The two factors and the twiddles, (2, *, *) with the real part first: angles exact in integers, then float64."""

    def unit(numerator: torch.Tensor, denominator: int) -> torch.Tensor:
        angle = (numerator % denominator).double() * (-2 * math.pi / denominator)
        return torch.stack([angle.cos(), angle.sin()]).to(dtype).to(device)

    first, second = torch.arange(n1), torch.arange(n2)
    shifted = 4 * first + 1  # 4 (k1 + 1/4)
    return {
        "first_ptr": unit(shifted[:, None] * first, 4 * n1),
        "second_ptr": unit(second[:, None] * second, n2),
        "twiddle_ptr": unit(shifted[:, None] * second, 4 * n1 * n2),
    }
