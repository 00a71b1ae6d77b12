"""The Mamba block: gated projection, short convolution, selective scan, output projection.

Shape letters: B batch, L length, M model width (d_model), D channels (expand * M), N state size, W filter width,
R rank of the step size, S packed sequences.

Parameter names, shapes and initialization are those of mamba_ssm.modules.mamba_simple.Mamba, so its checkpoints load.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn._cached import CachedStates, pair
from scalekern.nn._quantized_step import quantized_step
from scalekern.ops._linear import is_plain, linear, project
from scalekern.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from scalekern.ops.mamba_inner import mamba_inner
from scalekern.ops.mamba_update import mamba_update
from scalekern.ops.selective_scan import selective_scan
from scalekern.ops.selective_state_update import selective_state_update

NAME = "nn.Mamba"


def step_projection(rank, channels, init, scale, low, high, floor, factory):
    """dt_proj: softplus(bias) is log-uniform in [low, high]; the weight keeps the variance of its input."""
    proj, bound = nn.Linear(rank, channels, **factory), rank**-0.5 * scale
    with torch.no_grad():
        if init == "constant":
            nn.init.constant_(proj.weight, bound)
        else:
            nn.init.uniform_(proj.weight, -bound, bound)
        low, high = math.log(low), math.log(high)
        uniform = torch.rand(channels, dtype=torch.float32, device=proj.bias.device)
        dt = torch.exp(uniform * (high - low) + low).clamp(min=floor)
        proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    # Initializers that walk a model and zero every bias look for this mark.
    proj.bias._no_reinit = True
    return proj


def diagonal(channels, d_state, device):
    """A_log and D: A is -1 .. -N in every channel (S4D-real), kept as a logarithm, in float32 whatever the dtype."""
    A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).repeat(channels, 1)
    A_log, D = nn.Parameter(torch.log(A)), nn.Parameter(torch.ones(channels, device=device))
    A_log._no_weight_decay = D._no_weight_decay = True
    return A_log, D


def negative_exp(A_log):
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


class Mamba(CachedStates, nn.Module):
    """Maps (B, L, M) to (B, L, M).

    Args:
        d_model: M.   d_state: N.   d_conv: W, 2 to 8.   expand: D / M.
        dt_rank: R, or "auto" for ceil(M / 16).
        dt_min, dt_max: the initial step sizes lie between them, uniform in their logarithm, at least dt_init_floor.
        dt_init: "random" or "constant", the initial dt_proj weight; dt_scale multiplies it.
        conv_bias, bias: whether the convolution and the two outer projections have a bias.
        use_fast_path: train through one autograd node that recomputes its intermediates (mamba_inner); without it,
            through the separate ops, which keep them.
        layer_idx: the key of this layer's states in `inference_params.key_value_memory_dict`.

    Source: Gu & Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, sections 3.2 to 3.6;
    the interface of state-spaces/mamba.
    """

    NAME = NAME
    # What QuantMamba puts other arithmetic in place of.
    _scan = staticmethod(selective_scan)
    _update = staticmethod(selective_state_update)

    def _before_conv(self, x):
        return x

    def _fuses(self, ssm_state):
        """Whether a step is the one of the float block, but for its projections' weights."""
        return True

    def __init__(
        self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=0.001, dt_max=0.1, dt_init="random",
        dt_scale=1.0, dt_init_floor=1e-4, conv_bias=True, bias=False, use_fast_path=True, layer_idx=None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _checks.choice(NAME, "dt_init", dt_init, ("random", "constant"))
        _checks.choice(NAME, "d_conv", d_conv, range(2, 9))
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        _checks.at_least(NAME, "dt_rank", self.dt_rank, 1)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation = "silu"
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = step_projection(
            self.dt_rank, self.d_inner, dt_init, dt_scale, dt_min, dt_max, dt_init_floor, factory
        )
        self.A_log, self.D = diagonal(self.d_inner, d_state, device)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self, hidden_states, inference_params=None, *, mask=None, cu_seqlens=None, initial_states=None,
        return_final_states=False,
    ):  # fmt: skip
        """Run a whole sequence, or its next tokens.

        Args:
            hidden_states: (B, L, M).
            inference_params: as upstream, an object with `key_value_memory_dict`, `seqlen_offset` and
                `batch_size_offset`: this layer's states live there and are updated in place. At offset 0 they are
                started afresh; later, any number of tokens continues them.
            mask: (B, L), zero or False where a row is padded on the left.
            cu_seqlens: (S + 1,) int32 or int64: the batch of 1 holds S sequences end to end.
            initial_states: (conv_state, ssm_state) before the first token, as `allocate_inference_cache` lays them
                out, one row a batch row or packed sequence. Not changed; gradients flow into them.
            return_final_states: also return the (conv_state, ssm_state) after the last token.

        Returns:
            (B, L, M), or ((B, L, M), (conv_state, ssm_state)).
        """
        _checks.tensor(NAME, "hidden_states", hidden_states, dims=3, dtypes=_checks.taken_by(self.in_proj))
        _checks.shape(NAME, "hidden_states", hidden_states, (None, None, self.d_model))
        if mask is not None and (cu_seqlens is not None or initial_states is not None):
            raise ValueError(f"{NAME}: mask goes with neither cu_seqlens nor initial_states")
        if inference_params is not None:
            if cu_seqlens is not None or initial_states is not None or return_final_states:
                raise ValueError(f"{NAME}: inference_params holds the states: no cu_seqlens, initial or final states")
            return self._forward_cached(hidden_states, inference_params, mask)
        if initial_states is None and cu_seqlens is None and mask is None and not return_final_states:
            return self._forward_plain(hidden_states)
        out, states = self._forward_states(hidden_states, mask, cu_seqlens, initial_states)
        return (out, states) if return_final_states else out

    def _forward_plain(self, hidden_states):
        if not (self.use_fast_path and self._plain_projections()):
            return self._forward_states(hidden_states, None, None, None)[0]
        return mamba_inner(
            project(self.in_proj, hidden_states).transpose(1, 2), self.conv1d.weight, self.conv1d.bias,
            self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight, self.out_proj.bias, self._A(), D=self.D,
            delta_bias=self.dt_proj.bias,
        )  # fmt: skip

    def _from_states(self, hidden_states, mask, states):
        return self._forward_states(hidden_states, mask, None, states)

    def _forward_states(self, hidden_states, mask, cu_seqlens, initial_states):
        """The separate ops, from states to states."""
        conv_state, ssm_state = pair(NAME, initial_states)
        if mask is not None:
            _checks.padding(NAME, mask, hidden_states, *hidden_states.shape[:2])
        # A negative seq_idx is padding: the convolution gives zero there and does not look back into it. A zero
        # input then leaves the scan's state at zero up to the first real token.
        seq_idx = None if mask is None else (mask != 0).to(torch.int32) - 1
        xz = project(self.in_proj, hidden_states).transpose(1, 2)
        x, z = xz.chunk(2, dim=1)  # [B, D, L] each, channels-last
        x, conv_state = causal_conv1d(
            self._before_conv(x), self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx=seq_idx,
            initial_states=None if conv_state is None else conv_state[..., 1:].to(x.dtype),
            return_final_states=True, activation=self.activation, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        parts = project(self.x_proj, x.transpose(1, 2)).transpose(1, 2)
        dt, B, C = parts.split([self.dt_rank, self.d_state, self.d_state], 1)
        dt, bias = self._steps(dt.transpose(1, 2))
        y, ssm_state = self._scan(
            x, dt.transpose(1, 2), self._A(), B, C, self.D, z=z, delta_bias=bias, delta_softplus=True,
            return_last_state=True, initial_state=ssm_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        # The state holds W tokens as upstream's does; the oldest of them is no longer read by anything.
        return project(self.out_proj, y.transpose(1, 2)), (F.pad(conv_state, (1, 0)), ssm_state)

    def _plain_projections(self):
        """Whether the fused ops may read the projections' weights: none is quantized, adapted or watched by a hook."""
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):  # a generator takes 15 us of a step
            if not is_plain(self._modules[name]):
                return False
        return True

    def _steps(self, dt):
        """(..., R) -> the raw step sizes (..., D), and their bias where the scan is to add it, in float32."""
        proj = self._modules["dt_proj"]
        return (linear(dt, proj.weight), proj.bias) if is_plain(proj) else (proj(dt), None)

    def _A(self):
        return negative_exp(self.A_log)

    def step(self, hidden_states, conv_state, ssm_state):
        """One token: hidden_states (B, 1, M); both states change in place. Returns (out, conv_state, ssm_state)."""
        _checks.tensor(NAME, "hidden_states", hidden_states, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "hidden_states", hidden_states, (None, 1, self.d_model))
        if not self._plain_projections():
            out = quantized_step(self, hidden_states, conv_state, ssm_state) if self._fuses(ssm_state) else None
            out = self._step_by_parts(hidden_states, conv_state, ssm_state) if out is None else out
            return out, conv_state, ssm_state
        out = mamba_update(
            hidden_states.squeeze(1), conv_state, ssm_state, self.in_proj.weight, self.conv1d.weight,
            self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight, self.A_log, self.D,
            self.dt_proj.bias, in_proj_bias=self.in_proj.bias, out_proj_bias=self.out_proj.bias,
        )  # fmt: skip
        return out.unsqueeze(1), conv_state, ssm_state

    def _step_by_parts(self, hidden_states, conv_state, ssm_state):
        x, z = self.in_proj(hidden_states).squeeze(1).chunk(2, -1)
        x = self._before_conv(x)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt, bias = self._steps(dt)
        y = self._update(ssm_state, x, dt, self._A(), B, C, self.D, z=z, dt_bias=bias, dt_softplus=True)
        return self.out_proj(y).unsqueeze(1)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states: conv_state (B, D, W), the last W inputs of the convolution, and ssm_state (B, D, N).

        `dtype` is that of both (default: each one's parameters'). The size does not depend on `max_seqlen`.
        """
        device = self.conv1d.weight.device
        conv_dtype, ssm_dtype = dtype or self.conv1d.weight.dtype, dtype or self.dt_proj.weight.dtype
        return (
            torch.zeros(batch_size, self.d_inner, self.d_conv, device=device, dtype=conv_dtype),
            torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=ssm_dtype),
        )
