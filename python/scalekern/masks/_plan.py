"""Plans: the exact list of tiles that kernels visit, from a mask's code alone.

A rectangle of tiles is decided from its corners (_bounds) or cut into four; what is left at the size of one tile
is looked at pair by pair, a few pairs first. No tensor grows with Lq x Lk; full squares stay whole until they become
runs.
"""

import collections
import ctypes
import dataclasses
import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from scalekern.masks import _code, _count
from scalekern.masks._bounds import Bounds

FULL, PARTIAL = 0, 1
_CHUNK = 1 << 16  # rectangles decided at once
_PAIRS = 1 << 20  # pairs evaluated at once
_PLANS = 64  # kept for each code
_INTERNED, _INTERNED_WORDS = 256, 4096  # codes that equal masks share
_lock = threading.RLock()
_plans = WeakTensorKeyDictionary()
_hosts = WeakTensorKeyDictionary()
_interned: collections.OrderedDict = collections.OrderedDict()


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which tiles to visit. Tensors are int32 on one device.

    The runs of query tile i for (bm, hm) are runs[ptr[j] : ptr[j + 1]] with j = (bm heads + hm) ceil(Lq / BQ) + i, rows
    (first key tile, number of tiles, kind), kind 0: every pair in range is allowed, 1: some are. Ascending and maximal;
    empty tiles are in no run. col_ptr and col_runs are the same by key tile, with runs of query tiles.
    """

    block: tuple[int, int]
    q_len: int
    kv_len: int
    batches: int
    heads: int
    ptr: torch.Tensor
    runs: torch.Tensor
    col_ptr: torch.Tensor
    col_runs: torch.Tensor

    @property
    def tiles(self) -> tuple[int, int, int]:
        """(full, partial, all) tiles over all batches and heads that the mask tells apart."""
        n_q, n_k = (-(-n // size) for n, size in zip((self.q_len, self.kv_len), self.block))
        counts = [int(self.runs[self.runs[:, 2] == kind, 1].sum()) for kind in (FULL, PARTIAL)]
        return *counts, self.batches * self.heads * n_q * n_k

    def to(self, device) -> "Plan":
        """The plan with its tensors on another device."""
        names = ("ptr", "runs", "col_ptr", "col_runs")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})


def remember_host(code: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """Note that `host` is the copy of `code` on the CPU, so that planning need not read it back."""
    with _lock:
        _hosts[code] = host
    return code


def _bytes(host: torch.Tensor) -> bytes:
    """Of its elements. Not by numpy, which torch does not require."""
    host = host.contiguous()
    return ctypes.string_at(host.data_ptr(), host.nbytes)


def interned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host`, a code on the CPU, on `device`: the tensor that was given for the same content and device, if small."""
    key = host.numel() <= _INTERNED_WORDS and (_bytes(host), device)
    with _lock:
        code = _interned.get(key)
    if code is None:
        code = host if device.type == "cpu" else remember_host(host.to(device), host)
        if key:
            with _lock:
                _interned[key] = code
                if len(_interned) > _INTERNED:
                    _interned.popitem(last=False)
    return code


def host_of(code: torch.Tensor) -> torch.Tensor:
    if code.device.type == "cpu":
        return code
    with _lock:
        if code not in _hosts:
            _hosts[code] = code.cpu()
        return _hosts[code]


def plan_of(code: torch.Tensor, q_len: int, kv_len: int, block=(128, 128)) -> Plan:
    """The plan of a mask's code.

    Args:
        code: int32 (n,), as `mask.code(device)` gives it.
        q_len, kv_len: Lq and Lk.
        block: (BQ, BK), the tile; an integer stands for both.
    Returns:
        Plan on the code's device: the same object for the same code tensor and sizes, while it is among the recent.
    Raises:
        TypeError, ValueError: code is no int32 vector, a length is negative, or block is below 1.
    """
    if not isinstance(code, torch.Tensor) or code.dtype != torch.int32 or code.dim() != 1:
        got = f"{code.dtype} {tuple(code.shape)}" if isinstance(code, torch.Tensor) else type(code).__name__
        raise TypeError(f"plan: code must be an int32 tensor of one dimension, got {got}")
    block = (block, block) if isinstance(block, int) else tuple(block) if isinstance(block, (tuple, list)) else (block,)
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"plan: block must be one or two integers of at least 1, got {block}")
    for name, n in (("q_len", q_len), ("kv_len", kv_len)):
        if not isinstance(n, int) or not 0 <= n < 1 << 29:
            raise ValueError(f"plan: {name} must be an integer from 0 to 2^29, got {n!r}")
    key = (q_len, kv_len, block)
    with _lock:
        known = _plans.setdefault(code, collections.OrderedDict())
        if key not in known:
            host = host_of(code)
            known[key] = _build(code, *key) if host is code else plan_of(host, *key).to(code.device)
            if len(known) > _PLANS:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]


# ---- deciding tiles ----


@_code.on_cpu
def _build(code, q_len, kv_len, block) -> Plan:
    programs, batches = _code.read(code)
    sizes = [-(-n // size) for n, size in zip((q_len, kv_len), block)]
    lists = {}  # of (program, batch, head) as far as they matter: forward and backward [(counts, runs), (counts, runs)]
    keys = []
    for b in range(batches):
        for h, program in enumerate(programs):
            keys.append((id(program), b if program.batched else 0, h if program.headed else 0))
    for program in dict.fromkeys(map(id, programs)):
        groups = list(dict.fromkeys(key for key in keys if key[0] == program))
        one = next(p for p in programs if id(p) == program)
        g, i, j, side, kind = descend(one, torch.tensor([key[1:] for key in groups]), q_len, kv_len, block)
        both = [_runs(g, i, j, side, kind, len(groups), *sizes), _runs(g, j, i, side, kind, len(groups), *sizes[::-1])]
        for n, key in enumerate(groups):
            lists[key] = [(counts[n], part[n]) for counts, part in both]
    tensors = []
    for way in (0, 1):
        counts = torch.cat([lists[key][way][0] for key in keys])
        ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        if int(ptr[-1]) >= 2**31:
            raise ValueError(f"plan: runs must number less than 2^31, got {int(ptr[-1])}")
        tensors += [ptr.to(torch.int32), torch.cat([lists[key][way][1] for key in keys])]
    return Plan(block, q_len, kv_len, batches, len(programs), *tensors)


def descend(program, groups, q_len, kv_len, block, origin=(0, 0)):
    """Squares of tiles that are full, or all partial, and single tiles.

    Args:
        groups: int64 (G, 2), the (batch, head) pairs to look at.
        origin: the first query and key; lengths and tiles count from there.
    Returns:
        Five int64 tensors (n,): group, first query tile, first key tile, tiles along a side, kind. Squares may reach
        past the last tile.
    """
    bounds, lengths = Bounds(program), (q_len, kv_len)
    sizes = [-(-n // size) for n, size in zip(lengths, block)]
    found = [torch.empty(5, 0, dtype=torch.int64)]
    if 0 in sizes:
        return found[0]
    level = max(0, (max(sizes) - 1).bit_length() - 3)
    start = torch.cartesian_prod(torch.arange(len(groups)), *(torch.arange(-(-n // (1 << level))) for n in sizes)).T
    work = [(level, part) for part in start.split(_CHUNK, 1)]
    while work:
        level, at = work.pop()
        side = 1 << level
        spans = [_span(at[1 + a], side * block[a], lengths[a], origin[a]) for a in (0, 1)]
        some, every = bounds(*spans, *groups[at[0]].T)
        some, every = some.expand(at.shape[1]), every.expand(at.shape[1])
        found.append(_found(at[:, every], side, FULL))
        at = at[:, some & ~every]
        if bounds.period:
            at = _settle(bounds, groups, at, side, lengths, block, origin, found)
        if level == 0:
            for part in at.split(_CHUNK, 1):
                found += _look(bounds, groups, part, lengths, block, origin)
        elif at.shape[1]:
            quarters = [(di, dj) for di in (0, 1) for dj in (0, 1)]
            children = torch.cat([torch.stack([at[0], 2 * at[1] + di, 2 * at[2] + dj]) for di, dj in quarters], 1)
            inside = (children[1] << level - 1 < sizes[0]) & (children[2] << level - 1 < sizes[1])
            work += [(level - 1, part) for part in children[:, inside].split(_CHUNK, 1)]
    return torch.cat(found, 1)


def _settle(bounds, groups, at, side, lengths, block, origin, found):
    """What is left of squares when those are found, or empty, in which congruences alone vary."""
    spans = [_span(at[1 + a], side * block[a], lengths[a], origin[a]) for a in (0, 1)]
    decided, some, every = bounds.periodic(*spans, *groups[at[0]].T)
    least = 0  # differences that the smallest tile of a square meets
    for a in (0, 1):
        cut = (at[1 + a] + 1) * side * block[a] > lengths[a]
        least = least + torch.where(cut, (lengths[a] - 1) % block[a] + 1, block[a])
    decided &= least > bounds.period
    found += [_found(at[:, decided & every], side, FULL), _found(at[:, decided & some & ~every], side, PARTIAL)]
    return at[:, ~decided]


def _span(at, size, length, origin):
    return origin + at * size, origin + ((at + 1) * size).clamp(max=length) - 1


def _found(at, side, kind):
    same = torch.ones_like(at[:1])
    return torch.cat([at[:1], at[1:] * side, same * side, same * kind])


def _look(bounds, groups, at, lengths, block, origin):
    """Single tiles, of those that look alike one, by a grid of 8 x 8 pairs first, which settles most partial ones, and
    then by all pairs."""
    first, kind = _alike(bounds, groups, at, lengths, block, origin)
    some, every = torch.zeros(2, len(first), dtype=torch.bool)
    open_ = torch.arange(len(first))
    for points in dict.fromkeys(((8, 8), block)):
        for part in open_.split(max(1, _PAIRS // (points[0] * points[1]))):
            tiles = at[:, first[part]]
            allowed = evaluate(bounds.program, groups, tiles, lengths, block, origin, points).flatten(1)
            some[part], every[part] = allowed.any(1), allowed.all(1)
        open_ = open_[some[open_] == every[open_]]
    some, every = some[kind], every[kind]
    return [_found(at[:, some & ~every], 1, PARTIAL), _found(at[:, every], 1, FULL)]


def _alike(bounds, groups, at, lengths, block, origin):
    """(of each kind of tiles one, of each tile its kind): tiles of a kind hold the same pairs."""
    spans = [_span(at[1 + a], block[a], lengths[a], origin[a]) for a in (0, 1)]
    kind = torch.zeros(at.shape[1], dtype=torch.int64)
    for column in bounds.signature(*spans, *groups[at[0]].T):
        if at.shape[1] and (low := int(column.min())) < (high := int(column.max())):
            kind = torch.unique(kind * (high - low + 1) + column - low, return_inverse=True)[1]
    first = torch.zeros(int(kind.max()) + 1 if len(kind) else 0, dtype=torch.int64)
    first[kind] = torch.arange(len(kind))  # any of them
    return first, kind


def evaluate(program, groups, at, lengths, block, origin, points):
    """bool (n, points): pairs of each tile, evenly spread; positions past the end repeat the last one."""
    q, k = (_points(*_span(at[1 + a], block[a], lengths[a], origin[a]), points[a], block[a]) for a in (0, 1))
    b, h = groups[at[0]].T.reshape(2, -1, 1, 1)
    return program(q.unsqueeze(2), k.unsqueeze(1), b, h).expand(at.shape[1], *points)


def _points(first, last, count, size):
    spread = torch.arange(count) if count == size else torch.arange(count) * (last - first).view(-1, 1) // (count - 1)
    return torch.minimum(first.view(-1, 1) + spread, last.view(-1, 1))


def _runs(g, i, j, side, kind, groups, n_i, n_j):
    """([counts (n_i,) of each group], [runs (r, 3) of each group]): maximal runs along j for every i."""
    height = torch.minimum(side, n_i - i)
    square = torch.arange(len(g)).repeat_interleave(height)
    within = torch.arange(len(square)) - (height.cumsum(0) - height)[square]
    row = g[square] * n_i + i[square] + within
    start = row * (n_j + 1) + j[square]  # one more than tiles in a row: runs of two rows never touch
    order = start.argsort()
    start, row, square = start[order], row[order], square[order]
    end = start + torch.minimum(side, n_j - j)[square]
    kind = kind[square]
    joins = (start[1:] == end[:-1]) & (kind[1:] == kind[:-1])
    first = torch.nn.functional.pad(~joins, (1, 0), value=True)[: len(start)]
    last = torch.nn.functional.pad(~joins, (0, 1), value=True)[: len(start)]
    start, end, row, kind = start[first], end[last], row[first], kind[first]
    runs = torch.stack([start - row * (n_j + 1), end - start, kind], 1).to(torch.int32)
    counts = torch.bincount(row, minlength=groups * n_i).view(groups, n_i)
    return counts, runs.split(counts.sum(1).tolist())


# ---- questions ----


@_code.on_cpu
def tile(code, q0, q1, k0, k1) -> str:
    """See Mask.tile."""
    if not (0 <= q0 < q1 and 0 <= k0 < k1):
        raise ValueError(f"tile: [q0, q1) and [k0, k1) must not be empty, got [{q0}, {q1}) and [{k0}, {k1})")
    programs, batches = _code.read(code)
    verdicts = set()
    for h, program in enumerate(programs):
        groups = torch.tensor([(b, h) for b in range(batches)])
        g, i, j, side, kind = descend(program, groups, q1 - q0, k1 - k0, (64, 64), (q0, k0))
        shape = torch.minimum(side * 64, q1 - q0 - i * 64) * torch.minimum(side * 64, k1 - k0 - j * 64)
        if (kind == PARTIAL).any():
            return "partial"
        verdicts.add(int(shape.sum()) / (batches * (q1 - q0) * (k1 - k0)))
    return {(0.0,): "empty", (1.0,): "full"}.get(tuple(verdicts), "partial")


def _listed(plan: Plan):
    """(group, query tile, key tile, number, kind) of every run; the group is bm heads + hm."""
    n_q = -(-plan.q_len // plan.block[0])
    row = torch.arange(len(plan.ptr) - 1).repeat_interleave(plan.ptr.diff().long())
    return row // max(n_q, 1), row % max(n_q, 1), *plan.runs.long().T


@_code.on_cpu
def visited_pairs(plan: Plan) -> int:
    """Pairs in range of the tiles that are not empty."""
    _, i, j, n, _ = _listed(plan)
    height = (plan.q_len - i * plan.block[0]).clamp(max=plan.block[0])
    return int((height * torch.minimum(n * plan.block[1], plan.kv_len - j * plan.block[1])).sum())


def _partial_tiles(code, plan, summary, wanted=None):
    """Chunks (tiles (3, n), summary of each) of the partial tiles; wanted: which runs.

    summary: of allowed (n, BQ, BK), False past the ends; asked once for tiles that hold the same pairs.
    """
    programs, batches = _code.read(host_of(code))
    g, i, j, n, kind = _listed(plan)
    chosen = kind == PARTIAL if wanted is None else (kind == PARTIAL) & wanted
    g, i, j, n = g[chosen], i[chosen], j[chosen], n[chosen]
    run = torch.arange(len(n)).repeat_interleave(n)
    tiles = torch.stack([g[run], i[run], j[run] + torch.arange(len(run)) - (n.cumsum(0) - n)[run]])
    groups = torch.cartesian_prod(torch.arange(batches), torch.arange(len(programs))).view(-1, 2)
    lengths, block = (plan.q_len, plan.kv_len), plan.block
    for program in dict.fromkeys(programs):
        mine = torch.tensor([p is program for p in programs]).repeat(batches)
        bounds = Bounds(program)
        for part in tiles[:, mine[tiles[0]]].split(_CHUNK, 1):
            first, kind = _alike(bounds, groups, part, lengths, block, (0, 0))
            found = []
            for some in part[:, first].split(max(1, _PAIRS // (block[0] * block[1])), 1):
                allowed = evaluate(program, groups, some, lengths, block, (0, 0), block)
                for a in (0, 1):
                    inside = some[1 + a].view(-1, 1) * block[a] + torch.arange(block[a]) < lengths[a]
                    allowed = allowed & inside.unsqueeze(2 - a)
                found.append(summary(allowed))
            if found:
                yield part, torch.cat(found)[kind]


@_code.on_cpu
def allowed_pairs(code, q_len, kv_len) -> int:
    """Allowed pairs over all batches and heads that the mask tells apart."""
    rows = _count.counts(host_of(code), q_len, kv_len)
    if rows is not None:
        return sum(int(of_one.sum()) for of_one in rows)
    plan = plan_of(code, q_len, kv_len, (64, 64))
    _, i, j, n, kind = _listed(plan)
    full = (plan.q_len - i * 64).clamp(max=64) * torch.minimum(n * 64, plan.kv_len - j * 64)
    return int(full[kind == FULL].sum()) + sum(
        int(pairs.sum()) for _, pairs in _partial_tiles(code, plan, lambda allowed: allowed.sum((1, 2)))
    )


@_code.on_cpu
def empty_rows(code, q_len, kv_len) -> torch.Tensor:
    """See Mask.empty_rows."""
    rows = _count.counts(host_of(code), q_len, kv_len)
    if rows is not None:
        programs, batches = _code.read(host_of(code))
        return torch.stack([of_one == 0 for of_one in rows]).view(batches, len(programs), q_len)
    plan = plan_of(code, q_len, kv_len, (64, 64))
    n_q = -(-q_len // 64)
    seen = torch.zeros(plan.batches * plan.heads, n_q, 64, dtype=torch.bool)
    g, i, _, _, kind = _listed(plan)
    seen[g[kind == FULL], i[kind == FULL]] = True
    for part, rows_seen in _partial_tiles(code, plan, lambda allowed: allowed.any(2), ~seen[g, i, 0]):
        rows = torch.zeros(seen.numel() // 64, 64, dtype=torch.int32)
        seen |= (rows.index_add_(0, part[0] * n_q + part[1], rows_seen.int()) > 0).view_as(seen)
    return ~seen.flatten(1)[:, :q_len].view(plan.batches, plan.heads, q_len)
