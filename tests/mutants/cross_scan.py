"""Defects of the readings of images."""

from mutants.defects import NotHere, given, halved, output, shifted, swapped, zeroed


def _every_other_way(directions):
    """Rows for columns, or the columns of a tall image taken for those of a wide one."""
    return [k ^ 1 for k in directions]


def _forwards(directions):
    if max(directions) < 2:
        raise NotHere
    return [k % 2 for k in directions]


FORWARD = {
    op: {
        "two channels swapped": output(0, swapped(2 if op == "cross_scan_fwd" else 1)),
        "last pixel not computed": output(0, zeroed(3, -1)),
        "lines shifted": output(0, shifted(3)),
        "rows for columns": given(directions=_every_other_way),
        "reversed ones forwards": given(directions=_forwards),
    }
    for op in ("cross_scan_fwd", "cross_merge_fwd")
}
FORWARD["cross_merge_fwd"]["one direction dropped"] = given(y=zeroed(1, -1))
# Each is the other's gradient: {public op whose gradients show it: its table}.
GRADIENTS = {
    "cross_scan": {"cross_merge_fwd": {"half of the gradient lost": output(0, halved)}},
    "cross_merge": {"cross_scan_fwd": {"half of the gradient lost": output(0, halved)}},
}
