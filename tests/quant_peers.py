"""What other packages make of their own checkpoints: {case: tensors, config, expected}, for those that are installed.

`python tests/quant_peers.py` writes quant_vectors.json from the installed ones, keeping the cases of the others.
"""

import base64
import json
import os
import pathlib
import sys
import zlib

import torch

from scalekern.quant._pack import pack, unpack
from scalekern.quant.readers.gguf import BLOCKS

PATH = pathlib.Path(__file__).with_name("quant_vectors.json")


def randn(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def randint(high, size, seed, dtype=torch.uint8):
    return torch.randint(0, high, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gptq():
    """GPTQModel's own packing and TorchLinear; v1 is read after its own conversion to v2."""
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # which would be compiled first
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    for bits in (2, 3, 4, 8):
        for version in (1, 2):
            N, K, size, order = 32, 32, 16 if bits != 8 else 32, bits in (3, 4) and version == 2
            g_idx = torch.arange(K) // size
            if order:
                g_idx = g_idx[torch.randperm(K, generator=torch.Generator().manual_seed(bits))]
            layer = TorchLinear(bits, size, False, order, K, N, register_buffers=True)
            linear = torch.nn.Linear(K, N, bias=False, dtype=torch.float16)
            linear.weight.data = randn(N, K, seed=bits).half()
            scales = (randn(N, K // size, seed=bits + 10).abs() + 0.5) * 2.5 / 2 ** (bits - 1)
            zeros = randint(2**bits - 1, (N, K // size), seed=bits + 20, dtype=torch.int32) + (version == 1)
            layer.pack_block(linear, scales.half(), zeros, g_idx.to(torch.int32))
            if version == 1:  # as the format stores them: one less
                stored = unpack(layer.qzeros.view(torch.uint8), bits, N).int() - 1 & 2**bits - 1
                layer.qzeros.data.copy_(pack(stored, bits).view(torch.int32))
            tensors = {f"m.{k}": getattr(layer, k).clone() for k in ("qweight", "qzeros", "scales", "g_idx")}
            if version == 1:
                layer.qzero_format(format=1)
                convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
            layer.optimized = True
            layer.post_init()
            config = {"bits": bits, "group_size": size, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
            expected = layer.dequantize_weight().T.contiguous()
            yield f"{bits}_v{version}", tensors, {"quant_method": "gptq", **config}, {"m.weight": expected}


def awq():
    """AutoAWQ's unpacking of random words."""
    import importlib.util

    spec = importlib.util.find_spec("awq")  # whose __init__ wants a GPU's packages
    path = pathlib.Path(spec.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("awq_packing_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    K, N, size = 64, 16, 32
    words = lambda *size, seed: torch.randint(
        -(2**31), 2**31, size, generator=torch.Generator().manual_seed(seed)
    ).int()
    tensors = {"m.qweight": words(K, N // 8, seed=1), "m.qzeros": words(K // size, N // 8, seed=2)}
    tensors["m.scales"] = randn(K // size, N, seed=3).abs().half()
    expected = module.dequantize_gemm(tensors["m.qweight"], tensors["m.qzeros"], tensors["m.scales"], 4, size)
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    yield "gemm", tensors, config, {"m.weight": expected.T.contiguous()}


def compressed_tensors():
    """Its compressor of every width, both ways."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    N, K, size = 5, 48, 16
    for bits in range(1, 9):
        strategy = "channel" if bits == 8 else "group"
        symmetric = bits in (1, 4, 8)
        G = 1 if strategy == "channel" else K // size
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
        weights["group_size"] = None if strategy == "channel" else size
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        scale = ((randn(N, G, seed=bits).abs() + 0.5) * 2 / 2 ** (bits - 1)).bfloat16()
        zero = (randint(2**bits, (N, G), seed=bits).int() - 2 ** (bits - 1)).to(torch.int8) * (not symmetric)
        state = {"weight": randn(N, K, seed=30 + bits).bfloat16(), "weight_scale": scale, "weight_zero_point": zero}
        packed = Compressor.compress(state, scheme)
        tensors = {f"m.{k}": v for k, v in packed.items() if k in (
            "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")}  # fmt: skip
        expected = Compressor.decompress(packed, scheme)["weight"]
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        config["config_groups"] = {"group_0": {"weights": weights}}
        yield f"int{bits}", tensors, config, {"m.weight": expected}


def bitsandbytes():
    """Its CPU kernels; 50 columns are cut by blocks of 64."""
    import bitsandbytes.functional as F

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for N, K, dtype in ((5, 64, torch.float32), (6, 50, torch.bfloat16)):
                w = randn(N, K, seed=N).to(dtype)
                data, state = F.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=kind)
                tensors = {"m.weight": data} | {f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
                tensors = {k: v.clone() for k, v in tensors.items()}
                expected = F.dequantize_4bit(data, state)
                yield f"{kind}_{nested}_{K}", tensors, {"quant_method": "bitsandbytes"}, {"m.weight": expected}


def hqq():
    """Its quantizer, in the encoding of HQQLinear's state_dict."""
    from hqq.core.quantize import Quantizer
    from hqq.core.utils import encode_safetensor_type as encode

    for nbits in (8, 6, 5, 4, 3, 2, 1.58, 1):
        for axis, group in ((1, 16), (0, 16), (1, None)):
            if axis == 0 and nbits not in (4, 3) or group is None and nbits != 4:
                continue
            w = randn(8, 32, seed=3)
            data, meta = Quantizer.quantize(w, nbits=nbits, group_size=group, axis=axis, device="cpu", optimize=False)
            meta = {**meta, "scale": meta["scale"].half(), "zero": meta["zero"].half(), "compute_dtype": torch.float16}
            expected = Quantizer.dequantize(data, {**meta, "compute_dtype": torch.float32})
            fields = {k: encode(v) for k, v in meta.items() if v is not None}
            tensors = {"m.W_q": data} | {f"m.{k}": v for k, v in fields.items()}
            yield f"{nbits}_{axis}_{group}", tensors, {"quant_method": "hqq"}, {"m.weight": expected}


def gguf():
    """Random blocks, whose halves are finite, through gguf's dequantization in numpy."""
    import gguf as peer
    import numpy as np

    halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
              "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}  # fmt: skip
    for kind, (_, size, length, *_) in BLOCKS.items():
        rows, blocks = (2, 2) if size == 32 else (2, 1)
        data = randint(256, (rows * blocks, length), seed=length)
        for at in halves[kind]:
            data[:, at : at + 2] = randn(rows * blocks, 1, seed=at).half().view(torch.uint8)
        quant = peer.GGMLQuantizationType[kind]
        expected = torch.from_numpy(np.array(peer.quants.dequantize(data.numpy().reshape(rows, -1), quant)))
        yield kind, {"m": data.flatten()}, {"kind": kind, "shape": [rows, blocks * size]}, {"m": expected}


def mxfp4():
    """transformers' reading of gpt-oss, which has them transposed."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = randint(256, (2, 3, 2, 16), seed=1), randint(12, (2, 3, 2), seed=2) + 120
    expected = convert_moe_packed_tensors(blocks, scales).mT.contiguous()
    yield "gpt_oss", {"m_blocks": blocks, "m_scales": scales}, {"quant_method": "mxfp4"}, {"m": expected}


def torchao():
    """MX as its kernels round it (6.3 of the specification, "floor"), and NVFP4 with the scale of its recipe."""
    from torchao.prototype.mx_formats import mx_tensor as mx
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    w = (randn(4, 64, seed=1) * torch.logspace(-1, 1, 4)[:, None]).bfloat16()
    w[1, 0] = 7.9 * 2.0**3  # to beyond the largest of 4 bits
    elements = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp4": torch.float4_e2m1fn_x2,
                "mxfp6_e2m3": mx.DTYPE_FP6_E2M3, "mxfp6_e3m2": mx.DTYPE_FP6_E3M2}  # fmt: skip
    for name, dtype in elements.items():
        t = mx.MXTensor.to_mx(w, dtype, 32)
        expected = {"m": t.dequantize(torch.bfloat16), "scales": t.scale.view(torch.uint8)}
        if "6" not in name:  # which it leaves unpacked
            expected["data"] = t.qdata.view(torch.uint8)
        yield name, {"w": w}, {"format": name}, expected
    t = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max().float()))
    expected = {"m": t.dequantize(torch.float32), "scales": t.scale.view(torch.uint8), "data": t.qdata}
    yield "nvfp4", {"w": w}, {"format": "nvfp4"}, expected


PEERS = {f.__name__: f for f in (gptq, awq, compressed_tensors, bitsandbytes, hqq, gguf, mxfp4, torchao)}


def encode(t: torch.Tensor) -> dict:
    raw = bytes(t.contiguous().flatten().view(torch.uint8).tolist()) if t.dim() else None
    data = t.tolist() if raw is None else base64.b64encode(zlib.compress(raw, 9)).decode()
    return {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "data": data}


def decode(field: dict) -> torch.Tensor:
    dtype = getattr(torch, field["dtype"])
    if not field["shape"]:
        return torch.tensor(field["data"], dtype=dtype)
    raw = torch.tensor(list(zlib.decompress(base64.b64decode(field["data"]))), dtype=torch.uint8)
    return raw.view(dtype).reshape(field["shape"])


def load() -> dict:
    """{package: {case: (tensors, config, expected)}} as recorded."""
    decoded = lambda tensors: {name: decode(t) for name, t in tensors.items()}
    recorded = json.loads(PATH.read_text())["cases"]
    return {
        package: {case: (decoded(c["tensors"]), c["config"], decoded(c["expected"])) for case, c in cases.items()}
        for package, cases in recorded.items()
    }


def main():
    recorded = json.loads(PATH.read_text()) if PATH.exists() else {"cases": {}}
    for package in sys.argv[1:] or PEERS:
        try:
            made = {
                case: {"tensors": {k: encode(t) for k, t in tensors.items()}, "config": config,
                       "expected": {k: encode(t) for k, t in expected.items()}}
                for case, tensors, config, expected in PEERS[package]()
            }  # fmt: skip
        except ImportError as error:
            print(f"{package}: kept as recorded: {error}")
            continue
        recorded["cases"][package] = made
        print(f"{package}: {len(made)} cases")
    PATH.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
