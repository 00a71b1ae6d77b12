"""The sample inputs of the fft_conv family: every oracle takes them in every dtype, within the contract's tolerance."""

import pytest
import torch
from oracles import CASES, ORACLES, bound, cases, differentiable, one_thread, randn, run  # noqa: F401

from scalekern.testing import TOLERANCE, assert_close, upcast
from scalekern.testing import fft_conv as family


def test_every_oracle_has_samples_of_distinct_names():
    assert set(family.SPECS) == set(ORACLES)
    for spec in family.SPECS.values():
        names = [sample.name for sample in spec.samples]
        assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("op, sample", **cases(*family.SPECS))
def test_samples_run_in_every_dtype(op, sample, dtype):
    args, kwargs = sample.make(dtype=dtype)
    again, _ = sample.make(dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(args, again) if isinstance(a, torch.Tensor))
    exact = run(op, [upcast(a) for a in args], {name: upcast(a) for name, a in kwargs.items()})
    for actual, expected in zip(run(op, args, kwargs), exact):
        assert torch.isfinite(expected).all()
        if expected.norm() > 1e-9:  # the details of a single pixel are zero
            assert_close(actual, expected, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("op, sample", **cases(*family.SPECS))
def test_gradients_have_the_dtypes_and_shapes_of_their_inputs(op, sample):
    def narrow(x):
        return x if isinstance(x, torch.Tensor) and x.is_complex() else upcast(x, torch.bfloat16)

    args, kwargs = sample.make(dtype=torch.float32)
    args, kwargs = tuple(narrow(a) for a in args), {name: narrow(a) for name, a in kwargs.items()}
    weights = [randn(*o.shape, seed=i).to(o.dtype) for i, o in enumerate(run(op, args, kwargs))]
    gradients = ORACLES[op][2](weights, bound(op, args, kwargs))
    for (name, x), g in zip(differentiable(op, args, kwargs), gradients):
        if x is not None:
            assert g.dtype == x.dtype and g.numel() == x.numel(), name
            assert g.norm() > 0 or not g.numel(), name


def test_the_options_of_fft_conv_come_present_and_absent():
    options = ("skip", "bias", "pregate", "postgate", "mask", "k_reverse")
    calls = [sample.make() for op, sample in CASES if op == "fft_conv"]
    for mode in ("causal", "circular", "same", "full"):
        here = [(args, kwargs) for args, kwargs in calls if kwargs["mode"] == mode]
        for name in options:
            present = [name in kwargs for _, kwargs in here]
            assert not all(present) and (any(present) or (mode, name) == ("full", "k_reverse")), (mode, name)
        assert {args[1].dim() for args, _ in here} == {2, 3}, mode
        assert any(args[1].shape[-1] > args[0].shape[-1] for args, _ in here), mode
