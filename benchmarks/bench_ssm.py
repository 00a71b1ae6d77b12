"""Cases of the state space models: their convolution kernels and recurrence, against what a model writes without them.

Shape letters: B batch, H heads, N states (halves of conjugate pairs), L length.
"""

import functools

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.reference.diag_ssm import discretize
from scalekern.testing import TOLERANCE, upcast

FP32 = torch.float32
KERNEL_OPS = ("diag_ssm_kernel_fwd", "diag_ssm_kernel_bwd")
LOW_RANK_OPS = ("dplr_ssm_kernel_fwd", "dplr_ssm_kernel_bwd")
OPS = ("diag_ssm_fwd", "diag_ssm_bwd")
NAIVE = "2 Re (C B exp(A dt l)).sum(1)"
CONV = "kernel, then torch.fft"


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def model(device, H, N, low_rank=False) -> list:
    """(A, B, C, dt) of S4D-Lin, or (Lambda, P, B, C, dt), with dt from 1e-3 to 1e-1."""
    randn = normal(device, 0)
    pair = lambda scale=1.0: torch.complex(randn(H, N) * scale, randn(H, N) * scale)
    A = torch.complex(torch.full((H, N), -0.5), torch.pi * torch.arange(N).float().expand(H, N)).to(device)
    dt = torch.exp(torch.linspace(-6.9, -2.3, H)).to(device)
    return [A, *([pair(0.5)] if low_rank else []), pair(), pair(), dt]


def naive_kernel(A, B, C, dt, L):
    """S4D's kernel as its paper writes it, by way of one (H, N, L) tensor."""
    z = dt[:, None] * A
    powers = torch.exp(z[..., None] * torch.arange(L, device=A.device))
    return 2 * ((C * B * (torch.exp(z) - 1) / A)[..., None] * powers).sum(1).real


def work(function, rivals, leaves, train, tolerance_of, dout_shape, device, **costs) -> Work:
    """function(package, *leaves) by scalekern, by the reference in float64, and each rival by itself."""
    dout = normal(device, 1)(*dout_shape)
    leaves = [x.requires_grad_(train) for x in leaves]
    exact = [upcast(x).requires_grad_(train) for x in leaves]

    def passes(call, inputs, dout):
        return peers.forward_backward(lambda: call(*inputs), dout, tuple(inputs)) if train else lambda: call(*inputs)

    def oracle():
        found = passes(functools.partial(function, reference), exact, dout.double())()
        return tuple(t.detach() for t in found) if train else (found,)

    against = {name: passes(rival, leaves, dout) for name, rival in rivals.items()}
    return Work(
        run=passes(functools.partial(function, scalekern), leaves, dout), oracle=oracle,
        tolerance=gradient_tolerance(tolerance_of, FP32) if train else TOLERANCE[FP32],
        peers={name: functools.partial(peers.torch_peer, run) for name, run in against.items()}, **costs,
    )  # fmt: skip


def diagonal(device, dtype=FP32, *, train, rivals=True, H, N, L) -> Work:
    call = lambda package, *tensors: package.diag_ssm_kernel(*tensors, L)
    naive = {NAIVE: lambda *tensors: naive_kernel(*tensors, L)} if rivals else {}
    return work(call, naive, model(device, H, N), train, "diag_ssm_kernel", (H, L), device,
                bytes_moved=(3 if train else 1) * 4 * H * L, flops=(3 if train else 1) * 4 * H * N * L)  # fmt: skip


def low_rank(device, dtype=FP32, *, train, H, N, L) -> Work:
    call = lambda package, *tensors: package.dplr_ssm_kernel(*tensors, L, C_is_truncated=True)
    rival = {"in complex128, by blocks": functools.partial(call, reference)}
    # Of a pair and a root: some 20 operations, and 4 multiply-adds for each of 4 products; backward three times that.
    flops = (4 if train else 1) * 52 * H * N * L // 2
    return work(call, rival, model(device, H, N, True), train, "dplr_ssm_kernel", (H, L), device,
                bytes_moved=(3 if train else 1) * 4 * H * L, flops=flops)  # fmt: skip


def recurrence(device, dtype=FP32, *, train, B, H, N, L) -> Work:
    randn = normal(device, 2)
    inputs = [randn(B, H, L), *model(device, H, N)[:3], randn(H), model(device, H, N)[3]]

    def convolved(package, u, A, B_, C, D, dt):
        if package is scalekern:
            return package.diag_ssm(u, A, B_, C, D, dt)
        kernel = package.diag_ssm_kernel(A, B_, C, dt, L)  # the tests hold it to the recurrence
        return plain(u, kernel) + D[:, None] * u

    rival = lambda u, A, B_, C, D, dt: plain(u, naive_kernel(A, B_, C, dt, L)) + D[:, None] * u
    flops = 4 * H * N * L + int(5 * B * H * L * torch.tensor(2.0 * L).log2().item())
    return work(convolved, {CONV: rival}, inputs, train, "diag_ssm", (B, H, L), device,
                bytes_moved=(5 if train else 2) * 4 * B * H * L, flops=(3 if train else 1) * flops)  # fmt: skip


def plain(u, kernel):
    size = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(kernel, size), size)[..., : u.shape[-1]]


def step(device, dtype=FP32, *, discrete=False, B, H, N) -> Work:
    """One token, from a state; `discrete`, from coefficients made before."""
    randn = normal(device, 2)
    u, D, (A, B_, C, dt) = randn(B, H, 1), randn(H), model(device, H, N)
    x = torch.complex(randn(B, H, N), randn(B, H, N))
    a, b = (t.to(x.dtype) for t in discretize(A, B_, dt, "zoh"))

    made = (A, B_, dt) if not discrete else (*scalekern.diag_ssm_discretize(A, B_, dt), None)

    def run(package=scalekern, u=u, A=made[0], B_=made[1], C=C, D=D, dt=made[2], x=x):
        return package.diag_ssm(u, A, B_, C, D, dt, initial_state=x, return_last_state=True)

    def rival():
        after = a * x + b * u
        return 2 * (C * after).sum(-1, keepdim=True).real + D[:, None] * u, after

    return Work(
        run=run, oracle=lambda: run(reference, *map(upcast, (u, *made[:2], C, D, made[2], x))),
        tolerance=TOLERANCE[FP32],
        bytes_moved=16 * B * H * N, flops=16 * B * H * N,
        peers={"discretized before": lambda: peers.torch_peer(rival)},
    )  # fmt: skip


_FAST = ("cuda", "cpu")
_KERNEL, _LOW_RANK = {"H": 256, "N": 64, "L": 16384}, {"H": 64, "N": 32, "L": 8192}
_LAYER = {"B": 4, "H": 256, "N": 32, "L": 4096}
_TOKEN = {"B": 1, "H": 512, "N": 32}
_both = lambda build: [(functools.partial(build, train=train), train) for train in (False, True)]
CPU = [
    *(case("ssm_kernel", build, KERNEL_OPS[: 1 + train], "fwd+bwd" if train else "fwd", "cpu", 36, _KERNEL,
           backends=_FAST, targets={NAIVE: 30})
      for build, train in _both(diagonal)[:1]),
    *(case("ssm_kernel", functools.partial(build, rivals=False), KERNEL_OPS, "fwd+bwd", "cpu", 88, _KERNEL,
           backends=_FAST)
      for build, train in _both(diagonal)[1:]),
    *(case("s4_kernel", build, LOW_RANK_OPS[: 1 + train], "fwd+bwd" if train else "fwd", "cpu", 89, _LOW_RANK,
           backends=_FAST)
      for build, train in _both(low_rank)),
    *(case("diag_ssm", build, OPS[: 1 + train], "fwd+bwd" if train else "fwd", "cpu", 90, _LAYER, backends=_FAST)
      for build, train in _both(recurrence)),
    *(case("diag_ssm", functools.partial(step, discrete=discrete), OPS[:1], "step", "cpu", 91, _TOKEN, note=note,
           backends=_FAST)
      for note, discrete in (("", False), ("discretized", True))),
]  # fmt: skip
CUDA = [
    *(case("ssm_kernel", functools.partial(build, rivals=False), KERNEL_OPS[: 1 + train],
           "fwd+bwd" if train else "fwd", "cuda", 99, {**_KERNEL, "H": 1024}, backends=_FAST)
      for build, train in _both(diagonal)),
    *(case("s4_kernel", build, LOW_RANK_OPS[: 1 + train], "fwd+bwd" if train else "fwd", "cuda", 99,
           {**_LOW_RANK, "H": 512}, backends=_FAST)
      for build, train in _both(low_rank)),
]  # fmt: skip
CASES = [*CPU, *CUDA]
