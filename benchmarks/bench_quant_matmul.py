"""Cases of the quant_matmul family.

Shape letters: M tokens, N outputs, K inputs.
"""

import functools

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.quant import quantize
from scalekern.testing import TOLERANCE

FP32, BF16 = torch.float32, torch.bfloat16
OPS = ("quant_matmul_fwd", "quant_matmul_bwd")


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def dense(x, weight, dtype) -> peers.Peer:
    x, weight = x.to(dtype), weight.to(dtype)
    return peers.torch_peer(lambda: torch.nn.functional.linear(x, weight))


def matmul(device, dtype, M, N, K, *, format, group_size, activation=None, train=False, **options) -> Work:
    """One product; the weight's bytes are read once, however few the tokens."""
    randn = normal(device, 0)
    x = randn(M, K).to(dtype).requires_grad_(train)
    w = quantize(randn(N, K) / K**0.5, format, group_size=group_size, **options)
    weight, dout = w.dequantize(FP32), normal(device, 1)(M, N).to(dtype)
    wide = x.detach().double().requires_grad_(train)

    def passes(function, x, dout):
        return peers.forward_backward(function, dout, (x,)) if train else function

    call = lambda package, x: lambda: package.quant_matmul(x, w, activation=activation)
    exact = passes(call(reference, wide), wide, dout.double())
    return Work(
        run=passes(call(scalekern, x), x, dout),
        oracle=lambda: tuple(t.detach() for t in exact()) if train else (exact(),),
        tolerance=gradient_tolerance("quant_matmul", dtype) if train else TOLERANCE[dtype],
        bytes_moved=(2 if train else 1) * (w.nbytes + (M * K + M * N) * dtype.itemsize),
        flops=(2 if train else 1) * 2 * M * N * K,
        peers={} if train or activation else {
            "dense float32": lambda: dense(x, weight, FP32),
            "dense bfloat16": lambda: peers.Peer(dense(x, weight, BF16).run, f"torch {torch.__version__}"),
        },
    )  # fmt: skip


_SIZES = {"N": 4096, "K": 4096}
_W4 = functools.partial(matmul, format="int4", group_size=128)
_FAST = ("cuda", "triton", "cpu")

CPU = [
    case("qmm", _W4, OPS[:1], "fwd", "cpu", 45, {"M": M, **_SIZES}, backends=_FAST, note="w4g128") for M in (1, 16, 128)
] + [case("qmm", functools.partial(_W4, train=True), OPS, "fwd+bwd", "cpu", 90, {"M": 128, **_SIZES}, backends=_FAST, note="w4g128")]  # fmt: skip

CUDA: list = []

CASES = [*CPU, *CUDA]
