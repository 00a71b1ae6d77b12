"""Short causal depthwise convolution: the decoding step, in place on the buffer of past inputs.

Shape letters: S slots, B batch, D channels, W filter width (2 to 8), T new tokens, K tokens that a slot holds.

Measured on an H200 at B256 D8192 bf16: 22 us, 36 % of the copy bandwidth; the CUDA kernel takes 13.5.

What bounds it on an H100/H200: HBM bytes, K + 2 numbers a channel at T = 1 (the
buffer read and written, x, out); at the sizes of decoding rather the launch itself.

How the work is split: one program a (row, block of channels). It reads all that it needs of the buffer, passes a
barrier, then writes: in the window form every token moves to another place, which another thread may still want.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, compile_spec, index, meta, sigmoid, strides, wide
from .tuning import config


@triton.jit
def _window(x_ptr, state_ptr, position, d, mask, K, shift, stride_x_d, stride_x_t, stride_state_d, stride_state_k,
            acc: tl.constexpr):  # fmt: skip
    """Token `position` of the buffer (oldest first, turned by `shift`) followed by x: [BLOCK_D, len(position)]."""
    held = position < K
    place = position + shift
    place = tl.where(place >= K, place - K, place)
    old = tl.load(
        state_ptr + d[:, None] * stride_state_d + place[None, :] * stride_state_k, mask=mask & held[None, :], other=0.0
    ).to(acc)
    new = tl.load(
        x_ptr + d[:, None] * stride_x_d + (position - K)[None, :] * stride_x_t, mask=mask & (position >= K)[None, :],
        other=0.0,
    ).to(acc)  # fmt: skip
    return old + new


@triton.jit
def _causal_conv1d_update_kernel(
    out_ptr, state_ptr, x_ptr, weight_ptr, bias_ptr, seqlens_ptr, indices_ptr, D, T, K,
    stride_out_b, stride_out_d, stride_out_t, stride_state_s, stride_state_d, stride_state_k,
    stride_x_b, stride_x_d, stride_x_t, stride_weight_d, stride_weight_w, stride_bias_d, stride_seqlens_b,
    stride_indices_b,
    W: tl.constexpr, SILU: tl.constexpr, INT64: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = weight_ptr.dtype.element_ty
    b = tl.cast(tl.program_id(0), tl.int64)
    d = index(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    in_d = d < D
    out_ptr += b * stride_out_b
    x_ptr += b * stride_x_b
    slot = b
    if indices_ptr is not None:
        slot = tl.load(indices_ptr + b * stride_indices_b).to(tl.int64)
    padding = slot < 0
    state_ptr += tl.maximum(slot, 0) * stride_state_s
    shift = 0
    if seqlens_ptr is not None:
        shift = (tl.load(seqlens_ptr + b * stride_seqlens_b) % K).to(tl.int32)
    live = in_d[:, None] & (slot >= 0)

    for t0 in range(0, T, BLOCK_T):
        t = index(t0 + tl.arange(0, BLOCK_T), INT64)
        mask = live & (t < T)[None, :]
        y = tl.zeros([BLOCK_D, BLOCK_T], acc)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + d * stride_bias_d, mask=in_d, other=0.0).to(acc)[:, None]
        for w in tl.static_range(W):
            tap = tl.load(weight_ptr + d * stride_weight_d + w * stride_weight_w, mask=in_d, other=0.0).to(acc)
            y += tap[:, None] * _window(
                x_ptr, state_ptr, K + t - (W - 1 - w), d, mask, K, shift, stride_x_d, stride_x_t, stride_state_d,
                stride_state_k, acc,
            )  # fmt: skip
        if SILU:
            y *= sigmoid(y)
        y = tl.where(padding, 0.0, y)
        at = d[:, None] * stride_out_d + t[None, :] * stride_out_t
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=in_d[:, None] & (t < T)[None, :])

    # Token T + k of the window becomes token k. In the circular form what stays keeps its place and is not written.
    k = index(tl.arange(0, BLOCK_K), INT64)
    mask = live & (k < K)[None, :]
    if seqlens_ptr is not None:
        mask = mask & (T + k >= K)[None, :]
    kept = _window(
        x_ptr, state_ptr, T + k, d, mask, K, shift, stride_x_d, stride_x_t, stride_state_d, stride_state_k, acc
    )
    place = k
    if seqlens_ptr is not None:
        place = (k + shift + T) % K
    tl.debug_barrier()
    at = d[:, None] * stride_state_d + place[None, :] * stride_state_k
    tl.store(state_ptr + at, kept.to(state_ptr.dtype.element_ty), mask=mask)


def plan_causal_conv1d_update(
    out, conv_state, x, weight, bias, cache_seqlens, conv_state_indices, silu
):  # fmt: skip
    """The launch, from shapes, strides and dtypes alone."""
    (batch, channels, steps), width, held = x.shape, weight.shape[1], conv_state.shape[2]
    block_k = triton.next_power_of_2(held)
    block_d = min(triton.next_power_of_2(channels), max(512 // block_k, 1))
    default = {"BLOCK_D": block_d, "BLOCK_T": min(triton.next_power_of_2(steps), 16), "num_warps": 2}
    key = f"{str(x.dtype)[6:]}-W{width}-K{block_k}-T{default['BLOCK_T']}"
    blocks = config("causal_conv1d_update", key, x.device, default)
    args = dict(
        out_ptr=out, state_ptr=conv_state, x_ptr=x, weight_ptr=weight, bias_ptr=bias, seqlens_ptr=cache_seqlens,
        indices_ptr=conv_state_indices, D=channels, T=steps, K=held, **strides("out", out, "bdt"),
        **strides("state", conv_state, "sdk"), **strides("x", x, "bdt"), **strides("weight", weight, "dw"),
        **strides("bias", bias, "d"), **strides("seqlens", cache_seqlens, "b"),
        **strides("indices", conv_state_indices, "b"), W=width, SILU=bool(silu), INT64=wide(out, x, conv_state),
        BLOCK_D=blocks["BLOCK_D"], BLOCK_T=blocks["BLOCK_T"], BLOCK_K=block_k,
    )  # fmt: skip
    grid = (batch, triton.cdiv(channels, blocks["BLOCK_D"]))
    return Launch(_causal_conv1d_update_kernel, grid, args, blocks["num_warps"])


def causal_conv1d_update(*args):
    """fill(out, *op arguments)"""
    plan_causal_conv1d_update(*args).run()


def _spec(dtype: torch.dtype, circular: bool) -> Launch:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, state, weight = meta(64, 4096, 1, dtype=dtype), meta(64, 4096, 4, dtype=dtype), meta(4096, 4, dtype=real)
    slots = meta(64, dtype=torch.int64) if circular else None
    return plan_causal_conv1d_update(x, state, x, weight, meta(4096, dtype=real), slots, slots, True)


compile_spec("causal_conv1d_update")(lambda dtype: _spec(dtype, False))
compile_spec("causal_conv1d_update_circular")(lambda dtype: _spec(dtype, True))
