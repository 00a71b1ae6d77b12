"""The Hadamard transform, and its fusion with dynamic quantization: public functions, checks, schemas, gradient.

Shape letters: n points of the last axis, m order of the matrix beside Sylvester's.
"""

import numbers

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, triton
from scalekern.ops import _hadamard
from scalekern.reference.hadamard_transform import MATRICES, ORDERS
from scalekern.reference.hadamard_transform import fused_hadamard_quantize_fwd as reference_quantize
from scalekern.reference.hadamard_transform import hadamard_transform_fwd as reference_fwd

NAME, QUANTIZE = "hadamard_transform", "fused_hadamard_quantize"


def hadamard_transform(x, scale=1.0, *, order=None, matrices="fast_hadamard_transform", transposed=False):
    """out[i] = scale sum_j H[i, j] x[j] over the last axis, H = H_m (x) H_2^k. Differentiable, to any order.

    H_2^k is Sylvester's matrix, whose sign at i, j is the parity of the bits of i & j; with scale = n^(-1/2) the
    transform is orthogonal. The H_m of orders 20, 28 and 40 are not symmetric: the gradient goes through H's transpose.

    Args:
        x: (..., n), float64, float32, float16 or bfloat16, any strides.
        scale: a number, which the sums are multiplied by before they are rounded.
        order: m, one of 1, 12, 20, 28, 40. None: the first of 1, 40, 28, 20, 12 with n = m 2^k, else 1. Where n is not
            m 2^k, zeros are appended to x up to the next m 2^k, and the n first points of the product are returned.
        matrices: whose H_m, sign by sign. "fast_hadamard_transform", which has functions for these orders: 12 is Paley
            II of q = 5, 20 and 28 are Williamson's, 40 is H_2 (x) Paley I of q = 19. "quarot", also SpinQuant's: 12
            and 20 are Paley I of q = 11 and 19, 28 is Paley II of q = 13 in blocks, 40 the same.
        transposed: multiply by H's transpose instead, which is n / scale^2 times the inverse where nothing is padded.

    Returns:
        out (..., n) in x's dtype, summed in float32, or float64 for float64 x, and rounded once. On a CPU with
        instructions of bfloat16 subnormal numbers count as 0 where x is bfloat16.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or value, named in the message.

    Source: Ashkboos et al., QuaRot, 2024, section 3; Paley, On orthogonal matrices, 1933; Williamson, Hadamard's
    determinant theorem and the sum of four squares, 1944.
    """
    _check(NAME, x, scale, order, matrices)
    _checks.flag(NAME, "transposed", transposed)
    return hadamard_transform_fwd(x, _checks.number(NAME, "scale", scale), order or 0, matrices, transposed)


def fused_hadamard_quantize(
    x, scale=1.0, *, bits=8, group_size=None, order=None, matrices="fast_hadamard_transform"
):  # fmt: skip
    """(q, scales) of y = hadamard_transform(x, scale): symmetric integers, one scale a token or group of points.

        scales = max |y| / (2^(bits - 1) - 1)        q = y / scales, rounded half to even

    y stays in float32 between the two, also for half precision x. Not differentiable: it is for inference.

    Args:
        x: (..., n), float64, float32, float16 or bfloat16, any strides.
        scale, order, matrices: as for hadamard_transform.
        bits: 2 to 8; each integer takes a byte of its own, nothing is packed.
        group_size: neighbouring points that share a scale, a divisor of n; None: a whole token.

    Returns:
        q (..., n) int8 in -(2^(bits - 1) - 1) .. 2^(bits - 1) - 1, and scales (..., n / group_size) float32. Both
        divisions are IEEE's in float32 (for float64 x in float64, by the scale as returned). Zeros have scale 0; where
        y / scales is not a number (zeros, NaN, infinities) q is 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or value, named in the message.

    Source: Ashkboos et al., QuaRot, 2024, section 4: online transforms before quantized products.
    """
    _check(QUANTIZE, x, scale, order, matrices)
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{QUANTIZE}: bits must be an integer from 2 to 8, got {bits!r}")
    if group_size is not None:
        _checks.at_least(QUANTIZE, "group_size", group_size, 1)
        if x.shape[-1] % group_size:
            raise ValueError(f"{QUANTIZE}: group_size must divide the {x.shape[-1]} points of x, got {group_size}")
    scale = _checks.number(QUANTIZE, "scale", scale)
    return _fused_hadamard_quantize(x, scale, bits, group_size or 0, order or 0, matrices)


def _check(op, x, scale, order, matrices):
    if not isinstance(x, torch.Tensor):
        _checks.tensor(op, "x", x, dims=1)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got shape ()")
    _checks.dtype(op, "x", x, *_checks.FLOATING)
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{op}: scale must be a number, got {type(scale).__name__}")
    if order is not None:
        _checks.choice(op, "order", order, ORDERS)
    _checks.choice(op, "matrices", matrices, MATRICES)


def _allocate_fwd(x, scale, order, matrices, transposed):
    """The output, uninitialized: what the fake returns and what the backends fill."""
    return x.new_empty(x.shape)


def _allocate_quantize(x, scale, bits, group_size, order, matrices):
    groups = x.shape[-1] // group_size if group_size else 1
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[1:]


def _backward(ctx, dout):
    scale, order, matrices, transposed = ctx.options
    return hadamard_transform_fwd(dout, scale, order, matrices, not transposed), None, None, None, None


def _backends(allocate, function, fill, reference, supports=lambda *args: None):
    return (
        Backend("triton", filling(allocate, triton("hadamard_transform", function)), supports),
        Backend("cpu", filling(allocate, fill)),
        Backend("reference", reference),
    )


# Its own transpose is its backward, so that gradients of every order run on the same kernels.
hadamard_transform_fwd = _library.define(
    NAME,
    "hadamard_transform_fwd(Tensor x, float scale, int order, str matrices, bool transposed) -> Tensor",
    backends=_backends(_allocate_fwd, "hadamard_transform_fwd", _hadamard.transform, reference_fwd),
    fake=_allocate_fwd,
    empty=lambda x, *rest: x.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x",),
)

_fused_hadamard_quantize = _library.define(
    QUANTIZE,
    "fused_hadamard_quantize(Tensor x, float scale, int bits, int group_size, int order, str matrices) "
    "-> (Tensor, Tensor)",
    backends=_backends(_allocate_quantize, "fused_hadamard_quantize", _hadamard.quantize, reference_quantize,
                       _hadamard.triton_refuses_to_quantize),
    fake=_allocate_quantize,
    empty=lambda x, *rest: x.numel() == 0,
    no_gradient="this quantizing op has no gradient; train with hadamard_transform and fake quantization",
)
