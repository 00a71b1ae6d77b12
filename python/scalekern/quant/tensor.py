"""QuantizedTensor: a matrix of low-bit codes with what turns them back into numbers.

Shape letters: N rows (output channels), K columns (input channels), G groups of columns.
"""

import dataclasses
import json

import torch
from torch.utils import _pytree

from scalekern import _checks
from scalekern.quant._formats import FORMATS
from scalekern.quant._pack import row_bytes

# The parts that are tensors, in the order of the ops' arguments; all but `data` and `scales` may be absent.
PARTS = ("data", "scales", "zeros", "offsets", "outer", "perm")
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SCALE_DTYPES = (*FLOATING, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int8, torch.uint8)
PART_DTYPES = {
    "data": (torch.uint8,), "scales": SCALE_DTYPES, "zeros": (*FLOATING, torch.uint8), "offsets": FLOATING,
    "outer": FLOATING, "perm": (torch.int32, torch.int64),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """w[n, k] = outer[n] * (scales[n, g] * (code[n, k] - zeros[n, g]) + offsets[n, g]), g = k // group_size.

    A format with a table (nf4, the small floats, int1) has table[code] for code - zero. With `perm`, column k of these
    is column perm[k] of the matrix (act-order). A plain container of tensors: it moves with `to`, is a pytree, and
    lies in a module as parameters or buffers of the names of PARTS (scalekern.nn.QuantLinear).

    Attributes:
        data: (..., N, ceil(K bits / 8)) uint8, the codes as a stream of bits along K, lowest bits first; what follows
            the last code in its byte is undefined.
        scales: (..., N or 1, G) floating, float8 or 8-bit integers, one row for all rows or a row each.
        zeros: like scales, floating or uint8, in units of codes; None for the format's own (2^(bits-1)).
        offsets: like scales, floating, in units of scaled values (GGUF's minima, a binary weight's mean); None for 0.
        outer: (..., N or 1, 1) float32, the second level of two-level scales; None for 1.
        perm: (K,) int32 or int64; None for the identity.
        format: a name in scalekern.quant.FORMATS.
        columns: K.
        group_size: columns of a group, from 1; the last group may be short.
        dtype: what `dequantize` returns.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    format: str = "int4"
    columns: int = 0
    group_size: int = 128
    dtype: torch.dtype = torch.float32

    def check(self, op: str = "QuantizedTensor") -> "QuantizedTensor":
        """Itself, if its parts fit each other; else a ValueError or TypeError that names the part."""
        compiling = torch.compiler.is_compiling()
        known = None if compiling else self.__dict__.get("_sound")
        if known is not None and known == self._sizes():  # looked at once; `part.data = ...` and resize_ change a part
            return self
        if not isinstance(self.format, str) or self.format not in FORMATS:
            raise ValueError(f"{op}: format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        _checks.at_least(op, "group_size", self.group_size, 1)
        _checks.at_least(op, "columns", self.columns, 0)
        check_dtype(op, self.dtype)
        for name in PARTS:
            part = getattr(self, name)
            if not isinstance(part, torch.Tensor) and (part is not None or name in ("data", "scales")):
                raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(part).__name__}")
            if part is not None and part.dtype not in PART_DTYPES[name]:
                names = ", ".join(str(d).removeprefix("torch.") for d in PART_DTYPES[name])
                raise TypeError(f"{op}: {name} must have dtype {names}, got {str(part.dtype).removeprefix('torch.')}")
        if self.data.dim() < 2:
            raise ValueError(f"{op}: data must have at least 2 dimensions, got shape {tuple(self.data.shape)}")
        *lead, N, _ = self.data.shape
        _part(op, "data", self.data, [(*lead, N, row_bytes(self.columns, self.bits))])
        groups = -(-self.columns // self.group_size)
        for name in ("scales", "zeros", "offsets"):
            if (part := getattr(self, name)) is not None:
                _part(op, name, part, [(*lead, N, groups), (*lead, 1, groups)])
        if self.outer is not None:
            _part(op, "outer", self.outer, [(*lead, N, 1), (*lead, 1, 1)])
        if self.perm is not None:
            _part(op, "perm", self.perm, [(self.columns,)])
            if self.columns and _checks.readable(self.perm):
                least, most = (int(bound) for bound in self.perm.aminmax())
                if least < 0 or most >= self.columns:
                    raise ValueError(f"{op}: perm must hold columns 0 to {self.columns - 1}, got {least} to {most}")
                if not self.perm.new_zeros(self.columns, dtype=torch.bool).index_fill_(0, self.perm.long(), True).all():
                    raise ValueError(f"{op}: perm must hold each of the {self.columns} columns once")
        for name, part in self.tensors().items():
            if part.device != self.data.device:
                raise ValueError(f"{op}: {name} must be on {self.data.device} like data, got {part.device}")
        if not compiling:
            self.__dict__["_sound"] = self._sizes()
        return self

    def _sizes(self) -> list:
        return [(t.dtype, t.shape) for t in self.tensors().values()]

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], self.columns))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Of all parts, as stored."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts that are there, by name."""
        return {name: t for name in PARTS if (t := getattr(self, name)) is not None}

    def metadata(self) -> str:
        """What is not a tensor, as JSON: beside the parts in a safetensors file."""
        fields = {"format": self.format, "columns": self.columns, "group_size": self.group_size}
        return json.dumps({**fields, "dtype": str(self.dtype).removeprefix("torch.")})

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], metadata: str) -> "QuantizedTensor":
        """The inverse of `tensors` and `metadata`; a ValueError or TypeError where they do not fit."""
        try:
            fields = json.loads(metadata)
            dtype = {str(d).removeprefix("torch."): d for d in FLOATING}[fields.pop("dtype")]
            made = cls(**tensors, **fields, dtype=dtype)
        except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"QuantizedTensor: no metadata of a quantized tensor: {metadata!r} ({error})") from error
        made.check()
        if made.perm is not None and not torch.equal(made.perm.sort().values, torch.arange(made.columns).to(made.perm)):
            raise ValueError(f"QuantizedTensor: perm must hold each of the {made.columns} columns once")
        return made

    def replace(self, **changes) -> "QuantizedTensor":
        return dataclasses.replace(self, **changes)

    def to(self, device=None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> "QuantizedTensor":
        """Its parts on another device; `dtype` is that of `dequantize` and changes no part. Of a tensor: both of it."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        elif isinstance(device, (torch.Tensor, QuantizedTensor)):  # Tensor.to would give the codes its dtype
            device, dtype = device.device, dtype or device.dtype
        if dtype is not None:
            check_dtype("QuantizedTensor.to", dtype)
        move = lambda t: t if device is None else t.to(device, non_blocking=non_blocking)  # noqa: E731
        return self.replace(**{name: move(t) for name, t in self.tensors().items()}, dtype=dtype or self.dtype)

    def cpu(self) -> "QuantizedTensor":
        return self.to("cpu")

    def cuda(self, device="cuda") -> "QuantizedTensor":
        return self.to(device)

    def detach(self) -> "QuantizedTensor":
        return self.replace(**{name: t.detach() for name, t in self.tensors().items()})

    def clone(self) -> "QuantizedTensor":
        """Parts of its own, differentiable as Tensor.clone is."""
        return self.replace(**{name: t.clone() for name, t in self.tensors().items()})

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedTensor":
        """Itself: the floating parts of 16 bits and more get gradients, or none. Codes have none."""
        for part in self.tensors().values():
            if part.dtype in FLOATING:
                part.requires_grad_(requires_grad)
        return self

    def dim(self) -> int:
        return self.data.dim()

    def numel(self) -> int:
        return self.shape.numel()

    def __getstate__(self) -> dict:
        """For copies and pickles: the fields, and not what a product has kept of them (addresses, which checks)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        from scalekern.quant._quantize import dequantize

        return dequantize(self, dtype)

    def __getitem__(self, index) -> "QuantizedTensor":
        """w[rows, columns], or w[expert] of a stack: views. Columns are cut where a byte and a group begin."""
        *front, rows, columns = _whole_index(index, self.data.dim(), self.shape)
        for i in (rows, columns):
            if not isinstance(i, slice) or i.step not in (None, 1):
                raise IndexError(f"QuantizedTensor: rows and columns are cut by slices of step 1, got {i!r}")
        start, stop, _ = columns.indices(self.columns)
        stop = max(start, stop)
        whole = start == 0 and stop == self.columns
        if self.perm is not None and not whole:
            raise IndexError("QuantizedTensor: columns in act-order cannot be cut; dequantize and quantize again")
        if start * self.bits % 8 or start % self.group_size:
            raise IndexError(
                f"QuantizedTensor: columns must start at a multiple of group_size ({self.group_size}) and of a byte, "
                f"got {start}"
            )
        first, groups = start // self.group_size, slice(start // self.group_size, -(-stop // self.group_size))
        groups = slice(first, max(first, groups.stop))
        bytes_ = slice(start * self.bits // 8, start * self.bits // 8 + row_bytes(stop - start, self.bits))
        cuts = {"data": bytes_, "scales": groups, "zeros": groups, "offsets": groups, "outer": slice(None)}
        # One group of a whole row stays one group of a shorter one; its size goes on being that of the full rows.
        parts = {name: _cut(getattr(self, name), tuple(front), rows, cut) for name, cut in cuts.items()}
        return self.replace(**parts, columns=stop - start)

    def __iter__(self):
        """The matrices of a stack. Without it a loop over rows would end, without a word, at the first's IndexError."""
        if self.data.dim() == 2:
            raise TypeError("QuantizedTensor: a matrix is not iterable; rows are cut by slices")
        return (self[i] for i in range(self.data.shape[0]))

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(1, self.shape.numel())
        return (
            f"QuantizedTensor({self.format}, shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"scales={str(self.scales.dtype).removeprefix('torch.')}, {bits:.2f} bits a weight, "
            f"device={str(self.device)!r})"
        )


def check_dtype(op: str, dtype) -> None:
    """What numbers of a quantized tensor can be asked for in."""
    if dtype not in FLOATING:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"{op}: dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}")


def _whole_index(index, dims: int, shape) -> tuple:
    """An index of every axis, as torch means it: the axes that it leaves out stand where its Ellipsis is, or behind."""
    index = index if isinstance(index, tuple) else (index,)
    places = [place for place, i in enumerate(index) if i is Ellipsis]
    given = sum(i is not None and i is not Ellipsis for i in index)  # None is an axis of its own
    if given > dims or len(places) > 1:
        raise IndexError(f"QuantizedTensor: too many indices for shape {tuple(shape)}")
    place = places[0] if places else len(index)
    return *index[:place], *[slice(None)] * (dims - given), *index[place + 1 :]


def _cut(part, front, rows, columns):
    if part is None:
        return None
    part = part[front] if front else part
    return (part if part.shape[-2] == 1 and not _is_whole(rows) else part[..., rows, :])[..., columns]


def _is_whole(rows: slice) -> bool:
    return rows == slice(None)


def _part(op: str, name: str, part: torch.Tensor, shapes) -> None:
    if tuple(part.shape) not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(part.shape)}")


def _flatten(w: QuantizedTensor):
    """Its leaves are the parts that are there: a function mapped over them meets tensors alone."""
    rest = {f.name: getattr(w, f.name) for f in dataclasses.fields(w) if f.name not in PARTS}
    return list(w.tensors().values()), (tuple(w.tensors()), *rest.items())


def _unflatten(parts, context) -> QuantizedTensor:
    names, *rest = context
    return QuantizedTensor(**dict(zip(names, parts)), **dict(rest))


def _flatten_with_keys(w: QuantizedTensor):
    return [(_pytree.GetAttrKey(name), part) for name, part in w.tensors().items()], _flatten(w)[1]


def _to_json(context):
    names, *rest = context
    return [list(names), [[name, str(v) if name == "dtype" else v] for name, v in rest]]


def _from_json(found):
    names, rest = found
    dtypes = {str(d): d for d in FLOATING}
    return (tuple(names), *((name, dtypes[v] if name == "dtype" else v) for name, v in rest))


torch.serialization.add_safe_globals([QuantizedTensor])  # its fields are tensors, numbers, a name and a dtype
_pytree.register_pytree_node(
    QuantizedTensor, _flatten, _unflatten, serialized_type_name="scalekern.QuantizedTensor",
    # As an input of a program that torch.export makes, and saves.
    flatten_with_keys_fn=_flatten_with_keys, to_dumpable_context=_to_json, from_dumpable_context=_from_json,
)  # fmt: skip
