"""One PNG: the loss curve, the time of each case on both sides, and what low-bit weights lose."""

import os
import pathlib

from scalekern.demo.compare import Timing
from scalekern.demo.quantized import Variant

DARK, PALE, LIGHT = "#1f4e8c", "#9db7d5", "#c9c9c9"


def draw(
    path: pathlib.Path, losses: list[float], curve: list[tuple[int, float]], timings: list[Timing],
    formats: list[Variant], title: str,
) -> None:  # fmt: skip
    """Raises ImportError when matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")  # without pyplot: no global state, no display
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    _draw_curve(left, losses, curve)
    _draw_bars(middle, timings)
    _draw_formats(right, formats)
    temporary = path.with_name(path.name + ".new")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, path)


def _draw_curve(axes, losses: list[float], curve: list[tuple[int, float]]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, color=PALE, linewidth=0.8, label="training batch")
    axes.plot(*zip(*curve), color=DARK, marker="o", markersize=3.5, label="held-out text")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.annotate(
        f"{curve[-1][1]:.2f}",
        curve[-1],
        xytext=(0, 12),
        textcoords="offset points",
        ha="right",
        color=DARK,
        weight="bold",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )
    axes.set(xlabel="training step", ylabel="bits per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_bars(axes, timings: list[Timing]) -> None:
    height = 0.38
    for i, timing in enumerate(timings):
        for offset, value, color in ((-0.2, timing.scalekern_ms, DARK), (0.2, timing.pytorch_ms, LIGHT)):
            axes.barh(i + offset, value, height, color=color)
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            label = f"{value:.3g} ms" if value < 999 else f"{value:.0f} ms"
            axes.annotate(label, (value, i + offset), **place, fontsize=8)
    axes.set_yticks(range(len(timings)), [f"{t.case}\n{t.shape}\n{t.speedup:.1f}x" for t in timings])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set(xlabel="milliseconds (log scale)")
    axes.set_title("scalekern (dark), plain PyTorch (light)", fontsize=9)


def _draw_formats(axes, formats: list[Variant]) -> None:
    colors = [PALE if v.rotated else DARK for v in formats]
    axes.barh(range(len(formats)), [v.bits_per_byte for v in formats], 0.7, color=colors)
    for i, v in enumerate(formats):
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{v.bits_per_byte:.3f}", (v.bits_per_byte, i), **place, fontsize=8)
    axes.set_yticks(range(len(formats)), [f"{v.label}\n{v.size_bytes / 1000:.0f} kB" for v in formats])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel="held-out bits per byte")
    axes.set_title("quantized weights, with a rotation (pale)", fontsize=9)
