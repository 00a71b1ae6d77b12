"""The Hadamard transform on the CPU: the arguments of the native kernels from those of the registered ops."""

import functools

import torch

from scalekern._dispatch import native
from scalekern.reference.hadamard_transform import base_matrix, factor

_AXES = 9  # the kernel's own limit, for x whose axes cannot be joined

_TILE_BITS = {1: 14, 12: 10, 20: 9, 28: 9, 40: 8}  # k of the longest row that a Triton program holds

_transform = native("hadamard_transform", "cpu")
_quantize = native("fused_hadamard_quantize", "cpu")


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
    m, k = factor(x.shape[-1], order)
    _transform(out, _readable(x), _signs(m, matrices, transposed), k, scale)


def quantize(q, scales, x, scale, bits, group_size, order, matrices) -> None:
    """fill(q, scales, *op arguments)"""
    m, k = factor(x.shape[-1], order)
    group, most = group_size or x.shape[-1], 2 ** (bits - 1) - 1
    _quantize(q, scales, _readable(x), _signs(m, matrices, False), k, scale, group, most)


def triton_refuses_to_quantize(x, scale, bits, group_size, order, matrices) -> str | None:
    """Why a call is not for the Triton kernels, which hold a token in one program, or None."""
    m, k = factor(x.shape[-1], order)
    if group_size not in (0, x.shape[-1]) and (group_size & (group_size - 1) or (1 << k) % group_size):
        return "group_size is no power of two that divides the runs of x"
    return "a token is longer than one program holds" if k > _TILE_BITS[m] else None


transform.native_op = _transform.native_op
quantize.native_op = _quantize.native_op
