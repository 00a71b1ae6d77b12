"""quant_matmul of 8 to 64 tokens in CUDA C++, without a GPU: layout, pipeline and stream-K, run by the host emulator.

Shape letters: M tokens, N outputs, K inputs.
"""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import cuda_emulation as emulated
import pytest
import torch
from cuda_emulation import PRODUCT_TOLERANCE as TOLERANCE
from cuda_emulation import inputs_of_a_product as inputs

from scalekern import reference
from scalekern._kept import made as made_to_be_kept
from scalekern.nn import QuantLinear
from scalekern.ops import _quant_matmul_cuda as cuda
from scalekern.ops import _quant_matmul_tiles as tiles
from scalekern.ops import _quant_tiles_layout as kept
from scalekern.quant import quantize
from scalekern.testing import error

_C = pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", (F16, BF16), ids=str)


def run(x, w, **options):
    """(the product, what its kernel was made for: (bits, tiles of 8 tokens, groups smaller than a step))"""
    _C.emulated_kernels()
    out = emulated.quant_matmul_tiles(x, w, **options)
    product, last = _C.emulated_kernels()
    assert last.endswith("SumParts")
    *_, bits, tokens, fine = product.partition("StreamK<")[2].rstrip(">").split(", ")
    return out, (int(bits), int(tokens), fine == "true")


def check(x, w, kernel=None, bias=None, **options):
    exact = reference.quant_matmul(x.double(), w, bias=bias)
    out, took = run(x, w, bias=bias, **options)
    assert kernel is None or took == kernel
    found = error(out, exact)
    assert found <= TOLERANCE[options.get("out_dtype") or x.dtype], f"{found:.2e} for {w}"
    return out


@DTYPES
@pytest.mark.parametrize("format, bits", [("int4", 4), ("int8", 8)])
def test_tokens_and_tails(format, bits, dtype):
    """N a row more than a tile, or less; K no multiple of a step, nor of a group; programs that end within tiles."""
    check(*inputs(1, 1, 8, format, 128, dtype), (bits, 1, False))
    check(*inputs(5, 257, 200, format, 128, dtype), (bits, 1, False))
    check(*inputs(8, 17, 1000, format, 64, dtype), (bits, 1, False), order="falling")
    check(*inputs(17, 100, 264, format, 48, dtype), (bits, 4, True), order="shuffled")
    check(*inputs(64, 100, 200, format, 128, dtype, symmetric=False), (bits, 8, False), order="falling")
    check(*inputs(33, 17, 72, format, 32, dtype, symmetric=False), (bits, 8, True))


@pytest.mark.parametrize("group", (16, 32, 48, 64, 80, 128, 192, 400, None))
def test_groups(group):
    fine = group in (16, 32, 48, 80)  # 400: there is one
    check(*inputs(8, 20, 392, "int4", group), (4, 1, fine))
    check(*inputs(9, 20, 392, "int8", group, symmetric=False), (8, 2, fine), order="falling")


@pytest.mark.parametrize("group", (128, 32))
def test_zeros_offsets_outer_and_bias(group):
    x, w = inputs(9, 19, 264, "int4", group)
    torch.manual_seed(1)
    w = w.replace(
        zeros=8 + torch.randn_like(w.scales), offsets=torch.randn_like(w.scales).to(BF16) * 0.1,
        outer=torch.rand(19, 1) + 0.5, scales=w.scales.to(BF16),
    )  # fmt: skip
    check(x, w, bias=torch.randn(19), out_dtype=F32)
    check(x, w.replace(zeros=w.zeros.round().clamp(0, 15).to(torch.uint8), offsets=w.offsets[:1], outer=w.outer[:1]))
    check(x, w.replace(scales=w.scales[:, :1], zeros=None, offsets=w.offsets[:, :1], group_size=264), out_dtype=BF16)
    w = w.replace(zeros=None, offsets=None)
    check(x, w.replace(scales=w.scales.to(F16)[:1]), out_dtype=F32, bias=torch.randn(19).half())
    check(x, w.replace(scales=torch.full_like(w.scales, 3, dtype=torch.int8)), out_dtype=F32)


def integers(M, N, K, format, group, dtype=F16):
    """A product that float32 adds exactly, with codes and scales of every size."""
    torch.manual_seed(2)
    w = quantize(torch.zeros(N, K), format, group_size=group)
    data = torch.randint(0, 256, w.data.shape, dtype=torch.uint8)
    return torch.randint(-8, 9, (M, K)).to(dtype), w.replace(data=data, scales=torch.randint_like(w.scales, 1, 5))


@DTYPES
@pytest.mark.parametrize("format", ("int4", "int8"))
def test_every_code_and_every_unit_counts_once(format, dtype):
    """5 tiles of rows of 7 steps among few and many programs: with whole numbers, all the same bits."""
    x, w = integers(8, 1100, 424, format, 64, dtype)
    exact = reference.quant_matmul(x.double(), w)
    for processors in (1, 2, 132):  # 2, 4 and 8 programs; of 8, one begins where a tile does, at 21 of 21.9
        assert torch.equal(run(x, w, out_dtype=F32, processors=processors)[0].double(), exact), processors


@pytest.mark.parametrize("M, format, group, symmetric", [(9, "int4", 128, True), (17, "int8", 32, False)])
def test_repetition_and_the_order_of_threads_change_no_bit(M, format, group, symmetric):
    x, w = inputs(M, 270, 456, format, group, symmetric=symmetric)
    outs = [check(x, w, out_dtype=F32, order=order) for order in (*emulated.ORDERS, "shuffled")]
    assert all(torch.equal(outs[0], other) for other in outs[1:])
    check(x, w, out_dtype=F32, processors=1)


def test_nan_and_infinity_travel_as_in_the_oracle():
    for group in (128, 32):
        x, w = inputs(9, 20, 264, "int4", group)
        x[0, 7], x[8, 260] = float("nan"), float("inf")
        got, exact = run(x, w)[0], reference.quant_matmul(x.double(), w)
        assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())
        assert exact[0].isnan().all() and exact[1].isfinite().all() and exact[8].isinf().any()


def test_views_and_strides():
    """Tokens in any strides and at any address; rows and columns of a larger weight."""
    x, w = inputs(12, 300, 512, "int4", 32)
    check(x[:, :128], w[3:280, 128:256])
    check(x.mT.contiguous().mT[:, :136], w[:, :136])
    check(x[:, 1:129], w[:, :128])
    check(x[:1].expand(12, -1), w)
    check(x.view(3, 4, 512), w)


DEFECTS = {
    "rows of a warp swapped": lambda x, codes, *rest: (x, codes.roll(512, -1), *rest),
    "lanes swapped": lambda x, codes, *rest: (x, codes.roll(16, -1), *rest),
    "steps swapped": lambda x, codes, *rest: (x, codes.roll(1, 1), *rest),
    "halves of a word swapped": lambda x, codes, *rest: (x, codes.view(torch.int16).flip(-1).roll(0), *rest),
    "scales of the next group": lambda x, codes, scales, shifts: (x, codes, scales.roll(1, 1), shifts),
    "scales of the next row": lambda x, codes, scales, shifts: (x, codes, scales.roll(1, 2), shifts),
    "no shifts": lambda x, codes, scales, shifts: (x, codes, scales, None),
    "last inputs ignored": lambda x, *rest: (torch.cat([x[:, :-8], x[:, -8:] * 0], 1), *rest),
    "two tokens swapped": lambda x, *rest: (x.roll(1, 0), *rest),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_check_can_fail(defect, monkeypatch):
    x, w = inputs(9, 40, 264, "int4", 64, symmetric=False)
    check(x, w)
    sound = tiles.arguments

    def spoiled(*args):
        out, x, *given, outer, bias, bits, group = sound(*args)
        x, codes, scales, shifts = DEFECTS[defect](x, *given)
        return out, x, codes.contiguous().view(torch.uint8), scales.contiguous(), shifts, outer, bias, bits, group

    monkeypatch.setattr(tiles, "arguments", spoiled)
    with pytest.raises(AssertionError, match="e[-+]0\\d for"):
        check(x, w)


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Names of what was made, as it is made."""
    names = []
    for name in ("codes_of", "scales_of"):
        sound = getattr(kept, name)
        monkeypatch.setattr(kept, name, lambda *args, n=name, f=sound: (names.append(n), f(*args))[1])
    return names


def taken(names):
    found = list(names)
    names.clear()
    return found


def layout(w):
    return kept.layout(w.data, w.scales, w.zeros, w.offsets, w.bits, w.columns)


def test_a_layout_is_made_once_and_anew_when_its_weight_changes(made):
    x, w = inputs(9, 40, 136, "int4", 64, symmetric=False)
    check(x, w)
    assert taken(made) == ["codes_of", "scales_of"]
    check(x.bfloat16(), w)
    assert taken(made) == []
    w.data.copy_(w.data.flip(0))
    check(x, w)
    assert taken(made) == ["codes_of"]
    w.zeros.add_(1)
    check(x, w)
    assert taken(made) == ["scales_of"]
    check(x, w.replace(scales=w.scales.clone()))
    assert taken(made) == ["scales_of"]
    w.data.set_(w.data.flip(1).contiguous())
    check(x, w)
    assert taken(made) == ["codes_of", "scales_of"]


def test_the_same_view_has_the_same_layout_and_few_views_have_one(made):
    x, w = inputs(9, 40, 128, "int4", 64)
    check(x, w[:20]), check(x, w[:20])
    assert taken(made) == ["codes_of", "scales_of"]
    w.data[0].zero_()  # of the base: the view has changed as well
    check(x, w[:20])
    assert taken(made) == ["codes_of"]
    for rows in range(1, 40):
        layout(w[:rows])
    assert len(kept._kept[w.data]) == 2 * kept.KEPT


def test_parts_of_a_weight_that_lie_beside_each_other_all_have_one(made):
    """Of 12 experts, each is made once."""
    x, w = inputs(9, 12 * 256, 64, "int4", 64)
    for _ in range(2):
        for rows in range(0, 12 * 256, 256):
            layout(w[rows : rows + 256])
    assert len(taken(made)) == 2 * 12


def test_other_memory_in_the_same_place_is_seen(made):
    """As when a parameter's data is replaced twice, and the second time gets what the first set free."""
    _, w = inputs(9, 40, 128, "int4", 64)
    memory = bytearray(w.data.numpy().tobytes())
    weight = w.replace(data=torch.frombuffer(memory, dtype=torch.uint8).view(w.data.shape).detach())
    layout(weight)
    memory[:] = w.data.flip(0).numpy().tobytes()
    weight.data.data = torch.frombuffer(memory, dtype=torch.uint8).view(w.data.shape)
    assert torch.equal(layout(weight)[0], kept.codes_of(w.data.flip(0), w.bits, 128))


def test_a_layout_goes_with_its_weight_and_is_no_part_of_it():
    x, w = inputs(9, 40, 128, "int4", 64)
    layer = QuantLinear.from_quantized(w)
    gc.collect()
    before = len(kept._kept)
    layout(layer.quantized_weight)
    assert len(kept._kept) == before + 1
    assert set(layer.state_dict()) == {"weight_data", "weight_scales"}
    other = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert len(kept._kept) == before + 1, "of a copy, none is made yet"
    layer.weight_data.data = layer.weight_data.data.flip(0)  # as `to` does
    check(x, layer.quantized_weight)
    del layer, other
    gc.collect()
    assert len(kept._kept) == before


def test_what_a_cuda_graph_reads_stays_as_long_as_its_weight(monkeypatch):
    _, w = inputs(9, 40, 128, "int4", 64, symmetric=False)
    layout(w)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_is_captured", lambda data: True)
        read = [weakref.ref(part) for part in layout(w)]
    w.data.zero_(), w.scales.zero_()
    layout(w), [layout(w[:rows]) for rows in range(1, 10)]
    assert all(part() is not None for part in read)
    del w
    gc.collect()
    assert not any(part() is not None for part in read)


def test_what_is_kept_on_a_gpu_is_made_by_another_thread(monkeypatch):
    """Whose memory is not of the pool that torch.compile lets a first run allocate from, and expects to get back."""
    here, captured, device = threading.get_ident(), False, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(stream))
    assert made_to_be_kept(threading.get_ident, device) != here
    assert made_to_be_kept(threading.get_ident, torch.device("cpu")) == here
    with pytest.raises(ZeroDivisionError):
        made_to_be_kept(lambda: 1 / 0, device)
    captured = True
    assert made_to_be_kept(threading.get_ident, device) == here


def test_a_layout_made_in_pieces_is_the_same(monkeypatch):
    for format in ("int4", "int8"):
        _, w = inputs(1, 600, 136, format, 64)
        whole = kept.codes_of(w.data, w.bits, 136)
        monkeypatch.setattr(kept, "PIECE", 1)
        assert torch.equal(kept.codes_of(w.data, w.bits, 136), whole)
        assert whole.nbytes == 3 * 256 * 192 * w.bits // 8
        monkeypatch.undo()


# --- which calls ------------------------------------------------------------------------------------------------------


def test_which_calls_it_takes(monkeypatch):
    def reason(M, format="int4", group=128, dtype=F16, activation="", K=256, **options):
        x, w = inputs(M, 4, K, format, group, dtype, **options)
        parts = w.data, w.scales, w.zeros, w.offsets, w.outer, None, None
        return cuda.supports_fwd(x, *parts, w.format, w.group_size, activation, None, None)

    monkeypatch.setattr(cuda._dispatch, "unavailable", lambda name, device: None)
    assert reason(9) is None and reason(64, "int8", None, BF16) is None
    assert reason(16, K=392, group=48, symmetric=False) is None
    assert "8 to 64 tokens, not 65" in reason(65)
    assert "int4 and int8, not nf4" in reason(9, "nf4", 64)
    assert "columns by 8 and groups by 16, not 260 and 128" in reason(9, K=260)
    assert "groups by 16, not 256 and 24" in reason(9, group=24)
    assert "float16 and bfloat16" in reason(9, dtype=F32)
    assert "activations" in reason(9, activation="int8")
    with torch.inference_mode():
        assert "inference mode" in reason(9)


def test_calls_of_8_tokens_and_more_come_to_it(monkeypatch):
    """`forward` of the backend asks again which of its two kernels takes a call."""
    came = []
    monkeypatch.setattr(tiles, "_tiles", lambda *args: came.append("tiles"))
    monkeypatch.setattr(cuda, "_gemv", lambda *args: came.append("gemv"))
    for M in (1, 7, 8, 64):
        x, w = inputs(M, 4, 256, "int4", 128)
        parts = w.data, w.scales, w.zeros, w.offsets, w.outer, None
        cuda.forward(torch.empty(M, 4), x, *parts, None, w.format, w.group_size, "", None, None)
    assert came == ["gemv", "gemv", "tiles", "tiles"]
