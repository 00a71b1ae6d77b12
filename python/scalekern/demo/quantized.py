"""The trained model with its projections in 8, 4 and 2 bits, plain and rotated: what is lost, saved and gained?"""

import copy
import dataclasses
import statistics

import torch

from scalekern.demo import compare, train
from scalekern.demo.model import LanguageModel
from scalekern.quant import quantize_model

# What each width of code takes to lose little: after 400 steps of training, W4 by absmax (without zeros) loses 0.5 %
# of the bits per byte, by least squares 0.5 %, by hqq 0.1 %; W2 in groups of 32 by least squares 10 %, by hqq 8 %.
_SMALL = {"symmetric": False, "method": "hqq", "scale_dtype": torch.float16}
FORMATS = {
    "W8": {"format": "int8", "group_size": 64, "scale_dtype": torch.float16},
    "W4": {"format": "int4", "group_size": 64, **_SMALL},
    "W2": {"format": "int2", "group_size": 32, **_SMALL},
}
KEPT = ("*.dt_proj",)  # R = 8 columns: nothing to save, and a scan's step sizes to lose


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: the model with its linear layers in one format."""

    name: str
    rotated: bool
    bits_per_byte: float
    size_bytes: int
    decode_ms: float  # a byte

    @property
    def label(self) -> str:
        return f"{self.name} rotated" if self.rotated else self.name


def variants(model: LanguageModel, held_out: torch.Tensor, quick: bool) -> list[Variant]:
    """The float model, then every format without and with a Hadamard rotation of the layers' inputs.

    held_out (count, L + 1) are the windows that bits per byte are counted over; all models decode by turns.
    """
    models = {("float32", False): model.eval()}
    for name, options in FORMATS.items():
        for rotated in (False, True):
            rule = {**options, "rotation": "hadamard" if rotated else None}
            quantized = copy.deepcopy(model)
            quantize_model(quantized, [*((pattern, None) for pattern in KEPT), ("*", rule)])
            models[name, rotated] = quantized
    milliseconds = _decoding(list(models.values()), held_out, 4 if quick else 16, 1 if quick else 24)
    return [
        Variant(name, rotated, train.held_out_bits(m, held_out), _bytes(m), decode_ms)
        for ((name, rotated), m), decode_ms in zip(models.items(), milliseconds)
    ]


def rows(found: list[Variant]) -> list[list[str]]:
    """Cells of a table: what each variant has lost against the first."""
    first = found[0]
    return [
        [v.label, f"{v.bits_per_byte:.3f}", f"{100 * (v.bits_per_byte / first.bits_per_byte - 1):+.1f} %",
         f"{v.size_bytes / 1000:.0f}", f"{v.decode_ms:.2f}", f"{first.decode_ms / v.decode_ms:.2f}x"]
        for v in found
    ]  # fmt: skip


HEADER = ["weights", "bits per byte", "lost", "kB", "ms a byte decoded", "speed"]


@torch.no_grad()
def _decoding(models: list[LanguageModel], text: torch.Tensor, count: int, rounds: int) -> list[float]:
    """Median milliseconds a byte of each model, after a round of warm-up.

    By short turns, `count` bytes each: what else the machine does meets all models; every byte by itself, so that what
    it does for a moment moves no median. The first bytes of a turn find the caches full of another model.
    """
    prompt = text[:1]
    caches = [m.prefill(prompt[:, :4])[1] for m in models]
    times = [[] for _ in models]
    for round in range(rounds + 1):
        for model, cache, found in zip(models, caches, times):
            for t in range(count):
                byte = prompt[:, (round * count + t) % prompt.shape[1]]
                elapsed = compare.milliseconds(lambda: model.step(byte, cache))  # noqa: B023 (called at once)
                if round:
                    found.append(elapsed)
    return [statistics.median(found) for found in times]


def _bytes(model) -> int:
    return sum(p.nbytes for p in model.parameters())
