"""Oracles of the scans over 8-bit inputs: what the codes stand for, through the oracles of the plain scans.

Shape letters: B batch, L length, H heads, P head dim, D channels, G groups of B and C, N state size, S state slots.
"""

import torch

from scalekern.reference.fake_quantize import fake_quantize
from scalekern.reference.selective_scan import selective_scan
from scalekern.reference.selective_scan import selective_scan_bwd as plain_selective_bwd
from scalekern.reference.selective_scan import selective_scan_fwd as plain_selective_fwd
from scalekern.reference.selective_state_update import selective_state_update_op
from scalekern.reference.ssd_scan import ssd_scan
from scalekern.reference.ssd_scan import ssd_scan_bwd as plain_ssd_bwd
from scalekern.reference.ssd_scan import ssd_scan_fwd as plain_ssd_fwd


def _rounded(x, scale):
    """What codes stand for; of numbers, the nearest that a code stands for, with the gradient of what was rounded."""
    return fake_quantize(x.to(scale.dtype), scale) if x.is_floating_point() else x * scale


def quantized_selective_scan(
    u, delta, A, B, C, u_scale, B_scale, C_scale, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False, *, initial_state=None, cu_seqlens=None, reverse=False,
):  # fmt: skip
    """Same arguments and results as scalekern.quantized_selective_scan."""
    real = torch.float64 if delta.dtype == torch.float64 else torch.float32
    B, C = (m if m.dim() == 4 else m[:, None] for m in (B, C))
    u, B, C = dequantize_channels(u, B, C, u_scale, B_scale, C_scale, real)
    found = selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state=initial_state,
        cu_seqlens=cu_seqlens, reverse=reverse,
    )  # fmt: skip
    return (found[0].to(delta.dtype), found[1]) if return_last_state else found.to(delta.dtype)


def quantized_ssd_scan(
    x, dt, A, B, C, x_scale, B_scale, C_scale, chunk_size=256, D=None, z=None, dt_bias=None, initial_states=None,
    seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    return_varlen_states=False,
):  # fmt: skip
    """Same arguments and results as scalekern.quantized_ssd_scan."""
    real = torch.float64 if dt.dtype == torch.float64 else torch.float32
    x, B, C = dequantize_heads(x, B, C, x_scale, B_scale, C_scale, real)
    found = ssd_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit,
        return_final_states, return_varlen_states,
    )  # fmt: skip
    return (found[0].to(dt.dtype), *found[1:]) if isinstance(found, tuple) else found.to(dt.dtype)


def dequantize_channels(u, B, C, u_scale, B_scale, C_scale, real):
    """u (B, D, L), B and C (B, G, N, L) as the numbers that they stand for; u_scale (D,), those of B and C (G,)."""
    scales = u_scale.to(real)[:, None], *(s.to(real)[:, None, None] for s in (B_scale, C_scale))
    return tuple(_rounded(m, s) for m, s in zip((u, B, C), scales))


def dequantize_heads(x, B, C, x_scale, B_scale, C_scale, real):
    """x (B, L, H, P), B and C (B, L, G, N) as the numbers that they stand for; x_scale (H, P)."""
    scales = x_scale.to(real), *(s.to(real)[:, None] for s in (B_scale, C_scale))
    return tuple(_rounded(m, s) for m, s in zip((x, B, C), scales))


def _real(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def quantized_selective_scan_fwd(u, delta, A, B, C, u_scale, B_scale, C_scale, *rest):
    """The registered op: every channel has its step, u_scale (D,). (out, last_state, checkpoints)."""
    u, B, C = dequantize_channels(u, B, C, u_scale, B_scale, C_scale, _real(delta))
    out, *states = plain_selective_fwd(u, delta, A, B, C, *rest)
    return out.to(delta.dtype), *states


def quantized_selective_scan_bwd(dout, dlast_state, u, delta, A, B, C, u_scale, B_scale, C_scale, *rest):
    """(ddelta, dA, du_scale, dB_scale, dC_scale, dD, dz, ddelta_bias, dinitial_state)

    A step's gradient sums that of each number, times its code.
    """
    numbers = dequantize_channels(u, B, C, u_scale, B_scale, C_scale, _real(delta))
    du, ddelta, dA, dB, dC, *others = plain_selective_bwd(dout, dlast_state, numbers[0], delta, A, *numbers[1:], *rest)
    dscales = (du * u).sum((0, 2)), (dB * B).sum((0, 2, 3)), (dC * C).sum((0, 2, 3))
    return ddelta, dA, *(d.to(s.dtype) for d, s in zip(dscales, (u_scale, B_scale, C_scale))), *others


def quantized_ssd_scan_fwd(x, dt, A, B, C, x_scale, B_scale, C_scale, *rest):
    """The registered op: x_scale (H, P). (out, final_states, varlen_states)."""
    x, B, C = dequantize_heads(x, B, C, x_scale, B_scale, C_scale, _real(dt))
    out, *states = plain_ssd_fwd(x, dt, A, B, C, *rest)
    return out.to(dt.dtype), *states


def quantized_ssd_scan_bwd(dout, dfinal, dvarlen, x, dt, A, B, C, x_scale, B_scale, C_scale, *rest):
    """(ddt, dA, dx_scale, dB_scale, dC_scale, dD, dz, ddt_bias, dinitial_states)"""
    numbers = dequantize_heads(x, B, C, x_scale, B_scale, C_scale, _real(dt))
    dx, ddt, dA, dB, dC, *others = plain_ssd_bwd(dout, dfinal, dvarlen, numbers[0], dt, A, *numbers[1:], *rest)
    dscales = (dx * x).sum((0, 1)), (dB * B).sum((0, 1, 3)), (dC * C).sum((0, 1, 3))
    return ddt, dA, *(d.to(s.dtype) for d, s in zip(dscales, (x_scale, B_scale, C_scale))), *others


def quantized_state_update(
    state, x, dt, A, B, C, state_scale, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):  # fmt: skip
    """Same arguments as scalekern.quantized_state_update; changes `state` in place and returns the output."""
    from scalekern.ops.selective_state_update import with_heads

    scale = state_scale if state.dim() == 4 else state_scale[None]
    state, x_, dt, A, B, C, D, z, dt_bias = with_heads(state, x, dt, A, B, C, D, z, dt_bias)
    rest = D, z, dt_bias, state_batch_indices, dt_softplus
    return quantized_state_update_op(state, x_, dt, A, B, C, scale, *rest).reshape(x.shape)


def quantized_state_update_op(state, x, dt, A, B, C, state_scale, D, z, dt_bias, state_batch_indices, dt_softplus):
    """The op's form, everything with heads: state (S, H, P, N) int8, state_scale (H, P)."""
    scale = state_scale.to(_real(x))[..., None]
    hidden = state * scale
    out = selective_state_update_op(hidden, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus)
    rounded = torch.where(scale == 0, 0, hidden / scale).round().clamp(-127, 127).nan_to_num(0).to(torch.int8)
    if state_batch_indices is None:
        state.copy_(rounded)
    else:
        slots = state_batch_indices[state_batch_indices >= 0].long()
        state[slots] = rounded[slots]
    return out
