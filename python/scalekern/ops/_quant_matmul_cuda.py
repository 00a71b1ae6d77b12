"""quant_matmul of few tokens by the CUDA C++ kernels: arguments, and which calls are whose.

Up to GEMV_TOKENS tokens cuda_quant_gemv.cuh reads any weight as it lies, on the tensor cores before Triton is asked
(`supports_few`); some formats of 8 to 64 go to the pipeline of _quant_matmul_tiles.py, with a layout of its own.

Shape letters: M tokens, N outputs, K inputs.
"""

import torch

from scalekern import _dispatch, _library
from scalekern._dispatch import native
from scalekern.ops import _quant_matmul_cpu, _quant_matmul_tiles
from scalekern.ops._quant_matmul_cpu import code_values
from scalekern.quant import FORMATS

GEMV_TOKENS = 8  # of a pass; beyond them the weight is decoded once more for each eight
_gemv = native("quant_matmul_gemv", "cuda")
# Formats that go to the tensor cores: of groups that are multiples of 128 columns, and the least that will do too.
TILES = dict.fromkeys(("int1", "ternary", "int3", "int6", "int8"), 128) | {"int2": 64}
UNREAD = (torch.float64, torch.float8_e4m3fn, torch.int8)  # as scales, zeros and offsets
TILES |= dict.fromkeys(("int4", "nf4", "fp4_bnb", "fp4_e2m1"), 32)


def supports_fwd(
    x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale, out_dtype
) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is left to torch"
    if activation or offs is not None:
        return "rounded activations and experts are left to the other kernels"
    refused = _quant_matmul_tiles.refused(x, data, scales, zeros, offsets, format, group_size)
    if refused is None:
        return None
    if x.numel() > GEMV_TOKENS * x.shape[-1]:
        return f"it takes up to {GEMV_TOKENS} tokens, not {x.numel() // x.shape[-1]}, as they are; {refused}"
    if not _on_tiles(x, data, scales, zeros, offsets, format, group_size) and _dispatch.forced() != "cuda":
        if _dispatch.unavailable("triton", "cuda") is None:
            return "it would take these dtypes, groups and places a code at a time; Triton's kernel does not"
    return None


def supports_few(
    x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale, out_dtype
) -> str | None:
    """Of calls that come here before they come to Triton, which so far is a count of instructions and no measurement:
    2.4 for an int4 code of up to 8 tokens, where Triton's kernel has 4.5 for one token and 11.2 for four, and a launch
    where that has two, which an eager call of 10 us waits for. Records decide between the two as between any."""
    if x.numel() > GEMV_TOKENS * x.shape[-1]:
        return f"few tokens are up to {GEMV_TOKENS}, not {x.numel() // x.shape[-1]}"
    if activation or offs is not None:
        return "rounded activations and experts are left to the other kernels"
    if not _on_tiles(x, data, scales, zeros, offsets, format, group_size):
        return "tensor cores do not take these dtypes, groups and places as they are"
    return None


def _on_tiles(x, data, scales, zeros, offsets, format, group_size) -> bool:
    """Whether the tensor cores take a call of few tokens, as cuda_quant_gemv_driver.h asks of it."""
    least, bits, together = TILES.get(format), FORMATS[format].bits, scales.shape[1] == 1 or group_size % 128 == 0
    if least is None or not together and group_size % least or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if any(part is not None and part.dtype in UNREAD for part in (scales, zeros, offsets)):
        return False
    if x.shape[-1] % (32 if together else least) or x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    align = 16 if bits % 4 == 0 or not together else 4 * (2 - bits % 2)  # of the codes' rows
    return all(s % 8 == 0 for s in x.stride()[:-1]) and (data.data_ptr() | data.stride(0)) % align == 0


def arguments(out, x, *weight) -> tuple:
    """Those of scalekern_native::quant_matmul_gemv_cuda. weight: as for weight_arguments."""
    out, x = (t.reshape(-1, t.shape[-1]) for t in (out, x))
    return out, x, *weight_arguments(*weight)


def weight_arguments(data, scales, zeros, offsets, outer, bias, format, group_size) -> tuple:
    """Those behind out and x."""
    table, bits, step, base, _, zero = code_values(format, data.device)
    data = data if data.stride(-1) == 1 or data.shape[-1] == 1 else data.contiguous()
    powers = scales.dtype == torch.float8_e8m0fnu
    scales = scales.view(torch.uint8) if powers else scales
    return data, scales, zeros, offsets, outer, bias, table, bits, step, base, zero, group_size, powers


def forward(
    out, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, activation_scale, out_dtype
):  # fmt: skip
    """Fill out (..., N)."""
    if _quant_matmul_tiles.refused(x, data, scales, zeros, offsets, format, group_size) is None:
        return _quant_matmul_tiles.forward(out, x, data, scales, zeros, offsets, outer, bias, format, group_size)
    _gemv(*arguments(out, x, data, scales, zeros, offsets, outer, bias, format, group_size))


def forward_few(out, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, *rest):
    """Fill out (..., N)."""
    _gemv(*arguments(out, x, data, scales, zeros, offsets, outer, bias, format, group_size))


class KeptWeight(_quant_matmul_cpu.KeptWeight):
    """What `forward_few` makes of a weight, with which a call takes the host 4 us up to the native op, and 13 without.

    Whether a call is one of its own is asked once for each dtype and shape of its tokens; so a weight that it never
    takes is kept as well, and is not looked at again.
    """

    is_cpu, backend = False, "cuda"

    def _prepared(self, columns, *given):
        self._columns, self._given, self._outputs = columns, given, {}
        self._device, self._rows = given[0].device, given[0].shape[0]
        return ()  # until the first call that it takes

    def product(self, x):
        """(..., N) of a plain x on this GPU; None of one that is for the op, with nothing computed."""
        if x.numel() > GEMV_TOKENS * self._columns or x.device != self._device:
            return None
        if not x.is_contiguous() or x.data_ptr() % 16:
            return None
        key = x.dtype, x.shape, _dispatch.forced()
        shape = self._outputs.get(key)
        if shape is None:
            shape = self._outputs[key] = (*x.shape[:-1], self._rows) if self._takes(x) else ()
        if not shape:
            return None
        if len(shape) == 2:
            out = x.new_empty(shape)
            _gemv(out, x, *self._arguments)
            return out
        out = x.new_empty((x.numel() // self._columns, self._rows))
        _gemv(out, x.view(-1, self._columns), *self._arguments)
        return out.view(shape)

    def _takes(self, x) -> bool:
        if not x.numel() or not x.dim() or x.shape[-1] != self._columns:
            return False
        op = _library.OPS["quant_matmul_fwd"]
        if _dispatch.select(op.name, op.backends, "cuda", (x, *self._given, None)).supports is not supports_few:
            return False
        *parts, _, format, group_size, _, _ = self._given
        self._arguments = self._arguments or weight_arguments(*parts, format, group_size)
        return True


forward_few.native_op = _gemv.native_op
forward.native_op = _quant_matmul_tiles.forward.native_op  # the newer of the two: a library that has it has both
