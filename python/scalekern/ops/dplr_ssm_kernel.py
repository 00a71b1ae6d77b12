"""S4's convolution kernel, of a diagonal plus low-rank state matrix: public function, checks, schema and gradient.

Shape letters: H heads, N states, L length, R rank.
"""

from scalekern import _checks, _library
from scalekern._dispatch import composed
from scalekern.ops import _dplr_ssm
from scalekern.ops.diag_ssm_kernel import check_dt, check_length
from scalekern.reference._complex import real_dtype
from scalekern.reference.dplr_ssm import dplr_ssm_kernel_bwd as reference_bwd
from scalekern.reference.dplr_ssm import dplr_ssm_kernel_fwd as reference_fwd
from scalekern.reference.dplr_ssm import truncate_C as reference_truncate_C

NAME = "dplr_ssm_kernel"


def dplr_ssm_kernel(Lambda, P, B, C, dt, L, *, conjugate_pairs=True, C_is_truncated=False):
    """K[l] = Re(C a^l b), l < L, of A = diag(Lambda) - sum_r P_r P_r^H under the bilinear transform (S4).

    Differentiable in Lambda, P, B, C and dt.

    Args:
        Lambda, B, C: (H, N), complex64 or complex128.   P: (H, N), or (R, H, N) for rank R.   dt: (H,), real.
        L: length, from 1.
        conjugate_pairs: the N states are the halves of 2 N states in conjugate pairs, in all four parameters.
        C_is_truncated: C is already C (I - a^L), which S4 trains in place of C (`truncate_C`). Else this is computed
            first, by dense powers: log2(L) products of (2 N, 2 N) matrices a head, more than all the rest.

    Returns:
        K (H, L) in C's real dtype, under autocast too. NaN if a Lambda_n on the imaginary axis falls on a root of
        unity, as 0 always does; S4 keeps Re(Lambda) at -1e-4 or below.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu et al., Efficiently Modeling Long Sequences with Structured State Spaces (S4), 2022, section 3 and
    appendix C.
    """
    _check(NAME, Lambda, P, dt, L, conjugate_pairs, B=B, C=C)
    _checks.flag(NAME, "C_is_truncated", C_is_truncated)
    truncated = C if C_is_truncated else reference_truncate_C(Lambda, P, C, dt, L, conjugate_pairs)
    out = dplr_ssm_kernel_fwd(Lambda, P, B, truncated, dt, L, conjugate_pairs)
    return out if out.dtype == real_dtype(C) else out.to(real_dtype(C))


def truncate_C(Lambda, P, C, dt, L, conjugate_pairs=True):
    """C (I - a^L), what `dplr_ssm_kernel` takes for C with `C_is_truncated`. Differentiable by autograd.

    Args:
        Lambda, P, C, dt, L, conjugate_pairs: as of `dplr_ssm_kernel`.

    Returns:
        (H, N), complex128: by dense powers, log2(L) products of (2 N, 2 N) matrices a head.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu et al., S4, 2022, appendix C.
    """
    _check("truncate_C", Lambda, P, dt, L, conjugate_pairs, C=C)
    return reference_truncate_C(Lambda, P, C, dt, L, conjugate_pairs)


def _check(op, Lambda, P, dt, L, conjugate_pairs, **vectors):
    _checks.tensor(op, "Lambda", Lambda, dims=2, dtypes=_checks.COMPLEX)
    shape = Lambda.shape
    _checks.tensor(op, "P", P, dims=(2, 3), dtypes=_checks.COMPLEX)
    _checks.shape(op, "P", P, tuple(shape), (None, *shape))
    for name, x in vectors.items():
        _checks.tensor(op, name, x, dims=2, dtypes=_checks.COMPLEX)
        _checks.shape(op, name, x, shape)
    check_dt(op, dt, shape[0])
    check_length(op, L, 1)
    _checks.flag(op, "conjugate_pairs", conjugate_pairs)
    _checks.same_device(op, "Lambda", Lambda, P=P, dt=dt, **vectors)


def _allocate_fwd(Lambda, P, B, C, dt, L, conjugate_pairs):
    """The output, uninitialized: what the fake returns."""
    return C.new_empty(Lambda.shape[0], L, dtype=real_dtype(C))


def _allocate_bwd(dout, Lambda, P, B, C, dt, conjugate_pairs):
    return tuple(x.new_empty(x.shape) for x in (Lambda, P, B, C, dt))


def _setup_context(ctx, inputs, output):
    *tensors, _, conjugate_pairs = inputs
    ctx.conjugate_pairs = conjugate_pairs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    return *dplr_ssm_kernel_bwd(dout, *ctx.saved_tensors, ctx.conjugate_pairs), None, None


_fwd, _bwd = (_library.without_autocast(f) for f in (_dplr_ssm.kernel_fwd, _dplr_ssm.kernel_bwd))

dplr_ssm_kernel_fwd = _library.define(
    NAME,
    "dplr_ssm_kernel_fwd(Tensor Lambda, Tensor P, Tensor B, Tensor C, Tensor dt, SymInt L, bool conjugate_pairs) "
    "-> Tensor",
    backends=composed(_fwd, reference_fwd),
    fake=_allocate_fwd,
    empty=lambda Lambda, P, *rest: Lambda.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
)

dplr_ssm_kernel_bwd = _library.define(
    NAME,
    "dplr_ssm_kernel_bwd(Tensor dout, Tensor Lambda, Tensor P, Tensor B, Tensor C, Tensor dt, bool conjugate_pairs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=composed(_bwd, reference_bwd),
    fake=_allocate_bwd,
    empty=lambda dout, Lambda, *rest: Lambda.numel() == 0,
)
