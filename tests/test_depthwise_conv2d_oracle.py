"""The oracles of the depthwise 2-D convolutions against loops in numpy.

Shape letters: B batch, C channels, H x W input, I x J filter, P x Q output.
"""

import re

import numpy as np
import oracles
import pytest
import torch
from oracles import TIGHT, cases, one_thread, randn  # noqa: F401

from scalekern.reference.depthwise_conv2d import depthwise_conv2d, depthwise_conv_transpose2d, merge_dilated_branches
from scalekern.testing import TOLERANCE, assert_close, error, upcast


def pair(value):
    return (value, value) if isinstance(value, int) else value


def brute(x, w, bias=None, *, padding="same", stride=1, dilation=1, method="auto"):
    """Output by output, from an image with more zeros around it than any tap can reach."""
    w = w[:, 0] if w.dim() == 4 else w
    x, w, (s, t), (d, e) = x.numpy(), w.numpy(), pair(stride), pair(dilation)
    (B, C, H, W), (_, I, J) = x.shape, w.shape
    reach = (d * (I - 1), e * (J - 1))
    if padding == "same":
        before, around = (reach[0] // 2, reach[1] // 2), reach
    else:
        before = pair({"valid": 0}.get(padding, padding))
        around = (2 * before[0], 2 * before[1])
    P, Q = ((n + a - r - 1) // step + 1 for n, a, r, step in zip((H, W), around, reach, (s, t)))
    out = np.zeros((B, C, P, Q))
    for p, q, i, j in np.ndindex(P, Q, I, J):
        row, column = p * s + i * d - before[0], q * t + j * e - before[1]
        if 0 <= row < H and 0 <= column < W:
            out[:, :, p, q] += w[:, i, j] * x[:, :, row, column]
    return torch.from_numpy(out) + (0 if bias is None else bias[:, None, None])


def brute_transposed(x, w, bias=None, *, stride=1, padding=0, output_padding=0, dilation=1, method="auto"):
    x, w = x.numpy(), w.numpy()
    (s, t), (top, left), (d, e), more = pair(stride), pair(padding), pair(dilation), pair(output_padding)
    (B, C, H, W), (_, I, J) = x.shape, w.shape
    P, Q = (H - 1) * s - 2 * top + d * (I - 1) + more[0] + 1, (W - 1) * t - 2 * left + e * (J - 1) + more[1] + 1
    out = np.zeros((B, C, P, Q))
    for p, q, i, j in np.ndindex(H, W, I, J):
        row, column = p * s + i * d - top, q * t + j * e - left
        if 0 <= row < P and 0 <= column < Q:
            out[:, :, row, column] += w[:, i, j] * x[:, :, p, q]
    return torch.from_numpy(out) + (0 if bias is None else bias[:, None, None])


def mutants(right):
    return {
        "zero": torch.zeros_like(right),
        "shifted down": right.roll(1, -2),
        "shifted right": right.roll(1, -1),
        "channels swapped": right.flip(1),
        "rows swapped": right.flip(0),
    }


@pytest.mark.parametrize("op, sample", **cases("depthwise_conv2d", "depthwise_conv_transpose2d"))
def test_agrees_with_loops(op, sample):
    args, kwargs = sample.make(dtype=torch.float64)
    out = oracles.ORACLES[op][0](*args, **kwargs)
    assert_close(out, {"depthwise_conv2d": brute}.get(op, brute_transposed)(*args, **kwargs), tolerance=TIGHT)
    if args[2] is not None:
        assert error(oracles.ORACLES[op][0](*args[:2], **kwargs), out) > 2 * TOLERANCE[torch.bfloat16]
    if min(out.shape) > 1:
        for name, wrong in mutants(out).items():
            assert error(wrong, out) > 2 * TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("padding", ["same", "valid", 2, (0, 3)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_options(padding, stride, dilation):
    x, w = randn(1, 2, 8, 9), randn(2, 3, 4, seed=1)
    options = dict(padding=padding, stride=stride, dilation=dilation)
    assert_close(depthwise_conv2d(x, w, **options), brute(x, w, **options), tolerance=TIGHT)


@pytest.mark.parametrize("H, W, I, J", [(7, 7, 7, 7), (5, 6, 51, 3), (1, 9, 4, 31), (14, 13, 31, 31), (3, 3, 2, 2)])
def test_same_keeps_the_size(H, W, I, J):
    x, w = randn(1, 2, H, W), randn(2, I, J, seed=1)
    out = depthwise_conv2d(x, w)
    assert out.shape == x.shape
    assert_close(out, brute(x, w), tolerance=TIGHT)


def test_by_hand():
    x = torch.arange(1.0, 10).reshape(1, 1, 3, 3)
    w = torch.tensor([[[1.0, 10], [100, 1000]]])  # not flipped; of an odd padding the larger part below and right
    expected = [[5421, 6532, 603], [8754, 9865, 906], [87, 98, 9]]
    assert depthwise_conv2d(x, w).tolist() == [[expected]]
    assert depthwise_conv2d(x, w, padding="valid").tolist() == [[[[5421, 6532], [8754, 9865]]]]
    up = depthwise_conv_transpose2d(x[..., :1, :2], w, stride=2)
    assert up.tolist() == [[[[1, 10, 2, 20], [100, 1000, 200, 2000]]]]


@pytest.mark.parametrize("op, sample", **cases("depthwise_conv2d", "depthwise_conv_transpose2d"))
def test_explicit_backward_equals_autograd(op, sample):
    oracles.check_explicit_backward(op, sample)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in (randn(1, 1, 4, 3), randn(1, 3, 2, seed=1), randn(1, seed=2))]
    options = dict(stride=(2, 1), dilation=(1, 2))
    for function in (depthwise_conv2d, depthwise_conv_transpose2d):
        assert torch.autograd.gradcheck(lambda *x: function(*x, **options), leaves)  # noqa: B023


@pytest.mark.parametrize("stride, dilation, padding", [(1, 1, 0), (2, 1, 1), ((2, 3), (1, 2), (1, 2))])
def test_the_transposed_form_is_the_transpose(stride, dilation, padding):
    w = randn(2, 3, 4, seed=1)
    options = dict(stride=stride, dilation=dilation, padding=padding)
    x = randn(1, 2, 5, 6)
    up = depthwise_conv_transpose2d(x, w, **options)
    y = randn(*up.shape, seed=2)
    assert_close((depthwise_conv2d(y, w, **options) * x).sum(), (up * y).sum(), tolerance=TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision_rounds_once(dtype):
    x, w, bias = randn(2, 3, 9, 9).to(dtype), randn(3, 7, 7, seed=1).float(), randn(3, seed=2).float()
    for function in (depthwise_conv2d, depthwise_conv_transpose2d):
        out, exact = function(x, w, bias), function(*(upcast(t) for t in (x, w, bias)))
        assert out.dtype == dtype
        assert_close(out, exact, tolerance={torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype])


# --- merge_dilated_branches ---


@pytest.mark.parametrize("lead", [(3,), (3, 1)])
def test_merged_branches_equal_their_sum(lead):
    """UniRepLKNet's K = 13: a large filter and its branches, all in one."""
    sizes, dilations = [13, 5, 7, 3, 3, 3], [1, 1, 2, 3, 4, 5]
    weights = [randn(*lead, n, n, seed=i).requires_grad_() for i, n in enumerate(sizes)]
    x = randn(2, 3, 17, 15, seed=9)
    branches = [depthwise_conv2d(x, w, dilation=d) for w, d in zip(weights, dilations)]
    merged = merge_dilated_branches(weights, dilations, 13)
    assert merged.shape == (*lead, 13, 13)
    assert_close(depthwise_conv2d(x, merged), sum(branches), tolerance=TIGHT)
    for i in range(len(branches)):
        assert error(sum(branches) - branches[i], sum(branches)) > 2 * TOLERANCE[torch.bfloat16]
    dout = randn(2, 3, 17, 15, seed=10)
    gradients = torch.autograd.grad(depthwise_conv2d(x, merged), weights, dout)
    for g, e in zip(gradients, torch.autograd.grad(sum(branches), weights, dout)):
        assert_close(g, e, tolerance=TIGHT)


def test_merged_rectangles_of_even_size():
    weights, dilations = [randn(2, 4, 7), randn(2, 2, 3, seed=1)], [1, (3, 2)]
    x = randn(1, 2, 9, 10, seed=2)
    merged = merge_dilated_branches(weights, dilations, (6, 9))
    expected = depthwise_conv2d(x, weights[0]) + depthwise_conv2d(x, weights[1], dilation=(3, 2))
    assert_close(depthwise_conv2d(x, merged), expected, tolerance=TIGHT)


@pytest.mark.parametrize("size, dilation, reach", [(5, 3, 7), (8, 1, 3), ((7, 6), 1, 3)])
def test_branches_that_do_not_fit_are_refused(size, dilation, reach):
    found = f"got size {pair(size)} and a dilated filter of {(reach, reach)}"
    with pytest.raises(ValueError, match=f"must be at least each dilated filter's .*{re.escape(found)}"):
        merge_dilated_branches([randn(1, 3, 3)], [dilation], size)
