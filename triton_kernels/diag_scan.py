"""The diagonal recurrence h_t = a_t h_{t-1} + b_t and its gradient: one kernel for both, and their launchers.

Shape letters: L length, D lanes, R rows (of two axes), S packed sequences, T tokens a tile.

Backward, with g = dL/dh: g_t = dh_t + conj(a_{t+1}) g_{t+1}, the same recurrence from the other end over a one token
further on; da_t = g_t conj(h_{t-1}), db_t = g_t.

Never measured. What should bound it on an H100/H200: memory, 3 numbers an element forward and 5 backward, at 3.35 TB/s
in bf16 5e11 elements a second forward; a token costs some 6 instructions an element.

How the work is split: a program owns BLOCK_D lanes of one row (or packed sequence) and walks through time in tiles
[T, BLOCK_D], each an associative scan whose products then take the state that came in. Lanes are what stands beside
each other in memory; where that is time, a tile is long and narrow. Complex numbers are two reals.

Where rows and lanes are too few to fill the GPU, time is split too, as in selective_scan: a first launch leaves each
part's product and its end from a zero state; in the second a part finds its state from those before it. A product that
overflows is not what the recurrence computes (where all |a| <= 1 none does). Sums have a fixed order.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, compile_spec, index, meta, pick, wide
from .scan_device import bounds
from .tuning import config

__all__ = ["diag_scan_bwd", "diag_scan_fwd"]


@triton.jit
def _combine(a0, b0, a1, b1):
    return a1 * a0, a1 * b0 + b1


@triton.jit
def _combine_complex(ar0, ai0, br0, bi0, ar1, ai1, br1, bi1):
    return (
        ar1 * ar0 - ai1 * ai0, ar1 * ai0 + ai1 * ar0, ar1 * br0 - ai1 * bi0 + br1, ar1 * bi0 + ai1 * br0 + bi1,
    )  # fmt: skip


@triton.jit
def _apply(ar, ai, br, bi, sr, si, COMPLEX: tl.constexpr):
    """a s + b"""
    if COMPLEX:
        return ar * sr - ai * si + br, ar * si + ai * sr + bi
    else:
        return ar * sr + br, bi


@triton.jit
def _load(ptr, at, mask, other: tl.constexpr, dtype: tl.constexpr, COMPLEX: tl.constexpr):
    """(real, imaginary part); `other` is real. Of real numbers the second is the first."""
    re = tl.load(ptr + at, mask=mask, other=other).to(dtype)
    if COMPLEX:
        return re, tl.load(ptr + at + 1, mask=mask, other=0.0).to(dtype)
    else:
        return re, re


@triton.jit
def _store(ptr, at, re, im, mask, COMPLEX: tl.constexpr):
    tl.store(ptr + at, re.to(ptr.dtype.element_ty), mask=mask)
    if COMPLEX:
        tl.store(ptr + at + 1, im.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _diag_scan_kernel(
    y_ptr, after_ptr, a_ptr, x_ptr, before_ptr, h_ptr, da_ptr, initial_ptr, cu_ptr, products_ptr, ends_ptr,
    L, D, R, R1, part_tokens,
    stride_y_r0, stride_y_r1, stride_y_d, stride_y_t, stride_a_r0, stride_a_r1, stride_a_d, stride_a_t,
    stride_x_r0, stride_x_r1, stride_x_d, stride_x_t, stride_h_r0, stride_h_r1, stride_h_d, stride_h_t,
    stride_da_r0, stride_da_r1, stride_da_d, stride_da_t, stride_after_r0, stride_after_r1, stride_after_d,
    stride_after_s, stride_before_r0, stride_before_r1, stride_before_d, stride_before_s,
    stride_initial_r0, stride_initial_r1, stride_initial_d, stride_initial_s,
    BACKWARD: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, INT64: tl.constexpr, PASS: tl.constexpr,
    BLOCK_D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x, y: b and h, or dh and db. PASS 0: whole sequences. 1: each part's product and end. 2: the parts, joined."""
    acc: tl.constexpr = after_ptr.dtype.element_ty
    DOWN: tl.constexpr = REVERSE != BACKWARD  # through time
    LAST: tl.constexpr = 0 if DOWN else T - 1  # of a tile
    AHEAD: tl.constexpr = -1 if REVERSE else 1
    sequence, row = tl.program_id(0) // R, tl.cast(tl.program_id(0) % R, tl.int64)
    begin, end, _ = bounds(cu_ptr, sequence, L)
    first, stop = begin, end
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d, r0, r1, s64 = d < D, row // R1, row % R1, tl.cast(sequence, tl.int64)
    kept = (tl.cast(tl.program_id(0), tl.int64) * D + d) * (2 if COMPLEX else 1)  # [BLOCK_D]
    d, rows = index(d, INT64), tl.arange(0, T)
    y_ptr += r0 * stride_y_r0 + r1 * stride_y_r1
    a_ptr += r0 * stride_a_r0 + r1 * stride_a_r1
    x_ptr += r0 * stride_x_r0 + r1 * stride_x_r1
    zero = tl.zeros([BLOCK_D], acc)
    sr, si, pr, pi = zero, zero, zero + 1, zero  # the state, the product
    if before_ptr is not None and PASS != 1:
        before_ptr += r0 * stride_before_r0 + r1 * stride_before_r1 + s64 * stride_before_s
        sr, si = _load(before_ptr, d * stride_before_d, in_d, 0.0, acc, COMPLEX)  # [BLOCK_D]
    if PASS > 0:
        part, parts = tl.program_id(2), tl.num_programs(2)
        begin = part * part_tokens
        end = tl.minimum(begin + part_tokens, L)
        size = tl.num_programs(0) * tl.cast(D, tl.int64) * (2 if COMPLEX else 1)
        if PASS == 2:
            for k in range(parts - 1 - part if DOWN else part):
                at = (parts - 1 - k if DOWN else k) * size + kept
                ar, ai = _load(products_ptr, at, in_d, 0.0, acc, COMPLEX)  # [BLOCK_D]
                br, bi = _load(ends_ptr, at, in_d, 0.0, acc, COMPLEX)
                sr, si = _apply(ar, ai, br, bi, sr, si, COMPLEX)
    if BACKWARD and PASS != 1:
        h_ptr += r0 * stride_h_r0 + r1 * stride_h_r1
        da_ptr += r0 * stride_da_r0 + r1 * stride_da_r1
        hr0, hi0 = zero, zero
        if initial_ptr is not None:
            initial_ptr += r0 * stride_initial_r0 + r1 * stride_initial_r1 + s64 * stride_initial_s
            hr0, hi0 = _load(initial_ptr, d * stride_initial_d, in_d, 0.0, acc, COMPLEX)  # [BLOCK_D]

    first_tile = begin // T
    tiles = tl.where(end > begin, tl.cdiv(end, T) - first_tile, 0)
    for k in range(tiles):
        t = (first_tile + (tiles - 1 - k if DOWN else k)) * T + rows
        valid = (t >= begin) & (t < end)
        inside = valid[:, None] & in_d[None, :]
        # A token outside leaves the state as it is; backward the first decays what comes in by nothing.
        source = t + AHEAD if BACKWARD else t
        decays = valid & (source >= first) & (source < stop)
        at = index(source, INT64)[:, None] * stride_a_t + d[None, :] * stride_a_d
        ar, ai = _load(a_ptr, at, decays[:, None] & in_d[None, :], 1.0, acc, COMPLEX)  # [T, BLOCK_D]
        t = index(t, INT64)
        xr, xi = _load(x_ptr, t[:, None] * stride_x_t + d[None, :] * stride_x_d, inside, 0.0, acc, COMPLEX)
        if COMPLEX:
            ai = -ai if BACKWARD else ai
            ar, ai, xr, xi = tl.associative_scan((ar, ai, xr, xi), 0, _combine_complex, reverse=DOWN)
        else:
            ar, xr = tl.associative_scan((ar, xr), 0, _combine, reverse=DOWN)
        if PASS == 1:
            ar, ai, xr, xi = pick(ar, LAST, rows), pick(ai, LAST, rows), pick(xr, LAST, rows), pick(xi, LAST, rows)
            sr, si = _apply(ar, ai, xr, xi, sr, si, COMPLEX)
            pr, pi = _apply(ar, ai, zero, zero, pr, pi, COMPLEX)
        else:
            xr, xi = _apply(ar, ai, xr, xi, sr[None, :], si[None, :], COMPLEX)
            sr, si = pick(xr, LAST, rows), pick(xi, LAST, rows)
            _store(y_ptr, t[:, None] * stride_y_t + d[None, :] * stride_y_d, xr, xi, inside, COMPLEX)
            if BACKWARD:
                earlier = t - AHEAD
                there = (valid & (earlier >= first) & (earlier < stop))[:, None]
                at = earlier[:, None] * stride_h_t + d[None, :] * stride_h_d
                hr, hi = _load(h_ptr, at, there & in_d[None, :], 0.0, acc, COMPLEX)  # [T, BLOCK_D]
                hr, hi = tl.where(there, hr, hr0[None, :]), tl.where(there, hi, hi0[None, :])
                gr, gi = _apply(hr, -hi, tl.zeros_like(hr), tl.zeros_like(hi), xr, xi, COMPLEX)
                _store(da_ptr, t[:, None] * stride_da_t + d[None, :] * stride_da_d, gr, gi, inside, COMPLEX)
    if PASS == 1:
        _store(products_ptr, part * size + kept, pr, pi, in_d, COMPLEX)
        _store(ends_ptr, part * size + kept, sr, si, in_d, COMPLEX)
    else:
        # Of the parts of a split row, the one that comes last has the last state.
        is_last = True if PASS == 0 else part == (0 if DOWN else parts - 1)
        if BACKWARD:
            at = tl.cast(stop - 1 if REVERSE else first, tl.int64) * stride_a_t + d * stride_a_d
            ar, ai = _load(a_ptr, at, in_d & (stop > first), 1.0, acc, COMPLEX)  # [BLOCK_D]
            sr, si = _apply(ar, -ai, zero, zero, sr, si, COMPLEX)
        after_ptr += r0 * stride_after_r0 + r1 * stride_after_r1 + s64 * stride_after_s
        _store(after_ptr, d * stride_after_d, sr, si, in_d & is_last, COMPLEX)


# --- launchers ------------------------------------------------------------------------------------------------------

WANTED = 4 * 132  # programs, four a multiprocessor of an H100/H200
STREAMS, STATES = ("y", "a", "x", "h", "da"), ("after", "before", "initial")


def _merged(tensors: dict) -> list[tuple[int, int]]:
    """(axis, size) of the fewest axes beside time that say where the elements of all tensors are, outermost first."""
    like = tensors["y"]
    axes = sorted((i for i in range(like.dim() - 1) if like.shape[i] != 1), key=lambda i: -like.stride(i))
    found = []
    for k in reversed(range(len(axes))):
        i = axes[k]
        inner = axes[k + 1] if found else None
        if found and all(t.stride(i) == t.stride(inner) * like.shape[inner] for t in tensors.values()):
            found[0] = (found[0][0], found[0][1] * like.shape[i])
        else:
            found.insert(0, (i, like.shape[i]))
    return found


def _plan(tensors: dict, cu_seqlens, *, backward: bool, reverse: bool) -> list[Launch]:
    """The launches, two when time is split, from shapes, strides and dtypes alone. `tensors`: those that are there."""
    y, length = tensors["y"], tensors["y"].shape[-1]
    axes = _merged(tensors)
    if len(axes) > 3:  # a launch for each slice of what is outermost
        i = axes[0][0]
        slices = [t.unbind(i) if t.shape[i] > 1 else None for t in tensors.values()]
        pick_ = lambda j: dict(zip(tensors, (s[j] for s in slices)))  # noqa: E731
        found = [_plan(pick_(j), cu_seqlens, backward=backward, reverse=reverse) for j in range(y.shape[i])]
        return [launch for launches in found for launch in launches]
    axes = [(None, 1)] * (3 - len(axes)) + axes
    (_, R0), (_, R1), (_, lanes) = axes
    COMPLEX = y.is_complex()
    strides, views = {}, {}
    for name in (*STREAMS, *STATES):
        t = tensors.get(name)
        views[f"{name}_ptr"] = t if t is None or not COMPLEX else torch.view_as_real(t)
        step = lambda i: 0 if t is None or i is None else t.stride(i) * (2 if COMPLEX else 1)  # noqa: B023, E731
        packed = 0 if cu_seqlens is not None else None
        strides |= {f"stride_{name}_{k}": step(i) for k, (i, _) in zip(("r0", "r1", "d"), axes)}
        strides |= {f"stride_{name}_t": step(-1)} if name in STREAMS else {f"stride_{name}_s": step(packed)}
    rows = y.stride(-1) == 1 and length > 1
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    default = {"BLOCK_D": 8 if rows else 64, "T": 128 if rows else 16, "num_warps": 2}
    key = f"{str(y.dtype)[6:]}-{'rows' if rows else 'lanes'}"
    blocks = config(f"diag_scan_{'bwd' if backward else 'fwd'}", key, y.device, default)
    warps = blocks.pop("num_warps")
    blocks["BLOCK_D"] = min(blocks["BLOCK_D"], triton.next_power_of_2(max(lanes, 1)))
    grid = (R0 * R1 * sequences, triton.cdiv(lanes, blocks["BLOCK_D"]))
    parts = 1 if cu_seqlens is not None else min(length // (4 * blocks["T"]), WANTED // max(grid[0] * grid[1], 1))
    part_tokens = triton.cdiv(triton.cdiv(length, max(parts, 1)), blocks["T"]) * blocks["T"]
    args = dict(
        **views, cu_ptr=cu_seqlens, products_ptr=None, ends_ptr=None, L=length, D=lanes, R=R0 * R1, R1=R1,
        part_tokens=part_tokens, **strides, BACKWARD=backward, REVERSE=bool(reverse), COMPLEX=COMPLEX,
        INT64=wide(*(t[None] for t in views.values() if t is not None)), PASS=0, **blocks,
    )  # fmt: skip
    if parts < 3:  # from 3 parts up they outweigh the second reading
        return [Launch(_diag_scan_kernel, grid, args, warps)]
    parts = triton.cdiv(length, part_tokens)
    scratch = lambda: views["after_ptr"].new_empty(parts, grid[0], lanes, 2 if COMPLEX else 1)  # noqa: E731
    args |= {"products_ptr": scratch(), "ends_ptr": scratch()}
    return [Launch(_diag_scan_kernel, (*grid, parts), {**args, "PASS": number}, warps) for number in (1, 2)]


def plan_diag_scan_fwd(out, last_state, a, b, initial_state, cu_seqlens, reverse) -> list[Launch]:
    tensors = dict(y=out, after=last_state, a=a, x=b, before=initial_state)
    there = {name: t for name, t in tensors.items() if t is not None}
    return _plan(there, cu_seqlens, backward=False, reverse=reverse)


def plan_diag_scan_bwd(
    da, db, dinitial, dout, dlast_state, a, out, initial_state, cu_seqlens, reverse
) -> list[Launch]:  # fmt: skip
    if initial_state is None:  # computed, and of no use
        states = db.shape[:-1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1, *db.shape[1:-1])
        dinitial = dinitial.new_empty(states)
    tensors = dict(y=db, da=da, after=dinitial, a=a, x=dout, h=out, before=dlast_state, initial=initial_state)
    there = {name: t for name, t in tensors.items() if t is not None}
    return _plan(there, cu_seqlens, backward=True, reverse=reverse)


def diag_scan_fwd(*args):
    """fill(out, last_state, *op arguments)"""
    for launch in plan_diag_scan_fwd(*args):
        launch.run()


def diag_scan_bwd(*args):
    """fill(da, db, dinitial_state, *op arguments)"""
    for launch in plan_diag_scan_bwd(*args):
        launch.run()


def _spec(dtype: torch.dtype, backward: bool, options: str, number: int) -> Launch:
    B, L, D = (1, 65536, 64) if options == "long" else (8, 4096, 4096)
    if options == "complex":
        dtype = torch.complex64
    x = meta(B, D, L, dtype=dtype) if options == "rows" else meta(B, L, D, dtype=dtype).mT
    cu = meta(9, dtype=torch.int32) if options == "packed" else None
    x = x[:1] if options == "packed" else x
    state = meta(*((8, D) if options == "packed" else x.shape[:2]), dtype=torch.promote_types(dtype, torch.float32))
    if backward:
        return plan_diag_scan_bwd(x, x, state, x, state, x, x, state, cu, options == "packed")[number]
    return plan_diag_scan_fwd(x, state, x, x, state, cu, options == "packed")[number]


for _name, _options, _number in (
    ("", "", 0), ("_rows", "rows", 0), ("_packed", "packed", 0), ("_complex", "complex", 0), ("_pass1", "long", 0),
    ("_pass2", "long", 1),
):  # fmt: skip
    for _kind in ("fwd", "bwd"):
        if _kind == "bwd" or _options in ("", "rows"):  # the rest of the forward is in the backward
            compile_spec(f"diag_scan_{_kind}{_name}")(
                lambda dtype, b=_kind == "bwd", o=_options, n=_number: _spec(dtype, b, o, n)
            )
