"""State-space-dual scan (Mamba-2): public function, checks, schemas, backends, fakes and gradient.

Shape letters: B batch, L length, H heads, P head dim, G groups of B and C, N state size, S packed sequences.
"""

import functools
import math

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, composed, filling, triton
from scalekern._packing import check_cu_seqlens
from scalekern.ops import _ssd
from scalekern.reference.ssd_scan import ssd_scan_bwd as reference_bwd
from scalekern.reference.ssd_scan import ssd_scan_fwd as reference_fwd

NAME = "ssd_scan"


def ssd_scan(
    x, dt, A, B, C, chunk_size=256, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """Mamba-2's scan, upstream's mamba_chunk_scan_combined. Differentiable for every floating argument.

        d_t   = clamp(softplus(dt_t + dt_bias), dt_limit)      (softplus only if dt_softplus)
        h_t   = exp(d_t A) h_{t-1} + d_t x_t B_t^T
        out_t = (h_t C_t + D x_t) silu(z_t)

    Args:
        x: (B, L, H, P), float64, float32, float16 or bfloat16, any strides.
        dt: (B, L, H) floating.
        A: (H,) floating, negative.
        B, C: (B, L, G, N) floating; G divides H, heads of a group are neighbours.
        chunk_size: upstream's tuning parameter, from 1; the result does not depend on it, and neither do our chunks.
        D: (H,) or (H, P) floating or None.
        z: like x or None.
        dt_bias: (H,) floating or None.
        initial_states: (B, H, P, N) floating or None for zeros. With cu_seqlens (S, H, P, N), one for each sequence, or
            upstream's (1, H, P, N), which the first begins with. With seq_idx a row's first sequence begins with its.
        seq_idx: (B, L) int32 or int64 or None; where it changes, a new sequence begins.
        cu_seqlens: (S + 1,) int32 or int64 or None, rising from 0 to L: the sequences of a batch of 1.
        dt_limit: (least, most) of d.
        return_final_states: also the state after the last token of each row.
        return_varlen_states: also the state after each packed sequence; needs cu_seqlens.

    Returns:
        out (B, L, H, P) in x's dtype; then, as asked for, final_states (B, H, P, N) and varlen_states (S, H, P, N), in
        float32 (float64 for float64 x). All is accumulated in that dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Dao & Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
    Duality, 2024, section 6 and listing 1.
    """
    _checks.flag(NAME, "return_final_states", return_final_states)
    _checks.flag(NAME, "return_varlen_states", return_varlen_states)
    check(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, return_varlen_states
    )  # fmt: skip
    low, high = limits(dt_limit)
    if cu_seqlens is not None:
        seq_idx = None  # says the same once more, as upstream wants it
    # Backends see one dtype for what has a value a token, and that of the sums for the rest.
    io = functools.reduce(torch.promote_types, (t.dtype for t in (dt, B, C, z) if t is not None), x.dtype)
    real = torch.float64 if io == torch.float64 else torch.float32
    to = lambda t, dtype: t if t is None or t.dtype == dtype else t.to(dtype)  # noqa: E731
    out, final, varlen = ssd_scan_fwd(
        to(x, io), to(dt, io), to(A, real), to(B, io), to(C, io), to(D, real), to(z, io), to(dt_bias, real),
        to(initial_states, real), seq_idx, cu_seqlens, dt_softplus, low, high,
    )  # fmt: skip
    out = out if io == x.dtype else out.to(x.dtype)  # under autocast it has the autocast dtype
    extra = [final] * bool(return_final_states) + [varlen] * bool(return_varlen_states)
    return (out, *extra) if extra else out


def check(
    x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, return_varlen_states,
    op=NAME, dtypes=_checks.FLOATING,
):  # fmt: skip
    """Those of every state-space-dual scan; `dtypes` of x, B and C."""
    floating = _checks.FLOATING
    _checks.tensor(op, "x", x, dims=4, dtypes=dtypes)
    batch, length, heads, width = x.shape
    _checks.tensor(op, "dt", dt, dims=3, dtypes=floating)
    _checks.shape(op, "dt", dt, (batch, length, heads))
    _checks.tensor(op, "A", A, dims=1, dtypes=floating)
    _checks.shape(op, "A", A, (heads,))
    _checks.tensor(op, "B", B, dims=4, dtypes=dtypes)
    _checks.shape(op, "B", B, (batch, length, None, None))
    groups, states = B.shape[2:]
    _checks.tensor(op, "C", C, dims=4, dtypes=dtypes)
    _checks.shape(op, "C", C, (batch, length, groups, states))
    if groups < 1 or heads % groups:
        raise ValueError(f"{op}: the groups of B must divide the {heads} heads of x, got {groups}")
    _checks.at_least(op, "chunk_size", chunk_size, 1)
    if D is not None:
        _checks.tensor(op, "D", D, dims=(1, 2), dtypes=floating)
        _checks.shape(op, "D", D, (heads,), (heads, width))
    if z is not None:
        _checks.tensor(op, "z", z, dims=4, dtypes=floating)
        _checks.shape(op, "z", z, x.shape)
    if dt_bias is not None:
        _checks.tensor(op, "dt_bias", dt_bias, dims=1, dtypes=floating)
        _checks.shape(op, "dt_bias", dt_bias, (heads,))
    check_cu_seqlens(op, cu_seqlens, batch, length)
    if seq_idx is not None:
        _checks.tensor(op, "seq_idx", seq_idx, dims=2, dtypes=(torch.int32, torch.int64))
        _checks.shape(op, "seq_idx", seq_idx, (batch, length))
    if initial_states is not None:
        _checks.tensor(op, "initial_states", initial_states, dims=4, dtypes=floating)
        lead = (batch,) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 1)
        _checks.shape(op, "initial_states", initial_states, *((n, heads, width, states) for n in lead))
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{op}: return_varlen_states must come with cu_seqlens, got None")
    _checks.same_device(
        op, "x", x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
        seq_idx=seq_idx, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def limits(dt_limit, op=NAME) -> tuple[float, float]:
    """The least and the most of d."""
    try:
        low, high = (float(v) for v in dt_limit)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low <= high:
        raise ValueError(f"{op}: dt_limit must be two numbers, the least and the most of d, got {dt_limit!r}")
    return low, high


def _allocate_fwd(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, low, high):
    """The outputs, uninitialized: what the fake returns and what the backends fill."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = (*x.shape[2:], B.shape[3])
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((x.shape[0], *state), dtype=wide),
        x.new_empty((sequences, *state), dtype=wide),
    )


def _allocate_bwd(dout, dfinal, dvarlen, x, dt, A, B, C, D, z, dt_bias, initial_states, *rest):
    def like(t):
        return x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    return tuple(like(t) for t in (x, dt, A, B, C, D, z, dt_bias, initial_states))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dfinal, dvarlen):
    tensors = ctx.saved_tensors
    if dout is None and dfinal is None and dvarlen is None:
        return (None,) * 14
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    grads = ssd_scan_bwd(dout, dfinal, dvarlen, *tensors, *ctx.options)
    grads = [g if need else None for g, need in zip(grads, ctx.needs_input_grad)]
    return *grads[:9], None, None, None, None, None


MOST_STATES = 256  # chunks of B and C, two at once, and a state share a multiprocessor's memory


def _triton_supports(x, dt, A, B, *rest):
    most = MOST_STATES // (1 if x.element_size() == 2 else 2)
    return None if B.shape[3] <= most else f"B has more than {most} states"


def _triton_supports_bwd(dout, dfinal, dvarlen, x, *rest):
    """The forward's limits; on a GPU also those of its registers and memory (triton_kernels/ssd_scan_bwd.py)."""
    if x.is_cuda and (x.element_size() > 2 or torch.cuda.get_device_capability(x.device) < (9, 0)):
        return "the backward needs float16 or bfloat16 and compute capability 9.0"
    if x.is_cuda and x.dtype == torch.float16 and rest[2].shape[3] > MOST_STATES // 2:
        return f"B has more than {MOST_STATES // 2} states, in float16"
    return _triton_supports(x, *rest)


_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, "
    "Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max"
)

ssd_scan_fwd = _library.define(
    NAME,
    f"ssd_scan_fwd({_TENSORS}) -> (Tensor, Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_fwd, triton(NAME, "ssd_scan_fwd")), _triton_supports),
        *composed(filling(_allocate_fwd, _ssd.forward), reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=lambda x, dt, A, B, *rest: x.numel() == 0 or B.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "dt", "B", "C", "z"),
)

ssd_scan_bwd = _library.define(
    NAME,
    f"ssd_scan_bwd(Tensor dout, Tensor? dfinal, Tensor? dvarlen, {_TENSORS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend(
            "triton", filling(_allocate_bwd, _library.without_autocast(triton(NAME + "_bwd", "ssd_scan_bwd"))),
            _triton_supports_bwd,
        ),
        *composed(filling(_allocate_bwd, _library.without_autocast(_ssd.backward)), reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, dfinal, dvarlen, x, dt, A, B, *rest: x.numel() == 0 or B.numel() == 0,
)
