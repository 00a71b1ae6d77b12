"""Cases of the diagonal recurrence, against a loop over time and torch's associative scan.

Shape letters: B batch, L length, D channels.
"""

import functools

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE

FP32, BF16 = torch.float32, torch.bfloat16
OPS = ("diag_scan_fwd", "diag_scan_bwd")
LOOP, ASSOCIATIVE = "loop over time", "torch associative_scan"


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def loop(a, b, dim):
    h, out = torch.zeros_like(b.select(dim, 0)), []
    for at, bt in zip(a.unbind(dim), b.unbind(dim)):
        h = at * h + bt
        out.append(h)
    return torch.stack(out, dim)


def associative(a, b, dim):
    """Traced, since torch takes it no other way; on a CPU torch has the generic form alone."""
    if b.shape[dim] < 256:
        raise peers.Absent("not worth its compilation at this length")
    from torch._higher_order_ops.associative_scan import associative_scan

    mode = "pointwise" if b.is_cuda and not b.requires_grad else "generic"
    combine = lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1])
    backend = "inductor" if b.is_cuda else "eager"  # inductor's CPU code for the generic form took minutes to compile
    return torch.compile(lambda a, b: associative_scan(combine, (a, b), dim, combine_mode=mode)[1], backend=backend)


def scan(device, dtype=FP32, *, train, dim=1, rivals=(LOOP, ASSOCIATIVE), B, L, D) -> Work:
    """Decays of a trained RG-LRU, 0.9 to 0.999; dim 1: channels last, 2: time last."""
    randn = normal(device, 0)
    shape = (B, L, D) if dim == 1 else (B, D, L)
    a = (0.9 + 0.099 * torch.sigmoid(randn(*shape))).to(dtype).requires_grad_(train)
    b = randn(*shape).to(dtype).requires_grad_(train)
    dout = normal(device, 1)(*shape).to(dtype)
    exact = tuple(t.detach().double().requires_grad_(train) for t in (a, b))
    passes = lambda f, leaves, g: peers.forward_backward(lambda: f(*leaves), g, leaves) if train else lambda: f(*leaves)
    # A loop over a million tokens takes minutes: there the kernel in float64, which the tests hold to the loop.
    package = reference if L <= 1 << 13 else scalekern
    plain = passes(functools.partial(package.diag_scan, dim=dim), exact, dout.double())
    rival = {
        LOOP: lambda: peers.torch_peer(passes(functools.partial(loop, dim=dim), (a, b), dout)),
        ASSOCIATIVE: lambda: peers.torch_peer(passes(associative(a, b, dim), (a, b), dout)),
    }
    elements = B * L * D
    return Work(
        run=passes(functools.partial(scalekern.diag_scan, dim=dim), (a, b), dout),
        oracle=lambda: tuple(t.detach() for t in plain()) if train else (plain(),),
        tolerance=gradient_tolerance("diag_scan", dtype) if train else TOLERANCE[dtype],
        bytes_moved=(8 if train else 3) * elements * dtype.itemsize, flops=(6 if train else 2) * elements,
        peers={name: rival[name] for name in rivals},
    )  # fmt: skip


def cases(device, priority, shape, dtype=FP32, note="", targets=None, **options):
    for train in (False, True):
        yield case(
            "diag_scan", functools.partial(scan, train=train, **options), OPS[: 1 + train],
            "fwd+bwd" if train else "fwd", device, priority, shape, dtype, note=note, backends=("triton", "cpu"),
            targets=targets or {},
        )  # fmt: skip


_LAYER, _ROW = {"B": 1, "L": 2048, "D": 1024}, {"B": 1, "L": 1 << 19, "D": 1}
CPU = [
    *cases("cpu", 48, {**_LAYER, "D": 256}, targets={LOOP: 20, ASSOCIATIVE: 3}),
    *cases("cpu", 48, _LAYER, targets={LOOP: 20, ASSOCIATIVE: 3}),  # bound by memory, as the loop is
    *cases("cpu", 92, _LAYER, note="time_last", dim=2, rivals=()),
    *cases("cpu", 92, _ROW, note="one_row", dim=2, rivals=()),
]
CUDA = [
    *cases("cuda", 48, {"B": 8, "L": 4096, "D": 4096}, BF16, targets={"limit": 0.7}, rivals=()),
    *cases("cuda", 92, {"B": 8, "L": 4096, "D": 4096}, BF16, note="time_last", dim=2, rivals=()),
]
CASES = [*CPU, *CUDA]
