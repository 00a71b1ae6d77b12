"""Import shims: code written for the packages below runs on scalekern, on a machine that has none of them.

    import scalekern.compat
    scalekern.compat.install()
    from mamba_ssm import Mamba                     # scalekern.nn.Mamba
    from mamba_ssm import MambaLMHeadModel          # the language model around it: training, generate, checkpoints
    model = transformers.MambaForCausalLM(config)   # an unmodified transformers, on scalekern's ops
    from flashfftconv import FlashFFTConv           # on scalekern.fft_conv
    from fast_hadamard_transform import hadamard_transform  # with a right gradient

`flex_attention` here is torch's, for code that has a BlockMask: it is called by name, nothing is replaced.

`mamba_ssm`, `causal_conv1d`, `flashfftconv`, `fast_hadamard_transform`, and H3's extension
`fftconv`, which carries its src/ops/fftconv.py (that
module is here too, for code that has no such file of its own).

Installed packages of these names are left alone, unless install(force=True). transformers may be imported before or
after; its models serve from the next call on. A function that other code has already taken by
`from mamba_ssm import ...` stays what it was.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys

from scalekern.compat import _flashfftconv, _h3, _hadamard, _mamba_lm, _mamba_parts, _shims, _transformers
from scalekern.compat._flex import flex_attention

__all__ = ["calls", "flex_attention", "install", "installed", "reset_calls", "uninstall"]

VERSIONS = _shims.VERSIONS | _flashfftconv.VERSIONS | _h3.VERSIONS | _hadamard.VERSIONS
MODULES = (
    _shims.MODULES | _mamba_lm.MODULES | _mamba_parts.MODULES | _flashfftconv.MODULES | _h3.MODULES | _hadamard.MODULES
)

_finder: "_Finder | None" = None
_last: "_Finder | None" = None  # asked after everybody else


def install(force: bool = False) -> None:
    """Serve the packages of the module's list from scalekern. A second call changes nothing.

    Args:
        force: shadow a package of that name that is installed, too.
    """
    global _finder, _last
    if _finder is not None:
        if not force or _finder.packages == frozenset(VERSIONS):
            return
        uninstall()
    packages = frozenset(p for p in VERSIONS if force or not _exists(p))
    _finder, _last = _Finder(packages), _Finder(frozenset([_h3.FALLBACK]))
    sys.meta_path.insert(0, _finder)
    sys.meta_path.append(_last)
    _finder.shadowed = _take_modules(packages)
    _transformers.patch(_finder.serves)


def uninstall() -> None:
    """Undo `install`: the imports, the metadata, and what transformers took from the shims."""
    global _finder, _last
    if _finder is None:
        return
    finder, last, _finder, _last = _finder, _last, None, None
    sys.meta_path.remove(finder)
    sys.meta_path.remove(last)
    _take_modules(finder.packages)
    for name in [n for n, m in sys.modules.items() if getattr(m, "__loader__", None) is last]:
        del sys.modules[name]
    sys.modules.update(finder.shadowed)
    _transformers.unpatch()


def installed() -> frozenset[str]:
    """The packages that scalekern serves now."""
    return _finder.packages if _finder is not None else frozenset()


def calls() -> dict[str, int]:
    """How often each function of the shims was called, since the import or `reset_calls`. Calls that run inside a
    compiled graph are not counted."""
    return dict(_shims.calls)


def reset_calls() -> None:
    _shims.calls.clear()


def _exists(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # in sys.modules, without a spec: somebody else's stand-in
        return True


def _take_modules(packages) -> dict:
    """Remove the packages and everything in them from sys.modules; returns what was there."""
    names = [n for n in sys.modules if n.partition(".")[0] in packages]
    return {n: sys.modules.pop(n) for n in names}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and fills the shim modules, answers for their metadata, and patches transformers' mixers as they load."""

    def __init__(self, packages: frozenset[str]):
        self.packages = packages
        self.shadowed: dict = {}

    def serves(self, package: str) -> bool:
        return package in self.packages

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in self.packages and name in MODULES:
            package = any(other.startswith(name + ".") for other in MODULES)
            return importlib.machinery.ModuleSpec(name, self, origin="scalekern.compat", is_package=package)
        if top in self.packages & VERSIONS.keys():
            raise ModuleNotFoundError(f"No module named {name!r}: scalekern.compat serves {top} without it", name=name)
        if _transformers.concerns(name) and self.packages:
            return _transformers.patched_spec(name, path)
        return None

    def exec_module(self, module):
        module.__dict__.update(MODULES[module.__name__])
        for name in MODULES:  # submodules are attributes from the start: callers walk down from the package
            if name.rpartition(".")[0] == module.__name__:
                importlib.import_module(name)

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        wanted = None if context.name is None else context.name.lower().replace("-", "_")
        return [_Distribution(p) for p in sorted(self.packages & VERSIONS.keys()) if wanted in (None, p)]


class _Distribution(importlib.metadata.Distribution):
    """The metadata of a shimmed package, for those who ask importlib.metadata whether it is there."""

    def __init__(self, package: str):
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSIONS[package]}\n"
            "Summary: served by scalekern.compat\n",
            "top_level.txt": package,
        }

    def read_text(self, filename):
        return self._files.get(filename)

    def locate_file(self, path):
        return path
