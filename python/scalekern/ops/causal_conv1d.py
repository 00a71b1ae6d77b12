"""Short causal depthwise convolution: public functions, checks, schemas, backends, fakes and gradient.

Shape letters: B batch, D channels, L length, W filter width, S packed sequences, T tokens of an update.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native, triton
from scalekern._packing import check_cu_seqlens
from scalekern.reference.causal_conv1d import causal_conv1d_bwd as reference_bwd
from scalekern.reference.causal_conv1d import causal_conv1d_fwd as reference_fwd
from scalekern.reference.causal_conv1d import causal_conv1d_update_op as reference_update
from scalekern.reference.causal_conv1d import without_padding

NAME = "causal_conv1d"
ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None,
    *, cu_seqlens=None,
):  # fmt: skip
    """out[t] = act(bias + sum_w weight[w] x[t - (W - 1) + w]), channel by channel. Differentiable in every input.

    Args:
        x: (B, D, L), float64, float32, float16 or bfloat16, any strides (channels-last is read in place).
        weight: (D, W), W from 2 to 8.   bias: (D,).
        seq_idx: (B, L) int32 or int64: a token sees only tokens of its own run of equal numbers; negative numbers
            are padding, with zero output and gradient.
        initial_states: (B, D, W - 1), the inputs before each row (before the first run of a row with seq_idx);
            (S, D, W - 1) with cu_seqlens. Zeros when None.
        return_final_states: also return the last W - 1 inputs of each row (of its last run; zeros where that is
            padding) or packed sequence.
        activation: None, "silu" or "swish" (the same).
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to L: the batch of 1 holds S sequences. Not with seq_idx.

    Returns:
        out (B, D, L); with `return_final_states` also (B, D, W - 1) or (S, D, W - 1), in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Dao-AILab/causal-conv1d's causal_conv1d_fn, whose argument order this is.
    """
    _check(x, weight, bias, seq_idx, initial_states, activation, cu_seqlens)
    _checks.flag(NAME, "return_final_states", return_final_states)
    out_dtype = x.dtype
    io = x.dtype if initial_states is None else torch.promote_types(x.dtype, initial_states.dtype)
    real = torch.float64 if io == torch.float64 else torch.float32
    weight, bias = _to(weight, real), _to(bias, real)
    silu = activation is not None
    out, final = causal_conv1d_fwd(_to(x, io), weight, bias, seq_idx, cu_seqlens, _to(initial_states, io), silu)
    if io != out_dtype:  # not under autocast, whose dtype stays
        out, final = out.to(out_dtype), final.to(out_dtype)
    if return_final_states and seq_idx is not None:
        final = without_padding(final, seq_idx)
    return (out, final) if return_final_states else out


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):  # fmt: skip
    """The same convolution for the next tokens of a stream; `conv_state` moves on in place.

    Args:
        x: (B, D) or (B, D, T), T tokens at once.
        conv_state: (S, D, K) with K at least W - 1, the last K inputs, oldest first; with cache_seqlens a circular
            buffer in which token p lies at p % K. float64, float32, float16 or bfloat16. In place.
        weight: (D, W), W from 2 to 8.   bias: (D,).   activation: None, "silu" or "swish".
        cache_seqlens: (B,) int32 or int64, tokens seen so far by each row.
        conv_state_indices: (B,) int32 or int64, the slot of each row; negative is padding: zero output, no change.
            Without it S equals B. Two rows must not name one slot.

    Returns:
        out, x's shape and dtype. This op has no gradient and says so when differentiated.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Dao-AILab/causal-conv1d's causal_conv1d_update, whose argument order this is.
    """
    _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    state_, x_, weight_, bias_ = _library.detached((conv_state, x, weight, bias))
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight_, bias_ = _to(weight_, real), _to(bias_, real)
    steps = x_.unsqueeze(-1) if x.dim() == 2 else x_
    silu = activation is not None
    out = causal_conv1d_update_op(state_, steps, weight_, bias_, cache_seqlens, conv_state_indices, silu)
    return _library.inference_only("causal_conv1d_update", out.view(x.shape), x, conv_state, weight, bias)


def _to(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _check_filter(op, channels, weight, bias, activation):
    _checks.tensor(op, "weight", weight, dims=2, dtypes=_checks.FLOATING)
    _checks.shape(op, "weight", weight, (channels, None))
    if not 2 <= weight.shape[1] <= 8:
        raise ValueError(f"{op}: weight must have a width from 2 to 8, got shape {tuple(weight.shape)}")
    if bias is not None:
        _checks.tensor(op, "bias", bias, dims=1, dtypes=_checks.FLOATING)
        _checks.shape(op, "bias", bias, (channels,))
    _checks.choice(op, "activation", activation, ACTIVATIONS)


def _check(x, weight, bias, seq_idx, initial_states, activation, cu_seqlens):
    _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.FLOATING)
    batch, channels, length = x.shape
    _check_filter(NAME, channels, weight, bias, activation)
    if seq_idx is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{NAME}: seq_idx and cu_seqlens say the same thing; pass one of them, got both")
        _checks.tensor(NAME, "seq_idx", seq_idx, dims=2, dtypes=(torch.int32, torch.int64))
        _checks.shape(NAME, "seq_idx", seq_idx, (batch, length))
    check_cu_seqlens(NAME, cu_seqlens, batch, length)
    if initial_states is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _checks.tensor(NAME, "initial_states", initial_states, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "initial_states", initial_states, (rows, channels, weight.shape[1] - 1))
    _checks.same_device(
        NAME, "x", x, weight=weight, bias=bias, seq_idx=seq_idx, initial_states=initial_states, cu_seqlens=cu_seqlens
    )


def _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices):
    op = "causal_conv1d_update"
    _checks.tensor(op, "x", x, dims=(2, 3), dtypes=_checks.FLOATING)
    batch, channels = x.shape[:2]
    _check_filter(op, channels, weight, bias, activation)
    _checks.tensor(op, "conv_state", conv_state, dims=3, dtypes=_checks.FLOATING)
    _checks.shape(op, "conv_state", conv_state, (None, channels, None))
    _checks.writable(op, "conv_state", conv_state)
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"{op}: conv_state must hold at least {weight.shape[1] - 1} tokens, got shape {tuple(conv_state.shape)}"
        )
    for name, t in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if t is not None:
            _checks.tensor(op, name, t, dims=1, dtypes=(torch.int32, torch.int64))
            _checks.shape(op, name, t, (batch,))
    if conv_state_indices is not None and (0 in x.shape or 0 in conv_state.shape):
        _checks.slots(op, "conv_state_indices", conv_state_indices, conv_state.shape[0])
    if conv_state_indices is None and conv_state.shape[0] != batch:
        raise ValueError(
            f"{op}: conv_state must have {batch} slots like x (or pass conv_state_indices), got {conv_state.shape[0]}"
        )
    _checks.same_device(
        op, "x", x, conv_state=conv_state, weight=weight, bias=bias, cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )  # fmt: skip


def _allocate_fwd(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu):
    """The outputs, uninitialized: what the fake returns and what the kernels fill."""
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), x.new_empty(rows, x.shape[1], weight.shape[1] - 1)


def _allocate_bwd(dout, dfinal_states, x, weight, bias, seq_idx, cu_seqlens, initial_states, silu):
    def like(t):
        return x.new_empty(0) if t is None else torch.empty_like(t)

    return like(x), like(weight), like(bias), like(initial_states)


def _allocate_update(conv_state, x, *rest):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward(ctx, dout, dfinal_states):
    x, weight, bias, seq_idx, cu_seqlens, initial_states = ctx.saved_tensors
    if dout is None and dfinal_states is None:
        return (None,) * 7
    dout = torch.zeros_like(x) if dout is None else dout
    grads = causal_conv1d_bwd(
        dout, dfinal_states, x, weight, bias, seq_idx, cu_seqlens, initial_states, ctx.silu
    )  # fmt: skip
    dx, dweight, dbias, dinitial = grads
    return dx, dweight, None if bias is None else dbias, None, None, None if initial_states is None else dinitial, None


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


causal_conv1d_fwd = _library.define(
    NAME,
    "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, "
    "Tensor? initial_states, bool silu) -> (Tensor, Tensor)",
    backends=(
        Backend("cuda", filling(_allocate_fwd, native("causal_conv1d_fwd", "cuda"))),
        Backend("triton", filling(_allocate_fwd, triton("causal_conv1d", "causal_conv1d_fwd"))),
        Backend("cpu", filling(_allocate_fwd, native("causal_conv1d_fwd", "cpu"))),
        Backend("reference", reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=lambda x, *rest: x.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "initial_states"),
)

causal_conv1d_bwd = _library.define(
    NAME,
    "causal_conv1d_bwd(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? cu_seqlens, Tensor? initial_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend("cuda", filling(_allocate_bwd, native("causal_conv1d_bwd", "cuda"))),
        Backend("triton", filling(_allocate_bwd, triton("causal_conv1d", "causal_conv1d_bwd"))),
        Backend("cpu", filling(_allocate_bwd, native("causal_conv1d_bwd", "cpu"))),
        Backend("reference", reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, dfinal_states, x, *rest: x.numel() == 0,
)

causal_conv1d_update_op = _library.define(
    "causal_conv1d_update",
    "causal_conv1d_update(Tensor(a!) conv_state, Tensor x, Tensor weight, Tensor? bias, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices, bool silu) -> Tensor",
    backends=(
        Backend("cuda", filling(_allocate_update, native("causal_conv1d_update", "cuda"))),
        Backend("triton", filling(_allocate_update, triton("causal_conv1d", "causal_conv1d_update"))),
        Backend("cpu", filling(_allocate_update, native("causal_conv1d_update", "cpu"))),
        Backend("reference", reference_update),
    ),
    fake=_allocate_update,
    empty=lambda conv_state, x, *rest: x.numel() == 0,
)
