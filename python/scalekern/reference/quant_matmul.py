"""The oracle of quant_matmul: the dequantized matrix, and activations rounded as the op says.

Shape letters: M tokens, N outputs, K inputs, G groups.
"""

import torch
import torch.nn.functional as F

from scalekern.quant import FORMATS, QuantizedTensor, dequantize
from scalekern.quant._quantize import nearest_codes

# The largest magnitude that a token is scaled to, by the kind of its activations.
TRAINED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # parts of these dtypes have gradients
ACTIVATION_MAX = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


def scale_of(x, activation, static=None):
    """(..., 1) float32: the static scale, or a token's largest magnitude by the kind's largest number."""
    if static is not None:
        return torch.full((), static, dtype=torch.float32, device=x.device)
    if x.shape[-1] == 0:
        return torch.ones((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return x.detach().float().abs().amax(-1, keepdim=True) / ACTIVATION_MAX[activation]


def round_activation(x, activation, scale):
    """(..., K) float32 whole numbers, or values of float8_e4m3: x / scale in float32, rounded to even, clamped."""
    scaled = torch.where(scale == 0, 0.0, x.detach().float() / scale)
    if activation == "fp8":
        rounded = FORMATS["fp8_e4m3"].values(device=x.device)[nearest_codes(scaled, FORMATS["fp8_e4m3"])]
        return torch.where(scaled.isfinite(), rounded, scaled)
    top = ACTIVATION_MAX[activation]
    return scaled.round().clamp(-top, top)


def quant_matmul(x, w, *, bias=None, activation=None, activation_scale=None, out_dtype=None, offs=None):
    """x @ dequantize(w).T + bias in float32, float64 for float64 x; straight-through where activations are rounded.

    With offs, rows offs[e - 1] to offs[e] of x meet the e-th of the matrices that w holds one below the other.
    """
    if offs is not None:
        return _grouped(x, w, bias, activation, activation_scale, out_dtype, offs.tolist())
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize(w.replace(perm=None), wide)
    xs = x if w.perm is None else x[..., w.perm.long()]
    values = xs.to(wide)
    if activation is not None:
        scale = scale_of(xs, activation, activation_scale)
        values = _StraightThrough.apply(values, round_activation(xs, activation, scale).to(wide) * scale.to(wide))
    out = values @ weight.mT
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(out_dtype or x.dtype)


def _grouped(x, w, bias, activation, activation_scale, out_dtype, ends):
    count, N = len(ends), w.data.shape[0] // max(1, len(ends))
    bias = [None] * count if bias is None else bias.unflatten(0, (count, N)) if bias.dim() == 1 else bias
    options = dict(activation=activation, activation_scale=activation_scale, out_dtype=out_dtype)
    out = [x.new_zeros(0, N, dtype=out_dtype)]
    for e, (first, last) in enumerate(zip([0, *ends], ends)):
        out.append(quant_matmul(x[first:last], w[e * N : (e + 1) * N], bias=bias[e], **options))
    return F.pad(torch.cat(out), (0, 0, 0, x.shape[0] - (ends[-1] if ends else 0)))


class _StraightThrough(torch.autograd.Function):
    """The rounded value with the gradient of what was rounded."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def quant_matmul_fwd(
    x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale, out_dtype
):
    """The registered op's arguments: the parts of w one by one."""
    w = QuantizedTensor(
        data, scales, zeros, offsets, outer, format=format, columns=x.shape[-1], group_size=group_size
    )
    return quant_matmul(
        x, w, bias=bias, activation=activation or None, activation_scale=activation_scale, out_dtype=out_dtype,
        offs=offs,
    )  # fmt: skip


def quant_matmul_bwd(
    dout, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale,
    weight_grads,
):  # fmt: skip
    """(dx, dscales, dzeros, doffsets, douter, dbias); those of parts that have none are of no elements."""
    if offs is not None:
        parts, ends = (data, scales, zeros, offsets, outer, bias), offs.tolist()
        options = format, group_size, activation, activation_scale, weight_grads
        return _grouped_bwd(dout, x, parts, ends, options)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    K = x.shape[-1]
    w = QuantizedTensor(data, scales, zeros, offsets, outer, format=format, columns=K, group_size=group_size)
    dout, flat = dout.to(wide).flatten(0, -2), x.to(wide)
    dx = (dout @ dequantize(w, wide)).reshape(x.shape)
    if activation:
        scale = scale_of(x, activation, activation_scale)
        flat = round_activation(x, activation, scale).to(wide) * scale.to(wide)
    dw = dout.mT @ flat.flatten(0, -2)  # [N, K]
    codes = dequantize(QuantizedTensor(data, torch.ones_like(scales, dtype=wide), zeros, format=format, columns=K,
                                       group_size=group_size), wide)  # fmt: skip
    factor = 1.0 if outer is None else outer.to(wide)
    by_group = lambda v: F.pad(v, (0, -K % group_size)).unflatten(-1, (-1, group_size)).sum(-1)  # noqa: E731
    by_code, plain = by_group(dw * codes), by_group(dw)
    undone = dequantize(w.replace(outer=None), wide)
    grads = (by_code * factor, -plain * scales.to(wide) * factor, plain * factor, (dw * undone).sum(-1, keepdim=True))
    none = x.new_empty(0)
    found = [
        grad.sum_to_size(part.shape).to(part.dtype)
        if weight_grads and part is not None and part.dtype in TRAINED
        else none
        for grad, part in zip(grads, (scales, zeros, offsets, outer))
    ]
    return dx.to(x.dtype), *found, none if bias is None else dout.sum(0).to(bias.dtype)


def _grouped_bwd(dout, x, parts, ends, options):
    N, found = parts[0].shape[0] // max(1, len(ends)), []
    for e, (first, last) in enumerate(zip([0, *ends], ends)):
        own = [p if p is None or p.shape[0] == 1 != len(ends) * N else p[e * N : (e + 1) * N] for p in parts]
        found.append(quant_matmul_bwd(dout[first:last], x[first:last], *own, None, *options))
    dx, *rest = zip(*found) if found else [[x.new_zeros(0, x.shape[1])], *[[x.new_empty(0)]] * 5]
    left = x.shape[0] - (ends[-1] if ends else 0)
    shared = [p is not None and p.shape[0] == 1 != len(ends) * N for p in parts[1:]]
    grads = (sum(g) if one and g[0].numel() else torch.cat(g) for one, g in zip(shared, rest))
    return F.pad(torch.cat(dx), (0, 0, 0, left)), *grads
