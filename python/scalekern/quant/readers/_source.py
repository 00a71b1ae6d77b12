"""What readers read from: tensors by name, loaded when asked for, with errors that name the tensor."""

import collections.abc
import contextlib
import json
import os
import pathlib
import re

import torch

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Files(collections.abc.Mapping):
    """The tensors of safetensors files, read when asked for; `metadata` is that of the first file that has any."""

    def __init__(self, paths):
        import safetensors

        self._where, self.metadata = {}, {}
        with contextlib.ExitStack() as stack:
            for path in paths:
                for name in _checked_header(path):
                    if name in self._where:
                        raise ValueError(f"read_checkpoint: {name} is in {self._where[name][1]} and in {path}")
                    self._where[name] = None, path
                try:
                    file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
                except safetensors.SafetensorError as error:
                    raise ValueError(f"read_checkpoint: {path} is no safetensors file: {error}") from error
                self._where.update({name: (file, path) for name in file.keys()})
                self.metadata = self.metadata or file.metadata() or {}
            self._stack = stack.pop_all()

    def __getitem__(self, name):
        return self._where[name][0].get_tensor(name)

    def __iter__(self):
        return iter(self._where)

    def __len__(self):
        return len(self._where)

    def __contains__(self, name):
        return name in self._where

    def close(self):
        self._stack.close()


def _checked_header(path):
    """The names in a file; a ValueError that names the tensor that the file ends in."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"read_checkpoint: {path} is truncated or no safetensors file: its header is cut off")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"read_checkpoint: {path} is no safetensors file: {error!r}") from error
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            raise ValueError(f"read_checkpoint: {path} is truncated: {name} ends at byte {end} of {size}")
    return ends


def open_source(source):
    """(tensors, config, path) of a mapping of tensors, a file, or a directory with its index and config.json."""
    if isinstance(source, collections.abc.Mapping):
        if strange := [name for name in source if not isinstance(name, str)]:
            raise TypeError(f"read_checkpoint: tensors must have names, got {strange[0]!r}")
        return source, {}, None
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"read_checkpoint: source must be a path or a dict of tensors, got {type(source).__name__}")
    path = pathlib.Path(source)
    if path.is_file():
        return (None if is_gguf(path) else Files([path])), _config(path.parent), path
    if not path.is_dir():
        raise FileNotFoundError(f"read_checkpoint: no file or directory {path}")
    if (index := _index(path)) is not None:
        wanted = _json(index).get("weight_map")
        if not isinstance(wanted, dict):
            raise ValueError(f"read_checkpoint: {index} must hold a weight_map of names to files")
        for name, file in wanted.items():
            if not isinstance(file, str):
                raise ValueError(f"read_checkpoint: {name} must be in a file by its name, {index.name} says {file!r}")
            if not (path / file).is_file():
                raise FileNotFoundError(f"read_checkpoint: {name} is in {file} by {index.name}, which {path} has not")
        files = Files([path / name for name in sorted(set(wanted.values()))])
        if missing := [name for name in wanted if name not in files]:
            raise ValueError(f"read_checkpoint: {missing[0]} is in {index.name}, not in {wanted[missing[0]]}")
        return files, _config(path), path
    if (path / "model.safetensors").exists():  # what is beside is another wrapping of it, or an adapter
        paths = [path / "model.safetensors"]
    elif not (paths := sorted(path.glob("*.safetensors"))):
        raise FileNotFoundError(f"read_checkpoint: no .safetensors file in {path} (pickled weights are not read)")
    _refuse_missing_shards(path, paths)
    return Files(paths), _config(path), path


def _index(folder):
    """model.safetensors.index.json, or the only one of another name (GPTQ's tools put theirs before)."""
    usual, others = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors.index.json"))
    if usual.exists() or (folder / "model.safetensors").exists() or not others:
        return usual if usual.exists() else None
    if len(others) > 1:
        raise ValueError(f"read_checkpoint: {folder} must have one index, got {', '.join(p.name for p in others)}")
    return others[0]


def _refuse_missing_shards(folder, paths) -> None:
    """Names like model-00001-of-00003.safetensors tell how many there are; a download may have been broken off."""
    for path in paths:
        if found := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", path.name):
            stem, number, of, count, end = found.groups()
            for i in range(1, int(count) + 1):
                if not (other := folder / f"{stem}{i:0{len(number)}}{of}{count}{end}").exists():
                    raise FileNotFoundError(f"read_checkpoint: {folder} has {path.name}, but no {other.name}")


def is_gguf(path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _json(path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"read_checkpoint: {path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"read_checkpoint: {path} must hold an object, got {type(found).__name__}")
    return found


def _config(folder) -> dict:
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        if (folder / name).exists():
            config = _json(folder / name)
            found = config if name != "config.json" else config.get("quantization_config")
            if found is None and isinstance(config.get("text_config"), dict):
                found = config["text_config"].get("quantization_config")
            if found is not None:
                return found
    return {}


class Layer:
    """The tensors of one quantized matrix; whatever was taken is not passed on as it is."""

    def __init__(self, method: str, tensors, taken: set):
        self.method, self.tensors, self.taken = method, tensors, taken

    def get(self, name: str, dtypes=None, shape=None, default=...):
        """The tensor, of one of the dtypes and of the shape, whose None stands for any size."""
        if name not in self.tensors:
            if default is not ...:
                return default
            raise ValueError(f"{self.method}: {name} is missing")
        t = self.tensors[name]
        self.taken.add(name)
        if not isinstance(t, torch.Tensor):
            self.fail(name, f"must be a torch.Tensor, got {type(t).__name__}")
        if dtypes is not None and t.dtype not in (dtypes if isinstance(dtypes, tuple) else (dtypes,)):
            self.fail(name, f"must have dtype {_names(dtypes)}, got {_names(t.dtype)}")
        if shape is not None and (t.dim() != len(shape) or any(s not in (None, n) for s, n in zip(shape, t.shape))):
            wanted = ", ".join("any" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "")
            self.fail(name, f"must have shape ({wanted}), got {tuple(t.shape)}")
        return t

    def fail(self, name: str, why: str):
        raise ValueError(f"{self.method}: {name} {why}")


def _names(dtypes) -> str:
    every = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    return " or ".join(str(d).removeprefix("torch.") for d in every)


def as_bytes(words):
    """(..., n) integers -> (..., 4 n) uint8. A copy: contiguous() may leave odd strides to axes of length 1."""
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def prefixes(tensors, suffix: str) -> list[str]:
    """What stands before the suffix of each name that has it."""
    return [name[: -len(suffix)] for name in tensors if name.endswith(suffix)]


def rest(tensors, taken, method: str, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors that belong to no quantized matrix; a name with the ending of one's part has lost the others."""
    for name in tensors:
        if name not in taken and name.endswith(parts):
            raise ValueError(f"{method}: {name} is part of a quantized matrix of which other parts are missing")
    return {name: tensors[name] for name in tensors if name not in taken}


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
