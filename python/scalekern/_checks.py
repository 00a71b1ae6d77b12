"""Argument validation. Every message names the op, the argument, what was expected and what came."""

import functools
from collections.abc import Callable, Sequence

import torch

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)
_STRIDED = torch.strided
_PLAIN = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)


def _shape(sizes) -> str:
    return "(" + ", ".join(str(s) for s in sizes) + ("," if len(sizes) == 1 else "") + ")"


def tensor(op: str, name: str, value, *, dims: int | Sequence[int], dtypes=None) -> None:
    """`value` must be a tensor with one of these numbers of dimensions and one of these dtypes."""
    # A decoding step makes thirty checks: the usual outcome is told in one expression (0.3 us instead of 0.8).
    if isinstance(value, torch.Tensor) and value.dim() == dims and value.layout is _STRIDED:
        if dtypes is None or value.dtype in dtypes:
            return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    if value.dim() not in dims:
        expected = f"{' or '.join(str(d) for d in dims)} dimensions"
        if dims[-1] == 64:  # the most that torch has
            expected = f"at least {dims[0]} dimension{'s' * (dims[0] != 1)}"
        raise ValueError(f"{op}: {name} must have {expected}, got shape {_shape(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must have dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout is not _STRIDED:
        raise TypeError(f"{op}: {name} must be dense, got layout {str(value.layout).removeprefix('torch.')}")


def taken_by(layer) -> tuple[torch.dtype, ...]:
    """For `tensor`: the dtypes of what goes into this layer, or is multiplied with this weight, as it is.

    torch's own layers refuse another dtype than their weight's, without a word about whose input it was. What a layer
    of another kind takes (quantized, adapted), or one behind a hook, is its own affair.
    """
    plain = type(layer) in _PLAIN and not layer._forward_pre_hooks
    weight = layer if isinstance(layer, torch.Tensor) else layer.weight if plain else None
    if weight is None or weight.dtype not in FLOATING or weight.is_meta:
        return FLOATING
    return FLOATING if torch.is_autocast_enabled(weight.device.type) else (weight.dtype,)


def shape(op: str, name: str, value: torch.Tensor, *expected: Sequence[int]) -> None:
    """`value` must have one of the `expected` shapes; None in a shape stands for any size."""
    if value.shape == expected[0]:
        return
    for sizes in expected:
        # A list, and not a generator, which takes some microseconds more in every step of decoding.
        if value.dim() == len(sizes) and all([e is None or s == e for s, e in zip(value.shape, sizes)]):
            return
    wanted = " or ".join(_shape(["*" if e is None else e for e in sizes]) for sizes in expected)
    raise ValueError(f"{op}: {name} must have shape {wanted}, got {_shape(value.shape)}")


def same_device(op: str, like_name: str, like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    device = like.device
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{op}: {name} must be on {like.device} like {like_name}, got {value.device}")


def writable(op: str, name: str, value: torch.Tensor) -> None:
    """What an op changes in place: no expanded axis, along which all would write one element."""
    if 0 in value.stride() and any(s == 0 and n > 1 for n, s in zip(value.shape, value.stride())):
        raise ValueError(f"{op}: {name} is changed in place and must not be expanded, got strides {value.stride()}")


def dtype(op: str, name: str, value: torch.Tensor, *allowed: torch.dtype) -> None:
    if value.dtype not in allowed:
        expected = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must have dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")


def choice(op: str, name: str, value, allowed: Sequence) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def at_least(op: str, name: str, value, least: int) -> None:
    if not isinstance(value, int) or value < least or isinstance(value, bool):
        raise ValueError(f"{op}: {name} must be an integer of at least {least}, got {value!r}")


def flag(op: str, name: str, value) -> None:
    """Refused by name, before the schema does, which takes 2.5 and None for one as well."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def size_or_none(op: str, name: str, value) -> None:
    if value is not None:
        at_least(op, name, value, 1)


def padding(op: str, mask, x: torch.Tensor, *sizes: int) -> None:
    """`mask` (B, L), beside x, is zero where a row is padded; None is none."""
    if mask is not None:
        tensor(op, "mask", mask, dims=2, dtypes=(torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATING))
        shape(op, "mask", mask, sizes)
        same_device(op, "the input", x, mask=mask)


def number(op: str, name: str, value) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}") from None


def readable(value: torch.Tensor) -> bool:
    """Whether its values are at hand: reading them costs no synchronization, and it is no fake."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if type(value) is not torch.Tensor or torch._C._len_torch_dispatch_stack() > 0:  # a fake
        return False
    return not torch._C._functorch.is_batchedtensor(value)


def bounds(op: str, name: str, value: torch.Tensor, length) -> None:
    """Of packed sequences: (S + 1,), and, where reading them costs no synchronization, rising from 0 to `length`."""
    tensor(op, name, value, dims=1, dtypes=(torch.int32, torch.int64))
    if value.shape[0] < 1:
        raise ValueError(f"{op}: {name} must have shape (S + 1,), got (0,)")
    if not readable(value):
        return
    found = value.tolist()
    if found[0] != 0 or found[-1] != length or any(b > e for b, e in zip(found, found[1:])):
        raise ValueError(f"{op}: {name} must rise from 0 to {length}, got {found[:6]}{'...' if len(found) > 6 else ''}")


def slots(op: str, name: str, value: torch.Tensor, count: int) -> None:
    """Rows' slots of a state, in a call without work: kernels look themselves, but it goes to none."""
    if readable(value) and value.numel() > 0 and (last := int(value.max())) >= count:
        raise ValueError(f"{op}: {name} must be below {count}, got {last}")


def remembered(check: Callable) -> Callable:
    """`check` of tensors (a quantized one too, which has no layout) and None, where shapes, dtypes, devices and layouts
    decide: made once for them.

    Of a mixer's step, of 16 to 20 values, it costs 22 to 24 us to make, a good part of the step's overhead, and 8 to 11
    to look up. While compiling, and of anything else, it is made. What raises is not kept.
    """
    seen: dict[tuple, object] = {}

    @functools.wraps(check)
    def looked_up(*values):
        if torch.compiler.is_compiling():
            return check(*values)
        try:
            key = tuple([
                None if v is None else (type(v), v.shape, v.dtype, v.device, getattr(v, "layout", None)) for v in values
            ])  # fmt: skip
            if key in seen:
                return seen[key]
        except (AttributeError, TypeError):  # no tensor; sizes that are symbols
            return check(*values)
        if len(seen) > 256:
            seen.clear()
        seen[key] = check(*values)
        return seen[key]

    return looked_up
