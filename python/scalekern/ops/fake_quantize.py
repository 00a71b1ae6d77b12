"""Straight-through rounding to a low-bit grid with learned steps: public function, checks, schemas and gradient.

Shape letters: K columns, G groups of columns.
"""

from scalekern import _checks, _library
from scalekern._dispatch import composed
from scalekern.ops import _fake_quantize
from scalekern.reference.fake_quantize import fake_quantize_bwd as reference_bwd
from scalekern.reference.fake_quantize import fake_quantize_fwd as reference_fwd

NAME = "fake_quantize"
MAX_BITS = 16  # codes that float32 tells apart next to a fractional zero


def fake_quantize(x, scale, zero=None, *, bits=8, group_size=None, grad_factor=1.0):
    """(clamp(round(x / scale + zero), 0, 2^bits - 1) - zero) * scale, differentiable for x, scale and zero.

    What an integer format of `scalekern.quant` makes of x, inside of a graph: for quantization-aware training. The
    gradient passes by the rounding: dx is dout where x / scale + zero lies in the range, ends included, and 0
    outside. With code the rounded and clamped number, dscale sums dout * (code - zero - x / scale) inside and
    dout * (code - zero) outside; dzero sums -dout * scale outside.

    Args:
        x: (..., K), float64, float32, float16 or bfloat16, any strides: a weight or activations.
        scale: floating, the size of a step. Broadcasts to x, or with groups to (..., G): () for one step, (N, 1) for
            rows of a weight, (N, G) for groups. Elements of scale 0 become 0.
        zero: floating, likewise, in codes: the (fractional) code of the value 0. None for 2^(bits-1), the signed
            range -2^(bits-1) ... 2^(bits-1) - 1; zeros for an unsigned one. LSQ+'s offset beta is -zero * scale.
        bits: 2 to 16.
        group_size: columns that share a number of scale and zero, G = ceil(K / group_size); the last may be short.
        grad_factor: float, a factor of the gradients of scale and zero. LSQ takes
            (elements a scale * (2^(bits-1) - 1))^-1/2, which balances them with the weight's.

    Returns:
        x's shape and dtype, computed in float32 (float64 for float64), the code in float32 with halves to even.
        NaN stays NaN; Inf becomes the end of the range.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Esser et al., Learned Step Size Quantization, 2020, equations 1 to 3; Bhalgat et al., LSQ+, 2020, section
    3.1; the straight-through estimator, Bengio et al., 2013.
    """
    _checks.tensor(NAME, "x", x, dims=range(1, 65), dtypes=_checks.FLOATING)
    _checks.at_least(NAME, "bits", bits, 2)
    if bits > MAX_BITS:
        raise ValueError(f"{NAME}: bits must be at most {MAX_BITS}, got {bits}")
    if group_size is not None:
        _checks.at_least(NAME, "group_size", group_size, 1)
    target = x.shape if group_size is None else (*x.shape[:-1], -(-x.shape[-1] // group_size))
    for name, part in (("scale", scale), ("zero", zero)):
        if part is None and name == "zero":
            continue
        _checks.tensor(NAME, name, part, dims=range(65), dtypes=_checks.FLOATING)
        matched = zip(reversed(part.shape), reversed(target))
        if part.dim() > len(target) or any(size not in (1, wanted) for size, wanted in matched):
            raise ValueError(f"{NAME}: {name} must broadcast to {tuple(target)}, got shape {tuple(part.shape)}")
    _checks.same_device(NAME, "x", x, scale=scale, zero=zero)
    grad_factor = _checks.number(NAME, "grad_factor", grad_factor)
    return fake_quantize_fwd(x, scale, zero, bits, group_size, grad_factor)


def _allocate_fwd(x, *rest):
    """The output, uninitialized: what the fake returns."""
    return x.new_empty(x.shape)


def _allocate_bwd(dout, x, scale, zero, *options):
    dzero = x.new_empty(0) if zero is None else zero.new_empty(zero.shape)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), dzero


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[3:]
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, dout):
    x, scale, zero = ctx.saved_tensors
    dx, dscale, dzero = fake_quantize_bwd(dout, x, scale, zero, *ctx.options)
    return dx, dscale, None if zero is None else dzero, None, None, None


_TENSORS = "Tensor x, Tensor scale, Tensor? zero"
_OPTIONS = "int bits, int? group_size, float grad_factor"

fake_quantize_fwd = _library.define(
    NAME,
    f"fake_quantize_fwd({_TENSORS}, {_OPTIONS}) -> Tensor",
    backends=composed(_fake_quantize.forward, reference_fwd),
    fake=_allocate_fwd,
    empty=lambda x, *rest: x.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
)

fake_quantize_bwd = _library.define(
    NAME,
    f"fake_quantize_bwd(Tensor dout, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backends=composed(_library.without_autocast(_fake_quantize.backward), reference_bwd),
    fake=_allocate_bwd,
    empty=lambda dout, x, *rest: x.numel() == 0,
)
