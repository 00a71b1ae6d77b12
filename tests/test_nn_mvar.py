"""nn.MVARBlock against the paper's equations in plain torch, sharing no code with the package."""

import math

import pytest
import torch
from nn_modules import (
    attend, bound, by_heads, check_against, check_each_matters, check_loads, error, from_heads, layer_norm, linear,
    mamba2, normal, perturbed, sigmoid, tensors,
)  # fmt: skip

from scalekern import masks
from scalekern.nn import MVARBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, HEADS, SCALES = 8, 2, [0, 1, 1, 1, 1, 2, 2]  # of each token; a last scale of 1 x 2
STATES, HEADDIM = 3, 4
MASK = masks.segments(cu_seqlens=torch.tensor([0, 1, 5, 7]))


def paper(p, x, cond):
    """Ren et al. 2024, section 3: attention within each scale, a scan over all of them, an MLP."""
    if "ada_gss" in p:
        nine = (p["ada_gss"] + cond)[:, 0]
    else:
        nine = linear(p, "ada_lin.1", cond * sigmoid(cond)).unflatten(-1, (9, WIDTH))
    gamma, scale, shift = (nine[:, None, i : i + 3].unbind(2) for i in (0, 3, 6))
    norm = lambda x, i: layer_norm(x, eps=1e-6) * (1 + scale[i]) + shift[i]  # noqa: E731
    q, k, v = (by_heads(norm(x, 0) @ w.T, HEADS) for w in p["attn.mat_qkv.weight"].chunk(3))
    q, v = (t + by_heads(p[f"attn.{n}_bias"][None, None], HEADS) for t, n in ((q, "q"), (v, "v")))
    q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
    q = q * p["attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
    y = attend(q, k, v, lambda b, h, i, j: SCALES[j] == SCALES[i], 1.0)
    x = x + gamma[0] * linear(p, "attn.proj", from_heads(y))
    x = x + gamma[1] * mamba2({n.removeprefix("mamba."): t for n, t in p.items() if "mamba" in n}, norm(x, 1))
    y = linear(p, "ffn.fc1", norm(x, 2))
    y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + gamma[2] * linear(p, "ffn.fc2", y)


def build(**options):
    torch.manual_seed(0)
    shape = {"mlp_ratio": 1.5, "d_state": STATES, "headdim": HEADDIM}
    return perturbed(MVARBlock(WIDTH, HEADS, **shape, **options), scale=0.5)


@pytest.mark.parametrize("shared", [False, True])
def test_output_and_gradients_match_the_paper(shared):
    """x holds the condition first: (B, D) in one row, or nine modulations."""
    module, rows = build(shared_aln=shared), 9 if shared else 1
    apart = lambda x: (x[:, rows:], x[:, None, :9] if shared else x[:, 0])  # noqa: E731
    rendering = lambda p, x: paper(p, *apart(x))  # noqa: E731
    x = normal(2, 7 + rows, WIDTH)
    check_against(rendering, bound(module, lambda forward, x: forward(*apart(x), MASK)), x)
    names = ["attn.v_bias", "ada_gss" if shared else "ada_lin.1.bias"]
    check_each_matters(rendering, module, x, names + [n for n in tensors(module) if "mamba" in n and "A_log" not in n])


def test_scale_by_scale_is_the_training_pass():
    """Two scales in one call and one by itself, to the gradients; the cache does not grow; without one, it shows."""
    module, x, cond = build(), normal(2, 7, WIDTH).requires_grad_(), normal(2, WIDTH)
    cache, outs, sizes = module.new_cache(), [], set()
    for begin, end, mask in ((0, 5, masks.segments(cu_seqlens=torch.tensor([0, 1, 5]))), (5, 7, None)):
        outs.append(module(x[:, begin:end], cond, mask, cache=cache))
        sizes.add(tuple(s.shape for s in cache.states))
    outs = torch.cat(outs, 1), module(x, cond, MASK)
    assert error(outs[0], paper(tensors(module), x, cond)) < 1e-12 and len(sizes) == 1
    grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs]
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-10
    assert error(module(x[:, 5:], cond), outs[1][:, 5:]) > 1e-3
    module = module.float()
    x, cond, cache = x.detach().float(), cond.float(), module.new_cache()
    parts = [module(part, cond, cache=cache) for part in x.split([1, 4, 2], 1)]
    assert error(torch.cat(parts, 1), module(x, cond, MASK)) < 1e-5


def test_no_scale_reads_a_later_one():
    module, x, cond = build(), normal(1, 7, WIDTH), normal(1, WIDTH)
    poisoned = torch.cat([x[:, :5], torch.full_like(x[:, 5:], torch.nan)], 1)
    out = module(poisoned, cond, MASK)
    assert error(out[:, :5], module(x, cond, MASK)[:, :5]) < 1e-12 and out[:, 5:].isnan().all()


def test_upstreams_checkpoints_load():
    """AdaLNSelfAttn(embed_dim=8, cond_dim=6, num_heads=2, attn_l2_norm=True), its Mamba2 of one head of 16."""
    module = MVARBlock(8, 2, cond_dim=6, headdim=16)
    shapes = {
        "attn.scale_mul_1H11": (1, 2, 1, 1), "attn.q_bias": (8,), "attn.v_bias": (8,), "attn.zero_k_bias": (8,),
        "attn.mat_qkv.weight": (24, 8), "attn.proj.weight": (8, 8), "attn.proj.bias": (8,),
        "ffn.fc1.weight": (32, 8), "ffn.fc1.bias": (32,), "ffn.fc2.weight": (8, 32), "ffn.fc2.bias": (8,),
        "ada_lin.1.weight": (72, 6), "ada_lin.1.bias": (72,), "mamba.in_proj.weight": (161, 8),
        "mamba.conv1d.weight": (144, 1, 4), "mamba.conv1d.bias": (144,), "mamba.dt_bias": (1,), "mamba.A_log": (1,),
        "mamba.D": (1,), "mamba.norm.weight": (16,), "mamba.out_proj.weight": (8, 16),
    }  # fmt: skip
    check_loads(module, shapes)
    module.load_state_dict({**module.state_dict(), "attn.patch_nums": torch.tensor([1, 4])})


def test_begins_close_to_the_identity_and_wrong_use():
    module, x = MVARBlock(8, 2, headdim=8).double(), normal(2, 7, 8)
    assert 0 < error(module(x, normal(2, 8), MASK), x) < 1e-3
    assert module(normal(0, 7, 8), normal(0, 8)).shape == (0, 7, 8)
    with pytest.raises(ValueError, match=r"nn.MVARBlock: x must have shape \(\*, \*, 8\), got \(1, 3, 5\)"):
        module(normal(1, 3, 5), normal(1, 8))
    with pytest.raises(ValueError, match=r"nn.MVARBlock: cond must have shape \(2, 8\) or \(1, 8\), got \(2, 7\)"):
        module(normal(2, 3, 8), normal(2, 7))
