"""A line on a terminal that is written again for each layer."""

import shutil
import sys
import time
from collections.abc import Callable


def reporter(progress) -> Callable[[int, int, str], None]:
    """What is called before each layer: None stands for a bar where stderr is a terminal, True for one anywhere."""
    if callable(progress):
        return progress
    wanted = sys.stderr.isatty() if progress is None else progress
    return Bar() if wanted else lambda done, total, name: None


class Bar:
    width = 30

    def __init__(self):
        self.begin = time.monotonic()

    def __call__(self, done: int, total: int, name: str) -> None:
        filled = self.width * done // max(total, 1)
        bar, seconds = "#" * filled + "." * (self.width - filled), time.monotonic() - self.begin
        line = f"quantize |{bar}| {done}/{total} {seconds:.0f} s {name}"
        columns = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{line[:columns]:{columns}}" + ("\n" if done == total else ""))
        sys.stderr.flush()
