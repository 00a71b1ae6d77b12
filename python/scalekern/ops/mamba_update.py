"""One decoding step of a whole Mamba mixer as one op, in place on both of its states.

Shape letters: B batch, M model width, D channels, N state size, R rank of the step size, W filter width, K tokens of
the convolution's window.

A step of a small batch reads every weight once and does little with it. On the CPU one native call reads them as fast
as memory gives them; elsewhere, and for larger batches, the step is composed of torch's products and the two updates.
"""

import functools

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native
from scalekern.ops.causal_conv1d import causal_conv1d_update_op
from scalekern.ops.selective_state_update import STATE, selective_state_update_op
from scalekern.reference.mamba_update import mamba_update_op as composed

NAME = "mamba_update"
NATIVE_ROWS = 8  # of a larger batch the rows would be read from L1 too often: torch's products win


def mamba_update(
    hidden_states, conv_state, ssm_state, in_proj_weight, conv1d_weight, conv1d_bias, x_proj_weight,
    delta_proj_weight, out_proj_weight, A_log, D=None, delta_bias=None,
    *, in_proj_bias=None, out_proj_bias=None, rms_eps=None, norm_weight=None, norm_eps=1e-5,
):  # fmt: skip
    """One token through a Mamba mixer: in_proj, convolution, x_proj, delta_proj, scan, gate and out_proj.

    Args:
        hidden_states: (B, M), float64, float32, float16 or bfloat16.
        conv_state: (B, D, K), K at least W - 1: the convolution's last K inputs, oldest first. In place.
        ssm_state: (B, D, N), float32, float16, bfloat16 (float64 for float64 hidden_states). In place.
        in_proj_weight: (2 D, M).   conv1d_weight: (D, 1, W) or (D, W), W from 2 to 8.   conv1d_bias: (D,) or None.
        x_proj_weight: (R + 2 N, D).   delta_proj_weight: (D, R).   out_proj_weight: (M, D).
        A_log: (D, N), the logarithm of -A.   D, delta_bias: (D,) or None.
        in_proj_bias: (2 D,).   out_proj_bias: (M,).
        norm_weight: (M,): compute the residual block around the mixer, hidden_states + mixer(rms_norm(hidden_states)
            norm_weight), the norm with epsilon norm_eps.
        rms_eps: RMS-normalize the three parts of x_proj's output, without weights (FalconMamba), with this epsilon.

    Returns:
        out (B, M), hidden_states' dtype. This op has no gradient and says so when differentiated.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu & Dao, Mamba, 2023, section 3.4 and figure 3, one token at a time; parameters as in
    state-spaces/mamba's modules/mamba_simple.py.
    """
    tensors = (
        conv_state, ssm_state, hidden_states, in_proj_weight, in_proj_bias, conv1d_weight, conv1d_bias, x_proj_weight,
        delta_proj_weight, out_proj_weight, out_proj_bias, A_log, D, delta_bias, norm_weight,
    )  # fmt: skip
    accepted = _accepted(*tensors)
    _checks.writable(NAME, "conv_state", conv_state)  # by strides, which are not looked up
    _checks.writable(NAME, "ssm_state", ssm_state)
    rms_eps = -1.0 if rms_eps is None else _checks.number(NAME, "rms_eps", rms_eps)
    norm_eps = _checks.number(NAME, "norm_eps", norm_eps)
    args = _library.detached(tensors)
    if not accepted:
        args = tuple(t if t is None else t.to(dtype) for t, dtype in zip(args, _dtypes(args)))
    if conv1d_weight.dim() == 3:
        args = (*args[:5], args[5].flatten(1), *args[6:])
    out = mamba_update_op(*args, rms_eps, norm_eps)
    return _library.inference_only(NAME, out, *tensors) if torch.is_grad_enabled() else out


_NAMES = (
    "conv_state", "ssm_state", "hidden_states", "in_proj_weight", "in_proj_bias", "conv1d_weight", "conv1d_bias",
    "x_proj_weight", "delta_proj_weight", "out_proj_weight", "out_proj_bias", "A_log", "D", "delta_bias",
    "norm_weight",
)  # fmt: skip
_PARAMETERS = frozenset(("conv1d_weight", "conv1d_bias", "A_log", "D", "delta_bias"))  # in float32 (float64)


@_checks.remembered
def _accepted(*tensors) -> bool:
    """Whether every tensor has the dtype that the op takes. Raises what `_check` raises."""
    _check(**dict(zip(_NAMES, tensors)))
    return all(t is None or t.dtype == dtype for t, dtype in zip(tensors, _dtypes(tensors)))


def _dtypes(tensors) -> list[torch.dtype]:
    """What the op takes each tensor in: states as they are, parameters in float32 (float64), products in x's dtype."""
    conv_state, ssm_state, hidden_states, *_ = tensors
    io = hidden_states.dtype
    real = torch.float64 if io == torch.float64 else torch.float32
    products = [real if name in _PARAMETERS else io for name in _NAMES[3:]]
    return [conv_state.dtype, ssm_state.dtype, io, *products]


def _check(hidden_states, conv_state, ssm_state, **given):
    _checks.tensor(NAME, "hidden_states", hidden_states, dims=2, dtypes=_checks.FLOATING)
    _checks.tensor(NAME, "A_log", given["A_log"], dims=2, dtypes=_checks.FLOATING)
    _checks.tensor(NAME, "delta_proj_weight", given["delta_proj_weight"], dims=2, dtypes=_checks.FLOATING)
    (batch, model), (channels, states) = hidden_states.shape, given["A_log"].shape
    rank = given["delta_proj_weight"].shape[1]
    shapes = {
        "in_proj_weight": (2 * channels, model), "x_proj_weight": (rank + 2 * states, channels),
        "delta_proj_weight": (channels, rank), "out_proj_weight": (model, channels), "in_proj_bias": (2 * channels,),
        "conv1d_bias": (channels,), "D": (channels,), "delta_bias": (channels,), "out_proj_bias": (model,),
        "norm_weight": (model,),
    }  # fmt: skip
    for name, shape in shapes.items():
        value = given[name]
        if value is not None or name.endswith("_proj_weight"):
            _checks.tensor(NAME, name, value, dims=len(shape), dtypes=_checks.FLOATING)
            _checks.shape(NAME, name, value, shape)
    check_states(NAME, conv_state, ssm_state, given["conv1d_weight"], batch, channels, states)
    _checks.same_device(NAME, "hidden_states", hidden_states, conv_state=conv_state, ssm_state=ssm_state, **given)


def check_states(op, conv_state, ssm_state, conv1d_weight, batch, channels, states):
    """Both states, and the filter that reads the first."""
    _checks.tensor(op, "conv1d_weight", conv1d_weight, dims=(2, 3), dtypes=_checks.FLOATING)
    _checks.shape(op, "conv1d_weight", conv1d_weight, (channels, 1, None), (channels, None))
    width = conv1d_weight.shape[-1]
    if not 2 <= width <= 8:
        raise ValueError(f"{op}: conv1d_weight must have a width from 2 to 8, got shape {tuple(conv1d_weight.shape)}")
    _checks.tensor(op, "conv_state", conv_state, dims=3, dtypes=_checks.FLOATING)
    _checks.shape(op, "conv_state", conv_state, (batch, channels, None))
    if conv_state.shape[2] < width - 1:
        got = tuple(conv_state.shape)
        raise ValueError(f"{op}: conv_state must hold at least {width - 1} tokens, got shape {got}")
    _checks.tensor(op, "ssm_state", ssm_state, dims=3, dtypes=STATE)
    _checks.shape(op, "ssm_state", ssm_state, (batch, channels, states))


def _allocate(conv_state, ssm_state, hidden_states, *rest):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _empty(conv_state, ssm_state, hidden_states, *rest):
    return hidden_states.numel() == 0 or ssm_state.numel() == 0


_composed = functools.partial(composed, conv=causal_conv1d_update_op, scan=selective_state_update_op)
_native = filling(_allocate, native("mamba_update", "cpu"))


def _cpu(*args):
    return _native(*args) if _is_native(*args) else _composed(*args)


_cpu.native_op = _native.native_op


def _is_native(conv_state, ssm_state, hidden_states, in_proj_weight, in_proj_bias, *rest) -> bool:
    """The native step is for few rows, reads rows of the weights, and wants everything else contiguous.

    It divides by the rank of the step size, which is 0 where a model narrower than 16 takes a sixteenth of its width.
    """
    _, _, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A_log, _, _, norm_weight, *_ = rest
    rows = (hidden_states, in_proj_weight, x_proj_weight, delta_proj_weight, out_proj_weight)
    return (
        hidden_states.shape[0] <= NATIVE_ROWS
        and delta_proj_weight.shape[1] > 0
        and all([t.stride(1) == 1 for t in rows])
        and all([t is None or t.is_contiguous() for t in (in_proj_bias, out_proj_bias, A_log, norm_weight)])
    )


mamba_update_op = _library.define(
    NAME,
    "mamba_update(Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor hidden_states, Tensor in_proj_weight, "
    "Tensor? in_proj_bias, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, "
    "Tensor delta_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A_log, Tensor? D, "
    "Tensor? delta_bias, Tensor? norm_weight, float rms_eps, float norm_eps) -> Tensor",
    backends=(
        Backend("cuda", _composed),
        Backend("triton", _composed),
        Backend("cpu", _cpu),
        Backend("reference", composed),
    ),
    fake=_allocate,
    empty=_empty,
)
