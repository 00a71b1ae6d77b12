"""Tokens' keys or values rounded to 8 or 4 bits, and written side by side or into their slots of a cache.

Shape letters: B batch, H key heads, T new tokens, P channels, G groups of channels.

Never measured. Bound by HBM bytes, for a decoding step by its launch: P numbers read, P BITS / 8 bytes written. A
program owns one token of one head: its channels are a tile [G, GROUP], reduced along each group; for 4 bits the even
and the odd channels are loaded as two tiles, so that a byte is made in one thread. It finds its slot as the decoding
kernel does and stores nothing where the token has none. All of it is float32 with IEEE division, as the oracle's, to
the last bit.
"""

import torch
import triton
import triton.language as tl

from ..reference.quantize_kv import factor
from .common import Launch, compile_spec, index, meta, strides, wide
from .host_math import cdiv, next_power_of_2

MAGIC: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 x 2^23: added and subtracted, it leaves halves to even


@triton.jit
def _code(x, scale, offset, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """int32 of x's shape, as scale and offset are; 0 where the quotient is no number."""
    top: tl.constexpr = (1 << (BITS - 1)) - 1.0
    least: tl.constexpr = -top if SYMMETRIC else -top - 1.0
    v = tl.div_rn(x - offset, scale)
    v = tl.where(v == v, v, 0.0)
    v = tl.where(v > top, top, tl.where(v < least, least, v))
    return ((v + MAGIC) - MAGIC).to(tl.int32)


@triton.jit
def _quantize_kv_kernel(
    data_ptr, scales_ptr, offsets_ptr, x_ptr, lengths_ptr, head_offsets_ptr, table_ptr, starts_ptr, factor, sink, slots,
    H, T,
    stride_data_b, stride_data_h, stride_data_s, stride_data_p, stride_scales_b, stride_scales_h, stride_scales_s,
    stride_scales_p, stride_offsets_b, stride_offsets_h, stride_offsets_s, stride_offsets_p, stride_x_b, stride_x_h,
    stride_x_t, stride_x_p, stride_lengths_b, stride_heads_h, stride_table_b, stride_table_j, stride_starts_b,
    P: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr,
    CIRCULAR: tl.constexpr, INT64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Grid (B H T,): along one axis, since the others end at 65,535. T is no constant: prompts have many lengths."""
    head, t = tl.program_id(0) // T, tl.program_id(0) % T
    h, b = (head % H).to(tl.int64), (head // H).to(tl.int64)
    lead, slot, written = b, t, True
    if lengths_ptr is not None:
        n = tl.load(lengths_ptr + b * stride_lengths_b).to(tl.int32)
        slot = n - T + t
        written = slot >= 0
        base, capacity = 0, slots
        if head_offsets_ptr is not None:
            base = tl.load(head_offsets_ptr + h * stride_heads_h).to(tl.int32)
            capacity = tl.load(head_offsets_ptr + (h + 1) * stride_heads_h).to(tl.int32) - base
        if starts_ptr is not None:
            base = tl.load(starts_ptr + b * stride_starts_b).to(tl.int32)
            capacity -= base
        if CIRCULAR:
            ring = tl.maximum(capacity - sink, 0)
            written = written & ((slot < sink) | (slot >= n - ring))
            slot = tl.where(slot < sink, slot, sink + (slot - sink) % tl.maximum(ring, 1))
        written = written & (slot < capacity)
        if PAGE > 0:
            at_page = table_ptr + b * stride_table_b + (slot // PAGE).to(tl.int64) * stride_table_j
            lead = tl.load(at_page, mask=written, other=0).to(tl.int64)
            slot = slot % PAGE
        slot += base
    slot = slot.to(tl.int64)
    data_ptr += lead * stride_data_b + h * stride_data_h + slot * stride_data_s
    scales_ptr += lead * stride_scales_b + h * stride_scales_h + slot * stride_scales_s
    x_ptr += b * stride_x_b + h * stride_x_h + t.to(tl.int64) * stride_x_t
    g, u = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_U)
    G: tl.constexpr = (P + GROUP - 1) // GROUP
    p = g[:, None] * GROUP + u[None, :]  # [BLOCK_G, BLOCK_U]
    inside, zeros = (u < GROUP)[None, :] & (p < P), tl.zeros([BLOCK_G, BLOCK_U], tl.float32)
    x = tl.load(x_ptr + index(p, INT64) * stride_x_p, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, x, float("inf")), 1)  # [BLOCK_G]
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    sound = tl.min(((tl.abs(x) < float("inf")) | ~inside).to(tl.int32), 1) > 0
    span = tl.maximum(-low, high) if offsets_ptr is None else high - low
    span = tl.where(sound & (span < float("inf")), span, float("nan"))
    stored = (span * factor).to(scales_ptr.dtype.element_ty)
    scale = stored.to(tl.float32)
    tl.store(scales_ptr + g * stride_scales_p, stored, mask=(g < G) & written)
    offset = tl.zeros([BLOCK_G], tl.float32)
    if offsets_ptr is not None:
        offsets_ptr += lead * stride_offsets_b + h * stride_offsets_h + slot * stride_offsets_s
        kept = (tl.where(sound, low, float("nan")) + (1 << (BITS - 1)) * scale).to(scales_ptr.dtype.element_ty)
        tl.store(offsets_ptr + g * stride_offsets_p, kept, mask=(g < G) & written)
        offset = kept.to(tl.float32)
    if BITS == 8:
        code = _code(x, zeros + scale[:, None], zeros + offset[:, None], 8, offsets_ptr is None)
        tl.store(data_ptr + index(p, INT64) * stride_data_p, code.to(tl.int8), mask=inside & written)
    else:  # a byte's two channels may be of two groups: each is loaded again and looks its own up
        byte = tl.arange(0, BLOCK_BYTES)
        pair = tl.zeros([BLOCK_BYTES], tl.int32)
        for half in tl.static_range(2):
            c = 2 * byte + half
            value = tl.load(x_ptr + index(c, INT64) * stride_x_p, mask=c < P, other=0.0).to(tl.float32)
            own = (c // GROUP)[:, None] == g[None, :]  # [BLOCK_BYTES, BLOCK_G]
            of_scale, of_offset = tl.where(own, scale[None, :], 0.0), tl.where(own, offset[None, :], 0.0)
            code = _code(value, tl.sum(of_scale, 1), tl.sum(of_offset, 1), 4, offsets_ptr is None)
            pair |= (tl.where(c < P, code, 0) & 15) << (4 * half)
        tl.store(data_ptr + index(byte, INT64) * stride_data_p, pair.to(tl.int8), mask=(2 * byte < P) & written)


def plan(
    data, scales, offsets, x, lengths, head_offsets, block_table, starts, sink, circular, bits, group_size
) -> Launch:  # fmt: skip
    """x (B, H, T, P); the cache's parts (B or pages, H, S, ...), or (B, S, ...) with head_offsets."""
    B, H, T, P = x.shape
    ragged, page = head_offsets is not None, data.shape[2] if block_table is not None else 0
    axes = "bsp" if ragged else "bhsp"
    steps = {}
    for name, part in (("data", data), ("scales", scales), ("offsets", offsets)):
        steps |= {f"stride_{name}_h": 0, **strides(name, part, axes)}
    slots = block_table.shape[1] * page if page else data.shape[-2]
    args = dict(
        data_ptr=data, scales_ptr=scales, offsets_ptr=offsets, x_ptr=x, lengths_ptr=lengths,
        head_offsets_ptr=head_offsets, table_ptr=block_table, starts_ptr=starts,
        factor=factor(bits, offsets is None, scales.dtype), sink=sink, slots=slots, **steps, **strides("x", x, "bhtp"),
        **strides("lengths", lengths, "b"), **strides("heads", head_offsets, "h"),
        **strides("table", block_table, "bj"), **strides("starts", starts, "b"), H=H, T=T, P=P, GROUP=group_size,
        BITS=bits, PAGE=page, CIRCULAR=bool(circular),
        INT64=wide(x, data), BLOCK_G=next_power_of_2(cdiv(P, group_size)),
        BLOCK_U=next_power_of_2(group_size), BLOCK_BYTES=next_power_of_2(cdiv(P, 2)),
    )  # fmt: skip
    return Launch(_quantize_kv_kernel, (B * H * T,), args, 1 if P <= 256 else 4)


def quantize_kv(data, scales, offsets, x, bits, group_size, symmetric, scale_dtype) -> None:
    """fill(data, scales, offsets, *op arguments)"""
    four = lambda part: part.reshape(1, 1, -1, part.shape[-1]) if part.dim() != 4 else part  # noqa: E731
    offsets = None if symmetric else four(offsets)
    plan(four(data), four(scales), offsets, four(x), None, None, None, None, 0, False, bits, group_size).run()


def quantize_kv_update(*args) -> None:
    plan(*args).run()


def _spec(dtype, *, bits=8, group=128, paged=False) -> Launch:
    B, H, T, P = 8, 8, 1, 128
    lead = (512, H, 64) if paged else (B, H, 8192)
    data, scales = meta(*lead, P * bits // 8, dtype=torch.int8), meta(*lead, P // group, dtype=torch.float16)
    integers = lambda *shape: meta(*shape, dtype=torch.int32)  # noqa: E731
    table = integers(B, 64) if paged else None
    x, lengths = meta(B, H, T, P, dtype=dtype), integers(B)
    return plan(data, scales, scales, x, lengths, None, table, None, 0, False, bits, group)


compile_spec("quantize_kv")(_spec)
compile_spec("quantize_kv_int4_paged")(lambda dtype: _spec(dtype, bits=4, group=32, paged=True))
