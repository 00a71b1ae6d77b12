"""Diagonal state space models as a recurrence with states: public function, checks, schema, backends and gradient.

Shape letters: B batch, H heads, N states, L length.
"""

import functools

import torch

from scalekern import _checks, _library
from scalekern._dispatch import composed
from scalekern.ops._diag_ssm_chunks import METHODS, composed_bwd, composed_fwd
from scalekern.ops.diag_ssm_kernel import check_parameters
from scalekern.ops.fft_conv import fft_conv_bwd, fft_conv_fwd
from scalekern.reference.diag_ssm import DISCRETIZATIONS, state_dtype
from scalekern.reference.diag_ssm import diag_ssm_bwd as reference_bwd
from scalekern.reference.diag_ssm import diag_ssm_discretize as reference_discretize
from scalekern.reference.diag_ssm import diag_ssm_fwd as reference_fwd

NAME = "diag_ssm"


def diag_ssm(
    u, A, B, C, D, dt, *, initial_state=None, return_last_state=False, disc="zoh", conjugate_pairs=True, method="auto"
):  # fmt: skip
    """x_t = a x_{t-1} + b u_t, y_t = s Re(C x_t) + D u_t, head by head. Differentiable in every tensor.

    (a, b) discretize x' = A x + B u with step dt, as for `diag_ssm_kernel`: without a state y is the causal convolution
    of u with that kernel. With states a sequence can be split anywhere, down to one token at a time.

    Args:
        u: (B, H, L), float64, float32, float16 or bfloat16, any strides.
        A: (H, N), complex64, complex128 or real.   B, C: (H, N), complex or real, for a real A real.
        D: (H,) or None.   dt: (H,), real; None when A and B are a and b, which `diag_ssm_discretize` makes: for
            decoding, which would make them anew for every token.
        initial_state: (B, H, N), x before the first token; zeros when None. Real for a real A.
        return_last_state: also return x after the last token.
        disc: "zoh" or "bilinear", unless dt is None.   conjugate_pairs: s = 2 for a complex A, else 1.
        method: "scan" (token by token, in double, or in short chunks on a GPU), "conv" (chunks as long as an FFT is
            fast), or "auto", the faster one: a scan for short sequences, and with states on a CPU.

    Returns:
        y (B, H, L) in u's dtype; with `return_last_state` also (B, H, N), in initial_state's dtype (for a complex A the
        complex one of at least its precision), or else complex (real for a real A) of float32, of float64 for a
        float64 u.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: as `diag_ssm_kernel`; the states between chunks: Fu et al., Hungry Hungry Hippos, 2023, section 4.2.
    """
    _check(u, A, B, C, D, dt, initial_state)
    _checks.choice(NAME, "disc", disc, DISCRETIZATIONS[:2])
    _checks.choice(NAME, "method", method, METHODS)
    _checks.flag(NAME, "conjugate_pairs", conjugate_pairs)
    _checks.flag(NAME, "return_last_state", return_last_state)
    if initial_state is not None and A.is_complex() and not initial_state.is_complex():
        # The last state comes in the first one's dtype, and would lose its imaginary part.
        initial_state = initial_state.to(torch.promote_types(initial_state.dtype, torch.complex64))
    out, last = diag_ssm_fwd(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, method, return_last_state)
    return (out, last) if return_last_state else out


def diag_ssm_discretize(A, B, dt, disc="zoh"):
    """(a, b) of x_t = a x_{t-1} + b u_t, once for many calls `diag_ssm(u, a, b, C, D, None)`. Differentiable.

    Args:
        A: (H, N), complex64, complex128 or real.   B: (H, N), complex or real, for a real A real.
        dt: (H,), real.   disc: "zoh" or "bilinear".

    Returns:
        a and b, (H, N), complex128, for a real A float64: an error of a would grow with the memory of the state.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: as `diag_ssm_kernel`.
    """
    op = "diag_ssm_discretize"
    check_parameters(op, A, B, B, dt)
    _checks.choice(op, "disc", disc, DISCRETIZATIONS[:2])
    return reference_discretize(A, B, dt, disc)


@_checks.remembered
def _check(u, A, B, C, D, dt, initial_state):
    _checks.tensor(NAME, "u", u, dims=3, dtypes=_checks.FLOATING)
    check_parameters(NAME, A, B, C, dt, discrete=True)
    heads, states = A.shape
    _checks.shape(NAME, "u", u, (None, heads, None))
    if D is not None:
        _checks.tensor(NAME, "D", D, dims=1, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "D", D, (heads,))
    if initial_state is not None:
        allowed = _checks.FLOATING + (_checks.COMPLEX if A.is_complex() else ())
        _checks.tensor(NAME, "initial_state", initial_state, dims=3, dtypes=allowed)
        _checks.shape(NAME, "initial_state", initial_state, (u.shape[0], heads, states))
    _checks.same_device(NAME, "u", u, A=A, D=D, initial_state=initial_state)


def _allocate_fwd(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, method, return_last_state):
    """The outputs, uninitialized: what the fake returns."""
    shape = (u.shape[0], *A.shape) if return_last_state else (0,)
    return u.new_empty(u.shape), u.new_empty(shape, dtype=state_dtype(u, A, initial_state))


def _allocate_bwd(dout, dlast_state, u, A, B, C, D, dt, initial_state, *options):
    tensors = (u, A, B, C, D, dt, initial_state)
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _setup_context(ctx, inputs, output):
    *tensors, disc, conjugate_pairs, method, ctx.stateful = inputs
    ctx.options = disc, conjugate_pairs, method
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlast_state):
    tensors = ctx.saved_tensors
    if dout is None and dlast_state is None:
        return (None,) * 11
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    grads = diag_ssm_bwd(dout, dlast_state if ctx.stateful else None, *tensors, *ctx.options)
    return *(None if t is None else g for g, t in zip(grads, tensors)), None, None, None, None


def _empty_fwd(u, A, *rest):
    return u.numel() == 0 or A.numel() == 0


def _empty_bwd(dout, dlast_state, u, A, *rest):
    return u.numel() == 0 or A.numel() == 0


_fwd = _library.without_autocast(functools.partial(composed_fwd, conv=fft_conv_fwd))
_bwd = _library.without_autocast(functools.partial(composed_bwd, conv=fft_conv_fwd, conv_bwd=fft_conv_bwd))
_TENSORS = "Tensor u, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt, Tensor? initial_state"
_OPTIONS = "str disc, bool conjugate_pairs, str method"

# One composition for every device: the convolution inside it chooses its own backend.
diag_ssm_fwd = _library.define(
    NAME,
    f"diag_ssm_fwd({_TENSORS}, {_OPTIONS}, bool return_last_state) -> (Tensor, Tensor)",
    backends=composed(_fwd, reference_fwd),
    fake=_allocate_fwd,
    empty=_empty_fwd,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("u",),
)

diag_ssm_bwd = _library.define(
    NAME,
    f"diag_ssm_bwd(Tensor dout, Tensor? dlast_state, {_TENSORS}, {_OPTIONS}) -> (" + ", ".join(["Tensor"] * 7) + ")",
    backends=composed(_bwd, reference_bwd),
    fake=_allocate_bwd,
    empty=_empty_bwd,
)
