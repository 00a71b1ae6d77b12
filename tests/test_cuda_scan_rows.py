"""The scans of plain rows on CUDA, by the host emulator: a last wave that is split over time, rows fetched ahead."""

import ctypes
import faulthandler
import mmap
import os

import cuda_emulation as emulated
import pytest
import torch

from scalekern.ops import selective_scan as scan
from scalekern.reference.selective_scan import selective_scan_bwd, selective_scan_fwd
from test_cuda_emulated import SCAN, TOLERANCE, assert_all_close, doubled, scan_inputs


def backward_call(args, seed=1):
    """Arguments of selective_scan_bwd at random upstream gradients."""
    out, last, checkpoints = selective_scan_fwd(*doubled(args), True)
    generator = torch.Generator().manual_seed(seed)
    normal = lambda like, dtype: torch.randn(like.shape, dtype=torch.float64, generator=generator).to(dtype)
    dout, dlast = normal(out, args[0].dtype), normal(last, args[2].dtype)
    return [dout, dlast, *args[:10], checkpoints.to(args[2].dtype), *args[10:]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape, chunks",
    [
        (dict(B=1, D=200, L=200, N=16, dtype=torch.bfloat16), 3),  # the last of four blocks, 8 channels
        (dict(B=2, D=70, L=136, N=5, optional="bh"), 3),  # the last of four, of the second batch; neither D nor z
        (dict(B=2, D=70, L=64, N=16), 1),  # one tile is not split
    ],
)
def test_emulated_backward_splits_the_last_wave(shape, chunks, reverse):
    """One SM has three places: of four blocks the last is split over time."""
    from scalekern import _C

    call = backward_call(scan_inputs(**shape, reverse=reverse))
    want = selective_scan_bwd(*doubled(call))
    _C.emulated_kernels()
    for order in emulated.ORDERS:
        got = emulated.selective_scan_bwd(*call, order=order)
        assert_all_close(got, want, SCAN, TOLERANCE[call[0].dtype])
        pick = lambda values: [values[i] for i in (2, 5, 7, 8)]  # float32 in any case
        assert_all_close(pick(got), pick(want), pick(SCAN), TOLERANCE[torch.float32])
    assert any("ScanBwdChunks" in name for name in _C.emulated_kernels()) == (chunks > 1)


def guarded(tensor, at_end):
    """A copy whose last byte is beside a page that must not be touched, or its first one."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    pages = -(-size // page) + 2
    memory = mmap.mmap(-1, pages * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (0, pages - 1):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + edge * page), ctypes.c_size_t(page), 0) == 0
    offset = (pages - 1) * page - size if at_end else page
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view_as(tensor).copy_(tensor)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 200, 16), (2, 68, 72, 4), (1, 4, 8, 16)], ids=str)
def test_rows_fetched_ahead_end_where_the_tensors_do(shape, reverse, at_end):
    """In a process of its own: what it must not do is to touch memory beside its tensors."""
    args = scan_inputs(*shape, dtype=torch.bfloat16, reverse=reverse)
    call = backward_call(args)
    guard = lambda values: [guarded(x, at_end) if isinstance(x, torch.Tensor) else x for x in values]
    calls = {
        "selective_scan_fwd": (scan._allocate_fwd(*args, True), args),
        "selective_scan_bwd": (scan._allocate_bwd(*call), call),
    }
    calls = {name: (guard(outputs), guard(inputs)) for name, (outputs, inputs) in calls.items()}
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        failed = 1  # an error must not go on with the other tests in here
        try:
            for name, (outputs, inputs) in calls.items():
                emulated.fill(name, outputs, inputs, "falling")  # copies happen at once, waited for or not
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0
