"""MoA, mixture of attention spans: every head has a window of its own, which grows with the length by its own rule.

Shape letters: B batch, L tokens, D width, H query heads, G key heads, P head dim, T slots of all caches together.

Head h of a sequence of length N sees S_h = alpha_h + beta_h N keys: the first `sink` tokens and a window over the last
S_h - sink. Parameter names and shapes are those of Llama's attention, which upstream builds on, so its checkpoints
load: q_proj, k_proj, v_proj, o_proj, Linear without biases.

Source: Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, 2024, sections 3.1
and 3.2.
"""

import dataclasses
import itertools

import torch
from torch import nn

from scalekern import _checks, masks
from scalekern.nn._attention import angles, check_heads, merge, rotate, split
from scalekern.ops.sparse_attention import sparse_attention
from scalekern.ops.sparse_attention_decode import sparse_attention_decode

NAME = "nn.MoAAttention"
KEPT = 64  # masks of a layer, each with its code and plans


@dataclasses.dataclass
class MoACache:
    """Keys and values of each key head in as many slots as the widest span of its query heads has.

    The slots of all key heads lie end to end. A head has `sink` slots for the first tokens, then a ring for the rest.
    """

    k: torch.Tensor  # (B, T, P)
    v: torch.Tensor
    length: int  # N of the spans' rule
    spans: list  # of the H query heads
    slots: list  # of the G key heads
    position: int = 0  # tokens so far


class MoAAttention(nn.Module):
    """Maps (B, L, D) to (B, L, D), causally.

    Args:
        hidden_size: D.   num_heads: H.   num_key_value_heads: G, by default H.   head_dim: P, by default D / H.
        alpha, beta: (H,) numbers, the spans' rule; a span is rounded down and kept from sink + 1 to the length.
        sink: tokens at the beginning that every head sees.
        rope_theta: base of the rotary embedding.

    Raises:
        ValueError: heads that do not divide D or one another, rules for another number of heads.
    """

    def __init__(
        self, hidden_size, num_heads, alpha, beta, num_key_value_heads=None, head_dim=None, sink=64, rope_theta=10000.0,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"bias": False, "device": device, "dtype": dtype}
        groups = num_key_value_heads or num_heads
        self.group = check_heads(NAME, num_heads, groups, "num_key_value_heads")
        self.head_dim = head_dim or check_heads(NAME, hidden_size, num_heads)
        _checks.at_least(NAME, "sink", sink, 0)
        for name, rule in (("alpha", alpha), ("beta", beta)):
            if len(rule) != num_heads:
                raise ValueError(f"{NAME}: {name} must have {num_heads} numbers, one a head, got {len(rule)}")
        self.hidden_size, self.sink, self.rope_theta = hidden_size, sink, rope_theta
        self.alpha, self.beta = [float(a) for a in alpha], [float(b) for b in beta]
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, **factory)
        self.k_proj, self.v_proj = (nn.Linear(hidden_size, groups * self.head_dim, **factory) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, **factory)
        self._masks = {}

    def spans(self, length):
        """How many keys each head sees at this length."""
        rules = (int(a + b * length) for a, b in zip(self.alpha, self.beta))
        return [max(min(span, length), self.sink + 1) for span in rules]

    def mask(self, length):
        """The mask of all heads at this length, the same object at each call; torch.compile wants it made before."""
        if length not in self._masks:
            if len(self._masks) == KEPT:
                del self._masks[next(iter(self._masks))]
            seen = [masks.window(span - self.sink - 1, 0) | masks.sink(self.sink) for span in self.spans(length)]
            self._masks[length] = masks.per_head([masks.causal & m for m in seen])
        return self._masks[length]

    def allocate_inference_cache(self, batch_size, length, dtype=None):
        """An empty cache.

        Args:
            batch_size: B.
            length: N of the spans' rule, which holds for all that this cache will see.
            dtype: of keys and values, by default that of the parameters.
        """
        spans = self.spans(length)
        slots = [max(spans[h : h + self.group]) for h in range(0, len(spans), self.group)]
        weight = self.k_proj.weight if dtype is None else self.k_proj.weight.to(dtype)
        k, v = (weight.new_zeros(batch_size, sum(slots), self.head_dim) for _ in range(2))
        return MoACache(k, v, length, spans, slots)

    def forward(self, x, *, length=None, mask=None, cache=None):
        """A whole sequence, or its next tokens.

        Args:
            x: (B, L, D).
            length: N of the spans' rule, by default L; a cache has its own.
            mask: restricts the spans further, such as `masks.segments` of packed sequences; not with a cache.
            cache: of `allocate_inference_cache`. Updated in place, for inference: no gradient comes out of it. An empty
                one takes a prompt in at once, a filled one its next tokens one by one.

        Returns:
            (B, L, D).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None if cache is None else len(cache.k), None, self.hidden_size))
        if cache is not None and (mask is not None or length is not None):
            raise ValueError(f"{NAME}: a cache goes with no mask and no length but its own")
        past = 0 if cache is None else cache.position
        if past and x.shape[1] > 1:
            return torch.cat([self(token, cache=cache) for token in x.split(1, 1)], 1)
        q, k, v = (split(linear(x), self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj))
        turn = angles(torch.arange(past, past + x.shape[1], device=x.device), self.head_dim, self.rope_theta)
        q, k = (rotate(t, turn, False) for t in (q, k))
        if cache is not None:
            self._update(cache, k, v)
        if past:
            out = self._decode(q, cache)
        else:
            spans = self.mask(x.shape[1] if length is None else length) if cache is None else self.mask(cache.length)
            out = sparse_attention(q, k, v, spans if mask is None else spans & mask)
        return self.o_proj(merge(out))

    @torch.no_grad()
    def _update(self, cache, k, v):
        """Write tokens to their slots: those of the beginning, and the last ones that the rings hold."""
        first, last = cache.position, cache.position + k.shape[2]
        begin = 0
        for g, slots in enumerate(cache.slots):
            ring = slots - self.sink
            kept = [*range(first, min(self.sink, last)), *range(max(first, self.sink, last - ring), last)]
            at = [begin + (p if p < self.sink else self.sink + (p - self.sink) % ring) for p in kept]
            kept = [p - first for p in kept]
            cache.k[:, at], cache.v[:, at] = (t[:, g, kept].to(cache.k.dtype) for t in (k, v))
            begin += slots
        cache.position = last

    def _decode(self, q, cache):
        """The token written last, over the caches."""
        offsets = torch.tensor([0, *itertools.accumulate(cache.slots)], device=q.device)
        out = sparse_attention_decode(
            q.to(cache.k.dtype), cache.k, cache.v, offsets.new_full((len(q),), cache.position),
            budgets=torch.tensor(cache.spans), sink=self.sink, circular=True, head_offsets=offsets,
        )  # fmt: skip
        return out.to(q.dtype)
