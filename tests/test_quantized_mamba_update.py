"""A Mamba's decoding step of low-bit weights: the fused one is the step by parts, and is taken where it should be."""

import importlib

import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern import testing
from scalekern.nn import Mamba, QuantLinear, QuantMamba, _quantized_step, mamba
from scalekern.ops.quant_matmul import quant_matmul_fwd
from scalekern.quant import quantize_model
from scalekern.testing import assert_close

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")
NO_DELTA = ("*dt_proj", None)
# Rounded in other places, float32 sums in another order.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
CASES = [
    (dict(format="int4", group_size=64, symmetric=False, scale_dtype=torch.float16), 1, torch.float32, True),
    (dict(format="int8", group_size=32, activation="int8", rotation="hadamard"), 2, torch.float32, True),
    (dict(format="int2", group_size=24, symmetric=False), 5, torch.float32, True),
    (dict(format="int4", group_size=32, rotation="random_hadamard"), 8, torch.bfloat16, True),
    (dict(format="nvfp4"), 3, torch.bfloat16, True),
    (dict(format="mxfp8_e4m3"), 1, torch.float32, True),
    (dict(format="int3", group_size=11), 1, torch.bfloat16, False),
    (dict(format="nf4", group_size=64), 11, torch.float32, False),  # a batch for the parts
]


@pytest.fixture
def fused(monkeypatch):
    """The number of steps that were made by the op."""
    taken = []
    sound = mamba.quantized_step

    def watched(*args):
        out = sound(*args)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(mamba, "quantized_step", watched)
    return taken


def block_of(rule, dtype=torch.float32, keep=True, width=72, **options):
    torch.manual_seed(0)
    block = Mamba(width, d_state=5, bias=True, **options).to(dtype)
    quantize_model(block, [*([NO_DELTA] if keep else []), ("*", rule)])
    return block


def both(block, batch=1, dtype=torch.float32, steps=3):
    """(out, conv_state, ssm_state) of some tokens by `step` and by the parts."""
    torch.manual_seed(1)
    states = [torch.randn(s.shape).to(s.dtype) for s in block.allocate_inference_cache(batch, 1)]
    others = [s.clone() for s in states]
    with torch.no_grad():
        for _ in range(steps):
            x = torch.randn(batch, 1, block.d_model, dtype=dtype)
            found, wanted = block.step(x, *states)[0], block._step_by_parts(x, *others)
    return (found, *states), (wanted, *others)


def agree(block, dtype=torch.float32, **options):
    for found, wanted in zip(*both(block, dtype=dtype, **options)):
        assert wanted.abs().amax() > 0
        assert_close(found, wanted.double(), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("rule, batch, dtype, keep", CASES, ids=[c[0]["format"] + f"_{c[1]}" for c in CASES])
def test_is_the_step_by_parts(rule, batch, dtype, keep, fused):
    agree(block_of(rule, dtype, keep), batch=batch, dtype=dtype)
    assert fused == [True] * 3


def test_states_of_other_dtypes_and_gradients_refused(fused):
    block = block_of(CASES[0][0], torch.bfloat16)
    states = block.allocate_inference_cache(2, 1, torch.float32)
    out = block.step(torch.randn(2, 1, 72, dtype=torch.bfloat16, requires_grad=True), *states)[0]
    with pytest.raises(NotImplementedError, match="quantized_mamba_update"):
        out.sum().backward()
    assert fused == [True] and states[1].abs().amax() > 0


def test_threads_and_repetition_change_no_bit():
    block, threads = block_of(CASES[3][0], width=256), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(both(block, batch=2)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_what_was_gathered_follows_the_layers(fused):
    """Replaced parameters and layers, moved dtypes, activations and hooks: each is seen by the next step."""
    block = block_of(CASES[0][0])
    agree(block)
    block.out_proj.weight_scales = torch.nn.Parameter(block.out_proj.weight_scales * 2, requires_grad=False)
    agree(block)
    block.A_log.data = block.A_log.data - 1
    agree(block)
    for layer in (block.in_proj, block.x_proj, block.out_proj):
        layer.activation = "int8"
    agree(block)
    block.to(torch.bfloat16)
    agree(block, torch.bfloat16)
    assert fused == [True] * 15
    block.in_proj.activation = None  # two kinds of rounding in one block
    agree(block, torch.bfloat16)
    assert fused[15:] == [False] * 3
    block.in_proj.activation = "int8"
    seen = []
    block.x_proj.register_forward_hook(lambda *args: seen.append(1))
    agree(block, torch.bfloat16)
    assert fused[18:] == [False] * 3 and len(seen) == 6


@pytest.mark.parametrize("format", ["int4", "mxfp8_e4m3"])
def test_numbers_that_are_replaced_are_read(format):
    """`data` of a parameter, as moving a module to a GPU and back replaces it: by a layer, and by a block's step."""
    twice = lambda t: (t.view(torch.uint8) + 1).view(t.dtype) if t.dtype == torch.float8_e8m0fnu else 2 * t
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 8, bias=False), format=format)
    block, x = block_of(dict(format=format)), torch.randn(1, 64)
    both(block)
    with torch.no_grad():
        before = layer(x)
        for one in (layer, block.in_proj, block.x_proj, block.out_proj):
            one.weight_scales.data = twice(one.weight_scales.detach())
        assert_close(layer(x), 2 * before.double(), tolerance=1e-6)
    agree(block)


def test_blocks_of_their_own_arithmetic(fused):
    """QuantMamba steps by the op where only weights are rounded; a projection that stays dense is no case for it."""
    torch.manual_seed(0)
    block = Mamba(64, d_state=4)
    agree(QuantMamba.from_float(block, "w4a16"))
    assert fused == [True] * 3
    both(QuantMamba.from_float(block, "w8a8", inputs=torch.randn(1, 9, 64)))
    both(QuantMamba.from_float(block, "w4a16", state_dtype=torch.int8, inputs=torch.randn(1, 9, 64)))
    quantize_model(block, [("*x_proj", None), ("*", dict(format="int4", group_size=32))])
    agree(block)
    assert fused == [True] * 3 + [False] * 3


def test_gathered_with_the_block():
    block = block_of(CASES[0][0])
    both(block)
    assert block in _quantized_step._kept
    count = len(_quantized_step._kept)
    del block
    assert len(_quantized_step._kept) < count


@pytest.mark.parametrize("op", ["mamba_update", "quantized_mamba_update"])
def test_arguments_are_checked_once_for_their_shapes(op, monkeypatch):
    """What was checked is looked up; what differs in a shape, a dtype or a weight's parts is checked, and refused."""
    module, checked = importlib.import_module(f"scalekern.ops.{op}"), []
    sound = module.check_states
    monkeypatch.setattr(module, "check_states", lambda *args: (checked.append(1), sound(*args))[1])
    function, (args, kwargs) = getattr(scalekern, op), testing.samples(op)[0].make()
    turned = lambda i, change: tuple(change(a) if j == i else a for j, a in enumerate(doubled))  # noqa: E731
    doubled = [torch.cat([a, a]) if i < 3 else a for i, a in enumerate(args)]
    function(*doubled, **kwargs)
    assert len(checked) <= 1  # another test may have been here before
    checked.clear()
    for _ in range(3):
        function(*doubled, **kwargs)
    assert not checked
    for _ in range(2):  # nor is a refusal kept
        for i, change in ((1, lambda t: t[:, 1:]), (2, lambda t: t.to(torch.int32)), (9, lambda t: t[:, :-1])):
            with pytest.raises((ValueError, TypeError), match=f"^{op}: "):
                function(*turned(i, change), **kwargs)
    if op == "quantized_mamba_update":
        with pytest.raises(ValueError, match=f"^{op}: scales must have shape"):
            function(*turned(3, lambda w: w.replace(scales=w.scales[:, 1:])), **kwargs)


@pytest.mark.parametrize("op", ["mamba_update", "quantized_mamba_update"])
def test_states_that_cannot_be_written_are_refused(op):
    """Although dense ones of those shapes were accepted before: strides are not looked up, layouts are."""
    function, (args, kwargs) = getattr(scalekern, op), testing.samples(op)[0].make()
    args = [torch.cat([a[:1], a[:1]]) if i < 3 else a for i, a in enumerate(args)]
    function(*args, **kwargs)
    for i, name in ((1, "conv_state"), (2, "ssm_state")):
        for bad, kind, message in (
            (args[i][:1].expand_as(args[i]), ValueError, "is changed in place and must not be expanded"),
            (args[i].to_sparse(), TypeError, "must be dense, got layout sparse_coo"),
        ):
            before = [t.clone() for t in args[1:3]]
            with pytest.raises(kind, match=f"^{op}: {name} {message}"):
                function(*args[:i], bad, *args[i + 1 :], **kwargs)
            assert all(map(torch.equal, args[1:3], before))


def test_a_gathered_block_refuses_expanded_states():
    block = block_of(CASES[0][0])
    x, *states = torch.randn(2, 1, block.d_model), *block.allocate_inference_cache(2, 1)
    for i, name in enumerate(("conv_state", "ssm_state")):
        given = [s[:1].expand_as(s) if i == j else s for j, s in enumerate(states)]
        with pytest.raises(ValueError, match=f"^quantized_mamba_update: {name} is changed in place and must no"):
            block.step(x, *given)
    assert block in _quantized_step._kept


def test_a_linear_layer_calls_its_product_at_once():
    """Bit for bit what the dispatcher gives, whatever the leading axes; with gradients it goes through it."""
    torch.manual_seed(0)
    layer = QuantLinear(40, 24, format="int4", group_size=16, activation="int8", symmetric=False)
    own = layer._parameters
    for shape in ((1, 40), (2, 3, 40), (0, 40)):
        x = torch.randn(shape)
        wanted = quant_matmul_fwd(
            x, own["weight_data"], own["weight_scales"], own["weight_zeros"], None, None, own["bias"], None, "int4", 16,
            "int8", None, None,
        )  # fmt: skip
        with torch.no_grad():
            assert torch.equal(layer(x), wanted)
    x = torch.randn(2, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().amax() > 0


def test_a_static_scale_is_a_number_above_0():
    args, kwargs = testing.samples("quantized_mamba_update")[0].make()
    states = [args[1].clone(), args[2].clone()]
    for scale, message in (("x", "must be a number, got 'x'"), ([0.1], "must be a number"), (torch.ones(3), "number"),
                           (-1.0, "must be above 0"), (1e-60, "must lie in float32's range")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=f"^quantized_mamba_update: activation_scale .*{message}"):
            scalekern.quantized_mamba_update(*args, **{**kwargs, "activation": "int8", "activation_scale": scale})
    assert torch.equal(args[1], states[0]) and torch.equal(args[2], states[1])
