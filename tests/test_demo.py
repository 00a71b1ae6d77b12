"""The demo: the whole pipeline from a fresh folder, resuming to the bit, Ctrl-C, errors, and its parts by hand."""

import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import scalekern.demo
from scalekern.demo import compare, console, data, model, quantized, train
from scalekern.demo.data import Corpus, InputError
from scalekern.demo.model import Config, LanguageModel
from scalekern.demo.train import Settings, Trainer

pytest.importorskip("safetensors")
STEPS = 6
# One thread a run: on a busy machine two of them spend their time waiting for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = Settings(steps=7, batch=2, window=24, held_out_windows=5)
TINY = Config(width=16, layers=2, d_state=4)
TINY2 = Config(arch="mamba2", width=16, layers=2, ssd_state=4, headdim=16)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """About 40 kB of text with structure: numbered lines with a few words."""
    words = "scan state gate token prefix kernel block thread".split()
    lines = [f"{i}: {words[i % 8]} {words[i * i % 7]} = {i * 37 % 101}" for i in range(1600)]
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(lines))
    return path


def demo(*arguments):
    return [sys.executable, "-u", "-m", "scalekern.demo", *map(str, arguments)]


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of the demo in this process."""
    parser = argparse.ArgumentParser()
    scalekern.demo.add_arguments(parser)
    code = scalekern.demo.main(parser.parse_args([str(a) for a in arguments]))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tiny(monkeypatch):
    """The same pipeline with a model that takes no time."""
    small = functools.partial(Config, width=16, layers=1, d_state=4, ssd_state=4, headdim=16)
    monkeypatch.setattr(model, "Config", small)
    monkeypatch.setattr(train, "Settings", functools.partial(Settings, batch=2, window=32, held_out_windows=3))
    train.Settings.window = 32


def corpus(size=4000, seed=3):
    generator = torch.Generator().manual_seed(seed)
    content = bytes((torch.randint(97, 105, (size,), generator=generator)).tolist())
    return Corpus.of("random letters", content[: size // 2], content[size // 2 :])


# --- the whole of it


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ("--text", text, "--steps", STEPS, "--out", out, "--device", "cpu")
    run = subprocess.run(demo(*arguments), capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    return out, run.stdout, json.loads((out / "results.json").read_text())


def test_a_fresh_run_leaves_its_files_and_results(finished):
    out, printed, results = finished
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.safetensors", "demo.png", "results.json", "sample.txt"]
    assert len(results["training_bits_per_byte"]) == STEPS
    assert results["held_out_curve"][0][0] == 0 and results["held_out_curve"][-1][0] == STEPS
    assert results["held_out_curve"][0][1] == pytest.approx(8, abs=0.5)  # untrained: 8 bits a byte
    assert results["held_out_bits_per_byte"] < results["held_out_curve"][0][1] - 1  # six steps already learn
    assert f"{results['held_out_bits_per_byte']:.3f} held-out bits per byte" in printed
    cases = ["training step", "long convolution", "window attention", "prefill", "decode"]
    assert [t["case"] for t in results["timings"]] == cases
    for t in results["timings"]:
        assert t["scalekern_ms"] > 0 and t["pytorch_ms"] > 0
        assert t["speedup"] == pytest.approx(t["pytorch_ms"] / t["scalekern_ms"])
        assert t["case"] in printed
    formats = results["quantized"]
    assert [(v["name"], v["rotated"]) for v in formats] == [("float32", False)] + [
        (name, rotated) for name in ("W8", "W4", "W2") for rotated in (False, True)
    ]
    assert formats[0]["size_bytes"] == 4 * results["parameters"] > 2 * formats[1]["size_bytes"]
    assert formats[1]["size_bytes"] > formats[3]["size_bytes"] > formats[5]["size_bytes"]
    for v in formats:  # two windows, six steps: little to lose
        assert v["decode_ms"] > 0 and abs(v["bits_per_byte"] / formats[0]["bits_per_byte"] - 1) < 0.1
        assert f"{v['bits_per_byte']:.3f}" in printed
    assert len({v["bits_per_byte"] for v in formats}) == len(formats)  # each is another model
    assert 0 <= results["relative_errors"]["logits"] <= results["tolerance"]
    assert 0 < results["relative_errors"]["decode_logits"] <= results["tolerance"]
    assert results["sample"] in printed
    assert (out / "sample.txt").read_text(encoding="utf-8").endswith(results["sample"])


def test_the_figure_shows_something(finished):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    pixels = imread(finished[0] / "demo.png")[..., :3]
    assert pixels.shape[0] > 300 and pixels.shape[1] > 800
    dark = (abs(pixels - [0x1F / 255, 0x4E / 255, 0x8C / 255]) < 0.02).all(-1)
    half = pixels.shape[1] * 55 // 100
    assert dark[:, :half].sum() > 100  # the held-out curve
    assert dark[:, half:].sum() > 10_000  # the bars


def test_mamba2_learns_agrees_and_resumes(tiny, text, tmp_path, capsys, monkeypatch):
    """The whole of it with --arch mamba2, but the figure and two formats: all that is timed is in the table."""
    monkeypatch.setattr(scalekern.demo, "_plot", lambda *args: None)
    monkeypatch.setattr(quantized, "FORMATS", {"W8": quantized.FORMATS["W8"]})
    arguments = ("--text", text, "--steps", 8, "--out", tmp_path, "--device", "cpu")
    code, printed, err = call(capsys, *arguments, "--arch", "mamba2")
    assert code == 0 and "1 layers of width 16, Mamba-2, H3" in printed, err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["arch"] == "mamba2"
    state, tensors = train.read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert tensors["model.blocks.0.mixer.dt_bias"].shape == (2,) and state["config"]["arch"] == "mamba2"
    assert results["held_out_bits_per_byte"] < results["held_out_curve"][0][1] - 0.2
    assert 0 < results["relative_errors"]["decode_logits"] <= results["tolerance"]
    for t in results["timings"]:
        row = [f"{t[side]:.2f}" for side in ("scalekern_ms", "pytorch_ms")] + [f"{t['speedup']:.1f}x"]
        assert any(line.startswith(t["case"]) and line.split()[-3:] == row for line in printed.splitlines())
    first, plain, rotated = results["quantized"]
    assert first["size_bytes"] > plain["size_bytes"] == rotated["size_bytes"]
    assert len({v["bits_per_byte"] for v in results["quantized"]}) == 3
    code, _, err = call(capsys, *arguments, "--resume", "--arch", "mamba")
    assert code == 2 and "was trained with --arch mamba2, not mamba" in err
    resumed = Trainer.resume(tmp_path / "checkpoint.safetensors", data.load(str(text), 32), 9, "cpu")
    assert resumed.step == 8 and resumed.model.config.arch == "mamba2"


def test_ctrl_c_saves_and_resume_ends_as_if_nothing_had_happened(text, finished, tmp_path):
    arguments = ("--text", text, "--steps", STEPS, "--out", tmp_path / "out", "--device", "cpu")
    run = subprocess.Popen(demo(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in run.stdout:
        if line.startswith("step 1/"):
            run.send_signal(signal.SIGINT)
            break
    _, error = run.communicate(timeout=120)
    assert run.returncode == 130, error
    assert "--resume" in error and "Traceback" not in error
    state, _ = train.read_checkpoint(tmp_path / "out" / "checkpoint.safetensors")
    assert 1 <= state["step"] < STEPS
    assert not (tmp_path / "out" / "results.json").exists()

    resumed = subprocess.run(demo(*arguments, "--resume"), capture_output=True, text=True, env=ENVIRONMENT)
    assert resumed.returncode == 0, resumed.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for key in ("training_bits_per_byte", "held_out_curve", "sample"):
        assert results[key] == finished[2][key]


def test_resuming_equals_not_stopping_to_the_bit(tmp_path):
    whole = Trainer(corpus(), TINY, SMALL, "cpu")
    for _ in range(7):
        whole.train_step()
    first = Trainer(corpus(), TINY, SMALL, "cpu")
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / "c")
    torch.manual_seed(99)  # whatever happens in between
    second = Trainer.resume(tmp_path / "c", corpus(), None, "cpu")
    assert second.step == 3
    for _ in range(4):
        second.train_step()
    assert second.losses == whole.losses
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_resuming_without_the_moments_would_show(tmp_path, monkeypatch):
    """The mutant of the test above: an optimizer that starts afresh gives other losses."""
    trainer = Trainer(corpus(), TINY, SMALL, "cpu")
    for _ in range(3):
        trainer.train_step()
    trainer.save(tmp_path / "c")
    state, tensors = train.read_checkpoint(tmp_path / "c")
    monkeypatch.setattr(
        train, "read_checkpoint", lambda path: (state, {k: v for k, v in tensors.items() if k.startswith("model.")})
    )
    mutant = Trainer.resume(tmp_path / "c", corpus(), None, "cpu")
    for _ in range(2):
        trainer.train_step(), mutant.train_step()
    assert trainer.losses[3] == mutant.losses[3] and trainer.losses[4] != mutant.losses[4]


def test_more_steps_can_be_asked_for(tmp_path):
    trainer = Trainer(corpus(), TINY, SMALL, "cpu")
    trainer.train_step()
    trainer.save(tmp_path / "c")
    assert Trainer.resume(tmp_path / "c", corpus(), 20, "cpu").settings.steps == 20


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    trainer = Trainer(corpus(), TINY, SMALL, "cpu")
    trainer.save(tmp_path / "c")
    trainer.train_step()
    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError):
        trainer.save(tmp_path / "c")
    assert train.read_checkpoint(tmp_path / "c")[0]["step"] == 0


# --- what goes wrong


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b" \n\n ", "the file is empty"),
        (b"text\0" * 1000, "binary, not text (a zero byte at offset 4)"),
        (b"caf\xe9 " * 1000, "binary, not UTF-8 text (byte 0xe9 at offset 3)"),
        (b"short", "at least 514 bytes are needed, the file has 5"),
    ],
)
def test_a_text_that_cannot_be_used(content, message, tmp_path, capsys):
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    code, out, err = call(capsys, "--text", path, "--steps", 1, "--out", tmp_path / "out")
    assert code == 2
    assert err == f"scalekern demo: --text {path}: {message}\n"
    assert out == "" and not (tmp_path / "out").exists()


def test_other_arguments_that_cannot_be_used(tmp_path, text, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("--text", tmp_path), "cannot be read (Is a directory)"),
        (("--text", text, "--steps", 0), "--steps must be at least 1, got 0"),
        (("--text", text, "--device", "abacus"), "--device abacus: cannot be used"),
        (("--text", text, "--device", "meta"), "--device meta: cannot be used"),
        (("--text", text, "--out", tmp_path / "file"), "cannot be made a folder"),
        (("--text", text, "--resume", "--out", tmp_path / "new"), "there is nothing to resume"),
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1, err
    (tmp_path / "odd" / "checkpoint.safetensors").mkdir(parents=True)
    code, _, err = call(capsys, "--text", text, "--out", tmp_path / "odd")
    assert code == 2 and "is a folder" in err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    code, _, err = call(capsys, "--text", text, "--out", tmp_path)
    assert code == 2 and err.strip().endswith("cannot be written to")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    code, out, err = call(capsys, "--text", text, "--out", tmp_path)
    assert (code, out) == (2, "") and "pip install safetensors" in err and err.count("\n") == 1


def test_a_checkpoint_that_cannot_be_resumed(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    (tmp_path / "noise").write_bytes(b"noise" * 100)
    save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    Trainer(corpus(), TINY, SMALL, "cpu").save(tmp_path / "other")
    for name, message in (("noise", "cannot be read"), ("foreign", "is not a checkpoint"), ("other", "another text")):
        with pytest.raises(InputError, match=message):
            Trainer.resume(tmp_path / name, corpus(seed=4), None, "cpu")
    with safe_open(tmp_path / "other", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    name = "model.embedding.weight"
    for changed, message in (({name: torch.zeros(3, 3)}, r"has shape \(3, 3\), expected \("), ({}, "is missing")):
        save_file({n: t for n, t in tensors.items() if n != name} | changed, tmp_path / "sizes", metadata)
        with pytest.raises(InputError, match=f"{name} {message}"):
            Trainer.resume(tmp_path / "sizes", corpus(), None, "cpu")


def test_logits_that_disagree_fail_the_run(tiny, text, tmp_path, capsys, monkeypatch):
    arguments = ("--text", text, "--steps", 1, "--out", tmp_path, "--device", "cpu")
    assert call(capsys, *arguments)[0] == 0
    step = LanguageModel.step
    monkeypatch.setattr(LanguageModel, "step", lambda self, tokens, cache: step(self, tokens, cache) * 1.0001)
    code, out, _ = call(capsys, *arguments)
    assert code == 1 and "byte by byte: DISAGREE" in out and "whole windows: agree" in out


def test_without_matplotlib_there_is_a_line_instead_of_a_figure(tiny, text, tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, _ = call(capsys, "--text", text, "--steps", 1, "--out", tmp_path, "--device", "cpu")
    assert code == 0 and "matplotlib is not installed" in out
    assert not (tmp_path / "demo.png").exists() and (tmp_path / "results.json").exists()


# --- the parts


def test_bits_per_byte_by_hand():
    chances = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.125, 0.125, 0.25, 0.5]])
    logits = chances.log() + torch.tensor([[3.0], [-1.0], [0.5]])  # any constant a row: softmax removes it
    assert train.bits_per_byte(logits, torch.tensor([0, 2, 1])) == pytest.approx((1 + 2 + 3) / 3, rel=1e-6)
    assert train.bits_per_byte(logits[None], torch.tensor([[2, 0, 3]])) == pytest.approx((3 + 2 + 1) / 3, rel=1e-6)


def test_evaluation_counts_every_target_once():
    trainer = Trainer(corpus(), TINY, Settings(window=24, held_out_windows=19), "cpu")  # 16 + 3 windows
    assert trainer.held_out.shape == (19, 25)
    with torch.no_grad():
        logits = trainer.model(trainer.held_out[:, :-1])
    chosen = logits.log_softmax(-1).gather(-1, trainer.held_out[:, 1:, None])
    assert trainer.evaluate() == pytest.approx(-chosen.double().mean().item() / math.log(2), rel=1e-5)


@pytest.mark.parametrize("config", [TINY, TINY2], ids=["mamba", "mamba2"])
def test_generation_by_steps_equals_whole_passes(config):
    torch.manual_seed(5)
    language = LanguageModel(config)
    with torch.no_grad():  # away from ties, and from repeating the last byte, which a shared head likes at first
        language.embedding.weight.mul_(20)
        for block in language.blocks:
            getattr(block.mixer, "out_proj" if hasattr(block.mixer, "out_proj") else "output_linear").weight.mul_(100)
    prompt = torch.randint(256, (3, 11))
    tokens, logits = model.generate(language, prompt, 9)
    sequence = prompt
    with torch.no_grad():
        for t in range(9):
            whole = language(sequence)[:, -1]
            assert compare.relative_error(logits[:, t], whole) < 1e-5
            sequence = torch.cat([sequence, whole.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, sequence[:, 11:])
    assert len(set(tokens.flatten().tolist())) > 3  # not one byte over and over


def test_sampling_is_seeded():
    language = LanguageModel(TINY)
    prompt = torch.arange(5)[None]
    draws = [model.generate(language, prompt, 20, temperature=1.0, seed=s)[0].tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_file_is_split_without_loss_or_overlap(text):
    content = text.read_bytes()
    part = data.load(str(text), 256)
    assert bytes(part.train.tolist()) + bytes(part.held_out.tolist()) == content
    assert len(part.held_out) == len(content) // 20


def test_the_standard_library_is_split_by_files():
    first, again = data.load(None, 256), data.load(None, 256)
    assert first.digest == again.digest
    share = len(first.held_out) / (len(first.train) + len(first.held_out))
    assert 0.01 < share < 0.15 and len(first.train) > 4_000_000
    windows = data.held_out_windows(first.held_out, 64, 256)
    assert windows.shape == (64, 257)
    assert len({bytes(w.tolist()) for w in windows}) == 64


def test_batches_follow_from_the_step_and_reach_both_ends():
    content = torch.arange(40, dtype=torch.uint8)
    seen = set()
    for step in range(40):
        windows = data.batch(content, step, 4, 30, seed=0)
        assert windows.shape == (4, 31) and (windows[:, 1:] - windows[:, :-1] == 1).all()
        assert torch.equal(windows, data.batch(content, step, 4, 30, seed=0))
        seen |= set(windows[:, 0].tolist())
    assert seen == set(range(10))
    assert not torch.equal(data.batch(content, 1, 4, 30, seed=0), data.batch(content, 1, 4, 30, seed=1))


def test_the_learning_rate_rises_and_falls():
    settings = Settings(steps=400)
    rates = [train.learning_rate(s, settings) for s in range(400)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(settings.peak_rate) and 20 <= top <= 80
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.06 * settings.peak_rate


@pytest.mark.parametrize(
    "first, later, planned",
    [(0.1, 0.1, 1000), (0.1, 0.2, 1000), (2.0, 2.0, 100), (0.1, 0.4, 650), (0.15, 1.0, 370)],
    ids=["fast", "slower but in time", "slow", "slower, too late", "much slower, too late"],
)
def test_a_slow_machine_plans_fewer_steps(first, later, planned):
    """Made-up clocks; the limit is 200 s."""
    trainer = Trainer(corpus(), TINY, Settings(steps=1000, window=24), "cpu")
    while trainer.step < trainer.settings.steps:
        trainer.step += 1
        trainer.seconds += first if trainer.step <= 200 else later
        if trainer.step == 1:
            trainer.seconds += 5  # starting up, which must not count as speed
        trainer.fit_time_limit()
    assert trainer.settings.steps == pytest.approx(planned, rel=0.15)
    assert trainer.seconds < 1.1 * train.TIME_LIMIT_S


def test_what_is_printed_is_safe_on_a_terminal():
    assert console.printable("a\tb\né".encode() + b"\x1b[31m\xff\x07") == "a\tb\né�[31m��"
    assert console.table(["case", "ms"], [["step", "1.5"], ["x", "10.25"]]).splitlines() == [
        "case     ms", "----  -----", "step    1.5", "x     10.25",
    ]  # fmt: skip


def test_the_progress_bar_of_a_terminal(text, tmp_path):
    pytest.importorskip("rich")
    controller, terminal = os.openpty()
    script = (
        "from scalekern.demo import console\n"
        "with console.progress(4, 1) as bar:\n"
        "    bar.update(2, 4, 'held out 2.5'); bar.say('a line'); bar.update(4, 4, 'held out 2.4')\n"
    )
    run = subprocess.run([sys.executable, "-c", script], stdout=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert run.returncode == 0 and "4/4" in shown and "held out 2.4" in shown and "a line" in shown
