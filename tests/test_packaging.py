"""Wheel, sdist and editable installs all work; importing has no side effects; missing parts are said, not felt."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest
from conftest import INTERPRET

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests kernels, not packaging")


def python(code, *, cwd, path=None, **environment):
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    if path:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def pip(*args, cwd=ROOT, **environment):
    command = [sys.executable, "-m", "pip", *args]
    run = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


USE = """
import json, pathlib, warnings, torch
warnings.simplefilter("ignore")
import scalekern, scalekern.triton_kernels
x, w = torch.randn(1, 4, 9), torch.randn(4, 3)
out = scalekern.causal_conv1d(x, w)
with scalekern.backend("reference"):
    plain = scalekern.causal_conv1d(x, w)
lib = pathlib.Path(scalekern.__file__).parent / "lib"
print(json.dumps(dict(
    package=scalekern.__file__, kernels=scalekern.triton_kernels.__file__,
    error=float((out - plain).norm() / plain.norm()), build=json.loads((lib / "build.json").read_text()),
    native=(lib / "libscalekern_cpu.so").exists(), loaded=scalekern._native.load("cpu"),
)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, compiled from the objects that the development build left."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder), ".")
    return next(folder.glob("scalekern-*.whl"))


def test_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    run = python(USE, cwd=tmp_path, path=site)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["package"].startswith(str(site)) and seen["kernels"].startswith(str(site))
    assert seen["native"] and seen["loaded"] is None
    assert seen["error"] < 1e-5
    assert not (site / "triton_kernels").exists()  # another project's name
    assert (site / "scalekern" / "triton_kernels" / "__init__.py").exists()


def test_every_package_is_in_the_wheel():
    folders = {p.parent.relative_to(ROOT / "python") for p in (ROOT / "python" / "scalekern").rglob("__init__.py")}
    listed = set(re.findall(r'"(scalekern[a-z_.]*)"', (ROOT / "setup.py").read_text().partition("packages=[")[2]))
    assert {".".join(folder.parts) for folder in folders} <= listed


def test_sdist_builds_without_a_compiler_and_says_so(tmp_path):
    """From the sdist alone, with nothing that could compile: the package works on the reference and knows why."""
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    run = python(code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.partition("/")[2] for n in tar.getnames()}
    for needed in ("setup.py", "csrc/common/isa.h", "triton_kernels/__init__.py", "benchmarks/__init__.py", "LICENSE"):
        assert needed in names, needed
    assert not any(n.endswith(".so") for n in names)
    site = tmp_path / "site"
    pip("install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(site), str(archive),
        cwd=tmp_path, PATH="", CXX="", CUDA_HOME="")  # fmt: skip
    run = python(USE, cwd=tmp_path, path=site)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert not seen["native"] and "was not built" in seen["loaded"]
    assert {seen["build"]["skipped"][kind] for kind in ("cpu", "cuda", "C")} == {"no C++ compiler was found (set CXX)"}
    assert seen["error"] == 0.0


def test_editable_install_is_this_tree(tmp_path):
    run = python(USE, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["package"] == str(ROOT / "python" / "scalekern" / "__init__.py")
    assert seen["kernels"] == str(ROOT / "triton_kernels" / "__init__.py")


def test_import_has_no_side_effects(tmp_path):
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import scalekern; new = set(sys.modules) - before\n"
        "assert not torch.cuda.is_initialized()\n"
        "bad = [m for m in new if m.split('.')[0] in ('triton', 'transformers', 'matplotlib', 'rich', 'numpy')]\n"
        "assert not bad, bad\n"
        "assert not any('triton_kernels' in m or m.endswith('._C') for m in new)\n"
    )
    run = python(code, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_works_without_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, scalekern\n"
        "assert scalekern.causal_conv1d(torch.randn(1, 2, 5), torch.randn(2, 3)).shape == (1, 2, 5)\n"
        "try:\n"
        "    with scalekern.backend('triton'): scalekern.causal_conv1d(torch.randn(1, 2, 5), torch.randn(2, 3))\n"
        "except scalekern.BackendError as e: assert 'triton is not installed' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
    )
    run = python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_works_without_numpy(tmp_path):
    """torch alone is required, and torch does not require it."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, scalekern; from scalekern.masks import causal, window\n"
        "q, k, v = torch.randn(3, 1, 2, 9, 8)\n"
        "assert scalekern.sparse_attention(q, k, v, causal & window(3, 0)).shape == q.shape\n"
        "assert causal.code() is causal.code()\n"
    )
    run = python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_a_forced_backend_that_cannot_run_is_an_error_with_every_reason(tmp_path):
    code = "import torch, scalekern; scalekern.causal_conv1d(torch.randn(1, 2, 5), torch.randn(2, 3))"
    run = python(code, cwd=tmp_path, SCALEKERN_BACKEND="cuda")
    assert "BackendError" in run.stderr and "cuda: " in run.stderr and "cpu: backend 'cuda' was asked for" in run.stderr
    run = python(code, cwd=tmp_path, SCALEKERN_BACKEND="fast")
    assert "SCALEKERN_BACKEND must be one of reference, cpu, triton, cuda, got 'fast'" in run.stderr


def test_a_slow_fallback_warns_once(tmp_path):
    code = (
        "import warnings, torch, scalekern, scalekern._native as n\n"
        "n.load = lambda kind: 'the cpu library was not built'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): scalekern.causal_conv1d(torch.randn(1, 2, 5), torch.randn(2, 3))\n"
        "assert len(seen) == 1 and 'cpu library was not built' in str(seen[0].message), seen\n"
    )
    run = python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
