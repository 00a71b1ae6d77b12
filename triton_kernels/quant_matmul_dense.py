"""quant_matmul of many tokens: the weight dequantized once, a piece at a time, and multiplied by torch (cuBLAS).

Shape letters: M tokens, N outputs, K inputs, U units of P codes (quant_device.py).

Never measured. A product of 512 tokens takes 2 x 512 flops for each weight, 1.3 ns of an H100's 800 TFLOP/s a thousand
weights; to write and read a thousand bfloat16 weights takes as long at 3.2 TB/s, and less out of the L2; the fused
kernel, which unpacks them again for each 128 tokens, loses more than that. So from DENSE_TOKENS on. A piece of PIECE
bytes stays in the L2 (50 MB) until the product has read it, and bounds the memory.

bfloat16 alone: its range is float32's, so that no scale overflows; float16 weights could.
"""

import math

import torch
import triton
import triton.language as tl

from ..quant._formats import FORMATS
from .common import Launch, compile_spec, meta
from .host_math import cdiv, next_power_of_2
from .quant_device import (
    PER_UNIT, centre_of, codes_of, parts_args, plain, scales_of, store, table_of, values_of, weights_of,
)  # fmt: skip

DENSE_TOKENS = 512
PIECE = 1 << 24
COLUMNS = 256  # of a tile, of 16 rows or more where it has fewer


@triton.jit
def _side_by_side(planes, P: tl.constexpr):
    """P planes [N, U] as columns [N, P U] in their order."""
    if P == 1:
        return planes[0]
    elif P == 2:
        return tl.interleave(planes[0], planes[1])
    elif P == 4:
        return tl.interleave(tl.interleave(planes[0], planes[2]), tl.interleave(planes[1], planes[3]))
    else:
        even = _side_by_side((planes[0], planes[2], planes[4], planes[6]), 4)
        return tl.interleave(even, _side_by_side((planes[1], planes[3], planes[5], planes[7]), 4))


@triton.jit
def _dequantize_kernel(
    w_ptr, data_ptr, scales_ptr, zeros_ptr, offsets_ptr, table_ptr, outer_ptr, N, first, end, group,
    stride_w_n, stride_data_n, stride_scales_n, stride_scales_g, stride_zeros_n, stride_zeros_g, stride_offsets_n,
    stride_offsets_g, stride_outer_n,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, P: tl.constexpr, ONE_GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    """w (N, end - first): columns first .. end, where first is a unit's. Grid (tiles of units, tiles of N).

    ONE_GROUP: tiles are whole, and of one group each: wide loads and stores, a scale a row (12 instructions a weight of
    4 bits where each by itself takes 35)."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = first // P + tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    in_n, row = n < N, n.to(tl.int64)
    if ONE_GROUP:
        row = tl.minimum(row, N - 1)
        planes = ()
        for p in tl.static_range(P):
            code = codes_of(data_ptr + row[:, None] * stride_data_n, unit, None, p, FORMAT, P)  # [N, U]
            planes = planes + (values_of(code, table_ptr, FORMAT, tl.float32).to(tl.float32),)
        w, start = _side_by_side(planes, P), tl.program_id(0) * (P * BLOCK_U)
        g = (first + start) // group
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + row * stride_zeros_n + g * stride_zeros_g).to(tl.float32)
            w -= (zero - centre_of(FORMAT))[:, None]
        w *= scales_of(scales_ptr + row * stride_scales_n + g * stride_scales_g, None, SCALES, tl.float32)[:, None]
        if offsets_ptr is not None:
            w += tl.load(offsets_ptr + row * stride_offsets_n + g * stride_offsets_g).to(tl.float32)[:, None]
        if outer_ptr is not None:
            w *= tl.load(outer_ptr + row * stride_outer_n).to(tl.float32)[:, None]
        column = start + tl.arange(0, P * BLOCK_U)
        store(w_ptr + row[:, None] * stride_w_n + column[None, :], w, in_n[:, None])
    else:
        parts = (scales_ptr, stride_scales_n, stride_scales_g, zeros_ptr, stride_zeros_n, stride_zeros_g, offsets_ptr,
                 stride_offsets_n, stride_offsets_g)  # fmt: skip
        for p in tl.static_range(P):
            k = unit * P + p
            inside = in_n[:, None] & (k < end)[None, :]
            code = codes_of(data_ptr + row[:, None] * stride_data_n, unit, inside, p, FORMAT, P)  # [N, U]
            w = weights_of(code, inside, table_ptr, parts, n, k // group, SCALES, FORMAT, tl.float32)
            if outer_ptr is not None:
                w *= tl.load(outer_ptr + row * stride_outer_n, mask=in_n, other=0).to(tl.float32)[:, None]
            store(w_ptr + row[:, None] * stride_w_n + (k - first)[None, :], w, inside)


def plan_dequantize(w, data, scales, zeros, offsets, outer, format, group_size, K, first=0) -> Launch:
    """w (N, columns) bfloat16: the weight's columns from `first` on."""
    (N, columns), per, outer = w.shape, PER_UNIT[FORMATS[format].bits], plain(outer)
    group, units = K if scales.shape[1] == 1 else group_size, cdiv(columns, per)
    whole = math.gcd(COLUMNS, columns, first, COLUMNS if scales.shape[1] == 1 else group)  # columns of whole tiles
    one_group = whole >= 16 * per
    block = whole // per if one_group else min(128, next_power_of_2(units))
    rows = COLUMNS * 16 // whole if one_group else 16
    args = dict(
        w_ptr=w, data_ptr=data, table_ptr=table_of(format, torch.float32, w.device), outer_ptr=outer, N=N,
        first=first, end=first + columns, group=group, stride_w_n=w.stride(0),
        stride_data_n=data.stride(0), **parts_args(scales, zeros, offsets),
        stride_outer_n=0 if outer is None or outer.shape[0] == 1 else outer.stride(0), FORMAT=format,
        P=per, ONE_GROUP=one_group, BLOCK_N=rows, BLOCK_U=block,
    )  # fmt: skip
    return Launch(_dequantize_kernel, (cdiv(units, block), cdiv(N, rows)), args, 4)


def dense_serves(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a product out (M, ..) of x (M, ..) is left to torch."""
    return x.shape[0] >= DENSE_TOKENS and x.dtype == out.dtype == torch.bfloat16


def dense_fwd(out, x, data, scales, zeros, offsets, outer, bias, format, group_size) -> None:
    """out (M, N) = x (M, K) @ w.T + bias, by rows of the weight."""
    N, K = data.shape[0], x.shape[1]
    step = max(16, PIECE // (2 * K))
    row = lambda part, rows: part if part is None or part.shape[0] == 1 else part[rows]
    for rows in (slice(first, first + step) for first in range(0, N, step)):
        parts = (row(part, rows) for part in (scales, zeros, offsets, outer))
        w = x.new_empty(data[rows].shape[0], K)
        plan_dequantize(w, data[rows], *parts, format, group_size, K).run()
        if bias is None:
            torch.mm(x, w.mT, out=out[:, rows])
        else:
            torch.addmm(bias[rows].to(x.dtype), x, w.mT, out=out[:, rows])


def dense_bwd(dx, dout, data, scales, zeros, offsets, outer, format, group_size) -> None:
    """dx (M, K) = dout (M, N) @ w, by columns of the weight, so that each sum is one product's."""
    N, K = data.shape[0], dx.shape[1]
    step = max(16, PIECE // (2 * N) // 16 * 16)
    for first in range(0, K, step):
        w = dx.new_empty(N, min(step, K - first))
        plan_dequantize(w, data, scales, zeros, offsets, outer, format, group_size, K, first).run()
        torch.mm(dout, w, out=dx[:, first : first + step])


def _spec(format: str, group: int) -> Launch:
    bits, groups = FORMATS[format].bits, cdiv(8192, group)
    data, scales = meta(1024, 1024 * bits, dtype=torch.uint8), meta(1024, groups, dtype=torch.float16)
    w = meta(1024, 8192, dtype=torch.bfloat16)
    return plan_dequantize(w, data, scales, None, None, None, format, group, 8192)


compile_spec("dequantize")(lambda dtype: _spec("int4", 128))
compile_spec("dequantize_int1")(lambda dtype: _spec("int1", 128))
compile_spec("dequantize_odd_groups")(lambda dtype: _spec("int4", 100))
