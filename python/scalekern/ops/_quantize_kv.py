"""quantize_kv_update out of torch's ops, for the CPU: all tokens rounded at once, then written where their slots are.

Picking the tokens that have a slot reads the mask back: on a GPU that would be a synchronization.
"""

import torch

from scalekern.quant.kv import QuantizedKV
from scalekern.reference.quantize_kv import quantize_rows


def update(
    data, scales, offsets, x, lengths, head_offsets, block_table, starts, sink, circular, bits, group_size
):  # fmt: skip
    cache = QuantizedKV(data, scales, offsets, bits, x.shape[-1], group_size)
    (B, H, T, _), n = x.shape, lengths.long()[:, None, None]
    slot = n - T + torch.arange(T)  # (B, 1, T), of a token: at first its position
    written = slot >= 0
    base, slots = torch.zeros(1, 1, 1).long(), torch.full((1, 1, 1), data.shape[-2])
    if head_offsets is not None:
        base, slots = (t.long()[:, None] for t in (head_offsets[:-1], head_offsets.diff()))
    elif block_table is not None:
        slots = slots * block_table.shape[1]
    elif starts is not None:
        base = starts.long()[:, None, None]
        slots = slots - base
    if circular:
        ring = (slots - sink).clamp(min=0)
        written = written & ((slot < sink) | (slot >= n - ring))  # of tokens that share a slot, the newest
        slot = torch.where(slot < sink, slot, sink + (slot - sink) % ring.clamp(min=1))
    elif (n > slots).any():
        b, h, _ = (n > slots).nonzero()[0].tolist()
        most = int(slots.expand(B, H if head_offsets is not None else 1, 1)[b, h])
        raise ValueError(f"quantize_kv_update: lengths must be at most {most}, the slots of a head, got {int(n[b])}")
    written = (written & (slot < slots)).expand(B, H, T)
    b, h, t = written.nonzero(as_tuple=True)
    slot = (slot + base).expand(B, H, T)[b, h, t]
    lead = (b, slot) if head_offsets is not None else (b, h, slot)
    if block_table is not None:
        page = data.shape[-2]
        lead = block_table.long()[b, slot // page], h, slot % page
        if ((lead[0] < 0) | (lead[0] >= data.shape[0])).any():
            raise ValueError(f"quantize_kv_update: block_table must name pages below {data.shape[0]} for new tokens")
    new = quantize_rows(x[b, h, t], bits, group_size, offsets is None, scales.dtype)
    for values, made in zip((data, scales, offsets), new):
        if values is not None:
            values[lead] = made
