"""What is particular to the Hadamard ops: the matrices, all sizes, integers bit for bit, NaN and Inf, and the shim."""

import importlib
import sys

import pytest
import torch
from conftest import INTERPRET, at_levels, kernel_places

import scalekern
from scalekern import compat
from scalekern.testing import TOLERANCE, assert_close

oracle = importlib.import_module("scalekern.reference.hadamard_transform")
ORDERS = (12, 20, 28, 40)
SIZES = (1, 2, 7, 8, 12, 24, 40, 64, 128, 160, 300, 1024, 3072) if not INTERPRET else (7, 28, 512)
lower_levels = at_levels("avx512", "avx2", "baseline")  # avx512: without the tiles of bfloat16
compiled_only = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests Triton alone")


def rows(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@compiled_only
@pytest.mark.parametrize("matrices", oracle.MATRICES)
def test_matrices(matrices):
    """H H^T = n I; which are symmetric; and, as text, rows that the packages' own tables have."""
    for m in ORDERS:
        h = oracle.base_matrix(m, matrices).long()
        assert torch.equal(h @ h.T, m * torch.eye(m, dtype=torch.long)) and set(h.unique().tolist()) == {-1, 1}
        assert torch.equal(h, h.T) == ((m, matrices) in ((12, oracle.MATRICES[0]), (28, "quarot")))
    h = oracle.base_matrix(40, matrices)  # the CPU's kernel takes two halves of order 20
    assert torch.equal(h, torch.kron(oracle.sylvester(1), h[:20, :20]).to(h.dtype))
    signs = {m: "".join("-+"[s > 0] for s in oracle.base_matrix(m, matrices)[7].tolist()) for m in ORDERS}
    assert signs[40] == "++++--++-++----+-+-+++++--++-++----+-+-+"
    assert signs[12] == ("+--++---+--+" if matrices == "fast_hadamard_transform" else "+-+++-++-+--")
    if matrices == "fast_hadamard_transform":
        assert signs[20] == "++-++--+---+-+--+++-" and signs[28] == "--++++-+-------++--+++-+--+-"
    for m, k in ((1, 5), (12, 2), (28, 1)):
        n = m << k
        H = torch.kron(oracle.base_matrix(m, matrices), oracle.sylvester(k)).double()
        assert torch.equal(H, oracle.hadamard_matrix(n, matrices=matrices).double())
        x = rows(3, n, dtype=torch.float64)
        assert_close(oracle.hadamard_transform(x, matrices=matrices), x @ H.T, tolerance=1e-15)
        assert_close(oracle.hadamard_transform(x, matrices=matrices, transposed=True), x @ H, tolerance=1e-15)


@compiled_only
def test_which_matrix_a_size_takes():
    wanted = {1: (1, 0), 13: (1, 4), 12: (12, 0), 24: (12, 1), 20: (20, 0), 40: (40, 0), 80: (40, 1), 14336: (28, 9)}
    assert {n: oracle.factor(n, 0) for n in wanted} == wanted
    assert oracle.factor(24, 1) == (1, 5) and oracle.factor(5, 12) == (12, 0) and oracle.factor(100, 28) == (28, 2)


@pytest.mark.parametrize("place", kernel_places())
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@lower_levels
def test_every_size_and_its_integers(dtype, place):
    """The transform against float64; the integers are exactly those of the float32 transform of the same kernel.

    Where x is half precision, a Triton kernel takes x's products as they are and float32's in parts: there the bound is
    the contract's, one step in few places."""
    device, backend = place
    for i, n in enumerate(SIZES):
        x = rows(5, n, seed=i, dtype=dtype).to(device)
        options = {"matrices": oracle.MATRICES[i % 2]}
        with scalekern.backend(backend):
            out = scalekern.hadamard_transform(x, 0.3, transposed=i % 3 == 0, **options)
            y = scalekern.hadamard_transform(x.float(), 0.3, **options)
            q, scales = scalekern.fused_hadamard_quantize(x, 0.3, bits=8 - i % 2 * 4, **options)
        exact = oracle.hadamard_transform(x.double(), 0.3, transposed=i % 3 == 0, **options)
        assert_close(out, exact, tolerance={torch.float32: 5e-7}.get(dtype, TOLERANCE[dtype] / 2), what=f"n = {n}")
        wanted, wanted_scales = oracle.quantize_symmetric(y, 8 - i % 2 * 4, n)
        if backend == "cpu" or dtype == torch.float32:
            assert torch.equal(q, wanted) and torch.equal(scales, wanted_scales), f"n = {n}"
        else:
            scalekern.testing.assert_integers_close(q, wanted, off=0.01)
            assert_close(scales, wanted_scales, tolerance=1e-4)


@pytest.mark.parametrize("place", kernel_places())
def test_rounding_is_half_to_even_and_zeros_stay(place):
    """n = 2 leaves x0 + x1 and x0 - x1: ties by construction."""
    device, backend = place
    y = torch.tensor([[127.0, 0.5], [127.0, 1.5], [127.0, -2.5], [0.0, 0.0], [-127.0, 126.5]], device=device)
    x = torch.stack([y.sum(1), y[:, 0] - y[:, 1]], 1) / 2
    with scalekern.backend(backend):
        q, scales = scalekern.fused_hadamard_quantize(x)
    assert q.tolist() == [[127, 0], [127, 2], [127, -2], [0, 0], [-127, 126]]
    assert scales[:, 0].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("place", kernel_places())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@lower_levels
def test_what_is_not_finite_stays_in_its_row(value, place):
    """Every point of the row is spoiled (an infinity may come as NaN where it is split in parts), and no other row."""
    device, backend = place
    for n in (8, 24, 256, 2048) if not INTERPRET else (24, 256):
        x = rows(4, n, seed=n).to(device)
        expected = oracle.hadamard_transform(x.double())
        x[2, n // 3] = value
        with scalekern.backend(backend):
            out = scalekern.hadamard_transform(x)
            q, scales = scalekern.fused_hadamard_quantize(x)
        assert not out[2].isfinite().any() and not scales[2].isfinite().any() and not q[2].any()
        if backend == "cpu":
            assert torch.equal(out[2].isnan(), oracle.hadamard_transform(x)[2].isnan())
        for row in (0, 1, 3):
            assert_close(out[row], expected[row], tolerance=1e-6)
            assert scales[row].isfinite().all() and q[row].any()


@pytest.mark.parametrize("place", kernel_places())
@lower_levels
def test_layouts_change_no_bit(place):
    """Rows apart, points apart, many axes, a transposed x, an expanded one."""
    device, backend = place
    for n in (4, 12, 48, 100, 512) if not INTERPRET else (48,):
        x = rows(2, 3, 2, n, seed=n).to(device)
        apart = torch.full((4, 3, 3, 2 * n), float("nan"), device=device)[::2, :, 1:, ::2].copy_(x)
        with scalekern.backend(backend):
            calls = [lambda t: (scalekern.hadamard_transform(t, 0.5),), lambda t: scalekern.fused_hadamard_quantize(t)]
            for call in calls:
                wanted = call(x)
                for layout in (apart, x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)):
                    assert all(torch.equal(a, b) for a, b in zip(call(layout), wanted))
                for a, b in zip(call(x[:1, :1, :1].expand(2, 2, 2, n)), call(x[:1, :1, :1])):
                    assert torch.equal(a, b.expand(a.shape))


# n: how many rows, so that some end within a tile, a pass, 32 rows, 2,048 points or a share of 2^17 points, and some at
# such an edge. From 12 to 40 those from the second on end with a whole tile.
ROWS = {1: 37, 2: 37, 4: 37, 8: 37, 16: 8195, 12: 11025, 20: 33, 24: 33, 28: 33, 40: 33, 48: 70, 56: 65, 80: 37,
        96: 5, 112: 47, 160: 33, 192: 12, 224: 10, 320: 33, 32: 37, 64: 2053, 384: 7, 448: 6, 512: 3, 640: 5, 768: 3,
        896: 3, 1024: 131, 1280: 3, 1792: 3, 3584: 2, 7168: 2, 8192: 17, 10240: 2, 12288: 2, 14336: 3, 16384: 2,
        28672: 2}  # fmt: skip


@compiled_only
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@lower_levels
def test_cpu_passes_of_every_length(dtype):
    """Against float64; rows alone, apart and from the second on are the same, bit for bit."""
    tolerance = {torch.float32: 1e-6}.get(dtype, TOLERANCE[dtype] / 2)
    for n, count in ROWS.items():
        x = rows(count, n, seed=n, dtype=dtype)
        with scalekern.backend("cpu"):
            out = scalekern.hadamard_transform(x, n**-0.5)
            assert_close(out, oracle.hadamard_transform(x.double(), n**-0.5), tolerance=tolerance, what=f"n = {n}")
            pitched = torch.full((count, n + 8), float("nan"), dtype=dtype)[:, 8:].copy_(x)
            apart = torch.full((count, 2 * n), float("nan"), dtype=dtype)[:, ::2].copy_(x)
            for layout, same in ((pitched, out), (apart, out), (x[1:], out[1:]), (x[-1:], out[-1:])):
                assert torch.equal(scalekern.hadamard_transform(layout, n**-0.5), same), f"n = {n}"


@compiled_only
@pytest.mark.parametrize("n", [28, 448, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_many_shares_are_rows_alone(n, dtype):
    """Each thread has several shares, the last one short; parts of the rows are too few for threads."""
    count = 700_000 // n
    x = rows(count, n, dtype=dtype)
    with scalekern.backend("cpu"):
        alone = torch.cat([scalekern.hadamard_transform(part) for part in x.split(30_000 // n)])
        assert torch.equal(scalekern.hadamard_transform(x), alone)


@compiled_only
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@lower_levels
def test_halves_that_are_not_finite_stay_in_their_row(dtype):
    """Infinities come as infinities, also where a point is taken in two parts; other rows keep every bit."""
    for n in (12, 24, 56, 64, 96, 112, 224, 448, 640, 896, 1280):
        x = rows(37, n, seed=n, dtype=dtype)
        with scalekern.backend("cpu"):
            others = scalekern.hadamard_transform(x, 0.1)[[i for i in range(37) if i != 5]]
            for value in (float("nan"), float("inf"), -float("inf")):
                x[5, n // 3] = value
                out = scalekern.hadamard_transform(x, 0.1)
                assert torch.equal(out[5].isnan(), oracle.hadamard_transform(x)[5].isnan()), f"n = {n}"
                assert not out[5].isfinite().any() and torch.equal(torch.cat([out[:5], out[6:]]), others), f"n = {n}"


@pytest.mark.skipif(not INTERPRET, reason="the interpreter's process tests Triton")
@pytest.mark.parametrize("dtype, m, k", [(torch.float32, 40, 8), (torch.float64, 12, 9)])
def test_rows_whose_runs_are_short_in_two_launches(dtype, m, k):
    """Too long for one program, and of runs of fewer points than the first launch takes."""
    x = rows(1, m << k, dtype=dtype)
    with scalekern.backend("triton"):
        out = scalekern.hadamard_transform(x, 0.3)
    tolerance = 5e-7 if dtype == torch.float32 else 1e-14
    assert_close(out, oracle.hadamard_transform(x.double(), 0.3), tolerance=tolerance)


@pytest.mark.skipif(not INTERPRET, reason="the interpreter's process tests Triton")
def test_long_rows_in_two_launches(monkeypatch):
    """Runs and then across them; rows of n points that need zeros as well; offsets of 64 bits."""
    kernels = importlib.import_module("scalekern.triton_kernels.hadamard_transform")
    monkeypatch.setattr(kernels, "tile", lambda m, k, size: (1, 16 << (m == 1), 32) if k <= 5 and m == 1 else None)
    monkeypatch.setattr(kernels, "_is_small", lambda x, m, k, group=0: m == 1 and k <= 4)
    monkeypatch.setattr(kernels, "RUN_BITS", {4: 4, 8: 4})
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    for n in (256, 250):
        x = rows(3, n)
        with scalekern.backend("triton"):
            out = scalekern.hadamard_transform(x, 0.5)
        assert_close(out, oracle.hadamard_transform(x.double(), 0.5), tolerance=1e-6)


@compiled_only
@pytest.mark.parametrize(
    "call",
    [
        lambda x: scalekern.hadamard_transform(x, order=16),
        lambda x: scalekern.hadamard_transform(x, matrices="sloane"),
        lambda x: scalekern.hadamard_transform(x, torch.ones(())),
        lambda x: scalekern.hadamard_transform(x, transposed="no"),
        lambda x: scalekern.hadamard_transform(x[0, 0]),
        lambda x: scalekern.hadamard_transform(x.int()),
        lambda x: scalekern.fused_hadamard_quantize(x, bits=9),
        lambda x: scalekern.fused_hadamard_quantize(x, group_size=3),
        lambda x: scalekern.fused_hadamard_quantize(x, group_size=0),
    ],
)
def test_bad_options_are_named(call):
    named = r"^(hadamard_transform|fused_hadamard_quantize): .* must .*, got"
    with pytest.raises((ValueError, TypeError), match=named):
        call(torch.zeros(2, 8))


@compiled_only
@pytest.mark.skipif(importlib.util.find_spec("fast_hadamard_transform") is not None, reason="the package is installed")
def test_fast_hadamard_transform_is_served():
    """Upstream's functions, what they pad included; the backward is right for matrices that are not symmetric, too."""
    compat.install()
    try:
        import fast_hadamard_transform as shim
        from fast_hadamard_transform.fast_hadamard_transform_interface import hadamard_transform_28N

        x = rows(2, 12)
        wanted = torch.nn.functional.pad(x, (0, 4)) @ oracle.sylvester(4).float()
        assert_close(shim.hadamard_transform(x, 0.5), wanted[:, :12] * 0.5, tolerance=1e-6)
        assert_close(shim.hadamard_transform(x, torch.tensor(0.5)), wanted[:, :12] * 0.5, tolerance=1e-6)
        x = rows(2, 56, dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(hadamard_transform_28N(x)[:, 3].sum(), x)
        assert_close(dx, oracle.hadamard_matrix(56)[3].double().expand(2, 56), tolerance=1e-14)
    finally:
        compat.uninstall()
    assert "fast_hadamard_transform" not in sys.modules
