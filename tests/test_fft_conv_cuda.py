"""fft_conv in CUDA C++, one fused transform of three factors, without a GPU: run by the host emulator. And on one.

Shape letters: B batch, D channels, L length, K taps, N points of the transform.
"""

import cuda_emulation as emulated
import pytest
import torch

from scalekern import _dispatch, _library, fft_conv, fft_conv_spectrum, reference
from scalekern.ops import _fft_conv_cuda as cuda
from scalekern.testing import error, upcast

_C = pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")

F16, BF16 = torch.float16, torch.bfloat16
# Rounding an output alone is 2e-4 in float16 and 1.7e-3 in bfloat16; operands and twiddles have 11 bits, some 25
# roundings of 1.4e-4 one after the other. Where much of the product wraps and is thrown away (filters beyond a row), it
# is measured against what is kept: 1.1e-3 instead of 7e-4.
BOUND = {F16: 1.5e-3, BF16: 2.5e-3}


def inputs(L, K=None, dtype=F16, B=2, D=2, seed=0, **shapes):
    """(u, k, further arguments by name); rows and channels of their own sizes, so that swapped ones are seen."""
    generator = torch.Generator().manual_seed(seed)
    K = L if K is None else K
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    u = randn(B, D, L) * (1 + torch.arange(B * D)).view(B, D, 1)
    k = randn(D, K) * torch.exp(-torch.arange(K) * 8 / K) * (1 + torch.arange(D))[:, None]
    rest = {name: randn(*shape) for name, shape in shapes.items()}
    return u.to(dtype), k, {n: t.to(dtype) if n.endswith("gate") else t for n, t in rest.items()}


def check(u, k, order="rising", processors=1, **options):
    exact = reference.fft_conv(u.double(), k.double(), **{n: upcast(t) for n, t in options.items()})
    out = emulated.fft_conv(u, k, order=order, processors=processors, **options)
    for b in range(u.shape[0]):  # a row that is wrong and small is seen as well
        found = error(out[b], exact[b])
        assert found < BOUND[u.dtype], f"row {b}: {found:.2e}"
    return out


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    "L", [1, 2, 17, 255, 256, 257, 512, 513, 1023, 1024, 1025, 2048, 2049, 4095, 4096, 4097, 6000, 8184, 8192]
)
def test_lengths(L, dtype):
    """All transforms, full or nearly, rows that are no multiple of a thread's 8 samples."""
    check(*inputs(L, dtype=dtype)[:2])


@pytest.mark.parametrize("B", [1, 2, 3, 4, 5, 9, 17])
@pytest.mark.parametrize("L", [200, 400, 1000, 2000])
def test_rows_that_are_transformed_together(L, B):
    """16, 8, four or two at once, each by its own size; the last of them may be alone."""
    u, k, rest = inputs(L, dtype=BF16, B=B, pregate=(B, 2, L), postgate=(B, 2, L), bias=(2,))
    u = (u.float() * 10.0 ** (torch.arange(B) % 9)[:, None, None]).to(BF16)
    wide = torch.full((B + 1, 2, L), 7.0, dtype=BF16)
    plain = check(u, k, **rest)
    assert torch.equal(emulated.fft_conv(u, k, **rest, out=wide[:B]), plain) and (wide[B] == 7).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("L, K", [(8193, 8193), (16384, 16384), (16385, 100), (24000, 30000), (32768, 32768)])
def test_rows_in_parts(L, K, dtype):
    """Two to four parts of 8,192 samples, from every one to every one behind it."""
    u, k, rest = inputs(L, K, dtype, B=2, D=1, postgate=(2, 1, L), skip=(1,), bias=(1,))
    k = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))  # no decay: far lags count as much
    check(u, k)
    if L % 8192 != 0:
        check(u, k, order="shuffled", **rest)


def test_parts_of_any_size():
    """Parts were scaled by their own samples: the sum is by the largest so far, and zeros have no size."""
    L = 32000
    u, k, _ = inputs(L, 2000, B=4, D=1, dtype=torch.float32)
    u = u / u.abs().amax()
    sizes = torch.tensor([[1e-3, 1, 1e3, 1], [1e4, 1e-2, 1, 1], [0, 0, 1e-7, 0], [1e-5, 1, 0, 1e-3]])
    u = (u * sizes.repeat_interleave(8192, 1)[:, None, :L]).to(BF16)
    out, exact = emulated.fft_conv(u, k), reference.fft_conv(u.double(), k.double())
    for b in range(4):
        assert error(out[b], exact[b]) < BOUND[BF16]
    first = slice(0, 8192)  # before the larger samples came
    assert error(out[0][:, first], exact[0][:, first]) < BOUND[BF16] and (out[2][:, first] == 0).all()


def test_full_mode_in_parts():
    """Outputs behind the input: parts without a sample."""
    u, k, _ = inputs(5000, 20000, B=1, D=2)
    check(u, k, mode="full")
    check(*inputs(9000, 300, B=1, D=2)[:2], mode="full")


@pytest.mark.parametrize("mode", ["causal", "circular", "same", "full"])
@pytest.mark.parametrize(
    "L, K", [(4096, 4096), (4000, 97), (2200, 6000), (3001, 1), (700, 200), (1100, 5000), (100, 30), (300, 800), (1, 5)]
)
def test_modes_and_taps(mode, L, K):
    K = min(K, 8192 - L + 1) if mode == "full" else K
    outputs = L + K - 1 if mode == "full" else L
    u, k, rest = inputs(L, K, postgate=(2, 2, outputs))
    check(u, k, mode=mode)
    check(u, k, mode=mode, **rest)


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("dtype, L", [(F16, 4096), (BF16, 8192)], ids=str)
def test_gates_skip_bias_and_both_filters(dtype, L, order):
    shapes = {"pregate": (3, 2, L), "postgate": (3, 2, L), "skip": (2,), "bias": (2,), "k_reverse": (2, 300)}
    u, k, rest = inputs(L, 1000, dtype, B=3, **shapes)
    check(u, k, order=order, **rest)
    check(u, k, order=order, postgate=rest["postgate"])
    check(u, k, order=order, pregate=rest["pregate"], bias=rest["bias"])
    check(u, k, order=order, mode="circular", k_reverse=rest["k_reverse"], skip=rest["skip"])


def test_two_filters_longer_than_their_circle():
    u, k, rest = inputs(300, 1000, k_reverse=(2, 800))
    check(u, k, mode="circular", **rest)


@pytest.mark.parametrize("L", [8192, 32768])
def test_the_largest_products(L):
    """Samples and taps that add up in one frequency, in every part: within float16's range."""
    t = torch.arange(L) * (2 * torch.pi * (1000 + 0.25) / min(L, 8192))
    u, k = torch.cos(t).sign().to(F16).expand(1, 1, L), torch.cos(t).sign()[None]
    check(u.contiguous(), k)


@pytest.mark.parametrize("L", [200, 1500, 4096, 10000])
def test_masks(L):
    """Samples that are none, NaN among them; rows of the mask of their own, and as a view."""
    u, k, rest = inputs(L, B=3, pregate=(3, 2, L))
    wide = torch.rand(3, 2 * L, generator=torch.Generator().manual_seed(2)) < 0.7
    mask = wide[:, ::2]
    plain = check(torch.where(mask[:, None], u, 0), k, **rest)
    u = torch.where(mask[:, None], u, torch.tensor(float("nan"), dtype=F16))
    assert torch.equal(emulated.fft_conv(u, k, mask=mask, **rest), plain)


def test_every_tap_and_every_sample_counts():
    """One tap at each place of a lane, a warp, a tile, a part: the shifted row itself."""
    for L in (1024, 2048, 4096, 16384):
        every_tap(L)


def every_tap(L):
    u, _, _ = inputs(L, B=1, D=1)
    for lag in (0, 1, 2, 7, 15, 16, 17, 255, 256, 257, 1000, 2047, 2048, 4095, 8191, 8192, 8193, 12000, 16383):
        if lag >= L:
            break
        k = torch.zeros(1, L)
        k[0, lag] = 3
        found = emulated.fft_conv(u, k).double()
        found[..., lag:] -= 3 * u.double()[..., : L - lag]
        assert found.norm() < BOUND[F16] * 3 * u.double().norm()  # of what the transform holds, kept or not


def test_rows_shared_by_blocks():
    """5 rows of 3 channels on 1 to 8 processors: rows of a channel one after the other, and in blocks of their own."""
    u, k, _ = inputs(4096, B=5, D=3, dtype=BF16)
    outs = []
    for processors in (1, 3, 4, 8):
        _C.emulated_kernels()
        outs.append(check(u, k, processors=processors))
        filters, name = _C.emulated_kernels()
        assert "Filters<16>" in filters and "FusedConv" in name and name.endswith(", 16, 1, 1>")
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_strides_and_alignment():
    """Rows anywhere in memory; at odd addresses sample by sample, with the same results."""
    L = 4100
    u, k, rest = inputs(L, pregate=(2, 2, L), postgate=(2, 2, L))
    plain = check(u, k, **rest)
    swapped = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in {"u": u, **rest}.items()}
    out = torch.empty(2, 2, 2 * L, dtype=F16)
    assert torch.equal(emulated.fft_conv(swapped.pop("u"), k, **swapped, out=out[..., L:]), plain)

    def odd(t):
        shifted = torch.empty(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)[..., 3:]
        return shifted.copy_(t)

    for name in ("u", "pregate", "postgate"):
        moved = {**{"u": u, **rest}, name: odd({"u": u, **rest}[name])}
        assert torch.equal(emulated.fft_conv(moved.pop("u"), k, **moved), plain), name
    plain, u = emulated.fft_conv(u, k), torch.zeros(2, 2, L + 20, dtype=F16)[..., :L].copy_(u)
    for first in (4, 8):  # rows of 4,120 at addresses that are no multiples of 16 bytes, and that are
        wide = torch.full((2, 2, L + 20), 7.0, dtype=F16)
        out = emulated.fft_conv(u, k, out=wide[..., first : first + L])
        assert torch.equal(out, plain) and (wide[..., :first] == 7).all() and (wide[..., first + L :] == 7).all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 6e4])
def test_rows_of_any_size(size):
    """A row's own scale: rows at both ends of float16, beside a row of zeros."""
    u, k, _ = inputs(4096, B=3, dtype=torch.float32)
    u = (u / u.abs().amax(-1, keepdim=True) * size).to(F16)
    u[1] = 0
    k = k / k.abs().sum(1, keepdim=True)
    out = emulated.fft_conv(u, k)
    exact = reference.fft_conv(u.double(), k.double())
    # Subnormal results: of half a place at 6e-8.
    allowed = BOUND[F16] * exact.norm(dim=-1) + 3e-8 * 64
    assert ((out.double() - exact).norm(dim=-1) <= allowed).all() and (out[1] == 0).all()


def test_filters_of_any_size():
    """A spectrum's own scale: of taps whose sum is far from 1, and of no taps at all."""
    u, k, _ = inputs(4096, B=1, D=4, dtype=BF16)
    k = k * torch.tensor([1e-12, 1e4, 0, 1.0])[:, None]
    out, exact = emulated.fft_conv(u, k), reference.fft_conv(u.double(), k.double())
    for d in (0, 1, 3):
        assert error(out[:, d], exact[:, d]) < BOUND[BF16]
    assert (out[:, 2] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("L, place", [(200, 50), (1024, 900), (4096, 4000), (16384, 7000)])
def test_what_is_not_finite_stays_in_its_row(L, place, value):
    u, k, _ = inputs(L, B=3)
    plain = emulated.fft_conv(u, k)
    u[1, 0, place] = value
    out = emulated.fft_conv(u, k)
    assert not out[1, 0, place:].isfinite().any()
    out[1, 0] = plain[1, 0] = 0
    assert torch.equal(out, plain)


def arguments(L=4096, **changes):
    u, k, _ = inputs(L, dtype=changes.pop("dtype", F16))
    names = ("u", "k", "k_reverse", "skip", "bias", "pregate", "postgate", "mask", "mode", "method", "precision")
    given = {"u": u, "k": k, "mode": "causal", "method": "auto", **changes}
    return (*[given.get(name) for name in names], None)


def test_what_it_declines():
    u, k = arguments()[:2]
    assert cuda.supports(*arguments()) is None and cuda.supports(*arguments(precision="tf32")) is None
    for call, words in [
        (arguments(dtype=torch.float32), "float32"), (arguments(method="direct"), "direct"),
        (arguments(precision="ieee"), "ieee"), (arguments(precision="bf16"), "bf16"),
        (arguments(k=k.expand(2, 2, -1)), "every sample"), (arguments(k_reverse=k.expand(2, 2, -1)), "every sample"),
        (arguments(L=32769), "32769"),
        (arguments(L=16385, mode="full"), "32769"), (arguments(L=8193, mode="circular"), "looks ahead"),
        (arguments(L=8193, k_reverse=k), "looks ahead"), (arguments(postgate=u.mT.contiguous().mT), "each other"),
    ]:  # fmt: skip
        assert words in cuda.supports(*call)
    with pytest.raises(ValueError, match="more samples than points"):
        _run_with(4096, 5000)
    with pytest.raises(ValueError, match="another number of points"):
        _run_with(8192, 5000, filters_of=4096)
    with pytest.raises(ValueError, match="a power of two from 256 to 8,192"):
        _run_with(3000, 500, filters_of=4096)


def _run_with(points, L, filters_of=None):
    u, k, _ = inputs(L)
    filters_of = filters_of or points
    values, scale, *_ = cuda.filters(u[..., :filters_of], k, None, None, "causal", filters_of)
    _, *tensors, _ = cuda.arguments(None, u, values, scale, None, None, None, None, filters_of)
    emulated._run("fft_conv", (torch.empty_like(u),), tensors, (points,), 1, "rising")


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("L", [256, 512, 1024, 2048, 4096, 8192])
def test_spectra_of_filters(L, order):
    """Each row's numbers against torch's transform in float64: at their own rounding to float16, wherever they lie."""
    K, R = L, min(900, L)
    _, k, rest = inputs(L, K, k_reverse=(2, R), skip=(2,))
    u = torch.empty(1, 2, L, dtype=F16)
    values, scale, *arguments = cuda.filters(u, k, rest["k_reverse"], rest["skip"], "same", L)
    values, scale = emulated._run("fft_filters", (values, scale), arguments[:3], arguments[3:], 1, order)
    lags = torch.zeros(2, 4 * L, dtype=torch.float64)  # a lag below zero from the end
    offset = (K - 1) // 2
    lags[:, : L - offset] = k[:, offset:]
    lags[:, -offset:] = k[:, :offset]
    lags[:, 0] += rest["k_reverse"][:, 0] + rest["skip"]
    lags[:, 1 - R :] += rest["k_reverse"][:, 1:].flip(1)
    exact = torch.fft.fft(lags)[:, 1::4]  # the frequencies k + 1/4 of L points
    exact = exact.view(2, 1, L).expand(2, max(4096 // L, 1), L)
    words = torch.complex(*values.double().view(2, -1, 2, 2).unbind(2)).flatten(1) * scale.double()[:, None] * L / 256
    assert error(torch.view_as_real(words), torch.view_as_real(exact.flatten(1)[:, places_of(L)])) < 4e-4


def places_of(L):
    """k (of each row of those transformed together, one after the other) in the order of the words of a spectrum."""
    n1 = L // 256
    k1, k2 = cuda._rows(max(n1, 16))
    rho, q, j, e = cuda._axes(len(k1), 4, 2, 2)
    row, frequency = k1[rho] // n1, k1[rho] % n1 + n1 * (k2[rho] + 16 * (8 * j + 2 * q + e))
    return (row * L + frequency).flatten()


def test_shared_memory():
    """What supports asks of a GPU is what the drivers ask for."""
    for L in (200, 400, 1000, 2000, 4000, 8000, 16000, 24000, 32000):
        emulated.fft_conv(*inputs(L, B=1, D=1)[:2])
        assert 0 <= cuda._shared_bytes(L) - _C.emulated_shared_bytes() <= 32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("L", [16, 256, 500, 1000, 1024, 2047, 2500, 4096, 8191, 8192, 16384, 20000, 32768])
def test_on_a_gpu(L, dtype):
    u, k, rest = inputs(L, dtype=dtype, B=9, D=40, pregate=(9, 40, L), postgate=(9, 40, L), skip=(40,), bias=(40,))
    exact = reference.fft_conv(u.double(), k.double(), method="fft", **{n: upcast(t) for n, t in rest.items()})
    u, k, rest = u.cuda(), k.cuda(), {n: t.cuda() for n, t in rest.items()}
    op = _library.OPS["fft_conv_fwd"]
    call = arguments(L, u=u, k=k, **rest)
    with _dispatch.backend("cuda"):
        assert _dispatch.select(op.public, op.backends, "cuda", call).run.native_op is not None
        assert error(fft_conv(u, k, **rest).cpu(), exact) < BOUND[dtype]
        spectrum = fft_conv_spectrum(k, L, dtype=dtype)
        assert error(fft_conv(u, spectrum, **rest).cpu(), exact) < BOUND[dtype]
