"""CPU and CUDA kernels on tensors that reach past 2^31 elements: the same bits as on compact tensors.

The tensors are views of mappings of which only the pages that hold their elements exist. One axis at a time has a
stride of FAR elements: an offset cut to 32 bits, signed or not, lands on another element. CUDA kernels run in the
emulator; the Triton ones are forced to 64-bit offsets in test_triton_interpret.py.

Shape letters: B batch, D channels, L length, N states, G groups, H heads, W filter width, S slots.
"""

import functools
import mmap

import cuda_emulation as emulated
import pytest
import torch
from conftest import INTERPRET

import scalekern
from scalekern import _native, masks
from scalekern.ops import _cross_scan as crossed
from scalekern.ops import causal_conv1d as conv
from scalekern.ops import cross_scan as cross
from scalekern.ops import diag_scan as diag
from scalekern.ops import selective_scan as scan
from scalekern.ops import selective_state_update as update
from scalekern.ops import sparse_attention as attention
from scalekern.ops import sparse_attention_decode as decode
from scalekern.reference.hstu_attention import bucket_edges

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


def axis_of(tensor, beyond):
    return {"batch": 0, "channel": min(1, tensor.dim() - 1), "last": tensor.dim() - 1}[beyond]


def laid(values, lay, beyond, dense=()):
    """`values` with every tensor laid out by `lay`, except those at `dense`, which kernels index by their shape."""
    place = lambda i, x: x if i in dense or x.numel() == 0 else lay(x, axis_of(x, beyond))
    return [place(i, x) if isinstance(x, torch.Tensor) else x for i, x in enumerate(values)]


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 31 * len(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def scan_args(dtype, packed, complex_A=False):
    B, D, L, N, G = (1, 4, 70, 5, 2) if packed else (2, 4, 70, 5, 2)
    rows = 3 if packed else B
    io = lambda *shape, seed: normal(*shape, seed=seed, dtype=dtype)

    def state(*shape, seed, dtype=torch.float32):
        x = normal(*shape, seed=seed)
        return torch.complex(x, normal(*shape, seed=seed + 100)) if complex_A else x.to(dtype)

    A = state(D, N, seed=3)
    C = state(D, N, seed=5, dtype=dtype) if packed else state(B, G, N, L, seed=5, dtype=dtype)
    return [
        io(B, D, L, seed=1), io(B, D, L, seed=2), torch.complex(-A.real.abs(), A.imag) if complex_A else -A.abs(),
        state(B, G, N, L, seed=4, dtype=dtype), C, normal(D, seed=6), io(B, D, L, seed=7), normal(D, seed=8),
        state(rows, D, N, seed=9), torch.tensor([0, 9, 66, 70]) if packed else None, True, packed,
    ]  # fmt: skip


def scan_fwd_call(dtype, packed, complex_A=False):
    args = [*scan_args(dtype, packed, complex_A), True]
    return "selective_scan_fwd", scan._allocate_fwd(*args), args, (2,)  # checkpoints are dense


def scan_bwd_call(dtype, packed, complex_A=False):
    args = scan_args(dtype, packed, complex_A)
    out, last, checkpoints = scan.selective_scan_fwd(*args, True)
    dlast = last.roll(1, -1)
    args = [normal(*out.shape, seed=20, dtype=dtype), dlast, *args[:10], checkpoints, *args[10:]]
    return "selective_scan_bwd", scan._allocate_bwd(*args), args, (9 + 12,)


def conv_args(dtype, packed):
    B, D, L, W = (1, 4, 70, 4) if packed else (2, 4, 70, 4)
    ids = None if packed else torch.tensor([[0] * 30 + [-1] * 2 + [1] * 38, [2] * 70], dtype=torch.int32)
    bounds, rows = (torch.tensor([0, 9, 66, 70]), 3) if packed else (None, B)
    return [
        normal(B, D, L, seed=1, dtype=dtype), normal(D, W, seed=2), normal(D, seed=3), ids, bounds,
        normal(rows, D, W - 1, seed=4, dtype=dtype), True,
    ]  # fmt: skip


def conv_fwd_call(dtype, packed):
    args = conv_args(dtype, packed)
    return "causal_conv1d_fwd", conv._allocate_fwd(*args), args, ()


def conv_bwd_call(dtype, packed):
    args = conv_args(dtype, packed)
    out, final = conv._allocate_fwd(*args)
    args = [normal(*out.shape, seed=20, dtype=dtype), normal(*final.shape, seed=21, dtype=dtype), *args]
    return "causal_conv1d_bwd", conv._allocate_bwd(*args), args, ()


def conv_update_call(dtype, circular):
    B, D, T, W, S = 3, 4, 2, 4, 5
    args = [
        normal(S, D, 5, seed=1, dtype=dtype), normal(B, D, T, seed=2, dtype=dtype), normal(D, W, seed=3),
        normal(D, seed=4), torch.tensor([0, 4, 13]) if circular else None, torch.tensor([4, -1, 0]), True,
    ]  # fmt: skip
    return "causal_conv1d_update", (conv._allocate_update(*args),), args, (0,)


def state_update_call(dtype, heads):
    B, H, P, N, G, S = (3, 4, 6, 5, 2, 5) if heads else (3, 1, 6, 16, 1, 5)
    io = lambda *shape, seed: normal(*shape, seed=seed, dtype=dtype)
    args = [
        normal(S, H, P, N, seed=1), io(B, H, P, seed=2), io(B, H, P, seed=3), -normal(H, P, N, seed=4).abs(),
        io(B, G, N, seed=5), io(B, G, N, seed=6), normal(H, P, seed=7), io(B, H, P, seed=8), normal(H, P, seed=9),
        torch.tensor([4, -1, 0]), True,
    ]  # fmt: skip
    return "selective_state_update", (update._allocate(*args),), args, (0,)


def attention_args(dtype, biased):
    """(q, k, v), what the tiles come from, and bias, sinks, tables of positions and of times, scale and the rest."""
    B, H, G, L, P = 2, 4, 2, 70, 8
    rule = masks.causal & (masks.window(20, 0) | masks.sink(3))
    plan = rule.plan(L, L, (64, 64))
    qkv = [normal(B, n, L, P, seed=seed, dtype=dtype) for seed, n in ((1, H), (2, G), (3, G))]
    extra = [None] * 9
    if biased:
        at, time = torch.arange(L).int(), torch.arange(L) * 37
        extra = [
            normal(B, H, L, L, seed=7, dtype=dtype), normal(H, seed=8), normal(H, 31, seed=9), at, at.clone(),
            normal(H, 12, seed=10), time + 40, time, bucket_edges(11),
        ]  # fmt: skip
    return qkv, [rule.code(), plan.ptr, plan.runs, 64, 64], [*extra, P**-0.5, 0.0, False, 1.0]


def attention_fwd_call(dtype, biased):
    qkv, tiles, rest = attention_args(dtype, biased)
    return "sparse_attention_fwd", attention._allocate_fwd(*qkv), [*qkv, *tiles, *rest], (5, 6, 7)


def attention_bwd_call(dtype, biased):
    qkv, tiles, rest = attention_args(dtype, biased)
    out, lse = attention._allocate_fwd(*qkv)
    fill_cpu("sparse_attention_fwd", (out, lse), [*qkv, *tiles, *rest])
    sums = [None if x is None else torch.zeros(x.shape) for x in (rest[0], rest[1], rest[2], rest[5])]
    args = [*sums, normal(*out.shape, seed=20, dtype=dtype), normal(*lse.shape, seed=21), out, lse, *qkv, *tiles, *rest]
    return "sparse_attention_bwd", [torch.empty_like(x) for x in qkv], args, (14, 15, 16)


def decode_call(dtype, ragged):
    B, H, G, S, P = 2, 4, 2, 40, 8
    lead = (B, S) if ragged else (B, G, S)
    args = [
        normal(B, H, 2, P, seed=1, dtype=dtype), normal(*lead, P, seed=2, dtype=dtype), normal(*lead, P, seed=3, dtype=dtype),
        torch.tensor([11, 9]), torch.tensor([7, 11, 5, 6]), torch.tensor([0, 15, 40]) if ragged else None, None,
        None if ragged else torch.tensor([3, 20]), normal(H, seed=4), *[None] * 4, 1, ragged, P**-0.5, 0.0,
        0, 0, 0, 0, P,
    ]  # fmt: skip
    return "sparse_attention_decode", decode._allocate(*args), args, (0, 1)


def diag_scan_fwd_call(dtype, packed):
    B, D, L = (1, 4, 70) if packed else (2, 4, 70)
    cu = torch.tensor([0, 20, 20, 70]) if packed else None
    args = [normal(B, D, L, seed=1).sigmoid().to(dtype), normal(B, D, L, seed=2, dtype=dtype),
            normal(3 if packed else B, D, seed=3), cu, packed]  # fmt: skip
    return "diag_scan_fwd", diag._allocate_fwd(*args), args, (5,)


def diag_scan_bwd_call(dtype, packed):
    args = diag_scan_fwd_call(dtype, packed)[2]
    out, last = diag.diag_scan_fwd(*args)
    args = [normal(*out.shape, seed=20, dtype=dtype), last.roll(1, -1), args[0], out, *args[2:]]
    return "diag_scan_bwd", diag._allocate_bwd(*args), args, (8,)


def cross_scan_call(dtype, grouped):
    args = [normal(2, 8, 5, 6, seed=1, dtype=dtype), [0, 1, 2, 3], grouped]
    return "cross_scan", [cross._allocate_scan(*args)], [args[0], crossed.code(args[1]), grouped], (0,)


def cross_merge_call(dtype, grouped):
    args = [normal(2, 4, 2, 30, seed=1, dtype=dtype), [5, 6], [0, 1, 2, 3], grouped]
    return "cross_merge", [cross._allocate_merge(*args)], [args[0], crossed.code(args[2]), grouped], (0,)


CALLS = {
    "attention_fwd": attention_fwd_call, "attention_bwd": attention_bwd_call, "attention_decode": decode_call,
    "scan_fwd": scan_fwd_call, "scan_bwd": scan_bwd_call, "conv_fwd": conv_fwd_call, "conv_bwd": conv_bwd_call,
    "conv_update": conv_update_call, "state_update": state_update_call,
    "diag_scan_fwd": diag_scan_fwd_call, "diag_scan_bwd": diag_scan_bwd_call, "cross_scan": cross_scan_call,
    "cross_merge": cross_merge_call,
    "complex_scan_fwd": functools.partial(scan_fwd_call, complex_A=True),
    "complex_scan_bwd": functools.partial(scan_bwd_call, complex_A=True),
}  # fmt: skip


def fill_cpu(name, outputs, args):
    getattr(torch.ops.scalekern_native, f"{name}_cpu").default(*outputs, *args)


FILL = {"cpu": fill_cpu, "cuda": emulated.fill}
NO_CUDA = ("complex", "attention", "diag", "cross")
KERNELS = [(kernels, call) for kernels in FILL for call in CALLS if kernels == "cpu" or not call.startswith(NO_CUDA)]
every_kernel = pytest.mark.parametrize("kernels, call", KERNELS, ids=map("-".join, KERNELS))


def results(call, lay, beyond, kernels, wrong=None):
    """Outputs and the state that an update changes, after a call on tensors laid out by `lay`.

    wrong: True, or the number of the tensor, for what the kernel sees wrapped.
    """
    name, outputs, args, dense = call
    values = laid([*(o.fill_(float("nan")) for o in outputs), *args], lay, beyond, dense)
    seen = [
        wrapped(v) if isinstance(v, torch.Tensor) and (wrong is True or wrong == i) else v for i, v in enumerate(values)
    ]
    FILL[kernels](name, seen[: len(outputs)], seen[len(outputs) :])
    return values[: len(outputs) + name.endswith("_update")]  # the state comes first among the arguments


def reaching(call, beyond):
    """Numbers of the tensors of a call that have a stride of FAR."""
    name, outputs, args, dense = call
    values = laid([*outputs, *args], far, beyond, dense)
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
            assert not same_bits(near, results(make(), far, beyond, kernels, wrong)), (beyond, wrong)


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
