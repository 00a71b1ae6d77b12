"""diag_scan on the CPU: every way its kernel splits a call, the same bits for any number of threads; what joins."""

import pytest
import torch
from conftest import INTERPRET
from contract import captured_calls, gradients

import scalekern
from scalekern import reference
from scalekern.testing import assert_close, upcast

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")
F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128


def inputs(shape, dim, dtype=F32, states=True, seed=0):
    """(a, b, initial_state) with |a| from 0.6 to 1."""
    g = torch.Generator().manual_seed(seed)
    kind = C128 if dtype.is_complex else F64
    randn = lambda *s: torch.randn(s, generator=g, dtype=kind)  # noqa: E731
    a = torch.polar(0.6 + 0.4 * torch.rand(shape, generator=g, dtype=F64), randn(*shape).real)
    a = a if dtype.is_complex else a.abs()
    state = torch.float32 if dtype.itemsize == 2 else dtype
    rest = [n for i, n in enumerate(shape) if i != dim]
    return a.to(dtype), randn(*shape).to(dtype), randn(*rest).to(state) if states else None


# Channels in several groups, with a rest; few channels: spans of time; rows by the vector, and their rest by time; a
# single row; one too short for that; a middle axis, whose outer and inner axes do not merge.
SPLITS = {
    "channels": ((2, 9, 1100), 1, F32),
    "few_channels": ((1, 11000, 3), 1, F32),
    "few_complex_channels": ((1, 7000, 5), 1, C64),
    "rows": ((2, 22, 1100), 2, F32),
    "half_rows": ((43, 800), 1, torch.bfloat16),
    "one_row": ((33001,), 0, F32),
    "one_complex_row": ((1, 5001), 1, C64),
    "one_wide_row": ((2, 4100), 1, C128),
    "short_rows": ((900, 3, 70), 2, F64),
    # From 2 MB an output goes past the caches, if its rows begin where vectors do; with a rest where they do not all.
    "large": ((1, 530, 1024), 1, F32),
    "large_rest": ((1, 530, 1028), 1, F32),
    "large_complex_row": ((1, 17, 9000), 1, C128),
}


@pytest.mark.parametrize("split", SPLITS)
def test_splits(split):
    shape, dim, dtype = SPLITS[split]
    reverse = "row" in split
    a, b, state = inputs(shape, dim, dtype)
    kwargs = dict(dim=dim, initial_state=state, reverse=reverse, return_last_state=True)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs, grads = gradients(scalekern.diag_scan, (a, b), kwargs)
            found.append((*outputs, *grads.values()))
    finally:
        torch.set_num_threads(2)
    assert all(torch.equal(x, y) for x, y in zip(*found))
    wide = {k: upcast(v) for k, v in kwargs.items()}
    outputs, grads = gradients(reference.diag_scan, (upcast(a), upcast(b)), wide)
    own = torch.finfo(dtype).eps
    for x, e in zip(found[0], (*outputs, *grads.values())):
        assert_close(x, e, tolerance=2 * own if own > 1e-3 else 20 * own)


@pytest.mark.parametrize("shape, dim", [((1, 20000, 2), 1), ((2, 5000), 1)])
def test_an_infinite_product_of_a_span_is_not_used(shape, dim):
    """Where nothing has come in yet, a product beyond float32 decays zeros: 0 and not NaN."""
    a, b = torch.full(shape, 1.5), torch.zeros(shape)
    b.select(dim, -1).fill_(2.0)
    out, last = scalekern.diag_scan(a, b, dim=dim, return_last_state=True)
    assert torch.equal(out, b) and (last == 2).all()
    small = torch.full(last.shape, 1e-38)
    grown = scalekern.diag_scan(a.narrow(dim, 0, 200), b.narrow(dim, 0, 200), dim=dim, initial_state=small)
    assert_close(grown.select(dim, 199), small * 1.5**200, tolerance=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_parts_join_to_the_whole(reverse):
    a, b, state = inputs((2, 150, 9), 1)
    whole, final = scalekern.diag_scan(a, b, dim=1, initial_state=state, reverse=reverse, return_last_state=True)
    parts = [slice(0, 1), slice(1, 70), slice(70, 150)]
    for at in reversed(parts) if reverse else parts:
        h, state = scalekern.diag_scan(
            a[:, at], b[:, at], dim=1, initial_state=state, reverse=reverse, return_last_state=True
        )
        assert_close(h, whole[:, at], tolerance=1e-6)
    assert torch.equal(state, final)


def test_what_is_expanded_is_not_copied():
    """The registered op, both ways, sees the decay that all rows and tokens share as it is, in steps of nothing."""
    a, b, _ = inputs((3, 7, 4, 5), 1)
    calls = captured_calls("diag_scan", (a[:1, :1, :, :1], b), {"dim": 1})
    assert len(calls) == 2
    for op, values in calls:
        seen = next(v for arg, v in zip(op._schema.arguments, values) if arg.name == "a")
        assert seen.shape == (3, 4, 5, 7) and seen.stride() == (0, 1, 0, 0)


def test_mixed_dtypes_and_a_loss_of_the_last_state_alone():
    a, b, _ = inputs((2, 30, 4), 1)
    half = b.bfloat16().requires_grad_()
    out, last = scalekern.diag_scan(a, half, dim=1, return_last_state=True)
    assert out.dtype == F32 and last.dtype == F32
    (grad,) = torch.autograd.grad(last.sum(), half)
    decay = a.flip(1).cumprod(1).flip(1)
    assert_close(grad.float(), torch.cat([decay[:, 1:], torch.ones(2, 1, 4)], 1), tolerance=4e-3)
    phase = torch.polar(a, a)
    assert scalekern.diag_scan(phase, b, dim=1).dtype == C64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scalekern.diag_scan(a, b, dim=1).dtype == F32


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dim=3), "dim must be one of b's 3 axes, got 3"),
        (dict(dim=0, cu_seqlens=torch.tensor([0, 1])), "dim must leave b's first axis to the sequences, got 0"),
        (dict(cu_seqlens=torch.tensor([0, 6])), "must rise from 0 to 7"),
    ],
)
def test_bad_axes(change, message):
    a, b, _ = inputs((1, 5, 7), 2)
    with pytest.raises(ValueError, match=f"diag_scan: .*{message}"):
        scalekern.diag_scan(a, b, **change)
