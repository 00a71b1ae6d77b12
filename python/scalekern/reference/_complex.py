"""Complex arithmetic that the oracles of the state space models share."""

import torch


def wide(x):
    return x.to(torch.complex128)


def conj(x):
    """The conjugate as values: a lazy one (x.conj()) loses its mark inside compiled graphs (seen on torch 2.13)."""
    return torch.conj_physical(x)


def real_dtype(x):
    """The real dtype of a kernel made from x, at least float32."""
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32


def as_dtype(x, dtype):
    """A complex result in the dtype of what it is for: the gradient of a real parameter is the real part."""
    return x.to(dtype) if dtype.is_complex else x.real.to(dtype)
