"""Rotations folded into the weights on both sides of a linear connection, where that is exact and costs nothing."""

import dataclasses
import fnmatch

import torch
from torch import nn

from scalekern import _checks
from scalekern.quant._rotation import ROTATIONS, block_of, draw_signs, rotate

NAME = "fold_rotation"


@dataclasses.dataclass(frozen=True)
class FoldedRotation:
    """What lies between `producers` and `consumers` is turned by R: W_p <- R W_p, b_p <- R b_p, W_c <- W_c R^T.

    Exact where the consumers read linear maps of nothing but the producers' outputs that commute with R: those outputs
    themselves, sums of them (a residual stream), an attention's averages of them over tokens (with block = head size).
    An RMSNorm between commutes once its weight g is folded, W_c <- W_c diag(g), g <- 1. That nothing else writes or
    reads there is the caller's to know.

    Attributes:
        producers: patterns of names of nn.Linear and nn.Embedding.
        consumers: patterns of names of nn.Linear.
        norms: {name of an RMSNorm: patterns of the consumers behind it}.
        rotation: "hadamard" or "random_hadamard" with signs from `seed`.
        block: the order of the Hadamard matrices; None for the largest that divides the width. With one, widths may
            differ, as those of values and outputs do where heads share keys: every block then has the same signs.

    Source: Ashkboos et al., SliceGPT, 2024, section 3 (computational invariance); QuaRot, 2024, section 4.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    norms: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rotation: str = "random_hadamard"
    seed: int = 0
    block: int | None = None


def fold_rotation(model: nn.Module, fold: FoldedRotation) -> None:
    """Turn the weights of a model in place; its outputs stay as they are, but for rounding.

    Args:
        model: holds all modules that `fold` names.
        fold: see FoldedRotation.

    Raises:
        TypeError, ValueError: a pattern that matches nothing of its kind, widths that differ, a tied weight, a norm
            that is not x / rms(x) * weight; before anything has changed.
    """
    planned(model, fold)()


@torch.no_grad()
def planned(model: nn.Module, fold: FoldedRotation):
    """What turns the weights when it is called, once all that may be wrong has been said."""
    _check(fold)
    producers = _matched(model, "producers", fold.producers, (nn.Linear, nn.Embedding))
    consumers = _matched(model, "consumers", fold.consumers, (nn.Linear,))
    behind = {n: _matched(model, f"norms[{n!r}]", patterns, (nn.Linear,)) for n, patterns in fold.norms.items()}
    norms = {n: _rms_norm(model, n) for n in behind}
    if both := producers.keys() & consumers.keys():
        raise ValueError(f"{NAME}: producers must not be consumers, got {min(both)}")
    for name, found in behind.items():
        if stray := found.keys() - consumers.keys():
            raise ValueError(f"{NAME}: norms[{name!r}] must be followed by consumers, got {min(stray)}")
    widths = _widths(producers, consumers, norms, fold.block)
    n = max(widths)
    b = fold.block or block_of(n)
    if fold.rotation not in ROTATIONS[1:]:
        raise ValueError(f"{NAME}: rotation must be 'hadamard' or 'random_hadamard', got {fold.rotation!r}")
    if any(width % b for width in widths) or b < 2 or block_of(b) != b:
        divided = " and ".join(map(str, sorted(widths)))
        raise ValueError(f"{NAME}: block must be the order of a Hadamard matrix and divide {divided}, got {b}")
    _refuse_tied(model, {**producers, **consumers})
    signs = draw_signs(n if len(widths) == 1 else b, fold.rotation, fold.seed)

    def turned(x):
        own = None if signs is None else signs.repeat(x.shape[-1] // len(signs)).to(x.device)
        return rotate(_wide(x), own, b)

    @torch.no_grad()
    def turn():
        for name, found in behind.items():
            for linear in found.values():
                linear.weight.copy_(_wide(linear.weight) * _wide(norms[name].weight).to(linear.weight.device))
            norms[name].weight.fill_(1)
        for module in producers.values():
            embedding = isinstance(module, nn.Embedding)
            module.weight.copy_(turned(module.weight) if embedding else turned(module.weight.mT).mT)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(turned(module.bias))
        for linear in consumers.values():
            linear.weight.copy_(turned(linear.weight))

    return turn


def _check(fold) -> None:
    if not isinstance(fold, FoldedRotation):
        raise TypeError(f"{NAME}: fold must be a FoldedRotation, got {type(fold).__name__}")
    if not isinstance(fold.norms, dict):
        raise TypeError(f"{NAME}: norms must be a dict of names to patterns, got {fold.norms!r}")
    named = {"producers": fold.producers, "consumers": fold.consumers}
    for what, patterns in (named | {f"norms[{n!r}]": found for n, found in fold.norms.items()}).items():
        if not isinstance(patterns, (tuple, list)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{NAME}: {what} must be a tuple of patterns, got {patterns!r}")
    if not all(named.values()):
        raise ValueError(f"{NAME}: producers and consumers must name modules, got {named}")
    if not isinstance(fold.seed, int) or isinstance(fold.seed, bool):
        raise TypeError(f"{NAME}: seed must be an integer, got {fold.seed!r}")
    if fold.block is not None:
        _checks.at_least(NAME, "block", fold.block, 2)


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _matched(model, what, patterns, kinds) -> dict[str, nn.Module]:
    found = {}
    for pattern in patterns:
        of_kind = {n: m for n, m in model.named_modules() if fnmatch.fnmatchcase(n, pattern) and isinstance(m, kinds)}
        if not of_kind:
            names = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
            raise ValueError(f"{NAME}: {what} must name {names}, got {pattern!r}, which matches none")
        found |= of_kind
    return found


def _rms_norm(model, name):
    """The module, if it is one whose weight can be folded: asked by trying, for there are RMSNorms with 1 + weight."""
    module = dict(model.named_modules()).get(name)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1:
        raise ValueError(f"{NAME}: norms must name modules with a weight of one dimension, got {name!r}")
    if weight.is_meta:  # a skeleton, which has no numbers to try
        return module
    x = 1e3 * torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    found, wanted = _wide(module(x)), _wide(x) * _wide(x).square().mean(-1, keepdim=True).rsqrt() * _wide(weight)
    if not (found - wanted).norm() <= 0.02 * wanted.norm():
        raise ValueError(f"{NAME}: norms must be x / rms(x) * weight, got {name!r}, which is something else")
    return module


def _widths(producers, consumers, norms, block) -> set[int]:
    sizes = {name: m.weight.shape[-1 if isinstance(m, nn.Embedding) else 0] for name, m in producers.items()}
    sizes |= {name: m.in_features for name, m in consumers.items()} | {n: len(m.weight) for n, m in norms.items()}
    if len(set(sizes.values())) > 1 and (block is None or norms):
        raise ValueError(f"{NAME}: all widths must be equal, or without norms multiples of block, got {sizes}")
    return set(sizes.values())


def _refuse_tied(model, modules):
    for name, module in modules.items():
        if others := tied(model, module.weight, {f"{name}.weight"}):
            raise ValueError(f"{NAME}: the weight of {name!r} must be its own, got one tied to {others[0]!r}")


def tied(model, parameter, own: set[str]) -> list[str]:
    """Names, other than its own, under which a model has this parameter or its memory."""
    place = lambda p: id(p) if nn.parameter.is_lazy(p) or p.is_meta or p.numel() == 0 else p.data_ptr()
    named = model.named_parameters(remove_duplicate=False)
    return [n for n, p in named if n not in own and (p is parameter or place(p) == place(parameter))]
