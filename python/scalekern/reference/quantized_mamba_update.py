"""Oracle of one decoding step of a Mamba mixer of low-bit weights: mamba_update's, its products quant_matmul's.

Shape letters: B batch, M model width, D channels, N state size, R rank of the step size, W filter width, K tokens of
the convolution's window.
"""

import torch
import torch.nn.functional as F

from scalekern.quant import QuantizedTensor
from scalekern.quant._rotation import block_of
from scalekern.quant.tensor import PARTS
from scalekern.reference.causal_conv1d import causal_conv1d_update_op
from scalekern.reference.hadamard_transform import MATRICES, hadamard_transform_fwd
from scalekern.reference.quant_matmul import quant_matmul_fwd
from scalekern.reference.selective_state_update import selective_state_update_op


def quantized_mamba_update(
    hidden_states, conv_state, ssm_state, in_proj_weight, conv1d_weight, conv1d_bias, x_proj_weight,
    delta_proj_weight, out_proj_weight, A_log, D=None, delta_bias=None,
    *, in_proj_bias=None, out_proj_bias=None, activation=None, activation_scale=None, in_proj_signs=None,
    x_proj_signs=None, delta_proj_signs=None, out_proj_signs=None,
):  # fmt: skip
    """Same arguments as scalekern.quantized_mamba_update; changes both states in place and returns the output."""
    weights = in_proj_weight, x_proj_weight, delta_proj_weight, out_proj_weight
    biases = in_proj_bias, None, None, out_proj_bias
    signs = in_proj_signs, x_proj_signs, delta_proj_signs, out_proj_signs
    return quantized_mamba_update_op(
        conv_state, ssm_state, hidden_states, conv1d_weight.reshape(conv1d_weight.shape[0], -1), conv1d_bias, A_log, D,
        delta_bias, *(parts_of(*one) for one in zip(weights, biases, signs)), *formats_of(weights), activation or "",
        activation_scale,
    )  # fmt: skip


def parts_of(weight, bias=None, signs=None) -> tuple:
    """A projection as the op takes it: the parts of its weight (a dense one has one), its bias, its signs."""
    quantized = isinstance(weight, QuantizedTensor)
    return (*((getattr(weight, name) for name in PARTS) if quantized else (weight, *[None] * 5)), bias, signs)


def formats_of(weights) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(formats, group sizes); of a dense weight "" and 0."""
    quantized = [isinstance(w, QuantizedTensor) for w in weights]
    return tuple(w.format if q else "" for w, q in zip(weights, quantized)), tuple(
        w.group_size if q else 0 for w, q in zip(weights, quantized)
    )


def quantized_mamba_update_op(
    conv_state, ssm_state, hidden_states, conv1d_weight, conv1d_bias, A_log, D, delta_bias, in_proj, x_proj,
    delta_proj, out_proj, formats, group_sizes, activation, activation_scale,
    *, conv=causal_conv1d_update_op, scan=selective_state_update_op, matmul=quant_matmul_fwd,
    transform=hadamard_transform_fwd,
):  # fmt: skip
    """The op's form, around given parts."""
    row = lambda t: None if t is None else t[None]  # noqa: E731 (the axis of heads)

    def project(x, parts, i, activation=activation):
        *weight, perm, bias, signs = parts
        if signs is not None:
            block = block_of(x.shape[-1])
            x = (x * signs.to(x.dtype)).unflatten(-1, (-1, block))
            x = transform(x, block**-0.5, 0, MATRICES[0], False).flatten(-2)
        if not formats[i]:
            return F.linear(x, weight[0], bias)
        x = x if perm is None else x.index_select(-1, perm)
        scale = activation_scale if activation else None
        return matmul(x, *weight, bias, None, formats[i], group_sizes[i], activation, scale, None)

    states = A_log.shape[1]
    x, z = project(hidden_states, in_proj, 0).chunk(2, -1)
    x = conv(conv_state, x[..., None], conv1d_weight, conv1d_bias, None, None, True)[..., 0]
    t, B, C = project(x, x_proj, 1).split([x_proj[0].shape[0] - 2 * states, states, states], -1)
    delta = project(t, delta_proj, 2, "")
    y = scan(
        ssm_state[:, None], x[:, None], delta[:, None], row(-torch.exp(A_log)), B[:, None], C[:, None], row(D),
        z[:, None], row(delta_bias), None, True,
    )  # fmt: skip
    return project(y[:, 0], out_proj, 3)
