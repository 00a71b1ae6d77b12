"""Diagonal state space models out of products with the powers of their eigenvalues, a block of heads at a time.

Shape letters: H heads, N states, L length, M rows of a head, Q coarse and F fine powers.

A length is cut into Q rows of F: a^(q F + j) = a^(q F) a^j, so that what is summed over the states is a product of
two real matrices, [M Q, 2 N] @ [2 N, F], and its transpose the moments that all gradients are made of:

    powers_sum   y[l] = Re sum_n w_n a_n^l              2 N fused multiply-adds an element
    moments      m0_n = sum_l g[l] a_n^l,  m1_n = dm0_n / da_n = sum_l l g[l] a_n^(l-1)          4 N

The powers are made in complex128 and rounded once, to the dtype of the result: an error does not grow with l.
Memory: N (Q + F) powers of a block of heads, about 2 N sqrt(L) a head; never N L.
On a CPU both are kernels of the native library; where that is missing, and on a GPU, they are torch's own products.
"""

import functools

import torch
import torch.nn.functional as F

from scalekern import _dispatch
from scalekern.reference._complex import as_dtype, conj, real_dtype, wide
from scalekern.reference.diag_ssm import discretize, discretize_bwd, growing, scale

# Of a block's powers and rows together: what stays in a CPU's cache; a GPU wants few launches.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}

# --- products with powers ---

_powers_sum_cpu, _moments_cpu = _dispatch.native("powers_sum", "cpu"), _dispatch.native("moments", "cpu")
_discretize_cpu = _dispatch.native("discretize_zoh", "cpu")


@functools.cache
def _native_on_cpu():
    return _dispatch.Backend("cpu", _discretize_cpu).unavailable("cpu") is None


def native_here(x):
    return x.device.type == "cpu" and _native_on_cpu()


def powers_sum(w, a, length, dtype):
    """Re sum_n w_n a_n^l, (M, H, L) in `dtype`, of w (M, H, N) and a (H, N), both complex128 or both float64."""
    out = torch.empty(*w.shape[:2], length, dtype=dtype, device=w.device)
    if native_here(w):
        _powers_sum_cpu(out, w.contiguous(), a.contiguous())
        return out
    fine, coarse = _steps(length)
    for h in _blocks(a, w.shape[0] * length + w.shape[2] * (fine + w.shape[0] * coarse)):
        a_fine, a_coarse = _two_levels(a[h], fine, coarse)
        left = (w[:, h, None] * a_coarse).transpose(0, 1)  # [h, M, Q, N]
        rows = _left(left.flatten(1, 2), dtype) @ _right(a_fine, dtype).transpose(1, 2)  # [h, M Q, F]
        out[:, h] = rows.unflatten(1, (w.shape[0], coarse)).flatten(2)[..., :length].transpose(0, 1)
    return out


def moments(g, a, slope=True):
    """(m0, m1) of g (M, H, L) and a (H, N), each (M, H, N) in a's dtype; without `slope` m1 is None."""
    count, _, length = g.shape
    fine, coarse = _steps(length)
    states, real = a.shape[1], real_dtype(g)
    results = [a.new_zeros(count, *a.shape) for _ in range(2 if slope else 1)]
    if native_here(g):
        _moments_cpu(results[0], results[1] if slope else None, g.to(real).contiguous(), a.contiguous())
        return results[0], results[1] if slope else None
    for h in _blocks(a, count * length + states * 2 * (fine + count * coarse)):
        a_fine, a_coarse = _two_levels(a[h], fine, coarse)  # [h, F, N], [h, Q, N]
        tables = [a_fine, _slopes(a_fine, 1)] if slope else [a_fine]
        rows = F.pad(g[:, h].to(real), (0, fine * coarse - length)).unflatten(2, (coarse, fine))
        sums = rows.transpose(0, 1).flatten(1, 2) @ torch.cat([_right(t, real) for t in tables], -1)  # [h, M Q, .]
        sums = sums.unflatten(1, (count, coarse)).to(torch.float64)
        inner = [_joined(s, a) for s in sums.chunk(len(tables), -1)]  # [h, M, Q, N]
        a_coarse = a_coarse[:, None]
        results[0][:, h] = (a_coarse * inner[0]).sum(2).transpose(0, 1)
        if slope:  # a^(q F) a^j has the slope a^(q F) j a^(j - 1) + q F a^(q F - 1) a^j
            of_coarse = _coarse_slopes(a_fine, a_coarse, fine)
            results[1][:, h] = (a_coarse * inner[1] + of_coarse * inner[0]).sum(2).transpose(0, 1)
    return results[0], results[1] if slope else None


def _steps(length):
    """(fine, coarse), F Q >= L, F a power of two."""
    fine = 1 << max(0, round((length - 1).bit_length() / 2))
    return fine, -(-length // fine)


def _blocks(a, elements_a_head):
    """Slices of the heads."""
    budget = BLOCK_ELEMENTS["cuda" if a.device.type == "cuda" else "cpu"]
    heads = max(1, budget // max(1, elements_a_head))
    return [slice(h, h + heads) for h in range(0, a.shape[0], heads)]


def _two_levels(a, fine, coarse):
    """a^j, j < F, as (h, F, N) and a^(q F), q < Q, as (h, Q, N)."""
    a_fine = _powers(a, fine)
    return a_fine, _powers(a_fine[:, -1] * a, coarse)


def _powers(a, count):
    """a^0 .. a^(count - 1) along a new axis before the last, by doubling: exact at 0 and for a negative a."""
    powers, step = torch.ones_like(a)[:, None], a[:, None]
    while powers.shape[1] < count:
        powers, step = torch.cat([powers, powers * step], 1), step * step
    return powers[:, :count]


def _slopes(powers, first):
    """k a^(k - 1) for k = 0, .. from a^k: its rows shifted by one."""
    k = torch.arange(1, powers.shape[1], device=powers.device, dtype=torch.float64)
    return torch.cat([torch.zeros_like(powers[:, :1]), k[:, None] * powers[:, :-1]], 1)


def _coarse_slopes(a_fine, a_coarse, fine):
    """q F a^(q F - 1) = q F a^((q - 1) F) a^(F - 1): without a division by a."""
    q = torch.arange(1, a_coarse.shape[2], device=a_fine.device, dtype=torch.float64)
    slopes = (fine * q)[:, None] * a_coarse[:, :, :-1] * a_fine[:, None, -1:]
    return torch.cat([torch.zeros_like(a_coarse[:, :, :1]), slopes], 2)


def _left(x, dtype):
    """Of complex x (.., N): [Re, -Im], the row that a column [Re, Im] turns into a real part."""
    return _flushed(torch.cat([x.real, -x.imag], -1) if x.is_complex() else x, dtype)


def _right(x, dtype):
    return _flushed(torch.cat([x.real, x.imag], -1) if x.is_complex() else x, dtype)


def _flushed(x, dtype):
    """In `dtype`, without subnormal numbers: decayed powers are full of them, and products with them are slow."""
    return x.masked_fill(x.abs() < torch.finfo(dtype).tiny, 0).to(dtype)


def _joined(parts, a):
    return torch.complex(*parts.chunk(2, -1)) if a.is_complex() else parts


# --- diag_ssm_kernel ---


def discretized(A, B, dt, disc, length=None):
    """The oracle's `discretize`; the usual one natively, a tenth of torch's time, of which a decoded token is made."""
    if dt is None or disc != "zoh" or not A.is_complex() or not native_here(A):
        return discretize(A, B, dt, disc, length)
    a, b = (torch.empty(A.shape, dtype=torch.complex128) for _ in "ab")
    _discretize_cpu(a, b, wide(A).contiguous(), wide(B).contiguous(), dt.to(torch.float64).contiguous())
    return a, b


def kernel_fwd(A, B, C, dt, L, disc, conjugate_pairs, powers_sum=None):
    """K (H, L), by this module's sums or by others that take `from_end`."""
    a, b = discretized(A, B, dt, disc, L)
    w = scale(A, conjugate_pairs) * wide(C) * b
    w, a = as_real_as(A, w, a)
    if powers_sum is not None:
        return powers_sum(w[None], a, L, real_dtype(C), _growing(A, disc))[0]
    return kernel_of(w, a, L, real_dtype(C), _growing(A, disc))


def kernel_bwd(dout, A, B, C, dt, disc, conjugate_pairs, moments=None):
    """(dA, dB, dC, ddt), the oracle's formulas."""
    a, b = discretized(A, B, dt, disc, dout.shape[1])
    w, powers_of = as_real_as(A, scale(A, conjugate_pairs) * wide(C) * b, a)
    dw, da = kernel_of_bwd(dout, w, powers_of, _growing(A, disc), moments)
    dw, da = scale(A, conjugate_pairs) * wide(dw), wide(da)
    dA, dB, ddt = discretize_bwd(da, dw * conj(wide(C)), A, B, dt, disc, dout.shape[1])
    return dA, dB, as_dtype(dw * conj(b), C.dtype), ddt


def _growing(A, disc):
    """The states whose powers "dss" counts from the end, None where there are none."""
    if disc != "dss":
        return None
    found = growing(A, disc)
    return found if A.device.type != "cpu" or bool(found.any()) else None  # a GPU is not asked


def as_real_as(A, *values):
    return values if A.is_complex() else [x.real for x in values]


def kernel_of(w, a, length, dtype, from_end=None):
    """Re sum_n w_n a_n^l, (H, L), of w and a (H, N)."""
    if from_end is None:
        return powers_sum(w[None], a, length, dtype)[0]
    parts = [powers_sum(torch.where(m, w, 0)[None], a, length, dtype)[0] for m in (~from_end, from_end)]
    return parts[0] + parts[1].flip(-1)


def _moments_of(g, a, from_end):
    m0, m1 = moments(g, a)
    if from_end is not None:
        last0, last1 = moments(g.flip(-1), a)
        m0, m1 = torch.where(from_end, last0, m0), torch.where(from_end, last1, m1)
    return m0, m1


def kernel_of_bwd(dout, w, a, from_end=None, sums=None):
    """(dw, da)."""
    m0, m1 = (sums or _moments_of)(dout[None], a, from_end)
    return conj(m0[0]), conj(w * m1[0])
