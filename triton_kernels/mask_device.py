"""The mask of a code tensor as a device function, evaluated in registers.

A code tensor (masks.Mask.code) holds a postfix program for each head: instructions of 12 integers (opcode, swap, dx,
dy, p0 .. p7), and tables. Only a program's structure, its sequence of (opcode, swap), becomes source text; numbers
and tables are loaded from the tensor, so that another window or length runs the same binary. Heads whose structures
differ branch on the structure's id.

`functions_of(structures)` gives two device functions. `params(code_ptr, o)` loads a program's numbers once, before the
loop over tiles; `mask(code_ptr, p, b, h, q, k)` takes positions of shapes [X, 1] and [1, Y], either way round, and
gives [X, Y]. A leaf that depends on one of them alone stays a vector until it meets the other. Their source is in
linecache, as tracebacks, inspect and the compiler want it.
"""

import functools
import linecache

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from ..masks._code import (
    ALL, AND, BELOW, BLOCKS, CAUSAL, DENSE, DILATED, NEIGHBOR, NOT, OR, PREFIX, ROWS, SAME, WINDOW,
)  # fmt: skip
from ..masks._code import WORDS as INSTRUCTION
from ..masks._plan import host_of
from .common import index

# --- leaves: x plays the query, y the key -----------------------------------------------------------------------------


@triton.jit
def _causal(x, y):
    return y <= x


@triton.jit
def _window(x, y, left, right):
    # Two comparisons a pair, whatever is added is added to vectors. 2^30: farther than any two positions are apart.
    left, right = tl.where(left < 0, 2**30, left), tl.where(right < 0, 2**30, right)
    return (y >= x - left) & (y <= x + right)


@triton.jit
def _below(y, n):
    return (y >= 0) & (y < n)


@triton.jit
def _prefix(code_ptr, b, y, at, n):
    return (y >= 0) & (y < tl.load(code_ptr + at + tl.where(n == 1, 0, b)))


@triton.jit
def _blocks(code_ptr, x, y, at, n):
    end = tl.load(code_ptr + at + tl.minimum(tl.maximum(x, 0), n - 1))
    return (y >= 0) & (y < end) & (x >= 0)


@triton.jit
def _ids(code_ptr, b, x, at, n, batches):
    inside = (x >= 0) & (x < n)
    return tl.load(code_ptr + at + tl.where(batches == 1, 0, b) * n + x, mask=inside, other=-1)


@triton.jit
def _same(code_ptr, b, x, y, at_x, n_x, at_y, n_y, batches):
    found = _ids(code_ptr, b, x, at_x, n_x, batches)
    return (found == _ids(code_ptr, b, y, at_y, n_y, batches)) & (found >= 0)


@triton.jit
def _dilated(x, y, step):
    return (x % step + step) % step == (y % step + step) % step  # residues of vectors: no division a pair


@triton.jit
def _near(x, y, size, kernel, dilation):
    """Along one axis of an image: the kernel around x, moved inside, on the positions of x's residue."""
    residue = x % dilation
    i, j, n = x // dilation, y // dilation, (size - residue + dilation - 1) // dilation
    start = tl.minimum(tl.maximum(i - kernel // 2, 0), tl.maximum(n - kernel, 0))
    return (residue == y % dilation) & (j >= start) & (j < start + kernel)


@triton.jit
def _neighbor(x, y, height, width, kernel_y, kernel_x, dilation_y, dilation_x):
    size = height * width
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    down = _near(x // width, y // width, height, kernel_y, dilation_y)
    return inside & down & _near(x % width, y % width, width, kernel_x, dilation_x)


@triton.jit
def _dense(code_ptr, b, h, x, y, at, rows, columns, batches, heads, divisor_x, divisor_y):
    """One bit a pair (or a tile of divisor_x x divisor_y pairs), 32 in a word."""
    words = (columns + 31) // 32
    head = index(tl.where(batches == 1, 0, b), True) * heads + tl.where(heads == 1, 0, h)
    X, Y = x // divisor_x, y // divisor_y
    inside = (x >= 0) & (X < rows) & (y >= 0) & (Y < columns)
    # A table may pass 2^31 bits long before its words pass 2^31, but rows x words of all heads may too.
    word = tl.load(code_ptr + at + (head * rows + X) * words + Y // 32, mask=inside, other=0)
    return ((word >> (Y % 32)) & 1) != 0


@triton.jit
def _rows(code_ptr, b, x, at, n, batches):
    inside = (x >= 0) & (x < n)
    return tl.load(code_ptr + at + tl.where(batches == 1, 0, b) * n + x, mask=inside, other=0) != 0


# opcode: (device function, its arguments before the numbers, which of p0 .. p7 follow)
_LEAVES = {
    CAUSAL: (_causal, "x y", ""), WINDOW: (_window, "x y", "01"), BELOW: (_below, "y", "0"),
    PREFIX: (_prefix, "code_ptr b y", "01"), BLOCKS: (_blocks, "code_ptr x y", "01"),
    SAME: (_same, "code_ptr b x y", "01234"), DILATED: (_dilated, "x y", "0"), NEIGHBOR: (_neighbor, "x y", "012345"),
    DENSE: (_dense, "code_ptr b h x y", "0123456"), ROWS: (_rows, "code_ptr b x", "012"),
}  # fmt: skip

# --- the generated functions ------------------------------------------------------------------------------------------


def _program(structure: tuple, slots: dict) -> list[str]:
    """Statements that leave the mask in m. slots: (instruction, field) -> position in p, filled on the way."""

    def number(i, field):
        return f"p[{slots.setdefault((i, field), len(slots) + 1)}]"

    lines, stack = [], []
    for i, (opcode, swap) in enumerate(structure):
        if opcode in (AND, OR):
            right, left = stack.pop(), stack.pop()
            value = f"{left} {'&' if opcode == AND else '|'} {right}"
        elif opcode == NOT:
            value = f"~{stack.pop()}"
        elif opcode == ALL:
            value = "every"
        else:
            leaf, names, numbers = _LEAVES[opcode]
            place = {"x": f"{'k' if swap else 'q'} + {number(i, 2)}", "y": f"{'q' if swap else 'k'} + {number(i, 3)}"}
            arguments = [place.get(name, name) for name in names.split()] + [number(i, 4 + int(n)) for n in numbers]
            value = f"{leaf.__name__}({', '.join(arguments)})"
        lines.append(f"m{i} = {value}")
        stack.append(f"m{i}")
    (result,) = stack
    return [*lines, f"m = {result} & every"]


@functools.cache
def functions_of(structures: tuple) -> tuple:
    """(params, mask), device functions for programs whose structure of id i is structures[i]."""
    slots = {}
    body = ["every = (q == q) & (k == k)  # [X, Y], true: it gives the result its shape"]
    if len(structures) == 1:
        body += _program(structures[0], slots)
    else:
        body.append("m = every")
        for number, structure in enumerate(structures):
            body += [f"if p[0] == {number}:", *(f"    {line}" for line in _program(structure, slots))]
    # A slot beyond the end of a shorter program is not read.
    loads = [
        f"        tl.load(code_ptr + o + {2 + INSTRUCTION * i + field}, mask=n > {i}, other=1),  # field {field} of {i}"
        for i, field in slots
    ]
    load = ["def params(code_ptr, o):", "    n = tl.load(code_ptr + o)", "    structure = tl.load(code_ptr + o + 1)"]
    load += ["    return (", "        structure,", *loads, "    )"]
    evaluate = ["def mask(code_ptr, p, b, h, q, k):", *(f"    {line}" for line in body), "    return m"]
    text = "\n".join(["@triton.jit", *load, "", "", "@triton.jit", *evaluate, ""])
    name = f"<scalekern mask {' | '.join(' '.join(f'{o}{chr(39) * s}' for o, s in s_) for s_ in structures)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace = {"triton": triton, "tl": tl, "__name__": __name__}
    namespace |= {leaf.__name__: leaf for leaf, _, _ in _LEAVES.values()}
    exec(compile(text, name, "exec"), namespace)
    return namespace["params"], namespace["mask"]


_structures = WeakTensorKeyDictionary()


def structures_of(code: torch.Tensor) -> tuple:
    """The structures of a code tensor's programs, by their ids. Reads a tensor on a GPU back once, as its plan does."""
    if code not in _structures:
        host, found = host_of(code), {}
        for o in host[2 : 2 + int(host[0])].unique().tolist():
            n, number = host[o : o + 2].tolist()
            if number not in found:
                program = host[o + 2 : o + 2 + INSTRUCTION * n].view(n, INSTRUCTION)[:, :2]
                found[number] = tuple(map(tuple, program.tolist()))
        _structures[code] = tuple(found[number] for number in sorted(found))
    return _structures[code]
