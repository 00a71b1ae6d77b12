"""Sample inputs of the readings of images (selective_scan family).

Shape letters: B batch, D channels, H x W image, K directions, P channels of a direction, N states, R rank of the step.
"""

from scalekern.testing import Sample, Spec


def _image(B, D, H, W, *directions, **options):
    return lambda f: ((f.io(B, D, H, W), directions), options)


def _lines(B, P, H, W, *directions, **options):
    return lambda f: ((f.io(B, len(directions), P, H * W), (H, W), directions), options)


def _scans(B, P, H, W, N, R, *directions, grouped=False, skip=True):
    def build(f):
        K = len(directions)
        args = (
            f.io(B, K * P if grouped else P, H, W), f.io(K, R + 2 * N, P, scale=P**-0.5),
            f.io(K, P, R, scale=0.3 * R**-0.5), f.param(K, P, scale=0.3), -f.positive(K * P, N),
            f.param(K * P) if skip else None,
        )  # fmt: skip
        return args, {"directions": directions, "grouped": grouped}

    return build


SPECS = {
    "cross_scan": Spec(
        (
            Sample("all", _image(2, 3, 5, 7, 0, 1, 2, 3)),
            Sample("grouped", _image(2, 8, 6, 5, 0, 1, 2, 3, grouped=True)),
            Sample("two_columns", _image(2, 1, 3, 34, 3, 1)),
            Sample("one_row", _image(2, 2, 1, 6, 2, grouped=True)),
            Sample("beyond_a_tile", _image(1, 2, 35, 3, 3, 0)),
        ),
        linear=True,
        parameters_only=True,  # moves numbers: autocast has nothing to cast
        grows_by_rows=True,
    ),
    "cross_merge": Spec(
        (
            Sample("all", _lines(2, 3, 5, 7, 0, 1, 2, 3)),
            Sample("grouped", _lines(2, 2, 6, 5, 0, 1, 2, 3, grouped=True)),
            Sample("two_columns", _lines(2, 1, 3, 34, 3, 1)),
            Sample("one_row", _lines(2, 2, 1, 6, 2)),
            Sample("beyond_a_tile", _lines(1, 2, 35, 3, 3, 0)),
        ),
        linear=True,
        parameters_only=True,
        grows_by_rows=True,
    ),
    "cross_selective_scan": Spec(
        (
            Sample("both_ways", _scans(3, 5, 4, 7, 6, 8, 0, 3)),  # sizes that differ: equal ones become one symbol
            Sample("grouped", _scans(2, 3, 5, 8, 1, 1, 0, 1, 2, 3, grouped=True)),
            Sample("columns", _scans(1, 4, 7, 3, 2, 2, 3, 1, skip=False)),
        ),
        gradient_factor=6,  # two products, a scan and a sum, each rounded to the io dtype
        grows_by_rows=True,
        reorders=True,  # the sum of the directions
        through="selective_scan",
    ),
}
