"""The long convolution by torch's FFT, a block of channels at a time: on a CPU so that spectrum, product and gates stay
in cache, on a GPU so that the memory is bounded, in blocks that fill it. What the kernels decline comes here.

Shape letters: B batch, D channels, L length, K taps of k, R taps of k_reverse, M output length, N size of the FFT,
F = N / 2 + 1 frequencies.

Both filters lie on one ring of N lags: k[s] at s - o (o as in the oracle), k_reverse[s] at -s. One product of spectra
then is the whole convolution, and its transpose the whole backward. N is the least even 5-smooth size at which no
wanted output meets a wrapped lag, and L itself for a circular convolution. 1 / N is put into the filter's spectrum: on
a GPU a scaled inverse FFT is one pass more over its result.

Bound: on a CPU the FFTs, 2.5 N log2 N flops each: forward one a row and one back, and one a filter. On a GPU memory,
each op a pass over the block.
Memory: one block of rows, about 5 N numbers each, whatever B and D; never a spectrum of the whole tensor.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F

from scalekern.ops._toeplitz import Blocks
from scalekern.reference.fft_conv import convolve as direct_convolve

# What "auto" means here on a CPU: (longest L, taps up to which torch's grouped convolution takes the least time, taps
# up to which Toeplitz blocks do), FFTs beyond. Measured on two cores of an AMD EPYC, B2 D256 float32, medians in ms as
# grouped convolution / Toeplitz / FFT, within a tenth of each other at p20 and p80: L 512, 64 taps 1.8 / 6.8 / 1.9;
# L 1,024, 64 taps 2.6 / 7.5 / 2.8, 128 taps 4.2 / 12 / 2.9; L 2,048, 64 taps 4.7 / 9.7 / 5.6; L 4,096, 32 taps
# 6.8 / 9.7 / 10, 64 taps 9.9 / 13 / 13; L 8,192, 32 taps 12 / 14 / 22, 64 taps 18 / 16 / 22, 96 taps 23 / 21 / 23.
CPU_TAPS = ((4096, 64, 0), (1 << 62, 63, 96))
# Without oneDNN (float64) sums are passes over the block, a tap each; so they are on a GPU: three or four passes a tap,
# an FFT's way is ten. Toeplitz blocks of torch's products are not measured on a GPU, and not chosen there.
FEW_TAPS = {"cpu": 16, "cuda": 2}
# Of v in a block: float32 spectra of 4 MiB stay in cache; a GPU's launches take less time than passes over 256 MiB.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
REPAIRABLE = 1 << 30  # products of a row and its filter


@dataclasses.dataclass(frozen=True)
class Ring:
    """Where the lags of both filters lie. Kept taps: those that can meet a token at all."""

    size: int  # N
    offset: int  # o
    period: int | None
    ahead: int  # the largest lag that counts, M - 1
    behind: int  # the most negative one that counts, L - 1

    def filter(self, k, k_reverse):
        """(..., K), (..., R) -> (..., N), or (..., K) where zeros up to N are all that is missing."""
        if k_reverse is None and self.offset == 0 and k.shape[-1] <= self.size:
            return k[..., : self.ahead + 1]
        lead = k.shape if k_reverse is None else torch.broadcast_shapes(k.shape[:-1], k_reverse.shape[:-1]) + (1,)
        ring = k.new_zeros(*lead[:-1], self.size)
        for taps, places, kept in self._places(k, k_reverse):
            taps = taps[..., kept]
            if taps.shape[-1] > self.size:  # a place takes several: summed here, since index_add_ has no order on a GPU
                taps = F.pad(taps, (0, -taps.shape[-1] % self.size)).unflatten(-1, (-1, self.size)).sum(-2)
                places = places[: self.size]
            ring.index_add_(-1, places, taps.expand(*ring.shape[:-1], -1))
        return ring

    def gradients(self, dring, k, k_reverse):
        """(dk, dk_reverse) from the gradient (..., N) of the ring, before their sum over samples that share them."""
        found = []
        for taps, places, kept in self._places(k, k_reverse):
            gradient = dring.new_zeros(*dring.shape[:-1], taps.shape[-1])
            gradient[..., kept] = dring[..., places]
            found.append(gradient)
        return found[0], found[1] if len(found) > 1 else None

    def _places(self, k, k_reverse):
        """Of each filter: the filter, the places of its kept taps on the ring, and the slice of the kept taps."""
        for taps, sign, offset in ((k, 1, self.offset), (k_reverse, -1, 0)):
            if taps is not None:
                first, end = 0, taps.shape[-1]
                if self.period is None:
                    first = max(0, offset - (self.behind if sign > 0 else self.ahead))
                    end = min(end, offset + (self.ahead if sign > 0 else self.behind) + 1)
                lags = sign * (torch.arange(first, end, device=taps.device) - offset)
                yield taps, lags % self.size, slice(first, end)


def ring_of(mode, length, count, taps, reverse_taps):
    offset = (taps - 1) // 2 if mode == "same" else 0
    if mode == "circular":
        return Ring(length, 0, length, length - 1, length - 1)
    ahead, behind = count - 1, length - 1
    reach_ahead = min(taps - 1 - offset, ahead)
    reach_behind = min(max(offset, reverse_taps - 1), behind)
    least = max(reach_ahead + length, count + reach_behind)
    return Ring(2 * good_size((least + 1) // 2), offset, None, ahead, behind)


def linear_ring(mode, length, count, taps, reverse_taps):
    """The ring of just the lags that meet tokens, for sums instead of FFTs, and how many of them look back."""
    offset = (taps - 1) // 2 if mode == "same" else 0
    circular = mode == "circular"
    ahead = taps - 1 if circular else count - 1
    behind = reverse_taps - 1 if circular else length - 1
    reach_ahead, reach_behind = min(taps - 1 - offset, ahead), min(max(offset, reverse_taps - 1), behind)
    return Ring(reach_ahead + reach_behind + 1, offset, length if circular else None, ahead, behind), reach_ahead


def chosen(method, u, k, k_reverse, spectrum=None):
    """The method that "auto" stands for. Whoever made a spectrum wants it used."""
    if method != "auto":
        return method
    taps = max(k.shape[-1], 0 if k_reverse is None else k_reverse.shape[-1])
    if spectrum is not None:
        return "fft"
    if _kind(u) == "cuda" or u.dtype == torch.float64:
        return "direct" if taps <= FEW_TAPS[_kind(u)] else "fft"
    _, direct, toeplitz = next(row for row in CPU_TAPS if u.shape[2] <= row[0])
    return "direct" if taps <= direct else "toeplitz" if taps <= toeplitz else "fft"


@functools.cache
def good_size(n: int) -> int:
    """The least 2^a 3^b 5^c that is at least n."""
    best = 1 << max(n - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = -(-n // three)
            best = min(best, three << max(two - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


def _kind(x):
    """Which device's way to take."""
    return "cuda" if x.device.type == "cuda" else "cpu"


class _Call:
    """What forward and backward share: the operands of one block of channels, in the type that is computed in."""

    def __init__(self, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, count, spectrum):
        self.tensors = (u, k, k_reverse, skip, bias, pregate, postgate)
        self.mask, self.mode, self.count = mask, mode, count
        self.real = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.length = u.shape[2]
        self.padded: dict = {}
        self.given = spectrum if spectrum is not None and spectrum.is_complex() else None  # or it is a kernel's
        self.ring = ring_of(mode, self.length, count, k.shape[-1], 1 if k_reverse is None else k_reverse.shape[-1])
        # cuFFT takes real rows of an odd length in pairs, so that one that is not finite would spoil its neighbour
        # (seen at N = 75): a circular convolution of an odd period goes by complex rows there.
        self.whole = _kind(u) == "cuda" and self.ring.size % 2 == 1

    def blocks(self):
        u = self.tensors[0]
        batch, channels, _ = u.shape
        most = max(1, BLOCK_ELEMENTS[_kind(u)] // max(1, batch * self.ring.size))
        # Blocks of one size: the FFT library plans once for each shape.
        size = -(-channels // -(-channels // most))
        for first in range(0, channels, size):
            yield slice(first, min(first + size, channels))

    def load(self, block):
        """(u mask, v, k, k_reverse, skip, bias, gate, postgate) of a block; the gate masked too where there is one.

        v is in the type that is computed in, where it is not u itself; u and the gates are in their own.
        """
        u, k, k_reverse, skip, bias, pregate, postgate = self.tensors
        row = lambda t: None if t is None else t[:, block]
        channel = lambda t: None if t is None else t[block, None]
        lag = lambda t: None if t is None else (t[block] if t.dim() == 2 else t[:, block])
        u_, gate = self.masked(row(u)), self.masked(row(pregate))
        v = u_ if gate is None else u_.to(self.real) * gate
        return u_, v, lag(k), lag(k_reverse), channel(skip), channel(bias), gate, row(postgate)

    def masked(self, x):
        return x if x is None or self.mask is None else torch.where(self.mask[:, None], x, 0)

    def forward_fft(self, x, norm="backward"):
        """rfft(x, N). The zeros behind x are written once for all blocks: torch's own padding costs more than the
        transform (10 us a row of 2,048 instead of 1.6). Copying converts x as well."""
        if x.numel() == 0:  # MKL refuses to transform no rows
            width = self.ring.size if self.whole else self.ring.size // 2 + 1
            return x.new_empty(*x.shape[:-1], width, dtype=self.real.to_complex())
        transform = torch.fft.fft if self.whole else torch.fft.rfft
        if x.shape[-1] == self.ring.size:
            return transform(x.to(self.real), norm=norm)
        padded = self.padded.get(x.shape)
        if padded is None:
            padded = self.padded[x.shape] = x.new_zeros(*x.shape[:-1], self.ring.size, dtype=self.real)
        padded[..., : x.shape[-1]] = x
        return transform(padded, norm=norm)

    def backward_fft(self, spectrum, count):
        """N irfft(spectrum), its first elements."""
        if self.whole:
            return torch.fft.ifft(spectrum, norm="forward").real[..., :count]
        return torch.fft.irfft(spectrum, n=self.ring.size, norm="forward")[..., :count]

    def spectrum(self, block, k, k_reverse):
        """That of the filters, divided by N: (c, F), or (B, c, F) where a filter is a sample's own. Do not write."""
        if self.given is not None:
            complex_ = torch.complex128 if self.real == torch.float64 else torch.complex64
            return self.given[..., block, :].to(complex_)
        return self.forward_fft(self.ring.filter(k, k_reverse), norm="forward")


def spectrum(k, k_reverse, length, mode, dtype):
    """The whole spectrum that forward and backward take block by block; complex (.., D, F)."""
    count = length + k.shape[-1] - 1 if mode == "full" else length
    row = k.new_empty(1, k.shape[-2], length)
    call = _Call(row, k, k_reverse, *[None] * 5, mode, count, None)
    return call.spectrum(slice(None), k, k_reverse)


def forward(
    out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision=None, spectrum=None
):  # fmt: skip
    call = _Call(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, out.shape[2], spectrum)
    method = chosen(method, u, k, k_reverse, spectrum)
    for block in call.blocks():
        _, v, k_, reverse_, skip_, bias_, _, post = call.load(block)
        if method != "fft":
            y = _by_sums(v, k_, reverse_, mode, call, method)
            # Where both filters meet a token their taps are added first: of opposite signs they make NaN of an Inf.
            if reverse_ is not None and _kind(y) == "cpu" and not bool(torch.isfinite(y.sum())):
                y = _repaired(y, ~torch.isfinite(y.sum(-1)), v, k_, reverse_, mode)
        else:
            V = call.forward_fft(v)
            V *= call.spectrum(block, k_, reverse_)
            y = _finite(call.backward_fft(V, call.count), V, v, k_, reverse_, mode)
        y = _add_skip(y, v, skip_)
        y = y if bias_ is None else y.add_(bias_)
        out[:, block] = y if post is None else y.mul_(post)


def _by_sums(v, k, k_reverse, mode, call, method):
    """y (B, c, M) without an FFT: by torch's grouped convolution, pass by pass where it has none, or by matmuls."""
    if method == "direct" and (call.real == torch.float64 or _kind(v) == "cuda"):
        return direct_convolve(v.to(call.real), k, k_reverse, None, None, mode, "direct")
    reverse_taps = 1 if k_reverse is None else k_reverse.shape[-1]
    ring, start = linear_ring(mode, call.length, call.count, k.shape[-1], reverse_taps)
    taps = ring.filter(k, k_reverse).to(call.real).roll(ring.size - 1 - start, -1)  # (.., J), from the lag -behind on
    if ring.period is not None:
        places = torch.arange(-start, call.count + ring.size - 1 - start, device=v.device)
        v, start = v[..., places % ring.period], 0
    batch, channels, _ = v.shape
    if method == "direct":
        x = F.pad(v.to(call.real), (start, call.count + ring.size - 1 - start - v.shape[2]))
        x = x if taps.dim() == 2 else x.reshape(1, batch * channels, -1)
        weight = taps.flip(-1).reshape(-1, 1, ring.size)
        return F.conv1d(x, weight, groups=len(weight)).view(batch, channels, call.count)
    x = v.transpose(0, 1) if taps.dim() == 2 else v.reshape(batch * channels, 1, -1)
    y = Blocks(ring.size, call.count).convolve(x, taps.reshape(-1, ring.size), start)
    return y.transpose(0, 1) if taps.dim() == 2 else y.view(batch, channels, call.count)


def _add_skip(y, v, skip):
    if skip is not None:
        y[..., : v.shape[-1]].addcmul_(v, skip.expand_as(v))
    return y


def _finite(y, V, v, k, k_reverse, mode):
    """y with the rows whose spectrum is not finite summed up directly: an FFT spreads one NaN over all of them.

    Not on a GPU, where asking would mean to wait for the answer.
    """
    if _kind(y) == "cuda" or bool(torch.isfinite(torch.view_as_real(V[..., 0])).all()):
        return y
    return _repaired(y, ~torch.isfinite(torch.view_as_real(V[..., 0])).all(-1), v, k, k_reverse, mode)


def _repaired(y, bad, v, k, k_reverse, mode):
    """y with its bad rows (B, c) summed up as the oracle does."""
    taps = k.shape[-1] + (0 if k_reverse is None else k_reverse.shape[-1])
    if y.shape[-1] * taps <= REPAIRABLE:
        of_rows = lambda t: None if t is None else t.expand(*bad.shape, -1)[bad]
        rows = v[bad][None].to(y.dtype)
        y[bad] = direct_convolve(rows, of_rows(k), of_rows(k_reverse), None, None, mode, "direct")[0]
    return y


def backward(
    du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate, dout, u, k, k_reverse, skip, bias, pregate, postgate, mask,
    mode, method, precision=None, spectrum=None,
):  # fmt: skip
    """The oracle's formulas on the ring: dv is the transposed convolution of dy, the ring's gradient their product.

    By FFT whatever the method.
    """
    call = _Call(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, dout.shape[2], spectrum)
    for block in call.blocks():
        u_, v, k_, reverse_, skip_, bias_, gate, post = call.load(block)
        dy = dout[:, block]
        G, V = call.spectrum(block, k_, reverse_), call.forward_fft(v)
        if post is not None:
            y = _finite(call.backward_fft(V * G, call.count), V, v, k_, reverse_, mode)
            y = _add_skip(y, v, skip_)
            dpostgate[:, block] = dy * (y if bias_ is None else y.add_(bias_))
            dy = dy.to(call.real) * post
        DY = call.forward_fft(dy)
        V.conj_physical_()  # the lazy kind loses its mark inside a compiled graph (torch 2.13)
        dring = V.mul_(DY) if G.dim() == 3 else _sum_of_products(DY, V)
        dring = call.backward_fft(dring, call.ring.size) / call.ring.size
        for target, gradient, taps in zip((dk, dk_reverse), call.ring.gradients(dring, k_, reverse_), (k, k_reverse)):
            if taps is not None and taps.dim() == 2:
                target[block] = gradient if gradient.dim() == 2 else gradient.sum(0)
            elif taps is not None:
                target[:, block] = gradient
        dv = call.backward_fft(DY.mul_(G.conj_physical()), call.length)
        near = dy[..., : call.length]
        if skip_ is not None:
            dskip[block] = (near.to(call.real) * v).sum((0, 2))
            dv.addcmul_(near, skip_.expand_as(near))
        if bias_ is not None:
            dbias[block] = dy.sum((0, 2), dtype=call.real)
        if gate is not None:
            dpregate[:, block] = call.masked(dv * u_)
            dv = dv * gate
        du[:, block] = call.masked(dv)


def _sum_of_products(DY, V):
    """sum_b DY V. On a CPU sample by sample, no product of the whole block; on a GPU in three launches, into V."""
    if _kind(V) == "cuda":
        return V.mul_(DY).sum(0)
    total = DY[0] * V[0]
    for b in range(1, DY.shape[0]):
        total.addcmul_(DY[b], V[b])
    return total
