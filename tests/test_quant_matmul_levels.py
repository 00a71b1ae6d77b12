"""Integer products of quant_matmul at every level of the CPU's instructions.

Shape letters: M tokens, N outputs, K inputs, G groups.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import at_levels

import scalekern
from scalekern import _native
from scalekern.quant import QuantizedTensor
from scalekern.quant._pack import pack
from test_quant_matmul_cpu import error, on_the_cpu_kernels, randn, spoiled, weight  # noqa: F401

pytestmark = pytest.mark.skipif(bool(_native.load("cpu")), reason="the CPU library was not built (setup.py says why)")

every_level = at_levels("avx2", "avx512", "vnni")
GROUPS = (None, 32, 64, 100, 128, 7)
TOKENS = (1, 2, 5, 16, 17, 33, 128)


def drawn(bits, M, N, K, group, zeros, low=-127, high=128):
    """x, a weight with scales of 1 and 1/2, and their product in int64: float32 holds every sum on the way to it."""
    generator = torch.Generator().manual_seed(1000 * bits + M + K)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)
    group = group or K
    G = -(-K // group)
    codes, x, halves, z = draw(0, 1 << bits, N, K), draw(low, high, M, K), draw(1, 3, N, G), draw(0, 1 << bits, N, G)
    w = QuantizedTensor(
        pack(codes, bits), halves / 2, z.float() if zeros else None, format=f"int{bits}", columns=K, group_size=group
    )
    by_group = lambda part: part.repeat_interleave(group, 1)[:, :K]
    values = 2 * codes - 1 if bits == 1 else codes  # of 1 bit: -1 and 1
    middle = by_group(z) if zeros else 0 if bits == 1 else 1 << (bits - 1)
    return x, w, (x @ ((values - middle) * by_group(halves)).mT) / 2


def check_exact(x, w, exact, *where):
    out = scalekern.quant_matmul(x.float(), spoiled(w), activation="int8", activation_scale=1.0)
    wrong = (out.double() != exact).nonzero()
    assert not len(wrong), (*where, f"{len(wrong)} of {out.numel()} differ, the first at {wrong[0].tolist()}")


@every_level
def test_every_layout():
    """A tile is 16 tokens by 16 rows by 64 columns, four tiles of rows a block; a step of codes is 64 bytes."""
    shapes = itertools.cycle([(17, 515), (70, 300), (33, 260), (5, 131), (129, 192), (16, 50)])
    for bits, group, zeros in itertools.product(range(1, 9), GROUPS, (False, True)):
        for M in TOKENS:
            N, K = next(shapes)
            check_exact(*drawn(bits, M, N, K, group, zeros), bits, group, zeros, M, N, K)
        next(shapes)


@every_level
def test_long_groups():
    """Above 1024 columns a group is added up exactly, in parts of several lines; below, groups may fill many lines."""
    groups = (None, 1500), (1100, 2300), (1000, 2100)
    for bits, (group, K), zeros in itertools.product((1, 3, 4, 8), groups, (False, True)):
        for M in (1, 3, 17, 40):
            check_exact(*drawn(bits, M, 70, K, group, zeros, -7, 8), bits, group, zeros, M, K)


@every_level
def test_extremes():
    K = 1 << 15
    for bits, M, group in itertools.product((4, 8), (1, 2, 3, 17), (None, 128, 1024)):
        for code, number in ((0, 127), ((1 << bits) - 1, -127), (0, -127)):
            codes, size = torch.full((5, K), code), group or K
            scales = torch.ones(5, K // size)
            w = QuantizedTensor(pack(codes, bits), scales, format=f"int{bits}", columns=K, group_size=size)
            exact = torch.full((M, 5), (code - (1 << (bits - 1))) * number * K)
            check_exact(torch.full((M, K), number), w, exact, bits, M, group, code, number)


@every_level
def test_rounding():
    """Scales of any size: the order of float32's additions is a level's own. And no thread changes a bit."""
    for format, group, M in itertools.product(("int2", "int3", "int4", "int8"), (None, 64, 100), (1, 4, 17, 40)):
        w = weight(200, 1100, format, group, symmetric=M % 2 == 0)
        x = randn(M, 1100, seed=M)
        rounded = scalekern.reference.quant_matmul(x.double(), w, activation="int8")
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(scalekern.quant_matmul(x, w, activation="int8"))
        assert error(runs[0], rounded) < 5e-7, (format, group, M)
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2]), (format, group, M)


BOUNDS = """
import ctypes, itertools, mmap, torch, scalekern
from scalekern.quant import quantize

page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)

def at_the_end(t):  # of memory: the page behind it may not be read
    size = -(-t.nbytes // page) * page
    area = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    out = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape)
    return out.copy_(t)

torch.manual_seed(0)
formats = [f"int{bits}" for bits in range(1, 9)] + ["nf4", "fp8_e4m3", "fp6_e2m3", "mxfp4"]
shapes = (16, 512, 128), (32, 1024, 512), (17, 512, 64), (16, 72, 24), (33, 200, 40), (16, 320, 320)
for format, (N, K, group) in itertools.product(formats, shapes):
    w = quantize(torch.randn(N, K), format, **({} if format == "mxfp4" else {"group_size": group}))
    end = w.replace(data=at_the_end(w.data))
    for M, dtype, activation in itertools.product((1, 5, 40), (torch.float32, torch.bfloat16), (None, "int8")):
        if activation is None or format.startswith("int"):
            x = torch.randn(M, K).to(dtype)
            out = (scalekern.quant_matmul(x, v, activation=activation) for v in (end, w))
            assert torch.equal(*out), (format, N, K, group, M, activation)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it asks Linux for a page that may not be read")
@every_level
def test_nothing_behind_the_last_code_is_read(level):
    """A read would end that process: it has codes at the end of memory."""
    environment = os.environ | ({"SCALEKERN_CPU_ISA": level} if level else {})
    found = subprocess.run([sys.executable, "-c", BOUNDS], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
