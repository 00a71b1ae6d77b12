"""Cases of the 2-D relatives of fft_conv: large depthwise filters and wavelets, against what torch offers for them.

Shape letters: B batch, C channels, S x S image, K x K filter.
"""

import functools

import torch
import torch.nn.functional as F

import scalekern
from scalekern import reference
from scalekern.benchmarks import harness, oracles, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.ops._depthwise import good_size
from scalekern.reference.dwt2d import filters
from scalekern.testing import TOLERANCE

FP32, BF16 = torch.float32, torch.bfloat16
CONV_OPS = ("depthwise_conv2d_fwd", "depthwise_conv2d_bwd")
UP_OPS = ("depthwise_conv_transpose2d_fwd", "depthwise_conv_transpose2d_bwd")
DWT_OPS = ("dwt2d_fwd", "dwt2d_bwd", "idwt2d_fwd", "idwt2d_bwd")


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


# ---- depthwise_conv2d --------------------------------------------------------------------------------------------


def conv_inputs(device, dtype, B, C, S, K) -> dict:
    randn = normal(device, 0)
    return {"x": randn(B, C, S, S).to(dtype), "w": randn(C, K, K) / K, "bias": randn(C)}


def conv_costs(dtype, train, B, C, S, K) -> dict:
    """Images moved once, and the arithmetic of real FFTs of an image with half a filter's margin: 2.5 n log2 n."""
    points = (S + K // 2) ** 2
    transform = 2.5 * points * torch.tensor(points).log2().item()
    # Forward: image, filter, product, inverse. Backward: both images and the filter, two products, two inverses.
    transforms, products = (5 * B + 3, 3 * B) if train else (2 * B + 1, B)
    flops = min(transforms * transform + products * 3 * points, (3 if train else 1) * 2 * B * (S * K) ** 2)
    return {"bytes_moved": (5 if train else 2) * B * C * S * S * dtype.itemsize, "flops": int(C * flops)}


def grouped_conv(x, w, bias) -> peers.Peer:
    w, bias = w.to(x.dtype)[:, None], bias.to(x.dtype)
    return peers.torch_peer(lambda: F.conv2d(x, w, bias, padding=w.shape[-1] // 2, groups=w.shape[0]))


def plain_fft(x, w, bias, size: int) -> peers.Peer:
    """The product of two spectra of the whole batch, as one would write it down."""
    if x.dtype != torch.float32:
        raise peers.Absent("torch.fft takes no half precision on a CPU")
    middle = slice(w.shape[-1] // 2, w.shape[-1] // 2 + x.shape[-1])

    def run():
        spectrum = torch.fft.rfft2(x, (size, size)) * torch.fft.rfft2(w.flip(1, 2), (size, size))
        return torch.fft.irfft2(spectrum, (size, size))[..., middle, middle] + bias[:, None, None]

    return peers.torch_peer(run)


def conv(device, dtype=FP32, *, train, **shape) -> Work:
    kw = conv_inputs(device, dtype, **shape)
    inputs, wide = tuple(v.requires_grad_(train) for v in kw.values()), oracles.double(kw)
    leaves = tuple(v.requires_grad_(train) for v in wide.values())
    dout = normal(device, 1)(*kw["x"].shape).to(dtype)
    passes = lambda f, inputs=inputs, dout=dout: peers.forward_backward(f, dout, inputs) if train else f
    exact = passes(lambda: conv_in_float64(**wide), leaves, dout.double())
    least = good_size(shape["S"] + shape["K"] - 1, even=True)

    def against(build, *args):
        found = build(*kw.values(), *args)
        return peers.Peer(passes(found.run), found.version)

    return Work(
        run=passes(lambda: scalekern.depthwise_conv2d(**kw)),
        oracle=lambda: tuple(t.detach() for t in exact()) if train else (exact(),),
        tolerance=gradient_tolerance("depthwise_conv2d", dtype) if train else TOLERANCE[dtype],
        **conv_costs(dtype, train, **shape),
        peers={"F.conv2d": lambda: against(grouped_conv), "torch.fft": lambda: against(plain_fft, least)},
    )  # fmt: skip


def conv_in_float64(x, w, bias):
    """The oracle's answer by FFT in float64: the oracle itself takes minutes at this size."""
    with scalekern.backend("cpu" if x.device.type == "cpu" else "cuda"):
        return scalekern.depthwise_conv2d(x, w, bias, method="fft")


def upsampling(device, dtype=FP32, *, train, **shape) -> Work:
    """depthwise_conv_transpose2d of stride 2, from S x S to 2 S x 2 S. Torch's is fast enough to be the oracle's."""
    kw = conv_inputs(device, dtype, **shape)
    options = {"stride": 2, "padding": shape["K"] // 2, "output_padding": 1}
    inputs = tuple(v.requires_grad_(train) for v in kw.values())
    wide = tuple(v.requires_grad_(train) for v in oracles.double(kw).values())
    B, C, S = (shape[k] for k in "BCS")
    dout = normal(device, 1)(B, C, 2 * S, 2 * S).to(dtype)

    def passes(function, x, w, bias, dout):
        run = lambda: function(x, w, bias, **options)
        return peers.forward_backward(run, dout, (x, w, bias)) if train else run

    def plain(x, w, bias, **options):
        return F.conv_transpose2d(x, w.to(x.dtype)[:, None], bias.to(x.dtype), groups=w.shape[0], **options)

    exact = passes(plain, *wide, dout.double())
    taps = B * C * (S * shape["K"]) ** 2
    return Work(
        run=passes(scalekern.depthwise_conv_transpose2d, *inputs, dout),
        oracle=lambda: tuple(t.detach() for t in exact()) if train else (exact(),),
        tolerance=gradient_tolerance("depthwise_conv_transpose2d", dtype) if train else TOLERANCE[dtype],
        bytes_moved=(3 + 2 * 4 if train else 1 + 4) * B * C * S * S * dtype.itemsize, flops=(6 if train else 2) * taps,
        peers={"F.conv_transpose2d": lambda: peers.torch_peer(passes(plain, *inputs, dout))},
    )  # fmt: skip


# ---- dwt2d -------------------------------------------------------------------------------------------------------


def dwt(device, dtype=FP32, *, train, wavelet, **shape) -> Work:
    """Analysis and synthesis of one level: what a WaveMix block does around its convolutions."""
    B, C, S = (shape[k] for k in "BCS")
    x = normal(device, 0)(B, C, S, S).to(dtype).requires_grad_(train)
    dout, wide = normal(device, 1)(B, C, S, S).to(dtype), x.detach().double().requires_grad_(train)

    def there_and_back(package, x):
        low, details = package.dwt2d(x, wavelet, 1, "periodization")
        return package.idwt2d(low, details * 0.5, wavelet=wavelet, mode="periodization")

    def passes(package, x, dout):
        function = lambda: there_and_back(package, x)
        return peers.forward_backward(function, dout, (x,)) if train else function

    exact = passes(reference, wide, dout.double())
    elements, taps = B * C * S * S, len(filters(wavelet)[0])
    return Work(
        run=passes(scalekern, x, dout), oracle=lambda: tuple(t.detach() for t in exact()) if train else (exact(),),
        tolerance=gradient_tolerance("dwt2d", dtype) if train else TOLERANCE[dtype],
        bytes_moved=(8 if train else 4) * elements * dtype.itemsize, flops=(8 if train else 4) * elements * 2 * taps,
        peers={"dense matrices": lambda: peers.torch_peer(passes(reference, x, dout))},
    )  # fmt: skip


# ---- the list ----------------------------------------------------------------------------------------------------

_LARGE, _MEDIUM, _SMALL = ({"B": 8, "C": 64, "S": 56, "K": k} for k in (31, 13, 7))
_WAVE = {"B": 8, "C": 64, "S": 56}
_FAST = ("cuda", "cpu")  # the reference is F.conv2d, which is timed as a peer; its backward goes tap by tap
_CONV, _CONV_TRAIN = (functools.partial(conv, train=train) for train in (False, True))
_UP, _UP_TRAIN = (functools.partial(upsampling, train=train) for train in (False, True))
_DWT, _DWT_TRAIN = (functools.partial(dwt, train=train) for train in (False, True))


def wave(build, direction, device, priority, wavelet, shape=_WAVE):
    ops = DWT_OPS if direction == "fwd+bwd" else DWT_OPS[::2]
    build = functools.partial(build, wavelet=wavelet)
    return case("dwt", build, ops, direction, device, priority, shape, note=wavelet)


CPU = [
    case("dwconv2d", _CONV, CONV_OPS[:1], "fwd", "cpu", 35, _LARGE, backends=_FAST,
         targets={"F.conv2d": 20, "torch.fft": 1.5}),
    case("dwconv2d", _CONV_TRAIN, CONV_OPS, "fwd+bwd", "cpu", 82, _LARGE, backends=_FAST,
         targets={"F.conv2d": 20, "torch.fft": 1.5}),
    case("dwconv2d", _CONV, CONV_OPS[:1], "fwd", "cpu", 83, _MEDIUM, backends=_FAST),
    case("dwconv2d", _CONV_TRAIN, CONV_OPS, "fwd+bwd", "cpu", 85, _MEDIUM, backends=_FAST),
    case("dwconv2d", _CONV, CONV_OPS[:1], "fwd", "cpu", 84, _SMALL, backends=_FAST),
    case("dwconv2d_transpose", _UP, UP_OPS[:1], "fwd", "cpu", 88, {**_MEDIUM, "S": 28}, backends=_FAST),
    case("dwconv2d_transpose", _UP_TRAIN, UP_OPS, "fwd+bwd", "cpu", 89, {**_MEDIUM, "S": 28}, backends=_FAST),
    wave(_DWT, "fwd", "cpu", 85, "haar"),
    wave(_DWT_TRAIN, "fwd+bwd", "cpu", 86, "haar"),
    wave(_DWT, "fwd", "cpu", 87, "db4"),
]  # fmt: skip

CUDA = [
    case("dwconv2d", _CONV, CONV_OPS[:1], "fwd", "cuda", 96, {"B": 64, "C": 128, "S": 56, "K": 31}, backends=_FAST),
    case("dwconv2d", _CONV_TRAIN, CONV_OPS, "fwd+bwd", "cuda", 97, {"B": 64, "C": 128, "S": 56, "K": 13}, BF16,
         backends=_FAST),
    wave(_DWT_TRAIN, "fwd+bwd", "cuda", 98, "haar", {"B": 64, "C": 128, "S": 128}),
]  # fmt: skip

CASES = [*CPU, *CUDA]
