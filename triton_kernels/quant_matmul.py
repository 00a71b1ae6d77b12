"""x @ dequantize(w).T + bias with a packed weight: the forward on tl.dot, and which kernel serves a call.

Shape letters: M tokens, N outputs, K inputs, G groups of columns, U units of P codes (quant_device.py), S parts of K.

    out[m, n] = outer[n] sum_g (scales[n, g] sum_(k in g) x[m, k] (code[n, k] - zeros[n, g])
                                + offsets[n, g] sum_(k in g) x[m, k])

Up to GEMV_TOKENS tokens go to quant_matmul_gemv.py, the rest here. The operand is code - zero, not the weight: whole
numbers below 256 are exact in float16, bfloat16 and TF32, and so are float8, float6 and float4. A group's product is
scaled when it is whole, in float32, so that no weight is rounded, and integers meet integers in int32, to the end of
the group: exact. Scales beyond float16's range do no harm. nf4, fp4_bnb and fractional zeros are rounded once. NVFP4's
groups of 16 are smaller than a tile; there the scale goes into the operand, which holds the product exactly.

float8 activations are float16 operands, which hold them exactly; float8 tensor cores, twice as fast where the weight is
float8 as well, are left for when it can be measured what their accumulator loses.

Never measured. What should bound it on an H100/H200, W4 with groups of 128 at N = K = 8192, 33.5 MB of codes and 1.0 MB
of float16 scales: 10.3 us at 3.35 TB/s, 7.2 us at 4.8 TB/s, until the 2 M N K flops take as long, at 800 TFLOP/s for 61
and 43 tokens. Beyond, the multiplications of the accumulators by scales, one for each 128 of the product's, cost 128 /
16 of a clock's 128 lanes against 4,096 flops a clock; and what undoes the packing, some 3 instructions a code, is
repeated for each BLOCK_M tokens. So from DENSE_TOKENS on bfloat16 weights are dequantized once, a piece that stays in
the L2 at a time, and multiplied by cuBLAS: chosen by this count, not by a measurement.

How the work is split: a program owns BLOCK_N x BLOCK_M outputs and walks over the segments, the groups of its columns
(of 2^15 columns at most, as many as int32 holds, where both sides are integers). [N, K] @ [K, M], the weight on the
left: on Hopper the left operand of a warp-group product comes from registers, where codes are unpacked, and eight
tokens fill the other side. With few tiles K is cut into parts of whole segments; a second kernel adds them in order.
Planes: columns p, p + P, .. of a block meet plane p of its units, so nothing is interleaved, but x, which more than
PLANE_TOKENS tokens (and rounded ones anyway) have put in planes first. Groups that no plane fits (of 7 or 100 columns)
look up each code's byte, in blocks that end where the group does.

What stays in registers: the accumulator, a group's product, codes. x goes through shared memory.

Strides: x any; of the weight's rows any. Ends of rows, groups and tiles are masked, and what follows the last code is
never looked at. An Inf in x is a NaN where a code is the zero's; with offsets all of its token's outputs are NaN.
"""

import torch
import triton
import triton.language as tl

from ..quant._formats import FORMATS
from .common import Launch, compile_spec, index, meta, strides, wide
from .host_math import cdiv, next_power_of_2
from .quant_device import (
    MANTISSA, PER_UNIT, bits_of, centre_of, codes_of, expert_of, experts_args, finish, is_whole, operand, part_strides,
    parts_args, plain, rows_first, scales_of, store, table_of, values_of,
)  # fmt: skip
from .quant_matmul_dense import dense_fwd, dense_serves
from .quant_matmul_gemv import gemv_serves, plan_quant_matmul_gemv
from .quantize_rows import quantize_rows, rounded_type
from .tuning import config

__all__ = ["quant_matmul_fwd"]

# --- the product ------------------------------------------------------------------------------------------------------


@triton.jit
def _block(
    part, sums, unit, end, row_ptr, x, table_ptr, zero, scales, FORMAT: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr, MASKED: tl.constexpr, INT64: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The units [U] that lie before column `end`, added to (part [N, M], the sums of x [M]).

    scales: None, or those of small groups, (pointers to rows [N, 1], stride, units of a group, last group, kind).
    """
    x_ptr, stride_x_u, stride_x_p = x
    if scales is not None:
        scales_ptr, stride_g, per_group, last = scales
        at_scale = scales_ptr + tl.minimum(unit // per_group, last)[None, :] * stride_g
        factor = scales_of(at_scale, None, "e4m3", tl.float32)  # [N, U]
    for p in tl.static_range(P):
        inside = unit * P + p < end
        at = x_ptr + (index(unit, INT64) * stride_x_u + p * stride_x_p)[:, None]
        if MASKED:
            code = codes_of(row_ptr, unit, inside[None, :], p, FORMAT, P)
            tokens = tl.load(at, mask=inside[:, None], other=0)  # [U, M]
        else:
            code = codes_of(row_ptr, unit, None, p, FORMAT, P)
            tokens = tl.load(at)
        w = values_of(code, table_ptr, FORMAT, OPERAND)  # [N, U]
        if zero is not None:
            w -= zero
        if scales is not None:
            w *= factor
        if MASKED and bits_of(FORMAT) == 8:  # what is no code may be a float8's NaN
            w = tl.where(inside[None, :], w, 0)
        part = tl.dot(
            operand(w, OPERAND), operand(tokens, OPERAND), part, input_precision=PRECISION, out_dtype=part.dtype
        )
        if SUMS:
            sums += tl.sum(tokens.to(sums.dtype), axis=0)
    return part, sums


@triton.jit
def _scaled(part, sums, n, g, zeros_ptr, stride_n, stride_g, FORMAT: tl.constexpr, ACC: tl.constexpr):
    """A group's product [N, M] in ACC; of integers, whose codes are only centred, less its zeros times the sums of x.

    The whole part of a zero is subtracted in int32, so that whole zeros of any dtype leave the sum exact.
    """
    if sums.dtype.is_int() and zeros_ptr is not None:
        zero = tl.load(zeros_ptr + n * stride_n + g * stride_g).to(ACC) - centre_of(FORMAT)
        whole = tl.where(tl.abs(zero) <= 512, zero, 0).to(tl.int32)
        exact = (part.to(tl.int32) - whole[:, None] * sums[None, :]).to(ACC)
        return exact - (zero - whole.to(ACC))[:, None] * sums[None, :].to(ACC)
    else:
        return part.to(ACC)


@triton.jit
def _quant_matmul_fwd_kernel(
    out_ptr, x_ptr, data_ptr, scales_ptr, zeros_ptr, offsets_ptr, table_ptr, outer_ptr, tokens_ptr, bias_ptr, offs_ptr,
    M, N, K, group, segment, segments, each, stride_out_s, stride_out_m, stride_out_n, stride_x_m, stride_x_u,
    stride_x_p, stride_data_n, stride_scales_n, stride_scales_g, stride_zeros_n, stride_zeros_g, stride_offsets_n,
    stride_offsets_g, stride_outer_n, stride_bias_n,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, PER_GROUP: tl.constexpr, ONE_STEP: tl.constexpr, MASKED: tl.constexpr, INT64: tl.constexpr,
    SMALL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, NEIGHBOURS: tl.constexpr,
    EXPERTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out (S, M, N). Grid (tiles, S); `each`: segments of a part. tokens (M,): the scales of x.

    SMALL: 0, or the columns of groups so small that their scales go into the operand; `group` is the whole row then.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M) + EXPERTS, tl.cdiv(N, BLOCK_N)
    # Tiles of NEIGHBOURS x BLOCK_M tokens come one after the other and share the weight's rows in L2.
    band = tl.program_id(0) // (NEIGHBOURS * tiles_n) * NEIGHBOURS
    height = tl.minimum(tiles_m - band, NEIGHBOURS)
    place = tl.program_id(0) % (NEIGHBOURS * tiles_n)
    n = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, first_m, end_m = 0, (band + place % height) * BLOCK_M, M
    if EXPERTS > 0:
        expert, first_m, end_m = expert_of(offs_ptr, band + place % height, M, EXPERTS, BLOCK_M, LANES)
        if expert >= EXPERTS:
            return
    m = first_m + tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < end_m
    row, token = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)  # no mask: the last one again
    row += tl.cast(expert, tl.int64) * N
    row_ptr = data_ptr + row[:, None] * stride_data_n
    x = (x_ptr + token[None, :] * stride_x_m, stride_x_u, stride_x_p)
    WHOLE: tl.constexpr = x_ptr.dtype.element_ty == tl.int8 and is_whole(FORMAT)
    SUMS: tl.constexpr = offsets_ptr is not None or (WHOLE and zeros_ptr is not None)
    DIRECT: tl.constexpr = zeros_ptr is not None and not WHOLE
    SUM: tl.constexpr = tl.int32 if WHOLE else ACC
    PART: tl.constexpr = tl.int32 if OPERAND == tl.int8 else tl.float64 if OPERAND == tl.float64 else tl.float32

    small = None
    if SMALL > 0:
        small = (scales_ptr + row[:, None] * stride_scales_n, stride_scales_g, SMALL // P, (K - 1) // SMALL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for s in range(tl.program_id(1) * each, tl.minimum((tl.program_id(1) + 1) * each, segments)):
        g = s // PER_GROUP
        start = g * group + s % PER_GROUP * segment
        end = tl.minimum(tl.minimum(start + segment, (g + 1) * group), K)
        zero = None
        if DIRECT:
            zero = tl.load(zeros_ptr + row * stride_zeros_n + g * stride_zeros_g).to(ACC) - centre_of(FORMAT)
            zero = zero[:, None]
        part, sums = tl.zeros([BLOCK_N, BLOCK_M], PART), tl.zeros([BLOCK_M], SUM)
        unit = start // P + tl.arange(0, BLOCK_U)
        if ONE_STEP:
            part, sums = _block(part, sums, unit, end, row_ptr, x, table_ptr, zero, small, FORMAT, OPERAND, PRECISION,
                                SUMS, MASKED, INT64, P)  # fmt: skip
        else:
            for step in range(tl.cdiv(end - start, P * BLOCK_U)):
                part, sums = _block(part, sums, unit + step * BLOCK_U, end, row_ptr, x, table_ptr, zero, small,
                                    FORMAT, OPERAND, PRECISION, SUMS, MASKED, INT64, P)  # fmt: skip
        part = _scaled(part, sums, row, g, zeros_ptr, stride_zeros_n, stride_zeros_g, FORMAT, ACC)
        if SMALL > 0:
            acc += part
        else:
            scale = scales_of(scales_ptr + row * stride_scales_n + g * stride_scales_g, None, SCALES, ACC)
            acc += part * scale[:, None]
        if offsets_ptr is not None:
            offset = tl.load(offsets_ptr + row * stride_offsets_n + g * stride_offsets_g).to(ACC)
            acc += offset[:, None] * sums[None, :].to(ACC)
    acc = finish(acc, row, m, in_n, in_m, outer_ptr, stride_outer_n, tokens_ptr, bias_ptr, stride_bias_n)
    at = out_ptr + tl.program_id(1).to(tl.int64) * stride_out_s + m.to(tl.int64)[None, :] * stride_out_m
    at += n[:, None] * stride_out_n
    store(at, acc, in_n[:, None] & in_m[None, :])


@triton.jit
def _quant_matmul_sum_kernel(
    out_ptr, parts_ptr, outer_ptr, tokens_ptr, bias_ptr, N, parts, stride_out_m, stride_out_n, stride_parts_s,
    stride_parts_m, stride_outer_n, stride_bias_n, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (M, N) out of (S, M, N), added in order. Grid (tiles of N, M)."""
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) + tl.arange(0, 1)
    in_n, row = n < N, tl.program_id(1).to(tl.int64)
    acc = tl.zeros([BLOCK_N], parts_ptr.dtype.element_ty)
    for s in range(parts):
        acc += tl.load(parts_ptr + tl.cast(s, tl.int64) * stride_parts_s + row * stride_parts_m + n, mask=in_n, other=0)
    acc = finish(acc[:, None], n, m, in_n, m == m, outer_ptr, stride_outer_n, tokens_ptr, bias_ptr, stride_bias_n)
    at = out_ptr + row * stride_out_m + n[:, None] * stride_out_n
    store(at, acc, in_n[:, None])


# --- launchers --------------------------------------------------------------------------------------------------------

WANTED = 4 * 132  # programs, four a multiprocessor of an H100/H200
LEAST_COLUMNS = 512  # of a part: fewer are not worth a sum
INT32_COLUMNS = 1 << 15  # 128 x 127 x 2^15 < 2^31
FLOAT_COLUMNS = 512  # 127 x 255 x 512 < 2^24: integers that a float32 sum of float16 products leaves exact
PLANE_TOKENS = 16  # up to which x is read as it lies
TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(dtype, rounded, format, zeros, group, groups):
    """The type of the product's operands, for tokens of `dtype` that were rounded to `rounded`, if to anything."""
    whole = FORMATS[format].is_integer or format == "int1"
    fits = groups == 1 or group > FLOAT_COLUMNS or group % (32 * PER_UNIT[FORMATS[format].bits]) == 0
    if rounded == torch.int8 and whole:
        return tl.int8 if fits else tl.float16  # whose smallest tile is of 16 columns, int8's of 32
    exact = (whole or format in MANTISSA) and (zeros is None or not zeros.is_floating_point())
    if rounded is not None and (exact and dtype != torch.float64 or dtype in (torch.float16, torch.bfloat16)):
        return tl.float16  # whose sums are float32's
    return TYPES[dtype]


def _small(format, group, groups, scales, zeros, offsets, dtype) -> int:
    """`group`, where a group is smaller than a tile of planes and its scale times a value exact in every half type.

    Such are NVFP4's: of at most 2 and 4 significant bits, between 2^-10 and 2688. Else 0.
    """
    exact = format == "fp4_e2m1" and scales.dtype == torch.float8_e4m3fn and zeros is None and offsets is None
    return group if exact and groups > 1 and group % 32 and group % 2 == 0 and dtype != torch.float64 else 0


def _planes(kind, bits, group, groups) -> int:
    """P: 1, each code by itself, where the smallest tile of planes holds no whole groups."""
    least = 32 if kind == tl.int8 else 16
    return PER_UNIT[bits] if groups == 1 or group % (least * PER_UNIT[bits]) == 0 else 1


def _tiles(kind, per, M, N, K, bits, groups, group, device) -> dict:
    """BLOCK_U, BLOCK_M, BLOCK_N, num_warps, num_stages. Registers of the larger tiles on sm_80: 204 to 255."""
    default = {"BLOCK_M": 16, "BLOCK_N": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 4}
    if kind in (tl.float32, tl.float64):
        default |= {"BLOCK_M": 32 if M > 16 else 16, "COLUMNS": 32, "num_stages": 2}
    elif M > 64:
        default |= {"BLOCK_M": 128, "BLOCK_N": 128, "COLUMNS": 128 if kind == tl.int8 else 64, "num_warps": 8,
                    "num_stages": 3}  # fmt: skip
    elif M > 16:
        default |= {"BLOCK_M": 32} if M <= 32 else {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8}
    tiles = dict(config("quant_matmul_fwd", f"{kind}-{bits}-M{next_power_of_2(M)}", device, default))
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], max(16, next_power_of_2(N)))
    units, least = cdiv(min(group, K), per), 32 if kind == tl.int8 else 16
    block = max(least, min(tiles.pop("COLUMNS") // per, next_power_of_2(units)))
    while groups > 1 and block > least and units % block:
        block //= 2
    return {**tiles, "P": per, "BLOCK_U": block}


def plan_quant_matmul_fwd(
    out, x, tokens, data, scales, zeros, offsets, outer, bias, offs, format, group_size, K, dtype
) -> tuple[Launch, Launch | None]:  # fmt: skip
    """The launches, from shapes, strides and dtypes: the product and, where it is split, the sum of its parts.

    out (M, N); x (M, K), or in planes, (M, P, U); x has another dtype than `dtype` where it was rounded, with the
    scales tokens (M,).
    """
    M, N, groups, experts = x.shape[0], out.shape[1], scales.shape[1], experts_args(offs)
    E = experts["EXPERTS"]
    small = _small(format, group_size, groups, scales, zeros, offsets, dtype)
    groups = 1 if small else groups
    bits, group = FORMATS[format].bits, K if groups == 1 else group_size
    kind = _operand(dtype, None if tokens is None else x.dtype, format, zeros, group, groups)
    per = _planes(kind, bits, group, groups)
    tiles = _tiles(kind, per, cdiv(M, E or 1), N, K, bits, groups, group, x.device)
    block, acc = per * tiles["BLOCK_U"], real_of(dtype)
    programs = (cdiv(M, tiles["BLOCK_M"]) + E) * cdiv(N, tiles["BLOCK_N"])
    wanted = 1 if E else max(1, min(WANTED // programs, cdiv(K, LEAST_COLUMNS)))
    segment = group
    if groups == 1:
        segment = cdiv(cdiv(K, wanted), block) * block
    if kind == tl.int8:
        segment = min(segment, INT32_COLUMNS)
    per_group = cdiv(group, segment)
    segments = groups * per_group
    each = cdiv(segments, wanted)
    parts = cdiv(segments, each)
    ends = _ends(outer, tokens, bias)
    to = out[None] if parts == 1 else x.new_empty(parts, M, N, dtype=acc)
    stride_u, stride_p = (x.stride(1) * per, x.stride(1)) if x.dim() == 2 else (x.stride(2), x.stride(1))
    args = dict(
        out_ptr=to, x_ptr=x, data_ptr=data, table_ptr=table_of(format, acc, x.device), M=M, N=N, K=K, group=group,
        segment=segment, segments=segments, each=each, **strides("out", to, "smn"), stride_x_m=x.stride(0),
        stride_x_u=stride_u, stride_x_p=stride_p, stride_data_n=data.stride(0),
        **parts_args(scales, zeros, offsets), **(ends if parts == 1 else without(ends)), FORMAT=format, OPERAND=kind,
        ACC=TYPES[acc], PRECISION="tf32x3" if kind == tl.float32 else "ieee", PER_GROUP=per_group,
        ONE_STEP=segment <= block, MASKED=bool(K % block or segment % block or group % block),
        INT64=wide(x) or K * bits >= 2**31,
        SMALL=small, **{name: tiles[name] for name in ("P", "BLOCK_N", "BLOCK_M", "BLOCK_U")}, NEIGHBOURS=8, **experts,
    )  # fmt: skip
    launch = Launch(_quant_matmul_fwd_kernel, (programs, parts), args, tiles["num_warps"], tiles["num_stages"])
    return launch, None if parts == 1 else plan_sum(out, to, ends)


def _ends(outer, tokens, bias) -> dict:
    """The arguments of what ends a product."""
    outer, bias = plain(outer), plain(bias)
    return dict(
        outer_ptr=outer, tokens_ptr=tokens, bias_ptr=bias,
        stride_outer_n=part_strides("outer", outer)["stride_outer_n"],
        stride_bias_n=0 if bias is None else bias.stride(0),
    )  # fmt: skip


def without(ends: dict) -> dict:
    """The same arguments for a part, which ends nothing."""
    return {name: None if name.endswith("ptr") else 0 for name in ends}


def plan_sum(out, parts, ends) -> Launch:
    """parts (S, M, N) added to out (M, N), with what ends a product."""
    M, N = out.shape
    block = min(512, max(16, next_power_of_2(N)))
    args = dict(
        out_ptr=out, parts_ptr=parts, N=N, parts=parts.shape[0], **strides("out", out, "mn"),
        stride_parts_s=parts.stride(0), stride_parts_m=parts.stride(1), **ends, BLOCK_N=block,
    )  # fmt: skip
    return Launch(_quant_matmul_sum_kernel, (cdiv(N, block), M), args, 4)


def quant_matmul_fwd(
    out, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale, out_dtype
) -> None:  # fmt: skip
    """fill(out, *op arguments)"""
    flat, to, data = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]), rows_first(data)
    weight = data, scales, zeros, offsets, outer, bias, format, group_size
    if offs is not None:
        out.zero_()  # the rows beyond the last expert's
    elif not activation and dense_serves(to, flat):
        dense_fwd(to, flat, *weight)
        return
    if offs is None and not activation and gemv_serves(flat, format, group_size, scales.shape[1]):
        launches = _gemv(to, flat, *weight)
    else:
        planes, tokens = _tokens(flat, scales, zeros, offsets, format, group_size, activation, activation_scale)
        weight = *weight[:-2], offs, *weight[-2:]
        launches = plan_quant_matmul_fwd(to, planes, tokens, *weight, flat.shape[1], x.dtype)
    for launch in filter(None, launches):
        launch.run()


def _gemv(out, x, data, scales, zeros, offsets, outer, bias, format, group_size):
    ends = _ends(outer, None, bias)
    product = plan_quant_matmul_gemv(out, x, data, scales, zeros, offsets, ends, format, group_size)
    return product, plan_sum(out, parts, ends) if len(parts := product.args["out_ptr"]) > 1 else None


def _tokens(x, scales, zeros, offsets, format, group_size, activation, activation_scale):
    """(x, rounded and in planes where that pays, the tokens' scales or None)

    Planes of a row lie P numbers apart, which no asynchronous copy and no wide load takes. A tile of few tokens is read
    once or twice by each program all the same, which costs less than another launch.
    """
    (M, K), per = x.shape, _planes_of(x.dtype, scales, zeros, offsets, format, group_size, activation)
    if activation:
        return quantize_rows(x, activation, activation_scale, per)
    if per > 1 and K % per == 0 and M > PLANE_TOKENS:
        return x.unflatten(1, (-1, per)).transpose(1, 2).contiguous(), None
    return x, None


def _planes_of(dtype, scales, zeros, offsets, format, group_size, activation) -> int:
    """P of a call, from the operator's arguments."""
    small = _small(format, group_size, scales.shape[1], scales, zeros, offsets, dtype)
    groups, rounded = 1 if small else scales.shape[1], rounded_type(activation) if activation else None
    kind = _operand(dtype, rounded, format, zeros, group_size, groups)
    return _planes(kind, FORMATS[format].bits, group_size, groups)


# --- what tests compile -----------------------------------------------------------------------------------------------


def sample(M, dtype, format="int4", group=128, *, zeros=None, offsets=False, N=8192, K=8192, scales=torch.float16):
    """(out, x, data, scales, zeros, offsets) on meta tensors; zeros: their dtype."""
    groups = 1 if group is None else cdiv(K, group)
    part = lambda dtype: meta(N, groups, dtype=dtype)
    data = meta(N, cdiv(K * FORMATS[format].bits, 8), dtype=torch.uint8)
    zeros, offsets = part(zeros) if zeros else None, part(torch.float16) if offsets else None
    return meta(M, N, dtype=dtype), meta(M, K, dtype=dtype), data, part(scales), zeros, offsets


def _spec(dtype, M, format="int4", group=128, activation=None, experts=0, **options) -> tuple[Launch, Launch | None]:
    out, x, data, *parts = sample(M, dtype, format, group, **options)
    (_, K), per = x.shape, _planes_of(dtype, *parts, format, group or x.shape[1], activation)
    if activation or per > 1 and M > PLANE_TOKENS:
        x = meta(M, per, K // per, dtype=rounded_type(activation) if activation else dtype)
    bias, offs = meta(out.shape[1], dtype=dtype), None
    if experts:
        offs, out = meta(experts, dtype=torch.int32), meta(M, out.shape[1] // experts, dtype=dtype)
    weight = data, *parts, None, bias, offs, format, group or K
    return plan_quant_matmul_fwd(out, x, meta(M) if activation else None, *weight, K, dtype)


for _name, _args, _options in (
    ("", (64,), {}), ("_16_zeros", (16,), {"zeros": torch.uint8}), ("_int8", (4096, "int8", None, "int8"), {}),
    ("_int4_int8", (4096, "int4", 128, "int8"), {"zeros": torch.uint8}),
    ("_int3", (256, "int3", 100), {"offsets": True}),
    ("_nvfp4", (64, "fp4_e2m1", 16), {"scales": torch.float8_e4m3fn}), ("_experts", (64,), {"experts": 8}),
):  # fmt: skip
    compile_spec(f"quant_matmul_fwd{_name}")(lambda dtype, a=_args, o=_options: _spec(dtype, *a, **o)[0])
# Of float64, in groups that no int8 tile fits: no matrix unit adds products of float16 in float64.
compile_spec("quant_matmul_fwd_float64_int8")(lambda dtype: _spec(torch.float64, 16, "int4", 100, "int8")[0])
compile_spec("quant_matmul_fwd_float64_fp8")(lambda dtype: _spec(torch.float64, 16, "int4", 128, "fp8")[0])
compile_spec("quant_matmul_sum")(lambda dtype: _spec(dtype, 16)[1])
