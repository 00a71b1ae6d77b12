"""The long convolution by the library's own FFTs on a CPU; csrc/fft_conv/cpu_fft_conv_kernel.cpp says how.

What is not finite spreads over its row there: such rows are done again by the composed backend.
A spectrum of filters that was made here is float32 and lies as the kernel reads it; one of torch's FFT is complex.
"""

import torch

from scalekern._dispatch import native
from scalekern.ops import _fft_conv as blocks

_forward = native("fft_conv_fwd", "cpu")
_backward = native("fft_conv_bwd", "cpu")
_spectrum = native("fft_conv_spectrum", "cpu")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MANY_ROWS, FEW_TOKENS, FEW_PRODUCTS = 1024, 128, 4096  # of a call, of a row, of a row and its filter


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
    """As well for "auto", however few the taps: on two cores of an AMD EPYC, B2 D256 float32, L 512 / 2,048 / 8,192,
    two taps take 0.5 / 1.8 / 8.5 ms, torch's grouped convolution 0.66 / 2.0 / 10, and with 64 taps 0.59 / 2.0 / 7.1
    and 1.4 / 4.4 / 18 (the least of twelve). But not for many rows of few tokens, whose smallest transform is larger
    than they are: on two cores of a Xeon (Sapphire Rapids), B8 D2048 float32, L 8 / 16 / 32 / 64 with as many taps take
    8.8 / 9.0 / 7.8 / 8.4 ms here and 1.0 / 1.4 / 1.6 / 4.2 by the grouped convolution, L 128 with 16 taps 10 and 6.2,
    L 96 with 96 the same; 512 rows take the same either way, 16 half of it here.
    """
    u, k, k_reverse, method, spectrum = *args[:3], args[-3], args[-1]
    if method == "auto" and spectrum is None and u.shape[0] * u.shape[1] >= MANY_ROWS and u.shape[2] <= FEW_TOKENS:
        taps = k.shape[-1] + (0 if k_reverse is None else k_reverse.shape[-1])
        if taps <= 64 and u.shape[2] * taps <= FEW_PRODUCTS:
            return "so few tokens in so many rows take less time as sums"
    return f"method {method!r} was asked for" if method in ("direct", "toeplitz") else supports(*args)


def supports_bwd(dout, *args):
    return supports(*args) if dout.dtype == args[0].dtype else f"dout must be {args[0].dtype} like u"


def supports_spectrum(k, k_reverse, length, mode, dtype):
    """None, or why a spectrum is made by torch's FFT; those that it made are of no use to this backend."""
    return supports(k, k, k_reverse, *[None] * 5, mode, "fft", None, None)


def allocate_spectrum(k, k_reverse, length, mode, dtype):
    reverse_taps, lead = 0, k.shape[:-1]
    if k_reverse is not None:
        reverse_taps, lead = k_reverse.shape[-1], torch.broadcast_shapes(lead, k_reverse.shape[:-1])
    size = torch.ops.scalekern_native.fft_conv_spectrum_size(
        int(length), _count(k, length, mode), int(k.shape[-1]), int(reverse_taps), _offset(k, mode)
    )
    return k.new_empty(*lead, size)


def spectrum(values, k, k_reverse, length, mode, dtype):
    _spectrum(values, k, k_reverse, length, _count(k, length, mode), _offset(k, mode))


def _usable(spectrum):
    """Not torch's, nor the Triton kernels' of four dimensions and more."""
    if spectrum is None or spectrum.is_complex() or spectrum.dim() > 3:
        return None
    return spectrum if spectrum.stride(-1) == 1 else spectrum.contiguous()


def _count(k, length, mode):
    return int(length + k.shape[-1] - 1 if mode == "full" else length)


def _offset(k, mode):
    return int(k.shape[-1] - 1) // 2 if mode == "same" else 0


def forward(out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum):
    bad = torch.empty(u.shape[:2], dtype=torch.bool, device=u.device)
    spectrum = _usable(spectrum)
    _forward(out, bad, u, k, k_reverse, skip, bias, pregate, postgate, mask, spectrum, _offset(k, mode))
    if bool(bad.any()):
        out[bad] = _again(bad, out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode).to(out.dtype)


def backward(
    du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate, dout, u, k, k_reverse, skip, bias, pregate, postgate, mask,
    mode, method, precision, spectrum,
):  # fmt: skip
    present = lambda gradient, of: None if of is None else gradient
    bad = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
    _backward(
        du, dk, present(dk_reverse, k_reverse), present(dskip, skip), present(dbias, bias), present(dpregate, pregate),
        present(dpostgate, postgate), bad, dout, u, k, k_reverse, skip, bias, pregate, postgate, mask,
        _usable(spectrum), _offset(k, mode),
    )  # fmt: skip
    if bool(bad.any()):
        y = _again(bad, dout, u, k, k_reverse, skip, bias, pregate, None, mask, mode)
        dpostgate[bad] = (dout[bad].to(y.dtype) * y).to(dpostgate.dtype)


for _fill, _native_op in ((forward, _forward), (backward, _backward), (spectrum, _spectrum)):
    _fill.native_op = _native_op.native_op


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
