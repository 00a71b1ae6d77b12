"""Short causal depthwise convolution: forward and backward (the decoding step is in causal_conv1d_update.py).

Shape letters: B batch, D channels, L length, W filter width (2 to 8), S packed sequences.

Measured on an H200 at B8 D4096 L4096 bf16: 324 us forward, 39 % of the copy bandwidth, and 1.31 ms backward; the CUDA
kernel takes 143 and 273.

What bounds it on an H100/H200: HBM bytes, 4 an element for bf16 forward, 6 for
the backward. With L contiguous the W shifted reads of x come 2 bytes a lane out of the L1, W loads of an element
against 32 a clock and SM: about 70 % of the load unit at W = 4 and full bandwidth, so it should just not be the limit.
With D contiguous (channels-last) every read is 16 bytes a thread.

How the work is split: a program owns a tile [BLOCK_D, BLOCK_L]; after the tiles of a row come programs for what
belongs to whole sequences, the final states (forward) and the initial states' gradient (backward), so that one launch
does everything. Nothing is carried between programs; a tile's window of inputs lives in registers.

Where a token's run begins and ends is found in the kernel: by position, by binary search in cu_seqlens, or by
comparing seq_idx with its W - 1 neighbours on each side. Everything else is written once, in those terms (`_window`).

Determinism: dweight and dbias leave as one partial sum a tile, B (L / BLOCK_L) D (W + 1) floats, summed by torch.
"""

import torch
import triton
import triton.language as tl

from .causal_conv1d_update import causal_conv1d_update
from .common import Launch, compile_spec, index, meta, sigmoid, silu_slope, strides, wide
from .tuning import config

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _run_of(t, b, L, cu_ptr, seq_ptr, stride_seq_l, S, search_top, W: tl.constexpr):
    """Per token: (tokens of its run before it, after it, state row, run has an initial state, a final one, is padding).

    The counts are exact up to W - 1, which is all that the window needs. search_top: largest power of two up to S.
    """
    ones = t >= 0
    if cu_ptr is not None:
        segment = t * 0  # the last one that begins at or before t (empty ones share their begin with the next)
        step = search_top
        while step > 0:
            candidate = segment + step
            start = tl.load(cu_ptr + candidate, mask=candidate < S, other=0).to(t.dtype)
            segment = tl.where((candidate < S) & (start <= t), candidate, segment)
            step = step // 2
        begin = tl.maximum(tl.load(cu_ptr + segment).to(t.dtype), 0)
        end = tl.minimum(tl.load(cu_ptr + segment + 1).to(t.dtype), L)
        return t - begin, end - 1 - t, segment.to(tl.int64), ones, ones, t < 0
    elif seq_ptr is not None:
        name = tl.load(seq_ptr + t * stride_seq_l, mask=t < L, other=0)
        back, ahead = t * 0, t * 0
        same_back, same_ahead = ones, ones
        for k in tl.static_range(1, W):
            left = tl.load(seq_ptr + (t - k) * stride_seq_l, mask=(t - k >= 0) & (t < L), other=0)
            right = tl.load(seq_ptr + (t + k) * stride_seq_l, mask=t + k < L, other=0)
            same_back = same_back & (t - k >= 0) & (left == name)
            same_ahead = same_ahead & (t + k < L) & (right == name)
            back += same_back.to(t.dtype)
            ahead += same_ahead.to(t.dtype)
        ahead = tl.where(t < L, ahead, -W)  # a token past the end has no inputs, itself included
        return back, ahead, (t * 0).to(tl.int64) + b, back == t, t + ahead == L - 1, name < 0
    else:
        return t, L - 1 - t, (t * 0).to(tl.int64) + b, ones, ones, t < 0


@triton.jit
def _input(x_ptr, initial_ptr, t, d, k, back, ahead, segment, starts, in_d, stride_x_d, stride_x_l,
           stride_initial_b, stride_initial_d, stride_initial_w, acc: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """x[t + k] of the token's own run, before the run the initial state, else 0: [BLOCK_D, len(t)]."""
    own = (k >= -back) & (k <= ahead)
    x = tl.load(
        x_ptr + (t + k)[None, :] * stride_x_l + d[:, None] * stride_x_d, mask=in_d[:, None] & own[None, :], other=0.0
    ).to(acc)
    if initial_ptr is not None:
        early = (k < -back) & starts
        w = W - 1 + back + k  # place in the initial state
        at = segment * stride_initial_b + w * stride_initial_w
        mask = in_d[:, None] & (early & (w >= 0))[None, :]
        x += tl.load(initial_ptr + at[None, :] + d[:, None] * stride_initial_d, mask=mask, other=0.0).to(acc)
    return x


@triton.jit
def _filter(weight_ptr, bias_ptr, d, in_d, stride_weight_d, stride_weight_w, stride_bias_d, acc: tl.constexpr,
            W: tl.constexpr):  # fmt: skip
    """(the W taps, the bias), each [BLOCK_D, 1]."""
    taps = ()
    for w in tl.static_range(W):
        tap = tl.load(weight_ptr + d * stride_weight_d + w * stride_weight_w, mask=in_d, other=0.0).to(acc)
        taps = taps + (tap[:, None],)
    bias = tl.zeros(d.shape, acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d * stride_bias_d, mask=in_d, other=0.0).to(acc)
    return taps, bias[:, None]


@triton.jit
def _preactivation(window, taps, bias, s, first, W: tl.constexpr):
    """bias + sum_j weight[W - 1 - j] x[t + s - j]; window[i] holds x[t + first + i]."""
    acc_y = bias + taps[W - 1] * window[s - first]
    for j in tl.static_range(1, W):
        acc_y += taps[W - 1 - j] * window[s - j - first]
    return acc_y


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _causal_conv1d_fwd_kernel(
    out_ptr, final_ptr, x_ptr, weight_ptr, bias_ptr, seq_ptr, cu_ptr, initial_ptr, D, L, S, search_top, tiles, programs,
    stride_out_b, stride_out_d, stride_out_l, stride_final_b, stride_final_d, stride_final_w,
    stride_x_b, stride_x_d, stride_x_l, stride_weight_d, stride_weight_w, stride_bias_d, stride_seq_b, stride_seq_l,
    stride_initial_b, stride_initial_d, stride_initial_w,
    W: tl.constexpr, SILU: tl.constexpr, INT64: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = weight_ptr.dtype.element_ty
    tile, b = tl.program_id(0) % programs, tl.cast(tl.program_id(0) // programs, tl.int64)
    d = index(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    in_d = d < D
    x_ptr += b * stride_x_b
    if seq_ptr is not None:
        seq_ptr += b * stride_seq_b
    if tile < tiles:
        t = index(tile * BLOCK_L + tl.arange(0, BLOCK_L), INT64)
        back, ahead, segment, starts, ends, padding = _run_of(t, b, L, cu_ptr, seq_ptr, stride_seq_l, S, search_top, W)
        taps, bias = _filter(
            weight_ptr, bias_ptr, d, in_d, stride_weight_d, stride_weight_w, stride_bias_d, acc, W
        )  # fmt: skip
        window = ()
        for i in tl.static_range(W):
            window = window + (
                _input(
                    x_ptr, initial_ptr, t, d, i - (W - 1), back, ahead, segment, starts, in_d, stride_x_d, stride_x_l,
                    stride_initial_b, stride_initial_d, stride_initial_w, acc, W,
                ),
            )  # fmt: skip
        y = _preactivation(window, taps, bias, 0, 1 - W, W)  # [BLOCK_D, BLOCK_L]
        if SILU:
            y *= sigmoid(y)
        y = tl.where(padding[None, :], 0.0, y)
        at = b * stride_out_b + t[None, :] * stride_out_l + d[:, None] * stride_out_d
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=in_d[:, None] & (t < L)[None, :])
    else:
        _final_state(
            final_ptr, x_ptr, seq_ptr, cu_ptr, initial_ptr, d, in_d, b, tile - tiles, L, S, search_top,
            stride_final_b, stride_final_d, stride_final_w, stride_x_d, stride_x_l, stride_seq_l, stride_initial_b,
            stride_initial_d, stride_initial_w, acc, W, INT64,
        )  # fmt: skip


@triton.jit
def _final_state(
    final_ptr, x_ptr, seq_ptr, cu_ptr, initial_ptr, d, in_d, b, sequence, L, S, search_top,
    stride_final_b, stride_final_d, stride_final_w, stride_x_d, stride_x_l, stride_seq_l, stride_initial_b,
    stride_initial_d, stride_initial_w, acc: tl.constexpr, W: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of a packed sequence, or of the last run of a row."""
    one = index(tl.arange(0, 1), INT64)
    if cu_ptr is not None:
        row = tl.cast(sequence, tl.int64)
        begin = tl.minimum(tl.maximum(tl.load(cu_ptr + row), 0), L)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + row + 1), begin), L)
        # Of an empty sequence this is the token before it: all of its window is the initial state.
        t = one + (end - 1).to(one.dtype)
        back, segment, starts = t - begin.to(one.dtype), (one * 0).to(tl.int64) + row, one == 0
    else:
        row = b
        t = one + (L - 1)
        back, ahead, segment, starts, ends, padding = _run_of(t, b, L, cu_ptr, seq_ptr, stride_seq_l, S, search_top, W)
    for w in tl.static_range(W - 1):
        value = _input(
            x_ptr, initial_ptr, t, d, w - (W - 2), back, one * 0, segment, starts, in_d, stride_x_d, stride_x_l,
            stride_initial_b, stride_initial_d, stride_initial_w, acc, W,
        )  # fmt: skip
        at = row * stride_final_b + d[:, None] * stride_final_d + w * stride_final_w + (one * 0)[None, :]
        tl.store(final_ptr + at, value.to(final_ptr.dtype.element_ty), mask=in_d[:, None])


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _dpre(dout_ptr, window, taps, bias, t, d, s, first, ahead, padding, in_d, L, stride_dout_d, stride_dout_l,
          SILU: tl.constexpr, acc: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Gradient of the preactivation of token t + s, zero where that is not of token t's run: [BLOCK_D, len(t)]."""
    mask = in_d[:, None] & ((s <= ahead) & (t + s < L) & (padding == 0))[None, :]
    at = (t + s)[None, :] * stride_dout_l + d[:, None] * stride_dout_d
    dpre = tl.load(dout_ptr + at, mask=mask, other=0.0).to(acc)
    if SILU:
        pre = _preactivation(window, taps, bias, s, first, W)
        dpre = tl.where(mask, dpre * silu_slope(pre, sigmoid(pre)), 0.0)
    return dpre


@triton.jit
def _causal_conv1d_bwd_kernel(
    dx_ptr, dfilter_ptr, dinitial_ptr, dout_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, seq_ptr, cu_ptr, initial_ptr,
    D, L, S, search_top, tiles, programs,
    stride_dx_b, stride_dx_d, stride_dx_l, stride_dinitial_b, stride_dinitial_d, stride_dinitial_w,
    stride_dout_b, stride_dout_d, stride_dout_l, stride_dfinal_b, stride_dfinal_d, stride_dfinal_w,
    stride_x_b, stride_x_d, stride_x_l, stride_weight_d, stride_weight_w, stride_bias_d, stride_seq_b, stride_seq_l,
    stride_initial_b, stride_initial_d, stride_initial_w,
    W: tl.constexpr, SILU: tl.constexpr, INT64: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = weight_ptr.dtype.element_ty
    tile, b = tl.program_id(0) % programs, tl.cast(tl.program_id(0) // programs, tl.int64)
    d = index(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), INT64)
    in_d = d < D
    x_ptr += b * stride_x_b
    dout_ptr += b * stride_dout_b
    if seq_ptr is not None:
        seq_ptr += b * stride_seq_b
    taps, bias = _filter(weight_ptr, bias_ptr, d, in_d, stride_weight_d, stride_weight_w, stride_bias_d, acc, W)
    if tile < tiles:
        t = index(tile * BLOCK_L + tl.arange(0, BLOCK_L), INT64)
        back, ahead, segment, starts, ends, padding = _run_of(t, b, L, cu_ptr, seq_ptr, stride_seq_l, S, search_top, W)
        window = ()  # x[t - (W - 1)] ... x[t + W - 1]; without silu only the past is needed
        for i in tl.static_range(2 * W - 1 if SILU else W):
            window = window + (
                _input(
                    x_ptr, initial_ptr, t, d, i - (W - 1), back, ahead, segment, starts, in_d, stride_x_d, stride_x_l,
                    stride_initial_b, stride_initial_d, stride_initial_w, acc, W,
                ),
            )  # fmt: skip
        dx = tl.zeros([BLOCK_D, BLOCK_L], acc)
        at_filter = tl.cast(tile + tiles * b, tl.int64) * D * (W + 1) + d * (W + 1)
        for s in tl.static_range(W):
            dpre = _dpre(
                dout_ptr, window, taps, bias, t, d, s, 1 - W, ahead, padding, in_d, L, stride_dout_d, stride_dout_l,
                SILU, acc, W,
            )  # fmt: skip
            dx += taps[W - 1 - s] * dpre
            if s == 0:
                for w in tl.static_range(W):
                    # dpre is 0 in padding, but what lies there may be NaN
                    product = tl.where((padding == 0)[None, :], dpre * window[w], 0.0)
                    tl.store(dfilter_ptr + at_filter + w, tl.sum(product, axis=1), mask=in_d)
                tl.store(dfilter_ptr + at_filter + W, tl.sum(dpre, axis=1), mask=in_d)
            if dfinal_ptr is not None and s < W - 1:
                # The run's last W - 1 tokens are also its final state.
                last = (ahead == s) & ends & (t < L)
                at = segment[None, :] * stride_dfinal_b + d[:, None] * stride_dfinal_d + (W - 2 - s) * stride_dfinal_w
                dx += tl.load(dfinal_ptr + at, mask=in_d[:, None] & last[None, :], other=0.0).to(acc)
        at = b * stride_dx_b + t[None, :] * stride_dx_l + d[:, None] * stride_dx_d
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=in_d[:, None] & (t < L)[None, :])
    else:
        if dinitial_ptr is not None:
            _dinitial(
                dinitial_ptr, dout_ptr, dfinal_ptr, x_ptr, seq_ptr, cu_ptr, initial_ptr, taps, bias, d, in_d, b,
                tile - tiles, L, S, search_top, stride_dinitial_b, stride_dinitial_d, stride_dinitial_w,
                stride_dout_d, stride_dout_l, stride_dfinal_b, stride_dfinal_d, stride_dfinal_w, stride_x_d, stride_x_l,
                stride_seq_l, stride_initial_b, stride_initial_d, stride_initial_w, SILU, acc, W, INT64,
            )  # fmt: skip


@triton.jit
def _dinitial(
    dinitial_ptr, dout_ptr, dfinal_ptr, x_ptr, seq_ptr, cu_ptr, initial_ptr, taps, bias, d, in_d, b,
    sequence, L, S, search_top, stride_dinitial_b, stride_dinitial_d, stride_dinitial_w,
    stride_dout_d, stride_dout_l, stride_dfinal_b, stride_dfinal_d, stride_dfinal_w, stride_x_d, stride_x_l,
    stride_seq_l, stride_initial_b, stride_initial_d, stride_initial_w,
    SILU: tl.constexpr, acc: tl.constexpr, W: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Gradient of the initial state of a packed sequence, or of the first run of a row.

    dinitial[w] = sum_i weight[w - i] dpre[begin + i], and, in a run shorter than W - 1, the part of the initial state
    that is still in the final one.
    """
    one = index(tl.arange(0, 1), INT64)
    if cu_ptr is not None:
        row = tl.cast(sequence, tl.int64)
        begin = tl.minimum(tl.maximum(tl.load(cu_ptr + row), 0), L)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + row + 1), begin), L)
        t = one + begin.to(one.dtype)
        ahead, ends, padding = one * 0 + (end - begin - 1).to(one.dtype), one == 0, one < 0
    else:
        row = b
        t = one
        back, ahead, segment, starts, ends, padding = _run_of(t, b, L, cu_ptr, seq_ptr, stride_seq_l, S, search_top, W)
    segment = (one * 0).to(tl.int64) + row
    window = ()  # x[begin - (W - 1)] ... x[begin + W - 2]
    for i in tl.static_range(2 * W - 2):
        window = window + (
            _input(
                x_ptr, initial_ptr, t, d, i - (W - 1), one * 0, ahead, segment, one == 0, in_d, stride_x_d, stride_x_l,
                stride_initial_b, stride_initial_d, stride_initial_w, acc, W,
            ),
        )  # fmt: skip
    steps = ()
    for s in tl.static_range(W - 1):
        steps = steps + (
            _dpre(
                dout_ptr, window, taps, bias, t, d, s, 1 - W, ahead, padding, in_d, L, stride_dout_d, stride_dout_l,
                SILU, acc, W,
            ),
        )  # fmt: skip
    for w in tl.static_range(W - 1):
        gradient = taps[w] * steps[0]
        for i in tl.static_range(1, w + 1):
            gradient += taps[w - i] * steps[i]
        if dfinal_ptr is not None:
            kept = w - 1 - ahead  # its place in the final state
            at = segment * stride_dfinal_b + kept * stride_dfinal_w
            mask = in_d[:, None] & ((kept >= 0) & ends)[None, :]
            gradient += tl.load(dfinal_ptr + at[None, :] + d[:, None] * stride_dfinal_d, mask=mask, other=0.0).to(acc)
        at = row * stride_dinitial_b + d[:, None] * stride_dinitial_d + w * stride_dinitial_w + (one * 0)[None, :]
        tl.store(dinitial_ptr + at, gradient.to(dinitial_ptr.dtype.element_ty), mask=in_d[:, None])


# --- launchers ------------------------------------------------------------------------------------------------------


def _blocks(kernel: str, x: torch.Tensor, width: int) -> dict:
    along_time = x.stride(2) == 1 and x.shape[2] > 1
    default = {"BLOCK_D": 4 if along_time else 32, "BLOCK_L": 256 if along_time else 32, "num_warps": 4}
    default["BLOCK_D"] = min(default["BLOCK_D"], triton.next_power_of_2(x.shape[1]))
    default["BLOCK_L"] = min(default["BLOCK_L"], triton.next_power_of_2(x.shape[2]))
    return config(kernel, f"{str(x.dtype)[6:]}-W{width}-{'l' if along_time else 'd'}", x.device, default)


def _runs(x, seq_idx, cu_seqlens, blocks, per_sequence: bool) -> dict:
    """Arguments about sequences; `programs` counts a row's tiles and, if asked for, its sequences."""
    tiles = triton.cdiv(x.shape[2], blocks["BLOCK_L"])
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return dict(
        cu_ptr=cu_seqlens, seq_ptr=seq_idx, S=sequences, search_top=1 << max(sequences.bit_length() - 1, 0),
        D=x.shape[1], L=x.shape[2], tiles=tiles, programs=tiles + (sequences if per_sequence else 0),
        **strides("seq", seq_idx, "bl"),
    )  # fmt: skip


def plan_causal_conv1d_fwd(
    out, final_states, x, weight, bias, seq_idx, cu_seqlens, initial_states, silu
):  # fmt: skip
    """The launch, from shapes, strides and dtypes alone."""
    width = weight.shape[1]
    blocks = _blocks("causal_conv1d_fwd", x, width)
    args = dict(
        out_ptr=out, final_ptr=final_states, x_ptr=x, weight_ptr=weight, bias_ptr=bias, initial_ptr=initial_states,
        **_runs(x, seq_idx, cu_seqlens, blocks, True), **strides("out", out, "bdl"),
        **strides("final", final_states, "bdw"), **strides("x", x, "bdl"), **strides("weight", weight, "dw"),
        **strides("bias", bias, "d"), **strides("initial", initial_states, "bdw"), W=width, SILU=bool(silu),
        INT64=wide(out, x, initial_states), BLOCK_D=blocks["BLOCK_D"], BLOCK_L=blocks["BLOCK_L"],
    )  # fmt: skip
    grid = (args["programs"] * x.shape[0], triton.cdiv(x.shape[1], blocks["BLOCK_D"]))
    return Launch(_causal_conv1d_fwd_kernel, grid, args, blocks["num_warps"])


def causal_conv1d_fwd(*args):
    """fill(out, final_states, *op arguments)"""
    plan_causal_conv1d_fwd(*args).run()


def plan_causal_conv1d_bwd(
    dx, dfilter, dinitial, dout, dfinal_states, x, weight, bias, seq_idx, cu_seqlens, initial_states, silu, *, blocks
):  # fmt: skip
    """The launch. dfilter: partial sums (tiles of all rows, D, W + 1), dweight then dbias."""
    width = weight.shape[1]
    dinitial = None if initial_states is None else dinitial
    args = dict(
        dx_ptr=dx, dfilter_ptr=dfilter, dinitial_ptr=dinitial, dout_ptr=dout, dfinal_ptr=dfinal_states, x_ptr=x,
        weight_ptr=weight, bias_ptr=bias, initial_ptr=initial_states,
        **_runs(x, seq_idx, cu_seqlens, blocks, initial_states is not None), **strides("dx", dx, "bdl"),
        **strides("dinitial", dinitial, "bdw"), **strides("dout", dout, "bdl"),
        **strides("dfinal", dfinal_states, "bdw"), **strides("x", x, "bdl"), **strides("weight", weight, "dw"),
        **strides("bias", bias, "d"), **strides("initial", initial_states, "bdw"), W=width, SILU=bool(silu),
        INT64=wide(dx, dout, x, initial_states), BLOCK_D=blocks["BLOCK_D"], BLOCK_L=blocks["BLOCK_L"],
    )  # fmt: skip
    grid = (args["programs"] * x.shape[0], triton.cdiv(x.shape[1], blocks["BLOCK_D"]))
    return Launch(_causal_conv1d_bwd_kernel, grid, args, blocks["num_warps"])


def causal_conv1d_bwd(dx, dweight, dbias, dinitial, *args):
    """fill(dx, dweight, dbias, dinitial_states, *op arguments)"""
    x, weight, bias = args[2:5]
    width = weight.shape[1]
    blocks = _blocks("causal_conv1d_bwd", x, width)
    tiles = x.shape[0] * triton.cdiv(x.shape[2], blocks["BLOCK_L"])
    dfilter = weight.new_empty(tiles, x.shape[1], width + 1)
    plan_causal_conv1d_bwd(dx, dfilter, dinitial, *args, blocks=blocks).run()
    dfilter = dfilter.sum(0)
    dweight.copy_(dfilter[:, :width])
    if bias is not None:
        dbias.copy_(dfilter[:, width])


def _spec(kind: str, options: str, dtype: torch.dtype) -> Launch:
    """A typical launch; "d" channels-last, "packed", "runs" seq_idx and 64-bit offsets, "plain" no bias, no silu."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    B, D, L, W = (1, 4096, 2**20, 4) if options == "runs" else (1 if options == "packed" else 8, 4096, 4096, 4)
    x = meta(B, L, D, dtype=dtype).transpose(1, 2) if options == "d" else meta(B, D, L, dtype=dtype)
    cu = meta(65, dtype=torch.int32) if options == "packed" else None
    runs = meta(B, L, dtype=torch.int64) if options == "runs" else None
    states = meta(B if cu is None else 64, D, W - 1, dtype=dtype)
    initial = states if cu is not None or runs is not None else None
    bias = None if options == "plain" else meta(D, dtype=real)
    call = (x, meta(D, W, dtype=real), bias, runs, cu, initial, options != "plain")
    if kind == "fwd":
        return plan_causal_conv1d_fwd(x, states, *call)
    blocks = _blocks("causal_conv1d_bwd", x, W)
    dfilter = meta(B * triton.cdiv(L, blocks["BLOCK_L"]), D, W + 1, dtype=real)
    return plan_causal_conv1d_bwd(x, dfilter, initial, x, initial, *call, blocks=blocks)


for _kind in ("fwd", "bwd"):
    for _options in ("", "d", "packed", "runs", "plain"):
        _name = f"causal_conv1d_{_kind}" + (f"_{_options}" if _options else "")
        compile_spec(_name)(lambda dtype, kind=_kind, options=_options: _spec(kind, options, dtype))
