"""What the formats' tools leave on a disk: shards, indices of other names, other wrappings, layouts of theirs."""

import json

import pytest
import quant_peers
import torch
from safetensors.torch import save_file

from scalekern.quant import dequantize, quantize, read_checkpoint, save_quantized
from scalekern.quant.readers import gptq

RECORDED = quant_peers.load()


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def gptq_tensors():
    return gptq.write({
        f"layers.{i}.weight": quantize(randn(32, 64, seed=i), "int4", group_size=32, scale_dtype=torch.float16)
        for i in range(3)
    })  # fmt: skip


def saved(folder, name, tensors):
    save_file(tensors, folder / name)
    return dict.fromkeys(tensors, name)


@pytest.mark.parametrize("config_name", ["quantize_config.json", "config.json"])
def test_an_index_of_another_name(config_name, tmp_path):
    """gptq_model-4bit-128g.safetensors.index.json: a shard that is not there is missed, and so is its tensor named."""
    tensors, config = gptq_tensors()
    names = sorted(tensors)
    where = saved(tmp_path, "gptq_model-4bit-1.safetensors", {n: tensors[n] for n in names[:5]})
    where |= saved(tmp_path, "gptq_model-4bit-2.safetensors", {n: tensors[n] for n in names[5:]})
    (tmp_path / "gptq_model-4bit.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = config if config_name.startswith("quantize") else {"quantization_config": config}
    (tmp_path / config_name).write_text(json.dumps(config))
    assert read_checkpoint(tmp_path).keys() == {f"layers.{i}.weight" for i in range(3)}
    (tmp_path / "gptq_model-4bit-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{names[5]} is in gptq_model-4bit-2.safetensors by gptq_model-4bit"):
        read_checkpoint(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="must have one index, got gptq_model.*, other"):
        read_checkpoint(tmp_path)


def test_a_config_in_gptqmodels_new_words():
    """`method` and `format` are what it goes by now: zeros of version 2 under version 1 would be one too many."""
    tensors, config, expected = RECORDED["gptq"]["4_v2"]
    new = {"method": "gptq", "format": "gptq_v2", "bits": 4, "group_size": config["group_size"]}
    assert torch.equal(dequantize(read_checkpoint(tensors, config=new)["m.weight"]), expected["m.weight"])
    tensors, config, expected = RECORDED["awq"]["gemm"]
    new = {"method": "awq", "format": "gemm", "bits": 4, "group_size": config["group_size"], "zero_point": True}
    assert torch.equal(dequantize(read_checkpoint(tensors, config=new)["m.weight"]), expected["m.weight"])
    with pytest.raises(ValueError, match="only 4 bits of version gemm or gemv are read, the .* 4 of gemv_fast"):
        read_checkpoint(tensors, config={**new, "format": "gemv_fast"})


def test_shards_without_an_index(tmp_path):
    tensors, config = gptq_tensors()
    names = sorted(tensors)
    saved(tmp_path, "model-00001-of-00002.safetensors", {n: tensors[n] for n in names[:5]})
    with pytest.raises(FileNotFoundError, match="00001-of-00002.safetensors, but no model-00002-of-00002.safetensors"):
        read_checkpoint(tmp_path, config=config)
    saved(tmp_path, "model-00002-of-00002.safetensors", {n: tensors[n] for n in names[5:]})
    assert len(read_checkpoint(tmp_path, config=config)) == 3


def test_files_beside_the_model_are_not_of_it(tmp_path):
    """An adapter, and the same weights under their first names, as Mistral's repositories hold them."""
    tensors, config = gptq_tensors()
    saved(tmp_path, "model.safetensors", tensors)
    saved(tmp_path, "consolidated.safetensors", {f"own.{n}": t for n, t in tensors.items()})
    saved(tmp_path, "adapter_model.safetensors", {"lora_A.weight": randn(2, 2)})
    assert read_checkpoint(tmp_path, config=config).keys() == {f"layers.{i}.weight" for i in range(3)}


def test_sources_and_places_that_are_none(tmp_path):
    for source in (None, 3, ["a"], b"a"):
        with pytest.raises(TypeError, match="read_checkpoint: source must be a path or a dict of tensors, got"):
            read_checkpoint(source)
    with pytest.raises(TypeError, match="read_checkpoint: tensors must have names, got 1"):
        read_checkpoint({1: randn(2)})
    tensors, config = gptq_tensors()
    with pytest.raises(ValueError, match="layers.0.qweight must be a torch.Tensor, got ndarray"):
        read_checkpoint({n: t.numpy() for n, t in tensors.items()}, config=config)
    with pytest.raises(TypeError, match="save_quantized: path must be that of a file, got int"):
        save_quantized(3, {"a": randn(2)})
    for path in (tmp_path, tmp_path / "none" / "a.safetensors"):
        with pytest.raises(FileNotFoundError, match="save_quantized: path must be that of a file in a directory, got"):
            save_quantized(path, {"a": randn(2)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_bitsandbytes_bytes_stored_as_numbers(dtype):
    """bnb_4bit_quant_storage: the packed bytes under the dtype of the model, so that FSDP shards them alike."""
    tensors, config, expected = RECORDED["bitsandbytes"]["nf4_True_64"]
    stored = {**tensors, "m.weight": tensors["m.weight"].flatten().view(dtype)[:, None]}
    got = read_checkpoint(stored, config=config)["m.weight"]
    assert torch.equal(dequantize(got, expected["m.weight"].dtype), expected["m.weight"])
    with pytest.raises(ValueError, match="m.weight must hold 160 bytes"):
        read_checkpoint({**stored, "m.weight": stored["m.weight"][1:]}, config=config)
    with pytest.raises(ValueError, match="m.weight.quant_state.bitsandbytes__nf4 or fp4 is missing"):
        read_checkpoint({"m.weight": tensors["m.weight"]}, config=config)


@pytest.mark.parametrize("bits, packing", [(8, "8bit_u8"), (4, "4bit_u8"), (3, "3bit_32"), (2, "2bit_u8")])
def test_hqq_of_one_scale_for_all(bits, packing):
    """channel_wise=False: rows stay as they are, whatever the group size says."""
    N, K, per = 24, 40, 10 if bits == 3 else 8 // bits
    codes = torch.randint(1 << bits, (N, K), generator=torch.Generator().manual_seed(bits)).int()
    planes = torch.nn.functional.pad(codes, (0, 0, 0, -N % per)).chunk(per)
    words = sum(plane << bits * (per - 1 - i) for i, plane in enumerate(planes))
    number = torch.tensor
    tensors = {
        "m.W_q": words if bits == 3 else words.to(torch.uint8), "m.scale": number([[0.5]]), "m.zero": number([[3.25]]),
        "m.nbits": number(bits), "m.axis": number(0), "m.group_size": number(8), "m.shape": number([N, K]),
        "m.packing": number(list(packing.encode()), dtype=torch.uint8),
    }  # fmt: skip
    got = read_checkpoint(tensors)["m.weight"]
    assert torch.equal(dequantize(got), (codes - 3.25) * 0.5)


def test_gpt_oss_under_its_first_names():
    tensors, _, expected = RECORDED["mxfp4"]["gpt_oss"]
    renamed = {"block.0.mlp1_weight" + n[1:].replace("_", "."): t for n, t in tensors.items()}
    for method in (None, "mxfp4"):
        got = read_checkpoint(renamed | {"norm.scale": randn(3)}, method)
        assert got.keys() == {"block.0.mlp1_weight", "norm.scale"}
        assert torch.equal(dequantize(got["block.0.mlp1_weight"], expected["m"].dtype), expected["m"])
    with pytest.raises(ValueError, match="block.0.mlp1_weight.scales is part of a quantized matrix"):
        read_checkpoint({n: t for n, t in renamed.items() if n.endswith("scales")}, "mxfp4")


def test_codes_of_another_format_are_no_plain_tensors():
    tensors, config, expected = RECORDED["compressed_tensors"]["int4"]
    groups = {name: {**g, "format": "pack-quantized"} for name, g in config["config_groups"].items()}
    mixed = {**config, "format": "mixed-precision", "config_groups": groups}
    assert torch.equal(dequantize(read_checkpoint(tensors, config=mixed)["m.weight"]), expected["m.weight"])
    with pytest.raises(ValueError, match="only the format pack-quantized is read, the config says mixed-precision"):
        read_checkpoint(tensors, config={**config, "format": "mixed-precision", "config_groups": {}})
    other = {**groups, "b": {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float"}}}
    with pytest.raises(ValueError, match="only the format pack-quantized is read, the config says float-quantized"):
        read_checkpoint(tensors, config={**mixed, "config_groups": other})
    floats = {"g": {"weights": {**groups["group_0"]["weights"], "type": "float"}}}
    with pytest.raises(ValueError, match="m.weight_packed must be of integers, the config says type 'float'"):
        read_checkpoint(tensors, config={**config, "config_groups": floats})
    for extra in ({"x.weight": torch.ones(2, 2, dtype=torch.int8), "x.weight_scale": randn(2, 1)},
                  {"x.compressed": randn(2, 2), "x.bitmask": torch.ones(2, dtype=torch.uint8)}):  # fmt: skip
        with pytest.raises(ValueError, match="x.(weight_scale|bitmask) is part of a quantized matrix"):
            read_checkpoint(tensors | extra, config=config)
    tensors, config = gptq_tensors()
    with pytest.raises(ValueError, match="is_marlin_format is set"):
        read_checkpoint({"m.B": torch.ones(2, 2).int()}, config={**config, "is_marlin_format": True})


def test_gguf_files_that_are_not_whole_or_of_another_order(tmp_path):
    """And integers, which some models' tables are."""
    peer = pytest.importorskip("gguf")

    def write(name, **options):
        writer = peer.GGUFWriter(str(tmp_path / name), "llama", **options)
        for i in range(3):
            writer.add_tensor(f"t{i}", torch.arange(6, dtype=torch.int32).view(2, 3).numpy())
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()

    write("whole.gguf")
    assert torch.equal(read_checkpoint(tmp_path / "whole.gguf")["t2"], torch.arange(6, dtype=torch.int32).view(2, 3))
    write("part.gguf", split_max_tensors=1)
    with pytest.raises(ValueError, match="part-00002-of-00003.gguf is one of 3 parts of a model"):
        read_checkpoint(tmp_path / "part-00002-of-00003.gguf")
    write("big.gguf", endianess=peer.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="big.gguf must be in this machine's byte order"):
        read_checkpoint(tmp_path / "big.gguf")
