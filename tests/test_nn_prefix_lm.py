"""nn.PrefixLMAttention against the paper's equations in plain torch and, if installed, transformers' CodeGen."""

import math

import pytest
import torch
import torch.nn.functional as F
from nn_modules import (
    attend, bound, by_heads, check_against, check_compiled, check_loads, error, from_heads, normal, perturbed, tensors,
)  # fmt: skip

from scalekern.nn import PrefixLMAttention
from scalekern.nn.prefix_lm import prefix_lm_mask

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, HEADS, P, ROTARY, LENGTH = 24, 4, 6, 4, 7
PREFIX = [3, 0]


def turned(t):
    """RoPE on pairs of neighbouring channels, the first ROTARY of them."""
    out = t.clone()
    for n in range(t.shape[2]):
        for c in range(0, ROTARY, 2):
            angle = n * 10000 ** (-c / ROTARY)
            out[:, :, n, c] = math.cos(angle) * t[:, :, n, c] - math.sin(angle) * t[:, :, n, c + 1]
            out[:, :, n, c + 1] = math.sin(angle) * t[:, :, n, c] + math.cos(angle) * t[:, :, n, c + 1]
    return out


def paper(p, x, prefix=PREFIX, shards=2):
    """Nijkamp et al. 2023, section 3.1: j is seen by i if it comes no later, or if it belongs to the prefix."""
    parts = [x @ w.T for w in p["qkv_proj.weight"].chunk(3 * shards)]  # q, v, k of the first shard, then of the next
    q, v, k = (by_heads(torch.cat(parts[i::3], -1), HEADS) for i in range(3))
    y = attend(turned(q), turned(k), v, lambda b, h, i, j: j <= i or j < prefix[b])
    return from_heads(y) @ p["out_proj.weight"].T


def build(**options):
    torch.manual_seed(0)
    return perturbed(PrefixLMAttention(WIDTH, HEADS, **{"rotary_dim": ROTARY, "mp_num": 2, **options}))


@pytest.mark.parametrize("prefix", [PREFIX, [7, 1], None], ids=str)
def test_output_and_gradients_match_the_paper(prefix):
    mask = None if prefix is None else prefix_lm_mask(torch.tensor(prefix))
    module = bound(build(), lambda forward, x: forward(x, mask))
    x = normal(2, LENGTH, WIDTH)
    check_against(lambda p, x: paper(p, x, prefix or [0, 0]), module, x)
    for changed in ([2, 0], [3, 2], [0, 3]):
        assert error(module(x), paper(tensors(module), x, changed)) > 1e-4


@pytest.mark.parametrize("cuts", [[3, 4, 5, 6, 7], [3, 7], [4, 5, 7]], ids=str)
def test_prefill_and_steps_equal_one_call(cuts):
    module, x = build(), normal(2, LENGTH, WIDTH).requires_grad_()
    cache, outs, begin = module.new_cache(), [], 0
    for end in cuts:
        outs.append(module(x[:, begin:end], None if begin else prefix_lm_mask(PREFIX), cache=cache))
        begin = end
    outs = torch.cat(outs, 1), paper(tensors(module), x)
    assert error(*outs) < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs]
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-10


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_equal_rows_alone(left):
    module, sizes = build(), (9, 4, 1)
    rows = [normal(1, n, WIDTH, seed=n) for n in sizes]
    pad = lambda row: F.pad(row, (0, 0, *((9 - row.shape[1], 0) if left else (0, 9 - row.shape[1]))), value=3.0)
    x = torch.cat([pad(row) for row in rows]).requires_grad_()
    keep = torch.cat([pad(torch.zeros_like(row))[..., 0] == 0 for row in rows])
    out = module(x, prefix_lm_mask([5, 2, 1], keep=keep.long()))
    for b, (row, prefix) in enumerate(zip(rows, [5, 2, 1])):
        assert error(out[b, keep[b]], paper(tensors(module), row, [prefix])[0]) < 1e-12
    assert (out[~keep] == 0).all()
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert (grad[~keep] == 0).all() and (grad[keep] != 0).any(-1).all()


def test_decoding_after_left_padding():
    module, x = build(), normal(2, LENGTH, WIDTH)
    keep = torch.ones(2, LENGTH)
    keep[1, :2] = 0
    cache = module.new_cache()
    outs = [module(x[:, :5], prefix_lm_mask([3, 2], keep=keep[:, :5]), cache=cache)]
    for n in (5, 6):
        mask = prefix_lm_mask([3, 2], keep=keep[:, : n + 1], past=n)
        outs.append(module(x[:, n : n + 1], mask, cache=cache))
    out = torch.cat(outs, 1)
    assert error(out[:1], paper(tensors(module), x[:1], [3])) < 1e-12
    assert error(out[1:, 2:], paper(tensors(module), x[1:, 2:], [2])) < 1e-12
    with pytest.raises(ValueError, match="keep must be one run of tokens in each row"):
        prefix_lm_mask(1, keep=torch.tensor([[1, 0, 1]]))


def test_transformers_codegen():
    """Its attention under an additive mask; transformers has CodeGen's four shards."""
    codegen = pytest.importorskip("transformers.models.codegen.modeling_codegen")
    from transformers import CodeGenConfig

    config = CodeGenConfig(n_embd=WIDTH, n_head=HEADS, rotary_dim=ROTARY, n_positions=16, attn_pdrop=0, resid_pdrop=0)
    theirs, module = codegen.CodeGenAttention(config, layer_idx=0).float(), build(mp_num=4)
    module = module.float()
    module.load_state_dict(theirs.state_dict(), strict=True)
    x, at = normal(2, LENGTH, WIDTH).float(), torch.arange(LENGTH)
    seen = (at <= at[:, None]) | (at < torch.tensor(PREFIX)[:, None, None])
    additive = torch.where(seen, 0, torch.finfo(torch.float32).min)[:, None]
    expected = theirs(x, attention_mask=additive, position_ids=at[None])[0]
    assert error(module(x, prefix_lm_mask(PREFIX)), expected) < 1e-5


def test_upstreams_checkpoints_load():
    check_loads(PrefixLMAttention(24, 4, mp_num=2), {"qkv_proj.weight": (72, 24), "out_proj.weight": (24, 24)})
    assert error(build()(normal(1, 5, WIDTH)), build(mp_num=1)(normal(1, 5, WIDTH))) > 1e-2  # the layout matters


def test_low_precision():
    """Three products, each rounding to 8 bits, and a rotation."""
    module, x, mask = build(), normal(2, LENGTH, WIDTH), prefix_lm_mask(PREFIX)
    expected, module = paper(tensors(module), x), module.float()
    assert error(module(x.float(), mask), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(x.float(), mask), expected) < 3e-2
    assert error(module.bfloat16()(x.bfloat16(), mask), expected) < 3e-2


def test_compile_fullgraph():
    mask = prefix_lm_mask(PREFIX)
    check_compiled(bound(build(), lambda forward, x: forward(x, mask)), normal(2, LENGTH, WIDTH), "eager")


def test_empty_batch_and_wrong_use():
    assert build()(normal(0, 3, WIDTH)).shape == (0, 3, WIDTH)
    with pytest.raises(ValueError, match=r"nn.PrefixLMAttention: x must have shape \(\*, \*, 24\), got \(1, 3, 5\)"):
        build()(normal(1, 3, 5))
    with pytest.raises(ValueError, match="mp_num must divide the width 4, got 8"):
        PrefixLMAttention(24, 4)
    with pytest.raises(ValueError, match="rotary_dim must be even and at most 6, got 8"):
        build(rotary_dim=8)


def test_rows_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="prefix_lm_mask: keep must have shape"):
        prefix_lm_mask([2, 3], keep=torch.ones(3, 4))
    with pytest.raises(ValueError, match="prefix_lm_mask: keep must have 2 dimensions"):
        prefix_lm_mask(2, keep=torch.ones(4))
