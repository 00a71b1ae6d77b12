"""Block sizes: defaults computed from shapes, better ones read from JSON, new ones measured only when asked.

A config is a dict of a kernel's block sizes and num_warps. For a (kernel, key) the user's own file wins over the one
shipped for this GPU in configs/, which wins over the default. Nothing is ever timed at import or by a call;
`python -m scalekern tune` calls `tune`.

File format, one file a GPU, `<device>.json`: {"<kernel>": {"<key>": {"BLOCK_D": 32, "num_warps": 1}}}.
"""

import functools
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable

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


def config(kernel: str, key: str, device: torch.device, default: dict) -> dict:
    """The config of a launch: `default`, updated by what was tuned for this key on this GPU."""
    if device.type != "cuda":
        return default
    return {**default, **_tunings(device, _env.cache_dir()).get(kernel, {}).get(key, {})}


def grid(**choices: Iterable) -> list[dict]:
    """Every combination of the choices, as configs."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def tune(kernel: str, key: str, device: torch.device, candidates: list[dict], run: Callable[[dict], None]) -> dict:
    """Time run(config) for each candidate, record the fastest in the user's file, return {config json: ms}.

    A candidate that does not compile or does not fit on the device is left out.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = {}
    for candidate in candidates:
        try:
            run(candidate)
            times[json.dumps(candidate)] = do_bench(lambda: run(candidate), return_mode="median")  # noqa: B023
        except (OutOfResources, CompilationError):
            continue
    if not times:
        raise RuntimeError(f"tune: no config of {kernel} runs on {device} ({len(candidates)} were tried)")
    best = json.loads(min(times, key=times.get))
    path = _user_file(device_slug(torch.cuda.get_device_name(device)))
    path.parent.mkdir(parents=True, exist_ok=True)
    record = _read(path)
    record.setdefault(kernel, {})[key] = best
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".new") as new:
        json.dump(record, new, indent=1, sort_keys=True)
    os.replace(new.name, path)
    _tunings.cache_clear()
    return times
