"""The Triton kernels of toeplitz_conv, run by Triton's interpreter on CPU tensors, against the float64 oracle.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton, like tests/test_triton_interpret.py.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from scalekern.reference.fft_conv import toeplitz_conv, toeplitz_conv_bwd  # noqa: E402
from scalekern.testing import error  # noqa: E402
from scalekern.triton_kernels import toeplitz_conv as kernels  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-14, F32: 1e-6, F16: 1.5e-3, BF16: 1e-2}


def case(B, D, L, K, G, dtype=F32, taps=None, seed=0):
    """(u, k, dout), each leading index of its own size, so that permuted rows and filters are seen."""
    torch.manual_seed(seed)
    value = lambda *shape: torch.randn(shape, dtype=F64) * torch.rand(shape[0], *[1] * (len(shape) - 1)).add(0.3)
    return value(B, D, L).to(dtype), value(G, K).to(taps or dtype), value(B, D, L).to(dtype)


def run(u, k, dout):
    """(out, du, dk) out of uninitialized memory."""
    out, du, dk = (torch.full_like(x, float("nan")) for x in (u, u, k))
    kernels.toeplitz_conv_fwd(out, u, k)
    kernels.toeplitz_conv_bwd(du, dk, dout, u, k)
    return out, du, dk


def check(u, k, dout):
    wide = [x.double() for x in (u, k, dout)]
    expected = toeplitz_conv(*wide[:2]), *toeplitz_conv_bwd(wide[2], *wide[:2])
    for name, found, exact in zip(("out", "du", "dk"), run(u, k, dout), expected):
        e = error(found, exact)
        assert e <= TOLERANCE[u.dtype], f"{name}: relative error {e:.2e} for {u.dtype} and {k.dtype}"


@pytest.mark.parametrize("B, D, L, K, G", ((3, 4, 50, 17, 2), (2, 3, 33, 18, 3), (1, 2, 200, 130, 1), (2, 2, 9, 20, 2),
                                           (1, 1, 1, 1, 1)))  # fmt: skip
def test_shapes(B, D, L, K, G):
    """Filters that end with a block and one tap behind it, of several blocks, and beyond L."""
    check(*case(B, D, L, K, G))


@pytest.mark.parametrize("dtype, taps", ((BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F64, F64)), ids=str)
def test_dtypes(dtype, taps):
    check(*case(2, 4, 150, 70, 2, dtype, taps))


def test_parts_and_turns(monkeypatch):
    """The rows of dk in several tiles a program, and in several programs, the last of which has fewer."""
    monkeypatch.setattr(kernels, "_blocks", lambda *_: {"T": 16, "R": 16, "num_warps": 4})
    for wanted in (1, 5, 1000):
        monkeypatch.setattr(kernels, "WANTED", wanted)
        check(*case(3, 2, 200, 20, 1))


def test_repeatable_strided_and_64_bit_offsets(monkeypatch):
    u, k, dout = case(3, 4, 60, 33, 2)
    expected = run(u, k, dout)
    spread = torch.full((3, 120, 4), float("nan"))[:, ::2].transpose(1, 2).copy_(u)  # channels last, every other token
    for forced in ("0", "1"):
        monkeypatch.setenv("SCALEKERN_FORCE_INT64", forced)
        found = run(spread, k.t().contiguous().t(), dout)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("large", (False, True))
def test_float16_takes_taps_beyond_its_range(large):
    """1e7 is infinite and 1e-8 is 0 in float16; out and du are not."""
    u, k, dout = case(2, 2, 40, 20, 2, F16, F32)
    factor = 2.0**-12 if large else 2.0**12
    check(u * factor, k * (1e7 if large else 1e-8), dout * factor)


@pytest.mark.parametrize("broken", (lambda x: x * 0, lambda x: x.roll(1, -1), lambda x: x.flip(1)))
def test_the_check_can_fail(monkeypatch, broken):
    launch = kernels.toeplitz_conv_fwd
    monkeypatch.setattr(kernels, "toeplitz_conv_fwd", lambda out, *a: (launch(out, *a), out.copy_(broken(out).clone())))
    with pytest.raises(AssertionError, match="out: relative error"):
        check(*case(2, 2, 20, 5, 2))
