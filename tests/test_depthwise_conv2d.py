"""What is particular to the depthwise convolutions: both methods on every geometry, NaN through an FFT, the pieces."""

import itertools

import pytest
import torch
from conftest import INTERPRET, at_levels
from oracles import randn

import scalekern
from scalekern import _native, reference
from scalekern.ops import _depthwise
from scalekern.reference.depthwise_conv2d import pair
from scalekern.testing import TOLERANCE, assert_close, error

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests Triton alone")
SHAPES = [((9, 11), (7, 7)), ((5, 6), (13, 15)), ((14, 3), (4, 9)), ((1, 8), (1, 5)), ((12, 12), (2, 3))]


def options_of(op):
    strides, dilations = (1, (2, 3)), (1, (3, 1))
    if op == "depthwise_conv2d":
        paddings = ("same", "valid", 2, (9, 0))
        return [dict(padding=p, stride=s, dilation=d) for p, s, d in itertools.product(paddings, strides, dilations)]
    paddings = ((0, 0), (1, 0), (1, 1), (0, 2))
    more = [dict(stride=(2, 3), output_padding=(1, 2), padding=(1, 0))]
    return [dict(padding=p, stride=s, dilation=d) for p, s, d in itertools.product(paddings, strides, dilations)] + more


def with_gradients(function, leaves, dout=None, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, **options)
    dout = randn(*out.shape, seed=7).to(out.dtype) if dout is None else dout
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("method", ["direct", "fft"])
@pytest.mark.parametrize("op", ["depthwise_conv2d", "depthwise_conv_transpose2d"])
def test_every_geometry(op, method):
    tried = 0
    for (size, taps), options in itertools.product(SHAPES, options_of(op)):
        leaves = randn(2, 3, *size), randn(3, *taps, seed=1), randn(3, seed=2)
        try:
            found = with_gradients(getattr(scalekern, op), leaves, method=method, **options)
        except ValueError as refused:  # and torch, too, finds nothing to compute
            assert "must be as large" in str(refused) or "must leave something" in str(refused)
            with pytest.raises(RuntimeError):
                getattr(reference, op)(*leaves, **options)
            continue
        tried += 1
        for a, e in zip(found, with_gradients(getattr(reference, op), leaves, **options)):
            assert (a - e).norm() <= 1e-13 * (1 + e.norm()), f"{size} {taps} {options}"  # some gradients are zero
    assert tried > 50


# Image, filter, dilation: over all vectors of a tile and the last partly filled, several tiles, bands and rows of
# taps; a filter of one tap, one beyond the image; channels fewer than threads and more.
TAP_BY_TAP = [
    ((1, 1, 70, 131), (5, 9), 1), ((2, 9, 21, 67), (13, 13), 1), ((1, 1, 400, 300), (9, 2), (3, 2)),
    ((1, 5, 33, 16), (1, 1), 1), ((2, 3, 6, 40), (15, 7), (1, 2)), ((1, 2, 9, 50), (4, 6), (11, 1)),
    ((1, 6, 100, 36), (3, 10), (2, 1)),
]  # fmt: skip


@pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@at_levels("baseline", "avx2")
def test_tap_by_tap(dtype):
    # float32: 1.2e-6 at the level without FMA, 9.4e-7 and 5.4e-7 at those above
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, TOLERANCE[dtype])
    assert _depthwise._native_on_cpu()
    for size, taps, dilation in TAP_BY_TAP:
        for padding in ("same", (1, 30)):
            leaves = (t.to(dtype) for t in (randn(*size), randn(size[1], *taps, seed=1), randn(size[1], seed=2)))
            leaves, options = list(leaves), dict(padding=padding, dilation=dilation)
            if padding != "same" and (taps[0] - 1) * pair(dilation)[0] >= size[2] + 2:
                continue  # nothing to compute
            dout = randn(*reference.depthwise_conv2d(*leaves, **options).shape, seed=7).to(dtype)
            found = with_gradients(scalekern.depthwise_conv2d, leaves, dout, method="direct", **options)
            wide = [t.double() for t in leaves]
            for a, e in zip(found, with_gradients(reference.depthwise_conv2d, wide, dout.double(), **options)):
                assert a.dtype == dtype
                assert_close(a, e, tolerance=tolerance, what=f"{size} {taps} {dilation} {padding}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_filters_in_every_dtype(dtype):
    wide = dtype if dtype == torch.float64 else torch.float32
    x, w = randn(3, 5, 24, 30).to(dtype), randn(5, 31, 51, seed=1).to(wide)
    found = with_gradients(scalekern.depthwise_conv2d, (x, w))
    dout = randn(*x.shape, seed=7).to(dtype).double()
    expected = with_gradients(scalekern.depthwise_conv2d, (x.double(), w.double()), dout, method="direct")
    for a, e in zip(found, expected):
        assert a.dtype == (w.dtype if a.shape == w.shape else dtype)
        assert_close(a, e, tolerance={torch.float32: 1e-6}.get(dtype, TOLERANCE[dtype]))
        assert error(a.roll(1, -1), e) > 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("into", ["x", "w"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_where_they_belong(into, value):
    x, w = randn(2, 3, 9, 10), randn(3, 5, 5, seed=1)
    {"x": x, "w": w}[into].view(-1)[33] = value
    for a, e in zip(*(with_gradients(scalekern.depthwise_conv2d, (x, w), method=m) for m in ("fft", "direct"))):
        assert torch.equal(a.isfinite(), e.isfinite()) and torch.equal(a.isnan(), e.isnan())
        assert_close(a[e.isfinite()], e[e.isfinite()], tolerance=1e-12)


@pytest.mark.parametrize("method", ["direct", "fft"])
def test_outputs_have_the_strides_that_a_compiled_graph_expects(method):
    """Contiguous ones: torch's convolutions answer in channels-last what came in channels-last, x or the gradient."""
    x, dout = (randn(2, 3, 9, 11, seed=i).float().contiguous(memory_format=torch.channels_last) for i in range(2))
    w = randn(7, 5, 3, seed=1).float().permute(2, 1, 0)
    options = {"conv2d": ([3, 3, 2, 2], [1, 1], [1, 1]), "conv_transpose2d": ([1, 1], [2, 3], [0, 0], [1, 1])}
    for name, more in options.items():
        forward, backward = (getattr(torch.ops.scalekern, f"depthwise_{name}_{d}") for d in ("fwd", "bwd"))
        for inputs in ((x, w), (x.contiguous(), w.contiguous())):
            assert forward(*inputs, None, *more, method).is_contiguous()
            assert all(t.is_contiguous() for t in backward(dout, *inputs, None, *more, method))


@pytest.mark.parametrize("images", [1, 2, 7])
def test_pieces_of_any_size_give_the_same(images, monkeypatch):
    leaves = randn(3, 4, 8, 9), randn(4, 11, 3, seed=1)
    whole = with_gradients(scalekern.depthwise_conv2d, leaves, method="fft")
    g = _depthwise.conv_geometry((3, 4, 8, 9), (4, 11, 3), "same", (1, 1), (1, 1))
    monkeypatch.setitem(_depthwise.PIECE_BYTES, "cpu", images * 8 * g.period[0] * g.period[1])
    for a, e in zip(with_gradients(scalekern.depthwise_conv2d, leaves, method="fft"), whole):
        assert_close(a, e, tolerance=1e-14)


def test_memory_beyond_the_output_is_a_piece():
    """Of the spectra nothing of the size of the whole batch exists at any time."""
    x, w = torch.randn(8, 256, 40, 40), torch.randn(256, 11, 11)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_complex():
                largest = max(largest, out.numel() * out.element_size())
            return out

    with Watch():
        _depthwise.conv_fwd(x, w, None, (5, 5, 5, 5), (1, 1), (1, 1), "fft")
    assert 0 < largest <= 1.2 * _depthwise.PIECE_BYTES["cpu"] < x.numel() * 4 / 2


@pytest.mark.parametrize("n, even, good", [(1, 0, 1), (7, 0, 8), (71, 1, 72), (75, 0, 75), (75, 1, 80)])
def test_good_sizes(n, even, good):
    assert _depthwise.good_size(n, even) == good


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: scalekern.depthwise_conv2d(x, w, padding="full"),
        lambda x, w: scalekern.depthwise_conv2d(x, w, padding=-1),
        lambda x, w: scalekern.depthwise_conv2d(x, w, stride=0),
        lambda x, w: scalekern.depthwise_conv2d(x, w, dilation=(1, 2, 3)),
        lambda x, w: scalekern.depthwise_conv2d(x, w, method="winograd"),
        lambda x, w: scalekern.depthwise_conv2d(x, w, padding="valid", dilation=9),
        lambda x, w: scalekern.depthwise_conv_transpose2d(x, w, output_padding=1),
        lambda x, w: scalekern.depthwise_conv_transpose2d(x, w, padding=9),
        lambda x, w: scalekern.depthwise_conv_transpose2d(x, w, padding="same"),
    ],
)
def test_bad_options_are_named(call):
    with pytest.raises((ValueError, TypeError), match=r"^depthwise_conv\w*2d: .* must .*, got"):
        call(torch.zeros(1, 2, 8, 8), torch.zeros(2, 3, 3))
