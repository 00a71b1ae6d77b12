"""EfficientViM's mixer: an image is summed up in N hidden states, which alone mix their channels, and read back.

Shape letters: B batch, M channels of the image (d_model), D channels of the mixer (ssd_expand * M), N states
(state_dim), L = height * width pixels.

Parameter names and shapes are those of mlvlab/EfficientViM's HSMSSD, so its checkpoints load:

    BCdt_proj.conv, hz_proj.conv, out_proj.conv    Conv1d of one tap: M to 3 N, M to 2 D, D to M
    dw.conv                                        depthwise Conv2d (3 N, 1, 3, 3)
    A, D                                           (N,) and (1,)

Source: Lee, Choi & Kim, EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality, 2024,
section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.ops.depthwise_conv2d import depthwise_conv2d

NAME = "nn.HSMSSD"


class HSMSSD(nn.Module):
    """Maps (B, M, height, width) to the same and the hidden states (B, M, N), in O(L M N) and no order of the pixels.

        [b, c, d] = dw(BCdt_proj x);   a = softmax(d + A) over the pixels
        h = x (a b)^T;   [u, z] = hz_proj h;   h = out_proj(u silu(z) + D u);   y = h c

    The softmax stands for the recurrence's decay. A is one number a state for all pixels, so it has no effect and no
    gradient; it is kept for upstream's checkpoints.

    Args:
        d_model: M.   ssd_expand: D / M.   A_init_range: the initial A are uniform in it.   state_dim: N.

    Source: Lee, Choi & Kim, EfficientViM, 2024, section 3.2.
    """

    def __init__(self, d_model, ssd_expand=1, A_init_range=(1, 16), state_dim=64, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_inner, self.state_dim = d_model, int(ssd_expand * d_model), state_dim
        one_tap = lambda i, o: _Convolution(nn.Conv1d(i, o, 1, bias=False, **factory))  # noqa: E731
        self.BCdt_proj = one_tap(d_model, 3 * state_dim)
        self.dw = _Convolution(
            nn.Conv2d(3 * state_dim, 3 * state_dim, 3, padding=1, groups=3 * state_dim, bias=False, **factory)
        )
        self.hz_proj, self.out_proj = one_tap(d_model, 2 * self.d_inner), one_tap(self.d_inner, d_model)
        self.A = nn.Parameter(torch.empty(state_dim, **factory).uniform_(*A_init_range))
        self.D = nn.Parameter(torch.ones(1, **factory))
        self.D._no_weight_decay = True

    def forward(self, x):
        """The mixed image, and the states, which EfficientViM's head fuses over its stages.

        Args:
            x: (B, M, height, width).

        Returns:
            ((B, M, height, width), (B, M, N)).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(NAME, "x", x, dims=4, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None, self.d_model, None, None))
        pixels = x.flatten(2)
        bcd = depthwise_conv2d(self.BCdt_proj(pixels).unflatten(2, x.shape[2:]), self.dw.conv.weight)
        b, c, d = bcd.flatten(2).chunk(3, 1)
        h = pixels @ (F.softmax(d + self.A[:, None], -1) * b).mT  # [B, M, N]
        u, z = self.hz_proj(h).chunk(2, 1)
        h = self.out_proj(u * (F.silu(z) + self.D))
        return (h @ c).unflatten(2, x.shape[2:]), h


class _Convolution(nn.Module):
    """A convolution under the name that upstream's checkpoints have for it, `conv`."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        """One tap: a product of channels, row by row of the batch, in x's layout.

        As one product of a (N, M) and a (B, M, L) torch folds it through a copy: 25 % of the layer's time on two cores.
        """
        return torch.bmm(self.conv.weight.squeeze(-1).expand(x.shape[0], -1, -1), x)
