"""Oracle of the long convolution, of its streaming forms and of the grouped short filter, forward and backward.

Shape letters: B batch, D channels, L length, K taps of k, R taps of k_reverse, M output length, T tokens of a chunk,
G groups.

    v[t]   = u[t] mask[t] pregate[t]
    y[t]   = sum_s k[s] v[t + o - s] + sum_s k_reverse[s] v[t + s] + skip v[t] + bias
    out[t] = y[t] postgate[t]

    mode      M          o              v outside 0 .. L - 1
    causal    L          0              zero
    circular  L          0              v[t mod L]: taps beyond L wrap around, as often as they reach
    same      L          (K - 1) // 2   zero; scipy.signal.convolve(v, k, "same"), the same formula where K > L
    full      L + K - 1  0              zero; skip v lies at 0 .. L - 1, bias and postgate everywhere, no k_reverse

Computed as sums over the taps, without an FFT, in float32, or in float64 for float64 inputs. `method="fft"` computes
the same sums by complex128 FFTs whatever the inputs: for lengths that the direct sums cannot reach (1M), and for
nothing else, because the oracle of an FFT kernel must not be one. Any other `method` means the direct sums.
"""

import dataclasses

import torch
import torch.nn.functional as F

MODES = ("causal", "circular", "same", "full")


@dataclasses.dataclass(frozen=True, eq=False)
class FFTConvSpectrum:
    """Filters together with their transform, for calls of one geometry; made by `fft_conv_spectrum`.

    The filters themselves are kept: gradients go to them, and sums over taps take them.
    """

    k: torch.Tensor  # (D, K) or (B, D, K)
    k_reverse: torch.Tensor | None
    length: int
    mode: str
    dtype: torch.dtype  # of u, or wider
    # Complex (D, N / 2 + 1) or (B, D, N / 2 + 1), the Hermitian half; float32 as a kernel wants it; None in the oracle.
    values: torch.Tensor | None
    versions: tuple[int, ...] | None = None  # of the filters' memory when they were transformed, where torch counts


_BLOCK = 1 << 18  # elements of one block of products: 2 MiB in float64, which stays in a second-level cache


def fft_conv(
    u, k, *, mode="causal", skip=None, pregate=None, postgate=None, k_reverse=None, bias=None, mask=None,
    method="auto", precision=None,
):  # fmt: skip
    """Same arguments and result as scalekern.fft_conv; only `method` "fft" changes how. Differentiable by autograd.

    Args:
        u: (B, D, L), floating.
        k: (D, K), or (B, D, K) a filter for every sample; k[0] meets the current token. K from 1, also beyond L. Or
            an FFTConvSpectrum, which brings k_reverse with it.
        mode: "causal", "circular", "same" or "full", see the module.
        skip: (D,), multiplies the gated input v, not u.   bias: (D,), added before the postgate.
        pregate: (B, D, L).   postgate: (B, D, M).
        k_reverse: (D, R) or (B, D, R), the anticausal filter: k_reverse[0] meets the current token as well (H3).
        mask: (B, L), bool or a number to multiply with; not differentiable. What a false hides may be NaN.

    Returns:
        out (B, D, M) in u's dtype.

    Raises:
        ValueError: an unknown mode, or k_reverse in mode "full", whose output has no room for it.

    Source: Fu et al., Hungry Hungry Hippos, 2023, section 3 (gates and skip); Poli et al., Hyena Hierarchy, 2023.
    """
    if isinstance(k, FFTConvSpectrum):
        k, k_reverse = k.k, k.k_reverse
    return fft_conv_fwd(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method)


def fft_conv_spectrum(k, length, mode="causal", *, k_reverse=None, dtype=None):
    """What scalekern.fft_conv_spectrum returns, with nothing transformed: the oracle needs the filters only."""
    dtype = dtype or (torch.float64 if k.dtype == torch.float64 else torch.float32)
    return FFTConvSpectrum(k, k_reverse, length, mode, dtype, None)


def fft_conv_fwd(
    u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method="direct", precision=None, spectrum=None
):  # fmt: skip
    """out (B, D, M). precision and spectrum are what kernels compute with: nothing here."""
    real = _wide(u, method)
    u_, gate = _operands(u, pregate, mask, real)
    y = convolve(u_ * gate, k, k_reverse, skip, bias, mode, method)
    return (y if postgate is None else y * postgate.to(real)).to(u.dtype)


def fft_conv_bwd(
    dout, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method="direct", precision=None, spectrum=None
):  # fmt: skip
    """(du, dk, dk_reverse, dskip, dbias, dpregate, dpostgate); an absent input's gradient is empty (0,).

    dy     = dout postgate                      dpostgate = dout y
    dv[t]  = sum_s k[s] dy[t - o + s] + sum_s k_reverse[s] dy[t - s] + skip dy[t]
    dk[s]  = sum_t dy[t] v[t + o - s]           dk_reverse[s] = sum_t dy[t] v[t + s]
    dskip  = sum_t dy[t] v[t]                   dbias         = sum_t dy[t]
    du     = dv mask pregate                    dpregate      = dv mask u
    """
    real = _wide(u, method)
    length, taps = u.shape[2], k.shape[-1]
    offset, count, period = _geometry(mode, length, taps, k_reverse)
    u_, gate = _operands(u, pregate, mask, real)
    v = u_ * gate
    dy = dout.to(real) if postgate is None else dout.to(real) * postgate.to(real)
    near = dy[..., :length]  # where v lies under dy: all of it, but for mode "full"
    dv = correlate(dy, _rows(k, real), -offset, length, period, method)
    dk = correlate(v, dy, offset - taps + 1, taps, period, method).flip(-1)
    if k_reverse is not None:
        dv = dv + correlate(dy, _rows(k_reverse, real).flip(-1), 1 - k_reverse.shape[-1], length, period, method)
        dk_reverse = correlate(v, dy, 0, k_reverse.shape[-1], period, method)
    if skip is not None:
        dv = dv + skip.to(real)[:, None] * near
    absent = u.new_empty(0)
    return (
        _masked(dv * gate, mask).to(u.dtype),
        _reduced(dk, k),
        absent if k_reverse is None else _reduced(dk_reverse, k_reverse),
        absent if skip is None else (near * v).sum((0, 2)).to(skip.dtype),
        absent if bias is None else dy.sum((0, 2)).to(bias.dtype),
        absent if pregate is None else (dv * u_).to(pregate.dtype),
        absent if postgate is None
        else (dout.to(real) * convolve(v, k, k_reverse, skip, bias, mode, method)).to(postgate.dtype),
    )  # fmt: skip


def fft_conv_chunk(u_chunk, k, state=None):
    """The next tokens of a causal convolution without end: every split of a sequence gives what one call gives.

    Args:
        u_chunk: (B, D, T), T from 0.   k: (D, K) or (B, D, K).
        state: (B, D, K - 1), the inputs before the chunk, oldest first; zeros when None.

    Returns:
        out (B, D, T) in u_chunk's dtype, and the state after the chunk in the state's.
    """
    real = _wide(u_chunk)
    state = _empty_state(u_chunk, k) if state is None else state
    window = torch.cat([state.to(real), u_chunk.to(real)], -1)
    out = correlate(window, _rows(k, real).flip(-1), 0, u_chunk.shape[2])
    return out.to(u_chunk.dtype), window[..., u_chunk.shape[2] :].to(state.dtype)


def fft_conv_chunk_bwd(dout, dnext_state, u_chunk, k, state):
    """(du_chunk, dk, dstate), dstate empty (0,) without a state; dout or dnext_state may be None.

    With w the inputs behind each other, state and chunk:  dw[j] = sum_s k[s] dout[j - (K - 1) + s] + dnext_state[j - T]
    """
    real = _wide(u_chunk)
    tokens, history = u_chunk.shape[2], k.shape[-1] - 1
    dy = torch.zeros_like(u_chunk, dtype=real) if dout is None else dout.to(real)
    window = torch.cat([(_empty_state(u_chunk, k) if state is None else state).to(real), u_chunk.to(real)], -1)
    dwindow = correlate(dy, _rows(k, real), -history, tokens + history)
    if dnext_state is not None:
        dwindow = dwindow + F.pad(dnext_state.to(real), (tokens, 0))
    dk = correlate(window, dy, 0, history + 1).flip(-1)
    dstate = u_chunk.new_empty(0) if state is None else dwindow[..., :history].to(state.dtype)
    return dwindow[..., history:].to(u_chunk.dtype), _reduced(dk, k), dstate


def fft_conv_step(u, k, state=None):
    """One token: u (B, D) -> (out (B, D), next state (B, D, K - 1)); see fft_conv_chunk."""
    out, state = fft_conv_chunk(u[..., None], k, state)
    return out[..., 0], state


def toeplitz_conv(u, k, groups=None):
    """Causal convolution with a filter for every group of D / G neighbouring channels: fft_conv with k repeated.

    Args:
        u: (B, D, L).   k: (G, K), G divides D.
        groups: G, None for k's.

    Returns:
        out (B, D, L) in u's dtype.

    Raises:
        ValueError: `groups` is not the number of k's filters, or does not divide D.

    Source: Ku et al., Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale (StripedHyena 2),
    2025: the grouped filters, and the two-pass block form that the kernels compute.
    """
    return fft_conv(u, _ungrouped(u, k, groups))


def toeplitz_conv_bwd(dout, u, k, groups=None):
    """(du, dk)."""
    du, dk, *_ = fft_conv_bwd(dout, u, _ungrouped(u, k, groups), *[None] * 6, "causal")
    return du, dk.unflatten(0, (k.shape[0], -1)).sum(1).to(k.dtype)


def _ungrouped(u, k, groups):
    groups, channels = k.shape[0] if groups is None else groups, u.shape[1]
    if groups != k.shape[0]:
        raise ValueError(f"toeplitz_conv: k must have {groups} filters like groups, got shape {tuple(k.shape)}")
    if groups < 1 or channels % groups:
        raise ValueError(f"toeplitz_conv: groups must divide the {channels} channels of u, got {groups}")
    # In the wide dtype, so that the gradient of a group is rounded once and not once a channel.
    return k.to(torch.promote_types(k.dtype, torch.float32)).repeat_interleave(channels // groups, 0)


def _wide(u, method="direct"):
    return torch.float64 if u.dtype == torch.float64 or method == "fft" else torch.float32


def _geometry(mode, length, taps, k_reverse):
    """(o, M, period or None)."""
    if mode not in MODES:
        raise ValueError(f"fft_conv: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "full" and k_reverse is not None:
        raise ValueError("fft_conv: k_reverse must be None in mode 'full', got a tensor")
    offset = (taps - 1) // 2 if mode == "same" else 0
    count = length + taps - 1 if mode == "full" else length
    return offset, count, (length or None) if mode == "circular" else None


def _masked(x, mask):
    """x (B, D, L) under a mask (B, L). A boolean one replaces, so that NaN and Inf in padding go nowhere."""
    if mask is None:
        return x
    mask = mask.detach()[:, None]
    return torch.where(mask, x, 0) if mask.dtype == torch.bool else x * mask.to(x.dtype)


def _operands(u, pregate, mask, real):
    """(u mask, pregate), whose product is v; what a boolean mask hides is zero in both."""
    gate = u.new_ones((), dtype=real) if pregate is None else pregate.to(real)
    hides = mask is not None and mask.dtype == torch.bool
    return _masked(u.to(real), mask), _masked(gate, mask) if hides else gate


def convolve(v, k, k_reverse, skip, bias, mode, method):
    """y (B, D, M), before the postgate."""
    length, taps = v.shape[2], k.shape[-1]
    offset, count, period = _geometry(mode, length, taps, k_reverse)
    y = correlate(v, _rows(k, v.dtype).flip(-1), offset - taps + 1, count, period, method)
    if k_reverse is not None:
        y = y + correlate(v, _rows(k_reverse, v.dtype), 0, count, period, method)
    if skip is not None:
        y = y + F.pad(skip.to(v.dtype)[:, None] * v, (0, count - length))
    return y if bias is None else y + bias.to(v.dtype)[:, None]


def correlate(a, b, start, count, period=None, method="direct"):
    """r[i] = sum_j b[j] a[start + i + j] for 0 <= i < count; a is zero beyond its ends, or has a period.

    a (B, D, *), b (B or 1, D, J) -> (B, D, count). The one sum that all forward and backward convolutions are.
    """
    taps = b.shape[-1]
    span = count + taps - 1
    if period is None:
        a = F.pad(a, (-start, start + span - a.shape[-1]))
    else:
        a = a[..., torch.arange(start, start + span, device=a.device) % period]
    if method == "fft" and a.numel():  # MKL refuses to transform no rows
        size = 1 << max(span - 1, 1).bit_length()
        return torch.fft.irfft(torch.fft.rfft(a, size) * torch.fft.rfft(b, size).conj(), size)[..., :count]
    block = max(1, _BLOCK // max(1, a.shape[0] * a.shape[1] * count))
    total = a.new_zeros(*a.shape[:2], count)
    for j in range(0, taps, block):
        part = b[..., j : j + block, None]
        # [B, D, taps of the block, count], a view: autograd keeps it without its memory.
        windows = a[..., j : j + part.shape[2] + count - 1].unfold(-1, count, 1)
        total = total + (windows * part).sum(-2)
    return total


def _rows(k, real):
    """k as (B or 1, D, K)."""
    return (k if k.dim() == 3 else k[None]).to(real)


def _reduced(dk, k):
    """The gradient (B, D, K) of a filter, summed over the samples that shared it."""
    return (dk if k.dim() == 3 else dk.sum(0)).to(k.dtype)


def _empty_state(u, k):
    return u.new_zeros(*u.shape[:2], k.shape[-1] - 1)
