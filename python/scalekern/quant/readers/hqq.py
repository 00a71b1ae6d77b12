"""HQQ checkpoints in safetensors: planes of codes along the first axis, float zeros, groups along either axis.

Source: Badri and Shaji, Half-Quadratic Quantization, 2023; the encoded state_dict of HQQLinear.
"""

import math

import torch

from scalekern.quant._formats import FORMATS
from scalekern.quant._pack import pack
from scalekern.quant.readers._source import FLOATS, Layer, prefixes, rest
from scalekern.quant.readers.bitsandbytes import by_blocks
from scalekern.quant.tensor import QuantizedTensor

METHOD = "hqq"
PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}  # the bits of a plane


def read(tensors, config) -> dict:
    """{name: QuantizedTensor or Tensor}; `X.weight` for the tensors X.W_q, X.scale, X.zero and what describes them."""
    taken, found = set(), {}
    for prefix in prefixes(tensors, ".W_q"):
        found[prefix + ".weight"] = _read_layer(Layer(METHOD, tensors, taken), prefix)
        taken |= {f"{prefix}.{key}" for key in UNUSED}
    return found | rest(tensors, taken, METHOD, (".packing", ".nbits"))


UNUSED = (
    "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero", "unpack_view_dtype", "view_as_float", "compute_dtype",
)  # fmt: skip


def _unpack(words, packing: str):
    """The planes of a packed matrix, the first in the highest bits, one below the other."""
    bits = PACKINGS[packing]
    planes = 10 if bits == 3 else 8 // bits
    return torch.cat([words >> bits * (planes - 1 - i) & (1 << bits) - 1 for i in range(planes)]).to(torch.uint8)


def _read_layer(layer, prefix) -> QuantizedTensor:
    number = lambda key, *default: _number(layer, f"{prefix}.{key}", *default)  # noqa: E731
    text = lambda key: "".join(map(chr, layer.get(f"{prefix}.{key}", torch.uint8, (None,)).tolist()))  # noqa: E731
    for key in ("quant_scale", "quant_zero"):  # hqq (0.2.8) does not encode such a state either: pickled ones have it
        if number(key, 0):
            layer.fail(f"{prefix}.{key}", "is set: scales and zeros that are quantized themselves are not read")
    nbits, axis, packing = number("nbits"), int(number("axis")), text("packing")
    shape = layer.get(f"{prefix}.shape", (torch.int64, torch.int32), (2,)).tolist()
    N, K = shape
    if min(N, K) < 1:
        layer.fail(f"{prefix}.shape", f"must hold sizes from 1, got {shape}")
    group = int(number("group_size", 0)) or (K if axis == 1 else N)  # none: a row, or a column
    if packing not in PACKINGS or axis not in (0, 1) or group < 1 or N * K % group:
        layer.fail(f"{prefix}.packing", f"{packing} along axis {axis} in groups of {group} is unknown for {(N, K)}")
    if not 1 <= nbits <= PACKINGS[packing]:
        layer.fail(f"{prefix}.nbits", f"must be 1 to {PACKINGS[packing]} in the packing {packing}, got {nbits}")
    bits = math.ceil(nbits)
    format = {1: "int1"}.get(bits, f"int{bits}")
    words = layer.get(f"{prefix}.W_q")
    if number("view_as_float", 0):
        if words.dim() != 2:
            layer.fail(f"{prefix}.W_q", f"must have 2 dimensions, got shape {tuple(words.shape)}")
        to = torch.int32 if packing == "3bit_32" else torch.uint8
        if words.shape[-1] * words.element_size() % to.itemsize:
            layer.fail(f"{prefix}.W_q", f"must view as {to}, got shape {tuple(words.shape)} of {words.dtype}")
        words = words.contiguous().view(to)
    planes = 10 if packing == "3bit_32" else 8 // PACKINGS[packing]
    whole = layer.get(f"{prefix}.scale", FLOATS).numel() == 1 and tuple(words.shape) == (-(-N // planes), K)
    if whole:  # channel_wise=False: one scale, and rows as they were
        axis, group = 1, K
    rows, columns = (N * K // group, group) if axis == 1 else (group, N * K // group)
    wanted = (-(-rows // planes), columns)
    if words.dtype not in (torch.uint8, torch.int32) or tuple(words.shape) != wanted:
        layer.fail(f"{prefix}.W_q", f"must have shape {wanted} of integers, got {tuple(words.shape)} of {words.dtype}")
    codes = _unpack(words, packing)[:rows].reshape(N, K)
    if int(codes.max()) >= 1 << bits:
        layer.fail(f"{prefix}.nbits", f"must be that of the codes up to {int(codes.max())}, got {nbits}")
    scales, zeros = (_parameter(layer, f"{prefix}.{key}", rows if axis == 1 else columns) for key in ("scale", "zero"))
    dtype = scales.dtype
    if axis == 1:
        w = by_blocks(codes, scales, zeros, group, format, dtype)
    else:  # the groups' columns lie rows apart: a scale an element, if need be the same for all rows
        spread = lambda p: (p[None] if columns == K else p.repeat(group).view(N, K)).contiguous()  # noqa: E731
        data = pack(codes, FORMATS[format].bits)
        w = QuantizedTensor(data, spread(scales), spread(zeros), format=format, columns=K, group_size=1, dtype=dtype)
    if bits == 1:  # codes 0 and 1 stand for -1 and 1 here: s (c - z) = s / 2 (2 c - 1) + s (1 / 2 - z)
        scales, zeros = w.scales.float(), w.zeros.float()
        w = w.replace(scales=scales / 2, zeros=None, offsets=scales * (0.5 - zeros))
    return w.check(f"hqq: {prefix}.weight")


def _parameter(layer, name, count):
    t = layer.get(name, FLOATS)
    if t.numel() not in (count, 1):
        layer.fail(name, f"must have {count} elements, got shape {tuple(t.shape)}")
    return t.flatten().expand(count)


def _number(layer, name, default=...):
    t = layer.get(name, default=default)
    if t is default:
        return default
    if t.numel() != 1 or t.is_complex() or not math.isfinite(t.item()):
        layer.fail(name, f"must be one number, got shape {tuple(t.shape)}")
    return t.item()
