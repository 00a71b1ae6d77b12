"""Grouped causal convolution with short filters as products with Toeplitz blocks on tl.dot: forward and backward.

Shape letters: B batch, D channels, L length, G filters, K taps, T tokens of a block, R rows of a tile, P + 1 shifts, S
parts of the rows. A row is one block of T tokens of one sequence, a sequence a channel of a sample; the rows of one
filter are all blocks of the D / G channels of its group, of all samples.

    out[r, i] = sum_p sum_j u[r - p, j] k[i - j + p T]           [R, T] @ [T, T], p = 0 .. P = ceil((K - 1) / T)
    du[r, i]  = sum_p sum_j dout[r + p, j] k[j - i + p T]        the same product the other way round
    dk[s]     = sum over i - j + p T = s of W_p[j, i],  W_p = sum_r u[r - p, j] dout[r, i]       [T, R] @ [R, T]

A lag outside of 0 .. K - 1 is a zero of the matrix; with K <= T + 1 these are the two triangles of the two-pass form.
Batch x blocks is the long axis of the product, so that a filter a channel fills the matrix units as a shared one does.

Never measured. What should bound it on an H100/H200: HBM bytes, 4 a point in half precision forward and 10 with the
backward, as long as the 2 T (P + 1) flops a point stay below about 600 forward (500 TFLOP/s against 3.35 TB/s): with T
= 64 up to 193 taps. Float32 (three products of tf32) has a third of the rate and twice the bytes.

How the work is split: a program owns R rows of one filter and walks over the shifts; each builds its matrix from k by
loads at i - j + p T (T^2 / 32 of them a warp's width, out of the L1, against R T^2 / 2048 clocks of products: below
half of these from R = 128 on) and reads its rows of u one block further to the left, out of the L1 after the first.
The gradient of k has a program for each filter, shift and, with few filters, part of the rows.

What stays where: [R, T] or [T, T] float32 accumulators in registers, for the whole of the walk; operands pass through
shared memory. dk leaves a program as two sums a diagonal of W_p, taken in registers: W_p sheared by `gather` so that
diagonals are columns. Torch adds the S (P + 1) pieces of a filter, 2 T numbers each: no W is ever written.

float16: taps in a wider type are divided by the power of two below their largest, so that none overflows.
Strides: any, but only tokens that lie next to each other are read in whole sectors; channels-last tensors are not.
Determinism: every sum has a fixed order; S depends on the shapes alone.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, compile_spec, index, meta, strides, wide
from .fft_device import INTERPRETED
from .tuning import config

__all__ = ["toeplitz_conv_bwd", "toeplitz_conv_fwd"]

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _row(tile, g, width, chunks, rows, R: tl.constexpr):
    """Of the rows of a tile: (place of the block in its sequence, sample, channel, whether there is one), [R]."""
    row = tile * R + tl.arange(0, R)
    sequence = row // chunks
    return row % chunks, (sequence // width).to(tl.int64), g * width + sequence % width, row < rows


@triton.jit
def _operand(x, TYPE: tl.constexpr):
    """x as an operand of a product. The interpreter keeps bfloat16 as integers, which it would multiply as such, and
    truncates where a GPU rounds: there it is a float32 of bfloat16's eight bits (Dekker's splitting)."""
    if INTERPRETED and TYPE == tl.bfloat16:
        x = x.to(tl.float32)
        return x * 65537.0 - (x * 65537.0 - x)
    else:
        return x.to(TYPE)


@triton.jit
def _power_of_two(k_ptr, stride_k_k, K, T: tl.constexpr):
    """The power of two below the largest magnitude of K taps, 1 for zeros."""
    largest = tl.zeros([T], tl.float32)
    for first in range(0, K, T):
        lag = first + tl.arange(0, T)
        tap = tl.load(k_ptr + lag.to(tl.int64) * stride_k_k, mask=lag < K, other=0.0)  # [T]
        largest = tl.maximum(largest, tl.abs(tap.to(tl.float32)))
    bits = tl.max(largest).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(bits == 0, 0x3F800000, bits).to(tl.float32, bitcast=True)


# --- out and du -----------------------------------------------------------------------------------------------------


@triton.jit
def _toeplitz_conv_fwd_kernel(
    out_ptr, x_ptr, k_ptr, width, chunks, rows, tiles, shifts, L, K,
    stride_out_b, stride_out_d, stride_out_l, stride_x_b, stride_x_d, stride_x_l, stride_k_g, stride_k_k,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x is u, with AHEAD, which looks into the future, dout. Grid (G tiles,)."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    g = tl.cast(tl.program_id(0) // tiles, tl.int64)
    chunk, b, d, in_rows = _row(tl.program_id(0) % tiles, g, width, chunks, rows, R)
    i = tl.arange(0, T)
    k_ptr += g * stride_k_g
    x_ptr += (b * stride_x_b + d * stride_x_d)[:, None]
    SCALED: tl.constexpr = kind == tl.float16 and k_ptr.dtype.element_ty != tl.float16
    scale = 1.0
    if SCALED:
        scale = _power_of_two(k_ptr, stride_k_k, K, T)
    y = tl.zeros([R, T], acc)
    for p in tl.range(shifts, num_stages=2):
        t = (chunk + p if AHEAD else chunk - p)[:, None] * T + i[None, :]
        inside = in_rows[:, None] & (t >= 0) & (t < L)
        x = tl.load(x_ptr + index(t, INT64) * stride_x_l, mask=inside, other=0.0)  # [R, T]
        lag = (i[:, None] - i[None, :] if AHEAD else i[None, :] - i[:, None]) + p * T
        tap = tl.load(k_ptr + index(lag, INT64) * stride_k_k, mask=(lag >= 0) & (lag < K), other=0.0).to(acc)  # [T, T]
        if SCALED:
            tap /= scale
        y = tl.dot(_operand(x, kind), _operand(tap, kind), y, input_precision=PRECISION, out_dtype=acc)
    if SCALED:
        y *= scale
    t = chunk[:, None] * T + i[None, :]
    at = (b * stride_out_b + d * stride_out_d)[:, None] + index(t, INT64) * stride_out_l
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (t < L))


# --- dk -------------------------------------------------------------------------------------------------------------


@triton.jit
def _toeplitz_conv_bwd_kernel(
    partial_ptr, dout_ptr, u_ptr, width, chunks, rows, parts, shifts, turns, L,
    stride_dout_b, stride_dout_d, stride_dout_l, stride_u_b, stride_u_d, stride_u_l,
    PRECISION: tl.constexpr, INT64: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """partial (G, S, P + 1, 2, T): the sums of W_p's diagonals from p T on, and those T below. Grid (G S (P + 1),)."""
    kind: tl.constexpr = u_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    program = tl.program_id(0)
    p, part = program % shifts, program // shifts % parts
    g = tl.cast(program // shifts // parts, tl.int64)
    i = tl.arange(0, T)
    w = tl.zeros([T, T], acc)
    for turn in range(turns):
        chunk, b, d, in_rows = _row(part * turns + turn, g, width, chunks, rows, R)
        t = chunk[:, None] * T + i[None, :]
        at = (b * stride_dout_b + d * stride_dout_d)[:, None] + index(t, INT64) * stride_dout_l
        dy = tl.load(dout_ptr + at, mask=in_rows[:, None] & (t < L), other=0.0)  # [R, T]
        t = (chunk - p)[None, :] * T + i[:, None]
        at = (b * stride_u_b + d * stride_u_d)[None, :] + index(t, INT64) * stride_u_l
        x = tl.load(u_ptr + at, mask=in_rows[None, :] & (t >= 0) & (t < L), other=0.0)  # [T, R]
        w = tl.dot(_operand(x, kind), _operand(dy, kind), w, input_precision=PRECISION, out_dtype=acc)
    place = i[:, None] + i[None, :]
    sheared = tl.gather(w, place % T, 1)  # [T, T]: row j begins with its element on the main diagonal
    to = partial_ptr + tl.cast(program, tl.int64) * 2 * T + i
    tl.store(to, tl.sum(tl.where(place < T, sheared, 0.0), axis=0))
    tl.store(to + T, tl.sum(tl.where(place < T, 0.0, sheared), axis=0))


# --- launchers ------------------------------------------------------------------------------------------------------

WANTED = 4 * 132  # programs, four a multiprocessor of an H100/H200


def _blocks(kernel: str, u: torch.Tensor, groups: int, taps: int) -> dict[str, int]:
    """T, R and num_warps."""
    most = {torch.float64: 16, torch.float32: 32}.get(u.dtype, 64)
    tokens = max(16, min(most, triton.next_power_of_2(max(1, taps - 1))))
    rows = u.shape[0] * u.shape[1] // groups * triton.cdiv(u.shape[2], tokens)
    size = max(16, min(64 if kernel.endswith("bwd") else 128, triton.next_power_of_2(rows)))
    default = {"T": tokens, "R": size, "num_warps": 4}
    return config(kernel, f"{str(u.dtype)[6:]}-K{triton.next_power_of_2(taps)}", u.device, default)


def _shape(u: torch.Tensor, groups: int, taps: int, blocks: dict[str, int]) -> dict[str, int]:
    """The arguments that both kernels take."""
    width, chunks = u.shape[1] // groups, triton.cdiv(u.shape[2], blocks["T"])
    return dict(
        width=width, chunks=chunks, rows=u.shape[0] * width * chunks, shifts=triton.cdiv(taps - 1, blocks["T"]) + 1,
        L=u.shape[2], PRECISION="tf32x3" if u.dtype == torch.float32 else "ieee", R=blocks["R"], T=blocks["T"],
    )  # fmt: skip


def plan_toeplitz_conv_fwd(out, x, k, ahead=False) -> Launch:
    """The launch, from shapes, strides and dtypes alone. `ahead`: out is du and x is dout."""
    groups, taps = k.shape[0], min(k.shape[1], x.shape[2])
    blocks = _blocks("toeplitz_conv_fwd", x, groups, taps)
    shape = _shape(x, groups, taps, blocks)
    tiles = triton.cdiv(shape["rows"], blocks["R"])
    args = dict(
        out_ptr=out, x_ptr=x, k_ptr=k, tiles=tiles, K=taps, **shape, **strides("out", out, "bdl"),
        **strides("x", x, "bdl"), **strides("k", k, "gk"), AHEAD=ahead, INT64=wide(out, x, k),
    )  # fmt: skip
    return Launch(_toeplitz_conv_fwd_kernel, (groups * tiles,), args, blocks["num_warps"])


def toeplitz_conv_fwd(*args) -> None:
    """fill(out, *op arguments)"""
    plan_toeplitz_conv_fwd(*args).run()


def plan_toeplitz_conv_bwd(dout, u, k) -> Launch:
    """The launch for dk; its first argument holds the partial sums."""
    groups, taps = k.shape[0], min(k.shape[1], u.shape[2])
    blocks = _blocks("toeplitz_conv_bwd", u, groups, taps)
    shape = _shape(u, groups, taps, blocks)
    tiles = triton.cdiv(shape["rows"], blocks["R"])
    parts = max(1, min(tiles, WANTED // (groups * shape["shifts"])))
    turns = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, turns)
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    args = dict(
        partial_ptr=u.new_empty(groups, parts, shape["shifts"], 2, blocks["T"], dtype=real), dout_ptr=dout, u_ptr=u,
        parts=parts, turns=turns, **shape, **strides("dout", dout, "bdl"), **strides("u", u, "bdl"),
        INT64=wide(dout, u),
    )  # fmt: skip
    return Launch(_toeplitz_conv_bwd_kernel, (groups * parts * shape["shifts"],), args, blocks["num_warps"])


def toeplitz_conv_bwd(du, dk, dout, u, k) -> None:
    """fill(du, dk, *op arguments)"""
    plan_toeplitz_conv_fwd(du, dout, k, ahead=True).run()
    launch = plan_toeplitz_conv_bwd(dout, u, k)
    launch.run()
    upper, lower = launch.args["partial_ptr"].sum(1).unbind(2)  # [G, P + 1, T], from lags p T and (p - 1) T on
    upper[:, :-1] += lower[:, 1:]
    taps = min(k.shape[1], u.shape[2])
    dk[:, :taps] = upper.flatten(1)[:, :taps]
    dk[:, taps:] = 0


def _spec(kind: str, dtype: torch.dtype, *, taps_dtype=None, shape=(8, 4096, 4096)) -> Launch:
    """128 taps, a filter a channel."""
    u, k = meta(*shape, dtype=dtype), meta(shape[1], 128, dtype=taps_dtype or dtype)
    return plan_toeplitz_conv_bwd(u, u, k) if kind == "bwd" else plan_toeplitz_conv_fwd(u, u, k, kind == "du")


for _kind in ("fwd", "bwd"):
    compile_spec(f"toeplitz_conv_{_kind}")(lambda dtype, kind=_kind: _spec(kind, dtype))
compile_spec("toeplitz_conv_du_float16_wide")(  # float32 taps, offsets beyond 32 bits
    lambda dtype: _spec("du", torch.float16, taps_dtype=torch.float32, shape=(8, 4096, 2**20))
)
