"""HSTU's layer: pointwise projections, jagged attention without a softmax, and a gate.

Shape letters: B sequences, D width, H heads, P head dim of q and k, Pv of u and v, K time buckets.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import scalekern
from scalekern import _checks

NAME = "nn.HSTU"


class RelativeBias(nn.Module):
    """The two tables that are added to every score: by how far apart two items are, and by the time between them."""

    def __init__(self, max_len: int, num_buckets: int, device=None, dtype=None):
        super().__init__()
        self._ts_w = nn.Parameter(torch.empty(num_buckets + 1, device=device, dtype=dtype).normal_(std=0.02))
        self._pos_w = nn.Parameter(torch.empty(2 * max_len - 1, device=device, dtype=dtype).normal_(std=0.02))


class HSTU(nn.Module):
    """x + o(u layer_norm(attention(q, k, v))), u, v, q, k = silu(layer_norm(x) W): a sequential transduction unit.

    Its parameters are named as in generative-recommenders' SequentialTransductionUnitJagged.

    Args:
        d_model: D.   num_heads: H.   attention_dim: P.   linear_dim: Pv.
        max_len: the longest sequence; scores are divided by it.
        num_buckets: K of the times; 0: neither times nor positions count.
        max_attn_len, contextual_len, min_full_attn_len: as for scalekern.hstu_attention.
        eps: of both layer norms, which have no parameters.

    Source: Zhai et al., Actions Speak Louder than Words, 2024, section 3.2, equations 1 to 3.
    """

    def __init__(
        self, d_model, *, num_heads=1, attention_dim=64, linear_dim=64, max_len=1024, num_buckets=128,
        max_attn_len=None, contextual_len=None, min_full_attn_len=None, eps=1e-6, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.max_len, self.eps = num_heads, max_len, eps
        self.sizes = [linear_dim * num_heads] * 2 + [attention_dim * num_heads] * 2  # u, v, q, k
        self.limits = dict(
            max_attn_len=max_attn_len, contextual_len=contextual_len, min_full_attn_len=min_full_attn_len
        )
        made = {"device": device, "dtype": dtype}
        self._uvqk = nn.Parameter(torch.empty(d_model, sum(self.sizes), **made).normal_(std=0.02))
        self._o = nn.Linear(linear_dim * num_heads, d_model, **made)
        nn.init.xavier_uniform_(self._o.weight)
        self._rel_attn_bias = RelativeBias(max_len, num_buckets, **made) if num_buckets else None

    def forward(self, x, offsets, *, time=None, num_targets=None, cache=None, return_cache=False):
        """The layer over jagged sequences.

        Args:
            x: (total, D), sequences end to end.   offsets: (B + 1,).   time: (total,) integers.
            num_targets: (B,), candidates at each sequence's end.
            cache: what an earlier call returned for the tokens before these, whose places stay free for them: x and
                then hold the newest tokens alone, equally many of each sequence, and offsets and time all tokens.
            return_cache: also return (k, v) of all tokens.
        Returns:
            (total, D), and with return_cache the cache.
        Raises:
            TypeError, ValueError: an argument of the wrong type or shape, or one that scalekern.hstu_attention refuses.
        """
        _checks.tensor(NAME, "x", x, dims=2, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None, self._uvqk.shape[0]))
        uvqk = F.silu(F.layer_norm(x, x.shape[-1:], eps=self.eps) @ self._uvqk)
        u, v, q, k = uvqk.split(self.sizes, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        if cache is not None:
            k, v = _append(cache, (k, v), offsets)
        bias = {}
        if self._rel_attn_bias is not None:
            bias["position_table"] = self._rel_attn_bias._pos_w
            if time is not None:
                bias |= {"time": time, "time_table": self._rel_attn_bias._ts_w}
        mixed = scalekern.hstu_attention(
            q, k, v, offsets, max_len=self.max_len, alpha=1.0, num_targets=num_targets, **self.limits, **bias
        )
        mixed = F.layer_norm(mixed.flatten(1), (self._o.in_features,), eps=self.eps)
        out = self._o(u * mixed) + x
        return (out, (k, v)) if return_cache else out


def _append(cache, new, offsets):
    """Keys and values of all tokens: each sequence's new ones after its old ones."""
    count = new[0].shape[0] // (offsets.shape[0] - 1)
    ends = offsets[1:].long()
    place = (ends[:, None] - count + torch.arange(count, device=offsets.device)).flatten()
    kept = torch.ones(int(offsets[-1]), dtype=torch.bool, device=offsets.device)
    kept[place] = False
    total = len(cache[0]) + len(new[0])
    if total != len(kept):
        raise ValueError(f"{NAME}: cache and x must have the {len(kept)} tokens of offsets together, got {total}")
    return tuple(_placed(old, fresh, kept) for old, fresh in zip(cache, new))


def _placed(old, fresh, kept):
    out = old.new_empty(kept.shape[0], *old.shape[1:])
    out[kept], out[~kept] = old, fresh
    return out
