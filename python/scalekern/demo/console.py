"""What the demo prints: a progress bar (rich, on a terminal) or plain lines, and tables."""

import importlib.util
import sys
import time


def say(text: str = "") -> None:
    """Print now, whatever the terminal's encoding can hold."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def printable(content: bytes) -> str:
    """Text that is safe on a terminal: no control characters but newline and tab."""
    text = content.decode("utf-8", "replace")
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def progress(total: int, done: int):
    """A context manager with update(done, total, status)."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        return RichProgress(total, done)
    return LineProgress(total, done)


class LineProgress:
    """A line for the first step, then one every few seconds: for logs, pipes and machines without rich."""

    interval_s = 10

    def __init__(self, total: int, done: int):
        self.printed_s = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def update(self, done: int, total: int, status: str) -> None:
        now = time.monotonic()
        if self.printed_s is None or done == total or now - self.printed_s >= self.interval_s:
            self.printed_s = now
            say(f"step {done}/{total}  {status}")

    def say(self, text: str) -> None:
        say(text)


class RichProgress:
    def __init__(self, total: int, done: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total, completed=done, status="")

    def __enter__(self):
        self.bar.__enter__()
        return self

    def __exit__(self, *exception):
        self.bar.__exit__(*exception)

    def update(self, done: int, total: int, status: str) -> None:
        self.bar.update(self.task, completed=done, total=total, status=status)

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in (header, ["-" * w for w in widths], *rows)
    ]
    return "\n".join(lines)
