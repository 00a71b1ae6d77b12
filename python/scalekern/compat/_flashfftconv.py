"""flashfftconv's modules on scalekern's convolutions: HazyResearch/flash-fft-conv, as of November 2023.

Shape letters: B batch, H channels (D in the short filter), L length, N size of the FFT, K taps, P padding.

Less is asked of the inputs than upstream asks: any N, L and K, any floating dtype, any strides, on a CPU too. Products
are float32 (float64 for float64) whatever `dtype` says; the output has the input's dtype under autocast too, which
upstream does not heed. Gradients exist in eval mode too, where upstream has not kept what they need.
"""

import torch
import torch.nn.functional as F

import scalekern
from scalekern import _checks
from scalekern._library import autocast_off
from scalekern.compat._shims import counted

NATIVE_WIDTHS = range(2, 9)  # those of causal_conv1d


class FlashFFTConv(torch.nn.Module):
    """out = postgate irfft(rfft(u pregate, N) rfft(k, N), N), of which the first L: see `forward`."""

    def __init__(self, seqlen, dtype=torch.float16, use_32_butterfly=True):
        """
        Args:
            seqlen: N, the period of the convolution.
            dtype: u's, upstream's dtype of the products. Not needed here: every call goes by its own u.
            use_32_butterfly: how upstream factors N; changes nothing here.

        Raises:
            ValueError: a size below 1.   TypeError: seqlen is no integer, or dtype no floating one.
        """
        super().__init__()
        if not isinstance(seqlen, int) or dtype not in _checks.FLOATING:
            raise TypeError(f"FlashFFTConv: seqlen must be an int and dtype floating, got {seqlen!r} and {dtype!r}")
        if seqlen < 1:
            raise ValueError(f"FlashFFTConv: seqlen must be at least 1, got {seqlen}")
        self.seqlen, self.dtype, self.use_32_butterfly = seqlen, dtype, use_32_butterfly

    @counted("FlashFFTConv")
    def forward(self, u, k, pregate=None, postgate=None):
        """The convolution of period N = seqlen, u followed by zeros up to N.

        With L = N it is circular. With L + K - 1 <= N it is causal. Between the two, taps from N - L + 1 on reach
        around the ring: k[N - s] meets u[t + s], which is how a bidirectional filter comes in one tensor of 2 L taps.
        Taps from N on are dropped, as by rfft(k, N).

        Args:
            u: (B, H, L), L up to N.   k: (H, K), computed with in float32.   pregate, postgate: (B, H, L).

        Returns:
            (B, H, L) in u's dtype. Differentiable in all four.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.
        """
        _checks.tensor("FlashFFTConv", "u", u, dims=3, dtypes=_checks.FLOATING)
        _checks.tensor("FlashFFTConv", "k", k, dims=2, dtypes=_checks.FLOATING)
        length, period = u.shape[-1], self.seqlen
        if length > period:
            raise ValueError(f"FlashFFTConv: u must have at most seqlen = {period} tokens, got shape {tuple(u.shape)}")
        k = k[:, :period]
        mode, k_reverse = ("circular" if length == period else "causal"), None
        around = max(0, k.shape[-1] - (period - length + 1))  # taps that come around the ring
        if mode == "causal" and around and length:
            k_reverse = F.pad(k[:, -around:], (0, length - around)).flip(-1)  # at 0 the zero of lag 0, which k has
        with autocast_off(u.device.type):
            return scalekern.fft_conv(u, k, mode=mode, k_reverse=k_reverse, pregate=pregate, postgate=postgate)

    def _load_from_state_dict(self, *args):
        """Nothing: what upstream's checkpoints have here are its DFT matrices and twiddle factors."""


class FlashDepthWiseConv1d(torch.nn.Module):
    """out[t] = bias + sum_k weights[k] x[t - P + k]: nn.Conv1d with as many groups as channels, for both layouts.

    With P = (K - 1) / 2 a token meets later ones. A causal filter is P = K - 1 and the first L outputs.
    """

    def __init__(self, channels, kernel_size, padding, weights, bias, is_bhl=True, device=None, dtype=None):
        """
        Args:
            channels: D.   kernel_size: K from 1, odd or even.   padding: P from 0.
            weights: (D, 1, K) or (D, K), nn.Conv1d's weight.   bias: (D,) or None.
            is_bhl: inputs are (B, D, L), and `self.weights` is a view (D, K) of the weights; otherwise inputs are
                (B, L, D), and `self.weights` a transposed copy (K, D), whose gradient has that layout, too.
            device, dtype: of the parameters; None keeps those of `weights` and `bias`.

        Raises:
            TypeError, ValueError: weights, bias or padding do not fit.
        """
        super().__init__()
        op = "FlashDepthWiseConv1d"
        _checks.tensor(op, "weights", weights, dims=(2, 3), dtypes=_checks.FLOATING)
        _checks.shape(op, "weights", weights, (channels, 1, kernel_size), (channels, kernel_size))
        if bias is not None:
            _checks.tensor(op, "bias", bias, dims=1, dtypes=_checks.FLOATING)
            _checks.shape(op, "bias", bias, (channels,))
        if not isinstance(padding, int) or padding < 0:
            raise ValueError(f"{op}: padding must be an integer of at least 0, got {padding!r}")
        self.d, self.k, self.padding, self.is_bhl = channels, kernel_size, padding, is_bhl
        weights = weights.detach().reshape(channels, kernel_size).to(device=device, dtype=dtype)
        self.weights = torch.nn.Parameter(weights if is_bhl else weights.t().contiguous())
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach().clone().to(device=device, dtype=dtype))

    @counted("FlashDepthWiseConv1d")
    def forward(self, input):
        """(B, D, L) -> (B, D, L + 2 P - K + 1), or (B, L, D) -> (B, L + 2 P - K + 1, D), in the input's dtype."""
        op = "FlashDepthWiseConv1d"
        _checks.tensor(op, "input", input, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(op, "input", input, (None, self.d, None) if self.is_bhl else (None, None, self.d))
        padded = input.shape[2 if self.is_bhl else 1] + 2 * self.padding
        if padded < self.k:
            raise ValueError(f"{op}: the padded input must have at least {self.k} tokens, got {padded}")
        around = (self.padding, self.padding)
        x = F.pad(input, around) if self.is_bhl else F.pad(input, (0, 0) + around).transpose(1, 2)
        weights = self.weights if self.is_bhl else self.weights.t()
        with autocast_off(input.device.type):
            if self.k in NATIVE_WIDTHS:  # what lies before the first output comes in as the state
                before, x = x[..., : self.k - 1], x[..., self.k - 1 :]
                out = scalekern.causal_conv1d(x, weights, self.bias, initial_states=before)
            else:
                out = scalekern.fft_conv(x, weights.flip(-1), bias=self.bias)[..., self.k - 1 :]
        return (out if self.is_bhl else out.transpose(1, 2)).contiguous()


VERSIONS = {"flashfftconv": "0.0.0+scalekern"}  # upstream's only one

MODULES = {
    "flashfftconv": {
        "__version__": VERSIONS["flashfftconv"], "FlashFFTConv": FlashFFTConv,
        "FlashDepthWiseConv1d": FlashDepthWiseConv1d,
    },
    "flashfftconv.conv": {"FlashFFTConv": FlashFFTConv},
    "flashfftconv.depthwise_1d": {"FlashDepthWiseConv1d": FlashDepthWiseConv1d},
}  # fmt: skip
