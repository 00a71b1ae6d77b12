"""Every op on its sample inputs, backend by backend, against the float64 oracle: what doctor and report build on."""

import dataclasses
import functools
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import scalekern
from scalekern import _dispatch, _library, reference, testing
from scalekern.quant import QuantizedKV

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Outcome:
    """One op, sample, dtype, device and backend. status: ok, failed, unsupported.

    error     relative L2 error of the worst output; gradient_error of the worst gradient (None: the op has none)
    reason    why it failed or is not supported
    """

    op: str
    sample: str
    backend: str
    device: str
    dtype: torch.dtype
    status: str
    error: float | None = None
    gradient_error: float | None = None
    reason: str = ""


def runnable(device: str) -> list[str]:
    """Backends that can run something on this device type here; the interpreter only where it is switched on."""
    if device == "cuda" and not torch.cuda.is_available():
        return []
    return [n for n in _dispatch.NAMES if _dispatch.unavailable(n, device) is None]


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def check(op: str, sample, backend: str, device: str, dtype=torch.float32) -> Outcome:
    """Run the op and its gradient on one backend and compare both with the oracle in float64."""
    outcome = Outcome(op, sample.name, backend, device, dtype, "ok")
    args, kwargs = sample.make(device=device, dtype=dtype)
    spec = testing.specs()[op]
    try:
        with warnings.catch_warnings(), scalekern.backend(backend):
            warnings.simplefilter("ignore")
            got, got_grads = evaluate(getattr(scalekern, op), args, kwargs, spec)
    except _dispatch.BackendError as error:
        return dataclasses.replace(outcome, status="unsupported", reason=_why(str(error), backend))
    except Exception as error:  # a broken backend is what this is here to find
        return dataclasses.replace(outcome, status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    want, want_grads = oracle(op, sample, device, dtype)
    outcome.error = _worst(got, want)
    limit = testing.TOLERANCE[dtype]
    if outcome.error > limit:
        outcome.status, outcome.reason = "failed", f"output error {outcome.error:.1e}, allowed {limit:.0e}"
    if got_grads is not None:
        outcome.gradient_error = _worst(got_grads, want_grads)
        allowed = testing.specs()[op].gradient_factor * limit
        if outcome.gradient_error > allowed:
            outcome.status = "failed"
            outcome.reason = f"gradient error {outcome.gradient_error:.1e}, allowed {allowed:.0e}"
    return outcome


@functools.lru_cache(maxsize=64)
def oracle(op: str, sample, device: str, dtype) -> tuple[tuple, tuple | None]:
    """What every backend is compared with: the same inputs in float64."""
    args, kwargs = sample.make(device=device, dtype=dtype)
    wide = [testing.upcast(a) for a in args], {k: testing.upcast(v) for k, v in kwargs.items()}
    return evaluate(getattr(reference, op), *wide, testing.specs()[op])


def _worst(got: tuple, want: tuple) -> float:
    """The largest error; a wrong number or shape of outputs is as bad as it gets."""
    try:
        return max((testing.error(a, b) for a, b in zip(got, want, strict=True)), default=0.0)
    except (AssertionError, ValueError):
        return float("inf")


def evaluate(function, args, kwargs, spec: testing.Spec) -> tuple[tuple, tuple | None]:
    """(outputs, gradients of all floating inputs for fixed output gradients); a decoding op has no gradients."""
    args = [_leaf(a, spec.trainable) for a in args]
    kwargs = {k: _leaf(v, spec.trainable) for k, v in kwargs.items()}
    outputs = function(*args, **kwargs)
    outputs = tuple(outputs.tensors().values()) if isinstance(outputs, QuantizedKV) else outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not spec.trainable:
        return (*outputs, *(args[i] for i in spec.inplace)), None
    leaves = [t for t in [*args, *kwargs.values()] if isinstance(t, torch.Tensor) and t.requires_grad]
    weights = [_fixed_like(o, i) for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    pairs = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads))
    return tuple(o.detach() for o in outputs), pairs


def _leaf(value, differentiable: bool):
    if isinstance(value, QuantizedKV):
        return value.map(torch.clone)
    if not isinstance(value, torch.Tensor):
        return value
    floating = value.is_floating_point() or value.is_complex()
    return value.detach().clone().requires_grad_(differentiable and floating)


def _fixed_like(out: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*out.shape, 2) if out.is_complex() else out.shape
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.view_as_complex(weight) if out.is_complex() else weight
    # Rounded to bfloat16 first, so that every dtype and the oracle see the same numbers.
    return weight.to(out.device, out.dtype) if out.is_complex() else weight.bfloat16().to(out.device, out.dtype)


class _Capture(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "scalekern":
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))


@functools.cache
def captured(op: str, sample, dtype=torch.float32) -> list[tuple[str, tuple]]:
    """(registered op, its arguments) of everything that one call of a public op goes through, its backward included."""
    args, kwargs = sample.make(device="cpu", dtype=dtype)
    calls: list = []
    with warnings.catch_warnings(), _Capture(calls), scalekern.backend("reference"):
        warnings.simplefilter("ignore")
        evaluate(getattr(scalekern, op), args, kwargs, testing.specs()[op])
    return calls


def explain(device: str) -> list[dict]:
    """For every registered op on this kind of device: who would run it here (None: nobody), and why not the others.

    Asked with the arguments of the op's sample inputs: the first one that reaches the op. Without a GPU the rows for
    cuda say what would run if there were one.
    """
    rows, seen = [], set()
    for op in testing.specs():
        mine = {name for name, o in _library.OPS.items() if o.public == op}
        for sample in testing.samples(op):
            if mine <= seen:
                break
            for name, args in captured(op, sample):
                if name not in seen:
                    seen.add(name)
                    rows.append(_explained(name, device, args))
    for name in _library.OPS:  # an op that no sample reaches is still listed
        if name not in seen:
            rows.append(_explained(name, device, None))
    return rows


def _explained(name: str, device: str, args) -> dict:
    found = _dispatch.explain(_library.OPS[name].backends, device, args, _dispatch.forced())
    runs = next((backend.name for backend, reason in found if reason is None), None)
    others = {b.name: reason or f"{runs} comes first" for b, reason in found if b.name != runs}
    return {"op": name, "public": _library.OPS[name].public, "device": device, "runs": runs, "others": others}


def _why(message: str, backend: str) -> str:
    """The reason of one backend out of a BackendError's list of all."""
    for part in message.partition("(")[2].rstrip(")").split("; "):
        if part.startswith(f"{backend}: "):
            return part.removeprefix(f"{backend}: ")
    return message
