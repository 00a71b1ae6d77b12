"""One transformers model on scalekern's ops: `accelerate(model)`, and `.undo()` on what it returns.

Shape letters: B batch, L length, M model width, D channels, N state size, W filter width, R rank of the step size.
"""

import dataclasses
import types

import torch

from scalekern.ops.causal_conv1d import ACTIVATIONS, causal_conv1d, causal_conv1d_update
from scalekern.ops.mamba_inner import mamba_inner
from scalekern.ops.selective_scan import selective_scan
from scalekern.ops.selective_state_update import selective_state_update

# Mixer class -> its module. Their checkpoints, caches and masks stay transformers' own.
SUPPORTED = {
    "MambaMixer": "transformers.models.mamba.modeling_mamba",
    "FalconMambaMixer": "transformers.models.falcon_mamba.modeling_falcon_mamba",
}
OPS = ("mamba_inner", "causal_conv1d", "selective_scan", "causal_conv1d_update", "selective_state_update")


def accelerate(model: torch.nn.Module) -> "Acceleration":
    """Run every Mamba mixer of `model` on scalekern's ops, in place; logits, gradients and caches stay the same.

        accelerated = accelerate(model)      # print(accelerated) shows what was replaced
        accelerated.undo()                   # or `with accelerate(model): ...`

    Raises:
        ValueError: the model has no layer of a supported kind (named in the message), or was accelerated already.
    """
    mixers = [(name, m) for name, m in model.named_modules() if _is_supported(m)]
    if not mixers:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no layer that scalekern replaces; supported are "
            + " and ".join(f"{name} ({module})" for name, module in SUPPORTED.items())
        )
    for name, mixer in mixers:
        reason = _obstacle(mixer)
        if reason:
            raise ValueError(f"accelerate: {name} ({type(mixer).__name__}) cannot be replaced: {reason}")
    forward = _hooked(mixer_forward)
    for _, mixer in mixers:
        mixer.forward = types.MethodType(forward, mixer)
    summary = [Replaced(name, type(m).__name__, OPS if _fuses(m) else OPS[1:]) for name, m in mixers]
    return Acceleration([mixer for _, mixer in mixers], summary)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """One row of the summary: a layer, its class, and the ops that it runs on now."""

    layer: str
    kind: str
    ops: tuple[str, ...]


class Acceleration:
    """What `accelerate` did: `summary` holds a row for each replaced layer, `undo` puts the layers back."""

    def __init__(self, mixers: list[torch.nn.Module], summary: list[Replaced]):
        self._mixers = mixers
        self.summary = summary

    def undo(self) -> None:
        """Back to transformers' own forward; a second call does nothing."""
        for mixer in self._mixers:
            mixer.__dict__.pop("forward", None)
        self._mixers = []

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __str__(self) -> str:
        rows = [("layer", "class", "runs on"), *((r.layer, r.kind, ", ".join(r.ops)) for r in self.summary)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _is_supported(module) -> bool:
    return any(SUPPORTED.get(c.__name__) == c.__module__ for c in type(module).__mro__)


def _obstacle(mixer) -> str | None:
    if "forward" in mixer.__dict__:
        return "its forward was replaced already (undo() that first)"
    if mixer.activation not in ACTIVATIONS:
        return f"its activation is {mixer.activation!r}, and the convolution knows silu"
    if not 2 <= mixer.conv_kernel_size <= 8:
        return f"its convolution has width {mixer.conv_kernel_size}, and the op takes 2 to 8"
    return None


def _hooked(forward):
    """conv1d and dt_proj are read without being called; where layers are offloaded, their hooks must still fire."""
    from transformers.cache_utils import Cache
    from transformers.integrations.accelerate import force_accelerate_hooks

    if not hasattr(Cache, "get_recurrent_state"):
        import transformers

        raise ValueError(f"accelerate: the caches of transformers {transformers.__version__} are older than supported")
    return force_accelerate_hooks(["conv1d", "dt_proj"])(forward)


def _fuses(mixer) -> bool:
    """mamba_inner normalizes the step size after its projection; FalconMamba does before it, so it runs unfused."""
    return not hasattr(mixer, "dt_layernorm")


def mixer_forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
    """The forward of transformers' MambaMixer and FalconMambaMixer: (B, L, M) to (B, L, M)."""
    if cache_params is not None and cache_params.is_recording_past(self.layer_idx):
        # Assisted decoding rolls the cache back; that bookkeeping stays transformers' own.
        return type(self).forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    length = hidden_states.shape[1]
    hidden_states = _masked(hidden_states, attention_mask)
    if cache_params is not None and length == 1:
        conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
        if conv_state is not None:
            return _step(self, hidden_states, conv_state, cache_params, attention_mask)
    xz = self.in_proj(hidden_states).transpose(1, 2)
    if cache_params is None and attention_mask is None and _fuses(self) and kwargs.get("seq_idx") is None:
        return mamba_inner(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, _A(self), D=self.D, delta_bias=self.dt_proj.bias,
        )  # fmt: skip
    x, z = xz.chunk(2, dim=1)  # [B, D, L] each
    if cache_params is not None:
        x = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    x = causal_conv1d(
        x, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx=kwargs.get("seq_idx"), activation=self.activation
    )
    x = _masked(x[:, :, -length:].transpose(1, 2), attention_mask)  # [B, L, D]
    dt, B, C = _projections(self, x)
    y, state = selective_scan(
        x.transpose(1, 2), dt.transpose(1, 2), _A(self), B.transpose(1, 2), C.transpose(1, 2), self.D, z=z,
        delta_bias=self.dt_proj.bias, delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    if cache_params is not None:
        cache_params.update_recurrent_state(state, self.layer_idx)
    return self.out_proj(y.transpose(1, 2))


def _step(self, hidden_states, conv_state, cache_params, attention_mask):
    """One token; both states of the cache change in place."""
    state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
    x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # [B, D] each
    x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
    x = x if attention_mask is None else (x * attention_mask).to(x.dtype)
    dt, B, C = _projections(self, x)
    y = selective_state_update(state, x, dt, _A(self), B, C, self.D, z=z, dt_bias=self.dt_proj.bias, dt_softplus=True)
    return self.out_proj(y)[:, None]


def _projections(self, x):
    """(..., D) -> the raw step sizes (..., D), B and C (..., N), each normalized where the mixer does."""
    dt, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    if hasattr(self, "dt_layernorm"):
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
    if hasattr(self.config, "_is_quantized"):  # the weight is packed then, and only the layer can read it
        return self.dt_proj(dt) - self.dt_proj.bias, B, C
    return torch.nn.functional.linear(dt, self.dt_proj.weight), B, C


def _A(self):
    return -torch.exp(self.A_log.float())


def _masked(hidden_states, attention_mask):
    """Zero at the padding, as transformers does it: (B, L, ...) times (B, L)."""
    if attention_mask is None:
        return hidden_states
    return (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
