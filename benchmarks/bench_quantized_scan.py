"""Cases of the scans over 8-bit inputs, against the plain scans over the numbers.

Shape letters: B batch, L length, H heads, P head dim, D channels, G groups, N states.
"""

import functools

import torch

import scalekern
from scalekern import quant, reference
from scalekern.benchmarks import bench_ssd, harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal, scan_costs, scan_inputs
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE

FP32, BF16 = torch.float32, torch.bfloat16


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def _coded(x, axes):
    """(codes, the steps of all axes but these, the same as they broadcast)"""
    scale = x.float().abs().amax(axes) / 127
    wide = scale
    for axis in sorted(axes):
        wide = wide.unsqueeze(axis)
    return quant.round_to_int8(x, wide), scale, wide


def _as_work(op, kw, axes, small, dtype, costs, train) -> Work:
    """op over 8-bit codes of those arguments of kw that `axes` names, with a step for all axes but these.

    Their numbers are the rival's. The oracle is token by token where that takes seconds, else the plain op over the
    numbers in float64, which the tests hold to its own oracle; gradients reach the steps through the products.
    """
    coded = {name: _coded(kw[name], over) for name, over in axes.items()}
    steps = {f"{name}_scale": scale.reshape(-1) if scale.dim() == 0 else scale for name, (_, scale, _) in coded.items()}
    quantized = kw | {name: codes for name, (codes, _, _) in coded.items()} | steps
    numbers = kw | {name: (codes.double() * wide.double()).to(dtype) for name, (codes, _, wide) in coded.items()}
    dout = normal(kw["A"].device, 1)(*next(iter(coded.values()))[0].shape).to(dtype)

    def over_numbers(**given):
        for name, (_, _, wide) in coded.items():
            given[name] = given[name] * given.pop(f"{name}_scale").view(wide.shape)
        return getattr(scalekern, op)(**given)

    def passes(function, given, dout):
        if not train:
            return lambda: function(**given)
        leaves = {k: v.detach().requires_grad_() for k, v in given.items() if _is_floating(v)}
        return peers.forward_backward(lambda: function(**(given | leaves)), dout, tuple(leaves.values()))

    def oracle():
        plain = getattr(reference, f"quantized_{op}") if small else over_numbers
        with scalekern.backend("cpu" if dout.device.type == "cpu" else "cuda"):
            found = passes(plain, {k: _double(v) for k, v in quantized.items()}, dout.double())()
        return found if train else (found,)

    def float_scan():
        run = passes(getattr(scalekern, op), numbers, dout)
        return peers.Peer((lambda: (run(), None)[1]) if train else run, f"scalekern {scalekern.__version__}")

    return Work(
        run=passes(getattr(scalekern, f"quantized_{op}"), quantized, dout), oracle=oracle,
        tolerance=gradient_tolerance(f"quantized_{op}", dtype) if train else TOLERANCE[dtype],
        peers={"float scan": float_scan}, **costs,
    )  # fmt: skip


def _is_floating(v):
    return isinstance(v, torch.Tensor) and v.is_floating_point()


def _double(v):
    return v.double() if _is_floating(v) else v


def ssd(device, dtype=FP32, *, train=False, B, L, H, P, G, N) -> Work:
    kw = bench_ssd.inputs(device, dtype, B, L, H, P, G, N) | {"dt_softplus": True}
    axes = {"x": (0, 1), "B": (0, 1, 3), "C": (0, 1, 3)}
    tokens, pairs = B * L, bench_ssd.CHUNK
    flops = 2 * tokens * (G * pairs * N + H * pairs * P + 2 * H * P * N)
    bytes_moved = tokens * (H * P + 2 * G * N + (H * P + H) * dtype.itemsize)
    if train:  # beside it: the same read again, and ddt; of the codes there are no gradients as large as they
        flops += 2 * tokens * (3 * G * pairs * N + 2 * H * pairs * P + 6 * H * P * N)
        bytes_moved += tokens * (H * P + 2 * G * N + (H * P + 2 * H) * dtype.itemsize)
    costs = dict(bytes_moved=bytes_moved, flops=flops, exponentials=(2 if train else 1) * tokens * H * pairs // 2)
    return _as_work("ssd_scan", kw, axes, tokens * H * P * N < 1e5, dtype, costs, train)


def selective(device, dtype=FP32, *, train=False, B, D, N, L) -> Work:
    kw = scan_inputs(device, dtype, B, D, N, L)
    axes = {"u": (0, 2), "B": (0, 1, 2), "C": (0, 1, 2)}
    costs, more = scan_costs(dtype, B, D, N, L)
    codes = B * D * L + 2 * B * N * L
    costs["bytes_moved"] -= codes * (dtype.itemsize - 1)
    if train:  # codes are read again, and have no gradients as large as they
        more["bytes_moved"] -= codes * (2 * dtype.itemsize - 1)
        costs = {name: costs[name] + more[name] for name in costs}
    return _as_work("selective_scan", kw, axes, B * D * N * L < 1e5, dtype, costs, train)


def state_update(device, dtype=FP32, *, B, H, P, N) -> Work:
    randn = normal(device, 0)
    hidden, x, dt = randn(B, H, P, N), randn(B, H, P).to(dtype), (randn(B, H, P) - 2).to(dtype)
    scale = hidden.abs().amax((0, 3)) / 127
    state = quant.round_to_int8(hidden, scale[..., None])
    rest = x, dt, -randn(H, P, N).exp(), randn(B, 1, N).to(dtype), randn(B, 1, N).to(dtype)
    plain = scale[..., None] * state
    step = lambda f, s: f(s, *rest, scale, dt_softplus=True)
    exact = lambda: reference.quantized_state_update(
        state.clone(), *(t.double() for t in rest), scale.double(), dt_softplus=True
    )  # fmt: skip
    return Work(
        run=lambda: step(scalekern.quantized_state_update, state),
        sample=lambda: (step(scalekern.quantized_state_update, state.clone()),),
        oracle=lambda: (exact(),), tolerance=TOLERANCE[dtype],
        bytes_moved=2 * state.numel() + 4 * H * P * N + dtype.itemsize * 3 * x.numel(), flops=7 * state.numel(),
        exponentials=state.numel(),
        peers={"float state": lambda: peers.Peer(
            lambda: scalekern.selective_state_update(plain, *rest, dt_softplus=True) is None or None,
            f"scalekern {scalekern.__version__}",
        )},
    )  # fmt: skip


def mixer_step(device, dtype=FP32, *, B, M, D, N, format="int4", group_size=128) -> Work:
    """One token through a whole mixer of low-bit weights, against the float mixer's step and its own, part by part."""
    randn = normal(device, 0)
    rank = max(1, M // 16)
    matrix = lambda rows, columns: randn(rows, columns) / columns**0.5
    scan = scan_inputs(device, dtype, B, D, N, 1)
    dense = matrix(2 * D, M), matrix(rank + 2 * N, D), matrix(D, rank).to(dtype), matrix(M, D)
    weights = [w if i == 2 else quant.quantize(w, format, group_size=group_size) for i, w in enumerate(dense)]
    wide = [w if i == 2 else w.dequantize(dtype) for i, w in enumerate(weights)]
    conv, rest = (randn(D, 4), randn(D)), (torch.log(-scan["A"]), scan["D"], scan["delta_bias"])
    hidden, states = randn(B, M).to(dtype), (randn(B, D, 4).to(dtype), randn(B, D, N))

    def stepping(function, projections, cast=lambda t: t):
        mine, (in_proj, *others) = [cast(s.clone()) for s in states], projections
        args = [cast(t) for t in (*conv, *others, *rest)]
        return lambda: (function(cast(hidden), *mine, cast(in_proj), *args), *mine)

    version = f"scalekern {scalekern.__version__}"
    products = 3 * M * D + D * (2 * rank + 2 * N)
    stored = sum(w.nbytes for w in weights)
    run = lambda: stepping(scalekern.quantized_mamba_update, weights)
    return Work(
        run=run(), sample=lambda: run()(), tolerance=TOLERANCE[dtype],
        oracle=lambda: stepping(reference.quantized_mamba_update, weights, _double)(),
        bytes_moved=stored + B * D * N * 8, flops=2 * B * products + B * D * 6 * N, exponentials=B * D * (N + 3),
        peers={"float mixer": lambda: peers.Peer(stepping(scalekern.mamba_update, wide), version)},
    )  # fmt: skip


_SSD = {"B": 1, "L": 2048, "H": 24, "P": 64, "G": 1, "N": 128}
_MAMBA = {"B": 1, "D": 1536, "N": 16, "L": 2048}
_STEP = {"B": 8, "H": 24, "P": 64, "N": 128}
_FAST = ("cuda", "triton", "cpu")  # the reference is a loop over time
_OP = lambda name: (f"quantized_{name}",)
_BOTH = lambda name: (f"quantized_{name}_fwd", f"quantized_{name}_bwd")

CPU = [
    case("quantized mixer", mixer_step, _OP("mamba_update"), "step", "cpu", 48, {"B": 1, "M": 2048, "D": 4096, "N": 16},
         backends=_FAST, note="w4g128", targets={"float mixer": 2.0}),
    case("quantized mixer", functools.partial(mixer_step, group_size=64), _OP("mamba_update"), "step", "cpu", 49,
         {"B": 1, "M": 128, "D": 256, "N": 16}, backends=_FAST, note="w4g64", targets={"float mixer": 1.0}),
    case("quantized ssd", ssd, _OP("ssd_scan_fwd"), "fwd", "cpu", 96, _SSD, backends=_FAST),
    case("quantized scan", selective, _OP("selective_scan_fwd"), "fwd", "cpu", 96, _MAMBA, backends=_FAST),
    case("quantized ssd", functools.partial(ssd, train=True), _BOTH("ssd_scan"), "fwd+bwd", "cpu", 97, _SSD,
         backends=_FAST),
    case("quantized scan", functools.partial(selective, train=True), _BOTH("selective_scan"), "fwd+bwd", "cpu", 97,
         _MAMBA, backends=_FAST),
    case("quantized step", state_update, _OP("state_update"), "step", "cpu", 96, _STEP),
]

CUDA = [
    case("quantized scan", selective, _OP("selective_scan_fwd"), "fwd", "cuda", 96,
         {"B": 8, "D": 4096, "N": 16, "L": 4096}, BF16, backends=_FAST),
]  # fmt: skip

CASES = [*CPU, *CUDA]
