"""Attention over the tiles of a plan: what the backward needs of each row, and the kernel of dq.

The formulas and the split of the work are in sparse_attention_bwd.py.
"""

import torch
import triton
import triton.language as tl

from .bias_tables import bias_of
from .common import LOG2E, Launch, compile_spec, index, sigmoid, silu_slope, strides, wide
from .sparse_attention import (
    CAREFUL,
    EVERY,
    FULL,
    blocks_of,
    broken,
    careful_dot,
    common_args,
    dot,
    list_of,
    load_rows,
    numbers,
    padded,
    program_of,
    sample,
    scores,
    tiles_of,
)  # fmt: skip

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _rows_kernel(
    rows_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, H, L, size, stride_out_b, stride_out_h, stride_out_l, stride_out_p,
    stride_dout_b, stride_dout_h, stride_dout_l, stride_dout_p, stride_lse_b, stride_lse_h, stride_lse_l,
    stride_dlse_b, stride_dlse_h, stride_dlse_l, PV: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """(lse in base 2, delta), (2, B, H, L). A row without keys gets lse = Inf, with which its weights are 0."""
    acc_type: tl.constexpr = rows_ptr.dtype.element_ty
    b, h = tl.cast(tl.program_id(1) // H, tl.int64), index(tl.program_id(1) % H, INT64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, row, pv = at < L, index(at, INT64), index(tl.arange(0, BLOCK_PV), INT64)
    base = out_ptr + b * stride_out_b + h * stride_out_h
    out = load_rows(base, stride_out_l, stride_out_p, row, pv, inside, PV, True)  # [BLOCK, BLOCK_PV]
    base = dout_ptr + b * stride_dout_b + h * stride_dout_h
    dout = load_rows(base, stride_dout_l, stride_dout_p, row, pv, inside, PV, True)  # [BLOCK, BLOCK_PV]
    delta = tl.sum(out.to(acc_type) * dout.to(acc_type), axis=1)
    if dlse_ptr is not None:
        dlse = dlse_ptr + b * stride_dlse_b + h * stride_dlse_h + row * stride_dlse_l
        delta -= tl.load(dlse, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + b * stride_lse_b + h * stride_lse_h + row * stride_lse_l, mask=inside, other=0.0)
    lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    rows_ptr += tl.cast(tl.program_id(1), tl.int64) * L
    tl.store(rows_ptr + at, lse, mask=inside)
    tl.store(rows_ptr + tl.cast(size, tl.int64) + at, delta, mask=inside)


@triton.jit
def slopes(
    qk, dw, bias, lse, delta, allowed, scale, softcap, SILU: tl.constexpr, SOFTCAP: tl.constexpr, CAREFUL_: tl.constexpr
):  # fmt: skip
    """(weights, d of the score with its bias, d of the score before its cap) of a tile, either way round.

    Where it is not careful, a pair that is not allowed has weight 0 and may have a slope of 0 x NaN.
    """
    s, slope = scores(qk, bias, scale, softcap, 1.0 if SILU else LOG2E, SOFTCAP)
    if SILU:
        gate = sigmoid(s)
        w, ds = s * gate, dw * silu_slope(s, gate)
    else:
        if allowed is not None:
            s = tl.where(allowed, s, -float("inf"))
        w = tl.exp2(s - lse)
        ds = w * (dw - delta)
    if allowed is not None and (SILU or CAREFUL_):
        w, ds = tl.where(allowed, w, 0.0), tl.where(allowed, ds, 0.0)
    if SOFTCAP:
        return w, ds, tl.where(ds == 0, 0.0, ds * slope)
    else:
        return w, ds, ds


@triton.jit
def load_statistics(rows_ptr, size, at, inside):
    """(lse in base 2, delta) [X]"""
    lse = tl.load(rows_ptr + at, mask=inside, other=float("inf"))
    return lse, tl.load(rows_ptr + size + at, mask=inside, other=0.0)


# --- dq ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _dq_walk(
    acc, q, dout, lse, delta, at_q, keys, values, biases, tables, code_ptr, numbers_, b, h, runs_ptr, runs, ends,
    scale, softcap, MASK: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr,
    SILU: tl.constexpr, SOFTCAP: tl.constexpr, INT64: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_PV: tl.constexpr,
):  # fmt: skip
    key_ptr, stride_k_l, stride_k_p, Lk = keys
    value_ptr, stride_v_l, stride_v_p = values
    bias_ptr, stride_bias_q, stride_bias_k, Lq = biases
    p, pv = index(tl.arange(0, BLOCK_P), INT64), index(tl.arange(0, BLOCK_PV), INT64)
    for run in range(runs[0], runs[1]):
        first, end = tiles_of(runs_ptr, run, ends, KIND, STEP)
        for tile in tl.range(first, end, num_stages=1 if KIND == EVERY else None):
            at_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            in_k, column = at_k < Lk, index(at_k, INT64)
            k = load_rows(key_ptr, stride_k_l, stride_k_p, column, p, in_k, P, KIND != FULL)  # [BLOCK_K, BLOCK_P]
            v = load_rows(value_ptr, stride_v_l, stride_v_p, column, pv, in_k, PV, KIND != FULL)  # [BLOCK_K, BLOCK_PV]
            none = tl.zeros([q.shape[0], BLOCK_K], acc.dtype)
            qk, dw = dot(q, tl.trans(k), none), dot(dout, tl.trans(v), none)  # [BLOCK_Q, BLOCK_K]
            bias = bias_of(
                bias_ptr, stride_bias_q, stride_bias_k, tables, h, at_q[:, None], at_k[None, :], (at_q < Lq)[:, None],
                in_k[None, :], INT64,
            )  # fmt: skip
            allowed = None
            if KIND != FULL:
                allowed = MASK(code_ptr, numbers_, b, h, at_q[:, None], at_k[None, :]) & in_k[None, :]
            _, _, ds = slopes(
                qk, dw, bias, lse[:, None], delta[:, None], allowed, scale, softcap, SILU, SOFTCAP, KIND == EVERY
            )  # fmt: skip
            if KIND == EVERY:
                acc = careful_dot(ds.to(k.dtype), k, allowed, acc)
            else:
                acc = dot(ds.to(k.dtype), k, acc)
    return acc


@triton.jit
def _sparse_attention_dq_kernel(
    dq_ptr, dout_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, tables, code_ptr, ptr_ptr, runs_ptr, scalars_ptr,
    scale, softcap, norm, size, Hq, group, Lq, Lk, plan_tiles, plan_batches, plan_heads,
    stride_dq_b, stride_dq_h, stride_dq_l, stride_dq_p, stride_dout_b, stride_dout_h, stride_dout_l, stride_dout_p,
    stride_q_b, stride_q_h, stride_q_l, stride_q_p, stride_k_b, stride_k_h, stride_k_l, stride_k_p,
    stride_v_b, stride_v_h, stride_v_l, stride_v_p, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    PARAMS: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, SILU: tl.constexpr,
    SOFTCAP: tl.constexpr, INT64: tl.constexpr, STEP_Q: tl.constexpr, STEP_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // Hq, tl.program_id(1) % Hq
    batch, head, key_head = tl.cast(b, tl.int64), index(h, INT64), index(h // group, INT64)
    scale, softcap, norm = numbers(scalars_ptr, scale, softcap, norm)
    at_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q, row = at_q < Lq, index(at_q, INT64)
    p, pv = index(tl.arange(0, BLOCK_P), INT64), index(tl.arange(0, BLOCK_PV), INT64)
    base = q_ptr + batch * stride_q_b + head * stride_q_h
    q = load_rows(base, stride_q_l, stride_q_p, row, p, in_q, P, True)  # [BLOCK_Q, BLOCK_P]
    base = dout_ptr + batch * stride_dout_b + head * stride_dout_h
    dout = load_rows(base, stride_dout_l, stride_dout_p, row, pv, in_q, PV, True)  # [BLOCK_Q, BLOCK_PV]
    rows_ptr += tl.cast(tl.program_id(1), tl.int64) * Lq
    lse, delta = load_statistics(rows_ptr, tl.cast(size, tl.int64), at_q, in_q)
    keys = (k_ptr + batch * stride_k_b + key_head * stride_k_h, stride_k_l, stride_k_p, Lk)
    values = (v_ptr + batch * stride_v_b + key_head * stride_v_h, stride_v_l, stride_v_p)
    biases = (None, stride_bias_q, stride_bias_k, Lq)
    if bias_ptr is not None:
        biases = (bias_ptr + batch * stride_bias_b + head * stride_bias_h, stride_bias_q, stride_bias_k, Lq)
    numbers_ = PARAMS(code_ptr, program_of(code_ptr, h))
    runs = list_of(ptr_ptr, b, h, plan_batches, plan_heads, tile // STEP_Q, plan_tiles)
    ends = (Lk // BLOCK_K, tl.cdiv(Lk, BLOCK_K))
    none = tl.zeros([BLOCK_Q, BLOCK_P], rows_ptr.dtype.element_ty)
    acc = none
    for KIND in tl.static_range(0, 2):
        acc = _dq_walk(
            acc, q, dout, lse, delta, at_q, keys, values, biases, tables, code_ptr, numbers_, b, h, runs_ptr, runs,
            ends, scale, softcap, MASK, KIND, STEP_K, P, PV, SILU, SOFTCAP, INT64, BLOCK_K, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    if broken(acc, in_q[:, None]):
        acc = _dq_walk(
            none, q, dout, lse, delta, at_q, keys, values, biases, tables, code_ptr, numbers_, b, h, runs_ptr, runs,
            (0, tl.cdiv(Lk, CAREFUL)), scale, softcap, MASK, EVERY, STEP_K * BLOCK_K // CAREFUL, P, PV, SILU, SOFTCAP,
            INT64, CAREFUL, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    acc *= scale * norm if SILU else scale
    at = dq_ptr + batch * stride_dq_b + head * stride_dq_h + row[:, None] * stride_dq_l + p[None, :] * stride_dq_p
    tl.store(at, acc.to(dq_ptr.dtype.element_ty), mask=in_q[:, None] & (p[None, :] < P))


# --- launch -----------------------------------------------------------------------------------------------------------


def plan_rows(rows, dout, dlse, out, lse) -> Launch:
    B, H, L, PV = out.shape
    block_pv = padded(PV)
    block = max(16, 4096 // block_pv)
    args = dict(
        rows_ptr=rows, out_ptr=out, dout_ptr=dout, lse_ptr=lse, dlse_ptr=dlse, H=H, L=L, size=B * H * L,
        **strides("out", out, "bhlp"), **strides("dout", dout, "bhlp"), **strides("lse", lse, "bhl"),
        **strides("dlse", dlse, "bhl"), PV=PV, INT64=wide(out, dout, lse, dlse), BLOCK=block, BLOCK_PV=block_pv,
    )  # fmt: skip
    return Launch(_rows_kernel, (triton.cdiv(L, block), B * H), args, 4)


def default(kernel: str, q: torch.Tensor, v: torch.Tensor) -> dict:
    """The tile of "dq" or "dkv": (own rows, rows walked over), warps, stages."""
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.element_size() == 2 and width <= 128:
        # dkv at P = 128 with 64 queries a tile spills more than with 32.
        own, other, warps, stages = 128, 32 if kernel == "dkv" and width > 64 else 64, 8, 2
    elif q.element_size() == 2 or kernel == "dq" and q.element_size() == 4 and width <= 128:
        own, other, warps, stages = 64, 32, 8 if width > 128 else 4, 1
    else:
        own, other, warps, stages = 32, 32 if width <= 128 else 16, 4, 1
    names = ("BLOCK_Q", "BLOCK_K") if kernel == "dq" else ("BLOCK_K", "BLOCK_Q")
    return {names[0]: own, names[1]: other, "num_warps": warps, "num_stages": stages}


def plan_dq(dq, dout, rows, call: dict) -> Launch:
    """call: q, k, v, code, plan, bias, tables, scale, softcap, silu, norm, functions."""
    q, v, plan = call["q"], call["v"], call["plan"]
    blocks = blocks_of("sparse_attention_dq", q, v, plan, default("dq", q, v), call["tables"])
    args = common_args(**call, blocks=blocks, tensors=(dq, dout)) | dict(
        dq_ptr=dq, dout_ptr=dout, rows_ptr=rows, size=rows[0].numel(), ptr_ptr=plan.ptr, runs_ptr=plan.runs,
        plan_tiles=triton.cdiv(q.shape[2], plan.block[0]), **strides("dq", dq, "bhlp"), **strides("dout", dout, "bhlp"),
    )  # fmt: skip
    grid = (triton.cdiv(q.shape[2], blocks["BLOCK_Q"]), q.shape[0] * q.shape[1])
    return Launch(_sparse_attention_dq_kernel, grid, args, blocks["num_warps"], blocks["num_stages"])


def _spec(dtype: torch.dtype, options: str) -> Launch:
    call, lse = sample(dtype, options)
    del call["sinks"]
    return plan_dq(call["q"], call["q"], lse.new_empty(2, *lse.shape), call)


@compile_spec("sparse_attention_rows")
def _rows_spec(dtype: torch.dtype) -> Launch:
    call, lse = sample(dtype, "")
    return plan_rows(lse.new_empty(2, *lse.shape), call["q"], lse, call["q"], lse)


compile_spec("sparse_attention_dq")(lambda dtype: _spec(dtype, ""))
