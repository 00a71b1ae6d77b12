"""Attention under a mask of `scalekern.masks`: public function, checks, schema, backends, fake and gradient.

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, Pv of the values.

The registered ops take the mask as its code, one int32 tensor; a kernel backend asks for the plan of that code, the
lists of tiles that it has to visit, which is made once for a code and a pair of lengths.
"""

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from scalekern import _checks, _library, masks
from scalekern._dispatch import Backend, filling, native, triton
from scalekern._mask_packed import packed
from scalekern._packing import check_cu_seqlens
from scalekern.reference.sparse_attention import SCORES, scale_of, unit
from scalekern.reference.sparse_attention import sparse_attention_bwd as reference_bwd
from scalekern.reference.sparse_attention import sparse_attention_fwd as reference_fwd

NAME = "sparse_attention"
CPU_BLOCK = (64, 64)


def sparse_attention(
    q, k, v, mask=None, *, scale=None, bias=None, score="softmax", temperature=None, norm=1.0, return_lse=False,
    empty_rows="zero", sinks=None, softcap=None, cu_seqlens=None, cu_seqlens_k=None,
):  # fmt: skip
    """softmax(scale q k^T + bias) v over the pairs that the mask allows; the others cost nothing.

    Differentiable in q, k, v, bias, sinks, temperature, and through the lse. Query head h reads key head
    h // (Hq / Hkv). Scores are summed and exponentiated in float32 (float64 for float64 inputs).

    Args:
        q: (B, Hq, Lq, P).   k: (B, Hkv, Lk, P).   v: (B, Hkv, Lk, Pv); float64, float32, float16 or bfloat16, all
            alike, any strides; P and Pv up to 256. With cu_seqlens: (total, Hq, P), (total_k, Hkv, P or Pv).
        mask: of `scalekern.masks`, over absolute positions: `masks.causal` lets query i see the keys 0 to i, and
            `masks.causal.shift(Lk - Lq, 0)` lines both ends up. None: every pair.
        scale: P^-0.5 when None; 1 for score "cosine".
        bias: (B or 1, Hq or 1, Lq, Lk), added to the scores, after the cap.
        score: "softmax"; "silu": silu(scores) norm in place of a softmax (HSTU); "cosine": the softmax over q and k
            at length 1, times exp(min(temperature, log 100)) (Swin V2).
        temperature: (Hq,), the logarithm, for score "cosine".
        norm: a factor on every silu(score), one over HSTU's length.
        return_lse: also return the logarithm of the sum of exp(scores).
        empty_rows: what a query that may see nothing gets: "zero", or "attend": everything (Mask2Former).
        sinks: (Hq,), a score in every row's sum that brings no value.
        softcap: scores become softcap tanh(scores / softcap).
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to total: S sequences end to end, within each of which the
            mask counts positions from 0; a mask over images or of a dense tensor is refused. The tile lists are made
            from its values: once a tensor, which must not be changed in place.
        cu_seqlens_k: the same of the keys, when they differ.

    Returns:
        out (B, Hq, Lq, Pv) in q's dtype; with `return_lse` also lse (B, Hq, Lq), float32 (float64), which is -inf
        where a query sees nothing, and 0 throughout for score "silu". Packed: (total, Hq, Pv) and (Hq, total).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Source: Dao et al., FlashAttention, 2022, section 3.1; Zhai et al., HSTU, 2024, section 3.2; Liu et al., Swin
    Transformer V2, 2022, section 3.2.
    """
    mask = masks.everything if mask is None else mask
    if cu_seqlens is not None:
        _check_packed(q, k, v, cu_seqlens, cu_seqlens_k, empty_rows)
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    _check(q, k, v, mask, cu_seqlens, bias, score, temperature, empty_rows, sinks, softcap)
    if score == "cosine":
        q, k = unit(q, temperature), unit(k)
        scale = 1.0 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sinks = sinks if sinks is None or sinks.dtype == wide else sinks.to(wide)
    bias = bias if bias is None or bias.dtype in (q.dtype, wide) else bias.to(wide)
    lengths = (int(q.shape[2]), int(k.shape[2])) if empty_rows == "attend" else None
    code = _code_of(mask, lengths, q.device)
    scale = scale if scale is None else float(scale)
    out, lse = sparse_attention_fwd(
        q, k, v, code, cu_seqlens, cu_seqlens_k, bias, sinks, scale, float(softcap or 0.0), score == "silu", float(norm)
    )
    if cu_seqlens is not None:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


@torch.compiler.assume_constant_result
def _code_of(mask, lengths, device):
    """The mask's code; with lengths, that of the mask whose empty rows see everything."""
    with unset_fake_temporarily():
        mask = mask if lengths is None else mask.attending_all_if_empty(*lengths)
        return mask.code(device)


@torch.compiler.assume_constant_result
def _sizes_of(mask):
    return mask.heads, mask.batches


def _check_packed(q, k, v, cu_seqlens, cu_seqlens_k, empty_rows):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, x, dims=3, dtypes=_checks.FLOATING)
    check_cu_seqlens(NAME, cu_seqlens, 1, q.shape[0])
    if cu_seqlens_k is not None:
        _checks.tensor(NAME, "cu_seqlens_k", cu_seqlens_k, dims=1)
        _checks.shape(NAME, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape))
    check_cu_seqlens(NAME, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, 1, k.shape[0], "cu_seqlens_k")
    if empty_rows != "zero":
        raise ValueError(f"{NAME}: empty_rows must be 'zero' for packed sequences, got {empty_rows!r}")
    _checks.same_device(NAME, "q", q, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)


def _check(q, k, v, mask, cu_seqlens, bias, score, temperature, empty_rows, sinks, softcap):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, x, dims=4, dtypes=_checks.FLOATING)
        _checks.dtype(NAME, name, x, q.dtype)
    (batch, heads, queries, dim), (_, key_heads, keys, _) = q.shape, k.shape
    _checks.shape(NAME, "k", k, (batch, None, None, dim))
    _checks.shape(NAME, "v", v, (batch, key_heads, keys, None))
    if not 1 <= dim <= 256 or not 1 <= v.shape[3] <= 256:
        raise ValueError(f"{NAME}: the last axes of q and v must have 1 to 256 elements, got {dim} and {v.shape[3]}")
    if heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"{NAME}: the heads of k must divide the {heads} heads of q, got {key_heads}")
    if not isinstance(mask, masks.Mask):
        raise TypeError(f"{NAME}: mask must be a scalekern.masks.Mask, got {type(mask).__name__}")
    mask_heads, mask_batches = _sizes_of(mask)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if mask_heads not in (1, heads) or mask_batches not in (1, sequences):
        raise ValueError(
            f"{NAME}: mask must be for 1 or {heads} heads and a batch of 1 or {sequences}, got {mask_heads} and {mask_batches}"
        )
    if bias is not None:
        _checks.tensor(NAME, "bias", bias, dims=4, dtypes=_checks.FLOATING)
        ones = [(b, h, queries, keys) for b in (batch, 1) for h in (heads, 1)]
        _checks.shape(NAME, "bias", bias, *ones)
    for name, x in (("temperature", temperature), ("sinks", sinks)):
        if x is not None:
            _checks.tensor(NAME, name, x, dims=1, dtypes=_checks.FLOATING)
            _checks.shape(NAME, name, x, (heads,))
    _checks.choice(NAME, "score", score, SCORES)
    _checks.choice(NAME, "empty_rows", empty_rows, ("zero", "attend"))
    if temperature is not None and score != "cosine":
        raise ValueError(f"{NAME}: temperature must be None unless score is 'cosine', got score {score!r}")
    if sinks is not None and score == "silu":
        raise ValueError(f"{NAME}: sinks must be None for score 'silu', which has no sum, got a tensor")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{NAME}: softcap must be positive, got {softcap!r}")
    _checks.same_device(NAME, "q", q, k=k, v=v, bias=bias, temperature=temperature, sinks=sinks)


def _allocate_fwd(q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, sinks, scale, softcap, silu, norm):
    """The outputs, uninitialized: what the fake returns and what the kernels fill."""
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_wide(q))


def _allocate_bwd(
    dout, dlse, q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, sinks, out, lse, scale, softcap, silu, norm, need_dbias
):  # fmt: skip
    def like(x):
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(bias if need_dbias else None), like(sinks)


def _wide(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty(q, k, v, *rest):
    return q.numel() == 0 or k.numel() == 0 or v.numel() == 0


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors  # once: under activation checkpointing a read recomputes
    bias, sinks = inputs[6:]
    if dout is None and dlse is None:
        return (None,) * 12
    dout = torch.zeros_like(out) if dout is None else dout
    need_dbias = bias is not None and ctx.needs_input_grad[6]
    dq, dk, dv, dbias, dsinks = sparse_attention_bwd(dout, dlse, *inputs, out, lse, *ctx.options, need_dbias)
    none = (None,) * 4
    return dq, dk, dv, *none[:3], dbias if need_dbias else None, None if sinks is None else dsinks, *none


def _planned(mask, cu_seqlens, cu_seqlens_k, q, k, block):
    """The code that a kernel reads, and the tiles that it visits."""
    queries, keys = q.shape[2], k.shape[2]
    code = mask if cu_seqlens is None else packed(mask, cu_seqlens, cu_seqlens_k, queries, keys)
    return code, masks.plan_of(code, queries, keys, block)


def _cpu(direction, outputs: int, tensors: int):
    """A native kernel as fill(*outputs, *op arguments): `outputs` of them, `tensors` of dout ... before q."""
    kernel = native(f"sparse_attention_{direction}", "cpu")

    def run(*args):
        filled, given, rest = args[:outputs], args[outputs : outputs + tensors], args[outputs + tensors :]
        q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, sinks, *rest = rest
        saved, (scale, softcap, silu, norm) = rest[:tensors], rest[tensors : tensors + 4]
        code, plan = _planned(mask, cu_seqlens, cu_seqlens_k, q, k, CPU_BLOCK)
        tiles = code, plan.ptr, plan.runs, *plan.block
        kernel(*filled, *given, *saved, q, k, v, *tiles, bias, sinks, scale_of(q, scale), softcap, silu, norm)

    run.native_op = kernel.native_op
    return run


_cpu_bwd = _cpu("bwd", 5, 2)


def _cpu_bwd_fill(dq, dk, dv, dbias, dsinks, *args):
    """What is absent, or not needed, an empty tensor elsewhere, is None there; dbias is summed in float32."""
    sinks, need_dbias = args[9], args[-1]
    sums = dbias.to(_wide(dbias)) if need_dbias else None
    _cpu_bwd(dq, dk, dv, sums, dsinks if sinks is not None else None, *args)
    if need_dbias and sums is not dbias:
        dbias.copy_(sums)


_cpu_bwd_fill.native_op = _cpu_bwd.native_op


_FORWARD = "Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? bias, Tensor? sinks"
_OPTIONS = "float? scale, float softcap, bool silu, float norm"

sparse_attention_fwd = _library.define(
    NAME,
    f"sparse_attention_fwd({_FORWARD}, {_OPTIONS}) -> (Tensor, Tensor)",
    backends=(
        Backend("cpu", filling(_allocate_fwd, _cpu("fwd", 2, 0))),
        Backend("reference", reference_fwd),
    ),
    fake=_allocate_fwd,
    empty=_empty,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("q", "k", "v"),
)

sparse_attention_bwd = _library.define(
    NAME,
    f"sparse_attention_bwd(Tensor dout, Tensor? dlse, {_FORWARD}, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend("cpu", filling(_allocate_bwd, _cpu_bwd_fill)),
        Backend("reference", reference_bwd),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, dlse, *rest: _empty(*rest),
)
