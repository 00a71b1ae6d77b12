"""Oracle of the Hadamard transform and of its fusion with dynamic integer quantization; the Hadamard matrices.

Shape letters: n points of the last axis, m order of the matrix beside Sylvester's, m 2^k >= n points transformed.

    H = H_m (x) H_2^k        H_2^k = [[1, 1], [1, -1]] (x) ... (x) [[1, 1], [1, -1]]: the sign is the parity of i & j

The H_m are made from the squares modulo a prime and four rows of signs, when they are asked for:

    Paley I (order q + 1)       I + S, S[0, j] = -1, S[i, 0] = 1, S[i, j] = chi(i - j), q = 3 mod 4
    Paley II (order 2 (q + 1))  I (x) [[1, -1], [-1, -1]] + C (x) [[1, 1], [1, -1]], C[0, j] = C[i, 0] = 1,
                                C[i, j] = chi(i - j), q = 1 mod 4; with the factors of (x) in the other order, blocks
    Williamson (order 4 q)      [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]] of symmetric circulants
"""

import functools
import math

import torch

ORDERS = (1, 12, 20, 28, 40)
MATRICES = ("fast_hadamard_transform", "quarot")
_WILLIAMSON = {20: ("+----", "+----", "++--+", "+-++-"), 28: ("+------", "++----+", "+-+--+-", "+--++--")}


def hadamard_transform(x, scale=1.0, *, order=None, matrices="fast_hadamard_transform", transposed=False):
    """Same arguments and result as scalekern.hadamard_transform. Differentiable by autograd.

    Args:
        x: (..., n).   scale: a number.   order: 1, 12, 20, 28, 40, or None: by n.
        matrices: "fast_hadamard_transform" or "quarot".   transposed: multiply by the transpose of H.

    Returns:
        out (..., n) in x's dtype, computed in float32, or float64 for float64 x.
    """
    return hadamard_transform_fwd(x, scale, order or 0, matrices, transposed)


def hadamard_transform_fwd(x, scale, order, matrices, transposed):
    """The registered op's arguments: order 0 for None."""
    return transform(x, scale, order, matrices, transposed).to(x.dtype)


def transform(x, scale, order, matrices, transposed):
    """The transform in float32 or float64, not rounded to x's dtype: a Kronecker product, factor by factor."""
    n, real = x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return x.new_zeros(x.shape, dtype=real)
    m, k = factor(n, order)
    factors = [base_matrix(m, matrices).to(x.device, real), *(sylvester(k // 2 + i * (k % 2)) for i in range(2))]
    H_m, H_a, H_b = (h.mT if transposed else h for h in (f.to(x.device, real) for f in factors))
    y = torch.nn.functional.pad(x.to(real), (0, (m << k) - n)).reshape(-1, m, len(H_a), len(H_b))
    y = torch.einsum("rmab,im,ja,kb->rijk", y, H_m, H_a, H_b)
    return y.reshape(*x.shape[:-1], m << k)[..., :n] * scale


def fused_hadamard_quantize(
    x, scale=1.0, *, bits=8, group_size=None, order=None, matrices="fast_hadamard_transform"
):  # fmt: skip
    """Same arguments and results as scalekern.fused_hadamard_quantize.

    Args:
        x: (..., n).   scale: a number.   bits: 2 to 8.   group_size: a divisor of n; None for n.
        order, matrices: as for hadamard_transform.

    Returns:
        q (..., n) int8 and scales (..., n / group_size) float32.
    """
    return fused_hadamard_quantize_fwd(x, scale, bits, group_size or 0, order or 0, matrices)


def fused_hadamard_quantize_fwd(x, scale, bits, group_size, order, matrices):
    """The registered op's arguments: group_size and order 0 for None."""
    return quantize_symmetric(transform(x, scale, order, matrices, False), bits, group_size or x.shape[-1])


def quantize_symmetric(y, bits, group_size):
    """(q, scales) of y (..., n) in float32 or float64: scales = max |y| / (2^(bits - 1) - 1), in float32; q = y / scale
    rounded half to even. A group of zeros has scale 0 and zeros; what is not a number after the division is 0."""
    most = 2 ** (bits - 1) - 1
    if y.numel() == 0:
        shape = (*y.shape[:-1], 1 if group_size == 0 else y.shape[-1] // group_size)
        return y.to(torch.int8), y.new_zeros(shape, dtype=torch.float32)
    groups = y.unflatten(-1, (-1, group_size))
    scales = (groups.abs().amax(-1) / most).float()
    q = (groups / scales[..., None].to(y.dtype)).nan_to_num(0.0, posinf=most, neginf=-most)
    return q.round().clamp(-most, most).to(torch.int8).flatten(-2), scales


# --- the matrices ---------------------------------------------------------------------------------------------------


def factor(n, order):
    """(m, k): x is multiplied by the matrix of m 2^k >= n points. order 0: of the first m of 1, 40, 28, 20, 12 with
    which nothing is padded, else of m = 1."""
    if order == 0:
        fitting = (m for m in (1, 40, 28, 20, 12) if n % m == 0 and (n // m) & (n // m - 1) == 0)
        order = next(fitting, 1)
    return order, max(0, math.ceil(n / order) - 1).bit_length()


def hadamard_matrix(n, order=None, matrices="fast_hadamard_transform"):
    """H itself, (m 2^k, m 2^k) int8 with m 2^k >= n: H_m (x) H_2^k."""
    m, k = factor(n, order or 0)
    return torch.kron(base_matrix(m, matrices), sylvester(k))


@functools.cache
def sylvester(k):
    """(2^k, 2^k) int8."""
    h = torch.ones(1, 1, dtype=torch.int8)
    for _ in range(k):
        h = torch.kron(h, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8))
    return h


@functools.cache
def base_matrix(m, matrices):
    """H_m (m, m) int8, sign by sign the one of the package that `matrices` names.

    fast_hadamard_transform: 12 is Paley II of q = 5, 20 and 28 are Williamson's, 40 is H_2 (x) Paley I of q = 19.
    quarot (SpinQuant, QuIP#): 12 and 20 are Paley I of q = 11 and 19, 28 is Paley II of q = 13 in blocks, 40 the same.
    """
    if m == 1:
        return sylvester(0)
    if m == 40:
        return torch.kron(sylvester(1), _paley_1(19))
    if matrices == "quarot":
        return _paley_2(13, blocks=True) if m == 28 else _paley_1(m - 1)
    return _paley_2(5) if m == 12 else _williamson(*_WILLIAMSON[m])


def _residues(q):
    """chi(i - j) (q, q): 1 for a square modulo the prime q, -1 for others, 0 for 0."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if d in squares else -1 for d in range(1, q)], dtype=torch.int8)
    i = torch.arange(q)
    return chi[(i[:, None] - i) % q]


def _bordered(q, top):
    c = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    c[0, 1:], c[1:, 0], c[1:, 1:] = top, 1, _residues(q)
    return c


def _paley_1(q):
    return torch.eye(q + 1, dtype=torch.int8) + _bordered(q, -1)


def _paley_2(q, blocks=False):
    kron = (lambda a, b: torch.kron(b, a)) if blocks else torch.kron
    on, off = (torch.tensor(h, dtype=torch.int8) for h in ([[1, -1], [-1, -1]], [[1, 1], [1, -1]]))
    return kron(torch.eye(q + 1, dtype=torch.int8), on) + kron(_bordered(q, 1), off)


def _williamson(*rows):
    def circulant(signs):
        row, i = torch.tensor([1 if s == "+" else -1 for s in signs], dtype=torch.int8), torch.arange(len(signs))
        return row[(i - i[:, None]) % len(signs)]

    A, B, C, D = map(circulant, rows)
    blocks = (A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A)
    return torch.cat([torch.cat(row, 1) for row in blocks])
