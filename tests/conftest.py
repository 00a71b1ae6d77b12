"""Shared by all tests: uninitialized memory is poisoned, threads are fixed, backends are told apart."""

import contextlib
import os
import warnings

import pytest
import torch

import scalekern
from scalekern import _dispatch, _env, _native

INTERPRET = _env.triton_interpret()


def pytest_configure(config):
    # torch.empty and its kin return NaN (floats) or the largest integer, so that an element that no kernel wrote
    # shows up in every comparison. warn_only: ops without a deterministic form are not what is tested here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = False  # eager float32 is what kernels are measured against
    warnings.filterwarnings("ignore", message=".*running the slow reference.*")


if INTERPRET:
    import fast_interpreter  # noqa: F401


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)


def places() -> list:
    """(device, backend) pairs that this process can test; the interpreter's process tests Triton alone.

    Pairs on a CUDA device carry the mark gpu, so `pytest -m gpu` is the suite of a machine that has one.
    """
    if INTERPRET:
        return [pytest.param(("cpu", "triton"), id="triton")]
    names = ["reference"] if _native.load("cpu") else ["cpu", "reference"]
    found = [pytest.param(("cpu", name), id=name) for name in names]
    if torch.cuda.is_available():
        found += [
            pytest.param(("cuda", name), id=f"gpu_{name}", marks=pytest.mark.gpu)
            for name in ("cuda", "triton")
            if _dispatch.unavailable(name, "cuda") is None
        ]
    return found


def kernel_places() -> list:
    """places() without the reference."""
    return [place for place in places() if place.values[0][1] != "reference"]


def pytest_generate_tests(metafunc):
    by_itself = any("place" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "place" in metafunc.fixturenames and not by_itself:
        metafunc.parametrize("place", places())


def tensors_on(device):
    """What is created without a word about its device lies on this one, within the block."""
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


@pytest.fixture
def any_backend(place):
    """The backend's name alone; the tensors that the test creates lie on the place's device."""
    device, backend = place
    with tensors_on(device):
        yield backend


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("SCALEKERN_BACKEND", "SCALEKERN_STRICT"):
        monkeypatch.delenv(name, raising=False)


def child_environment(**changes) -> dict:
    """The environment of a subprocess that imports this very package."""
    return {**os.environ, **{k: str(v) for k, v in changes.items()}}


__all__ = ["INTERPRET", "child_environment", "places", "scalekern"]
