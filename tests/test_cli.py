"""The command line: doctor, bench, report, tune; on a machine without a GPU, and with nothing measured."""

import json
import pathlib

import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern import _library, testing
from scalekern.__main__ import main
from scalekern.benchmarks import records
from scalekern.cli import doctor, report, selfcheck, tune

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, not the command line")
MARKS = (
    "# Title\n<!-- support:begin -->\n<!-- support:end -->\ntext\n"
    "<!-- results:begin -->\nold\n<!-- results:end -->\nend\n"
)


@pytest.fixture(scope="module")
def examined():
    return doctor.examine()


# ---- doctor ----


def test_doctor_says_what_runs_every_op_on_every_device(examined):
    for device in ("cpu", "cuda"):
        rows = {r["op"]: r for r in examined["ops"] if r["device"] == device}
        assert set(rows) == set(_library.OPS)
        for name, row in rows.items():
            others = {b.name for b in _library.OPS[name].backends} - {row["runs"]}
            assert set(row["others"]) == others and all(row["others"].values())
    assert {r["runs"] for r in examined["ops"] if r["device"] == "cpu"} <= {"cpu", "reference"}


def test_doctor_checks_every_public_op_on_every_backend_that_is_here(examined):
    assert examined["ok"]
    checked = {(c["op"], c["backend"]) for c in examined["checks"] if c["device"] == "cpu" and c["status"] == "ok"}
    assert {(op, "reference") for op in testing.specs()} <= checked
    for row in examined["checks"]:
        if row["status"] == "ok":
            assert 0 <= row["error"] <= 1e-5 and row["samples"] > 0
            assert (row["gradient_error"] is None) == (not testing.specs()[row["op"]].trainable)


def test_doctor_knows_versions_and_build(examined):
    assert examined["versions"]["torch"] == torch.__version__ and examined["versions"]["python"]
    assert examined["build"]["threads"] == torch.get_num_threads()
    assert "built" in examined["build"] and "skipped" in examined["build"]


def test_doctor_prints_json_or_tables(examined, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: examined)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in _library.OPS) and "all self-checks pass" in text


@pytest.mark.parametrize(
    "mutant", [torch.zeros_like, lambda x: 1.001 * x, lambda x: x[..., :-1]], ids=["zero", "scaled", "short"]
)
def test_doctor_fails_on_a_wrong_kernel(mutant, monkeypatch):
    right = scalekern.causal_conv1d

    def wrong(*args, **kwargs):
        out, final = right(*args, **kwargs)
        return mutant(out), final

    monkeypatch.setattr(scalekern, "causal_conv1d", wrong)
    assert doctor._self_check("causal_conv1d", "cpu", "reference")["status"] == "failed"


def test_doctor_fails_on_a_wrong_gradient(monkeypatch):
    right = scalekern.causal_conv1d

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    monkeypatch.setattr(scalekern, "causal_conv1d", lambda x, *args, **kwargs: right(Doubled.apply(x), *args, **kwargs))
    found = doctor._self_check("causal_conv1d", "cpu", "reference")
    assert found["status"] == "failed" and "gradient" in found["reason"]


def test_doctor_exits_with_1_when_a_check_fails(examined, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: {**examined, "ok": False})
    assert main(["doctor"]) == 1 and "FAILED" in capsys.readouterr().out


def test_hints_name_what_slows_things_down(monkeypatch):
    monkeypatch.setenv("SCALEKERN_BACKEND", "reference")
    monkeypatch.setenv("SCALEKERN_STRICT", "1")
    monkeypatch.setenv("SCALEKERN_CPU_ISA", "baseline")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    text = "\n".join(doctor.hints())
    for word in ("SCALEKERN_BACKEND=reference", "SCALEKERN_STRICT", "SCALEKERN_CPU_ISA=baseline", "1 thread of 2"):
        assert word in text
    monkeypatch.setattr(doctor._native, "load", lambda kind: f"the {kind} library was not built")
    assert any("the cpu library was not built" in hint for hint in doctor.hints())
    monkeypatch.setattr(doctor, "build", lambda: {"cpu": {"unoptimized": ["avx512"]}, "cpu_isa_in_use": "avx512"})
    assert any("built without optimization" in hint for hint in doctor.hints())


# ---- bench ----


def test_bench_lists_cases_most_important_first(capsys):
    assert main(["bench", "--list", "--device", "cuda", "--json"]) == 0
    cuda = json.loads(capsys.readouterr().out)
    assert cuda[0]["case"].startswith("scan_fwd_b8_d4096_n16_l4096_bf16") and cuda[0]["family"] == "selective_scan"
    assert main(["bench", "--list", "--device", "cpu", "--case", "conv_update"]) == 0
    assert "conv_update" in capsys.readouterr().out


def test_bench_status_with_nothing_measured(tmp_path, capsys):
    assert main(["bench", "--status", "--json", "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["op"] for r in rows} == set(_library.OPS) and {r["status"] for r in rows} == {"never"}
    assert {r["device"] for r in rows} == {"cpu", "cuda"}
    assert main(["bench", "--status", "--out", str(tmp_path)]) == 0
    assert "never" in capsys.readouterr().out


def test_bench_says_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    assert main(["bench", "--device", "cpu", "--case", "nothing of this name", "--out", str(tmp_path)]) == 1
    assert "no case" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "build", lambda: {"cpu": {"unoptimized": ["avx2"]}, "cpu_isa_in_use": "avx2"})
        assert main(["bench", "--device", "cpu", "--case", "conv_update", "--out", str(tmp_path)]) == 1
        assert "avx2 kernels were built without optimization" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["bench", "--device", "cuda", "--out", str(tmp_path)]) == 1
        assert "no CUDA device" in capsys.readouterr().out
        assert main(["tune"]) == 1 and "no CUDA device" in capsys.readouterr().out


def test_bench_measures_and_status_and_report_know_it(tmp_path, capsys):
    """The whole way in one: a child process, a record, its status, its line in the README."""
    case = "conv_update_step_b1_d1536_w4_fp32"
    out = ["--out", str(tmp_path)]
    assert main(["bench", "--device", "cpu", "--case", case, "--seconds", "0.01", "--budget", "120", *out]) == 0
    assert case in capsys.readouterr().out
    found = records.load_all(tmp_path)
    assert found and all(r["status"] == "ok" and r["error_vs_oracle"] < 1e-5 for r in found)
    assert main(["bench", "--status", "--json", *out]) == 0
    rows = {(r["op"], r["backend"], r["device"]): r["status"] for r in json.loads(capsys.readouterr().out)}
    assert rows["causal_conv1d_update", "reference", "cpu"] == "measured"
    assert rows["causal_conv1d_update", "triton", "cuda"] == "never"


# ---- report ----


def save_record(folder, **changes):
    base = {
        "case": "conv_fwd_b1", "ops": ["causal_conv1d_fwd"], "direction": "fwd", "backend": "cpu", "status": "ok",
        "shape": {"B": 1, "dtype": "fp32"}, "targets": {"F.conv1d + silu": 3, "gone": 2}, "priority": 1,
        "median_us": 1234.5, "p20_us": 1, "p80_us": 2, "limit_us": 100.0, "limit_by": "memory",
        "fraction_of_limit": 0.081, "error_vs_oracle": 1.2e-7,
        "peers": [{"name": "F.conv1d + silu", "ratio": 4.56, "median_us": 5600.0, "first_s": 0.006},
                  {"name": "compiled", "ratio": 1.5, "median_us": 1850.0, "first_s": 18.21},
                  {"name": "gone", "absent": "no"}],
        "digests": {"causal_conv1d_fwd/cpu": records.digest("causal_conv1d_fwd", "cpu")}, "versions": {"torch": "2.13"},
        "device": "A processor", "device_kind": "cpu", "threads": 2, "date": "2026-01-01T00:00Z",
    }  # fmt: skip
    records.save(folder, "cpu-x-2t", "selective_scan", [{**base, **changes}])


@pytest.fixture
def readme(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "support", lambda: "| support |")
    path = tmp_path / "README.md"
    path.write_text(MARKS)
    return path


def write(readme, folder) -> str:
    assert main(["report", "--readme", str(readme), "--records", str(folder)]) == 0
    return readme.read_text()


def test_report_is_written_from_the_records_and_nothing_else(readme, tmp_path):
    pytest.importorskip("matplotlib")
    save_record(tmp_path / "r")
    text = write(readme, tmp_path / "r")
    assert text.startswith("# Title\n") and text.endswith("end\n") and "old" not in text and "| support |" in text
    assert "1.23 ms" in text and "8.1 % (memory)" in text and "1.2e-07" in text
    assert "4.56x F.conv1d + silu, 1.5x compiled (its first call 18.2 s)" in text
    assert "3x F.conv1d + silu: yes" in text and "2x gone: not measured" in text
    assert "(r/cpu-x-2t/README.md)" in text and "(r/cpu-x-2t/selective_scan.png)" in text
    assert "never measured on a GPU" in text and "causal_conv1d_fwd (triton)" in text
    figure = tmp_path / "r" / "cpu-x-2t" / "selective_scan.png"
    before = figure.read_bytes()
    assert write(readme, tmp_path / "r") == text and figure.read_bytes() == before


def test_report_marks_what_is_stale_failed_or_short_of_its_goal(readme, tmp_path):
    save_record(tmp_path / "r", digests={"causal_conv1d_fwd/cpu": "something else", "gone_fwd/cpu": "x"})
    save_record(tmp_path / "r", case="b", status="failed", error="boom | bang")
    save_record(tmp_path / "r", case="c", targets={"F.conv1d + silu": 5, "limit": 0.85})
    text = write(readme, tmp_path / "r")
    assert "fp32 **stale** |" in text and "**failed**: boom \\| bang" in text
    assert "5x F.conv1d + silu: **no**, 0.85x limit: **no**" in text
    save_record(tmp_path / "r", shape={"B": 2, "D": 1000, "L": 1000, "dtype": "fp32"}, median_us=10.0,
                targets={"elements/s": 1.2e11})  # fmt: skip
    assert "1.2e+11 elements/s: yes" in write(readme, tmp_path / "r")


def test_report_shows_every_line_beside_the_records_and_those_with_a_goal_in_the_readme(readme, tmp_path):
    save_record(tmp_path / "r")
    save_record(tmp_path / "r", case="b", targets={}, shape={"B": 77, "dtype": "fp32"})
    text, page = write(readme, tmp_path / "r"), (tmp_path / "r" / "cpu-x-2t" / "README.md").read_text()
    assert "All 2 records" in text and "B77" not in text and "B77" in page and "B1 " in page
    assert "Not compared with: gone (no)." in page


def test_report_names_a_layer_and_what_the_shape_does_not_tell(readme, tmp_path):
    """Else the lines of two layers, or of two formats, are the same."""
    for case in ("group_mamba_fwd_b1_fp32", "conv_fwd_b1_fp32_channels_last"):
        save_record(tmp_path / "r", case=case)
    lines = [line.partition(" B1 ")[0] for line in write(readme, tmp_path / "r").splitlines() if " B1 " in line]
    assert lines == ["| causal_conv1d fwd channels last", "| group mamba: causal_conv1d fwd"]


def test_report_with_nothing_measured(readme, tmp_path):
    text = write(readme, tmp_path / "none")
    assert "never measured on a CPU" in text and "| case |" not in text


def test_report_refuses_a_readme_without_marks(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text("# Title\n")
    assert main(["report", "--readme", str(path)]) == 1
    assert "<!-- support:begin -->" in capsys.readouterr().out and path.read_text() == "# Title\n"
    assert main(["report", "--readme", str(tmp_path / "none.md")]) == 1


def test_support_table_asks_every_op_and_backend(monkeypatch):
    monkeypatch.setattr(selfcheck, "DTYPES", (torch.float32, torch.bfloat16))
    all_samples = testing.samples
    monkeypatch.setattr(testing, "samples", lambda op: all_samples(op)[:2])
    lines = report.support().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]
    assert {(r[0], r[2]) for r in rows} == {
        (op, b.name) for op, spec in testing.specs().items() for o in _library.OPS.values()
        if o.public == (spec.through or op) for b in o.backends
    }  # fmt: skip
    for op, device, backend, dtypes, gradient, _, here in (r[:7] for r in rows):
        if backend == "reference":
            assert (device, dtypes, here) == ("any", "fp32, bf16", "yes")
            spec = testing.specs()[op]
            assert gradient == ("none (in place)" if spec.inplace else "none (inference)" if spec.inference else "yes")
        if backend in ("cuda", "triton"):
            assert here == "no"


def test_the_repository_readme_has_the_marks():
    text = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    assert all(f"<!-- {s}:{end} -->" in text for s in report.SECTIONS for end in ("begin", "end"))


# ---- tune ----


def test_tune_finds_the_keys_of_a_call():
    pytest.importorskip("triton")
    from scalekern.triton_kernels import tuning

    call = lambda: tuning.config("selective_scan_fwd", "fp32-N4", torch.device("cpu"), {"BLOCK_D": 8})
    assert tune.keys_of("selective_scan_fwd", call) == {"fp32-N4"}
    assert tune.keys_of("selective_scan_bwd", call) == set()
    assert call() == {"BLOCK_D": 8}


def test_tune_times_what_is_right_and_only_that(monkeypatch, capsys):
    pytest.importorskip("triton")
    from scalekern.benchmarks import harness
    from scalekern.benchmarks.case import Case, Work
    from scalekern.triton_kernels import tuning

    x, kernel, timed = torch.ones(3), "selective_scan_fwd", []
    config = lambda: tuning.config(kernel, "key", torch.device("cpu"), {"BLOCK_D": 1})
    run = lambda: (config()["BLOCK_D"] != 2) * x  # a block of 2 gives a wrong result
    work = Work(run, lambda: (x.double(),), 1e-6, bytes_moved=1)
    case = Case("toy", (), "fwd", ("cuda",), 1, {}, lambda device: work)
    monkeypatch.setattr(tuning, "_store", lambda path, kernel, key, best: timed.append((kernel, key, best)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a gpu")
    candidates = [{"BLOCK_D": 4}, {"BLOCK_D": 2}, {"BLOCK_D": 8}]
    time = lambda call: (call(), config()["BLOCK_D"])[1]
    tune.tune_case(case, torch.device("cpu"), candidates=candidates, time_ms=time)
    assert timed == [(kernel, "key", {"BLOCK_D": 4})] and "4 ms" in capsys.readouterr().out
    assert harness.check(work, "triton", work.oracle()) == 0
