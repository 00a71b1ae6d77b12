"""The text of the demo as bytes: where it comes from, what is held out, which windows are read."""

import dataclasses
import hashlib
import pathlib
import sysconfig

import torch

HELD_OUT_SHARE = 20  # one file in 20, or the last twentieth of a single file
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one line that says what and why."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    name: str
    train: torch.Tensor  # (bytes,) uint8
    held_out: torch.Tensor  # (bytes,) uint8
    digest: str  # of the text and of its split: a run resumes on the same bytes only

    @staticmethod
    def of(name: str, train: bytes, held_out: bytes) -> "Corpus":
        digest = hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(held_out).digest()).hexdigest()
        return Corpus(name, _bytes_tensor(train), _bytes_tensor(held_out), digest)


def load(text: str | None, window: int) -> Corpus:
    """The file `text`, or without one the standard library's sources; both parts hold at least one window."""
    return load_file(pathlib.Path(text), window) if text is not None else load_standard_library()


def load_file(path: pathlib.Path, window: int) -> Corpus:
    """One UTF-8 file: the end of it, at least one window of targets and their context byte, is held out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"--text {path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"--text {path}: cannot be read ({error.strerror})") from None
    if not content.strip():
        raise InputError(f"--text {path}: the file is empty")
    _check_is_text(path, content)
    if len(content) < 2 * (window + 1):
        raise InputError(f"--text {path}: at least {2 * (window + 1)} bytes are needed, the file has {len(content)}")
    cut = len(content) - max(len(content) // HELD_OUT_SHARE, window + 1)
    return Corpus.of(path.name, content[:cut], content[cut:])


def _check_is_text(path: pathlib.Path, content: bytes) -> None:
    zero = content.find(b"\0")
    if zero >= 0:
        raise InputError(f"--text {path}: binary, not text (a zero byte at offset {zero})")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text {path}: binary, not UTF-8 text (byte 0x{content[error.start]:02x} at offset {error.start})"
        ) from None


def load_standard_library() -> Corpus:
    """Every .py file of the standard library but its tests; whole files are held out, chosen by their name's hash."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not EXCLUDED & set(p.relative_to(root).parts))
    train, held_out = [], []
    for path in files:
        name = path.relative_to(root).as_posix().encode()
        chosen = hashlib.sha256(name).digest()[0] % HELD_OUT_SHARE == 0
        (held_out if chosen else train).append(path.read_bytes())
    if not train or not held_out:
        raise InputError(f"no Python sources in {root}: name a text with --text FILE")
    return Corpus.of(
        f"Python standard library ({len(train)} files to train on, {len(held_out)} held out)",
        b"".join(train), b"".join(held_out),
    )  # fmt: skip


def _bytes_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def batch(text: torch.Tensor, step: int, size: int, window: int, seed: int) -> torch.Tensor:
    """(size, window + 1) int64 for training step `step`: a function of its arguments, so resuming needs no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(text.numel() - window, (size,), generator=generator)
    return _windows(text, starts, window)


def held_out_windows(text: torch.Tensor, count: int, window: int) -> torch.Tensor:
    """At most `count` windows spread evenly over `text`, (count, window + 1) int64; none overlaps another."""
    count = min(count, text.numel() // (window + 1))
    spacing = text.numel() // count
    return _windows(text, torch.arange(count) * spacing, window)


def _windows(text: torch.Tensor, starts: torch.Tensor, window: int) -> torch.Tensor:
    return text[starts[:, None] + torch.arange(window + 1)].long()
