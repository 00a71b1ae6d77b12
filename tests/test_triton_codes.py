"""Triton kernels that read or write codes, with 64-bit offsets: the same bits as with 32-bit ones.

quant_matmul's and the Hadamard transform's are forced to them in their own tests.
"""

import pytest
import torch
from conftest import INTERPRET
from contract import as_tuple, forward

import scalekern
from scalekern import testing
from scalekern.quant import QuantizedKV

pytestmark = pytest.mark.skipif(not INTERPRET, reason="what a forced offset changes is seen in the interpreter")
OPS = (
    "quantize_kv", "quantize_kv_update", "sparse_attention_decode", "quantized_selective_scan",
    "quantized_state_update",
)  # fmt: skip
CASES = [
    pytest.param(op, sample, id=f"{op}-{sample.name}")
    for op in OPS
    for sample in testing.samples(op)
    if op != "sparse_attention_decode" or isinstance(sample.make()[0][1], QuantizedKV)
]


@pytest.mark.parametrize("op, sample", CASES)
def test_64_bit_offsets_change_no_bit(op, sample, monkeypatch):
    runs = []
    for forced in ("0", "1"):
        monkeypatch.setenv("SCALEKERN_FORCE_INT64", forced)
        with scalekern.backend("triton"):
            outputs = forward(getattr(scalekern, op), op, *sample.make())
        runs.append([t for out in outputs for t in as_tuple(out)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
