"""The mask algebra: which queries see which keys, as small immutable values that compose.

`causal & (window(256, 0) | sink(4))` is a predicate (b, h, q, k) -> bool over absolute positions q in [0, Lq) and
k in [0, Lk), h the query head. From it come the code that kernels read (`mask.code`), exact tile lists (`mask.plan`),
pictures (`mask.show`, `mask.save_png`) and, for small lengths, a dense tensor (`mask.to_dense`).

    &  |  ~                    combine; masks that tell heads or batches apart must agree in their number
    mask.shift(dq, dk)         m(q, k) = mask(q + dq, k + dk); causal.shift(Lk - Lq, 0) is aligned bottom right
    mask.transpose()           m(q, k) = mask(k, q)

Positions may leave [0, L) after a shift; every leaf says below what it answers there. B batch, H heads, Lq and Lk
lengths, T positions of a table. Tensors are copied to the CPU once, when a mask is made.
"""

import ast
import collections.abc

import torch

from scalekern.masks import _leaves as leaves
from scalekern.masks._code import on_cpu
from scalekern.masks._nodes import Mask, PerHead, integer
from scalekern.masks._plan import Plan, plan_of
from scalekern.masks._traced import while_tracing

__all__ = [
    "Mask",
    "Plan",
    "blocks",
    "causal",
    "dense",
    "dilated",
    "everything",
    "neighborhood",
    "parse",
    "per_head",
    "plan_of",
    "prefix",
    "rows",
    "segments",
    "sink",
    "tiles",
    "window",
    "window2d",
]

everything: Mask = leaves.Everything()
causal: Mask = leaves.Causal()


@while_tracing
def window(left: int | None, right: int | None) -> Mask:
    """q - left <= k <= q + right.

    Args:
        left, right: keys before and after the query's own position; None or -1: no limit. `causal` is window(-1, 0).
    Returns:
        Mask, defined for all integer positions.
    Raises:
        TypeError, ValueError: a limit is not None or an integer of at least -1.
    """
    limits = [-1 if v is None else v for v in (left, right)]
    note = " (None or -1: no limit)"
    return leaves.Window(*(integer("window", n, v, -1, note=note) for n, v in zip(("left", "right"), limits)))


@while_tracing
def sink(n: int) -> Mask:
    """0 <= k < n: the first keys, which every query sees (attention sinks, StreamingLLM).

    Args:
        n: number of keys.
    Returns:
        Mask.
    Raises:
        TypeError, ValueError: n is not an integer of at least 0.
    """
    return leaves.Sink(integer("sink", "n", n, 0))


@while_tracing
def prefix(lengths) -> Mask:
    """0 <= k < lengths[b]: a prefix that every query sees (prefix-LM), or keys that are no padding.

    Args:
        lengths: an integer, or a list or integer tensor (B,).
    Returns:
        Mask, telling B batches apart.
    Raises:
        TypeError, ValueError: lengths is not made of integers of at least 0, or is empty.
    """
    lengths = _integers("prefix", "lengths", [lengths] if isinstance(lengths, int) else lengths, (1,))
    _require(len(lengths) > 0, "prefix", "lengths must not be empty, got []")
    return leaves.Prefix(tuple(integer("prefix", "lengths", n, 0) for n in lengths.tolist()))


@while_tracing
def blocks(ends) -> Mask:
    """Block-causal: a query sees every key up to the end of its own block (VAR, FlowAR, next-block prediction).

    Args:
        ends: where each block ends, rising integers: [1, 5, 14] has blocks [0, 1), [1, 5), [5, 14). Positions past the
            last end form one open block, which sees everything.
    Returns:
        Mask; nothing at negative positions.
    Raises:
        TypeError, ValueError: ends is not made of rising integers above 0, or is empty.
    """
    ends = _integers("blocks", "ends", ends, (1,)).tolist()
    rising = all(a < b for a, b in zip([0, *ends], ends))
    _require(rising and len(ends) > 0, "blocks", f"ends must be rising integers above 0, got {_short(ends)}")
    return leaves.Blocks(tuple(ends))


@while_tracing
def segments(ids=None, kv_ids=None, *, cu_seqlens=None, kv_cu_seqlens=None) -> Mask:
    """Query and key belong to the same segment: packed sequences, documents, padding.

    Args:
        ids: integers (T,) or (B, T), the segment of each position; a negative one matches nothing (padding).
        kv_ids: the same for keys, (S,) or (B, S); by default ids.
        cu_seqlens, kv_cu_seqlens: instead of ids, integers (segments + 1,) rising from 0: segment i is
            [cu_seqlens[i], cu_seqlens[i + 1]).
    Returns:
        Mask; nothing outside [0, T) and [0, S).
    Raises:
        TypeError, ValueError: neither or both of ids and cu_seqlens, other shapes or dtypes, batches that disagree.
    """
    _require((ids is None) != (cu_seqlens is None), "segments", "expected one of ids and cu_seqlens, got both or none")
    _require(kv_ids is None or kv_cu_seqlens is None, "segments", "expected kv_ids or kv_cu_seqlens, got both")
    if kv_cu_seqlens is not None:
        kv_ids = _ids_of("kv_cu_seqlens", kv_cu_seqlens)
    ids = _table("segments", "ids", ids if cu_seqlens is None else _ids_of("cu_seqlens", cu_seqlens), torch.int32)
    kv_ids = ids if kv_ids is None else _table("segments", "kv_ids", kv_ids, torch.int32)
    fits = ids.shape[0] == kv_ids.shape[0] or 1 in (ids.shape[0], kv_ids.shape[0])
    _require(fits, "segments", f"kv_ids must have 1 or {ids.shape[0]} batches like ids, got {kv_ids.shape[0]}")
    if ids.shape[0] != kv_ids.shape[0]:  # the code has one batch stride for both
        B = max(ids.shape[0], kv_ids.shape[0])
        ids, kv_ids = (t.expand(B, -1).contiguous() for t in (ids, kv_ids))
    return leaves.Segments(ids, kv_ids)


@while_tracing
def dilated(step: int) -> Mask:
    """q - k is a multiple of step.

    Args:
        step: at least 1.
    Returns:
        Mask, defined for all integer positions.
    Raises:
        TypeError, ValueError: step is not an integer of at least 1.
    """
    return leaves.Dilated(integer("dilated", "step", step, 1))


@while_tracing
def window2d(hw, size, shift=0) -> Mask:
    """Both positions lie in the same window of an image: Swin's windows, and its region mask after the cyclic shift.

    Windows begin at shift + i * size along each axis and do not wrap around, which is what the cyclic shift and its
    mask amount to.

    Args:
        hw: image (H, W); position p is pixel (p // W, p % W).
        size: of a window, an integer or (rows, columns).
        shift: an integer or (rows, columns), at least 0.
    Returns:
        Mask; nothing outside [0, H W).
    Raises:
        TypeError, ValueError: other sizes.
    Source: Liu et al. 2021 (Swin Transformer), section 3.2.
    """
    hw = leaves.image("window2d", hw)
    return leaves.Window2d(hw, leaves.pair("window2d", "size", size), leaves.pair("window2d", "shift", shift, 0))


@while_tracing
def neighborhood(hw, kernel, dilation=1) -> Mask:
    """Each pixel sees the kernel pixels nearest to it along each axis, moved inwards at the borders.

    Args:
        hw: image (H, W), or a length L for one axis, which is (1, L).
        kernel, dilation: an integer or (rows, columns), at least 1; with dilation d, pixels of another residue modulo d
            do not count.
    Returns:
        Mask; nothing outside [0, H W).
    Raises:
        TypeError, ValueError: other sizes.
    Source: Hassani et al. 2023 (Neighborhood Attention Transformer), section 3.1; dilation: Hassani and Shi 2022.
    """
    if isinstance(hw, int) and isinstance(kernel, int) and isinstance(dilation, int):
        hw, kernel, dilation = (1, hw), (1, kernel), (1, dilation)
    kernel, dilation = leaves.pair("neighborhood", "kernel", kernel), leaves.pair("neighborhood", "dilation", dilation)
    return leaves.Neighborhood(leaves.image("neighborhood", hw), kernel, dilation)


@while_tracing
def dense(allowed) -> Mask:
    """Any mask, given in full.

    Args:
        allowed: bool (Lq, Lk) or (B | 1, H | 1, Lq, Lk), a tensor or nested lists; True: allowed.
    Returns:
        Mask; nothing outside [0, Lq) and [0, Lk).
    Raises:
        TypeError, ValueError: another dtype or number of dimensions, or a size of 0.
    """
    allowed = _bool("dense", "allowed", allowed, (2, 4))
    return leaves.Dense(allowed.view(1, 1, *allowed.shape) if allowed.dim() == 2 else allowed)


@while_tracing
@on_cpu
def tiles(pairs, block) -> Mask:
    """Whole tiles: (q, k) is allowed where (q // block rows, k // block columns) is listed.

    Args:
        pairs: (query tile, key tile) pairs, or an integer tensor (n, 2).
        block: an integer or (rows, columns).
    Returns:
        Mask.
    Raises:
        TypeError, ValueError: pairs or block is something else, or a tile is negative.
    """
    pairs = _integers("tiles", "pairs", pairs, (1, 2))
    pairs = pairs if pairs.numel() else pairs.view(0, 2)
    fits = pairs.dim() == 2 and pairs.shape[1] == 2
    _require(fits, "tiles", f"pairs must have shape (n, 2), got {tuple(pairs.shape)}")
    _require(not (pairs < 0).any(), "tiles", f"pairs must not be negative, got {_short(pairs.tolist())}")
    grid = torch.zeros(*(pairs.amax(0) + 1).tolist() if len(pairs) else (1, 1), dtype=torch.bool)
    grid[pairs[:, 0], pairs[:, 1]] = True
    return leaves.Tiles(grid, leaves.pair("tiles", "block", block))


def per_head(masks) -> Mask:
    """Another mask for each query head (MoA).

    Args:
        masks: one mask a head; one that tells heads apart itself is asked for its own head.
    Returns:
        Mask, telling len(masks) heads apart.
    Raises:
        TypeError, ValueError: masks is empty or holds something else, or masks that disagree in heads or batches.
    """
    if not isinstance(masks, collections.abc.Iterable):
        raise TypeError(f"per_head: masks must be a list of masks, got {type(masks).__name__}")
    return _per_head(*masks)


@while_tracing
def _per_head(*masks):
    _require(len(masks) > 0, "per_head", "masks must not be empty, got []")
    for i, member in enumerate(masks):
        if not isinstance(member, Mask):
            raise TypeError(f"per_head: masks[{i}] must be a mask, got {type(member).__name__}")
    return PerHead(masks)


@while_tracing
def rows(allowed) -> Mask:
    """Queries that see every key.

    Args:
        allowed: bool (T,) or (B, T), a tensor or lists.
    Returns:
        Mask; nothing outside [0, T). `~rows(padding)` takes queries out, `rows(keep).transpose()` picks keys.
    Raises:
        TypeError, ValueError: another dtype or number of dimensions.
    """
    return leaves.Rows(_table("rows", "allowed", allowed, torch.bool))


# ---- text ----

_NAMES = set(__all__) - {"Mask", "Plan", "parse", "plan_of"}
_VALUES = {"everything": everything, "causal": causal}


def parse(text: str) -> Mask:
    """The mask that an expression means, such as "causal & (window(256, 0) | sink(4))".

    Nothing is evaluated but the names of this module, `&`, `|`, `~`, `.shift`, `.transpose` and literals.

    Args:
        text: the expression; the repr of a small mask is one.
    Returns:
        Mask.
    Raises:
        TypeError, ValueError: text is no such expression, or an argument is wrong.
    """
    if not isinstance(text, str):
        raise TypeError(f"parse: text must be a string, got {type(text).__name__}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"parse: text must be a mask expression, got {text!r}: {error}") from None
    if not isinstance(value, Mask):
        raise ValueError(f"parse: text must be a mask expression, got {text!r}, which needs arguments or is no mask")
    return value


def _value(node):
    where = ast.unparse(node)
    if isinstance(node, ast.Name):
        if node.id not in _NAMES:
            raise ValueError(f"parse: name must be one of {', '.join(sorted(_NAMES))}, got {node.id!r}")
        return _VALUES.get(node.id, globals()[node.id])
    if isinstance(node, ast.Constant) and (node.value is None or type(node.value) in (int, bool)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_of(int, _value(node.operand), where)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_of(Mask, _value(node.operand), where)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = (_of(Mask, _value(side), where) for side in (node.left, node.right))
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Call) and all(word.arg for word in node.keywords):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("shift", "transpose"):
            call = getattr(_of(Mask, _value(node.func.value), where), node.func.attr)
        else:
            call = _value(node.func) if isinstance(node.func, ast.Name) else None
        if callable(call):
            return call(*map(_value, node.args), **{word.arg: _value(word.value) for word in node.keywords})
    raise ValueError(f"parse: text must be made of masks, & | ~, calls and literals, got {where!r}")


def _of(kind, value, where):
    if not isinstance(value, kind):
        raise ValueError(f"parse: operand must be a {kind.__name__.lower()}, got {where!r}")
    return value


# ---- arguments ----


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {message}")


def _short(values: list) -> str:
    return f"{values[:6]}{'...' if len(values) > 6 else ''}".replace("]...", ", ...]")


@on_cpu
def _tensor(name, argument, value, dims, kind) -> torch.Tensor:
    """A contiguous copy on the CPU."""
    try:
        value = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError):
        got = f"a {type(value).__name__} that is no array"
        raise TypeError(f"{name}: {argument} must be a tensor or lists of {kind}, got {got}") from None
    right = value.dtype == torch.bool if kind == "bool" else not (value.dtype.is_floating_point or value.is_complex())
    if not right or (kind != "bool" and value.dtype == torch.bool and value.numel()):
        if value.numel():
            raise TypeError(f"{name}: {argument} must be made of {kind}, got {str(value.dtype).removeprefix('torch.')}")
        value = value.to(torch.bool if kind == "bool" else torch.int64)
    if value.dim() not in dims:
        expected = " or ".join(map(str, dims))
        raise ValueError(f"{name}: {argument} must have {expected} dimensions, got shape {tuple(value.shape)}")
    return value


def _integers(name, argument, value, dims) -> torch.Tensor:
    value = _tensor(name, argument, value, dims, "integers").long()
    if value.numel() and max(abs(int(value.min())), abs(int(value.max()))) > 2**31 - 1:
        raise ValueError(f"{name}: {argument} must fit int32, got {int(value.abs().max())}")
    return value


def _bool(name, argument, value, dims) -> torch.Tensor:
    value = _tensor(name, argument, value, dims, "bool")
    _require(value.numel() > 0, name, f"{argument} must not be empty, got shape {tuple(value.shape)}")
    return value


@on_cpu
def _table(name, argument, value, dtype) -> torch.Tensor:
    """(B | 1, T) of int32 or bool; no position at all is one that matches nothing."""
    check = _integers if dtype == torch.int32 else lambda *a: _tensor(*a, "bool")
    value = check(name, argument, value, (1, 2)).to(dtype)
    value = value if value.dim() == 2 else value.unsqueeze(0)
    _require(value.shape[0] > 0, name, f"{argument} must have at least one batch, got shape {tuple(value.shape)}")
    nothing = -1 if dtype == torch.int32 else False
    return value if value.shape[1] else torch.full((value.shape[0], 1), nothing, dtype=dtype)


@on_cpu
def _ids_of(argument, cu_seqlens) -> torch.Tensor:
    bounds = _integers("segments", argument, cu_seqlens, (1,))
    rising = len(bounds) > 0 and int(bounds[0]) == 0 and bool((bounds.diff() >= 0).all())
    _require(rising, "segments", f"{argument} must rise from 0, got {_short(bounds.tolist())}")
    return torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
