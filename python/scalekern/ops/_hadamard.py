"""What stands between the registered Hadamard ops and their kernels: the native ones' arguments, Triton's limits."""

import functools

import torch

from scalekern._dispatch import native
from scalekern.reference.hadamard_transform import base_matrix, factor

_AXES = 9  # the kernel's own limit, for x whose axes cannot be joined

_transform = native("hadamard_transform", "cpu")
_quantize = native("fused_hadamard_quantize", "cpu")
_factor = functools.cache(factor)


@functools.cache
def _signs(m: int, matrices: str, transposed: bool) -> torch.Tensor | None:
    """(m,) int64: bit l of word i is set where H_m[i, l] is -1. None for m = 1."""
    if m == 1:
        return None
    h = base_matrix(m, matrices)
    negative = ((h.mT if transposed else h) < 0).to(torch.int64)
    return (negative << torch.arange(m)).sum(1)


def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() <= _AXES else x.contiguous()


def transform(out, x, scale, order, matrices, transposed) -> None:
    """fill(out, *op arguments)"""
    m, k = _factor(x.shape[-1], order)
    _transform(out, _readable(x), _signs(m, matrices, transposed), k, scale)


def quantize(q, scales, x, scale, bits, group_size, order, matrices) -> None:
    """fill(q, scales, *op arguments)"""
    m, k = _factor(x.shape[-1], order)
    group, most = group_size or x.shape[-1], 2 ** (bits - 1) - 1
    _quantize(q, scales, _readable(x), _signs(m, matrices, False), k, scale, group, most)


def triton_refuses_to_quantize(x, scale, bits, group_size, order, matrices) -> str | None:
    """Why a call is not for the Triton kernels, which hold a token in one program, or None."""
    m, k = factor(x.shape[-1], order)
    if group_size not in (0, x.shape[-1]) and (group_size & (group_size - 1) or (1 << k) % group_size):
        return "group_size is no power of two that divides the runs of x"
    return None if tile(m, k, x.dtype.itemsize) else "a token is longer than one program holds"


def tile(m, k, itemsize) -> tuple[int, int, int] | None:
    """(A, B, P): how the Triton kernels lay the m 2^k points of a row out, P = A times m's next power of two rows of B.

    None where two matrices, P x P and B x B, and the row leave no room in a multiprocessor."""
    width, widest = 1 << (m - 1).bit_length(), 64 if itemsize == 8 else 128
    for most in (64, 128) if itemsize == 2 else (64,):
        parts = min(most // width, 1 << max(0, k - 4))
        if width <= most and (1 << k) // parts <= widest:
            return parts, max(16, (1 << k) // parts), max(16, width * parts)
    return None


transform.native_op = _transform.native_op
quantize.native_op = _quantize.native_op
