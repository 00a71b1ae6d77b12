"""Random mask expressions, each with a predicate in plain Python that was written without looking at the masks."""

import torch

from scalekern import masks

BATCHES, HEADS = 2, 3


def leaf(r, kind: str):
    """(mask, predicate(b, h, q, k)) of one leaf with random arguments from r."""
    return LEAVES[kind](r)


def expression(r, depth: int, kinds=None):
    """kinds: of the leaves; all when None."""
    if depth == 0:
        return leaf(r, r.choice(kinds or sorted(LEAVES)))
    form = r.choice(["and", "and", "or", "or", "not", "shift", "transpose", "per_head"])
    m, f = expression(r, depth - 1, kinds)
    if form in ("and", "or"):
        other, g = expression(r, r.randrange(depth), kinds)
        if form == "and":
            return m & other, lambda b, h, q, k: f(b, h, q, k) and g(b, h, q, k)
        return m | other, lambda b, h, q, k: f(b, h, q, k) or g(b, h, q, k)
    if form == "not":
        return ~m, lambda b, h, q, k: not f(b, h, q, k)
    if form == "shift":
        dq, dk = r.randint(-20, 20), r.randint(-20, 20)
        return m.shift(dq, dk), lambda b, h, q, k: f(b, h, q + dq, k + dk)
    if form == "transpose":
        return m.transpose(), lambda b, h, q, k: f(b, h, k, q)
    members = [(m, f), *(expression(r, r.randrange(depth), kinds) for _ in range(HEADS - 1))]
    return masks.per_head([m for m, _ in members]), lambda b, h, q, k: members[h][1](b, h, q, k)


def _everything(r):
    return masks.everything, lambda b, h, q, k: True


def _causal(r):
    return masks.causal, lambda b, h, q, k: k <= q


def _window(r):
    left, right = r.choice([None, 0, 5, 60]), r.choice([-1, 0, 9, 70])
    reach = [10**9 if v in (None, -1) else v for v in (left, right)]
    return masks.window(left, right), lambda b, h, q, k: -reach[0] <= k - q <= reach[1]


def _sink(r):
    n = r.randrange(6)
    return masks.sink(n), lambda b, h, q, k: k in range(n)


def _prefix(r):
    lengths = [r.randrange(150) for _ in range(r.choice([1, BATCHES]))]
    mask = masks.prefix(lengths if r.random() < 0.5 else torch.tensor(lengths))
    return mask, lambda b, h, q, k: k in range(lengths[b % len(lengths)])


def _blocks(r):
    ends = sorted(r.sample(range(1, 200), 4))

    def allowed(b, h, q, k):
        later = [end for end in ends if end > q]
        return q >= 0 and 0 <= k < (later[0] if later else 10**9)

    return masks.blocks(ends), allowed


def _ids(r, T):
    ids = [[r.randint(-1, 3) for _ in range(T)] for _ in range(r.choice([1, BATCHES]))]
    return [sorted(row) for row in ids] if r.random() < 0.6 else ids


def _segments(r):
    ids = _ids(r, r.choice([20, 140]))
    kv_ids = ids if r.random() < 0.5 else _ids(r, 130)

    def allowed(b, h, q, k):
        rows = ids[b % len(ids)], kv_ids[b % len(kv_ids)]
        inside = q in range(len(rows[0])) and k in range(len(rows[1]))
        return inside and rows[0][q] == rows[1][k] and rows[0][q] >= 0

    return masks.segments(ids, None if kv_ids is ids else torch.tensor(kv_ids)), allowed


def _packed(r):
    bounds = [0, *sorted(r.choices(range(200), k=5))]
    of = lambda p: next((i for i in range(5) if bounds[i] <= p < bounds[i + 1]), None)
    return masks.segments(cu_seqlens=bounds), lambda b, h, q, k: of(q) is not None and of(q) == of(k)


def _dilated(r):
    step = r.randint(1, 4)
    return masks.dilated(step), lambda b, h, q, k: abs(q - k) in range(0, 10**4, step)


def _window2d(r):
    hw, size, shift = (10, 13), (r.randint(1, 4), 3), (r.randrange(4), r.randrange(3))

    def split(lo, hi, axis):  # a border between two coordinates
        return any((c - shift[axis]) % size[axis] == 0 for c in range(min(lo, hi) + 1, max(lo, hi) + 1))

    def allowed(b, h, q, k):
        if q not in range(130) or k not in range(130):
            return False
        return not split(q // 13, k // 13, 0) and not split(q % 13, k % 13, 1)

    return masks.window2d(hw, size, shift), allowed


def near(size, kernel, dilation, x, y):
    """Whether y is among the `kernel` pixels nearest to x of x's residue, along one axis."""
    group = [p for p in range(size) if p % dilation == x % dilation]
    start = min(max(group.index(x) - kernel // 2, 0), max(len(group) - kernel, 0))
    return y in group[start : start + kernel]


def _neighborhood(r):
    H, W = r.choice([(9, 14), (1, 126)])
    kernel, dilation = (r.randint(1, 4), r.randint(1, 6)), (r.randint(1, 2), r.randint(1, 3))

    def allowed(b, h, q, k):
        if q not in range(H * W) or k not in range(H * W):
            return False
        rows = near(H, kernel[0], dilation[0], q // W, k // W)
        return rows and near(W, kernel[1], dilation[1], q % W, k % W)

    return masks.neighborhood((H, W), kernel, dilation), allowed


def _dense(r):
    shape = (r.choice([1, BATCHES]), r.choice([1, HEADS]), 140, r.choice([31, 64, 133]))
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(r.randrange(10**6))) < r.choice([0.01, 0.5, 0.99])
    if shape[:2] == (1, 1) and r.random() < 0.5:
        bits[:, :, 16:64, :32] = True
    rows = bits.tolist()

    def allowed(b, h, q, k):
        inside = q in range(shape[2]) and k in range(shape[3])
        return inside and rows[b % shape[0]][h % shape[1]][q][k]

    return masks.dense(bits[0, 0] if shape[:2] == (1, 1) else bits), allowed


def _tiles(r):
    pairs, block = [(r.randrange(5), r.randrange(5)) for _ in range(8)], (r.choice([7, 32]), 16)
    return masks.tiles(pairs, block), lambda b, h, q, k: (q // block[0], k // block[1]) in pairs


def _rows(r):
    keep = [[r.random() < 0.7 for _ in range(150)] for _ in range(r.choice([1, BATCHES]))]
    return masks.rows(keep), lambda b, h, q, k: q in range(150) and keep[b % len(keep)][q]


LEAVES = {
    "everything": _everything,
    "causal": _causal,
    "window": _window,
    "sink": _sink,
    "prefix": _prefix,
    "blocks": _blocks,
    "segments": _segments,
    "packed": _packed,
    "dilated": _dilated,
    "window2d": _window2d,
    "neighborhood": _neighborhood,
    "dense": _dense,
    "tiles": _tiles,
    "rows": _rows,
}
