"""The real-gated linear recurrent unit of Griffin and Hawk.

Shape letters: B batch, L length, D channels, H heads (blocks of the gates' weights), S packed sequences.

Parameter names and shapes are those of transformers' RecurrentGemmaRglru, whose checkpoints load.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.ops.diag_scan import diag_scan

NAME = "nn.RGLRU"
DECAY = 8.0  # c


class RGLRU(nn.Module):
    """Maps (B, L, D) to (B, L, D): h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t).

    a = exp(-c softplus(Lambda) r), c = 8, with the gates r = sigmoid(W_a x + b_a) and i = sigmoid(W_x x + b_x), whose
    weights are block-diagonal. Computed in float32 at least.

    Args:
        width: D.   n_heads: H, blocks of the gates' weights.

    Source: De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models,
    2024, equations 1 to 4, appendix A.
    """

    def __init__(self, width, n_heads=1, device=None, dtype=None):
        super().__init__()
        if width % n_heads:
            raise ValueError(f"{NAME}: n_heads must divide width {width}, got {n_heads}")
        factory = {"device": device, "dtype": dtype}
        self.width, self.n_heads, block = width, n_heads, width // n_heads
        # At r = 1 the decay is uniform in [0.9, 0.999]: softplus(Lambda) = -log(a) / c.
        decay = torch.empty(width, device=device).uniform_(0.9, 0.999)
        self.recurrent_param = nn.Parameter(torch.log(torch.expm1(-torch.log(decay) / DECAY)).to(**factory))
        for gate in ("input", "recurrent"):
            weight = torch.empty(n_heads, block, block, **factory)
            setattr(self, f"{gate}_gate_weight", nn.Parameter(nn.init.normal_(weight, std=block**-0.5)))
            setattr(self, f"{gate}_gate_bias", nn.Parameter(torch.zeros(n_heads, block, **factory)))

    def forward(self, x, state=None, *, position_ids=None, cu_seqlens=None, return_final_state=False):
        """Run whole sequences, or their next tokens.

        Args:
            x: (B, L, D).
            state: h before the first token, (B, D), or (S, D) when packed; zeros when None.
            position_ids: (B, L) integers: where one is 0 a sequence begins, whose first input is taken as it is,
                without sqrt(1 - a^2), as RecurrentGemma has it. None: all tokens are alike, as in the paper.
            cu_seqlens: (S + 1,) int32 or int64: the batch of 1 holds S sequences end to end.
            return_final_state: also return h after the last token (with cu_seqlens, of each sequence).

        Returns:
            Like x, or (like x, (B, D) or (S, D) in float32 at least).
        """
        a, b = self._coefficients(x, position_ids)
        out, state = diag_scan(a, b, dim=1, initial_state=state, cu_seqlens=cu_seqlens, return_last_state=True)
        return (out.to(x.dtype), state) if return_final_state else out.to(x.dtype)

    def step(self, x, state, position_ids=None):
        """One token: x (B, 1, D); state (B, D) changes in place. Returns (out (B, 1, D), state)."""
        a, b = (t.squeeze(1) for t in self._coefficients(x, position_ids, 1))
        _checks.shape(NAME, "state", state, a.shape)
        h = a * state + b
        state.copy_(h)
        return h.to(x.dtype)[:, None], state

    def allocate_inference_cache(self, batch_size, dtype=None):
        """A zero state (B, D)."""
        wide = dtype or torch.promote_types(self.recurrent_param.dtype, torch.float32)
        return torch.zeros(batch_size, self.width, device=self.recurrent_param.device, dtype=wide)

    def _coefficients(self, x, position_ids, length=None):
        """(a, b), both (B, L, D)."""
        _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.taken_by(self.input_gate_weight))
        _checks.shape(NAME, "x", x, (None, length, self.width))
        if position_ids is not None:
            _checks.shape(NAME, "position_ids", position_ids, x.shape[:2])
        wide = torch.promote_types(x.dtype, torch.float32)
        blocks = x.unflatten(-1, (self.n_heads, -1))
        i, r = (
            torch.sigmoid(
                (torch.einsum("blhd,hde->blhe", blocks, getattr(self, f"{gate}_gate_weight"))
                 + getattr(self, f"{gate}_gate_bias")).flatten(-2).to(wide)
            )
            for gate in ("input", "recurrent")
        )  # fmt: skip
        log_a = -DECAY * F.softplus(self.recurrent_param.to(wide)) * r
        # expm1, since 1 - a^2 of a decay close to 1 has no digits; the bound keeps the root's slope finite at a = 1.
        a, gain = torch.exp(log_a), torch.sqrt((-torch.expm1(2 * log_a)).clamp(min=1e-12))
        if position_ids is not None:
            starts = (position_ids == 0)[..., None]
            a, gain = a.masked_fill(starts, 0), gain.masked_fill(starts, 1)
        return a, gain * i * x.to(wide)
