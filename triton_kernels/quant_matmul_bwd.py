"""The gradient of quant_matmul for x: dout @ dequantize(w), and which kernel makes it.

Shape letters: M tokens, N outputs, K inputs, G groups of columns.

    dx[m, k] = sum_n dout[m, n] outer[n] (scales[n, g] (code[n, k] - zeros[n, g]) + offsets[n, g])

A group lies along K and the sum along N: no product can be scaled when it is whole, so the weight itself is the
operand, rounded once, to bfloat16, or to TF32, which has float16's eleven bits and float32's range, for float16.

Never measured. Bound like the forward; here every code's byte is looked up by itself, which takes about a load an
element of a tile, and BLOCK_M tokens share it. Training has many tokens: from DENSE_TOKENS on bfloat16 weights are
dequantized once, in pieces of columns, for cuBLAS (quant_matmul_dense.py).

How the work is split: a program owns BLOCK_M x BLOCK_K of dx and walks down the weight's rows. The gradients of scales,
zeros, offsets and outer, which few calls ask for, are torch's.
"""

import torch
import triton
import triton.language as tl

from ..ops import _quant_matmul
from ..ops._quant_matmul import _parts_backward, activations
from ..quant._formats import FORMATS
from .common import Launch, compile_spec, index, strides, wide
from .host_math import cdiv, next_power_of_2
from .quant_device import (
    codes_of, expert_of, experts_args, operand, parts_args, plain, rows_first, store, table_of, weights_of,
)  # fmt: skip
from .quant_matmul import TYPES, real_of, sample
from .quant_matmul_dense import dense_bwd, dense_serves
from .tuning import config

__all__ = ["quant_matmul_bwd"]


@triton.jit
def _quant_matmul_bwd_kernel(
    dx_ptr, dout_ptr, data_ptr, scales_ptr, zeros_ptr, offsets_ptr, table_ptr, outer_ptr, offs_ptr, M, N, K, group,
    stride_dx_m, stride_dx_k, stride_dout_m, stride_dout_n, stride_data_n, stride_scales_n, stride_scales_g,
    stride_zeros_n, stride_zeros_g, stride_offsets_n, stride_offsets_g, stride_outer_n,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """dx (M, K). Grid (tiles of M, tiles of K)."""
    expert, first_m, end_m = 0, tl.program_id(0) * BLOCK_M, M
    if EXPERTS > 0:
        expert, first_m, end_m = expert_of(offs_ptr, tl.program_id(0), M, EXPERTS, BLOCK_M, LANES)
        if expert >= EXPERTS:
            return
    m, k = first_m + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dout_ptr += tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_dout_m
    parts = (scales_ptr, stride_scales_n, stride_scales_g, zeros_ptr, stride_zeros_n, stride_zeros_g, offsets_ptr,
             stride_offsets_n, stride_offsets_g)  # fmt: skip
    column, acc = index(k, INT64), tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_n, row = n < N, tl.cast(expert, tl.int64) * N + n
        dout = tl.load(dout_ptr + index(n, INT64)[None, :] * stride_dout_n, mask=in_n[None, :], other=0.0)  # [M, N]
        inside = in_n[:, None] & (k < K)[None, :]
        code = codes_of(data_ptr + row[:, None] * stride_data_n, column, inside, 0, FORMAT, 1)  # [N, K]
        w = weights_of(code, inside, table_ptr, parts, row, k // group, SCALES, FORMAT, ACC)
        if outer_ptr is not None:
            w *= tl.load(outer_ptr + row * stride_outer_n, mask=in_n, other=0).to(ACC)[:, None]
        if PRECISION == "tf32":  # the matrix unit would cut the bits off
            bits = w.to(tl.int32, bitcast=True)
            w = tl.where(tl.abs(w) < 1e38, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), w)
        acc = tl.dot(operand(dout, OPERAND), operand(w, OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    at = dx_ptr + m.to(tl.int64)[:, None] * stride_dx_m + column[None, :] * stride_dx_k
    store(at, acc, (m < end_m)[:, None] & (k < K)[None, :])


def plan_quant_matmul_bwd(dx, dout, data, scales, zeros, offsets, outer, offs, format, group_size) -> Launch:
    """dx (M, K), dout (M, N)."""
    (M, K), N, acc, experts = dx.shape, dout.shape[1], real_of(dx.dtype), experts_args(offs)
    half = dx.element_size() == 2
    default = {"BLOCK_M": 64 if half else 32, "BLOCK_N": 32, "BLOCK_K": 64 if half else 32, "num_warps": 4}
    key = f"{str(dx.dtype)[6:]}-{FORMATS[format].bits}-M{next_power_of_2(M)}"
    tiles = dict(config("quant_matmul_bwd", key, dx.device, default))
    for name, size in (("M", M), ("N", N), ("K", K)):
        tiles[f"BLOCK_{name}"] = max(16, min(tiles[f"BLOCK_{name}"], next_power_of_2(size)))
    outer, warps = plain(outer), tiles.pop("num_warps")
    args = dict(
        dx_ptr=dx, dout_ptr=dout, data_ptr=data, table_ptr=table_of(format, acc, dx.device), outer_ptr=outer,
        M=M, N=N, K=K, group=K if scales.shape[1] == 1 else group_size, **strides("dx", dx, "mk"),
        **strides("dout", dout, "mn"), stride_data_n=data.stride(0), **parts_args(scales, zeros, offsets),
        stride_outer_n=0 if outer is None or outer.shape[0] == 1 else outer.stride(0), FORMAT=format,
        OPERAND=tl.float32 if dx.dtype == torch.float16 else TYPES[dx.dtype], ACC=TYPES[acc],
        PRECISION={torch.float16: "tf32", torch.float32: "tf32x3"}.get(dx.dtype, "ieee"),
        INT64=wide(dx, dout) or K * FORMATS[format].bits >= 2**31, **tiles, **experts,
    )  # fmt: skip
    grid = (cdiv(M, tiles["BLOCK_M"]) + experts["EXPERTS"], cdiv(K, tiles["BLOCK_K"]))
    return Launch(_quant_matmul_bwd_kernel, grid, args, warps)


def quant_matmul_bwd(
    dx, dscales, dzeros, doffsets, douter, dbias,
    dout, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale,
    weight_grads,
) -> None:  # fmt: skip
    """fill(dx, dscales, dzeros, doffsets, douter, dbias, *op arguments)"""
    if offs is not None and weight_grads:  # the host reads where each expert's rows end
        return _quant_matmul.backward(
            dx, dscales, dzeros, doffsets, douter, dbias, dout, x, data, scales, zeros, offsets, outer, bias, offs,
            format, group_size, activation, activation_scale, weight_grads,
        )  # fmt: skip
    flat, to, data = dout.reshape(-1, dout.shape[-1]), dx.view(-1, dx.shape[-1]), rows_first(data)
    weight, options = (data, scales, zeros, offsets, outer), (format, group_size)
    if offs is not None:
        dx.zero_()  # the rows beyond the last expert's
    if offs is None and dense_serves(to, flat):
        dense_bwd(to, flat, *weight, *options)
    else:
        plan_quant_matmul_bwd(to, flat, *weight, offs, *options).run()
    real = real_of(x.dtype)
    with torch.autocast(dout.device.type, enabled=False):
        if bias is not None:
            dbias.copy_(flat.sum(0, dtype=real) if offs is None else _sums(flat.to(real), offs).flatten())
        if weight_grads:
            values = activations(x, activation, activation_scale, real).flatten(0, -2)
            grads, parts = (dscales, dzeros, doffsets, douter), (scales, zeros, offsets, outer)
            _parts_backward(grads, flat.to(real), values, data, parts, format, group_size)


def _sums(rows, offs):
    """(E, N): the sum of each expert's rows of (M, N), in their order."""
    ends = torch.nn.functional.pad(offs.long(), (1, 1))
    ends[-1] = len(rows)  # what lies beyond the last expert's is summed as well, and left out
    return torch.segment_reduce(rows, "sum", lengths=ends.diff(), axis=0, unsafe=True)[:-1]


def _spec(dtype: torch.dtype, format: str, **options) -> Launch:
    dout, dx, data, scales, zeros, offsets = sample(256, dtype, format, **options)
    return plan_quant_matmul_bwd(dx, dout, data, scales, zeros, offsets, None, None, format, 128)


compile_spec("quant_matmul_bwd")(lambda dtype: _spec(dtype, "int4"))
compile_spec("quant_matmul_bwd_float16_int3")(
    lambda dtype: _spec(torch.float16, "int3", zeros=torch.float16, offsets=True)
)
