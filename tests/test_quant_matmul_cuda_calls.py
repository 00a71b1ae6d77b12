"""Calls of quant_matmul with few tokens on a GPU, without one: which backend they come to, and the short way there.

Tensors are on the CPU and said to be a GPU's; the native op is its kernel in the host emulator.
Shape letters: M tokens, N outputs, K inputs.
"""

import importlib
import json

import cuda_emulation as emulated
import pytest
import torch
from cuda_emulation import inputs_of_a_product as inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import scalekern
from scalekern import _dispatch, reference
from scalekern.nn import QuantLinear, quant_linear
from scalekern.ops import _quant_matmul_cuda as cuda
from scalekern.testing import error

pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")
quant_matmul = importlib.import_module("scalekern.ops.quant_matmul")  # the function has the package's name

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
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


# --- the short way ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(gpu, monkeypatch):
    """The kernel's calls, which are the short way's: the general way of these tensors ends in the CPU's kernels."""
    found = []
    monkeypatch.setattr(cuda, "_gemv", lambda *args: (found.append(args), emulated.fill_gemv(*args))[1])
    monkeypatch.setattr(cuda.KeptWeight, "is_cpu", True)
    monkeypatch.setattr(cuda.KeptWeight, "backend", "cpu")
    keep = lambda K, *given: cuda.KeptWeight(K, *given[:6], None, *given[6:])
    monkeypatch.setattr(quant_matmul, "kept_weight", keep)
    monkeypatch.setattr(quant_linear, "kept_weight", keep)
    return found


def layer_of(format="int4", group=128, bias=True):
    x, w = inputs(8, 19, 256, format, group)
    return x, QuantLinear.from_quantized(w, torch.randn(19).half() if bias else None)


FORMATS = [("int4", 128), ("nf4", 32), ("mxfp4", None), ("int2", 64), ("int3", 128)]


@pytest.mark.parametrize("format, group", FORMATS)
@torch.no_grad()
def test_the_same_product(calls, format, group):
    x, layer = layer_of(format, group)
    w = layer.quantized_weight
    scalekern.quant_matmul(x, w)
    for given in (x, x[:1], x[:4].bfloat16(), x[:6].view(2, 3, -1), x[3], x[:1, None]):
        calls.clear()
        assert torch.equal(scalekern.quant_matmul(given, w), emulated.quant_matmul_gemv(given, w))
        assert torch.equal(layer(given), emulated.quant_matmul_gemv(given, w, bias=layer.bias))
        assert len(calls) == 2


@torch.no_grad()
def test_the_walk_is_asked_once_a_shape(calls, monkeypatch):
    x, layer = layer_of()
    asked, sound = [], _dispatch.select
    monkeypatch.setattr(_dispatch, "select", lambda *args: (asked.append(args), sound(*args))[1])
    for M in (1, 1, 8, 1, 8):
        layer(x[:M])
    assert len(calls) == 5 and len(asked) == 2
    with scalekern.backend("cuda"), pytest.raises(scalekern.BackendError):
        layer(x[:1])  # of these, which are the CPU's


def test_nothing_but_the_output_is_made(calls):
    """No copy, no conversion, no word from the GPU to the host: CUDA graphs hold such a call."""
    x, w = inputs(4, 19, 256, "int4", 128)
    scalekern.quant_matmul(x, w), scalekern.quant_matmul(x, w)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        scalekern.quant_matmul(x, w)
    assert len(calls) == 2
    of_a_test = {"aten::fill_"}  # which poisons what is empty
    assert {e.name for e in seen.events()} - of_a_test <= {"aten::new_empty", "aten::empty", "aten::empty_strided"}


class Wrapped(torch.Tensor):
    pass


def vmapped(run, x):
    return torch.vmap(lambda row: run(row[None])[0])(x)


def under(context):
    def call(run, x):
        with context():
            return run(x)

    return call


def recorded(run, x):
    with torch.enable_grad():
        out = run(x.clone().requires_grad_())
    assert out.requires_grad
    return out.detach()


def moved(change):
    return lambda run, x: run(change(x))


PASSED_BY = {
    "autograd": recorded,
    "autocast": under(lambda: torch.autocast("cpu", BF16)),
    "compile": lambda run, x: torch.compile(run, backend="eager")(x),
    "vmap": vmapped,
    "subclass": lambda run, x: run(x.as_subclass(Wrapped)),
    "dispatch mode": under(lambda: FlopCounterMode(display=False)),
    "forward derivatives": under(torch.autograd.forward_ad.dual_level),
    "backend": under(lambda: scalekern.backend("reference")),
    "strides": moved(lambda x: x.mT.contiguous().mT),
    "address": moved(lambda x: torch.cat([x.new_zeros(4), x.flatten()])[4:].view(x.shape)),
    "tokens": moved(lambda x: torch.cat([x, x, x])),
    "dtype": moved(lambda x: x.float()),
    "double": moved(lambda x: x.double()),
    "none": moved(lambda x: x[:0]),
}


@pytest.mark.parametrize("case", PASSED_BY)
@pytest.mark.parametrize("through", ["function", "layer"])
def test_what_it_leaves_to_the_op(calls, through, case):
    x, layer = layer_of(bias=False)
    x, w = x[:4], layer.quantized_weight
    run = layer if through == "layer" else lambda x: scalekern.quant_matmul(x, w)
    with torch.set_grad_enabled(through == "function"):
        run(x), run(x)
        assert calls
        calls.clear()
        out = PASSED_BY[case](run, x)
        assert not calls
        rows = {"tokens": 12, "none": 0}.get(case, 4)
        assert out.shape == (rows, 19)
        if rows:
            exact = reference.quant_matmul(x.double().repeat(rows // 4, 1), w)
            assert error(out, exact) < 3e-3, case


@torch.no_grad()
def test_what_else_it_leaves_to_the_op(calls, monkeypatch):
    x, layer = layer_of(bias=False)
    w = layer.quantized_weight
    layer(x), scalekern.quant_matmul(x, w)
    calls.clear()
    for run in (layer, lambda x: scalekern.quant_matmul(x, w)):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert run(mode.from_tensor(x)).shape == (8, 19)
        with pytest.raises(ValueError, match="x must have shape"):
            run(x[:, :128].contiguous())
        with pytest.raises(TypeError, match="x must"):
            run(x.int())
        with pytest.raises(ValueError, match="must be on meta"):
            run(x.to("meta"))
        monkeypatch.setenv("SCALEKERN_BACKEND", "reference")
        run(x)
        monkeypatch.delenv("SCALEKERN_BACKEND")
    scalekern.quant_matmul(x, w, activation="int8"), scalekern.quant_matmul(x, w, activation="int8")
    permuted = w.replace(perm=torch.randperm(256))
    scalekern.quant_matmul(x, permuted), scalekern.quant_matmul(x, permuted)
    assert not calls
    layer._kept[1]._device = torch.device("cuda", 1)  # another GPU than x's
    layer(x)
    assert not calls
    record("triton")
    layer._kept = None
    layer(x)
    assert not calls
    with torch.enable_grad():
        w.scales.requires_grad_()
        assert scalekern.quant_matmul(x, w).requires_grad and not calls


@torch.no_grad()
def test_what_is_kept_follows_its_weight(calls):
    x, layer = layer_of()
    check = lambda: torch.equal(layer(x), emulated.quant_matmul_gemv(x, layer.quantized_weight, bias=layer.bias))
    assert check()
    layer.weight_scales.data = 2 * layer.weight_scales.data
    assert check()
    layer.weight_scales.mul_(2)
    assert check()
    layer.weight_data = torch.nn.Parameter(layer.weight_data ^ 2, requires_grad=False)
    assert check()
    layer.bias.data = torch.randn(19)
    assert check() and len(calls) == 5
    layer.bias = torch.nn.Parameter(torch.randn(19, device="meta"))
    with pytest.raises(ValueError, match="nn.QuantLinear: bias must be on cpu like weight, got meta"):
        layer(x)


@torch.no_grad()
def test_a_weight_is_not_prepared_again_where_it_is_not_taken(calls, monkeypatch):
    """Prefills come the general way; what decoding keeps stays."""
    x, w = inputs(9, 19, 256, "int4", 128)
    made, sound = [], cuda.weight_arguments
    monkeypatch.setattr(cuda, "weight_arguments", lambda *args: (made.append(1), sound(*args))[1])
    kept = []
    for M in (9, 9, 1, 9, 1):
        scalekern.quant_matmul(x[:M], w)
        kept.append(w.__dict__["_native"][None])
    assert len(made) == 1 and len(calls) == 2 and len(set(map(id, kept))) == 1
    assert len(w.__dict__["_native"][None]._outputs) == 1  # of prefills, which have any length, nothing is kept


@torch.no_grad()
def test_what_one_backend_was_asked_for_holds_for_no_other(calls):
    x, layer = layer_of()
    record("triton")
    kept = quant_matmul.kept_weight(256, *args_of(x, layer.quantized_weight)[1:7], "int4", 128, "", None)
    for _ in range(2):
        assert kept.product(x) is None
        with scalekern.backend("cuda"):
            assert torch.equal(kept.product(x), emulated.quant_matmul_gemv(x, layer.quantized_weight))


@torch.no_grad()
def test_layers_together_are_the_cpus_way(calls):
    x, layer = layer_of()
    layer(x)
    kept = layer._kept[1]
    cuda.KeptWeight.is_cpu = False  # the fixture puts it back
    assert all(torch.isfinite(out).all() for out in quant_linear.products(x, layer, layer)) and layer._kept[1] is kept
