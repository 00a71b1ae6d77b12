"""Numerics of selective_scan: every backend against the float64 oracle, forward and backward.

Shape letters: B batch, D channels, L length, N state size, G groups, S sequences.
"""

import dataclasses

import pytest
import torch
from conftest import at_levels

import scalekern
from scalekern import _env, _native, reference
from scalekern._dispatch import BackendError
from scalekern.ops.selective_scan import selective_scan_bwd, selective_scan_fwd
from scalekern.testing import TOLERANCE, assert_close, error, upcast

INTERPRET = _env.triton_interpret()

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
needs_cpu = pytest.mark.skipif(
    _native.load("cpu") is not None or _env.triton_interpret(),
    reason="of the CPU library, which was not built or which the other test process tests",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What varies between calls. B and C: "c" constant (D, N), "3" (B, N, L), or a number of groups."""

    shape: tuple[int, int, int, int]  # B, D, L, N
    dtype: torch.dtype = torch.float32
    complex: bool = False
    B: str = "1"
    C: str = "1"
    optional: str = "Dzbh"  # of D, z, delta_bias, initial_state
    softplus: bool = True
    layout: str = "time"  # the contiguous axis: time, channels, or none
    bounds: tuple[int, ...] | None = None  # cu_seqlens
    reverse: bool = False
    slow: float = 1.0  # scales A: decays close to 1 when small

    def __str__(self):
        values = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[1:]]
        fields = [f"{name}={value}" for name, value, default in values if value != default]
        return "-".join(["x".join(map(str, self.shape)), *fields]).replace("torch.", "")

    def make(self, seed=0, device=None):
        """(arguments of selective_scan up to delta_bias, by name, and keyword arguments), on the default device."""
        g = torch.Generator("cpu").manual_seed(seed)
        device = device or torch.get_default_device()
        batch, channels, length, states = self.shape
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        state = real.to_complex() if self.complex else real

        def normal(*shape, dtype=real):
            x = torch.randn(*shape, generator=g, dtype=dtype, device="cpu")
            for axis in range(min(2, len(shape))):  # a scale of its own for every channel, group and batch
                scales = 0.5 + torch.rand(shape[axis], generator=g, dtype=real, device="cpu")
                x = x * scales.reshape(-1, *[1] * (len(shape) - axis - 1))
            return x

        def lay(x):
            if self.layout == "channels":
                x = x.mT.contiguous().mT
            elif self.layout == "none":
                x = x.repeat_interleave(2, -1)[..., ::2]
            return x.to(device)

        def matrix(kind):
            dtype = state if self.complex else self.dtype
            if kind == "c":
                return normal(channels, states, dtype=state).to(dtype).to(device)
            shape = (batch, states, length) if kind == "3" else (batch, int(kind), states, length)
            return lay(normal(*shape, dtype=state).to(dtype))

        A = -(0.1 + 2 * torch.rand(channels, states, generator=g, dtype=real, device="cpu")) * self.slow
        if self.complex:
            A = torch.complex(A, 3 * torch.randn(channels, states, generator=g, dtype=real, device="cpu"))
        step = 0.5 * normal(batch, channels, length) + (-0.5 if self.softplus else 0)
        tensors = {
            "u": lay(normal(batch, channels, length).to(self.dtype)),
            "delta": lay((step if self.softplus else step.abs()).to(self.dtype)),
            "A": A.to(device),
            "B": matrix(self.B),
            "C": matrix(self.C),
            "D": normal(channels).to(device) if "D" in self.optional else None,
            "z": lay(normal(batch, channels, length).to(self.dtype)) if "z" in self.optional else None,
            "delta_bias": 0.3 * normal(channels).to(device).abs() if "b" in self.optional else None,
        }
        rows = batch if self.bounds is None else len(self.bounds) - 1
        h = normal(rows, channels, states, dtype=state).to(device) if "h" in self.optional else None
        bounds = None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=device)
        return tensors | {"initial_state": h}, {"cu_seqlens": bounds, "reverse": self.reverse}


def call(function, case, tensors, options):
    *inputs, initial = (tensors[n] for n in NAMES)
    return function(*inputs, case.softplus, True, initial_state=initial, **options)


def projection(*outputs):
    """Random gradients of the outputs, always the same ones."""
    g = torch.Generator("cpu").manual_seed(7)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64, device="cpu") for o in outputs]


def with_gradients(function, case, tensors, options, weights=None):
    """{name: tensor} of both outputs and of all gradients of a random projection of them."""
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}
    outputs = call(function, case, {n: leaves.get(n) for n in NAMES}, options)
    weights = [w.to(o.device).to(o.dtype) for w, o in zip(weights or projection(*outputs), outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return {"out": outputs[0].detach(), "last_state": outputs[1].detach()} | {"d" + n: x for n, x in zip(leaves, grads)}


def oracle(case, tensors, options):
    """The same by autograd of the oracle, in float64, from the same (rounded) inputs."""
    return with_gradients(reference.selective_scan, case, {n: upcast(t) for n, t in tensors.items()}, options)


def tolerance(case, name):
    """Gradients in half precision are rounded inputs times rounded inputs, as in the contract: twice the bound.

    float32 sums of signed terms (gradients of parameters) cancel; 1e-5 of their norm holds for a real A. A complex
    A's phases d Im(A) carry float32's rounding of angles of up to 10 radians: eager torch is at 1e-5 there too.
    """
    if case.complex and case.dtype == torch.float32 and name.startswith("d"):
        return 3e-5
    if name.startswith("d") and case.dtype in (torch.float16, torch.bfloat16):
        return 2 * TOLERANCE[case.dtype]
    return 1e-11 if case.dtype == torch.float64 else TOLERANCE[case.dtype]


def check(case, place, seed=0):
    device, backend = place
    tensors, options = case.make(seed, device)
    with scalekern.backend(backend):
        try:
            actual = with_gradients(scalekern.selective_scan, case, tensors, options)
        except BackendError as unsupported:
            if backend in ("cpu", "reference"):
                raise
            pytest.skip(str(unsupported))
    expected = oracle(case, tensors, options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == (
            tensors[name[1:]].dtype if name[1:] in tensors else actual[name].dtype
        )
        assert_close(actual[name], value, tolerance=tolerance(case, name), what=name)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 2), (2, 17, 67, 3), (1, 33, 130, 16), (1, 4, 70, 20), (1, 2, 300, 70)]
SMALL = (2, 6, 9, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, place):
    if place[1] == "triton" and place[0] == "cpu" and shape[0] * shape[1] * shape[2] > 200:
        pytest.skip("the interpreter runs the smallest shapes")
    check(Case(shape, dtype), place)


@pytest.mark.parametrize(
    "case",
    [
        Case(SMALL, optional=""),
        Case(SMALL, optional="D", softplus=False),
        Case(SMALL, optional="z"),
        Case(SMALL, optional="bh", softplus=False),
        Case(SMALL, B="3", C="3"),
        Case(SMALL, B="c", C="c"),
        Case(SMALL, B="2", C="3"),
        Case(SMALL, B="3", C="2"),
        Case(SMALL, B="6", C="6"),
        Case(SMALL, B="c", C="3"),
        Case((1, 36, 70, 4), B="1", C="c"),
        Case((1, 36, 70, 4), B="2", C="2", dtype=torch.bfloat16),
        Case((1, 36, 70, 4), B="c", C="c", dtype=torch.bfloat16),
        Case((1, 5, 70, 19), B="c", C="1"),
        Case(SMALL, reverse=True),
        Case((1, 18, 130, 5), reverse=True, layout="channels"),
        Case(SMALL, layout="channels", dtype=torch.float16),
        Case(SMALL, layout="none"),
        Case((2, 3, 70, 17), layout="none", reverse=True),
        Case((1, 3, 9, 2), bounds=(0, 4, 9)),
        Case((1, 3, 9, 2), bounds=(0, 0, 1, 6, 6, 9, 9)),
        Case((1, 18, 140, 3), bounds=(0, 63, 64, 64, 130, 140), reverse=True),
        Case((1, 2, 140, 17), bounds=(0, 63, 64, 64, 130, 140), optional="Dz"),
        Case(SMALL, complex=True),
        Case(SMALL, complex=True, dtype=torch.float64, B="c", C="c"),
        Case(SMALL, complex=True, dtype=torch.bfloat16, B="3", C="2"),
        Case((1, 17, 70, 3), complex=True, reverse=True, layout="channels"),
        Case((1, 2, 70, 17), complex=True, bounds=(0, 0, 30, 70), C="c"),
    ],
    ids=str,
)
def test_arguments(case, place):
    if place[1] == "triton" and place[0] == "cpu" and case.shape[1] * case.shape[2] > 60:
        pytest.skip("the interpreter runs the smallest shapes")
    check(case, place)


@pytest.mark.parametrize("case", [Case((1, 2, 7, 2), torch.float64, complex=c) for c in (False, True)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(case, packed, any_backend):
    case = dataclasses.replace(case, bounds=(0, 3, 3, 7) if packed else None, reverse=packed)
    tensors, options = case.make()

    def run(*values):
        return call(scalekern.selective_scan, case, dict(zip(NAMES, values)), options)

    with scalekern.backend(any_backend):
        try:
            # Through the interpreter along one random direction: every number by itself takes a minute there.
            assert torch.autograd.gradcheck(run, [tensors[n].requires_grad_() for n in NAMES], fast_mode=INTERPRET)
        except BackendError as unsupported:
            if any_backend in ("cpu", "reference"):
                raise
            pytest.skip(str(unsupported))


@pytest.mark.parametrize(
    "case",
    [Case((2, 5, 150, 3)), Case((1, 3, 150, 20), reverse=True), Case((1, 17, 150, 2), bounds=(0, 10, 64, 150))],
    ids=str,
)
def test_checkpoints_are_the_same_for_all_backends(case, any_backend):
    """A forward's checkpoints serve the oracle's backward, and the oracle's serve this backward."""
    if any_backend == "reference" or _env.triton_interpret():
        pytest.skip("compared with the reference; the interpreter is too slow for two chunks")
    tensors, options = case.make()
    inputs = [tensors[n] for n in NAMES]
    flags = (options["cu_seqlens"], case.softplus, case.reverse)
    with scalekern.backend(any_backend):
        out, last, own = selective_scan_fwd(*inputs, *flags, True)
    with scalekern.backend("reference"):
        _, _, theirs = selective_scan_fwd(*inputs, *flags, True)
    assert_close(own, theirs.double(), tolerance=1e-5, what="checkpoints")
    dout, dlast = torch.randn_like(out), torch.randn_like(last)
    results = []
    for backend, checkpoints in ((any_backend, theirs), ("reference", own), ("reference", theirs)):
        with scalekern.backend(backend):
            results.append(selective_scan_bwd(dout, dlast, *inputs, flags[0], checkpoints, *flags[1:]))
    for name, mixed, crossed, expected in zip(NAMES, *results):
        assert_close(mixed, expected.double(), tolerance=1e-5, what=f"d{name} from the oracle's checkpoints")
        assert_close(crossed, expected.double(), tolerance=1e-5, what=f"oracle's d{name} from these checkpoints")


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_its_sequences(reverse, place):
    case = Case((1, 3, 20, 2), bounds=(0, 7, 7, 8, 20), reverse=reverse)
    tensors, options = case.make(device=place[0])
    with scalekern.backend(place[1]):
        out, last = call(scalekern.selective_scan, case, tensors, options)
        for s, (b, e) in enumerate(zip(case.bounds, case.bounds[1:])):
            if b == e:
                assert torch.equal(last[s], tensors["initial_state"][s])
                continue
            piece = {n: t[..., b:e] if n in ("u", "delta", "z", "B", "C") else t for n, t in tensors.items()}
            piece["initial_state"] = tensors["initial_state"][s : s + 1]
            alone, state = call(scalekern.selective_scan, case, piece, {"reverse": reverse})
            assert_close(out[..., b:e], alone.double(), tolerance=1e-6)
            assert_close(last[s : s + 1], state.double(), tolerance=1e-6)


def test_reverse_equals_flips(place):
    case = Case((2, 5, 21, 3), reverse=True)
    tensors, options = case.make(device=place[0])
    flipped = {n: t.flip(-1) if n in ("u", "delta", "z", "B", "C") else t for n, t in tensors.items()}
    with scalekern.backend(place[1]):
        actual = with_gradients(scalekern.selective_scan, case, tensors, options)
        dout, dlast = projection(actual["out"], actual["last_state"])
        expected = with_gradients(scalekern.selective_scan, case, flipped, {"reverse": False}, [dout.flip(-1), dlast])
    for name, value in expected.items():
        value = value.flip(-1) if name in ("out", "du", "ddelta", "dz", "dB", "dC") else value
        assert_close(actual[name], value.double(), tolerance=1e-6, what=name)


@pytest.mark.parametrize("cut", [1, 10, 20])
def test_chunks_join(cut, place):
    """Two calls joined by the state equal one, gradients through the state included."""
    case = Case((2, 3, 21, 2))
    tensors, options = case.make(device=place[0])

    def joined(*inputs, initial_state=None, **kwargs):
        def part(times):
            return [t[..., times] if n in ("u", "delta", "z", "B", "C") else t for n, t in zip(NAMES[:8], inputs)]

        flags = inputs[8:]
        first, state = scalekern.selective_scan(*part(slice(0, cut)), *flags, initial_state=initial_state)
        second, state = scalekern.selective_scan(*part(slice(cut, None)), *flags, initial_state=state)
        return torch.cat([first, second], -1), state

    with scalekern.backend(place[1]):
        actual = with_gradients(joined, case, tensors, {})
    for name, value in oracle(case, tensors, options).items():
        assert_close(actual[name], value, tolerance=tolerance(case, name), what=name)


@pytest.fixture
def threads():
    """Sets the number of threads; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Few channels and a long sequence: with two threads and more, time is cut into segments. The last ones decay so slowly
# that a segment's state is felt through the next ones.
SPLIT = [
    Case((1, 2, 4100, 3)),
    Case((1, 1, 4096, 16), reverse=True),
    Case((1, 16, 2500, 4), layout="channels", bounds=(0, 1000, 1000, 1030, 2500)),
    Case((1, 3, 4100, 2), bounds=(0, 4100), optional="Dzb"),
    Case((1, 2, 4100, 2), complex=True),
    Case((1, 2, 4100, 3), slow=1e-3),
    Case((1, 1, 4100, 17), slow=1e-4, reverse=True),
    Case((1, 1, 4100, 2), complex=True, slow=1e-3),
]


@needs_cpu
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_split_time_agrees(case, count, threads):
    tensors, options = case.make()
    results = []
    for n in (1, count):
        threads(n)
        with scalekern.backend("cpu"):
            results.append(with_gradients(scalekern.selective_scan, case, tensors, options))
    for name, value in results[0].items():
        assert_close(results[1][name], value.to(torch.complex128 if value.is_complex() else torch.float64),
                     tolerance=2e-5 if case.slow < 1 or case.complex else 1e-5, what=name)  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["u", "delta", "B", "initial_state"])
def test_non_finite_values_cross_a_split(value, where, threads):
    """A NaN near the start reaches the end in the oracle, however fast states decay, and so it does here."""
    case = Case((1, 2, 3000, 2), optional="Dh")
    tensors, options = case.make()
    tensors[where][{"B": (0, 0, 1, 5), "initial_state": (0, 0, 1)}.get(where, (0, 0, 5))] = value
    threads(2)
    with scalekern.backend("cpu"):
        actual = with_gradients(scalekern.selective_scan, case, tensors, options)
    with scalekern.backend("reference"):
        expected = with_gradients(scalekern.selective_scan, case, tensors, options)
    for name in ("out", "last_state", "du", "ddelta", "dB", "dC", "dA"):
        assert torch.equal(torch.isfinite(actual[name]), torch.isfinite(expected[name])), name
    assert not torch.isfinite(actual["last_state"]).all()


@needs_cpu
@pytest.mark.parametrize("backward_value", [float("nan"), float("inf")])
def test_non_finite_gradients_cross_a_split(backward_value, threads):
    case = Case((1, 2, 3000, 2))
    tensors, options = case.make()
    weights = [torch.ones(1, 2, 3000), torch.zeros(1, 2, 2)]
    weights[0][0, 1, 2990] = backward_value
    threads(2)
    results = []
    for backend in ("cpu", "reference"):
        with scalekern.backend(backend):
            results.append(with_gradients(scalekern.selective_scan, case, tensors, options, weights))
    for name in ("du", "ddelta", "dB", "dinitial_state"):
        assert torch.equal(torch.isfinite(results[0][name]), torch.isfinite(results[1][name])), name
    assert not torch.isfinite(results[0]["dinitial_state"]).all()


@needs_cpu
@at_levels("baseline", "avx2", "avx512")
def test_every_instruction_set():
    for case in (
        Case((2, 17, 67, 5)), Case((1, 3, 70, 20)), Case((1, 9, 70, 3), torch.float64), Case((1, 2, 2100, 3)),
        Case((1, 18, 66, 4), torch.bfloat16), Case((1, 18, 66, 4), torch.float16, layout="channels"),
        Case((1, 5, 66, 4), complex=True),
    ):  # fmt: skip
        check(case, ("cpu", "cpu"))


@needs_cpu
@pytest.mark.parametrize("backend", ["cpu", "reference"])  # a GPU's take no complex A
def test_interleaved_matrices_with_any_strides(backend):
    """Upstream's real (B, N, 2 L) for a complex A, as every second number from the first: no view of it is complex."""
    u, delta = torch.randn(2, 1, 3, 7).abs()
    A = torch.complex(-torch.rand(3, 4), torch.rand(3, 4))
    wide = torch.randn(1, 4, 29)
    with scalekern.backend(backend):
        second = wide[..., 1::2]
        strided, whole = (scalekern.selective_scan(u, delta, A, m, m) for m in (second, second.contiguous()))
    torch.testing.assert_close(strided, whole)


def test_expanded_inputs_and_gradients(any_backend):
    """Zero strides: inputs expanded over the batch, dout from a sum, B and C shared by all times."""
    case = Case((3, 4, 10, 2), optional="Db")
    tensors, options = case.make()
    for name in ("u", "delta"):
        tensors[name] = tensors[name][:1].expand(3, -1, -1)
    for name in ("B", "C"):
        tensors[name] = tensors[name][..., :1].expand(3, -1, -1, 10)
    results = []
    for function, convert, backend in (
        (scalekern.selective_scan, lambda t: t, any_backend),
        (reference.selective_scan, upcast, "reference"),
    ):
        leaves = {n: convert(t).detach().requires_grad_() for n, t in tensors.items() if t is not None}
        with scalekern.backend(backend):
            call(function, case, {n: leaves.get(n) for n in NAMES}, options)[0].sum().backward()
        results.append({n: t.grad for n, t in leaves.items()})
    for name, value in results[1].items():
        assert_close(results[0][name], value, tolerance=1e-5, what=name)


@needs_cpu
@pytest.mark.parametrize(
    "case", [Case((2, 40, 300, 5)), Case((1, 2, 4100, 16)), Case((1, 20, 300, 3), B="2", C="c")], ids=str
)
def test_deterministic(case):
    tensors, options = case.make()
    with scalekern.backend("cpu"):
        first = with_gradients(scalekern.selective_scan, case, tensors, options)
        for _ in range(3):
            again = with_gradients(scalekern.selective_scan, case, tensors, options)
            assert all(torch.equal(again[n], first[n]) for n in first)


def peak_bytes(function):
    """The most memory that torch's CPU allocator held during the call above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


def size_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 256, 512, 16), (1, 16, 8192, 16), (1, 1, 16384, 16), (4, 64, 64, 16)], ids=str)
def test_memory(shape, dtype):
    """Forward: the output and checkpoints. Backward: gradients and temporaries within twice the inputs."""
    case = Case(shape, dtype)
    tensors, options = case.make()
    inputs = [tensors[n] for n in NAMES]
    page = 64 * 1024  # fixed costs
    with scalekern.backend("cpu"):
        forward = peak_bytes(lambda: selective_scan_fwd(*inputs, None, True, False, True))
        out, last, checkpoints = selective_scan_fwd(*inputs, None, True, False, True)
        assert size_of(out) <= forward <= size_of(out, last, checkpoints) + page
        dout = torch.randn_like(out)
        backward = peak_bytes(lambda: selective_scan_bwd(dout, None, *inputs, None, checkpoints, True, False))
    assert size_of(inputs[0]) <= backward <= 2 * size_of(dout, checkpoints, *inputs) + page


@pytest.mark.parametrize("mutant", ["zeroed", "dropped D", "permuted groups", "shifted"])
def test_the_comparison_sees(mutant):
    """What assert_close must not let pass at any tolerance of this file."""
    case = Case((1, 4, 12, 2), B="2", C="2")
    tensors, options = case.make()
    expected = oracle(case, tensors, options)["out"]
    wrong = dict(tensors)
    if mutant == "dropped D":
        wrong["D"] = None
    elif mutant == "permuted groups":
        wrong["B"] = tensors["B"].flip(1)
    out = call(reference.selective_scan, case, wrong, options)[0]
    out = torch.zeros_like(out) if mutant == "zeroed" else out.roll(1, -1) if mutant == "shifted" else out
    assert error(out, expected) > 0.05
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_close(out, expected, tolerance=2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_accurate_as_eager(dtype, any_backend):
    """At most twice the error of a careful eager computation in the same dtypes (the reference, undispatched)."""
    if any_backend == "reference" or _env.triton_interpret():
        pytest.skip("measured on compiled kernels")
    ratios = {}
    for seed in range(3):
        case = Case((1, 20, 70, 4), dtype)
        tensors, options = case.make(seed)
        expected = oracle(case, tensors, options)
        with scalekern.backend(any_backend):
            actual = with_gradients(scalekern.selective_scan, case, tensors, options)
        with scalekern.backend("reference"):
            eager = with_gradients(scalekern.selective_scan, case, tensors, options)
        for name, value in expected.items():
            ratios.setdefault(name, []).append(error(actual[name], value) / error(eager[name], value))
    for name, values in ratios.items():
        assert sorted(values)[len(values) // 2] <= 2, f"{name}: {values}"
