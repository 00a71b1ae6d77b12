"""Oracle of the diagonal linear recurrence, forward and backward, token by token.

    h_t = a_t h_{t-1} + b_t

Computed in float32 for half precision, else in the inputs' dtype. `diag_scan` is differentiable by autograd;
`diag_scan_bwd` is the same derivative written out. Time is the last axis of the registered ops.
"""

import torch

from scalekern._packing import segments
from scalekern.reference._complex import conj


def diag_scan(a, b, *, dim=-1, initial_state=None, cu_seqlens=None, reverse=False, return_last_state=False):
    """Same arguments and results as scalekern.diag_scan."""
    io = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(io).movedim(dim, -1), b.to(io).movedim(dim, -1)
    initial_state = None if initial_state is None else initial_state.to(state_dtype(io))
    out, last_state = diag_scan_fwd(a.expand(b.shape), b, initial_state, cu_seqlens, reverse)
    out = out.movedim(-1, dim)
    return (out, last_state) if return_last_state else out


def state_dtype(io):
    """What is summed in: at least float32."""
    return torch.promote_types(io, torch.float32)


def diag_scan_fwd(a, b, initial_state, cu_seqlens, reverse):
    """(out, last_state): a and b (.., L); the states (..), packed (S, ..) for b (1, .., L)."""
    wide, length = state_dtype(b.dtype), b.shape[-1]
    x = b.to(wide)
    decays, inputs, hs, lasts = a.to(wide).unbind(-1), x.unbind(-1), [None] * length, []
    for states, begin, end in _segments(b, cu_seqlens):
        h = x.new_zeros(x.shape[:-1]) if initial_state is None else initial_state[states].to(wide)
        for t in _times(begin, end, reverse):
            h = decays[t] * h + inputs[t]
            hs[t] = h
        lasts.append(h)
    out = torch.stack(hs, -1) if length else torch.zeros_like(x)
    return out.to(b.dtype), _joined(lasts, cu_seqlens, x.new_zeros(0, *b.shape[1:-1]))


def diag_scan_bwd(dout, dlast_state, a, out, initial_state, cu_seqlens, reverse):
    """(da, db, dinitial_state); the last is empty (0,) without an initial state.

    With g = dL/dh_t flowing backward through time (complex gradients are conjugate, as in autograd):

        g_t = dout_t + conj(a_{t+1}) g_{t+1}        da_t = g_t conj(h_{t-1})        db_t = g_t
    """
    wide = state_dtype(out.dtype)
    a_, h, dh = conj(a.to(wide)), conj(out.to(wide)), dout.to(wide)
    da, db, dinitial = torch.zeros_like(h), torch.zeros_like(h), []
    for states, begin, end in _segments(out, cu_seqlens):
        first = h.new_zeros(h.shape[:-1]) if initial_state is None else initial_state[states].to(wide)
        g = torch.zeros_like(first) if dlast_state is None else dlast_state[states].to(wide)
        times = list(_times(begin, end, reverse))
        for i, t in reversed(list(enumerate(times))):
            g = dh[..., t] + g
            da[..., t] = g * (h[..., times[i - 1]] if i else conj(first))
            db[..., t] = g
            g = a_[..., t] * g
        dinitial.append(g)
    none = h.new_zeros(0, *out.shape[1:-1])
    dinitial = out.new_empty(0, dtype=wide) if initial_state is None else _joined(dinitial, cu_seqlens, none)
    return da.to(a.dtype), db.to(out.dtype), dinitial


def _joined(states, cu_seqlens, none):
    """Of all sequences, or of the one scan that there is."""
    return states[0] if cu_seqlens is None else torch.cat(states) if states else none


def _segments(b, cu_seqlens):
    """Of each independent scan: the rows of its states, begin and end."""
    if cu_seqlens is None:
        return [(..., 0, b.shape[-1])]
    return [(states, begin, end) for states, _, begin, end in segments(b.shape[-1], 1, cu_seqlens)]


def _times(begin, end, reverse):
    return range(end - 1, begin - 1, -1) if reverse else range(begin, end)
