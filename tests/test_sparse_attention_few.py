"""Few queries on the CPU: no plan, and a kernel of their own below a number of queries."""

import dataclasses

import pytest
import torch

from scalekern import _native, masks, sparse_attention

if (reason := _native.load("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

from conftest import at_levels
from test_sparse_attention_cpu import CAUSAL, Case, check, check_same_bits, ids, inputs, native, oracle, random_mask

ALIGNED = CAUSAL.shift(400, 0)  # queries at 400 and on: some keys of the last tile are hidden from some rows
WINDOW = (CAUSAL & (masks.window(150, 0) | masks.sink(3))).shift(300, 0)
PER_HEAD = masks.per_head([masks.sink(5), WINDOW, ~masks.everything, masks.window(5, 5).shift(70, 0)])


def few(mask, shape, dtype=torch.float32, **options):
    return Case(mask, shape, dtype, planned=False, **options)


CASES = {  # B, Hq, Hkv, Lq, Lk, P, Pv: tiles of 64 keys, pieces of 256, rows in blocks of 4, 2 and 1
    "one": few(masks.everything, (1, 2, 2, 1, 1, 1, 1)),
    "decoding": few(ALIGNED, (2, 2, 2, 1, 401, 64, 64)),
    "three": few(ALIGNED, (1, 2, 1, 3, 403, 64, 32)),
    "grouped": few(WINDOW, (2, 8, 2, 2, 302, 32, 64), sinks=True),
    "many_heads_a_key_head": few(masks.everything, (1, 140, 2, 1, 70, 16, 16)),  # groups of 64 rows and 6
    "heads_and_rows": few(CAUSAL.shift(55, 0), (1, 38, 2, 6, 61, 16, 16)),  # 10 heads of 6 rows, then 9
    "a_mask_a_head": few(PER_HEAD, (1, 4, 1, 4, 330, 16, 16)),
    "a_mask_a_sequence": few(masks.prefix([0, 7, 257, 300]), (4, 2, 1, 3, 300, 16, 16)),
    "segments": few(masks.segments(ids(2, 5, 2), ids(2, 200, 67)), (2, 2, 2, 5, 200, 16, 20), sinks=True),
    "empty_rows": few(masks.rows([True, False, True, False]) & masks.window(0, 90), (1, 2, 2, 4, 130, 16, 16)),
    "nothing": few(~masks.everything, (1, 2, 1, 2, 100, 8, 8)),
    "dilated": few((CAUSAL & masks.dilated(3)).shift(250, 0), (1, 2, 2, 5, 256, 16, 16), bias=(1, 2)),
    "turned": few(CAUSAL.transpose().shift(0, -200), (1, 2, 2, 4, 300, 16, 16)),
    "f64": few(ALIGNED, (1, 2, 2, 3, 403, 17, 5), torch.float64, softcap=3.0, bias=(1, 2), sinks=True),
    "f16": few(WINDOW, (1, 4, 2, 4, 304, 64, 128), torch.float16, layout="bthd", bias=(1, 1), softcap=2.0),
    "bf16": few(WINDOW, (2, 4, 4, 1, 301, 40, 24), torch.bfloat16, bias=(2, 4), bias_dtype=torch.float32),
    "bf16_rows": few(ALIGNED, (1, 4, 1, 2, 402, 64, 64), torch.bfloat16, sinks=True),
    "scattered": few(PER_HEAD, (1, 4, 2, 3, 303, 20, 33), layout="scattered", bias=(1, 4)),
    "wide": few(WINDOW, (1, 2, 2, 2, 302, 256, 256), torch.bfloat16),
    "positions": few(ALIGNED, (1, 2, 1, 3, 403, 16, 16), position=(2, 901), layout="scattered", bias=(1, 1)),
    "positions_clamped": few(WINDOW, (1, 2, 2, 2, 302, 16, 16), position=(1, 21), softcap=2.0, times="random"),
    "shared_keys": few(masks.everything, (1, 12, 2, 17, 150, 32, 40)),  # 102 rows; with 3 threads not folded
    "shared_keys_bf16": few(masks.everything, (1, 12, 2, 17, 150, 32, 40), torch.bfloat16),
    # what the kernel leaves to panels, on the tiles that were found for it
    "silu": few(WINDOW, (1, 2, 1, 3, 303, 16, 16), silu=True, bias=(1, 1)),
    "times": few(ALIGNED, (1, 2, 1, 3, 403, 16, 16), time=(1, 40)),
    "more": few(WINDOW, (1, 2, 1, 64, 364, 16, 16), sinks=True),
}
# The kernel of few queries ends, by instruction set, at 2, 5 and 10 of them (float64: half), at 4 with tile registers;
# a panel's second vector of queries begins at 5, 9 and 17 (float64: half).
SWITCH = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 16, 17, 32, 33]


@pytest.mark.parametrize("name", CASES)
@at_levels("baseline", "avx2")
def test_matches_a_masked_softmax(name):
    case = CASES[name]
    t, grads = inputs(case)
    check(case, native(case, t, grads), oracle(case, t, grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("queries", SWITCH)
@at_levels("baseline", "avx2")
def test_around_the_switch(queries, dtype):
    case = few(WINDOW, (1, 4, 2, queries, 300 + queries, 64, 64), dtype, sinks=True)
    t, grads = inputs(case)
    check(case, native(case, t, grads), oracle(case, t, grads))


def test_random_masks():
    g = torch.Generator().manual_seed(1)
    for trial in range(60):
        Lq, Lk = ((1, 17), (2, 320), (3, 129), (6, 64))[trial % 4]
        mask = random_mask(g, trial % 3 + 1, Lq, Lk, 2, 2)
        case = few(mask, (2, 2, 2, Lq, Lk, 16, 16), sinks=True)
        t, grads = inputs(case, trial)
        check(case, native(case, t, grads), oracle(case, t, grads))


def test_tiles_are_those_of_a_plan():
    """Panels on either: not a bit differs, forward and backward."""
    g = torch.Generator().manual_seed(2)
    for trial in range(20):
        Lq, Lk = ((17, 130), (64, 200), (33, 64), (40, 321))[trial % 4]
        case = Case(random_mask(g, trial % 3, Lq, Lk, 2, 2), (2, 2, 1, Lq, Lk, 16, 16))
        t, grads = inputs(case, trial)
        planned, found = (native(dataclasses.replace(case, planned=p), t, grads) for p in (True, False))
        for a, e in zip((*found[:2], *found[2].values()), (*planned[:2], *planned[2].values())):
            assert torch.equal(a, e), case.mask


@pytest.mark.parametrize("name", ["three", "grouped", "a_mask_a_head", "f64", "f16", "bf16", "bf16_rows", "scattered"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_no_query_sees_reaches_nothing(name, poison):
    """In tiles that are visited, and in such as no row sees."""
    case = dataclasses.replace(CASES[name])
    Lq, Lk = case.shape[3:5]
    hidden = torch.arange(Lk) % 7 == 3
    hidden[70:140] = True
    case.mask = case.mask & ~masks.rows(hidden).transpose()
    t, grads = inputs(case)
    expected = oracle(case, t, grads)
    t["k"][:, :, hidden] = poison
    t["v"][:, :, hidden] = poison
    check(case, native(case, t, grads), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@at_levels("baseline", "avx2")
def test_a_nan_reaches_the_rows_that_see_it(dtype):
    """Keys 400 to 402 are seen by three rows, by two and by one: rows of one block."""
    case = few(CAUSAL.shift(400, 0), (1, 1, 1, 3, 403, 16, 16), dtype)
    t, _ = inputs(case)
    clean = native(case, t, None)
    for name, poison in (("k", torch.nan), ("v", torch.nan), ("v", torch.inf)):
        spoiled = {n: None if x is None else x.clone() for n, x in t.items()}
        spoiled[name][..., 401, 3] = poison
        out, lse, _ = native(case, spoiled, None)
        seen = out[..., 1:, :] if name == "k" else out[..., 1:, 3]
        assert not seen.isfinite().any(), name
        assert torch.equal(out[..., :1, :], clean[0][..., :1, :]) and torch.equal(lse[..., :1], clean[1][..., :1]), name
        assert lse[..., 1:].isnan().all() == (name == "k")
    t["q"][..., 1, 2] = torch.nan
    out, lse, _ = native(case, t, None)
    assert out[..., 1, :].isnan().all() and lse[..., 1].isnan().all()
    assert torch.equal(out[..., ::2, :], clean[0][..., ::2, :])


def test_what_an_earlier_call_left_reaches_nothing():
    """Channels beside the last one of a row, in memory that a call full of NaN used in the same layout."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        narrow, wide = (few(CAUSAL.shift(90, 0), (1, 2, 1, 3, 93, n, n)) for n in (20, 32))
        t, _ = inputs(narrow)
        expected = native(narrow, t, None)
        nan, _ = inputs(wide)
        for x in "qkv":
            nan[x][:] = torch.nan
        for _ in range(3):
            native(wide, nan, None)
            assert all(torch.equal(a, e) for a, e in zip(native(narrow, t, None)[:2], expected))
    finally:
        torch.set_num_threads(threads)


REPEATED = ["three", "grouped", "many_heads_a_key_head", "a_mask_a_head", "bf16_rows"]
REPEATED += ["shared_keys", "shared_keys_bf16"]


@pytest.mark.parametrize("name", REPEATED)
def test_repeats_bit_for_bit_with_any_number_of_threads(name):
    check_same_bits(CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [masks.causal, masks.causal & (masks.window(100, 0) | masks.sink(2))], ids=str)
def test_a_decoding_loop_gives_the_rows_of_the_whole(rule, dtype):
    """Two tokens at a time and then one, over a cache that grows through the end of a tile."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, h, 270, 32, generator=g).to(dtype) for h in (4, 2, 2))
    whole, lses = sparse_attention(q, k, v, rule, return_lse=True)
    for begin, end in ((0, 1), (62, 64), (63, 65), (127, 128), (128, 129), (255, 257), (269, 270)):
        part = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
        out, lse = sparse_attention(*part, rule.shift(begin, 0), return_lse=True)
        torch.testing.assert_close(out, whole[:, :, begin:end], rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
        torch.testing.assert_close(lse, lses[:, :, begin:end], rtol=0, atol=5e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (20, 4)], ids=str)  # 34 rows of a key head, and 85: two tiles of queries
@pytest.mark.parametrize("mask", [masks.everything, masks.sink(64), masks.sink(70), CAUSAL], ids=str)
@at_levels("baseline", "avx2")
def test_query_heads_that_share_keys(heads, mask, dtype):
    """Rows of one head where all see the same whole tiles, and where they do not, of an uneven number of keys."""
    for layout, beside in (("plain", {}), ("bthd", {}), ("plain", {"sinks": True}), ("plain", {"softcap": 3.0})):
        case = few(mask, (2, *heads, 17, 150, 32, 40), dtype, layout=layout, **beside)
        t, grads = inputs(case)
        check(case, native(case, t, grads), oracle(case, t, grads))
