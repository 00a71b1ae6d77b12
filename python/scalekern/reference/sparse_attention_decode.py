"""The oracle of decoding over a cache: for every slot the position that it holds, then attention under a dense mask.

Shape letters: B batch, Hq query heads, Hkv key heads, T new tokens, S slots of a cache, P head dim, Pv of the values.
"""

import torch

from scalekern.quant.kv import QuantizedKV
from scalekern.reference.sparse_attention import attend


def sparse_attention_decode(
    q, k_cache, v_cache, lengths, *, budgets=None, sink=0, circular=False, head_offsets=None, block_table=None,
    starts=None, scale=None, softcap=None, sinks=None, return_lse=False,
):  # fmt: skip
    k, v = (x.dequantize(q.dtype) if isinstance(x, QuantizedKV) else x for x in (k_cache, v_cache))
    out, lse = decode(
        q, k, v, lengths, budgets, head_offsets, block_table, starts, sinks, sink, circular, scale, softcap or 0.0
    )
    return (out, lse) if return_lse else out


def sparse_attention_decode_op(
    q, k_cache, v_cache, lengths, budgets, head_offsets, block_table, starts, sinks, k_scales, k_offsets, v_scales,
    v_offsets, sink, circular, scale, softcap, k_bits, k_group, v_bits, v_group, value_dim,
):  # fmt: skip
    if k_bits:
        k_cache = QuantizedKV(k_cache, k_scales, k_offsets, k_bits, q.shape[-1], k_group).dequantize(q.dtype)
    if v_bits:
        v_cache = QuantizedKV(v_cache, v_scales, v_offsets, v_bits, value_dim, v_group).dequantize(q.dtype)
    return decode(
        q, k_cache, v_cache, lengths, budgets, head_offsets, block_table, starts, sinks, sink, circular, scale, softcap
    )


def decode(
    q, k_cache, v_cache, lengths, budgets, head_offsets, block_table, starts, sinks, sink, circular, scale, softcap
):  # fmt: skip
    slots, capacity = slots_of(k_cache, head_offsets, block_table)
    k, v = rows_of(k_cache, slots, block_table), rows_of(v_cache, slots, block_table)
    check_lengths(lengths, capacity, circular, starts)
    held = positions(lengths, capacity.to(q.device), k.shape[2], sink, circular)  # (B, Hkv, S)
    if starts is not None:
        held = (torch.arange(k.shape[2], device=q.device) - starts.long()[:, None, None]).expand(held.shape)
        held = torch.where(held < lengths[:, None, None], held, -1)
    held = held[:, :, None]
    tokens = q.shape[2]
    own = (lengths.long()[:, None] - tokens + torch.arange(tokens, device=q.device))[:, None, :, None]
    visible = ((held >= 0) & (held <= own)).repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    if budgets is not None:
        if budgets.device.type == "cpu" and (budgets < sink).any():
            got = int(budgets.min())
            raise ValueError(f"sparse_attention_decode: budgets must be at least {sink}, the sinks, got {got}")
        window = (budgets.to(q.device).long() - sink).clamp(min=0)[:, None, None]
        held = held.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
        visible = visible & ((held < sink) | (held > own - window))
    return attend(q, k, v, visible, None, sinks, scale, softcap, False, 1.0)


def slots_of(cache, head_offsets, block_table):
    """(where each key head's slots lie in a ragged cache or None, how many there are: (Hkv,) on the CPU)"""
    if block_table is not None:
        pages, heads, page, _ = cache.shape
        return None, torch.full((heads,), block_table.shape[1] * page if pages else 0)
    if head_offsets is None:
        return None, torch.full((cache.shape[1],), cache.shape[2])
    offsets = head_offsets.cpu().long()
    capacity = offsets.diff()
    most = int(capacity.max()) if len(capacity) and cache.shape[1] else 0
    index = torch.minimum(torch.arange(most), capacity[:, None] - 1) + offsets[:-1, None]
    return index.clamp(0, max(cache.shape[1] - 1, 0)), capacity


def rows_of(cache, slots, block_table):
    """(B, Hkv, slots, channels) of a contiguous, ragged or paged cache."""
    if slots is not None:
        return cache[:, slots.to(cache.device)]
    if block_table is None:
        return cache
    pages = block_table.long().clamp(0, max(cache.shape[0] - 1, 0))[:, : block_table.shape[1] if cache.shape[0] else 0]
    return cache[pages].transpose(1, 2).flatten(2, 3)


def positions(lengths, capacity, slots, sink, circular):
    """(B, Hkv, slots): the position that a slot holds, -1: none."""
    n, capacity = lengths.long()[:, None, None], capacity[:, None]
    slot = torch.arange(slots, device=lengths.device)
    held = slot
    if circular:  # the newest position of those that share the slot
        newest = n - 1 - (n - 1 - slot) % (capacity - sink).clamp(min=1)
        held = torch.where(slot < sink, slot, torch.where(newest < sink, -1, newest))
    return torch.where((slot < capacity) & (held < n), held, -1)


def check_lengths(lengths, capacity, circular, starts):
    """On a GPU this would be a synchronization."""
    if circular or lengths.device.type != "cpu" or lengths.numel() == 0 or capacity.numel() == 0:
        return
    slots = capacity.min().expand(lengths.shape)
    if starts is not None:
        outside = (starts < 0) | (starts > slots)
        if outside.any():
            got = int(starts[outside][0])
            raise ValueError(f"sparse_attention_decode: starts must be from 0 to {int(slots[0])}, got {got}")
        slots = slots - starts
    for most, length in zip(slots.tolist(), lengths.tolist()):
        if length > most:
            raise ValueError(
                f"sparse_attention_decode: lengths must be at most {most}, the slots of a head, got {length}"
            )
