"""Cases of the selective_scan family: what is timed, on which shapes, against whom, and what it must cost at least.

Shape letters: B batch, D channels, N state size, L length, W filter width.
"""

import functools
import importlib

import torch

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, hf, memory, oracles, peers
from scalekern.benchmarks.case import Case, Work
from scalekern.testing import TOLERANCE, specs

FP32, BF16 = torch.float32, torch.bfloat16
SCAN_OPS = ("selective_scan_fwd", "selective_scan_bwd")
INNER_OPS = ("mamba_inner_fwd", "mamba_inner_bwd")
CONV_OPS = ("causal_conv1d_fwd", "causal_conv1d_bwd")


def normal(device, seed: int):
    """torch.randn on the device, seeded: the inputs of a large case are made in milliseconds."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def gradient_tolerance(op, dtype) -> float:
    return specs()[op].gradient_factor * TOLERANCE[dtype]


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


# ---- selective_scan ----------------------------------------------------------------------------------------------


def scan_inputs(device, dtype, B, D, N, L, seed=0) -> dict:
    """Values as a trained Mamba has them: A = -(1 ... N), steps from 1e-3 to 1e-1, everything else normal."""
    randn = normal(device, seed)
    step = torch.exp(torch.sigmoid(randn(D)) * 4.6 - 6.9)
    return {
        "u": randn(B, D, L).to(dtype), "delta": (0.5 * randn(B, D, L)).to(dtype),
        "A": -(torch.arange(1, N + 1).to(device) * (1 + 0.1 * randn(D, 1).tanh())),
        "B": randn(B, N, L).to(dtype), "C": randn(B, N, L).to(dtype), "D": randn(D),
        "z": randn(B, D, L).to(dtype), "delta_bias": torch.log(torch.expm1(step)), "delta_softplus": True,
    }  # fmt: skip


def scan_costs(dtype, B, D, N, L) -> tuple[dict, dict]:
    """Least costs of forward and backward: every tensor moved once, every decay computed once in each direction.

    Forward, an element and a state: d A, its exp, d u B, the update (2), the product with C (2).
    Backward: those again, and for each gradient about two more.
    """
    size, elements = dtype.itemsize, B * D * L
    matrices = 2 * B * N * L * size
    fwd = {"bytes_moved": 4 * elements * size + matrices, "flops": elements * (6 * N + 12)}
    bwd = {"bytes_moved": 7 * elements * size + 2 * matrices, "flops": elements * (18 * N + 40)}
    exps = {"exponentials": elements * (N + 2)}  # the decays, the softplus and the gate
    return fwd | exps, bwd | exps


def scan_fwd(device, dtype=FP32, rivals=True, **shape) -> Work:
    kw = scan_inputs(device, dtype, **shape)
    work = Work(
        run=lambda: scalekern.selective_scan(**kw), oracle=lambda: oracles.scan(kw), tolerance=TOLERANCE[dtype],
        **scan_costs(dtype, **shape)[0],
    )  # fmt: skip
    if rivals:
        work.peers = {
            "mamba_ssm": lambda: peers.mamba_ssm_scan(**kw),
            "transformers slow path": lambda: peers.transformers_scan(**kw),
            "torch.exp alone": lambda: peers.torch_exp(kw["u"].numel() * shape["N"], device),
        }
    return work


def scan_bwd(device, dtype=FP32, **shape) -> Work:
    """The backward op by itself, from checkpoints of the oracle's forward."""
    kw = scan_inputs(device, dtype, **shape)
    dout = normal(device, 1)(*kw["u"].shape).to(dtype)
    args, (_, *expected) = oracles.scan_bwd(kw, dout)

    def run():
        return tuple(g for g in torch.ops.scalekern.selective_scan_bwd(*args) if g.numel())

    # The op's B and C have their axis of groups.
    sample = lambda: tuple(g.reshape(e.shape) for g, e in zip(run(), expected))

    def upstream():
        inputs = tuple(v.requires_grad_() for v in kw.values() if isinstance(v, torch.Tensor))
        found = peers.mamba_ssm_scan(**kw)
        out = found.run()
        return peers.Peer(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), found.version)

    return Work(run, lambda: tuple(expected), gradient_tolerance("selective_scan", dtype), sample=sample,
                peers={"mamba_ssm": upstream}, **scan_costs(dtype, **shape)[1])  # fmt: skip


def scan_train(device, dtype=FP32, **shape) -> Work:
    """Forward and backward through autograd, as training runs them."""
    kw = scan_inputs(device, dtype, **shape)
    dout = normal(device, 1)(*kw["u"].shape).to(dtype)
    _, expected = oracles.scan_bwd(kw, dout)
    inputs = tuple(v.requires_grad_() for v in kw.values() if isinstance(v, torch.Tensor))

    def against(peer):
        found = peer(**kw)
        return peers.Peer(peers.forward_backward(found.run, dout, inputs), found.version)

    fwd, bwd = scan_costs(dtype, **shape)
    return Work(
        run=peers.forward_backward(lambda: scalekern.selective_scan(**kw), dout, inputs),
        oracle=lambda: expected, tolerance=gradient_tolerance("selective_scan", dtype),
        **{name: fwd[name] + bwd[name] for name in fwd},
        peers={
            "mamba_ssm": lambda: against(peers.mamba_ssm_scan),
            "mambapy": lambda: against(peers.mambapy_scan),
        },
    )  # fmt: skip


def scan_long(device, dtype=FP32, *, short, **shape) -> Work:
    """A very long scan; its rival is the same scan at length `short`, scaled: time per element must not grow."""
    work = scan_fwd(device, dtype, rivals=False, **shape)
    kw = scan_inputs(device, dtype, **shape)
    channels = (0, shape["D"] // 3, shape["D"] - 1)  # the oracle runs three of them
    work.oracle = lambda: oracles.scan_in_chunks(kw, channels)
    work.sample = lambda: scalekern.selective_scan(**kw)[:, channels]
    few = scan_inputs(device, dtype, **{**shape, "L": short})

    def run() -> None:
        scalekern.selective_scan(**few)

    work.peers = {f"itself at L={short:,}, scaled": lambda: peers.Peer(run, "scalekern", shape["L"] / short)}
    return work


# ---- selective_state_update --------------------------------------------------------------------------------------


def update(device, dtype=FP32, *, B, D, N) -> Work:
    kw = scan_inputs(device, dtype, B, D, N, 1)
    args = {"x": kw["u"][..., 0], "dt": kw["delta"][..., 0], "A": kw["A"], "B": kw["B"][..., 0], "C": kw["C"][..., 0],
            "D": kw["D"], "z": kw["z"][..., 0], "dt_bias": kw["delta_bias"], "dt_softplus": True}  # fmt: skip
    args = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    state = normal(device, 2)(B, D, N)

    def stepping(function, **kwargs):
        mine = state.clone()
        return lambda: (function(mine, **kwargs), mine)

    def against(peer):
        mine = state.clone()
        found = peer(mine, **args)
        return peers.Peer(lambda: (found.run(), mine), found.version)

    elements = B * D
    return Work(
        run=lambda: scalekern.selective_state_update(state, **args),
        sample=lambda: stepping(scalekern.selective_state_update, **args)(),
        oracle=lambda: oracles.update(state, args), tolerance=TOLERANCE[dtype],
        bytes_moved=elements * (2 * N * 4 + 4 * dtype.itemsize) + D * (N + 2) * 4, flops=elements * (6 * N + 8),
        exponentials=elements * (N + 2),
        peers={"mamba_ssm": lambda: against(peers.mamba_ssm_update),
               "transformers slow path": lambda: against(peers.transformers_update)},
    )  # fmt: skip


# ---- causal_conv1d -----------------------------------------------------------------------------------------------


def conv_inputs(device, dtype, B, D, L, W, channels_last=False) -> dict:
    randn = normal(device, 0)
    x = randn(B, L, D).to(dtype).transpose(1, 2)
    x = x if channels_last else x.contiguous()
    return {"x": x, "weight": randn(D, W), "bias": randn(D), "activation": "silu"}  # fmt: skip


def conv_costs(dtype, direction, B, D, L, W) -> dict:
    elements = B * D * L
    tensors, flops = {"fwd": (2, 2 * W + 4), "bwd": (3, 6 * W + 10), "fwd+bwd": (5, 8 * W + 14)}[direction]
    exps = elements * (2 if direction == "fwd+bwd" else 1)
    return {"bytes_moved": tensors * elements * dtype.itemsize, "flops": elements * flops, "exponentials": exps}


def conv_fwd(device, dtype=FP32, channels_last=False, **shape) -> Work:
    kw = conv_inputs(device, dtype, **shape, channels_last=channels_last)
    return Work(
        run=lambda: scalekern.causal_conv1d(**kw), oracle=lambda: oracles.conv(kw), tolerance=TOLERANCE[dtype],
        **conv_costs(dtype, "fwd", **shape),
        peers={"causal_conv1d": lambda: peers.causal_conv1d_fn(**kw),
               "F.conv1d + silu": lambda: peers.torch_conv(**kw)},
    )  # fmt: skip


def conv_train(device, dtype=FP32, *, only_bwd=False, **shape) -> Work:
    kw = conv_inputs(device, dtype, **shape)
    dout = normal(device, 1)(*kw["x"].shape).to(dtype)
    expected = oracles.conv_bwd(kw, dout)
    if only_bwd:
        args = (dout, None, kw["x"], kw["weight"], kw["bias"], None, None, None, True)
        run = lambda: torch.ops.scalekern.causal_conv1d_bwd(*args)[:3]
        costs = conv_costs(dtype, "bwd", **shape)
        return Work(run, lambda: expected, gradient_tolerance("causal_conv1d", dtype), **costs)
    inputs = tuple(v.requires_grad_() for v in kw.values() if isinstance(v, torch.Tensor))

    def against(peer):
        found = peer(**kw)
        return peers.Peer(peers.forward_backward(found.run, dout, inputs), found.version)

    return Work(
        run=peers.forward_backward(lambda: scalekern.causal_conv1d(**kw), dout, inputs),
        oracle=lambda: (*oracles.conv(kw), *expected), tolerance=gradient_tolerance("causal_conv1d", dtype),
        **conv_costs(dtype, "fwd+bwd", **shape),
        peers={"causal_conv1d": lambda: against(peers.causal_conv1d_fn),
               "F.conv1d + silu": lambda: against(peers.torch_conv)},
    )  # fmt: skip


def conv_update(device, dtype=FP32, *, B, D, W) -> Work:
    kw = conv_inputs(device, dtype, B, D, 1, W)
    x, rest = kw["x"][..., 0].contiguous(), (kw["weight"], kw["bias"], "silu")
    state = normal(device, 2)(B, D, W - 1).to(dtype)

    def sample():
        mine = state.clone()
        return scalekern.causal_conv1d_update(x, mine, *rest), mine

    def against(peer):
        mine = state.clone()
        found = peer(x, mine, *rest)
        return peers.Peer(lambda: (found.run(), mine), found.version)

    elements, size = B * D, dtype.itemsize
    return Work(
        run=lambda: scalekern.causal_conv1d_update(x, state, *rest), sample=sample,
        oracle=lambda: oracles.conv_update(x, state, rest), tolerance=TOLERANCE[dtype],
        bytes_moved=elements * size * (2 + 2 * (W - 1)) + D * (W + 1) * 4, flops=elements * (2 * W + 4),
        exponentials=elements,
        peers={"causal_conv1d": lambda: against(peers.causal_conv1d_update),
               "transformers slow path": lambda: against(peers.transformers_conv_update)},
    )  # fmt: skip


# ---- mamba_inner -------------------------------------------------------------------------------------------------


def inner_inputs(device, dtype, B, D, N, L) -> dict:
    """A Mamba block of width D / 2: D channels, R = D / 32 ranks of the step size, filters of width 4."""
    scan, conv = scan_inputs(device, dtype, B, D, N, L), conv_inputs(device, dtype, B, D, L, 4)
    randn = normal(device, 3)
    rank = max(D // 32, 1)
    matrix = lambda rows, columns: (randn(rows, columns) / columns**0.5).to(dtype)
    return {
        "xz": torch.cat([scan["u"], scan["z"]], 1), "conv1d_weight": conv["weight"], "conv1d_bias": conv["bias"],
        "x_proj_weight": matrix(rank + 2 * N, D), "delta_proj_weight": matrix(D, rank),
        "out_proj_weight": matrix(D // 2, D), "out_proj_bias": None, "A": scan["A"], "D": scan["D"],
        "delta_bias": scan["delta_bias"],
    }  # fmt: skip


def inner(device, dtype=FP32, *, train, **shape) -> Work:
    """The block between its input projection and its output, forward or forward and backward."""
    kw = inner_inputs(device, dtype, **shape)
    B, D, N, L = (shape[k] for k in "BDNL")
    inputs = tuple(v.requires_grad_(train) for v in kw.values() if v is not None)
    dout = normal(device, 1)(B, L, D // 2).to(dtype)
    passes = (lambda f: peers.forward_backward(f, dout, inputs)) if train else (lambda f: f)
    wide = oracles.double(kw)
    leaves = tuple(v.requires_grad_(train) for v in wide.values() if v is not None)
    oracle = lambda: reference.mamba_inner(**wide)
    scan = scan_costs(dtype, **shape)
    conv = conv_costs(dtype, "fwd+bwd" if train else "fwd", B, D, L, 4)
    parts = [conv, *(scan if train else scan[:1])]
    costs = {name: sum(part[name] for part in parts) for name in conv}
    # Three products; the backward has two of each, and recomputes the first two.
    rank = max(D // 32, 1)
    small, large = 2 * B * L * D * (2 * rank + 2 * N), 2 * B * L * D * D // 2
    costs["flops"] += 4 * small + 3 * large if train else small + large
    # Nothing between the two products has to reach memory: xz and out, and backward dout, xz again and its gradient.
    costs["bytes_moved"] = (14 if train else 5) * B * D * L * dtype.itemsize // 2
    return Work(
        run=passes(lambda: scalekern.mamba_inner(**kw)),
        oracle=lambda: peers.forward_backward(oracle, dout.double(), leaves)() if train else (oracle().detach(),),
        tolerance=gradient_tolerance("mamba_inner", dtype) if train else TOLERANCE[dtype], **costs,
        peers={"mamba_ssm": lambda: peers.mamba_ssm_inner(passes, **kw)},
    )  # fmt: skip


def mixer_step(device, dtype=FP32, *, B, M, D, N) -> Work:
    """One token through a whole mixer, against the same step made of torch's products and the two updates."""
    randn = normal(device, 0)
    rank = M // 16
    mixer = importlib.import_module("scalekern.ops.mamba_update")  # the function of that name hides the module
    matrix = lambda rows, columns: (randn(rows, columns) / columns**0.5).to(dtype)
    scan = scan_inputs(device, dtype, B, D, N, 1)
    weights = [
        matrix(2 * D, M), randn(D, 4), randn(D), matrix(rank + 2 * N, D), matrix(D, rank), matrix(M, D),
        torch.log(-scan["A"]), scan["D"], scan["delta_bias"],
    ]  # fmt: skip
    hidden, states = randn(B, M).to(dtype), (randn(B, D, 4).to(dtype), randn(B, D, N))

    def stepping(function, cast=lambda t: t):
        mine = tuple(cast(s.clone()) for s in states)
        return lambda: (function(cast(hidden), *mine, *(cast(w) for w in weights)), *mine)

    def composed(hidden, *rest):
        conv_state, ssm_state, in_proj, *others = rest
        return mixer._composed(
            conv_state, ssm_state, hidden, in_proj, None, *others[:5], None, *others[5:], None, -1.0, 1e-5
        )

    products = 3 * M * D + D * (2 * rank + 2 * N)
    return Work(
        run=stepping(scalekern.mamba_update), sample=lambda: stepping(scalekern.mamba_update)(),
        oracle=lambda: stepping(reference.mamba_update, lambda t: t.double())(), tolerance=TOLERANCE[dtype],
        bytes_moved=products * dtype.itemsize + B * D * N * 8, flops=2 * B * products + B * D * 6 * N,
        exponentials=B * D * (N + 3),
        peers={"composed of torch's products": lambda: peers.Peer(stepping(composed), torch.__version__)},
    )  # fmt: skip


# ---- the list ----------------------------------------------------------------------------------------------------


def case(kind, build, ops, direction, device, priority, shape, dtype=FP32, note="", **fields) -> Case:
    """One case, named after what it does: scan_fwd_b1_d1536_n16_l2048_fp32."""
    sizes = "_".join(f"{k.lower()}{v}" for k, v in shape.items())
    short = {FP32: "fp32", BF16: "bf16", torch.float16: "fp16"}[dtype]
    name = "_".join(x for x in (kind, direction.replace("+", ""), sizes, short, note) if x)
    build = functools.partial(build, dtype=dtype, **shape)
    return Case(name, ops, direction, (device,), priority, {**shape, "dtype": short}, build, **fields)


_SCAN = {"B": 1, "D": 1536, "N": 16, "L": 2048}
_CONV = {"B": 1, "D": 1536, "L": 2048, "W": 4}
_INNER = {"B": 1, "D": 512, "N": 16, "L": 512}
_LONG = {"B": 1, "D": 64, "N": 16}
_STEP = ("selective_state_update",)
_CONV_STEP = ("causal_conv1d_update",)
_FAST = ("cuda", "triton", "cpu")  # without the reference, whose loop over time takes seconds

CPU = [
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cpu", 10, _SCAN, backends=_FAST,
         targets={"transformers slow path": 50, "torch.exp alone": 1 / 3}),
    case("scan", scan_train, SCAN_OPS, "fwd+bwd", "cpu", 20, _SCAN, backends=_FAST, targets={"mambapy": 30}),
    case("conv", conv_fwd, CONV_OPS[:1], "fwd", "cpu", 30, _CONV, targets={"F.conv1d + silu": 3}),
    hf.case("prefill", "cpu", 40, layers=4, width=768, length=512, target=6),
    hf.case("decode", "cpu", 41, layers=4, width=768, length=64, target=2),
    memory.case("fwd", "cpu", 50, _SCAN),
    memory.case("bwd", "cpu", 51, _SCAN),
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cpu", 60, {**_LONG, "L": 8192}, backends=_FAST),
    case("scan", functools.partial(scan_long, short=8192), SCAN_OPS[:1], "fwd", "cpu", 61, {**_LONG, "L": 2**20},
         backends=_FAST, targets={"itself at L=8,192, scaled": 1 / 1.3}),
    case("scan", scan_bwd, SCAN_OPS[1:], "bwd", "cpu", 70, _SCAN, backends=_FAST),
    case("conv", conv_train, CONV_OPS, "fwd+bwd", "cpu", 80, _CONV),
    case("conv", functools.partial(conv_train, only_bwd=True), CONV_OPS[1:], "bwd", "cpu", 81, _CONV),
    case("update", update, _STEP, "step", "cpu", 90, {"B": 1, "D": 1536, "N": 16}),
    case("update", update, _STEP, "step", "cpu", 91, {"B": 64, "D": 1536, "N": 16}),
    case("conv_update", conv_update, _CONV_STEP, "step", "cpu", 92, {"B": 1, "D": 1536, "W": 4}),
    case("conv_update", conv_update, _CONV_STEP, "step", "cpu", 93, {"B": 64, "D": 1536, "W": 4}),
    case("mixer", mixer_step, ("mamba_update",), "step", "cpu", 94, {"B": 1, "M": 768, "D": 1536, "N": 16}),
    case("inner", functools.partial(inner, train=False), INNER_OPS[:1], "fwd", "cpu", 94, _INNER),
    case("inner", functools.partial(inner, train=True), INNER_OPS, "fwd+bwd", "cpu", 95, _INNER),
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cpu", 100, _SCAN, BF16, backends=_FAST),
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cpu", 101, {"B": 8, "D": 256, "N": 16, "L": 256}),
    case("scan", scan_bwd, SCAN_OPS[1:], "bwd", "cpu", 101, {"B": 8, "D": 256, "N": 16, "L": 256}),
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cpu", 102, {"B": 1, "D": 256, "N": 64, "L": 1024}),
    case("conv", conv_fwd, CONV_OPS[:1], "fwd", "cpu", 103, _CONV, BF16),
    case("conv", functools.partial(conv_fwd, channels_last=True), CONV_OPS[:1], "fwd", "cpu", 104, _CONV,
         note="channels_last"),
]  # fmt: skip

_BIG = {"B": 8, "D": 4096, "N": 16, "L": 4096}
_BIG_CONV = {"B": 8, "D": 4096, "L": 4096, "W": 4}
CUDA = [
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cuda", 10, _BIG, BF16,
         targets={"mamba_ssm": 2, "elements/s": 1.2e11}),
    case("scan", scan_bwd, SCAN_OPS[1:], "bwd", "cuda", 20, _BIG, BF16, backends=_FAST,
         targets={"mamba_ssm": 1.5}),
    case("scan", scan_train, SCAN_OPS, "fwd+bwd", "cuda", 21, _BIG, BF16, backends=_FAST),
    case("update", update, _STEP, "step", "cuda", 30, {"B": 256, "D": 8192, "N": 16}, BF16, targets={"limit": 0.85}),
    case("conv", conv_fwd, CONV_OPS[:1], "fwd", "cuda", 40, _BIG_CONV, BF16, targets={"limit": 0.85}),
    case("conv", functools.partial(conv_train, only_bwd=True), CONV_OPS[1:], "bwd", "cuda", 50, _BIG_CONV, BF16),
    case("conv_update", conv_update, _CONV_STEP, "step", "cuda", 60, {"B": 256, "D": 8192, "W": 4}, BF16),
    case("inner", functools.partial(inner, train=True), INNER_OPS, "fwd+bwd", "cuda", 65,
         {"B": 8, "D": 2048, "N": 16, "L": 2048}, BF16, backends=_FAST),
    case("mixer", mixer_step, ("mamba_update",), "step", "cuda", 66, {"B": 1, "M": 2048, "D": 4096, "N": 16}, BF16),
    hf.case("prefill", "cuda", 70, layers=24, width=768, length=2048),
    hf.case("decode", "cuda", 71, layers=24, width=768, length=64),
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cuda", 80, {"B": 1, "D": 1536, "N": 16, "L": 16384}, BF16,
         backends=_FAST),
    case("scan", scan_bwd, SCAN_OPS[1:], "bwd", "cuda", 81, {"B": 1, "D": 1536, "N": 16, "L": 4096}, BF16,
         backends=_FAST),
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cuda", 82, _BIG, FP32, backends=_FAST),
    case("scan", scan_fwd, SCAN_OPS[:1], "fwd", "cuda", 83, {"B": 8, "D": 2048, "N": 64, "L": 2048}, BF16,
         backends=_FAST),
    case("update", update, _STEP, "step", "cuda", 84, {"B": 1, "D": 5120, "N": 16}, BF16),
    case("conv", conv_train, CONV_OPS, "fwd+bwd", "cuda", 85, _BIG_CONV, BF16),
    case("conv", functools.partial(conv_fwd, channels_last=True), CONV_OPS[:1], "fwd", "cuda", 86, _BIG_CONV, BF16,
         note="channels_last"),
    memory.case("fwd", "cuda", 90, _BIG),
    memory.case("bwd", "cuda", 91, _BIG),
    case("scan", functools.partial(scan_long, short=8192), SCAN_OPS[:1], "fwd", "cuda", 95,
         {"B": 1, "D": 1024, "N": 16, "L": 2**20}, BF16, backends=_FAST),
]  # fmt: skip

CASES = [*CPU, *CUDA]
