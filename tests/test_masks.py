"""The mask algebra: dense, code and plans agree with plain predicates, on random expressions and on known masks."""

import copy
import dataclasses
import gc
import itertools
import math
import pickle
import random
import struct
import subprocess
import sys
import weakref
import zlib

import mask_cases
import pytest
import torch
from conftest import INTERPRET, child_environment

from scalekern import masks
from scalekern.masks import _bounds, _code, _count, _draw, _plan
from scalekern.__main__ import main
from scalekern.masks import causal, everything, segments, sink, window

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, and masks run none")
SIZES = (1, 17, 127, 128, 129, 300)
EMPTY, PARTIAL, FULL = _draw.EMPTY, _draw.PARTIAL, _draw.FULL


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Thousands of small ops: a second thread costs five times their time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiles_of(dense, block):
    """The verdict on every tile from the dense mask, (B, H, query tiles, key tiles)."""
    B, H, *lengths = dense.shape
    n = [-(-size // b) for size, b in zip(lengths, block)]
    pad = (0, n[1] * block[1] - lengths[1], 0, n[0] * block[0] - lengths[0])
    cells = [torch.nn.functional.pad(dense, pad, value=v).view(B, H, n[0], block[0], n[1], block[1]) for v in (0, 1)]
    some, every = cells[0].any(5).any(3), cells[1].all(5).all(3)
    return torch.where(every, FULL, torch.where(some, PARTIAL, EMPTY)).to(torch.uint8)


def unrolled(ptr, runs, shape):
    """Verdicts from a list; also that runs rise, do not touch one another with the same kind, and stay inside."""
    assert ptr.dtype == runs.dtype == torch.int32 and ptr[0] == 0 and ptr[-1] == len(runs) and (ptr.diff() >= 0).all()
    row = torch.arange(len(ptr) - 1).repeat_interleave(ptr.diff().long())
    start, count, kind = runs.long().T
    end = start + count
    assert (count > 0).all() and (start >= 0).all() and (end <= shape[-1]).all() and ((kind == 0) | (kind == 1)).all()
    gap = start[1:] - end[:-1]
    assert ((row[1:] > row[:-1]) | (gap > 0) | ((gap == 0) & (kind[1:] != kind[:-1]))).all()
    cells = torch.zeros(math.prod(shape[:-1]), shape[-1], dtype=torch.uint8)
    for i, a, b, what in zip(row.tolist(), start.tolist(), end.tolist(), kind.tolist()):
        cells[i, a:b] = PARTIAL if what else FULL
    return cells.view(shape)


def check_plan(mask, dense, block):
    plan, expected = masks.plan_of(mask.code().clone(), *dense.shape[2:], block), tiles_of(dense, block)
    assert (plan.batches, plan.heads) == dense.shape[:2] and plan.block == block
    assert torch.equal(unrolled(plan.ptr, plan.runs, expected.shape), expected), (mask, block)
    turned = expected.transpose(2, 3)
    assert torch.equal(unrolled(plan.col_ptr, plan.col_runs, turned.shape), turned), (mask, block)
    assert plan.tiles == (int((expected == FULL).sum()), int((expected == PARTIAL).sum()), expected.numel())


def check_code(mask, dense):
    programs, batches = _code.read(mask.code())
    assert (batches, len(programs)) == dense.shape[:2]
    q, k = torch.arange(dense.shape[2]).view(-1, 1), torch.arange(dense.shape[3])
    for h, program in enumerate(programs):
        found = program(q, k, torch.arange(batches).view(-1, 1, 1), torch.tensor(h))
        assert torch.equal(found.expand(batches, *dense.shape[2:]), dense[:, h]), mask


def check_predicate(mask, predicate, dense, r, points):
    everywhere = itertools.product(*map(range, dense.shape))
    sample = ([r.randrange(n) for n in dense.shape] for _ in range(points))
    for b, h, q, k in everywhere if dense.numel() <= points else sample:
        assert bool(dense[b, h, q, k]) == bool(predicate(b, h, q, k)), (mask, b, h, q, k)


@pytest.mark.parametrize("kind", sorted(mask_cases.LEAVES))
def test_leaves(kind):
    r = random.Random(kind)
    for _ in range(3):
        mask, predicate = mask_cases.leaf(r, kind)
        check_predicate(mask, predicate, mask.to_dense(17, 14), r, 1500)
        shifted = mask.shift(r.randint(-9, 9), r.randint(-9, 9)).transpose()
        for m in (mask, shifted):
            dense = m.to_dense(150, 131)
            check_code(m, dense)
            check_plan(m, dense, (32, 16))
        check_predicate(mask, predicate, mask.to_dense(150, 131), r, 1000)


@pytest.mark.parametrize("seed", range(48))
def test_expressions(seed):
    r = random.Random(seed)
    mask, predicate = mask_cases.expression(r, 1 + seed % 4)
    lengths = SIZES[seed % 6], SIZES[(seed // 6 + seed) % 6]
    dense = mask.to_dense(*lengths)
    assert dense.shape == (mask.batches, mask.heads, *lengths)
    check_predicate(mask, predicate, dense, r, 600)
    check_code(mask, dense)
    for block in ((128, 128), r.choice([(16, 32), (64, 64), (13, 7)])):
        check_plan(mask, dense, block)
    assert torch.equal(mask.empty_rows(*lengths), ~dense.any(3))
    assert mask.density(*lengths) == pytest.approx(dense.double().mean().item(), abs=1e-12)
    q0, k0 = (r.randrange(n) for n in lengths)
    q1, k1 = (r.randint(a + 1, n) for a, n in zip((q0, k0), lengths))
    part = dense[:, :, q0:q1, k0:k1]
    assert mask.tile(q0, q1, k0, k1) == ("full" if part.all() else "partial" if part.any() else "empty")
    b, h = mask.batches - 1, mask.heads - 1
    seen = [k for start, end in mask.row(q0, lengths[1], b, h) for k in range(start, end)]
    assert seen == dense[b, h, q0].nonzero().flatten().tolist()
    if "torch." not in repr(mask):
        assert masks.parse(repr(mask)) == mask


@pytest.mark.parametrize("seed", range(16))
def test_expressions_of_congruences(seed):
    """Whose leaves are undecided in nearly every tile: steps that exclude each other, shifted, and on images."""
    r = random.Random(100 + seed)
    kinds = ["dilated", "dilated", "dilated", ["window2d", "causal", "window", "neighborhood"][seed % 4]]
    mask, predicate = mask_cases.expression(r, 2 + seed % 4, kinds)
    lengths = SIZES[2 + seed % 4], r.choice(SIZES[1:])
    dense = mask.to_dense(*lengths)
    check_predicate(mask, predicate, dense, r, 300)
    check_code(mask, dense)
    for block in ((16, 32), (13, 7), (1, 2)) if dense.numel() < 10**5 else ((64, 32), (13, 7)):
        check_plan(mask, dense, block)
    assert mask.density(*lengths) == pytest.approx(dense.double().mean().item(), abs=1e-12)
    assert torch.equal(mask.empty_rows(*lengths), ~dense.any(3))


def test_coarse_tables_and_small_chunks_change_nothing(monkeypatch):
    for name in ("_EXACT_TABLE", "_EXACT_BITS"):
        monkeypatch.setattr(_bounds, name, 0)
    monkeypatch.setattr(_plan, "_CHUNK", 5)
    monkeypatch.setattr(_plan, "_PAIRS", 1000)
    r = random.Random(7)
    for kind in ("segments", "dense", "rows", "neighborhood", "tiles", "window2d"):
        mask, _ = mask_cases.leaf(r, kind)
        for m in (mask, (causal | ~mask).shift(3, 0)):
            check_plan(m, m.to_dense(150, 131), (32, 16))


def test_heads_and_batches():
    mask = masks.per_head([causal, window(5, 0), causal, segments([[0, 0, 1], [2, 2, 2]])])
    code = mask.code()
    assert code.dtype == torch.int32 and code.dim() == 1 and code[:2].tolist() == [4, 2]
    offsets = code[2:6].tolist()
    assert offsets[0] == offsets[2] and len(set(offsets)) == 3
    assert len({int(code[o + 1]) for o in offsets}) == 3
    twins = masks.per_head([window(1, 0), window(2, 0)]).code()  # one structure with two sets of numbers
    assert twins[2] != twins[3] and int(twins[twins[2] + 1]) == int(twins[twins[3] + 1])
    dense = mask.to_dense(3, 3, batch=2, heads=4)
    assert torch.equal(dense[1, 3], torch.ones(3, 3, dtype=torch.bool)) and not dense[0, 3, 0, 2]
    assert causal.to_dense(2, 3, batch=5, heads=7).shape == (5, 7, 2, 3)
    nested = masks.per_head([causal, masks.per_head([everything, sink(1)]).transpose()])
    assert torch.equal(nested.to_dense(4, 4)[0, 1], sink(1).transpose().to_dense(4, 4)[0, 0])
    tables = masks.dense(torch.rand(2, 4, 50, 60) > 0.5)
    check_code(tables & mask, (tables & mask).to_dense(50, 60))
    with pytest.raises(ValueError, match="batch must be 2, as many as the mask tells apart, got 3"):
        mask.to_dense(3, 3, batch=3)


def test_identities():
    shapes = (70, 45)
    m = causal & (window(20, 0) | sink(4))
    dense = m.to_dense(*shapes)
    assert torch.equal(m.transpose().to_dense(*shapes[::-1]), dense.transpose(2, 3))
    assert torch.equal(m.transpose().transpose().to_dense(*shapes), dense)
    assert torch.equal(m.shift(3, 2).to_dense(60, 40), dense[:, :, 3:63, 2:42])
    assert torch.equal(m.shift(3, 2).transpose().to_dense(40, 60), m.transpose().shift(2, 3).to_dense(40, 60))
    assert torch.equal((~(m & ~causal)).to_dense(*shapes), (~m | causal).to_dense(*shapes))
    assert torch.equal(causal.to_dense(*shapes), window(-1, 0).to_dense(*shapes))
    assert torch.equal(causal.shift(-25, 0).to_dense(*shapes)[0, 0], torch.ones(shapes).tril(-25).bool())
    padding = masks.rows([True, False, True])
    assert torch.equal(padding.transpose().to_dense(2, 3)[0, 0], torch.tensor([[True, False, True]] * 2))


def test_window2d_is_the_mask_of_swin():
    H, W, n, s = 12, 8, 4, 2
    image = torch.zeros(H, W, dtype=torch.long)  # regions, numbered as Swin does before it partitions
    for i, rows in enumerate((slice(0, -n), slice(-n, -s), slice(-s, None))):
        for j, columns in enumerate((slice(0, -n), slice(-n, -s), slice(-s, None))):
            image[rows, columns] = 3 * i + j
    windows = lambda t: t.view(H // n, n, W // n, n).transpose(1, 2).reshape(-1, n * n)
    position = windows(torch.arange(H * W).view(H, W).roll((-s, -s), (0, 1)))
    expected = torch.zeros(H * W, H * W, dtype=torch.bool)
    for pixels, regions in zip(position, windows(image)):
        expected[pixels.view(-1, 1), pixels] = regions.view(-1, 1) == regions
    mask = masks.window2d((H, W), n, s)
    assert torch.equal(mask.to_dense(H * W, H * W)[0, 0], expected)
    check_plan(mask, expected[None, None], (32, 32))
    assert mask.density(H * W, H * W) < masks.window2d((H, W), n).density(H * W, H * W) == n * n / (H * W)


def test_neighborhood_has_exactly_its_kernel():
    dense = masks.neighborhood((7, 9), (3, 5)).to_dense(63, 63)[0, 0]
    assert (dense.sum(1) == 15).all() and dense.diagonal().all()
    line = masks.neighborhood(12, 3, 2).to_dense(12, 12)[0, 0]
    assert line[0].nonzero().flatten().tolist() == [0, 2, 4] and line[11].nonzero().flatten().tolist() == [7, 9, 11]
    assert line[5].nonzero().flatten().tolist() == [3, 5, 7]


def test_masks_are_values():
    make = lambda: causal & segments(torch.tensor([[0, 0, 1], [1, 1, 1]])) | ~masks.dense(torch.eye(3) > 0).shift(1, 0)
    a, b = make(), make()
    assert a == b and hash(a) == hash(b) and {a: 1}[b] == 1 and a != (a & causal) and a != 3
    assert a != (causal & segments([[0, 0, 1], [1, 1, 0]]) | ~masks.dense(torch.eye(3) > 0).shift(1, 0))
    plan = a.plan(30, 20, 16)
    assert a.plan(30, 20, (16, 16)) is plan and a.code("cpu") is a.code() and a.plan(30, 20) is not plan
    for twin in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert twin == a and torch.equal(twin.code(), a.code())
    with pytest.raises(dataclasses.FrozenInstanceError):
        sink(3).n = 4
    ids = torch.tensor([0, 0, 1])
    mask = segments(ids)
    ids[:] = 0
    assert not mask.to_dense(3, 3)[0, 0, 0, 2]  # a copy was taken
    with pytest.raises(TypeError, match="not with and, or, not"):
        causal and sink(3)
    with pytest.raises(TypeError):
        causal & torch.ones(3, 3)
    assert repr(causal & (window(256, 0) | sink(4))) == "causal & (window(256, 0) | sink(4))"
    assert repr(~(causal | sink(1)).shift(1, 0).transpose()) == "~(causal | sink(1)).shift(1, 0).transpose()"


@pytest.mark.parametrize("seed", range(20))
def test_a_shift_adds_to_the_code(seed):
    """A mask's code is lowered with its first shift, and added to for the next ones, of heads, turns and tables too."""
    mask, _ = mask_cases.expression(random.Random(seed), seed % 4)
    for dq, dk in ((3, -7), (0, 5), (-20, 0)):
        shifted = mask.shift(dq, dk)
        assert torch.equal(shifted.code(), _code.lower(mask.shift(dq, dk)))
        assert (shifted.heads, shifted.batches) == (mask.heads, mask.batches)


def test_shifts_have_a_limit():
    far = causal.transpose().shift(2**29, -(2**29)) & window(3, 0).shift(0, 2**29)
    for dq, dk in ((1, 0), (0, 1), (0, -1), (0, 1)):  # each from the code of far but the first, which is lowered whole
        with pytest.raises(ValueError, match="shift: shifts must sum up to at most 2\\^29"):
            far.shift(dq, dk).code()
    assert torch.equal(far.shift(-1, 0).code(), _code.lower(far.shift(-1, 0)))


def test_plans_are_kept_with_their_code_alone():
    code = causal.code().clone()
    plan = masks.plan_of(code, 10, 10)
    assert masks.plan_of(code, 10, 10, 128) is plan
    for n in range(1, _plan._PLANS + 1):
        masks.plan_of(code, n, 1)
    assert masks.plan_of(code, 10, 10) is not plan and len(_plan._plans[code]) == _plan._PLANS
    gone = weakref.ref(masks.plan_of(code, 10, 10))
    del code
    gc.collect()
    assert gone() is None


def test_no_length_is_no_tile():
    for lengths in ((0, 5), (5, 0), (0, 0)):
        plan = causal.plan(*lengths)
        assert plan.tiles == (0, 0, 0) and not plan.runs.numel() and causal.density(*lengths) == 0.0
        assert len(plan.ptr) == 1 + (lengths[0] > 0) and len(plan.col_ptr) == 1 + (lengths[1] > 0)
        assert causal.to_dense(*lengths).shape == (1, 1, *lengths)
        assert causal.empty_rows(*lengths).tolist() == [[[True] * lengths[0]]]


def test_waste():
    assert causal.waste(256, 256, 128) == pytest.approx(3 * 128 * 128 / (256 * 257 / 2))
    assert masks.tiles([(0, 1), (1, 0)], 32).waste(64, 64, 32) == 1.0 and (~everything).waste(5, 5) == 1.0


def test_empty_rows_attend_all():
    mask = masks.per_head([window(3, 0).shift(-10, 0), sink(2) & segments([[0] * 9 + [-1] * 91, [0] * 100])])
    full, before = mask.attending_all_if_empty(100, 80).to_dense(100, 80), mask.to_dense(100, 80)
    empty = ~before.any(3)
    assert empty.any() and full[empty].all() and torch.equal(full[~empty], before[~empty])
    assert causal.attending_all_if_empty(9, 9) is causal


PLANNER = """
import resource, time, torch
from scalekern.masks import *
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
masks, N, before = [causal & (window(256, 0) | sink(4)), causal, window(256, 0)], 262144, peak()
begin = time.process_time()
plans = [m.plan(N, N, block) for m in masks for block in ((128, 128), (64, 64))]
print(time.process_time() - begin, peak() - before, *(plan.tiles[0] for plan in plans))
"""


def test_long_masks_are_planned_at_once():
    text = subprocess.run(
        [sys.executable, "-c", PLANNER], env=child_environment(), capture_output=True, check=True
    ).stdout
    seconds, mebibytes, *full = map(float, text.split())
    # Six plans took 0.2 s and 45 MiB; a quarter of a byte for each pair would be 16 GiB.
    assert seconds < 2 and mebibytes < 200
    n = 2048
    assert full == [n - 1, 3 * 2 * n - 6, n * (n - 1) / 2, n * (2 * n - 1), n - 1, 3 * 2 * n - 6]


COUNTER = """
import resource, time, torch
from scalekern.masks import *
torch.set_num_threads(1)
N = 262144
cu = [0, 1000, 1001, 70000, 200003, N]
spans = [b - a for a, b in zip(cu, cu[1:])]
cases = [
    (causal, N * (N + 1) // 2),
    (window(256, 0), sum(min(i, 256) + 1 for i in range(N))),
    (causal & (window(256, 0) | sink(4)), sum(min(i, 256) + 1 + min(max(i - 256, 0), 4) for i in range(N))),
    (prefix(1000) | causal, sum(max(i + 1, 1000) for i in range(N))),
    (causal & segments(cu_seqlens=cu), sum(s * (s + 1) // 2 for s in spans)),
]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before, begin = peak(), time.process_time()
for m, pairs in cases:
    assert round(m.density(N, N) * N * N) == pairs, m
    assert m.waste(N, N) >= 1 and not m.empty_rows(N, N).any()
print(time.process_time() - begin, peak() - before)
"""


def test_long_masks_are_counted_at_once():
    text = subprocess.run(
        [sys.executable, "-c", COUNTER], env=child_environment(), capture_output=True, check=True, text=True
    ).stdout
    seconds, mebibytes = map(float, text.split())
    # 0.8 s and 70 MiB; pair by pair it took 13 s for one of them.
    assert seconds < 4 and mebibytes < 200


@pytest.mark.parametrize("seed", range(24))
def test_neighborhoods_are_counted_by_rows(seed, monkeypatch):
    """Beside leaves that change at few places of a row, and in masks with leaves that do not, where tiles are asked."""
    asked, counts = [], _count.counts
    monkeypatch.setattr(_count, "counts", lambda *args: asked.append(counts(*args) is not None) or counts(*args))
    r = random.Random(200 + seed)
    near = masks.neighborhood((r.randint(1, 9), r.randint(1, 9)), (r.randint(1, 7), r.randint(1, 12)), r.randint(1, 3))
    near = near.shift(r.randint(-5, 5), r.randint(-5, 5))
    for other in (causal, window(3, None), sink(7).shift(1, 2), masks.prefix([0, 30]), masks.blocks([4, 9, 70]),
                  masks.rows([[True, False] * 20]), masks.neighborhood((7, 8), 3), ~window(None, 5).transpose(),
                  masks.dilated(3), near.transpose()):  # fmt: skip
        for mask in (near & other, ~near & other, masks.per_head([near, ~other | near.shift(1, 1)])):
            lengths = r.choice([1, 40, 81]), r.choice([1, 7, 40, 81])
            dense = mask.to_dense(*lengths)
            assert mask.density(*lengths) == pytest.approx(dense.double().mean().item(), abs=1e-12), mask
            assert torch.equal(mask.empty_rows(*lengths), ~dense.any(3)), mask
    assert sum(asked) == 48 and len(asked) == 60


def test_a_neighborhood_of_a_large_image_is_counted_without_a_plan(monkeypatch):
    monkeypatch.setattr(_plan, "_build", None)
    N = 512 * 512
    assert round(masks.neighborhood((512, 512), 7).density(N, N) * N * N) == 49 * N


CONTRADICTIONS = {
    "dilated & shifted": (masks.dilated(4) & masks.dilated(4).shift(1, 0), EMPTY),
    "another's residue": (masks.dilated(6) & masks.dilated(4).shift(3, 0).transpose(), EMPTY),
    "all residues": (masks.dilated(2) | masks.dilated(2).shift(0, 1), FULL),
    "itself and not": (masks.dilated(3) & ~masks.dilated(3), EMPTY),
    "two steps": (masks.dilated(2) & masks.dilated(3), PARTIAL),
    "on a window": (window(9, 9) & masks.window2d((64, 64), 4) & masks.dilated(2) & masks.dilated(4).shift(1, 0), EMPTY),
}


@pytest.mark.parametrize("mask, verdict", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_cost_no_pairs(mask, verdict, monkeypatch):
    """What no leaf tells alone: congruences that exclude each other, or leave nothing out."""
    looked, evaluate = [], _plan.evaluate
    monkeypatch.setattr(_plan, "evaluate", lambda *args: looked.append(args[2].shape[1]) or evaluate(*args))
    plan = masks.plan_of(mask.code().clone(), 4096, 4096, (64, 64))
    assert sum(looked) < 400  # tiles, of 4,096
    full, partial, every = plan.tiles
    assert {EMPTY: full == partial == 0, FULL: full == every, PARTIAL: partial == every}[verdict]
    dense = mask.to_dense(300, 257)
    check_plan(mask, dense, (32, 16))
    check_code(mask, dense)


# ---- text and pictures ----


@pytest.mark.parametrize(
    "text, mask",
    [
        ("causal & (window(256, 0) | sink(4))", causal & (window(256, 0) | sink(4))),
        ("~causal.shift(-1, dk=2).transpose()", ~causal.shift(-1, 2).transpose()),
        ("per_head([causal, window(left=None, right=-1)])", masks.per_head([causal, window(-1, -1)])),
        ("tiles([(0, 1), (2, 2)], (8, 16)) | dense([[True, False]])", None),
        ("segments(cu_seqlens=[0, 2, 5])", segments([0, 0, 1, 1, 1])),
    ],
)
def test_parse(text, mask):
    parsed = masks.parse(text)
    assert masks.parse(repr(parsed)) == parsed and mask in (None, parsed)


@pytest.mark.parametrize(
    "text, message",
    [
        ("causal &", "text must be a mask expression, got 'causal &'"),
        ("window", "got 'window', which needs arguments"),
        ("full", "name must be one of blocks, causal"),
        ("__import__('os')", "name must be one of"),
        ("causal.__class__", "text must be made of masks"),
        ("causal.to_dense(3, 3)", "text must be made of masks"),
        ("(lambda: causal)()", "text must be made of masks"),
        ("causal + sink(1)", "text must be made of masks"),
        ("causal & 3", "operand must be a mask, got 'causal & 3'"),
        ("sink(2 ** 9)", "text must be made of masks"),
        ("sink(*[1])", "text must be made of masks"),
        ("sink(-1)", "sink: n must be an integer from 0"),
        ("(" * 9000 + "causal" + ")" * 9000, "text must be a mask expression"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(").replace("*", r"\*")):
        masks.parse(text)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: window(-2, 0), ValueError, "window: left must be an integer from -1 .*, got -2"),
        (lambda: window(0, 1.5), TypeError, "window: right must be an integer.*, got float"),
        (lambda: masks.prefix([3, -1]), ValueError, "prefix: lengths must be an integer from 0 .*, got -1"),
        (lambda: masks.blocks([4, 4]), ValueError, r"blocks: ends must be rising .*, got \[4, 4\]"),
        (lambda: masks.blocks("ab"), TypeError, "blocks: ends must be a tensor or lists of integers, got a str"),
        (lambda: segments(), ValueError, "segments: expected one of ids and cu_seqlens"),
        (lambda: segments(torch.rand(3)), TypeError, "segments: ids must be made of integers, got float32"),
        (lambda: segments([[0], [1]], [[0]] * 3), ValueError, "kv_ids must have 1 or 2 batches like ids, got 3"),
        (lambda: segments(cu_seqlens=[1, 2]), ValueError, r"cu_seqlens must rise from 0, got \[1, 2\]"),
        (lambda: masks.dilated(0), ValueError, "dilated: step must be an integer from 1"),
        (lambda: masks.window2d(4, 2), TypeError, "window2d: hw must be a pair of integers, got 4"),
        (lambda: masks.neighborhood((4, 4), 0), ValueError, "neighborhood: kernel must be an integer from 1"),
        (lambda: masks.dense(torch.ones(3, 3)), TypeError, "dense: allowed must be made of bool, got float32"),
        (lambda: masks.dense([True]), ValueError, r"dense: allowed must have 2 or 4 dimensions, got shape \(1,\)"),
        (lambda: masks.tiles([(0, -1)], 8), ValueError, "tiles: pairs must not be negative"),
        (lambda: masks.per_head([]), ValueError, "per_head: masks must not be empty"),
        (lambda: masks.per_head([causal, 3]), TypeError, r"per_head: masks\[1\] must be a mask, got int"),
        (lambda: masks.per_head([masks.per_head([causal] * 3), causal]), ValueError, "must tell 1 or 2 heads"),
        (lambda: masks.prefix([1, 2]) & masks.prefix([1, 2, 3]), ValueError, r"must agree in batches, got \[2, 3\]"),
        (lambda: causal.shift(2**30, 0), ValueError, "shift: dq must be an integer from -536870912"),
        (lambda: causal.plan(5, -1), ValueError, "plan: kv_len must be an integer from 0"),
        (lambda: causal.plan(5, 5, (0, 1)), ValueError, "plan: block must be"),
        (lambda: masks.plan_of(torch.zeros(3), 1, 1), TypeError, "plan: code must be an int32 tensor"),
        (lambda: causal.tile(3, 3, 0, 1), ValueError, "tile: .* must not be empty"),
        (lambda: causal.tile(0.0, 1, 0, 1), TypeError, "tile: q0 must be an integer, got float"),
        (lambda: causal.row("a", 4), TypeError, "row: q must be an integer, got str"),
        (lambda: masks.per_head([causal] * 2).row(0, 4, 0, 2), ValueError, "row: head must be an integer from 0 to 1"),
        (lambda: masks.prefix([1, 2]).row(0, 4, 2), ValueError, "row: batch must be an integer from 0 to 1"),
        (lambda: causal.plan(5, 5, 2.0), ValueError, r"plan: block must be .*, got \(2.0,\)"),
        (lambda: masks.tiles(None, 8), TypeError, "tiles: pairs must be a tensor or lists of integers"),
        (lambda: masks.tiles([1, 2], 8), ValueError, r"tiles: pairs must have shape \(n, 2\), got \(2,\)"),
        (lambda: masks.per_head(causal), TypeError, "per_head: masks must be a list of masks, got Causal"),
        (lambda: causal.save_png("m.png", 8.5, 8), ValueError, "save_png: q_len and kv_len must be integers"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_pictures_show_the_plan(tmp_path):
    mask = masks.per_head([causal, window(40, 0), causal])
    expected = tiles_of(mask.to_dense(200, 130), (32, 16))
    panels = dict(part.split("\n", 1) for part in mask.show(200, 130, block=(32, 16)).split("\n\n"))
    assert list(panels) == ["head 0 2", "head 1"]
    for h, title in enumerate(("head 0 2", "head 1")):
        assert panels[title].split("\n") == ["".join(".+#"[c] for c in row) for row in expected[0, h].tolist()]
    assert max(map(len, causal.show(5000, 5000, width=40).split("\n"))) == 40
    assert "\x1b[38;5;25m#" in causal.show(9, 9, color=True)
    mask.save_png(tmp_path / "m.png", 200, 130, block=(32, 16))
    data = (tmp_path / "m.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and [p.name for p in tmp_path.iterdir()] == ["m.png"]
    chunks, at = {}, 8
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        chunks[name] = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + chunks[name])
        at += 12 + size
    wide, high = struct.unpack(">II", chunks[b"IHDR"][:8])
    image = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(high, wide + 1)[:, 1:]
    scale = (high - 16) // 7
    for h in range(3):
        panel = image[8 : 8 + 7 * scale, h * (wide // 3) + 8 :][:, : 9 * scale]
        assert torch.equal(panel[::scale, ::scale], expected[0, h])


def test_command_line(tmp_path, capsys):
    png = tmp_path / "m.png"
    assert main(["masks", "causal & (window(256, 0) | sink(4))", "--length", "2048", "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG") and "causal & (window(256, 0) | sink(4))" in out
    plan = (causal & (window(256, 0) | sink(4))).plan(2048, 2048)
    rows = {line.split("  ")[0]: line.split()[-1] for line in out.split("\n") if line.strip()}
    assert [rows[f"{kind} tiles"] for kind in ("full", "partial")] == [str(n) for n in plan.tiles[:2]]
    assert len([line for line in out.split("\n") if set(line) <= set(".+#") and len(line) == 16]) == 16
    assert main(["masks", "causal", "--length", "100", "--kv-length", "5000", "--block", "16x32"]) == 0
    assert "100 x 5000" in capsys.readouterr().out
    assert main(["masks", "causl"]) == 1
    assert "masks: parse: name must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["masks", "causal", "--block", "0"])


def test_the_default_device_has_no_say():
    """torch.set_default_device("cuda") is common; "meta" stands for it, which refuses to be read."""
    expected = masks.causal & masks.segments(cu_seqlens=[0, 3, 7]) & masks.tiles([(0, 0)], (4, 8)) | masks.blocks([2, 5])
    wanted = expected.to_dense(7, 7)
    with torch.device("meta"):
        made = masks.causal & masks.segments(cu_seqlens=[0, 3, 7]) & masks.tiles([(0, 0)], (4, 8)) | masks.blocks([2, 5])
        dense, plan, row = made.to_dense(7, 7), made.plan(7, 7, 4), made.row(3, 7)
        found = made.density(7, 7), made.waste(7, 7), made.empty_rows(7, 7), made.show(7, 7), hash(made), made.tile(0, 2, 0, 2)
    assert torch.equal(dense, wanted) and torch.equal(plan.runs, expected.plan(7, 7, 4).runs)
    assert row == expected.row(3, 7) and found[0] == expected.density(7, 7) and made == expected
    assert torch.equal(found[2], expected.empty_rows(7, 7))
