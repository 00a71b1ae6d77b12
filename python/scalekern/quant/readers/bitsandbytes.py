"""bitsandbytes checkpoints: NF4 and FP4 in blocks of the flattened matrix, absmax plain or nested; LLM.int8.

Source: Dettmers et al., QLoRA, 2023; the tensors weight, weight.absmax, weight.quant_map, weight.nested_absmax,
weight.nested_quant_map and weight.quant_state.bitsandbytes__nf4 or __fp4 (JSON in bytes) of bitsandbytes.
"""

import json
import math

import torch

from scalekern.quant._formats import FORMATS
from scalekern.quant._pack import pack
from scalekern.quant.readers._source import Layer, prefixes, rest
from scalekern.quant.tensor import QuantizedTensor

METHOD = "bitsandbytes"
STATE = ".quant_state.bitsandbytes__"
KINDS = {"nf4": "nf4", "fp4": "fp4_bnb"}
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def read(tensors, config) -> dict:
    """{name: QuantizedTensor or Tensor}, under the names of the weights."""
    taken, found = set(), {}
    for kind in KINDS:
        for name in prefixes(tensors, STATE + kind):
            found[name] = _read_4bit(Layer(METHOD, tensors, taken), name, kind)
    for prefix in prefixes(tensors, ".SCB"):
        found[prefix + ".weight"] = _read_8bit(Layer(METHOD, tensors, taken), prefix)
    others = rest(tensors, taken, METHOD, (".absmax", ".quant_map", ".weight_format"))
    for name, t in others.items():
        if name.endswith(".weight") and t.dtype == torch.int8 and t.dim() == 2:  # codes that would pass for numbers
            raise ValueError(f"{METHOD}: {name.removesuffix('weight')}SCB is missing, the scales of the int8 {name}")
        if name.endswith(".weight") and t.dtype == torch.uint8:
            raise ValueError(f"{METHOD}: {name}{STATE}nf4 or fp4 is missing, which says what the uint8 {name} holds")
    return found | others


def _state(layer, key) -> dict:
    raw = bytes(layer.get(key, torch.uint8, (None,)).tolist())
    try:
        state = json.loads(raw)
        shape = tuple(int(n) for n in state["shape"])
        fields = {"shape": shape, "blocksize": int(state["blocksize"]), "dtype": DTYPES[state["dtype"]]}
        nested = {k: state[k] for k in ("nested_blocksize", "nested_offset") if k in state}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        layer.fail(key, f"must be JSON with shape, blocksize and dtype: {error!r}")
    if len(shape) != 2 or min(shape) < 0 or fields["blocksize"] < 1:
        layer.fail(key, f"must describe a matrix in blocks, got shape {shape} and blocksize {fields['blocksize']}")
    return {**fields, **nested}


def _read_4bit(layer, name, kind) -> QuantizedTensor:
    state = _state(layer, name + STATE + kind)
    (N, K), block = state["shape"], state["blocksize"]
    fmt = FORMATS[KINDS[kind]]
    data = layer.get(name)
    if data.dtype in STORED and data.dim():  # bnb_4bit_quant_storage: the same bytes, which FSDP shards beside the rest
        data = data.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    else:
        layer.get(name, torch.uint8)
    if data.numel() != -(-N * K // 2):
        layer.fail(name, f"must hold {-(-N * K // 2)} bytes for shape {(N, K)}, got {data.numel()}")
    table = layer.get(name + ".quant_map", torch.float32, (16,))
    if not torch.equal(table, fmt.values()):
        layer.fail(name + ".quant_map", f"must be the table of {kind}, got {table.tolist()}")
    blocks = -(-N * K // block)
    absmax = layer.get(name + ".absmax", None, (blocks,))
    if absmax.dtype == torch.uint8:
        absmax = _nested(layer, name, state, absmax)
    elif absmax.dtype != torch.float32:
        layer.fail(name + ".absmax", f"must have dtype float32 or, nested, uint8, got {absmax.dtype}")
    pairs = data.flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten()[: N * K].view(N, K)  # the high nibble comes first
    return by_blocks(codes, absmax, None, block, fmt.name, state["dtype"]).check(f"bitsandbytes: {name}")


def by_blocks(codes, scales, zeros, block: int, format: str, dtype) -> QuantizedTensor:
    """A matrix whose groups are blocks of the flattened matrix: where a block may cross rows, in shorter groups."""
    N, K = codes.shape
    size = math.gcd(K, block) or 1
    first = torch.arange(N)[:, None] * K + torch.arange(0, K, size)
    part = lambda p: None if p is None else p.flatten()[first // block]  # noqa: E731
    bits = FORMATS[format].bits
    return QuantizedTensor(
        pack(codes, bits), part(scales), part(zeros), format=format, columns=K, group_size=size, dtype=dtype
    )


def _nested(layer, name, state, absmax):
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or type(offset) not in (int, float):
        why = "is uint8, but its quant_state has no nested_blocksize and nested_offset that are numbers"
        layer.fail(name + ".absmax", f"{why}, got {block!r} and {offset!r}")
    table = layer.get(name + ".nested_quant_map", torch.float32, (256,))
    outer = layer.get(name + ".nested_absmax", torch.float32, (-(-len(absmax) // block),))
    return table[absmax.long()] * outer.repeat_interleave(block)[: len(absmax)] + offset


def _read_8bit(layer, prefix) -> QuantizedTensor:
    weight = layer.get(prefix + ".weight", torch.int8, (None, None))
    N, K = weight.shape
    scales = layer.get(prefix + ".SCB", torch.float32, (N,))
    layout = layer.get(prefix + ".weight_format", None, default=None)
    if layout is not None and layout.numel() and layout.flatten()[0].item() != 0:
        layer.fail(prefix + ".weight_format", "must be 0 (row-major)")
    return QuantizedTensor(
        (weight.int() + 128).to(torch.uint8), (scales / 127)[:, None], format="int8", columns=K, group_size=max(1, K),
        dtype=torch.float16,
    ).check(f"bitsandbytes: {prefix}.weight")  # fmt: skip
