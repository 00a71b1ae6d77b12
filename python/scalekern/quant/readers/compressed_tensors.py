"""compressed-tensors checkpoints, format "pack-quantized": codes of 1 to 8 bits in int32 words along K.

Source: the tensors weight_packed, weight_scale, weight_zero_point, weight_shape, weight_g_idx of compressed-tensors.
"""

import re

import torch

from scalekern.quant._formats import FORMATS
from scalekern.quant._pack import pack, row_bytes, unpack
from scalekern.quant.readers._source import FLOATS, Layer, as_bytes, prefixes, rest
from scalekern.quant.tensor import QuantizedTensor

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
# What a plain tensor is not called: codes of another format, a byte each, have a scale too; sparse ones a bitmask.
PARTS = (".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_scale", ".weight_global_scale", ".bitmask")


def read(tensors, config) -> dict:
    """{name: QuantizedTensor or Tensor}; `X.weight` for the tensors X.weight_packed, X.weight_scale, ..."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"compressed-tensors: config_groups must be a dict of dicts, got {groups!r}")
    for key, group in groups.items():
        weights, targets = group.get("weights"), group.get("targets") or []
        if not isinstance(weights or {}, dict) or not isinstance(targets, list) or not _all_text(targets):
            raise ValueError(
                f"compressed-tensors: {key} of config_groups must have weights as a dict and targets as a list of "
                f"strings, got {weights!r} and {targets!r}"
            )
    groups = list(groups.values())
    mixed = config.get("format") == "mixed-precision" and groups  # then each group says its own
    for format in (None if mixed else config.get("format"), *(g.get("format") for g in groups)):
        if format not in (None, FORMAT):
            raise ValueError(f"compressed-tensors: only the format {FORMAT} is read, the config says {format}")
    groups = [group for group in groups if group.get("weights")]  # others are of activations, or of a cache
    taken, found, names = set(), {}, prefixes(tensors, ".weight_packed")
    for prefix in names:
        layer = Layer(METHOD, tensors, taken)
        weights = _weights_of(layer, prefix, groups, names) if groups else {}
        found[prefix + ".weight"] = _read_layer(layer, prefix + ".weight", weights)
    return found | rest(tensors, taken, METHOD, PARTS)


def _all_text(values) -> bool:
    return all(isinstance(value, str) for value in values)


def _weights_of(layer, prefix: str, groups, names) -> dict:
    """What the config says of a layer's weights: the group that names it, else one whose pattern fits, else one of a
    class, which tensors do not tell: "Linear" is any. Targets that fit nothing may be names of another wrapping."""
    ranks = {}
    for group in groups:
        for target in group.get("targets") or ["Linear"]:
            if target == prefix:
                rank = 0
            elif target.startswith("re:"):
                try:
                    rank = 1 if re.match(target.removeprefix("re:"), prefix) else 3
                except re.error as error:
                    layer.fail(f"{prefix}.weight_packed", f"cannot be looked up: {target!r} is no pattern ({error})")
            else:
                rank = 2 if target[:1].isupper() and target.isidentifier() and target not in names else 3
            ranks.setdefault(rank, []).append(group)
    candidates, kinds = ranks[min(ranks)], []
    for group in candidates:
        kind = {key: group["weights"].get(key) for key in ("num_bits", "group_size", "symmetric", "actorder")}
        kinds += [kind] if kind not in kinds else []
    if len(kinds) > 1:
        targets = [group.get("targets") for group in candidates]
        layer.fail(f"{prefix}.weight_packed", f"must belong to one of config_groups, fits targets {targets}: {kinds}")
    return candidates[0]["weights"]


def _words(columns: int, bits: int) -> tuple[int, int]:
    """The words of a row: a stream of bits, and, of releases that left words unfilled, 32 // bits codes a word."""
    return -(-columns * bits // 32), -(-columns // (32 // bits))


def _unpack(words, bits: int, columns: int):
    """(R, W) int32 -> (R, columns) uint8 codes."""
    data = as_bytes(words)
    if words.shape[-1] == _words(columns, bits)[0]:
        return unpack(data, bits, columns)
    codes = words[..., None] >> torch.arange(0, 32 - bits + 1, bits, dtype=torch.int32) & (1 << bits) - 1
    return codes.flatten(-2)[..., :columns].to(torch.uint8)


def _read_layer(layer, name, weights) -> QuantizedTensor:
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if weights.get("type", "int") != "int":
        layer.fail(f"{name}_packed", f"must be of integers, the config says type {weights['type']!r}")
    if not (bits is None or type(bits) is int and 1 <= bits <= 8):
        layer.fail(f"{name}_packed", f"must have 1 to 8 bits, the config says num_bits {bits!r}")
    if not (size is None or type(size) is int and (size == -1 or size >= 1)):
        layer.fail(f"{name}_scale", f"must come with a group_size of -1 or at least 1, the config says {size!r}")
    widths = range(1, 9) if bits is None else [bits]
    packed = layer.get(f"{name}_packed", torch.int32, (None, None))
    shape = layer.get(f"{name}_shape", (torch.int64, torch.int32), (2,)).tolist()
    N, K = shape
    if min(N, K) < 0:
        layer.fail(f"{name}_shape", f"must hold sizes from 0, got {shape}")
    if packed.shape[0] != N:
        layer.fail(f"{name}_packed", f"must have {N} rows (weight_shape), got {packed.shape[0]}")
    # A width whose stream of bits fits is taken before one with unfilled words.
    fitting = [[b for b in widths if packed.shape[1] == _words(K, b)[old]] for old in (0, 1)]
    fitting = fitting[0] or fitting[1]
    if len(fitting) != 1:
        wanted = f"{' or '.join(map(str, widths))} bits for shape {(N, K)}"
        layer.fail(f"{name}_packed", f"must have as many words a row as {wanted}, got {packed.shape[1]}")
    bits = fitting[0]
    scales = layer.get(f"{name}_scale", FLOATS)
    scales = scales.reshape(1, 1) if scales.numel() == 1 and scales.dim() < 2 else scales
    if scales.dim() != 2 or scales.shape[0] not in (1, N):
        layer.fail(f"{name}_scale", f"must have shape (1,) or ({N}, groups), got {tuple(scales.shape)}")
    G = scales.shape[1]
    if weights:
        size = max(1, K) if size in (None, -1) else size
    else:  # a config that says nothing
        size = max(1, K if G == 1 else -(-K // max(1, G)))
    if -(-K // size) != G:
        layer.fail(f"{name}_scale", f"must have {-(-K // size)} groups of {size} of {K} columns, got {G} groups")
    zeros = layer.get(f"{name}_zero_point", **({"default": None} if weights.get("symmetric", True) else {}))
    if zeros is not None and zeros.dtype == torch.int32:
        words = layer.get(f"{name}_zero_point", torch.int32, (None, G))
        if words.shape[0] not in _words(N, bits):
            layer.fail(f"{name}_zero_point", f"must have {_words(N, bits)[0]} rows of words, got {words.shape[0]}")
        zeros = _unpack(words.mT, bits, N).mT.contiguous()
    elif zeros is not None:  # of a tensor: signed, one byte a zero
        zeros = layer.get(f"{name}_zero_point", torch.int8)
        if zeros.numel() != scales.numel():
            layer.fail(f"{name}_zero_point", f"must have {scales.numel()} elements, got shape {tuple(zeros.shape)}")
        zeros = (zeros.reshape(scales.shape).int() + (1 << bits - 1)).to(torch.uint8)
    codes_of = lambda: _unpack(packed, bits, K)  # noqa: E731
    data = as_bytes(packed)[:, : row_bytes(K, bits)].contiguous()
    if packed.shape[1] != _words(K, bits)[0]:
        data = pack(codes_of(), bits)
    perm = None
    ordered = weights.get("actorder") in (True, "group", "dynamic") and G > 1  # "weight" leaves the columns in order
    g_idx = layer.get(
        f"{name}_g_idx", (torch.int32, torch.int64), (K,), **({} if ordered else {"default": None})
    )
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(K) // size):
        perm = torch.argsort(g_idx.long(), stable=True)
        if not torch.equal(g_idx.long()[perm], torch.arange(K) // size):
            layer.fail(f"{name}_g_idx", f"must hold {size} columns of each group, the last may be short")
        data = pack(codes_of()[:, perm], bits)
    kind = f"int{bits}"
    if bits == 1:  # codes 0 and 1 with zero 1; scalekern's int1 stands for -1 and 1: w = s / 2 (v + 1 - 2 zero)
        zeros = torch.ones_like(scales, dtype=torch.uint8) if zeros is None else zeros
        half = scales.float() / 2
        return QuantizedTensor(
            data, half, offsets=half * (1 - 2 * zeros.float()), perm=perm, format="int1", columns=K, group_size=size,
            dtype=scales.dtype,
        ).check(f"compressed-tensors: {name}")  # fmt: skip
    return QuantizedTensor(
        data, scales.contiguous(), zeros, perm=perm, format=kind, columns=K, group_size=size, dtype=scales.dtype
    ).check(f"compressed-tensors: {name}")


def write(tensors) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of `read`: (tensors, quantization_config).

    Args:
        tensors: {name: QuantizedTensor or Tensor}; a quantized name ends in .weight. int2 to int8.

    Returns:
        ({name: Tensor}, the config with one group a width, group size and symmetry, its targets the layers' names).

    Raises:
        ValueError: a tensor that the format cannot hold, by its name.
    """
    out, kinds = {}, {}
    for name, w in tensors.items():
        if isinstance(w, QuantizedTensor):
            out |= _write_layer(name, w)
            size = None if w.scales.shape[-1] == 1 else w.group_size
            kinds.setdefault((w.bits, size, w.zeros is None, w.perm is not None), []).append(
                name.removesuffix(".weight")
            )
        else:
            out[name] = w
    groups = {}
    for i, ((bits, size, symmetric, perm), layers) in enumerate(kinds.items()):
        groups[f"group_{i}"] = {"targets": layers, "weights": {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if size is None else "group",
            "group_size": size, "actorder": "group" if perm else None,
        }}  # fmt: skip
    return out, {"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "config_groups": groups}


def _write_layer(name, w: QuantizedTensor) -> dict[str, torch.Tensor]:
    fmt, fail = FORMATS[w.format], Layer(METHOD, {}, set()).fail
    N, K = w.shape[-2:]
    if not name.endswith(".weight") or w.data.dim() != 2 or not N * K:
        fail(name, f"must be a matrix with elements whose name ends in .weight, got shape {tuple(w.shape)}")
    if not fmt.is_integer or w.format == "ternary" or w.offsets is not None or w.outer is not None:
        fail(name, f"must be int2 to int8 without offsets and with one level of scales, got {w.format}")
    if w.scales.dtype not in FLOATS:
        fail(name, f"must have floating scales of at most 32 bits, got {w.scales.dtype}")
    filled = lambda codes: torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 32))
    words = lambda codes: pack(filled(codes), fmt.bits).view(torch.int32)
    codes, g_idx = unpack(w.data, fmt.bits, K), torch.arange(K, device=w.device) // w.group_size
    if w.perm is not None:
        back = torch.argsort(w.perm)
        codes, g_idx = codes[:, back], g_idx[back]
    out = {
        f"{name}_packed": words(codes)[:, : _words(K, fmt.bits)[0]].contiguous(),
        f"{name}_scale": w.scales.expand(N, -1).contiguous(),
        f"{name}_shape": torch.tensor([N, K]),
    }
    if w.zeros is not None:
        whole = w.zeros.expand(N, -1).to(torch.uint8)
        if not torch.equal(whole.to(w.zeros.dtype), w.zeros.expand(N, -1)) or whole.max().item() >= fmt.levels:
            fail(name, f"must have whole zeros of 0 to {fmt.levels - 1}")
        out[f"{name}_zero_point"] = words(whole.mT)[:, : _words(N, fmt.bits)[0]].mT.contiguous()
    if w.perm is not None:
        out[f"{name}_g_idx"] = g_idx.to(torch.int32)
    return out
