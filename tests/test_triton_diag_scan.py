"""diag_scan's Triton kernel in Triton's interpreter, beyond what the contract runs: time split, more axes, 64 bits.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton, like tests/test_triton_interpret.py.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from contract import gradients  # noqa: E402

import scalekern  # noqa: E402
from scalekern import reference  # noqa: E402
from scalekern.testing import assert_close, upcast  # noqa: E402
from scalekern.triton_kernels import diag_scan as kernels  # noqa: E402


def check(a, b, **kwargs):
    with scalekern.backend("triton"):
        outputs, grads = gradients(scalekern.diag_scan, (a, b), kwargs)
    wide = {k: upcast(v) for k, v in kwargs.items()}
    expected, wanted = gradients(reference.diag_scan, (upcast(a), upcast(b)), wide)
    for x, e in zip((*outputs, *grads.values()), (*expected, *wanted.values())):
        assert_close(x, e, tolerance=2e-6)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("reverse", [False, True])
def test_time_is_split(kind, reverse, monkeypatch):
    """Four parts of three tiles and a last one of less, each of a call's two launches in both directions."""
    seen = []
    run = kernels.Launch.run
    monkeypatch.setattr(kernels.Launch, "run", lambda self: (seen.append(self.args["PASS"]), run(self)))
    torch.manual_seed(0)
    a, b, state = 0.7 + 0.3 * torch.rand(1, 210, 3), torch.randn(1, 210, 3), torch.randn(1, 3)
    if kind == "complex":
        a, b, state = torch.polar(a, 4 * a), torch.complex(b, -b), torch.complex(state, state)
    check(a, b, dim=1, initial_state=state, reverse=reverse, return_last_state=True)
    assert seen == [1, 2, 1, 2]


def test_more_axes_than_a_launch_has(monkeypatch):
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    torch.manual_seed(0)
    b = torch.randn(6, 2, 5, 3, 2, 4)[:, :, :3, :2].permute(0, 1, 2, 5, 3, 4)
    check(torch.rand(1, 2, 1, 4, 1, 2), b, dim=0, return_last_state=True)
