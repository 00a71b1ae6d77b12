"""What the scans over 8-bit inputs share: checks, codes that are read as numbers piece by piece, gradients of steps.

Shape letters: B batch, L length, D channels, H heads, P head dim, G groups of B and C, N state size.
"""

import torch

from scalekern import _checks
from scalekern.ops import _ssd
from scalekern.ops.fake_quantize import fake_quantize
from scalekern.reference.quantized_scan import dequantize_channels

DTYPES = (torch.int8, *_checks.FLOATING)


def real_of(io):
    return torch.float64 if io == torch.float64 else torch.float32


def to(t, dtype):
    return t if t is None or t.dtype == dtype else t.to(dtype)


def check_scale(op, name, scale, of, codes, axes):
    """Of the shape that `codes`, the argument `of`, has in these axes."""
    shape = codes.shape[axes]
    _checks.tensor(op, name, scale, dims=len(shape), dtypes=_checks.FLOATING)
    _checks.shape(op, name, scale, shape)
    _checks.same_device(op, of, codes, **{name: scale})


def all_codes(*tensors):
    """Whether all are int8. Else the scan is one of numbers, which `rounded` lays on the grid."""
    return all(t.dtype == torch.int8 for t in tensors)


def rounded(x, scale, real):
    """The multiples of `scale` (which broadcasts) that x stands for, or that are nearest: differentiable for both."""
    return x.to(real) * scale if x.dtype == torch.int8 else fake_quantize(x.to(real), scale)


class Codes:
    """int8 codes that read as the numbers they stand for: an index gives codes * scale, and no more than that."""

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale, self.dtype = codes, scale.to(dtype), dtype
        self.shape, self.device = codes.shape, codes.device

    def __getitem__(self, index):
        return self.codes[index].to(self.dtype) * self.scale


class StepGradient:
    """In place of the gradient of numbers: what is written to it adds, times the codes, to that of their steps."""

    def __init__(self, codes: Codes, axes):
        self.codes, self.axes, self.total = codes.codes, axes, 0

    def __setitem__(self, index, grad):
        self.total = self.total + (grad * self.codes[index]).sum(self.axes)


def _as_numbers(x, dt, B, C, x_scale, B_scale, C_scale):
    real = real_of(dt.dtype)
    return Codes(x, x_scale, real), Codes(B, B_scale[:, None], real), Codes(C, C_scale[:, None], real)


def ssd_forward(out, final, varlen, x, dt, A, B, C, x_scale, B_scale, C_scale, *rest):
    """ops/_ssd.py's, over codes that become numbers a piece at a time: there is no float copy of x."""
    x, B, C = _as_numbers(x, dt, B, C, x_scale, B_scale, C_scale)
    _ssd.forward(out, final, varlen, x, dt, A, B, C, *rest)


def ssd_backward(
    ddt, dA, dx_scale, dB_scale, dC_scale, dD, dz, ddt_bias, dinitial,
    dout, dfinal, dvarlen, x, dt, A, B, C, x_scale, B_scale, C_scale, *rest,
):  # fmt: skip
    x, B, C = _as_numbers(x, dt, B, C, x_scale, B_scale, C_scale)
    steps = StepGradient(x, (0, 1)), StepGradient(B, (0, 1, 3)), StepGradient(C, (0, 1, 3))
    _ssd.backward(
        steps[0], ddt, dA, *steps[1:], dD, dz, ddt_bias, dinitial, dout, dfinal, dvarlen, x, dt, A, B, C, *rest
    )  # fmt: skip
    for filled, step in zip((dx_scale, dB_scale, dC_scale), steps):
        filled.copy_(step.total)


def selective_forward(u, delta, A, B, C, u_scale, B_scale, C_scale, D, z, *rest, scan):
    """The numbers, and the plain scan over them, in the dtype of its sums."""
    real = real_of(delta.dtype)
    u, B, C = dequantize_channels(u, B, C, u_scale, B_scale, C_scale, real)
    out, *states = scan(u, to(delta, real), A, B, C, D, to(z, real), *rest)
    return torch.empty_like(u, dtype=delta.dtype).copy_(out), *states


def selective_backward(dout, dlast_state, u, delta, A, B, C, u_scale, B_scale, C_scale, D, z, *rest, scan):
    real = real_of(delta.dtype)
    numbers = dequantize_channels(u, B, C, u_scale, B_scale, C_scale, real)
    du, ddelta, dA, dB, dC, dD, dz, *others = scan(
        to(dout, real), dlast_state, numbers[0], to(delta, real), A, *numbers[1:], D, to(z, real), *rest
    )  # fmt: skip
    dscales = du.mul_(u).sum((0, 2)), dB.mul_(B).sum((0, 2, 3)), dC.mul_(C).sum((0, 2, 3))
    own = lambda grad, t: grad if t is None else torch.empty_like(t).copy_(grad)
    return own(ddelta, delta), dA, *dscales, dD, to(dz, delta.dtype) if z is None else own(dz, z), *others
