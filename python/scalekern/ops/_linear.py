"""Dense float32 products beside the ops, where torch's own choice of library is the slower one.

torch takes MKL for them, and MKL takes AVX2 on processors that are not Intel's, whatever those have: 200 GFLOP/s of
the 540 of two Zen 5 cores. oneDNN, which torch carries as well, looks at the instructions only: 400 to 490 there
(4.9 ms for 11.7 of a product of 512 x 768 x 3072).

Shape letters: K inputs, N outputs.
"""

import functools
import math

import torch
import torch.nn.functional as F

from scalekern._library import differentiated

LEAST = 1 << 21  # multiplications; below, the call costs what the product gains


def product(x, weight, bias=None):
    """F.linear of (..., K) and (N, K), by oneDNN where MKL would take AVX2 for AVX-512. Below autograd."""
    if (
        not torch.compiler.is_compiling()  # first: a tracer would follow the others
        and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and _prefers_onednn()
        and math.prod(x.shape) * weight.shape[0] >= LEAST and torch.backends.mkldnn.enabled
    ):  # fmt: skip
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(x, weight, bias=None):
    """The same anywhere: torch's own F.linear where something is differentiated or cast."""
    if differentiated((x, weight, bias)) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return product(x, weight, bias)


def is_plain(layer) -> bool:
    """Whether layer(x) is its weight's product and nothing else: not quantized, adapted, hooked or replaced."""
    return type(layer) is torch.nn.Linear and not (
        layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__ or "_hf_hook" in layer.__dict__
    )


def project(layer, x):
    """layer(x), by `linear` where that is all that the layer does."""
    return linear(x, layer.weight, layer.bias) if is_plain(layer) else layer(x)


@functools.cache
def _prefers_onednn() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        with open("/proc/cpuinfo") as file:
            vendor = next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:  # not a Linux
        return False
    return vendor != "" and "GenuineIntel" not in vendor
