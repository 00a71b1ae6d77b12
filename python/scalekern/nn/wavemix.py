"""WaveMix's block: the image's wavelet coefficients, level by level, mixed by 1 x 1 convolutions and brought back.

Shape letters: B batch, C channels (final_dim), H x W image, J levels, F width before the upsampling (ff_channel).

Parameter names and shapes are those of Level1Waveblock to Level4Waveblock in the package wavemix of
pranavphoenix/WaveMix, so its checkpoints load, layer by layer:

    reduction                        Conv2d 1 x 1: C to C / 4
    feedforward, or feedforward1 ..  of level 1 alone, or of levels 1 to J > 1, each a Sequential of
        .0, .3                       Conv2d 1 x 1: to mult C (from C, and from C + C / 2 where a coarser level comes
                                     in), and to F
        .4                           ConvTranspose2d 4 x 4, stride 2: F to C, and to C / 2 beyond level 1
        .5                           BatchNorm2d of those

Source: Jeevan et al., WaveMix: A Resource-efficient Neural Network for Image Analysis, 2022, section 3.
"""

import torch
from torch import nn

from scalekern import _checks
from scalekern.ops.dwt2d import dwt2d

NAME = "nn.WaveMixBlock"


class WaveMixBlock(nn.Module):
    """(B, C, H, W) to the same, any H and W.

    Args:
        final_dim: C, a multiple of 4.   level: J, from 1.   mult: mult C is the width of a level's hidden layer.
        ff_channel: F.   dropout: after the hidden layer.
        residual: add x, as the paper's block does; upstream's classes leave it to the model around them.

    Raises:
        ValueError: a final_dim that is not a multiple of 4; a level, mult or ff_channel below 1.
    """

    def __init__(
        self, *, mult=2, ff_channel=16, final_dim=16, dropout=0.5, level=1, residual=True, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        for name, value in (("level", level), ("mult", mult), ("ff_channel", ff_channel), ("final_dim", final_dim)):
            _checks.at_least(NAME, name, value, 1)
        if final_dim % 4:
            raise ValueError(f"{NAME}: final_dim must be a multiple of 4, got {final_dim}")
        factory = {"device": device, "dtype": dtype}
        self.final_dim, self.level, self.residual = final_dim, level, residual
        self._names = ["feedforward"] if level == 1 else [f"feedforward{j + 1}" for j in range(level)]
        for j, name in enumerate(self._names):
            width = final_dim if j == level - 1 else final_dim + final_dim // 2
            out = final_dim if j == 0 else final_dim // 2
            layers = (
                nn.Conv2d(width, final_dim * mult, 1, **factory), nn.GELU(), nn.Dropout(dropout),
                nn.Conv2d(final_dim * mult, ff_channel, 1, **factory),
                nn.ConvTranspose2d(ff_channel, out, 4, stride=2, padding=1, **factory),
                nn.BatchNorm2d(out, **factory),
            )  # fmt: skip
            self.add_module(name, nn.Sequential(*layers))
        self.reduction = nn.Conv2d(final_dim, final_dim // 4, 1, **factory)

    def forward(self, x):
        _checks.tensor(NAME, "x", x, dims=4, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None, self.final_dim, None, None))
        low, sizes, levels = self.reduction(x), [], []
        for _ in range(self.level):
            sizes.append(low.shape[2:])
            low, details = dwt2d(low, "haar", mode="zero")
            levels.append(torch.cat([low, details.flatten(1, 2)], 1))
        coarser = None
        for name, coefficients, (height, width) in reversed(list(zip(self._names, levels, sizes))):
            if coarser is not None:
                coefficients = torch.cat([coefficients, coarser], 1)
            # Twice its size; one row or column too many where the wavelets of an odd size reached beyond the image.
            coarser = getattr(self, name)(coefficients)[..., :height, :width]
        return x + coarser if self.residual else coarser
