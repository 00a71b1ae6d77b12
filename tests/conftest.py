"""Shared by all tests: uninitialized memory is poisoned, threads are fixed, backends are told apart."""

import contextlib
import ctypes
import os
import re
import warnings

# Inductor's kernels around the ops are scalar: what they do is torch's to test, and trying which vector instructions
# this machine's compiler knows takes 20 CPU seconds, a kernel with them twice as long. Read when torch is imported.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import pytest
import torch
from contract import has_backend

import scalekern
from scalekern import _dispatch, _env, _native

INTERPRET = _env.triton_interpret()
LEVELS = ("baseline", "avx2", "avx512", "vnni", "bf16", "amx")


def pytest_configure(config):
    # torch.empty and its kin return NaN (floats) or the largest integer, so that an element that no kernel wrote
    # shows up in every comparison. warn_only: ops without a deterministic form are not what is tested here.
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import inductor, 3 s a process
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = False  # eager float32 is what kernels are measured against
    warnings.filterwarnings("ignore", message=".*running the slow reference.*")


def pytest_collection_finish(session):
    # So is what malloc gives the native kernels for scratch: bytes of 0x100 ^ 0xff (glibc's M_PERTURB). Where none run,
    # Triton's compiler and its interpreter would only take 6 to 13 % longer.
    if not INTERPRET and any(item.path.name != "test_triton_compile.py" for item in session.items):
        getattr(ctypes.CDLL(None), "mallopt", lambda *args: 0)(-6, 0x100)


if INTERPRET:
    import fast_interpreter  # noqa: F401


def at_levels(*names: str):
    """A decorator: the test runs on these levels of the CPU kernels too, where they are below the machine's."""
    mine = None if INTERPRET else _native.cpu_isa()
    lower = [name for name in names if mine and LEVELS.index(name) < LEVELS.index(mine)]
    return pytest.mark.parametrize("level", [pytest.param(None, id=mine or "none"), *lower], indirect=True)


@contextlib.contextmanager
def on_level(name: str | None):
    """The CPU kernels of that level, or of the machine's where it is lower; None changes nothing."""
    before = _native.cpu_isa()
    found = _native.cpu_isa(name)
    try:
        yield found
    finally:
        _native.cpu_isa(before)


@pytest.fixture(autouse=True)
def level(request):
    """Which level the test runs on: what `at_levels` says, else the machine's."""
    name = getattr(request, "param", None)
    with on_level(name) as found:
        assert name in (None, found)
        yield found


def pytest_collection_modifyitems(config, items):
    # A level below the machine's says something about the CPU kernels alone.
    items[:] = [item for item in items if not _is_idle(getattr(item, "callspec", None))]
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)


def _is_idle(callspec) -> bool:
    params = callspec.params if callspec else {}
    return bool(params.get("level")) and params.get("place", ("cpu", "cpu")) != ("cpu", "cpu")


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


@pytest.fixture
def on(place, request):
    """on(function, ...): run it on the place's backend. on.device: where the sample's tensors belong.

    Skips nothing silently: a backend that declines a sample must say so, and only GPU kernels do, for these reasons.
    """
    device, backend = place
    params = request.node.callspec.params
    op = params["op"] if "op" in params else params["mutant"].public
    if not has_backend(op, backend):
        pytest.skip(f"{op} has no {backend} backend")

    def run(function, *args, **kwargs):
        try:
            with scalekern.backend(backend):
                return function(*args, **kwargs)
        except scalekern.BackendError as declined:
            reasons = r"a complex A|filter for every sample|u is float64|group_size is no power of two"
            assert backend in ("triton", "cuda") and re.search(reasons, str(declined)), declined
            pytest.skip(str(declined))

    run.device, run.backend = device, backend
    return run


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("SCALEKERN_BACKEND", "SCALEKERN_STRICT"):
        monkeypatch.delenv(name, raising=False)


def child_environment(**changes) -> dict:
    """The environment of a subprocess that imports this very package."""
    return {**os.environ, **{k: str(v) for k, v in changes.items()}}


__all__ = ["INTERPRET", "at_levels", "child_environment", "on_level", "places", "scalekern"]
