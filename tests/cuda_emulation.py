"""The CUDA ops on CPU tensors, through the emulator of scalekern._C: same drivers, same kernels, fibers for threads."""

import torch

from scalekern.ops import _fft_conv_cuda as fft
from scalekern.ops import _quant_matmul_cuda as gemv
from scalekern.ops import _quant_matmul_tiles as tiles
from scalekern.ops import causal_conv1d as conv
from scalekern.ops import selective_scan as scan
from scalekern.ops import selective_state_update as update
from scalekern.quant import quantize

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)  # enum Dtype
ORDERS = {"rising": 0, "falling": 1, "shuffled": 2}


def _pack(tensors):
    code = lambda t: DTYPES.index(t.dtype) if t.dtype in DTYPES else -1  # a mask
    describe = lambda t: (t.data_ptr(), code(t), list(t.shape), list(t.stride()))
    return [None if t is None else describe(t) for t in tensors]


def _poisoned(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(t.fill_(float("nan")) for t in outputs)


def _run(name, outputs, tensors, flags, processors, order):
    from scalekern import _C

    getattr(_C, f"emulate_{name}")(_pack([*outputs, *tensors]), *flags, processors, ORDERS[order])
    return outputs


def fill(name, outputs, args, order="rising"):
    """The kernels of scalekern_native::<name>_cuda on these outputs and arguments, whatever their strides."""
    flags = [a for a in args if isinstance(a, bool)]
    tensors = [a for a in args if not isinstance(a, bool)]
    return _run(name, outputs, tensors, flags[:2] if name == "selective_scan_fwd" else flags, 1, order)


def selective_scan_fwd(*args, processors=1, order="rising"):
    outputs = _poisoned(scan._allocate_fwd(*args))
    return _run("selective_scan_fwd", outputs, args[:10], args[10:12], processors, order)


def selective_scan_bwd(*args, processors=1, order="rising"):
    outputs = _poisoned(scan._allocate_bwd(*args))
    return _run("selective_scan_bwd", outputs, args[:13], args[13:], processors, order)


def selective_state_update(*args, processors=1, order="rising"):
    (out,) = _run("selective_state_update", _poisoned(update._allocate(*args)), args[:10], args[10:], processors, order)
    return out


def causal_conv1d_fwd(*args, processors=1, order="rising"):
    return _run("causal_conv1d_fwd", _poisoned(conv._allocate_fwd(*args)), args[:6], args[6:], processors, order)


def causal_conv1d_bwd(*args, processors=1, order="rising"):
    return _run("causal_conv1d_bwd", _poisoned(conv._allocate_bwd(*args)), args[:8], args[8:], processors, order)


def causal_conv1d_update(*args, processors=1, order="rising"):
    outputs = _poisoned(conv._allocate_update(*args))
    (out,) = _run("causal_conv1d_update", outputs, args[:6], args[6:], processors, order)
    return out


# Kinds of cuda_quant_gemv.cuh; powers of two come as bytes.
KINDS = (*DTYPES[:4], torch.float8_e4m3fn, None, torch.int8, torch.uint8)


def _kinds(tensors, powers=()):
    """As `_pack`, with Kinds for dtypes; powers: the places of bytes that stand for powers of two."""
    kinds = [5 if i in powers else t is not None and KINDS.index(t.dtype) for i, t in enumerate(tensors)]
    return [
        None if t is None else (t.data_ptr(), kind, list(t.shape), list(t.stride())) for t, kind in zip(tensors, kinds)
    ]


# The rounding of an output alone is 2e-4 in float16 and 1.7e-3 in bfloat16.
PRODUCT_TOLERANCE = {torch.float32: 5e-7, torch.float16: 3e-4, torch.bfloat16: 2.2e-3}


def inputs_of_a_product(M, N, K, format, group, dtype=torch.float16, seed=0, **options):
    """(x, w), each row of its own size, so that permuted rows and scales are seen."""
    torch.manual_seed(seed)
    rows = lambda *shape: torch.randn(shape) * torch.rand(shape[0], 1).add(0.3)
    return rows(M, K).to(dtype), quantize(rows(N, K) / K**0.5, format, group_size=group, **options)


def _product(arguments, x, w, bias, out_dtype):
    out = torch.full((*x.shape[:-1], w.shape[0]), float("nan"), dtype=out_dtype or x.dtype)
    group = w.group_size or x.shape[-1]
    return out, arguments(out, x, w.data, w.scales, w.zeros, w.offsets, w.outer, bias, w.format, group)


def quant_matmul_gemv(x, w, bias=None, out_dtype=None, order="rising"):
    """w: QuantizedTensor."""
    out, args = _product(gemv.arguments, x, w, bias, out_dtype)
    fill_gemv(*args, order=order)
    return out


def fill_gemv(*args, order="rising"):
    """args: of scalekern_native::quant_matmul_gemv_cuda."""
    from scalekern import _C

    *args, powers = args
    _C.emulate_quant_matmul_gemv(_kinds(args[:9], [3] if powers else []), *args[9:], 132, ORDERS[order])


def quant_matmul_tiles(x, w, bias=None, out_dtype=None, order="rising", processors=2):
    """w: QuantizedTensor."""
    from scalekern import _C

    out, args = _product(tiles.arguments, x, w, bias, out_dtype)
    _C.emulate_quant_matmul_tiles(_kinds(args[:7]), *args[7:], processors, ORDERS[order])
    return out


def fft_conv(
    u, k, *, mode="causal", k_reverse=None, skip=None, bias=None, pregate=None, postgate=None, mask=None, out=None,
    order="rising", processors=1,
):  # fmt: skip
    if out is None:
        out = u.new_empty(*u.shape[:2], fft.count(u, k, mode))
    spectrum, scale, *rest = prepared = fft.filters(u, k, k_reverse, skip, mode, out.shape[2])
    _run("fft_filters", _poisoned((spectrum, scale)), rest[:3], rest[3:], processors, order)
    rest = bias, pregate, postgate, mask, prepared[-1]
    out, *tensors, points = fft.arguments(*_poisoned(out), u, spectrum, scale, *rest)
    return _run("fft_conv", (out,), tensors, (points,), processors, order)[0]
