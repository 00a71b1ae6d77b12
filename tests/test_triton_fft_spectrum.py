"""Spectra made before the call, of the Triton FFT convolution's filters, by the interpreter."""

import contextlib
import dataclasses
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import scalekern  # noqa: E402
from scalekern.triton_kernels import fft_conv_long, fft_conv_spectrum, fft_device, fft_filters  # noqa: E402
from scalekern.triton_kernels import fft_long_device, fft_long_filters  # noqa: E402
from test_triton_fft_conv import BF16, F16, F32, MODES, backward, case, check, error, forward, randn  # noqa: E402

OPTIONS = ("", "k_reverse skip bias pregate postgate mask")


@pytest.fixture(params=("fused", "long"))
def kernels(request, monkeypatch):
    """The launchers of either form; the long one beyond 256 points, with rows of 16 x 16."""
    if request.param == "long":
        size = lambda points, wide: {"N0": -(-points // 256), "N1": 16, "N2": 16, "BLOCK0": 16, "C": 128}
        monkeypatch.setattr(fft_long_device, "sizes", size)
        monkeypatch.setattr(fft_device, "limit", lambda *_: 256)
    return fft_conv_long


@pytest.fixture
def made(monkeypatch):
    """How often filters were transformed."""
    made = []
    for module in (fft_filters, fft_long_filters):
        plan = module.plan_spectrum
        monkeypatch.setattr(module, "plan_spectrum", lambda *args, plan=plan: made.append(1) or plan(*args))
    return made


def values_of(args, dtype=None):
    """A spectrum of the filters of a call."""
    u, k, k_reverse, mode = args[0], args[1], args[2], args[8]
    call = k, k_reverse, u.shape[2], mode, dtype or u.dtype
    assert fft_conv_spectrum.supports(*call) is None
    values = fft_conv_spectrum.allocate(*call).fill_(float("nan"))
    fft_conv_spectrum.fft_conv_spectrum(values, *call)
    return values


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "all"))
@pytest.mark.parametrize("mode, dtype", tuple(zip(MODES, (F32, F16, BF16, F32))))
def test_a_given_spectrum_is_the_filters(kernels, made, mode, dtype, options):
    """Output and every gradient within the kernels' own tolerance, and, without skip, bit for bit."""
    torch.manual_seed(1)
    args, dout = case(3, 3, 290, 333, mode, dtype, options)
    if args[3] is not None:  # with a stride of its own
        args[3] = torch.stack([args[3], torch.full((3,), 1e4)], 1)[:, 0]
    values = values_of(args)
    assert made.pop() and values.isfinite().all() and values.shape[0] == 4
    given = [*args, None, values]
    check(given, dout, kernels=kernels)
    assert not made
    if args[3] is None:
        plain = [forward(args, dout, kernels), *backward(args, dout, kernels)]
        for a, b in zip(plain, [forward(given, dout, kernels), *backward(given, dout, kernels)]):
            assert torch.equal(a, b)


def test_the_values_are_read(kernels):
    """Zeros in place of filters leave skip alone, exactly; another channel's spectrum is another filter."""
    torch.manual_seed(2)
    args, dout = case(2, 2, 300, 20, "causal", F32, "skip")
    values = values_of(args)
    out = forward([*args, None, torch.zeros_like(values)], dout, kernels)
    assert error(out, args[0] * args[3][:, None]) < 1e-6
    args[3] *= 1e-7  # beside filters of zeros it is all there is
    out = forward([*args, None, torch.zeros_like(values)], dout, kernels)
    assert error(out, args[0] * args[3][:, None]) < 1e-6
    args[3], swapped = None, values.clone()
    swapped[:2] = values[:2].flip(0)
    swapped[2].view(-1)[:2] = values[2].view(-1)[:2].flip(0)
    args[1] = args[1].flip(0)
    assert torch.equal(forward([*args, None, swapped], dout, kernels), forward(args, dout, kernels))


def test_channels_and_rows_take_turns(kernels, monkeypatch):
    """A cut of the channels reads its own; strides of the values do not count."""
    torch.manual_seed(3)
    args, dout = case(3, 3, 300, 40, "causal", F16, "skip postgate")
    values = values_of(args)
    values = torch.stack([values, torch.zeros_like(values)], -1)[..., 0]
    monkeypatch.setattr(fft_conv_long, "BOUND", 1 << 13)
    check([*args, None, values], dout, kernels=kernels)


def test_many_channels_have_room_for_their_scales():
    """Also where they are more than a spectrum has numbers."""
    for channels, extra in ((1, 1), (512, 1), (513, 2), (1025, 3)):
        shape = fft_filters.shape_of_spectra(channels, 16, 16)
        assert shape == (channels + extra, 2, 16, 16)
        spectrum, scale = fft_filters.split_spectra(torch.zeros(shape), channels)
        scale += 1
        assert spectrum.shape == (channels, 2, 16, 16) and scale.shape == (channels,) and not spectrum.any()


# --- who reads what ---------------------------------------------------------------------------------------------------


def test_half_precision_reads_what_was_made_for_float32(kernels, made):
    torch.manual_seed(5)
    args, dout = case(2, 1, 280, 40, "same", F16)
    given = [*args, None, values_of(args, F32)]
    assert made.pop()
    check(given, dout, kernels=kernels)
    assert not made


@pytest.mark.parametrize("dtype, reads", ((F16, True), (F32, False)))
def test_long_rows_of_two_widths(monkeypatch, made, dtype, reads):
    """Half precision reads rows of either width, split operands only their own."""
    torch.manual_seed(6)
    width = lambda wide: {"N0": 2 if wide else 4, "N1": 16, "N2": 32 if wide else 16, "BLOCK0": 16, "C": 128}
    monkeypatch.setattr(fft_long_device, "sizes", lambda points, wide: width(wide))
    monkeypatch.setattr(fft_device, "limit", lambda *_: 256)
    args, dout = case(2, 1, 600, 40, "causal", dtype, "skip")
    for made_for in (F32, F16):
        values = values_of(args, made_for)
        assert values.shape[2:] == ((4, 16, 16) if made_for == F32 else (2, 16, 32)) and made.pop()
        check([*args, None, values], dout, kernels=fft_conv_long)
        assert len(made) == (0 if reads or made_for == F32 else 2)  # forward and backward
        made.clear()


def test_fused_for_half_precision_alone(monkeypatch, made):
    """Where float32 takes the long form, half precision its own: each makes what it does not find."""
    torch.manual_seed(7)
    monkeypatch.setattr(fft_device, "limit", lambda operands, _: 256 if operands == "fp16x3" else 512)
    size = lambda points, wide: {"N0": -(-points // 256), "N1": 16, "N2": 16, "BLOCK0": 16, "C": 128}
    monkeypatch.setattr(fft_long_device, "sizes", size)
    for dtype in (F32, F16):
        args, dout = case(2, 1, 300, 40, "causal", dtype)
        for made_for in (F32, F16):
            given = [*args, None, values_of(args, made_for)]
            made.clear()
            check(given, dout, kernels=fft_conv_long)
            assert len(made) == (0 if dtype == made_for else 2)
            assert given[-1].dim() == (4 if made_for == F16 else 5)


@pytest.mark.parametrize("maker", ("triton", "cpu", "reference", None))
@pytest.mark.parametrize("reader", ("triton", "cpu", "reference", None))
@pytest.mark.parametrize("length", (40, 300))
def test_spectra_of_other_backends(monkeypatch, made, maker, reader, length):
    """Each backend reads its own and computes with the filters otherwise; None: what a CPU takes by itself."""
    torch.manual_seed(8)
    monkeypatch.setattr(fft_device, "limit", lambda *_: 256)
    u, k, skip = randn(2, 2, length).requires_grad_(), randn(2, 30).requires_grad_(), randn(1, 2)[0]
    choose = lambda name: scalekern.backend(name) if name else contextlib.nullcontext()
    with choose(maker):
        spectrum = scalekern.fft_conv_spectrum(k, length)
    assert (spectrum.values.dim() > 3) == (maker == "triton")
    made.clear()
    with choose(reader):
        out = scalekern.fft_conv(u, spectrum, skip=skip)
        found = out, *torch.autograd.grad(out.square().sum(), (u, k))
    expected = scalekern.reference.fft_conv(*(t.double() for t in (u, k)), skip=skip.double())
    expected = expected, *torch.autograd.grad(expected.square().sum(), (u, k))
    assert all(error(a.detach(), b.detach()) < 1e-5 for a, b in zip(found, expected))
    assert len(made) == (2 if reader == "triton" != maker else 0)


def test_the_public_function_by_triton(kernels):
    """The fake promises what the kernels make; a spectrum compiles, and says for which dtype of u it is."""
    torch.manual_seed(9)
    u, k, r = randn(2, 2, 300), randn(2, 30), randn(2, 7)
    with scalekern.backend("triton"):
        spectrum = scalekern.fft_conv_spectrum(k, 300, "same", k_reverse=r)
        plain = scalekern.fft_conv(u, k, mode="same", k_reverse=r)
        assert torch.equal(scalekern.fft_conv(u, spectrum, mode="same"), plain)
        for dtype in (F32, BF16):
            args = (k, r, 300, "same", dtype)
            torch.library.opcheck(torch.ops.scalekern.fft_conv_spectrum.default, args)
        inside = lambda u, k: scalekern.fft_conv(u, scalekern.fft_conv_spectrum(k, u.shape[2], "same"), mode="same")
        compiled = torch.compile(inside, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(u, k), scalekern.fft_conv(u, k, mode="same"))
        half = scalekern.fft_conv_spectrum(k, 300, dtype=F16)
        with pytest.raises(TypeError, match="for float32 u, got one for float16 .make it with dtype=torch.float32"):
            scalekern.fft_conv(u, half)
        assert torch.equal(scalekern.fft_conv(u.half(), half), scalekern.fft_conv(u.half(), k))
        with pytest.raises(scalekern.BackendError, match="a filter for every sample"):
            scalekern.fft_conv_spectrum(k[None], 300)
        empty = dataclasses.replace(spectrum, values=torch.zeros_like(spectrum.values))
        assert not scalekern.fft_conv(u, empty, mode="same").any()
