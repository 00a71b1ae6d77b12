"""Gradients of what a weight is scaled and shifted by, against the oracle's in float64; one token, no rows."""

import copy

import pytest
import torch
from conftest import INTERPRET
from torch.utils._python_dispatch import TorchDispatchMode

import scalekern
from scalekern import _library, _native, reference
from scalekern.ops import _quant_matmul_cpu
from scalekern.quant import quantize
from scalekern.testing import assert_close
from scalekern.testing.quant_matmul import weight

pytestmark = pytest.mark.skipif(INTERPRET, reason="test_triton_quant_matmul holds the Triton kernels to theirs")
PARTS = ("scales", "zeros", "offsets", "outer")


def shifted(N, K, group):
    """Codes with a minimum a group, as GGUF's."""
    w = weight(N, K, "int4", group)
    return w.replace(offsets=torch.randn(w.scales.shape, generator=torch.Generator().manual_seed(0)) * 0.1)


def two_levels(N, K, group):
    """Floating scales below a scale a row, with a shift inside."""
    return shifted(N, K, group).replace(outer=0.5 + torch.rand(N, 1, generator=torch.Generator().manual_seed(1)))


WEIGHTS = {
    "short_group": lambda: weight(70, 100, "int4", 32, symmetric=False),
    "odd_group": lambda: weight(19, 37, "int3", 11, symmetric=False),
    "one_scale": lambda: weight(9, 64, "int2", "tensor", symmetric=False),
    "binary": lambda: weight(18, 130, "int1", 64),
    "table": lambda: weight(17, 70, "nf4", 32),
    "shifted": lambda: shifted(20, 96, 32),
    "two_levels": lambda: two_levels(12, 90, 16),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_gradients_of_the_parts(name, activation, backend):
    w = WEIGHTS[name]()
    x = torch.randn(5, w.columns, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(w.shape[0], generator=torch.Generator().manual_seed(3))
    dout = torch.randn(5, w.shape[0], generator=torch.Generator().manual_seed(4))

    def gradients(function, wide):
        to = lambda t: (t.detach().double() if wide else t.detach().clone()).requires_grad_()
        parts = {p: to(t) for p in PARTS if (t := getattr(w, p)) is not None}
        leaves = [to(x), to(bias), *parts.values()]
        out = function(leaves[0], w.replace(**parts), bias=leaves[1], activation=activation)
        return ["x", "bias", *parts], torch.autograd.grad(out, leaves, dout.to(out.dtype))

    names, expected = gradients(reference.quant_matmul, True)
    with scalekern.backend(backend):
        _, actual = gradients(scalekern.quant_matmul, False)
    for part, a, e in zip(names, actual, expected):
        assert a.dtype == torch.float32
        assert_close(a, e, tolerance=5e-6, what=f"gradient of {part}")


def test_gradcheck_of_the_parts():
    w = two_levels(5, 14, 4)
    parts = {p: t.double().requires_grad_() for p in PARTS if (t := getattr(w, p)) is not None}
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    function = lambda x, *values: scalekern.quant_matmul(x, w.replace(**dict(zip(parts, values))))
    assert torch.autograd.gradcheck(function, (x, *parts.values()))


def test_a_vector_and_no_tokens():
    w, x = quantize(torch.randn(7, 40), "int4", group_size=16), torch.randn(40)
    assert_close(scalekern.quant_matmul(x, w), w.dequantize() @ x, tolerance=1e-6)
    assert scalekern.quant_matmul(x.expand(0, 3, 40), w).shape == (0, 3, 7)


def test_sizes_of_zero_have_gradients_of_zero_elements():
    for N, K in ((0, 5), (3, 0), (0, 0)):
        w = quantize(torch.randn(N, K), "int4", group_size=2)
        w = w.replace(scales=w.scales.requires_grad_())
        x, bias = torch.randn(2, K, requires_grad=True), torch.randn(N, requires_grad=True)
        scalekern.quant_matmul(x, w, bias=bias).sum().backward()
        assert bias.grad.shape == (N,) and w.scales.grad.shape == w.scales.shape and x.grad.shape == (2, K)


def test_calls_that_cannot_be():
    x, w = torch.randn(3, 40), quantize(torch.randn(8, 40), "int4", group_size=16)
    for arguments, message in (
        ({"activation_scale": "a"}, "activation_scale must be a number, got 'a'"),
        ({"activation_scale": torch.ones(3)}, "activation_scale must be a number, got tensor"),
        ({"activation_scale": 1e-60}, "activation_scale must lie in float32's range, got 1e-60"),
        ({"activation_scale": float("inf")}, "activation_scale must lie in float32's range, got inf"),
        ({"x": x.to_sparse()}, "x must be a dense tensor, got torch.sparse_coo"),
        ({"w": w.replace(perm=torch.arange(40) - 1)}, "perm must hold columns 0 to 39, got -1 to 38"),
        ({"w": w.replace(scales=None)}, "scales must be a torch.Tensor, got NoneType"),
        ({"x": x[0, 0]}, r"x must have at least 1 dimension, got shape \(\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^quant_matmul: {message}"):
            scalekern.quant_matmul(**{"x": x, "w": w, "activation": "int8", **arguments})
    with pytest.raises(TypeError, match="^dequantize: w must be a .*QuantizedTensor, got Tensor"):
        scalekern.quant.dequantize(x)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", ()), func.name()]
        return func(*args, **(kwargs or {}))


def test_what_the_dispatcher_does_is_not_passed_over(monkeypatch):
    """Plain calls go straight to a backend; modes, transforms, casts, graphs and lazy negation must still be seen."""
    w, x = quantize(torch.randn(7, 40), "int4", group_size=16), torch.randn(3, 40)
    out, answers = scalekern.quant_matmul(x, w), []
    is_plain = _library.is_plain
    monkeypatch.setattr(_library, "is_plain", lambda args: answers.append(is_plain(args)) or answers[-1])

    def passed(run, *args):
        answers.clear()
        return run(*args), answers[0]

    run = lambda x: scalekern.quant_matmul(x, w)
    again, light = passed(run, x)
    assert light and torch.equal(again, out)
    with torch.inference_mode():
        assert passed(run, x)[1]
    with Seen() as seen:
        run(x)
    assert seen.names == ["scalekern::quant_matmul_fwd"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(x).dtype == torch.bfloat16
    mapped, light = passed(torch.vmap(run), x)
    assert not light and torch.equal(mapped, out)
    negated = torch.complex(torch.zeros(3, 40), x).conj().imag
    assert negated.is_neg() and torch.equal(run(negated), -out)
    leaf = x.clone().requires_grad_()
    assert not passed(run, leaf)[1] and run(leaf).requires_grad
    with torch.no_grad():
        assert passed(run, leaf)[1]


@pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")
def test_a_weight_that_was_used_before(monkeypatch):
    """The second call goes straight to the kernel: what it may not pass by, it must not."""
    w, x = quantize(torch.randn(9, 64), "int4", group_size=32), torch.randn(3, 64)
    first = scalekern.quant_matmul(x, w)
    assert w.__dict__["_native"] and torch.equal(scalekern.quant_matmul(x, w), first)
    assert torch.equal(scalekern.quant_matmul(x.mT.contiguous().mT, w), first)
    assert torch.equal(scalekern.quant_matmul(x[0], w), first[0]) and scalekern.quant_matmul(x[:0], w).shape == (0, 9)
    assert scalekern.quant_matmul(x.bfloat16(), w).dtype == torch.bfloat16
    assert scalekern.quant_matmul(x.double(), w).dtype == torch.float64
    with pytest.raises(ValueError, match=r"quant_matmul: x must have shape \(3, 64\), got \(3, 63\)"):
        scalekern.quant_matmul(x[:, :63].contiguous(), w)
    with pytest.raises(ValueError, match="quant_matmul: activation"):
        scalekern.quant_matmul(x, w, activation="int3")
    with pytest.raises(TypeError, match="quant_matmul: x must"):
        scalekern.quant_matmul(x.int(), w)
    with pytest.raises((TypeError, ValueError), match="quant_matmul: x"):
        scalekern.quant_matmul([1.0], w)
    with torch.autocast("cpu", torch.bfloat16):
        assert scalekern.quant_matmul(x, w).dtype == torch.bfloat16
    assert scalekern.quant_matmul(x.requires_grad_(), w).requires_grad
    x = x.detach()
    w.scales.requires_grad_()
    assert scalekern.quant_matmul(x, w).requires_grad
    with torch.no_grad():
        assert torch.equal(scalekern.quant_matmul(x, w), first)
    w.scales.requires_grad_(False)
    w.scales.mul_(2)
    assert torch.allclose(scalekern.quant_matmul(x, w), 2 * first)
    w.scales.data = 2 * w.scales  # the same object, elsewhere
    assert torch.allclose(scalekern.quant_matmul(x, w), 4 * first)
    w.scales.data = w.scales / 2
    w = copy.deepcopy(w)
    w.scales.div_(2)
    assert torch.equal(scalekern.quant_matmul(x, w), first)
    for sparse in (x.to_sparse(), x.to_mkldnn()):
        with pytest.raises(TypeError, match="quant_matmul: x must be a dense tensor, got"):
            scalekern.quant_matmul(sparse, w)
    changed = copy.deepcopy(w)
    scalekern.quant_matmul(x, changed)
    changed.scales.data = changed.scales.data[:1]  # the same address
    assert_close(scalekern.quant_matmul(x, changed), x @ changed.dequantize().T, tolerance=1e-6)
    changed.scales.resize_(2, 2)
    for bias in (None, torch.zeros(9)):
        with pytest.raises(ValueError, match=r"quant_matmul: scales must have shape \(9, 2\) or \(1, 2\), got"):
            scalekern.quant_matmul(x, changed, bias=bias)
    for run in (scalekern.quant_matmul, torch.compile(scalekern.quant_matmul, fullgraph=True, backend="eager")):
        assert torch.equal(run(x, w), first)
    kernel = []
    monkeypatch.setattr(_quant_matmul_cpu.KeptWeight, "product", lambda *args: kernel.append(args))
    monkeypatch.setenv("SCALEKERN_BACKEND", "reference")
    assert torch.allclose(scalekern.quant_matmul(x, w), first, atol=1e-5) and not kernel
