"""Selective scan, forward and backward, for a real A.

Shape letters: B batch, D channels, L length, N state size, G groups of B and C, S packed sequences, T tokens a tile.

What bounds it on an H100/H200 (predicted; never measured on a GPU): one exponential a state and token, and the
exp unit does 16 a clock and SM, so at N = 16 about 2e11 elements a second; gated bf16 moves 8 bytes an element,
which 3.35 TB/s would carry at 4e11. So everything else has to fit under the 8 clocks that a warp's exponential takes.

How the work is split: a program owns BLOCK_D channels of one batch row (or packed sequence) and walks through time,
so B and C are read once for BLOCK_D channels. Blocks never straddle two groups.

What stays in registers: tiles are [BLOCK_N, BLOCK_D], channels fastest, which makes Triton give a thread one channel
with all its states (at N = 16 and BLOCK_D = 32 x num_warps): the sum over N needs no shuffle, and u, delta, z and
out move as one vector of T tokens a thread. The T tokens of a tile are unrolled and picked out of registers for free;
B_t and C_t go through shared memory to all threads (4 vector reads each a token). What the compiler makes of it
for sm_90, bf16, N = 16, BLOCK_D = 32, one warp: 88 registers at T = 4, no spill, a token's 64 FMUL and FFMA for its
16 exponentials a thread.

Backward: the sequence is walked from its end, chunk by chunk (checkpoints, ops/selective_scan.py). In a chunk the
states at every T-th token are recomputed into a scratch buffer, then tile by tile those of each token into registers.
Three exponentials a state and token; but the sums of dB and dC over the block's channels, 5 shuffles a state for 32
channels each, weigh more: about 160 shuffles a warp and token at N = 16, hence about 5e10 elements a second predicted.
dB and dC leave as one partial sum a block, summed afterwards in a fixed order; nothing is atomic.

Memory besides inputs and outputs (floats): partial dB and dC together at most B D L; scratch at most B D L or 32 MiB,
whichever is more (rows are taken in turns by fewer programs when it would be more).

Not here: splitting one sequence over several programs when B x D is too small to fill the GPU (below about 8,000
channels in all), and polynomial exponentials on the FMA pipes, worth at most 15 % by the count above.
"""

import math

import torch
import triton
import triton.language as tl

from .._packing import checkpoint_count, checkpoint_stride
from .common import LN2, LOG2E, Launch, compile_spec, index, meta, pick, put, sigmoid, silu_slope, softplus, strides, wide
from .tuning import config

SCRATCH_FLOOR = 32 * 2**20 // 4


# --- device functions that forward and backward share -----------------------------------------------------------------


@triton.jit
def _bounds(cu_ptr, row, L):
    """[begin, end) of a batch row or packed sequence, and its batch row. Bad cu_seqlens never lead out of bounds."""
    if cu_ptr is None:
        return 0, L, row
    begin = tl.minimum(tl.maximum(tl.load(cu_ptr + row).to(tl.int32), 0), L)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + row + 1).to(tl.int32), begin), L)
    return begin, end, 0


@triton.jit
def _channels(block, unit, blocks_per_unit, BLOCK_D: tl.constexpr):
    """(channel numbers, which of them exist) of a block; a unit is a run of channels with one group of B and of C."""
    local = (block % blocks_per_unit) * BLOCK_D + tl.arange(0, BLOCK_D)
    return block // blocks_per_unit * unit + local, local < unit


@triton.jit
def _decay_rates(A_ptr, offsets, mask):
    """A log2(e), [BLOCK_N, BLOCK_D]; finite, so that the masked step size 0 gives a decay of 1 whatever A is."""
    A = tl.load(A_ptr + offsets, mask=mask, other=0.0) * LOG2E
    A = tl.where(A < -3.0e38, -3.0e38, A)
    return tl.where(A > 3.0e38, 3.0e38, A)


@triton.jit
def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
    """(raw, d): raw = delta + bias, d = softplus(raw) or raw."""
    raw = delta + bias[None, :]
    if SOFTPLUS:
        return raw, softplus(raw)
    return raw, raw


@triton.jit
def _advance(h, A, d, du, b):
    """exp(d A) h + d u B of one token; d, du [BLOCK_D], the rest [BLOCK_N, BLOCK_D] or broadcast to it."""
    return tl.exp2(d[None, :] * A) * h + du[None, :] * b


@triton.jit
def _token(tile, constant, i, rows, CONSTANT: tl.constexpr):
    """B or C of token i of the tile [T, BLOCK_N]: [BLOCK_N, 1]; or the constant [BLOCK_N, BLOCK_D]."""
    if CONSTANT:
        return constant
    return pick(tile, i, rows)[:, None]


@triton.jit
def _over_states(x, in_n, PADDED: tl.constexpr):
    """Sum over N: [BLOCK_D]. Padded states are zero, or NaN where 0 x inf came up: they are left out."""
    if PADDED:
        x = tl.where(in_n[:, None], x, 0.0)
    return tl.sum(x, axis=0)


@triton.jit
def _over_channels(x, in_d, PADDED: tl.constexpr):
    """Sum over the block's channels: [BLOCK_N]."""
    if PADDED:
        x = tl.where(in_d[None, :], x, 0.0)
    return tl.sum(x, axis=1)


@triton.jit
def _load_matrix(ptr, t0, stride_l, offsets, in_t, in_n, valid, dtype: tl.constexpr):
    """A tile of B or C [T, BLOCK_N], zero outside the sequence (a neighbour's NaN must not come in)."""
    tile = tl.load(ptr + t0 * stride_l + offsets, mask=in_t[:, None] & in_n[None, :], other=0.0)
    return tl.where(valid[:, None], tile.to(dtype), 0.0)


# --- forward ------------------------------------------------------------------------------------------------------------


@triton.jit
def _selective_scan_fwd_kernel(
    out_ptr, last_ptr, checkpoints_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr,
    cu_ptr, L, D, unit, blocks_per_unit, units_per_group_B, units_per_group_C, slots,
    stride_out_b, stride_out_d, stride_out_l, stride_u_b, stride_u_d, stride_u_l,
    stride_delta_b, stride_delta_d, stride_delta_l, stride_z_b, stride_z_d, stride_z_l, stride_A_d, stride_A_n,
    stride_B_b, stride_B_g, stride_B_n, stride_B_l, stride_C_b, stride_C_g, stride_C_n, stride_C_l,
    stride_D_d, stride_bias_d, stride_initial_b, stride_initial_d, stride_initial_n,
    N: tl.constexpr, K: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, INT64: tl.constexpr, PADDED_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = A_ptr.dtype.element_ty
    block, row = tl.program_id(0), tl.program_id(1)
    begin, end, b = _bounds(cu_ptr, row, L)
    b = tl.cast(b, tl.int64)
    d_index, in_d = _channels(block, unit, blocks_per_unit, BLOCK_D)
    d_index, n, rows = index(d_index, INT64), tl.arange(0, BLOCK_N), tl.arange(0, T)
    in_n = n < N
    in_nd = in_n[:, None] & in_d[None, :]
    n_, rows_ = index(n, INT64), index(rows, INT64)
    group = block // blocks_per_unit

    u_tile = rows_[:, None] * stride_u_l + d_index[None, :] * stride_u_d  # [T, BLOCK_D]
    delta_tile = rows_[:, None] * stride_delta_l + d_index[None, :] * stride_delta_d  # [T, BLOCK_D]
    out_tile = rows_[:, None] * stride_out_l + d_index[None, :] * stride_out_d  # [T, BLOCK_D]
    z_tile = rows_[:, None] * stride_z_l + d_index[None, :] * stride_z_d  # [T, BLOCK_D]
    B_tile = rows_[:, None] * stride_B_l + n_[None, :] * stride_B_n  # [T, BLOCK_N]
    C_tile = rows_[:, None] * stride_C_l + n_[None, :] * stride_C_n  # [T, BLOCK_N]
    state = d_index[None, :] * N + n_[:, None]  # [BLOCK_N, BLOCK_D], in contiguous (D, N)
    u_ptr += b * stride_u_b
    delta_ptr += b * stride_delta_b
    out_ptr += b * stride_out_b

    A = _decay_rates(A_ptr, d_index[None, :] * stride_A_d + n_[:, None] * stride_A_n, in_nd)  # [BLOCK_N, BLOCK_D]
    bias = tl.zeros([BLOCK_D], acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d_index * stride_bias_d, mask=in_d, other=0.0)  # [BLOCK_D]
    if D_ptr is not None:
        skip = tl.load(D_ptr + d_index * stride_D_d, mask=in_d, other=0.0)  # [BLOCK_D]
    if CONSTANT_B:
        B = tl.load(B_ptr + d_index[None, :] * stride_B_b + n_[:, None] * stride_B_g, mask=in_nd, other=0.0).to(acc)
    else:
        B_ptr += b * stride_B_b + (group // units_per_group_B).to(tl.int64) * stride_B_g
    if CONSTANT_C:
        C = tl.load(C_ptr + d_index[None, :] * stride_C_b + n_[:, None] * stride_C_g, mask=in_nd, other=0.0).to(acc)
    else:
        C_ptr += b * stride_C_b + (group // units_per_group_C).to(tl.int64) * stride_C_g
    h = tl.zeros([BLOCK_N, BLOCK_D], acc)
    if initial_ptr is not None:
        initial = d_index[None, :] * stride_initial_d + n_[:, None] * stride_initial_n
        h = tl.load(initial_ptr + tl.cast(row, tl.int64) * stride_initial_b + initial, mask=in_nd, other=0.0)

    first_tile = begin // T
    tiles = tl.where(end > begin, tl.cdiv(end, T) - first_tile, 0)
    for k in range(tiles):
        t0 = (first_tile + (tiles - 1 - k if REVERSE else k)) * T
        t = t0 + rows
        valid, in_t = (t >= begin) & (t < end), t < L
        loads, stores = in_t[:, None] & in_d[None, :], valid[:, None] & in_d[None, :]
        if checkpoints_ptr is not None:
            entry = tl.minimum(t0 + T, L) - 1 if REVERSE else t0
            enters = ((entry + 1) % K == 0) | (entry == L - 1) if REVERSE else entry % K == 0
            if enters & (entry >= begin) & (entry < end):
                slot = (b * slots + t0 // K) * D * N
                tl.store(checkpoints_ptr + slot + state, h, mask=in_nd)
        t0_ = index(t0, INT64)
        u = tl.load(u_ptr + t0_ * stride_u_l + u_tile, mask=loads, other=0.0).to(acc)  # [T, BLOCK_D]
        delta = tl.load(delta_ptr + t0_ * stride_delta_l + delta_tile, mask=loads, other=0.0).to(acc)  # [T, BLOCK_D]
        raw, d = _step_size(delta, bias, SOFTPLUS)
        d = tl.where(stores, d, 0.0)  # a step of size 0 that adds 0: the state stays
        du = tl.where(stores, d * u, 0.0)
        if CONSTANT_B:
            B_t = B
        else:
            B_t = _load_matrix(B_ptr, t0_, stride_B_l, B_tile, in_t, in_n, valid, acc)  # [T, BLOCK_N]
        if CONSTANT_C:
            C_t = C
        else:
            C_t = _load_matrix(C_ptr, t0_, stride_C_l, C_tile, in_t, in_n, valid, acc)  # [T, BLOCK_N]
        y = tl.zeros([T, BLOCK_D], acc)
        for step in tl.static_range(T):
            i: tl.constexpr = T - 1 - step if REVERSE else step
            h = _advance(h, A, pick(d, i, rows), pick(du, i, rows), _token(B_t, B_t, i, rows, CONSTANT_B))
            y_i = _over_states(h * _token(C_t, C_t, i, rows, CONSTANT_C), in_n, PADDED_N)
            y = put(y, i, rows, y_i)
        if D_ptr is not None:
            y += skip[None, :] * u
        if z_ptr is not None:
            z = tl.load(z_ptr + b * stride_z_b + t0_ * stride_z_l + z_tile, mask=loads, other=0.0).to(acc)  # [T, BLOCK_D]
            y *= z * sigmoid(z)
        tl.store(out_ptr + t0_ * stride_out_l + out_tile, y.to(out_ptr.dtype.element_ty), mask=stores)
    tl.store(last_ptr + tl.cast(row, tl.int64) * D * N + state, h, mask=in_nd)


# --- launchers ----------------------------------------------------------------------------------------------------------


def _groups(matrix: torch.Tensor) -> int:
    return 1 if matrix.dim() == 2 else matrix.shape[1]


def _matrix_strides(name: str, matrix: torch.Tensor) -> dict[str, int]:
    """A constant (D, N) uses the first two places of (b, g, n, l) for its own two strides."""
    values = (*matrix.stride(), 0, 0) if matrix.dim() == 2 else matrix.stride()
    return {f"stride_{name}_{axis}": value for axis, value in zip("bgnl", values)}


def _shape(u, A, B, C):
    """How channels fall into blocks: (channels of a unit, units a group of B, units a group of C, units)."""
    channels = u.shape[1]
    units = math.lcm(_groups(B), _groups(C))
    return channels // units, units // _groups(B), units // _groups(C), units


def _power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def _fwd_config(u, A, unit: int) -> dict:
    """16 states a thread; at least one warp across the channels, where there are that many."""
    block_n = _power_of_two(A.shape[1])
    block_d = min(_power_of_two(unit), 64 if block_n < 16 else 32)
    along_time = u.stride(2) == 1 and u.shape[2] > 1
    default = {
        "BLOCK_D": block_d,
        "T": (4 if u.dtype == torch.float64 or block_n > 32 else 8) if along_time else 2,
        "num_warps": min(max(block_n * block_d // 512, 1), 16),
    }
    key = f"{str(u.dtype)[6:]}-N{block_n}-D{min(block_d, 32)}-{'l' if along_time else 'd'}"
    return {"BLOCK_N": block_n, **config("selective_scan_fwd", key, u.device, default)}


def plan_selective_scan_fwd(
    out, last_state, checkpoints, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus,
    reverse, save_checkpoints, *, blocks=None,
):  # fmt: skip
    unit, units_B, units_C, units = _shape(u, A, B, C)
    blocks = dict(_fwd_config(u, A, unit) if blocks is None else blocks)
    num_warps = blocks.pop("num_warps")
    per_unit = triton.cdiv(unit, blocks["BLOCK_D"])
    args = dict(
        out_ptr=out, last_ptr=last_state, checkpoints_ptr=checkpoints if save_checkpoints else None, u_ptr=u,
        delta_ptr=delta, A_ptr=A, B_ptr=B, C_ptr=C, D_ptr=D, z_ptr=z, bias_ptr=delta_bias, initial_ptr=initial_state,
        cu_ptr=cu_seqlens, L=u.shape[2], D=u.shape[1], unit=unit, blocks_per_unit=per_unit,
        units_per_group_B=units_B, units_per_group_C=units_C, slots=checkpoints.shape[1],
        **strides("out", out, "bdl"), **strides("u", u, "bdl"), **strides("delta", delta, "bdl"),
        **strides("z", z, "bdl"), **strides("A", A, "dn"), **_matrix_strides("B", B), **_matrix_strides("C", C),
        **strides("D", D, "d"), **strides("bias", delta_bias, "d"), **strides("initial", initial_state, "bdn"),
        N=A.shape[1], K=checkpoint_stride(A.shape[1]), CONSTANT_B=B.dim() == 2, CONSTANT_C=C.dim() == 2,
        SOFTPLUS=bool(delta_softplus), REVERSE=bool(reverse), INT64=wide(out, u, delta, z, B, C, checkpoints),
        PADDED_N=blocks["BLOCK_N"] != A.shape[1], **blocks,
    )  # fmt: skip
    return Launch(_selective_scan_fwd_kernel, (units * per_unit, last_state.shape[0]), args, num_warps)


def selective_scan_fwd(*args):
    """fill(out, last_state, checkpoints, *op arguments)"""
    launch = plan_selective_scan_fwd(*args)
    if launch.grid[1]:
        launch.run()
