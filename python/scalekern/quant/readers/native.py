"""scalekern's own files: the parts of quantized tensors in one safetensors file, their formats in its metadata."""

import json
import os
import pathlib

import torch

from scalekern.quant.tensor import PARTS, QuantizedTensor

METHOD = "scalekern"
KEY = "scalekern.quant"
PARTS_KEY = "scalekern.quant.parts"  # which each has: without its zeros a weight would be another, not broken


def read(tensors, metadata: dict) -> dict:
    """{name: QuantizedTensor or Tensor} of a file's tensors and metadata."""
    try:
        quantized = json.loads(metadata.get(KEY, "{}"))
        items = [(str(name), str(fields)) for name, fields in quantized.items()]
        saved = {name: list(parts) for name, parts in json.loads(metadata.get(PARTS_KEY, "{}")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"scalekern: the file's metadata {KEY} must be JSON: {error}") from error
    taken, found = set(), {}
    for name, fields in items:
        parts = {part: f"{name}.{part}" for part in PARTS if f"{name}.{part}" in tensors}
        for part in saved.get(name, ("data", "scales")):
            if part not in parts:
                raise ValueError(f"scalekern: {name}.{part} is missing")
        try:
            found[name] = QuantizedTensor.from_tensors({part: tensors[key] for part, key in parts.items()}, fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"scalekern: {name}: {error}") from error
        taken |= set(parts.values())
    return found | {name: tensors[name] for name in tensors if name not in taken}


def write(path, tensors) -> None:
    """Atomically: the file is there as a whole, or as it was."""
    from safetensors.torch import save_file

    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise TypeError(f"save_quantized: tensors must be a dict by name, got {type(tensors).__name__}")
    flat, metadata, saved = {}, {}, {}
    for name, t in tensors.items():
        parts = {name: t}
        if isinstance(t, QuantizedTensor):
            t.check(f"save_quantized: {name}")
            metadata[name], saved[name] = t.metadata(), list(t.tensors())
            parts = {f"{name}.{part}": p for part, p in t.tensors().items()}
        elif not isinstance(t, torch.Tensor):
            raise TypeError(f"save_quantized: {name} must be a QuantizedTensor or a Tensor, got {type(t).__name__}")
        for key, p in parts.items():
            if p.is_meta or p.layout != torch.strided:
                raise ValueError(f"save_quantized: {key} must be dense and hold data, got {p.layout} on {p.device}")
            if key == "__metadata__":  # the format's own, of which no reader takes a tensor
                raise ValueError("save_quantized: tensors must have other names than __metadata__, the format's own")
        if taken := flat.keys() & parts.keys():
            raise ValueError(f"save_quantized: two tensors would be called {min(taken)}")
        flat |= {key: p.detach().clone(memory_format=torch.contiguous_format) for key, p in parts.items()}
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"save_quantized: path must be that of a file, got {type(path).__name__}")
    path = pathlib.Path(path)
    if path.is_dir() or not path.parent.is_dir():
        why = "is a directory" if path.is_dir() else f"{path.parent} is none"
        raise FileNotFoundError(f"save_quantized: path must be that of a file in a directory, got {path}: {why}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(flat, partial, metadata={KEY: json.dumps(metadata), PARTS_KEY: json.dumps(saved), "format": "pt"})
        os.replace(partial, path)
    except KeyError as error:  # safetensors' own for a dtype that it does not have
        for key, p in flat.items():
            if p.dtype in error.args:
                raise ValueError(f"save_quantized: {key} must have a dtype of safetensors, got {p.dtype}") from error
        raise
    finally:
        partial.unlink(missing_ok=True)
