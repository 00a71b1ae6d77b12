"""Sample inputs of the fft_conv family.

Shape letters: B batch, D or C channels, L length, K taps of k, R taps of k_reverse, T tokens, G groups, H heads,
N states, H x W image, I x J filter.
"""

import torch

from scalekern.reference.dwt2d import dwt2d
from scalekern.testing import Sample, Spec


def _conv(B, D, L, K, mode="causal", *, R=None, per_sample=False, reverse_per_sample=False, options=""):
    """options: any of skip, bias, pregate, postgate, mask."""

    def build(f):
        def filters(taps, per_row):
            return f.param(B, D, taps) if per_row else f.param(D, taps)

        M = L + K - 1 if mode == "full" else L
        makers = {
            "skip": lambda: f.param(D),
            "bias": lambda: f.param(D),
            "pregate": lambda: f.io(B, D, L),
            "postgate": lambda: f.io(B, D, M),
            "mask": lambda: _mask(f, B, L),
        }
        kwargs = {name: makers[name]() for name in options.split()}
        if R is not None:
            kwargs["k_reverse"] = filters(R, reverse_per_sample)
        return (f.io(B, D, L), filters(K, per_sample)), {"mode": mode, **kwargs}

    return build


def _mask(f, B, L):
    """About a third hidden, but never all of a row."""
    mask = torch.rand(B, L, generator=f.generator) < 0.67
    mask[:, L // 2] = True
    return mask.to(f.device)


def _chunk(B, D, T, K, *, per_sample=False, state=True):
    def build(f):
        k = f.param(B, D, K) if per_sample else f.param(D, K)
        return (f.io(B, D, T), k, f.io(B, D, K - 1) if state else None), {}

    return build


def _step(B, D, K):
    return lambda f: ((f.io(B, D), f.param(D, K), f.io(B, D, K - 1)), {})


def _toeplitz(B, D, L, K, G):
    return lambda f: ((f.io(B, D, L), f.param(G, K)), {"groups": G} if G < D else {})


def _states(f, H, N, real, imaginary=3.0):
    """(A, B, C, dt) of H stable models."""
    A = -f.positive(H, N)
    if real:
        return A, f.param(H, N), f.param(H, N), f.positive(H, low=0.05, high=0.5)
    A = torch.complex(A, f.param(H, N, scale=imaginary))
    return A, f.complex(H, N), f.complex(H, N), f.positive(H, low=0.05, high=0.5)


def _kernel(H, N, L, disc="zoh", *, real=False, pairs=True, growing=False):
    def build(f):
        A, B, C, dt = _states(f, H, N, real)
        if growing:  # a third of the eigenvalues in the right half-plane, which "dss" is made for
            A = torch.where(torch.arange(N, device=A.device) % 3 == 1, -A, A)
        return (A, B, C, dt, L, disc), {"conjugate_pairs": pairs}

    return build


def _low_rank(H, N, L, R=None, *, pairs=True, truncated=True):
    def build(f):
        Lambda, B, C, dt = _states(f, H, N, False)
        P = f.complex(H, N) if R is None else f.complex(R, H, N)
        return (Lambda, P, B, C, dt, L), {"conjugate_pairs": pairs, "C_is_truncated": truncated}

    return build


def _recurrence(B, H, N, L, disc="zoh", *, real=False, skip=True, state=False, last=True, pairs=True, discrete=False):
    def build(f):
        A, b, C, dt = _states(f, H, N, real)
        if discrete:
            A, dt = torch.exp(dt[:, None] * A), None
        initial = (f.param if real else f.complex)(B, H, N) if state else None
        args = (f.io(B, H, L), A, b, C, f.param(H) if skip else None, dt)
        return args, dict(initial_state=initial, return_last_state=last, disc=disc, conjugate_pairs=pairs)

    return build


def _conv2d(B, C, H, W, I, J, *, bias=False, unit_axis=False, **options):
    def build(f):
        w = f.param(C, 1, I, J) if unit_axis else f.param(C, I, J)
        return (f.io(B, C, H, W), w, f.param(C) if bias else None), options

    return build


def _dwt(B, C, H, W, wavelet, levels, mode):
    return lambda f: ((f.io(B, C, H, W), wavelet, levels, mode), {})


def _idwt(B, C, H, W, wavelet, levels, mode, *, sized=True):
    def build(f):
        shapes = [part.shape for part in dwt2d(torch.zeros(B, C, H, W), wavelet, levels, mode)]
        size = {"size": (H, W)} if sized else {}
        return tuple(f.io(*shape) for shape in shapes), {"wavelet": wavelet, "mode": mode, **size}

    return build


_ALL = "skip bias pregate postgate mask"

SPECS = {
    "fft_conv": Spec(
        (
            Sample("hyena", _conv(2, 5, 37, 37, options="skip pregate postgate")),
            Sample("h3", _conv(2, 4, 23, 23, R=23, options="skip bias pregate postgate")),
            Sample("everything", _conv(2, 3, 13, 9, R=5, options=_ALL)),
            Sample("one_token", _conv(1, 1, 1, 1, options=_ALL)),
            Sample("one_token_long_filter", _conv(2, 3, 1, 4, R=3)),
            Sample("short_filter", _conv(2, 3, 41, 4)),
            Sample("long_filter", _conv(2, 3, 11, 33, R=29, options="bias")),
            Sample("per_sample", _conv(3, 2, 17, 6, R=4, per_sample=True, options="mask")),
            Sample("circular", _conv(2, 3, 12, 12, "circular")),
            Sample("circular_everything", _conv(2, 3, 13, 6, "circular", R=7, options=_ALL)),
            Sample("circular_wraps_thrice", _conv(2, 2, 7, 21, "circular", R=20, per_sample=True)),
            Sample("same_even", _conv(2, 3, 15, 6, "same", R=3, options=_ALL)),
            Sample("same_long_filter", _conv(2, 2, 5, 14, "same", per_sample=True)),
            Sample("full_everything", _conv(2, 3, 11, 7, "full", options=_ALL)),
            Sample("full_long_filter", _conv(2, 2, 4, 12, "full", per_sample=True)),
        ),
        # Up to eight roundings of float16 operands of 2e-4 each: samples, tables and what passes between the factors.
        operand_error=6e-4,
    ),
    "fft_conv_chunk": Spec(
        (
            Sample("first", _chunk(2, 3, 9, 4, state=False)),
            Sample("next", _chunk(2, 3, 9, 4)),
            Sample("shorter_than_the_filter", _chunk(2, 3, 2, 7, per_sample=True)),
            Sample("one_tap", _chunk(1, 2, 5, 1)),
        )
    ),
    "fft_conv_step": Spec((Sample("plain", _step(2, 5, 6)), Sample("one_tap", _step(2, 3, 1)))),
    "toeplitz_conv": Spec(
        (
            Sample("grouped", _toeplitz(2, 6, 37, 7, 2)),
            Sample("depthwise", _toeplitz(2, 3, 65, 33, 3)),
            Sample("long_filter", _toeplitz(1, 4, 5, 16, 2)),
            Sample("one_tap", _toeplitz(2, 2, 3, 1, 2)),
        )
    ),
    "diag_ssm_kernel": Spec(
        (
            Sample("s4d", _kernel(3, 8, 50)),
            Sample("one", _kernel(1, 1, 1)),
            Sample("prime", _kernel(2, 5, 31)),
            Sample("real", _kernel(3, 4, 20, real=True)),
            Sample("bilinear", _kernel(2, 6, 33, "bilinear")),
            Sample("bilinear_real", _kernel(2, 3, 17, "bilinear", real=True)),
            Sample("all_states", _kernel(2, 6, 19, pairs=False)),
            Sample("dss", _kernel(2, 6, 33, "dss", pairs=False)),
            Sample("dss_growing", _kernel(2, 6, 21, "dss", growing=True)),
        ),
        parameters_only=True,
    ),
    "dplr_ssm_kernel": Spec(
        (
            Sample("s4", _low_rank(2, 4, 16)),
            Sample("odd", _low_rank(2, 3, 13)),
            Sample("one", _low_rank(1, 1, 2)),
            Sample("rank_2", _low_rank(2, 3, 12, R=2)),
            Sample("all_states", _low_rank(2, 5, 9, pairs=False)),
            Sample("C", _low_rank(2, 4, 14, R=1, truncated=False)),
        ),
        parameters_only=True,
    ),
    "diag_ssm": Spec(
        (
            Sample("s4d", _recurrence(2, 3, 4, 17)),
            Sample("state", _recurrence(2, 3, 4, 9, state=True)),
            Sample("one_token", _recurrence(1, 1, 1, 1, state=True)),
            Sample("bilinear", _recurrence(2, 2, 5, 12, "bilinear", state=True, skip=False)),
            Sample("real", _recurrence(2, 2, 3, 8, real=True, state=True)),
            Sample("all_states", _recurrence(2, 2, 4, 7, pairs=False, last=False)),
            Sample("discrete", _recurrence(2, 2, 5, 6, state=True, discrete=True)),
        )
    ),
    "depthwise_conv2d": Spec(
        (
            Sample("square", _conv2d(2, 3, 9, 11, 7, 7, bias=True, unit_axis=True)),
            Sample("beyond_the_image", _conv2d(1, 2, 5, 6, 13, 15)),
            Sample("even_strided", _conv2d(2, 2, 9, 7, 3, 6, stride=2)),
            Sample("one", _conv2d(1, 1, 1, 1, 1, 1)),
            Sample("valid", _conv2d(2, 2, 9, 8, 3, 5, bias=True, padding="valid", method="fft")),
            Sample("dilated", _conv2d(2, 2, 12, 11, 3, 3, padding=(2, 3), stride=(1, 2), dilation=(2, 3),
                                      method="fft")),
        )
    ),
    "depthwise_conv_transpose2d": Spec(
        (
            Sample("upsampling", _conv2d(2, 3, 4, 5, 4, 3, bias=True, stride=2, padding=1)),
            Sample("dilated", _conv2d(1, 2, 4, 3, 3, 2, stride=(2, 3), dilation=(2, 1), method="fft")),
            Sample("padded", _conv2d(2, 2, 4, 3, 3, 2, bias=True, stride=(2, 3), padding=(1, 0),
                                     output_padding=(1, 2), method="fft")),
        )
    ),
    "dwt2d": Spec(
        (
            Sample("haar", _dwt(2, 3, 8, 12, "haar", 1, "symmetric")),
            Sample("haar_odd", _dwt(2, 2, 7, 5, "haar", 2, "zero")),
            Sample("db2", _dwt(1, 2, 11, 8, "db2", 2, "symmetric")),
            Sample("db4", _dwt(1, 2, 13, 16, "db4", 2, "periodization")),
            Sample("bior4.4", _dwt(1, 2, 10, 15, "bior4.4", 1, "zero")),
            Sample("one", _dwt(1, 1, 1, 1, "db2", 1, "zero")),
        ),
        dense_oracle=True,
    ),
    "idwt2d": Spec(
        (
            Sample("haar", _idwt(2, 3, 10, 12, "haar", 1, "symmetric", sized=False)),
            Sample("haar_odd", _idwt(2, 2, 7, 5, "haar", 2, "zero")),
            Sample("db4", _idwt(1, 2, 13, 16, "db4", 2, "periodization")),
            Sample("bior4.4", _idwt(1, 2, 10, 15, "bior4.4", 1, "symmetric")),
        ),
        dense_oracle=True,
    ),
}  # fmt: skip
