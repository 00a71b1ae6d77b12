"""Which backend runs a call, and why the others do not.

An op holds a tuple of `Backend`s, best first (on a GPU that has records, `fastest.json`, written by
`python -m scalekern report`, puts the one measured fastest for a call's size in front). A call walks it: a backend is
taken when it serves the device, is available on this machine, and its `supports(*args)` returns None.
`scalekern.backend("triton")` or SCALEKERN_BACKEND narrow the walk to one; what that one cannot do is then an error.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator

import torch

from scalekern import _env, _native

NAMES = ("reference", "cpu", "triton", "cuda")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("scalekern_backend", default=None)
_warned: set[str] = set()


class BackendError(NotImplementedError):
    """No allowed backend can run this call; the message lists each one's reason."""


@dataclasses.dataclass(frozen=True, eq=False)  # itself alone: looked up in every call, by its address
class Backend:
    """One implementation of an op. `run` takes the op's arguments and returns its outputs.

    composed   of torch's own ops: it needs no library of ours
    """

    name: str
    run: Callable
    supports: Callable[..., str | None] = lambda *args: None
    composed: bool = False

    def unavailable(self, device_type: str) -> str | None:
        if self.composed:
            return None if device_type == self.name else f"serves {self.name.upper()} tensors only"
        return unavailable(self.name, device_type) or _missing(self.run)


@functools.cache
def _missing(run: Callable) -> str | None:
    """Why a native kernel is not there although its library is (an older build), else None."""
    op = getattr(run, "native_op", None)
    if op is None or hasattr(torch.ops.scalekern_native, op):
        return None
    return f"{op} is not in the library that was built (reinstall scalekern)"


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def unavailable(name: str, device_type: str) -> str | None:
    """None when backend `name` can run at all on this device type of this machine, else the reason."""
    if name == "reference":
        return None
    if name == "cpu":
        return _native.load("cpu") if device_type == "cpu" else "serves CPU tensors only"
    if name == "cuda":
        return _native.load("cuda") if device_type == "cuda" else "serves CUDA tensors only"
    if _triton_missing():
        return _triton_missing()
    if device_type == "cuda":
        return None
    return None if device_type == "cpu" and _env.triton_interpret() else "CPU tensors need TRITON_INTERPRET=1"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every scalekern op of this block on one backend: reference, cpu, triton or cuda."""
    token = force(name)
    try:
        yield
    finally:
        _forced.reset(token)


def force(name: str) -> contextvars.Token:
    """The same from here on, in this context."""
    if name not in NAMES:
        raise ValueError(f"backend: name must be one of {', '.join(NAMES)}, got {name!r}")
    return _forced.set(name)


def chosen_by_context() -> str | None:
    """The backend of the innermost `with backend(...)`, None outside of one."""
    return _forced.get()


def forced() -> str | None:
    name = _forced.get() or _env.backend()
    if name is not None and name not in NAMES:
        raise ValueError(f"SCALEKERN_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def allows(name: str) -> bool:
    """Whether a call that leaves the walk out may go to this backend."""
    return forced() in (None, name)


def explain(
    backends: tuple[Backend, ...], device_type: str, args: tuple | None, only: str | None
) -> list[tuple[Backend, str | None]]:
    """Each backend in the order of the walk with None (it can run the call, or any call for args None) or why not."""
    rows = []
    for entry in backends:
        reason = entry.unavailable(device_type)
        if reason is None and only is None and entry.name == "triton" and device_type == "cpu":
            reason = "the interpreter runs only when asked for (backend('triton'))"
        if reason is None and only is not None and entry.name != only:
            reason = f"backend {only!r} was asked for"
        if reason is None and args is not None:
            reason = entry.supports(*args)
        rows.append((entry, reason))
    return rows


@functools.cache
def _usable(backends: tuple[Backend, ...], device_type: str, only: str | None) -> tuple[Backend, ...]:
    """The backends that can run at all here, in order; what depends on the arguments is asked call by call."""
    return tuple(entry for entry, reason in explain(backends, device_type, None, only) if reason is None)


def select(op_name: str, backends: tuple[Backend, ...], device_type: str, args: tuple) -> Backend:
    only = forced()
    usable = _usable(backends, device_type, only)
    if device_type == "cuda" and only is None:
        usable = _fastest_first(op_name, usable, args[0])
    for entry in usable:
        if entry.supports(*args) is None:
            if entry.name == "reference" and only is None:
                _fell_back(op_name, backends, device_type, args)
            return entry
    reasons = "; ".join(f"{b.name}: {why}" for b, why in explain(backends, device_type, args, only))
    raise BackendError(f"{op_name}: no backend can run this call on {device_type} ({reasons})")


FASTEST = pathlib.Path(__file__).parent / "fastest.json"


@functools.cache
def _measured(device: torch.device) -> dict[str, dict[int, str]]:
    """{op: {log2 of the elements of its first argument: the backend that the records found fastest}}"""
    table = json.loads(FASTEST.read_text()) if FASTEST.exists() else {}
    found = table.get(torch.cuda.get_device_name(device), {})  # the name of a GPU takes torch microseconds
    return {op: {int(size): name for size, name in sizes.items()} for op, sizes in found.items()}


def _fastest_first(op_name: str, usable: tuple[Backend, ...], first: torch.Tensor) -> tuple[Backend, ...]:
    """The order of the tuple, with the fastest of the measured case of the nearest size in front."""
    sizes = _measured(first.device).get(op_name)
    if not sizes:
        return usable
    fastest = sizes[min(sizes, key=lambda size: abs(size - int(first.numel()).bit_length()))]
    # What that backend's kernel does not take comes to the others before torch's ops under its name.
    kernel = any(entry.name == fastest and not entry.composed for entry in usable)
    return tuple(sorted(usable, key=lambda entry: entry.name != fastest or kernel and entry.composed))


def _fell_back(op_name: str, backends: tuple[Backend, ...], device_type: str, args: tuple) -> None:
    """A call nobody asked to be slow is about to be: an error when strict on an accelerator, else one warning."""
    rows = explain(backends, device_type, args, None)
    reasons = "; ".join(f"{b.name}: {why}" for b, why in rows if why)
    if device_type != "cpu" and _env.strict():
        raise BackendError(f"{op_name}: SCALEKERN_STRICT=1 and only the reference is left ({reasons})")
    key = f"{op_name}/{device_type}"
    if reasons and key not in _warned:
        _warned.add(key)
        warnings.warn(f"{op_name}: running the slow reference on {device_type} ({reasons})", stacklevel=2)


def filling(allocate: Callable, fill: Callable) -> Callable:
    """A backend's run from a kernel that fills given outputs: fill(*outputs, *args)."""

    def run(*args):
        outputs = allocate(*args)
        fill(*(outputs if isinstance(outputs, tuple) else (outputs,)), *args)
        return outputs

    run.allocate = allocate
    run.native_op = getattr(fill, "native_op", None)
    run.triton_module = getattr(fill, "triton_module", None)
    run.fill_module = fill.__module__  # of torch code; the benchmarks' digests start from it
    return run


def composed(function: Callable, reference: Callable) -> tuple[Backend, ...]:
    """The backends of an op that is one composition of torch's ops for every device."""
    return (*(Backend(name, function, composed=True) for name in ("cuda", "cpu")), Backend("reference", reference))


def native(op: str, kind: str) -> Callable:
    """scalekern_native::<op>_<kind>, looked up at the first call (the library loads lazily)."""

    @functools.cache
    def overload():
        return getattr(torch.ops.scalekern_native, f"{op}_{kind}").default._op  # 4 us less than the overload's own call

    def call(*args):
        try:
            return overload()(*args)
        except RuntimeError as error:  # of a value that only the kernel reads: "function, file.cpp:line, op: ..."
            found = re.search(r"\.cpp:\d+, (\w+: .* must .*)", str(error))
            if found is None:
                raise
            raise ValueError(found[1]) from None

    call.native_op = f"{op}_{kind}"
    return call


def triton(module: str, function: str) -> Callable:
    """scalekern.triton_kernels.<module>.<function>, imported at the first call."""

    @functools.cache
    def launcher():
        return getattr(importlib.import_module(f"scalekern.triton_kernels.{module}"), function)

    def call(*args):
        return launcher()(*args)

    call.triton_module = f"scalekern.triton_kernels.{module}"  # the benchmarks' digests start from it
    return call
