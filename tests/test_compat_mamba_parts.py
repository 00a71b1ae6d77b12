"""What code borrows from inside mamba_ssm and causal_conv1d: that it is where upstream has it, and does the same.

Shape letters: B batch, L length, D channels, C chunks, Q tokens a chunk, H heads, P head dim, G groups, N state size.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from compat_shims import randn, shims, upstream  # noqa: F401 (shims: installed for every test)

from scalekern import nn, reference
from scalekern.testing import TOLERANCE, assert_close

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(p) for p in ("mamba_ssm", "causal_conv1d")), reason="an upstream package is installed"
)

# Module below mamba_ssm -> names that others import from it, of 2.2 and of 1.x where it had them elsewhere.
NAMES = {
    "modules.mamba_simple": "Mamba Block RMSNorm layer_norm_fn rms_norm_fn selective_scan_fn mamba_inner_fn "
                            "causal_conv1d_fn causal_conv1d_update selective_state_update",
    "modules.mamba2": "Mamba2 RMSNormGated causal_conv1d_fn causal_conv1d_update selective_state_update "
                      "causal_conv1d_varlen_states mamba_chunk_scan_combined mamba_split_conv1d_scan_combined",
    "modules.mamba2_simple": "Mamba2Simple RMSNormGated LayerNorm mamba_chunk_scan_combined",
    "modules.ssd_minimal": "segsum segsum_unstable ssd_minimal_discrete",
    "modules.block": "Block RMSNorm layer_norm_fn",
    "ops.selective_scan_interface": "selective_scan_fn SelectiveScanFn mamba_inner_fn MambaInnerFn rms_norm_forward "
                                    "causal_conv1d_fwd_function causal_conv1d_bwd_function",
    "ops.triton.layer_norm": "RMSNorm layer_norm_fn rms_norm_fn layer_norm_ref rms_norm_ref layer_norm_linear_fn "
                             "LayerNormFn LayerNormLinearFn",
    "ops.triton.k_activations": "swiglu SwiGLU",
    "ops.triton.ssd_combined": "mamba_chunk_scan_combined MambaChunkScanCombinedFn MambaSplitConv1dScanCombinedFn "
                               "chunk_state chunk_scan state_passing rmsnorm_fn",
    "ops.triton.ssd_chunk_state": "chunk_state chunk_state_ref chunk_state_varlen",
    "ops.triton.ssd_state_passing": "state_passing state_passing_ref",
    "ops.triton.ssd_chunk_scan": "chunk_scan chunk_scan_ref",
    "utils.generation": "InferenceParams GenerationMixin decode sample modify_logits_for_top_k_filtering "
                        "modify_logits_for_top_p_filtering modify_logits_for_min_p_filtering "
                        "modify_logit_for_repetition_penalty",
    "utils.torch": "custom_fwd custom_bwd",
}  # fmt: skip
NORM = "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm dropout_mask dropout_mask1 upcast"
SIGNATURES = {
    "mamba_ssm.modules.mamba_simple.Block": "dim mixer_cls norm_cls fused_add_norm residual_in_fp32",
    "mamba_ssm.ops.triton.layer_norm.layer_norm_ref": NORM,
    "mamba_ssm.ops.triton.layer_norm.rms_norm_ref": NORM,
    "mamba_ssm.ops.triton.layer_norm.layer_norm_linear_fn": "x norm_weight norm_bias linear_weight linear_bias "
                                                            "residual eps prenorm residual_in_fp32 is_rms_norm",
    "mamba_ssm.ops.triton.layernorm_gated.RMSNorm.forward": "self x z",
    "mamba_ssm.modules.ssd_minimal.ssd_minimal_discrete": "X A B C block_len initial_states",
    "mamba_ssm.ops.triton.ssd_chunk_scan.chunk_scan": "B C x dt dA_cumsum prev_states D z",
    "mamba_ssm.ops.triton.ssd_chunk_state.chunk_state_varlen": "B x dt dA_cumsum cu_seqlens chunk_states",
    "causal_conv1d.cpp_functions.causal_conv1d_fwd_function": "x weight bias seq_idx initial_states final_states_out "
                                                              "silu_activation",
    "causal_conv1d.cpp_functions.causal_conv1d_bwd_function": "x weight bias dout seq_idx initial_states dfinal_states "
                                                              "dx return_dinitial_states silu_activation",
}  # fmt: skip


assert_close = functools.partial(assert_close, tolerance=TOLERANCE[torch.float32])


def of(name):
    return upstream(f"mamba_ssm.{name}")


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_upstream_has_them(module):
    found = vars(importlib.import_module(f"mamba_ssm.{module}"))
    assert set(NAMES[module].split()) <= set(found)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name):
    outer, _, last = name.rpartition(".")
    found = getattr(upstream(outer), last) if last == "forward" else upstream(name)
    assert list(inspect.signature(found).parameters) == SIGNATURES[name].split()


def test_the_block_of_1x_has_no_mlp():
    torch.manual_seed(0)
    mixer, x = nn.Mamba(8, d_state=3), randn(2, 5, 8)
    old = of("modules.mamba_simple.Block")(8, lambda dim: mixer, norm_cls=of("modules.mamba_simple.RMSNorm"))
    new = of("modules.block.Block")(8, lambda dim: mixer, torch.nn.Identity, old.norm.__class__)
    assert set(dict(old.named_children())) == {"mixer", "norm"}
    for before in (None, randn(2, 5, 8, seed=1)):
        for a, b in zip(old(x, before), new(x, before)):
            assert torch.equal(a, b)


def test_autograd_functions_by_name():
    u, delta, z = (randn(2, 6, 9, seed=i).requires_grad_() for i in range(3))
    A, B, C = -randn(6, 3).exp(), randn(2, 3, 9, seed=4), randn(2, 3, 9, seed=5)
    args = u, delta, A, B, C, None, z, None, True
    out = of("ops.selective_scan_interface.SelectiveScanFn").apply(*args)
    expected = reference.selective_scan(*args)
    assert_close(out, expected)
    found, wanted = (torch.autograd.grad(t.square().sum(), delta)[0] for t in (out, expected))
    assert_close(found, wanted)
    x, weight = randn(2, 6, 9), randn(6, 4)
    conv = upstream("causal_conv1d.causal_conv1d_interface.CausalConv1dFn").apply
    expected = reference.causal_conv1d(x, weight, activation="silu")
    assert_close(conv(x, weight, None, None, None, False, None, "silu"), expected)
    both = of("ops.triton.k_activations.SwiGLU").apply(x[..., :8])
    assert_close(both, F.silu(x[..., :4]) * x[..., 4:8])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_with_given_masks(kind):
    x, x1, residual = (randn(3, 5, 8, seed=i) for i in range(3))
    weight, bias, other = randn(8), randn(8, seed=1), randn(8, seed=2)
    kept, kept1 = randn(3, 5, 8, seed=7) > 0, randn(3, 5, 8, seed=8) > 0
    total = x.double() * kept / 0.6 + x1.double() * kept1 / 0.6 + residual.double()
    y = total - total.mean(-1, keepdim=True) if kind == "layer" else total
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = of(f"ops.triton.layer_norm.{kind}_norm_ref")(
        x, weight, bias, residual, x1, other, None, eps=1e-5, dropout_p=0.4, prenorm=True, dropout_mask=kept,
        dropout_mask1=kept1,
    )  # fmt: skip
    for a, b in zip(found, (y * weight + bias, y * other, total), strict=True):
        assert_close(a, b)
    half = of(f"ops.triton.layer_norm.{kind}_norm_ref")(x.bfloat16(), weight, bias, prenorm=True, upcast=True)
    assert [t.dtype for t in half] == [torch.bfloat16, torch.float32]
    rows = of(f"ops.triton.layer_norm.{kind}_norm_ref")(x, weight, None, rowscale=x1[..., 0], eps=1e-5)
    alone = x.double() * x1[..., :1]
    alone = alone - alone.mean(-1, keepdim=True) if kind == "layer" else alone
    assert_close(rows, alone / (alone.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight)
    assert of(f"ops.triton.layer_norm.{kind}_norm_ref")(x, weight, None, dropout_p=0.9).shape == x.shape


def test_a_linear_layer_behind_a_norm():
    x, residual, weight, bias, matrix = randn(3, 8), randn(3, 8, seed=1), randn(8), randn(8, seed=1), randn(4, 8)
    out, total = of("ops.triton.layer_norm.layer_norm_linear_fn")(x, weight, bias, matrix, None, residual, 1e-5, True)
    assert_close(total, x + residual)
    assert_close(out, F.layer_norm(x + residual, (8,), weight, bias, 1e-5) @ matrix.T)


@pytest.mark.parametrize("silu, first, last, biased", list(itertools.product((False, True), repeat=4)))
def test_the_convolutions_halves(silu, first, last, biased):
    part = lambda name: upstream(f"causal_conv1d.cpp_functions.causal_conv1d_{name}_function")  # noqa: E731
    x, weight, bias = randn(2, 6, 9), randn(6, 4), randn(6) if biased else None
    before, dout = randn(2, 6, 3, seed=1) if first else None, randn(2, 6, 9, seed=2)
    dlast, ends = randn(2, 6, 3, seed=3) if last else None, torch.zeros(2, 6, 3)
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias, before)]
    expected = reference.causal_conv1d(*exact[:3], None, exact[3], True, "silu" if silu else None)
    out = part("fwd")(x, weight, bias, None, before, ends, silu)
    assert_close(out, expected[0])
    assert_close(ends, expected[1])
    dx = torch.empty_like(x)
    grads = part("bwd")(x, weight, bias, dout, None, before, dlast, dx, first, silu)
    assert grads[0] is dx
    leaves = [t for t in exact if t is not None]
    scalar = (expected[0] * dout).sum() + (0 if dlast is None else (expected[1] * dlast).sum())
    found = [g for g in grads if g is not None]
    for g, wanted in zip(found, torch.autograd.grad(scalar, leaves), strict=True):
        assert_close(g, wanted)
    state, moved = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4)
    token = part("update")(x[..., 0], state, weight, bias, silu, None, None)
    assert_close(token, reference.causal_conv1d_update(x[..., 0], moved, weight, bias, "silu" if silu else None))
    assert torch.equal(state, moved)


def test_filters_of_logits_work_in_place():
    change = lambda name, *args: of(f"utils.generation.modify_{name}")(*args)  # noqa: E731
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.05, 0.05, 0.1, 0.8]])
    gone = lambda logits: logits.isinf().tolist()  # noqa: E731
    change("logits_for_top_k_filtering", k := p.log(), 2)
    assert gone(k) == [[False, True, False, True], [True, True, False, False]]
    change("logits_for_top_p_filtering", k := p.log(), 0.6)
    assert gone(k) == [[False, True, False, True], [True, True, True, False]]
    change("logits_for_top_p_filtering", k := p.log(), 1.0)
    assert not any(map(any, gone(k)))
    change("logits_for_min_p_filtering", k := p.clone(), 0.2)
    assert gone(k) == [[False, True, False, True], [True, True, True, False]]
    logits, seen = torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[0, 1]])
    assert change("logit_for_repetition_penalty", logits, seen, 2.0) is logits
    assert logits.tolist() == [[0.5, -2.0, 2.0]]


# --- Mamba-2's scan, step by step


def scan(x, dt, A, B, C, D=None, z=None, starts=(0,), first=None):
    """(y, state after each token) by the recurrence, one token after the other, in float64; afresh at `starts`."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    state = torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[-1], dtype=torch.float64)
    state = state if first is None else first.double()
    outputs, states = [], []
    for t in range(x.shape[1]):
        state = torch.zeros_like(state) if t in starts and t > 0 else state
        step = dt[:, t, :, None, None]
        state = (step * A[:, None, None]).exp() * state + step * x[:, t, ..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
        states.append(state)
    y = torch.stack(outputs, 1)
    y = y if D is None else y + D.double()[:, None] * x
    return y if z is None else y * F.silu(z.double()), states


def problem(length=19, batch=2):
    x, dt = randn(batch, length, 4, 3), randn(batch, length, 4, seed=1)
    B, C = randn(batch, length, 2, 5), randn(batch, length, 2, 5, seed=1)
    return x, dt, -randn(4).exp(), B, C, randn(4, seed=1), randn(batch, length, 4, 3, seed=2)


def test_a_scan_from_its_steps():
    x, dt, A, B, C, D, z = problem()
    first, bias = randn(2, 4, 3, 5), randn(4, seed=2)
    total, step = of("ops.triton.ssd_chunk_state._chunk_cumsum_fwd")(dt, A, 8, bias, True, (0.1, 1.0))
    sizes = F.softplus(dt + bias).clamp(0.1, 1.0)
    assert_close(step.flatten(2)[..., :19], sizes.transpose(1, 2))
    added = of("ops.triton.ssd_chunk_state.chunk_state")(B, x, step, total)
    passing = of("ops.triton.ssd_state_passing.state_passing")
    before, last = passing(added.flatten(-2), total[..., -1], first.flatten(-2))
    before, last = (t.unflatten(-1, (3, 5)) for t in (before, last))
    y = of("ops.triton.ssd_chunk_scan.chunk_scan")(B, C, x, step, total, before, D, z)
    expected, states = scan(x, sizes, A, B, C, D, z, first=first)
    assert_close(y, expected)
    assert_close(last, states[-1])
    assert_close(before, torch.stack([first.double(), states[7], states[15]], 1))


def test_states_of_packed_sequences_from_the_steps():
    x, dt, A, B, C, _, _ = problem(length=29, batch=1)
    bounds, dt = [0, 3, 8, 9, 26, 29], dt.abs()
    seq_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(bounds).diff())[None].int()
    total, step = of("ops.triton.ssd_chunk_state._chunk_cumsum_fwd")(dt, A, 8)
    added = of("ops.triton.ssd_chunk_state._chunk_state_fwd")(B, x, step, total, seq_idx=seq_idx)
    before, _ = of("ops.triton.ssd_state_passing._state_passing_fwd")(
        added.flatten(-2), total[..., -1], seq_idx=seq_idx, chunk_size=8
    )
    found = of("ops.triton.ssd_chunk_state.chunk_state_varlen")(
        B[0], x[0], step[0], total[0], torch.tensor(bounds), before[0].unflatten(-1, (3, 5))
    )
    _, states = scan(x, dt, A, B, C, starts=bounds)
    assert_close(found, torch.cat([states[end - 1] for end in bounds[1:]]))


def test_the_minimal_scan():
    x, dt, A, B, C, _, _ = problem(length=24)
    B, C = (t.repeat_interleave(2, 2) for t in (B, C))
    first, dt = randn(2, 4, 3, 5), dt.abs()
    minimal = of("modules.ssd_minimal.ssd_minimal_discrete")
    for state in (None, first):
        expected, states = scan(x, dt, A, B, C, first=state)
        y, last = minimal(x * dt[..., None], dt * A, B, C, 8, None if state is None else state[:, None])
        assert_close(y, expected)
        assert_close(last, states[-1])
    with pytest.raises(ValueError, match="block_len must divide the 24 tokens, got 7"):
        minimal(x, dt, B, C, 7)
    unstable, stable = (of(f"modules.ssd_minimal.{n}")(randn(2, 6)) for n in ("segsum_unstable", "segsum"))
    assert torch.equal(stable.isinf(), torch.ones(2, 6, 6, dtype=torch.bool).triu(1))
    assert_close(unstable.tril(), stable.tril())


# --- layers that code derives from


def test_a_layer_with_a_forward_of_its_own():
    """As those who copy upstream's forward into a subclass write it."""

    class Own(of("modules.mamba_simple.Mamba")):
        def forward(self, hidden_states, inference_params=None):
            conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
            x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, 1)
            conv_state.copy_(F.pad(x, (self.d_conv - x.shape[-1], 0)))
            x = self.act(self.conv1d(x)[..., : x.shape[-1]])
            dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], -1)
            dt = self.dt_proj.weight @ dt.transpose(1, 2)
            y, last = of("ops.selective_scan_interface.selective_scan_fn")(
                x, dt, -torch.exp(self.A_log.float()), B.transpose(1, 2), C.transpose(1, 2), self.D.float(), z=z,
                delta_bias=self.dt_proj.bias.float(), delta_softplus=True, return_last_state=True,
            )  # fmt: skip
            ssm_state.copy_(last)
            return self.out_proj(y.transpose(1, 2))

    torch.manual_seed(0)
    own, x = Own(16, d_state=4, layer_idx=0), randn(2, 7, 16)
    plain = nn.Mamba(16, d_state=4)
    plain.load_state_dict(own.state_dict())
    params = of("utils.generation.InferenceParams")(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        parts = [own(x[:, :4], inference_params=params)]
        for params.seqlen_offset in range(4, 7):
            parts.append(own(x[:, params.seqlen_offset, None], inference_params=params))
        assert_close(torch.cat(parts, 1), plain(x))
        states = own._get_states_from_cache(params, 2, initialize_states=True)
    assert not any(state.any() for state in states)


def test_attributes_of_upstreams_layers():
    block = of("modules.mamba2.Mamba2")(16, headdim=4, conv_init=0.1, use_mem_eff_path=False)
    assert (block.process_group, block.world_size, block.local_rank) == (None, 1, 0)
    assert (block.conv_init, block.use_mem_eff_path, block.sequence_parallel) == (0.1, False, True)
    assert torch.equal(block.act(torch.ones(1)), F.silu(torch.ones(1)))
    norm = of("ops.triton.layernorm_gated.LayerNorm")(4)
    torch.nn.init.zeros_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(4)) and not norm.bias.any()
    gated = of("ops.triton.layernorm_gated.RMSNorm")(4)
    assert torch.equal(gated(x=torch.ones(1, 4), z=torch.ones(1, 4)), gated(torch.ones(1, 4), torch.ones(1, 4)))
