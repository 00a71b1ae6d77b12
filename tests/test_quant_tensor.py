"""scalekern.quant.QuantizedTensor: slices are views, parts fit each other, transport, gradients."""

import copy
import dataclasses
import io
import itertools

import pytest
import torch
from conftest import INTERPRET
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from scalekern import quant_matmul, quantize_kv, sparse_attention_decode
from scalekern.quant import FORMATS, QuantizedTensor, dequantize, quantize
from scalekern.quant._formats import BLOCK_FORMATS
from scalekern.quant._pack import unpack


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, options", [(name, {}) for name in FORMATS] + [
    ("int4", {"symmetric": False}), ("int3", {"scale_dtype": torch.int8}), ("int5", {"group_size": "tensor"}),
    ("nvfp4", {}), ("mxfp6_e3m2", {}),
])  # fmt: skip
def test_a_slice_of_the_packed_is_the_packed_slice(name, options):
    w = randn(9, 75, seed=6)
    q = quantize(w, name, **{"group_size": 16, **options})
    whole = dequantize(q)
    for rows, columns in itertools.product(
        (slice(0, 4), slice(3, 9), slice(2, 2), slice(-3, None)), (0, 1, 16, 37, 75)
    ):
        part = q[rows, :columns]
        assert part.check().shape == whole[rows, :columns].shape
        assert torch.equal(dequantize(part), whole[rows, :columns])
        assert part.data.numel() == 0 or part.data.data_ptr() == q.data[rows].data_ptr()
        assert torch.equal(unpack(part.data, q.bits, columns), unpack(q.data, q.bits, 75)[rows, :columns])
    start = 2 * max(16, q.group_size)
    if options.get("group_size") != "tensor":
        assert torch.equal(dequantize(q[:, start:]), whole[:, start:])
        with pytest.raises(IndexError, match="must start at a multiple"):
            q[:, 5:]
    for index in (0, (slice(None), 3), (slice(0, 4, 2),), (slice(None),) * 3):
        with pytest.raises(IndexError):
            q[index]
    stack = quantize(w.expand(3, 2, 9, 75), name, **{"group_size": 16, **options})
    assert torch.equal(dequantize(stack[1, 0, 2:5]), whole[2:5]) and stack[1].shape == (2, 9, 75)


def test_an_index_means_what_it_means_to_torch():
    w = randn(3, 2, 16, 64)
    q = quantize(w, "int4", group_size=16)
    whole, rows = dequantize(q), slice(None, 8)
    for index in (
        (..., rows), (..., rows, slice(None)), (0, ..., slice(16, 32)), (slice(1), ...), ..., (1, 0, ..., rows),
        None, (0, None), (0, 1, None), (None, 1, slice(None), slice(4)), (None, ..., rows), (torch.tensor([2, 0]),),
    ):  # fmt: skip
        assert torch.equal(dequantize(q[index].check()), whole[index]), index
    for index in ((..., ...), (..., 3), (..., 0, slice(None)), (..., None), (0, 0, rows, None)):
        with pytest.raises(IndexError):
            q[index]
    assert [torch.equal(dequantize(part), own) for part, own in zip(q, whole, strict=True)] == [True] * 3
    with pytest.raises(TypeError, match="a matrix is not iterable"):
        list(q[0, 0])


def test_act_order():
    w, perm = randn(6, 40), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    q = quantize(w[:, perm], "int4", group_size=8).replace(perm=perm)
    assert torch.equal(dequantize(q), dequantize(q.replace(perm=None))[:, torch.argsort(perm)])
    assert ((dequantize(q) - w).abs() <= q.scales.max() / 2).all()
    assert torch.equal(dequantize(q[1:3]), dequantize(q)[1:3])
    with pytest.raises(IndexError, match="act-order"):
        q[:, :8]


def _equal(a, b):
    assert a.metadata() == b.metadata() and a.tensors().keys() == b.tensors().keys()
    assert all(torch.equal(t.view(torch.uint8), b.tensors()[k].view(torch.uint8)) for k, t in a.tensors().items())


def test_transport(tmp_path):
    """to, pytrees, safetensors."""
    w = randn(6, 40).double()
    every = [quantize(w, name, group_size=16) for name in [*FORMATS, *BLOCK_FORMATS]]
    every += [quantize(w, "int4", symmetric=False).replace(perm=torch.randperm(40)), every[3].to(torch.bfloat16)]
    for i, q in enumerate(every):
        path = tmp_path / f"{i}.safetensors"
        save_file({k: t.contiguous() for k, t in q.tensors().items()}, path, metadata={"w": q.metadata()})
        _equal(QuantizedTensor.from_tensors(load_file(path), q.metadata()), q)
        _equal(torch.utils._pytree.tree_map(lambda t: t.clone() if t is not None else t, q), q)
        _equal(q.to("cpu").cpu(), q)
    q = every[0]
    assert q.to(torch.float16).dtype == q.to("cpu", torch.float16).dtype == dequantize(q.to(torch.float16)).dtype
    assert q.to("meta").device.type == "meta" and q.to(torch.device("meta")).data.shape == q.data.shape
    assert q.nbytes == sum(t.nbytes for t in q.tensors().values())
    for metadata in ("", "[]", "{}", q.metadata().replace("float64", "load"), q.metadata()[:-1] + ', "x": 1}'):
        with pytest.raises((ValueError, TypeError)):
            QuantizedTensor.from_tensors(q.tensors(), metadata)


def test_parts_that_do_not_fit():
    q = quantize(randn(6, 40), "int4", group_size=16, symmetric=False)
    for changes, message in (
        ({"data": q.data[:, :-1]}, "data must have shape"),
        ({"data": q.data.int()}, "data must have dtype uint8"),
        ({"data": q.data[0]}, "at least 2 dimensions"),
        ({"scales": q.scales[:, :2]}, "scales must have shape"),
        ({"scales": q.scales.long()}, "scales must have dtype float64, .*, uint8, got int64"),
        ({"zeros": q.zeros[:2]}, "zeros must have shape"),
        ({"zeros": q.zeros.int()}, "zeros must have dtype float64, .*, uint8, got int32"),
        ({"outer": q.scales}, "outer must have shape"),
        ({"perm": torch.arange(39)}, "perm must have shape"),
        ({"perm": torch.arange(40.0)}, "perm must have dtype int32, int64, got float32"),
        ({"format": "int9"}, "format must be one of"),
        ({"group_size": 0}, "group_size must be"),
        ({"group_size": 16.0}, "group_size must be an integer"),
        ({"format": ["int4"]}, "format must be one of"),
        ({"columns": 50}, "data must have shape"),
        ({"columns": -1}, "columns must be an integer of at least 0"),
        ({"data": None}, "data must be a torch.Tensor, got NoneType"),
        ({"zeros": 8}, "zeros must be a torch.Tensor, got int"),
        ({"perm": torch.arange(40) + 1}, "perm must hold columns 0 to 39, got 1 to 40"),
        ({"dtype": torch.int8}, "dtype must be one of float64, .*, got int8"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            dequantize(q.replace(**changes))


def test_an_order_of_columns_out_of_a_file_is_one():
    q = quantize(randn(6, 40), "int4").replace(perm=torch.randperm(40))
    _equal(QuantizedTensor.from_tensors(q.tensors(), q.metadata()), q)
    with pytest.raises(ValueError, match="perm must hold each of the 40 columns once"):
        QuantizedTensor.from_tensors({**q.tensors(), "perm": torch.zeros(40, dtype=torch.int64)}, q.metadata())
    twice = q.replace(perm=q.perm.where(q.perm != 3, 4))  # of which dequantize and the product would make two weights
    for use in (dequantize, lambda w: quant_matmul(randn(2, 40), w)):
        with pytest.raises(ValueError, match="perm must hold each of the 40 columns once"):
            use(twice)


def test_leaves_are_tensors():
    """A map over the leaves meets no None, and what comes back has its parts under their names."""
    for q in (quantize(randn(6, 40), "int4", symmetric=False), quantize(randn(6, 40), "nvfp4")):
        _equal(tree_map(lambda t: t.clone(), q), q)


def test_gradients_of_dequantize():
    q = quantize(randn(3, 10).double(), "int3", group_size=4, symmetric=False, scale_dtype=torch.float64)
    parts = [q.scales, q.zeros, q.scales * 0.3, torch.rand(3, 1).double()]
    names = ("scales", "zeros", "offsets", "outer")
    perm = torch.randperm(10)
    values = lambda *parts: dequantize(q.replace(**dict(zip(names, parts)), perm=perm))
    assert torch.autograd.gradcheck(values, [p.clone().requires_grad_() for p in parts])


def test_to_a_tensors_place_keeps_the_codes():
    """Tensor.to(tensor) gives its dtype to what it moves: float codes would be no codes."""
    q = quantize(randn(6, 40), "int4", symmetric=False)
    for like in (torch.zeros(1, dtype=torch.float16), q.to(torch.float16)):
        moved = q.to(like)
        assert moved.dtype == torch.float16 and moved.data.dtype == torch.uint8
        assert torch.equal(moved.dequantize(), q.dequantize(torch.float16))
    assert q.to(torch.empty(0, device="meta")).device.type == "meta"
    with pytest.raises(TypeError, match="QuantizedTensor.to: dtype must be one of .*, got int64"):
        q.to(torch.arange(3))


def test_clone_sizes_and_gradients():
    q = quantize(randn(6, 40), "int3", symmetric=False, scale_dtype=torch.int8)
    other = q.clone()
    _equal(other, q)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(other.tensors().values(), q.tensors().values()))
    assert q.dim() == 2 and q.numel() == 240
    assert q.requires_grad_() is q and not q.scales.requires_grad and q.outer.requires_grad and q.zeros.requires_grad
    assert not any(t.requires_grad for t in q.requires_grad_(False).tensors().values())


def test_copies_and_pickles_hold_the_fields_alone():
    """Also after a product, which leaves addresses with a weight; and torch.load reads them with weights_only."""
    q, x = quantize(randn(6, 40), "nvfp4"), randn(3, 40, seed=1)
    expected = quant_matmul(x, q)
    file = io.BytesIO()
    torch.save({"w": q}, file)
    file.seek(0)
    for other in (copy.copy(q), copy.deepcopy(q), torch.load(file, weights_only=True)["w"]):
        assert other.__dict__.keys() == {f.name for f in dataclasses.fields(q)}
        _equal(other, q)
        assert torch.equal(quant_matmul(x, other), expected)


def test_options_of_another_kind_are_refused():
    for options, message in (
        ({"symmetric": "no"}, "symmetric must be True or False, got 'no'"),
        ({"symmetric": None}, "symmetric must be True or False, got None"),
        ({"group_size": True}, "group_size must be None, 'tensor' or an integer of at least 1, got True"),
        ({"axis": True}, "axis be one of the last two"),
        ({"scale_dtype": []}, "scale_dtype must be one of"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^quantize: .*{message}"):
            quantize(randn(6, 40), "int4", **options)


class Product(torch.nn.Module):
    def forward(self, x, w):
        return quant_matmul(x, w)


class Decode(torch.nn.Module):
    def forward(self, q, k, v, lengths):
        return sparse_attention_decode(q, k, v, lengths)


@pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")
@pytest.mark.parametrize("kind", ["weight", "cache"])
def test_an_exported_program_takes_one_as_input_and_is_saved(kind):
    if kind == "weight":
        module, given = Product(), (randn(3, 40), quantize(randn(6, 40), "int4", group_size=16, symmetric=False))
    else:
        k, v = quantize_kv(randn(1, 2, 8, 16)), quantize_kv(randn(1, 2, 8, 16), bits=4, symmetric=True)
        module, given = Decode(), (randn(1, 4, 1, 16), k, v, torch.tensor([7]))
    exported, file = torch.export.export(module, given), io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        assert torch.equal(program.module()(*given), module(*given))
