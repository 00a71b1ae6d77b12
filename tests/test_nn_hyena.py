"""nn.HyenaOperator and nn.HyenaFilter against the paper's equations in plain torch, no code shared with the package."""

import math

import pytest
import torch
from nn_modules import (
    check_against, check_compiled, check_each_matters, check_loads, check_padding, error, normal, perturbed, tensors,
)  # fmt: skip

from scalekern.nn import HyenaFilter, HyenaOperator

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")


def network(p, name, z, w_mod=1):
    """Poli et al. 2023, appendix D.3: affine maps with sines between them."""
    layers = sorted({int(n.split(".")[1]) for n in p if n.startswith(f"{name}.")})
    for i in layers[:-1]:
        part = f"{name}.{i}."
        if i % 2:
            z = torch.sin(w_mod * p[f"{part}freq"] * z)
        else:
            z = z @ p[f"{part}weight"].T + p[f"{part}bias"]
    return z @ p[f"{name}.{layers[-1]}.weight"].T


def filter_taps(p, length, name="implicit_filter", w_mod=1, shift=0.0, normalized=False):
    """Equation 7: the network times a window that decays; (length, D)."""
    z, t = p["pos_emb.z"][0, :length], p["pos_emb.t"][0, :length]
    taps = network(p, name, z, w_mod) * (torch.exp(-t * p["modulation.deltas"][0].abs()) + shift)
    return taps / taps.abs().sum(1)[:, None] if normalized else taps


def toeplitz(taps):
    """(L, L): row t, column s holds tap t - s."""
    length = len(taps)
    rows = [torch.cat([taps[: t + 1].flip(0), taps.new_zeros(length - 1 - t)]) for t in range(length)]
    return torch.stack(rows)


def operator(p, u, **filter_options):
    """Definition 3.1, a row of the batch at a time: projections, short convolution, then the recurrence by matrices."""
    width = p["out_proj.weight"].shape[0]
    order = len(p["in_proj.weight"]) // width - 1
    filters = {name.removeprefix("filter_fn."): t for name, t in p.items() if name.startswith("filter_fn.")}
    short, outs = p["short_filter.weight"][:, 0], []
    for row in u:
        x = row @ p["in_proj.weight"].T + p["in_proj.bias"]
        taps, length = short.shape[1], len(x)
        padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
        x = sum(short[:, w] * padded[w : w + length] for w in range(taps)) + p["short_filter.bias"]
        *gates, v = x.split(width, 1)
        taps = filter_taps(filters, length, **filter_options)
        for o in range(order - 1):
            v = v * gates[order - 1 - o]
            columns = []
            for m in range(width):
                channel = m * (order - 1) + o
                columns.append(toeplitz(taps[:, channel]) @ v[:, m] + filters["bias"][channel] * v[:, m])
            v = torch.stack(columns, 1)
        outs.append((v * gates[0]) @ p["out_proj.weight"].T + p["out_proj.bias"])
    return torch.stack(outs)


def build(seed=0, **options):
    torch.manual_seed(seed)
    return perturbed(HyenaOperator(**{"d_model": 4, "l_max": 12, "filter_order": 5, "w": 2, **options}))


@pytest.mark.parametrize(
    "length, options",
    [
        (12, {}),
        (7, {"order": 4, "short_filter_order": 2, "emb_dim": 5, "num_inner_mlps": 1}),
        (1, {"order": 3, "shift": 0.3, "normalized": True}),
        (9, {"lr_pos_emb": 0.0, "modulation_lr": 1e-3, "w_mod": 3, "short_filter_order": 5}),
    ],
    ids=str,
)
def test_output_and_gradients_match_the_paper(length, options):
    module = build(**options)
    names = {"w_mod", "shift", "normalized"} & set(options)
    rendering = lambda p, u: operator(p, u, **{n: options[n] for n in names})
    check_against(rendering, module, normal(2, length, 4))


def test_a_changed_equation_is_noticed():
    module, u = build(order=3), normal(2, 8, 4)
    parts = ("bias", "implicit_filter.1.freq", "implicit_filter.0.bias", "modulation.deltas")
    names = ["in_proj.bias", "short_filter.bias", "out_proj.bias", *(f"filter_fn.{n}" for n in parts)]
    check_each_matters(operator, module, u, names)


STATE_DICT = {  # of safari's HyenaOperator(d_model=6, l_max=10, order=2, filter_order=8, emb_dim=5)
    "in_proj.weight": (18, 6),
    "in_proj.bias": (18,),
    "out_proj.weight": (6, 6),
    "out_proj.bias": (6,),
    "short_filter.weight": (18, 1, 3),
    "short_filter.bias": (18,),
    "filter_fn.bias": (6,),
    "filter_fn.pos_emb.z": (1, 10, 5),
    "filter_fn.pos_emb.t": (1, 10, 1),
    "filter_fn.implicit_filter.0.weight": (8, 5),
    "filter_fn.implicit_filter.0.bias": (8,),
    "filter_fn.implicit_filter.1.freq": (1, 8),
    "filter_fn.implicit_filter.2.weight": (8, 8),
    "filter_fn.implicit_filter.2.bias": (8,),
    "filter_fn.implicit_filter.3.freq": (1, 8),
    "filter_fn.implicit_filter.4.weight": (8, 8),
    "filter_fn.implicit_filter.4.bias": (8,),
    "filter_fn.implicit_filter.5.freq": (1, 8),
    "filter_fn.implicit_filter.6.weight": (6, 8),
    "filter_fn.modulation.deltas": (1, 1, 6),
}


def test_upstreams_checkpoints_load():
    check_loads(HyenaOperator(6, 10, filter_order=8, emb_dim=5), STATE_DICT)


def test_initialization_is_upstreams():
    module = HyenaFilter(8, emb_dim=5, order=4, seq_len=10, w=10, lr=2e-3, wd=0.1)
    p = torch.arange(10.0)
    bands = [2 * math.pi * f * p / 10 for f in (1e-4, 1.0)]
    z = torch.stack([p / 9, *(b.cos() for b in bands), *(-b.sin() for b in bands)], 1)
    assert torch.allclose(module.pos_emb.z[0], z, atol=1e-6)
    assert torch.allclose(module.pos_emb.t[0, :, 0], p / 9)
    # At t = 1 the slowest channel has fallen to 0.01^(1/1.5), the fastest to 0.01^(1/0.3).
    ends = torch.exp(-module.modulation.deltas[0, 0, [0, -1]].abs())
    assert torch.allclose(ends, torch.tensor([0.01 ** (1 / 1.5), 0.01 ** (1 / 0.3)]), rtol=1e-4)
    assert torch.equal(module.implicit_filter[1].freq, torch.full((1, 4), 10.0))
    assert module.implicit_filter[1].freq is module.implicit_filter[3].freq
    assert module.implicit_filter[0].weight._optim == {"lr": 2e-3, "weight_decay": 0.1}
    assert module.pos_emb.z._optim == {"lr": 1e-5, "weight_decay": 0.0}
    assert "pos_emb.z" not in dict(HyenaFilter(8, lr_pos_emb=0.0).named_parameters())
    low = HyenaOperator(4, 8, dtype=torch.bfloat16)
    assert low.in_proj.weight.dtype == torch.bfloat16 and low.filter_fn.pos_emb.z.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"order": 4, "short_filter_order": 2}], ids=str)
@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3, 4, 5, 6, 7, 8, 9), (4, 4, 5, 9)], ids=str)
def test_chunks_and_steps_equal_one_call(options, cuts):
    module, u = build(**options), normal(2, 9, 4).requires_grad_()
    states, outs, begin, filters = module.allocate_inference_cache(2), [], 0, module.filters(12)
    for end in cuts:
        run = module.step if end == begin + 1 else lambda *a, **kw: module(
            a[0], initial_states=a[1], return_final_states=True, **kw
        )  # fmt: skip
        out, states = run(u[:, begin:end], states, filters=filters)
        outs.append(out)
        begin = end
    out, expected = torch.cat(outs, 1), operator(tensors(module), u)
    assert error(out, expected) < 1e-12
    whole, (conv_state, history) = module(u, return_final_states=True)
    assert error(whole, expected) < 1e-12
    assert error(states[0], conv_state) < 1e-12 and error(states[1], history) < 1e-12
    grads = [torch.autograd.grad(o.square().sum() + s.sum(), [u, *module.parameters()]) for o, s in (
        (out, states[1]), (whole, history)
    )]  # fmt: skip
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-10


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_equal_rows_alone(left):
    check_padding(operator, build(), left)


def test_low_precision_and_autocast():
    """Five roundings to 8 bits in a row, two of them under gates: 2^-9 each and what the products add."""
    module, u = build(), normal(2, 12, 4)
    expected = operator(tensors(module), u)
    module = module.float()
    assert error(module(u.float()), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(u.float())
        assert module.filters(12).dtype == torch.float32
    assert out.dtype == torch.bfloat16 and error(out, expected) < 2e-2


def test_dropout_acts_on_the_gated_input_in_training():
    module, u = build(dropout=0.5), normal(1, 12, 4)
    plain = operator(tensors(module), u)
    assert error(module.eval()(u), plain) < 1e-12
    module.train()
    outs = [module(u) for _ in range(2)]
    assert error(outs[0], plain) > 1e-2 and error(*outs) > 1e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    check_compiled(build(order=3), normal(2, 7, 4), backend)


def test_empty_input():
    module = build()
    assert module(normal(0, 7, 4)).shape == (0, 7, 4)
    out, states = module(normal(2, 0, 4), return_final_states=True)
    assert out.shape == (2, 0, 4) and states[1].shape == (1, 2, 4, 0)


def test_wrong_use_is_named():
    module = build()
    with pytest.raises(ValueError, match="at most l_max = 12 tokens, got 13"):
        module(normal(1, 13, 4))
    with pytest.raises(ValueError, match=r"u must have shape \(\*, \*, 4\), got \(1, 3, 5\)"):
        module(normal(1, 3, 5))
    with pytest.raises(ValueError, match="mask goes with no initial_states"):
        module(normal(1, 3, 4), mask=torch.ones(1, 3), initial_states=module.allocate_inference_cache(1))
    with pytest.raises(ValueError, match="order must be an integer of at least 2, got 1"):
        HyenaOperator(4, 8, order=1)
    with pytest.raises(ValueError, match="short_filter_order must be one of 2, 3, 4, 5, 6, 7, 8, got 9"):
        HyenaOperator(4, 8, short_filter_order=9)
    with pytest.raises(ValueError, match="emb_dim must be odd and at least 3"):
        HyenaFilter(4, emb_dim=4)
    with pytest.raises(ValueError, match="L must be at most seq_len = 8, got 9"):
        HyenaFilter(4, seq_len=8).filter(9)
    with pytest.raises(ValueError, match="bidirectional must be False"):
        HyenaOperator(4, 8, bidirectional=True)
