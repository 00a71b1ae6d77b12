"""The mask algebra: dense, code and plans agree with plain predicates, on random expressions and on known masks."""

import copy
import dataclasses
import gc
import itertools
import math
import pickle
import random
import weakref

import mask_cases
import pytest
import torch
from conftest import INTERPRET

from scalekern import masks
from scalekern.masks import _bounds, _code, _draw, _plan
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
