"""Every op through the whole contract of the design: the numbers are those of scalekern.testing."""

import contextlib
import functools
import itertools
import os
import re
import shutil

import pytest
import torch
from conftest import INTERPRET, kernel_places
from contract import (
    CASES,
    IDS,
    TRAINABLE,
    TRAINABLE_IDS,
    as_tuple,
    backends_of,
    captured_calls,
    check_forward,
    check_gradients,
    clones,
    expected,
    floating,
    forward,
    gradients,
    has_backend,
    loss,
    tensors_of,
    with_tensors,
)  # fmt: skip
from mutants import MUTANTS, NotHere, inject
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import scalekern
from scalekern import _library, reference, testing
from scalekern.testing import TOLERANCE, assert_close

# The interpreter takes seconds where a kernel takes microseconds: there every sample runs once forward and backward in
# float32, and the rest of the contract on one sample an op (the tests of the families add what is particular).
DTYPES = (torch.float32,) if INTERPRET else (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def composed(op):
    """Whether an op is made of other ops, each of which the interpreter tests by itself."""
    return bool(testing.specs()[op].through) or any(isinstance(b.run, functools.partial) for b in backends_of(op))


def small(cases, ids):
    """One case an op, for what does not depend on the sample."""
    seen, out = set(), []
    for (op, sample), name in zip(cases, ids):
        if op not in seen and not (INTERPRET and composed(op)):
            seen.add(op)
            out.append(pytest.param(op, sample, id=name))
    return out


every_case = pytest.mark.parametrize("op, sample", CASES, ids=IDS)
every_trainable = pytest.mark.parametrize("op, sample", TRAINABLE, ids=TRAINABLE_IDS)
some_case = pytest.mark.parametrize("op, sample", small(CASES, IDS)) if INTERPRET else every_case
some_trainable = (
    pytest.mark.parametrize("op, sample", small(TRAINABLE, TRAINABLE_IDS)) if INTERPRET else every_trainable
)
every_op = pytest.mark.parametrize("op", list(dict.fromkeys(op for op, _ in CASES)))
compiled_only = pytest.mark.skipif(
    INTERPRET, reason="the interpreter's process tests kernels, not the torch integration"
)


@pytest.fixture
def on(place, request):
    """on(function, ...): run it on the place's backend. on.device: where the sample's tensors belong.

    Skips nothing silently: a backend that declines a sample must say so, and only GPU kernels do, for these reasons.
    """
    device, backend = place
    params = request.node.callspec.params
    op = params["op"] if "op" in params else params["mutant"].public
    if not has_backend(op, backend):
        pytest.skip(f"{op} has no {backend} backend")

    def run(function, *args, **kwargs):
        try:
            with scalekern.backend(backend):
                return function(*args, **kwargs)
        except scalekern.BackendError as declined:
            reasons = r"a complex A|filter for every sample|u is float64|group_size is no power of two"
            assert backend in ("triton", "cuda") and re.search(reasons, str(declined)), declined
            pytest.skip(str(declined))

    run.device, run.backend = device, backend
    return run


# --- 1 and 2: the oracle and agreement with it ---------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_agrees_with_the_oracle(op, sample, dtype, on):
    check_forward(op, sample, dtype, on)


@compiled_only
@every_case
def test_a_wrong_result_would_be_seen(op, sample):
    """The mutants that a weak comparison lets pass: zeros, a permuted channel, a dropped last element."""
    args, kwargs = sample.make(dtype=torch.float32, seed=1)
    oracle = expected(op, args, kwargs)
    out = oracle[0]
    mutants = [torch.zeros_like(out), out * 1.05]
    if out.shape[1] > 1:
        mutants.append(out.roll(1, 1))
    if out.shape[-1] > 1:
        mutants.append(out.roll(1, -1))
        mutants.append(torch.cat([out[..., :-1], torch.zeros_like(out[..., -1:])], -1))
    for mutant in mutants:
        with pytest.raises(AssertionError):
            assert_close(mutant, out, tolerance=TOLERANCE[torch.bfloat16])


# One op's in the interpreter, which takes seconds for a call of the others.
LOOSE = [m for m in MUTANTS if not INTERPRET or m.op == "causal_conv1d_update"]


@pytest.mark.parametrize("mutant", LOOSE, ids=lambda m: f"{m.through or m.op}-{m.name}".replace(" ", "_"))
@pytest.mark.parametrize("place", kernel_places())
def test_a_defect_of_a_kernel_would_be_seen(mutant, on, monkeypatch):
    """By the comparison that the tests above and below make, in the dtype with the widest tolerance."""
    op = mutant.public
    check = {"forward": check_forward, "gradients": check_gradients}[mutant.seen_by]
    spoiled = inject(monkeypatch, mutant)
    for sample in testing.samples(op):
        try:
            check(op, sample, DTYPES[-1], on)
        except NotHere:
            continue
        except AssertionError:
            assert spoiled, "the sound kernel fails"
            return
    pytest.fail("no sample shows it")


# --- 3: gradients --------------------------------------------------------------------------------------------------


@every_trainable
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_agree_with_autograd_of_the_oracle(op, sample, dtype, on):
    check_gradients(op, sample, dtype, on)


@some_trainable
def test_gradcheck(op, sample, on):
    if sample.name in testing.specs()[op].straight_through:
        pytest.skip("passed by a rounding, no derivative; compared with autograd of the oracle")
    args, kwargs = sample.make(device=on.device, dtype=torch.float64, seed=3)
    args, kwargs = clones(args, kwargs)
    leaves = floating(tensors_of(args, kwargs))
    if sum(x.numel() for x in leaves.values()) > (400 if INTERPRET else 4000):
        pytest.skip("gradcheck runs on the smaller samples; the larger ones are compared with autograd of the oracle")
    for leaf in leaves.values():
        leaf.requires_grad_()

    def function(*values):
        return getattr(scalekern, op)(*(both := with_tensors(args, kwargs, dict(zip(leaves, values))))[0], **both[1])

    on(torch.autograd.gradcheck, function, tuple(leaves.values()), atol=1e-6, rtol=1e-5, fast_mode=True)


@compiled_only
@every_trainable
def test_second_order_is_right_or_refused(op, sample):
    """Right for what is linear; else refused by the backward op, which every gradient and the incoming one lead to."""
    args, kwargs = clones(*sample.make(dtype=torch.float64, seed=3))
    leaves = floating(tensors_of(args, kwargs))
    for leaf in leaves.values():
        leaf.requires_grad_()
    if testing.specs()[op].linear:
        function = lambda x: getattr(scalekern, op)(x, *args[1:], **kwargs)
        assert torch.autograd.gradgradcheck(function, args[:1], fast_mode=True)
        return
    outputs = as_tuple(getattr(scalekern, op)(*args, **kwargs))
    incoming = [torch.ones_like(o).requires_grad_() for o in outputs]
    grads = torch.autograd.grad(outputs, leaves.values(), incoming, create_graph=True, allow_unused=True)
    assert any(g is not None for g in grads)
    for name, grad, leaf in zip(leaves, grads, leaves.values()):
        if grad is None:
            continue
        assert grad.requires_grad, f"the gradient of argument {name} is cut off: differentiating it is silently zero"
        total = torch.view_as_real(grad).sum() if grad.is_complex() else grad.sum()
        for other in (leaf, *incoming):
            name = testing.specs()[op].through or op
            with pytest.raises(NotImplementedError, match=rf"^{name}_bwd: second-order gradients are not implemented$"):
                torch.autograd.grad(total, other, retain_graph=True)


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


@some_case
def test_repeats_bit_for_bit(op, sample, on):
    args, kwargs = sample.make(device=on.device, seed=4)
    if not testing.specs()[op].trainable:
        runs = [on(forward, getattr(scalekern, op), op, args, kwargs) for _ in range(3)]
    else:
        runs = []
        for _ in range(2 if INTERPRET else 3):
            outputs, grads = on(gradients, getattr(scalekern, op), args, kwargs)
            runs.append((*outputs, *(g for g in grads.values() if g is not None)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


@compiled_only
@pytest.mark.parametrize("op, sample", [c for c in CASES if not testing.specs()[c[0]].trainable])
def test_differentiating_a_decoding_op_raises(op, sample):
    args, kwargs = clones(*sample.make())
    for tensor in floating(tensors_of(args, kwargs)).values():
        tensor.requires_grad_()
    args = tuple(a.detach() if i in testing.specs()[op].inplace else a for i, a in enumerate(args))
    with pytest.raises(NotImplementedError, match=rf"{op}: this \w+ op has no gradient"):
        as_tuple(getattr(scalekern, op)(*args, **kwargs))[-1].sum().backward()


# --- 4: the torch integration --------------------------------------------------------------------------------------


# The last, a compilation, took 42 of 64 s on every sample. It runs on an op's first and last, and the tests of compiled
# functions below on one of their own; what other samples would add, the fakes of other options, the third compares.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@compiled_only
@every_case
def test_opcheck(op, sample):
    args, kwargs = sample.make()
    spec = testing.specs()[op]
    traced = () if spec.through else (testing.samples(op)[0], testing.samples(op)[-1])
    calls = captured_calls(op, args, kwargs)
    assert calls
    for overload, call_args in calls:
        call_args = tree_map_only(torch.Tensor, lambda a: a.detach().clone(), call_args)
        tensors = [a for a in tree_leaves(call_args) if isinstance(a, torch.Tensor)]
        differentiable = overload._schema.name.endswith("_fwd")
        for a in tensors if differentiable else ():
            if (a.is_floating_point() or a.is_complex()) and a.itemsize > 1:
                a.requires_grad_()
        checks = OPCHECKS if sample in traced else OPCHECKS[:3]
        if any(a.is_floating_point() and a.itemsize == 1 for a in tensors):
            checks = checks[1:]  # the first compares its arguments by allclose, which torch has not for float8
        torch.library.opcheck(overload, call_args, test_utils=checks)


needs_compiler = pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++")), reason="inductor needs g++")
# Of sizes that differ from each other: equal ones would become one symbol, and a change of one of them a recompilation.
DISTINCT = {"selective_scan": "mamba", "causal_conv1d_update": "tokens", "fft_conv": "short_filter"}


@contextlib.contextmanager
def compiling():
    """Every compilation anew: inductor's cache does not know this package's sources."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield torch._dynamo.config.patch(error_on_recompile=True)


# Where another op's kernels do the work, what is left to inductor is a minute of small kernels around them.
COMPILED = [
    *(pytest.param(op, "aot_eager", id=f"{op}-aot_eager") for op in dict.fromkeys(op for op, _ in CASES)),
    *(
        pytest.param(op, "inductor", id=f"{op}-inductor", marks=needs_compiler)
        for op in dict.fromkeys(op for op, _ in CASES)
        if not testing.specs()[op].through
    ),
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
@pytest.mark.parametrize("op, sample", small(TRAINABLE, TRAINABLE_IDS))
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
@pytest.mark.parametrize("op, sample", small(TRAINABLE, TRAINABLE_IDS))
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
@pytest.mark.parametrize("op, sample", small(TRAINABLE, TRAINABLE_IDS))
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
    [pytest.param(*case.values, backend, id=f"{case.id}-{backend}") for case in small(CASES, IDS)
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


# --- 5: shapes and strides -----------------------------------------------------------------------------------------


def _layouts(tensor):
    """The same values with other strides: last axis first, sliced out of a larger buffer, channels last."""
    yield tensor.transpose(0, -1).contiguous().transpose(0, -1)
    padded = torch.full([s + 3 for s in tensor.shape], float("nan") if tensor.is_floating_point() else 3).to(tensor)
    window = padded[tuple(slice(2, 2 + s) for s in tensor.shape)]
    window.copy_(tensor)
    yield window
    if tensor.dim() > 2:
        yield tensor.transpose(1, -1).contiguous().transpose(1, -1)


@some_case
def test_strides_change_nothing(op, sample, on):
    args, kwargs = sample.make(device=on.device, seed=9)
    tensors = tensors_of(args, kwargs)
    inplace, trainable = testing.specs()[op].inplace, testing.specs()[op].trainable
    if trainable:  # nothing of it is changed in place
        plain, plain_grads = on(gradients, getattr(scalekern, op), args, kwargs)
    else:
        plain = on(forward, getattr(scalekern, op), op, args, kwargs)
    for layouts in itertools.islice(zip(*(itertools.cycle(_layouts(t)) for t in tensors.values())), 3):
        both = with_tensors(args, kwargs, dict(zip(tensors, layouts)))
        leaves = {k: v.requires_grad_(trainable) for k, v in floating(tensors_of(*both)).items()}
        outputs = as_tuple(on(getattr(scalekern, op), *both[0], **both[1]))
        for a, e in zip(outputs, plain):
            assert_close(a, e, tolerance=2e-6)
        for i, changed in zip(inplace, plain[len(plain) - len(inplace) :]):
            assert_close(both[0][i], changed, tolerance=2e-6, what=f"argument {i}")
        if trainable:
            grads = on(lambda o, ls: torch.autograd.grad(loss(o), ls), outputs, tuple(leaves.values()))
            for name, grad in zip(leaves, grads):
                assert_close(grad, plain_grads[name], tolerance=5e-6, what=name)


def _first_floating(args):
    return next(i for i, a in enumerate(args) if a.is_floating_point() or a.is_complex())


@some_trainable
def test_an_expanded_gradient_is_read_in_place(op, sample, on):
    args, kwargs = clones(*sample.make(device=on.device, seed=9))
    leaf = args[_first_floating(args)].requires_grad_()

    def gradient(function, total):
        (grad,) = torch.autograd.grad(sum(total(o.real) for o in as_tuple(function(*args, **kwargs))), leaf)
        return grad

    actual = on(gradient, getattr(scalekern, op), torch.sum)  # whose gradient is one number, expanded
    wanted = gradient(getattr(reference, op), lambda o: (o * torch.ones(o.shape, device=o.device)).sum())
    assert_close(actual, wanted, tolerance=1e-5)


@every_op
def test_empty_axes(op, place):
    """Every axis at size 0, wherever the op itself accepts it: outputs and gradients exist and are finite."""
    device, backend = place
    sample = testing.samples(op)[0]
    args, kwargs = sample.make(device=device, seed=10)
    sizes = {s for t in tensors_of(args, kwargs).values() for s in t.shape}
    tried = 0
    for size in sizes:
        both = with_tensors(args, kwargs, {
            k: v[tuple(slice(0, 0) if s == size else slice(None) for s in v.shape)].clone()
            for k, v in tensors_of(args, kwargs).items()
        })  # fmt: skip
        try:
            with scalekern.backend(backend):
                outputs = as_tuple(getattr(scalekern, op)(*both[0], **both[1]))
        except ValueError as refused:
            assert str(refused).startswith(op), refused
            continue
        tried += 1
        for a, e in zip(outputs, as_tuple(getattr(reference, op)(*clones(*both)[0], **clones(*both)[1]))):
            assert torch.equal(a, e)
        if testing.specs()[op].trainable:
            with scalekern.backend(backend):
                _, grads = gradients(getattr(scalekern, op), *both)
            assert all(g is None or torch.isfinite(g).all() for g in grads.values())
    assert tried >= 1


# --- 6: bad input --------------------------------------------------------------------------------------------------


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


# --- 7: NaN and Inf ------------------------------------------------------------------------------------------------

# On a GPU these ops compute by FFT or by products of matrices: what is not finite spreads over so many last axes.
SPREAD_BY_FFT = {
    "fft_conv": 1, "toeplitz_conv": 1, "diag_ssm": 1, "depthwise_conv2d": 2, "depthwise_conv_transpose2d": 2,
}  # fmt: skip


@some_case
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_travel_as_in_the_oracle(op, sample, value, on):
    if testing.specs()[op].dense_oracle:
        pytest.skip("what a NaN reaches is tested with the op's family")
    args, kwargs = sample.make(device=on.device, dtype=torch.float32, seed=12)
    # A product of complex numbers makes NaN of Inf wherever its terms cancel, so which of the two arrives is a matter
    # of the order of additions; that something not finite arrives is not.
    spec = testing.specs()[op]
    either = spec.reorders or any(t.is_complex() for t in tensors_of(args, kwargs).values())
    name, tensor = next(iter(floating(tensors_of(args, kwargs)).items()))
    for position in (0, -1):
        spoiled = with_tensors(args, kwargs, {name: tensor.clone()})
        tensors_of(*spoiled)[name].view(-1)[position] = value
        actual = on(forward, getattr(scalekern, op), op, *spoiled)
        for i, (a, e) in enumerate(zip(actual, expected(op, *spoiled))):
            finite = torch.isfinite(e)  # of a complex number: both parts
            if op in SPREAD_BY_FFT and on.backend in ("triton", "cuda"):
                # To look and repair, as the CPU does, would be a synchronization. No neighbour may be spoiled with it.
                assert not torch.isfinite(a[~finite]).any()
                whole = finite.flatten(-SPREAD_BY_FFT[op]).all(-1)
                assert_close(a[whole], e[whole], tolerance=1e-5, what=f"output {i}")
                continue
            assert torch.equal(torch.isfinite(a), finite), f"output {i}"
            if not either:
                assert torch.equal(a.isnan(), e.isnan()), f"output {i}"
            assert_close(a[finite], e[finite], tolerance=1e-5, what=f"output {i}")


# --- the registry itself -------------------------------------------------------------------------------------------


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
