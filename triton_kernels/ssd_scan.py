"""Mamba-2's scan in one walk over the chunks, the state in registers: the forward kernel and its launcher.

Shape letters: B batch, L length, H heads, P head dim, G groups, N states, S packed sequences, Q tokens of a chunk, K of
a segment. With s the running sum of log2 of the decays in a chunk, M_ij = 2^(s_i - s_j) for i >= j and d the steps:

    Y = 2^s (C S) + (M o C B^T o d) x          S' = 2^(s_Q) S + B^T (2^(s_Q - s) d x)          S [N, P]

The account, a token and head, in half precision at P 64, N 128, G 1, H 128, Q 64:

    HBM, at least      4 P + 2 + 4 N G / H  = 262 bytes: x, out, dt, B and C
    states in memory   12 N P / Q (Q 256: 384 bytes) for five kernels; here 0, or 2 P + 8 N P / K where segments are cut
    L2 to registers    4 P + 4 N            = 768 bytes: every head reads B and C again
    FLOP               2 Q N + 2 Q P + 4 N P = 57,344: C B^T again for each head (16,384; storing it would be 2 Q bytes)
    other              Q exponentials, 8 Q fused operations for M o C B^T, 2 N P / Q for the state's decay and rounding

On an H200 (4.1 TB/s of HBM reached, 5.5 TB/s of L2, 989 TFLOP/s): 16,384 tokens x 128 heads are 0.13 ms of HBM, 0.29 ms
of L2, 0.12 ms of products at their peak and 0.25 at half of it, 0.1 ms of exponentials and 0.2 ms of the rest, in other
pipes. Never measured; 0.3 to 0.4 ms expected, 40 to 55 M tokens a second.

Q 64 for these: at Q 128 the products are 81,920 FLOP and M takes all registers; at Q 32 there are 20 products of 32
rows, which wgmma, whose tile has 64, cannot take.

How the work is split: a program has a head (64 channels of it) and walks the chunks of a segment of K tokens. One
segment moves each byte once, but 128 programs are one a multiprocessor, in which nothing covers a product's latency,
and 24 leave most idle. So L is cut into as many segments as give 264 programs. Then a first kernel (ssd_scan_states.py)
walks all but the last segment without C and out, for 2 P + 2 N bytes and 2 N P of the FLOP a token, and every program
begins by joining the states of the segments before its own: no kernel for that, and no state a chunk in memory.

What stays in registers: the state, 64 a thread (128 x 64 float32 over 4 warps), M o C B^T and Y, 32 each. Tried in the
compiler (sm_90): softplus and sums in this kernel were repeated for each column of M (ssd_scan_steps.py has them), the
token by token form as a branch of it took 824 bytes of stack; 224 are left.

NaN and Inf: a product reads 0 x NaN of later tokens. A state that holds NaN keeps it, so that one look at the last
state tells whether any came up; ssd_scan_tokens.py then goes the same way token by token.
Determinism: every sum has a fixed order; K depends on the shapes alone. Offsets are 64-bit where they need be.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, compile_spec, index, strides, wide
from .ssd_device import (
    between,
    broken,
    common_args,
    chosen,
    default_blocks,
    load_skip,
    load_tile,
    operand,
    product,
    sample,
    segment_of,
    state_before,
    store_out,
    sums,
    tuning_key,
    window_of,
    windows_of,
)  # fmt: skip
from .ssd_scan_states import plan_totals, steps_of, totals_of
from .ssd_scan_steps import plan_steps
from .ssd_scan_tokens import plan_tokens
from .tuning import config

__all__ = ["ssd_scan_fwd"]


@triton.jit
def _ssd_scan_fwd_kernel(
    broken_ptr, out_ptr, final_ptr, varlen_ptr, local_ptr, through_ptr, steps_ptr, x_ptr, B_ptr, C_ptr, D_ptr, z_ptr,
    initial_ptr, cu_ptr, size, L, H, heads, S, windows, K, initials,
    stride_out_b, stride_out_l, stride_out_h, stride_out_p,
    stride_x_b, stride_x_l, stride_x_h, stride_x_p,
    stride_B_b, stride_B_l, stride_B_g, stride_B_n,
    stride_C_b, stride_C_l, stride_C_g, stride_C_n, stride_D_h, stride_D_p,
    stride_z_b, stride_z_l, stride_z_h, stride_z_p,
    stride_initial_b, stride_initial_h, stride_initial_p, stride_initial_n,
    N: tl.constexpr, P: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """heads: of a group. initials: how many sequences have an initial state. Grid (slots blocks of P x H,)."""
    acc: tl.constexpr = steps_ptr.dtype.element_ty
    program = tl.program_id(0)
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    slot = program // (H * blocks)
    row, sequence, window, begin, end, first, last = window_of(cu_ptr, slot, S, L, windows, K)
    h, g = index(program % H, INT64), index(program % H // heads, INT64)
    n, p = index(tl.arange(0, BLOCK_N), INT64), program // H % blocks * BLOCK_P + index(tl.arange(0, BLOCK_P), INT64)
    in_n, in_p = n < N, p < P
    in_np = in_n[:, None] & in_p[None, :]
    x = (x_ptr + row * stride_x_b + h * stride_x_h, stride_x_l, stride_x_p)
    steps = (steps_ptr + (tl.cast(row, tl.int64) * H + h) * L, tl.cast(size, tl.int64))
    B = (B_ptr + row * stride_B_b + g * stride_B_g, stride_B_l, stride_B_n)
    C = (C_ptr + row * stride_C_b + g * stride_C_g, stride_C_l, stride_C_n)
    out = (out_ptr + row * stride_out_b + h * stride_out_h, stride_out_l, stride_out_p)
    z = (None, stride_z_l, stride_z_p)
    if z_ptr is not None:
        z = (z_ptr + row * stride_z_b + h * stride_z_h, stride_z_l, stride_z_p)
    skip = load_skip(D_ptr, stride_D_h, stride_D_p, h, p, in_p, acc)
    i = index(tl.arange(0, Q), INT64)
    seen = i[:, None] >= i[None, :]

    state = tl.zeros([BLOCK_N, BLOCK_P], acc)
    if initial_ptr is not None:
        initial_ptr += tl.cast(sequence, tl.int64) * stride_initial_b + h * stride_initial_h
        at = p[None, :] * stride_initial_p + n[:, None] * stride_initial_n
        state = tl.load(initial_ptr + at, mask=in_np & (sequence < initials), other=0.0)  # [BLOCK_N, BLOCK_P]
    if local_ptr is not None:
        before = window - first // K
        cell = (n[:, None] * P + p[None, :], N * P)
        state = state_before(state, local_ptr, through_ptr, slot - before, before, H, h, cell, in_np, 1)

    for chunk in range(begin // Q, tl.where(end > begin, tl.cdiv(end, Q), 0)):
        start = chunk * Q
        valid = (i >= begin - start) & (i < end - start)
        x_t = load_tile(x, start, i, p, valid, in_p)  # [Q, BLOCK_P]
        B_t = operand(load_tile(B, start, i, n, valid, in_n), OPERAND, PRECISION)  # [Q, BLOCK_N]
        C_t = operand(load_tile(C, start, i, n, valid, in_n), OPERAND, PRECISION)  # [Q, BLOCK_N]
        d = tl.load(steps[0] + start + i, mask=valid, other=0.0)
        coarse, fine, all_coarse, all_fine = sums(steps, start, i, begin, end, Q)
        scores = product(C_t, tl.trans(B_t), tl.zeros([Q, Q], acc), PRECISION)
        pairs = tl.where(seen, scores * between(coarse, fine, seen, 0) * d[None, :], 0.0)  # [Q, Q]
        y = product(C_t, operand(state, OPERAND, PRECISION), tl.zeros([Q, BLOCK_P], acc), PRECISION)
        y *= tl.exp2(coarse + fine)[:, None]
        y = product(operand(pairs, OPERAND, PRECISION), operand(x_t, OPERAND, PRECISION), y, PRECISION)
        to_end = tl.exp2((all_coarse - coarse) + (all_fine - fine))
        added = operand(x_t.to(acc) * (to_end * d)[:, None], OPERAND, PRECISION)
        state = product(tl.trans(B_t), added, state * tl.exp2(all_coarse + all_fine), PRECISION)
        store_out(out, y, x_t.to(acc), z, skip, start, i, p, valid, in_p)

    tl.store(broken_ptr + program, broken(state))
    if end == last:
        in_state = p[None, :] * N + n[:, None]  # ours has no gaps
        if cu_ptr is not None:
            one = tl.cast(sequence, tl.int64) * H + h
            tl.store(varlen_ptr + one * (P * N) + in_state, state, mask=in_np)
        if (last == L) & (last > first):
            one = tl.cast(row, tl.int64) * H + h
            tl.store(final_ptr + one * (P * N) + in_state, state, mask=in_np)


def plan_ssd_scan_fwd(out, final, varlen, *args) -> list[Launch]:
    """The launches, in order, from shapes, strides and dtypes alone."""
    x, B, initial, cu_seqlens = args[0], args[3], args[8], args[10]
    states = B.shape[3]
    blocks = config("ssd_scan_fwd", tuning_key(x, states), x.device, default_blocks(x, states))
    K = segment_of(x, blocks)
    windows = windows_of(x, cu_seqlens, K)
    steps = plan_steps(args, blocks["Q"])
    totals = plan_totals(args, K, blocks, steps)
    programs = windows.pop("slots") * x.shape[2] * triton.cdiv(x.shape[3], blocks["BLOCK_P"])
    packed = None if cu_seqlens is None else varlen
    arguments = dict(
        broken_ptr=x.new_empty(programs, dtype=torch.int8), **common_args(*args), **totals_of(totals),
        **steps_of(steps), out_ptr=out, final_ptr=final, varlen_ptr=packed,
        initial_ptr=initial, initials=0 if initial is None else initial.shape[0], **windows, K=K,
        **strides("out", out, "blhp"), **strides("initial", initial, "bhpn"),
        INT64=wide(out, x, B, args[4], args[6]), Q=blocks["Q"], BLOCK_P=blocks["BLOCK_P"],
    )  # fmt: skip
    kernel = _ssd_scan_fwd_kernel
    launch = Launch(kernel, (programs,), chosen(kernel, arguments), blocks["num_warps"], blocks.get("num_stages"))
    return [steps, *totals, launch, plan_tokens(arguments, programs)]


def ssd_scan_fwd(out, final_states, varlen_states, *args) -> None:
    """fill(out, final_states, varlen_states, *op arguments)"""
    for launch in plan_ssd_scan_fwd(out, final_states, varlen_states, *args):
        launch.run()


def _spec(dtype: torch.dtype, options: str) -> Launch:
    args, outputs = sample(dtype, options)
    return plan_ssd_scan_fwd(*outputs, *args)[-2]


compile_spec("ssd_scan_fwd")(lambda dtype: _spec(dtype, ""))
