"""Vision Mamba's block: Mamba read from both ends, under one projection and one gate.

Shape letters: B batch, L tokens, M model width (d_model), D channels (expand * M), N state size, W filter width, R rank
of the step size.

Parameter names and shapes are those of hustvl/Vim's mamba_simple.Mamba with bimamba_type "v2", so its checkpoints load:

    in_proj, out_proj                                Linear: M to 2 D, D to M
    conv1d, x_proj, dt_proj, A_log, D                as in nn.Mamba: the scan from the first token on
    conv1d_b, x_proj_b, dt_proj_b, A_b_log, D_b      the same of the scan from the last token on

Source: Zhu et al., Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, 2024,
section 3.3 and algorithm 1. Its norm and residual sum are the caller's, as in nn.Mamba.

BiMambaWrapper reads from both ends with two whole mixers, Mamba or Mamba2, as kuleshov-group/caduceus has it (names
mamba_fwd and mamba_rev).
"""

import math

import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn.mamba import Mamba, diagonal, negative_exp, step_projection
from scalekern.nn.mamba2 import Mamba2
from scalekern.ops.causal_conv1d import causal_conv1d
from scalekern.ops.selective_scan import selective_scan

NAME = "nn.BiMamba"
WRAPPER = "nn.BiMambaWrapper"
MIXERS = {"mamba": Mamba, "mamba2": Mamba2}


class BiMamba(nn.Module):
    """Maps (B, L, M) to (B, L, M), each token from all: out_proj(y silu(z) + y_b silu(z)).

    Nothing is flipped: the second scan runs in reverse, its convolution looks ahead. All memory is linear in L.

    Args:
        d_model: M.   d_state: N.   d_conv: W, 2 to 8.   expand: D / M.   dt_rank: R, or "auto" for ceil(M / 16).
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias: as in nn.Mamba.
        if_divide_out: halve the sum of both directions, as upstream's released models do and the paper does not.

    Source: Zhu et al., Vision Mamba, 2024, section 3.3 and algorithm 1.
    """

    def __init__(
        self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=0.001, dt_max=0.1, dt_init="random",
        dt_scale=1.0, dt_init_floor=1e-4, conv_bias=True, bias=False, if_divide_out=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _checks.choice(NAME, "dt_init", dt_init, ("random", "constant"))
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = D = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.if_divide_out = if_divide_out
        self.in_proj = nn.Linear(d_model, 2 * D, bias=bias, **factory)
        for b in ("", "_b"):
            conv = nn.Conv1d(D, D, d_conv, groups=D, padding=d_conv - 1, bias=conv_bias, **factory)
            self.add_module(f"conv1d{b}", conv)
            self.add_module(f"x_proj{b}", nn.Linear(D, self.dt_rank + 2 * d_state, bias=False, **factory))
            step = step_projection(self.dt_rank, D, dt_init, dt_scale, dt_min, dt_max, dt_init_floor, factory)
            self.add_module(f"dt_proj{b}", step)
        self.A_log, self.D = diagonal(D, d_state, device)
        self.A_b_log, self.D_b = diagonal(D, d_state, device)
        self.out_proj = nn.Linear(D, d_model, bias=bias, **factory)

    def forward(self, hidden_states, *, mask=None):
        """Both scans over whole sequences.

        Args:
            hidden_states: (B, L, M).
            mask: (B, L), zero or False where a row is padded, on either side: a row then gives what it gives alone.

        Returns:
            (B, L, M).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(NAME, "hidden_states", hidden_states, dims=3, dtypes=_checks.taken_by(self.in_proj))
        _checks.shape(NAME, "hidden_states", hidden_states, (None, None, self.d_model))
        if mask is not None:
            _checks.shape(NAME, "mask", mask, hidden_states.shape[:2])
        x, z = self.in_proj(hidden_states).chunk(2, -1)  # [B, L, D] each
        padding = None if mask is None else (mask == 0)[..., None]
        x, z = x if mask is None else x.masked_fill(padding, 0), z.transpose(1, 2)
        ahead = self.d_conv - 1
        forward = causal_conv1d(x.transpose(1, 2), *_taps(self.conv1d), activation="silu")
        y = self._scan(forward, z, padding, self.x_proj, self.dt_proj, self.A_log, self.D, False)
        # Seen from the last token, a convolution's taps are those of a causal one in reverse, `ahead` tokens early.
        taps, bias = _taps(self.conv1d_b)
        later = F.pad(x, (0, 0, 0, ahead)).transpose(1, 2)
        backward = causal_conv1d(later, taps.flip(1), bias, activation="silu")[..., ahead:]
        y = y + self._scan(backward, z, padding, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, True)
        return self.out_proj((y / 2 if self.if_divide_out else y).transpose(1, 2))

    def _scan(self, x, z, padding, x_proj, dt_proj, A_log, D, reverse):
        """[B, D, L], gated; `padding` leaves the state at zero up to a row's first token."""
        x = x if padding is None else x.masked_fill(padding.transpose(1, 2), 0)
        dt, B, C = x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.linear(dt, dt_proj.weight).transpose(1, 2)  # its bias is the scan's delta_bias
        return selective_scan(
            x, dt, negative_exp(A_log), B.transpose(1, 2), C.transpose(1, 2), D, z=z, delta_bias=dt_proj.bias,
            delta_softplus=True, reverse=reverse,
        )  # fmt: skip


def _taps(conv):
    return conv.weight.squeeze(1), conv.bias


class BiMambaWrapper(nn.Module):
    """Maps (B, L, M) to (B, L, M): mamba_fwd(u) + flip(mamba_rev(flip(u))), or their product.

    Args:
        d_model: M.   mixer: "mamba" or "mamba2", which upstream does not have.   options: of nn.Mamba or nn.Mamba2.
        bidirectional_strategy: "add" or "ew_multiply".
        bidirectional_weight_tie: both share in_proj and out_proj, where most parameters are.

    Raises:
        ValueError: another mixer or strategy.

    Source: Schiff et al., Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling, 2024, section 3.1
    (BiMamba); the mixer of Dao & Gu, Transformers are SSMs, 2024.
    """

    def __init__(
        self, d_model, bidirectional_strategy="add", bidirectional_weight_tie=True, mixer="mamba", device=None,
        dtype=None, **options,
    ):  # fmt: skip
        super().__init__()
        _checks.choice(WRAPPER, "mixer", mixer, tuple(MIXERS))
        _checks.choice(WRAPPER, "bidirectional_strategy", bidirectional_strategy, ("add", "ew_multiply"))
        self.strategy = bidirectional_strategy
        self.mamba_fwd = MIXERS[mixer](d_model, device=device, dtype=dtype, **options)
        self.mamba_rev = MIXERS[mixer](d_model, device=device, dtype=dtype, **options)
        if bidirectional_weight_tie:
            for one in ("in_proj", "out_proj"):
                ours, other = getattr(self.mamba_fwd, one), getattr(self.mamba_rev, one)
                other.weight, other.bias = ours.weight, ours.bias

    def forward(self, hidden_states, *, mask=None):
        """Whole sequences: arguments, result and errors as BiMamba.forward's."""
        flipped = None if mask is None else mask.flip(1)
        y = self.mamba_fwd(hidden_states, mask=mask)
        back = self.mamba_rev(hidden_states.flip(1), mask=flipped).flip(1)
        return y + back if self.strategy == "add" else y * back
