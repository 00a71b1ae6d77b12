"""nn.MoAAttention against the paper's equations in plain torch, sharing no code with the package."""

import math

import pytest
import torch
from nn_modules import (
    attend, by_heads, check_against, check_compiled, check_each_matters, check_loads, error, from_heads, linear, normal,
    perturbed, tensors,
)  # fmt: skip

from scalekern import masks
from scalekern.nn import MoAAttention

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, P, SINK, LENGTH = 12, 4, 2, 11
ALPHA, BETA = (4, 1, -3, 20), (0.0, 0.4, 0.6, 0.0)  # at 11: spans of 4, 5, 3 and 11, the last two held to their bounds
SPANS = [4, 5, 3, 11]


def turned(t, theta):
    """RoPE on channels c and P / 2 + c."""
    halves = t[..., : P // 2], t[..., P // 2 :]
    outs = [torch.zeros_like(half) for half in halves]
    for n in range(t.shape[2]):
        for c in range(P // 2):
            cos, sin = math.cos(n * theta ** (-2 * c / P)), math.sin(n * theta ** (-2 * c / P))
            outs[0][:, :, n, c] = cos * halves[0][:, :, n, c] - sin * halves[1][:, :, n, c]
            outs[1][:, :, n, c] = sin * halves[0][:, :, n, c] + cos * halves[1][:, :, n, c]
    return torch.cat(outs, -1)


def paper(p, x, spans=SPANS, sink=SINK, theta=500.0, also=lambda i, j: True):
    """Fu et al. 2024, section 3.1: head h sees the first tokens, and so many of the last that its span is full."""
    heads = len(spans)
    groups = p["k_proj.weight"].shape[0] // P
    q, k, v = (by_heads(linear(p, f"{n}_proj", x), m) for n, m in (("q", heads), ("k", groups), ("v", groups)))
    seen = lambda b, h, i, j: j <= i and (j < sink or i - j < spans[h] - sink) and also(i, j)
    y = attend(turned(q, theta), turned(k, theta), v, seen)
    return linear(p, "o_proj", from_heads(y))


def build(alpha=ALPHA, beta=BETA, **options):
    torch.manual_seed(0)
    options = {"num_key_value_heads": 2, "head_dim": P, "sink": SINK, "rope_theta": 500.0, **options}
    return perturbed(MoAAttention(WIDTH, len(alpha), alpha, beta, **options))


def test_spans_follow_their_rules():
    module = build()
    assert module.spans(LENGTH) == SPANS
    assert module.spans(100) == [4, 41, 57, 20] and module.spans(1) == [3, 3, 3, 3]
    dense = module.mask(LENGTH).to_dense(LENGTH, LENGTH)[0]
    assert dense[:, -1].sum(-1).tolist() == SPANS  # the budget of each head, sinks among them
    assert module.mask(LENGTH) is module.mask(LENGTH)


@pytest.mark.parametrize("groups, length", [(2, LENGTH), (4, 6), (1, 1)])
def test_output_and_gradients_match_the_paper(groups, length):
    module = build(num_key_value_heads=groups)
    rendering = lambda p, x: paper(p, x, module.spans(length))
    check_against(rendering, module, normal(2, length, WIDTH))
    check_each_matters(rendering, module, normal(2, length, WIDTH), ["v_proj.weight", "o_proj.weight"])
    if length == LENGTH:
        check_each_matters(rendering, module, normal(2, length, WIDTH), ["q_proj.weight", "k_proj.weight"])
        out = module(normal(2, length, WIDTH))
        for h in range(4):
            wrong = [span + (n == h) * (-1 if span == LENGTH else 1) for n, span in enumerate(SPANS)]
            assert error(out, paper(tensors(module), normal(2, length, WIDTH), wrong)) > 1e-4, h


def test_another_length_and_packed_sequences():
    module, x = build(sink=0), normal(2, 9, WIDTH)
    ids = [0] * 5 + [1] * 4
    out = module(x, length=5, mask=masks.segments(ids))
    assert module.spans(5) == [4, 3, 1, 5]
    assert error(out, paper(tensors(module), x, [4, 3, 1, 5], sink=0, also=lambda i, j: ids[i] == ids[j])) < 1e-12


@pytest.mark.parametrize("prompt, sink", [(0, 2), (1, 2), (3, 2), (9, 2), (6, 0)])
def test_prefill_and_steps_equal_one_call(prompt, sink):
    """Past the point where every ring has come round, with spans that differ within a group of query heads."""
    module, x = build(sink=sink), normal(2, LENGTH, WIDTH)
    spans = module.spans(LENGTH)
    cache = module.allocate_inference_cache(2, LENGTH)
    slots = [max(spans[:2]), max(spans[2:])]
    assert cache.slots == slots and cache.k.shape == cache.v.shape == (2, sum(slots), P)
    pointers = cache.k.data_ptr(), cache.v.data_ptr()
    with torch.no_grad():
        outs = [module(x[:, :prompt], cache=cache)] if prompt else []
        outs += [module(x[:, n : n + 1], cache=cache) for n in range(prompt, LENGTH - 2)]
        outs.append(module(x[:, LENGTH - 2 :], cache=cache))  # two tokens, one by one
    assert error(torch.cat(outs, 1), paper(tensors(module), x, spans, sink)) < 1e-12
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == pointers and cache.position == LENGTH


def test_decoding_beyond_the_length_keeps_the_spans():
    module, x = build(), normal(1, 17, WIDTH)
    cache = module.allocate_inference_cache(1, LENGTH)
    with torch.no_grad():
        outs = [module(part, cache=cache) for part in x.split([12, 1, 1, 1, 1, 1], 1)]
    assert error(torch.cat(outs, 1), paper(tensors(module), x)) < 1e-12
    assert error(module(x, length=LENGTH), paper(tensors(module), x)) < 1e-12


def test_what_a_head_may_not_see_reaches_nothing():
    module, x = build(), normal(1, LENGTH, WIDTH)
    poisoned = x.clone()
    poisoned[:, 8:] = torch.nan
    assert error(module(poisoned)[:, :8], module(x)[:, :8]) < 1e-12
    narrow = build((4,) * 4, (0,) * 4)
    poisoned[:, 8:] = x[:, 8:]
    poisoned[:, 3:8] = torch.nan  # from 9 on the windows begin at 8
    assert error(narrow(poisoned)[:, 9:], narrow(x)[:, 9:]) < 1e-12


def test_llamas_checkpoints_load():
    shapes = {"q_proj.weight": (16, 12), "k_proj.weight": (8, 12), "v_proj.weight": (8, 12), "o_proj.weight": (12, 16)}
    check_loads(MoAAttention(12, 4, ALPHA, BETA, num_key_value_heads=2, head_dim=4), shapes)


def test_transformers_llama():
    """With spans as long as the sequence it is Llama's attention."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=32, rope_theta=500.0,
        attn_implementation="eager",
    )  # fmt: skip
    theirs, module = llama.LlamaAttention(config, 0), MoAAttention(WIDTH, 3, (LENGTH,) * 3, (0,) * 3, 1, sink=SINK,
                                                                   rope_theta=500.0)  # fmt: skip
    module.load_state_dict(theirs.state_dict(), strict=True)
    x, at = normal(2, LENGTH, WIDTH).float(), torch.arange(LENGTH)
    turn = llama.LlamaRotaryEmbedding(config)(x, at[None])
    causal = torch.where(at <= at[:, None], 0.0, -torch.inf)[None, None]
    assert error(module(x), theirs(x, position_embeddings=turn, attention_mask=causal)[0]) < 1e-5


def test_low_precision():
    """Four products and two rotations, each rounding to 8 bits; decoding rounds as often."""
    module, x = build(), normal(2, LENGTH, WIDTH)
    expected, module = paper(tensors(module), x), module.float()
    assert error(module(x.float()), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(x.float()), expected) < 3e-2
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cache = module.allocate_inference_cache(2, LENGTH, torch.bfloat16)
        outs = [module(part.float(), cache=cache) for part in x.split([8, 3], 1)]
        assert error(torch.cat(outs, 1), expected) < 3e-2
    assert error(module.bfloat16()(x.bfloat16()), expected) < 3e-2


def test_compile_fullgraph():
    module = build()
    module.mask(LENGTH)  # a mask is no part of a graph: it is made before
    check_compiled(module, normal(2, LENGTH, WIDTH), "eager")


def test_empty_batch_and_wrong_use():
    module = build()
    assert module(normal(0, 5, WIDTH)).shape == (0, 5, WIDTH)
    with pytest.raises(ValueError, match=r"nn.MoAAttention: x must have shape \(\*, \*, 12\), got \(1, 3, 5\)"):
        module(normal(1, 3, 5))
    with pytest.raises(ValueError, match=r"x must have shape \(1, \*, 12\), got \(2, 3, 12\)"):
        module(normal(2, 3, WIDTH), cache=module.allocate_inference_cache(1, 5))
    with pytest.raises(ValueError, match="a cache goes with no mask and no length but its own"):
        module(normal(1, 3, WIDTH), length=5, cache=module.allocate_inference_cache(1, 5))
    with pytest.raises(ValueError, match="beta must have 4 numbers, one a head, got 1"):
        build(beta=(1,))
    with pytest.raises(ValueError, match="num_key_value_heads must divide the width 4, got 3"):
        build(num_key_value_heads=3)
