"""nn.NBPBlock against the paper's equations in plain torch, sharing no code with the package."""

import pytest
import torch
from nn_modules import (
    attend, bound, by_heads, check_against, check_compiled, check_each_matters, check_loads, error, from_heads,
    layer_norm, linear, normal, perturbed, tensors,
)  # fmt: skip

from scalekern import masks
from scalekern.nn import NBPBlock
from scalekern.nn.nbp import block_ends

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, HEADS, CONDITION, BLOCK = 6, 2, 2, 3  # two tokens of a condition, then two rows of three tokens
LENGTH = CONDITION + 2 * BLOCK


def paper(p, x):
    """Ren et al. 2025, section 3: a token sees the tokens whose block is its own or an earlier one."""
    block = [0] * CONDITION + [1] * BLOCK + [2] * BLOCK
    y = layer_norm(x, p["ln1.weight"], p["ln1.bias"])
    q, k, v = (by_heads(linear(p, f"attn.{name}", y), HEADS) for name in ("query", "key", "value"))
    x = x + linear(p, "attn.proj", from_heads(attend(q, k, v, lambda b, h, i, j: block[j] <= block[i])))
    y = linear(p, "mlp.0", layer_norm(x, p["ln2.weight"], p["ln2.bias"]))
    return x + linear(p, "mlp.2", y * (1 + torch.erf(y / 2**0.5)) / 2)


def build():
    torch.manual_seed(0)
    return perturbed(NBPBlock(WIDTH, HEADS))


def mask():
    return masks.blocks(block_ends(LENGTH, BLOCK, CONDITION))


def test_output_and_gradients_match_the_paper():
    module = bound(build(), lambda forward, x: forward(x, mask()))
    check_against(paper, module, normal(2, LENGTH, WIDTH))
    names = [f"{name}.{part}" for name in ("attn.query", "attn.value", "attn.proj", "mlp.0", "mlp.2", "ln1", "ln2")
             for part in ("weight", "bias")]  # fmt: skip
    check_each_matters(paper, module, normal(2, LENGTH, WIDTH), [*names, "attn.key.weight"])


@pytest.mark.parametrize("cuts", [[2, 5, 8], [5, 8], [2, 8]], ids=str)
def test_block_by_block_is_the_training_pass(cuts):
    module, x, ends = build(), normal(2, LENGTH, WIDTH).requires_grad_(), block_ends(LENGTH, BLOCK, CONDITION)
    cache, outs, begin = module.new_cache(), [], 0
    for end in cuts:
        one = end == min(e for e in ends if e > begin)
        outs.append(module(x[:, begin:end], None if one else mask().shift(begin, 0), cache=cache))
        begin = end
    outs = torch.cat(outs, 1), module(x, mask())
    assert error(outs[0], paper(tensors(module), x)) < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs]
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-10 or max(got.norm(), exact.norm()) < 1e-10


def test_what_a_token_reads():
    """Its own block on both sides, none of the next."""
    x = normal(1, LENGTH, WIDTH).requires_grad_()
    (grad,) = torch.autograd.grad(build()(x, mask())[0, CONDITION].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).tolist() == [True] * 5 + [False] * 3


def test_ends_of_blocks():
    assert block_ends(6, 2) == [2, 4, 6] and block_ends(7, 3, 1) == [1, 4, 7] and block_ends(2, 3, 2) == [2]
    for length, condition in ((7, 0), (2, 5)):
        with pytest.raises(ValueError, match=f"block must divide the {length} - {condition} tokens, got 3"):
            block_ends(length, 3, condition)


STATE_DICT = {  # of upstream's Block, n_embd 6
    "ln1.weight": (6,),
    "ln1.bias": (6,),
    "ln2.weight": (6,),
    "ln2.bias": (6,),
    **{f"attn.{n}.weight": (6, 6) for n in ("key", "query", "value", "proj")},
    **{f"attn.{n}.bias": (6,) for n in ("key", "query", "value", "proj")},
    "mlp.0.weight": (24, 6),
    "mlp.0.bias": (24,),
    "mlp.2.weight": (6, 24),
    "mlp.2.bias": (6,),
}


def test_upstreams_checkpoints_load():
    check_loads(NBPBlock(6, 2), STATE_DICT)


def test_low_precision():
    """Six products and two norms, each rounding to 8 bits."""
    module, x = build(), normal(2, LENGTH, WIDTH)
    expected, module = paper(tensors(module), x), module.float()
    assert error(module(x.float(), mask()), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(x.float(), mask()), expected) < 3e-2
    assert error(module.bfloat16()(x.bfloat16(), mask()), expected) < 3e-2


def test_compile_fullgraph():
    rule = mask()
    check_compiled(bound(build(), lambda forward, x: forward(x, rule)), normal(2, LENGTH, WIDTH), "eager")


def test_empty_batch_and_wrong_use():
    assert build()(normal(0, LENGTH, WIDTH), mask()).shape == (0, LENGTH, WIDTH)
    with pytest.raises(ValueError, match=r"nn.NBPBlock: x must have shape \(\*, \*, 6\), got \(1, 3, 5\)"):
        build()(normal(1, 3, 5))
    with pytest.raises(ValueError, match="nn.NBPBlock: n_head must divide the width 6, got 4"):
        NBPBlock(6, 4)
