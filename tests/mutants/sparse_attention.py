"""Defects of attention under masks."""

import torch
from mutants.defects import flipped, given, halved, ignored, nibbles_swapped, output, shifted, state, swapped, zeroed

FORWARD = {
    "sparse_attention_fwd": {
        "two heads swapped": output(0, swapped(1)),
        "last row not computed": output(0, zeroed(2, -1)),
        "last row of a tile not computed": output(0, zeroed(2, 63)),
        "first row of a tile not computed": output(0, zeroed(2, 64)),
        "last channel not computed": output(0, zeroed(3, -1)),
        "lse of another head": output(1, swapped(1)),
        "two keys swapped": given(k=swapped(2)),
        "last key not read": given(v=zeroed(2, -1)),
        "key heads in another order": given(v=swapped(1)),
        **ignored("bias", "sinks", "position_table"),
        "distances turned round": given(q_pos=lambda at: -at),
        "cap left out": given(softcap=lambda c: 0.0 if c else 1e-2),
        **flipped("silu"),
    },
    "sparse_attention_decode": {
        "two heads swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "last channel not computed": output(0, zeroed(3, -1)),
        "lse of another head": output(1, swapped(1)),
        "newest token not seen": given(lengths=lambda n: n - 1),
        "two rows' lengths swapped": given(lengths=swapped(0)),
        "budgets of other heads": given(budgets=swapped(0)),
        "windows one too long": given(budgets=lambda b: b + 1),
        "two pages swapped": given(block_table=swapped(1)),
        "two rows' starts swapped": given(starts=swapped(0)),
        **ignored("starts"),
        "first token of the sink forgotten": given(sink=lambda n: n - 1 if n else 1),
        "cap left out": given(softcap=lambda c: 0.0 if c else 1e-2),
        **ignored("sinks"),
        "slots off by one": given(k_cache=shifted(-2)),
        "offsets of keys left out": given(k_offsets=torch.zeros_like),
        "offsets of values left out": given(v_offsets=torch.zeros_like),
        "scales of keys of the next slot": given(k_scales=shifted(-2)),
        "scales of values of the next slot": given(v_scales=shifted(-2)),
        "scales of values of another group": given(v_scales=shifted(-1)),
        "offsets of values of another head": given(v_offsets=swapped(1)),
        "two channels of a byte swapped": given(k_cache=nibbles_swapped),
        "codes of values taken for unsigned": given(v_cache=lambda x: x & 127 if x.dtype == torch.int8 else x.abs()),
    },
    "quantize_kv": {
        "last channel not rounded": output(0, zeroed(-1, -1)),
        "two channels of a byte swapped": output(0, nibbles_swapped),
        "scales of another group": output(1, shifted(-1)),
        "offsets not written": output(2, torch.zeros_like),
        "one group": given(group_size=lambda n: n + 1),
        "a range of one step less": given(x=lambda x: x * 1.02),
        **flipped("symmetric"),
    },
    "quantize_kv_update": {
        "newest token not written": given(lengths=lambda n: n - 1),
        "tokens in the order of the batch": given(x=swapped(0)),
        "heads swapped": given(x=swapped(1)),
        "starts ignored": given(starts=torch.zeros_like),
        "first token of the sink overwritten": given(sink=lambda n: n - 1 if n else 0),
        "two pages swapped": given(block_table=lambda table: table[:, [0, 2, 1, *range(3, table.shape[1])]]),
        "scales left as they were": state("scales", lambda before, after: before),
        "offsets left as they were": state("offsets", lambda before, after: before),
    },
    "merge_attention_fwd": {
        "two parts swapped": given(lses=swapped(0)),
        "last part dropped": given(outs=zeroed(0, -1)),
        "lse of another row": output(1, swapped(0)),
    },
}

GRADIENTS = {
    "sparse_attention_bwd": {
        "two heads of dq swapped": output(0, swapped(1)),
        "last row of dq not computed": output(0, zeroed(2, -1)),
        "half of dk's terms lost": output(1, halved),
        "last row of a tile of dk not computed": output(1, zeroed(2, 63)),
        "last row of dv not computed": output(2, zeroed(2, -1)),
        "half of dbias's terms lost": output(3, halved),
        "half of dsinks's terms lost": output(4, halved),
        "half of dposition_table's terms lost": output(5, halved),
        **ignored("position_table"),
        **ignored("dlse", "bias"),
        "slope of the cap left out": given(softcap=lambda c: c * 1e3),
        **flipped("silu"),
    },
    "merge_attention_bwd": {
        "two parts of douts swapped": output(0, swapped(0)),
        "half of dlses' terms lost": output(1, halved),
        **ignored("dlse"),
    },
}

# What hstu_attention's samples alone reach.
HSTU_FORWARD = {
    "sparse_attention_fwd": {
        **ignored("time_table"),
        "time tables of other heads": given(time_table=swapped(0)),
        "buckets shifted": given(time_table=shifted(1)),
        "times of the next key": given(k_time=shifted(0)),
        "times of the next query": given(q_time=shifted(0)),
        "norm left out": given(norm=lambda n: 1.0),
    },
}

HSTU_GRADIENTS = {
    "sparse_attention_bwd": {
        **ignored("time_table"),
        "dtime_table not computed": output(6, torch.zeros_like),
        "half of dtime_table's terms lost": output(6, halved),
        "buckets of dtime_table shifted": output(6, shifted(1)),
        "two heads of dtime_table swapped": output(6, swapped(0)),
        "last bucket of dtime_table not computed": output(6, zeroed(1, -1)),
    },
}
