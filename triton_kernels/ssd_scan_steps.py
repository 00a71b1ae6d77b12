"""Step sizes of ssd_scan and the running sums of its decays within chunks, once for all that reads them.

Shape letters: B batch, L length, H heads, Q tokens of a chunk, K of a segment.

The account, a token and head: 2 bytes read, 12 written and 12 read again for each kernel that walks, of the 262 that
ssd_scan needs at least (H200: 0.02 ms for 16,384 tokens of 128 heads). In return the walks hold no softplus, which the
compiler otherwise repeats for every column of a tile, no scans, and no gather over dt's heads; they read rows.

How the work is split: a program has a chunk of 32 heads, whose dt it reads in lines and writes in rows.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, compile_spec, index, wide
from .ssd_device import changes, chosen, common_args, exponents, limited, real_of, sample, window_of, windows_of

__all__ = ["plan_steps"]


@triton.jit
def _ssd_scan_steps_kernel(
    steps_ptr, dt_ptr, A_ptr, bias_ptr, seq_ptr, cu_ptr, L, H, S, windows, size, stride_dt_b, stride_dt_l, stride_dt_h,
    stride_A_h, stride_bias_h, stride_seq_b, stride_seq_l, SOFTPLUS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, INT64: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """steps (3, B, H, L): d, and the sums' coarse and fine parts. Grid (slots, blocks of heads)."""
    row, sequence, window, begin, end, first, last = window_of(cu_ptr, tl.program_id(0), S, L, windows, Q)
    h = index(tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), INT64)
    t = window * Q + tl.arange(0, Q)
    in_h, valid = h < H, (t >= begin) & (t < end)
    t = index(t, INT64)
    inside = valid[:, None] & in_h[None, :]
    A = tl.load(A_ptr + h * stride_A_h, mask=in_h, other=0.0)  # [BLOCK_H]
    raw = tl.load(
        dt_ptr + row * stride_dt_b + t[:, None] * stride_dt_l + h[None, :] * stride_dt_h, mask=inside, other=0.0
    )  # fmt: skip
    raw = raw.to(A.dtype)  # [Q, BLOCK_H]
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + h * stride_bias_h, mask=in_h, other=0.0)[None, :]
    free, d = limited(raw, SOFTPLUS, LOW, HIGH)
    seq = (None, stride_seq_l)
    if seq_ptr is not None:
        seq = (seq_ptr + row * stride_seq_b, stride_seq_l)
    coarse, fine = exponents(d, A[None, :], inside, changes(seq, t, valid, first)[:, None])
    to = steps_ptr + (tl.cast(row, tl.int64) * H + h[None, :]) * L + t[:, None]
    size = tl.cast(size, tl.int64)
    tl.store(to, d, mask=inside)
    tl.store(to + size, tl.cumsum(coarse, axis=0), mask=inside)
    tl.store(to + 2 * size, tl.cumsum(fine, axis=0), mask=inside)


def plan_steps(args, Q) -> Launch:
    """The launch; its first argument is what the walks read."""
    x, dt, cu_seqlens = args[0], args[1], args[10]
    batch, length, heads = dt.shape
    windows = windows_of(x, cu_seqlens, Q)
    block = min(32, triton.next_power_of_2(heads))
    arguments = dict(
        common_args(*args), **windows, steps_ptr=dt.new_empty(3, batch, heads, length, dtype=real_of(dt.dtype)),
        size=dt.numel(), INT64=wide(dt), Q=Q, BLOCK_H=block,
    )  # fmt: skip
    kernel = _ssd_scan_steps_kernel
    return Launch(kernel, (windows["slots"], triton.cdiv(heads, block)), chosen(kernel, arguments), 4)


@compile_spec("ssd_scan_steps")
def _spec(dtype: torch.dtype) -> Launch:
    return plan_steps(sample(dtype, "segments")[0], 64)
