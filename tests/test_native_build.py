"""The native libraries: what was built loads, device math to the last bits, CUDA kernels in the host emulator, cubins.

Shape letters: B batch, D channels, L length, N states, G groups, W filter width, S slots.
"""

import itertools
import json
import pathlib
import re
import shutil
import subprocess

import cuda_emulation as emulated
import numpy as np
import pytest
import torch

from scalekern import _native
from scalekern.ops import selective_scan as scan_op
from scalekern.reference.causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd, causal_conv1d_update_op
from scalekern.reference.selective_scan import selective_scan_bwd, selective_scan_fwd
from scalekern.reference.selective_state_update import selective_state_update_op as update_reference


ROOT = pathlib.Path(__file__).parents[1]
RESOURCES = pathlib.Path(__file__).with_name("native_resources.json")
_C = pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")

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


# --- device math ---


def ulps(got, exact):
    """Error in units of the last place of float32 at the exact value."""
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(np.asarray(got) - exact) / np.maximum(spacing, np.float64(np.finfo(np.float32).tiny) * 2.0**-23)


def device_math(name, x):
    return np.array(_C.device_math(name, x.astype(np.float32).astype(np.float64).tolist()))


def grid(low, high, count=20001):
    return np.linspace(low, high, count).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    "name, low, high, exact, limit",
    [
        ("exp2_poly", -126, 127.4, np.exp2, 1.5),
        ("exp2_poly", -1e-3, 1e-3, np.exp2, 1.0),
        ("softplus", -80, 40, lambda x: np.logaddexp(0, x), 70.0),  # e^-|x| carries the rounding of x log2 e
        ("softplus", -1, 1, lambda x: np.logaddexp(0, x), 3.0),
        ("sigmoid", -80, 40, lambda x: 1 / (1 + np.exp(-x)), 70.0),
        ("silu", -5, 40, lambda x: x / (1 + np.exp(-x)), 6.0),
        ("silu_slope", 0, 40, lambda x: (1 + np.exp(-x) + x * np.exp(-x)) / (1 + np.exp(-x)) ** 2, 10.0),  # x (1 - gate) cancels
        ("softplus_slope", 1e-6, 30, lambda d: -np.expm1(-d), 3.0),
        ("softplus_slope", 1e-12, 1e-6, lambda d: -np.expm1(-d), 3.0),
    ],
)
def test_device_math_in_ulps(name, low, high, exact, limit):
    x = grid(low, high)
    error = ulps(device_math(name, x), exact(x)).max()
    assert error <= limit, f"{name}: {error:.2f} ulp"


def test_exp2_poly_is_exact_where_a_state_does_not_decay_and_at_integers():
    x = np.arange(-126, 128, dtype=np.float64)
    assert (device_math("exp2_poly", x) == np.exp2(x)).all()
    assert device_math("exp2_poly", np.array([0.0, -0.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["exp2_poly", "exp2_unit", "softplus", "sigmoid", "silu"])
def test_device_math_at_the_edges(name):
    inf = float("inf")
    values = device_math(name, np.array([inf, -inf, float("nan"), -1e30, 1e30]))
    assert np.isnan(values[2])
    expected = {"exp2_poly": [inf, 0, 0, inf], "exp2_unit": [inf, 0, 0, inf], "softplus": [inf, 0, 0, np.float32(1e30)],
                "sigmoid": [1, 0, 0, 1], "silu": [inf, None, 0, np.float32(1e30)]}[name]  # fmt: skip
    for value, want in zip(values[[0, 1, 3, 4]], expected):
        assert want is None or value == want


@pytest.mark.parametrize("name, dtype", [("round_f16", torch.float16), ("round_bf16", torch.bfloat16)])
def test_storage_conversions_equal_torch(name, dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (20000,), generator=generator)
    x = torch.randn(20000, generator=generator) * torch.exp2(exponents.float())
    ties = torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.9, 65520.0, 1e6])
    tiny = torch.tensor([2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 2.0**-14 - 2.0**-26, 0.0, -0.0, float("inf")])
    x = torch.cat([x, ties, -ties, tiny, -tiny])
    assert np.array_equal(_C.device_math(name, x.double().tolist()), x.to(dtype).double().numpy())
    assert np.isnan(_C.device_math(name, [float("nan")])).all()


# --- kernels in the emulator ---

SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def scan_inputs(
    B, D, L, N, dtype=torch.float32, *, groups=(1, 1), optional="Dzbh", softplus=True, cu=None, reverse=False,
    layout="time",
):  # fmt: skip
    """Arguments of selective_scan_fwd without save_checkpoints. groups 0: constant. Channels and groups differ in scale."""
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
        sequence(), delta, A, matrix(groups[0]), matrix(groups[1]), take("D", normal(D, kind=real)), take("z", sequence()),
        take("b", normal(D, kind=real).abs() * 0.2), take("h", normal(rows, D, N, kind=real)),
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


@pytest.mark.parametrize("case", SCAN_CASES)
def test_emulated_scan_forward(case):
    args = scan_inputs(**SCAN_CASES[case])
    want = selective_scan_fwd(*doubled(args), True)
    got = emulated.selective_scan_fwd(*args, True)
    assert_all_close(got[:1], want[:1], ("out",), TOLERANCE[args[0].dtype])
    slots = [0] if args[8] is None else range(want[2].shape[1])  # from zero, the first slot is zero
    exact = TOLERANCE[args[2].dtype]
    assert_all_close(got[1:2], want[1:2], ("last_state",), exact)
    if args[8] is None:
        assert torch.allclose(got[2].double(), want[2], rtol=0, atol=1e-5)
    else:
        assert_all_close([got[2][:, j] for j in slots], [want[2][:, j] for j in slots], [f"slot {j}" for j in slots], exact)


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
    assert_all_close([got[i] for i in (2, 5, 7, 8)], [want[i] for i in (2, 5, 7, 8)], [SCAN[i] for i in (2, 5, 7, 8)], exact)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cu", [None, PACKED + [320], [0, 64, 128, 320]])
def test_emulated_scan_split_over_time(cu, reverse):
    args = scan_inputs(B=1, D=4, L=320, N=16, cu=cu, reverse=reverse)
    want = selective_scan_fwd(*doubled(args), True)
    for processors in (8, 64):  # 64 is enough for a chunk a checkpoint
        got = emulated.selective_scan_fwd(*args, True, processors=processors)
        assert_all_close(got, want, ("out", "last_state", "checkpoints"), TOLERANCE[torch.float32])


def test_emulated_backward_without_some_gradients():
    args = scan_inputs(B=1, D=3, L=20, N=16)
    out, _, checkpoints = selective_scan_fwd(*doubled(args), True)
    call = [torch.ones(out.shape), None, *args[:10], checkpoints.float(), *args[10:]]
    assert_all_close(emulated.selective_scan_bwd(*call), selective_scan_bwd(*doubled(call)), SCAN, 2e-6)


@pytest.mark.parametrize("case", ["plain", "packed_reverse", "many_states", "few_states"])
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


def test_nan_and_infinity_travel_as_in_the_oracle():
    args = scan_inputs(B=1, D=3, L=30, N=16)
    args[0][0, 1, 7] = float("nan")
    args[3][0, 0, 2, 20] = float("inf")
    want = selective_scan_fwd(*doubled(args), False)[0]
    got = emulated.selective_scan_fwd(*args, False)[0]
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any() and want.isfinite().any()


def update_inputs(H, P, N, dtype, state_dtype, *, groups=1, indices=None, B=5, expanded_A=False, optional="Dzb"):
    generator = torch.Generator().manual_seed(H + P + N)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    normal = lambda *shape, kind=dtype: torch.randn(*shape, dtype=torch.float64, generator=generator).to(kind)
    A = -normal(H, P, 1 if expanded_A else N, kind=real).abs()
    take = lambda key, value: value if key in optional else None
    slots = B if indices is None else 7
    return [
        normal(slots, H, P, N, kind=state_dtype), normal(B, H, P), normal(B, H, P), A.expand(H, P, N),
        normal(B, groups, N), normal(B, groups, N), take("D", normal(H, P, kind=real)), take("z", normal(B, H, P)),
        take("b", normal(H, P, kind=real)), indices, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        dict(H=1, P=9, N=16, dtype=torch.float32, state_dtype=torch.float32),
        dict(H=4, P=3, N=5, dtype=torch.bfloat16, state_dtype=torch.float32, groups=2),
        dict(H=2, P=3, N=150, dtype=torch.float16, state_dtype=torch.bfloat16, expanded_A=True),
        dict(H=1, P=40, N=16, dtype=torch.float64, state_dtype=torch.float64, optional=""),
        dict(H=1, P=5, N=8, dtype=torch.float32, state_dtype=torch.float16, indices=torch.tensor([3, -1, 0, 6, 2])),
    ],
    ids=lambda c: f"N{c['N']}_{str(c['dtype'])[6:]}_{str(c['state_dtype'])[6:]}",
)
def test_emulated_state_update(case):
    args = update_inputs(**case)
    mine, oracle = [args[0].clone(), *args[1:]], doubled([args[0].clone(), *args[1:]])
    got, want = emulated.selective_state_update(*mine), update_reference(*oracle)
    assert_all_close([got], [want], ["out"], TOLERANCE[case["dtype"]])
    assert_all_close([mine[0]], [oracle[0]], ["state"], max(TOLERANCE[case["state_dtype"]], TOLERANCE[args[3].dtype]))
    if case.get("indices") is not None:
        untouched = [1, 4, 5]
        assert torch.equal(mine[0][untouched], args[0][untouched]) and got[1].abs().max() == 0


def conv_inputs(B, D, L, W, dtype=torch.float32, *, bias=True, ids=None, cu=None, initial=True, silu=True, layout="time"):
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


# --- what was built ---


def test_what_was_built_loads():
    record = json.loads((_native.library_path("cpu").parent / "build.json").read_text())
    for kind in ("cpu", "cuda"):
        if f"lib/libscalekern_{kind}.so" in record["built"]:
            assert _native.load(kind) is None
        else:
            assert record["skipped"][kind], f"{kind} was neither built nor skipped with a reason"


def setup_functions():
    """The functions of setup.py, without its call of setup()."""
    source = (ROOT / "setup.py").read_text()
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "scalekern_setup"}
    exec(compile(source[: source.rindex("\nsetup(")], "setup.py", "exec"), names)
    return names


def test_a_broken_nvcc_is_one_line(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'nvcc fatal: no cicc' >&2\nexit 1\n")
    broken.chmod(0o755)
    problem = setup_functions()["nvcc_problem"]
    assert problem(str(broken), []) == f"{broken} does not compile: nvcc fatal: no cicc"
    assert "does not run" in problem(str(tmp_path / "absent"), [])


def test_architecture_flags():
    flags = setup_functions()["gencode"]("8.0;9.0a;10.0a+PTX")
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100a,code=sm_100a", "-gencode=arch=compute_100,code=compute_100",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "dtype, states, forward, backward",
    [
        (torch.float32, 128, True, True),
        (torch.float32, 129, True, False),
        (torch.float32, 512, True, False),
        (torch.float32, 513, False, False),
        (torch.float64, 128, True, True),
        (torch.float64, 129, False, False),
    ],
)
def test_what_the_cuda_scan_declines(dtype, states, forward, backward):
    u, A = torch.zeros(1, 2, 3, dtype=dtype), torch.zeros(2, states, dtype=dtype)
    assert (scan_op._cuda_supports_fwd(u, u, A) is None) == forward
    assert (scan_op._cuda_supports_bwd(u, u, A) is None) == backward
    assert scan_op._cuda_supports_fwd(u, u, torch.zeros(2, 4, dtype=torch.complex64))


def test_the_largest_states_that_are_taken():
    args = scan_inputs(B=1, D=2, L=9, N=512)
    want = selective_scan_fwd(*doubled(args), True)
    assert_all_close(emulated.selective_scan_fwd(*args, True), want, ("out", "last_state", "checkpoints"), 2e-6)


CUDA_OPS = (
    "selective_scan_fwd", "selective_scan_bwd", "selective_state_update", "causal_conv1d_fwd", "causal_conv1d_bwd",
    "causal_conv1d_update",
)  # fmt: skip


def needs_cuda_library():
    if shutil.which("nvcc") is None and not pathlib.Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc was not found")
    assert _native.library_path("cuda").exists(), "nvcc is here, but the CUDA library was not built: see setup.py's output"
    return _native.load("cuda")


def test_cuda_library_registers_its_ops_without_a_gpu():
    assert needs_cuda_library() is None
    for op in CUDA_OPS:
        schema = getattr(torch.ops.scalekern_native, f"{op}_cuda").default._schema
        public = getattr(torch.ops.scalekern, op).default._schema
        assert [a.name for a in schema.arguments][-len(public.arguments) :] == [a.name for a in public.arguments]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"scalekern_native::{op}_cuda", "CUDA")


def kernels_in_logs():
    """{arch: {kernel: {registers, spill_bytes}}} out of what ptxas said when the library was built."""
    found = {}
    for log in sorted((ROOT / "build").glob("native-*/obj/cuda/**/*.log")):
        arch = kernel = function = None
        spills = {}
        for line in subprocess.run(["c++filt"], input=log.read_text(), capture_output=True, text=True).stdout.splitlines():
            if entry := re.search(r"Compiling entry function '(.*)' for '(sm_\w+)'", line):
                kernel, arch, spills = entry[1], entry[2], {}
            elif properties := re.search(r"Function properties for (.*)", line):
                function = properties[1]
            elif stores := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                spills[function] = int(stores[1]) + int(stores[2])  # functions that are not inlined have lines of their own
            elif used := re.search(r"Used (\d+) registers", line):
                name = re.search(r"kernel_entry<(.*?) ?>\(", kernel)[1].replace("scalekern::", "").replace("device::", "")
                found.setdefault(arch, {})[name] = {"registers": int(used[1]), "spill_bytes": sum(spills.values())}
    return found


def test_kernels_keep_to_their_registers():
    """Registers may drift by 8 (another compiler), spills by nothing; each recorded spill has its reason in the file.

    To record anew: python tests/test_native_build.py
    """
    needs_cuda_library()
    recorded, found = json.loads(RESOURCES.read_text()), kernels_in_logs()
    if not found:
        pytest.skip("no compiler logs beside the build (the library was installed from a wheel)")
    for arch, kernels in found.items():
        assert arch in recorded["kernels"] or arch not in ("sm_80", "sm_90a", "sm_100a"), f"{arch} is not recorded"
        for name, used in kernels.items():
            limit = recorded["kernels"].get(arch, {}).get(name)
            if limit is None and arch not in recorded["kernels"]:
                continue  # an architecture that the user asked for
            assert limit is not None, f"{name} on {arch} is not recorded"
            assert used["registers"] <= limit["registers"] + 8, f"{name} on {arch}: {used}, recorded {limit}"
            assert used["spill_bytes"] <= limit["spill_bytes"], f"{name} on {arch}: {used}, recorded {limit}"
            family = name.partition("<")[0]
            assert limit["spill_bytes"] == 0 or family in recorded["reasons"], f"{family} spills without a reason"


def record_resources():
    old = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {"reasons": {}}
    record = {"reasons": old["reasons"], "kernels": kernels_in_logs()}
    RESOURCES.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record_resources()
