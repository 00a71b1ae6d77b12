"""State-space-dual scan (Mamba-2) over 8-bit x, B and C: public function, schemas, backends, fakes and gradient.

Shape letters: B batch, L length, H heads, P head dim, G groups of B and C, N state size, S packed sequences.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import composed, filling
from scalekern.ops import _quantized
from scalekern.ops._quantized import DTYPES, all_codes, check_scale, real_of, rounded, to
from scalekern.ops.ssd_scan import check, limits, ssd_scan
from scalekern.reference.quantized_scan import quantized_ssd_scan_bwd as reference_bwd
from scalekern.reference.quantized_scan import quantized_ssd_scan_fwd as reference_fwd

NAME = "quantized_ssd_scan"


def quantized_ssd_scan(
    x, dt, A, B, C, x_scale, B_scale, C_scale, chunk_size=256, D=None, z=None, dt_bias=None, initial_states=None,
    seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    return_varlen_states=False,
):  # fmt: skip
    """`ssd_scan` over int8 codes: x stands for x * x_scale, B for B * B_scale, C for C * C_scale.

    Differentiable for every floating argument, the steps included. If one of x, B and C is floating, it is rounded to
    the multiples -128 ... 127 of its steps first and gets a straight-through gradient (that of `fake_quantize`):
    quantization-aware training computes what the codes will.

    Args:
        x: (B, L, H, P) int8, or floating. Any strides.
        x_scale: (H, P), the step of each channel of each head; of `scalekern.quant.sort_and_cluster` those of one
            cluster are equal.
        B, C: (B, L, G, N) int8, or floating.   B_scale, C_scale: (G,), a step a state group.
        The others: as for `ssd_scan`. What is as large as x (z) or dt is floating.

    Returns:
        As `ssd_scan`, out in dt's dtype. All is accumulated in float32 (float64 for float64 dt or z).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Chiang et al., Quamba2, 2025 (sort-and-cluster of x, a step a state group of B and C); the scan is that of
    Dao & Gu, Transformers are SSMs, 2024, section 6.
    """
    _checks.flag(NAME, "return_final_states", return_final_states)
    _checks.flag(NAME, "return_varlen_states", return_varlen_states)
    check(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, return_varlen_states,
        NAME, DTYPES,
    )  # fmt: skip
    dt_limit = limits(dt_limit, NAME)
    check_scale(NAME, "x_scale", x_scale, "x", x, slice(2, 4))
    check_scale(NAME, "B_scale", B_scale, "B", B, slice(2, 3))
    check_scale(NAME, "C_scale", C_scale, "C", C, slice(2, 3))
    io = dt.dtype if z is None else torch.promote_types(dt.dtype, z.dtype)
    real = real_of(io)
    if not all_codes(x, B, C):
        x, B, C = (rounded(t, s, real) for t, s in ((x, x_scale), (B, B_scale[:, None]), (C, C_scale[:, None])))
        found = ssd_scan(
            x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit,
            return_final_states, return_varlen_states,
        )  # fmt: skip
        return (to(found[0], dt.dtype), *found[1:]) if isinstance(found, tuple) else to(found, dt.dtype)
    out, final, varlen = quantized_ssd_scan_fwd(
        x, to(dt, io), to(A, real), B, C, to(x_scale, real), to(B_scale, real), to(C_scale, real), to(D, real),
        to(z, io), to(dt_bias, real), to(initial_states, real), seq_idx if cu_seqlens is None else None, cu_seqlens,
        dt_softplus, *dt_limit,
    )  # fmt: skip
    out = out if io == dt.dtype else out.to(dt.dtype)
    extra = [final] * bool(return_final_states) + [varlen] * bool(return_varlen_states)
    return (out, *extra) if extra else out


def _allocate_fwd(x, dt, A, B, C, x_scale, B_scale, C_scale, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, *rest):
    """The outputs, uninitialized: what the fake returns and what the backends fill."""
    state = (*x.shape[2:], B.shape[3])
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return dt.new_empty(x.shape), A.new_empty(x.shape[0], *state), A.new_empty(sequences, *state)


def _allocate_bwd(
    dout, dfinal, dvarlen, x, dt, A, B, C, x_scale, B_scale, C_scale, D, z, dt_bias, initial_states, *rest
):  # fmt: skip
    like = lambda t: dt.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
    return tuple(like(t) for t in (dt, A, x_scale, B_scale, C_scale, D, z, dt_bias, initial_states))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:14])
    ctx.options = inputs[14:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dfinal, dvarlen):
    tensors = ctx.saved_tensors
    if dout is None and dfinal is None and dvarlen is None:
        return (None,) * 17
    dout = tensors[1].new_zeros(tensors[0].shape) if dout is None else dout
    ddt, dA, *others = quantized_ssd_scan_bwd(dout, dfinal, dvarlen, *tensors, *ctx.options)
    grads = None, ddt, dA, None, None, *others
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), *(None,) * 5


_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor x_scale, Tensor B_scale, Tensor C_scale, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, "
    "float dt_min, float dt_max"
)

quantized_ssd_scan_fwd = _library.define(
    NAME,
    f"quantized_ssd_scan_fwd({_TENSORS}) -> (Tensor, Tensor, Tensor)",
    backends=composed(filling(_allocate_fwd, _quantized.ssd_forward), reference_fwd),
    fake=_allocate_fwd,
    empty=lambda x, dt, A, B, *rest: x.numel() == 0 or B.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("dt", "z"),
)

quantized_ssd_scan_bwd = _library.define(
    NAME,
    f"quantized_ssd_scan_bwd(Tensor dout, Tensor? dfinal, Tensor? dvarlen, {_TENSORS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=composed(filling(_allocate_bwd, _library.without_autocast(_quantized.ssd_backward)), reference_bwd),
    fake=_allocate_bwd,
    empty=lambda dout, dfinal, dvarlen, x, dt, A, B, *rest: x.numel() == 0 or B.numel() == 0,
)
