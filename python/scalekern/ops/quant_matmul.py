"""Matrix product with a low-bit weight: public function, checks, schemas, backends, fakes and gradient.

Shape letters: M tokens, N outputs, K inputs, G groups of columns, E experts.
"""

import torch

from scalekern import _checks, _dispatch, _library
from scalekern._dispatch import Backend, composed, filling, triton
from scalekern.ops import _quant_matmul, _quant_matmul_cpu, _quant_matmul_cuda
from scalekern.quant import QuantizedTensor
from scalekern.reference.quant_matmul import ACTIVATION_MAX
from scalekern.reference.quant_matmul import quant_matmul_bwd as reference_bwd
from scalekern.reference.quant_matmul import quant_matmul_fwd as reference_fwd

NAME = "quant_matmul"
ACTIVATIONS = (None, *ACTIVATION_MAX)
_STRIDED = torch.strided
SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max  # of a static scale, which kernels read as float32


def quant_matmul(x, w, *, bias=None, activation=None, activation_scale=None, out_dtype=None, offs=None):
    """x @ dequantize(w).T + bias, with the weight read as it is stored. Differentiable for x, bias and w's scales.

    With an activation kind, each token of x is first rounded to it, so that the product is one of integers (or of
    float8): exact but for the scales, and straight-through for the gradient of x.

    With offs it is the grouped product of a mixture of experts: w holds E matrices one below the other, and each run of
    x's rows meets its own, all in one launch, with no word from the GPU to the host about how many rows each has.

    Args:
        x: (..., K), float64, float32, float16 or bfloat16, any strides.
        w: QuantizedTensor (N, K) of any format and group size; a view of a larger one too. (E * N, K) with offs.
        bias: (N,) floating or None; (E, N) with offs.
        activation: None (weight-only), "int8", "int4" or "fp8" (e4m3): how x is rounded, x / scale to the nearest
            number, halves to even, with the scale max |x| / 127 (7, 448) of a token, all in float32.
        activation_scale: float above 0, a static scale in place of the tokens' own.
        out_dtype: of the result; None for x's dtype (under autocast, the autocast dtype).
        offs: (E,) int32 or None: x is (M, K), and its rows offs[e - 1] (0 for e = 0) to offs[e] meet matrix e. Rising,
            at most M (checked on the CPU; on a GPU other values give undefined results). Rows beyond the last give 0.

    Returns:
        (..., N) in out_dtype, accumulated in float32, float64 for float64 x, and in int32 within a group where both
        sides are integers. w's scales, zeros, offsets and outer get gradients where they require them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Frantar et al., GPTQ, 2023 (weight-only, groups); Dettmers et al., LLM.int8(), 2022, section 2.1 (a scale a
    token and a row).
    """
    usual = bias is None and activation_scale is None and out_dtype is None and offs is None
    if usual and not torch.compiler.is_compiling() and (out := _at_once(x, w, activation)) is not None:
        return out
    if not isinstance(x, torch.Tensor) or x.dim() == 0 or x.dtype not in _checks.FLOATING or x.layout != torch.strided:
        if isinstance(x, torch.Tensor) and x.layout != torch.strided:
            raise TypeError(f"{NAME}: x must be a dense tensor, got {x.layout}")
        _checks.tensor(NAME, "x", x, dims=range(1, 65), dtypes=_checks.FLOATING)
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"{NAME}: w must be a scalekern.quant.QuantizedTensor, got {type(w).__name__}")
    w.check(NAME)
    if w.data.dim() != 2:
        raise ValueError(f"{NAME}: w must have 2 dimensions, got shape {tuple(w.shape)}")
    N, K = w.data.shape[0], w.columns
    if offs is not None:
        N = _rows_an_expert(x, N, offs)
    if x.shape[-1] != K:
        _checks.shape(NAME, "x", x, (*x.shape[:-1], K))
    if bias is not None:
        wanted = (N,) if offs is None else (offs.shape[0], N)
        _checks.tensor(NAME, "bias", bias, dims=len(wanted), dtypes=_checks.FLOATING)
        _checks.shape(NAME, "bias", bias, wanted)
        bias = bias if offs is None else bias.reshape(-1)
    if activation is not None:
        _checks.choice(NAME, "activation", activation, ACTIVATIONS)
    if activation_scale is not None:
        activation_scale = static_scale(NAME, activation_scale, activation)
    if out_dtype is not None:
        _checks.choice(NAME, "out_dtype", out_dtype, _checks.FLOATING)
    if x.device != w.data.device or bias is not None or offs is not None:
        _checks.same_device(NAME, "x", x, bias=bias, w=w.data, offs=offs)
    if usual and not torch.compiler.is_compiling():
        _keep(w, activation)
    if w.perm is not None:
        x = x.index_select(-1, w.perm)
    rows = x if x.dim() > 1 else x[None]
    out = quant_matmul_fwd(
        rows, w.data, w.scales, w.zeros, w.offsets, w.outer, bias, offs,
        w.format, w.group_size, activation or "", activation_scale, out_dtype,
    )  # fmt: skip
    return out if x.dim() > 1 else out[0]


def static_scale(op: str, scale, activation) -> float:
    """The float of an activation_scale that can be."""
    scale = scale if isinstance(scale, float) else _checks.number(op, "activation_scale", scale)
    if activation is None or not scale > 0:
        got = f"{scale!r} and {activation!r}"
        raise ValueError(f"{op}: activation_scale must be above 0 and come with an activation, got {got}")
    if not SMALLEST <= scale <= LARGEST:
        raise ValueError(f"{op}: activation_scale must lie in float32's range, got {scale!r}")
    return scale


def _keep(w: QuantizedTensor, activation) -> None:
    """Leave with a sound weight what the native call takes of it: of the next call only x is looked at."""
    known = w.__dict__.get("_native", {}).get(activation)
    if w.perm is None and not (known and known.is_where_it_was()):
        parts = w.data, w.scales, w.zeros, w.offsets, w.outer, None
        if (weight := kept_weight(w.columns, *parts, w.format, w.group_size, activation or "", None)) is not None:
            w.__dict__.setdefault("_native", {})[activation] = weight


def _at_once(x, w, activation):
    """The product of a weight that was kept; None of any other. Written out: in front of a product of 8.9 MB, which
    leaves nothing of Python in L2, each function or attribute on the way there takes a microsecond or two."""
    kept = w.__dict__.get("_native") if type(w) is QuantizedTensor and activation in ACTIVATIONS else None
    weight = kept and kept.get(activation)
    if weight is None or not _library.is_plain((x,)) or not isinstance(x, torch.Tensor):
        return None
    if x.is_cpu is not weight.is_cpu or x.layout is not _STRIDED or not _dispatch.allows(weight.backend):
        return None
    grad = torch.is_grad_enabled()
    for part, where, size, dtype in zip(weight.parts, weight.where, weight.sizes, weight.dtypes):
        if part.data_ptr() != where or part.nbytes != size or part.dtype is not dtype or grad and part.requires_grad:
            return None
    return weight.product(x)


def _rows_an_expert(x, rows: int, offs) -> int:
    """N, of a weight that holds the matrices of all experts."""
    _checks.tensor(NAME, "offs", offs, dims=1, dtypes=(torch.int32,))
    if x.dim() != 2:
        raise ValueError(f"{NAME}: x must have 2 dimensions when offs is given, got shape {tuple(x.shape)}")
    if not offs.shape[0] or rows % offs.shape[0]:
        raise ValueError(
            f"{NAME}: offs must have as many elements as w has matrices, got {offs.shape[0]} for {rows} rows"
        )
    if _checks.readable(offs) and not (x.numel() and rows):  # else the kernels look
        _quant_matmul.check_ends(offs.tolist(), x.shape[0])
    return rows // offs.shape[0]


def _allocate_fwd(x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, scale, out_dtype):
    """The output, uninitialized: what the fake returns and what the backends fill."""
    sizes = (*x.shape[:-1], data.shape[0] if offs is None else data.shape[0] // offs.shape[0])
    return x.new_empty(sizes) if out_dtype is None else x.new_empty(sizes, dtype=out_dtype)


def _allocate_bwd(
    dout, x, data, scales, zeros, offsets, outer, bias, offs, format, group_size, activation, scale, weight_grads
):
    def like(part, wanted):
        return torch.empty_like(part, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)

    parts = [like(p, _quant_matmul.trained(p, weight_grads)) for p in (scales, zeros, offsets, outer)]
    return x.new_empty(x.shape), *parts, like(bias, bias is not None)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.format, ctx.group_size, ctx.activation, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
    grads = quant_matmul_bwd(
        dout, *tensors, ctx.format, ctx.group_size, ctx.activation, ctx.scale, any(needed[2:6])
    )
    trained = *(_quant_matmul.trained(part, True) for part in tensors[2:6]), True
    parts = [g if n and own else None for g, n, own in zip(grads[1:], needed[2:], trained)]
    return grads[0] if needed[0] else None, None, *parts, None, None, None, None, None, None


_PARTS = "Tensor data, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? outer, Tensor? bias, Tensor? offs"
_OPTIONS = "str format, int group_size, str activation, float? activation_scale"

_on_cpu = Backend("cpu", filling(_allocate_fwd, _quant_matmul_cpu.forward))

quant_matmul_fwd = _library.define(
    NAME,
    f"quant_matmul_fwd(Tensor x, {_PARTS}, {_OPTIONS}, ScalarType? out_dtype) -> Tensor",
    backends=(
        Backend("cuda", filling(_allocate_fwd, _quant_matmul_cuda.forward_few), _quant_matmul_cuda.supports_few),
        Backend("triton", filling(_allocate_fwd, triton(NAME, "quant_matmul_fwd"))),
        Backend("cuda", filling(_allocate_fwd, _quant_matmul_cuda.forward), _quant_matmul_cuda.supports_fwd),
        _on_cpu,
        *composed(filling(_allocate_fwd, _quant_matmul.forward), reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=lambda x, data, *rest: x.numel() == 0 or data.shape[0] == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x",),
)

quant_matmul_bwd = _library.define(
    NAME,
    f"quant_matmul_bwd(Tensor dout, Tensor x, {_PARTS}, {_OPTIONS}, bool weight_grads)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_bwd, triton("quant_matmul_bwd", "quant_matmul_bwd"))),
        Backend("cpu", filling(_allocate_bwd, _library.without_autocast(_quant_matmul_cpu.backward))),
        *composed(filling(_allocate_bwd, _library.without_autocast(_quant_matmul.backward)), reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, x, data, *rest: x.numel() == 0 or data.shape[0] == 0,
)


def kept_weight(K, data, scales, zeros, offsets, outer, bias, *options) -> _quant_matmul_cpu.KeptWeight | None:
    """What multiplies with these parts at once; None of tensors that the native call may not read, or on the CPU
    without it. options: format, group_size, activation, activation_scale, as for the op."""
    parts = data, scales, zeros, offsets, outer, bias
    if not _library.is_plain(parts) or not (data.shape[0] and data.stride(-1) == 1):
        return None
    if data.is_cuda:
        return _quant_matmul_cuda.KeptWeight(K, *parts, None, *options)
    if _dispatch.select(quant_matmul_fwd.name, quant_matmul_fwd.backends, "cpu", ()) is not _on_cpu:
        return None
    return _quant_matmul_cpu.KeptWeight(K, *parts, None, *options)
