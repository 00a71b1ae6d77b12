"""Cases of Mamba-2's scan.

Shape letters: B batch, L length, H heads, P head dim, G groups, N states.
"""

import functools
import importlib

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE

FP32, BF16 = torch.float32, torch.bfloat16
OPS = ("ssd_scan_fwd", "ssd_scan_bwd")
CHUNK = 64  # of the least arithmetic: what is paid for pairs within chunks is no more than for states


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def inputs(device, dtype, B, L, H, P, G, N) -> dict:
    randn = normal(device, 0)
    return {
        "x": randn(B, L, H, P).to(dtype), "dt": (randn(B, L, H) - 1).to(dtype), "A": -randn(H).abs() - 0.1,
        "B": randn(B, L, G, N).to(dtype), "C": randn(B, L, G, N).to(dtype), "D": randn(H),
    }  # fmt: skip


def in_float64(kw: dict) -> torch.Tensor:
    """By our own chunks in float64, which the tests hold to the recurrence: that takes minutes at this size."""
    with scalekern.backend("cpu" if kw["x"].device.type == "cpu" else "cuda"):
        return scalekern.ssd_scan(**{k: v.double() for k, v in kw.items()}, dt_softplus=True)


def transformers_scan(kw: dict) -> peers.Peer:
    try:
        modeling = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    except ImportError:
        raise peers.Absent("transformers is not installed")
    plain = modeling.mamba2_chunk_scan
    return peers.Peer(lambda: plain(**{_NAMES.get(k, k): v for k, v in kw.items()}, chunk_size=256, dt_softplus=True),
                      f"transformers {peers.version('transformers')}")  # fmt: skip


_NAMES = {"x": "hidden_states"}


def mamba_ssm_scan(kw: dict) -> peers.Peer:
    if kw["x"].device.type != "cuda":
        raise peers.Absent("mamba_ssm needs a CUDA device")
    upstream = peers.module("mamba_ssm.ops.triton.ssd_combined", "mamba_ssm")
    run = lambda: upstream.mamba_chunk_scan_combined(**kw, chunk_size=256, dt_softplus=True)
    return peers.Peer(run, peers.version("mamba_ssm"))


def scan(device, dtype=FP32, *, train, **shape) -> Work:
    kw = inputs(device, dtype, **shape)
    B, L, H, P, G, N = (shape[k] for k in "BLHPGN")
    leaves = tuple(v.requires_grad_(train) for v in kw.values())
    dout = normal(device, 1)(B, L, H, P).to(dtype)
    wide = {k: v.detach().double().requires_grad_(train) for k, v in kw.items()}
    passes = lambda f, leaves=leaves, dout=dout: peers.forward_backward(f, dout, leaves) if train else f
    small = B * L * H * P * N < 1e5
    plain = lambda: reference.ssd_scan(**wide, dt_softplus=True) if small else in_float64(wide)
    exact = passes(plain, tuple(wide.values()), dout.double())

    def against(build):
        peer = build(kw)
        return peers.Peer(passes(peer.run), peer.version)

    # Forward: x, out, dt, B and C once; C B^T, its product with x, and a state in and out of each chunk. Backward
    # beside: what the forward reads and its gradients, dout; two products for each, dY x^T, and the states once more.
    tokens = B * L
    flops = 2 * tokens * (G * CHUNK * N + H * CHUNK * P + 2 * H * P * N)
    bytes_moved = tokens * (2 * H * P + H + 2 * G * N) * dtype.itemsize
    if train:
        flops += 2 * tokens * (3 * G * CHUNK * N + 2 * H * CHUNK * P + 6 * H * P * N)
        bytes_moved += tokens * (3 * H * P + 2 * H + 4 * G * N) * dtype.itemsize
    return Work(
        run=passes(lambda: scalekern.ssd_scan(**kw, dt_softplus=True)),
        oracle=lambda: tuple(t.detach() for t in exact()) if train else (exact(),),
        tolerance=gradient_tolerance("ssd_scan", dtype) if train else TOLERANCE[dtype],
        bytes_moved=bytes_moved, flops=flops, exponentials=(2 if train else 1) * tokens * H * CHUNK // 2,
        peers={"transformers mamba2_chunk_scan": lambda: against(transformers_scan),
               "mamba_ssm": lambda: against(mamba_ssm_scan)},
    )  # fmt: skip


_SCAN, _TRAIN = (functools.partial(scan, train=train) for train in (False, True))
_LAYER = {"B": 1, "L": 2048, "H": 24, "P": 64, "G": 1, "N": 128}
_LARGE = {"B": 1, "L": 16384, "H": 128, "P": 64, "G": 1, "N": 128}
_FEW_HEADS = {"B": 1, "L": 16384, "H": 24, "P": 64, "G": 1, "N": 128}
_MILLION = {"B": 1, "L": 2**20 + 64, "H": 8, "P": 64, "G": 1, "N": 128}  # its products in float64 fit beside it
_FAST = ("cuda", "triton", "cpu")  # the reference is a loop over time
_TARGET = {"transformers mamba2_chunk_scan": 3}

CPU = [
    case("ssd", _SCAN, OPS[:1], "fwd", "cpu", 46, _LAYER, backends=_FAST, targets=_TARGET),
    case("ssd", _TRAIN, OPS, "fwd+bwd", "cpu", 47, _LAYER, backends=_FAST, targets=_TARGET),
]

CUDA = [
    case("ssd", _SCAN, OPS[:1], "fwd", "cuda", 40, _LARGE, BF16, backends=_FAST, targets={"mamba_ssm": 2}),
    case("ssd", _TRAIN, OPS, "fwd+bwd", "cuda", 41, _LARGE, BF16, backends=_FAST, targets={"mamba_ssm": 1.5}),
    case("ssd", _SCAN, OPS[:1], "fwd", "cuda", 42, _FEW_HEADS, BF16, backends=_FAST, targets={"mamba_ssm": 2}),
    case("ssd", _TRAIN, OPS, "fwd+bwd", "cuda", 43, _FEW_HEADS, BF16, backends=_FAST, targets={"mamba_ssm": 1.5}),
    case("ssd", _SCAN, OPS[:1], "fwd", "cuda", 44, _MILLION, BF16, backends=_FAST),
]

CASES = [*CPU, *CUDA]
