"""Calls of quant_matmul with few tokens on a GPU, without one: which backend they come to.

Tensors are on the CPU and said to be a GPU's.
Shape letters: M tokens, N outputs, K inputs.
"""

import importlib
import json

import pytest
import torch
from cuda_emulation import inputs_of_a_product as inputs

from scalekern import _dispatch
from scalekern.ops import _quant_matmul_cuda as cuda

pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")
quant_matmul = importlib.import_module("scalekern.ops.quant_matmul")  # the function has the package's name

F16 = torch.float16
CACHES = _dispatch._usable, _dispatch._measured


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU, all backends and no records; what is put into "missing" is not there."""
    state, sound = {"missing": ()}, _dispatch.unavailable

    def unavailable(name, device):
        if device != "cuda":
            return sound(name, device)
        return "is not there" if name in ("cpu", *state["missing"]) else None

    monkeypatch.setattr(_dispatch, "unavailable", unavailable)
    monkeypatch.setattr(_dispatch, "_missing", lambda run: None)
    monkeypatch.setattr(_dispatch, "FASTEST", tmp_path / "fastest.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    clear()
    yield state
    clear()


def clear():
    [cache.cache_clear() for cache in CACHES]


def record(backend):
    """What records make of a call of any size."""
    _dispatch.FASTEST.write_text(json.dumps({"Some GPU": {"quant_matmul_fwd": {"10": backend}}}))
    clear()


def args_of(x, w, activation="", offs=None):
    parts = w.data, w.scales, w.zeros, w.offsets, w.outer, None, offs
    return x, *parts, w.format, w.group_size, activation, None, None


def chosen(*args, **options):
    op = quant_matmul.quant_matmul_fwd
    entry = _dispatch.select(op.name, op.backends, "cuda", args_of(*args, **options))
    return "few" if entry.supports is cuda.supports_few else entry.name


def test_few_tokens_on_tensor_cores_come_before_triton(gpu):
    x, w = inputs(8, 16, 256, "int4", 128)
    assert [chosen(x[:M], w) for M in (1, 4, 8)] == ["few"] * 3 and chosen(x[None, :2].bfloat16(), w) == "few"
    assert chosen(*inputs(9, 16, 256, "int4", 128)) == "triton"
    for format, group in (("int4", 20), ("int3", 64), ("fp8_e4m3", 128)):
        assert chosen(*inputs(1, 16, 256, format, group)) == "triton"
    assert chosen(x.float(), w) == chosen(x, w, "int8") == "triton"
    assert chosen(x, w, offs=torch.tensor([8], dtype=torch.int32)) == "triton"
    odd = torch.zeros(8, 264, dtype=F16)[:, 1:257]
    assert chosen(odd, w) == "triton"  # else its kernel would go code by code
    wide = torch.zeros(16, 136, dtype=torch.uint8)
    assert chosen(x, w.replace(data=wide[:, 4:132])) == "triton"
    gpu["missing"] = ("cuda",)
    clear()
    assert chosen(x, w) == "triton"


def test_records_decide_once_there_are_any(gpu):
    x, w = inputs(8, 16, 256, "int4", 128)
    assert chosen(x, w) == "few"
    record("triton")
    assert chosen(x, w) == "triton"
    record("cuda")
    assert chosen(x, w) == "few" and chosen(*inputs(9, 16, 256, "int4", 128)) == "cuda"


def test_each_way_is_explained(gpu):
    op = quant_matmul.quant_matmul_fwd

    def first(x, w, **options):
        return _dispatch.explain(op.backends, "cuda", args_of(x, w, **options), None)[0][1]

    x, w = inputs(9, 16, 256, "int4", 128)
    assert first(x, w) == "few tokens are up to 8, not 9" and first(x[:8], w) is None
    assert "as they are" in first(x[:1].float(), w) and "activations" in first(x[:1], w, activation="int8")
