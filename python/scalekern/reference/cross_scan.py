"""Oracle of the readings of an image along directions, of their sum, and of the selective scan along each of them.

Shape letters: B batch, D channels of the image, K directions, P channels of a direction (D, or D / K when grouped),
H x W image, L = H W, N states, R rank of the step size.
"""

import torch

from scalekern.reference.selective_scan import selective_scan

DIRECTIONS = (0, 1, 2, 3)  # row by row, column by column, and both from the last pixel to the first


def cross_scan(x, directions=DIRECTIONS, *, grouped=False):
    """Same arguments and results as scalekern.cross_scan."""
    return cross_scan_fwd(x, directions, grouped)


def cross_scan_fwd(x, directions, grouped):
    parts = x.chunk(len(directions), 1) if grouped and x.shape[1] else [x] * len(directions)
    return torch.stack([_read(part, k) for part, k in zip(parts, directions)], 1)


def cross_merge(y, size, directions=DIRECTIONS, *, grouped=False):
    """Same arguments and results as scalekern.cross_merge."""
    return cross_merge_fwd(y, size, directions, grouped)


def cross_merge_fwd(y, size, directions, grouped):
    wide = y.to(torch.promote_types(y.dtype, torch.float32))  # a sum is rounded once
    images = [_unread(part, size, k) for part, k in zip(wide.unbind(1), directions)]
    return (torch.cat(images, 1) if grouped else sum(images)).to(y.dtype)


def _read(x, direction):
    """(B, P, H, W) -> (B, P, L)"""
    line = (x.transpose(2, 3) if direction % 2 else x).flatten(2)
    return line.flip(2) if direction >= 2 else line


def _unread(line, size, direction):
    """(B, P, L) -> (B, P, H, W)"""
    line = line.flip(2) if direction >= 2 else line
    return line.unflatten(2, size) if direction % 2 == 0 else line.unflatten(2, size[::-1]).transpose(2, 3)


def cross_selective_scan(
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D=None, *, directions=DIRECTIONS, grouped=False
):  # fmt: skip
    """Same arguments and results as scalekern.cross_selective_scan."""
    A, skip = A.chunk(len(directions)), D.chunk(len(directions)) if D is not None else [None] * len(directions)
    lines = []
    for k, u in enumerate(cross_scan_fwd(x, directions, grouped).unbind(1)):
        rank, states = dt_projs_weight.shape[2], A[k].shape[1]
        projected = torch.einsum("bdl,cd->bcl", u, x_proj_weight[k].to(u.dtype))
        delta, B, C = projected.split([rank, states, states], 1)
        delta = torch.einsum("brl,dr->bdl", delta, dt_projs_weight[k].to(u.dtype))
        lines.append(selective_scan(u, delta, A[k], B, C, skip[k], None, dt_projs_bias[k], True))
    return cross_merge_fwd(torch.stack(lines, 1), x.shape[2:], directions, grouped)
