"""How the numbers of a quantized weight are found, by name: what `quantize_model` and QuantLinear.from_linear offer.

A method is method(weight (N, K), format, *, group_size, symmetric, scale_dtype, inputs) -> QuantizedTensor. `inputs`
are (..., K) inputs of the layer or None, for methods that calibrate on them; METHODS is where those register.
"""

from collections.abc import Callable

from scalekern.quant._hqq import hqq
from scalekern.quant._quantize import quantize

METHODS: dict[str, Callable] = {}


def absmax(weight, format, *, inputs=None, **options):
    """Round to nearest: the largest element of a group meets the largest code."""
    return quantize(weight, format, method="absmax", **options)


def least_squares(weight, format, *, inputs=None, **options):
    """Round to nearest with the scales, and zeros, of the least squared error."""
    return quantize(weight, format, method="least_squares", **options)


def half_quadratic(weight, format, *, inputs=None, **options):
    return hqq(weight, format, **options)


METHODS.update({"absmax": absmax, "least_squares": least_squares, "hqq": half_quadratic})
