"""Oracle of one decoding step of a whole Mamba mixer.

Shape letters: B batch, M model width, D channels, N state size, R rank of the step size, W filter width, K tokens of
the convolution's window.

    x, z    = in_proj hidden_states                  (B, D) each
    x       = silu(conv1d step of x)                 conv_state moves on
    t, b, c = x_proj x                               (B, R), (B, N), (B, N); RMS-normalized where rms_eps is given
    y       = scan step of x, delta_proj t, b, c, z  ssm_state moves on
    out     = out_proj y                             (B, M)

With norm_weight the whole residual block: hidden_states + the above of rms_norm(hidden_states) norm_weight.
"""

import torch
import torch.nn.functional as F

from scalekern.reference.causal_conv1d import causal_conv1d_update_op
from scalekern.reference.selective_state_update import selective_state_update_op


def mamba_update(
    hidden_states, conv_state, ssm_state, in_proj_weight, conv1d_weight, conv1d_bias, x_proj_weight,
    delta_proj_weight, out_proj_weight, A_log, D=None, delta_bias=None,
    *, in_proj_bias=None, out_proj_bias=None, rms_eps=None, norm_weight=None, norm_eps=1e-5,
):  # fmt: skip
    """Same arguments as scalekern.mamba_update; changes both states in place and returns the output."""
    return mamba_update_op(
        conv_state, ssm_state, hidden_states, in_proj_weight, in_proj_bias,
        conv1d_weight.reshape(conv1d_weight.shape[0], -1), conv1d_bias, x_proj_weight, delta_proj_weight,
        out_proj_weight, out_proj_bias, A_log, D, delta_bias, norm_weight, -1.0 if rms_eps is None else rms_eps,
        norm_eps,
    )  # fmt: skip


def mamba_update_op(
    conv_state, ssm_state, hidden_states, in_proj_weight, in_proj_bias, conv1d_weight, conv1d_bias, x_proj_weight,
    delta_proj_weight, out_proj_weight, out_proj_bias, A_log, D, delta_bias, norm_weight, rms_eps, norm_eps,
    *, conv=causal_conv1d_update_op, scan=selective_state_update_op,
):  # fmt: skip
    """The op's form, around a given convolution and scan step; a negative rms_eps normalizes nothing."""
    row = lambda t: None if t is None else t[None]  # the axis of heads
    states = A_log.shape[1]
    normed = hidden_states if norm_weight is None else rms_normalized(hidden_states, norm_eps) * norm_weight
    x, z = F.linear(normed, in_proj_weight, in_proj_bias).chunk(2, -1)
    x = conv(conv_state, x[..., None], conv1d_weight, conv1d_bias, None, None, True)[..., 0]
    parts = F.linear(x, x_proj_weight).split([delta_proj_weight.shape[1], states, states], -1)
    t, B, C = parts if rms_eps < 0 else (rms_normalized(part, rms_eps) for part in parts)
    delta = F.linear(t, delta_proj_weight)
    y = scan(
        ssm_state[:, None], x[:, None], delta[:, None], row(-torch.exp(A_log)), B[:, None], C[:, None], row(D),
        z[:, None], row(delta_bias), None, True,
    )  # fmt: skip
    out = F.linear(y[:, 0], out_proj_weight, out_proj_bias)
    return out if norm_weight is None else hidden_states + out


def rms_normalized(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 (float64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
