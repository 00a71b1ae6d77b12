"""Convolution with a short filter as products with Toeplitz blocks: torch's batched matmul, forward and backward.

Shape letters: G filters, R rows that share one (any number of axes), J taps, M outputs of a row, T tokens of a block.

    y[t] = sum_j g[j] x[t + J - 1 - j],  0 <= t < M             x has the M + J - 1 samples that this takes

Row and output are cut into blocks of T. A block of outputs takes the block of x that begins with it and the P after it,
P = ceil((J - 1) / T), each by a T x T Toeplitz matrix: with J <= T + 1 that is the two-pass form. The rows' blocks lie
behind each other, so that one product takes the blocks of all rows that share a filter; P blocks at each row's end are
computed for nothing.

Bound: 2 T (P + 1) flops a point, and on a CPU the copies of x and y into and out of rows.
Memory, for a block of filters of up to ELEMENTS elements: x, y and the matrices, (P + 1) T^2 numbers a filter.
"""

import torch
import torch.nn.functional as F

from scalekern.reference.fft_conv import correlate

ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


def tokens(taps):
    """T. On two cores of an AMD EPYC (B2 D256 L2048, float32) 32 takes less time than 64 and 128 up to 64 taps and from
    256 on, and than 16 from 32 taps on. Never measured on a GPU."""
    return 32 if taps > 8 else 16


class Blocks:
    """One geometry of the sum above. x and dy are given without the zeros around them: `start` of them before x."""

    def __init__(self, taps, count, size=None):
        self.taps, self.count = taps, count
        self.size = size or tokens(taps)
        self.behind = -(-(taps - 1) // self.size)  # P
        self.blocks = -(-count // self.size) + self.behind

    def _rows(self, x, start, dtype):
        """x (G, R, *) as (G, R blocks, T), from place `start` of a row on, zeros around."""
        rows = x.new_zeros(*x.shape[:-1], self.blocks * self.size, dtype=dtype)
        rows[..., start : start + x.shape[-1]] = x[..., : rows.shape[-1] - start]
        return rows.view(x.shape[0], -1, self.size)

    def matrices(self, g):
        """(G, (P + 1) T, T): g[J - 1 + j - m] in row m and column j."""
        padded = F.pad(g.flip(-1), (self.size - 1, self.size * (self.behind + 1) - self.taps))
        return padded.unfold(-1, self.size, 1).flip(-1)  # flip copies

    def convolve(self, x, g, start):
        """x (G, R, *), g (G, J) -> y (G, R, M) in g's dtype."""
        rows, matrices = self._rows(x, start, g.dtype), self.matrices(g)
        y = torch.empty_like(rows)
        used = rows.shape[1] - self.behind
        for p in range(self.behind + 1):
            a, b = rows[:, p : p + used], matrices[:, p * self.size : (p + 1) * self.size]
            torch.baddbmm(y[:, :used], a, b, beta=int(p > 0), out=y[:, :used])
        y = y.view(*x.shape[:-1], -1)[..., : self.count]
        return self._finite(y, x, g, start)

    def _finite(self, y, x, g, start):
        """y with the rows that are not finite summed up directly: a product with a block's zeros spreads a NaN over
        the block. Not on a GPU, where asking would mean to wait for the answer."""
        if y.device.type == "cuda" or bool(torch.isfinite(y.sum())):
            return y
        bad = ~torch.isfinite(y.sum(-1))
        filters = g.view(g.shape[0], *[1] * (x.dim() - 2), -1).expand(*bad.shape, -1)[bad]
        y[bad] = correlate(x[bad][None].to(g.dtype), filters[None].flip(-1), -start, self.count)[0]
        return y

    def gradient(self, x, dy, start, dtype):
        """dg (G, J): sum over rows and t of dy[t] x[t + J - 1 - j], by the diagonals of x^T dy, block by block."""
        rows, dy = self._rows(x, start, dtype), self._rows(dy, 0, dtype)
        used, T = rows.shape[1] - self.behind, self.size
        total = rows.new_zeros(rows.shape[0], (self.behind + 2) * T - 1)
        for p in range(self.behind + 1):
            product = rows[:, p : p + used].mT @ dy[:, :used]
            # Upside down, each row one place further than the row before: diagonals become columns.
            sheared = F.pad(product.flip(1), (0, T)).flatten(1)[:, : T * (2 * T - 1)].view(-1, T, 2 * T - 1)
            total[:, (self.behind - p) * T :][:, : 2 * T - 1] += sheared.sum(1)
        first = (self.behind + 1) * T - self.taps
        return total[:, first : first + self.taps]


def pieces(groups, rows, blocks, device):
    """Slices of filters, of one size, whose x, y and matrices have at most ELEMENTS elements."""
    each = 2 * rows * blocks.blocks * blocks.size + (blocks.behind + 1) * blocks.size**2
    most = max(1, ELEMENTS["cuda" if device.type == "cuda" else "cpu"] // max(1, each))
    width = -(-groups // -(-groups // most))
    return [slice(i, min(i + width, groups)) for i in range(0, groups, width)]


# --- toeplitz_conv: the causal convolution with a filter a group of channels -----------------------------------------


def forward(out, u, k):
    blocks, k, groups = _of(u, k)
    out = groups(out)
    u = groups(u)
    for piece in pieces(len(k), u[0].numel() // max(1, u.shape[-1]), blocks, u.device):
        out[piece] = blocks.convolve(u[piece], k[piece], blocks.taps - 1)


def backward(du, dk, dout, u, k):
    """du is the convolution with the reversed filters that looks ahead; dk sums the diagonals of u^T dout."""
    blocks, taps, groups = _of(u, k)
    du, dout, u = groups(du), groups(dout), groups(u)
    dk[:, blocks.taps :] = 0
    for piece in pieces(len(k), u[0].numel() // max(1, u.shape[-1]), blocks, u.device):
        du[piece] = blocks.convolve(dout[piece], taps[piece].flip(-1), 0)
        dk[piece, : blocks.taps] = blocks.gradient(u[piece], dout[piece], blocks.taps - 1, taps.dtype)


def _of(u, k):
    """(blocks, the taps that meet a token in the type that is computed in, x (B, D, L) -> its view (G, B, D / G, L))"""
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    k, groups = k[:, : u.shape[2]].to(real), k.shape[0]
    return Blocks(k.shape[1], u.shape[2]), k, lambda x: x.unflatten(1, (groups, -1)).transpose(0, 1)
