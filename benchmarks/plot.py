"""Figures of the results, from the records alone."""

import io
import pathlib

from scalekern.benchmarks import records

COLORS = {"cuda": "#76b900", "triton": "#8d5bd1", "cpu": "#2f6fb2", "default": "#2f6fb2", "reference": "#999999"}


def figure(rows: list[dict], title: str, path: pathlib.Path) -> bool:
    """How many times faster than each rival (left) and which share of the device's limit (right), one line a record.

    Returns whether there was anything to draw. The same records give the same bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["status"] == "ok" and r["direction"] != "memory" and r["backend"] != "reference"]
    if not rows:
        return False
    rows = rows[::-1]  # matplotlib counts upward
    layout = {"sharey": True, "width_ratios": (3, 2), "layout": "constrained"}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.42 * len(rows)), **layout)
    names = sorted({p["name"] for r in rows for p in r["peers"] if "ratio" in p})
    marks = dict(zip(names, "osD^vP*X<>hp" * (1 + len(names) // 12)))
    for i, row in enumerate(rows):
        ratios = [(p["name"], p["ratio"]) for p in row["peers"] if "ratio" in p]
        if ratios:
            left.plot([1, max(v for _, v in ratios)], [i, i], color="#cccccc", zorder=1)
        for name, value in ratios:
            left.scatter(value, i, marker=marks[name], color=COLORS[row["backend"]], edgecolor="white", s=60, zorder=2)
        if "fraction_of_limit" in row:
            percent = 100 * row["fraction_of_limit"]
            right.barh(i, percent, color=COLORS[row["backend"]], alpha=0.4 if row["stale"] else 1)
            right.text(percent, i, f" {row['limit_by']}", va="center", fontsize=8)
    left.set_xscale("log")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(rows)), [label(r) for r in rows], fontsize=8)
    left.set_xlabel("times faster than")
    for name in names:
        left.scatter([], [], marker=marks[name], color="#555555", label=name)
    if names:
        left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    right.margins(x=0.25)  # room for the names at the ends of the bars
    right.set_xlabel("% of the limit that this device implies")
    fig.suptitle(title, fontsize=10)
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=110, metadata={"Software": None})
    plt.close(fig)
    records.write_atomically(path, content.getvalue())
    return True


def label(row: dict) -> str:
    sizes = " ".join(f"{k}{v}" if len(k) == 1 else str(v) for k, v in row["shape"].items() if k != "layers")
    return f"{row['what']} {sizes} [{row['backend']}]" + (" (stale)" if row["stale"] else "")
