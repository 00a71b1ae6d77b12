"""GPTQModel's planar format: 3, 5, 6 and 7 bits as planes of 4, 2 and 1, each 32 codes in as many words as bits."""

import pytest
import torch
from conftest import INTERPRET

from scalekern import quant_matmul
from scalekern.quant import dequantize, read_checkpoint
from scalekern.quant.readers import gptq

pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernel is concerned")
WIDTHS = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
# What planar_pack_rows of GPTQModel 7.7.0 makes of the column of codes (37 i + 11) mod 2^bits, i from 0 to 31.
LOW = [0xE94FA50B, 0x61C72D83, 0xE94FA50B, 0x61C72D83]
WORDS = {
    3: [0x93939393, 0x93939393, 0xB4B4B4B4], 5: [*LOW, 0x38E1C71E], 6: [*LOW, 0xD8B721DC, 0x2DC87621],
    7: [*LOW, 0xD8B721DC, 0x2DC87621, 0x4C99366C],
}  # fmt: skip


def planes(codes, bits):
    """(n, N) codes to (n bits / 32, N) words, word by word."""
    words = []
    for block in codes.long().split(32):
        low = 0
        for width in WIDTHS[bits]:
            for some in (block >> low & (1 << width) - 1).split(32 // width):
                words.append(sum(code << width * i for i, code in enumerate(some)))
            low += width
    return torch.stack(words).to(torch.int32)


def checkpoint(bits, K=96, N=64, size=32, order=False):
    """(tensors, config, the matrix); groups of 32 columns, in some order."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (K, N), generator=generator)
    zeros = torch.randint(1 << bits, (K // size, N), generator=generator)
    scales = torch.rand(K // size, N, generator=generator) + 0.5
    g_idx = torch.arange(K) // size
    g_idx = g_idx[torch.randperm(K, generator=generator)] if order else g_idx
    tensors = {
        "m.qweight": planes(codes, bits), "m.qzeros": planes(zeros.T, bits).T.contiguous(), "m.scales": scales,
        "m.g_idx": g_idx.int(),
    }  # fmt: skip
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": "gptq_p"}
    return tensors, config, (scales[g_idx] * (codes - zeros[g_idx])).T


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_of_gptqmodel(bits):
    codes = (torch.arange(32) * 37 + 11)[:, None] % (1 << bits)
    words = torch.tensor(WORDS[bits]).to(torch.int32)[:, None]
    assert torch.equal(planes(codes, bits), words)
    assert torch.equal(gptq._from_planes(words, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_reads_and_multiplies(bits, order):
    tensors, config, matrix = checkpoint(bits, order=order)
    w = read_checkpoint(tensors, config=config)["m.weight"]
    assert (w.format, w.perm is None) == (f"int{bits}", not order)
    torch.testing.assert_close(dequantize(w, torch.float32), matrix, rtol=0, atol=0)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quant_matmul(x, w), x @ matrix.T, rtol=1e-5, atol=1e-3)


def test_one_plane_is_the_continuous_format_and_others_are_refused():
    tensors, config, _ = checkpoint(3)
    words = torch.randint(-(2**31), 2**31, (12, 64), generator=torch.Generator().manual_seed(0)).int()
    four = {**tensors, "m.qweight": words, "m.qzeros": words[:3, :8].contiguous()}
    read = lambda form, bits=4, given=four: read_checkpoint(  # noqa: E731
        given, config={**config, "bits": bits, "checkpoint_format": form}
    )["m.weight"]
    assert torch.equal(dequantize(read("gptq_p")), dequantize(read("gptq_v2")))
    for form, bits in (("gptq_v2", 5), ("gptq", 7), ("gptq_p", 1)):
        with pytest.raises(ValueError, match=f"m.qweight must have 2, 3, 4 or 8 bits.*, the config says {bits}"):
            read(form, bits)
    narrow = {n: t[:, : t.shape[1] // 2] for n, t in tensors.items() if n != "m.g_idx"}
    assert read("gptq_p", 3, narrow).shape == (32, 96)
    narrow = {**{n: narrow[n][:, :16] for n in ("m.qweight", "m.scales")}, "m.qzeros": narrow["m.qzeros"][:, :2]}
    with pytest.raises(ValueError, match=r"m.qweight must have a multiple of 32 rows and columns in planes, got \(16"):
        read("gptq_p", 3, narrow)
