"""What the tests of compat's convolutions share: the shims installed, and a comparison with a rendering in float64."""

import importlib
import importlib.util

import pytest
import torch

from scalekern import compat
from scalekern.testing import TOLERANCE, assert_close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ABSENT = pytest.mark.skipif(
    any(importlib.util.find_spec(p) for p in ("flashfftconv", "fftconv")), reason="flashfftconv or fftconv is installed"
)


@pytest.fixture(autouse=True)
def shims():
    compat.install()
    compat.reset_calls()
    yield
    compat.uninstall()


def upstream(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def flash(*args, **kwargs):
    return upstream("flashfftconv.FlashFFTConv")(*args, **kwargs)


def short(*args, **kwargs):
    return upstream("flashfftconv.FlashDepthWiseConv1d")(*args, **kwargs)


def fftconv_func(*args, **kwargs):
    return upstream("src.ops.fftconv.fftconv_func")(*args, **kwargs)


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed + sum(7 * n for n in shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def compare(function, rendering, tensors, dtype):
    """Output and every gradient of function(**tensors) against those of the rendering of the same values in float64."""
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    exact = {n: t.detach().cpu().double().requires_grad_() for n, t in tensors.items()}
    out, expected = function(**leaves), rendering(**exact)
    assert_close(out, expected, tolerance=TOLERANCE[out.dtype])
    weight = randn(*out.shape, seed=9).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), weight.to(out.device))
    wanted = torch.autograd.grad(expected, list(exact.values()), weight.double())
    for (name, leaf), g, e in zip(leaves.items(), found, wanted):
        assert g.dtype == leaf.dtype and e.norm() > 0, name
        coarsest = max(TOLERANCE[t] for t in (dtype, out.dtype, g.dtype))
        assert_close(g, e, tolerance=2 * coarsest, what=f"gradient of {name}")
    return out
