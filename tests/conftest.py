"""Shared by all tests: uninitialized memory is poisoned, threads are fixed, backends are told apart."""

import os
import warnings

import pytest
import torch

import scalekern
from scalekern import _env, _native

INTERPRET = _env.triton_interpret()


def pytest_configure(config):
    # torch.empty and its kin return NaN (floats) or the largest integer, so that an element that no kernel wrote
    # shows up in every comparison. warn_only: ops without a deterministic form are not what is tested here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", message=".*running the slow reference.*")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)


def backends() -> list[str]:
    """The backends that this process can test on CPU tensors: the interpreter's process tests Triton alone."""
    if INTERPRET:
        return ["triton"]
    return ["reference"] if _native.load("cpu") else ["cpu", "reference"]


def pytest_generate_tests(metafunc):
    if "any_backend" in metafunc.fixturenames:
        metafunc.parametrize("any_backend", backends())


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("SCALEKERN_BACKEND", "SCALEKERN_STRICT"):
        monkeypatch.delenv(name, raising=False)


def child_environment(**changes) -> dict:
    """The environment of a subprocess that imports this very package."""
    return {**os.environ, **{k: str(v) for k, v in changes.items()}}


__all__ = ["INTERPRET", "backends", "child_environment", "scalekern"]
