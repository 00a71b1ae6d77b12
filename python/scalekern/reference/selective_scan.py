"""Oracle of the selective scan (Mamba, Gu & Dao 2023, section 3.2 and algorithm 2), forward and backward.

Shape letters: B batch, D channels, L length, N state size, G groups of B and C, S packed sequences.

    d_t   = softplus(delta_t + delta_bias)            (softplus only if delta_softplus)
    h_t   = exp(d_t A) h_{t-1} + d_t B_t u_t          h: (D, N)
    y_t   = sum_n C_t[n] h_t[n]                       (2 Re of it for a complex A: conjugate pairs)
    out_t = (y_t + D u_t) silu(z_t)

Computed in float32, or in float64 for float64 inputs. `selective_scan` is differentiable by autograd;
`selective_scan_bwd` is the same derivative written out, in the memory of one chunk of states.
"""

import torch
import torch.nn.functional as F

from scalekern._packing import checkpoint_count, checkpoint_stride, segments


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    *, initial_state=None, cu_seqlens=None, reverse=False,
):  # fmt: skip
    """Same arguments and results as scalekern.selective_scan."""
    B, C = (normalize_matrix(m, A.is_complex(), u) for m in (B, C))
    out, last_state, _ = selective_scan_fwd(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, False
    )
    return (out, last_state) if return_last_state else out


def normalize_matrix(matrix, complex_A, u):
    """(B, N, L) -> (B, 1, N, L), and upstream's interleaved real (..., 2 L) -> complex (..., L); (D, N) stays."""
    if matrix.dim() == 2:
        return matrix
    if complex_A and not matrix.is_complex():
        pairs = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).unflatten(-1, (u.shape[-1], 2))
        matrix = torch.complex(pairs[..., 0], pairs[..., 1])  # a view as complex asks for even strides and offset
    return matrix[:, None] if matrix.dim() == u.dim() else matrix


def as_lines(*tensors, time=2):
    """Images (..., H, W), whose time is axes `time` and the next, as lines (..., L), row by row; others stay."""
    return tuple(x.flatten(time) if x is not None and x.dim() == time + 2 else x for x in tensors)


def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, save_checkpoints
):  # fmt: skip
    """(out, last_state, checkpoints). B and C are (D, N) or (B, G, N, L); checkpoints as ops/selective_scan.py says."""
    image = u.shape
    u, delta, z = as_lines(u, delta, z)
    B, C = as_lines(B, C, time=3)
    real, state_dtype = _dtypes(u, A)
    batch, channels, length = u.shape
    stride = checkpoint_stride(A.shape[1])
    slots = checkpoint_count(length, A.shape[1]) if save_checkpoints else 0
    checkpoints = torch.zeros(batch, slots, *A.shape, dtype=state_dtype, device=u.device)
    d, x, A = _step_size(delta.to(real), delta_bias, delta_softplus), u.to(real), A.to(state_dtype)
    ys, lasts = [None] * length, []
    for states, rows, begin, end in segments(length, batch, cu_seqlens):
        h = _initial(initial_state, states, (batch if cu_seqlens is None else 1, *A.shape), state_dtype, u.device)
        for t in _times(begin, end, reverse):
            if slots and _enters_chunk(t, stride, length, reverse):
                checkpoints[rows, t // stride] = h
            h = _advance(h, d, x, A, B, rows, t)
            ys[t] = _project(h, C, rows, t)
        lasts.append(h)
    y = torch.stack(ys, -1) if length else torch.zeros_like(x)
    out = y if D is None else y + D.to(real)[:, None] * x
    out = out if z is None else out * F.silu(z.to(real))
    last_state = torch.cat(lasts) if lasts else torch.zeros(0, *A.shape, dtype=state_dtype, device=u.device)
    return out.to(u.dtype).view(image), last_state, checkpoints


def selective_scan_bwd(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints,
    delta_softplus, reverse,
):  # fmt: skip
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state); an absent input's gradient is empty (0,).

    With g = dL/dh_t flowing backward through time (complex gradients are conjugate, as in autograd):

        g_t      = conj(exp(d_{t+1} A)) g_{t+1} + s conj(C_t) dy_t        s = 2 for complex A, else 1
        dC_t     = s conj(h_t) dy_t            dB_t = g_t d_t u_t
        dE       = g_t conj(exp(d_t A) h_{t-1})                           the gradient of d_t A
        dA      += dE d_t                      dd_t = Re(dE conj(A)) + Re(g_t conj(B_t)) u_t
        du_t     = Re(g_t conj(B_t)) d_t + D dy_t
    """
    image, shapes = u.shape, (B.shape, C.shape)
    dout, u, delta, z = as_lines(dout, u, delta, z)
    B, C = as_lines(B, C, time=3)
    real, state_dtype = _dtypes(u, A)
    batch, channels, length = u.shape
    stride = checkpoint_stride(A.shape[1])
    scale = 2 if A.is_complex() else 1
    raw = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias.to(real)[:, None]
    d, x, A_ = F.softplus(raw) if delta_softplus else raw, u.to(real), A.to(state_dtype)
    dy = dout.to(real)
    if z is not None:
        gate = z.to(real).sigmoid()
        gated = dy  # dL/dout, needed for dz once y is known
        dy = dy * z.to(real) * gate
    y = torch.zeros_like(x)
    dx, dd = torch.zeros_like(x), torch.zeros_like(x)
    dA = torch.zeros_like(A_)
    dB, dC = (torch.zeros(m.shape, dtype=state_dtype, device=u.device) for m in (B, C))
    dinitial = []
    for states, rows, begin, end in segments(length, batch, cu_seqlens):
        first = _initial(initial_state, states, (batch if cu_seqlens is None else 1, *A.shape), state_dtype, u.device)
        g = torch.zeros_like(first) if dlast_state is None else dlast_state[states].to(state_dtype)
        for chunk in reversed(_chunks(begin, end, stride, reverse)):
            entering = first if _starts(chunk[0], begin, end, reverse) else checkpoints[rows, chunk[0] // stride]
            before = []
            h = entering
            for t in chunk:
                before.append(h)
                h = _advance(h, d, x, A_, B, rows, t)
            for t, previous in zip(reversed(chunk), reversed(before)):
                decay = torch.exp(d[rows, :, t, None] * A_)
                b, c = _at(B, rows, t, channels), _at(C, rows, t, channels)
                h = decay * previous + (d[rows, :, t] * x[rows, :, t])[..., None] * b
                y[rows, :, t] = _project(h, C, rows, t)
                dyt = dy[rows, :, t, None]
                g = g + scale * _conj(c) * dyt
                _accumulate(dC, scale * _conj(h) * dyt, rows, t)
                _accumulate(dB, g * (d[rows, :, t] * x[rows, :, t])[..., None], rows, t)
                dE = g * _conj(decay * previous)
                dA += (dE * d[rows, :, t, None]).sum(0)
                gb = _real((g * _conj(b)).sum(-1))
                dd[rows, :, t] = _real((dE * _conj(A_)).sum(-1)) + gb * x[rows, :, t]
                dx[rows, :, t] = gb * d[rows, :, t]
                g = _conj(decay) * g
        dinitial.append(g)
    skip = 0 if D is None else D.to(real)[:, None]
    dx = dx + skip * dy
    ddelta = dd * raw.sigmoid() if delta_softplus else dd
    dz = u.new_empty(0)
    if z is not None:
        silu_slope = gate * (1 + z.to(real) * (1 - gate))
        dz = (gated * (y + skip * x) * silu_slope).to(z.dtype)
    return (
        dx.to(u.dtype).view(image), ddelta.to(delta.dtype).view(image), dA.to(A.dtype),
        *(m.to(like.dtype).view(shape) for m, like, shape in zip((dB, dC), (B, C), shapes)),
        u.new_empty(0) if D is None else (dy * x).sum((0, 2)).to(D.dtype),
        dz if z is None else dz.view(image),
        u.new_empty(0) if delta_bias is None else ddelta.sum((0, 2)).to(delta_bias.dtype),
        u.new_empty(0) if initial_state is None else torch.cat(dinitial).to(initial_state.dtype)
        if dinitial else torch.zeros_like(initial_state),
    )  # fmt: skip


def _dtypes(u, A):
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    return real, real.to_complex() if A.is_complex() else real


def _step_size(delta, delta_bias, delta_softplus):
    delta = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)[:, None]
    return F.softplus(delta) if delta_softplus else delta


def _initial(initial_state, states, shape, dtype, device):
    if initial_state is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return initial_state[states].to(dtype)


def _times(begin, end, reverse):
    return range(end - 1, begin - 1, -1) if reverse else range(begin, end)


def _enters_chunk(t, stride, length, reverse):
    return (t + 1) % stride == 0 or t == length - 1 if reverse else t % stride == 0


def _starts(t, begin, end, reverse):
    return t == (end - 1 if reverse else begin)


def _chunks(begin, end, stride, reverse):
    """The times of a segment in scan order, cut where checkpoints lie."""
    cuts = sorted({begin, end, *range(-(-begin // stride) * stride, end, stride)})
    chunks = [list(_times(a, b, reverse)) for a, b in zip(cuts, cuts[1:])]
    return chunks[::-1] if reverse else chunks


def _at(matrix, rows, t, channels):
    """B or C at time t as (rows, D, N), or (1, D, N) when it is constant or has one group."""
    if matrix.dim() == 2:
        return matrix[None]
    groups = matrix[rows, :, :, t]
    return groups if groups.shape[1] in (1, channels) else groups.repeat_interleave(channels // groups.shape[1], 1)


def _advance(h, d, x, A, B, rows, t):
    b = _at(B, rows, t, A.shape[0])
    return torch.exp(d[rows, :, t, None] * A) * h + (d[rows, :, t] * x[rows, :, t])[..., None] * b


def _project(h, C, rows, t):
    y = (h * _at(C, rows, t, h.shape[1])).sum(-1)
    return 2 * y.real if h.is_complex() else y


def _accumulate(total, contribution, rows, t):
    """Add a (rows, D, N) gradient to that of a constant (D, N) or grouped (B, G, N, L) matrix."""
    if total.dim() == 2:
        total += contribution.sum(0)
    else:
        groups = total.shape[1]
        total[rows, :, :, t] += contribution.unflatten(1, (groups, -1)).sum(2)


def _real(x):
    return x.real if x.is_complex() else x


def _conj(x):
    """The conjugate as values: a lazy one (x.conj()) loses its mark inside compiled graphs (seen on torch 2.13)."""
    return torch.conj_physical(x)
