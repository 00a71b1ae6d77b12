"""Layers of scalekern.nn, forward and backward, against what their papers' equations are in plain torch.

Shape letters: B batch, D model width, L length, H heads, N states.
"""

import copy
import functools
import math

import torch

from scalekern import nn
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_fft_conv import plain_fft_conv
from scalekern.benchmarks.bench_selective_scan import FP32, case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work

PLAIN = "plain torch"


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


def plain_hyena(m, u):
    """The operator of order 2 as upstream's standalone version has it: torch's convolution, gates, irfft(rfft rfft)."""
    length = u.shape[1]
    x = m.short_filter(m.in_proj(u).transpose(1, 2))[..., :length]
    gate, inner, v = x.chunk(3, 1)
    v = v * inner
    k = m.filter_fn.filter(length)[0].T
    y = fft_conv(v, k) + m.filter_fn.bias[:, None] * v
    return m.out_proj((y * gate).transpose(1, 2))


def plain_h3(m, u):
    """Both kernels as sums over their states, the diagonal one by the (H, N, L) matrix of powers, then two FFTs."""
    q, k, v = (proj(u).transpose(1, 2) for proj in (m.q_proj, m.k_proj, m.v_proj))
    size = 2 * m.d_state
    shift, diagonal = m.ssm_k_kernel.kernel, m.kernel.kernel
    taps = torch.fft.irfft(torch.fft.rfft(shift.B, n=size).conj() * torch.fft.rfft(shift.C[0], n=size), n=size)
    k = fft_conv(k, taps[:, : min(m.d_state, u.shape[1])]) + m.ssm_k_D[:, None] * k
    A, B, C, dt = diagonal.ssm()
    z = dt[:, None] * A / 2
    powers = torch.exp(((1 + z) / (1 - z)).log()[..., None] * torch.arange(u.shape[1], device=u.device))
    kernel = 2 * torch.einsum("hn,hnl->hl", C * B * dt[:, None] / (1 - z), powers).real
    kv = k * v
    y = fft_conv(kv, kernel) + m.D[:, None] * kv
    return m.output_linear((q * y).transpose(1, 2))


def fft_conv(u, k):
    if u.dtype == torch.float32:
        return plain_fft_conv(u, k)
    size = 2 * u.shape[-1]  # the same in float64
    return torch.fft.irfft(torch.fft.rfft(u, n=size) * torch.fft.rfft(k, n=size), n=size)[..., : u.shape[-1]]


def layer(device, dtype, make, plain, projections, convolutions, B, D, L) -> Work:
    """A module's output and its gradients for the input and every parameter."""
    torch.manual_seed(0)
    module = make(device).to(dtype)
    u, dout = (normal(device, seed)(B, L, D).to(dtype) for seed in (0, 1))
    wide = copy.deepcopy(module).double()

    def passes(function, module, u, dout):
        inputs = (u.requires_grad_(), *module.parameters())
        return peers.forward_backward(lambda: function(u), dout, inputs)

    exact = passes(functools.partial(plain, wide), wide, u.detach().double(), dout.double())
    # Forward and backward: three products a projection; 14 transforms of two lengths for two rows a convolution.
    transform = 2.5 * 2 * L * math.log2(2 * L)
    return Work(
        run=passes(module, module, u, dout),
        oracle=exact,
        # A layer is several ops in a row: each may add what it may have alone.
        tolerance=4 * gradient_tolerance("fft_conv", dtype),
        # The input, the gradient and the projections' outputs, written and read, once each way.
        bytes_moved=2 * (2 + 2 * projections) * B * L * D * dtype.itemsize,
        flops=int(3 * 2 * B * L * D * D * projections + convolutions * (7 * B + 3) * D * transform),
        peers={PLAIN: lambda: peers.torch_peer(passes(functools.partial(plain, module), module, u, dout))},
    )


def hyena(device, dtype=FP32, *, B, D, L) -> Work:
    make = lambda device: nn.HyenaOperator(D, L, emb_dim=5, w=10, device=device)
    return layer(device, dtype, make, plain_hyena, 4, 1, B, D, L)


def h3(device, dtype=FP32, *, B, D, L) -> Work:
    return layer(device, dtype, lambda device: nn.H3(D, d_state=64, device=device), plain_h3, 4, 2, B, D, L)


_OPS = {
    hyena: ("fft_conv_fwd", "fft_conv_bwd", "causal_conv1d_fwd", "causal_conv1d_bwd"),
    h3: ("fft_conv_fwd", "fft_conv_bwd", "diag_ssm_kernel_fwd", "diag_ssm_kernel_bwd"),
}
_FAST = ("cuda", "triton", "cpu")  # without the reference, whose loops and sums take seconds
_WIDE = {"B": 2, "D": 256, "L": 4096}
CASES = [
    case("hyena", hyena, _OPS[hyena], "fwd+bwd", "cpu", 90, _WIDE, backends=_FAST),
    case("h3", h3, _OPS[h3], "fwd+bwd", "cpu", 91, _WIDE, note="n64", backends=_FAST),
]
