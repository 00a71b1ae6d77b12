"""The CPU kernel of fft_conv: every kind of size, level of instructions, stride, number of threads; NaN in a row."""

import dataclasses

import pytest
import torch
from conftest import at_levels

import scalekern
from scalekern import _dispatch, _library, _native, fft_conv, fft_conv_spectrum, reference, testing
from scalekern.ops import _fft_conv as blocks
from scalekern.ops import _fft_conv_cpu as kernels
from scalekern.testing import TOLERANCE, error, upcast

if (reason := _native.load("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)
FWD, BWD = _library.OPS["fft_conv_fwd"], _library.OPS["fft_conv_bwd"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(u, k, dout=None, **options):
    """[out, gradients of what takes one ..], with the certainty that the kernel ran and not what stands behind it."""
    leaves = [t for t in (u, k, *options.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    found = iter(leaves)
    take = lambda t: next(found) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
    u, k, options = take(u), take(k), {name: take(t) for name, t in options.items()}
    taken = [options.get(name) for name in ("k_reverse", "skip", "bias", "pregate", "postgate", "mask")]
    if u.dtype != torch.float64:
        args = (u, k, *taken, options.get("mode", "causal"), options.get("method", "auto"), None, None)
        for op, call in ((FWD, args), (BWD, (u, *args))):
            assert _dispatch.select(op.public, op.backends, "cpu", call).run.native_op is not None
    out = (reference.fft_conv if u.dtype == torch.float64 else fft_conv)(u, k, **options)
    dout = randn(*out.shape, seed=9) if dout is None else dout
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def exact(u, k, **options):
    """The oracle's by complex128 FFTs."""
    return run(u.double(), k.double(), **{name: upcast(t) for name, t in options.items()} | {"method": "fft"})


def agree(found, expected, bound):
    assert len(found) == len(expected)
    for i, (f, e) in enumerate(zip(found, expected)):
        assert e.norm() > 0 and error(f, e) < bound, f"{i}: {error(f, e):.1e}"


# One tap, a leaf, its neighbours; 3 2^a and 5 2^a; rows longer than the transform (few taps); filters longer than rows;
# each way to begin (radix 2, 3, 4, 5, 8) and several levels.
SIZES = [
    (1, 1), (7, 1), (64, 64), (128, 128), (129, 128), (127, 131), (191, 193), (256, 256), (320, 320), (321, 319),
    (509, 7), (512, 512), (640, 640), (1000, 24), (1024, 1024), (1025, 2049), (2048, 2048), (2100, 60), (3, 3000),
    (5003, 5003), (16384, 16384),
]  # fmt: skip


@pytest.mark.parametrize("length, taps", SIZES)
@at_levels("baseline", "avx2")
def test_every_size(length, taps):
    u, k = randn(2, 2, length), randn(2, taps, seed=1)
    found, expected = run(u, k), exact(u, k)
    agree(found, expected, 1e-6)
    for f, e in zip(found, expected):  # a size that is a step too short spoils just the ends
        assert (f - e).abs().max() < 1e-5 * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["causal", "same", "full"])
@pytest.mark.parametrize("length, taps, reverse", [(128, 128, 128), (150, 40, 300), (90, 200, 3), (700, 5, 60)])
@at_levels("baseline", "avx2")
def test_every_option(mode, length, taps, reverse, dtype):
    """Together, in both of the shapes of filters; rows with a half behind x^n, and lags before zero."""
    count = length + taps - 1 if mode == "full" else length
    for lead, reverse_lead in (((3,), (2, 3)), ((2, 3), (3,))):
        options = {
            "mode": mode, "skip": randn(3, seed=2), "bias": randn(3, seed=3),
            "pregate": randn(2, 3, length, seed=4, dtype=dtype), "postgate": randn(2, 3, count, seed=5, dtype=dtype),
            "mask": randn(2, length, seed=6) > -0.4,
        }  # fmt: skip
        if mode != "full":
            options["k_reverse"] = randn(*reverse_lead, reverse, seed=7)
        u, k = randn(2, 3, length, dtype=dtype), randn(*lead, taps, seed=1)
        agree(run(u, k, **options), exact(u, k, **options), 2e-6 if dtype == torch.float32 else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_nothing(dtype):
    """Channels last, reversed, expanded: the same bits as of contiguous rows."""
    length = 256
    u = randn(2, length, 3, dtype=dtype).transpose(1, 2)
    k = randn(256, 3, seed=1).t()
    options = {
        "skip": randn(6, seed=2)[::2], "pregate": randn(1, 3, 1, seed=3, dtype=dtype).expand(2, 3, length),
        "postgate": randn(2, 3, 2 * length, seed=4, dtype=dtype)[..., ::2],
        "mask": (randn(length, 2, seed=5) > -0.5).t(),
    }  # fmt: skip
    dout = randn(2, 3, 1, seed=6).expand(2, 3, length)
    dense = {name: t.contiguous() for name, t in options.items()}
    for a, b in zip(run(u, k, dout, **options), run(u.contiguous(), k.contiguous(), dout.contiguous(), **dense)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch, channels, length", [(3, 5, 200), (1, 1, 10_000), (2, 2, 9_000)])
def test_threads_change_no_bit(batch, channels, length):
    """Channels over threads, and few channels whose transforms are shared."""
    u, k, options = randn(batch, channels, length), randn(channels, length, seed=1), {"skip": randn(channels, seed=2)}
    options["postgate"] = randn(batch, channels, length, seed=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(u, k, **options))
    finally:
        torch.set_num_threads(before)
    agree(results[0], exact(u, k, **options), 2e-6)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("length, mode", [(128, "causal"), (150, "causal"), (150, "full")])
def test_what_is_not_finite_stays_in_its_row(length, mode, value):
    """Where its taps reach, as in the oracle; other rows keep their bits. At a row's first and last token as well."""
    u, k = randn(3, 4, length), randn(4, 21, seed=1)
    count = length + 20 if mode == "full" else length
    options = {"mode": mode, "skip": randn(4, seed=2), "bias": randn(4, seed=3), "pregate": randn(3, 4, length, seed=4)}
    options |= {"postgate": randn(3, 4, count, seed=5), "mask": torch.ones(3, length, dtype=torch.bool)}
    clean, spoiled = run(u, k, **options), u.clone()
    spoiled[0, 1, 0], spoiled[1, 2, length - 1], spoiled[2, 0, 40] = value, value, value
    out, _, dk, _, _, _, dpostgate = found = run(spoiled, k, **options)
    expected = run(spoiled.double(), k.double(), **{n: upcast(t) for n, t in options.items()})  # sums over taps
    for f, e in ((out, expected[0]), (dpostgate, expected[6])):
        assert torch.equal(torch.isfinite(f), torch.isfinite(e)) and not torch.isfinite(e).all()
        assert error(f, e) < 1e-6
    sound = torch.ones(3, 4, dtype=torch.bool)
    sound[0, 1] = sound[1, 2] = sound[2, 0] = False
    for i in (0, 1, 5, 6):  # out, du, dpregate, dpostgate
        assert torch.equal(found[i][sound], clean[i][sound])
    assert torch.equal(dk[3], clean[2][3])  # of the channel that is finite in every sample


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_not_finite_in_half_precision(dtype, gated):
    """The rows that are done again are float32 where no gate follows."""
    u, k = randn(2, 2, 40).to(dtype), randn(2, 9, seed=1)
    u[1, 0, 7] = float("nan")
    gate = torch.ones(2, 2, 40, dtype=dtype) if gated else None
    out, expected = scalekern.fft_conv(u, k, postgate=gate), reference.fft_conv(u.double(), k.double())
    assert torch.equal(torch.isfinite(out), torch.isfinite(expected)) and torch.isfinite(out).sum() == 160 - 9
    assert error(torch.nan_to_num(out), torch.nan_to_num(expected)) < (2e-3 if dtype == torch.float16 else 1e-2)


def test_a_filter_that_is_not_finite_stays_in_its_channel():
    u, k = randn(2, 3, 128), randn(3, 128, seed=1)
    clean, k[1, 100] = run(u, k), float("nan")
    out, du, dk = run(u, k)
    whole = reference.fft_conv(u, k)
    assert torch.equal(torch.isfinite(out), torch.isfinite(whole)) and error(out, whole) < 1e-6
    for found, before in zip((out, du, dk), clean):
        dim = found.dim() - 2
        assert torch.equal(found.select(dim, 0), before.select(dim, 0))
        assert torch.equal(found.select(dim, 2), before.select(dim, 2))


@pytest.mark.parametrize(
    "change, said",
    [({"mode": "circular"}, "circular"), ({"dtype": torch.float64}, "float64"), ({"method": "direct"}, "direct")],
)
def test_what_is_declined(change, said):
    u = randn(1, 2, 9, dtype=change.get("dtype", torch.float32))
    k, mode, method = randn(2, 9).to(u.dtype), change.get("mode", "causal"), change.get("method", "auto")
    assert said in kernels.supports_fwd(u, k, *[None] * 6, mode, method, None, None)
    assert error(fft_conv(u, k, mode=mode, method=method), reference.fft_conv(u, k, mode=mode)) < 1e-6  # by torch's


def test_samples_by_fft():
    """The family's samples, though "auto" is free to change its mind."""
    for sample in testing.samples("fft_conv"):
        (u, k), kwargs = sample.make(dtype=torch.float32)
        if kwargs["mode"] != "circular":
            agree(run(u, k, **kwargs, method="fft"), exact(u, k, **kwargs), 3e-6)


@pytest.mark.parametrize("mode, length, taps", [("causal", 128, 128), ("same", 150, 200), ("full", 90, 40)])
def test_a_spectrum_of_the_kernel(mode, length, taps):
    """The same bits as with the filters; its values are read, forward and backward; others work without them."""
    reverse = None if mode == "full" else randn(2, 3, 20, seed=2)
    u, k = randn(2, 3, length).requires_grad_(), randn(3, taps, seed=1).requires_grad_()
    spectrum = fft_conv_spectrum(k, length, mode, k_reverse=reverse)
    assert spectrum.values.dtype == torch.float32 and torch.isfinite(spectrum.values).all()

    def both(filters, **more):
        out = fft_conv(u, filters, mode=mode, **more)
        return out, *torch.autograd.grad(out.square().sum(), (u, k))

    plain = both(k, k_reverse=reverse)
    assert all(torch.equal(a, b) for a, b in zip(both(spectrum), plain))
    assert error(fft_conv(u.bfloat16(), spectrum, mode=mode), plain[0]) < 1e-2
    assert error(fft_conv(u, spectrum, mode=mode, method="toeplitz"), plain[0]) < 1e-6
    with scalekern.backend("reference"):
        assert error(fft_conv(u, spectrum, mode=mode), plain[0]) < 1e-6
    out = torch.empty_like(plain[0])
    blocks.forward(out, u.detach(), k.detach(), reverse, *[None] * 5, mode, "fft", None, spectrum.values)
    assert error(out, plain[0]) < 1e-6
    empty = dataclasses.replace(spectrum, values=torch.zeros_like(spectrum.values))
    out, du, dk = both(empty, method="fft")
    assert out.norm() == 0 and du.norm() == 0


def test_a_spectrum_of_torch_is_passed_over():
    u, k = randn(2, 3, 128), randn(3, 128, seed=1)
    made = fft_conv_spectrum(k.double(), 128)
    assert made.values.is_complex() and error(fft_conv(u, made), fft_conv(u, k)) < 1e-6


@pytest.mark.parametrize("mode", ["causal", "same", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_of_few_tokens_are_summed(mode, dtype):
    """Where that takes less time, unless a spectrum is given; gradients as before."""
    u, k = randn(4, 300, 16).to(dtype).requires_grad_(), randn(300, 9, seed=1).requires_grad_()
    call = lambda u, k: (u, k, *[None] * 6, mode)
    few = kernels.supports_fwd(*call(u, k), "auto", None, None)
    assert "few tokens" in few and kernels.supports_fwd(*call(u, k), "fft", None, None) is None
    assert kernels.supports_fwd(*call(u[:3], k), "auto", None, None) is None
    assert kernels.supports_fwd(*call(u, torch.ones(300, 65)), "auto", None, None) is None
    out = scalekern.fft_conv(u, k, mode=mode)
    expected = reference.fft_conv(u.double(), k.double(), mode=mode)
    assert error(out, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    weights = randn(*out.shape, seed=2)
    for a, b in zip(*(torch.autograd.grad((y * weights.to(y.dtype)).sum(), (u, k)) for y in (out, expected))):
        assert error(a, b) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
