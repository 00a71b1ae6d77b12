"""`python -m scalekern demo`: train a byte-level Mamba / H3 / attention model on real text with scalekern's ops, run,
compare and quantize it.

Leaves in --out: checkpoint.safetensors, results.json, sample.txt and demo.png.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time

OUT, CHECKPOINT = "demo_out", "checkpoint.safetensors"
SAVE_EVERY_S = 20
PROMPT, SAMPLE = 96, 384  # bytes
TEMPERATURE = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to learn (default: Python's standard library)")
    parser.add_argument("--arch", choices=("mamba", "mamba2"), help="the recurrent blocks (default: mamba)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: about three minutes' worth)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"where results go (default: {OUT})")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")


def main(args: argparse.Namespace) -> int:
    """0: done; 1: the logits disagree; 2: unusable input; 130: stopped by Ctrl-C, with a checkpoint to resume from."""
    from scalekern.demo.data import InputError

    try:
        return _run(args)
    except InputError as error:
        print(f"scalekern demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = (pathlib.Path(args.out) / CHECKPOINT).exists()
        how = f"go on from the saved training with: {_resume_command(args)}" if saved else "nothing was saved yet"
        print(f"\nscalekern demo: stopped; {how}", file=sys.stderr)
        return 130


def _resume_command(args) -> str:
    words = ["python -m scalekern demo"]
    for name in ("text", "arch", "device"):
        if getattr(args, name) is not None:
            words.append(f"--{name} {getattr(args, name)}")
    if args.out != OUT:
        words.append(f"--out {args.out}")
    return " ".join([*words, "--resume"])


def _run(args) -> int:
    import torch

    from scalekern.demo import compare, console, data, quantized
    from scalekern.demo.model import ARCHES
    from scalekern.demo.train import Settings

    began = time.monotonic()
    device = _device(args.device)
    if args.steps is not None and args.steps < 1:
        raise data.InputError(f"--steps must be at least 1, got {args.steps}")
    missing = [name for name in ("numpy", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:  # said before the training, not at its first checkpoint
        raise data.InputError(f"checkpoints need {' and '.join(missing)}: pip install {' '.join(missing)}")
    corpus = data.load(args.text, Settings.window)
    out = _folder(args.out)
    say = console.say
    say(f"text      {corpus.name}: {corpus.train.numel():,} bytes to train on, {corpus.held_out.numel():,} held out")
    trainer = _trainer(args, corpus, out / CHECKPOINT, device)
    config, size = trainer.model.config, sum(p.numel() for p in trainer.model.parameters())
    kinds = f"{ARCHES[config.arch]}, H3 and window attention"
    say(f"model     {config.layers} layers of width {config.width}, {kinds}, {size:,} parameters")
    chosen = compare.backends(torch.device(device).type)
    say(f"device    {device}, {torch.get_num_threads()} threads; backends: {', '.join(sorted(set(chosen.values())))}")
    for name, backend in chosen.items():
        if backend == "reference":
            say(f"          {name} has only the slow reference here (python -m scalekern doctor says why)")

    if not _train(trainer, out / CHECKPOINT, adapt=args.steps is None and not args.resume):
        how = f"go on with: {_resume_command(args)}"
        print(f"scalekern demo: stopped and saved after step {trainer.step}; {how}", file=sys.stderr)
        return 130
    final = trainer.curve[-1][1]
    say(f"trained   {trainer.step} steps in {trainer.seconds:.0f} s: {final:.3f} held-out bits per byte")

    results = {
        "text": corpus.name, "digest": corpus.digest, "device": device, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "backends": chosen, "parameters": size,
        "config": dataclasses.asdict(config), "settings": dataclasses.asdict(trainer.settings),
        "training_seconds": trainer.seconds, "held_out_bits_per_byte": final, "held_out_curve": trainer.curve,
        "training_bits_per_byte": trainer.losses,
    }  # fmt: skip
    errors = _generate_and_check(trainer, out, results)
    timings = compare.timings(trainer.model, _windows(trainer), trainer.settings, _is_quick(trainer))
    rows = [[t.case, t.shape, f"{t.scalekern_ms:.2f}", f"{t.pytorch_ms:.2f}", f"{t.speedup:.1f}x"] for t in timings]
    say("\n" + console.table(["milliseconds", "size", "scalekern", "plain PyTorch", "ratio"], rows))
    say(
        "(plain PyTorch: the reference backend, whose scan is a loop over time "
        "and whose attention computes every score)\n"
    )
    results["timings"] = [{**dataclasses.asdict(t), "speedup": t.speedup} for t in timings]
    formats = _quantize(trainer, results)
    say(console.table(quantized.HEADER, quantized.rows(formats)) + "\n")
    results["total_seconds"] = time.monotonic() - began
    _write(out / "results.json", json.dumps(results, indent=1))
    _plot(trainer, timings, formats, out / "demo.png")
    say(f"results   {out / 'results.json'}; {results['total_seconds']:.0f} s in all")
    return 1 if errors else 0


def _device(name: str | None) -> str:
    import torch

    from scalekern.demo.data import InputError

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # which the meta device does not do
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"--device {name}: cannot be used ({reason})") from None
    return name


def _folder(name: str) -> pathlib.Path:
    from scalekern.demo.data import InputError

    out = pathlib.Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {name}: cannot be made a folder ({error.strerror})") from None
    if not os.access(out, os.W_OK | os.X_OK):  # said before the training, not after it
        raise InputError(f"--out {name}: cannot be written to")
    if (out / CHECKPOINT).is_dir():
        raise InputError(f"--out {name}: {CHECKPOINT} in it is a folder, where the checkpoint has to be")
    return out


def _trainer(args, corpus, checkpoint: pathlib.Path, device: str):
    from scalekern.demo import console
    from scalekern.demo.data import InputError
    from scalekern.demo.model import Config
    from scalekern.demo.train import Settings, Trainer

    if args.resume:
        trainer = Trainer.resume(checkpoint, corpus, args.steps, device)
        if args.arch not in (None, trainer.model.config.arch):
            raise InputError(f"{checkpoint} was trained with --arch {trainer.model.config.arch}, not {args.arch}")
        console.say(f"resumed   after step {trainer.step} of {trainer.settings.steps}")
        return trainer
    if checkpoint.exists():
        console.say(f"          starting over: {checkpoint} will be replaced (--resume would go on from it)")
    settings = Settings() if args.steps is None else Settings(steps=args.steps)
    return Trainer(corpus, Config(arch=args.arch or "mamba"), settings, device)


def _train(trainer, checkpoint: pathlib.Path, adapt: bool) -> bool:
    """Train to the end, saving now and then; False when Ctrl-C asked for a stop (the checkpoint is saved)."""
    from scalekern.demo import console
    from scalekern.demo.train import StopRequest

    saved = time.monotonic()
    with StopRequest() as stop, console.progress(trainer.settings.steps, trainer.step) as progress:
        if not trainer.curve:
            trainer.evaluate()
        while trainer.step < trainer.settings.steps and not stop.asked:
            trainer.train_step()
            if adapt and trainer.fit_time_limit():
                steps = trainer.settings.steps
                progress.say(f"          {steps} steps will fit the time limit here (--steps N insists on N)")
            if trainer.evaluation_due():
                trainer.evaluate()
            progress.update(trainer.step, trainer.settings.steps, trainer.status())
            if time.monotonic() - saved > SAVE_EVERY_S:
                trainer.save(checkpoint)
                saved = time.monotonic()
        if trainer.step == trainer.settings.steps and trainer.curve[-1][0] != trainer.step:
            trainer.evaluate()  # a resumed run that was asked for no more steps
        trainer.save(checkpoint)
    return not stop.asked or trainer.step == trainer.settings.steps


def _is_quick(trainer) -> bool:
    """A trial run of a few steps: the comparison is as short."""
    return trainer.settings.steps < 50


def _windows(trainer):
    """One batch of held-out windows as large as a training batch: (B, L + 1)."""
    return trainer.held_out[: trainer.settings.batch].to(trainer.device)


def _generate_and_check(trainer, out: pathlib.Path, results: dict) -> list[str]:
    """Print and save a sample, then compare logits with the reference; the checks that failed."""
    from scalekern.demo import compare, console
    from scalekern.demo.model import generate

    model, say = trainer.model.eval(), console.say
    prompt = trainer.held_out[:1, :PROMPT].to(trainer.device)
    count = 32 if _is_quick(trainer) else SAMPLE
    tokens, logits = generate(model, prompt, count, temperature=TEMPERATURE, seed=trainer.settings.seed)
    before, after = (console.printable(bytes(t[0].tolist())) for t in (prompt, tokens))
    say(f"\n--- {PROMPT} held-out bytes, then {count} generated ones ---\n{before}[>]{after}\n---\n")
    _write(out / "sample.txt", before + after)

    found = {
        "logits": compare.logits_error(model, _windows(trainer)[:2, :-1]),
        "decode_logits": compare.decode_error(model, prompt, tokens, logits),
    }
    failed = [name for name, error in found.items() if not error <= compare.LOGITS_TOLERANCE]
    for name, label in (("logits", "whole windows"), ("decode_logits", "byte by byte")):
        verdict = "DISAGREE with" if name in failed else "agree with"
        say(
            f"logits    {label}: {verdict} plain PyTorch's, relative error {found[name]:.1e}"
            f" (at most {compare.LOGITS_TOLERANCE:.0e})"
        )
    results.update(relative_errors=found, tolerance=compare.LOGITS_TOLERANCE, sample=after)
    return failed


def _quantize(trainer, results: dict) -> list:
    from scalekern.demo import quantized

    windows = trainer.held_out.to(trainer.device)
    found = quantized.variants(trainer.model, windows[:2] if _is_quick(trainer) else windows, _is_quick(trainer))
    results["quantized"] = [dataclasses.asdict(v) for v in found]
    return found


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plot(trainer, timings, formats, path: pathlib.Path) -> None:
    from scalekern.demo import console, plot
    from scalekern.demo.model import ARCHES

    config = trainer.model.config
    title = (
        f"Byte-level {ARCHES[config.arch]} / H3 / attention, {config.layers} layers of width {config.width}, "
        f"on {trainer.device}: {trainer.curve[-1][1]:.2f} held-out bits per byte after {trainer.seconds:.0f} s"
    )
    try:
        plot.draw(path, trainer.losses, trainer.curve, timings, formats, title)
        console.say(f"figure    {path}")
    except ImportError:
        console.say("figure    none: matplotlib is not installed (pip install matplotlib)")
