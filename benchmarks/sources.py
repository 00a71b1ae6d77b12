"""Which files implement an op on a backend, found by following the code, and their digest.

  cpu, cuda   the csrc file that registers the native op, what it includes, and the kernel files of the same backend
              that include one of the family's headers among those
  triton      the module of the launcher and the modules of scalekern that it imports
  reference   the oracle's module likewise
  composed    out of torch's ops: the module of the function and those that it imports, with the native ops that
              they call (`native("op", "cpu")`), which take over parts of them
  a composition (functools.partial of a function and the ops that it calls): the function's module, and those ops'

Comments, docstrings and layout do not count: a comment that quotes a measurement must not make it stale.
"""

import ast
import functools
import hashlib
import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# What a kernel or an oracle is made of; the dispatcher's rails, which change no result and no time, are left out.
FOLLOWED = ("scalekern.reference", "scalekern.triton_kernels", "scalekern._packing", "scalekern.ops._")
# Run CUDA kernels in tests: nothing of them reaches a GPU.
HOST_ONLY = tuple(CSRC / "common" / name for name in ("emulator.h", "emulator_matrix.h"))
# Calls kernels of several families as they are, and has no part in them.
JOINING = (CSRC / "selective_scan" / "cpu_quantized_mamba_update.cpp",)
# How a kernel is launched, and the candidates that `tune` tries: rails too.
NOT_FOLLOWED = ("scalekern.triton_kernels.launch", "scalekern.triton_kernels.tuning")
NATIVE_SUFFIXES = (".cpp", ".cu", ".h", ".cuh")


def digest(backend) -> str | None:
    """Of a scalekern._dispatch.Backend; None when its sources are not on this machine."""
    found = files(backend)
    if not found:
        return None
    total = hashlib.sha256()
    for path in sorted(found):
        total.update(path.name.encode() + b"\0" + _normalized(path, _mtime(path)).encode() + b"\0")
    return total.hexdigest()[:16]


def files(backend) -> set[pathlib.Path]:
    """What implements a backend; empty when there is no such kernel, or no sources here."""
    run = _unwrapped(backend.run)
    if isinstance(run, functools.partial):
        parts = [files(part) for part in _parts(run, backend.name)]
        return _composed(run.func.__module__, backend.name).union(*parts) if all(parts) else set()
    if backend.composed:
        return _composed(getattr(run, "fill_module", run.__module__), backend.name)
    if backend.name in ("cpu", "cuda"):
        op = getattr(run, "native_op", None)
        return _native(op, backend.name) if op else set()
    module = getattr(run, "triton_module", None) if backend.name == "triton" else run.__module__
    return _python(module) if module else set()


def _unwrapped(run):
    while hasattr(run, "__wrapped__"):
        run = run.__wrapped__
    return run


def _parts(composition: functools.partial, name: str) -> list:
    """The backends of this name of the ops that a composition calls."""
    return [b for op in composition.keywords.values() for b in getattr(op, "backends", ()) if b.name == name]


def _composed(module: str, backend: str) -> set[pathlib.Path]:
    found = _python(module)
    calls = (re.findall(rf'native\("(\w+)", "{backend}"\)', _text(path)) for path in found)
    return found.union(*(_native(f"{op}_{backend}", backend) for ops in calls for op in ops))


def _native(op: str, backend: str) -> set[pathlib.Path]:
    units = [p for p in sorted(CSRC.glob("*/*")) if p.suffix in NATIVE_SUFFIXES]
    roots = [p for p in units if re.search(rf'"\s*{re.escape(op)}\(', _text(p))]
    found = _with_includes(roots)
    headers = {p for p in found if p.suffix in (".h", ".cuh") and p.parent.name != "common"}
    own = [p for p in units if p.name.startswith(f"{backend}_") and p.suffix in (".cpp", ".cu") and p not in JOINING]
    kernels = [p for p in own if headers & _with_includes([p])]
    return found | _with_includes(kernels)


def _with_includes(paths) -> set[pathlib.Path]:
    found, open_ = set(), list(paths)
    while open_:
        path = open_.pop()
        if path in found or path in HOST_ONLY or not path.exists():
            continue
        found.add(path)
        for name in _included(path, _mtime(path)):
            open_ += [CSRC / name, path.parent / name]
    return {p.resolve() for p in found}


def _python(module: str) -> set[pathlib.Path]:
    found, open_, seen = set(), [module], set()
    while open_:
        name = open_.pop()
        if name in seen or not name.startswith(FOLLOWED) or name in NOT_FOLLOWED:
            continue
        seen.add(name)
        try:
            spec = importlib.util.find_spec(name)
        except ImportError:  # a name imported from a module, not a module
            continue
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        path = pathlib.Path(spec.origin)
        if path.name == "__init__.py":
            continue  # packages only gather; their modules are followed by name
        found.add(path.resolve())
        open_ += _imported(path, spec.parent, _mtime(path))
    return found


# A report asks for the files of every op, each of which leads through the same few: they are read and parsed once.


def _mtime(path: pathlib.Path) -> int:
    return path.stat().st_mtime_ns


def _text(path: pathlib.Path) -> str:
    return _read(path, _mtime(path))


@functools.cache
def _read(path: pathlib.Path, _mtime: int) -> str:
    return path.read_text()


@functools.cache
def _included(path: pathlib.Path, _mtime: int) -> tuple[str, ...]:
    return tuple(re.findall(r'#include "([^"]+)"', path.read_text()))


@functools.cache
def _imported(path: pathlib.Path, package: str, _mtime: int) -> tuple[str, ...]:
    """What a module of this package imports, and what may be a module among the names that it takes from others."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module
            if node.level:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [base, *(f"{base}.{a.name}" for a in node.names)]
    return tuple(names)


@functools.cache
def _normalized(path: pathlib.Path, _mtime: int) -> str:
    text = path.read_text()
    if path.suffix != ".py":
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        return " ".join(re.sub(r"//[^\n]*", " ", text).split())
    tree = ast.parse(text)
    for node in ast.walk(tree):
        first = (getattr(node, "body", None) or [None])[0] if isinstance(getattr(node, "body", None), list) else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body.pop(0)
    return _outline(tree)


def _outline(node) -> str:
    """A tree as text, the same on every Python: ast.dump shows fields that only some versions have."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(f'{name}={_outline(value)}' for name, value in fields)})"
    return f"[{', '.join(map(_outline, node))}]" if isinstance(node, list) else repr(node)
