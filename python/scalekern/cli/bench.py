"""`python -m scalekern bench`: measure, or say what has been measured."""

import json
import pathlib
import time

from scalekern.cli import console

STYLES = {"measured": "green", "ok": "green", "stale": "yellow", "never": "dim", "failed": "bold red"}


def add_arguments(parser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop within this time (default: no limit)")
    parser.add_argument("--seconds", type=float, default=2.0, help="sampling time of each contender of a case")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of the records")
    parser.add_argument("--family", help="one family only, e.g. selective_scan")
    parser.add_argument("--case", metavar="PATTERN", help="only the cases whose name contains this")
    parser.add_argument("--due", action="store_true", help="only what no record here shows as it is now")
    parser.add_argument("--jobs", type=int, default=1, help="compile for a GPU in so many processes before measuring")
    parser.add_argument("--list", action="store_true", help="name the cases and measure nothing")
    parser.add_argument("--status", action="store_true", help="what is measured, stale or never measured")
    parser.add_argument("--json", action="store_true", help="with --status or --list: JSON")


def main(args) -> int:
    from scalekern.benchmarks import records

    folder = args.out or records.default_folder()
    if args.status:
        return status(folder, args.json)
    import torch

    from scalekern.benchmarks import case, runner, warm
    from scalekern.cli import doctor

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = case.select(device.type, args.family, args.case)
    if args.due:
        cases = records.due(cases, records.default_folder(), device.type)
    if args.list:
        return list_cases(cases, args.json)
    if not cases:
        wanted = f"has {args.case!r} in its name and family {args.family or 'any'}"
        print(f"bench: no case for {device.type} {wanted}" + (", and no record as it is now" if args.due else ""))
        return 0 if args.due else 1
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: torch sees no CUDA device here; --device cpu measures the CPU kernels")
        return 1
    if device.type == "cpu" and (level := doctor.unoptimized()):
        print(f"bench: the {level} kernels were built without optimization; build with SCALEKERN_BUILD_FOR_THIS_CPU=0")
        return 1
    progress = Progress(len(cases))
    end = None if args.budget is None else time.monotonic() + args.budget
    try:
        if args.jobs > 1 and device.type == "cuda":
            warm.warm(cases, args.jobs, 600.0 if end is None else args.budget / 4)
        budget = None if end is None else end - time.monotonic()
        left = runner.run(cases, device, folder, budget=budget, seconds=args.seconds, report=progress)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {folder}")
        return 130
    progress.finish(folder, left)
    return 1 if progress.failed else 0


class Progress:
    """One line when a case is done: everybody's median, and the ratios to the first backend's."""

    def __init__(self, total: int):
        self.total, self.done, self.failed, self.begun = total, 0, 0, time.monotonic()

    def __call__(self, event: dict) -> None:
        if event["event"] not in ("done", "failed"):
            return
        self.done += event["event"] == "done"
        stamp = f"[{time.monotonic() - self.begun:4.0f} s, {self.done}/{self.total}]"
        found = event["records"]
        if not found:
            print(f"{stamp} {event['case']}: no backend runs it here", flush=True)
        for record in found:
            print(f"{stamp} {event['case']} {describe(record)}", flush=True)
            self.failed += record["status"] != "ok"

    def finish(self, folder, left: list[str]) -> None:
        if left:
            print(f"the budget ended before {len(left)} cases: {', '.join(left)}")
        print(f"records: {folder}" + (f"; {self.failed} failures" if self.failed else ""))


def describe(record: dict) -> str:
    if record["status"] != "ok":
        return f"{record['backend']}: FAILED {record['error']}"
    if record["direction"] == "memory":
        return f"peak {console.size(record['peak_extra_bytes'])}, promised {console.size(record['bound_bytes'])}"
    text = f"{record['backend']}: {console.duration(record['median_us'])}"
    if "fraction_of_limit" in record:
        text += f", {100 * record['fraction_of_limit']:.3g} % of the {record['limit_by']} limit"
    ratios = [f"{p['ratio']:.3g}x {p['name']}" for p in record["peers"] if "ratio" in p]
    return text + (f"; {', '.join(ratios)}" if ratios else "")


def status(folder: pathlib.Path, as_json: bool) -> int:
    from scalekern.benchmarks import records

    rows = records.status(folder)
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    kind = {"cpu": "CPU", "cuda": "GPU"}
    cells = [[r["op"], r["backend"], kind[r["device"]], r["status"], ", ".join(r["on"]), r["date"] or ""] for r in rows]
    console.table("What has been measured", ["op", "backend", "device", "status", "on", "last"], cells, STYLES)
    return 0


def list_cases(cases, as_json: bool) -> int:
    if as_json:
        fields = ("name", "family", "direction", "ops", "shape", "targets")
        rows = [{"case" if f == "name" else f: getattr(c, f) for f in fields} for c in cases]
        print(json.dumps(rows, indent=1))
        return 0
    rows = [[c.name, c.direction, ", ".join(f"{k} {v:g}" if v else k for k, v in c.targets.items())] for c in cases]
    console.table("Cases, most important first", ["case", "direction", "targets"], rows)
    return 0
