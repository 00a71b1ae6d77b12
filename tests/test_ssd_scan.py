"""Mamba-2's scan against Mamba-1's oracle, transformers' chunks, itself in parts; strong decay, gradients of states."""

import importlib
import types

import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern import reference
from scalekern.ops import _ssd
from scalekern.testing import assert_close

ssd_op = importlib.import_module("scalekern.ops.ssd_scan")  # the function hides its module
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")


def inputs(B, L, H, P, N, G, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    A = -torch.rand(H, generator=g, dtype=torch.float64)
    values = randn(B, L, H, P), randn(B, L, H) - 1, A, randn(B, L, G, N), randn(B, L, G, N)
    return [v.to(dtype) for v in values]


def test_the_oracle_is_the_selective_scan_with_tied_channels():
    x, dt, A, B, C = inputs(2, 13, 4, 3, 5, 2, torch.float64)
    rows = lambda t: t.flatten(2).mT  # noqa: E731
    expected, last = reference.selective_scan(
        rows(x), dt.repeat_interleave(3, 2).mT, A.repeat_interleave(3)[:, None].expand(-1, 5), B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1), delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    out, final = reference.ssd_scan(x, dt, A, B, C, dt_softplus=True, return_final_states=True)
    assert_close(rows(out), expected, tolerance=1e-13)
    assert_close(final.flatten(1, 2), last, tolerance=1e-13)


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("L", [63, 64, 65, 200, 600])
def test_lengths_that_no_chunk_divides(L, G):
    args = inputs(1, L, 4, 5, 7, G)
    kwargs = dict(
        D=torch.randn(4, 5), initial_states=torch.randn(1, 4, 5, 7), dt_softplus=True, return_final_states=True
    )
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    expected = reference.ssd_scan(*(a.double() for a in args), **wide)
    for a, e in zip(scalekern.ssd_scan(*args, **kwargs), expected):
        assert_close(a, e, tolerance=2e-6)


def test_a_strong_decay_leaves_weak_ones_exact():
    """A token with d A = -90 among tokens of -1e-3: its sum with theirs must not cost their digits."""
    x, dt, A, B, C = inputs(1, 150, 2, 3, 4, 1)
    dt = torch.full_like(dt, 1e-3)
    dt[:, ::7] = 90.0
    dt[:, 40:60] = 120.0
    args = [t.requires_grad_() for t in (x, dt, -torch.ones(2), B, C)]
    wide = [t.detach().double().requires_grad_() for t in args]
    out, expected = scalekern.ssd_scan(*args), reference.ssd_scan(*wide)
    assert_close(out, expected, tolerance=1e-6)
    weak = dt < 1
    assert_close(out[weak], expected[weak], tolerance=2e-6)
    w = torch.randn(out.shape, dtype=torch.float64)
    for a, e in zip(torch.autograd.grad((out * w).sum(), args), torch.autograd.grad((expected * w).sum(), wide)):
        assert_close(a, e, tolerance=3e-6)


def test_parts_join_to_the_whole():
    x, dt, A, B, C = inputs(2, 150, 2, 3, 4, 1)
    whole, final = scalekern.ssd_scan(x, dt, A, B, C, dt_softplus=True, return_final_states=True)
    state, parts = None, []
    for at in (slice(0, 1), slice(1, 70), slice(70, 150)):
        out, state = scalekern.ssd_scan(
            x[:, at], dt[:, at], A, B[:, at], C[:, at], initial_states=state, dt_softplus=True, return_final_states=True
        )
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole, tolerance=1e-6)
    assert_close(state, final, tolerance=1e-6)


@pytest.mark.parametrize("limit", [None, 0.1, (0.1,), (0.1, 0.2, 0.3), ("a", "b"), (0.2, 0.1), (float("nan"), 1.0)])
def test_limits_that_are_none_are_named(limit):
    args, steps = inputs(1, 3, 2, 2, 3, 1), (torch.ones(2, 2), torch.ones(1), torch.ones(1))
    for op, more in (("ssd_scan", ()), ("quantized_ssd_scan", steps)):
        with pytest.raises(ValueError, match=f"^{op}: dt_limit must be two numbers, .* got "):
            getattr(scalekern, op)(*args, *more, dt_limit=limit)


def test_packed_sequences_are_sequences():
    """Outputs, states after each, and their gradients; one of the sequences is empty."""
    bounds = [0, 70, 70, 75, 210]
    args = [t.requires_grad_() for t in inputs(1, 210, 2, 3, 4, 1)]
    initial = torch.randn(4, 2, 3, 4, requires_grad=True)
    leaves = [*args, initial]
    cu = torch.tensor(bounds)
    out, varlen = scalekern.ssd_scan(
        *args, initial_states=initial, cu_seqlens=cu, dt_softplus=True, return_varlen_states=True
    )
    outs, states = [], []
    for i, (b, e) in enumerate(zip(bounds, bounds[1:])):
        x, dt, A, B, C = args
        o, s = scalekern.ssd_scan(
            x[:, b:e], dt[:, b:e], A, B[:, b:e], C[:, b:e], initial_states=initial[i : i + 1], dt_softplus=True,
            return_final_states=True,
        )  # fmt: skip
        outs.append(o)
        states.append(s)
    expected, expected_states = torch.cat(outs, 1), torch.cat(states)
    assert_close(out, expected, tolerance=1e-6)
    assert_close(varlen, expected_states, tolerance=1e-6)
    w, v = torch.randn_like(out), torch.randn_like(varlen)
    actual = torch.autograd.grad((out * w).sum() + (varlen * v).sum(), leaves)
    wanted = torch.autograd.grad((expected * w).sum() + (expected_states * v).sum(), leaves)
    for a, e in zip(actual, wanted):
        assert_close(a, e, tolerance=3e-6)


def test_memory_does_not_grow_with_the_length(monkeypatch):
    """The largest matrix of the composed form at 4,096 tokens is that at 1,024."""

    def largest(L):
        sizes, original = [], _ssd.Piece.mask
        monkeypatch.setattr(_ssd.Piece, "mask", lambda self: sizes.append((m := original(self)).numel()) or m)
        x, dt, A, B, C = inputs(1, L, 2, 16, 16, 1)
        out, final = torch.empty_like(x), torch.empty(1, 2, 16, 16)
        _ssd.forward(out, final, None, x, dt, A, B, C, None, None, None, None, None, None, True, 0.0, float("inf"))
        monkeypatch.undo()
        return max(sizes)

    assert largest(4096) == largest(1024)


def test_equals_transformers():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    x, dt, A, B, C = inputs(2, 100, 4, 8, 16, 2)
    kwargs = dict(
        D=torch.randn(4), dt_bias=torch.randn(4), dt_softplus=True, dt_limit=(0.1, 1.0), return_final_states=True
    )
    plain = getattr(modeling.mamba2_chunk_scan, "__wrapped__", modeling.mamba2_chunk_scan)
    expected = plain(x, dt, A, B, C, 32, **kwargs)
    for a, e in zip(scalekern.ssd_scan(x, dt, A, B, C, 32, **kwargs), expected):
        assert_close(a, e, tolerance=2e-6)


@pytest.mark.parametrize("dtype, states, capability, taken", [
    (torch.bfloat16, 256, (9, 0), True), (torch.float16, 128, (9, 0), True), (torch.float16, 129, (9, 0), False),
    (torch.bfloat16, 16, (8, 0), False), (torch.float32, 16, (9, 0), False), (torch.bfloat16, 257, (9, 0), False),
])  # fmt: skip
def test_which_backwards_fit_a_gpu(dtype, states, capability, taken, monkeypatch):
    """By shapes and dtypes alone; what does not fit goes to torch's chunks."""
    on_gpu = lambda *size: types.SimpleNamespace(  # noqa: E731 (torch without CUDA makes no tensor there)
        is_cuda=True, dtype=dtype, device="cuda", shape=size, element_size=lambda: dtype.itemsize
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x, B = on_gpu(1, 8, 2, 64), on_gpu(1, 8, 1, states)
    reason = ssd_op._triton_supports_bwd(x, None, None, x, on_gpu(1, 8, 2), on_gpu(2), B, B)
    assert (reason is None) == taken, reason
