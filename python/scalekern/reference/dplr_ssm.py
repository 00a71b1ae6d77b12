"""Oracle of S4's convolution kernel: a diagonal state matrix plus a low-rank term.

Shape letters: H heads, N states, L length, R rank, J roots of unity in a block.

Computed in complex128 whatever the inputs. The transform is torch's FFT; that of the tests is a power series.
"""

import torch

from scalekern.reference._complex import as_dtype, conj, real_dtype, wide

_ROOT_BLOCK = 1024


def dplr_ssm_kernel(Lambda, P, B, C, dt, L, *, conjugate_pairs=True, C_is_truncated=False):
    """The kernel K[l] = Re(C a^l b), l < L, of A = diag(Lambda) - sum_r P_r P_r^H under the bilinear transform (S4).

    Args:
        Lambda, B, C: (H, N), complex.   P: (H, N), or (R, H, N) for rank R.   dt: (H,), real.
        L: length, from 1.
        conjugate_pairs: the N states are the halves of 2 N states in conjugate pairs, in all four parameters: the
            rank-R term couples the halves, so K is not 2 Re of a sum over one of them.
        C_is_truncated: C is already C (I - a^L), which S4 trains in place of C (`truncate_C`).

    Returns:
        K (H, L) in C's real dtype. NaN if a Lambda_n on the imaginary axis falls on a root of unity, as 0 always does:
        r_n below has a pole there, which K itself has not. S4 keeps Re(Lambda) at -1e-4 or below.

    With the truncated C and w_j = exp(-2 pi i j / L), f = 1 + w, r_n(w) = dt / (2 (1 - w) - f dt Lambda_n), K's Fourier
    transform is (Woodbury; the form that stays finite at w = -1)

        K^(w) = 2 [c_CB - f c_CP (I + f c_PP)^-1 c_PB]        c_XY(w) = sum_n X_n Y_n r_n(w), the Cauchy sums

    Source: Gu et al., Efficiently Modeling Long Sequences with Structured State Spaces (S4), 2022, section 3 and
    appendix C.
    """
    truncated = C if C_is_truncated else truncate_C(Lambda, P, C, dt, L, conjugate_pairs)
    return dplr_ssm_kernel_fwd(Lambda, P, B, truncated, dt, L, conjugate_pairs).to(real_dtype(C))


def truncate_C(Lambda, P, C, dt, L, conjugate_pairs=True):
    """C (I - a^L) (H, N), complex128: with it a generating function over L terms is one over all. By dense powers."""
    states = C.shape[1]
    Lambda, P, C = (_paired(x, conjugate_pairs) for x in (Lambda, _ranks(P), C))
    A = torch.diag_embed(Lambda) - torch.einsum("rhn,rhm->hnm", P, conj(P))
    half = dt.to(torch.float64)[:, None, None] / 2 * A
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    a = torch.linalg.solve(eye - half, eye + half)
    return (C - (C[:, None] @ torch.linalg.matrix_power(a, L))[:, 0])[:, :states]


def dplr_ssm_kernel_fwd(Lambda, P, B, C, dt, L, conjugate_pairs):
    """K (H, L) from the truncated C."""
    Lambda, P, B, c = (_paired(x, conjugate_pairs) for x in (Lambda, _ranks(P), B, C))
    spectrum = []
    for _, w in _roots(L, C.device):
        _, r, _, _, _, right = _woodbury(Lambda, P, B, c, dt, w)
        spectrum.append(2 * torch.einsum("hn,hnj,hnj->hj", c, r, right))
    spectrum = torch.cat(spectrum, -1)
    return (torch.fft.ifft(spectrum) if spectrum.numel() else spectrum).real.to(real_dtype(C))


def dplr_ssm_kernel_bwd(dout, Lambda, P, B, C, dt, conjugate_pairs):
    """(dLambda, dP, dB, dC, ddt) of dplr_ssm_kernel_fwd. With g = fft(dK) / L, q = conj(P) and the solutions
    s = (I + f c_PP)^-1 c_PB, t = c_CP (I + f c_PP)^-1, let

        right = B - f sum_r s_r P_r           left = C - f sum_r t_r q_r          so that K^ = 2 sum_n C r right

    Then, summed over the roots w (conjugate gradients, as in autograd):

        dC   = 2 g conj(r right)              dB   = 2 g conj(r left)
        dP_r = -2 g conj(f s_r r left)        dq_r = -2 g conj(f t_r r right)
        dr   = 2 g conj(left right)           dLambda = dr conj(f r^2)     ddt = Re dr conj(2 (1 - w) r^2) / dt^2
    """
    L, lambda_, p, b, c = dout.shape[1], *(_paired(x, conjugate_pairs) for x in (Lambda, _ranks(P), B, C))
    dout = dout.to(torch.complex128)
    spectrum = 2 * (torch.fft.fft(dout) if dout.numel() else dout) / L
    dlambda, dp, db, dc = (torch.zeros_like(x) for x in (lambda_, p, b, c))
    ddt = torch.zeros_like(dt, dtype=torch.float64)
    for place, w in _roots(L, dout.device):
        f, r, s, t, left, right = _woodbury(lambda_, p, b, c, dt, w)
        g = spectrum[:, None, place]
        dleft, dright = g * conj(r * left), g * conj(r * right)
        dr = g * conj(left * right)
        dc += dright.sum(-1)
        db += dleft.sum(-1)
        dp -= torch.einsum("hnj,hjr->rhn", dleft, conj(f[:, None] * s))
        dp -= torch.einsum("hnj,hjr->rhn", conj(dright), f[:, None] * t)  # dq's conjugate
        dlambda += (dr * conj(f * r * r)).sum(-1)
        ddt += (dr * conj(2 * (1 - w) * r * r)).real.sum((1, 2)) / dt.to(torch.float64).square()
    dlambda, dp, db, dc = (_unpaired(g, conjugate_pairs) for g in (dlambda, dp, db, dc))
    gradients = zip((dlambda, dp.reshape(P.shape), db, dc), (Lambda, P, B, C))
    return *(as_dtype(g, x.dtype) for g, x in gradients), ddt.to(dt.dtype)


def _woodbury(Lambda, P, B, C, dt, w):
    """(f (J,), r (H, N, J), s (H, J, R), t (H, J, R), left (H, N, J), right (H, N, J)) at J roots w."""
    dt, q = dt.to(torch.float64)[:, None, None], conj(P)
    f = 1 + w
    r = dt / (2 * (1 - w) - f * dt * Lambda[..., None])
    eye = torch.eye(P.shape[0], dtype=P.dtype, device=P.device)
    inner = eye + f[:, None, None] * torch.einsum("rhn,shn,hnj->hjrs", q, P, r)
    s = torch.linalg.solve(inner, torch.einsum("rhn,hn,hnj->hjr", q, B, r)[..., None])[..., 0]
    t = torch.linalg.solve(inner.mT, torch.einsum("hn,rhn,hnj->hjr", C, P, r)[..., None])[..., 0]
    right = B[..., None] - f * torch.einsum("rhn,hjr->hnj", P, s)
    left = C[..., None] - f * torch.einsum("rhn,hjr->hnj", q, t)
    return f, r, s, t, left, right


def _roots(length, device):
    """(slice, roots) in blocks of the roots exp(-2 pi i j / L), j < L: what bounds the (H, N, J) buffers."""
    for begin in range(0, length, _ROOT_BLOCK):
        j = torch.arange(begin, min(begin + _ROOT_BLOCK, length), dtype=torch.float64, device=device)
        yield slice(begin, begin + len(j)), torch.polar(torch.ones_like(j), -2 * torch.pi / length * j)


def _ranks(P):
    return P if P.dim() == 3 else P[None]


def _paired(x, conjugate_pairs):
    x = wide(x)
    return torch.cat([x, conj(x)], -1) if conjugate_pairs else x


def _unpaired(g, conjugate_pairs):
    if not conjugate_pairs:
        return g
    half, other = g.chunk(2, -1)
    return half + conj(other)
