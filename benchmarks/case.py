"""What a benchmark case is: one op on one shape, with its oracle, its costs and its rivals."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable

import torch


@dataclasses.dataclass
class Work:
    """A case on one device, ready to run.

    run         what is timed; goes through the scalekern dispatcher, so scalekern.backend(name) decides who runs it
    oracle      the same outputs in float64, a tuple of tensors; None: `sample` is compared with that of a peer
    tolerance   relative L2 error above which nothing is timed
    sample      the outputs to compare, where `run` changes its inputs; None: those of `run`
    costs       bytes that must move, arithmetic, exponentials: what the device's limit is computed from
    peers       name -> a function that returns what to time (its outputs are compared too, unless it returns None),
                or raises peers.Absent with the reason
    """

    run: Callable
    oracle: Callable | None
    tolerance: float
    bytes_moved: int
    flops: int = 0
    exponentials: int = 0
    sample: Callable | None = None
    peers: dict[str, Callable] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the results.

    ops         the registered ops that it runs
    direction   fwd, bwd, fwd+bwd, step, memory, end-to-end
    priority    smaller runs earlier, when time is short
    build       build(device) -> Work; None for the kinds with a procedure of their own (memory, end-to-end)
    backends    the backends worth timing; those that cannot run the case are left out
    targets     peer -> least ratio peer / scalekern that the project promises;
                "limit" -> least fraction of the device's limit; "elements/s" -> least B x D x L a second
    """

    name: str
    ops: tuple[str, ...]
    direction: str
    devices: tuple[str, ...]
    priority: int
    shape: dict
    build: Callable[[torch.device], Work] | None
    backends: tuple[str, ...] = ("cuda", "triton", "cpu", "reference")
    targets: dict[str, float] = dataclasses.field(default_factory=dict)
    procedure: Callable | None = None
    family: str = ""

    def __str__(self) -> str:
        return self.name


def families() -> dict[str, list[Case]]:
    """Family -> its cases, from every bench_<family>.py beside this file."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(f"scalekern.benchmarks.{path.stem}")
        family = path.stem.removeprefix("bench_")
        found[family] = [dataclasses.replace(c, family=family) for c in module.CASES]
    return found


def select(device: str, family: str | None = None, pattern: str | None = None) -> list[Case]:
    """The cases of one device kind, most important first."""
    cases = [c for name, cs in families().items() for c in cs if family in (None, name) and device in c.devices]
    if pattern:
        cases = [c for c in cases if pattern in c.name]
    return sorted(cases, key=lambda c: c.priority)
