"""nn.Mamba2: against transformers' mixer with the same weights, its own steps, packed and padded sequences."""

import types

import pytest
import torch
from conftest import INTERPRET

from scalekern import nn
from scalekern.testing import assert_close

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")
OPTIONS = {
    "plain": {},
    "groups": dict(ngroups=2, dt_limit=(0.01, 0.2), bias=True),
    "no_norm": dict(rmsnorm=False, D_has_hdim=True, conv_bias=False),
    "mlp": dict(d_ssm=8, norm_before_gate=True),
}


def build(name="plain", dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Mamba2(8, d_state=6, headdim=4, layer_idx=0, dtype=dtype, **OPTIONS[name])
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def test_equals_transformers_mixer():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    import transformers

    config = transformers.Mamba2Config(
        hidden_size=8, state_size=6, num_heads=4, head_dim=4, n_groups=2, chunk_size=16, num_hidden_layers=1,
        use_bias=True, layer_norm_epsilon=1e-5, time_step_limit=(0.01, 0.2),
    )  # fmt: skip
    mixer, layer = modeling.Mamba2Mixer(config, 0).eval(), build("groups")
    mixer.load_state_dict(layer.state_dict())
    u = torch.randn(2, 37, 8)
    assert_close(layer(u), mixer(u), tolerance=3e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_equations(name):
    """Token by token in plain torch, float64: projection, convolution, recurrence, norm, projection."""
    layer = build(name, torch.float64).double()
    u = torch.randn(2, 11, 8, dtype=torch.float64)
    D, N, G, P, H = layer.d_ssm, 6, layer.ngroups, 4, layer.nheads
    parts = [layer.d_inner - D] * 2 + [D, D + 2 * G * N, H]
    bias_of = lambda part: 0 if part.bias is None else part.bias
    z0, x0, z, xBC, dt = (u @ layer.in_proj.weight.T + bias_of(layer.in_proj)).split(parts, -1)
    padded, taps = torch.cat([xBC.new_zeros(2, 3, xBC.shape[-1]), xBC], 1), layer.conv1d.weight[:, 0]
    xBC = sum(padded[:, i : i + 11] * taps[:, i] for i in range(4)) + bias_of(layer.conv1d)
    xBC = xBC * xBC.sigmoid()
    d = torch.nn.functional.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    h, ys = u.new_zeros(2, H, P, N), []
    for t in range(11):
        x = xBC[:, t, :D].view(2, H, P)
        B, C = (xBC[:, t, D + i * G * N :][:, : G * N].view(2, G, N).repeat_interleave(H // G, 1) for i in (0, 1))
        decay, step = torch.exp(-d[:, t] * layer.A_log.exp()), d[:, t, :, None] * x
        h = decay[..., None, None] * h + step[..., None] * B[:, :, None]
        skip = layer.D.view(H, P) if layer.D_has_hdim else layer.D[:, None]
        ys.append(((h * C[:, :, None]).sum(-1) + skip * x).flatten(1))
    y, gate = torch.stack(ys, 1), z * z.sigmoid()
    if layer.rmsnorm:
        y = y if layer.norm_before_gate else y * gate
        groups = y.view(2, 11, G, -1)
        y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(2, 11, -1) * layer.norm.weight
        y = y * gate if layer.norm_before_gate else y
    else:
        y = y * gate
    y = torch.cat([x0 * z0 * z0.sigmoid(), y], -1)
    expected = y @ layer.out_proj.weight.T + (0 if layer.out_proj.bias is None else layer.out_proj.bias)
    assert_close(layer(u), expected, tolerance=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole(name):
    layer, u = build(name, torch.float64).double(), torch.randn(2, 75, 8, dtype=torch.float64)
    expected = layer(u)
    params = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0, batch_size_offset=0)
    outs = []
    for begin, end in ((0, 66), (66, 67), (67, 68), (68, 72), (72, 73), (73, 75)):
        outs.append(layer(u[:, begin:end], inference_params=params))
        params.seqlen_offset = end
    assert_close(torch.cat(outs, 1), expected, tolerance=1e-12)


def test_packed_and_padded_sequences_are_sequences():
    layer, u = build("groups"), torch.randn(1, 90, 8, requires_grad=True)
    bounds = [0, 5, 70, 90]
    cu = torch.tensor(bounds, dtype=torch.int32)
    expected = torch.cat([layer(u[:, b:e]) for b, e in zip(bounds, bounds[1:])], 1)
    index = (torch.arange(90)[None] >= torch.tensor([[5], [70]])).sum(0, dtype=torch.int32)[None]
    packed, states = layer(u, cu_seqlens=cu, return_final_states=True)
    assert states[0].shape == (3, layer.conv_dim, 4) and states[1].shape == (3, 4, 4, 6)
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), u, retain_graph=True)
    for out in (packed, layer(u, seq_idx=index)):
        assert_close(out, expected, tolerance=3e-6)
        (grad,) = torch.autograd.grad((out * weight).sum(), u, retain_graph=True)
        assert_close(grad, wanted, tolerance=5e-6)
    rows = torch.randn(2, 20, 8)
    mask = torch.arange(20) >= torch.tensor([[0], [13]])
    out, (conv_state, ssm_state) = layer(rows, mask=mask, return_final_states=True)
    alone, (conv_alone, ssm_alone) = layer(rows[1:, 13:], return_final_states=True)
    assert_close(out[1, 13:], alone[0], tolerance=3e-6)
    assert_close(ssm_state[1], ssm_alone[0], tolerance=3e-6)
    assert_close(conv_state[1], conv_alone[0], tolerance=3e-6)


@pytest.mark.parametrize("name", ["groups", "mlp"])
@torch.no_grad()
def test_packed_prompts_fill_the_cache_a_row_a_sequence(name):
    """As upstream's, which is given both seq_idx and cu_seqlens; one sequence is shorter than the filter, one empty."""
    layer, u, after = build(name), torch.randn(1, 40, 8), torch.randn(4, 3, 8)
    bounds = [0, 17, 19, 19, 40]
    index = (torch.arange(40)[None] >= torch.tensor([[17], [19]])).sum(0, dtype=torch.int32)[None]
    params = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0, batch_size_offset=0)
    prompt = layer(u, seq_idx=index, cu_seqlens=torch.tensor(bounds), inference_params=params)
    steps = []
    for i in range(3):
        params.seqlen_offset += 1
        steps.append(layer(after[:, i : i + 1], inference_params=params))
    for row, (b, e) in enumerate(zip(bounds, bounds[1:])):
        expected = layer(torch.cat([u[:, b:e], after[row : row + 1]], 1))
        found = torch.cat([prompt[:, b:e], torch.cat(steps, 1)[row : row + 1]], 1)
        assert_close(found, expected, tolerance=3e-6, what=f"sequence {row}")
    for options in (dict(cu_seqlens=torch.tensor(bounds)), dict(seq_idx=index)):
        with pytest.raises(ValueError, match="cu_seqlens"):
            layer(u, inference_params=params, **options)


def test_states_join_with_gradients():
    layer, u = build(), torch.randn(2, 30, 8, requires_grad=True)
    whole = layer(u)
    first, states = layer(u[:, :13], return_final_states=True)
    joined = torch.cat([first, layer(u[:, 13:], initial_states=states)], 1)
    assert_close(joined, whole, tolerance=3e-6)
    weight = torch.randn_like(whole)
    leaves = [u, *layer.parameters()]
    for a, e in zip(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (joined, whole))):
        assert_close(a, e, tolerance=2e-5)


def test_upstream_seqlen_form_and_errors():
    layer, u = build(), torch.randn(2, 7, 8)
    assert torch.equal(layer(u.flatten(0, 1), seqlen=7), layer(u).flatten(0, 1))
    with pytest.raises(ValueError, match="nn.Mamba2: headdim must divide 16 channels"):
        nn.Mamba2(8, headdim=5)
    for options in (dict(headdim=0), dict(headdim=4, ngroups=0)):
        with pytest.raises(ValueError, match="nn.Mamba2: headdim must divide"):
            nn.Mamba2(8, **options)
    with pytest.raises(ValueError, match="nn.Mamba2: dt_limit must be two numbers"):
        nn.Mamba2(8, headdim=4, dt_limit=(0.1,))
    with pytest.raises(ValueError, match="nn.Mamba2: seqlen must divide the 14 tokens of u, got 3"):
        layer(u.flatten(0, 1), seqlen=3)
    with pytest.raises(ValueError, match=r"nn.Mamba2: mask must have shape \(2, 7\), got \(2, 6\)"):
        layer(u, mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match="nn.Mamba2: mask goes with none"):
        layer(u, mask=torch.ones(2, 7), seq_idx=torch.zeros(2, 7, dtype=torch.int32))
