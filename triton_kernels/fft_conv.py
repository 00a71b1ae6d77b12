"""Long convolution by a fused two-factor (Monarch) FFT on tl.dot: forward and backward.

Shape letters: B batch, D channels, L length, K taps of k, M output length, N = N1 N2 points of the transform, N1 = P
BLOCK, R batch rows in a tile, S parts of the batch. The transform itself is in fft_device.py, what is done once a
channel in fft_filters.py.

Every mode is one product with a two-sided Toeplitz matrix, y[t] = sum_j g[j] v[t - j] for 0 <= t < M and |j| < M:

    causal, same   g[j] = k[j + o] + k_reverse[-j]                        full   the same over M = L + K - 1
    circular       g[j] = sum of k[s] over s = j mod L, + sum of k_reverse[s] over s = -j mod L

and g[0] takes skip. The right-angle transform computes it with N >= M points, not 2 M: L = 8,192 needs N = 8,192.
dv is the product with the conjugate spectrum; dg[j] = sum_t dy[t] v[t - j] is a product of two spectra, summed over
the batch before its one inverse; dk and dk_reverse are read out of dg.

Measured on an H200 at B64 D768 gated bf16: 0.36 ms at L 1,024 and 3.6 ms at 8,192, 26 and 21 % of the byte floor, 4.6
and 3.9 times torch.fft, 2.2 and 4.2 times FlashFFTConv.

What bounds it on an H100/H200: the byte floor of the gated forward in half
precision is 8 bytes a point. Products cost 8 N1 + 16 N2 flops a point (the first factor meets real numbers both ways):
768 at N = 1,024, 1,024 at 2,048, 1,536 at 4,096, 2,048 at 8,192, 3,072 at 16,384. At 500 TFLOP/s of 16-bit matrix
rate that takes as long as 8 bytes at 3.35 TB/s from about 1,200 flops on: bytes below N = 4,096, tensor cores above.
Float32 takes three products for one. Tables and spectrum come out of L1 and L2: about 12 bytes a point, and 4 N1 / N2
for the first factor.

How the work is split: a program owns a channel and R batch rows at a time (R > 1 only for short rows, so that tiles
fill the matrix units), several times over where there are more rows than a GPU has room for. The spectra are cut into
P blocks of rows k1; a block goes through transform, product and inverse before the next. The gradient's kernel has a
program for each of the blocks, and with few channels for parts of the batch.

What stays where: the row's samples as float16 operands (shared memory), its results as float32 accumulators and one
complex block in registers. Nothing of the transform is written to memory. From N = 8,192 on registers spill: a few
hundred bytes a thread on sm_90, kilobytes on sm_80, whose mma.sync keeps operands in registers.

The backward takes three passes over the rows: du and dpregate (the forward kernel on dout, with the conjugate
spectrum), dpostgate (the forward again), dg. One pass would save two of its six transforms, and needs twice the
registers.

Memory beyond inputs and outputs: the spectrum, D (2 N + 1) floats, unless it is given (fft_conv_spectrum.py); in the
backward also S D 2 N for partial sums and D 2 N for dg; S D is at most max(D, WANTED / P). No buffer grows with the
batch.

Determinism: every sum has a fixed order; S depends on the shapes alone.
"""

import torch
import triton
import triton.language as tl

from . import fft_device as dev
from .common import Launch, compile_spec, index, meta, strides, wide
from .fft_device import (
    FULL,
    add_real_part,
    beside_skip,
    inverse_first_half,
    load_signal,
    load_spectrum,
    magnitudes,
    masked,
    operands,
    rows_of,
    second_factor,
    times_of,
    times_rows,
    transform,
    twiddles,
)  # fmt: skip
from .fft_filters import factors_of, geometry, plan_filters, shape_of_spectra, spectra, tables_of
from .tuning import config

__all__ = ["fft_conv_bwd", "fft_conv_fwd", "supports"]

# --- the convolution ------------------------------------------------------------------------------------------------


@triton.jit
def _fft_conv_fwd_kernel(
    out_ptr, second_out_ptr, x_ptr, gate_ptr, in_mask_ptr, post_ptr, second_post_ptr, out_mask_ptr, bias_ptr,
    spectrum_ptr, scale_ptr, skip_ptr, first_ptr, second_ptr, twiddle_ptr, B, L_in, L_out, turns,
    stride_out_b, stride_out_d, stride_out_l, stride_second_out_b, stride_second_out_d, stride_second_out_l,
    stride_x_b, stride_x_d, stride_x_l, stride_gate_b, stride_gate_d, stride_gate_l,
    stride_in_mask_b, stride_in_mask_l, stride_post_b, stride_post_d, stride_post_l,
    stride_second_post_b, stride_second_post_d, stride_second_post_l, stride_out_mask_b, stride_out_mask_l,
    stride_bias_d, stride_skip_d,
    P: tl.constexpr, P_IN: tl.constexpr, P_OUT: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    CONJUGATE: tl.constexpr, REPLACES: tl.constexpr, OPERANDS: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """y = the convolution of (x in_mask gate), with CONJUGATE the correlation; grid (groups of rows, D).

    out = (y + bias) post out_mask, second_out = (y + bias) second_post out_mask. Forward: x is u, gate the pregate,
    post the postgate. du and dpregate: x is dout, gate the postgate, post the pregate, second_post u. dpostgate: as
    forward, post is dout.
    """
    N1: tl.constexpr = P * BLOCK
    N: tl.constexpr = N1 * N2
    d = tl.cast(tl.program_id(1), tl.int64)
    x_ptr += d * stride_x_d
    out_ptr += d * stride_out_d
    if gate_ptr is not None:
        gate_ptr += d * stride_gate_d
    if post_ptr is not None:
        post_ptr += d * stride_post_d
    if second_out_ptr is not None:
        second_out_ptr += d * stride_second_out_d
        second_post_ptr += d * stride_second_post_d
    second_re, second_im = second_factor(second_ptr, N2, OPERANDS)  # [N2, N2]
    total, share, skip = beside_skip(scale_ptr, skip_ptr, stride_skip_d, d)
    back = total * (N2 / FULL)
    for turn in tl.range(turns, num_stages=1):
        first = (tl.program_id(0) * turns + turn) * R
        x = load_signal(
            x_ptr, gate_ptr, in_mask_ptr, stride_x_b, stride_x_l, stride_gate_b, stride_gate_l, stride_in_mask_b,
            stride_in_mask_l, first, B, L_in, P_IN, BLOCK, N2, R, REPLACES, INT64,
        )  # fmt: skip
        scale = magnitudes(x, BLOCK, N2, R, P_IN)
        x = operands(x, scale, BLOCK, N2, R, P_IN, OPERANDS)
        acc = ()
        for _ in tl.static_range(P_OUT):
            acc = acc + (tl.zeros([BLOCK, R * N2], tl.float32),)
        for q in tl.range(P, num_stages=1):
            t_re, t_im = twiddles(twiddle_ptr, q, N1, BLOCK, N2, R)  # [BLOCK, R N2]
            x_re, x_im = transform(
                x, q, first_ptr, second_re, second_im, t_re, t_im, P_IN, N1, BLOCK, N2, R, OPERANDS
            )  # fmt: skip
            g_re, g_im = load_spectrum(spectrum_ptr + d * 2 * N, q, N1, BLOCK, N2, R)  # [BLOCK R, N2]
            if skip_ptr is not None:
                g_re, g_im = g_re * share + skip, g_im * share
            g_re, g_im = g_re * (FULL / N), g_im * ((-FULL if CONJUGATE else FULL) / N)
            b_re, b_im = inverse_first_half(
                x_re * g_re - x_im * g_im, x_re * g_im + x_im * g_re, second_re, second_im, t_re, t_im, BLOCK, N2, R,
                OPERANDS,
            )  # fmt: skip
            sums = ()
            for p in tl.static_range(P_OUT):
                sums = sums + (add_real_part(acc[p], b_re, b_im, first_ptr, q, p, N1, BLOCK, OPERANDS),)
            acc = sums
        b = rows_of(first, BLOCK, N2, R)
        for p in tl.static_range(P_OUT):
            y = times_rows(acc[p] * back, scale, BLOCK, N2, R)  # [BLOCK, R N2]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + d * stride_bias_d).to(tl.float32)
            t = times_of(p, BLOCK, N2, R)
            inside = (t < L_out) & (b < B)
            t = index(t, INT64)
            out = y
            if post_ptr is not None:
                at = b * stride_post_b + t * stride_post_l
                out *= tl.load(post_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, R N2]
            out = masked(out, out_mask_ptr, stride_out_mask_b, stride_out_mask_l, b, t, inside, REPLACES)
            at = b * stride_out_b + t * stride_out_l
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
            if second_out_ptr is not None:
                at = b * stride_second_post_b + t * stride_second_post_l
                out = y * tl.load(second_post_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, R N2]
                out = masked(out, out_mask_ptr, stride_out_mask_b, stride_out_mask_l, b, t, inside, REPLACES)
                at = b * stride_second_out_b + t * stride_second_out_l
                tl.store(second_out_ptr + at, out.to(second_out_ptr.dtype.element_ty), mask=inside)


# --- the filters' gradient ------------------------------------------------------------------------------------------


@triton.jit
def _direct_sums(
    dout_ptr, u_ptr, pregate_ptr, postgate_ptr, mask_ptr, stride_dout_b, stride_dout_l, stride_u_b, stride_u_l,
    stride_pregate_b, stride_pregate_l, stride_postgate_b, stride_postgate_l, stride_mask_b, stride_mask_l,
    first, B, L, M, P_IN: tl.constexpr, P_OUT: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    REPLACES: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """(sum of dy, sum of dy v) of R rows: numbers. Loads of its own, so that nothing is held for it."""
    dy = load_signal(
        dout_ptr, postgate_ptr, None, stride_dout_b, stride_dout_l, stride_postgate_b, stride_postgate_l, 0, 0,
        first, B, M, P_OUT, BLOCK, N2, R, False, INT64,
    )  # fmt: skip
    v = load_signal(
        u_ptr, pregate_ptr, mask_ptr, stride_u_b, stride_u_l, stride_pregate_b, stride_pregate_l, stride_mask_b,
        stride_mask_l, first, B, L, P_IN, BLOCK, N2, R, REPLACES, INT64,
    )  # fmt: skip
    plain, product = dy[0], dy[0] * v[0]  # [BLOCK, R N2]
    for p in tl.static_range(1, P_OUT):
        plain += dy[p]
    for p in tl.static_range(1, P_IN):
        product += dy[p] * v[p]
    return tl.sum(plain), tl.sum(product)


@triton.jit
def _fft_conv_bwd_kernel(
    partial_ptr, bias_partial_ptr, skip_partial_ptr, dout_ptr, u_ptr, pregate_ptr, postgate_ptr, mask_ptr, first_ptr,
    second_ptr, twiddle_ptr, B, L, M, D, turns,
    stride_dout_b, stride_dout_d, stride_dout_l, stride_u_b, stride_u_d, stride_u_l,
    stride_pregate_b, stride_pregate_d, stride_pregate_l, stride_postgate_b, stride_postgate_d, stride_postgate_l,
    stride_mask_b, stride_mask_l,
    P: tl.constexpr, P_IN: tl.constexpr, P_OUT: tl.constexpr, BLOCK: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    REPLACES: tl.constexpr, OPERANDS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """partial (S, D, 2, N1, N2): block q of the spectrum of dg, over this part's rows; bias_partial and
    skip_partial (S, D): dbias and dskip, the latter summed directly, since g[0] may be small beside the errors that
    half-precision products spread over all lags. Grid (P, D, S).
    """
    N1: tl.constexpr = P * BLOCK
    N: tl.constexpr = N1 * N2
    q, d, part = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.program_id(2)
    u_ptr += d * stride_u_d
    dout_ptr += d * stride_dout_d
    if pregate_ptr is not None:
        pregate_ptr += d * stride_pregate_d
    if postgate_ptr is not None:
        postgate_ptr += d * stride_postgate_d
    second_re, second_im = second_factor(second_ptr, N2, OPERANDS)  # [N2, N2]
    t_re, t_im = twiddles(twiddle_ptr, q, N1, BLOCK, N2, R)  # [BLOCK, R N2]
    acc_re = tl.zeros([BLOCK * R, N2], tl.float32)
    acc_im = tl.zeros([BLOCK * R, N2], tl.float32)
    acc_bias, acc_skip = 0.0, 0.0
    for turn in tl.range(turns, num_stages=1):
        first = (part * turns + turn) * R
        if q == 0 and (bias_partial_ptr is not None or skip_partial_ptr is not None):
            own_bias, own_skip = _direct_sums(
                dout_ptr, u_ptr, pregate_ptr, postgate_ptr, mask_ptr, stride_dout_b, stride_dout_l, stride_u_b,
                stride_u_l, stride_pregate_b, stride_pregate_l, stride_postgate_b, stride_postgate_l, stride_mask_b,
                stride_mask_l, first, B, L, M, P_IN, P_OUT, BLOCK, N2, R, REPLACES, INT64,
            )  # fmt: skip
            acc_bias += own_bias
            acc_skip += own_skip
        v = load_signal(
            u_ptr, pregate_ptr, mask_ptr, stride_u_b, stride_u_l, stride_pregate_b, stride_pregate_l, stride_mask_b,
            stride_mask_l, first, B, L, P_IN, BLOCK, N2, R, REPLACES, INT64,
        )  # fmt: skip
        v_scale = magnitudes(v, BLOCK, N2, R, P_IN)
        v = operands(v, v_scale, BLOCK, N2, R, P_IN, OPERANDS)
        v_re, v_im = transform(v, q, first_ptr, second_re, second_im, t_re, t_im, P_IN, N1, BLOCK, N2, R, OPERANDS)
        dy = load_signal(
            dout_ptr, postgate_ptr, None, stride_dout_b, stride_dout_l, stride_postgate_b, stride_postgate_l, 0, 0,
            first, B, M, P_OUT, BLOCK, N2, R, False, INT64,
        )  # fmt: skip
        dy_scale = magnitudes(dy, BLOCK, N2, R, P_OUT)
        dy = operands(dy, dy_scale, BLOCK, N2, R, P_OUT, OPERANDS)
        dy_re, dy_im = transform(dy, q, first_ptr, second_re, second_im, t_re, t_im, P_OUT, N1, BLOCK, N2, R, OPERANDS)
        dy_re = times_rows(dy_re, v_scale * dy_scale, BLOCK, N2, R)
        dy_im = times_rows(dy_im, v_scale * dy_scale, BLOCK, N2, R)
        acc_re += dy_re * v_re + dy_im * v_im
        acc_im += dy_im * v_re - dy_re * v_im
    at = (part * tl.cast(D, tl.int64) + d) * 2 * N + times_of(q, BLOCK, N2, 1)
    tl.store(partial_ptr + at, tl.sum(tl.reshape(acc_re, [BLOCK, R, N2]), axis=1))
    tl.store(partial_ptr + N + at, tl.sum(tl.reshape(acc_im, [BLOCK, R, N2]), axis=1))
    if bias_partial_ptr is not None:
        if q == 0:
            tl.store(bias_partial_ptr + part * D + d, acc_bias)
    if skip_partial_ptr is not None:
        if q == 0:
            tl.store(skip_partial_ptr + part * D + d, acc_skip)


# --- launchers ------------------------------------------------------------------------------------------------------

WANTED = 4 * 132  # programs, four a multiprocessor of an H100/H200
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = 65535  # of a grid's second and third dimension


def supports(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, precision=None, spectrum=None) -> str | None:
    """None, or why these kernels do not compute the call."""
    if u.dtype not in DTYPES:
        return f"u is {str(u.dtype)[6:]}, not float32, float16 or bfloat16"
    if u.shape[1] > CHANNELS:
        return f"u has {u.shape[1]} channels, a grid has room for {CHANNELS}"
    for name, filters in (("k", k), ("k_reverse", k_reverse)):
        if filters is None:
            continue
        if filters.dim() != 2:
            return f"{name} is a filter for every sample"
        if filters.dtype not in DTYPES:
            return f"{name} is {str(filters.dtype)[6:]}, not float32, float16 or bfloat16"
    points, most = geometry(u, k, mode)[1], dev.limit(dev.operands_of(u.dtype, precision), u.device)
    if dev.sizes(points, most) is None:
        return f"the output has {points} samples, more than one fused transform ({most} points) can hold"
    return "u has no samples" if u.shape[2] == 0 else None


def _blocks(kernel: str, u: torch.Tensor, factors: dict[str, int]) -> dict[str, int]:
    """R and num_warps. Short rows share a tile of up to 2,048 elements; half that if operands are split or strided."""
    points = factors["P"] * factors["BLOCK"] * factors["N2"]
    most = (1024 if u.dtype == torch.float32 or u.stride(2) != 1 else 2048) // triton.next_power_of_2(points)
    default = {"R": max(1, min(triton.next_power_of_2(u.shape[0]), most)), "num_warps": dev.warps(factors["BLOCK"])}
    return config(kernel, f"{str(u.dtype)[6:]}-P{factors['P']}-{factors['BLOCK']}x{factors['N2']}", u.device, default)


def _bytes(mask: torch.Tensor | None) -> dict:
    """A mask as the kernels read it, and whether it replaces."""
    replaces = mask is not None and mask.dtype == torch.bool
    return {"mask": mask.view(torch.uint8) if replaces else mask, "REPLACES": replaces}


def _plan_convolution(
    out, second_out, x, gate, in_mask, post, second_post, out_mask, bias, spectrum, scale, skip, points, conjugate,
    operands,
) -> Launch:  # fmt: skip
    factors = factors_of(x, points, operands)
    blocks = _blocks("fft_conv_fwd", x, factors)
    piece = factors["BLOCK"] * factors["N2"]
    (batch, channels, length), length_out = x.shape, out.shape[2]
    groups = triton.cdiv(batch, blocks["R"])
    turns = max(1, min(groups, groups * channels // WANTED))
    in_mask, out_mask = _bytes(in_mask), _bytes(out_mask)
    args = dict(
        out_ptr=out, second_out_ptr=second_out, x_ptr=x, gate_ptr=gate, in_mask_ptr=in_mask["mask"], post_ptr=post,
        second_post_ptr=second_post, out_mask_ptr=out_mask["mask"], bias_ptr=bias, spectrum_ptr=spectrum,
        scale_ptr=scale, skip_ptr=skip, **tables_of(factors, operands, x.device), B=batch, L_in=length,
        L_out=length_out, turns=turns, **strides("out", out, "bdl"), **strides("second_out", second_out, "bdl"),
        **strides("x", x, "bdl"), **strides("gate", gate, "bdl"), **strides("in_mask", in_mask["mask"], "bl"),
        **strides("post", post, "bdl"), **strides("second_post", second_post, "bdl"),
        **strides("out_mask", out_mask["mask"], "bl"),
        **strides("bias", bias, "d"), **strides("skip", skip, "d"), **factors, P_IN=max(1, triton.cdiv(length, piece)),
        P_OUT=max(1, triton.cdiv(length_out, piece)), R=blocks["R"], CONJUGATE=conjugate,
        REPLACES=in_mask["REPLACES"] or out_mask["REPLACES"],
        INT64=wide(out, second_out, x, gate, post, second_post, in_mask["mask"], out_mask["mask"]),
    )  # fmt: skip
    return Launch(_fft_conv_fwd_kernel, (triton.cdiv(groups, turns), channels), args, blocks["num_warps"])


def plan_fft_conv_fwd(
    out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, precision=None, spectrum=None
) -> list[Launch]:  # fmt: skip
    """The launches, from shapes, strides and dtypes alone."""
    operands = dev.operands_of(u.dtype, precision)
    spectrum, scale, beside, launches = spectra(u, k, k_reverse, skip, mode, operands, spectrum)
    return [
        *launches,
        _plan_convolution(
            out, None, u, pregate, mask, postgate, None, None, bias, spectrum, scale, beside, out.shape[2], False,
            operands,
        ),
    ]  # fmt: skip


def fft_conv_fwd(*args) -> None:
    """fill(out, *op arguments)"""
    for launch in plan_fft_conv_fwd(*args):
        launch.run()


def _plan_products(
    partial, bias_partial, skip_partial, turns, dout, u, pregate, postgate, mask, blocks, operands
) -> Launch:  # fmt: skip
    points = dout.shape[2]
    factors = factors_of(u, points, operands)
    piece, mask = factors["BLOCK"] * factors["N2"], _bytes(mask)
    args = dict(
        partial_ptr=partial, bias_partial_ptr=bias_partial, skip_partial_ptr=skip_partial, dout_ptr=dout, u_ptr=u,
        pregate_ptr=pregate, postgate_ptr=postgate, mask_ptr=mask["mask"],
        **tables_of(factors, operands, u.device), B=u.shape[0], L=u.shape[2], M=points,
        D=u.shape[1], turns=turns, **strides("dout", dout, "bdl"), **strides("u", u, "bdl"),
        **strides("pregate", pregate, "bdl"), **strides("postgate", postgate, "bdl"),
        **strides("mask", mask["mask"], "bl"), **factors, P_IN=max(1, triton.cdiv(u.shape[2], piece)),
        P_OUT=max(1, triton.cdiv(points, piece)), R=blocks["R"], REPLACES=mask["REPLACES"],
        INT64=wide(dout, u, pregate, postgate, mask["mask"]),
    )  # fmt: skip
    grid = (factors["P"], u.shape[1], partial.shape[0])
    return Launch(_fft_conv_bwd_kernel, grid, args, blocks["num_warps"])


def plan_fft_conv_bwd(
    du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate, dout, u, k, k_reverse, skip, bias, pregate, postgate, mask,
    mode, precision=None, spectrum=None,
) -> list[Launch]:  # fmt: skip
    """The launches, from shapes, strides and dtypes alone. Outputs of absent inputs are not touched."""
    points, channels = dout.shape[2], u.shape[1]
    dk_reverse, dskip = None if k_reverse is None else dk_reverse, None if skip is None else dskip
    dbias, dpregate = None if bias is None else dbias, None if pregate is None else dpregate
    operands = dev.operands_of(u.dtype, precision)
    spectrum, scale, beside, launches = spectra(u, k, k_reverse, skip, mode, operands, spectrum)
    factors = factors_of(u, points, operands)
    blocks = _blocks("fft_conv_bwd", u, factors)
    groups = triton.cdiv(u.shape[0], blocks["R"])
    parts = max(1, min(groups, WANTED // max(1, factors["P"] * channels)))
    turns = triton.cdiv(groups, parts)
    parts = triton.cdiv(groups, max(1, turns)) or 1
    partial = spectrum.new_empty(parts, *spectrum.shape)
    lags = spectrum.new_empty(channels, 2, spectrum.shape[2] * spectrum.shape[3])
    bias_partial = None if bias is None else scale.new_empty(parts, channels)
    skip_partial = None if skip is None else scale.new_empty(parts, channels)
    launches += [
        _plan_convolution(
            du, dpregate, dout, postgate, None, pregate, u, mask, None, spectrum, scale, beside, points, True, operands
        ),
        _plan_products(partial, bias_partial, skip_partial, turns, dout, u, pregate, postgate, mask, blocks, operands),
        *plan_filters(
            dk, dk_reverse, dskip, dbias, lags, partial, bias_partial, skip_partial, u, mode, points,
            0 if k_reverse is None else k_reverse.shape[1], operands,
        ),
    ]  # fmt: skip
    if postgate is not None:
        launches.append(
            _plan_convolution(
                dpostgate, None, u, pregate, mask, dout, None, None, bias, spectrum, scale, beside, points, False,
                operands,
            )
        )  # fmt: skip
    return launches


def fft_conv_bwd(*args) -> None:
    """fill(du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate, dout, *op arguments)"""
    for launch in plan_fft_conv_bwd(*args):
        launch.run()


def _specs(dtype: torch.dtype, options: str = "") -> dict[str, Launch]:
    """The launches of a typical call, by name. options: its length, or "wide" for channels-last beyond 32 bits."""
    B, D, L = (64, 2**21, 1024) if options == "wide" else (64, 768, int(options or 1024))
    x = meta(B, L, D, dtype=dtype).transpose(1, 2) if options == "wide" else meta(B, D, L, dtype=dtype)
    k, vector, M = meta(D, L), meta(D), "causal"
    reverse, mask = (k, meta(B, L, dtype=torch.bool)) if options == "wide" else (None, None)
    call = (x, k, reverse, vector, vector, x, x, mask, M)
    gradients = plan_fft_conv_bwd(x, k, reverse, vector, vector, x, x, x, *call)
    names = ("spectrum", "du", "bwd", "lags", "taps")
    spectrum, forward = plan_fft_conv_fwd(x, *call)
    given = meta(*shape_of_spectra(D, *spectrum.args["spectrum_ptr"].shape[2:]))
    (given,) = plan_fft_conv_fwd(x, *call, None, given)
    return {"fwd": forward, "fwd_given": given, **dict(zip(names, gradients))}


for _name in ("spectrum", "fwd", "fwd_given", "bwd", "lags", "taps", "du"):
    compile_spec(f"fft_conv_{_name}")(lambda dtype, name=_name: _specs(dtype)[name])
for _name, _options in (("fwd", "8192"), ("bwd", "8192"), ("fwd", "16384"), ("du", "wide")):
    compile_spec(f"fft_conv_{_name}_{_options}")(lambda dtype, name=_name, o=_options: _specs(dtype, o)[name])
compile_spec("fft_conv_fwd_bf16_products")(
    lambda dtype: plan_fft_conv_fwd(
        *[meta(64, 768, 1024, dtype=dtype)] * 2, meta(768, 1024), *[None] * 6, "causal", "bf16"
    )[1]
)
compile_spec("fft_conv_fwd_float32_8192")(lambda dtype: _specs(torch.float32, "8192")["fwd"])  # most shared memory
