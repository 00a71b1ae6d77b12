"""What the device can do, measured in the run that uses it: copy bandwidth, fp32 matrix rate, exponentials a second."""

import math
import pathlib
import platform
import re
import sys
import time

import torch

from scalekern import _native

PIECES = (2**15, 2**16, 2**17, 2**18)
_rates: dict[str, dict] = {}


def rates(device: torch.device) -> dict:
    """{"copy_bytes_per_s", "matmul_flops_per_s", "exp_per_s"}, measured once a process and device kind.

    The matrix rate is fp32 without TF32: the rate of the FMA pipes, which is what the arithmetic of a scan can use.
    A rate that cannot be measured here is None, and the limit leaves it out.
    """
    if device.type not in _rates:
        _rates[device.type] = {
            "copy_bytes_per_s": _copy(device),
            "matmul_flops_per_s": _matmul(device),
            "exp_per_s": _exp_cuda() if device.type == "cuda" else _exp_cpu(),
        }
    return _rates[device.type]


def limit(rates: dict, bytes_moved: int, flops: int, exponentials: int) -> tuple[float, str]:
    """(seconds, which of the three binds): no kernel that does this work once can be faster than the slowest part."""
    parts = {
        "memory": bytes_moved / rates["copy_bytes_per_s"],
        "arithmetic": flops / rates["matmul_flops_per_s"],
        "exp": exponentials / rates["exp_per_s"] if rates["exp_per_s"] else 0.0,
    }
    name = max(parts, key=parts.get)
    return parts[name], name


def best_of(device: torch.device, run, seconds: float = 0.3) -> float:
    """The shortest of several runs: a rate is what the device can do, not what it did while somebody else ran."""
    run()
    best, stop = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < stop or best == math.inf:
        best = min(best, elapsed(device, run))
    return best


def elapsed(device: torch.device, run) -> float:
    """Seconds of one run: between two events on a GPU, on the host's clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _copy(device: torch.device) -> float:
    size = 2**30 if device.type == "cuda" else 2**28  # far past the caches that one core can fill
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / best_of(device, lambda: target.copy_(source))


def _matmul(device: torch.device) -> float:
    n = 4096 if device.type == "cuda" else 1024
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        a, b = (torch.randn(n, n, device=device) for _ in range(2))
        return 2 * n**3 / best_of(device, lambda: a @ b)
    finally:
        torch.set_float32_matmul_precision(precision)


def _exp_cpu() -> float:
    """torch.exp in pieces that stay in a core's cache, with the piece size that serves it best."""
    return max(8 * n / best_of(torch.device("cpu"), exp_pieces(n, 8), 0.2) for n in PIECES)


def exp_pieces(piece: int, count: int):
    """`count` calls of torch.exp on one cache-sized piece: the yardstick for what exponentials alone cost."""
    source, target = torch.linspace(-1, 0, piece), torch.empty(piece)

    def run():
        for _ in range(count):
            torch.exp(source, out=target)

    return run


def _exp_cuda() -> float | None:
    """exp2 from register to register, which torch.exp (bound by memory on a GPU) cannot show."""
    try:
        from scalekern.benchmarks.rates_triton import exp_rate
    except ImportError:
        return None
    return exp_rate()


def threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"model name\s*: (.*)", text)
    return model[1] if model else platform.machine()


def slug(device: torch.device) -> str:
    """Folder of the device's records: nvidia-h200, or cpu-avx512-2t (what the kernels use, and how many threads)."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"cpu-{_native.cpu_isa() or platform.machine().lower()}-{torch.get_num_threads()}t"


def versions(device: torch.device) -> dict[str, str | None]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
