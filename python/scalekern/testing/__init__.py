"""What the tests, the doctor and a new backend need: sample inputs of every op, tolerances, assert_close.

    for sample in samples("selective_scan"):
        args, kwargs = sample.make(device="cpu", dtype=torch.bfloat16)
        out = scalekern.selective_scan(*args, **kwargs)

A family's samples are in the module of its name; a new op adds its list there and is tested by test_contract*.py.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable

import torch

# Relative L2 error against the float64 oracle that no kernel may exceed, by the dtype of its inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One named set of inputs. make(device, dtype, seed) returns (args, kwargs) of the public function."""

    name: str
    build: Callable

    def make(self, device="cpu", dtype=torch.float32, seed=0):
        generator = torch.Generator("cpu").manual_seed(seed)
        args, kwargs = self.build(Factory(generator, device, dtype))
        return args, kwargs


class Factory:
    """Random tensors of a sample: `io` in the sample's dtype, `param` in float32 (float64 for float64)."""

    def __init__(self, generator, device, dtype):
        self.generator, self.device, self.dtype = generator, device, dtype
        self.param_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def io(self, *shape, scale=1.0):
        return self._randn(shape, scale).to(self.dtype).to(self.device)

    def param(self, *shape, scale=1.0):
        return self._randn(shape, scale).to(self.param_dtype).to(self.device)

    def positive(self, *shape, low=0.2, high=1.2):
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return (low + (high - low) * uniform).to(self.param_dtype).to(self.device)

    def complex(self, *shape, scale=1.0):
        return torch.complex(self.param(*shape, scale=scale), self.param(*shape, scale=scale))

    def integers(self, values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=self.device)

    def codes(self, *shape):
        return torch.randint(-128, 128, shape, generator=self.generator, dtype=torch.int8).to(self.device)

    def _randn(self, shape, scale):
        # A scale of its own for every slice of the first two axes, so that a permuted channel or group is seen.
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") * scale
        for axis in range(min(2, len(shape))):
            lead = 0.5 + torch.rand(shape[axis], generator=self.generator, dtype=torch.float64, device="cpu")
            x = x * lead.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return x


@dataclasses.dataclass(frozen=True)
class Spec:
    """A public op as the contract sees it.

    inplace          positions of the arguments that it changes (then: no gradient)
    inference        a decoding step: it changes nothing, and has no gradient either
    gradient_factor  times TOLERANCE for gradients, which pass through twice the rounded values of the forward; a
                     composition, which rounds between its parts as they do when called one by one, has more
    dense_oracle     the oracle is a product with matrices, in which a NaN reaches every output
    operand_error    what a Triton kernel adds to the rounding of half-precision inputs and outputs, since it multiplies
                     intermediate results in half precision too
    rounding_of_saved  what a gradient adds in half precision since it reads the rounded output of the forward, in units
                     of the dtype's eps
    parameters_only  autocast leaves the op alone: it reads a model's parameters and no activations, or is no product
    reorders         sums run in another order than the oracle's: of what is not finite, Inf or NaN may arrive
    free_rank        the first argument has any number of axes before the last
    grows_by_rows    a compiled function is called for more rows; without it, for a longer last axis
    straight_through   names of samples whose gradient is none of the function, but passes by a rounding
    linear           the op is linear in its one tensor, and its own backward: gradients of every order work
    integers_off     of an integer output, the share that may be off by one: where a value is a half of a step away from
                     two integers, the last bit of a float decides, and kernels add in orders of their own
    through          the public op whose registered ops do its work, if it has none of its own
    """

    samples: tuple[Sample, ...]
    inplace: tuple[int, ...] = ()
    inference: bool = False
    gradient_factor: float = 2
    dense_oracle: bool = False
    operand_error: float = 0.0
    rounding_of_saved: float = 0.0
    parameters_only: bool = False
    reorders: bool = False
    free_rank: bool = False
    grows_by_rows: bool = False
    straight_through: tuple[str, ...] = ()
    linear: bool = False
    integers_off: float = 0.0
    through: str = ""

    @property
    def trainable(self) -> bool:
        return not (self.inplace or self.inference)


def specs() -> dict[str, Spec]:
    """Every public op. Samples may be here before their op is."""
    import scalekern  # noqa: F401 (defines the ops)
    from scalekern import _library

    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    families = {op: spec for module in modules for op, spec in module.SPECS.items()}
    registered = {o.public for o in _library.OPS.values()} | set(_library.OPS)
    return {op: spec for op, spec in families.items() if (spec.through or op) in registered}


def samples(op: str) -> tuple[Sample, ...]:
    return specs()[op].samples


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error, normalized by the expected value's norm. NaN and Inf must lie in the same places."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, e = actual.detach().to("cpu", wide), expected.detach().to("cpu", wide)
    special = ~torch.isfinite(torch.view_as_real(e) if e.is_complex() else e)
    specials = torch.view_as_real(a) if a.is_complex() else a
    wanted = torch.view_as_real(e) if e.is_complex() else e
    if not torch.equal(~torch.isfinite(specials), special):
        return float("inf")
    if not torch.equal(specials[special].isnan(), wanted[special].isnan()):
        return float("inf")
    a, e = specials.masked_fill(special, 0), wanted.masked_fill(special, 0)
    norm = e.norm().item()
    difference = (a - e).norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def assert_close(actual, expected, *, tolerance: float, what: str = "output") -> None:
    """Fails with the error and the place where the two part most."""
    value = error(actual, expected)
    if value <= tolerance:
        return
    gap = (actual.detach().cpu().to(expected.dtype) - expected.detach().cpu()).abs().nan_to_num(float("inf"))
    place = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)) if gap.numel() else ()
    raise AssertionError(
        f"{what}: relative L2 error {value:.2e} is above {tolerance:.1e}; worst at {place}: "
        f"{actual[place].item() if gap.numel() else None} instead of {expected[place].item() if gap.numel() else None}"
    )


def assert_integers_close(actual, expected, *, off: float, what: str = "output") -> None:
    """Integers within one of each other, at most the share `off` of them (and one more) not equal."""
    gap = (actual.detach().cpu().long() - expected.detach().cpu().long()).abs()
    wrong = int((gap > 0).sum())
    assert int(gap.amax()) <= 1 if gap.numel() else True, f"{what}: integers are off by {int(gap.amax())}"
    assert wrong <= 1 + off * gap.numel(), f"{what}: {wrong} of {gap.numel()} integers are off by one"


def upcast(value, dtype=torch.float64):
    """The same argument in float64 / complex128, for the oracle; integers and None stay."""
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.detach().to(dtype.to_complex() if value.is_complex() else dtype)
