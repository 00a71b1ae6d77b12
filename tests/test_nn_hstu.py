"""HSTU's layer against its equations over padded sequences, and token by token against all at once."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from scalekern.nn import HSTU
from scalekern.testing import assert_close

LENGTHS = (5, 1, 8)
OFFSETS = torch.tensor([0, *itertools.accumulate(LENGTHS)])
D, H, P, Pv, MAX_LEN = 6, 2, 3, 4, 9


def layer(**options):
    torch.manual_seed(1)
    made = HSTU(D, num_heads=H, attention_dim=P, linear_dim=Pv, max_len=MAX_LEN, num_buckets=12, **options).double()
    with torch.no_grad():
        made._uvqk.mul_(30)  # scores of some size
        for table in made._rel_attn_bias.parameters():
            table.mul_(30)
    return made


def data():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(sum(LENGTHS), D, generator=g, dtype=torch.float64)
    return x, torch.cat([torch.randint(0, 5000, (n,), generator=g).sort().values for n in LENGTHS])


def rendering(p, x, time, targets):
    """Sequence by sequence, pair by pair."""
    outs = []
    for s, (a, b) in enumerate(zip(OFFSETS.tolist(), OFFSETS[1:].tolist())):
        X, T, n = x[a:b], time[a:b].double(), b - a
        normed = (X - X.mean(-1, keepdim=True)) / (X.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        z = normed @ p["_uvqk"]
        u, v, q, k = (z / (1 + (-z).exp())).split([H * Pv, H * Pv, H * P, H * P], -1)
        after = torch.cat([T[1:], T[-1:]])
        heads = []
        for h in range(H):
            Q, K, V = q[:, h * P : (h + 1) * P], k[:, h * P : (h + 1) * P], v[:, h * Pv : (h + 1) * Pv]
            rows = []
            for i in range(n):
                total = 0
                for j in range(i + 1):
                    if j < i and i >= n - targets[s] and j >= n - targets[s]:
                        continue
                    bucket = min(int((after[i] - T[j]).abs().clamp(min=1).log() / 0.301), 12)
                    score = Q[i] @ K[j] + p["_rel_attn_bias._pos_w"][MAX_LEN - 1 + j - i]
                    score = score + p["_rel_attn_bias._ts_w"][bucket]
                    total = total + score / (1 + (-score).exp()) / MAX_LEN * V[j]
                rows.append(total)
            heads.append(torch.stack(rows))
        mixed = torch.cat(heads, -1)
        mixed = (mixed - mixed.mean(-1, keepdim=True)) / (mixed.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        outs.append((u * mixed) @ p["_o.weight"].T + p["_o.bias"] + X)
    return torch.cat(outs)


@pytest.mark.parametrize("targets", [(0, 0, 0), (2, 1, 3)])
def test_agrees_with_its_equations(targets):
    made, (x, time) = layer(), data()
    plain = {n: p.detach().clone().requires_grad_() for n, p in made.named_parameters()}
    xs = [x.clone().requires_grad_() for _ in range(2)]
    out = made(xs[0], OFFSETS, time=time, num_targets=torch.tensor(targets))
    wanted = rendering(plain, xs[1], time, targets)
    assert_close(out, wanted, tolerance=1e-11)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = torch.autograd.grad((out * weight).sum(), [xs[0], *made.parameters()])
    for name, a, e in zip(["x", *plain], grads, torch.autograd.grad((wanted * weight).sum(), [xs[1], *plain.values()])):
        assert e.norm() > 1e-6, name
        assert_close(a, e, tolerance=1e-9, what=name)


def test_parameters_are_upstreams():
    assert {n: tuple(p.shape) for n, p in layer().named_parameters()} == {
        "_uvqk": (D, 2 * H * (P + Pv)), "_o.weight": (D, H * Pv), "_o.bias": (D,),
        "_rel_attn_bias._ts_w": (13,), "_rel_attn_bias._pos_w": (2 * MAX_LEN - 1,),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"max_attn_len": 2, "contextual_len": 2}])
def test_new_tokens_after_a_cache_equal_all_at_once(options):
    made, (x, time) = layer(**options), data()
    keep = [s for s, n in enumerate(LENGTHS) if n >= 3]
    rows = [torch.arange(OFFSETS[s], OFFSETS[s + 1]) for s in keep]
    bounds = lambda parts: torch.tensor([0, *itertools.accumulate(len(r) for r in parts)])
    whole = made(x[torch.cat(rows)], bounds(rows), time=time[torch.cat(rows)])
    before = [r[:-2] for r in rows]
    _, cache = made(
        x[torch.cat(before)], bounds(before), time=time[torch.cat(before)], return_cache=True
    )
    out = made(x[torch.cat([r[-2:] for r in rows])], bounds(rows), time=time[torch.cat(rows)], cache=cache)
    newest = torch.cat([torch.arange(e - 2, e) for e in bounds(rows)[1:].tolist()])
    assert_close(out, whole[newest], tolerance=1e-12)


def test_what_does_not_fit_is_named():
    layer = HSTU(12, max_len=9, num_buckets=0)
    x, offsets = torch.randn(8, 12), torch.tensor([0, 5, 8])
    with pytest.raises(ValueError, match="nn.HSTU: x must have shape"):
        layer(x[:, :11], offsets)
    _, cache = layer(x, offsets, return_cache=True)
    with pytest.raises(ValueError, match="nn.HSTU: cache and x must have the 8 tokens of offsets together, got 10"):
        layer(x[:2], offsets, cache=cache)
