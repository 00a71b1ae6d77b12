"""Numerics of causal_conv1d and causal_conv1d_update on every backend, against the float64 oracle.

What every op has in common (errors, opcheck, compile, autocast, vmap) is in test_contract_calls.py.
Shape letters: B batch, D channels, L length, W filter width, T tokens of an update, K tokens that a state holds.
"""


import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET, at_levels

import scalekern
from scalekern import reference
from scalekern.testing import TOLERANCE, assert_close, error, upcast

# The interpreter is slow: one dtype and one size of each kind are enough there.
DTYPES = [torch.float32] if INTERPRET else [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [1, 5, 33] if INTERPRET else [1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 257, 1030]
CHANNELS = [1, 3] if INTERPRET else [1, 7, 16, 63, 65, 130]


def randn(*shape, dtype=torch.float64, seed=0):
    """A scale of its own for every slice of the first two axes: swapped rows or channels are seen."""
    generator = torch.Generator("cpu").manual_seed(seed + 97 * len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    for axis in range(min(2, len(shape))):
        scale = 0.5 + 2 * torch.rand(shape[axis], generator=generator, dtype=torch.float64, device="cpu")
        x = x * scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return x.to(torch.get_default_device(), dtype)


def channels_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def holes(x):
    """The same numbers, no stride of which is 1."""
    wide = torch.full([2 * s for s in x.shape], float("nan"), dtype=x.dtype)
    view = wide[tuple(slice(0, 2 * s, 2) for s in x.shape)]
    return view.copy_(x)


LAYOUTS = {"contiguous": lambda x: x, "channels_last": channels_last, "holes": holes}


def conv_inputs(
    B=2, D=5, L=20, W=4, *, dtype=torch.float64, bias=True, initial=False, cu=None, seq=None, layout="contiguous"
):  # fmt: skip
    """({name: floating tensor}, {name: the rest}) of a call."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    place = LAYOUTS[layout]
    tensors = {"x": place(randn(B, D, L, dtype=dtype)), "weight": randn(D, W, dtype=real, seed=1)}
    if bias:
        tensors["bias"] = randn(D, dtype=real, seed=2)
    if initial:
        rows = B if cu is None else len(cu) - 1
        tensors["initial_states"] = place(randn(rows, D, W - 1, dtype=dtype, seed=3))
    rest = {"activation": "silu", "return_final_states": True}
    if cu is not None:
        rest["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
    if seq is not None:
        rest["seq_idx"] = torch.tensor(seq)
    return tensors, rest


def run(function, tensors, rest):
    """Outputs and the gradients of a random projection of them (of final states too, where they are returned)."""
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    outputs = function(**leaves, **rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((o.double() * randn(*o.shape, seed=40 + i)).sum() for i, o in enumerate(outputs))
    return outputs, dict(zip(leaves, torch.autograd.grad(loss, leaves.values())))


def compare(tensors, rest, dtype, factor=1):
    outputs, gradients = run(scalekern.causal_conv1d, tensors, rest)
    expected, expected_gradients = run(reference.causal_conv1d, {k: upcast(t) for k, t in tensors.items()}, rest)
    for name, actual, wanted in zip(("out", "final_states"), outputs, expected):
        assert actual.dtype == dtype
        assert_close(actual, wanted, tolerance=factor * TOLERANCE[dtype], what=name)
    for name, wanted in expected_gradients.items():
        # Twice: dout act'(pre) carries the rounding of x once in pre and once in what it multiplies.
        assert_close(gradients[name], wanted, tolerance=2 * factor * TOLERANCE[dtype], what=f"gradient of {name}")


SEQ = [[0] * 4 + [1, 2, 2, -1, -1] + [3] * 8 + [-1], [-1] + [4] * 14 + [9] * 3]
CASES = {
    "plain": dict(bias=False),
    "mamba": dict(D=18, L=67),
    "initial": dict(initial=True),
    "shorter_than_the_filter": dict(L=3, W=8, initial=True),
    "packed": dict(B=1, cu=[0, 1, 1, 9, 20], initial=True),
    "packed_without_history": dict(B=1, cu=[0, 7, 20]),
    "seq_idx": dict(L=18, seq=SEQ),
    "seq_idx_initial": dict(L=18, seq=SEQ, initial=True, W=6),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
@at_levels("baseline", "avx2")
def test_agrees_with_the_oracle(any_backend, case, layout, dtype):
    with scalekern.backend(any_backend):
        compare(*conv_inputs(**CASES[case], layout=layout, dtype=dtype), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("L", LENGTHS)
def test_lengths(any_backend, L, layout):
    with scalekern.backend(any_backend):
        compare(*conv_inputs(1, 3, L, 4, dtype=torch.float32, initial=True, layout=layout), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", CHANNELS)
def test_channel_counts(any_backend, D, layout):
    with scalekern.backend(any_backend):
        compare(*conv_inputs(2, D, 70 if D < 10 else 37, 3, dtype=torch.float32, layout=layout), torch.float32)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("W", range(2, 9))
@at_levels("baseline", "avx2")
def test_widths(any_backend, W, activation):
    tensors, rest = conv_inputs(2, 3, 19, W, initial=True, dtype=DTYPES[0])
    with scalekern.backend(any_backend):
        compare(tensors, {**rest, "activation": activation}, DTYPES[0])


def test_mixed_layouts_and_an_expanded_gradient(any_backend):
    tensors, rest = conv_inputs(2, 17, 40, 4, dtype=torch.float32, initial=True)
    for name, place in (("x", channels_last), ("initial_states", channels_last), ("weight", holes), ("bias", holes)):
        tensors[name] = place(tensors[name])
    expanded = randn(2, 17, 1, dtype=torch.float32, seed=9).expand(2, 17, 40)
    found = {}
    for name, function in (("op", scalekern.causal_conv1d), ("oracle", reference.causal_conv1d)):
        leaves = {k: (t if name == "op" else upcast(t)).detach().requires_grad_() for k, t in tensors.items()}
        with scalekern.backend(any_backend):
            out, final = function(**leaves, **rest)
            found[name] = torch.autograd.grad((out, final), leaves.values(), (expanded.to(out.dtype), final.detach()))
        if name == "op":
            assert out.stride() == tensors["x"].stride()
    for name, actual, wanted in zip(tensors, found["op"], found["oracle"]):
        assert_close(actual, wanted, tolerance=2e-5, what=name)


def test_explicit_backward_equals_autograd_of_the_oracle():
    for case in CASES.values():
        tensors, rest = conv_inputs(**case)
        with scalekern.backend("reference"):
            outputs, explicit = run(scalekern.causal_conv1d, tensors, rest)
        expected, automatic = run(reference.causal_conv1d, tensors, rest)
        for name in automatic:
            assert_close(explicit[name], automatic[name], tolerance=1e-13, what=name)


@pytest.mark.parametrize("case", ["initial", "packed", "seq_idx_initial"])
def test_gradcheck(any_backend, case):
    if INTERPRET:
        pytest.skip("finite differences take thousands of calls; the interpreter compares gradients with the oracle")
    tensors, rest = conv_inputs(**{**CASES[case], "D": 2})
    names = list(tensors)
    with scalekern.backend(any_backend):
        assert torch.autograd.gradcheck(
            lambda *values: scalekern.causal_conv1d(**dict(zip(names, values)), **rest),
            [t.requires_grad_() for t in tensors.values()],
        )


@pytest.mark.skipif(INTERPRET, reason="rounding of the interpreter is not the device's")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_as_accurate_as_careful_eager_code(any_backend, dtype):
    tensors, _ = conv_inputs(2, 16, 300, 4, dtype=dtype)
    x, weight, bias = tensors.values()
    exact = reference.causal_conv1d(*(upcast(t) for t in (x, weight, bias)), activation="silu")
    eager = F.silu(F.conv1d(x.float(), weight[:, None], bias, padding=3, groups=16)[..., :300]).to(dtype)
    with scalekern.backend(any_backend):
        assert error(scalekern.causal_conv1d(x, weight, bias, activation="silu"), exact) <= 2 * error(eager, exact)


# --- what is split can be joined ---


def test_packed_sequences_are_independent(any_backend):
    cu = [0, 4, 5, 5, 19, 30]
    tensors, rest = conv_inputs(1, 6, 30, 4, dtype=torch.float32, cu=cu, initial=True)
    with scalekern.backend(any_backend):
        out, final = scalekern.causal_conv1d(**tensors, **rest)
        for s, (begin, end) in enumerate(zip(cu, cu[1:])):
            part, last = scalekern.causal_conv1d(
                tensors["x"][..., begin:end], tensors["weight"], tensors["bias"], None,
                tensors["initial_states"][s : s + 1], True, "silu",
            )  # fmt: skip
            assert_close(out[..., begin:end], part, tolerance=1e-6)
            assert torch.equal(final[s : s + 1], last)


def test_runs_of_seq_idx_are_independent(any_backend):
    tensors, rest = conv_inputs(2, 6, 18, 4, dtype=torch.float32, seq=SEQ)
    with scalekern.backend(any_backend):
        out, _ = scalekern.causal_conv1d(**tensors, **rest)
        alone = scalekern.causal_conv1d(tensors["x"][..., 9:17], tensors["weight"], tensors["bias"], activation="silu")
    assert_close(out[0, :, 9:17], alone[0], tolerance=1e-6)
    assert out[0, :, 7:9].eq(0).all() and out[1, :, 0].eq(0).all()


def test_chunks_joined_by_states_equal_one_shot(any_backend):
    tensors, _ = conv_inputs(2, 5, 23, 5, dtype=torch.float32, initial=True)

    def chunked(x, weight, bias, initial_states):
        parts = []
        for begin, end in ((0, 9), (9, 11), (11, 23)):
            part, initial_states = scalekern.causal_conv1d(
                x[..., begin:end], weight, bias, None, initial_states, True, "silu"
            )
            parts.append(part)
        return torch.cat(parts, -1), initial_states

    rest = {"activation": "silu", "return_final_states": True}
    with scalekern.backend(any_backend):
        outputs, gradients = run(chunked, tensors, {})
        expected, expected_gradients = run(scalekern.causal_conv1d, tensors, rest)
    for actual, wanted in zip(outputs, expected):
        assert_close(actual, wanted, tolerance=1e-6)
    for name in tensors:
        assert_close(gradients[name], expected_gradients[name], tolerance=1e-5, what=name)


# --- what must not change a result ---


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_every_time_and_on_any_number_of_threads(any_backend, layout):
    size = (1, 3, 40) if INTERPRET else (2, 66, 1500)
    tensors, rest = conv_inputs(*size, 4, dtype=torch.float32, layout=layout)
    found, threads = [], torch.get_num_threads()
    with scalekern.backend(any_backend):
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            outputs, gradients = run(scalekern.causal_conv1d, tensors, rest)
            found.append([*outputs, *gradients.values()])
            torch.set_num_threads(threads)
    repeats = found[1:] if any_backend == "cpu" else found[1:2]  # eager sums depend on the threads
    for other in repeats:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_padding_hides_whatever_lies_in_it(any_backend):
    tensors, rest = conv_inputs(2, 4, 18, 3, dtype=torch.float32, seq=SEQ)
    padded = (rest["seq_idx"] < 0)[:, None]
    rest["return_final_states"] = True
    with scalekern.backend(any_backend):
        clean = run(scalekern.causal_conv1d, tensors, rest)
        tensors["x"] = tensors["x"].masked_fill(padded, float("nan"))
        dirty = run(scalekern.causal_conv1d, tensors, rest)
    for a, b in zip(clean[0], dirty[0]):  # a row that ends with padding has a state of zeros
        assert torch.equal(a, b)
    for name in tensors:
        assert torch.equal(clean[1][name], dirty[1][name]), name
    assert dirty[1]["x"].masked_select(padded).eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_special_values_travel_as_in_the_oracle(any_backend, layout, value):
    tensors, rest = conv_inputs(1, 20, 37, 4, dtype=torch.float32, layout=layout)
    tensors["x"][0, 3, 5] = value
    tensors["x"][0, 7, 36] = value
    tensors["weight"][7, 3] = 0  # 0 * inf is NaN, not 0
    with scalekern.backend(any_backend):
        compare(tensors, rest, torch.float32)


def test_a_wrong_kernel_would_be_seen():
    tensors, rest = conv_inputs(2, 5, 20, 4, dtype=torch.float32)
    exact = reference.causal_conv1d(**{k: upcast(t) for k, t in tensors.items()}, **rest)[0]
    right = exact.float()
    fewer = tensors["weight"].index_fill(1, torch.tensor([0]), 0)
    dropped = reference.causal_conv1d(tensors["x"], fewer, tensors["bias"], activation="silu")
    mutants = {
        "zeroed": torch.zeros_like(right),
        "dropped tap": dropped,
        "shifted in time": right.roll(1, -1),
        "permuted channels": right.roll(1, 1),
        "permuted rows": right.flip(0),
        "one wrong token": right.index_fill(2, torch.tensor([19]), 0),
    }
    assert error(right, exact) < 1e-6
    for name, wrong in mutants.items():
        assert error(wrong, exact) > 2 * TOLERANCE[torch.bfloat16], name  # the widest that any test here allows


# --- the update ---


def update_inputs(B=3, D=5, W=4, K=3, T=1, *, S=None, dtype=torch.float32, state_dtype=None, layout="contiguous"):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    place = LAYOUTS[layout]
    state = place(randn(S or B, D, K, dtype=state_dtype or dtype, seed=1))
    return place(randn(B, D, T, dtype=dtype)), state, randn(D, W, dtype=real, seed=2), randn(D, dtype=real, seed=3)


def compare_update(x, state, weight, bias, dtype, **rest):
    theirs = upcast(state).clone()
    expected = reference.causal_conv1d_update(upcast(x), theirs, upcast(weight), upcast(bias), "silu", **rest)
    out = scalekern.causal_conv1d_update(x, state, weight, bias, "silu", **rest)
    assert out.dtype == x.dtype and out.shape == x.shape
    assert_close(out, expected, tolerance=TOLERANCE[dtype])
    # A backend may carry a float64 state through x's float32.
    assert_close(state, theirs, tolerance=max(TOLERANCE[state.dtype], TOLERANCE[dtype]), what="conv_state")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, K", [(1, 3), (1, 4), (2, 5), (3, 3), (7, 4)])
@pytest.mark.parametrize("circular", [False, True])
def test_update_agrees_with_the_oracle(any_backend, circular, T, K, layout, dtype):
    x, state, weight, bias = update_inputs(K=K, T=T, dtype=dtype, layout=layout)
    rest = {"cache_seqlens": torch.tensor([0, 2, 11], dtype=torch.int32)} if circular else {}
    with scalekern.backend(any_backend):
        compare_update(x, state, weight, bias, dtype, **rest)


@pytest.mark.parametrize("D", CHANNELS)
@pytest.mark.parametrize("W", [2, 4, 8])
@at_levels("baseline", "avx2")
def test_update_sizes(any_backend, W, D):
    with scalekern.backend(any_backend):
        compare_update(*update_inputs(2, D, W, W, 3), torch.float32)


def test_update_of_many_tokens(any_backend):
    with scalekern.backend(any_backend):
        compare_update(*update_inputs(1, 3, 4, 40, 70), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@at_levels("baseline", "avx2")
def test_update_with_another_state_dtype(any_backend, state_dtype, dtype):
    x, state, weight, bias = update_inputs(D=17, dtype=dtype, state_dtype=state_dtype, layout="channels_last")
    with scalekern.backend(any_backend):
        compare_update(x, state, weight, bias, dtype)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("circular", [False, True])
def test_update_of_slots_by_index(any_backend, circular, integers):
    x, state, weight, bias = update_inputs(4, K=4, T=2, S=6)
    slots = torch.tensor([4, -1, 0, 2], dtype=integers)
    rest = {"cache_seqlens": torch.tensor([1, 2, 3, 4], dtype=integers)} if circular else {}
    before = state.clone()
    with scalekern.backend(any_backend):
        compare_update(x, state, weight, bias, torch.float32, conv_state_indices=slots, **rest)
        out = scalekern.causal_conv1d_update(x, before.clone(), weight, bias, "silu", conv_state_indices=slots)
    assert out[1].eq(0).all()
    untouched = [1, 3, 5]
    assert torch.equal(state[untouched], before[untouched])
    assert error(state[[0, 2, 4]], upcast(state)[[4, 0, 2]]) > 0.1  # permuted slots would be seen


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("T", [1, 3])
def test_updates_equal_the_sequence_form(any_backend, T, circular):
    B, D, L, W, K = 2, 5, 12, 4, 5
    tensors, rest = conv_inputs(B, D, L, W, dtype=torch.float32)
    with scalekern.backend(any_backend):
        expected, final = scalekern.causal_conv1d(**tensors, **rest)
        state, parts = torch.zeros(B, D, K), []
        for begin in range(0, L, T):
            seen = torch.full((B,), begin) if circular else None
            step = tensors["x"][..., begin : begin + T]
            step = step[..., 0] if T == 1 else step
            out = scalekern.causal_conv1d_update(step, state, tensors["weight"], tensors["bias"], "silu", seen)
            parts.append(out.reshape(B, D, T))
    assert_close(torch.cat(parts, -1), expected, tolerance=1e-6)
    last = state[..., torch.arange(L - K, L) % K] if circular else state
    assert torch.equal(last[..., 1 - W :], final)


def test_differentiating_through_an_update_raises(any_backend):
    x, state, weight, bias = update_inputs(T=1)
    with scalekern.backend(any_backend):
        out = scalekern.causal_conv1d_update(x[..., 0], state, weight.requires_grad_(), bias)
    with pytest.raises(NotImplementedError, match="causal_conv1d_update"):
        out.sum().backward()


@pytest.mark.skipif(INTERPRET, reason="a check of the CPU kernels")
def test_a_slot_that_does_not_exist_is_refused():
    x, state, weight, bias = update_inputs(2)
    with scalekern.backend("cpu"), pytest.raises(ValueError, match="conv_state_indices must be below 2, got 2"):
        scalekern.causal_conv1d_update(x, state, weight, bias, conv_state_indices=torch.tensor([0, 2]))


def _update(**changes):
    x, state, weight, bias = update_inputs()
    arguments = {"x": x, "conv_state": state, "weight": weight, "bias": bias, **changes}
    return lambda: scalekern.causal_conv1d_update(**arguments)


def _conv(**changes):
    tensors, rest = conv_inputs(dtype=torch.float32)
    return lambda: scalekern.causal_conv1d(**{**tensors, **rest, **changes})


ids = lambda *shape: torch.zeros(shape, dtype=torch.int32)  # noqa: E731
BAD = {
    "x dims": (_conv(x=torch.zeros(5, 20)), ValueError, r"causal_conv1d: x must have 3 dimensions, got shape \(5, 2"),
    "x type": (_conv(x=[1.0]), TypeError, "causal_conv1d: x must be a torch.Tensor, got list"),
    "x dtype": (_conv(x=ids(2, 5, 20)), TypeError, "causal_conv1d: x must have dtype .*, got int32"),
    "weight": (_conv(weight=torch.zeros(4, 4)), ValueError, r"weight must have shape \(5, \*\), got \(4, 4\)"),
    "width": (_conv(weight=torch.zeros(5, 9)), ValueError, r"weight must have a width from 2 to 8, got shape \(5, 9\)"),
    "bias": (_conv(bias=torch.zeros(4)), ValueError, r"causal_conv1d: bias must have shape \(5,\), got \(4,\)"),
    "seq_idx": (_conv(seq_idx=torch.zeros(2, 20)), TypeError, "seq_idx must have dtype int32, int64, got float32"),
    "state": (_conv(initial_states=torch.zeros(2, 5, 4)), ValueError, r"shape \(2, 5, 3\), got \(2, 5, 4\)"),
    "activation": (_conv(activation="gelu"), ValueError, "activation must be one of None, 'silu', 'swish', got 'gelu'"),
    "batch": (_conv(cu_seqlens=torch.tensor([0, 20])), ValueError, "cu_seqlens.* need a batch of 1, got 2"),
    "both": (_conv(cu_seqlens=ids(1), seq_idx=ids(2, 20)), ValueError, "seq_idx and cu_seqlens .* got both"),
    "cu values": (
        _conv(x=torch.zeros(1, 5, 20), cu_seqlens=torch.tensor([0, 9, 4, 20])),
        ValueError,
        r"rise from 0 to 20, got \[0",
    ),
    "update state": (_update(conv_state=torch.zeros(3, 5, 2)), ValueError, "conv_state must hold at least 3 tokens"),
    "update slots": (_update(conv_state=torch.zeros(4, 5, 3)), ValueError, "conv_state must have 3 slots like x"),
    "update seen": (_update(cache_seqlens=ids(2)), ValueError, r"cache_seqlens must have shape \(3,\), got \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
