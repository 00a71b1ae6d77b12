"""quant_matmul out of torch's ops: rows of the weight dequantized a piece at a time, then a dense product.

Shape letters: M tokens, N outputs, K inputs, G groups.
"""

import torch

from scalekern.quant import FORMATS, QuantizedTensor, dequantize
from scalekern.quant._pack import unpack
from scalekern.reference.quant_matmul import TRAINED, scale_of, round_activation

PIECE = 1 << 22  # elements of the weight that lie dequantized at a time


def _rows(part, rows):
    return part if part is None or part.shape[0] == 1 else part[rows]


def _pieces(data, scales, zeros, offsets, outer, format, K, group_size, dtype):
    """(rows, their part of the dequantized weight) for all rows."""
    step = max(1, PIECE // max(1, K))
    for first in range(0, data.shape[0], step):
        rows = slice(first, first + step)
        parts = (data[rows], *(_rows(p, rows) for p in (scales, zeros, offsets, outer)))
        yield rows, dequantize(QuantizedTensor(*parts, format=format, columns=K, group_size=group_size), dtype)


def activations(x, activation, activation_scale, dtype):
    """What the product is taken of: x, or x as the kind's numbers stand for it."""
    if not activation:
        return x.to(dtype)
    scale = scale_of(x, activation, activation_scale)
    return round_activation(x, activation, scale).to(dtype) * scale.to(dtype)


def experts(offs, tokens: int, rows: int):
    """(rows of x, rows of the weight) of each expert; of offs None, of one."""
    if offs is None:
        return [(slice(0, tokens), slice(0, rows))]
    ends, N = offs.tolist(), rows // offs.shape[0]
    check_ends(ends, tokens)
    return [(slice(a, b), slice(e * N, (e + 1) * N)) for e, (a, b) in enumerate(zip([0, *ends], ends))]


def check_ends(ends: list[int], tokens: int) -> None:
    if any(a > b for a, b in zip([0, *ends], [*ends, tokens])):
        raise ValueError(f"quant_matmul: offs must rise from 0 to at most {tokens}, the rows of x, got {ends}")


def forward(
    out, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale, out_dtype
):  # fmt: skip
    """Fill out (..., N)."""
    if offs is not None:
        out.zero_()
        for own, rows in experts(offs, x.shape[0], data.shape[0]):
            parts = [_rows(p, rows) for p in (scales, zeros, offsets, outer)]
            forward(
                out[own], x[own], data[rows], *parts, None if bias is None else bias[rows], None, format, group_size,
                activation, activation_scale, out_dtype,
            )  # fmt: skip
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat, K = activations(x, activation, activation_scale, wide).flatten(0, -2), x.shape[-1]
    for rows, weight in _pieces(data, scales, zeros, offsets, outer, format, K, group_size, wide):
        product = flat @ weight.mT
        if bias is not None:
            product = product + bias[rows].to(wide)
        out[..., rows].copy_(product.unflatten(0, x.shape[:-1]))


def backward(
    dx, dscales, dzeros, doffsets, douter, dbias,
    dout, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale,
    weight_grads,
):  # fmt: skip
    """Fill dx (..., K), and dscales, dzeros, doffsets, douter, dbias where they have elements."""
    if offs is not None:
        grads, parts = (dscales, dzeros, doffsets, douter), (scales, zeros, offsets, outer)
        options = format, group_size, activation, activation_scale, weight_grads
        return _experts_backward(dx.zero_(), grads, dbias, dout, x, data, parts, bias, offs, options)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    K, flat = x.shape[-1], dout.to(wide).flatten(0, -2)
    total = torch.zeros_like(dx, dtype=wide).flatten(0, -2)
    for rows, weight in _pieces(data, scales, zeros, offsets, outer, format, K, group_size, wide):
        total += flat[:, rows] @ weight
    dx.copy_(total.unflatten(0, x.shape[:-1]))
    if bias is not None:
        dbias.copy_(flat.sum(0))
    if weight_grads:
        values = activations(x, activation, activation_scale, wide).flatten(0, -2)
        _parts_backward(
            (dscales, dzeros, doffsets, douter), flat, values, data, (scales, zeros, offsets, outer), format, group_size
        )


def _experts_backward(dx, grads, dbias, dout, x, data, parts, bias, offs, options):
    """Each expert's gradients into its rows; what all rows share is summed over the experts."""
    shared = [g.numel() and g.shape[0] == 1 != data.shape[0] for g in grads]
    totals = [torch.zeros_like(g, dtype=torch.float64) if one else g for g, one in zip(grads, shared)]
    for own, rows in experts(offs, x.shape[0], data.shape[0]):
        into = [torch.empty_like(t) if one else t[rows] if t.numel() else t for t, one in zip(totals, shared)]
        backward(
            dx[own], *into, dbias[rows] if bias is not None else dbias, dout[own], x[own], data[rows],
            *(_rows(p, rows) for p in parts), None if bias is None else bias[rows], None, *options,
        )  # fmt: skip
        for total, one, part in zip(totals, shared, into):
            if one:
                total += part
    for grad, total, one in zip(grads, totals, shared):
        if one:
            grad.copy_(total)


def _parts_backward(grads, dout, x, data, parts, format, group_size):
    """The gradients of scales, zeros, offsets and outer: sums over a group of dw and of dw times the code."""
    fmt, K, wide = FORMATS[format], x.shape[-1], x.dtype
    sums = [None if g.numel() == 0 else torch.zeros_like(g, dtype=wide) for g in grads]
    step = max(1, PIECE // max(1, K))
    for first in range(0, data.shape[0], step):
        rows = slice(first, first + step)
        dw = _grouped(dout[:, rows].mT @ x, group_size)  # [N, G, group_size]
        codes = unpack(data[rows], fmt.bits, K)
        values = fmt.values(wide, x.device)[codes.long()] if not fmt.is_integer else codes.to(wide)
        scales, zeros, offsets, outer = (None if p is None else _rows(p, rows).to(wide) for p in parts)
        by_code, plain = (dw * _grouped(values, group_size)).sum(-1), dw.sum(-1)  # [N, G]
        by_code = by_code - plain * (zeros if zeros is not None else fmt.zero or 0)
        factor = 1.0 if outer is None else outer
        found = (
            by_code * factor,
            -plain * scales * factor,
            plain * factor,
            (by_code * scales + (0 if offsets is None else plain * offsets)).sum(-1, keepdim=True),
        )
        for total, grad in zip(sums, found):
            if total is not None and total.shape[0] == 1:
                total += grad.sum(0, keepdim=True)
            elif total is not None:
                total[rows] = grad
    for grad, total in zip(grads, sums):
        if total is not None:
            grad.copy_(total)


def _grouped(x, size):
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def trained(part, weight_grads: bool) -> bool:
    """Whether the backward gives this part a gradient."""
    return part is not None and weight_grads and part.dtype in TRAINED
