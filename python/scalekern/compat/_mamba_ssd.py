"""The steps of Mamba-2's chunked scan that mamba_ssm has one by one, in plain torch: for code that borrows them.

Shape letters: B batch, L length, C chunks, Q tokens a chunk, H heads, P head dim, G groups, N state size, S packed
sequences. In float32 or wider inside. The whole scan is mamba_chunk_scan_combined, which is much faster.

Source: Dao & Gu, Transformers are SSMs, 2024, section 6.
"""

import torch
import torch.nn.functional as F


def _wide(*tensors):
    kind = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(kind) for t in tensors]


def _chunked(x, chunk_size, chunks):
    """(B, L, ...) -> (B, C, Q, ...), zeros behind the last token."""
    padding = x.new_zeros(x.shape[0], chunks * chunk_size - x.shape[1], *x.shape[2:])
    return torch.cat([x, padding], 1).unflatten(1, (chunks, chunk_size))


def _heads(x, heads):
    """(B, L, G, N) -> (B, L, H, N)"""
    return x.repeat_interleave(heads // x.shape[2], 2)


def _last(seq_idx, chunk_size, chunks):
    """(B, C): the sequence of each chunk's last token."""
    ends = (torch.arange(1, chunks + 1, device=seq_idx.device) * chunk_size).clamp(max=seq_idx.shape[1]) - 1
    return seq_idx[:, ends]


def segsum_unstable(x):
    """(..., T) -> (..., T, T): x[j + 1] + ... + x[i] at (i, j), minus infinity above the diagonal; by differences."""
    total = x.cumsum(-1)
    return _lower(total[..., :, None] - total[..., None, :])


def segsum(x):
    """segsum_unstable by sums, which lose nothing where x is large."""
    below = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).tril(-1)
    return _lower(torch.where(below, x[..., :, None], 0).cumsum(-2))


def _lower(x):
    return x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)


def ssd_minimal_discrete(X, A, B, C, block_len, initial_states=None):
    """h_t = exp(A_t) h_(t-1) + B_t X_t, y_t = C_t h_t: X (B, L, H, P), A (B, L, H), B and C (B, L, H, N), L a multiple
    of block_len; initial_states (B, 1, H, P, N). Returns y (B, L, H, P) and the last state (B, H, P, N)."""
    if X.shape[1] % block_len:
        raise ValueError(f"ssd_minimal_discrete: block_len must divide the {X.shape[1]} tokens, got {block_len}")
    X, A, B, C = (t.unflatten(1, (-1, block_len)) for t in (X, A, B, C))
    A = A.permute(0, 3, 1, 2)  # [B, H, C, Q]
    total = A.cumsum(-1)
    y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segsum(A).exp(), X)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (total[..., -1:] - total).exp(), X)
    first = torch.zeros_like(states[:, :1]) if initial_states is None else initial_states
    decay = segsum(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", decay, torch.cat([first, states], 1))
    y = y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states[:, :-1], total.exp())
    return y.flatten(1, 2), states[:, -1]


def _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
    """dt (B, L, H), A (H,) -> the running sum of dt A in each chunk, and the step sizes, (B, H, C, Q) both."""
    (step,) = _wide(dt)
    step = step if dt_bias is None else step + dt_bias.to(step.dtype)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    step = _chunked(step, chunk_size, -(-dt.shape[1] // chunk_size)).permute(0, 3, 1, 2)
    return (step * A.to(step.dtype)[:, None, None]).cumsum(-1), step


def _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=None, states=None, states_in_fp32=True):
    """B (B, L, G, N), x (B, L, H, P), dt and dA_cumsum (B, H, C, Q) -> (B, C, H, P, N): what each chunk adds to the
    state at its end; with seq_idx (B, L), what those of its tokens add that belong to the last one's sequence."""
    kind, chunks, chunk_size = x.dtype, *dt.shape[-2:]
    weight = (dA_cumsum[..., -1:] - dA_cumsum).exp() * dt
    if seq_idx is not None:
        same = _chunked(seq_idx, chunk_size, chunks) == _last(seq_idx, chunk_size, chunks)[..., None]
        weight = weight * same[:, None]
    B, x, weight = _wide(_heads(B, x.shape[2]), x, weight)
    B, x = (_chunked(t, chunk_size, chunks) for t in (B, x))
    out = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, weight, x)
    out = out if states_in_fp32 else out.to(kind)
    return out if states is None else states.copy_(out)


def chunk_state(B, x, dt, dA_cumsum, states_in_fp32=True):
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


def chunk_state_ref(B, x, dt, dA_cumsum):
    return _chunk_state_fwd(B, x, dt, dA_cumsum).to(x.dtype)


def chunk_state_varlen(B, x, dt, dA_cumsum, cu_seqlens, chunk_states):
    """B (L, G, N), x (L, H, P), dt and dA_cumsum (H, C, Q), chunk_states (C, H, P, N) before each chunk -> the state
    after each of the sequences that cu_seqlens bounds, (S, H, P, N)."""
    kind, size = chunk_states.dtype, dt.shape[-1]
    B, x, dt, total, before = _wide(_heads(B[None], x.shape[1])[0], x, dt, dA_cumsum, chunk_states)
    dt, total = dt.flatten(1), total.flatten(1)
    bounds, out = cu_seqlens.tolist(), []
    for begin, end in zip(bounds[:-1], bounds[1:]):
        chunk = max(end - 1, 0) // size
        mine = slice(max(begin, chunk * size), end)
        weight = (total[:, end - 1 : end] - total[:, mine]).exp() * dt[:, mine]
        state = torch.einsum("lhn,hl,lhp->hpn", B[mine], weight, x[mine])
        if begin < chunk * size:
            state = state + before[chunk] * total[:, end - 1, None, None].exp()
        out.append(state)
    return torch.stack(out).to(kind) if out else chunk_states.new_zeros(0, *chunk_states.shape[1:])


def _state_passing_fwd(states, dA_chunk_cumsum, initial_states=None, seq_idx=None, chunk_size=None, out_dtype=None):
    """states (B, C, H, K) that chunks add, dA_chunk_cumsum (B, H, C) -> the state before each chunk, (B, C, H, K), and
    after all, (B, H, K). With seq_idx (B, L), a state ends where its sequence does."""
    states, decay = _wide(states, dA_chunk_cumsum)
    decay = decay.exp()
    if seq_idx is not None:
        last = F.pad(_last(seq_idx, chunk_size, states.shape[1]), (1, 0))  # a row's first sequence is 0
        decay = decay * (last[:, 1:] == last[:, :-1])[:, None]
    state = torch.zeros_like(states[:, 0]) if initial_states is None else initial_states.to(states.dtype)
    before = []
    for c in range(states.shape[1]):
        before.append(state)
        state = decay[:, :, c, None] * state + states[:, c]
    before = torch.stack(before, 1) if before else states
    return before.to(out_dtype or states.dtype), state


def state_passing(states, dA_chunk_cumsum, initial_states=None):
    before, last = _state_passing_fwd(states, dA_chunk_cumsum, initial_states)
    return before.to(states.dtype), last


def chunk_scan(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """B and C (B, L, G, N), x and z (B, L, H, P), dt and dA_cumsum (B, H, C, Q), D (H,) or (H, P), prev_states
    (B, C, H, P, N) before each chunk -> (B, L, H, P)."""
    kind, chunks, chunk_size, length = x.dtype, *dt.shape[-2:], x.shape[1]
    tokens = _wide(_heads(B, x.shape[2]), _heads(C, x.shape[2]), x)
    skip = tokens[2]
    B, C, x = (_chunked(t, chunk_size, chunks) for t in tokens)
    dt, total, states = (t.to(x.dtype) for t in (dt, dA_cumsum, prev_states))
    decay = _lower(total[..., :, None] - total[..., None, :]).exp()
    y = torch.einsum("bclhn,bcshn,bhcls,bhcs,bcshp->bclhp", C, B, decay, dt, x)
    y = y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, total.exp())
    y = y.flatten(1, 2)[:, :length]
    y = y if D is None else y + skip * (D if D.dim() == 2 else D[:, None]).to(y.dtype)
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(kind)


MODULES = {
    "mamba_ssm.modules.ssd_minimal": {
        "segsum": segsum, "segsum_unstable": segsum_unstable, "ssd_minimal_discrete": ssd_minimal_discrete,
    },
    "mamba_ssm.ops.triton.ssd_chunk_state": {
        "chunk_state": chunk_state, "chunk_state_ref": chunk_state_ref, "chunk_state_varlen": chunk_state_varlen,
        "_chunk_cumsum_fwd": _chunk_cumsum_fwd, "_chunk_state_fwd": _chunk_state_fwd,
    },
    "mamba_ssm.ops.triton.ssd_state_passing": {
        "state_passing": state_passing, "state_passing_ref": state_passing, "_state_passing_fwd": _state_passing_fwd,
    },
    "mamba_ssm.ops.triton.ssd_chunk_scan": {"chunk_scan": chunk_scan, "chunk_scan_ref": chunk_scan},
}  # fmt: skip
