"""A mask's code for sequences laid end to end: positions count from the start of a sequence, and sequences do not mix.

Every leaf becomes one over absolute positions: a leaf that allows an interval of keys in a row becomes the limits of
that interval, a table with an entry a row (opcode BLOCKS); the others keep their form, with tables over all rows.
"""

import collections

import torch

from scalekern.masks._code import (
    ALL, AND, BELOW, BLOCKS, CAUSAL, DENSE, DILATED, NEIGHBOR, NOT, OR, PREFIX, ROWS, SAME, WINDOW, WORDS, on_cpu, read,
)  # fmt: skip
from scalekern.masks._plan import host_of, remember_host

FAR = 1 << 30
_KEPT = 32
_packed: collections.OrderedDict = collections.OrderedDict()


class Side:
    """The queries, or the keys: of each packed position its sequence, and its place in that."""

    def __init__(self, bounds):
        cu = torch.tensor(bounds)
        self.starts, self.lengths = cu[:-1], cu[1:] - cu[:-1]
        self.sequence = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        self.place = torch.arange(int(cu[-1])) - self.starts[self.sequence]


def packed(code: torch.Tensor, cu_seqlens, cu_seqlens_k, q_len: int, kv_len: int) -> torch.Tensor:
    """The code of `code`'s mask within each of the packed sequences, on its device.

    The same tensor again for the same code and bounds. Bounds on a GPU are read back, once a tensor.
    ValueError: a mask over images or of a dense tensor has no positions that count from a sequence's start.
    """
    bounds, bounds_k = (tuple(host_of(cu).tolist()) for cu in (cu_seqlens, cu_seqlens_k))
    key = (id(code), bounds, bounds_k, q_len, kv_len)
    found = _packed.get(key)
    if found is None or found[0] is not code:
        host = _pack(host_of(code), bounds, bounds_k)
        found = code, remember_host(host.to(code.device), host)
        _packed[key] = found
        if len(_packed) > _KEPT:
            _packed.popitem(last=False)
    return found[1]


@on_cpu
def _pack(code, bounds, bounds_k):
    queries, keys = Side(bounds), Side(bounds_k)
    programs, _ = read(code)
    moved = not torch.equal(queries.starts, keys.starts)
    tables, known = _Tables(), {}
    for program in programs:
        if program not in known:
            rows = [n for i in program.instructions for n in _leaf(list(i), code, (queries, keys), moved, tables)]
            known[program] = [*rows, tables.same(0, queries.sequence, keys.sequence), [AND]]
    shapes = [tuple(tuple(row[:2]) for row in rows) for rows in known.values()]
    first = 2 + len(programs)
    places, end = [], first
    for rows in known.values():
        places.append(end)
        end += 2 + WORDS * len(rows)
    out = [len(programs), 1, *(places[list(known).index(p)] for p in programs)]
    for shape, rows in zip(shapes, known.values()):
        out += [len(rows), list(dict.fromkeys(shapes)).index(shape)]
        for row in rows:
            row = [tables.place(x, end) if isinstance(x, _Table) else x for x in row]
            out += row + [0] * (WORDS - len(row))
    return torch.cat([torch.tensor(out, dtype=torch.int32), *(t.int() for t in tables.found)])


class _Table(int):
    """A table by its number, until its place is known."""


class _Tables:
    def __init__(self):
        self.found = []

    def add(self, values):
        self.found.append(values)
        return _Table(len(self.found) - 1)

    def place(self, number, first):
        return first + sum(len(t) for t in self.found[:number])

    def same(self, swap, ids, other_ids):
        return [SAME, swap, 0, 0, self.add(ids), len(ids), self.add(other_ids), len(other_ids), 1]

    def below(self, swap, limits):
        return [BLOCKS, swap, 0, 0, self.add(limits), len(limits)]


def _leaf(row, code, sides, moved, tables):
    """The instructions that one of the packed program stands for."""
    opcode, swap, dx, dy, *p = row
    if opcode in (CAUSAL, WINDOW, DILATED) and not moved or opcode in (ALL, AND, OR, NOT):
        return [row]
    rows, columns = sides[::-1] if swap else sides
    x = rows.place + dx
    batch = lambda count: rows.sequence if count > 1 else torch.zeros_like(rows.sequence)
    if opcode in (NEIGHBOR, DENSE):
        raise ValueError(
            "sparse_attention: mask must be made of causal, window, sink, prefix, blocks, segments, dilated and rows "
            "for packed sequences, got one over an image or of a tensor"
        )
    if opcode == DILATED:
        return [tables.same(swap, x % p[0], (columns.place + dy) % p[0])]
    if opcode == SAME:
        other = lambda count: columns.sequence if count > 1 else torch.zeros_like(columns.sequence)
        return [tables.same(swap, _look_up(code, p[0], p[1], x, batch(p[4])),
                            _look_up(code, p[2], p[3], columns.place + dy, other(p[4]), -2))]  # fmt: skip
    if opcode == ROWS:
        return [[ROWS, swap, 0, 0, tables.add(_look_up(code, p[0], p[1], x, batch(p[2]), 0)), len(x), 1]]
    low, high = torch.zeros_like(x), torch.full_like(x, FAR)
    if opcode == CAUSAL:
        high = x + 1
        low = low - FAR
    elif opcode == WINDOW:
        low = x - p[0] if p[0] >= 0 else low - FAR
        high = x + p[1] + 1 if p[1] >= 0 else high
    elif opcode == BELOW:
        high = torch.full_like(x, p[0])
    elif opcode == PREFIX:
        high = code[p[0] + batch(p[1])].long()
    elif opcode == BLOCKS:
        high = torch.where(x >= 0, code[p[0] + x.clamp(0, p[1] - 1)].long(), 0)
    return _interval(swap, low - dy, high - dy, rows, columns, tables)


def _look_up(code, offset, length, x, batch, outside=-1):
    inside = (x >= 0) & (x < length)
    return torch.where(inside, code[offset + batch * length + x.clamp(0, length - 1)].long(), outside)


def _interval(swap, low, high, rows, columns, tables):
    """low <= place < high, a pair a row, within the row's sequence."""
    starts, lengths = columns.starts[rows.sequence], columns.lengths[rows.sequence]
    end = [tables.below(swap, starts + high.clamp(min=0).minimum(lengths))]
    if not (low > 0).any():
        return end
    return [*end, tables.below(swap, starts + low.clamp(min=0).minimum(lengths)), [NOT], [AND]]
