"""The selective scan of an image in up to four directions, from its pixels to their sum: a composition.

Shape letters: B batch, D channels of the image, K directions, P channels of a direction (D, or D / K when grouped),
H x W image, L = H W, N states, R rank of the step size.

Nothing is read in K copies. What the scans need besides the pixels is projected from them pixel by pixel, so that it
comes in the pixels' order: lines along rows take the image as it lies, those along columns one transposed copy that
both of them share, and the reversed ones are scanned backwards. Copied in all: the image once (grouped, half of it),
and its result once on the way back. No kernel reads columns of the image itself in place: their pixels are two strides
apart (one within a column, one from a column to the next), and a scan has one stride of time.
Pixels of all channels beside each other in memory make products, copies and scans run along channels.
"""

import torch
import torch.nn.functional as F

from scalekern import _checks
from scalekern.ops.cross_scan import check_directions, check_groups
from scalekern.ops.selective_scan import selective_scan
from scalekern.reference.cross_scan import DIRECTIONS

NAME = "cross_selective_scan"


def cross_selective_scan(
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D=None, *, directions=DIRECTIONS, grouped=False
):  # fmt: skip
    """cross_merge(selective_scan(u, dt, A, B, C, D)) of u = cross_scan(x), (dt, B, C) = x_proj_weight u, dt projected.

    The core of VMamba's SS2D and, grouped, of GroupMamba's four scans, without copies for the directions.
    Differentiable in every floating input.

    Args:
        x: (B, D, H, W), float64, float32, float16 or bfloat16, any strides; channels-last is the fastest.
        x_proj_weight: (K, R + 2 N, P).   dt_projs_weight: (K, P, R).   dt_projs_bias: (K, P), through softplus.
        A: (K P, N) real, negative where the scan is stable.   D: (K P,).
        directions, grouped: as for cross_scan.

    Returns:
        out (B, D, H, W) in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Liu et al., VMamba: Visual State Space Model, 2024, section 4.2 (SS2D); Shaker et al., GroupMamba, 2024,
    section 3.2 (VSSS); argument order of VMamba's cross_selective_scan.
    """
    directions = _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, directions, grouped)
    K, (R, N) = len(directions), (dt_projs_weight.shape[2], A.shape[1])
    A, skips = A.chunk(K), D.chunk(K) if D is not None else [None] * K
    parts = x.chunk(K, 1) if grouped and x.shape[1] else [x] * K
    columns = {}  # transposed copies, one a part
    sums: dict[tuple, torch.Tensor] = {}
    for k, (part, direction) in enumerate(zip(parts, directions)):
        if along := direction % 2:
            key = k if grouped else 0
            if key not in columns:
                columns[key] = part.permute(0, 3, 2, 1).contiguous().permute(0, 3, 1, 2)  # [B, P, W, H], channels last
            part = columns[key]
        y = _scan(part, x_proj_weight[k], dt_projs_weight[k], dt_projs_bias[k], A[k], skips[k], R, N, direction >= 2)
        key = (k if grouped else 0, along)
        sums[key] = sums[key] + y if key in sums else y
    images = [y.transpose(2, 3) if along else y for (_, along), y in sums.items()]
    if grouped:
        return torch.cat([y.permute(0, 2, 3, 1) for y in images], -1).permute(0, 3, 1, 2)
    return images[0] + images[1] if len(images) == 2 else images[0]


def _scan(x, x_proj_weight, dt_proj_weight, bias, A, D, R, N, reverse):
    """One direction of an image (B, P, ., .) whose last axis is the inner one of the line; the same shape."""
    u = x.flatten(2)
    line = u.transpose(1, 2)  # [B, L, P]
    dt, B, C = F.linear(line, x_proj_weight.to(x.dtype)).split([R, N, N], -1)
    delta = F.linear(dt, dt_proj_weight.to(x.dtype)).transpose(1, 2)
    y = selective_scan(
        u, delta, A, B.transpose(1, 2), C.transpose(1, 2), D, None, bias, delta_softplus=True, reverse=reverse
    )
    return y.unflatten(2, x.shape[2:])


def _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, directions, grouped):
    _checks.tensor(NAME, "x", x, dims=4, dtypes=_checks.FLOATING)
    directions = check_directions(NAME, directions)
    if grouped:
        check_groups(NAME, "x", x.shape[1], directions)
    K, P = len(directions), x.shape[1] // len(directions) if grouped else x.shape[1]
    _checks.tensor(NAME, "dt_projs_weight", dt_projs_weight, dims=3, dtypes=_checks.FLOATING)
    _checks.shape(NAME, "dt_projs_weight", dt_projs_weight, (K, P, None))
    _checks.tensor(NAME, "A", A, dims=2, dtypes=_checks.FLOATING)
    _checks.shape(NAME, "A", A, (K * P, None))
    _checks.tensor(NAME, "x_proj_weight", x_proj_weight, dims=3, dtypes=_checks.FLOATING)
    _checks.shape(NAME, "x_proj_weight", x_proj_weight, (K, dt_projs_weight.shape[2] + 2 * A.shape[1], P))
    _checks.tensor(NAME, "dt_projs_bias", dt_projs_bias, dims=2, dtypes=_checks.FLOATING)
    _checks.shape(NAME, "dt_projs_bias", dt_projs_bias, (K, P))
    if D is not None:
        _checks.tensor(NAME, "D", D, dims=1, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "D", D, (K * P,))
    _checks.same_device(
        NAME, "x", x, x_proj_weight=x_proj_weight, dt_projs_weight=dt_projs_weight, dt_projs_bias=dt_projs_bias,
        A=A, D=D,
    )  # fmt: skip
    return directions
