"""A multi-scale image block of selective scans, in the style of Serpent's.

Shape letters: B batch, C channels of the finest scale, H x W image, S scales.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn.ss2d import SS2D

NAME = "nn.SerpentBlock"


class _Residual(nn.Module):
    """x + SS2D(norm(x)), (B, H, W, M) to the same."""

    def __init__(self, dim, factory, **options):
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.op = SS2D(dim, **options, **factory)

    def forward(self, x):
        return x + self.op(self.norm(x))


class _Merge(nn.Module):
    """Four neighbouring pixels, with zeros beyond an odd edge, to one of twice the channels."""

    def __init__(self, dim, factory):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, **factory)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **factory)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x))


class _Expand(nn.Module):
    """One pixel to four of half the channels, cut to `size`, joined with what the finer scale kept."""

    def __init__(self, dim, factory):
        super().__init__()
        self.expand = nn.Linear(2 * dim, 4 * dim, bias=False, **factory)
        self.fuse = nn.Linear(2 * dim, dim, **factory)

    def forward(self, x, kept):
        x = self.expand(x).unflatten(-1, (2, 2, -1)).permute(0, 1, 3, 2, 4, 5)  # [B, H, 2, W, 2, C]
        x = x.flatten(1, 2).flatten(2, 3)[:, : kept.shape[1], : kept.shape[2]]
        return self.fuse(torch.cat([x, kept], -1))


class SerpentBlock(nn.Module):
    """Maps (B, C, H, W) to (B, C, H, W): selective scans in four directions on S scales, down and up again.

    On each scale but the coarsest `depth` residual blocks x + SS2D(norm(x)), then half the size and twice the channels
    (four neighbours, normed and projected); on the coarsest `depth` blocks; on the way up a projection to four pixels
    each, joined by a projection with what that scale kept, and `depth` blocks. The input is added to the result. Time
    and memory are linear in the number of pixels.

    Args:
        dim: C.   scales: S, from 1.   depth: blocks of a scale each way.   d_state, ssm_ratio, d_conv: of each SS2D.

    Source: Shahab Sepehri et al., Serpent: Scalable and Efficient Image Restoration via Multi-scale Structured State
    Space Models, 2024, section 3: SSM blocks with four unrollings of the image on the scales of a U. Down- and
    upsampling are those of Liu et al., VMamba, 2024, and its inverse; parameter names are this package's own.
    """

    def __init__(
        self, dim, scales=3, depth=1, d_state=16, ssm_ratio=2.0, d_conv=3, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        _checks.at_least(NAME, "scales", scales, 1)
        _checks.at_least(NAME, "depth", depth, 1)
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        widths = [dim << s for s in range(scales)]

        def blocks(width):
            options = dict(d_state=d_state, ssm_ratio=ssm_ratio, d_conv=d_conv)
            return nn.Sequential(*(_Residual(width, factory, **options) for _ in range(depth)))

        self.down = nn.ModuleList(blocks(width) for width in widths)  # the last one is the coarsest scale's
        self.merge = nn.ModuleList(_Merge(width, factory) for width in widths[:-1])
        self.expand = nn.ModuleList(_Expand(width, factory) for width in widths[:-1])
        self.up = nn.ModuleList(blocks(width) for width in widths[:-1])

    def forward(self, x):
        """x (B, C, H, W), any size from 1 -> (B, C, H, W)."""
        _checks.tensor(NAME, "x", x, dims=4, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None, self.dim, None, None))
        y, kept = x.permute(0, 2, 3, 1), []
        for down, merge in zip(self.down, self.merge):
            kept.append(down(y))
            y = merge(kept[-1])
        y = self.down[-1](y)
        for up, expand in zip(reversed(self.up), reversed(self.expand)):
            y = up(expand(y, kept.pop()))
        return x + y.permute(0, 3, 1, 2)
