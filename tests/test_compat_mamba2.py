"""transformers' Mamba-2 mixers, unmodified, compute the same with compat.install, and on scalekern's ops."""

import importlib

import pytest
import torch
from compat_transformers import Installed, SeenOps, assert_same, differentiate, greedy, pytestmark  # noqa: F401

from scalekern import compat, nn
from scalekern.testing import assert_close

transformers = pytest.importorskip("transformers")
ATTENTION = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64)
FAMILIES = {
    "mamba2": ("Mamba2", dict(num_heads=8, head_dim=4, n_groups=2, state_size=6, expand=2, chunk_size=8)),
    "bamba": ("Bamba", dict(**ATTENTION, mamba_n_heads=8, mamba_d_head=4, mamba_n_groups=2, mamba_d_state=6,
                            mamba_chunk_size=8, mamba_expand=2, attn_layer_indices=[1])),
    "falcon_h1": ("FalconH1", dict(**ATTENTION, mamba_d_ssm=32, mamba_n_heads=8, mamba_d_head=4, mamba_n_groups=2,
                                   mamba_d_state=6, mamba_chunk_size=8, mamba_expand=2)),
    "zamba2": ("Zamba2", dict(**ATTENTION, mamba_d_state=6, mamba_ngroups=2, mamba_headdim=4, n_mamba_heads=8,
                              chunk_size=8, mamba_expand=2, hybrid_layer_ids=[1], num_mem_blocks=1,
                              use_mem_rope=False, adapter_rank=4, layers_block_type=["mamba", "hybrid"])),
    "nemotron_h": ("NemotronH", dict(**ATTENTION, layers_block_type=["mamba", "attention"], mamba_num_heads=8,
                                     mamba_head_dim=4, n_groups=2, ssm_state_size=6, chunk_size=8, expand=2)),
}  # fmt: skip


def build(family):
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    settings = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, eos_token_id=None, pad_token_id=0,
                    bos_token_id=None, tie_word_embeddings=False, **options)  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.mark.parametrize("training, mask", [(False, False), (True, True)], ids=["eval_full", "train_padded"])
def test_logits_and_gradients(model, training, mask):
    expected = differentiate(model, training, mask)
    with Installed(), SeenOps() as seen:
        got = differentiate(model, training, mask)
        called = compat.calls()
    assert_same(got, expected, 3e-5)
    assert seen.names >= {"causal_conv1d_fwd", "ssd_scan_fwd", "ssd_scan_bwd"}
    assert called["mamba_chunk_scan_combined"] and "mamba_split_conv1d_scan_combined" not in called


def test_greedy_tokens(model):
    expected = greedy(model, True)
    with Installed(), SeenOps() as seen:
        got = greedy(model, True)
    assert torch.equal(got, expected)
    assert len(set(got.flatten().tolist())) > 3
    assert seen.names >= {"ssd_scan_fwd", "selective_state_update", "causal_conv1d_update"}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_packed_sequences_stay_apart(training):
    """By seq_idx, which transformers' torch form refuses; of mixers alone, since attention has masks of its own."""
    torch.manual_seed(0)
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, layer_types=["mamba", "mamba"], mamba_n_heads=8,
        mamba_d_head=4, mamba_n_groups=2, mamba_d_state=6, mamba_chunk_size=8, num_local_experts=0,
        shared_intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.GraniteMoeHybridForCausalLM(config).train(training)
    ids, lengths = torch.randint(0, 50, (1, 31)), (13, 18)
    seq_idx = torch.arange(2, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    with Installed():
        packed = model(ids, seq_idx=seq_idx, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in ids.split(lengths, 1)]
        together = model(ids, use_cache=False).logits
    assert_close(packed, torch.cat(alone, 1), tolerance=1e-6)
    assert (packed - together)[:, lengths[0] :].abs().max() > 1e-4


@pytest.mark.parametrize("d_ssm", [None, 8], ids=["scan_alone", "gated_mlp"])
def test_the_fused_function_is_the_layer(d_ssm):
    """What upstream's own Mamba2 calls in train mode: one call behind the first projection."""
    from scalekern import nn

    with Installed():
        fused = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_split_conv1d_scan_combined
        layer = nn.Mamba2(8, d_state=6, d_ssm=d_ssm, headdim=4, ngroups=2)
        u = torch.randn(2, 19, 8)
        parameters = layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.dt_bias, -layer.A_log.exp(), layer.D, 256
        out = fused(
            layer.in_proj(u), *parameters, rmsnorm_weight=layer.norm.weight, rmsnorm_eps=1e-5,
            outproj_weight=layer.out_proj.weight, headdim=4, ngroups=2, norm_before_gate=False,
        )  # fmt: skip
    assert_close(out, layer(u), tolerance=1e-6)
    with pytest.raises(ValueError, match="mamba_split_conv1d_scan_combined: zxbcdt must have .* got"):
        fused(layer.in_proj(u)[..., 1:], *parameters, headdim=4, ngroups=2)
    with pytest.raises(ValueError, match="mamba_split_conv1d_scan_combined: headdim must be given"):
        fused(layer.in_proj(u), *parameters, ngroups=2)


def upstream(module, *names):
    found = importlib.import_module(f"mamba_ssm.ops.triton.{module}")
    return [getattr(found, n) for n in names]


@pytest.mark.parametrize("before", [True, False], ids=["norm_first", "gate_first"])
@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_gated_norms(centered, group, before):
    """A bias belongs to the norm: a gate that follows multiplies it, too."""
    g = torch.Generator().manual_seed(1)
    x, z, weight, bias = (torch.randn(*s, 12, generator=g, dtype=torch.float64) for s in ((2, 5), (2, 5), (), ()))
    y = x if before else x * torch.nn.functional.silu(z)
    y = y.unflatten(-1, (-1, group or 12))
    y = y - y.mean(-1, keepdim=True) if centered else y
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * weight + bias
    expected = y * torch.nn.functional.silu(z) if before else y
    with Installed():
        names = ("layernorm_fn", "rmsnorm_fn", "rms_norm_ref", "RMSNorm", "LayerNorm")
        layernorm_fn, rmsnorm_fn, rms_norm_ref, RMSNorm, LayerNorm = upstream("layernorm_gated", *names)
    tensors, options = (x, weight, bias, z), dict(eps=1e-3, group_size=group, norm_before_gate=before)
    assert_close(layernorm_fn(*tensors, **options, is_rms_norm=not centered), expected, tolerance=1e-12)
    if not centered:
        assert_close(rmsnorm_fn(*tensors, **options), expected, tolerance=1e-12)
        assert_close(rms_norm_ref(*tensors, **options), expected, tolerance=1e-12)
    layer = (LayerNorm if centered else RMSNorm)(hidden_size=12, eps=1e-3, group_size=group, norm_before_gate=before)
    assert set(layer.state_dict()) == ({"weight", "bias"} if centered else {"weight"})
    layer.load_state_dict({"weight": weight, "bias": bias} if centered else {"weight": weight})
    bias = bias.clone() if centered else torch.zeros(12)
    tensors = (x.float(), weight.float(), bias.float(), z.float())
    expected = layernorm_fn(*tensors, **options, is_rms_norm=not centered)
    assert_close(layer(x.float(), z.float()), expected, tolerance=1e-6)


def test_a_gate_follows_upstreams_norms_unless_told_otherwise():
    x, z = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    with Installed():
        RMSNorm, LayerNorm, rmsnorm_fn = upstream("layernorm_gated", "RMSNorm", "LayerNorm", "rmsnorm_fn")
    for layer in (RMSNorm(8), LayerNorm(8)):
        assert_close(layer(x, z), layer(x) * torch.nn.functional.silu(z), tolerance=1e-6)
    assert_close(rmsnorm_fn(x, torch.ones(8), None, z, 1e-5), RMSNorm(8)(x, z), tolerance=1e-6)


def test_the_other_scans_of_upstream():
    g = torch.Generator().manual_seed(3)
    randn = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    x, dt, B, C = randn(2, 37, 4, 6), randn(2, 37, 4), randn(2, 37, 2, 5), randn(2, 37, 2, 5)
    A, D, z, bias = -torch.rand(4, generator=g), randn(4, 6), randn(2, 37, 4, 6), randn(4)
    with Installed():
        combined, plain, by_channels, exact, fused, fused_ref = upstream(
            "ssd_combined", "mamba_chunk_scan_combined", "mamba_chunk_scan", "ssd_selective_scan",
            "ssd_chunk_scan_combined_ref", "mamba_split_conv1d_scan_combined", "mamba_split_conv1d_scan_ref",
        )  # fmt: skip
    expected = combined(x, dt, A, B, C, 16, D, z, bias, dt_softplus=True, state_dtype=torch.float32)
    for scan in (plain, exact):
        assert_close(scan(x, dt, A, B, C, 16, D, z, bias, True), expected, tolerance=2e-6)
    for limit in ((0.0, float("inf")), (0.3, 0.9)):
        options = dict(dt_softplus=True, dt_limit=limit)
        expected = combined(x, dt, A, B, C, 16, D, z, bias, **options)
        assert_close(by_channels(x, dt, A, B, C, D, z, bias, **options), expected, tolerance=2e-6)
        wide = dt[..., None].expand(2, 37, 4, 6), A[:, None, None].expand(4, 6, 5).flatten(0, 1)
        found = by_channels(x, *wide, B, C, D, z, bias[:, None].expand(4, 6), **options)
        assert_close(found, expected, tolerance=2e-6)
    expected = combined(x, dt.abs(), A, B, C, 16, D[:, 0])
    assert_close(by_channels(x, dt.abs(), A, B, C, D[:, 0]), expected, tolerance=2e-6)
    inputs = randn(2, 37, 24 + 44 + 4), randn(44, 4), randn(44), bias, A, D[:, 0], 16
    options = dict(rmsnorm_weight=randn(24), outproj_weight=randn(3, 24), headdim=6, ngroups=2, dt_limit=(0.3, 0.9))
    assert_close(fused(*inputs, **options, state_dtype=None), fused_ref(*inputs, **options), tolerance=5e-6)
    assert_close(fused(*inputs, headdim=6, ngroups=2), fused_ref(*inputs, headdim=6, ngroups=2), tolerance=5e-6)


def test_upstreams_inference_params():
    with Installed():
        InferenceParams = importlib.import_module("mamba_ssm.utils.generation").InferenceParams
        layer = importlib.import_module("mamba_ssm").Mamba2(8, d_state=6, headdim=4, layer_idx=3)
    u, params = torch.randn(2, 9, 8), InferenceParams(max_seqlen=16, max_batch_size=2)
    with torch.no_grad():
        prompt = layer(u[:, :8], inference_params=params)
        params.seqlen_offset += 8
        last = layer(u[:, 8:], inference_params=params)
        assert_close(torch.cat([prompt, last], 1), layer(u), tolerance=1e-6)
    assert list(params.key_value_memory_dict) == [3]
    params.reset(32, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (32, 4, 0)


def test_mamba2_simple():
    """Its states begin where they have been learned to begin, of a row's first sequence; its names are upstream's."""
    with Installed():
        Simple = importlib.import_module("mamba_ssm.modules.mamba2_simple").Mamba2Simple
        old, new = (importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in ("layernorm", "layer_norm"))
    assert old.rms_norm_fn is new.rms_norm_fn
    simple = Simple(8, d_state=6, headdim=4, ngroups=2, learnable_init_states=True).double()
    torch.nn.init.normal_(simple.init_states)
    weights = simple.state_dict()
    assert weights.pop("init_states").shape == (4, 4, 6)
    plain = nn.Mamba2(8, d_state=6, headdim=4, ngroups=2).double()
    plain.load_state_dict(weights)
    u = torch.randn(2, 9, 8, dtype=torch.float64)
    conv_state, state = plain.allocate_inference_cache(2, 9)
    state += simple.init_states.detach()
    steps = torch.cat([plain.step(u[:, t : t + 1], conv_state, state)[0] for t in range(9)], 1)
    assert_close(simple(u), steps, tolerance=1e-12)
    index = (torch.arange(9) >= 5).int().expand(2, 9)
    assert_close(simple(u, seq_idx=index), torch.cat([steps[:, :5], plain(u[:, 5:])], 1), tolerance=1e-12)
    assert torch.autograd.grad(simple(u).sum(), simple.init_states)[0].abs().min() > 0
    with pytest.raises(ValueError, match="process_group must be None"):
        nn.Mamba2(8, process_group="all")
