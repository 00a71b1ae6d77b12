"""The rivals: what a user would run otherwise. All imports are optional; who is absent is named with the reason.

A peer is timed in the process of the kernel that it is compared with, in turns with it.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F

from scalekern.benchmarks import rates


class Absent(Exception):
    """This peer cannot take part here; the message says why."""


@dataclasses.dataclass
class Peer:
    """run: one call. scale: what its time is multiplied by (for a yardstick that does a part of the work)."""

    run: Callable
    version: str
    scale: float = 1.0


@functools.cache
def module(name: str, package: str | None = None):
    """An upstream module, never one of scalekern's own import shims under its name."""
    package = package or name.partition(".")[0]
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{package} is not installed" if error.name == name.partition(".")[0] else f"{package}: {error}")
    if "scalekern" in (getattr(found, "__file__", None) or "scalekern"):
        raise Absent(f"{package} is served by scalekern's own shim here")
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def torch_peer(run: Callable, scale: float = 1.0) -> Peer:
    return Peer(run, f"torch {torch.__version__}", scale)


# Every scan peer takes the keyword arguments of scalekern.selective_scan; with `grads` the peer's run is forward and
# backward, returning the output and the gradients in the order of `inputs`.


def forward_backward(function: Callable, dout: torch.Tensor, inputs: tuple) -> Callable:
    def run():
        out = function()
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    return run


def mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Peer:
    upstream = module("mamba_ssm.ops.selective_scan_interface", "mamba_ssm")
    cuda_only(u, "mamba_ssm")
    run = lambda: upstream.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return Peer(run, version("mamba_ssm"))


def mamba_ssm_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus) -> Peer:
    upstream = module("mamba_ssm.ops.triton.selective_state_update", "mamba_ssm")
    cuda_only(x, "mamba_ssm")
    run = lambda: upstream.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return Peer(run, version("mamba_ssm"))


def mamba_ssm_inner(passes: Callable, **kw) -> Peer:
    """passes: what is timed, the forward or the forward and backward of a function."""
    upstream = module("mamba_ssm.ops.selective_scan_interface", "mamba_ssm")
    cuda_only(kw["xz"], "mamba_ssm")
    kw = {**kw, "conv1d_weight": kw["conv1d_weight"][:, None], "delta_softplus": True}
    run = passes(lambda: upstream.mamba_inner_fn(**kw))
    return Peer(run, version("mamba_ssm"))


def causal_conv1d_fn(x, weight, bias, activation) -> Peer:
    upstream = module("causal_conv1d")
    cuda_only(x, "causal_conv1d")
    return Peer(lambda: upstream.causal_conv1d_fn(x, weight, bias, activation=activation), version("causal_conv1d"))


def causal_conv1d_update(x, conv_state, weight, bias, activation) -> Peer:
    upstream = module("causal_conv1d")
    cuda_only(x, "causal_conv1d")
    run = lambda: upstream.causal_conv1d_update(x, conv_state, weight, bias, activation)
    return Peer(run, version("causal_conv1d"))


def flash_fft_conv(u, size: int) -> tuple[Callable, str]:
    """FlashFFTConv's module for FFTs of `size` points, which has to be a power of two."""
    upstream = module("flashfftconv")
    cuda_only(u, "flashfftconv")
    return upstream.FlashFFTConv(size, dtype=u.dtype).to(u.device).train(u.requires_grad), version("flashfftconv")


def transformers_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Peer:
    """The loop over time that transformers runs when mamba_ssm is not installed."""
    slow = transformers_slow("mamba_selective_scan")
    run = lambda: slow(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return Peer(run, f"transformers {version('transformers')}")


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Peer:
    """transformers with use_mambapy=True: the parallel scan of mambapy on (B, L, D, N) tensors."""
    module("mambapy.pscan", "mambapy")
    if u.dtype != torch.float32:
        raise Absent("the mambapy path of transformers multiplies float32 states with matrices of the input's dtype")
    slow = transformers_slow("mamba_selective_scan")
    run = lambda: slow(
        u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus, use_mambapy=True
    )  # fmt: skip
    return Peer(run, f"mambapy {version('mambapy')}, transformers {version('transformers')}")


def transformers_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus) -> Peer:
    slow = transformers_slow("mamba_selective_state_update")
    run = lambda: slow(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)
    return Peer(run, f"transformers {version('transformers')}")


def transformers_conv_update(x, conv_state, weight, bias, activation) -> Peer:
    slow = transformers_slow("causal_conv1d_update")
    run = lambda: slow(x[..., None], conv_state, weight, bias, activation)[..., 0]
    return Peer(run, f"transformers {version('transformers')}")


def transformers_slow(name: str) -> Callable:
    """One of the plain-torch functions of transformers' Mamba, whatever faster one it would have picked."""
    mamba = module("transformers.models.mamba.modeling_mamba", "transformers")
    function = getattr(mamba, name, None)
    if function is None:
        raise Absent(f"transformers {version('transformers')} has no {name}")
    return getattr(function, "__wrapped__", function)


def torch_conv(x, weight, bias, activation) -> Peer:
    """Grouped F.conv1d, cut to length, and silu: causal_conv1d in plain PyTorch."""
    channels, width = weight.shape
    if x.dtype != weight.dtype:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)

    def run():
        y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=channels)[..., : x.shape[-1]]
        return F.silu(y) if activation else y

    return torch_peer(run)


def torch_exp(elements: int, device: torch.device) -> Peer:
    """torch.exp of that many elements: on the CPU in cache-sized pieces, of the size that serves it best."""
    if device.type != "cpu":
        raise Absent("a yardstick for the CPU; on a GPU torch.exp measures memory")
    best = min(rates.PIECES, key=lambda n: rates.best_of(device, rates.exp_pieces(n, 8), 0.2) / n)
    count = max(1, min(elements, 2**27) // best)
    pieces = rates.exp_pieces(best, count)

    def run() -> None:
        pieces()

    return torch_peer(run, elements / (best * count))


def cuda_only(tensor: torch.Tensor, package: str) -> None:
    if tensor.device.type != "cuda":
        raise Absent(f"{package} runs on CUDA tensors only")
