"""What large masks cost: plans and counts from intervals, in little time and memory, never pair by pair."""

import random
import subprocess
import sys

import pytest
import torch
from conftest import child_environment
from test_masks import _one_thread, pytestmark  # noqa: F401 (one thread here, too, and not in the interpreter's process)

from scalekern import masks
from scalekern.masks import _count, _plan, causal, segments, sink, window

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
