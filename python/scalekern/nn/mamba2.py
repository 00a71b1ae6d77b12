"""The Mamba-2 block: one projection, short convolution, state-space-dual scan, gated norm, output projection.

Shape letters: B batch, L length, M model width (d_model), D channels of the scan (d_ssm), H heads, P head dim,
G groups, N state size, W filter width, S packed sequences.

Parameter names, shapes and initialization are those of mamba_ssm.modules.mamba2.Mamba2, so its checkpoints load.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn._cached import CachedStates, pair
from scalekern.nn.mamba import negative_exp
from scalekern.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from scalekern.ops.selective_state_update import selective_state_update
from scalekern.ops.ssd_scan import limits, ssd_scan

NAME = "nn.Mamba2"


class GatedRMSNorm(nn.Module):
    """RMS norm over groups of channels of y silu(z), or of y with the gate after it. In float32 inside.

    Args:
        width: channels.   eps: added to the mean square.   group_size: channels that share a mean, None for all.
        norm_before_gate: norm(y) silu(z) instead of norm(y silu(z)).

    Source: Dao & Gu, Transformers are SSMs, 2024, section 7.2.
    """

    def __init__(self, width, eps=1e-5, group_size=None, norm_before_gate=False, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or width, norm_before_gate
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, y, z=None):
        """y, z (..., width) -> (..., width) in y's dtype."""
        return gated_rms_norm(y, z, self.weight, self.eps, self.group_size, self.norm_before_gate)


def gated_rms_norm(y, z, weight, eps, group_size, norm_before_gate, bias=None, centered=False):
    """bias: added behind the weight, before a gate that follows.   centered: a layer norm over each group."""
    wide = torch.promote_types(y.dtype, torch.float32)
    x, gate = y.to(wide), None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        x = x * gate
    groups = x.unflatten(-1, (-1, group_size))
    groups = groups - groups.mean(-1, keepdim=True) if centered else groups
    x = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(wide)
    x = x if bias is None else x + bias.to(wide)
    if gate is not None and norm_before_gate:
        x = x * gate
    return x.to(y.dtype)


class Mamba2(CachedStates, nn.Module):
    """Maps (B, L, M) to (B, L, M).

    Args:
        d_model: M.   d_state: N.   d_conv: W, 2 to 8.   expand: channels of the whole block / M.   headdim: P.
        conv_init: bound of the convolution's uniform initial weight, None for torch's.
        d_ssm: D, None for all channels; the others pass through a gate only (a gated MLP).
        ngroups: G.   A_init_range: the initial -A are uniform in it.   D_has_hdim: a skip a channel, not a head.
        rmsnorm: a GatedRMSNorm behind the scan; without it the gate only.   norm_before_gate: see there.
        dt_min, dt_max, dt_init_floor: the initial step sizes.   dt_limit: the least and the most of any.
        bias, conv_bias: of the projections, of the convolution.
        chunk_size, use_mem_eff_path: upstream's; neither changes the result.
        process_group, sequence_parallel: upstream's tensor parallelism, which is not here: None, and not read.
        layer_idx: the key of this layer's states in `inference_params.key_value_memory_dict`.

    Source: Dao & Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
    Duality, 2024, section 7; the interface of state-spaces/mamba.
    """

    NAME = NAME
    # What QuantMamba2 puts other arithmetic in place of.
    _scan = staticmethod(ssd_scan)
    _update = staticmethod(selective_state_update)

    def _before_conv(self, xBC):
        return xBC

    def __init__(
        self, d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, d_ssm=None, ngroups=1,
        A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False, dt_min=0.001, dt_max=0.1,
        dt_init_floor=1e-4, dt_limit=(0.0, float("inf")), bias=False, conv_bias=True, chunk_size=256,
        use_mem_eff_path=True, layer_idx=None, process_group=None, sequence_parallel=True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if process_group is not None:
            raise ValueError(f"{NAME}: process_group must be None (no tensor parallelism here), got {process_group!r}")
        _checks.choice(NAME, "d_conv", d_conv, range(2, 9))
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.dt_limit = headdim, ngroups, limits(dt_limit, NAME)
        if min(headdim, ngroups) < 1 or self.d_ssm % headdim or (self.d_ssm // headdim) % ngroups:
            raise ValueError(
                f"{NAME}: headdim must divide {self.d_ssm} channels and ngroups their heads, got {headdim}, {ngroups}"
            )
        self.nheads = self.d_ssm // headdim
        self.rmsnorm, self.norm_before_gate = rmsnorm, norm_before_gate
        self.D_has_hdim, self.chunk_size, self.layer_idx = D_has_hdim, chunk_size, layer_idx
        self.conv_init, self.use_mem_eff_path = conv_init, use_mem_eff_path
        self.process_group, self.sequence_parallel = process_group, sequence_parallel
        self.world_size, self.local_rank = 1, 0
        self.activation = "silu"
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias, **factory
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        low, high = math.log(dt_min), math.log(dt_max)
        uniform = torch.rand(self.nheads, device=device, dtype=torch.float32)
        dt = torch.exp(uniform * (high - low) + low).clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter((dt + torch.log(-torch.expm1(-dt))).to(dtype or torch.get_default_dtype()))
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(torch.log(A))  # float32 whatever `dtype`, and so is D
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        self.dt_bias._no_weight_decay = self.A_log._no_weight_decay = self.D._no_weight_decay = True
        if rmsnorm:
            self.norm = GatedRMSNorm(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None, *, mask=None, initial_states=None,
        return_final_states=False,
    ):  # fmt: skip
        """Run whole sequences, or their next tokens.

        Args:
            u: (B, L, M), or (B * L, M) with `seqlen` L.
            seq_idx: (B, L) int32: where it changes along a row, a new sequence begins.
            cu_seqlens: (S + 1,) int32 or int64: the batch of 1 holds S sequences end to end. A seq_idx beside it says
                the same once more, as upstream wants it, and is not read.
            inference_params: as upstream, an object with `key_value_memory_dict`, `seqlen_offset` and
                `batch_size_offset`; this layer's states live there and are updated in place. At offset 0 they are
                started afresh, with cu_seqlens a row for each sequence; later, any number of tokens continues them.
            mask: (B, L), zero or False where a row is padded on the left.
            initial_states: (conv_state, ssm_state) before the first token, as `allocate_inference_cache` lays them
                out, one row a batch row or packed sequence. Not changed; gradients flow into them.
            return_final_states: also return the (conv_state, ssm_state) after the last token (with cu_seqlens, after
                each sequence).

        Returns:
            Like u, or (like u, (conv_state, ssm_state)).
        """
        _checks.tensor(NAME, "u", u, dims=3 if seqlen is None else 2, dtypes=_checks.taken_by(self.in_proj))
        _checks.shape(NAME, "u", u, (*u.shape[:-1], self.d_model))
        if mask is not None and (cu_seqlens is not None or seq_idx is not None or initial_states is not None):
            raise ValueError(f"{NAME}: mask goes with none of cu_seqlens, seq_idx and initial_states")
        if seqlen is not None and (seqlen < 1 or u.shape[0] % seqlen):
            raise ValueError(f"{NAME}: seqlen must divide the {u.shape[0]} tokens of u, got {seqlen}")
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        seq_idx = seq_idx if cu_seqlens is None else None
        if inference_params is not None:
            if any(v is not None for v in (seq_idx, initial_states)) or return_final_states:
                raise ValueError(
                    f"{NAME}: inference_params holds the states: no others besides, and packed sequences by cu_seqlens"
                )
            out, states = self._forward_cached(x, inference_params, mask, cu_seqlens), None
        else:
            out, states = self._forward_states(x, mask, seq_idx, cu_seqlens, initial_states, return_final_states)
        out = out if seqlen is None else out.flatten(0, 1)
        return (out, states) if return_final_states else out

    def _split(self, zxbcdt):
        """(the MLP's gate and values, z [..., D], xBC, dt)"""
        mlp = self.d_inner - self.d_ssm
        return zxbcdt.split([mlp, mlp, self.d_ssm, self.conv_dim, self.nheads], -1)

    def _forward_states(self, u, mask, seq_idx, cu_seqlens, initial_states, states_wanted):
        conv_state, ssm_state = pair(NAME, initial_states)
        if mask is not None:
            _checks.padding(NAME, mask, u, *u.shape[:2])
        # A negative seq_idx is padding: the convolution gives zero there and does not look back into it. A zero
        # input then leaves the scan's state at zero up to the first real token.
        padding = seq_idx if mask is None else (mask != 0).to(torch.int32) - 1
        z0, x0, z, xBC, dt = self._split(self.in_proj(u))
        xBC = causal_conv1d(
            self._before_conv(xBC).transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx=padding,
            initial_states=None if conv_state is None else conv_state[..., 1:].to(xBC.dtype),
            return_final_states=states_wanted, activation=self.activation, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        xBC, conv_state = xBC if states_wanted else (xBC, None)
        y, ssm_state = scan_and_norm(
            xBC.transpose(1, 2), z, dt, self._A(), self.D, self.dt_bias, headdim=self.headdim, ngroups=self.ngroups,
            d_state=self.d_state, dt_limit=self.dt_limit, norm=self._norm(), initial_states=ssm_state,
            seq_idx=seq_idx, cu_seqlens=cu_seqlens, states_wanted=states_wanted, scan=self._scan,
        )  # fmt: skip
        states = (F.pad(conv_state, (1, 0)), ssm_state) if states_wanted else None
        return self._project(z0, x0, y), states

    def _project(self, z0, x0, y):
        return self.out_proj(y if x0.shape[-1] == 0 else torch.cat([F.silu(z0) * x0, y], -1))

    def _norm(self):
        if not self.rmsnorm:
            return None
        return self.norm.weight, self.norm.eps, self.norm.group_size, self.norm_before_gate

    def _A(self):
        return negative_exp(self.A_log)

    def _from_states(self, hidden_states, mask, states, cu_seqlens=None):
        return self._forward_states(hidden_states, mask, None, cu_seqlens, states, True)

    def step(self, hidden_states, conv_state, ssm_state):
        """One token: hidden_states (B, 1, M); both states change in place. Returns (out, conv_state, ssm_state)."""
        _checks.tensor(NAME, "hidden_states", hidden_states, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "hidden_states", hidden_states, (None, 1, self.d_model))
        z0, x0, z, xBC, dt = self._split(self.in_proj(hidden_states.squeeze(1)))
        xBC = self._before_conv(xBC)
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        x, B, C = xBC.split([self.d_ssm, self.ngroups * self.d_state, self.ngroups * self.d_state], -1)
        heads = lambda t: t[..., None].expand(*t.shape, self.headdim)  # noqa: E731
        groups = lambda t: t.unflatten(-1, (self.ngroups, -1))  # noqa: E731
        bias, softplus = heads(self.dt_bias), True
        if self.dt_limit != (0.0, float("inf")):
            wide = torch.promote_types(dt.dtype, torch.float32)
            dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
            bias, softplus = None, False
        gated = None if self.rmsnorm else z.unflatten(-1, (-1, self.headdim))
        D = self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else heads(self.D)
        A = self._A()[:, None, None].expand(-1, self.headdim, self.d_state)
        y = self._update(
            ssm_state, x.unflatten(-1, (-1, self.headdim)), heads(dt), A, groups(B), groups(C), D, gated, bias, softplus
        ).flatten(-2)
        y = gated_rms_norm(y, z, *self._norm()) if self.rmsnorm else y
        return self._project(z0, x0, y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states: conv_state (B, D + 2 G N, W) and ssm_state (B, H, P, N); `dtype` is that of both."""
        device = self.out_proj.weight.device
        conv_dtype, ssm_dtype = dtype or self.conv1d.weight.dtype, dtype or self.in_proj.weight.dtype
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return (
            torch.zeros(batch_size, self.conv_dim, self.d_conv, device=device, dtype=conv_dtype),
            torch.zeros(shape, device=device, dtype=ssm_dtype),
        )


def scan_and_norm(
    xBC, z, dt, A, D, dt_bias, *, headdim, ngroups, d_state, dt_limit, norm, initial_states=None, seq_idx=None,
    cu_seqlens=None, states_wanted=False, scan=ssd_scan,
):  # fmt: skip
    """(y [B, L, D], the states after it or None): the scan behind the convolution, then the gated norm, or the gate.

    norm: (weight, eps, group_size, norm_before_gate) or None.
    """
    width = z.shape[-1]
    x, B, C = xBC.split([width, ngroups * d_state, ngroups * d_state], -1)
    heads = lambda t: t.unflatten(-1, (-1, headdim))  # noqa: E731
    groups = lambda t: t.unflatten(-1, (ngroups, -1))  # noqa: E731
    packed = cu_seqlens is not None
    found = scan(
        heads(x), dt, A, groups(B), groups(C), D=D if D.shape[0] == width // headdim else heads(D),
        z=None if norm else heads(z), dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens, dt_softplus=True, dt_limit=dt_limit, return_final_states=states_wanted and not packed,
        return_varlen_states=states_wanted and packed,
    )  # fmt: skip
    y, states = found if states_wanted else (found, None)
    y = y.flatten(-2)
    return (y if norm is None else gated_rms_norm(y, z, *norm)), states
