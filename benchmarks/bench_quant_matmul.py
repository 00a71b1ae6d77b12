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
from scalekern.quant._pack import unpack
from scalekern.testing import TOLERANCE

FP32, BF16 = torch.float32, torch.bfloat16
DENSE = {"float32": FP32, "bfloat16": BF16}
OPS = ("quant_matmul_fwd", "quant_matmul_bwd")


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def dense(x, weight, dtype) -> peers.Peer:
    x, weight = x.to(dtype), weight.to(dtype)
    return peers.torch_peer(lambda: torch.nn.functional.linear(x, weight))


def onnxruntime(x, w) -> peers.Peer:
    """MatMulNBits at its fastest setting, accuracy level 4, which rounds activations to int8 as well."""
    upstream, onnx = peers.module("onnxruntime"), peers.module("onnx")
    (N, K), G = w.shape, w.group_size
    if x.device.type != "cpu" or w.format != "int4" or w.zeros is not None or G & (G - 1) or G < 16:
        raise peers.Absent("onnxruntime is compared on the CPU, with symmetric int4 in groups of a power of two")
    codes = torch.nn.functional.pad(w.data, (0, -(-K // G) * G // 2 - w.data.shape[1])).reshape(N, -1, G // 2).numpy()
    make, Types = onnx.helper, onnx.TensorProto
    value = lambda name, size: make.make_tensor_value_info(name, Types.FLOAT, ["M", size])
    node = make.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=K, N=N, bits=4,
                          block_size=G, accuracy_level=4)  # fmt: skip
    constants = [onnx.numpy_helper.from_array(codes, "codes"),
                 onnx.numpy_helper.from_array(w.scales.flatten().numpy(), "scales")]  # fmt: skip
    graph = make.make_graph([node], "product", [value("x", K)], [value("y", N)], constants)
    opsets = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    options = upstream.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning after a call, on the cores of whoever has the next turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = make.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session, given = upstream.InferenceSession(model, options, providers=["CPUExecutionProvider"]), x.float().numpy()
    return peers.Peer(lambda: torch.from_numpy(session.run(None, {"x": given})[0]), upstream.__version__)


def torch_int4(x, w) -> peers.Peer:
    """torch's own product with a weight of int4 packed for the CPU, activations in bfloat16 (its faster dtype)."""
    (N, K), G = w.shape, w.group_size
    if x.device.type != "cpu" or N % 16 or K % G or G not in (32, 64, 128, 256):
        raise peers.Absent("torch's int4 product needs the CPU, N a multiple of 16 and K of a group of 32 to 256")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(w.data, 4, K).int(), 1)
    parts, x = torch.stack([w.scales.mT, torch.zeros_like(w.scales.mT)], -1).to(BF16), x.to(BF16)
    return peers.torch_peer(lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, G, parts))


def torch_int8(x, w) -> peers.Peer:
    """torch._int_mm of activations that are rounded already, and the two scales."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    codes, weight = (x.float() / scale).round().to(torch.int8), (w.data.short() - 128).to(torch.int8).mT
    return peers.torch_peer(lambda: torch._int_mm(codes, weight) * scale * w.scales.mT)


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
        peers={} if train else rivals(x.detach(), w, weight, activation),
    )


def rivals(x, w, weight, activation) -> dict:
    found = {f"dense {name}": functools.partial(dense, x, weight, dtype) for name, dtype in DENSE.items()}
    if w.format == "int4":
        found |= {"onnxruntime": lambda: onnxruntime(x, w), "torch int4": lambda: torch_int4(x, w)}
    if w.format == "int8" and activation == "int8":
        found["torch._int_mm"] = lambda: torch_int8(x, w)
    return found


def experts(device, dtype, E, M, N, K, *, format="int4", group_size=128) -> Work:
    """A mixture of experts: M tokens, each sent to one of E at random, in one call or an expert at a time."""
    randn = normal(device, 0)
    x, w = randn(M, K).to(dtype), quantize(randn(E * N, K) / K**0.5, format, group_size=group_size)
    chosen = torch.randint(E, (M,), generator=torch.Generator().manual_seed(1))
    offs = chosen.bincount(minlength=E).cumsum(0).int().to(device)
    ends, used = offs.tolist(), len(chosen.unique())
    runs = [(slice(a, b), w[e * N : (e + 1) * N]) for e, (a, b) in enumerate(zip([0, *ends], ends)) if b > a]
    return Work(
        run=lambda: scalekern.quant_matmul(x, w, offs=offs),
        oracle=lambda: (reference.quant_matmul(x.double(), w, offs=offs),),
        tolerance=TOLERANCE[dtype],
        bytes_moved=w.nbytes * used // E + (M * K + M * N) * dtype.itemsize,
        flops=2 * M * N * K,
        peers={"one by one": lambda: peers.torch_peer(
            lambda: torch.cat([scalekern.quant_matmul(x[own], expert) for own, expert in runs]))},
    )  # fmt: skip


_SIZES = {"N": 4096, "K": 4096}
_W4 = functools.partial(matmul, format="int4", group_size=128)
_W4A8, _W8A8 = (
    functools.partial(matmul, format=f, group_size=g, activation="int8") for f, g in (("int4", 128), ("int8", None))
)
_FAST = ("cuda", "triton", "cpu")


def _cpu(build, note, M, priority, targets, ops=OPS[:1], direction="fwd", dtype=FP32):
    return case("qmm", build, ops, direction, "cpu", priority, {"M": M, **_SIZES}, dtype, backends=_FAST, note=note,
                targets=targets)  # fmt: skip


CPU = [
    *(_cpu(_W4, "w4g128", 1, 45, {"torch int4": 2.0}, dtype=t) for t in (FP32, BF16)),
    _cpu(_W4A8, "w4g128a8", 1, 45, {"onnxruntime": 1.0}),
    *(_cpu(_W4, "w4g128", M, 46, {"dense bfloat16": 1.0}, dtype=t) for M in (16, 128) for t in (FP32, BF16)),
    *(_cpu(_W4A8, "w4g128a8", M, 46, {"onnxruntime": 3.0, "dense bfloat16": 1.0}) for M in (16, 128)),
    *(_cpu(functools.partial(matmul, format="int4", group_size=g, activation="int8"), f"w4g{g}a8", 16, 48,
           {"dense bfloat16": 1.0}) for g in (64, 32)),
    *(_cpu(_W8A8, "w8a8", M, 47, {"torch._int_mm": 1.0}) for M in (1, 16, 128)),
    *(_cpu(functools.partial(matmul, format=f, group_size=g), note, 1, 49, {"dense bfloat16": 1.0}, dtype=t)
      for f, g, note in (("nf4", 64, "nf4g64"), ("mxfp4", 32, "mxfp4"), ("nvfp4", 16, "nvfp4"),
                         ("fp8_e4m3", 128, "fp8g128")) for t in (FP32, BF16)),
    _cpu(functools.partial(_W4, train=True), "w4g128", 128, 90, {}, OPS, "fwd+bwd"),
    *(case("qmm", experts, OPS[:1], "fwd", "cpu", 93, {"E": 16, "M": M, "N": 1024, "K": 1024}, backends=_FAST,
           note="experts_w4g128", targets={"one by one": 1.0}) for M in (8, 128)),
]

CUDA = [
    case("qmm", experts, OPS[:1], "fwd", "cuda", 46, {"E": 64, "M": M, "N": 2048, "K": 2048}, torch.bfloat16,
         backends=("triton",), note="experts_w4g128", targets={"one by one": 2.0}) for M in (64, 4096)
]  # fmt: skip

CASES = [*CPU, *CUDA]
