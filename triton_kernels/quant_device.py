"""What the quant_matmul kernels share: codes out of the bit stream, their values, scales, and what ends a product.

A unit is the smallest number of codes that begins and ends with a byte: P codes in P BITS / 8 bytes, with P = 1, 2, 4
or 8. Plane p of a tile holds code p of each unit: its byte and shift are known at compile time, so that a tile of
planes is a few bit operations on bytes that lie beside each other, and nothing has to be put in order: a product over
columns does not care in which order both sides come. P = 1 with fewer than 8 bits looks up the byte of every code by
itself: slower, but a tile may begin anywhere, and be of any length.
"""

import torch
import triton
import triton.language as tl

from .. import _env
from ..quant._formats import FORMATS
from .host_math import next_power_of_2

# The interpreter holds bfloat16 as integers, computes with those, and truncates where a GPU rounds.
INTERPRETED: tl.constexpr = tl.constexpr(_env.triton_interpret())
MANTISSA = {"fp8_e4m3": 3, "fp8_e5m2": 2, "fp6_e3m2": 2, "fp6_e2m3": 3, "fp4_e2m1": 1}
BIAS = {"fp8_e4m3": 7, "fp8_e5m2": 15, "fp6_e3m2": 3, "fp6_e2m3": 1, "fp4_e2m1": 1}
TABLES = ("nf4", "fp4_bnb")  # whose values come from memory
PER_UNIT = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}

# What the functions of a format's name below look up: kernels may read no other global.
_BITS = {name: f.bits for name, f in FORMATS.items()}
_CENTRE = {name: f.zero or 0 for name, f in FORMATS.items()}
_MANTISSA = {name: MANTISSA.get(name, 0) for name in FORMATS}
_WHOLE = {name: f.is_integer or name == "int1" for name, f in FORMATS.items()}
_RESCALE = {name: 2.0 ** (127 - bias) for name, bias in BIAS.items()}


@triton.constexpr_function
def bits_of(name):
    return _BITS[name]


@triton.constexpr_function
def centre_of(name):
    """The code of 0 of an integer format."""
    return _CENTRE[name]


@triton.constexpr_function
def mantissa_of(name):
    return _MANTISSA[name]


@triton.constexpr_function
def is_whole(name):
    """Whether the values are integers."""
    return _WHOLE[name]


@triton.constexpr_function
def rescale_of(name):
    """2^(127 - bias): float32 bits that hold a small float's exponent and mantissa, times this, are its value."""
    return _RESCALE[name]


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def masked(ptr, mask):
    """What is stored at ptr, 0 where the mask, if there is one, is not."""
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def codes_of(row_ptr, unit, inside, p, FORMAT: tl.constexpr, P: tl.constexpr):
    """Plane p of the units [U] of rows [N, 1]: int32 [N, U]. inside: mask or None."""
    BITS: tl.constexpr = bits_of(FORMAT)
    if P * BITS % 8 == 0:
        at = row_ptr + (unit * (P * BITS // 8) + p * BITS // 8)[None, :]
        SHIFT: tl.constexpr = p * BITS % 8
        code = masked(at, inside).to(tl.int32)  # [N, U]
        if SHIFT + BITS > 8:
            code |= masked(at + 1, inside).to(tl.int32) << 8
        code >>= SHIFT
    else:
        bit = unit * BITS
        at, shift = row_ptr + (bit >> 3)[None, :], (bit & 7).to(tl.int32)[None, :]
        code = masked(at, inside).to(tl.int32)
        if 8 % BITS != 0:
            crossing = shift + BITS > 8
            crossing = crossing if inside is None else crossing & inside
            code |= tl.load(at + 1, mask=crossing, other=0).to(tl.int32) << 8
        code >>= shift
    if BITS == 8:
        return code
    else:
        return code & ((1 << BITS) - 1)


@triton.jit
def values_of(code, table_ptr, FORMAT: tl.constexpr, TYPE: tl.constexpr):
    """int32 codes as numbers, exact, of some type that can be converted to TYPE: code - centre, or a table's."""
    BITS: tl.constexpr = bits_of(FORMAT)
    MAN: tl.constexpr = mantissa_of(FORMAT)
    if table_ptr is not None:
        return tl.load(table_ptr + code)
    elif FORMAT == "fp8_e5m2":  # the upper half of a float16
        return (code << 8).to(tl.int16).to(tl.float16, bitcast=True)
    elif MAN > 0:
        bits = (code & ((1 << (BITS - 1)) - 1)) << (23 - MAN) | code >> (BITS - 1) << 31
        value = bits.to(tl.float32, bitcast=True) * rescale_of(FORMAT)
        if FORMAT == "fp8_e4m3":
            value = tl.where((code & 127) == 127, float("nan"), value)
        return value
    elif TYPE.is_int() or TYPE == tl.float64:
        return code * 2 - 1 if FORMAT == "int1" else code - centre_of(FORMAT)
    else:  # 2^23 + code in float32's bits: conversions of integers have a quarter of the rate of additions, or less
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 + centre_of(FORMAT))
        return value * 2 - 1 if FORMAT == "int1" else value


@triton.jit
def operand(x, TYPE: tl.constexpr):
    """x as an operand of a product."""
    if INTERPRETED and TYPE == tl.bfloat16:
        x = x.to(tl.float32)
        high = x * 65537.0 - (x * 65537.0 - x)  # eight bits (Dekker's splitting)
        return tl.where(tl.abs(x) < 1e33, high, x)
    elif TYPE == tl.float64:
        # Triton lays an operand out for the type that it was loaded in, and has no layout of bytes for DMMA: a sum of
        # one term ends its search for a load.
        return tl.sum(x.to(TYPE)[:, :, None], axis=2)
    else:
        return x.to(TYPE)


@triton.jit
def store(ptr, x, mask):
    """x, rounded to what ptr points to."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        x = operand(x, tl.bfloat16)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scales_of(ptr, mask, KIND: tl.constexpr, TYPE: tl.constexpr):
    """Scales of any stored type as TYPE; KIND "e8m0" or "e4m3": float8, given as its bytes."""
    stored = masked(ptr, mask)
    if KIND == "e8m0":
        byte = stored.to(tl.int32)
        bits = tl.where(byte == 0, 0x400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        return bits.to(tl.float32, bitcast=True).to(TYPE)
    elif KIND == "e4m3":
        return values_of(stored.to(tl.int32), None, "fp8_e4m3", tl.float32).to(TYPE)
    else:
        return stored.to(TYPE)


@triton.jit
def weights_of(code, inside, table_ptr, parts, n, g, SCALES: tl.constexpr, FORMAT: tl.constexpr, TYPE: tl.constexpr):
    """The weight itself: codes [N, U] of rows n [N] and groups g [U] as TYPE, without `outer`; 0 where not inside.

    parts: (scales_ptr, stride_n, stride_g, zeros_ptr, .., offsets_ptr, ..).
    """
    scales_ptr, scales_n, scales_g, zeros_ptr, zeros_n, zeros_g, offsets_ptr, offsets_n, offsets_g = parts
    w = values_of(code, table_ptr, FORMAT, TYPE).to(TYPE)
    n, g = n.to(tl.int64)[:, None], g[None, :]
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + n * zeros_n + g * zeros_g, mask=inside, other=0).to(TYPE)
        w -= zero - centre_of(FORMAT)
    w *= scales_of(scales_ptr + n * scales_n + g * scales_g, inside, SCALES, TYPE)
    if offsets_ptr is not None:
        w += tl.load(offsets_ptr + n * offsets_n + g * offsets_g, mask=inside, other=0).to(TYPE)
    return tl.where(inside, w, 0.0)


@triton.jit
def finish(acc, n, m, in_n, in_m, outer_ptr, stride_outer_n, tokens_ptr, bias_ptr, stride_bias_n):
    """A sum of products [N, M], times outer [N] and the tokens' scales [M], plus bias [N]."""
    if outer_ptr is not None:
        acc *= tl.load(outer_ptr + n.to(tl.int64) * stride_outer_n, mask=in_n, other=0).to(acc.dtype)[:, None]
    if tokens_ptr is not None:
        acc *= tl.load(tokens_ptr + m, mask=in_m, other=0).to(acc.dtype)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n.to(tl.int64) * stride_bias_n, mask=in_n, other=0).to(acc.dtype)[:, None]
    return acc


@triton.jit
def expert_of(offs_ptr, tile, M, E: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """(e, first token, end of its tokens) of the tile-th BLOCK_M tokens, no tile reaching over two experts.

    Found in E <= LANES ends that each program reads for itself, so that the host need not know them. No tokens: e = E.
    """
    e = tl.arange(0, LANES)
    ends = tl.minimum(tl.load(offs_ptr + e, mask=e < E, other=0), M)
    starts = tl.minimum(tl.load(offs_ptr + e - 1, mask=(e > 0) & (e < E), other=0), M)
    tiles = tl.where(e < E, tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M), 0)
    behind = tl.cumsum(tiles, 0)  # tiles up to an expert's last
    own = (behind > tile) & (behind - tiles <= tile)
    first = tl.sum(tl.where(own, starts + (tile - behind + tiles) * BLOCK_M, 0), 0)
    return tl.sum(tl.where(behind <= tile, 1, 0), 0), first, tl.sum(tl.where(own, ends, 0), 0)


# --- host side --------------------------------------------------------------------------------------------------------


def bytes_of(part: torch.Tensor | None) -> tuple[torch.Tensor | None, str]:
    """A part as the kernels take it, and the kind of its scales: float8 goes as bytes."""
    kinds = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}
    if part is not None and part.dtype in kinds:
        return part.view(torch.uint8), kinds[part.dtype]
    return part, ""


def plain(part: torch.Tensor | None) -> torch.Tensor | None:
    """zeros, offsets, outer or bias in a type that a kernel loads."""
    return part.float() if part is not None and part.is_floating_point() and part.element_size() == 1 else part


def part_strides(name: str, part: torch.Tensor | None) -> dict[str, int]:
    """A part's strides; one row serves every row."""
    n, g = (0, 0) if part is None else part.stride()
    return {f"stride_{name}_n": 0 if part is None or part.shape[0] == 1 else n, f"stride_{name}_g": g}


def parts_args(scales, zeros, offsets) -> dict:
    """The arguments of scales, zeros and offsets that every kernel takes."""
    stored, kind = bytes_of(scales)
    zeros, offsets = plain(zeros), plain(offsets)
    args = {"scales_ptr": stored, "zeros_ptr": zeros, "offsets_ptr": offsets, "SCALES": kind}
    for name, part in (("scales", stored), ("zeros", zeros), ("offsets", offsets)):
        args |= part_strides(name, part)
    return args


def experts_args(offs: torch.Tensor | None) -> dict:
    """The arguments of expert_of; EXPERTS is 0 for a product that has none."""
    if offs is None:
        return {"offs_ptr": None, "EXPERTS": 0, "LANES": 0}
    return {"offs_ptr": offs.contiguous(), "EXPERTS": len(offs), "LANES": next_power_of_2(len(offs))}


def table_of(format: str, dtype: torch.dtype, device) -> torch.Tensor | None:
    """The values of a format that has no arithmetic of its own."""
    if format not in TABLES:
        return None
    if device.type == "meta":
        return torch.empty(1 << FORMATS[format].bits, dtype=dtype, device=device)
    return FORMATS[format].values(dtype, device)


def rows_first(data: torch.Tensor) -> torch.Tensor:
    """data with bytes beside each other in a row."""
    return data if data.stride(-1) == 1 or data.shape[-1] <= 1 else data.contiguous()
