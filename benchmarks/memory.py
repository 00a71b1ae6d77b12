"""Peak memory of a selective scan, a long convolution or a layer for images, beyond its inputs, in a fresh process.

On the CPU it is the process's high-water mark of resident memory (reset just before the call), which sees scratch
buffers of native code that no allocator of torch counts; on a GPU, torch's peak. The promise (a record's `bound`):
of a scan forward, its outputs and checkpoints, and backward, twice its inputs; of a convolution, a third of what the
plain one by torch.fft takes; of a layer, five times what a quarter of the tokens take
(which short-lived tensors meet at the peak changes with their sizes: of GroupMamba's gradients, each four times the
tokens take 4.0, 4.3 and 3.2 times the memory).
"""

import argparse
import functools
import gc
import json
import math
import os
import pathlib
import subprocess
import sys

import torch

from scalekern.benchmarks.case import Case

# Layer -> the op that does its work.
LAYERS = {
    **dict.fromkeys(("bimamba", "ss2d", "group_mamba", "serpent"), "selective_scan"), "hsm_ssd": "depthwise_conv2d",
}  # fmt: skip
RESOLUTION = 2**20  # the kernel counts resident pages in batches for each thread


def case(direction: str, device: str, priority: int, shape: dict) -> Case:
    ops = ("selective_scan_fwd",) if direction == "fwd" else ("selective_scan_bwd",)
    return _case("scan", direction, ops, device, priority, shape, lambda d: _measure(direction, d, shape))


def conv_case(direction: str, device: str, priority: int, shape: dict) -> Case:
    """direction: "fwd", or "bwd" for forward and backward."""
    ops = ("fft_conv_fwd",) if direction == "fwd" else ("fft_conv_bwd", "fft_conv_fwd")
    return _case("fft_conv", direction, ops, device, priority, shape, lambda d: _against_plain(direction, d, shape))


def layer_case(what: str, direction: str, device: str, priority: int, shape: dict) -> Case:
    """what: one of LAYERS, of shape B, M, L; direction: "fwd", or "bwd" for forward and backward."""
    op = LAYERS[what]
    ops = (f"{op}_fwd",) if direction == "fwd" else (f"{op}_bwd", f"{op}_fwd")
    return _case(what, direction, ops, device, priority, shape, lambda d: _linear(what, direction, d, shape))


def _case(what, direction, ops, device, priority, shape, measure) -> Case:
    sizes = "_".join(f"{k.lower()}{v}" for k, v in shape.items())
    return Case(
        f"{what}_{direction}_memory_{sizes}_fp32", ops, "memory", (device,), priority, {**shape, "dtype": "fp32"}, None,
        procedure=lambda case, device, seconds, deadline: [measure(device)], targets={"promised bound": 1.0},
    )  # fmt: skip


def _measure(direction: str, device: torch.device, shape: dict) -> dict:
    return _judged(_peak_of("scan", direction, device, shape))


def _against_plain(direction: str, device: torch.device, shape: dict) -> dict:
    ours, plain = (_peak_of(what, direction, device, shape) for what in ("fft_conv", "plain_fft_conv"))
    failed = next((found for found in (ours, plain) if "status" in found), None)
    return failed or _judged({**ours, "bound_bytes": plain["peak_extra_bytes"] // 3})


def _linear(what: str, direction: str, device: torch.device, shape: dict) -> dict:
    whole, part = (_peak_of(what, direction, device, {**shape, "L": L}) for L in (shape["L"], shape["L"] // 4))
    failed = next((found for found in (whole, part) if "status" in found), None)
    # The quarter's resolution is not multiplied: both peaks are tens of megabytes or more.
    return failed or _judged({**whole, "bound_bytes": 5 * part["peak_extra_bytes"] + RESOLUTION})


def _judged(found: dict) -> dict:
    if "status" in found:
        return found
    rows = [{"name": "promised bound", "ratio": found["bound_bytes"] / max(found["peak_extra_bytes"], 1)}]
    return {**found, "backend": "default", "peers": rows}


def _peak_of(what: str, direction: str, device: torch.device, shape: dict) -> dict:
    command = [sys.executable, "-m", "scalekern.benchmarks.memory", what, direction, device.type, json.dumps(shape)]
    # Freed blocks go back to the system at once, so that the mark shows what was alive and not what was kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"backend": "default", "status": "failed", "error": lines[-1][:300] if lines else "no output"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scan", "fft_conv", "plain_fft_conv", *LAYERS))
    parser.add_argument("direction", choices=("fwd", "bwd"))
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("shape", type=json.loads)
    args = parser.parse_args()
    from scalekern.benchmarks.trace import backends_used

    device = torch.device(args.device)
    layer, conv = (functools.partial(f, args.what) for f in (_layer, _conv))
    setup = _scan if args.what == "scan" else layer if args.what in LAYERS else conv
    check = _check if args.what == "scan" else _check_layer if args.what in LAYERS else _check_conv
    check = check if args.what == "scan" else functools.partial(check, setup)
    small = {**args.shape, "D": 64, "L": 144}
    check(args.direction, device, small)  # starts libraries and threads, too
    with backends_used() as used:
        setup(args.direction, device, small)[1]()
    tensors, call = setup(args.direction, device, args.shape)
    inputs = sum(t.numel() * t.element_size() for t in tensors)
    gc.collect()
    before = _reset(device)
    outputs = call()
    extra = _peak(device) - before
    produced = sum(t.numel() * t.element_size() for t in outputs)
    bound = (produced if args.direction == "fwd" else 2 * inputs) + (RESOLUTION if device.type == "cpu" else 0)
    wanted = [pair for pair in used if pair[0].endswith(args.direction)]
    print(json.dumps({"peak_extra_bytes": extra, "bound_bytes": bound, "inputs_bytes": inputs,
                      "outputs_bytes": produced, "used": wanted}))  # fmt: skip


def _scan(direction: str, device: torch.device, shape: dict):
    from scalekern.benchmarks.bench_selective_scan import scan_inputs

    kw = scan_inputs(device, torch.float32, **shape)
    return [t for t in kw.values() if isinstance(t, torch.Tensor)], _call(kw, direction)


def _conv(what: str, direction: str, device: torch.device, shape: dict):
    """(u, k) and the call, which gives (out,) or (du, dk)."""
    import scalekern
    from scalekern import reference
    from scalekern.benchmarks.bench_fft_conv import plain_fft_conv
    from scalekern.benchmarks.bench_selective_scan import normal

    oracle = functools.partial(reference.fft_conv, method="fft")
    function = {"fft_conv": scalekern.fft_conv, "plain_fft_conv": plain_fft_conv, "oracle": oracle}[what]
    B, D, L = (shape[letter] for letter in "BDL")
    randn = normal(device, 0)
    u, k, dout = randn(B, D, L), randn(D, L), randn(B, D, L)
    if direction == "fwd":
        return (u, k), lambda: (function(u, k),)
    u.requires_grad_(), k.requires_grad_()
    return (u, k), lambda: torch.autograd.grad(function(u, k), (u, k), dout)


def _layer(what: str, direction: str, device: torch.device, shape: dict):
    """(u,) and the call, which gives (out,) or the gradients of u and every parameter; an image is a square."""
    from scalekern import nn
    from scalekern.benchmarks.bench_selective_scan import normal

    torch.manual_seed(0)
    B, M, L, randn = shape["B"], shape["M"], shape["L"], normal(device, 0)
    side = math.isqrt(L)
    made = {"bimamba": nn.BiMamba, "ss2d": nn.SS2D, "group_mamba": nn.GroupMamba, "serpent": nn.SerpentBlock,
            "hsm_ssd": functools.partial(nn.HSMSSD, state_dim=49)}  # fmt: skip
    module = made[what](M, device=device)
    size = {"bimamba": (B, L, M), "ss2d": (B, side, side, M)}.get(what, (B, M, side, side))
    function = (lambda u: module(u)[0]) if what == "hsm_ssd" else module
    u, dout = randn(*size), randn(*size)
    if direction == "fwd":
        return (u,), lambda: (torch.no_grad()(function)(u),)
    named = module.named_parameters()
    # Gradients of terms that cancel: 0, or 1e-3 of its terms.
    vanishing = {("hsm_ssd", "A"), ("group_mamba", "skip_scale")}
    leaves = [u.requires_grad_(), *(p for n, p in named if (what, n) not in vanishing)]
    return (u,), lambda: torch.autograd.grad(function(u), leaves, dout)


def _call(kw: dict, direction: str):
    """The call to be measured, ready to run: forward with checkpoints, or backward."""
    lead = [kw[k] for k in ("u", "delta", "A")]
    matrices = [kw[k][:, None] for k in ("B", "C")]
    args = (*lead, *matrices, *(kw[k] for k in ("D", "z", "delta_bias")), None, None)
    ops = torch.ops.scalekern
    if direction == "fwd":
        return lambda: ops.selective_scan_fwd(*args, True, False, True)
    _, _, checkpoints = ops.selective_scan_fwd(*args, True, False, True)
    dout = torch.ones_like(kw["u"])
    return lambda: ops.selective_scan_bwd(dout, None, *args, checkpoints, True, False)


def _check(direction: str, device: torch.device, shape: dict) -> None:
    """A kernel that is wrong may use no memory at all; its peak says nothing."""
    from scalekern.benchmarks import harness, oracles
    from scalekern.benchmarks.bench_selective_scan import gradient_tolerance, scan_inputs

    kw = scan_inputs(device, torch.float32, **shape)
    _, (out, *grads) = oracles.scan_bwd(kw, torch.ones_like(kw["u"]))
    got = _call(kw, direction)()
    expected = (out,) if direction == "fwd" else tuple(grads)
    got = tuple(g.reshape(e.shape) for g, e in zip(got, expected))
    error = harness.relative_error(got, expected)
    if not error <= gradient_tolerance("selective_scan", torch.float32):
        raise SystemExit(f"the result is wrong: relative error {error:.1e}")


def _check_conv(setup, direction: str, device: torch.device, shape: dict) -> None:
    from scalekern.benchmarks import harness

    found, expected = (make(direction, device, shape)[1]() for make in (setup, functools.partial(_conv, "oracle")))
    error = harness.relative_error(found, expected)
    if not error <= 1e-5:
        raise SystemExit(f"the result is wrong: relative error {error:.1e}")


def _check_layer(setup, direction: str, device: torch.device, shape: dict) -> None:
    """Against the module on the reference backend."""
    import scalekern
    from scalekern.benchmarks import harness

    found = setup(direction, device, shape)[1]()
    with scalekern.backend("reference"):
        expected = setup(direction, device, shape)[1]()
    error = harness.relative_error(found, expected)
    if not error <= 1e-5:
        raise SystemExit(f"the result is wrong: relative error {error:.1e}")


def _reset(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise SystemExit(f"the peak of resident memory cannot be reset here: {error}") from None
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
