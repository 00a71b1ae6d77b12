"""Filters of fft_conv transformed once, for many calls: which kernels will read them, and their making.

A spectrum is D (2 N + 1) float32 numbers as the fused transform or the passes of the long one read them, skip not
among them; its shape tells which (fft_filters.py). Calls of another dtype or on another GPU may want another layout:
they transform the filters themselves. Half precision reads what was made for float32 except where it alone fits one
fused transform.

What it saves a call, bytes a filter of K taps: 4 K in and 8 N out of a kernel, in the long form 4 K + 24 N of two;
the 8 N of reading it remain. At B1 and L = K = N that is 12 of 28 bytes a point in float32 and 12 of 24 in half
precision, in the long form 28 of 76 and 28 of 56. Not yet measured on a GPU.
"""

import torch

from . import fft_conv as fused
from . import fft_conv_long as long
from . import fft_filters, fft_long_device, fft_long_filters
from .fft_device import operands_of
from .fft_filters import geometry, shape_of_spectra, split_spectra

__all__ = ["allocate", "fft_conv_spectrum", "supports"]


def _call(k, k_reverse, length: int, mode: str, dtype: torch.dtype) -> tuple:
    """The arguments of a call of one row, which takes no memory: plans look at shape, dtype and device alone."""
    u = k.new_empty((), dtype=dtype).expand(1, int(k.shape[-2]), int(length))
    return u, k, k_reverse, *[None] * 5, mode


def supports(k, k_reverse, length, mode, dtype) -> str | None:
    """None, or why the kernels compute no calls with these filters."""
    return long.supports(*_call(k, k_reverse, length, mode, dtype))


def allocate(k, k_reverse, length, mode, dtype) -> torch.Tensor:
    call = _call(k, k_reverse, length, mode, dtype)
    u, channels, operands = call[0], int(k.shape[0]), operands_of(dtype, None)
    points = geometry(u, k, mode)[1]
    if fused.supports(*call) is None:
        factors = fft_filters.factors_of(u, points, operands)
        sizes = factors["P"] * factors["BLOCK"], factors["N2"]
    else:
        sizes = fft_long_device.sizes_of(fft_long_filters.factors_for(u, points, operands)[0])
    return k.new_empty(shape_of_spectra(channels, *sizes), dtype=torch.float32)


def fft_conv_spectrum(values, k, k_reverse, length, mode, dtype) -> None:
    """fill(values, *op arguments)"""
    u, channels = _call(k, k_reverse, length, mode, dtype)[0], k.shape[0]
    values[channels:] = 0
    spectrum, scale = split_spectra(values, channels)
    if values.dim() == 4:
        launches = [fft_filters.plan_spectrum(spectrum, scale, u, k, k_reverse, None, mode, operands_of(dtype, None))]
    else:
        factors, _ = fft_long_filters.factors_for(u, geometry(u, k, mode)[1], operands_of(dtype, None), values)
        launches = fft_long_filters.plan_spectrum(spectrum, scale, u, k, k_reverse, None, mode, factors)
    for launch in launches:
        launch.run()
