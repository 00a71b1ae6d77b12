"""Keys and values of tokens rounded to 8 or 4 bits: public functions, checks, schemas, backends and fakes.

Shape letters: B batch, H key heads, T new tokens, S slots of a cache, P channels, G groups of channels.
"""

import torch

from scalekern import _checks, _library
from scalekern._dispatch import Backend, composed, filling, triton
from scalekern.ops import _quantize_kv
from scalekern.ops._kv_layout import check_layout
from scalekern.quant.kv import SCALE_DTYPES, QuantizedKV, check_bits, packed_bytes
from scalekern.reference.quantize_kv import quantize_kv_op as reference_quantize
from scalekern.reference.quantize_kv import quantize_kv_update_op as reference_update

NAME, UPDATE = "quantize_kv", "quantize_kv_update"


def quantize_kv(x, *, bits=8, group_size=None, symmetric=False, scale_dtype=torch.float16):
    """Keys or values as a `QuantizedKV`: each token of each head, or each group of its channels, by its own range.

        scales = (max x - min x) / (2^bits - 1)    offsets = min x + 2^(bits-1) scales
        code = (x - offsets) / scales, rounded half to even

    and with symmetric=True scales = max |x| / (2^(bits-1) - 1) without offsets. All of it is float32 with IEEE
    division, whatever x's dtype. A number comes back within half a step, scales / 2, of itself, and what rounding
    scales and offsets to their dtype adds (scales are made larger by one part in 1024, or 2^23, so that the rounded
    ones span the range). Not differentiable: it is for inference.

    Args:
        x: (..., P), at least two axes; float64, float32, float16 or bfloat16, any strides.
        bits: 8 or 4.
        group_size: neighbouring channels that share a scale, 1 to P; the last group may be short. None: all P.
        symmetric: without offsets.
        scale_dtype: float16 or float32, of scales and offsets.

    Returns:
        A QuantizedKV of x's shape. A group that holds NaN or Inf has the scale NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or value, named in the message.

    Source: Liu et al., KIVI, 2024, section 3.1 (per token); Lin et al., QServe, 2024, section 4.2 (per head, 4 bits).
    """
    _checks.tensor(NAME, "x", x, dims=range(2, 65), dtypes=_checks.FLOATING)
    check_bits(NAME, "bits", bits)
    _checks.choice(NAME, "scale_dtype", scale_dtype, SCALE_DTYPES)
    P = x.shape[-1]
    if group_size is not None:
        _checks.at_least(NAME, "group_size", group_size, 1)
    if P == 0:
        raise ValueError(f"{NAME}: x must have at least 1 channel, got shape {tuple(x.shape)}")
    if (group_size or 1) > P:
        raise ValueError(f"{NAME}: group_size must be at most the {P} channels of x, got {group_size}")
    group_size = group_size or P
    data, scales, offsets = quantize_kv_op(x, bits, group_size, symmetric, scale_dtype)
    return QuantizedKV(data, scales, None if symmetric else offsets, bits, P, group_size)


def quantize_kv_update(
    cache, x, lengths, *, sink=0, circular=False, head_offsets=None, block_table=None, starts=None
):  # fmt: skip
    """Round the T newest tokens and write them into their slots of a cache, in place.

    Token t of T stands at position lengths[b] - T + t, as in `sparse_attention_decode`, which reads the cache by the
    same layout. Tokens at negative positions are not written, nor is what a circular cache would overwrite at once.

    Args:
        cache: a QuantizedKV, `QuantizedKV.empty(...)` at first. Contiguous (B, H, S, P), ragged (B, S, P) with
            head_offsets, or paged (pages, H, page, P) with block_table. Rounding follows its bits, group_size, whether
            it has offsets, and the dtype of its scales. In place.
        x: (B, H, T, P), keys or values; float64, float32, float16 or bfloat16, any strides.
        lengths: (B,), int32 or int64: tokens so far, the new ones included; at most the slots of every head unless
            circular (checked on a CPU; on a GPU what has no slot is not written).
        sink, circular, head_offsets, block_table, starts: as for `sparse_attention_decode`.

    Returns:
        The cache, for what is called next. This op has no gradient and says so when differentiated.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: as `quantize_kv`; pages as in Kwon et al., PagedAttention, 2023, section 4.
    """
    if not isinstance(cache, QuantizedKV):
        raise TypeError(f"{UPDATE}: cache must be a QuantizedKV, got {type(cache).__name__}")
    cache.check(UPDATE)
    for part, found in cache.tensors().items():
        _checks.writable(UPDATE, f"cache.{part}", found)
    _checks.tensor(UPDATE, "x", x, dims=4, dtypes=_checks.FLOATING)
    batch, heads, _, channels = x.shape
    ragged, paged = head_offsets is not None, block_table is not None
    if cache.dim() != (3 if ragged else 4):
        raise ValueError(f"{UPDATE}: cache must have {3 if ragged else 4} dimensions, got shape {tuple(cache.shape)}")
    wanted = (batch, None, channels) if ragged else (None if paged else batch, heads, None, channels)
    _checks.shape(UPDATE, "cache", cache, wanted)
    check_layout(UPDATE, batch, lengths, circular, head_offsets, block_table, starts)
    if ragged:
        _checks.shape(UPDATE, "head_offsets", head_offsets, (heads + 1,))
    _checks.at_least(UPDATE, "sink", sink, 0)
    _checks.same_device(
        UPDATE, "cache", cache.data, x=x, lengths=lengths, head_offsets=head_offsets, block_table=block_table,
        starts=starts,
    )  # fmt: skip
    if starts is not None and _checks.readable(starts) and not all(0 <= s <= cache.shape[-2] for s in starts.tolist()):
        raise ValueError(f"{UPDATE}: starts must be from 0 to {cache.shape[-2]}, got {starts.tolist()}")
    data, scales, offsets, tokens = _library.detached((cache.data, cache.scales, cache.offsets, x))
    quantize_kv_update_op(
        data, scales, offsets, tokens, lengths, head_offsets, block_table, starts, sink, circular, cache.bits,
        cache.group_size,
    )  # fmt: skip
    parts = cache.tensors()
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *parts.values())):
        return cache
    refusing = {n: _library.inference_only(UPDATE, t, x, *parts.values()) for n, t in parts.items() if n != "data"}
    return cache.replace(**refusing)


def _allocate(x, bits, group_size, symmetric, scale_dtype):
    """The parts, uninitialized; offsets of no elements where there are none."""
    lead, P = x.shape[:-1], x.shape[-1]
    data = x.new_empty((*lead, packed_bytes(P, bits)), dtype=torch.int8)
    scales = x.new_empty((*lead, -(-P // group_size)), dtype=scale_dtype)
    return data, scales, scales.new_empty(0 if symmetric else scales.shape)


def _too_many(x):
    return f"{x.shape[-1]} channels are more than a program holds" if x.shape[-1] > 1024 else None


quantize_kv_op = _library.define(
    NAME,
    "quantize_kv(Tensor x, int bits, int group_size, bool symmetric, ScalarType scale_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate, triton(NAME, NAME)), lambda x, *rest: _too_many(x)),
        *composed(reference_quantize, reference_quantize),
    ),
    fake=_allocate,
    empty=lambda x, *rest: x.numel() == 0,
    no_gradient="this quantizing op has no gradient; train with fake quantization",
)

quantize_kv_update_op = _library.define(
    UPDATE,
    "quantize_kv_update(Tensor(a!) data, Tensor(b!) scales, Tensor(c!)? offsets, Tensor x, Tensor lengths, "
    "Tensor? head_offsets, Tensor? block_table, Tensor? starts, int sink, bool circular, int bits, int group_size) "
    "-> ()",
    backends=(
        Backend("triton", triton(NAME, UPDATE), lambda data, scales, offsets, x, *rest: _too_many(x)),
        Backend("cpu", _quantize_kv.update, composed=True),
        Backend("reference", reference_update),
    ),
    fake=lambda *args: None,
    empty=lambda data, scales, offsets, x, *rest: x.numel() == 0 or data.numel() == 0,
)
