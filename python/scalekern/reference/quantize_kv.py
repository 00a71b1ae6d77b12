"""The oracle of quantize_kv and quantize_kv_update: rounding in float32 whatever the dtypes, so that all agree.

Shape letters: B batch, H key heads, T new tokens, S slots of a cache, P channels, G groups of channels.
"""

import torch
import torch.nn.functional as F

from scalekern.quant.kv import QuantizedKV, pack


def factor(bits, symmetric, scale_dtype):
    """What a group's range, or largest magnitude, is multiplied by for the size of a step.

    A little above 1 / (number of steps): the scale, once rounded to its dtype, still spans the range.
    """
    steps = (1 << bits - 1) - 1 if symmetric else (1 << bits) - 1
    return (1 + torch.finfo(scale_dtype).eps) / steps


def quantize_rows(x, bits, group_size, symmetric, scale_dtype):
    """(data (..., bytes), scales (..., G), offsets (..., G) or None) of x (..., P)."""
    P, x = x.shape[-1], x.float()
    split = lambda x, beyond: F.pad(x, (0, -P % group_size), value=beyond).unflatten(-1, (-1, group_size))  # noqa: E731
    low, high = split(x, float("inf")).amin(-1), split(x, float("-inf")).amax(-1)  # (..., G)
    span = torch.maximum(-low, high) if symmetric else high - low
    span = torch.where(span < float("inf"), span, float("nan"))
    scales = (span * factor(bits, symmetric, scale_dtype)).to(scale_dtype)
    half = 1 << bits - 1
    offsets = None if symmetric else (low + half * scales.float()).to(scale_dtype)
    groups = split(x, 0.0)
    centred = groups if symmetric else groups - offsets.float()[..., None]
    codes = (centred / scales.float()[..., None]).nan_to_num(0.0, half, -half).round()
    codes = codes.clamp(1 - half if symmetric else -half, half - 1).to(torch.int8).flatten(-2)[..., :P]
    return pack(codes, bits).contiguous(), scales, offsets


def quantize_kv(x, *, bits=8, group_size=None, symmetric=False, scale_dtype=torch.float16):
    group_size = x.shape[-1] if group_size is None else group_size
    parts = quantize_rows(x, bits, group_size, symmetric, scale_dtype)
    return QuantizedKV(*parts, bits, x.shape[-1], group_size)


def quantize_kv_update(
    cache, x, lengths, *, sink=0, circular=False, head_offsets=None, block_table=None, starts=None
):  # fmt: skip
    """Token by token, head by head, the oldest first."""
    options = dict(bits=cache.bits, group_size=cache.group_size, symmetric=cache.offsets is None)
    new = quantize_kv(x.detach(), scale_dtype=cache.scales.dtype, **options)
    B, H, T, _ = x.shape
    for b, n in enumerate(lengths.tolist()):
        for h in range(H):
            base = 0 if head_offsets is None else int(head_offsets[h])
            base = base if starts is None else int(starts[b])
            end = cache.shape[-2] if head_offsets is None else int(head_offsets[h + 1])
            slots = end - base if block_table is None else block_table.shape[1] * cache.shape[2]
            for t in range(max(T - n, 0), T):
                slot = n - T + t
                if circular and slot >= sink:
                    if slots <= sink:
                        continue
                    slot = sink + (slot - sink) % (slots - sink)
                if slot >= slots:
                    if circular or lengths.device.type != "cpu":
                        continue
                    expected = f"at most {slots}, the slots of a head"
                    raise ValueError(f"quantize_kv_update: lengths must be {expected}, got {n}")
                lead = (b, h, base + slot) if head_offsets is None else (b, base + slot)
                if block_table is not None:
                    lead = int(block_table[b, slot // cache.shape[2]]), h, slot % cache.shape[2]
                for part, values in cache.tensors().items():
                    values[lead] = getattr(new, part)[b, h, t].to(values.dtype)
    return cache


def quantize_kv_op(x, bits, group_size, symmetric, scale_dtype):
    """The registered op's arguments; offsets of no elements where there are none."""
    data, scales, offsets = quantize_rows(x, bits, group_size, symmetric, scale_dtype)
    return data, scales, scales.new_empty(0) if symmetric else offsets


def quantize_kv_update_op(
    data, scales, offsets, x, lengths, head_offsets, block_table, starts, sink, circular, bits, group_size
):  # fmt: skip
    cache = QuantizedKV(data, scales, offsets, bits, x.shape[-1], group_size)
    layout = dict(head_offsets=head_offsets, block_table=block_table, starts=starts)
    quantize_kv_update(cache, x, lengths, sink=sink, circular=circular, **layout)
