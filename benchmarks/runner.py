"""Runs cases in a child process within a time budget, writing records after each case.

The parent only watches: when the child dies or hangs while a backend runs a case, that backend's failure is recorded
and a fresh child goes on with the rest. So a kernel that crashes costs its own line and a few seconds, and a run that
is cut short leaves everything it had measured.
"""

import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

from scalekern.benchmarks import case as case_module
from scalekern.benchmarks import harness, rates, records
from scalekern.benchmarks.case import Case

HANG = 240.0  # seconds without a word from the child: compiling all of a Triton kernel's candidates takes the longest
STICKY_EXIT = 75


def run(cases: list[Case], device: torch.device, folder: pathlib.Path, *, budget: float | None = None,
        seconds: float = 4.0, report: Callable = lambda event: None, command: list[str] | None = None,
        hang: float = HANG) -> list[str]:  # fmt: skip
    """Measure `cases` in their order; returns the names of those that the budget left out.

    report   called with every event: {"event": "begin" | "try" | "done" | "failed", "case": name, ...}
    """
    deadline = None if budget is None else time.monotonic() + budget
    pending = {c.name: c for c in cases}
    skip: dict[str, dict[str, str]] = {}
    while pending and (deadline is None or time.monotonic() < deadline):
        request = {"device": device.type, "names": list(pending), "folder": str(folder), "seconds": seconds,
                   "skip": skip, "left": None if deadline is None else deadline - time.monotonic()}  # fmt: skip
        last, why = _one_child(request, pending, deadline, report, command, hang)
        if why is None:
            break  # the child reached its end, or the budget did
        if last is None:
            raise RuntimeError(f"the benchmark process did not start: {why}")
        name, contender = last["case"], last.get("contender", "")
        failed, again = _blame(pending[name], device, contender, why, folder)
        if again:
            skip.setdefault(name, {})[contender] = why
        else:
            del pending[name]
        report({"event": "failed", "case": name, "contender": contender, "error": why, "records": failed})
    return list(pending)


def _blame(case: Case, device: torch.device, contender: str, why: str, folder) -> tuple[list[dict], bool]:
    """Records who brought the child down, and says whether the case is worth another child without that one."""
    known = contender in case.backends
    record = harness.failure(case, device, contender if known else "default", why)
    records.save(folder, rates.slug(device), case.family, [record])
    return [record], known or contender.startswith("peer ")


def _one_child(request, pending, deadline, report, command, hang) -> tuple[dict | None, str | None]:
    """Runs a child to its end: (the last thing that it began, why it ended early or None)."""
    command = command or [sys.executable, "-m", "scalekern.benchmarks.runner"]
    environment = {**os.environ, "SCALEKERN_STRICT": "1"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
    last = None
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        while True:
            left = hang if deadline is None else min(hang, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(left, 0.0))
            except queue.Empty:
                over = deadline is not None and time.monotonic() >= deadline
                return last, None if over else f"no sign of life for {hang:.0f} s"
            if line is None:
                code = child.wait()
                return last, None if code == 0 else last["error"] if last and "error" in last else _exit_reason(code)
            event = json.loads(line)
            if event["event"] == "done":
                pending.pop(event["case"], None)
                last = None
            else:
                last = {**(last or {}), **event}
            report(event)
    except BrokenPipeError:
        return last, _exit_reason(child.wait())
    finally:
        _end(child)


def _forward(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(child: subprocess.Popen) -> None:
    """The child's own children (end-to-end sides) are in its group."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()
    child.stdin.close()


def _exit_reason(code: int) -> str:
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"


def serve(request: dict, emit: Callable) -> int:
    """The child: measure the named cases one after the other, telling the parent what is about to happen."""
    device = torch.device(request["device"])
    folder = pathlib.Path(request["folder"])
    deadline = None if request["left"] is None else time.monotonic() + request["left"]
    cases = {c.name: c for c in case_module.select(device.type)}
    for name in request["names"]:
        if deadline is not None and time.monotonic() > deadline:
            break
        emit({"event": "begin", "case": name})
        found, sticky = attempt(
            cases[name], device, request["seconds"], deadline, request["skip"].get(name, {}),
            lambda contender, name=name: emit({"event": "try", "case": name, "contender": contender}),
        )  # fmt: skip
        if sticky:
            emit({"event": "try", "case": name, "contender": sticky.contender, "error": sticky.error})
            return STICKY_EXIT
        records.save(folder, rates.slug(device), cases[name].family, found)
        emit({"event": "done", "case": name, "records": found})
    return 0


def attempt(case, device, seconds, deadline, skip, announce) -> tuple[list[dict], harness.Sticky | None]:
    """The case's records; what goes wrong outside of any backend's turn is a failure of the case."""
    try:
        found = harness.measure(case, device, seconds=seconds, deadline=deadline, skip=skip, announce=announce)
    except harness.Sticky as sticky:
        return [], sticky
    except Exception as error:
        found = [harness.failure(case, device, "default", harness.one_line(error))]
    return found, None


def main() -> None:
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not mix with the events

    def emit(event: dict) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    sys.exit(serve(json.loads(sys.stdin.readline()), emit))


if __name__ == "__main__":
    main()
