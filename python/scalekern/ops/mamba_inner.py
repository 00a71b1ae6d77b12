"""The inner part of a Mamba block as one op: convolution, projections, scan and output projection.

Shape letters: B batch, L length, D channels, N state size (NB = N, or 2 N for a complex A), R rank of the step size,
M model width, W filter width, G groups of B and C.

Its cost is that of the matrix products and of the two ops that it is composed of; what it adds is memory. Between
forward and backward it keeps xz, the scan's output y and the scan's checkpoints, nothing else: the output of the
convolution, the step sizes, B and C are computed again (checkpoint_lvl 1), which repeats the convolution and two of
the three products, all of them small beside the scan.
"""

import functools

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend
from scalekern._packing import checkpoint_count
from scalekern.ops._linear import product
from scalekern.ops.causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd
from scalekern.ops.selective_scan import COMPLEX, selective_scan_bwd, selective_scan_fwd
from scalekern.reference.mamba_inner import KEEP_ALL, KEEP_NOTHING, RECOMPUTE
from scalekern.reference.mamba_inner import mamba_inner_bwd as composed_bwd
from scalekern.reference.mamba_inner import mamba_inner_fwd as composed_fwd
from scalekern.reference.selective_scan import normalize_matrix

NAME = "mamba_inner"


def mamba_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1,
    b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """out_proj(scan(silu(conv1d(x)), ...) * silu(z)), with delta, B and C projected from the convolution's output.

    Differentiable in every floating input, the RMS weights included, as one autograd node.

    Args:
        xz: (B, 2 D, L), the scan's input and its gate, any strides; float64, float32, float16 or bfloat16.
        conv1d_weight: (D, 1, W) or (D, W).   conv1d_bias: (D,) or None.
        x_proj_weight: (R + NB + NB, D); NB rows less for each of B and C that is given.
        delta_proj_weight: (D, R).   out_proj_weight: (M, D).   out_proj_bias: (M,) or None.
        A: (D, N), real or complex.
        B, C: None (projected), or constant or varying as in `selective_scan`.
        D, delta_bias: (D,).   B_proj_bias, C_proj_bias: (NB,), added to the projected B and C.
        delta_softplus: apply softplus to the step size.
        checkpoint_lvl: 1 keeps little for the backward and recomputes; 0 keeps the convolution's output and the step
            sizes too.
        b_rms_weight, c_rms_weight: (NB,) and dt_rms_weight: (D,): RMS-normalize the projected B, C and step size
            (after delta_proj, before delta_bias).   b_c_dt_rms_eps: its epsilon.

    Returns:
        out (B, L, M), in xz's dtype (under autocast, the autocast dtype).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Gu & Dao, Mamba, 2023, section 3.4 and figure 3; argument order of state-spaces/mamba's mamba_inner_fn.
    """
    _check(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight,
    )  # fmt: skip
    eps = _checks.number(NAME, "b_c_dt_rms_eps", b_c_dt_rms_eps)
    io = xz.dtype
    real = torch.float64 if io == torch.float64 else torch.float32
    state = real.to_complex() if A.is_complex() else real
    matrix = state if A.is_complex() else io
    length = xz.shape[-1]
    B, C = (None if m is None else _to(normalize_matrix(m, A.is_complex(), xz), matrix) for m in (B, C))
    tensors = (
        xz, _to(conv1d_weight, real).reshape(conv1d_weight.shape[0], -1), _to(conv1d_bias, real),
        _to(x_proj_weight, io), _to(delta_proj_weight, io), _to(out_proj_weight, io), _to(out_proj_bias, io),
        _to(A, state), B, C, _to(D, real), _to(delta_bias, real), _to(B_proj_bias, io), _to(C_proj_bias, io),
        _to(b_rms_weight, real), _to(c_rms_weight, real), _to(dt_rms_weight, real),
    )  # fmt: skip
    keep = checkpoint_lvl if _library.differentiated(tensors) else KEEP_NOTHING
    return mamba_inner_fwd(*tensors, eps, delta_softplus, keep)[0]


def _to(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _check(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
    delta_bias, B_proj_bias, C_proj_bias, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight,
):  # fmt: skip
    floating = _checks.FLOATING
    _checks.tensor(NAME, "xz", xz, dims=3, dtypes=floating)
    _checks.tensor(NAME, "A", A, dims=2, dtypes=floating + COMPLEX)
    batch, length = xz.shape[0], xz.shape[2]
    channels, states = A.shape
    width = states * (2 if A.is_complex() else 1)
    _checks.shape(NAME, "xz", xz, (batch, 2 * channels, length))
    _checks.tensor(NAME, "conv1d_weight", conv1d_weight, dims=(2, 3), dtypes=floating)
    _checks.shape(NAME, "conv1d_weight", conv1d_weight, (channels, 1, None), (channels, None))
    if not 2 <= conv1d_weight.shape[-1] <= 8:
        got = tuple(conv1d_weight.shape)
        raise ValueError(f"{NAME}: conv1d_weight must have a width from 2 to 8, got shape {got}")
    _checks.tensor(NAME, "delta_proj_weight", delta_proj_weight, dims=2, dtypes=floating)
    _checks.shape(NAME, "delta_proj_weight", delta_proj_weight, (channels, None))
    rows = delta_proj_weight.shape[1] + width * ((B is None) + (C is None))
    _checks.tensor(NAME, "x_proj_weight", x_proj_weight, dims=2, dtypes=floating)
    _checks.shape(NAME, "x_proj_weight", x_proj_weight, (rows, channels))
    _checks.tensor(NAME, "out_proj_weight", out_proj_weight, dims=2, dtypes=floating)
    _checks.shape(NAME, "out_proj_weight", out_proj_weight, (None, channels))
    for name, x in (("B", B), ("C", C)):
        if x is not None:
            _check_matrix(name, x, A, batch, length)
    vectors = {
        "conv1d_bias": (conv1d_bias, channels), "out_proj_bias": (out_proj_bias, out_proj_weight.shape[0]),
        "D": (D, channels), "delta_bias": (delta_bias, channels), "dt_rms_weight": (dt_rms_weight, channels),
        "B_proj_bias": (B_proj_bias, width), "b_rms_weight": (b_rms_weight, width),
        "C_proj_bias": (C_proj_bias, width), "c_rms_weight": (c_rms_weight, width),
    }  # fmt: skip
    given = {"B_proj_bias": B, "b_rms_weight": B, "C_proj_bias": C, "c_rms_weight": C}
    for name, (x, size) in vectors.items():
        if x is not None:
            _checks.tensor(NAME, name, x, dims=1, dtypes=floating)
            _checks.shape(NAME, name, x, (size,))
            if given.get(name) is not None:
                raise ValueError(f"{NAME}: {name} must be None where {name[0].upper()} is given and not projected")
    _checks.choice(NAME, "checkpoint_lvl", checkpoint_lvl, (KEEP_ALL, RECOMPUTE))
    _checks.same_device(
        NAME, "xz", xz, conv1d_weight=conv1d_weight, x_proj_weight=x_proj_weight, delta_proj_weight=delta_proj_weight,
        out_proj_weight=out_proj_weight, A=A, B=B, C=C, **{name: x for name, (x, _) in vectors.items()},
    )  # fmt: skip


def _check_matrix(name, x, A, batch, length):
    channels, states = A.shape
    _checks.tensor(NAME, name, x, dims=(2, 3, 4), dtypes=_checks.FLOATING + (COMPLEX if A.is_complex() else ()))
    wide = 2 * length if A.is_complex() and not x.is_complex() and x.dim() > 2 else length
    shapes = {2: (channels, states), 3: (batch, states, wide), 4: (batch, None, states, wide)}
    _checks.shape(NAME, name, x, shapes[x.dim()])
    if x.dim() == 4 and (x.shape[1] == 0 or channels % x.shape[1]):
        raise ValueError(f"{NAME}: the groups of {name} must divide the {channels} channels, got {x.shape[1]} groups")


def _allocate_fwd(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
    delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight, eps, delta_softplus, keep,
):  # fmt: skip
    """The outputs, uninitialized: what the fake returns."""
    batch, _, length = xz.shape
    channels = A.shape[0]
    out = xz.new_empty(batch, length, out_proj_weight.shape[0])
    if keep == KEEP_NOTHING:
        return out, xz.new_empty(0), A.new_empty(0), xz.new_empty(0), xz.new_empty(0)
    y = torch.empty_like(xz[:, :channels])
    checkpoints = A.new_empty(batch, checkpoint_count(length, A.shape[1]), *A.shape)
    if keep == RECOMPUTE:
        return out, y, checkpoints, xz.new_empty(0), xz.new_empty(0)
    return out, y, checkpoints, torch.empty_like(y), xz.new_empty(batch, length, channels)


def _allocate_bwd(dout, y, checkpoints, x, steps, *tensors_and_flags):
    def like(i, t):
        if t is None:
            return dout.new_empty(0)
        return t.new_empty(t.shape) if i in (3, 4, 5) else torch.empty_like(t)  # the three projections are products

    return tuple(like(i, t) for i, t in enumerate(tensors_and_flags[:17]))


def _backward(ctx, dout, *_):
    *tensors, y, checkpoints, x, steps = ctx.saved_tensors
    eps, delta_softplus = ctx.flags
    if dout is None:
        return (None,) * 20
    if y.numel() == 0 and tensors[0].numel():
        # The forward did not know that it would be differentiated (functorch, checkpointing wrappers).
        detached = (None if t is None else t.detach() for t in tensors)
        _, y, checkpoints, x, steps = mamba_inner_fwd(*detached, eps, delta_softplus, RECOMPUTE)
    grads = mamba_inner_bwd(dout, y, checkpoints, x, steps, *tensors, eps, delta_softplus)
    return *(None if t is None else g for g, t in zip(grads, tensors)), None, None, None


def _setup_context(ctx, inputs, output):
    *tensors, eps, delta_softplus, _ = inputs
    ctx.flags = (eps, delta_softplus)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


_fwd = functools.partial(composed_fwd, conv=causal_conv1d_fwd, scan=selective_scan_fwd, linear=product)
_bwd = _library.without_autocast(
    functools.partial(
        composed_bwd, conv=causal_conv1d_fwd, conv_bwd=causal_conv1d_bwd, scan_bwd=selective_scan_bwd, linear=product
    )
)
_TENSORS = (
    "Tensor xz, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, Tensor delta_proj_weight, "
    "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, Tensor? B, Tensor? C, Tensor? D, Tensor? delta_bias, "
    "Tensor? B_proj_bias, Tensor? C_proj_bias, Tensor? b_rms_weight, Tensor? c_rms_weight, Tensor? dt_rms_weight, "
    "float eps, bool delta_softplus"
)

# One composition for every device: the ops inside it choose their own backends.
mamba_inner_fwd = _library.define(
    NAME,
    f"mamba_inner_fwd({_TENSORS}, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend("cuda", _fwd),
        Backend("triton", _fwd),
        Backend("cpu", _fwd),
        Backend("reference", composed_fwd),
    ),
    fake=_allocate_fwd,
    empty=lambda xz, *rest: xz.numel() == 0,
    setup_context=_setup_context,
    backward=_backward,
    autocast=(
        "xz", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "out_proj_bias", "B", "C", "B_proj_bias",
        "C_proj_bias",
    ),
)  # fmt: skip

mamba_inner_bwd = _library.define(
    NAME,
    f"mamba_inner_bwd(Tensor dout, Tensor y, Tensor checkpoints, Tensor x, Tensor steps, {_TENSORS}) -> ("
    + ", ".join(["Tensor"] * 17) + ")",
    backends=(
        Backend("cuda", _bwd),
        Backend("triton", _bwd),
        Backend("cpu", _bwd),
        Backend("reference", _library.without_autocast(composed_bwd)),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, y, checkpoints, x, steps, xz, *rest: xz.numel() == 0,
)  # fmt: skip
