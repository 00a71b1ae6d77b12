"""One decoding token of a Mamba block: the native step crosses the edges of its products, at every level of the CPU."""

import pytest
import torch
from conftest import INTERPRET, at_levels

import scalekern
from scalekern.testing import assert_close

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")
# Rows of four at a time, vectors of 4 to 16 lanes, two to a chain: M, D, N, R on both sides of each.
SIZES = [
    (1, 3, 2, 1, 1), (1, 32, 16, 5, 2), (1, 33, 47, 16, 3), (2, 70, 35, 4, 17), (3, 129, 66, 7, 48), (5, 97, 81, 16, 33)
]  # fmt: skip
# bfloat16: xz, the projections, the step size (an exponent of the decay) and y are rounded between the parts.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-2}


def step(B, M, D, N, R, dtype, wider=0):
    """Arguments of `mamba_update`; the weights are rows of matrices `wider` columns wider."""
    torch.manual_seed(B * M + D)
    param = torch.float64 if dtype == torch.float64 else torch.float32

    def weight(rows, columns):
        return (torch.randn(rows, columns + wider) * columns**-0.5).to(dtype)[:, :columns]

    args = (
        torch.randn(B, M).to(dtype), torch.randn(B, D, 4).to(dtype), torch.randn(B, D, N).to(param),
        weight(2 * D, M), torch.randn(D, 4, dtype=param), torch.randn(D, dtype=param), weight(R + 2 * N, D),
        weight(D, R), weight(M, D), torch.randn(D, N, dtype=param) * 0.5, torch.randn(D, dtype=param),
        torch.randn(D, dtype=param),
    )  # fmt: skip
    options = dict(in_proj_bias=torch.randn(2 * D).to(dtype), norm_weight=torch.randn(M).to(dtype))
    return args, options


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("wider", [0, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
@at_levels("baseline", "avx2")
def test_the_edges_of_its_products(sizes, dtype, wider):
    args, options = step(*sizes, dtype, wider)
    exact = [double(a.clone()) for a in args]
    want = scalekern.reference.mamba_update(*exact, **{k: double(v) for k, v in options.items()})
    found = scalekern.mamba_update(*args, **options)
    for name, a, b in zip(("out", "conv_state", "ssm_state"), (found, *args[1:3]), (want, *exact[1:3])):
        assert_close(a.double(), b, tolerance=TOLERANCE[dtype], what=name)


@pytest.mark.parametrize("name, value", [("norm_eps", "x"), ("norm_eps", None), ("rms_eps", "x")])
def test_an_epsilon_is_a_number(name, value):
    args, options = step(1, 3, 2, 1, 1, torch.float32)
    with pytest.raises(TypeError, match=f"^mamba_update: {name} must be a number, got {value!r}$"):
        scalekern.mamba_update(*args, **options, **{name: value})
