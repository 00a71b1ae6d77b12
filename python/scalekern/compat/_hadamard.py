"""`fast_hadamard_transform` on scalekern: upstream's signatures, what they pad included."""

import scalekern
from scalekern import reference
from scalekern.compat._shims import counted


def _function(name: str, order: int):
    def transform(x, scale=1.0):
        return scalekern.hadamard_transform(x, float(scale), order=order)

    transform.__name__ = transform.__qualname__ = name
    transform.__doc__ = f"x (..., n), padded with zeros to the next {order} 2^k points, times H and scale; n points."
    return counted(name)(transform)


hadamard_transform = _function("hadamard_transform", 1)


def hadamard_transform_ref(x, scale=1.0):
    return reference.hadamard_transform(x, float(scale), order=1)


VERSIONS = {"fast_hadamard_transform": "1.1.0+scalekern"}
MODULES = {
    "fast_hadamard_transform": {
        "__version__": VERSIONS["fast_hadamard_transform"], "hadamard_transform": hadamard_transform,
    },
    "fast_hadamard_transform.fast_hadamard_transform_interface": {
        "hadamard_transform": hadamard_transform, "hadamard_transform_ref": hadamard_transform_ref,
        **{f"hadamard_transform_{m}N": _function(f"hadamard_transform_{m}N", m) for m in (12, 20, 28, 40)},
    },
}  # fmt: skip
