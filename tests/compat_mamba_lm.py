"""What the tests of mamba_ssm's language model share: small models of every kind, and a plain rendering in float64."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from compat_shims import upstream as of_module

from scalekern import reference

ABSENT = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="mamba_ssm is installed")
M2 = dict(layer="Mamba2", d_state=6, headdim=4, ngroups=2)
ATTENTION = dict(causal=True, num_heads=4, num_heads_kv=2, head_dim=6, d_conv=4, rotary_emb_dim=4, mlp_dim=200)
CONFIGS = {
    "mamba1": dict(ssm_cfg=dict(d_state=5)),
    "mamba2": dict(ssm_cfg=M2, tie_embeddings=False, fused_add_norm=False),
    "hybrid": dict(ssm_cfg=M2, d_intermediate=20, attn_layer_idx=[1], attn_cfg=ATTENTION, rms_norm=False),
    "heads": dict(attn_layer_idx=[0, 1], residual_in_fp32=False,
                  attn_cfg=dict(num_heads=2, causal=True, rotary_emb_dim=8, rotary_emb_interleaved=True,
                                rotary_emb_base=100.0, softmax_scale=0.7), tie_embeddings=False),
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def upstream(name):
    return of_module(f"mamba_ssm.{name}")


def config(kind="mamba1", **options):
    settings = dict(d_model=16, n_layer=2, vocab_size=21, **CONFIGS[kind])
    return upstream("models.config_mamba.MambaConfig")(**settings | options)


def build(kind="mamba1", dtype=torch.float32, noise=0.3, **options):
    torch.manual_seed(0)
    model = upstream("models.mixer_seq_simple.MambaLMHeadModel")(config(kind, **options), dtype=dtype)
    with torch.no_grad():  # initial weights are so small that the mixers would hardly count
        for p in model.parameters():
            p += noise * torch.randn_like(p)
    return model


def tokens(rows=2, length=11):
    return torch.randint(0, 21, (rows, length), generator=torch.Generator().manual_seed(1))


def parameters(model):
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}


# The model in float64, of its parameters by their names.


def rendered(p, cfg, ids):
    x, residual = F.embedding(ids, p["backbone.embedding.weight"]), 0
    for i in range(cfg.n_layer):
        at = f"backbone.layers.{i}."
        residual = residual + x
        mixer = mamba1 if "layer" not in cfg.ssm_cfg else mamba2
        mixer, options = (attention, cfg.attn_cfg) if i in cfg.attn_layer_idx else (mixer, cfg.ssm_cfg)
        x = mixer(part(p, at + "mixer."), normalized(part(p, at + "norm."), residual), **options)
        if cfg.d_intermediate:
            residual = residual + x
            up, gate = F.linear(normalized(part(p, at + "norm2."), residual), p[at + "mlp.fc1.weight"]).chunk(2, -1)
            x = F.linear(up * F.silu(gate), p[at + "mlp.fc2.weight"])
    x = normalized(part(p, "backbone.norm_f."), residual + x)
    return x @ p["backbone.embedding.weight" if cfg.tie_embeddings else "lm_head.weight"].T


def part(p, prefix):
    return {n.removeprefix(prefix): t for n, t in p.items() if n.startswith(prefix)}


def normalized(p, x):
    if "bias" in p:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["weight"] + p.get("bias", 0)


def mamba1(p, x, **options):
    return reference.mamba_inner(
        (x @ p["in_proj.weight"].T).transpose(1, 2), p["conv1d.weight"], p["conv1d.bias"], p["x_proj.weight"],
        p["dt_proj.weight"], p["out_proj.weight"], None, -p["A_log"].exp(), D=p["D"], delta_bias=p["dt_proj.bias"],
    )  # fmt: skip


def mamba2(p, x, layer, d_state, headdim, ngroups):
    width = 2 * x.shape[-1]
    shared = ngroups * d_state
    z, xBC, dt = (x @ p["in_proj.weight"].T).split([width, width + 2 * shared, width // headdim], -1)
    xBC = F.silu(convolved(p, xBC))
    x, B, C = xBC.split([width, shared, shared], -1)
    B, C = B.unflatten(-1, (ngroups, d_state)), C.unflatten(-1, (ngroups, d_state))
    y = reference.ssd_scan(
        x.unflatten(-1, (-1, headdim)), dt, -p["A_log"].exp(), B, C, D=p["D"], dt_bias=p["dt_bias"], dt_softplus=True
    )
    y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (ngroups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * p["norm.weight"]
    return y @ p["out_proj.weight"].T


def convolved(p, x):
    channels, _, width = p["conv1d.weight"].shape
    x = F.pad(x.transpose(1, 2), (width - 1, 0))
    return F.conv1d(x, p["conv1d.weight"], p["conv1d.bias"], groups=channels).transpose(1, 2)


def attention(
    p, x, num_heads, causal, num_heads_kv=None, head_dim=None, d_conv=0, rotary_emb_dim=0, rotary_emb_base=10000.0,
    rotary_emb_interleaved=False, mlp_dim=0, softmax_scale=None,
):  # fmt: skip
    assert causal
    kv_heads, P = num_heads_kv or num_heads, head_dim or x.shape[-1] // num_heads
    mlp_dim = math.ceil(mlp_dim / 256) * 256
    qkv = F.linear(x, p["in_proj.weight"], p["in_proj.bias"])
    qkv, mlp = qkv[..., : qkv.shape[-1] - mlp_dim], qkv[..., qkv.shape[-1] - mlp_dim :]
    qkv = convolved(p, qkv) if d_conv else qkv
    heads = qkv.unflatten(-1, (-1, P)).transpose(1, 2)
    q, k, v = heads.split([num_heads, kv_heads, kv_heads], 1)
    exponents = torch.arange(0, rotary_emb_dim, 2, dtype=torch.float64) / max(rotary_emb_dim, 1)
    angle = torch.arange(x.shape[1])[:, None] * rotary_emb_base**-exponents
    turn = torch.polar(torch.ones_like(angle), angle)  # [L, rotary / 2], each pair of channels a complex number

    def rotary(t):
        turned, rest = t[..., :rotary_emb_dim], t[..., rotary_emb_dim:]
        order = (-1, 2) if rotary_emb_interleaved else (2, -1)
        pairs = turned.unflatten(-1, order)
        pairs = pairs if rotary_emb_interleaved else pairs.transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        turned = turned if rotary_emb_interleaved else turned.transpose(-1, -2)
        return torch.cat([turned.flatten(-2), rest], -1)

    q, k = rotary(q), rotary(k).repeat_interleave(num_heads // kv_heads, 1)
    scores = q @ k.transpose(-1, -2) * (softmax_scale or P**-0.5)
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v.repeat_interleave(num_heads // kv_heads, 1)
    up, gate = mlp.chunk(2, -1)
    out = torch.cat([out.transpose(1, 2).flatten(2), up * F.silu(gate)], -1)
    return F.linear(out, p["out_proj.weight"], p["out_proj.bias"])
