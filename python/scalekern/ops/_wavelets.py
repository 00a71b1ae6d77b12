"""One level of a 2-D wavelet transform out of torch's convolutions, its inverse and both adjoints.

Shape letters: X images (batch times channels), H x W image, P x Q coefficients, F filter length.

    extend    the image with the pixels beyond its border that the filters meet     unextend   its adjoint
    split     low, horizontal, vertical, diagonal, every second pixel               merge      its adjoint

dwt = split(extend) with the decomposition filters; idwt = unextend(merge) with the reconstruction filters; each one's
gradient is the other composition with its own filters. split is one convolution with four filters; merge, which as a
transposed convolution takes 9 times as long (AMD EPYC, 2 cores, B8 C64 56 x 56, haar: 18 against 2 ms), is one from
four coefficients to the four pixels of a cell. The two taps of haar are additions, three passes over the image.
"""

import functools

import torch
import torch.nn.functional as F

from scalekern.reference.dwt2d import filters


def dwt(x, wavelet, levels, mode):
    """[low, details of the coarsest level, .., of the finest]."""
    taps, low, details = _decomposition(wavelet), x.to(_wide(x)), []
    for _ in range(levels):
        low, detail = split(extend(low, len(taps[0]), mode), taps)
        details.append(detail)
    return [_owned(part, x.dtype) for part in (low, *reversed(details))]


def dwt_bwd(dlow, ddetails, x, wavelet, levels, mode):
    taps, sizes = _decomposition(wavelet), [tuple(x.shape[-2:])]
    for _ in range(levels - 1):
        sizes.append(tuple(count(n, len(taps[0]), mode) for n in sizes[-1]))
    dx = dlow.to(_wide(x))
    for ddetail, size in zip(ddetails, reversed(sizes)):
        dx = unextend(merge(dx, ddetail.to(dx.dtype), taps), size, len(taps[0]), mode)
    return _owned(dx, x.dtype)


def idwt(low, details, wavelet, mode, sizes):
    """sizes: rows and columns after each level, one after the other."""
    taps, x = _reconstruction(wavelet), low.to(_wide(low))
    for i, detail in enumerate(details):
        full = tuple(full_size(n, len(taps[0]), mode) for n in detail.shape[-2:])
        x = unextend(merge(x, detail.to(x.dtype), taps), full, len(taps[0]), _inverse(mode))
        x = x[..., : sizes[2 * i], : sizes[2 * i + 1]]
    return _owned(x, low.dtype)


def idwt_bwd(dout, low, details, wavelet, mode, sizes):
    """[gradients of low and of the details]."""
    taps, dx, gradients = _reconstruction(wavelet), dout.to(_wide(low)), []
    for detail in reversed(details):
        full = tuple(full_size(n, len(taps[0]), mode) for n in detail.shape[-2:])
        if full != tuple(dx.shape[-2:]):  # what was cut off an odd size
            dx = F.pad(dx, (0, full[1] - dx.shape[-1], 0, full[0] - dx.shape[-2]))
        dx, ddetail = split(extend(dx, len(taps[0]), _inverse(mode)), taps)
        gradients.append(_owned(ddetail, detail.dtype))
    return [_owned(dx, low.dtype), *reversed(gradients)]


def count(n, taps, mode):
    """Coefficients of a length n."""
    return (n + 1) // 2 if mode == "periodization" else (n + taps - 1) // 2


def full_size(count, taps, mode):
    """The even length, n or n + 1, that `count` coefficients give back."""
    return 2 * count if mode == "periodization" else 2 * count - taps + 2


def _inverse(mode):
    """Coefficients of the inverse reach beyond the image only where it is periodic."""
    return mode if mode == "periodization" else "zero"


def _owned(x, dtype):
    """In this dtype, contiguous, and no part of something larger: what an op may return."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole and x.dtype == dtype else x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _decomposition(wavelet):
    """(low, high) as correlations."""
    dec_lo, dec_hi, _, _ = filters(wavelet)
    return tuple(dec_lo[::-1]), tuple(dec_hi[::-1])


def _reconstruction(wavelet):
    return tuple(tuple(t) for t in filters(wavelet)[2:])


# --- the border -------------------------------------------------------------------------------------------------------


def _margins(n, taps, mode):
    """(elements before, elements after, {place beyond the border: the place whose value it repeats})."""
    periodic = mode == "periodization"
    before = taps // 2 - 1 if periodic else taps - 2
    length = 2 * count(n, taps, mode) + taps - 2
    after = length - before - n
    beyond = [*range(-before, 0), *range(n, n + after)]
    if mode == "zero":
        return before, after, {}
    if periodic:
        period = n + n % 2
        return before, after, {place: min(place % period, n - 1) for place in beyond}
    mirrored = ((place, place % (2 * n)) for place in beyond)
    return before, after, {place: min(m, 2 * n - 1 - m) for place, m in mirrored}


def extend(x, taps, mode):
    rows, columns = (_margins(n, taps, mode) for n in x.shape[-2:])
    if not any((*rows[:2], *columns[:2])):
        return x
    x = F.pad(x, (*columns[:2], *rows[:2]))
    for dim, (before, _, repeats) in ((-1, columns), (-2, rows)):
        for place, source in repeats.items():
            x.select(dim, before + place).copy_(x.select(dim, before + source))
    return x


def unextend(x, size, taps, mode):
    rows, columns = (_margins(n, taps, mode) for n in size)
    for dim, (before, _, repeats) in ((-2, rows), (-1, columns)):
        for place, source in repeats.items():
            x.select(dim, before + source).add_(x.select(dim, before + place))
    return x[..., rows[0] : rows[0] + size[0], columns[0] : columns[0] + size[1]]


# --- the filters ------------------------------------------------------------------------------------------------------


def split(x, taps):
    """(low (.., P, Q), details (.., 3, P, Q)) of the extended image."""
    if len(taps[0]) == 2:
        return _split_haar(x, taps[0][0] ** 2)
    y = F.conv2d(x.reshape(-1, 1, *x.shape[-2:]), _bank(taps, x), stride=2)
    y = y.view(*x.shape[:-2], *y.shape[1:])
    return y[..., 0, :, :], y[..., 1:, :, :]


def merge(low, details, taps):
    """The extended image to which the coefficients add: 2 P + F - 2 rows."""
    if len(taps[0]) == 2:
        return _merge_haar(low, details, taps[0][0] ** 2)
    half = len(taps[0]) // 2
    y = torch.cat([low[..., None, :, :], details], -3)
    cells = _bank(taps, y).view(4, half, 2, half, 2).permute(2, 4, 0, 1, 3).reshape(4, 4, half, half)
    x = F.conv2d(y.reshape(-1, *y.shape[-3:]), cells.flip(-1, -2), padding=half - 1)
    return F.pixel_shuffle(x, 2).view(*low.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1])


def _bank(taps, like):
    return _bank_of(taps, like.dtype, like.device)


@functools.lru_cache(maxsize=64)  # copying it to a GPU would wait for the device, and break a CUDA graph
def _bank_of(taps, dtype, device):
    """(4, 1, F, F): low, horizontal (high-pass along H), vertical, diagonal."""
    lo, hi = torch.tensor(taps, dtype=torch.float64)
    bank = torch.stack([torch.outer(rows, columns) for rows, columns in ((lo, lo), (hi, lo), (lo, hi), (hi, hi))])
    return bank[:, None].to(device, dtype)


def _split_haar(x, scale):
    upper, lower = x[..., ::2, :], x[..., 1::2, :]
    low, high = torch.add(upper, lower).mul_(scale), torch.sub(upper, lower).mul_(scale)
    details = x.new_empty(*low.shape[:-2], 3, low.shape[-2], low.shape[-1] // 2)
    torch.add(high[..., ::2], high[..., 1::2], out=details[..., 0, :, :])
    torch.sub(low[..., ::2], low[..., 1::2], out=details[..., 1, :, :])
    torch.sub(high[..., ::2], high[..., 1::2], out=details[..., 2, :, :])
    return low[..., ::2] + low[..., 1::2], details


def _merge_haar(low, details, scale):
    horizontal, vertical, diagonal = details.unbind(-3)
    x = low.new_empty(*low.shape[:-2], 2 * low.shape[-2], 2 * low.shape[-1])
    for column, combine in ((0, torch.add), (1, torch.sub)):
        low_, high = combine(low, vertical).mul_(scale), combine(horizontal, diagonal).mul_(scale)
        torch.add(low_, high, out=x[..., ::2, column::2])
        torch.sub(low_, high, out=x[..., 1::2, column::2])
    return x
