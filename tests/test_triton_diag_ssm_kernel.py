"""The Triton kernels of diag_ssm_kernel, run by Triton's interpreter on CPU tensors, against direct sums in float64.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton, like tests/test_triton_interpret.py.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import scalekern  # noqa: E402
from scalekern import reference  # noqa: E402
from scalekern.testing import error, upcast  # noqa: E402
from scalekern.triton_kernels import diag_ssm_kernel as kernels  # noqa: E402

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-6, F64: 1e-13}


def case(M, H, N, seed=0):
    """(w (M, H, N), a (H, N)): eigenvalues inside the unit circle, one of them 0, one real and negative, one 1."""
    torch.manual_seed(seed)
    a = torch.polar(torch.rand(H, N, dtype=F64), 7 * torch.rand(H, N, dtype=F64))
    a[0, 0], a[-1, -1], a[-1, 0] = 0, -0.875, 1
    return torch.randn(M, H, N, dtype=torch.complex128), a


def powers(a, L):
    return torch.cumprod(torch.cat([torch.ones_like(a)[..., None], a[..., None].expand(*a.shape, L)], -1), -1)[..., :L]


def check(w, a, L, dtype=F32, from_end=None):
    """Both kernels, with all powers side by side as the standard."""
    table = powers(a, L)
    slopes = torch.cat([torch.zeros_like(table[..., :1]), table[..., :-1] * torch.arange(1, L)], -1)
    if from_end is not None:
        table, slopes = (torch.where(from_end[..., None], x.flip(-1), x) for x in (table, slopes))
    y = kernels.powers_sum(w, a, L, dtype, from_end)
    assert y.dtype == dtype
    assert error(y, torch.einsum("mhn,hnl->mhl", w, table).real) < TOLERANCE[dtype]
    g = torch.randn(w.shape[0], w.shape[1], L, dtype=F64).to(dtype)
    for found, weights in zip(kernels.moments(g, a, from_end), (table, slopes)):
        exact = torch.einsum("mhl,hnl->mhn", g.to(weights.dtype), weights)
        assert found.dtype == a.dtype and error(found, exact) < 3 * TOLERANCE[dtype] or not exact.any()


@pytest.mark.parametrize("M, H, N, L", ((1, 1, 1, 1), (2, 2, 11, 130), (1, 2, 8, 16), (1, 2, 3, 17)))
def test_sums(M, H, N, L):
    check(*case(M, H, N), L)


def test_dtypes_and_real_eigenvalues():
    w, a = case(2, 2, 3)
    check(w, a, 20, F64)
    for dtype in (F32, F64):
        check(w.real, a.real, 20, dtype)


def test_powers_from_the_end():
    w, a = case(1, 2, 5)
    check(w, a, 50, F32, torch.arange(5) % 2 == torch.arange(2)[:, None])


@pytest.mark.parametrize("wanted", (1, 6))
def test_programs_walk(monkeypatch, wanted):
    """The coarse rows in several turns of a program, and in several programs, of which the last has fewer."""
    monkeypatch.setattr(kernels, "WANTED", wanted)
    blocks = {"F": 16, "Q": 16, "BLOCK_N": 8, "num_warps": 4}
    monkeypatch.setattr(kernels, "_blocks", lambda *_: dict(blocks))
    check(*case(1, 1, 4), 600)


def test_long_and_slow():
    """L = 256K at Re(A) = -1e-3: the error does not grow with the exponent. Bilinear with z = -2, where a = 0."""
    torch.manual_seed(1)
    L, imaginary = 1 << 18, torch.tensor([[0.0, 1.0, 30.0, 3e3]])
    A = torch.complex(torch.full((1, 4), -1e-3), imaginary)
    B, C, dt = torch.randn(1, 4, dtype=A.dtype), torch.randn(1, 4, dtype=A.dtype), torch.tensor([1e-3])
    with scalekern.backend("triton"):
        found = scalekern.diag_ssm_kernel(A, B, C, dt, L)
    exact = reference.diag_ssm_kernel(*(upcast(x) for x in (A, B, C, dt)), L)
    assert error(found, exact) < 1e-6 and error(found[:, -1000:], exact[:, -1000:]) < 1e-6
    inputs = [x.requires_grad_() for x in (torch.tensor([[-20.0, -1.0]]), B.real[:, :2], C.real[:, :2], dt * 100)]
    with scalekern.backend("triton"):
        found = torch.autograd.grad(scalekern.diag_ssm_kernel(*inputs, 9, "bilinear").square().sum(), inputs)
    inputs = [upcast(x.detach()).requires_grad_() for x in inputs]
    exact = torch.autograd.grad(reference.diag_ssm_kernel(*inputs, 9, "bilinear").square().sum(), inputs)
    for a, e in zip(found, exact):
        assert error(a, e) < 3e-6


@pytest.mark.parametrize("broken", (lambda x: x * 0, lambda x: x.roll(1, -1), lambda x: x.flip(1)))
def test_the_check_can_fail(monkeypatch, broken):
    sums = kernels.powers_sum
    monkeypatch.setattr(kernels, "powers_sum", lambda *a: broken(sums(*a)))
    with pytest.raises(AssertionError):
        check(*case(1, 2, 3), 20)
