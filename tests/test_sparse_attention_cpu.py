"""The CPU kernels of sparse_attention, called natively, against a masked softmax in float64."""

import dataclasses

import pytest
import torch

from scalekern import _native, masks
from scalekern.testing import TOLERANCE

if (reason := _native.load("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)
NATIVE = torch.ops.scalekern_native


@dataclasses.dataclass
class Case:
    mask: masks.Mask
    shape: tuple = (1, 2, 2, 70, 70, 16, 16)  # B, Hq, Hkv, Lq, Lk, P, Pv
    dtype: torch.dtype = torch.float32
    block: tuple = (64, 64)
    planned: bool = True  # else the kernel looks at the mask itself, of at most 64 queries
    softcap: float = 0.0
    bias: tuple | None = None  # shape of its batch and heads
    bias_dtype: torch.dtype | None = None
    sinks: bool = False
    silu: bool = False
    layout: str = "plain"  # "bthd": heads beside channels; "scattered": no dimension is contiguous
    scale: float | None = None
    tolerance: float | None = None
    position: tuple | None = None  # shape of position_table
    time: tuple | None = None  # shape of time_table
    times: str = "sorted"  # how q_pos, k_pos, q_time and k_time lie: a key of PLACES


def ids(batch, length, step):
    return torch.arange(length).div(step, rounding_mode="floor").repeat(batch, 1) + torch.arange(batch)[:, None]


CAUSAL, WINDOW = masks.causal, masks.causal & masks.window(20, 0)
PER_HEAD = masks.per_head([CAUSAL, WINDOW, ~masks.window(5, 5), masks.everything])
CASES = {
    "full": Case(masks.everything, (2, 2, 1, 130, 67, 64, 64)),
    "causal_f64": Case(CAUSAL, (1, 2, 2, 129, 129, 17, 5), torch.float64, softcap=3.0, bias=(1, 2), sinks=True),
    "window_f16": Case(WINDOW, (1, 4, 2, 200, 200, 64, 128), torch.float16, layout="bthd", bias=(1, 1), softcap=2.0),
    "window_bf16": Case(masks.window(9, 40), (2, 2, 2, 100, 75, 40, 24), torch.bfloat16, bias=(2, 2), sinks=True),
    "bias_f32_of_f16": Case(CAUSAL, (2, 2, 1, 65, 33, 8, 8), torch.float16, bias=(1, 2), bias_dtype=torch.float32),
    "sink_tokens": Case(CAUSAL & (masks.window(16, 0) | masks.sink(4)), (1, 1, 1, 300, 300, 32, 32), block=(128, 64)),
    "splits_in_place": Case(  # tiles of keys that several splits see, one, none, and of that of one head alone
        masks.per_head([CAUSAL & masks.window(70, 0), masks.sink(3)]), (1, 2, 2, 1100, 1200, 32, 64)),
    "many_splits": Case(CAUSAL & masks.window(70, 0), (1, 2, 1, 1100, 1100, 16, 16), bias=(1, 1), sinks=True),
    "per_head": Case(PER_HEAD, (2, 4, 1, 77, 90, 3, 1), layout="scattered", bias=(1, 4), block=(16, 32)),
    "segments": Case(masks.segments(ids(2, 90, 13), ids(2, 70, 11)), (2, 2, 2, 90, 70, 16, 20), sinks=True),
    "blocks_t": Case(masks.blocks([1, 5, 14, 40, 100]).transpose(), (1, 2, 2, 100, 110, 256, 16), bias=(1, 2)),
    "prefix": Case(CAUSAL | masks.prefix([5, 33]), (2, 2, 2, 66, 66, 24, 256), softcap=10.0, layout="bthd"),
    "silu": Case(CAUSAL & masks.segments(ids(1, 150, 40)), (1, 2, 2, 150, 150, 25, 32), silu=True, bias=(1, 1)),
    "silu_f64": Case(~CAUSAL, (1, 2, 1, 31, 45, 9, 3), torch.float64, silu=True, softcap=1.5, layout="scattered"),
    "neighborhood": Case(masks.neighborhood((9, 11), (3, 5), (1, 2)), (1, 1, 1, 99, 99, 16, 16), sinks=True),
    "window2d": Case(masks.window2d((8, 12), (4, 4), (2, 2)), (3, 2, 2, 96, 96, 16, 16), bias=(1, 2), block=(32, 64)),
    "dilated_shift": Case((CAUSAL & masks.dilated(3)).shift(-7, 2), (1, 2, 2, 80, 80, 16, 16), bias=(1, 1)),
    # logits to 1e5, whose last digit is 1e-11
    "large_logits": Case(CAUSAL, (1, 1, 1, 40, 40, 16, 16), torch.float64, scale=1e4, tolerance=1e-10),
    "shared_bias": Case(masks.causal, (5, 2, 2, 60, 60, 16, 32), bias=(1, 2), layout="scattered"),
    "tables": Case(CAUSAL, (2, 4, 2, 150, 150, 16, 24), silu=True, position=(4, 401), time=(1, 40), layout="scattered"),
    "tables_clamped": Case(WINDOW, (1, 2, 2, 140, 130, 8, 8), sinks=True, position=(1, 21), time=(2, 9), softcap=2.0),
    "tables_packed": Case(
        CAUSAL & masks.segments(ids(1, 190, 45)), (1, 2, 1, 190, 190, 16, 16), torch.bfloat16, position=(1, 301),
        time=(2, 25), times="packed", block=(128, 64),
    ),
    "tables_f16": Case(masks.everything, (1, 2, 2, 70, 90, 8, 16), torch.float16, position=(2, 31), time=(1, 30)),
    "tables_f64": Case(
        ~CAUSAL, (1, 2, 1, 77, 90, 8, 3), torch.float64, softcap=1.5, position=(2, 51), time=(2, 60), times="random",
    ),
    "tables_random": Case(
        masks.everything, (3, 2, 2, 70, 100, 8, 8), silu=True, position=(1, 9), time=(1, 35), times="random"
    ),
    "tables_far": Case(
        CAUSAL, (1, 2, 2, 200, 200, 8, 8), softcap=3.0, silu=True, time=(2, 80), times="far", block=(16, 48)
    ),
    "tables_splits": Case(
        CAUSAL & masks.window(150, 0), (1, 4, 2, 900, 900, 8, 8), silu=True, position=(1, 999), time=(4, 30),
        bias=(1, 1),
    ),
    "tables_batch": Case(PER_HEAD, (5, 4, 1, 40, 50, 8, 8), sinks=True, position=(4, 1), time=(1, 1), times="random"),
    "one": Case(masks.everything, (2, 2, 2, 1, 1, 1, 1), sinks=True),
    "none": Case(~masks.everything, (1, 1, 1, 5, 9, 8, 8)),
}


def edges_of(count):
    """Rising integers with repeats: below 2 (all differences are past these), dense, then by factors, then 2^62."""
    first = [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 13]
    return torch.tensor((first + [min(int(15 * 1.35**i), 2**62) for i in range(200)])[:count], dtype=torch.int64)


def places(how, Lq, Lk, g):
    """q_pos, k_pos, q_time, k_time."""
    q, k = torch.arange(Lq), torch.arange(Lk)
    if how == "packed":
        return (q % 45).int(), (k % 45).int(), 10 * q + 900 * (q // 45) + 3, 10 * k + 900 * (k // 45)
    if how == "random":
        q_pos, k_pos = torch.randint(-20, 20, (Lq,), generator=g), torch.randint(-20, 20, (Lk,), generator=g)
        times = [torch.randint(-(10**4), 10**4, (n,), generator=g) for n in (Lq, Lk)]
        return q_pos.int(), k_pos.int(), *times
    # gaps of a few seconds and of days; "far": in nanoseconds, in any order half of the time
    step = torch.rand(max(Lq, Lk), generator=g).mul(12 if how == "sorted" else 40).exp().long()
    time = step.cumsum(0)
    if how == "far":
        time = torch.where(torch.arange(time.numel()) < 100, time, time[torch.randperm(time.numel(), generator=g)])
    return q.int() + 3, k.int(), time[:Lq] + 1, time[:Lk]


def scattered(x, layout):
    if layout == "bthd" and x.dim() == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "scattered":
        wide = torch.full([2 * n for n in x.shape], torch.nan, dtype=x.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
        return view.copy_(x)
    return x


def scattered_vector(x, layout):
    return x.repeat_interleave(3)[::3] if layout == "scattered" and x is not None else x


def inputs(case, seed=0):
    B, Hq, Hkv, Lq, Lk, P, Pv = case.shape
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def randn(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    t = {"q": randn(B, Hq, Lq, P), "k": randn(B, Hkv, Lk, P), "v": randn(B, Hkv, Lk, Pv), "bias": None, "sinks": None}
    if case.bias:
        t["bias"] = randn(*case.bias, Lq, Lk, dtype=case.bias_dtype or case.dtype)
    if case.sinks:
        t["sinks"] = randn(Hq, dtype=wide)
    t["position"] = randn(*case.position, dtype=wide) if case.position else None
    t["time"] = randn(*case.time, dtype=wide) if case.time else None
    grads = {"dout": randn(B, Hq, Lq, Pv), "dlse": None if case.silu else randn(B, Hq, Lq, dtype=wide)}
    return t, grads


def vectors(case):
    found = places(case.times, *case.shape[3:5], torch.Generator().manual_seed(5))
    return *found, edges_of(case.time[1] - 1) if case.time else None


def options(case):
    scale = case.shape[5] ** -0.5 if case.scale is None else case.scale
    return scale, case.softcap, case.silu, 0.25 if case.silu else 1.0


def oracle(case, t, grads):
    """Outputs and gradients in float64 by autograd."""
    scale, softcap, silu, norm = options(case)
    leaves = {n: x.double().clone().requires_grad_() for n, x in t.items() if x is not None}
    B, Hq, Hkv, Lq, Lk, _, _ = case.shape
    allowed = case.mask.to_dense(Lq, Lk, B, Hq).expand(B, Hq, Lq, Lk)
    k, v = (leaves[n].repeat_interleave(Hq // Hkv, 1) for n in "kv")
    s = scale * leaves["q"] @ k.mT
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if "bias" in leaves:
        s = s + leaves["bias"]
    q_pos, k_pos, q_time, k_time, edges = vectors(case)
    if case.position:
        R = (case.position[1] - 1) // 2
        s = s + leaves["position"][:, (k_pos - q_pos[:, None]).clamp(-R, R) + R]
    if case.time:
        apart = (q_time[:, None] - k_time).abs().clamp(min=1)
        s = s + leaves["time"][:, (edges <= apart[..., None]).sum(-1)]
    if silu:
        out, lse = torch.where(allowed, torch.nn.functional.silu(s) * norm, 0) @ v, torch.zeros(B, Hq, Lq).double()
    else:
        empty = ~allowed.any(-1) & ("sinks" not in leaves)
        s = torch.where(allowed | empty[..., None], s, -torch.inf)
        if "sinks" in leaves:
            s = torch.cat([s, leaves["sinks"][:, None, None].expand(B, Hq, Lq, 1)], -1)
        lse = s.logsumexp(-1)
        out = torch.where(allowed, (s[..., :Lk] - lse[..., None]).exp(), 0) @ v
        lse = torch.where(empty, -torch.inf, lse)
    if grads is None:
        return out, lse, None
    loss = (out * grads["dout"].double()).sum()
    if grads["dlse"] is not None:
        loss = loss + torch.where(lse.isfinite(), lse * grads["dlse"], 0).sum()
    names = list(leaves)
    found = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), dict(zip(names, found))


def native(case, t, grads):
    B, Hq, _, Lq, Lk, _, Pv = case.shape
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    t = {n: None if x is None else scattered(x, case.layout) for n, x in t.items()}
    plan, scale_to_norm = case.mask.plan(Lq, Lk, block=case.block), options(case)
    lists = (plan.ptr, plan.runs) if case.planned else (None, None)
    common = (t["q"], t["k"], t["v"], case.mask.code("cpu"), *lists, *case.block, t["bias"], t["sinks"])
    q_pos, k_pos, q_time, k_time, edges = (scattered_vector(x, case.layout) for x in vectors(case))
    common += (t["position"], q_pos, k_pos) if case.position else (None,) * 3
    common += (t["time"], q_time, k_time, edges) if case.time else (None,) * 4

    def fresh(shape, dtype):
        return scattered(torch.full(shape, torch.nan, dtype=dtype), case.layout)

    out, lse = fresh((B, Hq, Lq, Pv), case.dtype), fresh((B, Hq, Lq), wide)
    NATIVE.sparse_attention_fwd_cpu(out, lse, *common, *scale_to_norm)
    if grads is None:
        return out, lse, None
    grads = {n: None if x is None else scattered(x, case.layout) for n, x in grads.items()}
    found = {n: fresh(x.shape, x.dtype if n in "qkv" else wide) for n, x in t.items() if x is not None}
    NATIVE.sparse_attention_bwd_cpu(
        found["q"], found["k"], found["v"], *map(found.get, ("bias", "sinks", "position", "time")), grads["dout"],
        grads["dlse"], out, lse, *common, *scale_to_norm,
    )  # fmt: skip
    return out, lse, found


def close(actual, expected, tolerance, what):
    expected = expected.double()
    torch.testing.assert_close(actual.isfinite(), expected.isfinite(), msg=f"{what}: finite where it should be")
    actual, expected = actual.double().nan_to_num(neginf=0), expected.nan_to_num(neginf=0)
    error = ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def check(case, actual, expected):
    tolerance = case.tolerance or TOLERANCE[case.dtype]
    close(actual[0], expected[0], tolerance, "out")
    close(actual[1], expected[1], min(tolerance, 1e-5), "lse")  # is not rounded to half types
    for name, gradient in expected[2].items():
        close(actual[2][name], gradient, tolerance, f"d{name}")


@pytest.mark.parametrize("name", CASES)
def test_matches_a_masked_softmax(name):
    case = CASES[name]
    t, grads = inputs(case)
    check(case, native(case, t, grads), oracle(case, t, grads))


@pytest.mark.parametrize("name", ["causal_f64", "per_head", "window_f16", "many_splits", "silu"])
def test_what_no_query_sees_reaches_nothing(name):
    """NaN and Inf in keys and values that nobody sees, some in tiles that are visited; their gradients are zero."""
    case = dataclasses.replace(CASES[name])
    B, Hq, Hkv, Lq, Lk, P, Pv = case.shape
    hidden = torch.arange(Lk) % 7 == 3
    case.mask = case.mask & ~masks.dense(hidden[None, None, None, :].expand(1, 1, Lq, Lk).contiguous())
    t, grads = inputs(case)
    expected = oracle(case, t, grads)
    t["k"][:, :, hidden] = torch.nan
    t["v"][:, :, hidden] = torch.inf
    actual = native(case, t, grads)
    check(case, actual, expected)
    assert actual[2]["k"][:, :, hidden].eq(0).all() and actual[2]["v"][:, :, hidden].eq(0).all()


def test_a_nan_reaches_those_who_see_it_and_nobody_else():
    case = Case(masks.causal, (1, 1, 1, 40, 40, 16, 16))
    t, grads = inputs(case)
    clean = native(case, t, grads)
    for name in ("k", "v"):
        spoiled = {n: None if x is None else x.clone() for n, x in t.items()}
        spoiled[name][..., 25, 3] = torch.nan
        out, lse, found = native(case, spoiled, grads)
        assert out[..., 25:, 3].isnan().all() and torch.equal(out[..., :25, :], clean[0][..., :25, :]), name
        assert found["q"][..., 25:, :].isnan().any(-1).all(), name
        assert torch.equal(found["q"][..., :25, :], clean[2]["q"][..., :25, :]), name
    t["q"][..., 30, 2] = torch.inf
    out, lse, found = native(case, t, grads)
    assert lse[..., 30].isnan().all() or not lse[..., 30].isfinite().any()
    assert found["k"][..., 31:, :].isfinite().all() and found["v"][..., 31:, :].isfinite().all()
    assert found["k"][..., :31, :].isnan().any(-1).all()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F8001FF, -1], ids=hex)
@pytest.mark.parametrize("name", ["q", "k", "bias"])
def test_a_nan_of_any_payload_stays_one(name, bits):
    """Exponents are put together from integers, where the lower bits of a NaN could make it a number again."""
    case = Case(masks.window(9, 40), (1, 1, 1, 45, 75, 16, 8), bias=(1, 1))
    t, grads = inputs(case)
    found = []
    for spoil in (torch.nan, torch.tensor(bits, dtype=torch.int32).view(torch.float32)):
        t[name][..., 20, 15] = spoil
        found.append(native(case, t, grads))
    for nan, payload in zip(found[0][:2], found[1][:2]):
        assert nan.isnan().any() and torch.equal(nan.isnan(), payload.isnan())
    for n, nan in found[0][2].items():
        assert nan.isnan().any() and torch.equal(nan.isnan(), found[1][2][n].isnan()), n


REPEATED = ["many_splits", "splits_in_place", "full", "window_bf16", "shared_bias"]
REPEATED += ["tables", "tables_packed", "tables_splits", "tables_batch"]


def check_same_bits(case):
    """Twice, and with any number of threads."""
    t, grads = inputs(case)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (2, 1, 2, 3):
            torch.set_num_threads(n)
            out, lse, found = native(case, t, grads)
            results.append([out, lse, *found.values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", REPEATED)
def test_repeats_bit_for_bit_with_any_number_of_threads(name):
    check_same_bits(CASES[name])


@pytest.mark.parametrize("block", [(16, 16), (48, 80), (128, 128), (256, 32)])
def test_any_block_of_the_plan(block):
    case = dataclasses.replace(CASES["sink_tokens"], block=block)
    t, grads = inputs(case)
    check(case, native(case, t, grads), oracle(case, t, grads))


def random_mask(g, depth, Lq, Lk, batch, heads):
    pick = int(torch.randint(14 if depth == 0 else 20, (), generator=g))

    def n(low, high):
        return int(torch.randint(low, high, (), generator=g))

    leaves = [
        lambda: masks.causal,
        lambda: masks.everything,
        lambda: masks.window(n(-1, 90), n(-1, 90)),
        lambda: masks.window(n(0, 20), n(0, 20)),
        lambda: masks.sink(n(1, 70)),
        lambda: masks.prefix([n(0, Lk + 5) for _ in range(batch)]),
        lambda: masks.blocks(sorted({n(1, Lq + 20) for _ in range(5)})),
        lambda: masks.segments(
            torch.randint(-1, 4, (batch, Lq), generator=g), torch.randint(-1, 4, (batch, Lk), generator=g)
        ),
        lambda: masks.dilated(n(1, 75)),
        lambda: masks.window2d((9, 13), (3, n(1, 6)), (n(0, 3), 0)),
        lambda: masks.neighborhood((9, 13), (n(1, 8), n(1, 14)), (n(1, 4), n(1, 4))),
        lambda: masks.dense(torch.rand(batch, heads, Lq, Lk, generator=g) < 0.5),
        lambda: masks.tiles([(n(0, 5), n(0, 5)) for _ in range(6)], (24, n(3, 40))),
        lambda: masks.rows(torch.rand(batch, Lq, generator=g) < 0.5),
    ]
    if pick < 14:
        return leaves[pick]()
    a = random_mask(g, depth - 1, Lq, Lk, batch, heads)
    if pick == 14:
        return ~a
    if pick == 15:
        return a.transpose()
    if pick == 16:
        return a.shift(n(-80, 80), n(-80, 80))
    b = random_mask(g, depth - 1, Lq, Lk, batch, heads)
    return a & b if pick < 19 else a | b


def test_programs_of_random_masks():
    """Every leaf, every operation: the evaluator of the kernels against to_dense."""
    g = torch.Generator().manual_seed(3)
    for trial in range(100):
        Lq, Lk = ((1, 17), (128, 128), (70, 129), (150, 63))[trial % 4]
        mask = random_mask(g, trial % 4 + (trial > 40), Lq, Lk, 2, 2)
        bits = torch.zeros(2, 2, Lq, Lk, dtype=torch.bool)
        NATIVE.mask_bits_cpu(bits, mask.code("cpu"))
        assert torch.equal(bits, mask.to_dense(Lq, Lk, 2, 2).expand_as(bits)), mask
