"""What a rectangle of pairs can hold, from its corners alone: (some, every) for each of many rectangles.

some False: no pair is allowed; every True: all are; both are sound, and the rest is undecided. Exact for the plain
leaves; tables answer through minima and maxima over ranges.
"""

import math

import torch

from scalekern.masks import _code as code_of

_EXACT_TABLE = 1 << 16  # elements up to which ranges are looked up element by element
_BUCKET = 32
_EXACT_BITS = 1 << 22
_PERIOD = 64  # up to which all residues of congruences are tried


class Bounds:
    """(some, every) of a program; its range tables are built once."""

    def __init__(self, program: code_of.Program):
        self.program, self.code, self.instructions = program, program.code, program.instructions
        self.tables = {}
        steps = [i[4] for i in self.instructions if i[0] == code_of.DILATED]
        self.period = math.lcm(*steps) if steps and math.lcm(*steps) <= _PERIOD else 0

    def __call__(self, q, k, b, h):
        """q, k: (first, last) int64 tensors; b, h: int64 tensors of the same shape. Returns two bool tensors."""

        def leaf(i):
            _, swap, dx, dy, *_ = i
            x, y = (k, q) if swap else (q, k)
            return self._leaf(i, (x[0] + dx, x[1] + dx), (y[0] + dy, y[1] + dy), b, h)

        return code_of.run(self.instructions, leaf, _LOGIC)

    def periodic(self, q, k, b, h):
        """(decided, some, every): exact where `decided`, which is where congruences alone vary in a rectangle, for it
        and for each of its parts whose differences q - k meet every residue of `period`."""
        apart = torch.arange(self.period).view(-1, 1)
        decided = torch.ones_like(q[0], dtype=torch.bool)

        def leaf(i):
            opcode, swap, dx, dy, step, *_ = i
            if opcode == code_of.DILATED:
                return ((-apart if swap else apart) + dx - dy) % step == 0
            x, y = (k, q) if swap else (q, k)
            some, every = self._leaf(i, (x[0] + dx, x[1] + dx), (y[0] + dy, y[1] + dy), b, h)
            decided.logical_and_(some == every)
            return every

        allowed = code_of.run(self.instructions, leaf, code_of.LOGIC).expand(self.period, len(decided))
        return decided, allowed.any(0), allowed.all(0)

    def signature(self, q, k, b, h):
        """int64 (columns, n): rectangles with equal columns hold the same pairs, counted from their corners.

        A leaf that is undecided in a rectangle counts by the coordinates that it depends on.
        """
        columns = [q[1] - q[0], k[1] - k[0]]
        for i in self.instructions:
            if i[0] >= code_of.AND:
                continue
            opcode, swap, dx, dy, p0, *p = i
            x, y = ((k, q) if swap else (q, k))
            x, y = (x[0] + dx, x[1] + dx), (y[0] + dy, y[1] + dy)
            some, every = (side.expand_as(columns[0]) for side in self._leaf(i, x, y, b, h))
            columns.append(every + 2 * (some & ~every))
            along = x[0] - y[0]
            needed = {
                code_of.CAUSAL: (along,), code_of.WINDOW: (along,), code_of.DILATED: (along % max(p0, 1),),
                code_of.BELOW: (y[0],), code_of.PREFIX: (y[0], code_of.one(b, p[0])),
                code_of.ROWS: (x[0], code_of.one(b, p[1])),
            }  # fmt: skip
            columns += [torch.where(some & ~every, c, 0) for c in needed.get(opcode, (x[0], y[0], b, h))]
        return torch.stack([c.long() for c in columns])

    def _leaf(self, instruction, x, y, b, h):
        opcode, _, _, _, p0, p1, p2, p3, p4, p5, p6, _ = instruction
        (x0, x1), (y0, y1) = x, y
        if opcode == code_of.ALL:
            return torch.ones_like(x0, dtype=torch.bool), torch.ones_like(x0, dtype=torch.bool)
        if opcode == code_of.CAUSAL:
            return y0 <= x1, y1 <= x0
        if opcode == code_of.WINDOW:
            low, high = x0 - y1, x1 - y0
            least = low if p1 < 0 else low.clamp(min=-p1)
            most = high if p0 < 0 else high.clamp(max=p0)
            return least <= most, (least == low) & (most == high)
        if opcode == code_of.BELOW:
            return (y1 >= 0) & (y0 < p0) & (p0 > 0), (y0 >= 0) & (y1 < p0)
        if opcode == code_of.PREFIX:
            n = self.code[p0 + code_of.one(b, p1)]
            return (y1 >= 0) & (y0 < n) & (n > 0), (y0 >= 0) & (y1 < n)
        if opcode == code_of.BLOCKS:
            least, most = self._range(p0, 1, p1, b, [at.clamp(0, p1 - 1) for at in x])  # limits rise and fall
            return (x1 >= 0) & (y1 >= 0) & (y0 < most), (x0 >= 0) & (y0 >= 0) & (y1 < least)
        if opcode == code_of.SAME:
            x_low, x_high = self._range(p0, p4, p1, b, x)
            y_low, y_high = self._range(p2, p4, p3, b, y)
            some = (torch.maximum(x_low, y_low).clamp(min=0) <= torch.minimum(x_high, y_high)) & _meets(x, p1)
            one = (x_low == x_high) & (y_low == y_high) & (x_low == y_low) & (x_low >= 0)
            return some & _meets(y, p3), one & _lies(x, p1) & _lies(y, p3)
        if opcode == code_of.DILATED:
            low, high = x0 - y1, x1 - y0
            some = high - high % p0 >= low
            return some, some & (low == high) | (p0 == 1)
        if opcode == code_of.NEIGHBOR:
            return self._neighbor(instruction, x, y)
        if opcode == code_of.DENSE:
            return self._bits(instruction, x, y, b, h)
        low, high = self._range(p0, p2, p1, b, x)  # ROWS
        return (high != 0) & _meets(x, p1), (low != 0) & _lies(x, p1)

    def _remember(self, key, build):
        if key not in self.tables:
            self.tables[key] = build()
        return self.tables[key]

    def _range(self, offset, batches, T, b, x):
        """(minimum, maximum) over the part of [x0, x1] within the table."""
        ranges = self._remember((offset, T), lambda: _Ranges(self.code[offset : offset + batches * T].view(batches, T)))
        return ranges(code_of.one(b, batches), x)

    def _neighbor(self, instruction, x, y):
        _, _, _, _, H, W, *sizes = instruction
        some = _meets(x, H * W) & _meets(y, H * W)
        x, y = ([at.clamp(0, H * W - 1) for at in span] for span in (x, y))
        x_rows, y_rows = ([at // W for at in span] for span in (x, y))
        some = some & self._axis(instruction, 0, x_rows, y_rows)
        alone = (x_rows[0] == x_rows[1]) & (y_rows[0] == y_rows[1])  # columns are a range within one row alone
        some = some & (self._axis(instruction, 1, *([at % W for at in span] for span in (x, y))) | ~alone)
        return some, torch.zeros_like(some)

    def _axis(self, instruction, axis, X, Y):
        size, kernel, d = instruction[4 + axis], instruction[6 + axis], instruction[8 + axis]

        def build():
            first, last = code_of.neighbor_bounds(torch.arange(size), size, kernel, d)
            return _Ranges(first.view(1, -1)), _Ranges(last.view(1, -1))

        first, last = self._remember((size, kernel, d), build)
        row, X = torch.zeros_like(X[0]), [torch.minimum(X[0], X[1]), torch.maximum(X[0], X[1])]
        return (first(row, X)[0] <= Y[1]) & (Y[0] <= last(row, X)[1])

    def _bits(self, instruction, x, y, b, h):
        _, _, _, _, offset, M, N, B, H, by, bx, _ = instruction
        some, every, (rows, columns) = self._remember((offset, M, N), lambda: self._sums(offset, M, N, B * H))
        X, Y = [at // by for at in x], [at // bx for at in y]
        meets, lies = _meets(X, M) & _meets(Y, N), _lies(X, M) & _lies(Y, N)
        row = code_of.one(b, B) * H + code_of.one(h, H)
        i0, i1 = (at.clamp(0, M - 1) // rows for at in X)
        j0, j1 = (at.clamp(0, N - 1) // columns for at in Y)

        def count(sums):
            i, j = i1 + 1, j1 + 1
            return sums[row, i, j] - sums[row, i0, j] - sums[row, i, j0] + sums[row, i0, j0]

        return meets & (count(some) > 0), lies & (count(every) == (i1 + 1 - i0) * (j1 + 1 - j0))

    def _sums(self, offset, M, N, R):
        """Prefix sums of the cells that hold a set bit, and of those that hold no clear one; a cell's size."""
        words = (N + 31) // 32
        bits = self.code[offset : offset + R * M * words].view(R, M, words)
        if R * M * N <= _EXACT_BITS:
            cells = (bits[..., None] >> torch.arange(32, dtype=torch.int32) & 1).bool().flatten(2)[..., :N]
            sums = _prefix_sums(cells)
            return sums, sums, (1, 1)
        some, every = bits != 0, bits == -1
        if N % 32:
            tail = (1 << N % 32) - 1
            every[..., -1] = bits[..., -1] & tail == tail
        below = -M % _BUCKET
        some = torch.nn.functional.pad(some, (0, 0, 0, below)).unflatten(1, (-1, _BUCKET)).any(2)
        every = torch.nn.functional.pad(every, (0, 0, 0, below), value=True).unflatten(1, (-1, _BUCKET)).all(2)
        return _prefix_sums(some), _prefix_sums(every), (_BUCKET, 32)


def _not(value):
    some, every = value
    return ~every, ~some


_LOGIC = {
    code_of.AND: lambda a, b: (a[0] & b[0], a[1] & b[1]),
    code_of.OR: lambda a, b: (a[0] | b[0], a[1] | b[1]),
    code_of.NOT: _not,
}


def _meets(x, size: int):
    return (x[1] >= 0) & (x[0] < size)


def _lies(x, size: int):
    return (x[0] >= 0) & (x[1] < size)


def _prefix_sums(cells):
    sums = cells.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    return torch.nn.functional.pad(sums, (1, 0, 1, 0))


class _Ranges:
    """Minima and maxima of ranges of the rows of a table (R, T): two overlapping powers of two cover any range.

    Large tables are kept in buckets, whose whole content counts: a little loose, a thirty-second of the memory.
    """

    def __init__(self, table):
        self.T = table.shape[1]
        self.bucket = 1 if table.numel() <= _EXACT_TABLE else _BUCKET
        n = -(-self.T // self.bucket)
        if self.bucket > 1:
            last = table[:, -1:].expand(-1, n * self.bucket - self.T)
            table = torch.cat([table, last], 1).unflatten(1, (n, self.bucket))
            low, high = table.amin(2), table.amax(2)
        else:
            low = high = table
        self.low, self.high = ([part] for part in (low, high))
        width = 1
        while 2 * width <= n:
            for levels, pick in ((self.low, torch.minimum), (self.high, torch.maximum)):
                levels.append(pick(levels[-1], torch.roll(levels[-1], -width, 1)))
            width *= 2
        self.low, self.high = torch.stack(self.low), torch.stack(self.high)

    def __call__(self, row, x):
        first, last = (at.clamp(0, self.T - 1) // self.bucket for at in x)
        level = torch.frexp((last - first + 1).double())[1].long() - 1
        other = last + 1 - (1 << level)
        return (
            torch.minimum(self.low[level, row, first], self.low[level, row, other]),
            torch.maximum(self.high[level, row, first], self.high[level, row, other]),
        )
