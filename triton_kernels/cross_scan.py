"""Images to lines in up to four directions (cross_scan), and the sum of such lines back (cross_merge).

Shape letters: B batch, D channels of the image, K directions, P channels of a direction, H x W image, L = H W.

Never measured. What should bound it: HBM bytes. A scan reads the image once and writes it K times, a merge the other
way round; there is no arithmetic but the K - 1 additions of a merge.

How the work is split: a program owns BLOCK_H x BLOCK_W pixels of one channel of one image and makes all directions of
them. Lines that run along columns take the tile's transpose, so that the last axis of every tile that is loaded or
stored lies along its line: neighbours of a warp are then neighbours in memory, also in the reversed directions, whose
steps of -1 the compiler's analysis does not follow. Grouped, a channel has one direction, which is read out of a
packed argument at run time, and the tile is kept either way round by a branch.
"""

import torch
import triton
import triton.language as tl

from ..ops._cross_scan import code
from .common import Launch, compile_spec, index, meta, strides, wide

__all__ = ["cross_merge_fwd", "cross_scan_fwd"]

BLOCK = 32  # pixels a side: a transposed line of a tile fills a sector in half precision, two in float32

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _place(h, w, H, W, DIRECTION: tl.constexpr, INT64: tl.constexpr):
    """Where the pixels (h, w) lie in a line of one of the four directions."""
    if DIRECTION % 2 == 1:
        at = index(w, INT64) * H + h
    else:
        at = index(h, INT64) * W + w
    if DIRECTION >= 2:
        at = index(H, INT64) * W - 1 - at
    return at


@triton.jit
def _tile(H, W, BLOCK: tl.constexpr):
    """(plane, h, w) of a program: planes outside, then rows of tiles, then columns of tiles."""
    across = tl.cdiv(W, BLOCK)
    tiles = tl.cdiv(H, BLOCK) * across
    pid = tl.program_id(0).to(tl.int64)
    plane, tile = pid // tiles, (pid % tiles).to(tl.int32)
    return plane, tile // across * BLOCK + tl.arange(0, BLOCK), tile % across * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _store(line_ptr, x, xt, h, w, H, W, DIRECTION: tl.constexpr, INT64: tl.constexpr):
    """The tile x [BLOCK h, BLOCK w], or its transpose, into a line."""
    if DIRECTION % 2 == 1:
        at = _place(h[None, :], w[:, None], H, W, DIRECTION, INT64)
        tl.store(line_ptr + at, xt, mask=(w < W)[:, None] & (h < H)[None, :])
    else:
        at = _place(h[:, None], w[None, :], H, W, DIRECTION, INT64)
        tl.store(line_ptr + at, x, mask=(h < H)[:, None] & (w < W)[None, :])


@triton.jit
def _load(line_ptr, h, w, H, W, stride_l, DIRECTION: tl.constexpr, INT64: tl.constexpr):
    """The tile [BLOCK h, BLOCK w] out of a line, in the type that is summed."""
    if DIRECTION % 2 == 1:
        at = _place(h[None, :], w[:, None], H, W, DIRECTION, INT64) * stride_l
        y = tl.trans(tl.load(line_ptr + at, mask=(w < W)[:, None] & (h < H)[None, :], other=0.0))
    else:
        at = _place(h[:, None], w[None, :], H, W, DIRECTION, INT64) * stride_l
        y = tl.load(line_ptr + at, mask=(h < H)[:, None] & (w < W)[None, :], other=0.0)
    return y if y.dtype == tl.float64 else y.to(tl.float32)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _cross_scan_fwd_kernel(
    out_ptr, x_ptr, D, H, W, P, stride_x_b, stride_x_d, stride_x_h, stride_x_w,
    CODE: tl.constexpr, K: tl.constexpr, GROUPED: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, K, P, L) contiguous. CODE: two bits a direction, the first lowest. Grid (B D tiles,)."""
    plane, h, w = _tile(H, W, BLOCK)
    b, d = plane // D, plane % D
    at = index(h, INT64)[:, None] * stride_x_h + index(w, INT64)[None, :] * stride_x_w
    x = tl.load(x_ptr + b * stride_x_b + d * stride_x_d + at, mask=(h < H)[:, None] & (w < W)[None, :], other=0.0)
    xt = tl.trans(x)  # [BLOCK w, BLOCK h]
    size = tl.cast(H, tl.int64) * W
    for k in tl.static_range(K):
        if GROUPED:
            if d // P == k:
                _store(out_ptr + plane * size, x, xt, h, w, H, W, CODE >> 2 * k & 3, INT64)
        else:
            _store(out_ptr + ((b * K + k) * P + d) * size, x, xt, h, w, H, W, CODE >> 2 * k & 3, INT64)


@triton.jit
def _cross_merge_fwd_kernel(
    out_ptr, y_ptr, D, H, W, P, stride_y_b, stride_y_k, stride_y_p, stride_y_l,
    CODE: tl.constexpr, K: tl.constexpr, GROUPED: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, D, H, W) contiguous, summed in the order of the directions. Grid (B D tiles,)."""
    plane, h, w = _tile(H, W, BLOCK)
    b, d = plane // D, plane % D
    acc = tl.zeros([BLOCK, BLOCK], tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32)
    y_ptr += b * stride_y_b
    for k in tl.static_range(K):
        if GROUPED:
            if d // P == k:
                line = y_ptr + k * tl.cast(stride_y_k, tl.int64) + d % P * stride_y_p
                acc += _load(line, h, w, H, W, stride_y_l, CODE >> 2 * k & 3, INT64)
        else:
            line = y_ptr + k * tl.cast(stride_y_k, tl.int64) + d * stride_y_p
            acc += _load(line, h, w, H, W, stride_y_l, CODE >> 2 * k & 3, INT64)
    to = out_ptr + plane * (tl.cast(H, tl.int64) * W) + index(h, INT64)[:, None] * W + w[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(h < H)[:, None] & (w < W)[None, :])


# --- launchers ------------------------------------------------------------------------------------------------------


def _plan(kernel, out, lines, image, directions, grouped, **args) -> Launch:
    batch, channels, rows, columns = image.shape
    tiles = triton.cdiv(rows, BLOCK) * triton.cdiv(columns, BLOCK)
    args |= dict(
        out_ptr=out, D=channels, H=rows, W=columns, P=lines.shape[2],
        CODE=code(directions), K=len(directions), GROUPED=grouped, INT64=wide(lines, image), BLOCK=BLOCK,
    )  # fmt: skip
    return Launch(kernel, (batch * channels * tiles,), args, 4)


def plan_cross_scan_fwd(out, x, directions, grouped) -> Launch:
    return _plan(_cross_scan_fwd_kernel, out, out, x, directions, grouped, x_ptr=x, **strides("x", x, "bdhw"))


def plan_cross_merge_fwd(out, y, directions, grouped) -> Launch:
    return _plan(_cross_merge_fwd_kernel, out, y, out, directions, grouped, y_ptr=y, **strides("y", y, "bkpl"))


def cross_scan_fwd(out, x, directions, grouped) -> None:
    """fill(out, *op arguments)"""
    plan_cross_scan_fwd(out, x, directions, grouped).run()


def cross_merge_fwd(out, y, size, directions, grouped) -> None:
    """fill(out, *op arguments)"""
    plan_cross_merge_fwd(out, y, directions, grouped).run()


def _spec(plan, dtype: torch.dtype, grouped: bool) -> Launch:
    lines, image = meta(8, 4, 24 if grouped else 96, 56 * 56, dtype=dtype), meta(8, 96, 56, 56, dtype=dtype)
    out, given = (lines, image) if plan is plan_cross_scan_fwd else (image, lines)
    return plan(out, given, (0, 1, 2, 3), grouped)


compile_spec("cross_scan_fwd")(lambda dtype: _spec(plan_cross_scan_fwd, dtype, False))
compile_spec("cross_merge_fwd")(lambda dtype: _spec(plan_cross_merge_fwd, dtype, False))
compile_spec("cross_scan_grouped")(lambda dtype: _spec(plan_cross_scan_fwd, dtype, True))
compile_spec("cross_merge_grouped")(lambda dtype: _spec(plan_cross_merge_fwd, dtype, True))
