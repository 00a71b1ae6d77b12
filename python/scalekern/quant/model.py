"""Quantizing the linear layers of a model: which, how, and what it has cost each of them.

Shape letters: N outputs, K inputs of a layer.
"""

import contextlib
import dataclasses
import fnmatch
import inspect
import itertools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from scalekern.quant._fold import FoldedRotation, planned, tied
from scalekern.quant._progress import reporter
from scalekern.quant._rotation import block_of
from scalekern.quant.report import LayerReport, QuantReport
from scalekern.quant.tensor import FLOATING

NAME = "quantize_model"
ROWS = 512  # inputs of a layer that are kept to calibrate on
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Which layers become what.

    rules   (pattern, options) pairs: a layer takes the options of the first pattern (fnmatch) that its name matches.
            options: the arguments of QuantLinear.from_linear as a dict, a format's name alone, or None for a layer
            that stays as it is, as one does that nothing matches.
    folds   rotations to fold into pairs of layers first, see FoldedRotation.
    """

    rules: tuple = (("*", "int4"),)
    folds: tuple[FoldedRotation, ...] = ()

    @classmethod
    def of(cls, config) -> "QuantConfig":
        """From a QuantConfig, a list of rules, or one rule's options for all layers."""
        if isinstance(config, QuantConfig):
            return config
        if isinstance(config, (str, dict)):
            return cls((("*", config),))
        if not isinstance(config, (list, tuple)) or not all(isinstance(rule, (list, tuple)) for rule in config):
            raise TypeError(f"{NAME}: config must be a QuantConfig, rules, a dict or a format, got {config!r}")
        return cls(tuple(tuple(rule) for rule in config))

    def options(self, name: str) -> dict | None | str:
        """A layer's options; or, of one that stays as it is, why."""
        for pattern, options in self.rules:
            if fnmatch.fnmatchcase(name, pattern):
                return _as_dict(options) if options is not None else f"pattern {pattern!r} leaves it out"
        return "no pattern matches"


def quantize_model(
    model: nn.Module,
    config,
    *,
    inputs: Iterable | None = None,
    progress: bool | Callable[[int, int, str], None] | None = None,
) -> QuantReport:
    """Replace linear layers of a model, in place, by scalekern.nn.QuantLinear.

    A model on the meta device becomes a skeleton to load a quantized checkpoint into. A layer's hooks stay with it.

    Args:
        model: any module that holds nn.Linear layers (not a subclass's, which may mean something else), or the Conv1D
            of transformers' GPT-2, which is one with its weight transposed.
        config: a QuantConfig, or what QuantConfig.of takes: [("*.head", None), ("*.mlp.*", "int2"), ("*", {"format":
            "int4", "group_size": 64, "method": "hqq", "symmetric": False, "rotation": "hadamard"})], or "int4".
        inputs: batches to calibrate on and to measure output errors with, each a tensor, a tuple of arguments or a
            dict of them; the model runs over them once, in float, in eval mode.
        progress: True or False: a bar on stderr or none; default: a bar where that is a terminal. A function is called
            as progress(done, total, name) before each layer and once after the last.

    Returns:
        QuantReport: each layer's error and SQNR, and the layers that were skipped with the reasons.

    Raises:
        TypeError, ValueError: a config that cannot be; before anything has changed.

    Source: Dettmers et al., LLM.int8(), 2022 (layer by layer); methods and rotations: see scalekern.quant.METHODS and
    scalekern.nn.QuantLinear.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model must be an nn.Module, got {type(model).__name__}")
    config = QuantConfig.of(config)
    _check(config)
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"{NAME}: progress must be None, True, False or a function, got {progress!r}")
    if inputs is not None and (isinstance(inputs, (dict, str, bytes)) or not isinstance(inputs, Iterable)):
        raise TypeError(f"{NAME}: inputs must be an iterable of batches, got {type(inputs).__name__}")
    before = _bytes(model)
    for turn in [planned(model, fold) for fold in config.folds]:  # all that may be wrong is said before the first
        turn()
    chosen, skipped = _select(model, config)
    seen = _inputs_of(model, {name: linear for name, (linear, _) in chosen.items()}, inputs)
    layers, report = [], reporter(progress)
    for name, (linear, options) in chosen.items():
        report(len(layers), len(chosen), name)
        x = seen.pop(name, None)
        with torch.no_grad():
            dense = _as_linear(linear)
            quantized = _quantized(dense, options, x)
            layers.append(_measured(name, dense, quantized, options, x))
        for attribute in _HOOKS:  # the same dictionaries, so that a hook's handle still removes it
            setattr(quantized, attribute, getattr(linear, attribute))
        for parent in list(model.modules()):
            for attribute, child in parent._modules.items():
                if child is linear:
                    setattr(parent, attribute, quantized)
    report(len(chosen), len(chosen), "")
    return QuantReport(tuple(layers), skipped, before, _bytes(model))


def _as_dict(options) -> dict:
    return {"format": options} if isinstance(options, str) else options


def _check(config: QuantConfig) -> None:
    """Every rule on a layer of two inputs: what is wrong with it is said before a model has changed."""
    from scalekern.nn.quant_linear import QuantLinear

    for name in ("rules", "folds"):
        if not isinstance(found := getattr(config, name), (list, tuple)):
            raise TypeError(f"{NAME}: {name} of a QuantConfig must be a tuple, got {found!r}")
    known = set(inspect.signature(QuantLinear.from_linear).parameters) - {"linear", "inputs"}
    for rule in config.rules:
        if len(rule) != 2 or not isinstance(rule[0], str) or not isinstance(rule[1], (str, dict, type(None))):
            raise TypeError(f"{NAME}: a rule must be (pattern, options), got {rule!r}")
        options = _as_dict(rule[1] or "int4")
        if unknown := options.keys() - known:
            raise ValueError(f"{NAME}: options must be among {', '.join(sorted(known))}, got {min(unknown)!r}")
        layer = nn.utils.skip_init(nn.Linear, 2, 1)  # which draws no random numbers
        try:
            QuantLinear.from_linear(layer.requires_grad_(False).apply(lambda m: m.weight.zero_()), **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{NAME}: options of {rule[0]!r}: {error}") from error
    for fold in config.folds:
        if not isinstance(fold, FoldedRotation):
            raise TypeError(f"{NAME}: folds must be FoldedRotations, got {type(fold).__name__}")


def _select(model, config):
    """{name: (layer, options)} of what is to be quantized, {name: reason} of the other linear layers."""
    from scalekern.nn.quant_linear import QuantLinear

    chosen, skipped, names = {}, {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, QuantLinear)) or _is_conv1d(module):
            names.setdefault(module, []).append(name)
        elif not type(module).__module__.startswith("torch.nn."):
            skipped |= _stacks(name, module, config)
    for linear, own in names.items():
        name, options = own[0], config.options(own[0])
        if isinstance(options, str):
            skipped[name] = options
            continue
        if isinstance(linear, QuantLinear):
            skipped[name] = f"quantized already, to {linear.format}"
            continue
        if nn.parameter.is_lazy(linear._parameters.get("weight")):
            skipped[name] = "its weight has no shape yet: call the model once first"
            continue
        others = tied(model, linear.weight, {f"{n}.weight" for n in own})
        if type(linear) is not nn.Linear and not _is_conv1d(linear):
            skipped[name] = f"a {type(linear).__name__}, not a plain nn.Linear"
        elif "weight" not in linear._parameters:  # a hook that would set QuantLinear's too
            skipped[name] = "its weight is made by a hook (pruning, weight_norm): make it a parameter first"
        elif "forward" in linear.__dict__:
            skipped[name] = "its forward was replaced"
        elif name == "":
            skipped[name] = "the model itself, which cannot be replaced in place"
        elif others:
            skipped[name] = f"weight tied to {others[0]}"
        elif linear.weight.numel() == 0:
            skipped[name] = f"shape {tuple(linear.weight.shape)} holds no weight"
        elif linear.weight.dtype not in FLOATING:
            skipped[name] = f"a weight of {str(linear.weight.dtype).removeprefix('torch.')}"
        elif options.get("rotation") and block_of(columns := linear.weight.shape[_is_conv1d(linear) - 1]) == 1:
            skipped[name] = f"shape {tuple(linear.weight.shape)}: {columns} columns cannot be rotated"
        else:
            chosen[name] = linear, options
    return chosen, skipped


def _is_conv1d(module) -> bool:
    """x W + b with W (K, N), a linear layer that GPT-2 calls a convolution; told without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _as_linear(layer) -> nn.Linear:
    """Itself, or the nn.Linear of the same numbers that a Conv1D is."""
    if isinstance(layer, nn.Linear):
        return layer
    linear = nn.Linear(*layer.weight.shape, device="meta").train(layer.training)
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().mT, requires_grad=False), layer.bias
    return linear


def _stacks(name, module, config) -> dict[str, str]:
    """{name: reason} of a module's own matrices in stacks, as mixtures of experts have them: most of such a model."""
    found = {}
    for own, p in module.named_parameters(name, recurse=False):
        if p.dim() == 3 and min(p.shape) > 1 and p.dtype in FLOATING:
            options = config.options(own)
            reason = f"a stack of matrices {tuple(p.shape)}, not an nn.Linear"
            found[own] = options if isinstance(options, str) else reason
    return found


def _inputs_of(model, layers: dict[str, nn.Linear], batches) -> dict[str, torch.Tensor]:
    """{name: (rows, K)} what reaches each layer, at most ROWS rows of all batches, evenly."""
    if batches is None:
        return {}
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name):
        def hook(module, args, options):
            seen.setdefault(name, []).append(_thinned((args[0] if args else options["input"]).detach()))

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, linear in layers.items():
            stack.callback(linear.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        for batch in batches:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    return {name: _thinned(found) for name, rows in seen.items() if len(found := torch.cat(rows))}


def _thinned(rows):
    rows = rows.reshape(-1, rows.shape[-1])
    return rows[:: max(1, -(-len(rows) // ROWS))].clone()


def _quantized(linear, options, x):
    from scalekern.nn.quant_linear import QuantLinear

    if not linear.weight.is_meta:
        return QuantLinear.from_linear(linear, **options, inputs=x)
    options = {k: v for k, v in options.items() if k != "method"}
    return QuantLinear(
        linear.in_features, linear.out_features, linear.bias is not None, **options, device="meta",
        dtype=linear.weight.dtype,
    ).train(linear.training)  # fmt: skip


def _measured(name, linear, quantized, options, x) -> LayerReport:
    rotation, activation = quantized.rotation, quantized.activation
    kind = " ".join([options.get("format", "int4"), *filter(None, (options.get("method"), rotation, activation))])
    bits = 8 * quantized.quantized_weight.nbytes / linear.weight.numel()
    if linear.weight.is_meta:
        return LayerReport(name, tuple(linear.weight.shape), kind, bits, None, "nothing", None)
    of_weight = _relative(quantized.weight, linear.weight)
    error, of = of_weight, "weight"
    if x is not None:
        error, of = _relative(quantized(x), F.linear(x, linear.weight, linear.bias)), "outputs"  # beside any hooks
    sqnr = math.inf if of_weight == 0 else -20 * math.log10(of_weight)
    return LayerReport(name, tuple(linear.weight.shape), kind, bits, error, of, sqnr)


def _relative(actual, expected) -> float:
    difference, norm = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)


def _bytes(model) -> int:
    tensors = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return sum(t.nbytes for t in tensors.values() if not nn.parameter.is_lazy(t))
