"""What the kernels of ssd_scan share: windows of tokens, step sizes and decays, products, states between windows.

Shape letters: B batch, L length, H heads, P head dim, G groups, N states, S packed sequences, Q tokens of a chunk, K of
a segment. States are [BLOCK_N, BLOCK_P]; the buffers that hold them between kernels (slots, H, N, P).

Windows. Rows, or packed sequences, are cut where the token's number is a multiple of K (or of Q: K is one of Q's).
Window w of sequence i has the slot w + i, which no other has, since neither decreases along the tokens; L / K + S slots
hold all, with gaps. A kernel finds i by bisection, so that no sequence's length is needed on the host.

Decays are powers of two. A running sum of 64 logarithms loses the digits of the weak ones behind a strong one (90 x
2^-24 = 5e-6). It is kept in two parts, multiples of 2^-8, which float32 adds without error up to 2^15, and what is
left, which stays below 1/2; differences of the parts have an error of 2^-25. Logarithms below -256 are cut there: their
decay is 0. So is one where seq_idx changes, which masks every pair across the boundary; nothing else has to know of
sequences.
"""

import torch
import triton
import triton.language as tl

from .common import LOG2E, meta, sigmoid, softplus, strides
from .fft_device import INTERPRETED
from .scan_device import bounds

TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float32, torch.bfloat16: tl.bfloat16}

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def window_of(cu_ptr, slot, S, L, windows, K):
    """(batch row, sequence, window, [begin, end) of its tokens, [first, last) of its sequence's).

    The end of a slot that no window has is -1.
    """
    if cu_ptr is None:
        sequence, window = slot // windows, slot % windows
        first, last, row = bounds(cu_ptr, sequence, L)
    else:
        low, high = slot * 0, slot * 0 + S - 1  # the last sequence whose first slot is not after this one
        while low < high:
            middle = (low + high + 1) // 2
            after = bounds(cu_ptr, middle, L)[0] // K + middle > slot
            low, high = tl.where(after, low, middle), tl.where(after, middle - 1, high)
        sequence, window = low, slot - low
        first, last, row = bounds(cu_ptr, sequence, L)
    begin, end = tl.maximum(first, window * K), tl.minimum(last, (window + 1) * K)
    exists = (window * K < last) | (window == first // K)
    return row, sequence, window, begin, tl.where(exists, tl.maximum(begin, end), -1), first, last


@triton.jit
def operand(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of a product, rounded as a GPU does.

    The interpreter keeps bfloat16 as integers and truncates: there it is a float32 of eight bits (Dekker's splitting).
    """
    if INTERPRETED and OPERAND == tl.bfloat16:
        x = x.to(tl.float32)
        high = x * 65537.0
        return tl.where(tl.abs(x) < 1e33, high - (high - x), x)
    elif PRECISION == "tf32" and x.dtype == tl.float32:  # the matrix unit would cut the bits off
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(tl.abs(x) < 1e38, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)
    else:
        return x.to(OPERAND)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b of operands."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_tile(rows, start, i, x, valid, in_x):
    """[Q, X] of tokens start + i, out of (pointer, stride of tokens, of the other axis); zeros outside.

    The scalar part of the offset has 64 bits, and is kept apart: what varies by thread then stays the same in a loop.
    """
    at = rows[0] + tl.cast(start, tl.int64) * rows[1] + (i[:, None] * rows[1] + x[None, :] * rows[2])
    return tl.load(at, mask=valid[:, None] & in_x[None, :], other=0.0)


@triton.jit
def gated(dout, z, start, i, p, valid, in_p, OPERAND: tl.constexpr, PRECISION: tl.constexpr, acc: tl.constexpr):
    """dY, dout times z's gate if there is one, as an operand [Q, BLOCK_P]."""
    dy = load_tile(dout, start, i, p, valid, in_p)
    if z[0] is not None:
        gate = load_tile(z, start, i, p, valid, in_p).to(acc)
        dy = dy.to(acc) * gate * sigmoid(gate)
    return operand(dy, OPERAND, PRECISION)


@triton.jit
def states_of(
    before_ptr, after_ptr, slot, head, H, n, p, N: tl.constexpr, P: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before a chunk and the gradient of that after it, as operands [BLOCK_N, BLOCK_P]."""
    at = (tl.cast(slot, tl.int64) * H + head) * (N * P) + (n[:, None] * P + p[None, :])
    inside = (n < N)[:, None] & (p < P)[None, :]
    state = operand(tl.load(before_ptr + at, mask=inside, other=0.0), OPERAND, PRECISION)
    return state, operand(tl.load(after_ptr + at, mask=inside, other=0.0), OPERAND, PRECISION)


@triton.jit
def limited(raw, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """(d before the limits, d) of dt + dt_bias."""
    free = raw
    if SOFTPLUS:
        free = softplus(raw)
    d = tl.where(free < LOW, tl.full(free.shape, LOW, free.dtype), free)
    return free, tl.where(d > HIGH, tl.full(free.shape, HIGH, free.dtype), d)


@triton.jit
def changes(seq, t, valid, first):
    """Where another sequence begins, [Q]; seq: (pointer or None, stride)."""
    if seq[0] is None:
        return valid & False
    else:
        here = tl.load(seq[0] + t * seq[1], mask=valid, other=0)
        before = tl.load(seq[0] + (t - 1) * seq[1], mask=valid & (t > first), other=0)
        return valid & (t > first) & (here != before)


@triton.jit
def exponents(d, A, valid, changed):
    """The logarithms of the decays by two as (coarse, fine)."""
    a = tl.where(valid, d * (A * LOG2E), 0.0)
    floor: tl.constexpr = -2048.0 if d.dtype == tl.float64 else -256.0
    a = tl.where((a < floor) | changed, floor, tl.where(a > -floor, -floor, a))
    coarse = tl.floor(a * 256.0) * (1.0 / 256.0)
    return coarse, a - coarse


@triton.jit
def sums(steps, start, i, begin, end, Q: tl.constexpr):
    """(coarse, fine) sums at tokens start + i, [Q], and at the last of them; those outside have their neighbour's.

    steps: (pointer to a head's d, distance of the parts).
    """
    near = tl.minimum(tl.maximum(i, begin - start), end - 1 - start)
    last = tl.minimum(Q, end - start) - 1
    coarse, fine = steps[0] + steps[1] + start, steps[0] + 2 * steps[1] + start
    return tl.load(coarse + near), tl.load(fine + near), tl.load(coarse + last), tl.load(fine + last)


@triton.jit
def between(coarse, fine, seen, later: tl.constexpr):
    """The decay between two tokens of a chunk, [Q, Q], 0 where not `seen`; the axis of the later token is `later`."""
    if later == 0:
        gap = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    else:
        gap = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
    return tl.exp2(tl.where(seen, gap, -float("inf")))


@triton.jit
def broken(state):
    """1 when a value of the tile is NaN or Inf, else 0."""
    return tl.max(tl.where(tl.abs(state) < float("inf"), 0, 1), axis=None)


@triton.jit
def state_before(state, local_ptr, through_ptr, slot, count, H, h, at, inside, STEP: tl.constexpr):
    """The state after `count` windows, of which `slot` has the first, that begin with `state`."""
    for k in range(count):
        one = tl.cast(slot + k * STEP, tl.int64) * H + h
        through = tl.load(through_ptr + one)
        state = tl.where(through < 0, 0.0, through * state)  # a boundary, which stops NaN too
        state += tl.load(local_ptr + one * at[1] + at[0], mask=inside, other=0.0)
    return state


@triton.jit
def store_out(out, y, x, z, skip, start, i, p, valid, in_p):
    """(y + D x) silu(z) of tokens start + i, [Q, BLOCK_P]."""
    y += skip[None, :] * x
    if z[0] is not None:
        gate = load_tile(z, start, i, p, valid, in_p).to(y.dtype)
        y *= gate / (1 + tl.exp(-gate))
    at = out[0] + tl.cast(start, tl.int64) * out[1] + (i[:, None] * out[1] + p[None, :] * out[2])
    tl.store(at, y.to(out[0].dtype.element_ty), mask=valid[:, None] & in_p[None, :])


@triton.jit
def load_head(ptr, stride, h, dtype: tl.constexpr):
    """A or dt_bias of a head, [1]; 0 when absent."""
    if ptr is None:
        return tl.zeros([1], dtype)
    else:
        return tl.load(ptr + h * stride + tl.arange(0, 1))


@triton.jit
def load_skip(ptr, stride_h, stride_p, h, p, in_p, dtype: tl.constexpr):
    """D of a head, [BLOCK_P]; zeros when absent."""
    if ptr is None:
        return tl.zeros(p.shape, dtype)
    else:
        return tl.load(ptr + h * stride_h + p * stride_p, mask=in_p, other=0.0)


# --- host side ------------------------------------------------------------------------------------------------------

WANTED = 2 * 132  # programs, two a multiprocessor of an H100/H200: one waits while the other multiplies
LEAST_SEGMENT = 512


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


FEW_TOKENS = 16


def precision_of(x: torch.Tensor) -> dict:
    """float16's products are tf32's: as many bits, with the range that states need. float32's are three of tf32.

    So are those of few tokens, where one rounded term can be most of an output (one token in bfloat16: 1.2e-2).
    """
    if x.element_size() == 2 and x.shape[1] < FEW_TOKENS:
        return dict(OPERAND=tl.float32, PRECISION="tf32x3")
    precision = {torch.float16: "tf32", torch.float32: "tf32x3"}.get(x.dtype, "ieee")
    return dict(OPERAND=TYPES[x.dtype], PRECISION=precision)


def default_blocks(x: torch.Tensor, states: int) -> dict:
    """Q, BLOCK_P and num_warps: a state in 64 registers a thread of 4 warps, where the sizes allow."""
    block_n = block_of(states)
    size = 16 if x.dtype == torch.float64 else 32 if precision_of(x)["PRECISION"] == "tf32x3" else 64
    block_p = max(16, min(block_of(x.shape[3]), size, 2**15 // block_n))
    warps = 8 if block_n * block_p > 2**13 else 4
    return {"Q": size, "BLOCK_P": block_p, "num_warps": warps, "num_stages": 2}


def block_of(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def tuning_key(x: torch.Tensor, states: int) -> str:
    return f"{str(x.dtype)[6:]}-N{block_of(states)}-P{block_of(x.shape[3])}"


def segment_of(x: torch.Tensor, blocks: dict) -> int:
    """K: as many segments as give every multiprocessor its programs, a multiple of Q."""
    batch, length, heads, width = x.shape
    programs = batch * heads * triton.cdiv(width, blocks["BLOCK_P"])
    segments = max(1, min(WANTED // programs, length // LEAST_SEGMENT))
    return triton.cdiv(triton.cdiv(length, segments), blocks["Q"]) * blocks["Q"]


def windows_of(x: torch.Tensor, cu_seqlens: torch.Tensor | None, K: int) -> dict:
    """The numbers that `window_of` takes, and the slots."""
    batch, length = x.shape[:2]
    windows = triton.cdiv(length, K)
    if cu_seqlens is None:
        return dict(S=batch, windows=windows, slots=batch * windows)
    sequences = cu_seqlens.shape[0] - 1
    return dict(S=sequences, windows=windows, slots=length // K + sequences)


def common_args(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, softplus, low, high) -> dict:
    """What the kernels of the op take of its arguments."""
    skip = D if D is None or D.dim() == 2 else D[:, None].expand(-1, x.shape[3])
    return dict(
        x_ptr=x, dt_ptr=dt, A_ptr=A, B_ptr=B, C_ptr=C, D_ptr=D, z_ptr=z, bias_ptr=dt_bias, seq_ptr=seq_idx,
        cu_ptr=cu_seqlens, L=x.shape[1], H=x.shape[2], heads=x.shape[2] // B.shape[2], **strides("x", x, "blhp"),
        **strides("dt", dt, "blh"), **strides("A", A, "h"), **strides("B", B, "blgn"), **strides("C", C, "blgn"),
        **strides("D", skip, "hp"), **strides("z", z, "blhp"), **strides("bias", dt_bias, "h"),
        **strides("seq", seq_idx, "bl"), N=B.shape[3], P=x.shape[3], SOFTPLUS=softplus, LOW=low, HIGH=high,
        **precision_of(x), BLOCK_N=block_of(B.shape[3]),
    )  # fmt: skip


def chosen(kernel, arguments: dict) -> dict:
    """Those that the kernel takes."""
    return {name: arguments[name] for name in kernel.arg_names}


def sample(dtype: torch.dtype, options: str) -> tuple[tuple, tuple]:
    """(the op's arguments, (out, final_states, varlen_states)) on the meta device, 16,384 tokens of a large layer.

    "segments": few heads. "packed": cu_seqlens, seq_idx's place taken; every option there is. "wide": 64-bit offsets.
    """
    real, length = real_of(dtype), 2**22 if options == "wide" else 2**14
    H, P, G, N = 24 if options == "segments" else 128, 64, 2 if options == "packed" else 1, 128
    x, dt, matrix = (
        meta(1, length, H, P, dtype=dtype), meta(1, length, H, dtype=dtype), meta(1, length, G, N, dtype=dtype)
    )  # fmt: skip
    head = meta(H, dtype=real)
    cu = meta(9, dtype=torch.int32) if options == "packed" else None
    seq = meta(1, length, dtype=torch.int32) if options == "segments" else None
    states = meta(8 if options == "packed" else 1, H, P, N, dtype=real)
    initial = states if options in ("packed", "segments") else None
    args = (
        x, dt, head, matrix, matrix, head, x if options == "packed" else None, head, initial, seq, cu, True, 0.0,
        float("inf"),
    )  # fmt: skip
    return args, (x, meta(1, H, P, N, dtype=real), states)
