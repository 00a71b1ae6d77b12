"""MXFP4 checkpoints as gpt-oss has them: blocks of 32 elements in 16 bytes, low nibble first, scales as exponents.

Source: OCP Microscaling Formats, 2023, 5.3.3; the tensors X_blocks and X_scales of the gpt-oss model card, X.blocks and
X.scales of its original files.
"""

import torch

from scalekern.quant.readers._source import Layer, prefixes, rest
from scalekern.quant.tensor import QuantizedTensor

METHOD = "mxfp4"
BLOCK = 32


def read(tensors, config) -> dict:
    """{name: QuantizedTensor (..., N, K) or Tensor}; `X` for X_blocks (..., N, G, 16) and X_scales (..., N, G)."""
    taken, found = set(), {}
    for name, mark in [(name, mark) for mark in "_." for name in prefixes(tensors, f"{mark}blocks")]:
        layer = Layer(METHOD, tensors, taken)
        blocks = layer.get(f"{name}{mark}blocks", torch.uint8)
        if blocks.dim() < 3 or blocks.shape[-1] != BLOCK // 2:
            layer.fail(f"{name}{mark}blocks", f"must have shape (..., rows, groups, 16), got {tuple(blocks.shape)}")
        scales = layer.get(f"{name}{mark}scales", (torch.uint8, torch.float8_e8m0fnu), blocks.shape[:-1])
        found[name] = QuantizedTensor(
            blocks.flatten(-2).contiguous(), scales.contiguous().view(torch.float8_e8m0fnu), format="fp4_e2m1",
            columns=blocks.shape[-2] * BLOCK, group_size=BLOCK, dtype=torch.bfloat16,
        ).check(f"mxfp4: {name}")  # fmt: skip
    return found | rest(tensors, taken, METHOD, ("_scales", ".scales"))


def write(tensors) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of `read`: ({name: Tensor}, quantization_config); a ValueError names a tensor that is not MXFP4."""
    out = {}
    for name, w in tensors.items():
        if not isinstance(w, QuantizedTensor):
            out[name] = w
            continue
        extra = any(part is not None for part in (w.zeros, w.offsets, w.outer, w.perm))
        if w.format != "fp4_e2m1" or w.group_size != BLOCK or w.columns % BLOCK or extra:
            raise ValueError(f"mxfp4: {name} must be mxfp4 with a multiple of 32 columns, got {w!r}")
        if w.scales.dtype != torch.float8_e8m0fnu or w.scales.shape[-2] != w.data.shape[-2]:
            raise ValueError(f"mxfp4: {name} must have a float8_e8m0fnu scale for each row and group, got {w!r}")
        out[name + "_blocks"] = w.data.unflatten(-1, (-1, BLOCK // 2)).contiguous()
        out[name + "_scales"] = w.scales.view(torch.uint8).contiguous()
    return out, {"quant_method": METHOD}
