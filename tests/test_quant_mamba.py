"""Quantized Mamba and Mamba-2 blocks: a plain rendering of the arithmetic, decoding, ranges, training, checkpoints."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET

from scalekern import nn
from scalekern.nn.quant_mamba import quantize_mamba
from scalekern.quant import dequantize
from scalekern.testing import assert_close, error

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")
MAKE = {
    "mamba": lambda: nn.Mamba(16, d_state=4, layer_idx=0, dtype=torch.float64),
    "mamba2": lambda: nn.Mamba2(16, d_state=8, headdim=8, ngroups=2, layer_idx=0, dtype=torch.float64),
}
kinds = pytest.mark.parametrize("kind", MAKE)
precisions = pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])


def made(kind, precision="w8a8", **options):
    """(the float block, the quantized one, inputs)"""
    torch.manual_seed(3)
    block = MAKE[kind]()
    with torch.no_grad():
        for p in (block.D, block.dt_proj.bias if kind == "mamba" else block.dt_bias, block.conv1d.bias):
            p.add_(torch.randn_like(p) * 0.5)
        block.conv1d.weight.mul_(torch.rand(len(block.conv1d.weight), 1, 1, dtype=torch.float64) * 4)
    u = torch.randn(2, 21, 16, dtype=torch.float64)
    options = {"inputs": u} | options
    return block, quantize_mamba(block, precision, **options), u


def multiples(x, step):
    """What 8 bits of x stand for."""
    return (x / step).float().round().clamp(-128, 127).double() * step.double()


def product(layer, x, bias=True):
    """A QuantLinear: its weight as stored, its input turned by a Sylvester matrix, rounded with a step a token."""
    weight = dequantize(layer.quantized_weight, torch.float64)
    if layer.rotation == "hadamard":
        H = torch.ones(1, 1, dtype=torch.float64)
        while len(H) < x.shape[-1]:
            H = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), H)
        x = x @ H / len(H) ** 0.5
    if layer.activation == "int8":
        step = x.float().abs().amax(-1, keepdim=True) / 127
        x = (x.float() / step).round().double() * step.double()
    return x @ weight.T + (0 if layer.bias is None else layer.bias)


def convolved(block, x):
    """(B, L, C): causal, by its taps, then silu."""
    weight, y = block.conv1d.weight[:, 0], torch.zeros_like(x)
    for k in range(4):
        past = x[:, : x.shape[1] - k]
        y[:, k:] += weight[:, 3 - k] * past
    return F.silu(y + block.conv1d.bias)


def plain(kind, q, u):
    """The block token by token, in float64."""
    A = -torch.exp(q.A_log.double())
    zx = product(q.in_proj, u)
    rounds = q.rounding == "int8"
    if kind == "mamba":
        x, z = zx.chunk(2, -1)
        x = convolved(q, multiples(x, q.conv_steps[0]) if rounds else x)
        dt, B, C = product(q.x_proj, x).split([q.dt_rank, 4, 4], -1)
        d = F.softplus(dt @ q.dt_proj.weight.T + q.dt_proj.bias)  # [B, L, D]
        if rounds:
            x = multiples(x, q.x_scale[0])
            B, C = multiples(B, q.B_steps), multiples(C, q.C_steps)
        h, ys = torch.zeros(u.shape[0], x.shape[-1], 4, dtype=torch.float64), []
        for t in range(u.shape[1]):
            h = torch.exp(d[:, t, :, None] * A) * h + (d[:, t] * x[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1) + q.D * x[:, t])
        return product(q.out_proj, torch.stack(ys, 1) * F.silu(z))
    z, x, B, C, dt = zx.split([32, 32, 16, 16, 4], -1)
    B, C = B.unflatten(-1, (2, 8)), C.unflatten(-1, (2, 8))
    if rounds:
        x = multiples(x, q.conv_steps[0])
        B, C = multiples(B, q.conv_steps[1:3, None]), multiples(C, q.conv_steps[3:, None])
    x, B, C = convolved(q, torch.cat([x, B.flatten(-2), C.flatten(-2)], -1)).split([32, 16, 16], -1)
    x, B, C = x.unflatten(-1, (4, 8)), B.unflatten(-1, (2, 8)), C.unflatten(-1, (2, 8))
    if rounds:
        x, B, C = multiples(x, q.x_scale), multiples(B, q.B_steps[:, None]), multiples(C, q.C_steps[:, None])
    d = F.softplus(dt + q.dt_bias)  # [B, L, H]
    h, ys = torch.zeros(u.shape[0], 4, 8, 8, dtype=torch.float64), []
    for t in range(u.shape[1]):
        b, c = (m[:, t].repeat_interleave(2, 1)[:, :, None] for m in (B, C))
        h = torch.exp(d[:, t] * A)[..., None, None] * h + (d[:, t, :, None] * x[:, t])[..., None] * b
        ys.append(((h * c).sum(-1) + q.D[:, None] * x[:, t]).flatten(1))
    y = (torch.stack(ys, 1) * F.silu(z)).unflatten(-1, (2, 16))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * q.norm.weight
    return product(q.out_proj, y)


@kinds
@precisions
def test_is_its_plain_rendering(kind, precision):
    """And the float block, but for the rounding: leaving out one thing that either computes makes a larger error."""
    block, q, u = made(kind, precision)
    with torch.no_grad():
        out, exact = q(u), block(u)
        assert_close(out, plain(kind, q, u), tolerance=1e-9)
        # 4-bit weights of normal rows are off by 0.1 of them; 8-bit ones and 8-bit activations by below 0.01 each.
        bound = {"w8a8": 0.02, "w4a8": 0.2, "w4a16": 0.2}[precision]
        assert error(out, exact) < bound
        spoils = (lambda m: m.D.zero_(), lambda m: m.conv1d.bias.zero_(), lambda m: m.conv1d.weight[..., 0].zero_())
        for spoil in spoils:
            other = copy.deepcopy(q)
            spoil(other)
            assert error(other(u), out) > bound


@kinds
def test_decodes_as_it_prefills(kind):
    _, q, u = made(kind)
    with torch.no_grad():
        whole = q(u)
        for state_dtype in (None, torch.int8):
            _, q, u = made(kind, state_dtype=state_dtype)
            params = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
            parts = [q(u[:, :9], inference_params=params)]
            assert params.key_value_memory_dict[0][1].dtype == (state_dtype or torch.float64)
            for t in range(9, 18):
                params.seqlen_offset = t
                parts.append(q(u[:, t : t + 1], inference_params=params))
            params.seqlen_offset = 18
            parts.append(q(u[:, 18:], inference_params=params))
            # The 8-bit state rounds once a token; without rounding it is the same but for what rounds at halves.
            decoded = torch.cat(parts, 1)
            if state_dtype is None:
                assert_close(decoded, whole, tolerance=1e-9)
            else:
                assert 1e-4 < error(decoded, whole) < 0.03


@kinds
def test_packed_sequences_are_sequences(kind):
    _, q, u = made(kind)
    cu = torch.tensor([0, 5, 5, 21])
    with torch.no_grad():
        packed = q(u[:1], cu_seqlens=cu)
        for b, e in ((0, 5), (5, 21)):
            assert_close(packed[:, b:e], q(u[:1, b:e]), tolerance=1e-9)


@kinds
def test_trains_through_the_rounding(kind):
    """With gradients the same numbers come out, and they reach inputs and steps, as those of the float block nearly."""
    block, q, u = made(kind)
    for name in ("x", "B", "C", "conv"):
        getattr(q, f"{name}_steps").requires_grad_()
    leaf, other = u.clone().requires_grad_(), u.clone().requires_grad_()
    out = q(leaf)
    with torch.no_grad():
        assert_close(out, q(u), tolerance=1e-9)
    w = torch.randn(out.shape, dtype=torch.float64)
    (out * w).sum().backward()
    (block(other) * w).sum().backward()
    assert error(leaf.grad, other.grad) < 0.05
    for name in ("x", "B", "C", "conv"):
        grad = getattr(q, f"{name}_steps").grad
        assert torch.isfinite(grad).all() and grad.ne(0).all(), name


@kinds
def test_ranges_and_checkpoints(kind):
    block, q, u = made(kind, state_dtype=torch.int8)
    before = {k: v.clone() for k, v in block.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())  # the float block has not changed
    groups = q.x_steps.shape
    assert groups == ((1, 4) if kind == "mamba" else (4, 4))
    options = dict(d_state=4) if kind == "mamba" else dict(d_state=8, headdim=8, ngroups=2)
    fresh = type(q)(
        16, **options, head_groups=groups[0], channel_groups=groups[1], state_dtype=torch.int8, dtype=torch.float64
    )  # fmt: skip
    fresh.load_state_dict(q.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(u), q(u))
        # Inputs of another range than the calibration's are clipped: seen, not silent nonsense.
        assert 0.05 < error(q(u * 30), block(u * 30)) < 1.5
    with pytest.raises(ValueError, match="inputs must hold a batch"):
        quantize_mamba(block)
    with pytest.raises(ValueError, match=r"inputs must have shape \(\*, \*, 16\), got \(2, 3, 7\)"):
        quantize_mamba(block, inputs=u.new_zeros(2, 3, 7))
    with pytest.raises(ValueError, match=r"inputs must hold tokens, got shape \(1, 0, 16\)"):
        quantize_mamba(block, inputs=u[:1, :0])
    with pytest.raises(TypeError, match=r"block must be a Mamba2?, got Linear"):
        type(q).from_float(torch.nn.Linear(2, 2), inputs=u)
    with pytest.raises(ValueError, match="precision must be one of 'w8a8'"):
        quantize_mamba(block, "w2a2", inputs=u)
    with pytest.raises(TypeError, match="must be a Mamba or Mamba2, got Linear"):
        quantize_mamba(torch.nn.Linear(2, 2))
