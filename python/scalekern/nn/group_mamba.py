"""GroupMamba's modulated group layer: four groups of channels, each scanned in a direction of its own.

Shape letters: B batch, C channels, H x W image, L = H W.

Parameter names and shapes are those of Amshaker/GroupMamba's GroupMambaLayer, so that its checkpoints load.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn.ss2d import SS2D

NAME = "nn.GroupMamba"


class GroupMamba(nn.Module):
    """Maps (B, C, H, W) to (B, C', H, W), or (B, L, C) with its `size` to (B, L, C').

    x = norm(u), a = sigmoid(fc2(relu(fc1(mean of x)))), y = (VSSS_1(x_1), .., VSSS_4(x_4)) skip_scale x a, and the
    layer is proj(norm(y)), with one norm for both. VSSS_k is SS2D in direction k of cross_scan: row by row, column by
    column, and both reversed. The residual around it belongs to the block, u + layer(u).

    Args:
        input_dim: C, a multiple of 4.   output_dim: C', C when None.   d_state, d_conv, expand: of each SS2D.
        reduction: C / width of the channel affinity modulation.   eps: of the norm.

    Source: Shaker et al., GroupMamba: Parameter-Efficient and Accurate Group Visual State Space Model, 2024, section
    3.2: the modulated group mamba layer (VSSS and the channel affinity modulation).
    """

    def __init__(
        self, input_dim, output_dim=None, d_state=1, d_conv=3, expand=1, reduction=16, eps=1e-5, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        if input_dim % 4:
            raise ValueError(f"{NAME}: input_dim must be a multiple of 4, got {input_dim}")
        factory = {"device": device, "dtype": dtype}
        output_dim = input_dim if output_dim is None else output_dim
        self.input_dim = input_dim
        self.fc1 = nn.Linear(input_dim, max(1, input_dim // reduction), **factory)
        self.fc2 = nn.Linear(self.fc1.out_features, input_dim, **factory)
        self.norm = nn.LayerNorm(input_dim, eps=eps, **factory)
        for k in range(4):
            block = SS2D(input_dim // 4, d_state, expand, d_conv=d_conv, directions=(k,), **factory)
            setattr(self, f"mamba_g{k + 1}", block)
        self.proj = nn.Linear(input_dim, output_dim, **factory)
        self.skip_scale = nn.Parameter(torch.ones(1, **factory))

    def forward(self, x, size=None):
        """x (B, C, H, W), or (B, L, C) with size = (H, W)."""
        _checks.tensor(NAME, "x", x, dims=(3, 4), dtypes=_checks.FLOATING)
        if x.dim() == 3:
            if size is None:
                raise ValueError(f"{NAME}: size must be given for x of shape (B, L, C), got None")
            _checks.shape(NAME, "x", x, (None, size[0] * size[1], self.input_dim))
            return self._layer(x.unflatten(1, size)).flatten(1, 2)
        _checks.shape(NAME, "x", x, (None, self.input_dim, None, None))
        return self._layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _layer(self, x):
        """(B, H, W, C) -> (B, H, W, C')"""
        x = self.norm(x)
        affinity = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2))))))[:, None, None]
        blocks = (self.mamba_g1, self.mamba_g2, self.mamba_g3, self.mamba_g4)
        y = torch.cat([block(part) for block, part in zip(blocks, x.chunk(4, -1))], -1)
        return self.proj(self.norm(y * x * (self.skip_scale * affinity)))  # the small factors first: a pass less
