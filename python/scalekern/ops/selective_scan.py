"""The selective scan of Mamba: public function, checks, schema, backends, fake and gradient.

Shape letters: B batch, D channels, L length, N state size, G groups of B and C, S packed sequences.

Checkpoints, which every backend's forward writes and every backend's backward reads: a tensor
(B, checkpoint_count(L, N), D, N) in the state's dtype. Slot j holds the state on entering chunk j, which is
[j K, (j + 1) K) with K = checkpoint_stride(N): before token j K, or, in reverse, before the chunk's last token.
Packed sequences share the slots, since a token belongs to one sequence only; where a sequence begins, its
initial state counts and not the slot.
"""

import math

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native, triton
from scalekern._packing import check_cu_seqlens, checkpoint_count
from scalekern.reference.selective_scan import as_lines, normalize_matrix
from scalekern.reference.selective_scan import selective_scan_bwd as reference_bwd
from scalekern.reference.selective_scan import selective_scan_fwd as reference_fwd

NAME = "selective_scan"
COMPLEX = (torch.complex64, torch.complex128)


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    *, initial_state=None, cu_seqlens=None, reverse=False,
):  # fmt: skip
    """Selective scan: h_t = exp(d_t A) h_{t-1} + d_t B_t u_t, out_t = (C_t h_t + D u_t) silu(z_t).

    d_t is delta_t + delta_bias, through softplus if `delta_softplus`. Differentiable in every floating input,
    through the last state too. The gate and the state are computed in float32 (float64 for float64 inputs).

    Args:
        u, delta, z: (B, D, L), float64, float32, float16 or bfloat16, any strides (channels-last is read in place). Or
            all of them images (B, D, H, W), read row by row; transposed ones are read column by column, in place too
            (GPUs copy what does not lie in one stride).
        A: (D, N), real (float32; float64 for float64 inputs) or complex, then out = 2 Re(C h).
        B, C: (D, N), or (B, N, L), or (B, G, N, L) with G dividing D, (..., H, W) beside images. For a complex A:
            complex, or real with the last axis interleaved (..., 2 L) as mamba_ssm has it.
        D, delta_bias: (D,).
        delta_softplus: apply softplus to the step size.
        return_last_state: also return the state after the last token.
        initial_state: (B, D, N), or (S, D, N) when packed; zeros when None.
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to L: the batch of 1 holds S sequences end to end,
            each of which starts from its own initial state.
        reverse: scan from the last token to the first, in place of flipping the inputs and the output.

    Returns:
        out in u's shape and dtype; with `return_last_state` also the last state (B, D, N) or (S, D, N), in float32
        (float64), complex for a complex A. Inputs of different dtypes are promoted to a common one first.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu & Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, sections 3.2 and 3.3;
    argument order of state-spaces/mamba's selective_scan_fn.
    """
    check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, dims=(3, 4))
    _checks.flag(NAME, "return_last_state", return_last_state)
    out_dtype = u.dtype
    io = out_dtype
    for x in (delta, z, *(m for m in (B, C) if not m.is_complex())):
        io = io if x is None else torch.promote_types(io, x.dtype)
    u, delta, z = _to(u, io), _to(delta, io), _to(z, io)
    real = torch.float64 if io == torch.float64 else torch.float32
    state = real.to_complex() if A.is_complex() else real
    matrix = state if A.is_complex() else io
    B, C = (_to(normalize_matrix(m, A.is_complex(), u), matrix) for m in (B, C))
    A, initial_state = _to(A, state), _to(initial_state, state)
    D, delta_bias = _to(D, real), _to(delta_bias, real)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save = _library.differentiated(tensors)
    out, last_state, _ = selective_scan_fwd(*tensors, cu_seqlens, delta_softplus, reverse, save)
    out = out if io == out_dtype else out.to(out_dtype)
    return (out, last_state) if return_last_state else out


def _to(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, op=NAME, dtypes=_checks.FLOATING, dims=3):
    """Those of every selective scan; `dtypes` of u, B and C, `dims` of u."""
    _checks.tensor(op, "u", u, dims=dims, dtypes=dtypes)
    _checks.tensor(op, "A", A, dims=2, dtypes=_checks.FLOATING + COMPLEX)
    batch, channels, *times = u.shape
    states = A.shape[1]
    for name, x in (("delta", delta), ("z", z)):
        if x is not None or name == "delta":
            _checks.tensor(op, name, x, dims=u.dim(), dtypes=_checks.FLOATING)
            _checks.shape(op, name, x, u.shape)
    _checks.shape(op, "A", A, (channels, None))
    for name, x in (("B", B), ("C", C)):
        matrix_dims = (2, u.dim(), u.dim() + 1)
        _checks.tensor(op, name, x, dims=matrix_dims, dtypes=dtypes + (COMPLEX if A.is_complex() else ()))
        pairs = A.is_complex() and not x.is_complex() and x.dim() > 2
        over = (*times[:-1], times[-1] * (2 if pairs else 1))
        if x.dim() == 2:
            _checks.shape(op, name, x, (channels, states))
        elif x.dim() == u.dim():
            _checks.shape(op, name, x, (batch, states, *over))
        else:
            _checks.shape(op, name, x, (batch, None, states, *over))
            groups = x.shape[1]
            if groups == 0 or channels % groups:
                raise ValueError(
                    f"{op}: the groups of {name} must divide the {channels} channels, got {groups} groups"
                )
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            _checks.tensor(op, name, x, dims=1, dtypes=_checks.FLOATING)
            _checks.shape(op, name, x, (channels,))
    check_cu_seqlens(op, cu_seqlens, batch, math.prod(u.shape[2:]))
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _checks.tensor(op, "initial_state", initial_state, dims=3, dtypes=_checks.FLOATING + COMPLEX)
        _checks.shape(op, "initial_state", initial_state, (rows, channels, states))
        if initial_state.is_complex() and not A.is_complex():
            raise TypeError(f"{op}: initial_state must be real like A, got {initial_state.dtype}")
    _checks.same_device(
        op, "u", u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _allocate_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, save_checkpoints
):  # fmt: skip
    """The outputs, uninitialized: what the fake returns and what the kernels fill."""
    batch, length = u.shape[0], math.prod(u.shape[2:])
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = checkpoint_count(length, A.shape[1]) if save_checkpoints else 0
    return torch.empty_like(u), A.new_empty(rows, *A.shape), A.new_empty(batch, slots, *A.shape)


def _allocate_bwd(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, *rest):
    def like(x):
        return u.new_empty(0) if x is None else torch.empty_like(x)

    return tuple(like(x) for x in (u, delta, A, B, C, D, z, delta_bias, initial_state))


def _empty_fwd(u, delta, A, *rest):
    return u.numel() == 0 or A.numel() == 0


def _empty_bwd(dout, dlast_state, u, delta, A, *rest):
    return u.numel() == 0 or A.numel() == 0


def _gpu_supports(u, delta, A, *rest):
    """The limits that the Triton and CUDA kernels share."""
    if A.is_complex():
        return "a complex A is not implemented"
    return None


def _cuda_supports(largest_N: int):
    """The limits of the CUDA kernels, above those shared with Triton. `largest_N` falls to 128 in float64."""

    def supports(u, delta, A, *rest):
        states = min(largest_N, 128) if u.dtype == torch.float64 else largest_N
        if A.shape[1] > states:
            return f"a state size above {states} is not implemented for {str(u.dtype).removeprefix('torch.')}"
        if u.is_cuda and torch.cuda.get_device_capability(u.device) not in _CUDA_CAPABILITIES:
            return "needs the shared memory of compute capability 8.0, 9.0 or 10.x"
        return _gpu_supports(u, delta, A, *rest)

    return supports


# How many tensors a call fills, the numbers of those with a value a token (dB and dC where they have one), and the
# numbers among its other arguments of (dout, u, delta, B, C, z), dout only backward.
_FWD = 3, (0,), (0, 1, 3, 4, 6)
_BWD = 9, (0, 1, 3, 4, 6), (0, 2, 3, 5, 6, 8)


def in_lines(fill, outputs: int, over_time: tuple, inputs: tuple):
    """`fill`, a scan for GPUs, of an image: as lines, copied where rows do not follow each other at one stride (a read
    of columns moves a sector for every pixel)."""
    matrices = inputs[-3:-1]

    def run(*args):
        filled, rest = list(args[:outputs]), list(args[outputs:])
        if rest[inputs[-5]].dim() == 3:
            return fill(*args)
        for i in inputs:
            (rest[i],) = as_lines(rest[i], time=3 if i in matrices else 2)
        for i in over_time:
            if filled[i].dim() > 2:
                filled[i] = filled[i].new_empty(*filled[i].shape[:-2], filled[i].shape[-2:].numel())
        fill(*filled, *rest)
        for given, used in zip(args, filled):
            if used is not given:
                given.copy_(used.view(given.shape))

    run.native_op, run.triton_module = (getattr(fill, name, None) for name in ("native_op", "triton_module"))
    return run


_CUDA_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))  # 163 KB of shared memory a block or more
_cuda_supports_fwd, _cuda_supports_bwd = _cuda_supports(512), _cuda_supports(128)


def in_rows(fill, outputs: int, over_time: tuple, inputs: tuple):
    """`fill`, a CUDA scan, with the tokens of a row beside each other in memory, as its fast kernels read them.

    Products over (B, L, D) leave them a channel's width apart. A copy moves each tensor twice through memory, some 5 %
    of what the general kernels take longer (at 4,096 channels of 4,096 tokens on an H200: 1.9 ms against 0.84 forward,
    15.6 against 6.8 backward). Calls that take the general kernels anyway are passed on as they are."""
    u = inputs[-5]

    def run(*args):
        filled, rest = list(args[:outputs]), list(args[outputs:])
        length, states, packed = rest[u].shape[-1], rest[u + 2].shape[-1], rest[u + 9]
        varying = rest[u + 3].dim() == 4 and rest[u + 4].dim() == 4
        if packed is None and varying and states <= 16 and length % 8 == 0 and rest[u].dtype != torch.float64:
            for i in inputs:
                rest[i] = rest[i] if rest[i] is None or rest[i].stride(-1) == 1 else rest[i].contiguous()
            for i in over_time:
                if filled[i].dim() == 3 and filled[i].stride(-1) != 1:
                    filled[i] = torch.empty(filled[i].shape, dtype=filled[i].dtype, device=filled[i].device)
        fill(*filled, *rest)
        for given, used in zip(args, filled):
            if used is not given:
                given.copy_(used)

    run.native_op = fill.native_op
    return run


def _backward(ctx, dout, dlast_state, _dcheckpoints):
    *tensors, cu_seqlens, checkpoints = ctx.saved_tensors  # once: under activation checkpointing a read recomputes
    flags = ctx.flags
    if dout is None and dlast_state is None:
        return (None,) * 13
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    if checkpoints.shape[1] == 0 and tensors[0].numel() and tensors[2].numel():
        # The forward did not know that it would be differentiated (functorch, checkpointing wrappers).
        checkpoints = selective_scan_fwd(*(_detached(t) for t in tensors), cu_seqlens, *flags, True)[2]
    grads = selective_scan_bwd(dout, dlast_state, *tensors, cu_seqlens, checkpoints, *flags)
    return *(g if t is not None else None for g, t in zip(grads, tensors)), None, None, None, None


def _detached(tensor):
    return None if tensor is None else tensor.detach()


def _setup_context(ctx, inputs, output):
    *tensors, cu_seqlens, delta_softplus, reverse, _ = inputs
    ctx.flags = (delta_softplus, reverse)
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)


_cuda_fwd = in_lines(in_rows(native("selective_scan_fwd", "cuda"), *_FWD), *_FWD)
_cuda_bwd = in_lines(in_rows(native("selective_scan_bwd", "cuda"), *_BWD), *_BWD)
_triton_fwd = in_lines(triton("selective_scan", "selective_scan_fwd"), *_FWD)
_triton_bwd = in_lines(triton("selective_scan", "selective_scan_bwd"), *_BWD)

selective_scan_fwd = _library.define(
    NAME,
    "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool reverse, "
    "bool save_checkpoints) -> (Tensor, Tensor, Tensor)",
    backends=(
        Backend("cuda", filling(_allocate_fwd, _cuda_fwd), _cuda_supports_fwd),
        Backend("triton", filling(_allocate_fwd, _triton_fwd), _gpu_supports),
        Backend("cpu", filling(_allocate_fwd, native("selective_scan_fwd", "cpu"))),
        Backend("reference", reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=_empty_fwd,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("u", "delta", "B", "C", "z"),
)

selective_scan_bwd = _library.define(
    NAME,
    "selective_scan_bwd(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, "
    "bool delta_softplus, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend("cuda", filling(_allocate_bwd, _cuda_bwd), lambda g, h, *a: _cuda_supports_bwd(*a)),
        Backend("triton", filling(_allocate_bwd, _triton_bwd), lambda g, h, *a: _gpu_supports(*a)),
        Backend("cpu", filling(_allocate_bwd, native("selective_scan_bwd", "cpu"))),
        Backend("reference", reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=_empty_bwd,
)  # fmt: skip
