"""compat.flex_attention against torch's own in eager mode: outputs, lse, gradients under BlockMasks of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, create_block_mask, create_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from scalekern.masks import _plan
from scalekern.compat import _flex, flex_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*without torch.compile.*")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """torch's without its compiler, whose start costs more than all cases; one thread, as they are small."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


B, H, HKV, P, PV = 2, 4, 2, 8, 12
DOCUMENTS = torch.stack([torch.arange(300) // 70, torch.arange(300) // 110])
SPANS = torch.tensor([20, 300, 55, 130])
RANDOM = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.3


def documents(b, h, q, k):
    return (DOCUMENTS[b, q] == DOCUMENTS[b, k]) & (k <= q)


CASES = {  # mask_mod, B, H, Lq, Lk, what its mask is made of
    "causal": (lambda b, h, q, k: k <= q, None, None, 200, 200, "causal"),
    "causal of fewer queries": (lambda b, h, q, k: k <= q + 57, None, None, 130, 187, "window(-1, 57)"),
    "window": (lambda b, h, q, k: (k <= q) & (q - k < 40), None, None, 257, 257, "window(39, 0)"),
    "window and sinks": (lambda b, h, q, k: (k <= q) & ((q - k < 40) | (k < 4)), None, None, 257, 257, "limits"),
    "both ways": (lambda b, h, q, k: (q - k).abs() < 30, None, None, 70, 131, "window(29, 29)"),
    "prefix": (lambda b, h, q, k: (k <= q) | (k < 33), None, None, 150, 150, "limits"),
    "documents": (documents, B, None, 300, 300, "limits"),
    "one document": (lambda b, h, q, k: DOCUMENTS[1][q] == DOCUMENTS[1][k], None, None, 300, 300, "limits"),
    "per head": (lambda b, h, q, k: (k <= q) & (q - k < SPANS[h]), None, H, 200, 200, "per_head"),
    "per head and batch": (lambda b, h, q, k: documents(b, h, q, k) & (q - k < SPANS[h]), B, H, 300, 300, "per_head"),
    "random": (lambda b, h, q, k: RANDOM[q, k], None, None, 140, 290, "dense"),
    "random per batch": (lambda b, h, q, k: RANDOM[q, k + b], B, None, 140, 290, "dense"),
    "empty rows": (lambda b, h, q, k: (k < q) & (q % 3 > 0) & (q < 140), None, None, 150, 150, "limits"),
    "falling": (lambda b, h, q, k: k + q < 150, None, None, 150, 150, "limits"),
    "everything": (lambda b, h, q, k: q >= 0, None, None, 129, 127, "window(-1, -1)"),
    "nothing": (lambda b, h, q, k: q < 0, None, None, 130, 127, "~everything"),
    "one pair": (lambda b, h, q, k: k <= q, None, None, 1, 1, "window(-1, -1)"),
}


def tensors(q_len, kv_len, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (B, H, q_len, P), (B, HKV, kv_len, P), (B, HKV, kv_len, PV)
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def dense(q, k, v, allowed, scale):
    """(out, lse) by autograd: torch's flex_attention has no gradients on a CPU."""
    k, v = (x.repeat_interleave(H // HKV, 1) for x in (k, v))
    s = (q @ k.mT * scale).masked_fill(~allowed, -1e30)
    some = allowed.any(-1)
    out = torch.where(some[..., None], s.softmax(-1) @ v, 0)
    return out, torch.where(some, s.logsumexp(-1), float("-inf"))


def assert_planned_exactly(mask, q_len, kv_len, size=16):
    plan = mask.plan(q_len, kv_len, (size, size))
    kinds = torch.full((plan.batches * plan.heads, -(-q_len // size), -(-kv_len // size)), -1)
    for g, i, j, n, kind in zip(*(x.tolist() for x in _plan._listed(plan))):
        kinds[g, i, j : j + n] = kind
    allowed = mask.to_dense(q_len, kv_len).flatten(0, 1)
    pad = (0, -kv_len % size, 0, -q_len % size)
    tiles = lambda fill: F.pad(allowed, pad, value=fill).unfold(1, size, size).unfold(2, size, size)
    some, every = tiles(False).any(-1).any(-1), tiles(True).all(-1).all(-1)
    assert torch.equal(kinds, torch.where(every, _plan.FULL, torch.where(some, _plan.PARTIAL, -1)))


@pytest.mark.parametrize("case", CASES)
def test_against_torch(case):
    mod, batch, heads, q_len, kv_len, made_of = CASES[case]
    block_mask = create_block_mask(mod, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=(64, 32))
    q, k, v = tensors(q_len, kv_len)
    options = dict(block_mask=block_mask, scale=0.5, enable_gqa=True)
    got, lse = flex_attention(q, k, v, **options, return_lse=True)
    with torch.no_grad():
        constants = (x.detach() for x in (q, k, v))
        expected, aux = torch_flex_attention(*constants, **options, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(lse, aux.lse)
    assert torch.equal(flex_attention(q, k, v, **options), got)
    mask, _ = _flex.mask_of(block_mask, B, H, q_len, kv_len)
    assert made_of in repr(mask)
    assert_planned_exactly(mask, q_len, kv_len)
    wanted = dense(q, k, v, create_mask(mod, batch, heads, q_len, kv_len, device="cpu"), 0.5)
    weights, seen = torch.randn_like(got), torch.isfinite(lse)
    grads, expected_grads = (
        torch.autograd.grad((o * weights).sum() + n[seen].square().sum(), (q, k, v)) for o, n in ((got, lse), wanted)
    )
    for a, e in zip(grads, expected_grads):
        torch.testing.assert_close(a, e)
    unmasked = flex_attention(q, k, v, scale=0.5, enable_gqa=True)
    assert ((got - unmasked).abs().max() < 1e-9) == (case in ("everything", "one pair"))


def test_mask_mod_runs_once_on_partial_tiles(monkeypatch):
    looked, look = [], _flex._look
    count = lambda mod, tiles, *rest: looked.append(tiles.shape[1]) or look(mod, tiles, *rest)
    monkeypatch.setattr(_flex, "_look", count)
    block_mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, 512, 512, device="cpu")
    q, k, v = tensors(512, 512, torch.float32)
    found = [flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True) for _ in range(2)]
    assert looked == [4]  # of 10 tiles that are not empty
    assert torch.equal(*found)


def test_full_tiles_are_not_evaluated():
    """What the lists say counts: mask_mod is for the partial tiles."""
    counts, indices = torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[0, 0], [1, 0]]]], dtype=torch.int32)
    full = torch.tensor([[[0, 1]]], dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    mod = lambda b, h, q, k: k % 32 <= q % 32
    lists = BlockMask.from_kv_blocks(counts, indices, *full, BLOCK_SIZE=32, mask_mod=mod)
    assert torch.equal(_flex.mask_of(lists, B, H, 64, 64)[0].to_dense(64, 64)[0, 0], torch.ones(64, 64).tril().bool())


@pytest.mark.parametrize("full", [True, False], ids=["full", "empty"])
def test_no_partial_tile_at_all(full):
    """mask_mod is not asked then: under vmap over no tiles, torch's and_masks fails."""
    of_key = torch.arange(64) // 32
    mod = and_masks(lambda b, h, q, k: of_key[q] == of_key[k], lambda b, h, q, k: q >= 0 if full else q < 0)
    block_mask = create_block_mask(mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    assert int(block_mask.kv_num_blocks.sum()) == 0
    q, k, v = tensors(64, 64)
    out, lse = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, return_lse=True)
    expected = dense(q, k, v, create_mask(mod, None, None, 64, 64, device="cpu"), P**-0.5)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_keys_of_one_batch_row_and_aux():
    q, k, v = (x.detach() for x in tensors(40, 50))
    block_mask = create_block_mask(lambda b, h, q, k: k <= q + b, B, None, 40, 50, device="cpu")
    options = dict(block_mask=block_mask, enable_gqa=True)
    out, aux = flex_attention(q, k[:1], v[:1], **options, return_aux=AuxRequest(lse=True))
    expected, expected_aux = torch_flex_attention(q, k[:1], v[:1], **options, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(aux.lse, expected_aux.lse)


def test_refusals():
    q, k, v = tensors(20, 20)
    block_mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, 30, 30, device="cpu")
    with pytest.raises(NotImplementedError, match="score_mod must be None.*bias.*softcap"):
        flex_attention(q, k, v, score_mod=lambda s, b, h, q, k: s, enable_gqa=True)
    with pytest.raises(NotImplementedError, match="max_scores"):
        flex_attention(q, k, v, enable_gqa=True, return_aux=AuxRequest(max_scores=True))
    with pytest.raises(ValueError, match="enable_gqa"):
        flex_attention(q, k, v)
    with pytest.raises(ValueError, match=r"block_mask must be for \(2, 4, 20, 20\).*got \(1, 1, 30, 30\)"):
        flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got Tensor"):
        flex_attention(q, k, v, block_mask=torch.ones(20, 20), enable_gqa=True)


def test_a_graph_takes_block_masks_from_outside():
    """One that it closes over, and one that it is given: each its own graph."""
    first, second = (create_block_mask(rule, *sizes, 40, 40, device="cpu") for rule, sizes in (
        (lambda b, h, q, k: q >= k, (None, None)), (lambda b, h, q, k: (q - k).abs() <= 3 + 2 * b + h, (2, 2)),
    ))  # fmt: skip
    q, k, v = (torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    closed = torch.compile(lambda q: flex_attention(q, k, v, block_mask=first), backend="eager", fullgraph=True)
    torch.testing.assert_close(closed(q), flex_attention(q, k, v, block_mask=first), rtol=0, atol=0)
    given = torch.compile(lambda q, m: flex_attention(q, k, v, block_mask=m), backend="eager", fullgraph=True)
    for mask in (first, second, first):
        torch.testing.assert_close(given(q, mask), flex_attention(q, k, v, block_mask=mask), rtol=0, atol=0)
