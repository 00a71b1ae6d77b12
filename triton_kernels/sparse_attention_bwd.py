"""Attention over the tiles of a plan: the backward kernels and their launcher.

Shape letters as in sparse_attention.py. With w the weights, dw = dout v^T and delta = sum(dout out) - dlse a row:

    softmax    ds = w (dw - delta)            silu    ds = norm silu'(s) dw

    dv = w^T dout    dq = scale (ds slope) k    dk = scale (ds slope)^T q    dbias = ds    slope: of the soft cap

How the work is split: `dq` by tiles of queries over the plan's rows; `dkv` by tiles of keys over its columns, and over
the query heads of the group inside the program; `dbias`, when asked for, by tiles of pairs, over the batches and heads
that share the bias inside the program. Each sum has one owner and a fixed order: nothing is atomic, and gradients
repeat bit for bit. The weights are recomputed from lse, once in dq and once in dkv: seven products, where one kernel
for all would take five but sum dq over key tiles through memory.

What bounds it on an H100/H200: a bf16 tile of 128 x 128 pairs takes 3 products in dq and 4 in dkv, 14 x 128 x 128 x P
flops together, 3,584 clocks of an SM at P = 64; its exponentials, twice 1,024 clocks, hide below that.

What stays in registers: dq's accumulator; in dkv those of dk and dv, and the tile as [BLOCK_K, BLOCK_Q], so that
weights and slopes are the left operands of their products without a transpose.

NaN and Inf are treated as in the forward, by careful passes, for dk and dv apart. A visible Inf may end as NaN.

Tried, by registers and stack on sm_90, bf16, nothing timed yet: slopes set to zero where a pair is masked keep its
predicates alive and spill; scores set to -Inf do not, and leave a slope of 0 x NaN to the careful pass. dkv at P = 128
spills 64 bytes with 64 queries in a tile, 16 with 32; these 16, and 24 at P = 64, lie outside the loops over tiles.

Memory beyond inputs and outputs: lse in base 2 and delta, 2 B Hq Lq floats.
"""

import torch
import triton
import triton.language as tl

from .bias_tables import bias_of, tables_of
from .common import Launch, compile_spec, index, strides
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
    program_of,
    sample,
    tiles_of,
)  # fmt: skip
from .sparse_attention_dbias import plan_dbias
from .sparse_attention_dtables import fill_dtables
from .sparse_attention_dq import default, load_statistics, plan_dq, plan_rows, slopes

EVERY_DV: tl.constexpr = tl.constexpr(3)  # a careful walk for dv; EVERY is one for dk: both accumulators would spill


@triton.jit
def _dkv_walk(
    acc_dk, acc_dv, k, v, at_k, queries, gradients, statistics, biases, tables, code_ptr, numbers_, b, h, runs_ptr,
    runs, ends, scale, softcap, MASK: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr,
    PV: tl.constexpr, SILU: tl.constexpr, SOFTCAP: tl.constexpr, INT64: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
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
            bias = bias_of(
                bias_ptr, stride_bias_q, stride_bias_k, tables, h, at_q[None, :], at_k[:, None], in_q[None, :],
                (at_k < Lk)[:, None], INT64,
            )  # fmt: skip
            allowed = None
            if KIND != FULL:
                # Queries beyond Lq have lse = Inf and are zeros: they add nothing, allowed or not, but to a key of NaN.
                allowed = MASK(code_ptr, numbers_, b, h, at_q[None, :], at_k[:, None])
                if KIND >= EVERY:
                    allowed = allowed & in_q[None, :]
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
    k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, tables, code_ptr, col_ptr_ptr, col_runs_ptr, scale, softcap,
    Hq, group, Lq, Lk, b, key_head, tile, plan_tiles, plan_batches, plan_heads, q_strides, dout_strides, bias_strides_,
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
                acc_dk, acc_dv, k, v, at_k, queries, gradients, statistics, biases, tables, code_ptr, numbers_, b,
                h, col_runs_ptr, runs, (whole, tl.cdiv(Lq, BLOCK_Q)), scale, softcap, MASK, KIND, STEP_Q, P, PV, SILU,
                SOFTCAP, INT64, BLOCK_Q, BLOCK_P, BLOCK_PV,
            )  # fmt: skip
    return acc_dk, acc_dv


@triton.jit
def _sparse_attention_dkv_kernel(
    dk_ptr, dv_ptr, dout_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, tables, code_ptr, col_ptr_ptr, col_runs_ptr,
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
        k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, tables, code_ptr, col_ptr_ptr, col_runs_ptr, scale,
        softcap, Hq, group, Lq, Lk, b, key_head, tile // STEP_K, plan_tiles, plan_batches, plan_heads, q_strides,
        dout_strides, bias_strides_, PARAMS, MASK, FULL, STEP_Q, P, PV, SILU, SOFTCAP, INT64, BLOCK_Q, BLOCK_P,
        BLOCK_PV,
    )  # fmt: skip
    if broken(acc_dk, in_k[:, None]):
        acc_dk, _ = _dkv_group(
            k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, tables, code_ptr, col_ptr_ptr, col_runs_ptr, scale,
            softcap, Hq, group, Lq, Lk, b, key_head, tile // STEP_K, plan_tiles, plan_batches, plan_heads, q_strides,
            dout_strides, bias_strides_, PARAMS, MASK, EVERY, STEP_Q * BLOCK_Q // CAREFUL, P, PV, SILU, SOFTCAP, INT64,
            CAREFUL, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    if broken(acc_dv, in_k[:, None]):
        _, acc_dv = _dkv_group(
            k, v, at_k, q_ptr, dout_ptr, rows_ptr, size, bias_ptr, tables, code_ptr, col_ptr_ptr, col_runs_ptr, scale,
            softcap, Hq, group, Lq, Lk, b, key_head, tile // STEP_K, plan_tiles, plan_batches, plan_heads, q_strides,
            dout_strides, bias_strides_, PARAMS, MASK, EVERY_DV, STEP_Q * BLOCK_Q // CAREFUL, P, PV, SILU, SOFTCAP,
            INT64, CAREFUL, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    if SILU:
        acc_dv *= norm
        scale *= norm
    at = dk_ptr + batch * stride_dk_b + head * stride_dk_h + row[:, None] * stride_dk_l + p[None, :] * stride_dk_p
    tl.store(at, (acc_dk * scale).to(dk_ptr.dtype.element_ty), mask=in_k[:, None] & (p[None, :] < P))
    at = dv_ptr + batch * stride_dv_b + head * stride_dv_h + row[:, None] * stride_dv_l + pv[None, :] * stride_dv_p
    tl.store(at, acc_dv.to(dv_ptr.dtype.element_ty), mask=in_k[:, None] & (pv[None, :] < PV))


# --- launch -----------------------------------------------------------------------------------------------------------


def plan_dkv(dk, dv, dout, rows, call: dict) -> Launch:
    q, k, v, plan = (call[name] for name in ("q", "k", "v", "plan"))
    blocks = blocks_of("sparse_attention_dkv", q, v, plan, default("dkv", q, v), call["tables"])
    args = common_args(**call, blocks=blocks, tensors=(dk, dv, dout)) | dict(
        dk_ptr=dk, dv_ptr=dv, dout_ptr=dout, rows_ptr=rows, size=rows[0].numel(), col_ptr_ptr=plan.col_ptr,
        col_runs_ptr=plan.col_runs, plan_tiles=triton.cdiv(k.shape[2], plan.block[1]), **strides("dk", dk, "bhlp"),
        **strides("dv", dv, "bhlp"), **strides("dout", dout, "bhlp"),
    )  # fmt: skip
    grid = (triton.cdiv(k.shape[2], blocks["BLOCK_K"]), k.shape[0] * k.shape[1])
    return Launch(_sparse_attention_dkv_kernel, grid, args, blocks["num_warps"], blocks["num_stages"])


def sparse_attention_bwd(
    dq, dk, dv, dbias, dsinks, dposition_table, dtime_table, dout, dlse, out, lse, q, k, v, code, plan, bias, sinks,
    position_table, q_pos, k_pos, time_table, q_time, k_time, edges, scale, softcap, silu, norm,
) -> None:  # fmt: skip
    """Fills dq, dk, dv, dbias, dsinks and the tables'; those that are None (dk and dv together) are left out."""
    rows = lse.new_empty(2, *lse.shape)
    plan_rows(rows, dout, dlse, out, lse).run()
    call = dict(
        q=q, k=k, v=v, code=code, plan=plan, bias=bias,
        tables=tables_of(position_table, q_pos, k_pos, time_table, q_time, k_time, edges), scale=scale,
        softcap=softcap, silu=silu, norm=norm, functions=functions_of(structures_of(code)),
    )  # fmt: skip
    if dq is not None:
        plan_dq(dq, dout, rows, call).run()
    if dk is not None:
        plan_dkv(dk, dv, dout, rows, call).run()
    if dbias is not None:
        plan_dbias(dbias, dout, rows, call).run()
    if dposition_table is not None or dtime_table is not None:
        fill_dtables(dposition_table, dtime_table, dout, rows, call)
    if dsinks is not None:
        weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()  # NaN where sink and lse are -Inf: no weight
        dsinks.copy_(-(weight.where(lse > -torch.inf, 0) * rows[1]).sum((0, 2)))


def _spec(dtype: torch.dtype, options: str) -> Launch:
    call, lse = sample(dtype, options)
    del call["sinks"]
    return plan_dkv(call["k"], call["k"], call["q"], lse.new_empty(2, *lse.shape), call)


for _options in ("", "silu tables"):
    compile_spec("_".join(["sparse_attention_dkv", *_options.split()]))(lambda dtype, o=_options: _spec(dtype, o))
