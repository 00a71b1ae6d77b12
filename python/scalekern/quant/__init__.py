"""Low-bit weights: formats, their packed container, and how a float tensor becomes one and back."""

from scalekern.quant._formats import FORMATS, Format
from scalekern.quant._quantize import dequantize, quantize
from scalekern.quant.readers import load_quantized, read_checkpoint, save_quantized
from scalekern.quant.tensor import QuantizedTensor

__all__ = [
    "FORMATS", "Format", "QuantizedTensor", "dequantize", "load_quantized", "quantize", "read_checkpoint",
    "save_quantized",
]  # fmt: skip
