"""A launch that can also be compiled alone: kernel, grid and arguments, from shapes, strides and dtypes only.

Tests build the same `Launch` on meta tensors and compile it for a GPU that is not there; `COMPILE_SPECS` lists how.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


def _specialized(value) -> tuple[str, list]:
    """An argument's type in a signature, and its attributes."""
    if value is None or isinstance(value, tl.constexpr) or (isinstance(value, int) and value == 1):
        return "constexpr", []
    tensor = isinstance(value, torch.Tensor)
    number = "fp32" if isinstance(value, float) else "i64" if not tensor and abs(value) >= 2**31 else "i32"
    divisible = tensor or number != "fp32" and value % 16 == 0
    return f"*{_TYPES[value.dtype]}" if tensor else number, [["tt.divisibility", 16]] if divisible else []


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: triton.runtime.KernelInterface
    grid: tuple[int, ...]
    args: dict
    num_warps: int
    num_stages: int | None = None  # of software pipelining; None: Triton's own number

    def _options(self) -> dict:
        stages = {} if self.num_stages is None else {"num_stages": self.num_stages}
        return {"num_warps": self.num_warps, **stages}

    def run(self) -> None:
        if 0 in self.grid:
            return
        tensor = next(a for a in self.args.values() if isinstance(a, torch.Tensor))
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(tensor):
            self.kernel[self.grid](**self.args, **self._options())

    def compile(self, target):
        """The compiled kernel for `target`, specialized as the launch would be. Needs no GPU."""
        names = self.kernel.arg_names
        signature, constants, attributes = {}, {}, {}
        for position, (name, parameter) in enumerate(zip(names, self.kernel.params)):
            value = self.args[name]
            if isinstance(value, tuple):
                found = [_specialized(v) for v in value]
                signature[name] = tuple(kind for kind, _ in found)
                constants |= {(position, n): v for n, v in enumerate(value) if found[n][0] == "constexpr"}
                attributes |= {(position, n): a for n, (_, a) in enumerate(found) if a}
                continue
            signature[name], attribute = ("constexpr", []) if parameter.is_constexpr else _specialized(value)
            if signature[name] == "constexpr":
                constants[name] = value
            elif attribute:
                attributes[(position,)] = attribute
        source = triton.compiler.ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=target, options=self._options())


COMPILE_SPECS: dict[str, Callable[[torch.dtype], Launch]] = {}


def compile_spec(name: str) -> Callable:
    """Register a function of an io dtype that plans a typical launch on meta tensors."""

    def register(build):
        COMPILE_SPECS[name] = build
        return build

    return register
