"""Languini's quasi-LSTM: a cell whose gates do not read the hidden state, and the residual block around it.

Shape letters: B batch, L length, M model width, D = heads x head_dim channels of the cell, S packed sequences.

Parameter names are those of the Languini codebase's MultiHeadQuasiLSTMCell and Block, whose checkpoints load (its two
buffers of masks have no counterpart: strict=False).
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.ops.diag_scan import diag_scan

NAME = "nn.QuasiLSTM"


class QuasiLSTM(nn.Module):
    """Maps (B, L, M) to (B, L, M): c_t = f_t c_{t-1} + i_t z_t, y_t = W (o_t tanh(c_t)) + w.

    f = sigmoid(F x + 1), i = sigmoid(I x), z = tanh(Z x) and o = sigmoid(O x), with biases. Gates and cell are computed
    in float32 at least. The heads of upstream's cell share nothing but their width.

    Args:
        d_model: M.   n_heads: heads.   head_dim: channels of a head, M / heads when None.

    Source: Stanic et al., The Languini Kitchen: Enabling Language Modelling Research at Different Scales of Compute,
    2023, section on the quasi-LSTM.
    """

    def __init__(self, d_model, n_heads=1, head_dim=None, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.width = d_model, n_heads * (d_model // n_heads if head_dim is None else head_dim)
        for gate in "FIZO":
            setattr(self, f"linear_{gate}x", _linear(d_model, self.width, **factory))
        self.linear_post_head = _linear(self.width, d_model, **factory)

    def forward(self, x, state=None, *, cu_seqlens=None, return_final_state=False):
        """Run whole sequences, or their next tokens.

        Args:
            x: (B, L, M).
            state: c before the first token, (B, D), or (S, D) when packed; zeros when None.
            cu_seqlens: (S + 1,) int32 or int64: the batch of 1 holds S sequences end to end.
            return_final_state: also return c after the last token (with cu_seqlens, of each sequence).

        Returns:
            Like x, or (like x, (B, D) or (S, D) in float32 at least).
        """
        f, update, o = self._gates(x)
        c, state = diag_scan(f, update, dim=1, initial_state=state, cu_seqlens=cu_seqlens, return_last_state=True)
        out = self.linear_post_head((o * torch.tanh(c)).to(self.linear_post_head.weight.dtype))
        return (out, state) if return_final_state else out

    def step(self, x, state):
        """One token: x (B, 1, M); state (B, D) changes in place. Returns (out (B, 1, M), state)."""
        f, update, o = (gate.squeeze(1) for gate in self._gates(x, 1))
        _checks.shape(NAME, "state", state, f.shape)
        state.copy_(f * state + update)
        out = self.linear_post_head((o * torch.tanh(state)).to(self.linear_post_head.weight.dtype))
        return out[:, None], state

    def allocate_inference_cache(self, batch_size, dtype=None):
        """A zero state (B, D)."""
        weight = self.linear_post_head.weight
        wide = dtype or torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(batch_size, self.width, device=weight.device, dtype=wide)

    def _gates(self, x, length=None):
        _check(x, self.d_model, length)
        f, i, z, o = (getattr(self, f"linear_{gate}x")(x) for gate in "FIZO")
        f, i, z, o = (g.to(torch.promote_types(g.dtype, torch.float32)) for g in (f, i, z, o))
        return torch.sigmoid(f + 1), torch.sigmoid(i) * torch.tanh(z), torch.sigmoid(o)


class QuasiLSTMBlock(nn.Module):
    """x + rnn(ln1(x)), then x + mlp(ln2(x)), as (B, L, M): a QuasiLSTM and a GELU MLP, each behind its layer norm.

    Args:
        d_model: M.   d_mlp: width of the MLP.   n_heads, head_dim: of the QuasiLSTM.
        n_layers: of the model; the MLP's last projection starts with a deviation of 0.02 / sqrt(2 n_layers).

    Source: Stanic et al., The Languini Kitchen, 2023, section on the quasi-LSTM; the block is that of its GPT model.
    """

    def __init__(self, d_model, d_mlp, n_heads=1, head_dim=None, n_layers=1, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.ln1, self.ln2 = nn.LayerNorm(d_model, **factory), nn.LayerNorm(d_model, **factory)
        self.rnn = QuasiLSTM(d_model, n_heads, head_dim, **factory)
        self.mlp = nn.Module()
        self.mlp.c_fc = _linear(d_model, d_mlp, **factory)
        self.mlp.c_proj = _linear(d_mlp, d_model, std=0.02 * (2 * n_layers) ** -0.5, **factory)

    def forward(self, x, state=None, *, cu_seqlens=None, return_final_state=False):
        """As QuasiLSTM's."""
        _check(x, self.rnn.d_model)
        out, state = self.rnn(self.ln1(x), state, cu_seqlens=cu_seqlens, return_final_state=True)
        out = self._mlp(x + out)
        return (out, state) if return_final_state else out

    def step(self, x, state):
        """As QuasiLSTM's."""
        _check(x, self.rnn.d_model, 1)
        out, state = self.rnn.step(self.ln1(x), state)
        return self._mlp(x + out), state

    def allocate_inference_cache(self, batch_size, dtype=None):
        """A zero state (B, D)."""
        return self.rnn.allocate_inference_cache(batch_size, dtype)

    def _mlp(self, x):
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln2(x)), approximate="tanh"))


def _check(x, width, length=None):
    _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.FLOATING)
    _checks.shape(NAME, "x", x, (None, length, width))


def _linear(inputs, outputs, std=0.02, **factory):
    layer = nn.Linear(inputs, outputs, **factory)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
