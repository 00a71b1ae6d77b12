"""What the forward and the backward scan kernel share: device functions, and how channels fall into blocks.

Shape letters: B batch, D channels, L length, N state size, G groups of B and C, T tokens a tile.
States are [BLOCK_N, BLOCK_D], channels fastest; tiles of u and its kin [T, BLOCK_D], of B and C [T, BLOCK_N].
"""

import math

import torch
import triton
import triton.language as tl

from .._packing import checkpoint_count
from .common import LOG2E, meta, pick, softplus


@triton.jit
def bounds(cu_ptr, row, L):
    """[begin, end) of a batch row or packed sequence, and its batch row. Bad cu_seqlens never lead out of bounds."""
    if cu_ptr is None:
        return 0, L, tl.cast(row, tl.int64)
    else:  # Triton compiles what follows a return, but not the branch of an `else` that is not taken
        begin = tl.minimum(tl.maximum(tl.load(cu_ptr + row).to(tl.int32), 0), L)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + row + 1).to(tl.int32), begin), L)
        return begin, end, tl.cast(0, tl.int64)


@triton.jit
def channels_of(block, unit, blocks_per_unit, BLOCK_D: tl.constexpr):
    """(channel numbers, which of them exist) of a block; a unit is a run of channels with one group of B and of C."""
    local = (block % blocks_per_unit) * BLOCK_D + tl.arange(0, BLOCK_D)
    return block // blocks_per_unit * unit + local, local < unit


@triton.jit
def decay_rates(A_ptr, offsets, mask):
    """A log2(e), [BLOCK_N, BLOCK_D]; finite, so that the masked step size 0 gives a decay of 1 whatever A is."""
    A = tl.load(A_ptr + offsets, mask=mask, other=0.0) * LOG2E
    A = tl.where(A < -3.0e38, -3.0e38, A)
    return tl.where(A > 3.0e38, 3.0e38, A)


@triton.jit
def load_channels(ptr, stride_d, d_index, in_d, dtype: tl.constexpr):
    """D or delta_bias: [BLOCK_D]; zeros when absent."""
    if ptr is None:
        return tl.zeros(d_index.shape, dtype)
    else:
        return tl.load(ptr + d_index * stride_d, mask=in_d, other=0.0)


@triton.jit
def load_tile(ptr, stride_l, stride_d, t, d_index, mask, dtype: tl.constexpr):
    """u, delta, z or dout: [T, BLOCK_D]."""
    return tl.load(ptr + t[:, None] * stride_l + d_index[None, :] * stride_d, mask=mask, other=0.0).to(dtype)


@triton.jit
def step_size(delta, bias, SOFTPLUS: tl.constexpr):
    """(raw, d): raw = delta + bias, d = softplus(raw) or raw."""
    raw = delta + bias[None, :]
    if SOFTPLUS:
        return raw, softplus(raw)
    else:
        return raw, raw


@triton.jit
def load_matrix(ptr, stride_l, stride_n, constant, t, n, in_t, in_n, valid, CONSTANT: tl.constexpr):
    """B or C: a tile [T, BLOCK_N], zero outside the sequence (a neighbour's NaN must not come in); or the constant."""
    if CONSTANT:
        return constant
    else:
        offsets = t[:, None] * stride_l + n[None, :] * stride_n
        tile = tl.load(ptr + offsets, mask=in_t[:, None] & in_n[None, :], other=0.0)
        return tl.where(valid[:, None], tile.to(constant.dtype), 0.0)


@triton.jit
def load_constant(ptr, stride_d, stride_n, d_index, n, in_nd, dtype: tl.constexpr, CONSTANT: tl.constexpr):
    """A constant B or C: [BLOCK_N, BLOCK_D]. For a grouped one a zero that only carries the dtype."""
    if CONSTANT:
        return tl.load(ptr + d_index[None, :] * stride_d + n[:, None] * stride_n, mask=in_nd, other=0.0).to(dtype)
    else:
        return tl.zeros([1, 1], dtype)


@triton.jit
def token(matrix, i, rows, CONSTANT: tl.constexpr):
    """B or C of token i: [BLOCK_N, 1], or the constant [BLOCK_N, BLOCK_D]."""
    if CONSTANT:
        return matrix
    else:
        return pick(matrix, i, rows)[:, None]


@triton.jit
def advance(h, A, d, du, b):
    """exp(d A) h + d u B of one token; d, du [BLOCK_D]."""
    return tl.exp2(d[None, :] * A) * h + du[None, :] * b


@triton.jit
def over_states(x, in_n, PADDED: tl.constexpr):
    """Sum over N: [BLOCK_D]. Padded states are zero, or NaN where 0 x inf came up: they are left out."""
    if PADDED:
        x = tl.where(in_n[:, None], x, 0.0)
    return tl.sum(x, axis=0)


@triton.jit
def over_channels(x, in_d, PADDED: tl.constexpr):
    """Sum over the block's channels: [BLOCK_N]."""
    if PADDED:
        x = tl.where(in_d[None, :], x, 0.0)
    return tl.sum(x, axis=1)


# --- host side ------------------------------------------------------------------------------------------------------


def power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def groups(matrix: torch.Tensor) -> int:
    return 1 if matrix.dim() == 2 else matrix.shape[1]


def matrix_strides(name: str, matrix: torch.Tensor) -> dict[str, int]:
    """stride_<name>_b, g, n, l; a constant (D, N) has its channel stride under b (see `load_constant`)."""
    if matrix.dim() == 4:
        values = matrix.stride()
    else:
        values = (matrix.stride(0), 0, matrix.stride(1), 0)
    return {f"stride_{name}_{axis}": value for axis, value in zip("bgnl", values)}


def units(channels: int, B: torch.Tensor, C: torch.Tensor) -> dict[str, int]:
    """How channels fall into units, which have one group of B and one of C, since blocks must not straddle two."""
    count = math.lcm(groups(B), groups(C))
    return {
        "unit": channels // count,
        "units_per_group_B": count // groups(B),
        "units_per_group_C": count // groups(C),
    }


def tuning_key(u: torch.Tensor, block_n: int, unit: int) -> str:
    time_fastest = "l" if u.stride(2) == 1 else "d"
    return f"{str(u.dtype)[6:]}-N{block_n}-D{min(power_of_two(unit), 128)}-{time_fastest}"


def sample(dtype: torch.dtype, options: str) -> tuple:
    """For the compile specs: meta tensors of a typical call up to cu_seqlens, and its checkpoints.

    options: "d" channels-last, "N64", "packed" (initial states, constant C), "wide" (64-bit offsets, 3 states),
    "small" (one short row).
    """
    real = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"packed": (1, 4096, 4096), "wide": (1, 4096, 2**20), "small": (1, 1536, 2048)}
    B, D, L = shapes.get(options, (8, 4096, 4096))
    N = {"N64": 64, "wide": 3}.get(options, 16)
    x = meta(B, L, D, dtype=dtype).transpose(1, 2) if options == "d" else meta(B, D, L, dtype=dtype)
    cu = meta(65, dtype=torch.int64) if options == "packed" else None
    initial = meta(B if cu is None else 64, D, N, dtype=real) if cu is not None else None
    C = meta(D, N, dtype=dtype) if options == "packed" else meta(B, 2, N, L, dtype=dtype)
    vector = meta(D, dtype=real)
    inputs = (x, x, meta(D, N, dtype=real), meta(B, 1, N, L, dtype=dtype), C, vector, x, vector)
    return (*inputs, initial, cu), meta(B, checkpoint_count(L, N), D, N, dtype=real)
