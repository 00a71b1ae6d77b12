"""The oracle of fake_quantize: rounding with the gradient of what was rounded, out of differentiable pieces.

Shape letters: K columns, G groups of columns.
"""

import torch
import torch.nn.functional as F


def by_element(part, K, group_size, dtype):
    """A scale or zero as it broadcasts against x."""
    part = part.to(dtype)
    if group_size is None or part.dim() == 0 or part.shape[-1] == 1:
        return part
    return part.repeat_interleave(group_size, -1)[..., :K]


def round_to_codes(x, scale, zero, bits):
    """(codes, whether x lies inside of their range): found in float32 whatever the dtypes, so that all agree."""
    scale, zero = scale.float(), zero if isinstance(zero, int) else zero.float()
    numbers = torch.where(scale == 0, 0.0, x.detach().float() / scale) + zero
    top = (1 << bits) - 1
    return numbers.round().clamp(0, top), (numbers >= 0) & (numbers <= top) & (scale != 0)


def fake_quantize(x, scale, zero=None, *, bits=8, group_size=None, grad_factor=1.0):
    """(code - zero) * scale in float32, float64 for float64 x; autograd sees no rounding, only the range's ends."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    K = x.shape[-1]
    s = by_element(_Scaled.apply(scale, grad_factor), K, group_size, wide)
    z = 1 << (bits - 1) if zero is None else by_element(_Scaled.apply(zero, grad_factor), K, group_size, wide)
    codes, inside = round_to_codes(x, s.detach(), z if zero is None else z.detach(), bits)
    numbers = x.to(wide) / torch.where(s == 0, 1.0, s) + z
    numbers = torch.where(inside, numbers, codes.to(wide))
    return ((numbers + (codes.to(wide) - numbers).detach() - z) * s).to(x.dtype)


class _Scaled(torch.autograd.Function):
    """The same value with so many times its gradient."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def fake_quantize_fwd(x, scale, zero, bits, group_size, grad_factor):
    """The registered op's arguments."""
    return fake_quantize(x, scale, zero, bits=bits, group_size=group_size, grad_factor=grad_factor)


def fake_quantize_bwd(dout, x, scale, zero, bits, group_size, grad_factor):
    """(dx, dscale, dzero); the last of no elements where there is no zero."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    K = x.shape[-1]
    s = by_element(scale, K, group_size, wide)
    z = 1 << (bits - 1) if zero is None else by_element(zero, K, group_size, wide)
    codes, inside = round_to_codes(x, s, z, bits)
    dout = dout.to(wide)
    dscale = dout * (codes - z - torch.where(inside, x.to(wide) / torch.where(s == 0, 1.0, s), 0.0))
    dzero = torch.where(inside, 0.0, -dout * s)
    return (
        torch.where(inside, dout, 0.0).to(x.dtype),
        _summed(dscale * grad_factor, scale, group_size),
        x.new_empty(0) if zero is None else _summed(dzero * grad_factor, zero, group_size),
    )


def _summed(grad, part, group_size):
    """What reaches each number of a part: the sum over the elements that it served."""
    if group_size is not None and grad.shape[-1]:
        grad = F.pad(grad, (0, -grad.shape[-1] % group_size)).unflatten(-1, (-1, group_size)).sum(-1)
    return grad.sum_to_size(part.shape).to(part.dtype)
