"""A weight in the order of the tensor cores' fragments, for csrc/quant_matmul/cuda_quant_tiles.cuh: made once, kept.

Shape letters: N outputs, K inputs, G groups; T tiles of 256 outputs, S steps of 64 inputs.

What is kept lies in the device's memory beside the weight for as long as that lives, as large as its codes and scales
again (rows and columns filled up to whole tiles; the shifts of a weight with zeros or offsets are float32). It is no
part of a state_dict, a pickle or a copy. Writing into the weight (its version counter, or new memory behind it) makes
it anew at the next call; what goes behind the counter's back (`w.data.data.copy_`) is not seen, nor is anything by a
CUDA graph that has been made: it goes on reading the layout of then, which is kept as long as the weight is. A view of
a weight has a layout of its own, kept with the weight that it is a view of: of parts that lie beside each other, as
experts do, all; of others the KEPT last ones, and what together takes up to MOST times the weight's memory.
"""

import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from scalekern._kept import made
from scalekern.quant._pack import pack, unpack

ROWS, STEP = 256, 64  # of a tile and of a step, as in the kernel
PIECE = 1 << 24  # codes that lie unpacked, a byte each, while a layout is made
KEPT, MOST = 4, 4

_kept = WeakTensorKeyDictionary()
_captured = WeakTensorKeyDictionary()  # layouts that CUDA graphs read


def layout(data, scales, zeros, offsets, bits: int, K: int):
    """(codes, scales, shifts or None) of `codes_of` and `scales_of`, kept."""
    captured = _is_captured(data)
    if captured and not _is_kept(data, scales, zeros, offsets):
        # Memory of the graph: nothing that another call could read before the graph runs.
        return codes_of(data, bits, K), *scales_of(scales, zeros, offsets, data.shape[0], bits)
    codes = _keep(data, (bits, K), (data,), lambda: codes_of(data, bits, K))
    parts = _parts(scales, zeros, offsets)
    rest = _keep(data, (bits, "scales"), parts, lambda: scales_of(scales, zeros, offsets, data.shape[0], bits))
    if captured:
        held = _captured.setdefault(_base(data), {})
        held |= {id(part): part for part in (codes, *rest)}
    return codes, *rest


def _is_captured(data) -> bool:
    return data.is_cuda and torch.cuda.is_current_stream_capturing()


def _keep(owner, key, tensors, make):
    base = _base(owner)
    views = _kept.setdefault(base, {})
    key = (_place(owner), *key)
    found = views.pop(key, None)
    if found is not None and _is_fresh(found, tensors):
        views[key] = found  # the last one used is the last one
        return found[1]
    new = made(make, owner.device)
    if owner.is_cuda:  # once: from here on any stream may read it
        torch.cuda.current_stream(owner.device).synchronize()
    # A storage that is known weakly leaves its place to no other one; memory that has been freed does.
    seen = tuple((weakref.ref(_base(t)), StorageWeakRef(t.untyped_storage()), _place(t), t._version) for t in tensors)
    views[key] = seen, new
    _drop(views, MOST * base.untyped_storage().nbytes())
    return new


def _drop(views, most: int):
    """Those of memory that is gone, then those used longest ago, down to `most` bytes or KEPT of codes and scales."""
    sizes = {}
    for key, (seen, new) in list(views.items()):
        if any(storage.expired() for _, storage, *_ in seen):
            views.pop(key, None)
        else:
            sizes[key] = _nbytes(new)
    for key in list(sizes)[: -2 * KEPT]:
        if sum(sizes.values()) > most:
            views.pop(key, None)
            del sizes[key]


def _nbytes(parts) -> int:
    return sum(part.nbytes for part in ((parts,) if isinstance(parts, torch.Tensor) else parts) if part is not None)


def _is_fresh(found, tensors) -> bool:
    def same(seen, storage, place, version, t):
        same_memory = storage.cdata == t.untyped_storage()._cdata and place == _place(t)
        return same_memory and version == t._version and seen() is _base(t)

    return len(found[0]) == len(tensors) and all(same(*seen, t) for seen, t in zip(found[0], tensors))


def _is_kept(data, scales, zeros, offsets) -> bool:
    views, place = _kept.get(_base(data), {}), _place(data)
    wanted = (data,), _parts(scales, zeros, offsets)
    return all(any(key[0] == place and _is_fresh(views[key], tensors) for key in views) for tensors in wanted)


def _parts(*parts):
    return tuple(p for p in parts if p is not None)


def _base(t):
    return t._base if t._is_view() else t


def _place(t):
    return t.data_ptr(), t.device, t.shape, t.stride(), t.dtype


def codes_of(data, bits: int, K: int):
    """(T, S, 256 * 64 * bits / 8) uint8 from (N, bytes), filled up with codes of 0: of each warp, which has 32 rows,
    pieces of 16 bytes, those of its 32 lanes side by side."""
    # Register r of a fragment of 16 x 16 holds rows g (+ 8 for odd r) and columns 2 t, 2 t + 1 (+ 8 for r of 2 and 3)
    # in lane 4 g + t. A lane's 16 registers of four fragments are 16 pairs of codes; 16 / bits share a word, the
    # first codes of them in its lower half, the second ones in its upper half.
    T, S = -(-data.shape[0] // ROWS), -(-K // STEP)
    tile, warp, two, eight_rows, g, step, fragment, eight_columns, t, code = range(10)
    order = tile, step, warp, g, t, two, fragment, eight_columns, eight_rows, code
    codes = data.new_empty(T, S, ROWS * STEP * bits // 8)
    most = max(1, PIECE // (ROWS * STEP * S))
    for first in range(0, T, most):
        part = unpack(data[first * ROWS : (first + most) * ROWS], bits, K)
        size = min(most, T - first)
        missing = 0, S * STEP - K, 0, size * ROWS - part.shape[0]
        part = torch.nn.functional.pad(part, missing, value=1 << (bits - 1))
        part = part.view(size, 8, 2, 2, 8, S, 4, 2, 4, 2).permute(order)
        words = part.reshape(size, S, 8, 32, 2, bits, 16 // bits, 2).transpose(-1, -2).reshape(size, S, 8, 32, -1)
        pieces = pack(words, bits).view(size, S, 8, 32, -1, 16).transpose(3, 4)
        codes[first : first + size] = pieces.reshape(size, S, -1)
    return codes


def scales_of(scales, zeros, offsets, N: int, bits: int):
    """(T, G, 256) scales, float32 if they are not of 16 bits, and shifts, float32, or None if all are 0:
    scale (code - zero) + offset = scale (code - centre) + shift."""
    kept = scales if scales.dtype in (torch.float16, torch.bfloat16) else scales.float()
    shifts = None
    if zeros is not None or offsets is not None:
        zeros = scales.new_zeros(1, 1, dtype=torch.float32) if zeros is None else (1 << (bits - 1)) - zeros.float()
        shifts = scales.float() * zeros + (0 if offsets is None else offsets.float())
    return _by_tile(kept.detach(), N), None if shifts is None else _by_tile(shifts.detach(), N)


def _by_tile(part, N: int):
    part = part.expand(N, -1)
    part = torch.nn.functional.pad(part, (0, 0, 0, -N % ROWS))
    return part.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
