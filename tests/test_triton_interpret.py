"""The Triton kernels themselves, run by Triton's interpreter on CPU tensors, against the float64 oracles.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton:
    TRITON_INTERPRET=1 python -m pytest tests/test_triton_interpret.py
The interpreter spends about a millisecond an operation, so shapes are tiny; every branch of the kernels is taken.
"""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")


if triton.__version__ < "3.7":
    try:
        int(np.array([1]))
    except TypeError:
        reason = f"Triton {triton.__version__}'s interpreter does not run with NumPy {np.__version__}"
        pytest.skip(reason, allow_module_level=True)

import scalekern  # noqa: E402
from scalekern import reference  # noqa: E402
from scalekern.ops.selective_scan import selective_scan_bwd, selective_scan_fwd  # noqa: E402
from scalekern.triton_kernels import selective_scan as scan_fwd_module  # noqa: E402
from scalekern.triton_kernels import selective_scan_bwd as scan_bwd_module  # noqa: E402

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Everything runs on the Triton backend, and outputs begin as NaN."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with scalekern.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def assert_close(found, expected, dtype, what=""):
    """Relative L2 error by the reference's norm: an all-zero result fails."""
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    norm = expected.double().norm()
    error = (found.double() - expected.double()).norm() / norm if norm > 0 else found.double().norm()
    # ddelta_bias adds terms of both signs over all tokens: 2.6e-6 in float32 on a machine with another exp.
    allowed = TOLERANCE[dtype] * (2.5 if what == "ddelta_bias" and dtype == torch.float32 else 1)
    assert error <= allowed, f"{what}: relative error {error:.2e} for {dtype}"


def double(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def trainable(value):
    return value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def randn(*shape, dtype=F32):
    """Normal numbers, each leading index with its own scale, so that permuted channels or groups are seen."""
    value = torch.randn(shape, dtype=F64)
    return (value * torch.rand(shape[:2] + (1,) * (len(shape) - 2)).add(0.3)).to(dtype) if shape else value


def compare(op, oracle, args, kwargs, dtype, names):
    """Outputs, and gradients of every floating input through all outputs at once."""
    inputs, options = [trainable(a) for a in args], {k: trainable(v) for k, v in kwargs.items()}
    inputs64, options64 = [double(a) for a in inputs], {k: double(v) for k, v in options.items()}
    found, expected = op(*inputs, **options), oracle(*inputs64, **options64)
    found, expected = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (found, expected))
    weights = [torch.randn_like(r) for r in expected]
    for i, (f, e) in enumerate(zip(found, expected)):
        assert_close(f, e, dtype, f"output {i}")
    leaves = [x for x in (*inputs, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    leaves64 = [x for x in (*inputs64, *options64.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(sum((f * w.to(f.dtype)).sum() for f, w in zip(found, weights)), leaves)
    # The weights as the kernel saw them: rounded to the output's dtype.
    weights = [w.to(f.dtype).double() for f, w in zip(found, weights)]
    gradients64 = torch.autograd.grad(sum((e * w).sum() for e, w in zip(expected, weights)), leaves64)
    assert len(names) == len(leaves)
    for name, g, g64 in zip(names, gradients, gradients64):
        assert_close(g, g64, dtype, f"d{name}")


# --- scans over 8-bit inputs ------------------------------------------------------------------------------------------


def codes(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("parts", (1, 3), ids=("whole", "split"))
def test_scan_over_codes(parts, monkeypatch):
    """Two blocks of channels of each of two groups, a partial one and a partial tile; time in parts; packed."""
    torch.manual_seed(0)
    B, D, L, N, G = 1, 70, 37, 5, 2
    if parts > 1:
        monkeypatch.setattr(scan_fwd_module, "_parts", lambda warps, length, chunk: (3, 16))
    inputs = [codes(B, D, L), randn(B, D, L), -torch.rand(D, N) - 0.1, codes(B, G, N, L), codes(B, G, N, L),
              *(torch.rand(n) / 50 for n in (D, G, G)), randn(D), randn(B, D, L), randn(D) - 1, True, True]  # fmt: skip
    for options in ({"reverse": True}, {"cu_seqlens": torch.tensor([0, 9, 9, 30, L])})[: 1 if parts > 1 else 2]:
        found = scalekern.quantized_selective_scan(*inputs, **options)
        for f, e in zip(found, reference.quantized_selective_scan(*(double(x) for x in inputs), **options)):
            assert_close(f, e, F32)


def test_step_of_an_8_bit_state():
    torch.manual_seed(0)
    B, H, P, N = 2, 2, 300, 9
    state, scale = codes(3, H, P, N), torch.rand(H, P) / 50
    scale[0, 1] = 0
    rest = randn(B, H, P), torch.rand(B, H, P), -torch.rand(H, P, N), randn(B, 1, N), randn(B, 1, N)
    wide, slots = state.clone(), torch.tensor([2, 0])
    out = scalekern.quantized_state_update(state, *rest, scale, state_batch_indices=slots)
    expected = reference.quantized_state_update(
        wide, *(double(t) for t in rest), double(scale), state_batch_indices=slots
    )  # fmt: skip
    assert_close(out, expected, F32)
    gap = (state.long() - wide.long()).abs()
    assert gap.max() <= 1 and gap.sum() < 5 and not state[[0, 2], 0, 1].any()


# --- selective_scan ---------------------------------------------------------------------------------------------------


def scan_inputs(B=2, D=5, L=9, N=4, G=1, dtype=F32, B_constant=False, C_constant=False, full=True):
    real = F64 if dtype == F64 else F32
    matrix = lambda constant: randn(D, N, dtype=dtype) if constant else randn(B, G, N, L, dtype=dtype)
    A = -torch.rand(D, N, dtype=real) * torch.arange(1, N + 1)
    inputs = [randn(B, D, L, dtype=dtype), randn(B, D, L, dtype=dtype), A, matrix(B_constant), matrix(C_constant)]
    optional = [randn(D, dtype=real), randn(B, D, L, dtype=dtype), randn(D, dtype=real) - 1] if full else [None] * 3
    return inputs + optional


SCAN_NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]


def check_scan(inputs, softplus=True, dtype=F32, **options):
    names = [n for n, x in zip(SCAN_NAMES, inputs) if x is not None]
    names += ["initial_state"] if options.get("initial_state") is not None else []
    compare(
        scalekern.selective_scan, reference.selective_scan, [*inputs, softplus, True], options, dtype, names
    )  # fmt: skip


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("dtype", (F64, F32, F16, BF16))
def test_scan_dtypes(dtype, reverse):
    torch.manual_seed(0)
    check_scan(scan_inputs(dtype=dtype), dtype=dtype, reverse=reverse)


@pytest.mark.parametrize(
    "shape",
    (
        dict(N=1, L=1, D=1), dict(N=5, D=1, L=3), dict(N=40, L=4, B=1), dict(N=3, G=2, D=6, L=4), dict(G=5, B=1, L=4),
        dict(L=2, D=33, N=16),
        dict(G=2, D=6, B_constant=True, L=5), dict(C_constant=True, L=5),
        dict(B_constant=True, C_constant=True, full=False, L=5),
        dict(full=False, L=17, B=1),
    ),
    ids=str,
)  # fmt: skip
def test_scan_shapes(shape):
    torch.manual_seed(1)
    inputs = scan_inputs(**shape)
    rows, (channels, states) = inputs[0].shape[0], inputs[2].shape
    check_scan(inputs, softplus=shape.get("full", True), initial_state=randn(rows, channels, states))


def test_scan_different_groups_of_B_and_C():
    torch.manual_seed(2)
    inputs = scan_inputs(D=6, L=5, G=2)
    inputs[4] = randn(2, 3, 4, 5)
    check_scan(inputs)


@pytest.mark.parametrize("reverse", (False, True))
def test_scan_across_checkpoints(reverse):
    """L beyond one chunk (64 tokens), and not a multiple of a tile."""
    torch.manual_seed(3)
    inputs = scan_inputs(B=1, D=2, L=71, N=2)
    check_scan(inputs, reverse=reverse, initial_state=randn(1, 2, 2))


@pytest.mark.parametrize("reverse, index", ((False, torch.int32), (True, torch.int64)))
def test_scan_packed(reverse, index):
    torch.manual_seed(4)
    bounds = torch.tensor([0, 0, 3, 5, 5, 66, 69], dtype=index)
    inputs = scan_inputs(B=1, D=2, L=69, N=3)
    check_scan(inputs, cu_seqlens=bounds, reverse=reverse, initial_state=randn(6, 2, 3))


def test_scan_strides_in_place():
    torch.manual_seed(5)
    inputs = scan_inputs(L=6)
    inputs[0] = randn(2, 6, 5).transpose(1, 2)  # channels-last
    inputs[1] = randn(2, 1, 6).expand(2, 5, 6)
    inputs[2] = -torch.rand(4, 5).t()
    inputs[3] = randn(2, 12, 1, 4).permute(0, 2, 3, 1)[..., ::2]
    inputs[6] = randn(2, 10, 12)[:, ::2, 1:7]
    check_scan([x.detach() for x in inputs], initial_state=randn(2, 4, 5).transpose(1, 2))


def test_scan_gradient_through_the_last_state_alone():
    torch.manual_seed(6)
    inputs = [x.requires_grad_() for x in scan_inputs(L=5)]
    loss = lambda op, x: op(*x, True, True)[1].square().sum()
    wanted = [i for i, name in enumerate(SCAN_NAMES[:8]) if name in ("u", "delta", "A", "B", "delta_bias")]
    inputs64 = [double(x) for x in inputs]
    found = torch.autograd.grad(loss(scalekern.selective_scan, inputs), [inputs[i] for i in wanted])
    expected = torch.autograd.grad(loss(reference.selective_scan, inputs64), [inputs64[i] for i in wanted])
    for i, f, e in zip(wanted, found, expected):
        assert_close(f, e, F32, SCAN_NAMES[i])


@pytest.mark.parametrize("reverse, L", ((False, 19), (True, 17), (False, 70), (True, 70)))
def test_scan_split_over_time(monkeypatch, reverse, L):
    """Parts of 8 tokens (36 for the longer one, so that checkpoints lie inside) join to what one program computes."""
    torch.manual_seed(17)
    tokens = 8 if L < 20 else 36
    inputs = [*scan_inputs(B=2 if L < 20 else 1, D=3, L=L, N=3, G=1), randn(2 if L < 20 else 1, 3, 3)]
    inputs[3][..., 9] = 0
    whole = selective_scan_fwd(*inputs, None, True, reverse, True)
    monkeypatch.setattr(scan_fwd_module, "_parts", lambda *_: (-(-L // tokens), tokens))
    for found, expected in zip(selective_scan_fwd(*inputs, None, True, reverse, True), whole):
        assert_close(found, expected, F32)
    out, last = scalekern.selective_scan(*inputs[:8], True, True, initial_state=inputs[8], reverse=reverse)
    inputs64 = [x.double() for x in inputs]
    expected = reference.selective_scan(*inputs64[:8], True, True, initial_state=inputs64[8], reverse=reverse)
    assert_close(out, expected[0], F32)
    assert_close(last, expected[1], F32)


def test_scan_split_over_time_with_negative_steps(monkeypatch):
    """An infinite decay over a part leaves a zero state zero."""
    inputs = [x.abs() for x in scan_inputs(B=1, D=2, L=24, N=2, full=False)[:5]]
    inputs[1][..., :16], inputs[1][..., 16:], inputs[2] = -20.0, 1.0, -inputs[2] - 1
    inputs[0][..., :16] = 0
    monkeypatch.setattr(scan_fwd_module, "_parts", lambda *_: (3, 8))
    assert_close(scalekern.selective_scan(*inputs), reference.selective_scan(*[x.double() for x in inputs]), F32)


@pytest.mark.parametrize("reverse", (False, True))
def test_scan_checkpoints_are_the_references(reverse):
    torch.manual_seed(7)
    inputs = [*scan_inputs(B=1, D=2, L=67, N=2, dtype=F64), randn(1, 2, 2, dtype=F64)]
    *_, found = selective_scan_fwd(*inputs, None, True, reverse, True)
    with scalekern.backend("reference"):
        *_, expected = selective_scan_fwd(*inputs, None, True, reverse, True)
    assert_close(found, expected, F64)


def small_blocks(monkeypatch):
    """Several blocks a group, several turns, and fewer programs than rows."""
    monkeypatch.setattr(scan_bwd_module, "_default", lambda *_: {"BLOCK_D": 2, "T": 2, "num_warps": 1})
    monkeypatch.setattr(scan_bwd_module, "SCRATCH_FLOOR", 1)


@pytest.mark.parametrize("groups", (1, 2))
def test_scan_backward_in_turns(monkeypatch, groups):
    torch.manual_seed(8)
    small_blocks(monkeypatch)
    inputs = scan_inputs(B=3, D=4 * groups, L=2, N=8 * groups, G=groups)
    _, total, count, scratch = scan_bwd_module.plan_buffers(inputs[0], inputs[2], inputs[3], inputs[4], None)
    assert total > count and scratch[0] < 3
    check_scan(inputs)


def test_scan_backward_in_several_blocks(monkeypatch):
    torch.manual_seed(9)
    small_blocks(monkeypatch)
    inputs = scan_inputs(B=1, D=7, L=3, N=1)
    _, total, count, _ = scan_bwd_module.plan_buffers(inputs[0], inputs[2], inputs[3], inputs[4], None)
    assert total == 4 and count == 3
    check_scan(inputs)
    inputs = scan_inputs(B=1, D=16, L=2, N=1, G=2)
    _, total, count, _ = scan_bwd_module.plan_buffers(inputs[0], inputs[2], inputs[3], inputs[4], None)
    assert total == count == 8
    check_scan(inputs)


def test_scan_64_bit_offsets_and_determinism(monkeypatch):
    torch.manual_seed(10)
    inputs = [*scan_inputs(L=5), randn(2, 5, 4)]
    dout, dlast = randn(2, 5, 5), randn(2, 5, 4)

    def run():
        outputs = selective_scan_fwd(*inputs, None, True, False, True)
        return *outputs, *selective_scan_bwd(dout, dlast, *inputs, None, outputs[2], True, False)

    first = run()
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    for a, b in zip(first, run()):
        assert torch.equal(a, b)


def test_scan_nan_stays_in_its_sequence():
    """A NaN or Inf of one packed sequence, or next to padded states and channels, reaches nothing else."""
    torch.manual_seed(11)
    inputs = scan_inputs(B=1, D=3, L=9, N=3)
    for x in (inputs[0], inputs[1], inputs[3], inputs[4], inputs[6]):
        x[..., 3:5] = float("nan")
        x[..., 5] = float("inf")
    bounds = torch.tensor([0, 3, 6, 9])
    inputs = [x.requires_grad_() for x in inputs]
    out = scalekern.selective_scan(*inputs, True, cu_seqlens=bounds)
    gradients = torch.autograd.grad(out.sum(), [inputs[i] for i in (0, 1, 3, 4, 6)])
    clean = [x.detach().double() for x in inputs]
    for begin in (0, 6):
        part = [x[..., begin : begin + 3] if x.dim() > 2 else x for x in clean]
        part = [x.requires_grad_() for x in part]
        expected = reference.selective_scan(*part, True)
        assert_close(out[..., begin : begin + 3], expected, F32)
        gradients64 = torch.autograd.grad(expected.sum(), [part[i] for i in (0, 1, 3, 4, 6)])
        for g, g64 in zip(gradients, gradients64):
            assert_close(g[..., begin : begin + 3], g64, F32)
    assert out[..., 3:6].isnan().any()


def test_scan_infinite_input_beside_padded_states():
    inputs = scan_inputs(B=1, D=2, L=3, N=3)
    inputs[0][0, 0, 1] = float("inf")
    out = scalekern.selective_scan(*inputs, True)
    expected = reference.selective_scan(*[x.double() for x in inputs], True)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("broken", (lambda x: x * 0, lambda x: x.roll(1, 1), lambda x: x[:, :1].expand_as(x)))
def test_the_check_can_fail(broken):
    inputs = scan_inputs(L=3)
    expected = reference.selective_scan(*[x.double() for x in inputs], True)
    with pytest.raises(AssertionError):
        assert_close(broken(scalekern.selective_scan(*inputs, True)), expected, BF16)


# --- selective_state_update -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F64, F32, F16, BF16))
@pytest.mark.parametrize("state_dtype", (F32, F16, BF16))
@pytest.mark.parametrize("heads, groups, slots", ((None, 1, False), (4, 2, True)))
def test_state_update(monkeypatch, dtype, state_dtype, heads, groups, slots):
    torch.manual_seed(12)
    if dtype == F64:
        state_dtype = F64
    lead, P, N = (() if heads is None else (heads,)), 7, 5
    real = F64 if dtype == F64 else F32
    state = randn(4 if slots else 3, *lead, P, N, dtype=state_dtype)
    x, z = randn(3, *lead, P, dtype=dtype), randn(3, *lead, P, dtype=dtype)
    dt = randn(3, *lead, 1, dtype=dtype).expand(3, *lead, P)
    A, D, bias = -torch.rand(*lead, P, N, dtype=real), *torch.rand(2, *lead, P, dtype=real)
    B, C = (randn(3, *(() if heads is None else (groups,)), N, dtype=dtype) for _ in range(2))
    indices = torch.tensor([3, -1, 0]) if slots else None
    optional = [D, z, bias, True] if slots else [None, None, None, False]
    found_state, expected_state = state.clone(), state.to(F64, copy=True)
    found = scalekern.selective_state_update(found_state, x, dt, A, B, C, *optional, indices)
    args64 = [double(a) for a in (x, dt, A, B, C, *optional)]
    expected = reference.selective_state_update(expected_state, *args64, indices)
    assert_close(found, expected, dtype)
    assert_close(found_state, expected_state, state_dtype)
    if slots:
        assert not found[1].any() and torch.equal(found_state[1:3], state[1:3])
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    again = state.clone()
    assert torch.equal(scalekern.selective_state_update(again, x, dt, A, B, C, *optional, indices), found)
    assert torch.equal(again, found_state)


# --- causal_conv1d ----------------------------------------------------------------------------------------------------


def conv_case(mode, L):
    if mode == "packed":
        return dict(cu_seqlens=torch.tensor([0, 0, 2, 3, 3, L], dtype=torch.int32))
    if mode == "runs":
        return dict(seq_idx=torch.tensor([[0] * 2 + [1] * 2 + [-1] * 3 + [2] * (L - 7), [3] + [-1] * (L - 1)]))
    return {}


@pytest.mark.parametrize("dtype", (F64, F32, F16, BF16))
@pytest.mark.parametrize("mode", ("dense", "packed", "runs"))
def test_conv(dtype, mode):
    torch.manual_seed(13)
    filters = ((4, "silu", True, 11), (3, None, False, 9), (8, "swish", True, 12), (2, None, True, 8))
    for width, activation, bias, L in filters if dtype == F32 else filters[:2]:
        B, D = (1 if mode == "packed" else 2), 3
        case = conv_case(mode, L)
        rows = 5 if mode == "packed" else B
        weight = randn(D, width, dtype=F64 if dtype == F64 else F32)
        offset = randn(D, dtype=weight.dtype) if bias else None
        x, states = randn(B, D, L, dtype=dtype), randn(rows, D, width - 1, dtype=dtype)
        args = [x, weight, offset, case.pop("seq_idx", None), states]
        names = ["x", "weight", *(["bias"] if bias else []), "initial_states"]
        compare(scalekern.causal_conv1d, reference.causal_conv1d, [*args, True, activation], case, dtype, names)


def test_conv_short_rows_strides_and_tiles():
    torch.manual_seed(14)
    cases = (
        (randn(2, 5, 3).transpose(1, 2), True), (randn(2, 6, 4)[:, ::2, 1:3], True), (randn(1, 3, 1), True),
        (randn(1, 2, 260), False), (randn(1, 40, 3).transpose(1, 2), False), (randn(2, 1, 6).expand(2, 3, 6), True),
    )  # fmt: skip
    for x, initial in cases:
        weight, states = randn(x.shape[1], 4), randn(x.shape[0], 3, x.shape[1]).transpose(1, 2) if initial else None
        names = ["x", "weight", *(["initial_states"] if initial else [])]
        args = [x, weight, None, None, states, initial, "silu"]
        compare(scalekern.causal_conv1d, reference.causal_conv1d, args, {}, F32, names)


def test_conv_64_bit_offsets_and_determinism(monkeypatch):
    torch.manual_seed(15)
    case = conv_case("packed", 9)
    inputs = [randn(1, 3, 9), randn(3, 4), randn(3)]

    def run():
        x, weight, bias = (v.clone().requires_grad_() for v in inputs)
        out = scalekern.causal_conv1d(x, weight, bias, activation="silu", **case)
        return out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))

    first = run()
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    for a, b in zip(first, run()):
        assert torch.equal(a, b)


def test_conv_nan_stays_in_its_run():
    for mode in ("packed", "runs"):
        x = randn(1 if mode == "packed" else 2, 2, 9)
        x[..., 3:7] = float("nan")
        case = (
            dict(cu_seqlens=torch.tensor([0, 3, 7, 9]))
            if mode == "packed"
            else dict(seq_idx=torch.tensor([[0] * 3 + [-1] * 4 + [1] * 2] * 2))
        )
        out = scalekern.causal_conv1d(x, randn(2, 4), **case)
        assert not out[..., :3].isnan().any() and not out[..., 7:].isnan().any()
        assert out[..., 3:7].isnan().all() if mode == "packed" else not out[..., 3:7].any()


@pytest.mark.parametrize("dtype", (F64, F32, BF16))
@pytest.mark.parametrize(
    "steps, held, width, circular, slots",
    ((None, 3, 4, False, False), (3, 4, 3, False, True), (6, 3, 4, False, False), (1, 4, 4, True, True),
     (5, 7, 4, True, False), (9, 4, 4, True, False), (20, 5, 2, False, False), (2, 9, 8, True, False)),
)  # fmt: skip
def test_conv_update(monkeypatch, dtype, steps, held, width, circular, slots):
    torch.manual_seed(16)
    B, D = (3 if slots else 2), 5
    state = randn(4 if slots else B, D, held, dtype=dtype)
    x = randn(B, D, *(() if steps is None else (steps,)), dtype=dtype)
    weight, bias = randn(D, width), None if circular else randn(D)
    lengths = torch.tensor([5, 2, 9][:B], dtype=torch.int32) if circular else None
    indices = torch.tensor([3, -1, 0]) if slots else None
    found_state, expected_state = state.clone(), state.to(F64, copy=True)
    rest = ("silu" if width == 4 else None, lengths, indices)
    found = scalekern.causal_conv1d_update(x, found_state, weight, bias, *rest)
    expected = reference.causal_conv1d_update(x.double(), expected_state, double(weight), double(bias), *rest)
    assert_close(found, expected, dtype)
    assert torch.equal(found_state.double(), expected_state)  # values are moved, not computed
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    again = state.clone()
    assert torch.equal(scalekern.causal_conv1d_update(x, again, weight, bias, *rest), found)
    assert torch.equal(again, found_state)
