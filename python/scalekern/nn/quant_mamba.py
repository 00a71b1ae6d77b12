"""Mamba and Mamba-2 blocks with low-bit weights, and with 8-bit activations up to the scan.

Shape letters: M model width, D channels, H heads, P head dim, G groups of B and C, N state size, W filter width,
I head groups, J channel groups.
"""

import copy

import torch
from torch import nn

from scalekern import _checks
from scalekern.nn.mamba import Mamba
from scalekern.nn.mamba2 import Mamba2
from scalekern.nn.quant_linear import QuantLinear
from scalekern.ops.fake_quantize import fake_quantize
from scalekern.ops.quantized_selective_scan import quantized_selective_scan
from scalekern.ops.quantized_ssd_scan import quantized_ssd_scan
from scalekern.ops.quantized_state_update import quantized_state_update
from scalekern.ops.selective_scan import selective_scan
from scalekern.ops.selective_state_update import selective_state_update
from scalekern.ops.ssd_scan import ssd_scan
from scalekern.quant import round_to_int8, sort_and_cluster
from scalekern.quant._rotation import block_of

PRECISIONS = {  # of the projections' weights, the columns of a group, of activations
    "w8a8": ("int8", None, "int8"),
    "w4a8": ("int4", 128, "int8"),
    "w4a16": ("int4", 128, None),
}
UNKNOWN = 8 / 127  # a step before there are others: of numbers up to 8
STATES_SEEN = 8  # tokens between two states that are looked at to find their range


class _QuantizedBlock:
    """What the two blocks share, before the float block among a subclass's bases; the rest is below in each of them."""

    def __init__(
        self, *args, precision="w8a8", head_groups=1, channel_groups=1, state_dtype=None, device=None, dtype=None,
        **kwargs,
    ):  # fmt: skip
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self._set_up(precision, head_groups, channel_groups, state_dtype)
        self._quantize_projections(_fresh(device, dtype))

    def _set_up(self, precision, head_groups, channel_groups, state_dtype):
        _checks.choice(self.NAME, "precision", precision, tuple(PRECISIONS))
        _checks.choice(self.NAME, "state_dtype", state_dtype, (None, torch.int8))
        self.precision, self.state_dtype = precision, state_dtype
        self.weight_format, self.columns, self.rounding = PRECISIONS[precision]
        self._seen = None
        heads, width, groups = self._layout()
        device = self.conv1d.weight.device
        steps = {"x": (head_groups, channel_groups), "B": (groups,), "C": (groups,), "conv": (self._conv_parts(),),
                 "state": (heads, width)}  # fmt: skip
        for name, shape in steps.items():
            wanted = state_dtype is not None if name == "state" else self.rounding is not None
            step = torch.full(shape, UNKNOWN, dtype=torch.float32, device=device)
            self.register_parameter(f"{name}_steps", nn.Parameter(step, requires_grad=False) if wanted else None)
        for name, shape in (("head_group", (heads,)), ("channel_group", (heads, width))):
            index = torch.zeros(shape, dtype=torch.int64, device=device)
            self.register_buffer(name, index if self.rounding is not None else None)

    def _quantize_projections(self, make):
        """make(linear, **options of a QuantLinear) in the place of each."""
        for name in self.PROJECTIONS:
            linear = getattr(self, name)
            rotation = "hadamard" if name == "out_proj" and block_of(linear.in_features) > 1 else None
            options = {"group_size": self.columns, "activation": self.rounding, "rotation": rotation}
            setattr(self, name, make(linear, format=self.weight_format, **options))

    @classmethod
    def from_float(cls, block, precision="w8a8", *, inputs=None, head_groups=4, channel_groups=4, state_dtype=None):
        """The quantized block of a float one, which does not change.

        Args:
            block: a Mamba or Mamba2.   precision, head_groups, channel_groups, state_dtype: as for the class.
            inputs: batches (B, L, M) that the block runs over once, in float, to find the ranges of what is rounded;
                with "w4a16" and a float state they are not needed.
        """
        kind = Mamba2 if issubclass(cls, Mamba2) else Mamba
        if not isinstance(block, kind):
            raise TypeError(f"{cls.NAME}: block must be a {kind.__name__}, got {type(block).__name__}")
        new = cls.__new__(cls)
        new.__dict__ = copy.deepcopy(block.__dict__)
        heads, width, _ = new._layout()
        new._set_up(precision, min(head_groups, heads), min(channel_groups, width), state_dtype)
        with torch.no_grad():
            if new.rounding is not None or state_dtype is not None:
                new._calibrate(inputs)
            if new.rounding is not None:
                weight = new.conv1d.weight
                weight.copy_(fake_quantize(weight, weight.abs().amax((1, 2), keepdim=True).float() / 127))
            new._quantize_projections(QuantLinear.from_linear)
        return new

    def _calibrate(self, inputs):
        batches = [] if inputs is None else [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        if not batches:
            raise ValueError(f"{self.NAME}: inputs must hold a batch to find the ranges of activations, got none")
        for batch in batches:
            _checks.tensor(self.NAME, "inputs", batch, dims=3, dtypes=_checks.FLOATING)
            _checks.shape(self.NAME, "inputs", batch, (None, None, self.d_model))
            if batch.numel() == 0:
                raise ValueError(f"{self.NAME}: inputs must hold tokens, got shape {tuple(batch.shape)}")
        self._seen = {}
        for batch in batches:
            self._forward_states(batch, None, *self.NO_STATES)
        seen, self._seen = self._seen, None
        if self.state_dtype is not None:
            self.state_steps.copy_(seen["state"] / 127)
        if self.rounding is None:
            return
        clusters = sort_and_cluster(seen["x"], *self.x_steps.shape)
        self.x_steps.copy_(clusters.scale)
        self.head_group.copy_(clusters.head_group)
        self.channel_group.copy_(clusters.channel_group)
        for name in ("B", "C", "conv"):
            getattr(self, f"{name}_steps").copy_(seen[name] / 127)

    def _saw(self, name, absmax):
        before = self._seen.get(name)
        self._seen[name] = absmax.float() if before is None else torch.maximum(before, absmax.float())

    @property
    def x_scale(self):
        """(H, P) the step of each channel of the scan's input."""
        return self.x_steps[self.head_group[:, None], self.channel_group]

    def _before_conv(self, x):
        if self._seen is not None:
            self._saw("conv", self._conv_ranges(x))
        plain = self._seen is not None or self.rounding is None
        return x if plain else fake_quantize(x, self._conv_scale())

    def _fuses(self, ssm_state):
        return self.rounding is None and self._seen is None and ssm_state.dtype != torch.int8

    def _codes(self, x, scale):
        """int8 codes, or where gradients are wanted x itself, which the scan then rounds."""
        trained = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
        return x if trained else round_to_int8(x, scale)

    def _update(self, state, x, dt, A, B, C, *rest, **options):
        dtype = x.dtype
        if self.rounding is not None:
            x, B, C = (round_to_int8(t, s).to(torch.promote_types(dtype, torch.float32)) * s for t, s in (
                (x, self.x_scale.view(x.shape[1:])),
                (B, self._by_group(self.B_steps)),
                (C, self._by_group(self.C_steps)),
            ))  # fmt: skip
        if state.dtype == torch.int8:
            scale = self.state_steps.view(state.shape[1:-1])
            return quantized_state_update(state, x, dt, A, B, C, scale, *rest, **options).to(dtype)
        return selective_state_update(state, x, dt, A, B, C, *rest, **options).to(dtype)

    def _state_scale(self, state):
        return self.state_steps.view(state.shape[1:-1])[..., None]

    def _from_states(self, hidden_states, mask, states, **packed):
        """The cache's 8-bit state as numbers for the scan, and back."""
        if states is not None and states[1].dtype == torch.int8:
            states = states[0], states[1] * self._state_scale(states[1])
        out, (conv_state, ssm_state) = super()._from_states(hidden_states, mask, states, **packed)
        if self.state_dtype is not None:
            ssm_state = round_to_int8(ssm_state, self._state_scale(ssm_state)).clamp(min=-127)
        return out, (conv_state, ssm_state)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """As the float block's; ssm_state is int8 with `state_dtype` int8."""
        conv_dtype = dtype or self.conv1d.weight.dtype
        conv_state, ssm_state = super().allocate_inference_cache(batch_size, max_seqlen, conv_dtype, **kwargs)
        return conv_state, ssm_state if self.state_dtype is None else ssm_state.to(self.state_dtype)

    def extra_repr(self):
        return f"precision={self.precision!r}, state_dtype={self.state_dtype}"


class QuantMamba2(_QuantizedBlock, Mamba2):
    """A Mamba2 of low-bit weights, its scan over 8-bit x, B and C. Made by `from_float`, or as Mamba2 is.

    With 8-bit activations: in_proj and out_proj are QuantLinear layers with int8 activations (a step a token), the
    latter of a weight and an input that are Hadamard-transformed; the convolution's input is rounded to 8 bits with a
    static step for x and one for each group of B and of C, and its weight with one a channel; its output enters
    `quantized_ssd_scan` with the steps of sorted and clustered heads and channels for x, one a state group for B and C.
    dt, the gate and the norm are not rounded. With "w4a16" only weights are. Without gradients the scan reads int8
    codes; with them it passes them straight through, and the steps (`x_steps` (I, J), `B_steps`, `C_steps`,
    `conv_steps`), which are parameters, can be trained.

    Args:
        precision: "w8a8", "w4a8" or "w4a16".
        head_groups, channel_groups: I and J, the steps of x are (I, J).
        state_dtype: torch.int8 for a decoding state of 8 bits with a static step a channel of a head, `state_steps`.
        The others: as for Mamba2.

    Source: Chiang et al., Quamba2, 2025. Where it differs: activations of the projections have a step a token, and the
    weight keeps its order, since the steps are gathered.
    """

    NAME = "nn.QuantMamba2"
    PROJECTIONS = ("in_proj", "out_proj")
    NO_STATES = (None, None, None, True)

    def _layout(self):
        return self.nheads, self.headdim, self.ngroups

    def _conv_parts(self):
        return 1 + 2 * self.ngroups

    def _conv_ranges(self, xBC):
        x, BC = xBC.split([self.d_ssm, self.conv_dim - self.d_ssm], -1)
        return torch.cat([x.abs().amax()[None], BC.unflatten(-1, (2 * self.ngroups, -1)).abs().amax((0, 1, 3))])

    def _conv_scale(self):
        """(D + 2 G N,)"""
        return torch.cat([
            self.conv_steps[:1].expand(self.d_ssm), self.conv_steps[1:].repeat_interleave(self.d_state)
        ])  # fmt: skip

    def _by_group(self, steps):
        return steps[:, None]

    def _scan(self, x, dt, A, B, C, **options):
        if self._seen is not None:
            self._watch(x, dt, A, B, C, options)
        if self._seen is not None or self.rounding is None:
            return ssd_scan(x, dt, A, B, C, **options)
        scales = self.x_scale, self.B_steps, self.C_steps
        wide = scales[0], *(s[:, None] for s in scales[1:])
        x, B, C = (self._codes(t, s) for t, s in zip((x, B, C), wide))
        return quantized_ssd_scan(x, dt, A, B, C, *scales, **options)

    def _watch(self, x, dt, A, B, C, options):
        self._saw("x", x.abs().amax((0, 1)))
        for name, m in (("B", B), ("C", C)):
            self._saw(name, m.abs().amax((0, 1, 3)))
        state, same = None, {k: options[k] for k in ("dt_bias", "dt_softplus", "dt_limit")}
        for t in range(0, x.shape[1] if self.state_dtype is not None else 0, STATES_SEEN):
            at = slice(t, t + STATES_SEEN)
            _, state = ssd_scan(
                x[:, at], dt[:, at], A, B[:, at], C[:, at], initial_states=state, return_final_states=True, **same
            )  # fmt: skip
            self._saw("state", state.abs().amax((0, 3)))


class QuantMamba(_QuantizedBlock, Mamba):
    """A Mamba of low-bit weights, its scan over 8-bit x, B and C. Made by `from_float`, or as Mamba is.

    As QuantMamba2, of one head: in_proj, x_proj and out_proj are QuantLinear layers, dt_proj stays as it is; the
    convolution's input has one static step, the scan's x those of J clusters of channels, B and C one each.

    Args:
        precision: "w8a8", "w4a8" or "w4a16".
        channel_groups: J.   head_groups: 1.
        state_dtype: torch.int8 for a decoding state of 8 bits with a static step a channel, `state_steps`.
        The others: as for Mamba.

    Source: Chiang et al., Quamba2, 2025, and Quamba, 2025, for Mamba.
    """

    NAME = "nn.QuantMamba"
    PROJECTIONS = ("in_proj", "x_proj", "out_proj")
    NO_STATES = (None, None)

    def _layout(self):
        return 1, self.d_inner, 1

    def _conv_parts(self):
        return 1

    def _conv_ranges(self, x):
        return x.abs().amax()[None]

    def _conv_scale(self):
        return self.conv_steps

    def _by_group(self, steps):
        return steps

    def _scan(self, x, dt, A, B, C, D, **options):
        if self._seen is not None:
            self._watch(x, dt, A, B, C, options)
        if self._seen is not None or self.rounding is None:
            return selective_scan(x, dt, A, B, C, D, **options)
        scales = self.x_scale[0], self.B_steps, self.C_steps
        wide = scales[0][:, None], *(s[:, None] for s in scales[1:])
        x, B, C = (self._codes(t, s) for t, s in zip((x, B, C), wide))
        return quantized_selective_scan(x, dt, A, B, C, *scales, D, **options)

    def _watch(self, x, dt, A, B, C, options):
        self._saw("x", x.abs().amax((0, 2))[None])
        for name, m in (("B", B), ("C", C)):
            self._saw(name, m.abs().amax()[None])
        state, same = None, {k: options[k] for k in ("delta_bias", "delta_softplus")}
        for t in range(0, x.shape[2] if self.state_dtype is not None else 0, STATES_SEEN):
            at = slice(t, t + STATES_SEEN)
            _, state = selective_scan(
                x[..., at], dt[..., at], A, B[..., at], C[..., at], initial_state=state, return_last_state=True, **same
            )  # fmt: skip
            self._saw("state", state.abs().amax((0, 2))[None])


def _fresh(device, dtype):
    """Projections of weights that are still to come: as QuantLinear starts them."""

    def make(linear, **options):
        return QuantLinear(
            linear.in_features, linear.out_features, linear.bias is not None, device=device, dtype=dtype, **options
        )  # fmt: skip

    return make


def quantize_mamba(block, precision="w8a8", **options):
    """The QuantMamba or QuantMamba2 of a Mamba or Mamba2: their `from_float`, by the block's class."""
    kinds = {Mamba: QuantMamba, Mamba2: QuantMamba2}
    if type(block) not in kinds:
        raise TypeError(f"quantize_mamba: block must be a Mamba or Mamba2, got {type(block).__name__}")
    return kinds[type(block)].from_float(block, precision, **options)
