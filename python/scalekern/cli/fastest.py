"""Which GPU backend goes first for a call's size: fastest.json beside _dispatch.py, from the records."""

import json
import math

from scalekern import _dispatch


def table(rows: list[dict]) -> dict:
    """{device: {op: {log2 of the elements of its first argument: backend}}} from the records that hold today.

    Only records of one registered op compare its backends; those of `reference` and of a whole model do not.
    """
    best: dict[tuple[str, str, int], dict] = {}
    for r in rows:
        usable = r["device_kind"] == "cuda" and r["status"] == "ok" and not r["stale"] and len(r["ops"]) == 1
        if not usable or r["backend"] not in ("cuda", "triton") or r["direction"] not in ("fwd", "bwd", "step"):
            continue
        place = (r["device"], r["ops"][0], first_argument(r).bit_length())
        if place not in best or r["median_us"] < best[place]["median_us"]:
            best[place] = r
    found: dict = {}
    for (device, op, size), r in sorted(best.items()):
        found.setdefault(device, {}).setdefault(op, {})[str(size)] = r["backend"]
    return found


def first_argument(record: dict) -> int:
    """Elements of the op's first argument: the sequence, M tokens of K numbers of a product, or a step's state (W - 1
    tokens of a convolution)."""
    shape = record["shape"]
    if record["direction"] == "step":
        return shape["B"] * shape["D"] * (shape["N"] if "N" in shape else shape["W"] - 1)
    return math.prod(shape.get(k, 1) for k in ("MK" if shape.keys().isdisjoint("BDL") else "BDL"))


def write(rows: list[dict]) -> None:
    """Nothing is written, and nothing stays, where no GPU was measured: the ops' own order holds then."""
    from scalekern.benchmarks import records

    found = table(rows)
    if found:
        records.write_atomically(_dispatch.FASTEST, json.dumps(found, indent=1) + "\n")
    else:
        _dispatch.FASTEST.unlink(missing_ok=True)
