"""Finds and loads the native libraries; each loader returns None or the reason why there is none."""

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


@functools.cache
def build_info() -> dict:
    """What setup.py built, as it was recorded in the pybind11 module; {} without that module."""
    try:
        from scalekern import _C
    except ImportError:
        return {}
    return dict(_C.build_info())
