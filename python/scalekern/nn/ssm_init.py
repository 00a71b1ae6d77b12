"""Initial state matrices of state space models: HiPPO, its diagonal-plus-low-rank form, and S4D's diagonal ones.

N state size. x' = A x + B u keeps coefficients of the past of u in an orthonormal basis: x_n(t) is the integral of
K_n(s) u(t - s) with K(s) = e^{sA} B.

    measure   K_n(s)                                          real part of Lambda    rank of P
    legs      e^-s p_n(e^-s), p_n Legendre on [0, 1]          -1/2                   1
    legt      p_n(1 - s) on [0, 1], 0 beyond                   0                     2
    lagt      e^{-s/2} L_n(s), L_n Laguerre                    0                     1
    fout      1, sqrt(2) cos 2 pi m s, sqrt(2) sin 2 pi m s    0                     1
              on [0, 1], 0 beyond

legs and lagt are exact for every N, legt and fout as N grows. state-spaces/s4 has legt and fout at half this speed (a
window of 2): A / 2 and B / 2, which is dt / 2.

Sources: LegT and LagT: Gu et al., HiPPO, 2020, section 2.3; LegS: section 3. LegS as a time-invariant system, and FouT:
Gu et al., How to Train Your HiPPO, 2023, section 3. The low-rank form: Gu et al., S4, 2022, section 3.2 and appendix C.
S4D-Lin and S4D-Inv: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models, 2022,
section 4.
"""

import torch

from scalekern import _checks

MEASURES = ("legs", "legt", "lagt", "fout")
S4D = ("lin", "inv", "legs")


def hippo(measure, N):
    """(A (N, N), B (N,)) of a measure in float64. fout orders its basis 1, 0, cos, sin, cos 2, sin 2, ...

    Raises:
        ValueError: an unknown measure.
    """
    _checks.choice("hippo", "measure", measure, MEASURES)
    _checks.at_least("hippo", "N", N, 1)
    n = torch.arange(N, dtype=torch.float64)
    if measure == "legs":
        B = (2 * n + 1).sqrt()
        return -torch.tril(torch.outer(B, B), -1) - torch.diag(n + 1), B
    if measure == "legt":
        B = (2 * n + 1).sqrt()
        sign = 1 - 2 * ((n[:, None] - n) % 2)
        return -torch.outer(B, B) * (torch.tril(torch.ones_like(sign)) + torch.triu(sign, 1)), B
    if measure == "lagt":
        ones = n.new_ones(N, N)
        return torch.diag(ones[0] / 2) - torch.tril(ones), ones[0]
    return _fourier(n)


def _fourier(n):
    """d/dt of the coefficients turns each cosine and its sine, takes u(t) in and lets u(t - 1) out, which is read off
    the series: at the ends of the window that has the mean value (u(t) + u(t - 1)) / 2."""
    cosine = (n % 2 == 0).to(n.dtype)
    ends = 2**0.5 * cosine  # the basis at s = 0 and at s = 1
    ends[:1] = 1
    frequency = (torch.pi * n * cosine)[:-1]  # 2 pi m, m = n / 2
    turn = torch.diag(frequency, -1) - torch.diag(frequency, 1)
    return turn - 2 * torch.outer(ends, ends), 2 * ends


def low_rank(measure, N):
    """P (R, N), float64, with A + P^T P = (real part) I + a skew-symmetric matrix.

    Raises:
        ValueError: an unknown measure.
    """
    _checks.choice("low_rank", "measure", measure, MEASURES)
    _checks.at_least("low_rank", "N", N, 1)
    n = torch.arange(N, dtype=torch.float64)
    if measure == "legs":
        return (n + 0.5).sqrt()[None]
    if measure == "legt":  # even and odd degrees: one factor each
        return (2 * n + 1).sqrt() * torch.stack([1 - n % 2, n % 2])
    if measure == "lagt":
        return torch.full_like(n, 0.5).sqrt()[None]
    return hippo("fout", N)[1][None] / 2**0.5


def nplr(measure, N):
    """A = V (diag(Lambda) - P^T conj(P)) V^H over both halves of the conjugate pairs; the half with Im >= 0 is given.

    Returns:
        Lambda (N / 2,), P (R, N / 2), B (N / 2,), V (N, N / 2), complex128, by rising imaginary part; P and B in the
        basis of V's columns. The phase of a column is such that B is real and not negative.

    Raises:
        ValueError: an unknown measure, or an odd N.
    """
    _checks.choice("nplr", "measure", measure, MEASURES)
    if not isinstance(N, int) or N < 2 or N % 2:
        raise ValueError(f"nplr: N must be even and positive, got {N!r}")
    A, B = hippo(measure, N)
    P = low_rank(measure, N)
    real = -0.5 if measure == "legs" else 0.0
    skew = A + P.T @ P - real * torch.eye(N, dtype=torch.float64)
    imaginary, V = (x[..., N // 2 :] for x in torch.linalg.eigh(-1j * skew))
    if measure == "fout":  # the constant and its missing sine: a pair of zeros, of which eigh gives any basis
        imaginary[0] = 0
        V[:, 0] = 0
        V[0, 0], V[1, 0] = 2**-0.5, -1j * 2**-0.5
    b = V.mH @ B.to(V.dtype)
    phase = torch.where(b.abs() > 1e-12, b / b.abs(), 1)
    V = V * phase
    return torch.complex(torch.full_like(imaginary, real), imaginary), (V.mH @ P.T.to(V.dtype)).T, b / phase, V


def s4d(name, N):
    """Lambda (N / 2,), complex128, the half with Im >= 0. "lin": -1/2 + i pi n; "inv": -1/2 + i N/pi (N/(2n+1) - 1);
    "legs": nplr("legs", N) without its low-rank term.

    Raises:
        ValueError: an unknown name, or an odd N.
    """
    _checks.choice("s4d", "name", name, S4D)
    if not isinstance(N, int) or N < 2 or N % 2:
        raise ValueError(f"s4d: N must be even and positive, got {N!r}")
    if name == "legs":
        return nplr("legs", N)[0]
    n = torch.arange(N // 2, dtype=torch.float64)
    imaginary = torch.pi * n if name == "lin" else N / torch.pi * (N / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), imaginary)
