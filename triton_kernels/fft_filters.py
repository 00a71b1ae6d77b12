"""The filters of fft_conv: their spectrum, and their gradients out of the spectrum of dg; kernels and plans.

Shape letters: D channels, L length, M output length, K taps of k, N = N1 N2 points, N1 = P BLOCK, S parts of the batch.

These kernels run once a channel, whatever the batch: their operands are split (see fft_device.py) for every dtype, so
that a filter's error is float32's, and their blocks have 64 rows so that a block's operands fit in shared memory.
"""

import math

import torch
import triton
import triton.language as tl

from . import fft_device as dev
from .common import Launch, index, meta, strides, wide
from .fft_device import (
    add_product,
    add_real_part,
    first_factor,
    inverse_first_half,
    load_spectrum,
    negative,
    operand,
    second_factor,
    second_half,
    times_of,
    twiddles,
)  # fmt: skip

# --- the spectrum ---------------------------------------------------------------------------------------------------


@triton.jit
def _taps(k_ptr, stride_k_s, s, valid, K, L, CIRCULAR: tl.constexpr, INT64: tl.constexpr):
    """k[s], in mode circular the sum of k[s + i L], zero where not valid or no tap: [BLOCK, N2] like s."""
    if CIRCULAR:
        total = tl.zeros(s.shape, tl.float32)
        for begin in range(0, K, L):
            at = s + begin
            inside = valid & (at < K)
            total += tl.load(k_ptr + index(at, INT64) * stride_k_s, mask=inside, other=0.0).to(tl.float32)
        return total
    else:
        inside = valid & (s >= 0) & (s < K)
        return tl.load(k_ptr + index(s, INT64) * stride_k_s, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, N2]


@triton.jit
def _at_lag(
    k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, j, L, M, K, K_reverse, offset, CIRCULAR: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """g[j] without skip, [BLOCK, N2] like j, which lies between -N and N."""
    valid = (j < M) & (j > -M)
    s = tl.where(j < 0, j + L, j) if CIRCULAR else j + offset
    g = _taps(k_ptr, stride_k_s, s, valid, K, L, CIRCULAR, INT64)
    if reverse_ptr is not None:
        s = tl.where(j > 0, L - j, -j) if CIRCULAR else -j
        g += _taps(reverse_ptr, stride_reverse_s, s, valid, K_reverse, L, CIRCULAR, INT64)
    return g


@triton.jit
def _two_sided(
    k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, skip, n, N: tl.constexpr, L, M, K, K_reverse, offset,
    CIRCULAR: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """(g[n], g[n - N]), [BLOCK, N2] like n."""
    above = _at_lag(k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, n, L, M, K, K_reverse, offset, CIRCULAR, INT64)
    below = _at_lag(
        k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, n - N, L, M, K, K_reverse, offset, CIRCULAR, INT64
    )  # fmt: skip
    return above + tl.where(n == 0, skip, 0.0), below


@triton.jit
def _fft_conv_spectrum_kernel(
    spectrum_ptr, scale_ptr, k_ptr, reverse_ptr, skip_ptr, first_ptr, second_ptr, twiddle_ptr, L, M, K, K_reverse,
    offset, stride_k_d, stride_k_s, stride_reverse_d, stride_reverse_s, stride_skip_d,
    P: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, CIRCULAR: tl.constexpr, OPERANDS: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """spectrum (D, 2, N1, N2) of g and skip, divided by scale (D,), the sum of their magnitudes. Grid (P, D).

    A lag j below zero stands at j + N, and w^(j (k + 1/4)) = i w^((j + N) (k + 1/4)): it is imaginary there.
    """
    N1: tl.constexpr = P * BLOCK
    N: tl.constexpr = N1 * N2
    q, d = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    k_ptr += d * stride_k_d
    if reverse_ptr is not None:
        reverse_ptr += d * stride_reverse_d
    skip = 0.0
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + d * stride_skip_d).to(tl.float32)
    total = tl.zeros([BLOCK, N2], tl.float32)
    largest = tl.zeros([BLOCK, N2], tl.float32)
    for p in tl.range(P, num_stages=1):
        above, below = _two_sided(
            k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, skip, times_of(p, BLOCK, N2, 1), N, L, M, K, K_reverse,
            offset, CIRCULAR, INT64,
        )  # fmt: skip
        total += tl.abs(above) + tl.abs(below)
        largest = tl.maximum(largest, tl.maximum(tl.abs(above), tl.abs(below)))
    scale, largest = tl.sum(total), tl.max(largest)
    largest = tl.where(largest < 1e-30, 1.0, largest)
    acc_re = tl.zeros([BLOCK, N2], tl.float32)
    acc_im = tl.zeros([BLOCK, N2], tl.float32)
    for p in tl.range(P, num_stages=1):
        above, below = _two_sided(
            k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, skip, times_of(p, BLOCK, N2, 1), N, L, M, K, K_reverse,
            offset, CIRCULAR, INT64,
        )  # fmt: skip
        above, below = operand(above / largest, OPERANDS), operand(below / largest, OPERANDS)
        f_re, f_im = first_factor(first_ptr, q, p, N1, BLOCK, OPERANDS)
        acc_re = add_product(add_product(acc_re, f_re, above, OPERANDS), f_im, negative(below), OPERANDS)
        acc_im = add_product(add_product(acc_im, f_im, above, OPERANDS), f_re, below, OPERANDS)
    t_re, t_im = twiddles(twiddle_ptr, q, N1, BLOCK, N2, 1)  # [BLOCK, N2]
    second_re, second_im = second_factor(second_ptr, N2, OPERANDS)  # [N2, N2]
    g_re, g_im = second_half(acc_re, acc_im, second_re, second_im, t_re, t_im, BLOCK, N2, 1, OPERANDS)
    at = d * 2 * N + times_of(q, BLOCK, N2, 1)
    share = largest / tl.where(scale < 1e-30, 1.0, scale)
    tl.store(spectrum_ptr + at, g_re * share)
    tl.store(spectrum_ptr + N + at, g_im * share)
    if q == 0:
        tl.store(scale_ptr + d, scale)


# --- the gradients --------------------------------------------------------------------------------------------------


@triton.jit
def _fft_conv_lags_kernel(
    lags_ptr, partial_ptr, first_ptr, second_ptr, twiddle_ptr, D, parts,
    P: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """lags (D, 2, N) from the partial spectra: dg[n], and dg[n - N], which is the imaginary part. Grid (P, D)."""
    N1: tl.constexpr = P * BLOCK
    N: tl.constexpr = N1 * N2
    p, d = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    second_re, second_im = second_factor(second_ptr, N2, OPERANDS)  # [N2, N2]
    acc_re = tl.zeros([BLOCK, N2], tl.float32)
    acc_im = tl.zeros([BLOCK, N2], tl.float32)
    for q in tl.range(P, num_stages=1):
        y_re = tl.zeros([BLOCK, N2], tl.float32)
        y_im = tl.zeros([BLOCK, N2], tl.float32)
        for part in tl.range(parts, num_stages=1):
            own_re, own_im = load_spectrum(partial_ptr + (part * tl.cast(D, tl.int64) + d) * 2 * N, q, N1, BLOCK, N2, 1)
            y_re += own_re  # [BLOCK, N2]
            y_im += own_im
        t_re, t_im = twiddles(twiddle_ptr, q, N1, BLOCK, N2, 1)  # [BLOCK, N2]
        largest = tl.maximum(tl.maximum(tl.max(tl.abs(y_re)), tl.max(tl.abs(y_im))), 1e-30)
        b_re, b_im = inverse_first_half(
            y_re / largest, y_im / largest, second_re, second_im, t_re, t_im, BLOCK, N2, 1, OPERANDS
        )  # fmt: skip
        zero = tl.zeros([BLOCK, N2], tl.float32)
        acc_re += add_real_part(zero, b_re, b_im, first_ptr, q, p, N1, BLOCK, OPERANDS) * largest
        # The imaginary part of b is the real part of -i b.
        acc_im += add_real_part(zero, b_im, negative(b_re), first_ptr, q, p, N1, BLOCK, OPERANDS) * largest
    at = d * 2 * N + times_of(p, BLOCK, N2, 1)
    tl.store(lags_ptr + at, acc_re * (1.0 / N1))
    tl.store(lags_ptr + N + at, acc_im * (1.0 / N1))


@triton.jit
def _lag(lags_ptr, j, valid, N):
    """dg[j] of a channel's lags (2, N), zero where not valid."""
    return tl.load(lags_ptr + tl.where(j < 0, j + 2 * N, j), mask=valid, other=0.0)  # [BLOCK_S]


@triton.jit
def _add_up(out_ptr, partial_ptr, stride_out_d, d, D, parts):
    """out[d] from partial (S, D), in their order."""
    if out_ptr is not None:
        total = 0.0
        for part in range(parts):
            total += tl.load(partial_ptr + part * D + d)
        tl.store(out_ptr + d * stride_out_d, total.to(out_ptr.dtype.element_ty))


@triton.jit
def _fft_conv_taps_kernel(
    dk_ptr, dreverse_ptr, dskip_ptr, dbias_ptr, lags_ptr, bias_partial_ptr, skip_partial_ptr, D, L, M, K, K_reverse,
    offset, N, parts, stride_dk_d, stride_dk_s, stride_dreverse_d, stride_dreverse_s, stride_dskip_d, stride_dbias_d,
    CIRCULAR: tl.constexpr, INT64: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dk and dk_reverse out of the lags, dskip and dbias out of their partial sums. Grid (blocks of taps, D)."""
    d = tl.cast(tl.program_id(1), tl.int64)
    lags_ptr += d * 2 * N
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    for reverse in tl.static_range(2):
        out_ptr = dreverse_ptr if reverse else dk_ptr
        if out_ptr is not None:
            taps = K_reverse if reverse else K
            stride_d = stride_dreverse_d if reverse else stride_dk_d
            stride_s = stride_dreverse_s if reverse else stride_dk_s
            if CIRCULAR:
                j = s % L
                if reverse:
                    j = tl.where(j == 0, 0, L - j)
                value = _lag(lags_ptr, j, s < taps, N) + _lag(lags_ptr, j - L, (s < taps) & (j > 0), N)
            else:
                j = -s if reverse else s - offset
                value = _lag(lags_ptr, j, (j < M) & (j > -M) & (s < taps), N)
            at = d * stride_d + index(s, INT64) * stride_s
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=s < taps)
    if tl.program_id(0) == 0:
        _add_up(dskip_ptr, skip_partial_ptr, stride_dskip_d, d, D, parts)
        _add_up(dbias_ptr, bias_partial_ptr, stride_dbias_d, d, D, parts)


# --- plans ----------------------------------------------------------------------------------------------------------


def geometry(u: torch.Tensor, k: torch.Tensor, mode: str) -> tuple[int, int]:
    """(o, M)."""
    length, taps = int(u.shape[2]), int(k.shape[-1])
    return (taps - 1) // 2 if mode == "same" else 0, length + taps - 1 if mode == "full" else length


def factors_of(u: torch.Tensor, points: int, operands: str) -> dict[str, int]:
    P, block, n2 = dev.sizes(points, dev.limit(operands, u.device))
    return {"P": P, "BLOCK": block, "N2": n2}


def filter_factors_of(u: torch.Tensor, points: int, operands: str) -> dict[str, int]:
    """The same points in smaller blocks, for the kernels that hold split operands whatever the dtype of u."""
    factors = factors_of(u, points, operands)
    pieces = max(1, factors["BLOCK"] // 64)
    return {"P": factors["P"] * pieces, "BLOCK": factors["BLOCK"] // pieces, "N2": factors["N2"]}


def tables_of(factors: dict[str, int], operands: str, device: torch.device) -> dict:
    """The tables, and how kernels read them."""
    n1, n2 = factors["P"] * factors["BLOCK"], factors["N2"]
    if device.type != "meta":
        return {**dev.tables(n1, n2, operands, device), "OPERANDS": operands}
    split, half = operands == "fp16x3", torch.bfloat16 if operands == "bf16" else torch.float16
    planes, twiddle = 4 if split else 2, torch.float32 if split else torch.float16
    first, second = meta(planes, n1, n1, dtype=half), meta(planes, n2, n2, dtype=half)
    twiddles_ = meta(2, n1, n2, dtype=twiddle)
    return {"first_ptr": first, "second_ptr": second, "twiddle_ptr": twiddles_, "OPERANDS": operands}


def shape_of_spectra(channels: int, *sizes: int) -> tuple[int, ...]:
    """Of (D + E, 2, *sizes), given spectra of D channels with their scales at the begin of the E that follow. It tells
    the layouts apart: sizes are (N1, N2) of a fused transform, (N0, N1, N2) of a long one."""
    return channels + triton.cdiv(channels, 2 * math.prod(sizes)), 2, *sizes


def split_spectra(values: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(spectrum (D, 2, *sizes), scale (D,))"""
    return values[:channels], values[channels:].view(-1)[:channels]


def spectra(u, k, k_reverse, skip, mode, operands, given=None):
    """(spectrum, scale, the skip that is not in it, the launches that make it).

    A given one is there, without skip, if it is laid out as the kernels of this call read it.
    """
    factors, channels = factors_of(u, geometry(u, k, mode)[1], operands), u.shape[1]
    shape = shape_of_spectra(channels, factors["P"] * factors["BLOCK"], factors["N2"])
    if given is not None and given.shape == shape:
        return *split_spectra(given.contiguous(), channels), skip, []
    spectrum, scale = (u.new_empty(size, dtype=torch.float32) for size in ((channels, *shape[1:]), channels))
    return spectrum, scale, None, [plan_spectrum(spectrum, scale, u, k, k_reverse, skip, mode, operands)]


def plan_spectrum(spectrum, scale, u, k, k_reverse, skip, mode, operands) -> Launch:
    offset, points = geometry(u, k, mode)
    factors = filter_factors_of(u, points, operands)
    args = dict(
        spectrum_ptr=spectrum, scale_ptr=scale, k_ptr=k, reverse_ptr=k_reverse, skip_ptr=skip,
        **tables_of(factors, "fp16x3", u.device), L=u.shape[2], M=points, K=k.shape[1],
        K_reverse=0 if k_reverse is None else k_reverse.shape[1], offset=offset, **strides("k", k, "ds"),
        **strides("reverse", k_reverse, "ds"), **strides("skip", skip, "d"), **factors, CIRCULAR=mode == "circular",
        INT64=wide(k, k_reverse),
    )  # fmt: skip
    return Launch(_fft_conv_spectrum_kernel, (factors["P"], u.shape[1]), args, dev.warps(factors["BLOCK"]))


def plan_filters(
    dk, dk_reverse, dskip, dbias, lags, partial, bias_partial, skip_partial, u, mode, points, K_reverse, operands
) -> list[Launch]:  # fmt: skip
    """From the partial spectra to the lags, and from those to the filters' gradients."""
    factors, channels = filter_factors_of(u, points, operands), u.shape[1]
    offset, taps = geometry(u, dk, mode)[0], dk.shape[1]
    inverse = dict(
        lags_ptr=lags, partial_ptr=partial, **tables_of(factors, "fp16x3", u.device), D=channels,
        parts=partial.shape[0], **factors,
    )  # fmt: skip
    gather = dict(
        dk_ptr=dk, dreverse_ptr=dk_reverse, dskip_ptr=dskip, dbias_ptr=dbias, lags_ptr=lags,
        bias_partial_ptr=bias_partial, skip_partial_ptr=skip_partial, D=channels, L=u.shape[2], M=points, K=taps,
        K_reverse=K_reverse, offset=offset, N=lags.shape[2], parts=partial.shape[0], **strides("dk", dk, "ds"),
        **strides("dreverse", dk_reverse, "ds"), **strides("dskip", dskip, "d"),
        **strides("dbias", dbias, "d"), CIRCULAR=mode == "circular",
        INT64=wide(dk, dk_reverse), BLOCK_S=512,
    )  # fmt: skip
    return [
        Launch(_fft_conv_lags_kernel, (factors["P"], channels), inverse, dev.warps(factors["BLOCK"])),
        Launch(_fft_conv_taps_kernel, (triton.cdiv(max(taps, K_reverse), 512), channels), gather, 4),
    ]
