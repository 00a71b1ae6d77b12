"""nn.FiTBlock against the papers' equations in plain torch, sharing no code with the package."""

import math

import pytest
import torch
from nn_modules import (
    attend, bound, by_heads, check_against, check_compiled, check_each_matters, check_loads, error, from_heads,
    layer_norm, linear, normal, perturbed, sigmoid, tensors,
)  # fmt: skip

from scalekern.nn import FiTBlock
from scalekern.nn.fit import pack

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, HEADS, P = 16, 2, 8
SIZES = [[(2, 2), (1, 3)], [(3, 2)]]  # 7 and 6 tokens, and one or two of padding
LENGTH = 8


def turned(t, places, thetas):
    """RoPE in two dimensions, pair by pair: channels of the first half by the row, of the second by the column."""
    out = t.clone()
    for n, place in enumerate(places):
        for half in range(2):
            for pair in range(P // 4):
                angle = place[half] * thetas[half] ** (-2 * pair / (P / 2))
                c = half * P // 2 + 2 * pair
                cos, sin = math.cos(angle), math.sin(angle)
                out[..., n, c] = cos * t[..., n, c] - sin * t[..., n, c + 1]
                out[..., n, c + 1] = sin * t[..., n, c] + cos * t[..., n, c + 1]
    return out


def image(p, x, c, size, shared=0.0, qk_norm=False, thetas=(10000.0, 10000.0)):
    """Lu et al. 2024, section 3.2, and Wang et al. 2024, section 3, for one image alone: x (tokens, D), c (D,)."""
    c = linear(p, "adaLN_modulation.1", c * sigmoid(c))
    c = (linear(p, "adaLN_modulation.2", c) if "adaLN_modulation.2.weight" in p else c) + shared
    shift1, scale1, gate1, shift2, scale2, gate2 = c.view(6, WIDTH)
    y = layer_norm(x, eps=1e-6) * (1 + scale1) + shift1
    q, k, v = (by_heads(t[None], HEADS) for t in linear(p, "attn.qkv", y).chunk(3, -1))
    if qk_norm:
        q, k = (layer_norm(t, p.get(f"attn.{n}_norm.weight", 1), eps=1e-6) for t, n in ((q, "q"), (k, "k")))
    places = [(i, j) for i in range(size[0]) for j in range(size[1])]
    y = attend(turned(q, places, thetas), turned(k, places, thetas), v, lambda b, h, i, j: True)
    x = x + gate1 * linear(p, "attn.proj", from_heads(y)[0])
    y = layer_norm(x, eps=1e-6) * (1 + scale2) + shift2
    gated = linear(p, "mlp.fc1_g", y)
    return x + gate2 * linear(p, "mlp.fc2", gated * sigmoid(gated) * linear(p, "mlp.fc1_x", y))


def paper(p, x, c, **options):
    """Every image by itself; padding as it came. c (B, 2, D)."""
    rows = []
    for b, sizes in enumerate(SIZES):
        parts, begin = [], 0
        for s, (h, w) in enumerate(sizes):
            parts.append(image(p, x[b, begin : begin + h * w], c[b, s], (h, w), **options))
            begin += h * w
        rows.append(torch.cat([*parts, x[b, begin:]]))
    return torch.stack(rows)


def build(**options):
    torch.manual_seed(0)
    return perturbed(FiTBlock(WIDTH, HEADS, mlp_ratio=1.5, **options))


V2 = {"qk_norm": True, "qk_norm_weight": True, "qkv_bias": False, "ffn_bias": False, "adaln_lora_dim": 3}


@pytest.mark.parametrize("options", [{}, V2, {"qk_norm": True, "adaln_bias": False}], ids=["v1", "v2", "no weights"])
def test_output_and_gradients_match_the_paper(options):
    module, packing = build(**options), pack(SIZES, P, LENGTH)
    shared = normal(6 * WIDTH, seed=5) if options is V2 else 0.0
    module = bound(module, lambda forward, x: forward(x[:, 2:], x[:, :2], packing, shared))
    rendering = lambda p, x: paper(p, x[:, 2:], x[:, :2], shared=shared, qk_norm=options.get("qk_norm"))
    x = normal(2, 2 + LENGTH, WIDTH)
    check_against(rendering, module, x)
    check_each_matters(rendering, module, x, [n for n, _ in module.named_parameters() if "norm" not in n])
    if options is V2:
        check_each_matters(rendering, module, x, ["attn.q_norm.weight", "attn.k_norm.weight"])


def test_a_condition_for_all_images_of_a_row():
    module, packing, x, c = build(), pack(SIZES, P, LENGTH), normal(2, LENGTH, WIDTH), normal(2, WIDTH)
    assert error(module(x, c, packing), paper(tensors(module), x, c[:, None].expand(-1, 2, -1))) < 1e-12


def test_frequencies_of_their_own_for_rows_and_columns():
    module, thetas, x, c = build(), (500.0, 3000.0), normal(2, LENGTH, WIDTH), normal(2, 2, WIDTH)
    out = module(x, c, pack(SIZES, P, LENGTH, theta=thetas))
    assert error(out, paper(tensors(module), x, c, thetas=thetas)) < 1e-12
    assert error(out, module(x, c, pack(SIZES, P, LENGTH, theta=thetas[::-1]))) > 1e-4


def test_padding_and_other_images_reach_nothing():
    module, packing, x, c = build(), pack(SIZES, P, LENGTH), normal(2, LENGTH, WIDTH), normal(2, 2, WIDTH)
    poisoned = x.clone()
    poisoned[0, 4:], poisoned[1, 6:] = torch.nan, torch.nan
    out, expected = module(poisoned, c, packing), module(x, c, packing)
    assert error(out[0, :4], expected[0, :4]) < 1e-12 and error(out[1, :6], expected[1, :6]) < 1e-12
    assert torch.equal(expected[0, 7:], x[0, 7:]) and torch.equal(expected[1, 6:], x[1, 6:])


def test_packing():
    packing = pack(SIZES, P)
    assert packing.ids.tolist() == [[0] * 4 + [1] * 3, [0] * 6 + [-1]]
    with pytest.raises(ValueError, match="length must be at least 7, the tokens of the longest row, got 6"):
        pack(SIZES, P, 6)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4, got 6"):
        pack(SIZES, 6)


STATE_DICT = {  # of upstream's FiTBlock(16, 2, q_norm=k_norm="layernorm", qk_norm_weight=True, adaln_type="lora")
    "attn.qkv.weight": (48, 16),
    "attn.qkv.bias": (48,),
    "attn.q_norm.weight": (8,),
    "attn.k_norm.weight": (8,),
    "attn.proj.weight": (16, 16),
    "attn.proj.bias": (16,),
    "mlp.fc1_g.weight": (42, 16),
    "mlp.fc1_g.bias": (42,),
    "mlp.fc1_x.weight": (42, 16),
    "mlp.fc1_x.bias": (42,),
    "mlp.fc2.weight": (16, 42),
    "mlp.fc2.bias": (16,),
    "adaLN_modulation.1.weight": (3, 16),
    "adaLN_modulation.1.bias": (3,),
    "adaLN_modulation.2.weight": (96, 3),
    "adaLN_modulation.2.bias": (96,),
}


def test_upstreams_checkpoints_load():
    check_loads(FiTBlock(16, 2, qk_norm=True, qk_norm_weight=True, adaln_lora_dim=3), STATE_DICT)
    plain = {n: s for n, s in STATE_DICT.items() if "norm" not in n and "adaLN" not in n}
    plain |= {"adaLN_modulation.1.weight": (96, 16), "adaLN_modulation.1.bias": (96,)}
    check_loads(FiTBlock(16, 2), plain)


def test_a_block_begins_as_the_identity():
    module, x = FiTBlock(WIDTH, HEADS).double(), normal(2, LENGTH, WIDTH)
    assert torch.equal(module(x, normal(2, WIDTH), pack(SIZES, P, LENGTH)), x)


def test_low_precision():
    """Five products, each rounding to 8 bits, and six modulations."""
    module, packing, x, c = build(**V2), pack(SIZES, P, LENGTH), normal(2, LENGTH, WIDTH), normal(2, 2, WIDTH)
    expected, module = paper(tensors(module), x, c, qk_norm=True), module.float()
    assert error(module(x.float(), c.float(), packing), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(x.float(), c.float(), packing), expected) < 3e-2
    assert error(module.bfloat16()(x.bfloat16(), c.bfloat16(), packing), expected) < 3e-2


def test_compile_fullgraph():
    packing, c = pack(SIZES, P, LENGTH), normal(2, 2, WIDTH)
    check_compiled(bound(build(), lambda forward, x: forward(x, c, packing)), normal(2, LENGTH, WIDTH), "eager")


def test_wrong_use():
    module, packing = build(), pack(SIZES, P, LENGTH)
    with pytest.raises(ValueError, match=r"nn.FiTBlock: x must have shape \(2, 8, 16\), got \(2, 7, 16\)"):
        module(normal(2, 7, WIDTH), normal(2, WIDTH), packing)
    with pytest.raises(ValueError, match=r"c must have shape \(2, 2, 16\) or \(2, 16\), got \(2, 1, 16\)"):
        module(normal(2, 8, WIDTH), normal(2, 1, WIDTH), packing)
    with pytest.raises(ValueError, match="nn.FiTBlock: num_heads must divide the width 16, got 3"):
        FiTBlock(16, 3)
