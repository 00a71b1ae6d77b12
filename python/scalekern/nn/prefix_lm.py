"""Prefix-LM attention, as CodeGen2 has it: the prefix is read both ways, the rest causally.

Shape letters: B batch, L tokens, D width (embed_dim), H heads, P = D / H.

Parameter names and shapes are those of CodeGen's attention, so its checkpoints load: qkv_proj (3 D, D) and out_proj
(D, D), without biases. The rows of qkv_proj lie as they were sharded in training: for each of mp_num shards its heads'
queries, then values, then keys.

Source: Nijkamp et al., CodeGen2: Lessons for Training LLMs on Programming and Natural Languages, 2023, section 3.1;
the rotary embedding: Su et al., RoFormer, 2021.
"""

import torch
from torch import nn

from scalekern import _checks, masks
from scalekern.nn._attention import KVCache, angles, check_heads, merge, rotate
from scalekern.ops.sparse_attention import sparse_attention

NAME = "nn.PrefixLMAttention"


def prefix_lm_mask(prefix_lengths, *, keep=None, past=0):
    """The mask of a prefix-LM, made once and given to all layers.

    Args:
        prefix_lengths: an integer, or (B,) integers: tokens that see one another whatever their order. 0: causal.
        keep: (B, past + L), zero or False where a row is padded, on the left or on the right. A row's prefix begins at
            its first token, and padding sees and shows nothing.
        past: tokens in the cache: the mask is for those after.

    Returns:
        scalekern.masks.Mask, queries [0, L) against keys [0, past + L).

    Raises:
        TypeError, ValueError: prefix_lengths is not made of integers of at least 0; tokens of a row with gaps.
    """
    if keep is None:
        return (masks.causal | masks.prefix(prefix_lengths)).shift(past, 0)
    keep = (torch.as_tensor(keep) != 0).cpu()
    sizes = torch.as_tensor(prefix_lengths).cpu()
    _checks.tensor("prefix_lm_mask", "keep", keep, dims=2)
    if sizes.dim():
        _checks.shape("prefix_lm_mask", "keep", keep, (len(sizes), None))
    count, length = keep.sum(1), keep.shape[1]
    first = torch.where(count > 0, keep.int().argmax(1), 0)
    at = torch.arange(length)
    if (keep != ((at >= first[:, None]) & (at < (first + count)[:, None]))).any():
        raise ValueError("prefix_lm_mask: keep must be one run of tokens in each row, got padding between tokens")
    real = masks.prefix(first + count) & ~masks.prefix(first)
    return ((masks.causal | masks.prefix(first + sizes)) & real & real.transpose()).shift(past, 0)


class PrefixLMAttention(nn.Module):
    """Maps (B, L, D) to (B, L, D).

    Args:
        embed_dim: D.   num_heads: H.
        rotary_dim: channels of a head that the rotary embedding turns, the first ones; by default P.
        mp_num: shards of qkv_proj, 8 in CodeGen2's checkpoints and 4 in CodeGen's.

    Raises:
        ValueError: heads that do not divide D, shards that do not divide the heads, an odd rotary_dim or one above P.
    """

    def __init__(self, embed_dim, num_heads, rotary_dim=None, mp_num=8, device=None, dtype=None):
        super().__init__()
        self.embed_dim, self.head_dim = embed_dim, check_heads(NAME, embed_dim, num_heads)
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"{NAME}: rotary_dim must be even and at most {self.head_dim}, got {self.rotary_dim}")
        self.layout = (mp_num, 3, check_heads(NAME, num_heads, mp_num, "mp_num"), self.head_dim)
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False, device=device, dtype=dtype)

    def new_cache(self):
        """What `forward` takes as its cache before the first token."""
        return KVCache()

    def forward(self, x, mask=None, *, cache=None):
        """A whole sequence, or its next tokens: a prefix has to come whole.

        Args:
            x: (B, L, D).
            mask: of `prefix_lm_mask`. None: causal, which is right for tokens after the prefix.
            cache: of `new_cache`, holds the tokens so far and takes these in.

        Returns:
            (B, L, D); zero where a row is padded.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None, None, self.embed_dim))
        past, length = 0 if cache is None else len(cache), x.shape[1]
        q, v, k = self.qkv_proj(x).unflatten(-1, self.layout).movedim(-3, 0).flatten(-3, -2).transpose(2, 3)
        turn = angles(torch.arange(past, past + length, device=x.device), self.rotary_dim)
        q, k = (
            torch.cat([rotate(t[..., : self.rotary_dim], turn, True), t[..., self.rotary_dim :]], -1) for t in (q, k)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is None:  # one token sees all before it
            mask = masks.causal.shift(past, 0) if length > 1 and past else masks.causal if past == 0 else None
        return self.out_proj(merge(sparse_attention(q, k, v, mask)))
