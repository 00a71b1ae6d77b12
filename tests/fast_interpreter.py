"""Triton's interpreter less the bookkeeping that it repeats at every operation; what kernels compute stays the same.

Imported once by conftest.py, where TRITON_INTERPRET=1. The kernels of selective_scan take half the time.
"""

import builtins

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def _call():
    """InterpretedFunction.__call__ patches triton.language again at every call, four fifths of its time.

    The launch around it has already patched what our kernels see; Triton's own device functions (tl.sum) see another
    module, whose patch lasts, so that once is enough.
    """
    patched = set()

    def call(self, *args, **kwargs):
        seen = id(self.fn.__globals__)
        if seen not in patched and self.fn.__module__.startswith("triton."):
            interpreter._patch_lang(self.fn)
            patched.add(seen)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _numpy_types():
    """_get_np_dtype builds a table of all types at every call."""
    original, found = interpreter._get_np_dtype, {}

    def numpy_type(kind):
        element = kind.element_ty if isinstance(kind, core.block_type) else kind
        if element.name not in found:
            found[element.name] = original(element)
        return found[element.name]

    interpreter._get_np_dtype = numpy_type


def _types_of_blocks():
    """The same few types of blocks, and the shapes of tensors of them, are checked, wrapped and named every time."""
    original, found = core.block_type.__init__, {}
    scalar = core.tuple([]), core.constexpr(1)

    def block_type(self, element_ty, shape):
        if type(shape) is builtins.tuple:  # refused
            original(self, element_ty, shape)
        pointer = getattr(element_ty, "address_space", None), getattr(element_ty, "const", None)
        key = element_ty.name, pointer, *(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if key not in found:
            original(self, element_ty, shape)
            self.of_tensors = core.tuple([core.constexpr(s) for s in self.shape]), core.constexpr(self.numel)
            found[key] = dict(self.__dict__)
        self.__dict__ = dict(found[key])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else scalar

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _broadcasts():
    """Most operands have one shape: nothing to do, found out without wrapping both in two lists."""
    original = TritonSemantic.broadcast_impl_value

    def broadcast(self, lhs, rhs):
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast


def _scans():
    """generic_scan calls the combining function for every element; here once a step, for all of it side by side."""

    def generic_scan(self, input):
        given = [np.moveaxis(arg.handle.data, self.axis, 0) for arg in input]
        found = [np.empty_like(data) for data in given]

        def wrap(step):
            return tuple(self.to_tensor(data[step], arg.dtype) for data, arg in zip(given, input))

        state = wrap(0)
        for step in range(len(given[0])):
            state = self.combine_fn.fn(*state, *wrap(step)) if step else state
            for data, part in zip(found, state):
                data[step] = part.handle.data
        return [self.to_tensor(np.moveaxis(data, 0, self.axis), arg.dtype) for data, arg in zip(found, input)]

    interpreter.ScanOps.generic_scan = generic_scan


_call()
_numpy_types()
_types_of_blocks()
_broadcasts()
_scans()
# Every sum of integers is computed again in int64 for an assertion that Triton drops without debug=True.
assert not interpreter.interpreter_builder.options.debug
object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
