"""HSTU's attention over jagged sequences: public function and checks; sparse_attention's kernels do the work.

Shape letters: B sequences, H heads, P head dim, Pv of the values, T positions, K time buckets.
"""

import torch

from scalekern import _checks
from scalekern.ops import _hstu
from scalekern.ops.sparse_attention import sparse_attention_fwd
from scalekern.reference.hstu_attention import NORMALIZE

NAME = "hstu_attention"


def hstu_attention(
    q, k, v, offsets, *, max_len, alpha=None, causal=True, num_targets=None, max_attn_len=None, contextual_len=None,
    min_full_attn_len=None, time=None, time_table=None, position_table=None, normalize="max_len", scaling_len=None,
):  # fmt: skip
    """out_i = sum_j silu(alpha q_i k_j + position_table[j - i] + time_table[bucket_ij]) v_j / N within each sequence.

    Differentiable in q, k, v and both tables.

    Args:
        q, k: (total, H, P).   v: (total, H, Pv). Sequences end to end; float64, float32, float16 or bfloat16. q may be
            (B x new, H, P): the newest `new` tokens of each sequence alone, for inference.
        offsets: (B + 1,) int32 or int64, rising from 0 to total: sequence s is [offsets[s], offsets[s + 1]).
        max_len: the longest sequence that the model allows.
        alpha: a factor on the scores, P^-0.5 when None.
        causal: a token sees itself and earlier ones; else all.
        num_targets: (B,): how many tokens at the end of each sequence are candidates, which do not see each other.
        max_attn_len: a token sees at most so many before it.
        contextual_len: so many tokens at the front see everything but targets, and count as one for max_attn_len.
        min_full_attn_len: the last so many tokens before the targets are free of max_attn_len.
        time: (total,) integer timestamps; time_table: (K + 1,) or (H, K + 1), by floor(log(max(1, |t_{i+1} - t_j|)) /
            0.301) up to K. A sequence's last token has its own time for that of the next.
        position_table: (T,) or (H, T), T odd: entry (T - 1) / 2 + j - i, at most at its ends.
        normalize: N: "max_len"; "length", of the row's sequence; "scaling_len", a number of its own.

    Returns:
        out, shaped as q with Pv for P, in q's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Zhai et al., Actions Speak Louder than Words (HSTU), 2024, sections 3.2 and 3.3.
    """
    _check(q, k, v, offsets, num_targets, time, time_table, position_table, normalize)
    divisors = {"max_len": max_len, "length": 1, "scaling_len": scaling_len}
    for name, value, least in (
        ("max_len", max_len, 1), ("scaling_len", scaling_len, 1), ("max_attn_len", max_attn_len, 0),
        ("contextual_len", contextual_len, 0), ("min_full_attn_len", min_full_attn_len, 0),
    ):  # fmt: skip
        if value is not None or name == normalize:
            _checks.at_least(NAME, name, value, least)
    alpha = alpha if alpha is None else _checks.number(NAME, "alpha", alpha)
    if q.numel() == 0 or k.numel() == 0:
        used = (x.sum() for x in (q, k, v, time_table, position_table) if x is not None)
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2]) + 0 * sum(used).to(q.dtype)
    code = _hstu.code(
        offsets, num_targets, q.shape[0], k.shape[0], causal, max_attn_len, contextual_len, min_full_attn_len
    )
    tables = _tables(q, k, offsets, time, time_table, position_table)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, _ = sparse_attention_fwd(
        *heads_first, code, None, None, None, None, *tables, alpha, 0.0, True, 1 / divisors[normalize], ""
    )
    out = out[0].transpose(0, 1)
    if normalize == "length":
        lengths = (offsets[1:] - offsets[:-1])[_hstu.rows_of(offsets, q.shape[0], k.shape[0])[0]]
        out = out / lengths.clamp(min=1)[:, None, None].to(out.dtype)
    return out


def _tables(q, k, offsets, time, time_table, position_table):
    """The op's arguments: each table (1 or H, entries) in float32 (float64), and what it is looked up by."""
    sequence, place, row = _hstu.rows_of(offsets, q.shape[0], k.shape[0])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = lambda table: (table if table.dim() == 2 else table[None]).to(wide)
    positions, times = (None,) * 3, (None,) * 4
    if position_table is not None:
        positions = rows(position_table), place.int(), _hstu.places(offsets, k.shape[0])[1].int()
    if time_table is not None:
        following = time[torch.minimum(row + 1, offsets[1:][sequence] - 1)]
        times = rows(time_table), following.long(), time.long(), None
    return *positions, *times


def _check_counts(offsets, num_targets, queries, total):
    """What has to fit into each sequence, where it can be read."""
    if not _checks.readable(offsets) or offsets.shape[0] == 1:
        return
    lengths = offsets.diff()
    new = queries // len(lengths)
    if queries != total and new > (least := int(lengths.min())):
        raise ValueError(f"{NAME}: q must have at most {least} rows of each sequence, the length of one, got {new}")
    if num_targets is None or not _checks.readable(num_targets):
        return
    if ((num_targets < 0) | (num_targets > lengths)).any():
        got = f"{num_targets.tolist()} of {lengths.tolist()}"
        raise ValueError(f"{NAME}: num_targets must be from 0 to each sequence's length, got {got}")


def _check(q, k, v, offsets, num_targets, time, time_table, position_table, normalize):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, x, dims=3, dtypes=_checks.FLOATING)
        _checks.dtype(NAME, name, x, q.dtype)
    total, heads, dim = k.shape
    _checks.shape(NAME, "q", q, (None, heads, dim))
    _checks.shape(NAME, "v", v, (total, heads, None))
    if not 1 <= dim <= 256 or not 1 <= v.shape[2] <= 256:
        raise ValueError(f"{NAME}: the last axes of q and v must have 1 to 256 elements, got {dim} and {v.shape[2]}")
    _checks.bounds(NAME, "offsets", offsets, total)
    sequences = offsets.shape[0] - 1
    if q.shape[0] != total and (sequences == 0 or q.shape[0] % sequences):
        raise ValueError(
            f"{NAME}: q must have {total} rows, or equally many of each of {sequences} sequences, got {q.shape[0]}"
        )
    if num_targets is not None:
        _checks.tensor(NAME, "num_targets", num_targets, dims=1, dtypes=(torch.int32, torch.int64))
        _checks.shape(NAME, "num_targets", num_targets, (sequences,))
    _check_counts(offsets, num_targets, q.shape[0], total)
    if (time is None) != (time_table is None):
        raise ValueError(f"{NAME}: time and time_table must be given together, got one of them")
    if time is not None:
        _checks.tensor(NAME, "time", time, dims=1, dtypes=(torch.int32, torch.int64))
        _checks.shape(NAME, "time", time, (total,))
    for name, table in (("time_table", time_table), ("position_table", position_table)):
        if table is not None:
            _checks.tensor(NAME, name, table, dims=(1, 2), dtypes=_checks.FLOATING)
            _checks.shape(NAME, name, table, (None,), (heads, None))
            if table.shape[-1] < 1 or (name == "position_table" and table.shape[-1] % 2 == 0):
                count = "an odd number of entries" if "pos" in name else "an entry"
                raise ValueError(f"{NAME}: {name} must have {count}, got {table.shape[-1]}")
    _checks.choice(NAME, "normalize", normalize, NORMALIZE)
    _checks.same_device(NAME, "q", q, k=k, v=v, offsets=offsets, num_targets=num_targets, time=time,
                        time_table=time_table, position_table=position_table)  # fmt: skip
