"""S4's convolution kernel by Cauchy sums in complex128, a block of heads and of frequencies at a time.

Shape letters: H heads, N states (2 N where they come in pairs), L length, R rank, J roots of unity, E = R + 1.

The oracle's formulas, with the left vectors X = (C, q_1, .., q_R), the right ones Y = (B, P_1, .., P_R), q = conj(P):

    M_xy(w) = sum_n X_n Y_n r_n(w)                    K^(w) = 2 [M_00 - f M_0p (I + f M_pp)^-1 M_p0]

so that a block is one reciprocal an element of (J, N) and one product of matrices, [J, N] @ [N, E E]. A real K has a
Hermitian spectrum: pairs need half of the roots. Backward, dM is made of the small solutions s and t, and

    dXY_n = sum_w dM conj(r_n)      dLambda_n = sum_xy conj(XY_n) S2_n      S2_n = sum_w dM conj(f r_n^2)
    ddt   = Re sum_n sum_xy conj(XY_n) (dXY_n + conj(Lambda_n) S2_n) / dt       since dr/ddt = (r + f Lambda r^2) / dt

are two more such products, transposed. float32 parameters are computed with in float64 as well: at a resonance
2 (1 - w) - f dt Lambda loses as many digits as Im(Lambda) / Re(Lambda) has.
"""

import torch

from scalekern.reference._complex import as_dtype, conj, real_dtype, wide

BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}  # of r, complex128


def kernel_fwd(Lambda, P, B, C, dt, L, conjugate_pairs):
    """K (H, L) from the truncated C."""
    out = torch.empty(*dt.shape, L, dtype=real_dtype(C), device=C.device)
    lambda_, X, Y = _stacked(Lambda, P, B, C, conjugate_pairs)
    for h, blocks in _blocks(lambda_, L, conjugate_pairs):
        XY = _products(X[h], Y[h])
        spectrum = [_spectrum(_cauchy(lambda_[h], dt[h], w)[0] @ XY, 1 + w) for w in blocks]
        out[h] = _inverse(torch.cat(spectrum, -1), L, conjugate_pairs)
    return out


def kernel_bwd(dout, Lambda, P, B, C, dt, conjugate_pairs):
    """(dLambda, dP, dB, dC, ddt)."""
    L, (lambda_, X, Y) = dout.shape[1], _stacked(Lambda, P, B, C, conjugate_pairs)
    dlambda, dX, dY, ddt = (torch.empty_like(x) for x in (lambda_, X, Y, dt.to(torch.float64)))
    for h, blocks in _blocks(lambda_, L, conjugate_pairs):
        XY, spectrum, first = _products(X[h], Y[h]), _inverse_bwd(dout[h], L, conjugate_pairs), 0
        dXY, square = torch.zeros_like(XY), torch.zeros_like(XY)  # [h, N, E E]
        for w in blocks:
            r, f = _cauchy(lambda_[h], dt[h], w)
            dM = _spectrum_bwd(spectrum[:, first : first + len(w)], r @ XY, 1 + w)
            r = conj(r).transpose(1, 2)
            dXY += r @ dM
            square += (r.square_().mul_(conj(f))) @ dM
            first += len(w)
        dlambda[h] = (conj(XY) * square).sum(-1)
        ddt[h] = ((conj(XY) * dXY).sum(-1) + conj(lambda_[h]) * dlambda[h]).real.sum(-1) / dt[h].to(torch.float64)
        dXY = dXY.unflatten(-1, (X.shape[-1], -1))  # [h, N, E, E]
        dX[h] = (dXY * conj(Y[h])[:, :, None]).sum(-1)
        dY[h] = (dXY * conj(X[h])[..., None]).sum(-2)
    dP = dY[..., 1:] + conj(dX[..., 1:])  # [H, 2 N, R]
    gradients = (_unpaired(g, conjugate_pairs) for g in (dlambda, dP, dY[..., 0], dX[..., 0]))
    dlambda, dP, dB, dC = gradients
    dP = dP.movedim(-1, 0).reshape(P.shape)
    results = zip((dlambda, dP, dB, dC), (Lambda, P, B, C))
    return *(as_dtype(g, x.dtype).contiguous() for g, x in results), ddt.to(dt.dtype)


def _stacked(Lambda, P, B, C, conjugate_pairs):
    """Lambda (H, N), X and Y (H, N, E), with the other halves of the pairs."""
    P = wide(P if P.dim() == 3 else P[None])
    X = torch.stack([wide(C), *conj(P)], -1)
    Y = torch.stack([wide(B), *P], -1)
    if not conjugate_pairs:
        return wide(Lambda), X, Y
    return tuple(torch.cat([x, conj(x)], 1) for x in (wide(Lambda), X, Y))


def _unpaired(g, conjugate_pairs):
    if not conjugate_pairs:
        return g
    half, other = g.chunk(2, 1)
    return half + conj(other)


def _blocks(lambda_, length, conjugate_pairs):
    """(heads, blocks of roots): the roots that a head needs, exp(-2 pi i j / L)."""
    budget = BLOCK_ELEMENTS["cuda" if lambda_.device.type == "cuda" else "cpu"] // max(1, lambda_.shape[1])
    j = torch.arange(length // 2 + 1 if conjugate_pairs else length, dtype=torch.float64, device=lambda_.device)
    roots = torch.polar(torch.ones_like(j), -2 * torch.pi / max(1, length) * j)
    heads = max(1, budget // max(1, len(j)))
    for h in range(0, lambda_.shape[0], heads):
        yield slice(h, h + heads), roots.split(max(1, budget // heads))


def _products(X, Y):
    return (X[..., None] * Y[:, :, None]).flatten(2)  # [h, N, E E]


def _cauchy(lambda_, dt, w):
    """(r (h, J, N), f (J))."""
    dt, f = dt.to(torch.float64)[:, None, None], 1 + w
    return dt / (2 * (1 - w)[:, None] - f[:, None] * (dt * lambda_[:, None])), f


def _solved(M, f):
    """(s (.., R), t (.., R)) from M (.., E E): s = (I + f M_pp)^-1 M_p0 and t = M_0p (I + f M_pp)^-1."""
    size = round(M.shape[-1] ** 0.5)
    M = M.unflatten(-1, (size, size))
    column, row, inner = M[..., 1:, 0], M[..., 0, 1:], f[:, None, None] * M[..., 1:, 1:]
    if size == 2:
        inverse = 1 / (1 + inner[..., 0])
        return column * inverse, row * inverse
    inner = inner + torch.eye(size - 1, dtype=M.dtype, device=M.device)
    return torch.linalg.solve(inner, column), torch.linalg.solve(inner.transpose(-2, -1), row)


def _spectrum(M, f):
    s, _ = _solved(M, f)
    return 2 * (M[..., 0] - f * (M[..., 1 : s.shape[-1] + 1] * s).sum(-1))


def _spectrum_bwd(g, M, f):
    """dM (h, J, E E): with the vectors (1, -f t) and (1, -f s) it is an outer product."""
    ones = torch.ones_like(M[..., :1])
    s, t = (torch.cat([ones, -f[:, None] * x], -1) for x in _solved(M, f))
    return 2 * g[..., None] * conj(t[..., None] * s[..., None, :]).flatten(-2)


def _inverse(spectrum, length, conjugate_pairs):
    return torch.fft.irfft(spectrum, length) if conjugate_pairs else torch.fft.ifft(spectrum).real


def _inverse_bwd(dout, length, conjugate_pairs):
    if not conjugate_pairs:
        return torch.fft.fft(dout.to(torch.complex128)) / length
    spectrum = torch.fft.rfft(dout.to(torch.float64)) / length
    spectrum[:, 1 : (length + 1) // 2] *= 2  # these stand for their mirror images as well
    return spectrum
