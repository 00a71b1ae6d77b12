"""Low-bit weights: formats, their packed container, and how a float tensor becomes one and back."""

from scalekern.quant._formats import FORMATS, Format
from scalekern.quant._hqq import hqq
from scalekern.quant._methods import METHODS
from scalekern.quant._quantize import dequantize, quantize
from scalekern.quant.tensor import QuantizedTensor

__all__ = ["FORMATS", "METHODS", "Format", "QuantizedTensor", "dequantize", "hqq", "quantize"]
