"""The CUDA C++ kernels of quant_matmul for few tokens, without a GPU: their own source, run by the host emulator.

Shape letters: M tokens, N outputs, K inputs.
"""

import cuda_emulation as emulated
import pytest
import torch
from cuda_emulation import PRODUCT_TOLERANCE as TOLERANCE
from cuda_emulation import inputs_of_a_product as inputs

from scalekern import reference
from scalekern.ops import _quant_matmul_cuda as cuda
from scalekern.quant import FORMATS
from scalekern.testing import error

_C = pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TABLES = ("nf4", "fp4_bnb")  # whose numbers are rounded to x's dtype as well
TILED = [f for f, least in cuda.TILES.items() if least]
OTHERS = [f for f in FORMATS if f not in TILED]


def run(x, w, **options):
    """(the product, the kernel that took it: (units of 32 codes a lane, lanes apart), or None for the plain one)"""
    _C.emulated_kernels()
    out = emulated.quant_matmul_gemv(x, w, **options)
    (name,) = _C.emulated_kernels()
    parts = name.partition("Tiles<")[2].rstrip(">").split(", ")
    return out, (int(parts[3]), parts[4] == "true") if len(parts) == 5 else None


def check(x, w, kernel, bias=None, **options):
    exact = reference.quant_matmul(x.double(), w, bias=bias)
    out, took = run(x, w, bias=bias, **options)
    assert took == kernel
    tolerance = TOLERANCE[options.get("out_dtype", x.dtype)] * (1.4 if kernel and w.format in TABLES else 1)
    assert error(out, exact) <= tolerance, f"{error(out, exact):.2e} for {w}"
    return out


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("format", TILED)
def test_formats_on_tensor_cores(format, dtype):
    """One row more than a block, a last step and a last group that are short; then groups of a lane each."""
    check(*inputs(1, 33, 416, format, None, dtype), (1, False))
    check(*inputs(3, 17, 288, format, 128, dtype), (1, False))
    wide = {"int1": 4, "int2": 2}.get(format, 1)
    if wide > 1:
        check(*inputs(2, 17, 384, format, 128, dtype), (wide, True))
    if cuda.TILES[format] < 128:
        check(*inputs(5, 17, 192, format, cuda.TILES[format], dtype), (wide, True))


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@pytest.mark.parametrize("format", (*OTHERS, "int1", "int3", "int4", "int6"))
def test_formats_code_by_code(format, dtype):
    check(*inputs(9, 17, 50, format, 11, dtype), None)


@pytest.mark.parametrize("N", (1, 17, 100))
@pytest.mark.parametrize("K", (50, 100, 7392))
def test_shapes(N, K):
    for M in (1, 3, 8) if K < 7392 else ((8,) if N == 17 else (1,)):
        x, w = inputs(M, N, K, "int4", 128)
        check(x, w, (1, False) if K == 7392 else None, out_dtype=F32)


PARTS = ("int4", 8, 128), ("int4", 3, 32), ("int1", 2, 128), ("fp4_e2m1", 1, 256), ("int4", 3, 20)


@pytest.mark.parametrize("format, M, group", PARTS)
def test_zeros_offsets_outer_and_bias(format, M, group):
    x, w = inputs(M, 19, 256, format, group)
    torch.manual_seed(1)
    centre = FORMATS[format].zero or 0
    w = w.replace(
        zeros=centre + torch.randn_like(w.scales), offsets=torch.randn_like(w.scales).to(BF16) * 0.1,
        outer=torch.rand(19, 1) + 0.5, scales=w.scales.to(BF16),
    )  # fmt: skip
    kernel = None if group == 20 else (4 if format == "int1" else 1, group < 128 or format == "int1")
    check(x, w, kernel, bias=torch.randn(19), out_dtype=F32)
    whole = w.replace(zeros=w.zeros.round().clamp(0, 15).to(torch.uint8), offsets=w.offsets[:1], outer=w.outer[:1])
    check(x, whole, kernel, out_dtype=F32)
    check(x, w.replace(scales=w.scales[:, :1], zeros=None, offsets=w.offsets[:, :1], group_size=256, outer=None),
          (4 if format == "int1" else 1, format == "int1"), out_dtype=F32)  # fmt: skip


def test_scales_of_other_kinds():
    x, w = inputs(2, 5, 64, "mxfp4", None)
    check(x, w, (1, True))
    check(*inputs(2, 5, 64, "nvfp4", None), None)
    x, w = inputs(1, 5, 128, "int4", 128)
    check(x, w.replace(scales=torch.full_like(w.scales, 3, dtype=torch.int8), outer=w.scales), None)


def test_views_and_strides():
    """Rows and columns of a larger weight; what is not aligned to whole words goes code by code."""
    x, w = inputs(4, 40, 512, "int4", 32)
    check(x[:, :128], w[3:20, 128:256], (1, True))
    check(x[:, :100], w[3:20, 96:196], None)
    check(x.mT.contiguous().mT[:, :128], w[:, :128], None)
    check(x[:, 1:129], w[:, :128], None)
    check(x[:1].expand(4, -1), w, (1, True))
    x, w = inputs(2, 6, 260, "int3", 130)
    check(x[:, :128], w[:, :128], None)  # rows of 98 bytes


@pytest.mark.parametrize("format, group", [("int4", 128), ("int1", 128), ("int2", 11)])
def test_repetition_and_the_order_of_threads_change_no_bit(format, group):
    x, w = inputs(2, 40, 2048 if group == 128 else 70, format, group)
    outs = [run(x, w, order=order)[0] for order in (*emulated.ORDERS, "shuffled")]
    assert all(torch.equal(outs[0], other) for other in outs[1:])


def test_nan_and_infinity_travel_as_in_the_oracle():
    for group in (128, 32):
        x, w = inputs(3, 20, 256, "int4", group)
        x[0, 7], x[2, 200] = float("nan"), float("inf")
        got, exact = run(x, w)[0], reference.quant_matmul(x.double(), w)
        assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())
        assert exact[0].isnan().all() and exact[1].isfinite().all() and exact[2].isinf().any()


def test_many_tokens_take_several_passes():
    check(*inputs(19, 33, 128, "int4", 128), (1, False))
    check(*inputs(5, 33, 128, "int4", 32), (1, True))


def test_the_largest_codes_are_exact():
    """Integers that float32 adds exactly: every code of a format against itself."""
    for bits in range(1, 9):
        for dtype in (F16, BF16):
            _, w = inputs(1, 64, 256, f"int{bits}", None)
            data = torch.randint(0, 256, w.data.shape, dtype=torch.uint8)
            w = w.replace(data=data, scales=torch.ones_like(w.scales), offsets=None, zeros=None)
            x = torch.zeros(8, 256, dtype=dtype)
            x[range(8), [0, 1, 5, 31, 32, 130, 200, 255]] = 1
            assert torch.equal(run(x, w, out_dtype=F32)[0].double(), reference.quant_matmul(x.double(), w))


DEFECTS = {
    "two rows of codes swapped": lambda x, w: (x, w.replace(data=w.data.roll(1, 0))),
    "nibbles swapped": lambda x, w: (x, w.replace(data=w.data >> 4 | w.data << 4)),
    "scales of the next group": lambda x, w: (x, w.replace(scales=w.scales.roll(1, 1))),
    "zeros off by one": lambda x, w: (x, w.replace(zeros=w.zeros + 1)),
    "last input ignored": lambda x, w: (torch.cat([x[:, :-1], x[:, -1:] * 0], 1), w),
    "two inputs swapped": lambda x, w: (torch.cat([x[:, 4:5], x[:, 1:4], x[:, :1], x[:, 5:]], 1), w),
    "two tokens swapped": lambda x, w: (x.roll(1, 0), w),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_check_can_fail(defect, monkeypatch):
    x, w = inputs(2, 33, 256, "int4", 32, symmetric=False)
    check(x, w, (1, True))
    sound = emulated.quant_matmul_gemv
    monkeypatch.setattr(emulated, "quant_matmul_gemv", lambda x, w, **o: sound(*DEFECTS[defect](x, w), **o))
    with pytest.raises(AssertionError, match="e[-+]0\\d for"):
        check(x, w, (1, True))


def test_which_calls_it_takes(monkeypatch):
    def reason(M, format, group, dtype=F16, activation="", K=256):
        x, w = inputs(M, 4, K, format, group, dtype)
        parts = w.data, w.scales, w.zeros, w.offsets, w.outer, None, None
        return cuda.supports_fwd(x, *parts, w.format, w.group_size, activation, None, None)

    monkeypatch.setattr(cuda._dispatch, "unavailable", lambda name, device: None)
    assert reason(1, "int4", 128) is None and reason(8, "int2", 64) is None and reason(1, "int8", None) is None
    assert "up to 8 tokens, not 9" in reason(9, "int2", 128)
    assert "activations" in reason(1, "int4", 128, activation="int8")
    assert "float64" in reason(1, "int4", 128, torch.float64)
    for odd in (("int4", 20), ("int3", 64), ("fp8_e4m3", 128)):
        assert "code at a time" in reason(1, *odd)
    assert "code at a time" in reason(1, "int4", 128, F32) and "code at a time" in reason(1, "int4", None, K=50)
    monkeypatch.setattr(cuda._dispatch, "unavailable", lambda name, device: "triton is not installed")
    assert reason(1, "int4", 20) is None


def test_it_knows_what_the_tensor_cores_take():
    """Before a call is made, from what its driver goes by: formats, groups, columns, dtypes, places."""
    seen = set()

    def agree(x, w, took=None):
        took = run(x, w)[1] is not None
        said = cuda._on_tiles(x, w.data, w.scales, w.zeros, w.offsets, w.format, w.group_size)
        assert said == took, (w, x.dtype, x.stride(), took)
        seen.add((w.format, took))

    for format in FORMATS:
        for K, group in ((256, 128), (256, 64), (192, 64), (96, 64), (256, 32), (96, None), (80, None), (96, 48)):
            agree(*inputs(2, 3, K, format, group))
    assert seen == {(f, on) for f in FORMATS for on in ((True, False) if f in TILED else (False,))}
    x, w = inputs(4, 8, 512, "int4", 32, symmetric=False)
    for dtype in (F32, F16, BF16):
        agree(x.to(dtype), w)
    for dtype in (torch.float64, F16, BF16):
        agree(x, w.replace(zeros=w.zeros.to(dtype)))
        agree(x, w.replace(offsets=w.scales.to(dtype)))
        agree(x, w.replace(scales=w.scales.to(dtype)))
    for first in (0, 8, 32, 64):  # codes and tokens that begin there
        agree(x[:, first : first + 128], w[:, :128])
        for format, group in (("int4", 32), ("int2", 128), ("int2", 64), ("int6", 128), ("int3", 128), ("int1", 128)):
            _, wide = inputs(4, 8, 512, format, group)
            part = wide[:, :128]
            agree(x[:, :128], part.replace(data=wide.data[:, first * wide.bits // 8 :][:, : part.data.shape[1]]))
    agree(x[:, :128].mT.contiguous().mT, w[:, :128])
    agree(torch.zeros(4 * 132, dtype=F16)[: 4 * 132].view(4, 132)[:, :128], w[:, :128])
    agree(x[:1].expand(4, -1), w)
