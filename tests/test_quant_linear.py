"""nn.QuantLinear: what it computes, and that it lives as a layer: saved, moved, cast, copied, compiled, sharded."""

import copy
import datetime
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import child_environment
from nn_modules import error
from torch import nn

import scalekern
from scalekern import _native, quant
from scalekern.nn import QuantLinear, quant_linear

FORMATS = {
    "int4": {"group_size": 16},
    "int3": {"group_size": 11, "symmetric": False, "method": "hqq"},
    "int8": {"group_size": None, "activation": "int8"},
    "int1": {"group_size": 32},
    "nvfp4": {},
    "int2": {"group_size": 16, "rotation": "random_hadamard", "method": "least_squares", "seed": 3},
}


def linear(K=40, N=24, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias=bias)


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_a_linear_layer_with_the_weight_that_it_says(format):
    dense, x = linear(), inputs(2, 5, 40)
    layer = QuantLinear.from_linear(dense, format, **FORMATS[format])
    exact = 0.02 if FORMATS[format].get("activation") else 1e-6
    assert error(layer(x), nn.functional.linear(x, layer.weight, dense.bias)) < exact
    assert 1e-4 < error(layer.weight, dense.weight) < {"int1": 0.75, "int2": 0.5}.get(format, 0.2)
    assert layer.weight.shape == (24, 40) and layer.bias is dense.bias
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize("format", FORMATS)
def test_saved_and_loaded(format, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = QuantLinear.from_linear(linear(), format, **FORMATS[format])
    safetensors.save_file(layer.state_dict(), tmp_path / "w.safetensors")
    options = {k: v for k, v in FORMATS[format].items() if k != "method"}
    for device in ("cpu", "meta"):
        other = QuantLinear(40, 24, format=format, device=device, **options)
        assert error(other.to_empty(device="cpu")(inputs(3, 40)).nan_to_num(), layer(inputs(3, 40))) > 0.1
        found = safetensors.load_file(tmp_path / "w.safetensors")
        assert not other.load_state_dict(found).missing_keys
        assert torch.equal(other(inputs(3, 40)), layer(inputs(3, 40)))


def test_a_checkpoint_keeps_the_dtypes_of_its_parts():
    layer = QuantLinear.from_linear(linear(), "int4", group_size=8, scale_dtype=torch.bfloat16, symmetric=False)
    other = QuantLinear(40, 24, format="int4", group_size=8, symmetric=False, train_scales=True)
    other.load_state_dict(layer.state_dict())
    assert other.weight_scales.dtype == torch.bfloat16 and other.weight_scales.requires_grad
    assert torch.equal(other.weight, layer.weight)
    wider = QuantLinear.from_linear(linear(), "int4", group_size=10, symmetric=False).state_dict()
    with pytest.raises(ValueError, match="weight must have group_size 8, the checkpoint's has 10"):
        other.load_state_dict(wider)
    with pytest.raises(RuntimeError, match="size mismatch for weight_scales"):
        other.load_state_dict(dict(wider))  # as of a file that does not say it


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_a_cast_reaches_the_bias_and_no_part(cast):
    layer = QuantLinear.from_linear(linear(), "int4", group_size=8, train_scales=True)
    layer(inputs(2, 40)).sum().backward()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer = layer.to(torch.float16) if cast == "to" else getattr(layer, cast)()
    dtype = {"bfloat16": torch.bfloat16, "double": torch.float64}.get(cast, torch.float16)
    assert layer.bias.dtype == layer.weight.dtype == layer(inputs(2, 40).to(dtype)).dtype == dtype
    for name, t in layer.state_dict().items():
        assert name == "bias" or (t.dtype == before[name].dtype and torch.equal(t, before[name])), name
    assert layer.weight_scales.grad.dtype == torch.float32
    assert layer.to("meta").weight_data.is_meta and layer.weight_data.dtype == torch.uint8


def test_copied_and_printed():
    layer = QuantLinear.from_linear(linear(), "int2", group_size=16, rotation="hadamard")
    other = copy.deepcopy(layer)
    assert torch.equal(other(inputs(2, 40)), layer(inputs(2, 40)))
    with torch.no_grad():
        other.weight_scales.mul_(2)
    assert not torch.equal(other(inputs(2, 40)), layer(inputs(2, 40)))
    assert "in_features=40, out_features=24, bias=True, format='int2', group_size=16, 4.40 bits" in str(layer)
    assert "rotation='hadamard'" in str(layer)


@pytest.mark.parametrize("format", ["int4", "mxfp4"])  # whose scales are kept as they are; as bytes, a view
@torch.no_grad()
def test_what_is_kept_of_a_weight_follows_it(format):
    """A product on the CPU keeps addresses from call to call: of tensors that are changed, moved and put in anew."""
    layer = QuantLinear(64, 48, format=format, group_size=32)
    x = torch.randn(2, 64)

    def check():
        found = layer(x)
        assert error(found, x.double() @ layer.weight.double().T + layer.bias) <= 1e-6
        return found

    first = check()
    layer.weight_data.bitwise_xor_(1)
    changed = check()
    assert not torch.equal(first, changed)
    scales = layer.weight_scales
    scales.data = (scales.float() * 4).to(scales.dtype)  # the same object, elsewhere
    layer.bias.data = layer.bias.data + 1
    moved = check()
    assert not torch.equal(changed, moved)
    layer.weight_data = torch.nn.Parameter(layer.weight_data ^ 2, requires_grad=False)
    assert not torch.equal(moved, check())
    twin = copy.deepcopy(layer)
    layer.weight_data.zero_()
    assert not torch.equal(twin(x), layer(x))
    check()
    exact = twin(x)
    twin.activation = "int8"
    assert 1e-6 < error(twin(x), exact) < 0.1


@torch.no_grad()
def test_what_is_kept_of_a_weight_tells_its_kind():
    """A part whose address stays and whose rows or dtype change, as where a cast reuses what it freed."""
    layer, x = QuantLinear(64, 48, group_size=32), torch.randn(2, 64)
    exact = lambda: x.double() @ layer.weight.double().T + layer.bias
    layer(x)
    layer.weight_scales.data = layer.weight_scales.data[:1]
    assert error(layer(x), exact()) < 1e-6
    layer.bias.data = torch.rand(48).half()
    layer(x)
    layer.bias.data = layer.bias.data.view(torch.bfloat16)
    assert error(layer(x), exact()) < 1e-6
    for part in layer.parameters():
        part.data = part.data[:4]
    assert layer(x).shape == (2, 4) and error(layer(x), exact()) < 1e-6
    layer.bias.data = layer.bias.data[:3]
    with pytest.raises(ValueError, match=r"nn.QuantLinear: bias must have shape \(4,\), got \(3,\)"):
        layer(x)
    layer.weight_data.data = layer.weight_data.data[:, :5]
    with pytest.raises(ValueError, match=r"nn.QuantLinear: data must have shape \(4, 32\), got \(4, 5\)"):
        layer(x)


@torch.no_grad()
def test_what_the_kept_weight_does_not_read():
    """After a first call, inputs that its one native call takes, and those that it leaves to the op."""
    layer = QuantLinear(64, 48, group_size=32)
    x = torch.randn(2, 3, 64)
    wanted = layer(x)
    for part in ((), (0,), (slice(None), 0), (1, 2)):  # more tokens than a few and less, and a vector
        assert error(layer(x[part]), wanted[part]) < 1e-6
        if x[part].dim() > 1:
            assert error(layer(x[part].mT.contiguous().mT), wanted[part]) < 1e-6
    assert error(layer(x.transpose(0, 1)), wanted.transpose(0, 1)) < 1e-6
    assert layer(x[:, :0]).shape == (2, 0, 48) and layer(x.half()).dtype == torch.float16
    assert error(layer(x.double()), wanted) < 1e-6 and layer(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"x must have shape \(2, 3, 64\), got \(2, 3, 32\)"):
        layer(x[..., :32])
    with pytest.raises(ValueError, match="x must"):
        layer(x[0, 0, 0])
    empty = QuantLinear(0, 5)
    assert torch.equal(empty(torch.zeros(2, 0)), empty(torch.zeros(1, 2, 0))[0])
    assert empty.bias.equal(empty(torch.zeros(0)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with scalekern.backend("reference"):
        assert error(layer(x), wanted) < 1e-6 and not torch.equal(layer(x), wanted)


@pytest.mark.parametrize("K, rotation", [(48, "hadamard"), (40, "random_hadamard"), (18, "hadamard"), (56, "hadamard")])
def test_a_rotation_is_exact_but_for_rounding(K, rotation):
    """With 8 bits next to nothing is rounded: the product is the float layer's, also by matrices not symmetric."""
    dense, x = linear(K=K), inputs(7, K)
    layer = QuantLinear.from_linear(dense, "int8", group_size=None, rotation=rotation)
    plain = QuantLinear.from_linear(dense, "int8", group_size=None)
    assert error(layer(x), dense(x)) < 0.01 and not torch.equal(layer.weight_data, plain.weight_data)
    x, y = (x.detach().requires_grad_() for _ in range(2))
    grads = torch.autograd.grad(layer(x).square().sum(), x), torch.autograd.grad(dense(y).square().sum(), y)
    assert error(grads[0][0], grads[1][0]) < 0.02


def test_a_rotation_spreads_outliers():
    """A column of large weights costs the others their digits; rotated it does not."""
    dense = linear(K=64, bias=False)
    with torch.no_grad():
        dense.weight[:, 5] *= 30
    x = inputs(100, 64)
    errors = [
        error(QuantLinear.from_linear(dense, "int4", group_size=None, rotation=r)(x), dense(x))
        for r in (None, "hadamard", "random_hadamard")
    ]
    assert max(errors[1:]) < 0.6 * errors[0], errors


def test_scales_train_and_codes_do_not():
    dense, x = linear(), inputs(64, 40)
    layer = QuantLinear.from_linear(dense, "int2", group_size=8, symmetric=False, train_scales=True)
    target, codes = dense(x).detach(), layer.weight_data.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    first = (layer(x) - target).square().mean().item()
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.75 * first and torch.equal(layer.weight_data, codes)
    assert layer.weight_zeros.grad.any() and layer.train_scales(False).weight_scales.requires_grad is False


def test_a_low_rank_pair_trains_around_it():
    """LoRA: the frozen layer passes gradients on and keeps every number of its own."""

    class Adapted(nn.Module):
        def __init__(self, base, rank):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.A = nn.Linear(base.in_features, rank, bias=False)
            self.B = nn.Linear(rank, base.out_features, bias=False)
            nn.init.zeros_(self.B.weight)

        def forward(self, x):
            return self.base(x) + self.B(self.A(x))

    dense, x = linear(), inputs(64, 40)
    target = dense(x).detach() + 0.3 * x @ inputs(40, 2, seed=2) @ inputs(2, 24, seed=3)
    model = nn.Sequential(linear(40, 40, seed=4), Adapted(QuantLinear.from_linear(dense, "int4", group_size=8), 4))
    before = copy.deepcopy(model[1].base.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append((model(x) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.4 * losses[0] and model[0].weight.grad.any()
    assert all(torch.equal(t, before[name]) for name, t in model[1].base.state_dict().items())


def test_compiles_without_a_graph_break():
    layer = QuantLinear.from_linear(linear(), "int4", group_size=8, rotation="random_hadamard", train_scales=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, layer):
        x = inputs(3, 40).requires_grad_()
        out = f(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, layer.weight_scales, layer.bias])))
    assert all(error(a, e) < 1e-6 for a, e in zip(*results, strict=True))


def test_autocast_reaches_the_product():
    layer, x = QuantLinear.from_linear(linear(), "int4", group_size=8), inputs(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_errors_name_the_argument():
    for options, message in [
        ({"activation": "int3"}, "activation must be one of None, 'int8'"),
        ({"activation_scale": 0.5}, "activation_scale must be above 0 and come with an activation, got 0.5 and None"),
        ({"rotation": "givens"}, "rotation must be one of None, 'hadamard'"),
        ({"method": "guess"}, "method must be one of 'absmax', 'least_squares', 'hqq'"),
    ]:
        with pytest.raises(ValueError, match=f"^nn.QuantLinear: {message}"):
            QuantLinear.from_linear(linear(), "int4", **options)
    with pytest.raises(ValueError, match="rotation must be None for 41 columns, of no .* got 'hadamard'"):
        QuantLinear.from_linear(linear(K=41), "int4", rotation="hadamard")
    with pytest.raises(ValueError, match="quant_matmul: x must have shape .3, 40., got .3, 41."):
        QuantLinear.from_linear(linear(), "int4")(inputs(3, 41))
    with pytest.raises(ValueError, match="nn.QuantLinear: weight must have 2 dimensions, got shape .2, 4, 8."):
        QuantLinear.from_quantized(quant.quantize(inputs(2, 4, 8), "int4"))
    assert QuantLinear.from_linear(linear(), "int4")(inputs(40)).shape == (24,)
    with pytest.raises(ValueError, match="hqq: symmetric must be False"):
        QuantLinear.from_linear(linear(), "int4", method="hqq")


# --- hqq -----------------------------------------------------------------------------------------------------------


def test_hqq_makes_errors_sparse():
    """Heavy tails: the p-norm that it minimizes falls in every group that changes, and no group's rises."""
    w = torch.distributions.StudentT(3.0).sample((20, 100)) / 10
    ranged = quant.quantize(w, "int3", group_size=32, symmetric=False)
    found = quant.hqq(w, "int3", group_size=32)
    cost = lambda q: nn.functional.pad((w - q.dequantize()).abs() / q.scales.repeat_interleave(32, 1)[:, :100], (0, 28))
    by_group = [(cost(q) ** 0.7).unflatten(1, (4, 32)).sum(-1) for q in (ranged, found)]
    assert (by_group[1] <= by_group[0] * (1 + 1e-5)).all() and by_group[1].sum() < 0.95 * by_group[0].sum()
    half = quant.hqq(w, "int3", group_size=32, scale_dtype=torch.float16)
    assert half.zeros.dtype == half.scales.dtype == torch.float16 and cost(half).sum() < cost(ranged).sum()
    assert torch.equal(ranged.scales, found.scales) and (found.zeros != found.zeros.round()).any()
    doubled = quant.hqq(4 * w, "int3", group_size=32)
    assert torch.equal(doubled.data, found.data) and torch.equal(doubled.zeros, found.zeros)  # no unit in it


@pytest.mark.parametrize("scale_dtype", [torch.int8, torch.uint8, torch.bfloat16, torch.float8_e4m3fn])
def test_hqq_with_scales_of_every_kind(scale_dtype):
    """Two levels as well, whose steps are scales * outer; zeros are no bfloat16."""
    w = inputs(16, 96)
    error = lambda q: (q.dequantize() - w).norm().item()  # noqa: E731
    found = quant.hqq(w, "int4", group_size=32, scale_dtype=scale_dtype)
    plain = quant.quantize(w, "int4", group_size=32, symmetric=False, scale_dtype=scale_dtype)
    assert error(found) <= error(plain) and found.zeros.dtype == torch.float32


def test_hqq_one_turn_by_hand(monkeypatch):
    """One group, one turn, every equation written out."""
    from scalekern.quant import _hqq

    monkeypatch.setattr(_hqq, "TURNS", 1)
    w = torch.tensor([[0.9, -0.31, 0.22, 0.47, -0.6, 0.05]], dtype=torch.float64)
    found = _hqq.hqq(w, "int2", group_size=None)
    s = (0.9 + 0.6) / 3
    z = round(0.6 / s)
    codes = [min(3, max(0, round(x / s + z))) for x in w[0].tolist()]
    r = [x / s - c + z for x, c in zip(w[0].tolist(), codes)]
    E = [(1 if e > 0 else -1) * max(abs(e) - abs(e) ** -0.3 / 10, 0) for e in r]
    moved = sum(c - x / s + e for c, x, e in zip(codes, w[0].tolist(), E)) / 6
    assert any(E) and moved != z
    cost = lambda z: sum(abs(x / s - min(3, max(0, round(x / s + z))) + z) ** 0.7 for x in w[0].tolist())
    assert found.scales.item() == pytest.approx(s)
    assert found.zeros.item() == pytest.approx(moved if cost(moved) < cost(z) else z, rel=1e-6)


# --- sharded -------------------------------------------------------------------------------------------------------


def sharded(rank, path):
    """What each of two processes does with its half of the rows."""
    dist = torch.distributed
    from torch.distributed.fsdp import fully_shard

    minute = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=minute)
    try:
        options = {"group_size": 8, "rotation": "random_hadamard", "train_scales": True}
        layer, x = QuantLinear.from_linear(linear(N=22), "int4", **options), inputs(4, 40)
        whole, wanted = {name: t.clone() for name, t in layer.state_dict().items()}, layer(x)
        (grad,) = torch.autograd.grad(wanted.square().sum(), layer.weight_scales)
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)))
        assert layer.weight_data.to_local().shape == (11, 20) and layer.weight_data.dtype == torch.uint8
        out = layer(x)
        assert torch.equal(out, wanted)
        out.square().sum().backward()
        assert error(layer.weight_scales.grad.full_tensor(), grad) < 1e-6
        for name, t in layer.state_dict().items():
            assert torch.equal(t.full_tensor(), whole[name]), name
    finally:
        dist.destroy_process_group()


def test_fsdp2_shards_its_rows(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    # _exit: at an ordinary exit, one process in 15 ends by std::terminate, with gloo's threads still there.
    script = "import os, sys, test_quant_linear as t; t.sharded(1, sys.argv[1]); os._exit(0)"
    command = [sys.executable, "-c", script, tmp_path / "store"]
    environment = child_environment(OMP_NUM_THREADS=1)
    folder = pathlib.Path(__file__).parent
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=folder, text=True) as other:
        try:
            sharded(0, tmp_path / "store")
        finally:
            failed = other.communicate(timeout=120)[1]
    assert other.returncode == 0, failed


def test_it_is_public():
    assert scalekern.nn.QuantLinear is QuantLinear and set(quant.METHODS) == {"absmax", "least_squares", "hqq"}


def test_layers_of_one_input_in_one_call(monkeypatch):
    """Where all may be; each by itself where one has a hook, a gradient, signs of its own, or another input."""
    if _native.load("cpu"):
        pytest.skip("the CPU library was not built (setup.py says why)")
    calls, at_once = [], quant_linear.products_of_kept
    monkeypatch.setattr(quant_linear, "products_of_kept", lambda *args: (calls.append(1), at_once(*args))[1])
    x = inputs(2, 3, 40)
    plain = [QuantLinear.from_linear(linear(N=N, bias=N > 5, seed=N), "int4", group_size=8) for N in (5, 24, 1)]
    rotated = [QuantLinear.from_linear(linear(seed=s), "int4", group_size=8, rotation="hadamard") for s in (1, 2)]
    flips = {"group_size": 8, "rotation": "random_hadamard"}
    signed = [QuantLinear.from_linear(linear(), "int4", **flips, seed=s) for s in (1, 2)]
    permuted = [linear(), plain[0]]
    for layers, count in ((plain, 1), (rotated, 1), (signed, 0), ([*plain, *rotated], 0), (permuted, 0)):
        calls.clear()
        with torch.no_grad():
            found = quant_linear.products(x, *layers)
            assert len(calls) == count
            for layer, out in zip(layers, found, strict=True):
                assert torch.equal(out, layer(x))
    calls.clear()
    assert quant_linear.products(x.requires_grad_(), *plain)[1].requires_grad
    seen = []
    plain[1].register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        quant_linear.products(x, *plain)
    assert len(seen) == 1 and not calls
    with torch.no_grad():
        plain[2].bias = nn.Parameter(torch.ones(1))
        assert torch.equal(quant_linear.products(x, plain[0], plain[2])[1], plain[2](x)) and calls
