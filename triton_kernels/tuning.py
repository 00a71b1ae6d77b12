"""Block sizes: defaults computed from shapes, better ones read from JSON, new ones measured only when asked.

A config is a dict of a kernel's block sizes and num_warps. For a (kernel, key) the user's own file wins over the one
shipped for this GPU in configs/, which wins over the default; none is shipped so far, since nothing has been measured.
Nothing is ever timed at import or by a call: `tune` is for `python -m scalekern tune`.

File format, one file a GPU, `<device>.json`: {"<kernel>": {"<key>": {"BLOCK_D": 32, "num_warps": 1}}}.
"""

import contextvars
import functools
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable

import torch

from .. import _env

SHIPPED = pathlib.Path(__file__).parent / "configs"


def device_slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _user_file(slug: str) -> pathlib.Path:
    return pathlib.Path(_env.cache_dir()) / "triton" / f"{slug}.json"


def _read(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # no file, or one that somebody else broke: the defaults work
        return {}


@functools.cache
def _tunings(device: torch.device, cache_dir: str) -> dict:
    slug = device_slug(torch.cuda.get_device_name(device))
    merged = _read(SHIPPED / f"{slug}.json")
    for kernel, entries in _read(_user_file(slug)).items():
        merged[kernel] = {**merged.get(kernel, {}), **entries}
    return merged


_trial: contextvars.ContextVar[tuple[str, dict, set] | None] = contextvars.ContextVar("scalekern_trial", default=None)


def config(kernel: str, key: str, device: torch.device, default: dict) -> dict:
    """The config of a launch: `default`, updated by what was tuned for this key on this GPU."""
    trial = _trial.get()
    if trial is not None and trial[0] == kernel:
        trial[2].add(key)
        return {**default, **trial[1]}
    if device.type != "cuda":
        return default
    return {**default, **_tunings(device, _env.cache_dir()).get(kernel, {}).get(key, {})}


def _grid(**choices: tuple) -> list[dict]:
    """Every combination of the choices, as configs."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


_CONV = [c for c in _grid(BLOCK_D=(1, 2, 4, 8, 16, 32, 64), BLOCK_L=(16, 32, 64, 128, 256, 512), num_warps=(2, 4, 8))
         if 512 <= c["BLOCK_D"] * c["BLOCK_L"] <= 4096]  # fmt: skip
_TILES = _grid(BLOCK_Q=(32, 64, 128), BLOCK_K=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))
CANDIDATES = {
    "selective_scan_fwd": _grid(BLOCK_D=(16, 32, 64, 128), T=(1, 2, 4, 8), num_warps=(1, 2, 4)),
    "selective_scan_bwd": _grid(BLOCK_D=(16, 32, 64, 128), T=(1, 2, 4), num_warps=(1, 2, 4, 8)),
    "selective_state_update": _grid(BLOCK_P=(8, 16, 32, 64, 128, 256), num_warps=(1, 2, 4, 8)),
    "causal_conv1d_fwd": _CONV,
    "causal_conv1d_bwd": _CONV,
    "causal_conv1d_update": _grid(BLOCK_D=(32, 64, 128, 256), num_warps=(1, 2, 4)),
    "sparse_attention_decode": _grid(BLOCK_N=(32, 64, 128), CHUNK=(128, 256, 512), num_warps=(2, 4, 8)),
    "fft_conv_fwd": _grid(R=(1, 2, 4, 8), num_warps=(4, 8, 16)),
    "fft_conv_bwd": _grid(R=(1, 2, 4, 8), num_warps=(4, 8, 16)),
    "sparse_attention_fwd": [c for c in _TILES if c["BLOCK_Q"] >= 64],
    "sparse_attention_dq": [c for c in _TILES if c["BLOCK_Q"] >= 64],
    "sparse_attention_dkv": [c for c in _TILES if c["BLOCK_K"] >= 64],
    "sparse_attention_dbias": [c for c in _TILES if c["num_stages"] == 1],
    "toeplitz_conv_fwd": _grid(T=(16, 32, 64, 128), R=(32, 64, 128, 256), num_warps=(4, 8)),
    "toeplitz_conv_bwd": _grid(T=(16, 32, 64), R=(32, 64, 128), num_warps=(4, 8)),
    "quant_matmul_fwd": [
        c for c in _grid(BLOCK_M=(16, 32, 64, 128), BLOCK_N=(64, 128), COLUMNS=(64, 128, 256), num_warps=(4, 8),
                         num_stages=(3, 4, 5)) if c["BLOCK_M"] * c["BLOCK_N"] <= 2048 * c["num_warps"]
    ],
    "quant_matmul_gemv": [c for c in _grid(BLOCK_U=(32, 64, 128, 256), BLOCK_N=(8, 16, 32, 64), STEPS=(1, 2, 4, 8),
                                           num_warps=(2, 4, 8)) if 512 <= c["BLOCK_U"] * c["BLOCK_N"] <= 4096],
    "quant_matmul_bwd": _grid(BLOCK_M=(64, 128), BLOCK_N=(32, 64), BLOCK_K=(64, 128), num_warps=(4, 8)),
    **{kernel: _grid(Q=(32, 64, 128), BLOCK_P=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))
       for kernel in ("ssd_scan_fwd", "ssd_scan_states", "ssd_scan_bwd", "ssd_scan_matrices")},
    "powers_sum": _grid(F=(32, 64, 128), Q=(32, 64, 128), BLOCK_N=(8, 16), num_warps=(4, 8)),
    "moments": _grid(F=(32, 64, 128), Q=(16, 32, 64), BLOCK_N=(8, 16), num_warps=(4, 8)),
}


def tune(
    kernel: str, call: Callable[[], object], device: torch.device, *, candidates: list[dict] | None = None,
    time_ms: Callable[[Callable], float] | None = None,
) -> tuple[str, list[tuple[dict, float]]]:  # fmt: skip
    """Time `call()`, which launches `kernel`, under each candidate and record the fastest in the user's file.

    Returns (the key, [(config, milliseconds), ...] fastest first). A candidate that does not compile or does not fit
    on the device is left out. time_ms defaults to the median of triton.testing.do_bench.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    time_ms = time_ms or functools.partial(do_bench, return_mode="median")
    keys, times = set(), []
    for candidate in CANDIDATES[kernel] if candidates is None else candidates:
        token = _trial.set((kernel, candidate, keys))
        try:
            times.append((candidate, time_ms(call)))
        except (OutOfResources, CompilationError):
            pass
        finally:
            _trial.reset(token)
    if not times or len(keys) != 1:
        raise RuntimeError(f"tune: {len(times)} configs of {kernel} ran on {device}, {len(keys)} of its keys came up")
    times.sort(key=lambda entry: entry[1])
    _store(_user_file(device_slug(torch.cuda.get_device_name(device))), kernel, *keys, times[0][0])
    _tunings.cache_clear()
    return *keys, times


def _store(path: pathlib.Path, kernel: str, key: str, best: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = _read(path)
    record.setdefault(kernel, {})[key] = best
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".new") as new:
        json.dump(record, new, indent=1, sort_keys=True)
    os.replace(new.name, path)
