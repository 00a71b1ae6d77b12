"""A diagonal state space model over chunks of its input, with states passed between them, a block of heads at a time.

Shape letters: B batch, H heads, N states, L length, J chunks, T tokens of a chunk.

    y_jt    = (k * u_j)_t + s Re sum_n c_n a_n^(t+1) X_jn          k the kernel of length T
    X_(j+1) = a^T X_j + b M_j                                      M_j = sum_t a^(T-1-t) u_jt

The chunks need each other only through X_(j+1) = .., J small steps: all else is done for all chunks at once. Method
"scan" takes short chunks, whose convolution is one product with a Toeplitz matrix, so that everything is a product of
matrices: T + 4 N multiply-adds a token. On a CPU its forward is a native kernel that goes token by token. Method
"conv" takes one chunk as long as its FFT is fast, and pays for states only where some come in or go out. Tokens that
fill no chunk are a shorter one.

Backward, with G_j the gradient of X_(j+1), P_j the moments of s dy_j and M', P' their slopes in a:

    G_(j-1) = conj(a^T) G_j + conj(c a P_j)       du_jt = (k against dy_j)_t + Re sum_n conj(G_jn) b_n a_n^(T-1-t)
    dc = sum conj(a X_j P_j)                      db = sum conj(M_j) G_j
    da = sum conj(c X_j P_j + c a X_j P'_j) + conj(T a^(T-1) X_j + b M'_j) G_j
"""

import dataclasses

import torch
import torch.nn.functional as F

from scalekern._dispatch import native
from scalekern.ops._diag_ssm import as_real_as, discretized, kernel_of, kernel_of_bwd, moments, native_here, powers_sum
from scalekern.reference._complex import as_dtype, conj, wide
from scalekern.reference.diag_ssm import diag_ssm_fwd, discretize_bwd, scale, state_dtype

_scan_cpu = native("diag_ssm_scan", "cpu")
METHODS = ("auto", "scan", "conv")
SCAN_TOKENS, NATIVE_SCAN_TOKENS = 32, 256  # up to which "auto" scans: by products of matrices, natively
SCAN_CHUNK = 64
CONV_CHUNK = 1 << 16
# Of the inputs of a block of heads.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Chunks of one length."""

    time: slice
    size: int  # T
    is_last: bool

    @property
    def count(self):  # J
        return (self.time.stop - self.time.start) // self.size

    def of(self, x):
        """(B, h, L) -> (B J, h, T)."""
        x = x[..., self.time]
        return x if self.count == 1 else x.unflatten(2, (-1, self.size)).transpose(1, 2).flatten(0, 1)

    def by_chunk(self, x):
        """(B J, ..) -> (B, J, ..)."""
        return None if x is None else x.unflatten(0, (-1, self.count))

    def joined(self, x):
        """(B J, h, T) -> (B, h, J T)."""
        return self.by_chunk(x).transpose(1, 2).flatten(2)


def scans(method, length, native, stateful):
    """Whether a call is scanned. The native scan also wins wherever states come in or go out, which cost it nothing.

    Measured on two cores of an AMD EPYC, B4 H256 N64, scan against conv: 3.0 and 4.4 ms at L = 128, 9.9 and 9.2 at 512,
    36 and 25 at 2,048; with states 3.1 and 17, 10 and 24, 37 and 53.
    """
    if method != "auto":
        return method == "scan"
    return length <= (NATIVE_SCAN_TOKENS if native else SCAN_TOKENS) or native and stateful


def segments_of(by_scan, length):
    size = min(SCAN_CHUNK if by_scan else CONV_CHUNK, length)
    whole = length - length % size
    segments = [Segment(slice(0, whole), size, whole == length)]
    if whole < length:
        segments.append(Segment(slice(whole, length), length - whole, True))
    return segments


class _Model:
    """Of one block of heads: a, b, c (with s), the skip, and the parts of a segment."""

    def __init__(self, h, A, B, C, D, dt, io, disc, conjugate_pairs, by_scan, conv, conv_bwd=None):
        self.real = torch.float64 if io == torch.float64 else torch.float32
        a, b = discretized(A[h], B[h], None if dt is None else dt[h], disc)
        self.a, self.b, self.c = as_real_as(A, a, b, scale(A, conjugate_pairs) * wide(C[h]))
        self.D = None if D is None else D[h].to(self.real)
        self.by_scan, self.conv, self.conv_bwd = by_scan, conv, conv_bwd

    def kernel(self, size):
        return kernel_of(self.c * self.b, self.a, size, self.real)

    def inputs(self, u, slope):
        """M and its slope, (B J, h, N) each."""
        return moments(u.to(self.real).flip(-1), self.a, slope)

    def outputs(self, starts, size):
        """What the states (B, J, h, N) before the chunks add to their outputs, (B J, h, T)."""
        return powers_sum((self.c * self.a * starts).flatten(0, 1), self.a, size, self.real)

    def states(self, M, size, x):
        """X_j, (B, J, h, N), and the state after them."""
        decay, starts = self.a**size, []
        for j in range(M.shape[1]):
            starts.append(torch.zeros_like(M[:, j]) if x is None else x)
            x = self.b * M[:, j] if x is None else decay * x + self.b * M[:, j]
        return torch.stack(starts, 1), x

    def states_bwd(self, P, size, g):
        """G_j, (B, J, h, N), and the gradient of the state before the chunks."""
        decay, found = conj(self.a**size), []
        for j in reversed(range(P.shape[1])):
            found.append(g)
            g = decay * g + conj(self.c * self.a * P[:, j])
        return torch.stack(found[::-1], 1), g

    def convolve(self, u, k):
        """(J B, h, T)."""
        if not self.by_scan:
            return self.conv(u, k, None, self.D, None, None, None, None, "causal", "auto", None, None)
        k = k if self.D is None else torch.cat([(k[:, :1] + self.D[:, None]), k[:, 1:]], 1)
        return (u.to(self.real).transpose(0, 1) @ _toeplitz(k)).transpose(0, 1)

    def convolve_bwd(self, dy, u, k):
        """(du, dk, dD)"""
        if not self.by_scan:
            none = (None,) * 4
            du, dk, _, dD, *_ = self.conv_bwd(dy, u, k, None, self.D, *none, "causal", "auto", None, None)
            return du, dk, dD
        dy, u = (x.to(self.real).transpose(0, 1) for x in (dy, u))  # [h, J B, T]
        with_skip = k if self.D is None else torch.cat([(k[:, :1] + self.D[:, None]), k[:, 1:]], 1)
        du = (dy @ _toeplitz(with_skip).transpose(1, 2)).transpose(0, 1)
        products = u.transpose(1, 2) @ dy  # [h, T, T]: dk[l] is the sum of its l-th diagonal
        size = k.shape[1]
        sheared = F.pad(F.pad(products, (0, size)).flatten(1), (0, size)).unflatten(1, (size, 2 * size + 1))
        dk = sheared[..., :size].sum(1)
        return du, dk, dk[:, 0]


def _toeplitz(k):
    """(h, T, T): [s, t] = k[t - s], zero below the diagonal."""
    size = k.shape[1]
    return F.pad(k, (size - 1, 0)).unfold(1, size, 1).flip(1)


def _blocks(u, states, size):
    """Slices of the heads."""
    numbers = u.shape[0] * (u.shape[2] + 16 * states * -(-u.shape[2] // size))
    heads = max(1, BLOCK_ELEMENTS["cuda" if u.device.type == "cuda" else "cpu"] // max(1, numbers))
    return [slice(h, h + heads) for h in range(0, u.shape[1], heads)]


def _first_state(initial_state, h, u, A):
    """x before the first token, (B, h, N), in complex128 or float64; None where it is zero."""
    if initial_state is None:
        return None
    return initial_state[:, h].to(torch.complex128 if A.is_complex() else torch.float64)


def _native_scan(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, return_last_state):
    """Token by token, in double."""
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    number = torch.complex128 if A.is_complex() else torch.float64
    factor = scale(A, conjugate_pairs)
    a, b, c = as_real_as(A, *discretized(A, B, dt, disc), wide(C) if factor == 1 else factor * wide(C))
    out = torch.empty(u.shape, dtype=real)
    last = torch.empty((u.shape[0], *A.shape), dtype=number) if return_last_state else None
    skip = None if D is None else D.to(torch.float64).contiguous()
    initial = None if initial_state is None else initial_state.to(number).contiguous()
    _scan_cpu(out, last, u.to(real).contiguous(), *[x.contiguous() for x in (a, b, c)], skip, initial)
    dtype = state_dtype(u, A, initial_state)
    return out.to(u.dtype), u.new_empty(0, dtype=dtype) if last is None else last.to(dtype)


def _step_by_step(out, last, h, u, A, B, C, D, dt, initial_state, disc, conjugate_pairs):
    """A product of matrices carries what is not finite to tokens before it (0 NaN is NaN): such heads go one by one.

    Not on a GPU, where asking would synchronize: there it spreads over its chunk.
    """
    D, dt = (None if x is None else x[h] for x in (D, dt))
    initial_state = None if initial_state is None else initial_state[:, h]
    y, x = diag_ssm_fwd(u[:, h], A[h], B[h], C[h], D, dt, initial_state, disc, conjugate_pairs)
    out[:, h] = y
    if last.numel():
        last[:, h] = x


def composed_fwd(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, method, return_last_state, *, conv):
    """(out, last_state); the latter is empty unless it is wanted."""
    by_scan = scans(method, u.shape[2], native_here(u), initial_state is not None or return_last_state)
    if by_scan and native_here(u):
        return _native_scan(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, return_last_state)
    if u.shape[2] == 1:  # decoding without that library
        out, last = diag_ssm_fwd(u, A, B, C, D, dt, initial_state, disc, conjugate_pairs)
        return out, last if return_last_state else last.new_empty(0)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = u.new_empty((u.shape[0], *A.shape) if return_last_state else 0, dtype=state_dtype(u, A, initial_state))
    segments = segments_of(by_scan, u.shape[2])
    for h in _blocks(u, A.shape[1], segments[0].size):
        model = _Model(h, A, B, C, D, dt, u.dtype, disc, conjugate_pairs, by_scan, conv)
        x = _first_state(initial_state, h, u, A)
        if by_scan and u.device.type == "cpu" and not bool(torch.isfinite(u[:, h]).all()):
            _step_by_step(out, last, h, u, A, B, C, D, dt, initial_state, disc, conjugate_pairs)
            continue
        for segment in segments:
            chunks = segment.of(u[:, h])
            y = model.convolve(chunks, model.kernel(segment.size))
            starts, after = None if x is None else x[:, None], None
            if return_last_state or not segment.is_last or segment.count > 1:
                starts, after = model.states(segment.by_chunk(model.inputs(chunks, slope=False)[0]), segment.size, x)
            if starts is not None:
                y = y + model.outputs(starts, segment.size)
            out[:, h, segment.time], x = segment.joined(y), after
        if return_last_state:
            last[:, h] = as_dtype(wide(x), last.dtype)
    return out, last


def composed_bwd(
    dout, dlast_state, u, A, B, C, D, dt, initial_state, disc, conjugate_pairs, method, *, conv, conv_bwd
):  # fmt: skip
    """(du, dA, dB, dC, dD, ddt, dinitial_state); an absent input's gradient is empty."""
    du, dA, dB, dC = (x.new_empty(x.shape) for x in (u, A, B, C))
    dD, ddt, dinitial = (u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (D, dt, initial_state))
    by_scan = scans(method, u.shape[2], False, False)
    segments = segments_of(by_scan, u.shape[2])
    for h in _blocks(u, A.shape[1], segments[0].size):
        model = _Model(h, A, B, C, D, dt, u.dtype, disc, conjugate_pairs, by_scan, conv, conv_bwd)
        x, before = _first_state(initial_state, h, u, A), []
        for segment in segments:
            M = [segment.by_chunk(m) for m in model.inputs(segment.of(u[:, h]), slope=True)]
            starts, x = model.states(M[0], segment.size, x)
            before.append((M, starts))
        g = torch.zeros_like(x) if dlast_state is None else dlast_state[:, h].to(x.dtype)
        da, db, dc = (torch.zeros_like(model.a) for _ in "abc")
        skip = 0
        for segment, (M, starts) in reversed(list(zip(segments, before))):
            size, chunks, dy = segment.size, segment.of(u[:, h]), segment.of(dout[:, h])
            k = model.kernel(size)
            du_, dk, dskip = model.convolve_bwd(dy, chunks, k)
            dw, da_ = kernel_of_bwd(dk, model.c * model.b, model.a)
            P = [segment.by_chunk(m) for m in moments(dy.to(model.real), model.a)]
            G, g = model.states_bwd(P[0], size, g)
            du_ = du_ + powers_sum((conj(G) * model.b).flatten(0, 1), model.a, size, model.real).flip(-1)
            du[:, h, segment.time] = segment.joined(du_)
            slope = size * model.a ** (size - 1) * starts + model.b * M[1]
            da += da_ + (conj(model.c * starts * (P[0] + model.a * P[1])) + conj(slope) * G).sum((0, 1))
            db += dw * conj(model.c) + (conj(M[0]) * G).sum((0, 1))
            dc += dw * conj(model.b) + conj(model.a * starts * P[0]).sum((0, 1))
            skip = skip + dskip
        step = None if dt is None else dt[h]
        dA[h], dB[h], dstep = discretize_bwd(wide(da), wide(db), A[h], B[h], step, disc)
        if dt is not None:
            ddt[h] = dstep
        dC[h] = as_dtype(wide(scale(A, conjugate_pairs) * dc), C.dtype)
        if D is not None:
            dD[h] = skip.to(D.dtype)
        if initial_state is not None:
            dinitial[:, h] = as_dtype(wide(g), initial_state.dtype)
    return du, dA, dB, dC, dD, ddt, dinitial
