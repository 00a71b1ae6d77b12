"""Sample inputs of the sparse_attention family.

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, Pv of the values.
"""

import torch

from scalekern import masks
from scalekern.reference import quantize_kv
from scalekern.testing import Sample, Spec


def _attention(B, Hq, Lq, P, mask=None, *, Hkv=None, Lk=None, Pv=None, bias=None, options="", **plain):
    """bias: its first two sizes. options: sinks, temperature, position_table, shared_table, image_table (4 x 4)."""

    def build(f):
        keys, key_heads = Lq if Lk is None else Lk, Hq if Hkv is None else Hkv
        kwargs = dict(plain)
        if bias is not None:
            kwargs["bias"] = f.io(*bias, Lq, keys)
        makers = {
            "position_table": lambda: f.param(Hq, 11),
            "shared_table": lambda: f.param(7),
            "image_table": lambda: f.param(Hq, 7, 7),
        }
        for name in options.split():
            key = name.replace("shared", "position").replace("image", "position")
            kwargs[key] = makers.get(name, lambda: f.param(Hq))()
        args = f.io(B, Hq, Lq, P), f.io(B, key_heads, keys, P), f.io(B, key_heads, keys, P if Pv is None else Pv)
        return (*args, mask), kwargs

    return build


def _hidden(heads, queries, keys):
    """A mask without structure, whose second row sees nothing."""
    table = torch.rand(1, heads, queries, keys, generator=torch.Generator().manual_seed(5), device="cpu") < 0.5
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
                _attention(2, 4, 19, 12, masks.causal.shift(4, 0), Hkv=2, Lk=23, Pv=5, bias=(1, 4),
                           options="sinks position_table", softcap=3.0, scale=0.7, return_lse=True),
            ),
            Sample("empty_rows", _attention(1, 2, 21, 6, _hidden(2, 21, 13), Lk=13, bias=(1, 1))),
            Sample(
                "attending_if_empty",
                _attention(2, 2, 9, 4, _hidden(1, 9, 11), Lk=11, bias=(2, 1), empty_rows="attend"),
            ),
            Sample("packed", _packed([9, 0, 1, 21], 4, 8, _STREAM, Hkv=2, return_lse=True)),
            Sample(
                "packed_cross",
                _packed([7, 3, 5], 2, 4, masks.blocks([2, 5, 9]) | masks.prefix([1, 0, 4]) & ~masks.dilated(2),
                        key_lengths=[11, 2, 8], softcap=2.0),
            ),
            Sample(
                "hstu",
                _attention(2, 2, 33, 8, masks.causal & masks.prefix([33, 20]), bias=(2, 2), options="shared_table",
                           score="silu", norm=1 / 33),
            ),
            Sample(
                "swin_v2",
                _attention(2, 3, 16, 8, masks.window2d((4, 4), 2, 1), options="temperature image_table",
                           score="cosine"),
            ),
            Sample(
                "a_mask_a_head",
                _attention(1, 3, 70, 8, masks.per_head([masks.causal, masks.window(3, 3), masks.dilated(3)])),
            ),
        ),
        gradient_factor=4,  # score "cosine" rounds q and k at length 1, on a GPU, and multiplies them by up to 100
        rounding_of_saved=0.5,
    ),
}  # fmt: skip


def _decode(
    B, Hq, Hkv, T, P, lengths, *, S=None, Pv=None, budgets=None, capacities=None, pages=None, starts=None, sinks=False,
    k_format=None, v_format=None, **plain,
):
    """S: slots of a contiguous cache. capacities: those of each key head of a ragged one. pages: (pages, page, table).

    k_format, v_format: options of quantize_kv, for caches of codes.
    """

    def build(f):
        kwargs = dict(plain)
        if budgets is not None:
            kwargs["budgets"] = f.integers(budgets)
        if capacities is not None:
            bounds = [sum(capacities[:g]) for g in range(Hkv + 1)]
            kwargs["head_offsets"], lead = f.integers(bounds), (B, bounds[-1])
        elif pages is not None:
            count, page, table = pages
            kwargs["block_table"], lead = f.integers(table), (count, Hkv, page)
        else:
            lead = (B, Hkv, S)
        if starts is not None:
            kwargs["starts"] = f.integers(starts)
        if sinks:
            kwargs["sinks"] = f.param(Hq)
        caches = f.io(*lead, P), f.io(*lead, P if Pv is None else Pv)
        caches = (x if o is None else quantize_kv(x, **o) for x, o in zip(caches, (k_format, v_format)))
        return (f.io(B, Hq, T, P), *caches, f.integers(lengths)), kwargs

    return build


def _parts(*lead, Pv):
    return lambda f: ((f.io(*lead, Pv), f.param(*lead)), {})


SPECS["sparse_attention_decode"] = Spec(
    (
        Sample("budgets", _decode(3, 4, 2, 1, 16, [37, 0, 5], S=41, budgets=[9, 37, 5, 6], sink=2, return_lse=True)),
        Sample("everything", _decode(2, 6, 2, 3, 8, [19, 2], S=19, Pv=5, sinks=True, softcap=3.0, scale=0.7)),
        Sample("circular", _decode(2, 2, 1, 2, 12, [45, 7], S=11, budgets=[10, 6], sink=3, circular=True)),
        Sample("ragged", _decode(2, 4, 2, 1, 8, [70, 11], capacities=(6, 20), budgets=[6, 4, 12, 20], sink=1,
                                 circular=True, return_lse=True)),
        Sample("paged", _decode(2, 4, 2, 2, 20, [11, 16], pages=(7, 4, [[3, 0, 6, -1], [5, 2, 1, 4]]), Pv=33,
                                budgets=[6, 9, 16, 4], sink=1)),
        Sample("padded", _decode(3, 4, 2, 2, 8, [12, 13, 0], S=33, starts=[3, 20, 33], budgets=[9, 37, 5, 6], sink=2)),
        Sample("int8_keys", _decode(3, 4, 2, 1, 16, [37, 0, 70], S=71, Pv=24, budgets=[9, 37, 5, 70], sink=2,
                                    return_lse=True, k_format={"scale_dtype": torch.float32})),
        Sample("int4_groups", _decode(2, 4, 1, 2, 48, [45, 7], S=11, Pv=32, budgets=[10, 6, 3, 9], sink=3,
                                      circular=True, k_format={"bits": 4, "group_size": 16},
                                      v_format={"bits": 4, "group_size": 16, "symmetric": True})),
        Sample("int4_odd", _decode(2, 6, 2, 1, 13, [11, 16], pages=(7, 4, [[3, 0, 6, -1], [5, 2, 1, 4]]), Pv=33,
                                   sinks=True, k_format={"bits": 4, "group_size": 5, "symmetric": True},
                                   v_format={"bits": 4})),
        Sample("one", _decode(1, 1, 1, 1, 1, [1], S=1, sinks=True)),
    ),
    inference=True,
)  # fmt: skip


def _rows(*shape, **options):
    return lambda f: ((f.io(*shape),), options)


def _update(B, H, T, P, lengths, *, S=None, capacities=None, pages=None, starts=None, sink=0, circular=False, **format):
    """Layouts as for _decode; the cache holds something already."""

    def build(f):
        kwargs = {"sink": sink, "circular": circular}
        lead = (B, H, S)
        if capacities is not None:
            bounds = [sum(capacities[:g]) for g in range(H + 1)]
            kwargs["head_offsets"], lead = f.integers(bounds), (B, bounds[-1])
        elif pages is not None:
            count, page, table = pages
            kwargs["block_table"], lead = f.integers(table), (count, H, page)
        if starts is not None:
            kwargs["starts"] = f.integers(starts)
        return (quantize_kv(f.io(*lead, P), **format), f.io(B, H, T, P, scale=3.0), f.integers(lengths)), kwargs

    return build


SPECS["quantize_kv"] = Spec(
    (
        Sample("int8", _rows(2, 3, 5, 16)),
        Sample("int4_groups", _rows(3, 2, 70, bits=4, group_size=32, scale_dtype=torch.float32)),
        Sample("symmetric", _rows(2, 7, 13, bits=4, group_size=5, symmetric=True)),
    ),
    inference=True,
    free_rank=True,
)
SPECS["quantize_kv_update"] = Spec(
    (
        Sample("contiguous", _update(3, 2, 4, 16, [7, 2, 0], S=9)),
        Sample("padded", _update(3, 2, 1, 13, [7, 2, 0], S=9, starts=[2, 0, 9], bits=4, group_size=8)),
        Sample("ragged", _update(2, 2, 2, 8, [13, 1], capacities=(3, 8), sink=1, circular=True, symmetric=True)),
        Sample("paged", _update(2, 2, 3, 8, [9, 16], pages=(7, 4, [[-5, 0, 6, -1], [99, 2, -1, 4]]),
                                scale_dtype=torch.float32)),
    ),
    inference=True,
)  # fmt: skip
SPECS["merge_attention"] = Spec(
    (Sample("three", _parts(3, 2, 4, 5, Pv=8)), Sample("one", _parts(1, 1, Pv=1)), Sample("rows", _parts(2, 7, Pv=19)))
)


def _hstu(lengths, H, P, *, Pv=None, new=None, buckets=None, targets=None, positions=None, shared=False, **plain):
    """buckets: of a table of times, a table a head unless shared. positions: a table's entries. new: rows of each."""

    def build(f):
        total, kwargs = sum(lengths), dict(plain, max_len=max(lengths) + 3)
        rows = total if new is None else new * len(lengths)
        if buckets is not None:
            kwargs["time"] = f.integers([(97 * i * i + 13 * i) % 5000 for i in range(total)])
            kwargs["time_table"] = f.param(buckets + 1) if shared else f.param(H, buckets + 1)
        if positions is not None:
            kwargs["position_table"] = f.param(positions) if shared else f.param(H, positions)
        if targets is not None:
            kwargs["num_targets"] = f.integers(targets)
        args = f.io(rows, H, P), f.io(total, H, P), f.io(total, H, P if Pv is None else Pv)
        kwargs["offsets"] = f.integers([sum(lengths[:i]) for i in range(len(lengths) + 1)])
        return args, kwargs

    return build


SPECS["hstu_attention"] = Spec(
    (
        Sample("tables", _hstu([9, 0, 1, 12], 2, 4, buckets=20, positions=11)),
        Sample("everything", _hstu([17, 4], 2, 4, Pv=6, buckets=12, positions=7, shared=True, targets=[5, 1],
                                   max_attn_len=4, contextual_len=2, min_full_attn_len=3, normalize="length",
                                   alpha=0.7)),
        Sample("newest", _hstu([9, 12], 1, 5, new=3, buckets=20, causal=False, normalize="scaling_len",
                               scaling_len=10)),
    ),
    rounding_of_saved=0.5,
    through="sparse_attention",
)  # fmt: skip
