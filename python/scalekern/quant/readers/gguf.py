"""GGUF files: the legacy quants of 32 elements and the K-quants of 256, through the gguf package.

What a super-block shares (its d and dmin) is multiplied into float32 scales and offsets of the groups.

Source: ggml's block_q4_0 .. block_q6_K, as the gguf package's readme and quants describe them.
"""

import torch

from scalekern.quant._formats import FORMATS
from scalekern.quant._pack import pack
from scalekern.quant.tensor import QuantizedTensor

METHOD = "gguf"
PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def read(path) -> dict:
    """{name: QuantizedTensor or Tensor} of a .gguf file, under GGUF's names."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "read_checkpoint: GGUF files need the package gguf (pip install 'scalekern[quant]')"
        ) from error
    try:
        reader = _reader(gguf)(str(path))
    except Exception as error:  # whatever parsing a broken header or a cut file runs into
        raise ValueError(f"gguf: {path} is truncated or no GGUF file: {error}") from error
    if getattr(reader, "byte_order", "I") != "I":  # gguf's word for this machine's own
        raise ValueError(f"gguf: {path} must be in this machine's byte order, its numbers are in the other")
    split = getattr(reader, "fields", {}).get("split.count")
    if split is not None and (count := int(split.parts[-1][0])) > 1:
        raise ValueError(f"gguf: {path} is one of {count} parts of a model: join them (llama-gguf-split --merge)")
    found = {}
    for t in reader.tensors:
        kind, shape = t.tensor_type.name, [int(n) for n in reversed(t.shape)]
        raw = torch.from_numpy(t.data.copy())
        if kind in PLAIN:
            raw = raw.contiguous().view(torch.uint8).view(PLAIN[kind]) if kind == "BF16" else raw
            found[t.name] = raw.reshape(shape)
        elif kind in BLOCKS and len(shape) >= 2:
            found[t.name] = from_blocks(t.name, kind, raw.view(torch.uint8).flatten(), shape)
        else:
            raise ValueError(f"gguf: {t.name} has the type {kind}; read are {', '.join([*PLAIN, *BLOCKS])}")
    return found


def _reader(gguf):
    """The package's reader, which of a tensor that it cannot read says the name too."""

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start_offs, fields):
            try:
                super()._build_tensors(start_offs, fields)
            except Exception:
                for field in fields:
                    try:
                        super()._build_tensors(start_offs, [field])
                    except Exception as error:
                        raise ValueError(f"{field.name}: {error}") from error
                raise

    return Reader


def from_blocks(name: str, kind: str, data: torch.Tensor, shape) -> QuantizedTensor:
    """The QuantizedTensor of one tensor's bytes (a flat uint8), of shape (..., N, K)."""
    format, size, length, group, parse = BLOCKS[kind]
    *lead, K = shape
    blocks = torch.Size(lead).numel() * K // size
    if K % size or data.numel() != blocks * length:
        raise ValueError(f"gguf: {name} must have {blocks * length} bytes for {kind} of shape {tuple(shape)} in blocks "
                         f"of {size}, got {data.numel()}")  # fmt: skip
    codes, scales, offsets = parse(data.view(blocks, length))
    rows = lambda p: None if p is None else p.reshape(*lead, -1).contiguous()  # noqa: E731
    # Offsets go with codes that count from 0.
    zeros = None if offsets is None else torch.zeros(*lead[:-1], 1, K // group, dtype=torch.uint8)
    return QuantizedTensor(
        pack(rows(codes), FORMATS[format].bits), rows(scales), zeros, rows(offsets), format=format, columns=K,
        group_size=group, dtype=torch.float32,
    ).check(f"gguf: {name}")  # fmt: skip


def _half(b):
    return b.contiguous().view(torch.float16)


def _low_high(qs):
    """(B, n) bytes -> (B, 2 n): all low nibbles, then all high ones."""
    return torch.cat([qs & 15, qs >> 4], -1)


def _planes(qs, bits: int, width: int):
    """(B, n) bytes -> (B, n 8 / bits): of each `width` bytes the lowest bits, then the next, ..."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (qs.unflatten(-1, (-1, 1, width)) >> shifts[:, None] & (1 << bits) - 1).flatten(1)


def _fifth(qh):
    """(B, 4) bytes -> (B, 32) the bits from the lowest."""
    return (qh[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _q4_0(b):
    return _low_high(b[:, 2:]), _half(b[:, :2]), None


def _q4_1(b):
    return _low_high(b[:, 4:]), _half(b[:, :2]), _half(b[:, 2:4])


def _q5_0(b):
    return _low_high(b[:, 6:]) | _fifth(b[:, 2:6]) << 4, _half(b[:, :2]), None


def _q5_1(b):
    return _low_high(b[:, 8:]) | _fifth(b[:, 4:8]) << 4, _half(b[:, :2]), _half(b[:, 2:4])


def _q8_0(b):
    return b[:, 2:] ^ 128, _half(b[:, :2]), None


def _q2_k(b):
    scales, qs, d, dmin = b[:, :16], b[:, 16:80], _half(b[:, 80:82]).float(), _half(b[:, 82:84]).float()
    return _planes(qs, 2, 32), d * (scales & 15).float(), -(dmin * (scales >> 4).float())


def _q3_k(b):
    high, low, s, d = b[:, :32], b[:, 32:96], b[:, 96:108], _half(b[:, 108:110]).float()
    scales = _low_high(s[:, :8]) | _planes(s[:, 8:], 2, 4) << 4
    return _planes(low, 2, 32) | _planes(high, 1, 32) << 2, d * (scales.float() - 32), None


def _k_scales(s):
    """(B, 12) bytes -> 8 scales and 8 minima of 6 bits: four whole, four whose upper bits lie in those."""
    low, middle, high = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], -1)
    return scales.float(), torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], -1).float()


def _q4_k(b):
    d, dmin, (scales, minima) = _half(b[:, :2]).float(), _half(b[:, 2:4]).float(), _k_scales(b[:, 4:16])
    return _planes(b[:, 16:], 4, 32), d * scales, -(dmin * minima)


def _q5_k(b):
    d, dmin, (scales, minima) = _half(b[:, :2]).float(), _half(b[:, 2:4]).float(), _k_scales(b[:, 4:16])
    return _planes(b[:, 48:], 4, 32) | _planes(b[:, 16:48], 1, 32) << 4, d * scales, -(dmin * minima)


def _q6_k(b):
    low, high, scales, d = b[:, :128], b[:, 128:192], b[:, 192:208].view(torch.int8), _half(b[:, 208:210]).float()
    return _planes(low, 4, 64) | _planes(high, 2, 32) << 4, d * scales.float(), None


# type -> (format, elements of a block, bytes of a block, columns of a group, codes and scales and offsets of blocks)
BLOCKS = {
    "Q4_0": ("int4", 32, 18, 32, _q4_0),
    "Q4_1": ("int4", 32, 20, 32, _q4_1),
    "Q5_0": ("int5", 32, 22, 32, _q5_0),
    "Q5_1": ("int5", 32, 24, 32, _q5_1),
    "Q8_0": ("int8", 32, 34, 32, _q8_0),
    "Q2_K": ("int2", 256, 84, 16, _q2_k),
    "Q3_K": ("int3", 256, 110, 16, _q3_k),
    "Q4_K": ("int4", 256, 144, 32, _q4_k),
    "Q5_K": ("int5", 256, 176, 32, _q5_k),
    "Q6_K": ("int6", 256, 210, 16, _q6_k),
}
