"""The oracle of HSTU's attention: one sequence at a time, every pair looked at.

Shape letters: B sequences, H heads, P head dim, Pv of the values, n length of a sequence, T positions, K time buckets.
"""

import math

import torch
import torch.nn.functional as F

NORMALIZE = ("max_len", "length", "scaling_len")
BUCKET = 0.301  # of the natural logarithm of a time difference: about log10(2)


def hstu_attention(
    q, k, v, offsets, *, max_len, alpha=None, causal=True, num_targets=None, max_attn_len=None, contextual_len=None,
    min_full_attn_len=None, time=None, time_table=None, position_table=None, normalize="max_len", scaling_len=None,
):  # fmt: skip
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    alpha = q.shape[-1] ** -0.5 if alpha is None else alpha
    bounds, outs = offsets.tolist(), [q.new_zeros(0, q.shape[1], v.shape[2])]
    count = max(len(bounds) - 1, 1)
    new = q.shape[0] // count if q.shape[0] != k.shape[0] else None
    for s, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        n = end - begin
        rows = torch.arange(n - new if new is not None else 0, n, device=q.device)
        mine = q[begin:end] if new is None else q[s * new : (s + 1) * new]
        targets = None if num_targets is None else int(num_targets[s])
        allowed = valid(n, causal, targets, max_attn_len, contextual_len, min_full_attn_len).to(q.device)[rows]
        scores = alpha * torch.einsum("ihp,jhp->hij", mine.to(wide), k[begin:end].to(wide))
        if position_table is not None:
            R = (position_table.shape[-1] - 1) // 2
            apart = (torch.arange(n, device=q.device) - rows[:, None]).clamp(-R, R) + R
            scores = scores + position_table.to(wide)[..., apart]
        if time_table is not None:
            bucket = time_buckets(time[begin:end], time_table.shape[-1] - 1)[rows]
            scores = scores + time_table.to(wide)[..., bucket]
        divisor = {"max_len": max_len, "length": n, "scaling_len": scaling_len}[normalize]
        p = torch.where(allowed, F.silu(scores) / divisor, 0)
        outs.append(torch.einsum("hij,jhp->ihp", p, v[begin:end].to(wide)).to(q.dtype))
    return torch.cat(outs)


def valid(n, causal, targets, max_attn_len, contextual_len, min_full_attn_len):
    """Which of n tokens see which: bool (n, n).

    Tokens are numbered anew: the contextual ones share number 0, the targets share the last. A token sees those before
    its number and itself; contextual tokens see everything but targets.
    """
    number, last = torch.arange(n), n
    if contextual_len:
        number, last = (number - contextual_len + 1).clamp(min=0), n - contextual_len + 1
    if targets is not None:
        last -= targets
        number = number.clamp(max=last)
    apart = number[:, None] - number
    apart = apart if causal else apart.abs()
    near = apart > 0
    if max_attn_len:
        close = apart <= max_attn_len
        near &= (close | (number >= last - min_full_attn_len)[:, None]) if min_full_attn_len else close
    seen = near | torch.eye(n, dtype=torch.bool)
    if contextual_len:
        seen |= (number == 0)[:, None] & (number < last)
    return seen


def time_buckets(time, K):
    """floor(log(max(1, |t_{i+1} - t_j|)) / 0.301) up to K, (n, n); the last token's next one is itself."""
    following = torch.cat([time[1:], time[-1:]])
    return torch.searchsorted(
        bucket_edges(K).to(time.device), (following[:, None] - time).abs().clamp(min=1), right=True
    )


def bucket_edges(K):
    """The least integer of each bucket 1 to K: exact where a logarithm would be rounded."""
    return (
        torch.tensor([math.ceil(math.exp(BUCKET * (i + 1)) - 1e-9) for i in range(K)], dtype=torch.float64)
        .clamp(max=2.0**62)
        .long()
    )
