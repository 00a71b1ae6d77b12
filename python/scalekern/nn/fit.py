"""FiT's and FiTv2's transformer block on images of any sizes, packed end to end.

Shape letters: B batch, N tokens of a row, S images of a row, D width (hidden_size), H heads, P = D / H, R LoRA rank.

Parameter names and shapes are those of whlzy/FiT's fit/model/modules.py, FiTBlock, so its checkpoints load:

    attn.qkv, attn.proj                Linear: D to 3 D, D to D
    attn.q_norm.weight, attn.k_norm.weight   (P,), with qk_norm_weight
    mlp.fc1_g, mlp.fc1_x, mlp.fc2      Linear: D to F twice, F to D, F = 2 / 3 mlp_ratio D
    adaLN_modulation.1                 Linear: D to 6 D; with a LoRA D to R, and adaLN_modulation.2 R to 6 D

Sources: Lu et al., FiT: Flexible Vision Transformer for Diffusion Model, 2024, section 3.2; Wang et al., FiTv2:
Scalable and Improved Flexible Vision Transformer for Diffusion Model, 2024, section 3.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks, masks
from scalekern.nn._attention import angles, check_heads, merge, modulate, rotate
from scalekern.ops.sparse_attention import sparse_attention

NAME = "nn.FiTBlock"


@dataclasses.dataclass(frozen=True)
class FiTPacking:
    """Where each token stands; made once by `pack`, for all blocks."""

    ids: torch.Tensor  # (B, N) int64: the token's image within its row, -1 for padding
    turn: torch.Tensor  # (B, 1, N, P / 2) float64: the angles of the rotary embedding
    mask: masks.Mask  # tokens of one image see one another
    images: int  # S, of the row with the most


def pack(sizes, head_dim, length=None, theta=10000.0, device=None):
    """Lay images out end to end, each in raster order.

    Args:
        sizes: for each row of the batch the (rows, columns) of its images, in tokens.
        head_dim: P, a multiple of 4: the first half of the channels turns by the row, the second by the column.
        length: N; by default the longest row's. What is left over is padding.
        theta: the base of the frequencies, or one for rows and one for columns: along an axis that is s times longer
            than in training, VisionNTK takes theta s^(P / (P - 4)).

    Returns:
        FiTPacking.

    Raises:
        ValueError: images that do not fit in, a head dim that is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"pack: head_dim must be a multiple of 4, got {head_dim}")
    used = [sum(h * w for h, w in row) for row in sizes]
    longest = max(used, default=0)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"pack: length must be at least {longest}, the tokens of the longest row, got {length}")
    ids = torch.full((len(sizes), length), -1)
    places = torch.zeros(len(sizes), length, 2, dtype=torch.int64)
    for b, row in enumerate(sizes):
        start = 0
        for image, (h, w) in enumerate(row):
            end = start + h * w
            ids[b, start:end] = image
            places[b, start:end] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
            start = end
    thetas = theta if isinstance(theta, (tuple, list)) else (theta, theta)
    turn = torch.cat([angles(places[..., axis], head_dim // 2, thetas[axis]) for axis in (0, 1)], -1)
    return FiTPacking(ids.to(device), turn[:, None].to(device), masks.segments(ids), max(map(len, sizes)))


class FiTAttention(nn.Module):
    """Attention with rotary embeddings in two dimensions, q and k normalized a head if asked; see FiTBlock."""

    def __init__(self, dim, num_heads, qkv_bias, qk_norm, qk_norm_weight, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, check_heads(NAME, dim, num_heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory), nn.Linear(dim, dim, **factory)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.head_dim, 1e-6, qk_norm_weight, bias=False, **factory) if qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, x, packing):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(norm(t), packing.turn, True) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(merge(sparse_attention(q, k, v, packing.mask)))


class SwiGLU(nn.Module):
    """fc2(silu(fc1_g x) fc1_x x)."""

    def __init__(self, dim, hidden, bias, device=None, dtype=None):
        super().__init__()
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.fc1_g, self.fc1_x = nn.Linear(dim, hidden, **factory), nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))


class FiTBlock(nn.Module):
    """Maps (B, N, D) to (B, N, D), each image under its own condition; rows of padding pass through unchanged.

    Args:
        hidden_size: D.   num_heads: H.   mlp_ratio: the MLP's width is 2 / 3 of mlp_ratio D.
        qk_norm: FiTv2's layer norm of each head's q and k.   qk_norm_weight: which then has a weight.
        qkv_bias, ffn_bias, adaln_bias: whether these projections have a bias.
        adaln_lora_dim: R, FiTv2's low-rank modulation on top of the model's; None: a full projection.

    Raises:
        ValueError: heads that do not divide D.
    """

    def __init__(
        self, hidden_size, num_heads, mlp_ratio=4.0, qk_norm=False, qk_norm_weight=False, qkv_bias=True, ffn_bias=True,
        adaln_bias=True, adaln_lora_dim=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.hidden_size = hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(hidden_size, 1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = FiTAttention(hidden_size, num_heads, qkv_bias, qk_norm, qk_norm_weight, **factory)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio) * 2 // 3, ffn_bias, **factory)
        widths = [hidden_size, *([] if adaln_lora_dim is None else [adaln_lora_dim]), 6 * hidden_size]
        linears = [nn.Linear(*pair, bias=adaln_bias, **factory) for pair in zip(widths, widths[1:])]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), *linears)
        for parameter in linears[-1].parameters():  # adaLN-Zero: a block begins as the identity
            nn.init.zeros_(parameter)

    def forward(self, x, c, packing, global_adaln=0.0):
        """The block's output.

        Args:
            x: (B, N, D).
            c: (B, S, D), a condition for each image, or (B, D) for all of a row.
            packing: of `pack`.
            global_adaln: (B, S, 6 D) or (B, 6 D), like c: the model's modulation, which the LoRA's is added to.

        Returns:
            (B, N, D).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (*packing.ids.shape, self.hidden_size))
        _checks.tensor(NAME, "c", c, dims=(2, 3), dtypes=_checks.FLOATING)
        _checks.shape(NAME, "c", c, (len(x), packing.images, self.hidden_size), (len(x), self.hidden_size))
        six, real = self.adaLN_modulation(c) + global_adaln, packing.ids[..., None] >= 0
        if six.dim() == 2:
            six = six[:, None]
        else:
            six = six.take_along_dim(packing.ids[..., None].clamp(min=0), 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = six.chunk(6, -1)
        x = x + gate1 * real * self.attn(modulate(self.norm1(x), shift1, scale1), packing)
        return x + gate2 * real * self.mlp(modulate(self.norm2(x), shift2, scale2))
