"""`python -m scalekern tune`: search Triton configurations on this GPU and keep the best in the user's cache.

What is tuned is what the benchmark cases of this GPU launch. A configuration whose result does not agree with the
oracle is never timed.
"""

import math


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


def tune_case(case, device, **options) -> None:
    """Each kernel that the case launches with one key, one after the other. options: for tuning.tune."""
    from triton.testing import do_bench

    from scalekern import _dispatch
    from scalekern.benchmarks import harness
    from scalekern.triton_kernels import tuning

    work = case.build(device)
    expected = work.oracle()
    time = options.pop("time_ms", lambda call: do_bench(call, return_mode="median"))

    def time_if_right(call) -> float:
        try:
            harness.check(work, "triton", expected)
        except harness.WrongResult:
            return math.inf
        return time(call)

    call = harness.under("triton", work.run)
    for kernel in tuning.CANDIDATES:
        try:
            if len(keys_of(kernel, call)) != 1:
                continue  # not launched, or launched on several shapes, which cannot be timed apart
        except _dispatch.BackendError as error:
            print(f"{case.name}: not tuned: {error}", flush=True)
            return
        key, times = tuning.tune(kernel, call, device, time_ms=time_if_right, **options)
        best, ms = times[0]
        print(f"{case.name}: {kernel} {key}: {best}, {ms:.4g} ms; {len(times)} configurations ran", flush=True)


def keys_of(kernel: str, call) -> set[str]:
    """The keys under which a call asks for this kernel's configuration."""
    from scalekern.triton_kernels import tuning

    keys: set[str] = set()
    token = tuning._trial.set((kernel, {}, keys))
    try:
        call()
    finally:
        tuning._trial.reset(token)
    return keys
