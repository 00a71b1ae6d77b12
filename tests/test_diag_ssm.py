"""What is particular to the state space models: long and odd lengths, both compositions, splits, memory.

Shape letters: B batch, H heads, N states, L length, M rows of a head.
"""

import itertools

import pytest
import torch
from conftest import INTERPRET
from oracles import randn
from test_selective_scan import peak_bytes

import scalekern
from scalekern import _native, reference
from scalekern.ops import _diag_ssm, _diag_ssm_chunks, _dplr_ssm
from scalekern.reference.diag_ssm import diag_ssm_kernel_fwd
from scalekern.testing import TOLERANCE, assert_close, error, samples, upcast

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests Triton alone")
NATIVE = [False] if _native.load("cpu") else [True, False]


@pytest.fixture(params=NATIVE, ids=lambda native: "native" if native else "torch")
def composition(request, monkeypatch):
    """The sums by the native library, and out of torch's products."""
    for module in (_diag_ssm, _dplr_ssm):
        monkeypatch.setattr(module, "_native_on_cpu", lambda: request.param)


def with_gradients(function, tensors, *args, **kwargs):
    tensors = list(tensors)
    leaves = [x.detach().clone().requires_grad_() for x in tensors if x is not None]
    given = iter(leaves)
    outputs = function(*(None if x is None else next(given) for x in tensors), *args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [randn(*o.shape, seed=i, dtype=torch.complex128 if o.is_complex() else torch.float64).to(o.dtype)
               for i, o in enumerate(outputs)]  # fmt: skip
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def model(H, N, *, real=False, dtype=torch.float64, decay=0.3):
    """(A, B, C, dt), slowly decaying."""
    A = -decay * (0.5 + randn(H, N, seed=1).sigmoid())
    if not real:
        A = torch.complex(A, 3 * randn(H, N, seed=2))
    wide = torch.float64 if real else torch.complex128
    tensors = A, *(randn(H, N, seed=s, dtype=wide) for s in (3, 4)), 0.05 + 0.1 * randn(H, seed=5).sigmoid()
    return [x.to(dtype if not x.is_complex() else dtype.to_complex()) for x in tensors]


# --- diag_ssm_kernel ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_length_and_size(composition, dtype):
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    cases = [(1, 1), (2, 1), (3, 2), (23, 5), (24, 5), (97, 3), (1021, 65), (257, 130)]
    for (L, N), real in itertools.product(cases, (False, True)):
        inputs = model(2, N, real=real, dtype=dtype)
        disc = ("zoh", "bilinear", "dss")[L % 3]
        found = with_gradients(scalekern.diag_ssm_kernel, inputs, L, disc)
        expected = with_gradients(reference.diag_ssm_kernel, map(upcast, inputs), L, disc)
        for i, (a, e) in enumerate(zip(found, expected)):
            assert_close(a, e, tolerance=tolerance, what=f"{L} {N} {disc} real={real} {i}")
            assert e.norm() > 0


def test_256k_in_float32_with_slow_decay(composition):
    A = torch.tensor([[-1e-3 + 3j, -1e-3 + 40j, -0.5 + 1j]], dtype=torch.complex64)
    inputs = A, *(randn(1, 3, seed=i, dtype=torch.complex64) for i in (1, 2)), torch.tensor([1e-2])
    found = with_gradients(scalekern.diag_ssm_kernel, inputs, 1 << 18)
    expected = with_gradients(reference.diag_ssm_kernel, map(upcast, inputs), 1 << 18)
    assert expected[0][:, -1000:].norm() > 0.01 * expected[0][:, :1000].norm()
    assert_close(found[0], expected[0], tolerance=1e-6)
    assert_close(found[0][:, -1000:], expected[0][:, -1000:], tolerance=TOLERANCE[torch.float32])
    for a, e in zip(found[1:], expected[1:]):
        assert_close(a, e, tolerance=TOLERANCE[torch.float32])


def test_powers_that_vanish_and_grow(composition):
    """a = 0, |a| far below 1 (powers that would be subnormal), a < 0, and |a| > 1."""
    a = torch.tensor([[0, 1e-3, -0.7, 1.01, 0.999j, 1e-200]], dtype=torch.complex128)
    w, L = randn(2, 1, 6, dtype=torch.complex128), 1500
    exact = torch.stack([(w * a**l).sum(-1).real if l else w.sum(-1).real for l in range(L)], -1)
    g = randn(2, 1, L, seed=3)
    orders = torch.arange(L, dtype=torch.float64)
    table = torch.where(orders == 0, 1, a[..., None] ** orders)
    slopes = torch.cat([torch.zeros(1, 6, 1), orders[1:] * table[..., :-1]], -1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        y = _diag_ssm.powers_sum(w, a, L, dtype)
        assert_close(y, exact, tolerance=tolerance)
        assert not ((y != 0) & (y.abs() < torch.finfo(dtype).tiny)).any()
        for m, weights in zip(_diag_ssm.moments(g.to(dtype), a), (table, slopes)):
            e = (weights * g[:, :, None]).sum(-1)
            for n in range(6):
                assert_close(m[..., n], e[..., n], tolerance=tolerance)


def test_sums_of_any_shape(composition):
    """Rows that share a head's eigenvalues, more states than a table takes, few heads split over threads."""
    for M, H, N, L in ((3, 2, 70, 130), (1, 1, 9, 5003), (2, 1, 33, 24), (5, 3, 2, 25)):
        a = torch.polar(0.9 + 0.1 * randn(H, N).sigmoid(), randn(H, N, seed=1))
        w, g = randn(M, H, N, dtype=torch.complex128), randn(M, H, L, seed=2)
        table = a[..., None] ** torch.arange(L)
        for real in (False, True):
            a_, w_, t = (a.abs(), w.real, a.abs()[..., None] ** torch.arange(L)) if real else (a, w, table)
            y = torch.einsum("mhn,hnl->mhl", w_, t).real
            assert_close(_diag_ssm.powers_sum(w_, a_, L, torch.float64), y, tolerance=1e-12)
            m0, m1 = _diag_ssm.moments(g, a_)
            assert_close(_diag_ssm.moments(g, a_, slope=False)[0], m0, tolerance=1e-14)
            assert_close(m0, torch.einsum("mhl,hnl->mhn", g.to(t.dtype), t), tolerance=1e-12)
            assert_close(m1, torch.einsum("mhl,hnl->mhn", (g * torch.arange(L)).to(t.dtype), t) / a_, tolerance=1e-12)


def test_memory_is_linear():
    """Beyond its output a kernel takes less than a twentieth of one (H, N, L) buffer, forward and backward."""
    H, N, L = 8, 64, 16384
    inputs = [x.requires_grad_() for x in model(H, N, dtype=torch.float32)]
    assert peak_bytes(lambda: scalekern.diag_ssm_kernel(*inputs, L)) < H * N * L * 8 / 20
    out, dout = scalekern.diag_ssm_kernel(*inputs, L), torch.ones(H, L)
    assert peak_bytes(lambda: torch.autograd.grad(out, inputs, dout)) < H * N * L * 8 / 20
    A, B, C, dt = inputs
    assert peak_bytes(lambda: scalekern.dplr_ssm_kernel(A, B, B, C, dt, L, C_is_truncated=True)) < H * N * L * 16 / 8


# --- dplr_ssm_kernel ---


@pytest.mark.parametrize("pairs", [True, False])
def test_cauchy_sums_in_blocks(composition, pairs, monkeypatch):
    """Odd and even lengths over more than one block of roots and of heads, ranks 1 to 3, in float32 too."""
    monkeypatch.setitem(_dplr_ssm.BLOCK_ELEMENTS, "cpu", 600)
    for L, N, R in ((2, 1, 1), (301, 9, 1), (64, 10, 2), (37, 3, 3)):
        Lambda, B, C, dt = model(3, N)
        P = 0.5 * randn(R, 3, N, seed=6, dtype=torch.complex128)
        for dtype, tolerance in ((torch.complex128, 1e-12), (torch.complex64, 2e-6)):
            inputs = [*(x.to(dtype) for x in (Lambda, P, B, C)), dt.to(dtype.to_real())]
            options = dict(conjugate_pairs=pairs, C_is_truncated=True)
            found = with_gradients(scalekern.dplr_ssm_kernel, inputs, L, **options)
            expected = with_gradients(reference.dplr_ssm_kernel, map(upcast, inputs), L, **options)
            for i, (a, e) in enumerate(zip(found, expected)):
                assert_close(a, e, tolerance=tolerance, what=f"{L} {N} {R} {i}")


def test_a_narrow_resonance_keeps_its_digits():
    """Im / Re of Lambda is 1e5: in float32 arithmetic two digits of the peak would be left."""
    Lambda = torch.tensor([[-1e-3 + 100j, -0.5 + 3j]], dtype=torch.complex64)
    P, B, C = (randn(1, 2, seed=s, dtype=torch.complex64) for s in (1, 2, 3))
    inputs = Lambda, 1e-2 * P, B, C, torch.tensor([1e-2])
    found = with_gradients(scalekern.dplr_ssm_kernel, inputs, 4096, C_is_truncated=True)
    for a, e in zip(found, with_gradients(reference.dplr_ssm_kernel, map(upcast, inputs), 4096, C_is_truncated=True)):
        assert_close(a, e, tolerance=2e-6)


# --- diag_ssm ---


@pytest.mark.parametrize("method", ["scan", "conv"])
@pytest.mark.parametrize("sample", samples("diag_ssm"), ids=lambda s: s.name)
def test_chunks_of_any_length_give_the_same(sample, method, composition, monkeypatch):
    args, kwargs = sample.make(dtype=torch.float64)
    initial = kwargs["initial_state"]

    def passes(package, **options):
        call = lambda *t: package.diag_ssm(*t[:6], **{**kwargs, "initial_state": t[6], **options})
        return with_gradients(call, [*args, initial])

    expected = passes(reference)
    for size in (1, 5, 64):
        monkeypatch.setattr(_diag_ssm_chunks, "CONV_CHUNK", size)
        monkeypatch.setattr(_diag_ssm_chunks, "SCAN_CHUNK", size)
        for a, e in zip(passes(scalekern, method=method), expected):
            assert_close(a, e, tolerance=1e-12)


@pytest.mark.parametrize("name, disc", [("state", "zoh"), ("bilinear", "bilinear"), ("real", "zoh")])
def test_coefficients_made_before_give_the_same(name, disc):
    """Values and the gradients of what the coefficients were made from."""
    (u, *model), kwargs = next(s for s in samples("diag_ssm") if s.name == name).make(dtype=torch.float32)
    initial = kwargs["initial_state"]

    def discrete(A, B, C, D, dt, x):
        a, b = scalekern.diag_ssm_discretize(A, B, dt, disc)
        assert a.dtype == (torch.complex128 if A.is_complex() else torch.float64)
        return scalekern.diag_ssm(u, a, b, C, D, None, initial_state=x, return_last_state=True)

    call = lambda *t: scalekern.diag_ssm(u, *t[:5], initial_state=t[5], return_last_state=True, disc=disc)
    for a, e in zip(with_gradients(discrete, [*model, initial]), with_gradients(call, [*model, initial])):
        assert_close(a, e, tolerance=2e-6)
    with pytest.raises(TypeError, match="diag_ssm_kernel: dt must be a torch.Tensor, got NoneType"):
        scalekern.diag_ssm_kernel(*model[:3], None, 4)
    with pytest.raises(ValueError, match="diag_ssm_discretize: disc must be one of 'zoh', 'bilinear', got 'dss'"):
        scalekern.diag_ssm_discretize(model[0], model[1], model[4], "dss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_and_single_tokens_are_one_call(dtype):
    A, B, C, dt = model(3, 6, dtype=torch.float32)
    u, D, L = randn(2, 3, 90).to(dtype), randn(3).float(), 90
    whole, last = scalekern.diag_ssm(u, A, B, C, D, dt, return_last_state=True, method="conv")
    for cuts in ([0, 7, 80, L], [0, 1, 45, L], range(0, L + 1)):
        parts, state = [], None
        for begin, end in itertools.pairwise(cuts):
            part = u[..., begin:end]
            y, state = scalekern.diag_ssm(part, A, B, C, D, dt, initial_state=state, return_last_state=True)
            parts.append(y)
        assert state.dtype == torch.complex64
        assert_close(torch.cat(parts, -1), whole, tolerance=2e-6 if dtype == torch.float32 else TOLERANCE[dtype])
        assert_close(state, last, tolerance=2e-6)
    assert error(scalekern.diag_ssm(u[..., 45:], A, B, C, D, dt), whole[..., 45:]) > 0.05  # the state counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("L", [1, 9])
def test_a_real_state_of_a_complex_model_is_promoted(L, dtype):
    """The state after it has an imaginary part, whatever the one before it had; gradients flow to the real one."""
    A, B, C, dt = model(3, 6, dtype=torch.float32)
    u, D = randn(2, 3, L).float(), randn(3).float()
    real = randn(2, 3, 6, seed=7).to(dtype).requires_grad_()
    kind = torch.promote_types(dtype, torch.complex64)
    wide = real.detach().to(kind).requires_grad_()
    run = lambda x: scalekern.diag_ssm(u, A, B, C, D, dt, initial_state=x, return_last_state=True)
    found, expected = run(real), run(wide)
    assert found[1].dtype == kind and found[1].imag.abs().max() > 0.1
    assert all(torch.equal(a, e) for a, e in zip(found, expected))
    grads = [torch.autograd.grad(y.square().sum() + s.abs().square().sum(), x)[0]
             for (y, s), x in ((found, real), (expected, wide))]  # fmt: skip
    assert grads[0].dtype == dtype and torch.equal(grads[0], grads[1].real.to(dtype))


def test_a_sparse_input_is_refused_after_a_dense_one():
    A, B, C, dt = model(3, 6, dtype=torch.float32)
    u = randn(2, 3, 9).float()
    scalekern.diag_ssm(u, A, B, C, None, dt)
    for _ in range(2):
        with pytest.raises(TypeError, match="^diag_ssm: u must be dense, got layout sparse_coo"):
            scalekern.diag_ssm(u.to_sparse(), A, B, C, None, dt)


def test_a_long_sequence_in_chunks_is_the_convolution(monkeypatch):
    monkeypatch.setattr(_diag_ssm_chunks, "CONV_CHUNK", 1000)
    A, B, C, dt = model(2, 5, dtype=torch.float32, decay=0.01)
    u, L = randn(1, 2, 4999).float(), 4999
    kernel = diag_ssm_kernel_fwd(*(upcast(x) for x in (A, B, C, dt)), L, "zoh", True)
    expected = reference.fft_conv(u.double(), kernel, method="fft")
    assert_close(scalekern.diag_ssm(u, A, B, C, None, dt), expected, tolerance=TOLERANCE[torch.float32])
