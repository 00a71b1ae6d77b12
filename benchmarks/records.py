"""Records: results/<device>/<family>.json, merged by key and written atomically after each case; and their status.

A record carries the digest of the sources of what it measured, so that a later change of them shows.
"""

import datetime
import functools
import json
import os
import pathlib

from scalekern import _library
from scalekern.benchmarks import sources

SCHEMA = 1


def default_folder() -> pathlib.Path:
    """benchmarks/results of a checkout; elsewhere (an installed wheel) a folder where one works."""
    here = pathlib.Path(__file__).resolve().parent
    return here / "results" if (here.parent / "setup.py").exists() else pathlib.Path("scalekern-results")


def key(record: dict) -> str:
    return "/".join((record["case"], record["direction"], record["backend"]))


def load(path: pathlib.Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected records of schema {SCHEMA}, got {data.get('schema')!r}")
    return data["records"]


def save(folder: pathlib.Path, slug: str, family: str, new: list[dict]) -> pathlib.Path:
    """Merge `new` into the family's file. A failure takes the place of an older success: it is the latest word."""
    path = pathlib.Path(folder) / slug / f"{family}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**load(path), **{key(r): r for r in new}}
    write_atomically(path, json.dumps({"schema": SCHEMA, "records": merged}, indent=1, sort_keys=True) + "\n")
    return path


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def load_all(folder: pathlib.Path) -> list[dict]:
    """Every record below `folder`, in a fixed order, each with the `family` and the `slug` that it lies under."""
    found = []
    for path in sorted(pathlib.Path(folder).glob("*/*.json")):
        for name, record in sorted(load(path).items()):
            found.append({**record, "key": name, "family": path.stem, "slug": path.parent.name})
    return found


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


@functools.cache
def digest(op: str, backend: str) -> str | None:
    """Digest of the sources behind one registered op on one backend; None where they are not at hand."""
    for entry in _library.OPS[op].backends:
        if entry.name == backend:
            return sources.digest(entry)
    return None


def digests(used: list[tuple[str, str]]) -> dict[str, str | None]:
    """{"op/backend": digest} of what a case ran."""
    return {f"{op}/{backend}": digest(op, backend) for op, backend in used}


def is_stale(record: dict) -> bool:
    """Whether a source of what was measured has changed since, or is gone; sources that are not here cannot tell."""
    for name, then in record["digests"].items():
        op, _, backend = name.partition("/")
        if op not in _library.OPS:
            return True
        now = digest(op, backend)
        if now is not None and now != then:
            return True
    return False


def combinations() -> list[tuple[str, str, str]]:
    """(op, backend, device kind) of everything that can be measured. The interpreter's speed is nobody's concern."""
    kinds = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",), "reference": ("cpu", "cuda")}
    found = ((op, b.name, kind) for op, o in _library.OPS.items() for b in o.backends for kind in kinds[b.name])
    return list(dict.fromkeys(found))  # what a kernel leaves to torch's ops has an entry of its own under its name


def status(folder: pathlib.Path) -> list[dict]:
    """For every op x backend x device kind: measured, stale, failed or never, and on which devices."""
    rows = []
    found = [r for r in load_all(folder) if r["direction"] not in ("memory", "end-to-end")]
    for op, backend, kind in combinations():
        mine = [r for r in found if r["device_kind"] == kind and f"{op}/{backend}" in r["digests"]]
        good = [r for r in mine if r["status"] == "ok"]
        fresh = [r for r in good if not is_stale(r)]
        state = "measured" if fresh else "stale" if good else "failed" if mine else "never"
        devices = sorted({r["slug"] for r in fresh or good or mine})
        date = max((r["date"] for r in fresh or good or mine), default=None)
        rows.append({"op": op, "backend": backend, "device": kind, "status": state, "on": devices, "date": date})
    return rows


def due(cases: list, folder: pathlib.Path, kind: str) -> list:
    """The cases with a backend that can be measured on this kind of device and that no record shows as it is now."""
    can = set(combinations())
    fresh = {
        (r["case"], name) for r in load_all(folder)
        if r["device_kind"] == kind and r["status"] == "ok" and not is_stale(r) for name in r["digests"]
    }  # fmt: skip
    shown = {name for name, _ in fresh}  # of memory and of whole models a record has no backend
    pairs = lambda c: [(op, b) for op in c.ops for b in c.backends if (op, b, kind) in can and b != "reference"]
    lacks = lambda c: any((c.name, f"{op}/{b}") not in fresh for op, b in pairs(c))
    return [c for c in cases if (lacks(c) if c.build else c.name not in shown)]
