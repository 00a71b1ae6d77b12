"""torch.func over every op that is trained: its gradients are autograd's, by sample too; what is refused says so."""

import pytest
import torch
from conftest import INTERPRET
from contract import TRAINABLE, TRAINABLE_IDS, clones, floating, gradients, loss, tensors_of, with_tensors

import scalekern
from scalekern._library import OPS
from scalekern.testing import error

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels")
LISTS = {op.public for op in OPS.values() if op.function is None and "Tensor[]" in op.schema}  # dwt2d, idwt2d


def as_loss(op, args, kwargs):
    """(a function of the floating arguments alone, those)"""
    leaves = floating(tensors_of(args, kwargs))

    def function(values):
        own, options = with_tensors(args, kwargs, values)
        out = getattr(scalekern, op)(*own, **options)
        return loss(out if isinstance(out, tuple) else (out,))

    return function, leaves


@pytest.mark.parametrize("op, sample", TRAINABLE, ids=TRAINABLE_IDS)
def test_grad_is_autograds(op, sample):
    if op in LISTS:
        pytest.skip("an op with a list of tensors: a limit in the README")
    args, kwargs = clones(*sample.make(dtype=torch.float32, seed=2))
    function, leaves = as_loss(op, args, kwargs)
    found, (_, wanted) = torch.func.grad(function)(leaves), gradients(getattr(scalekern, op), args, kwargs)
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        grad = torch.zeros_like(leaves[name]) if grad is None else grad
        assert found[name].dtype == grad.dtype and error(found[name], grad) <= 1e-6, name  # sums of parts, in any order


def test_gradients_by_sample_and_jacobians():
    """vmap of grad, and jacrev, which is vmap of vjp, against loops."""
    a, b, weight = torch.rand(3, 2, 7), torch.randn(3, 2, 7), torch.randn(2, 7)

    def function(a, b):
        return (scalekern.diag_scan(a, b, dim=-1) * weight).square().sum()

    found = torch.func.vmap(torch.func.grad(function, argnums=(0, 1)))(a, b)
    for i in range(3):
        assert all(map(torch.equal, [x[i] for x in found], torch.func.grad(function, argnums=(0, 1))(a[i], b[i])))
    shared = torch.func.vmap(torch.func.grad(function), in_dims=(0, None))(a, b[0])
    assert torch.equal(shared[2], torch.func.grad(function)(a[2], b[0]))
    inside = torch.func.grad(lambda a: torch.func.vjp(lambda b: function(a, b), b[0])[0])(a[0])  # one level in another
    assert torch.equal(inside, torch.func.grad(function)(a[0], b[0]))
    batched = torch.func.grad(lambda a: torch.func.vmap(function)(a, b).sum())(a)
    assert torch.equal(batched[1], torch.func.grad(function)(a[1], b[1]))
    scan = lambda b: scalekern.diag_scan(a[0], b, dim=-1)
    assert torch.allclose(torch.func.jacrev(scan)(b[0]), torch.autograd.functional.jacobian(scan, b[0]))


def test_what_is_refused_says_so():
    b = torch.randn(2, 7)
    function = lambda b: scalekern.diag_scan(b, b, dim=-1).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="diag_scan_bwd: second-order gradients are not implemented"):
        torch.func.grad(lambda b: torch.func.grad(function)(b).sum())(b)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (b,), (b,))
    with pytest.raises(NotImplementedError, match="this decoding op has no gradient"):
        cache = torch.randn(1, 2, 5, 8)
        attend = scalekern.sparse_attention_decode
        torch.func.grad(lambda q: attend(q, cache, cache, torch.tensor([5])).sum())(torch.randn(1, 2, 1, 8))
