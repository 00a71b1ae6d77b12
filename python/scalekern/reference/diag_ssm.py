"""Oracles of diagonal state space models (S4D, DSS): their convolution kernel and their recurrence.

Shape letters: H heads, N states, L length, B batch (in `diag_ssm`), Q coarse steps.

    x' = A x + B u,  y = C x    discretized with step dt:    x_t = a x_{t-1} + b u_t,  y_t = s Re(C x_t)
    K[l] = s Re sum_n C_n a_n^l b_n                          s = 2 for a complex A with conjugate_pairs, else 1

Complex parameters are the halves of conjugate pairs, as S4D stores them: 2 Re is the sum over both halves. With
z = dt A:

    disc        a                      b
    zoh         e^z                    B (e^z - 1) / A
    bilinear    (1 + z/2) / (1 - z/2)  B dt / (1 - z/2)
    dss         e^z                    B (e^z - 1) / (A (e^{zL} - 1)): the row softmax over the length

Everything is computed in complex128 whatever the inputs: a^l at l = 256K is not to be had from float32 exponents.
"""

import math

import torch
import torch.nn.functional as F

from scalekern.reference._complex import as_dtype, conj, real_dtype, wide

DISCRETIZATIONS = ("zoh", "bilinear", "dss")
DSS_EPSILON = 1e-7  # of 1/x = conj(x) / (|x|^2 + epsilon) in DSS's released code: the softmax has poles
_PHI_SERIES = 0.5  # |z| below which (e^z - 1) / z and its slope are taken from their series
_PHI_TERMS = 16  # 0.5^16 / 17! < 1e-19

# --- diag_ssm_kernel ---


def diag_ssm_kernel(A, B, C, dt, L, disc="zoh", *, conjugate_pairs=True):
    """The convolution kernel K (H, L) of H diagonal state space models. Differentiable by autograd.

    Args:
        A, B, C: (H, N), complex, or all real.   dt: (H,), real.
        L: length.   disc: "zoh", "bilinear" or "dss", see the module. With "dss" K depends on L in all of its
            elements; eigenvalues with a positive real part are normalized by their last power, as DSS does.
        conjugate_pairs: K = 2 Re(sum) for a complex A (S4D), else Re(sum).

    Returns:
        K (H, L) in C's real dtype, at least float32.

    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (S4D), 2022, section 3;
    "dss": Gupta et al., Diagonal State Spaces are as Effective as Structured State Spaces, 2022, proposition 1.
    """
    return diag_ssm_kernel_fwd(A, B, C, dt, L, disc, conjugate_pairs)


def diag_ssm_kernel_fwd(A, B, C, dt, L, disc, conjugate_pairs):
    """K (H, L)."""
    a, b = discretize(A, B, dt, disc, L)
    w = scale(A, conjugate_pairs) * wide(C) * b
    ends = growing(A, disc)
    kernel = _vandermonde(torch.where(ends, 0, w), a, L)
    if disc == "dss":  # whose growing terms count their powers from the end
        kernel = kernel + _vandermonde(torch.where(ends, w, 0), a, L).flip(-1)
    return kernel.to(real_dtype(C))


def diag_ssm_kernel_bwd(dout, A, B, C, dt, disc, conjugate_pairs):
    """(dA, dB, dC, ddt); complex gradients are conjugate, as in autograd.

    With m0_n = sum_l dK[l] a_n^l and m1_n = sum_l l dK[l] a_n^(l-1):

        dC = s conj(b m0)        db = s conj(C m0)        da = s conj(C b m1)
    """
    length = dout.shape[1]
    a, b = discretize(A, B, dt, disc, length)
    c = wide(C)
    g = scale(A, conjugate_pairs) * dout.to(torch.complex128)
    m0, m1 = _moments(g, a)
    if disc == "dss":
        last0, last1 = _moments(g.flip(-1), a)
        ends = growing(A, disc)
        m0, m1 = torch.where(ends, last0, m0), torch.where(ends, last1, m1)
    dA, dB, ddt = discretize_bwd(conj(c * b * m1), conj(c * m0), A, B, dt, disc, length)
    return dA, dB, as_dtype(conj(b * m0), C.dtype), ddt


def discretize(A, B, dt, disc, length=None):
    """(a, b), complex128 (H, N): without dt A and B themselves. A length is needed by "dss" alone."""
    if dt is None:
        return wide(A), wide(B)
    A, B, dt = wide(A), wide(B), dt.to(torch.float64)[:, None]
    z = dt * A
    if disc == "zoh":
        return torch.exp(z), B * dt * phi(z)
    if disc == "bilinear":
        h = 1 / (1 - z / 2)
        return (1 + z / 2) * h, B * dt * h
    if disc != "dss" or length is None:
        allowed = DISCRETIZATIONS if length is not None else DISCRETIZATIONS[:2]
        raise ValueError(f"diag_ssm: disc must be one of {', '.join(map(repr, allowed))}, got {disc!r}")
    z = torch.where(A.real > 0, -z, z)
    return torch.exp(z), B * torch.expm1(z) * _reciprocal(torch.expm1(z * length) * A)


def discretize_bwd(da, db, A, B, dt, disc, length=None):
    """(dA, dB, ddt) in the dtypes of A, B, dt; without dt the last is None."""
    if dt is None:
        return as_dtype(da, A.dtype), as_dtype(db, B.dtype), None
    A_, B_, dt_ = wide(A), wide(B), dt.to(torch.float64)[:, None]
    z = dt_ * A_
    dA = ddt = 0  # what does not come through z
    if disc == "zoh":
        p = phi(z)
        dB, ddt = db * conj(dt_ * p), db * conj(B_ * p)
        dz = da * conj(torch.exp(z)) + db * conj(B_ * dt_ * phi_slope(z))
    elif disc == "bilinear":  # with h = 1 / (1 - z/2): h' = h^2 / 2, a' = h^2
        h = 1 / (1 - z / 2)
        dB, ddt = db * conj(dt_ * h), db * conj(B_ * h)
        dz = da * conj(h * h) + db * conj(B_ * dt_ * h * h / 2)
    else:
        sign = 1 - 2.0 * (A_.real > 0)
        z = sign * z
        denominator, numerator = torch.expm1(z * length), torch.expm1(z)
        x = denominator * A_
        r = _reciprocal(x)
        dB, dr = db * conj(numerator * r), db * conj(B_ * numerator)
        # r = conj(x) / (|x|^2 + eps) is not holomorphic: dr/dx = -r^2, dr/dconj(x) = eps / (|x|^2 + eps)^2.
        dx = -dr * conj(r * r) + conj(dr) * DSS_EPSILON / (x.abs().square() + DSS_EPSILON).square()
        slope = A_ * length * torch.exp(z * length)
        dz = sign * (da * conj(torch.exp(z)) + db * conj(B_ * r * torch.exp(z)) + dx * conj(slope))
        dA = dx * conj(denominator)
    dA, ddt = dA + dt_ * dz, (ddt + dz * conj(A_)).real.sum(1)
    return as_dtype(dA, A.dtype), as_dtype(dB, B.dtype), ddt.to(dt.dtype)


def phi(z):
    """(e^z - 1) / z, 1 at 0."""
    small = z.abs() < _PHI_SERIES
    safe = torch.where(small, 1, z)
    return torch.where(small, _phi_series(z, 0), torch.expm1(safe) / safe)


def phi_slope(z):
    """The derivative of phi."""
    small = z.abs() < _PHI_SERIES
    safe = torch.where(small, 1, z)
    return torch.where(small, _phi_series(z, 1), (torch.exp(safe) - torch.expm1(safe) / safe) / safe)


def _phi_series(z, derivative):
    """sum_k z^k / (k + 1)!, or its derivative sum_k k z^(k-1) / (k + 1)!, by Horner's rule."""
    total = torch.zeros_like(z)
    for k in range(_PHI_TERMS, derivative - 1, -1):
        total = total * z + (k if derivative else 1) / math.factorial(k + 1)
    return total


def growing(A, disc):
    return (A.real > 0) & (disc == "dss")


def _reciprocal(x):
    return conj(x) / (x.abs().square() + DSS_EPSILON)


def _powers(a, count):
    """a^0 .. a^(count - 1) along a new last axis, by products: exact at 0 and for a negative a."""
    factors = torch.cat([torch.ones_like(a)[..., None], a[..., None].expand(*a.shape, count)], -1)
    return torch.cumprod(factors, -1)[..., :count]


def _steps(length):
    """(fine, coarse): l = q fine + j with q < coarse, j < fine, both about sqrt(L)."""
    fine = max(1, int(length**0.5))
    return fine, -(-length // fine)


def _vandermonde(w, a, length):
    """Re sum_n w_n a_n^l as (H, L), without an (H, N, L) buffer: a^l = a^(q fine) a^j, a product of two matrices."""
    fine, coarse = _steps(length)
    a_fine = _powers(a, fine)
    a_coarse = _powers(a_fine[..., -1] * a, coarse)
    rows = (w[..., None] * a_coarse).transpose(1, 2) @ a_fine  # [H, Q, fine]
    return rows.real.flatten(1)[:, :length]


def _moments(g, a):
    """(sum_l g[l] a_n^l, sum_l l g[l] a_n^(l-1)), each (H, N)."""
    weights = torch.arange(1, max(1, g.shape[1]), device=g.device)
    return _transposed(g, a), _transposed(weights * g[:, 1:], a)


def _transposed(g, a):
    """sum_l g[l] a_n^l as (H, N)."""
    fine, coarse = _steps(g.shape[1])
    a_fine = _powers(a, fine)
    a_coarse = _powers(a_fine[..., -1] * a, coarse)
    rows = F.pad(g, (0, fine * coarse - g.shape[1])).unflatten(1, (coarse, fine))  # [H, Q, fine]
    return ((a_fine @ rows.transpose(1, 2)) * a_coarse).sum(-1)


# --- diag_ssm ---


def diag_ssm_discretize(A, B, dt, disc="zoh"):
    """(a, b) of x_t = a x_{t-1} + b u_t, complex128 (H, N), for diag_ssm without dt. Differentiable by autograd.

    Args:
        A, B: (H, N), complex or real.   dt: (H,), real.   disc: "zoh" or "bilinear", see the module.

    Returns:
        a and b, for real A and B in float64.

    Source: as diag_ssm_kernel.
    """
    values = discretize(A, B, dt, disc)
    return values if A.is_complex() else tuple(x.real for x in values)


def diag_ssm(
    u, A, B, C, D, dt, *, initial_state=None, return_last_state=False, disc="zoh", conjugate_pairs=True, method="auto"
):  # fmt: skip
    """The same models as a recurrence: y = causal convolution of u with diag_ssm_kernel(A, B, C, dt, L, disc) + D u.

    Args:
        u: (B, H, L).   A, B, C, dt: as for diag_ssm_kernel.   D: (H,) or None.
            Without dt A and B are a and b, as `diag_ssm_discretize` makes them.
        initial_state: (B, H, N), x before the first token; zeros when None.
        return_last_state: also return x after the last token.   disc: "zoh" or "bilinear"; nothing without dt.
        method: nothing here, where the recurrence is all there is.

    Returns:
        y (B, H, L) in u's dtype; with return_last_state also (B, H, N), in initial_state's dtype, or else complex (real
        for a real A) of float32, of float64 for a float64 u.

    Source: as diag_ssm_kernel; the states are those that H3 passes between chunks (Fu et al., 2023, section 4.2).
    """
    out, last_state = diag_ssm_fwd(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, method)
    return (out, last_state) if return_last_state else out


def diag_ssm_fwd(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, method="auto", return_last_state=True):
    """(out, last_state); the latter is empty unless it is wanted."""
    a, b, c = _coefficients(A, B, C, dt, disc)
    states = _scan(u, a, b, initial_state)
    y = [(c * x).sum(-1).real for x in states[1:]]
    out = scale(A, conjugate_pairs) * torch.stack(y, -1) if y else torch.zeros_like(u, dtype=torch.float64)
    out = out if D is None else out + D.to(torch.float64)[:, None] * u
    dtype = state_dtype(u, A, initial_state)
    return out.to(u.dtype), as_dtype(states[-1], dtype) if return_last_state else u.new_empty(0, dtype=dtype)


def diag_ssm_bwd(dout, dlast_state, u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, method="auto"):
    """(du, dA, dB, dC, dD, ddt, dinitial_state); an absent input's gradient is empty (0,), dlast_state may be None.

    With g = dL/dx_t flowing backward through time:

        g_t = conj(a) g_{t+1} + s conj(C) dy_t        dC  = s sum_t conj(x_t) dy_t
        da  = sum_t g_t conj(x_{t-1})                 db  = sum_t g_t u_t
        du_t = Re sum_n g_t conj(b) + D dy_t          dD  = sum_t dy_t u_t
    """
    a, b, c = _coefficients(A, B, C, dt, disc)
    states = _scan(u, a, b, initial_state)
    dy, u_ = dout.to(torch.float64), u.to(torch.float64)
    g = torch.zeros_like(states[0]) if dlast_state is None else dlast_state.to(a.dtype)
    da, db, dc = (torch.zeros_like(a) for _ in "abc")
    du = torch.zeros_like(u_) if D is None else D.to(torch.float64)[:, None] * dy
    factor = scale(A, conjugate_pairs)
    for t in reversed(range(u.shape[2])):
        dyt = factor * dy[..., t, None]
        g = g + conj(c) * dyt
        dc += (conj(states[t + 1]) * dyt).sum(0)
        da += (g * conj(states[t])).sum(0)
        db += (g * u_[..., t, None]).sum(0)
        du[..., t] += (g * conj(b)).sum(-1).real
        g = g * conj(a)
    dA, dB, ddt = discretize_bwd(da, db, A, B, dt, disc)
    ddt = u.new_empty(0) if ddt is None else ddt
    dD = u.new_empty(0) if D is None else (dy * u_).sum((0, 2)).to(D.dtype)
    dinitial = u.new_empty(0) if initial_state is None else as_dtype(g, initial_state.dtype)
    return du.to(u.dtype), dA, dB, as_dtype(dc, C.dtype), dD, ddt, dinitial


def _coefficients(A, B, C, dt, disc):
    """a, b and C, in float64 for a real A: complex products make NaN of an infinite state."""
    values = *discretize(A, B, dt, disc), wide(C)
    return values if A.is_complex() else [x.real for x in values]


def _scan(u, a, b, initial_state):
    """x before the first and after every token: L + 1 states (B, H, N)."""
    first = u.new_zeros(u.shape[0], *a.shape) if initial_state is None else initial_state
    states = [first.to(a.dtype)]
    for t in range(u.shape[2]):
        states.append(a * states[-1] + b * u[..., t, None])
    return states


def state_dtype(u, A, initial_state):
    if initial_state is not None:
        return initial_state.dtype
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    return real.to_complex() if A.is_complex() else real


def scale(A, conjugate_pairs):
    return 2 if conjugate_pairs and A.is_complex() else 1
