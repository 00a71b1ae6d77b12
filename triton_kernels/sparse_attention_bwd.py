"""Attention over the tiles of a plan: the backward kernels and their launcher.

Shape letters as in sparse_attention.py. With w the weights, dw = dout v^T and delta = sum(dout out) - dlse a row:

    softmax    ds = w (dw - delta)            silu    ds = norm silu'(s) dw

    dv = w^T dout    dq = scale (ds slope) k    dk = scale (ds slope)^T q    dbias = ds    slope: of the soft cap

How the work is split: `dq` by tiles of queries over the plan's rows; `dkv` by tiles of keys over its columns, and over
the query heads of the group inside the program; `dbias`, when asked for, by tiles of pairs, over the batches and heads
that share the bias inside the program. Each sum has one owner and a fixed order: nothing is atomic, and gradients
repeat bit for bit. The weights are recomputed from lse, once in dq and once in dkv: five products of the forward's
two, and two more for not sharing them, which costs less than summing dq over key tiles through memory.

What bounds it on an H100/H200: a bf16 tile of 128 x 128 pairs takes 3 products in dq and 4 in dkv, 14 x 128 x 128 x P
flops together, 3,584 clocks of an SM at P = 64; its exponentials, twice 1,024 clocks, hide below that.

What stays in registers: dq's accumulator; in dkv those of dk and dv, and the tile as [BLOCK_K, BLOCK_Q], so that
weights and slopes are the left operands of their products without a transpose.

NaN and Inf are treated as in the forward, by a careful pass; there a visible Inf among queries or keys may end as NaN.

Memory beyond inputs and outputs: lse in base 2 and delta, 2 B Hq Lq floats.
"""

import torch
import triton
import triton.language as tl

from .common import LOG2E, Launch, compile_spec, index, sigmoid, silu_slope, strides, wide
from .mask_device import functions_of, structures_of
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


EVERY_DV: tl.constexpr = tl.constexpr(3)  # a careful walk for dv; EVERY is one for dk: both accumulators would spill


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
    acc, q, dout, lse, delta, at_q, keys, values, biases, code_ptr, numbers_, b, h, runs_ptr, runs, ends, scale, softcap,
    MASK: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, SILU: tl.constexpr,
    SOFTCAP: tl.constexpr, INT64: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
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
            bias, allowed = None, None
            if bias_ptr is not None:
                pointers = bias_ptr + index(at_q, INT64)[:, None] * stride_bias_q + column[None, :] * stride_bias_k
                bias = tl.load(pointers, mask=(at_q < Lq)[:, None] & in_k[None, :], other=0.0)
            if KIND != FULL:
                allowed = MASK(code_ptr, numbers_, b, h, at_q[:, None], at_k[None, :]) & in_k[None, :]
            _, _, ds = slopes(qk, dw, bias, lse[:, None], delta[:, None], allowed, scale, softcap, SILU, SOFTCAP, KIND == EVERY)
            if KIND == EVERY:
                acc = careful_dot(ds.to(k.dtype), k, allowed, acc)
            else:
                acc = dot(ds.to(k.dtype), k, acc)
    return acc


@triton.jit
def _sparse_attention_dq_kernel(
    dq_ptr, dout_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, code_ptr, ptr_ptr, runs_ptr, scalars_ptr,
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
            acc, q, dout, lse, delta, at_q, keys, values, biases, code_ptr, numbers_, b, h, runs_ptr, runs, ends, scale,
            softcap, MASK, KIND, STEP_K, P, PV, SILU, SOFTCAP, INT64, BLOCK_K, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    if broken(acc, in_q[:, None]):
        acc = _dq_walk(
            none, q, dout, lse, delta, at_q, keys, values, biases, code_ptr, numbers_, b, h, runs_ptr, runs,
            (0, tl.cdiv(Lk, CAREFUL)), scale, softcap, MASK, EVERY, STEP_K * BLOCK_K // CAREFUL, P, PV, SILU, SOFTCAP,
            INT64, CAREFUL, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    acc *= scale * norm if SILU else scale
    at = dq_ptr + batch * stride_dq_b + head * stride_dq_h + row[:, None] * stride_dq_l + p[None, :] * stride_dq_p
    tl.store(at, acc.to(dq_ptr.dtype.element_ty), mask=in_q[:, None] & (p[None, :] < P))


# --- dk and dv --------------------------------------------------------------------------------------------------------


@triton.jit
def _dkv_walk(
    acc_dk, acc_dv, k, v, at_k, queries, gradients, statistics, biases, code_ptr, numbers_, b, h, runs_ptr, runs, ends,
    scale, softcap, MASK: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr,
    SILU: tl.constexpr, SOFTCAP: tl.constexpr, INT64: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_PV: tl.constexpr,
):  # fmt: skip
    query_ptr, stride_q_l, stride_q_p, Lq = queries
    dout_ptr, stride_dout_l, stride_dout_p = gradients
    rows_ptr, size = statistics
    bias_ptr, stride_bias_q, stride_bias_k, Lk = biases
    p, pv = index(tl.arange(0, BLOCK_P), INT64), index(tl.arange(0, BLOCK_PV), INT64)
    for run in range(runs[0], runs[1]):
        first, end = tiles_of(runs_ptr, run, ends, KIND, STEP)
        for tile in tl.range(first, end, num_stages=1 if KIND >= EVERY else None):
            at_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            in_q, row = at_q < Lq, index(at_q, INT64)
            q = load_rows(query_ptr, stride_q_l, stride_q_p, row, p, in_q, P, KIND != FULL)  # [BLOCK_Q, BLOCK_P]
            dout = load_rows(dout_ptr, stride_dout_l, stride_dout_p, row, pv, in_q, PV, KIND != FULL)
            lse, delta = load_statistics(rows_ptr, size, at_q, in_q)
            none = tl.zeros([k.shape[0], BLOCK_Q], acc_dk.dtype)
            kq, dw = dot(k, tl.trans(q), none), dot(v, tl.trans(dout), none)  # [BLOCK_K, BLOCK_Q]
            bias, allowed = None, None
            if bias_ptr is not None:
                pointers = bias_ptr + row[None, :] * stride_bias_q + index(at_k, INT64)[:, None] * stride_bias_k
                bias = tl.load(pointers, mask=in_q[None, :] & (at_k < Lk)[:, None], other=0.0)
            if KIND != FULL:
                # Queries beyond Lq have lse = Inf and are zeros: they add nothing, allowed or not.
                allowed = MASK(code_ptr, numbers_, b, h, at_q[None, :], at_k[:, None])
            w, _, ds = slopes(
                kq, dw, bias, lse[None, :], delta[None, :], allowed, scale, softcap, SILU, SOFTCAP, KIND >= EVERY
            )  # fmt: skip
            if KIND == EVERY:
                acc_dk = careful_dot(ds.to(q.dtype), q, allowed, acc_dk)
            elif KIND == EVERY_DV:
                acc_dv = careful_dot(w.to(dout.dtype), dout, allowed, acc_dv)
            else:
                acc_dv = dot(w.to(dout.dtype), dout, acc_dv)
                acc_dk = dot(ds.to(q.dtype), q, acc_dk)
    return acc_dk, acc_dv


@triton.jit
def _dkv_group(
    k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, code_ptr, col_ptr_ptr, col_runs_ptr, scale, softcap, Hq,
    group, Lq, Lk, b, key_head, tile, plan_tiles, plan_batches, plan_heads, q_strides, dout_strides, bias_strides_,
    PARAMS: tl.constexpr, MASK: tl.constexpr, PASS: tl.constexpr, STEP_Q: tl.constexpr, P: tl.constexpr,
    PV: tl.constexpr, SILU: tl.constexpr, SOFTCAP: tl.constexpr, INT64: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """(dk, dv) [BLOCK_K, ..] of a tile of keys, over the group's heads. PASS: FULL, or a careful one for dk or dv."""
    acc_dk = tl.zeros([k.shape[0], BLOCK_P], rows_ptr.dtype.element_ty)
    acc_dv = tl.zeros([k.shape[0], BLOCK_PV], rows_ptr.dtype.element_ty)
    batch = tl.cast(b, tl.int64)
    whole = 0 if PASS >= EVERY else Lq // BLOCK_Q
    for member in range(group):
        h = key_head * group + member
        head = index(h, INT64)
        queries = (q_ptr + batch * q_strides[0] + head * q_strides[1], q_strides[2], q_strides[3], Lq)
        gradients = (dout_ptr + batch * dout_strides[0] + head * dout_strides[1], dout_strides[2], dout_strides[3])
        statistics = (rows_ptr + (batch * Hq + h) * Lq, tl.cast(size, tl.int64))
        biases = (None, bias_strides_[2], bias_strides_[3], Lk)
        if bias_ptr is not None:
            bias = bias_ptr + batch * bias_strides_[0] + head * bias_strides_[1]
            biases = (bias, bias_strides_[2], bias_strides_[3], Lk)
        numbers_ = PARAMS(code_ptr, program_of(code_ptr, h))
        runs = list_of(col_ptr_ptr, b, h, plan_batches, plan_heads, tile, plan_tiles)
        for KIND in tl.static_range(PASS, PASS + 1 if PASS >= EVERY else 2):
            acc_dk, acc_dv = _dkv_walk(
                acc_dk, acc_dv, k, v, at_k, queries, gradients, statistics, biases, code_ptr, numbers_, b, h,
                col_runs_ptr, runs, (whole, tl.cdiv(Lq, BLOCK_Q)), scale, softcap, MASK, KIND, STEP_Q, P, PV, SILU,
                SOFTCAP, INT64, BLOCK_Q, BLOCK_P, BLOCK_PV,
            )  # fmt: skip
    return acc_dk, acc_dv


@triton.jit
def _sparse_attention_dkv_kernel(
    dk_ptr, dv_ptr, dout_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, code_ptr, col_ptr_ptr, col_runs_ptr,
    scalars_ptr, scale, softcap, norm, size, Hq, group, Lq, Lk, plan_tiles, plan_batches, plan_heads,
    stride_dk_b, stride_dk_h, stride_dk_l, stride_dk_p, stride_dv_b, stride_dv_h, stride_dv_l, stride_dv_p,
    stride_dout_b, stride_dout_h, stride_dout_l, stride_dout_p,
    stride_q_b, stride_q_h, stride_q_l, stride_q_p, stride_k_b, stride_k_h, stride_k_l, stride_k_p,
    stride_v_b, stride_v_h, stride_v_l, stride_v_p, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    PARAMS: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, SILU: tl.constexpr,
    SOFTCAP: tl.constexpr, INT64: tl.constexpr, STEP_Q: tl.constexpr, STEP_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    tile, Hkv = tl.program_id(0), Hq // group
    b, key_head = tl.program_id(1) // Hkv, tl.program_id(1) % Hkv
    batch, head = tl.cast(b, tl.int64), index(key_head, INT64)
    scale, softcap, norm = numbers(scalars_ptr, scale, softcap, norm)
    at_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k, row = at_k < Lk, index(at_k, INT64)
    p, pv = index(tl.arange(0, BLOCK_P), INT64), index(tl.arange(0, BLOCK_PV), INT64)
    base = k_ptr + batch * stride_k_b + head * stride_k_h
    k = load_rows(base, stride_k_l, stride_k_p, row, p, in_k, P, True)  # [BLOCK_K, BLOCK_P]
    base = v_ptr + batch * stride_v_b + head * stride_v_h
    v = load_rows(base, stride_v_l, stride_v_p, row, pv, in_k, PV, True)  # [BLOCK_K, BLOCK_PV]
    q_strides = (stride_q_b, stride_q_h, stride_q_l, stride_q_p)
    dout_strides = (stride_dout_b, stride_dout_h, stride_dout_l, stride_dout_p)
    bias_strides_ = (stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k)
    acc_dk, acc_dv = _dkv_group(
        k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, code_ptr, col_ptr_ptr, col_runs_ptr, scale, softcap,
        Hq, group, Lq, Lk, b, key_head, tile // STEP_K, plan_tiles, plan_batches, plan_heads, q_strides, dout_strides,
        bias_strides_, PARAMS, MASK, FULL, STEP_Q, P, PV, SILU, SOFTCAP, INT64, BLOCK_Q, BLOCK_P, BLOCK_PV,
    )  # fmt: skip
    if broken(acc_dk, in_k[:, None]):
        acc_dk, _ = _dkv_group(
            k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, code_ptr, col_ptr_ptr, col_runs_ptr, scale,
            softcap, Hq, group, Lq, Lk, b, key_head, tile // STEP_K, plan_tiles, plan_batches, plan_heads, q_strides,
            dout_strides, bias_strides_, PARAMS, MASK, EVERY, STEP_Q * BLOCK_Q // CAREFUL, P, PV, SILU, SOFTCAP, INT64,
            CAREFUL, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    if broken(acc_dv, in_k[:, None]):
        _, acc_dv = _dkv_group(
            k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, code_ptr, col_ptr_ptr, col_runs_ptr, scale,
            softcap, Hq, group, Lq, Lk, b, key_head, tile // STEP_K, plan_tiles, plan_batches, plan_heads, q_strides,
            dout_strides, bias_strides_, PARAMS, MASK, EVERY_DV, STEP_Q * BLOCK_Q // CAREFUL, P, PV, SILU, SOFTCAP, INT64,
            CAREFUL, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    if SILU:
        acc_dv *= norm
        scale *= norm
    at = dk_ptr + batch * stride_dk_b + head * stride_dk_h + row[:, None] * stride_dk_l + p[None, :] * stride_dk_p
    tl.store(at, (acc_dk * scale).to(dk_ptr.dtype.element_ty), mask=in_k[:, None] & (p[None, :] < P))
    at = dv_ptr + batch * stride_dv_b + head * stride_dv_h + row[:, None] * stride_dv_l + pv[None, :] * stride_dv_p
    tl.store(at, acc_dv.to(dv_ptr.dtype.element_ty), mask=in_k[:, None] & (pv[None, :] < PV))


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


def _default(kernel: str, q: torch.Tensor, v: torch.Tensor) -> dict:
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    own, other, warps, stages = (128, 64, 8, 2) if q.element_size() == 2 else (64, 32, 4, 1)
    if width > 128 or q.element_size() == 8:
        own, other, warps, stages = (64, 32, 8, 1) if q.element_size() == 2 else (32, 16, 4, 1)
    own, other = ("Q", own), ("K", other)
    if kernel == "dkv":
        own, other = ("K", own[1]), ("Q", other[1])
    return {f"BLOCK_{own[0]}": own[1], f"BLOCK_{other[0]}": other[1], "num_warps": warps, "num_stages": stages}


def plan_dq(dq, dout, rows, call: dict) -> Launch:
    """call: q, k, v, code, plan, bias, scale, softcap, silu, norm, functions."""
    q, v, plan = call["q"], call["v"], call["plan"]
    blocks = blocks_of("sparse_attention_dq", q, v, plan, _default("dq", q, v))
    args = common_args(**call, blocks=blocks, tensors=(dq, dout)) | dict(
        dq_ptr=dq, dout_ptr=dout, rows_ptr=rows, size=rows[0].numel(), ptr_ptr=plan.ptr, runs_ptr=plan.runs,
        plan_tiles=triton.cdiv(q.shape[2], plan.block[0]), **strides("dq", dq, "bhlp"), **strides("dout", dout, "bhlp"),
    )  # fmt: skip
    grid = (triton.cdiv(q.shape[2], blocks["BLOCK_Q"]), q.shape[0] * q.shape[1])
    return Launch(_sparse_attention_dq_kernel, grid, args, blocks["num_warps"], blocks["num_stages"])


def plan_dkv(dk, dv, dout, rows, call: dict) -> Launch:
    q, k, v, plan = (call[name] for name in ("q", "k", "v", "plan"))
    blocks = blocks_of("sparse_attention_dkv", q, v, plan, _default("dkv", q, v))
    args = common_args(**call, blocks=blocks, tensors=(dk, dv, dout)) | dict(
        dk_ptr=dk, dv_ptr=dv, dout_ptr=dout, rows_ptr=rows, size=rows[0].numel(), col_ptr_ptr=plan.col_ptr,
        col_runs_ptr=plan.col_runs, plan_tiles=triton.cdiv(k.shape[2], plan.block[1]), **strides("dk", dk, "bhlp"),
        **strides("dv", dv, "bhlp"), **strides("dout", dout, "bhlp"),
    )  # fmt: skip
    grid = (triton.cdiv(k.shape[2], blocks["BLOCK_K"]), k.shape[0] * k.shape[1])
    return Launch(_sparse_attention_dkv_kernel, grid, args, blocks["num_warps"], blocks["num_stages"])


def sparse_attention_bwd(
    dq, dk, dv, dbias, dsinks, dout, dlse, out, lse, q, k, v, code, plan, bias, sinks, scale, softcap, silu, norm
) -> None:  # fmt: skip
    """Fills dq, dk, dv, dbias and dsinks; those that are None (dk and dv together) are left out."""
    from .sparse_attention_dbias import plan_dbias

    rows = lse.new_empty(2, *lse.shape)
    plan_rows(rows, dout, dlse, out, lse).run()
    call = dict(
        q=q, k=k, v=v, code=code, plan=plan, bias=bias, scale=scale, softcap=softcap, silu=silu, norm=norm,
        functions=functions_of(structures_of(code)),
    )  # fmt: skip
    if dq is not None:
        plan_dq(dq, dout, rows, call).run()
    if dk is not None:
        plan_dkv(dk, dv, dout, rows, call).run()
    if dbias is not None:
        plan_dbias(dbias, dout, rows, call).run()
    if dsinks is not None:
        weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()  # NaN where sink and lse are -Inf: no weight
        dsinks.copy_(-(weight.where(lse > -torch.inf, 0) * rows[1]).sum((0, 2)))


def _spec(dtype: torch.dtype, options: str, kernel: str) -> Launch:
    call, lse = sample(dtype, options)
    del call["sinks"]
    q, k, rows = call["q"], call["k"], lse.new_empty(2, *lse.shape)
    if kernel == "rows":
        return plan_rows(rows, q, lse, q, lse)
    return plan_dq(q, q, rows, call) if kernel == "dq" else plan_dkv(k, k, q, rows, call)


for _options, _kernel in (
    ("", "rows"), ("", "dq"), ("d128", "dq"), ("silu", "dq"), ("d128 bias softcap", "dq"), ("wide", "dq"),
    ("", "dkv"), ("d128", "dkv"), ("odd", "dkv"), ("silu", "dkv"), ("d128 bias softcap heads", "dkv"), ("wide", "dkv"),
):  # fmt: skip
    _name = "_".join([f"sparse_attention_{_kernel}", *_options.split()])
    compile_spec(_name)(lambda dtype, o=_options, k=_kernel: _spec(dtype, o, k))
