"""SS2D, GroupMamba and SerpentBlock against their papers' equations in plain torch, with scans as loops over pixels."""

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET
from nn_modules import check_against, check_each_matters, error, layer_norm, linear, normal, perturbed, sigmoid, tensors

from scalekern import nn

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, not the modules")


def awake(module):
    """Off its initial values, with steps of about a half, or the scans' states would hardly matter."""
    module = perturbed(module)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += 4 * name.endswith("dt_projs_bias")
    return module


def order(H, W, direction):
    """The pixels (h, w) as a direction meets them."""
    rows = [(h, w) for h in range(H) for w in range(W)]
    pixels = rows if direction % 2 == 0 else sorted(rows, key=lambda at: (at[1], at[0]))
    return pixels[::-1] if direction >= 2 else pixels


def scanned(p, k, x, direction):
    """Direction k of x (B, H, W, D) by Mamba's recurrence, pixel after pixel."""
    D, N = x.shape[-1], p["A_logs"].shape[1]
    A, skip = -p["A_logs"][k * D : (k + 1) * D].exp(), p["Ds"][k * D : (k + 1) * D]
    R = p["dt_projs_weight"].shape[2]
    h, out = 0, {}
    for at in order(*x.shape[1:3], direction):
        u = x[:, at[0], at[1]]
        projected = u @ p["x_proj_weight"][k].T
        dt, B, C = projected[:, :R], projected[:, R : R + N], projected[:, R + N :]
        step = torch.log1p(torch.exp(dt @ p["dt_projs_weight"][k].T + p["dt_projs_bias"][k]))[..., None]
        h = torch.exp(step * A) * h + step * B[:, None] * u[..., None]
        out[at] = (h * C[:, None]).sum(-1) + skip * u
    return torch.stack([torch.stack([out[i, j] for j in range(x.shape[2])], 1) for i in range(x.shape[1])], 1)


def ss2d(p, u, directions=(0, 1, 2, 3)):
    x, z = linear(p, "in_proj", u).chunk(2, -1)
    if "conv2d.weight" in p:
        w, pad = p["conv2d.weight"][:, 0], p["conv2d.weight"].shape[-1] // 2
        around = F.pad(x, (0, 0, pad, pad, pad, pad))
        taps = [(i, j) for i in range(w.shape[1]) for j in range(w.shape[2])]
        x = sum(around[:, i : i + u.shape[1], j : j + u.shape[2]] * w[:, i, j] for i, j in taps) + p["conv2d.bias"]
    x = x * sigmoid(x)
    y = sum(scanned(p, k, x, direction) for k, direction in enumerate(directions))
    return linear(p, "out_proj", layer_norm(y, p["out_norm.weight"], p["out_norm.bias"]) * z * sigmoid(z))


def part(p, prefix):
    return {name.removeprefix(prefix): t for name, t in p.items() if name.startswith(prefix)}


def group_mamba(p, u):
    norm = lambda x: layer_norm(x, p["norm.weight"], p["norm.bias"])
    x = norm(u.permute(0, 2, 3, 1))
    affinity = sigmoid(linear(p, "fc2", linear(p, "fc1", x.sum((1, 2)) / (x.shape[1] * x.shape[2])).clamp(min=0)))
    parts = [ss2d(part(p, f"mamba_g{k + 1}."), y, (k,)) for k, y in enumerate(x.chunk(4, -1))]
    y = torch.cat(parts, -1) * p["skip_scale"] * x * affinity[:, None, None]
    return linear(p, "proj", norm(y)).permute(0, 3, 1, 2)


def serpent(p, x):
    """Two scales of one block each."""

    def block(name, x):
        q = part(p, f"{name}.0.")
        return x + ss2d(part(q, "op."), layer_norm(x, q["norm.weight"], q["norm.bias"]))

    fine = block("down.0", x.permute(0, 2, 3, 1))
    B, H, W, C = fine.shape
    even = torch.zeros(B, H + H % 2, W + W % 2, C, dtype=x.dtype)
    even[:, :H, :W] = fine
    four = torch.cat([even[:, 0::2, 0::2], even[:, 1::2, 0::2], even[:, 0::2, 1::2], even[:, 1::2, 1::2]], -1)
    coarse = layer_norm(four, p["merge.0.norm.weight"], p["merge.0.norm.bias"]) @ p["merge.0.reduction.weight"].T
    wide = block("down.1", coarse) @ p["expand.0.expand.weight"].T
    up = torch.zeros_like(even)
    for n, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        up[:, i::2, j::2] = wide[..., n * C : (n + 1) * C]
    y = block("up.0", linear(p, "expand.0.fuse", torch.cat([up[:, :H, :W], fine], -1)))
    return x + y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(4, 3), (1, 5), (3, 1), (1, 1)])
def test_group_mamba_is_the_papers_layer(size):
    module = awake(nn.GroupMamba(16, d_state=2, reduction=4))
    check_against(group_mamba, module, normal(2, 16, *size))
    if size == (4, 3):
        check_each_matters(group_mamba, module, normal(2, 16, *size), [
            "fc2.weight", "skip_scale", "mamba_g1.A_logs", "mamba_g2.dt_projs_bias", "mamba_g3.x_proj_weight",
            "mamba_g4.Ds",
        ])  # fmt: skip
        x = normal(2, 12, 16)
        image = module(x.transpose(1, 2).unflatten(2, size))
        assert torch.equal(module(x, size), image.flatten(2).transpose(1, 2))
        with pytest.raises(ValueError, match=r"nn.GroupMamba: size must be given"):
            module(x)


@pytest.mark.parametrize(
    "size, options",
    [((3, 4), {}), ((1, 5), {"directions": (3, 1), "d_conv": 1}), ((5, 1), {"directions": (2,), "d_conv": 5})],
)
def test_ss2d_is_the_papers_block(size, options):
    module = awake(nn.SS2D(4, d_state=3, **options))
    rendering = lambda p, u: ss2d(p, u, module.directions)
    check_against(rendering, module, normal(2, *size, 4))
    check_each_matters(rendering, module, normal(2, *size, 4), ["x_proj_weight", "dt_projs_bias", "A_logs", "Ds"])


@pytest.mark.parametrize("size", [(3, 5), (4, 2), (1, 1)])
def test_serpent_block_is_its_equations(size):
    module = awake(nn.SerpentBlock(3, scales=2, d_state=2))
    check_against(serpent, module, normal(2, 3, *size))
    if size == (3, 5):
        check_each_matters(serpent, module, normal(2, 3, *size), [
            "merge.0.reduction.weight", "down.1.0.op.A_logs", "expand.0.expand.weight", "up.0.0.op.Ds",
        ])  # fmt: skip


def test_layouts_give_the_same():
    module = awake(nn.GroupMamba(8, d_state=2))
    x = normal(2, 8, 5, 7)
    assert error(module(x.to(memory_format=torch.channels_last)), module(x)) < 1e-14
    assert error(module(x.transpose(2, 3).contiguous().transpose(2, 3)), module(x)) < 1e-14


def test_scans_of_an_image_copy_it_nowhere():
    """Nothing that cross_selective_scan makes is a copy of the image, and nothing grows faster than the pixels do."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        copied = largest = total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and not func.is_view:
                    copies = torch.ops.aten.clone, torch.ops.aten.flip, torch.ops.aten.copy_
                    self.copied += t.numel() * (func.overloadpacket in copies)
                    self.largest, self.total = max(self.largest, t.nbytes), self.total + t.nbytes
            return out

    found = {}
    for side in (12, 24):
        module = nn.SS2D(8, d_state=2, d_conv=1)
        x = torch.randn(1, side, side, 8)
        with Watch() as watch, torch.no_grad():
            module(x)
        found[side] = watch
        assert watch.copied == 0
    for name in ("largest", "total"):
        assert 3.9 < getattr(found[24], name) / getattr(found[12], name) < 4.1
