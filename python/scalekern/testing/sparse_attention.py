"""Sample inputs of the sparse_attention family.

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, Pv of the values.
"""

import torch

from scalekern import masks
from scalekern.testing import Sample, Spec


def _attention(B, Hq, Lq, P, mask=None, *, Hkv=None, Lk=None, Pv=None, bias=None, options="", **plain):
    """bias: its first two sizes. options: any of sinks, temperature."""

    def build(f):
        keys, key_heads = Lq if Lk is None else Lk, Hq if Hkv is None else Hkv
        kwargs = dict(plain)
        if bias is not None:
            kwargs["bias"] = f.io(*bias, Lq, keys)
        for name in options.split():
            kwargs[name] = f.param(Hq)
        args = f.io(B, Hq, Lq, P), f.io(B, key_heads, keys, P), f.io(B, key_heads, keys, P if Pv is None else Pv)
        return (*args, mask), kwargs

    return build


def _hidden(heads, queries, keys):
    """A mask without structure, whose second row sees nothing."""
    table = torch.rand(1, heads, queries, keys, generator=torch.Generator().manual_seed(5)) < 0.5
    table[:, :, 1] = False
    return masks.dense(table)


def _packed(lengths, Hq, P, mask, *, Hkv=None, key_lengths=None, **plain):
    def build(f):
        rows, keys = sum(lengths), sum(key_lengths or lengths)
        bounds = lambda sizes: f.integers([sum(sizes[:i]) for i in range(len(sizes) + 1)])
        kwargs = dict(plain, cu_seqlens=bounds(lengths))
        if key_lengths:
            kwargs["cu_seqlens_k"] = bounds(key_lengths)
        return (f.io(rows, Hq, P), f.io(keys, Hkv or Hq, P), f.io(keys, Hkv or Hq, P), mask), kwargs

    return build


_STREAM = masks.causal & (masks.window(7, 0) | masks.sink(2))

SPECS = {
    "sparse_attention": Spec(
        (
            Sample("window_and_sink", _attention(2, 4, 37, 8, _STREAM, Hkv=2, return_lse=True)),
            Sample("no_mask", _attention(1, 2, 5, 16, Lk=9)),
            Sample("one", _attention(1, 1, 1, 1, masks.causal)),
            Sample(
                "everything",
                _attention(2, 4, 19, 12, masks.causal.shift(4, 0), Hkv=2, Lk=23, Pv=5, bias=(1, 4), options="sinks",
                           softcap=3.0, scale=0.7, return_lse=True),
            ),
            Sample("empty_rows", _attention(1, 2, 21, 6, _hidden(2, 21, 13), Lk=13, bias=(1, 1))),
            Sample("attending_if_empty", _attention(2, 2, 9, 4, _hidden(1, 9, 11), Lk=11, bias=(2, 1), empty_rows="attend")),
            Sample("packed", _packed([9, 0, 1, 21], 4, 8, _STREAM, Hkv=2, return_lse=True)),
            Sample(
                "packed_cross",
                _packed([7, 3, 5], 2, 4, masks.blocks([2, 5, 9]) | masks.prefix([1, 0, 4]) & ~masks.dilated(2),
                        key_lengths=[11, 2, 8], softcap=2.0),
            ),
            Sample("hstu", _attention(2, 2, 33, 8, masks.causal & masks.prefix([33, 20]), bias=(2, 2), score="silu", norm=1 / 33)),
            Sample("swin_v2", _attention(2, 3, 16, 8, masks.window2d((4, 4), 2, 1), options="temperature", score="cosine")),
            Sample("a_mask_a_head", _attention(1, 3, 70, 8, masks.per_head([masks.causal, masks.window(3, 3), masks.dilated(3)]))),
        ),
        rounding_of_saved=0.5,
    ),
}  # fmt: skip
