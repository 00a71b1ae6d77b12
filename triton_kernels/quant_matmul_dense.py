"""quant_matmul of many tokens: the weight dequantized once, a piece at a time, and multiplied by torch (cuBLAS).

Shape letters: M tokens, N outputs, K inputs, U units of P codes (quant_device.py).

Never measured. A product of 512 tokens takes 2 x 512 flops for each weight, 1.3 ns of an H100's 800 TFLOP/s a thousand
weights; to write and read a thousand bfloat16 weights takes as long at 3.2 TB/s, and less out of the L2; the fused
kernel, which unpacks them again for each 128 tokens, loses more than that. So from DENSE_TOKENS on. A piece of PIECE
bytes stays in the L2 (50 MB) until the product has read it, and bounds the memory.

bfloat16 alone: its range is float32's, so that no scale overflows; float16 weights could.
"""

import torch
import triton
import triton.language as tl

from ..quant._formats import FORMATS
from .common import Launch, cdiv, compile_spec, meta, next_power_of_2
from .quant_device import PER_UNIT, codes_of, parts_args, plain, store, table_of, weights_of

DENSE_TOKENS = 512
PIECE = 1 << 24


@triton.jit
def _dequantize_kernel(
    w_ptr, data_ptr, scales_ptr, zeros_ptr, offsets_ptr, table_ptr, outer_ptr, N, first, end, group,
    stride_w_n, stride_data_n, stride_scales_n, stride_scales_g, stride_zeros_n, stride_zeros_g, stride_offsets_n,
    stride_offsets_g, stride_outer_n,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """w (N, end - first): columns first .. end, where first is a unit's. Grid (tiles of units, tiles of N)."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = first // P + tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    in_n, row = n < N, n.to(tl.int64)
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
    bits, outer = FORMATS[format].bits, plain(outer)
    units = cdiv(w.shape[1], PER_UNIT[bits])
    block = min(128, next_power_of_2(units))
    args = dict(
        w_ptr=w, data_ptr=data, table_ptr=table_of(format, torch.float32, w.device), outer_ptr=outer, N=w.shape[0],
        first=first, end=first + w.shape[1], group=K if scales.shape[1] == 1 else group_size, stride_w_n=w.stride(0),
        stride_data_n=data.stride(0), **parts_args(scales, zeros, offsets),
        stride_outer_n=0 if outer is None or outer.shape[0] == 1 else outer.stride(0), FORMAT=format,
        P=PER_UNIT[bits], BLOCK_N=16, BLOCK_U=block,
    )  # fmt: skip
    return Launch(_dequantize_kernel, (cdiv(units, block), cdiv(w.shape[0], 16)), args, 4)


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


@compile_spec("dequantize")
def _spec(dtype: torch.dtype) -> Launch:
    data, scales = meta(1024, 4096, dtype=torch.uint8), meta(1024, 64, dtype=torch.float16)
    w = meta(1024, 8192, dtype=torch.bfloat16)
    return plan_dequantize(w, data, scales, None, None, None, "int4", 128, 8192)
