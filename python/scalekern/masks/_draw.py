"""Pictures of plans: on a terminal and as a PNG file."""

import os
import pathlib
import struct
import zlib

import torch

from scalekern.masks._code import on_cpu

EMPTY, PARTIAL, FULL, GAP = range(4)
CHARACTERS = {EMPTY: ".", PARTIAL: "+", FULL: "#"}
ANSI = {EMPTY: 250, PARTIAL: 110, FULL: 25}  # of 256 colours: grey, pale blue, dark blue
PALETTE = bytes.fromhex("efefef9db7d51f4e8cffffff")
_PANEL = 512  # pixels across, about


@on_cpu
def grid(mask, q_len: int, kv_len: int, block) -> torch.Tensor:
    """uint8 (Bp, Hp, query tiles, key tiles): EMPTY, PARTIAL or FULL, as the plan has it."""
    plan = mask.plan(q_len, kv_len, block)
    n_q, n_k = (-(-n // size) for n, size in zip((q_len, kv_len), plan.block))
    row = torch.arange(len(plan.ptr) - 1).repeat_interleave(plan.ptr.diff().long())
    start, count, kind = plan.runs.long().T
    run = torch.arange(len(row)).repeat_interleave(count)
    cell = (row * n_k + start - (count.cumsum(0) - count))[run] + torch.arange(len(run))
    cells = torch.zeros(plan.batches * plan.heads * n_q * n_k, dtype=torch.uint8)
    cells[cell] = torch.where(kind == 0, FULL, PARTIAL).to(torch.uint8)[run]
    return cells.view(plan.batches, plan.heads, n_q, n_k)


def show(mask, q_len, kv_len, *, width, block, color) -> str:
    """See Mask.show."""
    if block is None:
        columns = max(1, -(-kv_len // max(1, width)))
        block = (2 * columns if columns > 1 else 1, columns)  # a character is about twice as tall as wide
    cells = grid(mask, q_len, kv_len, block)
    panels: dict[str, list] = {}
    for b, of_batch in enumerate(cells):
        for h, panel in enumerate(of_batch):
            panels.setdefault("\n".join(_line(row, color) for row in panel.tolist()), []).append((b, h))
    if len(panels) == 1:
        return next(iter(panels))
    return "\n\n".join(f"{_whose(owners, *cells.shape[:2])}\n{picture}" for picture, owners in panels.items())


def _line(row: list[int], color: bool) -> str:
    if not color:
        return "".join(CHARACTERS[c] for c in row)
    starts = [i for i, c in enumerate(row) if i == 0 or row[i - 1] != c]
    ends = [*starts[1:], len(row)]
    parts = (f"\x1b[38;5;{ANSI[row[a]]}m{CHARACTERS[row[a]] * (b - a)}" for a, b in zip(starts, ends))
    return "".join(parts) + "\x1b[0m"


def _whose(owners: list[tuple[int, int]], batches: int, heads: int) -> str:
    """ "batch 0, head 0 2 3" of the (batch, head) pairs that share a picture."""
    by_batch: dict[int, list[int]] = {}
    for b, h in owners:
        by_batch.setdefault(b, []).append(h)
    parts: dict[tuple, list[int]] = {}
    for b, of_batch in by_batch.items():
        parts.setdefault(tuple(of_batch), []).append(b)
    text = []
    for of_batches, group in ((" ".join(map(str, hs)), " ".join(map(str, bs))) for hs, bs in parts.items()):
        text.append(", ".join([f"batch {group}"] * (batches > 1) + [f"head {of_batches}"] * (heads > 1)))
    return "; ".join(text)


def save_png(mask, path, q_len, kv_len, *, block) -> None:
    """See Mask.save_png."""
    for length in (q_len, kv_len):
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"save_png: q_len and kv_len must be integers of at least 1, got {q_len} and {kv_len}")
    if block is None:
        block = 128 << max(0, (-(-max(q_len, kv_len) // (128 * _PANEL)) - 1).bit_length())
    cells = grid(mask, q_len, kv_len, block)
    scale = max(1, _PANEL // max(cells.shape[2:]))
    panels = cells.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    panels = torch.nn.functional.pad(panels, (8, 8, 8, 8), value=GAP)
    image = panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # batches downwards, heads to the right
    _write(pathlib.Path(path), image)


def _write(path: pathlib.Path, image: torch.Tensor) -> None:
    """A PNG of palette indices (height, width); each row begins with its filter, none."""
    height, width = image.shape
    rows = bytes(torch.nn.functional.pad(image, (1, 0)).flatten().tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", PALETTE), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in parts:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    os.replace(temporary, path)
