"""The initial state matrices against their papers' matrices and against the bases that they stand for."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import laguerre, legendre
from oracles import one_thread  # noqa: F401

from scalekern.nn.ssm_init import MEASURES, hippo, low_rank, nplr, s4d
from scalekern.reference.dplr_ssm import dplr_ssm_kernel
from scalekern.testing import assert_close, error

R3, R5, R8 = 3**0.5, 5**0.5, 8**0.5
BY_HAND = {  # (A, B) for N = 3, as their papers print them
    "legs": ([[-1, 0, 0], [-R3, -2, 0], [-R5, -(15**0.5), -3]], [1, R3, R5]),
    "legt": ([[-1, R3, -R5], [-R3, -3, 15**0.5], [-R5, -(15**0.5), -5]], [1, R3, R5]),
    "lagt": ([[-0.5, 0, 0], [-1, -0.5, 0], [-1, -1, -0.5]], [1, 1, 1]),
    # The basis 1, (no sine), cos 2 pi s; the sine of cos 2 pi s comes with N = 4.
    "fout": ([[-2, 0, -R8], [0, 0, 0], [-R8, 0, -4]], [2, 0, R8]),
}
DEGREES = 5


def unit(*shape):
    return [0.0] * shape[0] + [1.0]


BASES = {
    "legs": lambda n, s: np.exp(-s) * (2 * n + 1) ** 0.5 * legendre.legval(2 * np.exp(-s) - 1, unit(n)),
    "lagt": lambda n, s: np.exp(-s / 2) * laguerre.lagval(s, unit(n)),
    "legt": lambda n, s: (s < 1) * (2 * n + 1) ** 0.5 * legendre.legval(1 - 2 * s, unit(n)),
    "fout": lambda n, s: (s < 1) * (
        (1.0 if n == 0 else 2**0.5 * np.cos(math.pi * n * s)) if n % 2 == 0
        else 2**0.5 * np.sin(math.pi * (n - 1) * s) + 0 * s
    ),
}  # fmt: skip


@pytest.mark.parametrize("measure", MEASURES)
def test_matrices_by_hand(measure):
    for actual, expected in zip(hippo(measure, 3), BY_HAND[measure]):
        assert_close(actual, torch.tensor(expected, dtype=torch.float64), tolerance=1e-15)
    if measure == "fout":
        turn = hippo("fout", 4)[0][2:, 2:]
        assert_close(turn, torch.tensor([[-4, -2 * math.pi], [2 * math.pi, 0]], dtype=torch.float64), tolerance=1e-15)
    A, B = hippo(measure, 1)
    assert A.tolist() == [[BY_HAND[measure][0][0][0]]] and B.tolist() == [BY_HAND[measure][1][0]]


@pytest.mark.parametrize("measure", MEASURES)
def test_the_system_keeps_coefficients_in_its_basis(measure):
    """e^{sA} B, by an eigenvalue-free exponential, is the basis: exactly, or up to the ringing of a finite series."""
    exact = measure in ("legs", "lagt")
    A, B = hippo(measure, 16 if exact else 128)
    step, states = torch.linalg.matrix_exp(A / 40), [B]
    for _ in range(64):
        states.append(step @ states[-1])
    away = [k for k in range(2, 65) if not 38 < k < 42]  # from the ends of the window, where a finite series rings
    kernels, times = torch.stack(states, 1)[:DEGREES, away], torch.tensor(away).double() / 40
    bases = torch.stack([torch.from_numpy(BASES[measure](n, times.numpy())) for n in range(DEGREES)])
    for n in range(DEGREES):
        if measure == "fout" and n == 1:
            assert kernels[1].abs().max() < 1e-12  # the constant has no sine
            continue
        assert_close(kernels[n], bases[n], tolerance=1e-9 if exact else 0.08, what=f"basis function {n}")
        assert error(-kernels[n], bases[n]) > 1 and error(kernels[(n + 1) % DEGREES], bases[n]) > 0.2


@pytest.mark.parametrize("N", [2, 6, 14, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_normal_plus_low_rank(measure, N):
    A, B = hippo(measure, N)
    Lambda, P, b, V = nplr(measure, N)
    rank = 2 if measure == "legt" else 1
    assert Lambda.shape == b.shape == (N // 2,) and P.shape == (rank, N // 2) and V.shape == (N, N // 2)
    normal = A + low_rank(measure, N).T @ low_rank(measure, N)
    real = -0.5 if measure == "legs" else 0
    skew = normal - real * torch.eye(N, dtype=torch.float64)
    assert (skew + skew.T).abs().max() < 1e-12 * A.abs().max()
    assert Lambda.real.eq(real).all() and Lambda.imag.ge(0).all() and Lambda.imag.diff().gt(0).all()
    assert (b.imag.abs() < 1e-10).all() and (b.real > -1e-10).all()
    both = [torch.cat([x, x.conj()], -1) for x in (Lambda, P, b, V)]
    Lambda, P, b, V = both
    assert_close(V.mH @ V, torch.eye(N, dtype=V.dtype), tolerance=1e-12)
    assert_close(V @ (torch.diag(Lambda) - P.T @ P.conj()) @ V.mH, A.to(V.dtype), tolerance=1e-12)
    assert_close(V @ b, B.to(V.dtype), tolerance=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_kernel_of_the_decomposition_is_that_of_the_matrix(measure):
    """Both a little damped, as S4 keeps them: fout's eigenvalue 0 lies on a root of unity, a pole of Cauchy's form."""
    N, L, dt, damping = 8, 33, 0.05, 1e-3
    A, B = hippo(measure, N)
    Lambda, P, b, V = nplr(measure, N)
    A, Lambda = A - damping * torch.eye(N, dtype=torch.float64), Lambda - damping
    C = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = torch.eye(N, dtype=torch.float64) - dt / 2 * A
    a, x = torch.linalg.solve(left, 2 * torch.eye(N, dtype=torch.float64) - left), torch.linalg.solve(left, dt * B)
    expected = []
    for _ in range(L):
        expected.append(C @ x)
        x = a @ x
    c = C.to(V.dtype) @ V
    kernel = dplr_ssm_kernel(Lambda[None], P[:, None], b[None], c[None], torch.tensor([dt], dtype=torch.float64), L)
    assert_close(kernel[0], torch.stack(expected), tolerance=1e-9)


def test_s4d():
    assert_close(s4d("lin", 8), torch.tensor([-0.5 + 1j * math.pi * n for n in range(4)]), tolerance=1e-7)
    inverse = [-0.5 + 1j * 8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]
    assert_close(s4d("inv", 8), torch.tensor(inverse, dtype=torch.complex128), tolerance=1e-15)
    legs = s4d("legs", 64)
    assert torch.equal(legs, nplr("legs", 64)[0])
    # S4D-Inv is the law that the largest eigenvalues of LegS follow.
    largest = s4d("inv", 64).imag[:2]
    assert ((legs.imag.flip(0)[:2] / largest - 1).abs() < 0.05).all()
    eigenvalues = np.linalg.eigvals((hippo("legs", 8)[0] + low_rank("legs", 8).T @ low_rank("legs", 8)).numpy())
    eigenvalues = sorted(eigenvalues[eigenvalues.imag > 0], key=lambda x: x.imag)
    assert_close(s4d("legs", 8), torch.tensor(np.array(eigenvalues)), tolerance=1e-12)


BAD = {
    "measure": (lambda: hippo("leg", 4), "hippo: measure must be one of 'legs', 'legt', 'lagt', 'fout', got 'leg'"),
    "nplr": (lambda: nplr("hermite", 4), "nplr: measure must be one of .*, got 'hermite'"),
    "odd": (lambda: nplr("legs", 5), "nplr: N must be even and positive, got 5"),
    "s4d": (lambda: s4d("real", 4), "s4d: name must be one of 'lin', 'inv', 'legs', got 'real'"),
    "s4d odd": (lambda: s4d("lin", 3), "s4d: N must be even and positive, got 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
