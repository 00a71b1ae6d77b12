"""GPTQ checkpoints, v1, v2 and planar: int32 words along K, zeros along N, act-order as an index of groups.

Source: Frantar et al., GPTQ, 2022; the tensors qweight, qzeros, scales, g_idx of AutoGPTQ and GPTQModel, whose gptq_p
holds each 32 codes in planes.
"""

import torch

from scalekern.quant._formats import FORMATS
from scalekern.quant._pack import pack, row_bytes, unpack
from scalekern.quant.readers._source import FLOATS, Layer, as_bytes, prefixes, rest
from scalekern.quant.tensor import QuantizedTensor

METHOD = "gptq"
BITS = (2, 3, 4, 8)
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # of gptq_p: widths, from the lowest bits on; 2, 4, 8 have one


def read(tensors, config) -> dict:
    """{name: QuantizedTensor or Tensor}; `X.weight` for the tensors X.qweight, X.qzeros, X.scales and X.g_idx."""
    version = config.get("checkpoint_format", config.get("format", "gptq"))  # GPTQModel's old word for it and its new
    if version not in ("gptq", "gptq_v2", "gptq_p"):
        raise ValueError(f"gptq: checkpoint_format must be gptq, gptq_v2 or gptq_p, got {version!r}")
    if config.get("is_marlin_format"):
        raise ValueError("gptq: the config's is_marlin_format is set: matrices in Marlin's own order are not read")
    if "bits" not in config:
        raise ValueError("gptq: the config must say bits (quantization_config of config.json, or quantize_config.json)")
    taken, found = set(), {}
    for prefix in prefixes(tensors, ".qweight"):
        layer = Layer(METHOD, tensors, taken)
        found[prefix + ".weight"] = _read_layer(layer, prefix, config, version)
    return found | rest(tensors, taken, METHOD, (".qzeros", ".g_idx"))


def _override(config, prefix: str) -> dict:
    """The config with what its `dynamic` rules, regular expressions of names, say of this layer."""
    import re

    try:
        for pattern, changes in (config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), prefix):
                return {**config, **changes}
    except (AttributeError, TypeError, re.error) as error:
        raise ValueError(
            f"gptq: {prefix}.qweight cannot be looked up in the config's dynamic, which must be a dict of dicts by "
            f"regular expressions, got {config['dynamic']!r} ({error})"
        ) from error
    return config


def _from_planes(words, bits):
    """(n bits / 32, N) words -> (n, N) codes: each 32 of them lie in `bits` words, those of the lowest plane first."""
    blocks, codes, low = words.reshape(-1, bits, words.shape[1]), 0, 0
    for width in PLANES[bits]:  # a plane as wide as it has words: its first word is as far down as its first bit is up
        shifts = torch.arange(0, 32, width, dtype=torch.int32)[:, None]
        plane = blocks[:, low : low + width, None] >> shifts & (1 << width) - 1  # [blocks, width, 32 / width, N]
        codes, low = codes | plane.flatten(1, 2) << low, low + width
    return codes.flatten(0, 1).to(torch.uint8)


def _read_layer(layer, prefix, config, version) -> QuantizedTensor:
    config = _override(config, prefix)
    bits = config["bits"] if type(config["bits"]) is int else repr(config["bits"])
    planar = version == "gptq_p" and bits in PLANES
    if bits not in BITS and not planar:
        others = " (3, 5, 6 and 7 in planes)" if version == "gptq_p" else ""
        layer.fail(f"{prefix}.qweight", f"must have 2, 3, 4 or 8 bits{others}, the config says {bits}")
    words = layer.get(f"{prefix}.qweight", torch.int32, (None, None))
    N = words.shape[1]
    g_idx = layer.get(f"{prefix}.g_idx", (torch.int32, torch.int64), (None,), default=None)
    K = len(g_idx) if g_idx is not None and len(g_idx) else words.shape[0] * 32 // bits
    if words.shape[0] != -(-K * bits // 32):
        layer.fail(f"{prefix}.qweight", f"must have {-(-K * bits // 32)} rows for {K} columns, got {words.shape[0]}")
    scales = layer.get(f"{prefix}.scales", FLOATS, (None, N))
    G = scales.shape[0]
    size = config.get("group_size", -1)
    if size is not None and size != -1 and (not isinstance(size, int) or size < 1):
        layer.fail(f"{prefix}.scales", f"must come with a group_size of -1 or at least 1, the config says {size!r}")
    size = K if size in (-1, None) else size
    if G != -(-K // size):
        layer.fail(f"{prefix}.scales", f"must have {-(-K // size)} rows (groups of {size} in {K}), got {G}")
    qzeros = layer.get(f"{prefix}.qzeros", torch.int32, (G, -(-N * bits // 32)))
    if planar and (N % 32 or K % 32):
        layer.fail(f"{prefix}.qweight", f"must have a multiple of 32 rows and columns in planes, got {(N, K)}")
    zeros = (_from_planes(qzeros.mT, bits) if planar else unpack(as_bytes(qzeros), bits, N).mT).contiguous()
    if version == "gptq":
        zeros = zeros + 1 & (1 << bits) - 1  # v1 stores one less, modulo 2^bits
    data = pack(_from_planes(words, bits).mT, bits) if planar else as_bytes(words.mT)[:, : row_bytes(K, bits)]
    perm = None
    if config.get("desc_act") and (g_idx is None or not len(g_idx)) and G > 1:
        layer.fail(f"{prefix}.g_idx", "is missing or empty, which desc_act of the config needs")
    if g_idx is not None and len(g_idx) and not torch.equal(g_idx.long(), torch.arange(K) // size):
        perm = torch.argsort(g_idx.long(), stable=True)
        if not torch.equal(g_idx.long()[perm], torch.arange(K) // size):
            layer.fail(f"{prefix}.g_idx", f"must hold {size} columns of each group, the last may be short")
        data = pack(unpack(data, bits, K)[:, perm], bits)
    if (zeros == 1 << bits - 1).all():
        zeros = None
    return QuantizedTensor(
        data.contiguous(), scales.mT.contiguous(), zeros, perm=perm, format=f"int{bits}", columns=K, group_size=size,
        dtype=scales.dtype,
    ).check(f"gptq: {prefix}")  # fmt: skip


def write(tensors, *, version: int = 2) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of `read`: (tensors, quantization_config).

    Args:
        tensors: {name: QuantizedTensor or Tensor}; a quantized name ends in .weight.
        version: 1 or 2 of the format.

    Returns:
        ({name: Tensor}, the config with bits, group_size, desc_act, sym, checkpoint_format).

    Raises:
        ValueError: a tensor that the format cannot hold, by its name; another version.
    """
    if type(version) is not int or version not in (1, 2):
        raise ValueError(f"gptq: version must be 1 or 2, got {version!r}")
    out, found = {}, []
    for name, w in tensors.items():
        if not isinstance(w, QuantizedTensor):
            out[name] = w
            continue
        out |= _write_layer(name, w, version)
        one = w.scales.shape[-1] == 1  # which is a group of any size from its columns on
        found.append((w.bits, w.group_size, w.columns if one else None, w.perm is not None, w.zeros is None))
    sizes = {size for _, size, one, *_ in found if one is None}
    if not sizes:
        sizes = {-1 if size == one else size for _, size, one, *_ in found}
        sizes = sizes if len(sizes) == 1 else {-1}
    size = min(sizes)
    if len({f[0] for f in found}) > 1 or len(sizes) > 1 or any((f[2] or 0) > size > 0 for f in found):
        got = sorted({(f[0], -1 if f[1] == f[2] else f[1]) for f in found})
        raise ValueError(f"gptq: all matrices must have the same bits and group_size, got {got}")
    bits = found[0][0] if found else 4
    return out, {
        "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": any(f[3] for f in found),
        "sym": all(f[4] for f in found), "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip


def _write_layer(name, w: QuantizedTensor, version: int) -> dict[str, torch.Tensor]:
    fmt, fail = FORMATS[w.format], Layer(METHOD, {}, set()).fail
    N, K = w.shape[-2:]
    if not name.endswith(".weight") or w.data.dim() != 2:
        fail(name, "must be a matrix whose name ends in .weight")
    if not fmt.is_integer or fmt.bits not in BITS or w.format == "ternary" or w.offsets is not None:
        fail(name, f"must be int2, int3, int4 or int8 without offsets, got {w.format}")
    if w.outer is not None or w.scales.dtype not in FLOATS:
        fail(name, "must have one level of floating scales")
    if not N * K or N * fmt.bits % 32 or K * fmt.bits % 32:
        fail(name, f"must fill whole 32-bit words along both axes, got shape {(N, K)} of {fmt.bits} bits")
    groups = torch.arange(K, device=w.device) // w.group_size
    codes, g_idx = unpack(w.data, fmt.bits, K), groups
    if w.perm is not None:
        back = torch.argsort(w.perm)
        codes, g_idx = codes[:, back], groups[back]
    scales = w.scales.expand(N, -1)
    zeros = torch.full_like(scales, fmt.zero, dtype=torch.uint8) if w.zeros is None else w.zeros.expand(N, -1)
    whole, less = zeros.to(torch.int32), int(version == 1)
    if not torch.equal(whole.to(zeros.dtype), zeros) or whole.min() < less or whole.max() >= fmt.levels:
        fail(name, f"must have whole zeros of {less} to {fmt.levels - 1}")
    words = lambda codes: pack(codes, fmt.bits).view(torch.int32)  # noqa: E731
    stem = name.removesuffix("weight")
    return {
        stem + "qweight": words(codes).mT.contiguous(),
        stem + "qzeros": words((whole - less).mT),
        stem + "scales": scales.mT.contiguous(),
        stem + "g_idx": g_idx.to(torch.int32),
    }
