"""nn.MonarchMixerBlock against its equations in plain torch, sharing no code with the package."""

import pytest
import torch
import torch.nn.functional as F
from nn_modules import (
    check_against, check_compiled, check_each_matters, check_loads, check_padding, error, normal, perturbed, tensors,
)  # fmt: skip
from test_nn_hyena import filter_taps

from scalekern.nn import BlockdiagLinear, MonarchMixerBlock, MonarchMixerMLP, MonarchMixerSequenceMixing

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")


def sub(p, prefix):
    return {name.removeprefix(f"{prefix}."): t for name, t in p.items() if name.startswith(f"{prefix}.")}


def convolve(p, v):
    """A HyenaFilter's matrix times v (L, M), with its skip: tap s looks s back, reverse tap s looks s + 1 ahead."""
    length, back = len(v), filter_taps(p, len(v))
    ahead = filter_taps(p, length, "implicit_filter_rev") if "implicit_filter_rev.0.weight" in p else None
    rows = []
    for t in range(length):
        row = sum(back[t - s] * v[s] for s in range(t + 1)) + p["bias"] * v[t]
        rows.append(row if ahead is None else row + sum(ahead[s - t - 1] * v[s] for s in range(t + 1, length)))
    return torch.stack(rows)


def layernorm(p, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * p["weight"] + p["bias"]


def mixing(p, u):
    """M2-BERT of Fu et al. 2023: a row (L, M) at a time."""
    outs = []
    for row in u:
        row = layernorm(sub(p, "layernorm"), row, 1e-5) if "layernorm.weight" in p else row
        x = row @ p["in_linear.weight"].T + p["in_linear.bias"]
        padded = torch.cat([x.new_zeros(2, x.shape[1]), x])
        taps = p["short_filter.weight"][:, 0]
        x = sum(taps[:, w] * padded[w : w + len(x)] for w in range(3)) + p["short_filter.bias"]
        x1, x2, v = x.chunk(3, 1)
        y = x2 * convolve(sub(p, "filter_fn"), x1 * v)
        if "filter_fn2.bias" in p:
            y = y + convolve(sub(p, "filter_fn2"), row)
        outs.append(y @ p["out_linear.weight"].T + p["out_linear.bias"])
    return torch.stack(outs)


def dense(weight, in_features, out_features):
    return weight if weight.dim() == 2 else torch.block_diag(*weight)[:out_features, :in_features]


def mlp(p, x, gated=True):
    width = x.shape[-1]
    inner = 4 * width  # of every case here
    hidden = x @ dense(p["gated_layers.weight"], width, inner * (2 if gated else 1)).T
    phi = lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2
    hidden = phi(hidden[..., :inner]) * hidden[..., inner:] if gated else phi(hidden)
    return layernorm(sub(p, "layernorm"), x + hidden @ dense(p["wo.weight"], inner, width).T + p["wo.bias"], 1e-12)


def block(p, u, gated=True):
    return mlp(sub(p, "mlp"), mixing(sub(p, "attention"), u), gated)


def build(seed=0, **options):
    torch.manual_seed(seed)
    small = {"hidden_size": 4, "intermediate_size": 16, "l_max": 11, "hyena_filter_order": 5, "hyena_w": 2}
    return perturbed(MonarchMixerBlock(**{**small, **options}))


@pytest.mark.parametrize(
    "length, options",
    [
        (11, {}),
        (7, {"hyena_training_additions": True, "use_glu_mlp": False, "hyena_emb_dim": 5, "hidden_size": 8,
             "intermediate_size": 32}),
        (1, {"monarch_mlp_nblocks": None, "bidirectional": False}),  # one token meets no tap that looks ahead
        (6, {"bidirectional": False, "residual_long_conv": False, "monarch_mlp_nblocks": 3, "hidden_size": 5,
             "intermediate_size": 20}),
    ],
    ids=str,
)  # fmt: skip
def test_output_and_gradients_match_the_equations(length, options):
    module = build(**options)
    rendering = lambda p, u: block(p, u, options.get("use_glu_mlp", True))
    check_against(rendering, module, normal(2, length, options.get("hidden_size", 4)))


def test_a_changed_equation_is_noticed():
    module, u = build(), normal(2, 8, 4)
    filters = [f"attention.{f}.{n}" for f in ("filter_fn", "filter_fn2")
               for n in ("bias", "implicit_filter.6.weight", "implicit_filter_rev.6.weight")]  # fmt: skip
    names = ["attention.in_linear.bias", "attention.short_filter.bias", "mlp.wo.bias", "mlp.layernorm.bias"]
    check_each_matters(block, module, u, [*names, *filters])


def hyena_filter(prefix, width, length, emb, order):
    def layers(name):
        sizes = {0: (order, emb), 2: (order, order), 4: (order, order)}
        found = {f"{name}.{i}.weight": size for i, size in sizes.items()}
        found |= {f"{name}.{i}.bias": (order,) for i in sizes} | {f"{name}.{i}.freq": (1, order) for i in (1, 3, 5)}
        return found | {f"{name}.6.weight": (width, order)}

    names = {"bias": (width,), "pos_emb.z": (1, length, emb), "pos_emb.t": (1, length, 1)}
    names |= {**layers("implicit_filter"), **layers("implicit_filter_rev"), "modulation.deltas": (1, 1, width)}
    return {f"{prefix}.{name}": shape for name, shape in names.items()}


# of m2's BertLayer: hidden_size 12, intermediate_size 24, long_conv_l_max 10, hyena_emb_dim 5, hyena_filter_order 8,
# bidirectional, residual_long_conv, use_glu_mlp, use_monarch_mlp with monarch_mlp_nblocks 4
STATE_DICT = {
    **hyena_filter("attention.filter_fn", 12, 10, 5, 8),
    **hyena_filter("attention.filter_fn2", 12, 10, 5, 8),
    "attention.in_linear.weight": (36, 12),
    "attention.in_linear.bias": (36,),
    "attention.out_linear.weight": (12, 12),
    "attention.out_linear.bias": (12,),
    "attention.short_filter.weight": (36, 1, 3),
    "attention.short_filter.bias": (36,),
    "mlp.gated_layers.weight": (4, 12, 3),
    "mlp.wo.weight": (4, 3, 6),
    "mlp.wo.bias": (12,),
    "mlp.layernorm.weight": (12,),
    "mlp.layernorm.bias": (12,),
}


def test_upstreams_checkpoints_load():
    check_loads(MonarchMixerBlock(12, 24, l_max=10, hyena_emb_dim=5, hyena_filter_order=8), STATE_DICT)
    additions = MonarchMixerBlock(12, 24, monarch_mlp_nblocks=None, hyena_training_additions=True)
    assert additions.attention.layernorm.weight.shape == (12,)
    assert additions.mlp.gated_layers.weight.shape == (48, 12) and additions.mlp.wo.weight.shape == (12, 24)


def test_block_diagonal_initialization():
    layer = BlockdiagLinear(64, 100, nblocks=4)
    assert 0.95 * 16**-0.5 < layer.weight.abs().max() <= 16**-0.5
    assert 0.8 * 100**-0.5 < layer.bias.abs().max() <= 100**-0.5
    assert layer(torch.zeros(0, 64)).shape == (0, 100)


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_equal_rows_alone(left):
    check_padding(block, build(), left, torch.Tensor.long)


def test_autocast():
    """The filters stay in float32; products, gates and two convolutions round to 8 bits."""
    module, u = build(), normal(2, 11, 4)
    expected = block(tensors(module), u)
    module = module.float()
    assert error(module(u.float()), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(u.float()), expected) < 3e-2


def test_32k_tokens():
    """As long as the longest checkpoint: both ends of the sequence reach each other, by the filters of that length."""
    torch.manual_seed(0)
    module = MonarchMixerSequenceMixing(2, 32768, bidirectional=True, hyena_emb_dim=5, hyena_filter_order=4).eval()
    with torch.no_grad():
        module.filter_fn.modulation.deltas.zero_()  # no decay: far taps count
        u = torch.randn(1, 32768, 2)
        out = module(u)
        x = F.linear(u, module.in_linear.weight, module.in_linear.bias).transpose(1, 2)
        x1, x2, v = module.short_filter(x)[..., :32768].double().chunk(3, 1)
        z, last = (x1 * v)[0], []
        back, ahead = (f(32768)[0].T.double() for f in (module.filter_fn.filter, module.filter_fn.filter_rev))
        last.append((back.flip(1) * z).sum(1) + module.filter_fn.bias * z[:, -1])
        last.append(back[:, 0] * z[:, 0] + (ahead[:, :-1] * z[:, 1:]).sum(1) + module.filter_fn.bias * z[:, 0])
        y = torch.stack(last) * x2[0, :, [-1, 0]].T
        expected = y @ module.out_linear.weight.double().T + module.out_linear.bias
    assert error(out[0, [-1, 0]], expected) < 1e-4  # sums of 32K terms that nearly cancel


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    check_compiled(build(), normal(2, 7, 4), backend)


def test_dropout_in_training():
    module, u = build(hidden_dropout_prob=0.5, dropout=0.5, hyena_training_additions=True), normal(1, 9, 4)
    assert error(module.eval()(u), block(tensors(module), u)) < 1e-12
    assert error(module.train().attention(u), module.attention(u)) > 1e-2
    assert error(module.mlp(u), module.mlp(u)) > 1e-2
    assert module.eval()(normal(0, 9, 4)).shape == (0, 9, 4)


def test_wrong_use_is_named():
    module = build()
    with pytest.raises(ValueError, match="at most l_max = 11 tokens, got 12"):
        module(normal(1, 12, 4))
    with pytest.raises(ValueError, match=r"MonarchMixerSequenceMixing: u must have shape \(\*, \*, 4\)"):
        module(normal(1, 3, 5))
    with pytest.raises(ValueError, match=r"MonarchMixerMLP: x must have shape \(\*, 4\)"):
        module.mlp(normal(3, 5))
    with pytest.raises(ValueError, match="nblocks must be an integer of at least 1, got 0"):
        MonarchMixerMLP(4, 8, nblocks=0)
