"""An image read along directions, and the sum of such readings: public functions, checks, schemas and gradients.

Shape letters: B batch, D channels of the image, K directions, P channels of a direction (D, or D / K when grouped),
H x W image, L = H W.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, triton
from scalekern.ops import _cross_scan
from scalekern.reference.cross_scan import DIRECTIONS
from scalekern.reference.cross_scan import cross_merge_fwd as reference_merge
from scalekern.reference.cross_scan import cross_scan_fwd as reference_scan

NAME, MERGE = "cross_scan", "cross_merge"


def cross_scan(x, directions=DIRECTIONS, *, grouped=False):
    """out[b, k, d] = the image x[b, d] pixel by pixel in direction k: VMamba's four sequences of an image.

    Differentiable, to any order: cross_merge is its transpose. A scan that follows needs no such copies where
    cross_selective_scan does the whole.

    Args:
        x: (B, D, H, W), float64, float32, float16 or bfloat16, any strides.
        directions: K different ones of 0 (row by row), 1 (column by column), 2 and 3 (the same from the last pixel to
            the first).
        grouped: the k-th of K groups of D / K channels is read in the k-th direction only (GroupMamba).

    Returns:
        out (B, K, P, L) in x's dtype, contiguous, P = D or, grouped, D / K.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value, named in the message.

    Source: Liu et al., VMamba: Visual State Space Model, 2024, section 4.2 (cross-scan); Shaker et al., GroupMamba,
    2024, section 3.2.
    """
    _checks.tensor(NAME, "x", x, dims=4, dtypes=_checks.FLOATING)
    directions = check_directions(NAME, directions)
    if grouped:
        check_groups(NAME, "x", x.shape[1], directions)
    return cross_scan_fwd(x, directions, grouped)


def cross_merge(y, size, directions=DIRECTIONS, *, grouped=False):
    """out[b, d, h, w] = sum_k y[b, k, d, place of (h, w) in direction k]: VMamba's cross-merge, cross_scan's transpose.

    Differentiable, to any order.

    Args:
        y: (B, K, P, L), float64, float32, float16 or bfloat16, any strides.
        size: (H, W) of the image, with H W = L.
        directions: as for cross_scan.
        grouped: y[:, k] holds the channels of the k-th group; nothing is summed.

    Returns:
        out (B, D, H, W) in y's dtype, contiguous, D = P or, grouped, K P. Half precision is summed in float32 and
        rounded once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value, named in the message.

    Source: Liu et al., VMamba: Visual State Space Model, 2024, section 4.2 (cross-merge).
    """
    _checks.tensor(MERGE, "y", y, dims=4, dtypes=_checks.FLOATING)
    directions = check_directions(MERGE, directions)
    pair = isinstance(size, (tuple, list, torch.Size)) and len(size) == 2
    if not pair or not all(isinstance(n, (int, torch.SymInt)) and n >= 0 for n in size):
        raise ValueError(f"{MERGE}: size must be two integers (H, W), got {size!r}")
    _checks.shape(MERGE, "y", y, (None, len(directions), None, size[0] * size[1]))
    return cross_merge_fwd(y, list(size), directions, grouped)


def check_directions(op, directions) -> list[int]:
    values = list(directions) if isinstance(directions, (tuple, list)) else []
    if not values or any(type(k) is not int or k not in DIRECTIONS for k in values) or len(set(values)) < len(values):
        raise ValueError(f"{op}: directions must be different ones of {DIRECTIONS}, got {directions!r}")
    return values


def check_groups(op, name, channels, directions) -> None:
    if channels % len(directions):
        raise ValueError(
            f"{op}: the {len(directions)} directions must divide the channels of {name}, got {channels} channels"
        )


def _allocate_scan(x, directions, grouped):
    """The output, uninitialized: what the fake returns and what the kernels fill."""
    batch, channels, rows, columns = x.shape
    parts = len(directions)
    return x.new_empty(batch, parts, channels // parts if grouped else channels, rows * columns)


def _allocate_merge(y, size, directions, grouped):
    return y.new_empty(y.shape[0], y.shape[2] * (len(directions) if grouped else 1), *size)


def _setup_scan(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.size = x.shape[2:]


def _scan_backward(ctx, dout):
    return cross_merge_fwd(dout, list(ctx.size), *ctx.options), None, None


def _setup_merge(ctx, inputs, output):
    ctx.options = inputs[2:]


def _merge_backward(ctx, dout):
    return cross_scan_fwd(dout, *ctx.options), None, None, None


cross_scan_fwd = _library.define(
    NAME,
    "cross_scan_fwd(Tensor x, int[] directions, bool grouped) -> Tensor",
    backends=(
        Backend("triton", filling(_allocate_scan, triton("cross_scan", "cross_scan_fwd"))),
        Backend("cpu", filling(_allocate_scan, _cross_scan.scan)),
        Backend("reference", reference_scan),
    ),
    fake=_allocate_scan,
    empty=lambda x, *rest: x.numel() == 0,
    setup_context=_setup_scan,
    backward=_scan_backward,
)

cross_merge_fwd = _library.define(
    MERGE,
    "cross_merge_fwd(Tensor y, SymInt[] size, int[] directions, bool grouped) -> Tensor",
    backends=(
        Backend("triton", filling(_allocate_merge, triton("cross_scan", "cross_merge_fwd"))),
        Backend("cpu", filling(_allocate_merge, _cross_scan.merge)),
        Backend("reference", reference_merge),
    ),
    fake=_allocate_merge,
    empty=lambda y, *rest: y.numel() == 0,
    setup_context=_setup_merge,
    backward=_merge_backward,
)
