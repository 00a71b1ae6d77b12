"""quantize_model over modules that are no nn.Linear, and arguments that are none of its own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from scalekern.nn import QuantLinear
from scalekern.quant import FoldedRotation, QuantConfig, fold_rotation, quantize_model

IDS = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("rotation", [None, "random_hadamard"])
def test_conv1d_of_gpt2_is_a_linear_layer(rotation):
    """Its weight lies transposed; the errors are those of the layer, and the model's output follows."""
    plain, seen = gpt2(), {}
    model = copy.deepcopy(plain)
    options = {"format": "int8", "group_size": 16, "rotation": rotation}
    report = quantize_model(model, [("*.1.mlp.*", None), ("*", options)], inputs=[IDS])
    names = {f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")}
    assert {x.name for x in report.layers} == names - {"transformer.h.1.mlp.c_fc"} | {"transformer.h.0.mlp.c_proj"}
    assert report.skipped == {
        "lm_head": "weight tied to transformer.wte.weight",
        **{f"transformer.h.1.mlp.{n}": "pattern '*.1.mlp.*' leaves it out" for n in ("c_fc", "c_proj")},
    }
    for x in report.layers:
        watch = lambda module, args, out, name=x.name: seen.update({name: (args[0].detach(), out.detach())})
        plain.get_submodule(x.name).register_forward_hook(watch)
    expected = plain(IDS).logits
    for x in report.layers:
        layer, (inputs, out) = model.get_submodule(x.name), seen[x.name]
        assert isinstance(layer, QuantLinear) and x.shape == tuple(plain.get_submodule(x.name).weight.shape[::-1])
        assert layer.bias is model.get_parameter(f"{x.name}.bias") and not layer.training
        error = (layer(inputs) - out).norm() / out.norm()
        assert 1e-4 < x.error < 0.02 and x.error == pytest.approx(error.item(), rel=1e-3)
    error = (model(IDS).logits - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.02


def test_conv1d_on_meta_takes_a_checkpoint():
    model = gpt2()
    quantize_model(model, "int4")
    with torch.device("meta"):
        skeleton = gpt2()
    quantize_model(skeleton, "int4")
    assert any(isinstance(module, QuantLinear) for module in skeleton.modules())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    skeleton.tie_weights()
    assert torch.equal(skeleton(IDS).logits, model(IDS).logits)


def test_stacks_of_matrices_and_what_is_quantized_already_are_told():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate = nn.Parameter(torch.randn(4, 16, 8)), nn.Linear(8, 4)
            self.filter, self.steps = nn.Parameter(torch.randn(8, 1, 3)), nn.Parameter(torch.randn(3, 3))

    model = nn.Sequential(Experts(), nn.Conv1d(8, 8, 3), nn.Linear(8, 8))
    config = [("2", "int8"), ("*.gate", None), ("*", "int4")]
    told = {"0.up": "a stack of matrices (4, 16, 8), not an nn.Linear", "0.gate": "pattern '*.gate' leaves it out"}
    report = quantize_model(model, config)
    assert report.skipped == told and [x.name for x in report.layers] == ["2"]
    assert "left alone: 0.up (a stack of matrices" in str(report)
    again = quantize_model(model, config)
    assert again.skipped == told | {"2": "quantized already, to int8"} and again.bytes_after == report.bytes_after


def test_arguments_of_other_kinds():
    model = nn.Sequential(nn.Linear(8, 8))
    for config, message in (
        (QuantConfig(rules=None), "rules of a QuantConfig must be a tuple, got None"),
        (QuantConfig(folds=None), "folds of a QuantConfig must be a tuple, got None"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"seed": 1.5, "rotation": "random_hadamard"}, "seed must be an integer, got 1.5"),
        ({"train_scales": "yes"}, "train_scales must be True or False, got 'yes'"),
        ({"symmetric": None}, "symmetric must be True or False, got None"),
    ):
        with pytest.raises(TypeError, match=f"^quantize_model: .*{message}"):
            quantize_model(model, config)
    with pytest.raises(TypeError, match="inputs must be an iterable of batches, got str"):
        quantize_model(model, "int4", inputs="ab")
    with pytest.raises(TypeError, match="progress must be None, True, False or a function, got 'yes'"):
        quantize_model(model, "int4", progress="yes")
    assert type(model[0]) is nn.Linear


class SharedHeads(nn.Module):
    """Four heads of 6 that read two heads of values, as grouped queries do, between a value and an output layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.value, self.out = nn.Linear(16, 24), nn.Linear(48, 16)

    def forward(self, x):
        averages = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype)) / x.shape[1]
        heads = (averages @ self.value(x)).unflatten(-1, (2, 12)).repeat_interleave(2, -2)
        return self.out(heads.flatten(-2))


@pytest.mark.parametrize("rotation", ["hadamard", "random_hadamard"])
def test_values_of_shared_heads_are_folded_by_blocks(rotation):
    plain, x = SharedHeads().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    turned = copy.deepcopy(plain)
    fold_rotation(turned, FoldedRotation(("value",), ("out",), rotation=rotation, block=12))
    assert (turned(x) - plain(x)).norm() < 1e-13 * plain(x).norm()
    assert (turned.value.weight - plain.value.weight).norm() > 0.1 * plain.value.weight.norm()
    for block, message in ((None, "all widths must be equal, or"), (16, "divide 24 and 48, got 16")):
        with pytest.raises(ValueError, match=f"^fold_rotation: .*{message}"):
            fold_rotation(turned, FoldedRotation(("value",), ("out",), block=block))


def test_a_skeleton_is_folded_as_its_model_is():
    fold = FoldedRotation(("0",), ("2",), norms={"1": ("2",)})

    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 8))

    model = made()
    quantize_model(model, QuantConfig((("*", "int4"),), (fold,)))
    with torch.device("meta"):
        skeleton = made()
    quantize_model(skeleton, QuantConfig((("*", "int4"),), (fold,)))
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(torch.ones(3, 8)), model(torch.ones(3, 8)))


def test_folds_of_other_kinds():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    for fold, message in (
        (None, "fold must be a FoldedRotation, got NoneType"),
        (FoldedRotation("0", ("1",)), "producers must be a tuple of patterns, got '0'"),
        (FoldedRotation(("0",), (1,)), "consumers must be a tuple of patterns, got"),
        (FoldedRotation(("0",), ()), "producers and consumers must name modules"),
        (FoldedRotation(("0",), ("1",), norms=None), "norms must be a dict of names to patterns, got None"),
        (FoldedRotation(("0",), ("1",), seed="x"), "seed must be an integer, got 'x'"),
        (FoldedRotation(("0",), ("1",), block="8"), "block must be an integer of at least 2, got '8'"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^fold_rotation: {message}"):
            fold_rotation(model, fold)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_copied_layer_keeps_nothing_of_the_first():
    layer = QuantLinear(32, 8, format="int4", group_size=16)
    with torch.no_grad():
        expected = layer(torch.ones(2, 32))
        assert "_kept" in layer.__dict__
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert "_kept" not in other.__dict__ and torch.equal(other(torch.ones(2, 32)), expected)
