"""Attention of a few queries over a cache, split over the keys and merged.

Shape letters: B batch, Hq query heads, Hkv key heads, T new tokens, R rows (a group's query heads x T), P, Pv head
dims.

Not measured on a GPU yet.

What bounds it on an H100/H200: HBM bytes of the cache; 4 R flops a pair of numbers read, 2 bytes each in half
precision, stay below the matrix units' rate up to some hundred rows. Codes of 8 or 4 bits are 1 or 1/2 byte.

Codes become numbers in registers: a byte's two halves are interleaved along the channels, where the compiler keeps both
in one thread. With one scale a key, keys stay codes, which half precision holds exactly, and the scale meets the score:
q (s c + o) = s (q c) + o sum(q). Values are rounded to q's dtype, as a float cache's are.

How the work is split: the keys that some row of a key head sees make a list (the first ones, then the newest), cut into
splits; a program takes one split of one head and batch row for up to 64 rows of the group, so that a key is read once.
How many splits a head gets follows its budget: the list of (head, split) is flattened and no program starts for keys
that no budget reaches. Budgets that are on the GPU cannot be read without a synchronization: then every head gets
splits for the whole cache and divides what it finds among them. A second kernel adds the splits of a row in their
order.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl

from .. import _env, _kept
from .common import LN2, LOG2E, Launch, compile_spec, index, meta, strides, wide
from .host_math import cdiv, next_power_of_2
from .tuning import config

INTERPRETED: tl.constexpr = tl.constexpr(_env.triton_interpret())
PROCESSORS = 132  # of an H100: how many programs are worth starting is no matter of a few more


@triton.jit
def _operand(x, TYPE: tl.constexpr):
    """Numbers that were codes, or weights by their scales, as an operand of a product."""
    if TYPE == tl.float64:  # DMMA has no layout of narrower loads: a sum of one term ends the search for one
        return tl.sum(x.to(TYPE)[:, :, None], axis=2)
    else:
        return x.to(TYPE)


@triton.jit
def _product(a, b, real: tl.constexpr):
    """a b, exactly summed; the interpreter would multiply bfloat16 as the integers that it holds."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(_operand(a, a.dtype), b, input_precision="ieee", out_dtype=real)


@triton.jit
def _codes(ptr, at, p, in_n, in_p, stride_p, BITS: tl.constexpr):
    """Rows of codes [N, P] as signed int8. p: channels, or for 4 bits bytes."""
    byte = tl.load(ptr + at[:, None] + p[None, :] * stride_p, mask=in_n[:, None] & in_p[None, :], other=0)
    if BITS == 4:
        return tl.interleave((byte << 4) >> 4, byte >> 4)
    else:
        # The same again: as they are the compiler would load them into the layout of an operand, byte by byte.
        even, odd = tl.split(tl.reshape(byte, [byte.shape[0], byte.shape[1] // 2, 2]))
        return tl.interleave(even, odd)


@triton.jit
def _bytes(P: tl.constexpr, BITS: tl.constexpr, BLOCK_P: tl.constexpr, INT64: tl.constexpr):
    """The bytes that hold P channels, and which of them are there."""
    byte = index(tl.arange(0, BLOCK_P * BITS // 8), INT64)
    return byte, byte < (P * BITS + 7) // 8


@triton.jit
def _row_offsets(lead, g, slot, stride_b, stride_h, stride_s):
    return lead * stride_b + g * stride_h + slot * stride_s


@triton.jit
def _dequantized(codes, scales_ptr, at_scales, stride_g, offsets_ptr, at_offsets, stride_offsets_g, in_n, p, in_p,
                 P: tl.constexpr, GROUP_SIZE: tl.constexpr, real: tl.constexpr):  # fmt: skip
    """scale * code + offset [N, P] in float32 (float64); 0 behind the last channel."""
    N: tl.constexpr = codes.shape[0]
    # Pointers as many as scales: as many as numbers were 64 loads a thread, and 254 registers where 93 to 128 do.
    if GROUP_SIZE >= P:
        x = codes.to(real) * tl.load(scales_ptr + at_scales, mask=in_n, other=0.0).to(real)[:, None]
        if offsets_ptr is not None:
            x += tl.load(offsets_ptr + at_offsets, mask=in_n, other=0.0).to(real)[:, None]
    elif GROUP_SIZE & (GROUP_SIZE - 1) == 0:
        G: tl.constexpr = codes.shape[1] // GROUP_SIZE
        g = tl.arange(0, G)
        inside = in_n[:, None] & (g * GROUP_SIZE < P)[None, :]  # [N, G]
        at = at_scales[:, None] + (g * stride_g)[None, :]
        x = tl.reshape(codes.to(real), [N, G, GROUP_SIZE])
        x *= tl.load(scales_ptr + at, mask=inside, other=0.0).to(real)[:, :, None]
        if offsets_ptr is not None:
            at = at_offsets[:, None] + (g * stride_offsets_g)[None, :]
            x += tl.load(offsets_ptr + at, mask=inside, other=0.0).to(real)[:, :, None]
        x = tl.reshape(x, [N, G * GROUP_SIZE])
    else:
        inside = in_n[:, None] & in_p[None, :]
        g = (p // GROUP_SIZE)[None, :]
        x = codes.to(real) * tl.load(scales_ptr + at_scales[:, None] + g * stride_g, mask=inside, other=0.0).to(real)
        if offsets_ptr is not None:
            x += tl.load(offsets_ptr + at_offsets[:, None] + g * stride_offsets_g, mask=inside, other=0.0).to(real)
    return x if P == codes.shape[1] else tl.where(in_p[None, :], x, 0.0)


@triton.jit
def _sparse_attention_decode_kernel(
    acc_ptr, state_ptr, q_ptr, k_ptr, v_ptr, k_scales_ptr, k_offsets_ptr, v_scales_ptr, v_offsets_ptr, lengths_ptr,
    budgets_ptr, offsets_ptr, starts_ptr, table_ptr,
    plan_ptr, scale, softcap, sink, slots, splits_of_all, rows_of_all,
    stride_q_b, stride_q_h, stride_q_t, stride_q_p, stride_k_b, stride_k_h, stride_k_s, stride_k_p,
    stride_v_b, stride_v_h, stride_v_s, stride_v_p,
    stride_k_scales_b, stride_k_scales_h, stride_k_scales_s, stride_k_scales_p,
    stride_k_offsets_b, stride_k_offsets_h, stride_k_offsets_s, stride_k_offsets_p,
    stride_v_scales_b, stride_v_scales_h, stride_v_scales_s, stride_v_scales_p,
    stride_v_offsets_b, stride_v_offsets_h, stride_v_offsets_s, stride_v_offsets_p,
    stride_lengths_b, stride_budgets_h, stride_offsets_h,
    stride_starts_b, stride_table_b, stride_table_j,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, P: tl.constexpr, PV: tl.constexpr,
    PAGE: tl.constexpr, CIRCULAR: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = acc_ptr.dtype.element_ty
    item, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    g = tl.load(plan_ptr + KEY_HEADS + 1 + 2 * item)
    split = tl.load(plan_ptr + KEY_HEADS + 2 + 2 * item)
    first = tl.load(plan_ptr + g)
    splits = tl.load(plan_ptr + g + 1) - first
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = r < GROUP * T
    h = g * GROUP + r // T

    # the list of keys: [0, head) and [low, n), positions in ascending order
    n = tl.maximum(tl.load(lengths_ptr + b * stride_lengths_b), 0).to(tl.int32)
    base, capacity = 0, slots
    if offsets_ptr is not None:
        base = tl.load(offsets_ptr + g * stride_offsets_h).to(tl.int32)
        capacity = tl.load(offsets_ptr + (g + 1) * stride_offsets_h).to(tl.int32) - base
    if starts_ptr is not None:
        base = tl.load(starts_ptr + b * stride_starts_b).to(tl.int32)
        capacity -= base
    if not CIRCULAR:
        n = tl.minimum(n, capacity)
    head = tl.minimum(tl.minimum(n, capacity), sink)
    low = head
    if CIRCULAR:
        ring = tl.maximum(capacity - sink, 0)
        low = tl.maximum(low, n - ring)
    own = n - T + r % T  # [BLOCK_R], each row's position
    window = tl.full([BLOCK_R], 2**30, tl.int32)
    if budgets_ptr is not None:
        all_h = g * GROUP + tl.arange(0, triton.next_power_of_2(GROUP))
        in_h = tl.arange(0, triton.next_power_of_2(GROUP)) < GROUP
        reach = tl.max(tl.load(budgets_ptr + all_h * stride_budgets_h, mask=in_h, other=0), 0).to(tl.int32)
        low = tl.maximum(low, n - T - tl.maximum(reach - sink, 0) + 1)
        window = tl.maximum(tl.load(budgets_ptr + h * stride_budgets_h, mask=in_r, other=0).to(tl.int32) - sink, 0)
    low = tl.minimum(low, n)
    count = head + n - low
    each = tl.cdiv(tl.cdiv(count, splits), BLOCK_N) * BLOCK_N
    begin = split * each
    end = tl.minimum(begin + each, count)
    # from where to where every row sees every key
    clear_from = tl.max(tl.where(in_r, own - window + 1, 0), 0) - low + head
    clear_to = n - T + 1 - low + head

    p, pv = index(tl.arange(0, BLOCK_P), INT64), index(tl.arange(0, BLOCK_PV), INT64)
    in_p, in_pv = p < P, pv < PV
    at_q = q_ptr + b * stride_q_b + index(h, INT64) * stride_q_h + index(r % T, INT64) * stride_q_t
    q = tl.load(at_q[:, None] + p[None, :] * stride_q_p, mask=in_r[:, None] & in_p[None, :], other=0.0)  # [BLOCK_R, P]
    k_ptr += index(g, INT64) * stride_k_h
    v_ptr += index(g, INT64) * stride_v_h
    if PAGE == 0:
        k_ptr += b * stride_k_b
        v_ptr += b * stride_v_b
    if K_BITS > 0:
        k_byte, in_k_byte = _bytes(P, K_BITS, BLOCK_P, INT64)
        k_folds: tl.constexpr = K_GROUP >= P
        q_sum = tl.sum(q.to(real), 1)  # [BLOCK_R]
    if V_BITS > 0:
        v_byte, in_v_byte = _bytes(PV, V_BITS, BLOCK_PV, INT64)
    most = tl.full([BLOCK_R], float("-inf"), real)
    total = tl.zeros([BLOCK_R], real)
    acc = tl.zeros([BLOCK_R, BLOCK_PV], real)
    for start in range(begin, end, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        in_n = i < end
        position = tl.where(i < head, i, low + i - head)
        slot = position
        if CIRCULAR:
            slot = tl.where(position < sink, position, sink + (position - sink) % tl.maximum(ring, 1))
        lead = b
        if PAGE > 0:
            at_page = table_ptr + b * stride_table_b + index(slot // PAGE, INT64) * stride_table_j
            lead = tl.load(at_page, mask=in_n, other=0).to(tl.int64)
            slot = index(slot % PAGE, INT64)
            at_k = lead * stride_k_b + slot * stride_k_s
            at_v = lead * stride_v_b + slot * stride_v_s
        else:
            slot = index(base + slot, INT64)
            at_k = slot * stride_k_s
            at_v = slot * stride_v_s
        if K_BITS > 0:
            codes = _codes(k_ptr, at_k, k_byte, in_n, in_k_byte, stride_k_p, K_BITS)  # [BLOCK_N, BLOCK_P]
            at_scale = _row_offsets(lead, g, slot, stride_k_scales_b, stride_k_scales_h, stride_k_scales_s)
            at_offset = _row_offsets(lead, g, slot, stride_k_offsets_b, stride_k_offsets_h, stride_k_offsets_s)
            if k_folds:
                s = _product(q, tl.trans(_operand(codes.to(real), q.dtype)), real)
                s *= tl.load(k_scales_ptr + at_scale, mask=in_n, other=0.0).to(real)[None, :]
                if k_offsets_ptr is not None:
                    offset = tl.load(k_offsets_ptr + at_offset, mask=in_n, other=0.0).to(real)
                    s += q_sum[:, None] * offset[None, :]
            else:
                k = _dequantized(codes, k_scales_ptr, at_scale, stride_k_scales_p, k_offsets_ptr, at_offset,
                                 stride_k_offsets_p, in_n, p, in_p, P, K_GROUP, real)
                s = _product(q, tl.trans(_operand(k, q.dtype)), real)
            s *= scale
        else:
            k = tl.load(k_ptr + at_k[None, :] + p[:, None] * stride_k_p, mask=in_n[None, :] & in_p[:, None], other=0.0)
            s = _product(q, k, real) * scale  # [BLOCK_R, BLOCK_N]
        if SOFTCAP:
            s = softcap * (1 - 2 / (1 + tl.exp(2 * (s / softcap))))
        seen = (position[None, :] <= own[:, None]) & in_n[None, :] & in_r[:, None]
        seen &= (i < head)[None, :] | (position[None, :] > (own - window)[:, None])
        s = tl.where(seen, s * LOG2E, float("-inf"))
        found = tl.maximum(most, tl.max(s, 1))
        shift = tl.where(found == float("-inf"), 0.0, found)
        fade = tl.exp2(most - shift)
        weights = tl.exp2(s - shift[:, None])
        most, total = found, total * fade + tl.sum(weights, 1)
        if V_BITS > 0:
            codes = _codes(v_ptr, at_v, v_byte, in_n, in_v_byte, stride_v_p, V_BITS)  # [BLOCK_N, BLOCK_PV]
            at_scale = _row_offsets(lead, g, slot, stride_v_scales_b, stride_v_scales_h, stride_v_scales_s)
            at_offset = _row_offsets(lead, g, slot, stride_v_offsets_b, stride_v_offsets_h, stride_v_offsets_s)
            v = _dequantized(codes, v_scales_ptr, at_scale, stride_v_scales_p, v_offsets_ptr, at_offset,
                             stride_v_offsets_p, in_n, pv, in_pv, PV, V_GROUP, real)
            v = _operand(v, q.dtype)
        else:
            inside = in_n[:, None] & in_pv[None, :]
            v = tl.load(v_ptr + at_v[:, None] + pv[None, :] * stride_v_p, mask=inside, other=0.0)
        acc = acc * fade[:, None]
        if EVEN:
            acc += _product(weights.to(v.dtype), v, real)
        elif (start >= clear_from) & (tl.minimum(start + BLOCK_N, end) <= clear_to):
            acc += _product(weights.to(v.dtype), v, real)
        else:
            # A row's weight of a key that it does not see is 0, and 0 NaN would be NaN: what is not finite goes to
            # the rows that see it alone.
            finite = v.to(real) * 0 == 0
            sound = _product(weights.to(v.dtype), tl.where(finite, v, 0.0).to(v.dtype), real)
            every = _product(weights.to(v.dtype), v, real)
            touched = _product(seen.to(v.dtype), tl.where(finite, 0.0, 1.0).to(v.dtype), real)
            acc += tl.where(touched > 0, every, sound)
    row = ((b * splits_of_all + first + split) * rows_of_all + r).to(tl.int64)
    tl.store(state_ptr + 2 * row, most, mask=in_r)
    tl.store(state_ptr + 2 * row + 1, total, mask=in_r)
    tl.store(acc_ptr + row[:, None] * PV + pv[None, :], acc, mask=in_r[:, None] & in_pv[None, :])


@triton.jit
def _sparse_attention_decode_merge_kernel(
    out_ptr, lse_ptr, acc_ptr, state_ptr, sinks_ptr, plan_ptr, splits_of_all, rows_of_all, stride_out_b, stride_out_h,
    stride_out_t, stride_out_p, stride_lse_b, stride_lse_h, stride_lse_t, stride_sinks_h,
    GROUP: tl.constexpr, T: tl.constexpr, PV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """One row; its splits BLOCK_S at a time, twice: first for the maximum."""
    real: tl.constexpr = acc_ptr.dtype.element_ty
    b, h, t = tl.cast(tl.program_id(1), tl.int64), tl.program_id(0) // T, tl.program_id(0) % T
    first, last = tl.load(plan_ptr + h // GROUP), tl.load(plan_ptr + h // GROUP + 1)
    pv = tl.arange(0, BLOCK_PV)
    most = tl.full([], float("-inf"), real)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h * stride_sinks_h).to(real) * LOG2E
        most = sink
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        row = (b * splits_of_all + s) * rows_of_all + h % GROUP * T + t
        most = tl.maximum(most, tl.max(tl.load(state_ptr + 2 * row, mask=s < last, other=float("-inf")), 0))
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros([], real)
    if sinks_ptr is not None:
        total = tl.exp2(sink - shift)
    acc = tl.zeros([BLOCK_PV], real)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        row = (b * splits_of_all + s) * rows_of_all + h % GROUP * T + t
        in_s = s < last
        part = tl.load(state_ptr + 2 * row + 1, mask=in_s, other=0.0)  # [BLOCK_S]
        weight = tl.where(part == 0, 0.0, tl.exp2(tl.load(state_ptr + 2 * row, mask=in_s, other=0.0) - shift))
        total += tl.sum(weight * part, 0)
        at = acc_ptr + row[:, None] * PV + pv[None, :]
        value = tl.load(at, mask=in_s[:, None] & (pv < PV)[None, :], other=0.0)  # [BLOCK_S, BLOCK_PV]
        acc += tl.sum(weight[:, None] * value, 0)
    acc = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
    lse = tl.where(total == 0, float("-inf"), (most + tl.log2(tl.where(total == 0, 1.0, total))) * LN2)
    lse = tl.where(most == float("inf"), float("nan"), lse)  # as the output
    at_out = out_ptr + b * stride_out_b + h.to(tl.int64) * stride_out_h + t * stride_out_t + pv * stride_out_p
    tl.store(at_out, acc.to(out_ptr.dtype.element_ty), mask=pv < PV)
    tl.store(lse_ptr + b * stride_lse_b + h.to(tl.int64) * stride_lse_h + t * stride_lse_t, lse)


@functools.cache  # without an end: CUDA graphs go on reading what they were made with
def _work(splits: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32: where each head's splits begin, Hkv + 1 numbers; then (head, split) of each program."""
    begins = [0, *itertools.accumulate(splits)]
    pairs = [number for g, count in enumerate(splits) for j in range(count) for number in (g, j)]
    return _integers((*begins, *pairs), device)


@functools.cache
def _integers(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _kept.made(lambda: torch.tensor(values, dtype=torch.int32, device=device), device)


def _splits(batch, key_heads, group, tokens, slots, sink, budgets, chunk) -> tuple[int, ...]:
    """How many splits each key head gets: by the most keys that it can see, at least `chunk` keys each."""
    most = [slots] * key_heads
    if budgets is not None:
        reach = [max(budgets[g * group : (g + 1) * group]) for g in range(key_heads)]
        most = [min(slots, max(sink, b) + tokens - 1) for b in reach]
    chunk = max(chunk, batch * sum(most) // (4 * PROCESSORS))
    return tuple(max(1, cdiv(m, chunk)) for m in most)


def plan_sparse_attention_decode(
    out, lse, q, k_cache, v_cache, lengths, budgets, head_offsets, block_table, starts, sinks, k_scales, k_offsets,
    v_scales, v_offsets, sink, circular, scale, softcap, k_bits, k_group, v_bits, v_group, value_dim,
):  # fmt: skip
    """The two launches, from shapes, strides, dtypes and the budgets that are on the CPU.

    EVEN: all rows of a group see the same keys, so that none has to be kept from what another one sees.
    """
    batch, heads, tokens, dim = q.shape
    paged, ragged = block_table is not None, head_offsets is not None
    key_heads = head_offsets.shape[0] - 1 if ragged else k_cache.shape[1]
    group, page = heads // key_heads, k_cache.shape[2] if paged else 0
    rows = group * tokens
    slots = block_table.shape[1] * page if paged else k_cache.shape[-2]
    block_pv = max(next_power_of_2(value_dim), 16)
    block_p = max(next_power_of_2(dim), 16)
    row = max(block_p, block_pv) * q.element_size()  # bytes: three stages of two blocks of rows have to fit
    # Without matrix units (float32) a thread holds its part of the products' operands: 4 warps spill 352 bytes.
    default = {"BLOCK_N": 64 if row <= 256 else 32 if row <= 1024 else 16, "CHUNK": 128, "num_warps": 4}
    if row > 256:
        default["num_warps"] = 8
    # Groups that no power of two counts have a pointer a number: 4 warps spill 752 bytes.
    groups = (k_bits, k_group, dim), (v_bits, v_group, value_dim)
    if any(bits and size < channels and size & (size - 1) for bits, size, channels in groups):
        default |= {"BLOCK_N": max(default["BLOCK_N"] // 2, 16), "num_warps": 8}
    key = f"{str(q.dtype)[6:]}-P{block_p}-R{next_power_of_2(rows)}"
    blocks = config("sparse_attention_decode", key, q.device, default)
    known = None
    if budgets is not None and budgets.device.type == "cpu":
        known = tuple(budgets.tolist())
        budgets = _integers(known, q.device)
    splits = _splits(batch, key_heads, group, tokens, slots, sink, known, blocks["CHUNK"])
    alike = known is not None and all(known[h] == known[h // group * group] for h in range(heads))
    same = budgets is None or group == 1 or alike
    work, count = _work(splits, q.device), sum(splits)
    real = lse.dtype
    acc = torch.empty(batch, count, rows, value_dim, dtype=real, device=q.device)
    state = torch.empty(batch, count, rows, 2, dtype=real, device=q.device)
    cache_axes = "bsp" if ragged else "bhsp"
    parts = {
        "k": k_cache, "v": v_cache, "k_scales": k_scales, "k_offsets": k_offsets, "v_scales": v_scales,
        "v_offsets": v_offsets,
    }  # fmt: skip
    steps = {key: step for name, x in parts.items() for key, step in strides(name, x, cache_axes).items()}
    steps |= {f"stride_{name}_h": 0 for name in parts} if ragged else {}
    block_r = min(max(next_power_of_2(rows), 16), 64 if row <= 512 else 16)
    args = dict(
        acc_ptr=acc, state_ptr=state, q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, k_scales_ptr=k_scales,
        k_offsets_ptr=k_offsets, v_scales_ptr=v_scales, v_offsets_ptr=v_offsets, lengths_ptr=lengths,
        budgets_ptr=budgets,
        offsets_ptr=head_offsets, starts_ptr=starts, table_ptr=block_table, plan_ptr=work,
        scale=float(scale), softcap=float(softcap), sink=sink, slots=slots, splits_of_all=count, rows_of_all=rows,
        **strides("q", q, "bhtp"), **steps, **strides("lengths", lengths, "b"), **strides("budgets", budgets, "h"),
        **strides("offsets", head_offsets, "h"), **strides("starts", starts, "b"),
        **strides("table", block_table, "bj"), KEY_HEADS=key_heads, GROUP=group, T=tokens, P=dim, PV=value_dim,
        PAGE=page, CIRCULAR=bool(circular), SOFTCAP=softcap != 0, EVEN=tokens == 1 and same,
        K_BITS=k_bits, K_GROUP=k_group, V_BITS=v_bits, V_GROUP=v_group,
        INT64=wide(q, k_cache, v_cache, block_table), BLOCK_R=block_r, BLOCK_N=blocks["BLOCK_N"], BLOCK_P=block_p,
        BLOCK_PV=block_pv,
    )  # fmt: skip
    grid = (count, batch, cdiv(rows, block_r))
    merge = dict(
        out_ptr=out, lse_ptr=lse, acc_ptr=acc, state_ptr=state, sinks_ptr=sinks, plan_ptr=work, splits_of_all=count,
        rows_of_all=rows, **strides("out", out, "bhtp"), **strides("lse", lse, "bht"), **strides("sinks", sinks, "h"),
        GROUP=group, T=tokens, PV=value_dim, BLOCK_S=16, BLOCK_PV=block_pv,
    )  # fmt: skip
    return (
        Launch(_sparse_attention_decode_kernel, grid, args, blocks["num_warps"]),
        Launch(_sparse_attention_decode_merge_kernel, (heads * tokens, batch), merge, 2),
    )


def sparse_attention_decode(*args):
    """fill(out, lse, *op arguments)"""
    for launch in plan_sparse_attention_decode(*args):
        launch.run()


def _spec(
    dtype, part, *, tokens=1, paged=False, ragged=False, padded=False, budgets=False, softcap=0.0, bits=0, group=128
):  # fmt: skip
    real = torch.float64 if dtype == torch.float64 else torch.float32
    batch, heads, key_heads, dim = 8, 32, 8, 128
    q = meta(batch, heads, tokens, dim, dtype=dtype)
    lead = (512, key_heads, 64) if paged else (batch, 8192) if ragged else (batch, key_heads, 8192)
    cache = meta(*lead, dim * bits // 8, dtype=torch.int8) if bits else meta(*lead, dim, dtype=dtype)
    scales = meta(*lead, dim // group, dtype=torch.float16) if bits else None
    integers = lambda *shape: meta(*shape, dtype=torch.int32)
    args = (
        q, meta(batch, heads, tokens, dtype=real), q, cache, cache, integers(batch),
        integers(heads) if budgets else None, integers(key_heads + 1) if ragged else None,
        integers(batch, 64) if paged else None, integers(batch) if padded else None,
        meta(heads, dtype=real) if part else None, *[scales] * 4, 4, ragged, dim**-0.5, softcap,
        bits, group, bits, group, dim,
    )  # fmt: skip
    return plan_sparse_attention_decode(*args)[part]


compile_spec("sparse_attention_decode")(functools.partial(_spec, part=0))
compile_spec("sparse_attention_decode_merge")(functools.partial(_spec, part=1))
compile_spec("sparse_attention_decode_paged")(functools.partial(_spec, part=0, tokens=4, paged=True, softcap=30.0))
compile_spec("sparse_attention_decode_ragged")(functools.partial(_spec, part=0, ragged=True, budgets=True))
compile_spec("sparse_attention_decode_int8")(functools.partial(_spec, part=0, bits=8))
compile_spec("sparse_attention_decode_int4")(functools.partial(_spec, part=0, bits=4))
compile_spec("sparse_attention_decode_int4_groups")(functools.partial(_spec, part=0, bits=4, group=32, paged=True))
compile_spec("sparse_attention_decode_float64_int8")(lambda dtype: _spec(torch.float64, 0, bits=8))
