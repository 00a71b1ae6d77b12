"""Readers of checkpoints against what the formats' packages make of them, recorded (quant_vectors.json) and live."""

import importlib
import json
import sys
import types

import pytest
import quant_peers
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scalekern import quant_matmul
from scalekern.quant import FORMATS, dequantize, load_quantized, quantize, read_checkpoint, save_quantized
from scalekern.quant._formats import BLOCK_FORMATS
from scalekern.quant.readers import METHODS, compressed_tensors, gguf, gptq, mxfp4
from scalekern.testing import assert_close

RECORDED = quant_peers.load()
CASES = [(package, case) for package, cases in RECORDED.items() for case in cases]
CHECKPOINTS = [(package, case) for package, case in CASES if package not in ("gguf", "torchao")]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one only waits for the first on these sizes
    yield
    torch.set_num_threads(threads)


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Equal to the bit."""
    bits = lambda t: t.contiguous().flatten().view(torch.uint8) if t.dim() else t
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def signed(package, *values):
    """bitsandbytes has FP4's code 8 as -0, in its CPU kernels as 0 from 0.50 on: the sign of a zero is a release's."""
    return [value + 0.0 if package == "bitsandbytes" else value for value in values]


def found(package, tensors, config):
    if package == "torchao":
        w = quantize(tensors["w"], config["format"])
        return {"m": w, "data": w.data, "scales": w.scales.view(torch.uint8)}
    if package == "gguf":
        return {"m": gguf.from_blocks("m", config["kind"], tensors["m"], config["shape"])}
    return read_checkpoint(tensors, config=config)


def agrees(package, case, tensors, config, expected):
    got = found(package, tensors, config)
    for name, wanted in expected.items():
        value = got[name] if isinstance(got[name], torch.Tensor) else dequantize(got[name], wanted.dtype)
        if case == "nvfp4" and name == "m":  # two scales and an element, in another order
            torch.testing.assert_close(value, wanted, rtol=2.4e-7, atol=0)
        else:
            assert same(*signed(package, value, wanted.reshape(value.shape))), (package, case, name)
        assert value.float().norm() > 0


@pytest.mark.parametrize("package, case", CASES)
def test_reads_what_the_formats_package_does(package, case):
    agrees(package, case, *RECORDED[package][case])


def test_all_packages_and_widths_are_recorded():
    assert RECORDED.keys() == quant_peers.PEERS.keys()
    assert RECORDED["gguf"].keys() == gguf.BLOCKS.keys() and len(RECORDED["compressed_tensors"]) == 8
    assert RECORDED["torchao"].keys() == BLOCK_FORMATS.keys() and len(RECORDED["gptq"]) == 8


# The other packages are slow to import, or patch torch: `python tests/quant_peers.py` records them anew.
@pytest.mark.parametrize("package", ["compressed_tensors", "bitsandbytes", "gguf", "torchao"])
def test_the_record_is_what_the_package_makes(package):
    pytest.importorskip(package)
    for case, tensors, config, expected in quant_peers.PEERS[package]():
        recorded = RECORDED[package][case]
        assert all(same(t, tensors[name]) for name, t in recorded[0].items()) and recorded[1] == config
        assert all(same(*signed(package, t, expected[name])) for name, t in recorded[2].items())
        agrees(package, case, tensors, config, expected)


# Files


@pytest.mark.parametrize("package, case", [(p, c) for p, c in CHECKPOINTS if c == list(RECORDED[p])[-1]])
def test_a_models_directory(package, case, tmp_path):
    """Two shards with an index, the config beside, other tensors, and a damaged file: the error names the tensor."""
    tensors, config, expected = RECORDED[package][case]
    extra = {"m.bias": randn(4), "embed.weight": randn(3, 2)}
    flat = {name: t.contiguous() for name, t in (tensors | extra).items()}
    names = sorted(flat)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: flat[name] for name in own}, tmp_path / shard)
    index = {name: shard for shard, own in shards.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    got = read_checkpoint(tmp_path)
    assert got.keys() == expected.keys() | extra.keys() and all(same(got[name], t) for name, t in extra.items())
    for name, wanted in expected.items():
        assert same(dequantize(got[name], wanted.dtype), wanted)
    path = tmp_path / "b.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="b.safetensors is truncated") as error:
        read_checkpoint(tmp_path)
    assert any(f": {name} ends at" in str(error.value) for name in shards["b.safetensors"])
    for cut in (b"", whole[:5], whole[:40], b"x" * 200):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="b.safetensors is"):
            read_checkpoint(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**index, "x": "a.safetensors"}}))
    with pytest.raises(ValueError, match="x is in model.safetensors.index.json, not in a.safetensors"):
        read_checkpoint(tmp_path)


OPTIONAL = {
    "m.g_idx",
    "m.weight_zero_point",
    "m.view_as_float",
    "m.group_size",
    "m.compute_dtype",
    "m.unpack_view_dtype",
}


@pytest.mark.parametrize("package, case", CHECKPOINTS)
def test_what_is_missing_or_misshapen_is_named(package, case):
    tensors, config, expected = RECORDED[package][case]
    config = {"quant_method": config["quant_method"], **config}
    for name, t in tensors.items():
        if name in OPTIONAL:
            continue
        changes = {"missing": None}
        if t.dim():
            changes |= {"longer": torch.cat([t, t[:1]]), "shorter": t[:-1], "complex": t.to(torch.complex64)}
        for kind, changed in changes.items():
            cut = {k: v for k, v in tensors.items() if k != name} | ({} if changed is None else {name: changed})
            try:
                got = read_checkpoint(cut, config=config)
            except ValueError as error:  # the tensor, or one that no longer fits it
                assert any(other in str(error) for other in tensors), (kind, name, error)
            else:
                pytest.fail(f"{kind} {name}: {got}")


def test_unknown_methods_and_sources(tmp_path):
    with pytest.raises(ValueError, match="method must be one of gptq, awq"):
        read_checkpoint({"x": randn(2)}, "exl9")
    with pytest.raises(ValueError, match="method must be one of .*, got 'fp9'"):
        read_checkpoint({"x": randn(2)}, config={"quant_method": "fp9"})
    with pytest.raises(ValueError, match="m.qweight may be GPTQ's or AWQ's"):
        read_checkpoint({"m.qweight": randn(2)})
    with pytest.raises(ValueError, match="no tensor of a known quantized format"):
        read_checkpoint({"x": randn(2)})
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError):
            read_checkpoint(path)
    for config, message in (
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format must be"),
        ({"quant_method": "gptq"}, "must say bits"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "only 4 bits of version gemm or gemv"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "only the format pack-quantized"),
    ):
        with pytest.raises(ValueError, match=message):
            read_checkpoint({}, config=config)
    for package, case in CHECKPOINTS:  # from the names alone, where they tell
        if package not in ("gptq", "awq"):
            tensors, config, expected = RECORDED[package][case]
            method = config["quant_method"]
            assert method in METHODS and read_checkpoint(tensors, method).keys() == expected.keys()
            assert read_checkpoint(tensors).keys() == expected.keys()


def test_details():
    """Groups of uneven sizes, another table, an incomplete nested state, LLM.int8, GPTQ's overrides, old words."""
    tensors, config, expected = RECORDED["gptq"]["4_v2"]
    bad = tensors["m.g_idx"].clone()
    bad[bad.argmin()] = 1
    with pytest.raises(ValueError, match="m.g_idx must hold 16 columns of each group"):
        read_checkpoint({**tensors, "m.g_idx": bad}, config=config)
    dynamic = {**config, "bits": 2, "dynamic": {"-:x": {}, "+:m": {"bits": 4}}}
    assert same(dequantize(read_checkpoint(tensors, config=dynamic)["m.weight"]), expected["m.weight"])
    with pytest.raises(ValueError, match="m.qweight must have 2, 3, 4 or 8 bits"):
        read_checkpoint(tensors, config={**config, "bits": 5})
    w = read_checkpoint(tensors, config=config)["m.weight"]
    assert w.perm is not None and w.zeros.dtype == torch.uint8 and w.scales.dtype == torch.float16
    assert (
        read_checkpoint({**tensors, "m.g_idx": tensors["m.g_idx"].sort().values}, config=config)["m.weight"].perm
        is None
    )
    tensors, config, _ = RECORDED["bitsandbytes"]["nf4_True_64"]
    with pytest.raises(ValueError, match="m.weight.quant_map must be the table of nf4"):
        read_checkpoint({**tensors, "m.weight.quant_map": tensors["m.weight.quant_map"].flip(0)}, config=config)
    key = "m.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    for changes, message in (({"nested_offset": None}, "nested_"), ({"shape": [5]}, "must describe a matrix"),
                             ({"dtype": "int4"}, "must be JSON with"), ({"blocksize": 0}, "blocks")):  # fmt: skip
        raw = json.dumps({k: v for k, v in {**state, **changes}.items() if v is not None}).encode()
        with pytest.raises(ValueError, match=f"m.weight.*{message}"):
            read_checkpoint({**tensors, key: torch.tensor(list(raw), dtype=torch.uint8)}, config=config)
    codes = torch.randint(-127, 128, (3, 8)).to(torch.int8)
    got = read_checkpoint({"m.weight": codes, "m.SCB": torch.tensor([127.0, 254, 12.7])})["m.weight"]
    torch.testing.assert_close(dequantize(got, torch.float32), codes * torch.tensor([[1.0], [2], [0.1]]))
    tensors, config, _ = RECORDED["hqq"]["4_1_16"]
    with pytest.raises(ValueError, match="m.quant_zero is set"):
        read_checkpoint({**tensors, "m.quant_zero": torch.tensor(1, dtype=torch.uint8)}, config=config)
    viewed = {**tensors, "m.W_q": tensors["m.W_q"].view(torch.float16), "m.view_as_float": torch.tensor(1)}
    a, b = (read_checkpoint(t, config=config)["m.weight"] for t in (viewed, tensors))
    assert same(dequantize(a), dequantize(b))
    # compressed-tensors' releases that put 32 // bits codes in a word
    codes = torch.randint(0, 8, (2, 40))
    old = sum(codes.view(2, 4, 10)[..., i] << 3 * i for i in range(10)).int()
    layer = {"m.weight_packed": old, "m.weight_scale": torch.ones(2, 1), "m.weight_shape": torch.tensor([2, 33])}
    got = read_checkpoint(
        layer, config={"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 3}}}}
    )
    assert old.shape[1] == -(-33 * 3 // 32) or torch.equal(dequantize(got["m.weight"]), codes[:, :33] - 4.0)


def test_a_read_weight_multiplies():
    for package, case, name in (("gptq", "4_v2", "m.weight"), ("gguf", "Q4_K", "m"), ("hqq", "3_1_16", "m.weight")):
        w = found(package, *RECORDED[package][case][:2])[name]
        x = randn(3, w.columns)
        # Of the norm, as everywhere: by itself Q4_K's first output, -87 out of terms of 63,407, is their rounding.
        assert_close(quant_matmul(x, w), x.double() @ dequantize(w, torch.float64).T, tolerance=1e-6)


# Writers


@pytest.mark.parametrize("package, case", [(p, c) for p, c in CASES if p in ("gptq", "compressed_tensors", "mxfp4")])
def test_writes_what_it_read(package, case):
    """To the bit what the package had written."""
    tensors, config, _ = RECORDED[package][case]
    if case == "int1":
        return  # codes of 0 and 1 have become values of -1 and 1
    extra = {"m.bias": randn(3)}
    module = {"gptq": gptq, "compressed_tensors": compressed_tensors, "mxfp4": mxfp4}[package]
    options = {"version": int(case[-1])} if package == "gptq" else {}
    written, config_written = module.write(read_checkpoint(tensors | extra, config=config), **options)
    assert written.keys() == tensors.keys() | extra.keys()
    assert all(same(written[name], t.contiguous()) for name, t in (tensors | extra).items())
    if package == "gptq":
        assert {k: config_written[k] for k in ("bits", "checkpoint_format")} == {
            k: config[k] for k in ("bits", "checkpoint_format")
        }
    again = read_checkpoint(written, config=config_written)
    assert all(same(dequantize(again[n]), dequantize(w)) for n, w in read_checkpoint(tensors, config=config).items())


def test_writers_own_weights():
    """What quantize makes, symmetric, with zeros, with a permutation and a short group; and what they cannot hold."""
    w, perm = randn(32, 96), torch.randperm(96, generator=torch.Generator().manual_seed(1))
    for bits in (2, 3, 4, 5, 8):
        for symmetric in (True, False):
            for size in (None, 32, 64):
                q = quantize(w, f"int{bits}", group_size=size, symmetric=symmetric, scale_dtype=torch.float16)
                q = q.replace(perm=perm if size == 64 else None, dtype=torch.float16)
                if q.zeros is not None:
                    q = q.replace(zeros=q.zeros.clamp(min=1))
                writers = [lambda t: compressed_tensors.write(t)]
                if bits != 5:
                    writers += [lambda t: gptq.write(t, version=1), lambda t: gptq.write(t)]
                for write in writers:
                    tensors, config = write({"a.weight": q})
                    got = read_checkpoint(tensors, config=config)["a.weight"]
                    assert same(dequantize(got), dequantize(q)) and got.group_size == q.group_size
                    assert (got.zeros is None) == symmetric and (got.perm is None) == (size != 64)
    many = {  # of two group sizes, of which either fits both, and of two widths
        "a.weight": quantize(randn(8, 192), "int4"), "b.weight": quantize(randn(8, 192), "int4", group_size=96),
        "c.weight": quantize(randn(8, 8), "int4"), "d.weight": quantize(randn(8, 8), "int3"),
    }  # fmt: skip
    tensors, config = compressed_tensors.write(many)
    for name, got in read_checkpoint(tensors, config=config).items():
        assert same(dequantize(got), dequantize(many[name])) and got.format == many[name].format
    for columns, config_size in (((256, 128, 96), 128), ((128, 96), -1), ((96,), 128), ((128,), -1)):
        many = {f"{K}.weight": quantize(randn(32, K), "int4", scale_dtype=torch.float16) for K in columns}
        tensors, config = gptq.write(many)  # one group of all columns fits any size
        assert config["group_size"] == config_size
        for name, got in read_checkpoint(tensors, config=config).items():
            assert same(dequantize(got, torch.float32), dequantize(many[name]))
    row = quantize(randn(32, 256), "int4", group_size=None, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"the same bits and group_size, got \[\(4, -1\), \(4, 128\)\]"):
        gptq.write({"a.weight": row, "b.weight": quantize(randn(32, 256), "int4", scale_dtype=torch.float16)})
    q = quantize(w, "int4", symmetric=False, group_size=32, scale_dtype=torch.float16)
    for write, name, value, message in (
        (gptq.write, "a", q, "a must be a matrix whose name ends"),
        (gptq.write, "a.weight", quantize(w, "int5"), "a.weight must be int2, int3"),
        (gptq.write, "a.weight", quantize(w, "nf4"), "a.weight must be int2, int3"),
        (gptq.write, "a.weight", quantize(w[:7], "int4"), "whole 32-bit words"),
        (gptq.write, "a.weight", q.replace(zeros=q.zeros + 0.5), "whole zeros of 0 to 15"),
        (lambda t: gptq.write(t, version=1), "a.weight", q.replace(zeros=q.zeros * 0), "whole zeros of 1 to 15"),
        (gptq.write, "a.weight", quantize(w, "int4", scale_dtype=torch.int8), "one level"),
        (gptq.write, "a.weight", q[:0], r"a.weight must fill whole 32-bit words .* got shape \(0, "),
        (lambda t: gptq.write(t, version="1"), "a.weight", q, "version must be 1 or 2, got '1'"),
        (lambda t: gptq.write(t, version=3), "a.weight", q, "version must be 1 or 2, got 3"),
        (compressed_tensors.write, "a.weight", q[:0], r"a.weight must be a matrix with elements .* got shape \(0, "),
        (compressed_tensors.write, "a.weight", q[:, :0], r"a.weight must be a matrix with elements .*, 0\)"),
        (compressed_tensors.write, "a.weight", quantize(w, "fp8_e4m3"), "a.weight must be int2 to int8"),
        (compressed_tensors.write, "a.weight", q.replace(zeros=q.zeros - 0.5), "whole zeros"),
        (mxfp4.write, "a", q, "a must be mxfp4"),
        (mxfp4.write, "a", quantize(w, "nvfp4"), "a must be mxfp4"),
    ):
        with pytest.raises(ValueError, match=message):
            write({name: value})
    with pytest.raises(ValueError, match="the same bits and group_size"):
        gptq.write({"a.weight": q, "b.weight": quantize(w, "int8")})


def test_own_files(tmp_path):
    w = randn(2, 6, 40)
    tensors = {f"l.{name}": quantize(w, name, group_size=16) for name in (*FORMATS, *BLOCK_FORMATS)}
    tensors["p"] = quantize(w[0], "int3", symmetric=False).replace(perm=torch.randperm(40), dtype=torch.bfloat16)
    tensors["view"] = quantize(w[0], "int4", group_size=8)[1:4, :24]
    tensors["two"] = quantize(w, "int4", scale_dtype=torch.uint8)
    tensors |= {"bias": randn(3), "embed.weight": randn(4, 2).half().T, "n": torch.tensor(3)}
    path = tmp_path / "m.safetensors"
    path.write_text("old")
    save_quantized(path, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    for got in (load_quantized(path), read_checkpoint(path), read_checkpoint(tmp_path)):
        assert got.keys() == tensors.keys()
        for name, t in tensors.items():
            if isinstance(t, torch.Tensor):
                assert same(got[name], t)
            else:
                assert got[name].metadata() == t.metadata()
                assert all(same(got[name].tensors()[part], p) for part, p in t.tensors().items())
    before = path.read_bytes()
    for bad, error, message in (
        ({"a": 3}, TypeError, "a must be a QuantizedTensor or a Tensor"),
        ({"a": tensors["p"], "a.data": randn(2)}, ValueError, "two tensors would be called a.data"),
        ({"a": tensors["p"].replace(columns=3)}, ValueError, "save_quantized: a: data must have shape"),
    ):
        with pytest.raises(error, match=message):
            save_quantized(path, bad)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="truncated: .* ends at byte"):
        load_quantized(path)
    q, key = tensors["p"], "scalekern.quant"
    parts = {f"p.{part}": t.contiguous() for part, t in q.tensors().items()}
    for change, metadata, message in (
        ({"p.scales": None}, {"p": q.metadata()}, "p.scales is missing"),
        ({"p.zeros": randn(3, 1)}, {"p": q.metadata()}, "p: .*zeros must have shape"),
        ({}, {"p": "{}"}, "p: .*no metadata"),
        ({}, {"p": q.metadata().replace("int3", "int4")}, "p: .*data must have shape"),
        ({}, [1], "must be JSON"),
    ):
        kept = {name: t for name, t in {**parts, **change}.items() if t is not None}
        save_file(kept, path, metadata={key: json.dumps(metadata)})
        with pytest.raises(ValueError, match=message):
            load_quantized(path)
    save_quantized(path, {"z": quantize(randn(4, 8), "int4", symmetric=False)})
    with safe_open(path, "pt") as file:
        kept, metadata = {name: file.get_tensor(name) for name in file.keys() if name != "z.zeros"}, file.metadata()
    save_file(kept, path, metadata=metadata)
    with pytest.raises(ValueError, match="scalekern: z.zeros is missing"):  # and not read as the format's own
        load_quantized(path)


# GGUF


def test_gguf_files(tmp_path, monkeypatch):
    """The walk over a file, with a stand-in for the package's reader: its arrays are numpy's, shapes reversed."""
    kind = lambda name: types.SimpleNamespace(name=name)
    tensors = []
    for case, (data, config, _) in RECORDED["gguf"].items():
        rows, columns = config["shape"]
        array = data["m"].view(rows, -1).numpy()
        tensors.append(types.SimpleNamespace(name=case, tensor_type=kind(case), shape=[columns, rows], data=array))
    plain, half = randn(3, 4), randn(2, 4).bfloat16()
    tensors.append(types.SimpleNamespace(name="f", tensor_type=kind("F32"), shape=[4, 3], data=plain.numpy()))
    raw = half.view(torch.uint8).numpy()
    tensors.append(types.SimpleNamespace(name="b", tensor_type=kind("BF16"), shape=[4, 2], data=raw))
    reader = type("GGUFReader", (), {"__init__": lambda self, path: setattr(self, "tensors", tensors)})
    monkeypatch.setitem(sys.modules, "gguf", types.SimpleNamespace(GGUFReader=reader))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0")
    got = read_checkpoint(path)
    assert got.keys() == {t.name for t in tensors} and same(got["f"], plain) and same(got["b"], half)
    for case, (_, _, expected) in RECORDED["gguf"].items():
        assert same(dequantize(got[case]), expected["m"])
    with pytest.raises(ValueError, match="is a GGUF file, method is 'gptq'"):
        read_checkpoint(path, "gptq")
    tensors.append(types.SimpleNamespace(name="q", tensor_type=kind("IQ1_S"), shape=[256, 2], data=raw))
    with pytest.raises(ValueError, match="q has the type IQ1_S"):
        read_checkpoint(path)
    tensors[-1] = types.SimpleNamespace(name="q", tensor_type=kind("Q4_0"), shape=[64, 2], data=raw)
    with pytest.raises(ValueError, match="q must have 72 bytes for Q4_0"):
        read_checkpoint(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="need the package gguf"):
        read_checkpoint(path)


def test_gguf_files_of_the_package(tmp_path):
    peer = pytest.importorskip("gguf")
    path, w = tmp_path / "m.gguf", randn(4, 256)
    writer = peer.GGUFWriter(str(path), "llama")
    kinds = ("F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0")
    for name in kinds:
        quant = peer.GGMLQuantizationType[name]
        writer.add_tensor(name, peer.quants.quantize(w.numpy(), quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read_checkpoint(path)
    for name in kinds:
        raw = peer.quants.quantize(w.numpy(), peer.GGMLQuantizationType[name])
        wanted = torch.from_numpy(peer.quants.dequantize(raw, peer.GGMLQuantizationType[name]))
        value = got[name] if isinstance(got[name], torch.Tensor) else dequantize(got[name])
        assert same(value.float(), wanted)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="truncated or no GGUF file: Q8_0: "):
        read_checkpoint(path)


def test_readers_import_no_package():
    for name in ("gguf", "gptqmodel", "bitsandbytes", "hqq", "compressed_tensors", "awq", "torchao"):
        module = importlib.import_module("scalekern.quant.readers")
        assert not getattr(getattr(module, name, None), "__file__", "readers").count("site-packages")
