"""quantize_model: which layers, with what error, what was skipped and why; rotations folded where that is exact."""

import json

import pytest
import torch
from nn_modules import error
from torch import nn
from torch.nn.utils import prune

from scalekern.nn import Mamba, QuantLinear
from scalekern.quant import FoldedRotation, QuantConfig, fold_rotation, quantize_model


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        h = self.norm(x)
        averages = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype)) / x.shape[1]
        x = x + self.out(averages @ self.value(h))  # what attention is to its values
        return x + self.down(nn.functional.silu(self.up(h)))


class Model(nn.Module):
    """An embedding, two blocks around a residual stream, a head, and odd ones."""

    def __init__(self, width=32, tie=False):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 50, bias=False)
        self.odd = nn.Linear(50, 7)
        self.last = nn.Linear(7, 3)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.last(self.odd(self.head(self.norm(x))).tanh())


def model(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    made = Model(**options).to(dtype)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 2.0)
    return made


TOKENS = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))
ROWS = {"format": "int8", "group_size": None}
RULES = [("*.down", None), ("blocks.1.*", ROWS), ("odd", "int4"), ("blocks.*", "int4")]


def test_layers_are_chosen_by_pattern_and_skips_are_told():
    float_model, other = model(), model()
    steps = []
    report = quantize_model(other, RULES, inputs=[TOKENS], progress=lambda *step: steps.append(step))
    kinds = {name: m.format for name, m in other.named_modules() if isinstance(m, QuantLinear)}
    assert kinds == {
        "blocks.0.up": "int4", "blocks.0.value": "int4", "blocks.0.out": "int4", "blocks.1.up": "int8",
        "blocks.1.value": "int8", "blocks.1.out": "int8", "odd": "int4",
    }  # fmt: skip
    assert report.skipped == {
        "blocks.0.down": "pattern '*.down' leaves it out", "blocks.1.down": "pattern '*.down' leaves it out",
        "head": "no pattern matches", "last": "no pattern matches",
    }  # fmt: skip
    assert steps[0] == (0, 7, "blocks.0.up") and steps[-1] == (7, 7, "") and len(steps) == 8
    assert 1e-4 < error(other(TOKENS), float_model(TOKENS)) < 0.2
    assert report.bytes_after < report.bytes_before == sum(p.nbytes for p in float_model.parameters())


def test_a_bar_where_somebody_looks(capsys, monkeypatch):
    quantize_model(model(), RULES)
    quantize_model(model(), RULES, progress=False)
    assert capsys.readouterr().err == ""  # no terminal
    quantize_model(model(), RULES, progress=True)
    lines = capsys.readouterr().err.split("\r")[1:]
    assert len(lines) == 8 and "0/7" in lines[0] and "blocks.0.up" in lines[0] and lines[-1].endswith("\n")
    assert [line.count("#") for line in lines] == sorted(line.count("#") for line in lines) and "." not in lines[-1]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    quantize_model(model(), RULES)
    assert "7/7" in capsys.readouterr().err


def test_the_report_measures_what_it_says(tmp_path):
    float_model, other = model(), model()
    seen = {}
    for name, m in float_model.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
    float_model(TOKENS)
    report = quantize_model(other, {"format": "int4", "group_size": 16, "activation": "int8"}, inputs=[TOKENS])
    assert [x.name for x in report.layers][:3] == ["blocks.0.up", "blocks.0.down", "blocks.0.value"]
    for layer in report.layers:
        x, y = seen[layer.name]
        quantized, dense = other.get_submodule(layer.name), float_model.get_submodule(layer.name)
        assert layer.error == pytest.approx(error(quantized(x), y), rel=1e-4) and layer.measured_on == "outputs"
        assert 10 ** (-layer.sqnr_db / 20) == pytest.approx(error(quantized.weight, dense.weight), rel=1e-6)
        assert layer.bits == pytest.approx(4 + 32 * -(-dense.in_features // 16) / dense.in_features, rel=0.1)
    table = str(report)
    for layer in report.layers:
        assert f"{layer.error:.4f}" in table and layer.name in table
    json.dumps(report.to_dict())
    without = quantize_model(model(), "int4")
    assert {x.measured_on for x in without.layers} == {"weight"} and "weight" in str(without)
    assert all(x.error == pytest.approx(10 ** (-x.sqnr_db / 20)) for x in without.layers)

    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    report.save_png(tmp_path / "report.png")
    pixels = imread(tmp_path / "report.png")[..., :3]
    dark = (abs(pixels - [0x1F / 255, 0x4E / 255, 0x8C / 255]) < 0.02).all(-1)
    assert dark.sum() > 1000 and [p.name for p in tmp_path.iterdir()] == ["report.png"]


def test_hooks_stay_with_their_layer():
    """All kinds of them, removed by the handles that the float layer gave out; errors are those of the weights."""
    linear, x, ran = nn.Linear(16, 8), torch.randn(3, 16, requires_grad=True), []
    holder = nn.Sequential(linear)
    handles = [
        linear.register_forward_hook(lambda module, args, out: ran.append("forward") or 2 * out),
        linear.register_forward_pre_hook(lambda module, args, kwargs: ran.append("before"), with_kwargs=True),
        linear.register_full_backward_hook(lambda module, *grads: ran.append("backward")),
    ]
    (layer,) = quantize_model(holder, "int8", inputs=[x]).layers
    assert layer.error < 0.01 and layer.measured_on == "outputs"
    ran.clear()
    out = holder(x)
    assert (out - 2 * holder[0].forward(x)).norm() == 0
    out.sum().backward()
    assert ran == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    holder(x).sum().backward()
    assert len(ran) == 3


def test_what_cannot_be_quantized_is_skipped_with_its_reason():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.nothing = nn.Linear(0, 4)
            self.row = nn.Linear(9, 4)

    other = Attending()
    report = quantize_model(other, {"format": "int4", "rotation": "hadamard"})
    assert report.skipped == {
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, not a plain nn.Linear",
        "nothing": "shape (4, 0) holds no weight", "row": "shape (4, 9): 9 columns cannot be rotated",
    }  # fmt: skip
    assert not report.layers and isinstance(other.row, nn.Linear)
    small = nn.Sequential(nn.Linear(4, 4, dtype=torch.float8_e4m3fn, device="meta"))
    assert quantize_model(small, "int4").skipped == {"0": "a weight of float8_e4m3fn"}
    for inputs in (3, {"x": torch.ones(1, 4)}):
        with pytest.raises(TypeError, match="quantize_model: inputs must be an iterable of batches, got"):
            quantize_model(other, "int4", inputs=inputs)
    alone = quantize_model(nn.Linear(4, 4), "int4")
    assert alone.skipped == {"": "the model itself, which cannot be replaced in place"}
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    found = quantize_model(lazy, "int4")
    assert found.skipped == {"0": "its weight has no shape yet: call the model once first"}
    assert [layer.name for layer in found.layers] == ["1"]
    strange = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(strange[0], "weight", 0.5)
    strange[1].forward = lambda x: x
    assert quantize_model(strange, "int4").skipped == {
        "0": "its weight is made by a hook (pruning, weight_norm): make it a parameter first",
        "1": "its forward was replaced",
    }
    tied = model(tie=True)
    assert quantize_model(tied, "int4").skipped == {"head": "weight tied to embedding.weight"}
    assert tied.head.weight is tied.embedding.weight


def test_a_layer_at_two_places_stays_one():
    shared = nn.Linear(16, 16)
    both = nn.Sequential(shared, nn.ReLU(), shared)
    assert len(quantize_model(both, "int4").layers) == 1
    assert both[0] is both[2] and isinstance(both[0], QuantLinear)


@pytest.mark.parametrize(
    "config, kind, message",
    [
        ([("*", {"grop_size": 64})], ValueError, "options must be among activation, .*, got 'grop_size'"),
        ([("*", 4)], TypeError, "a rule must be .pattern, options., got"),
        ([("nowhere", "int9")], ValueError, "format must be one of"),
        ([("odd", {"method": "hqq"})], ValueError, "quantize_model: options of 'odd': .*symmetric must be False"),
        (None, TypeError, "quantize_model: config must be a QuantConfig, rules, a dict or a format, got None"),
        ([1], TypeError, "quantize_model: config must be a QuantConfig, rules, a dict or a format, got .1."),
        (QuantConfig(folds=(1,)), TypeError, "quantize_model: folds must be FoldedRotations, got int"),
    ],
)
def test_a_wrong_config_changes_nothing(config, kind, message):
    other = model()
    state = torch.random.get_rng_state()
    with pytest.raises(kind, match=message):
        quantize_model(other, config)
    assert not any(isinstance(m, QuantLinear) for m in other.modules())
    quantize_model(other, "int8")
    assert torch.equal(torch.random.get_rng_state(), state)  # no random number was drawn


@pytest.mark.parametrize("rotation", [None, "hadamard", "random_hadamard"])
@pytest.mark.parametrize("method", ["absmax", "least_squares", "hqq"])
def test_every_method_with_and_without_rotation(method, rotation):
    """A weight with an outlier column: a search beats the range, rotated or not; a rotation beats none."""

    def layer(method, rotation):
        other = model()
        with torch.no_grad():
            other.blocks[0].up.weight[:, 3] *= 12
        options = {"format": "int3", "group_size": None, "symmetric": False, "method": method, "rotation": rotation}
        return quantize_model(other, [("blocks.0.up", options)], inputs=[TOKENS]).layers[0]

    found = layer(method, rotation)
    if method != "absmax":
        assert found.sqnr_db > layer("absmax", rotation).sqnr_db + 0.2
    if rotation is not None:
        assert found.error < 0.7 * layer(method, None).error


def test_inputs_by_name_and_inputs_without_rows():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(input=x)

    named = Named()
    assert quantize_model(named, "int4", inputs=[torch.randn(3, 8)]).layers[0].measured_on == "outputs"
    assert named(torch.randn(3, 8)).shape == (3, 4)
    (none,) = quantize_model(Named(), "int4", inputs=[torch.randn(0, 8)]).layers
    assert none.measured_on == "weight" and none.error > 0


def test_calibration_leaves_the_model_in_its_mode():
    other = model()
    other.blocks[0].eval()
    quantize_model(other, "int8", inputs=[{"tokens": TOKENS}, (TOKENS,)])
    assert other.training and not other.blocks[0].training and not other.blocks[0].up.training and other.odd.training
    assert not any(m._forward_pre_hooks for m in other.modules())


def test_a_skeleton_on_the_meta_device_takes_a_checkpoint():
    config = QuantConfig((("head", None), ("*", {"format": "int4", "group_size": 8, "method": "least_squares"})))
    made = model(dtype=torch.float32)
    quantize_model(made, config)
    with torch.device("meta"):
        skeleton = Model()
    report = quantize_model(skeleton, config)
    assert report.layers[0].error is None and "-" in str(report) and skeleton.odd.weight_data.is_meta
    skeleton.to_empty(device="cpu").load_state_dict(made.state_dict())
    assert torch.equal(skeleton(TOKENS), made(TOKENS))


def test_mamba_runs_and_decodes_on_packed_projections():
    torch.manual_seed(0)
    layer, x = Mamba(16, d_state=4), torch.randn(2, 7, 16)
    holder = nn.ModuleDict({"mixer": layer})
    report = quantize_model(holder, [("*.dt_proj", None), ("*", {**ROWS, "rotation": "hadamard"})])
    assert [x.name for x in report.layers] == ["mixer.in_proj", "mixer.x_proj", "mixer.out_proj"]
    out, states = layer(x, return_final_states=True)
    dense = Mamba(16, d_state=4)
    dense.load_state_dict({n: layer.get_parameter(n) if "proj.weight" not in n else layer.get_submodule(n[:-7]).weight
                           for n in dense.state_dict()})  # fmt: skip
    assert error(layer(x), dense(x)) < 1e-5 and error(out, dense(x)) < 1e-5
    conv, ssm = layer.allocate_inference_cache(2, None)
    stepped = torch.cat([layer.step(x[:, t : t + 1], conv, ssm)[0] for t in range(7)], 1)
    assert error(stepped, out) < 1e-5 and error(ssm, states[1]) < 1e-5
    assert error(conv[..., 1:], states[0][..., 1:]) < 1e-6


# --- folded rotations ----------------------------------------------------------------------------------------------

STREAM = FoldedRotation(
    producers=("embedding", "blocks.*.out", "blocks.*.down"),
    consumers=("blocks.*.up", "blocks.*.value", "head"),
    norms={"norm": ("head",), **{f"blocks.{i}.norm": (f"blocks.{i}.up", f"blocks.{i}.value") for i in range(2)}},
)
VALUES = FoldedRotation(producers=("blocks.*.value",), consumers=("blocks.*.out",), block=8, rotation="hadamard")


@pytest.mark.parametrize("folds", [(VALUES,), (STREAM,), (STREAM, VALUES)], ids=["values", "stream", "both"])
def test_folded_rotations_change_no_output(folds):
    plain, turned = model(), model()
    for fold in folds:
        fold_rotation(turned, fold)
    assert error(turned(TOKENS), plain(TOKENS)) < 1e-13
    changed = {n for n, p in turned.named_parameters() if error(p, plain.get_parameter(n)) > 1e-3}
    assert "blocks.0.value.weight" in changed and "blocks.1.out.weight" in changed and "last.weight" not in changed
    assert ("embedding.weight" in changed) == (STREAM in folds)
    assert ("blocks.0.value.bias" in changed) == (VALUES in folds)


def test_a_folded_rotation_helps_the_layers_behind_it():
    def outlying():
        made = model()
        with torch.no_grad():
            made.embedding.weight[:, 3] *= 20  # an outlier channel of the stream
            for block in made.blocks:
                block.value.weight[:, 3] *= 0.1  # which the layers behind it hardly look at
        return made

    rules = (("blocks.*.value", {**ROWS, "activation": "int4"}),)
    configs = QuantConfig(rules), QuantConfig(rules, (STREAM,))
    errors = [quantize_model(outlying(), config, inputs=[TOKENS]).layers for config in configs]
    assert all(b.error < 0.7 * a.error for a, b in zip(*errors, strict=True)), errors


def test_what_cannot_be_folded_is_refused_and_nothing_has_changed():
    class Shifted(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) + x / x.abs().max()

    shifted = model()
    shifted.norm = Shifted(32).double()
    for other, fold, message in [
        (model(tie=True), STREAM, "the weight of '(embedding|head)' must be its own, got one tied to"),
        (shifted, STREAM, "norms must be x / rms.x. . weight, got 'norm'"),
        (model(), FoldedRotation(("blocks.*.up",), ("head",)), "all widths must be equal"),
        (model(), FoldedRotation(("blocks.0.values",), ("head",)), "producers must name nn.Linear or nn.Embedding"),
        (model(), FoldedRotation(("odd",), ("last",)), "block must be the order of a Hadamard matrix and divide 7"),
        (model(), FoldedRotation(("blocks.0.value",), ("blocks.0.value",)), "producers must not be consumers"),
    ]:
        before = {n: p.clone() for n, p in other.named_parameters()}
        good = () if other is shifted or other.head.weight is other.embedding.weight else (STREAM,)
        with pytest.raises(ValueError, match=f"^fold_rotation: {message}"):
            quantize_model(other, QuantConfig((("*", "int4"),), (*good, fold)))
        assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
