"""What is particular to cross_scan and cross_merge: tiles' edges, layouts, threads, each as the other's adjoint."""

import pytest
import torch
from conftest import INTERPRET, kernel_places

import scalekern
from scalekern import reference
from scalekern.testing import assert_close

ALL = (0, 1, 2, 3)
DTYPES = (torch.float32,) if INTERPRET else (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZES = ((70, 37),) if INTERPRET else ((70, 37), (64, 32), (33, 1), (1, 129))


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def layouts(x):
    """The same values: as they are, channels last, columns next to each other, in a larger tensor."""
    yield x
    if not INTERPRET:
        yield x.transpose(1, 3).contiguous().transpose(1, 3)
        yield x.transpose(2, 3).contiguous().transpose(2, 3)
        yield torch.full((*x.shape[:3], 2 * x.shape[3]), float("nan"), dtype=x.dtype)[..., ::2].copy_(x)


@pytest.mark.parametrize("grouped", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", kernel_places())
def test_sizes_and_layouts(dtype, grouped, place):
    """A scan moves bits; the sum of a merge is rounded once."""
    device, backend = place
    for size in SIZES:
        x = normal(1, 4, *size, dtype=dtype).to(device)
        y = normal(1, 4, 1 if grouped else 2, size[0] * size[1], dtype=dtype).to(device)
        lines = reference.cross_scan(x, ALL, grouped=grouped)
        image = reference.cross_merge(y.double(), size, ALL, grouped=grouped)
        with scalekern.backend(backend):
            for given in layouts(x):
                assert torch.equal(scalekern.cross_scan(given, ALL, grouped=grouped), lines)
            for given in layouts(y):
                out = scalekern.cross_merge(given, size, ALL, grouped=grouped)
                assert_close(out, image, tolerance={torch.float64: 1e-15}.get(dtype, torch.finfo(dtype).eps / 2))


def test_each_is_the_others_adjoint():
    """<cross_scan(x), y> = <x, cross_merge(y)>."""
    for directions, grouped in ((ALL, False), (ALL, True), ((3, 0), False), ((1,), True)):
        x = normal(2, 4, 5, 7)
        lines = scalekern.cross_scan(x, directions, grouped=grouped)
        y = normal(*lines.shape)
        image = scalekern.cross_merge(y, (5, 7), directions, grouped=grouped)
        assert torch.allclose((lines * y).sum(), (x * image).sum(), rtol=1e-13)


@pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, not threads")
def test_threads_change_no_bit():
    x, y, threads = normal(1, 1, 70, 37), normal(1, 4, 1, 70 * 37), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append((scalekern.cross_scan(x), scalekern.cross_merge(y, (70, 37))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: scalekern.cross_scan(x, (0, 4)),
        lambda x: scalekern.cross_scan(x, (1, 1)),
        lambda x: scalekern.cross_scan(x, ()),
        lambda x: scalekern.cross_scan(x, (0.0, 1.0)),
        lambda x: scalekern.cross_scan(x, (0, 1), grouped=True),
        lambda x: scalekern.cross_merge(x, (2, 2), (0, 1)),
        lambda x: scalekern.cross_merge(x, 6, (0, 1)),
    ],
)
def test_bad_options_are_named(call):
    with pytest.raises(ValueError, match=r"^cross_(scan|merge): .* must .*, got"):
        call(torch.zeros(1, 3, 2, 3))
