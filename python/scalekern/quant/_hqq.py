"""Half-quadratic quantization: zeros that make the rounding error sparse rather than small in the mean square.

    min over z of |W - s (Q(W) - z)|_p^p,  Q(W) = round(W / s + z),  p < 1

by a second variable E for the error, a quadratic term that ties it to W - s (Q - z), and turns of

    E <- sign(r) max(|r| - |r|^(p - 1) / beta, 0),  r = W - s (Q(W) - z)
    z <- mean over the group of Q(W) - (W - E) / s
    beta <- kappa beta

with the scales fixed. r, E and so beta are counted in steps s here, which makes the result independent of the weight's
unit; and of all turns each group keeps the one with the least p-norm, so that no group ends worse than it began.

Source: Badri & Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
"""

import torch

from scalekern.quant import _quantize
from scalekern.quant._formats import FORMATS
from scalekern.quant._pack import pack
from scalekern.quant.tensor import QuantizedTensor

P, BETA, KAPPA, TURNS = 0.7, 10.0, 1.01, 20


def hqq(w, format, *, group_size=128, symmetric=False, scale_dtype=None) -> QuantizedTensor:
    """Round a matrix (..., N, K) to int2 ... int8 with zeros found by half-quadratic splitting.

    Args:
        w, format, group_size, scale_dtype: as for `quantize`.
        symmetric: must be False: the zeros are what the method finds; they are fractions of a code.

    Returns:
        QuantizedTensor with float32 zeros, or float16 ones beside float16 scales (bfloat16 has too few digits for a
        fraction beside 255), which the codes are rounded with.

    Raises:
        TypeError, ValueError: as `quantize`; symmetric=True.

    Source: Badri & Shaji, 2023, equations 3 to 7.
    """
    if symmetric:
        raise ValueError("hqq: symmetric must be False, zeros are what it finds, got True")
    start = _quantize.quantize(w, format, group_size=group_size, symmetric=False, scale_dtype=scale_dtype)
    if 0 in start.shape:
        return start
    fmt, wide = FORMATS[format], torch.float64 if w.dtype == torch.float64 else torch.float32
    whole = start.scales.shape[-2] != start.data.shape[-2]
    scales = _quantize._step(start.scales, start.outer, wide)[..., None]  # [..., N or 1, G, 1]
    x = _quantize._grouped(w.detach().to(wide), start.group_size)
    x = torch.where(scales == 0, 0.0 * x, x / torch.where(scales == 0, 1.0, scales))  # in steps; NaN where no column is
    mean = lambda t: _quantize._over(t, _quantize._mean, whole)
    codes_of = lambda z: (x + z).round().clamp(0, fmt.levels - 1)
    zeros, beta = start.zeros.to(wide)[..., None], BETA
    best, least = zeros, mean((x - codes_of(zeros) + zeros).abs() ** P)
    for _ in range(TURNS):
        codes = codes_of(zeros)
        r = x - codes + zeros
        E = r.sign() * (r.abs() - r.abs() ** (P - 1) / beta).clamp(min=0)
        zeros = mean(codes - x + E)
        error = mean((x - codes_of(zeros) + zeros).abs() ** P)
        best, least = torch.where(error < least, zeros, best), torch.minimum(error, least)
        beta *= KAPPA
    best = best.to(torch.float16 if scale_dtype == torch.float16 else wide)
    codes = codes_of(best.to(wide)).nan_to_num(0.0).flatten(-2)[..., : start.columns]
    return start.replace(data=pack(codes, fmt.bits), zeros=best[..., 0].contiguous()).check("hqq")
