"""`python -m scalekern tune`: search Triton configurations on this GPU and keep the best in the user's cache.

What is tuned is what the benchmark cases of this GPU launch: each (kernel, key) that they ask a config for. The
candidates are the default and its neighbours, every block size and num_warps halved and doubled; one that does not
agree with the oracle is out before it is timed.
"""

import contextlib
import importlib
import itertools
import json
import pkgutil
from collections.abc import Iterator


def add_arguments(parser) -> None:
    parser.add_argument("--case", metavar="PATTERN", help="only the cases whose name contains this")


def main(args) -> int:
    import torch

    if not torch.cuda.is_available():
        print("tune: torch sees no CUDA device here, and a tuning made elsewhere would be a guess")
        return 1
    try:
        import triton  # noqa: F401
    except ImportError:
        print("tune: Triton is not installed (pip install triton)")
        return 1
    from scalekern.benchmarks import case

    device = torch.device("cuda")
    for one in case.select("cuda", pattern=args.case):
        if one.build is not None and "triton" in one.backends:
            tune_case(one, device)
    return 0


def tune_case(case, device) -> None:
    """Every launch of the case, one after the other, each tuned with the best of those before it."""
    from scalekern import _dispatch
    from scalekern.benchmarks import harness
    from scalekern.triton_kernels import tuning

    work = case.build(device)
    expected = work.oracle()

    def right() -> bool:
        try:
            harness.check(work, "triton", expected)
        except Exception as error:  # a config that is too large, or wrong: either way it is out
            if harness.is_sticky(error):
                raise
            return False
        return True

    try:
        with intercepted({}) as asked:
            harness.check(work, "triton", expected)
    except (_dispatch.BackendError, harness.WrongResult) as error:
        print(f"{case.name}: not tuned: {error}", flush=True)
        return
    run_triton = harness.under("triton", work.run)
    for (kernel, key), default in asked.items():
        chosen: dict = {}
        with intercepted(chosen):

            def run(candidate, kernel=kernel, key=key, chosen=chosen):
                chosen[kernel, key] = candidate
                run_triton()

            candidates = []
            for candidate in neighbours(default):
                chosen[kernel, key] = candidate
                if right():
                    candidates.append(candidate)
            times = tuning.tune(kernel, key, device, candidates, run)
        best = min(times, key=times.get)
        was = times.get(json.dumps(default))
        gain = f"{was / times[best]:.3g}x the default" if was else "the default does not run"
        print(f"{case.name}: {kernel} {key}: {best} {times[best]:.4g} ms, {gain}", flush=True)


def neighbours(default: dict) -> list[dict]:
    """The default, and each size halved, kept and doubled in every combination; the default comes first."""
    choices = [[v] if isinstance(v, bool) or not isinstance(v, int) else sorted({max(v // 2, 1), v, 2 * v}) for v in default.values()]
    found = [dict(zip(default, values)) for values in itertools.product(*choices)]
    return sorted(found, key=lambda c: c != default)


@contextlib.contextmanager
def intercepted(chosen: dict) -> Iterator[dict]:
    """Inside, a launch takes its config from `chosen` where that has one; yields {(kernel, key): config} of the rest."""
    from scalekern import triton_kernels
    from scalekern.triton_kernels import tuning

    asked: dict = {}
    original = tuning.config

    def config(kernel, key, device, default):
        if (kernel, key) in chosen:
            return chosen[kernel, key]
        asked[kernel, key] = original(kernel, key, device, default)
        return asked[kernel, key]

    names = [m.name for m in pkgutil.iter_modules(triton_kernels.__path__)]
    modules = [importlib.import_module(f"scalekern.triton_kernels.{n}") for n in names]
    users = [m for m in modules if getattr(m, "config", None) is original]
    for module in users:
        module.config = config
    try:
        yield asked
    finally:
        for module in users:
            module.config = original
