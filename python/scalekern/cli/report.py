"""`python -m scalekern report`: the README's tables and figures, written from the records and from asking the ops.

The README shows the lines that have a goal or failed; <records>/<device>/README.md, beside the records, shows all.
Nothing in them is typed by hand: what is between <!-- results:begin --> and <!-- results:end -->, and between
<!-- support:begin --> and <!-- support:end -->, is replaced. The same records and sources give the same text.
"""

import functools
import math
import os
import pathlib
import re

from scalekern.cli import console, fastest

SECTIONS = ("support", "results")


def add_arguments(parser) -> None:
    parser.add_argument("--readme", type=pathlib.Path, help="file to write (default: README.md of the checkout)")
    parser.add_argument("--records", type=pathlib.Path, metavar="DIR", help="folder of the records")


def main(args) -> int:
    from scalekern.benchmarks import records

    folder = args.records or records.default_folder()
    readme = args.readme or records.default_folder().parent.parent / "README.md"
    if not readme.exists():
        print(f"report: {readme} does not exist (--readme FILE)")
        return 1
    text = readme.read_text()
    missing = [f"<!-- {s}:{end} -->" for s in SECTIONS for end in ("begin", "end") if f"<!-- {s}:{end} -->" not in text]
    if missing:
        print(f"report: {readme} has no {', '.join(missing)}; put the marks where the tables belong")
        return 1
    rows = described(records.load_all(folder))
    figures = draw(rows, folder)
    text = replace(text, "support", support())
    text = replace(text, "results", results(rows, records.status(folder), figures, folder, readme.parent))
    records.write_atomically(readme, text)
    for slug, mine in devices(rows).items():
        records.write_atomically(folder / slug / PAGE, page(mine, [p for p in figures if p.parent.name == slug]))
    if args.records is None:
        fastest.write(rows)
    print(f"{readme}: {len(rows)} records, {len(figures)} figures, {sum(r['stale'] for r in rows)} stale")
    return 0


def replace(text: str, section: str, content: str) -> str:
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content.strip()}\n{end}", text, flags=re.S)


def described(found: list[dict]) -> list[dict]:
    """The records in reading order (GPUs first, then by importance), each with `stale` and `what` it is."""
    from scalekern.benchmarks import records

    rows = [{**r, "stale": records.is_stale(r), "what": what(r)} for r in found]
    return sorted(rows, key=lambda r: (r["device_kind"] == "cpu", r["slug"], r["family"], r["priority"], r["key"]))


OWN = {"qmm", "dwconv2d", "mixer", "step"}  # words of the cases' names that stand for their op


def what(record: dict) -> str:
    if record["direction"] == "end-to-end":
        return record["case"].partition("_mamba_")[0] + " Mamba " + record["case"].split("_")[2]
    public = record["ops"][0].removesuffix("_fwd").removesuffix("_bwd")
    direction = {"step": "", "memory": " peak memory, " + record["ops"][0].rpartition("_")[2]}
    subject = re.split("_(?:fwd|bwd|step|memory)", record["case"])[0]  # a layer, or the op
    dtype = f"_{record['shape'].get('dtype')}"
    form = record["case"].partition(dtype)[2].replace("_", " ").split()  # that the shape does not tell, as w4g128
    layer = [] if all(w in public or w in OWN for w in re.split("[ _]", subject)) else [f"{subject.replace('_', ' ')}:"]
    return " ".join([*layer, public + direction.get(record["direction"], f" {record['direction']}"), *form])


def draw(rows: list[dict], folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        from scalekern.benchmarks import plot
    except ImportError:
        return []
    found = []
    for slug in dict.fromkeys(r["slug"] for r in rows):
        for family in dict.fromkeys(r["family"] for r in rows if r["slug"] == slug):
            mine = [r for r in rows if (r["slug"], r["family"]) == (slug, family)]
            path = folder / slug / f"{family}.png"
            try:
                if plot.figure(mine, f"{family} on {mine[0]['device']}", path):
                    found.append(path)
            except ImportError:
                print("report: no figures without matplotlib (pip install 'scalekern[bench]')")
                return found
    return found


# ---- results -----------------------------------------------------------------------------------------------------


PAGE = "README.md"


def devices(rows: list[dict]) -> dict[str, list[dict]]:
    found = {}
    for r in rows:
        found.setdefault(r["slug"], []).append(r)
    return found


def results(
    rows: list[dict], status: list[dict], figures: list[pathlib.Path], folder: pathlib.Path, base: pathlib.Path
) -> str:
    parts = []
    for slug, mine in devices(rows).items():
        shown = [r for r in mine if r["targets"] or r["status"] != "ok"]
        parts.append(f"### {device_line(mine)}")
        parts.append(table(shown) if shown else "")
        parts.append(f"All {len(mine)} records: [{slug}]({os.path.relpath(folder / slug / PAGE, base)}).")
        drawn = images([p for p in figures if p.parent.name == slug], base)
        parts.append(f"<details><summary>Figures</summary>\n\n{drawn}\n\n</details>" if drawn else "")
    if rows:
        parts.append(LEGEND)
    for kind, name in (("cuda", "GPU"), ("cpu", "CPU")):
        parts.append(open_points([s for s in status if s["device"] == kind and s["backend"] != "reference"], name))
    return "\n\n".join(p for p in parts if p)


def page(rows: list[dict], figures: list[pathlib.Path]) -> str:
    """All of a device, for the folder of its records."""
    head = "Written by `python -m scalekern report` from the records beside this file."
    drawn = images(figures, figures[0].parent) if figures else ""
    parts = [f"# {device_line(rows)}", head, table(rows), absent(rows), drawn, LEGEND]
    return "\n\n".join(p for p in parts if p) + "\n"


def images(figures: list[pathlib.Path], base: pathlib.Path) -> str:
    return "\n\n".join(f"![{p.stem} on {p.parent.name}]({os.path.relpath(p, base)})" for p in figures)


LEGEND = (
    "Median of the runs, all contenders of a line taking turns in one process. The limit is what the bytes, the "
    "arithmetic and the exponentials of the case need at the copy bandwidth, fp32 matrix rate and exp rate measured in "
    "the same run; in brackets which of the three it is. `goal` is what the project promises, `stale` a line whose "
    "kernel has changed since it was measured. On a CPU only the ratios mean something."
)


def device_line(rows: list[dict]) -> str:
    newest = max(rows, key=lambda r: r["date"])
    threads = f", {newest['threads']} threads" if newest["threads"] else ""
    named = ", ".join(f"{k} {v}" for k, v in newest["versions"].items() if v)
    return f"{newest['device']}{threads}\n\n{named}; measured until {newest['date']}."


def table(rows: list[dict]) -> str:
    lines = header("case", "backend", "median", "of the limit", "times faster than", "goal", "error")
    plain = {r["case"]: r for r in rows if r["backend"] == "reference" and r["status"] == "ok"}
    for r in rows:
        if r["backend"] == "reference":
            continue
        name = f"{r['what']} {shape(r)}" + (" **stale**" if r["stale"] else "")
        if r["status"] != "ok":
            lines.append(f"| {name} | {r['backend']} | **failed**: {cell(r['error'])} | | | | |")
            continue
        ratios = [f"{number(p['ratio'])}x {p['name']}{compiled(p)}" for p in r["peers"] if "ratio" in p]
        if r["case"] in plain and "median_us" in r:
            ratios.append(f"{number(plain[r['case']]['median_us'] / r['median_us'])}x the reference")
        lines.append(line(name, backend_name(r), amount(r), fraction(r), ", ".join(ratios), goals(r), error(r)))
    return "\n".join(lines)


def compiled(peer: dict) -> str:
    """What a rival's first call took, where it was no call like the others."""
    first = peer.get("first_s") or 0
    return f" (its first call {number(first)} s)" if first > max(1, 20e-6 * peer.get("median_us", 0)) else ""


def header(*names: str) -> list[str]:
    return [line(*names), "|" + "---|" * len(names)]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def absent(rows: list[dict]) -> str:
    """The rivals that a case names and that did not take part, with the reasons."""
    found = {f"{p['name']} ({p['absent']})": None for r in rows for p in r.get("peers", []) if "absent" in p}
    return f"Not compared with: {cell(', '.join(found))}." if found else ""


def backend_name(r: dict) -> str:
    if r["backend"] != "default":
        return r["backend"]
    return ", ".join(sorted({name.partition("/")[2] for name in r["digests"]})) or "default"


def shape(r: dict) -> str:
    return " ".join(f"{k}{v}" if len(k) == 1 else f"{k} {v}" if k != "dtype" else v for k, v in r["shape"].items())


def amount(r: dict) -> str:
    if r["direction"] == "memory":
        return f"{console.size(r['peak_extra_bytes'])} of {console.size(r['bound_bytes'])}"
    return console.duration(r["median_us"]) + (f" ({r['per']})" if "per" in r else "")


def fraction(r: dict) -> str:
    return f"{100 * r['fraction_of_limit']:.3g} % ({r['limit_by']})" if "fraction_of_limit" in r else ""


def goals(r: dict) -> str:
    """Each promise of the case, and whether this record keeps it; silent where the rival was absent."""
    reached = {p["name"]: p["ratio"] for p in r["peers"] if "ratio" in p}
    if "fraction_of_limit" in r:
        reached["limit"] = r["fraction_of_limit"]
        reached["elements/s"] = math.prod(r["shape"].get(k, 1) for k in "BDL") / (r["median_us"] * 1e-6)
    found = []
    for name, goal in r["targets"].items():
        kept = "not measured" if name not in reached else "yes" if reached[name] >= goal else "**no**"
        found.append(f"{number(goal)}{' ' if name == 'elements/s' else 'x '}{name}: {kept}")
    return ", ".join(found)


def error(r: dict) -> str:
    return f"{r['error_vs_oracle']:.1e}" if "error_vs_oracle" in r else ""


def number(value: float) -> str:
    return f"{value:.0f}" if 100 <= value < 1e5 else f"{value:.3g}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def open_points(status: list[dict], name: str) -> str:
    """What a reader must not take for measured."""
    lines = []
    for state, words in (("never", "never measured"), ("stale", "changed since measured"), ("failed", "failed")):
        mine = [f"{s['op']} ({s['backend']})" for s in status if s["status"] == state]
        if mine:
            lines.append(f"- {words} on a {name}: {', '.join(mine)}")
    return "\n".join(lines)


# ---- support -----------------------------------------------------------------------------------------------------


def support() -> str:
    """op x dtype x device x backend x gradient. What can run here has run; the rest was asked by its arguments."""
    from scalekern import _library, testing
    from scalekern.cli import selfcheck

    lines = header("op", "device", "backend", "dtypes", "gradient", "not served", "checked here")
    for op in testing.specs():
        spec = testing.specs()[op]
        registered = next(o for o in _library.OPS.values() if o.public == (spec.through or op))
        for backend in sorted({b.name for b in registered.backends}, key=BACKENDS.index):
            device = "CPU" if backend == "cpu" else "GPU" if backend in ("cuda", "triton") else "any"
            probe = ran if device != "GPU" else asked
            served, gradient, refused = probe(op, backend, selfcheck, testing)
            here = "yes" if probe is ran and served else "no"
            none = "none (in place)" if spec.inplace else "none (inference)" if spec.inference else None
            grad = (none or ("yes" if gradient else "no")) if served else ""
            lines.append(line(op, device, backend, ", ".join(served), grad, cell(refused), here))
    return "\n".join(lines)


BACKENDS = ("cuda", "triton", "cpu", "reference")


def ran(op, backend, selfcheck, testing) -> tuple[list[str], bool, str]:
    """(dtypes that pass on CPU tensors, whether gradients came and were right, what is not served)."""
    served, gradient, refused = [], True, {}
    for dtype in selfcheck.DTYPES:
        outcomes = [selfcheck.check(op, sample, backend, "cpu", dtype) for sample in testing.samples(op)]
        if any(o.status == "failed" for o in outcomes):
            bad = next(o for o in outcomes if o.status == "failed")
            refused[f"{short(dtype)} fails: {bad.sample}: {bad.reason}"] = None
            continue
        fine = [o for o in outcomes if o.status == "ok"]
        if fine:
            served.append(short(dtype))
            gradient = gradient and all(o.gradient_error is not None for o in fine)
        refused |= {o.reason: None for o in outcomes if o.status == "unsupported"}
    return served, gradient, "; ".join(refused)


def asked(op, backend, selfcheck, testing) -> tuple[list[str], bool, str]:
    """The same from `supports` alone, for backends whose device is not here."""
    from scalekern import _library
    from scalekern.benchmarks import sources

    @functools.cache
    def kernels(name):
        entries = [b for b in _library.OPS[name].backends if b.name == backend]
        return [b for b in entries if sources.files(b) or not sources.CSRC.exists()]

    served, gradient, refused = [], False, {}
    for dtype in selfcheck.DTYPES:
        reasons = []
        for sample in testing.samples(op):
            for name, args in selfcheck.captured(op, sample, dtype):
                answers = [entry.supports(*args) for entry in kernels(name)]
                reason = None if None in answers else next(iter(answers), "no kernel yet")
                reasons.append(reason)
                gradient = gradient or (name.endswith("_bwd") and reason is None)
        if None in reasons:
            served.append(short(dtype))
        refused |= {r: None for r in reasons if r}
    return served, gradient, "; ".join(refused)


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
