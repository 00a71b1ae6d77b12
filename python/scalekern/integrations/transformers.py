"""One transformers model on scalekern's ops: `accelerate(model)`, and `.undo()` on what it returns.

Shape letters: B batch, L length, M model width, D channels, N state size, W filter width, R rank of the step size.
"""

import dataclasses
import functools
import types

import torch

from scalekern.compat import _shims  # upstream's signatures on the ops, counted
from scalekern.ops.causal_conv1d import ACTIVATIONS

# Mixer class -> its module. Their checkpoints, caches and masks stay transformers' own.
SUPPORTED = {
    "MambaMixer": "transformers.models.mamba.modeling_mamba",
    "FalconMambaMixer": "transformers.models.falcon_mamba.modeling_falcon_mamba",
}
OPS = (
    "mamba_inner", "causal_conv1d", "selective_scan", "mamba_update", "causal_conv1d_update", "selective_state_update",
)  # fmt: skip


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
        reason = "its forward was replaced already (undo() that first)" if "forward" in mixer.__dict__ else _obstacle(mixer)
        if reason:
            raise ValueError(f"accelerate: {name} ({type(mixer).__name__}) cannot be replaced: {reason}")
    forward = _hooked(mixer_forward)
    forward._scalekern_original = None
    replaced = [mixer for _, mixer in mixers]
    for mixer in replaced:
        mixer.forward = types.MethodType(forward, mixer)
    for block in [m for m in model.modules() if m._modules.get("mixer") in replaced and "forward" not in m.__dict__]:
        if type(block).__name__ == type(block.mixer).__name__.replace("Mixer", "Block"):
            block.forward = types.MethodType(block_forward(type(block).forward), block)
            replaced.append(block)
    summary = [Replaced(name, type(m).__name__, OPS if _fuses(m) else OPS[1:]) for name, m in mixers]
    return Acceleration(replaced, summary)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """One row of the summary: a layer, its class, and the ops that it runs on now."""

    layer: str
    kind: str
    ops: tuple[str, ...]


class Acceleration:
    """What `accelerate` did: `summary` holds a row for each replaced layer, `undo` puts the layers back."""

    def __init__(self, replaced: list[torch.nn.Module], summary: list[Replaced]):
        self._replaced = replaced
        self.summary = summary

    def undo(self) -> None:
        """Back to transformers' own forward; a second call does nothing."""
        for module in self._replaced:
            module.__dict__.pop("forward", None)
        self._replaced = []

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
    """Why `mixer_forward` cannot serve this mixer, or None."""
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
    return "dt_layernorm" not in mixer._modules


def mixer_forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
    """The forward of transformers' MambaMixer and FalconMambaMixer: (B, L, M) to (B, L, M)."""
    if cache_params is not None and cache_params.is_recording_past(self.layer_idx):
        # Assisted decoding rolls the cache back; that bookkeeping stays transformers' own.
        forward = getattr(type(self).forward, "_scalekern_original", type(self).forward)
        return forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    length = hidden_states.shape[1]
    hidden_states = _masked(hidden_states, attention_mask)
    if cache_params is not None and length == 1:
        conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
        if conv_state is not None and attention_mask is None and _is_plain(self, hidden_states):
            return _fused_step(self, hidden_states, conv_state, cache_params)
        if conv_state is not None:
            return _step(self, hidden_states, conv_state, cache_params, attention_mask)
    xz = self.in_proj(hidden_states).transpose(1, 2)
    if cache_params is None and attention_mask is None and _fuses(self) and kwargs.get("seq_idx") is None:
        return _shims.mamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, _A(self), D=self.D, delta_bias=self.dt_proj.bias,
        )  # fmt: skip
    x, z = xz.chunk(2, dim=1)  # [B, D, L] each
    if cache_params is not None:
        x = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    x = _shims.causal_conv1d_fn(
        x, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx=kwargs.get("seq_idx"), activation=self.activation
    )
    x = _masked(x[:, :, -length:].transpose(1, 2), attention_mask)  # [B, L, D]
    dt, B, C = _projections(self, x)
    y, state = _shims.selective_scan_fn(
        x.transpose(1, 2), dt.transpose(1, 2), _A(self), B.transpose(1, 2), C.transpose(1, 2), self.D, z=z,
        delta_bias=self.dt_proj.bias, delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    if cache_params is not None:
        cache_params.update_recurrent_state(state, self.layer_idx)
    return self.out_proj(y.transpose(1, 2))


def mixer_class_forward(original):
    """`mixer_forward` for a whole class, whose instances may have something that it cannot serve."""
    ours = _hooked(mixer_forward)

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        chosen = original if _obstacle(self) else ours
        return chosen(self, hidden_states, cache_params, attention_mask, **kwargs)

    forward._scalekern_original = original
    return forward


def block_forward(original):
    """The forward of transformers' MambaBlock and FalconMambaBlock: a token whose block is plain runs as one op."""

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        if cache_params is not None and attention_mask is None and hidden_states.shape[1] == 1 and not kwargs:
            mixer, norm = self._modules["mixer"], self._modules["norm"]
            if not cache_params.is_recording_past(mixer.layer_idx) and _is_plain_block(mixer, norm, hidden_states):
                conv_state = cache_params.get_conv_state(mixer.layer_idx, state_idx=0)
                if conv_state is not None:
                    return _fused_step(mixer, hidden_states, conv_state, cache_params, norm)
        return original(self, hidden_states, cache_params, attention_mask, **kwargs)

    forward._scalekern_original = original
    return forward


_LINEARS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def _is_replaced(module) -> bool:
    """Somebody's hook or forward would be skipped if the module's parameters were used without calling it."""
    forward = module.__dict__.get("forward")
    return bool(
        module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__
        or forward is not None and not hasattr(forward, "_scalekern_original")
    )  # fmt: skip


def _is_plain(self, hidden_states) -> bool:
    """The projections are nothing but their weights: not quantized, adapted, hooked or cast."""
    for name in _LINEARS:
        linear = self._modules[name]
        if type(linear) is not torch.nn.Linear or _is_replaced(linear):
            return False
    return not torch.is_autocast_enabled(hidden_states.device.type) and "_is_quantized" not in self.config.__dict__


def _is_plain_block(mixer, norm, hidden_states) -> bool:
    """The norm and the mixer are transformers' own, nothing hangs on them, and the residual keeps its dtype."""
    return (
        SUPPORTED.get(type(mixer).__name__) == type(mixer).__module__ == type(norm).__module__
        and type(norm).__name__ == type(mixer).__name__.replace("Mixer", "RMSNorm")
        and not (_is_replaced(mixer) or _is_replaced(norm) or _is_replaced(mixer._modules["conv1d"]))
        and not _obstacle(mixer)
        and hidden_states.dtype == norm._parameters["weight"].dtype == mixer._modules["in_proj"]._parameters["weight"].dtype
        and hidden_states.dtype in (torch.float32, torch.float64)
        and _is_plain(mixer, hidden_states)
    )  # fmt: skip


def _fused_step(self, hidden_states, conv_state, cache_params, norm=None):
    """`_step` as one op, with `norm` the block around it. Parameters are read from the modules' dictionaries: as
    attributes, 20 of them would cost 20 us."""
    state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
    own, conv = self._parameters, self._modules["conv1d"]._parameters
    in_proj, x_proj, dt_proj, out_proj = (self._modules[name]._parameters for name in _LINEARS)
    block = {} if norm is None else dict(norm_weight=norm._parameters["weight"], norm_eps=norm.variance_epsilon)
    out = _shims.mamba_update(
        hidden_states.squeeze(1), conv_state, state, in_proj["weight"], conv["weight"], conv["bias"],
        x_proj["weight"], dt_proj["weight"], out_proj["weight"], own["A_log"], own["D"], dt_proj["bias"],
        in_proj_bias=in_proj["bias"], out_proj_bias=out_proj["bias"],
        rms_eps=None if _fuses(self) else self.rms_eps, **block,
    )  # fmt: skip
    return out.unsqueeze(1)


def _step(self, hidden_states, conv_state, cache_params, attention_mask):
    """One token; both states of the cache change in place."""
    state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
    x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # [B, D] each
    x = _shims.causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
    x = x if attention_mask is None else (x * attention_mask).to(x.dtype)
    dt, B, C = _projections(self, x)
    y = _shims.selective_state_update(
        state, x, dt, _A(self), B, C, self.D, z=z, dt_bias=self.dt_proj.bias, dt_softplus=True
    )
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
