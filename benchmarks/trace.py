"""Which op ran on which backend inside a block of code."""

import contextlib
from collections.abc import Iterator

from scalekern import _dispatch


@contextlib.contextmanager
def backends_used() -> Iterator[list[tuple[str, str]]]:
    """Collects (op, backend) of every call that the dispatcher decides, each pair once, in order."""
    used: list[tuple[str, str]] = []
    select = _dispatch.select

    def watching(op_name, *args):
        chosen = select(op_name, *args)
        if (op_name, chosen.name) not in used:
            used.append((op_name, chosen.name))
        return chosen

    _dispatch.select = watching
    try:
        yield used
    finally:
        _dispatch.select = select
