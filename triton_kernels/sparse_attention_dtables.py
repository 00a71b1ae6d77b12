"""Attention over the tiles of a plan: the gradients of the small tables of bias_tables.py, without N x N memory.

A program owns one head and every S-th tile of queries, of all batches, walks their rows of the plan in order and adds
each tile's ds to its own partial tables in memory; the partial tables are summed in a fixed order afterwards. Nothing
is atomic: a gradient repeats bit for bit. S keeps programs near PROGRAMS and partial tables within MEMORY numbers.

Positions: where a row's distances run as its keys do, k_pos[k] - k the same for every key that it sees, as within a
sequence, the tile is written to a scratch of the program's own and read back with each row shifted by its distance, so
that equal distances are in one column: 32 x 32 stores, twice as many loads, two column sums, for up to 63 distances.

Buckets, and positions of any other kind: one masked sum over the tile for each entry from the least to the largest of
its pairs. Times apart by a ratio of 1.35 share HSTU's bucket, so a tile off the diagonal meets few; each costs about
32 x 32 x 3 operations. A tile of positions without order pays up to 2 R + 1 of them: correct, and slow.

The products are those of dbias. The loops are not pipelined: a load moved ahead could pass a store of the tile before.
Lost: tiles of 64 x 64 in half precision, which Triton 3.7.1 does not compile for sm_100 (a pass over tensor memory
fails on a sum of sums) and which spill on sm_90 (96 bytes of stack) and sm_80 (440).
"""

import torch
import triton
import triton.language as tl

from .bias_tables import REACH, bias_of, bucket_of, distance_of, entry_of
from .common import Launch, compile_spec, index, strides
from .sparse_attention import (
    EVERY,
    blocks_of,
    common_args,
    dot,
    list_of,
    load_rows,
    numbers,
    program_of,
    sample,
    tiles_of,
)  # fmt: skip
from .sparse_attention_dq import load_statistics, slopes

PROGRAMS = 1024
MEMORY = 2**22
DEFAULT = {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}
CHUNK: tl.constexpr = tl.constexpr(64)
FAR: tl.constexpr = tl.constexpr(2**30)  # farther than any two positions are apart


@triton.jit
def _add_by_entry(part_ptr, entry, ds, some):
    """part[entry] += ds of the pairs in `some`."""
    low = tl.min(tl.min(tl.where(some, entry, FAR), axis=1), axis=0)
    high = tl.max(tl.max(tl.where(some, entry, -1), axis=1), axis=0)
    lane = tl.arange(0, CHUNK)
    for base in range(low, high + 1, CHUNK):
        sums = tl.zeros([CHUNK], ds.dtype)
        for one in range(base, tl.minimum(base + CHUNK, high + 1)):
            total = tl.sum(tl.sum(tl.where(some & (entry == one), ds, 0.0), axis=1), axis=0)
            sums += tl.where(lane == one - base, total, 0.0)
        _add(part_ptr + base + lane, sums, base + lane <= high)


@triton.jit
def _add(pointers, sums, inside):
    """What another thread of the program stored before is seen."""
    tl.debug_barrier()
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + sums, mask=inside)


@triton.jit
def _add_by_distance(part_ptr, scratch_ptr, tables, distance, ds, some, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """part[clamp(distance, -R, R) + R] += ds of the pairs in `some`."""
    column, line = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_Q)[:, None] * BLOCK_K
    shift = distance - column
    low = tl.min(tl.where(some, shift, FAR), axis=1)
    high = tl.max(tl.where(some, shift, -FAR), axis=1)
    if tl.max(tl.where(high > low, 1, 0), axis=0) > 0:
        _add_by_entry(part_ptr, entry_of(tables, distance), ds, some)
    else:
        tl.store(scratch_ptr + line + column, tl.where(some, ds, 0.0))
        tl.debug_barrier()
        reach, lane, ends = tables[REACH], tl.arange(0, BLOCK_K), tl.arange(0, 2)
        first, last = tl.min(low, axis=0), tl.max(high, axis=0) + BLOCK_K
        for base in range(first, last, BLOCK_K):
            far = base + lane
            k = far[None, :] - low[:, None]  # beyond the tile for a row that sees nothing
            shifted = tl.load(scratch_ptr + line + k, mask=(k >= 0) & (k < BLOCK_K), other=0.0)
            sums = tl.sum(shifted, axis=0)
            inside = (far >= -reach) & (far <= reach)
            _add(part_ptr + far + reach, sums, inside)
            if (base < -reach) | (base + BLOCK_K > reach):
                below = tl.sum(tl.where(far < -reach, sums, 0.0), axis=0)
                above = tl.sum(tl.where(far > reach, sums, 0.0), axis=0)
                both = tl.where(ends == 0, below + tl.where(reach == 0, above, 0.0), above)
                _add(part_ptr + ends * (2 * reach), both, (ends == 0) | (reach > 0))


@triton.jit
def _sparse_attention_dtables_kernel(
    positions_ptr, times_ptr, scratch_ptr, dout_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, tables, code_ptr,
    ptr_ptr, runs_ptr, scalars_ptr, scale, softcap, norm, size, Hq, group, Lq, Lk, T, N, items, plan_tiles,
    plan_batches, plan_heads, stride_dout_b, stride_dout_h, stride_dout_l, stride_dout_p,
    stride_q_b, stride_q_h, stride_q_l, stride_q_p, stride_k_b, stride_k_h, stride_k_l, stride_k_p,
    stride_v_b, stride_v_h, stride_v_l, stride_v_p, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    PARAMS: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, SILU: tl.constexpr,
    SOFTCAP: tl.constexpr, INT64: tl.constexpr, STEP_Q: tl.constexpr, STEP_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    program = tl.cast(h * tl.num_programs(0) + tl.program_id(0), tl.int64)
    scratch_ptr += program * (BLOCK_Q * BLOCK_K)
    scale, softcap, norm = numbers(scalars_ptr, scale, softcap, norm)
    p, pv = index(tl.arange(0, BLOCK_P), INT64), index(tl.arange(0, BLOCK_PV), INT64)
    head, key_head = index(h, INT64), index(h // group, INT64)
    numbers_ = PARAMS(code_ptr, program_of(code_ptr, h))
    tiles, ends = tl.cdiv(Lq, BLOCK_Q), (0, tl.cdiv(Lk, BLOCK_K))
    none = tl.zeros([BLOCK_Q, BLOCK_K], rows_ptr.dtype.element_ty)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        b, tile = item // tiles, item % tiles
        batch = tl.cast(b, tl.int64)
        at_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        in_q, row = at_q < Lq, index(at_q, INT64)
        base = q_ptr + batch * stride_q_b + head * stride_q_h
        q = load_rows(base, stride_q_l, stride_q_p, row, p, in_q, P, True)  # [BLOCK_Q, BLOCK_P]
        base = dout_ptr + batch * stride_dout_b + head * stride_dout_h
        dout = load_rows(base, stride_dout_l, stride_dout_p, row, pv, in_q, PV, True)  # [BLOCK_Q, BLOCK_PV]
        lse, delta = load_statistics(rows_ptr + (batch * Hq + h) * Lq, tl.cast(size, tl.int64), at_q, in_q)
        biases = bias_ptr
        if bias_ptr is not None:
            biases += batch * stride_bias_b + head * stride_bias_h
        runs = list_of(ptr_ptr, b, h, plan_batches, plan_heads, tile // STEP_Q, plan_tiles)
        for run in range(runs[0], runs[1]):
            first, end = tiles_of(runs_ptr, run, ends, EVERY, STEP_K)
            for tile_k in range(first, end):
                at_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
                in_k, column = at_k < Lk, index(at_k, INT64)
                base = k_ptr + batch * stride_k_b + key_head * stride_k_h
                k = load_rows(base, stride_k_l, stride_k_p, column, p, in_k, P, True)  # [BLOCK_K, BLOCK_P]
                base = v_ptr + batch * stride_v_b + key_head * stride_v_h
                v = load_rows(base, stride_v_l, stride_v_p, column, pv, in_k, PV, True)  # [BLOCK_K, BLOCK_PV]
                qk, dw = dot(q, tl.trans(k), none), dot(dout, tl.trans(v), none)
                y, x, in_y, in_x = at_q[:, None], at_k[None, :], in_q[:, None], in_k[None, :]
                bias = bias_of(biases, stride_bias_q, stride_bias_k, tables, h, y, x, in_y, in_x, INT64)
                some = MASK(code_ptr, numbers_, b, h, y, x) & in_y & in_x
                _, ds, _ = slopes(qk, dw, bias, lse[:, None], delta[:, None], some, scale, softcap, SILU, SOFTCAP, True)
                if times_ptr is not None:
                    _add_by_entry(times_ptr + program * N, bucket_of(tables, y, x, in_y, in_x), ds, some)
                if positions_ptr is not None:
                    distance = distance_of(tables, y, x, in_y, in_x)
                    part = positions_ptr + program * T
                    _add_by_distance(part, scratch_ptr, tables, distance, ds, some, BLOCK_Q, BLOCK_K)


# --- launch -----------------------------------------------------------------------------------------------------------


def plan_dtables(positions, times, dout, rows, call: dict) -> Launch:
    """positions, times: (Hq, programs a head, entries), zeros, or None. call: as plan_dbias takes it."""
    q, v, plan = call["q"], call["v"], call["plan"]
    blocks = blocks_of("sparse_attention_dtables", q, v, plan, DEFAULT, call["tables"])
    slots = (positions if times is None else times).shape[1]
    sizes = {f"{name}": 0 if part is None else part.shape[2] for name, part in (("T", positions), ("N", times))}
    scratch = rows.new_empty(q.shape[1] * slots, blocks["BLOCK_Q"] * blocks["BLOCK_K"])
    args = common_args(**call, blocks=blocks, tensors=(dout,)) | dict(
        positions_ptr=positions, times_ptr=times, scratch_ptr=scratch, dout_ptr=dout, rows_ptr=rows,
        size=rows[0].numel(), ptr_ptr=plan.ptr, runs_ptr=plan.runs,
        items=q.shape[0] * triton.cdiv(q.shape[2], blocks["BLOCK_Q"]),
        plan_tiles=triton.cdiv(q.shape[2], plan.block[0]), **sizes, **strides("dout", dout, "bhlp"),
    )  # fmt: skip
    grid = (slots, q.shape[1])
    return Launch(_sparse_attention_dtables_kernel, grid, args, blocks["num_warps"], blocks["num_stages"])


def fill_dtables(dposition_table, dtime_table, dout, rows, call: dict) -> None:
    """Fills what is not None."""
    q, gradients = call["q"], (dposition_table, dtime_table)
    entries = sum(0 if gradient is None else gradient.shape[1] for gradient in gradients)
    tiles = q.shape[0] * triton.cdiv(q.shape[2], DEFAULT["BLOCK_Q"])
    most = min(PROGRAMS // q.shape[1], MEMORY // (q.shape[1] * entries), tiles)
    parts = [None if g is None else rows.new_zeros(q.shape[1], max(1, most), g.shape[1]) for g in gradients]
    plan_dtables(*parts, dout, rows, call).run()
    for gradient, part in zip(gradients, parts):
        if gradient is not None:
            sums = part.sum(1) if gradient.shape[0] > 1 else part.sum((0, 1))[None]
            gradient.copy_(sums * call["norm"] if call["silu"] else sums)


@compile_spec("sparse_attention_dtables")
def _spec(dtype: torch.dtype) -> Launch:
    call, lse = sample(dtype, "silu tables")
    del call["sinks"]
    parts = (lse.new_empty(8, 16, 2047), lse.new_empty(8, 16, 129))
    return plan_dtables(*parts, call["q"], lse.new_empty(2, *lse.shape), call)
