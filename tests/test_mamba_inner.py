"""mamba_inner against autograd of its oracle, which is written apart from its explicit backward.

Shape letters: B batch, L length, D channels, N state size, R rank of the step size, M model width, W filter width.
"""

import inspect
import sys

import pytest
import torch

import scalekern
from scalekern import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
NAMES = (
    "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D delta_bias "
    "B_proj_bias C_proj_bias b_rms_weight c_rms_weight dt_rms_weight"
).split()


def sample(
    dtype=torch.float64, *, is_complex=False, given=False, rms=True, bias=True, channels_last=False, B=2, D=6, L=7, N=3,
    R=2, M=5, W=4,
):  # fmt: skip
    """Inputs by name, each with its own scale, so that swapped operands show."""
    generator = torch.Generator().manual_seed(B + 10 * D + 100 * L + is_complex)

    def random(*shape):
        scale = 0.5 + torch.rand(1, generator=generator, dtype=torch.float64)
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    width = N * (2 if is_complex else 1)
    A = -0.2 - torch.rand(D, N, generator=generator, dtype=torch.float64)
    A = torch.complex(A, random(D, N)) if is_complex else A
    xz = random(B, L, 2 * D).transpose(1, 2)
    projected = not given
    tensors = dict(
        xz=xz if channels_last else xz.contiguous(), conv1d_weight=random(D, 1, W),
        conv1d_bias=random(D) if bias else None, x_proj_weight=random(R + 2 * width * projected, D),
        delta_proj_weight=random(D, R), out_proj_weight=random(M, D), out_proj_bias=random(M) if bias else None, A=A,
        B=random(B, 2, N, L) if given else None, C=random(D, N) if given else None, D=random(D), delta_bias=random(D),
        B_proj_bias=random(width) if bias and projected else None,
        C_proj_bias=random(width) if bias and projected else None,
        b_rms_weight=random(width) if rms and projected else None,
        c_rms_weight=random(width) if rms and projected else None,
        dt_rms_weight=random(D) if rms else None,
    )  # fmt: skip
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(name, t):
        if t is None:
            return None
        if name == "A":
            return t.to(real.to_complex() if is_complex else real).requires_grad_()
        return t.to(dtype).requires_grad_()

    return {name: cast(name, t) for name, t in tensors.items()}


def leaves(tensors):
    return [t for t in tensors.values() if t is not None]


def run(function, tensors, **options):
    """(out, gradients of every given tensor)."""
    out = function(**tensors, **options)
    dout = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return out, torch.autograd.grad(out, leaves(tensors), dout.to(out.dtype))


def in_float64(tensors):
    def wide(t):
        if t is None:
            return None
        return t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_()

    return {name: wide(t) for name, t in tensors.items()}


def error(got, expected):
    """Relative L2 error; an all-zero `got` has error 1."""
    kind = torch.complex128 if expected.is_complex() else torch.float64
    return ((got.to(kind) - expected.to(kind)).norm() / expected.to(kind).norm()).item()


def assert_matches(tensors, tolerance, **options):
    out, grads = run(scalekern.mamba_inner, tensors, **options)
    expected, expected_grads = run(reference.mamba_inner, in_float64(tensors))
    assert error(out, expected) < tolerance
    names = [name for name, t in tensors.items() if t is not None]
    errors = {name: error(g, e) for name, g, e in zip(names, grads, expected_grads)}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("is_complex, given, rms, bias", [
    (False, False, False, True), (False, False, True, True), (False, False, True, False), (False, True, True, True),
    (True, False, True, True), (True, False, False, False),
])  # fmt: skip
def test_float64_matches_autograd_of_the_oracle(is_complex, given, rms, bias, level):
    tensors = sample(is_complex=is_complex, given=given, rms=rms, bias=bias)
    assert_matches(tensors, 1e-10, checkpoint_lvl=level)


@pytest.mark.parametrize("channels_last", [False, True])
def test_float32(channels_last):
    assert_matches(sample(torch.float32, channels_last=channels_last), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_is_as_good_as_eager(dtype, channels_last):
    """At most twice the error of autograd through the oracle in the same dtype, for the output and every gradient."""
    tensors = sample(dtype, L=33, D=16, channels_last=channels_last)
    out, grads = run(scalekern.mamba_inner, tensors)
    eager, eager_grads = run(reference.mamba_inner, tensors)
    expected, expected_grads = run(reference.mamba_inner, in_float64(tensors))
    names = ["out", *(name for name in NAMES if tensors[name] is not None)]
    for name, got, other, exact in zip(
        names, [out, *grads], [eager, *eager_grads], [expected, *expected_grads], strict=True
    ):
        assert error(got, exact) <= 2 * error(other, exact) + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("shape", [
    dict(B=1, L=1), dict(B=3, L=2), dict(L=65, D=3, N=2, bias=False), dict(N=1, R=1, M=1, rms=False),
    dict(D=1, W=2, rms=False), dict(W=8, L=3),
], ids=str)  # fmt: skip
def test_odd_shapes(shape):
    # An RMS norm over one element is its sign: that gradient is rounding noise, hence no norms in those two.
    assert_matches(sample(**shape), 1e-10)


@pytest.mark.parametrize("B, L", [(0, 5), (2, 0)])
def test_empty(B, L):
    tensors = sample(B=B, L=L, rms=False)
    out, grads = run(scalekern.mamba_inner, tensors)
    assert out.shape == (B, L, 5)
    assert all((g == 0).all() for g in grads)


def test_gradcheck():
    tensors = sample(B=1, D=3, L=3, N=2, M=2, W=2)
    names = [n for n in NAMES if tensors[n] is not None]

    def function(*values):
        return scalekern.mamba_inner(**{**tensors, **dict(zip(names, values))})

    assert torch.autograd.gradcheck(function, leaves(tensors))


def test_the_rms_jacobian_is_seen_by_these_tests(monkeypatch):
    """The upstream defect (gradients passed through the norms unchanged) must fail the comparison above."""
    oracle = sys.modules["scalekern.reference.mamba_inner"]
    monkeypatch.setattr(oracle, "rms_norm_bwd", lambda dout, x, weight, eps: (dout, torch.ones_like(weight)))
    with pytest.raises(AssertionError):
        assert_matches(sample(), 1e-2)


def test_second_order_raises():
    tensors = sample()
    out = scalekern.mamba_inner(**tensors)
    (grad,) = torch.autograd.grad(out.sum(), tensors["xz"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        grad.sum().backward()


def test_some_inputs_only():
    tensors = sample()
    frozen = {name: None if t is None else t.detach() for name, t in tensors.items()}
    frozen["out_proj_weight"].requires_grad_()
    scalekern.mamba_inner(**frozen).sum().backward()
    (expected,) = torch.autograd.grad(reference.mamba_inner(**tensors).sum(), tensors["out_proj_weight"])
    assert error(frozen["out_proj_weight"].grad, expected) < 1e-10
    assert frozen["xz"].grad is None


def op_arguments(tensors, keep):
    """The op's own form: no filter axis, flags in place."""
    values = dict(tensors)
    values["conv1d_weight"] = values["conv1d_weight"].detach().squeeze(1).requires_grad_(values["xz"].requires_grad)
    return *values.values(), 1e-6, True, keep


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("keep", [-1, 0, 1])
def test_opcheck(channels_last, keep):
    tensors = sample(torch.float32, channels_last=channels_last)
    if keep < 0:
        tensors = {name: None if t is None else t.detach() for name, t in tensors.items()}
    torch.library.opcheck(torch.ops.scalekern.mamba_inner_fwd.default, op_arguments(tensors, keep))


def test_what_was_not_kept_is_computed_again():
    tensors = sample(B=1, L=3)
    out = torch.ops.scalekern.mamba_inner_fwd(*op_arguments(tensors, -1))[0]
    (got,) = torch.autograd.grad(out.sum(), tensors["xz"])
    (expected,) = torch.autograd.grad(reference.mamba_inner(**tensors).sum(), tensors["xz"])
    assert error(got, expected) < 1e-10


def test_autocast_casts_the_projections():
    tensors = sample(torch.float32, rms=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scalekern.mamba_inner(**tensors)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()  # inside the region: the backward's products must not be cast again
    assert all(t.grad.dtype == t.dtype for t in leaves(tensors))
    kept = ("A", "D", "delta_bias", "conv1d_weight", "conv1d_bias")
    half = {n: t if t is None or n in kept else t.detach().bfloat16() for n, t in tensors.items()}
    assert torch.equal(out, scalekern.mamba_inner(**half))


def test_nan_travels():
    tensors = {name: None if t is None else t.detach() for name, t in sample(rms=False, B=2).items()}
    tensors["xz"][0, 0, 3] = float("nan")
    out = scalekern.mamba_inner(**tensors)
    assert out[0, :3].isfinite().all() and out[0, 3:].isnan().all() and out[1].isfinite().all()


def kept_bytes(function):
    """Bytes that autograd keeps for the backward of one call, each storage once."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    assert out.requires_grad
    return sum(storages.values())


def test_memory_kept_for_the_backward():
    """xz, y, checkpoints (under half of y in float32 at this N) and the parameters; at level 0 two more (B, D, L)."""
    B, D, L = 2, 32, 256
    tensors = sample(torch.float32, rms=False, B=B, D=D, L=L, N=4, R=2, M=16)
    element = B * D * L * 4
    parameters = sum(t.numel() * 4 for n, t in tensors.items() if t is not None and n != "xz")
    kept = {level: kept_bytes(lambda: scalekern.mamba_inner(**tensors, checkpoint_lvl=level)) for level in (0, 1)}
    assert 3 * element <= kept[1] <= 3.5 * element + parameters
    assert 5 * element <= kept[0] <= 5.5 * element + parameters


@pytest.mark.parametrize("name, value, message", [
    ("xz", torch.zeros(2, 11, 7), r"mamba_inner: xz must have shape \(2, 12, 7\), got \(2, 11, 7\)"),
    ("conv1d_weight", torch.zeros(6, 1, 9), "width from 2 to 8"),
    ("x_proj_weight", torch.zeros(7, 6), r"x_proj_weight must have shape \(8, 6\), got \(7, 6\)"),
    ("out_proj_weight", torch.zeros(5, 7), "out_proj_weight must have shape"),
    ("b_rms_weight", torch.zeros(4), r"b_rms_weight must have shape \(3,\), got \(4,\)"),
    ("checkpoint_lvl", 2, "checkpoint_lvl must be one of 0, 1, got 2"),
    ("B", torch.zeros(6, 4), r"B must have shape \(6, 3\), got \(6, 4\)"),
])  # fmt: skip
def test_bad_input_is_named(name, value, message):
    tensors = sample()
    if name == "B":  # one projected matrix less
        tensors |= {"x_proj_weight": torch.zeros(5, 6), "B_proj_bias": None, "b_rms_weight": None}
    with pytest.raises(ValueError, match=message):
        scalekern.mamba_inner(**{**tensors, name: value})


@pytest.mark.parametrize("value", ["x", None])
def test_an_epsilon_is_a_number(value):
    with pytest.raises(TypeError, match=f"^mamba_inner: b_c_dt_rms_eps must be a number, got {value!r}$"):
        scalekern.mamba_inner(**sample(), b_c_dt_rms_eps=value)


def test_norms_of_a_given_matrix_are_refused():
    tensors = sample(given=True)
    for name in ("b_rms_weight", "C_proj_bias"):
        with pytest.raises(ValueError, match=f"{name} must be None where"):
            scalekern.mamba_inner(**{**tensors, name: torch.ones(3, dtype=torch.float64)})


def test_signature_is_upstreams():
    expected = [*NAMES[:14], "delta_softplus", "checkpoint_lvl", *NAMES[14:], "b_c_dt_rms_eps"]
    assert list(inspect.signature(scalekern.mamba_inner).parameters) == expected
    assert list(inspect.signature(reference.mamba_inner).parameters) == expected


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(scalekern.mamba_inner, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for L in (5, 9):
        tensors = sample(L=L)
        got, expected = run(compiled, tensors), run(scalekern.mamba_inner, tensors)
        assert error(got[0], expected[0]) < 1e-12
        assert all(error(g, e) < 1e-12 for g, e in zip(got[1], expected[1], strict=True))
