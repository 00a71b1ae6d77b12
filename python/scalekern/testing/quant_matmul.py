"""Sample inputs of the quant_matmul family.

Shape letters: M tokens, N outputs, K inputs.
"""

import torch

from scalekern.quant import quantize
from scalekern.testing import Sample, Spec


def weight(N, K, format, group_size=128, *, symmetric=True, act_order=False, two_level=False, device="cpu"):
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


def _matmul(
    M, N, K, format, group_size=None, *, bias=False, static=False, cut=None, activation=None, ends=None, **options
):
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



def _mamba_update(
    B, M, D, N, R, W, K, formats, *, biases=False, skip=True, signs=(), activation=None, size=1.0,
    **options
):  # fmt: skip
    """K tokens of the convolution's window; formats (name, group size) of in_proj, x_proj, out_proj, delta_proj; size
    of the inputs: float16's rounding of a step size's input is one of the decay's exponent."""

    def build(f):
        shapes = (2 * D, M), (R + 2 * N, D), (M, D), (D, R)
        in_proj, x_proj, out_proj, *delta = (
            weight(*shape, *fmt, device=f.device, **options) for shape, fmt in zip(shapes, formats)
        )
        args = (
            f.io(B, M, scale=size), f.io(B, D, K, scale=size), f.param(B, D, N), in_proj, f.param(D, 1, W, scale=0.5),
            f.param(D) if biases else None, x_proj, delta[0] if delta else f.io(D, R, scale=R**-0.5), out_proj,
            f.param(D, N, scale=0.5), f.param(D) if skip else None, f.param(D, scale=0.3) if skip else None,
        )  # fmt: skip
        given = dict(in_proj_bias=f.param(2 * D), out_proj_bias=f.param(M)) if biases else {}
        for name in signs:
            columns = {"in_proj": M, "delta_proj": R}.get(name, D)
            given[f"{name}_signs"] = f.integers([1 - 2 * (k % 3 % 2) for k in range(columns)], torch.int8)
        return args, dict(activation=activation, **given)

    return build


# "large_batch", and act-order by itself, take the parts one by one.
QUANTIZED_MAMBA_UPDATE = tuple(
    Sample(name, _mamba_update(*args, **options))
    for name, args, options in (
        ("int4", (2, 35, 37, 16, 3, 4, 4, [("int4", 16)] * 3), {"biases": True, "symmetric": False, "size": 0.5}),
        ("rotated", (1, 24, 40, 5, 4, 3, 2, [("int8", 16), ("int3", 16), ("int4", 8), ("int4", 4)]),
         {"signs": ("in_proj", "x_proj", "out_proj", "delta_proj")}),
        ("w4a8", (3, 33, 17, 3, 2, 2, 3, [("int4", 16), ("int8", None), ("int2", 16)]),
         {"activation": "int8", "skip": False}),
        ("mixed", (5, 16, 18, 4, 2, 4, 3, [("nf4", 16), ("mxfp4",), ("fp8_e4m3", 8), ("int1", 16)]), {}),
        ("large_batch", (11, 12, 21, 3, 2, 4, 3, [("int4", 8)] * 3), {"act_order": True}),
    )
)

SPECS = {
    "quantized_mamba_update": Spec(QUANTIZED_MAMBA_UPDATE, inplace=(1, 2)),
    "quant_matmul": Spec(
        QUANT_MATMUL,
        dense_oracle=True,
        free_rank=True,
        grows_by_rows=True,
        straight_through=("w8a8", "w4a8", "w4a4_static", "experts_w8a8", "fp8_fp8"),
    )
}
