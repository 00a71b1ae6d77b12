"""What the Triton kernels share: device functions, the 64-bit decision, and (from launch.py) how they are launched."""

import torch
import triton
import triton.language as tl

from .. import _env
from .launch import COMPILE_SPECS, Launch, compile_spec  # noqa: F401 (launchers take them from here)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOG2E_HI: tl.constexpr = tl.constexpr(1.4426950216293335)  # the float32 nearest to log2(e), and the rest
LOG2E_LO: tl.constexpr = tl.constexpr(1.925963033500011e-08)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def silu_slope(x, gate):
    """d silu(x) / dx, where gate = sigmoid(x)."""
    return gate * (1 + x * (1 - gate))


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), accurate for very negative x too, where log(1 + e^x) is not.

    float32: e^y needs the low part of y log2(e), since the rounding error of the product is multiplied by |y|;
    log1p(w) = 2 atanh(w / (2 + w)) as a series, cheaper than a logarithm. float64: Goldberg's quotient.
    """
    y = tl.where(x > 0, -x, x)
    if x.dtype == tl.float64:
        w = tl.exp(y)
        v = 1 + w
        # v - 1 is what of w survived the addition: the quotient makes up for the rest.
        log1p = tl.where(v == 1, w, tl.log(v) * (w / tl.where(v == 1, 1.0, v - 1)))
    else:
        y = tl.where(y < -100, -100.0, y)  # keeps -inf finite; e^-100 is 0 in float32 (a NaN stays one)
        scaled = y * LOG2E_HI
        error = tl.fma(y, tl.full(y.shape, LOG2E_HI, tl.float32), -scaled) + y * LOG2E_LO
        w = tl.exp2(scaled)
        w = w + w * (error * LN2)
        s = w / (2 + w)
        q = s * s
        p = q * (1.0 / 13) + 1.0 / 11
        p = p * q + 1.0 / 9
        p = p * q + 1.0 / 7
        p = p * q + 1.0 / 5
        p = p * q + 1.0 / 3
        log1p = 2 * (s + s * q * p)
    return tl.where(x > 0, x, 0) + log1p


@triton.jit
def pick(tile, i, rows):
    """Row i of a tile [T, X] as [X]. `rows` is arange(T); i is known at compile time.

    Where a thread holds a whole column of the tile this costs nothing: added to zeros as integers, the row's bits
    come out by constant folding. (A float sum would not fold, and would let a NaN of another row in.)
    """
    if tile.dtype == tl.float64:
        bits = tl.sum(tl.where(rows[:, None] == i, tile.to(tl.int64, bitcast=True), 0), axis=0)
    else:
        bits = tl.sum(tl.where(rows[:, None] == i, tile.to(tl.int32, bitcast=True), 0), axis=0)
    return bits.to(tile.dtype, bitcast=True)


@triton.jit
def put(tile, i, rows, row):
    """The tile [T, X] with row i replaced."""
    return tl.where(rows[:, None] == i, row[None, :], tile)


@triton.jit
def index(x, INT64: tl.constexpr):
    """x as the type in which offsets are computed."""
    if INT64:
        return x.to(tl.int64)
    else:
        return x


# --- host side ------------------------------------------------------------------------------------------------------


def wide(*tensors: torch.Tensor | None) -> bool:
    """True when an offset inside one batch row may not fit in 32 bits. Batch offsets are always 64-bit."""
    return _env.force_int64() or any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape[1:], t.stride()[1:])) >= 2**31 - 2**16
        for t in tensors
        if t is not None and t.numel()
    )


def strides(name: str, tensor: torch.Tensor | None, axes: str) -> dict[str, int]:
    """{"stride_<name>_<axis>": ...}; zeros for an absent tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
