"""Layers of scalekern.nn, forward and backward, against what their papers' equations are in plain torch.

Shape letters: B batch, D model width, L length, H heads, N states (tokens of the text of Samba-ASR).
"""

import copy
import functools
import math

import torch
import torch.nn.functional as F

from scalekern import masks, nn
from scalekern.benchmarks import harness, memory, peers
from scalekern.benchmarks.bench_fft_conv import plain_fft_conv
from scalekern.benchmarks.bench_selective_scan import FP32, case, gradient_tolerance, normal
from scalekern.benchmarks.case import Work
from scalekern.nn.var import scale_ends

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


def plain_var(m, u):
    """The block as upstream has it: torch's attention under a dense mask, which was made before."""
    six = F.linear(F.silu(m.cond), m.ada_lin[1].weight, m.ada_lin[1].bias).view(-1, 1, 6, m.embed_dim).unbind(2)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = six
    norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)
    bias = torch.cat([m.attn.q_bias, m.attn.zero_k_bias, m.attn.v_bias])
    y = F.linear(norm(u) * (1 + scale1) + shift1, m.attn.mat_qkv.weight, bias)
    q, k, v = y.view(*u.shape[:2], 3, m.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q = F.normalize(q, dim=-1) * m.attn.scale_mul_1H11.clamp_max(math.log(100)).exp()
    y = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, m.seen, scale=1.0)
    u = u + gamma1 * m.attn.proj(y.transpose(1, 2).flatten(2))
    y = m.ffn.fc1(norm(u) * (1 + scale2) + shift2)
    return u + gamma2 * m.ffn.fc2(F.gelu(y, approximate="tanh"))


def plain_mvar(m, u):
    """The block as upstream trains it: torch's attention under a dense mask, and Mamba-2 as a loop over time."""
    nine = F.linear(F.silu(m.cond), m.ada_lin[1].weight, m.ada_lin[1].bias).view(-1, 1, 9, m.embed_dim).unbind(2)
    norm = lambda x, i: F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + nine[3 + i]) + nine[6 + i]
    bias = torch.cat([m.attn.q_bias, m.attn.zero_k_bias, m.attn.v_bias])
    y = F.linear(norm(u, 0), m.attn.mat_qkv.weight, bias)
    q, k, v = y.view(*u.shape[:2], 3, m.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q = F.normalize(q, dim=-1) * m.attn.scale_mul_1H11.clamp_max(math.log(100)).exp()
    y = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, m.seen, scale=1.0)
    u = u + nine[0] * m.attn.proj(y.transpose(1, 2).flatten(2))
    u = u + nine[1] * plain_mamba2(m.mamba, norm(u, 1))
    return u + nine[2] * m.ffn.fc2(F.gelu(m.ffn.fc1(norm(u, 2)), approximate="tanh"))


def plain_mamba2(m, u):
    D, N, P = m.d_inner, m.d_state, m.headdim
    z, xBC, dt = m.in_proj(u).split([D, D + 2 * N, m.nheads], -1)
    xBC = F.silu(m.conv1d(xBC.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
    x, B, C = xBC.split([D, N, N], -1)
    x, dt = x.unflatten(-1, (-1, P)), F.softplus(dt + m.dt_bias)
    decay, added = torch.exp(-dt * m.A_log.exp()), dt[..., None] * x
    h, ys = u.new_zeros(u.shape[0], m.nheads, P, N), []
    for a, b, key, query in zip(*(t.unbind(1) for t in (decay, added, B, C))):
        h = a[..., None, None] * h + b[..., None] * key[:, None, None]
        ys.append(h @ query[:, None, :, None])
    y = (torch.stack(ys, 1)[..., 0] + m.D[:, None] * x).flatten(2) * F.silu(z)
    return m.out_proj(F.rms_norm(y, (D,), m.norm.weight, 1e-5))


def plain_hsm_ssd(m, u):
    """As upstream: torch's convolutions, the image (D, L / W, W)."""
    x = u.transpose(1, 2)
    image = F.conv1d(x, m.BCdt_proj.conv.weight).unflatten(2, (-1, m.columns))
    b, c, d = F.conv2d(image, m.dw.conv.weight, padding=1, groups=image.shape[1]).flatten(2).chunk(3, 1)
    h = x @ ((d + m.A[:, None]).softmax(-1) * b).mT
    h, z = F.conv1d(h, m.hz_proj.conv.weight).chunk(2, 1)
    return (F.conv1d(h * F.silu(z) + h * m.D, m.out_proj.conv.weight) @ c).transpose(1, 2)


def plain_moa(m, u):
    """Llama's attention under a dense mask for each head, which was made before."""
    split = lambda x: x.unflatten(-1, (-1, m.head_dim)).transpose(1, 2)
    q, k, v = (split(proj(u)) for proj in (m.q_proj, m.k_proj, m.v_proj))
    half = torch.arange(0, m.head_dim, 2, device=u.device) / m.head_dim
    turn = torch.arange(u.shape[1], device=u.device)[:, None] * m.rope_theta ** -half.double().repeat(2)
    cos, sin = turn.cos().to(u.dtype), turn.sin().to(u.dtype)
    rotate = lambda x: x * cos + torch.cat([-x[..., m.head_dim // 2 :], x[..., : m.head_dim // 2]], -1) * sin
    y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, m.seen, enable_gqa=True)
    return m.o_proj(y.transpose(1, 2).flatten(2))


def plain_bimamba(m, u):
    """Both directions as upstream's slow path has them: flips, torch's convolution, a loop over time."""
    x, z = m.in_proj(u).transpose(1, 2).chunk(2, 1)
    y = plain_mamba_scan(x, m.conv1d, m.x_proj, m.dt_proj, m.A_log, m.D)
    y = y + plain_mamba_scan(x.flip(-1), m.conv1d_b, m.x_proj_b, m.dt_proj_b, m.A_b_log, m.D_b).flip(-1)
    return m.out_proj((y * F.silu(z)).transpose(1, 2))


def plain_mamba(m, u):
    x, z = m.in_proj(u).transpose(1, 2).chunk(2, 1)
    y = plain_mamba_scan(x, m.conv1d, m.x_proj, m.dt_proj, m.A_log, m.D)
    return m.out_proj((y * F.silu(z)).transpose(1, 2))


def plain_mamba_scan(x, conv, x_proj, dt_proj, A_log, D):
    """(B, D, L), not gated."""
    u = F.silu(conv(x)[..., : x.shape[-1]])
    N = A_log.shape[1]
    dt, B, C = x_proj(u.transpose(1, 2)).split([x_proj.out_features - 2 * N, N, N], -1)
    dt = F.softplus(dt_proj(dt)).transpose(1, 2)
    decay, added = torch.exp(dt[..., None] * -A_log.exp()[:, None]), (dt * u)[..., None] * B[:, None]
    h, ys = torch.zeros_like(added[:, :, 0]), []
    # Unbound: the gradient of an indexed token would be a tensor of all.
    for a, b, c in zip(decay.unbind(2), added.unbind(2), C.unbind(1)):
        h = a * h + b
        ys.append((h * c[:, None]).sum(-1))
    return torch.stack(ys, -1) + D[:, None] * u


def plain_mambas(m, x):
    """x + Mamba(norm(x)), layer by layer, and the last norm."""
    for block, norm in zip(m.layers, m.norms):
        x = x + plain_mamba(block, norm(x))
    return m.norms[-1](x)


def plain_hiss(m, u):
    """The lower level over the chunks of all rows side by side, the upper one over their last tokens."""
    chunks = u.reshape(-1, m.chunk_size, u.shape[2])
    features = m.pool(plain_mambas(m.low, m.embed(chunks))[:, -1])
    return m.output(plain_mambas(m.high, features.view(u.shape[0], -1, features.shape[1])))


def plain_samba_encoder(m, u):
    x = F.gelu(m.conv2(F.gelu(m.conv1(u.transpose(1, 2)))))
    return plain_mambas(m, x.transpose(1, 2))


def plain_samba_decoder(m, u):
    """The text's Mambas, each with torch's attention to the speech u behind it."""
    split = lambda x: x.unflatten(-1, (-1, m.head_dim)).transpose(1, 2)
    x = m.embedding(m.tokens)
    for i, (block, cross) in enumerate(zip(m.layers, m.cross)):
        x = x + plain_mamba(block, m.norms[2 * i](x))
        q, (k, v) = cross["q"](m.norms[2 * i + 1](x)), cross["kv"](u).chunk(2, -1)
        y = F.scaled_dot_product_attention(*(split(t) for t in (q, k, v)))
        x = x + cross["out"](y.transpose(1, 2).flatten(2))
    return F.linear(m.norms[-1](x), m.embedding.weight)


def layer(
    device, dtype, make, plain, projections, others, B, D, L, op="fft_conv", call=lambda m, u: m(u), given=None,
    out=None,
) -> Work:  # fmt: skip
    """A module's output and its gradients for the input and every parameter; `others`: flops besides projections.

    given, out: sizes of its input and output, where they are not (B, L, D).
    """
    torch.manual_seed(0)
    module = make(device).to(dtype)
    u, dout = (normal(device, seed)(*(size or (B, L, D))).to(dtype) for seed, size in enumerate((given, out)))
    wide = copy.deepcopy(module).double()

    def passes(function, module, u, dout):
        inputs = (u.requires_grad_(), *module.parameters())
        return peers.forward_backward(lambda: function(u), dout, inputs)

    exact = passes(functools.partial(plain, wide), wide, u.detach().double(), dout.double())
    return Work(
        run=passes(functools.partial(call, module), module, u, dout),
        oracle=exact,
        # A layer is several ops in a row: each may add what it may have alone.
        tolerance=4 * gradient_tolerance(op, dtype),
        # The input, the gradient and the projections' outputs, written and read, once each way.
        bytes_moved=2 * (2 + 2 * projections) * B * L * D * dtype.itemsize,
        flops=int(3 * 2 * B * L * D * D * projections + others),  # three products a projection, both ways
        peers={PLAIN: lambda: peers.torch_peer(passes(functools.partial(plain, module), module, u, dout))},
    )


def convolution(B, D, L):
    """Arithmetic, forward and backward: 14 transforms of two lengths for two rows."""
    return (7 * B + 3) * D * 2.5 * 2 * L * math.log2(2 * L)


def attention(B, D, L, mask):
    """Arithmetic, forward and backward: seven products over the pairs that the mask allows."""
    return 7 * 2 * B * D * mask.density(L, L) * L * L


def hyena(device, dtype=FP32, *, B, D, L) -> Work:
    make = lambda device: nn.HyenaOperator(D, L, emb_dim=5, w=10, device=device)
    return layer(device, dtype, make, plain_hyena, 4, convolution(B, D, L), B, D, L)


def h3(device, dtype=FP32, *, B, D, L) -> Work:
    make = lambda device: nn.H3(D, d_state=64, device=device)
    return layer(device, dtype, make, plain_h3, 4, 2 * convolution(B, D, L), B, D, L)


def bimamba(device, dtype=FP32, *, B, D, L) -> Work:
    make = lambda device: nn.BiMamba(D, device=device)
    scans = 2 * 3 * 8 * B * 2 * D * 16 * L  # both directions, forward and twice as much backward
    return layer(device, dtype, make, plain_bimamba, 6, scans, B, D, L, "selective_scan")


def with_mask(module, mask, L, device, **buffers):
    """The dense mask as a buffer of the module, for the plain rendering."""
    module.register_buffer("seen", mask.to_dense(L, L).to(device))
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


def var(device, dtype=FP32, *, B, D, H, L) -> Work:
    sides = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]  # upstream's, of 256 x 256 images
    ends = [end for end in scale_ends(sides) if end <= L]
    mask, cond = masks.blocks(ends), normal(device, 2)(B, D)
    make = lambda device: with_mask(nn.VARBlock(D, H, device=device), mask, L, device, cond=cond)
    call = lambda m, u: m(u, m.cond, mask)
    return layer(device, dtype, make, plain_var, 12, attention(B, D, L, mask), B, D, L, "sparse_attention", call)


def mvar(device, dtype=FP32, *, B, D, H, L) -> Work:
    ends = [end for end in scale_ends([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]) if end <= L]
    bounds = sorted({0, *ends, L})
    mask, cond = masks.segments(cu_seqlens=torch.tensor(bounds)), normal(device, 2)(B, D)
    block = lambda device: nn.MVARBlock(D, H, headdim=min(64, 2 * D), device=device)
    make = lambda device: with_mask(block(device), mask, L, device, cond=cond)
    others = attention(B, D, L, mask) + 3 * 2 * 3 * B * L * 2 * D * 64
    return layer(
        device, dtype, make, plain_mvar, 18, others, B, D, L, "sparse_attention", lambda m, u: m(u, m.cond, mask)
    )


def hsm_ssd(device, dtype=FP32, *, B, D, L, W) -> Work:
    """N = 49, EfficientViM-M1's first stage."""

    def make(device):
        module = nn.HSMSSD(D, state_dim=49, device=device)
        module.columns, A = W, module.A.detach()
        del module.A  # its gradient is zero but for rounding
        module.register_buffer("A", A)
        return module

    call = lambda m, u: m(u.transpose(1, 2).unflatten(2, (-1, W)))[0].flatten(2).transpose(1, 2)
    return layer(device, dtype, make, plain_hsm_ssd, 1, 3 * 2 * 5 * B * L * D * 49, B, D, L, "depthwise_conv2d", call)


def moa(device, dtype=FP32, *, B, D, H, L) -> Work:
    """Spans from 128 to half of the sequence, sinks of 64."""
    alpha, beta = [128 if h % 2 else 0 for h in range(H)], [0 if h % 2 else 2 ** -(1 + h % 4 * 2) for h in range(H)]
    make = lambda device: nn.MoAAttention(D, H, alpha, beta, device=device)
    mask = make("meta").mask(L)
    make_with = lambda device: with_mask(make(device), mask, L, device)
    return layer(device, dtype, make_with, plain_moa, 4, attention(B, D, L, mask), B, D, L, "sparse_attention")


def hiss(device, dtype=FP32, *, B, D, L) -> Work:
    """Chunks of ten readings of six sensors, the lower level twice as wide, as the paper's."""
    L = L // 10 * 10
    make = lambda device: nn.HiSS(6, 3, d_model=D, d_low=2 * D, device=device)
    scans = 3 * 8 * B * L * 16 * 2 * (2 * D + D / 10)  # forward and twice as much backward
    return layer(device, dtype, make, plain_hiss, 24, scans, B, D, L, "selective_scan", given=(B, L, 6),
                 out=(B, L // 10, 3))  # fmt: skip


def samba_encoder(device, dtype=FP32, *, B, D, L) -> Work:
    """Two layers on L frames, of 2 L frames of 80 bands."""
    make = lambda device: nn.SambaASREncoder(80, D, 2, device=device)
    others = 3 * 2 * B * 2 * L * 3 * 80 * D + 2 * 3 * 8 * B * L * 16 * 2 * D
    call = lambda m, u: m(u.transpose(1, 2))
    return layer(device, dtype, make, plain_samba_encoder, 15, others, B, D, L, "selective_scan", call, (B, 2 * L, 80))


def samba_decoder(device, dtype=FP32, *, B, D, H, L, N, V=1000) -> Work:
    """Two layers, N tokens that look at L frames."""

    def make(device):
        module = nn.SambaASRDecoder(V, D, 2, H, device=device)
        generator = torch.Generator(device).manual_seed(2)
        module.register_buffer("tokens", torch.randint(V, (B, N), device=device, generator=generator))
        return module

    others = 3 * 2 * B * N * D * (16 * D + V) + 2 * 7 * 2 * B * D * N * L + 2 * 3 * 8 * B * N * 16 * 2 * D
    call = lambda m, u: m(m.tokens, u)
    return layer(
        device, dtype, make, plain_samba_decoder, 4, others, B, D, L, "sparse_attention", call, out=(B, N, V)
    )  # fmt: skip


_SCAN = ("selective_scan_fwd", "selective_scan_bwd", "causal_conv1d_fwd", "causal_conv1d_bwd")
_OPS = {
    bimamba: _SCAN,
    hyena: ("fft_conv_fwd", "fft_conv_bwd", "causal_conv1d_fwd", "causal_conv1d_bwd"),
    h3: ("fft_conv_fwd", "fft_conv_bwd", "diag_ssm_kernel_fwd", "diag_ssm_kernel_bwd"),
    var: ("sparse_attention_fwd", "sparse_attention_bwd"),
    mvar: ("sparse_attention_fwd", "sparse_attention_bwd", "ssd_scan_fwd", "ssd_scan_bwd"),
    hiss: _SCAN,
    samba_encoder: _SCAN,
    samba_decoder: (*_SCAN, "sparse_attention_fwd", "sparse_attention_bwd"),
    hsm_ssd: ("depthwise_conv2d_fwd", "depthwise_conv2d_bwd"),
    moa: ("sparse_attention_fwd", "sparse_attention_bwd"),
}
_FAST = ("cuda", "triton", "cpu")  # without the reference, whose loops and sums take seconds
_IMAGE = {"B": 8, "D": 128, "L": 784, "W": 28}
_WIDE = {"B": 2, "D": 256, "L": 4096}
CASES = [
    case("hyena", hyena, _OPS[hyena], "fwd+bwd", "cpu", 90, _WIDE, backends=_FAST),
    case("h3", h3, _OPS[h3], "fwd+bwd", "cpu", 91, _WIDE, note="n64", backends=_FAST),
    case("var", var, _OPS[var], "fwd+bwd", "cpu", 92, {"B": 2, "D": 512, "H": 8, "L": 680}, backends=_FAST),
    case("moa", moa, _OPS[moa], "fwd+bwd", "cpu", 93, {"B": 1, "D": 512, "H": 8, "L": 4096}, backends=_FAST),
    case("bimamba", bimamba, _OPS[bimamba], "fwd+bwd", "cpu", 94, {"B": 2, "D": 192, "L": 784}, backends=_FAST),
    case("mvar", mvar, _OPS[mvar], "fwd+bwd", "cpu", 95, {"B": 2, "D": 512, "H": 8, "L": 680}, backends=_FAST),
    case("hsm_ssd", hsm_ssd, _OPS[hsm_ssd], "fwd+bwd", "cpu", 96, _IMAGE, backends=_FAST),
    case("hiss", hiss, _OPS[hiss], "fwd+bwd", "cpu", 97, {"B": 8, "D": 64, "L": 1200}, backends=_FAST),
    case("samba_encoder", samba_encoder, _OPS[samba_encoder], "fwd+bwd", "cpu", 97, {"B": 1, "D": 256, "L": 750},
         backends=_FAST),
    case("samba_decoder", samba_decoder, _OPS[samba_decoder], "fwd+bwd", "cpu", 97,
         {"B": 1, "D": 256, "H": 4, "L": 750, "N": 64}, backends=_FAST),
    *(
        memory.layer_case(what, way, "cpu", 98, {"B": 1, "M": 96, "L": 50176})
        for what in memory.LAYERS
        for way in ("fwd", "bwd")
    ),
]
