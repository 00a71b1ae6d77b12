"""What the attention layers share: heads, rotary embeddings, modulation and a cache that grows.

Shape letters: B batch, L length, D model width, H heads, P head dim.
"""

import torch
from torch import nn


class KVCache:
    """Keys and values of the tokens so far, (B, H, tokens, P) each; gradients flow through it."""

    def __init__(self):
        self.k = self.v = None

    def __len__(self):
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k, v):
        """Everything up to and including k and v."""
        if self.k is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        return k, v


def split(x, head_dim):
    """(B, L, H P) to (B, H, L, P)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge(x):
    """(B, H, L, P) to (B, L, H P)."""
    return x.transpose(1, 2).flatten(2)


def angles(positions, dim, theta=10000.0):
    """(.., dim / 2) float64: position theta^(-2 i / dim), by which the i-th pair of channels is turned."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    return positions[..., None].double() * theta**-exponents


def rotate(x, turn, interleaved):
    """Turn pairs of channels: (2 i, 2 i + 1) when interleaved (GPT-J), (i, P / 2 + i) otherwise (Llama)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # cos and sin in 8 bits would shift a token by its neighbours
    cos, sin = turn.cos().to(wide), turn.sin().to(wide)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return (torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)).to(x.dtype)


def modulate(x, shift, scale):
    """The affine part of an adaptive layer norm."""
    return x * (1 + scale) + shift


class DropPath(nn.Module):
    """Leaves a residual branch out, row of the batch by row, in training (stochastic depth)."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not (self.training and self.p):
            return x
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.p) / (1 - self.p)


def check_heads(name, width, heads, what="num_heads"):
    """The head dim."""
    if heads < 1 or width % heads:
        raise ValueError(f"{name}: {what} must divide the width {width}, got {heads}")
    return width // heads
