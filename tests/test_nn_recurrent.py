"""QuasiLSTM and RGLRU against loops over their equations, transformers' RG-LRU, and themselves token by token."""

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET
from nn_modules import check_against, check_each_matters, error, normal, perturbed

from scalekern import nn

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")


def quasi_lstm(p, x, prefix=""):
    def linear(name, v):
        return F.linear(v, p[f"{prefix}linear_{name}.weight"], p[f"{prefix}linear_{name}.bias"])

    c, outputs = 0, []
    for t in range(x.shape[1]):
        forget = 1 / (1 + torch.exp(-linear("Fx", x[:, t]) - 1))
        c = forget * c + torch.sigmoid(linear("Ix", x[:, t])) * torch.tanh(linear("Zx", x[:, t]))
        outputs.append(linear("post_head", torch.sigmoid(linear("Ox", x[:, t])) * torch.tanh(c)))
    return torch.stack(outputs, 1)


def quasi_lstm_block(p, x):
    norm = lambda name, v: F.layer_norm(v, v.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
    x = x + quasi_lstm(p, norm("ln1", x), "rnn.")
    u = F.linear(norm("ln2", x), p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])
    u = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    return x + F.linear(u, p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])


def rglru(p, x):
    gate = lambda name, v: torch.sigmoid(  # noqa: E731
        v @ torch.block_diag(*p[f"{name}_gate_weight"]) + p[f"{name}_gate_bias"].flatten()
    )
    h, outputs = 0, []
    for t in range(x.shape[1]):
        a = torch.sigmoid(-p["recurrent_param"]) ** (8 * gate("recurrent", x[:, t]))
        h = a * h + torch.sqrt(1 - a**2) * gate("input", x[:, t]) * x[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1)


MODULES = {
    "quasi_lstm": (quasi_lstm, lambda: nn.QuasiLSTM(6, 2, 5)),
    "block": (quasi_lstm_block, lambda: nn.QuasiLSTMBlock(6, 9, 2)),
    "rglru": (rglru, lambda: nn.RGLRU(6, 2)),
}


@pytest.mark.parametrize("name", MODULES)
def test_agrees_with_the_equations(name):
    rendering, make = MODULES[name]
    module = perturbed(make(), scale=1.0)
    check_against(rendering, module, normal(2, 19, 6))
    if name != "rglru":  # whose Lambda of 0 is a decay like others
        check_each_matters(rendering, module, normal(2, 19, 6), list(dict(module.named_parameters())))


@pytest.mark.parametrize("name", MODULES)
def test_token_by_token_in_parts_and_packed(name):
    module = perturbed(MODULES[name][1](), scale=1.0)
    x = normal(1, 23, 6)
    whole, final = module(x, return_final_state=True)
    state, out = module.allocate_inference_cache(1), []
    for t in range(23):
        y, state = module.step(x[:, t : t + 1], state)
        out.append(y)
    assert error(torch.cat(out, 1), whole) < 1e-13 and error(state, final) < 1e-13
    first, state = module(x[:, :9], return_final_state=True)
    second, state = module(x[:, 9:], state, return_final_state=True)
    assert error(torch.cat([first, second], 1), whole) < 1e-13 and error(state, final) < 1e-13
    packed, states = module(x, cu_seqlens=torch.tensor([0, 9, 23]), return_final_state=True)
    alone, last = module(x[:, 9:], return_final_state=True)
    assert error(packed, torch.cat([first, alone], 1)) < 1e-13 and error(states[1:], last) < 1e-13


@pytest.mark.parametrize("name", MODULES)
def test_wrong_use(name):
    module = MODULES[name][1]()
    state = module.allocate_inference_cache(2)
    with pytest.raises(ValueError, match=r"^nn\.\w+: x must have shape \(\*, \*, 6\), got \(2, 3, 5\)"):
        module(torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"^nn\.\w+: x must have shape \(\*, 1, 6\), got \(2, 2, 6\)"):
        module.step(torch.ones(2, 2, 6), state)
    with pytest.raises(ValueError, match=r"^nn\.\w+: state must have shape \(1, \d+\), got \(2, \d+\)"):
        module.step(torch.ones(1, 1, 6), state)
    if name == "rglru":
        with pytest.raises(ValueError, match=r"^nn.RGLRU: position_ids must have shape \(2, 3\), got \(2, 4\)"):
            module(torch.ones(2, 3, 6), position_ids=torch.arange(4).expand(2, 4))


def test_rglru_is_recurrent_gemmas():
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    from transformers import RecurrentGemmaConfig

    ours = nn.RGLRU(8, 2)
    with torch.no_grad():
        for name in ("input_gate_bias", "recurrent_gate_bias"):
            getattr(ours, name).normal_()
    theirs = modeling.RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=8, lru_width=8, num_attention_heads=2))
    theirs.load_state_dict(ours.state_dict())
    x, positions = torch.randn(2, 21, 8), torch.arange(21).expand(2, -1) % 13  # a second sequence begins at 13
    expected = theirs(x, positions)
    out, state = ours(x, position_ids=positions, return_final_state=True)
    assert error(out, expected) < 1e-6 and error(state, theirs.recurrent_states) < 1e-6
    token = torch.randn(2, 1, 8)
    y, _ = ours.step(token, state, torch.full((2, 1), 8))
    assert error(y, theirs(token, torch.full((2, 1), 8))) < 1e-6
    assert error(out, ours(x)) > 1e-3  # the paper's, which normalizes the first token too


def test_decays_begin_where_the_paper_has_them():
    decay = torch.exp(-8 * F.softplus(nn.RGLRU(4096).recurrent_param))
    assert 0.899 < decay.min() < 0.91 and 0.99 < decay.max() < 0.9991


def test_half_precision_keeps_its_state_in_float32():
    module = nn.RGLRU(8, 2, dtype=torch.bfloat16)
    x = torch.randn(1, 300, 8).bfloat16()
    out, state = module(x, return_final_state=True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact = nn.RGLRU(8, 2, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    assert error(out, exact(x.double())) < 6e-3
