"""Oracle of the depthwise 2-D convolution, of its transposed form and of their derivatives.

Shape letters: B batch, C channels, H x W input, I x J filter, P x Q output.

    conv        out[p, q] = bias + sum_ij w[i, j] x[p s - top + i d, q s - left + j d]       x zero outside
    transposed  out[p s + i d - top, q s + j d - left] += w[i, j] x[p, q]                    and bias everywhere

Nothing is flipped: this is torch's conv2d, a correlation. Computed in float32, or float64 for float64 inputs.
"""

import torch
import torch.nn.functional as F


def depthwise_conv2d(x, w, bias=None, *, padding="same", stride=1, dilation=1, method="auto"):
    """Same arguments and result as scalekern.depthwise_conv2d. Differentiable by autograd.

    Args:
        x: (B, C, H, W).   w: (C, I, J), or nn.Conv2d's (C, 1, I, J); may reach beyond the image.   bias: (C,).
        padding: zeros around x: "same" (d (I - 1) rows and d (J - 1) columns, of an odd number one more below and on
            the right, so that P = ceil(H / s)), "valid", an integer, or a pair (rows, columns).
        stride, dilation: an integer or a pair.   method: the oracle has one.

    Returns:
        out (B, C, P, Q) in x's dtype, P = (H + top + bottom - d (I - 1) - 1) // s + 1.

    Source: Ding et al., UniRepLKNet, 2024, section 3; the definition is torch.nn.functional.conv2d's.
    """
    return depthwise_conv2d_fwd(x, filter_of(w), bias, padding, stride, dilation)


def depthwise_conv2d_fwd(x, w, bias, padding, stride, dilation, method="auto"):
    """out (B, C, P, Q), w (C, I, J)."""
    real = _wide(x)
    padded = F.pad(x.to(real), sides(padding, w.shape, dilation))
    bias = None if bias is None else bias.to(real)
    out = F.conv2d(padded, w.to(real)[:, None], bias, pair(stride), 0, pair(dilation), groups=w.shape[0])
    return out.to(x.dtype)


def depthwise_conv2d_bwd(dout, x, w, bias, padding, stride, dilation, method="auto"):
    """(dx, dw, dbias), dbias empty (0,) without a bias. Tap by tap, x' the padded x:

    dx'[p s + i d, q s + j d] += w[i, j] dout[p, q]        dw[i, j] = sum_bpq dout[p, q] x'[p s + i d, q s + j d]
    """
    real = _wide(x)
    left, right, top, bottom = sides(padding, w.shape, dilation)
    padded, dy, w_ = F.pad(x.to(real), (left, right, top, bottom)), dout.to(real), w.to(real)
    dpadded, dw = torch.zeros_like(padded), torch.zeros_like(w_)
    for i, j, place in _taps(w, dout.shape, stride, dilation):
        dpadded[place] += w_[:, i, j, None, None] * dy
        dw[:, i, j] = (dy * padded[place]).sum((0, 2, 3))
    dx = F.pad(dpadded, (-left, -right, -top, -bottom))
    return dx.to(x.dtype), dw.to(w.dtype), _dbias(dy, x, bias)


def depthwise_conv_transpose2d(
    x, w, bias=None, *, stride=1, padding=0, output_padding=0, dilation=1, method="auto"
):  # fmt: skip
    """The upsampling form, the transpose of depthwise_conv2d as a linear map. Differentiable by autograd.

    Args:
        x: (B, C, H, W).   w: (C, I, J) or (C, 1, I, J).   bias: (C,).   stride, dilation: an integer or a pair.
        padding: what is cut off on every side, an integer or a pair.
        output_padding: rows and columns added below and on the right, below stride or dilation.
        method: the oracle has one.

    Returns:
        out (B, C, P, Q) in x's dtype, P = (H - 1) s - 2 padding + d (I - 1) + output_padding + 1.

    Source: the definition is torch.nn.functional.conv_transpose2d's.
    """
    return depthwise_conv_transpose2d_fwd(x, filter_of(w), bias, stride, padding, output_padding, dilation)


def depthwise_conv_transpose2d_fwd(x, w, bias, stride, padding, output_padding, dilation, method="auto"):
    """out (B, C, P, Q), w (C, I, J)."""
    real = _wide(x)
    bias = None if bias is None else bias.to(real)
    options = (pair(stride), pair(padding), pair(output_padding), w.shape[0], pair(dilation))
    return F.conv_transpose2d(x.to(real), w.to(real)[:, None], bias, *options).to(x.dtype)


def depthwise_conv_transpose2d_bwd(dout, x, w, bias, stride, padding, output_padding, dilation, method="auto"):
    """(dx, dw, dbias), dbias empty (0,) without a bias. Tap by tap, dout' with the cut rows and columns as zeros:

    dx[p, q] = sum_ij w[i, j] dout'[p s + i d, q s + j d]      dw[i, j] = sum_bpq x[p, q] dout'[p s + i d, q s + j d]
    """
    real = _wide(x)
    rows, columns = pair(padding)
    dy, x_, w_ = F.pad(dout.to(real), (columns, columns, rows, rows)), x.to(real), w.to(real)
    dx, dw = torch.zeros_like(x_), torch.zeros_like(w_)
    for i, j, place in _taps(w, x.shape, stride, dilation):
        dx += w_[:, i, j, None, None] * dy[place]
        dw[:, i, j] = (x_ * dy[place]).sum((0, 2, 3))
    return dx.to(x.dtype), dw.to(w.dtype), _dbias(dout.to(real), x, bias)


def merge_dilated_branches(weights, dilations, size):
    """The one filter that equals a sum of parallel dilated depthwise convolutions: see the op."""
    size, total = pair(size), 0
    for weight, dilation in zip(weights, dilations, strict=True):
        dilation = pair(dilation)
        reach = tuple(d * (n - 1) + 1 for d, n in zip(dilation, weight.shape[-2:]))
        if any(n > s or (s - n) % 2 for n, s in zip(reach, size)):
            raise ValueError(
                f"merge_dilated_branches: size must be at least each dilated filter's and odd or even like it, "
                f"got size {size} and a dilated filter of {reach}"
            )
        (top, left), (d, e) = ((s - n) // 2 for n, s in zip(reach, size)), dilation
        merged = weight.new_zeros(*weight.shape[:-2], *size)
        merged[..., top : top + reach[0] : d, left : left + reach[1] : e] = weight
        total = total + merged
    return total


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def filter_of(w):
    return w[:, 0] if w.dim() == 4 else w


def pair(value):
    return (value, value) if isinstance(value, (int, torch.SymInt)) else tuple(value)


def sides(padding, w_shape, dilation):
    """(left, right, top, bottom), as F.pad takes them, of a padding, or given as such."""
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return tuple(padding)
    if padding == "valid":
        padding = 0
    if padding != "same":
        rows, columns = pair(padding)
        return columns, columns, rows, rows
    rows, columns = (d * (n - 1) for d, n in zip(pair(dilation), w_shape[1:]))
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def _taps(w, grid, stride, dilation):
    """(i, j, index) of every tap: the places in the larger image that it connects with the grid (.., P, Q)."""
    (s, t), (d, e) = pair(stride), pair(dilation)
    for i in range(w.shape[1]):
        for j in range(w.shape[2]):
            rows = slice(i * d, i * d + (grid[2] - 1) * s + 1, s)
            columns = slice(j * e, j * e + (grid[3] - 1) * t + 1, t)
            yield i, j, (slice(None), slice(None), rows, columns)


def _dbias(dy, x, bias):
    return x.new_empty(0) if bias is None else dy.sum((0, 2, 3)).to(bias.dtype)
