"""Training: schedule, steps, held-out bits per byte, checkpoints, and a clean stop on Ctrl-C.

Everything a step depends on is its number and the tensors of the checkpoint, so a resumed run goes on with the very
losses that an uninterrupted one has (same machine, same number of threads).
"""

import dataclasses
import json
import math
import os
import pathlib
import signal
import threading
import time

import torch
import torch.nn.functional as F

from scalekern.demo import data
from scalekern.demo.data import Corpus, InputError
from scalekern.demo.model import Config, LanguageModel

FORMAT = "scalekern-demo-3"
TIME_LIMIT_S = 200  # of training, so that the whole demo ends within five minutes
PROBE_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 1600
    batch: int = 8
    window: int = 256
    peak_rate: float = 4e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    held_out_windows: int = 64
    seed: int = 0


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warmup, then a cosine down to a twentieth of the peak. `step` counts from 0."""
    warmup = max(1, min(60, settings.steps // 10))
    if step < warmup:
        return settings.peak_rate * (step + 1) / warmup
    turn = math.pi * (step - warmup) / max(1, settings.steps - warmup)
    return settings.peak_rate * (0.05 + 0.95 * (1 + math.cos(turn)) / 2)


def bits_per_byte(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean of -log2 p(target): logits (..., 256), targets (...)."""
    nats = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))
    return nats.item() / math.log(2)


@torch.no_grad()
def held_out_bits(model: LanguageModel, windows: torch.Tensor) -> float:
    """Bits per byte over all targets of the held-out windows (count, L + 1), each read from a zero state."""
    total = 0.0
    for tokens in windows.split(16):
        tokens = tokens.to(model.embedding.weight.device)
        total += bits_per_byte(model(tokens[:, :-1]), tokens[:, 1:]) * len(tokens)
    return total / len(windows)


class Trainer:
    """Model, optimizer and progress of one run; `step` is the number of steps done."""

    def __init__(self, corpus: Corpus, config: Config, settings: Settings, device: str):
        self.corpus, self.settings, self.device = corpus, settings, device
        torch.manual_seed(settings.seed)
        self.model = LanguageModel(config).to(device)
        self.optimizer = make_optimizer(self.model, settings)
        self.held_out = data.held_out_windows(corpus.held_out, settings.held_out_windows, settings.window)
        self.step = 0
        self.seconds = 0.0
        self.probe: tuple[int, float] | None = None  # steps and seconds when the measurement of speed began
        self.losses: list[float] = []  # bits per byte on each step's batch
        self.curve: list[tuple[int, float]] = []  # (steps done, held-out bits per byte)

    def train_step(self) -> float:
        start = time.perf_counter()
        settings = self.settings
        tokens = data.batch(self.corpus.train, self.step, settings.batch, settings.window, settings.seed)
        tokens = tokens.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings) * group["share"]
        loss = optimize(self.model, self.optimizer, tokens, settings.clip)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {self.step + 1}")
        self.step += 1
        self.losses.append(loss / math.log(2))
        self.seconds += time.perf_counter() - start
        return self.losses[-1]

    def evaluate(self) -> float:
        """`held_out_bits` of the model, as a point of the curve."""
        self.curve.append((self.step, held_out_bits(self.model, self.held_out)))
        return self.curve[-1][1]

    def evaluation_due(self) -> bool:
        every = max(20, self.settings.steps // 16)
        return self.step % every == 0 or self.step == self.settings.steps

    def status(self) -> str:
        recent = self.losses[-20:]
        rate = self.step / self.seconds
        return (
            f"bits per byte: training {sum(recent) / len(recent):.3f}, held out {self.curve[-1][1]:.3f}; "
            f"{rate:.1f} steps/s"
        )

    def fit_time_limit(self) -> bool:
        """Now and then: plan fewer steps, when this machine would not do all of them within TIME_LIMIT_S."""
        self.probe = self.probe or (self.step, self.seconds)  # after the first step, which warms up
        done = self.step - self.probe[0]
        if done == 0 or done % PROBE_STEPS:
            return False
        seconds_a_step = (self.seconds - self.probe[1]) / done
        affordable = self.step + max(PROBE_STEPS, int((TIME_LIMIT_S - self.seconds) / seconds_a_step))
        if affordable > 0.95 * self.settings.steps:
            return False
        self.settings = dataclasses.replace(self.settings, steps=affordable)
        return True

    def save(self, path: pathlib.Path) -> None:
        """One safetensors file, written beside its place and renamed into it: there is never half a checkpoint."""
        from safetensors.torch import save_file

        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        state = {
            "format": FORMAT, "digest": self.corpus.digest, "config": dataclasses.asdict(self.model.config),
            "settings": dataclasses.asdict(self.settings), "step": self.step, "seconds": self.seconds,
            "losses": self.losses, "curve": self.curve,
        }  # fmt: skip
        temporary = path.with_name(path.name + ".new")
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, temporary, {"state": json.dumps(state)})
        os.replace(temporary, path)

    @classmethod
    def resume(cls, path: pathlib.Path, corpus: Corpus, steps: int | None, device: str) -> "Trainer":
        """The run that `path` holds; `steps` re-plans its length."""
        state, tensors = read_checkpoint(path)
        if state["digest"] != corpus.digest:
            raise InputError(f"{path} was trained on another text: give that --text, or start over without --resume")
        settings = Settings(**state["settings"])
        settings = dataclasses.replace(settings, steps=max(steps or settings.steps, state["step"]))
        trainer = cls(corpus, Config(**state["config"]), settings, device)
        own = trainer.model.state_dict()
        for name, value in own.items():
            _check_tensor(path, f"model.{name}", tensors, value.shape)
        trainer.model.load_state_dict({name: tensors[f"model.{name}"] for name in own})
        for name, parameter in trainer.model.named_parameters():
            moments = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                for key in ("exp_avg", "exp_avg_sq"):
                    _check_tensor(path, f"optimizer.{key}.{name}", tensors, parameter.shape)
                trainer.optimizer.state[parameter] = {key: value.to(device) for key, value in moments.items()}
        trainer.step, trainer.seconds = state["step"], state["seconds"]
        trainer.losses, trainer.curve = state["losses"], [tuple(point) for point in state["curve"]]
        return trainer


def _check_tensor(path: pathlib.Path, name: str, tensors: dict, shape: torch.Size) -> None:
    if name not in tensors or tensors[name].shape != shape:
        got = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        raise InputError(f"{path} does not hold the model that it names: {name} {got}, expected {tuple(shape)}")


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; weights of matmuls decay, the rest (norms, biases, A, D, embedding) does not; what a layer marks for its
    own rate (H3's A, B and dt, in which a kernel is exponential) learns at a quarter of the others'."""
    named = dict(model.named_parameters())
    kernels = [p for p in named.values() if hasattr(p, "_optim")]
    kept = [p for n, p in named.items() if p.dim() < 2 or n.endswith("A_log") or "embedding" in n]
    kept = [p for p in kept if not hasattr(p, "_optim")]
    skip = {*kernels, *kept}
    decaying = [p for p in named.values() if p not in skip]
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay, "share": 1.0},
        {"params": kept, "weight_decay": 0.0, "share": 1.0},
        {"params": kernels, "weight_decay": 0.0, "share": 0.25},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.98), fused=True)


def optimize(model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, clip: float) -> float:
    """One step on windows (B, L + 1); the loss in nats a byte."""
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def read_checkpoint(path: pathlib.Path) -> tuple[dict, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise InputError(f"there is nothing to resume: {path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
            if state.get("format") != FORMAT:
                raise InputError(f"{path} is not a checkpoint of this demo")
            return state, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({error})") from None


class StopRequest:
    """While open, Ctrl-C asks for a stop after the current step; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.asked = False
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
