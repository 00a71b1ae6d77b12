"""Attention under a mask of `scalekern.masks`: public function, checks, schema, backends, fake and gradient.

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, Pv of the values.

The registered ops take the mask as its code, one int32 tensor, or, in a compiled graph, by its text; a kernel backend
asks for the plan of that code, the lists of tiles that it has to visit, which is made once for a code and two lengths.
"""

import contextlib
import functools

import torch

from scalekern import _checks, _dispatch, _library, masks
from scalekern._dispatch import Backend, filling, native, triton
from scalekern.masks._packed import packed
from scalekern.masks._traced import argument, constant, mask_of, plain, text_of, untraced
from scalekern.ops._attention_checks import NAME, check, check_packed
from scalekern.ops._hstu import places
from scalekern.reference.hstu_attention import bucket_edges
from scalekern.reference.sparse_attention import scale_of, unit
from scalekern.reference.sparse_attention import sparse_attention_bwd as reference_bwd
from scalekern.reference.sparse_attention import sparse_attention_fwd as reference_fwd

CPU_BLOCK = (64, 64)


def sparse_attention(
    q, k, v, mask=None, *, scale=None, bias=None, score="softmax", temperature=None, norm=1.0, return_lse=False,
    empty_rows="zero", sinks=None, softcap=None, position_table=None, cu_seqlens=None,
    cu_seqlens_k=None,
):  # fmt: skip
    """softmax(scale q k^T + bias) v over the pairs that the mask allows; the others cost nothing.

    Differentiable in q, k, v, bias, sinks, temperature, position_table, and through the lse. Query head h reads key head
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
        position_table: (T,) or (Hq, T), T odd: entry (T - 1) / 2 + k - q is added to the score of query q and key k,
            at most the table's ends; after the cap (ALiBi; T5's through `relative_position_buckets`). Or (1 or Hq,
            2 h - 1, 2 w - 1) for images of h x w tokens, entry (h - 1 + rows, w - 1 + columns) from query to key:
            Swin's table, or what Swin V2's and CrossFormer's networks produce, with `.flip(-2, -1)`, since these count
            from key to query. A window's table serves a whole image under `masks.window2d` when padded to its size.
            Not for packed sequences.
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
    _checks.flag(NAME, "return_lse", return_lse)
    mask = masks.everything if mask is None else mask
    if (
        bias is temperature is sinks is softcap is position_table is cu_seqlens is cu_seqlens_k is None
        and score == "softmax" and empty_rows == "zero" and type(norm) is float
    ):  # fmt: skip
        found = _at_once(q, k, v, mask, scale)
        if found is not None:
            return found if return_lse else found[0]
    scale, softcap = (
        x if x is None else _checks.number(NAME, name, x) for name, x in (("scale", scale), ("softcap", softcap))
    )
    norm = _checks.number(NAME, "norm", norm)
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise ValueError(f"{NAME}: cu_seqlens_k must be None without cu_seqlens, got a {type(cu_seqlens_k).__name__}")
    if cu_seqlens is not None:
        check_packed(q, k, v, cu_seqlens, cu_seqlens_k, empty_rows)
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    check(q, k, v, mask, cu_seqlens, bias, score, temperature, empty_rows, sinks, softcap, position_table)
    io, outside = q.dtype, contextlib.nullcontext()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if score == "cosine":
        # Rounded at length 1 and a temperature of 100, q and k in bfloat16 put the output off by 1e-2, dq and dk by
        # 3e-2 and the temperature's gradient by as much as there is. A CPU takes float32 in 1.0 to 1.3 (gradients 1.2)
        # times the time for windows of 64 tokens, 2.4 for 1,024; two digits each, [hi lo hi] and [hi hi lo], in 1.4 to
        # 2.7 (1.4 to 1.7), with the temperature's gradient as wrong. A GPU, whose float32 has no such rate, rounds.
        if q.device.type == "cpu":
            if torch.is_autocast_enabled("cpu") and io != torch.float64:
                io, outside = torch.get_autocast_dtype("cpu"), torch.autocast("cpu", enabled=False)
            v = v.to(wide)
        with outside:
            q, k = unit(q, temperature, v.dtype), unit(k, None, v.dtype)
        scale = 1.0 if scale is None else scale
    sinks = sinks if sinks is None or sinks.dtype == wide else sinks.to(wide)
    bias = bias if bias is None or bias.dtype in (q.dtype, wide) else bias.to(wide)
    lengths = (int(q.shape[2]), int(k.shape[2])) if empty_rows == "attend" else None
    compiling = torch.compiler.is_compiling()
    code, text = (None, _text_of(argument(mask), lengths)) if compiling else (_code_of(mask, lengths, q.device), "")
    tables = _tables(q, k, position_table, cu_seqlens, cu_seqlens_k, wide)
    with outside:
        out, lse = sparse_attention_fwd(
            q, k, v, code, cu_seqlens, cu_seqlens_k, bias, sinks, *tables, scale, softcap or 0.0, score == "silu", norm,
            text,
        )  # fmt: skip
    out = out.to(io) if score == "cosine" else out
    if cu_seqlens is not None:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _at_once(q, k, v, mask, scale):
    """(out, lse) of a call without options, on a CPU, that nothing records, traces or casts; None of any other.

    What it was found to need is kept with the mask, for a call alike: a small one takes half the time that it does by
    way of the registered op (2 queries, 16 keys, two threads of a Sapphire Rapids: 15 us instead of 40).
    """
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        return None
    if not (q.is_cpu and k.is_cpu and v.is_cpu and _library.is_plain((q, k, v)) and _dispatch.allows("cpu")):
        return None
    if not isinstance(mask, masks.Mask) or type(scale) not in (float, int, type(None)):
        return None
    known = mask.__dict__.setdefault("_memory", {}).setdefault("_at_once", {})
    key = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, scale
    found = known.get(key)
    if found is None:
        check(q, k, v, mask, None, None, "softmax", None, "zero", None, None, None)
        if Backend("cpu", _plain).unavailable("cpu") or _empty(q, k, v):
            return None
        if len(known) >= 64:
            known.clear()
        known[key] = found = *_cpu_tiles(_code_of(mask, None, q.device), q, k, v), float(scale_of(q, scale))
    return _plain(q, k, v, *found)


_plain = native("sparse_attention_plain", "cpu")


def _tables(q, k, position_table, cu_seqlens, cu_seqlens_k, wide):
    """(position_table, q_pos, k_pos) and no times: positions count from the start of a packed sequence."""
    if position_table is None:
        return (None,) * 7
    positions = []
    for x, bounds in ((q, cu_seqlens), (k, cu_seqlens_k)):
        place = torch.arange(x.shape[2], device=x.device) if bounds is None else places(bounds, x.shape[2])[1]
        if position_table.dim() == 3:  # rows end to end, as wide as the table: a difference names its entry
            across = position_table.shape[2]
            width = (across + 1) // 2
            place = place // width * across + place % width
        positions.append(place.int())
    table = position_table[None] if position_table.dim() == 1 else position_table.flatten(1)
    return table.to(wide), *positions, *(None,) * 4


def _code_of(mask, lengths, device):
    """The mask's code; with lengths, that of the mask whose empty rows see everything.

    It is kept, so it has to be a plain tensor, whatever mode or transform the call is in.
    """
    code = mask.known_code(device) if lengths is None else None
    if code is not None:  # a tenth of a small call's time is saved
        return code
    # Leaving what there is not would take 6 us, and a decoding step's shifted mask is new.
    bare = torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None
    with contextlib.nullcontext() if bare else plain():
        return (mask if lengths is None else mask.attending_all_if_empty(*lengths)).code(device)


@constant
def _text_of(mask, lengths):
    mask = untraced(mask)
    with plain():
        return text_of(mask if lengths is None else mask.attending_all_if_empty(*lengths))


def _resolved(function, code: int, text: int):
    """`function` of the op's arguments less the text, with the code for it, and the edges of a table of times."""

    @functools.wraps(function)
    def run(*args):
        args = list(args)
        mask = args.pop(text)
        if args[code] is None:
            args[code] = mask_of(mask).code(args[0].device)
        times, edges = code + 8, code + 11
        if args[times] is not None and args[edges] is None:
            args[edges] = _edges(args[times].shape[1] - 1, args[times].device)
        return function(*args)

    return run


@functools.cache
def _edges(K, device):
    """HSTU's, one tensor for all calls: kernels read its values back once."""
    return bucket_edges(K).to(device)


def _allocate_fwd(q, k, v, *rest):
    """The outputs, uninitialized: what the fake returns and what the kernels fill."""
    B, H, L, _ = q.shape
    return q.new_empty((B, H, L, v.shape[3])), q.new_empty((B, H, L), dtype=_wide(q))


def _allocate_bwd(
    dout, dlse, q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, sinks, position_table, q_pos, k_pos, time_table, q_time,
    k_time, edges, out, lse, scale, softcap, silu, norm, text, need_dbias,
):  # fmt: skip
    def like(x):
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return *map(like, (q, k, v, bias if need_dbias else None, sinks, position_table, time_table)),


def _wide(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty(q, k, v, *rest):
    return q.numel() == 0 or k.numel() == 0 or v.numel() == 0


_TENSORS = 15  # of the forward's arguments


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors  # once: under activation checkpointing a read recomputes
    if dout is None and dlse is None:
        return (None,) * (_TENSORS + 5)
    dout = torch.zeros_like(out) if dout is None else dout
    need_dbias = inputs[6] is not None and ctx.needs_input_grad[6]
    found = sparse_attention_bwd(dout, dlse, *inputs, out, lse, *ctx.options, need_dbias)
    grads = dict(zip((0, 1, 2, 6, 7, 8, 11), found))
    if not need_dbias:
        del grads[6]
    return *(grads.get(i) if x is not None else None for i, x in enumerate(inputs)), *(None,) * 5


def _cpu_tiles(code, q, k, v):
    # A decoding step's shifted mask is new, and its plan would take 3 to 8 ms: of one tile of queries the kernel looks
    # at the mask itself, in 2 to 13 us for 4,096 keys and few queries.
    if q.shape[2] <= CPU_BLOCK[0]:
        return code, None, None, *CPU_BLOCK
    plan = masks.plan_of(code, q.shape[2], k.shape[2], CPU_BLOCK)
    return code, plan.ptr, plan.runs, *CPU_BLOCK


def _triton_tiles(code, q, k, v):
    from scalekern.triton_kernels.sparse_attention import block_of

    # Decoding: the plan for the keys that fill their last tile serves a tile's worth of steps (making one takes
    # 2 to 12 ms). Kernels guard the end, and what is full there is full without its last keys.
    (queries, keys), block = (q.shape[2], k.shape[2]), block_of(q, v)
    rounded = -(-keys // block[1]) * block[1] if queries <= block[0] else keys
    return code, masks.plan_of(code, queries, rounded, block)


def _code_for(mask, cu_seqlens, cu_seqlens_k, q, k):
    return mask if cu_seqlens is None else packed(mask, cu_seqlens, cu_seqlens_k, q.shape[2], k.shape[2])


def _fwd(kernel, tiles):
    """A kernel as fill(out, lse, *op arguments)."""

    def fill(out, lse, q, k, v, mask, cu_seqlens, cu_seqlens_k, *rest):
        *given, scale, softcap, silu, norm = rest  # bias, sinks, tables
        found = tiles(_code_for(mask, cu_seqlens, cu_seqlens_k, q, k), q, k, v)
        kernel(out, lse, q, k, v, *found, *given, scale_of(q, scale), softcap, silu, norm)

    return _like(kernel, _resolved(fill, 5, -1))


def _bwd(kernel, tiles):
    """A kernel as fill(*gradients, *op arguments); what is absent or not needed, an empty tensor there, is None here.

    dbias is summed in float32, in place.
    """

    def fill(*args):
        dq, dk, dv, dbias, dsinks, dposition, dtime, dout, dlse, q, k, v, mask, cu_seqlens, cu_seqlens_k, *rest = args
        *given, out, lse, scale, softcap, silu, norm, need_dbias = rest  # bias, sinks, tables
        found = tiles(_code_for(mask, cu_seqlens, cu_seqlens_k, q, k), q, k, v)
        sums = dbias.to(_wide(dbias)) if need_dbias else None
        others = [None if x is None else d for d, x in zip((dsinks, dposition, dtime), (given[1], given[2], given[5]))]
        kernel(
            dq, dk, dv, sums, *others, dout, dlse, out, lse, q, k, v, *found, *given, scale_of(q, scale), softcap, silu,
            norm,
        )  # fmt: skip
        if need_dbias and sums is not dbias:
            dbias.copy_(sums)

    return _like(kernel, _resolved(fill, 12, -2))


def _like(kernel, fill):
    for name in ("native_op", "triton_module"):
        setattr(fill, name, getattr(kernel, name, None))
    return fill


_FORWARD = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? bias, Tensor? sinks, "
    "Tensor? position_table, Tensor? q_pos, Tensor? k_pos, Tensor? time_table, Tensor? q_time, Tensor? k_time, "
    "Tensor? edges"
)
_OPTIONS = "float? scale, float softcap, bool silu, float norm, str text"

sparse_attention_fwd = _library.define(
    NAME,
    f"sparse_attention_fwd({_FORWARD}, {_OPTIONS}) -> (Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_fwd, _fwd(triton(NAME, "sparse_attention_fwd"), _triton_tiles))),
        Backend("cpu", filling(_allocate_fwd, _fwd(native("sparse_attention_fwd", "cpu"), _cpu_tiles))),
        Backend("reference", _resolved(reference_fwd, 3, -1)),
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
    "bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=(
        Backend("triton", filling(_allocate_bwd, _bwd(triton(f"{NAME}_bwd", "sparse_attention_bwd"), _triton_tiles))),
        Backend("cpu", filling(_allocate_bwd, _bwd(native("sparse_attention_bwd", "cpu"), _cpu_tiles))),
        Backend("reference", _resolved(reference_bwd, 5, -2)),
    ),
    fake=_allocate_bwd,
    empty=lambda dout, dlse, *rest: _empty(*rest),
)
