"""Tokens rounded to 8- or 4-bit integers or to float8, each with a scale of its own or all with a given one.

Shape letters: M tokens, K inputs.

Never measured. Bound by HBM bytes: K elements read, K bytes (2 K for float8's numbers in float16) written. A program
owns a token and walks over it twice, for its largest magnitude and to round it; a row is read out of the L2 the second
time. Rounding adds and subtracts 1.5 x 2^23 quanta: halves go to even, as the oracle's do. All of it is float32 with
IEEE division, so that the numbers are the oracle's to the last bit.

A token that is not finite has the scale NaN: integers hold no NaN.
"""

import torch
import triton
import triton.language as tl

from ..reference.quant_matmul import ACTIVATION_MAX
from .common import Launch, compile_spec, index, meta, strides, wide
from .host_math import cdiv, next_power_of_2

MAGIC: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 x 2^23
HUGE: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _quantize_rows_kernel(
    q_ptr, tokens_ptr, x_ptr, K, static, stride_q_m, stride_q_p, stride_x_m, stride_x_k, P: tl.constexpr,
    TOP: tl.constexpr, STATIC: tl.constexpr, FLOAT8: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q (M, P, U) int8, or float16 that holds float8_e4m3; tokens (M,) float32. Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_x_m
    q_ptr += m * stride_q_m
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index(k, INT64) * stride_x_k, mask=k < K, other=0.0).to(tl.float32)  # [BLOCK]
        if STATIC:
            magnitude = tl.where(x == x, 0.0, float("inf"))
        else:
            magnitude = tl.where(tl.abs(x) <= HUGE, tl.abs(x), float("inf"))
        largest = tl.maximum(largest, magnitude)
    top = tl.max(largest)
    scale = top * 0 + static if STATIC else tl.div_rn(top, tl.full([], TOP, tl.float32))
    tl.store(tokens_ptr + m, tl.where(top < float("inf"), scale, float("nan")))
    scale = tl.where(top < float("inf"), scale, static if STATIC else float("inf"))
    by = tl.zeros([BLOCK], tl.float32) + tl.where(scale == 0, 1.0, scale)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index(k, INT64) * stride_x_k, mask=k < K, other=0.0).to(tl.float32)
        scaled = tl.where(scale == 0, 0.0, tl.div_rn(x, by))
        v = tl.where(scaled > TOP, TOP, tl.where(scaled < -TOP, -TOP, scaled))
        if FLOAT8:
            binade = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)  # from 2^-6, as subnormals' are
            shift = binade.to(tl.float32, bitcast=True) * (MAGIC / 8)
            v = tl.where(tl.abs(scaled) <= HUGE, (v + shift) - shift, scaled)
        else:
            v = (tl.where(v == v, v, 0.0) + MAGIC) - MAGIC
        tl.store(q_ptr + k % P * stride_q_p + k // P, v.to(q_ptr.dtype.element_ty), mask=k < K)


def plan_quantize_rows(q, tokens, x, activation, static=None) -> Launch:
    """x (M, K), q (M, P, U)."""
    block = min(1024, max(16, next_power_of_2(x.shape[1])))
    args = dict(
        q_ptr=q, tokens_ptr=tokens, x_ptr=x, K=x.shape[1], static=float(static or 0.0), stride_q_m=q.stride(0),
        stride_q_p=q.stride(1), **strides("x", x, "mk"), P=q.shape[1], TOP=ACTIVATION_MAX[activation],
        STATIC=static is not None, FLOAT8=activation == "fp8", INT64=wide(x), BLOCK=block,
    )  # fmt: skip
    return Launch(_quantize_rows_kernel, (x.shape[0],), args, 4)


def rounded_type(activation: str) -> torch.dtype:
    """What holds the rounded numbers."""
    return torch.float16 if activation == "fp8" else torch.int8


def quantize_rows(x, activation, static=None, planes=1) -> tuple[torch.Tensor, torch.Tensor]:
    """(the rounded numbers (M, P, U) in planes: column u P + p at (p, u); their scales (M,) float32)"""
    M, K = x.shape
    q = x.new_empty(M, planes, cdiv(K, planes), dtype=rounded_type(activation))
    tokens = x.new_empty(M, dtype=torch.float32)
    plan_quantize_rows(q, tokens, x, activation, static).run()
    return q, tokens


def _spec(dtype: torch.dtype, activation: str, static=None) -> Launch:
    x, tokens = meta(4096, 8192, dtype=dtype), meta(4096)
    q = meta(4096, 2, 4096, dtype=rounded_type(activation))
    return plan_quantize_rows(q, tokens, x, activation, static)


compile_spec("quantize_rows")(lambda dtype: _spec(dtype, "int8"))
compile_spec("quantize_rows_fp8_static")(lambda dtype: _spec(dtype, "fp8", 0.05))
