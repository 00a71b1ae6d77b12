"""Attention over the tiles of a plan: the gradient of a dense bias, summed over what shares it, by tiles of pairs.

A program owns a tile of the bias's own gradient, [BLOCK_Q, BLOCK_K] in registers, and walks through the batches and
heads that share it in a fixed order; it looks its tile up in each one's row of the plan by bisection and skips those
where the tile is empty. Every tile is written, so the gradient needs no zeros beforehand. The products are those of
dq without the last, computed again: a bias has as many numbers as there are pairs, which bounds this kernel by memory
unless many heads share it.
"""

import torch
import triton
import triton.language as tl

from .bias_tables import bias_of
from .common import Launch, compile_spec, index, strides
from .sparse_attention import (
    bias_strides,
    blocks_of,
    common_args,
    dot,
    list_of,
    load_rows,
    numbers,
    program_of,
    sample,
)  # fmt: skip
from .sparse_attention_dq import load_statistics, slopes


@triton.jit
def _visited(runs_ptr, begin, end, tile):
    """Whether a key tile of the plan is in the runs begin .. end."""
    low, high = begin, end
    while low < high:  # the first run past the tile
        middle = (low + high) // 2
        if tl.load(runs_ptr + 3 * middle) <= tile:
            low = middle + 1
        else:
            high = middle
    found = False
    if low > begin:
        found = tile < tl.load(runs_ptr + 3 * low - 3) + tl.load(runs_ptr + 3 * low - 2)
    return found


@triton.jit
def _sparse_attention_dbias_kernel(
    dbias_ptr, dout_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, tables, code_ptr, ptr_ptr, runs_ptr, scalars_ptr,
    scale, softcap, norm, size, Hq, group, Lq, Lk, plan_tiles, plan_batches, plan_heads, bias_heads, sharing_batches,
    sharing_heads, stride_dbias_b, stride_dbias_h, stride_dbias_q, stride_dbias_k,
    stride_dout_b, stride_dout_h, stride_dout_l, stride_dout_p,
    stride_q_b, stride_q_h, stride_q_l, stride_q_p, stride_k_b, stride_k_h, stride_k_l, stride_k_p,
    stride_v_b, stride_v_h, stride_v_l, stride_v_p, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    PARAMS: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, SILU: tl.constexpr,
    SOFTCAP: tl.constexpr, INT64: tl.constexpr, STEP_Q: tl.constexpr, STEP_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    key_tiles = tl.cdiv(Lk, BLOCK_K)
    tile_q, tile_k = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    bias_b, bias_h = tl.program_id(1) // bias_heads, tl.program_id(1) % bias_heads
    scale, softcap, norm = numbers(scalars_ptr, scale, softcap, norm)
    at_q, at_k = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    in_q, in_k, row, column = at_q < Lq, at_k < Lk, index(at_q, INT64), index(at_k, INT64)
    inside = in_q[:, None] & in_k[None, :]
    p, pv = index(tl.arange(0, BLOCK_P), INT64), index(tl.arange(0, BLOCK_PV), INT64)
    base = bias_ptr + tl.cast(bias_b, tl.int64) * stride_bias_b + index(bias_h, INT64) * stride_bias_h
    bias = tl.load(base + row[:, None] * stride_bias_q + column[None, :] * stride_bias_k, mask=inside, other=0.0)
    none = tl.zeros([BLOCK_Q, BLOCK_K], rows_ptr.dtype.element_ty)
    acc = none
    for n in range(sharing_batches * sharing_heads):
        b, h = bias_b * sharing_batches + n // sharing_heads, bias_h * sharing_heads + n % sharing_heads
        begin, end = list_of(ptr_ptr, b, h, plan_batches, plan_heads, tile_q // STEP_Q, plan_tiles)
        if _visited(runs_ptr, begin, end, tile_k // STEP_K):
            batch, head, key_head = tl.cast(b, tl.int64), index(h, INT64), index(h // group, INT64)
            base = q_ptr + batch * stride_q_b + head * stride_q_h
            q = load_rows(base, stride_q_l, stride_q_p, row, p, in_q, P, True)  # [BLOCK_Q, BLOCK_P]
            base = dout_ptr + batch * stride_dout_b + head * stride_dout_h
            dout = load_rows(base, stride_dout_l, stride_dout_p, row, pv, in_q, PV, True)  # [BLOCK_Q, BLOCK_PV]
            base = k_ptr + batch * stride_k_b + key_head * stride_k_h
            k = load_rows(base, stride_k_l, stride_k_p, column, p, in_k, P, True)  # [BLOCK_K, BLOCK_P]
            base = v_ptr + batch * stride_v_b + key_head * stride_v_h
            v = load_rows(base, stride_v_l, stride_v_p, column, pv, in_k, PV, True)  # [BLOCK_K, BLOCK_PV]
            lse, delta = load_statistics(rows_ptr + (batch * Hq + h) * Lq, tl.cast(size, tl.int64), at_q, in_q)
            qk, dw = dot(q, tl.trans(k), none), dot(dout, tl.trans(v), none)
            numbers_ = PARAMS(code_ptr, program_of(code_ptr, h))
            allowed = MASK(code_ptr, numbers_, b, h, at_q[:, None], at_k[None, :]) & inside
            added = bias
            if tables is not None:
                at = (at_q[:, None], at_k[None, :], in_q[:, None], in_k[None, :])
                added = bias.to(acc.dtype) + bias_of(None, 0, 0, tables, h, at[0], at[1], at[2], at[3], INT64)
            _, ds, _ = slopes(qk, dw, added, lse[:, None], delta[:, None], allowed, scale, softcap, SILU, SOFTCAP, True)
            acc += ds
    if SILU:
        acc *= norm
    at = dbias_ptr + tl.cast(bias_b, tl.int64) * stride_dbias_b + index(bias_h, INT64) * stride_dbias_h
    at += row[:, None] * stride_dbias_q + column[None, :] * stride_dbias_k
    tl.store(at, acc.to(dbias_ptr.dtype.element_ty), mask=inside)


def plan_dbias(dbias, dout, rows, call: dict) -> Launch:
    """call: q, k, v, code, plan, bias, tables, scale, softcap, silu, norm, functions."""
    q, v, plan, bias = (call[name] for name in ("q", "v", "plan", "bias"))
    wide_tile = q.element_size() == 2 and q.shape[3] <= 128 and v.shape[3] <= 128
    default = {"BLOCK_Q": 64 if wide_tile else 32, "BLOCK_K": 64 if wide_tile else 32, "num_warps": 4, "num_stages": 1}
    blocks = blocks_of("sparse_attention_dbias", q, v, plan, default, call["tables"])
    args = common_args(**call, blocks=blocks, tensors=(dbias, dout)) | dict(
        dbias_ptr=dbias, dout_ptr=dout, rows_ptr=rows, size=rows[0].numel(), ptr_ptr=plan.ptr, runs_ptr=plan.runs,
        plan_tiles=triton.cdiv(q.shape[2], plan.block[0]), bias_heads=bias.shape[1],
        sharing_batches=q.shape[0] // bias.shape[0], sharing_heads=q.shape[1] // bias.shape[1],
        **bias_strides(dbias, "dbias"), **strides("dout", dout, "bhlp"),
    )  # fmt: skip
    tiles = triton.cdiv(q.shape[2], blocks["BLOCK_Q"]) * triton.cdiv(call["k"].shape[2], blocks["BLOCK_K"])
    grid = (tiles, bias.shape[0] * bias.shape[1])
    return Launch(_sparse_attention_dbias_kernel, grid, args, blocks["num_warps"], blocks["num_stages"])


def _spec(dtype: torch.dtype, options: str) -> Launch:
    call, lse = sample(dtype, options + " bias")
    del call["sinks"]
    return plan_dbias(call["bias"], call["q"], lse.new_empty(2, *lse.shape), call)


compile_spec("sparse_attention_dbias")(lambda dtype: _spec(dtype, ""))
