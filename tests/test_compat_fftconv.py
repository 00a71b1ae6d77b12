"""compat's fftconv, H3's, against matrices of lags in float64: arguments, dtypes, layouts, and where it is found.

Where upstream computes something else than its formula, ours computes the formula, and the test says what upstream does
(files of HazyResearch/H3).
"""

import importlib
import importlib.metadata
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from compat_shims import ABSENT, DEVICES, compare, fftconv_func, randn, shims, upstream  # noqa: F401

from scalekern import compat
from scalekern.testing import assert_close

pytestmark = ABSENT


def by_lags(head_dim=1, gelu=False, dropout_mask=None):
    """The rendering: matrices of lags, every pair of channels of a head at once."""

    def rendering(u, k, D, v=None, q=None, k_rev=None):
        batch, channels, length = u.shape
        lag = torch.arange(length)[:, None] - torch.arange(length)
        long = lambda taps: F.pad(taps, (0, length))[:, :length]
        matrix = torch.where(lag >= 0, long(k)[:, lag.clamp(min=0)], 0)
        if k_rev is not None:
            matrix = matrix + torch.where(lag <= 0, long(k_rev)[:, (-lag).clamp(min=0)], 0)
        u, v, q = (torch.ones_like(u) if t is None else t for t in (u, v, q))
        heads = (batch, channels // head_dim, head_dim)
        x = u.view(*heads, 1, length) * v.view(*heads[:2], 1, head_dim, length)
        y = torch.einsum("gts,bgdes->bgdet", matrix, x) + D[:, None, None, None] * x
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5)) if gelu else y
        if dropout_mask is not None:
            y = y * dropout_mask.cpu().double().view(*heads, 1, 1)
        return (y * q.view(*heads, 1, length)).sum(2).flatten(1, 2)

    return rendering


def h3_case(dtype, device, head_dim=1, length=12, taps=None, vq=False, rev=False, mask=False):
    """(tensors with a gradient, dropout mask): 2 samples, 6 channels, the memory of u, v and q (H, B, L)."""
    io = lambda seed: randn(6, 2, length, seed=seed, dtype=dtype, device=device).transpose(0, 1)
    heads, taps = 6 // head_dim, length if taps is None else taps
    tensors = dict(u=io(0), k=randn(heads, taps, seed=1, device=device), D=randn(heads, seed=2, device=device))
    if vq:
        tensors |= dict(v=io(3), q=io(4))
    if rev:
        tensors |= dict(k_rev=randn(heads, taps, seed=5, device=device))
    return tensors, (randn(2, 6, seed=6, device=device).abs() + 0.1 if mask else None)


H3 = {
    "plain": {},
    "gelu": dict(gelu=True),
    "mask, both ways": dict(mask=True, rev=True),
    "gelu, mask, odd": dict(gelu=True, mask=True, length=13),
    "one token": dict(gelu=True, length=1, rev=True),
    "short filter": dict(taps=5, rev=True),
    "long filter": dict(length=12, taps=21),  # of which 12 taps meet something; upstream has no gradient for it
    "gates": dict(vq=True),
    "gates, all": dict(vq=True, gelu=True, mask=True, rev=True),
    "heads": dict(vq=True, head_dim=3, rev=True),
    "heads, gelu": dict(vq=True, head_dim=2, gelu=True, length=5),
    "one head": dict(vq=True, head_dim=6),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", H3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fftconv_func(case, dtype, device):
    options = dict(H3[case])
    gelu, head_dim = options.pop("gelu", False), options.get("head_dim", 1)
    tensors, mask = h3_case(dtype, device, **options)
    run = lambda **t: fftconv_func(dropout_mask=mask, gelu=gelu, head_dim=head_dim, **t)
    out = compare(run, by_lags(head_dim, gelu, mask), tensors, dtype)
    assert out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("dtype, force, expected", [
    (torch.float64, False, torch.float64), (torch.float32, True, torch.float16), (torch.float16, True, torch.float16),
    (torch.bfloat16, False, torch.bfloat16), (torch.bfloat16, True, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("hbl", [False, True])
def test_fftconv_func_dtypes_and_layouts(dtype, force, expected, hbl):
    """Upstream's positions of the arguments; float16 is not forced on bfloat16 (csrc/fftconv/fftconv.cpp)."""
    tensors, mask = h3_case(dtype, "cpu", vq=True, rev=True, mask=True)

    def run(u, k, D, v, q, k_rev):
        return fftconv_func(u, k, D, mask, True, force, hbl, v, 1, q, False, k_rev)

    out = compare(run, by_lags(1, True, mask), tensors, dtype)
    assert out.dtype == expected
    assert (out.transpose(0, 1) if hbl else out).is_contiguous()


@pytest.mark.parametrize("head_dim", [1, 2])
def test_fftfp16_changes_nothing(head_dim):
    """Under this flag upstream launches no kernel: outputs and gradients are what torch::empty returned
    (csrc/fftconv/fftconv_cuda.cu). The tests' torch.empty is NaN."""
    tensors, _ = h3_case(torch.float16, "cpu", vq=True, head_dim=head_dim)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run(flag):
        out = fftconv_func(**tensors, gelu=False, head_dim=head_dim, fftfp16=flag)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    assert all(torch.equal(a, b) and b.isfinite().all() and b.norm() > 0 for a, b in zip(run(True), run(False)))


@pytest.mark.parametrize("case", ["plain", "gelu, mask, odd", "gates, all", "heads"])
def test_the_extension(case):
    """fftconv_fwd and fftconv_bwd in the hands of an autograd function such as H3's, which works on spectra."""
    options = dict(H3[case])
    gelu, head_dim = options.pop("gelu", False), options.get("head_dim", 1)
    tensors, mask = h3_case(torch.float32, "cpu", **options)
    size, length = 32, tensors["u"].shape[2]
    forward, backward = upstream("fftconv.fftconv_fwd"), upstream("fftconv.fftconv_bwd")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, k, D, v, q, k_rev):
            spectrum = torch.fft.rfft(k, size)
            spectrum = spectrum if k_rev is None else spectrum + torch.fft.rfft(k_rev, size).conj()
            ctx.save_for_backward(u, spectrum, D, v, q, k_rev)
            return forward(u, spectrum, D, v, head_dim, q, mask, gelu, False, False, size, False, True, False)

        @staticmethod
        def backward(ctx, dout):
            u, spectrum, D, v, q, k_rev = ctx.saved_tensors
            du, dk_f, dD, dv, dq = backward(
                dout, u, spectrum, D, v, head_dim, q, mask, gelu, False, False, size, True, False
            )  # fmt: skip
            assert (dv is None) == (v is None) == (dq is None)
            lags = [torch.fft.irfft(f, size, norm="forward")[:, :length] for f in (dk_f, dk_f.conj())]
            return du, lags[0], dD, dv, dq, None if k_rev is None else lags[1]

    def run(u, k, D, v=None, q=None, k_rev=None):
        return Function.apply(u, k, D, v, q, k_rev)

    out = compare(run, by_lags(head_dim, gelu, mask), tensors, torch.float32)
    assert out.transpose(0, 1).is_contiguous()
    assert compat.calls() == {"fftconv_fwd": 1, "fftconv_bwd": 1}


def test_the_extension_gives_half_its_dtypes():
    tensors, _ = h3_case(torch.float16, "cpu", vq=True)
    u, k, D, v, q = tensors.values()
    args = (torch.fft.rfft(k, 32), D, v, 1, q, None, False, False, False, 32)
    out = upstream("fftconv.fftconv_fwd")(u.requires_grad_(), *args, True, False)
    assert out.dtype == torch.float16 and not out.requires_grad
    grads = upstream("fftconv.fftconv_bwd")(out, u, *args, False)
    assert [g.dtype for g in grads] == [torch.float16, torch.complex64, torch.float32, torch.float32, torch.float16]


def test_the_references():
    tensors, mask = h3_case(torch.float32, "cpu", rev=True, mask=True)
    u, k, D, k_rev = tensors.values()
    ref, h3_ref = (upstream(f"src.ops.fftconv.{n}") for n in ("fftconv_ref", "fftconv_h3_ref"))
    expected = by_lags(1, True, mask)(*(t.double() for t in (u, k, D)), k_rev=k_rev.double())
    assert_close(ref(u, k, D, mask, True, k_rev), expected, tolerance=1e-7)  # float64, rounded once
    tensors, _ = h3_case(torch.float32, "cpu", vq=True, head_dim=3, rev=True)
    u, k, D, v, q, k_rev = tensors.values()
    expected = by_lags(3)(*(t.double() for t in (u, k, D, v, q, k_rev)))
    assert_close(h3_ref(u, k, D, q, v, 3, k_rev), expected, tolerance=1e-7)


u_, k_, f_ = torch.zeros(2, 4, 8), torch.zeros(4, 8), torch.zeros(4, 9, dtype=torch.complex64)
ext = lambda f=f_, size=16, inp=False: upstream("fftconv.fftconv_fwd")(
    u_, f, k_[:, 0], None, 1, None, None, True, inp, False, size, False, False, False
)
REFUSED = {
    "fftconv_func: head_dim must divide the 4 channels of u, got 3": lambda: fftconv_func(u_, k_, k_[:, 0], head_dim=3),
    "fftconv_func: v and q must be given for head_dim 2": lambda: fftconv_func(u_, k_[:2], k_[:2, 0], head_dim=2),
    "fftconv_func: v and q must come together, got q alone": lambda: fftconv_func(u_, k_, k_[:, 0], q=u_),
    "fftconv_func: v and q must come together, got v alone": lambda: fftconv_func(u_, k_, k_[:, 0], v=u_),
    "fftconv_func: v must have dtype float32, got float16": lambda: fftconv_func(u_, k_, k_[:, 0], v=u_.half(), q=u_),
    "fftconv_func: k must have at most 9 taps, got 10": lambda: fftconv_func(u_, torch.zeros(4, 10), k_[:, 0]),
    r"fftconv_func: k_rev must have shape \(4, \*\)": lambda: fftconv_func(u_, k_, k_[:, 0], k_rev=k_[:2]),
    r"fftconv_func: D must have shape \(4,\)": lambda: fftconv_func(u_, k_, k_[0]),
    r"fftconv_func: dropout_mask must have shape \(2, 4\)": lambda: fftconv_func(u_, k_, k_[:, 0], k_),
    "fftconv_func: dropout_mask must be None for head_dim 2": lambda: fftconv_func(
        u_, k_[:2], k_[:2, 0], u_[..., 0], v=u_, q=u_, head_dim=2
    ),
    "fftconv_fwd: gelu_inp and gelu_q must be False": lambda: ext(inp=True),
    "fftconv_fwd: fft_size must be even and at least twice the length 8, got 8": lambda: ext(size=8),
    r"fftconv_fwd: filter must have shape \(4, 9\), got \(4, 8\)": lambda: ext(f=f_[:, :8]),
    "fftconv_fwd: filter must have dtype complex64, complex128, got float32": lambda: ext(f=f_.real),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises((ValueError, TypeError), match=message):
        REFUSED[message]()


def test_modules_and_metadata():
    import fftconv
    import flashfftconv
    import flashfftconv.conv
    import flashfftconv.depthwise_1d

    assert flashfftconv.conv.FlashFFTConv is flashfftconv.FlashFFTConv
    assert flashfftconv.depthwise_1d.FlashDepthWiseConv1d is flashfftconv.FlashDepthWiseConv1d
    assert compat.installed() >= {"flashfftconv", "fftconv"}
    for module in (flashfftconv, fftconv):
        assert importlib.metadata.version(module.__name__) == module.__version__
    with pytest.raises(ModuleNotFoundError):
        import flashfftconv.sparse_conv  # noqa: F401
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("src")
    compat.uninstall()
    assert importlib.util.find_spec("fftconv") is None and importlib.util.find_spec("flashfftconv") is None


@pytest.mark.parametrize("theirs", ["nothing", "a package", "the module"])
def test_src_ops_fftconv_is_found_last(theirs, tmp_path, monkeypatch):
    """`src` is the name of many a repository: what lies on the path comes first, and stays when the shims go."""
    if theirs != "nothing":
        (tmp_path / "src" / "ops").mkdir(parents=True)
        (tmp_path / "src" / "models.py").write_text("name = 'theirs'\n")
        if theirs == "the module":
            (tmp_path / "src" / "ops" / "fftconv.py").write_text("from fftconv import fftconv_fwd as fftconv_func\n")
        monkeypatch.syspath_prepend(tmp_path)
    before = [n for n in sys.modules if n.partition(".")[0] == "src"]
    assert not before
    try:
        import src.ops.fftconv

        assert src.ops.fftconv.fftconv_func.__name__ == ("fftconv_fwd" if theirs == "the module" else "fftconv_func")
        if theirs != "nothing":
            assert importlib.import_module("src.models").name == "theirs"
        compat.uninstall()
        assert ("src.ops.fftconv" in sys.modules) == (theirs == "the module")
        assert ("src" in sys.modules) == (theirs != "nothing")
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "src"]:
            del sys.modules[name]
