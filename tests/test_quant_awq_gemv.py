"""AWQ's version "gemv": words along K in order, scales and zeros with room behind the groups, packed here by hand."""

import pytest
import torch

from scalekern.quant import dequantize, read_checkpoint


def words(codes, width):
    """(R, C) codes, eight in an int32 word from the lowest nibble on, rows of `width` words."""
    room = torch.zeros(codes.shape[0], 8 * width, dtype=torch.int64)
    room[:, : codes.shape[1]] = codes
    sums = sum(room[:, i::8] << 4 * i for i in range(8))
    return torch.where(sums >= 2**31, sums - 2**32, sums).int()


def layer(N, K, size, width):
    generator = torch.Generator().manual_seed(K + size)
    codes, zeros = (torch.randint(16, (N, n), generator=generator) for n in (K, K // size))
    scales = torch.zeros(N, 8 * width, dtype=torch.float16)
    scales[:, : K // size] = torch.rand(N, K // size, generator=generator) + 0.5
    tensors = {"a.qweight": words(codes, K // 8), "a.qzeros": words(zeros, width), "a.scales": scales}
    each = lambda t: t[:, : K // size].repeat_interleave(size, 1)
    return tensors, (codes - each(zeros)).half() * each(scales)


@pytest.mark.parametrize("size, width", [(128, 1), (64, 2), (32, 4), (-1, 1)])
def test_equals_the_definition(size, width):
    tensors, expected = layer(24, 256, 256 if size == -1 else size, width)
    config = {"quant_method": "awq", "version": "GEMV", "bits": 4, "group_size": size, "zero_point": True}
    found = read_checkpoint(tensors | {"a.bias": torch.ones(24)}, config=config)
    assert torch.equal(dequantize(found["a.weight"], torch.float16), expected) and expected.norm() > 0
    assert torch.equal(found["a.bias"], torch.ones(24))


def test_what_is_misshapen_is_named():
    tensors, _ = layer(24, 256, 64, 2)
    config = {"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 64}
    for name, spoiled in (("qzeros", tensors["a.qzeros"][:, :1]), ("scales", tensors["a.scales"][:, :3])):
        with pytest.raises(ValueError, match=rf"awq: a.{name} must have"):
            read_checkpoint(tensors | {f"a.{name}": spoiled}, config=config)
    for size in (48, None):
        with pytest.raises(ValueError, match="awq: a.qweight has 256 columns, which the config's group_size"):
            read_checkpoint(tensors, config=config | {"group_size": size})
