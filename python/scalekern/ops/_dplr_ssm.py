"""S4's convolution kernel by Cauchy sums in complex128, a block of heads at a time.

Shape letters: H heads, N states, L length, R rank, J roots of unity, E = R + 1, V = E E products.

The oracle's formulas, with the left vectors X = (C, q_1, .., q_R), the right ones Y = (B, P_1, .., P_R), q = conj(P).
Half angles take the common factor out of r_n: for w = exp(-2 i phi), with c = cos(phi), s = sin(phi), z = dt Lambda,

    r_n = e rho_n       rho_n = 1 / (2 i s - c z_n)       e = dt (c + i s) / 2       (1 + w) e = dt c = k, a real number
    M_xy = sum_n X_n Y_n rho_n                            K^ = 2 e [M_00 - k M_0p (I + k M_pp)^-1 M_p0]

A real K has a Hermitian spectrum: pairs need half of the roots, and their other halves the same products, conjugate.
Backward, dM is made of the small solutions, and with S_n = sum_w c dM conj(rho_n^2)

    dXY_n = sum_w dM conj(rho_n)      dLambda_n = dt sum_xy conj(XY_n) S_n
    ddt   = Re sum_n [sum_xy conj(XY_n) dXY_n + conj(Lambda_n) dLambda_n] / dt

float32 parameters are computed with in float64 as well: at a resonance 2 i s - c z loses as many digits as
Im(Lambda) / Re(Lambda) has. On a CPU the sums are kernels of the native library; where that is missing, and on a GPU,
they are products of matrices, [V, N] @ [N, J], a block of roots at a time.
Memory: V J numbers of a block of heads, never N J.
"""

import functools

import torch

from scalekern import _dispatch
from scalekern.reference._complex import as_dtype, conj, real_dtype, wide

# Of the sums of a block of heads, and of rho in a block of roots where it is there at all.
BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}

# --- Cauchy sums ---

_sums_cpu, _sums_bwd_cpu = _dispatch.native("cauchy_sums", "cpu"), _dispatch.native("cauchy_sums_bwd", "cpu")


@functools.cache
def _native_on_cpu():
    return _dispatch.Backend("cpu", _sums_bwd_cpu).unavailable("cpu") is None


def cauchy_sums(z, products, cosine, sine, pairs):
    """M (h, V, J) of z (h, N) and products (h, N, V)."""
    out = products.new_empty(len(z), products.shape[2], len(cosine))
    if z.device.type == "cpu" and _native_on_cpu():
        _sums_cpu(out, z.contiguous(), products.contiguous(), cosine, sine, pairs)
        return out
    products = products.transpose(1, 2)
    for block, rho, other in _fractions(z, cosine, sine, pairs):
        found = products @ rho
        out[..., block] = found + conj(products) @ other if pairs else found
    return out


def cauchy_sums_bwd(dM, z, products, cosine, sine, pairs):
    """(dXY, S), each (h, N, V)."""
    dM = dM.contiguous()
    results = [torch.zeros(products.shape, dtype=products.dtype, device=products.device) for _ in "dS"]
    if z.device.type == "cpu" and _native_on_cpu():
        _sums_bwd_cpu(*results, dM, z.contiguous(), products.contiguous(), cosine, sine, pairs)
        return results
    for block, rho, other in _fractions(z, cosine, sine, pairs):
        d = dM[..., block].transpose(1, 2)
        for k, factor in enumerate((1, cosine[block] * rho)):
            results[k] += conj(factor * rho) @ d
        for k, factor in enumerate((1, cosine[block] * other) if pairs else ()):
            results[k] += (factor * other) @ conj(d)
    return results


def _fractions(z, cosine, sine, pairs):
    """(slice, rho (h, N, J), that of the other halves) of blocks of roots."""
    budget = BLOCK_ELEMENTS["cuda" if z.device.type == "cuda" else "cpu"]
    size = max(1, budget // max(1, z.numel()))
    for first in range(0, len(cosine), size):
        block = slice(first, first + size)
        circle = torch.complex(torch.zeros_like(sine[block]), 2 * sine[block])
        of = lambda z, c=cosine[block], circle=circle: 1 / (circle - c * z[..., None])
        yield block, of(z), of(conj(z)) if pairs else None


# --- dplr_ssm_kernel ---


def kernel_fwd(Lambda, P, B, C, dt, L, conjugate_pairs):
    """K (H, L) from the truncated C."""
    out = torch.empty(*dt.shape, L, dtype=real_dtype(C), device=C.device)
    lambda_, X, Y = wide(Lambda), *_stacked(P, B, C)
    cosine, sine = _half_angles(L, conjugate_pairs, C.device)
    for h in _blocks(X, len(cosine)):
        step = dt[h].to(torch.float64)[:, None]
        M = cauchy_sums(step * lambda_[h], _products(X[h], Y[h]), cosine, sine, conjugate_pairs)
        k, twice_e = step * cosine, step * torch.complex(cosine, sine)
        M = M.unflatten(1, (X.shape[2], -1))
        spectrum = twice_e * (M[:, 0, 0] - k * (M[:, 0, 1:] * _solved(M, k)).sum(1))
        out[h] = torch.fft.irfft(spectrum, L) if conjugate_pairs else torch.fft.ifft(spectrum).real
    return out


def kernel_bwd(dout, Lambda, P, B, C, dt, conjugate_pairs):
    """(dLambda, dP, dB, dC, ddt)."""
    L, lambda_, (X, Y) = dout.shape[1], wide(Lambda), _stacked(P, B, C)
    dlambda, dX, dY, ddt = (torch.empty_like(x) for x in (lambda_, X, Y, dt.to(torch.float64)))
    cosine, sine = _half_angles(L, conjugate_pairs, dout.device)
    for h in _blocks(X, len(cosine)):
        step, XY = dt[h].to(torch.float64)[:, None], _products(X[h], Y[h])
        z, k, twice_e = step * lambda_[h], step * cosine, step * torch.complex(cosine, sine)
        M = cauchy_sums(z, XY, cosine, sine, conjugate_pairs).unflatten(1, (X.shape[2], -1))
        g = _spectrum_bwd(dout[h], L, conjugate_pairs) * conj(twice_e)
        right, left = (
            torch.cat([torch.ones_like(M[:, 0, :1]), -k[:, None] * x], 1)
            for x in (_solved(M, k), _solved(M.transpose(1, 2), k))
        )
        dM = g[:, None, None] * conj(left[:, :, None] * right[:, None])  # an outer product
        dXY, square = cauchy_sums_bwd(dM.flatten(1, 2), z, XY, cosine, sine, conjugate_pairs)
        dlambda[h] = step * (conj(XY) * square).sum(2)
        ddt[h] = ((conj(XY) * dXY).sum(2) + conj(lambda_[h]) * dlambda[h]).real.sum(1) / step[:, 0]
        dXY = dXY.unflatten(2, (X.shape[2], -1))  # [h, N, E, E]
        dX[h], dY[h] = (dXY * conj(Y[h])[:, :, None]).sum(3), (dXY * conj(X[h])[..., None]).sum(2)
    dP = (dY[..., 1:] + conj(dX[..., 1:])).movedim(-1, 0).reshape(P.shape)
    results = zip((dlambda, dP, dY[..., 0], dX[..., 0]), (Lambda, P, B, C))
    return *(as_dtype(g, x.dtype).contiguous() for g, x in results), ddt.to(dt.dtype)


def _stacked(P, B, C):
    """X and Y (H, N, E)."""
    P = wide(P if P.dim() == 3 else P[None])
    return torch.stack([wide(C), *conj(P)], -1), torch.stack([wide(B), *P], -1)


def _products(X, Y):
    return (X[..., None] * Y[:, :, None]).flatten(2)  # [h, N, V]


def _half_angles(length, conjugate_pairs, device):
    """cos and sin of pi j / L, for the roots that a head needs."""
    j = torch.arange(length // 2 + 1 if conjugate_pairs else length, dtype=torch.float64, device=device)
    return torch.cos(torch.pi / length * j), torch.sin(torch.pi / length * j)


def _blocks(X, roots):
    """Slices of the heads."""
    budget = BLOCK_ELEMENTS["cuda" if X.device.type == "cuda" else "cpu"]
    heads = max(1, budget // max(1, X.shape[2] ** 2 * roots))
    return [slice(h, h + heads) for h in range(0, X.shape[0], heads)]


def _solved(M, k):
    """(I + k M_pp)^-1 M_p0 (h, R, J) from M (h, E, E, J)."""
    column, inner = M[:, 1:, 0], k[:, None, None] * M[:, 1:, 1:]
    if inner.shape[1] == 1:
        return column / (1 + inner[:, 0])
    eye = torch.eye(inner.shape[1], dtype=M.dtype, device=M.device)
    return torch.linalg.solve(eye + inner.movedim(3, 1), column.transpose(1, 2)).transpose(1, 2)


def _spectrum_bwd(dout, length, conjugate_pairs):
    if not conjugate_pairs:
        return torch.fft.fft(dout.to(torch.complex128)) / length
    spectrum = torch.fft.rfft(dout.to(torch.float64)) / length
    spectrum[:, 1 : (length + 1) // 2] *= 2  # these stand for their mirror images as well
    return spectrum
