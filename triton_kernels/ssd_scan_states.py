"""States of ssd_scan without its outputs, forward or backward in time: what segments add, and what chunks begin with.

Shape letters: B batch, H heads, P head dim, N states, Q tokens of a chunk, K of a segment.

    forward     S' = 2^(s_Q) S + B^T (2^(s_Q - s) d x)       S: the state before a chunk
    reverse     G' = 2^(s_Q) G + C^T (2^s dY)                G: the gradient of the state after a chunk

Two uses. Totals: from zero through each segment but the one that nothing follows; what it leaves, and what remains of
the state before it (a negative number when a boundary lies in between). All: from the segments before on, each chunk's
state, or gradient, is written, for the backward (ssd_scan_bwd.py).

The account, a token and head, in half precision at P 64, N 128, Q 64: 2 P + 2 N bytes are read (those of N out of the
L2), 2 N P / Q = 256 written by the second use; 2 N P = 16,384 FLOP. HBM bounds the second, 384 bytes: 16,384 tokens of
128 heads are 0.2 ms on an H200. Never measured.

The work is split as in the forward (ssd_scan.py). For the backward 8 warps hold a state, 32 registers a thread: 128 in
all, so that two programs, 16 warps, fit a multiprocessor; 4 warps take 250.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, index, sigmoid, strides, wide
from .ssd_device import (
    broken,
    changes,
    chosen,
    common_args,
    load_tile,
    operand,
    product,
    real_of,
    segment_of,
    state_before,
    sums,
    window_of,
    windows_of,
)  # fmt: skip
from .ssd_scan_tokens import plan_tokens

__all__ = ["plan_all", "plan_totals", "steps_of", "totals_of"]


@triton.jit
def _ssd_scan_states_kernel(
    broken_ptr, saved_ptr, local_ptr, through_ptr, dinitial_ptr, steps_ptr, x_ptr, z_ptr, B_ptr, initial_ptr,
    dfinal_ptr, dvarlen_ptr, seq_ptr, cu_ptr, size, L, H, heads, S, windows, K, chunks, initials,
    stride_dinitial_b, stride_dinitial_h, stride_dinitial_p, stride_dinitial_n,
    stride_x_b, stride_x_l, stride_x_h, stride_x_p, stride_z_b, stride_z_l, stride_z_h, stride_z_p,
    stride_B_b, stride_B_l, stride_B_g, stride_B_n,
    stride_initial_b, stride_initial_h, stride_initial_p, stride_initial_n,
    stride_dfinal_b, stride_dfinal_h, stride_dfinal_p, stride_dfinal_n,
    stride_dvarlen_s, stride_dvarlen_h, stride_dvarlen_p, stride_dvarlen_n, stride_seq_b, stride_seq_l,
    N: tl.constexpr, P: tl.constexpr, REVERSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    INT64: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """REVERSE: x is dout, B is C. Without saved_ptr totals are written, else read. Grid (slots blocks of P x H,)."""
    acc: tl.constexpr = steps_ptr.dtype.element_ty
    program = tl.program_id(0)
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    slot = program // (H * blocks)
    row, sequence, window, begin, end, first, last = window_of(cu_ptr, slot, S, L, windows, K)
    if saved_ptr is None:
        if (begin == first if REVERSE else end == last) | (end < begin):
            if not REVERSE:
                tl.store(broken_ptr + program, 0)
            return
    h, g = index(program % H, INT64), index(program % H // heads, INT64)
    n, p = index(tl.arange(0, BLOCK_N), INT64), program // H % blocks * BLOCK_P + index(tl.arange(0, BLOCK_P), INT64)
    in_n, in_p = n < N, p < P
    in_np = in_n[:, None] & in_p[None, :]
    cell = n[:, None] * P + p[None, :]  # of a buffer's state
    x = (x_ptr + row * stride_x_b + h * stride_x_h, stride_x_l, stride_x_p)
    steps = (steps_ptr + (tl.cast(row, tl.int64) * H + h) * L, tl.cast(size, tl.int64))
    B = (B_ptr + row * stride_B_b + g * stride_B_g, stride_B_l, stride_B_n)
    z = (None, stride_z_l, stride_z_p)
    if z_ptr is not None:
        z = (z_ptr + row * stride_z_b + h * stride_z_h, stride_z_l, stride_z_p)
    seq = (None, stride_seq_l)
    if seq_ptr is not None:
        seq = (seq_ptr + row * stride_seq_b, stride_seq_l)

    state = tl.zeros([BLOCK_N, BLOCK_P], acc)
    if saved_ptr is not None:
        if initial_ptr is not None:
            initial_ptr += tl.cast(sequence, tl.int64) * stride_initial_b + h * stride_initial_h
            at = p[None, :] * stride_initial_p + n[:, None] * stride_initial_n
            state += tl.load(initial_ptr + at, mask=in_np & (sequence < initials), other=0.0)
        if dfinal_ptr is not None:
            dfinal_ptr += row * stride_dfinal_b + h * stride_dfinal_h
            at = p[None, :] * stride_dfinal_p + n[:, None] * stride_dfinal_n
            state += tl.load(dfinal_ptr + at, mask=in_np & (last == L) & (last > first), other=0.0).to(acc)
        if dvarlen_ptr is not None:
            dvarlen_ptr += tl.cast(sequence, tl.int64) * stride_dvarlen_s + h * stride_dvarlen_h
            at = p[None, :] * stride_dvarlen_p + n[:, None] * stride_dvarlen_n
            state += tl.load(dvarlen_ptr + at, mask=in_np, other=0.0).to(acc)
        if local_ptr is not None:
            if REVERSE:
                count = tl.maximum((last - 1) // K - window, 0)
                state = state_before(state, local_ptr, through_ptr, slot + count, count, H, h, (cell, N * P), in_np, -1)
            else:
                count = window - first // K
                state = state_before(state, local_ptr, through_ptr, slot - count, count, H, h, (cell, N * P), in_np, 1)

    all_through, cut = tl.full([], 1.0, acc), 0
    passed, past = begin // Q, tl.where(end > begin, tl.cdiv(end, Q), 0)
    for chunk in range(passed, past):
        if REVERSE:
            chunk = passed + past - 1 - chunk
        if saved_ptr is not None:
            one = tl.cast(chunk + (row * chunks if cu_ptr is None else sequence), tl.int64) * H + h
            tl.store(saved_ptr + one * (N * P) + cell, operand(state, OPERAND, PRECISION), mask=in_np)
        start, i = chunk * Q, index(tl.arange(0, Q), INT64)
        valid = (i >= begin - start) & (i < end - start)
        x_t = load_tile(x, start, i, p, valid, in_p).to(acc)  # [Q, BLOCK_P]
        B_t = operand(load_tile(B, start, i, n, valid, in_n), OPERAND, PRECISION)  # [Q, BLOCK_N]
        coarse, fine, all_coarse, all_fine = sums(steps, start, i, begin, end, Q)
        through = tl.exp2(all_coarse + all_fine)
        if REVERSE:
            x_t *= tl.exp2(coarse + fine)[:, None]
            if z_ptr is not None:
                gate = load_tile(z, start, i, p, valid, in_p).to(acc)
                x_t *= gate * sigmoid(gate)
        else:
            d = tl.load(steps[0] + start + i, mask=valid, other=0.0)
            x_t *= (tl.exp2((all_coarse - coarse) + (all_fine - fine)) * d)[:, None]
        state = product(tl.trans(B_t), operand(x_t, OPERAND, PRECISION), state * through, PRECISION)
        if saved_ptr is None:
            all_through *= through
            cut = tl.maximum(cut, tl.max(changes(seq, start + i, valid, first).to(tl.int32), axis=0))

    if saved_ptr is None:
        if not REVERSE:
            tl.store(broken_ptr + program, broken(state))
        one = tl.cast(slot, tl.int64) * H + h
        tl.store(local_ptr + one * (N * P) + cell, state, mask=in_np)
        tl.store(through_ptr + one, tl.where(cut > 0, -1.0, all_through))
    elif dinitial_ptr is not None:
        if begin == first:
            to = dinitial_ptr + tl.cast(sequence, tl.int64) * stride_dinitial_b + h * stride_dinitial_h
            to += p[None, :] * stride_dinitial_p + n[:, None] * stride_dinitial_n
            tl.store(to, state, mask=in_np & (sequence < initials) & (end >= begin))


def _plan(
    args, K, blocks, steps, totals=(), *, dout=None, saved=None, initial=None, dinitial=None, dfinal=None, dvarlen=None
):  # fmt: skip
    """The launches over the op's arguments; with dout in reverse."""
    x, B, C, z, cu_seqlens = args[0], args[3], args[4], args[6], args[10]
    reverse = dout is not None
    common, windows = common_args(*args), windows_of(x, cu_seqlens, K)
    if reverse:
        common |= dict(x_ptr=dout, B_ptr=C, **strides("x", dout, "blhp"), **strides("B", C, "blgn"))
    else:
        common |= dict(z_ptr=None, **strides("z", None, "blhp"))
    slots, (heads, width, states) = windows.pop("slots"), (*x.shape[2:], B.shape[3])
    if saved is None:
        local = x.new_empty(slots, heads, states, width, dtype=real_of(x.dtype))
        totals = dict(local_ptr=local, through_ptr=local.new_empty(slots, heads))
    else:
        totals = totals_of(totals)
    starts = next((t for t in (initial, dinitial) if t is not None), None)
    arguments = dict(
        common, **windows, **totals, **steps_of(steps), saved_ptr=saved, dinitial_ptr=dinitial, initial_ptr=initial,
        dfinal_ptr=dfinal, dvarlen_ptr=dvarlen, K=K, chunks=triton.cdiv(x.shape[1], blocks["Q"]),
        initials=0 if starts is None else starts.shape[0], **strides("dinitial", dinitial, "bhpn"),
        **strides("initial", initial, "bhpn"), **strides("dfinal", dfinal, "bhpn"),
        **strides("dvarlen", dvarlen, "shpn"), REVERSE=reverse, INT64=wide(x, args[1], B, C, z, dout),
        Q=blocks["Q"], BLOCK_P=blocks["BLOCK_P"],
    )  # fmt: skip
    programs, kernel = slots * heads * triton.cdiv(width, blocks["BLOCK_P"]), _ssd_scan_states_kernel
    arguments["broken_ptr"] = x.new_empty(programs, dtype=torch.int8)
    launch = Launch(kernel, (programs,), chosen(kernel, arguments), blocks["num_warps"], blocks.get("num_stages"))
    if saved is not None or reverse:
        return [launch]
    nothing = dict(
        out_ptr=None, C_ptr=B, z_ptr=None, **{f"stride_{name}": 0 for name in ("out_b", "out_l", "out_h", "out_p")}
    )  # fmt: skip
    return [launch, plan_tokens(arguments | nothing, programs)]


def plan_totals(args, K, blocks, steps, dout=None) -> list[Launch]:
    """The launches that write what each segment of K adds, none when there is one segment."""
    return _plan(args, K, blocks, steps, dout=dout) if K < args[0].shape[1] else []


def steps_of(steps: Launch) -> dict:
    """As arguments of a kernel that reads them."""
    return {name: steps.args[name] for name in ("steps_ptr", "size")}


def totals_of(totals: list[Launch]) -> dict:
    """As arguments of a kernel that reads them."""
    return {name: totals[0].args[name] if totals else None for name in ("local_ptr", "through_ptr")}


def plan_all(saved, args, blocks, steps, **options) -> list[Launch]:
    """The launches that write the state before each chunk, or, of `dout`, the gradient of that after it."""
    K = segment_of(args[0], blocks)
    totals = plan_totals(args, K, blocks, steps, options.get("dout"))
    return [*totals, *_plan(args, K, blocks, steps, totals, saved=saved, **options)]
