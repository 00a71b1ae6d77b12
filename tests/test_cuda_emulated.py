"""The CUDA kernels against the oracles without a GPU: their own source, run by the host emulator of scalekern._C.

Shape letters: B batch, D channels, L length, N states, G groups, W filter width, S slots.
"""

import itertools

import cuda_emulation as emulated
import pytest
import torch

from scalekern.ops import selective_scan as scan
from scalekern.reference.causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd, causal_conv1d_update_op
from scalekern.reference.selective_scan import selective_scan_bwd, selective_scan_fwd

pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")

# Against the float64 oracle on the same rounded inputs: float32 arithmetic, then one rounding to the io dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def relative_error(got, want):
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    assert want.norm() > 0, "an oracle of zeros would prove nothing"
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_all_close(got, want, names, tolerance):
    errors = {name: relative_error(g, w) for name, g, w in zip(names, got, want) if w.numel()}
    assert all(e <= tolerance for e in errors.values()), errors


def doubled(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def scan_inputs(
    B, D, L, N, dtype=torch.float32, *, groups=(1, 1), optional="Dzbh", softplus=True, cu=None, reverse=False,
    layout="time",
):  # fmt: skip
    """Arguments of selective_scan_fwd, without save_checkpoints. groups 0: constant. Groups differ in scale."""
    generator = torch.Generator().manual_seed(B * 1000 + D * 100 + L + N)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(kind)

    def sequence():
        x = normal(B, D, L) * torch.linspace(0.5, 1.5, D)[:, None].to(dtype)
        if layout == "channel":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "offset":  # rows that are not aligned, between poisoned neighbours
            wide = torch.full((B, D, L + 5), float("nan"), dtype=dtype)
            wide[:, :, 3 : L + 3] = x
            return wide[:, :, 3 : L + 3]
        return x

    def matrix(g):
        if g == 0:
            return normal(D, N)
        m = normal(B, g, N, L) * torch.logspace(-0.5, 0.5, g)[:, None, None].to(dtype)
        return m.transpose(2, 3).contiguous().transpose(2, 3) if layout == "channel" else m

    rows = B if cu is None else len(cu) - 1
    delta = sequence() * 0.5 if softplus else sequence().abs() * 0.3
    A = -torch.rand(D, N, dtype=torch.float64, generator=generator).to(real) * 2 - 0.05
    take = lambda key, value: value if key in optional else None
    return [
        sequence(), delta, A, matrix(groups[0]), matrix(groups[1]), take("D", normal(D, kind=real)),
        take("z", sequence()), take("b", normal(D, kind=real).abs() * 0.2), take("h", normal(rows, D, N, kind=real)),
        None if cu is None else torch.tensor(cu, dtype=torch.int32), softplus, reverse,
    ]  # fmt: skip


PACKED = [0, 0, 5, 6, 64, 70, 70, 141, 141]
SCAN_CASES = {
    "plain": dict(B=2, D=8, L=70, N=16),
    "reverse": dict(B=2, D=5, L=70, N=16, reverse=True),
    "channels_last_bf16": dict(B=2, D=5, L=45, N=16, dtype=torch.bfloat16, layout="channel"),
    "channels_last_aligned": dict(B=1, D=16, L=40, N=16, dtype=torch.float16, layout="channel", reverse=True),
    "offset_rows": dict(B=1, D=3, L=41, N=16, layout="offset"),
    "more_channels_than_a_block": dict(B=1, D=131, L=19, N=16),
    "few_states": dict(B=2, D=7, L=33, N=3, dtype=torch.float16),
    "one_of_everything": dict(B=1, D=1, L=1, N=1),
    "float64": dict(B=1, D=6, L=67, N=5, dtype=torch.float64, reverse=True),
    "float64_many_states": dict(B=1, D=2, L=66, N=100, dtype=torch.float64),
    "groups": dict(B=1, D=12, L=20, N=20, groups=(2, 3)),
    "constant_B": dict(B=2, D=4, L=20, N=16, groups=(0, 2), softplus=False),
    "constant_C": dict(B=2, D=4, L=20, N=40, groups=(1, 0)),
    "constant_both_bare": dict(B=1, D=3, L=20, N=4, groups=(0, 0), optional=""),
    "many_states": dict(B=1, D=10, L=131, N=128, dtype=torch.bfloat16),
    "packed": dict(B=1, D=6, L=141, N=16, cu=PACKED),
    "packed_reverse": dict(B=1, D=6, L=141, N=16, cu=PACKED, reverse=True),
    "packed_without_states": dict(B=1, D=3, L=141, N=6, cu=PACKED, optional="z"),
}
# Rows along time, whole groups of 8 tokens, at most 16 states: the kernels of cuda_scan_*_rows.cuh.
ROWS = {
    "rows": dict(B=2, D=70, L=72, N=16),
    "rows_reverse": dict(B=1, D=17, L=200, N=16, reverse=True),
    "rows_reverse_bf16": dict(B=3, D=130, L=200, N=16, dtype=torch.bfloat16, reverse=True),
    "rows_of_one_group": dict(B=1, D=15, L=8, N=16),
    "rows_of_one_token_group_and_state": dict(B=1, D=1, L=8, N=1),
    "rows_of_one_tile_bf16": dict(B=2, D=17, L=64, N=16, dtype=torch.bfloat16),
    "rows_of_one_tile_and_a_group": dict(B=1, D=130, L=72, N=16, dtype=torch.float16),
    "rows_of_one_state": dict(B=2, D=1, L=72, N=1),
    "rows_of_five_states_bf16": dict(B=2, D=9, L=64, N=5, dtype=torch.bfloat16),
    "rows_of_five_states_f16": dict(B=3, D=17, L=200, N=5, dtype=torch.float16, optional="zh"),
    "rows_half_reverse": dict(B=1, D=20, L=72, N=12, dtype=torch.float16, reverse=True),
    "rows_groups": dict(B=1, D=6, L=200, N=16, groups=(2, 3)),
    "rows_groups_bf16": dict(B=1, D=130, L=72, N=16, groups=(2, 1), dtype=torch.bfloat16),
    "rows_reverse_groups": dict(B=2, D=12, L=72, N=5, groups=(3, 2), reverse=True),
    "rows_bare": dict(B=3, D=4, L=64, N=16, optional="", softplus=False),
    "rows_bare_long": dict(B=1, D=15, L=136, N=16, optional="", softplus=False),
}
SCAN_CASES |= ROWS


@pytest.mark.parametrize("case", SCAN_CASES)
def test_the_fast_kernels_take_rows_and_nothing_else(case):
    """Otherwise the cases of rows would show that the general kernels are right."""
    from scalekern import _C

    args = scan_inputs(**SCAN_CASES[case])
    _C.emulated_kernels()
    out, _, checkpoints = emulated.selective_scan_fwd(*args, True)
    forward = _C.emulated_kernels()
    emulated.selective_scan_bwd(torch.ones_like(out), None, *args[:10], checkpoints, *args[10:])
    for kernels, name in ((forward, "scan::ScanFwd"), (_C.emulated_kernels(), "scan::ScanBwd")):
        assert any(f"{name}Rows<" in k for k in kernels) == (case in ROWS), kernels
        assert any(f"{name}<" in k for k in kernels) != (case in ROWS), kernels


@pytest.mark.parametrize("case", SCAN_CASES)
def test_emulated_scan_forward(case):
    args = scan_inputs(**SCAN_CASES[case])
    want = selective_scan_fwd(*doubled(args), True)
    got = emulated.selective_scan_fwd(*args, True)
    assert_all_close(got[:1], want[:1], ("out",), TOLERANCE[args[0].dtype])
    exact = TOLERANCE[args[2].dtype]
    assert_all_close(got[1:2], want[1:2], ("last_state",), exact)
    if args[8] is None:  # the first slot is zero, and so has no relative error
        assert torch.allclose(got[2].double(), want[2], rtol=0, atol=1e-5)
    else:
        got_slots, want_slots = ([x[2][:, j] for j in range(want[2].shape[1])] for x in (got, want))
        assert_all_close(got_slots, want_slots, [f"slot {j}" for j in range(len(want_slots))], exact)


@pytest.mark.parametrize("case", SCAN_CASES)
def test_emulated_scan_backward(case):
    args = scan_inputs(**SCAN_CASES[case])
    out, last, checkpoints = selective_scan_fwd(*doubled(args), True)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(args[0].dtype)
    dlast = torch.randn(last.shape, dtype=torch.float64, generator=generator).to(args[2].dtype)
    call = [dout, dlast, *args[:10], checkpoints.to(args[2].dtype), *args[10:]]
    want = selective_scan_bwd(*doubled(call))
    got = emulated.selective_scan_bwd(*call)
    assert_all_close(got, want, SCAN, TOLERANCE[args[0].dtype])
    exact = TOLERANCE[args[2].dtype]  # what is summed and stored in float32 must not hide behind the io dtype
    pick = lambda values: [values[i] for i in (2, 5, 7, 8)]
    assert_all_close(pick(got), pick(want), pick(SCAN), exact)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("N", [16, 5])
@pytest.mark.parametrize("cu", [None, PACKED + [328], [0, 64, 128, 328]])
def test_emulated_scan_split_over_time(cu, N, reverse):
    args = scan_inputs(B=1, D=4, L=328, N=N, cu=cu, reverse=reverse)
    want = selective_scan_fwd(*doubled(args), True)
    for processors in (8, 64):  # 64 is enough for a chunk a checkpoint
        got = emulated.selective_scan_fwd(*args, True, processors=processors)
        assert_all_close(got, want, ("out", "last_state", "checkpoints"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", ["channels_beside_each_other", "rows", "packed", "constant_both_bare"])
def test_the_kernels_get_rows_where_that_makes_them_fast(case):
    """in_rows: same results in the caller's layout; general calls reach the kernel as they came."""
    cases = SCAN_CASES | {"channels_beside_each_other": dict(B=2, D=6, L=72, N=16, layout="channel")}
    args = scan_inputs(**cases[case])
    out, last, checkpoints = selective_scan_fwd(*doubled(args), True)
    seen = []

    def watched(name):
        def fill(*tensors):
            seen.append([t.stride(-1) for t in tensors if isinstance(t, torch.Tensor) and t.dim() >= 3])
            count = {"selective_scan_fwd": 3, "selective_scan_bwd": 9}[name]
            emulated.fill(name, tensors[:count], tensors[count:])

        fill.native_op = name
        return fill

    outputs = emulated._poisoned(scan._allocate_fwd(*args, True))
    scan.in_rows(watched("selective_scan_fwd"), *scan._FWD)(*outputs, *args, True)
    assert_all_close(outputs[:2], (out, last), ("out", "last_state"), TOLERANCE[args[0].dtype])
    dout = torch.empty_like(args[0]).copy_(torch.linspace(-1, 2, out.numel()).reshape(out.shape))
    call = [*args[:10], checkpoints.to(args[2].dtype), *args[10:]]
    gradients = emulated._poisoned(scan._allocate_bwd(dout, None, *call))
    scan.in_rows(watched("selective_scan_bwd"), *scan._BWD)(*gradients, dout, None, *call)
    want = selective_scan_bwd(*doubled([dout, None, *call]))
    assert_all_close(gradients, want, SCAN, TOLERANCE[args[0].dtype])
    assert outputs[0].stride() == args[0].stride() and gradients[0].stride() == args[0].stride()
    if case == "channels_beside_each_other":  # dB and dC, which any kernel writes as they lie, are the exception
        assert args[0].stride(-1) == 6 and set(seen[0]) == {1} and sum(s != 1 for s in seen[1]) == 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 320, 16), (1, 70, 136, 5), (1, 3, 64, 16)], ids=str)
def test_emulated_backward_split_over_time(shape, reverse):
    args = scan_inputs(*shape, reverse=reverse)
    out, last, checkpoints = selective_scan_fwd(*doubled(args), True)
    dout, dlast = (torch.linspace(-1, 2, x.numel()).reshape(x.shape) for x in (out, last))
    call = [dout, dlast, *args[:10], checkpoints.float(), *args[10:]]
    want = selective_scan_bwd(*doubled(call))
    for processors in (1, 64):  # 64 is enough for a chunk a tile
        found = emulated.selective_scan_bwd(*call, processors=processors)
        assert_all_close(found, want, SCAN, TOLERANCE[torch.float32])


def test_emulated_backward_without_some_gradients():
    args = scan_inputs(B=1, D=3, L=20, N=16)
    out, _, checkpoints = selective_scan_fwd(*doubled(args), True)
    call = [torch.ones(out.shape), None, *args[:10], checkpoints.float(), *args[10:]]
    assert_all_close(emulated.selective_scan_bwd(*call), selective_scan_bwd(*doubled(call)), SCAN, 2e-6)


@pytest.mark.parametrize("case", ["plain", "packed_reverse", "many_states", "few_states", "rows", "rows_half_reverse"])
def test_thread_order_changes_no_bit(case):
    """A missing barrier would show: fibers run in other orders, and asynchronous copies land late."""
    args = scan_inputs(**SCAN_CASES[case])
    forward = [emulated.selective_scan_fwd(*args, True, processors=4, order=o) for o in emulated.ORDERS]
    dout = torch.ones_like(args[0])
    backward = [
        emulated.selective_scan_bwd(dout, None, *args[:10], forward[0][2], *args[10:], order=o) for o in emulated.ORDERS
    ]
    for runs in (forward, backward):
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("optional", ["Dzbh", "zbh"])  # 0 * Inf for an absent D would be NaN
@pytest.mark.parametrize("N", [1, 3, 5, 16, 20])
@pytest.mark.parametrize("L", [30, 32])
def test_infinite_inputs_make_no_nan_of_padded_states(L, N, optional, reverse):
    args = scan_inputs(B=1, D=3, L=L, N=N, optional=optional, reverse=reverse)
    args[0][0, 1, 7] = float("inf")
    args[3].abs_(), args[4].abs_()  # or states of either sign make NaN
    args[4][0, 0, :, 9] *= -1
    want = selective_scan_fwd(*doubled(args), True)
    for got, expected in zip(emulated.selective_scan_fwd(*args, True), want):
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    assert want[0].isinf().any() and not want[1].isnan().any()


@pytest.mark.parametrize("L", [30, 32])
def test_nan_and_infinity_travel_as_in_the_oracle(L):
    args = scan_inputs(B=1, D=3, L=L, N=16)
    args[0][0, 1, 7] = float("nan")
    args[3][0, 0, 2, 20] = float("inf")
    want = selective_scan_fwd(*doubled(args), False)[0]
    got = emulated.selective_scan_fwd(*args, False)[0]
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any() and want.isfinite().any()


def conv_inputs(
    B, D, L, W, dtype=torch.float32, *, bias=True, ids=None, cu=None, initial=True, silu=True, layout="time"
):  # fmt: skip
    generator = torch.Generator().manual_seed(B + D + L + W)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    normal = lambda *shape, kind=dtype: torch.randn(*shape, dtype=torch.float64, generator=generator).to(kind)
    x = normal(B, D, L)
    if layout == "channel":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        x = normal(B, 2 * D, 2 * L)[:, ::2, 1::2]
    rows = B if cu is None else len(cu) - 1
    return [
        x, normal(D, W, kind=real), normal(D, kind=real) if bias else None, ids,
        None if cu is None else torch.tensor(cu), normal(rows, D, W - 1) if initial else None, silu,
    ]  # fmt: skip


IDS = torch.tensor([[0] * 3 + [1] * 30 + [-1] * 2 + [4] * 65, [-1] * 40 + [0] * 57 + [3] * 3], dtype=torch.int32)
CONV_CASES = {
    "width_4": dict(B=2, D=5, L=100, W=4),
    "width_3_bare": dict(B=2, D=3, L=64, W=3, bias=False, initial=False, silu=False),
    "width_8_bf16": dict(B=1, D=3, L=96, W=8, dtype=torch.bfloat16),
    "longer_than_the_lanes": dict(B=2, D=2, L=2056, W=4, dtype=torch.bfloat16),
    "longer_than_the_lanes_odd": dict(B=1, D=3, L=1301, W=3, initial=False),
    "many_rows_of_a_channel_in_one_sum": dict(B=2, D=130, L=264, W=4, dtype=torch.float16, initial=False),
    "width_2_float64": dict(B=1, D=3, L=50, W=2, dtype=torch.float64),
    "odd_length": dict(B=2, D=3, L=101, W=4, dtype=torch.float16),
    "shorter_than_the_filter": dict(B=2, D=3, L=2, W=6),
    "channels_last": dict(B=2, D=8, L=50, W=4, layout="channel"),
    "channels_last_odd_bf16": dict(B=1, D=11, L=50, W=5, dtype=torch.bfloat16, layout="channel"),
    "channels_last_many": dict(B=1, D=136, L=33, W=4, dtype=torch.float16, layout="channel"),
    "strided": dict(B=1, D=4, L=60, W=4, layout="strided"),
    "seq_idx": dict(B=2, D=3, L=100, W=4, ids=IDS),
    "seq_idx_channels_last": dict(B=2, D=8, L=100, W=7, ids=IDS.long(), layout="channel"),
    "packed": dict(B=1, D=3, L=141, W=4, cu=PACKED),
    "packed_channels_last": dict(B=1, D=8, L=141, W=8, cu=PACKED, layout="channel", initial=False),
}
CONV = ("x", "weight", "bias", "initial_states")


@pytest.mark.parametrize("case", CONV_CASES)
def test_emulated_convolution(case):
    args = conv_inputs(**CONV_CASES[case])
    tolerance = TOLERANCE[args[0].dtype]
    want = causal_conv1d_fwd(*doubled(args))
    assert_all_close(emulated.causal_conv1d_fwd(*args), want, ("out", "final_states"), tolerance)
    generator = torch.Generator().manual_seed(2)
    dout, dfinal = (torch.randn(w.shape, dtype=torch.float64, generator=generator).to(args[0].dtype) for w in want)
    for gradients in ([dout, dfinal], [dout, None]):
        want_bwd = causal_conv1d_bwd(*doubled([*gradients, *args]))
        for processors, order in ((1, "rising"), (8, "shuffled")):
            got = emulated.causal_conv1d_bwd(*gradients, *args, processors=processors, order=order)
            assert_all_close(got, want_bwd, CONV, tolerance)
            assert_all_close(got[1:3], want_bwd[1:3], CONV[1:3], TOLERANCE[args[1].dtype])


@pytest.mark.parametrize("steps, size, circular", list(itertools.product((1, 3, 6), (3, 5), (False, True))))
def test_emulated_convolution_update(steps, size, circular):
    generator = torch.Generator().manual_seed(steps)
    state = torch.randn(6, 5, size, generator=generator).to(torch.bfloat16)
    x = torch.randn(3, 5, steps, generator=generator)
    weight, bias = torch.randn(5, 4, generator=generator), torch.randn(5, generator=generator)
    lengths = torch.tensor([4, 0, 17], dtype=torch.int32) if circular else None
    slots = torch.tensor([2, -1, 5])
    mine, oracle = state.clone(), state.double()
    got = emulated.causal_conv1d_update(mine, x, weight, bias, lengths, slots, True)
    want = causal_conv1d_update_op(oracle, x.double(), weight.double(), bias.double(), lengths, slots, True)
    # A token of this call reaches the state in bfloat16 but the outputs as it came.
    assert_all_close([got, mine], [want, oracle.to(torch.bfloat16)], ("out", "state"), 2e-6)
    assert torch.equal(mine[[0, 1, 3, 4]], state[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width, size, slots", [(4, 3, False), (4, 4, True), (2, 3, True), (3, 4, False)])
def test_emulated_convolution_step(width, size, slots, dtype):
    """One token, the shapes that decoding has: channels four at a time, rows two at a time."""
    generator = torch.Generator().manual_seed(width)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    state, x, weight, bias = normal(8, 12, size).to(dtype), normal(7, 12, 1).to(dtype), normal(12, width), normal(12)
    slots = torch.tensor([7, -1, 0, 3, -1, 5, 2]) if slots else None
    mine, oracle = state.clone(), state.double()
    got = emulated.causal_conv1d_update(mine, x, weight, bias, None, slots, True)
    want = causal_conv1d_update_op(oracle, x.double(), weight.double(), bias.double(), None, slots, True)
    assert_all_close([got], [want], ["out"], TOLERANCE[dtype])
    assert torch.equal(mine, oracle.to(dtype)) and not torch.equal(mine, state)
    assert slots is None or got[slots < 0].abs().max() == 0


@pytest.mark.parametrize("broken", ["zeros", "dropped_skip", "permuted_groups"])
def test_the_comparison_notices(broken):
    args = scan_inputs(B=1, D=4, L=20, N=16, groups=(2, 2))
    want = selective_scan_fwd(*doubled(args), False)[0]
    if broken == "dropped_skip":
        args[5] = torch.zeros_like(args[5])
    if broken == "permuted_groups":
        args[3] = args[3].flip(1)
    got = emulated.selective_scan_fwd(*args, False)[0]
    got = torch.zeros_like(got) if broken == "zeros" else got
    assert relative_error(got, want) > 100 * TOLERANCE[torch.float32]


def test_the_largest_states_that_are_taken():
    args = scan_inputs(B=1, D=2, L=9, N=512)
    want = selective_scan_fwd(*doubled(args), True)
    assert_all_close(emulated.selective_scan_fwd(*args, True), want, ("out", "last_state", "checkpoints"), 2e-6)


# --- the emulator's own detectors: bind_emulator_faults.h rotates 128 numbers, with a defect by choice ---

ROTATED = [*range(1, 128), 0]


def rotate(fault, order):
    from scalekern import _C

    return _C.emulate_fault(fault, emulated.ORDERS[order])


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("sound", ["", "copy", "group"])
def test_the_emulator_lets_a_sound_kernel_pass(sound, order):
    assert rotate(sound, order) == ROTATED


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize(
    "fault, spoiled",
    [
        ("element is not written", {4}),  # its neighbour reads poison
        ("copy is not waited for", set(range(128))),
    ],
)
def test_the_emulator_poisons_shared_memory(fault, spoiled, order):
    assert {i for i, x in enumerate(rotate(fault, order)) if x != x} == spoiled


def test_copies_in_groups_land_as_late_and_as_early_as_they_may():
    """All of them late in rising order, at once in falling order, either in the shuffled one."""
    late = {order: sum(x != x for x in rotate("group is not waited for", order)) for order in emulated.ORDERS}
    assert late["rising"] == 128 and late["falling"] == 0 and 0 < late["shuffled"] < 128, late
    early = {order: sum(x == 0 for x in rotate("group over what is read", order)) for order in emulated.ORDERS}
    assert early["rising"] == 1 and early["falling"] > 90 and 1 < early["shuffled"] < 128, early  # one is a 0


def test_the_emulator_shows_a_missing_barrier_in_every_order():
    """A thread that reads its right neighbour's element too early: nearly all do, only the last one, or some."""
    poisoned = {order: sum(x != x for x in rotate("no barrier", order)) for order in emulated.ORDERS}
    assert poisoned["rising"] == 127 and poisoned["falling"] == 1 and 1 < poisoned["shuffled"] < 127, poisoned


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize(
    "fault, message",
    [
        ("barrier skipped by a thread", "a barrier or shuffle that not every thread reaches"),
        ("write past the end", "a write past the end of shared memory"),
        ("copy is misaligned", "misaligned asynchronous copy"),
    ],
)
def test_the_emulator_refuses(fault, message, order):
    with pytest.raises(RuntimeError, match=message):
        rotate(fault, order)
    assert rotate("", order) == ROTATED  # and is sound afterwards
