"""CPU and CUDA kernels on tensors that reach past 2^31 elements: the same bits as on compact tensors.

The tensors are views of mappings of which only the pages that hold their elements exist. One axis at a time has a
stride of FAR elements: an offset cut to 32 bits, signed or not, lands on another element. CUDA kernels run in the
emulator; the Triton ones are forced to 64-bit offsets in test_triton_interpret.py.
"""

import mmap

import cuda_emulation as emulated
import pytest
import torch
from conftest import INTERPRET
from int64_calls import CALLS, conv_args, fill_cpu, normal, scan_args

import scalekern
from scalekern import _native

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter's process tests Triton alone")

FAR = 2**32 + 64
BEYOND = ("batch", "channel", "last")  # the axis whose stride is FAR: the first, the second, the last
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; no swap is set aside for pages that are never touched


def compact(tensor, axis):
    """The same values, `axis` outermost, the others dense in their order."""
    return tensor.movedim(axis, 0).contiguous().movedim(0, axis)


def far(tensor, axis):
    """compact(tensor, axis), with steps of FAR elements along `axis` and nothing in between."""
    like = compact(tensor, axis)
    reach = ((tensor.shape[axis] - 1) * FAR + like.numel()) * tensor.element_size()
    pages = mmap.mmap(-1, reach, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    strides = [FAR if i == axis and tensor.shape[axis] > 1 else s for i, s in enumerate(like.stride())]
    base = torch.frombuffer(pages, dtype=torch.uint8).view(tensor.dtype)
    return base.as_strided(tensor.shape, strides).copy_(tensor)


def wrapped(view):
    """What a kernel sees of a tensor when it keeps strides in 32 bits."""
    return view.as_strided(view.shape, [s % 2**32 for s in view.stride()])


def axis_of(tensor, beyond, rows=False):
    axis = {"batch": 0, "channel": min(1, tensor.dim() - 1), "last": tensor.dim() - 1}[beyond]
    return min(axis, tensor.dim() - 2) if rows else axis


def laid(values, lay, beyond, dense=(), rows=()):
    """`values` with every tensor laid out by `lay`, except those at `dense`, which kernels index by their shape.

    Of those at `rows` kernels take the last axis as dense.
    """
    place = lambda i, x: x if i in dense or x.numel() == 0 else lay(x, axis_of(x, beyond, i in rows))
    return [place(i, x) if isinstance(x, torch.Tensor) else x for i, x in enumerate(values)]


FILL = {"cpu": fill_cpu, "cuda": emulated.fill}
NO_CUDA = ("complex", "attention", "diag", "cross", "quant", "hadamard", "mamba")
KERNELS = [(kernels, call) for kernels in FILL for call in CALLS if kernels == "cpu" or not call.startswith(NO_CUDA)]
every_kernel = pytest.mark.parametrize("kernels, call", KERNELS, ids=map("-".join, KERNELS))


def results(call, lay, beyond, kernels, wrong=None):
    """Outputs and the state that an update changes, after a call on tensors laid out by `lay`.

    wrong: True, or the number of the tensor, for what the kernel sees wrapped.
    """
    name, outputs, args, *places = call
    poisoned = (o.fill_(float("nan") if o.is_floating_point() else 77) for o in outputs)
    values = laid([*poisoned, *args], lay, beyond, *places)
    seen = [
        wrapped(v) if isinstance(v, torch.Tensor) and (wrong is True or wrong == i) else v for i, v in enumerate(values)
    ]
    FILL[kernels](name, seen[: len(outputs)], seen[len(outputs) :])
    changed = ("_update" in name) + ("mamba" in name)  # the states come first among the arguments
    return values[: len(outputs) + changed]


def reaching(call, beyond):
    """Numbers of the tensors of a call that have a stride of FAR."""
    name, outputs, args, *places = call
    values = laid([*outputs, *args], far, beyond, *places)
    return [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and FAR in v.stride()]


def same_bits(some, others):
    raw = lambda x: x.contiguous().view(torch.uint8)
    return all(torch.equal(raw(a), raw(b)) for a, b in zip(some, others))


def gradients(function, tensors, flags):
    leaves = [t.requires_grad_() for t in tensors]
    out = function(*leaves, *flags)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=20))]


def needs(kernels):
    if kernels == "cpu" and (reason := _native.load("cpu")):
        pytest.skip(reason)
    if kernels == "cuda":
        pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")


@pytest.fixture(scope="module", autouse=True)
def _address_space():
    """Tensors of this file take up to 2.2 TiB of addresses each, and a few megabytes of memory together."""
    try:
        pages = mmap.mmap(-1, 2**42, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        pages.close()
    except (OSError, ValueError, AttributeError) as refused:
        pytest.skip(f"this system maps no memory that is not there: {refused}")


@pytest.mark.parametrize("variant", [False, True], ids=["plain", "variant"])
@pytest.mark.parametrize("beyond", BEYOND)
@every_kernel
def test_strides_past_32_bits(kernels, call, beyond, variant):
    """Every tensor, outputs included. Variants: packed and in reverse, circular, with heads."""
    needs(kernels)
    both = (torch.float32, torch.bfloat16)
    for dtype in both if kernels == "cpu" else both[variant:][:1]:  # the emulator takes a second for some calls
        near, apart = (results(CALLS[call](dtype, variant), lay, beyond, kernels) for lay in (compact, far))
        assert all(torch.isfinite(x).all() for x in near)
        assert same_bits(near, apart)


@every_kernel
def test_a_wrapped_stride_would_be_seen(kernels, call):
    """Of each tensor by itself; in the emulator, which is slow, of all at once."""
    needs(kernels)
    make = lambda: CALLS[call](torch.float32, False)
    for beyond in BEYOND if kernels == "cpu" else ("channel",):
        near = results(make(), compact, beyond, kernels)
        for wrong in reaching(make(), beyond) if kernels == "cpu" else (True,):
            try:
                seen = not same_bits(near, results(make(), far, beyond, kernels, wrong))
            except RuntimeError as error:  # a length or a budget that the kernel refuses
                seen = "sparse_attention_decode: " in str(error) and " must be " in str(error)
            assert seen, (beyond, wrong)


@pytest.mark.parametrize("beyond", BEYOND)
def test_public_functions_take_such_tensors(beyond):
    needs("cpu")
    args = scan_args(torch.float32, False)[:8]
    filters = conv_args(torch.float32, False)[:3]
    for function, tensors, flags in (
        (scalekern.selective_scan, args, (True,)),
        (scalekern.causal_conv1d, filters, (None, None, False, "silu")),
    ):
        with scalekern.backend("cpu"):
            near, apart = (gradients(function, laid(tensors, lay, beyond), flags) for lay in (compact, far))
        assert same_bits(near, apart)
