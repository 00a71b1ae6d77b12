"""Every op through the contract of the design, what it computes: results and gradients against the oracle, strides,
empty axes, repeats, NaN and Inf. How it is called is in test_contract_calls.py. The numbers are scalekern.testing's.
"""

import itertools

import pytest
import torch
from conftest import kernel_places
from contract import (
    INTERPRET,
    as_tuple,
    check_forward,
    check_gradients,
    clones,
    compiled_only,
    every_case,
    every_op,
    every_trainable,
    expected,
    floating,
    forward,
    gradients,
    loss,
    some_case,
    some_trainable,
    tensors_of,
    with_tensors,
)
from mutants import MUTANTS, NotHere, inject

import scalekern
from scalekern import reference, testing
from scalekern.testing import TOLERANCE, assert_close

# The interpreter takes seconds where a kernel takes microseconds: there every sample runs once forward and backward in
# float32, and the rest of the contract on one sample an op (the tests of the families add what is particular).
DTYPES = (torch.float32,) if INTERPRET else (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# --- the oracle and agreement with it --------------------------------------------------------------------------------


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


# --- gradients -------------------------------------------------------------------------------------------------------


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


# --- repeats, shapes and strides -------------------------------------------------------------------------------------


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


# --- NaN and Inf -----------------------------------------------------------------------------------------------------

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
        place = tensors_of(*spoiled)[name]
        place[(position,) * place.dim()] = value
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
