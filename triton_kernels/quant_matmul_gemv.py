"""quant_matmul of one to four tokens: no tensor core, every word of the weight read once.

Shape letters: M tokens, N outputs, K inputs, G groups of columns, U words of P codes, S parts of K.

Never measured. Bound by the weight's bytes, as long as the instructions keep up. Predicted for W4 with groups of 128 at
N = K = 8192, 33.5 MB of codes and 1.0 MB of float16 scales, one token:

    bytes           10.3 us of an H100's 3.35 TB/s, 7.2 us of an H200's 4.8 TB/s
    instructions    10.2 us of either's 132 x 128 lanes at 1.755 GHz, 9.1 us at 1.98 GHz

A code of 1, 2, 4 or 8 bits costs a bit operation (out of the word and into the mantissa of 2^23 at once), an FMA (back
to code - zero, exactly) and an FMA a token. In the sm_90 code the loop takes 4.5 instructions a W4 code, all told, 6.0
for two tokens and 11.2 for four; 3.8 a 2-bit code, 3.5 a 1-bit code, 7 an nf4 code (a load) or float4 code. So an H100
should come close to its bytes, and an H200 stay at 70 % of them. Fewer bits save bytes, not instructions: 1-bit codes
take 8 us, 5 and 3.5 times less than 40 and 28 us of dense bfloat16. (Packed float16 arithmetic would halve that, and
round.) Beyond GEMV_TOKENS an FMA a code and token is more than the tensor cores' kernel takes with all it wastes.

How the work is split: a program takes a part of K, of BLOCK_U words, for `steps` tiles of BLOCK_N rows one after the
other. Its x, P M numbers a word, is loaded once and stays in registers; lanes lie along K, a warp takes whole rows, and
the sum of a row is a few shuffles. Parts are added in order by the forward's second kernel: no atomics.

Bits that do not fit a word (3, 5, 6, 7), rows of no whole words and views that begin inside one are read by bytes. A
group must hold whole words, or bytes; the kernel for more tokens takes the others, and rounded activations.
Strides: x any. An Inf in x makes its token NaN where there are zeros or offsets, which meet the sum of x.
"""

import torch
import triton
import triton.language as tl

from ..quant._formats import FORMATS
from .common import Launch, compile_spec, index, meta, strides, wide
from .host_math import cdiv, next_power_of_2
from .quant_device import (
    PER_UNIT, bits_of, centre_of, codes_of, finish, is_whole, masked, parts_args, scales_of, store, table_of, values_of,
)  # fmt: skip
from .tuning import config

# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def _of_word(word, magic, table_ptr, p: tl.constexpr, FORMAT: tl.constexpr, ACC: tl.constexpr):
    """Value p of uint32 words [N, U], in ACC."""
    BITS: tl.constexpr = bits_of(FORMAT)
    if is_whole(FORMAT) and ACC == tl.float32:
        # One LOP3 puts a code into the mantissa of 2^23, 2^SHIFT too high. int1 needs one place more, for its 1.
        LOW: tl.constexpr = 1 if FORMAT == "int1" else 0
        SHIFT: tl.constexpr = p * BITS % 16 + LOW
        if p * BITS >= 16:
            word >>= 16 - LOW
        elif LOW > 0:
            word <<= 1
        bits = (word & (((1 << BITS) - 1) << SHIFT)) | magic
        CENTRE: tl.constexpr = 1 if FORMAT == "int1" else centre_of(FORMAT)
        return bits.to(tl.float32, bitcast=True) * 2.0 ** (LOW - SHIFT) - (2.0 ** (23 + LOW - SHIFT) + CENTRE)
    else:
        code = ((word >> (p * BITS)) & ((1 << BITS) - 1)).to(tl.int32)
        return values_of(code, table_ptr, FORMAT, ACC).to(ACC)


@triton.jit
def _shared(x, SHARE: tl.constexpr):
    """x [N, U], SHARE neighbours summed up: those of a thread, and of a group."""
    if SHARE == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // SHARE, SHARE]), axis=2)


# --- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def _quant_matmul_gemv_kernel(
    out_ptr, x_ptr, data_ptr, scales_ptr, zeros_ptr, offsets_ptr, table_ptr, outer_ptr, bias_ptr,
    magic, M, N, K, units, per_group, steps, stride_out_s, stride_out_m, stride_out_n, stride_x_m, stride_x_k,
    stride_data_n, stride_scales_n, stride_scales_g, stride_zeros_n, stride_zeros_g, stride_offsets_n, stride_offsets_g,
    stride_outer_n, stride_bias_n,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, P: tl.constexpr, WORDS: tl.constexpr, ONE_GROUP: tl.constexpr,
    MASKED: tl.constexpr, INT64: tl.constexpr, TOKENS: tl.constexpr, VECTOR: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """out (S, M, N). per_group: units of a group; SHARE that lie in one. Grid (tiles of `steps` BLOCK_N rows, S)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    SUMS: tl.constexpr = zeros_ptr is not None or offsets_ptr is not None
    # A lane loads VECTOR words beside each other: more, and x would not fit into its registers.
    unit = tl.max_contiguous(tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U), VECTOR)
    inside = (unit < units)[None, :] if MASKED else None
    xs, sums = (), ()
    for m in tl.static_range(TOKENS):
        total = tl.zeros([BLOCK_U], ACC)
        token_ptr = x_ptr + tl.minimum(m, M - 1).to(tl.int64) * stride_x_m
        for p in tl.static_range(P):
            k = unit * P + p
            x = tl.load(token_ptr + index(k, INT64) * stride_x_k, mask=k < K, other=0.0).to(ACC)  # [U]
            xs, total = xs + (x,), total + x
        sums = sums + (_shared(total[None, :], SHARE),)  # [1, U / SHARE]
    first = (tl.program_id(1) * (BLOCK_U // SHARE) + tl.arange(0, BLOCK_U // SHARE)) * SHARE
    g = tl.minimum(first, units - 1) // per_group
    for step in range(steps):
        n = (tl.program_id(0) * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
        row_ptr, word = data_ptr + row * stride_data_n, None
        if WORDS:
            word = masked(row_ptr + unit[None, :], inside).to(tl.uint32, bitcast=True)  # [N, U]
        acc = ()
        for m in tl.static_range(TOKENS):
            acc = acc + (tl.zeros([BLOCK_N, BLOCK_U], ACC),)
        for p in tl.static_range(P):
            if WORDS:
                w = _of_word(word, magic, table_ptr, p, FORMAT, ACC)
            else:
                w = values_of(codes_of(row_ptr, unit, inside, p, FORMAT, P), table_ptr, FORMAT, ACC).to(ACC)
            more = ()
            for m in tl.static_range(TOKENS):
                more = more + (acc[m] + w * xs[m * P + p][None, :],)
            acc = more
        column = row * 0 if ONE_GROUP else g[None, :]
        scale = scales_of(scales_ptr + row * stride_scales_n + column * stride_scales_g, None, SCALES, ACC)
        for m in tl.static_range(TOKENS):
            part = _shared(acc[m], SHARE)  # [N, U / SHARE]
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + row * stride_zeros_n + column * stride_zeros_g).to(ACC)
                part -= (zero - centre_of(FORMAT)) * sums[m]
            part *= scale
            if offsets_ptr is not None:
                offset = tl.load(offsets_ptr + row * stride_offsets_n + column * stride_offsets_g).to(ACC)
                part += offset * sums[m]
            at = m + tl.arange(0, 1)
            result = tl.sum(part, axis=1)[:, None]
            result = finish(result, n, at, n < N, at < M, outer_ptr, stride_outer_n, None, bias_ptr, stride_bias_n)
            to = out_ptr + tl.program_id(1).to(tl.int64) * stride_out_s + at.to(tl.int64)[None, :] * stride_out_m
            store(to + n[:, None] * stride_out_n, result, (n < N)[:, None] & (at < M)[None, :])


# --- launchers --------------------------------------------------------------------------------------------------------

GEMV_TOKENS = 4
WANTED = 8 * 132  # programs, eight a multiprocessor of an H100/H200
MAGIC = 0x4B000000  # 2^23 as float32. An argument: two constants would be two instructions where one does both.
NUMBERS = 64  # of x in a thread's registers


def gemv_serves(x: torch.Tensor, format: str, group: int, groups: int) -> bool:
    """Whether this kernel takes x (M, K) and a weight in groups of `group` columns."""
    return x.shape[0] <= GEMV_TOKENS and (groups == 1 or group % PER_UNIT[FORMATS[format].bits] == 0)


def _words(data: torch.Tensor, bits: int, group: int, groups: int, tokens: int) -> torch.Tensor:
    """data as int32 words, where it lies so and a group and a thread hold whole ones, else as it is."""
    steps = data.stride(0) if data.shape[0] > 1 else 0
    aligned = (data.shape[1] | steps | data.storage_offset()) % 4 == 0 and data.stride(1) == 1
    fits = bits in (1, 2, 4, 8) and (groups == 1 or group % (32 // bits) == 0) and tokens * 32 // bits <= NUMBERS
    return data.view(torch.int32) if aligned and fits else data


def plan_quant_matmul_gemv(out, x, data, scales, zeros, offsets, ends, format, group_size) -> Launch:
    """The launch, from shapes, strides and dtypes; its out_ptr is out[None] or the parts that are to be added.

    out (M, N), x (M, K); ends: the arguments of what ends a product.
    """
    (M, K), N, bits, groups = x.shape, data.shape[0], FORMATS[format].bits, scales.shape[1]
    tokens, group = next_power_of_2(M), K if scales.shape[1] == 1 else group_size
    data = _words(data, bits, group, groups, tokens)
    words = data.dtype == torch.int32
    per = 32 // bits if words else PER_UNIT[bits]
    units = cdiv(K, per)
    vector = max(1, min(4, NUMBERS // (tokens * per) * (1 if words else 4)))
    default = {"BLOCK_U": 32 * vector, "BLOCK_N": 64 // vector // (2 if tokens > 2 else 1), "num_warps": 4}
    blocks = dict(config("quant_matmul_gemv", f"{str(x.dtype)[6:]}-{bits}-M{tokens}", x.device, default))
    blocks["BLOCK_U"] = min(blocks["BLOCK_U"], next_power_of_2(units))
    blocks["BLOCK_N"] = min(blocks["BLOCK_N"], next_power_of_2(N))
    per_group = units if groups == 1 else group // per
    share = vector
    while share > 1 and (per_group % share and groups > 1 or share > blocks["BLOCK_U"]):
        share //= 2
    parts, tiles = cdiv(units, blocks["BLOCK_U"]), cdiv(N, blocks["BLOCK_N"])
    steps = blocks.pop("STEPS", max(1, min(8, tiles * parts // WANTED)))
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    to = out[None] if parts == 1 else x.new_empty(parts, M, N, dtype=real)
    ends = {k: v for k, v in ends.items() if k != "tokens_ptr"}
    if parts > 1:
        ends = {name: None if name.endswith("ptr") else 0 for name in ends}
    warps = blocks.pop("num_warps")
    args = dict(
        out_ptr=to, x_ptr=x, data_ptr=data, table_ptr=table_of(format, real, x.device), magic=MAGIC, M=M, N=N, K=K,
        units=units, per_group=per_group, steps=steps, **strides("out", to, "smn"),
        **strides("x", x, "mk"), stride_data_n=data.stride(0), **parts_args(scales, zeros, offsets), **ends,
        FORMAT=format, P=per, WORDS=words, ONE_GROUP=groups == 1, MASKED=units % blocks["BLOCK_U"] != 0,
        INT64=wide(x), TOKENS=tokens, VECTOR=vector, SHARE=share, **blocks,
    )  # fmt: skip
    return Launch(_quant_matmul_gemv_kernel, (cdiv(tiles, steps), parts), args, warps)


# --- what tests compile -----------------------------------------------------------------------------------------------


def _spec(dtype: torch.dtype, M: int, format: str, group: int | None, zeros=None) -> Launch:
    N = K = 8192
    bits, groups = FORMATS[format].bits, 1 if group is None else K // group
    scales = meta(N, groups, dtype=torch.float16)
    zeros = meta(N, groups, dtype=zeros) if zeros else None
    out, x, data = meta(M, N, dtype=dtype), meta(M, K, dtype=dtype), meta(N, K * bits // 8, dtype=torch.uint8)
    ends = dict(outer_ptr=None, tokens_ptr=None, bias_ptr=None, stride_outer_n=0, stride_bias_n=0)
    return plan_quant_matmul_gemv(out, x, data, scales, zeros, None, ends, format, group or K)


compile_spec("quant_matmul_gemv")(lambda dtype: _spec(dtype, 1, "int4", 128))
compile_spec("quant_matmul_gemv_4_zeros")(lambda dtype: _spec(dtype, 4, "int4", 128, torch.uint8))
compile_spec("quant_matmul_gemv_int1")(lambda dtype: _spec(dtype, 1, "int1", None))
compile_spec("quant_matmul_gemv_int3")(lambda dtype: _spec(dtype, 1, "int3", 128))
