"""What is particular to the wavelet ops: the way back, every filter and border, what a NaN reaches."""

import pytest
import torch
from conftest import INTERPRET
from oracles import randn

import scalekern
from scalekern import reference
from scalekern.reference.dwt2d import MODES, WAVELETS
from scalekern.testing import TOLERANCE, assert_close, error

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests Triton alone")
SIZES = [(1, 1), (7, 5), (16, 33), (2, 30)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_filter_and_border_both_ways(wavelet, mode):
    for size in SIZES:
        x = randn(1, 2, *size).requires_grad_()
        parts, expected = scalekern.dwt2d(x, wavelet, 2, mode), reference.dwt2d(x, wavelet, 2, mode)
        weights = [randn(*p.shape, seed=i) for i, p in enumerate(expected)]
        for a, e in zip(parts, expected):
            assert torch.allclose(a, e, atol=1e-13)  # the details of a single pixel are zero
        (a,), (e,) = (torch.autograd.grad(p, x, weights) for p in (parts, expected))
        assert_close(a, e, tolerance=1e-13)
        options = dict(wavelet=wavelet, mode=mode, size=size)
        parts = [p.detach().requires_grad_() for p in expected]
        back, wanted = scalekern.idwt2d(*parts, **options), reference.idwt2d(*parts, **options)
        assert_close(back, wanted, tolerance=1e-13)
        assert_close(back, x, tolerance=1e-12)
        dout = randn(*size, seed=9).expand(1, 2, *size)
        for a, e in zip(torch.autograd.grad(back, parts, dout), torch.autograd.grad(wanted, parts, dout)):
            assert torch.allclose(a, e, atol=1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_perfect_reconstruction_in_every_dtype(dtype):
    x = randn(2, 3, 37, 50).to(dtype)
    parts = scalekern.dwt2d(x, "bior4.4", 3)
    assert all(p.dtype == dtype for p in parts) and len(parts) == 4
    back = scalekern.idwt2d(*parts, wavelet="bior4.4", size=(37, 50))
    assert_close(back, x, tolerance={torch.float32: 1e-6}.get(dtype, TOLERANCE[dtype]))
    lost = [torch.zeros_like(parts[0]), *parts[1:]]
    assert error(scalekern.idwt2d(*lost, wavelet="bior4.4", size=(37, 50)), x) > 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("function", ["dwt2d", "idwt2d"])
def test_channels_last_and_gradients_in_channels_last(function, wavelet):
    """torch.cat and convolutions hand that format on, to where axes are joined."""
    last = lambda t: t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    x = randn(2, 3, 9, 11)
    inputs = [x] if function == "dwt2d" else scalekern.dwt2d(x, wavelet, 2)
    options = dict(wavelet=wavelet) | (dict(levels=2) if function == "dwt2d" else dict(size=(9, 11)))

    def run(f, laid_out):
        leaves = [laid_out(t.detach()).requires_grad_() for t in inputs]
        outs = f(*leaves, **options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        weights = [laid_out(randn(*o.shape, seed=i)) for i, o in enumerate(outs)]
        return *outs, *torch.autograd.grad(outs, leaves, weights)

    expected = run(getattr(reference, function), lambda t: t.contiguous())
    for a, e in zip(run(getattr(scalekern, function), last), expected):
        assert a.is_contiguous()
        assert_close(a, e, tolerance=1e-13)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_a_nan_reaches_what_its_pixel_reaches(wavelet):
    x, spot = randn(1, 2, 12, 14), torch.zeros(1, 2, 12, 14, dtype=torch.float64)
    x[0, 1, 5, 6] = float("nan")
    spot[0, 1, 5, 6] = 1
    for part, reached in zip(scalekern.dwt2d(x, wavelet), reference.dwt2d(spot, wavelet)):
        assert torch.equal(part.isnan(), reached != 0) and part.isnan().any()
    parts = [p.nan_to_num() for p in scalekern.dwt2d(x, wavelet)]
    spots = [torch.zeros_like(p) for p in parts]
    parts[1][0, 1, 2, 3, 3], spots[1][0, 1, 2, 3, 3] = float("nan"), 1
    back, reached = scalekern.idwt2d(*parts, wavelet=wavelet), reference.idwt2d(*spots, wavelet=wavelet)
    assert back.isnan().any() and not (back.isnan() & (reached == 0)).any(1).all()
    assert torch.equal(back[:, 0], scalekern.idwt2d(*(p[:, :1] for p in parts), wavelet=wavelet)[:, 0])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: scalekern.dwt2d(x, "db3"),
        lambda x, y: scalekern.dwt2d(x, levels=0),
        lambda x, y: scalekern.dwt2d(x, mode="reflect"),
        lambda x, y: scalekern.idwt2d(x),
        lambda x, y: scalekern.idwt2d(x, y, size=(17, 16)),
        lambda x, y: scalekern.idwt2d(x, y, wavelet="db2", size=3),
        lambda x, y: scalekern.idwt2d(x, y, size=(16.0, 16)),
        lambda x, y: scalekern.idwt2d(x, y, y),
    ],
)
def test_bad_options_are_named(call):
    with pytest.raises((ValueError, TypeError), match=r"^i?dwt2d: .* must .*, got"):
        call(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 8, 8))
