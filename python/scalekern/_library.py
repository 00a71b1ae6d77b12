"""The only caller of torch.library: schema, implementations, fake, autograd, autocast and vmap of every op."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from scalekern import _checks, _dispatch

_lib = torch.library.Library("scalekern", "DEF")  # noqa: TOR901 (lives as long as the process)
OPS: dict[str, "Op"] = {}
NO_GRADIENT = "this decoding op has no gradient; train with its sequence form"


@dataclasses.dataclass(frozen=True)
class Op:
    """One scalekern::name. Calling it goes through the dispatcher where that has something to do.

    public    the public function that it serves (scan_fwd and scan_bwd serve scan)
    empty     empty(*args) is True when the call has no work: the reference answers it, whatever its device
    flags     (place, name) of the bools among its arguments: True or False, by name, where a schema speaks for itself
    changed   how many of its first arguments it changes in place
    function  the torch.autograd.Function that it is recorded as; None if it lists tensors, or changes some in place
    """

    name: str
    public: str
    schema: str
    backends: tuple[_dispatch.Backend, ...]
    fake: Callable
    empty: Callable[..., bool]
    overload: torch._ops.OpOverload
    flags: tuple[tuple[int, str], ...]
    changed: int
    function: type | None = None

    def __call__(self, *args):
        for i, name in self.flags:
            if args[i] is not True and args[i] is not False:
                _checks.flag(self.public, name, args[i])
        if is_plain(args):  # nothing for the dispatcher to do: a small selective_scan 66 us instead of 104
            return self.run(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(self.name, args)
        if self.function and torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            return self.function.apply(*args)
        return self.overload(*args)

    def run(self, *args):
        """The implementation behind every device key: pick a backend and run it."""
        reference = self.backends[-1]
        device = args[0].device.type
        chosen = reference if self.empty(*args) else _dispatch.select(self.name, self.backends, device, args)
        outputs = chosen.run(*args)
        if self.changed:  # autograd then sees that what it kept was overwritten: 0.8 us
            torch._C._increment_version([t for t in args[: self.changed] if t is not None])
        return self._laid_out(outputs, args) if chosen is reference and outputs is not None else outputs

    def _laid_out(self, outputs, args):
        """The reference's outputs in the strides that the fake promises; kernels fill such tensors to begin with. And in
        memory of their own: of no tokens, the state after them may be the very tensor that came in."""
        single = isinstance(outputs, torch.Tensor)
        kind = type(outputs)  # a tuple, or the list of a Tensor[]
        outputs, promised = ((outputs,), (self.fake(*args),)) if single else (outputs, self.fake(*args))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        own = [o.stride() == p.stride() and o.untyped_storage().data_ptr() not in given for o, p in zip(outputs, promised)]
        outputs = [o if alone else p.copy_(o) for o, p, alone in zip(outputs, promised, own)]
        return outputs[0] if single else kind(outputs)


def define(
    public: str,
    schema: str,
    *,
    backends: tuple[_dispatch.Backend, ...],
    fake: Callable,
    empty: Callable[..., bool] = lambda *args: False,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast: tuple[str, ...] = (),
    no_gradient: str = NO_GRADIENT,
) -> Op:
    """Register scalekern::<schema>. The last backend must be the reference.

    autocast: names of the arguments that are cast to the autocast dtype; the others keep theirs.
    Without `backward` the op raises `no_gradient` when something is differentiated through it (never silently wrong).
    """
    name = schema.partition("(")[0]
    _lib.define(schema)
    overload = getattr(torch.ops.scalekern, name).default
    if backward is not None:
        setup_context, backward = _on_the_same_backend(setup_context, backward)
    arguments = overload._schema.arguments
    flags = tuple((i, a.name) for i, a in enumerate(arguments) if str(a.type) == "bool")
    op = Op(name, public, schema, backends, fake, empty, overload, flags, sum(a.is_write for a in arguments))
    for key in ("CPU", "CUDA"):
        _lib.impl(name, op.run, key)
    torch.library.register_fake(f"scalekern::{name}", fake, lib=_lib)
    mutates = overload._schema.is_mutable
    if not mutates:
        backward = backward or _no_gradient(name, no_gradient)
        if "Tensor[]" in schema:
            torch.library.register_autograd(f"scalekern::{name}", backward, setup_context=setup_context, lib=_lib)
        else:
            object.__setattr__(op, "function", _function(op, setup_context, backward))
            _lib.impl(name, _recorded(op), "Autograd", with_keyset=True)
    if autocast:
        _register_autocast(name, overload, autocast)
    if not mutates:
        torch.library.register_vmap(f"scalekern::{name}", _vmap_by_loop(overload), lib=_lib)
    OPS[name] = op
    return op


def _on_the_same_backend(setup_context: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """`with backend(...)` around a forward holds for its backward, which autograd may run in another thread."""

    def setup(ctx, inputs, output):
        ctx.backend = _dispatch.chosen_by_context()
        setup_context(ctx, inputs, output)

    def run(ctx, *grads):
        if ctx.backend is None:
            return backward(ctx, *grads)
        with _dispatch.backend(ctx.backend):
            return backward(ctx, *grads)

    return setup, run


def _function(op: Op, setup: Callable | None, gradient: Callable) -> type:
    """The op as autograd and torch.func's transforms see it."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return op.overload(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            if setup is not None:
                setup(ctx, inputs, output)

        backward = staticmethod(gradient)
        vmap = staticmethod(_vmap_by_loop(op))

    Function.__name__ = op.name
    return Function


def _recorded(op: Op) -> Callable:
    """What torch.library.register_autograd makes, less its look for defaults, which our schemas have not: that lists all
    arguments anew for each of them, 0.15 ms a call for attention's 20. And torch.func refuses what that makes."""

    def kernel(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return op.function.apply(*args)  # its forward comes back here, with gradients disabled
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _no_gradient(name: str, why: str) -> Callable:
    why = "second-order gradients are not implemented" if name.endswith("_bwd") else why

    def backward(ctx, *grads):
        raise NotImplementedError(f"{name}: {why}")

    return backward


# What the dispatcher adds to every call's keys outside of all modes, transforms and tracers, and in inference mode.
_PLAIN_KEYS = {torch._C._dispatch_tls_local_include_set().raw_repr()}
with torch.inference_mode():
    _PLAIN_KEYS.add(torch._C._dispatch_tls_local_include_set().raw_repr())
_PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN_OPTIONS = frozenset((type(None), bool, int, float, str, torch.dtype))
_keys, _any_autocast = torch._C._dispatch_tls_local_include_set, torch._C._is_any_autocast_enabled


def is_plain(args, grad: bool | None = None) -> bool:
    """Whether a call's implementation could be called at once: nothing records, casts, traces, batches or wraps it.

    grad: of a list among arguments, whether gradients are enabled, all else being asked already.
    """
    if grad is None:
        if torch.compiler.is_compiling() or _keys().raw_repr() not in _PLAIN_KEYS:
            return False
        if _any_autocast() or forward_ad._current_level >= 0:
            return False
        grad = torch.is_grad_enabled()
    for a in args:
        kind = type(a)
        if kind in _PLAIN_TENSORS:
            if grad and a.requires_grad or a.is_neg() or not (a.is_cpu or a.is_cuda):
                return False
        elif kind is tuple:
            if not is_plain(a, grad):
                return False
        elif kind not in _PLAIN_OPTIONS:
            return False
    return True


def _refuse_tangents(name: str, args) -> None:
    """torch would drop them without a word: jvp through an op of ours would be zero."""
    for a in args:
        if isinstance(a, (list, tuple)):
            _refuse_tangents(name, a)
        elif isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise NotImplementedError(f"{name}: forward-mode derivatives (jvp) are not implemented")


def _register_autocast(name: str, overload, cast_names: tuple[str, ...]) -> None:
    names = [a.name for a in overload._schema.arguments]
    positions = frozenset(names.index(n) for n in cast_names)
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def kernel_for(device_type: str) -> Callable:
        def kernel(*args):
            dtype = torch.get_autocast_dtype(device_type)
            args = [_cast(a, dtype) if i in positions else a for i, a in enumerate(args)]
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return overload(*args)

        return kernel

    _lib.impl(name, kernel_for("cpu"), "AutocastCPU")
    _lib.impl(name, kernel_for("cuda"), "AutocastCUDA")


def _cast(value, dtype: torch.dtype):
    """A tensor, or a list of tensors, in the autocast dtype; what autocast leaves alone as it is."""
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype) for v in value]
    castable = value is not None and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable else value


def differentiated(tensors) -> bool:
    """Whether a forward keeps what its backward wants. That of an exported program does not, which mostly runs without
    one (it would be computed anew): the number of a scan's checkpoints would bind it to lengths up to 64 or above."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def without_autocast(function: Callable) -> Callable:
    """For a backward out of torch's ops: called inside an autocast region, it must not be cast a second time."""

    @functools.wraps(function)
    def run(dout, *args):
        if not _any_autocast():  # leaving what is off off takes 15 us
            return function(dout, *args)
        with autocast_off(dout.device.type):
            return function(dout, *args)

    return run


def autocast_off(device_type: str):
    """For a block of torch's ops; the meta device has no autocast, nor a way to ask for none."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _vmap_by_loop(overload) -> Callable:
    """vmap as one call a slice: right for every op; an op that can fold the axis into its batch may do better."""

    def vmap(info, in_dims, *args):
        results = []
        for i in range(info.batch_size):
            results.append(overload(*[_slice(a, d, i) for a, d in zip(args, in_dims)]))
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        kind = type(results[0])
        return kind(torch.stack(r) for r in zip(*results)), kind(0 for _ in results[0])

    return vmap


def _slice(value, dim, i: int):
    if isinstance(dim, (list, tuple)):
        return [_slice(v, d, i) for v, d in zip(value, dim)]
    return value if dim is None else value.select(dim, i)


class _InferenceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, out, *inputs):
        ctx.op = op
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(f"{ctx.op}: {NO_GRADIENT}")


def detached(tensors):
    """The arguments of an in-place op without their graphs; as they are where no graph is recorded."""
    if not torch.is_grad_enabled():
        return tensors
    return tuple(t.detach() if t is not None and t.requires_grad else t for t in tensors)


def inference_only(op: str, out: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """`out` of an in-place op, which raises when somebody differentiates through it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _InferenceOnly.apply(op, out, *inputs)
    return out
