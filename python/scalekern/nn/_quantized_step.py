"""A Mamba's decoding step as one op, where its projections are QuantLinear layers that it can serve."""

import functools

import torch
from torch import nn

from scalekern import _checks
from scalekern.nn.quant_linear import QuantLinear
from scalekern.ops.quantized_mamba_update import step
from scalekern.ops.selective_state_update import STATE
from scalekern.quant.tensor import PARTS

_NAMES = tuple(f"weight_{name}" for name in PARTS)


def quantized_step(block, hidden_states, conv_state, ssm_state):
    """out (B, 1, M), both states moved on; None where the op does not serve the block, which then steps by parts.

    What the op would check of the weights held when they were put into their layers, and decoding has no time for it.
    """
    own, children = block._parameters, block._modules
    layers = children["in_proj"], children["x_proj"], children["dt_proj"], children["out_proj"]
    in_proj, x_proj, dt_proj, out_proj = layers
    conv, io = children["conv1d"]._parameters, hidden_states.dtype
    rounding = in_proj.__dict__.get("activation", ""), in_proj.__dict__.get("activation_scale")
    for layer in layers:
        quantized = type(layer) is QuantLinear
        if layer._forward_hooks or layer._forward_pre_hooks or not (quantized or layer is dt_proj):
            return None
        if quantized and layer is not dt_proj and (layer.activation, layer.activation_scale) != rounding:
            return None
    dense = type(dt_proj) is nn.Linear
    if not (dense or type(dt_proj) is QuantLinear) or x_proj.bias is not None:
        return None
    A_log, weight, data = own["A_log"], conv["weight"], in_proj._parameters["weight_data"]
    real = torch.float64 if io == torch.float64 else torch.float32
    parameters = weight, conv["bias"], A_log, own["D"], dt_proj._parameters["bias"]
    batch, states = len(hidden_states), A_log.shape[1]
    if (
        conv_state.shape[:2] != (batch, len(A_log)) or conv_state.shape[2] < weight.shape[2] - 1
        or ssm_state.shape != (batch, len(A_log), states) or x_proj.out_features <= 2 * states
        or io not in _checks.FLOATING or conv_state.dtype not in _checks.FLOATING or ssm_state.dtype not in STATE
        or not data.device == hidden_states.device == conv_state.device == ssm_state.device
    ):  # fmt: skip
        return None
    weight, *parameters = (t if t is None or t.dtype == real else t.to(real) for t in parameters)
    if dense:
        delta = dt_proj._parameters["weight"]
        delta = (delta if delta.dtype == io else delta.to(io), *[None] * 7)
        formats, sizes = ("", 0)
    else:
        delta, formats, sizes = _parts(dt_proj, None), dt_proj.format, dt_proj.group_size
    out = step(
        conv_state, ssm_state, hidden_states.squeeze(1), weight.flatten(1), *parameters,
        _parts(in_proj, in_proj._parameters["bias"]), _parts(x_proj, None), delta,
        _parts(out_proj, out_proj._parameters["bias"]),
        (in_proj.format, x_proj.format, formats, out_proj.format),
        (in_proj.group_size, x_proj.group_size, sizes, out_proj.group_size), rounding[0] or "", rounding[1],
    )  # fmt: skip
    return out.unsqueeze(1)


def _parts(layer, bias) -> tuple:
    own = layer._parameters
    signs = own["rotation_signs"]
    if layer.rotation is not None and signs is None:
        signs = _ones(layer.in_features, own["weight_data"].device)
    return (*[own[name] for name in _NAMES], bias, signs)


@functools.lru_cache(256)
def _ones(count: int, device: torch.device) -> torch.Tensor:
    return torch.ones(count, dtype=torch.int8, device=device)
