"""The gradients of ssd_scan's B and C: sums over the heads of a group.

Shape letters: B batch, L length, H heads, P head dim, G groups, N states, Q tokens of a chunk.

    dB^T  = C^T R^T + sum over heads of G (e x)^T        S, G [N, P]: see ssd_scan_bwd.py
    dC^T  = B^T R   + sum over heads of S (2^s dY)^T     [N, Q]
    R     = sum over heads of M o d o dY x^T             [Q, Q], one product with B and C for all heads

The account, a token and head, in half precision at P 64, N 128, Q 64: 4 P bytes of x and dout, 2 x 2 N P / Q of S and
G, 768 in all; 4 N P + 2 Q P = 40,960 FLOP. HBM bounds it: 16,384 tokens of 128 heads are 0.38 ms on an H200. Never
measured.

The sums are turned round, N x Q: tiles of 64 rows that feed products live in 4 warps, these fill 8, 32 registers each,
and R has 16 (255 registers and no stack on sm_90, 248 on sm_100). With x's and dt's gradients, which read the same
bytes, 1.5 KiB of stack. P in blocks inside the loop over heads doubled the buffers, to 336 KB at P 256; the blocks are
in the loop. float16 spills 216 bytes; sm_80 3.8 KiB (16 bytes with BLOCK_P 16).

How the work is split: a program has a chunk, a group and a part of its heads. Parts leave partial sums, added in order.
"""

import triton
import triton.language as tl

from .common import Launch, index, strides, wide
from .ssd_device import between, chosen, gated, load_tile, operand, product, states_of, sums, window_of

__all__ = ["plan_matrices"]


@triton.jit
def _ssd_scan_matrices_kernel(
    dB_ptr, dC_ptr, before_ptr, after_ptr, dout_ptr, steps_ptr, x_ptr, B_ptr, C_ptr, z_ptr, cu_ptr, size, L, H,
    heads, parts, part_heads, S, windows, stride_dB_s, stride_dB_b, stride_dB_l, stride_dB_g, stride_dB_n,
    stride_dC_s, stride_dC_b, stride_dC_l, stride_dC_g, stride_dC_n,
    stride_dout_b, stride_dout_l, stride_dout_h, stride_dout_p, stride_x_b, stride_x_l, stride_x_h, stride_x_p,
    stride_B_b, stride_B_l, stride_B_g, stride_B_n, stride_C_b, stride_C_l, stride_C_g, stride_C_n,
    stride_z_b, stride_z_l, stride_z_h, stride_z_p,
    N: tl.constexpr, P: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """R is [Q, Q] of (source j, reader i). Grid (slots groups parts,)."""
    acc: tl.constexpr = steps_ptr.dtype.element_ty
    program = tl.program_id(0)
    part, group, slot = program % parts, program // parts % (H // heads), program // parts // (H // heads)
    row, sequence, window, begin, end, first, last = window_of(cu_ptr, slot, S, L, windows, Q)
    if end <= begin:
        return
    i, start = index(tl.arange(0, Q), INT64), window * Q
    g, n = index(group, INT64), index(tl.arange(0, BLOCK_N), INT64)
    valid, in_n = (i >= begin - start) & (i < end - start), n < N
    steps_ptr += tl.cast(row, tl.int64) * H * L
    dB, dC, pairs = tl.zeros([BLOCK_N, Q], acc), tl.zeros([BLOCK_N, Q], acc), tl.zeros([Q, Q], acc)
    seen = i[:, None] <= i[None, :]
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    ends = tl.minimum((part + 1) * part_heads, heads)
    for k in range(part * part_heads * blocks, ends * blocks):
        head = group * heads + k // blocks
        h, p = index(head, INT64), k % blocks * BLOCK_P + index(tl.arange(0, BLOCK_P), INT64)
        in_p = p < P
        state, dstate = states_of(before_ptr, after_ptr, slot, head, H, n, p, N, P, OPERAND, PRECISION)
        x = (x_ptr + row * stride_x_b + h * stride_x_h, stride_x_l, stride_x_p)
        dout = (dout_ptr + row * stride_dout_b + h * stride_dout_h, stride_dout_l, stride_dout_p)
        z = (None, stride_z_l, stride_z_p)
        if z_ptr is not None:
            z = (z_ptr + row * stride_z_b + h * stride_z_h, stride_z_l, stride_z_p)
        x_t = operand(load_tile(x, start, i, p, valid, in_p), OPERAND, PRECISION)  # [Q, BLOCK_P]
        dy = gated(dout, z, start, i, p, valid, in_p, OPERAND, PRECISION, acc)  # [Q, BLOCK_P]
        steps = (steps_ptr + tl.cast(head, tl.int64) * L, tl.cast(size, tl.int64))
        d = tl.load(steps[0] + start + i, mask=valid, other=0.0)
        coarse, fine, all_coarse, all_fine = sums(steps, start, i, begin, end, Q)
        own = product(x_t, tl.trans(dy), tl.zeros([Q, Q], acc), PRECISION)
        pairs += own * (between(coarse, fine, seen, 1) * d[:, None])
        x_t = x_t.to(acc) * (tl.exp2((all_coarse - coarse) + (all_fine - fine)) * d)[:, None]
        dy = dy.to(acc) * tl.exp2(coarse + fine)[:, None]
        dB = product(dstate, tl.trans(operand(x_t, OPERAND, PRECISION)), dB, PRECISION)
        dC = product(state, tl.trans(operand(dy, OPERAND, PRECISION)), dC, PRECISION)
    pairs = operand(pairs, OPERAND, PRECISION)
    B = (B_ptr + row * stride_B_b + g * stride_B_g, stride_B_l, stride_B_n)
    C = (C_ptr + row * stride_C_b + g * stride_C_g, stride_C_l, stride_C_n)
    B_t = operand(load_tile(B, start, i, n, valid, in_n), OPERAND, PRECISION)  # [Q, BLOCK_N]
    C_t = operand(load_tile(C, start, i, n, valid, in_n), OPERAND, PRECISION)  # [Q, BLOCK_N]
    dB = product(tl.trans(C_t), tl.trans(pairs), dB, PRECISION)
    dC = product(tl.trans(B_t), pairs, dC, PRECISION)
    inside = valid[None, :] & in_n[:, None]
    to = dB_ptr + part * tl.cast(stride_dB_s, tl.int64) + row * stride_dB_b + g * stride_dB_g
    to += tl.cast(start, tl.int64) * stride_dB_l
    at = i[None, :] * stride_dB_l + n[:, None] * stride_dB_n
    tl.store(to + at, dB.to(dB_ptr.dtype.element_ty), mask=inside)
    to = dC_ptr + part * tl.cast(stride_dC_s, tl.int64) + row * stride_dC_b + g * stride_dC_g
    to += tl.cast(start, tl.int64) * stride_dC_l
    at = i[None, :] * stride_dC_l + n[:, None] * stride_dC_n
    tl.store(to + at, dC.to(dC_ptr.dtype.element_ty), mask=inside)


def plan_matrices(arguments: dict, dB, dC, slots: int, parts: int, part_heads: int, blocks: dict) -> Launch:
    """After ssd_scan_bwd's kernel, with its arguments. dB, dC (parts, B, L, G, N)."""
    kernel = _ssd_scan_matrices_kernel
    own = dict(
        dB_ptr=dB, dC_ptr=dC, parts=parts, part_heads=part_heads,
        BLOCK_P=blocks["BLOCK_P"], INT64=arguments["INT64"] or wide(dB, dC), **strides("dB", dB, "sblgn"),
        **strides("dC", dC, "sblgn"),
    )  # fmt: skip
    programs = slots * (arguments["H"] // arguments["heads"]) * parts
    return Launch(kernel, (programs,), chosen(kernel, arguments | own), blocks["num_warps"], blocks.get("num_stages"))
