"""The selective scan of an image in up to four directions, from its pixels to their sum: a composition.

Shape letters: B batch, D channels of the image, K directions, P channels of a direction (D, or D / K when grouped),
H x W image, L = H W, N states, R rank of the step size.

Nothing is copied to be read in a direction: what the scans need besides the pixels is projected from them pixel by pixel
and lies as they do, lines along rows are an image as it lies, those along columns its transpose, which selective_scan
reads and writes in place, and the reversed ones are scanned backwards. (GPUs copy the transposed ones: a scan there
reads one stride.) Pixels of all channels beside each other in memory make products and scans run along channels.
"""

import functools

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
    K = len(directions)
    A, skips = A.chunk(K), D.chunk(K) if D is not None else [None] * K
    parts = x.chunk(K, 1) if grouped and x.shape[1] else [x] * K
    images = [
        _scan(part, direction, *(t[k] for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, skips)))
        for k, (part, direction) in enumerate(zip(parts, directions))
    ]
    if grouped:
        return torch.cat([y.permute(0, 2, 3, 1) for y in images], -1).permute(0, 3, 1, 2)
    return functools.reduce(torch.add, images)


def _scan(x, direction, x_proj_weight, dt_proj_weight, bias, A, D):
    """One direction of an image (B, P, H, W); the same shape."""
    states = A.shape[1]
    pixels = x.permute(0, 2, 3, 1)
    dt, B, C = F.linear(pixels, x_proj_weight.to(x.dtype)).split([dt_proj_weight.shape[1], states, states], -1)
    delta = F.linear(dt, dt_proj_weight.to(x.dtype))
    along = lambda image: image.transpose(2, 3) if direction % 2 else image
    delta, B, C = (along(t.permute(0, 3, 1, 2)) for t in (delta, B, C))
    return along(selective_scan(along(x), delta, A, B, C, D, None, bias, delta_softplus=True, reverse=direction >= 2))


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
