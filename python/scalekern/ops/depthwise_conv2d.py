"""Depthwise 2-D convolution with large filters and its transpose: public functions, checks, schemas and gradients.

Shape letters: B batch, C channels, H x W input, I x J filter, P x Q output.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import composed
from scalekern.ops import _depthwise
from scalekern.reference.depthwise_conv2d import depthwise_conv2d_bwd as reference_bwd
from scalekern.reference.depthwise_conv2d import depthwise_conv2d_fwd as reference_fwd
from scalekern.reference.depthwise_conv2d import depthwise_conv_transpose2d_bwd as reference_transpose_bwd
from scalekern.reference.depthwise_conv2d import depthwise_conv_transpose2d_fwd as reference_transpose_fwd
from scalekern.reference.depthwise_conv2d import filter_of, pair, sides
from scalekern.reference.depthwise_conv2d import merge_dilated_branches as reference_merge

__all__ = ["depthwise_conv2d", "depthwise_conv_transpose2d", "merge_dilated_branches"]

NAME, TRANSPOSE, MERGE = "depthwise_conv2d", "depthwise_conv_transpose2d", "merge_dilated_branches"


def depthwise_conv2d(x, w, bias=None, *, padding="same", stride=1, dilation=1, method="auto"):
    """out[p, q] = bias + sum_ij w[i, j] x[p s - top + i d, q s - left + j d], channel by channel, x zero outside.

    Nothing is flipped: this is torch's conv2d. Differentiable in x, w and bias.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16, any strides.
        w: (C, I, J), or nn.Conv2d's (C, 1, I, J); may reach beyond the image.   bias: (C,).
        padding: zeros around x: "same" (d (I - 1) rows and d (J - 1) columns, of an odd number one more below and on
            the right, so that P = ceil(H / s)), "valid", an integer, or a pair (rows, columns).
        stride, dilation: an integer or a pair.
        method: "direct" (tap by tap; on a GPU torch's grouped convolution), "fft", or "auto": direct up to 256 taps,
            times the stride's, on a GPU 9 an axis. By FFT an error is relative to the largest values of the image, not
            to those around a pixel.

    Returns:
        out (B, C, P, Q) in x's dtype, P = (H + top + bottom - d (I - 1) - 1) // s + 1. Half precision is computed in
        float32 and rounded once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Ding et al., UniRepLKNet, 2024, section 3; the definition is torch.nn.functional.conv2d's.
    """
    _check(NAME, x, w, bias, stride, dilation, method)
    if padding not in ("same", "valid"):
        _check_pair(NAME, "padding", padding, 0)
    w, stride, dilation = filter_of(w), pair(stride), pair(dilation)
    around = sides(padding, w.shape, dilation)
    spans = (x.shape[2] + around[2] + around[3], x.shape[3] + around[0] + around[1])
    reach = tuple(d * (i - 1) + 1 for d, i in zip(dilation, w.shape[1:]))
    if spans[0] < reach[0] or spans[1] < reach[1]:
        raise ValueError(f"{NAME}: the padded x must be as large as the dilated filter {reach}, got {spans}")
    w, bias = _wide(x, w), _wide(x, bias)
    return depthwise_conv2d_fwd(x, w, bias, around, stride, dilation, method)


def depthwise_conv_transpose2d(
    x, w, bias=None, *, stride=1, padding=0, output_padding=0, dilation=1, method="auto"
):  # fmt: skip
    """out[p s + i d - top, q s + j d - left] += w[i, j] x[p, q], and bias everywhere: depthwise_conv2d's transpose.

    The upsampling form, torch's conv_transpose2d. Differentiable in x, w and bias.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16, any strides.
        w: (C, I, J) or (C, 1, I, J).   bias: (C,).   stride, dilation: an integer or a pair.
        padding: what is cut off on every side, an integer or a pair.
        output_padding: rows and columns added below and on the right, below stride or dilation.
        method: as for depthwise_conv2d.

    Returns:
        out (B, C, P, Q) in x's dtype, P = (H - 1) s - 2 padding + d (I - 1) + output_padding + 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: the definition is torch.nn.functional.conv_transpose2d's.
    """
    _check(TRANSPOSE, x, w, bias, stride, dilation, method)
    _check_pair(TRANSPOSE, "padding", padding, 0)
    _check_pair(TRANSPOSE, "output_padding", output_padding, 0)
    w, stride, dilation = filter_of(w), pair(stride), pair(dilation)
    padding, output_padding = pair(padding), pair(output_padding)
    if any(more >= max(s, d) for more, s, d in zip(output_padding, stride, dilation)):
        raise ValueError(f"{TRANSPOSE}: output_padding must be below stride or dilation, got {output_padding}")
    size = _depthwise.transpose_geometry(x.shape, w.shape, stride, padding, output_padding, dilation).large
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"{TRANSPOSE}: padding must leave something of the output, got {padding}, which leaves {size}")
    w, bias = _wide(x, w), _wide(x, bias)
    return depthwise_conv_transpose2d_fwd(x, w, bias, stride, padding, output_padding, dilation, method)


def merge_dilated_branches(weights, dilations, size):
    """The one filter that equals a sum of parallel dilated depthwise convolutions, all with padding "same".

    Args:
        weights: (..., I, J) filters of the same leading axes, (C, I, J) or (C, 1, I, J); batch norms folded in.
        dilations: an integer or a pair for each.   size: the merged filter's, an integer or a pair.

    Returns:
        (..., *size): every filter with its dilation's zeros put in, centred, summed. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value, named in the message; a dilated
            filter that is larger than size, or that has no centre in it (one odd, one even).

    Source: Ding et al., UniRepLKNet, 2024, section 3: the dilated reparam block.
    """
    for name, values in (("weights", weights), ("dilations", dilations)):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{MERGE}: {name} must be a list or a tuple, got {type(values).__name__}")
    if not 0 < len(weights) == len(dilations):
        raise ValueError(f"{MERGE}: dilations must be one of each weight, at least one, got {dilations!r}")
    _check_pair(MERGE, "size", size, 1)
    for i, (weight, dilation) in enumerate(zip(weights, dilations)):
        _checks.tensor(MERGE, f"weights[{i}]", weight, dims=(2, 3, 4), dtypes=_checks.FLOATING)
        _checks.shape(MERGE, f"weights[{i}]", weight, (*weights[0].shape[:-2], None, None))
        if 0 in weight.shape[-2:]:
            raise ValueError(f"{MERGE}: weights[{i}] must have at least one tap, got shape {tuple(weight.shape)}")
        _check_pair(MERGE, f"dilations[{i}]", dilation, 1)
        _checks.same_device(MERGE, "weights[0]", weights[0], **{f"weights[{i}]": weight})
    return reference_merge(weights, dilations, size)


def _wide(x, tensor):
    """Filters and biases are computed with in float32, or float64, whatever the images' dtype."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tensor if tensor is None or tensor.dtype == real else tensor.to(real)


def _check(op, x, w, bias, stride, dilation, method):
    _checks.tensor(op, "x", x, dims=4, dtypes=_checks.FLOATING)
    channels = x.shape[1]
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have at least one channel, row and column, got shape {tuple(x.shape)}")
    _checks.tensor(op, "w", w, dims=(3, 4), dtypes=_checks.FLOATING)
    _checks.shape(op, "w", w, (channels, None, None), (channels, 1, None, None))
    if 0 in w.shape:
        raise ValueError(f"{op}: w must have at least one tap, got shape {tuple(w.shape)}")
    if bias is not None:
        _checks.tensor(op, "bias", bias, dims=1, dtypes=_checks.FLOATING)
        _checks.shape(op, "bias", bias, (channels,))
    _check_pair(op, "stride", stride, 1)
    _check_pair(op, "dilation", dilation, 1)
    _checks.choice(op, "method", method, _depthwise.METHODS)
    _checks.same_device(op, "x", x, w=w, bias=bias)


def _check_pair(op, name, value, least):
    # Paddings may be made of sizes that are symbols while exporting; strides and dilations are numbers.
    kinds = (int, torch.SymInt) if "padding" in name else int
    values = (value, value) if isinstance(value, kinds) else value
    ok = isinstance(values, (tuple, list)) and len(values) == 2
    ok = ok and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    if not ok or min(values) < least:
        extra = " or 'same' or 'valid'" if (op, name) == (NAME, "padding") else ""
        raise ValueError(f"{op}: {name} must be an integer of at least {least} or a pair{extra}, got {value!r}")


def _allocate_fwd(x, w, bias, padding, stride, dilation, method):
    """The outputs, uninitialized: what the fake returns."""
    small = _depthwise.conv_geometry(x.shape, w.shape, padding, stride, dilation).small
    return x.new_empty(*x.shape[:2], *small)


def _allocate_transpose_fwd(x, w, bias, stride, padding, output_padding, dilation, method):
    large = _depthwise.transpose_geometry(x.shape, w.shape, stride, padding, output_padding, dilation).large
    return x.new_empty(*x.shape[:2], *large)


def _allocate_bwd(dout, x, w, bias, *options):
    return x.new_empty(x.shape), w.new_empty(w.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[3:]
    ctx.save_for_backward(*inputs[:3])


def _backward_of(bwd):
    def backward(ctx, dout):
        x, w, bias = ctx.saved_tensors
        dx, dw, dbias = bwd()(dout, x, w, bias, *ctx.options)
        return dx, dw, None if bias is None else dbias, *(None for _ in ctx.options)

    return backward


_TENSORS = "Tensor x, Tensor w, Tensor? bias"
_OPTIONS = "SymInt[] padding, int[] stride, int[] dilation, str method"
_TRANSPOSE_OPTIONS = "int[] stride, SymInt[] padding, SymInt[] output_padding, int[] dilation, str method"

depthwise_conv2d_fwd = _library.define(
    NAME,
    f"depthwise_conv2d_fwd({_TENSORS}, {_OPTIONS}) -> Tensor",
    backends=composed(_depthwise.conv_fwd, reference_fwd),
    fake=_allocate_fwd,
    empty=lambda x, *rest: x.numel() == 0,
    setup_context=_setup_context,
    backward=_backward_of(lambda: depthwise_conv2d_bwd),
    autocast=("x",),
)

depthwise_conv2d_bwd = _library.define(
    NAME,
    f"depthwise_conv2d_bwd(Tensor dout, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backends=composed(_library.without_autocast(_depthwise.conv_bwd), reference_bwd),
    fake=_allocate_bwd,
    empty=lambda dout, x, *rest: x.numel() == 0,
)

depthwise_conv_transpose2d_fwd = _library.define(
    TRANSPOSE,
    f"depthwise_conv_transpose2d_fwd({_TENSORS}, {_TRANSPOSE_OPTIONS}) -> Tensor",
    backends=composed(_depthwise.transpose_fwd, reference_transpose_fwd),
    fake=_allocate_transpose_fwd,
    empty=lambda x, *rest: x.numel() == 0,
    setup_context=_setup_context,
    backward=_backward_of(lambda: depthwise_conv_transpose2d_bwd),
    autocast=("x",),
)

depthwise_conv_transpose2d_bwd = _library.define(
    TRANSPOSE,
    f"depthwise_conv_transpose2d_bwd(Tensor dout, {_TENSORS}, {_TRANSPOSE_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backends=composed(_library.without_autocast(_depthwise.transpose_bwd), reference_transpose_bwd),
    fake=_allocate_bwd,
    empty=lambda dout, x, *rest: x.numel() == 0,
)
