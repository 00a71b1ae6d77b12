"""A transformers Mamba end to end, with scalekern.compat.install() and without: prefill and greedy decoding.

transformers binds its kernels when it is imported, so each side lives in a process of its own; both are loaded and
warmed up, and then take turns, one run each.
"""

import argparse
import importlib.util
import json
import select
import statistics
import subprocess
import sys
import time

import torch

from scalekern.benchmarks import peers
from scalekern.benchmarks.case import Case

OPS = {
    "prefill": ("selective_scan_fwd", "causal_conv1d_fwd"),
    "decode": ("mamba_update",),
}
START_TIMEOUT, RUN_TIMEOUT = 180, 120
RIVAL = "transformers alone"


def case(mode: str, device: str, priority: int, *, layers: int, width: int, length: int, target: float | None = None):
    shape = {"layers": layers, "width": width, "length": length, "dtype": "fp32" if device == "cpu" else "bf16"}
    return Case(
        f"transformers_mamba_{mode}_{layers}x{width}_l{length}", OPS[mode], "end-to-end", (device,), priority, shape,
        None, procedure=lambda case, device, seconds, deadline: [_measure(mode, case, device, seconds, deadline)],
        targets={RIVAL: target} if target else {},
    )  # fmt: skip


class Side:
    """One of the two processes."""

    def __init__(self, mode: str, device: torch.device, shape: dict, compat: bool):
        command = [sys.executable, "-m", "scalekern.benchmarks.hf", mode, device.type, json.dumps(shape)]
        self.process = subprocess.Popen(
            command + (["--compat"] if compat else []), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, timeout: float) -> dict:
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError("the process ended early" if ready else f"no answer in {timeout:.0f} s")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def run(self) -> float:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read(RUN_TIMEOUT)["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _measure(mode: str, case: Case, device: torch.device, seconds: float, deadline: float | None) -> dict:
    sides = []
    try:
        sides = [Side(mode, device, case.shape, compat) for compat in (True, False)]
        ours, theirs = (side.read(START_TIMEOUT) for side in sides)
        error = _compare(ours, theirs, case.shape["dtype"])
        times = [[], []]
        end = time.monotonic() + 2 * seconds
        while len(times[0]) < 30:
            for side, taken in zip(sides, times):
                taken.append(side.run())
            now = time.monotonic()
            if len(times[0]) >= 3 and now > end or deadline is not None and now > deadline:
                break
    except RuntimeError as problem:
        return {"backend": "default", "status": "failed", "error": str(problem)[:300]}
    finally:
        for side in sides:
            side.close()
    from scalekern.benchmarks.harness import quantile

    median, rival = (statistics.median(t) for t in times)
    row = {"name": RIVAL, "version": theirs["version"], "median_us": rival * 1e6, "ratio": rival / median}
    return {
        "backend": "default", "median_us": median * 1e6, "p20_us": quantile(times[0], 0.2) * 1e6,
        "p80_us": quantile(times[0], 0.8) * 1e6, "samples": len(times[0]), "error_vs_oracle": error,
        "per": "prefill" if mode == "prefill" else f"{case.shape['length']} tokens", "used": ours["used"],
        "peers": [row],
    }  # fmt: skip


def _compare(ours: dict, theirs: dict, dtype: str) -> float:
    """Logits must agree, in fp32 the greedy tokens too; and only one of the sides may have run on scalekern."""
    if not ours["used"] or theirs["used"]:
        raise RuntimeError(f"scalekern ops that ran: with the shim {ours['used']}, without {theirs['used']}")
    a, b = (torch.tensor(side["logits"], dtype=torch.float64) for side in (ours, theirs))
    error = float((a - b).norm() / b.norm())
    if not error <= {"fp32": 1e-4, "bf16": 5e-2}[dtype]:  # a whole model's roundings, not one op's
        raise RuntimeError(f"logits differ by {error:.2e}")
    if dtype == "fp32" and ours["tokens"] != theirs["tokens"]:
        raise RuntimeError("greedy tokens differ")
    return error


def worker(mode: str, device: torch.device, shape: dict, compat: bool) -> None:
    try:
        run, first = _prepare(mode, device, shape, compat)
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps(first), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


def _prepare(mode: str, device: torch.device, shape: dict, compat: bool):
    if compat:
        from scalekern import compat as shims

        shims.install(force=True)  # the packages themselves, where they are installed, are the other side's
    import transformers

    from scalekern.benchmarks.trace import backends_used

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=1024, hidden_size=shape["width"], num_hidden_layers=shape["layers"], pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    dtype = torch.float32 if shape["dtype"] == "fp32" else torch.bfloat16
    model = transformers.MambaForCausalLM(config).eval().to(device, dtype)
    ids = torch.randint(1, 1024, (1, shape["length"] if mode == "prefill" else 16)).to(device)

    @torch.no_grad()
    def prefill():
        return model(ids, use_cache=True).logits

    @torch.no_grad()
    def decode():
        return model.generate(ids, max_new_tokens=shape["length"], do_sample=False)

    run = prefill if mode == "prefill" else decode
    with backends_used() as used:
        result = run()
        logits = result if mode == "prefill" else prefill()
    run()
    packages = ["transformers", *(p for p in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(p))]
    tokens = [] if mode == "prefill" else result[0].tolist()
    first = {"logits": logits[0, -1].float().tolist(), "tokens": tokens, "used": used,
             "version": ", ".join(f"{p} {peers.version(p)}" for p in packages)}  # fmt: skip
    return run, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=tuple(OPS))
    parser.add_argument("device", type=torch.device)
    parser.add_argument("shape", type=json.loads)
    parser.add_argument("--compat", action="store_true")
    args = parser.parse_args()
    worker(args.mode, args.device, args.shape, args.compat)


if __name__ == "__main__":
    main()
