"""`make gpu`: everything that needs a GPU, in order, each part within its time, nothing downloaded.

    python -m benchmarks.gpu_suite --out DIR [--budget 480] [--tests 300] [--sanitizer 180] [--due]

Leaves in DIR: doctor.json, tests.txt, sanitizer.txt, <device>/<family>.json (a record after each case), summary.json.
A part whose tool is missing is skipped with the reason; a part that fails does not stop the next one. Compiling takes
most of the time: with pytest-xdist the tests run in a process a core, and the benchmarks' kernels are compiled so.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
UNUSABLE = ("Device not supported", "Unable to find injection", "not supported on this")  # the tool's own refusals


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/gpu"))
    parser.add_argument("--budget", type=float, default=480, help="seconds for the benchmarks")
    parser.add_argument("--tests", type=float, default=300, help="seconds for the tests (0: leave them out)")
    parser.add_argument("--sanitizer", type=float, default=180, help="seconds for compute-sanitizer (0: leave it out)")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes that compile")
    parser.add_argument("--due", action="store_true", help="measure only what the records in the checkout lack")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here; nothing was run")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"doctor": doctor, "tests": tests, "sanitizer": sanitizer, "bench": bench}
    summary = {}
    for name, part in parts.items():
        begin = time.monotonic()
        outcome = part(args)
        summary[name] = {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1)}
        print(f"gpu: {name}: {outcome} ({summary[name]['seconds']} s)", flush=True)
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if all(s["outcome"].startswith(("passed", "skipped")) for s in summary.values()) else 1


def doctor(args) -> str:
    return call([sys.executable, "-m", "scalekern", "doctor", "--json"], args.out / "doctor.json", 120)


def tests(args) -> str:
    if not args.tests:
        return "skipped: left out"
    if importlib.util.find_spec("pytest") is None:
        return "skipped: pytest is not installed"
    options = ("-q", "-rs", "-m", "gpu", "tests", "-p", "no:cacheprovider", "-p", "gpu_order")
    command = [sys.executable, "-m", "pytest", *options]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))}
    if args.jobs > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(args.jobs), "--maxschedchunk", "4"]  # small chunks: the order holds
        environment["OMP_NUM_THREADS"] = "1"
    seconds = max(args.tests - 30, args.tests / 2)  # then what is not reached is skipped, and the rest is reported
    log = args.out / "tests.txt"
    outcome = call(command, log, args.tests, SCALEKERN_TEST_SECONDS=str(seconds), **environment)
    late = unreached(log.read_text(errors="replace"))
    return f"{outcome}; {late} tests were not reached, --tests SECONDS gives them time" if late else outcome


def unreached(log: str) -> int:
    """Tests that gpu_order skipped for want of time."""
    return sum(int(count) for count in re.findall(r"SKIPPED \[(\d+)\] .*: the time was up", log))


def sanitizer(args) -> str:
    """memcheck over the doctor's self-checks: every op and backend on its smallest samples."""
    if not args.sanitizer:
        return "skipped: left out"
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not pathlib.Path(tool).exists():
        return "skipped: compute-sanitizer is not installed"
    log = args.out / "sanitizer.txt"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "scalekern", "doctor"]
    # Without the caching allocator an access past a tensor is an access past an allocation.
    outcome = call(command, log, args.sanitizer, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = log.read_text(errors="replace")
    return f"skipped: {tool} cannot run here" if any(u in text for u in UNUSABLE) else outcome


def bench(args) -> str:
    command = [sys.executable, "-m", "scalekern", "bench", "--device", "cuda"]
    command += ["--budget", str(args.budget), "--out", str(args.out.resolve()), "--jobs", str(args.jobs)]
    command += ["--due"] * args.due
    return call(command, None, args.budget + 60)


def call(command: list[str], log: pathlib.Path | None, seconds: float, **environment) -> str:
    """Runs a command within a time; its output goes to `log`, or to the terminal."""
    out = open(log, "w") if log else None
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "SCALEKERN_STRICT": "1", **environment}
    try:
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT if out else None, timeout=seconds, cwd=ROOT, env=environment
        ).returncode
    except subprocess.TimeoutExpired:
        return f"failed: not done within {seconds:.0f} s"
    finally:
        if out:
            out.close()
    if code and log:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
    return "passed" if code == 0 else f"failed: exit status {code}"


if __name__ == "__main__":
    sys.exit(main())
