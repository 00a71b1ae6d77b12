"""What a code of so many bits stands for.

Integers are stored as codes 0 .. 2^bits - 1 (offset binary): value = code - zero, zero = 2^(bits-1) unless a tensor
brings its own. The others have a table of values. A block format is an element format with a group size and the dtype
of its scales.
"""

import dataclasses
import functools
import math

import torch

from scalekern import _kept


@dataclasses.dataclass(frozen=True)
class Format:
    """One element format.

    bits    of a code
    zero    the code of the value 0 of an integer format without zeros of its own; None for a table
    levels  the number of codes in use (3 for ternary)
    table   the values of all codes; None for an integer format
    """

    name: str
    bits: int
    zero: int | None = None
    levels: int = 0
    table: tuple[float, ...] | None = None

    @property
    def is_integer(self) -> bool:
        return self.table is None

    @property
    def largest(self) -> float:
        """The magnitude that the largest element of a symmetric group is scaled to."""
        if self.table is None:
            return self.levels - 1 - self.zero
        return max(v for v in self.table if math.isfinite(v))

    def values(self, dtype=torch.float32, device=None) -> torch.Tensor:
        """(2^bits,) the value of each code."""
        if self.is_integer:
            return _codes(self, dtype, device)
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
            return _kept_values(self.name, dtype, str(device or "cpu"))
        return _values(self.name, dtype, str(device or "cpu"))  # made under a mode it may be a fake: not to be kept

    @property
    def rising(self) -> list[int]:
        """The codes of a table's finite values, from the least on; of sign and magnitude those without the sign."""
        count = len(self.table) // 2 if self.has_sign else len(self.table)
        return sorted((c for c in range(count) if math.isfinite(self.table[c])), key=self.table.__getitem__)

    @property
    def has_sign(self) -> bool:
        """Whether the highest bit of a table's code is a sign."""
        return len(self.table) > 2 and self.table[0] == 0


def _codes(fmt: Format, dtype, device) -> torch.Tensor:
    return torch.arange(1 << fmt.bits, device=device).to(dtype) - fmt.zero


def _values(name: str, dtype, device: str) -> torch.Tensor:
    return torch.tensor(FORMATS[name].table, dtype=torch.float64, device="cpu").to(dtype).to(device)


@functools.lru_cache(64)
def _kept_values(name: str, dtype, device: str) -> torch.Tensor:
    with torch.inference_mode(False):
        return _kept.made(lambda: _values(name, dtype, device), torch.device(device))


def _minifloat(exponent_bits: int, mantissa_bits: int, *, special=None) -> tuple[float, ...]:
    """The values of all codes sign | exponent | mantissa, with subnormals; special(exponent, mantissa) or None."""
    bias = (1 << (exponent_bits - 1)) - 1
    positive = []
    for e in range(1 << exponent_bits):
        for m in range(1 << mantissa_bits):
            fraction = m / (1 << mantissa_bits)
            value = math.ldexp(1 + fraction, e - bias) if e else math.ldexp(fraction, 1 - bias)
            positive.append(special(e, m) if special and special(e, m) is not None else value)
    return (*positive, *(-v for v in positive))


def _e4m3_nan(e, m):
    return math.nan if (e, m) == (15, 7) else None


def _e5m2_special(e, m):
    return None if e < 31 else math.inf if m == 0 else math.nan


# The quantiles of a normal distribution, 8 on one side and 7 on the other of an exact 0 (Dettmers et al., QLoRA, 2023,
# appendix E), as bitsandbytes stores them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# The same 4-bit layout (sign, exponent, mantissa) with another subnormal, divided by 12: bitsandbytes' "fp4".
_FP4_BNB = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


def _integer(bits: int) -> Format:
    return Format(f"int{bits}", bits, zero=1 << (bits - 1), levels=1 << bits)


def _tabled(name: str, bits: int, table) -> Format:
    return Format(name, bits, levels=len(table), table=tuple(table))


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _tabled("int1", 1, (-1.0, 1.0)),
        Format("ternary", 2, zero=1, levels=3),
        *(_integer(bits) for bits in range(2, 9)),
        _tabled("fp8_e4m3", 8, _minifloat(4, 3, special=_e4m3_nan)),
        _tabled("fp8_e5m2", 8, _minifloat(5, 2, special=_e5m2_special)),
        _tabled("fp6_e3m2", 6, _minifloat(3, 2)),
        _tabled("fp6_e2m3", 6, _minifloat(2, 3)),
        _tabled("fp4_e2m1", 4, _minifloat(2, 1)),
        _tabled("nf4", 4, _NF4),
        _tabled("fp4_bnb", 4, (*_FP4_BNB, *(-v for v in _FP4_BNB))),
    )
}

# name -> (element format, group size, dtype of the scales). NVFP4 has a second scale for the whole tensor.
BLOCK_FORMATS = {
    "mxfp8_e4m3": ("fp8_e4m3", 32, torch.float8_e8m0fnu),
    "mxfp8_e5m2": ("fp8_e5m2", 32, torch.float8_e8m0fnu),
    "mxfp6_e3m2": ("fp6_e3m2", 32, torch.float8_e8m0fnu),
    "mxfp6_e2m3": ("fp6_e2m3", 32, torch.float8_e8m0fnu),
    "mxfp4": ("fp4_e2m1", 32, torch.float8_e8m0fnu),
    "nvfp4": ("fp4_e2m1", 16, torch.float8_e4m3fn),
}
