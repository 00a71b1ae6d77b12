"""Compiles what the cases launch in several processes side by side, before anything is timed.

Triton and inductor keep what they have compiled on disk, so the process that measures finds it there: a compiler takes
one core for a second or more a kernel, and a machine with a GPU has many cores.
"""

import json
import subprocess
import sys
import time

import torch

from scalekern.benchmarks import case as case_module
from scalekern.benchmarks import harness
from scalekern.benchmarks.case import Case

COMPILED = ("triton",)  # the backends that compile at their first launch
COMPILED_PEERS = ("flex_attention, compiled", "mamba_ssm", "gemlite", "generative_recommenders")
SHARE = 0.9  # of the GPU's memory, for all processes together


def warm(cases: list[Case], jobs: int, seconds: float, command: list[str] | None = None) -> int:
    """Run each case once on the backends and beside the peers that compile, in `jobs` processes, for `seconds` at most.

    Returns the number of processes that came to the end of their cases. What fails here fails again, and is recorded,
    when it is measured.
    """
    command = command or [sys.executable, "-m", "scalekern.benchmarks.warm"]
    end = time.monotonic() + seconds
    children = []
    for job in range(jobs):
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        )
        names = [c.name for c in cases[job::jobs]]
        json.dump({"names": names, "seconds": seconds, "memory": SHARE / jobs}, child.stdin)
        child.stdin.close()
        children.append(child)
    done = 0
    for child in children:
        try:
            done += child.wait(timeout=max(end - time.monotonic(), 0.1)) == 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return done


def launch_once(case: Case, device: torch.device, end: float) -> None:
    """Whatever goes wrong costs its own turn only."""
    work = case.build(device)
    turns = [(harness.under(backend, work.sample or work.run)) for backend in case.backends if backend in COMPILED]
    turns += [lambda make=work.peers[p]: make().run() for p in COMPILED_PEERS if p in work.peers]
    for turn in turns:
        if time.monotonic() > end:
            return
        try:
            turn()
        except Exception as error:
            print(f"{case.name}: {harness.one_line(error)}", file=sys.stderr)


def main() -> None:
    request = json.load(sys.stdin)
    device, end = torch.device("cuda"), time.monotonic() + request["seconds"]
    torch.cuda.set_per_process_memory_fraction(request["memory"])
    cases = {c.name: c for c in case_module.select(device.type)}
    for name in request["names"]:
        if cases[name].build is None or time.monotonic() > end:
            continue
        try:
            launch_once(cases[name], device, end)
        except Exception as error:  # its inputs did not fit
            print(f"{name}: {harness.one_line(error)}", file=sys.stderr)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
