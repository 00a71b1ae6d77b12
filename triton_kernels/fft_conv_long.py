"""Long convolution beyond one fused transform, to 4,194,304 points: three passes over a workspace, both ways.

Shape letters: B batch, D channels, L length, M output length, N = N0 ROW points of the transform, ROW = N1 N2, P
pieces of N0, C columns in a tile, S parts of the batch. The transform is the right-angle one of fft_device.py, in
three factors (fft_long_device.py); filters are in fft_long_filters.py. `supports`, `fft_conv_fwd` and `fft_conv_bwd`
are the op's: what one fused transform holds goes to fft_conv.py.

    pass 1, columns   x gate mask -> times F0 [N0, N0] from the left, times the row's shift     -> workspace
    pass 2, rows      [N1, N2] of one k0: inner transform, product with the spectrum, inverse, in place
    pass 3, columns   workspace -> times conj F0, real part, bias, gates, mask                  -> out

N is the least multiple of ROW (2,048 or 4,096) that holds M: 16,385 outputs take 18,432 points, 100,000 take 100,352.
Pieces of a column without samples stay out of the products, those without outputs are not computed.

What bounds it, a point of a gated call in half precision: 8 bytes in each pass, 24 in all where 8 are the floor (20
and 4 without gates): x and gate in, 4 of workspace out; 4 in, 4 out; 4 and the other gate in, 2 out. And 8 N0 + 16
(N1 + N2) flops: 1,664 at 32,768 (16 x 64 x 32), 4,096 at 1,048,576 (256 x 64 x 64), 10,240 at 4,194,304. B64 D768
bf16 gated on an H200 at 4.8 TB/s and 500 TFLOP/s, predicted: L 32,768 8.1 ms by bytes and 5.4 by flops, 33 % of the
byte floor at best; L 1,048,576 (5.2e10 points) 0.26 s by bytes and 0.42 by flops. Not yet measured on a GPU. Float32
takes three products for one and an 8-byte workspace.

How the work is split: pass 1 and 3 a program for C columns of a row of the batch; pass 2 a program for a k0 of a
channel and several rows of the batch, which share twiddles and spectrum. Columns beyond 64 k0 are read again for
every 64: out of L1 and L2, since a program's columns are up to 256 KiB.

Accuracy: a tile of the workspace has a scale of its own, a power of two, so that only the workspace's rounding
counts: float16's eleven bits, for bfloat16 too, float32's for float32. Half precision rounds twelve operands on the
way, eleven bits each: 6.4e-4 of the result's norm from 65,536 to 4,194,304 points (interpreted); float32 4.6e-7 at
1,048,576.

Memory beyond inputs and outputs: BOUND bytes, or one row's workspace and one channel's spectra (12 N to 40 N bytes)
where that is more; channels, then rows of the batch, take turns in it. Larger pieces cost nothing, smaller ones
launches.

Determinism: every sum has a fixed order that depends on the shapes alone; nothing is added atomically.
"""

import torch
import triton
import triton.language as tl

from . import fft_conv as fused
from . import fft_long_device as dev
from . import fft_long_filters as filters
from .common import Launch, compile_spec, index, meta, strides, wide
from .fft_device import add_product, beside_skip, masked, operand, operands_of
from .fft_filters import geometry, shape_of_spectra
from .fft_long_device import (
    add_back,
    column_factor,
    column_places,
    largest_scale,
    load_back,
    load_columns,
    load_row,
    power_below,
    row_factors,
    row_places,
    row_transform,
    row_twiddles,
    store_columns,
    store_row,
)  # fmt: skip

__all__ = ["fft_conv_bwd", "fft_conv_fwd", "supports"]
FULL: tl.constexpr = tl.constexpr(32768.0)

# --- the passes -----------------------------------------------------------------------------------------------------


@triton.jit
def _fft_conv_columns_kernel(
    ws_ptr, scales_ptr, x_ptr, gate_ptr, mask_ptr, column_ptr, turn_ptr, D, L, N0, P, pieces,
    stride_x_b, stride_x_d, stride_x_l, stride_gate_b, stride_gate_d, stride_gate_l, stride_mask_b, stride_mask_l,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, ONE: tl.constexpr,
    REPLACES: tl.constexpr, OPERANDS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Y of x gate mask into ws (B, D, 2, N0, ROW) and scales (B, D, P, ROW / C). Grid (ROW / C, D, B).

    pieces: those of n0 with samples; ONE: it is one, loaded once.
    """
    ROW: tl.constexpr = N1 * N2
    block, d, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    x_ptr += b * stride_x_b + d * stride_x_d
    if gate_ptr is not None:
        gate_ptr += b * stride_gate_b + d * stride_gate_d
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b
    ws_ptr += (b * D + d) * 2 * N0 * ROW
    scales_ptr += (b * D + d) * P * (ROW // C)
    x = load_columns(
        x_ptr, gate_ptr, mask_ptr, stride_x_l, stride_gate_l, stride_mask_l, 0, block, L, ROW, BLOCK0, C, REPLACES,
        INT64,
    )  # fmt: skip
    largest = tl.max(tl.abs(x))
    if not ONE:
        for p in tl.range(1, pieces, num_stages=1):
            x = load_columns(
                x_ptr, gate_ptr, mask_ptr, stride_x_l, stride_gate_l, stride_mask_l, p, block, L, ROW, BLOCK0, C,
                REPLACES, INT64,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.abs(x)))
    scale = power_below(largest)
    for q in tl.range(P, num_stages=1):
        acc_re = tl.zeros([BLOCK0, C], tl.float32)
        acc_im = tl.zeros([BLOCK0, C], tl.float32)
        if ONE:
            f_re, f_im = column_factor(column_ptr, q, 0, P, BLOCK0, OPERANDS)
            part = operand(x * (1 / scale), OPERANDS)
            acc_re = add_product(acc_re, f_re, part, OPERANDS)
            acc_im = add_product(acc_im, f_im, part, OPERANDS)
        else:
            for p in tl.range(pieces, num_stages=1):
                f_re, f_im = column_factor(column_ptr, q, p, P, BLOCK0, OPERANDS)
                x = load_columns(
                    x_ptr, gate_ptr, mask_ptr, stride_x_l, stride_gate_l, stride_mask_l, p, block, L, ROW, BLOCK0, C,
                    REPLACES, INT64,
                )  # fmt: skip
                part = operand(x * (1 / scale), OPERANDS)
                acc_re = add_product(acc_re, f_re, part, OPERANDS)
                acc_im = add_product(acc_im, f_im, part, OPERANDS)
        store_columns(ws_ptr, scales_ptr, turn_ptr, acc_re, acc_im, scale, q, block, N0, N1, N2, BLOCK0, C)


@triton.jit
def _fft_conv_rows_kernel(
    ws_ptr, back_ptr, scales_ptr, spectrum_ptr, scale_ptr, skip_ptr, n1_ptr, n2_ptr, inner_ptr, shift_ptr, turn_ptr,
    B, D, N0, P, turns, stride_skip_d,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, CONJUGATE: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    """ws (B, D, 2, N0, ROW) to its product with spectrum (D, 2, N0, N1, N2) and skip, with CONJUGATE with its
    conjugate, in place; scales (B, D, P, ROW / C) before, back (B, D, N0) after. Grid (groups of rows, N0, D).
    """
    ROW: tl.constexpr = N1 * N2
    k0, d = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    first = tl.program_id(0) * turns
    spectrum_ptr += d * 2 * N0 * ROW + row_places(k0, N1, N2)
    _, share, skip = beside_skip(scale_ptr, skip_ptr, stride_skip_d, d)
    one_re, one_im, one_minus, two_re, two_im = row_factors(n1_ptr, n2_ptr, N1, N2, OPERANDS)
    for b in tl.range(first, tl.minimum(first + turns, B), num_stages=1):
        row = tl.cast(b, tl.int64) * D + d
        own_ptr = ws_ptr + row * 2 * N0 * ROW
        t_re, t_im = row_twiddles(inner_ptr, shift_ptr, k0, N0, N1, N2)
        x_re, x_im, scale = load_row(
            own_ptr, scales_ptr + row * P * (ROW // C), k0, N0, N1, N2, BLOCK0, C, OPERANDS
        )  # fmt: skip
        x_re, x_im = row_transform(x_re, x_im, one_re, one_im, one_minus, two_re, two_im, t_re, t_im, N1, N2, OPERANDS)
        # |x| is below 2 each way before the transform, that of the spectrum is at most 1.
        g_re, g_im = tl.load(spectrum_ptr), tl.load(spectrum_ptr + N0 * ROW)  # [N1, N2]
        if skip_ptr is not None:
            g_re, g_im = g_re * share + skip, g_im * share
        g_re, g_im = g_re * (FULL / (4 * ROW)), g_im * ((-FULL if CONJUGATE else FULL) / (4 * ROW))
        store_row(
            own_ptr, back_ptr + row * N0, turn_ptr, x_re * g_re - x_im * g_im, x_re * g_im + x_im * g_re, scale, k0, N0,
            one_re, one_im, one_minus, two_re, two_im, t_re, t_im, N1, N2, OPERANDS,
        )  # fmt: skip


@triton.jit
def _fft_conv_back_kernel(
    out_ptr, second_out_ptr, ws_ptr, back_ptr, scale_ptr, skip_ptr, column_ptr, post_ptr, second_post_ptr, mask_ptr,
    bias_ptr, D, L_out, N0, P, stride_out_b, stride_out_d, stride_out_l, stride_second_out_b, stride_second_out_d,
    stride_second_out_l, stride_post_b, stride_post_d, stride_post_l, stride_second_post_b, stride_second_post_d,
    stride_second_post_l, stride_mask_b, stride_mask_l, stride_bias_d, stride_skip_d,
    pieces, N1: tl.constexpr, N2: tl.constexpr, BLOCK0: tl.constexpr, C: tl.constexpr, REPLACES: tl.constexpr,
    OPERANDS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """out = (y + bias) post mask, second_out = (y + bias) second_post mask. Grid (ROW / C, D, B).

    pieces: those of n0 with outputs.
    """
    ROW: tl.constexpr = N1 * N2
    block, d, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    ws_ptr += (b * D + d) * 2 * N0 * ROW
    back_ptr += (b * D + d) * N0
    out_ptr += d * stride_out_d
    if post_ptr is not None:
        post_ptr += d * stride_post_d
    if second_out_ptr is not None:
        second_out_ptr += d * stride_second_out_d
        second_post_ptr += d * stride_second_post_d
    scale = largest_scale(back_ptr, N0, P, BLOCK0)
    total, _, _ = beside_skip(scale_ptr, skip_ptr, stride_skip_d, d)
    factor = scale * total * (4 * ROW / FULL) / N0
    for p in tl.range(pieces, num_stages=1):
        acc = tl.zeros([BLOCK0, C], tl.float32)
        for q in tl.range(P, num_stages=1):
            z_re, z_im = load_back(ws_ptr, back_ptr, scale, q, block, N0, ROW, BLOCK0, C, OPERANDS)
            acc = add_back(acc, z_re, z_im, column_ptr, q, p, P, BLOCK0, OPERANDS)
        y = acc * factor
        if bias_ptr is not None:
            y += tl.load(bias_ptr + d * stride_bias_d).to(tl.float32)
        t = column_places(p, block, ROW, BLOCK0, C)
        inside = t < L_out
        t = index(t, INT64)
        out = y
        if post_ptr is not None:
            at = b * stride_post_b + t * stride_post_l
            out *= tl.load(post_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK0, C]
        out = masked(out, mask_ptr, stride_mask_b, stride_mask_l, b, t, inside, REPLACES)
        at = b * stride_out_b + t * stride_out_l
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
        if second_out_ptr is not None:
            at = b * stride_second_post_b + t * stride_second_post_l
            out = y * tl.load(second_post_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK0, C]
            out = masked(out, mask_ptr, stride_mask_b, stride_mask_l, b, t, inside, REPLACES)
            at = b * stride_second_out_b + t * stride_second_out_l
            tl.store(second_out_ptr + at, out.to(second_out_ptr.dtype.element_ty), mask=inside)


# --- launchers ------------------------------------------------------------------------------------------------------

BOUND = 1 << 28  # bytes of workspace and spectrum at a time: 2,000 rows of 32,768 in half precision, 64 of 1,048,576
WANTED = 4 * 132  # programs, four a multiprocessor of an H100/H200
TIMES = 1 << 13  # of a part of the direct sums


def supports(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, precision=None, spectrum=None) -> str | None:
    """None, or why neither these kernels nor the fused ones compute the call."""
    call = (u, k, k_reverse, skip, bias, pregate, postgate, mask)
    if fused.supports(*call, mode, precision) is None:
        return None
    first = [None if t is None or t.dim() < 2 else t[..., :1] for t in call]
    why = fused.supports(*first, mode, precision)  # of any length
    points = geometry(u, k, mode)[1]
    if why is None and points > dev.MOST:
        why = f"the output has {points} samples, more than {dev.MOST} points can hold"
    if why is None and not dev.fits(operands_of(u.dtype, precision), u.device):
        why = f"{points} samples of split float32 operands need more tensor memory than this GPU has"
    return why


class _Piece:
    """Some channels of some rows of the batch: its tensors, cut, and how its passes are launched."""

    def __init__(self, rows: slice, channels: slice, factors: dict[str, int], operands: str, mask):
        self.rows, self.channels, self.factors, self.operands = rows, channels, factors, operands
        self.cut = lambda t: None if t is None else t[rows, channels]
        self.replaces = mask is not None and mask.dtype == torch.bool
        self.mask = None if mask is None else (mask.view(torch.uint8) if self.replaces else mask)[rows]
        self.blocks = factors["N1"] * factors["N2"] // factors["C"]

    def _pieces(self, points: int) -> int:
        return max(1, triton.cdiv(points, self.factors["N1"] * self.factors["N2"] * self.factors["BLOCK0"]))

    def workspace(self, like: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(workspace (B, D, 2, N) at the begin of a buffer, scales)."""
        shape = self.cut(like).shape[:2]
        ws = buffer[: shape[0] * shape[1] * 2 * dev.points_of(self.factors)].view(*shape, 2, -1)
        scales = buffer.new_empty(*shape, dev.pieces(self.factors), self.blocks, dtype=torch.float32)
        return ws, scales

    def forward(self, columns, x, gate, mask=None) -> Launch:
        x, gate = self.cut(x), self.cut(gate)
        pieces = self._pieces(x.shape[2])
        args = dict(
            ws_ptr=columns[0], scales_ptr=columns[1], x_ptr=x, gate_ptr=gate, mask_ptr=mask, D=x.shape[1],
            L=x.shape[2], pieces=pieces, ONE=pieces == 1, **strides("x", x, "bdl"), **strides("gate", gate, "bdl"),
            **strides("mask", mask, "bl"), REPLACES=self.replaces, INT64=wide(x, gate, mask),
        )  # fmt: skip
        grid = (self.blocks, x.shape[1], x.shape[0])
        return dev.plan(_fft_conv_columns_kernel, grid, args, self.factors, self.operands, x.device)

    def back(
        self, out, second_out, columns, spectrum, scale, skip, post, second_post, mask, bias, conjugate
    ) -> list[Launch]:  # fmt: skip
        """Product and inverse, of the workspace that `forward` filled."""
        out, second_out, post, second_post = map(self.cut, (out, second_out, post, second_post))
        bias = None if bias is None else bias[self.channels]
        batch, channels, length = out.shape
        back = scale.new_empty(batch, channels, self.factors["N0"])
        turns = max(1, min(batch, batch * channels * self.factors["N0"] // WANTED))
        rows = dict(
            ws_ptr=columns[0], back_ptr=back, scales_ptr=columns[1], spectrum_ptr=spectrum, scale_ptr=scale,
            skip_ptr=skip, B=batch, D=channels, turns=turns, **strides("skip", skip, "d"), CONJUGATE=conjugate,
        )  # fmt: skip
        args = dict(
            out_ptr=out, second_out_ptr=second_out, ws_ptr=columns[0], back_ptr=back, scale_ptr=scale, skip_ptr=skip,
            post_ptr=post, second_post_ptr=second_post, mask_ptr=mask, bias_ptr=bias, D=channels, L_out=length,
            **strides("out", out, "bdl"), **strides("second_out", second_out, "bdl"), **strides("post", post, "bdl"),
            **strides("second_post", second_post, "bdl"), **strides("mask", mask, "bl"), **strides("bias", bias, "d"),
            **strides("skip", skip, "d"), pieces=self._pieces(length), REPLACES=self.replaces,
            INT64=wide(out, second_out, post, second_post, mask),
        )  # fmt: skip
        grid = (triton.cdiv(batch, turns), self.factors["N0"], channels)
        return [
            dev.plan(_fft_conv_rows_kernel, grid, rows, self.factors, self.operands, out.device),
            dev.plan(
                _fft_conv_back_kernel, (self.blocks, channels, batch), args, self.factors, self.operands, out.device
            ),
        ]


def _cuts(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _turns(u, factors: dict[str, int], operands: str, buffers: int, spectra: int):
    """(type of the workspace, cuts of the channels, cuts of the batch), so that so many buffers of a row and float32
    spectra of a channel are within BOUND."""
    kind = torch.float32 if operands == "fp16x3" else torch.float16
    row, channel = buffers * 2 * dev.points_of(factors) * kind.itemsize, spectra * 8 * dev.points_of(factors)
    rows = max(1, min(u.shape[0], (BOUND - channel) // row))
    channels = max(1, min(u.shape[1], BOUND // (rows * row + channel)))
    return kind, _cuts(u.shape[1], channels), _cuts(u.shape[0], rows)


def _plan_fwd(out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, precision=None, spectrum=None):
    operands = operands_of(u.dtype, precision)
    factors, given = filters.factors_for(u, out.shape[2], operands, spectrum)
    kind, channels, rows = _turns(u, factors, operands, 1, given is None)
    many = channels[0].stop
    spectra = filters.spectra(u, k, k_reverse, skip, mode, many, factors, given)
    buffer = u.new_empty(rows[0].stop * many * 2 * dev.points_of(factors), dtype=kind)
    for cut in channels:
        spectrum, scale, beside, launches = spectra(cut)
        yield from launches
        for row in rows:
            piece = _Piece(row, cut, factors, operands, mask)
            columns = piece.workspace(u, buffer)
            yield piece.forward(columns, u, pregate, piece.mask)
            yield from piece.back(out, None, columns, spectrum, scale, beside, postgate, None, None, bias, False)


def fft_conv_fwd(out, *args) -> None:
    """fill(out, *op arguments)"""
    if fused.supports(*args) is None:
        return fused.fft_conv_fwd(out, *args)
    for launch in _plan_fwd(out, *args):
        launch.run()


def _plan_bwd(
    du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate, dout, u, k, k_reverse, skip, bias, pregate, postgate, mask,
    mode, precision=None, spectrum=None,
):  # fmt: skip
    """u's and dout's columns are made once, for the filters' gradient and for those of the signals."""
    dk_reverse, dskip = None if k_reverse is None else dk_reverse, None if skip is None else dskip
    dbias, dpregate = None if bias is None else dbias, None if pregate is None else dpregate
    operands, points = operands_of(u.dtype, precision), dout.shape[2]
    factors, given = filters.factors_for(u, points, operands, spectrum)
    kind, channels, rows = _turns(u, factors, operands, 2, 3)
    many = channels[0].stop
    spectra = filters.spectra(u, k, k_reverse, skip, mode, many, factors, given)
    size = rows[0].stop * many * 2 * dev.points_of(factors)
    buffers = u.new_empty(2, size, dtype=kind)
    parts = max(1, min(rows[0].stop, WANTED // (factors["N0"] * many)))
    parts = triton.cdiv(rows[0].stop, triton.cdiv(rows[0].stop, parts))
    real = lambda *shape: u.new_empty(shape, dtype=torch.float32)
    partials, lags = real(parts * many * 2 * dev.points_of(factors)), real(many, 2, dev.points_of(factors))
    sums = [None if t is None else real(triton.cdiv(points, TIMES), u.shape[1]) for t in (dbias, dskip)]
    if any(t is not None for t in sums):
        whole = _Piece(slice(None), slice(None), factors, operands, mask)
        yield filters.plan_sums(*sums, dout, u, pregate, postgate, whole.mask, whole.replaces)
    for cut in channels:
        spectrum, scale, beside, launches = spectra(cut)
        count = cut.stop - cut.start
        partial = partials[: parts * spectrum.numel()].view(parts, *spectrum.shape)
        yield from launches
        for row in rows:
            piece = _Piece(row, cut, factors, operands, mask)
            of_u, of_dout = piece.workspace(u, buffers[0]), piece.workspace(u, buffers[1])
            yield piece.forward(of_u, u, pregate, piece.mask)
            yield piece.forward(of_dout, dout, postgate)
            yield filters.plan_products(partial, of_u, of_dout, factors, operands, row.start > 0)
            yield from piece.back(du, dpregate, of_dout, spectrum, scale, beside, pregate, u, piece.mask, None, True)
            if postgate is not None:
                yield from piece.back(dpostgate, None, of_u, spectrum, scale, beside, dout, None, None, bias, False)
        yield from filters.plan_filters(
            dk, dk_reverse, dskip, dbias, lags[:count], partial, *sums, u, mode, points, factors, cut.start, count
        )


def fft_conv_bwd(*args) -> None:
    """fill(du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate, dout, *op arguments)"""
    if fused.supports(*args[8:]) is None:
        return fused.fft_conv_bwd(*args)
    for launch in _plan_bwd(*args):
        launch.run()


def _specs(dtype: torch.dtype, length: int = 2**15, precision: str | None = None) -> dict[str, Launch]:
    """The launches of a typical call, by name."""
    D, B = 768, max(1, 2**21 // length)
    x, k, vector = meta(B, D, length, dtype=dtype), meta(D, length), meta(D)
    call = (x, k, None, vector, vector, x, x, None, "causal", precision)
    names = ("lag_columns", "lag_rows", "columns", "rows", "back")
    found = dict(zip(names, _plan_fwd(x, *call)))
    given = meta(*shape_of_spectra(D, *found["lag_rows"].args["spectrum_ptr"].shape[2:]))
    found |= dict(zip(("", "rows_given", "back_given"), _plan_fwd(x, *call, given)))
    names = ("sums", *names[:2], "columns", "dout", "bwd", "rows_conjugate", "du", "rows", "dpostgate",
             "gradient_rows", "gradient_columns")  # fmt: skip
    return {**dict(zip(names, _plan_bwd(x, k, None, vector, vector, x, x, x, *call))), **found}


for _name in ("columns", "rows", "back", "bwd", "lag_columns", "lag_rows", "gradient_rows", "gradient_columns", "sums",
              "rows_given", "back_given"):  # fmt: skip
    compile_spec(f"fft_conv_long_{_name}")(lambda dtype, name=_name: _specs(dtype)[name])
compile_spec("fft_conv_long_rows_wide")(lambda dtype: _specs(dtype, 2**20)["rows"])  # 64 x 64
