"""What an unmodified transformers needs beyond importable packages.

transformers decorates the torch form of every kernel function when a modeling module is imported: the decorator looks
for the upstream package once and keeps what it found in a closure. `patch` makes it look again in modules that are
already there. On top, two mixers must not take upstream's fused function in train mode, where it computes something
else than their torch path:

  MambaMixer         it masks the padding after the convolution as well, which the fused function cannot
  FalconMambaMixer   it normalizes the step size before its projection (over R), the fused function after it (over D)
"""

import functools
import importlib.machinery
import sys

MIXERS = {
    "transformers.models.mamba.modeling_mamba": ("MambaMixer", lambda mask: mask is not None),
    "transformers.models.falcon_mamba.modeling_falcon_mamba": ("FalconMambaMixer", lambda mask: True),
}
_CLOSURE = {"applicable_params", "func_name", "implementation", "is_new_implementation", "package", "torch_function"}
_AVAILABILITY = ("is_mamba_ssm_available", "is_mamba_2_ssm_available", "is_causal_conv1d_available")
_packages: set[str] = set()


def patch(serves) -> None:
    """Let transformers' loaded models find the shims of the packages that `serves` says are ours."""
    _packages.update(p for p in ("mamba_ssm", "causal_conv1d") if serves(p))
    _resolve_again()
    for name in MIXERS:
        if name in sys.modules and "mamba_ssm" in _packages:
            _patch_mixer(sys.modules[name])


def unpatch() -> None:
    _resolve_again()
    _packages.clear()
    for name, (mixer, _) in MIXERS.items():
        cls = getattr(sys.modules.get(name), mixer, None)
        original = getattr(getattr(cls, "forward", None), "_scalekern_original", None)
        if original is not None:
            cls.forward = original


def patched_spec(name: str, path):
    """The module's own spec, with a loader that patches the mixer once it has run."""
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None:
        return None
    execute = spec.loader.exec_module

    def exec_module(module):
        execute(module)
        if "mamba_ssm" in _packages:
            _patch_mixer(module)

    spec.loader.exec_module = exec_module  # on this instance only: source, path and caching stay the loader's
    return spec


def _patch_mixer(module) -> None:
    name, unfused = MIXERS[module.__name__]
    cls = getattr(module, name, None)
    if cls is None or hasattr(cls.forward, "_scalekern_original"):
        return
    original = cls.forward

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        if not self.training or cache_params is not None or not unfused(attention_mask):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        # A mixer reads `training` only to choose the fused function.
        self.training = False
        try:
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        finally:
            self.training = True

    forward._scalekern_original = original
    cls.forward = forward


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


def _cells(function) -> dict:
    code = getattr(function, "__code__", None)
    return dict(zip(code.co_freevars, function.__closure__ or ())) if code is not None else {}
