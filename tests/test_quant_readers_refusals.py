"""Checkpoints and files that cannot be: what is refused, by the name of the tensor or of the file."""

import json
import struct

import pytest
import quant_peers
import torch

from scalekern.quant import load_quantized, quantize, read_checkpoint, save_quantized

RECORDED = quant_peers.load()


def test_what_the_config_says_and_the_tensors_do_not():
    """Parts that would be taken for another, smaller layer: no zeros, fewer groups, no order of the columns."""
    tensors, config, _ = RECORDED["compressed_tensors"]["int4"]
    with pytest.raises(ValueError, match="m.weight_scale must have 3 groups of 16 of 48 columns, got 2"):
        read_checkpoint({**tensors, "m.weight_scale": tensors["m.weight_scale"][:, :2]}, config=config)
    tensors, config, _ = RECORDED["compressed_tensors"]["int2"]
    with pytest.raises(ValueError, match="m.weight_zero_point is missing"):
        read_checkpoint({n: t for n, t in tensors.items() if n != "m.weight_zero_point"}, config=config)
    tensors, config, _ = RECORDED["gptq"]["4_v2"]
    without = {n: t for n, t in tensors.items() if n != "m.g_idx"}
    assert read_checkpoint(without, config=config)["m.weight"].shape == (32, 32)
    with pytest.raises(ValueError, match="m.g_idx is missing or empty, which desc_act"):
        read_checkpoint(without, config={**config, "desc_act": True})
    for size in (0, -5, "16"):
        with pytest.raises(ValueError, match="m.scales must come with a group_size of -1 or at least 1"):
            read_checkpoint(tensors, config={**config, "group_size": size})


def compressed(weights, targets=None, *, tensors=None, **other):
    """The recorded 4 bits under a config that says these of its weights."""
    recorded, config, _ = RECORDED["compressed_tensors"]["int4"]
    weights = {**config["config_groups"]["group_0"]["weights"], **weights} if isinstance(weights, dict) else weights
    groups = {"group_0": {"weights": weights, **({} if targets is None else {"targets": targets})}, **other}
    return read_checkpoint(recorded | (tensors or {}), config={**config, "config_groups": groups})["m.weight"]


def test_groups_of_a_config_that_do_not_fit():
    two = {"weights": {"num_bits": 2, "group_size": 16}}
    for targets in (None, ["Linear"], ["m"], ["re:m$"], ["re:.*other", "m"]):
        assert compressed({}, targets).format == "int4"
    for targets, others in ((["m"], ["Linear"]), (["re:m"], ["Linear"]), (["m"], ["re:m"]), (["Linear"], ["head"])):
        assert compressed({}, targets, group_1={**two, "targets": others}).format == "int4"
    assert compressed({}, ["Linear"], group_1={"targets": ["Linear"], "weights": None}).format == "int4"
    for targets, others in ((["Linear"], ["Linear"]), (["m"], ["m"]), (["a"], ["re:b"]), (None, None)):
        with pytest.raises(ValueError, match="m.weight_packed must belong to one of config_groups, fits targets"):
            compressed({}, targets, group_1={**two, "targets": others})
    with pytest.raises(ValueError, match="m.weight_g_idx is missing"):
        compressed({"actorder": "group"})
    assert compressed({"actorder": "weight"}).perm is None
    bad = {"m.weight_zero_point": torch.zeros(3, dtype=torch.int8)}
    for weights, targets, tensors, message in (
        ({"num_bits": 0}, None, None, "m.weight_packed must have 1 to 8 bits, the config says num_bits 0"),
        ({"num_bits": 33}, None, None, "m.weight_packed must have 1 to 8 bits, the config says num_bits 33"),
        ({"num_bits": "4"}, None, None, "m.weight_packed must have 1 to 8 bits, the config says num_bits '4'"),
        ({"num_bits": [4]}, None, None, "m.weight_packed must have 1 to 8 bits"),
        ({"group_size": "32"}, None, None, "m.weight_scale must come with a group_size of -1 or at least 1"),
        ({"group_size": [32]}, None, None, "m.weight_scale must come with a group_size of -1 or at least 1"),
        ({"group_size": 0}, None, None, "m.weight_scale must come with a group_size of -1 or at least 1"),
        ([1], None, None, "group_0 of config_groups must have weights as a dict"),
        ({}, "m", None, "group_0 of config_groups must have weights as a dict and targets as a list of strings"),
        ({}, [3], None, "group_0 of config_groups must have weights as a dict and targets as a list of strings"),
        ({}, ["re:("], None, r"m.weight_packed cannot be looked up: 're:\(' is no pattern"),
        ({}, None, bad, r"m.weight_zero_point must have \d+ elements, got shape \(3,\)"),
        ({}, None, {"m.weight_shape": torch.tensor([-1, -1])}, "m.weight_shape must hold sizes from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            compressed(weights, targets, tensors=tensors)


def test_hqq_numbers_that_disagree():
    tensors, config, _ = RECORDED["hqq"]["4_1_16"]
    read = lambda **changes: read_checkpoint(  # noqa: E731
        {**tensors, **{f"m.{key}": torch.tensor(value) for key, value in changes.items()}}, config=config
    )
    assert read(nbits=4.0)["m.weight"].format == "int4"
    for nbits in (0, -1, 1, 1.58, 2, 3, 5, 8, 9):
        with pytest.raises(ValueError, match="m.nbits must be"):
            read(nbits=nbits)
    for shape in ([-8, -32], [0, 32], [8, 0]):
        with pytest.raises(ValueError, match="m.shape must hold sizes from 1"):
            read(shape=shape)
    with pytest.raises(ValueError, match="m.packing .* in groups of -16 is unknown"):
        read(group_size=-16)
    words = torch.zeros(8, 3, dtype=torch.float16), torch.tensor(1.0)
    three, _, _ = RECORDED["hqq"]["3_1_16"]
    for given, message in zip(words, ("m.W_q must view as torch.int32", "m.W_q must have 2 dimensions")):
        with pytest.raises(ValueError, match=message):
            read_checkpoint({**three, "m.W_q": given, "m.view_as_float": torch.tensor(1)}, config=config)


def test_bitsandbytes_states_that_disagree():
    tensors, config, _ = RECORDED["bitsandbytes"]["nf4_True_64"]
    key = "m.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    for changes, message in (
        ({"shape": [-5, -64]}, "m.weight.quant_state.bitsandbytes__nf4 must describe a matrix"),
        ({"blocksize": float("inf")}, "m.weight.quant_state.bitsandbytes__nf4 must be JSON with"),
        ({"nested_blocksize": "256"}, "m.weight.absmax is uint8, but .* got '256'"),
        ({"nested_blocksize": -1}, "m.weight.absmax is uint8, but .* got -1"),
        ({"nested_offset": None}, "m.weight.absmax is uint8, but .* and None"),
    ):
        raw = torch.tensor(list(json.dumps({**state, **changes}).encode()), dtype=torch.uint8)
        with pytest.raises(ValueError, match=message):
            read_checkpoint({**tensors, key: raw}, config=config)
    eight = {"l.weight": torch.ones(4, 8, dtype=torch.int8), "k.weight": torch.ones(4, 8, dtype=torch.int8)}
    with pytest.raises(ValueError, match="bitsandbytes: l.SCB is missing"):
        read_checkpoint({**eight, "k.SCB": torch.ones(4)})
    got = read_checkpoint({"k.weight": eight["k.weight"], "k.SCB": torch.ones(4), "steps": torch.ones(2, 2).char()})
    assert got["k.weight"].format == "int8" and got["steps"].dtype == torch.int8


def test_gptq_and_awq_numbers_of_other_types():
    tensors, config, _ = RECORDED["gptq"]["4_v2"]
    for changes, message in (
        ({"bits": 4.0}, "m.qweight must have 2, 3, 4 or 8 bits, the config says 4.0"),
        ({"bits": [4]}, "m.qweight must have 2, 3, 4 or 8 bits, the config says .4."),
        ({"dynamic": {"(": {}}}, "m.qweight cannot be looked up in the config's dynamic"),
        ({"dynamic": [1]}, "m.qweight cannot be looked up in the config's dynamic"),
        ({"dynamic": {".*": None}}, "m.qweight cannot be looked up in the config's dynamic"),
    ):
        for form in ("gptq_v2", "gptq_p"):
            with pytest.raises(ValueError, match=message.replace("bits,", "bits.*,")):
                read_checkpoint(tensors, config={**config, "checkpoint_format": form, **changes})
    tensors, config, _ = RECORDED["awq"][next(iter(RECORDED["awq"]))]
    for version in ("gemm", "gemv"):
        with pytest.raises(ValueError, match="m.scales must come with a whole group_size, the config says '32'"):
            read_checkpoint(tensors, config={**config, "version": version, "group_size": "32"})


def test_configs_of_other_types():
    for config, message in (
        ({"quant_method": "compressed-tensors", "config_groups": 3}, "config_groups must be a dict of dicts, got 3"),
        ({"quant_method": ["gptq"]}, "method must be one of .*, got .'gptq'."),
        (3, "config must be a dict, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read_checkpoint({}, config=config)


def test_folders_whose_json_is_none(tmp_path):
    index, config = tmp_path / "model.safetensors.index.json", tmp_path / "config.json"
    texts = ("{", "is no JSON"), ("[]", "must hold an object, got list"), ("{}", "must hold a weight_map")
    texts += (('{"weight_map": {"a.weight": 3}}', "says 3"),)
    for text, message in texts:
        index.write_text(text)
        with pytest.raises(ValueError, match=f"index.json {message}"):
            read_checkpoint(tmp_path)
    index.unlink()
    save_quantized(tmp_path / "m.safetensors", {"w": quantize(torch.randn(4, 8), "int4")})
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        read_checkpoint(tmp_path)
    config.write_text('{"text_config": 3}')
    assert read_checkpoint(tmp_path).keys() == {"w"}


def test_a_header_with_one_offset_and_what_is_not_saved(tmp_path):
    path, w = tmp_path / "m.safetensors", quantize(torch.randn(4, 8), "int4")
    save_quantized(path, {"w": w})
    whole = path.read_bytes()
    for tensors, error, message in (
        ({"w": w.to("meta")}, ValueError, "w.data must be dense and hold data, got torch.strided on meta"),
        ({"w": torch.ones(2).to_sparse()}, ValueError, "w must be dense and hold data, got torch.sparse_coo on cpu"),
        ([w], TypeError, "tensors must be a dict by name, got list"),
        ({3: w}, TypeError, "tensors must be a dict by name"),
        ({"__metadata__": torch.ones(2)}, ValueError, "tensors must have other names than __metadata__"),
        ({"w": w, "z": torch.ones(2).to(torch.complex128)}, ValueError, "z must have a dtype of .*, got .*complex128"),
    ):
        with pytest.raises(error, match=f"save_quantized: {message}"):
            save_quantized(path, tensors)
    assert path.read_bytes() == whole
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["w.data"]["data_offsets"] = [5]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(ValueError, match="m.safetensors is no safetensors file"):
        load_quantized(path)
