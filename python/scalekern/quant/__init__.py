"""Low-bit weights: formats, their packed container, and how a float tensor becomes one and back."""

from scalekern.quant._clusters import ChannelClusters, round_to_int8, sort_and_cluster
from scalekern.quant._fold import FoldedRotation, fold_rotation
from scalekern.quant._formats import FORMATS, Format
from scalekern.quant._hqq import hqq
from scalekern.quant._methods import METHODS
from scalekern.quant._quantize import dequantize, quantize
from scalekern.quant.kv import QuantizedKV
from scalekern.quant.model import QuantConfig, quantize_model
from scalekern.quant.readers import load_quantized, read_checkpoint, save_quantized
from scalekern.quant.report import LayerReport, QuantReport
from scalekern.quant.tensor import QuantizedTensor

__all__ = [
    "FORMATS",
    "METHODS",
    "ChannelClusters",
    "FoldedRotation",
    "Format",
    "LayerReport",
    "QuantConfig",
    "QuantReport",
    "QuantizedKV",
    "QuantizedTensor",
    "dequantize",
    "fold_rotation",
    "hqq",
    "load_quantized",
    "quantize",
    "quantize_model",
    "read_checkpoint",
    "round_to_int8",
    "save_quantized",
    "sort_and_cluster",
]
