"""Masks as one int32 tensor, program and tables, which is what kernels get; and how to read it again.

code[0]: head programs Hp (1: all heads alike), code[1]: batches Bp that tables tell apart (1: all alike),
code[2 : 2 + Hp]: offset of each head's program. At an offset o: code[o] instructions, code[o + 1] the structure's id
(heads with the same opcodes and swaps share it), then 12 int32 an instruction: opcode, swap, dx, dy, p0 .. p7. Postfix:
leaves push, AND and OR pop two, NOT pops one. Table offsets are indices into code. A leaf sees x = (swap ? k : q) + dx
and y = (swap ? q : k) + dy.
"""

import dataclasses
import functools

import torch

ALL, CAUSAL, WINDOW, BELOW, PREFIX, BLOCKS, SAME, DILATED, NEIGHBOR, DENSE, ROWS = range(11)
AND, OR, NOT = 16, 17, 18
WORDS = 12  # int32 an instruction
INT_MAX = 2**31 - 1


def on_cpu(function):
    """`function` with the CPU as default device, whatever the caller's is: masks are made and planned there."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


# ---- lowering ----


def lower(mask) -> torch.Tensor:
    """The code of a mask, on the CPU."""
    heads = mask.heads
    tables = _Tables()
    programs = [tuple(_emit(mask, head, 0, 0, 0, tables)) for head in range(heads)]
    distinct = list(dict.fromkeys(programs))
    structures = list(dict.fromkeys(_structure(p) for p in distinct))
    offsets, end = {}, 2 + heads
    for program in distinct:
        offsets[program] = end
        end += 2 + WORDS * len(program)
    if end + tables.size > INT_MAX:
        raise ValueError(f"mask: tables must fit {INT_MAX} int32 words, got {end + tables.size}")
    head = [heads, mask.batches, *(offsets[p] for p in programs)]
    for program in distinct:
        head += [len(program), structures.index(_structure(program))]
        for opcode, swap, dx, dy, *p in program:
            p = [end + v.offset if isinstance(v, _Offset) else v for v in p]
            head += [opcode, swap, dx, dy, *p, *[0] * (8 - len(p))]
    head = torch.tensor(head, dtype=torch.int32, device="cpu")
    return torch.cat([head, *tables.parts]) if tables.parts else head


def _structure(program) -> tuple:
    return tuple((instruction[0], instruction[1]) for instruction in program)


@dataclasses.dataclass(frozen=True)
class _Offset:
    offset: int  # within the tables, which follow the programs


class _Tables:
    """The tables of a code, equal ones once."""

    def __init__(self):
        self.parts, self.size, self.known = [], 0, {}

    @on_cpu  # here alone: it makes every call in it slower, and a decoding loop lowers a mask a token
    def __call__(self, node, name: str, build) -> _Offset:
        """The place of the table called name of a node; build makes it when no equal node has done so."""
        if (node, name) not in self.known:
            part = build().to(torch.int32).flatten()
            self.known[node, name] = _Offset(self.size)
            self.parts.append(part)
            self.size += part.numel()
        return self.known[node, name]


def _emit(node, head, swap, dx, dy, tables) -> list[tuple]:
    """The instructions of a node for one head, seen through swap and shifts, which end in the leaves."""
    kind = type(node).__name__
    if kind == "PerHead":
        return _emit(node.masks[head], head, swap, dx, dy, tables)
    if kind == "Shift":
        return _emit(node.mask, head, swap, dx + node.dq, dy + node.dk, tables)
    if kind == "Transpose":
        return _emit(node.mask, head, 1 - swap, dy, dx, tables)
    if kind == "Not":
        return [*_emit(node.mask, head, swap, dx, dy, tables), (NOT, 0, 0, 0)]
    if kind in ("And", "Or"):
        sides = [_emit(side, head, swap, dx, dy, tables) for side in (node.a, node.b)]
        sides.sort(key=depth, reverse=True)  # the side that needs the deeper stack first: fewer live registers
        return [*sides[0], *sides[1], (AND if kind == "And" else OR, 0, 0, 0)]
    _check_shifts(dx, dy)
    opcode, *parameters = LEAVES[kind](node, tables)
    return [(opcode, swap, dx, dy, *parameters)]


def _check_shifts(dx, dy):
    if max(abs(dx), abs(dy)) > 1 << 29:
        raise ValueError(f"shift: shifts must sum up to at most 2^29 along an axis, got {dx} and {dy}")


class Shifts:
    """A mask's code with shifts added, in 6 us: a decoding loop shifts once a token, and lowering takes 20 to 140."""

    def __init__(self, code):
        offsets = code[2 : 2 + int(code[0])].tolist()
        end = max(offsets)
        end += 2 + WORDS * int(code[end])
        self.head, self.tables = code[:end], code[end:]
        words, self.extremes = self.head.tolist(), [[0, 0], [0, 0]]
        places = [[0] * end, [0] * end]  # 1 at the words that the shift of queries, and of keys, is added to
        for o in set(offsets):
            for i in range(o + 2, o + 2 + WORDS * words[o], WORDS):
                for side in (0, 1) if words[i] < AND else ():
                    at = i + 2 + (side ^ words[i + 1])
                    places[side][at] = 1
                    low, high = self.extremes[side]
                    self.extremes[side] = min(low, words[at]), max(high, words[at])
        self.of_q, self.of_k = (torch.tensor(p, dtype=torch.int32, device="cpu") for p in places)

    def __call__(self, dq, dk):
        for at_q, at_k in zip(*self.extremes):
            _check_shifts(at_q + dq, at_k + dk)
        head = self.head.add(self.of_q, alpha=dq).add_(self.of_k, alpha=dk)
        return torch.cat([head, self.tables]) if len(self.tables) else head


def depth(program) -> int:
    """The stack that a program needs."""
    most = now = 0
    for opcode, *_ in program:
        now += 1 if opcode < AND else 0 if opcode == NOT else -1
        most = max(most, now)
    return most


def _block_ends(node):
    starts = torch.tensor([0, *node.ends[:-1]])
    ends = torch.tensor(node.ends)
    return torch.cat([ends.repeat_interleave(ends - starts), torch.tensor([INT_MAX])])


def _segments(node, tables):
    same = torch.equal(node.ids, node.kv_ids)
    ids = tables(node, "ids", lambda: node.ids)
    kv_ids = ids if same else tables(node, "kv_ids", lambda: node.kv_ids)
    return SAME, ids, node.ids.shape[1], kv_ids, node.kv_ids.shape[1], node.ids.shape[0]


def _window2d(node, tables):
    count = node.hw[0] * node.hw[1]

    def build():
        i, j = node.window_of(torch.arange(count))
        return (i - i.min()) * (j.max() - j.min() + 1) + j - j.min()

    ids = tables(node, "ids", build)
    return SAME, ids, count, ids, count, 1


def pack(bits: torch.Tensor) -> torch.Tensor:
    """bool (..., N) as int32 (..., ceil(N / 32)): bit i % 32 of word i / 32."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = torch.zeros(bits.shape[:-1], dtype=torch.int32)
    for i in range(32):  # no int64 copy of all bits
        words |= torch.where(bits[..., i], 1 << i if i < 31 else -(1 << 31), 0).to(torch.int32)
    return words


def _dense(node, tables):
    B, H, M, N = node.allowed.shape
    return DENSE, tables(node, "bits", lambda: pack(node.allowed)), M, N, B, H, 1, 1


def _tiles(node, tables):
    return DENSE, tables(node, "bits", lambda: pack(node.grid)), *node.grid.shape, 1, 1, *node.block


LEAVES = {
    "Everything": lambda node, tables: (ALL,),
    "Causal": lambda node, tables: (CAUSAL,),
    "Window": lambda node, tables: (WINDOW, node.left, node.right),
    "Sink": lambda node, tables: (BELOW, node.n),
    "Prefix": lambda n, tables: (PREFIX, tables(n, "lengths", lambda: torch.tensor(n.lengths)), len(n.lengths)),
    "Blocks": lambda node, tables: (BLOCKS, tables(node, "ends", lambda: _block_ends(node)), node.ends[-1] + 1),
    "Limits": lambda n, tables: (BLOCKS, tables(n, "limits", lambda: n.limits), len(n.limits)),
    "Segments": _segments,
    "Window2d": _window2d,
    "Dilated": lambda node, tables: (DILATED, node.step),
    "Neighborhood": lambda node, tables: (NEIGHBOR, *node.hw, *node.kernel, *node.dilation),
    "Dense": _dense,
    "Tiles": _tiles,
    "Rows": lambda n, tables: (ROWS, tables(n, "rows", lambda: n.table), n.table.shape[1], n.table.shape[0]),
}


# ---- reading ----


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One head program: instructions as tuples, over the tables of `code` (on the CPU)."""

    code: torch.Tensor
    instructions: tuple

    @property
    def batched(self) -> bool:
        """Whether a table tells batches apart."""
        where = {PREFIX: 5, SAME: 8, DENSE: 7, ROWS: 6}
        return any(i[0] in where and i[where[i[0]]] > 1 for i in self.instructions)

    @property
    def headed(self) -> bool:
        """Whether a table tells heads apart."""
        return any(i[0] == DENSE and i[8] > 1 for i in self.instructions)

    def __call__(self, q, k, b, h) -> torch.Tensor:
        """Whether pairs are allowed: bool; q, k, b, h are int64 tensors that broadcast."""
        return run(self.instructions, lambda i: evaluate(self.code, i, *_coordinates(i, q, k), b, h), LOGIC)


LOGIC = {AND: torch.logical_and, OR: torch.logical_or, NOT: torch.logical_not}


def _coordinates(instruction, q, k):
    _, swap, dx, dy, *_ = instruction
    x, y = (k, q) if swap else (q, k)
    return x + dx, y + dy


def read(code: torch.Tensor) -> tuple[list[Program], int]:
    """(the program of each of Hp heads, equal ones the same object; Bp)"""
    heads, batches = code[:2].tolist()
    known = {}
    for o in dict.fromkeys(code[2 : 2 + heads].tolist()):
        n = int(code[o])
        rows = code[o + 2 : o + 2 + WORDS * n].view(n, WORDS).tolist()
        known[o] = Program(code, tuple(map(tuple, rows)))
    return [known[o] for o in code[2 : 2 + heads].tolist()], batches


def run(instructions, leaf, logic):
    """The postfix program over any algebra: leaf(instruction) gives a value, logic[opcode] combines values."""
    stack = []
    for instruction in instructions:
        opcode = instruction[0]
        if opcode < AND:
            stack.append(leaf(instruction))
        elif opcode == NOT:
            stack.append(logic[NOT](stack.pop()))
        else:
            right = stack.pop()
            stack.append(logic[opcode](stack.pop(), right))
    return stack.pop()


def evaluate(code, instruction, x, y, b, h) -> torch.Tensor:
    """One leaf at its own coordinates x, y."""
    opcode, _, _, _, p0, p1, p2, p3, p4, p5, p6, _ = instruction
    if opcode == ALL:
        return torch.ones((), dtype=torch.bool)
    if opcode == CAUSAL:
        return y <= x
    if opcode == WINDOW:
        left = x - y <= p0 if p0 >= 0 else torch.ones((), dtype=torch.bool)
        return left & (y - x <= p1) if p1 >= 0 else left
    if opcode == BELOW:
        return (y >= 0) & (y < p0)
    if opcode == PREFIX:
        return (y >= 0) & (y < code[p0 + one(b, p1)])
    if opcode == BLOCKS:
        return (x >= 0) & (y >= 0) & (y < code[p0 + x.clamp(0, p1 - 1)])
    if opcode == SAME:
        of_x = torch.where(within(x, p1), code[p0 + one(b, p4) * p1 + x.clamp(0, p1 - 1)], -1)
        of_y = torch.where(within(y, p3), code[p2 + one(b, p4) * p3 + y.clamp(0, p3 - 1)], -1)
        return (of_x == of_y) & (of_x >= 0)
    if opcode == DILATED:
        return (x - y) % p0 == 0
    if opcode == NEIGHBOR:
        axes = [(x // p1, y // p1, p0, p2, p4), (x % p1, y % p1, p1, p3, p5)]
        near = neighbor_axis(*axes[0]) & neighbor_axis(*axes[1])
        return near & within(x, p0 * p1) & within(y, p0 * p1)
    if opcode == DENSE:
        X, Y = x // p5, y // p6
        row = (one(b, p3) * p4 + one(h, p4)) * p1 + X.clamp(0, p1 - 1)
        bit = Y.clamp(0, p2 - 1)
        word = code[p0 + row * ((p2 + 31) // 32) + bit // 32]
        return within(X, p1) & within(Y, p2) & ((word >> (bit % 32).to(torch.int32)) & 1).bool()
    if opcode == ROWS:
        return within(x, p1) & (code[p0 + one(b, p2) * p1 + x.clamp(0, p1 - 1)] != 0)
    raise ValueError(f"mask code: opcode must be one of the algebra's, got {opcode}")


def one(index, size: int):
    """index, or 0 where there is only one."""
    return index if size > 1 else index * 0


def within(x, size: int):
    return (x >= 0) & (x < size)


def neighbor_bounds(X, size: int, kernel: int, d: int):
    """(first, last) position along an axis that X reaches; between them every d-th."""
    r, i = X % d, X // d
    n = (size - r + d - 1) // d
    start = torch.minimum((i - kernel // 2).clamp(min=0), (n - kernel).clamp(min=0))
    return start * d + r, torch.minimum(start + kernel, n) * d - d + r


def neighbor_axis(X, Y, size: int, kernel: int, d: int):
    first, last = neighbor_bounds(X, size, kernel, d)
    return (Y >= first) & (Y <= last) & ((Y - X) % d == 0)
