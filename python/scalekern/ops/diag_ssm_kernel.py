"""The convolution kernel of diagonal state space models (S4D, DSS): public function, checks, schema and gradient.

Shape letters: H heads, N states, L length.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, composed, triton
from scalekern.ops import _diag_ssm
from scalekern.reference._complex import real_dtype
from scalekern.reference.diag_ssm import DISCRETIZATIONS
from scalekern.reference.diag_ssm import diag_ssm_kernel_bwd as reference_bwd
from scalekern.reference.diag_ssm import diag_ssm_kernel_fwd as reference_fwd

NAME = "diag_ssm_kernel"


def diag_ssm_kernel(A, B, C, dt, L, disc="zoh", *, conjugate_pairs=True):
    """K[l] = s Re sum_n C_n a_n^l b_n, the convolution kernel (H, L) of H diagonal state space models. Differentiable.

    (a, b) discretize x' = A x + B u with step dt; with z = dt A:

        disc        a                      b
        "zoh"       e^z                    B (e^z - 1) / A
        "bilinear"  (1 + z/2) / (1 - z/2)  B dt / (1 - z/2)
        "dss"       e^z                    B (e^z - 1) / (A (e^{zL} - 1)): the row softmax over the length, of
                                           which 1 / x is conj(x) / (|x|^2 + 1e-7) as in DSS's code: it has poles

    Args:
        A: (H, N), complex64, complex128 or real. Complex parameters are the halves of conjugate pairs, as S4D has them.
        B, C: (H, N), complex or real, for a real A real.   dt: (H,), real.
        L: length, from 0. With "dss" K depends on L in all of its elements, and eigenvalues with a positive real part
            are normalized by their last power, as DSS does.
        disc: "zoh", "bilinear" or "dss".
        conjugate_pairs: s = 2 for a complex A, which is the sum over both halves; else 1.

    Returns:
        K (H, L) in C's real dtype, at least float32, under autocast too. Powers, or in Triton their exponents, are made
        in float64: float32 results are as accurate at L = 262,144 as at 16.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (S4D), 2022, section 3;
    "dss": Gupta et al., Diagonal State Spaces are as Effective as Structured State Spaces, 2022, proposition 1.
    """
    check_parameters(NAME, A, B, C, dt)
    check_length(NAME, L, 0)
    _checks.choice(NAME, "disc", disc, DISCRETIZATIONS)
    _checks.flag(NAME, "conjugate_pairs", conjugate_pairs)
    return diag_ssm_kernel_fwd(A, B, C, dt, L, disc, conjugate_pairs)


def check_parameters(op, A, B, C, dt, *, discrete=False):
    """discrete: dt may be None."""
    _checks.tensor(op, "A", A, dims=2, dtypes=_checks.FLOATING + _checks.COMPLEX)
    for name, x in (("B", B), ("C", C)):
        _checks.tensor(op, name, x, dims=2, dtypes=_checks.FLOATING + (_checks.COMPLEX if A.is_complex() else ()))
        _checks.shape(op, name, x, A.shape)
    if dt is not None or not discrete:
        check_dt(op, dt, A.shape[0])
    _checks.same_device(op, "A", A, B=B, C=C, dt=dt)


def check_dt(op, dt, heads):
    _checks.tensor(op, "dt", dt, dims=1, dtypes=_checks.FLOATING)
    _checks.shape(op, "dt", dt, (heads,))


def check_length(op, L, least):
    if not isinstance(L, (int, torch.SymInt)) or isinstance(L, bool) or L < least:
        raise ValueError(f"{op}: L must be an integer of at least {least}, got {L!r}")


def _allocate_fwd(A, B, C, dt, L, disc, conjugate_pairs):
    """The output, uninitialized: what the fake returns."""
    return C.new_empty(A.shape[0], L, dtype=real_dtype(C))


def _allocate_bwd(dout, A, B, C, dt, disc, conjugate_pairs):
    return tuple(x.new_empty(x.shape) for x in (A, B, C, dt))


def _setup_context(ctx, inputs, output):
    *tensors, _, disc, conjugate_pairs = inputs
    ctx.options = disc, conjugate_pairs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    return *diag_ssm_kernel_bwd(dout, *ctx.saved_tensors, *ctx.options), None, None, None


_fwd, _bwd = (_library.without_autocast(f) for f in (_diag_ssm.kernel_fwd, _diag_ssm.kernel_bwd))

diag_ssm_kernel_fwd = _library.define(
    NAME,
    "diag_ssm_kernel_fwd(Tensor A, Tensor B, Tensor C, Tensor dt, SymInt L, str disc, bool conjugate_pairs) -> Tensor",
    backends=(Backend("triton", triton(NAME, "diag_ssm_kernel_fwd")), *composed(_fwd, reference_fwd)),
    fake=_allocate_fwd,
    empty=lambda A, B, C, dt, L, *rest: A.numel() == 0 or L == 0,
    setup_context=_setup_context,
    backward=_backward,
)

diag_ssm_kernel_bwd = _library.define(
    NAME,
    "diag_ssm_kernel_bwd(Tensor dout, Tensor A, Tensor B, Tensor C, Tensor dt, str disc, bool conjugate_pairs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    backends=(Backend("triton", triton(NAME, "diag_ssm_kernel_bwd")), *composed(_bwd, reference_bwd)),
    fake=_allocate_bwd,
    empty=lambda dout, A, *rest: A.numel() == 0 or dout.numel() == 0,
)
