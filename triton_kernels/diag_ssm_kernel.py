"""Convolution kernels of diagonal state space models: sums over states of powers, and the transposed sums over time.

Shape letters: M rows of a head, H heads, N states, L length, F fine and Q coarse powers, S parts of the coarse ones.

    powers_sum   y[l] = Re sum_n w_n a_n^l            moments   m0_n = sum_l g[l] a_n^l,  m1_n = sum_l l g[l] a_n^(l-1)

With l = q F + j, a^l = a^(q F) a^j, so that y is the real part of a product [Q, N] @ [N, F]; m0 is sum_q a^(q F) s[q],
s a product [Q, F] @ [F, N], and m1 the same of (l + 1) g[l + 1]: without a division by a, which may be 0.

The two-level exponent: l log2|a| and l arg(a) / 2 pi are multiplied in float64, of which what is left of the binary
point becomes an exponent or goes, and the rest is small enough for short series in float32. So the error does not grow
with l, and nothing is stored: both levels are computed where they are used, from float64 tables (H, N). Memory: those,
and in the backward 8 S M H N partial sums, S = 1 where that is more than 64 WANTED numbers.

Never measured. What should bound it on an H100/H200: the powers, (F + Q) / (F Q) of two numbers a state and element, of
some 45 instructions each; at F = Q = 64 twice as long as the products, 2 N multiply-adds an element forward and 4 N
backward, each three of tf32 (of float64 on the units for that).

How the work is split: forward a program has Q coarse rows of a row and all fine columns, and walks over the states, 8
at a time; the accumulator [Q, F] stays in registers. Backward a program has 8 states of a row and one part of its
coarse rows; its fine powers stay where they are for the whole of the walk. Real and imaginary parts lie side by side,
so that one product does both: the imaginary part of a wave is the real part of one a quarter of a turn behind.

Determinism: every sum has a fixed order; S depends on the shapes alone.
"""

import math

import torch
import triton
import triton.language as tl

from .. import _library
from ..ops import _diag_ssm
from .common import Launch, compile_spec, meta
from .tuning import config

__all__ = ["diag_ssm_kernel_bwd", "diag_ssm_kernel_fwd"]

LN2: tl.constexpr = tl.constexpr(math.log(2))
TAU: tl.constexpr = tl.constexpr(2 * math.pi)
LOWEST = -1e4  # log2 of what stands for 0: its first power is 0 in every dtype, and 0 times it is no NaN


# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _wave(size, angle, REAL: tl.constexpr):
    """2^size cos(2 pi angle) of float64 numbers, as REAL: Taylor's series, within an ulp where a fraction ends."""
    DOUBLE: tl.constexpr = REAL == tl.float64
    EXPONENTIAL: tl.constexpr = 13 if DOUBLE else 7  # terms
    CIRCULAR: tl.constexpr = 8 if DOUBLE else 4
    whole = tl.floor(size + 0.5)
    y = (size - whole).to(REAL) * LN2
    quarter = tl.floor(angle * 4 + 0.5)
    x = (angle - quarter * 0.25).to(REAL) * TAU  # at most an eighth of a turn
    z = x * x
    power = y * 0 + 1
    for i in tl.static_range(EXPONENTIAL):
        power = 1 + power * y * (1.0 / (EXPONENTIAL - i))
    sine, cosine = z * 0 + 1, z * 0 + 1
    for i in tl.static_range(CIRCULAR):  # the coefficients in one expression each: a variable would round them
        sine = 1 - sine * z * (1.0 / ((2 * (CIRCULAR - i)) * (2 * (CIRCULAR - i) + 1)))
        cosine = 1 - cosine * z * (1.0 / ((2 * (CIRCULAR - i)) * (2 * (CIRCULAR - i) - 1)))
    turn = (quarter - 4 * tl.floor(quarter * 0.25)).to(tl.int32)
    value = power * tl.where(turn % 2 == 1, x * sine, cosine)
    value = tl.where((turn == 1) | (turn == 2), -value, value)
    if DOUBLE:
        bits = (tl.minimum(tl.maximum(whole, -1023.0), 1024.0).to(tl.int64) + 1023) << 52
    else:
        bits = (tl.minimum(tl.maximum(whole, -127.0), 128.0).to(tl.int32) + 127) << 23
    return value * bits.to(REAL, bitcast=True)


@triton.jit
def _columns(first, N, BLOCK_N: tl.constexpr):
    """Of 2 BLOCK_N columns: (state, whether there is one, the part of a turn that it lags: imaginary parts last)."""
    column = tl.arange(0, 2 * BLOCK_N)
    n = first + column % BLOCK_N
    return n, n < N, (column // BLOCK_N).to(tl.float64) * 0.25


# --- the sum over states --------------------------------------------------------------------------------------------


@triton.jit
def _powers_sum_kernel(
    out_ptr, size_ptr, angle_ptr, rate_ptr, turns_ptr, H, N, L, blocks,
    ADD: tl.constexpr, BACKWARDS: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (M H, L) of w (M H, N). Grid (M H blocks,). BACKWARDS: l counts from the end. ADD: to what is there."""
    real: tl.constexpr = out_ptr.dtype.element_ty
    row, block = tl.cast(tl.program_id(0) // blocks, tl.int64), tl.program_id(0) % blocks
    q, j = block * Q + tl.arange(0, Q), tl.arange(0, F)
    coarse, fine = (q * F).to(tl.float64)[:, None], j.to(tl.float64)[None, :]
    y = tl.zeros([Q, F], real)
    for first in tl.range(0, N, BLOCK_N, num_stages=1):
        n, here, lag = _columns(first, N, BLOCK_N)
        rate = tl.load(rate_ptr + row % H * N + n, mask=here, other=0.0)  # [2 BLOCK_N]
        turns = tl.load(turns_ptr + row % H * N + n, mask=here, other=0.0)
        size = tl.load(size_ptr + row * N + n, mask=here, other=-1e4)
        angle = tl.load(angle_ptr + row * N + n, mask=here, other=0.0) + lag  # the negative of the imaginary part
        left = _wave(size[None, :] + rate[None, :] * coarse, angle[None, :] + turns[None, :] * coarse, real)
        right = _wave(rate[:, None] * fine, turns[:, None] * fine - lag[:, None], real)  # [2 BLOCK_N, F]
        y = tl.dot(left, right, y, input_precision=PRECISION, out_dtype=real)
    place = q[:, None] * F + j[None, :]
    inside = place < L
    to = out_ptr + row * L + (L - 1 - place if BACKWARDS else place)
    if ADD:
        y += tl.load(to, mask=inside, other=0.0)  # [Q, F]
    tl.store(to, y, mask=inside)


# --- the sums over time ---------------------------------------------------------------------------------------------


@triton.jit
def _moments_kernel(
    partial_ptr, g_ptr, rate_ptr, turns_ptr, H, N, L, rows, parts, walk, blocks,
    BACKWARDS: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (S, 2, 2, 2, M H, N) of g (M H, L): of m0 and m1, the sums with the real and the imaginary parts of the
    coarse powers, of s's real and imaginary parts. Grid (M H blocks S,)."""
    real: tl.constexpr = g_ptr.dtype.element_ty
    program = tl.program_id(0)
    part, row = program % parts, tl.cast(program // parts // blocks, tl.int64)
    n, here, lag = _columns(program // parts % blocks * BLOCK_N, N, BLOCK_N)
    rate = tl.load(rate_ptr + row % H * N + n, mask=here, other=0.0)[None, :]  # [1, 2 BLOCK_N]
    turns = tl.load(turns_ptr + row % H * N + n, mask=here, other=0.0)[None, :]
    j, r = tl.arange(0, F), tl.arange(0, 2 * Q)
    fine = j.to(tl.float64)[:, None]
    table = _wave(rate * fine, turns * fine - lag[None, :], real)  # [F, 2 BLOCK_N]
    by_re, by_im = tl.zeros([2, 2 * BLOCK_N], real), tl.zeros([2, 2 * BLOCK_N], real)
    for turn in tl.range(walk, num_stages=1):
        begin = ((part * walk + turn) * Q + r % Q) * F  # [2 Q]: the rows of m0, then those of m1
        l = begin[:, None] + j[None, :] + (r // Q)[:, None]
        at = g_ptr + row * L + (L - 1 - l if BACKWARDS else l)
        g = tl.load(at, mask=l < L, other=0.0)  # [2 Q, F]
        s = tl.dot(tl.where((r < Q)[:, None], g, g * l.to(real)), table, input_precision=PRECISION, out_dtype=real)
        coarse = tl.where(begin < L, begin, 0).to(tl.float64)[:, None]  # a power beyond L may be infinite
        re = s * _wave(rate * coarse, turns * coarse, real)  # [2 Q, 2 BLOCK_N]
        im = s * _wave(rate * coarse, turns * coarse - 0.25, real)
        by_re += tl.sum(tl.reshape(re, [2, Q, 2 * BLOCK_N]), axis=1)
        by_im += tl.sum(tl.reshape(im, [2, Q, 2 * BLOCK_N]), axis=1)
    size = tl.cast(rows, tl.int64) * N
    place = (tl.arange(0, 2 * BLOCK_N) // BLOCK_N * size + row * N + n)[None, :]
    to = partial_ptr + part * 8 * size + tl.arange(0, 2)[:, None] * 4 * size + place
    tl.store(to, by_re, mask=here[None, :])
    tl.store(to + 2 * size, by_im, mask=here[None, :])


# --- launchers ------------------------------------------------------------------------------------------------------

WANTED = 4 * 132  # programs, four a multiprocessor of an H100/H200


def _blocks(kernel: str, x: torch.Tensor, states: int, length: int) -> dict[str, int]:
    """F, Q, BLOCK_N and num_warps, for x (M, H, *) in the dtype of the computation."""
    bounded = lambda size, most: max(16, min(most, triton.next_power_of_2(max(1, size))))
    fine = bounded(math.isqrt(length), 64)
    rows = bounded(triton.cdiv(length, fine), 64 // (1 + (kernel == "moments")) // (1 + (x.dtype == torch.float64)))
    default = {"F": fine, "Q": rows, "BLOCK_N": 8, "num_warps": 4}  # more states spill on sm_90
    return config(kernel, f"{str(x.dtype)[6:]}-N{triton.next_power_of_2(states)}", x.device, default)


def _precision(x):
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def plan_powers_sum(out, size, angle, rate, turns, *, backwards=False, add=False) -> Launch:
    """The launch, from shapes and dtypes alone: out (M, H, L), the logarithms of w and a, contiguous."""
    (rows, heads, length), states = out.shape, rate.shape[1]
    blocks = _blocks("powers_sum", out, states, length)
    warps = blocks.pop("num_warps")
    count = triton.cdiv(length, blocks["F"] * blocks["Q"])
    args = dict(
        out_ptr=out, size_ptr=size, angle_ptr=angle, rate_ptr=rate, turns_ptr=turns, H=heads, N=states, L=length,
        blocks=count, ADD=add, BACKWARDS=backwards, PRECISION=_precision(out), **blocks,
    )  # fmt: skip
    return Launch(_powers_sum_kernel, (rows * heads * count,), args, warps)


def plan_moments(g, rate, turns, *, backwards=False) -> Launch:
    """The launch, whose first argument holds the partial sums: g (M, H, L), contiguous."""
    (rows, heads, length), states = g.shape, rate.shape[1]
    blocks = _blocks("moments", g, states, length)
    warps = blocks.pop("num_warps")
    count, coarse = triton.cdiv(states, blocks["BLOCK_N"]), triton.cdiv(length, blocks["F"] * blocks["Q"])
    parts = max(1, min(coarse, WANTED // (rows * heads * count)))
    walk = triton.cdiv(coarse, parts)
    parts = triton.cdiv(coarse, walk)
    args = dict(
        partial_ptr=g.new_empty(parts, 2, 2, 2, rows, heads, states), g_ptr=g, rate_ptr=rate, turns_ptr=turns, H=heads,
        N=states, L=length, rows=rows * heads, parts=parts, walk=walk, blocks=count, BACKWARDS=backwards,
        PRECISION=_precision(g), **blocks,
    )  # fmt: skip
    return Launch(_moments_kernel, (rows * heads * count * parts,), args, warps)


def _logarithms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log2 |x|, arg(x) / 2 pi), float64 and contiguous."""
    return x.abs().log2().clamp(min=LOWEST).contiguous(), (x.angle() / (2 * math.pi)).contiguous()


def powers_sum(w, a, length, dtype, from_end=None):
    """Re sum_n w_n a_n^l, (M, H, L), of w (M, H, N) and a (H, N); of the states `from_end`, a_n^(L - 1 - l)."""
    out, of_a = torch.empty(*w.shape[:2], length, dtype=dtype, device=w.device), _logarithms(a)
    if from_end is None:
        plan_powers_sum(out, *_logarithms(w), *of_a).run()
    else:
        plan_powers_sum(out, *_logarithms(w.masked_fill(from_end, 0)), *of_a).run()
        plan_powers_sum(out, *_logarithms(w.masked_fill(~from_end, 0)), *of_a, backwards=True, add=True).run()
    return out


def moments(g, a, from_end=None):
    """(m0, m1) of g (M, H, L), each (M, H, N) in a's dtype; of the states `from_end` with l counted from the end."""

    def run(**options):
        launch = plan_moments(g.contiguous(), *_logarithms(a), **options)
        launch.run()
        (rr, ri), (ir, ii) = launch.args["partial_ptr"].to(torch.float64).sum(0).permute(1, 2, 0, 3, 4, 5)
        return torch.complex(rr - ii, ri + ir) if a.is_complex() else rr  # [2, M, H, N]

    return run() if from_end is None else torch.where(from_end, run(backwards=True), run())


@_library.without_autocast
def diag_ssm_kernel_fwd(*args):
    return _diag_ssm.kernel_fwd(*args, powers_sum=powers_sum)


@_library.without_autocast
def diag_ssm_kernel_bwd(*args):
    return _diag_ssm.kernel_bwd(*args, moments=moments)


def _spec(kind: str, dtype: torch.dtype) -> Launch:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, table = meta(1, 1024, 16384, dtype=real), meta(1024, 64, dtype=torch.float64)
    if kind == "moments":
        return plan_moments(x, table, table)
    return plan_powers_sum(x, table[None], table[None], table, table)


for _kind in ("powers_sum", "moments"):
    compile_spec(_kind)(lambda dtype, kind=_kind: _spec(kind, dtype))
