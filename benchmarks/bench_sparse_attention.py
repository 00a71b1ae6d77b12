"""Cases of attention under masks, against what runs without tile lists: torch's dense attention and flex_attention.

Shape letters: B batch, H heads, G key heads, L length, P head dim, W window.
"""

import functools
import math

import torch
import torch.nn.functional as F

import scalekern
from scalekern import _dispatch, masks, reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE, upcast

OPS = ("sparse_attention_fwd", "sparse_attention_bwd")
DENSE, FLEX, SELF = "scaled_dot_product_attention, causal", "flex_attention, compiled", "itself at L=4,096, scaled"
ROWS = 1024  # of the oracle at a time: 0.3 GB of float64 scores at 4 heads and 8,192 keys


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def streaming(W, sinks=4):
    return masks.causal & (masks.window(W - 1, 0) | masks.sink(sinks))


def scales(L):
    """VAR's ten scales, as often as they fit: every token sees its own scale and the earlier ones."""
    ends, side = [], 1
    while (ends[-1] if ends else 0) < L:
        ends.append(min((ends[-1] if ends else 0) + side * side, L))
        side += 1
    return masks.blocks(ends)


def packed(L):
    """Documents of uneven lengths."""
    bounds, step = [0], 97
    while bounds[-1] < L:
        bounds.append(min(bounds[-1] + step, L))
        step = (step * 7 + 131) % 1500 + 20
    return masks.causal & masks.segments(cu_seqlens=bounds)


MASKS = {
    "causal": lambda L, H, W: masks.causal,
    "window": lambda L, H, W: masks.causal & masks.window(W - 1, 0),
    "window and sink": lambda L, H, W: streaming(W),
    "scales": lambda L, H, W: scales(L),
    "packed": lambda L, H, W: packed(L),
    "a window a head": lambda L, H, W: masks.per_head([streaming(min(64 << (h % 6), L)) for h in range(H)]),  # MoA
}


def forward(call, inputs, dout):
    return lambda: call(*inputs)


def backward(call, inputs, dout):
    """The gradients alone: of one graph, made at the first run on each backend."""
    graphs = {}

    def run():
        backend = _dispatch.forced()
        if backend not in graphs:
            graphs[backend] = call(*inputs)
        return torch.autograd.grad(graphs[backend], inputs, dout, retain_graph=True)

    return run


def unseen(run, times=1):
    """`run`, so often: of other values than the case's, which are not compared."""

    def repeated():
        for _ in range(times):
            run()

    return repeated


def by_rows(rule, reach, q, k, v, dout=None):
    """The reference in blocks of rows, each with the keys that a row can reach: (L, L) scores have no room.

    Returns out, or with its gradient those of q, k and v, summed block by block: 0.1 TB of float64 scores otherwise.
    """
    outs, grads = [], [torch.zeros_like(x) for x in (q, k, v)]
    for begin in range(0, q.shape[2], ROWS):
        end, first = min(begin + ROWS, q.shape[2]), max(begin - reach, 0)
        part = rule.shift(begin, first)
        last = q.shape[2] if reach >= q.shape[2] else end
        cuts = [x[:, :, a:b].detach() for x, a, b in ((q, begin, end), (k, first, last), (v, first, last))]
        leaves = [x.requires_grad_(dout is not None) for x in cuts]
        out = reference.sparse_attention(*leaves, part)
        if dout is None:
            outs.append(out)
            continue
        for into, cut, grad in zip(grads, (slice(begin, end), *2 * (slice(first, last),)),
                                   torch.autograd.grad(out, leaves, dout[:, :, begin:end])):  # fmt: skip
            into[:, :, cut] += grad
    return torch.cat(outs, 2) if dout is None else tuple(grads)


def attention(device, dtype, *, train, mask, rivals=(), B=1, H, G=None, L, P, W=256, short=4096) -> Work:
    G = math.gcd(H, G or H)
    rule, passes = MASKS[mask](L, H, W), backward if train else forward
    randn = normal(device, 0)
    inputs = tuple(randn(B, n, L, P).to(dtype).requires_grad_(train) for n in (H, G, G))
    dout = normal(device, 1)(B, H, L, P).to(dtype)

    def oracle():
        found = by_rows(rule, W if mask == "window" else L, *map(upcast, inputs), dout.double() if train else None)
        return found if train else (found,)

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if device.type == "cpu" and train:
            raise peers.Absent("flex_attention has no backward on a CPU")
        table = rule.to_dense(L, L).to(device)
        allowed = lambda b, h, i, j: table[0, 0 if table.shape[1] == 1 else h, i, j]
        blocks = create_block_mask(allowed, None, None if table.shape[1] == 1 else H, L, L, device=device)
        compiled = torch.compile(flex_attention, dynamic=False) if L > 1024 else flex_attention
        call = lambda *x: compiled(*x, block_mask=blocks, enable_gqa=G < H)
        return peers.torch_peer(passes(call, inputs, dout))

    def dense():
        call = lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=G < H)
        return peers.torch_peer(unseen(passes(call, inputs, dout)))  # of another mask

    def shorter():
        *cut, grad = (x[:, :, :short].detach().clone() for x in (*inputs, dout))
        run = passes(lambda *x: scalekern.sparse_attention(*x, rule), [x.requires_grad_(train) for x in cut], grad)
        return peers.Peer(unseen(run, L // short), "scalekern", L / (L // short * short))

    pairs = int(rule.density(L, L) * L * L) * B * H
    tolerance = gradient_tolerance("sparse_attention", dtype) if train else TOLERANCE[dtype]
    moved = inputs[0].element_size() * B * L * P * 2 * (H + G)
    return Work(
        run=passes(lambda *x: scalekern.sparse_attention(*x, rule), inputs, dout), oracle=oracle, tolerance=tolerance,
        bytes_moved=(2 if train else 1) * moved, flops=(10 if train else 4) * pairs * P, exponentials=pairs,
        peers={name: rival for name, rival in ((DENSE, dense), (FLEX, flex), (SELF, shorter)) if name in rivals},
    )  # fmt: skip


def cases(device, mask, priority, shape, dtype=torch.float32, *, rivals=(DENSE,), forward=None, backward=None):
    """Both directions of one mask."""
    targets = {False: forward or {}, True: backward or {}}
    return [
        case("attention", functools.partial(attention, train=train, mask=mask, rivals=rivals),
             OPS[1:] if train else OPS[:1], "bwd" if train else "fwd", device, priority + train, shape, dtype,
             note=mask.replace(" ", "_"),
             backends=("triton", "cpu"), targets=targets[train])
        for train in (False, True)
    ]  # fmt: skip


_CPU = {"B": 1, "H": 4, "L": 4096, "P": 64}
_GPU = {"B": 1, "H": 32, "L": 8192}
CPU = [
    *cases("cpu", "window", 42, _CPU, rivals=(DENSE, FLEX), forward={DENSE: 4, FLEX: 1.2}, backward={DENSE: 3}),
    *cases("cpu", "window", 92, {**_CPU, "L": 65536}, rivals=(SELF,), forward={SELF: 5 / 6}, backward={SELF: 5 / 6}),
    *cases("cpu", "window", 92, _CPU, torch.bfloat16, forward={DENSE: 4}, backward={DENSE: 3}),
    *cases("cpu", "causal", 92, _CPU, torch.bfloat16, forward={DENSE: 1}, backward={DENSE: 1}),
    *cases("cpu", "window and sink", 93, {**_CPU, "G": 2}),
    *cases("cpu", "scales", 94, _CPU),
    *cases("cpu", "packed", 95, _CPU),
    *cases("cpu", "a window a head", 96, {**_CPU, "H": 6}),
]
CUDA = [
    row
    for i, mask in enumerate(MASKS)
    for P in (64, 128)
    for row in cases("cuda", mask, 30 + 2 * i, {**_GPU, "P": P}, torch.bfloat16, rivals=(DENSE, FLEX),
                     forward={FLEX: 1.2}, backward={FLEX: 1.2})
]  # fmt: skip


# ---- sparse_attention_decode ---------------------------------------------------------------------------------------

WHOLE, GATHERED = "scaled_dot_product_attention, whole cache", "gathered windows + scaled_dot_product_attention"
FLOATS = "a cache of floats"  # whose values are the same but for the rounding to codes: they are not compared
SCALED = "the whole cache, by the share of the budgets"  # what time in proportion to their sum would be


def decode(device, dtype=torch.float32, *, budgets=None, bits=0, group=None, B=1, G, R=1, L, P, sinks=4) -> Work:
    """G key heads, R query heads to each. bits: of a cache of codes.

    budgets: how many times shorter than L those of the key heads are, in turn; None: the whole cache.
    """
    randn, H = normal(device, 0), G * R
    q, k, v = randn(B, H, 1, P).to(dtype), randn(B, G, L, P).to(dtype), randn(B, G, L, P).to(dtype)
    floats, moved = (k, v), dtype.itemsize * 2 * P  # bytes of a key and its value
    if bits:
        k, v = (reference.quantize_kv(x, bits=bits, group_size=group and min(group, P)) for x in (k, v))
        moved = sum(t.nbytes for cache in (k, v) for t in cache.tensors().values()) // (B * G * L)
    lengths = torch.full((B,), L, dtype=torch.int32, device=device)
    spans = [L] * G if budgets is None else [L // budgets[g % len(budgets)] for g in range(G)]
    limits = {} if budgets is None else {"sink": sinks, "budgets": torch.tensor(spans).repeat_interleave(R)}

    def oracle():
        exact = (upcast(x) if isinstance(x, torch.Tensor) else x for x in (q, k, v))
        return (reference.sparse_attention_decode(*exact, lengths, **limits),)

    def float_cache():
        return peers.Peer(unseen(lambda: scalekern.sparse_attention_decode(q, *floats, lengths)), "scalekern")

    def whole():
        run = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=R > 1)
        return peers.torch_peer(run if budgets is None else unseen(run))

    def gathered():
        kept = [[*range(sinks), *range(L - s + sinks, L)] for s in spans]
        kept = [torch.tensor(rows, device=device) for rows in kept]

        def run():
            outs = [
                F.scaled_dot_product_attention(
                    q[:, g * R : (g + 1) * R], k[:, g, rows][:, None], v[:, g, rows][:, None], enable_gqa=R > 1
                )
                for g, rows in enumerate(kept)
            ]
            return (torch.cat(outs, 1),)

        return peers.torch_peer(run)

    def scaled():
        run = unseen(lambda: scalekern.sparse_attention_decode(q, k, v, lengths))
        return peers.Peer(run, "scalekern", sum(spans) / (G * L))

    keys = B * sum(spans)
    return Work(
        run=lambda: (scalekern.sparse_attention_decode(q, k, v, lengths, **limits),), oracle=oracle,
        tolerance=TOLERANCE[dtype], bytes_moved=keys * moved + dtype.itemsize * 2 * B * H * P,
        flops=4 * keys * R * P, exponentials=keys * R,
        peers={FLOATS: float_cache} if bits else {WHOLE: whole} if budgets is None
        else {WHOLE: whole, GATHERED: gathered, SCALED: scaled},
    )  # fmt: skip


def decoding(device, priority, shape, dtype, note="", budgets=None, bits=0, group=None, **targets):
    build = functools.partial(decode, budgets=budgets, bits=bits, group=group)
    return case("decode", build, ("sparse_attention_decode",), "step", device, priority,
                shape, dtype, note=note, backends=("triton", "cpu"), targets=targets)  # fmt: skip


def quantizing(device, dtype=torch.float32, *, update=False, bits=8, B=1, G, N=1, L=0, P) -> Work:
    """N tokens of G heads; update: into a cache of L slots."""
    x = normal(device, 0)(B, G, N, P).to(dtype)
    lengths = torch.full((B,), max(L, N), dtype=torch.int32, device=device)
    lead = B, G, max(L, N)
    made = lambda package: package.quantize_kv(x, bits=bits)  # noqa: E731

    def write():
        cache = scalekern.quant.QuantizedKV.empty(*lead, channels=P, bits=bits, device=device)
        return lambda: scalekern.quantize_kv_update(cache, x, lengths)

    run, nbytes = write() if update else (lambda: made(scalekern)), made(reference).nbytes
    newest = lambda cache: cache[:, :, -N:].dequantize(torch.float64)  # noqa: E731
    return Work(
        run=run, sample=lambda: newest(run()), oracle=lambda: (made(reference).dequantize(torch.float64),),
        tolerance=TOLERANCE[torch.float32], bytes_moved=x.numel() * dtype.itemsize + nbytes, flops=6 * x.numel(),
        peers={},
    )  # fmt: skip


def quantizing_cases(device, priority, dtype):
    shape = {"B": 1 if device == "cpu" else 16, "G": 8, "N": 4096, "P": 128}
    return [
        case("quantize_kv", functools.partial(quantizing, bits=bits, update=update),
             (f"quantize_kv{'_update' * update}",), "step" if update else "fwd", device, priority + update,
             {**shape, "N": 1, "L": 4096} if update else shape,
             dtype, note=f"int{bits}", backends=("triton", "cpu"))
        for bits in (8, 4)
        for update in (False, True)
    ]  # fmt: skip


# ---- merge_attention -----------------------------------------------------------------------------------------------


def merge(device, dtype=torch.float32, *, train, N, B=1, H, L, P) -> Work:
    """Backward reads what the forward reads, the gradients of its two outputs and lse, and writes two gradients."""
    randn, passes = normal(device, 0), backward if train else forward
    inputs = randn(N, B, H, L, P).to(dtype).requires_grad_(train), randn(N, B, H, L).requires_grad_(train)
    douts = randn(B, H, L, P).to(dtype), randn(B, H, L)
    wide, wide_douts = ([upcast(x) for x in given] for given in (inputs, douts))
    tolerance = gradient_tolerance("merge_attention", dtype) if train else TOLERANCE[dtype]
    return Work(
        run=passes(scalekern.merge_attention, inputs, douts),
        oracle=passes(reference.merge_attention, tuple(x.requires_grad_(train) for x in wide), wide_douts),
        tolerance=tolerance, flops=(6 if train else 2) * inputs[0].numel(), exponentials=inputs[1].numel(),
        bytes_moved=(2 * N + 1 if train else N + 1) * B * H * L * (P * dtype.itemsize + 4),
    )  # fmt: skip


def merging(device, priority, shape, dtype):
    return [
        case("merge", functools.partial(merge, train=train), (f"merge_attention_{way}",), way, device, priority, shape,
             dtype, backends=("cuda", "cpu"))
        for train, way in ((False, "fwd"), (True, "bwd"))
    ]  # fmt: skip


# ---- hstu_attention ------------------------------------------------------------------------------------------------

UNBIASED, UPSTREAM = "without tables", "generative_recommenders"


def hstu(device, dtype=torch.float32, *, train, biased, B, H, L, P, K=128) -> Work:
    """B sequences of L, L / 2, L / 3 ... tokens, sorted times in seconds.

    biased: by both tables, of K + 1 times and 2 L - 1 distances.
    """
    randn, passes = normal(device, 0), backward if train else forward
    bounds = [0]
    for s in range(B):
        bounds.append(bounds[-1] + -(-L // (s + 1)))
    total = bounds[-1]
    inputs = tuple(randn(total, H, P).to(dtype).requires_grad_(train) for _ in range(3))
    tables = tuple((randn(n) / 4).requires_grad_(train) for n in (K + 1, 2 * L - 1)) if biased else ()
    dout = normal(device, 1)(total, H, P).to(dtype)
    offsets = torch.tensor(bounds, device=device)
    time = (randn(total).abs() * 300).cumsum(0).long()

    def call(q, k, v, time_table=None, position_table=None, package=scalekern):
        times = None if time_table is None else time
        return package.hstu_attention(
            q, k, v, offsets, max_len=L, time=times, time_table=time_table, position_table=position_table
        )

    def oracle():
        exact = tuple(upcast(x).requires_grad_(train) for x in (*inputs, *tables))
        found = passes(functools.partial(call, package=reference), exact, dout.double())()
        return tuple(t.detach() for t in found) if train else (found,)

    def unbiased():
        return peers.torch_peer(unseen(passes(call, inputs, dout)))

    def upstream():
        peers.cuda_only(dout, UPSTREAM)
        kernel = peers.module("generative_recommenders.ops.triton.triton_hstu_attention", UPSTREAM).triton_hstu_mha
        run = passes(lambda q, k, v: kernel(N=L, alpha=P**-0.5, q=q, k=k, v=v, seq_offsets=offsets), inputs, dout)
        return peers.Peer(run, peers.version(UPSTREAM))

    pairs = H * sum(n * (n + 1) // 2 for n in offsets.diff().tolist())
    tolerance = gradient_tolerance("hstu_attention", dtype) if train else TOLERANCE[dtype]
    return Work(
        run=passes(call, (*inputs, *tables), dout), oracle=oracle, tolerance=tolerance,
        bytes_moved=(2 if train else 1) * dtype.itemsize * total * H * P * 4, flops=(10 if train else 4) * pairs * P,
        exponentials=pairs, peers={UNBIASED: unbiased} if biased else {UPSTREAM: upstream},
    )  # fmt: skip


def hstu_cases(device, priority, shape, dtype):
    """Both directions, without tables and with them, which may take 1.3 times as long."""
    return [
        case("hstu", functools.partial(hstu, train=train, biased=biased), OPS[1:] if train else OPS[:1],
             "bwd" if train else "fwd", device, priority + 2 * biased + train, shape, dtype,
             note="tables" if biased else "", backends=("triton", "cpu"),
             targets={UNBIASED: 1 / 1.3} if biased else {UPSTREAM: 1.5} if device == "cuda" else {})
        for biased in (False, True)
        for train in (False, True)
    ]  # fmt: skip


_SPANS, _FP32, _BF16 = (1, 2, 4, 8), torch.float32, torch.bfloat16
DECODE = [
    decoding("cpu", 97, {"B": 1, "G": 8, "L": 4096, "P": 128}, _FP32, **{WHOLE: 1}),
    decoding("cpu", 98, {"B": 1, "G": 8, "L": 4096, "P": 128}, _FP32, "budgets", _SPANS,
             **{WHOLE: 1.5, SCALED: 1 / 1.3}),
    decoding("cpu", 99, {"B": 1, "G": 8, "R": 4, "L": 4096, "P": 128}, _BF16, "budgets", _SPANS,
             **{WHOLE: 1.5, SCALED: 1 / 1.3}),
    *(
        decoding("cpu", 103, {"B": 1, "G": 8, "L": L, "P": 128}, _BF16, f"int{bits}{'_groups' if group else ''}",
                 bits=bits, group=group, **({} if group else {FLOATS: 1.1}))
        for L in (4096, 32768) for bits, group in ((8, None), (4, None), (4, 32))
    ),
    *quantizing_cases("cpu", 104, _BF16),
    decoding("cuda", 55, {"B": 16, "G": 8, "R": 4, "L": 8192, "P": 128}, _BF16, "int8", bits=8, limit=0.7),
    decoding("cuda", 55, {"B": 16, "G": 8, "R": 4, "L": 8192, "P": 128}, _BF16, "int4", bits=4, limit=0.5),
    *quantizing_cases("cuda", 56, _BF16),
    *merging("cpu", 100, {"N": 4, "H": 8, "L": 1024, "P": 64}, _FP32),
    decoding("cuda", 50, {"B": 16, "G": 32, "L": 8192, "P": 128}, _BF16, "budgets", _SPANS, limit=0.8),
    decoding("cuda", 51, {"B": 16, "G": 8, "R": 4, "L": 8192, "P": 128}, _BF16, limit=0.8),
    decoding("cuda", 52, {"B": 1, "G": 8, "R": 4, "L": 65536, "P": 128}, _BF16, limit=0.8),
    *merging("cuda", 53, {"N": 4, "H": 32, "L": 8192, "P": 128}, _BF16),
]
HSTU = [
    *hstu_cases("cpu", 101, {"B": 4, "H": 4, "L": 2048, "P": 64}, _FP32),
    *hstu_cases("cuda", 54, {"B": 8, "H": 4, "L": 8192, "P": 128}, _BF16),
]
CASES = [*CPU, *CUDA, *DECODE, *HSTU]
