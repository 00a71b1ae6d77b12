"""VMamba's SS2D, the image's counterpart of a Mamba block; with one direction a block, GroupMamba's VSSS.

Shape letters: B batch, H x W image, M model width (d_model), D channels (ssm_ratio * M), K directions, N state size,
R rank of the step size, J width of the depthwise filter.

Parameter names, shapes and initialization are those of VMamba's SS2D (and of GroupMamba's, whose K is 1), so that
their checkpoints load.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.ops.cross_scan import check_directions
from scalekern.ops.cross_selective_scan import cross_selective_scan
from scalekern.reference.cross_scan import DIRECTIONS

NAME = "nn.SS2D"


class SS2D(nn.Module):
    """Maps (B, H, W, M) to (B, H, W, M): out_proj(norm(sum_k scan_k(silu(conv(x)))) * silu(z)) of x, z = in_proj(u).

    Args:
        d_model: M.   d_state: N.   ssm_ratio: D / M.   dt_rank: R, or "auto" for ceil(M / 16).
        d_conv: J, odd; 1 leaves the filter out.   conv_bias, bias: of the filter, and of the two outer projections.
        dt_min, dt_max, dt_init_floor: the initial step sizes lie between the first two, uniform in their logarithm.
        directions: the K directions of cross_scan in which all channels are scanned.

    Source: Liu et al., VMamba: Visual State Space Model, 2024, section 4.2 and figure 3.
    """

    def __init__(
        self, d_model, d_state=16, ssm_ratio=2.0, dt_rank="auto", d_conv=3, conv_bias=True, bias=False, dt_min=0.001,
        dt_max=0.1, dt_init_floor=1e-4, directions=DIRECTIONS, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.directions = d_model, d_state, tuple(check_directions(NAME, directions))
        if d_conv % 2 == 0:
            raise ValueError(f"{NAME}: d_conv must be odd, got {d_conv}")
        inner = self.d_inner = int(ssm_ratio * d_model)
        K, rank = len(self.directions), math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **factory)
        if d_conv > 1:
            self.conv2d = nn.Conv2d(
                inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **factory
            )  # fmt: skip
        self.x_proj_weight = nn.Parameter(torch.empty(K, rank + 2 * d_state, inner, **factory))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, inner, rank, **factory))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, inner, **factory))
        # A is -1 .. -N in every channel (S4D-real), kept as a logarithm, in float32 whatever `dtype`.
        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).repeat(K * inner, 1)
        self.A_logs = nn.Parameter(torch.log(A))
        self.Ds = nn.Parameter(torch.ones(K * inner, device=device))
        self.A_logs._no_weight_decay = self.Ds._no_weight_decay = True
        self.out_norm = nn.LayerNorm(inner, **factory)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **factory)
        self._init(inner, rank, dt_min, dt_max, dt_init_floor)

    @torch.no_grad()
    def _init(self, inner, rank, dt_min, dt_max, dt_init_floor):
        """Linear layers as torch's own; softplus(dt_projs_bias) is log-uniform in [dt_min, dt_max]."""
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(dt_min), math.log(dt_max)
        uniform = torch.rand(self.dt_projs_bias.shape, dtype=torch.float32, device=self.dt_projs_bias.device)
        dt = torch.exp(uniform * (high - low) + low).clamp(min=dt_init_floor)
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, u):
        """u (B, H, W, M) -> (B, H, W, M)."""
        _checks.tensor(NAME, "u", u, dims=4, dtypes=_checks.taken_by(self.in_proj))
        _checks.shape(NAME, "u", u, (None, None, None, self.d_model))
        x, z = self.in_proj(u).chunk(2, -1)
        return self.after(self.scan(*self.before(x)), z)

    def before(self, x):
        """(B, H, W, D) -> the scan's arguments."""
        x = x.permute(0, 3, 1, 2)
        x = F.silu(self.conv2d(x) if hasattr(self, "conv2d") else x)
        A = -torch.exp(self.A_logs if self.A_logs.dtype == torch.float64 else self.A_logs.float())
        return x, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, A, self.Ds

    def scan(self, *args):
        return cross_selective_scan(*args, directions=self.directions)

    def after(self, y, z):
        """(B, D, H, W) and the gate (B, H, W, D) -> (B, H, W, M)."""
        return self.out_proj(self.out_norm(y.permute(0, 2, 3, 1)) * F.silu(z))
