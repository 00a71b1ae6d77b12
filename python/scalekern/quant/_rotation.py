"""Orthogonal rotations by Hadamard matrices, which spread a row's outliers over its columns before they are rounded.

    rotate(x) = x diag(signs) H^T / sqrt(b),    H a block diagonal of K / b Hadamard matrices of order b

Rotating a weight's rows offline and the input online leaves the product as it is: (x R) (W R)^T = x W^T.

Shape letters: K columns, b columns of a block.

Source: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, 2024, sections 3 and 4; random signs,
Tseng et al., QuIP#, 2024, section 3.
"""

import torch

ROTATIONS = (None, "hadamard", "random_hadamard")


def block_of(K: int) -> int:
    """The largest order that hadamard_transform has and that divides K: 2^k, or 12, 20, 28 times that; 1 for odd K."""
    two = K & -K
    return max([1] + [f * two for f in (1, 3, 5, 7) if K % f == 0 and (f == 1 or two % 4 == 0)])


def draw_signs(K: int, rotation: str, seed: int, device=None) -> torch.Tensor | None:
    """(K,) int8 of -1 and 1 for a random rotation, the same on every device; None for the plain one."""
    if rotation != "random_hadamard":
        return None
    drawn = torch.randint(2, (K,), generator=torch.Generator().manual_seed(seed), device="cpu")
    return (2 * drawn - 1).to(torch.int8).to(device)


def rotate(x: torch.Tensor, signs: torch.Tensor | None = None, block: int | None = None) -> torch.Tensor:
    """(..., K) to (..., K) in x's dtype, differentiable."""
    b = block or block_of(x.shape[-1])
    x = x if signs is None else x * signs.to(x.dtype)
    return _transform(x.unflatten(-1, (-1, b)), b**-0.5).flatten(-2)


def unrotate(x: torch.Tensor, signs: torch.Tensor | None = None) -> torch.Tensor:
    """rotate's inverse, which is its transpose."""
    b = block_of(x.shape[-1])
    x = _transform(x.unflatten(-1, (-1, b)), b**-0.5, transposed=True).flatten(-2)
    return x if signs is None else x * signs.to(x.dtype)


def _transform(x, scale, transposed=False):
    # Its oracle imports scalekern.quant. Decoding has no time for the public function's checks.
    from scalekern.ops.hadamard_transform import hadamard_transform_fwd

    return hadamard_transform_fwd(x, scale, 0, "fast_hadamard_transform", transposed)
