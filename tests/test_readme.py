"""Every Python example of the README runs when pasted, and the page has its parts in their order."""

import pathlib
import re
import subprocess
import sys

import pytest
from conftest import INTERPRET

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, not the README")


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example{i}" for i in range(len(EXAMPLES))])
def test_example_runs_when_pasted(example, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "torch.Size" in run.stdout


def test_parts_are_in_order():
    parts = [
        "# scalekern",
        "make demo",
        "make test",
        "## Examples",
        "## What is supported",
        "## Measured",
        "## Limits",
        "## Papers",
    ]
    places = [README.index(part) for part in parts]
    assert places == sorted(places)
