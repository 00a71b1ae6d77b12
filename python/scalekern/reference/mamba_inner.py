"""Oracle of the inner part of a Mamba block, and its derivative written out.

Shape letters: B batch, L length, D channels, N state size (NB = N, or 2 N for a complex A), R rank of the step size,
M model width, W filter width.

    x, z    = xz                                     (B, D, L) each
    x       = silu(conv1d(x))
    t, b, c = x_proj x                               (B, L, R), (B, L, NB), (B, L, NB)
    delta   = norm(delta_proj t)                     each norm only where its RMS weight is given
    B, C    = norm(b + B_proj_bias), norm(c + C_proj_bias)
    y       = selective_scan(x, delta, A, B, C, D, z, delta_bias)
    out     = out_proj y                             (B, L, M)

`mamba_inner` is differentiable by autograd. `mamba_inner_fwd` and `mamba_inner_bwd` are the same computation in two
explicit halves around a given convolution and scan: with the oracles of those two they are this op's reference, with
the registered ops its implementation on every device.
"""

import torch
import torch.nn.functional as F

from scalekern.reference.causal_conv1d import causal_conv1d, causal_conv1d_bwd, causal_conv1d_fwd
from scalekern.reference.selective_scan import selective_scan, selective_scan_bwd, selective_scan_fwd

KEEP_NOTHING = -1  # the forward of a call that nobody differentiates
KEEP_ALL = 0  # upstream's checkpoint_lvl 0: the convolution's output and the step sizes are kept
RECOMPUTE = 1  # checkpoint_lvl 1: they are computed again


def mamba_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1,
    b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """Same arguments and results as scalekern.mamba_inner; `checkpoint_lvl` changes nothing here."""
    channels, rank = delta_proj_weight.shape
    width = A.shape[1] * (2 if A.is_complex() else 1)
    x, z = xz[:, :channels], xz[:, channels:]
    x = causal_conv1d(x, conv1d_weight.reshape(channels, -1), conv1d_bias, activation="silu")
    projected = x.transpose(1, 2) @ x_proj_weight.T
    delta = projected[..., :rank] @ delta_proj_weight.T
    if dt_rms_weight is not None:
        delta = rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        B = _projected(projected[..., rank : rank + width], B_proj_bias, b_rms_weight, b_c_dt_rms_eps, A)
    if C is None:
        C = _projected(projected[..., -width:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps, A)
    y = selective_scan(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    out = y.transpose(1, 2) @ out_proj_weight.T
    return out if out_proj_bias is None else out + out_proj_bias


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (float64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def rms_norm_bwd(dout, x, weight, eps):
    """(dx, dweight). With r = 1 / sqrt(mean(x^2) + eps) and g = dout weight:  dx = r (g - x r mean(g x r))"""
    wide = torch.promote_types(x.dtype, torch.float32)
    g, x_ = dout.to(wide), x.to(wide)
    r = torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)
    unit = x_ * r
    dweight = (g * unit).flatten(0, -2).sum(0)
    g = g * weight.to(wide)
    return (r * (g - unit * (g * unit).mean(-1, keepdim=True))).to(x.dtype), dweight.to(weight.dtype)


def _projected(rows, bias, rms_weight, eps, A):
    """(B, L, NB) as it comes from x_proj -> the scan's matrix (B, 1, N, L)."""
    rows = rows if bias is None else rows + bias
    rows = rows if rms_weight is None else rms_norm(rows, rms_weight, eps)
    if A.is_complex():
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = torch.complex(wide[..., ::2], wide[..., 1::2])
    return rows.transpose(1, 2)[:, None]


def _projected_bwd(dmatrix, rows, bias, rms_weight, eps):
    """(drows, dbias, drms_weight) of `_projected`."""
    drows = dmatrix[:, 0].transpose(1, 2)
    drows = torch.view_as_real(drows).flatten(-2) if drows.is_complex() else drows
    drows, drms_weight = drows.to(rows.dtype), None
    if rms_weight is not None:
        shifted = rows if bias is None else rows + bias
        drows, drms_weight = rms_norm_bwd(drows, shifted, rms_weight, eps)
    return drows, None if bias is None else drows.flatten(0, 1).sum(0), drms_weight


def _front(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, B, C, A, B_proj_bias, C_proj_bias,
    b_rms_weight, c_rms_weight, dt_rms_weight, eps, conv, kept=None, linear=F.linear,
):  # fmt: skip
    """Everything before the scan: (x, projected, raw step sizes (B, L, D), delta (B, D, L), B, C).

    `kept` is (x, raw step sizes) where the forward kept them.
    """
    channels, rank = delta_proj_weight.shape
    width = A.shape[1] * (2 if A.is_complex() else 1)
    if kept is None:
        x, _ = conv(xz[:, :channels], conv1d_weight, conv1d_bias, None, None, None, True)
    else:
        x = kept[0]
    projected = linear(x.transpose(1, 2), x_proj_weight)
    steps = linear(projected[..., :rank], delta_proj_weight) if kept is None else kept[1]
    delta = steps if dt_rms_weight is None else rms_norm(steps, dt_rms_weight, eps)
    if B is None:
        B = _projected(projected[..., rank : rank + width], B_proj_bias, b_rms_weight, eps, A)
    if C is None:
        C = _projected(projected[..., -width:], C_proj_bias, c_rms_weight, eps, A)
    return x, projected, steps, delta.transpose(1, 2), B, C


def mamba_inner_fwd(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
    delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight, eps, delta_softplus, keep,
    *, conv=causal_conv1d_fwd, scan=selective_scan_fwd, linear=F.linear,
):  # fmt: skip
    """(out, y, checkpoints, x, raw step sizes); what `keep` does not ask for is empty (0,)."""
    x, _, steps, delta, B, C = _front(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, B, C, A, B_proj_bias, C_proj_bias,
        b_rms_weight, c_rms_weight, dt_rms_weight, eps, conv, linear=linear,
    )  # fmt: skip
    z = xz[:, x.shape[1] :]
    y, _, checkpoints = scan(x, delta, A, B, C, D, z, delta_bias, None, None, delta_softplus, False, keep >= 0)
    out = linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
    empty = xz.new_empty
    if keep == KEEP_NOTHING:
        return out, empty(0), A.new_empty(0), empty(0), empty(0)
    return (out, y, checkpoints, x, steps) if keep == KEEP_ALL else (out, y, checkpoints, empty(0), empty(0))


def mamba_inner_bwd(
    dout, y, checkpoints, x, steps, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight, eps,
    delta_softplus,
    *, conv=causal_conv1d_fwd, conv_bwd=causal_conv1d_bwd, scan_bwd=selective_scan_bwd, linear=F.linear,
):  # fmt: skip
    """The gradient of every tensor from xz to dt_rms_weight, in that order; an absent one's is empty (0,)."""
    channels, rank = delta_proj_weight.shape
    width = A.shape[1] * (2 if A.is_complex() else 1)
    x, projected, steps, delta, B_, C_ = _front(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, B, C, A, B_proj_bias, C_proj_bias,
        b_rms_weight, c_rms_weight, dt_rms_weight, eps, conv,
        kept=(x, steps) if x.numel() else None, linear=linear,
    )  # fmt: skip
    z = xz[:, channels:]
    # out = out_proj y
    dy = (dout @ out_proj_weight).transpose(1, 2)
    dout_proj = _outer(dout, y.transpose(1, 2))
    dout_bias = None if out_proj_bias is None else dout.flatten(0, 1).sum(0)
    # y = scan(x, delta, B, C)
    dx, ddelta, dA, dB, dC, dD, dz, ddelta_bias, _ = scan_bwd(
        dy, None, x, delta, A, B_, C_, D, z, delta_bias, None, None, checkpoints, delta_softplus, False
    )
    # delta, B, C = norms of the projections of x
    dsteps, ddt_rms = ddelta.transpose(1, 2), None
    if dt_rms_weight is not None:
        dsteps, ddt_rms = rms_norm_bwd(dsteps, steps, dt_rms_weight, eps)
    parts = [dsteps @ delta_proj_weight]
    dB_bias = dC_bias = db_rms = dc_rms = None
    if B is None:
        rows = projected[..., rank : rank + width]
        drows, dB_bias, db_rms = _projected_bwd(dB, rows, B_proj_bias, b_rms_weight, eps)
        parts.append(drows)
    if C is None:
        drows, dC_bias, dc_rms = _projected_bwd(dC, projected[..., -width:], C_proj_bias, c_rms_weight, eps)
        parts.append(drows)
    dprojected = torch.cat(parts, -1)
    ddelta_proj = _outer(dsteps, projected[..., :rank])
    dx_proj = _outer(dprojected, x.transpose(1, 2))
    # x feeds the scan and the projections
    dx = dx + (dprojected @ x_proj_weight).transpose(1, 2)
    dx, dconv_weight, dconv_bias, _ = conv_bwd(
        dx, None, xz[:, :channels], conv1d_weight, conv1d_bias, None, None, None, True
    )
    dxz = torch.empty_like(xz)  # in xz's layout, which torch.cat would not keep
    dxz[:, :channels], dxz[:, channels:] = dx, dz
    gradients = (
        dxz, dconv_weight, conv1d_bias is not None and dconv_bias, dx_proj, ddelta_proj, dout_proj,
        dout_bias, dA, B is not None and dB, C is not None and dC, D is not None and dD,
        delta_bias is not None and ddelta_bias, dB_bias, dC_bias, db_rms, dc_rms, ddt_rms,
    )  # fmt: skip
    return tuple(xz.new_empty(0) if g is None or g is False else g for g in gradients)


def _outer(dout, x):
    """The gradient of the weight in dout = x weight.T, summed over batch and length."""
    return dout.flatten(0, 1).T @ x.flatten(0, 1)
