"""Sample inputs of the Hadamard transforms (quant_matmul family)."""

from scalekern.testing import Sample, Spec


def _rows(*shape, **options):
    """x (..., n); the scale tells a transform from its repetition."""
    return lambda f: ((f.io(*shape), 0.7 * shape[-1] ** -0.5), options)


SPECS = {
    "hadamard_transform": Spec(
        (
            Sample("power_of_two", _rows(3, 2, 16)),
            Sample("order_20", _rows(2, 3, 20, transposed=True)),
            Sample("order_28", _rows(2, 2, 56)),
            Sample("order_40", _rows(2, 80, transposed=True)),
            Sample("order_12_quarot", _rows(3, 96, matrices="quarot")),
            Sample("padded", _rows(2, 3, 13)),
            Sample("padded_order", _rows(2, 50, order=12, matrices="quarot", transposed=True)),
            Sample("several_passes", _rows(3, 1024)),
        ),
        dense_oracle=True,
        free_rank=True,
        linear=True,
    ),
    "fused_hadamard_quantize": Spec(
        (
            Sample("int8", _rows(3, 2, 64)),
            Sample("int4_groups", _rows(2, 3, 224, bits=4, group_size=16)),
            Sample("int3_padded", _rows(3, 100, bits=3, order=28, matrices="quarot")),
            Sample("long", _rows(2, 1024, group_size=256)),
        ),
        inference=True,
        dense_oracle=True,
        free_rank=True,
        integers_off=0.02,
    ),
}
