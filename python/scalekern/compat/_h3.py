"""H3's fused convolution on scalekern's: HazyResearch/H3's src/ops/fftconv.py, and the extension `fftconv` under it.

Shape letters: B batch, H channels, E head_dim, G = H / E heads with a filter each, L length, K taps, N size of the FFT.

    y[d, e] = k * (u[d] v[e]) + k_rev reversed * (u[d] v[e]) + D u[d] v[e]         for channels d, e of one head
    out[e]  = sum_d gelu(y[d, e]) dropout_mask q[d]                                gelu, mask, v and q where asked for

Any L is taken (upstream: even, up to 8,192), any head_dim (1 and 8) and any strides. Products are float32, fftfp16 or
not: under that flag upstream starts no kernel and returns memory that nobody wrote (csrc/fftconv/fftconv_cuda.cu).
"""

import functools

import torch
import torch.nn.functional as F

import scalekern
from scalekern import _checks, reference
from scalekern._library import autocast_off
from scalekern.compat._shims import counted


@counted("fftconv_func")
def fftconv_func(
    u, k, D, dropout_mask=None, gelu=True, force_fp16_output=False, output_hbl_layout=False, v=None, head_dim=1, q=None,
    fftfp16=False, k_rev=None,
):  # fmt: skip
    """The convolution of the module's formula, causal but for k_rev, differentiable in u, k, D, v, q and k_rev.

    Args:
        u: (B, H, L), floating.   k, k_rev: (G, K), float32; k[0] and k_rev[0] both meet the current token.
        D: (G,).   dropout_mask: (B, H), a factor of every channel, without a gradient; not with head_dim above 1.
        gelu: exact, of each y.   v, q: (B, H, L) in u's dtype, both or neither; head_dim above 1 needs them.
        force_fp16_output: out is float16, unless u is bfloat16.
        output_hbl_layout: out's memory is (H, B, L).
        fftfp16: upstream's FFT in float16; changes nothing here.

    Returns:
        out (B, H, L) in u's dtype or float16.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.
    """
    op = "fftconv_func"
    heads = _check(op, u, D, dropout_mask, v, head_dim, q)
    room = fft_size_of(u.shape[2]) - u.shape[2] + 1
    for name, taps in (("k", k), ("k_rev", k_rev)):
        if taps is not None:
            _checks.tensor(op, name, taps, dims=2, dtypes=_checks.FLOATING)
            _checks.shape(op, name, taps, (heads, None))
            if taps.shape[1] > room:  # upstream's FFT would fold them onto other lags
                raise ValueError(f"{op}: {name} must have at most {room} taps, got {taps.shape[1]}")
    with autocast_off(u.device.type):
        out = _compose(scalekern.fft_conv, u, k, k_rev, D, v, head_dim, q, dropout_mask, gelu)
        return _finish(out, u, force_fp16_output, output_hbl_layout)


def fftconv_ref(u, k, D, dropout_mask, gelu=True, k_rev=None):
    """fftconv_func without v and q, in float64 and rounded once."""
    return _compose(_exact, u.double(), k, k_rev, D, None, 1, None, dropout_mask, gelu).to(u.dtype)


def fftconv_h3_ref(k, ssm_kernel, D, q, v, head_dim=1, ssm_kernel_rev=None):
    """fftconv_func with v and q and without gelu, its u here called k, in float64 and rounded once."""
    k_, v, q = k.double(), v.double(), q.double()
    return _compose(_exact, k_, ssm_kernel, ssm_kernel_rev, D, v, head_dim, q, None, False).to(k.dtype)


_exact = functools.partial(reference.fft_conv, method="fft")


@counted("fftconv_fwd")
def fftconv_fwd(
    u, filter, D, v, head_dim, q, dropout_mask, gelu, gelu_inp, gelu_q, fft_size, force_fp16_output, output_hbl_layout,
    fftfp16=False,
):  # fmt: skip
    """The extension's forward: fftconv_func on filter (G, N / 2 + 1) = rfft(k, N) + conj(rfft(k_rev, N)). No graph."""
    op = "fftconv_fwd"
    heads = _check(op, u, D, dropout_mask, v, head_dim, q)
    _check_filter(op, u, filter, heads, fft_size, gelu_inp, gelu_q)
    with torch.no_grad(), autocast_off(u.device.type):
        k, k_rev = _lags(filter, fft_size, u.shape[2])
        out = _compose(scalekern.fft_conv, u, k, k_rev, D, v, head_dim, q, dropout_mask, gelu)
        return _finish(out, u, force_fp16_output, output_hbl_layout)


@counted("fftconv_bwd")
def fftconv_bwd(
    dout, u, filter, D, v, head_dim, q, dropout_mask, gelu, gelu_inp, gelu_q, fft_size, output_hbl_layout, fftfp16=False
):  # fmt: skip
    """(du, dfilter, dD, dv, dq): dv float32, as upstream sums it; dv and dq None without v and q. No graph.

    dfilter (G, N / 2 + 1) is such that irfft(dfilter, N, norm="forward") has dk at the first places, and that of its
    conjugate dk_rev.
    """
    op = "fftconv_bwd"
    heads = _check(op, u, D, dropout_mask, v, head_dim, q)
    _check_filter(op, u, filter, heads, fft_size, gelu_inp, gelu_q)
    _checks.tensor(op, "dout", dout, dims=3, dtypes=_checks.FLOATING)
    _checks.shape(op, "dout", dout, u.shape)
    length = u.shape[2]
    with torch.enable_grad(), autocast_off(u.device.type):
        inputs = (u, *_lags(filter, fft_size, length), D, v, q)
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        u_, k, k_rev, D_, v_, q_ = leaves
        out = _compose(scalekern.fft_conv, u_, k, k_rev, D_, v_, head_dim, q_, dropout_mask, gelu)
        found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout.to(out.dtype)))
    du, dk, dk_rev, dD, dv, dq = (None if t is None else next(found) for t in leaves)
    ring = F.pad(dk, (0, fft_size - length))
    ring[:, fft_size - length + 1 :] = dk_rev[:, 1:].flip(-1)
    return du, torch.fft.rfft(ring) / fft_size, dD, None if dv is None else dv.float(), dq


def fft_size_of(length: int) -> int:
    """Upstream's N of a length."""
    return max(16, 2 << max(0, length - 1).bit_length())


def _compose(fft_conv, u, k, k_rev, D, v, head_dim, q, dropout_mask, gelu):
    """out, in u's dtype where the convolution is all there is, in float32 or float64 otherwise."""
    if head_dim == 1 and not gelu and dropout_mask is None:
        return fft_conv(u, k, k_reverse=k_rev, skip=D, pregate=v, postgate=q)
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, v, q = (t if t is None else t.to(real) for t in (u, v, q))
    if head_dim == 1:
        y = _activated(fft_conv(u, k, k_reverse=k_rev, skip=D, pregate=v), gelu)
        y = y if dropout_mask is None else y * dropout_mask.detach().to(real)[..., None]
        return y if q is None else y * q
    u, v, q = (t.unflatten(1, (-1, head_dim)).transpose(1, 2) for t in (u, v, q))  # (B, E, G, L)
    rows, total = v.flatten(0, 1), 0  # the channels e of a head are samples that share its filter
    for d in range(head_dim):  # one d at a time: all of them at once would be E times the input
        gate = u[:, d : d + 1].expand_as(v).flatten(0, 1)
        y = _activated(fft_conv(rows, k, k_reverse=k_rev, skip=D, pregate=gate), gelu)
        total = total + y.view(v.shape) * q[:, d : d + 1]
    return total.transpose(1, 2).flatten(1, 2)


def _activated(y, gelu):
    return F.gelu(y) if gelu else y


def _finish(out, u, force_fp16_output, output_hbl_layout):
    out = out.to(torch.float16 if force_fp16_output and u.dtype != torch.bfloat16 else u.dtype)
    return out.transpose(0, 1).contiguous().transpose(0, 1) if output_hbl_layout else out.contiguous()


def _lags(filter, fft_size, length):
    """(k, k_rev), (G, L) each, from the spectrum of both; k has the lag 0, which they share."""
    ring = torch.fft.irfft(filter, n=fft_size)
    return ring[:, :length], F.pad(ring[:, fft_size - length + 1 :].flip(-1), (1, 0))


def _check(op, u, D, dropout_mask, v, head_dim, q) -> int:
    """The number of heads G."""
    _checks.tensor(op, "u", u, dims=3, dtypes=_checks.FLOATING)
    batch, channels, length = u.shape
    if not isinstance(head_dim, int) or head_dim < 1 or channels % head_dim:
        raise ValueError(f"{op}: head_dim must divide the {channels} channels of u, got {head_dim!r}")
    heads = channels // head_dim
    _checks.tensor(op, "D", D, dims=1, dtypes=_checks.FLOATING)
    _checks.shape(op, "D", D, (heads,))
    if (v is None) != (q is None):  # upstream ignores q without v, and reads through a null pointer without q
        raise ValueError(f"{op}: v and q must come together, got {'q' if v is None else 'v'} alone")
    for name, gate in (("v", v), ("q", q)):
        if gate is not None:
            _checks.tensor(op, name, gate, dims=3, dtypes=(u.dtype,))
            _checks.shape(op, name, gate, u.shape)
    if head_dim > 1 and v is None:
        raise ValueError(f"{op}: v and q must be given for head_dim {head_dim}, got None")
    if dropout_mask is not None:
        if head_dim > 1:  # upstream's kernel takes the number of the head for that of the channel
            raise ValueError(f"{op}: dropout_mask must be None for head_dim {head_dim}, got a tensor")
        _checks.tensor(op, "dropout_mask", dropout_mask, dims=2, dtypes=_checks.FLOATING)
        _checks.shape(op, "dropout_mask", dropout_mask, (batch, channels))
    _checks.same_device(op, "u", u, D=D, v=v, q=q, dropout_mask=dropout_mask)
    return heads


def _check_filter(op, u, filter, heads, fft_size, gelu_inp, gelu_q):
    if gelu_inp or gelu_q:
        raise ValueError(f"{op}: gelu_inp and gelu_q must be False, got {gelu_inp!r} and {gelu_q!r}")
    if fft_size % 2 or fft_size < 2 * u.shape[2]:
        raise ValueError(f"{op}: fft_size must be even and at least twice the length {u.shape[2]}, got {fft_size!r}")
    _checks.tensor(op, "filter", filter, dims=2, dtypes=(torch.complex64, torch.complex128))
    _checks.shape(op, "filter", filter, (heads, fft_size // 2 + 1))
    _checks.same_device(op, "u", u, filter=filter)


VERSIONS = {"fftconv": "0.1+scalekern"}  # upstream's only one

# `src` is H3's own repository, and the name that others gave theirs: ours is found only where they have no such module.
FALLBACK = "src"

MODULES = {
    "fftconv": {"__version__": VERSIONS["fftconv"], "fftconv_fwd": fftconv_fwd, "fftconv_bwd": fftconv_bwd},
    "src": {},
    "src.ops": {},
    "src.ops.fftconv": {"fftconv_func": fftconv_func, "fftconv_ref": fftconv_ref, "fftconv_h3_ref": fftconv_h3_ref},
}
