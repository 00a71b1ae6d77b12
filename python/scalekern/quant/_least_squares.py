"""Scales, and zeros, of the least squared error: a search along shrunken ranges, then alternating closed forms."""

import torch

from scalekern.quant import _quantize
from scalekern.quant._formats import Format

RATIOS = [1.0 - 0.025 * i for i in range(20)]  # of the absmax scale: clipping pays more the fewer the bits
ROUNDS = 2


def refine(groups, fmt: Format, scales, zeros, outer, whole: bool):
    """(scales, zeros) in the dtypes that came: no group's squared error is above that of what came."""
    if groups.numel() == 0:
        return scales, zeros
    error = lambda s, z: _error(groups, fmt, s, z, outer, whole)  # noqa: E731
    best, best_zeros = scales, zeros
    least = error(scales, zeros)
    for ratio in [2.0, *RATIOS] if scales.dtype == torch.float8_e8m0fnu else RATIOS:  # an MX block may be clipped
        candidate = _quantize.nearest_scales(scales.to(groups.dtype) * ratio, scales.dtype)
        for _ in range(ROUNDS):
            moved = None if zeros is None else _fitted_zeros(groups, candidate, outer, fmt, whole).to(zeros.dtype)
            found = error(candidate, moved)
            better = found < least
            least = torch.where(better, found, least)
            best = torch.where(better, candidate.to(groups.dtype), best.to(groups.dtype)).to(scales.dtype)
            if zeros is not None:
                best_zeros = torch.where(better, moved, best_zeros)
            fitted = _fitted_scales(groups, fmt, candidate, moved, outer, whole)
            candidate = _quantize.nearest_scales(fitted, scales.dtype)
    return best, best_zeros


def _numbers(groups, fmt, scales, zeros, outer):
    codes = _quantize._codes(groups, fmt, scales, zeros, None, outer)
    if not fmt.is_integer:
        return fmt.values(groups.dtype, groups.device)[codes.long()]
    return codes - (fmt.zero if zeros is None else zeros.to(groups.dtype))


def _sum(x, whole):
    x = x.nansum(-1, keepdim=True)
    return x.sum((-3, -2), keepdim=True) if whole else x


def _error(groups, fmt, scales, zeros, outer, whole):
    step = _quantize._step(scales, outer, groups.dtype)
    return _sum((_numbers(groups, fmt, scales, zeros, outer) * step - groups) ** 2, whole)


def _fitted_scales(groups, fmt, scales, zeros, outer, whole):
    """The scale that the codes just chosen want."""
    numbers = _numbers(groups, fmt, scales, zeros, outer)
    numbers = torch.where(groups.isnan(), 0.0, numbers)
    fitted = _quantize._safe_div(_sum(numbers * groups, whole), _sum(numbers * numbers, whole))
    if outer is not None:
        fitted = fitted / outer.to(groups.dtype)
    return torch.where(fitted > 0, fitted, scales.to(groups.dtype))


def _fitted_zeros(groups, scales, outer, fmt, whole):
    """The middle of the codes at the middle of the range."""
    top = _quantize._over(groups, _quantize._amax, whole)
    bottom = -_quantize._over(-groups, _quantize._amax, whole)
    middle = _quantize._safe_div(top + bottom, 2 * _quantize._step(scales, outer, groups.dtype))
    return ((fmt.levels - 1) / 2 - middle).round().clamp(0, fmt.levels - 1)
