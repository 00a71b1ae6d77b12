"""The trained model on scalekern's kernels and on plain PyTorch (backend "reference"): same logits, what time?"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

import scalekern
from scalekern import _library, masks
from scalekern.demo.model import LanguageModel
from scalekern.demo.train import Settings, make_optimizer, optimize

# Relative L2 error of fp32 logits against the reference's. An op may differ by 1e-5 from its oracle (DESIGN.md,
# contract 2); a residual stream neither amplifies nor averages that out, so the model is held to the same figure.
LOGITS_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Timing:
    case: str
    shape: str
    scalekern_ms: float
    pytorch_ms: float

    @property
    def speedup(self) -> float:
        return self.pytorch_ms / self.scalekern_ms


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def logits_error(model: LanguageModel, tokens: torch.Tensor) -> float:
    """Relative L2 error of the logits of `tokens` (B, L) on scalekern's kernels against the reference backend's."""
    actual = model(tokens)
    with scalekern.backend("reference"):
        expected = model(tokens)
    return relative_error(actual, expected)


@torch.no_grad()
def decode_error(model: LanguageModel, prompt: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """The same for logits (B, T, 256) that were computed byte by byte, against one reference pass over everything."""
    with scalekern.backend("reference"):
        expected = model(torch.cat([prompt, tokens[:, :-1]], 1))[:, prompt.shape[1] - 1 :]
    return relative_error(logits, expected)


def timings(model: LanguageModel, text: torch.Tensor, settings: Settings, quick: bool) -> list[Timing]:
    """Training step, prefill and decode on both sides; `text` (B, L + 1) holds training windows."""
    trained = copy.deepcopy(model)  # its steps must not move the model
    optimizer = make_optimizer(trained, settings)
    prompt = text[:1, :-1]
    decoded = 8 if quick else 64

    def training_step():
        optimize(trained, optimizer, text, settings.clip)

    @torch.no_grad()
    def prefill():
        model.prefill(prompt)

    with torch.no_grad():
        cache = model.prefill(prompt[:, :4])[1]

    @torch.no_grad()
    def decode():
        for t in range(decoded):
            model.step(prompt[:, t], cache)

    batch, window = text.shape[0], text.shape[1] - 1
    config = model.config
    convolution = _convolution(batch, config.width, window, device=text.device)
    heads = batch, config.heads, window, config.width // config.heads
    attention = _attention(model.config, *heads, device=text.device)
    cases = [
        ("training step", f"{batch} x {window} bytes", training_step, 1),
        ("long convolution", f"{batch} x {config.width} x {window}, both ways", convolution, 1),
        ("window attention", " x ".join(map(str, heads)) + ", both ways", attention, 1),
        ("prefill", f"1 x {window} bytes", prefill, 1),
        ("decode", "a byte", decode, decoded),
    ]
    rounds = 0 if quick else 3
    return [Timing(name, shape, *(t / per for t in both(run, rounds))) for name, shape, run, per in cases]


def _convolution(*shape, device) -> Callable:
    """H3's gated convolution by itself, forward and backward, with filters as long as the window."""
    u, pregate, postgate, dout = (torch.randn(shape, device=device) for _ in range(4))
    k = torch.randn(shape[1:], device=device) / shape[-1] ** 0.5
    leaves = [x.requires_grad_() for x in (u, k, pregate, postgate)]

    def run():
        y = scalekern.fft_conv(u, k, pregate=pregate, postgate=postgate)
        torch.autograd.grad(y, leaves, dout)

    return run


def _attention(config, *shape, device) -> Callable:
    """The attention blocks' mask, forward and backward."""
    rule = masks.causal & (masks.window(config.window - 1, 0) | masks.sink(config.sinks))
    q, k, v, dout = (torch.randn(shape, device=device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(scalekern.sparse_attention(*leaves, rule), leaves, dout)


def both(run: Callable, rounds: int) -> tuple[float, float]:
    """Median milliseconds of `run` on scalekern's kernels and on the reference, by turns, after a round of warm-up
    (0 rounds: the warm-up itself, for a trial)."""
    ours, theirs = [], []
    for round in range(rounds + 1):
        for _ in range(3):
            ours.append(milliseconds(run))
        with scalekern.backend("reference"):
            theirs.append(milliseconds(run))
        if round == 0 and rounds > 0:
            ours, theirs = [], []
    return statistics.median(ours), statistics.median(theirs)


def milliseconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def backends(device_type: str) -> dict[str, str]:
    """For each op the first backend that is available for this device; on the CPU the interpreter is not one."""
    chosen = {}
    for name, op in _library.OPS.items():
        usable = [b.name for b in op.backends if b.unavailable(device_type) is None]
        chosen[name] = next(b for b in usable if not (b == "triton" and device_type == "cpu"))
    return chosen
