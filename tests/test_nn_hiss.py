"""nn.HiSS against the paper's two levels in plain torch, chunk by chunk, sharing no code with the package."""

import math

import pytest
import torch
from nn_modules import (
    check_against, check_each_matters, error, layer_norm, linear, mamba, normal, perturbed, sigmoid, tensors,
)  # fmt: skip

from scalekern.nn import HiSS

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
OPTIONS = {
    "mamba": {
        "low": "mamba", "high": "mamba", "low_options": {"d_state": 3, "dt_rank": 2}, "high_options": {"d_state": 2},
    },
    "mixed": {
        "low": "s4d", "high": "mamba", "low_options": {"d_state": 4}, "high_options": {"d_state": 2}, "n_high": 2,
    },
    "mamba2": {
        "low": "mamba2", "high": "s4d", "low_options": {"d_state": 3, "headdim": 4}, "high_options": {"d_state": 2},
    },
}  # fmt: skip


def s4d(p, x):
    """Gu et al. 2022 (S4D), sections 3 and 4: zero-order hold, recurrence, gelu, and a gated mix of the features."""
    A = torch.complex(-p["kernel.log_A_real"].exp(), p["kernel.A_imag"])
    decay = (p["kernel.log_dt"].exp()[:, None] * A).exp()
    C = torch.view_as_complex(p["kernel.C"]) * (decay - 1) / A
    h, ys = torch.zeros_like(decay), []
    for u in x.unbind(1):
        h = decay * h + u[..., None]
        ys.append(2 * (C * h).real.sum(-1) + p["D"] * u)
    y = torch.stack(ys, 1)
    y = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
    y, gate = (y @ p["output_linear.0.weight"][..., 0].T + p["output_linear.0.bias"]).chunk(2, -1)
    return y * sigmoid(gate)


def level(p, name, kind, x):
    depth = sum(n.startswith(f"{name}.norms") for n in p) // 2 - 1
    norm = lambda x, i: layer_norm(x, p[f"{name}.norms.{i}.weight"], p[f"{name}.norms.{i}.bias"])  # noqa: E731
    for i in range(depth):
        own = {n.removeprefix(f"{name}.layers.{i}."): t for n, t in p.items()}
        x = x + {"mamba": mamba, "s4d": s4d}[kind](own, norm(x, i))
    return norm(x, depth)


def paper(p, x, options, chunk):
    """Bhirangi et al. 2024, section 4: every chunk from a zero state, its last output; then over the chunks."""
    chunks = [x[:, begin : begin + chunk] for begin in range(0, x.shape[1], chunk)]
    ends = [linear(p, "pool", level(p, "low", options["low"], linear(p, "embed", c))[:, -1]) for c in chunks]
    return linear(p, "output", level(p, "high", options["high"], torch.stack(ends, 1)))


def build(name):
    torch.manual_seed(0)
    return perturbed(HiSS(3, 2, d_model=4, d_low=6, chunk_size=3, **OPTIONS[name]), scale=0.5)


@pytest.mark.parametrize("name", ["mamba", "mixed"])
def test_output_and_gradients_match_the_paper(name):
    """Eight tokens in chunks of three: the last one is ragged."""
    module, x = build(name), normal(2, 8, 3)
    rendering = lambda p, x: paper(p, x, OPTIONS[name], 3)  # noqa: E731
    check_against(rendering, module, x)
    names = [n for n in tensors(module) if n.split(".")[0] in ("embed", "pool", "output") or "norms" in n]
    check_each_matters(rendering, module, x, names)
    for length in (1, 3) if name == "mamba" else (6,):
        assert error(module(x[:, :length]), rendering(tensors(module), x[:, :length])) < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_are_the_whole(name):
    """Pieces that begin, end and pass over chunks, and one token; gradients through the states."""
    module, x = build(name), normal(1, 8, 3).requires_grad_()
    whole, cache, ends = module(x), module.new_cache(), {}
    for begin, end in ((0, 2), (2, 7), (7, 8)):
        for i, y in enumerate(module(x[:, begin:end], cache=cache).unbind(1)):
            ends[begin // 3 + i] = y
    joined = torch.stack([ends[i] for i in range(3)], 1)
    assert error(joined, whole) < 1e-11
    if name == "mixed":
        grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in (joined, whole)]
        for got, exact in zip(*grads, strict=True):
            assert error(got, exact) < 1e-9


@torch.no_grad()
def test_token_by_token():
    """After every token the output of the sequence so far; in float32 to the bound that users see."""
    module, x = build("mixed"), normal(2, 7, 3)
    for dtype, bound, checked in ((torch.float64, 1e-12, (0, 1, 2, 3, 6)), (torch.float32, 1e-5, (6,))):
        module, x = module.to(dtype), x.to(dtype)
        cache = module.new_cache()
        outs = [module.step(x[:, t], cache) for t in range(7)]
        for t in checked:
            assert error(outs[t], module(x[:, : t + 1])[:, -1]) < bound, t


def test_a_chunk_starts_afresh_below_and_not_above():
    module, x = build("mamba"), normal(1, 6, 3)
    other = torch.cat([normal(1, 3, 3, seed=3), x[:, 3:]], 1)
    features = []
    module.pool.register_forward_hook(lambda module, args, out: features.append(out.flatten(0, 1)))
    outs = module(x), module(other)
    assert torch.equal(features[0][1], features[1][1]) and error(features[0][0], features[1][0]) > 1e-3
    assert error(outs[0][:, 1], outs[1][:, 1]) > 1e-3


def test_edges_and_wrong_use():
    module = build("mixed")
    assert module(normal(2, 0, 3)).shape == (2, 0, 2) and module(normal(0, 5, 3)).shape == (0, 2, 2)
    with pytest.raises(ValueError, match=r"nn.HiSS: x must have shape \(\*, \*, 3\), got \(1, 3, 5\)"):
        module(normal(1, 3, 5))
    with pytest.raises(ValueError, match="nn.HiSS: high must be one of .*, got 'lstm'"):
        HiSS(3, 2, high="lstm")
    with pytest.raises(ValueError, match="nn.HiSS: chunk_size must be an integer of at least 1, got 0"):
        HiSS(3, 2, chunk_size=0)
