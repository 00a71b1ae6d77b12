"""Tables on a terminal: rich when it is installed, plain columns otherwise."""

import shutil


def table(title: str, columns: list[str], rows: list[list[str]], styles: dict[str, str] | None = None) -> None:
    """Print rows of strings. styles: cell text -> rich style."""
    styles = styles or {}
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain(title, columns, rows)
        return
    grid = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    console = Console(width=None if shutil.get_terminal_size((0, 0)).columns else 160)
    console.print(grid)


def _plain(title: str, columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
    print(title)
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def duration(us: float | None) -> str:
    """Three significant digits in the unit that fits."""
    if us is None:
        return ""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def size(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"
