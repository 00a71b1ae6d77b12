"""Masks under torch.compile: a graph holds a mask's text.

A tensor would be a constant, of which dynamo takes one a function that made it.
"""

import contextlib
import functools

import torch

from scalekern import masks  # which is not complete yet

_named: dict = {}  # of masks that no text tells, as long as graphs, which nobody counts, may ask for them


def constant(function):
    """What torch.compiler.assume_constant_result does, which imports the compiler, and with it Triton."""
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def plain():
    """Outside of fake tensors and transforms."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), temporarily_clear_interpreter_stack():
        yield


def text_of(mask) -> str:
    """Its expression, or a name in this process for one with large tables."""
    text = repr(mask)
    if not _means(text, mask):
        text = f"#{len(_named)}"
        _named[text] = mask
    return text


def _means(text, mask):
    """Whether the mask can be told from its text, which one with large tables or limits cannot."""
    try:
        return len(text) < 2000 and masks.parse(text) == mask
    except (TypeError, ValueError):
        return False


@functools.lru_cache(512)
def mask_of(text):
    return _named[text] if text.startswith("#") else masks.parse(text)


def argument(x):
    """What a constant function gets for x: dynamo does not have the attributes of an object that the graph has made."""
    return (x.text,) if isinstance(x, masks._leaves.Traced) else x


def untraced(x):
    """What `argument` stands for."""
    return mask_of(x[0]) if type(x) is tuple and len(x) == 1 and type(x[0]) is str else x


def while_tracing(make):
    """`make`, which torch.compile calls as it traces. Given tensors, whose values it has not, it breaks the graph: with
    fullgraph the message is an error's."""
    name = make.__name__.strip("_")
    of_tensors = f"{name}: masks of tensors, whose values a graph does not know, must be made outside, got a tensor"

    @constant
    def text(*args, **kwargs):
        with plain():
            return text_of(make(*map(untraced, args), **kwargs))

    @functools.wraps(make)
    def call(*args, **kwargs):
        args = [argument(x) for x in args]
        tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
        if torch.compiler.is_dynamo_compiling():
            if not tensors:
                return masks._leaves.Traced(text(*args, **kwargs))
            torch._dynamo.graph_break(msg=of_tensors)
        return make(*map(untraced, args), **kwargs)

    return call
