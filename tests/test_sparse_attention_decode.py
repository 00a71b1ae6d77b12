"""Decoding over caches: step by step it gives the rows of sparse_attention under the matching masks; merged splits.

Shape letters: B batch, Hq query heads, Hkv key heads, L tokens, T of them in a step, P head dim.
"""

import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern import masks, reference
from scalekern.testing import assert_close

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
SINK, BUDGETS = 2, (5, 8, 10, 4)  # of four query heads, two to a key head
WHOLE = (40,) * 4
pytestmark = pytest.mark.usefixtures("any_backend")


@pytest.fixture(autouse=True)
def _on(any_backend):
    with scalekern.backend(any_backend):
        yield


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.empty(0).device, dtype)


def sequence(B=2, L=21, P=8, Pv=5, dtype=torch.float32):
    """q, k, v of 4 query heads and 2 key heads."""
    return (normal(B, h, L, p, seed=i, dtype=dtype) for i, (h, p) in enumerate(((4, P), (2, P), (2, Pv))))


def rows(q, k, v, budgets, sink, length):
    """The rows of the sequence's first `length` tokens, by attention over the whole of it."""
    part = [masks.causal & (masks.window(b - sink - 1, 0) | masks.sink(sink)) for b in budgets]
    q, k, v = (x[:, :, :length].double() for x in (q, k, v))
    return reference.sparse_attention(q, k, v, masks.per_head(part), return_lse=True)


def slot_of(position, sink, capacity):
    return position if position < sink else sink + (position - sink) % (capacity - sink)


# --- caches: empty, NaN where nothing was written; write(cache, x, b, g, position), and what the op is told of them ---


def contiguous(B, L, budgets, tokens):
    def write(cache, x, b, g, position):
        cache[b, g, position] = x

    return (B, 2, L), write, {}


def padded(B, L, budgets, tokens):
    starts = (0, 3)

    def write(cache, x, b, g, position):
        cache[b, g, starts[b] + position] = x

    return (B, 2, L + 2), write, {"starts": torch.tensor(starts)}  # the second row has one slot less than tokens


def circular(B, L, budgets, tokens):
    capacity = max(budgets) + tokens - 1

    def write(cache, x, b, g, position):
        cache[b, g, slot_of(position, SINK, capacity)] = x

    return (B, 2, capacity), write, {"circular": True}


def ragged(B, L, budgets, tokens):
    capacities = [max(budgets[2 * g : 2 * g + 2]) + tokens - 1 for g in (0, 1)]
    offsets = [0, capacities[0], sum(capacities)]

    def write(cache, x, b, g, position):
        cache[b, offsets[g] + slot_of(position, SINK, capacities[g])] = x

    return (B, offsets[2]), write, {"circular": True, "head_offsets": torch.tensor(offsets, dtype=torch.int32)}


def paged(B, L, budgets, tokens, page=4):
    pages = -(-L // page)
    table = torch.randperm(B * pages + 2, generator=torch.Generator("cpu").manual_seed(7), device="cpu")
    table = table[: B * pages].view(B, pages)

    def write(cache, x, b, g, position):
        cache[table[b, position // page], g, position % page] = x

    return (B * pages + 2, 2, page), write, {"block_table": table.to(torch.empty(0).device, torch.int32)}


CACHES = {"contiguous": contiguous, "padded": padded, "circular": circular, "ragged": ragged, "paged": paged}


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize("budgets", (BUDGETS,) if INTERPRET else (BUDGETS, WHOLE), ids=str)
@pytest.mark.parametrize("layout", CACHES)
def test_step_by_step_as_the_rows_of_attention(layout, budgets, tokens):
    """A ragged batch, from its first token on, over caches of NaN: what a step may not see reaches nothing."""
    lead, write, told = CACHES[layout](2, L := 13, budgets, tokens)
    q, k, v = sequence(L=L)
    caches = [torch.full((*lead, x.shape[-1]), float("nan")) for x in (k, v)]
    limits = {} if budgets is WHOLE else {"budgets": torch.tensor(budgets, dtype=torch.int32)}
    behind = (0, 3)  # the second row of the batch starts so many tokens later
    checked = range(tokens, L + 1, tokens * (6 if INTERPRET else 2))
    wanted, wanted_lse = rows(q, k, v, budgets, SINK, L)
    for end in range(tokens, L + 1, tokens):
        ends = [max(end - late, 0) for late in behind]
        for b, last in enumerate(ends):
            for position in range(max(last - tokens, 0), last):
                for cache, x in zip(caches, (k, v)):
                    for g in (0, 1):
                        write(cache, x[b, g, position], b, g, position)
        if end not in checked:
            continue
        new = torch.stack([_newest(q[b], last, tokens) for b, last in enumerate(ends)])
        out, lse = scalekern.sparse_attention_decode(
            new, *caches, torch.tensor(ends), sink=SINK, return_lse=True, **limits, **told
        )
        for b, last in enumerate(ends):
            assert_close(out[b], _newest(wanted[b], last, tokens), tolerance=3e-6)
            here = _newest(wanted_lse[b, ..., None], last, tokens, float("-inf"))[..., 0]
            assert_close(lse[b], here, tolerance=3e-6, what="lse")


def _newest(x, end, tokens, before=0.0):
    """The last `tokens` of x[:, :end]; what would stand before its first sees nothing."""
    part = x[:, max(end - tokens, 0) : end]
    return torch.cat([x.new_full((x.shape[0], tokens - part.shape[1], x.shape[2]), before), part], 1)


@pytest.mark.parametrize("dtype", (torch.float32,) if INTERPRET else tuple(TOLERANCE), ids=str)
def test_over_many_splits(dtype):
    """More keys than one split takes, some windows of a group within the first one alone, others across many."""
    L, budgets, sink = 40 * (8 if INTERPRET else 20), (300, 70, 9, 700), 5
    q, k, v = sequence(1, L, 12, 20, dtype)
    for given, limits in ((budgets, {"budgets": torch.tensor(budgets)}), ((L,) * 4, {})):
        part = [masks.causal & (masks.window(b - sink - 1, 0) | masks.sink(sink)) for b in given]
        rule = masks.per_head([m.shift(L - 2, 0) for m in part])
        exact = (x.double() for x in (q[:, :, -2:], k, v))
        wanted = reference.sparse_attention(*exact, rule, scale=0.3, softcap=4.0, return_lse=True)
        got = scalekern.sparse_attention_decode(
            q[:, :, -2:], k, v, torch.tensor([L]), sink=sink, scale=0.3, softcap=4.0, return_lse=True, **limits
        )
        for g, w in zip(got, wanted):
            assert_close(g, w, tolerance=TOLERANCE[dtype])


def test_what_one_row_sees_does_not_spoil_another():
    """NaN and Inf under the longer window of a group, and at the newest token of three."""
    q, k, v = sequence(L=30)
    budgets = (20, 6, 20, 20)
    v[0, 0, 15, 2], v[1, 1, 29] = float("nan"), float("inf")
    k[0, 1, 29] = float("nan")
    kwargs = dict(budgets=torch.tensor(budgets), sink=1, return_lse=True)
    args = q[:, :, -3:], k, v, torch.tensor([30, 30])
    out, lse = scalekern.sparse_attention_decode(*args, **kwargs)
    wanted, wanted_lse = reference.sparse_attention_decode(*[x.double() for x in args[:3]], args[3], **kwargs)
    assert wanted.isnan().any() and wanted.isinf().any() and torch.isfinite(wanted).float().mean() > 0.5
    for g, w in ((out, wanted), (lse, wanted_lse)):
        assert torch.equal(torch.isfinite(g), torch.isfinite(w)) and torch.equal(g.isnan(), w.isnan())
        assert_close(g[torch.isfinite(w)], w[torch.isfinite(w)], tolerance=3e-6)


def test_budgets_on_either_device_and_forgotten_pages():
    """Pages outside every window may be named by anything at all."""
    q, k, v = sequence(1, 24, 8, 8)
    pages = lambda x: x[0].unflatten(1, (6, 4)).transpose(0, 1)
    budgets = torch.tensor([6, 5, 7, 6], dtype=torch.int32)
    table = torch.tensor([[0, -7, 10**6, 3, 4, 5]], dtype=torch.int32)
    args = dict(sink=2, budgets=budgets)
    wanted = scalekern.sparse_attention_decode(q[:, :, -1:], k, v, torch.tensor([24]), **args)
    cut = pages(k), pages(v), torch.tensor([24])
    got = scalekern.sparse_attention_decode(q[:, :, -1:], *cut, block_table=table, **args)
    assert torch.equal(got, wanted) and wanted.any()
    args["budgets"] = budgets.cpu()
    got = scalekern.sparse_attention_decode(q[:, :, -1:], k, v, torch.tensor([24]), **args)
    assert_close(got, wanted, tolerance=1e-6)


def test_merged_splits_are_the_whole():
    """Also with an empty one, whose output is never read, and out of attention over chunks."""
    q, k, v = sequence(L=23)
    new, length = q[:, :, -1:], torch.tensor([23, 23])
    wanted = scalekern.sparse_attention_decode(new, k, v, length, return_lse=True)
    bounds = (0, 9, 9, 23)
    parts = [
        scalekern.sparse_attention_decode(new, k[:, :, a:e], v[:, :, a:e], torch.full((2,), e - a), return_lse=True)
        for a, e in zip(bounds, bounds[1:])
    ]
    parts[1][0].fill_(float("nan"))
    with scalekern.backend("reference"):  # no kernel: it is made of torch's ops on every backend that it has
        got = scalekern.merge_attention(*zip(*parts))
        step = scalekern.merge_attention(*zip(scalekern.merge_attention(*zip(*parts[:2])), parts[2]))
    for g, s, w in zip(got, step, wanted):
        assert_close(g, w, tolerance=2e-6)
        assert_close(s, w, tolerance=2e-6)


@pytest.mark.skipif(INTERPRET, reason="merge_attention is made of torch's ops")
def test_gradients_of_a_merge_with_parts_that_saw_nothing():
    """The gradients of attention in one piece; finite, and 0 where there was nothing."""
    q, k, v = (x.double().requires_grad_() for x in sequence(L=12))
    early, late = masks.sink(4), ~masks.sink(4)
    halves = [reference.sparse_attention(q, k, v, masks.causal & m, return_lse=True) for m in (early, late)]
    with scalekern.backend("reference"):
        out, lse = scalekern.merge_attention(*zip(*halves))
    assert (halves[1][1][:, :, :4] == float("-inf")).all()
    whole, whole_lse = reference.sparse_attention(q, k, v, masks.causal, return_lse=True)
    weights = normal(*out.shape, seed=9).double(), normal(*lse.shape, seed=10).double()
    got = torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), (q, k, v))
    wanted = torch.autograd.grad((whole * weights[0]).sum() + (whole_lse * weights[1]).sum(), (q, k, v))
    assert_close(out, whole, tolerance=1e-12)
    for g, w in zip(got, wanted):
        assert_close(g, w, tolerance=1e-12)
    outs = torch.full((2, 3, 4), float("nan"), requires_grad=True)
    lses = torch.full((2, 3), float("-inf"), requires_grad=True)
    with scalekern.backend("reference"):
        out, lse = scalekern.merge_attention(outs, lses)
    assert not out.any() and (lse == float("-inf")).all()
    for g in torch.autograd.grad(out.sum() + lse.sum(), (outs, lses)):
        assert torch.isfinite(g).all() and not g.any()


@pytest.mark.skipif(INTERPRET, reason="on a GPU nothing is read back to check it")
def test_positions_without_a_slot_are_refused_on_a_cpu(place):
    if place[0] != "cpu":
        pytest.skip("would synchronize")
    q, k, v = sequence(L=8)
    with pytest.raises(ValueError, match="_decode: lengths must be at most 8, the slots of a head, got 9"):
        scalekern.sparse_attention_decode(q[:, :, :1], k, v, torch.tensor([9, 1]))
    with pytest.raises(ValueError, match="_decode: lengths must be at most 5, the slots of a head, got 6"):
        scalekern.sparse_attention_decode(q[:, :, :1], k, v, torch.tensor([8, 6]), starts=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="^sparse_attention_decode: starts must be from 0 to 8, got -1"):
        scalekern.sparse_attention_decode(q[:, :, :1], k, v, torch.tensor([8, 6]), starts=torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="^sparse_attention_decode: budgets must be at least 2, the sinks, got 1"):
        scalekern.sparse_attention_decode(
            q[:, :, :1], k, v, torch.tensor([8, 6]), budgets=torch.tensor([2, 1, 2, 2]), sink=2
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_offsets": torch.tensor([0, 4]), "block_table": torch.zeros(2, 1).int()}, "pass one of .* got both"),
        ({"block_table": torch.zeros(2, 1).int(), "circular": True}, "circular must be False .* got True"),
        ({"budgets": torch.zeros(3).int()}, r"budgets must have shape \(4,\), got \(3,\)"),
        ({"starts": torch.zeros(3).int()}, r"starts must have shape \(2,\), got \(3,\)"),
        ({"starts": torch.zeros(2).int(), "circular": True}, "starts must be None for other layouts than .* got a tensor"),
        ({"sink": -1}, "sink must be an integer of at least 0, got -1"),
        ({"softcap": -1.0}, "softcap must be positive, got -1.0"),
        ({"softcap": "a"}, "softcap must be a number, got 'a'"),
        ({"scale": "a"}, "scale must be a number, got 'a'"),
    ],
)
@pytest.mark.skipif(INTERPRET, reason="raised before a backend is chosen")
def test_bad_calls(changes, message):
    q, k, v = sequence(L=8)
    with pytest.raises((TypeError, ValueError), match=f"^sparse_attention_decode: .*{message}"):
        scalekern.sparse_attention_decode(q[:, :, :1], k, v, torch.tensor([8, 1]), **changes)
