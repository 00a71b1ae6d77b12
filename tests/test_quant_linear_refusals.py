"""nn.QuantLinear refuses parts and checkpoints that do not fit, by name: forward looks at none of them again."""

import pytest
import torch
from test_quant_linear import inputs, linear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalekern import quant
from scalekern.nn import QuantLinear
from scalekern.nn.quant_linear import products


@pytest.mark.parametrize(
    "name, dtype",
    [("weight_data", torch.float32), ("weight_data", torch.int8), ("weight_scales", torch.int64)],
    ids=str,
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_with_a_part_of_a_wrong_dtype(name, dtype, assign):
    layer = QuantLinear.from_linear(linear(), "int4")
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    wrong = {n: t * 0 for n, t in before.items()} | {name: before[name].to(dtype)}
    with pytest.raises(TypeError, match=f"nn.QuantLinear: {name} must have dtype .*, got {dtype}"):
        layer.load_state_dict(wrong, assign=assign)
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())  # nothing is half loaded


@pytest.mark.parametrize("format", ["nf4", "mxfp4", "nvfp4", "int1", "fp8_e4m3", "fp4_bnb", "int4"])
def test_a_skeleton_and_a_fake(format):
    """Under a device context and under a fake mode, whose tables are not kept for the calls that follow."""
    with torch.device("meta"):
        assert QuantLinear(40, 8, format=format).weight_data.is_meta
    for _ in range(2):
        with FakeTensorMode():
            assert QuantLinear(40, 8, format=format)(torch.randn(3, 40)).shape == (3, 8)
    weight = quant.quantize(inputs(8, 40), format)
    assert type(weight.data) is torch.Tensor and weight.dequantize().isfinite().all()
    compiled = torch.compile(lambda w: quant.quantize(w, format).dequantize(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs(8, 40)), weight.dequantize())


@pytest.mark.parametrize(
    "other",
    [{"format": "nf4"}, {"group_size": 36}, {"rotation": "hadamard"}, {"in_features": 39}],
    ids=lambda other: min(other),
)
def test_a_checkpoint_of_another_meaning(other, tmp_path):
    """Its parts have the very shapes of the layer's, and would be read as other numbers."""
    layer = QuantLinear(**{"in_features": 40, "out_features": 24, "format": "int4", "group_size": 32} | other)
    torch.save(nn.Sequential(layer).state_dict(), tmp_path / "layer.pt")
    found = torch.load(tmp_path / "layer.pt")
    holder = nn.Sequential(QuantLinear(40, 24, format="int4", group_size=32))
    (name, value), own = min(other.items()), holder[0]
    with pytest.raises(ValueError, match=f"0.weight must have {name} {getattr(own, name)!r}, .* has {value!r}"):
        holder.load_state_dict(found)
    nn.Sequential(layer).load_state_dict(found)
    holder.load_state_dict(dict(nn.Sequential(QuantLinear(40, 24, group_size=32)).state_dict()))  # says nothing of it
    QuantLinear(40, 24, group_size=64).load_state_dict(QuantLinear(40, 24, group_size=None).state_dict())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "name, shape",
    [("weight_data", (24, 3)), ("weight_scales", (5, 2)), ("weight_zeros", (24, 1)), ("bias", (2,)), ("bias", ())],
    ids=str,
)
def test_parts_put_in_later_that_do_not_fit(name, shape, grad):
    """They would be read past their ends."""
    layer, x = QuantLinear(40, 24, group_size=32, symmetric=False), inputs(3, 40)
    with torch.set_grad_enabled(grad):
        layer(x)
        part = torch.zeros(shape, dtype=getattr(layer, name).dtype)
        setattr(layer, name, nn.Parameter(part, requires_grad=False))
        with pytest.raises(ValueError, match=rf"{name.removeprefix('weight_')} must have .*, got "):
            layer(x)


def test_parts_that_do_not_fit_are_refused():
    """forward looks at no bias again: a short one would be read past its end."""
    weight = quant.quantize(inputs(24, 40), "int4")
    for bias, message in (
        (torch.ones(23), "bias must have shape .24,., got .23,."),
        (torch.ones(24, dtype=torch.int64), "bias must have dtype float64, .*, got int64"),
        (1.0, "bias must be a torch.Tensor, got float"),
        (torch.ones(24, device="meta"), "bias must be on cpu like weight, got meta"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"nn.QuantLinear: {message}"):
            QuantLinear.from_quantized(weight, bias)
    with pytest.raises(TypeError, match="nn.QuantLinear: weight must be a .*QuantizedTensor, got Tensor"):
        QuantLinear.from_quantized(inputs(24, 40))
    with pytest.raises(TypeError, match="nn.QuantLinear: linear must be an nn.Linear, got Conv1d"):
        QuantLinear.from_linear(nn.Conv1d(1, 1, 1))
    for options, message in (
        ({"in_features": -1}, "in_features must be an integer of at least 0, got -1"),
        ({"out_features": 8.0}, "out_features must be an integer of at least 0, got 8.0"),
        ({"dtype": torch.int8}, "dtype must be one of float64, .*, got int8"),
        ({"bias": torch.ones(8)}, "bias must be True or False .from_quantized takes a tensor., got a Tensor"),
        ({"activation": "int8", "activation_scale": "a"}, "activation_scale must be a number, got 'a'"),
        ({"activation": "int8", "activation_scale": 1e60}, "activation_scale must lie in float32's range, got 1e.60"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"nn.QuantLinear: {message}"):
            QuantLinear(**{"in_features": 40, "out_features": 8, **options})
    for rotation in (None, "hadamard", "random_hadamard"):
        layer = QuantLinear(40, 8, rotation=rotation)
        layer(torch.randn(3, 40))
        for x in ([1.0], torch.randn(3, 48), torch.randn(3, 40).to_sparse(), torch.randn(3, 40).to_mkldnn()):
            for grad in (True, False):
                with torch.set_grad_enabled(grad), pytest.raises((TypeError, ValueError), match=": x must"):
                    layer(x)
        with torch.no_grad(), pytest.raises(TypeError, match=": x must"):
            products(torch.randn(3, 40).to_sparse(), layer, layer)
