"""Long convolution: public functions, checks, schemas, backends, fakes and gradient.

Shape letters: B batch, D channels, L length, K taps of k, R taps of k_reverse, M output length, T tokens of a chunk.
"""

import functools

import torch

from scalekern import _checks, _dispatch, _library
from scalekern._dispatch import Backend, filling, triton
from scalekern.ops import _fft_conv as blocks
from scalekern.ops import _fft_conv_cpu as kernels
from scalekern.ops import _fft_conv_cuda as fused
from scalekern.reference.fft_conv import MODES, FFTConvSpectrum
from scalekern.reference.fft_conv import fft_conv_bwd as reference_bwd
from scalekern.reference.fft_conv import fft_conv_fwd as reference_fwd

NAME = "fft_conv"
METHODS = ("auto", "direct", "toeplitz", "fft")
PRECISIONS = (None, "ieee", "tf32", "bf16")
INTEGERS = (torch.bool, torch.int32, torch.int64)
_STALE = (-1,)  # the versions of a spectrum that was copied when its filters had been changed


def fft_conv(
    u, k, *, mode="causal", skip=None, pregate=None, postgate=None, k_reverse=None, bias=None, mask=None,
    method="auto", precision=None,
):  # fmt: skip
    """out = postgate (k * v + skip v + bias) with v = u mask pregate, channel by channel. Differentiable.

    Args:
        u: (B, D, L), float64, float32, float16 or bfloat16, any strides.
        k: (D, K), or (B, D, K) a filter for every sample; k[0] meets the current token. K from 1, also beyond L. Or
            what `fft_conv_spectrum` made of such filters for this L, mode and dtype of u.
        mode: "causal" (M = L outputs), "circular" (period L; M = L), "same" (scipy's; M = L) or "full" (M = L + K - 1).
        skip: (D,), multiplies v.   bias: (D,), added before the postgate.
        pregate: (B, D, L).   postgate: (B, D, M).
        k_reverse: (D, R) or (B, D, R): adds sum_s k_reverse[s] v[t + s], so k_reverse[0] meets the current token as
            well (H3's convention). Not with mode "full".
        mask: (B, L) bool or integers, zero where a token is hidden (what lies there may be NaN). No gradient.
        method: "fft", "direct" (sums over the taps), "toeplitz" (products with blocks of the filters' Toeplitz
            matrices), or "auto": what was measured fastest. Gradients are computed by FFT.
        precision: of the products on a GPU: "ieee" (float32, by cuFFT), "tf32" (11 significant bits) or "bf16" (8),
            accumulated in float32; None keeps the tolerance of u's dtype. A CPU always computes in float32 (float64
            for float64 u), and so does what the Triton kernels decline.

    Returns:
        out (B, D, M) in u's dtype (under autocast, the autocast dtype). On a CPU a token that is not finite makes what
        its taps reach not finite, and nothing else, up to 2^30 products of a row and its filter; beyond, and on a GPU,
        its whole row.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Fu et al., Hungry Hungry Hippos, 2023, section 3 (gates and skip); Poli et al., Hyena Hierarchy, 2023;
    Fu et al., FlashFFTConv, 2023.
    """
    spectrum = None
    if isinstance(k, FFTConvSpectrum):
        _check_spectrum(u, k, mode, k_reverse)
        k, k_reverse, spectrum = k.k, k.k_reverse, k.values
    _check(u, k, mode, skip, pregate, postgate, k_reverse, bias, mask, method, precision)
    io = u.dtype
    real = torch.float64 if io == torch.float64 else torch.float32
    mask = mask if mask is None or mask.dtype == torch.bool else mask != 0
    pregate, postgate = _to(pregate, io), _to(postgate, io)
    k, k_reverse, skip, bias = (_to(t, real) for t in (k, k_reverse, skip, bias))
    return fft_conv_fwd(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum)


def fft_conv_spectrum(k, length, mode="causal", *, k_reverse=None, dtype=None):
    """Transform filters once, for many calls `fft_conv(u, spectrum, mode=mode)` with u of that length.

    Args:
        k: (D, K) or (B, D, K), floating, on the device of the calls.   k_reverse: (D, R) or (B, D, R), or None.
        length: L of the calls, from 1.   mode: as of `fft_conv`.
        dtype: of u in the calls; float64 for float64 filters and float32 otherwise when None. Calls in a narrower one
            may take it too, but on a GPU half precision has kernels of its own for some lengths (sm_80: 4,097 to 8,192
            outputs, sm_90: 8,193 to 16,384, sm_100: from 1,025 on), which read only what was made for it.

    Returns:
        FFTConvSpectrum, a frozen record of the filters, length, mode, dtype and `values`: the Hermitian half of the
        spectrum, complex (D, N / 2 + 1), N the size of the FFT, complex128 for float64 and complex64 otherwise; where
        a CPU or Triton kernel will take it, about as many numbers as that kernel wants them, float32 (D, *). Calls on
        another backend than that which made it transform the filters again. Gradients of a call go to the filters,
        exactly as without it. A pytree: it may be an argument of compiled and exported functions. Filters changed in
        place since are refused, except in a compiled function.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: as `fft_conv`; a filter's spectrum is what its every call has in common.
    """
    op = "fft_conv_spectrum"
    _checks.choice(op, "mode", mode, MODES)
    _checks.choice(op, "dtype", dtype, (None, *_checks.FLOATING))
    _checks.tensor(op, "k", k, dims=(2, 3), dtypes=_checks.FLOATING)
    if not isinstance(length, (int, torch.SymInt)) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{op}: length must be an integer of at least 1, got {length!r}")
    if k_reverse is not None:
        _checks.tensor(op, "k_reverse", k_reverse, dims=(2, 3), dtypes=_checks.FLOATING)
        if mode == "full":
            raise ValueError(f"{op}: k_reverse must be None in mode 'full', got a tensor")
        if k_reverse.shape[-2] != k.shape[-2]:
            raise ValueError(f"{op}: k_reverse must have {k.shape[-2]} channels like k, got {tuple(k_reverse.shape)}")
        if k.dim() == k_reverse.dim() == 3 and k_reverse.shape[0] != k.shape[0]:
            raise ValueError(f"{op}: k_reverse must have {k.shape[0]} samples like k, got {tuple(k_reverse.shape)}")
        _checks.same_device(op, "k", k, k_reverse=k_reverse)
    for name, taps in (("k", k), ("k_reverse", k_reverse)):
        if taps is not None and taps.shape[-1] < 1:
            raise ValueError(f"{op}: {name} must have at least one tap, got shape {tuple(taps.shape)}")
    dtype = dtype or (torch.float64 if k.dtype == torch.float64 else torch.float32)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    detached = [None if t is None else t.detach().to(real) for t in (k, k_reverse)]
    values = fft_conv_spectrum_op(*detached, length, mode, dtype)
    return FFTConvSpectrum(k, k_reverse, length, mode, dtype, values, _versions(k, k_reverse))


def _versions(*tensors):
    """How often the tensors were written in place; None where nobody counts."""
    if torch.compiler.is_compiling() or any(t is not None and t.is_inference() for t in tensors):
        return None
    return tuple(0 if t is None else t._version for t in tensors)


def _is_stale(spectrum):
    """Whether the filters were changed since, or had been when this copy was made."""
    if spectrum.versions in (None, _STALE):
        return spectrum.versions is not None
    now = _versions(spectrum.k, spectrum.k_reverse)
    return now is not None and now != spectrum.versions


def _state_of(spectrum):
    return vars(spectrum) | ({"versions": _STALE} if _is_stale(spectrum) else {})


def _restore(spectrum, state):
    """The copies of the filters count from anew."""
    vars(spectrum).update(state)
    if spectrum.versions not in (None, _STALE):
        vars(spectrum)["versions"] = _versions(spectrum.k, spectrum.k_reverse)


# deepcopy, pickle and torch.save. Not in the oracle, whose spectra hold nothing that could become stale.
FFTConvSpectrum.__getstate__, FFTConvSpectrum.__setstate__ = _state_of, _restore


def _check_spectrum(u, spectrum, mode, k_reverse):
    _check_input(NAME, "u", u)
    if k_reverse is not None:
        raise ValueError(f"{NAME}: k_reverse must be None beside a spectrum, which has its own, got a tensor")
    for name, wanted, made in (("mode", mode, spectrum.mode), ("u's length", u.shape[2], spectrum.length)):
        if wanted != made:
            raise ValueError(f"{NAME}: k must be a spectrum for {name} {wanted!r}, got one for {made!r}")
    if _computed_in(u).itemsize > spectrum.dtype.itemsize:
        io, made = str(_computed_in(u))[6:], str(spectrum.dtype)[6:]
        raise TypeError(
            f"{NAME}: k must be a spectrum for {io} u, got one for {made} (make it with dtype=torch.{io})"
        )  # fmt: skip
    if _is_stale(spectrum):
        raise ValueError(f"{NAME}: k must be a spectrum of filters as they are, got one made before they were changed")


def _computed_in(u):
    """The dtype of u, or that to which autocast will cast it."""
    cast = u.dtype != torch.float64 and torch.is_autocast_enabled(u.device.type)
    return torch.get_autocast_dtype(u.device.type) if cast else u.dtype


def fft_conv_chunk(u_chunk, k, state=None):
    """The next tokens of a causal convolution without end: every split of a sequence gives what one call gives.

    Args:
        u_chunk: (B, D, T), T from 0.   k: (D, K) or (B, D, K), K from 1.
        state: (B, D, K - 1), the inputs before the chunk, oldest first; zeros when None.

    Returns:
        out (B, D, T) in u_chunk's dtype, and the state after the chunk, (B, D, K - 1), in the state's dtype.
        Differentiable in every input, through the state too.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: overlap-save, e.g. Oppenheim & Schafer, Discrete-Time Signal Processing, section 8.7.
    """
    _check_input("fft_conv_chunk", "u_chunk", u_chunk)
    return _chunk("fft_conv_chunk", "u_chunk", u_chunk, k, state)


def _chunk(op, name, u_chunk, k, state):
    _check_filter(op, "k", k, u_chunk, name)
    (batch, channels, tokens), history = u_chunk.shape, k.shape[-1] - 1
    if state is None:
        state = u_chunk.new_zeros(batch, channels, history)
    else:
        _checks.tensor(op, "state", state, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(op, "state", state, (batch, channels, history))
        _checks.same_device(op, name, u_chunk, state=state)
    window = torch.cat([_to(state, u_chunk.dtype), u_chunk], -1)
    out = fft_conv(window, k)[..., history:]
    return out, window[..., tokens:].to(state.dtype)


def fft_conv_step(u, k, state=None):
    """One token of a stream: u (B, D) -> (out (B, D), next state (B, D, K - 1)); see `fft_conv_chunk`.

    Args:
        u: (B, D).   k: (D, K) or (B, D, K).   state: (B, D, K - 1) or None.

    Returns:
        (out, next state).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: as `fft_conv_chunk`.
    """
    _checks.tensor("fft_conv_step", "u", u, dims=2, dtypes=_checks.FLOATING)
    out, state = _chunk("fft_conv_step", "u", u[..., None], k, state)
    return out[..., 0], state


def _to(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _check_input(op, name, u):
    _checks.tensor(op, name, u, dims=3, dtypes=_checks.FLOATING)


def _check_filter(op, name, k, u, u_name):
    _checks.tensor(op, name, k, dims=(2, 3), dtypes=_checks.FLOATING)
    batch, channels = u.shape[:2]
    _checks.shape(op, name, k, (channels, None) if k.dim() == 2 else (batch, channels, None))
    if k.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must have at least one tap, got shape {tuple(k.shape)}")
    _checks.same_device(op, u_name, u, **{name: k})


def _check(u, k, mode, skip, pregate, postgate, k_reverse, bias, mask, method, precision):
    _check_input(NAME, "u", u)
    _check_filter(NAME, "k", k, u, "u")
    _checks.choice(NAME, "mode", mode, MODES)
    _checks.choice(NAME, "method", method, METHODS)
    _checks.choice(NAME, "precision", precision, PRECISIONS)
    batch, channels, length = u.shape
    if k_reverse is not None:
        if mode == "full":
            raise ValueError(f"{NAME}: k_reverse must be None in mode 'full', got a tensor")
        _check_filter(NAME, "k_reverse", k_reverse, u, "u")
    count = length + k.shape[-1] - 1 if mode == "full" else length
    for name, gate, size in (("pregate", pregate, length), ("postgate", postgate, count)):
        if gate is not None:
            _checks.tensor(NAME, name, gate, dims=3, dtypes=_checks.FLOATING)
            _checks.shape(NAME, name, gate, (batch, channels, size))
    for name, value in (("skip", skip), ("bias", bias)):
        if value is not None:
            _checks.tensor(NAME, name, value, dims=1, dtypes=_checks.FLOATING)
            _checks.shape(NAME, name, value, (channels,))
    if mask is not None:
        _checks.tensor(NAME, "mask", mask, dims=2, dtypes=INTEGERS)
        _checks.shape(NAME, "mask", mask, (batch, length))
    _checks.same_device(NAME, "u", u, skip=skip, pregate=pregate, postgate=postgate, bias=bias, mask=mask)


def _allocate_fwd(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum):
    """The output, uninitialized: what the fake returns and what the backends fill."""
    if mode != "full":
        return torch.empty_like(u)
    return u.new_empty(u.shape[0], u.shape[1], u.shape[2] + k.shape[-1] - 1)


def _allocate_bwd(dout, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum):
    def like(t):
        return u.new_empty(0) if t is None else torch.empty_like(t)

    return tuple(like(t) for t in (u, k, k_reverse, skip, bias, pregate, postgate))


def _backward(ctx, dout):
    *tensors, mask, spectrum = ctx.saved_tensors
    if dout is None:
        return (None,) * 12
    grads = fft_conv_bwd(dout, *tensors, mask, *ctx.flags, spectrum)
    return *(None if t is None else g for g, t in zip(grads, tensors)), None, None, None, None, None


def _setup_context(ctx, inputs, output):
    *tensors, mode, method, precision, spectrum = inputs
    ctx.flags = (mode, method, precision)
    ctx.save_for_backward(*tensors, spectrum)
    ctx.set_materialize_grads(False)


def _empty_fwd(u, k, *rest):
    return u.numel() == 0


def _empty_bwd(dout, u, k, *rest):
    return u.numel() == 0


@functools.wraps(reference_bwd)
def _reference_bwd(dout, u, *args):
    """Of no tokens by its sums: the oracle's FFT has no size for them."""
    *tensors, method, precision, spectrum = args
    return reference_bwd(dout, u, *tensors, method if u.shape[2] else "direct", precision, spectrum)


_TENSORS = (
    "Tensor u, Tensor k, Tensor? k_reverse, Tensor? skip, Tensor? bias, Tensor? pregate, Tensor? postgate, "
    "Tensor? mask, str mode, str method, str? precision, Tensor? spectrum"
)


def _triton(function):
    """The Triton kernels know no `method`, being what "auto" and "fft" mean."""
    launch = triton("fft_conv_long", function)
    run = lambda *args: launch(*args[:-3], *args[-2:])
    run.triton_module = launch.triton_module
    return run


def _triton_supports(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum):
    if method in ("direct", "toeplitz"):
        return f"method {method!r} was asked for"
    if precision == "ieee":
        return "precision 'ieee' was asked for"
    return triton("fft_conv_long", "supports")(u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, precision)


def _allocate_spectrum(*args):
    """What the backend makes that the dispatcher will choose; a GPU that is not there has none."""
    device = args[0].device.type
    if device == "cpu" or device == "cuda" and torch.cuda.is_available():
        chosen = _dispatch.select(fft_conv_spectrum_op.name, fft_conv_spectrum_op.backends, device, args)
        return getattr(chosen.run, "allocate", _allocate_torch_spectrum)(*args)
    return _allocate_torch_spectrum(*args)


def _allocate_torch_spectrum(k, k_reverse, length, mode, dtype):
    count = length + k.shape[-1] - 1 if mode == "full" else length
    ring = blocks.ring_of(mode, length, count, int(k.shape[-1]), 1 if k_reverse is None else int(k_reverse.shape[-1]))
    lead = k.shape[:-1] if k_reverse is None else torch.broadcast_shapes(k.shape[:-1], k_reverse.shape[:-1])
    whole = k.device.type == "cuda" and ring.size % 2 == 1
    kind = torch.complex128 if k.dtype == torch.float64 else torch.complex64
    return k.new_empty(*lead, ring.size if whole else ring.size // 2 + 1, dtype=kind)


# The blocks are one composition of torch's FFT for every device; they take what the kernels decline: the Triton ones on
# a GPU, the library's own FFTs on a CPU.
fft_conv_fwd = _library.define(
    NAME,
    f"fft_conv_fwd({_TENSORS}) -> Tensor",
    backends=(
        Backend("triton", filling(_allocate_fwd, _triton("fft_conv_fwd")), _triton_supports),
        Backend("cuda", filling(_allocate_fwd, fused.forward), fused.supports),
        Backend("cuda", filling(_allocate_fwd, blocks.forward), composed=True),
        Backend("cpu", filling(_allocate_fwd, kernels.forward), kernels.supports_fwd),
        Backend("cpu", filling(_allocate_fwd, blocks.forward), composed=True),
        Backend("reference", reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=_empty_fwd,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("u", "pregate", "postgate"),
)

fft_conv_bwd = _library.define(
    NAME,
    f"fft_conv_bwd(Tensor dout, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_bwd, _triton("fft_conv_bwd")), lambda dout, *a: _triton_supports(*a)),
        Backend("cuda", filling(_allocate_bwd, blocks.backward), composed=True),
        Backend("cpu", filling(_allocate_bwd, kernels.backward), kernels.supports_bwd),
        Backend("cpu", filling(_allocate_bwd, blocks.backward), composed=True),
        Backend("reference", _reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=_empty_bwd,
)

fft_conv_spectrum_op = _library.define(
    NAME,
    "fft_conv_spectrum(Tensor k, Tensor? k_reverse, int length, str mode, ScalarType dtype) -> Tensor",
    backends=(
        Backend("triton", filling(*(triton("fft_conv_spectrum", f) for f in ("allocate", "fft_conv_spectrum"))),
                triton("fft_conv_spectrum", "supports")),
        Backend("cuda", blocks.spectrum, composed=True),
        Backend("cpu", filling(kernels.allocate_spectrum, kernels.spectrum), kernels.supports_spectrum),
        Backend("cpu", blocks.spectrum, composed=True),
        Backend("reference", blocks.spectrum),
    ),
    fake=_allocate_spectrum,
)


def _flatten(spectrum):
    context = [spectrum.length, spectrum.mode, str(spectrum.dtype)[6:]]
    return [spectrum.k, spectrum.k_reverse, spectrum.values], context


def _unflatten(tensors, context):
    (k, k_reverse, values), (length, mode, dtype) = tensors, context
    return FFTConvSpectrum(k, k_reverse, length, mode, getattr(torch, dtype), values)


torch.utils._pytree.register_pytree_node(
    FFTConvSpectrum,
    _flatten,
    _unflatten,
    serialized_type_name="scalekern.FFTConvSpectrum",
    flatten_with_keys_fn=lambda spectrum: (
        [(torch.utils._pytree.GetAttrKey(name), getattr(spectrum, name)) for name in ("k", "k_reverse", "values")],
        _flatten(spectrum)[1],
    ),
)
