"""fft_conv beyond the contract: sizes of the FFT, methods, blocks, long sequences, streaming, what is not finite."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch

import scalekern
from scalekern import _dispatch, _library, reference, testing
from scalekern.ops import _fft_conv as blocks
from scalekern.ops import _toeplitz
from scalekern.testing import error


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 7, 11, 97, 1000, 1025, 65537, 1_000_003])
def test_good_size_is_the_least_5_smooth_one(n):
    def smooth(m):
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        return m == 1

    size = blocks.good_size(n)
    assert size >= n and smooth(size)
    assert size == n or not any(smooth(m) for m in range(n, min(size, n + 3000)))


@pytest.mark.parametrize("mode", ["causal", "circular", "same", "full"])
@pytest.mark.parametrize("length, taps", [(1, 1), (2, 5), (5, 2), (16, 16), (17, 51), (64, 20), (101, 101)])
def test_by_fft_equals_by_sums(mode, length, taps):
    """Every output, the first and last ones too: an FFT that is a step too short wraps exactly there."""
    u, k = randn(2, 3, length), randn(3, taps, seed=1)
    by_fft = scalekern.fft_conv(u, k, mode=mode, method="fft")
    by_sums = scalekern.fft_conv(u, k, mode=mode, method="direct")
    assert by_fft.shape == by_sums.shape
    assert (by_fft - by_sums).abs().max() < 1e-12 * by_sums.abs().max()
    assert by_sums.abs().max() > 0.01


@pytest.mark.parametrize("mode", ["causal", "circular", "same", "full"])
@pytest.mark.parametrize("channels", [1, 7])
def test_blocks_change_nothing(mode, channels, monkeypatch):
    u, k = randn(2, channels, 40).requires_grad_(), randn(channels, 33, seed=1).requires_grad_()

    def run():
        out = scalekern.fft_conv(u, k, mode=mode, skip=k[:, 0], postgate=None, method="fft")
        return out, *torch.autograd.grad(out.square().sum(), (u, k))

    whole = run()
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 1)
    assert all(error(a, b) < 1e-13 for a, b in zip(run(), whole))


@pytest.mark.parametrize("sample", testing.samples("fft_conv"), ids=lambda sample: sample.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_way_of_a_gpu(sample, dtype, monkeypatch):
    """What takes another branch there, run here: sums over the batch, complex rows of an odd period, few taps."""
    args, kwargs = sample.make(dtype=dtype, seed=3)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    for t in tensors:
        t.requires_grad_()

    def run():
        out = scalekern.fft_conv(*args, **kwargs)
        return out, *torch.autograd.grad(out.double().square().sum(), tensors)

    usual = run()
    monkeypatch.setattr(blocks, "_kind", lambda x: "cuda")
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cuda", 100)
    bound = 1e-13 if dtype == torch.float64 else 1e-3
    assert all(error(a, b) < bound for a, b in zip(run(), usual))


@pytest.mark.parametrize(
    "length, options, chosen",
    [(1024, {}, "triton"), (16384, {}, "triton"), (32768, {}, "triton"),
     (1 << 22, {}, "triton"), ((1 << 22) + 1, {}, "cuda"), (1024, {"method": "direct"}, "cuda"),
     (1024, {"method": "toeplitz"}, "cuda"),
     (1024, {"precision": "ieee"}, "cuda"), (1024, {"precision": "bf16"}, "triton"),
     (1024, {"dtype": torch.float64}, "cuda"), (1024, {"k": (2, 3, 9)}, "cuda")],
)  # fmt: skip
def test_what_a_gpu_runs(length, options, chosen):
    """The Triton kernels; torch's FFT where they decline, which is never the reference."""
    pytest.importorskip("triton")
    u = torch.empty(2, 3, length, dtype=options.get("dtype", torch.bfloat16), device="meta")
    k = torch.empty(options.get("k", (3, length)), device="meta")
    args = (u, k, *[None] * 6, "causal", options.get("method", "auto"), options.get("precision"), None)
    for op, call in (("fft_conv_fwd", args), ("fft_conv_bwd", (u, *args))):
        rows = _dispatch.explain(_library.OPS[op].backends, "cuda", call, None)
        assert next(entry.name for entry, reason in rows if reason is None) == chosen


@pytest.mark.parametrize("mode", ["causal", "same", "full"])
def test_the_fft_is_even_where_it_may_be(mode):
    """cuFFT lets two rows of an odd length share a transform, and their NaN."""
    for length, taps, reverse in ((37, 37, 1), (23, 23, 23), (1, 1, 1), (2, 9, 1)):
        count = length + taps - 1 if mode == "full" else length
        assert blocks.ring_of(mode, length, count, taps, 1 if mode == "full" else reverse).size % 2 == 0


def test_no_index_waits_for_the_device(monkeypatch):
    """Which taps are kept is known from the sizes: a mask would be counted on the host, and break a CUDA graph."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
            index = args[1] if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) else ()
            assert not any(i is not None and i.dtype == torch.bool for i in index)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(blocks, "_kind", lambda x: "cuda")
    u, k, reverse = randn(2, 3, 11), randn(3, 33, seed=1), randn(3, 29, seed=2)
    for mode, r in (("causal", reverse), ("same", reverse), ("circular", reverse), ("full", None)):
        out = u.new_empty(2, 3, 43 if mode == "full" else 11)
        grads = [torch.empty_like(t) if t is not None else u.new_empty(0) for t in (u, k, r, *[None] * 4)]
        with Waits():
            blocks.forward(out, u, k, r, None, None, None, None, None, mode, "fft")
            blocks.backward(*grads, torch.ones_like(out), u, k, r, None, None, None, None, None, mode, "fft")


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1.5e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("length", [65_537, 1 << 20])
def test_long_sequences(dtype, bound, length):
    u, k = randn(1, 1, length, dtype=dtype), (randn(1, length, seed=1) / length**0.5).float()
    k = k.double() if dtype == torch.float64 else k
    exact = reference.fft_conv(u.double(), k.double(), method="fft")
    assert error(scalekern.fft_conv(u, k), exact) < bound


@pytest.mark.parametrize("cuts", [[], [1], [3, 3, 4], [0, 20], list(range(1, 30))])
@pytest.mark.parametrize("taps", [1, 4, 50])
def test_chunks_join_to_the_whole(cuts, taps):
    """For every split, outputs, state and gradients are those of one call; one token at a time included."""
    u, k = randn(2, 3, 30).requires_grad_(), randn(3, taps, seed=1).requires_grad_()
    whole = scalekern.fft_conv(u, k)
    state, parts = None, []
    for begin, end in zip([0, *cuts], [*cuts, 30]):
        if end - begin == 1:
            out, state = scalekern.fft_conv_step(u[..., begin], k, state)
            parts.append(out[..., None])
        else:
            out, state = scalekern.fft_conv_chunk(u[..., begin:end], k, state)
            parts.append(out)
    joined = torch.cat(parts, -1)
    assert error(joined, whole) < 1e-13
    history = torch.cat([u.new_zeros(2, 3, taps), u], -1)
    assert torch.equal(state, history[..., history.shape[-1] - (taps - 1) :])
    weights = randn(2, 3, 30, seed=2)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (u, k)) for x in (joined, whole))):
        assert error(a, b) < 1e-13


def test_chunk_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"fft_conv_chunk: state must have shape \(2, 3, 4\), got \(2, 3, 5\)"):
        scalekern.fft_conv_chunk(randn(2, 3, 7), randn(3, 5), randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"fft_conv: k must have at least one tap, got shape \(3, 0\)"):
        scalekern.fft_conv(randn(2, 3, 7), randn(3, 0))
    with pytest.raises(ValueError, match="fft_conv: method must be one of .*, got 'winograd'"):
        scalekern.fft_conv(randn(2, 3, 7), randn(3, 2), method="winograd")
    with pytest.raises(ValueError, match="fft_conv: precision must be one of .*, got 'int8'"):
        scalekern.fft_conv(randn(2, 3, 7), randn(3, 2), precision="int8")


@pytest.mark.parametrize("mask", [torch.tensor([[1, 0, 1, 1, 0, 1]]), torch.tensor([[True, False, True, True, False, True]])])
def test_hidden_tokens_may_be_anything(mask):
    u, k = randn(1, 2, 6), randn(2, 20, seed=1)
    hidden = torch.where(mask.bool()[:, None], u, float("nan")).requires_grad_()
    out = scalekern.fft_conv(hidden, k, mask=mask, method="fft")
    assert error(out, reference.fft_conv(torch.where(mask.bool()[:, None], u, 0), k)) < 1e-13
    (grad,) = torch.autograd.grad(out.sum(), hidden)
    assert torch.isfinite(grad).all() and (grad[:, :, ~mask.bool()[0]] == 0).all()


def test_peak_memory_is_a_block_and_the_outputs():
    """No spectrum of the whole tensor: the largest tensor made inside is a block's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel() * (2 if out.is_complex() else 1))
            return out

    u, k = randn(2, 512, 2048, dtype=torch.float32), randn(512, 2048, seed=1, dtype=torch.float32)
    out = torch.empty_like(u)
    with Largest() as seen:
        blocks.forward(out, u, k, None, None, None, None, None, None, "causal", "fft")
    assert 0 < seen.elements <= 2 * blocks.BLOCK_ELEMENTS["cpu"] + 4096
    assert error(out, reference.fft_conv(u, k, method="fft")) < 1e-6


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mode", ["causal", "circular", "same", "full"])
@pytest.mark.parametrize("length, taps, reverse", [(1, 3, 2), (37, 1, 9), (37, 40, 50), (101, 33, 1), (70, 17, 5)])
def test_sums_and_blocks_equal_the_oracle(mode, length, taps, reverse, per_sample):
    lead = (2, 3) if per_sample else (3,)
    u, k = randn(2, 3, length, dtype=torch.float32), randn(*lead, taps, seed=1, dtype=torch.float32)
    r = None if mode == "full" else randn(*lead, reverse, seed=2, dtype=torch.float32)
    exact = reference.fft_conv(u.double(), k.double(), k_reverse=None if r is None else r.double(), mode=mode)
    for method in ("direct", "toeplitz"):
        assert error(scalekern.fft_conv(u, k, k_reverse=r, mode=mode, method=method), exact) < 1e-6, method
    wide = scalekern.fft_conv(
        u.double(), k.double(), k_reverse=None if r is None else r.double(), mode=mode, method="toeplitz"
    )
    assert error(wide, exact) < 1e-13


@pytest.mark.parametrize("method", ["direct", "toeplitz", "fft"])
def test_what_is_not_finite_reaches_its_taps_only(method):
    u, k = randn(2, 3, 90, dtype=torch.float32), randn(3, 20, seed=1, dtype=torch.float32)
    u[0, 1, 40], u[1, 2, 5] = float("nan"), float("inf")
    assert error(scalekern.fft_conv(u, k, method=method), reference.fft_conv(u.double(), k.double())) < 1e-6


def test_auto_takes_what_was_measured():
    chosen = lambda length, taps, dtype=torch.float32: blocks.chosen(
        "auto", torch.empty(1, 1, length, dtype=dtype), torch.empty(1, taps), None
    )
    assert [chosen(512, 64), chosen(512, 65), chosen(4096, 64), chosen(8192, 32), chosen(8192, 64)] == [
        "direct", "fft", "direct", "direct", "toeplitz",
    ]  # fmt: skip
    assert chosen(8192, 300) == "fft" and chosen(512, 17, torch.float64) == "fft"


@pytest.mark.parametrize("taps", [1, 16, 33, 300])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_blocks_in_pieces(taps, groups, monkeypatch):
    """Filters shorter and longer than a block and than the sequence, a piece for each filter, forward and backward."""
    u, k, dout = randn(3, 6, 97).requires_grad_(), randn(groups, taps, seed=1).requires_grad_(), randn(3, 6, 97, seed=2)
    exact = torch.autograd.grad(reference.toeplitz_conv(u, k), (u, k), dout)
    for elements in (1, 1 << 20):
        monkeypatch.setitem(_toeplitz.ELEMENTS, "cpu", elements)
        out = scalekern.toeplitz_conv(u, k)
        assert error(out, reference.toeplitz_conv(u, k)) < 1e-13
        for a, e in zip(torch.autograd.grad(out, (u, k), dout), exact):
            assert error(a, e) < 1e-13


def test_the_memory_of_blocks_is_bounded():
    blocks_ = _toeplitz.Blocks(128, 2048)
    pieces = _toeplitz.pieces(768, 2, blocks_, torch.device("cpu"))
    each = 2 * 2 * blocks_.blocks * blocks_.size + (blocks_.behind + 1) * blocks_.size**2
    assert sum(p.stop - p.start for p in pieces) == 768 and pieces[-1].stop == 768
    assert max(p.stop - p.start for p in pieces) * each <= _toeplitz.ELEMENTS["cpu"]


# --- spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", testing.samples("fft_conv"), ids=lambda sample: sample.name)
def test_a_spectrum_stands_for_its_filters(sample):
    """Output and every gradient, in every mode and with every option; in the oracle as well."""
    (u, k), kwargs = sample.make(dtype=torch.float64, seed=3)
    kwargs, mode = dict(kwargs), kwargs["mode"]
    r = kwargs.pop("k_reverse", None)
    tensors = [t for t in (u, k, r, *kwargs.values()) if isinstance(t, torch.Tensor)]
    leaves = [t.requires_grad_() for t in tensors if t.dtype.is_floating_point]
    length, reverse_taps = u.shape[2], 1 if r is None else r.shape[-1]
    spectrum = scalekern.fft_conv_spectrum(k, length, mode, k_reverse=r)

    def run(*filters, **more):
        out = scalekern.fft_conv(u, *filters, **kwargs, **more)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    plain = run(k, k_reverse=r, method="fft")
    assert all(error(a, e) < 1e-13 for a, e in zip(run(spectrum), plain))
    assert error(scalekern.fft_conv(u, spectrum, **kwargs, method="direct"), plain[0]) < 1e-12
    in_oracle = reference.fft_conv_spectrum(k, length, mode, k_reverse=r)
    assert error(reference.fft_conv(u, in_oracle, **kwargs), plain[0]) < 1e-12
    with scalekern.backend("reference"):
        assert error(scalekern.fft_conv(u, spectrum, **kwargs), plain[0]) < 1e-12
    size = blocks.ring_of(mode, length, plain[0].shape[2], k.shape[-1], reverse_taps).size
    assert spectrum.values.shape[-1] == size // 2 + 1  # the half


def test_the_values_of_a_spectrum_are_used():
    """A call takes them, forward and backward: with zeros in their place the filter is gone."""
    u, k = randn(2, 3, 40), randn(3, 40, seed=1)
    spectrum = scalekern.fft_conv_spectrum(k, 40)
    empty = dataclasses.replace(spectrum, values=torch.zeros_like(spectrum.values))
    u.requires_grad_()
    out = scalekern.fft_conv(u, empty)
    assert out.norm() == 0 and torch.autograd.grad(out.sum(), u)[0].norm() == 0
    half = scalekern.fft_conv_spectrum(k.float(), 40)
    assert error(scalekern.fft_conv(u.detach().bfloat16(), half), reference.fft_conv(u.detach(), k)) < 1e-2


def test_a_spectrum_that_does_not_fit_is_refused():
    u, k = randn(2, 3, 9, dtype=torch.float32), randn(3, 5, seed=1, dtype=torch.float32)
    spectrum = scalekern.fft_conv_spectrum(k, 9)
    for call, message in (
        (lambda: scalekern.fft_conv(u[..., :8], spectrum), "k must be a spectrum for u's length 8, got one for 9"),
        (lambda: scalekern.fft_conv(u, spectrum, mode="same"), "a spectrum for mode 'same', got one for 'causal'"),
        (lambda: scalekern.fft_conv(u, spectrum, k_reverse=k), "k_reverse must be None beside a spectrum"),
        (lambda: scalekern.fft_conv(u[:, :2], spectrum), r"k must have shape \(2, \*\), got \(3, 5\)"),
        (lambda: scalekern.fft_conv_spectrum(k, 0), "_spectrum: length must be an integer of at least 1, got 0"),
        (lambda: scalekern.fft_conv_spectrum(k, 9, "full", k_reverse=k), "k_reverse must be None in mode 'full'"),
        (lambda: scalekern.fft_conv_spectrum(k[0], 9), "fft_conv_spectrum: k must have 2 or 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="for float64 u, got one for float32 .make it with dtype=torch.float64"):
        scalekern.fft_conv(u.double(), spectrum)
    half = scalekern.fft_conv_spectrum(k, 9, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="a spectrum for float32 u, got one for bfloat16 .make it with dtype=torch.flo"):
        scalekern.fft_conv(u, half)
    with torch.autocast("cpu", torch.bfloat16):  # which makes u narrow enough
        assert torch.equal(scalekern.fft_conv(u, half), scalekern.fft_conv(u.bfloat16(), k))
    with pytest.raises(ValueError, match="fft_conv_spectrum: dtype must be one of None, torch.float64"):
        scalekern.fft_conv_spectrum(k, 9, dtype=torch.int32)
    k.mul_(2)
    with pytest.raises(ValueError, match="made before they were changed"):
        scalekern.fft_conv(u, spectrum)


@pytest.mark.parametrize("K", [1, 5, 33])
@pytest.mark.parametrize("method", ["auto", "fft"])
@pytest.mark.parametrize("mode", ["causal", "same", "circular", "full"])
def test_gradients_of_no_tokens_are_zero(mode, method, K):
    u, k = torch.zeros(2, 3, 0, requires_grad=True), randn(3, K, seed=1, dtype=torch.float32).requires_grad_()
    k_reverse = None if mode == "full" else randn(3, 4, seed=2, dtype=torch.float32).requires_grad_()
    out = scalekern.fft_conv(u, k, mode=mode, method=method, k_reverse=k_reverse)
    out.sum().backward()
    assert u.grad.shape == u.shape and not k.grad.any() and (k_reverse is None or not k_reverse.grad.any())


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "save", "weights"])
def test_a_copied_spectrum_is_as_good_as_the_first(how, written):
    """Copies count the writes to their own filters; what had become stale stays so."""
    u, k = randn(2, 3, 20, dtype=torch.float32), torch.nn.Parameter(randn(3, 20, seed=1, dtype=torch.float32))
    with torch.no_grad():
        for _ in range(3 if written else 0):
            k.mul_(1.5)

    def saved(spectrum):
        file = io.BytesIO()
        torch.save(spectrum, file)
        file.seek(0)
        with torch.serialization.safe_globals([scalekern.fft_conv_spectrum(k, 4).__class__]):
            return torch.load(file, weights_only=how == "weights")

    pickled = lambda spectrum: pickle.loads(pickle.dumps(spectrum))
    again = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": pickled}.get(how, saved)
    spectrum = scalekern.fft_conv_spectrum(k, 20)
    found = again(again(spectrum))
    assert torch.equal(scalekern.fft_conv(u, found), scalekern.fft_conv(u, spectrum))
    stale = []
    for changed in (found, spectrum):
        with torch.no_grad():
            changed.k.mul_(2)
        stale += [changed, again(changed), again(again(changed))]
    with torch.inference_mode():
        stale.append(again(spectrum))
    for each in stale:
        with pytest.raises(ValueError, match="made before they were changed"):
            scalekern.fft_conv(u, each)


def test_a_spectrum_compiles_and_exports():
    u, k = randn(2, 3, 20, dtype=torch.float32), randn(3, 20, seed=1, dtype=torch.float32).requires_grad_()
    spectrum, plain = scalekern.fft_conv_spectrum(k, 20), scalekern.fft_conv(u, k)
    function = lambda u, s: scalekern.fft_conv(u * 1.0, s)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(u, spectrum)
    assert error(compiled, plain) < 1e-6
    assert error(*(torch.autograd.grad(o.square().sum(), k)[0] for o in (compiled, plain))) < 1e-6
    inside = lambda u, k: scalekern.fft_conv(u, scalekern.fft_conv_spectrum(k, 20))
    assert error(torch.compile(inside, fullgraph=True, backend="aot_eager")(u, k), plain) < 1e-6

    class Module(torch.nn.Module):
        def forward(self, u, spectrum):
            return scalekern.fft_conv(u, spectrum)

    program = torch.export.export(Module(), (u, spectrum))
    assert error(program.module()(u, spectrum), plain) < 1e-6
    tensors, kind = torch.utils._pytree.tree_flatten(spectrum)  # as a saved program keeps it
    kind = torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(kind))
    found = torch.utils._pytree.tree_unflatten(tensors, kind)
    assert (found.length, found.mode, found.dtype) == (20, "causal", torch.float32) and found.k is k
    torch.library.opcheck(torch.ops.scalekern.fft_conv_spectrum.default, (k.detach(), None, 20, "causal", k.dtype))
