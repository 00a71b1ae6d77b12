"""Codes of 1 to 8 bits as a stream of bits along the last axis, the first code in the lowest bits.

Code k of a row lies at bits k * bits .. of the row, so that a prefix of the columns is a prefix of the bytes; what
follows the last code in its byte means nothing. For 1, 2, 4 and 8 bits no code crosses a byte.
"""

import torch


def row_bytes(columns: int, bits: int) -> int:
    return (columns * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., K) integers below 2^bits -> (..., ceil(K bits / 8)) uint8."""
    *lead, K = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    n, wide = (8 // bits, torch.uint8) if 8 % bits == 0 else (8, torch.int64)  # codes that fill whole bytes together
    groups = torch.nn.functional.pad(codes.to(wide), (0, -K % n)).reshape(*lead, -(-K // n), n)
    words = (groups << torch.arange(0, n * bits, bits, device=codes.device, dtype=wide)).sum(-1, True, dtype=wide)
    stream = words >> torch.arange(0, n * bits, 8, device=codes.device, dtype=wide) & 255
    return stream.to(torch.uint8).flatten(-2)[..., : row_bytes(K, bits)].contiguous()


def unpack(data: torch.Tensor, bits: int, K: int) -> torch.Tensor:
    """(..., ceil(K bits / 8)) uint8 -> (..., K) uint8, one code a byte."""
    if bits == 8:
        return data[..., :K]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, device=data.device, dtype=torch.uint8)
        codes = data[..., None] >> shifts & ((1 << bits) - 1)
        return codes.flatten(-2)[..., :K]
    first = torch.arange(K, device=data.device) * bits
    wide = torch.nn.functional.pad(data, (0, 1)).to(torch.int32)
    words = wide[..., first // 8] | wide[..., first // 8 + 1] << 8
    return (words >> (first % 8).to(torch.int32) & ((1 << bits) - 1)).to(torch.uint8)
