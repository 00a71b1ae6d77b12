"""The diagonal linear recurrence: public function, checks, schema, backends, fake and gradient.

Shape letters: L length, S packed sequences. The registered ops have time last; strides tell them where it lies.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native, triton
from scalekern._packing import check_cu_seqlens
from scalekern.reference.diag_scan import diag_scan_bwd as reference_bwd
from scalekern.reference.diag_scan import diag_scan_fwd as reference_fwd
from scalekern.reference.diag_scan import state_dtype

NAME = "diag_scan"


def diag_scan(a, b, *, dim=-1, initial_state=None, cu_seqlens=None, reverse=False, return_last_state=False):
    """h_t = a_t h_{t-1} + b_t along the axis `dim`, element by element. Differentiable in a, b and initial_state.

    The recurrence of quasi-LSTMs, RG-LRU, S5 and S4D. For half precision h is kept in float32 and rounded where it is
    written; autocast leaves the dtypes alone, since decays close to 1 need their digits. A step of decoding is
    `state = a * state + b`, for which there is no op.

    Args:
        a: of b's shape, or with axes of size 1 where it is the same for all of them, time included; float64, float32,
            float16, bfloat16, complex64 or complex128, any strides (what is expanded is never copied).
        b: any shape, of the same dtypes. Where the two differ, both are promoted.
        dim: the axis of time.
        initial_state: h before the first token, b's shape without `dim`, or (S, ..) when packed; zeros when None.
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to L: the first axis of b, of size 1 and not time, holds S
            sequences end to end, each of which starts from its own initial state.
        reverse: scan from the last token to the first, in place of flipping the inputs and the output.
        return_last_state: also return h after the last token.

    Returns:
        h, b's shape, in the inputs' dtype; with `return_last_state` also the last state, shaped as initial_state, at
        least in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Blelloch, Prefix Sums and Their Applications, 1990, section 1.4; Smith et al., Simplified State Space Layers
    for Sequence Modeling (S5), 2023, section 2.2.
    """
    dim = _check(a, b, dim, initial_state, cu_seqlens)
    _checks.flag(NAME, "return_last_state", return_last_state)
    io = torch.promote_types(a.dtype, b.dtype)
    a, b, initial_state = _to(a, io), _to(b, io), _to(initial_state, state_dtype(io))
    out, last_state = diag_scan_fwd(
        a.movedim(dim, -1).expand(b.movedim(dim, -1).shape), b.movedim(dim, -1), initial_state, cu_seqlens, reverse
    )
    out = out.movedim(-1, dim)
    return (out, last_state) if return_last_state else out


def _to(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _check(a, b, dim, initial_state, cu_seqlens):
    """The axis of time, not negative."""
    dtypes = _checks.FLOATING + _checks.COMPLEX
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, torch.Tensor) or x.dtype not in dtypes:
            _checks.tensor(NAME, name, x, dims=x.dim() if isinstance(x, torch.Tensor) else 1, dtypes=dtypes)
    if b.dim() < 1:
        raise ValueError(f"{NAME}: b must have at least one axis, got shape ()")
    if a.dim() != b.dim() or any(m != n and m != 1 for m, n in zip(a.shape, b.shape)):
        _checks.shape(NAME, "a", a, tuple(b.shape))
    if not isinstance(dim, int) or not -b.dim() <= dim < b.dim():
        raise ValueError(f"{NAME}: dim must be one of b's {b.dim()} axes, got {dim!r}")
    dim %= b.dim()
    if cu_seqlens is not None and dim == 0:
        raise ValueError(f"{NAME}: with cu_seqlens dim must leave b's first axis to the sequences, got 0")
    check_cu_seqlens(NAME, cu_seqlens, b.shape[0], b.shape[dim])
    if initial_state is not None:
        shape = (*b.shape[:dim], *b.shape[dim + 1 :])
        shape = shape if cu_seqlens is None else (cu_seqlens.shape[0] - 1, *shape[1:])
        _checks.tensor(NAME, "initial_state", initial_state, dims=b.dim() - 1, dtypes=dtypes)
        _checks.shape(NAME, "initial_state", initial_state, shape)
        if initial_state.is_complex() and not (a.is_complex() or b.is_complex()):
            raise TypeError(f"{NAME}: initial_state must be real like a and b, got {initial_state.dtype}")
    _checks.same_device(NAME, "a", a, b=b, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return dim


def _allocate_fwd(a, b, initial_state, cu_seqlens, reverse):
    """The outputs, uninitialized: what the fake returns and what the kernels fill."""
    shape = b.shape[:-1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1, *b.shape[1:-1])
    return torch.empty_like(b), b.new_empty(shape, dtype=state_dtype(b.dtype))


def _allocate_bwd(dout, dlast_state, a, out, initial_state, cu_seqlens, reverse):
    wide = state_dtype(out.dtype)
    like = out.new_empty(0, dtype=wide) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return torch.empty_like(out), torch.empty_like(out), like


def _setup_context(ctx, inputs, output):
    a, _, initial_state, cu_seqlens, ctx.reverse = inputs
    ctx.save_for_backward(a, output[0], initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlast_state):
    a, out, initial_state, cu_seqlens = ctx.saved_tensors
    if dout is None and dlast_state is None:
        return (None,) * 5
    dout = torch.zeros_like(out) if dout is None else dout
    da, db, dinitial = diag_scan_bwd(dout, dlast_state, a, out, initial_state, cu_seqlens, ctx.reverse)
    return da, db, None if initial_state is None else dinitial, None, None


diag_scan_fwd = _library.define(
    NAME,
    "diag_scan_fwd(Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens, bool reverse) -> (Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_fwd, triton(NAME, "diag_scan_fwd"))),
        Backend("cpu", filling(_allocate_fwd, native("diag_scan_fwd", "cpu"))),
        Backend("reference", reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=lambda a, b, *rest: b.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
)

diag_scan_bwd = _library.define(
    NAME,
    "diag_scan_bwd(Tensor dout, Tensor? dlast_state, Tensor a, Tensor out, Tensor? initial_state, Tensor? cu_seqlens, "
    "bool reverse) -> (Tensor, Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_bwd, triton(NAME, "diag_scan_bwd"))),
        Backend("cpu", filling(_allocate_bwd, native("diag_scan_bwd", "cpu"))),
        Backend("reference", reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, dlast_state, a, out, *rest: out.numel() == 0,
)
