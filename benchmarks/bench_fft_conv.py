"""Cases of the fft_conv family: what is timed, on which shapes, against whom, and what it must cost at least.

Shape letters: B batch, D channels, L length (and taps of the filter).
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F

import scalekern
from scalekern import _dispatch, reference
from scalekern.benchmarks import harness, memory, peers
from scalekern.benchmarks.bench_selective_scan import BF16, FP32, case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE

OPS = ("fft_conv_fwd", "fft_conv_bwd")
SPECTRUM_OPS = ("fft_conv_fwd", "fft_conv_spectrum")
TOEPLITZ_OPS = ("toeplitz_conv_fwd", "toeplitz_conv_bwd")
PLAIN = "irfft(rfft(u) * rfft(k))"


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def plain_fft_conv(u, k, pregate=None, postgate=None):
    """What a model without this package writes."""
    size = 2 * u.shape[-1]
    u = u if pregate is None else u * pregate
    product = torch.fft.rfft(u.float(), n=size) * torch.fft.rfft(k, n=size)
    y = torch.fft.irfft(product, n=size)[..., : u.shape[-1]].to(u.dtype)
    return y if postgate is None else y * postgate


def exact(u, k, gates, dout, passes, channels=64) -> tuple:
    """The outputs in float64, a few channels at a time: all at once would take a GPU's whole memory.

    Those of half precision are kept in float32, which is exact enough for them, in half of the memory.
    """
    kept = torch.float64 if u.dtype.itemsize > 2 else torch.float32
    shapes = (dout.shape, u.shape, k.shape) if u.requires_grad else (dout.shape,)
    outputs = tuple(torch.empty(shape, dtype=kept, device=u.device) for shape in shapes)
    for cut in (slice(i, i + channels) for i in range(0, len(k), channels)):
        wide = tuple(t.detach().double().requires_grad_(u.requires_grad) for t in (u[:, cut], k[cut]))
        open_ = {name: gate[:, cut].double() for name, gate in gates.items()}
        run = lambda at=wide, kw=open_: reference.fft_conv(*at, **kw, method="fft")
        one = passes(run, wide, dout[:, cut].double())()
        for whole, part in zip(outputs, one if isinstance(one, tuple) else (one.detach(),)):
            whole[..., cut, :] = part
    return outputs


def conv(device, dtype=FP32, *, B, D, L, train=False, gated=False) -> Work:
    """A causal convolution with a filter as long as the sequence, against a plain one by torch.fft."""
    randn = normal(device, 0)
    u, k, dout = randn(B, D, L).to(dtype), randn(D, L) / L**0.5, randn(B, D, L).to(dtype)
    gates = {name: randn(B, D, L).to(dtype) for name in ("pregate", "postgate")} if gated else {}
    leaves = (u.requires_grad_(train), k.requires_grad_(train))
    passes = (lambda f, at, d: peers.forward_backward(f, d, at)) if train else (lambda f, at, d: f)
    # An FFT of N real numbers: 2.5 N log2 N. Forward one a row, one back, one a filter; backward two, one, two. The
    # limit knows the rate of fp32; tensor cores do half precision at fifteen times that (H100's and H200's datasheets).
    size = 2 * L
    transforms = 2 * B * D + D + (3 * B * D + 2 * D if train else 0)
    flops = int(transforms * 2.5 * size * math.log2(size) / (1 if dtype == FP32 else 15))

    def against(function):
        return peers.Peer(passes(lambda: function(u, k, **gates), leaves, dout), torch.__version__)

    def flash():
        function, version = peers.flash_fft_conv(u, size)
        return peers.Peer(passes(lambda: function(u, k, *gates.values()), leaves, dout), version)

    return Work(
        run=passes(lambda: scalekern.fft_conv(u, k, **gates), leaves, dout),
        oracle=lambda: exact(u, k, gates, dout, passes),
        tolerance=gradient_tolerance("fft_conv", dtype) if train else TOLERANCE[dtype],
        bytes_moved=((5 if train else 2 + len(gates)) * B * D * L * dtype.itemsize + (2 if train else 1) * D * L * 4),
        flops=flops, exponentials=0, peers={PLAIN: lambda: against(plain_fft_conv), "flashfftconv": flash},
    )  # fmt: skip


def cached(device, dtype=FP32, *, B, D, L) -> Work:
    """Inference with the filters' spectrum made once, against the same call with the filters."""
    randn = normal(device, 0)
    u, k = randn(B, D, L).to(dtype), randn(D, L) / L**0.5
    spectrum = functools.cache(lambda backend: scalekern.fft_conv_spectrum(k, L, dtype=dtype))  # of who will read it
    plain = lambda: peers.torch_peer(lambda: scalekern.fft_conv(u, k))
    return Work(
        run=lambda: scalekern.fft_conv(u, spectrum(_dispatch.forced())),
        oracle=lambda: exact(u, k, {}, u, lambda f, at, d: f), tolerance=TOLERANCE[dtype],
        bytes_moved=2 * B * D * L * dtype.itemsize + spectrum(None).values.nbytes,
        flops=int(2 * B * D * 2.5 * 2 * L * math.log2(2 * L)), peers={"without a spectrum": plain},
    )  # fmt: skip


def toeplitz(device, dtype=FP32, *, B, D, L, K, G, train=False) -> Work:
    """A filter of K taps for each of G groups of channels, against the FFT and torch's grouped convolution."""
    randn, G = normal(device, 0), math.gcd(G, D)
    u, k, dout = randn(B, D, L).to(dtype), randn(G, K) / K**0.5, randn(B, D, L).to(dtype)
    leaves = (u.requires_grad_(train), k.requires_grad_(train))
    passes = (lambda f, at, d: peers.forward_backward(f, d, at)) if train else (lambda f, at, d: f)

    def grouped(u, k):
        weight = k.flip(1).to(dtype).repeat_interleave(D // G, 0)[:, None]
        return F.conv1d(F.pad(u, (K - 1, 0)), weight, groups=D)

    def oracle():
        wide = tuple(t.detach().double().requires_grad_(train) for t in (u, k))
        found = passes(lambda: reference.toeplitz_conv(*wide), wide, dout.double())()
        return found if isinstance(found, tuple) else (found,)

    against = lambda f: peers.torch_peer(passes(lambda: f(u, k), leaves, dout))
    by_fft = lambda u, k: scalekern.fft_conv(u, k.repeat_interleave(D // G, 0), method="fft")
    return Work(
        run=passes(lambda: scalekern.toeplitz_conv(u, k), leaves, dout), oracle=oracle,
        tolerance=gradient_tolerance("toeplitz_conv", dtype) if train else TOLERANCE[dtype],
        bytes_moved=(5 if train else 2) * B * D * L * dtype.itemsize,
        flops=(3 if train else 1) * 2 * K * B * D * L,
        peers={"fft_conv": lambda: against(by_fft), "F.conv1d": lambda: against(grouped)},
    )  # fmt: skip


_FAST = ("cuda", "triton", "cpu")  # without the reference, whose sums over the taps take seconds
_train = functools.partial(conv, train=True)
_CPU_SHAPES = [
    ({"B": 2, "D": 256, "L": length}, {PLAIN: goal}) for length, goal in ((1024, 1.5), (8192, 2), (65536, 3))
]
CPU = [
    case("fft_conv", build, ops, direction, "cpu", 10 + i, shape, backends=_FAST, targets=targets)
    for i, (shape, targets) in enumerate(_CPU_SHAPES)
    for build, ops, direction in ((conv, OPS[:1], "fwd"), (_train, OPS, "fwd+bwd"))
]
CPU += [
    memory.conv_case(direction, "cpu", 50 + i, shape)
    for i, (shape, _) in enumerate(_CPU_SHAPES)
    for direction in ("fwd", "bwd")
]
_CUDA_LIMITS = {1024: 0.6, 8192: 0.6, 32768: 0.4}  # of the bytes of a gated forward: 8 a point
_gated = functools.partial(conv, gated=True)
CUDA = [
    case("fft_conv", build, ops, direction, "cuda", 15 + i, {"B": 64, "D": 768, "L": length}, BF16, note=note,
         backends=_FAST, targets=targets)
    for i, (length, limit) in enumerate(_CUDA_LIMITS.items())
    for build, ops, direction, note, targets in (
        (_gated, OPS[:1], "fwd", "gated", {PLAIN: 4, "limit": limit, "flashfftconv": 1.5}),
        (_train, OPS, "fwd+bwd", "", {}),
    )
]  # fmt: skip
CUDA += [  # a float32 spectrum of torch's takes 16 bytes a point of the batch: less of it than at 32,768
    case("fft_conv", build, ops, direction, "cuda", 18, {"B": batch, "D": 192, "L": 2**20}, BF16, note=note,
         backends=_FAST, targets=targets)
    for build, ops, direction, batch, note, targets in (
        (_gated, OPS[:1], "fwd", 4, "gated", {PLAIN: 3, "flashfftconv": 1.5}), (_train, OPS, "fwd+bwd", 2, "", {}),
    )
]  # fmt: skip
_TOEPLITZ = {"B": 2, "D": 256, "L": 8192, "K": 64, "G": 256}
_spectrum = functools.partial(case, "fft_conv", cached, SPECTRUM_OPS, "fwd", note="spectrum", backends=_FAST,
                              targets={"without a spectrum": 1})  # fmt: skip
for _i, _length in enumerate((2048, 8192)):
    _shape = {"B": 1, "D": 768, "L": _length}
    CPU += [dataclasses.replace(_spectrum("cpu", 40 + _i, _shape), devices=("cpu", "cuda"))]
    CUDA += [_spectrum("cuda", 42 + _i, _shape | {"L": 4 * _length}, BF16)]
CPU += [
    *(case("toeplitz", functools.partial(toeplitz, train=direction != "fwd"), ops, direction, "cpu", priority,
           {**_TOEPLITZ, "G": groups}, backends=_FAST)
      for groups, direction, ops, priority in (
          (256, "fwd", TOEPLITZ_OPS[:1], 42), (16, "fwd", TOEPLITZ_OPS[:1], 43), (256, "fwd+bwd", TOEPLITZ_OPS, 44))),
]  # fmt: skip
CUDA += [
    case("toeplitz", functools.partial(toeplitz, train=direction != "fwd"), ops, direction, "cuda", priority,
         {"B": 16, "D": 768, "L": 8192, "K": 128, "G": 768}, BF16, backends=_FAST)
    for direction, ops, priority in (("fwd", TOEPLITZ_OPS[:1], 47), ("fwd+bwd", TOEPLITZ_OPS, 48))
]  # fmt: skip
CASES = [*CPU, *CUDA]
