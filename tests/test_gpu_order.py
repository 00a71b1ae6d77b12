"""What a machine with a GPU runs first, and what it does when the time is up."""

import os
import pathlib
import subprocess
import sys

import pytest
from conftest import INTERPRET, child_environment

from scalekern.benchmarks import gpu_suite

pytestmark = pytest.mark.skipif(INTERPRET, reason="no GPU is concerned")

TESTS = """
import pytest

@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32"])
def test_strides_change_nothing(dtype): pass

def test_of_an_op(): pass

def test_a_defect_of_a_kernel_would_be_seen(): pass

@pytest.mark.parametrize("dtype", ["torch.float16", "torch.bfloat16"])
def test_forward_agrees_with_the_oracle(dtype): pass

def test_nan_and_inf_travel_as_in_the_oracle():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def run(tmp_path, **environment):
    (tmp_path / "test_them.py").write_text(TESTS)
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "gpu_order", "-p", "no:cacheprovider", "test_them.py"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=child_environment(PYTHONPATH=path, **environment))  # fmt: skip


def test_the_most_telling_first(tmp_path):
    done = run(tmp_path)
    order = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("test_them.py::")]
    assert order == [
        "test_forward_agrees_with_the_oracle[torch.bfloat16]", "test_of_an_op",
        "test_strides_change_nothing[torch.float32]", "test_nan_and_inf_travel_as_in_the_oracle",
        "test_a_defect_of_a_kernel_would_be_seen", "test_forward_agrees_with_the_oracle[torch.float16]",
        "test_strides_change_nothing[torch.float64]",
    ]  # fmt: skip
    assert "6 passed" in done.stdout and "1 failed" in done.stdout


def test_what_is_not_reached_says_so(tmp_path):
    done = run(tmp_path, SCALEKERN_TEST_SECONDS=0)
    assert "7 skipped" in done.stdout and gpu_suite.unreached(done.stdout) == 7
    assert gpu_suite.unreached(run(tmp_path).stdout) == 0


def test_a_broken_context_ends_its_worker(tmp_path):
    done = run(tmp_path, PYTEST_XDIST_WORKER="gw0")
    assert done.returncode == 1 and "test_nan_and_inf" in done.stdout and "passed" not in done.stdout
