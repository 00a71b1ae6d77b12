"""Multi-level 2-D wavelet transform and its inverse: public functions, checks, schemas, backends and gradients.

Shape letters: B batch, C channels, H x W image, P x Q coefficients.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import composed
from scalekern.ops import _wavelets
from scalekern.reference.dwt2d import MODES, WAVELETS, filters
from scalekern.reference.dwt2d import dwt2d_bwd_op as reference_bwd
from scalekern.reference.dwt2d import dwt2d_fwd as reference_fwd
from scalekern.reference.dwt2d import idwt2d_bwd_op as reference_inverse_bwd
from scalekern.reference.dwt2d import idwt2d_fwd_op as reference_inverse_fwd

NAME, INVERSE = "dwt2d", "idwt2d"


def dwt2d(x, wavelet="haar", levels=1, mode="symmetric"):
    """y[a, b] = M_a x M_b^T, M_0 and M_1 low-pass and high-pass, every second one kept; again on y[0, 0].

    Differentiable in x.

    Args:
        x: (B, C, H, W), float64, float32, float16 or bfloat16, any size from 1, any strides.
        wavelet: "haar" (also "db1"), "db2", "db4", "bior1.3", "bior2.2" or "bior4.4".
        levels: how often the low-pass part is transformed again, from 1.
        mode: what lies beyond the image: "symmetric" (mirrored, the edge repeated), "zero", or "periodization"
            (periodic, after an odd size is made even by repeating its last row or column).

    Returns:
        (low, details of the coarsest level, .., details of the finest): low (B, C, P, Q), details (B, C, 3, P, Q), the
        horizontal, vertical and diagonal ones, PyWavelets' cH (high-pass along H), cV (along W), cD, in x's dtype.
        P = (H + F - 1) // 2 with a filter of F taps, (H + 1) // 2 for "periodization". pywt.wavedec2's order;
        idwt2d(*dwt2d(x)) is x, up to the row and column that an odd size gains.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value, named in the message.

    Source: Mallat, A theory for multiresolution signal decomposition, 1989; bior: Cohen, Daubechies & Feauveau, 1992.
    """
    _checks.tensor(NAME, "x", x, dims=4, dtypes=_checks.FLOATING)
    _check_filter(NAME, wavelet, mode)
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 1:
        raise ValueError(f"{NAME}: levels must be an integer of at least 1, got {levels!r}")
    if 0 in x.shape[2:]:
        raise ValueError(f"{NAME}: x must have at least one row and column, got shape {tuple(x.shape)}")
    return tuple(dwt2d_fwd(x, wavelet, levels, mode))


def idwt2d(low, *details, wavelet="haar", mode="symmetric", size=None):
    """x = sum_ab S_a y[a, b] S_b^T, level by level from the coarsest: the inverse of dwt2d.

    idwt2d(*dwt2d(x, wavelet, levels, mode), wavelet=wavelet, mode=mode, size=x.shape[-2:]) is x. Differentiable in
    every coefficient.

    Args:
        low, details: what dwt2d returns, float64, float32, float16 or bfloat16.   wavelet, mode: as there.
        size: (H, W) of the image, where one of them is odd; without it both are even, one more where they were odd.

    Returns:
        x (B, C, H, W) in low's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value, named in the message; no details;
            coefficients of sizes that do not belong together.

    Source: Mallat, A theory for multiresolution signal decomposition, 1989.
    """
    _check_filter(INVERSE, wavelet, mode)
    _checks.tensor(INVERSE, "low", low, dims=4, dtypes=_checks.FLOATING)
    if not details:
        raise ValueError(f"{INVERSE}: details must have at least one level, got none")
    if 0 in low.shape[2:]:
        raise ValueError(f"{INVERSE}: low must have at least one row and column, got shape {tuple(low.shape)}")
    taps, expected, sizes = len(filters(wavelet)[0]), tuple(low.shape[2:]), []
    for i, detail in enumerate(details):
        name = f"details[{i}]"
        _checks.tensor(INVERSE, name, detail, dims=5, dtypes=_checks.FLOATING)
        _checks.shape(INVERSE, name, detail, (*low.shape[:2], 3, *expected))
        full = tuple(_wavelets.full_size(n, taps, mode) for n in expected)
        last = i + 1 == len(details)
        wanted = (full if size is None else size) if last else _size_of(details[i + 1])
        _check_size("size" if last else f"details[{i + 1}]", wanted, full)
        expected = tuple(wanted)
        sizes += expected
    _checks.same_device(INVERSE, "low", low, **{f"details[{i}]": d for i, d in enumerate(details)})
    return idwt2d_fwd(low, list(details), wavelet, mode, sizes)


def _check_filter(op, wavelet, mode):
    _checks.choice(op, "wavelet", wavelet, tuple(WAVELETS))
    _checks.choice(op, "mode", mode, MODES)


def _size_of(detail):
    return detail.shape[-2:] if hasattr(detail, "shape") and len(detail.shape) >= 2 else None


def _check_size(name, wanted, full):
    pair = isinstance(wanted, (tuple, list, torch.Size)) and len(wanted) == 2
    pair = pair and all(isinstance(n, (int, torch.SymInt)) for n in wanted)
    if not pair or any(f < 1 or not f - 1 <= n <= f or n < 1 for n, f in zip(wanted, full)):
        got = tuple(wanted) if pair else wanted
        raise ValueError(f"{INVERSE}: {name} must have rows and columns {full} or one less, got {got}")


def _allocate_fwd(x, wavelet, levels, mode):
    """The outputs, uninitialized: what the fake returns."""
    taps, size, details = len(filters(wavelet)[0]), x.shape[2:], []
    for _ in range(levels):
        size = [_wavelets.count(n, taps, mode) for n in size]
        details.append(x.new_empty(*x.shape[:2], 3, *size))
    return [x.new_empty(*x.shape[:2], *size), *reversed(details)]


def _allocate_bwd(dlow, ddetails, x, wavelet, levels, mode):
    return x.new_empty(x.shape)


def _allocate_inverse_fwd(low, details, wavelet, mode, sizes):
    return low.new_empty(*low.shape[:2], *sizes[-2:])


def _allocate_inverse_bwd(dout, low, details, wavelet, mode, sizes):
    return [t.new_empty(t.shape) for t in (low, *details)]


def _setup_context(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.save_for_backward(x)  # for its size, and for the graph in which a second order is refused


def _backward(ctx, gradients):
    (x,) = ctx.saved_tensors
    dlow, *ddetails = gradients
    return dwt2d_bwd(dlow, ddetails, x, *ctx.options), None, None, None


def _setup_inverse_context(ctx, inputs, output):
    low, details, *ctx.options = inputs
    ctx.save_for_backward(low, *details)


def _inverse_backward(ctx, dout):
    low, *details = ctx.saved_tensors
    dlow, *ddetails = idwt2d_bwd(dout, low, details, *ctx.options)
    return dlow, ddetails, None, None, None


dwt2d_fwd = _library.define(
    NAME,
    "dwt2d_fwd(Tensor x, str wavelet, int levels, str mode) -> Tensor[]",
    backends=composed(_wavelets.dwt, reference_fwd),
    fake=_allocate_fwd,
    empty=lambda x, *rest: x.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x",),
)

dwt2d_bwd = _library.define(
    NAME,
    "dwt2d_bwd(Tensor dlow, Tensor[] ddetails, Tensor x, str wavelet, int levels, str mode) -> Tensor",
    backends=composed(_library.without_autocast(_wavelets.dwt_bwd), _library.without_autocast(reference_bwd)),
    fake=_allocate_bwd,
    empty=lambda dlow, ddetails, x, *rest: x.numel() == 0,
)

idwt2d_fwd = _library.define(
    INVERSE,
    "idwt2d_fwd(Tensor low, Tensor[] details, str wavelet, str mode, SymInt[] sizes) -> Tensor",
    backends=composed(_wavelets.idwt, reference_inverse_fwd),
    fake=_allocate_inverse_fwd,
    empty=lambda low, *rest: low.numel() == 0,
    setup_context=_setup_inverse_context,
    backward=_inverse_backward,
    autocast=("low", "details"),
)

idwt2d_bwd = _library.define(
    INVERSE,
    "idwt2d_bwd(Tensor dout, Tensor low, Tensor[] details, str wavelet, str mode, SymInt[] sizes) -> Tensor[]",
    backends=composed(
        _library.without_autocast(_wavelets.idwt_bwd), _library.without_autocast(reference_inverse_bwd)
    ),
    fake=_allocate_inverse_bwd,
    empty=lambda dout, low, *rest: low.numel() == 0,
)
