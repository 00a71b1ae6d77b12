"""Attention over disjoint sets of keys, joined: public function, checks, schema, backends, fake and gradient.

Shape letters: N parts, Pv head dim of the values.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import composed
from scalekern.reference.merge_attention import merge_attention_bwd as reference_bwd
from scalekern.reference.merge_attention import merge_attention_fwd as reference_fwd

NAME = "merge_attention"


def merge_attention(outs, lses):
    """The attention over the union of disjoint sets of keys, from the attention over each of them.

    lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i: how splits of a cache, chunks of a prefill and the
    steps of a ring are joined. Differentiable in both arguments. A part with lse -inf saw no key: its out is not read,
    and gradients through it are 0. Sums are taken in float32 (float64).

    Args:
        outs: (N, ..., Pv), or a sequence of N tensors (..., Pv); float64, float32, float16 or bfloat16.
        lses: (N, ...), or a sequence likewise: what `sparse_attention` and `sparse_attention_decode` return for
            `return_lse=True`. A sink's score (`sinks`) must be in one part only.

    Returns:
        (out (..., Pv) in outs' dtype, lse (...) in lses' dtype), ready to be merged again. Where no part saw a key: 0
        and -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Dao et al., FlashAttention, 2022, section 3.1; Liu et al., Ring Attention, 2023, section 3.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    for name, x in (("outs", outs), ("lses", lses)):
        if not x.is_floating_point():
            _checks.dtype(NAME, name, x, *_checks.FLOATING)
    if outs.dim() < 2:
        raise ValueError(f"{NAME}: outs must have at least 2 dimensions, got shape {tuple(outs.shape)}")
    _checks.shape(NAME, "lses", lses, outs.shape[:-1])
    _checks.same_device(NAME, "outs", outs, lses=lses)
    return merge_attention_fwd(outs, lses)


def _stacked(name, parts):
    if isinstance(parts, (list, tuple)):
        for part in parts:
            if not isinstance(part, torch.Tensor):
                got = f"{type(parts).__name__} of {type(part).__name__}"
                raise TypeError(f"{NAME}: {name} must be a torch.Tensor, got {got}")
        if not parts:
            raise ValueError(f"{NAME}: {name} must have at least one part, got none")
        for part in parts[1:]:
            _checks.shape(NAME, name, part, parts[0].shape)
            _checks.dtype(NAME, name, part, parts[0].dtype)
        return torch.stack(parts)
    if not isinstance(parts, torch.Tensor):
        raise TypeError(f"{NAME}: {name} must be a torch.Tensor, got {type(parts).__name__}")
    return parts


def _allocate_fwd(outs, lses):
    """The outputs, uninitialized: what the fake returns."""
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _allocate_bwd(dout, dlse, outs, lses, lse):
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


merge_attention_fwd = _library.define(
    NAME,
    "merge_attention_fwd(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    backends=composed(reference_fwd, reference_fwd),
    fake=_allocate_fwd,
    empty=lambda outs, lses: outs.numel() == 0,
    setup_context=_setup_context,
    backward=lambda ctx, dout, dlse: merge_attention_bwd(dout, dlse, *ctx.saved_tensors),
    autocast=("outs",),
)

merge_attention_bwd = _library.define(
    NAME,
    "merge_attention_bwd(Tensor dout, Tensor dlse, Tensor outs, Tensor lses, Tensor lse) -> (Tensor, Tensor)",
    backends=composed(_library.without_autocast(reference_bwd), _library.without_autocast(reference_bwd)),
    fake=_allocate_bwd,
    empty=lambda dout, dlse, outs, *rest: outs.numel() == 0,
)
