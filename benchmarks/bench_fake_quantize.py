"""Cases of fake_quantize: what a step of quantization-aware training adds to a weight.

Shape letters: N outputs, K inputs.
"""

import functools

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE

FP32 = torch.float32
OPS = ("fake_quantize_fwd", "fake_quantize_bwd")


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def learned_steps(device, dtype=FP32, *, bits, train=False, N, K) -> Work:
    """A weight with a step a row."""
    weight = (normal(device, 0)(N, K) / K**0.5).to(dtype)
    scale = 1.5 * weight.detach().float().abs().amax(-1, keepdim=True) / (1 << bits)
    dout, options = normal(device, 1)(N, K).to(dtype), {"bits": bits}

    def run(package, dtype_of=lambda t: t):
        leaves = tuple(dtype_of(t).detach().requires_grad_(train) for t in (weight, scale))
        call = lambda: package.fake_quantize(*leaves, **options)
        return peers.forward_backward(call, dtype_of(dout), leaves) if train else call

    def torch_peer():
        x, s = (t.detach().requires_grad_(train) for t in (weight, scale.flatten()))
        zero = torch.zeros(N, device=device)
        low = -(1 << (bits - 1))
        call = lambda: torch._fake_quantize_learnable_per_channel_affine(x, s, zero, 0, low, -low - 1, 1.0)
        if not train:
            return peers.Peer(call, f"torch {torch.__version__}")
        both = peers.forward_backward(call, dout, (x, s))
        # Timed only: its gradient of a scale takes x / s in (low - 1/2, low) for inside, the paper's for outside.
        return peers.Peer(lambda: both() and None, f"torch {torch.__version__}")

    exact = run(reference, lambda t: t.double())
    return Work(
        run=run(scalekern),
        oracle=lambda: tuple(t.detach() for t in exact()) if train else (exact(),),
        tolerance=gradient_tolerance("fake_quantize", dtype) if train else TOLERANCE[dtype],
        bytes_moved=(5 if train else 2) * N * K * dtype.itemsize,
        flops=(14 if train else 5) * N * K,
        peers={"torch fake_quantize_learnable": torch_peer},
    )


_SIZES = {"N": 4096, "K": 4096}
_W4 = functools.partial(learned_steps, bits=4)
CASES = [
    case("fake_quantize", _W4, OPS[:1], "fwd", "cpu", 95, _SIZES, note="w4"),
    case("fake_quantize", functools.partial(_W4, train=True), OPS, "fwd+bwd", "cpu", 95, _SIZES, note="w4"),
]
