"""Dense float32 products by oneDNN where MKL is slow: the same numbers, and torch's own path wherever it is needed.

Shape letters: B batch, L length, K inputs, N outputs.
"""

import pytest
import torch
import torch.nn.functional as F

from scalekern.ops import _linear
from scalekern.testing import error

CALLS = torch.ops.mkldnn, "_linear_pointwise"


@pytest.fixture
def taken(monkeypatch):
    """As on a processor where oneDNN is preferred; how often it was called."""
    calls, original = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(_linear, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(*CALLS, lambda *args: calls.append(args[0].shape) or original(*args))
    return calls


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "slice"])
@pytest.mark.parametrize("B, L, K, N", [(1, 512, 64, 80), (3, 257, 96, 63), (1, 1, 2048, 2048)])
def test_numbers(B, L, K, N, layout, bias, taken):
    x = torch.randn(B, L, K)
    x = {"rows": x, "columns": x.mT.contiguous().mT, "slice": torch.cat([x, x + 1], -1)[..., :K]}[layout]
    weight, bias = torch.randn(N, K), torch.randn(N) if bias else None
    out = _linear.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.shape == (B, L, N) and error(out, exact) < 2e-6 and taken == [x.shape]


@needs_onednn
def test_where_torch_stays(taken):
    x, weight = torch.randn(512, 64), torch.randn(80, 64)
    assert torch.equal(_linear.linear(x[:3], weight), F.linear(x[:3], weight))  # small
    assert _linear.linear(x.double(), weight.double()).dtype == torch.float64
    assert _linear.linear(x[:0], weight).shape == (0, 80)
    _linear.linear(x, weight.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert _linear.linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        _linear.linear(x, weight)
    assert taken == []
    with torch.no_grad():
        _linear.linear(x, weight.requires_grad_())
    assert len(taken) == 1


@needs_onednn
def test_layers(taken):
    """A layer that is hooked, replaced or of another class is called; a plain one is not."""
    x, seen = torch.randn(512, 64), []
    plain, hooked, other, moved = (torch.nn.Linear(64, 80) for _ in range(4))
    hooked.register_forward_hook(lambda *_: seen.append("hook"))
    other.__class__ = type("Adapted", (torch.nn.Linear,), {"forward": lambda self, x: seen.append("class")})
    moved.forward = lambda x: seen.append("forward")
    with torch.no_grad():
        for layer in (hooked, other, moved):
            _linear.project(layer, x)
        assert seen == ["hook", "class", "forward"] and taken == []
        assert error(_linear.project(plain, x), plain(x)) < 2e-6 and len(taken) == 1
