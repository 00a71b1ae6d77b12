"""fake_quantize: the paper's numbers by hand, the values that `quantize` stores, and training with learned steps."""

import pytest
import torch

import scalekern
from scalekern.quant import dequantize, quantize


def test_the_gradients_of_the_paper_by_hand():
    """LSQ, equations 1 to 3: 3 bits are -4 .. 3; x / s below, inside, at an end of and above the range."""
    x = torch.tensor([-5.0, -2.2, -0.4, 1.5, 3.0, 7.0], dtype=torch.float64) * 0.5
    x, s = x.requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    out = scalekern.fake_quantize(x, s, bits=3)
    assert out.tolist() == [-2.0, -1.0, 0.0, 1.0, 1.5, 1.5]
    weight = torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5], dtype=torch.float64)
    dx, ds = torch.autograd.grad((out * weight).sum(), (x, s))
    assert dx.tolist() == [0.0, 10.0, 100.0, 1e3, 1e4, 0.0]
    slopes = torch.tensor([-4.0, -2 + 2.2, 0 + 0.4, 2 - 1.5, 3 - 3.0, 3.0], dtype=torch.float64)
    assert ds.item() == pytest.approx((slopes * weight).sum().item())
    (scaled,) = torch.autograd.grad((scalekern.fake_quantize(x, s, bits=3, grad_factor=0.01) * weight).sum(), s)
    assert scaled.item() == pytest.approx(0.01 * ds.item())


def test_an_unsigned_range_and_the_gradient_of_zero():
    """LSQ+: only what is clipped moves the offset, by -s."""
    x = torch.tensor([-1.0, 0.3, 1.9, 9.0], dtype=torch.float64)
    zero = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    out = scalekern.fake_quantize(x, torch.tensor(0.5, dtype=torch.float64), zero, bits=2)
    assert out.tolist() == [0.0, 0.5, 1.5, 1.5]
    weight = torch.tensor([1.0, 10.0, 100.0, 1e3], dtype=torch.float64)
    assert torch.autograd.grad((out * weight).sum(), zero)[0].item() == -0.5 * (1 + 100 + 1e3)


@pytest.mark.parametrize("bits, group_size, symmetric", [(2, 16, True), (4, None, True), (4, 32, False), (8, 7, False)])
def test_what_is_trained_is_what_is_stored(bits, group_size, symmetric):
    w = torch.randn(10, 75, generator=torch.Generator().manual_seed(0))
    q = quantize(w, f"int{bits}", group_size=group_size, symmetric=symmetric)
    out = scalekern.fake_quantize(w, q.scales, q.zeros, bits=bits, group_size=group_size)
    assert torch.equal(out, dequantize(q)) and not torch.equal(out, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    s = torch.tensor([0.013])
    wide = scalekern.fake_quantize(x.float(), s, bits=5)
    assert torch.equal(scalekern.fake_quantize(x, s, bits=5), wide.to(dtype))


def test_no_step_gives_zeros():
    x = torch.randn(2, 6).requires_grad_()
    s = torch.tensor([[0.0], [1.0]], requires_grad=True)
    out = scalekern.fake_quantize(x, s, bits=4)
    grads = torch.autograd.grad(out.sum(), (x, s))
    assert not out[0].any() and out[1].any() and all(g.isfinite().all() for g in grads)


def test_errors_name_the_argument():
    x, s = torch.randn(4, 10), torch.ones(4, 1)
    for call, message in [
        (lambda: scalekern.fake_quantize(x, s, bits=1), "bits must be an integer of at least 2, got 1"),
        (lambda: scalekern.fake_quantize(x, s, bits=17), "bits must be at most 16, got 17"),
        (lambda: scalekern.fake_quantize(x, torch.ones(4, 2), group_size=4), "scale must broadcast to .4, 3., got"),
        (lambda: scalekern.fake_quantize(x, s, torch.ones(4, 2)), "zero must broadcast to .4, 10., got shape .4, 2."),
        (lambda: scalekern.fake_quantize(x, s, group_size=0), "group_size must be an integer of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"^fake_quantize: {message}"):
            call()


def test_training_with_learned_steps_beats_rounding():
    """A 2-bit layer on inputs that depend on each other: rounded, trained with fixed and with learned steps."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    x = randn(256, 6) @ randn(6, 24) + 0.3 * randn(256, 24)
    target = x @ randn(24, 8) / 5 + 0.1 * randn(256, 8)
    fitted = torch.linalg.lstsq(x, target).solution.mT.contiguous()
    start = quantize(fitted, "int2", group_size=None, method="least_squares")
    loss_of = lambda w: (x @ w.mT - target).square().mean()

    def trained(learned):
        w, s = fitted.clone().requires_grad_(), start.scales.clone().requires_grad_(learned)
        optimizer = torch.optim.Adam([w, s] if learned else [w], 1e-2)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
        for _ in range(120):
            loss = loss_of(scalekern.fake_quantize(w, s, bits=2, grad_factor=24**-0.5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        return loss_of(scalekern.fake_quantize(w, s, bits=2)).item()

    learned, fixed, rounded = trained(True), trained(False), loss_of(dequantize(start)).item()
    assert learned < 0.5 * fixed and fixed < 0.8 * rounded, (learned, fixed, rounded)
