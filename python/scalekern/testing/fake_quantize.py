"""Sample inputs of fake_quantize.

Shape letters: N rows, K columns, G groups.
"""

from scalekern.testing import Sample, Spec


def _sample(x, scale, zero=None, **options):
    """scale, zero: shapes. Steps are such that some of x lies beyond the range, on both sides."""

    def build(f):
        half = 1 << (options.get("bits", 8) - 1)
        size = 1.5 / half
        kwargs = dict(options)
        args = (f.io(*x), f.positive(*scale, low=0.5 * size, high=size))
        return (*args, f.param(*zero) * 0.3 * half + half) if zero else args, kwargs

    return build


FAKE_QUANTIZE = (
    Sample("rows", _sample((9, 35), (9, 1), bits=4)),
    Sample("groups", _sample((2, 5, 38), (2, 5, 5), (2, 5, 5), bits=3, group_size=8)),
    Sample("columns", _sample((7, 18), (18,), (7, 1), bits=8, grad_factor=0.25)),
    Sample("one", _sample((6, 23), (1,), (6, 6), bits=2, group_size=4, grad_factor=0.1)),
)

SPECS = {
    "fake_quantize": Spec(
        FAKE_QUANTIZE,
        parameters_only=True,
        free_rank=True,
        grows_by_rows=True,
        straight_through=tuple(s.name for s in FAKE_QUANTIZE),
    )
}
