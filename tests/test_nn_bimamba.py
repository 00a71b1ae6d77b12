"""nn.BiMamba against algorithm 1 of the paper in plain torch, token by token, sharing no code with the package."""

import pytest
import torch
from nn_modules import (
    check_against, check_compiled, check_each_matters, check_loads, check_padding, error, linear, memory,
    mamba, mamba2, normal, perturbed, sigmoid, tensors,
)  # fmt: skip

from scalekern.nn import BiMamba, BiMambaWrapper

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")


def scan(p, x, back):
    """One direction of one row x (L, D), from its first or its last token on: convolution, parameters, recurrence."""
    tokens, b = (list(x.flip(0)), "_b") if back else (list(x), "")
    taps, A = p[f"conv1d{b}.weight"][:, 0], -p[f"A{b}_log"].exp()
    window, h, ys = [torch.zeros_like(x[0])] * taps.shape[1], torch.zeros_like(A), []
    rank, states = p[f"dt_proj{b}.weight"].shape[1], A.shape[1]
    for token in tokens:
        window = [*window[1:], token]
        u = sum(taps[:, w] * window[w] for w in range(len(window))) + p.get(f"conv1d{b}.bias", 0)
        u = u * sigmoid(u)
        r, B, C = (p[f"x_proj{b}.weight"] @ u).split([rank, states, states])
        step = torch.log1p(torch.exp(linear(p, f"dt_proj{b}", r)))
        h = torch.exp(step[:, None] * A) * h + step[:, None] * B * u[:, None]
        ys.append(h @ C + p[f"D{b}"] * u)
    return torch.stack(ys[::-1] if back else ys)


def paper(p, x, divide=False):
    rows = []
    for row in x:
        main, z = linear(p, "in_proj", row).chunk(2, -1)
        gate = z * sigmoid(z)
        y = scan(p, main, False) * gate + scan(p, main, True) * gate
        rows.append(linear(p, "out_proj", y / 2 if divide else y))
    return torch.stack(rows)


def build(**options):
    torch.manual_seed(0)
    return perturbed(BiMamba(**{"d_model": 4, "d_state": 3, "dt_rank": 2, **options}), scale=0.8)


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "d_conv": 2, "dt_rank": 1, "if_divide_out": True}, {"conv_bias": False}], ids=str
)
def test_output_and_gradients_match_the_paper(options):
    module, x = build(**options), normal(2, 7, 4)
    rendering = lambda p, x: paper(p, x, module.if_divide_out)  # noqa: E731
    check_against(rendering, module, x)
    check_each_matters(rendering, module, x, [n for n in tensors(module) if "A" not in n])


@pytest.mark.parametrize("length", [1, 2, 67])
def test_lengths(length):
    """One shorter than the filter, one that crosses a chunk of the scan."""
    module, x = build(), normal(1, length, 4)
    assert error(module(x), paper(tensors(module), x)) < 1e-12
    assert error(module.float()(x.float()), paper(tensors(module.double()), x)) < 1e-5


def test_every_token_reads_every_other():
    module, x = build(), normal(1, 5, 4).requires_grad_()
    for t in range(5):
        assert (torch.autograd.grad(module(x)[0, t].sum(), x)[0][0].abs().sum(-1) > 1e-9).all()


@pytest.mark.parametrize("left", [True, False])
def test_padding(left):
    check_padding(paper, build(bias=True), left)


def test_upstreams_checkpoints_load():
    one = {"conv1d.weight": (16, 1, 4), "conv1d.bias": (16,), "x_proj.weight": (9, 16), "dt_proj.weight": (16, 1)}
    one |= {"dt_proj.bias": (16,), "A_log": (16, 4), "D": (16,)}
    other = {n.replace(".", "_b.") if "." in n else {"A_log": "A_b_log"}.get(n, "D_b"): s for n, s in one.items()}
    check_loads(BiMamba(8, d_state=4), {**one, **other, "in_proj.weight": (32, 8), "out_proj.weight": (8, 16)})


def test_compile_low_precision_and_wrong_use():
    module, x = build(), normal(2, 7, 4)
    check_compiled(module, x, "eager")
    assert module(normal(0, 7, 4)).shape == (0, 7, 4) and module(normal(2, 0, 4)).shape == (2, 0, 4)
    with pytest.raises(ValueError, match=r"nn.BiMamba: hidden_states must have shape \(\*, \*, 4\), got \(1, 3, 5\)"):
        module(normal(1, 3, 5))
    with pytest.raises(ValueError, match=r"nn.BiMamba: mask must have shape \(2, 7\), got \(2, 6\)"):
        module(x, mask=torch.ones(2, 6))
    expected = paper(tensors(module), x)
    assert error(module.bfloat16()(x.bfloat16()), expected) < 3e-2  # six roundings to 8 bits in a row


def test_memory_is_linear_in_the_length():
    """Four times the tokens, four times the memory; a product of tokens with tokens would be seen."""
    module, u = BiMamba(4, d_state=3), torch.randn(1, 2048, 4)
    short, long = memory(module, u[:, :512]), memory(module, u)
    assert all(3 * s < b < 4.1 * s for s, b in zip(short, long)), (short, long)
    assert long[0] < 24 * 2048 * module.d_inner * 4  # two directions of x, z, dt, B, C, y and their copies
    square = lambda u: module(u) + (u @ u.mT).softmax(-1) @ u  # noqa: E731
    assert memory(square, u)[0] > 10 * memory(square, u[:, :512])[0]


# ---- BiMambaWrapper ----

MIXERS = {"mamba": {"d_state": 3, "dt_rank": 2}, "mamba2": {"d_state": 3, "headdim": 4}}


def both_ends(p, x, mixer, strategy="add"):
    """Schiff et al. 2024, section 3.1. What mamba_rev has not of its own is mamba_fwd's."""
    run = {"mamba": mamba, "mamba2": mamba2}[mixer]
    fwd = {n.removeprefix("mamba_fwd."): t for n, t in p.items() if n.startswith("mamba_fwd.")}
    rev = fwd | {n.removeprefix("mamba_rev."): t for n, t in p.items() if n.startswith("mamba_rev.")}
    y, back = run(fwd, x), run(rev, x.flip(1)).flip(1)
    return y + back if strategy == "add" else y * back


def wrapped(mixer, **options):
    torch.manual_seed(0)
    return perturbed(BiMambaWrapper(4, mixer=mixer, **MIXERS[mixer], **options), scale=0.8)


@pytest.mark.parametrize("tie, strategy", [(True, "add"), (False, "ew_multiply")])
@pytest.mark.parametrize("mixer", MIXERS)
def test_two_mixers_from_both_ends(mixer, tie, strategy):
    module, x = wrapped(mixer, bidirectional_weight_tie=tie, bidirectional_strategy=strategy), normal(2, 7, 4)
    rendering = lambda p, x: both_ends(p, x, mixer, strategy)  # noqa: E731
    check_against(rendering, module, x)
    names = dict(module.named_parameters())
    assert ("mamba_rev.in_proj.weight" in names, "mamba_rev.out_proj.weight" in names) == (not tie, not tie)
    check_each_matters(rendering, module, x, [n for n in names if "A_log" not in n])
    assert error(module(x[:, :1]), rendering(tensors(module), x[:, :1])) < 1e-12


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_of_two_mixers(mixer, left):
    check_padding(lambda p, x: both_ends(p, x, mixer), wrapped(mixer), left)


def test_wrapper_names_and_wrong_use():
    """Upstream's: a checkpoint has the tied projections under both names."""
    module = wrapped("mamba")
    names = {n.partition(".")[2] for n in module.state_dict()}
    assert set(module.state_dict()) == {f"{side}.{n}" for side in ("mamba_fwd", "mamba_rev") for n in names}
    for wrong in ({"mixer": "lstm"}, {"bidirectional_strategy": "concat"}):
        with pytest.raises(ValueError, match=f"nn.BiMambaWrapper: {next(iter(wrong))} must be one of"):
            BiMambaWrapper(4, **wrong)
