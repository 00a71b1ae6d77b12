"""Packed sequences and scan checkpoints: the two layouts that every backend of the scans shares."""

import torch

from scalekern import _checks


def checkpoint_stride(N: int) -> int:
    """Tokens between two saved states: enough of them that checkpoints stay under 2 bytes an element in fp32."""
    stride = 64
    while stride < 2 * N:
        stride *= 2
    return stride


def checkpoint_count(length, N: int):
    """Saved states of a sequence axis of `length` tokens (an int or a symbolic int)."""
    stride = checkpoint_stride(N)
    return (length + stride - 1) // stride


def segments(length: int, batch: int, cu_seqlens: torch.Tensor | None) -> list[tuple[int, slice, int, int]]:
    """(state row, batch rows, begin, end) of every independent scan: the whole batch, or one packed sequence."""
    if cu_seqlens is None:
        return [(slice(0, batch), slice(0, batch), 0, length)]
    bounds = cu_seqlens.tolist()
    return [(slice(s, s + 1), slice(0, 1), b, e) for s, (b, e) in enumerate(zip(bounds, bounds[1:]))]


def check_cu_seqlens(op: str, cu_seqlens: torch.Tensor | None, batch, length) -> None:
    """Shape and dtype; and, where reading them costs no synchronization, the values."""
    if cu_seqlens is None:
        return
    _checks.tensor(op, "cu_seqlens", cu_seqlens, dims=1, dtypes=(torch.int32, torch.int64))
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must have shape (S + 1,), got (0,)")
    if batch != 1:
        raise ValueError(f"{op}: packed sequences (cu_seqlens) need a batch of 1, got {batch}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(b > e for b, e in zip(bounds, bounds[1:])):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to {length}, got {bounds[:6]}{'...' if len(bounds) > 6 else ''}"
        )


def _is_fake(tensor: torch.Tensor) -> bool:
    return type(tensor) is not torch.Tensor or torch._C._len_torch_dispatch_stack() > 0
