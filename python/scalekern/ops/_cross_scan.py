"""What stands between the registered readings of images and their kernels."""

from scalekern._dispatch import native

_scan, _merge = native("cross_scan", "cpu"), native("cross_merge", "cpu")


def code(directions) -> int:
    """Two bits a direction, the first lowest."""
    return sum(direction << 2 * i for i, direction in enumerate(directions))


def scan(out, x, directions, grouped) -> None:
    """fill(out, *op arguments)"""
    _scan(out, x, code(directions), grouped)


def merge(out, y, size, directions, grouped) -> None:
    """fill(out, *op arguments)"""
    _merge(out, y, code(directions), grouped)


scan.native_op, merge.native_op = _scan.native_op, _merge.native_op
