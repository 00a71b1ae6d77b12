"""Next-block prediction's transformer block: a video token sees its own block, both ways, and the blocks before.

Shape letters: B batch, L tokens, D width, H heads.

A block is a row, some rows, a frame or some frames of the token grid in raster order: a token predicts the one that
stands at its place a block later, so a block is generated in one step.

Parameter names and shapes are those of the GPT in RenShuhuai-Andy/NBP, so its checkpoints load: ln1, ln2 LayerNorm;
attn.query, attn.key, attn.value, attn.proj Linear D to D; mlp.0, mlp.2 Linear D to 4 D to D.

Source: Ren et al., Next Block Prediction: Video Generation via Semi-Autoregressive Modeling, 2025, section 3.
"""

from torch import nn

from scalekern import _checks
from scalekern.nn._attention import KVCache, check_heads, merge, split
from scalekern.ops.sparse_attention import sparse_attention

NAME = "nn.NBPBlock"


def block_ends(length, block, condition=0):
    """Where blocks end, for `masks.blocks`.

    Args:
        length: tokens in all.   block: tokens of a block, such as the columns of a frame, or rows times columns.
        condition: tokens before the first block, such as those of a label, that form a block of their own.

    Raises:
        ValueError: blocks that do not fill the length.
    """
    for name, value, least in (("length", length, 1), ("block", block, 1), ("condition", condition, 0)):
        _checks.at_least("block_ends", name, value, least)
    if (length - condition) % block or condition > length:
        raise ValueError(f"block_ends: block must divide the {length} - {condition} tokens, got {block}")
    return [*([condition] if condition else []), *range(condition + block, length + 1, block)]


class NBPAttention(nn.Module):
    """Attention with upstream's four projections; see NBPBlock."""

    def __init__(self, n_embd, n_head, resid_pdrop=0.0, device=None, dtype=None):
        super().__init__()
        self.head_dim = check_heads(NAME, n_embd, n_head, "n_head")
        for name in ("key", "query", "value", "proj"):
            setattr(self, name, nn.Linear(n_embd, n_embd, device=device, dtype=dtype))
        self.resid_drop = nn.Dropout(resid_pdrop)

    def forward(self, x, mask=None, cache=None):
        q, k, v = (split(linear(x), self.head_dim) for linear in (self.query, self.key, self.value))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.resid_drop(self.proj(merge(sparse_attention(q, k, v, mask))))


class NBPBlock(nn.Module):
    """Maps (B, L, D) to (B, L, D): x + attn(ln1 x), then x + mlp(ln2 x).

    Args:
        n_embd: D.   n_head: H.   resid_pdrop: dropout of what either branch adds.

    Raises:
        ValueError: heads that do not divide D.
    """

    def __init__(self, n_embd, n_head, resid_pdrop=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.n_embd = n_embd
        self.ln1, self.ln2 = nn.LayerNorm(n_embd, **factory), nn.LayerNorm(n_embd, **factory)
        self.attn = NBPAttention(n_embd, n_head, resid_pdrop, **factory)
        up, down = nn.Linear(n_embd, 4 * n_embd, **factory), nn.Linear(4 * n_embd, n_embd, **factory)
        self.mlp = nn.Sequential(up, nn.GELU(), down, nn.Dropout(resid_pdrop))

    def new_cache(self):
        """What `forward` takes as its cache before the first block."""
        return KVCache()

    def forward(self, x, mask=None, *, cache=None):
        """All blocks at once, to train, or the next ones, to infer.

        Args:
            x: (B, L, D).
            mask: which of the keys so far the L tokens see: `masks.blocks(block_ends(L, block))` for all blocks at
                once, made once and given to all layers; `.shift(tokens so far, 0)` of it for some of them. None: all,
                which is right for one block at a time.
            cache: of `new_cache`, holds the blocks so far and takes these in.

        Returns:
            (B, L, D).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None, None, self.n_embd))
        x = x + self.attn(self.ln1(x), mask, cache)
        return x + self.mlp(self.ln2(x))
