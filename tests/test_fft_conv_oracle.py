"""The oracle of fft_conv and its kin against convolutions from numpy, scipy and by hand.

Shape letters: B batch, D channels, L length, K taps of k, R taps of k_reverse, T tokens of a chunk.
"""

import numpy as np
import oracles
import pytest
import torch
from oracles import TIGHT, cases, one_thread, randn  # noqa: F401

from scalekern.reference.fft_conv import (
    MODES,
    fft_conv,
    fft_conv_bwd,
    fft_conv_chunk,
    fft_conv_chunk_bwd,
    fft_conv_step,
    toeplitz_conv,
)  # fmt: skip
from scalekern.testing import TOLERANCE, assert_close, error, upcast


def brute(u, k, mode="causal", skip=None, pregate=None, postgate=None, k_reverse=None, bias=None, mask=None):
    """The definition, row by row: every mode is a part, or a folding, of numpy's full convolution."""
    u, k, skip, pregate, postgate, k_reverse, bias, mask = (
        None if x is None else x.numpy() for x in (u, k, skip, pregate, postgate, k_reverse, bias, mask)
    )
    rows = []
    for b, d in np.ndindex(*u.shape[:2]):
        v = u[b, d] * (1 if mask is None else mask[b]) * (1 if pregate is None else pregate[b, d])
        L, taps = len(v), k[b, d] if k.ndim == 3 else k[d]
        y = _part(np.convolve(v, taps), L, len(taps), mode)
        if k_reverse is not None:
            taps = k_reverse[b, d] if k_reverse.ndim == 3 else k_reverse[d]
            ahead = np.resize(v, L + len(taps)) if mode == "circular" else np.append(v, np.zeros(len(taps)))
            y = y + [taps @ ahead[t : t + len(taps)] for t in range(L)]
        if skip is not None:
            y = y + np.concatenate([skip[d] * v, np.zeros(len(y) - L)])
        y = y + (0 if bias is None else bias[d])
        rows.append(y * (1 if postgate is None else postgate[b, d]))
    return torch.from_numpy(np.stack(rows)).reshape(*u.shape[:2], -1)


def _part(full, L, K, mode):
    if mode == "full":
        return full
    if mode == "circular":
        return np.array([full[i::L].sum() for i in range(L)])
    begin = (K - 1) // 2 if mode == "same" else 0
    return full[begin : begin + L]


def make(sample, dtype=torch.float64):
    (u, k), kwargs = sample.make(dtype=dtype)
    return u, k, kwargs


@pytest.mark.parametrize("op, sample", **cases("fft_conv"))
def test_agrees_with_numpy(op, sample):
    u, k, kwargs = make(sample)
    expected = brute(u, k, **kwargs)
    for method in ("direct", "fft"):
        assert_close(fft_conv(u, k, **kwargs, method=method), expected, tolerance=TIGHT, what=method)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("L", [1, 2, 3, 7, 16, 31])
def test_every_length_and_filter(mode, L):
    for K in {1, 2, 3, 5, 8, L, 2 * L, 3 * L - 1, 3 * L}:
        for R in (None, 1, 4, 2 * L) if mode != "full" else (None,):
            k_reverse = None if R is None else randn(2, R, seed=3)
            u, k = randn(2, 2, L), randn(2, K, seed=1)
            out = fft_conv(u, k, mode=mode, k_reverse=k_reverse)
            assert_close(out, brute(u, k, mode, k_reverse=k_reverse), tolerance=TIGHT, what=f"K {K}, R {R}")


BY_HAND = {
    "causal": [1, 12, 123],
    "circular": [1231, 2312, 3123],
    "same": [12, 123, 1230],
    "full": [1, 12, 123, 1230, 2300, 3000],
}


@pytest.mark.parametrize("mode", MODES)
def test_by_hand(mode):
    u, k = torch.tensor([[[1.0, 2, 3]]]), torch.tensor([[1.0, 10, 100, 1000]])
    assert fft_conv(u, k, mode=mode).tolist() == [[BY_HAND[mode]]]


def test_anticausal_and_epilogue_by_hand():
    u, none = torch.tensor([[[1.0, 2, 3]]]), torch.zeros(1, 1)
    ahead = torch.tensor([[1.0, 10, 100]])
    assert fft_conv(u, none, k_reverse=ahead).tolist() == [[[321, 32, 3]]]
    assert fft_conv(u, none, k_reverse=ahead, mode="circular").tolist() == [[[321, 132, 213]]]
    gates = dict(pregate=torch.tensor([[[2.0, 3, 4]]]), postgate=torch.tensor([[[1.0, 10, 100]]]))
    v = dict(skip=torch.tensor([5.0]), bias=torch.tensor([7.0]), mask=torch.tensor([[True, False, True]]), **gates)
    # v = [2, 0, 12]; the skip multiplies v, not u; the bias is gated, and not masked.
    assert fft_conv(u, none, **v).tolist() == [[[17, 70, 6700]]]
    v["mask"] = torch.tensor([[1.0, 0.5, 2.0]])
    assert fft_conv(u, none, **v).tolist() == [[[17, 220, 12700]]]


@pytest.mark.parametrize("L, K", [(16, 5), (15, 6), (7, 7), (5, 14), (4, 13), (1, 3)])
def test_same_is_scipys(L, K):
    signal = pytest.importorskip("scipy.signal")
    u, k = randn(1, 1, L), randn(1, K, seed=1)
    expected = signal.convolve(u[0, 0].numpy(), k[0].numpy(), mode="same")
    assert_close(fft_conv(u, k, mode="same")[0, 0], torch.from_numpy(expected), tolerance=TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op, sample", **cases("fft_conv"))
def test_lower_precision_rounds_once(op, sample, dtype):
    u, k, kwargs = make(sample, dtype)
    out = fft_conv(u, k, **kwargs)
    exact = fft_conv(upcast(u), upcast(k), **{name: upcast(x) for name, x in kwargs.items()})
    assert out.dtype == dtype
    assert_close(out, exact, tolerance={torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype])


# --- what a wrong oracle would look like ---


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_oracle_would_be_seen(mode):
    M = 18 if mode == "full" else 13
    terms = dict(
        skip=randn(3, seed=2), bias=randn(3, seed=3), pregate=randn(2, 3, 13, seed=4), postgate=randn(2, 3, M, seed=5),
        mask=torch.arange(26).reshape(2, 13) % 3 > 0,
    )  # fmt: skip
    if mode != "full":
        terms["k_reverse"] = randn(3, 4, seed=6)
    u, k = randn(2, 3, 13), randn(3, 6, seed=1)
    right = fft_conv(u, k, mode=mode, **terms)
    mutants = {f"without {name}": fft_conv(u, k, mode=mode, **{**terms, name: None}) for name in terms}
    mutants["zero"] = torch.zeros_like(right)
    mutants["shifted"] = right.roll(1, -1)
    mutants["a tap less"] = fft_conv(u, torch.cat([k[:, :-1], 0 * k[:, :1]], 1), mode=mode, **terms)
    mutants["flipped"] = fft_conv(u, k.flip(-1), mode=mode, **terms)
    mutants["rows swapped"] = right.flip(0)
    mutants["channels swapped"] = right.flip(1)
    for name, wrong in mutants.items():
        assert error(wrong, right) > 2 * TOLERANCE[torch.bfloat16], name  # the widest that any test allows


# --- derivatives ---


@pytest.mark.parametrize("op, sample", **cases("fft_conv", "fft_conv_chunk", "fft_conv_step", "toeplitz_conv"))
def test_explicit_backward_equals_autograd(op, sample):
    oracles.check_explicit_backward(op, sample)


@pytest.mark.parametrize("mode", MODES)
def test_explicit_backward_by_fft(mode):
    M = 14 if mode == "full" else 9
    k_reverse = None if mode == "full" else randn(2, 7, seed=2)
    args = (randn(2, 2, 9), randn(2, 6, seed=1), k_reverse, *[randn(2, seed=i) for i in (3, 4)], randn(2, 2, 9, seed=5),
            randn(2, 2, M, seed=6), None, mode)  # fmt: skip
    dout = randn(2, 2, M, seed=7)
    for a, e in zip(fft_conv_bwd(dout, *args, "fft"), fft_conv_bwd(dout, *args)):
        assert_close(a, e, tolerance=TIGHT)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    k_reverse = () if mode == "full" else (randn(1, 2, seed=2),)
    inputs = [randn(2, 1, 4), randn(1, 3, seed=1), *(randn(1, seed=i) for i in (3, 4)), randn(2, 1, 4, seed=5),
              randn(2, 1, 6 if mode == "full" else 4, seed=6), *k_reverse]  # fmt: skip

    def call(u, k, skip, bias, pregate, postgate, k_reverse=None):
        return fft_conv(u, k, mode=mode, skip=skip, bias=bias, pregate=pregate, postgate=postgate, k_reverse=k_reverse)

    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


def test_a_boolean_mask_hides_nan_from_outputs_and_gradients():
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    u, pregate, k = randn(2, 3, 4), randn(2, 3, 4, seed=1), randn(3, 3, seed=2)
    holes = {n: x.masked_fill(~mask[:, None], float("nan")) for n, x in (("u", u), ("pregate", pregate))}
    clean = fft_conv(u, k, pregate=pregate, mask=mask)
    leaves = [x.requires_grad_() for x in (holes["u"], k, holes["pregate"])]
    out = fft_conv(leaves[0], k, pregate=leaves[2], mask=mask)
    assert torch.equal(out, clean) and clean.norm() > 1
    found = [torch.autograd.grad(out, leaves, clean.detach())]
    du, dk, *_, dpregate, _ = fft_conv_bwd(
        clean.detach(), *(x.detach() for x in leaves[:2]), None, None, None, leaves[2].detach(), None, mask, "causal"
    )
    found.append((du, dk, dpregate))
    for du, dk, dpregate in found:
        assert not any(x.isnan().any() for x in (du, dk, dpregate)) and dk.norm() > 0
        assert du.masked_select(~mask[:, None]).eq(0).all() and dpregate.masked_select(~mask[:, None]).eq(0).all()


@pytest.mark.parametrize("gated", [False, True])
def test_a_mask_of_numbers_multiplies(gated):
    u, k, mask = randn(2, 3, 7).requires_grad_(), randn(3, 4, seed=1).requires_grad_(), randn(2, 7, seed=2)
    pregate = randn(2, 3, 7, seed=3).requires_grad_() if gated else None
    out = fft_conv(u, k, pregate=pregate, mask=mask)
    leaves = [u, k, pregate] if gated else [u, k]
    arguments = [None if x is None else x.detach() for x in (u, k, None, None, None, pregate)]
    assert_close(out.detach(), brute(*arguments[:2], pregate=arguments[5], mask=mask), tolerance=TIGHT)
    dout = randn(2, 3, 7, seed=4)
    du, dk, _, _, _, dpregate, _ = fft_conv_bwd(dout, *arguments, None, mask, "causal")
    for a, e in zip((du, dk, dpregate), torch.autograd.grad(out, leaves, dout)):
        assert_close(a, e, tolerance=TIGHT)


# --- streams ---


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("L, K", [(17, 1), (17, 4), (9, 23), (5, 5)])
def test_chunks_join_to_the_whole(L, K, per_sample):
    u, k = randn(2, 3, L), randn(*[2] * per_sample, 3, K, seed=1)
    expected = brute(u, k)
    for cuts in ([0, L], [0, 1, L], [0, 2, 2, 3, L - 1, L], range(L + 1)):
        state, parts = None, []
        for begin, end in zip(cuts, cuts[1:]):
            out, state = fft_conv_chunk(u[..., begin:end], k, state)
            parts.append(out)
        assert_close(torch.cat(parts, -1), expected, tolerance=TIGHT, what=str(cuts))
        history = torch.cat([torch.zeros(2, 3, K - 1), u], -1)[..., L:]
        assert torch.equal(state, history.double())
    state, parts = None, []
    for t in range(L):
        out, state = fft_conv_step(u[..., t], k, state)
        parts.append(out)
    assert_close(torch.stack(parts, -1), expected, tolerance=TIGHT)


def test_gradients_flow_through_the_state():
    u, k = randn(2, 2, 9).requires_grad_(), randn(2, 6, seed=1).requires_grad_()
    first, state = fft_conv_chunk(u[..., :4], k)
    second, _ = fft_conv_chunk(u[..., 4:], k, state)
    weight = randn(2, 2, 9, seed=2)
    joined = torch.autograd.grad(torch.cat([first, second], -1), (u, k), weight)
    for a, e in zip(joined, torch.autograd.grad(fft_conv(u, k), (u, k), weight)):
        assert_close(a, e, tolerance=TIGHT)
    a, b = u[..., :4].detach(), u[..., 4:].detach()
    du2, dk2, dstate = fft_conv_chunk_bwd(weight[..., 4:], None, b, k.detach(), state.detach())
    du1, dk1, _ = fft_conv_chunk_bwd(weight[..., :4], dstate, a, k.detach(), None)
    assert_close(torch.cat([du1, du2], -1), joined[0], tolerance=TIGHT)
    assert_close(dk1 + dk2, joined[1], tolerance=TIGHT)


def test_a_state_keeps_its_dtype():
    out, state = fft_conv_chunk(randn(1, 2, 3).bfloat16(), randn(2, 4).float(), torch.zeros(1, 2, 3))
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("G", [1, 2, 3, 6])
def test_groups_share_a_filter(G):
    u, k = randn(2, 6, 11), randn(G, 4, seed=1)
    per_channel = torch.stack([k[d // (6 // G)] for d in range(6)])
    for groups in (None, G):
        assert_close(toeplitz_conv(u, k, groups), brute(u, per_channel), tolerance=TIGHT)
    if G in (2, 3):  # interleaved instead of neighbouring groups would be seen
        assert error(brute(u, torch.stack([k[d % G] for d in range(6)])), toeplitz_conv(u, k)) > 0.1


# --- large sizes ---


def test_large_and_prime_lengths():
    u, k, k_reverse = randn(1, 1, 2053), randn(1, 2053, seed=1), randn(1, 509, seed=2)
    for mode in ("causal", "circular", "same"):
        direct, by_fft = (fft_conv(u, k, mode=mode, k_reverse=k_reverse, method=m) for m in ("direct", "fft"))
        assert_close(by_fft, direct, tolerance=TIGHT, what=mode)


def test_a_million_tokens():
    L = 1 << 20
    u, k = randn(1, 1, L, dtype=torch.float32), randn(1, L, seed=1, dtype=torch.float32)
    out = fft_conv(u.double(), k, method="fft")[0, 0]
    assert_close(fft_conv(u, k, method="fft")[0, 0], out, tolerance=1e-7)
    for t in (0, 1, 4097, L // 2 + 1, L - 1):
        exact = (u[0, 0, : t + 1].double() * k[0, : t + 1].double().flip(0)).sum()
        assert abs(out[t] - exact) < 1e-12 * L**0.5 * max(1, out.abs().max().item()), t


def test_memory_is_bounded(monkeypatch):
    """No intermediate, with gradients, is larger than the block or the padded operands."""
    from torch.utils._python_dispatch import TorchDispatchMode

    module = oracles.fft_conv

    monkeypatch.setattr(module, "_BLOCK", 1 << 14)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    u, k = randn(2, 3, 300).requires_grad_(), randn(3, 400, seed=1).requires_grad_()
    with Sizes():
        fft_conv(u, k).sum().backward()
    assert len(sizes) > 20 and max(sizes) <= max(module._BLOCK, 4 * u.numel())


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_convolve(mode):
    u, k = torch.zeros(2, 3, 0, requires_grad=True), randn(3, 4).requires_grad_()
    out = fft_conv(u, k, mode=mode, bias=torch.ones(3))
    assert out.shape == (2, 3, 3 if mode == "full" else 0) and out.eq(1).all()
    assert torch.autograd.grad(out.sum(), k)[0].eq(0).all()


BAD = {
    "mode": (
        lambda: fft_conv(randn(1, 1, 3), randn(1, 2), mode="valid"),
        "mode must be one of 'causal', .*got 'valid'",
    ),
    "reverse": (
        lambda: fft_conv(randn(1, 1, 3), randn(1, 2), mode="full", k_reverse=randn(1, 2)),
        "fft_conv: k_reverse must be None in mode 'full', got a tensor",
    ),
    "groups": (lambda: toeplitz_conv(randn(1, 4, 3), randn(3, 2)), "groups must divide the 4 channels of u, got 3"),
    "filters": (lambda: toeplitz_conv(randn(1, 4, 3), randn(2, 2), 4), r"k must have 4 filters .*got shape \(2, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_ambiguous_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
