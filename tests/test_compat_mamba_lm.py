"""mamba_ssm's language model under compat.install, and a plain rendering of it; its parameters; its layers."""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from compat_mamba_lm import ABSENT, KINDS, build, config, normalized, parameters, rendered, tokens, upstream
from compat_shims import shims  # noqa: F401

from scalekern.testing import TOLERANCE, assert_close

pytestmark = ABSENT


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logits_and_gradients(kind, dtype):
    model, ids = build(kind).to(dtype), tokens()
    p = parameters(model)
    logits, expected = model(ids).logits, rendered(p, model.config, ids)
    assert logits.dtype == dtype and logits.shape == (2, 11, 24)  # the vocabulary is padded to a multiple of 8
    assert_close(logits, expected, tolerance=TOLERANCE[dtype])
    weight = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * weight.to(dtype)).sum().backward()
    (expected * weight).sum().backward()
    for name, found in model.named_parameters():
        assert p[name].grad.norm() > 0, name
        assert_close(found.grad, p[name].grad, tolerance=TOLERANCE[dtype], what=f"gradient of {name}")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_of_half_types(fused, wide):
    """In float32 it is the sum of what the layers gave, to the bit; in bfloat16 it is rounded at every layer."""
    model, ids = build("mamba1", torch.bfloat16, n_layer=4, residual_in_fp32=wide, fused_add_norm=fused), tokens()
    hidden_states, residual = model.backbone.embedding(ids), None
    total = torch.zeros(2, 11, 16)
    for layer in model.backbone.layers:
        total += hidden_states.detach()
        hidden_states, residual = layer(hidden_states, residual)
        assert hidden_states.dtype == torch.bfloat16 and residual.dtype == (torch.float32 if wide else torch.bfloat16)
    assert torch.equal(residual.float(), total) == wide
    assert_close(residual, total, tolerance=TOLERANCE[torch.bfloat16])
    # 0.8e-2 fused, 1.2e-2 unfused (the sum is rounded before the norm, as upstream has it); the rendering has 1.3e-2
    assert_close(model(ids).logits, rendered(parameters(model), model.config, ids), tolerance=2e-2)


# What upstream's modules hold, by their constructors: M model width, D = 2 M channels.


def mamba1_shapes(M, N):
    D, R = 2 * M, math.ceil(M / 16)
    return {
        "A_log": (D, N), "D": (D,), "in_proj.weight": (2 * D, M), "conv1d.weight": (D, 1, 4), "conv1d.bias": (D,),
        "x_proj.weight": (R + 2 * N, D), "dt_proj.weight": (D, R), "dt_proj.bias": (D,), "out_proj.weight": (M, D),
    }  # fmt: skip


def mamba2_shapes(M, N, P, G):
    D, H, conv = 2 * M, 2 * M // P, 2 * M + 2 * G * N
    return {
        "dt_bias": (H,), "A_log": (H,), "D": (H,), "in_proj.weight": (2 * D + 2 * G * N + H, M),
        "conv1d.weight": (conv, 1, 4), "conv1d.bias": (conv,), "norm.weight": (D,), "out_proj.weight": (M, D),
    }  # fmt: skip


def mha_shapes(M, qkv, mlp, heads):
    return {
        "in_proj.weight": (qkv + mlp, M), "in_proj.bias": (qkv + mlp,), "conv1d.weight": (qkv, 1, 4),
        "conv1d.bias": (qkv,), "out_proj.weight": (M, heads + mlp // 2), "out_proj.bias": (M,),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "hybrid"])
def test_state_dict(kind):
    model, M = build(kind), 16
    m2 = mamba2_shapes(M, 6, 4, 2)
    mixers = {
        "mamba1": [mamba1_shapes(M, 5)] * 2, "mamba2": [m2, m2], "hybrid": [m2, mha_shapes(M, 6 * 8, 256, 6 * 4)],
    }[kind]  # fmt: skip
    norm = {"weight": (M,), "bias": (M,)} if kind == "hybrid" else {"weight": (M,)}
    expected = {"backbone.embedding.weight": (24, M), "lm_head.weight": (24, M)}
    expected |= {f"backbone.norm_f.{n}": s for n, s in norm.items()}
    for i, mixer in enumerate(mixers):
        parts = {"mixer": mixer, "norm": norm}
        if kind == "hybrid":  # 20 hidden channels are rounded up to 128
            parts |= {"norm2": norm, "mlp.fc1": {"weight": (256, M)}, "mlp.fc2": {"weight": (M, 128)}}
        expected |= {f"backbone.layers.{i}.{at}.{n}": s for at, shapes in parts.items() for n, s in shapes.items()}
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == expected
    assert (model.lm_head.weight is model.backbone.embedding.weight) == (kind != "mamba2")
    assert "Mamba2" in str(model.backbone.layers[0].mixer) or kind == "mamba1"


def test_initial_weights():
    torch.manual_seed(0)
    cfg = dict(ssm_cfg=dict(bias=True), d_model=64, n_layer=3, vocab_size=1000, d_intermediate=128)
    LM = upstream("MambaLMHeadModel")
    assert LM is upstream("models.mixer_seq_simple.MambaLMHeadModel")
    for layer in (backbone := LM(config(**cfg)).backbone).layers:
        bound = 1 / math.sqrt(128 * 6)  # of a Linear with 128 inputs, over 2 branches in 3 blocks
        for weight in (layer.mixer.out_proj.weight, layer.mlp.fc2.weight):
            assert 0.98 * bound < weight.abs().max() <= bound
        assert layer.mlp.fc1.weight.abs().max() > 0.98 / 8
        assert (layer.mixer.in_proj.bias == 0).all() and F.softplus(layer.mixer.dt_proj.bias).max() > 0.05
    assert 0.019 < backbone.embedding.weight.std() < 0.021
    model = LM(config(**cfg), initializer_cfg=dict(initializer_range=0.5, rescale_prenorm_residual=False))
    assert 0.49 < model.backbone.embedding.weight.std() < 0.51
    assert model.backbone.layers[0].mixer.out_proj.weight.abs().max() > 0.98 / math.sqrt(128)


def test_num_last_tokens():
    model, ids = build(), tokens()
    full = model(ids).logits
    for last in (1, 4, 11):
        assert_close(model(ids, num_last_tokens=last).logits, full[:, -last:], tolerance=1e-6)
    assert model(ids, position_ids=None, num_last_tokens=0).logits.shape == full.shape


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_fn(dtype, rms):
    g = torch.Generator().manual_seed(4)
    randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    x, x1, scale = (t.to(dtype) for t in (randn(2, 5, 12), randn(2, 5, 12), randn(2, 5)))
    residual, (weight, weight1, bias1) = randn(2, 5, 12).float(), randn(3, 12).to(dtype)
    layer_norm_fn = upstream("ops.triton.layer_norm.layer_norm_fn")
    bias = None if rms else torch.zeros(12, dtype=dtype)

    def norm(total, weight, bias=0):
        total = total if rms else total - total.mean(-1, keepdim=True)
        return normalized({"weight": weight.double()}, total) + bias

    close = lambda a, b: assert_close(a, b, tolerance=max(TOLERANCE[a.dtype], 1e-15))  # noqa: E731
    options = dict(eps=1e-5, is_rms_norm=rms)
    total = x.double() + residual.double()
    y, stream = layer_norm_fn(x, weight, bias, residual, prenorm=True, **options)
    close(y, norm(total, weight))
    close(stream, total)
    assert y.dtype == dtype and stream.dtype == torch.float32  # the residual's
    for wide in (True, False):
        stream = layer_norm_fn(x, weight, bias, prenorm=True, residual_in_fp32=wide, **options)[1]
        assert stream.dtype == (torch.promote_types(dtype, torch.float32) if wide else dtype)
        assert torch.equal(stream, x.to(stream.dtype))
    y = layer_norm_fn(x, weight, bias, rowscale=scale, **options)
    close(y, norm(x.double() * scale.double()[..., None], weight))
    y, y1 = layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, **options)
    close(y, norm(total + x1.double(), weight))
    close(y1, norm(total + x1.double(), weight1, bias1.double()))
    torch.manual_seed(0)
    y, stream, kept, kept1 = layer_norm_fn(
        x, weight, bias, residual, x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True, **options
    )
    total = residual.double() + (x.double() * kept + x1.double() * kept1) / 0.75
    close(stream, total)
    close(y, norm(total, weight))
    assert kept.dtype == torch.bool and 60 < kept.sum() < 110 and not torch.equal(kept, kept1)
    assert layer_norm_fn(x, weight, bias, return_dropout_mask=True, **options)[1:] == (None, None)


def test_rms_norm_module():
    RMSNorm = upstream("ops.triton.layer_norm.RMSNorm")
    layer, x = RMSNorm(12, eps=0.1, dropout_p=0.5), torch.randn(2, 5, 12)
    assert list(layer.state_dict()) == ["weight"] and layer.bias is None
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    assert not torch.allclose(layer(x), expected)
    assert_close(layer.eval()(x), expected, tolerance=1e-6)
    y, stream = layer(x.bfloat16(), x.bfloat16(), prenorm=True, residual_in_fp32=True)
    assert y.dtype == torch.bfloat16 and torch.equal(stream, 2 * x.bfloat16())


def test_what_is_not_there_is_said():
    with pytest.raises(ValueError, match="ssm_cfg's layer must be one of Mamba1, Mamba2, got 'Mamba3'"):
        build(ssm_cfg=dict(layer="Mamba3"))
    with pytest.raises(ValueError, match="fused_add_norm takes LayerNorm or RMSNorm, got Identity"):
        upstream("modules.block.Block")(8, torch.nn.Identity, torch.nn.Identity, torch.nn.Identity, fused_add_norm=True)
    MHA, InferenceParams = upstream("modules.mha.MHA"), upstream("utils.generation.InferenceParams")
    x, params = torch.randn(1, 3, 8), InferenceParams(2, 1)
    with pytest.raises(ValueError, match="need a layer_idx"):
        MHA(8, 2)(x, params)
    with pytest.raises(ValueError, match=re.escape("hold 2 tokens (max_seqlen), got 3")):
        MHA(8, 2, layer_idx=0)(x, params)
    with pytest.raises(ValueError, match="lengths_per_sample.* not served"):
        MHA(8, 2, layer_idx=0)(x, InferenceParams(3, 1, lengths_per_sample=torch.tensor([3])))


SIGNATURES = {
    "models.config_mamba.MambaConfig": "d_model=2560 d_intermediate=0 n_layer=64 vocab_size=50277 ssm_cfg=<factory> "
    "attn_layer_idx=<factory> attn_cfg=<factory> rms_norm=True residual_in_fp32=True fused_add_norm=True "
    "pad_vocab_size_multiple=8 tie_embeddings=True",
    "models.mixer_seq_simple.MambaLMHeadModel": "config initializer_cfg=None device=None dtype=None",
    "models.mixer_seq_simple.MixerModel": "d_model n_layer d_intermediate vocab_size ssm_cfg=None attn_layer_idx=None "
    "attn_cfg=None norm_epsilon=1e-05 rms_norm=False initializer_cfg=None fused_add_norm=False residual_in_fp32=False "
    "device=None dtype=None",
    "models.mixer_seq_simple.create_block": "d_model d_intermediate ssm_cfg=None attn_layer_idx=None attn_cfg=None "
    "norm_epsilon=1e-05 rms_norm=False residual_in_fp32=False fused_add_norm=False layer_idx=None device=None "
    "dtype=None",
    "models.mixer_seq_simple._init_weights": "module n_layer initializer_range=0.02 rescale_prenorm_residual=True "
    "n_residuals_per_layer=1",
    "modules.mlp.GatedMLP": "in_features hidden_features=None out_features=None activation=silu bias=False "
    "multiple_of=128 device=None dtype=None",
    "modules.mha.MHA": "embed_dim num_heads num_heads_kv=None head_dim=None mlp_dim=0 qkv_proj_bias=True "
    "out_proj_bias=True softmax_scale=None causal=False layer_idx=None d_conv=0 rotary_emb_dim=0 "
    "rotary_emb_base=10000.0 rotary_emb_interleaved=False device=None dtype=None",
    "utils.generation.decode": "input_ids model max_length top_k=1 top_p=0.0 min_p=0.0 temperature=1.0 "
    "repetition_penalty=1.0 eos_token_id=None teacher_outputs=None vocab_size=None cg=False enable_timing=False "
    "output_scores=False streamer=None",
    "utils.generation.sample": "logits top_k=1 top_p=0.0 min_p=0.0 temperature=1.0",
    "utils.hf.load_state_dict_hf": "model_name device=None dtype=None",
    "utils.hf.load_config_hf": "model_name",
    "ops.triton.layer_norm.rms_norm_fn": "x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 "
    "dropout_p=0.0 rowscale=None prenorm=False residual_in_fp32=False return_dropout_mask=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name):
    found = inspect.signature(upstream(name)).parameters.values()
    defaults = ["" if p.default is p.empty else f"={getattr(p.default, '__name__', p.default)}" for p in found]
    assert " ".join(p.name + default for p, default in zip(found, defaults)) == SIGNATURES[name]
