"""nn.MaskedCrossAttention against the paper's equations, torch's module and, if installed, transformers' decoders."""

import copy

import pytest
import torch
from nn_modules import (
    attend, bound, by_heads, check_against, check_compiled, check_each_matters, check_loads, error, from_heads, normal,
    perturbed, sigmoid, tensors,
)  # fmt: skip

from scalekern import masks
from scalekern.nn import MaskedCrossAttention
from scalekern.nn.masked_cross_attention import hidden_pixels

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, HEADS, QUERIES, SIZE = 8, 2, 4, (2, 3)
KEYS = SIZE[0] * SIZE[1]


def hidden(*shape, seed=3):
    """A mask of which the second query of the first row hides all."""
    mask = normal(*shape, QUERIES, KEYS, seed=seed) > 0
    mask[0, ..., 1, :] = True
    return mask


def paper(p, query, key, value, mask):
    """Cheng et al. 2021, equation 2: softmax(M + q k^T) v, M = 0 inside of the mask and everywhere if it is empty."""
    weights, biases = p["in_proj_weight"].chunk(3), p["in_proj_bias"].chunk(3)
    q, k, v = (by_heads(x @ w.T + b, HEADS) for x, w, b in zip((query, key, value), weights, biases))
    mask = mask.expand(len(q), HEADS, -1, -1)
    y = attend(q, k, v, lambda b, h, i, j: not mask[b, h, i, j] or mask[b, h, i].all())
    return from_heads(y) @ p["out_proj.weight"].T + p["out_proj.bias"]


def build(**options):
    torch.manual_seed(0)
    return perturbed(MaskedCrossAttention(WIDTH, HEADS, **options))


def apart(x):
    return x.split([QUERIES, KEYS, KEYS], 1)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_output_and_gradients_match_the_paper(heads):
    mask = hidden(2, heads)
    module = bound(build(batch_first=True), lambda forward, x: forward(*apart(x), mask)[0])
    rendering = lambda p, x: paper(p, *apart(x), mask)
    x = normal(2, QUERIES + 2 * KEYS, WIDTH)
    check_against(rendering, module, x)
    check_each_matters(rendering, module, x, ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
    assert error(module(x), paper(tensors(module), *apart(x), hidden(2, heads, seed=4))) > 1e-2


def test_every_form_of_the_mask():
    module, (query, key, value) = build(), (normal(n, 2, WIDTH, seed=n) for n in (QUERIES, KEYS, KEYS + 1))
    value = value[:KEYS]
    rows = [x.transpose(0, 1) for x in (query, key, value)]
    mask = hidden(2, HEADS)
    expected = paper(tensors(module), *rows, mask)
    for form in (mask, mask.flatten(0, 1), masks.dense(~mask)):
        out, weights = module(query=query, key=key, value=value, attn_mask=form)
        assert error(out.transpose(0, 1), expected) < 1e-12 and weights is None
    for form in (mask[1, 0], None):
        expected = paper(tensors(module), *rows, torch.zeros(1, 1, QUERIES, KEYS).bool() if form is None else form)
        assert error(module(query, key, value, form)[0].transpose(0, 1), expected) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_torchs_module(bias):
    """Which has no answer for a row that hides all: there, what Mask2Former does to its mask."""
    theirs = perturbed(torch.nn.MultiheadAttention(WIDTH, HEADS, bias=bias))
    module = build(bias=bias)
    module.load_state_dict(theirs.state_dict(), strict=True)
    query, key, value = (normal(n, 2, WIDTH, seed=n).requires_grad_() for n in (QUERIES, KEYS, KEYS))
    mask = hidden(2, HEADS).flatten(0, 1)
    filled = mask & ~mask.all(-1, keepdim=True)
    outs = module(query, key, value, mask)[0], theirs(query, key, value, attn_mask=filled)[0]
    assert error(*outs) < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), [query, key, value]) for out in outs]
    for got, expected in zip(*grads, strict=True):
        assert error(got, expected) < 1e-10


def test_transformers_decoder():
    """Mask2Former's whole decoder, its masks from layer to layer, with this attention in the place of torch's."""
    mask2former = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    config = mask2former.Mask2FormerConfig(
        hidden_dim=WIDTH, num_attention_heads=HEADS, decoder_layers=4, dim_feedforward=8, mask_feature_size=WIDTH,
        dropout=0.0, num_queries=QUERIES,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = perturbed(mask2former.Mask2FormerMaskedAttentionDecoder(config)).eval()
    ours = copy.deepcopy(decoder)
    for layer in ours.layers:
        theirs, layer.cross_attn = layer.cross_attn, MaskedCrossAttention(WIDTH, HEADS, dtype=torch.float64)
        layer.cross_attn.load_state_dict(theirs.state_dict(), strict=True)
    sizes = [(2, 3), (4, 6), (3, 3)]
    levels = [[normal(h * w, 2, WIDTH, seed=h + w + i) for h, w in sizes] for i in (0, 1)]
    run = lambda decoder: decoder(
        inputs_embeds=normal(QUERIES, 2, WIDTH, seed=5), query_position_embeddings=normal(QUERIES, 2, WIDTH, seed=6),
        multi_stage_positional_embeddings=levels[1], encoder_hidden_states=levels[0],
        pixel_embeddings=normal(2, WIDTH, 8, 12, seed=7), feature_size_list=sizes, output_hidden_states=True,
    )  # fmt: skip
    got, expected = run(ours), run(decoder)
    assert error(got.last_hidden_state, expected.last_hidden_state) < 1e-10
    for a, b in zip(got.masks_queries_logits, expected.masks_queries_logits, strict=True):
        assert error(a, b) < 1e-10


def test_transformers_oneformer():
    """Its layer around the attention, with torch's module and with ours."""
    oneformer = pytest.importorskip("transformers.models.oneformer.modeling_oneformer")
    torch.manual_seed(0)
    theirs = perturbed(oneformer.OneFormerTransformerDecoderCrossAttentionLayer(WIDTH, HEADS))
    ours = copy.deepcopy(theirs)
    ours.multihead_attn = MaskedCrossAttention(WIDTH, HEADS, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    output, memory, pos = (normal(n, 2, WIDTH, seed=i) for i, n in enumerate((QUERIES, KEYS, KEYS)))
    mask = hidden(2, HEADS).flatten(0, 1)
    filled = mask & ~mask.all(-1, keepdim=True)
    got = ours(output, memory, memory_mask=mask, pos=pos)[0]
    assert error(got, theirs(output, memory, memory_mask=filled, pos=pos)[0]) < 1e-12


def test_hidden_pixels():
    logits = normal(2, QUERIES, 4, 6).requires_grad_()  # twice the size: bilinear is the mean of four
    mask = hidden_pixels(logits, SIZE)
    expected = sigmoid(logits.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))) < 0.5
    assert mask.shape == (2, 1, QUERIES, KEYS) and torch.equal(mask[:, 0], expected.flatten(2))
    assert mask.any() and not mask.all() and not mask.requires_grad


def test_what_is_hidden_reaches_nothing():
    module, mask = build(batch_first=True), torch.zeros(1, 1, QUERIES, KEYS, dtype=torch.bool)
    mask[..., 2] = True
    query, key = normal(1, QUERIES, WIDTH), normal(1, KEYS, WIDTH)
    poisoned = key.clone()
    poisoned[:, 2] = torch.nan
    assert error(module(query, poisoned, poisoned, mask)[0], module(query, key, key, mask)[0]) < 1e-12


def test_torchs_checkpoints_load():
    shapes = {"in_proj_weight": (24, 8), "in_proj_bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,)}
    check_loads(MaskedCrossAttention(8, 2), shapes)
    check_loads(MaskedCrossAttention(8, 2, bias=False), {n: s for n, s in shapes.items() if "weight" in n})


def test_low_precision():
    """Four products, each rounding to 8 bits."""
    module, x, mask = build(batch_first=True), apart(normal(2, QUERIES + 2 * KEYS, WIDTH)), hidden(2, 1)
    expected, module = paper(tensors(module), *x, mask), module.float()
    narrow = [t.float() for t in x]
    assert error(module(*narrow, mask)[0], expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(*narrow, mask)[0], expected) < 3e-2
    assert error(module.bfloat16()(*(t.bfloat16() for t in x), mask)[0], expected) < 3e-2


def test_compile_fullgraph():
    """With a mask made beforehand: one that comes out of the network is read on the host."""
    rule = masks.dense(~hidden(2, 1))
    call = lambda forward, x: forward(*apart(x), rule)[0]
    check_compiled(bound(build(batch_first=True), call), normal(2, QUERIES + 2 * KEYS, WIDTH), "eager")


def test_empty_batch_and_wrong_use():
    out = build(batch_first=True)(normal(0, QUERIES, WIDTH), *[normal(0, KEYS, WIDTH)] * 2, hidden(2, 1)[:0])[0]
    assert out.shape == (0, QUERIES, WIDTH)
    module, x = build(batch_first=True), apart(normal(2, QUERIES + 2 * KEYS, WIDTH))
    with pytest.raises(TypeError, match="attn_mask must have dtype bool, got float64"):
        module(*x, torch.zeros(QUERIES, KEYS, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"attn_mask must have shape .* or \(2, 2, 4, 6\), got \(3, 4, 6\)"):
        module(*x, hidden(3))
    with pytest.raises(ValueError, match="put both into attn_mask"):
        module(*x, need_weights=True)
    with pytest.raises(ValueError, match=r"key must have shape \(\*, \*, 8\), got \(2, 6, 5\)"):
        module(x[0], normal(2, 6, 5), x[2])
    with pytest.raises(ValueError, match="num_heads must divide the width 8, got 3"):
        MaskedCrossAttention(8, 3)
