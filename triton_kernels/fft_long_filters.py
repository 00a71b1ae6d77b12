"""The filters of a long fft_conv: their spectrum, and their gradients out of the spectra of dout and u.

Shape letters: as in fft_long_device.py, K taps of k, S parts of the batch or of the times.

As in fft_filters.py, whose lags and taps these are: once a channel, whatever the batch, with split operands and a
float32 workspace for every dtype. What bounds them is their bytes: 4 K in, 8 + 8 + 8 N for the spectrum; beside a
batch of 16 rows and more that is little.
"""

import torch
import triton
import triton.language as tl

from . import fft_long_device as dev
from .common import Launch, index, strides, wide
from .fft_device import add_product, masked, negative, operand
from .fft_filters import _fft_conv_taps_kernel, _two_sided, geometry, shape_of_spectra, split_spectra
from .fft_long_device import (
    add_back,
    column_factor,
    column_places,
    largest_scale,
    load_back,
    load_row,
    magnitude,
    power_below,
    row_factors,
    row_places,
    row_transform,
    row_twiddles,
    store_columns,
    store_row,
)  # fmt: skip

# --- the spectrum ---------------------------------------------------------------------------------------------------


@triton.jit
def _lag_columns(
    k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, skip, p, block, N, L, M, K, K_reverse, offset,
    ROW: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, CIRCULAR: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """(g[n], g[n - N]) of piece p, zero from N on: [BLOCK0, C]."""
    n = column_places(p, block, ROW, BLOCK0, C)
    above, below = _two_sided(
        k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, skip, n, N, L, M, K, K_reverse, offset, CIRCULAR, INT64
    )  # fmt: skip
    return above, tl.where(n < N, below, 0.0)


@triton.jit
def _fft_conv_lag_columns_kernel(
    spectrum_ptr, scales_ptr, total_ptr, k_ptr, reverse_ptr, skip_ptr, column_ptr, turn_ptr, N0, P, L, M, K, K_reverse,
    offset, stride_k_d, stride_k_s, stride_reverse_d, stride_reverse_s, stride_skip_d,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, CIRCULAR: tl.constexpr,
    OPERANDS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Y of g and skip into spectrum (D, 2, N0, ROW), scales (D, P, ROW / C); total (D, ROW / C), the sum of their
    magnitudes. Grid (ROW / C, D). A lag j below zero stands at j + N, and is imaginary there.
    """
    ROW: tl.constexpr = N1 * N2
    N = N0 * ROW
    block, d = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    k_ptr += d * stride_k_d
    if reverse_ptr is not None:
        reverse_ptr += d * stride_reverse_d
    skip = 0.0
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + d * stride_skip_d).to(tl.float32)
    total = tl.zeros([BLOCK0, C], tl.float32)
    largest = tl.zeros([BLOCK0, C], tl.float32)
    for p in tl.range(P, num_stages=1):
        above, below = _lag_columns(
            k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, skip, p, block, N, L, M, K, K_reverse, offset, ROW,
            BLOCK0, C, CIRCULAR, INT64,
        )  # fmt: skip
        total += tl.abs(above) + tl.abs(below)
        largest = tl.maximum(largest, tl.maximum(tl.abs(above), tl.abs(below)))
    tl.store(total_ptr + d * (ROW // C) + block, tl.sum(total))
    scale = power_below(tl.max(largest))
    for q in tl.range(P, num_stages=1):
        acc_re = tl.zeros([BLOCK0, C], tl.float32)
        acc_im = tl.zeros([BLOCK0, C], tl.float32)
        for p in tl.range(P, num_stages=1):
            above, below = _lag_columns(
                k_ptr, reverse_ptr, stride_k_s, stride_reverse_s, skip, p, block, N, L, M, K, K_reverse, offset, ROW,
                BLOCK0, C, CIRCULAR, INT64,
            )  # fmt: skip
            above, below = operand(above * (1 / scale), OPERANDS), operand(below * (1 / scale), OPERANDS)
            f_re, f_im = column_factor(column_ptr, q, p, P, BLOCK0, OPERANDS)
            acc_re = add_product(add_product(acc_re, f_re, above, OPERANDS), f_im, negative(below), OPERANDS)
            acc_im = add_product(add_product(acc_im, f_im, above, OPERANDS), f_re, below, OPERANDS)
        store_columns(
            spectrum_ptr + d * 2 * N, scales_ptr + d * P * (ROW // C), turn_ptr, acc_re, acc_im, scale, q, block, N0,
            N1, N2, BLOCK0, C,
        )  # fmt: skip


@triton.jit
def _fft_conv_lag_rows_kernel(
    spectrum_ptr, scale_ptr, scales_ptr, total_ptr, n1_ptr, n2_ptr, inner_ptr, shift_ptr, N0, P,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Y to spectrum (D, 2, N0, N1, N2), in place, divided by scale (D,), the sum of the magnitudes. Grid (N0, D)."""
    ROW: tl.constexpr = N1 * N2
    k0, d = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    spectrum_ptr += d * 2 * N0 * ROW
    one_re, one_im, one_minus, two_re, two_im = row_factors(n1_ptr, n2_ptr, N1, N2, OPERANDS)
    t_re, t_im = row_twiddles(inner_ptr, shift_ptr, k0, N0, N1, N2)
    x_re, x_im, own = load_row(spectrum_ptr, scales_ptr + d * P * (ROW // C), k0, N0, N1, N2, BLOCK0, C, OPERANDS)
    g_re, g_im = row_transform(x_re, x_im, one_re, one_im, one_minus, two_re, two_im, t_re, t_im, N1, N2, OPERANDS)
    scale = tl.sum(tl.load(total_ptr + d * (ROW // C) + tl.arange(0, ROW // C)))  # [ROW / C]
    share = own / tl.where(scale < 1e-30, 1.0, scale)
    at = row_places(k0, N1, N2)
    tl.store(spectrum_ptr + at, g_re * share)
    tl.store(spectrum_ptr + N0 * ROW + at, g_im * share)
    if k0 == 0:
        tl.store(scale_ptr + d, scale)


# --- the gradients --------------------------------------------------------------------------------------------------


@triton.jit
def _fft_conv_long_bwd_kernel(
    partial_ptr, u_ptr, u_scales_ptr, dout_ptr, dout_scales_ptr, n1_ptr, n2_ptr, inner_ptr, shift_ptr, B, D, N0, P,
    turns, N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, ADD: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """partial (S, D, 2, N0, N1, N2): rows k0 of the spectrum of dg, over this part's batch rows, from the columns
    (B, D, 2, N0, ROW) of u and dout; with ADD to what is there. Grid (N0, D, S).
    """
    ROW: tl.constexpr = N1 * N2
    k0, d, part = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.program_id(2)
    one_re, one_im, one_minus, two_re, two_im = row_factors(n1_ptr, n2_ptr, N1, N2, OPERANDS)
    acc_re = tl.zeros([N1, N2], tl.float32)
    acc_im = tl.zeros([N1, N2], tl.float32)
    for b in tl.range(part * turns, tl.minimum(part * turns + turns, B), num_stages=1):
        row = tl.cast(b, tl.int64) * D + d
        at, scales = row * 2 * N0 * ROW, row * P * (ROW // C)
        t_re, t_im = row_twiddles(inner_ptr, shift_ptr, k0, N0, N1, N2)
        x_re, x_im, v_scale = load_row(u_ptr + at, u_scales_ptr + scales, k0, N0, N1, N2, BLOCK0, C, OPERANDS)
        v_re, v_im = row_transform(
            x_re, x_im, one_re, one_im, one_minus, two_re, two_im, t_re, t_im, N1, N2, OPERANDS
        )  # fmt: skip
        x_re, x_im, y_scale = load_row(dout_ptr + at, dout_scales_ptr + scales, k0, N0, N1, N2, BLOCK0, C, OPERANDS)
        y_re, y_im = row_transform(
            x_re, x_im, one_re, one_im, one_minus, two_re, two_im, t_re, t_im, N1, N2, OPERANDS
        )  # fmt: skip
        acc_re += (y_re * v_re + y_im * v_im) * (v_scale * y_scale)
        acc_im += (y_im * v_re - y_re * v_im) * (v_scale * y_scale)
    partial_ptr += (part * tl.cast(D, tl.int64) + d) * 2 * N0 * ROW + row_places(k0, N1, N2)
    if ADD:
        acc_re += tl.load(partial_ptr)  # [N1, N2]
        acc_im += tl.load(partial_ptr + N0 * ROW)
    tl.store(partial_ptr, acc_re)
    tl.store(partial_ptr + N0 * ROW, acc_im)


@triton.jit
def _fft_conv_gradient_rows_kernel(
    partial_ptr, scale_ptr, n1_ptr, n2_ptr, inner_ptr, shift_ptr, turn_ptr, D, N0, parts,
    N1: tl.constexpr, N2: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """The partial spectra, summed in their order, back to Y, in place of the first; scale (D, N0). Grid (N0, D)."""
    ROW: tl.constexpr = N1 * N2
    k0, d = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    y_re = tl.zeros([N1, N2], tl.float32)
    y_im = tl.zeros([N1, N2], tl.float32)
    for part in tl.range(parts, num_stages=1):
        at = (part * tl.cast(D, tl.int64) + d) * 2 * N0 * ROW + row_places(k0, N1, N2)
        y_re += tl.load(partial_ptr + at)  # [N1, N2]
        y_im += tl.load(partial_ptr + N0 * ROW + at)
    scale = power_below(magnitude(y_re, y_im))
    one_re, one_im, one_minus, two_re, two_im = row_factors(n1_ptr, n2_ptr, N1, N2, OPERANDS)
    t_re, t_im = row_twiddles(inner_ptr, shift_ptr, k0, N0, N1, N2)
    store_row(
        partial_ptr + d * 2 * N0 * ROW, scale_ptr + d * N0, turn_ptr, y_re * (1 / scale), y_im * (1 / scale), scale, k0,
        N0, one_re, one_im, one_minus, two_re, two_im, t_re, t_im, N1, N2, OPERANDS,
    )  # fmt: skip


@triton.jit
def _fft_conv_gradient_columns_kernel(
    lags_ptr, ws_ptr, scale_ptr, column_ptr, N0, P,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """lags (D, 2, N): dg[n], and dg[n - N], which is the imaginary part. Grid (ROW / C, P, D)."""
    ROW: tl.constexpr = N1 * N2
    block, p, d = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    ws_ptr += d * 2 * N0 * ROW
    scale_ptr += d * N0
    scale = largest_scale(scale_ptr, N0, P, BLOCK0)
    acc_re = tl.zeros([BLOCK0, C], tl.float32)
    acc_im = tl.zeros([BLOCK0, C], tl.float32)
    for q in tl.range(P, num_stages=1):
        z_re, z_im = load_back(ws_ptr, scale_ptr, scale, q, block, N0, ROW, BLOCK0, C, OPERANDS)
        acc_re = add_back(acc_re, z_re, z_im, column_ptr, q, p, P, BLOCK0, OPERANDS)
        # The imaginary part of z is the real part of -i z.
        acc_im = add_back(acc_im, z_im, negative(z_re), column_ptr, q, p, P, BLOCK0, OPERANDS)
    at = column_places(p, block, ROW, BLOCK0, C)
    valid = at < N0 * ROW
    tl.store(lags_ptr + d * 2 * N0 * ROW + at, acc_re * (scale / N0), mask=valid)
    tl.store(lags_ptr + (d * 2 + 1) * N0 * ROW + at, acc_im * (scale / N0), mask=valid)


@triton.jit
def _fft_conv_sums_kernel(
    bias_partial_ptr, skip_partial_ptr, dout_ptr, u_ptr, pregate_ptr, postgate_ptr, mask_ptr, B, D, L, M, times,
    stride_dout_b, stride_dout_d, stride_dout_l, stride_u_b, stride_u_d, stride_u_l,
    stride_pregate_b, stride_pregate_d, stride_pregate_l, stride_postgate_b, stride_postgate_d, stride_postgate_l,
    stride_mask_b, stride_mask_l, REPLACES: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bias_partial and skip_partial (S, D): the sums of dy and of dy v over a part of the times, `times` blocks of it.

    Directly, since g[0] may be small beside the errors that half-precision products spread over all lags. Grid (S, D).
    """
    part, d = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    acc_bias = tl.zeros([BLOCK], tl.float32)
    acc_skip = tl.zeros([BLOCK], tl.float32)
    for turn in tl.range(B * times, num_stages=1):
        b = tl.cast(turn // times, tl.int64)
        t = (part * times + turn % times) * BLOCK + tl.arange(0, BLOCK)
        inside, reached = t < L, t < M
        t = index(t, INT64)
        at = b * stride_dout_b + d * stride_dout_d + t * stride_dout_l
        dy = tl.load(dout_ptr + at, mask=reached, other=0.0).to(tl.float32)  # [BLOCK]
        if postgate_ptr is not None:
            at = b * stride_postgate_b + d * stride_postgate_d + t * stride_postgate_l
            dy *= tl.load(postgate_ptr + at, mask=reached, other=0.0).to(tl.float32)  # [BLOCK]
        at = b * stride_u_b + d * stride_u_d + t * stride_u_l
        v = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        if pregate_ptr is not None:
            at = b * stride_pregate_b + d * stride_pregate_d + t * stride_pregate_l
            v *= tl.load(pregate_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        acc_bias += dy
        acc_skip += dy * masked(v, mask_ptr, stride_mask_b, stride_mask_l, b, t, inside, REPLACES)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + part * D + d, tl.sum(acc_bias))
    if skip_partial_ptr is not None:
        tl.store(skip_partial_ptr + part * D + d, tl.sum(acc_skip))


# --- plans ----------------------------------------------------------------------------------------------------------

SPLIT = "fp16x3"


def plan_spectrum(spectrum, scale, u, k, k_reverse, skip, mode, factors) -> list[Launch]:
    """Of some channels: spectrum (D, 2, N0, N1, N2) and scale (D,)."""
    offset, points = geometry(u, k, mode)
    channels, blocks = spectrum.shape[0], factors["N1"] * factors["N2"] // factors["C"]
    scales = scale.new_empty(channels, dev.pieces(factors), blocks)
    total = scale.new_empty(channels, blocks)
    columns = dict(
        spectrum_ptr=spectrum, scales_ptr=scales, total_ptr=total, k_ptr=k, reverse_ptr=k_reverse, skip_ptr=skip,
        L=u.shape[2], M=points, K=k.shape[1], K_reverse=0 if k_reverse is None else k_reverse.shape[1], offset=offset,
        **strides("k", k, "ds"), **strides("reverse", k_reverse, "ds"), **strides("skip", skip, "d"),
        CIRCULAR=mode == "circular", INT64=wide(k, k_reverse),
    )  # fmt: skip
    rows = dict(spectrum_ptr=spectrum, scale_ptr=scale, scales_ptr=scales, total_ptr=total)
    return [
        dev.plan(_fft_conv_lag_columns_kernel, (blocks, channels), columns, factors, SPLIT, u.device),
        dev.plan(_fft_conv_lag_rows_kernel, (factors["N0"], channels), rows, factors, SPLIT, u.device),
    ]


def factors_for(u, points: int, operands: str, given=None):
    """(factors of the transform, the given spectrum if it has them, else None). One of split operands' serves all."""
    found = [dev.sizes(points, wide) for wide in (dev.takes_wide(operands, u.device), False)]
    for factors in found:
        if given is not None and given.shape == shape_of_spectra(u.shape[1], *dev.sizes_of(factors)):
            return factors, given.contiguous()
    return found[0], None


def spectra(u, k, k_reverse, skip, mode, many: int, factors: dict[str, int], given=None):
    """A function of a cut of the channels, at most so many: (spectrum, scale, the skip that is not in it, the launches
    that make it in one memory); a given one is there, without skip."""
    of = lambda t, cut: None if t is None else t[cut]
    if given is not None:
        spectrum, scale = split_spectra(given, u.shape[1])
        return lambda cut: (spectrum[cut], scale[cut], of(skip, cut), [])
    spectrum, scale = (u.new_empty(n, dtype=torch.float32) for n in ((many, 2, *dev.sizes_of(factors)), many))

    def make(cut):
        own = spectrum[: cut.stop - cut.start], scale[: cut.stop - cut.start]
        return *own, None, plan_spectrum(*own, u, k[cut], of(k_reverse, cut), of(skip, cut), mode, factors)

    return make


def plan_products(partial, u_columns, dout_columns, factors, operands, add) -> Launch:
    """u_columns, dout_columns: workspaces and scales of (B, D) rows."""
    (u_ws, u_scales), (dout_ws, dout_scales) = u_columns, dout_columns
    batch, channels, parts = u_ws.shape[0], u_ws.shape[1], partial.shape[0]
    args = dict(
        partial_ptr=partial, u_ptr=u_ws, u_scales_ptr=u_scales, dout_ptr=dout_ws, dout_scales_ptr=dout_scales,
        B=batch, D=channels, turns=triton.cdiv(batch, parts), ADD=add,
    )  # fmt: skip
    grid = (factors["N0"], channels, parts)
    return dev.plan(_fft_conv_long_bwd_kernel, grid, args, factors, operands, partial.device)


def plan_sums(bias_partial, skip_partial, dout, u, pregate, postgate, mask, replaces) -> Launch:
    some = skip_partial if bias_partial is None else bias_partial
    parts, block = some.shape[0], 1024
    args = dict(
        bias_partial_ptr=bias_partial, skip_partial_ptr=skip_partial, dout_ptr=dout, u_ptr=u, pregate_ptr=pregate,
        postgate_ptr=postgate, mask_ptr=mask, B=u.shape[0], D=u.shape[1], L=u.shape[2], M=dout.shape[2],
        times=triton.cdiv(dout.shape[2], parts * block), **strides("dout", dout, "bdl"), **strides("u", u, "bdl"),
        **strides("pregate", pregate, "bdl"), **strides("postgate", postgate, "bdl"), **strides("mask", mask, "bl"),
        REPLACES=replaces, INT64=wide(dout, u, pregate, postgate, mask), BLOCK=block,
    )  # fmt: skip
    return Launch(_fft_conv_sums_kernel, (parts, u.shape[1]), args, 4)


def plan_filters(
    dk, dk_reverse, dskip, dbias, lags, partial, bias_partial, skip_partial, u, mode, points, factors, first, channels
) -> list[Launch]:  # fmt: skip
    """From the partial spectra of channels from `first` on to the lags, and from those to the filters' gradients."""
    of = lambda t: None if t is None else t[first : first + channels]
    column = lambda t: None if t is None else t[:, first:]
    offset, taps, taps_reverse = geometry(u, dk, mode)[0], dk.shape[1], 0 if dk_reverse is None else dk_reverse.shape[1]
    device, sums = u.device, skip_partial if bias_partial is None else bias_partial
    scale = lags.new_empty(channels, factors["N0"])
    blocks = factors["N1"] * factors["N2"] // factors["C"]
    rows = dict(partial_ptr=partial, scale_ptr=scale, D=channels, parts=partial.shape[0])
    columns = dict(lags_ptr=lags, ws_ptr=partial, scale_ptr=scale)
    dk, dk_reverse, dskip, dbias = of(dk), of(dk_reverse), of(dskip), of(dbias)
    gather = dict(
        dk_ptr=dk, dreverse_ptr=dk_reverse, dskip_ptr=dskip, dbias_ptr=dbias, lags_ptr=lags,
        bias_partial_ptr=column(bias_partial), skip_partial_ptr=column(skip_partial), D=u.shape[1], L=u.shape[2],
        M=points, K=taps, K_reverse=taps_reverse, offset=offset, N=lags.shape[2],
        parts=0 if sums is None else sums.shape[0], **strides("dk", dk, "ds"),
        **strides("dreverse", dk_reverse, "ds"), **strides("dskip", dskip, "d"), **strides("dbias", dbias, "d"),
        CIRCULAR=mode == "circular", INT64=wide(dk, dk_reverse), BLOCK_S=512,
    )  # fmt: skip
    return [
        dev.plan(_fft_conv_gradient_rows_kernel, (factors["N0"], channels), rows, factors, SPLIT, device),
        dev.plan(
            _fft_conv_gradient_columns_kernel, (blocks, dev.pieces(factors), channels), columns, factors, SPLIT, device
        ),
        Launch(_fft_conv_taps_kernel, (triton.cdiv(max(taps, taps_reverse), 512), channels), gather, 4),
    ]
