"""Selective scan for a real A: the backward kernel and its launcher.

Shape letters: B batch, D channels, L length, N state size, G groups of B and C, S packed sequences, T tokens a tile.

How the work is split: like the forward (selective_scan.py), a program owns BLOCK_D channels of a row. It walks from the
sequence's end, chunk by chunk (checkpoints, ops/selective_scan.py): first the states at every T-th token of the chunk
go into a scratch buffer, then tile by tile, backwards, the states of the T tokens are recomputed into registers and
the gradients follow.

Measured on an H200 at B8 D4096 N16 L4096 bf16: 15.3 ms, where the CUDA kernel takes 6.8.

What bounds it on an H100/H200: three exponentials a state and token would allow
7e10 elements a second at N = 16; but the sums of dB and dC over the block's channels weigh more, 113 shuffles a warp
and token in the sm_90 code, and issuing about 900 instructions a warp and token allows about 3e10.

Determinism: dB and dC leave as one partial sum a block (when a group has several blocks), dA, dD and ddelta_bias as
one a row program; torch sums them in a fixed order. Nothing is atomic.

Memory besides inputs and outputs, in floats (doubles for float64): partial dB and dC hold at most B D L together
(blocks are launched in turns when that would be more, as it is for N above 32); scratch holds at most B D L, or
SCRATCH_FLOOR when that is more (fewer programs then share the rows); partial dA at most the last state's size.
"""

import torch
import triton
import triton.language as tl

from .._packing import checkpoint_stride
from . import scan_device as dev
from .common import LN2, Launch, compile_spec, index, pick, put, sigmoid, silu_slope, strides, wide
from .scan_device import (
    advance,
    bounds,
    channels_of,
    decay_rates,
    load_channels,
    load_constant,
    load_matrix,
    load_tile,
    over_channels,
    over_states,
    step_size,
    token,
)  # fmt: skip
from .tuning import config

SCRATCH_FLOOR = 8 * 2**20


@triton.jit
def _token_bwd(g, before, A, d, du, u, dy, b, c, in_n, PADDED_N: tl.constexpr):
    """Gradients through one token, by the formulas of reference.selective_scan_bwd; A is A log2(e).

    g is dL/dh of the state after the token without its own output. Returns (h, g with that output, dE, dx, dd, and
    dL/dh of the state before the token); dx, dd [BLOCK_D], the others [BLOCK_N, BLOCK_D].
    """
    decay = tl.exp2(d[None, :] * A)
    carried = decay * before
    h = carried + du[None, :] * b
    g = g + c * dy[None, :]
    dE = g * carried
    gb = over_states(g * b, in_n, PADDED_N)
    dd = over_states(dE * A, in_n, PADDED_N) * LN2 + gb * u
    return h, g, dE, gb * d, dd, decay * g


@triton.jit
def _selective_scan_bwd_kernel(
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dinitial_ptr, scratch_ptr,
    dout_ptr, dlast_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, cu_ptr,
    checkpoints_ptr, L, D, unit, blocks_per_unit, units_per_group_B, units_per_group_C, slots, first_block, total_rows,
    tiles_per_chunk, stride_du_b, stride_du_d, stride_du_l, stride_ddelta_b, stride_ddelta_d, stride_ddelta_l,
    stride_dz_b, stride_dz_d, stride_dz_l, stride_dB_b, stride_dB_p, stride_dB_n, stride_dB_l,
    stride_dC_b, stride_dC_p, stride_dC_n, stride_dC_l, stride_dinitial_b, stride_dinitial_d, stride_dinitial_n,
    stride_dout_b, stride_dout_d, stride_dout_l, stride_dlast_b, stride_dlast_d, stride_dlast_n,
    stride_u_b, stride_u_d, stride_u_l, stride_delta_b, stride_delta_d, stride_delta_l,
    stride_z_b, stride_z_d, stride_z_l, stride_A_d, stride_A_n,
    stride_B_b, stride_B_g, stride_B_n, stride_B_l, stride_C_b, stride_C_g, stride_C_n, stride_C_l,
    stride_D_d, stride_bias_d, stride_initial_b, stride_initial_d, stride_initial_n,
    N: tl.constexpr, K: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, INT64: tl.constexpr, PADDED_N: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = A_ptr.dtype.element_ty
    row_program, program = tl.program_id(0), tl.program_id(1)
    block = first_block + program
    d_index, in_d = channels_of(block, unit, blocks_per_unit, BLOCK_D)
    d_index, rows, n = index(d_index, INT64), tl.arange(0, T), index(tl.arange(0, BLOCK_N), INT64)
    in_n = n < N
    in_nd = in_n[:, None] & in_d[None, :]
    state = d_index[None, :] * N + n[:, None]  # [BLOCK_N, BLOCK_D], in contiguous (D, N)
    A = decay_rates(A_ptr, d_index[None, :] * stride_A_d + n[:, None] * stride_A_n, in_nd)  # [BLOCK_N, BLOCK_D]
    bias = load_channels(bias_ptr, stride_bias_d, d_index, in_d, acc)  # [BLOCK_D]
    skip = load_channels(D_ptr, stride_D_d, d_index, in_d, acc)  # [BLOCK_D]
    constant_B = load_constant(B_ptr, stride_B_b, stride_B_n, d_index, n, in_nd, acc, CONSTANT_B)
    constant_C = load_constant(C_ptr, stride_C_b, stride_C_n, d_index, n, in_nd, acc, CONSTANT_C)
    group = tl.cast(block // blocks_per_unit, tl.int64)
    scratch_ptr += (tl.cast(row_program, tl.int64) * tl.num_programs(1) + program) * tiles_per_chunk * BLOCK_N * BLOCK_D
    saved = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # a state in the scratch
    acc_dA = tl.zeros([BLOCK_N, BLOCK_D], acc)
    acc_dB = tl.zeros([BLOCK_N, BLOCK_D], acc)  # of a constant B or C; unused ones cost nothing
    acc_dC = tl.zeros([BLOCK_N, BLOCK_D], acc)
    acc_dD = tl.zeros([BLOCK_D], acc)
    acc_dbias = tl.zeros([BLOCK_D], acc)

    for row in range(row_program, total_rows, tl.num_programs(0)):
        begin, end, b = bounds(cu_ptr, row, L)
        row_ = tl.cast(row, tl.int64)
        u_row, delta_row = u_ptr + b * stride_u_b, delta_ptr + b * stride_delta_b
        dout_row = dout_ptr + b * stride_dout_b
        B_row = B_ptr + b * stride_B_b + group // units_per_group_B * stride_B_g
        C_row = C_ptr + b * stride_C_b + group // units_per_group_C * stride_C_g
        g = tl.zeros([BLOCK_N, BLOCK_D], acc)
        if dlast_ptr is not None:
            dlast = row_ * stride_dlast_b + d_index[None, :] * stride_dlast_d + n[:, None] * stride_dlast_n
            g = tl.load(dlast_ptr + dlast, mask=in_nd, other=0.0).to(acc)  # [BLOCK_N, BLOCK_D]
        first_chunk = begin // K
        chunks = tl.where(end > begin, tl.cdiv(end, K) - first_chunk, 0)
        for c in range(chunks):
            chunk = first_chunk + (c if REVERSE else chunks - 1 - c)
            first_tile = tl.maximum(begin, chunk * K) // T
            tiles = tl.cdiv(tl.minimum(end, (chunk + 1) * K), T) - first_tile
            # The state on entering the chunk: where the sequence begins, its initial state.
            h = tl.zeros([BLOCK_N, BLOCK_D], acc)
            if c < chunks - 1:
                h = tl.load(checkpoints_ptr + (b * slots + chunk) * D * N + state, mask=in_nd, other=0.0)
            else:
                if initial_ptr is not None:
                    initial = row_ * stride_initial_b + d_index[None, :] * stride_initial_d
                    initial += n[:, None] * stride_initial_n
                    h = tl.load(initial_ptr + initial, mask=in_nd, other=0.0)

            # 1. The states on entering each tile of the chunk.
            tl.debug_barrier()  # the reads of the chunk before are over
            tl.store(scratch_ptr + saved, h)
            for k in range(tiles - 1):
                t = (first_tile + (tiles - 1 - k if REVERSE else k)) * T + rows
                valid, in_t = (t >= begin) & (t < end), t < L
                loads, inside = in_t[:, None] & in_d[None, :], valid[:, None] & in_d[None, :]
                t = index(t, INT64)
                u = load_tile(u_row, stride_u_l, stride_u_d, t, d_index, loads, acc)  # [T, BLOCK_D]
                delta = load_tile(delta_row, stride_delta_l, stride_delta_d, t, d_index, loads, acc)  # [T, BLOCK_D]
                raw, d = step_size(delta, bias, SOFTPLUS)
                d, du = tl.where(inside, d, 0.0), tl.where(inside, d * u, 0.0)
                B = load_matrix(B_row, stride_B_l, stride_B_n, constant_B, t, n, in_t, in_n, valid, CONSTANT_B)
                for i in tl.static_range(T - 1 if REVERSE else 0, -1 if REVERSE else T, -1 if REVERSE else 1):
                    h = advance(h, A, pick(d, i, rows), pick(du, i, rows), token(B, i, rows, CONSTANT_B))
                tl.store(scratch_ptr + (k + 1) * BLOCK_N * BLOCK_D + saved, h)
            tl.debug_barrier()  # other threads may read what this one wrote

            # 2. Tile by tile from the chunk's end: the states of the tile's tokens, then the gradients.
            for j in range(tiles):
                t = (first_tile + (j if REVERSE else tiles - 1 - j)) * T + rows
                valid, in_t = (t >= begin) & (t < end), t < L
                loads, inside = in_t[:, None] & in_d[None, :], valid[:, None] & in_d[None, :]
                t = index(t, INT64)
                u = load_tile(u_row, stride_u_l, stride_u_d, t, d_index, loads, acc)  # [T, BLOCK_D]
                delta = load_tile(delta_row, stride_delta_l, stride_delta_d, t, d_index, loads, acc)  # [T, BLOCK_D]
                dout = load_tile(dout_row, stride_dout_l, stride_dout_d, t, d_index, loads, acc)  # [T, BLOCK_D]
                raw, d = step_size(delta, bias, SOFTPLUS)
                d, u, dout = tl.where(inside, d, 0.0), tl.where(inside, u, 0.0), tl.where(inside, dout, 0.0)
                du, dy = d * u, dout
                if z_ptr is not None:
                    at_z = b * stride_z_b
                    z = load_tile(z_ptr + at_z, stride_z_l, stride_z_d, t, d_index, loads, acc)  # [T, BLOCK_D]
                    gate = sigmoid(z)
                    dy = tl.where(inside, dout * z * gate, 0.0)
                B = load_matrix(B_row, stride_B_l, stride_B_n, constant_B, t, n, in_t, in_n, valid, CONSTANT_B)
                C = load_matrix(C_row, stride_C_l, stride_C_n, constant_C, t, n, in_t, in_n, valid, CONSTANT_C)
                h = tl.load(scratch_ptr + (tiles - 1 - j) * BLOCK_N * BLOCK_D + saved)  # [BLOCK_N, BLOCK_D]
                before = ()
                for i in tl.static_range(T - 1 if REVERSE else 0, -1 if REVERSE else T, -1 if REVERSE else 1):
                    before = before + (h,)
                    h = advance(h, A, pick(d, i, rows), pick(du, i, rows), token(B, i, rows, CONSTANT_B))
                y, dx, dd = tl.zeros([T, BLOCK_D], acc), tl.zeros([T, BLOCK_D], acc), tl.zeros([T, BLOCK_D], acc)
                dB, dC = tl.zeros([T, BLOCK_N], acc), tl.zeros([T, BLOCK_N], acc)
                for i in tl.static_range(0 if REVERSE else T - 1, T if REVERSE else -1, 1 if REVERSE else -1):
                    d_i, dy_i, c_i = pick(d, i, rows), pick(dy, i, rows), token(C, i, rows, CONSTANT_C)
                    du_i, b_i = pick(du, i, rows), token(B, i, rows, CONSTANT_B)
                    h, g_i, dE, dx_i, dd_i, g = _token_bwd(
                        g, before[T - 1 - i if REVERSE else i], A, d_i, du_i, pick(u, i, rows), dy_i, b_i, c_i, in_n,
                        PADDED_N,
                    )  # fmt: skip
                    acc_dA += dE * d_i[None, :]
                    dx, dd = put(dx, i, rows, dx_i), put(dd, i, rows, dd_i)
                    if CONSTANT_B:
                        acc_dB += g_i * du_i[None, :]
                    else:
                        dB = put(dB, i, rows, over_channels(g_i * du_i[None, :], in_d, PADDED_D))
                    if CONSTANT_C:
                        acc_dC += h * dy_i[None, :]
                    else:
                        dC = put(dC, i, rows, over_channels(h * dy_i[None, :], in_d, PADDED_D))
                    if z_ptr is not None:
                        y = put(y, i, rows, over_states(h * c_i, in_n, PADDED_N))

                if SOFTPLUS:
                    dd *= sigmoid(raw)
                dd = tl.where(inside, dd, 0.0)  # a token past the end has a step of 0, but not a gradient of 0
                acc_dbias += tl.sum(dd, axis=0)
                acc_dD += tl.sum(dy * u, axis=0)
                dx += skip[None, :] * dy
                at_du = b * stride_du_b + t[:, None] * stride_du_l + d_index[None, :] * stride_du_d
                tl.store(du_ptr + at_du, dx.to(du_ptr.dtype.element_ty), mask=inside)
                at_ddelta = b * stride_ddelta_b + t[:, None] * stride_ddelta_l + d_index[None, :] * stride_ddelta_d
                tl.store(ddelta_ptr + at_ddelta, dd.to(ddelta_ptr.dtype.element_ty), mask=inside)
                if z_ptr is not None:
                    dz = dout * (y + skip[None, :] * u) * silu_slope(z, gate)
                    at_dz = b * stride_dz_b + t[:, None] * stride_dz_l + d_index[None, :] * stride_dz_d
                    tl.store(dz_ptr + at_dz, dz.to(dz_ptr.dtype.element_ty), mask=inside)
                at_tn = valid[:, None] & in_n[None, :]
                if not CONSTANT_B:
                    at_dB = b * stride_dB_b + tl.cast(program, tl.int64) * stride_dB_p
                    at_dB += t[:, None] * stride_dB_l + n[None, :] * stride_dB_n
                    tl.store(dB_ptr + at_dB, dB.to(dB_ptr.dtype.element_ty), mask=at_tn)
                if not CONSTANT_C:
                    at_dC = b * stride_dC_b + tl.cast(program, tl.int64) * stride_dC_p
                    at_dC += t[:, None] * stride_dC_l + n[None, :] * stride_dC_n
                    tl.store(dC_ptr + at_dC, dC.to(dC_ptr.dtype.element_ty), mask=at_tn)
        if dinitial_ptr is not None:
            at = row_ * stride_dinitial_b + d_index[None, :] * stride_dinitial_d + n[:, None] * stride_dinitial_n
            tl.store(dinitial_ptr + at, g, mask=in_nd)

    row_program = tl.cast(row_program, tl.int64)
    tl.store(dA_ptr + row_program * D * N + state, acc_dA, mask=in_nd)
    if CONSTANT_B:
        tl.store(dB_ptr + row_program * D * N + state, acc_dB, mask=in_nd)
    if CONSTANT_C:
        tl.store(dC_ptr + row_program * D * N + state, acc_dC, mask=in_nd)
    if D_ptr is not None:
        tl.store(dD_ptr + row_program * D + d_index, acc_dD, mask=in_d)
    if bias_ptr is not None:
        tl.store(dbias_ptr + row_program * D + d_index, acc_dbias, mask=in_d)


def _default(u: torch.Tensor, block_n: int, unit: int) -> dict:
    """16 states a thread in at most 8 warps; within that BLOCK_D >= 2 N, which keeps partial dB and dC small.

    T = 2: with 4 tokens a tile their 64 states alone spill (816 bytes of stack at N = 16 on sm_90, against 120).
    """
    block_d = min(dev.power_of_two(unit), max(2 * block_n, 512 // block_n, 32), 128, max(4096 // block_n, 1))
    return {"BLOCK_D": block_d, "T": 2, "num_warps": min(max(block_n * block_d // 512, 1), 8)}


def _partial(matrix, blocks_per_group, blocks, turns, batch, dtype):
    """Where a launch writes dB or dC, (B, blocks or groups, N, L), or None: straight to the gradient.

    matrix is B or C, `turns` the number of launches.
    """
    if matrix.dim() == 2 or (turns == 1 and blocks_per_group == 1):
        return None
    return torch.empty(batch, blocks, *matrix.shape[2:], dtype=dtype, device=matrix.device)


def _reduce(gradient, partial, total, first_block, blocks_per_group):
    """Add the blocks of one launch to their groups, in the order of the blocks."""
    if total is None:
        gradient.copy_(partial.unflatten(1, (gradient.shape[1], -1)).sum(2))
        return
    for p in range(partial.shape[1]):
        total[:, (first_block + p) // blocks_per_group] += partial[:, p]


def plan_selective_scan_bwd(
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial, scratch, dout, dlast_state, u, delta, A, B, C, D, z, delta_bias,
    initial_state, cu_seqlens, checkpoints, delta_softplus, reverse, *, blocks, first_block, count,
):  # fmt: skip
    """One launch, over `count` blocks of channels. dA, dD, dbias, and dB, dC: the buffers of partial sums."""
    states, channels = A.shape[1], A.shape[0]
    units = dev.units(channels, B, C)
    block_n = dev.power_of_two(states)
    args = dict(
        du_ptr=du, ddelta_ptr=ddelta, dA_ptr=dA, dB_ptr=dB, dC_ptr=dC, dD_ptr=None if D is None else dD,
        dz_ptr=None if z is None else dz, dbias_ptr=None if delta_bias is None else dbias,
        dinitial_ptr=None if initial_state is None else dinitial, scratch_ptr=scratch,
        dout_ptr=dout, dlast_ptr=dlast_state, u_ptr=u, delta_ptr=delta, A_ptr=A, B_ptr=B, C_ptr=C, D_ptr=D, z_ptr=z,
        bias_ptr=delta_bias, initial_ptr=initial_state, cu_ptr=cu_seqlens, checkpoints_ptr=checkpoints,
        L=u.shape[2], D=channels, blocks_per_unit=triton.cdiv(units["unit"], blocks["BLOCK_D"]), **units,
        slots=checkpoints.shape[1], first_block=first_block, tiles_per_chunk=scratch.shape[2],
        total_rows=u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        **strides("du", du, "bdl"), **strides("ddelta", ddelta, "bdl"),
        **strides("dz", None if z is None else dz, "bdl"),
        **strides("dB", dB if B.dim() == 4 else None, "bpnl"), **strides("dC", dC if C.dim() == 4 else None, "bpnl"),
        **strides("dinitial", None if initial_state is None else dinitial, "bdn"), **strides("dout", dout, "bdl"),
        **strides("dlast", dlast_state, "bdn"), **strides("u", u, "bdl"), **strides("delta", delta, "bdl"),
        **strides("z", z, "bdl"), **strides("A", A, "dn"), **dev.matrix_strides("B", B), **dev.matrix_strides("C", C),
        **strides("D", D, "d"), **strides("bias", delta_bias, "d"), **strides("initial", initial_state, "bdn"),
        N=states, K=checkpoint_stride(states), CONSTANT_B=B.dim() == 2, CONSTANT_C=C.dim() == 2,
        SOFTPLUS=bool(delta_softplus), REVERSE=bool(reverse),
        INT64=wide(du, ddelta, dz, dB, dC, dout, u, delta, z, A[None], B, C, checkpoints),
        PADDED_N=block_n != states, PADDED_D=units["unit"] % blocks["BLOCK_D"] != 0,
        BLOCK_N=block_n, BLOCK_D=blocks["BLOCK_D"], T=blocks["T"],
    )  # fmt: skip
    return Launch(_selective_scan_bwd_kernel, (scratch.shape[0], count), args, blocks["num_warps"])


def plan_buffers(u, A, B, C, cu_seqlens):
    """(config, number of blocks, blocks a launch, scratch shape (row programs, blocks, tiles, states))."""
    batch, channels, length = u.shape
    states, unit = A.shape[1], dev.units(channels, B, C)["unit"]
    block_n = dev.power_of_two(states)
    key = dev.tuning_key(u, block_n, unit)
    blocks = config("selective_scan_bwd", key, u.device, _default(u, block_n, unit))
    total = channels // unit * triton.cdiv(unit, blocks["BLOCK_D"])
    several = any(m.dim() == 4 and total > m.shape[1] for m in (B, C))
    count = min(total, max(channels // (2 * states), 1)) if several else total
    tiles = triton.cdiv(min(checkpoint_stride(states), length), blocks["T"])
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    row_size = count * tiles * block_n * blocks["BLOCK_D"]
    row_programs = max(min(rows, max(u.numel(), SCRATCH_FLOOR) // row_size), 1)
    return blocks, total, count, (row_programs, count, tiles, block_n * blocks["BLOCK_D"])


def selective_scan_bwd(du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial, *args):
    """fill(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state, *op arguments)"""
    u, A, B, C, D, delta_bias, cu_seqlens = args[2], *args[4:8], args[9], args[11]
    blocks, total, count, scratch_shape = plan_buffers(u, A, B, C, cu_seqlens)
    programs, batch, turns = scratch_shape[0], u.shape[0], triton.cdiv(total, count)
    scratch = A.new_empty(scratch_shape)
    rows_dA = A.new_empty(programs, *A.shape)
    rows_dD, rows_dbias = (None if t is None else A.new_empty(programs, A.shape[0]) for t in (D, delta_bias))
    matrices = []  # (gradient, what the kernel writes, running total over several launches, blocks of a group)
    for matrix, gradient in ((B, dB), (C, dC)):
        per_group = total // dev.groups(matrix)
        partial = _partial(matrix, per_group, count, turns, batch, A.dtype)
        if matrix.dim() == 2:
            partial = A.new_empty(programs, *A.shape)
        running = torch.zeros_like(gradient, dtype=A.dtype) if turns > 1 and matrix.dim() == 4 else None
        matrices.append((gradient, partial, running, per_group))
    targets = [gradient if partial is None else partial for gradient, partial, _, _ in matrices]
    for first in range(0, total, count):
        now = min(count, total - first)
        plan_selective_scan_bwd(
            du, ddelta, rows_dA, *targets, rows_dD, dz, rows_dbias, dinitial, scratch, *args,
            blocks=blocks, first_block=first, count=now,
        ).run()  # fmt: skip
        for gradient, partial, running, per_group in matrices:
            if partial is not None and gradient.dim() == 4:
                _reduce(gradient, partial[:, :now], running, first, per_group)
    for gradient, partial, running, _ in matrices:
        if running is not None:
            gradient.copy_(running)
        elif gradient.dim() == 2:
            gradient.copy_(partial.sum(0))
    for gradient, partial in ((dA, rows_dA), (dD, rows_dD), (dbias, rows_dbias)):
        if partial is not None:
            gradient.copy_(partial.sum(0))


def _spec(dtype: torch.dtype, options: str) -> Launch:
    inputs, checkpoints = dev.sample(dtype, options)
    x, _, A, B, C, vector, _, _, initial, cu = inputs
    blocks, _, count, scratch_shape = plan_buffers(x, A, B, C, cu)
    rows = scratch_shape[0]
    matrices = [
        A.new_empty(rows, *A.shape) if m.dim() == 2 else A.new_empty(x.shape[0], count, *m.shape[2:]) for m in (B, C)
    ]
    vectors = A.new_empty(rows, A.shape[0])
    return plan_selective_scan_bwd(
        x, x, A.new_empty(rows, *A.shape), *matrices, vectors, x, vectors, initial, A.new_empty(scratch_shape),
        x, initial, *inputs, checkpoints, options != "plain", options == "packed", blocks=blocks, first_block=0,
        count=count,
    )  # fmt: skip


for _options in ("", "d", "N64", "packed", "wide", "plain"):
    _name = "selective_scan_bwd" + (f"_{_options}" if _options else "")
    compile_spec(_name)(lambda dtype, options=_options: _spec(dtype, options))
