"""Numerics of selective_state_update on every backend, against the float64 oracle and the scan that it is a step of.

What every op has in common (errors, opcheck, compile, autocast) is in test_contract_calls.py.
Shape letters: S state slots, B batch, H heads, P head dim, N state size, G groups of B and C.
"""

import pytest
import torch
from conftest import INTERPRET, at_levels
from test_causal_conv1d import holes, randn

import scalekern
from scalekern import reference
from scalekern.testing import TOLERANCE, assert_close, error, upcast

DTYPES = [torch.float32] if INTERPRET else [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda t: t,
    "last_two_swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "holes": holes,
}


def inputs(B=2, P=5, N=16, H=None, G=None, *, S=None, dtype=torch.float32, state_dtype=None, layout="contiguous"):
    """The tensors of a call, by name. With heads where H is given."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    place, heads = LAYOUTS[layout], () if H is None else (H,)
    groups = () if G is None else (G,)
    tensors = {
        "state": place(randn(S or B, *heads, P, N, dtype=state_dtype or dtype, seed=1)),
        "x": place(randn(B, *heads, P, dtype=dtype, seed=2)),
        "dt": place(randn(B, *heads, P, dtype=dtype, seed=3)),
        "A": place(-randn(*heads, P, N, seed=4).abs().to(real)),
        "B": place(randn(B, *groups, N, dtype=dtype, seed=5)),
        "C": place(randn(B, *groups, N, dtype=dtype, seed=6)),
    }
    tensors["D"] = randn(*heads, P, dtype=real, seed=7)
    tensors["z"] = place(randn(B, *heads, P, dtype=dtype, seed=8))
    tensors["dt_bias"] = randn(*heads, P, dtype=real, seed=9)
    return tensors


def compare(tensors, dtype, softplus=True, **rest):
    theirs = {k: upcast(t).clone() for k, t in tensors.items()}
    expected = reference.selective_state_update(**theirs, dt_softplus=softplus, **rest)
    out = scalekern.selective_state_update(**tensors, dt_softplus=softplus, **rest)
    state = tensors["state"]
    assert out.dtype == tensors["x"].dtype and out.shape == tensors["x"].shape
    assert_close(out, expected, tolerance=TOLERANCE[dtype])
    assert_close(state, theirs["state"], tolerance=max(TOLERANCE[dtype], TOLERANCE[state.dtype]), what="state")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(None, None), (4, None), (4, 2), (3, 3)], ids=str)
@at_levels("baseline", "avx2")
def test_update_agrees_with_the_oracle(any_backend, heads, layout, dtype):
    with scalekern.backend(any_backend):
        compare(inputs(2, 5, 16, *heads, dtype=dtype, layout=layout), dtype)


@pytest.mark.parametrize("N", [1, 3, 16, 33] if INTERPRET else [1, 2, 3, 4, 7, 8, 15, 16, 17, 32, 64, 100])
@pytest.mark.parametrize("P", [1, 17, 40])
@at_levels("baseline", "avx2")
def test_update_sizes(any_backend, P, N):
    with scalekern.backend(any_backend):
        compare(inputs(2, P, N), torch.float32)


@pytest.mark.skipif(INTERPRET, reason="threads are a matter of the CPU kernels")
def test_update_over_threads(any_backend):
    with scalekern.backend(any_backend):
        compare(inputs(3, 1000, 16), torch.float32)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("missing", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")], ids="-".join)
def test_update_without_the_optional_tensors(any_backend, missing, softplus):
    tensors = {k: t for k, t in inputs().items() if k not in missing}
    tensors["dt"] = tensors["dt"].abs()
    with scalekern.backend(any_backend):
        compare(tensors, torch.float32, softplus)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@at_levels("baseline", "avx2")
def test_update_with_another_state_dtype(any_backend, state_dtype, dtype):
    with scalekern.backend(any_backend):
        compare(inputs(dtype=dtype, state_dtype=state_dtype), dtype)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_update_of_slots_by_index(any_backend, integers):
    tensors = inputs(4, S=6)
    before = tensors["state"].clone()
    slots = torch.tensor([4, -1, 0, 2], dtype=integers)
    with scalekern.backend(any_backend):
        compare(tensors, torch.float32, state_batch_indices=slots)
        out = scalekern.selective_state_update(**{**tensors, "state": before.clone()}, state_batch_indices=slots)
    assert out[1].eq(0).all()
    assert torch.equal(tensors["state"][[1, 3, 5]], before[[1, 3, 5]])
    assert error(tensors["state"][[0, 2, 4]], upcast(tensors["state"])[[4, 0, 2]]) > 0.1  # permuted slots would be seen


def test_update_reads_expanded_tensors_in_place(any_backend):
    """Mamba-2 hands over dt, A and D expanded over the head dim."""
    tensors = inputs(2, 6, 8, 3)
    for name in ("dt", "dt_bias", "D"):
        tensors[name] = tensors[name][..., :1].expand(*tensors[name].shape)
    tensors["A"] = tensors["A"][:, :1, :1].expand(3, 6, 8)
    with scalekern.backend(any_backend):
        compare(tensors, torch.float32)


def test_updates_equal_the_scan(any_backend):
    B, D, L, N = 2, 6, 9, 4
    u, delta, z = (randn(B, D, L, dtype=torch.float32, seed=s) for s in (1, 2, 3))
    Bm, Cm = (randn(B, N, L, dtype=torch.float32, seed=s) for s in (4, 5))
    A = -randn(D, N, dtype=torch.float32, seed=6).abs()
    skip, bias = (randn(D, dtype=torch.float32, seed=s) for s in (7, 8))
    with scalekern.backend(any_backend):
        expected, last = scalekern.selective_scan(u, delta, A, Bm, Cm, skip, z, bias, True, True)
        state, parts = torch.zeros(B, D, N), []
        for t in range(L):
            step = (v[..., t] for v in (u, delta))
            parts.append(
                scalekern.selective_state_update(state, *step, A, Bm[..., t], Cm[..., t], skip, z[..., t], bias, True)
            )
    assert_close(torch.stack(parts, -1), expected, tolerance=2e-6)
    assert_close(state, last, tolerance=2e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "dt", "state"])
@pytest.mark.parametrize("N", [3, 16])
def test_special_values_travel_as_in_the_oracle(any_backend, N, name, value):
    tensors = inputs(2, 20, N)
    tensors[name][1, 4] = value
    with scalekern.backend(any_backend):
        compare(tensors, torch.float32)


def test_same_bits_every_time(any_backend):
    with scalekern.backend(any_backend):
        found = []
        for _ in range(2):
            tensors = inputs(2, 33, 16)
            found.append((scalekern.selective_state_update(**tensors, dt_softplus=True), tensors["state"]))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_differentiating_through_an_update_raises(any_backend):
    tensors = inputs()
    tensors["x"].requires_grad_()
    with scalekern.backend(any_backend):
        out = scalekern.selective_state_update(**tensors)
    with pytest.raises(NotImplementedError, match="selective_state_update"):
        out.sum().backward()


def test_a_wrong_kernel_would_be_seen():
    tensors = inputs(3, 5, 8)

    def oracle(**changes):
        wide = {k: upcast(t).clone() for k, t in {**tensors, **changes}.items()}
        return reference.selective_state_update(**wide, dt_softplus=True)

    exact = oracle()
    mutants = {
        "zeroed": torch.zeros_like(exact),
        "no skip": oracle(D=torch.zeros_like(tensors["D"])),
        "no gate": oracle(z=torch.ones_like(tensors["z"])),
        "old state forgotten": oracle(state=torch.zeros_like(tensors["state"])),
        "permuted channels": exact.roll(1, 1),
        "permuted rows": exact.roll(1, 0),
        "permuted states": oracle(B=tensors["B"].roll(1, -1)),
    }
    for name, wrong in mutants.items():
        assert error(wrong, exact) > 2 * TOLERANCE[torch.bfloat16], name


@pytest.mark.skipif(INTERPRET, reason="a check of the CPU kernels")
def test_a_slot_that_does_not_exist_is_refused():
    with scalekern.backend("cpu"), pytest.raises(ValueError, match="state_batch_indices must be below 2, got 2"):
        scalekern.selective_state_update(**inputs(2), state_batch_indices=torch.tensor([0, 2]))


def test_a_slot_of_no_slots_is_refused():
    """Nothing to do for a kernel, which would look; padding names no slot."""
    x, A, B, weight = torch.randn(2, 6), -torch.rand(6, 4), torch.randn(2, 4), torch.randn(6, 4)
    slots, padding = torch.tensor([0, 1]), torch.tensor([-1, -1])
    with pytest.raises(ValueError, match="selective_state_update: state_batch_indices must be below 0, got 1"):
        scalekern.selective_state_update(torch.zeros(0, 6, 4), x, x, A, B, B, state_batch_indices=slots)
    assert not scalekern.selective_state_update(torch.zeros(0, 6, 4), x, x, A, B, B, state_batch_indices=padding).any()
    with pytest.raises(ValueError, match="causal_conv1d_update: conv_state_indices must be below 1, got 1"):
        scalekern.causal_conv1d_update(x[..., None][..., :0], torch.zeros(1, 6, 3), weight, conv_state_indices=slots)


BAD = {
    "state": (dict(state=torch.zeros(2, 5)), ValueError, r"state must have 3 or 4 dimensions, got shape \(2, 5\)"),
    "x": (dict(x=torch.zeros(2, 4)), ValueError, r"x must have shape \(2, 5\), got \(2, 4\)"),
    "A": (dict(A=torch.zeros(5, 15)), ValueError, r"A must have shape \(5, 16\), got \(5, 15\)"),
    "B": (dict(B=torch.zeros(2, 15)), ValueError, r"B must have shape \(2, 16\), got \(2, 15\)"),
    "B type": (dict(B=None), TypeError, "B must be a torch.Tensor, got NoneType"),
    "dt dtype": (dict(dt=torch.zeros(2, 5, dtype=torch.int64)), TypeError, "dt must have dtype .*, got int64"),
    "slots": (dict(state=torch.zeros(3, 5, 16)), ValueError, "state must have 2 slots like x"),
    "indices": (dict(state_batch_indices=torch.zeros(2)), TypeError, "indices must have dtype int32, int64, got"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=f"selective_state_update: .*{message}"):
        scalekern.selective_state_update(**{**inputs(), **changes})


def test_an_expanded_state_is_refused():
    """All rows would write the one that there is."""
    x, A, B = torch.randn(3, 5), -torch.rand(5, 4), torch.randn(3, 4)
    state, window = torch.zeros(1, 5, 4).expand(3, 5, 4), torch.zeros(1, 5, 3).expand(3, 5, 3)
    with pytest.raises(ValueError, match="selective_state_update: state is changed in place and must not be expanded"):
        scalekern.selective_state_update(state, x, x, A, B, B)
    with pytest.raises(ValueError, match="causal_conv1d_update: conv_state is changed in place and must not be exp"):
        scalekern.causal_conv1d_update(x, window, torch.randn(5, 4))
    scalekern.selective_state_update(torch.zeros(1, 5, 4).expand(1, 5, 4), x[:1], x[:1], A, B[:1], B[:1])


@pytest.mark.parametrize("groups", [(2, 3), (6, 2), (3, 0), (0, 2), (1, 6)], ids=str)
def test_groups_of_each_matrix_are_its_own(groups):
    """B and C with other numbers of groups, 0 for no axis: either is read by its own and not past its end."""
    batch, heads, dim, states = 2, 6, 5, 7
    x, dt, A = torch.randn(batch, heads, dim), torch.rand(batch, heads, dim), -torch.rand(heads, dim, states)
    B, C = (torch.randn(batch, *((g,) if g else ()), states) for g in groups)
    every = lambda m, g: (m if g else m[:, None]).repeat_interleave(heads // max(1, g), 1)  # noqa: E731
    state = torch.randn(batch, heads, dim, states)
    expected, own = state.clone(), state.clone()
    wanted = scalekern.selective_state_update(expected, x, dt, A, every(B, groups[0]), every(C, groups[1]))
    found = scalekern.selective_state_update(own, x, dt, A, B, C)
    assert torch.equal(found, wanted) and torch.equal(own, expected)
    exact = reference.selective_state_update(*(t.double() for t in (state, x, dt, A, B, C)))
    assert (found - exact).norm() <= 1e-5 * exact.norm()
