"""Oracle of the state-space-dual scan of Mamba-2 (Dao & Gu 2024, Transformers are SSMs, section 6), token by token.

Shape letters: B batch, L length, H heads, P head dim, G groups of B and C, N state size, S packed sequences.

    d_t   = clamp(softplus(dt_t + dt_bias), dt_limit)      (softplus only if dt_softplus)
    h_t   = exp(d_t A) h_{t-1} + d_t x_t B_t^T             h: (P, N); 0, or an initial state, where a sequence begins
    out_t = (h_t C_t + D x_t) silu(z_t)

Computed in float32, or in float64 for float64 inputs; differentiable by autograd.
"""

import torch
import torch.nn.functional as F


def ssd_scan(
    x, dt, A, B, C, chunk_size=256, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """Same arguments and results as scalekern.ssd_scan."""
    seq_idx = seq_idx if cu_seqlens is None else None
    out, final, varlen = ssd_scan_fwd(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, *dt_limit
    )
    extra = [final] * return_final_states + [varlen] * return_varlen_states
    return (out, *extra) if extra else out


def ssd_scan_fwd(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max):
    """(out, final_states, varlen_states); the last is empty without cu_seqlens."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    xs, d = x.to(real), step_size(dt, dt_bias, dt_softplus, dt_min, dt_max, real)
    states, varlen, final = _states(xs, d, A, B, C, initial_states, seq_idx, cu_seqlens)
    Cs = _heads(C, x.shape[2], real)
    y = (states @ Cs[..., None])[..., 0] if x.shape[1] else torch.zeros_like(xs)
    out = y if D is None else y + (D if D.dim() == 2 else D[:, None]).to(real) * xs
    out = out if z is None else out * F.silu(z.to(real))
    return out.to(x.dtype), final, varlen


def _heads(matrix, heads, dtype):
    """(B, L, G, N) -> (B, L, H, N)"""
    return matrix.to(dtype).repeat_interleave(heads // matrix.shape[2], 2)


def _first_states(xs, B, initial_states, cu_seqlens):
    """(B or S, H, P, N) what each row, or each packed sequence, begins with."""
    rows = xs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = xs.new_zeros(rows, *xs.shape[2:], B.shape[3])
    if initial_states is None:
        return zeros
    initial = initial_states.to(xs.dtype)[:rows]
    return torch.cat([initial, zeros[initial.shape[0] :]])  # a single state is the first sequence's


def _states(xs, d, A, B, C, initial_states, seq_idx, cu_seqlens):
    """([B, L, H, P, N] the states, [S, H, P, N] after each packed sequence, [B, H, P, N] after the last token)"""
    decay, Bs = torch.exp(d * A.to(xs.dtype)), _heads(B, xs.shape[2], xs.dtype)
    first = _first_states(xs, B, initial_states, cu_seqlens)
    begins = starts(xs.shape[0], xs.shape[1], seq_idx, cu_seqlens, xs.device)
    h, states = (first if cu_seqlens is None else torch.zeros_like(first[:0]).new_zeros(1, *first.shape[1:])), []
    for t in range(xs.shape[1]):
        if cu_seqlens is not None and begins[0, t]:
            h = first[int((cu_seqlens <= t).sum()) - 1][None]
        elif t:
            h = torch.where(begins[:, t, None, None, None], 0, h)
        h = decay[:, t, :, None, None] * h + (d[:, t, :, None] * xs[:, t])[..., None] * Bs[:, t, :, None]
        states.append(h)
    varlen = first[:0]
    if cu_seqlens is not None and first.shape[0]:
        bounds = cu_seqlens.tolist()
        varlen = torch.stack(
            [states[e - 1][0] if e > b else first[i] for i, (b, e) in enumerate(zip(bounds, bounds[1:]))]
        )
    return torch.stack(states, 1) if states else first[:, None][:, :0], varlen, h


def ssd_scan_bwd(
    dout, dfinal, dvarlen, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus,
    dt_min, dt_max,
):  # fmt: skip
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states); an absent input's gradient is empty (0,).

    With g_t the gradient of h_t, flowing backward through time:

        g_t  = exp(d_{t+1} A) g_{t+1} + dy_t C_t^T       dC_t = h_t^T dy_t         dB_t = d_t g_t^T x_t
        da_t = exp(d_t A) g_t . h_{t-1}                  dA   = sum d_t da_t       dd_t = A da_t + (g_t B_t) . x_t
        dx_t = d_t g_t B_t + D dy_t
    """
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    xs, d, Aw = x.to(real), step_size(dt, dt_bias, dt_softplus, dt_min, dt_max, real), A.to(real)
    states, _, _ = _states(xs, d, A, B, C, initial_states, seq_idx, cu_seqlens)
    batch, length, heads, _ = x.shape
    Bs, Cs = (_heads(m, heads, real) for m in (B, C))
    skip = 0 if D is None else (D if D.dim() == 2 else D[:, None]).to(real)
    dy, none, dz = dout.to(real), x.new_empty(0), x.new_empty(0)
    if z is not None:
        gate = z.to(real)
        plain = (states @ Cs[..., None])[..., 0] + skip * xs if length else torch.zeros_like(xs)
        sigmoid = torch.sigmoid(gate)
        dz, dy = (dy * plain * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype), dy * gate * sigmoid
    first = _first_states(xs, B, initial_states, cu_seqlens)
    dfirst, g = torch.zeros_like(first), xs.new_zeros(batch, heads, x.shape[3], B.shape[3])
    begins = starts(batch, length, seq_idx, cu_seqlens, x.device)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    if dfinal is not None:
        g = g + dfinal.to(real)
    if dvarlen is not None and bounds is not None:
        for i, (b, e) in enumerate(zip(bounds, bounds[1:])):
            if b == e:
                dfirst[i] += dvarlen[i].to(real)
    dxd, da, dBs, dCs = torch.zeros_like(xs), torch.zeros_like(d), torch.zeros_like(Bs), torch.zeros_like(Cs)
    for t in reversed(range(length)):
        if dvarlen is not None and bounds is not None:
            for i, (b, e) in enumerate(zip(bounds, bounds[1:])):
                if b < e == t + 1:
                    g = g + dvarlen[i].to(real)
        g = g + dy[:, t, :, :, None] * Cs[:, t, :, None]
        begin = begins[:, t, None, None, None]
        index = None if bounds is None else int((cu_seqlens <= t).sum()) - 1
        if bounds is not None and begins[0, t]:
            before = first[index][None]
        elif t:
            before = torch.where(begin, 0, states[:, t - 1])
        else:
            before = first
        decay = torch.exp(d[:, t] * Aw)[..., None, None]
        dCs[:, t] = (states[:, t] * dy[:, t, :, :, None]).sum(2)
        dBs[:, t] = (g * (d[:, t, :, None] * xs[:, t])[..., None]).sum(2)
        dxd[:, t] = (g * Bs[:, t, :, None]).sum(-1)
        da[:, t] = (decay * g * before).sum((-2, -1))
        g = decay * g
        if bounds is not None and begins[0, t]:
            dfirst[index] += g[0]
        elif bounds is None and t == 0:
            dfirst += g
        g = torch.where(begin, 0, g)
    if length == 0 and bounds is None:
        dfirst += g
    dd = (da * Aw + (dxd * xs).sum(-1)) * slope(dt, dt_bias, dt_softplus, dt_min, dt_max, real)
    group = lambda m: m.unflatten(2, (B.shape[2], -1)).sum(3)  # noqa: E731
    dx = dxd * d[..., None] + skip * dy
    dD = none
    if D is not None:
        dD = (dy * xs).sum((0, 1))
        dD = (dD.sum(-1) if D.dim() == 1 else dD).to(D.dtype)
    return (
        dx.to(x.dtype), dd.to(dt.dtype), (d * da).sum((0, 1)).to(A.dtype), group(dBs).to(B.dtype),
        group(dCs).to(C.dtype), dD, dz, none if dt_bias is None else dd.sum((0, 1)).to(dt_bias.dtype),
        none if initial_states is None else dfirst[: initial_states.shape[0]].to(initial_states.dtype),
    )  # fmt: skip


def slope(dt, dt_bias, softplus, low, high, dtype):
    """The derivative of step_size by dt."""
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    d = F.softplus(raw) if softplus else raw
    return torch.where((d >= low) & (d <= high), torch.sigmoid(raw) if softplus else 1.0, 0.0)


def step_size(dt, dt_bias, softplus, low, high, dtype):
    d = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    d = F.softplus(d) if softplus else d
    return d.clamp(low, high)


def starts(batch, length, seq_idx, cu_seqlens, device):
    """(B, L) bool: where a sequence begins, by cu_seqlens or by a change of seq_idx."""
    begins = torch.zeros(batch, length, dtype=torch.bool, device=device)
    if length:
        begins[:, 0] = True
    if seq_idx is not None:
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if cu_seqlens is not None:
        begins[0, cu_seqlens[cu_seqlens < length].long()] = True
    return begins
