"""Sample inputs of the quant_matmul family.

Shape letters: M tokens, N outputs, K inputs.
"""

import torch

from scalekern.quant import quantize
from scalekern.testing import Sample, Spec


def weight(N, K, format, group_size, *, symmetric=True, act_order=False, two_level=False, device="cpu"):
    """A random weight, the same whatever the sample's seed; rows of different scales."""
    generator = torch.Generator().manual_seed(N * 1000 + K)
    dense = torch.randn(N, K, generator=generator) * (0.5 + torch.rand(N, 1, generator=generator)) / K**0.5
    w = quantize(dense, format, group_size=group_size, symmetric=symmetric)
    if act_order:
        w = w.replace(perm=torch.randperm(K, generator=generator))
    if two_level:
        largest = w.scales.amax(-1, keepdim=True)
        w = w.replace(scales=(w.scales / largest * 127).round().clamp(1).to(torch.int8), outer=largest / 127)
    return w.to(device)


def _matmul(M, N, K, format, group_size=None, *, bias=False, static=False, cut=None, activation=None, ends=None, **options):
    """M: the leading sizes of x. cut: (rows, columns) of the whole weight that are used, as a view. ends: offs."""

    def build(f):
        w = weight(*(cut or (N, K)), format, group_size, device=f.device, **options)
        w = w[:N, :K] if cut else w
        kwargs = {"bias": f.param(N) if ends is None else f.param(len(ends), N // len(ends))} if bias else {}
        if ends is not None:
            kwargs["offs"] = torch.tensor(ends, dtype=torch.int32, device=f.device)
        if activation:
            kwargs["activation"] = activation
        if static:
            kwargs["activation_scale"] = 0.05
        return (f.io(*M, K), w), kwargs

    return build


QUANT_MATMUL = tuple(
    Sample(name, _matmul(*args, **options))
    for name, args, options in (
        ("int4_groups", ((5,), 17, 100, "int4", 32), {"bias": True}),
        ("int4_zeros", ((2, 3), 100, 50, "int4", 16), {"symmetric": False}),
        ("int3_short_group", ((1,), 19, 37, "int3", 11), {"bias": True, "symmetric": False}),
        ("int5_act_order", ((3,), 20, 48, "int5", 16), {"act_order": True}),
        ("binary", ((2,), 18, 130, "int1", 64), {}),
        ("ternary", ((7,), 21, 40, "ternary", "tensor"), {"bias": True}),
        ("nf4", ((2,), 24, 130, "nf4", 64), {}),
        ("nvfp4", ((2,), 17, 40, "nvfp4"), {"bias": True}),
        ("two_level", ((6,), 10, 64, "int4", 16), {"two_level": True}),
        ("view", ((3,), 9, 44, "int4", 32), {"cut": (30, 100)}),
        ("w8a8", ((9,), 20, 70, "int8"), {"activation": "int8", "bias": True}),
        ("w4a8", ((2, 2), 20, 100, "int4", 32), {"activation": "int8", "symmetric": False}),
        ("w4a4_static", ((3,), 11, 64, "int4", 32), {"activation": "int4", "static": True}),
        ("experts", ((11,), 3 * 18, 70, "int4", 32), {"ends": (4, 4, 9), "bias": True, "symmetric": False}),
        ("experts_w8a8", ((8,), 2 * 17, 40, "int8"), {"ends": (3, 8), "activation": "int8"}),
        ("fp8_fp8", ((3,), 11, 40, "fp8_e4m3"), {"activation": "fp8"}),
    )
)

SPECS = {
    "quant_matmul": Spec(
        QUANT_MATMUL,
        dense_oracle=True,
        free_rank=True,
        grows_by_rows=True,
        straight_through=("w8a8", "w4a8", "w4a4_static", "experts_w8a8", "fp8_fp8"),
    )
}
