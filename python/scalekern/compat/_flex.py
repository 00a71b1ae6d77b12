"""torch's flex_attention interface on sparse_attention: a BlockMask becomes a mask of scalekern.masks.

mask_mod runs on the partial tiles of the BlockMask alone. What it says there and the full tiles become the intervals of
keys that each query sees: two tables over the queries an interval, or a plain window where they are one. Rows in more
than a few pieces become a table of bits instead.

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, Pv of the values; G = B H programs.
"""

import functools
import weakref

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask

from scalekern import _checks, masks
from scalekern.masks import _code
from scalekern.masks._leaves import Limits, Traced
from scalekern.masks._traced import constant, plain, text_of
from scalekern.ops.sparse_attention import sparse_attention

NAME = "flex_attention"
MOST = 4  # intervals in a row; more become bits
_PAIRS = 1 << 20  # pairs evaluated at once
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def flex_attention(
    query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, return_lse=False,
    kernel_options=None, *, return_aux=None,
):  # fmt: skip
    """torch.nn.attention.flex_attention on scalekern's kernels, for those who have a BlockMask: no compile step.

    The BlockMask is turned into a mask at its first call and kept for as long as it lives; tensors that its mask_mod
    reads must not change in between. Differentiable in query, key and value, and through the lse.

    Args:
        query: (B, Hq, Lq, P).   key: (B or 1, Hkv, Lk, P).   value: (B or 1, Hkv, Lk, Pv); float64, float32, float16 or
            bfloat16, all alike.
        score_mod: must be None.
        block_mask: BlockMask of (B or 1, Hq or 1, Lq, Lk), None: every pair.
        scale: P^-0.5 when None.
        enable_gqa: whether Hkv may be a divisor of Hq.
        return_lse: also return the lse.
        kernel_options: not used.
        return_aux: torch's AuxRequest; max_scores are not to be had.

    Returns:
        out (B, Hq, Lq, Pv) in query's dtype; with `return_lse` also lse (B, Hq, Lq), the natural logarithm of the sum
        of exp(scores), float32 (float64), -inf where a query sees nothing; with `return_aux` an AuxOutput in its place.

    Raises:
        NotImplementedError: score_mod, or return_aux with max_scores.
        TypeError, ValueError: an argument of the wrong type or shape, named in the message.

    Source: Dong et al., Flex Attention, 2024, section 3 (the interface).
    """
    if score_mod is not None:
        raise NotImplementedError(
            f"{NAME}: score_mod must be None: scalekern.sparse_attention takes what it adds to the scores as bias, "
            "a cap by tanh as softcap, sink logits as sinks; a score_mod that hides pairs belongs into block_mask"
        )
    if return_lse and return_aux is not None:
        raise ValueError(f"{NAME}: return_aux must be None if return_lse is set, got both")
    if getattr(return_aux, "max_scores", False):
        raise NotImplementedError(f"{NAME}: return_aux must not ask for max_scores, which the kernels do not keep")
    for name, x in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(NAME, name, x, dims=4, dtypes=_checks.FLOATING)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        heads = f"{query.shape[1]} and {key.shape[1]}"
        raise ValueError(f"{NAME}: query and key must have as many heads unless enable_gqa is set, got {heads}")
    out, lse = attend(query, key, value, block_mask, scale=scale, return_lse=True)
    if return_aux is None:
        return (out, lse) if return_lse else out
    from torch.nn.attention.flex_attention import AuxOutput

    return out, AuxOutput(lse=lse if return_aux.lse else None)


def attend(q, k, v, block_mask, *, bias=None, sinks=None, **options):
    """sparse_attention under a BlockMask, of which every batch row may have its own."""
    batch, heads = q.shape[:2]
    k, v = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in (k, v))
    if block_mask is None:
        return sparse_attention(q, k, v, None, bias=bias, sinks=sinks, **options)
    if torch.compiler.is_dynamo_compiling():
        text, folded = _text_of(block_mask, *map(int, (batch, heads, q.shape[2], k.shape[2])))
        mask = Traced(text)
    else:
        mask, folded = mask_of(block_mask, batch, heads, q.shape[2], k.shape[2])
    if not folded:
        return sparse_attention(q, k, v, mask, bias=bias, sinks=sinks, **options)
    # a program for each batch row: rows become heads, and query head b Hq + h still finds its key head
    bias = bias if bias is None else fold(bias.expand(batch, heads, -1, -1))
    sinks = sinks if sinks is None else sinks.repeat(batch)
    found = sparse_attention(fold(q), fold(k), fold(v), mask, bias=bias, sinks=sinks, **options)
    if isinstance(found, tuple):
        return tuple(x.view(batch, heads, *x.shape[2:]) for x in found)
    return found.view(batch, heads, *found.shape[2:])


def fold(x):
    return x.flatten(0, 1).unsqueeze(0)


@constant
def _text_of(*asked):
    """Of a graph, which holds for this BlockMask alone."""
    with plain():
        mask, folded = mask_of(*asked)
        return text_of(mask), folded


@_code.on_cpu
def mask_of(block_mask, batch, heads, q_len, kv_len):
    """(mask, whether it is for q, k and v with the batch folded into the heads)"""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"{NAME}: block_mask must be a BlockMask, got {type(block_mask).__name__}")
    sizes = tuple(block_mask.kv_num_blocks.shape[:2])
    if tuple(block_mask.seq_lengths) != (q_len, kv_len) or sizes[0] not in (1, batch) or sizes[1] not in (1, heads):
        wanted, got = (batch, heads, q_len, kv_len), (*sizes, *block_mask.seq_lengths)
        raise ValueError(f"{NAME}: block_mask must be for {wanted}, or 1 in place of batch or heads, got {got}")
    known = _known.setdefault(block_mask, {})
    if (batch, heads) not in known:
        if "members" not in known:
            known["members"] = _members(block_mask)
        members = known["members"]
        if isinstance(members, masks.Mask):
            known[batch, heads] = members, False
        else:
            rows = [row * (heads // len(row)) for row in members]
            alike = all(row == rows[0] for row in rows)
            rows = rows[0] if alike else [m for row in rows for m in row]
            same = all(m is rows[0] or m == rows[0] for m in rows)
            known[batch, heads] = rows[0] if same else masks.per_head(rows), not alike
    return known[batch, heads]


# ---- tiles to intervals ----


def _members(block_mask):
    """A mask for each batch row and head, lists in a list; or one for all, of bits."""
    q_len, kv_len = block_mask.seq_lengths
    B, H = block_mask.kv_num_blocks.shape[:2]
    size = block_mask.BLOCK_SIZE
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    found = [_full(full, size, q_len, kv_len)]
    parts = partial.split(max(1, _PAIRS // (size[0] * size[1])), 1) if partial.shape[1] else ()  # no vmap over none
    for part in parts:
        found.append(_look(block_mask.mask_mod, part, H, size, q_len, kv_len, block_mask.kv_num_blocks.device))
    row, start, end = _merge(*torch.cat(found, 1), kv_len)
    count = torch.bincount(row, minlength=B * H * q_len)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    if int(count.max() if len(count) else 0) <= MOST:
        # The last interval of a row first: before it, sinks come and stay.
        tables = _tables(row, count[row] - 1 - place, start, end, B * H, q_len)
        return [[_member(*tables, b * H + h, kv_len) for h in range(H)] for b in range(B)]
    allowed = torch.zeros(B * H * q_len, kv_len + 1, dtype=torch.int8)
    allowed[row, start] += 1  # intervals of a row do not touch: no place is a start or an end twice
    allowed[row, end] -= 1
    return masks.dense(allowed.cumsum(1, dtype=torch.int8)[:, :kv_len].bool().view(B, H, q_len, kv_len))


def _listed(counts, indices):
    """int64 (3, n): batch row and head as one number, query tile, key tile."""
    if counts is None:
        return torch.empty(3, 0, dtype=torch.int64)
    counts, indices = counts.cpu(), indices.cpu()
    valid = torch.arange(indices.shape[-1]) < counts[..., None]
    b, h, i, _ = valid.nonzero().T
    return torch.stack([b * counts.shape[1] + h, i, indices[valid].long()])


def _full(tiles, size, q_len, kv_len):
    g, i, j = tiles
    n_q = -(-q_len // size[0])
    row, start, end = _merge(g * n_q + i, j, j + 1, -(-kv_len // size[1]))
    q = (row % n_q * size[0])[:, None] + torch.arange(size[0])
    inside = q < q_len
    rows = ((row // n_q * q_len)[:, None] + q)[inside]
    start, end = ((at * size[1]).clamp(max=kv_len)[:, None].expand_as(q)[inside] for at in (start, end))
    return torch.stack([rows, start, end])


def _look(mask_mod, tiles, H, size, q_len, kv_len, device):
    """The intervals (row, start, end) of partial tiles."""
    g, i, j = tiles
    q, k = (at[:, None] * n + torch.arange(n) for at, n in ((i, size[0]), (j, size[1])))
    f = torch.vmap(mask_mod, (None, None, None, 0))
    f = torch.vmap(torch.vmap(f, (None, None, 0, None)), (0, 0, 0, 0))
    at = (x.to(device, torch.int32) for x in (g // H, g % H, q.clamp(max=q_len - 1), k.clamp(max=kv_len - 1)))
    with TransformGetItemToIndex():  # under vmap, table[position] would ask for a number
        allowed = f(*at).cpu().bool()
    allowed = allowed & (q < q_len)[:, :, None] & (k < kv_len)[:, None]
    edges = torch.nn.functional.pad(allowed, (1, 1)).to(torch.int8).diff()
    tile, r, start = (edges == 1).nonzero().T
    end = (edges == -1).nonzero()[:, 2]
    return torch.stack([g[tile] * q_len + q[tile, r], j[tile] * size[1] + start, j[tile] * size[1] + end])


def _merge(row, start, end, length):
    """Sorted by row and start; intervals that touch become one."""
    order = (row * (length + 1) + start).argsort()
    row, start, end = row[order], start[order], end[order]
    apart = (row[1:] != row[:-1]) | (start[1:] != end[:-1])
    first = torch.nn.functional.pad(apart, (1, 0), value=True)[: len(row)]
    last = torch.nn.functional.pad(apart, (0, 1), value=True)[: len(row)]
    return row[first], start[first], end[last]


def _tables(row, slot, start, end, groups, q_len):
    """Limits (slots, G, Lq) below and above, and whether a row has the interval; rows without it take earlier ones."""
    slots = int(slot.max()) + 1 if len(slot) else 1
    low, high = torch.full((2, slots, groups * q_len), -1)
    low[slot, row], high[slot, row] = start, end
    low, high = (x.view(slots, groups, q_len) for x in (low, high))
    some = low >= 0
    low, high = (torch.where(some, x, x.clamp(min=0).cummax(2)[0]) for x in (low, high))
    return low, high, some


# ---- intervals to masks ----


def _member(low, high, some, group, kv_len):
    found = []
    for a, b, rows in zip(low[:, group], high[:, group], some[:, group]):
        if rows.any():
            interval = _between(a, b, kv_len)
            found.append(interval & masks.rows(rows) if bool(((a < b) & ~rows).any()) else interval)
    return functools.reduce(lambda a, b: a | b, found) if found else ~masks.everything


def _between(low, high, kv_len):
    """low[q] <= k < high[q]"""
    q = torch.arange(len(low))
    left, right = (side[at][:1].tolist() for side, at in ((q - low, low > 0), (high - 1 - q, high < kv_len)))
    left, right = left[0] if left else None, right[0] if right else None
    if all(n is None or n >= 0 for n in (left, right)):
        as_low = torch.zeros_like(q) if left is None else (q - left).clamp(0, kv_len)
        as_high = torch.full_like(q, kv_len) if right is None else (q + right + 1).clamp(max=kv_len)
        if torch.equal(low, as_low) and torch.equal(high, as_high):
            return masks.causal if (left, right) == (None, 0) else masks.window(left, right)
    below = Limits(high.to(torch.int32))
    return below & ~Limits(low.to(torch.int32)) if left is not None else below
