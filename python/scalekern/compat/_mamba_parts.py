"""What code borrows from inside mamba_ssm and causal_conv1d, beside the functions that these are made of: autograd
functions by their names, the norms' references, the filters of logits, the functions over the CUDA extensions, and
names in every module that upstream's own has them in.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

import scalekern
from scalekern.compat import _mamba_blocks, _mamba_lm, _mamba_ssd, _shims
from scalekern.compat._mamba_blocks import at_least_float32, layer_norm_fn, rms_norm_fn


class Block(_mamba_blocks.Block):
    """Of mamba_ssm 1.x: without an MLP."""

    def __init__(self, dim, mixer_cls, norm_cls=nn.LayerNorm, fused_add_norm=False, residual_in_fp32=False):
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


def _applied(name, function):
    """A stand-in for an autograd.Function: its `apply` is the function, which has a gradient of its own."""
    return type(name, (), {"apply": staticmethod(function), "__doc__": f"apply is {function.__name__}."})


def swiglu(xy):
    """(..., 2 K) -> (..., K): silu of the first half times the second."""
    x, y = xy.chunk(2, -1)
    return F.silu(x) * y


def _norm_ref(
    is_rms_norm, x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,
    rowscale=None, prenorm=False, dropout_mask=None, dropout_mask1=None, upcast=False,
):  # fmt: skip
    """layer_norm_fn with the dropout's masks given (True is kept). `upcast`: a sum that is returned is float32."""

    def dropped(branch, kept):
        if branch is None or dropout_p == 0.0:
            return branch
        return F.dropout(branch, dropout_p) if kept is None else branch.masked_fill(~kept, 0.0) / (1 - dropout_p)

    kind, wide = x.dtype, at_least_float32(x)
    x, x1 = x.to(wide), None if x1 is None else x1.to(wide)
    x = dropped(x if rowscale is None else x * rowscale[..., None], dropout_mask)
    *out, total = layer_norm_fn(
        x, weight, bias, residual, dropped(x1, dropout_mask1), weight1, bias1, eps, prenorm=True, is_rms_norm=is_rms_norm
    )
    out = [t.to(kind) for t in out] + ([total.to(wide if upcast else kind)] if prenorm else [])
    return out[0] if len(out) == 1 else tuple(out)


layer_norm_ref, rms_norm_ref = (functools.partial(_norm_ref, rms) for rms in (False, True))


def layer_norm_linear_fn(
    x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-6, prenorm=False,
    residual_in_fp32=False, is_rms_norm=False,
):  # fmt: skip
    """A linear layer behind layer_norm_fn; with prenorm also the sum."""
    y, total = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=True, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


def rms_norm_forward(x, weight, bias, eps=1e-6, is_rms_norm=True):
    return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


def modify_logits_for_min_p_filtering(logits, min_p):
    """What is below min_p becomes minus infinity, in place."""
    if 0.0 < min_p < 1.0:
        logits.masked_fill_(logits < min_p, -torch.inf)


def modify_logits_for_top_k_filtering(logits, top_k):
    """All but the top_k highest of a row become minus infinity, in place."""
    logits.masked_fill_(logits < logits.topk(top_k).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits, top_p):
    """All but the fewest of the highest whose probabilities reach top_p become minus infinity, in place."""
    if 0.0 < top_p < 1.0:
        ordered, places = logits.sort(descending=False)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        logits.masked_fill_(dropped.scatter(-1, places, dropped), -torch.inf)


def modify_logit_for_repetition_penalty(logits, prev_output_tokens, repetition_penalty=1.0):
    """`penalized`, in place."""
    return logits.copy_(_mamba_lm.penalized(logits, prev_output_tokens, repetition_penalty))


def _activation(silu_activation):
    return "silu" if silu_activation else None


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    return _shims.causal_conv1d_fn(
        x, weight, bias, seq_idx, initial_states, False, final_states_out, _activation(silu_activation)
    )


def causal_conv1d_bwd_function(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
):  # fmt: skip
    """(dx, dweight, dbias or None, dinitial_states or None); dx is also written where one was given."""
    wanted = [t.detach().requires_grad_() for t in (x, weight)]
    bias = None if bias is None else bias.detach().requires_grad_()
    first = initial_states
    if return_dinitial_states:
        first = x.new_zeros(*x.shape[:2], weight.shape[-1] - 1) if first is None else first
        first = first.detach().requires_grad_()
    ends = dfinal_states is not None
    with torch.enable_grad():
        found = scalekern.causal_conv1d(*wanted, bias, seq_idx, first, ends, _activation(silu_activation))
    leaves = wanted + [t for t in (bias, first if return_dinitial_states else None) if t is not None]
    grads = iter(torch.autograd.grad(found, leaves, (dout, dfinal_states) if ends else dout))
    own = next(grads)
    return (
        own if dx is None else dx.copy_(own), next(grads), None if bias is None else next(grads),
        next(grads) if return_dinitial_states else None,
    )  # fmt: skip


def causal_conv1d_update_function(
    x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
):  # fmt: skip
    return _shims.causal_conv1d_update(
        x, conv_state, weight, bias, _activation(silu_activation), cache_seqlens, conv_state_indices
    )


CONV_PARTS = {f.__name__: f for f in (
    causal_conv1d_fwd_function, causal_conv1d_bwd_function, causal_conv1d_update_function,
)}  # fmt: skip
CONV = {"causal_conv1d_fn": _shims.causal_conv1d_fn, "causal_conv1d_update": _shims.causal_conv1d_update}
SCAN = {
    "selective_scan_fn": _shims.selective_scan_fn, "mamba_inner_fn": _shims.mamba_inner_fn,
    "selective_state_update": _shims.selective_state_update,
}  # fmt: skip
SSD = {
    "mamba_chunk_scan_combined": _shims.mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": _shims.mamba_split_conv1d_scan_combined,
}
NORMS = {
    "RMSNorm": _mamba_blocks.RMSNorm, "layer_norm_fn": layer_norm_fn, "rms_norm_fn": rms_norm_fn,
}  # fmt: skip
LAYER_NORM = {
    "layer_norm_ref": layer_norm_ref, "rms_norm_ref": rms_norm_ref, "layer_norm_linear_fn": layer_norm_linear_fn,
    "LayerNormFn": _applied("LayerNormFn", layer_norm_fn),
    "LayerNormLinearFn": _applied("LayerNormLinearFn", layer_norm_linear_fn),
}
ADDITIONS = {
    "mamba_ssm.modules.mamba_simple": CONV | SCAN | NORMS | {"Block": Block},
    "mamba_ssm.modules.mamba2": CONV | SSD | {
        "RMSNormGated": _shims.RMSNorm, "selective_state_update": _shims.selective_state_update,
        "causal_conv1d_varlen_states": _shims.causal_conv1d_varlen_states,
    },
    "mamba_ssm.modules.mamba2_simple": SSD | {
        "RMSNormGated": _shims.RMSNorm, "LayerNorm": _shims.LayerNorm, "causal_conv1d_fn": _shims.causal_conv1d_fn,
    },
    "mamba_ssm.modules.block": {"RMSNorm": _mamba_blocks.RMSNorm, "layer_norm_fn": layer_norm_fn},
    "mamba_ssm.modules.mha": CONV,
    "mamba_ssm.ops.selective_scan_interface": CONV_PARTS | {
        "SelectiveScanFn": _applied("SelectiveScanFn", _shims.selective_scan_fn),
        "MambaInnerFn": _applied("MambaInnerFn", _shims.mamba_inner_fn), "rms_norm_forward": rms_norm_forward,
    },
    "mamba_ssm.ops.triton.layer_norm": LAYER_NORM, "mamba_ssm.ops.triton.layernorm": LAYER_NORM,
    "mamba_ssm.ops.triton.k_activations": {"swiglu": swiglu, "SwiGLU": _applied("SwiGLU", swiglu)},
    "mamba_ssm.ops.triton.ssd_combined": {
        "MambaChunkScanCombinedFn": _applied("MambaChunkScanCombinedFn", _shims.mamba_chunk_scan_combined),
        "MambaSplitConv1dScanCombinedFn": _applied(
            "MambaSplitConv1dScanCombinedFn", _shims.mamba_split_conv1d_scan_combined
        ),
        "rmsnorm_fn": _shims.rmsnorm_fn, "causal_conv1d_fn": _shims.causal_conv1d_fn,
        **{n: f for name in ("chunk_state", "state_passing", "chunk_scan")
           for n, f in _mamba_ssd.MODULES[f"mamba_ssm.ops.triton.ssd_{name}"].items()},
    },
    "mamba_ssm.utils.generation": {f.__name__: f for f in (
        modify_logits_for_min_p_filtering, modify_logits_for_top_k_filtering, modify_logits_for_top_p_filtering,
        modify_logit_for_repetition_penalty,
    )},
    "mamba_ssm.utils.torch": {
        name: functools.partial(getattr(torch.amp, name), device_type="cuda") for name in ("custom_fwd", "custom_bwd")
    },
    "causal_conv1d.causal_conv1d_interface": CONV_PARTS | {
        "CausalConv1dFn": _applied("CausalConv1dFn", _shims.causal_conv1d_fn),
    },
    "causal_conv1d.cpp_functions": CONV_PARTS,
}  # fmt: skip
_BEFORE = _shims.MODULES | _mamba_lm.MODULES
MODULES = _mamba_ssd.MODULES | {name: {**more, **_BEFORE.get(name, {})} for name, more in ADDITIONS.items()}
