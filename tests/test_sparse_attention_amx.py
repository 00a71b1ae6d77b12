"""bfloat16 in sparse_attention's CPU kernels, where its products run in tile registers if the machine has them."""

import pytest
import torch

import scalekern
from scalekern import _native, masks, reference

if (reason := _native.load("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)
from conftest import at_levels, on_level
from test_sparse_attention_cpu import CAUSAL, WINDOW, Case, check_same_bits, close, ids, inputs, native, oracle

BF16 = torch.bfloat16
# Relative L2. Kernels of floats have up to 2.0e-3 of outputs and 3.0e-3 of gradients, by rounding these and reading a
# rounded output; tile registers, which round P and dS too, 2.7e-3 and 5.0e-3.
FORWARD, BACKWARD = 3.5e-3, 6e-3
SHAPES = {  # B, Hq, Hkv, Lq, Lk, P, Pv: head dims of every rest beside tiles of 16 and 32, lengths beside 16, 32 and 64
    "16": (1, 2, 2, 64, 64, 16, 16),
    "24": (1, 4, 2, 65, 63, 24, 24),
    "33_of_1": (2, 2, 1, 33, 31, 33, 1),
    "40": (1, 2, 1, 31, 129, 40, 40),
    "64": (2, 4, 1, 130, 130, 64, 64),
    "80": (1, 2, 2, 127, 47, 80, 80),
    "96_of_40": (1, 2, 2, 49, 17, 96, 40),
    "128_of_256": (1, 1, 1, 200, 200, 128, 256),
    "256_of_96": (1, 2, 1, 81, 70, 256, 96),
    "1_of_16": (1, 1, 1, 16, 15, 1, 16),
    "one_query": (2, 2, 2, 1, 130, 64, 48),
    "more_keys_than_are_kept_turned": (1, 2, 1, 70, 1100, 256, 256),  # 16 blocks of 64
}
OPTIONS = {
    "plain": {},
    "sinks": {"sinks": True, "layout": "bthd"},
    "softcap": {"softcap": 2.0, "bias": (1, 1)},
    "silu": {"silu": True, "softcap": 3.0},
    "tables": {"position": (1, 41), "time": (1, 30), "layout": "scattered"},
    "silu_tables": {"silu": True, "position": (1, 301), "time": (1, 30), "bias": (1, 1)},
    "negative_scale": {"scale": -0.3, "sinks": True},
}


def check(case, actual, expected, what=""):
    close(actual[0], expected[0], FORWARD, f"{what} out")
    close(actual[1], expected[1], 1e-5, f"{what} lse")
    for name, gradient in expected[2].items():
        close(actual[2][name], gradient, BACKWARD, f"{what} d{name}")


@pytest.mark.parametrize("shape", SHAPES)
@at_levels("bf16")
def test_head_dims_and_lengths(shape):
    Lq, Lk = SHAPES[shape][3:5]
    for name, mask in {"everything": masks.everything, "causal": CAUSAL.shift(max(Lk - Lq, 0), 0),
                       "window": masks.window(9, 40)}.items():  # fmt: skip
        case = Case(mask, SHAPES[shape], BF16)
        t, grads = inputs(case)
        check(case, native(case, t, grads), oracle(case, t, grads), name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("block", [(64, 64), (16, 48), (128, 80)], ids=str)
def test_what_touches_the_scores(options, block):
    case = Case(WINDOW, (1, 4, 2, 150, 135, 40, 24), BF16, block=block, **OPTIONS[options])
    t, grads = inputs(case)
    check(case, native(case, t, grads), oracle(case, t, grads))


def test_packed_sequences_and_empty_rows():
    g = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 37, 37, 40, 141])
    q, k, v, dout = (torch.randn(141, h, 48, generator=g).to(BF16) for h in (4, 2, 2, 4))
    mask = masks.causal & masks.window(20, 0) & ~masks.prefix([3, 0, 1, 5])  # the first queries see nothing

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = function(*leaves, mask, cu_seqlens=bounds, return_lse=True)
        return out, lse, dict(zip("qkv", torch.autograd.grad(out, leaves, dout.to(dtype))))

    expected = run(reference.sparse_attention, torch.float64)
    assert expected[1].isneginf().any()
    check(None, run(scalekern.sparse_attention, BF16), expected)


@pytest.mark.parametrize("P", [24, 64])
@pytest.mark.parametrize("silu", [False, True])
def test_nan_beside_the_inputs_and_in_hidden_keys(P, silu):
    """NaN in the numbers after each row, in the rows after the last, and in keys and values that nobody sees."""
    hidden = torch.arange(110) % 7 == 3
    mask = ~masks.dense(hidden[None, None, None].expand(1, 1, 150, 110).contiguous())
    mask = masks.causal & masks.window(70, 0) & mask
    case = Case(mask, (1, 2, 1, 150, 110, P, P), BF16, silu=silu)
    t, grads = inputs(case)
    expected = oracle(case, t, grads)

    def amid_nan(x):
        if x is None or x.dim() < 4:
            return x
        wide = torch.full((*x.shape[:2], x.shape[2] + 70, x.shape[3] + 40), torch.nan, dtype=x.dtype)
        wide = wide[:, :, : x.shape[2], : x.shape[3]]
        return wide.copy_(x)

    for spoiled in (("k", torch.nan), ("v", torch.inf), ("k", -torch.inf), ("v", torch.nan)):
        both = {n: amid_nan(x) for n, x in t.items()}
        both[spoiled[0]][:, :, hidden] = spoiled[1]
        actual = native(case, both, {n: amid_nan(x) for n, x in grads.items()})
        check(case, actual, expected, spoiled)
        assert actual[2]["k"][:, :, hidden].eq(0).all() and actual[2]["v"][:, :, hidden].eq(0).all()


def test_a_nan_reaches_those_who_see_it_and_nobody_else():
    case = Case(masks.causal, (1, 1, 1, 90, 90, 24, 24), BF16)
    t, grads = inputs(case)
    clean = native(case, t, grads)
    for name in ("k", "v"):
        spoiled = {n: None if x is None else x.clone() for n, x in t.items()}
        spoiled[name][..., 70, 3] = torch.nan
        out, _, found = native(case, spoiled, grads)
        assert out[..., 70:, 3].isnan().all(), name
        assert torch.equal(out[..., :64, :], clean[0][..., :64, :]), name
        close(out[..., 64:70, :], clean[0][..., 64:70, :].double(), FORWARD, name)  # multiplied as floats, with care
        assert found["q"][..., 70:, :].isnan().any(-1).all(), name
        close(found["q"][..., :70, :], clean[2]["q"][..., :70, :].double(), BACKWARD, name)
    t["q"][..., 80, 2] = torch.inf
    out, lse, found = native(case, t, grads)
    for name in ("k", "v"):
        close(found[name][..., 81:, :], clean[2][name][..., 81:, :].double(), BACKWARD, name)
    assert found["k"][..., :81, :].isnan().any(-1).all()


def test_a_score_of_minus_infinity_gives_its_key_no_gradient():
    """Not even by the lanes past the last query, which are multiplied as zeros: 0 x Inf."""
    case = Case(masks.everything, (1, 1, 1, 40, 64, 16, 16), BF16)
    t, grads = inputs(case)
    t["q"] = t["q"].abs()
    t["k"][:, :, 5] = -torch.inf
    expected, actual = oracle(case, t, grads), native(case, t, grads)
    close(actual[0], expected[0], FORWARD, "out")
    for name in "kv":
        close(actual[2][name], expected[2][name], BACKWARD, f"d{name}")


REPEATED = {
    "splits": Case(CAUSAL & masks.window(70, 0), (1, 4, 2, 1100, 1100, 24, 40), BF16, bias=(1, 1), sinks=True),
    "tables": Case(
        CAUSAL & masks.segments(ids(3, 190, 45)), (3, 2, 1, 190, 190, 64, 64), BF16, position=(1, 99), silu=True
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeats_bit_for_bit_with_any_number_of_threads(name):
    check_same_bits(REPEATED[name])


BESIDE = Case(WINDOW, (1, 4, 2, 150, 135, 40, 72), BF16, sinks=True)


def test_without_tile_registers_it_agrees():
    """The two differ, where the machine has them, by roundings."""
    with_them = native(BESIDE, *inputs(BESIDE))
    with on_level("avx512"):
        without = native(BESIDE, *inputs(BESIDE))
    close(with_them[0], without[0], FORWARD, "out"), close(with_them[1], without[1], 1e-6, "lse")
    for name, gradient in without[2].items():
        close(with_them[2][name], gradient, BACKWARD, f"d{name}")
    if _native.cpu_isa() == "amx":
        assert not torch.equal(with_them[0], without[0]) and not torch.equal(with_them[2]["v"], without[2]["v"])


SATURATED = {  # beside: what the sums of dS are without sinks and dlse, 0
    "plain": {},
    "sinks": {"sinks": True, "position": (1, 41)},
    "softcap": {"softcap": 60.0, "bias": (1, 1), "layout": "bthd"},
    "uneven": {"shape": (2, 2, 1, 77, 77, 24, 40)},
}


@pytest.mark.parametrize("name", SATURATED)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@at_levels("baseline", "avx2", "avx512")
def test_gradients_where_one_key_has_most_of_the_weight(name, dtype):
    """dP - delta is a hundredth of either, and the output that delta is made of is rounded: dq was off by 4e-2."""
    case = Case(**{"mask": masks.causal, "shape": (1, 4, 4, 150, 150, 64, 64), "dtype": dtype, **SATURATED[name]})
    t, grads = inputs(case)
    own = t["k"].repeat_interleave(case.shape[1] // case.shape[2], 1)
    t["q"] = (1.8 * own.float() + t["q"].float()).to(dtype)
    grads["dlse"] = 1e-2 * grads["dlse"]
    expected, actual = oracle(case, t, grads), native(case, t, grads)
    for n in ("q", "k", "v", *(n for n in ("bias", "sinks", "position") if t[n] is not None)):
        close(actual[2][n], expected[2][n], 4e-3 if dtype == BF16 else 1e-3, f"d{n}")
    grads["dout"][:, :, 5] = torch.nan
    others = torch.arange(case.shape[3]) != 5
    found = native(case, t, grads)[2]["q"]
    assert found[:, :, ~others].isnan().all()
    close(found[:, :, others], expected[2]["q"][:, :, others], 4e-3 if dtype == BF16 else 1e-3, "dq beside NaN")


@pytest.mark.parametrize("gain", [1, 8])  # of queries: 8 is repaired tile by tile, 1 not
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_sinks_of_gradients_across_the_output(dtype, gain):
    """Their gradient is the sum of weights times delta, which is near 0 here: rounded outputs put it off by all of it."""
    case = Case(mask=masks.causal, shape=(1, 2, 2, 150, 150, 64, 64), dtype=dtype, sinks=True)
    t, grads = inputs(case)
    t["q"], grads["dlse"] = gain * t["q"], 0 * grads["dlse"]
    out = oracle(case, t, grads)[0].detach()
    dout = grads["dout"].double()
    grads["dout"] = (dout - out * (dout * out).sum(-1, keepdim=True) / (out * out).sum(-1, keepdim=True)).to(dtype)
    close(native(case, t, grads)[2]["sinks"], oracle(case, t, grads)[2]["sinks"], 1e-3, "dsinks")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [2.0, 4.5])
def test_cosine_logits_at_high_temperatures(dtype, temperature):
    """Rounded vectors of length 1 put dq off by 3e-2 in bfloat16, and the temperature's gradient by all of it."""
    g = torch.Generator().manual_seed(6)
    given = [torch.randn(1, h, 90, 32, generator=g).to(dtype) for h in (4, 2, 2)]
    given.append(torch.full((4,), temperature))
    dout = torch.randn(1, 4, 90, 32, generator=g).to(dtype)

    def both(function, cast):
        leaves = [cast(x).requires_grad_() for x in given]
        out = function(*leaves[:3], masks.causal, score="cosine", temperature=leaves[3])
        return out.dtype, [out, *torch.autograd.grad(out, leaves, cast(dout))]

    _, expected = both(reference.sparse_attention, lambda x: x.double())
    for function in (scalekern.sparse_attention, reference.sparse_attention):
        found, actual = both(function, torch.clone)
        assert found == dtype
        for a, e, what in zip(actual, expected, ("out", "dq", "dk", "dv", "dtemperature")):
            close(a, e.detach(), 3e-3 if dtype == BF16 else 5e-4, what)


def test_autocast_leaves_cosine_logits_their_digits():
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, 70, 32, generator=g) for _ in range(3))
    expected = reference.sparse_attention(q.double(), k.double(), v.double(), score="cosine", scale=100.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = scalekern.sparse_attention(q, k, v, score="cosine", scale=100.0)
    assert out.dtype == BF16
    close(out, expected, 3e-3, "out")
