"""The leaves of the mask algebra, whose public makers are in scalekern.masks.

B batch, H heads, T positions of a table. A leaf answers for any integers x (query) and y (key), in plain torch.
"""

import torch

from scalekern.masks._nodes import LARGE, Mask, _OfOne, integer, node, spell
from scalekern.masks._traced import mask_of


@node()
class Everything(Mask):
    def _at(self, x, y, b, h):
        return torch.ones((), dtype=torch.bool)

    def _text(self):
        return "everything", 3


@node()
class Causal(Mask):
    def _at(self, x, y, b, h):
        return y <= x

    def _text(self):
        return "causal", 3


@node()
class Window(Mask):
    left: int  # -1: no limit
    right: int

    def _at(self, x, y, b, h):
        allowed = torch.ones((), dtype=torch.bool)
        if self.left >= 0:
            allowed = y >= x - self.left
        return allowed & (y <= x + self.right) if self.right >= 0 else allowed


@node()
class Sink(Mask):
    n: int

    def _at(self, x, y, b, h):
        return (y >= 0) & (y < self.n)


@node()
class Prefix(Mask):
    lengths: tuple

    batches = property(lambda self: len(self.lengths))

    def _at(self, x, y, b, h):
        return (y >= 0) & (y < torch.tensor(self.lengths)[_row(b, len(self.lengths))])

    def _text(self):
        return f"prefix({self.lengths[0] if len(self.lengths) == 1 else list(self.lengths)})", 3


@node()
class Blocks(Mask):
    ends: tuple

    def _at(self, x, y, b, h):
        ends = torch.tensor([*self.ends, 2**31 - 1])
        block = torch.searchsorted(ends[:-1], x.contiguous(), right=True)
        return (x >= 0) & (y >= 0) & (y < ends[block])

    def _text(self):
        return f"blocks({list(self.ends)})", 3


@node()
class Limits(Mask):
    """0 <= k < limits[q]; beyond the table the last."""

    limits: torch.Tensor  # int32 (Lq,)

    def _at(self, x, y, b, h):
        return (x >= 0) & (y >= 0) & (y < self.limits[x.clamp(0, len(self.limits) - 1)])


@node()
class Segments(Mask):
    ids: torch.Tensor  # int32 (B | 1, T)
    kv_ids: torch.Tensor

    batches = property(lambda self: max(self.ids.shape[0], self.kv_ids.shape[0]))

    def _at(self, x, y, b, h):
        of_x, of_y = _lookup(self.ids, b, x, -1), _lookup(self.kv_ids, b, y, -2)
        return (of_x == of_y) & (of_x >= 0)

    def _text(self):
        tables = [self.ids] if torch.equal(self.ids, self.kv_ids) else [self.ids, self.kv_ids]
        return f"segments({', '.join(spell(t[0] if len(t) == 1 else t) for t in tables)})", 3


@node()
class Dilated(Mask):
    step: int

    def _at(self, x, y, b, h):
        return (x - y) % self.step == 0


@node()
class Window2d(Mask):
    hw: tuple
    size: tuple
    shift_by: tuple

    def window_of(self, p):
        """The number of the window that position p lies in, along each axis."""
        i, j = torch.div(p, self.hw[1], rounding_mode="floor"), p % self.hw[1]
        return [torch.div(c - s, n, rounding_mode="floor") for c, s, n in zip((i, j), self.shift_by, self.size)]

    def _at(self, x, y, b, h):
        (xi, xj), (yi, yj) = self.window_of(x), self.window_of(y)
        return _inside(x, self.hw) & _inside(y, self.hw) & (xi == yi) & (xj == yj)


@node()
class Neighborhood(Mask):
    hw: tuple
    kernel: tuple
    dilation: tuple

    def _at(self, x, y, b, h):
        allowed = _inside(x, self.hw) & _inside(y, self.hw)
        w = self.hw[1]
        of_x, of_y = ((torch.div(p, w, rounding_mode="floor"), p % w) for p in (x, y))
        for X, Y, size, kernel, d in zip(of_x, of_y, self.hw, self.kernel, self.dilation):
            r = X % d
            i = torch.div(X, d, rounding_mode="floor")
            j = torch.div(Y, d, rounding_mode="floor")
            n = torch.div(size - r + d - 1, d, rounding_mode="floor")
            start = torch.minimum((i - kernel // 2).clamp(min=0), (n - kernel).clamp(min=0))
            allowed = allowed & (Y % d == r) & (j >= start) & (j < start + kernel)
        return allowed


@node()
class Dense(Mask):
    allowed: torch.Tensor  # bool (B | 1, H | 1, Lq, Lk)

    batches = property(lambda self: self.allowed.shape[0])
    heads = property(lambda self: self.allowed.shape[1])

    def _at(self, x, y, b, h):
        B, H, M, N = self.allowed.shape
        inside = (x >= 0) & (x < M) & (y >= 0) & (y < N)
        return inside & self.allowed[_row(b, B), _row(h, H), x.clamp(0, M - 1), y.clamp(0, N - 1)]

    def _text(self):
        alone = self.allowed.shape[:2] == (1, 1)
        return f"dense({spell(self.allowed[0, 0] if alone else self.allowed)})", 3


@node()
class Tiles(Mask):
    grid: torch.Tensor  # bool (query tiles, key tiles)
    block: tuple

    def _at(self, x, y, b, h):
        X, Y = (torch.div(p, size, rounding_mode="floor") for p, size in zip((x, y), self.block))
        M, N = self.grid.shape
        return (X >= 0) & (X < M) & (Y >= 0) & (Y < N) & self.grid[X.clamp(0, M - 1), Y.clamp(0, N - 1)]

    def _text(self):
        listed = self.grid.nonzero()
        pairs = [tuple(pair) for pair in listed.tolist()] if len(listed) <= LARGE else f"<{len(listed)} tiles>"
        return f"tiles({pairs}, {self.block})", 3


@node()
class Rows(Mask):
    table: torch.Tensor  # bool (B | 1, T)

    batches = property(lambda self: self.table.shape[0])

    def _at(self, x, y, b, h):
        return _lookup(self.table, b, x, False)

    def _text(self):
        return f"rows({spell(self.table[0] if len(self.table) == 1 else self.table)})", 3


@node()
class Traced(_OfOne):
    """A mask that a compiled function has made; beyond its graph, what is made of it is made of the mask itself."""

    text: str

    mask = property(lambda self: mask_of(self.text))

    def _at(self, x, y, b, h):
        return self.mask._at(x, y, b, h)

    def _lowered(self):
        return self.mask._lowered()

    def _text(self):
        return self.mask._text()


def _row(index, size):
    return index if size > 1 else torch.zeros_like(index)


def _lookup(table, b, x, outside):
    T = table.shape[1]
    return torch.where((x >= 0) & (x < T), table[_row(b, table.shape[0]), x.clamp(0, T - 1)], outside)


def _inside(p, hw):
    return (p >= 0) & (p < hw[0] * hw[1])


# ---- arguments ----


def pair(name, argument, value, least=1) -> tuple[int, int]:
    two = (value, value) if isinstance(value, int) else value
    if not isinstance(two, (tuple, list)) or len(two) != 2:
        raise TypeError(f"{name}: {argument} must be an integer or a pair of integers, got {value!r}")
    return tuple(integer(name, argument, v, least) for v in two)


def image(name, hw) -> tuple[int, int]:
    if isinstance(hw, int):
        raise TypeError(f"{name}: hw must be a pair of integers, got {hw}")
    hw = pair(name, "hw", hw)
    if hw[0] * hw[1] >= 2**31:
        raise ValueError(f"{name}: hw must have less than 2^31 positions, got {hw}")
    return hw
