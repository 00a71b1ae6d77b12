"""One decoding step of a Mamba mixer of low-bit weights as one op, in place on both of its states.

Shape letters: B batch, M model width, D channels, N state size, R rank of the step size, W filter width, K tokens of
the convolution's window.

A step of a model a few hundred wide is bound by its calls, some ten of them when its parts are called one by one. On
the CPU one native call makes it, of the very kernels of those parts; elsewhere, and for larger batches, they are called
one by one.
"""

import functools

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, filling, native
from scalekern.ops._quant_matmul_cpu import code_values
from scalekern.ops._hadamard import _signs as matrix_of
from scalekern.ops.causal_conv1d import causal_conv1d_update_op
from scalekern.ops.hadamard_transform import hadamard_transform_fwd
from scalekern.ops.quant_matmul import ACTIVATIONS, quant_matmul_fwd
from scalekern.ops.selective_state_update import STATE, selective_state_update_op
from scalekern.quant import QuantizedTensor
from scalekern.quant._rotation import block_of
from scalekern.reference.hadamard_transform import MATRICES, factor
from scalekern.reference.quant_matmul import ACTIVATION_MAX
from scalekern.reference.quantized_mamba_update import formats_of, parts_of
from scalekern.reference.quantized_mamba_update import quantized_mamba_update_op as composed

NAME = "quantized_mamba_update"
NATIVE_ROWS = 8  # as of mamba_update; of more rows the calls are no longer what a step costs


def quantized_mamba_update(
    hidden_states, conv_state, ssm_state, in_proj_weight, conv1d_weight, conv1d_bias, x_proj_weight,
    delta_proj_weight, out_proj_weight, A_log, D=None, delta_bias=None,
    *, in_proj_bias=None, out_proj_bias=None, activation=None, activation_scale=None, in_proj_signs=None,
    x_proj_signs=None, delta_proj_signs=None, out_proj_signs=None,
):  # fmt: skip
    """`mamba_update` with the weights of its projections read as they are stored, in 1 to 8 bits.

    Args:
        hidden_states: (B, M), float64, float32, float16 or bfloat16.
        conv_state: (B, D, K), K at least W - 1: the convolution's last K inputs, oldest first. In place.
        ssm_state: (B, D, N), float32, float16, bfloat16 (float64 for float64 hidden_states). In place.
        in_proj_weight: QuantizedTensor (2 D, M).   x_proj_weight: QuantizedTensor (R + 2 N, D), R from 1.
        out_proj_weight: QuantizedTensor (M, D).   delta_proj_weight: (D, R), a QuantizedTensor or a floating tensor.
        conv1d_weight: (D, 1, W) or (D, W), W from 2 to 8.   conv1d_bias: (D,) or None.
        A_log: (D, N), the logarithm of -A.   D, delta_bias: (D,) or None.
        in_proj_bias: (2 D,).   out_proj_bias: (M,).
        activation, activation_scale: as for `quant_matmul`, of the inputs of all projections but delta_proj's.
        in_proj_signs, x_proj_signs, delta_proj_signs, out_proj_signs: (columns,) int8 of -1 and 1: the columns of that
            weight are rotated, and so is its input, by these signs and a Hadamard transform; None where they are not.

    Returns:
        out (B, M), hidden_states' dtype. This op has no gradient and says so when differentiated.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu & Dao, Mamba, 2023, section 3.4 and figure 3, one token at a time; Frantar et al., GPTQ, 2023 (groups);
    Ashkboos et al., QuaRot, 2024 (rotation).
    """
    weights = in_proj_weight, x_proj_weight, delta_proj_weight, out_proj_weight
    biases = in_proj_bias, None, None, out_proj_bias
    signs = in_proj_signs, x_proj_signs, delta_proj_signs, out_proj_signs
    tensors = hidden_states, conv_state, ssm_state, conv1d_weight, conv1d_bias, A_log, D, delta_bias
    _check(tensors, weights, biases, signs)
    _checks.choice(NAME, "activation", activation, ACTIVATIONS)
    if activation_scale is not None and (activation is None or not activation_scale > 0):
        got = f"{activation_scale!r} and {activation!r}"
        raise ValueError(f"{NAME}: activation_scale must be above 0 and come with an activation, got {got}")
    io = hidden_states.dtype
    if not isinstance(delta_proj_weight, QuantizedTensor):
        weights = (*weights[:2], delta_proj_weight.to(io), weights[3])
    real = torch.float64 if io == torch.float64 else torch.float32
    conv1d_weight, *parameters = (t if t is None else t.to(real) for t in tensors[3:])
    return step(
        conv_state, ssm_state, hidden_states, conv1d_weight.flatten(1), *parameters,
        *(parts_of(*one) for one in zip(weights, biases, signs)), *formats_of(weights), activation or "",
        activation_scale,
    )  # fmt: skip


def step(*args):
    """The op, of arguments as it takes them."""
    if not torch.is_grad_enabled():
        return quantized_mamba_update_op.light(*args)
    tensors = [t for a in args for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, torch.Tensor)]
    plain = lambda a: a.detach() if isinstance(a, torch.Tensor) else a  # noqa: E731
    args = [tuple(plain(t) for t in a) if isinstance(a, tuple) else plain(a) for a in args]
    return _library.inference_only(NAME, quantized_mamba_update_op.light(*args), *tensors)


PROJECTIONS = ("in_proj", "x_proj", "delta_proj", "out_proj")


def _check(tensors, weights, biases, signs):
    hidden_states, conv_state, ssm_state, conv1d_weight, conv1d_bias, A_log, D, delta_bias = tensors
    _checks.tensor(NAME, "hidden_states", hidden_states, dims=2, dtypes=_checks.FLOATING)
    _checks.tensor(NAME, "A_log", A_log, dims=2, dtypes=_checks.FLOATING)
    for name, w in zip(PROJECTIONS, weights):
        if name == "delta_proj" and not isinstance(w, QuantizedTensor):
            _checks.tensor(NAME, f"{name}_weight", w, dims=2, dtypes=_checks.FLOATING)
        elif not isinstance(w, QuantizedTensor):
            got = type(w).__name__
            raise TypeError(f"{NAME}: {name}_weight must be a scalekern.quant.QuantizedTensor, got {got}")
        elif len(w.check(NAME).shape) != 2:
            raise ValueError(f"{NAME}: {name}_weight must have 2 dimensions, got shape {tuple(w.shape)}")
    (batch, model), (channels, states) = hidden_states.shape, A_log.shape
    rank = max(1, weights[1].shape[0] - 2 * states)
    shapes = (2 * channels, model), (rank + 2 * states, channels), (channels, rank), (model, channels)
    for name, w, bias, flips, shape in zip(PROJECTIONS, weights, biases, signs, shapes):
        if tuple(w.shape) != shape:
            raise ValueError(f"{NAME}: {name}_weight must have shape {shape}, got {tuple(w.shape)}")
        if bias is not None:
            _checks.tensor(NAME, f"{name}_bias", bias, dims=1, dtypes=_checks.FLOATING)
            _checks.shape(NAME, f"{name}_bias", bias, shape[:1])
        if flips is not None:
            _checks.tensor(NAME, f"{name}_signs", flips, dims=1, dtypes=(torch.int8,))
            _checks.shape(NAME, f"{name}_signs", flips, shape[1:])
    for name, t in (("conv1d_bias", conv1d_bias), ("D", D), ("delta_bias", delta_bias)):
        if t is not None:
            _checks.tensor(NAME, name, t, dims=1, dtypes=_checks.FLOATING)
            _checks.shape(NAME, name, t, (channels,))
    _checks.tensor(NAME, "conv1d_weight", conv1d_weight, dims=(2, 3), dtypes=_checks.FLOATING)
    _checks.shape(NAME, "conv1d_weight", conv1d_weight, (channels, 1, None), (channels, None))
    width = conv1d_weight.shape[-1]
    if not 2 <= width <= 8:
        raise ValueError(f"{NAME}: conv1d_weight must have a width from 2 to 8, got shape {tuple(conv1d_weight.shape)}")
    _checks.tensor(NAME, "conv_state", conv_state, dims=3, dtypes=_checks.FLOATING)
    _checks.shape(NAME, "conv_state", conv_state, (batch, channels, None))
    if conv_state.shape[2] < width - 1:
        got = tuple(conv_state.shape)
        raise ValueError(f"{NAME}: conv_state must hold at least {width - 1} tokens, got shape {got}")
    _checks.tensor(NAME, "ssm_state", ssm_state, dims=3, dtypes=STATE)
    _checks.shape(NAME, "ssm_state", ssm_state, (batch, channels, states))
    named = dict(conv_state=conv_state, ssm_state=ssm_state, conv1d_weight=conv1d_weight, conv1d_bias=conv1d_bias,
                 A_log=A_log, D=D, delta_bias=delta_bias)  # fmt: skip
    for name, w, bias, flips in zip(PROJECTIONS, weights, biases, signs):
        data = w.data if isinstance(w, QuantizedTensor) else w
        named |= {f"{name}_weight": data, f"{name}_bias": bias, f"{name}_signs": flips}
    _checks.same_device(NAME, "hidden_states", hidden_states, **named)


def _allocate(conv_state, ssm_state, hidden_states, *rest):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _empty(conv_state, ssm_state, hidden_states, *rest):
    return hidden_states.numel() == 0 or ssm_state.numel() == 0


_composed = functools.partial(
    composed, conv=causal_conv1d_update_op, scan=selective_state_update_op, matmul=quant_matmul_fwd,
    transform=hadamard_transform_fwd,
)  # fmt: skip
_native = native(NAME, "cpu")
# enum QuantDtype of csrc/quant_matmul/quant_matmul.h.
_KINDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.float8_e4m3fn: 4,
          torch.float8_e8m0fnu: 5, torch.int8: 6, torch.uint8: 7, None: -1}  # fmt: skip


@functools.lru_cache(256)
def _layout(dtypes: tuple, columns: tuple, formats: tuple, group_sizes: tuple) -> tuple[torch.Tensor, tuple]:
    """(what the native step reads about each projection, and each one's tables: of its codes, of H_m)."""
    rows, tables = [], []
    for (_, *kinds, bias, rotated), K, format, group in zip(dtypes, columns, formats, group_sizes):
        table, *code = code_values(format, torch.device("cpu")) if format else (None, 0, 1.0, 0.0, 0, 0.0)
        block = block_of(K) if rotated else 0
        m, k = factor(block, 0) if rotated else (0, 0)
        kinds = [_KINDS[kind] for kind in (*kinds, bias)]
        rows.append([*code, group, K, *kinds, -1 if table is None else 0, block, m, k])
        tables.append((table, matrix_of(m, MATRICES[0], False) if rotated else None))
    return torch.tensor(rows, dtype=torch.float64, device="cpu"), tuple(tables)


def _cpu(*args):
    if not _is_native(*args):
        return _composed(*args)
    *tensors, in_proj, x_proj, delta_proj, out_proj, formats, group_sizes, activation, activation_scale = args
    projections = in_proj, x_proj, delta_proj, out_proj
    D, N = args[5].shape
    columns = args[2].shape[1], D, x_proj[0].shape[0] - 2 * N, D
    dtypes = tuple([tuple([None if t is None else t.dtype for t in (*p[:5], *p[6:])]) for p in projections])
    layout, tables = _layout(dtypes, columns, tuple(formats), tuple(group_sizes))
    parts = []
    for (data, scales, zeros, offsets, outer, _, bias, signs), (table, matrix) in zip(projections, tables):
        if scales is not None and scales.dtype == torch.float8_e8m0fnu:
            scales = scales.view(torch.uint8)  # which torch's stable ABI does not know
        parts += [t for t in (data, scales, zeros, offsets, outer, bias, table, signs, matrix) if t is not None]
    out = _allocate(*tensors)
    _native(out, *tensors, parts, layout, ACTIVATION_MAX.get(activation, 0.0), activation_scale or 0.0)
    return out


_cpu.native_op = _native.native_op


def _is_native(conv_state, ssm_state, hidden_states, conv1d_weight, conv1d_bias, A_log, D, delta_bias, *rest) -> bool:
    """The native step is for few rows, in act-order for none, and reads rows."""
    projections = rest[:4]
    return (
        hidden_states.shape[0] <= NATIVE_ROWS
        and hidden_states.dtype != torch.float64
        and hidden_states.stride(1) == 1
        and A_log.is_contiguous()
        and all([p[5] is None and p[0].stride(1) == 1 and (p[7] is None or p[7].is_contiguous()) for p in projections])
    )


quantized_mamba_update_op = _library.define(
    NAME,
    "quantized_mamba_update(Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor hidden_states, Tensor conv1d_weight, "
    "Tensor? conv1d_bias, Tensor A_log, Tensor? D, Tensor? delta_bias, Tensor?[] in_proj, Tensor?[] x_proj, "
    "Tensor?[] delta_proj, Tensor?[] out_proj, str[] formats, int[] group_sizes, str activation, "
    "float? activation_scale) -> Tensor",
    backends=(
        Backend("cuda", _composed),
        Backend("triton", _composed),
        Backend("cpu", _cpu),
        Backend("reference", composed),
    ),
    fake=_allocate,
    empty=_empty,
)
