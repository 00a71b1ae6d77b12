"""What all masks can do, and how they compose; the leaves are in _leaves.

Each node evaluates itself (`_at`) in plain torch: the truth that the int32 code (_code) and the plans (_plan)
are tested against.
"""

import dataclasses
import functools

import torch

from scalekern.masks import _code, _draw, _plan
from scalekern.masks._traced import while_tracing

SHIFT_LIMIT = 1 << 29  # x - y of any two shifted positions fits an int32
LARGE = 256  # elements of a table that a repr still spells out

node = functools.partial(dataclasses.dataclass, frozen=True, eq=False, repr=False)


def remembered(method):
    """The value of a method, kept on the node by the method's name and its arguments."""

    @functools.wraps(method)
    def call(self, *args):
        memory = self.__dict__.get("_memory")
        if memory is None:
            object.__setattr__(self, "_memory", memory := {})
        key = (method.__name__, *args)
        return memory[key] if key in memory else memory.setdefault(key, method(self, *args))

    return call


def integer(name: str, argument: str, value, least: int, most: int = 2**31 - 1, note: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an integer{note}, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name}: {argument} must be an integer from {least} to {most}{note}, got {value}")
    return value


@node()
class Mask:
    """A predicate (b, h, q, k) -> bool over absolute positions; `h` is the query head.

    Masks are values: `==` and `hash` go by content, `repr` of a small one evaluates back within `scalekern.masks`, and
    `&`, `|`, `~`, `shift` and `transpose` build new ones.
    """

    # ---- composition ----

    @while_tracing
    def __and__(self, other):
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    @while_tracing
    def __or__(self, other):
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    @while_tracing
    def __invert__(self):
        return Not(self)

    def __bool__(self):
        raise TypeError("a mask has no truth value: combine masks with & | ~, not with and, or, not")

    @while_tracing
    def shift(self, dq: int, dk: int) -> "Mask":
        """The mask m with m(q, k) = self(q + dq, k + dk).

        Args:
            dq, dk: integers; `causal.shift(Lk - Lq, 0)` aligns causal to the last key instead of the first.
        Returns:
            Mask.
        Raises:
            TypeError, ValueError: dq or dk is not an integer within 2^29.
        """
        limits = (-SHIFT_LIMIT, SHIFT_LIMIT)
        return Shift(self, integer("shift", "dq", dq, *limits), integer("shift", "dk", dk, *limits))

    @while_tracing
    def transpose(self) -> "Mask":
        """The mask m with m(q, k) = self(k, q)."""
        return Transpose(self)

    # ---- value semantics ----

    def _values(self) -> tuple:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def __eq__(self, other):
        if not isinstance(other, Mask):
            return NotImplemented
        if self is other:
            return True
        same = type(self) is type(other) and hash(self) == hash(other)
        return same and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(self._values(), other._values())
        )

    @remembered
    def _hash(self) -> int:
        return hash((type(self), *(_digest(v) if isinstance(v, torch.Tensor) else v for v in self._values())))

    def __hash__(self):
        return self._hash()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_memory"}

    def __repr__(self):
        return self._text()[0]

    def _text(self) -> tuple[str, int]:
        """The expression, and how tightly it binds: 3 a call or name, 2 ~, 1 &, 0 |."""
        return f"{_name(self)}({', '.join(spell(v) for v in self._values())})", 3

    # ---- what it depends on ----

    @property
    @remembered
    def heads(self) -> int:
        """Heads that the mask tells apart; 1: all alike."""
        return max([1, *(v.heads for v in self._operands())])

    @property
    @remembered
    def batches(self) -> int:
        """Batch rows that the mask tells apart; 1: all alike."""
        return max([1, *(v.batches for v in self._operands())])

    def _operands(self) -> tuple:
        return tuple(v for v in self._values() if isinstance(v, Mask))

    def _check_operands(self):
        for what in ("heads", "batches"):
            sizes = {getattr(v, what) for v in self._operands()} - {1}
            if len(sizes) > 1:
                raise ValueError(f"{_name(self)}: operands must agree in {what}, got {sorted(sizes)}")

    def _at(self, x, y, b, h):
        """Whether (x, y) is allowed; four integer tensors that broadcast."""
        raise NotImplementedError

    # ---- dense, code, plan ----

    @_code.on_cpu
    def to_dense(self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None) -> torch.Tensor:
        """The mask as a tensor; quadratic in memory, for tests and small lengths.

        Args:
            q_len, kv_len: Lq and Lk.
            batch, heads: B and H; by default as many as the mask tells apart.
        Returns:
            bool (B, H, Lq, Lk) on the CPU; True: allowed.
        Raises:
            ValueError: batch or heads is not what the mask tells apart.
        """
        q_len, kv_len = integer("to_dense", "q_len", q_len, 0), integer("to_dense", "kv_len", kv_len, 0)
        sizes = []
        for name, asked, own in (("batch", batch, self.batches), ("heads", heads, self.heads)):
            sizes.append(own if asked is None else integer("to_dense", name, asked, 0))
            if own not in (1, sizes[-1]):
                raise ValueError(f"to_dense: {name} must be {own}, as many as the mask tells apart, got {asked}")
        b, h = torch.arange(self.batches).view(-1, 1, 1, 1), torch.arange(self.heads).view(-1, 1, 1)
        allowed = self._at(torch.arange(q_len).view(-1, 1), torch.arange(kv_len), b, h)
        return allowed.expand(self.batches, self.heads, q_len, kv_len).expand(*sizes, -1, -1).contiguous()

    def code(self, device="cpu") -> torch.Tensor:
        """The program and tables that kernels get: int32, 1-D, not to be written to.

        The same tensor at each call, and for equal masks as long as it is small: plans are kept with it.
        """
        return self._code_on(torch.device(device))

    def known_code(self, device: torch.device) -> torch.Tensor | None:
        """What `code` gave for this device, if it was asked before."""
        return self.__dict__.get("_memory", {}).get(("_code_on", device))

    @remembered
    def _code_on(self, device):
        host = self._lowered() if device.type == "cpu" else self.code()
        return _plan.interned(host, device)

    def _lowered(self):
        return _code.lower(self)

    def _shifts(self):
        """How shifts change the code; None when first asked: what is made for one shift is lowered with it faster."""
        memory = self.__dict__.setdefault("_memory", {})
        if memory.setdefault("shifts") is None:
            memory["shifts"] = _code.Shifts(self.code()) if "shifted" in memory else None
            memory["shifted"] = True
        return memory["shifts"]

    def plan(self, q_len: int, kv_len: int, block=(128, 128), device="cpu") -> "_plan.Plan":
        """Which tiles to visit; see scalekern.masks.Plan. The same object at each call, for recent lengths."""
        return _plan.plan_of(self.code(device), q_len, kv_len, block)

    # ---- questions ----

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> str:
        """ "empty", "full" or "partial": the pairs of queries [q0, q1) and keys [k0, k1), in all batches and heads."""
        at = zip(("q0", "q1", "k0", "k1"), (q0, q1, k0, k1))
        return _plan.tile(self.code(), *(integer("tile", name, p, -SHIFT_LIMIT, SHIFT_LIMIT) for name, p in at))

    @_code.on_cpu
    def row(self, q: int, kv_len: int, batch: int = 0, head: int = 0) -> list[tuple[int, int]]:
        """The keys that query q may see, as ascending intervals [start, end)."""
        integer("row", "q", q, -SHIFT_LIMIT, SHIFT_LIMIT), integer("row", "kv_len", kv_len, 0)
        for name, value, count in (("batch", batch, self.batches), ("head", head, self.heads)):
            integer("row", name, value, 0, count - 1 if count > 1 else 2**31 - 1)
        at = [torch.tensor(i) for i in (q, batch, head)]
        seen = self._at(at[0], torch.arange(kv_len), *at[1:]).expand(kv_len)
        edges = torch.diff(torch.nn.functional.pad(seen.to(torch.int8), (1, 1))).nonzero().flatten().tolist()
        return list(zip(edges[::2], edges[1::2]))

    def density(self, q_len: int, kv_len: int) -> float:
        """Allowed pairs / all pairs, over all batches and heads that the mask tells apart."""
        pairs = self.batches * self.heads * q_len * kv_len
        return self._pairs(q_len, kv_len) / pairs if pairs else 0.0

    @remembered
    def _pairs(self, q_len, kv_len):
        return _plan.allowed_pairs(self.code(), q_len, kv_len)

    def waste(self, q_len: int, kv_len: int, block=(128, 128)) -> float:
        """Pairs in the tiles that a kernel visits / allowed pairs: 1 is perfect, infinity cannot occur."""
        visited = _plan.visited_pairs(self.plan(q_len, kv_len, block))
        return visited / self._pairs(q_len, kv_len) if visited else 1.0

    def empty_rows(self, q_len: int, kv_len: int) -> torch.Tensor:
        """Queries that may see no key: bool (batches, heads, Lq), without a quadratic tensor."""
        return _plan.empty_rows(self.code(), q_len, kv_len)

    def attending_all_if_empty(self, q_len: int, kv_len: int) -> "Mask":
        """This mask, but queries that may see no key see all keys (Mask2Former's masked cross-attention)."""
        empty = self.empty_rows(q_len, kv_len)
        if not empty.any():
            return self
        from scalekern.masks._leaves import Rows  # which builds on this module

        members = tuple(self | Rows(empty[:, h].contiguous()) for h in range(empty.shape[1]))
        return members[0] if len(members) == 1 else PerHead(members)

    def show(self, q_len: int, kv_len: int, *, width: int = 64, block=None, color: bool = False) -> str:
        """A picture for a terminal, head by head where they differ: `#` full, `+` partial, `.` empty.

        Args:
            q_len, kv_len: Lq and Lk.
            width: cells across at most; ignored when block is given.
            block: the tile (queries, keys) behind a cell; by default one that fits.
            color: ANSI colours as well.
        Returns:
            str, lines of cells: queries downwards, keys to the right.
        """
        return _draw.show(self, q_len, kv_len, width=width, block=block, color=color)

    def save_png(self, path, q_len: int, kv_len: int, *, block=None) -> None:
        """Write a picture as a PNG file: full dark, partial pale, empty grey; heads side by side, batches downwards.

        Args:
            path: of the file, which appears whole.
            q_len, kv_len: Lq and Lk, at least 1.
            block: the tile (queries, keys) behind a cell; by default 128, doubled until 512 cells suffice.
        Raises:
            ValueError: a length below 1.
        """
        _draw.save_png(self, path, q_len, kv_len, block=block)


@_code.on_cpu
def _digest(table: torch.Tensor) -> tuple:
    flat = table.flatten().long()
    return tuple(table.shape), int((flat * (torch.arange(flat.numel()) * 2654435761 + 97)).sum())


def _name(node) -> str:
    return {"PerHead": "per_head", "And": "&", "Or": "|"}.get(type(node).__name__, type(node).__name__.lower())


def spell(value) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(list(value) if isinstance(value, tuple) and value and isinstance(value[0], Mask) else value)
    return repr(value.tolist()) if value.numel() <= LARGE else f"<{value.dtype} {tuple(value.shape)}>"


# ---- compositions ----


@node()
class _Pair(Mask):
    a: Mask
    b: Mask

    def __post_init__(self):
        self._check_operands()

    def _text(self):
        mine = 1 if isinstance(self, And) else 0
        (left, binds_left), (right, binds_right) = self.a._text(), self.b._text()
        left = left if binds_left >= mine else f"({left})"
        right = right if binds_right > mine else f"({right})"
        return f"{left} {_name(self)} {right}", mine


@node()
class And(_Pair):
    def _at(self, x, y, b, h):
        return self.a._at(x, y, b, h) & self.b._at(x, y, b, h)


@node()
class Or(_Pair):
    def _at(self, x, y, b, h):
        return self.a._at(x, y, b, h) | self.b._at(x, y, b, h)


class _OfOne(Mask):
    heads = property(lambda self: self.mask.heads)
    batches = property(lambda self: self.mask.batches)


@node()
class Not(_OfOne):
    mask: Mask

    def _at(self, x, y, b, h):
        return ~self.mask._at(x, y, b, h)

    def _text(self):
        text, binds = self.mask._text()
        return f"~{text if binds >= 2 else f'({text})'}", 2


@node()
class Shift(_OfOne):
    mask: Mask
    dq: int
    dk: int

    def _lowered(self):
        shifts = self.mask._shifts()
        return shifts(self.dq, self.dk) if shifts else _code.lower(self)

    def _at(self, x, y, b, h):
        return self.mask._at(x + self.dq, y + self.dk, b, h)

    def _text(self):
        text, binds = self.mask._text()
        return f"{text if binds == 3 else f'({text})'}.shift({self.dq}, {self.dk})", 3


@node()
class Transpose(_OfOne):
    mask: Mask

    def _at(self, x, y, b, h):
        return self.mask._at(y, x, b, h)

    def _text(self):
        text, binds = self.mask._text()
        return f"{text if binds == 3 else f'({text})'}.transpose()", 3


@node()
class PerHead(Mask):
    masks: tuple

    heads = property(lambda self: len(self.masks))

    def __post_init__(self):
        self._check_operands()
        for i, member in enumerate(self.masks):
            if member.heads not in (1, len(self.masks)):
                raise ValueError(f"per_head: masks[{i}] must tell 1 or {len(self.masks)} heads, got {member.heads}")

    def _operands(self):
        return self.masks

    def _at(self, x, y, b, h):
        allowed = torch.zeros((), dtype=torch.bool)
        for i, member in enumerate(self.masks):
            allowed = allowed | ((h == i) & member._at(x, y, b, h))
        return allowed
