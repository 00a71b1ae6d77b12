"""attn_implementation="scalekern": logits, gradients and greedy tokens of "eager", and masks that are small objects."""

import copy

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

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


SMALL = dict(vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(head_dim=16, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
SMALL |= dict(tie_word_embeddings=False)
SMALL |= dict(max_position_embeddings=64)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5)
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)
CHUNKS = dict(layer_types=["chunked_attention", "full_attention"], attention_chunk_size=5)
CHUNKS |= dict(no_rope_layers=[1, 1], moe_layers=[])
CAPPED = LAYERS | dict(attn_logit_softcapping=1.0, query_pre_attn_scalar=4)
FAMILIES = {
    "llama": ("Llama", {}, {}),
    "mistral": ("Mistral", dict(sliding_window=5), dict(sliding_window=None)),
    "gemma2": ("Gemma2", CAPPED, dict(attn_logit_softcapping=None)),
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
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation=cache)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    expected, got = (model.generate(**arguments, **options) for model in pair)
    assert torch.equal(got.sequences, expected.sequences)
    assert error(torch.stack(got.logits), torch.stack(expected.logits)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_one_token_goes_to_the_decoding_kernel(name, monkeypatch):
    """In every layer of every step after the prompt's, behind padding too; and not where a gradient is wanted."""
    calls, decode = [], attention.sparse_attention_decode
    counted = lambda *a, **k: calls.append(k["starts"]) or decode(*a, **k)
    monkeypatch.setattr(attention, "sparse_attention_decode", counted)
    model = build(name, "scalekern")
    model.generate(input_ids=torch.full((2, 9), 3), max_new_tokens=4, do_sample=False)
    assert len(calls) == 3 * 2
    arguments, _ = inputs("left")
    prompt = {name: arguments[name] for name in ("input_ids", "attention_mask")}
    model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert len(calls) == 2 * 3 * 2 and calls[-1] is not None and calls[-1].tolist() != [0, 0]
    model(input_ids=torch.full((2, 1), 3), use_cache=False).logits.sum().backward()
    assert len(calls) == 2 * 3 * 2


# ---- the mask interface alone ----

IDS = torch.tensor([[-1, 0, 0, 0, 1, 1, -1, 2, 2, 2, -1, -1], [0, 0, -1, -1, 1, 1, 1, 1, 1, 2, 2, -1]])
PATTERNS = {
    "causal": lambda m: m.causal_mask_function,
    "bidirectional": lambda m: m.bidirectional_mask_function,
    "sliding": lambda m: m.sliding_window_causal_mask_function(4),
    "sliding both ways": lambda m: m.sliding_window_bidirectional_mask_function(3),
    "chunks": lambda m: m.chunked_causal_mask_function(4, torch.tensor([0, 0])),
    "chunks after padding": lambda m: m.chunked_causal_mask_function(4, torch.tensor([3, 1])),
    "blocks": lambda m: m.or_masks(m.sliding_window_causal_mask_function(3), m.blockwise_overlay(IDS)),
    "a user's": lambda m: m.or_masks(m.causal_mask_function, lambda b, h, q, k: (q + 2 * k + b) % 5 == 0),
}
PADDING = {"none": None, "left": [3, 12, 1, 12], "right": [0, 9, 0, 4], "short": [0, 9, 2, 9], "empty": [0, 12, 0, 0]}


def padding(kind):
    if kind in ("none", "holes"):
        return (torch.arange(12) % 5 != 2).expand(2, -1) | torch.tensor([[True], [False]]) if kind == "holes" else None
    a, b, c, d = PADDING[kind]
    keep = torch.stack([(torch.arange(12) >= s) & (torch.arange(12) < e) for s, e in ((a, b), (c, d))])
    return keep[:, :9] if kind == "short" else keep


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", [*PADDING, "holes"])
def test_masks_equal_those_of_sdpa(pattern, kind):
    places = [(12, 12, 0, 0), (1, 12, 11, 0), (1, 12, 6, 0), (4, 12, 3, 0), (3, 7, 9, 5), (1, 5, 11, 7), (5, 12, 0, 0)]
    for q_length, kv_length, q_offset, kv_offset in places:
        size = dict(batch_size=2, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
        size |= dict(mask_function=PATTERNS[pattern](masking_utils), attention_mask=padding(kind))
        expected = masking_utils.sdpa_mask(**size, allow_is_causal_skip=False)
        got = _hf_masks.attention_mask(**size)
        if got is None:
            assert q_length == 1 and expected.all()
            continue
        assert got.shape == expected.shape and torch.equal(got.dense(), expected)
        assert torch.equal(got & True, expected) and got.contiguous() is got and got.to("cpu").mask is got.mask
        start, stop = got.keys
        if expected.any() and pattern != "a user's":
            seen = expected.any(2).any(1).any(0)
            assert not seen[:start].any() and not seen[stop:].any()
            assert q_length > 1 or pattern == "blocks" or (seen[start] and seen[stop - 1])


def test_packed_masks_equal_those_of_sdpa():
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([5, 1, 6], [8, 2, 2])])
    sequences = masking_utils.find_packed_sequence_indices(positions)
    for inner in ("causal", "sliding", "chunks", "chunks after padding", "a user's"):
        function = PATTERNS[inner](masking_utils)
        function = masking_utils.packed_sequence_compatibility_function(function, positions, sequences)
        size = dict(batch_size=2, q_length=12, kv_length=12, mask_function=function)
        got = _hf_masks.attention_mask(**size)
        assert torch.equal(got.dense(), masking_utils.sdpa_mask(**size, allow_is_causal_skip=False))
        assert got.packed == (inner != "a user's")


def test_a_function_that_changed_its_meaning_is_evaluated(monkeypatch):
    function = masking_utils.sliding_window_causal_mask_function(4)
    size = dict(batch_size=1, q_length=12, kv_length=12, mask_function=function)
    assert _hf_masks.attention_mask(**size).mask == masks.window(3, 0)
    monkeypatch.setattr(_hf_masks, "_unreadable", set())
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda n: lambda b, h, q, k: k >= q - n)
    _hf_masks.probe.__wrapped__()
    assert "sliding_window_overlay" in _hf_masks._unreadable
    assert _hf_masks.attention_mask(**size).mask == masks.dense(_hf_masks.attention_mask(**size).dense()[0, 0])


def test_decoding_asks_for_no_mask_and_makes_none_twice():
    def step(length, keep=None, function=masking_utils.causal_mask_function, kv_length=None):
        size = dict(batch_size=2, q_length=1, kv_length=kv_length or length, q_offset=length - 1)
        return _hf_masks.attention_mask(**size, mask_function=function, attention_mask=keep)

    keep = torch.ones(2, 40, dtype=torch.bool)
    assert step(20) is None and step(20, keep[:, :20]) is None
    static = step(20, keep[:, :20], kv_length=40)
    assert static.mask is None and static.keys == (0, 20)
    assert step(20, keep[:, :20], masking_utils.sliding_window_causal_mask_function(8)).keys == (12, 20)
    for hole in ((0, slice(0, 5)), (1, slice(2, 7)), (slice(None), slice(0, 5))):
        padded = keep.clone()
        padded[hole] = False
        steps = [step(n, padded[:, :n]) for n in range(20, 40)]
        assert len({id(s.mask) for s in steps}) == 1
        assert len({id(s.mask.code()) for s in steps if s.mask is not None}) <= 1


# ---- the attention function alone ----


class Layer(torch.nn.Module):
    is_causal = True


def attend(q, k, v, allowed=None, bias=0):
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.mT * 0.3 + bias
    return ((scores if allowed is None else scores.masked_fill(~allowed, -1e30)).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(2, h, 12, 8) for h in (4, 2, 2)]


def test_masks_that_are_tensors(qkv):
    torch.manual_seed(1)
    allowed = torch.rand(2, 1, 12, 20) < 0.5
    allowed[..., 0] = True
    additive = torch.randn(1, 4, 12, 12)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    block_mask = create_block_mask(lambda b, h, q, k: (k <= q) & (k >= b), 2, None, 12, 12, device="cpu")
    window = torch.stack([causal, causal & (torch.arange(12) >= 1)])[:, None]
    window[1, 0, 0] = True  # nothing to see: zero there, looked at apart
    cases = [
        (allowed, {}, attend(*qkv, allowed[..., :12])),
        (additive, {}, attend(*qkv, bias=additive)),
        (None, {}, attend(*qkv, causal)),
        (None, dict(is_causal=False), attend(*qkv)),
        (None, dict(position_bias=additive), attend(*qkv, causal, additive)),
        (additive, dict(position_bias=additive), attend(*qkv, bias=2 * additive)),
        (block_mask, {}, attend(*qkv, window)),
    ]
    for mask, options, expected in cases:
        out, weights = attention.attention(Layer(), *qkv, mask, scaling=0.3, **options)
        if mask is block_mask:
            assert not out[1, 0].any()
            out, expected = out.clone(), expected.clone()
            out[1, 0] = expected[1, 0] = 0
        torch.testing.assert_close(out, expected)
        assert weights is None and out.is_contiguous()
    q, k, v = qkv
    out, _ = attention.attention(Layer(), q[:, :, :5], k, v, None, scaling=0.3)  # an empty static cache is longer
    torch.testing.assert_close(out, attend(*(x[:, :, :5] for x in qkv), causal[:5, :5]))


@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_mask_is_noticed(qkv, inference):
    with torch.inference_mode(inference):  # there tensors do not count their versions
        allowed = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
        attention.attention(Layer(), *qkv, allowed, scaling=0.3)
        allowed[..., 3:5] = True
        torch.testing.assert_close(attention.attention(Layer(), *qkv, allowed, scaling=0.3)[0], attend(*qkv, allowed))


def test_cu_seqlens(qkv):
    q, k, v = (x[:1] for x in qkv)
    ids = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    expected = attend(q, k, v, (ids[:, None] == ids) & torch.ones(12, 12, dtype=torch.bool).tril())
    cu = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    for options in (dict(cu_seq_lens_q=cu), dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu.clone(), max_length_q=5)):
        out, _ = attention.attention(Layer(), q, k, v, None, scaling=0.3, **options)
        torch.testing.assert_close(out, expected)
    causal = _hf_masks.attention_mask(batch_size=1, q_length=12, kv_length=12)
    out, _ = attention.attention(Layer(), q, k, v, causal, scaling=0.3, cu_seq_lens_q=cu)
    torch.testing.assert_close(out, expected)


def test_refusals(qkv):
    with pytest.raises(ValueError, match="dropout must be 0, got 0.1: set attention_dropout=0"):
        attention.attention(Layer(), *qkv, None, dropout=0.1)
    for name in ("output_attentions", "cache", "indices", "block_indices"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            attention.attention(Layer(), *qkv, None, **{name: torch.ones(1)})
    attention.attention(Layer(), *qkv, None, output_attentions=False)


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_in_pieces(family, pair, cache, padded):
    ids = inputs("none")[0]["input_ids"]
    mask = inputs("left")[0]["attention_mask"]
    found = []
    for model in pair:
        options = dict(config=model.config) | (dict(max_cache_len=20) if cache == "StaticCache" else {})
        past, logits = getattr(transformers, cache)(**options), []
        for start, stop in ((0, 6), (6, 10), (10, 12), (12, 13)):
            arguments = dict(attention_mask=mask[:, :stop]) if padded else {}
            with torch.no_grad():
                logits.append(model(ids[:, start:stop], past_key_values=past, **arguments).logits)
        found.append(torch.cat(logits, 1)[mask.bool() if padded else ...])
    assert error(found[1], found[0]) < 1e-5


def test_training_runs_without_a_mask_for_every_layer(monkeypatch):
    """One mask a forward and kind of layer, one code for all steps."""
    made = []
    make = _hf_masks.AttentionMask.__new__
    count = staticmethod(lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    monkeypatch.setattr(_hf_masks.AttentionMask, "__new__", count)
    layers = ["sliding_attention"] * 2 + ["full_attention"] * 2
    model = build("gemma3", "scalekern", num_hidden_layers=4, layer_types=layers)
    for _ in range(3):
        run(model, "left")
    assert len(made) == 6 and len({id(m.mask) for m in made}) == 2


def test_encoder_with_a_learned_bias():
    """T5: bias of positions, its gradients, bidirectional and cross attention."""
    sizes = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    config = transformers.T5Config(**sizes, dropout_rate=0)
    found = []
    for implementation in ("eager", "scalekern"):
        torch.manual_seed(0)
        config._attn_implementation = implementation
        model = transformers.T5ForConditionalGeneration(config)
        arguments, counts = inputs("right")
        del arguments["use_cache"]
        out = model(**arguments, decoder_input_ids=torch.arange(14).view(2, 7))
        out.logits.square().sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((out.logits.detach(), torch.cat(grads)))
    assert all(error(got, expected) < 1e-5 for expected, got in zip(*found))


def test_compiled_models_see_the_mask_of_each_call():
    plain, model = build("gemma2", "eager"), torch.compile(build("gemma2", "scalekern"), backend="eager")
    with torch.no_grad():
        for how in ("left", "between"):
            arguments, counts = inputs(how)
            assert error(model(**arguments).logits[counts], plain(**arguments).logits[counts]) < 1e-5


def test_bfloat16_and_autocast():
    """No further from float32 than "eager" is, but for a fifth."""
    arguments, counts = inputs("left")
    exact, off = build("mistral", "eager")(**arguments).logits[counts].detach(), {}
    for how in ("eager", "scalekern"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            off[how, "autocast"] = error(build("mistral", how)(**arguments).logits[counts].float(), exact)
        with torch.no_grad():
            off[how, "bfloat16"] = error(build("mistral", how).bfloat16()(**arguments).logits[counts].float(), exact)
    for kind in ("autocast", "bfloat16"):
        assert 0 < off["scalekern", kind] < 1.2 * off["eager", kind]
