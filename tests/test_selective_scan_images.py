"""selective_scan of images: read row by row, transposed ones column by column, in place.

Shape letters: B batch, D channels, H x W image, N states, G groups of B and C.
"""

import pytest
import torch
from conftest import at_levels, kernel_places

import scalekern
from scalekern import _env, _native
from scalekern.testing import error

needs_cpu = pytest.mark.skipif(
    _native.load("cpu") is not None or _env.triton_interpret(),
    reason="of the CPU library, which was not built or which the other test process tests",
)
TIMES = ("u", "delta", "z")
# (B, D, H, W, N), which of the kernels it takes: lanes along channels, lines longer and shorter than 16; along states,
# time split among threads; one row; one column.
SHAPES = [(2, 18, 21, 19, 4), (1, 33, 9, 5, 3), (1, 1, 7, 11, 20), (1, 2, 53, 47, 3), (2, 3, 1, 70, 4), (1, 17, 70, 1, 2)]
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "channels": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
    "channels of columns": lambda x: x.movedim(-3, -1).transpose(-3, -2).contiguous().transpose(-3, -2).movedim(-1, -3),
    "every second": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
}


def make(shape, dtype, layout, *, complex_A=False, constant=False, groups=None, rows=None, seed=0):
    B, D, H, W, N = shape
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    t = {name: LAYOUTS[layout](normal(B, D, H, W).to(dtype)) for name in TIMES}
    A = -normal(D, N).abs()
    t["A"] = (torch.complex(A, normal(D, N)) if complex_A else A).to(wide.to_complex() if complex_A else wide)
    for name in "BC":
        m = normal(D, N) if constant else LAYOUTS[layout](normal(*((B,) if groups is None else (B, groups)), N, H, W))
        t[name] = torch.complex(m, m.flip(-1)).to(t["A"].dtype) if complex_A else m.to(dtype)
    t["D"], t["delta_bias"] = normal(D).to(wide), normal(D).to(wide)
    t["initial_state"] = normal(rows or B, D, N).to(t["A"].dtype)
    return t


def with_gradients(tensors, flat, **options):
    """The scan of the images, or of copies of them as lines, and all gradients, as images."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    given = {n: x.flatten(-2).contiguous() if flat and x.dim() > 3 else x for n, x in leaves.items()}
    out, last = scalekern.selective_scan(**given, delta_softplus=True, return_last_state=True, **options)
    out = out.view(tensors["u"].shape) if flat else out
    g = torch.Generator().manual_seed(1)
    loss = sum((x.real * torch.randn(x.shape, generator=g).to(x.device)).sum() for x in (out, last))
    return [out, last, *torch.autograd.grad(loss, leaves.values())]


def check(tensors, tolerance, **options):
    found, expected = (with_gradients(tensors, flat, **options) for flat in (False, True))
    for name, a, b in zip(("out", "last_state", *tensors), found, expected):
        assert a.shape == b.shape
        assert error(a, b) <= tolerance, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", kernel_places())
def test_an_image_is_its_lines(shape, layout, place):
    """The same numbers in the same order: only sums over blocks of channels may be cut elsewhere."""
    device, backend = place
    tensors = {name: x.to(device) for name, x in make(shape, torch.float64, layout).items()}
    with scalekern.backend(backend):
        for reverse in (False, True):
            check(tensors, 1e-14, reverse=reverse)


@needs_cpu
@at_levels("baseline", "avx2", "avx512")
def test_every_instruction_set():
    """Lines that no vector divides, in the storage types that are read in different ways."""
    for layout in LAYOUTS:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
            check(make((1, 18, 13, 21, 5), dtype, layout, groups=2), tolerance)
            check(make((1, 2, 13, 21, 20), dtype, layout), tolerance, reverse=True)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_scratch_memory_held_reaches_nothing(layout):
    """Lanes beyond the last pixel of a tile, where its last line begins inside a vector: NaN, as conftest.py has it."""
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        for size in ((13, 21), (11, 19), (7, 23)):
            for reverse in (False, True):
                check(make((1, 1, *size, 20), dtype, layout), tolerance, reverse=reverse)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_complex_constant_and_packed(layout):
    for complex_A, constant in ((True, False), (True, True), (False, True)):
        check(make((2, 5, 9, 11, 3), torch.float64, layout, complex_A=complex_A, constant=constant), 1e-14)
    cuts = torch.tensor([0, 1, 30, 30, 99])
    for reverse in (False, True):
        check(make((1, 5, 9, 11, 3), torch.float64, layout, rows=4), 1e-14, cu_seqlens=cuts, reverse=reverse)


@needs_cpu
def test_results_lie_as_the_image_does():
    """What is transposed comes back transposed: no copy on either way."""
    for layout in ("rows", "columns", "channels", "channels of columns"):
        tensors = make((2, 5, 4, 6, 3), torch.float32, layout)
        image = tensors["u"].detach().requires_grad_()
        out = scalekern.selective_scan(**{**tensors, "u": image})
        out.sum().backward()
        assert out.stride() == image.stride() == image.grad.stride()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("delta", lambda x: x.flatten(2), r"delta must have 4 dimensions, got shape \(2, 5, 24\)"),
        ("z", lambda x: x.transpose(2, 3), r"z must have shape \(2, 5, 4, 6\), got \(2, 5, 6, 4\)"),
        ("B", lambda x: x.flatten(2), r"B must have .*4.* dimensions, got shape \(2, 3, 24\)"),
        ("C", lambda x: x[..., :5], r"C must have shape \(2, 3, 4, 6\), got \(2, 3, 4, 5\)"),
        ("u", lambda x: x[..., None], r"u must have .*3 or 4 dimensions, got shape \(2, 5, 4, 6, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(name, change, message):
    tensors = make((2, 5, 4, 6, 3), torch.float32, "rows")
    with pytest.raises(ValueError, match="^selective_scan: " + message):
        scalekern.selective_scan(**{**tensors, name: change(tensors[name])})
