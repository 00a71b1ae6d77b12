"""Attention over the tiles of a plan: the forward kernel and its launcher (the backward is in sparse_attention_bwd.py).

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, PV head dim of the values.

What bounds it on an H100/H200, for a bf16 tile of 128 x 128 pairs: its two products are 4 x 128 x 128 x P flops, 1,024
clocks of an SM's 4,096 dense bf16 flops a clock at P = 64, 2,048 at P = 128; its 16,384 exponentials are 1,024 clocks
of 16 a clock, so at P = 64 as much as the products, which they have to overlap. A partial tile adds its mask, in the
sm_90 code about 10 instructions a pair for causal & (window | sink), at 128 lanes a clock 1,280 clocks; full tiles skip
it.

How the work is split: a program owns BLOCK_Q queries of one head and walks its row of the plan twice, the full tiles
first, without mask or bounds, then the partial ones and the ragged end: two plain loops that the compiler pipelines,
where one loop with a branch on the kind would not be. The plan's block may be larger than the program's: BLOCK_Q and
BLOCK_K divide it, so one plan serves every kernel. Rows go from the last to the first, which under a causal mask is
the heaviest first; heads of a group are neighbours in the grid and share keys in L2.

What stays in registers: the accumulator, the running maximum and sum in base 2 (a sink is where they start), and the
numbers of the mask's program. The queries stay in shared memory. Head dims are padded to a power of two: the padding
moves no bytes, but is multiplied (80 costs as much as 128).

NaN and Inf: a masked pair has weight 0, and 0 x NaN would bring the value of a key that the row does not see. No tile
checks for that: a row of queries whose result is finite met no such value, and one whose result is not is computed
again by `careful_dot`, which tells who sees what. Only rows of tiles with a NaN, an Inf or an overflow pay.

float32 products are three TF32 ones ("tf32x3"), error about 2^-21; float64 takes the DMMA or FMA units.

Tried, by registers and stack on sm_90, bf16, causal & (window | sink), nothing timed yet: at P = 64 tiles of 128 x 128
in 4 warps spill (80 to 104 bytes), 128 x 64 do not and leave room for two programs an SM; at P = 128 8 warps take
249 registers. A careful pass on whole tiles, with a product for each kind of value, cost 3,336 bytes of stack; with
16 keys at a time and one product for all kinds it costs none.
"""

import types

import torch
import triton
import triton.language as tl

from .. import _env
from .bias_tables import bias_of, sample_tables, tables_of
from .common import LN2, LOG2E, Launch, compile_spec, index, meta, sigmoid, strides, wide
from .mask_device import AND, BELOW, CAUSAL, OR, WINDOW, functions_of, structures_of
from .tuning import config

INTERPRETED: tl.constexpr = tl.constexpr(_env.triton_interpret())  # which would multiply bfloat16 as integers
CAREFUL: tl.constexpr = tl.constexpr(16)  # the tile of the careful pass: small, so that it takes no more registers
PRECISION: tl.constexpr = tl.constexpr("tf32x3")
FULL: tl.constexpr = tl.constexpr(0)  # which tiles a walk takes: a plan's kinds of runs, or all of them, carefully
PARTIAL: tl.constexpr = tl.constexpr(1)
EVERY: tl.constexpr = tl.constexpr(2)

# --- device functions -----------------------------------------------------------------------------------------------


@triton.jit
def numbers(scalars_ptr, scale, softcap, norm):
    """The call's numbers: float32 arguments, but for float64 calls from memory."""
    if scalars_ptr is not None:
        scale, softcap, norm = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    return scale, softcap, norm


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def broken(x, inside):
    """Whether a value of the tile is NaN or Inf, where `inside`."""
    return tl.max(tl.max(tl.where(inside & (finite(x) == 0), 1, 0), axis=1), axis=0) > 0


@triton.jit
def dot(a, b, acc):
    """acc + a b."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def careful_dot(a, b, seen, acc):
    """acc + a b, where a's pairs that are not seen meet nothing of b, be it NaN or Inf. a [M, CAREFUL], b [CAREFUL, N].

    One exact product counts who sees how many values of a kind, in digits of base 32: NaN, Inf, -Inf, and 0 x any.
    """
    acc = dot(a, tl.where(finite(b), b, 0.0).to(b.dtype), acc)
    kinds = tl.where(b != b, 1, tl.where(b == float("inf"), 32, tl.where(b == -float("inf"), 1024, 0)))
    eyes = tl.where(seen, tl.where(a > 0, 1, 32768), 0)
    counts = dot(eyes.to(b.dtype), kinds.to(b.dtype), tl.zeros(acc.shape, acc.dtype)).to(tl.int32)
    acc += tl.where((counts >> 5) % 32 > 0, float("inf"), 0.0)
    acc -= tl.where((counts >> 10) % 32 > 0, float("inf"), 0.0)
    return tl.where((counts % 32 > 0) | (counts >= 32768), float("nan"), acc)


@triton.jit
def scores(qk, bias, scale, softcap, UNIT: tl.constexpr, SOFTCAP: tl.constexpr):
    """(UNIT (softcap tanh(scale qk / softcap) + bias), the slope of the cap)."""
    slope = 1.0
    if SOFTCAP:
        # tanh x = (1 - e) / (1 + e) sign x, e = exp(-2 |x|), never overflows.
        x = qk * (scale / softcap)
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        tanh = (1 - e) / (1 + e)
        slope = 1 - tanh * tanh
        s = tl.where(x < 0, -tanh, tanh) * (softcap * UNIT)
        s = tl.where(x == x, s, x)
    else:
        s = qk * (scale * UNIT)
    if bias is not None:
        s += bias.to(s.dtype) * UNIT
    return s, slope


@triton.jit
def load_rows(ptr, stride_l, stride_p, at, p, inside, P: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows `at` [X] of a matrix of P channels as [X, BLOCK_P]; zeros beyond its bounds."""
    pointers = ptr + at[:, None] * stride_l + p[None, :] * stride_p
    if BOUNDED:
        return tl.load(pointers, mask=inside[:, None] & (p[None, :] < P), other=0.0)
    elif P != p.shape[0]:
        return tl.load(pointers, mask=p[None, :] < P, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def tiles_of(runs_ptr, run, ends, KIND: tl.constexpr, STEP: tl.constexpr):
    """(first, end) of the tiles that a walk over KIND visits of a run, in the kernel's tiles, STEP of them in a plan's.

    ends: how many tiles are whole, how many there are. A full run's last tile counts as partial when it is ragged.
    """
    whole, tiles = ends
    first = tl.load(runs_ptr + 3 * run) * STEP
    end = tl.minimum(first + tl.load(runs_ptr + 3 * run + 1) * STEP, tiles)
    kind = tl.load(runs_ptr + 3 * run + 2)
    if KIND == FULL:
        end = tl.where(kind == 0, tl.minimum(end, whole), first)
    elif KIND == PARTIAL:
        first = tl.where(kind == 0, tl.maximum(first, whole), first)
    return first, end


@triton.jit
def list_of(ptr_ptr, b, h, batches, heads, tile, tiles):
    """(begin, end) in the runs of a plan's row `tile` of a batch and head."""
    row = (tl.where(batches == 1, 0, b) * heads + tl.where(heads == 1, 0, h)) * tiles + tile
    return tl.load(ptr_ptr + row), tl.load(ptr_ptr + row + 1)


@triton.jit
def program_of(code_ptr, h):
    """Offset of a head's program."""
    return tl.load(code_ptr + 2 + tl.where(tl.load(code_ptr) == 1, 0, h))


# --- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def _walk(
    acc, total, top, q, at_q, keys, values, biases, tables, code_ptr, numbers_, b, h, runs_ptr, runs, ends,
    scale, softcap, MASK: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr,
    SILU: tl.constexpr, SOFTCAP: tl.constexpr, INT64: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """The tiles of one kind added to (acc, total, top)."""
    key_ptr, stride_k_l, stride_k_p, Lk = keys
    value_ptr, stride_v_l, stride_v_p = values
    bias_ptr, stride_bias_q, stride_bias_k, Lq = biases
    p, pv = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_PV)
    for run in range(runs[0], runs[1]):
        first, end = tiles_of(runs_ptr, run, ends, KIND, STEP)
        for tile in tl.range(first, end, num_stages=1 if KIND == EVERY else None):
            at_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            in_k, column = at_k < Lk, index(at_k, INT64)
            k = load_rows(key_ptr, stride_k_l, stride_k_p, column, index(p, INT64), in_k, P, KIND != FULL)
            v = load_rows(value_ptr, stride_v_l, stride_v_p, column, index(pv, INT64), in_k, PV, KIND != FULL)
            qk = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_K], acc.dtype))  # [BLOCK_Q, BLOCK_K]
            bias = bias_of(
                bias_ptr, stride_bias_q, stride_bias_k, tables, h, at_q[:, None], at_k[None, :], (at_q < Lq)[:, None],
                in_k[None, :], INT64,
            )  # fmt: skip
            s, _ = scores(qk, bias, scale, softcap, 1.0 if SILU else LOG2E, SOFTCAP)
            allowed = None
            if KIND != FULL:
                allowed = MASK(code_ptr, numbers_, b, h, at_q[:, None], at_k[None, :]) & in_k[None, :]
            if SILU:
                w = s * sigmoid(s)
                if KIND != FULL:
                    w = tl.where(allowed, w, 0.0)
            else:
                if KIND != FULL:
                    s = tl.where(allowed, s, -float("inf"))
                higher = tl.maximum(top, tl.max(s, axis=1))
                safe = tl.where(higher == -float("inf"), 0.0, higher)
                w = tl.exp2(s - safe[:, None])
                shrink = tl.exp2(top - safe)
                total, top = total * shrink + tl.sum(w, axis=1), higher
                acc *= shrink[:, None]
            if KIND == EVERY:
                acc = careful_dot(w.to(v.dtype), v, allowed, acc)
            else:
                acc = dot(w.to(v.dtype), v, acc)
    return acc, total, top


@triton.jit
def _sparse_attention_fwd_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, sinks_ptr, tables, code_ptr, ptr_ptr, runs_ptr,
    scalars_ptr, scale, softcap, norm, Hq, group, Lq, Lk, plan_tiles, plan_batches, plan_heads,
    stride_out_b, stride_out_h, stride_out_l, stride_out_p, stride_lse_b, stride_lse_h, stride_lse_l,
    stride_q_b, stride_q_h, stride_q_l, stride_q_p, stride_k_b, stride_k_h, stride_k_l, stride_k_p,
    stride_v_b, stride_v_h, stride_v_l, stride_v_p, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_sinks_h, PARAMS: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, SILU: tl.constexpr,
    SOFTCAP: tl.constexpr, INT64: tl.constexpr, STEP_Q: tl.constexpr, STEP_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    acc_type: tl.constexpr = lse_ptr.dtype.element_ty
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // Hq, tl.program_id(1) % Hq
    batch, head, key_head = tl.cast(b, tl.int64), index(h, INT64), index(h // group, INT64)
    scale, softcap, norm = numbers(scalars_ptr, scale, softcap, norm)
    at_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q, row, pv = at_q < Lq, index(at_q, INT64), tl.arange(0, BLOCK_PV)
    q = load_rows(
        q_ptr + batch * stride_q_b + head * stride_q_h, stride_q_l, stride_q_p, row,
        index(tl.arange(0, BLOCK_P), INT64), in_q, P, True,
    )  # [BLOCK_Q, BLOCK_P]  # fmt: skip
    keys = (k_ptr + batch * stride_k_b + key_head * stride_k_h, stride_k_l, stride_k_p, Lk)
    values = (v_ptr + batch * stride_v_b + key_head * stride_v_h, stride_v_l, stride_v_p)
    biases = (None, stride_bias_q, stride_bias_k, Lq)
    if bias_ptr is not None:
        biases = (bias_ptr + batch * stride_bias_b + head * stride_bias_h, stride_bias_q, stride_bias_k, Lq)
    numbers_ = PARAMS(code_ptr, program_of(code_ptr, h))
    runs = list_of(ptr_ptr, b, h, plan_batches, plan_heads, tile // STEP_Q, plan_tiles)
    ends = (Lk // BLOCK_K, tl.cdiv(Lk, BLOCK_K))

    no_acc, no_total = tl.zeros([BLOCK_Q, BLOCK_PV], acc_type), tl.zeros([BLOCK_Q], acc_type)
    no_top = no_total - float("inf")
    if sinks_ptr is not None:
        no_top = tl.zeros([BLOCK_Q], acc_type) + tl.load(sinks_ptr + h * stride_sinks_h).to(acc_type) * LOG2E
        no_total = tl.where(no_top == -float("inf"), 0.0, no_total + 1)
    acc, total, top = no_acc, no_total, no_top
    for KIND in tl.static_range(0, 2):
        acc, total, top = _walk(
            acc, total, top, q, at_q, keys, values, biases, tables, code_ptr, numbers_, b, h, runs_ptr, runs, ends,
            scale, softcap, MASK, KIND, STEP_K, P, PV, SILU, SOFTCAP, INT64, BLOCK_K, BLOCK_P, BLOCK_PV,
        )  # fmt: skip
    if broken(acc, in_q[:, None]):
        acc, total, top = _walk(
            no_acc, no_total, no_top, q, at_q, keys, values, biases, tables, code_ptr, numbers_, b, h, runs_ptr, runs,
            (0, tl.cdiv(Lk, CAREFUL)), scale, softcap, MASK, EVERY, STEP_K * BLOCK_K // CAREFUL, P, PV, SILU, SOFTCAP,
            INT64, CAREFUL, BLOCK_P, BLOCK_PV,
        )  # fmt: skip

    if SILU:
        acc *= norm
        lse = tl.zeros([BLOCK_Q], acc_type)
    else:
        acc *= tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))[:, None]
        lse = tl.where(total == 0, -float("inf"), (top + tl.log2(tl.where(total == 0, 1.0, total))) * LN2)
    at = out_ptr + batch * stride_out_b + head * stride_out_h + row[:, None] * stride_out_l
    at += index(pv, INT64)[None, :] * stride_out_p
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=in_q[:, None] & (pv[None, :] < PV))
    at = lse_ptr + batch * stride_lse_b + head * stride_lse_h + row * stride_lse_l
    tl.store(at, lse, mask=in_q)


# --- launch -----------------------------------------------------------------------------------------------------------


def block_of(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """The block for which a call's plan is to be made: (queries, keys)."""
    return (64, 64) if q.element_size() == 8 else (128, 128)


def padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def blocks_of(kernel: str, q: torch.Tensor, v: torch.Tensor, plan, default: dict, tables: tuple | None) -> dict:
    """A kernel's tiles (they divide the plan's), warps and stages."""
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    key = f"{str(q.dtype)[6:]}-P{width}" + ("" if tables is None else "-tables")
    blocks = dict(config(kernel, key, q.device, default))
    for axis, most in zip("QK", plan.block):
        blocks[f"BLOCK_{axis}"] = min(blocks[f"BLOCK_{axis}"], most)
    return blocks


def common_args(q, k, v, code, plan, bias, tables, scale, softcap, silu, norm, functions, blocks, tensors=()) -> dict:
    """The arguments that every kernel of the family takes."""
    params, mask = functions or functions_of(structures_of(code))
    wide_q = q.dtype == torch.float64
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, bias_ptr=bias, tables=tables, code_ptr=code,
        scalars_ptr=torch.tensor([scale, softcap or 0.0, norm], dtype=q.dtype, device=q.device) if wide_q else None,
        scale=float(scale), softcap=float(softcap or 0), norm=float(norm), Hq=q.shape[1],
        group=q.shape[1] // k.shape[1], Lq=q.shape[2], Lk=k.shape[2], plan_batches=plan.batches, plan_heads=plan.heads,
        **strides("q", q, "bhlp"), **strides("k", k, "bhlp"), **strides("v", v, "bhlp"), **bias_strides(bias),
        PARAMS=params, MASK=mask, P=q.shape[3], PV=v.shape[3], SILU=bool(silu), SOFTCAP=bool(softcap),
        INT64=wide(q, k, v, bias, *tensors), STEP_Q=plan.block[0] // blocks["BLOCK_Q"],
        STEP_K=plan.block[1] // blocks["BLOCK_K"], BLOCK_Q=blocks["BLOCK_Q"], BLOCK_K=blocks["BLOCK_K"],
        BLOCK_P=padded(q.shape[3]), BLOCK_PV=padded(v.shape[3]),
    )  # fmt: skip


def bias_strides(bias: torch.Tensor | None, name: str = "bias") -> dict[str, int]:
    """A bias's strides; a batch or head axis of size 1 serves every batch or head."""
    found = strides(name, bias, "bhqk")
    shared = [axis for axis, size in zip("bh", (0, 0) if bias is None else bias.shape) if size == 1]
    return found | {f"stride_{name}_{axis}": 0 for axis in shared}


def _default(q: torch.Tensor, v: torch.Tensor) -> dict:
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.element_size() == 2:
        queries, keys, warps, stages = (128, 64, 4, 3) if width <= 64 else (128, 64, 8, 3)
        if width > 128:
            queries, keys, warps, stages = 64, 32, 4, 2
    else:
        queries, keys, warps, stages = (64, 32, 4, 2) if width <= 128 else (32, 32, 4, 1)
    return {"BLOCK_Q": queries, "BLOCK_K": keys, "num_warps": warps, "num_stages": stages}


def plan_sparse_attention_fwd(
    out, lse, q, k, v, code, plan, bias, sinks, tables, scale, softcap, silu, norm, functions=None
) -> Launch:  # fmt: skip
    """The launch, from shapes, strides and dtypes; functions: the mask's (params, mask), else read from code."""
    default = _default(q, v)
    if tables is not None:  # a tile of indices beside that of scores
        default["num_warps"] = 8
    blocks = blocks_of("sparse_attention_fwd", q, v, plan, default, tables)
    args = common_args(q, k, v, code, plan, bias, tables, scale, softcap, silu, norm, functions, blocks, (out,))
    args |= dict(
        out_ptr=out, lse_ptr=lse, sinks_ptr=sinks, ptr_ptr=plan.ptr, runs_ptr=plan.runs,
        plan_tiles=triton.cdiv(q.shape[2], plan.block[0]), **strides("out", out, "bhlp"),
        **strides("lse", lse, "bhl"), **strides("sinks", sinks, "h"),
    )  # fmt: skip
    grid = (triton.cdiv(q.shape[2], blocks["BLOCK_Q"]), q.shape[0] * q.shape[1])
    return Launch(_sparse_attention_fwd_kernel, grid, args, blocks["num_warps"], blocks["num_stages"])


def sparse_attention_fwd(*args) -> None:
    """fill(out, lse, q, k, v, code, plan, bias, sinks, *tables, scale, softcap, silu, norm)

    tables: position_table, q_pos, k_pos, time_table, q_time, k_time, edges.
    """
    plan_sparse_attention_fwd(*args[:9], tables_of(*args[9:16]), *args[16:]).run()


# --- what tests compile -----------------------------------------------------------------------------------------------


def sample(dtype: torch.dtype, options: str) -> dict:
    """The arguments of a typical call on meta tensors, by name, causal & (window | sink) of 8 heads in 2 groups.

    options: words among "d128", "bias", "silu", "softcap", "sinks", "heads" (two structures), "tables".
    """
    options = options.split()
    P, length = 128 if "d128" in options else 64, 4096
    q, k = (meta(4, length, heads, P, dtype=dtype).transpose(1, 2) for heads in (8, 2))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    block, runs = block_of(q, k), meta(64, 3, dtype=torch.int32)
    lists = meta(triton.cdiv(length, block[0]) + 1, dtype=torch.int32)
    plan = types.SimpleNamespace(block=block, batches=1, heads=1, ptr=lists, runs=runs, col_ptr=lists, col_runs=runs)
    local = ((CAUSAL, 0), (WINDOW, 0), (BELOW, 0), (OR, 0), (AND, 0))
    structures = (local, ((CAUSAL, 0),)) if "heads" in options else (local,)
    return dict(
        q=q, k=k, v=k, code=meta(64, dtype=torch.int32), plan=plan,
        bias=meta(1, 8, length, length, dtype=dtype) if "bias" in options else None,
        sinks=meta(8, dtype=real) if "sinks" in options else None,
        tables=sample_tables(8, length, real) if "tables" in options else None, scale=P**-0.5,
        softcap=30.0 if "softcap" in options else None, silu="silu" in options, norm=1.0,
        functions=functions_of(structures),
    ), meta(4, 8, length, dtype=real)  # fmt: skip


def _spec(dtype: torch.dtype, options: str) -> Launch:
    call, lse = sample(dtype, options)
    return plan_sparse_attention_fwd(call["q"], lse, **call)


for _options in ("", "d128 bias softcap tables"):
    compile_spec("_".join(["sparse_attention_fwd", *_options.split()]))(lambda dtype, o=_options: _spec(dtype, o))
