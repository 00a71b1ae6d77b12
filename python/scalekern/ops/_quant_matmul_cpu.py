"""quant_matmul by the CPU kernels: their arguments, and what is left to torch (float64, gradients of the weight).

Shape letters: M tokens, N outputs, K inputs, G groups.
"""

import functools

import torch

from scalekern._dispatch import native
from scalekern.ops import _quant_matmul
from scalekern.quant import FORMATS
from scalekern.reference.quant_matmul import ACTIVATION_MAX

_fwd, _bwd = native("quant_matmul_fwd", "cpu"), native("quant_matmul_bwd", "cpu")
_keep = native("quant_matmul_keep", "cpu")
_kept = functools.cache(lambda: torch.ops.scalekern_native.quant_matmul_kept_cpu.default._op)
_kept_together = functools.cache(lambda: torch.ops.scalekern_native.quant_matmul_kept_together_cpu.default._op)
MANTISSA = {"fp8_e4m3": 3, "fp8_e5m2": 2, "fp6_e3m2": 2, "fp6_e2m3": 3, "fp4_e2m1": 1}  # bits of the small floats


@functools.lru_cache(256)
def code_values(format: str, device) -> tuple:
    """(table, bits, step, base, mantissa, zero): a code stands for table[code], or for step * code + base."""
    fmt = FORMATS[format]
    if fmt.name == "int1":  # -1 and 1
        return None, 1, 2.0, -1.0, 0, 0.0
    table = None if fmt.is_integer else fmt.values(torch.float32, device)
    return table, fmt.bits, 1.0, 0.0, MANTISSA.get(format, 0), float(fmt.zero or 0)


def _parts(data, scales):
    """Rows any distance apart, but the bytes of one side by side; powers of two as bytes."""
    data = data if data.stride(-1) == 1 or data.shape[-1] == 1 else data.contiguous()
    return data, scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales


def _rows(x):
    return x if x.dim() == 2 else x.flatten(0, -2)


def _ends(offs, tokens: int):
    if offs is not None:
        _quant_matmul.check_ends(offs.tolist(), tokens)
        offs = offs.contiguous()
    return offs


def _options(format, group_size, scales, device):
    return *code_values(format, device), group_size, scales.dtype == torch.float8_e8m0fnu


def forward(
    out, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale, out_dtype
):  # fmt: skip
    """Fill out (..., N)."""
    if x.dtype == torch.float64:
        return _quant_matmul.forward(
            out, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale,
            out_dtype,
        )  # fmt: skip
    if offs is not None:
        out.zero_()  # the rows beyond the last expert's
    ends = _ends(offs, len(out))
    parts = data, scales, zeros, offsets, outer, bias
    weights = weight(*parts, ends, format, group_size, activation, activation_scale)
    _fwd(out, x if x.is_contiguous() else _rows(x), *weights)  # out is contiguous


def weight(data, scales, zeros, offsets, outer, bias, ends, format, group_size, activation, activation_scale) -> tuple:
    """The native call's arguments behind out and x."""
    options = _options(format, group_size, scales, data.device)
    return (
        *_parts(data, scales), zeros, offsets, outer, bias, ends, *options, ACTIVATION_MAX.get(activation, 0.0),
        activation_scale or 0.0,
    )  # fmt: skip


class KeptWeight:
    """A weight whose arguments the native product reads at once, from one tensor; it holds what they point to.

    It tells its parts by size and dtype too: a freed address comes back for a tensor of another kind. (Shapes and
    strides besides would make a product of 4096 x 4096 2.5 us longer, of 123; these take 1.)
    """

    is_cpu, backend = True, "cpu"

    def __init__(self, columns: int, *given):
        self.parts = [part for part in given[:6] if part is not None]  # and not views of them, as powers of two are
        self.where = [part.data_ptr() for part in self.parts]
        self.sizes = [part.nbytes for part in self.parts]
        self.dtypes = [part.dtype for part in self.parts]
        self._arguments = self._prepared(columns, *given)

    def _prepared(self, columns, *given):
        """given: the arguments of `weight`."""
        data, scales, zeros, offsets, outer, bias, _, self._table, *numbers = weight(*given)
        return _keep(data, scales, zeros, offsets, outer, bias, self._table, columns, *numbers)

    def is_where_it_was(self) -> bool:
        """`parameter.data = ...` moves a tensor that stays the same object."""
        for part, where, size, dtype in zip(self.parts, self.where, self.sizes, self.dtypes):
            if part.data_ptr() != where or part.nbytes != size or part.dtype is not dtype:
                return False
        return True

    def __reduce__(self):
        return type(None), ()  # addresses mean nothing to a copy, or in another process

    def product(self, x):
        """(..., N) of a plain x on the CPU; None where the native call reads no such x, with nothing computed."""
        return _kept()(x, self._arguments)


def products_of_kept(x, kept: list[KeptWeight]) -> list | None:
    """KeptWeight.product with each, in one call."""
    return _kept_together()(x, [weight._arguments for weight in kept]) or None


def backward(
    dx, dscales, dzeros, doffsets, douter, dbias,
    dout, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale,
    weight_grads,
):  # fmt: skip
    """Fill dx (..., K), and the others where they have elements."""
    if x.dtype == torch.float64 or weight_grads:
        return _quant_matmul.backward(
            dx, dscales, dzeros, doffsets, douter, dbias, dout, x, data, scales, zeros, offsets, outer, bias, offs,
            format, group_size, activation, activation_scale, weight_grads,
        )  # fmt: skip
    flat = dout.flatten(0, -2)
    if offs is not None:
        dx.zero_()
    _bwd(
        dx.flatten(0, -2), flat, *_parts(data, scales), zeros, offsets, outer, _ends(offs, len(flat)),
        *_options(format, group_size, scales, x.device),
    )  # fmt: skip
    if bias is not None:
        for own, rows in _quant_matmul.experts(offs, flat.shape[0], data.shape[0]):
            dbias[rows].copy_(flat[own].sum(0, dtype=torch.float32))


forward.native_op, backward.native_op = _fwd.native_op, _bwd.native_op
