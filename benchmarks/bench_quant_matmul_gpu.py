"""Cases of quant_matmul on a GPU: few tokens against the weight's bytes, many against cuBLAS.

Shape letters: M tokens, N outputs, K inputs.

The harness flushes the L2 before each sample, so that no call finds its weight there, and nothing is rotated.
"""

import functools

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.quant import FORMATS, quantize
from scalekern.quant._pack import unpack
from scalekern.testing import TOLERANCE

BF16 = torch.bfloat16
OPS = ("quant_matmul_fwd", "quant_matmul_bwd")


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def dense(x, weight) -> peers.Peer:
    weight = weight.to(x.dtype)
    return peers.torch_peer(lambda: torch.nn.functional.linear(x, weight))


def gemlite(x, w) -> peers.Peer:
    upstream = peers.module("gemlite")
    _gpu_only(x, "gemlite")
    N, K = w.shape
    kind = {torch.float16: upstream.DType.FP16, BF16: upstream.DType.BF16}[x.dtype]
    layer = upstream.GemLiteLinear(w.bits, w.group_size, K, N, input_dtype=kind, output_dtype=kind)
    layer.pack(unpack(w.data, w.bits, K), w.scales.to(x.dtype), FORMATS[w.format].zero, None)
    return peers.Peer(lambda: layer(x), peers.version("gemlite"))


def torchao(x, weight, name: str, **options) -> peers.Peer:
    """torch.nn.Linear under one of torchao's configs, which rounds the weight by itself: its outputs are its own."""
    upstream = peers.module("torchao.quantization", "torchao")
    _gpu_only(x, "torchao")
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=x.dtype, device=x.device)
    layer.weight.data.copy_(weight)
    upstream.quantize_(layer, getattr(upstream, name)(**options))

    def run() -> None:
        layer(x)

    return peers.Peer(run, peers.version("torchao"))


def _gpu_only(x, package) -> None:
    if x.device.type != "cuda":
        raise peers.Absent(f"{package} runs on CUDA tensors only")


TORCHAO = {
    # torch's own kernel
    None: ("Int4WeightOnlyConfig", {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}),
    "int8": ("Int8DynamicActivationInt8WeightConfig", {}),
    "fp8": ("Float8DynamicActivationFloat8WeightConfig", {}),
}


@torch.no_grad()
def matmul(device, dtype, M, N, K, *, format, group_size, activation=None, symmetric=True) -> Work:
    """One product; the weight's bytes are read once, however few the tokens."""
    randn = normal(device, 0)
    x = randn(M, K).to(dtype)
    w = quantize(randn(N, K) / K**0.5, format, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float16)
    weight = w.dequantize(torch.float32)
    rivals = {"dense bfloat16": lambda: dense(x, weight)}
    if activation is None and symmetric:
        rivals["gemlite"] = lambda: gemlite(x, w)
    if activation or format == "int4":
        name, options = TORCHAO[activation]
        rivals["torchao"] = lambda: torchao(x, weight, name, **options)
    return Work(
        run=lambda: scalekern.quant_matmul(x, w, activation=activation),
        oracle=lambda: (reference.quant_matmul(x.double(), w, activation=activation),),
        tolerance=TOLERANCE[dtype], bytes_moved=w.nbytes + (M * K + M * N) * dtype.itemsize, flops=2 * M * N * K,
        peers=rivals,
    )  # fmt: skip


def train(device, dtype, M, N, K, *, format, group_size) -> Work:
    """Forward and the gradient of x, as under adapters."""
    randn = normal(device, 0)
    x = randn(M, K).to(dtype).requires_grad_()
    w = quantize(randn(N, K) / K**0.5, format, group_size=group_size, scale_dtype=torch.float16)
    dout, weight = randn(M, N).to(dtype), w.dequantize(dtype)
    wide = x.detach().double().requires_grad_()
    exact = peers.forward_backward(lambda: reference.quant_matmul(wide, w), dout.double(), (wide,))
    both = lambda function: peers.forward_backward(function, dout, (x,))
    return Work(
        run=both(lambda: scalekern.quant_matmul(x, w)), oracle=exact,
        tolerance=gradient_tolerance("quant_matmul", dtype),
        bytes_moved=2 * (w.nbytes + (M * K + M * N) * dtype.itemsize), flops=4 * M * N * K,
        peers={"dense bfloat16": lambda: peers.torch_peer(both(lambda: torch.nn.functional.linear(x, weight)))},
    )  # fmt: skip


def _case(priority, M, note, format, group_size, build=matmul, ops=OPS[:1], direction="fwd", targets=None, **options):
    build = functools.partial(build, format=format, group_size=group_size, **options)
    shape, targets = {"M": M, "N": 8192, "K": 8192}, targets or {}
    return case("qmm", build, ops, direction, "cuda", priority, shape, BF16, note, backends=("cuda", "triton"),
                targets=targets)  # fmt: skip


def _dense(ratio, **limit):
    return {"dense bfloat16": ratio, **limit}


CASES = [
    *(_case(40, M, "w4g128", "int4", 128, targets=_dense(3, limit=0.7)) for M in (1, 4, 16)),
    _case(41, 64, "w4g128", "int4", 128, targets=_dense(2)),
    _case(42, 4096, "w4g128", "int4", 128, targets=_dense(0.95)),
    _case(43, 1, "w2g128", "int2", 128, targets=_dense(5)),
    _case(43, 1, "w1g128", "int1", 128, targets=_dense(5)),
    _case(44, 1, "w4g128_zeros", "int4", 128, symmetric=False, targets=_dense(3)),
    _case(44, 1, "w3g128", "int3", 128),
    _case(44, 1, "w8", "int8", None),
    _case(44, 16, "w8", "int8", None),
    _case(44, 16, "w4g128_zeros", "int4", 128, symmetric=False),
    _case(44, 1, "nf4g64", "nf4", 64),
    _case(44, 1, "nvfp4", "nvfp4", None),
    _case(44, 64, "nvfp4", "nvfp4", None),
    _case(45, 4096, "w8a8", "int8", None, activation="int8", targets=_dense(1.5)),
    _case(45, 4096, "w8a8_fp8", "fp8_e4m3", None, activation="fp8", targets=_dense(1.5)),
    _case(46, 4096, "w4a8", "int4", 128, activation="int8"),
    _case(47, 4096, "w4g128", "int4", 128, build=train, ops=OPS, direction="fwd+bwd"),
]
