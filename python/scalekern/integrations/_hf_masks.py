"""transformers' mask functions as masks of scalekern.masks: read, not evaluated.

transformers describes a mask as closures over its own few functions (causal, sliding window, chunk, packed sequence,
their `and` and `or`), which `_read` takes apart; a function that it does not know is evaluated pair by pair instead.
Positions are absolute: query i stands at q_offset + i, key j at kv_offset + j.

Shape letters: B batch, Lq, Lk lengths.
"""

import collections
import dataclasses
import functools

import torch

from scalekern import masks
from scalekern.masks._code import on_cpu

INF = 1 << 29
_KNOWN = 64  # masks kept, the most recent: the same value is the same object, whose code and plans exist already
_interned: collections.OrderedDict = collections.OrderedDict()
_unreadable: set[str] = set()  # transformers' functions that do not mean what `_read` takes them for


# ---- what a layer gets ----


class AttentionMask(torch.Tensor):
    """A mask on its way to the layers: `mask` over the keys [start, stop), the `keys` that any query may see.

    transformers hands on only tensors of four dimensions as they are, so this is one: to whoever looks at more than its
    shape it is the bool tensor (B, 1, Lq, Lk) of allowed pairs, which is made at that moment.
    """

    mask: masks.Mask | None  # None: all pairs of `keys`
    keys: tuple[int, int]
    packed: bool  # it keeps packed sequences apart
    rows: tuple | None  # of one query that sees an interval of keys: (first, number) of each batch row, int32 (B,)

    @staticmethod
    def __new__(cls, shape, device, mask, keys, packed=False, rows=None):
        self = torch.empty((), dtype=torch.bool, device=device).expand(shape).as_subclass(cls)
        self.mask, self.keys, self.packed = mask, keys, packed
        self.rows = rows and tuple(x.to(device) for x in rows)
        return self

    def dense(self) -> torch.Tensor:
        """bool (B, 1, Lq, Lk), True: allowed."""
        batch, _, q_len, kv_len = self.shape
        start, stop = self.keys
        allowed = torch.zeros(batch, 1, q_len, kv_len, dtype=torch.bool, device=self.device)
        mask = masks.everything if self.mask is None else self.mask
        allowed[..., start:stop] = mask.to_dense(q_len, stop - start).to(self.device)
        return allowed

    def __repr__(self):
        return f"AttentionMask({tuple(self.shape)}, {self.mask}, keys={self.keys})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in _SAME:
            return args[0]
        if function is torch.Tensor.to and not kwargs and len(args) == 2 and isinstance(args[1], (str, torch.device)):
            return cls(args[0].shape, args[1], args[0].mask, args[0].keys, args[0].packed, args[0].rows)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs))
        return function(*args, **kwargs)


_LOOKS = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")
}
_LOOKS |= {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "stride", "storage_offset", "is_contiguous", "is_floating_point", "__len__")
}
_SAME = {torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.clone}


def intern(mask):
    """The mask of this value that was seen first, if any of the recent: its code and plans are there already."""
    if mask is None:
        return None
    mask = _interned.setdefault(mask, mask)
    _interned.move_to_end(mask)
    if len(_interned) > _KNOWN:
        _interned.popitem(last=False)
    return mask


@torch.compiler.disable  # reads positions and padding
@on_cpu
def attention_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
    allow_is_causal_skip=True, device="cpu", **kwargs,
):  # fmt: skip
    """The mask of a forward, as transformers' mask interface calls it: once for each kind of layer.

    Args:
        batch_size, q_length, kv_length: B, Lq, Lk.
        q_offset, kv_offset: position of the first query and the first key; integers, or a tensor of one.
        mask_function: transformers' function of (batch, head, query, key), None: causal.
        attention_mask: bool (B, T) over absolute positions, True: no padding; what lies beyond T is padding.
        allow_is_causal_skip: whether None may stand for a mask that hides nothing from one query.
        device: of the layers.

    Returns:
        AttentionMask, or None: one query that sees all keys.
    """
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, device=device, mask_function=mask_function, **kwargs,
    )  # fmt: skip
    place = _Place(q_length, kv_length, int(q_offset), int(kv_offset))
    try:
        pattern = _Pattern(right=0) if mask_function is None else _read(mask_function, place)
    except _Unreadable:
        return _evaluated(arguments)
    first, last, holes = _kept(attention_mask, place)
    rows = None
    if q_length == 1:
        first, last, pattern = pattern.row(first, last, place)
        if holes is None and not pattern.parts:
            rows = _rows(first, last, batch_size, kv_length)
    keys = pattern.reach(first, last, place)
    parts = [*pattern.masks(place, keys), *_intervals(first, last, keys)]
    if holes is not None:
        parts.append(~masks.rows(holes[:, keys[0] :]).transpose())
    mask = intern(functools.reduce(lambda a, b: a & b, parts)) if parts else None
    if mask is None and q_length == 1 and keys == (0, kv_length) and allow_is_causal_skip:
        return None
    return AttentionMask((batch_size, 1, q_length, kv_length), device, mask, keys, pattern.packed, rows)


def _evaluated(arguments):
    """A mask that nobody can read: evaluated for every pair, by transformers."""
    from transformers.masking_utils import sdpa_mask

    arguments |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    allowed = sdpa_mask(**arguments)
    same = bool((allowed == allowed[:1]).all())
    mask = intern(masks.dense(allowed[:1] if same else allowed))
    return AttentionMask(allowed.shape, allowed.device, mask, (0, allowed.shape[-1]))


# ---- padding ----


@dataclasses.dataclass(frozen=True)
class _Place:
    q_len: int
    kv_len: int
    q_offset: int
    kv_offset: int

    def positions(self, keys=None):
        """Of the queries, and of the keys [start, stop)."""
        start, stop = keys or (0, self.kv_len)
        return torch.arange(self.q_len) + self.q_offset, torch.arange(start, stop) + self.kv_offset


def _kept(keep, place):
    """Where the keys of each batch row begin and end that are no padding; bool (B, n) the padding between, if any."""
    if keep is None:
        return [0], [place.kv_len], None
    keep = keep[:, place.kv_offset : place.kv_offset + place.kv_len].to("cpu", torch.bool)
    n, ones = keep.shape[1], keep.view(torch.uint8)  # once a token and kind of layer: as few passes as will do
    count = ones.sum(1, dtype=torch.int64)
    if n == 0 or int(count.min()) == n:
        return [0], [n], None
    first = ones.argmax(1)
    last = torch.full_like(first, n)
    if not torch.equal(count, last - first):
        last = n - ones.flip(1).argmax(1)
    first, last = (torch.where(count > 0, side, 0) for side in (first, last))
    holes = None
    if not torch.equal(count, last - first):
        index = torch.arange(n)
        holes = _alike(~keep & (index >= first[:, None]) & (index < last[:, None]))
        holes = holes[:, : int(holes.any(0).nonzero()[-1]) + 1]
    first, last = _same_rows(first.tolist(), last.tolist())
    return first, last, holes


def _same_rows(first, last):
    return (first[:1], last[:1]) if len(set(zip(first, last))) == 1 else (first, last)


def _intervals(first, last, keys):
    """Masks for first[b] <= k < last[b], counted from the first of `keys`; none for a limit that hides none of them."""
    start, stop = keys
    first, last = ([max(n - start, 0) for n in side] for side in (first, last))
    found = [~masks.prefix(first)] if any(first) else []
    return found + ([masks.prefix(last)] if min(last) < stop - start else [])


def _rows(first, last, batch, kv_len):
    """Of each batch row the first key and how many there are."""
    first, last = (torch.tensor(side, dtype=torch.int32).clamp(0, kv_len).expand(batch) for side in (first, last))
    return first.contiguous(), (last - first).clamp(min=0)


def _alike(table):
    """One row for all batch rows if they are equal."""
    return table[:1] if len(table) > 1 and bool((table == table[:1]).all()) else table


# ---- transformers' functions ----


class _Unreadable(Exception):
    """A function that transformers' own are not made of."""


@dataclasses.dataclass
class _Pattern:
    """A conjunction: q - left <= k <= q + right, k in q's chunk for each of `chunks`, and `parts`."""

    left: int = INF
    right: int = INF
    chunks: tuple = ()  # (size, where chunk 0 starts in each batch row)
    parts: tuple = ()  # masks over absolute positions
    packed: bool = False

    def __and__(self, other):
        return _Pattern(
            min(self.left, other.left), min(self.right, other.right), self.chunks + other.chunks,
            self.parts + other.parts, self.packed or other.packed,
        )  # fmt: skip

    def row(self, first, last, place):
        """The keys' limits for the only query, in each batch row, and what they leave to say."""
        q, rows = place.q_offset, max([len(first), *(len(starts) for _, starts in self.chunks)])
        limits = [(q - self.left, q + self.right + 1)] * rows
        for size, starts in self.chunks:
            chunk = [s + (q - s) // size * size for s in (starts if len(starts) == rows else starts * rows)]
            limits = [(max(a, c), min(b, c + size)) for (a, b), c in zip(limits, chunk)]
        first, last = (side if len(side) == rows else side * rows for side in (first, last))
        limits = [(a - place.kv_offset, b - place.kv_offset) for a, b in limits]
        first, last = [max(f, a) for f, (a, b) in zip(first, limits)], [min(n, b) for n, (a, b) in zip(last, limits)]
        return *_same_rows(first, last), _Pattern(parts=self.parts, packed=self.packed)

    def reach(self, first, last, place):
        """The keys [start, stop) that some query may see; all of them if there is none."""
        seen = [(f, n) for f, n in zip(first, last) if f < n]
        sizes = [size - 1 for size, _ in self.chunks]
        ahead = place.q_offset - place.kv_offset
        start = max(min((f for f, _ in seen), default=0), ahead - min([self.left, *sizes]))
        stop = min(max((n for _, n in seen), default=0), ahead + place.q_len + min([self.right, *sizes]))
        return (max(start, 0), min(stop, place.kv_len)) if max(start, 0) < stop else (0, place.kv_len)

    def masks(self, place, keys):
        """What is to be checked pair by pair, counted from the first query and the first of `keys`."""
        q, k = place.q_offset, place.kv_offset + keys[0]
        left = INF if q + place.q_len - 1 - self.left <= k else self.left  # a window that is longer than the keys
        found = [m.shift(q - k, 0) if q != k else m for m in _band(left, self.right)]
        chunks = [_chunk(size, starts, *place.positions(keys)) for size, starts in self.chunks]
        return found + [c for c in chunks if c is not None] + [p.shift(q, k) if q or k else p for p in self.parts]

    def absolute(self, place):
        """The whole as one mask over absolute positions."""
        every = torch.arange(max(place.q_offset + place.q_len, place.kv_offset + place.kv_len))
        chunks = [_chunk(size, starts, every, every) for size, starts in self.chunks]
        found = [*_band(self.left, self.right), *(c for c in chunks if c is not None), *self.parts]
        return functools.reduce(lambda a, b: a & b, found, *([] if found else [masks.everything]))


def _band(left, right):
    if left == INF and right == 0:
        return [masks.causal]
    return [] if left == right == INF else [masks.window(*(None if n == INF else n for n in (left, right)))]


def _chunk(size, starts, q, k):
    """None where all positions q and k lie in one chunk."""
    starts = torch.tensor(starts)[:, None]
    q, k = ((at - starts) // size for at in (q, k))
    low, high = min(int(q.min()), int(k.min())), max(int(q.max()), int(k.max()))
    return None if low == high else masks.segments(q - low, k - low)


def _read(function, place, sequences=None):
    """The pattern that a mask function of transformers means; sequences: ids (B, Lq) of packed sequences around it."""
    name = getattr(function, "__qualname__", "").removesuffix(".<locals>.inner_mask")
    reader = _READERS.get(name)
    if reader is None or name in _unreadable or function.__module__ != "transformers.masking_utils":
        raise _Unreadable(name)
    return reader(place, sequences, **_cells(function))


def _cells(function):
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _consecutive(positions, sequences):
    """Whether a distance within a sequence is that of the places, so that windows need no positions."""
    steps = sequences.diff()
    return bool(((steps > 0) | (steps == 0) & (positions.diff() == 1)).all())


def _sliding(place, sequences, sliding_window):
    if sliding_window < 1:
        raise _Unreadable
    return _Pattern(left=sliding_window - 1)


def _chunked(place, sequences, chunk_size, left_padding):
    starts = left_padding.tolist()
    return _Pattern(chunks=((chunk_size, starts[:1] if len(set(starts)) == 1 else starts),))


def _segments(ids):
    return masks.segments(_alike(ids.cpu()))


def _packed(place, sequences, packed_sequence_mask):
    return _Pattern(parts=(_segments(packed_sequence_mask),), packed=True)


def _remapped(place, sequences, mask_function, position_ids):
    """Positions within packed sequences: a matter of chunks, since distances stay the same."""
    pattern = _read(mask_function, place)
    if sequences is None or pattern.parts or place.q_offset or place.kv_offset:
        raise _Unreadable
    positions, sequences = torch.broadcast_tensors(position_ids.cpu(), sequences)
    if not _consecutive(positions, sequences):
        raise _Unreadable
    ids = [_alike((positions - torch.tensor(starts)[:, None]) // size) for size, starts in pattern.chunks]
    return _Pattern(pattern.left, pattern.right, (), tuple(masks.segments(i - i.min()) for i in ids))


def _all_of(place, sequences, mask_functions):
    for function in mask_functions:
        if function.__qualname__.startswith("packed_sequence_mask_function."):
            sequences = _cells(function)["packed_sequence_mask"].cpu()
    return functools.reduce(lambda a, b: a & b, [_read(f, place, sequences) for f in mask_functions])


def _any_of(place, sequences, mask_functions):
    sides = [_read(f, place).absolute(place) for f in mask_functions]
    return _Pattern(parts=(functools.reduce(lambda a, b: a | b, sides),))


_READERS = {
    "causal_mask_function": lambda *at: _Pattern(right=0),
    "bidirectional_mask_function": lambda *at: _Pattern(),
    "sliding_window_overlay": _sliding,
    "sliding_window_bidirectional_overlay": lambda *at, sliding_window: _Pattern(sliding_window, sliding_window),
    "chunked_overlay": _chunked,
    "blockwise_overlay": lambda *at, block_sequence_ids: _Pattern(parts=(_segments(block_sequence_ids),)),
    "packed_sequence_mask_function": _packed,
    "remap_positions_for_packed_sequence": _remapped,
    "and_masks.<locals>.and_mask": _all_of,
    "or_masks.<locals>.or_mask": _any_of,
}


@functools.cache
def probe() -> None:
    """Note which functions of the transformers that is here do not mean what they are taken for."""
    from transformers import masking_utils as m

    ids, positions = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    causal = getattr(m, "causal_mask_function", None)
    samples = {
        "causal_mask_function": lambda: causal,
        "bidirectional_mask_function": lambda: m.bidirectional_mask_function,
        "sliding_window_overlay": lambda: m.sliding_window_overlay(2),
        "sliding_window_bidirectional_overlay": lambda: m.sliding_window_bidirectional_overlay(2),
        "chunked_overlay": lambda: m.chunked_overlay(2, torch.tensor([0, 1])),
        "blockwise_overlay": lambda: m.blockwise_overlay(ids - 1),
        "packed_sequence_mask_function": lambda: m.packed_sequence_mask_function(ids),
        "and_masks.<locals>.and_mask": lambda: m.and_masks(causal, m.sliding_window_overlay(3)),
        "or_masks.<locals>.or_mask": lambda: m.or_masks(causal, m.blockwise_overlay(ids)),
        "remap_positions_for_packed_sequence": lambda: m.packed_sequence_compatibility_function(
            m.and_masks(causal, m.chunked_overlay(2, torch.tensor([0, 1]))), positions, ids
        ),
    }
    place = _Place(5, 5, 0, 0)
    b, q, k = torch.arange(2)[:, None, None, None], torch.arange(5)[:, None], torch.arange(5)
    for name, make in samples.items():
        try:
            function = make()
            expected = function(b, torch.zeros_like(b), q, k).expand(2, 1, 5, 5)
            same = torch.equal(_read(function, place).absolute(place).to_dense(5, 5, 2), expected)
        except Exception:  # whatever a version does that nobody has seen yet
            same = False
        if not same:
            _unreadable.add(name)
