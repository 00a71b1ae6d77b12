"""Oracle of the multi-level 2-D wavelet transform and its inverse, forward and backward.

Shape letters: B batch, C channels, H x W image, P x Q coefficients, F filter length, a and b: 0 low-pass, 1 high-pass.

    y[a, b] = M_a^H x (M_b^W)^T          M_0, M_1 (P, H): filter and keep every second
    x       = sum_ab S_a^H y[a, b] (S_b^W)^T          S_0, S_1 (H or H + 1, P)

Both are products with explicit matrices, in float32, or in float64 for float64 inputs; so are their derivatives, with
the transposed matrices. Coefficients, their order and their names are PyWavelets':

    mode            x beyond the image                             P                  row o of M_a meets
    zero            0                                              (H + F - 1) // 2   dec[j] x[2 o + 1 - j]
    symmetric       mirrored, the edge repeated: .. x1 x0 x0 x1 .. (H + F - 1) // 2   dec[j] x[2 o + 1 - j]
    periodization   periodic, after an odd H is made even by a     (H + 1) // 2       dec[j] x[2 o + F/2 - j]
                    repeated last element
"""

import torch
import torch.nn.functional as F

MODES = ("symmetric", "zero", "periodization")

_R2, _R3 = 2**0.5, 3**0.5
_DB4 = (
    0.23037781330889650086, 0.71484657055291564709, 0.63088076792985890788, -0.027983769416859854211,
    -0.18703481171909308408, 0.030841381835560763627, 0.032883011666885199735, -0.010597401785069032105,
)  # fmt: skip
_DB2 = tuple(x / (4 * _R2) for x in (1 + _R3, 3 + _R3, 3 - _R3, 1 - _R3))
_HAAR = (1 / _R2, 1 / _R2)

# (dec_lo, rec_lo), from which the high-pass filters follow. db4 and bior4.4 (CDF 9/7) are the factors of Daubechies'
# 1 + 4 y + 10 y^2 + 20 y^3, computed to 40 digits; PyWavelets' bior4.4 is off by up to 6e-13.
WAVELETS = {
    "haar": (_HAAR, _HAAR),
    "db1": (_HAAR, _HAAR),
    "db2": (_DB2[::-1], _DB2),
    "db4": (_DB4[::-1], _DB4),
    "bior1.3": (
        tuple(_R2 / 16 * x for x in (-1, 1, 8, 8, 1, -1)),
        tuple(_R2 / 2 * x for x in (0, 0, 1, 1, 0, 0)),
    ),
    "bior2.2": (
        tuple(_R2 / 8 * x for x in (0, -1, 2, 6, 2, -1)),
        tuple(_R2 / 4 * x for x in (0, 1, 2, 1, 0, 0)),
    ),
    "bior4.4": (
        (0.0, 0.037828455506995461393, -0.023849465019380001913, -0.11062440441842340885, 0.37740285561265376411,
         0.85269867900940341931, 0.37740285561265376411, -0.11062440441842340885, -0.023849465019380001913,
         0.037828455506995461393),
        (0.0, -0.064538882628938438637, -0.040689417609558436724, 0.41809227322221220084, 0.78848561640566439785,
         0.41809227322221220084, -0.040689417609558436724, -0.064538882628938438637, 0.0, 0.0),
    ),
}  # fmt: skip


def dwt2d(x, wavelet="haar", levels=1, mode="symmetric"):
    """Same arguments and results as scalekern.dwt2d. Differentiable by autograd.

    Args:
        x: (B, C, H, W), any size from 1.
        wavelet: "haar" (also "db1"), "db2", "db4", "bior1.3", "bior2.2" or "bior4.4".
        levels: how often the low-pass part is transformed again, from 1.
        mode: "symmetric", "zero" or "periodization", see the module.

    Returns:
        (low, details of the coarsest level, .., details of the finest): low (B, C, P, Q), details (B, C, 3, P, Q), the
        horizontal, vertical and diagonal ones, PyWavelets' cH (high-pass along H), cV (along W), cD. pywt.wavedec2's
        order; idwt2d(*dwt2d(x)) is x, up to the row and column that an odd size gains.

    Raises:
        ValueError: an unknown wavelet or mode, or levels below 1.

    Source: Mallat, A theory for multiresolution signal decomposition, 1989; bior: Cohen, Daubechies & Feauveau, 1992.
    """
    return tuple(dwt2d_fwd(x, wavelet, levels, mode))


def dwt2d_fwd(x, wavelet, levels, mode):
    """[low, details of the coarsest level, .., of the finest]."""
    if levels < 1:
        raise ValueError(f"dwt2d: levels must be at least 1, got {levels}")
    low, details = x.to(_wide(x)), []
    for _ in range(levels):
        low, detail = _parts(_split(low, *_matrices(analysis, low, wavelet, mode)))
        details.append(detail)
    return [part.to(x.dtype) for part in (low, *reversed(details))]


def dwt2d_bwd(dcoefficients, x, wavelet, mode):
    """dx, from the gradients of what dwt2d_fwd returns:  dx = sum_ab (M_a^H)^T dy[a, b] M_b^W, level by level."""
    dlow, *ddetails = (d.to(_wide(x)) for d in dcoefficients)
    sizes = [x.shape[-2:]]
    for _ in ddetails[1:]:
        sizes.append([_count(n, wavelet, mode) for n in sizes[-1]])
    for ddetail, size in zip(ddetails, reversed(sizes)):
        matrices = (analysis(n, wavelet, mode, x.device, dlow.dtype) for n in size)
        dlow = _merge(_joined(dlow, ddetail), *(m.mT for m in matrices))
    return dlow.to(x.dtype)


def idwt2d(low, *details, wavelet="haar", mode="symmetric", size=None):
    """The inverse of dwt2d: idwt2d(*dwt2d(x, wavelet, levels, mode), wavelet=wavelet, mode=mode, size=x.shape[-2:]).

    Args:
        low, details: what dwt2d returns.   wavelet, mode: as there.
        size: (H, W) of the image, where one of them is odd; without it both are even, one more where they were odd.

    Returns:
        x (B, C, H, W) in low's dtype.

    Raises:
        ValueError: an unknown wavelet or mode, no details, coefficients of sizes that do not belong together.
    """
    return idwt2d_fwd([low, *details], wavelet, mode, size)


def idwt2d_fwd(coefficients, wavelet, mode, size):
    """x (B, C, H, W)."""
    low, *details = coefficients
    x = low.to(_wide(low))
    for detail, wanted in zip(details, _reconstructed(coefficients, wavelet, mode, size)):
        detail = detail.to(x.dtype)
        x = _merge(_joined(x, detail), *_matrices(synthesis, detail, wavelet, mode))[..., : wanted[0], : wanted[1]]
    return x.to(low.dtype)


def idwt2d_bwd(dout, coefficients, wavelet, mode):
    """[gradients of low and of the details]:  dy[a, b] = (S_a^H)^T dx S_b^W, level by level from the finest."""
    low, *details = coefficients
    dx, gradients = dout.to(_wide(low)), []
    for detail in reversed(details):
        s_rows, s_columns = _matrices(synthesis, detail.to(dx.dtype), wavelet, mode)
        missing = (0, s_columns.shape[1] - dx.shape[-1], 0, s_rows.shape[1] - dx.shape[-2])
        dx = F.pad(dx, missing)  # what was cut off an odd size
        dx, ddetail = _parts(_split(dx, s_rows.mT, s_columns.mT))
        gradients.append(ddetail.to(detail.dtype))
    return [dx.to(low.dtype), *reversed(gradients)]


# As the registered ops take their arguments: a tensor first, then a list of them.


def dwt2d_bwd_op(dlow, ddetails, x, wavelet, levels, mode):
    return dwt2d_bwd([dlow, *ddetails], x, wavelet, mode)


def idwt2d_fwd_op(low, details, wavelet, mode, sizes):
    return idwt2d_fwd([low, *details], wavelet, mode, sizes[-2:])


def idwt2d_bwd_op(dout, low, details, wavelet, mode, sizes):
    return idwt2d_bwd(dout, [low, *details], wavelet, mode)


def filters(wavelet):
    """(dec_lo, dec_hi, rec_lo, rec_hi), PyWavelets' filter bank."""
    if wavelet not in WAVELETS:
        raise ValueError(f"dwt2d: wavelet must be one of {', '.join(map(repr, WAVELETS))}, got {wavelet!r}")
    dec_lo, rec_lo = WAVELETS[wavelet]
    rec_hi = tuple((-1) ** j * h for j, h in enumerate(dec_lo))
    dec_hi = tuple(-((-1) ** j) * h for j, h in enumerate(rec_lo))
    return dec_lo, dec_hi, rec_lo, rec_hi


def analysis(n, wavelet, mode, device, dtype):
    """M (2, P, n): low-pass and high-pass, applied and decimated."""
    dec_lo, dec_hi, _, _ = filters(wavelet)
    count = _count(n, wavelet, mode)
    o, j = torch.arange(count)[:, None], torch.arange(len(dec_lo))
    place = 2 * o + (len(dec_lo) // 2 if mode == "periodization" else 1) - j  # [P, F]
    inside = torch.ones_like(place, dtype=torch.bool)
    if mode == "zero":
        inside = (place >= 0) & (place < n)
        place = place.clamp(0, n - 1)
    elif mode == "symmetric":
        place = place % (2 * n)
        place = torch.minimum(place, 2 * n - 1 - place)
    else:
        place = (place % (2 * count)).clamp(max=n - 1)
    return _scattered(count, n, o, place, inside, (dec_lo, dec_hi), device, dtype)


def synthesis(count, wavelet, mode, device, dtype):
    """S (2, n, P): from P low-pass and P high-pass coefficients, the n elements that each adds to."""
    _, _, rec_lo, rec_hi = filters(wavelet)
    taps = len(rec_lo)
    periodic = _is_periodic(mode)
    n = _full(count, wavelet, mode)
    o, j = torch.arange(count)[:, None], torch.arange(taps)
    place = 2 * o + j - (taps // 2 - 1 if periodic else taps - 2)
    if periodic:
        place = place % n
    inside = (place >= 0) & (place < n)
    return _scattered(count, n, o, place.clamp(0, n - 1), inside, (rec_lo, rec_hi), device, dtype).mT


def _scattered(count, n, o, place, inside, pair, device, dtype):
    """(2, count, n) with row o summing filter[j] at place[o, j]."""
    matrices = torch.zeros(2, count, n, dtype=torch.float64)
    for matrix, taps in zip(matrices, pair):
        values = torch.tensor(taps, dtype=torch.float64) * inside
        matrix.index_put_((o.expand_as(place), place), values, accumulate=True)
    return matrices.to(device, dtype)


def _count(n, wavelet, mode):
    """P of a length n."""
    return (n + 1) // 2 if _is_periodic(mode) else (n + len(filters(wavelet)[0]) - 1) // 2


def _full(count, wavelet, mode):
    """The even length, n or n + 1, that P coefficients give back."""
    return 2 * count if _is_periodic(mode) else 2 * count - len(filters(wavelet)[2]) + 2


def _is_periodic(mode):
    if mode not in MODES:
        raise ValueError(f"dwt2d: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    return mode == "periodization"


def _reconstructed(coefficients, wavelet, mode, size):
    """(H, W) after each level: that of the next details, or `size`; either may be one less than what comes out."""
    low, *details = coefficients
    if not details:
        raise ValueError("idwt2d: details must have at least one level, got none")
    if low.shape[-2:] != details[0].shape[-2:]:
        raise ValueError(
            f"idwt2d: low must have the size of the coarsest details {tuple(details[0].shape[-2:])}, "
            f"got shape {tuple(low.shape)}"
        )
    sizes = [d.shape[-2:] for d in details[1:]] + [size]
    for i, (detail, wanted) in enumerate(zip(details, sizes)):
        full = tuple(_full(n, wavelet, mode) for n in detail.shape[-2:])
        sizes[i] = full if wanted is None else tuple(wanted)
        if any(not f - 1 <= n <= f for n, f in zip(sizes[i], full)):
            what = "size" if i + 1 == len(details) else "the next details"
            raise ValueError(f"idwt2d: {what} must be {full} or one less, got {sizes[i]}")
    return sizes


def _matrices(build, like, wavelet, mode):
    """The matrices along H and W."""
    return tuple(build(n, wavelet, mode, like.device, like.dtype) for n in like.shape[-2:])


def _split(x, rows, columns):
    """y[.., a, b, p, q] = rows_a x columns_b^T, rows (2, P, H), columns (2, Q, W)."""
    return torch.einsum("aph,...hw,bqw->...abpq", rows, x, columns)


def _merge(y, rows, columns):
    """sum_ab rows_a y[.., a, b] columns_b^T, rows (2, H, P), columns (2, W, Q)."""
    return torch.einsum("ahp,...abpq,bwq->...hw", rows, y, columns)


def _parts(y):
    """(low, details (.., 3, P, Q)): cH is high-pass along H, cV along W."""
    return y[..., 0, 0, :, :], torch.stack([y[..., 1, 0, :, :], y[..., 0, 1, :, :], y[..., 1, 1, :, :]], -3)


def _joined(low, details):
    """The inverse of _parts."""
    horizontal, vertical, diagonal = details.unbind(-3)
    return torch.stack([torch.stack([low, vertical], -3), torch.stack([horizontal, diagonal], -3)], -4)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
