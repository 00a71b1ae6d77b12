"""Rounding a float tensor to a low-bit format, and the exact way back."""

import math

import torch

from scalekern import _checks
from scalekern.quant._formats import BLOCK_FORMATS, FORMATS, Format
from scalekern.quant._pack import pack, unpack
from scalekern.quant.tensor import SCALE_DTYPES, QuantizedTensor, check_dtype

NAME = "quantize"


def dequantize(w: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(..., N, K) the numbers that a quantized tensor stands for, computed in float32 (float64 for dtype float64).

    Args:
        w: any QuantizedTensor.
        dtype: of the result; None for w.dtype.

    Returns:
        (..., N, K), differentiable for scales, zeros, offsets and outer.

    Raises:
        TypeError, ValueError: parts that do not fit each other.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    2018, equation 1; tables and block scales as the formats define them (OCP Microscaling Formats, 2023).
    """
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"dequantize: w must be a scalekern.quant.QuantizedTensor, got {type(w).__name__}")
    w.check("dequantize")
    dtype = dtype or w.dtype
    check_dtype("dequantize", dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = _values(w, wide)
    by_group = lambda part: part.to(wide).repeat_interleave(w.group_size, -1)[..., : w.columns]  # noqa: E731
    if w.zeros is not None:
        values = values - by_group(w.zeros)
    values = values * by_group(w.scales)
    if w.offsets is not None:
        values = values + by_group(w.offsets)
    if w.outer is not None:
        values = values * w.outer.to(wide)
    if w.perm is not None:
        values = values[..., torch.argsort(w.perm)]
    return values.to(dtype)


def _values(w: QuantizedTensor, dtype) -> torch.Tensor:
    fmt = FORMATS[w.format]
    codes = unpack(w.data, fmt.bits, w.columns)
    if not fmt.is_integer:
        return fmt.values(dtype, w.device)[codes.long()]
    return codes.to(dtype) if w.zeros is not None else codes.to(dtype) - fmt.zero


def quantize(
    w: torch.Tensor,
    format: str,
    *,
    group_size: int | str | None = 128,
    symmetric: bool = True,
    axis: int = -1,
    method: str = "absmax",
    scale_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """Round a matrix to a low-bit format.

    Args:
        w: (..., N, K) floating. It is computed with in float32 (float64 for float64).
        format: int1 (binary, with scale and mean), ternary, int2 .. int8, fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3,
            fp4_e2m1, nf4, fp4_bnb; or a block format, which brings its group size and scales: mxfp8_e4m3, mxfp8_e5m2,
            mxfp6_e3m2, mxfp6_e2m3, mxfp4 (32, powers of two), nvfp4 (16, float8_e4m3 and one float32 for the tensor).
        group_size: columns that share a scale, from 1, dividing nothing in particular; None for a row, "tensor" for
            all of it. Block formats ignore it, and scale_dtype.
        symmetric: False gives integer formats zeros, in codes, and scales from the range of each group.
        axis: what is summed over in the product: -1, or -2 for a (..., K, N) that is to be stored transposed.
        method: "absmax" (the largest element meets the largest code), or "least_squares" (the scale, and with
            symmetric=False the zero, of the least squared error).
        scale_dtype: of the scales; None for float32, or what the block format says. Scales are rounded up, so that
            nothing is clipped. int8 and uint8 give two levels: whole scales times a float32 a row (`outer`).

    Returns:
        QuantizedTensor of (..., N, K), whose dtype is w's. A group of zeros stays zeros; one with an infinity or a NaN
        is all NaN.

    Raises:
        TypeError, ValueError: w no floating matrix, an unknown format or method, zeros for a format that has none.

    Source: absmax and range, Jacob et al., 2018; ternary by the mean magnitude, Ma et al., The Era of 1-bit LLMs, 2024;
    binary by mean and mean magnitude, Rastegari et al., XNOR-Net, 2016; MX scales, OCP Microscaling Formats, 2023, 6.3.
    """
    element, group, scale_dtype = _resolve(w, format, group_size, symmetric, axis, method, scale_dtype)
    fmt = FORMATS[element]
    w = w.detach()
    w, dtype = (w.mT if axis % w.dim() == w.dim() - 2 else w), w.dtype
    wide = w.to(torch.float64 if dtype == torch.float64 else torch.float32)
    whole = group == "tensor"
    K = w.shape[-1]
    size = max(1, K if group in (None, "tensor") else group)
    # (..., N, G, size). What is not finite spoils its group: as infinity here, since NaN is what lies beyond K.
    groups = _grouped(torch.where(wide.isfinite(), wide, math.inf), size)
    scales, zeros, offsets, outer = _parameters(groups, fmt, format, symmetric, whole, scale_dtype)
    if method == "least_squares" and element != "int1":  # whose mean and magnitude are that already
        from scalekern.quant._least_squares import refine

        scales, zeros = refine(groups, fmt, scales, zeros, outer, whole)
    codes = _codes(groups, fmt, scales, zeros, offsets, outer)
    flat = lambda part: None if part is None else part.squeeze(-1)  # noqa: E731
    return QuantizedTensor(
        pack(codes.flatten(-2)[..., :K], fmt.bits), flat(scales), flat(zeros), flat(offsets), flat(outer),
        format=element, columns=K, group_size=size, dtype=dtype,
    ).check(NAME)  # fmt: skip


def _resolve(w, format, group_size, symmetric, axis, method, scale_dtype):
    """(element format, group size, dtype of the scales), everything checked."""
    if not isinstance(w, torch.Tensor) or w.dtype not in _checks.FLOATING or w.layout != torch.strided:
        got = f"{w.layout} of {w.dtype}" if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"{NAME}: w must be a dense torch.Tensor of float64, float32, float16 or bfloat16, got {got}")
    if w.dim() < 2 or type(axis) is not int or axis not in (-2, -1, w.dim() - 2, w.dim() - 1):
        got = f"{tuple(w.shape)} and {axis}"
        raise ValueError(f"{NAME}: w must have at least 2 dimensions and axis be one of the last two, got {got}")
    if not isinstance(format, str) or format not in FORMATS and format not in BLOCK_FORMATS:
        raise ValueError(f"{NAME}: format must be one of {', '.join([*FORMATS, *BLOCK_FORMATS])}, got {format!r}")
    if method not in ("absmax", "least_squares"):
        raise ValueError(f"{NAME}: method must be 'absmax' or 'least_squares', got {method!r}")
    element, block, block_scales = BLOCK_FORMATS.get(format, (format, group_size, scale_dtype))
    block_scales = torch.float32 if block_scales is None else block_scales
    _checks.flag(NAME, "symmetric", symmetric)
    if not symmetric and not (FORMATS[element].is_integer and element != "ternary"):
        raise ValueError(f"{NAME}: symmetric=False needs one of int2 to int8, got {format}")
    if block not in (None, "tensor") and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
        raise ValueError(f"{NAME}: group_size must be None, 'tensor' or an integer of at least 1, got {group_size!r}")
    if block_scales not in SCALE_DTYPES:
        raise TypeError(f"{NAME}: scale_dtype must be one of {', '.join(map(str, SCALE_DTYPES))}, got {scale_dtype}")
    return element, block, block_scales


def _grouped(w: torch.Tensor, size: int) -> torch.Tensor:
    K = w.shape[-1]
    padded = torch.nn.functional.pad(w, (0, -K % size), value=math.nan)
    return padded.unflatten(-1, (-1, size)) if K else w.new_empty((*w.shape[:-1], 0, size))


def _over(groups: torch.Tensor, reduce, whole: bool) -> torch.Tensor:
    """(..., N, G, 1), or (..., 1, G, 1) with one value for the tensor: `reduce` skips what lies beyond the columns."""
    if groups.numel() == 0:
        return groups.new_ones((*groups.shape[:-3], 1 if whole else groups.shape[-3], groups.shape[-2], 1))
    if not whole:
        return reduce(groups, -1)
    return reduce(groups.flatten(-3), -1)[..., None, None]


def _amax(x, dim):
    return x.nan_to_num(-math.inf, math.inf, -math.inf).amax(dim, keepdim=True)


def _mean(x, dim):
    return x.nanmean(dim, keepdim=True, dtype=torch.float64).to(x.dtype)


def _parameters(groups, fmt: Format, format: str, symmetric: bool, whole: bool, dtype: torch.dtype):
    """(scales, zeros, offsets, outer) as stored, each (..., N or 1, G or 1, 1) or None."""
    side = dtype if dtype in (torch.float16, torch.bfloat16) else groups.dtype  # of zeros and offsets
    largest = _over(groups.abs(), _amax, whole)
    offsets = bottom = None
    if fmt.name == "int1":
        offsets = nearest_scales(_over(groups, _mean, whole), side)
        spread = _over((groups - offsets).abs(), _mean, whole)
    elif fmt.name == "ternary":
        spread = _over(groups.abs(), _mean, whole)
    elif symmetric:
        spread = largest / fmt.largest
    else:
        top = _over(groups, _amax, whole).clamp(min=0)  # the range holds 0, which has a code of its own
        bottom = -_over(-groups, _amax, whole).clamp(min=0)
        spread = top / (fmt.levels - 1) - bottom / (fmt.levels - 1)  # of each: the sum may be beyond all numbers
    spread = torch.where(largest.isinf(), math.nan, spread)
    scales, outer = _stored(spread, largest, fmt, format, dtype)
    if outer is not None and offsets is not None:
        offsets = offsets / outer  # which multiplies both
    zeros = None
    if bottom is not None:
        zeros = _safe_div(-bottom, _step(scales, outer, groups.dtype)).round().clamp(0, fmt.levels - 1)
        zeros = zeros.nan_to_num(0.0).to(side)
    return scales, zeros, offsets, outer


def _stored(spread, largest, fmt: Format, format: str, dtype: torch.dtype):
    """(scales, outer) for the exact scales `spread` and the largest magnitudes.

    MX: the power of two below the largest magnitude over that below the largest element, beyond which all is clipped
    (OCP, 6.3). NVFP4: the nearest, the tensor's largest becoming 448. Of other formats, largest magnitudes are rounded
    up, since what is above the largest code is clipped, and means to nearest.
    """
    if format in BLOCK_FORMATS and dtype == torch.float8_e8m0fnu:
        exponent = torch.frexp(largest).exponent - 1 - math.floor(math.log2(fmt.largest))
        return _power_of_two(exponent, spread), None
    if format in BLOCK_FORMATS:
        outer = _amax_of(largest, (-3, -2)) / (fmt.largest * torch.finfo(dtype).max)
        outer = torch.where(outer == 0, 1.0, outer).float()
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
        scales = torch.where(spread == 0, 0.0, (spread / outer).clamp(min=least))
        return nearest_scales(torch.where(spread.isnan(), math.nan, scales), dtype), outer
    mean = fmt.name in ("int1", "ternary")
    if dtype in (torch.int8, torch.uint8):
        outer = _amax_of(spread, (-2,)) / torch.iinfo(dtype).max
        outer = torch.where(outer == 0, 1.0, outer).float()
        whole = (spread / outer).nan_to_num(1.0)
        return nearest_scales(whole if mean else whole.ceil(), dtype), outer
    if dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(spread)
        return _power_of_two(torch.where(mantissa == 0.5, exponent - 1, exponent), spread), None
    if dtype == torch.float64 or mean:
        return nearest_scales(spread, dtype), None
    near = nearest_scales(spread, dtype)
    bits = near.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
    below = near.to(spread.dtype) < spread.clamp(max=torch.finfo(dtype).max)
    return (bits + below.to(bits.dtype)).view(dtype), None


def _amax_of(x, dims):
    if x.numel():
        return x.amax(dims, keepdim=True)
    return x.new_zeros([1 if i - x.dim() in dims else size for i, size in enumerate(x.shape)])


def _power_of_two(exponent, spread):
    exponent = torch.where(spread > 0, exponent, -127).clamp(-127, 127) + 127
    return torch.where(spread.isnan(), 255, exponent).to(torch.uint8).view(torch.float8_e8m0fnu)


def nearest_scales(x, dtype: torch.dtype):
    """x in a dtype of scales (or offsets), as near as can be, never infinite."""
    if dtype in (torch.int8, torch.uint8):
        return x.round().clamp(max=torch.iinfo(dtype).max).to(dtype)
    most = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
    return x.clamp(-most, most).to(dtype)


def _step(scales, outer, dtype):
    return scales.to(dtype) if outer is None else scales.to(dtype) * outer.to(dtype)


def _safe_div(a, b):
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _codes(groups, fmt: Format, scales, zeros, offsets, outer):
    """(..., N, G, size) the nearest codes, halves to even."""
    step = _step(scales, outer, groups.dtype)
    centred = groups if offsets is None else groups - _step(offsets, outer, groups.dtype)
    x = _safe_div(centred, step.expand_as(centred[..., :1])).nan_to_num(0.0)
    if not fmt.is_integer:
        return nearest_codes(x, fmt)
    if zeros is not None:
        return (x + zeros.to(x.dtype)).round().clamp(0, fmt.levels - 1)
    return x.round().clamp(-fmt.zero, fmt.levels - 1 - fmt.zero) + fmt.zero


def nearest_codes(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The code of the nearest value of a table, beyond the largest its; a tie goes to the even code."""
    codes = torch.tensor(fmt.rising, device=x.device)
    rising = fmt.values(x.dtype, x.device)[codes]
    if fmt.has_sign:
        return codes[_nearest(x.abs(), rising)] + torch.where(torch.signbit(x), len(fmt.table) // 2, 0)
    return codes[_nearest(x, rising)]


def _nearest(x, rising):
    """The index of the nearest of rising values, between two the even one."""
    middles = (rising[1:] + rising[:-1]) / 2
    below = torch.bucketize(x.contiguous(), middles)  # the number of middles that are less
    tie = x == torch.nn.functional.pad(middles, (0, 1), value=math.nan)[below]
    return below + (tie & (below % 2 == 1))
