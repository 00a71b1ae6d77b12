"""Cases of the Hadamard transforms: what they cost beside a copy of the same bytes and a product with the dense matrix.

Shape letters: M rows, K points of a row.
"""

import itertools

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, normal
from scalekern.benchmarks.case import Work
from scalekern.reference.hadamard_transform import base_matrix, factor, hadamard_matrix
from scalekern.testing import TOLERANCE

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DENSE_BYTES = 2**28  # of a matrix that is worth making


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def copy(x) -> peers.Peer:
    """Reads and writes what a transform does; its values are not compared."""
    out = torch.empty_like(x)

    def run():
        out.copy_(x)

    return peers.torch_peer(run)


def clone(x) -> peers.Peer:
    """A copy that makes its output, as the transform does."""
    return peers.torch_peer(lambda: (x.clone(), None)[1])


def dense(x, scale) -> peers.Peer:
    if x.shape[-1] > 2048:
        raise peers.Absent("its product takes seconds")
    n = x.shape[-1]
    if n * n * x.element_size() > DENSE_BYTES:
        raise peers.Absent(f"the matrix of {n} points has more than {DENSE_BYTES >> 20} MiB")
    H = (hadamard_matrix(n)[:n, :n].to(x.device, torch.float32) * scale).to(x.dtype)
    return peers.torch_peer(lambda: x @ H.mT)


def additions(n: int) -> int:
    """Of a row: k stages of butterflies, and a product with H_m."""
    m, k = factor(n, 0)
    return n * (k + len(base_matrix(m, "quarot")) - 1) + n


def transform(device, dtype=FP32, *, M, K) -> Work:
    x, scale = normal(device, 0)(M, K).to(dtype), K**-0.5
    return Work(
        run=lambda: scalekern.hadamard_transform(x, scale),
        oracle=lambda: (reference.hadamard_transform(x.double(), scale),),
        tolerance=TOLERANCE[dtype], bytes_moved=2 * x.numel() * dtype.itemsize, flops=M * additions(K),
        peers={"copy": lambda: copy(x), "copy to a new tensor": lambda: clone(x),
               "dense matmul": lambda: dense(x, scale)},
    )  # fmt: skip


def quantize(device, dtype=FP32, *, M, K) -> Work:
    """Compared as q times scales, whose error is half a step; the peer does the same in three passes of torch's."""
    x, scale = normal(device, 0)(M, K).to(dtype), K**-0.5

    def dequantized():
        q, scales = scalekern.fused_hadamard_quantize(x, scale)
        return q.double() * scales

    def apart():
        y = scalekern.hadamard_transform(x, scale).float()
        scales = y.abs().amax(-1, keepdim=True) / 127
        (y / scales).round().to(torch.int8)

    return Work(
        run=lambda: scalekern.fused_hadamard_quantize(x, scale), sample=dequantized,
        oracle=lambda: (reference.hadamard_transform(x.double(), scale),), tolerance=2e-2,
        bytes_moved=x.numel() * (dtype.itemsize + 1) + 4 * M, flops=M * (additions(K) + 4 * K),
        peers={"copy": lambda: copy(x), "transform, then torch": lambda: peers.torch_peer(apart)},
    )  # fmt: skip


# ---- the list ----------------------------------------------------------------------------------------------------

_OPS, _QUANTIZE = ("hadamard_transform_fwd",), ("fused_hadamard_quantize",)
_FAST = ("triton", "cpu")  # the reference's products are no contender
_SIZES = (64, 128, 1024, 3072, 4096, 8192)
# What the floor is judged by returns a new tensor as the transform does, and of a size that malloc keeps for the next
# one (up to 32 MiB), beyond a core's own caches. A larger one is fresh memory each time, whose page faults take the
# system longer than both; "copy" then does another job, since it writes into memory that is there.
_WITHIN, _KEPT = {"copy to a new tensor": 0.5}, 24 * 2**20


def _cases(device: str, points: int, sizes, dtypes, priority: int, targets: dict) -> list:
    """Of `points` in all, so that no cache of a CPU or a GPU holds them."""
    return [
        case("hadamard", transform, _OPS, "fwd", device, priority + i, {"M": points // n, "K": n}, dtype,
             backends=_FAST, targets=targets)
        for i, (n, dtype) in enumerate(itertools.product(sizes, dtypes))
    ]  # fmt: skip


CPU = [
    *(c for dtype in (FP32, BF16, FP16)
      for c in _cases("cpu", _KEPT // dtype.itemsize, _SIZES, (dtype,), 60, _WITHIN)),
    *_cases("cpu", 2**24, _SIZES, (FP32, BF16), 70, {}),
    case("hadamard_quantize", quantize, _QUANTIZE, "fwd", "cpu", 85, {"M": 4096, "K": 4096}, BF16, backends=_FAST),
]  # fmt: skip
CUDA = [
    *_cases("cuda", 2**27, (256, 1024, 4096, 8192, 14336), (BF16, FP32), 60, {"limit": 0.85}),
    case("hadamard_quantize", quantize, _QUANTIZE, "fwd", "cuda", 75, {"M": 32768, "K": 4096}, BF16, backends=_FAST),
]
CASES = [*CPU, *CUDA]
