"""A Mamba's decoding step as one op, where its projections are QuantLinear layers that it can serve.

What the op takes of a block's layers is gathered once and kept beside the block, for as long as they hold the same
parameters: gathering takes 40 us, as long as the native step itself at width 128.
"""

import functools
import operator
import weakref

import torch
from torch import nn

from scalekern import _checks
from scalekern.nn.quant_linear import QuantLinear
from scalekern.ops.quantized_mamba_update import NAME, native_parts, native_step, step
from scalekern.ops.selective_state_update import STATE
from scalekern.quant.tensor import PARTS

_NAMES = tuple(f"weight_{name}" for name in PARTS)
_kept = weakref.WeakKeyDictionary()


def quantized_step(block, hidden_states, conv_state, ssm_state):
    """out (B, 1, M), both states moved on; None where the op does not serve the block, which then steps by parts.

    What the op would check of the weights held when they were put into their layers, and decoding has no time for it.
    """
    if torch.compiler.is_compiling():
        own = _Gathered(block)
    elif (own := _kept.get(block)) is None or not own.holds(block):
        own = _kept[block] = _Gathered(block)
    if not own.served or own.hooked() or not own.fits(hidden_states, conv_state, ssm_state):
        return None
    _checks.writable(NAME, "conv_state", conv_state)
    _checks.writable(NAME, "ssm_state", ssm_state)
    hidden_states, io = hidden_states.squeeze(1), hidden_states.dtype
    in_proj, x_proj, delta, out_proj = own.projections
    native = own.native if delta[1] is not None or delta[0].dtype == io else None
    out = native and native_step(conv_state, ssm_state, hidden_states, own.parameters, native)
    if out is None:
        real = torch.float64 if io == torch.float64 else torch.float32
        weight, *parameters = (t if t is None or t.dtype == real else t.to(real) for t in own.parameters)
        if delta[1] is None:
            delta = (delta[0].to(io), *delta[1:])
        out = step(
            conv_state, ssm_state, hidden_states, weight.flatten(1), *parameters, in_proj, x_proj, delta, out_proj,
            *own.options,
        )  # fmt: skip
    return out.unsqueeze(1)


class _Gathered:
    """Of a block: its parameters, its projections as the op takes them, and what that is made of."""

    def __init__(self, block):
        self.held = self._look(block)
        conv, *self.layers = self.held[:5]
        in_proj, x_proj, dt_proj, out_proj = self.layers
        roundings = {(p.activation, p.activation_scale) for p in (in_proj, x_proj, out_proj) if type(p) is QuantLinear}
        self.served = (
            all(type(p) is QuantLinear for p in (in_proj, x_proj, out_proj)) and len(roundings) == 1
            and type(dt_proj) in (nn.Linear, QuantLinear) and x_proj.bias is None
        )  # fmt: skip
        if not self.served:
            return
        ((activation, scale),) = roundings
        self.parameters = conv.weight, conv.bias, block.A_log, block.D, dt_proj.bias
        dense = type(dt_proj) is nn.Linear
        self.projections = (
            _parts(in_proj, in_proj.bias), _parts(x_proj, None),
            (dt_proj.weight, *[None] * 7) if dense else _parts(dt_proj, None), _parts(out_proj, out_proj.bias),
        )  # fmt: skip
        formats = tuple("" if type(p) is nn.Linear else p.format for p in self.layers)
        sizes = tuple(p.group_size if f else 0 for f, p in zip(formats, self.layers))
        self.options = formats, sizes, activation or "", scale
        self.native = None
        # Powers of two are taken as bytes, a view, which does not follow `scales.data = ...`: they are gathered anew.
        powers = any(p[1] is not None and p[1].dtype == torch.float8_e8m0fnu for p in self.projections)
        if not torch.compiler.is_compiling() and x_proj.weight_data.is_cpu and not powers:
            self.native = native_parts(self.projections, tuple(p.in_features for p in self.layers), *self.options)

    @staticmethod
    def _look(block) -> list:
        """The layers and what they hold now."""
        children = block._modules
        layers = [children[name] for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
        found = [children["conv1d"], *layers]  # not the block: what is kept beside it must not keep it
        for module in (block, *found[:5]):
            found += module._parameters.values()
        for layer in layers:
            found += layer.__dict__.get("activation"), layer.__dict__.get("activation_scale")
        return found

    def holds(self, block) -> bool:
        now = self._look(block)
        return len(now) == len(self.held) and all(map(operator.is_, now, self.held))

    def hooked(self) -> bool:
        return any([layer._forward_hooks or layer._forward_pre_hooks for layer in self.layers])

    def fits(self, hidden_states, conv_state, ssm_state) -> bool:
        weight, _, A_log, *_ = self.parameters
        (channels, states), batch = A_log.shape, hidden_states.shape[0]
        return (
            conv_state.shape[:2] == (batch, channels) and conv_state.shape[2] >= weight.shape[2] - 1
            and ssm_state.shape == (batch, channels, states) and self.layers[1].out_features > 2 * states
            and hidden_states.dtype in _checks.FLOATING and conv_state.dtype in _checks.FLOATING
            and ssm_state.dtype in STATE and hidden_states.device == self.projections[0][0].device
            and conv_state.device == ssm_state.device == hidden_states.device
        )  # fmt: skip


def _parts(layer, bias) -> tuple:
    own = layer._parameters
    signs = own["rotation_signs"]
    if layer.rotation is not None and signs is None:
        signs = _ones(layer.in_features, own["weight_data"].device)
    return (*[own[name] for name in _NAMES], bias, signs)


@functools.lru_cache(256)
def _ones(count: int, device: torch.device) -> torch.Tensor:
    return torch.ones(count, dtype=torch.int8, device=device)
