"""fft_conv in 16 bits by the fused CUDA C++ kernel (csrc/fft_conv/cuda_fft_conv.cuh): which calls are its own, the
tables that it reads, what its two ops are given. Forward only: the backward is the other kernels'.

Shape letters: B batch, D channels, L length, M output length, N = N1 16 16 points, P parts of a row. Up to N1 = 8
rows are transformed 16 / N1 at a time. The kernel's comment says what k1, k2, k3, n1, n2, n3, rho and the fragments of
a lane 4 g + q are.
"""

import functools

import torch

from scalekern._dispatch import native

POINTS = (256, 512, 1024, 2048, 4096, 8192)
PARTS = 4  # of 8,192 samples
_fft_conv, _fft_filters = native("fft_conv", "cuda"), native("fft_filters", "cuda")


def supports(
    u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision, spectrum
) -> str | None:  # fmt: skip
    """None, or why the kernel does not compute the call."""
    if method in ("direct", "toeplitz"):
        return f"method {method!r} was asked for"
    if precision not in (None, "tf32"):
        return f"precision {precision!r} was asked for"
    if u.dtype not in (torch.float16, torch.bfloat16):
        return f"u is {str(u.dtype)[6:]}, not float16 or bfloat16"
    if k.dim() != 2 or k_reverse is not None and k_reverse.dim() != 2:
        return "a filter for every sample"
    if any(t is not None and t.stride(-1) != 1 for t in (u, pregate, postgate)):
        return "samples of a row are not next to each other"
    outputs = count(u, k, mode)
    if outputs > PARTS * POINTS[-1]:
        return f"the output has {outputs} samples, more than {PARTS * POINTS[-1]}"
    if outputs > POINTS[-1] and (mode not in ("causal", "full") or k_reverse is not None):
        return f"the filter looks ahead, and the output has more than {POINTS[-1]} samples"
    shared = _shared_bytes(outputs)
    if u.device.type == "cuda" and shared > (most := _shared_memory(u.device)):
        return f"a block needs {shared} bytes of shared memory, and this GPU has {most}"
    return None


def _shared_bytes(outputs) -> int:
    """What a block takes: tables, a row on its way, the spectrum or the transforms of the parts before."""
    if outputs <= 4096:
        return 2048 + 2048 + 16384 + 18688 + 80 + 16384
    return 8192 + 4096 + 32768 + 37376 + 48 + 32768 * max(1, -(-outputs // POINTS[-1]) - 1)


@functools.cache
def _shared_memory(device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def count(u, k, mode) -> int:
    """M"""
    return u.shape[2] + k.shape[-1] - 1 if mode == "full" else u.shape[2]


def _unit(numerator, denominator):
    """exp(-2 pi i numerator / denominator), (..., 2): real, imaginary. Exact in integers, then float64."""
    angle = (numerator % denominator).double() * (-2 * torch.pi / denominator)
    return torch.stack([angle.cos(), angle.sin()], -1)


def _axes(*sizes):
    """Index tensors over a grid of these sizes."""
    return torch.meshgrid(*[torch.arange(n) for n in sizes], indexing="ij")


def _rows(n1):
    """(k1, k2) of each row of the exchange."""
    rho = torch.arange(16 * max(n1, 16))
    j, lane = rho // 32, rho % 32
    return (j // 8 * 16 + j // 4 % 2 * 8 + lane // 4) % n1, j // 2 % 2 * 8 + lane % 4 * 2 + j % 2


def _complex_matrix(value, part_in, part_out):
    """Of the complex number value (..., 2), the entry of its real 2 x 2 matrix, from part_in to part_out."""
    re, im = value.unbind(-1)
    return torch.where(part_in == part_out, re, torch.where(part_in == 0, im, -im))


def _of_its_row(values, row, column, n1):
    """Zero where k1 and n1 belong to different rows of those that are transformed together."""
    return values * (row // n1 == column // n1)[..., None]


@functools.lru_cache(maxsize=16)
def tables(n1: int, device: torch.device) -> torch.Tensor:
    """The tables one after the other, float16, as the kernel's struct Tables counts their bytes."""
    points, rows = 256 * n1, max(n1, 16)  # k1 and n1 of all rows that are transformed together
    tiles = rows // 16
    g, q = (lambda lane: lane // 4), (lambda lane: lane % 4)
    conjugate = torch.tensor([1.0, -1.0], dtype=torch.float64)

    tile, block, part, lane, word, e = _axes(tiles, tiles, 2, 32, 4, 2)
    row, column = 16 * tile + g(lane) + 8 * (word % 2), 16 * block + q(lane) + 4 * e + 8 * (word // 2)
    first = _unit(column % n1 * (4 * (row % n1) + 1), 4 * n1)
    first = _of_its_row(first, row, column, n1).gather(-1, part[..., None])

    tile, n, lane, word, e = _axes(tiles, 2 * tiles, 32, 4, 2)
    row, column = 16 * tile + 2 * q(lane) + e + 8 * (word % 2), 8 * n + g(lane)
    last = _unit(column % n1 * (4 * (row % n1) + 1), 4 * n1)
    last = _of_its_row(last, row, column, n1).gather(-1, (word // 2)[..., None])

    tile, lane, r, c, e = _axes(tiles, 32, 2, 2, 2)
    inner = _unit((8 * c + 2 * q(lane) + e) * (4 * ((16 * tile + 8 * r + g(lane)) % n1) + 1), 64 * n1)
    tile, lane, half, r, e = _axes(tiles, 32, 2, 2, 2)
    inner_back = _unit((8 * half + g(lane)) * (4 * ((16 * tile + 8 * r + 2 * q(lane) + e) % n1) + 1), 64 * n1)

    rho, at, e = _axes(16 * rows, 8, 2)
    k1, k2 = _rows(n1)
    outer = _unit((2 * (at ^ (rho // 2 % 8)) + e) * (4 * (k1 + n1 * k2)[rho] + 1), 4 * points)

    part, c, half, lane, e = _axes(2, 2, 2, 32, 2)
    second = _unit((2 * q(lane) + e + 8 * half) * (8 * c + g(lane)), 16).gather(-1, part[..., None])
    part, word, lane, e = _axes(2, 4, 32, 2)
    second_back = _unit((8 * (word % 2) + g(lane)) * (2 * q(lane) + e + 8 * (word // 2)), 16) * conjugate / 16
    second_back = second_back.gather(-1, part[..., None])
    block, n, half, lane, e = _axes(2, 4, 2, 32, 2)
    third = _unit((4 * (2 * block + half) + q(lane) // 2 * 2 + e) * (8 * (n // 2) + g(lane)), 16)
    third = _complex_matrix(third, q(lane) % 2, n % 2)
    third_back = _unit((8 * block + 2 * q(lane) + e) * (8 * (n // 2) + g(lane)), 16) * conjugate / 16
    third_back = _complex_matrix(third_back, half, n % 2)
    # words of a lane, four at a time
    fragments = torch.cat([t.reshape(-1, 4, 32, 2) for t in (second, second_back, third, third_back)])
    fragments = fragments.transpose(1, 2)
    # two real parts, then two imaginary ones
    inner, inner_back, outer = (t.transpose(-1, -2) for t in (inner, inner_back, outer))
    every = (first, last, inner, inner_back, outer, fragments)
    return torch.cat([t.reshape(-1) for t in every]).half().to(device)


def filters(u, k, k_reverse, skip, mode, outputs):
    """Those of scalekern_native::fft_filters_cuda, the first two empty: the right-angle spectra of filters and skip,
    (D, P, N, 2) float16, and what results are multiplied by, (D,)."""
    points = next((n for n in POINTS if n >= outputs), POINTS[-1])
    values = u.new_empty(k.shape[0], -(-outputs // points), max(points, 4096), 2, dtype=torch.float16)
    scale = k.new_empty(k.shape[0], dtype=torch.float32)
    k, k_reverse, skip = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (k, k_reverse, skip))
    offset = (k.shape[1] - 1) // 2 if mode == "same" else 0
    period = u.shape[2] if mode == "circular" else 0
    return values, scale, k, k_reverse, skip, offset, period, u.shape[2] - 1, outputs - 1, points


def arguments(out, u, spectrum, scale, bias, pregate, postgate, mask, points):
    """Those of scalekern_native::fft_conv_cuda."""
    bias, mask = (None if t is None else t.contiguous() for t in (bias, mask))
    return out, u, pregate, postgate, mask, bias, scale, spectrum, tables(points // 256, u.device), points


def forward(
    out, u, k, k_reverse, skip, bias, pregate, postgate, mask, mode, method, precision=None, spectrum=None
):  # fmt: skip
    """Fill out (B, D, M). A given spectrum is another kernel's: the filters are transformed anew."""
    prepared = filters(u, k, k_reverse, skip, mode, out.shape[2])
    _fft_filters(*prepared)
    _fft_conv(*arguments(out, u, *prepared[:2], bias, pregate, postgate, mask, prepared[-1]))


forward.native_op = _fft_conv.native_op
