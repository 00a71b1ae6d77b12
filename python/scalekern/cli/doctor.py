"""`python -m scalekern doctor`: what is here, what runs where and why, whether it is right, and why it may be slow."""

import json
import os
import pathlib
import platform
import shutil
import subprocess

import torch

import scalekern
from scalekern import _dispatch, _env, _native, testing
from scalekern.cli import console, selfcheck

STYLES = {"ok": "green", "failed": "bold red", "unsupported": "dim"}


def add_arguments(parser) -> None:
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def main(args) -> int:
    found = examine()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0 if found["ok"] else 1


def examine() -> dict:
    checks = self_checks()
    ops = [row for device in ("cpu", "cuda") for row in selfcheck.explain(device)]
    return {
        "versions": versions(),
        "build": build(),
        "gpus": gpus(),
        "ops": ops,
        "checks": checks,
        "hints": hints() + fallbacks(ops),
        "ok": all(c["status"] != "failed" for c in checks),
    }


def versions() -> dict[str, str | None]:
    return {
        "scalekern": scalekern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's cuda": torch.version.cuda,
        "triton": _triton(),
        "nvcc": _tool(["nvcc", "--version"], "release"),
        "gpu driver": _tool(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], ""),
    }


def build() -> dict:
    """What setup.py recorded (lib/build.json), and what this process makes of it."""
    path = pathlib.Path(scalekern.__file__).parent / "lib" / "build.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    loads = {kind: _native.load(kind) for kind in ("cpu", "cuda")}
    return {
        **recorded, "cpu_isa_in_use": _native.cpu_isa(), "threads": torch.get_num_threads(),
        "not_loaded": {kind: reason for kind, reason in loads.items() if reason},
    }  # fmt: skip


def unoptimized() -> str | None:
    """The level of this process's CPU kernels, if it was only built to be tested (SCALEKERN_BUILD_FOR_THIS_CPU)."""
    built = build()
    isa = built["cpu_isa_in_use"]
    level = "avx512" if isa in ("vnni", "bf16", "amx") else isa  # those are instructions inside that level's kernels
    return level if level in built.get("cpu", {}).get("unoptimized", ()) else None


def gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def self_checks() -> list[dict]:
    """One row for each public op, device and backend: the worst error over the op's samples in float32."""
    rows = []
    for op in testing.specs():
        for device in selfcheck.devices():
            for backend in selfcheck.runnable(device):
                rows.append(_self_check(op, device, backend))
    return rows


def _self_check(op: str, device: str, backend: str) -> dict:
    outcomes = [selfcheck.check(op, sample, backend, device) for sample in testing.samples(op)]
    failed = [o for o in outcomes if o.status == "failed"]
    ran = [o for o in outcomes if o.status == "ok"]
    status = "failed" if failed else "ok" if ran else "unsupported"
    first = (failed or [o for o in outcomes if o.status == "unsupported"] or [None])[0]
    return {
        "op": op, "device": device, "backend": backend, "status": status,
        "samples": len(ran), "of": len(outcomes),
        "error": max((o.error for o in ran), default=None),
        "gradient_error": max((o.gradient_error for o in ran if o.gradient_error is not None), default=None),
        "reason": f"{first.sample}: {first.reason}" if first else "",
    }  # fmt: skip


def hints() -> list[str]:
    """What makes it slow or strange here, each with what to do about it."""
    found = []
    if _env.backend():
        found.append(f"SCALEKERN_BACKEND={_env.backend()} forces every call onto one backend; unset it")
    if _env.strict():
        found.append("SCALEKERN_STRICT=1: a call on a GPU that only the reference can run is an error")
    if _env.triton_interpret():
        found.append("TRITON_INTERPRET=1: Triton kernels run through the interpreter, thousands of times slower")
    if _env.cpu_isa():
        found.append(f"SCALEKERN_CPU_ISA={_env.cpu_isa()} caps the instruction set of the CPU kernels")
    if reason := _native.load("cpu"):
        found.append(f"CPU calls run the slow reference: {reason}")
    if level := unoptimized():
        found.append(
            f"the {level} kernels were built without optimization: build with SCALEKERN_BUILD_FOR_THIS_CPU=0, or here"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() == 1 and cores > 1:
        found.append(f"torch uses 1 thread of {cores} cores (OMP_NUM_THREADS, torch.set_num_threads)")
    if torch.get_num_threads() > cores:
        found.append(f"torch uses {torch.get_num_threads()} threads on {cores} cores, which then wait for each other")
    if _version(torch.__version__) < (2, 10):
        found.append(f"torch {torch.__version__} is older than 2.10, which the native libraries need")
    return found + _gpu_hints()


def fallbacks(ops: list[dict]) -> list[str]:
    slow = [r["op"] for r in ops if r["device"] == "cpu" and r["runs"] == "reference"]
    return [f"the slow reference runs on the CPU: {', '.join(slow)}"] if slow and not _native.load("cpu") else []


def _gpu_hints() -> list[str]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            return [f"nvidia-smi is here, but torch {torch.__version__} sees no GPU (a CPU build, or no driver)"]
        return []
    found = []
    if _dispatch.unavailable("triton", "cuda"):
        found.append("GPU calls cannot use the Triton kernels: triton is not installed (pip install triton)")
    if reason := _native.load("cuda"):
        found.append(f"GPU calls cannot use the CUDA kernels: {reason}")
    return found


def show(found: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in found["versions"].items() if value))
    print(f"GPUs: {', '.join(found['gpus']) or 'none that torch sees'}")
    for line in _build_lines(found["build"]):
        print(line)
    print()
    rows = [
        [r["op"], _device_label(r["device"], found["gpus"]), r["runs"] or "nothing",
         "; ".join(f"{n}: {why}" for n, why in r["others"].items())]
        for r in found["ops"]
    ]  # fmt: skip
    console.table("What runs each op, and why not the others", ["op", "device", "runs", "the others"], rows)
    print()
    rows = [
        [c["op"], c["device"], c["backend"], c["status"], f"{c['samples']}/{c['of']}", _error(c["error"]),
         _error(c["gradient_error"]), c["reason"]]
        for c in found["checks"]
    ]  # fmt: skip
    columns = ["op", "device", "backend", "self-check", "samples", "error", "gradient error", ""]
    console.table("Against the float64 oracle, in float32", columns, rows, STYLES)
    print()
    for hint in found["hints"]:
        print(f"hint: {hint}")
    print("all self-checks pass" if found["ok"] else "SELF-CHECKS FAILED")


def _device_label(device: str, gpus: list[str]) -> str:
    return "cpu" if device == "cpu" else "cuda" if gpus else "cuda (if there were one)"


def _build_lines(info: dict) -> list[str]:
    lines = [f"built: {', '.join(info.get('built', [])) or 'nothing native'}"]
    if "cpu" in info:
        lines.append(f"CPU kernels for {', '.join(info['cpu']['isa'])} ({info['cpu']['compiler']}); "
                     f"in use: {info['cpu_isa_in_use']}, {info['threads']} threads")  # fmt: skip
    if "cuda" in info:
        lines.append(f"CUDA kernels for {info['cuda']['archs']} ({info['cuda']['compiler']})")
    lines += [f"skipped {kind}: {reason}" for kind, reason in info.get("skipped", {}).items()]
    return lines + [f"not loaded, {kind}: {reason}" for kind, reason in info["not_loaded"].items()]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _triton() -> str | None:
    try:
        import triton

        return triton.__version__
    except ImportError:
        return None


def _tool(command: list[str], marker: str) -> str | None:
    """The line of a tool's output that holds `marker`; None without the tool, or when it has nothing to say."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    lines = [line.strip() for line in done.stdout.splitlines() if marker in line]
    return lines[0] if lines and done.returncode == 0 else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:2] if part.isdigit())
