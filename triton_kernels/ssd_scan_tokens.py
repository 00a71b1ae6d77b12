"""ssd_scan token by token, where NaN or Inf came up: for the programs of another kernel that found some.

Shape letters: H heads, P head dim, N states.

A product over a chunk reads 0 x NaN of tokens that come later; the recurrence as it is written does not. A launch
follows every one of ssd_scan.py and of the totals of ssd_scan_states.py, since only the device knows; its programs read
one byte and return. Where there is NaN it takes about a microsecond a token, which nobody waits for twice.
"""

import triton
import triton.language as tl

from .common import Launch, index
from .ssd_device import (
    changes,
    chosen,
    exponents,
    limited,
    load_head,
    load_skip,
    load_tile,
    state_before,
    store_out,
    window_of,
)  # fmt: skip

__all__ = ["plan_tokens"]


@triton.jit
def _ssd_scan_tokens_kernel(
    broken_ptr, out_ptr, final_ptr, varlen_ptr, local_ptr, through_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr,
    z_ptr, bias_ptr, initial_ptr, seq_ptr, cu_ptr, L, H, heads, S, windows, K, initials,
    stride_out_b, stride_out_l, stride_out_h, stride_out_p, stride_x_b, stride_x_l, stride_x_h, stride_x_p,
    stride_dt_b, stride_dt_l, stride_dt_h, stride_A_h, stride_B_b, stride_B_l, stride_B_g, stride_B_n,
    stride_C_b, stride_C_l, stride_C_g, stride_C_n, stride_D_h, stride_D_p,
    stride_z_b, stride_z_l, stride_z_h, stride_z_p, stride_bias_h,
    stride_initial_b, stride_initial_h, stride_initial_p, stride_initial_n, stride_seq_b, stride_seq_l,
    N: tl.constexpr, P: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    INT64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Without out_ptr: what a segment adds, to local_ptr. Arguments and grid are those of the kernel before."""
    program = tl.program_id(0)
    if tl.load(broken_ptr + program) == 0:
        return
    acc: tl.constexpr = A_ptr.dtype.element_ty
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    slot = program // (H * blocks)
    row, sequence, window, begin, end, first, last = window_of(cu_ptr, slot, S, L, windows, K)
    h, g = index(program % H, INT64), index(program % H // heads, INT64)
    n, p = index(tl.arange(0, BLOCK_N), INT64), program // H % blocks * BLOCK_P + index(tl.arange(0, BLOCK_P), INT64)
    in_n, in_p, one = n < N, p < P, tl.arange(0, 1)
    in_np, cell = in_n[:, None] & in_p[None, :], n[:, None] * P + p[None, :]
    x = (x_ptr + row * stride_x_b + h * stride_x_h, stride_x_l, stride_x_p)
    dt = dt_ptr + row * stride_dt_b + h * stride_dt_h
    B = (B_ptr + row * stride_B_b + g * stride_B_g, stride_B_l, stride_B_n)
    C = (C_ptr + row * stride_C_b + g * stride_C_g, stride_C_l, stride_C_n)
    z, seq = (None, stride_z_l, stride_z_p), (None, stride_seq_l)
    if z_ptr is not None:
        z = (z_ptr + row * stride_z_b + h * stride_z_h, stride_z_l, stride_z_p)
    if seq_ptr is not None:
        seq = (seq_ptr + row * stride_seq_b, stride_seq_l)
    A, bias = load_head(A_ptr, stride_A_h, h, acc), load_head(bias_ptr, stride_bias_h, h, acc)
    skip = load_skip(D_ptr, stride_D_h, stride_D_p, h, p, in_p, acc)

    state = tl.zeros([BLOCK_N, BLOCK_P], acc)
    if out_ptr is not None:
        if initial_ptr is not None:
            initial_ptr += tl.cast(sequence, tl.int64) * stride_initial_b + h * stride_initial_h
            at = p[None, :] * stride_initial_p + n[:, None] * stride_initial_n
            state = tl.load(initial_ptr + at, mask=in_np & (sequence < initials), other=0.0)  # [BLOCK_N, BLOCK_P]
        if local_ptr is not None:
            before = window - first // K
            state = state_before(state, local_ptr, through_ptr, slot - before, before, H, h, (cell, N * P), in_np, 1)
    for token in range(begin, end):
        t, valid = index(token, INT64) + one, one == 0
        d = limited(tl.load(dt + t * stride_dt_l).to(acc) + bias, SOFTPLUS, LOW, HIGH)[1]
        changed = changes(seq, t, valid, first)
        coarse, fine = exponents(d, A, valid, changed)
        x_t = load_tile(x, token, one, p, valid, in_p).to(acc)  # [1, BLOCK_P]
        B_t = tl.trans(load_tile(B, token, one, n, valid, in_n)).to(acc)  # [BLOCK_N, 1]
        state = tl.where(changed[:, None], 0.0, tl.exp2(coarse + fine)[:, None] * state)
        state = tl.where(in_n[:, None], state + B_t * (d[:, None] * x_t), 0.0)
        if out_ptr is not None:
            C_t = tl.trans(load_tile(C, token, one, n, valid, in_n)).to(acc)  # [BLOCK_N, 1]
            y = tl.sum(tl.where(in_n[:, None], state * C_t, 0.0), axis=0)
            out = (out_ptr + row * stride_out_b + h * stride_out_h, stride_out_l, stride_out_p)
            store_out(out, y[None, :], x_t, z, skip, token, one, p, valid, in_p)

    if out_ptr is None:
        one_state = tl.cast(slot, tl.int64) * H + h
        tl.store(local_ptr + one_state * (N * P) + cell, state, mask=in_np)
    elif end == last:
        in_state = p[None, :] * N + n[:, None]
        if cu_ptr is not None:
            to = varlen_ptr + (tl.cast(sequence, tl.int64) * H + h) * (P * N)
            tl.store(to + in_state, state, mask=in_np)
        if (last == L) & (last > first):
            tl.store(final_ptr + (tl.cast(row, tl.int64) * H + h) * (P * N) + in_state, state, mask=in_np)


def plan_tokens(arguments: dict, programs: int) -> Launch:
    """After a launch of so many programs with these arguments."""
    kernel = _ssd_scan_tokens_kernel
    absent = dict.fromkeys(("final_ptr", "varlen_ptr"))
    return Launch(kernel, (programs,), chosen(kernel, absent | arguments), 8)
