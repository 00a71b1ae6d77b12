"""Attention of the newest tokens over a cache: public function, checks, schema, backends and fake.

Shape letters: B batch, Hq query heads, Hkv key heads, T new tokens, S slots of a cache, P head dim, Pv of the values.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native, triton
from scalekern.ops._kv_layout import INDEX, check_layout
from scalekern.quant.kv import QuantizedKV
from scalekern.reference.sparse_attention_decode import sparse_attention_decode_op as reference_decode

NAME = "sparse_attention_decode"


def sparse_attention_decode(
    q, k_cache, v_cache, lengths, *, budgets=None, sink=0, circular=False, head_offsets=None, block_table=None,
    starts=None, scale=None, softcap=None, sinks=None, return_lse=False,
):  # fmt: skip
    """softmax(scale q k^T) v of the T newest tokens over a cache that already holds their keys and values.

    Query t of T stands at position lengths[b] - T + t and sees the keys up to itself, of those the first `sink` and
    the newest budgets[h] - sink: the rows of `sparse_attention` under causal & (window(budgets[h] - sink - 1, 0) |
    sink(sink)). Slots outside are not read: time and traffic follow the budgets. Query head h reads key head
    h // (Hq / Hkv); a slot is read once for all of a key head's query heads, whose budgets may differ. It has no
    gradient and says so when differentiated. Scores are summed and exponentiated in float32 (float64 for float64).

    The cache comes in one of three layouts, told apart by the argument that each needs. Only the ragged one lets key
    heads differ in their number of slots, and so takes the memory of the sum of the budgets; its heads lie one behind
    the other along one axis like the sequences of a packed batch, with `head_offsets` in the place of cu_seqlens.

    Either cache may be a `QuantizedKV`, of 8 or 4 bits: its codes are read as they are, so that traffic shrinks with
    the bits, and are multiplied by their scales in registers. What is not visible may hold anything there too.

    Args:
        q: (B, Hq, T, P); float64, float32, float16 or bfloat16, any strides; P and Pv up to 256.
        k_cache, v_cache: q's dtype or a QuantizedKV, any strides. Contiguous: (B, Hkv, S, P) and (B, Hkv, S, Pv).
            Ragged: (B, S, P) and (B, S, Pv), with head_offsets. Paged: (pages, Hkv, page, P) and likewise, with
            block_table.
        lengths: (B,), int32 or int64: tokens so far, the new ones included. 0: a row without tokens. At most the
            slots of every head unless circular (checked on a CPU; on a GPU what lies past the slots is not seen).
        budgets: (Hq,), int32 or int64, on the CPU or q's device: keys that a query head sees, none below `sink`. On
            the CPU they let a GPU launch just the work that there is. None: all of them.
        sink: how many of the first tokens every head sees.
        circular: the cache of a head with C slots holds its first `sink` tokens and its newest C - sink: position p
            lies in slot p below sink, in slot sink + (p - sink) % (C - sink) from there on. For T > 1 it takes
            C >= budget + T - 1 for the oldest query to find its whole window; what was overwritten is not seen.
        head_offsets: (Hkv + 1,), int32 or int64, on q's device: key head g has the slots from head_offsets[g] to
            head_offsets[g + 1] of axis S.
        block_table: (B, max_pages), int32 or int64: the page with the positions from j page on is block_table[b, j].
            Entries of pages that no query sees may hold anything. Not with circular: pages are freed instead.
        starts: (B,), int32 or int64, of a contiguous cache, not circular: position p of row b lies in slot
            starts[b] + p, such as after padding on the left. None: 0.
        scale: P^-0.5 when None.
        softcap: scores become softcap tanh(scores / softcap).
        sinks: (Hq,), a score in every row's sum that brings no value.
        return_lse: also return the logarithm of the sum of exp(scores), for `merge_attention`.

    Returns:
        out (B, Hq, T, Pv) in q's dtype; with `return_lse` also lse (B, Hq, T), float32 (float64). A query that sees
        nothing gets 0 and -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Fu et al., MoA, 2024, section 4; Kwon et al., PagedAttention, 2023, section 4; Xiao et al., Efficient
    Streaming Language Models with Attention Sinks, 2024, section 3.2; Liu et al., KIVI, 2024, section 3.2.
    """
    _check(q, k_cache, v_cache, lengths, budgets, sink, circular, head_offsets, block_table, starts, softcap, sinks)
    _checks.flag(NAME, "return_lse", return_lse)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sinks = sinks if sinks is None or sinks.dtype == wide else sinks.to(wide)
    scale = q.shape[3] ** -0.5 if scale is None else _checks.number(NAME, "scale", scale)
    k, v = ((x, None, None, 0, 0) if isinstance(x, torch.Tensor) else (x.data, x.scales, x.offsets, x.bits, x.group_size)
            for x in (k_cache, v_cache))  # fmt: skip
    out, lse = sparse_attention_decode_op(
        q, k[0], v[0], lengths, budgets, head_offsets, block_table, starts, sinks, *k[1:3], *v[1:3], sink, circular,
        scale, float(softcap or 0.0), *k[3:], *v[3:], v_cache.shape[-1],
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(q, k_cache, v_cache, lengths, budgets, sink, circular, head_offsets, block_table, starts, softcap, sinks):
    _checks.tensor(NAME, "q", q, dims=4, dtypes=_checks.FLOATING)
    batch, heads, _, dim = q.shape
    ragged, paged = head_offsets is not None, block_table is not None
    check_layout(NAME, batch, lengths, circular, head_offsets, block_table, starts)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if isinstance(x, QuantizedKV):
            _checks.tensor(NAME, f"{name}.data", x.data, dims=3 if ragged else 4)
            x.check(NAME, name)
        else:
            _checks.tensor(NAME, name, x, dims=3 if ragged else 4, dtypes=_checks.FLOATING)
            _checks.dtype(NAME, name, x, q.dtype)
    lead = k_cache.shape[:-1]
    _checks.shape(NAME, "k_cache", k_cache, (None if paged else batch, *[None] * (len(lead) - 1), dim))
    _checks.shape(NAME, "v_cache", v_cache, (*lead, None))
    if not 1 <= dim <= 256 or not 1 <= v_cache.shape[-1] <= 256:
        got = f"{dim} and {v_cache.shape[-1]}"
        raise ValueError(f"{NAME}: the last axes of q and v_cache must have 1 to 256 elements, got {got}")
    key_heads = head_offsets.shape[0] - 1 if ragged else k_cache.shape[1]
    if heads and (key_heads <= 0 or heads % key_heads):
        raise ValueError(f"{NAME}: the key heads must divide the {heads} heads of q, got {key_heads}")
    for name, x, dtypes in (("budgets", budgets, INDEX), ("sinks", sinks, _checks.FLOATING)):
        if x is not None:
            _checks.tensor(NAME, name, x, dims=1, dtypes=dtypes)
            _checks.shape(NAME, name, x, (heads,))
    _checks.at_least(NAME, "sink", sink, 0)
    if softcap is not None and not _checks.number(NAME, "softcap", softcap) > 0:
        raise ValueError(f"{NAME}: softcap must be positive, got {softcap!r}")
    on_device = budgets if budgets is not None and budgets.device.type != "cpu" else None
    _checks.same_device(
        NAME, "q", q, k_cache=k_cache, v_cache=v_cache, lengths=lengths, budgets=on_device, head_offsets=head_offsets,
        block_table=block_table, starts=starts, sinks=sinks,
    )  # fmt: skip


def _allocate(q, *rest):
    """The outputs, uninitialized: what the fake returns and what the kernels fill."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], rest[-1]), q.new_empty(q.shape[:3], dtype=wide)


def _empty(q, k_cache, *rest):
    return q.numel() == 0 or k_cache.numel() == 0


sparse_attention_decode_op = _library.define(
    NAME,
    "sparse_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? budgets, "
    "Tensor? head_offsets, Tensor? block_table, Tensor? starts, Tensor? sinks, Tensor? k_scales, Tensor? k_offsets, "
    "Tensor? v_scales, Tensor? v_offsets, int sink, bool circular, float scale, float softcap, int k_bits, "
    "SymInt k_group, int v_bits, SymInt v_group, SymInt value_dim) -> (Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate, triton("sparse_attention_decode", "sparse_attention_decode"))),
        Backend("cpu", filling(_allocate, native("sparse_attention_decode", "cpu"))),
        Backend("reference", reference_decode),
    ),
    fake=_allocate,
    empty=_empty,
)
