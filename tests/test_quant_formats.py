"""scalekern.quant: codes and tables against independent enumerations, rounding within its bounds."""

import itertools
import math

import pytest
import torch

from scalekern.quant import FORMATS, dequantize, quantize
from scalekern.quant._formats import BLOCK_FORMATS
from scalekern.quant._pack import pack, row_bytes, unpack
from scalekern.quant._quantize import nearest_codes

INTEGERS = [name for name, f in FORMATS.items() if f.is_integer and name != "ternary"]
METHODS = ("least_squares", "absmax")
FLOATS8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one only waits for the first on these sizes
    yield
    torch.set_num_threads(threads)


def randn(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Codes and tables


@pytest.mark.parametrize("bits", range(1, 9))
def test_packs_a_little_endian_stream_of_bits(bits):
    for K in (0, 1, 7, 8, 50, 129):
        codes = torch.randint(0, 1 << bits, (2, 3, K), generator=torch.Generator().manual_seed(K))
        data = pack(codes, bits)
        assert data.dtype == torch.uint8 and data.shape == (2, 3, row_bytes(K, bits)) and data.is_contiguous()
        assert torch.equal(unpack(data, bits, K), codes)
        for row, stream in zip(codes.flatten(0, 1).tolist(), data.flatten(0, 1).tolist()):
            number = int.from_bytes(bytes(stream), "little")
            assert [number >> bits * k & (1 << bits) - 1 for k in range(K)] == row
        tail = K * bits % 8  # what follows the last code is not looked at
        if tail:
            data[..., -1] |= 0xFF << tail & 0xFF
            assert torch.equal(unpack(data, bits, K), codes)
        for cut in range(0, K, 13):
            assert torch.equal(unpack(data[:, 1:, : row_bytes(cut, bits)], bits, cut), codes[:, 1:, :cut])
    assert pack(torch.zeros(0, 5), bits).shape == (0, row_bytes(5, bits))


@pytest.mark.parametrize("name", FLOATS8)
def test_fp8_is_torchs(name):
    fmt, dtype = FORMATS[name], FLOATS8[name]
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    assert torch.equal(fmt.values().nan_to_num(1e9), values.nan_to_num(1e9))
    assert torch.equal(torch.signbit(fmt.values()[values == 0]), torch.tensor([False, True]))
    rising = values[values.isfinite()].sort().values
    ties = (rising[1:] + rising[:-1]) / 2
    spread = randn(4000) * 10.0 ** torch.linspace(-7, 4, 4000)
    x = torch.cat([rising, ties, ties * (1 + 2**-20), ties * (1 - 2**-20), spread, -spread]).clamp(
        -fmt.largest, fmt.largest
    )
    assert torch.equal(nearest_codes(x, fmt).to(torch.uint8), x.to(dtype).view(torch.uint8))
    assert torch.equal(
        nearest_codes(torch.tensor([1e9, -1e9]), fmt), nearest_codes(torch.tensor([1, -1]) * fmt.largest, fmt)
    )


SMALL_FLOATS = {  # magnitudes by code, from the tables of OCP Microscaling Formats, 5.3
    "fp4_e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp6_e2m3": [n / 8 for n in range(16)] + [n / 4 for n in range(8, 16)] + [n / 2 for n in range(8, 16)],
    "fp6_e3m2": [n / 16 for n in range(8)] + [n / 2**s for s in (3, 2, 1, 0, -1, -2) for n in range(4, 8)],
}


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_small_floats_are_those_of_the_specification(name):
    fmt, half = FORMATS[name], SMALL_FLOATS[name]
    assert fmt.values().tolist() == [*half, *(-v for v in half)] and fmt.largest == half[-1]
    for low in range(len(half) - 1):  # between two, to the even code; beyond the last, the last
        middle = (half[low] + half[low + 1]) / 2
        x = torch.tensor([middle, middle * (1 - 1e-6), middle * (1 + 1e-6), -middle])
        even = low + low % 2
        assert nearest_codes(x, fmt).tolist() == [even, low, low + 1, even + len(half)]
    assert nearest_codes(torch.tensor([1e9, -1e9]), fmt).tolist() == [len(half) - 1, 2 * len(half) - 1]


def test_nf4_is_made_of_a_normal_distributions_quantiles():
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2  # QLoRA, appendix E: the mean of the outermost of 16 and of 15 quantiles
    quantiles = lambda n: torch.special.ndtri(torch.linspace(offset, 0.5, n, dtype=torch.float64))[:-1]
    both = torch.cat([quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8)]).sort().values
    torch.testing.assert_close(FORMATS["nf4"].values(torch.float64), both / both.max(), rtol=0, atol=2e-7)


def test_fp4_of_bitsandbytes():
    twelfths = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.equal(FORMATS["fp4_bnb"].values()[:8], torch.tensor(twelfths) / 12)
    assert torch.equal(FORMATS["fp4_bnb"].values()[8:], -torch.tensor(twelfths) / 12)


# Rounding


def _by_group(part, size, K):
    return part.repeat_interleave(size, -1)[..., :K]


def _step(q):
    scales = q.scales.double() * (1 if q.outer is None else q.outer)
    return _by_group(scales, q.group_size, q.columns)


def _sums(error, size):
    return torch.nn.functional.pad(error, (0, -error.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def _half_gap(name):
    """The error of a scaled element at most: half the widest gap between neighbouring values."""
    values = FORMATS[name].values(torch.float64)
    return values[values.isfinite()].sort().values.diff().max().item() / 2


def _weight(dtype=torch.float32):
    w = (randn(2, 5, 150, seed=1) * torch.linspace(0.1, 3, 5)[:, None]).to(dtype)
    w[0, 1, 28:80] = 0
    w[1, 2] = w[1, 2].abs()  # one-sided
    return w


@pytest.mark.parametrize("group_size", [None, "tensor", 128, 32, 7])
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("int1", "ternary")])
def test_rounds_within_half_a_gap(name, group_size):
    """With every dtype of scales and both kinds of zeros."""
    w = _weight()
    size = {None: 150, "tensor": 150}.get(group_size, group_size)
    for symmetric, scale_dtype in (
        (True, None), (True, torch.float16), (True, torch.float8_e4m3fn), (True, torch.float8_e8m0fnu),
        (True, torch.int8),
        (False, None), (False, torch.bfloat16), (False, torch.uint8), (False, torch.float8_e4m3fn),
    )[: 9 if name in INTEGERS else 5]:  # fmt: skip
        options = dict(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        q = quantize(w, name, **options)
        assert q.scales.shape == (2, 1 if group_size == "tensor" else 5, -(-150 // size)) and q.group_size == size
        assert q.scales.dtype == (scale_dtype or torch.float32) and (q.zeros is None) == symmetric
        assert q.shape == w.shape and q.dtype == w.dtype
        back = dequantize(q)
        error = (back - w).double().abs()
        assert (error <= _half_gap(name) * _step(q) * (1 + 1e-4)).all(), (error / _step(q)).max()
        assert (back[0, 1, 35:63] == 0).all()


@pytest.mark.parametrize("group_size", ["tensor", 32])
@pytest.mark.parametrize("name", ["int2", "int4", "int8", "nf4", "fp4_e2m1", "fp8_e4m3", "ternary"])
def test_least_squares_is_never_worse(name, group_size):
    w = _weight()
    for symmetric, scale_dtype in ((True, None), (True, torch.float8_e4m3fn), (True, torch.uint8), (False, None)):
        if symmetric or name in INTEGERS:
            options = dict(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
            errors = ((dequantize(quantize(w, name, method=m, **options)) - w).double() ** 2 for m in METHODS)
            found, was = (e.sum() if group_size == "tensor" else _sums(e, 32) for e in errors)
            assert (found <= was * (1 + 1e-5) + 1e-10).all()
            assert found.sum() < 0.99 * was.sum() or name in ("int8", "fp8_e4m3") or scale_dtype


@pytest.mark.parametrize("group_size", [None, "tensor", 128, 32, 7])
def test_binary_is_mean_and_mean_deviation_and_ternary_the_mean_magnitude(group_size):
    w = _weight()
    size = {None: 150, "tensor": 150}.get(group_size, group_size)
    number = _sums(torch.ones_like(w), size) * (5 if group_size == "tensor" else 1)
    sums = lambda x: _sums(x, size).sum(-2, True) if group_size == "tensor" else _sums(x, size)
    mean = lambda x: _by_group(sums(x) / number, size, 150)
    for scale_dtype, rtol in ((None, 1e-5), (torch.float16, 2e-3)):
        q = quantize(w, "int1", group_size=group_size, scale_dtype=scale_dtype)
        assert q.offsets.dtype == q.scales.dtype == (scale_dtype or torch.float32)
        deviation = w - mean(w)
        wanted = mean(w) + torch.where(deviation > 0, 1, -1) * mean(deviation.abs())
        close = (dequantize(q) - wanted).abs() <= rtol * (mean(w).abs() + mean(deviation.abs())) + 1e-7
        assert (close | (deviation.abs() < 1e-6 + rtol * mean(w).abs())).all()  # on the fence either is right
        step = mean(w.abs())
        wanted = torch.where(w.abs() > step / 2, w.sign() * step, 0.0)
        back = dequantize(quantize(w, "ternary", group_size=group_size, scale_dtype=scale_dtype))
        fence = (w.abs() - step / 2).abs() < rtol * step
        assert (((back - wanted).abs() <= rtol * step) | fence).all() and (back[0, 1, 35:63] == 0).all()
    constant = torch.full((2, 64), 0.3)
    torch.testing.assert_close(dequantize(quantize(constant, "int1")), constant, rtol=1e-6, atol=0)
    assert (dequantize(quantize(constant * 0, "int1")) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_of_weights(dtype):
    w = _weight(dtype)
    for name in ("int4", "int8", "fp8_e4m3", "nf4", "mxfp8_e4m3"):
        q = quantize(w, name, scale_dtype=torch.float64 if dtype == torch.float64 else None)
        assert q.dtype == dtype == dequantize(q).dtype and dequantize(q, torch.float32).dtype == torch.float32
        if name in INTEGERS:
            wide = dequantize(q, torch.float64)
            assert ((wide - w).abs() <= _step(q) / 2 * (1 + 1e-6)).all()
            assert torch.equal(dequantize(q), wide.float().to(dtype) if dtype != torch.float64 else wide)


@pytest.mark.parametrize("name", [*FORMATS, *BLOCK_FORMATS])
def test_extreme_values(name):
    """From 2^-149 to the largest float: finite, no worse than the group's largest; not finite: the group is NaN."""
    fmt = FORMATS[BLOCK_FORMATS.get(name, (name,))[0]]
    symmetries = (True, False) if name in INTEGERS else (True,)
    dtypes = (None,) if name in BLOCK_FORMATS else (None, torch.float16, torch.bfloat16, torch.uint8)
    for symmetric, scale_dtype in itertools.product(symmetries, dtypes):
        options = dict(group_size=32, symmetric=symmetric, scale_dtype=scale_dtype)
        for largest in (1e-45, 3e-41, 1e-38, 5e-9, 1e-6, 1e4, 1e20, 3e38):
            w = randn(3, 70, seed=2).clamp(-3, 3) / 3 * largest
            back = dequantize(quantize(w, name, **options))
            assert back.isfinite().all() and ((back - w).abs() <= w.abs().max() * 1.01 + 1e-38).all()
            if scale_dtype is None and fmt.bits >= 4 and 1e-36 < largest:
                assert (back - w).norm(dtype=torch.float64) < 0.3 * w.norm(dtype=torch.float64)
            if scale_dtype == torch.float16 and fmt.bits == 8 and largest == 1e-6 and fmt.is_integer:
                assert (back - w).abs().max() <= 2**-25 * 1.001  # where scales are subnormal they are no smaller
        for bad in (math.inf, -math.inf, math.nan):
            w = randn(2, 70, seed=3)
            w[1, 40] = bad
            back = dequantize(quantize(w, name, **options))
            assert back[1, 32:64].isnan().all()
            if name != "nvfp4" and scale_dtype != torch.uint8:  # whose second level is shared
                assert back[0].isfinite().all() and back[1, :32].isfinite().all() and back[1, 64:].isfinite().all()


def test_zeros_and_empty():
    for name in [*FORMATS, *BLOCK_FORMATS]:
        assert (dequantize(quantize(torch.zeros(3, 40), name, group_size=16)) == 0).all()
        for N, K in ((0, 0), (0, 5), (3, 0), (1, 1), (3, 1)):
            for group_size in (None, "tensor", 4):
                w = randn(N, K, seed=N + K)
                q = quantize(w, name, group_size=group_size)
                assert q.shape == (N, K) and dequantize(q).shape == (N, K) and dequantize(q).isfinite().all()
                if name in ("int4", "nvfp4", "mxfp4") and group_size == 4:
                    q = quantize(w, name, group_size=4, symmetric=name != "int4", method="least_squares")
                    assert dequantize(q).shape == (N, K) and dequantize(q).isfinite().all()
    assert quantize(torch.zeros(2, 0, 3, 8), "int4").shape == (2, 0, 3, 8)


def test_one_sided_ranges_use_all_codes():
    w = torch.linspace(2, 3, 64).expand(2, 64) * torch.tensor([[1], [-1]])
    q = quantize(w, "int4", group_size=None, symmetric=False)
    assert q.zeros.flatten().tolist() == [0, 15] and ((dequantize(q) - w).abs() <= q.scales / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(dequantize(quantize(w * 0 + 0.7, "int2", symmetric=False)), w * 0 + 0.7)
    offsets = quantize(w + 5, "int3", symmetric=False, method="least_squares")
    assert 0 <= offsets.zeros.min() and offsets.zeros.max() <= 7


def test_a_transposed_weight_is_rounded_without_a_warning(recwarn):
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        quantize(randn(16, 32), "nf4", axis=-2, group_size=None)
    finally:
        torch.set_warn_always(always)
    assert not recwarn.list


def test_axis_and_bad_arguments():
    w = randn(20, 12)
    a, b = quantize(w, "int4", group_size=8, axis=-2), quantize(w.mT, "int4", group_size=8)
    assert torch.equal(a.data, b.data) and torch.equal(a.scales, b.scales) and a.shape == (12, 20)
    for options, message in (
        ({"format": "int9"}, "format must be one of"),
        ({"format": "nf4", "symmetric": False}, "symmetric=False needs"),
        ({"group_size": 0}, "group_size must be"),
        ({"method": "best"}, "method must be"),
        ({"axis": 0, "w": w[None]}, "axis be one of the last two"),
        ({"w": w[0]}, "at least 2 dimensions"),
        ({"scale_dtype": torch.int32}, "scale_dtype must be"),
        ({"axis": 3}, "axis be one of the last two"),  # not axis 1, which it is modulo 2
        ({"axis": "k"}, "axis be one of the last two"),
        ({"format": ["int4"]}, "format must be one of"),
        ({"w": w.to(torch.float8_e4m3fn)}, "w must be a dense torch.Tensor of float64, .*, got .*float8_e4m3fn"),
        ({"w": w.to_sparse()}, "w must be a dense torch.Tensor of float64, .*, got torch.sparse_coo"),
        ({"w": w.int()}, "w must be a dense torch.Tensor of float64, .*, got torch.strided of torch.int32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            quantize(**{"w": w, "format": "int4", **options})


@pytest.mark.parametrize("method", ["absmax", "least_squares"])
def test_scales_wider_than_the_weight(method):
    """The largest float64 is no float32: the bound of what is stored is the smaller of both."""
    w = randn(6, 50).half()
    for symmetric in (True, False):
        options = dict(group_size=16, symmetric=symmetric, method=method)
        wide, plain = quantize(w, "int4", scale_dtype=torch.float64, **options), quantize(w, "int4", **options)
        assert wide.scales.dtype == torch.float64 and torch.equal(wide.scales.float(), plain.scales)
        assert torch.equal(wide.data, plain.data)


def test_two_levels():
    """Whole scales times one float a row lose little against float scales."""
    w = _weight()
    for name, symmetric in (("int4", True), ("int4", False), ("fp4_e2m1", True)):
        plain = quantize(w, name, group_size=32, symmetric=symmetric)
        for dtype, slack in ((torch.int8, 1.2), (torch.uint8, 1.1)):
            q = quantize(w, name, group_size=32, symmetric=symmetric, scale_dtype=dtype)
            assert q.outer.shape == (2, 5, 1) and q.scales.dtype == dtype and q.outer.dtype == torch.float32
            assert (q.scales.amax(-1) >= torch.iinfo(dtype).max - 1).all()
            assert (dequantize(q) - w).norm() < slack * (dequantize(plain) - w).norm()


# Block formats


def _mx_by_hand(w, name):
    """OCP Microscaling Formats 1.0, 6.3, an element at a time in Python's floats."""
    fmt = FORMATS[BLOCK_FORMATS[name][0]]
    values = sorted({v for v in fmt.table if math.isfinite(v)})
    shared = math.floor(math.log2(max(map(abs, w)))) - math.floor(math.log2(fmt.largest)) if any(w) else -127
    back = []
    for v in w:
        x = v / 2.0**shared
        best = min(values, key=lambda t: (abs(t - x), fmt.table.index(abs(t)) % 2))
        back.append(best * 2.0**shared)
    return shared, back


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name != "nvfp4"])
def test_mx_is_the_specifications(name):
    w = randn(6, 70, seed=4) * 10.0 ** torch.tensor([-30, -3, 0, 0, 3, 20])[:, None]
    w[2, :32] = 0
    w[3, :32] *= 7.9 / w[3, :32].abs().max()  # rounds to beyond the largest element of 4 bits: clipped
    w[4, 32] = 2.0**13  # a power of two
    q = quantize(w, name)
    assert q.group_size == 32 and q.scales.dtype == torch.float8_e8m0fnu and q.scales.shape == (6, 3)
    back, exponents = dequantize(q), q.scales.view(torch.uint8).int() - 127
    for n, g in itertools.product(range(6), range(3)):
        shared, wanted = _mx_by_hand(w[n, g * 32 : g * 32 + 32].tolist(), name)
        assert exponents[n, g] == shared and back[n, g * 32 : g * 32 + 32].tolist() == wanted
    refined = dequantize(quantize(w, name, method="least_squares"))
    found, was = (_sums((r - w).double() ** 2, 32) for r in (refined, back))
    assert (found <= was * (1 + 1e-6)).all()
    assert name != "mxfp4" or found[3, 0] < 0.9 * was[3, 0]  # by the next power of two


def test_nvfp4():
    """Against the formula of NVIDIA's recipe in float64, and a block whose scale would vanish."""
    w = randn(4, 72, seed=5) * torch.tensor([1, 0.1, 3, 1e-5])[:, None]
    q = quantize(w, "nvfp4")
    assert q.group_size == 16 and q.scales.dtype == torch.float8_e4m3fn and q.scales.shape == (4, 5)
    assert q.outer.shape == (1, 1) and q.outer.item() == pytest.approx(w.abs().max().item() / (6 * 448), rel=1e-6)
    largest = torch.nn.functional.pad(w, (0, 8)).unflatten(-1, (5, 16)).abs().amax(-1)
    scales = (largest / 6 / q.outer).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.scales.float(), scales.float()) and (q.scales[3].float() == 2**-9).all()
    values = torch.tensor(SMALL_FLOATS["fp4_e2m1"], dtype=torch.float64)
    step = _by_group(scales.double() * q.outer, 16, 72)
    wanted = values[((w.abs() / step)[..., None] - values).abs().argmin(-1)] * step * w.sign()
    torch.testing.assert_close(dequantize(q, torch.float64), wanted, rtol=1e-6, atol=0)
