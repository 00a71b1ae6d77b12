"""Mamba-2's scan backwards: the kernel that has all of a chunk, and the launcher of the walks before it.

Shape letters: B batch, L length, H heads, P head dim, G groups, N states, S packed sequences, Q tokens of a chunk.

With S the state before a chunk, G the gradient of that after it, M, s and d as in ssd_scan.py, e = 2^(s_Q - s) d:

    dX' = (M o C B^T)^T dY + 2^(s_Q - s) B G         dx = d dX' + D dY
    dB  = R^T C + sum over heads of e x G^T           R = sum over heads of M o d o dY x^T   (ssd_scan_matrices.py)
    dC  = R B   + sum over heads of 2^s dY S^T
    da_t = what passes token t: pairs i >= t > j of M o C B^T o d o dY x^T, outputs i >= t that read S, inputs j < t
           that G holds, and 2^(s_Q) S . G. No sum cancels another, however strong a decay lies between.

The account, a token and head, in half precision at P 64, N 128, Q 64, H 128, G 1:

    HBM   walks: x and dout once, half of both again for the totals, 384; S and G, 2 N P / Q = 256 each, written once
          and read twice, 1,536; x and dout for two kernels and dx, 5 x 2 P = 640; steps, six times 12, and the rest 10:
          2,642
    FLOP  walks 6 N P = 49,152; here 2 Q N for C B^T, 4 Q P for dY x^T and W^T dY (2 Q P more with z), 4 N P for B G and
          C S, 2 Q^2 for da: 73,728; for dB and dC 40,960: 163,840 in all
    dB and dC a head apart would be 8 N = 1,024 bytes written and read again: their kernel has all heads of a group in
          turn and sums in registers, as it does R, for 2 Q P again of FLOP but no byte.
    S recomputed here instead of read: a walk through all chunks before. No.

On an H200 (4.2 TB/s of HBM, 790 TFLOP/s reached): 16,384 tokens of 128 heads are 1.3 ms of HBM and 0.44 ms of products.
Never measured; 2.0 ms expected: 0.7 in the walks, 0.75 here, 0.55 for dB and dC.

How the work is split: a program has a chunk and a head. B and C come out of the L2 again for each (32 KiB beside 56 out
of HBM), and in return two programs a multiprocessor wait and multiply in turn, with nothing alive between heads. All
tiles are asked for at once, before the first product.
Tried in the compiler (sm_90, bfloat16, 4 warps, registers and bytes of stack): heads in turn, R summed here too and 8
warps 255 and 688; so with dB and dC 1,552; a program a head, 255 and 48; D's sum where x and dout arrive instead of
last, 231 and 0: now 233 and 0, 82 KB of shared memory. Eight heads in turn, the next one's tiles loading meanwhile:
344, and 16 with 8 warps and one program a multiprocessor. A third program, 168 registers: 200. S . G as the trace of a
product: 24 more. sm_80 has 520 bytes, sm_100 120, float16, whose products are tf32's, 488. In float32 ptxas gives up
(32 registers and 11 KiB of stack, right and slow): an operand of mma.sync is whole in registers, thrice for tf32x3.

Memory besides inputs and outputs: S and G, each N / Q times x (twice for N 128), in half precision for bfloat16, else
in float32, and one a packed sequence more; steps, 12 bytes a token and head; partial dB and dC where a group's heads
are in parts.
Determinism: nothing is atomic; the parts depend on the shapes alone.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, compile_spec, index, sigmoid, silu_slope, strides, wide
from .ssd_device import (
    WANTED,
    between,
    chosen,
    common_args,
    default_blocks,
    gated,
    limited,
    load_head,
    load_skip,
    load_tile,
    operand,
    precision_of,
    product,
    real_of,
    sample,
    states_of,
    sums,
    tuning_key,
    window_of,
    windows_of,
)  # fmt: skip
from .ssd_scan_matrices import plan_matrices
from .ssd_scan_states import plan_all, steps_of
from .ssd_scan_steps import plan_steps
from .tuning import config

__all__ = ["ssd_scan_bwd"]


@triton.jit
def dots(a, b, acc: tl.constexpr):
    """The sum of a b, [1]."""
    return tl.sum(tl.sum(a.to(acc) * b.to(acc), axis=0)[:, None], axis=0)


@triton.jit
def _ssd_scan_bwd_kernel(
    dx_ptr, ddt_ptr, dz_ptr, heads_ptr, dD_ptr, before_ptr, after_ptr, dout_ptr, steps_ptr, x_ptr, dt_ptr,
    A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, cu_ptr, size, L, H, heads, S, windows, slots,
    stride_dx_b, stride_dx_l, stride_dx_h, stride_dx_p, stride_ddt_b, stride_ddt_l, stride_ddt_h,
    stride_dz_b, stride_dz_l, stride_dz_h, stride_dz_p, stride_dout_b, stride_dout_l, stride_dout_h, stride_dout_p,
    stride_x_b, stride_x_l, stride_x_h, stride_x_p, stride_dt_b, stride_dt_l, stride_dt_h, stride_A_h,
    stride_B_b, stride_B_l, stride_B_g, stride_B_n, stride_C_b, stride_C_l, stride_C_g, stride_C_n,
    stride_D_h, stride_D_p, stride_z_b, stride_z_l, stride_z_h, stride_z_p, stride_bias_h,
    N: tl.constexpr, P: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """before, after (slots, H, N, P): S and G. heads (2, slots, H): sums of d da and ddt; dD (slots, H, P).

    Grid (slots H,). Matrices of pairs are [Q, Q] of (source j, reader i).
    """
    acc: tl.constexpr = steps_ptr.dtype.element_ty
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, sequence, window, begin, end, first, last = window_of(cu_ptr, slot, S, L, windows, Q)
    if end <= begin:
        return
    i, start = index(tl.arange(0, Q), INT64), window * Q
    h, g, n = index(head, INT64), index(head // heads, INT64), index(tl.arange(0, BLOCK_N), INT64)
    valid, in_n = (i >= begin - start) & (i < end - start), n < N
    steps = (steps_ptr + (tl.cast(row, tl.int64) * H + head) * L, tl.cast(size, tl.int64))
    x = (x_ptr + row * stride_x_b + h * stride_x_h, stride_x_l, stride_x_p)
    dout = (dout_ptr + row * stride_dout_b + h * stride_dout_h, stride_dout_l, stride_dout_p)
    B = (B_ptr + row * stride_B_b + g * stride_B_g, stride_B_l, stride_B_n)
    C = (C_ptr + row * stride_C_b + g * stride_C_g, stride_C_l, stride_C_n)
    z = (None, stride_z_l, stride_z_p)
    if z_ptr is not None:
        z = (z_ptr + row * stride_z_b + h * stride_z_h, stride_z_l, stride_z_p)
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P

    # All that is read is asked for at once, as far as P has one block: a wait for HBM instead of three.
    p = index(tl.arange(0, BLOCK_P), INT64)
    state, dstate = states_of(before_ptr, after_ptr, slot, head, H, n, p, N, P, OPERAND, PRECISION)
    kept = dots(state, dstate, acc)
    B_t = operand(load_tile(B, start, i, n, valid, in_n), OPERAND, PRECISION)  # [Q, BLOCK_N]
    C_t = operand(load_tile(C, start, i, n, valid, in_n), OPERAND, PRECISION)  # [Q, BLOCK_N]
    d = tl.load(steps[0] + start + i, mask=valid, other=0.0)
    coarse, fine, all_coarse, all_fine = sums(steps, start, i, begin, end, Q)
    xs, dys, pairs = (), (), tl.zeros([Q, Q], acc)
    for block in tl.static_range(blocks):
        p = block * BLOCK_P + index(tl.arange(0, BLOCK_P), INT64)
        xs = xs + (operand(load_tile(x, start, i, p, valid, p < P), OPERAND, PRECISION),)  # [Q, BLOCK_P]
        dys = dys + (gated(dout, z, start, i, p, valid, p < P, OPERAND, PRECISION, acc),)
        pairs = product(xs[block], tl.trans(dys[block]), pairs, PRECISION)
        if D_ptr is not None:
            ddD = tl.sum(dys[block].to(acc) * xs[block].to(acc), axis=0)
            tl.store(dD_ptr + (tl.cast(slot, tl.int64) * H + head) * P + p, ddD, mask=p < P)
    seen = i[:, None] <= i[None, :]
    w = product(B_t, tl.trans(C_t), tl.zeros([Q, Q], acc), PRECISION) * between(coarse, fine, seen, 1)
    carried, w = operand(pairs * w * d[:, None], OPERAND, PRECISION), operand(w, OPERAND, PRECISION)

    from_start, through = tl.exp2(coarse + fine), tl.exp2(all_coarse + all_fine)
    to_end = tl.exp2((all_coarse - coarse) + (all_fine - fine))
    reads, helds, dd = tl.zeros([Q], acc), tl.zeros([Q], acc), tl.zeros([Q], acc)
    for block in tl.static_range(blocks):
        p = block * BLOCK_P + index(tl.arange(0, BLOCK_P), INT64)
        in_p = p < P
        if block > 0:
            state, dstate = states_of(before_ptr, after_ptr, slot, head, H, n, p, N, P, OPERAND, PRECISION)
            kept += dots(state, dstate, acc)
        none = tl.zeros([Q, BLOCK_P], acc)
        read = product(C_t, state, none, PRECISION) * from_start[:, None]
        reads += tl.sum(dys[block].to(acc) * read, axis=1)
        skip = load_skip(D_ptr, stride_D_h, stride_D_p, h, p, in_p, acc)
        if z_ptr is not None:
            scaled = operand(xs[block].to(acc) * d[:, None], OPERAND, PRECISION)
            y = product(tl.trans(w), scaled, read, PRECISION) + skip[None, :] * xs[block].to(acc)
            z_t = load_tile(z, start, i, p, valid, in_p).to(acc)  # [Q, BLOCK_P]
            dz = load_tile(dout, start, i, p, valid, in_p).to(acc) * y * silu_slope(z_t, sigmoid(z_t))
            to = dz_ptr + row * stride_dz_b + h * stride_dz_h + tl.cast(start, tl.int64) * stride_dz_l
            to += i[:, None] * stride_dz_l + p[None, :] * stride_dz_p
            tl.store(to, dz.to(dz_ptr.dtype.element_ty), mask=valid[:, None] & in_p[None, :])
        held = product(B_t, dstate, none, PRECISION) * to_end[:, None]
        helds += tl.sum(xs[block].to(acc) * held, axis=1) * d
        dxd = product(w, dys[block], held, PRECISION)
        dd += tl.sum(dxd * xs[block].to(acc), axis=1)
        dx = dxd * d[:, None] + skip[None, :] * dys[block].to(acc)
        to = dx_ptr + row * stride_dx_b + h * stride_dx_h + tl.cast(start, tl.int64) * stride_dx_l
        to += i[:, None] * stride_dx_l + p[None, :] * stride_dx_p
        tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=valid[:, None] & in_p[None, :])
    # What passes token t: pairs from before t to t or later, what is read there, what is held of before, and S . G.
    earlier = operand(tl.where(i[:, None] > i[None, :], 1.0, 0.0).to(acc), OPERAND, PRECISION)
    passing = product(earlier, carried, tl.zeros([Q, Q], acc), PRECISION)  # [t, i]: the sources before t
    da = tl.sum(tl.where(seen, passing + reads[None, :], helds[None, :]), axis=1) + through * kept
    da = tl.where(valid, da, 0.0)
    A, bias = load_head(A_ptr, stride_A_h, h, acc), load_head(bias_ptr, stride_bias_h, h, acc)
    dt = dt_ptr + row * stride_dt_b + h * stride_dt_h + tl.cast(start, tl.int64) * stride_dt_l
    raw = tl.load(dt + i * stride_dt_l, mask=valid, other=0.0).to(acc) + bias
    free, _ = limited(raw, SOFTPLUS, LOW, HIGH)
    within = (free >= LOW) & (free <= HIGH)
    ddt = tl.where(within & valid, (da * A + dd) * (sigmoid(raw) if SOFTPLUS else 1.0), 0.0)
    to = ddt_ptr + row * stride_ddt_b + h * stride_ddt_h + tl.cast(start, tl.int64) * stride_ddt_l
    tl.store(to + i * stride_ddt_l, ddt.to(ddt_ptr.dtype.element_ty), mask=valid)
    to = heads_ptr + tl.cast(slot, tl.int64) * H + head
    tl.store(to, tl.sum((da * d)[:, None], axis=None))
    tl.store(to + tl.cast(slots, tl.int64) * H, tl.sum(ddt[:, None], axis=None))


def _parts(wanted: int, programs: int, heads: int) -> tuple[int, int]:
    """(parts of a group's heads, heads of a part), for so many programs, at least 8 heads each"""
    parts = max(1, min(wanted // programs, triton.cdiv(heads, 8)))
    each = triton.cdiv(heads, parts)
    return triton.cdiv(heads, each), each


def plan_ssd_scan_bwd(
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial, dout, dfinal, dvarlen, *args,
) -> tuple[list[Launch], dict]:  # fmt: skip
    """(the launches, in order, {gradient: partial sums}), from shapes, strides and dtypes alone."""
    x, B, C, D, z, initial, cu_seqlens = args[0], *args[3:7], args[8], args[10]
    (batch, length, heads, width), (groups, states), real = x.shape, B.shape[2:], real_of(x.dtype)
    key, device = tuning_key(x, states), x.device
    blocks = config("ssd_scan_states", key, device, {**default_blocks(x, states), "num_warps": 8})
    own = config("ssd_scan_bwd", key, device, default_blocks(x, states))
    walk, Q = {**blocks, "Q": own["Q"]}, own["Q"]
    matrices = config("ssd_scan_matrices", key, device, {**default_blocks(x, states), "num_warps": 8})
    windows = windows_of(x, cu_seqlens, Q)
    slots = windows["slots"]
    steps = plan_steps(args, Q)
    kind = torch.bfloat16 if precision_of(x)["OPERAND"] == tl.bfloat16 else real
    before, after = (x.new_empty(slots, heads, states, width, dtype=kind) for _ in range(2))
    initials = {} if initial is None else dict(dinitial=dinitial)
    walks = [
        *plan_all(before, args, walk, steps, initial=initial),
        *plan_all(after, args, walk, steps, dout=dout, dfinal=dfinal, dvarlen=dvarlen, **initials),
    ]
    partial = {"heads": x.new_zeros(2, slots, heads, dtype=real)}
    if D is not None:
        partial["dD"] = x.new_zeros(slots, heads, width, dtype=real)
    arguments = dict(
        common_args(*args), **windows, **steps_of(steps), dx_ptr=dx, ddt_ptr=ddt, dz_ptr=None if z is None else dz,
        heads_ptr=partial["heads"], dD_ptr=partial.get("dD"), before_ptr=before, after_ptr=after,
        dout_ptr=dout, **strides("dx", dx, "blhp"), **strides("ddt", ddt, "blh"),
        **strides("dz", None if z is None else dz, "blhp"), **strides("dout", dout, "blhp"),
        INT64=wide(x, args[1], B, C, z, dout, dx, ddt), Q=Q, BLOCK_P=own["BLOCK_P"],
    )  # fmt: skip
    kernel, grid = _ssd_scan_bwd_kernel, (slots * heads,)
    launch = Launch(kernel, grid, chosen(kernel, arguments), own["num_warps"], own.get("num_stages"))
    parts, part_heads = _parts(WANTED // 2, slots * groups, heads // groups)
    if parts > 1:
        partial |= {name: x.new_empty(parts, *B.shape, dtype=real) for name in ("dB", "dC")}
    sums_of = (partial[name] if parts > 1 else gradient[None] for name, gradient in (("dB", dB), ("dC", dC)))
    last = plan_matrices(arguments, *sums_of, slots, parts, part_heads, matrices)
    return [steps, *walks, launch, last], partial


def ssd_scan_bwd(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states, *args) -> None:
    """fill(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states, *op arguments)"""
    gradients = dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states
    launches, partial = plan_ssd_scan_bwd(*gradients, *args)
    for launch in launches:
        launch.run()
    by_head = partial["heads"].sum(1)
    dA.copy_(by_head[0])
    if ddt_bias.numel():
        ddt_bias.copy_(by_head[1])
    if "dD" in partial:
        total = partial["dD"].sum(0)
        dD.copy_(total if dD.dim() == 2 else total.sum(1))
    for name, gradient in (("dB", dB), ("dC", dC)):
        if name in partial:
            gradient.copy_(partial[name].sum(0))


def _spec(dtype: torch.dtype, kernel: str, options: str = "packed") -> Launch:
    """The last launch of a kernel. Few heads ("segments") have totals, which `tokens` follows."""
    args, (out, final, varlen) = sample(dtype, options)
    x, dt, A, B, C, D, z, bias, initial = args[:9]
    grads = (x, dt, A, B, C, D, x, bias, varlen)
    launches = plan_ssd_scan_bwd(*grads, out, final, varlen if options == "packed" else None, *args)[0]
    return [launch for launch in launches if kernel in launch.kernel.__name__][-1]


compile_spec("ssd_scan_bwd")(lambda dtype: _spec(dtype, "bwd", ""))
compile_spec("ssd_scan_states")(lambda dtype: _spec(dtype, "states"))
compile_spec("ssd_scan_tokens")(lambda dtype: _spec(dtype, "tokens", "segments"))
compile_spec("ssd_scan_matrices")(lambda dtype: _spec(dtype, "matrices"))
