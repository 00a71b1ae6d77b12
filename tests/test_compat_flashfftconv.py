"""compat's flashfftconv against matrices of lags and sums of shifted inputs in float64: arguments, modes, dtypes.

Where upstream computes something else than its formula, ours computes the formula, and the test says what upstream does
(files of HazyResearch/flash-fft-conv).
"""

import pytest
import torch
import torch.nn.functional as F
from compat_shims import ABSENT, DEVICES, compare, fftconv_func, flash, randn, shims, short, upstream  # noqa: F401

from scalekern import compat
from scalekern.testing import TOLERANCE, assert_close, error

pytestmark = ABSENT
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def on_a_ring(period):
    """The rendering: k on a ring of lags, the matrix of lags t - s modulo the period."""

    def rendering(u, k, pregate=None, postgate=None):
        t = torch.arange(u.shape[-1])
        ring = F.pad(k[:, :period], (0, period - min(period, k.shape[1])))
        matrix = ring[:, (t[:, None] - t) % period]
        y = torch.einsum("hts,bhs->bht", matrix, u if pregate is None else u * pregate)
        return y if postgate is None else y * postgate

    return rendering


# seqlen, length, taps: circular, of a prime period, causal as upstream's users call it, the last number of taps that
# stays causal and the first that does not, M2-BERT's bidirectional filter of twice the length, taps that rfft drops.
RINGS = [
    (16, 16, 16), (13, 13, 5), (16, 8, 8), (16, 11, 6), (16, 11, 7), (16, 8, 16), (16, 1, 16), (12, 8, 15), (1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seqlen, length, taps", RINGS)
@pytest.mark.parametrize("gates", ["none", "both"])
def test_flash_fft_conv(seqlen, length, taps, gates, device):
    tensors = dict(u=randn(2, 3, length, device=device), k=randn(3, taps, seed=1, device=device))
    if gates == "both":
        tensors |= {n: randn(2, 3, length, seed=i, device=device) for i, n in enumerate(("pregate", "postgate"), 2)}
    compare(flash(seqlen).to(device), on_a_ring(seqlen), tensors, torch.float32)
    assert compat.calls() == {"FlashFFTConv": 1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["pregate", "postgate"])
def test_flash_fft_conv_dtypes(dtype, gate, device):
    """u and gates in any dtype, k in float32 (its gradient, too), strides of a (B, L, H) tensor; and one gate alone."""
    make = lambda seed: randn(2, 40, 3, seed=seed, dtype=dtype, device=device).transpose(1, 2)
    tensors = {"u": make(0), "k": randn(3, 40, seed=1, device=device), gate: make(2)}
    conv = flash(64, dtype=dtype, use_32_butterfly=False)
    assert (conv.seqlen, conv.dtype) == (64, dtype)
    assert compare(conv, on_a_ring(64), tensors, dtype).dtype == dtype


def test_a_wrapped_tap_is_noticed():
    """The cases above tell a filter that comes around the ring from one that does not."""
    u, k = randn(2, 3, 8), randn(3, 16, seed=1)
    bidirectional = flash(16)(u, k)
    assert error(flash(32)(u, k), bidirectional) > 0.1
    assert error(flash(16)(u, k[:, :9]), bidirectional) > 0.1
    assert_close(flash(32)(u, k[:, :9]), flash(16)(u, k[:, :9]), tolerance=1e-6)  # tap 8 would meet only u[-8]


def test_circular_and_causal():
    """An impulse at the last token: it comes around when u fills seqlen, and leaves when u is shorter."""
    u, k = F.one_hot(torch.tensor(7), 8).float().view(1, 1, 8), torch.arange(1.0, 9).view(1, 8)
    assert torch.allclose(flash(8)(u, k), torch.tensor([2.0, 3, 4, 5, 6, 7, 8, 1]), atol=1e-5)
    assert torch.allclose(flash(16)(u, k), torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1]), atol=1e-5)


def test_gradients_in_eval_mode():
    """Upstream keeps u and the spectrum in train mode only (flashfftconv/conv.py): its backward fails in eval mode."""
    compare(flash(16).eval(), on_a_ring(16), dict(u=randn(2, 3, 8), k=randn(3, 8, seed=1)), torch.float32)


def test_autocast_leaves_the_dtype():
    """As upstream, whose autograd functions autocast does not reach."""
    u, k, w = randn(2, 3, 8), randn(3, 8, seed=1), randn(3, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, z, h = flash(16)(u, k), short(3, 3, 1, w, None)(u), fftconv_func(u, k, k[:, 0])
    assert y.dtype == z.dtype == h.dtype == torch.float32
    assert_close(y, on_a_ring(16)(u.double(), k.double()), tolerance=1e-5)


def test_modules_compile_in_one_graph():
    u, k, D, v = randn(2, 4, 12), randn(4, 12, seed=1), randn(4, seed=2), randn(2, 4, 12, seed=3)
    conv, filter = flash(16), short(4, 3, 1, randn(4, 1, 3), randn(4))

    def function(u, k):
        return fftconv(filter(conv(u, k)), k[:2], D[:2], None, True, False, True, v, 2, v, False, k[:2])

    fftconv = upstream("src.ops.fftconv.fftconv_func")
    try:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_close(compiled(u, k), function(u, k), tolerance=1e-6)
    finally:
        torch._dynamo.reset()


def test_a_checkpoint_of_upstream_loads():
    """Its buffers, the DFT matrices, are in every layer that has a pointer to the module; ours has none."""
    model = torch.nn.Sequential(flash(16), torch.nn.Linear(2, 2))
    assert set(model.state_dict()) == {"1.weight", "1.bias"}
    saved = {
        "1.weight": torch.ones(2, 2), "1.bias": torch.ones(2),
        "0.f_16_fft": torch.ones(16, 16, 2), "0.twid": torch.ones(8, 2),
    }  # fmt: skip
    model.load_state_dict(saved)
    assert torch.equal(model[1].weight, saved["1.weight"])
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**saved, "1.f_16_fft": torch.ones(1)})


def shifted(kernel, padding, bhl):
    """The rendering: a sum of shifted inputs."""

    def rendering(x, weights, bias=None):
        x, weights = (x, weights) if bhl else (x.transpose(1, 2), weights.t())
        around = F.pad(x, (padding, padding))
        count = around.shape[-1] - kernel + 1
        y = sum(weights[:, i, None] * around[..., i : i + count] for i in range(kernel))
        y = y if bias is None else y + bias[:, None]
        return y if bhl else y.transpose(1, 2)

    return rendering


def run_short(bhl, kernel, padding, with_bias=True):
    """A function of x, weights and bias that runs the module with them as its parameters, in its layout of weights."""

    def run(x, weights, bias=None):
        channels = x.shape[1 if bhl else 2]
        like = (weights if bhl else weights.t()).reshape(channels, 1, kernel)
        module = short(channels, kernel, padding, like, bias, is_bhl=bhl)
        assert module.weights.shape == weights.shape and torch.equal(module.weights, weights)
        parameters = {"weights": weights} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(module, parameters, (x,))

    return run


# K, P: centered, causal (with K - 1 more outputs), valid, beyond the filter, widths beside causal_conv1d's, even.
# Upstream's forward for (B, D, L) takes a sample's offset from the length of the output when K is not 3, its backward
# reads the output's gradient as if P were (K - 1) / 2 and the lengths equal (csrc/flashfftconv/conv1d/conv1d_bhl.cu,
# conv1d_bwd_cuda_bhl.cu, conv1d_bwd_cuda_blh.cu): right there for "centered" only.
FILTERS = [(3, 1), (3, 2), (7, 3), (5, 4), (5, 0), (3, 5), (1, 0), (1, 2), (9, 4), (12, 11), (4, 2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bhl", [True, False], ids=["bhl", "blh"])
@pytest.mark.parametrize("kernel, padding", FILTERS)
def test_short_filter(kernel, padding, bhl, device):
    """For (B, L, D) the gradient has the layout of the weights, (K, D). Upstream's is that of (D, K), viewed as (K, D)
    without a transpose (conv1d_bwd_cuda_blh.cu), and tests/test_conv1d.py undoes it with a view before it compares."""
    tensors = dict(x=randn(3, 4, 13, device=device), weights=randn(4, kernel, seed=1, device=device))
    if not bhl:
        tensors = {n: t.mT.contiguous() for n, t in tensors.items()}
    tensors["bias"] = randn(4, seed=2, device=device)
    out = compare(run_short(bhl, kernel, padding), shifted(kernel, padding, bhl), tensors, torch.float32)
    assert out.is_contiguous() and out.shape[2 if bhl else 1] == 13 + 2 * padding - kernel + 1


@pytest.mark.parametrize("bhl", [True, False], ids=["bhl", "blh"])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
                                    (torch.float32, torch.float16), (torch.float64, torch.float32)])  # fmt: skip
def test_short_filter_dtypes(dtypes, bhl):
    """Out in x's dtype, gradients in each tensor's; bfloat16 backward too, which upstream's README says has a bug."""
    tensors = dict(x=randn(2, 4, 13, dtype=dtypes[0]), weights=randn(4, 3, seed=1, dtype=dtypes[1]))
    if not bhl:
        tensors = {n: t.mT.contiguous() for n, t in tensors.items()}
    coarse = max(dtypes, key=TOLERANCE.get)
    assert compare(run_short(bhl, 3, 1), shifted(3, 1, bhl), tensors, coarse).dtype == dtypes[0]


@pytest.mark.parametrize("kernel, padding", [(3, 1), (9, 4), (3, 2)])
def test_short_filter_of_short_and_empty_inputs(kernel, padding):
    least = kernel - 2 * padding
    for length in range(max(0, least), 3):
        x, module = randn(2, 4, length), short(4, kernel, padding, randn(4, 1, kernel), randn(4))
        expected = shifted(kernel, padding, True)(x, module.weights, module.bias)
        assert_close(module(x), expected, tolerance=1e-5)
    assert module(x[:0]).shape == (0, 4, expected.shape[2])


def test_what_a_causal_short_filter_is():
    """Hyena-DNA's example replaces nn.Conv1d(padding=2)[..., :l] by padding=1 (examples/hyena-dna/
    hyenadna_flashfftconv.py), with which token t meets token t + 1; so does rand.py. The causal filter is padding=2."""
    x, weight = randn(1, 2, 9).requires_grad_(), randn(2, 1, 3, seed=1)

    def latest(padding, t):
        (gradient,) = torch.autograd.grad(short(2, 3, padding, weight, None)(x)[..., :9][..., t].sum(), x)
        return gradient.abs().sum((0, 1)).nonzero().max().item()

    assert [latest(1, t) for t in range(8)] == [t + 1 for t in range(8)]
    assert [latest(2, t) for t in range(9)] == list(range(9))


def test_short_filter_parameters():
    conv = torch.nn.Conv1d(4, 4, 3, groups=4)
    module = short(4, 3, 1, conv.weight, conv.bias)
    assert (module.d, module.k, module.padding, module.is_bhl) == (4, 3, 1, True)
    assert module.weights.data_ptr() == conv.weight.data_ptr() != module.bias.data_ptr()  # as upstream shares them
    assert module.bias.data_ptr() != conv.bias.data_ptr()
    other = short(4, 3, 1, torch.zeros(4, 1, 3), torch.zeros(4), dtype=torch.bfloat16, device="cpu")
    assert other.weights.dtype == other.bias.dtype == torch.bfloat16
    other.load_state_dict(module.state_dict())  # upstream's own load_state_dict does nothing
    assert torch.equal(other.weights, module.weights.to(torch.bfloat16))
    assert short(1, 1, 0, torch.ones(1, 1, 1), None, is_bhl=False).weights.shape == (1, 1)  # upstream squeezes


u_, k_, w_ = torch.zeros(2, 4, 8), torch.zeros(4, 8), torch.zeros(4, 1, 3)
REFUSED = {
    "FlashFFTConv: seqlen must be at least 1": lambda: flash(0),
    "FlashFFTConv: seqlen must be an int and dtype floating, got 16 and torch.int32": lambda: flash(16, torch.int32),
    r"FlashFFTConv: u must have at most seqlen = 4 tokens, got shape \(2, 4, 8\)": lambda: flash(4)(u_, k_),
    "FlashFFTConv: u must have 3 dimensions": lambda: flash(16)(u_[0], k_),
    "FlashFFTConv: k must have 2 dimensions": lambda: flash(16)(u_, k_[None]),
    r"fft_conv: k must have shape \(4, \*\), got \(3, 8\)": lambda: flash(16)(u_, k_[:3]),
    r"fft_conv: pregate must have shape \(2, 4, 8\)": lambda: flash(16)(u_, k_, u_[..., :4], u_),
    r"FlashDepthWiseConv1d: weights must have shape \(4, 1, 5\) or \(4, 5\), got \(4, 1, 3\)": lambda: short(
        4, 5, 1, w_, None
    ),  # noqa: E501
    r"FlashDepthWiseConv1d: bias must have shape \(4,\)": lambda: short(4, 3, 1, w_, w_[0, 0]),
    "FlashDepthWiseConv1d: padding must be an integer of at least 0, got -1": lambda: short(4, 3, -1, w_, None),
    "FlashDepthWiseConv1d: padding must be an integer of at least 0, got 'same'": lambda: short(4, 3, "same", w_, None),
    r"FlashDepthWiseConv1d: input must have shape \(\*, \*, 4\), got \(2, 4, 8\)": lambda: short(
        4, 3, 1, w_, None, False
    )(u_),  # noqa: E501
    "FlashDepthWiseConv1d: the padded input must have at least 3 tokens, got 2": lambda: short(4, 3, 0, w_, None)(
        u_[..., :2]
    ),  # noqa: E501
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises((ValueError, TypeError), match=message):
        REFUSED[message]()
