"""What an unmodified transformers needs beyond importable packages.

transformers decorates the torch form of every kernel function when a modeling module is imported: the decorator looks
for the upstream package once and keeps what it found in a closure. `patch` makes it look again in modules that are
already there. On top, the two Mamba-1 mixers and the blocks around them run on scalekern's own forward
(integrations.transformers): it decodes a block's token in one op, and in train mode leaves upstream's fused function
where that computes something else than their torch path (MambaMixer masks the padding after the convolution as well,
FalconMambaMixer normalizes the step size before its projection and not after it). Where their caches are not known
(integrations.transformers.unknown), the mixers stay transformers' own and call the shims as they would call upstream's
functions; so do those with an activation or a filter that the ops do not have, for the parts that these leave.
"""

import functools
import importlib.machinery
import sys
import warnings

from scalekern.compat import _shims
from scalekern.ops.causal_conv1d import ACTIVATIONS

MIXERS = {
    "transformers.models.mamba.modeling_mamba": ("MambaMixer", "MambaBlock"),
    "transformers.models.falcon_mamba.modeling_falcon_mamba": ("FalconMambaMixer", "FalconMambaBlock"),
}
_CLOSURE = {"applicable_params", "func_name", "implementation", "is_new_implementation", "package", "torch_function"}
# In train mode transformers' own mixers offer upstream's fused functions their whole block. These do not mask the
# padding after the convolution, as the separate steps do, and Mamba-1's is told no activation and takes silu: for those
# mixers they stay the torch form, which declines.
_FUSED = ("mamba_split_conv1d_scan_combined", "mamba_inner_fn")
_AVAILABILITY = ("is_mamba_ssm_available", "is_mamba_2_ssm_available", "is_causal_conv1d_available")
_packages: set[str] = set()


def patch(serves) -> None:
    """Let transformers' loaded models find the shims of the packages that `serves` says are ours."""
    _packages.update(p for p in ("mamba_ssm", "causal_conv1d") if serves(p))
    _resolve_again()
    for name in MIXERS:
        if name in sys.modules and "mamba_ssm" in _packages:
            _patch_classes(sys.modules[name])


def unpatch() -> None:
    _resolve_again()
    _packages.clear()
    _warn_once.cache_clear()
    for name, classes in MIXERS.items():
        for cls in filter(None, (getattr(sys.modules.get(name), c, None) for c in classes)):
            cls.forward = getattr(cls.forward, "_scalekern_original", cls.forward)


def concerns(name: str) -> bool:
    """Whether a module of this name may have something to patch once it has run."""
    return name.startswith("transformers.models.") and ".modeling_" in name


def patched_spec(name: str, path):
    """The module's own spec, with a loader that patches the mixers once it has run."""
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None:
        return None
    execute = spec.loader.exec_module

    def exec_module(module):
        execute(module)
        if "mamba_ssm" in _packages:
            if module.__name__ in MIXERS:
                _patch_classes(module)
            for function in list(vars(module).values()):
                _decline(function)

    spec.loader.exec_module = exec_module  # on this instance only: source, path and caching stay the loader's
    return spec


def _patch_classes(module) -> None:
    from scalekern.integrations import transformers

    classes = [getattr(module, name, None) for name in MIXERS[module.__name__]]
    if any(cls is None or transformers.unknown(cls) for cls in classes):
        return _warn_once()
    for cls, replace in zip(classes, (transformers.mixer_class_forward, transformers.block_forward)):
        if not hasattr(cls.forward, "_scalekern_original"):
            cls.forward = replace(cls.forward)


@functools.cache
def _warn_once() -> None:
    """An error here would break the import of transformers."""
    import transformers

    from scalekern.integrations.transformers import KNOWN

    warnings.warn(
        f"scalekern.compat does not know the Mamba layers of transformers {transformers.__version__}: they keep their "
        "own forward, which takes single functions of mamba_ssm and causal_conv1d from scalekern at best, and none for "
        f"a whole token. Upgrade scalekern, or install transformers {KNOWN}.",
        stacklevel=2,
    )


def _resolve_again() -> None:
    """Run the decorator again for every kernel function of the shimmed packages, into the closure that is in use."""
    checks = sys.modules.get("transformers.utils.import_utils")
    for name in _AVAILABILITY:
        getattr(getattr(checks, name, None), "cache_clear", lambda: None)()  # they remember their first answer
    hub_kernels = sys.modules.get("transformers.integrations.hub_kernels")
    decorate = getattr(hub_kernels, "use_kernel_func_from_hub_with_fallback", None)
    if decorate is None:
        return
    models = [m for n, m in sys.modules.items() if n.startswith("transformers.models.") and m is not None]
    functions = {id(f): f for m in models for f in list(vars(m).values()) if _CLOSURE <= set(_cells(f))}
    for function in functions.values():
        cells = _cells(function)
        if cells["package"].cell_contents not in _packages:
            continue
        fresh = _cells(decorate(cells["func_name"].cell_contents, cells["package"].cell_contents)(
            cells["torch_function"].cell_contents
        ))  # fmt: skip
        for name in ("implementation", "applicable_params", "is_new_implementation"):
            cells[name].cell_contents = fresh[name].cell_contents
        _decline(function)


def _decline(function) -> None:
    """Leave to the torch form of a kernel function what the shim would compute otherwise, or not at all."""
    cells = _cells(function)
    if not (_CLOSURE <= set(cells) and _packages):
        return
    name, shim, own = (cells[n].cell_contents for n in ("func_name", "implementation", "torch_function"))
    if name in _FUSED:
        cells["implementation"].cell_contents = own
    elif name in _CONVOLUTIONS and shim is getattr(_shims, name):
        cells["implementation"].cell_contents = _CONVOLUTIONS[name](shim, own)


def _serves(weight, activation) -> bool:
    return activation in ACTIVATIONS and 2 <= weight.shape[-1] <= 8


def _sequence(shim, own):
    def causal_conv1d_fn(x, weight, bias=None, activation=None, **kwargs):
        # Packed sequences go to the shim, to be refused: the torch form would not keep them apart.
        serves = _serves(weight, activation) or kwargs.get("seq_idx") is not None
        return (shim if serves else own)(x, weight, bias, activation=activation, **kwargs)

    return causal_conv1d_fn


def _step(shim, own):
    def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, **kwargs):
        return (shim if _serves(weight, activation) else own)(x, conv_state, weight, bias, activation, **kwargs)

    return causal_conv1d_update


_CONVOLUTIONS = {"causal_conv1d_fn": _sequence, "causal_conv1d_update": _step}


def _cells(function) -> dict:
    code = getattr(function, "__code__", None)
    return dict(zip(code.co_freevars, function.__closure__ or ())) if code is not None else {}
