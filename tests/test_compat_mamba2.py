"""transformers' Mamba-2 mixers, unmodified, compute the same with compat.install, and on scalekern's ops."""

import importlib

import pytest
import torch
from test_compat import Installed, SeenOps, assert_same, differentiate, greedy, pytestmark  # noqa: F401

from scalekern import compat
from scalekern.testing import assert_close

transformers = pytest.importorskip("transformers")
ATTENTION = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64)
FAMILIES = {
    "mamba2": ("Mamba2", dict(num_heads=8, head_dim=4, n_groups=2, state_size=6, expand=2, chunk_size=8)),
    "bamba": ("Bamba", dict(**ATTENTION, mamba_n_heads=8, mamba_d_head=4, mamba_n_groups=2, mamba_d_state=6,
                            mamba_chunk_size=8, mamba_expand=2, attn_layer_indices=[1])),
    "falcon_h1": ("FalconH1", dict(**ATTENTION, mamba_d_ssm=32, mamba_n_heads=8, mamba_d_head=4, mamba_n_groups=2,
                                   mamba_d_state=6, mamba_chunk_size=8, mamba_expand=2)),
    "zamba2": ("Zamba2", dict(**ATTENTION, mamba_d_state=6, mamba_ngroups=2, mamba_headdim=4, n_mamba_heads=8, chunk_size=8,
                              mamba_expand=2, hybrid_layer_ids=[1], num_mem_blocks=1, use_mem_rope=False,
                              adapter_rank=4, layers_block_type=["mamba", "hybrid"])),
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


def test_the_fused_function_is_the_layer():
    """What upstream's own Mamba2 calls in train mode: one call behind the first projection."""
    from scalekern import nn

    with Installed():
        fused = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_split_conv1d_scan_combined
        layer = nn.Mamba2(8, d_state=6, headdim=4, ngroups=2)
        u = torch.randn(2, 19, 8)
        out = fused(
            layer.in_proj(u), layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.dt_bias, -layer.A_log.exp(),
            layer.D, 256, rmsnorm_weight=layer.norm.weight, rmsnorm_eps=1e-5, outproj_weight=layer.out_proj.weight,
            headdim=4, ngroups=2, norm_before_gate=False,
        )  # fmt: skip
    assert_close(out, layer(u), tolerance=1e-6)
