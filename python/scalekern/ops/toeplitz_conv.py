"""Grouped convolution with short filters: public function, checks, schemas, backends, fakes and gradient.

Shape letters: B batch, D channels, L length, G groups, K taps.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, composed, filling, triton
from scalekern.ops import _toeplitz
from scalekern.reference.fft_conv import toeplitz_conv_bwd as reference_bwd
from scalekern.reference.fft_conv import toeplitz_conv as reference_fwd

NAME = "toeplitz_conv"


def toeplitz_conv(u, k, groups=None):
    """out[t] = sum_s k[s] u[t - s], one filter for every group of D / G neighbouring channels. Differentiable.

    For filters up to a few hundred taps: blocks of tokens meet Toeplitz matrices of the filter, one for the block
    itself and one for each of the blocks before it that the filter reaches, so that matrix units do the sums, with a
    filter a channel as well. `fft_conv` is for longer filters, and has gates and modes.

    Args:
        u: (B, D, L), float64, float32, float16 or bfloat16, any strides.
        k: (G, K), floating, K from 1, also beyond L; k[0] meets the current token. G divides D.
        groups: G, to be checked against k; None for k's.

    Returns:
        out (B, D, L) in u's dtype (under autocast, the autocast dtype), accumulated in float32, float64 for float64 u.
        On a GPU a token that is not finite may make the whole blocks that meet it not finite.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Ku et al., Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale (StripedHyena 2),
    2025: the grouped filters and the two-pass block form.
    """
    _checks.tensor(NAME, "u", u, dims=3, dtypes=_checks.FLOATING)
    _checks.tensor(NAME, "k", k, dims=2, dtypes=_checks.FLOATING)
    count, channels = k.shape[0], u.shape[1]
    if groups is not None and not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"{NAME}: groups must be an integer or None, got {groups!r}")
    if groups is not None and groups != count:
        raise ValueError(f"{NAME}: k must have {groups} filters like groups, got shape {tuple(k.shape)}")
    if count < 1 or channels % count:
        raise ValueError(f"{NAME}: groups must divide the {channels} channels of u, got {count}")
    if k.shape[1] < 1:
        raise ValueError(f"{NAME}: k must have at least one tap, got shape {tuple(k.shape)}")
    _checks.same_device(NAME, "u", u, k=k)
    return toeplitz_conv_fwd(u, k)


def _allocate_fwd(u, k):
    """The output, uninitialized: what the fake returns and what the backends fill."""
    return torch.empty_like(u)


def _allocate_bwd(dout, u, k):
    return torch.empty_like(u), torch.empty_like(k)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return toeplitz_conv_bwd(dout, *ctx.saved_tensors)


def _backends(allocate, function, fill, reference):
    kernel = Backend("triton", filling(allocate, triton(NAME, function)))
    return kernel, *composed(filling(allocate, fill), reference)


_fill_bwd = _library.without_autocast(_toeplitz.backward)

toeplitz_conv_fwd = _library.define(
    NAME,
    "toeplitz_conv_fwd(Tensor u, Tensor k) -> Tensor",
    backends=_backends(_allocate_fwd, "toeplitz_conv_fwd", _toeplitz.forward, reference_fwd),
    fake=_allocate_fwd,
    empty=lambda u, k: u.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("u",),
)

toeplitz_conv_bwd = _library.define(
    NAME,
    "toeplitz_conv_bwd(Tensor dout, Tensor u, Tensor k) -> (Tensor, Tensor)",
    backends=_backends(_allocate_bwd, "toeplitz_conv_bwd", _fill_bwd, reference_bwd),
    fake=_allocate_bwd,
    empty=lambda dout, u, k: u.numel() == 0,
)
