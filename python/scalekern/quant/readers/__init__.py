"""Checkpoints of other packages, and scalekern's own files, as QuantizedTensors.

One module a format. `read(tensors, config)` takes a mapping of tensors and a quantization_config and returns {name:
QuantizedTensor or Tensor}; `write` of gptq (v1 and v2), compressed_tensors and mxfp4 is its exact inverse.
"""

import collections.abc
import os

import torch

from scalekern.quant.readers import awq, bitsandbytes, compressed_tensors, gguf, gptq, hqq, mxfp4, native
from scalekern.quant.readers._source import Files, open_source
from scalekern.quant.tensor import QuantizedTensor

READERS = {module.METHOD: module for module in (gptq, awq, compressed_tensors, bitsandbytes, hqq, mxfp4)}
METHODS = (*READERS, gguf.METHOD, native.METHOD)

__all__ = ["METHODS", "load_quantized", "read_checkpoint", "save_quantized"]

# Names that only one format has; .qweight is GPTQ's and AWQ's, which a config has to tell apart.
MARKS = {
    ".weight_packed": "compressed-tensors", ".W_q": "hqq", "_blocks": "mxfp4", ".blocks": "mxfp4",
    ".SCB": "bitsandbytes",
}  # fmt: skip


def read_checkpoint(
    source: str | os.PathLike | collections.abc.Mapping, method: str | None = None, *, config: dict | None = None
) -> dict[str, QuantizedTensor | torch.Tensor]:
    """Read a quantized checkpoint of any format known here. Nothing is unpickled.

    Args:
        source: a .safetensors or .gguf file, a directory of a Hugging Face model, or a mapping of tensors by name.
        method: "gptq", "awq", "compressed-tensors", "bitsandbytes", "hqq", "mxfp4", "gguf" or "scalekern"; None for
            what config, the file's metadata or the tensors' names say.
        config: the model's quantization_config; None for that of the config.json (or quantize_config.json) beside.

    Returns:
        {name: QuantizedTensor (..., N, K)} for quantized weights, under the names that float weights have, and {name:
        Tensor} for all others. On the CPU, in the order of the checkpoint's formats.

    Raises:
        ValueError: an unknown method, a truncated file, a missing tensor, a wrong shape or dtype; the message names
            the tensor, and nothing is returned in part.
        FileNotFoundError: no such file; a shard that an index or the others' names speak of is not there.
        ImportError: a GGUF file without the package gguf.

    Source: the formats' own packages; see the modules of scalekern.quant.readers.
    """
    tensors, beside, path = open_source(source)
    config = beside if config is None else config
    if not isinstance(config, collections.abc.Mapping):
        raise ValueError(f"read_checkpoint: config must be a dict, got {config!r}")
    try:
        if tensors is None:
            if method not in (None, gguf.METHOD):
                raise ValueError(f"read_checkpoint: {path} is a GGUF file, method is {method!r}")
            return gguf.read(path)
        metadata = getattr(tensors, "metadata", {})
        method = method or _detect(tensors, config, metadata)
        if method == native.METHOD:
            return native.read(tensors, metadata)
        if not isinstance(method, str) or method not in READERS:
            raise ValueError(f"read_checkpoint: method must be one of {', '.join(METHODS)}, got {method!r}")
        return READERS[method].read(tensors, config)
    finally:
        if isinstance(tensors, Files):
            tensors.close()


def _detect(tensors, config: dict, metadata: dict) -> str:
    if native.KEY in metadata:
        return native.METHOD
    for key in ("quant_method", "method"):  # GPTQModel writes both, and calls the first one deprecated
        if key in config:
            return config[key]
    if "checkpoint_format" in config or "desc_act" in config:
        return gptq.METHOD
    for name in tensors:
        if bitsandbytes.STATE in name:
            return bitsandbytes.METHOD
        for mark, method in MARKS.items():
            if name.endswith(mark):
                return method
        if name.endswith(".qweight"):
            raise ValueError(f"read_checkpoint: {name} may be GPTQ's or AWQ's: pass method or config")
    raise ValueError("read_checkpoint: no tensor of a known quantized format, and no quantization_config")


def save_quantized(path: str | os.PathLike, tensors: dict[str, QuantizedTensor | torch.Tensor]) -> None:
    """Write tensors, quantized or not, to one safetensors file, as they are stored.

    Args:
        path: of the file, replaced in one step.
        tensors: by name. The parts of a quantized `X` are stored as X.data, X.scales, ...

    Raises:
        TypeError: a value that is no tensor.
        ValueError: parts that do not fit each other, two tensors of one name, a name or dtype that the format has not.

    Source: the safetensors format, its metadata holding format, columns, group size and dtype as JSON.
    """
    native.write(path, tensors)


def load_quantized(path: str | os.PathLike) -> dict[str, QuantizedTensor | torch.Tensor]:
    """The inverse of `save_quantized`.

    Args:
        path: of a file that save_quantized wrote.

    Returns:
        {name: QuantizedTensor or Tensor}, on the CPU, equal to what was saved to the bit.

    Raises:
        ValueError: a truncated file, missing parts or parts that do not fit, by the tensor's name.
        FileNotFoundError: no such file.

    Source: as save_quantized.
    """
    return read_checkpoint(path, native.METHOD)
