"""One decoding step of the scan with an 8-bit state, in place.

Shape letters: S state slots, B batch, H heads, P head dim (the channels), N state size, G groups of B and C.
"""

import torch

from scalekern import _library
from scalekern._dispatch import Backend, filling, native, triton
from scalekern.ops._quantized import check_scale, real_of, to
from scalekern.ops.selective_state_update import check, with_heads
from scalekern.reference.quantized_scan import quantized_state_update_op as reference_update

NAME = "quantized_state_update"


def quantized_state_update(
    state, x, dt, A, B, C, state_scale, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):  # fmt: skip
    """`selective_state_update` with an int8 state, which stands for state * state_scale: h = exp(d A) h + d B x.

    Returns (C h + D x) silu(z) of h as it was computed; state becomes h / state_scale, rounded to nearest (halves to
    even) and clamped to -127 ... 127, 0 for NaN. What a step adds below half of a state's step is lost: steps are to
    be small against what one token brings.

    Args:
        state: (S, P, N), or (S, H, P, N) with heads; int8. In place.
        x, dt, z: (B, P) or (B, H, P), floating, any strides.
        A: (P, N) or (H, P, N).   D, dt_bias: (P,) or (H, P), or None.
        B, C: (B, N), or (B, G, N) with G dividing H.
        state_scale: (P,) or (H, P), the step of the states of a channel; a channel of step 0 keeps none.
        dt_softplus, state_batch_indices: as for `selective_state_update`.

    Returns:
        out, x's shape and dtype. This op has no gradient and says so when differentiated.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Chiang et al., Quamba2, 2025 (8-bit states); Gu & Dao, Mamba, 2023, section 3.5.2.
    """
    check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, NAME, (torch.int8,))
    check_scale(NAME, "state_scale", state_scale, "state", state, slice(1, -1))
    io = x.dtype
    for t in (dt, B, C, z):
        io = io if t is None else torch.promote_types(io, t.dtype)
    real = real_of(io)
    args = with_heads(state, x, dt, A, B, C, D, z, dt_bias)
    state_, x_, dt_, A_, B_, C_, D_, z_, bias_ = _library.detached(args)
    scale = state_scale.detach() if state.dim() == 4 else state_scale.detach()[None]
    x_, dt_, B_, C_, z_ = (to(t, io) for t in (x_, dt_, B_, C_, z_))
    A_, scale, D_, bias_ = (to(t, real) for t in (A_, scale, D_, bias_))
    out = quantized_state_update_op(
        state_, x_, dt_, A_, B_, C_, scale, D_, z_, bias_, state_batch_indices, dt_softplus
    )  # fmt: skip
    out = to(out, x.dtype).view(x.shape)
    return _library.inference_only(NAME, out, x, dt, A, B, C, state_scale, D, z, dt_bias)


def _allocate(state, x, *rest):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


quantized_state_update_op = _library.define(
    NAME,
    "quantized_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state_scale, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus) -> Tensor",
    backends=(
        Backend("triton", filling(_allocate, triton("selective_state_update", "quantized_state_update"))),
        Backend("cpu", filling(_allocate, native("quantized_state_update", "cpu"))),
        Backend("reference", reference_update),
    ),
    fake=_allocate,
    empty=lambda state, x, *rest: state.numel() == 0 or x.numel() == 0,
)
