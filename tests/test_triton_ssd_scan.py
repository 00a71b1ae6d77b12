"""The Triton kernels of ssd_scan, run by Triton's interpreter on CPU tensors, against the float64 oracle.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton, like tests/test_triton_interpret.py. The
samples of the contract run beside these, in float32 and without segments.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import scalekern  # noqa: E402
from scalekern import reference  # noqa: E402
from scalekern.testing import error  # noqa: E402
from scalekern.triton_kernels import ssd_device, ssd_scan, ssd_scan_bwd, ssd_scan_states  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOLERANCE = {F64: (1e-13, 1e-12), F32: (1e-6, 3e-6), F16: (1e-3, 2e-3), BF16: (6e-3, 1e-2)}  # outputs, gradients


def case(B, L, H, P, N, G, *, dtype=F32, gate=False, D=1, cu=None, seq_idx=None, states=None, seed=0, **options):
    """(tensors, options): each head and token of its own size, so that permuted ones are seen."""
    g = torch.Generator().manual_seed(seed)

    def own(*shape):
        numbers = torch.randn(shape, generator=g, dtype=F64)
        return numbers * torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=g, dtype=F64).add(0.5)

    real = F64 if dtype == F64 else F32
    tensors = dict(
        x=own(B, L, H, P).to(dtype), dt=own(B, L, H).sub(1).to(dtype), A=-own(H).abs().to(real),
        B=own(B, L, G, N).to(dtype), C=own(B, L, G, N).to(dtype), D=own(*(H, P)[:D]).to(real), dt_bias=own(H).to(real),
    )  # fmt: skip
    if gate:
        tensors["z"] = own(B, L, H, P).to(dtype)
    if states:
        tensors["initial_states"] = own(states, H, P, N).to(real)
    options |= dict(dt_softplus=True, return_final_states=True)
    if cu:
        options |= dict(cu_seqlens=torch.tensor(cu), return_varlen_states=True)
    if seq_idx:
        options["seq_idx"] = torch.tensor(seq_idx)
    return tensors, options


def run(function, tensors, options):
    """(outputs, gradients of a random projection of all of them)"""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    outputs, total = function(**leaves, **options), 0
    for i, out in enumerate(outputs):
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(i), dtype=F64)
        total = total + (out.double() * weight).sum()
    return outputs, dict(zip(leaves, torch.autograd.grad(total, leaves.values())))


def kernels(tensors, options):
    with scalekern.backend("triton"):
        return run(scalekern.ssd_scan, tensors, options)


def check(tensors, options):
    allowed, allowed_gradient = TOLERANCE[tensors["x"].dtype]
    expected, wanted = run(reference.ssd_scan, {k: v.double() for k, v in tensors.items()}, options)
    outputs, gradients = kernels(tensors, options)
    for i, (found, exact) in enumerate(zip(outputs, expected, strict=True)):
        assert (e := error(found, exact)) <= allowed, f"output {i}: relative error {e:.2e}"
    for name, exact in wanted.items():
        assert (e := error(gradients[name], exact)) <= allowed_gradient, f"gradient of {name}: relative error {e:.2e}"


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 32 tokens, which a layer of 264 heads has not."""
    monkeypatch.setattr(ssd_device, "LEAST_SEGMENT", 32)


@pytest.mark.parametrize("dtype", (BF16, F16, F64), ids=str)
def test_dtypes(dtype):
    """Beyond a chunk of 64 (16 in float64), with every option; the contract's samples are float32."""
    check(*case(1, 70 if dtype != F64 else 20, 2, 5, 6, 2, dtype=dtype, gate=True, D=2, states=1, dt_limit=(0.1, 1.5)))


def test_segments(short_segments):
    """States of three segments are joined, both ways; the boundaries lie in a segment, on its edge and in the last."""
    runs = [[0] * 32 + [1] * 8 + [2] * 50, [0] * 70 + [1] * 20]
    check(*case(2, 90, 2, 3, 4, 1, seq_idx=runs, states=2))


def test_packed_segments(short_segments):
    """Sequences that begin with a segment, within and over several, empty ones at both ends; one state for all."""
    check(*case(1, 100, 2, 3, 4, 2, cu=[0, 0, 32, 32, 97, 100, 100], states=1, gate=True))


def test_blocks_of_p_and_parts_of_heads(monkeypatch):
    """P in two blocks; 17 heads of one group in three parts, whose dB and dC are added."""
    small = lambda *_: {"Q": 16, "BLOCK_P": 16, "num_warps": 4}  # noqa: E731
    for module in (ssd_scan, ssd_scan_bwd):
        monkeypatch.setattr(module, "default_blocks", small)
    assert ssd_scan_bwd._parts(132, 2, 17) == (3, 6)
    check(*case(1, 18, 17, 3, 4, 1))
    check(*case(1, 18, 1, 18, 20, 1, gate=True, D=2))


def test_a_strong_decay_leaves_weak_ones_exact():
    """d A of -90 and -120 among -1e-3: no NaN, and the weak ones keep their digits."""
    tensors, options = case(1, 70, 1, 3, 4, 1)
    options["dt_softplus"] = False
    tensors["dt"].fill_(1e-3)[:, ::7] = 90.0
    tensors["dt"][:, 40:50] = 120.0
    tensors["A"].fill_(-1.0)
    tensors["dt_bias"].zero_()
    check(tensors, options)


def test_nan_reaches_later_tokens_of_its_sequence_alone(short_segments):
    """It comes up in the first segment's chunk, and ends with a boundary in the second."""
    tensors, options = case(1, 70, 1, 3, 4, 1, seq_idx=[[0] * 40 + [1] * 30])
    tensors["x"][0, 10, 0, 1] = float("nan")
    expected = reference.ssd_scan(**{k: v.double() for k, v in tensors.items()}, **options)
    with scalekern.backend("triton"):
        outputs = scalekern.ssd_scan(**tensors, **options)
    assert expected[0][0, 10:40, 0, 1].isnan().all() and expected[0].isnan().sum() == 30
    for found, exact in zip(outputs, expected):
        assert error(found, exact) <= 1e-6


def test_repeatable_strided_and_64_bit_offsets(monkeypatch):
    tensors, options = case(1, 34, 2, 3, 4, 1, gate=True, states=1)
    outputs, gradients = kernels(tensors, options)
    spread = {k: v.unsqueeze(-1).expand(*v.shape, 2).contiguous()[..., 0] for k, v in tensors.items()}
    spread["x"] = tensors["x"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    found, again = kernels(spread, options)
    assert all(torch.equal(a, b) for a, b in zip((*outputs, *gradients.values()), (*found, *again.values())))


def test_the_check_can_fail():
    """A zeroed output, tokens shifted, another size."""
    tensors, options = case(1, 20, 2, 3, 4, 1)
    with scalekern.backend("triton"):
        out = scalekern.ssd_scan(**tensors, **options)[0]
    exact = reference.ssd_scan(**{k: v.double() for k, v in tensors.items()}, **options)[0]
    assert error(out, exact) <= TOLERANCE[F32][0]
    for spoiled in (torch.zeros_like(out), out.roll(1, 1), out * 1.05):
        assert error(spoiled, exact) > TOLERANCE[BF16][0]


def test_a_state_that_the_next_segment_does_not_get_is_seen(short_segments, monkeypatch):
    real = ssd_scan_states.totals_of
    monkeypatch.setattr(ssd_scan, "totals_of", lambda totals: dict.fromkeys(real(totals)))
    with pytest.raises(AssertionError, match="output 0: relative error"):
        check(*case(1, 70, 1, 3, 4, 1))
