"""Where this suite runs its tests: on a machine with a GPU, those written for any backend run there too."""

import pytest
import test_selective_scan
import torch
from conftest import INTERPRET, places, tensors_on
from test_causal_conv1d import conv_inputs, update_inputs
from test_selective_state_update import inputs

from scalekern import _dispatch, testing


@pytest.mark.skipif(INTERPRET, reason="the interpreter's process has one place")
def test_a_gpu_adds_its_kernels_with_their_mark(monkeypatch):
    before = [place.values[0] for place in places()]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_dispatch, "unavailable", lambda name, device: None)
    added = [place for place in places() if place.values[0] not in before]
    assert [place.values[0] for place in added] == [("cuda", "cuda"), ("cuda", "triton")]
    assert all([mark.name for mark in place.marks] == ["gpu"] for place in added)


def tensors_in(value):
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    found = [value] if isinstance(value, torch.Tensor) else []
    return found + [t for v in values for t in tensors_in(v)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: conv_inputs(1, cu=[0, 7, 20], initial=True, layout="holes"),
        lambda: conv_inputs(1, L=3, seq=[[0, 1, -1]], layout="channels_last"),
        lambda: update_inputs(layout="holes"),
        lambda: inputs(layout="holes"),
        lambda: test_selective_scan.Case((1, 3, 9, 2), bounds=(0, 4, 9), layout="none").make(),
        lambda: test_selective_scan.Case((1, 3, 9, 2), complex=True, B="c").make(),
        lambda: testing.samples("selective_scan")[1].make(device=torch.get_default_device()),
    ],
)
def test_their_tensors_follow_the_device(make):
    """Shown with the device that every machine has beside its CPU."""
    with tensors_on("meta"):
        made = tensors_in(make())
    assert len(made) >= 3 and {t.device.type for t in made} == {"meta"}
    assert {t.device.type for t in tensors_in(make())} == {"cpu"}
