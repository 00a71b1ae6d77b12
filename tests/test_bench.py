"""The benchmark harness: it refuses what is wrong, keeps what it measured, knows what is stale, stays in its budget."""

import ast
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern import _dispatch, _library
from scalekern.benchmarks import case as case_module
from scalekern.benchmarks import harness, hf, memory, peers, rates, records, runner, sources, warm
from scalekern.benchmarks.case import Case, Work

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, not the benchmarks")
CPU = torch.device("cpu")
RATES = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11, "exp_per_s": 1e9}


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    monkeypatch.setitem(rates._rates, "cpu", RATES)


def toy(run, *, backends=("reference",), rivals=None, name="toy"):
    """A case whose right answer is 2 x."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def build(device):
        work = Work(lambda: run(x), lambda: (2 * x.double(),), 1e-5, bytes_moved=8000, flops=1000, exponentials=10)
        work.peers = rivals or {}
        return work

    return Case(name, ("causal_conv1d_fwd",), "fwd", ("cpu",), 1, {"L": 1000}, build, backends=backends, family="toys")


def measure(case, **options):
    return harness.measure(case, CPU, **{"seconds": 0.005, **options})


def test_a_record_holds_what_a_claim_needs():
    def absent():
        raise peers.Absent("not installed")

    rivals = {
        "slow": lambda: peers.Peer(lambda: (time.sleep(0.01), torch.zeros(3))[1:], "1.0"),
        "gone": absent,
        "broken": lambda: peers.Peer(lambda: 1 / 0, "1.0"),
    }
    (record,) = measure(toy(lambda x: 2 * x, rivals=rivals))
    assert record["status"] == "ok" and record["error_vs_oracle"] < 1e-6
    assert 0 < record["p20_us"] <= record["median_us"] <= record["p80_us"]
    assert record["samples"] >= harness.MIN_ROUNDS
    assert (record["bytes_moved"], record["flops"], record["exponentials"]) == (8000, 1000, 10)
    assert record["limit_us"] == pytest.approx(0.8) and record["limit_by"] == "memory"
    assert record["fraction_of_limit"] == pytest.approx(0.8 / record["median_us"], rel=1e-2)
    slow, gone, broken = (next(p for p in record["peers"] if p["name"] == n) for n in rivals)
    assert slow["ratio"] == pytest.approx(slow["median_us"] / record["median_us"], rel=1e-2) and slow["ratio"] > 1
    assert slow["error_vs_oracle"] == float("inf")  # a rival that computes something else is seen
    assert slow["first_s"] > 0
    assert gone["absent"] == "not installed" and "ZeroDivisionError" in broken["absent"]
    for name in ("case", "ops", "direction", "backend", "shape", "versions", "device", "threads", "date", "digests"):
        assert name in record
    assert set(record["versions"]) == {"python", "torch", "triton", "cuda"}
    assert record["digests"]["causal_conv1d_fwd/reference"] == records.digest("causal_conv1d_fwd", "reference")


@pytest.mark.parametrize(
    "wrong", [torch.zeros_like, lambda x: 2.001 * x, lambda x: 2 * x[:-1], lambda x: x / 0, lambda x: (x, x)]
)
def test_what_is_wrong_is_never_timed(wrong):
    calls = []
    (record,) = measure(toy(lambda x: (calls.append(1), wrong(x))[1]))
    assert record["status"] == "failed" and "WrongResult" in record["error"]
    assert "median_us" not in record and len(calls) == 1


def test_one_failing_backend_does_not_stop_the_other():
    def run(x):
        if _dispatch.forced() == "cpu":
            raise RuntimeError("boom")
        return 2 * x

    found = {r["backend"]: r for r in measure(toy(run, backends=("cpu", "reference")))}
    assert found["cpu"]["error"] == "RuntimeError: boom" and found["reference"]["status"] == "ok"
    found = {r["backend"]: r for r in measure(toy(run, backends=("cpu", "reference")), skip={"cpu": "it crashed"})}
    assert found["cpu"]["error"] == "it crashed" and found["reference"]["status"] == "ok"


def test_a_backend_that_cannot_run_a_case_leaves_no_record():
    def run(x):
        if _dispatch.forced() == "cpu":
            raise scalekern.BackendError("not for these arguments")
        return 2 * x

    assert [r["backend"] for r in measure(toy(run, backends=("cpu", "reference")))] == ["reference"]


def test_a_cuda_error_ends_the_process_and_not_only_the_backend():
    def run(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(harness.Sticky) as caught:
        measure(toy(run))
    assert caught.value.contender == "reference"


def test_rounds_end_at_the_deadline():
    slow = lambda x: (time.sleep(0.02), 2 * x)[1]
    begin = time.monotonic()
    (record,) = measure(toy(slow), seconds=60.0, deadline=time.monotonic() + 0.2)
    assert time.monotonic() - begin < 20 and record["samples"] < 30  # 20 s of 60: a busy machine stalls for seconds


def test_samples_follow_the_wanted_numbers():
    fast, slow = (lambda: None), (lambda: time.sleep(0.01))
    samples, _ = harness._interleave({"a": fast, "b": slow}, set(), {}, CPU, 0.05, None, harness.plain_rounds)
    assert len(samples["a"]) == harness.MAX_ROUNDS and harness.MIN_ROUNDS <= len(samples["b"]) < 10


def test_a_rival_that_runs_out_of_memory_loses_its_line_only():
    calls = itertools.count()

    def greedy():  # the check and the first run still fit
        if next(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return torch.zeros(3)

    (record,) = measure(toy(lambda x: 2 * x, rivals={"greedy": lambda: peers.Peer(greedy, "1.0")}))
    assert record["status"] == "ok" and record["peers"] == [{"name": "greedy", "absent": "ran out of memory"}]


def test_the_limit_is_the_slowest_part():
    assert rates.limit(RATES, 10**10, 10**11, 2 * 10**9) == (2.0, "exp")
    assert rates.limit({**RATES, "exp_per_s": None}, 10**10, 3 * 10**11, 10**9) == (3.0, "arithmetic")


def test_quantiles():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert harness.quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)


# ---- every case ----

SMALL = {"B": 2, "D": 6, "G": 2, "H": 3, "N": 5, "L": 40, "W": 4, "C": 3, "S": 14, "K": 11, "P": 8, "M": 3, "E": 3}
BUILT = [c for cases in case_module.families().values() for c in cases if c.build]


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_every_case_is_right_when_small(case):
    """On the CPU, small: its oracle, its sample and its peers are of one mind, and its costs are positive."""
    sizes = {k: min(v, SMALL[k]) for k, v in case.shape.items() if k in SMALL}
    if "itself" in str(case.targets) or "short" in case.build.keywords:
        sizes = {**sizes, "B": 1, "L": 2 * 1024 + 5, "short": 64}  # the oracle in chunks needs several of them
    work = case.build(CPU, **sizes)
    expected = work.oracle()
    with scalekern.backend("reference"):
        assert harness.check(work, "reference", expected) <= work.tolerance
    for name, make in work.peers.items():
        try:
            peer = make()
        except peers.Absent:
            continue
        out = peer.run()
        # A rival may round to bfloat16 in between, but it computes the same thing.
        assert out is None or harness.relative_error(harness.as_tuple(out), expected) < 5e-2, name
        assert peer.version and peer.scale > 0
    work.run()
    assert min(work.bytes_moved, work.flops) > 0 and work.exponentials >= 0
    for op in case.ops:
        assert op in _library.OPS


def test_case_names_are_unique_and_targets_name_their_rivals():
    names = [c.name for c in BUILT]
    assert len(set(names)) == len(names)
    for case in BUILT:
        sizes = {k: min(v, SMALL[k]) for k, v in case.shape.items() if k in SMALL}
        extra = {"short": 8} if "short" in case.build.keywords else {}
        rivals = case.build(CPU, **sizes, **extra).peers
        for name in case.targets:
            known = {rival.split(" at ")[0] for rival in rivals} | {"limit", "elements/s"}
            assert name.split(" at ")[0] in known


# ---- records ----


def record(case="a", backend="cpu", **fields):
    base = {"case": case, "direction": "fwd", "backend": backend, "status": "ok", "device_kind": "cpu"}
    return {
        **base,
        "date": "2026-01-01",
        "ops": ["causal_conv1d_fwd"],
        "digests": {f"causal_conv1d_fwd/{backend}": "d"},
        **fields,
    }


def test_records_merge_by_key(tmp_path):
    records.save(tmp_path, "cpu-x-1t", "family", [record("a", median_us=1), record("b", median_us=2)])
    records.save(tmp_path, "cpu-x-1t", "family", [record("b", median_us=3), record("a", "reference")])
    records.save(tmp_path, "gpu", "family", [record("a", status="failed", error="boom")])
    found = {(r["slug"], r["key"]): r for r in records.load_all(tmp_path)}
    assert sorted(found) == [
        ("cpu-x-1t", "a/fwd/cpu"), ("cpu-x-1t", "a/fwd/reference"), ("cpu-x-1t", "b/fwd/cpu"), ("gpu", "a/fwd/cpu")
    ]  # fmt: skip
    assert found["cpu-x-1t", "b/fwd/cpu"]["median_us"] == 3


def test_records_survive_a_write_that_is_cut_short(tmp_path, monkeypatch):
    path = records.save(tmp_path, "s", "f", [record("a")])
    before = path.read_text()

    def no_replace(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError):
        records.save(tmp_path, "s", "f", [record("b")])
    assert path.read_text() == before


def test_records_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "s" / "f.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"schema": 99, "records": {}}))
    with pytest.raises(ValueError, match="schema"):
        records.load(path)


def test_status_is_never_measured_stale_or_failed(tmp_path, monkeypatch):
    def state():
        rows = {(r["op"], r["backend"], r["device"]): r["status"] for r in records.status(tmp_path)}
        assert len(rows) == len(records.combinations())
        return rows["causal_conv1d_fwd", "cpu", "cpu"]

    current = {"digest": "d"}
    monkeypatch.setattr(records, "digest", lambda op, backend: current["digest"])
    assert state() == "never"
    records.save(tmp_path, "s", "f", [record("memory", direction="memory")])
    assert state() == "never"  # memory says nothing about speed
    records.save(tmp_path, "s", "f", [record("a")])
    assert state() == "measured"
    current["digest"] = "another"
    assert state() == "stale"
    current["digest"] = None
    assert state() == "measured"  # without the sources nothing can be said against it
    current["digest"] = "d"
    records.save(tmp_path, "s", "f", [record("a", status="failed", error="boom")])
    assert state() == "failed"


def test_due_is_what_no_record_shows_as_it_is_now(tmp_path, monkeypatch):
    cases = [toy(lambda x: 2 * x, backends=("cpu",), name=name) for name in ("fresh", "stale", "failed", "never")]
    for case in cases[:3]:
        made = harness.measure(case, CPU, seconds=0.01)
        broken = {"stale": {"digests": dict.fromkeys(made[0]["digests"], "0")}, "failed": {"status": "failed"}}
        records.save(tmp_path, "here", "toys", [{**r, **broken.get(case.name, {})} for r in made])
    assert [c.name for c in records.due(cases, tmp_path, "cpu")] == ["stale", "failed", "never"]
    assert [c.name for c in records.due(cases, tmp_path, "cuda")] == []  # no backend of theirs runs there


def test_status_has_a_row_for_every_op_and_no_impossible_one(tmp_path):
    rows = records.status(tmp_path)
    assert {r["op"] for r in rows} == set(_library.OPS)
    assert not [r for r in rows if (r["backend"], r["device"]) in (("cpu", "cuda"), ("cuda", "cpu"), ("triton", "cpu"))]


# ---- digests ----

NATIVE = {
    "toy/cpu_toy.cpp": '#include "toy/toy.h"\nm.def(\n  "toy_fwd_cpu(Tensor x) -> ()");',
    "toy/cpu_toy_kernel.cpp": '#include "toy/toy.h"\n#include "common/vec.h"\nint f() { return 1; }',
    "toy/toy.h": "struct Args {};",
    "toy/cpu_other.cpp": '#include "toy/other.h"\nm.def("other_cpu(Tensor x) -> ()");',
    "toy/other.h": "struct Other {};",
    "toy/cuda_toy.cu": '#include "toy/toy.h"\nm.def("toy_fwd_cuda(Tensor x) -> ()");',
    "common/vec.h": "// a comment\nint lanes = 4;",
}


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    for name, text in NATIVE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "CSRC", tmp_path)
    return tmp_path


def native_backend(op, name="cpu"):
    return _dispatch.Backend(name, _dispatch.filling(lambda: None, _dispatch.native(op, name)))


def test_digest_covers_exactly_the_sources_of_the_op(csrc):
    backend = native_backend("toy_fwd")
    names = {p.relative_to(csrc).as_posix() for p in sources.files(backend)}
    assert names == {"toy/cpu_toy.cpp", "toy/cpu_toy_kernel.cpp", "toy/toy.h", "common/vec.h"}
    first = sources.digest(backend)
    for name in NATIVE:
        (csrc / name).write_text(NATIVE[name] + "\nint more;")
        os.utime(csrc / name, ns=(1, 1))
        assert (sources.digest(backend) != first) == (name in names), name
        (csrc / name).write_text(NATIVE[name])
    assert sources.digest(backend) == first


def test_a_digest_is_the_same_on_every_python():
    """Not ast.dump, which shows a function's type_params from 3.12 on and hides empty fields from 3.13 on."""
    assert sources._outline(ast.parse("def f(x, *, y=1):\n    return -x")) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x')], kwonlyargs=[arg(arg='y')], "
        "kw_defaults=[Constant(value=1)]), body=[Return(value=UnaryOp(op=USub(), operand=Name(id='x', ctx=Load())))])])"
    )


def test_comments_do_not_make_a_measurement_stale(csrc):
    backend = native_backend("toy_fwd")
    first = sources.digest(backend)
    (csrc / "common/vec.h").write_text("/* 3.1 GB/s\n measured */ int   lanes\n  = 4; // lanes")
    assert sources.digest(backend) == first
    text = '"""Doc."""\ndef f(x):\n    """More."""\n    return x  # why\n'
    python, changed = csrc / "a.py", csrc / "b.py"
    python.write_text(text)
    changed.write_text("def f(x):\n\n    return x\n")
    assert sources._normalized(python, 0) == sources._normalized(changed, 0)
    changed.write_text("def f(x):\n    return -x\n")
    assert sources._normalized(python, 0) != sources._normalized(changed, 1)


def test_every_op_that_is_built_has_sources():
    for op, entry in _library.OPS.items():
        for backend in entry.backends:
            if backend.name == "reference" or (backend.name == "cpu" and not backend.unavailable("cpu")):
                assert sources.digest(backend), (op, backend.name)


# ---- the runner ----

CHILD = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
say = lambda **event: print(json.dumps(event), flush=True)
for name in request["names"]:
    say(event="begin", case=name)
    for contender in ("cpu", "reference"):
        if contender in request["skip"].get(name, {}):
            continue
        say(event="try", case=name, contender=contender)
        if (name, contender) == ("crashes", "cpu"):
            os.kill(os.getpid(), 11)
        if (name, contender) == ("hangs", "cpu"):
            time.sleep(60)
    say(event="done", case=name, records=[])
"""


def watch(tmp_path, names, **options):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    events = []
    cases = [toy(lambda x: 2 * x, backends=("cpu", "reference"), name=name) for name in names]
    options = {"report": events.append, "command": [sys.executable, str(script)], **options}
    left = runner.run(cases, CPU, tmp_path / "out", **options)
    failures = {r["case"]: r for r in records.load_all(tmp_path / "out")}
    return left, [e["case"] for e in events if e["event"] == "done"], failures


def test_a_crash_costs_one_backend_of_one_case(tmp_path):
    left, done, failures = watch(tmp_path, ["first", "crashes", "last"])
    assert (left, done) == ([], ["first", "crashes", "last"])
    assert list(failures) == ["crashes"] and failures["crashes"]["backend"] == "cpu"
    assert failures["crashes"]["error"] == "the process died of SIGSEGV"


def test_a_hang_is_ended_and_recorded(tmp_path):
    left, done, failures = watch(tmp_path, ["hangs", "last"], hang=1.0)
    assert (left, done) == ([], ["hangs", "last"]) and "no sign of life" in failures["hangs"]["error"]


def test_the_budget_is_kept(tmp_path):
    begin = time.monotonic()
    left, done, failures = watch(tmp_path, ["first", "hangs", "last"], budget=1.5)
    assert time.monotonic() - begin < 5
    assert (left, done, failures) == (["hangs", "last"], ["first"], {})  # out of time is not a failure


def test_the_child_records_after_each_case(tmp_path, monkeypatch):
    cases = [toy(lambda x: 2 * x, name="right"), toy(lambda x: x, name="wrong")]
    broken = Case("broken", ("causal_conv1d_fwd",), "fwd", ("cpu",), 1, {}, lambda device: 1 / 0, family="toys")
    monkeypatch.setattr(case_module, "select", lambda device: [*cases, broken])
    request = {"device": "cpu", "names": ["right", "broken", "wrong"], "folder": str(tmp_path), "seconds": 0.01,
               "left": None, "skip": {}}  # fmt: skip
    seen = []
    assert runner.serve(request, lambda e: seen.append((e["event"], e["case"], len(records.load_all(tmp_path))))) == 0
    assert [(c, n) for e, c, n in seen if e == "done"] == [("right", 1), ("broken", 2), ("wrong", 3)]
    found = {r["case"]: r["status"] for r in records.load_all(tmp_path)}
    assert found == {"right": "ok", "wrong": "failed", "broken": "failed"}
    request["left"] = -1.0
    assert runner.serve(request, lambda e: pytest.fail("no time was left")) == 0


# ---- compiling side by side ----

NOTE = """
import json, sys, time
request = json.load(sys.stdin)
open(sys.argv[1] + "/" + request["names"][0], "w").write(json.dumps(request))
time.sleep(60 if "slow" in request["names"] else 0)
"""


def test_cases_are_dealt_out_and_the_time_is_kept(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(NOTE)
    cases = [toy(lambda x: x, name=name) for name in ("a", "b", "c", "slow", "e")]
    begin = time.monotonic()
    assert warm.warm(cases, 2, 2.0, [sys.executable, str(script), str(tmp_path)]) == 1  # the other one was ended
    assert time.monotonic() - begin < 20
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a", "b"))
    assert first["names"] == ["a", "c", "e"] and second["names"] == ["b", "slow"]
    assert first["memory"] + second["memory"] < 1


def test_a_case_is_launched_on_what_compiles_and_no_failure_stops_the_next(capsys):
    ran = []

    def run(x):
        ran.append(_dispatch.forced())
        raise RuntimeError("boom")

    rivals = {
        "mamba_ssm": lambda: peers.Peer(lambda: ran.append("peer"), "1"),
        "copy": lambda: pytest.fail("it compiles nothing"),
    }
    case = toy(run, backends=("cpu", "triton"), rivals=rivals)
    warm.launch_once(case, CPU, time.monotonic() + 60)
    assert ran == ["triton", "peer"] and "boom" in capsys.readouterr().err
    warm.launch_once(case, CPU, time.monotonic() - 1)
    assert len(ran) == 2


# ---- pytest-benchmark ----


def test_pytest_benchmarks_runs_the_cases_by_itself(tmp_path):
    pytest.importorskip("pytest_benchmark")
    stats, root = tmp_path / "stats.json", pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "conv_update_step_b1_"]
    command += ["--bench-device", "cpu", "--bench-seconds", "0.01", "--records", str(tmp_path / "r")]
    command += ["--benchmark-json", str(stats)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads(stats.read_text())["benchmarks"]
    (first, *_) = records.load_all(tmp_path / "r")
    assert entry["stats"]["median"] * 1e6 == pytest.approx(first["median_us"], rel=1e-3)  # its clock is the harness's


# ---- memory and end to end ----


def test_memory_sees_at_least_the_outputs():
    found = memory._measure("fwd", CPU, {"B": 1, "D": 4096, "N": 2, "L": 256})
    assert found.get("status", "ok") == "ok", found
    assert found["outputs_bytes"] >= 4096 * 256 * 4
    assert found["peak_extra_bytes"] > 0.9 * found["outputs_bytes"]
    assert found["used"][0][0] == "selective_scan_fwd"


def test_memory_of_a_convolution_is_held_against_the_plain_one():
    found = memory._against_plain("bwd", CPU, {"B": 2, "D": 256, "L": 1024})
    assert found.get("status", "ok") == "ok", found
    assert found["outputs_bytes"] <= found["peak_extra_bytes"] <= found["bound_bytes"]  # a third of the plain one's
    assert found["used"] == [["fft_conv_bwd", "cpu"]]


def side(**changes):
    return {"logits": [1.0, -2.0], "tokens": [1, 2], "used": [["selective_scan_fwd", "cpu"]], **changes}


def test_both_sides_of_the_end_to_end_case_must_agree():
    alone = side(used=[])
    assert hf._compare(side(), alone, "fp32") == 0
    for ours, theirs, message in [
        (side(logits=[1.0, -2.01]), alone, "logits differ"), (side(logits=[float("nan")] * 2), alone, "logits differ"),
        (side(tokens=[1, 3]), alone, "tokens differ"),
        (side(), side(), "without"), (side(used=[]), alone, "with the shim"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            hf._compare(ours, theirs, "fp32")
