"""The oracle of the wavelet transform against loops, against PyWavelets and against numbers that PyWavelets gave.

Shape letters: B batch, C channels, H x W image, F filter length.
"""

import warnings

import numpy as np
import oracles
import pytest
import torch
from oracles import TIGHT, cases, one_thread, randn  # noqa: F401

from scalekern.reference.dwt2d import MODES, WAVELETS, dwt2d, filters, idwt2d
from scalekern.testing import TOLERANCE, assert_close, error, upcast

every_wavelet = pytest.mark.parametrize("wavelet", WAVELETS)
every_mode = pytest.mark.parametrize("mode", MODES)
SIZES = [(1, 1), (1, 6), (2, 3), (5, 9)]
PYWT = 1e-11  # PyWavelets' bior4.4 is that far from a biorthogonal pair


def brute_1d(x, wavelet, mode):
    """(low, high) along the first axis, sum by sum."""
    dec_lo, dec_hi, _, _ = filters(wavelet)
    n, taps = len(x), len(dec_lo)
    first, count = 1, (n + taps - 1) // 2
    if mode == "periodization":
        x = np.append(x, x[-1:], 0) if n % 2 else x
        first, count = taps // 2, len(x) // 2

    def at(i):
        if mode == "periodization":
            return x[i % len(x)]
        while mode == "symmetric" and not 0 <= i < n:
            i = -1 - i if i < 0 else 2 * n - 1 - i
        return x[i] if 0 <= i < n else 0 * x[0]

    def filtered(taps):
        return np.array([sum(tap * at(2 * o + first - j) for j, tap in enumerate(taps)) for o in range(count)])

    return filtered(dec_lo), filtered(dec_hi)


def brute(x, wavelet, levels, mode):
    """One image, [low, coarsest (3, P, Q), .., finest]."""
    details, low = [], np.asarray(x)
    for _ in range(levels):
        bands = [[y.T for y in brute_1d(x.T, wavelet, mode)] for x in brute_1d(low, wavelet, mode)]
        low = bands[0][0]
        details.append(np.stack([bands[1][0], bands[0][1], bands[1][1]]))
    return [torch.from_numpy(part) for part in (low, *reversed(details))]


@pytest.mark.parametrize("op, sample", **cases("dwt2d"))
def test_agrees_with_loops(op, sample):
    (x, wavelet, levels, mode), _ = sample.make(dtype=torch.float64)
    outputs = dwt2d(x, wavelet, levels, mode)
    assert len(outputs) == levels + 1
    for b, c in np.ndindex(*x.shape[:2]):
        for actual, expected in zip(outputs, brute(x[b, c].numpy(), wavelet, levels, mode)):
            assert (actual[b, c] - expected).norm() < TIGHT * x.norm()
    if min(x.shape[-2:]) > 1:
        for part in outputs:
            assert part.norm() > 0.01 * x.norm()
            for axis in (-1, -2):
                assert part.shape[axis] == 1 or error(part.roll(1, axis), part) > 0.05
        for part in outputs[1:]:  # horizontal and vertical details taken for each other
            assert error(part[:, :, [1, 0, 2]], part) > 0.05


@every_mode
@every_wavelet
def test_sizes_and_reconstruction(wavelet, mode):
    for H, W in SIZES:
        x = randn(1, 2, H, W)
        for levels in (1, 3):
            parts = dwt2d(x, wavelet, levels, mode)
            for actual, expected in zip(parts, brute(x[0, 1].numpy(), wavelet, levels, mode)):
                assert (actual[0, 1] - expected).norm() < TIGHT * x.norm()
            assert_close(idwt2d(*parts, wavelet=wavelet, mode=mode, size=(H, W)), x, tolerance=1e-11)
            whole = idwt2d(*parts, wavelet=wavelet, mode=mode)
            assert whole.shape[-2:] == (H + H % 2, W + W % 2)
            assert_close(whole[..., :H, :W], x, tolerance=1e-11)
            for i in range(levels + 1):  # every part counts
                if parts[i].norm() > 1e-6:
                    fewer = [part * (j != i) for j, part in enumerate(parts)]
                    assert error(idwt2d(*fewer, wavelet=wavelet, mode=mode, size=(H, W)), x) > 1e-3


# pywt 1.9.0: wavedec2 of GOLDEN_IMAGE, one level: cA[0], cH[0], cV[-1], cD[-1], the first four columns each.
GOLDEN_IMAGE = [[(3 * i * i + 5 * i * j + 7 * j) % 11 for j in range(6)] for i in range(5)]
GOLDEN = {
    ("haar", "periodization"): [
        [7.0, 12.0, 11.5],
        [-0.0, 1.0, -3.5],
        [-5.0, -5.0, -5.0],
        [0.0, 0.0, 0.0],
    ],
    ("haar", "symmetric"): [
        [7.0, 12.0, 11.5],
        [-0.0, 1.0, -3.5],
        [-5.0, -5.0, -5.0],
        [0.0, 0.0, 0.0],
    ],
    ("db2", "symmetric"): [
        [4.25, 7.368430139593, 14.378284930204, 8.375],
        [-1.299038105677, 0.058012701892, 1.795753175473, -4.113620667976],
        [-3.564582562299, -4.628284930204, -4.628284930204, 3.564582562299],
        [2.857050807569, 3.253284930204, 3.253284930204, -2.857050807569],
    ],
    ("db2", "zero"): [
        [-0.223076211353, 0.50809440182, 1.412100752766, -0.279006350946],
        [-0.832531754731, 1.896234122635, 5.270031754731, -1.041265877365],
        [-0.483253175473, -1.878284930204, -1.878284930204, -0.882772228311],
        [0.129487298108, 0.503284930204, 0.503284930204, 0.236538105677],
    ],
    ("db2", "periodization"): [
        [6.475480947162, 10.838221420743, 13.003284930204],
        [0.841506350946, -0.371715069796, 1.347196016958],
        [4.0, 3.621715069796, 2.713221420743],
        [0.616025403784, 0.503284930204, 1.960816684934],
    ],
    ("db4", "symmetric"): [
        [9.022862628552, 12.027972033126, 10.138925775581, 12.098595730203],
        [-0.338787975696, 0.195250770239, -0.571110075391, -0.003484144787],
        [-1.291247982215, -4.561644742026, -3.495262233818, 1.239819056913],
        [-0.288589898635, -1.053115676073, -0.643066619004, 0.220825095336],
    ],
    ("db4", "periodization"): [
        [8.214820511757, 12.668113685556, 11.592118373881],
        [-0.919972469402, -0.440052681613, 0.54311935132],
        [1.953813809959, 2.797958649157, 2.707781666756],
        [-2.610431569111, 1.430774789955, -3.451178027036],
    ],
    ("bior1.3", "zero"): [
        [-0.046875, -0.046875, 0.2109375, -0.390625],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.3125, 0.3125, 0.3125],
        [0.0, 0.0, 0.0, 0.0],
    ],
    ("bior2.2", "symmetric"): [
        [8.1875, 4.0, 10.0625, 13.71875],
        [-0.4375, 1.1875, -0.375, 0.125],
        [1.0, -2.0625, -2.0625, -1.0],
        [-1.375, 2.75, 2.75, 1.375],
    ],
    ("bior4.4", "periodization"): [
        [6.034392246285, 11.490615922415, 12.715854978132],
        [-1.638910425561, 0.408104368343, -1.220596284611],
        [-4.069499291441, -4.498187159034, -2.93703963378],
        [0.016528391352, 0.43468603602, 2.077617873846],
    ],
    ("bior4.4", "symmetric"): [
        [9.76973421491, 10.354242127838, 8.559635795056, 10.528937154102],
        [0.650532295995, 0.012997866585, 2.18896641772, -0.225784602852],
        [3.050937716961, 1.820035999261, -3.328199793076, -2.791556545601],
        [-1.929121631479, -0.878496410141, 1.77804319553, 1.568998620056],
    ],
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: "-".join(c))
def test_pywavelets_numbers(case):
    wavelet, mode = case
    low, details = dwt2d(torch.tensor(GOLDEN_IMAGE, dtype=torch.float64)[None, None], wavelet, 1, mode)
    rows = torch.stack([low[0, 0, 0], details[0, 0, 0, 0], details[0, 0, 1, -1], details[0, 0, 2, -1]])[:, :4]
    expected = torch.tensor(GOLDEN[case], dtype=torch.float64)
    assert_close(rows[:, : expected.shape[1]], expected, tolerance=1e-9)


@every_mode
@every_wavelet
def test_pywavelets(wavelet, mode):
    pywt = pytest.importorskip("pywt")
    for mine, theirs in zip(filters(wavelet), pywt.Wavelet(wavelet).filter_bank):
        assert np.abs(np.array(mine) - theirs).max() < 1e-12
    for H, W in [(1, 4), (7, 5), (16, 9)]:
        x = randn(2, 1, H, W)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of levels that see nothing but the extension
            theirs = pywt.wavedec2(x.numpy(), wavelet, mode, 2)
        for a, e in zip(dwt2d(x, wavelet, 2, mode), [theirs[0], *(np.stack(level, -3) for level in theirs[1:])]):
            assert a.shape == e.shape and (a - torch.from_numpy(e)).abs().max() < PYWT * max(1, np.abs(e).max())
        parts = [randn(*part.shape, seed=i) for i, part in enumerate(dwt2d(x, wavelet, 2, mode))]
        levels = [tuple(part.numpy()[:, :, i] for i in range(3)) for part in parts[1:]]
        expected = torch.from_numpy(pywt.waverec2([parts[0].numpy(), *levels], wavelet, mode))
        assert_close(idwt2d(*parts, wavelet=wavelet, mode=mode), expected, tolerance=PYWT)


@every_wavelet
def test_filters_are_a_biorthogonal_pair_with_their_moments(wavelet):
    """What defines them: unit products of even shifts, no products across, and the vanishing moments of their names."""
    bank = [np.array(f) for f in filters(wavelet)]
    dec_lo, dec_hi, rec_lo, rec_hi = bank
    for (a, b), peak in {(0, 2): 1, (1, 3): 1, (0, 3): 0, (1, 2): 0}.items():
        products = np.convolve(bank[a], bank[b])[1::2]  # even shifts, in the middle no shift
        expected = np.zeros(len(products))
        expected[len(products) // 2] = peak
        assert np.abs(products - expected).max() < 1e-15
    named = {"db2": (2, 2), "db4": (4, 4), "bior1.3": (1, 3), "bior2.2": (2, 2), "bior4.4": (4, 4)}
    n = np.arange(len(dec_lo)) - len(dec_lo) / 2
    for high, count in zip((dec_hi, rec_hi), named.get(wavelet, (1, 1))):
        for power in range(count):
            assert abs((n**power * high).sum()) < 1e-12 * max(1, np.abs(n**power).max()), power
        assert abs((n**count * high).sum()) > 1e-2
    assert abs(sum(dec_lo) - 2**0.5) < 1e-15 and abs(sum(rec_lo) - 2**0.5) < 1e-15


# --- derivatives ---


@pytest.mark.parametrize("op, sample", **cases("dwt2d", "idwt2d"))
def test_explicit_backward_equals_autograd(op, sample):
    oracles.check_explicit_backward(op, sample)


@every_mode
def test_gradcheck(mode):
    x = randn(1, 1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dwt2d(x, "db2", 2, mode), x)
    parts = [part.detach().requires_grad_() for part in dwt2d(x, "bior2.2", 2, mode)]
    assert torch.autograd.gradcheck(
        lambda *parts: idwt2d(*parts, wavelet="bior2.2", mode=mode, size=(5, 4)), parts
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(dtype):
    x = randn(2, 3, 13, 10).to(dtype)
    parts = dwt2d(x, "db2", 2)
    for part, exact in zip(parts, dwt2d(upcast(x), "db2", 2)):
        assert part.dtype == dtype
        assert_close(part, exact, tolerance=TOLERANCE[dtype] / 2)
    assert_close(idwt2d(*parts, wavelet="db2", size=(13, 10)), upcast(x), tolerance=TOLERANCE[dtype])


PARTS = dwt2d(randn(1, 1, 8, 8), "db2", 2)
BAD = {
    "wavelet": (lambda: dwt2d(randn(1, 1, 4, 4), "sym3"), "wavelet must be one of 'haar', .*, got 'sym3'"),
    "mode": (lambda: dwt2d(randn(1, 1, 4, 4), mode="reflect"), "mode must be one of 'symmetric', .*, got 'reflect'"),
    "levels": (lambda: dwt2d(randn(1, 1, 4, 4), levels=0), "levels must be at least 1, got 0"),
    "inverse wavelet": (lambda: idwt2d(*PARTS, wavelet="sym3"), "wavelet must be one of 'haar', .*, got 'sym3'"),
    "inverse mode": (lambda: idwt2d(*PARTS, mode="reflect"), "mode must be one of 'symmetric', .*, got 'reflect'"),
    "details": (lambda: idwt2d(PARTS[0]), "details must have at least one level, got none"),
    "low": (lambda: idwt2d(randn(1, 1, 2, 2), *PARTS[1:]), r"low must have the size .*, got shape \(1, 1, 2, 2\)"),
    "next": (lambda: idwt2d(*PARTS[:2], PARTS[1]), r"the next details must be \(8, 8\) or one less, got \(4, 4\)"),
    "size": (lambda: idwt2d(*PARTS, wavelet="db2", size=(8, 6)), r"size must be \(8, 8\) or one less, got \(8, 6\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
