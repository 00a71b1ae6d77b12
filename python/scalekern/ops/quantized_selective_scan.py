"""The selective scan over 8-bit u, B and C: public function, schemas, backends, fakes and gradient.

Shape letters: B batch, D channels, L length, N state size, G groups of B and C, S packed sequences.

Checkpoints are those of ops/selective_scan.py. The backward makes numbers of the codes and calls the plain one.
"""

import functools

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native, triton
from scalekern._packing import checkpoint_count
from scalekern.ops import _quantized
from scalekern.ops._quantized import DTYPES, all_codes, check_scale, real_of, rounded, to
from scalekern.ops.selective_scan import check, selective_scan, selective_scan_bwd, selective_scan_fwd
from scalekern.reference.quantized_scan import quantized_selective_scan_bwd as reference_bwd
from scalekern.reference.quantized_scan import quantized_selective_scan_fwd as reference_fwd

NAME = "quantized_selective_scan"


def quantized_selective_scan(
    u, delta, A, B, C, u_scale, B_scale, C_scale, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False, *, initial_state=None, cu_seqlens=None, reverse=False,
):  # fmt: skip
    """`selective_scan` over int8 codes: u stands for u * u_scale, B for B * B_scale, C for C * C_scale.

    Differentiable for every floating argument, the steps included. If one of u, B and C is floating, it is rounded to
    the multiples -128 ... 127 of its steps first and gets a straight-through gradient (that of `fake_quantize`):
    quantization-aware training computes what the codes will.

    Args:
        u: (B, D, L) int8, or floating. Any strides.
        u_scale: (D,), the step of each channel; of `scalekern.quant.sort_and_cluster` those of one cluster are equal.
        A: (D, N) real.
        B, C: (B, N, L) or (B, G, N, L), int8, or floating.   B_scale, C_scale: (G,), or (1,) without groups.
        The others: as for `selective_scan`. What is as large as u (delta, z) is floating.

    Returns:
        As `selective_scan`, out in delta's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Chiang et al., Quamba2, 2025 (sort-and-cluster of x, a step a state group of B and C); the scan is that of
    Gu & Dao, Mamba, 2023, sections 3.2 and 3.3.
    """
    check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, NAME, DTYPES)
    _checks.flag(NAME, "return_last_state", return_last_state)
    if A.is_complex():
        raise TypeError(f"{NAME}: A must be real, got {A.dtype}")
    for name, m in (("B", B), ("C", C)):
        if m.dim() == 2:
            raise ValueError(f"{NAME}: {name} must have 3 or 4 dimensions, got shape {tuple(m.shape)}")
    B, C = (m if m.dim() == 4 else m[:, None] for m in (B, C))
    check_scale(NAME, "u_scale", u_scale, "u", u, slice(1, 2))
    check_scale(NAME, "B_scale", B_scale, "B", B, slice(1, 2))
    check_scale(NAME, "C_scale", C_scale, "C", C, slice(1, 2))
    io = delta.dtype if z is None else torch.promote_types(delta.dtype, z.dtype)
    real = real_of(io)
    if not all_codes(u, B, C):
        u = rounded(u, u_scale[:, None], real)
        B, C = (rounded(m, s[:, None, None], real) for m, s in ((B, B_scale), (C, C_scale)))
        found = selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state=initial_state,
            cu_seqlens=cu_seqlens, reverse=reverse,
        )  # fmt: skip
        return (to(found[0], delta.dtype), found[1]) if return_last_state else to(found, delta.dtype)
    floating = (to(delta, io), to(A, real), to(u_scale, real), to(B_scale, real), to(C_scale, real), to(D, real),
                to(z, io), to(delta_bias, real), to(initial_state, real))  # fmt: skip
    save = _library.differentiated(floating)
    delta_, A_, *rest = floating
    out, last_state, _ = quantized_selective_scan_fwd(
        u, delta_, A_, B, C, *rest, cu_seqlens, delta_softplus, reverse, save
    )  # fmt: skip
    out = out if io == delta.dtype else out.to(delta.dtype)
    return (out, last_state) if return_last_state else out


def _allocate_fwd(
    u, delta, A, B, C, u_scale, B_scale, C_scale, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse,
    save_checkpoints,
):  # fmt: skip
    """The outputs, uninitialized: what the fake returns and what the kernels fill."""
    batch, channels, length = u.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = checkpoint_count(length, A.shape[1]) if save_checkpoints else 0
    return torch.empty_like(u, dtype=delta.dtype), A.new_empty(rows, *A.shape), A.new_empty(batch, slots, *A.shape)


def _allocate_bwd(
    dout, dlast_state, u, delta, A, B, C, u_scale, B_scale, C_scale, D, z, delta_bias, initial_state, *rest
):  # fmt: skip
    like = lambda t: delta.new_empty(0) if t is None else torch.empty_like(t)
    return tuple(like(t) for t in (delta, A, u_scale, B_scale, C_scale, D, z, delta_bias, initial_state))


def _setup_context(ctx, inputs, output):
    *tensors, delta_softplus, reverse, _ = inputs
    ctx.flags = (delta_softplus, reverse)
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlast_state, _dcheckpoints):
    *tensors, cu_seqlens, checkpoints = ctx.saved_tensors
    if dout is None and dlast_state is None:
        return (None,) * 16
    dout = torch.zeros_like(tensors[0], dtype=tensors[1].dtype) if dout is None else dout
    if checkpoints.shape[1] == 0 and tensors[0].numel() and tensors[2].numel():
        # The forward did not know that it would be differentiated (functorch, checkpointing wrappers).
        plain = (None if t is None else t.detach() for t in tensors)
        checkpoints = quantized_selective_scan_fwd(*plain, cu_seqlens, *ctx.flags, True)[2]
    ddelta, dA, *others = quantized_selective_scan_bwd(dout, dlast_state, *tensors, cu_seqlens, checkpoints, *ctx.flags)
    grads = None, ddelta, dA, None, None, *others
    return *(g if t is not None else None for g, t in zip(grads, tensors)), None, None, None, None


_by_numbers = functools.partial(_quantized.selective_forward, scan=selective_scan_fwd)
_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor u_scale, Tensor B_scale, Tensor C_scale, Tensor? D, "
    "Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens"
)

quantized_selective_scan_fwd = _library.define(
    NAME,
    f"quantized_selective_scan_fwd({_TENSORS}, bool delta_softplus, bool reverse, bool save_checkpoints) -> "
    "(Tensor, Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_fwd, triton("selective_scan", "quantized_selective_scan_fwd"))),
        Backend("cuda", _by_numbers),
        Backend("cpu", filling(_allocate_fwd, native("quantized_selective_scan_fwd", "cpu"))),
        Backend("reference", reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=lambda u, delta, A, *rest: u.numel() == 0 or A.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("delta", "z"),
)

quantized_selective_scan_bwd = _library.define(
    NAME,
    f"quantized_selective_scan_bwd(Tensor dout, Tensor? dlast_state, {_TENSORS}, Tensor checkpoints, "
    "bool delta_softplus, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        *(
            Backend(name, functools.partial(_quantized.selective_backward, scan=selective_scan_bwd))
            for name in ("cuda", "triton", "cpu")
        ),
        Backend("reference", reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, dlast_state, u, delta, A, *rest: u.numel() == 0 or A.numel() == 0,
)
