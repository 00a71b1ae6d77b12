"""What test_contract*.py do with every op: run it and its oracle on one sample, with gradients, and compare them."""

import functools

import pytest
import torch

import scalekern
from scalekern import _env, _library, reference, testing
from scalekern.quant import QuantizedKV

INTERPRET = _env.triton_interpret()


def backends_of(op):
    """Of all registered ops that do the work of a public one."""
    public = testing.specs()[op].through or op
    return [b for o in _library.OPS.values() if o.public == public for b in o.backends]


def has_backend(op, name):
    """Whether some registered op behind a public one has a backend of this name, be it here or not."""
    return name in {b.name for b in backends_of(op)}


# The interpreter's process runs what has a Triton kernel; of an op that is others' work, which it runs by themselves,
# one sample (three of cross_selective_scan took 32 s).
CASES = [
    (op, sample)
    for op, spec in testing.specs().items()
    for sample in (spec.samples[:1] if INTERPRET and spec.through else spec.samples)
    if not INTERPRET or has_backend(op, "triton")
]
TRAINABLE = [(op, sample) for op, sample in CASES if testing.specs()[op].trainable]
IDS = [f"{op}-{sample.name}" for op, sample in CASES]
TRAINABLE_IDS = [f"{op}-{sample.name}" for op, sample in TRAINABLE]


def composed(op):
    """Whether an op is made of other ops, each of which the interpreter tests by itself."""
    return bool(testing.specs()[op].through) or any(isinstance(b.run, functools.partial) for b in backends_of(op))


def one_each(cases, ids):
    """One case an op, for what does not depend on the sample."""
    seen, out = set(), []
    for (op, sample), name in zip(cases, ids):
        if op not in seen and not (INTERPRET and composed(op)):
            seen.add(op)
            out.append(pytest.param(op, sample, id=name))
    return out


every_case = pytest.mark.parametrize("op, sample", CASES, ids=IDS)
every_trainable = pytest.mark.parametrize("op, sample", TRAINABLE, ids=TRAINABLE_IDS)
some_case = pytest.mark.parametrize("op, sample", one_each(CASES, IDS)) if INTERPRET else every_case
some_trainable = (
    pytest.mark.parametrize("op, sample", one_each(TRAINABLE, TRAINABLE_IDS)) if INTERPRET else every_trainable
)
every_op = pytest.mark.parametrize("op", list(dict.fromkeys(op for op, _ in CASES)))
compiled_only = pytest.mark.skipif(
    INTERPRET, reason="the interpreter's process tests kernels, not the torch integration"
)


def as_tuple(outputs):
    if isinstance(outputs, QuantizedKV):
        return tuple(outputs.tensors().values())
    return outputs if isinstance(outputs, tuple) else (outputs,)


def tensors_of(args, kwargs):
    """{name: tensor} of all tensor arguments, positional ones by their number, and of caches' parts ("1.data")."""
    named = {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    caches = {k: v.tensors() for k, v in named.items() if isinstance(v, QuantizedKV)}
    parts = {f"{k}.{part}": t for k, tensors in caches.items() for part, t in tensors.items()}
    return {k: v for k, v in named.items() if isinstance(v, torch.Tensor)} | parts


def with_tensors(args, kwargs, tensors):
    def filled(name, value):
        if not isinstance(value, QuantizedKV):
            return tensors.get(name, value)
        return value.replace(**{part: tensors.get(f"{name}.{part}", t) for part, t in value.tensors().items()})

    return tuple(filled(str(i), a) for i, a in enumerate(args)), {k: filled(k, v) for k, v in kwargs.items()}


def floating(tensors):
    return {k: v for k, v in tensors.items() if v.is_floating_point() or v.is_complex()}


def clones(args, kwargs, dtype=None):
    """Fresh leaves (of the oracle's dtype if given; a quantized cache as it is): changes and gradients stay apart."""
    tensors = {
        k: (testing.upcast(v, dtype) if dtype and "." not in k else v.detach()).clone()
        for k, v in tensors_of(args, kwargs).items()
    }
    return with_tensors(args, kwargs, tensors)


def forward(function, op, args, kwargs):
    """All that a call changes or returns: outputs, then the argument that it changes in place."""
    args, kwargs = clones(args, kwargs)
    outputs = as_tuple(function(*args, **kwargs))
    return outputs + tuple(args[i] for i in testing.specs()[op].inplace)


def expected(op, args, kwargs, dtype=torch.float64):
    return forward(getattr(reference, op), op, *clones(args, kwargs, dtype))


def gradients(function, args, kwargs, weights=None):
    """(outputs, {argument: gradient}) of a random projection of the outputs, through every floating argument."""
    args, kwargs = clones(args, kwargs)
    leaves = floating(tensors_of(args, kwargs))
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = as_tuple(function(*args, **kwargs))
    return outputs, dict(zip(leaves, torch.autograd.grad(loss(outputs, weights), leaves.values(), allow_unused=True)))


def loss(outputs, weights=None):
    total = 0
    for i, out in enumerate(outputs):
        generator = torch.Generator().manual_seed(17 + i)
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
        wide = out.to(torch.complex128 if out.is_complex() else torch.float64)
        total = total + ((wide.real + wide.imag if out.is_complex() else wide) * weight).sum()
    return total


@functools.cache
def standards(op, sample, dtype, device):
    """(arguments, what the float64 oracle returns for them, what eager code of their dtype does)"""
    args, kwargs = sample.make(device=device, dtype=dtype, seed=1)
    return (args, kwargs), expected(op, args, kwargs), forward(getattr(reference, op), op, args, kwargs)


@functools.cache
def gradient_standards(op, sample, dtype, device):
    """The same for gradients, by name."""
    args, kwargs = sample.make(device=device, dtype=dtype, seed=2)
    _, oracle = gradients(getattr(reference, op), *clones(args, kwargs, torch.float64))
    return (args, kwargs), oracle, gradients(getattr(reference, op), args, kwargs)[1]


def operand_error(op, dtype, on):
    half = dtype in (torch.float16, torch.bfloat16)
    return testing.specs()[op].operand_error if half and on.backend == "triton" else 0.0


def rounding_of_saved(op, dtype):
    half = dtype in (torch.float16, torch.bfloat16)
    return testing.specs()[op].rounding_of_saved * torch.finfo(dtype).eps if half else 0.0


def check_forward(op, sample, dtype, on):
    """The outputs (and the argument changed in place) against the float64 oracle, on the backend that `on` chooses."""
    (args, kwargs), oracle, eager = standards(op, sample, dtype, on.device)
    actual = on(forward, getattr(scalekern, op), op, args, kwargs)
    assert len(actual) == len(oracle)
    for i, (a, e, plain) in enumerate(zip(actual, oracle, eager)):
        assert a.dtype == plain.dtype and a.shape == e.shape
        if not a.is_floating_point() and not a.is_complex():
            testing.assert_integers_close(a, e, off=testing.specs()[op].integers_off, what=f"output {i}")
            continue
        # An output of narrower dtype than the inputs carries its own rounding.
        own = a.dtype.to_real()
        floor = 1e-14 if dtype == own == torch.float64 else 1e-6
        bound = testing.TOLERANCE[own if dtype == torch.float64 else dtype]
        allowed = min(bound, max(2 * testing.error(plain, e) + operand_error(op, dtype, on), floor))
        testing.assert_close(a, e, tolerance=allowed, what=f"output {i}")


def check_gradients(op, sample, dtype, on):
    """The gradient of every floating argument against autograd of the float64 oracle."""
    (args, kwargs), oracle, eager = gradient_standards(op, sample, dtype, on.device)
    _, actual = on(gradients, getattr(scalekern, op), args, kwargs)
    assert set(actual) == set(oracle)
    for name, e in oracle.items():
        if e is None:
            assert actual[name] is None or not actual[name].any()
            continue
        assert actual[name].dtype == eager[name].dtype
        floor = 1e-13 if dtype == torch.float64 else 3e-6
        bound = testing.specs()[op].gradient_factor * testing.TOLERANCE[dtype]
        rounding = operand_error(op, dtype, on) + rounding_of_saved(op, dtype)
        allowed = min(bound, max(2 * testing.error(eager[name], e) + rounding, floor))
        testing.assert_close(actual[name], e, tolerance=allowed, what=f"gradient of argument {name}")


def captured_calls(op, args, kwargs):
    """The registered ops that one call, and its backward, go through, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, a=(), k=None):
            if func.namespace == "scalekern":
                calls.append((func, a))
            return func(*a, **(k or {}))

    with Capture():
        if not testing.specs()[op].trainable:
            getattr(scalekern, op)(*clones(args, kwargs)[0], **clones(args, kwargs)[1])
        else:
            gradients(getattr(scalekern, op), args, kwargs)
    return calls
