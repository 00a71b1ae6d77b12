"""Every Python example of the README runs when pasted, and the page has its parts in their order."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import INTERPRET

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, not the README")


# torch is imported once (3 of an example's 4 s); each example then has a process of its own.
EACH_IN_A_FORK = """
import json, os, sys, traceback
import torch, scalekern
for number, example in enumerate(json.load(sys.stdin)):
    if not (child := os.fork()):
        status = 1
        with open(f"{number}.txt", "w") as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            try:
                exec(compile(example, f"example {number}", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    with open(f"{number}.status", "w") as out:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=out)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    command = [sys.executable, "-W", "error", "-c", EACH_IN_A_FORK]
    subprocess.run(command, cwd=folder, input=json.dumps(EXAMPLES), text=True, timeout=600, check=True)
    return folder


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs_when_pasted(number, runs):
    printed = (runs / f"{number}.txt").read_text()
    assert (runs / f"{number}.status").read_text() == "0\n", printed
    assert "torch.Size" in printed


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
