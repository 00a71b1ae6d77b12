"""quant_matmul of some tokens by the CUDA C++ kernel with a layout of its own: which calls are its own.

Shape letters: M tokens, N outputs, K inputs.
"""

import torch

from scalekern._dispatch import native
from scalekern.ops import _quant_tiles_layout
from scalekern.quant import FORMATS

# 8 are one pass of the other kernel, which takes those of a weight that it has on the tensor cores: as fast by
# prediction, in one launch, and with no second copy of the weight. Of others they come here.
FEWEST_TOKENS, MOST_TOKENS = 8, 64
TAKEN = ("int4", "int8")
_tiles = native("quant_matmul_tiles", "cuda")


def refused(x, data, scales, zeros, offsets, format: str, group_size: int) -> str | None:
    """Why this kernel does not take a product of x as it is with a weight, else None."""
    K, tokens = x.shape[-1], x.numel() // x.shape[-1]
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "tensor cores take float16 and bfloat16"
    if not FEWEST_TOKENS <= tokens <= MOST_TOKENS:
        return f"the tensor cores' layout is for {FEWEST_TOKENS} to {MOST_TOKENS} tokens, not {tokens}"
    if format not in TAKEN:
        return f"the tensor cores' layout is of {' and '.join(TAKEN)}, not {format}"
    if K % 8 or scales.shape[1] > 1 and group_size % 16:
        return f"the tensor cores' layout is of columns by 8 and groups by 16, not {K} and {group_size}"
    if any(t is not None and t.is_inference() for t in (data, scales, zeros, offsets)):
        return "a weight made in inference mode does not tell when it changes, and the tensor cores' layout is kept"
    return None


def arguments(out, x, data, scales, zeros, offsets, outer, bias, format, group_size) -> tuple:
    """Those of scalekern_native::quant_matmul_tiles_cuda."""
    out, x = (t.reshape(-1, t.shape[-1]) for t in (out, x))
    if x.stride(1) != 1 or x.shape[0] > 1 and x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # 64 tokens at most: a small part of the weight
    bits = FORMATS[format].bits
    codes, scales, shifts = _quant_tiles_layout.layout(data, scales, zeros, offsets, bits, x.shape[1])
    return out, x, codes, scales, shifts, outer, bias, bits, group_size


def forward(out, x, data, scales, zeros, offsets, outer, bias, format, group_size):
    """Fill out (..., N)."""
    _tiles(*arguments(out, x, data, scales, zeros, offsets, outer, bias, format, group_size))


forward.native_op = _tiles.native_op
