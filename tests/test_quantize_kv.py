"""Caches of codes: what rounding costs, how codes lie, and decoding over them in every layout, written token by token.

Shape letters: B batch, H key heads, T tokens of a step, L tokens, P head dim.
"""

import pytest
import torch
from conftest import INTERPRET
from test_sparse_attention_decode import BUDGETS, CACHES, SINK, WHOLE, _newest, normal, rows, sequence

import scalekern
from scalekern import reference
from scalekern.quant import QuantizedKV
from scalekern.testing import assert_close

pytestmark = pytest.mark.usefixtures("any_backend")
compiled_only = pytest.mark.skipif(INTERPRET, reason="of no kernel")
INT8, INT4, GROUPS, EVEN = {}, {"bits": 4}, {"bits": 4, "group_size": 16}, {"bits": 8, "symmetric": True}


@pytest.fixture(autouse=True)
def _on(any_backend):
    with scalekern.backend(any_backend):
        yield


def quantize(x, **options):
    """By the oracle, which every backend equals bit for bit (test_contract.py)."""
    return reference.quantize_kv(x, **options)


@compiled_only
@pytest.mark.parametrize("P, group", ((1, None), (13, 5), (64, None), (130, 128)))
@pytest.mark.parametrize("bits", (8, 4))
def test_a_number_comes_back_within_half_a_step(bits, P, group):
    """Also far from 0, alone, and of tiny and huge numbers; in float16 scales what rounding them adds."""
    x = normal(3, 7, P) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None] + torch.tensor([0.0, 7.0, -1e3])[:, None, None]
    for symmetric in (False, True):
        for dtype in (torch.float32, torch.float16):
            cache = scalekern.quantize_kv(x, bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)
            error = (cache.dequantize(torch.float64) - x.double()).abs()
            by_channel = lambda part: part.double().repeat_interleave(cache.group_size, -1)[..., :P]
            allowed = by_channel(cache.scales) / 2 + 1e-6 * x.abs()
            if dtype == torch.float16 and not symmetric:  # an offset that is rounded leaves an end of the range out
                allowed += by_channel(cache.offsets).abs() * 2**-11
            if dtype == torch.float16:  # below 2^-14 it has 2^-24 and no relative precision
                allowed += (1 << bits) * 2.0**-25
            assert (error <= allowed).all()
            assert cache.shape == x.shape and cache.scales.dtype == dtype


@compiled_only
def test_codes_lie_in_bytes_as_described():
    """Two's complement, the even channel in the lower half; the ends of the range are the ends of the codes."""
    x = torch.arange(16.0)[None]
    cache = scalekern.quantize_kv(x, bits=4, scale_dtype=torch.float32)
    codes = list(range(-8, 8))
    pairs = zip(codes[::2], codes[1::2])
    assert cache.data.tolist()[0] == [((high & 15) << 4 | low & 15) - 256 * (high < 0) for low, high in pairs]
    assert abs(cache.scales.item() - 1) < 1e-6 and abs(cache.offsets.item() - 8) < 1e-5
    x = torch.tensor([[0.0, 255.0, 127.0, 254.9]])
    assert scalekern.quantize_kv(x, scale_dtype=torch.float32).data.tolist() == [[-128, 127, -1, 127]]
    x = torch.tensor([[-1.0, 0.5, 0.0]])  # codes -7, 3, 0: symmetric ones leave -8 out
    assert scalekern.quantize_kv(x, bits=4, symmetric=True).data.tolist() == [[3 << 4 | 9, 0]]


@pytest.mark.parametrize(
    "layout, k_format, v_format, P, Pv",
    (
        ("contiguous", INT8, INT4, 16, 32), ("padded", GROUPS, INT8, 32, 24), ("circular", INT4, GROUPS, 8, 40),
        ("ragged", EVEN, INT4, 24, 16), ("paged", INT4, INT8, 16, 16),
        ("paged", {"bits": 4, "group_size": 3}, EVEN, 7, 5),
    ),
)  # fmt: skip
def test_step_by_step_as_attention_over_the_dequantized(layout, k_format, v_format, P, Pv):
    """A ragged batch over caches of garbage and NaN scales: what was not written or may not be seen reaches nothing."""
    if INTERPRET and (layout, P) not in (("circular", 8), ("paged", 7)):
        pytest.skip("one of each kind is enough for the kernels' own process")
    tokens, budgets, L = 2, BUDGETS if layout in ("circular", "ragged") else WHOLE, 8 if INTERPRET else 12
    lead, _, told = CACHES[layout](2, L, budgets, tokens)
    q, k, v = sequence(L=L, P=P, Pv=Pv)
    caches = []
    for x, options in ((k, k_format), (v, v_format)):
        group = options.get("group_size")
        cache = QuantizedKV.empty(
            *lead, channels=x.shape[-1], bits=options.get("bits", 8), group_size=group,
            symmetric=options.get("symmetric", False), scale_dtype=torch.float16,
        )  # fmt: skip
        caches.append(cache.map(lambda t: t.fill_(float("nan") if t.is_floating_point() else 0x5A)))
    exact = [quantize(x, **options).dequantize(torch.float64) for x, options in ((k, k_format), (v, v_format))]
    limits = {} if budgets is WHOLE else {"budgets": torch.tensor(budgets, dtype=torch.int32)}
    wanted, wanted_lse = rows(q, *exact, budgets, SINK, L)
    for end in range(tokens, L + 1, tokens):
        ends = [max(end - late, 0) for late in (0, 3)]
        told_lengths = torch.tensor(ends)
        for cache, x in zip(caches, (k, v)):
            new = torch.stack([_newest(x[b], last, tokens) for b, last in enumerate(ends)])
            scalekern.quantize_kv_update(cache, new, told_lengths, sink=SINK, **told)
        if INTERPRET and end < L:
            continue
        new = torch.stack([_newest(q[b], last, tokens) for b, last in enumerate(ends)])
        out, lse = scalekern.sparse_attention_decode(
            new, *caches, told_lengths, sink=SINK, return_lse=True, **limits, **told
        )
        for b, last in enumerate(ends):
            assert_close(out[b], _newest(wanted[b], last, tokens), tolerance=3e-6)
            here = _newest(wanted_lse[b, ..., None], last, tokens, float("-inf"))[..., 0]
            assert_close(lse[b], here, tolerance=3e-6, what="lse")


@pytest.mark.parametrize("group", (1, 2, 4, 8))
@pytest.mark.parametrize("bits", (8, 4))
def test_over_many_splits_with_common_offsets(bits, group):
    """More keys than a split, and than a tile, takes; keys and values far from 0, which sums of codes must not feel."""
    if INTERPRET and group != 2:
        pytest.skip("blocks of rows are the CPU kernel's")
    L, P = 333, 64
    q, k, v = normal(1, 2 * group, 1, P), normal(1, 2, L, P, seed=1) + 3, normal(1, 2, L, P, seed=2) - 5
    k_cache, v_cache = quantize(k, bits=bits), quantize(v, bits=bits, group_size=32)
    args = q, k_cache, v_cache, torch.tensor([L])
    out, lse = scalekern.sparse_attention_decode(*args, softcap=20.0, return_lse=True)
    wanted, wanted_lse = reference.sparse_attention_decode(q.double(), *args[1:], softcap=20.0, return_lse=True)
    assert_close(out, wanted, tolerance=3e-6)
    assert_close(lse, wanted_lse, tolerance=3e-6)
    # By less than what rounding to codes moved, and by something: the codes were read.
    floats = reference.sparse_attention_decode(q.double(), k.double(), v.double(), args[3], softcap=20.0)
    assert 1e-5 < (floats - wanted).norm() / floats.norm() < (2e-3 if bits == 8 else 4e-2)


@compiled_only
@pytest.mark.parametrize("options", (INT8, GROUPS), ids=str)
def test_the_same_bits_on_any_number_of_threads(options, place):
    if place[0] != "cpu":
        pytest.skip("threads of a CPU")
    q, k, v = normal(2, 4, 1, 64), normal(2, 4, 700, 64, seed=1), normal(2, 4, 700, 64, seed=2)
    args = q, quantize(k, **options), quantize(v, **options), torch.tensor([700, 300])
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(scalekern.sparse_attention_decode(*args))
    assert runs[0].any() and all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("options", (INT8, GROUPS), ids=str)
def test_what_one_row_sees_does_not_spoil_another(options):
    """A NaN scale under the longer window of a group, and at the newest token of three."""
    q, k, v = sequence(L=30, P=16, Pv=32)
    k, v = quantize(k, **options), quantize(v, **options)
    v.scales[0, 0, 15], v.offsets[1, 1, 29], k.scales[0, 1, 29] = float("nan"), float("nan"), float("nan")
    kwargs = dict(budgets=torch.tensor((20, 6, 20, 20)), sink=1, return_lse=True)
    args = q[:, :, -3:], k, v, torch.tensor([30, 30])
    out, lse = scalekern.sparse_attention_decode(*args, **kwargs)
    wanted, wanted_lse = reference.sparse_attention_decode(args[0].double(), *args[1:], **kwargs)
    assert wanted.isnan().any() and wanted.isfinite().float().mean() > 0.5
    for g, w in ((out, wanted), (lse, wanted_lse)):
        assert torch.equal(g.isnan(), w.isnan())
        assert_close(g[w.isfinite()], w[w.isfinite()], tolerance=3e-6)


@compiled_only
def test_a_container_is_a_pytree_moves_and_is_cut(place):
    x = normal(2, 3, 9, 20)
    cache = quantize(x, bits=4, group_size=8)
    assert cache.nbytes == 2 * 3 * 9 * (10 + 3 * 2 * 2) and cache.shape == x.shape and "4 bits" in repr(cache)
    assert torch.equal(cache[:, 1, 2:5].dequantize(), cache.dequantize()[:, 1, 2:5])
    assert cache[:, 1].data.data_ptr() == cache.data[:, 1].data_ptr()
    with pytest.raises(IndexError, match="the 3 leading axes"):
        cache[..., 0]
    leaves, spec = torch.utils._pytree.tree_flatten(cache)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.dequantize(), cache.to(place[0]).dequantize())


@compiled_only
def test_bad_calls(place):
    q, k, v = sequence(L=8)
    cache = QuantizedKV.empty(2, 2, 8, channels=8)
    with pytest.raises(TypeError, match="quantize_kv_update: cache must be a QuantizedKV, got Tensor"):
        scalekern.quantize_kv_update(k, k, torch.tensor([8, 8]))
    with pytest.raises(ValueError, match="k_cache.group_size must be from 1 to the 8 channels, got 9"):
        scalekern.sparse_attention_decode(q, cache.replace(group_size=9), v, torch.tensor([8, 8]))
    with pytest.raises(ValueError, match="quantize_kv: bits must be one of 8, 4, got 2"):
        scalekern.quantize_kv(k, bits=2)
    with pytest.raises(ValueError, match="quantize_kv: group_size must be at most the 8 channels of x, got 9"):
        scalekern.quantize_kv(k, group_size=9)
    with pytest.raises(ValueError, match="quantize_kv: bits must be one of 8, 4, got 8.0"):
        scalekern.quantize_kv(k, bits=8.0)
    for name, value in (("bits", 3), ("group_size", 0), ("group_size", 9), ("scale_dtype", torch.int8)):
        with pytest.raises(ValueError, match=f"QuantizedKV.empty: {name} must be"):
            QuantizedKV.empty(2, channels=8, **{name: value})
    with pytest.raises(TypeError, match="cache.scales must be a torch.Tensor, got NoneType"):
        scalekern.quantize_kv_update(cache.replace(scales=None), k, torch.tensor([8, 8]))
    if place[0] == "cpu":
        with pytest.raises(ValueError, match="lengths must be at most 8, the slots of a head, got 9"):
            scalekern.quantize_kv_update(cache, k[:, :, :1], torch.tensor([8, 9]))
        for starts in ([-3, 0], [0, 9]):  # -3 would be a slot counted from the end
            with pytest.raises(ValueError, match="quantize_kv_update: starts must be from 0 to 8, got"):
                scalekern.quantize_kv_update(cache, k[:, :, :1], torch.tensor([1, 1]), starts=torch.tensor(starts))


def test_a_cache_keeps_its_dtypes_where_it_moves():
    cache = scalekern.quantize_kv(torch.randn(2, 2, 3, 8), bits=4)
    for moved in (cache.to(torch.zeros(1)), cache.cpu(), cache.clone()):
        assert {n: t.dtype for n, t in moved.tensors().items()} == {n: t.dtype for n, t in cache.tensors().items()}
        assert torch.equal(moved.dequantize(), cache.dequantize())
    assert cache.clone().data.data_ptr() != cache.data.data_ptr()
    with pytest.raises(TypeError, match="QuantizedKV.to: device must be a device, got torch.float16"):
        cache.to(torch.float16)
    for lead in (-2, 2.5):
        with pytest.raises(ValueError, match="QuantizedKV.empty: lead must be an integer of at least 0, got"):
            QuantizedKV.empty(lead, channels=8)


def test_a_cache_whose_batches_share_their_memory_is_not_written():
    cache = QuantizedKV.empty(1, 2, 8, channels=8).map(lambda t: t.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="cache.data is changed in place and must not be expanded"):
        scalekern.quantize_kv_update(cache, torch.randn(2, 2, 3, 8), torch.tensor([3, 3]))


@compiled_only
def test_one_kernel_serves_every_number_of_tokens():
    """A prompt's length is no constant of the kernel, and only a grid's first axis goes beyond 65,535."""
    kernels = pytest.importorskip("scalekern.triton_kernels.quantize_kv", reason="Triton is not installed")
    constants = set()
    for B, T in ((1, 1000), (2, 1008), (70_000, 16)):
        x, integers = torch.empty(B, 8, T, 64, device="meta"), torch.empty(B, dtype=torch.int32, device="meta")
        cache = QuantizedKV.empty(B, 8, 2048, channels=64, device="meta")
        launch = kernels.plan(*cache.tensors().values(), x, integers, None, None, None, 0, False, 8, 64)
        constants.add(str([launch.args[p.name] for p in launch.kernel.params if p.is_constexpr]))
        assert launch.grid == (B * 8 * T,)
    assert len(constants) == 1
