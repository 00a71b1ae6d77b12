"""The long convolution by the library's own FFTs on a CPU; csrc/fft_conv/cpu_fft_conv_kernel.cpp says how.

What is not finite spreads over its row there: such rows are done again by the composed backend.
"""

import torch

from scalekern._dispatch import native
from scalekern.ops import _fft_conv as blocks

_forward = native("fft_conv_fwd", "cpu")
_backward = native("fft_conv_bwd", "cpu")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum):
    """None, or why the call is left to the composition of torch's FFTs."""
    if mode == "circular":
        return "a circular convolution of any period is left to torch's FFT"
    if u.dtype not in _DTYPES:
        return f"computes in float32, got {u.dtype}"
    if any(t is not None and t.dtype != torch.float32 for t in (k, k_reverse, skip, bias)):
        return "filters, skip and bias must be float32"
    if any(t is not None and t.dtype != u.dtype for t in (pregate, postgate)):
        return f"gates must be {u.dtype} like u"
    return None


def supports_fwd(*args):
    """As well for "auto", however few the taps: on two cores of an AMD EPYC, B2 D256 float32, L 512 / 2,048 / 8,192, one
    tap takes 0.36 / 1.8 / 5.7 ms, torch's grouped convolution 0.54 / 2.0 / 6.1, and with 64 taps 0.6 / 2.0 / 7.1 and
    1.4 / 4.4 / 18 (the least of twelve). A spectrum for torch's FFT is of no use here; transforming k takes less time.
    """
    method = args[-3]
    return f"method {method!r} was asked for" if method in ("direct", "toeplitz") else supports(*args)


def supports_bwd(dout, *args):
    return supports(*args) if dout.dtype == args[0].dtype else f"dout must be {args[0].dtype} like u"


def _offset(k, mode):
    return (k.shape[-1] - 1) // 2 if mode == "same" else 0


def forward(out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum):
    bad = torch.empty(u.shape[:2], dtype=torch.bool, device=u.device)
    _forward(out, bad, u, k, k_reverse, skip, bias, pregate, postgate, mask, _offset(k, mode))
    if bool(bad.any()):
        out[bad] = _again(bad, out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode)


def backward(
    du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate, dout, u, k, k_reverse, skip, bias, pregate, postgate, mask,
    mode, method, precision, spectrum,
):  # fmt: skip
    present = lambda gradient, of: None if of is None else gradient
    bad = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
    _backward(
        du, dk, present(dk_reverse, k_reverse), present(dskip, skip), present(dbias, bias), present(dpregate, pregate),
        present(dpostgate, postgate), bad, dout, u, k, k_reverse, skip, bias, pregate, postgate, mask, _offset(k, mode),
    )  # fmt: skip
    if bool(bad.any()):
        y = _again(bad, dout, u, k, k_reverse, skip, bias, pregate, None, mask, mode)
        dpostgate[bad] = (dout[bad].to(y.dtype) * y).to(dpostgate.dtype)


forward.native_op, backward.native_op = _forward.native_op, _backward.native_op


def _again(bad, like, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode):
    """The bad rows (B, D) of a result, (R, M), by the composed backend."""
    rows = lambda t: None if t is None else t[bad][None]
    channels = torch.arange(u.shape[1]).expand(bad.shape)[bad]
    channel = lambda t: None if t is None else t[channels]
    filters = lambda t: t if t is None else channel(t) if t.dim() == 2 else t[bad]
    shown = None if mask is None else mask[:, None].expand(u.shape)[bad]
    u_, gate = (t if t is None or shown is None else torch.where(shown, t, 0) for t in (rows(u), rows(pregate)))
    out = like.new_empty(1, u_.shape[1], like.shape[2], dtype=like.dtype if postgate is not None else torch.float32)
    blocks.forward(
        out, u_, filters(k), filters(k_reverse), channel(skip), channel(bias), gate, rows(postgate), None, mode, "fft"
    )
    return out[0].to(like.dtype) if postgate is not None else out[0]
