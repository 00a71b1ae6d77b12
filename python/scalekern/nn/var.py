"""VAR's transformer block: attention from scale to scale, under adaptive layer norms; and FlowAR's doubling scales.

Shape letters: B batch, L tokens of all scales, C width (embed_dim), D width of the condition, H heads, P = C / H.

Parameter names and shapes are those of FoundationVision/VAR's models/basic_var.py, AdaLNSelfAttn, so its checkpoints
load:

    attn.mat_qkv.weight, attn.q_bias, attn.v_bias   (3 C, C), (C,), (C,); attn.zero_k_bias is a buffer (C,)
    attn.scale_mul_1H11                             (1, H, 1, 1), the logarithm of the temperature
    attn.proj, ffn.fc1, ffn.fc2                     Linear
    ada_lin.1                                       Linear: D to 6 C; with shared_aln instead ada_gss (1, 1, 6, C)

Sources: Tian et al., Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction, 2024,
section 3.2 and appendix; Ren et al., FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching, 2024,
section 3.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn._attention import DropPath, KVCache, check_heads, merge, modulate
from scalekern.ops.sparse_attention import sparse_attention

NAME = "nn.VARBlock"


def scale_ends(sizes):
    """Where each scale's tokens end, for `masks.blocks`: VAR's (1, 2, 3) end at [1, 5, 14].

    Args:
        sizes: sides of the square token maps from coarse to fine, or their (rows, columns).
    """
    pairs = [(s, s) if isinstance(s, int) else tuple(s) for s in sizes]
    return list(itertools.accumulate(rows * columns for rows, columns in pairs))


def doubling_ends(side, scales=None):
    """The ends of FlowAR's scales, each of twice the side of the one before, the last of side `side`.

    Args:
        side: of the finest token map, a multiple of 2^(scales - 1).
        scales: how many; by default down to a side that is odd, 1 for a power of two.

    Raises:
        ValueError: a side that cannot be halved so often.
    """
    _checks.at_least("doubling_ends", "side", side, 1)
    halvings = (side & -side).bit_length() - 1
    scales = halvings + 1 if scales is None else scales
    if not 1 <= scales <= halvings + 1:
        raise ValueError(f"doubling_ends: scales must be from 1 to {halvings + 1} for side {side}, got {scales}")
    return scale_ends([side >> n for n in reversed(range(scales))])


class VARAttention(nn.Module):
    """Softmax attention whose queries and keys have length 1, at a learned temperature a head; see VARBlock."""

    def __init__(self, embed_dim, num_heads, attn_l2_norm=True, proj_drop=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, check_heads(NAME, embed_dim, num_heads)
        self.attn_l2_norm = attn_l2_norm
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0), **factory))
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False, **factory)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(embed_dim, **factory)) for _ in range(2))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim, **factory))
        self.proj, self.proj_drop = nn.Linear(embed_dim, embed_dim, **factory), nn.Dropout(proj_drop)

    def forward(self, x, mask=None, cache=None):
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.attn_l2_norm:
            out = sparse_attention(q, k, v, mask, score="cosine", temperature=self.scale_mul_1H11.flatten())
        else:
            out = sparse_attention(q, k, v, mask, scale=0.25 * self.head_dim**-0.5)
        return self.proj_drop(self.proj(merge(out)))


class VARMLP(nn.Module):
    """fc2(gelu(fc1 x)), the gelu by tanh."""

    def __init__(self, dim, hidden, drop=0.0, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class VARBlock(nn.Module):
    """Maps (B, L, C) to (B, L, C) under a condition: attention, then an MLP, each modulated before and gated after.

    Args:
        embed_dim: C.   num_heads: H.   cond_dim: D, by default C.   mlp_ratio: the MLP's width over C.
        shared_aln: the model makes the six modulations once for all blocks, and each block adds its own offsets.
        attn_l2_norm: queries and keys at length 1 (what upstream's models have); otherwise scores / (4 sqrt P).
        drop: of what either branch adds.   drop_path: a branch's chance of being left out for a row of the batch.
        norm_eps: of the layer norms.

    Raises:
        ValueError: heads that do not divide C.
    """

    NAME, BRANCHES = NAME, 2

    def __init__(
        self, embed_dim, num_heads, cond_dim=None, mlp_ratio=4.0, shared_aln=False, attn_l2_norm=True, drop=0.0,
        drop_path=0.0, norm_eps=1e-6, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.embed_dim, self.shared_aln = embed_dim, shared_aln
        self.attn = VARAttention(embed_dim, num_heads, attn_l2_norm, drop, **factory)
        self.ffn = VARMLP(embed_dim, round(embed_dim * mlp_ratio), drop, **factory)
        self.ln_wo_grad = nn.LayerNorm(embed_dim, norm_eps, elementwise_affine=False)
        self.drop_path = DropPath(drop_path)
        count = 3 * self.BRANCHES  # a gate, a scale and a shift each
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, count, embed_dim, **factory) / embed_dim**0.5)
            modulations = self.ada_gss[0, 0]
        else:
            linear = nn.Linear(cond_dim or embed_dim, count * embed_dim, **factory)
            self.ada_lin = nn.Sequential(nn.SiLU(), linear)
            nn.init.zeros_(linear.bias)
            modulations = linear.weight.unflatten(0, (count, embed_dim))
        with torch.no_grad():  # as upstream: a block begins close to the identity
            modulations[: self.BRANCHES] *= 1e-5
            modulations[self.BRANCHES :] *= 0.5

    def new_cache(self):
        """What `forward` takes as its cache before the first scale."""
        return KVCache()

    def forward(self, x, cond, mask=None, *, cache=None):
        """All scales at once, to train, or the next ones, to infer.

        Args:
            x: (B, L, C).
            cond: (B, D); with shared_aln the six modulations (B, 1, 6, C).
            mask: which of the keys so far the L tokens see: `masks.blocks(scale_ends(sizes))` for all scales at once,
                made once and given to all blocks. None: all, which is right for one scale at a time.
            cache: of `new_cache`, holds the scales so far and takes these in.

        Returns:
            (B, L, C).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self._modulations(x, cond)
        y = self.attn(modulate(self.ln_wo_grad(x), shift1, scale1), mask, cache)
        x = x + self.drop_path(gamma1 * y)
        return x + self.drop_path(gamma2 * self.ffn(modulate(self.ln_wo_grad(x), shift2, scale2)))

    def _modulations(self, x, cond):
        """The gates, the scales and the shifts of the branches, (B, 1, C) each."""
        _checks.tensor(self.NAME, "x", x, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(self.NAME, "x", x, (None, None, self.embed_dim))
        each = (1, 3 * self.BRANCHES, self.embed_dim) if self.shared_aln else (self.ada_lin[1].in_features,)
        _checks.tensor(self.NAME, "cond", cond, dims=1 + len(each), dtypes=_checks.FLOATING)
        _checks.shape(self.NAME, "cond", cond, (x.shape[0], *each), (1, *each))
        shape = (-1, 1, 3 * self.BRANCHES, self.embed_dim)
        sizes = shape[1:] if self.shared_aln else (self.ada_lin[1].in_features,)
        _checks.tensor(self.NAME, "cond", cond, dims=1 + len(sizes), dtypes=_checks.FLOATING)
        _checks.shape(self.NAME, "cond", cond, (len(x), *sizes), (1, *sizes))
        return (self.ada_gss + cond if self.shared_aln else self.ada_lin(cond).view(shape)).unbind(2)
