"""QuantizedKV: keys or values of tokens as signed low-bit codes with a scale and an offset a token and head.

Shape letters: P channels of a head, G groups of channels.
"""

import dataclasses

import torch
from torch.utils import _pytree

from scalekern import _checks

PARTS = ("data", "scales", "offsets")
BITS = (8, 4)
SCALE_DTYPES = (torch.float32, torch.float16)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedKV:
    """x[..., p] = scales[..., g] * code[..., p] + offsets[..., g], g = p // group_size.

    A plain container of tensors, and a pytree. Its leading axes are those of the float tensor that it stands for, such
    as a cache's: (B, Hkv, S), or (pages, Hkv, page). Codes are two's complement, -2^(bits-1) .. 2^(bits-1) - 1, so that
    a symmetric cache needs no offsets; an asymmetric one with zero points z has offsets = -scales * z.

    Attributes:
        data: (..., ceil(P bits / 8)) int8: the codes, or two of them a byte, the even channel in the lower half.
        scales: (..., G) float16 or float32.
        offsets: like scales; None for 0.
        bits: 8 or 4.
        channels: P.
        group_size: channels that share a scale, 1 to P; the last group may be short.
    """

    data: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    bits: int = 8
    channels: int = 0
    group_size: int = 0

    @classmethod
    def empty(
        cls, *lead: int, channels: int, bits: int = 8, group_size: int | None = None, symmetric: bool = False,
        scale_dtype: torch.dtype = torch.float16, device=None,
    ) -> "QuantizedKV":  # fmt: skip
        """A cache of (*lead, channels) to be written by `quantize_kv_update`; nothing of it is initialized."""
        group_size = channels if group_size is None else group_size
        for size in lead:
            _checks.at_least("QuantizedKV.empty", "lead", size, 0)
        _check_options("QuantizedKV.empty", "", bits, channels, group_size)
        _checks.choice("QuantizedKV.empty", "scale_dtype", scale_dtype, SCALE_DTYPES)
        data = torch.empty(*lead, packed_bytes(channels, bits), dtype=torch.int8, device=device)
        new = lambda: torch.empty(*lead, -(-channels // group_size), dtype=scale_dtype, device=device)  # noqa: E731
        return cls(data, new(), None if symmetric else new(), bits, channels, group_size)

    def check(self, op: str = "QuantizedKV", name: str = "cache") -> "QuantizedKV":
        """Itself, if its parts fit each other; else a ValueError or TypeError that names the part."""
        _check_options(op, f"{name}.", self.bits, self.channels, self.group_size)
        for part in PARTS:
            found = getattr(self, part)
            if not isinstance(found, torch.Tensor) and (found is not None or part != "offsets"):
                raise TypeError(f"{op}: {name}.{part} must be a torch.Tensor, got {type(found).__name__}")
        if self.data.dtype != torch.int8:
            got = str(self.data.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: {name}.data must have dtype int8, got {got}")
        lead = tuple(self.data.shape[:-1])
        sizes = {"data": packed_bytes(self.channels, self.bits), "scales": -(-self.channels // self.group_size)}
        for part, tensor in self.tensors().items():
            wanted = (*lead, sizes.get(part, sizes["scales"]))
            if tensor.shape != wanted:
                raise ValueError(f"{op}: {name}.{part} must have shape {wanted}, got {tuple(tensor.shape)}")
            if part != "data" and (tensor.dtype not in SCALE_DTYPES or tensor.dtype != self.scales.dtype):
                got = str(tensor.dtype).removeprefix("torch.")
                raise TypeError(f"{op}: {name}.{part} must have dtype float16 or float32 like scales, got {got}")
            if tensor.device != self.data.device:
                raise ValueError(f"{op}: {name}.{part} must be on {self.data.device} like data, got {tensor.device}")
        return self

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], self.channels))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Of all parts, as stored."""
        return sum(t.nbytes for t in self.tensors().values())

    def dim(self) -> int:
        return self.data.dim()

    def numel(self) -> int:
        return self.shape.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts that are there, by name."""
        return {name: t for name in PARTS if (t := getattr(self, name)) is not None}

    def replace(self, **changes) -> "QuantizedKV":
        return dataclasses.replace(self, **changes)

    def map(self, function) -> "QuantizedKV":
        """function of each part: what moves, indexes or copies the leading axes."""
        return self.replace(**{name: function(t) for name, t in self.tensors().items()})

    def to(self, device, non_blocking: bool = False) -> "QuantizedKV":
        """Its parts on another device, or on that of a tensor; they keep their dtypes."""
        if isinstance(device, (torch.Tensor, QuantizedKV)):
            device = device.device
        if isinstance(device, torch.dtype):  # Tensor.to would give it to the codes
            raise TypeError(f"QuantizedKV.to: device must be a device, got {device}")
        return self.map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def cpu(self) -> "QuantizedKV":
        return self.to("cpu")

    def clone(self) -> "QuantizedKV":
        return self.map(torch.clone)

    def __getitem__(self, index) -> "QuantizedKV":
        """cache[rows, heads, slots] on the leading axes: views where torch gives views."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > self.dim() - 1 or any(i is Ellipsis for i in index):
            raise IndexError(f"QuantizedKV: the {self.dim() - 1} leading axes are indexed, got {index}")
        return self.map(lambda t: t[index])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(..., P) the numbers that it stands for, computed in float32 (float64 for dtype float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        by_channel = lambda t: t.to(wide).repeat_interleave(self.group_size, -1)[..., : self.channels]  # noqa: E731
        x = unpack(self.data, self.bits, self.channels).to(wide) * by_channel(self.scales)
        return (x if self.offsets is None else x + by_channel(self.offsets)).to(dtype)

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(1, self.numel())
        return (
            f"QuantizedKV({self.bits} bits, shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"{bits:.2f} bits a number, device={str(self.device)!r})"
        )


def _check_options(op: str, prefix: str, bits, channels, group_size) -> None:
    check_bits(op, f"{prefix}bits", bits)
    _checks.at_least(op, f"{prefix}channels", channels, 1)
    if not isinstance(group_size, int) or not 1 <= group_size <= channels:
        raise ValueError(f"{op}: {prefix}group_size must be from 1 to the {channels} channels, got {group_size!r}")


def check_bits(op: str, name: str, bits) -> None:
    if not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"{op}: {name} must be one of 8, 4, got {bits!r}")


def packed_bytes(channels: int, bits: int) -> int:
    return (channels * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., P) int8 codes -> (..., ceil(P bits / 8)) int8."""
    if bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] & 15 | codes[..., 1::2] << 4


def unpack(data: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    """The inverse of pack."""
    if bits == 8:
        return data
    return torch.stack((data << 4 >> 4, data >> 4), -1).flatten(-2)[..., :channels]


def _flatten(cache: QuantizedKV):
    return list(cache.tensors().values()), (cache.bits, cache.channels, cache.group_size)


def _unflatten(parts, rest) -> QuantizedKV:
    data, scales, offsets = (*parts, None)[:3]
    return QuantizedKV(data, scales, offsets, *rest)


def _flatten_with_keys(cache: QuantizedKV):
    return [(_pytree.GetAttrKey(name), t) for name, t in cache.tensors().items()], _flatten(cache)[1]


torch.serialization.add_safe_globals([QuantizedKV])
_pytree.register_pytree_node(
    QuantizedKV, _flatten, _unflatten, serialized_type_name="scalekern.QuantizedKV",
    # As an input of a program that torch.export makes, and saves.
    flatten_with_keys_fn=_flatten_with_keys, to_dumpable_context=list, from_dumpable_context=tuple,
)  # fmt: skip
