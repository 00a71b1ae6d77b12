"""What quantizing a model has done to each of its layers: a table, a figure, and the numbers."""

import dataclasses
import os
import pathlib


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer.

    bits       stored for each weight, with scales and the rest
    error      |y - y_q| / |y| over the calibration inputs that reached the layer, activations' rounding included;
               without any (`measured_on` is "weight") |W - W_q| / |W|. None on the meta device.
    sqnr_db    20 log10(|W| / |W - W_q|), the weight's signal to quantization noise ratio
    """

    name: str
    shape: tuple[int, int]
    kind: str
    bits: float
    error: float | None
    measured_on: str
    sqnr_db: float | None


@dataclasses.dataclass(frozen=True)
class QuantReport:
    """What `quantize_model` returns: str() is a table, `to_dict()` is JSON.

    layers          a LayerReport each, in the model's order
    skipped         {name: reason} of the linear layers, and stacks of matrices, that stayed as they were
    bytes_before    of all parameters and buffers; bytes_after likewise
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = ["layer", "shape", "format", "bits", "error", "of", "SQNR dB"]
        show = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
        rows = [
            [x.name, f"{x.shape[0]} x {x.shape[1]}", x.kind, f"{x.bits:.2f}", show(x.error, 4), x.measured_on,
             show(x.sqnr_db, 1)]
            for x in self.layers
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        justified = lambda i, cell: cell.ljust(widths[i]) if i in (0, 2) else cell.rjust(widths[i])
        lines = [
            "  ".join(justified(i, cell) for i, cell in enumerate(row)).rstrip()
            for row in (header, ["-" * w for w in widths], *rows)
        ]
        lines += [f"left alone: {name} ({reason})" for name, reason in self.skipped.items()]
        return "\n".join([*lines, f"{_size(self.bytes_before)} before, {_size(self.bytes_after)} after"])

    def save_png(self, path) -> None:
        """Bars of every layer's error, and its SQNR. Raises ImportError when matplotlib is not installed."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        layers, path = [x for x in self.layers if x.error is not None], pathlib.Path(path)
        figure = Figure(figsize=(11, 1.6 + 0.24 * len(layers)), layout="constrained")  # no pyplot: no global state
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        places = range(len(layers))
        colors = ["#1f4e8c" if x.measured_on == "outputs" else "#9db7d5" for x in layers]
        left.barh(places, [x.error for x in layers], color=colors)
        left.set(xlabel="relative error (dark: of the outputs, pale: of the weight)")
        right.barh(places, [x.sqnr_db for x in layers], color="#9db7d5")
        right.set(xlabel="SQNR of the weight, dB")
        left.set_yticks(places, [f"{x.name}  {x.kind}, {x.bits:.1f} bits" for x in layers], fontsize=8)
        left.invert_yaxis()
        sizes = f"{_size(self.bytes_before)} to {_size(self.bytes_after)}"
        figure.suptitle(f"{len(layers)} layers quantized: {sizes}", fontsize=10)
        temporary = path.with_name(path.name + ".new")
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, path)


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
