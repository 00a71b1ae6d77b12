"""Every op through the contract of the design, how it is called: opcheck, torch.compile, export, autocast, vmap, CUDA
graphs, what is refused, signatures. What it computes is in test_contract.py.
"""

import contextlib
import inspect
import os
import re
import shutil

import pytest
import torch
from contract import (
    CASES,
    IDS,
    TRAINABLE,
    TRAINABLE_IDS,
    as_tuple,
    captured_calls,
    clones,
    compiled_only,
    every_case,
    every_op,
    floating,
    forward,
    gradients,
    has_backend,
    one_each,
    some_trainable,
    tensors_of,
    with_tensors,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import scalekern
from scalekern import _library, reference, testing
from scalekern.testing import assert_close


# --- the torch integration -------------------------------------------------------------------------------------------


# The last, a compilation, took 42 of 64 s on every sample. It runs on an op's last, and the tests of compiled functions
# below on one of their own; what other samples would add, the fakes of other options, the third compares.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@compiled_only
@every_case
def test_opcheck(op, sample):
    args, kwargs = sample.make()
    spec = testing.specs()[op]
    traced = not spec.through and sample is testing.samples(op)[-1]
    calls = captured_calls(op, args, kwargs)
    assert calls
    for overload, call_args in calls:
        call_args = tree_map_only(torch.Tensor, lambda a: a.detach().clone(), call_args)
        tensors = [a for a in tree_leaves(call_args) if isinstance(a, torch.Tensor)]
        differentiable = overload._schema.name.endswith("_fwd")
        for a in tensors if differentiable else ():
            if (a.is_floating_point() or a.is_complex()) and a.itemsize > 1:
                a.requires_grad_()
        checks = OPCHECKS if traced else OPCHECKS[:3]
        if any(a.is_floating_point() and a.itemsize == 1 for a in tensors):
            checks = checks[1:]  # the first compares its arguments by allclose, which torch has not for float8
        torch.library.opcheck(overload, call_args, test_utils=checks)


has_compiler = bool(os.environ.get("CXX") or shutil.which("g++"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="inductor needs g++")
# Of sizes that differ from each other: equal ones would become one symbol, and a change of one of them a recompilation.
DISTINCT = {"selective_scan": "mamba", "causal_conv1d_update": "tokens", "fft_conv": "short_filter"}


@contextlib.contextmanager
def compiling():
    """Every compilation anew: inductor's cache does not know this package's sources."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield torch._dynamo.config.patch(error_on_recompile=True)


# Inductor does all that aot_eager does and more; where another op's kernels do the work, that is a minute of small
# kernels around them.
COMPILED = [
    (op, "aot_eager" if testing.specs()[op].through or not has_compiler else "inductor")
    for op in dict.fromkeys(op for op, _ in CASES)
]


@compiled_only
@pytest.mark.parametrize("op, compiler", COMPILED)
def test_compiles_without_a_graph_break_and_for_new_sizes(op, compiler):
    function, spec = getattr(scalekern, op), testing.specs()[op]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    args, kwargs = next(s for s in testing.samples(op) if s.name == DISTINCT.get(op, s.name)).make(seed=5)
    with compiling() as never_again:
        _compare_compiled(op, compiled, args, kwargs)
        grown = _more_rows if spec.grows_by_rows or not spec.trainable else _longer
        with never_again:
            _compare_compiled(op, compiled, *grown(args, kwargs))


def _compare_compiled(op, compiled, args, kwargs):
    function = getattr(scalekern, op)
    for a, e in zip(forward(compiled, op, args, kwargs), forward(function, op, args, kwargs)):
        assert_close(a, e, tolerance=1e-6)
    if testing.specs()[op].trainable:
        _, grads = gradients(compiled, args, kwargs)
        _, eager = gradients(function, args, kwargs)
        for name, e in eager.items():
            assert_close(grads[name], e, tolerance=1e-6, what=name)


def _longer(args, kwargs):
    """The same sample with its time axis doubled, where it has one."""
    length = args[0].shape[-1]
    tensors = {
        k: torch.cat([v, v * 0.5], -1) if v.dim() > 2 and v.shape[-1] == length else v
        for k, v in tensors_of(args, kwargs).items()
    }
    return with_tensors(args, kwargs, tensors)


def _more_rows(args, kwargs):
    """The same sample with its batch doubled."""
    rows = args[0].shape[0]
    tensors = {
        k: torch.cat([v, (v * 0.5).to(v.dtype)]) if v.shape[0] == rows else v
        for k, v in tensors_of(args, kwargs).items()
    }
    return with_tensors(args, kwargs, tensors)


@compiled_only
@needs_compiler
def test_inductor_fuses_what_lies_around_the_ops():
    """Its own kernels make the ops' inputs, some of them transposed, and take their outputs, both ways."""

    def mixer(x, weight, delta, A, B, C):
        x = torch.tanh(x).transpose(1, 2)
        x = scalekern.causal_conv1d(x * 1.5, weight, activation="silu")
        B, C = torch.sin(B).transpose(1, 2), torch.cos(C).transpose(1, 2)
        return scalekern.selective_scan(x, delta.transpose(1, 2) - 1, -torch.exp(A), B, C, z=x, delta_softplus=True) * x

    def inputs(L):
        generator = torch.Generator().manual_seed(L)
        shapes = (2, L, 18), (18, 4), (2, L, 18), (18, 5), (2, L, 5), (2, L, 5)
        return [torch.randn(shape, generator=generator) for shape in shapes]

    compiled = torch.compile(mixer, fullgraph=True, dynamic=True)
    with compiling() as never_again:
        for L, guard in ((67, contextlib.nullcontext()), (131, never_again)):
            with guard:
                actual = gradients(compiled, inputs(L), {})  # (outputs, gradients)
            wanted = gradients(mixer, inputs(L), {})
            assert_close(actual[0][0], wanted[0][0], tolerance=1e-6)
            for name, e in wanted[1].items():
                assert_close(actual[1][name], e, tolerance=2e-6, what=name)


@compiled_only
@pytest.mark.parametrize("op, sample", one_each(TRAINABLE, TRAINABLE_IDS))
def test_exports(op, sample):
    args, kwargs = sample.make(seed=5)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            both = with_tensors(args, kwargs, dict(zip(tensors_of(args, kwargs), tensors)))
            return getattr(scalekern, op)(*both[0], **both[1])

    program = torch.export.export(Module(), tuple(tensors_of(args, kwargs).values()))
    for a, e in zip(
        as_tuple(program.module()(*tensors_of(args, kwargs).values())),
        as_tuple(getattr(scalekern, op)(*args, **kwargs)),
    ):
        assert_close(a, e, tolerance=1e-6)


@compiled_only
@pytest.mark.parametrize("op, sample", one_each(TRAINABLE, TRAINABLE_IDS))
def test_autocast_casts_what_is_meant_to_be_cast(op, sample):
    args, kwargs = sample.make(seed=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, grads = gradients(getattr(scalekern, op), args, kwargs)
    oracle, oracle_grads = gradients(getattr(reference, op), *clones(args, kwargs, torch.float64))
    assert outputs[0].dtype == (torch.float32 if testing.specs()[op].parameters_only else torch.bfloat16)
    assert_close(outputs[0], oracle[0], tolerance=2e-2)  # inputs and outputs are both rounded to bfloat16
    for name, e in oracle_grads.items():
        assert_close(grads[name], e, tolerance=4e-2, what=name)


@compiled_only
@pytest.mark.parametrize("op, sample", one_each(TRAINABLE, TRAINABLE_IDS))
def test_vmap_equals_a_loop(op, sample):
    calls = [sample.make(seed=s) for s in (7, 8)]
    names = list(tensors_of(*calls[0]))
    stacked = [torch.stack([tensors_of(*call)[n] for call in calls]) for n in names]

    def function(*tensors):
        both = with_tensors(*calls[0], dict(zip(names, tensors)))
        return getattr(scalekern, op)(*both[0], **both[1])

    batched = as_tuple(torch.func.vmap(function)(*stacked))
    for i, (args, kwargs) in enumerate(calls):
        for a, e in zip(batched, as_tuple(getattr(scalekern, op)(*args, **kwargs))):
            assert_close(a[i], e, tolerance=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op, sample, backend",
    [pytest.param(*case.values, backend, id=f"{case.id}-{backend}") for case in one_each(CASES, IDS)
     for backend in ("cuda", "triton") if has_backend(case.values[0], backend)
     if case.values[0] != "hstu_attention"],  # whose tiles are made from the values of its offsets
)  # fmt: skip
def test_captured_in_a_cuda_graph(op, sample, backend):
    """No host synchronization: the call is captured and its replay computes new inputs."""
    args, kwargs = sample.make(device="cuda")
    function = getattr(scalekern, op)
    with scalekern.backend(backend):
        plain = forward(function, op, args, kwargs)
        function(*clones(args, kwargs)[0], **clones(args, kwargs)[1])  # compiles outside the capture
        torch.cuda.synchronize()
        static_args, static_kwargs = clones(args, kwargs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = as_tuple(function(*static_args, **static_kwargs))
        for a, e in zip(static_args, args):
            if isinstance(a, torch.Tensor):
                a.copy_(e)
        graph.replay()
    for a, e in zip(outputs, plain):
        assert_close(a, e, tolerance=1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------


@compiled_only
@some_trainable
def test_forward_mode_is_refused(op, sample):
    """torch drops the tangents at an op without a forward-mode formula, so that a jvp would be silently zero."""
    args, kwargs = sample.make(dtype=torch.float64, seed=3)
    leaves = floating(tensors_of(args, kwargs))
    for name, leaf in leaves.items():

        def function(value, name=name):
            both = with_tensors(args, kwargs, {name: value})
            return getattr(scalekern, op)(*both[0], **both[1])

        with pytest.raises(NotImplementedError, match=r"_fwd: forward-mode derivatives \(jvp\) are not implemented$"):
            torch.func.jvp(function, (leaf,), (torch.ones_like(leaf),))


@compiled_only
@pytest.mark.parametrize("op, sample", [c for c in CASES if not testing.specs()[c[0]].trainable])
def test_differentiating_a_decoding_op_raises(op, sample):
    args, kwargs = clones(*sample.make())
    for tensor in floating(tensors_of(args, kwargs)).values():
        tensor.requires_grad_()
    args = tuple(a.detach() if i in testing.specs()[op].inplace else a for i, a in enumerate(args))
    with pytest.raises(NotImplementedError, match=rf"{op}: this \w+ op has no gradient"):
        as_tuple(getattr(scalekern, op)(*args, **kwargs))[-1].sum().backward()


@every_op
def test_a_changed_argument_has_a_new_version(op):
    """Autograd then sees that what it has kept was overwritten."""
    args, kwargs = clones(*testing.samples(op)[0].make())
    tensors = tensors_of(args, kwargs)
    before = {name: (t.clone(), t._version) for name, t in tensors.items()}
    with torch.no_grad():
        getattr(scalekern, op)(*args, **kwargs)
    changed = {name for name, t in tensors.items() if not t.equal(before[name][0])}
    assert {str(i) for i in testing.specs()[op].inplace} <= changed
    assert {name for name, t in tensors.items() if t._version > before[name][1]} == changed


@every_op
def test_flags_are_true_or_false(op):
    """Those of an op's schema, but for one whose truth decides before it: what else is wrong is said first. And those
    that change what is returned."""
    args, kwargs = testing.samples(op)[0].make()
    function = getattr(scalekern, op)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    flags = {n for o in _library.OPS.values() if o.public == op for _, n in o.flags} - {"grouped", "transposed"}
    parameters = inspect.signature(function).parameters.keys()
    for name in flags & parameters | {n for n in parameters if n.startswith("return_")}:
        for value in (1, None, "yes"):
            with pytest.raises(TypeError, match=f"^{op}: {name} must be True or False, got {value!r}$"):
                function(**given | {name: value})


def _wrong_dtype(value):
    if value.dtype == torch.int8:  # codes, in whose place an op may take numbers
        return torch.bool
    return torch.bool if value.is_floating_point() or value.is_complex() else torch.float32


def _bad_calls(op, args, kwargs):
    """{argument: calls that must all fail}, with that argument spoiled: three axes too many, a wrong dtype."""
    for name, value in tensors_of(args, kwargs).items():
        yield with_tensors(args, kwargs, {name: value.to(_wrong_dtype(value))})
        if not (testing.specs()[op].free_rank and name == "0"):
            yield with_tensors(args, kwargs, {name: value[None, None, None]})


def _resized_calls(args, kwargs):
    """For each argument, its name and calls with one of its axes a step longer; at least one of them fits nothing."""
    for name, value in tensors_of(args, kwargs).items():
        # One more sequence is no error, nor is one more bucket that all heads share.
        if name not in ("cu_seqlens", "offsets") and (name, value.dim()) != ("time_table", 1):
            yield name, [
                with_tensors(args, kwargs, {name: torch.cat([value, value.narrow(axis, 0, 1)], axis)})
                for axis in range(value.dim())
            ]


def _refusal(op, args, kwargs, fake):
    """The message with which a call is refused before anything runs, None when it is not."""
    try:
        if fake:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                tensors = {k: mode.from_tensor(v) for k, v in tensors_of(args, kwargs).items()}
                both = with_tensors(args, kwargs, tensors)
                getattr(scalekern, op)(*both[0], **both[1])
        else:
            getattr(scalekern, op)(*args, **kwargs)
    except (ValueError, TypeError) as refused:
        return str(refused)
    return None


@compiled_only
@every_case
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_bad_input_is_named(op, sample, fake):
    """The op, an argument and what was expected and got are in the message; the fake says the same."""
    args, kwargs = sample.make(seed=11)
    messages = [_refusal(op, *call, fake) for call in _bad_calls(op, args, kwargs)]
    for name, calls in _resized_calls(args, kwargs):
        refusals = [m for m in (_refusal(op, *call, fake) for call in calls) if m is not None]
        assert refusals or len(tensors_of(args, kwargs)) == 1, f"argument {name} may have any size at all"
        messages += refusals
    for message in messages:
        assert message is not None and re.match(rf"^{op}: .*(must|need|divide|pass one).*got", message), message


@every_op
def test_not_a_tensor(op):
    args, kwargs = testing.samples(op)[0].make()
    with pytest.raises(TypeError, match=rf"{op}: \w+ must be a (torch.Tensor|QuantizedKV), got list"):
        getattr(scalekern, op)([1.0], *args[1:], **kwargs)


@every_op
def test_another_device_is_named(op):
    """Of each argument: a kernel that took it would read an address of somebody else's memory."""
    args, kwargs = testing.samples(op)[0].make()
    tensors = tensors_of(args, kwargs)
    for name, tensor in tensors.items() if len(tensors) > 1 else ():
        call = with_tensors(args, kwargs, {name: tensor.to("meta")})
        with pytest.raises(ValueError, match=rf"^{op}: [\w.\[\]]+ must be on \w+ like [\w.\[\]]+, got \w+$"):
            getattr(scalekern, op)(*call[0], **call[1])


# --- the registry itself ---------------------------------------------------------------------------------------------


def test_every_registered_op_is_public_and_sampled():
    public = {o.public if not o.name.endswith("_update") else o.name for o in _library.OPS.values()}
    assert public == {op for op, spec in testing.specs().items() if not spec.through}
    for op in testing.specs():
        assert callable(getattr(scalekern, op)) and callable(getattr(reference, op))
        assert op in scalekern.__all__ and op in reference.__all__


@every_op
def test_same_signature_as_the_oracle_and_a_real_docstring(op):
    import inspect

    assert inspect.signature(getattr(scalekern, op)) == inspect.signature(getattr(reference, op))
    doc = getattr(scalekern, op).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Source:"):
        assert part in doc
