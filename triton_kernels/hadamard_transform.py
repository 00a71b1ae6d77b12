"""The Hadamard transform of rows as products with Hadamard matrices on tl.dot, and its quantization to integers.

Shape letters: n points of a row, m order of the matrix beside Sylvester's, m 2^k >= n points of the transform, P x B a
tile, A parts of a row, R rows of a tile.

    H = H_m (x) H_2^k. With j = p B + b the transform is two products whose matrices are signs:

    few points (m = 1, k <= 9)      y_a = x_a H_B        [R, B] @ [B, B], a < A <= 4, then butterflies of the y_a
    more                            Y = (H_m (x) H_A) X H_B        [P, P] @ ([P, B] @ [B, B]), P = A times m's next 2^i

A sign is the parity of b & b', so no table is read for Sylvester's matrices; H_m comes as bytes, padded by zeros.

Never measured. What should bound it on an H100/H200: HBM bytes, 4 a point in half precision and 8 in float32. The
products are 2 (P + B) flops a point, at most 512 of the about 600 that bfloat16's rate allows meanwhile; float32
doubles them at half that rate, against twice the bytes.

How the work is split: a program owns whole rows and walks over tiles, so that its matrices are made once. A row never
shares a product's sum with another one: what is not finite stays in its own row. Beyond 2^14 points (or what P = 128
takes; less where points are wider) it is two launches, of runs of 2^13 and across them, with float32 between.

Exactness: signs are exact in every type. Half precision x meets H_B as it is; what comes out is float32, and goes into
the second product rounded once more for bfloat16 (one of two roundings of the same size), else in two bfloat16 parts,
which keep 16 bits and float32's range. float32 is split in two tf32 parts, 21 bits. An infinity that is split makes
NaN, in its own row. float64 is not split.
Strides: any; points that lie next to each other are read in whole sectors. Determinism: no sum depends on the grid.
"""

import functools

import torch
import triton
import triton.language as tl

from .. import _env, _kept
from ..ops._hadamard import tile
from ..reference.hadamard_transform import base_matrix, factor
from .common import Launch, compile_spec, index, meta
from .host_math import cdiv, next_power_of_2
from .toeplitz_conv import _operand
from .tuning import config

__all__ = ["fused_hadamard_quantize", "hadamard_transform_fwd"]

TOKEN: tl.constexpr = tl.constexpr(-1)  # of GROUP: one scale for all n points

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _signs(i, j):
    """1 or -1 by the parity of i & j."""
    bits = i & j
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1 - 2 * (bits & 1)


@triton.jit
def _high(x):
    """A float32's leading 11 bits, a tf32."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _times(x, h, acc: tl.constexpr):
    """x @ h of signs h. x float32: in two tf32 parts; half precision and float64 as they are."""
    if x.dtype == tl.float32:
        y = tl.dot(_high(x), h, input_precision="tf32", out_dtype=acc)
        y = tl.dot(x - _high(x), h, y, input_precision="tf32", out_dtype=acc)
    else:
        y = tl.dot(_operand(x, x.dtype), h, input_precision="ieee", out_dtype=acc)
    return y


@triton.jit
def _of_signs(h, x, PARTS: tl.constexpr, acc: tl.constexpr):
    """h @ x of signs h and a float32 or float64 x; PARTS bfloat16 parts of x, 0: none of bfloat16."""
    if acc == tl.float64:
        y = tl.dot(h, x, input_precision="ieee", out_dtype=acc)
    elif PARTS == 0:
        y = tl.dot(h, _high(x), input_precision="tf32", out_dtype=acc)
        y = tl.dot(h, x - _high(x), y, input_precision="tf32", out_dtype=acc)
    else:
        high = _operand(x, tl.bfloat16)
        y = tl.dot(h, high, out_dtype=acc)
        if PARTS == 2:
            y = tl.dot(h, _operand(x - high.to(tl.float32), tl.bfloat16), y, out_dtype=acc)
    return y


@triton.jit
def _row(row, size_1, size_2, stride_0, stride_1, stride_2):
    """The offset of a row of x, whose leading axes are three. Rows are divided as they come: in 64 bits by a call."""
    outer = row // size_2
    at = tl.cast(outer // size_1, tl.int64) * stride_0 + tl.cast(outer % size_1, tl.int64) * stride_1
    return at + tl.cast(row % size_2, tl.int64) * stride_2


@triton.jit
def _integers(y, scale, MOST: tl.constexpr):
    """y / scale rounded half to even, at most MOST; 0 where that is not a number."""
    v = tl.div_rn(y, scale) if y.dtype == tl.float32 else y / scale
    v = tl.where(v == v, tl.minimum(tl.maximum(v, -MOST), MOST), 0.0)
    magic: tl.constexpr = 12582912.0 if y.dtype == tl.float32 else 6755399441055744.0  # 1.5 2^23, 1.5 2^52
    return ((v + magic) - magic).to(tl.int8)


@triton.jit
def _scale(most, MOST: tl.constexpr):
    """The scale of a group whose largest magnitude is `most`, as it is stored."""
    return (tl.div_rn(most, tl.full(most.shape, MOST, tl.float32)) if most.dtype == tl.float32 else most / MOST).to(
        tl.float32
    )


@triton.jit
def _larger(a, b):
    """max for tl.reduce that a NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# --- few points -----------------------------------------------------------------------------------------------------


@triton.jit
def _hadamard_rows_kernel(
    out_ptr, scales_ptr, x_ptr, rows, tiles, n, scale, size_1, size_2, stride_x_0, stride_x_1, stride_x_2, stride_x_n,
    GROUP: tl.constexpr, MOST: tl.constexpr, INT64: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out (rows, n). GROUP not 0: out is q, scales (rows, n / GROUP), GROUP TOKEN for n or a divisor of B.
    Grid (programs,)."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    b = tl.arange(0, B)
    h = _operand(_signs(b[:, None], b[None, :]).to(tl.float32), kind)  # [B, B]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        in_rows = (row < rows)[:, None]
        at = _row(row, size_1, size_2, stride_x_0, stride_x_1, stride_x_2)[:, None]
        y = ()
        for a in tl.static_range(A):
            j = a * B + b[None, :]
            x = tl.load(x_ptr + at + index(j, INT64) * stride_x_n, mask=in_rows & (j < n), other=0.0)  # [R, B]
            y = y + (_times(x, h, acc),)
        for bit in tl.static_range(2):
            if (1 << bit) < A:
                z = ()
                for a in tl.static_range(A):
                    if (a & (1 << bit)) == 0:
                        z = z + (y[a] + y[a + (1 << bit)],)
                    else:
                        z = z + (y[a - (1 << bit)] - y[a],)
                y = z
        to = row.to(tl.int64)[:, None] * n + b[None, :]
        most = tl.zeros([R], acc)
        if GROUP == TOKEN:
            for a in tl.static_range(A):
                kept = tl.where(a * B + b[None, :] < n, tl.abs(y[a] * scale), 0.0)
                most = _larger(most, tl.reduce(kept, 1, _larger))
            tl.store(scales_ptr + row, _scale(most, MOST), mask=row < rows)
        for a in tl.static_range(A):
            v = y[a] * scale
            inside = in_rows & (a * B + b[None, :] < n)
            if GROUP == 0:
                tl.store(out_ptr + to + a * B, v.to(kind), mask=inside)
            elif GROUP == TOKEN:
                tl.store(out_ptr + to + a * B, _integers(v, _scale(most, MOST).to(acc)[:, None], MOST), mask=inside)
            else:
                grouped = tl.reshape(v, [R, B // GROUP, GROUP])
                s = _scale(tl.reduce(tl.abs(grouped), 2, _larger), MOST)  # [R, B / GROUP]
                q = tl.reshape(_integers(grouped, s.to(acc)[:, :, None], MOST), [R, B])
                tl.store(out_ptr + to + a * B, q, mask=inside)
                g = a * (B // GROUP) + tl.arange(0, B // GROUP)[None, :]
                places = row.to(tl.int64)[:, None] * (n // GROUP) + g
                tl.store(scales_ptr + places, s, mask=in_rows & (g * GROUP < n))


# --- more -----------------------------------------------------------------------------------------------------------


@triton.jit
def _hadamard_tile_kernel(
    out_ptr, scales_ptr, x_ptr, table_ptr, rows, n, scale, run, size_1, size_2,
    stride_x_0, stride_x_1, stride_x_2, stride_x_n,
    M: tl.constexpr, GROUP: tl.constexpr, MOST: tl.constexpr, PARTS: tl.constexpr, INT64: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A row a tile: points (i, a, b) of m runs of `run` <= A B points. table (P / A, P / A) int8 is H_m with zeros.

    out, scales as above, GROUP TOKEN or a power of two that divides run. Grid (programs,)."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    b, p = tl.arange(0, B), tl.arange(0, P)
    right = _operand(_signs(b[:, None], b[None, :]).to(tl.float32), kind)  # [B, B]
    left = _signs(p[:, None] % A, p[None, :] % A).to(tl.float32)  # [P, P]
    if M > 1:
        left *= tl.load(table_ptr + p[:, None] // A * (P // A) + p[None, :] // A).to(tl.float32)
        if acc == tl.float64:  # DMMA has no layout of bytes: a sum of one term ends the compiler's search for a load
            left = tl.sum(left[:, :, None], axis=2)
    left = _operand(left, acc if PARTS == 0 else tl.bfloat16)
    inner = (p % A * B)[:, None] + b[None, :]  # [P, B], place in a run
    j = (p // A * run)[:, None] + inner
    inside = (inner < run) & (j < n) & (p // A < M)[:, None]
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = _row(tl.cast(row, tl.int64), size_1, size_2, stride_x_0, stride_x_1, stride_x_2)  # of one
        x = tl.load(x_ptr + at + index(j, INT64) * stride_x_n, mask=inside, other=0.0)  # [P, B]
        y = _of_signs(left, _times(x, right, acc), PARTS, acc) * scale
        row = tl.cast(row, tl.int64)
        to = out_ptr + row * n + j
        if GROUP == 0:
            tl.store(to, y.to(out_ptr.dtype.element_ty), mask=inside)
        elif GROUP == TOKEN:
            kept = tl.where(inside, tl.abs(y), 0.0)
            s = _scale(tl.reduce(tl.reduce(kept, 1, _larger), 0, _larger) + tl.zeros([1], acc), MOST)  # [1]
            tl.store(scales_ptr + row + tl.arange(0, 1), s)
            tl.store(to, _integers(y, s.to(acc)[:, None], MOST), mask=inside)
        else:
            grouped = tl.reshape(y, [P * B // GROUP, GROUP])
            s = _scale(tl.reduce(tl.abs(grouped), 1, _larger), MOST)
            tl.store(to, tl.reshape(_integers(grouped, s.to(acc)[:, None], MOST), [P, B]), mask=inside)
            # The first point of every group: where it lies in the row, if it does.
            first = tl.min(tl.reshape(tl.where(inside, j, n), [P * B // GROUP, GROUP]), axis=1)
            tl.store(scales_ptr + row * (n // GROUP) + first // GROUP, s, mask=first < n)


# --- launchers ------------------------------------------------------------------------------------------------------

PROGRAMS = 8 * 132  # that walk over the rows; eight a multiprocessor of an H100/H200, more of one warp
SMALL = {4: 8, 8: 6}  # k of the most points of the first kernel: float64's matrix of 128 is 128 of an A100's 163 KB
RUN_BITS = {4: 13, 8: 12}  # of what the first of two launches transforms, by the bytes of a point


@functools.cache
def _table(m: int, matrices: str, transposed: bool, device: torch.device) -> torch.Tensor | None:
    """H_m (M, M) int8 with zeros up to the next power of two; None for m = 1."""
    if m == 1:
        return None
    h, size = base_matrix(m, matrices), next_power_of_2(m)
    table = torch.nn.functional.pad(h.mT if transposed else h, (0, size - m, 0, size - m)).contiguous()
    return _kept.made(lambda: table.to(device), device)


def _folded(x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """x, and the sizes and strides of its leading axes joined to three; copied where they do not join to so few."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 3:
        return _folded(x.contiguous())
    axes = [(1, 0)] * (3 - len(axes)) + axes
    return x, [size for size, _ in axes], [stride for _, stride in axes]


def _is_small(x: torch.Tensor, m: int, k: int, group: int = 0) -> bool:
    """Whether the sums of all parts of 16 rows fit the registers of a program."""
    most = SMALL.get(x.dtype.itemsize, 9)
    return m == 1 and k <= most and (group in (0, x.shape[-1]) or group <= min(128, 1 << k))


def _common(x: torch.Tensor, n: int, scale: float, group: int, most: int) -> dict:
    x, sizes, steps = _folded(x)
    wide = (n - 1) * abs(x.stride(-1)) >= 2**31 - 2**16
    return dict(
        x_ptr=x, rows=sizes[0] * sizes[1] * sizes[2], n=n, scale=scale, size_1=sizes[1], size_2=sizes[2],
        stride_x_0=steps[0], stride_x_1=steps[1], stride_x_2=steps[2], stride_x_n=x.stride(-1),
        GROUP=-1 if group == n else group, MOST=most, INT64=wide or _env.force_int64(),
    )  # fmt: skip


def _key(x: torch.Tensor, n: int) -> str:
    return f"{str(x.dtype)[6:]}-n{next_power_of_2(n)}"


def plan_hadamard_rows(out, scales, x, k, scale, group=0, most=0) -> Launch:
    """The launch of few points, from shapes, strides and dtypes alone."""
    n = x.shape[-1]
    B = max(16, min(128, 1 << k))
    A = max(1, (1 << k) // B)
    rows = max(16, 128 // A // x.dtype.itemsize)
    blocks = config("hadamard_rows", _key(x, n), x.device, {"R": rows, "num_warps": 8 if x.dtype.itemsize == 4 else 4})
    args = _common(x, n, scale, group, most)
    tiles = cdiv(args["rows"], blocks["R"])
    args |= dict(out_ptr=out, scales_ptr=scales, tiles=tiles, A=A, B=B, R=blocks["R"])
    return Launch(_hadamard_rows_kernel, (min(tiles, PROGRAMS),), args, blocks["num_warps"])


def plan_hadamard_tile(out, scales, x, m, k, scale, matrices, transposed, group=0, most=0) -> Launch:
    """The launch of a row a tile."""
    n = x.shape[-1]
    A, B, P = tile(m, k, x.dtype.itemsize)
    # Loads ahead only where they leave the registers, and an A100's shared memory, to the products.
    stages = 1 if x.dtype.itemsize > 2 or group else 2 if P * B > 8192 else 3
    warps = max(1, P * B // (512 if x.dtype.itemsize > 4 else 2048))
    blocks = config("hadamard_tile", _key(x, n), x.device, {"num_warps": warps})
    half = x.dtype in (torch.float16, torch.bfloat16)
    parts = 0 if not half else 1 if x.dtype == torch.bfloat16 and not group else 2
    args = _common(x, n, scale, group, most)
    args |= dict(
        out_ptr=out, scales_ptr=scales, table_ptr=_table(m, matrices, transposed, x.device), run=1 << k,
        M=m, PARTS=parts, A=A, B=B, P=P,
    )  # fmt: skip
    programs = min(args["rows"], PROGRAMS * (4 if warps == 1 else 1))
    return Launch(_hadamard_tile_kernel, (programs,), args, blocks["num_warps"], stages)


def _transform(out, x, m, k, scale, matrices, transposed) -> None:
    if _is_small(x, m, k):
        plan_hadamard_rows(out, None, x, k, scale).run()
    elif tile(m, k, x.dtype.itemsize):
        plan_hadamard_tile(out, None, x, m, k, scale, matrices, transposed).run()
    else:
        _in_two(out, x, m, k, scale, matrices, transposed)


def _in_two(out, x, m, k, scale, matrices, transposed) -> None:
    """Runs of 2^RUN_BITS points, or of all 2^k, then across them, in float32 (float64) between the two."""
    n, real = x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    bits = min(RUN_BITS[real.itemsize], k)
    padded = torch.nn.functional.pad(x.to(real), (0, (m << k) - n)).unflatten(-1, (-1, 1 << bits))
    between = torch.empty_like(padded, memory_format=torch.contiguous_format)
    _transform(between, padded, 1, bits, 1.0, matrices, False)
    across = between.mT.new_empty(between.mT.shape)
    _transform(across, between.mT, m, k - bits, scale, matrices, transposed)
    out.copy_(across.mT.flatten(-2)[..., :n])


def hadamard_transform_fwd(out, x, scale, order, matrices, transposed) -> None:
    """fill(out, *op arguments)"""
    m, k = factor(x.shape[-1], order)
    _transform(out, x, m, k, scale, matrices, transposed)


def fused_hadamard_quantize(q, scales, x, scale, bits, group_size, order, matrices) -> None:
    """fill(q, scales, *op arguments)"""
    n = x.shape[-1]
    m, k = factor(n, order)
    group, most = group_size or n, 2 ** (bits - 1) - 1
    if _is_small(x, m, k, group):
        plan_hadamard_rows(q, scales, x, k, scale, group, most).run()
    else:
        plan_hadamard_tile(q, scales, x, m, k, scale, matrices, False, group, most).run()


def _spec(dtype: torch.dtype, m: int, k: int, bits: int = 0, group: int = 0) -> Launch:
    x = meta(4096, m << k, dtype=dtype)
    out = meta(4096, m << k, dtype=torch.int8 if bits else dtype)
    scales = meta(4096, max(1, (m << k) // group if group else 1)) if bits else None
    group, most = (group or m << k, 2 ** (bits - 1) - 1) if bits else (0, 0)
    if _is_small(x, m, k, group):
        return plan_hadamard_rows(out, scales, x, k, 1.0, group, most)
    return plan_hadamard_tile(out, scales, x, m, k, 1.0, "fast_hadamard_transform", False, group, most)


compile_spec("hadamard_rows")(lambda dtype: _spec(dtype, 1, SMALL.get(dtype.itemsize, 9)))
compile_spec("hadamard_tile")(lambda dtype: _spec(dtype, 1, 12 if dtype.itemsize == 8 else 13))
compile_spec("hadamard_rows_128")(lambda dtype: _spec(dtype, 1, 7))
compile_spec("hadamard_tile_16384")(lambda dtype: _spec(dtype, 1, 14))
compile_spec("hadamard_tile_14336")(lambda dtype: _spec(dtype, 28, 9))
compile_spec("hadamard_tile_float64")(lambda dtype: _spec(torch.float64, 12, 4))
compile_spec("hadamard_rows_quantize")(lambda dtype: _spec(dtype, 1, 9, 8))
compile_spec("hadamard_tile_quantize")(lambda dtype: _spec(dtype, 1, 12, 8))
compile_spec("hadamard_tile_quantize_groups")(lambda dtype: _spec(dtype, 28, 9, 4, 128))
