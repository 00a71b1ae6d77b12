"""How many keys each query sees, from the places where its row may change: between two of them no leaf does.

For masks with neighborhoods, whose tiles are many, small parts of a row each, and nearly all partial: on an image of
512 x 512, 79,000 tiles of 64 x 64, no two alike, took 75 s pair by pair; 16 places a row take 0.3 s. Other masks' tiles
are few, or alike, and plans have them.
"""

import torch

from scalekern.masks import _code
from scalekern.masks._code import ALL, AND, BELOW, BLOCKS, CAUSAL, NEIGHBOR, PREFIX, ROWS, WINDOW

_ROWS = 1 << 14  # at once
_MOST = 256  # places in a row


def counts(code, q_len, kv_len):
    """(int64 (Lq,) of each (batch, head) in order, as an iterator), or None where plans are to be asked."""
    programs, batches = _code.read(code)
    leaves = [i for program in set(programs) for i in program.instructions if i[0] < AND]
    if not any(i[0] == NEIGHBOR for i in leaves) or not all(map(_places_known, leaves)):
        return None
    return _counts(programs, batches, q_len, kv_len)


def _counts(programs, batches, q_len, kv_len):
    known = {}
    for b in range(batches):
        for h, program in enumerate(programs):
            key = program, b if program.batched else 0
            if key not in known:
                parts = torch.arange(q_len).split(_ROWS)
                known[key] = torch.cat([_seen(program, q.view(-1, 1), torch.tensor(b), kv_len) for q in parts])
            yield known[key]


def _places_known(leaf):
    """Whether a row has few places where the leaf may change: with ends of keys by query, but not by key."""
    opcode, swap, _, _, _, _, *kernel = leaf
    if opcode == NEIGHBOR:
        return not swap and 2 * kernel[0] * (kernel[1] if kernel[3] > 1 else 1) <= _MOST
    return opcode in (ALL, CAUSAL, WINDOW, BELOW, PREFIX) or opcode in (BLOCKS, ROWS) and not swap


def _seen(program, q, b, kv_len):
    """Keys that queries q (n, 1) see."""
    places = [torch.tensor([0, kv_len])]
    for leaf in program.instructions:
        if leaf[0] < AND:
            _, swap, dx, dy, *_ = leaf
            places += [p - (dx if swap else dy) for p in _places(program.code, leaf, q + (dy if swap else dx), b)]
    places = [p.clamp(0, kv_len).expand(len(q), -1) for p in places]
    places = torch.cat(places, 1).sort(1).values
    seen = program(q, places[:, :-1], b, torch.tensor(0))
    return (places.diff(dim=1) * seen).sum(1)


def _places(code, leaf, x, b):
    """Where the leaf may change along the keys' coordinate, for queries at x (n, 1) in theirs: (n or 1, any) each."""
    opcode, swap, _, _, p0, p1, *rest = leaf
    if opcode == CAUSAL:
        return [x if swap else x + 1]
    if opcode == WINDOW:
        before, after = (p1, p0) if swap else (p0, p1)
        return ([x - before] if before >= 0 else []) + ([x + after + 1] if after >= 0 else [])
    start = torch.zeros(1, 1, dtype=torch.int64)
    if opcode == BELOW and not swap:
        return [start, start + p0]
    if opcode == PREFIX and not swap:
        return [start, start + code[p0 + _code.one(b, p1)]]
    if opcode == BLOCKS:
        return [start, code[p0 + x.clamp(0, p1 - 1)].long()]
    if opcode == NEIGHBOR:
        (rows, columns), (d, e) = rest[:2], rest[2:4]
        row = _code.neighbor_bounds(x // p1, p0, rows, d)[0] + torch.arange(rows) * d
        first, last = _code.neighbor_bounds(x % p1, p1, columns, e)
        each = first + torch.arange(columns) * e
        ends = torch.cat([first, last + 1] if e == 1 else [each, each + 1], 1)
        return [(row[:, :, None] * p1 + ends[:, None, :]).flatten(1)]
    return []
