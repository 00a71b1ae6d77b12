"""Oracle of one decoding step of the selective scan.

Shape letters: S state slots, B batch, H heads, P head dim (the channels), N state size, G groups of B and C.
"""

import torch
import torch.nn.functional as F


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):  # fmt: skip
    """Same arguments as scalekern.selective_state_update; changes `state` in place and returns the output."""
    from scalekern.ops.selective_state_update import with_heads

    out = selective_state_update_op(*with_heads(state, x, dt, A, B, C, D, z, dt_bias), state_batch_indices, dt_softplus)
    return out.reshape(x.shape)


def selective_state_update_op(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus):
    """The op's form, everything with heads: state (S, H, P, N); x, dt, z (B, H, P); A (H, P, N); B, C (B, G, N)."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, heads, _ = x.shape
    slots = torch.arange(batch, device=x.device) if state_batch_indices is None else state_batch_indices.long()
    valid = slots >= 0
    safe = slots.clamp(min=0)
    d = dt.to(real) if dt_bias is None else dt.to(real) + dt_bias.to(real)
    d = F.softplus(d) if dt_softplus else d
    b, c = (m.to(real).repeat_interleave(heads // m.shape[1], 1)[:, :, None] for m in (B, C))  # (B, H, 1, N)
    if state.shape[0]:
        h = state[safe].to(real)
    else:
        h = torch.zeros(batch, *state.shape[1:], dtype=real, device=x.device)
    h = torch.exp(d[..., None] * A.to(real)) * h + (d * x.to(real))[..., None] * b
    state[safe[valid]] = h[valid].to(state.dtype)
    y = (h * c).sum(-1)
    y = y if D is None else y + D.to(real) * x.to(real)
    y = y if z is None else y * F.silu(z.to(real))
    return torch.where(valid[:, None, None], y, 0).to(x.dtype)
