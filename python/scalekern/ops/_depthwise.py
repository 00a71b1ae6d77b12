"""Depthwise 2-D convolution: FFTs that stay in cache, a native kernel tap by tap, torch's grouped convolutions.

Shape letters: B batch, C channels, H x W the large image, P x Q the small one, I x J filter, N x M the FFT's period.

Convolution, its transpose and both derivatives are three maps between a large image, a small one and a filter:

    small[p, q] = sum_ij w[i, j] large'[p s + i d, q s + j d]                 large' = large from (top, left) on
    large'[p s + i d, q s + j d] += w[i, j] small[p, q]
    w[i, j] = sum_bpq small[p, q] large'[p s + i d, q s + j d]

With s and d put in as zeros each of them is one product of spectra of the same period. Channels go through in pieces
whose spectra stay in cache; a filter's spectrum is computed once for the whole batch, and dw is summed over the batch
as a spectrum. On two cores of an AMD EPYC, B8 C64 56 x 56, 31 x 31, float32: 20 ms, against 2560 ms of the grouped
F.conv2d; in one thread, processor time: 22 ms, against 38 ms of the plain product of FFTs padded to 90, and 118 ms
of that padded to 86. Two images packed as one complex one would save a third of the transforms, and is not done: the
rounding errors of one image would then depend on its neighbour in the batch.
"""

import dataclasses
import functools
import itertools
import math

import torch
import torch.nn.functional as F

from scalekern import _dispatch
from scalekern.reference.depthwise_conv2d import sides

METHODS = ("auto", "direct", "fft")
_conv_cpu, _dw_cpu = _dispatch.native("depthwise_conv2d", "cpu"), _dispatch.native("depthwise_conv2d_dw", "cpu")
# "auto", on a CPU: tap by tap up to so many taps, times the stride's (rows beyond the image do not count). B8 C64
# 56 x 56, two cores with AVX-512, K = 7, 13, 17, 25: 2.2 / 7.9, 5.2 / 17, 6.8 / 25, 13 / 37 ms forward / both ways,
# by FFT 6.8 / 20, 10 / 33, 8.4 / 33, 10 / 26. With AVX2 the loop takes twice as long, the FFT not.
NATIVE_TAPS = 256
# Elsewhere: torch's grouped convolution up to 9 taps an axis. Its forward is as fast as ours to the 9 (14 with AVX-512)
# taps that oneDNN has kernels for, with a stride 1.3 to 4 times faster, and 20 to 50 times slower beyond them (K = 15:
# 264 ms); its gradients are 2.5 to 12 times slower from K = 5 on. Never measured on a GPU.
DIRECT_TAPS = 9
# Bytes of one piece's spectrum. The case above, one thread: 2^19 to 2^23 bytes 22 to 23 ms, 2^24 38 ms. Large pieces
# have fewer points at which threads wait for each other; a GPU wants few launches.
PIECE_BYTES = {"cpu": 2**22, "cuda": 2**27}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What lies where. Every field is a pair: rows, columns."""

    large: tuple[int, int]
    small: tuple[int, int]
    taps: tuple[int, int]
    start: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def reach(self):
        return tuple(d * (i - 1) + 1 for d, i in zip(self.dilation, self.taps))

    @property
    def end(self):
        """Rows and columns after the large image up to the last that a filter meets; negative: it does not reach it."""
        spans = ((p - 1) * s + r for p, s, r in zip(self.small, self.stride, self.reach))
        return tuple(span - a - h for span, a, h in zip(spans, self.start, self.large))

    @property
    def period(self):
        """The least good sizes in which none of the three products wraps around into what is wanted."""
        least = []
        for h, p, r, a, s in zip(self.large, self.small, self.reach, self.start, self.stride):
            span = (p - 1) * s + 1
            least.append(max(a + h, span, r, span + r - 1 - a))
        return good_size(least[0]), good_size(least[1], even=True)

    def places(self, what):
        """Where the large image, the small one or the filter lie in the period."""
        if what == "large":
            return tuple(slice(a, a + h) for a, h in zip(self.start, self.large))
        sizes, steps = (self.small, self.stride) if what == "small" else (self.taps, self.dilation)
        return tuple(slice(0, (n - 1) * step + 1, step) for n, step in zip(sizes, steps))


def good_size(n, even=False):
    """The least product of 2, 3 and 5 from n on."""
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1 and not (even and n % 2):
            return n
        n += 1


# --- the registered ops -----------------------------------------------------------------------------------------------


def conv_fwd(x, w, bias, padding, stride, dilation, method):
    g = conv_geometry(x.shape, w.shape, padding, stride, dilation)
    return _forward("small", x, w, bias, g, method)


def conv_bwd(dout, x, w, bias, padding, stride, dilation, method):
    g = conv_geometry(x.shape, w.shape, padding, stride, dilation)
    dx, dw = _backward("large", x, dout, w, g, method)
    return dx, dw, _dbias(dout, x, bias)


def transpose_fwd(x, w, bias, stride, padding, output_padding, dilation, method):
    g = transpose_geometry(x.shape, w.shape, stride, padding, output_padding, dilation)
    return _forward("large", x, w, bias, g, method)


def transpose_bwd(dout, x, w, bias, stride, padding, output_padding, dilation, method):
    g = transpose_geometry(x.shape, w.shape, stride, padding, output_padding, dilation)
    dx, dw = _backward("small", dout, x, w, g, method)
    return dx, dw, _dbias(dout, x, bias)


def conv_geometry(x_shape, w_shape, padding, stride, dilation):
    left, right, top, bottom = sides(padding, w_shape, dilation)
    spans = (x_shape[2] + top + bottom, x_shape[3] + left + right)
    small = ((n - d * (i - 1) - 1) // s + 1 for n, d, i, s in zip(spans, dilation, w_shape[1:], stride))
    return Geometry(tuple(x_shape[2:]), tuple(small), tuple(w_shape[1:]), (top, left), tuple(stride), tuple(dilation))


def transpose_geometry(x_shape, w_shape, stride, padding, output_padding, dilation):
    large = tuple(
        (n - 1) * s - 2 * a + d * (i - 1) + more + 1
        for n, s, a, d, i, more in zip(x_shape[2:], stride, padding, dilation, w_shape[1:], output_padding)
    )
    return Geometry(large, tuple(x_shape[2:]), tuple(w_shape[1:]), tuple(padding), tuple(stride), tuple(dilation))


def _forward(into, source, w, bias, g, method):
    if _chosen(source, g, method) == "fft":
        return _apply_fft(into, source, w, bias, g)
    return _owned(_direct(into, source, w, bias, g), source.dtype)


def _backward(into, large, small, w, g, method):
    """(the gradient of the image `into`, dw), from the other image, which holds the output's gradient."""
    if _chosen(large, g, method) == "fft":
        return _backward_fft(into, large, small, w, g)
    dtype = large.dtype
    dlarge, dw = _direct_bwd(large, small, w, g, need_large=into == "large")
    dx = dlarge if into == "large" else _direct("small", large, w, None, g)
    return _owned(dx, dtype), _owned(dw, w.dtype)


def _owned(x, dtype):
    """In this dtype and contiguous, as promised: torch's convolutions answer channels-last in channels-last."""
    return x.to(dtype).contiguous()


def _chosen(image, g, method):
    if method != "auto":
        return method
    if _tap_by_tap(image):
        return "direct" if min(g.taps[0], g.large[0]) * g.taps[1] <= NATIVE_TAPS * math.prod(g.stride) else "fft"
    return "direct" if max(g.taps) <= DIRECT_TAPS else "fft"


def _dbias(dout, x, bias):
    return x.new_empty(0) if bias is None else dout.sum((0, 2, 3), dtype=_wide(x)).to(bias.dtype)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- by FFT -----------------------------------------------------------------------------------------------------------


class _Spectra:
    """Spectra of pieces of images that lie at given places of the period; one buffer, whose zeros stay.

    norm "forward" divides by the period's pixels: the filters' part, since a scaled inverse is one pass more on a GPU.
    """

    def __init__(self, like, shape, places, period, norm="backward"):
        self.buffer = torch.zeros(*shape, *period, dtype=_wide(like), device=like.device)
        self.places, self.norm = (..., *places), norm

    def __call__(self, piece):
        buffer = self.buffer[tuple(slice(n) for n in piece.shape[:-2])]
        buffer[self.places] = piece  # converts, and reads any strides, in the same pass
        return torch.fft.rfft2(buffer, norm=self.norm)


def _apply_fft(into, source, w, bias, g):
    """The image `into` from the other one and the filter."""
    batch, channels = source.shape[:2]
    out = source.new_empty(batch, channels, *getattr(g, into))
    come_from, period = "large" if into == "small" else "small", g.period
    rows, width = _piece(source, period)
    images = _Spectra(source, (rows, width), g.places(come_from), period)
    filters = _Spectra(source, (width,), g.places("taps"), period, "forward")
    for c in range(0, channels, width):
        piece_w = w[c : c + width]
        w_spectrum = filters(piece_w)
        if into == "small":
            w_spectrum.conj_physical_()
        for b in range(0, batch, rows):
            piece = source[b : b + rows, c : c + width]
            y = _image(images(piece).mul_(w_spectrum), g, into, period)
            if _spoiled(y):
                y = _direct(into, piece, piece_w, None, g)
            if bias is not None:
                y = y + bias[c : c + width, None, None]
            out[b : b + rows, c : c + width] = y
    return out


def _backward_fft(into, large, small, w, g):
    batch, channels = large.shape[:2]
    period, x = g.period, large if into == "large" else small
    dx, dw = x.new_empty(x.shape), w.new_empty(w.shape)
    rows, width = _piece(large, period)
    larges, smalls = (
        _Spectra(large, (rows, width), g.places(what), period) for what in ("large", "small")
    )  # fmt: skip
    filters = _Spectra(large, (width,), g.places("taps"), period, "forward")
    for c in range(0, channels, width):
        piece_w, w_sum = w[c : c + width], 0
        w_spectrum = filters(piece_w)
        if into == "small":
            w_spectrum.conj_physical_()
        for b in range(0, batch, rows):
            piece = (slice(b, b + rows), slice(c, c + width))
            of_large, of_small = larges(large[piece]), smalls(small[piece])
            y = _image((of_small if into == "large" else of_large) * w_spectrum, g, into, period)
            if _spoiled(y):
                source = small if into == "large" else large
                y = _direct(into, source[piece], piece_w, None, g)
            dx[piece] = y
            w_sum = w_sum + of_large.mul_(of_small.conj_physical_()).sum(0)
        gradient = _image(w_sum, g, "taps", period, norm="backward")
        if _spoiled(gradient):
            gradient = _direct_bwd(large[:, c : c + width], small[:, c : c + width], piece_w, g, need_large=False)[1]
        dw[c : c + width] = gradient
    return dx, dw


def _image(spectrum, g, what, period, norm="forward"):
    return torch.fft.irfft2(spectrum, period, norm=norm)[(..., *g.places(what))]


def _piece(x, period):
    """(rows of the batch, channels) whose spectra stay in cache."""
    batch, channels = x.shape[:2]
    images = max(1, PIECE_BYTES.get(x.device.type, 2**22) // (period[0] * period[1] * _wide(x).itemsize))
    return min(batch, images), max(1, min(channels, images // batch))


def _spoiled(y):
    """A NaN or Inf of one pixel is in every pixel after an FFT: such a piece is computed again, tap by tap.

    Not on a GPU, where asking would synchronize: there it spreads over the image, or the channel's dw.
    """
    return y.device.type == "cpu" and not torch.isfinite(y.sum())


# --- tap by tap: the native kernel on a CPU, else torch's convolutions ------------------------------------------------


@functools.cache
def _native_on_cpu():
    return _dispatch.Backend("cpu", _conv_cpu).unavailable("cpu") is None


def _tap_by_tap(image):
    return image.device.type == "cpu" and _native_on_cpu()


def _phases(g):
    """A convolution of stride s as convolutions of stride 1: taps that meet the same residue of the rows and columns.

    Of each: which taps (a slice of rows, of columns), which pixels of the large image, and there start and dilation.
    """
    sides = []
    for taps, a, s, d in zip(g.taps, g.start, g.stride, g.dilation):
        step = s // math.gcd(s, d)
        places = [(i, *divmod(i * d, s)) for i in range(min(taps, step))]
        firsts = [-((rest - a) // s) for _, _, rest in places]  # the first pixel of this residue: ceil((a - rest) / s)
        sides.append([
            (slice(i, None, step), slice(s * first + rest - a, None, s), first - whole, d * step // s)
            for (i, whole, rest), first in zip(places, firsts)
        ])  # fmt: skip
    return [tuple(zip(*both)) for both in itertools.product(*sides)]


def _convolve_phases(source, w, bias, g):
    """The small image."""
    phases = _phases(g)
    source = source if len(phases) == 1 else source.to(_wide(source))  # several sums are rounded once
    total = None
    for taps, pixels, start, dilation in phases:
        out = source.new_empty(*source.shape[:2], *g.small)
        _conv_cpu(out, source[(..., *pixels)], w[(slice(None), *taps)].contiguous(), bias, *start, *dilation, False)
        total, bias = out if total is None else total.add_(out), None
    return total


def _transpose_phases(source, w, bias, g):
    """The large image."""
    phases, whole = _phases(g), g.stride == (1, 1)
    large = source.new_empty(*source.shape[:2], *g.large)
    if len(phases) < math.prod(g.stride):  # pixels that no tap reaches
        large.copy_(0 if bias is None else bias[:, None, None])
    for taps, pixels, start, dilation in phases:
        own, view = w[(slice(None), *taps)].contiguous(), large[(..., *pixels)]
        out = view if whole else view.new_empty(view.shape)
        turned = (d * (n - 1) - a for d, n, a in zip(dilation, own.shape[1:], start))
        _conv_cpu(out, source, own, bias, *turned, *dilation, True)
        if not whole:
            view.copy_(out)
    return large


def _dw_phases(large, small, w, g):
    dw = torch.empty(w.shape, dtype=_wide(large))
    for taps, pixels, start, dilation in _phases(g):
        own = torch.empty(dw[(slice(None), *taps)].shape, dtype=dw.dtype)
        _dw_cpu(own, large[(..., *pixels)], small, *start, *dilation)
        dw[(slice(None), *taps)] = own
    return dw


def _direct(into, source, w, bias, g):
    real = _wide(source)
    bias = None if bias is None else bias.to(real).contiguous()
    if _tap_by_tap(source) and (g.stride == (1, 1) or max(g.taps) > DIRECT_TAPS):
        out = (_convolve_phases if into == "small" else _transpose_phases)(source, w.to(real), bias, g)
        if not _spoiled(out):
            return out
    source, weight = source.to(real), w.to(real)[:, None]
    if into == "small":
        padded, around = _padded(source, g)
        return F.conv2d(padded, weight, bias, g.stride, around, g.dilation, w.shape[0])
    out = _cut(F.conv_transpose2d(source, weight, None, g.stride, 0, 0, w.shape[0], g.dilation), g)
    return out if bias is None else out.add_(bias[:, None, None])


def _direct_bwd(large, small, w, g, need_large):
    """(dlarge or None, dw) of the convolution of `large` for the output gradient `small`."""
    real = _wide(large)
    if _tap_by_tap(large):
        dw = _dw_phases(large, small.to(large.dtype), w, g)
        if not _spoiled(dw):
            return _direct("large", small, w, None, g) if need_large else None, dw.to(w.dtype)
    padded, around = _padded(large.to(real), g)
    dpadded, dw, _ = torch.ops.aten.convolution_backward(
        small.to(real), padded, w.to(real)[:, None], None, g.stride, around, g.dilation, False, (0, 0), w.shape[0],
        (need_large, True, False),
    )  # fmt: skip
    if need_large and around == (0, 0):
        dpadded = _cut(dpadded, g)
    return dpadded, dw[:, 0].to(w.dtype)


def _padded(large, g):
    """(the image with its zeros, the padding left to torch, which spares the copy where it can be)"""
    if g.start == g.end:
        return large, g.start
    (top, left), (bottom, right) = g.start, g.end
    return F.pad(large, (left, right, top, bottom)), (0, 0)


def _cut(padded, g):
    """Without the zeros: the transpose of padding."""
    (top, left), (bottom, right) = g.start, g.end
    return F.pad(padded, (-left, -right, -top, -bottom))
