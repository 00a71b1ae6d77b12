"""How a case is timed: checked first, then everybody in turn in one process, then one record for each backend.

What this adds to pytest-benchmark: nothing is timed that has not agreed with the float64 oracle; GPU times come from
events, behind a flushed L2 and a queue that is never empty; the backends and their rivals take turns, so that what
disturbs the machine disturbs them alike; and the limit that the device implies is measured in the same run.
"""

import contextlib
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

import scalekern
from scalekern import _dispatch
from scalekern.benchmarks import peers, rates, records
from scalekern.benchmarks.case import Case, Work

MIN_ROUNDS, MAX_ROUNDS = 3, 30
SHORT = 2e-2  # seconds of a run on a CPU up to which it is warmed up before each sample
PATIENCE = 8  # a contender so slow that MIN_ROUNDS would take this many times its share gets fewer, at least one


class WrongResult(AssertionError):
    """The kernel does not agree with the oracle; its speed is of no interest."""


class Clock:
    """pytest-benchmark reads this clock around a round; a round moves it by what the device took for our kernel."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


def run_in_pytest(case: Case, benchmark) -> None:
    """The body of every pytest-benchmark case; the records land in the folder of --records, when it is given."""
    import pytest

    device = torch.device(benchmark.scalekern["device"])
    rounds = lambda run, count: benchmark.pedantic(run, rounds=count)
    found = measure(case, device, seconds=benchmark.scalekern["seconds"], rounds=rounds)
    if benchmark.scalekern["folder"]:
        records.save(benchmark.scalekern["folder"], rates.slug(device), case.family, found)
    benchmark.extra_info["records"] = found
    failed = [f"{r['backend']}: {r['error']}" for r in found if r["status"] != "ok"]
    assert not failed, "; ".join(failed)
    if not found:
        pytest.skip("no backend runs this case here (`python -m scalekern doctor` says why)")


def plain_rounds(run: Callable, rounds: int) -> None:
    for _ in range(rounds):
        run()


def measure(case: Case, device: torch.device, *, seconds: float = 4.0, deadline: float | None = None,
            skip: dict[str, str] | None = None, announce: Callable = lambda backend: None,
            rounds: Callable = plain_rounds) -> list[dict]:  # fmt: skip
    """Run one case and return its records, one for each backend that can run it.

    seconds    time for the samples of each contender, roughly
    deadline   time.monotonic() after which no further round begins
    skip       backend -> why it must not be tried (it has brought down an earlier process)
    announce   called with the name of the backend that is about to run for the first time
    """
    if case.procedure is not None:
        return [_record(case, device, **fields) for fields in case.procedure(case, device, seconds, deadline)]
    with _clean(device):
        work = case.build(device)
        expected = work.oracle() if work.oracle else None
        contenders, found, hints = {}, {}, {}
        for backend in case.backends:
            fields = found[backend] = {"backend": backend}
            if skip and backend in skip:
                fields.update(status="failed", error=skip[backend])
                continue
            announce(backend)
            begin = time.perf_counter()
            try:
                fields["error_vs_oracle"] = check(work, backend, expected)
                hints[backend] = time.perf_counter() - begin
            except _dispatch.BackendError:
                del found[backend]  # not for this device or these arguments: `doctor` says why
            except Exception as error:  # a kernel may fail in any way, and the others still want their turn
                fields.update(status="failed", error=one_line(error))
                if is_sticky(error):
                    raise Sticky(backend, fields["error"]) from error
            else:
                contenders[backend] = under(backend, work.run)
        rivals, absent = _prepare_peers(work, expected, announce, skip or {})
        expected = None  # up to a tenth of a GPU's memory, which a rival may need
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not contenders:
            return [_record(case, device, **fields) for fields in found.values()]
        hints |= {name: rival["first"] for name, rival in rivals.items()}
        runs = {**contenders, **{name: rival["run"] for name, rival in rivals.items()}}
        samples, starved = _interleave(runs, set(rivals), hints, device, seconds, deadline, rounds)
        absent |= {name: "ran out of memory" for name in starved}
        for backend in contenders:
            if samples[backend]:
                found[backend] |= _timings(case, work, device, backend, samples, rivals, absent)
            else:
                found[backend] |= {"status": "failed", "error": "the time budget ended before the first sample"}
        return [_record(case, device, **fields) for fields in found.values()]


class Sticky(RuntimeError):
    """A CUDA error after which the process can do nothing more on the device."""

    def __init__(self, contender: str, error: str):
        super().__init__(error)
        self.contender, self.error = contender, error


def is_sticky(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def check(work: Work, backend: str, expected: tuple | None) -> float:
    with scalekern.backend(backend):
        got = as_tuple((work.sample or work.run)())
    if expected is None:
        return 0.0
    error = relative_error(got, expected)
    if not error <= work.tolerance:
        raise WrongResult(f"relative error {error:.2e} against the oracle, allowed {work.tolerance:.0e}")
    return error


def relative_error(got: tuple, expected: tuple) -> float:
    """The largest relative L2 error of any output; NaN and a missing output are as bad as it gets."""
    if len(got) != len(expected):
        return float("inf")
    errors = []
    for a, b in zip(got, expected):
        if a.shape != b.shape:
            return float("inf")
        wide = torch.complex128 if b.is_complex() else torch.float64
        norm = b.to(wide).norm()
        error = (a.to(wide) - b.to(wide)).norm() / norm if norm else a.to(wide).norm()
        errors.append(float(error) if torch.isfinite(error) else float("inf"))
    return max(errors, default=0.0)


def _prepare_peers(work: Work, expected: tuple | None, announce: Callable, skip: dict) -> tuple[dict, dict]:
    """({name: run, version, error}, {name: why it is not there}). A peer that fails costs its own line only."""
    ready, absent = {}, {}
    for name, make in work.peers.items():
        if f"peer {name}" in skip:
            absent[name] = f"failed: {skip[f'peer {name}']}"
            continue
        announce(f"peer {name}")
        try:
            peer = make()
            begin = time.perf_counter()
            out = peer.run()
            first = time.perf_counter() - begin
        except peers.Absent as reason:
            absent[name] = str(reason)
            continue
        except Exception as error:
            absent[name] = f"failed: {one_line(error)}"
            if is_sticky(error):
                raise Sticky(f"peer {name}", one_line(error)) from error
            continue
        error = None if out is None or expected is None else relative_error(as_tuple(out), expected)
        ready[name] = {"run": peer.run, "version": peer.version, "scale": peer.scale, "error": error,
                       "first": first}  # fmt: skip
    return ready, absent


def _interleave(runs: dict, rivals: set, hints: dict, device, seconds, deadline, rounds) -> tuple[dict, set]:
    """({name: seconds of each run}, rivals that ran out of memory): everybody samples in turn, the slow less often.

    hints   what the first run of each took, which on a CPU is enough to know of those that take long; on a GPU it may
            have been spent on compiling a kernel
    """
    samplers, wanted, starved = {}, {}, set()
    samples = {name: [] for name in runs}

    def attempt(name: str, action: Callable):
        try:
            return action()
        except torch.OutOfMemoryError:
            if name not in rivals:
                raise
        starved.add(name)
        samples[name].clear()
        torch.cuda.empty_cache()

    for name, run in runs.items():
        slow = device.type == "cpu" and hints.get(name, 0.0) > 1.0
        first = hints[name] if slow else attempt(name, lambda: _first(device, run))  # noqa: B023
        if first is not None:
            samplers[name] = _sampler(device, run, first)
            wanted[name] = _rounds(first, seconds)
    total = max(wanted.values())
    turn = itertools.count()
    main = next(iter(runs))

    def one_round():
        i = next(turn)
        for name in wanted:
            if name in starved or deadline is not None and time.monotonic() > deadline and samples[name]:
                continue
            if i * wanted[name] % total < wanted[name]:  # spread evenly, the first round included
                taken = attempt(name, samplers[name])
                samples[name] += [] if taken is None else [taken]
        clock.now += samples[main][-1] if samples[main] else 0.0

    rounds(one_round, total)
    return samples, starved


def _first(device: torch.device, run: Callable) -> float:
    """Host seconds of a run that has been warmed up by its check; of a short one on a CPU, of the third in a row."""
    for _ in range(3 if device.type == "cpu" else 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = max(time.perf_counter() - begin, 1e-9)
        if taken > SHORT:
            break
    return taken


def _rounds(first: float, seconds: float) -> int:
    least = min(MIN_ROUNDS, max(1, int(PATIENCE * seconds / first)))
    return max(least, min(MAX_ROUNDS, int(seconds / first)))


def _sampler(device: torch.device, run: Callable, first: float) -> Callable[[], float]:
    return _device_sampler(run) if device.type == "cuda" else _host_sampler(run, first)


def _host_sampler(run: Callable, first: float, least: float = 2e-3) -> Callable[[], float]:
    """Host time of a run; short ones are repeated within a sample, until it lasts `least` seconds.

    A short one runs as often before each sample: the caches, the allocator's pages and the sleeping threads that the
    contender before it left are that one's doing (a scan of 0.26 ms, called in a loop, took 0.9 in turns; 8.9 MB of
    weights that 100 MB of others' had pushed out come back into a L3 in three runs, 0.55 ms, 0.42 and then 0.33, and
    not in one: torch's int4 product 0.77, 0.67, 0.65).
    """
    repeats = math.ceil(least / first)

    def sample() -> float:
        for _ in range(repeats if first < SHORT else 0):
            run()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats

    return sample


def _device_sampler(run: Callable) -> Callable[[], float]:
    """Device time of a run with a cold L2. The device sleeps first, so that the launches are queued when it starts."""
    properties = torch.cuda.get_device_properties("cuda")
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    begin = time.perf_counter()
    run()
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    cycles = int(min(max(2 * queued, 2e-4), 2e-2) * 2e9)  # about 2 GHz; more than 20 ms of launches is the op's own

    def sample() -> float:
        flush.zero_()
        torch.cuda._sleep(cycles)
        return rates.elapsed(torch.device("cuda"), run)

    return sample


def _timings(case, work, device, backend, samples, rivals, absent) -> dict:
    """The fields of a record that come out of the samples."""
    measured = rates.rates(device)
    limit, bound = rates.limit(measured, work.bytes_moved, work.flops, work.exponentials)
    median = statistics.median(samples[backend])
    rows = [
        {"name": n, "version": r["version"], "median_us": _us(statistics.median(samples[n]) * r["scale"]),
         "ratio": _round(statistics.median(samples[n]) * r["scale"] / median), "error_vs_oracle": _round(r["error"]),
         "first_s": _round(r["first"])}
        for n, r in rivals.items() if samples[n]
    ]  # fmt: skip
    rows += [{"name": n, "absent": reason} for n, reason in absent.items()]
    return {
        "status": "ok",
        "median_us": _us(median), "p20_us": _us(quantile(samples[backend], 0.2)),
        "p80_us": _us(quantile(samples[backend], 0.8)), "samples": len(samples[backend]),
        "bytes_moved": work.bytes_moved, "flops": work.flops, "exponentials": work.exponentials,
        "limit_us": _us(limit), "limit_by": bound, "fraction_of_limit": _round(limit / median),
        "cache": "cold" if device.type == "cuda" else "warm", "rates": {k: _round(v) for k, v in measured.items()},
        "tolerance": work.tolerance, "peers": rows,
    }  # fmt: skip


def failure(case: Case, device: torch.device, backend: str, error: str) -> dict:
    return _record(case, device, backend=backend, status="failed", error=error)


def _record(case: Case, device: torch.device, *, backend: str, status: str = "ok", used=None, **fields) -> dict:
    used = [(op, backend) for op in case.ops] if used is None and backend != "default" else used or []
    fields = {k: _round(v) if isinstance(v, float) else v for k, v in fields.items()}
    return {
        "case": case.name, "ops": list(case.ops), "direction": case.direction, "backend": backend, "status": status,
        "shape": case.shape, "targets": case.targets, "priority": case.priority, **fields,
        "digests": records.digests(used),
        "versions": rates.versions(device), "device": rates.device_name(device), "device_kind": device.type,
        "threads": rates.threads(device), "date": records.today(),
    }  # fmt: skip


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def under(backend: str, run: Callable) -> Callable:
    """run with that backend; not by `with scalekern.backend`, whose 20 us between others' runs its rivals do not have."""

    def forced():
        token = _dispatch.force(backend)
        try:
            return run()
        finally:
            token.var.reset(token)

    return forced


def as_tuple(out) -> tuple:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def _us(seconds: float) -> float:
    return _round(seconds * 1e6)


def _round(value: float | None, digits: int = 4) -> float | None:
    """Four significant digits: the fifth is noise, and would be noise in every diff."""
    return None if value is None else float(f"{value:.{digits}g}")


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


@contextlib.contextmanager
def _clean(device: torch.device) -> Iterator[None]:
    """One case leaves the next one its memory, and a garbage collection never falls into a sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
