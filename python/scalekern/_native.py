"""Finds and loads the native libraries; each loader returns None or the reason why there is none."""

import ctypes
import functools
import pathlib

import torch

_HERE = pathlib.Path(__file__).parent / "lib"


def library_path(kind: str) -> pathlib.Path:
    return _HERE / f"libscalekern_{kind}.so"


@functools.cache
def load(kind: str) -> str | None:
    """Load the `cpu` or `cuda` library once. None when it is loaded, else why it is not."""
    path = library_path(kind)
    if not path.exists():
        compiler = "nvcc" if kind == "cuda" else "a C++ compiler"
        return f"the {kind} library was not built (reinstall where {compiler} is found)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def cpu_isa(level: str | None = None) -> str | None:
    """The level of instructions that the CPU library's kernels use: baseline, avx2, avx512, vnni, bf16 or amx.

    None without the library. `level`: the one to use from now on, or the machine's where that is lower (for tests).
    """
    if load("cpu"):
        return None
    function = ctypes.CDLL(str(library_path("cpu"))).scalekern_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    return function(level.encode() if level else None).decode()
