"""Scans over 8-bit inputs: the plain scans over the numbers, bit for bit; steps of clusters; training; 8-bit states."""

import itertools

import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern import quant
from scalekern.testing import assert_close, error

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")


def randoms(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=g)


def ssd_inputs(B=2, L=150, H=6, P=5, N=8, G=3, spread=True):
    randn = randoms()
    wide = torch.exp(randn(H, P)) if spread else torch.ones(H, P)
    return [randn(B, L, H, P) * wide, randn(B, L, H) - 1, -torch.rand(H), randn(B, L, G, N), randn(B, L, G, N)]


def selective_inputs(B=2, D=35, L=150, N=5, G=5):
    randn = randoms()
    wide = torch.exp(2 * randn(D, 1))
    return [randn(B, D, L) * wide, randn(B, D, L), -torch.rand(D, N) - 0.1, randn(B, G, N, L), randn(B, G, N, L)]


SSD = dict(seen=((0, 1), (0, 1, 3)), plain=scalekern.ssd_scan, quantized=scalekern.quantized_ssd_scan)
SELECTIVE = dict(
    seen=((0, 2), (0, 2, 3)), plain=scalekern.selective_scan, quantized=scalekern.quantized_selective_scan
)  # fmt: skip


def wide_of(scale, axes):
    for axis in sorted(axes):
        scale = scale.unsqueeze(axis)
    return scale


def coded(args, seen, groups=None):
    """(the arguments with codes, steps, the arguments with the numbers that the codes stand for)"""
    x, dt, A, B, C = args
    absmax = x.abs().amax(seen[0])
    x_scale = absmax / 127
    if groups is not None:
        x_scale = quant.sort_and_cluster(absmax, *groups).per_channel.view(absmax.shape)
    scales = x_scale, *(m.abs().amax(seen[1]) / 127 for m in (B, C))
    wides = [wide_of(s, seen[i > 0]) for i, s in enumerate(scales)]
    codes = [quant.round_to_int8(m, w) for m, w in zip((x, B, C), wides)]
    numbers = [c * w for c, w in zip(codes, wides)]
    return (codes[0], dt, A, *codes[1:]), scales, (numbers[0], dt, A, *numbers[1:])


def options(kind, L, packed):
    randn, rows = randoms(5), 4 if packed else 2
    H, P, N, D = 6, 5, 8, 35
    cu = torch.tensor([0, 1, 1, 70, L]) if packed else None
    b = 1 if packed else 2
    if kind is SSD:
        return dict(D=randn(H, P), z=randn(b, L, H, P), dt_bias=randn(H), initial_states=randn(rows, H, P, N),
                    cu_seqlens=cu, dt_softplus=True, return_final_states=True)  # fmt: skip
    return dict(D=randn(D), z=randn(b, D, L), delta_bias=randn(D), delta_softplus=True, return_last_state=True,
                initial_state=randn(rows, D, 5), cu_seqlens=cu, reverse=packed)  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind, make", [(SSD, ssd_inputs), (SELECTIVE, selective_inputs)], ids=["ssd", "selective"])
def test_is_the_plain_scan_over_the_numbers(kind, make, packed):
    """Of three head groups and five channel groups, through several tiles: no bit differs, and float16 stays close."""
    args = make(B=1 if packed else 2)
    groups = (3, 5) if kind is SSD else (1, 5)
    codes, scales, numbers = coded(args, kind["seen"], groups)
    more = options(kind, 150, packed)
    found, wanted = kind["quantized"](*codes, *scales, **more), kind["plain"](*numbers, **more)
    for f, w in zip(found, wanted):
        assert torch.equal(f, w)
    half = (codes[0], codes[1].half(), *codes[2:])
    assert_close(kind["quantized"](*half, *scales, **more)[0], wanted[0], tolerance=2e-3)


@pytest.mark.parametrize("shape", [dict(B=1, D=1, N=37, L=300, G=1), dict(B=1, D=18, N=16, L=3000, G=2)], ids=str)
def test_lanes_of_states_segments_of_time_and_threads(shape):
    """One channel, whose states are the lanes; few channels, whose time is split; channels last, and as many threads as
    there are: no bit differs."""
    codes, scales, numbers = coded(selective_inputs(**shape), SELECTIVE["seen"])
    found = scalekern.quantized_selective_scan(*codes, *scales, return_last_state=True, delta_softplus=True)
    wanted = scalekern.selective_scan(*numbers, return_last_state=True, delta_softplus=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        last = codes[0].mT.contiguous().mT, *codes[1:]
        alone = scalekern.quantized_selective_scan(*last, *scales, return_last_state=True, delta_softplus=True)
    finally:
        torch.set_num_threads(threads)
    for f, w, a in zip(found, wanted, alone):
        assert torch.equal(f, w)
        assert_close(a, w, tolerance=1e-6)  # split at other tokens


@pytest.mark.parametrize("kind, make", [(SSD, ssd_inputs), (SELECTIVE, selective_inputs)], ids=["ssd", "selective"])
def test_equal_steps_are_one_step(kind, make):
    """Whatever the clusters: with one step for all, the plain oracle on x as it is, where x lies on its grid."""
    x, dt, A, B, C = make()
    one = 2.0**-5
    lies = [(m / one).round().clamp(-128, 127) for m in (x, B, C)]
    scales = [torch.full(m.abs().amax(kind["seen"][i > 0]).shape, one) for i, m in enumerate(lies)]
    found = kind["quantized"](lies[0].to(torch.int8), dt, A, *(m.to(torch.int8) for m in lies[1:]), *scales)
    assert torch.equal(found, kind["plain"](lies[0] * one, dt, A, *(m * one for m in lies[1:])))


@pytest.mark.parametrize("kind, make", [(SSD, ssd_inputs), (SELECTIVE, selective_inputs)], ids=["ssd", "selective"])
def test_training_computes_what_the_codes_will(kind, make):
    """Floating x, B and C: the same outputs, and the gradients of the plain scan passed by the rounding."""
    args = make(L=40)
    codes, scales, numbers = coded(args, kind["seen"], (3, 3) if kind is SSD else (1, 3))
    leaves = [args[0] * 1.2, *args[1:], *scales]  # some of x lies outside of its steps' range
    leaves = [t.clone().requires_grad_() for t in leaves]
    out = kind["quantized"](*leaves)
    wides = [wide_of(s, kind["seen"][i > 0]) for i, s in enumerate(scales)]
    at = lambda ts: (quant.round_to_int8(m, w) for m, w in zip(ts, wides))
    int8 = list(at((leaves[0].detach(), args[3], args[4])))
    assert torch.equal(out, kind["quantized"](int8[0], args[1], args[2], *int8[1:], *scales))
    w = torch.randn(out.shape)
    grads = torch.autograd.grad((out * w).sum(), leaves)
    plain = [c * s for c, s in zip(int8, wides)]
    others = [t.clone().requires_grad_() for t in (plain[0], *args[1:3], *plain[1:])]
    wanted = torch.autograd.grad((kind["plain"](*others) * w).sum(), others)
    inside = (leaves[0].detach() / wides[0]).abs() <= 127.0
    assert 0.5 < inside.float().mean() < 1
    assert_close(grads[0], wanted[0] * inside, tolerance=1e-6)
    for i in range(1, 5):
        assert_close(grads[i], wanted[i], tolerance=1e-6)
    # Codes get no gradient, their steps do: less what reaches x inside of its range, times x / step.
    steps = [s.clone().requires_grad_() for s in scales]
    (dx_scale, dB_scale, dC_scale) = torch.autograd.grad(
        (kind["quantized"](int8[0], args[1], args[2], *int8[1:], *steps) * w).sum(), steps
    )  # fmt: skip
    for i, got in enumerate((dx_scale, dB_scale, dC_scale)):
        g = (wanted[(0, 3, 4)[i]] * int8[i]).sum(kind["seen"][i > 0])
        assert_close(got, g, tolerance=2e-6)


def test_steps_of_clusters_train():
    """A gradient of (I, J) steps, each of the channels of its cluster."""
    codes, _, numbers = coded(ssd_inputs(L=20), SSD["seen"])
    clusters = quant.sort_and_cluster(numbers[0].abs().amax((0, 1)), 3, 2)
    scale = clusters.scale.clone().requires_grad_()
    ones = torch.ones(3)
    out = scalekern.quantized_ssd_scan(*codes, clusters.expand(scale), ones, ones)
    per_channel = clusters.per_channel.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(scalekern.quantized_ssd_scan(*codes, per_channel, ones, ones).sum(), per_channel)
    (found,) = torch.autograd.grad(out.sum(), scale)
    for i, j in itertools.product(range(3), range(2)):
        mine = (clusters.head_group[:, None] == i) & (clusters.channel_group == j)
        assert_close(found[i, j], wanted[mine].sum(), tolerance=1e-5)


def test_clusters_lose_less_than_one_step_for_all():
    """The reason for them: mean squared error below 1e-3 of the output's, where one step for all exceeds it."""
    args = ssd_inputs()
    exact = scalekern.ssd_scan(*args, dt_softplus=True)
    mse = {}
    for groups in ((1, 1), (3, 3), (6, 5)):
        codes, scales, _ = coded(args, SSD["seen"], groups)
        out = scalekern.quantized_ssd_scan(*codes, *scales, dt_softplus=True)
        # Of each channel for itself: the large ones must not speak for the small.
        mse[groups] = ((out - exact).square().mean((0, 1)) / exact.square().mean((0, 1))).mean().item()
    assert mse[6, 5] < mse[3, 3] < 1e-3 < mse[1, 1] / 3


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7])
def test_the_cut_is_the_best_of_all(groups):
    """Of all cuts of seven sorted numbers, and the steps are those of a group's largest."""
    absmax = torch.rand(7, generator=torch.Generator().manual_seed(groups)).exp() ** 3
    found = quant.sort_and_cluster(absmax, 1, groups)
    assert torch.equal(found.head_group, torch.zeros(1, dtype=torch.int64))
    steps, ordered = found.per_channel[0], absmax.sort().values
    for j in range(groups):
        mine = found.channel_group[0] == j
        assert_close(found.scale[0, j], absmax[mine].max() / 127, tolerance=1e-7)
    costs = []
    for cuts in itertools.combinations(range(1, 7), groups - 1):
        bounds = [0, *cuts, 7]
        costs.append(sum((e - b) * ordered[e - 1] ** 2 for b, e in zip(bounds, bounds[1:])))
    assert (steps * 127).square().sum().item() == pytest.approx(min(costs).item(), rel=1e-5)


def test_heads_are_cut_by_their_largest_channel():
    absmax = torch.tensor([[1.0, 9.0], [0.1, 0.2], [8.0, 3.0], [0.3, 0.1]])
    found = quant.sort_and_cluster(absmax, 2, 2)
    assert found.head_group.tolist() == [1, 0, 1, 0]
    assert found.channel_group.tolist() == [[0, 1], [0, 0], [1, 0], [1, 0]] or found.channel_group[0, 1] == 1
    assert (found.per_channel * 127 >= absmax * (1 - 1e-6)).all()
    assert found.scale.shape == (2, 2)
    equal = quant.sort_and_cluster(torch.ones(3, 4), 3, 4)
    assert torch.equal(equal.per_channel, torch.full((3, 4), 1 / 127))
    for head_groups, match in ((5, "at most 4"), (0, "at least 1")):
        with pytest.raises(ValueError, match=match):
            quant.sort_and_cluster(absmax, head_groups=head_groups, channel_groups=1)
    with pytest.raises(ValueError, match="finite"):
        quant.sort_and_cluster(absmax.log(), 1, 1)


def test_codes_are_those_of_fake_quantize():
    x, scale = randoms()(50, 7) * 3, torch.rand(7) / 20
    x[0, 0], scale[3] = float("nan"), 0.0
    codes = quant.round_to_int8(x, scale)
    assert codes[0, 0] == 0 and not codes[:, 3].any() and codes.min() == -128 and codes.max() == 127
    assert torch.equal((codes * scale)[1:], scalekern.fake_quantize(x, scale)[1:])


def test_steps_with_an_8_bit_state_are_the_float_steps():
    """Twenty tokens; per token what rounding the state adds is no more than half a step a state."""
    randn = randoms()
    B, H, P, N, G = 2, 4, 6, 8, 2
    A = -torch.rand(H, P, N)
    steps = [(randn(B, H, P), torch.rand(B, H, P), randn(B, G, N), randn(B, G, N)) for _ in range(20)]
    hidden, largest = torch.zeros(B, H, P, N), torch.zeros(H, P)
    for x, dt, b, c in steps:
        scalekern.selective_state_update(hidden, x, dt, A, b, c)
        largest = torch.maximum(largest, hidden.abs().amax((0, 3)))
    scale = largest / 127
    state, hidden, errors = torch.zeros(B, H, P, N, dtype=torch.int8), torch.zeros(B, H, P, N), []
    for x, dt, b, c in steps:
        before = state * scale[..., None]
        out = scalekern.quantized_state_update(state, x, dt, A, b, c, scale)
        own = before.clone()
        assert_close(out, scalekern.selective_state_update(own, x, dt, A, b, c), tolerance=1e-6)
        clamped = own.clamp(-127 * scale[..., None], 127 * scale[..., None])
        assert ((state * scale[..., None] - clamped).abs() <= 0.501 * scale[..., None]).all()
        errors.append(error(out, scalekern.selective_state_update(hidden, x, dt, A, b, c)))
    assert 1e-4 < max(errors) < 0.03  # a state that only decays gathers up to 1 / (1 - decay) roundings
