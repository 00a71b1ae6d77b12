"""nn.VARBlock against the paper's equations in plain torch, sharing no code with the package."""

import math

import pytest
import torch
from nn_modules import (
    attend, bound, by_heads, check_against, check_compiled, check_each_matters, check_loads, error, from_heads,
    layer_norm, linear, normal, perturbed, sigmoid, tensors,
)  # fmt: skip

from scalekern import masks
from scalekern.nn import VARBlock
from scalekern.nn.var import doubling_ends, scale_ends

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, HEADS, SCALES = 8, 2, [0, 1, 1, 1, 1, 2, 2]  # of each token; a last scale of 1 x 2
ENDS = [1, 5, 7]


def paper(p, x, cond):
    """Tian et al. 2024, section 3.2 and appendix: adaptive layer norms around attention that is causal in scales."""
    if "ada_gss" in p:
        six = (p["ada_gss"] + cond)[:, 0]
    else:
        six = linear(p, "ada_lin.1", cond * sigmoid(cond)).unflatten(-1, (6, WIDTH))
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (six[:, i, None] for i in range(6))
    y = layer_norm(x, eps=1e-6) * (1 + scale1) + shift1
    q, k, v = (by_heads(y @ w.T, HEADS) for w in p["attn.mat_qkv.weight"].chunk(3))
    q, v = (t + by_heads(p[f"attn.{n}_bias"][None, None], HEADS) for t, n in ((q, "q"), (v, "v")))
    if "attn.scale_mul_1H11" in p:
        q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
        q, scale = q * p["attn.scale_mul_1H11"].clamp(max=math.log(100)).exp(), 1.0
    else:
        scale = 1 / (4 * math.sqrt(WIDTH / HEADS))
    y = attend(q, k, v, lambda b, h, i, j: SCALES[j] <= SCALES[i], scale)
    x = x + gamma1 * linear(p, "attn.proj", from_heads(y))
    y = linear(p, "ffn.fc1", layer_norm(x, eps=1e-6) * (1 + scale2) + shift2)
    y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + gamma2 * linear(p, "ffn.fc2", y)


def apart(x, shared):
    """The condition's part of a tensor that holds it first, and the tokens."""
    return (x[:, None, :6], x[:, 6:]) if shared else (x[:, 0], x[:, 1:])


def build(**options):
    torch.manual_seed(0)
    return perturbed(VARBlock(WIDTH, HEADS, **{"mlp_ratio": 1.5, **options}))


@pytest.mark.parametrize("options", [{}, {"shared_aln": True}, {"attn_l2_norm": False}], ids=str)
def test_output_and_gradients_match_the_paper(options):
    module, shared = build(**options), "shared_aln" in options
    if module.attn.attn_l2_norm:
        with torch.no_grad():
            module.attn.scale_mul_1H11[0, 1] = math.log(200)  # clamped: its gradient is zero
    names = ["attn.q_bias", "attn.v_bias", "attn.proj.bias", "ffn.fc1.bias"]
    names += ["ada_gss"] if shared else ["ada_lin.1.weight", "ada_lin.1.bias"]
    names += ["attn.scale_mul_1H11"] if module.attn.attn_l2_norm else []
    x, mask = normal(2, 7 + (6 if shared else 1), WIDTH), masks.blocks(ENDS)

    def call(forward, x):
        cond, tokens = apart(x, shared)
        return forward(tokens, cond, mask)

    def rendering(p, x):
        cond, tokens = apart(x, shared)
        return paper(p, tokens, cond)

    check_against(rendering, bound(module, call), x)
    check_each_matters(rendering, module, x, names)


@pytest.mark.parametrize("cuts", [[1, 5, 7], [5, 7], [1, 7]], ids=str)
def test_scale_by_scale_is_the_training_pass(cuts):
    module, x, cond, mask = build(), normal(2, 7, WIDTH).requires_grad_(), normal(2, WIDTH), masks.blocks(ENDS)
    cache, outs, begin = module.new_cache(), [], 0
    for end in cuts:
        several = ENDS.index(end) - (ENDS.index(begin) if begin else -1) > 1
        outs.append(module(x[:, begin:end], cond, mask.shift(begin, 0) if several else None, cache=cache))
        begin = end
        assert len(cache) == end
    outs = torch.cat(outs, 1), module(x, cond, mask)
    assert error(outs[0], paper(tensors(module), x, cond)) < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs]
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-10
    module = module.float()  # the bound that the paper's users see
    x, cond, cache = x.detach().float(), cond.float(), module.new_cache()
    parts = [module(part, cond, cache=cache) for part in x.split([1, 4, 2], 1)]
    assert error(torch.cat(parts, 1), module(x, cond, mask)) < 1e-5


def test_no_scale_reads_a_later_one():
    module, x, cond = build(), normal(1, 7, WIDTH), normal(1, WIDTH)
    poisoned = torch.cat([x[:, :5], torch.full_like(x[:, 5:], torch.nan)], 1)
    out = module(poisoned, cond, masks.blocks(ENDS))
    assert error(out[:, :5], module(x, cond, masks.blocks(ENDS))[:, :5]) < 1e-12 and out[:, 5:].isnan().all()


def test_ends_of_scales():
    assert scale_ends([1, 2, (3, 4)]) == [1, 5, 17]
    assert scale_ends([1, 2, 3, 4, 5, 6, 8, 10, 13, 16])[-1] == 680  # VAR's, of 256 x 256 images
    assert doubling_ends(16) == [1, 5, 21, 85, 341]
    assert doubling_ends(12) == [9, 45, 189] and doubling_ends(8, 2) == [16, 80]
    with pytest.raises(ValueError, match="scales must be from 1 to 3 for side 12, got 4"):
        doubling_ends(12, 4)


STATE_DICT = {  # of upstream's AdaLNSelfAttn(embed_dim=8, cond_dim=6, num_heads=2, attn_l2_norm=True)
    "attn.scale_mul_1H11": (1, 2, 1, 1),
    "attn.q_bias": (8,),
    "attn.v_bias": (8,),
    "attn.zero_k_bias": (8,),
    "attn.mat_qkv.weight": (24, 8),
    "attn.proj.weight": (8, 8),
    "attn.proj.bias": (8,),
    "ffn.fc1.weight": (32, 8),
    "ffn.fc1.bias": (32,),
    "ffn.fc2.weight": (8, 32),
    "ffn.fc2.bias": (8,),
    "ada_lin.1.weight": (48, 6),
    "ada_lin.1.bias": (48,),
}


def test_upstreams_checkpoints_load():
    check_loads(VARBlock(8, 2, cond_dim=6), STATE_DICT)
    shared = {n: s for n, s in STATE_DICT.items() if "ada_lin" not in n} | {"ada_gss": (1, 1, 6, 8)}
    check_loads(VARBlock(8, 2, shared_aln=True), shared)


def test_a_block_begins_close_to_the_identity():
    for options in ({}, {"shared_aln": True}):
        module, x = VARBlock(WIDTH, HEADS, **options).double(), normal(2, 7, WIDTH)
        cond = torch.zeros(2, 1, 6, WIDTH).double() if options else normal(2, WIDTH)
        assert 0 < error(module(x, cond), x) < 1e-3


def test_drop_path_leaves_out_rows_of_the_batch():
    torch.manual_seed(0)
    module, x, cond = build(drop_path=0.5), normal(1, 1, WIDTH), normal(1, WIDTH)
    module.attn.forward = lambda x, *rest: torch.zeros_like(x)  # one branch is left
    whole = module.eval()(x, cond) - x
    got = module.train()(x.expand(99, -1, -1), cond) - x
    kept = got.abs().sum((1, 2)) > 0
    assert 30 < kept.sum() < 70 and error(got[kept], (2 * whole).expand(99, -1, -1)[kept]) < 1e-12


def test_low_precision():
    """Five products, each rounding to 8 bits, and the queries and keys at their lengths."""
    module, x, cond = build(), normal(2, 7, WIDTH), normal(2, WIDTH)
    expected, module = paper(tensors(module), x, cond), module.float()
    mask = masks.blocks(ENDS)
    assert error(module(x.float(), cond.float(), mask), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(x.float(), cond.float(), mask), expected) < 3e-2
    assert error(module.bfloat16()(x.bfloat16(), cond.bfloat16(), mask), expected) < 3e-2


def test_compile_fullgraph():
    cond, mask = normal(2, WIDTH), masks.blocks(ENDS)
    check_compiled(bound(build(), lambda forward, x: forward(x, cond, mask)), normal(2, 7, WIDTH), "eager")


def test_empty_batch_and_wrong_use():
    module = build()
    assert module(normal(0, 7, WIDTH), normal(0, WIDTH)).shape == (0, 7, WIDTH)
    with pytest.raises(ValueError, match=r"nn.VARBlock: x must have shape \(\*, \*, 8\), got \(1, 3, 5\)"):
        module(normal(1, 3, 5), normal(1, WIDTH))
    with pytest.raises(TypeError, match="mask must be a scalekern.masks.Mask, got list"):
        module(normal(1, 7, WIDTH), normal(1, WIDTH), ENDS)
    with pytest.raises(ValueError, match="nn.VARBlock: num_heads must divide the width 8, got 3"):
        VARBlock(8, 3)


def test_a_condition_that_does_not_fit_is_named():
    x = torch.randn(2, 5, 12)
    for shared, cond in ((False, torch.randn(2, 7)), (True, torch.randn(2, 12)), (False, torch.randn(3, 8))):
        with pytest.raises(ValueError, match="nn.VARBlock: cond must have"):
            VARBlock(12, 3, cond_dim=8, shared_aln=shared)(x, cond)
