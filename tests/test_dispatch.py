"""Which backend is taken: the tuple's order, the records' order, and what a forced one does."""

import json

import pytest
import torch

import scalekern
from scalekern import _dispatch
from scalekern._dispatch import Backend


def entries():
    return tuple(Backend(name, lambda *args: None) for name in ("cuda", "triton", "reference"))


@pytest.fixture
def records(monkeypatch, tmp_path):
    """A table as the report writes it, for a device that is only a name here."""
    table = {"Some GPU": {"scan": {"10": "triton", "20": "cuda"}}}
    (tmp_path / "fastest.json").write_text(json.dumps(table))
    monkeypatch.setattr(_dispatch, "FASTEST", tmp_path / "fastest.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    _dispatch._measured.cache_clear()
    yield
    _dispatch._measured.cache_clear()


def order(op, elements):
    return [e.name for e in _dispatch._fastest_first(op, entries(), torch.empty(elements, device="meta"))]


def test_the_nearest_measured_size_decides(records):
    assert order("scan", 900) == ["triton", "cuda", "reference"]
    assert order("scan", 2_000_000) == ["cuda", "triton", "reference"]
    assert order("scan", 1) == ["triton", "cuda", "reference"]


def test_what_the_fastest_kernel_declines_goes_to_the_others_before_torch(records):
    run = lambda *args: None
    own = (Backend("triton", run), Backend("cuda", run), Backend("cuda", run, composed=True), Backend("reference", run))
    x = torch.empty(2**20)
    first = lambda entries: [(e.name, e.composed) for e in _dispatch._fastest_first("scan", entries, x)]
    assert first(own) == [("cuda", False), ("triton", False), ("cuda", True), ("reference", False)]
    assert first(own[:1] + own[2:])[0] == ("cuda", True)  # there is no kernel of that name: torch's ops were measured


def test_a_gpu_is_asked_for_its_name_once(records, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or "Some GPU")
    assert [order("scan", 900) for _ in range(3)] == [["triton", "cuda", "reference"]] * 3 and len(asked) == 1


def test_without_a_record_the_order_is_the_ops_own(records):
    assert order("unmeasured", 900) == ["cuda", "triton", "reference"]


def test_the_innermost_backend_holds_and_is_reset():
    x, w = torch.randn(1, 2, 5), torch.randn(2, 3)
    with scalekern.backend("cuda"):
        with scalekern.backend("reference"):
            scalekern.causal_conv1d(x, w)
        with pytest.raises(scalekern.BackendError, match="cuda: serves CUDA tensors only"):
            scalekern.causal_conv1d(x, w)
    scalekern.causal_conv1d(x, w)
    with pytest.raises(ValueError, match="backend: name must be one of reference, cpu, triton, cuda, got 'gpu'"):
        with scalekern.backend("gpu"):
            pass


def test_the_backend_of_the_forward_runs_the_backward():
    """Also where the block has ended by then, or autograd runs the backward in a thread of its own."""
    x = torch.randn(1, 3, 6, requires_grad=True)
    seen = []
    op = scalekern._library.OPS["causal_conv1d_bwd"]
    with scalekern.backend("reference"):
        y = scalekern.causal_conv1d(x, torch.randn(3, 2))
    original = _dispatch.select
    try:
        _dispatch.select = lambda name, *rest: seen.append((name, _dispatch.forced())) or original(name, *rest)
        y.sum().backward()
    finally:
        _dispatch.select = original
    assert seen == [(op.name, "reference")]


def test_strict_refuses_a_slow_fallback(monkeypatch):
    monkeypatch.setenv("SCALEKERN_STRICT", "1")
    only_reference = (Backend("cuda", print, lambda *args: "too large"), Backend("reference", print))
    with pytest.raises(scalekern.BackendError, match="SCALEKERN_STRICT=1 and only the reference is left .cuda: "):
        _dispatch._fell_back("scan", only_reference, "meta", (torch.empty(1),))
