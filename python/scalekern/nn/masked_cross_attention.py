"""Masked cross-attention of Mask2Former and OneFormer: a query reads the pixels that its last mask has predicted.

Shape letters: B batch, Q queries, K keys (pixels), E width (embed_dim), H heads.

Parameter names and shapes are those of torch.nn.MultiheadAttention, which upstream's decoders call, so their
checkpoints load: in_proj_weight (3 E, E), in_proj_bias (3 E,), out_proj.weight, out_proj.bias.

Sources: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, 2021, section 3.2.1; Jain et
al., OneFormer: One Transformer to Rule Universal Image Segmentation, 2022, section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks, masks
from scalekern.nn._attention import check_heads, merge, split
from scalekern.ops.sparse_attention import sparse_attention

NAME = "nn.MaskedCrossAttention"


def hidden_pixels(mask_logits, size):
    """The attention mask of a predicted one: True where a query must not look, sigmoid(logits) < 1 / 2.

    Args:
        mask_logits: (B, Q, height, width).   size: (rows, columns) of the feature map to attend to.

    Returns:
        bool (B, 1, Q, rows * columns), without a gradient.
    """
    resized = F.interpolate(mask_logits.detach(), size, mode="bilinear", align_corners=False)
    return (resized.sigmoid() < 0.5).flatten(2)[:, None]


class MaskedCrossAttention(nn.Module):
    """Takes the place of torch.nn.MultiheadAttention(embed_dim, num_heads) in these decoders.

    Args:
        embed_dim: E.   num_heads: H.   bias: whether the projections have biases.
        batch_first: tensors are (B, Q, E) rather than (Q, B, E).

    Raises:
        ValueError: heads that do not divide E.
    """

    def __init__(self, embed_dim, num_heads, *, bias=True, batch_first=False, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first
        self.head_dim = check_heads(NAME, embed_dim, num_heads)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim, **factory)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, query, key, value, attn_mask=None, key_padding_mask=None, need_weights=False):
        """Attention of queries to the keys that the mask leaves; a query whose mask hides all sees all.

        Args:
            query: (Q, B, E).   key, value: (K, B, E); with batch_first B comes first.
            attn_mask: True where a query must not look: bool (Q, K), (B, 1, Q, K) as `hidden_pixels` gives it,
                (B, H, Q, K) or (B H, Q, K); or a scalekern.masks.Mask of what may be seen, which several layers share.
            key_padding_mask, need_weights: for calls that are written for torch's module; None and False only.

        Returns:
            ((Q, B, E), None), like torch's module when it is not asked for its weights.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape; an argument for torch's module alone.
        """
        if key_padding_mask is not None or need_weights:
            raise ValueError(f"{NAME}: key_padding_mask must be None and need_weights False: put both into attn_mask")
        for name, x in (("query", query), ("key", key), ("value", value)):
            _checks.tensor(NAME, name, x, dims=3, dtypes=_checks.FLOATING)
            _checks.shape(NAME, name, x, (None, None, self.embed_dim))
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            split(F.linear(x, weight, bias), self.head_dim)
            for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases)
        )
        out = sparse_attention(q, k, v, self._mask(attn_mask, q, k), empty_rows="attend")
        out = self.out_proj(merge(out))
        return out if self.batch_first else out.transpose(0, 1), None

    def _mask(self, hidden, q, k):
        if hidden is None or isinstance(hidden, masks.Mask):
            return hidden
        (B, H, Q, _), K = q.shape, k.shape[2]
        _checks.tensor(NAME, "attn_mask", hidden, dims=(2, 3, 4), dtypes=(torch.bool,))
        _checks.shape(NAME, "attn_mask", hidden, (Q, K), (B * H, Q, K), (B, 1, Q, K), (B, H, Q, K))
        return masks.dense(~(hidden.unflatten(0, (B, H)) if hidden.dim() == 3 else hidden)) if hidden.numel() else None
