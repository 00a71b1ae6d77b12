"""Selective scan for a real A: the forward kernel and its launcher (the backward is in selective_scan_bwd.py).

Shape letters: B batch, D channels, L length, N state size, G groups of B and C, S packed sequences, T tokens a tile.

Measured on an H200 at B8 D4096 N16 L4096 bf16: 1.56 ms, where the CUDA kernel takes 0.84.

What bounds it on an H100/H200: one exponential a state and token, and the
exp unit does 16 a clock and SM, so at N = 16 about 2e11 elements a second; gated bf16 moves 8 bytes an element,
which 3.35 TB/s would carry at 4e11. So everything else has to fit under the 8 clocks that a warp's exponential takes.

How the work is split: a program owns BLOCK_D channels of one batch row (or packed sequence) and walks through time,
so B and C are read once for BLOCK_D channels. Blocks never straddle two groups.

What stays in registers: the state and A. Tiles are [BLOCK_N, BLOCK_D], channels fastest, from which Triton makes one
channel a thread with all its states (at N = 16 and BLOCK_D = 32 x num_warps): the sum over N needs no shuffle, and
u, delta, z and out move as one vector of T tokens a thread. The T tokens of a tile are unrolled and picked out of
registers for free; B_t and C_t go through shared memory to all threads, four 16-byte reads each a token. In the sm_90
code for bf16, N = 16, T = 8 a token costs about 95 FMUL and FFMA for its 16 exponentials, with 106 registers.

When B x D is too small to fill the GPU (a prefill of one sequence), time is split too, `_parts`: a first launch runs
each part from a zero state and leaves its last state and its sum of d; in the second one a part finds its initial
state by h = exp(A sum d) h + state over the parts before it, which for a real A is exact. Twice the exponentials, on
up to WANTED_WARPS instead of B D / 32 warps; the states of the parts hold at most B D L / 8 numbers.

Not here: splitting packed sequences and the backward; exponentials on the FMA pipes by polynomial, worth at most 15 %
by the count above.
"""

import torch
import triton
import triton.language as tl

from .._packing import checkpoint_stride
from . import scan_device as dev
from .common import Launch, compile_spec, index, meta, pick, put, sigmoid, strides, wide
from .scan_device import (
    advance,
    bounds,
    channels_of,
    decay_rates,
    load_channels,
    load_constant,
    load_matrix,
    load_tile,
    over_states,
    step_size,
    token,
)  # fmt: skip
from .selective_scan_bwd import selective_scan_bwd
from .tuning import config

__all__ = ["quantized_selective_scan_fwd", "selective_scan_bwd", "selective_scan_fwd"]


@triton.jit
def _selective_scan_fwd_kernel(
    out_ptr, last_ptr, checkpoints_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr,
    cu_ptr, u_scale_ptr, B_scale_ptr, C_scale_ptr, parts_ptr, sums_ptr, L, D, unit, blocks_per_unit,
    units_per_group_B, units_per_group_C, slots, part_tokens,
    stride_out_b, stride_out_d, stride_out_l, stride_u_b, stride_u_d, stride_u_l,
    stride_delta_b, stride_delta_d, stride_delta_l, stride_z_b, stride_z_d, stride_z_l, stride_A_d, stride_A_n,
    stride_B_b, stride_B_g, stride_B_n, stride_B_l, stride_C_b, stride_C_g, stride_C_n, stride_C_l,
    stride_D_d, stride_bias_d, stride_initial_b, stride_initial_d, stride_initial_n,
    N: tl.constexpr, K: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, INT64: tl.constexpr, PADDED_N: tl.constexpr, PASS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """With steps (u_scale_ptr (D,), those of B and C (G,)), u, B and C are int8 codes.

    PASS 0: whole sequences. PASS 1: each part's own last state and sum of d. PASS 2: the parts, joined."""
    acc: tl.constexpr = A_ptr.dtype.element_ty
    row, block = tl.program_id(0), tl.program_id(1)
    begin, end, b = bounds(cu_ptr, row, L)
    row = tl.cast(row, tl.int64)
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
    B_ptr += b * stride_B_b + group // units_per_group_B * stride_B_g
    C_ptr += b * stride_C_b + group // units_per_group_C * stride_C_g
    if u_scale_ptr is not None:
        u_step = load_channels(u_scale_ptr, 1, d_index, in_d, acc)[None, :]  # [1, BLOCK_D]
        B_step = tl.load(B_scale_ptr + group // units_per_group_B)
        C_step = tl.load(C_scale_ptr + group // units_per_group_C)
    u_ptr += b * stride_u_b
    delta_ptr += b * stride_delta_b
    out_ptr += b * stride_out_b
    h = tl.zeros([BLOCK_N, BLOCK_D], acc)
    if initial_ptr is not None and PASS != 1:
        initial = row * stride_initial_b + d_index[None, :] * stride_initial_d + n[:, None] * stride_initial_n
        h = tl.load(initial_ptr + initial, mask=in_nd, other=0.0)  # [BLOCK_N, BLOCK_D]
    if PASS > 0:
        part = tl.program_id(2)
        parts = tl.num_programs(2)
        begin = part * part_tokens
        end = tl.minimum(begin + part_tokens, L)
        acc_d = tl.zeros([BLOCK_D], acc)
        at_part = (row * parts + part) * D
        if PASS == 2:
            for k in range(parts - 1 - part if REVERSE else part):
                at = (row * parts + (parts - 1 - k if REVERSE else k)) * D
                sum_d = tl.load(sums_ptr + at + d_index, mask=in_d, other=0.0)  # [BLOCK_D]
                own = tl.load(parts_ptr + at * N + state, mask=in_nd, other=0.0)  # [BLOCK_N, BLOCK_D]
                # A negative d can make the decay infinite, which must not turn a zero state into NaN.
                h = tl.where(h == 0, 0.0, tl.exp2(sum_d[None, :] * A) * h) + own

    first_tile = begin // T
    tiles = tl.where(end > begin, tl.cdiv(end, T) - first_tile, 0)
    for k in range(tiles):
        t0 = (first_tile + (tiles - 1 - k if REVERSE else k)) * T
        if checkpoints_ptr is not None and PASS != 1:
            entry = tl.minimum(t0 + T, L) - 1 if REVERSE else t0
            enters = ((entry + 1) % K == 0) | (entry == L - 1) if REVERSE else entry % K == 0
            if enters & (entry >= begin) & (entry < end):
                slot = (b * slots + t0 // K) * D * N
                tl.store(checkpoints_ptr + slot + state, h, mask=in_nd)
        t = t0 + rows
        valid, in_t = (t >= begin) & (t < end), t < L
        # Reads are masked by the tensor's end alone, whose alignment the compiler can see, writes by the sequence's.
        loads, inside = in_t[:, None] & in_d[None, :], valid[:, None] & in_d[None, :]
        t = index(t, INT64)
        u = load_tile(u_ptr, stride_u_l, stride_u_d, t, d_index, loads, acc)  # [T, BLOCK_D]
        delta = load_tile(delta_ptr, stride_delta_l, stride_delta_d, t, d_index, loads, acc)  # [T, BLOCK_D]
        if u_scale_ptr is not None:
            u *= u_step
        raw, d = step_size(delta, bias, SOFTPLUS)
        d = tl.where(inside, d, 0.0)  # a step of size 0 that adds 0: the state stays
        du = tl.where(inside, d * u, 0.0)
        B = load_matrix(B_ptr, stride_B_l, stride_B_n, constant_B, t, n, in_t, in_n, valid, CONSTANT_B)
        if u_scale_ptr is not None:
            B *= B_step
        if PASS == 1:
            acc_d += tl.sum(d, axis=0)
            for i in tl.static_range(T - 1 if REVERSE else 0, -1 if REVERSE else T, -1 if REVERSE else 1):
                h = advance(h, A, pick(d, i, rows), pick(du, i, rows), token(B, i, rows, CONSTANT_B))
        else:
            C = load_matrix(C_ptr, stride_C_l, stride_C_n, constant_C, t, n, in_t, in_n, valid, CONSTANT_C)
            if u_scale_ptr is not None:
                C *= C_step
            y = tl.zeros([T, BLOCK_D], acc)
            for i in tl.static_range(T - 1 if REVERSE else 0, -1 if REVERSE else T, -1 if REVERSE else 1):
                h = advance(h, A, pick(d, i, rows), pick(du, i, rows), token(B, i, rows, CONSTANT_B))
                y = put(y, i, rows, over_states(h * token(C, i, rows, CONSTANT_C), in_n, PADDED_N))
            if D_ptr is not None:
                y += skip[None, :] * u
            if z_ptr is not None:
                z = load_tile(z_ptr + b * stride_z_b, stride_z_l, stride_z_d, t, d_index, loads, acc)  # [T, BLOCK_D]
                y *= z * sigmoid(z)
            out = t[:, None] * stride_out_l + d_index[None, :] * stride_out_d
            tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=inside)
    if PASS == 1:
        tl.store(parts_ptr + at_part * N + state, h, mask=in_nd)
        tl.store(sums_ptr + at_part + d_index, acc_d, mask=in_d)
    else:
        # Of the parts of a split row, the one that comes last in scan order has the last state.
        is_last = True if PASS == 0 else part == (0 if REVERSE else parts - 1)
        tl.store(last_ptr + row * D * N + state, h, mask=in_nd & is_last)


WANTED_WARPS = 8 * 132  # of an H100/H200: two a scheduler


def _parts(warps: int, length: int, chunk: int) -> tuple[int, int]:
    """(parts of a row, tokens of a part). From 3 parts up they outweigh the second set of exponentials."""
    parts = min(length // (2 * chunk), WANTED_WARPS // warps)
    if parts < 3:
        return 1, length
    tokens = triton.cdiv(triton.cdiv(length, parts), chunk) * chunk
    return triton.cdiv(length, tokens), tokens


def _default(u: torch.Tensor, block_n: int, unit: int) -> dict:
    """16 states a thread, a warp across the channels where there are so many, 16 bytes of tokens a thread."""
    block_d = min(dev.power_of_two(unit), 64 if block_n < 16 else 32, max(4096 // block_n, 1))
    tokens = 16 // u.element_size() if u.stride(2) == 1 else 2
    return {
        "BLOCK_D": block_d,
        "T": tokens if block_n <= 32 else min(tokens, 4),
        "num_warps": min(max(block_n * block_d // 512, 1), 8),
    }


def plan_selective_scan_fwd(
    out, last_state, checkpoints, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus,
    reverse, save_checkpoints, steps=(None, None, None),
):  # fmt: skip
    """The launches, two when time is split, from shapes, strides and dtypes alone. steps: those of codes u, B and C."""
    (batch, channels, length), states = u.shape, A.shape[1]
    units = dev.units(channels, B, C)
    block_n, chunk = dev.power_of_two(states), checkpoint_stride(states)
    numbers = u if steps[0] is None else delta  # tiles are as wide as those of numbers
    key = dev.tuning_key(numbers, block_n, units["unit"])
    blocks = config("selective_scan_fwd", key, u.device, _default(numbers, block_n, units["unit"]))
    per_unit = triton.cdiv(units["unit"], blocks["BLOCK_D"])
    grid = (last_state.shape[0], channels // units["unit"] * per_unit)
    parts, part_tokens = 1, length
    if cu_seqlens is None:
        parts, part_tokens = _parts(grid[0] * grid[1] * blocks["num_warps"], length, chunk)
    args = dict(
        out_ptr=out, last_ptr=last_state, checkpoints_ptr=checkpoints if save_checkpoints else None, u_ptr=u,
        delta_ptr=delta, A_ptr=A, B_ptr=B, C_ptr=C, D_ptr=D, z_ptr=z, bias_ptr=delta_bias, initial_ptr=initial_state,
        cu_ptr=cu_seqlens, **dict(zip(("u_scale_ptr", "B_scale_ptr", "C_scale_ptr"), steps)), parts_ptr=None,
        sums_ptr=None, L=length, D=channels, blocks_per_unit=per_unit,
        slots=checkpoints.shape[1], part_tokens=part_tokens, **units,
        **strides("out", out, "bdl"), **strides("u", u, "bdl"), **strides("delta", delta, "bdl"),
        **strides("z", z, "bdl"), **strides("A", A, "dn"), **dev.matrix_strides("B", B), **dev.matrix_strides("C", C),
        **strides("D", D, "d"), **strides("bias", delta_bias, "d"), **strides("initial", initial_state, "bdn"),
        N=states, K=chunk, CONSTANT_B=B.dim() == 2, CONSTANT_C=C.dim() == 2, SOFTPLUS=bool(delta_softplus),
        REVERSE=bool(reverse), INT64=wide(out, u, delta, z, A[None], B, C, checkpoints), PADDED_N=block_n != states,
        PASS=0, BLOCK_N=block_n, BLOCK_D=blocks["BLOCK_D"], T=blocks["T"],
    )  # fmt: skip
    if parts == 1:
        return [Launch(_selective_scan_fwd_kernel, grid, args, blocks["num_warps"])]
    args |= {"parts_ptr": A.new_empty(batch, parts, *A.shape), "sums_ptr": A.new_empty(batch, parts, channels)}
    return [
        Launch(_selective_scan_fwd_kernel, (*grid, parts), {**args, "PASS": number}, blocks["num_warps"])
        for number in (1, 2)
    ]


def selective_scan_fwd(*args):
    """fill(out, last_state, checkpoints, *op arguments)"""
    for launch in plan_selective_scan_fwd(*args):
        launch.run()


def quantized_selective_scan_fwd(
    out, last_state, checkpoints, u, delta, A, B, C, u_scale, B_scale, C_scale, *rest
):  # fmt: skip
    """fill(out, last_state, checkpoints, *op arguments)"""
    steps = tuple(s.contiguous() for s in (u_scale, B_scale, C_scale))
    for launch in plan_selective_scan_fwd(out, last_state, checkpoints, u, delta, A, B, C, *rest, steps=steps):
        launch.run()


def _spec_int8(dtype: torch.dtype) -> Launch:
    (u, delta, A, B, _, *rest), checkpoints = dev.sample(dtype, "")
    codes, matrix = meta(*u.shape, dtype=torch.int8), meta(*B.shape, dtype=torch.int8)
    steps = meta(u.shape[1], dtype=A.dtype), *(meta(1, dtype=A.dtype) for _ in range(2))
    last = A.new_empty(u.shape[0], *A.shape)
    return plan_selective_scan_fwd(
        delta, last, checkpoints, codes, delta, A, matrix, matrix, *rest, True, False, True, steps=steps
    )[0]  # fmt: skip


def _spec(dtype: torch.dtype, options: str, number: int) -> Launch:
    inputs, checkpoints = dev.sample(dtype, options)
    u, A, initial = inputs[0], inputs[2], inputs[8]
    last = A.new_empty(u.shape[0], *A.shape) if initial is None else initial
    return plan_selective_scan_fwd(u, last, checkpoints, *inputs, options != "plain", options == "packed", True)[number]


for _name, _options, _number in (
    ("", "", 0), ("_d", "d", 0), ("_N64", "N64", 0), ("_packed", "packed", 0), ("_wide_pass1", "wide", 0),
    ("_wide_pass2", "wide", 1), ("_small_pass1", "small", 0), ("_small_pass2", "small", 1), ("_plain", "plain", 0),
):  # fmt: skip
    compile_spec(f"selective_scan_fwd{_name}")(lambda dtype, o=_options, n=_number: _spec(dtype, o, n))

compile_spec("selective_scan_fwd_int8")(_spec_int8)
