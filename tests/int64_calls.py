"""Calls of kernels whose tensors test_int64_offsets.py lays out: name, outputs, arguments, and what must be dense.

name: of the native op. dense: the numbers of the tensors, outputs first, that kernels index by their shape; behind it,
those of which they take the last axis as dense.

Shape letters: B batch, D channels, L length, N states, G groups, H heads, P head dim, W filter width, S slots, M model
width, R rank of the step size.
"""

import functools

import torch

from scalekern import masks, reference
from scalekern.ops import _cross_scan as crossed
from scalekern.ops import _hadamard as hadamard
from scalekern.ops import _quant_matmul_cpu as matmul
from scalekern.ops import causal_conv1d as conv
from scalekern.ops import cross_scan as cross
from scalekern.ops import diag_scan as diag
from scalekern.ops import quantized_mamba_update as quantized_step
from scalekern.ops import quantized_selective_scan as quantized_scan
from scalekern.ops import selective_scan as scan
from scalekern.ops import selective_state_update as update
from scalekern.ops import sparse_attention as attention
from scalekern.ops import sparse_attention_decode as decode
from scalekern.reference.hadamard_transform import MATRICES
from scalekern.reference.hstu_attention import bucket_edges
from scalekern.reference.quantized_mamba_update import formats_of, parts_of
from scalekern.testing.quant_matmul import weight


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 31 * len(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def scan_args(dtype, packed, complex_A=False):
    B, D, L, N, G = (1, 4, 70, 5, 2) if packed else (2, 4, 70, 5, 2)
    rows = 3 if packed else B
    io = lambda *shape, seed: normal(*shape, seed=seed, dtype=dtype)

    def state(*shape, seed, dtype=torch.float32):
        x = normal(*shape, seed=seed)
        return torch.complex(x, normal(*shape, seed=seed + 100)) if complex_A else x.to(dtype)

    A = state(D, N, seed=3)
    C = state(D, N, seed=5, dtype=dtype) if packed else state(B, G, N, L, seed=5, dtype=dtype)
    return [
        io(B, D, L, seed=1), io(B, D, L, seed=2), torch.complex(-A.real.abs(), A.imag) if complex_A else -A.abs(),
        state(B, G, N, L, seed=4, dtype=dtype), C, normal(D, seed=6), io(B, D, L, seed=7), normal(D, seed=8),
        state(rows, D, N, seed=9), torch.tensor([0, 9, 66, 70]) if packed else None, True, packed,
    ]  # fmt: skip


def scan_fwd_call(dtype, packed, complex_A=False):
    args = [*scan_args(dtype, packed, complex_A), True]
    return "selective_scan_fwd", scan._allocate_fwd(*args), args, (2,)  # checkpoints are dense


def scan_bwd_call(dtype, packed, complex_A=False):
    args = scan_args(dtype, packed, complex_A)
    out, last, checkpoints = scan.selective_scan_fwd(*args, True)
    dlast = last.roll(1, -1)
    args = [normal(*out.shape, seed=20, dtype=dtype), dlast, *args[:10], checkpoints, *args[10:]]
    return "selective_scan_bwd", scan._allocate_bwd(*args), args, (9 + 12,)


def conv_args(dtype, packed):
    B, D, L, W = (1, 4, 70, 4) if packed else (2, 4, 70, 4)
    ids = None if packed else torch.tensor([[0] * 30 + [-1] * 2 + [1] * 38, [2] * 70], dtype=torch.int32)
    bounds, rows = (torch.tensor([0, 9, 66, 70]), 3) if packed else (None, B)
    return [
        normal(B, D, L, seed=1, dtype=dtype), normal(D, W, seed=2), normal(D, seed=3), ids, bounds,
        normal(rows, D, W - 1, seed=4, dtype=dtype), True,
    ]  # fmt: skip


def conv_fwd_call(dtype, packed):
    args = conv_args(dtype, packed)
    return "causal_conv1d_fwd", conv._allocate_fwd(*args), args, ()


def conv_bwd_call(dtype, packed):
    args = conv_args(dtype, packed)
    out, final = conv._allocate_fwd(*args)
    args = [normal(*out.shape, seed=20, dtype=dtype), normal(*final.shape, seed=21, dtype=dtype), *args]
    return "causal_conv1d_bwd", conv._allocate_bwd(*args), args, ()


def conv_update_call(dtype, circular):
    B, D, T, W, S = 3, 4, 2, 4, 5
    args = [
        normal(S, D, 5, seed=1, dtype=dtype), normal(B, D, T, seed=2, dtype=dtype), normal(D, W, seed=3),
        normal(D, seed=4), torch.tensor([0, 4, 13]) if circular else None, torch.tensor([4, -1, 0]), True,
    ]  # fmt: skip
    return "causal_conv1d_update", (conv._allocate_update(*args),), args, (0,)


def state_update_call(dtype, heads):
    B, H, P, N, G, S = (3, 4, 6, 5, 2, 5) if heads else (3, 1, 6, 16, 1, 5)
    io = lambda *shape, seed: normal(*shape, seed=seed, dtype=dtype)
    args = [
        normal(S, H, P, N, seed=1), io(B, H, P, seed=2), io(B, H, P, seed=3), -normal(H, P, N, seed=4).abs(),
        io(B, G, N, seed=5), io(B, G, N, seed=6), normal(H, P, seed=7), io(B, H, P, seed=8), normal(H, P, seed=9),
        torch.tensor([4, -1, 0]), True,
    ]  # fmt: skip
    return "selective_state_update", (update._allocate(*args),), args, (0,)


def fill_cpu(name, outputs, args):
    getattr(torch.ops.scalekern_native, f"{name}_cpu").default(*outputs, *args)


def attention_args(dtype, biased):
    """(q, k, v), what the tiles come from, and bias, sinks, tables of positions and of times, scale and the rest."""
    B, H, G, L, P = 2, 4, 2, 70, 8
    rule = masks.causal & (masks.window(20, 0) | masks.sink(3))
    plan = rule.plan(L, L, (64, 64))
    qkv = [normal(B, n, L, P, seed=seed, dtype=dtype) for seed, n in ((1, H), (2, G), (3, G))]
    extra = [None] * 9
    if biased:
        at, time = torch.arange(L).int(), torch.arange(L) * 37
        extra = [
            normal(B, H, L, L, seed=7, dtype=dtype), normal(H, seed=8), normal(H, 31, seed=9), at, at.clone(),
            normal(H, 12, seed=10), time + 40, time, bucket_edges(11),
        ]  # fmt: skip
    return qkv, [rule.code(), plan.ptr, plan.runs, 64, 64], [*extra, P**-0.5, 0.0, False, 1.0]


def attention_fwd_call(dtype, biased):
    qkv, tiles, rest = attention_args(dtype, biased)
    return "sparse_attention_fwd", attention._allocate_fwd(*qkv), [*qkv, *tiles, *rest], (5, 6, 7)


def attention_bwd_call(dtype, biased):
    qkv, tiles, rest = attention_args(dtype, biased)
    out, lse = attention._allocate_fwd(*qkv)
    fill_cpu("sparse_attention_fwd", (out, lse), [*qkv, *tiles, *rest])
    sums = [None if x is None else torch.zeros(x.shape) for x in (rest[0], rest[1], rest[2], rest[5])]
    args = [*sums, normal(*out.shape, seed=20, dtype=dtype), normal(*lse.shape, seed=21), out, lse, *qkv, *tiles, *rest]
    return "sparse_attention_bwd", [torch.empty_like(x) for x in qkv], args, (14, 15, 16)


def decode_call(dtype, ragged):
    B, H, G, S, P = 2, 4, 2, 40, 8
    lead = (B, S) if ragged else (B, G, S)
    args = [
        normal(B, H, 2, P, seed=1, dtype=dtype), normal(*lead, P, seed=2, dtype=dtype),
        normal(*lead, P, seed=3, dtype=dtype),
        torch.tensor([11, 9]), torch.tensor([7, 11, 5, 6]), torch.tensor([0, 15, 40]) if ragged else None, None,
        None if ragged else torch.tensor([3, 20]), normal(H, seed=4), *[None] * 4, 1, ragged, P**-0.5, 0.0,
        0, 0, 0, 0, P,
    ]  # fmt: skip
    return "sparse_attention_decode", decode._allocate(*args), args, (0, 1)


def diag_scan_fwd_call(dtype, packed):
    B, D, L = (1, 4, 70) if packed else (2, 4, 70)
    cu = torch.tensor([0, 20, 20, 70]) if packed else None
    args = [normal(B, D, L, seed=1).sigmoid().to(dtype), normal(B, D, L, seed=2, dtype=dtype),
            normal(3 if packed else B, D, seed=3), cu, packed]  # fmt: skip
    return "diag_scan_fwd", diag._allocate_fwd(*args), args, (5,)


def diag_scan_bwd_call(dtype, packed):
    args = diag_scan_fwd_call(dtype, packed)[2]
    out, last = diag.diag_scan_fwd(*args)
    args = [normal(*out.shape, seed=20, dtype=dtype), last.roll(1, -1), args[0], out, *args[2:]]
    return "diag_scan_bwd", diag._allocate_bwd(*args), args, (8,)


def cross_scan_call(dtype, grouped):
    args = [normal(2, 8, 5, 6, seed=1, dtype=dtype), [0, 1, 2, 3], grouped]
    return "cross_scan", [cross._allocate_scan(*args)], [args[0], crossed.code(args[1]), grouped], (0,)


def cross_merge_call(dtype, grouped):
    args = [normal(2, 4, 2, 30, seed=1, dtype=dtype), [5, 6], [0, 1, 2, 3], grouped]
    return "cross_merge", [cross._allocate_merge(*args)], [args[0], crossed.code(args[2]), grouped], (0,)


# ---- codes ---------------------------------------------------------------------------------------------------------


def codes(*shape, seed):
    return (normal(*shape, seed=seed) * 50).clamp(-128, 127).to(torch.int8)


def quantized_scan_fwd_call(dtype, packed):
    u, delta, A, B, _, *rest = scan_args(dtype, packed)
    D, G, matrix = u.shape[1], B.shape[1], B.shape
    steps = [normal(n, seed=seed).abs() / 64 for n, seed in ((D, 30), (G, 31), (G, 32))]
    args = [codes(*u.shape, seed=1), delta, A, codes(*matrix, seed=4), codes(*matrix, seed=5), *steps, *rest, True]
    return "quantized_selective_scan_fwd", quantized_scan._allocate_fwd(*args), args, (2,)


def quantized_state_update_call(dtype, heads):
    _, outputs, (state, *args), dense = state_update_call(dtype, heads)
    step = normal(*state.shape[1:3], seed=11).abs() / 64
    return "quantized_state_update", outputs, [codes(*state.shape, seed=1), *args[:5], step, *args[5:]], dense


def decode_codes_call(dtype, ragged):
    """Keys of 4 bits with offsets, values of 8."""
    _, outputs, (q, k, v, *args), dense = decode_call(dtype, ragged)
    k, v = reference.quantize_kv(k, bits=4, group_size=4, symmetric=False), reference.quantize_kv(v, bits=8)
    args[6:10] = [k.scales, k.offsets, v.scales, v.offsets]
    args[-5:-1] = [k.bits, k.group_size, v.bits, v.group_size]
    return "sparse_attention_decode", outputs, [q, k.data, v.data, *args], dense


def quant_matmul_args(name, int8):
    """With zeros, or with scales of two levels and rounded tokens."""
    w = weight(17, 100, "int4", 32, symmetric=int8, two_level=int8)
    return matmul.weight(*parts_of(w)[:5], normal(17, seed=3), None, w.format, w.group_size, name, None)


def quant_matmul_fwd_call(dtype, int8):
    args = [normal(5, 100, seed=1, dtype=dtype), *quant_matmul_args("int8" if int8 else None, int8)]
    return "quant_matmul_fwd", [torch.empty(5, 17, dtype=dtype)], args, (), (2,)


def quant_matmul_bwd_call(dtype, int8):
    data, scales, zeros, offsets, outer, _, *rest = quant_matmul_args(None, int8)
    args = [normal(5, 17, seed=1, dtype=dtype), data, scales, zeros, offsets, outer, *rest[:-2]]
    return "quant_matmul_bwd", [torch.empty(5, 100, dtype=dtype)], args, (), (2,)


def hadamard_call(dtype, by_twelve):
    m, k = (12, 2) if by_twelve else (1, 5)
    args = [normal(3, 4, m << k, seed=1, dtype=dtype), hadamard._signs(m, MATRICES[0], False), k, 0.25]
    return "hadamard_transform", [torch.empty_like(args[0])], args, (0, 2)


def hadamard_quantize_call(dtype, by_twelve):
    _, (out,), args, _ = hadamard_call(dtype, by_twelve)
    outputs = [torch.empty_like(out, dtype=torch.int8), torch.empty(3, 4, out.shape[-1] // 4)]
    return "fused_hadamard_quantize", outputs, [*args, 4, 127], (0, 1, 3)


def mamba_step_args(dtype):
    """(conv_state, ssm_state, hidden_states), the filter, what comes behind the projections, their sizes."""
    B, M, D, N, R, W = 3, 20, 24, 5, 4, 4
    states = [normal(B, D, W, seed=1, dtype=dtype), normal(B, D, N, seed=2), normal(B, M, seed=3, dtype=dtype)]
    rest = [normal(D, N, seed=6), normal(D, seed=7), normal(D, seed=8)]
    return states, [normal(D, W, seed=4), normal(D, seed=5)], rest, ((2 * D, M), (R + 2 * N, D), (D, R), (M, D))


def mamba_update_call(dtype, normed):
    states, conv, rest, shapes = mamba_step_args(dtype)
    in_proj, x_proj, delta, out = (normal(*shape, seed=9, dtype=dtype) / shape[1] ** 0.5 for shape in shapes)
    norm = normal(len(out), seed=10, dtype=dtype) if normed else None
    args = [*states, in_proj, None, *conv, x_proj, delta, out, None, *rest, norm, 1e-5 if normed else -1.0, 1e-5]
    return "mamba_update", [torch.empty_like(states[2])], args, (12, 15), (0, 3, 4, 8, 9, 10)


def quantized_mamba_update_call(dtype, int8):
    states, conv, rest, shapes = mamba_step_args(dtype)
    weights = [weight(*shape, "int4", 4) for shape in shapes]
    projections = [parts_of(w) for w in weights]
    columns = tuple(shape[1] for shape in shapes)
    native = quantized_step.native_parts(projections, columns, *formats_of(weights), "int8" if int8 else "", None)
    outputs = [torch.empty_like(states[2])]
    return "quantized_mamba_update", outputs, [*states, *conv, *rest, *native], (0, 6, 10), (3,)


CALLS = {
    "quantized_scan_fwd": quantized_scan_fwd_call, "quantized_state_update": quantized_state_update_call,
    "quant_matmul_fwd": quant_matmul_fwd_call, "quant_matmul_bwd": quant_matmul_bwd_call,
    "quant_decode": decode_codes_call, "hadamard": hadamard_call, "hadamard_quantize": hadamard_quantize_call,
    "mamba_update": mamba_update_call, "quantized_mamba_update": quantized_mamba_update_call,
    "attention_fwd": attention_fwd_call, "attention_bwd": attention_bwd_call, "attention_decode": decode_call,
    "scan_fwd": scan_fwd_call, "scan_bwd": scan_bwd_call, "conv_fwd": conv_fwd_call, "conv_bwd": conv_bwd_call,
    "conv_update": conv_update_call, "state_update": state_update_call,
    "diag_scan_fwd": diag_scan_fwd_call, "diag_scan_bwd": diag_scan_bwd_call, "cross_scan": cross_scan_call,
    "cross_merge": cross_merge_call,
    "complex_scan_fwd": functools.partial(scan_fwd_call, complex_A=True),
    "complex_scan_bwd": functools.partial(scan_bwd_call, complex_A=True),
}  # fmt: skip
