"""One decoding step of the selective scan, in place on the state.

Shape letters: S state slots, B batch, H heads, P head dim (the channels), N state size, G groups of B and C.
"""

import math

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native, triton
from scalekern.reference.selective_state_update import selective_state_update_op as reference_update

NAME = "selective_state_update"
STATE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):  # fmt: skip
    """One step: state = exp(d A) state + d B x in place, returns (C state + D x) silu(z), with d = dt + dt_bias.

    Args:
        state: (S, P, N), or (S, H, P, N) with heads; float32, float16, bfloat16 (float64 for float64 x). In place.
        x, dt, z: (B, P) or (B, H, P), any strides (a dt expanded over P is read in place).
        A: (P, N) or (H, P, N).   D, dt_bias: (P,) or (H, P), or None.
        B, C: (B, N), or (B, G, N) with G dividing H, each its own.
        dt_softplus: apply softplus to the step size.
        state_batch_indices: (B,) int32 or int64, the state slot of each row; negative is padding: its output is
            zero and no state changes. Without it S equals B. Two rows must not name one slot.

    Returns:
        out, x's shape and dtype. This op has no gradient and says so when differentiated.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu & Dao, Mamba, 2023, section 3.5.2; argument order of state-spaces/mamba's selective_state_update.
    """
    check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    args = with_heads(state, x, dt, A, B, C, D, z, dt_bias)
    io = args[1].dtype
    for t in (dt, B, C, z):
        io = io if t is None else torch.promote_types(io, t.dtype)
    real = torch.float64 if io == torch.float64 else torch.float32
    state_, x_, dt_, A_, B_, C_, D_, z_, bias_ = _library.detached(args)
    x_, dt_, B_, C_, z_ = (_to(t, io) for t in (x_, dt_, B_, C_, z_))
    A_, D_, bias_ = (_to(t, real) for t in (A_, D_, bias_))
    out = selective_state_update_op(state_, x_, dt_, A_, B_, C_, D_, z_, bias_, state_batch_indices, dt_softplus)
    out = _to(out, x.dtype).view(x.shape)
    return _library.inference_only(NAME, out, state, x, dt, A, B, C, D, z, dt_bias)


def with_heads(state, x, dt, A, B, C, D, z, dt_bias):
    """Views with the axes H and G, which the form without heads leaves out."""
    if state.dim() == 4:
        head, group = (lambda t: t), (lambda t: t if t.dim() == 3 else t[:, None])
    else:
        head, group = (lambda t: None if t is None else t.unsqueeze(-2)), (lambda t: t[:, None])
    lead = (lambda t: t) if state.dim() == 4 else (lambda t: t.unsqueeze(0))
    row = lambda t: None if t is None else lead(t)  # noqa: E731
    states = state if state.dim() == 4 else state.unsqueeze(1)
    B, C = group(B), group(C)
    if B.shape[1] != C.shape[1]:  # kernels index both by one group of a head
        groups = math.lcm(B.shape[1], C.shape[1])
        B, C = (m.repeat_interleave(groups // m.shape[1], 1) for m in (B, C))
    return states, head(x), head(dt), lead(A), B, C, row(D), head(z), row(dt_bias)


def _to(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, op=NAME, dtypes=STATE):
    """Those of every step; `dtypes` of the state."""
    _checks.tensor(op, "state", state, dims=(3, 4), dtypes=dtypes)
    _checks.writable(op, "state", state)
    heads = state.shape[1:-2]
    slots, (dim, states) = state.shape[0], state.shape[-2:]
    _checks.tensor(op, "x", x, dims=2 + len(heads), dtypes=_checks.FLOATING)
    batch = x.shape[0]
    _checks.shape(op, "x", x, (batch, *heads, dim))
    for name, t in (("dt", dt), ("z", z)):
        if t is not None or name == "dt":
            _checks.tensor(op, name, t, dims=2 + len(heads), dtypes=_checks.FLOATING)
            _checks.shape(op, name, t, (batch, *heads, dim))
    _checks.tensor(op, "A", A, dims=2 + len(heads), dtypes=_checks.FLOATING)
    _checks.shape(op, "A", A, (*heads, dim, states))
    for name, t in (("B", B), ("C", C)):
        _checks.tensor(op, name, t, dims=(2, 3) if heads else 2, dtypes=_checks.FLOATING)
        if t.dim() == 2:
            _checks.shape(op, name, t, (batch, states))
        else:
            _checks.shape(op, name, t, (batch, None, states))
            if t.shape[1] == 0 or heads[0] % t.shape[1]:
                raise ValueError(
                    f"{op}: the groups of {name} must divide the {heads[0]} heads, got {t.shape[1]} groups"
                )
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        if t is not None:
            _checks.tensor(op, name, t, dims=1 + len(heads), dtypes=_checks.FLOATING)
            _checks.shape(op, name, t, (*heads, dim))
    if state_batch_indices is not None:
        _checks.tensor(op, "state_batch_indices", state_batch_indices, dims=1, dtypes=(torch.int32, torch.int64))
        _checks.shape(op, "state_batch_indices", state_batch_indices, (batch,))
        if 0 in state.shape:
            _checks.slots(op, "state_batch_indices", state_batch_indices, slots)
    elif slots != batch:
        raise ValueError(f"{op}: state must have {batch} slots like x (or pass state_batch_indices), got {slots}")
    _checks.same_device(
        op, "state", state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
        state_batch_indices=state_batch_indices,
    )  # fmt: skip


def _allocate(state, x, *rest):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty(state, x, *rest):
    return state.numel() == 0 or x.numel() == 0


selective_state_update_op = _library.define(
    NAME,
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus) -> Tensor",
    backends=(
        Backend("cuda", filling(_allocate, native("selective_state_update", "cuda"))),
        Backend("triton", filling(_allocate, triton("selective_state_update", "selective_state_update"))),
        Backend("cpu", filling(_allocate, native("selective_state_update", "cpu"))),
        Backend("reference", reference_update),
    ),
    fake=_allocate,
    empty=_empty,
)
