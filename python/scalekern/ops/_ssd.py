"""ssd_scan out of torch's products, forward and backward: chunks of Q tokens are matrices, states join them.

Shape letters: B batch, L length, H heads, P head dim, G groups, N states, Q tokens of a chunk, c chunks of a piece.

Within a chunk, with s the running sum of d A from its first token on and X' = d X (Dao & Gu 2024, section 6):

    Y     = (M o C B^T) X' + e^s C S_in^T         M_ij = e^(s_i - s_j) for i >= j, else 0
    S_out = e^(s_Q) S_in + (e^(s_Q - s) X')^T B

Every exponent is at most 0. The gradient of d A at t sums, over all that passes token t, what it carried: pairs
i >= t > j of (M o C B^T o dY X'^T), outputs i >= t that read S_in, tokens j < t that S_out holds, and S_in in S_out.
The shorter form (dY . Y - dX' . X' in running sums) cancels: its error is that of the largest term, however strong the
decay.

A piece of the sequence is worked on at a time, so that memory does not grow with the length; the backward keeps the
state at each piece's start.
"""

import torch
import torch.nn.functional as F

Q = 64
PIECE = 8 * Q  # 67 ms at B1 L2048 H24 P64 N128 on two cores; 16 take 84, 4 take 71, and chunks of 128 129


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spans(batch, length, seq_idx, cu_seqlens):
    """[(rows, begin, end, index of the sequence in its row)]: all rows at once, or each sequence by itself."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(slice(0, 1), b, e, i) for i, (b, e) in enumerate(zip(bounds, bounds[1:]))]
    if seq_idx is None:
        return [(slice(0, batch), 0, length, 0)]
    found = []
    for row, ids in enumerate(seq_idx.tolist()):
        starts = [t for t in range(length) if t == 0 or ids[t] != ids[t - 1]]
        found += [(slice(row, row + 1), b, e, i) for i, (b, e) in enumerate(zip(starts, [*starts[1:], length]))]
    return found


def _initial(initial_states, rows, index, packed, like):
    """(b, H, P, N) what a sequence begins with: packed, one state each, or the only one for the first."""
    if initial_states is not None and packed and index < initial_states.shape[0]:
        return initial_states[index : index + 1].to(like.dtype)
    if initial_states is not None and not packed and index == 0:
        return initial_states[rows].to(like.dtype)
    return like


class Piece:
    """Up to PIECE tokens of some rows, as chunks; the last is padded with d = 0, which neither decays nor adds.

    All chunks of a piece are as long, and no longer than they must be: 2048 tokens in sequences of 4, padded to 64
    each, took 1196 ms instead of 637 (H24 P64 N128, two cores, in turns), and their gradients 2226 instead of 903.
    """

    def __init__(self, x, d, A, B, C):
        self.length, self.groups = x.shape[1], B.shape[2]
        self.q = -(-self.length // -(-self.length // Q))
        pad = -self.length % self.q
        wide = d.dtype
        cut = lambda t: F.pad(t.to(wide), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, self.q)).transpose(2, 3)  # noqa: E731
        self.x, self.B, self.C = cut(x), cut(B), cut(C)  # [b, c, H | G, Q, P | N]
        self.d = F.pad(d, (0, 0, 0, pad)).unflatten(1, (-1, self.q)).transpose(2, 3)  # [b, c, H, Q]
        # In float64: behind a strong decay a difference of float32 sums has lost the weak ones (80 x 2^-24 = 5e-6).
        self.s = (self.d * A[:, None]).cumsum(-1, dtype=torch.float64)
        self.from_start = self.s.exp().to(wide)
        self.to_end = (self.s[..., -1:] - self.s).exp().to(wide)
        self.xd = self.x * self.d[..., None]

    def heads(self, t):
        """(b, c, G, ...) as (b, c, H, ...) without a copy where one group serves all heads."""
        H, G = self.x.shape[2], t.shape[2]
        return t.expand(-1, -1, H, -1, -1) if G == 1 else t.repeat_interleave(H // G, 2)

    def by_group(self, t):
        return t.unflatten(2, (self.groups, -1))

    def mask(self):
        """[b, c, H, Q, Q] M."""
        later = torch.ones(self.q, self.q, dtype=torch.bool, device=self.s.device).triu(1)
        exponent = (self.s[..., :, None] - self.s[..., None, :]).to(self.d.dtype)
        return exponent.masked_fill_(later, float("-inf")).exp_()

    def scores(self):
        """[b, c, G, Q, Q] C B^T."""
        return self.C @ self.B.mT

    def added(self):
        """[b, c, H, P, N] what each chunk adds to the state."""
        return (self.xd * self.to_end[..., None]).mT @ self.heads(self.B)

    def enter(self, state):
        """([b, c, H, P, N] the state entering each chunk, the state after the last)."""
        entering, added = [], self.added()
        for i in range(added.shape[1]):
            entering.append(state)
            state = state * self.from_start[:, i, :, -1, None, None] + added[:, i]
        return torch.stack(entering, 1), state

    def _times(self, mask, scores):
        """mask o scores, head by head, in the memory of the mask."""
        return self.by_group(mask).mul_(scores[:, :, :, None]).flatten(2, 3)

    def out(self, entering):
        """[b, l, H, P]"""
        within = self._times(self.mask(), self.scores())
        y = (within @ self.xd).add_((self.heads(self.C) @ entering.mT).mul_(self.from_start[..., None]))
        if y.device.type == "cpu" and not torch.isfinite(y).all():
            self._without_later_tokens(y, within, entering)
        return self.join(y)

    def _without_later_tokens(self, y, within, entering):
        """The same, token by token of the chunks concerned: 0 x NaN of a later token must not reach an earlier one."""
        for b, c in (~torch.isfinite(y)).flatten(2).any(-1).nonzero().tolist():
            C = self.heads(self.C)[b, c]
            for t in range(self.q):
                seen = (within[b, c, :, t, : t + 1, None] * self.xd[b, c, :, : t + 1]).sum(1)
                y[b, c, :, t] = seen + (entering[b, c] @ C[:, t, :, None])[..., 0] * self.from_start[b, c, :, t, None]

    def join(self, t):
        return t.transpose(2, 3).flatten(1, 2)[:, : self.length]

    def chunks_of(self, t):
        pad = -self.length % self.q
        return F.pad(t.to(self.d.dtype), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, self.q)).transpose(2, 3)

    def gradients(self, dy, entering, dstate):
        """(dX' [b, l, H, P], dB, dC [b, l, G, N], the gradient of d A [b, l, H], that of the entering state)."""
        dy, mask, scores = self.chunks_of(dy), self.mask(), self.scores()
        decayed = dy * self.from_start[..., None]
        leaving, through = [None] * dy.shape[1], decayed.mT @ self.heads(self.C)  # [b, c, H, P, N]
        for i in reversed(range(dy.shape[1])):
            leaving[i] = dstate
            dstate = dstate * self.from_start[:, i, :, -1, None, None] + through[:, i]
        leaving = torch.stack(leaving, 1)
        pairs = (dy @ self.xd.mT).mul_(mask)  # M o dY X'^T
        by_scores = self._times(mask, scores)
        dxd_state = (self.heads(self.B) @ leaving.mT).mul_(self.to_end[..., None])
        read = (decayed * (self.heads(self.C) @ entering.mT)).sum(-1)  # dY . the part of Y that S_in gave
        held = (self.xd * dxd_state).sum(-1)
        kept = (entering * leaving).sum((-2, -1))[..., None] * self.from_start[..., -1:]
        dxd = by_scores.mT @ dy + dxd_state
        summed = self.by_group(pairs).sum(3)
        group = lambda t: self.by_group(t).movedim(3, 4).flatten(4)  # [b, c, G, Q, heads x P]  # noqa: E731
        states = lambda t: self.by_group(t).flatten(3, 4)  # [b, c, G, heads x P, N]  # noqa: E731
        dC = summed @ self.B + group(decayed) @ states(entering)
        dB = summed.mT @ self.C + group(self.xd * self.to_end[..., None]) @ states(leaving)
        carried = self._times(pairs, scores)
        passing = F.pad(carried[..., :-1].cumsum(-1), (1, 0)).tril_().sum(-2)
        da = passing + read.flip(-1).cumsum(-1).flip(-1) + F.pad(held[..., :-1].cumsum(-1), (1, 0)) + kept
        return self.join(dxd), self.join(dB), self.join(dC), self.join(da[..., None])[..., 0], dstate


def step_size(dt, dt_bias, softplus, low, high, dtype):
    """(d, its derivative by dt)"""
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    d, slope = (F.softplus(raw), torch.sigmoid(raw)) if softplus else (raw, torch.ones_like(raw))
    inside = (d >= low) & (d <= high)
    return d.clamp(low, high), torch.where(inside | d.isnan(), slope, 0.0)


def _pieces(begin, end):
    return [slice(t, min(t + PIECE, end)) for t in range(begin, end, PIECE)]


def forward(
    out, final_states, varlen_states,
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, softplus, low, high,
):  # fmt: skip
    """Fill out (B, L, H, P), final_states (B, H, P, N) and, for packed sequences, varlen_states (S, H, P, N)."""
    wide, packed = _wide(x), cu_seqlens is not None
    d, A = step_size(dt, dt_bias, softplus, low, high, wide)[0], A.to(wide)
    final_states.zero_()
    for rows, begin, end, index in spans(x.shape[0], x.shape[1], seq_idx, cu_seqlens):
        state = _initial(initial_states, rows, index, packed, torch.zeros_like(final_states[rows]))
        for at in _pieces(begin, end):
            piece = Piece(x[rows, at], d[rows, at], A, B[rows, at], C[rows, at])
            entering, state = piece.enter(state)
            out[rows, at] = _finish(piece.out(entering), x[rows, at], D, None if z is None else z[rows, at])
        if packed:
            varlen_states[index] = state[0]
        if not packed or end > begin:
            final_states[rows] = state


def _skip(x, D, dtype):
    return x.to(dtype) * (D if D.dim() == 2 else D[:, None]).to(dtype)


def _finish(y, x, D, z):
    y = y if D is None else y + _skip(x, D, y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


def backward(
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial,
    dout, dfinal, dvarlen, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, softplus, low, high,
):  # fmt: skip
    """Fill the gradients; those of absent arguments have no elements."""
    wide, packed = _wide(x), cu_seqlens is not None
    d, slope = step_size(dt, dt_bias, softplus, low, high, wide)
    A, total_A = A.to(wide), torch.zeros(A.shape, dtype=wide, device=A.device)
    total_D = None if D is None else torch.zeros(D.shape[0], x.shape[3], dtype=wide, device=D.device)
    total_bias = torch.zeros(dt.shape[2], dtype=wide, device=dt.device)
    dinitial.zero_()
    every = spans(x.shape[0], x.shape[1], seq_idx, cu_seqlens)
    final = {rows.start: i for i, (rows, begin, end, _) in enumerate(every) if not packed or end > begin}
    for i, (rows, begin, end, index) in enumerate(every):
        zeros = torch.zeros((rows.stop - rows.start, *x.shape[2:], B.shape[3]), dtype=wide, device=x.device)
        state = _initial(initial_states, rows, index, packed, zeros)
        cut = lambda at: (x[rows, at], d[rows, at], A, B[rows, at], C[rows, at])  # noqa: B023, E731
        starts, pieces = [], _pieces(begin, end)
        for at in pieces:
            starts.append(state)
            state = Piece(*cut(at)).enter(state)[1] if at.stop < end else None
        dstate = zeros
        if dfinal is not None and final.get(rows.start) == i:
            dstate = dstate + dfinal[rows].to(wide)
        if packed and dvarlen is not None:
            dstate = dstate + dvarlen[index : index + 1].to(wide)
        for at, state in zip(reversed(pieces), reversed(starts)):
            piece = Piece(*cut(at))
            entering, _ = piece.enter(state)
            dy = dout[rows, at].to(wide)
            if z is not None:
                gate, plain = z[rows, at].to(wide), _finish(piece.out(entering), x[rows, at], D, None)
                sigmoid = torch.sigmoid(gate)
                dz[rows, at] = dy * plain * sigmoid * (1 + gate * (1 - sigmoid))
                dy = dy * gate * sigmoid
            dxd, dB[rows, at], dC[rows, at], da, dstate = piece.gradients(dy, entering, dstate)
            xs, ds = x[rows, at].to(wide), d[rows, at]
            dxs = dxd * ds[..., None]
            if D is not None:
                total_D += (dy * xs).sum((0, 1))
                dxs = dxs + dy * (D if D.dim() == 2 else D[:, None]).to(wide)
            dx[rows, at] = dxs
            dd = ((dxd * xs).sum(-1) + da * A) * slope[rows, at]
            ddt[rows, at] = dd
            total_A += (da * ds).sum((0, 1))
            total_bias += dd.sum((0, 1))
        if initial_states is not None and packed and index < initial_states.shape[0]:
            dinitial[index] = dstate[0]
        elif initial_states is not None and not packed and index == 0:
            dinitial[rows] = dstate
    dA.copy_(total_A)
    if D is not None:
        dD.copy_(total_D.sum(-1) if D.dim() == 1 else total_D)
    if dt_bias is not None:
        ddt_bias.copy_(total_bias)
