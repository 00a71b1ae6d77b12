"""What is particular to attention under masks: any expression, what nobody sees, packed sequences, memory, plans."""

import random
import subprocess
import sys

import mask_cases
import pytest
import torch
from conftest import INTERPRET, kernel_places, places
from contract import gradients

import scalekern
from scalekern import masks, reference
from scalekern.testing import assert_close

BATCH, HEADS = mask_cases.BATCHES, mask_cases.HEADS
SIZES = (1, 17, 33) if INTERPRET else (1, 17, 127, 128, 129, 300)
every_place = pytest.mark.parametrize("place", places())
every_kernel = pytest.mark.parametrize("place", kernel_places())


def on(place, function, *args, **kwargs):
    with scalekern.backend(place[1]):
        return function(*args, **kwargs)


def qkv(Lq, Lk, place, P=8, Pv=None, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g).to(place[0], dtype)
    return randn(BATCH, HEADS, Lq, P), randn(BATCH, HEADS, Lk, P), randn(BATCH, HEADS, Lk, Pv or P)


def masked_softmax(q, k, v, visible):
    """Written apart from the oracle: out and lse row by row of one float64 softmax."""
    s = torch.einsum("bhip,bhjp->bhij", q, k) / q.shape[-1] ** 0.5
    s = s.masked_fill(~visible, float("-inf"))
    some = visible.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~some, 0), -1).masked_fill(~visible, 0)
    return p @ v, torch.logsumexp(s.masked_fill(~some, 0), -1).masked_fill(~some[..., 0], float("-inf"))


@every_kernel
@pytest.mark.parametrize("seed", range(6 if INTERPRET else 36))
def test_random_expressions(seed, place):
    """Outputs, lse and gradients of any mask, against the definition in float64."""
    r = random.Random(seed)
    mask, _ = mask_cases.expression(r, 1 + seed % 4)
    Lq, Lk = SIZES[seed % len(SIZES)], r.choice(SIZES)
    args = qkv(Lq, Lk, place, P=r.choice((8, 16)), seed=seed)
    visible = mask.to_dense(Lq, Lk).to(place[0])
    exact = [x.double().requires_grad_() for x in args]
    out, lse = masked_softmax(*exact, visible)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(place[0])
    finite = torch.isfinite(lse)
    wanted = torch.autograd.grad((out * weight).sum() + lse[finite].sum(), exact)
    mine = [x.requires_grad_() for x in args]
    found = on(place, scalekern.sparse_attention, *mine, mask, return_lse=True)
    grads = on(place, lambda: torch.autograd.grad((found[0] * weight).sum() + found[1][finite].sum(), mine))
    assert torch.equal(torch.isfinite(found[1]), finite)
    for a, e in zip((*found, *grads), (out, lse, *wanted)):
        assert_close(a, e, tolerance=1e-5)


@every_place
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_nobody_sees_reaches_nothing(place, poison):
    """Keys and values: whole tiles, parts of a tile, and what only some rows of a tile see."""
    L = 40 if INTERPRET else 200
    hidden = torch.zeros(L, dtype=torch.bool)
    hidden[[1, 7, *range(L // 2, L // 2 + 9), L - 1]] = True
    mask = (masks.causal & masks.window(30, 0) | masks.sink(3)) & ~masks.rows(hidden).transpose()
    q, k, v = qkv(L, L, place)
    clean = on(place, gradients, scalekern.sparse_attention, (q, k, v), {"mask": mask, "return_lse": True})
    for x in (k, v):
        x[:, :, hidden] = poison
    spoiled = on(place, gradients, scalekern.sparse_attention, (q, k, v), {"mask": mask, "return_lse": True})
    for a, e in zip((*spoiled[0], *spoiled[1].values()), (*clean[0], *clean[1].values())):
        assert_close(a, e, tolerance=1e-6)
    # A value that half of the rows see reaches those alone.
    k[:, :, hidden], v[:, :, hidden] = 0.0, 0.0
    v[:, :, L * 3 // 4 + 1] = poison
    out = on(place, scalekern.sparse_attention, q, k, v, mask)
    sees = mask.to_dense(L, L)[0, 0, :, L * 3 // 4 + 1].to(place[0])
    assert 0 < sees.sum() < L and torch.isfinite(out[:, :, ~sees]).all() and not torch.isfinite(out[:, :, sees]).any()


@every_kernel
def test_heads_and_segments_in_another_order(place):
    L = 30
    q, k, v = qkv(L, L, place)
    parts = [masks.causal, masks.window(5, 2), masks.dilated(3)]
    order = [2, 0, 1]
    out = on(place, scalekern.sparse_attention, q, k, v, masks.per_head(parts))
    turned = on(place, scalekern.sparse_attention, *(x[:, order] for x in (q, k, v)), masks.per_head([parts[i] for i in order]))
    assert_close(turned, out[:, order], tolerance=1e-6)
    rule = masks.causal & (masks.window(6, 0) | masks.sink(2))
    lengths, places_of = [9, 4, 17], [slice(0, 9), slice(9, 13), slice(13, 30)]
    bounds = lambda sizes: torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], device=place[0])
    one = [x[0].transpose(0, 1) for x in (q, k, v)]
    plain = on(place, scalekern.sparse_attention, *one, rule, cu_seqlens=bounds(lengths))
    mixed = [torch.cat([x[places_of[i]] for i in order]) for x in one]
    found = on(place, scalekern.sparse_attention, *mixed, rule, cu_seqlens=bounds([lengths[i] for i in order]))
    assert_close(found, torch.cat([plain[places_of[i]] for i in order]), tolerance=1e-6)


PACKED = {
    "causal": masks.causal,
    "window and sink": masks.causal & (masks.window(4, 1) | masks.sink(3)),
    "prefix": masks.causal | masks.prefix([2, 0, 5, 1]),
    "blocks": masks.blocks([2, 5, 9]),
    "ids": masks.segments(torch.tensor([0, 0, 1, 1, -1, 1, 2])),
    "ids a sequence": masks.segments(torch.tensor([[0, 0, 1], [1, 1, 1], [0, -1, 0], [2, 2, 2]])),
    "dilated": masks.dilated(3),
    "rows": masks.rows(torch.tensor([True, False, True])),
    "turned": (masks.blocks([2, 5, 9]) | masks.sink(2)).transpose() & ~masks.dilated(2).transpose(),
    "shifted": (masks.window(3, 2) & masks.sink(6) | masks.blocks([3, 8]) & masks.prefix([4, 4, 9, 9])).shift(-2, 3),
    "a mask a head": masks.per_head([masks.causal, masks.sink(2), ~masks.causal]),
}


@pytest.mark.skipif(INTERPRET, reason="packing is the same for all kernels")
@pytest.mark.parametrize("times", [1, 11], ids=["in_a_tile", "over_many"])
@pytest.mark.parametrize("same_lengths", [True, False])
@pytest.mark.parametrize("mask", PACKED.values(), ids=PACKED)
def test_packed_sequences_are_sequences(mask, same_lengths, times):
    lengths = [times * n for n in (9, 0, 17, 4)]
    key_lengths = lengths if same_lengths else [times * n for n in (3, 5, 11, 8)]
    g = torch.Generator().manual_seed(3)
    randn = lambda n: torch.randn(n, HEADS, 4, generator=g, dtype=torch.float64)
    bounds = lambda sizes: torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    args = randn(sum(lengths)), randn(sum(key_lengths)), randn(sum(key_lengths)), mask
    options = {"cu_seqlens": bounds(lengths), "return_lse": True}
    if not same_lengths:
        options["cu_seqlens_k"] = bounds(key_lengths)
    for a, e in zip(scalekern.sparse_attention(*args, **options), reference.sparse_attention(*args, **options)):
        assert_close(a, e, tolerance=1e-12)


@pytest.mark.skipif(INTERPRET, reason="checks come before kernels")
def test_packed_input_that_does_not_fit_is_named():
    q = torch.randn(6, HEADS, 4)
    cu = torch.tensor([0, 6])
    for options, message in (
        ({"mask": masks.neighborhood((2, 3), 3)}, "mask must be made of"),
        ({"mask": masks.dense(torch.ones(6, 6, dtype=torch.bool))}, "mask must be made of"),
        ({"empty_rows": "attend"}, "empty_rows must be 'zero'"),
        ({"mask": masks.prefix([1, 2])}, "mask must be for"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 6])}, "cu_seqlens_k must have shape"),
    ):
        with pytest.raises(ValueError, match=f"sparse_attention: {message}"):
            scalekern.sparse_attention(q, q, q, **{"cu_seqlens": cu, **options})


@pytest.mark.skipif(INTERPRET, reason="checks come before kernels")
@pytest.mark.parametrize("name", ["scale", "softcap", "norm"])
def test_numbers_are_numbers(name):
    q = torch.randn(1, HEADS, 6, 4)
    with pytest.raises(TypeError, match=f"sparse_attention: {name} must be a number, got 'a'"):
        scalekern.sparse_attention(q, q, q, **{name: "a"})


@pytest.mark.skipif(INTERPRET, reason="checks come before kernels")
def test_bounds_of_keys_alone_are_refused():
    q = torch.randn(1, HEADS, 6, 4)
    with pytest.raises(ValueError, match="sparse_attention: cu_seqlens_k must be None without cu_seqlens"):
        scalekern.sparse_attention(q, q, q, cu_seqlens_k=torch.tensor([0, 6]))


@pytest.mark.skipif(INTERPRET, reason="of the torch integration")
def test_a_compiled_call_takes_new_lengths_packed_ones_too():
    rule = masks.causal & masks.window(5, 0)
    table = torch.rand(50, 50, generator=torch.Generator().manual_seed(1)) < 0.3

    def call(q, k, v, cu):
        packed = scalekern.sparse_attention(q[0], k[0], v[0], rule, cu_seqlens=cu)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        large = scalekern.sparse_attention(q, k, v, masks_of_layers[0])
        return packed, large, scalekern.sparse_attention(scalekern.sparse_attention(q, k, v), k, v, rule)

    masks_of_layers = [masks.dense(table)]

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for L, cu in ((12, [0, 5, 12]), (31, [0, 2, 9, 31]), (50, [0, 20, 21, 25, 50])):
        x = torch.randn(1, L, HEADS, 4)
        for a, e in zip(compiled(x, x, x, torch.tensor(cu)), call(x, x, x, torch.tensor(cu))):
            assert_close(a, e, tolerance=1e-6)


@pytest.mark.skipif(INTERPRET, reason="of the torch integration")
def test_masks_made_in_a_compiled_function():
    def call(q, kind):
        if kind == "parts":
            mask = masks.causal & (masks.window(5, 0) | masks.sink(2))
        elif kind == "heads":
            half = masks.window(q.shape[2] // 2, 0)
            mask = masks.per_head([masks.causal.shift(1, 0), masks.blocks([3, 20]).transpose(), half])
        else:
            mask = masks.segments(cu_seqlens=[0, 9, 30]) & masks.dilated(2)
        return scalekern.sparse_attention(q, q, q, mask, empty_rows="attend")

    q = torch.randn(1, 3, 30, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for kind in ("parts", "heads", "packed"):
        torch.testing.assert_close(compiled(q, kind), call(q, kind), rtol=0, atol=0)

    outer, rule = masks.dense(torch.rand(30, 30, generator=torch.Generator().manual_seed(3)) < 0.5), masks.causal
    others = ~outer  # dynamo (torch 2.13) traces & and |, no ~ of objects
    large = masks.dense(torch.rand(300, 300) < 0.5)  # no text tells it

    def closed_over(q, kind):
        if kind == "and":
            mask = masks.window(3, 3) & others | rule
        elif kind == "heads":
            mask = masks.per_head([outer, others, outer.shift(2, 1).transpose() | large])
        else:
            mask = rule
            mask &= others
        return scalekern.sparse_attention(q, q, q, mask, empty_rows="attend")

    compiled = torch.compile(closed_over, backend="eager", fullgraph=True)
    for kind in ("and", "heads", "in_place"):
        torch.testing.assert_close(compiled(q, kind), closed_over(q, kind), rtol=0, atol=0)
    given = torch.compile(lambda q, mask: scalekern.sparse_attention(q, q, q, mask), backend="eager", fullgraph=True)
    for mask in (outer, rule, large):  # another object, another graph
        torch.testing.assert_close(given(q, mask), scalekern.sparse_attention(q, q, q, mask), rtol=0, atol=0)
    with pytest.raises(Exception, match="dense: masks of tensors, .* must be made outside"):
        attend = lambda x: scalekern.sparse_attention(q, q, q, masks.dense(x))
        inside = torch.compile(attend, backend="eager", fullgraph=True)
        inside(torch.ones(30, 30, dtype=torch.bool))

    def across_a_break(q, allowed):  # a tensor is no constant: its mask is made at each call, and meets the graph's
        mask = masks.window(4, 0)
        mask = ~(mask & masks.dense(allowed))
        return scalekern.sparse_attention(q, q, q, mask)

    compiled = torch.compile(across_a_break, backend="eager")
    for seed in (1, 2):
        allowed = torch.rand(30, 30, generator=torch.Generator().manual_seed(seed)) < 0.5
        torch.testing.assert_close(compiled(q, allowed), across_a_break(q, allowed), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRET, reason="plans are the same for all kernels")
def test_equal_masks_share_plans(monkeypatch):
    from scalekern.masks import _plan

    built = []
    build = _plan._build
    monkeypatch.setattr(_plan, "_build", lambda *args: built.append(args[1:3]) or build(*args))
    q, k, v = qkv(150, 150, ("cpu", "cpu"))
    for _ in range(3):
        for n in (150, 131, 64):
            rule = masks.causal & masks.window(11, 0)  # a new object, as each layer makes its own
            part = [x[:, :, :n].detach().requires_grad_() for x in (q, k, v)]
            scalekern.sparse_attention(*part, rule).sum().backward()
    assert built == [(150, 150), (131, 131)]  # none for a tile of rows


@pytest.mark.skipif(INTERPRET, reason="of the lists that kernels get")
def test_triton_decodes_a_tile_of_keys_with_one_plan():
    pytest.importorskip("triton")
    from scalekern.ops.sparse_attention import _triton_tiles

    q, k, v = qkv(1, 300, ("cpu", "cpu"))
    plans = [_triton_tiles(masks.everything.code(), q, k[:, :, :n], v[:, :, :n])[1] for n in (129, 250, 256, 257)]
    assert plans[0] is plans[1] is plans[2] is not plans[3] and plans[0].kv_len == 256


@pytest.mark.skipif(INTERPRET, reason="of the CPU kernels")
def test_memory_is_linear_in_the_length():
    """32,768 tokens and a window: scores alone would be 4 GB a head."""
    code = """
import resource, torch, scalekern
from scalekern import masks
q, k, v = (torch.randn(1, 2, 32768, 16, requires_grad=True) for _ in range(3))
rule = masks.causal & (masks.window(64, 0) | masks.sink(4))
scalekern.sparse_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], rule).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scalekern.sparse_attention(q, k, v, rule).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 150, f"{grown} MB for tensors of 4 MB each"  # q, k, v, out, lse, five gradients: 42 MB, and plans
