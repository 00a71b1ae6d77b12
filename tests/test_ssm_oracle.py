"""The oracles of the state space models against dense matrices, power series and high-precision arithmetic.

Shape letters: H heads, N states, L length, B batch, R rank.
"""

import cmath
import itertools

import numpy as np
import oracles
import pytest
import torch
from oracles import TIGHT, cases, one_thread, randn  # noqa: F401

from scalekern.reference.diag_ssm import DSS_EPSILON, diag_ssm, diag_ssm_kernel, diag_ssm_kernel_bwd, phi, phi_slope
from scalekern.reference.dplr_ssm import dplr_ssm_kernel, dplr_ssm_kernel_bwd, dplr_ssm_kernel_fwd, truncate_C
from scalekern.reference.fft_conv import fft_conv
from scalekern.testing import TOLERANCE, Sample, assert_close, error, upcast


def discrete(A, B, dt, disc):
    """(a, b) of one dense system A (N, N), B (N,), by the matrix exponential or by solving."""
    A, B = (np.asarray(x, dtype=complex) for x in (A, B))
    n = len(B)
    if disc == "zoh":
        block = torch.zeros(n + 1, n + 1, dtype=torch.complex128)
        block[:n, :n], block[:n, n] = torch.from_numpy(A * dt), torch.from_numpy(B * dt)
        power = torch.linalg.matrix_exp(block).numpy()
        return power[:n, :n], power[:n, n]
    left = np.eye(n) - dt / 2 * A
    return np.linalg.solve(left, np.eye(n) + dt / 2 * A), np.linalg.solve(left, dt * B)


def series(A, B, C, dt, L, disc):
    """K[l] = C a^l b of one dense system, term by term."""
    a, x = discrete(A, B, dt, disc)
    terms = []
    for _ in range(L):
        terms.append(np.asarray(C) @ x)
        x = a @ x
    return np.array(terms)


def softmax_series(A, B, C, dt, L):
    """DSS's K of one head: the powers over their sum, less the regularization of the poles, with Python's numbers."""
    total = np.zeros(L, dtype=complex)
    for a, w in zip(A, B * C):
        growing = a.real > 0
        z = dt * a
        powers = np.array([cmath.exp(z * (l - (L - 1 if growing else 0))) for l in range(L)])
        numerator = cmath.exp(-z if growing else z) - 1
        x = powers.sum() * numerator * a  # (e^{zL} - 1) A
        total += w * numerator * x.conjugate() / (abs(x) ** 2 + DSS_EPSILON) * powers
    return total


def brute_kernel(A, B, C, dt, L, disc, pairs):
    rows = []
    for h in range(len(A)):
        a, b, c = (x[h].numpy() for x in (A, B, C))
        K = (
            softmax_series(a, b, c, dt[h].item(), L)
            if disc == "dss"
            else series(np.diag(a), b, c, dt[h].item(), L, disc)
        )
        rows.append(K.real * (2 if pairs and A.is_complex() else 1))
    return torch.from_numpy(np.stack(rows))


# --- diag_ssm_kernel ---


@pytest.mark.parametrize("op, sample", **cases("diag_ssm_kernel"))
def test_kernel_is_the_power_series(op, sample):
    args, kwargs = sample.make(dtype=torch.float64)
    kernel = diag_ssm_kernel(*args, **kwargs)
    assert_close(kernel, brute_kernel(*args, kwargs["conjugate_pairs"]), tolerance=1e-12)
    if kernel.shape[1] > 1:
        assert error(kernel.roll(1, -1), kernel) > 0.1
    half = diag_ssm_kernel(*args, conjugate_pairs=False)
    assert_close(kernel, half * (2 if kwargs["conjugate_pairs"] and args[0].is_complex() else 1), tolerance=TIGHT)


@pytest.mark.parametrize("disc", ["zoh", "bilinear", "dss"])
@pytest.mark.parametrize("dropped", ["B", "C", "dt"])
def test_every_parameter_counts(disc, dropped):
    A, B, C, dt = cases("diag_ssm_kernel")["argvalues"][0][1].make(dtype=torch.float64)[0][:4]
    ones = {"B": (A, B / B, C, dt), "C": (A, B, C / C, dt), "dt": (A, B, C, dt / dt)}[dropped]
    assert error(diag_ssm_kernel(*ones, 20, disc), diag_ssm_kernel(A, B, C, dt, 20, disc)) > 0.1


def test_dss_is_the_softmax_of_its_paper():
    """Proposition 1 (b), without the regularization that its code adds: one part in a million."""
    A, B, C, dt = cases("diag_ssm_kernel")["argvalues"][0][1].make(dtype=torch.float64)[0][:4]
    powers = torch.exp((dt[:, None] * A)[..., None] * torch.arange(40))
    rows = powers / powers.sum(-1, keepdim=True)
    expected = 2 * torch.einsum("hn,hnl->hl", B * C / A, rows).real
    assert_close(diag_ssm_kernel(A, B, C, dt, 40, "dss"), expected, tolerance=1e-5)


def test_a_long_kernel_is_accurate():
    """L = 256K with Re(A) = -1e-3, against 40 digits; float32 parameters, so that fp32 arithmetic would be seen."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 40
    A = torch.tensor([[-1e-3 + 3j, -1e-3 + 40j, -0.5 + 1j]], dtype=torch.complex64)
    B, C = (randn(1, 3, seed=i, dtype=torch.complex64) for i in (1, 2))
    dt, L = torch.tensor([1e-2]), 1 << 18
    kernel = diag_ssm_kernel(*(upcast(x) for x in (A, B, C, dt)), L)[0]
    for l in (0, 1, 511, 512, 513, 131071, 200003, L - 1):
        exact = mpmath.mpf(0)
        for a, b, c in zip(A[0].tolist(), B[0].tolist(), C[0].tolist()):
            a, step = mpmath.mpc(a), mpmath.mpf(dt.item())
            exact += (
                2 * (mpmath.mpc(c) * mpmath.mpc(b) * (mpmath.exp(step * a) - 1) / a * mpmath.exp(a * step * l)).real
            )
        assert abs(kernel[l].item() - exact) < 1e-9 * kernel.abs().max().item(), l
    assert_close(diag_ssm_kernel(A, B, C, dt, L)[0], kernel, tolerance=1e-6)


def test_steps_of_almost_nothing_keep_their_digits():
    """(e^z - 1) / z near 0, where the difference has none."""
    z = torch.tensor([0, 1e-12, 1e-6j, 0.4999, 0.5001j, -3 + 2j], dtype=torch.complex128)
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 100
    for value, p, slope in zip(z.tolist(), phi(z).tolist(), phi_slope(z).tolist()):
        x = mpmath.mpc(value) + mpmath.mpf("1e-30")
        exact = (mpmath.exp(x) - 1) / x
        assert abs(p - exact) < 1e-15 and abs(slope - (mpmath.exp(x) - exact) / x) < 1e-15, value


def test_a_bilinear_pole_at_zero_and_below():
    """Real A with z = -2 (a = 0, a^0 = 1) and z < -2 (negative powers): no logarithm is taken."""
    A, ones = torch.tensor([[-2.0, -4.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    A, ones, dt = A.requires_grad_(), ones.requires_grad_(), torch.ones(1, dtype=torch.float64)
    kernel = diag_ssm_kernel(A, ones, ones, dt, 4, "bilinear")
    expected = torch.tensor([[1 / 2 + 1 / 3, -1 / 9, 1 / 27, -1 / 81]], dtype=torch.float64)
    assert_close(kernel, expected, tolerance=TIGHT)
    auto = torch.autograd.grad(kernel, A, expected)[0]
    explicit = diag_ssm_kernel_bwd(expected, A.detach(), ones.detach(), ones.detach(), dt, "bilinear", True)[0]
    assert_close(explicit, auto, tolerance=TIGHT)


# --- dplr_ssm_kernel ---


def dense(Lambda, P, B, C, h, pairs):
    """(A, B, C) of one head as a dense system over all states."""
    P = P if P.dim() == 3 else P[None]
    join = (lambda x: np.concatenate([x, x.conj()])) if pairs else (lambda x: x)
    lam, b, c = (join(x[h].numpy()) for x in (Lambda, B, C))
    return np.diag(lam) - sum(np.outer(p, p.conj()) for p in (join(p[h].numpy()) for p in P)), b, c


@pytest.mark.parametrize("op, sample", **cases("dplr_ssm_kernel"))
def test_low_rank_kernel_is_the_power_series(op, sample):
    (Lambda, P, B, C, dt, L), kwargs = sample.make(dtype=torch.float64)
    pairs = kwargs["conjugate_pairs"]
    expected = []
    for h in range(len(dt)):
        K = series(*dense(Lambda, P, B, C, h, pairs), dt[h].item(), L, "bilinear")
        expected.append(K.real)
        assert not pairs or np.abs(K.imag).max() < 1e-12 * np.abs(K).max()
    expected = torch.from_numpy(np.stack(expected))
    kernel = dplr_ssm_kernel(Lambda, P, B, C, dt, L, conjugate_pairs=pairs)
    assert_close(kernel, expected, tolerance=1e-11)
    if L > 1:
        assert error(kernel.roll(1, -1), kernel) > 0.1
    without = dplr_ssm_kernel(Lambda, 0 * P, B, C, dt, L, conjugate_pairs=pairs)
    assert error(without, kernel) > 0.05  # the low-rank term counts
    assert_close(without, diag_ssm_kernel(Lambda, B, C, dt, L, "bilinear", conjugate_pairs=pairs), tolerance=1e-11)
    truncated = truncate_C(Lambda, P, C, dt, L, pairs)
    again = dplr_ssm_kernel(Lambda, P, B, truncated, dt, L, conjugate_pairs=pairs, C_is_truncated=True)
    assert torch.equal(again, kernel) and error(truncated, C) > 1e-6


def test_low_rank_kernel_over_more_than_one_block_of_roots(monkeypatch):
    from scalekern.reference import dplr_ssm

    args = cases("dplr_ssm_kernel")["argvalues"][0][1].make(dtype=torch.float64)[0]
    dout = randn(2, 16)
    whole = dplr_ssm_kernel_fwd(*args, True), *dplr_ssm_kernel_bwd(dout, *args[:5], True)
    monkeypatch.setattr(dplr_ssm, "_ROOT_BLOCK", 5)
    for a, e in zip((dplr_ssm_kernel_fwd(*args, True), *dplr_ssm_kernel_bwd(dout, *args[:5], True)), whole):
        assert_close(a, e, tolerance=TIGHT)


def test_gradcheck():
    A, B, C = (randn(1, 2, seed=i, dtype=torch.complex128) for i in range(3))
    A = torch.complex(-A.real.abs() - 0.2, A.imag)
    inputs = [x.requires_grad_() for x in (A, B, C, torch.tensor([0.3], dtype=torch.float64))]
    for disc, pairs in itertools.product(("zoh", "bilinear", "dss"), (True, False)):
        kernel = lambda *x: diag_ssm_kernel(*x, 5, disc, conjugate_pairs=pairs)  # noqa: B023
        assert torch.autograd.gradcheck(kernel, inputs)
    P = randn(2, 1, 2, seed=4, dtype=torch.complex128).requires_grad_()
    for truncated in (True, False):
        assert torch.autograd.gradcheck(
            lambda A, B, C, dt, P: dplr_ssm_kernel(A, P, B, C, dt, 5, C_is_truncated=truncated),  # noqa: B023
            [*inputs, P],
        )
    u, x0 = randn(2, 1, 3).requires_grad_(), randn(2, 1, 2, dtype=torch.complex128).requires_grad_()
    D = randn(1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, A, B, C, dt, D, x: diag_ssm(u, A, B, C, D, dt, initial_state=x, return_last_state=True),
        [u, *inputs, D, x0],
    )


@pytest.mark.parametrize("op, sample", **cases("diag_ssm_kernel", "dplr_ssm_kernel", "diag_ssm"))
def test_explicit_backward_equals_autograd(op, sample):
    args, kwargs = sample.make(dtype=torch.float64)
    if kwargs.get("C_is_truncated") is False:  # the truncation is plain torch around the op: autograd differentiates it
        args = (*args[:3], truncate_C(*args[:2], *args[3:], kwargs["conjugate_pairs"]), *args[4:])
        sample = Sample("truncated", lambda f: (args, {**kwargs, "C_is_truncated": True}))
    tolerance = 1e-11 if "dss" in sample.name else TIGHT  # e^{zL} - 1 takes digits
    oracles.check_explicit_backward(op, sample, tolerance)


# --- diag_ssm ---


@pytest.mark.parametrize("op, sample", **cases("diag_ssm"))
def test_recurrence_is_the_convolution_and_the_equations(op, sample):
    (u, A, B, C, D, dt), kwargs = sample.make(dtype=torch.float64)
    disc, pairs, initial = kwargs["disc"], kwargs["conjugate_pairs"], kwargs["initial_state"]
    out, last = diag_ssm(u, A, B, C, D, dt, **{**kwargs, "return_last_state": True})
    assert torch.equal(out, diag_ssm(u, A, B, C, D, dt, **{**kwargs, "return_last_state": False}))
    states = np.zeros((*u.shape[:2], A.shape[1]), dtype=complex) if initial is None else initial.numpy() + 0j
    expected = np.zeros(u.shape)
    for b, h in np.ndindex(*u.shape[:2]):
        a, bb = np.diag(A[h].numpy()), B[h].numpy()
        if dt is not None:
            a, bb = discrete(a, bb, dt[h].item(), disc)
        x, c, skip = states[b, h], C[h].numpy(), 0 if D is None else D[h].item()
        for t, value in enumerate(u[b, h].tolist()):
            x = a @ x + bb * value
            expected[b, h, t] = (2 if pairs and A.is_complex() else 1) * (c @ x).real + skip * value
        states[b, h] = x
    assert_close(out, torch.from_numpy(expected), tolerance=1e-12)
    assert_close(last, torch.from_numpy(states if A.is_complex() else states.real), tolerance=1e-12)
    if initial is None:
        kernel = diag_ssm_kernel(A, B, C, dt, u.shape[2], disc, conjugate_pairs=pairs)
        assert_close(out, fft_conv(u, kernel, skip=D), tolerance=1e-12)
    else:
        assert error(diag_ssm(u, A, B, C, D, dt, disc=disc, conjugate_pairs=pairs), out) > 0.01
    for name, wrong in {"zero": 0 * out, "shifted": out.roll(1, -1)}.items():
        assert out.shape[2] == 1 and name == "shifted" or error(wrong, out) > 2 * TOLERANCE[torch.bfloat16], name


def test_split_and_joined():
    (u, A, B, C, D, dt), _ = cases("diag_ssm")["argvalues"][0][1].make(dtype=torch.float64)
    u = u.requires_grad_()
    whole, last = diag_ssm(u, A, B, C, D, dt, return_last_state=True)
    weight = randn(*whole.shape)
    expected = torch.autograd.grad(whole, u, weight)[0]
    for cuts in ([0, 5, 17], [0, 1, 16, 17], range(18)):
        parts, state = [], None
        for begin, end in zip(cuts, cuts[1:]):
            part = u[..., begin:end]
            out, state = diag_ssm(part, A, B, C, D, dt, initial_state=state, return_last_state=True)
            parts.append(out)
        joined = torch.cat(parts, -1)
        assert_close(joined, whole, tolerance=TIGHT)
        assert_close(state, last, tolerance=TIGHT)
        assert_close(torch.autograd.grad(joined, u, weight)[0], expected, tolerance=TIGHT)


def test_result_dtypes():
    A, B, C, dt = cases("diag_ssm_kernel")["argvalues"][0][1].make(dtype=torch.float32)[0][:4]
    exact = diag_ssm_kernel(*(upcast(x) for x in (A, B, C, dt)), 30)
    assert_close(diag_ssm_kernel(A, B, C, dt, 30), exact, tolerance=1e-7)
    assert diag_ssm_kernel(A, B, C, dt, 30).dtype == torch.float32 and exact.dtype == torch.float64
    assert dplr_ssm_kernel(A, A, B, C, dt, 30).dtype == torch.float32
    u = randn(2, 3, 6).bfloat16()
    out, state = diag_ssm(u, A, B, C, None, dt, return_last_state=True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.complex64
    out, state = diag_ssm(u, A, B, C, None, dt, return_last_state=True, initial_state=state.to(torch.complex128))
    assert out.dtype == torch.bfloat16 and state.dtype == torch.complex128
    empty, state = diag_ssm(u[..., :0], A, B, C, None, dt, initial_state=state, return_last_state=True)
    assert empty.shape == (2, 3, 0) and state.abs().sum() > 0


@pytest.mark.parametrize("disc", ["dss", "foh"])
def test_unknown_discretizations_are_refused(disc):
    A, B, C, dt = cases("diag_ssm_kernel")["argvalues"][0][1].make()[0][:4]
    with pytest.raises(ValueError, match=f"disc must be one of 'zoh', 'bilinear', got '{disc}'"):
        diag_ssm(randn(1, 3, 2), A, B, C, None, dt, disc=disc)
    with pytest.raises(ValueError, match="disc must be one of 'zoh', 'bilinear', 'dss', got 'foh'"):
        diag_ssm_kernel(A, B, C, dt, 3, "foh")
