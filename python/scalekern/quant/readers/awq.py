"""AWQ checkpoints: int32 words along N, their nibbles holding columns 0, 2, 4, 6, 1, 3, 5, 7 (version "gemm"), or along
K in order, as they are kept here, with room behind the groups' scales and zeros (version "gemv").

Source: Lin et al., AWQ, 2023; the tensors qweight, qzeros, scales of AutoAWQ.
"""

import torch

from scalekern.quant._pack import pack
from scalekern.quant.readers._source import FLOATS, Layer, prefixes, rest
from scalekern.quant.tensor import QuantizedTensor

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, in each nibble from the lowest


def read(tensors, config) -> dict:
    """{name: QuantizedTensor or Tensor}; `X.weight` for the tensors X.qweight, X.qzeros and X.scales."""
    bits = config.get("bits", config.get("w_bit", 4))
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4 or version not in VERSIONS:
        raise ValueError(f"awq: only 4 bits of version gemm or gemv are read, the config says {bits} of {version}")
    taken, found = set(), {}
    for prefix in prefixes(tensors, ".qweight"):
        found[prefix + ".weight"] = VERSIONS[version](Layer(METHOD, tensors, taken), prefix, config)
    return found | rest(tensors, taken, METHOD, (".qzeros",))


def _nibbles(words):
    """(R, N / 8) int32 -> (R, N) uint8."""
    codes = words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
    return codes[..., torch.argsort(torch.tensor(ORDER))].flatten(-2).to(torch.uint8)


def _read_gemm(layer, prefix, config) -> QuantizedTensor:
    words = layer.get(f"{prefix}.qweight", torch.int32, (None, None))
    K, N = words.shape[0], words.shape[1] * 8
    scales = layer.get(f"{prefix}.scales", FLOATS, (None, N))
    G = scales.shape[0]
    size = _group_size(layer, prefix, config, K, K // max(1, G)) or K
    if G * size != K:
        layer.fail(f"{prefix}.scales", f"must have as many rows as groups of {size} fill {K} columns, got {G}")
    zeros = None
    if config.get("zero_point", True):
        zeros = _nibbles(layer.get(f"{prefix}.qzeros", torch.int32, (G, N // 8))).mT.contiguous()
    elif (qzeros := layer.get(f"{prefix}.qzeros", torch.int32, (G, N // 8), default=None)) is not None:
        zeros = _nibbles(qzeros).mT.contiguous()
    return QuantizedTensor(
        pack(_nibbles(words).mT, 4), scales.mT.contiguous(), zeros, format="int4", columns=K, group_size=size,
        dtype=scales.dtype,
    ).check(f"awq: {prefix}")  # fmt: skip


def _read_gemv(layer, prefix, config) -> QuantizedTensor:
    words = layer.get(f"{prefix}.qweight", torch.int32, (None, None))
    N, K = words.shape[0], words.shape[1] * 8
    size = _group_size(layer, prefix, config, K, None)
    if size is None or size < 1 or K % size:
        layer.fail(f"{prefix}.qweight", f"has {K} columns, which the config's group_size {size} must divide")
    G, scales = K // size, layer.get(f"{prefix}.scales", FLOATS, (N, None))
    width = scales.shape[1] // 8
    if scales.shape[1] % 8 or 8 * width < G:
        layer.fail(f"{prefix}.scales", f"must have room for {G} groups, a multiple of 8, got {scales.shape[1]}")
    zeros = layer.get(f"{prefix}.qzeros", torch.int32, (N, width))[..., None] >> torch.arange(0, 32, 4) & 15
    return QuantizedTensor(
        words.contiguous().view(torch.uint8), scales[:, :G].contiguous(), zeros.flatten(1)[:, :G].to(torch.uint8),
        format="int4", columns=K, group_size=size, dtype=scales.dtype,
    ).check(f"awq: {prefix}")  # fmt: skip


def _group_size(layer, prefix, config, K, default):
    size = config.get("group_size", config.get("q_group_size", default))
    if size is not None and type(size) is not int:
        layer.fail(f"{prefix}.scales", f"must come with a whole group_size, the config says {size!r}")
    return K if size == -1 else size


VERSIONS = {"gemm": _read_gemm, "gemv": _read_gemv}
