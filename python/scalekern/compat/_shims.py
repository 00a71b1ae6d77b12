"""What the shimmed packages contain: upstream's signatures on scalekern's ops, and a count of their calls.

The signatures are upstream's to the letter where callers look at them (transformers passes only the keywords that it
finds in a signature).
"""

import collections
import dataclasses
import functools

import torch

import scalekern
from scalekern import nn, reference
from scalekern.nn.mamba2 import gated_rms_norm, scan_and_norm

calls: collections.Counter = collections.Counter()


def counted(name: str):
    """Count the calls of a function, or of a module's forward, under this name."""

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if not torch.compiler.is_compiling():  # a counter in a graph would be a guard that fails at every call
                calls[name] += 1
            return function(*args, **kwargs)

        return wrapped

    return decorate


def _counted(function):
    return counted(function.__name__)(function)


@_counted
def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # fmt: skip
    return scalekern.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, bool(return_last_state))


def selective_scan_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # fmt: skip
    return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


@_counted
def mamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1,
    b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    return scalekern.mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight,
        dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip


def mamba_inner_ref(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
):  # fmt: skip
    return reference.mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


@_counted
def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
    state_dtype=None,
):  # fmt: skip
    """state_dtype: of upstream's states between chunks. Here they are float32 (float64), whatever it says."""
    return scalekern.ssd_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit,
        bool(return_final_states), bool(return_varlen_states),
    )  # fmt: skip


@_counted
def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None,
    dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6,
    outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None,
):  # fmt: skip
    """The block behind its first projection: convolution, scan, gated norm, and the second projection if given.

    zxbcdt may begin with a gated MLP's two halves, as upstream's does: its channels come before those of the scan.
    """
    return _split_conv1d_scan(
        scalekern, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states, seq_idx, dt_limit,
        return_final_states, activation, rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups,
        norm_before_gate,
    )  # fmt: skip


def mamba_split_conv1d_scan_ref(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, dt_limit=(0.0, float("inf")), activation="silu",
    rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1,
    norm_before_gate=True,
):  # fmt: skip
    return _split_conv1d_scan(
        reference, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, None, None, dt_limit, False, activation,
        rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, norm_before_gate,
    )  # fmt: skip


def _split_conv1d_scan(
    ops, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states, seq_idx, dt_limit, return_final_states,
    activation, rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, norm_before_gate,
):  # fmt: skip
    heads, name = A.shape[0], "mamba_split_conv1d_scan_combined"
    if headdim is None and D.dim() == 1:
        raise ValueError(f"{name}: headdim must be given for D of shape (H,), got None")
    width, conv_dim = D.numel() if D.dim() == 2 else heads * headdim, conv1d_weight.shape[0]
    d_state = (conv_dim - width) // (2 * ngroups)
    mlp, odd = divmod(zxbcdt.shape[-1] - width - conv_dim - heads, 2)  # channels of the gated MLP beside the scan
    if mlp < 0 or odd:
        needed = width + conv_dim + heads
        raise ValueError(f"{name}: zxbcdt must have {needed} channels or an even number more, got {zxbcdt.shape[-1]}")
    z0, x0, z, xBC, dt = zxbcdt.split([mlp, mlp, width, conv_dim, heads], -1)
    xBC = ops.causal_conv1d(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx=seq_idx, activation=activation
    ).transpose(1, 2)
    norm = None
    if rmsnorm_weight is not None:
        norm = (rmsnorm_weight, rmsnorm_eps, width // ngroups, norm_before_gate)
    y, states = scan_and_norm(
        xBC, z, dt, A, D.flatten(), dt_bias, headdim=width // heads, ngroups=ngroups, d_state=d_state,
        dt_limit=dt_limit, norm=norm, initial_states=initial_states, seq_idx=seq_idx,
        states_wanted=bool(return_final_states), scan=ops.ssd_scan,
    )  # fmt: skip
    y = torch.cat([torch.nn.functional.silu(z0) * x0, y], -1) if mlp else y
    if outproj_weight is not None:
        y = torch.nn.functional.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


@_counted
def mamba_chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    return scalekern.ssd_scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)


def ssd_chunk_scan_combined_ref(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    return reference.ssd_scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)


@_counted
def ssd_selective_scan(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))
):  # fmt: skip
    """mamba_chunk_scan by selective_scan, where dt (B, L, H, P), A (H P, N), D and dt_bias (H, P) can be channels'."""
    heads, headdim = x.shape[2:]

    def channels(t, axis):  # of heads, or of heads and their channels, at `axis`: to channels
        if t is None:
            return None
        t = t if t.dim() > axis + 1 else t[..., None].expand(*t.shape, headdim)
        return t.flatten(axis, axis + 1)

    tokens = lambda t: None if t is None else channels(t, 2).transpose(1, 2)  # noqa: E731
    A = (A if A.dim() == 2 else channels(A, 0)[:, None].expand(-1, B.shape[-1])).float()
    dt, dt_bias = tokens(dt), channels(dt_bias, 0)
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = dt if dt_bias is None else dt + dt_bias[:, None]
        dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).to(x.dtype)
        dt_bias, dt_softplus = None, False
    out = scalekern.selective_scan(
        tokens(x), dt, A, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), channels(D, 0), tokens(z), dt_bias, dt_softplus
    )
    return out.transpose(1, 2).unflatten(2, (heads, headdim))


def layernorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, is_rms_norm=False):
    return gated_rms_norm(x, z, weight, eps, group_size or x.shape[-1], norm_before_gate, bias, not is_rms_norm)


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


def rms_norm_ref(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, upcast=True):
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class RMSNorm(nn.GatedRMSNorm):
    """With upstream's defaults: a gate comes behind the norm."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)
        self.register_parameter("bias", None)

    def reset_parameters(self):
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x, z=None):
        return super().forward(x, z)


class LayerNorm(RMSNorm):
    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x, z=None):
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


@dataclasses.dataclass
class InferenceParams:
    """What generation keeps between calls: each layer's states by its layer_idx, and how many tokens they have seen."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = dataclasses.field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen, max_batch_size):
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@_counted
def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):  # fmt: skip
    return scalekern.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def mamba_update(*args, **kwargs):
    """Not upstream's: what transformers' mixers take for a token. It counts as the two updates that it stands for."""
    if not torch.compiler.is_compiling():
        calls["causal_conv1d_update"] += 1
        calls["selective_state_update"] += 1
    return scalekern.mamba_update(*args, **kwargs)


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@_counted
def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    wanted = bool(return_final_states) or final_states_out is not None
    result = scalekern.causal_conv1d(x, weight, bias, seq_idx, initial_states, wanted, activation)
    if not wanted:
        return result
    out, final_states = result
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


def causal_conv1d_ref(
    x, weight, bias=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):  # fmt: skip
    out, final_states = reference.causal_conv1d(x, weight, bias, None, initial_states, True, activation)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


@_counted
def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):  # fmt: skip
    return scalekern.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    return reference.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


@_counted
def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """x (T, D), S sequences end to end -> (S, D, state_len), the last tokens of each, zeros before its first."""
    return _varlen_states(x, cu_seqlens, state_len)


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    return _varlen_states(x, cu_seqlens, state_len)


def _varlen_states(x, cu_seqlens, state_len):
    begins, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    positions = ends - state_len + torch.arange(state_len, device=x.device)  # [S, state_len]
    inside = positions >= begins
    tokens = x[positions.clamp(min=0)] if x.shape[0] else x.new_zeros(*positions.shape, x.shape[1])
    return torch.where(inside[..., None], tokens, 0).transpose(1, 2).contiguous()


# Distribution name -> version: that of upstream whose functions these are.
VERSIONS = {"mamba_ssm": "2.2.4+scalekern", "causal_conv1d": "1.5.2+scalekern"}

# Module -> its attributes. Every parent of a module is listed too.
MODULES = {
    "mamba_ssm": {
        "__version__": VERSIONS["mamba_ssm"], "selective_scan_fn": selective_scan_fn,
        "mamba_inner_fn": mamba_inner_fn, "Mamba": nn.Mamba, "Mamba2": nn.Mamba2,
    },
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": selective_scan_fn, "selective_scan_ref": selective_scan_ref,
        "mamba_inner_fn": mamba_inner_fn, "mamba_inner_ref": mamba_inner_ref,
        "causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update,
    },
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": selective_state_update, "selective_state_update_ref": selective_state_update_ref,
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
        "mamba_split_conv1d_scan_ref": mamba_split_conv1d_scan_ref, "mamba_chunk_scan": mamba_chunk_scan,
        "ssd_chunk_scan_combined_ref": ssd_chunk_scan_combined_ref, "ssd_selective_scan": ssd_selective_scan,
    },
    "mamba_ssm.ops.triton.layernorm_gated": {
        "RMSNorm": RMSNorm, "LayerNorm": LayerNorm, "rmsnorm_fn": rmsnorm_fn, "layernorm_fn": layernorm_fn,
        "rms_norm_ref": rms_norm_ref,
    },
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {"InferenceParams": InferenceParams},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": nn.Mamba},
    "mamba_ssm.modules.mamba2": {"Mamba2": nn.Mamba2},
    "causal_conv1d": {
        "__version__": VERSIONS["causal_conv1d"], "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": causal_conv1d_update, "causal_conv1d_varlen_states": causal_conv1d_varlen_states,
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_ref": causal_conv1d_ref,
        "causal_conv1d_update": causal_conv1d_update, "causal_conv1d_update_ref": causal_conv1d_update_ref,
    },
    "causal_conv1d.causal_conv1d_varlen": {
        "causal_conv1d_varlen_states": causal_conv1d_varlen_states,
        "causal_conv1d_varlen_states_ref": causal_conv1d_varlen_states_ref,
    },
}  # fmt: skip
