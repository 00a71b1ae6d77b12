"""attn_implementation="scalekern": logits, gradients and greedy tokens of "eager", and masks that are small objects."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import masking_utils  # noqa: E402

from scalekern import masks  # noqa: E402
from scalekern.integrations import _hf_masks, attention  # noqa: E402
from scalekern.integrations.transformers import register  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
register()



@pytest.fixture(scope="module", autouse=True)
def one_thread():  # models this small lose by a second one, most of all on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = dict(vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
SMALL |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False)
SMALL |= dict(max_position_embeddings=64)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5)
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)
CHUNKS = dict(layer_types=["chunked_attention", "full_attention"], attention_chunk_size=5, no_rope_layers=[1, 1], moe_layers=[])
FAMILIES = {
    "llama": ("Llama", {}, {}),
    "mistral": ("Mistral", dict(sliding_window=5), dict(sliding_window=None)),
    "gemma2": ("Gemma2", LAYERS | dict(attn_logit_softcapping=1.0, query_pre_attn_scalar=4), dict(attn_logit_softcapping=None)),
    "gemma3": ("Gemma3", LAYERS | dict(query_pre_attn_scalar=4), dict(sliding_window=50)),
    "gpt_oss": ("GptOss", LAYERS | EXPERTS, dict(sliding_window=50)),
    "llama4": ("Llama4", CHUNKS | dict(intermediate_size_mlp=64), dict(attention_chunk_size=50)),
}  # name: class, what its config adds, what a dropped term would amount to


def build(family, implementation, **changes):
    name, options, _ = FAMILIES[family]
    text = "Text" if name in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SMALL, **copy.deepcopy(options), **changes})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # initial weights are so small that attention would hardly count
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pair(family):
    return build(family, "eager"), build(family, "scalekern")


LENGTH = 13


def inputs(how):
    """(arguments of the model, which tokens count)"""
    torch.manual_seed(1)
    ids, mask = torch.randint(2, 40, (2, LENGTH)), torch.ones(2, LENGTH, dtype=torch.int64)
    if how == "packed":
        lengths = [[6, 1, 6], [9, 2, 2]]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        return dict(input_ids=ids, position_ids=positions, use_cache=False), mask.bool()
    if how == "left":
        mask[0, :7], mask[1, :1] = 0, 0
    elif how == "right":
        mask[0, 6:], mask[1, 12:] = 0, 0
    elif how == "between":
        mask[0, 3:5], mask[1, 0] = 0, 0
    return dict(input_ids=ids, use_cache=False, **({} if how == "none" else dict(attention_mask=mask))), mask.bool()


def run(model, how):
    arguments, counts = inputs(how)
    model.zero_grad()
    logits = model(**arguments).logits[counts]
    torch.manual_seed(2)
    (logits * torch.randn_like(logits)).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(got, expected):
    return float((got - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("how", ["none", "left", "right", "between", "packed"])
def test_logits_and_gradients(pair, how):
    (expected, expected_grads), (got, grads) = (run(model, how) for model in pair)
    assert error(got, expected) < 1e-5
    assert grads.keys() == expected_grads.keys()
    whole = torch.cat([g.flatten() for g in expected_grads.values()])
    assert error(torch.cat([grads[n].flatten() for n in expected_grads]), whole) < 1e-5
    for name, g in expected_grads.items():
        assert error(grads[name], g) < 1e-4 or g.norm() < 1e-6 * whole.norm(), name


def test_a_dropped_term_is_noticed(family, pair):
    changes = FAMILIES[family][2]
    expected, _ = run(pair[0], "none")
    if changes:
        assert error(run(build(family, "scalekern", **changes), "none")[0], expected) > 1e-2
    if family == "gpt_oss":
        other = copy.deepcopy(pair[1])
        for layer in other.model.layers:
            layer.self_attn.sinks.data.fill_(-30)
        assert error(run(other, "none")[0], expected) > 1e-2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens(pair, cache):
    arguments, _ = inputs("left")
    del arguments["use_cache"]
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation=cache, return_dict_in_generate=True, output_logits=True)
    expected, got = (model.generate(**arguments, **options) for model in pair)
    assert torch.equal(got.sequences, expected.sequences)
    assert error(torch.stack(got.logits), torch.stack(expected.logits)) < 1e-5
