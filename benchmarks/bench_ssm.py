"""Cases of the state space kernels.

Shape letters: B batch, H heads, N states, L length.
"""

import functools

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import FP32, case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE

NAIVE = "naive complex64 sum"
KERNEL_OPS = ("diag_ssm_kernel_fwd", "diag_ssm_kernel_bwd")
DPLR_OPS = ("dplr_ssm_kernel_fwd", "dplr_ssm_kernel_bwd")
SSM_OPS = ("diag_ssm_fwd", "diag_ssm_bwd")


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def work(op, function, oracle, leaves, dout, train, *, flops, bytes_moved, rivals) -> Work:
    """A forward, or with `train` a forward and backward, of function(*leaves) against oracle(*leaves in float64).

    rivals: {name: function(*leaves)}.
    """
    wide = [x.detach().to(torch.complex128 if x.is_complex() else torch.float64) for x in leaves]
    for x in (*leaves, *(wide if train else ())):
        x.requires_grad_(train)

    def passes(f, at, dout):
        call = functools.partial(f, *at)
        return peers.forward_backward(call, dout, tuple(at)) if train else call

    exact = passes(oracle, wide, dout.double())
    return Work(
        run=passes(function, leaves, dout),
        oracle=lambda: tuple(x.detach() for x in exact()) if train else (exact(),),
        tolerance=gradient_tolerance(op, FP32) if train else TOLERANCE[FP32],
        bytes_moved=(3 if train else 1) * bytes_moved, flops=(3 if train else 1) * flops,
        peers={name: functools.partial(peers.torch_peer, passes(f, leaves, dout)) for name, f in rivals.items()},
    )  # fmt: skip


def diagonal(randn, H, N):
    """(A, B, C, dt): eigenvalues as S4D-Lin has them."""
    A = torch.complex(torch.full((H, N), -0.5), torch.pi * torch.arange(N).expand(H, N).float()).to(randn(1).device)
    B, C = (torch.complex(randn(H, N), randn(H, N)) for _ in "BC")
    return A, B, C, torch.exp(randn(H) - 5)


def kernel(device, dtype=FP32, *, H, N, L, train=False) -> Work:
    """S4D's kernel against the (H, N, L) sum that its paper's listing is."""
    randn = normal(device, 0)
    parameters = diagonal(randn, H, N)

    def naive(A, B, C, dt):
        z = dt[:, None] * A
        w = C * B * (torch.exp(z) - 1) / A
        return 2 * (w[..., None] * torch.exp(z[..., None] * torch.arange(L, device=device))).sum(1).real

    return work(
        "diag_ssm_kernel", lambda *p: scalekern.diag_ssm_kernel(*p, L), lambda *p: reference.diag_ssm_kernel(*p, L),
        parameters, randn(H, L), train, flops=4 * H * N * L, bytes_moved=4 * H * L, rivals={NAIVE: naive},
    )  # fmt: skip


def dplr(device, dtype=FP32, *, H, N, L, train=False) -> Work:
    """S4's kernel."""
    randn = normal(device, 0)
    A, B, C, dt = diagonal(randn, H, N)
    P = torch.complex(randn(H, N), randn(H, N)) / 4
    function = lambda package: lambda *p: package.dplr_ssm_kernel(*p, L, C_is_truncated=True)
    return work(
        "dplr_ssm_kernel", function(scalekern), function(reference), (A, P, B, C, dt), randn(H, L), train,
        flops=4 * 8 * H * N * L // 2, bytes_moved=4 * H * L, rivals={"the reference": function(reference)},
    )  # fmt: skip


def ssm(device, dtype=FP32, *, B, H, N, L, train=False) -> Work:
    """A diagonal model over a sequence, against its kernel and an FFT convolution by hand."""
    randn = normal(device, 0)
    A, b, C, dt = diagonal(randn, H, N)
    leaves, dout = (randn(B, H, L), A, b, C, randn(H), dt), randn(B, H, L)

    def by_convolution(u, A, b, C, D, dt):
        k = scalekern.diag_ssm_kernel(A, b, C, dt, L)
        return torch.fft.irfft(torch.fft.rfft(u, 2 * L) * torch.fft.rfft(k, 2 * L))[..., :L] + D[:, None] * u

    return work(
        "diag_ssm", scalekern.diag_ssm, reference.diag_ssm, leaves, dout, train, flops=8 * B * H * N * L,
        bytes_moved=8 * B * H * L, rivals={"kernel and irfft(rfft(u) * rfft(k))": by_convolution},
    )  # fmt: skip


_FAST = ("cuda", "triton", "cpu")
_SHAPES = {
    "cpu": ({"H": 256, "N": 64, "L": 16384}, {"H": 256, "N": 32, "L": 1024}, {"B": 2, "H": 256, "N": 16, "L": 512}),
    "cuda": ({"H": 1024, "N": 64, "L": 16384}, {"H": 1024, "N": 32, "L": 4096}, {"B": 8, "H": 1024, "N": 16, "L": 2048}),
}  # fmt: skip


def both(name, build, ops, device, priority, shape, targets=None):
    train = functools.partial(build, train=True)
    return [
        case(name, build, ops[:1], "fwd", device, priority, shape, backends=_FAST, targets=targets or {}),
        case(name, train, ops, "fwd+bwd", device, priority + 1, shape, backends=_FAST),
    ]


_KINDS = (
    ("diag_ssm_kernel", kernel, KERNEL_OPS, {NAIVE: 30}),
    ("dplr_ssm_kernel", dplr, DPLR_OPS, None),
    ("diag_ssm", ssm, SSM_OPS, None),
)
CASES = [
    c
    for device, first in (("cpu", 60), ("cuda", 100))
    for i, (shape, (name, build, ops, targets)) in enumerate(zip(_SHAPES[device], _KINDS))
    for c in both(name, build, ops, device, first + 2 * i, shape, targets)
]
