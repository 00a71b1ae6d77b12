"""One decoding step of the selective scan, in place on the state.

Shape letters: S state slots, B batch, H heads, P head dim (the channels), N state size, G groups of B and C.

Measured on an H200 at B256 D8192 N16 bf16: 83 us, 81 % of the copy bandwidth.

What bounds it on an H100/H200: HBM bytes. The state is read and written once,
8 N bytes a channel in float32 and 4 N in half precision; A adds 4 N unless it stays in the L2 or has stride 0. One
exponential a state is far below that (16 a clock and SM against 8 to 13 bytes a clock and SM).

How the work is split: one program a (row, head, block of channels), a tile [BLOCK_P, BLOCK_N] with N fastest, which is
how the state lies in memory, so that a thread moves 16 bytes; everything lives in registers, there is no loop.
BLOCK_P is chosen for 2,048 to 4,096 states a program: enough bytes in flight, and enough programs for a batch of 1.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, compile_spec, index, meta, sigmoid, softplus, strides, wide
from .host_math import cdiv, next_power_of_2
from .tuning import config


@triton.jit
def codes_of(h, step):
    """h / step as int8, halves to even: 0 for NaN, and for a step of 0. `step` [BLOCK_P, 1]."""
    code = tl.where(step == 0, 0.0, h / step)
    code = tl.where(code > 127, 127.0, code)
    code = tl.where(code < -127, -127.0, code)
    code = tl.where(code == code, code, 0.0)
    # Where the sum has a unit in the last place of 1: what is added rounds, what is subtracted again is exact.
    if h.dtype == tl.float64:
        return (code + 6755399441055744.0) - 6755399441055744.0
    else:
        return (code + 12582912.0) - 12582912.0


@triton.jit
def _selective_state_update_kernel(
    out_ptr, state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, indices_ptr, scale_ptr, P,
    heads_per_group,
    stride_out_b, stride_out_h, stride_out_p, stride_state_s, stride_state_h, stride_state_p, stride_state_n,
    stride_x_b, stride_x_h, stride_x_p, stride_dt_b, stride_dt_h, stride_dt_p, stride_A_h, stride_A_p, stride_A_n,
    stride_B_b, stride_B_g, stride_B_n, stride_C_b, stride_C_g, stride_C_n, stride_D_h, stride_D_p,
    stride_z_b, stride_z_h, stride_z_p, stride_bias_h, stride_bias_p, stride_indices_b,
    stride_scale_h, stride_scale_p,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = A_ptr.dtype.element_ty
    b, h, p_block = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(1), tl.int64), tl.program_id(2)
    p = index(p_block * BLOCK_P + tl.arange(0, BLOCK_P), INT64)
    n = index(tl.arange(0, BLOCK_N), INT64)
    in_p, in_n = p < P, n < N
    in_pn = in_p[:, None] & in_n[None, :]
    out_ptr += b * stride_out_b + h * stride_out_h
    slot = b
    if indices_ptr is not None:
        slot = tl.load(indices_ptr + b * stride_indices_b).to(tl.int64)
    if slot < 0:  # padding
        tl.store(out_ptr + p * stride_out_p, tl.zeros([BLOCK_P], out_ptr.dtype.element_ty), mask=in_p)
    else:
        g = h // heads_per_group
        state_ptr += slot * stride_state_s + h * stride_state_h
        at_state = state_ptr + p[:, None] * stride_state_p + n[None, :] * stride_state_n
        state = tl.load(at_state, mask=in_pn, other=0.0).to(acc)  # [BLOCK_P, BLOCK_N]
        if scale_ptr is not None:  # an int8 state
            step = tl.load(scale_ptr + h * stride_scale_h + p * stride_scale_p, mask=in_p, other=0.0)[:, None]
            state *= step
        at_A = A_ptr + h * stride_A_h + p[:, None] * stride_A_p + n[None, :] * stride_A_n
        A = tl.load(at_A, mask=in_pn, other=0.0)  # [BLOCK_P, BLOCK_N]
        B = tl.load(B_ptr + b * stride_B_b + g * stride_B_g + n * stride_B_n, mask=in_n, other=0.0).to(acc)  # [BLOCK_N]
        C = tl.load(C_ptr + b * stride_C_b + g * stride_C_g + n * stride_C_n, mask=in_n, other=0.0).to(acc)  # [BLOCK_N]
        x = tl.load(x_ptr + b * stride_x_b + h * stride_x_h + p * stride_x_p, mask=in_p, other=0.0).to(acc)  # [BLOCK_P]
        d = tl.load(dt_ptr + b * stride_dt_b + h * stride_dt_h + p * stride_dt_p, mask=in_p, other=0.0).to(acc)
        if bias_ptr is not None:
            d += tl.load(bias_ptr + h * stride_bias_h + p * stride_bias_p, mask=in_p, other=0.0)
        if SOFTPLUS:
            d = softplus(d)
        state = tl.exp(d[:, None] * A) * state + (d * x)[:, None] * B[None, :]
        kept = state
        if scale_ptr is not None:
            kept = codes_of(state, step)
        tl.store(at_state, kept.to(state_ptr.dtype.element_ty), mask=in_pn)
        y = tl.sum(tl.where(in_n[None, :], state * C[None, :], 0.0), axis=1)  # a padded state may be NaN (0 x inf)
        if D_ptr is not None:
            y += tl.load(D_ptr + h * stride_D_h + p * stride_D_p, mask=in_p, other=0.0) * x
        if z_ptr is not None:
            z = tl.load(z_ptr + b * stride_z_b + h * stride_z_h + p * stride_z_p, mask=in_p, other=0.0).to(acc)
            y *= z * sigmoid(z)
        tl.store(out_ptr + p * stride_out_p, y.to(out_ptr.dtype.element_ty), mask=in_p)


def plan_selective_state_update(
    out, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus, state_scale=None
):  # fmt: skip
    """The launch, from shapes, strides and dtypes alone."""
    batch, heads, dim = x.shape
    states = A.shape[2]
    block_n = next_power_of_2(states)
    # A batch of 1 needs many small programs, a large one fewer and larger.
    size = 2048 if batch * heads * dim * states < 2**21 else 4096
    default = {"BLOCK_P": min(next_power_of_2(dim), max(size // block_n, 1)), "num_warps": size // 1024}
    key = f"{str(state.dtype)[6:]}-N{block_n}-H{heads}-B{next_power_of_2(batch)}"
    blocks = config("selective_state_update", key, x.device, default)
    args = dict(
        out_ptr=out, state_ptr=state, x_ptr=x, dt_ptr=dt, A_ptr=A, B_ptr=B, C_ptr=C, D_ptr=D, z_ptr=z,
        bias_ptr=dt_bias, indices_ptr=state_batch_indices, scale_ptr=state_scale, P=dim,
        heads_per_group=heads // B.shape[1],
        **strides("out", out, "bhp"), **strides("state", state, "shpn"), **strides("x", x, "bhp"),
        **strides("dt", dt, "bhp"), **strides("A", A, "hpn"), **strides("B", B, "bgn"), **strides("C", C, "bgn"),
        **strides("D", D, "hp"), **strides("z", z, "bhp"), **strides("bias", dt_bias, "hp"),
        **strides("indices", state_batch_indices, "b"), **strides("scale", state_scale, "hp"), N=states,
        SOFTPLUS=bool(dt_softplus),
        INT64=wide(out, state, x, dt, A, B, C, z), BLOCK_P=blocks["BLOCK_P"], BLOCK_N=block_n,
    )  # fmt: skip
    grid = (batch, heads, cdiv(dim, blocks["BLOCK_P"]))
    return Launch(_selective_state_update_kernel, grid, args, blocks["num_warps"])


def selective_state_update(*args):
    """fill(out, *op arguments)"""
    plan_selective_state_update(*args).run()


def quantized_state_update(
    out, state, x, dt, A, B, C, state_scale, D, z, dt_bias, state_batch_indices, dt_softplus
):  # fmt: skip
    """fill(out, *op arguments)"""
    plan_selective_state_update(
        out, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus, state_scale
    ).run()  # fmt: skip


def _spec(dtype: torch.dtype, heads: int, dim: int, states: int, slots: bool, int8: bool = False) -> Launch:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, A = meta(64, heads, dim, dtype=dtype), meta(heads, dim, states, dtype=real)
    matrix, vector = meta(64, 1, states, dtype=dtype), meta(heads, dim, dtype=real)
    state = meta(64, heads, dim, states, dtype=dtype if slots else real)
    index = meta(64, dtype=torch.int32) if slots else None
    state = meta(*state.shape, dtype=torch.int8) if int8 else state
    return plan_selective_state_update(
        x, state, x, x, A, matrix, matrix, vector, x, vector, index, True, vector if int8 else None
    )  # fmt: skip


compile_spec("selective_state_update")(lambda dtype: _spec(dtype, 1, 4096, 16, False))
compile_spec("selective_state_update_heads")(lambda dtype: _spec(dtype, 64, 64, 128, True))
compile_spec("selective_state_update_int8")(lambda dtype: _spec(dtype, 64, 64, 128, False, True))
