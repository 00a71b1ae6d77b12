"""transformers on scalekern's ops: `accelerate(model)` for Mamba layers, `.undo()` on what it returns; `register()`,
after which `attn_implementation="scalekern"` runs attention (integrations.attention).

Shape letters: B batch, L length, M model width, D channels, N state size, W filter width, R rank of the step size.
"""

import dataclasses
import functools
import inspect
import types

import torch

from scalekern.compat import _shims  # upstream's signatures on the ops, counted
from scalekern.integrations.attention import register  # noqa: F401
from scalekern.ops._linear import is_plain, linear, project
from scalekern.ops.causal_conv1d import ACTIVATIONS

# Mixer class -> its module. Their checkpoints, caches and masks stay transformers' own.
SUPPORTED = {
    "MambaMixer": "transformers.models.mamba.modeling_mamba",
    "FalconMambaMixer": "transformers.models.falcon_mamba.modeling_falcon_mamba",
}
OPS = (
    "mamba_inner", "causal_conv1d", "selective_scan", "mamba_update", "causal_conv1d_update", "selective_state_update",
)  # fmt: skip
KNOWN = "5.17 to 5.24"  # for messages; tested are 5.17.0, 5.23.0 and 5.24.0
_CACHE_NAMES = ("cache", "cache_params")  # since 5.24 and before


def accelerate(model: torch.nn.Module) -> "Acceleration":
    """Run every Mamba mixer of `model` on scalekern's ops, in place; logits, gradients and caches stay the same.

        accelerated = accelerate(model)      # print(accelerated) shows what was replaced
        accelerated.undo()                   # or `with accelerate(model): ...`

    Raises:
        ValueError: the model has no layer of a supported kind (named in the message), was accelerated already, or
            comes from a transformers whose caches are not known.
    """
    mixers = [(name, m) for name, m in model.named_modules() if _supported_class(m)]
    if not mixers:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no layer that scalekern replaces; supported are "
            + " and ".join(f"{name} ({module})" for name, module in SUPPORTED.items())
        )
    for name, mixer in mixers:
        reason = "its forward was replaced already (undo() that first)" if _has_its_own_forward(mixer) else None
        reason = reason or _obstacle(mixer) or unknown(_supported_class(mixer))
        if reason:
            raise ValueError(f"accelerate: {name} ({type(mixer).__name__}) cannot be replaced: {reason}")
    forward = _hooked(mixer_forward)
    forward._scalekern_original, forward.__name__ = None, "forward"  # under which a bound method is pickled
    replaced = [mixer for _, mixer in mixers]
    for mixer in replaced:
        mixer.forward = types.MethodType(forward, mixer)
    for block in [m for m in model.modules() if m._modules.get("mixer") in replaced and not _has_its_own_forward(m)]:
        if type(block).__name__ == type(block.mixer).__name__.replace("Mixer", "Block") and not unknown(type(block)):
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


def _supported_class(module) -> type | None:
    return next((c for c in type(module).__mro__ if SUPPORTED.get(c.__name__) == c.__module__), None)


def _has_its_own_forward(module) -> bool:
    """Another than its class's, which is what a pickle of an accelerated layer comes back with."""
    return module.__dict__.get("forward") not in (None, types.MethodType(type(module).forward, module))


def _obstacle(mixer) -> str | None:
    """Why `mixer_forward` cannot serve this mixer, or None."""
    if mixer.activation not in ACTIVATIONS:
        return f"its activation is {mixer.activation!r}, and the convolution knows silu"
    if not 2 <= mixer.conv_kernel_size <= 8:
        return f"its convolution has width {mixer.conv_kernel_size}, and the op takes 2 to 8"
    return None


def unknown(cls: type) -> str | None:
    """Why the forwards below cannot stand for this mixer's or block's in the transformers that is here, or None."""
    import transformers

    try:
        from transformers.cache_utils import Cache, LinearAttentionLayer
        from transformers.integrations.accelerate import force_accelerate_hooks  # noqa: F401

        layer = LinearAttentionLayer()
        known = (
            not layer.record_past and not layer.has_previous_state[0]
            and layer.conv_states[0] is None and layer.recurrent_states[0] is None
            and "conv_kernel_size" in inspect.signature(layer.update_conv_state).parameters
            and callable(Cache.update_conv_state) and callable(Cache.update_recurrent_state)
        )  # fmt: skip
        names = [*inspect.signature(cls.forward).parameters]
        known = known and names in [["self", "hidden_states", c, "attention_mask", "kwargs"] for c in _CACHE_NAMES]
    except Exception:  # whatever a version does that nobody has seen yet
        known = False
    version = transformers.__version__
    return None if known else f"the caches or the layers of transformers {version} are not known, those of {KNOWN} are"


def _hooked(forward):
    """conv1d and dt_proj are read without being called; where layers are offloaded, their hooks must still fire."""
    from transformers.integrations.accelerate import force_accelerate_hooks

    return force_accelerate_hooks(["conv1d", "dt_proj"])(forward)


def _fuses(mixer) -> bool:
    """mamba_inner normalizes the step size after its projection; FalconMamba does before it, so it runs unfused."""
    return "dt_layernorm" not in mixer._modules


def mixer_forward(self, hidden_states, cache=None, attention_mask=None, *, cache_params=None, **kwargs):
    """The forward of transformers' MambaMixer and FalconMambaMixer: (B, L, M) to (B, L, M)."""
    cache = cache_params if cache is None else cache
    layer = None if cache is None else cache.layers[self.layer_idx]  # the Cache's own getters are younger than these
    if layer is not None and layer.record_past:
        # Assisted decoding rolls the cache back; that bookkeeping stays transformers' own.
        forward = getattr(type(self).forward, "_scalekern_original", type(self).forward)
        return forward(self, hidden_states, cache, attention_mask, **kwargs)
    length = hidden_states.shape[1]
    hidden_states = _masked(hidden_states, attention_mask)
    if layer is not None and length == 1 and layer.has_previous_state[0]:
        if attention_mask is None and _is_plain(self, hidden_states):
            return _fused_step(self, hidden_states, layer)
        return _step(self, hidden_states, layer, attention_mask)
    xz = project(self.in_proj, hidden_states).transpose(1, 2)
    if cache is None and attention_mask is None and _fuses(self) and kwargs.get("seq_idx") is None:
        return _shims.mamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, _A(self), D=self.D, delta_bias=self.dt_proj.bias,
        )  # fmt: skip
    x, z = xz.chunk(2, dim=1)  # [B, D, L] each
    if cache is not None:
        x = cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    x = _shims.causal_conv1d_fn(
        x, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx=kwargs.get("seq_idx"), activation=self.activation
    )
    x = _masked(x[:, :, -length:].transpose(1, 2), attention_mask)  # [B, L, D]
    dt, B, C = _projections(self, x)
    y, state = _shims.selective_scan_fn(
        x.transpose(1, 2), dt.transpose(1, 2), _A(self), B.transpose(1, 2), C.transpose(1, 2), self.D, z=z,
        delta_bias=self.dt_proj.bias, delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    if cache is not None:
        cache.update_recurrent_state(state, self.layer_idx)
    return project(self.out_proj, y.transpose(1, 2))


def mixer_class_forward(original):
    """`mixer_forward` for a whole class, whose instances may have something that it cannot serve: they keep their own,
    whose convolution is then torch's (compat._transformers)."""
    ours = _hooked(mixer_forward)

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return (original if _obstacle(self) else ours)(self, *args, **kwargs)

    forward._scalekern_original = original
    return forward


def block_forward(original):
    """The forward of transformers' MambaBlock and FalconMambaBlock: a token whose block is plain runs as one op."""

    @functools.wraps(original)
    def forward(self, hidden_states, cache=None, attention_mask=None, *, cache_params=None, **kwargs):
        cache = cache_params if cache is None else cache
        if cache is not None and attention_mask is None and hidden_states.shape[1] == 1 and not kwargs:
            mixer, norm = self._modules["mixer"], self._modules["norm"]
            layer = cache.layers[mixer.layer_idx]
            if layer.has_previous_state[0] and not layer.record_past and _is_plain_block(mixer, norm, hidden_states):
                return _fused_step(mixer, hidden_states, layer, norm)
        return original(self, hidden_states, cache, attention_mask, **kwargs)

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
        if not is_plain(self._modules[name]):
            return False
    return not torch.is_autocast_enabled(hidden_states.device.type) and "_is_quantized" not in self.config.__dict__


def _is_plain_block(mixer, norm, hidden_states) -> bool:
    """The norm and the mixer are transformers' own, nothing hangs on them, and the residual keeps its dtype."""
    return (
        SUPPORTED.get(type(mixer).__name__) == type(mixer).__module__ == type(norm).__module__
        and type(norm).__name__ == type(mixer).__name__.replace("Mixer", "RMSNorm")
        and not (_is_replaced(mixer) or _is_replaced(norm) or _is_replaced(mixer._modules["conv1d"]))
        and not _obstacle(mixer)
        and hidden_states.dtype == norm._parameters["weight"].dtype
        and hidden_states.dtype == mixer._modules["in_proj"]._parameters["weight"].dtype
        and hidden_states.dtype in (torch.float32, torch.float64)
        and _is_plain(mixer, hidden_states)
    )  # fmt: skip


def _fused_step(self, hidden_states, layer, norm=None):
    """`_step` as one op, with `norm` the block around it. Parameters are read from the modules' dictionaries: as
    attributes, 20 of them would cost 20 us."""
    own, conv = self._parameters, self._modules["conv1d"]._parameters
    in_proj, x_proj, dt_proj, out_proj = (self._modules[name]._parameters for name in _LINEARS)
    block = {} if norm is None else dict(norm_weight=norm._parameters["weight"], norm_eps=norm.variance_epsilon)
    out = _shims.mamba_update(
        hidden_states.squeeze(1), layer.conv_states[0], layer.recurrent_states[0], in_proj["weight"], conv["weight"],
        conv["bias"], x_proj["weight"], dt_proj["weight"], out_proj["weight"], own["A_log"], own["D"], dt_proj["bias"],
        in_proj_bias=in_proj["bias"], out_proj_bias=out_proj["bias"],
        rms_eps=None if _fuses(self) else self.rms_eps, **block,
    )  # fmt: skip
    return out.unsqueeze(1)


def _step(self, hidden_states, layer, attention_mask):
    """One token; both states of the cache's layer change in place."""
    conv_state, state = layer.conv_states[0], layer.recurrent_states[0]
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
    dt, B, C = project(self.x_proj, x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    if hasattr(self, "dt_layernorm"):
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
    if hasattr(self.config, "_is_quantized"):  # the weight is packed then, and only the layer can read it
        return self.dt_proj(dt) - self.dt_proj.bias, B, C
    return linear(dt, self.dt_proj.weight), B, C


def _A(self):
    return -torch.exp(self.A_log.float())


def _masked(hidden_states, attention_mask):
    """Zero at the padding, as transformers does it: (B, L, ...) times (B, L)."""
    if attention_mask is None:
        return hidden_states
    return (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
