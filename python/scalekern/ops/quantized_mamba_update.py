"""One decoding step of a Mamba mixer of low-bit weights as one op, in place on both of its states.

Shape letters: B batch, M model width, D channels, N state size, R rank of the step size, W filter width, K tokens of
the convolution's window.

A step of a model a few hundred wide is bound by its calls, some ten of them when its parts are called one by one. On
the CPU one native call makes it, of the very kernels of those parts; elsewhere, and for larger batches, they are called
one by one.
"""

import functools
import itertools

import torch

from scalekern import _checks, _dispatch, _library
from scalekern._dispatch import Backend, native
from scalekern.ops._hadamard import _signs as matrix_of
from scalekern.ops._quant_matmul_cpu import code_values
from scalekern.ops.causal_conv1d import causal_conv1d_update_op
from scalekern.ops.hadamard_transform import hadamard_transform_fwd
from scalekern.ops.mamba_update import check_states
from scalekern.ops.quant_matmul import ACTIVATIONS, quant_matmul_fwd, static_scale
from scalekern.ops.selective_state_update import selective_state_update_op
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
    for w in weights:
        if isinstance(w, QuantizedTensor):
            w.check(NAME)
    _check(*tensors, *weights, *biases, *signs)
    _checks.writable(NAME, "conv_state", conv_state)  # by strides, which are not looked up
    _checks.writable(NAME, "ssm_state", ssm_state)
    _checks.choice(NAME, "activation", activation, ACTIVATIONS)
    if activation_scale is not None:
        activation_scale = static_scale(NAME, activation_scale, activation)
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
    """The op, of arguments as it takes them, in tuples."""
    parts = itertools.chain.from_iterable([a if type(a) is tuple else (a,) for a in args])
    tensors = [t for t in parts if isinstance(t, torch.Tensor)] if torch.is_grad_enabled() else ()
    if not any([t.requires_grad for t in tensors]):
        return quantized_mamba_update_op(*args)
    plain = lambda a: a.detach() if isinstance(a, torch.Tensor) else a  # noqa: E731
    args = [tuple(plain(t) for t in a) if isinstance(a, tuple) else plain(a) for a in args]
    return _library.inference_only(NAME, quantized_mamba_update_op(*args), *tensors)


PROJECTIONS = ("in_proj", "x_proj", "delta_proj", "out_proj")


@_checks.remembered
def _check(*values):
    """hidden_states to delta_bias, the four weights, their biases, their signs."""
    hidden_states, conv_state, ssm_state, conv1d_weight, conv1d_bias, A_log, D, delta_bias = values[:8]
    weights, biases, signs = values[8:12], values[12:16], values[16:]
    _checks.tensor(NAME, "hidden_states", hidden_states, dims=2, dtypes=_checks.FLOATING)
    _checks.tensor(NAME, "A_log", A_log, dims=2, dtypes=_checks.FLOATING)
    for name, w in zip(PROJECTIONS, weights):
        if name == "delta_proj" and not isinstance(w, QuantizedTensor):
            _checks.tensor(NAME, f"{name}_weight", w, dims=2, dtypes=_checks.FLOATING)
        elif not isinstance(w, QuantizedTensor):
            got = type(w).__name__
            raise TypeError(f"{NAME}: {name}_weight must be a scalekern.quant.QuantizedTensor, got {got}")
        elif len(w.shape) != 2:
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
    check_states(NAME, conv_state, ssm_state, conv1d_weight, batch, channels, states)
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


@functools.lru_cache(256)
def _layout(there: tuple, powers: tuple, columns: tuple, formats: tuple, group_sizes: tuple):
    """(what the native step reads about each projection, and each one's tables: of its codes, of H_m)."""
    rows, tables = [], []
    for (_, _, *parts, rotated), power, K, format, group in zip(there, powers, columns, formats, group_sizes):
        table, *code = code_values(format, torch.device("cpu")) if format else (None, 0, 1.0, 0.0, 0, 0.0)
        block = block_of(K) if rotated else 0
        m, k = factor(block, 0) if rotated else (0, 0)
        rows.append([*code, group, K, power, *parts, table is not None, block, m, k])
        tables.append((table, matrix_of(m, MATRICES[0], False) if rotated else None))
    return torch.tensor(rows, dtype=torch.float64, device="cpu"), tuple(tables)


def native_parts(projections, columns, formats, group_sizes, activation, activation_scale) -> tuple | None:
    """What the native step takes of the projections: their tensors in a row and what they are; None if it cannot."""
    if any(p[5] is not None or p[0].stride(1) != 1 or not (p[7] is None or p[7].is_contiguous()) for p in projections):
        return None
    kept = [(*p[:5], *p[6:]) for p in projections]
    there = tuple([tuple([t is not None for t in p]) for p in kept])
    powers = tuple([p[1] is not None and p[1].dtype == torch.float8_e8m0fnu for p in kept])
    layout, tables = _layout(there, powers, columns, tuple(formats), tuple(group_sizes))
    parts = []
    for (data, scales, zeros, offsets, outer, bias, signs), power, (table, matrix) in zip(kept, powers, tables):
        scales = scales.view(torch.uint8) if power else scales  # which torch's stable ABI does not know
        parts += [t for t in (data, scales, zeros, offsets, outer, bias, table, signs, matrix) if t is not None]
    return parts, layout, ACTIVATION_MAX.get(activation, 0.0), activation_scale or 0.0


def native_step(conv_state, ssm_state, hidden_states, parameters, native):
    """The step of `native_parts`; None where the op would take another way, with nothing changed.

    It reads conv1d's weight as the layer holds it; a step size's dense projection must have hidden_states' dtype.
    """
    weight, bias, A_log, *rest = parameters
    if not (
        hidden_states.is_cpu
        and _library.is_plain((conv_state, ssm_state, hidden_states))
        and not torch.is_grad_enabled()
        and _dispatch.select(NAME, quantized_mamba_update_op.backends, "cpu", ()).run is _cpu
        and _is_native(hidden_states, A_log)
        and all([t is None or t.dtype == torch.float32 for t in parameters])
        and hidden_states.numel() and ssm_state.numel()
    ):  # fmt: skip
        return None
    out = _allocate(conv_state, ssm_state, hidden_states)
    _native(out, conv_state, ssm_state, hidden_states, weight.flatten(1), bias, A_log, *rest, *native)
    torch._C._increment_version((conv_state, ssm_state))
    return out


def _cpu(*args):
    *tensors, in_proj, x_proj, delta_proj, out_proj, formats, group_sizes, activation, activation_scale = args
    hidden_states, A_log, N = tensors[2], tensors[5], tensors[5].shape[1]
    columns = hidden_states.shape[1], A_log.shape[0], x_proj[0].shape[0] - 2 * N, A_log.shape[0]
    native = None
    if _is_native(hidden_states, A_log):
        native = native_parts((in_proj, x_proj, delta_proj, out_proj), columns, *args[-4:])
    if native is None:
        return _composed(*args)
    out = _allocate(*tensors)
    _native(out, *tensors, *native)
    return out


def _is_native(hidden_states, A_log) -> bool:
    """The native step is for few rows, and reads them."""
    few = hidden_states.shape[0] <= NATIVE_ROWS and hidden_states.dtype != torch.float64
    return few and hidden_states.stride(1) == 1 and A_log.is_contiguous()


_cpu.native_op = _native.native_op


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
