"""nn.UniRepLKNetBlock against its equations in plain torch, sharing no code with the package."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nn_modules import check_against, check_compiled, check_each_matters, check_loads, error, normal, perturbed, tensors

from scalekern.nn import DilatedReparamBlock, UniRepLKNetBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
DIM = 8


def sub(p, prefix):
    return {name.removeprefix(f"{prefix}."): t for name, t in p.items() if name.startswith(f"{prefix}.")}


def batch_norm(p, x, training):
    """Ioffe & Szegedy 2015, algorithms 1 and 2."""
    if training:
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
    else:
        mean, variance = p["running_mean"], p["running_var"]
    scale = p["weight"] / (variance + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + p["bias"][:, None, None]


def convolve(p, x, dilation=1):
    """Every tap shifts the image: a large filter that is centred."""
    weight = p["weight"][:, 0]
    (rows, columns), (height, width) = weight.shape[1:], x.shape[2:]
    top, left = dilation * (rows - 1) // 2, dilation * (columns - 1) // 2
    padded = F.pad(x, (left, left, top, top))
    out = p["bias"][:, None, None] * torch.ones_like(x) if "bias" in p else torch.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            shifted = padded[..., i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            out = out + weight[:, i, j, None, None] * shifted
    return out


def large_filter(p, x, training):
    """Ding et al. 2024, figure 2: the parallel branches of the dilated reparam block, or what became of them."""
    if "weight" in p:
        return convolve(p, x)
    if "lk_origin.weight" not in p:
        return x
    out = convolve(sub(p, "lk_origin"), x)
    if "origin_bn.weight" not in p:
        return out
    out = batch_norm(sub(p, "origin_bn"), out, training)
    for name in p:
        if name.startswith("dil_conv"):
            k_r = name.split(".")[0].removeprefix("dil_conv_")
            branch = convolve(sub(p, f"dil_conv_{k_r}"), x, int(k_r.split("_")[1]))
            out = out + batch_norm(sub(p, f"dil_bn_{k_r}"), branch, training)
    return out


def block(p, x, training=False):
    y = large_filter(sub(p, "dwconv"), x, training)
    y = batch_norm(sub(p, "norm"), y, training) if "norm.weight" in p else y
    means = y.mean((2, 3))
    hidden = (means @ p["se.down.weight"][:, :, 0, 0].T + p["se.down.bias"]).clamp(min=0)
    squeezed = hidden @ p["se.up.weight"][:, :, 0, 0].T + p["se.up.bias"]
    y = y / (1 + torch.exp(-squeezed))[:, :, None, None]
    y = y.permute(0, 2, 3, 1) @ p["pwconv1.1.weight"].T + p["pwconv1.1.bias"]
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    norm = (y.square().sum((1, 2), keepdim=True) + 1e-300).sqrt()  # a slope of zero where gelu has left nothing
    y = y + p["act.1.gamma"] * y * norm / (norm.mean(3, keepdim=True) + 1e-6) + p.get("act.1.beta", 0)
    y = (y @ p["pwconv2.0.weight"].T + p.get("pwconv2.0.bias", 0)).permute(0, 3, 1, 2)
    y = batch_norm(sub(p, "pwconv2.2"), y, training) if "pwconv2.2.weight" in p else y
    return x + p["gamma"][:, None, None] * y if "gamma" in p else x + y


def build(kernel_size, training=False, **options):
    torch.manual_seed(0)
    module = perturbed(UniRepLKNetBlock(DIM, kernel_size, **{"layer_scale_init_value": 0.5, **options}))
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.copy_(0.5 + torch.rand_like(buffer))
    with torch.no_grad():
        module.se.down.bias += 2  # neurons that are at work
    return module.train(training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kernel_size, size, options",
    [
        (7, (9, 5), {}),
        (13, (5, 8), {"layer_scale_init_value": None}),
        (17, (3, 4), {}),
        (9, (4, 4), {"ffn_factor": 2}),
        (3, (5, 4), {}),
        (0, (1, 1), {}),
        (11, (4, 6), {"deploy": True}),
        (5, (4, 6), {"deploy": True}),
    ],
    ids=str,
)
def test_output_and_gradients_match_the_equations(kernel_size, size, options, training):
    module = build(kernel_size, training, **options)
    before = tensors(copy.deepcopy(module))  # training moves the running statistics
    rendering = lambda p, x: block({**before, **p}, x, training)
    check_against(rendering, module, normal(3, DIM, *size))


def test_a_changed_equation_is_noticed():
    names = ["norm.bias", "se.up.bias", "pwconv1.1.bias", "act.1.gamma", "act.1.beta", "pwconv2.2.bias", "gamma"]
    names += ["dwconv.origin_bn.bias", "dwconv.dil_conv_k5_1.weight", "dwconv.dil_conv_k3_2.weight"]
    names += ["dwconv.dil_bn_k3_3.running_mean"]
    check_each_matters(block, build(7), normal(2, DIM, 6, 5), names)


@pytest.mark.parametrize("kernel_size", [0, 3, 5, 7, 9, 11, 13, 15, 17])
@pytest.mark.parametrize("scale", [0.5, None])
def test_reparameterize_keeps_the_function(kernel_size, scale):
    module, x = build(kernel_size, layer_scale_init_value=scale), normal(2, DIM, 7, 6)
    expected = block(tensors(module), x)
    assert error(module(x), expected) < 1e-12
    branches = copy.deepcopy(module.dwconv)
    module.reparameterize()
    assert error(module(x), expected) < 1e-12
    assert error(block(tensors(module), x), expected) < 1e-12
    assert not any("bn" in name or name == "gamma" for name in module.state_dict())
    deployed = UniRepLKNetBlock(DIM, kernel_size, deploy=kernel_size > 0, layer_scale_init_value=None).double()
    if kernel_size:  # its checkpoint is the deployed form's
        deployed.load_state_dict(module.state_dict(), strict=True)
        assert torch.equal(deployed(x), module(x))
        assert all(p.requires_grad for p in module.parameters())
    module.reparameterize()  # twice is once
    assert error(module(x), expected) < 1e-12
    if isinstance(branches, DilatedReparamBlock):
        # The merged filter of eval mode is what training's branches compute with the same constants.
        assert error(branches(x), large_filter(tensors(branches), x, False)) < 1e-12


def batch_norm_keys(name, channels):
    sizes = {n: (channels,) for n in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.{n}": size for n, size in (sizes | {"num_batches_tracked": ()}).items()}


SHARED = {
    "se.down.weight": (2, 8, 1, 1),
    "se.down.bias": (2,),
    "se.up.weight": (8, 2, 1, 1),
    "se.up.bias": (8,),
    "pwconv1.1.weight": (32, 8),
    "pwconv1.1.bias": (32,),
    "act.1.gamma": (1, 1, 1, 32),
    "pwconv2.0.weight": (8, 32),
}
STATE_DICT = {  # of upstream's UniRepLKNetBlock(dim=8, kernel_size=13)
    **SHARED,
    "dwconv.lk_origin.weight": (8, 1, 13, 13),
    **batch_norm_keys("dwconv.origin_bn", 8),
    "dwconv.dil_conv_k5_1.weight": (8, 1, 5, 5),
    **batch_norm_keys("dwconv.dil_bn_k5_1", 8),
    "dwconv.dil_conv_k7_2.weight": (8, 1, 7, 7),
    **batch_norm_keys("dwconv.dil_bn_k7_2", 8),
    "dwconv.dil_conv_k3_3.weight": (8, 1, 3, 3),
    **batch_norm_keys("dwconv.dil_bn_k3_3", 8),
    "dwconv.dil_conv_k3_4.weight": (8, 1, 3, 3),
    **batch_norm_keys("dwconv.dil_bn_k3_4", 8),
    "dwconv.dil_conv_k3_5.weight": (8, 1, 3, 3),
    **batch_norm_keys("dwconv.dil_bn_k3_5", 8),
    **batch_norm_keys("norm", 8),
    "act.1.beta": (1, 1, 1, 32),
    **batch_norm_keys("pwconv2.2", 8),
    "gamma": (8,),
}
DEPLOYED = {
    **SHARED,
    "dwconv.lk_origin.weight": (8, 1, 13, 13),
    "dwconv.lk_origin.bias": (8,),
    "pwconv2.0.bias": (8,),
}
SMALL = {**DEPLOYED, "dwconv.weight": (8, 1, 3, 3), "dwconv.bias": (8,)}


def test_upstreams_checkpoints_load():
    check_loads(UniRepLKNetBlock(8, 13), STATE_DICT)
    check_loads(UniRepLKNetBlock(8, 13, deploy=True), DEPLOYED)
    check_loads(UniRepLKNetBlock(8, 3, deploy=True), {n: s for n, s in SMALL.items() if "lk_origin" not in n})
    assert torch.equal(UniRepLKNetBlock(8, 3).gamma, torch.full((8,), 1e-6))


def test_drop_path_drops_whole_samples_in_training():
    module, x = build(3, drop_path=0.5), normal(64, DIM, 2, 2)
    expected = block(tensors(module), x)
    assert error(module(x), expected) < 1e-12
    module.drop_path.train()
    branch, whole = module(x) - x, 2 * (expected - x)
    kept = (branch != 0).flatten(1).any(1)
    assert 10 < kept.sum() < 54 and error(branch[kept], whole[kept]) < 1e-12


@pytest.mark.parametrize("backend, training", [("eager", True), ("aot_eager", False)])
def test_compile_fullgraph(backend, training):
    check_compiled(build(7, training), normal(2, DIM, 5, 6), backend)


def test_low_precision_and_empty_batch():
    module, x = build(7), normal(2, DIM, 6, 6)
    expected = block(tensors(module), x)
    module = module.float()
    assert error(module(x.float()), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(x.float()), expected) < 1e-2
    assert module(torch.zeros(0, DIM, 6, 6)).shape == (0, DIM, 6, 6)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="UniRepLKNetBlock: kernel_size must be one of 0, 3, 5, 17"):
        UniRepLKNetBlock(8, 8)
    with pytest.raises(ValueError, match="DilatedReparamBlock: kernel_size must be one of"):
        DilatedReparamBlock(8, 3)
    with pytest.raises(ValueError, match="dim must be an integer of at least 4, got 3"):
        UniRepLKNetBlock(3, 7)
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 8, \*, \*\)"):
        build(3)(normal(1, 5, 4, 4))
