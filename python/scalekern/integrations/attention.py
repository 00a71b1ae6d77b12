"""transformers' `attn_implementation="scalekern"`: what attention does with the masks of integrations._hf_masks.

    scalekern.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="scalekern")

Causal and bidirectional, sliding windows, chunks, padding on any side, packed sequences, soft caps, sink logits,
grouped key heads without repeating them, dynamic and static caches; under torch.compile with a graph break at masks and
attention. Not attention dropout, attention weights, paged
caches or learned selections of keys, which raise. A query that may see no key gives 0, as with "sdpa"; "eager"
averages all keys there.

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, Pv of the values.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from scalekern import masks
from scalekern.compat import _flex
from scalekern.integrations import _hf_masks
from scalekern.ops.sparse_attention import sparse_attention
from scalekern.ops.sparse_attention_decode import sparse_attention_decode

NAME = "scalekern"
_UNSUPPORTED = {
    "output_attentions": "gives no attention weights",
    "cache": "reads no paged cache",
    "indices": "takes no learned selection of keys",
    "block_indices": "takes no learned selection of keys",
}
_dense = WeakTensorKeyDictionary()  # a mask tensor, the same for all layers -> (its version and Lk, the mask)
_packed = WeakTensorKeyDictionary()  # cu_seqlens -> (its version and the other side's id, the mask)


def register(name: str = NAME) -> None:
    """Make `attn_implementation=name` known to transformers. A second call changes nothing.

    Args:
        name: what models ask for.

    Raises:
        ImportError: transformers is missing, or older than its attention and mask interfaces.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"register: transformers must have AttentionInterface and AttentionMaskInterface, got an error: {error}"
        ) from None
    _hf_masks.probe()
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _hf_masks.attention_mask)


@torch.compiler.disable  # the mask is a value of this call, which a graph would take for a constant
def attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, softcap=None, s_aux=None,
    sinks=None, position_bias=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs,
):  # fmt: skip
    """One layer's attention, as transformers' attention interface calls it.

    Args:
        module: the layer; read for `is_causal` where there is no mask.
        query: (B, Hq, Lq, P).   key: (B, Hkv, Lk, P).   value: (B, Hkv, Lk, Pv); float32, float16 or bfloat16.
        attention_mask: of `_hf_masks.attention_mask`; a bool (True: allowed) or additive tensor (B or 1, Hq or 1, Lq or
            1, at least Lk); a BlockMask; None: causal if the layer is and has more than one query, else everything.
        dropout: must be 0.
        scaling: P^-0.5 when None.
        is_causal: overrides the layer's, without a mask.
        softcap: of the scores, Gemma2's.
        s_aux, sinks: (Hq,), sink logits, gpt-oss's.
        position_bias: (B or 1, Hq or 1, Lq, Lk), added to the scores, T5's.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), packed sequences in a batch of 1; not needed where
            transformers found them in position_ids.

    Returns:
        (out (B, Lq, Hq, Pv), None)

    Raises:
        ValueError: dropout is above 0, or something is asked for that the kernels do not have.
    """
    if dropout > 0:
        raise ValueError(
            f"{NAME} attention: dropout must be 0, got {dropout}: set attention_dropout=0 in the model's "
            'config, or train with attn_implementation="eager"'
        )
    for name, reason in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f'{NAME} attention: {name} must be None: it {reason}; use attn_implementation="eager"')
    query, key = (x.to(value.dtype) for x in (query, key))  # under autocast rotated in float32
    options = dict(scale=scaling, softcap=softcap, sinks=sinks if s_aux is None else s_aux)
    if isinstance(attention_mask, _flex.BlockMask):
        out = _flex.attend(query, key, value, attention_mask, bias=position_bias, **options)
        return out.transpose(1, 2).contiguous(), None
    q_len, kv_len = query.shape[2], key.shape[2]
    limits = _one_token(query, key, value, attention_mask, position_bias, cu_seq_lens_q)
    if limits is not None:
        starts, lengths = limits
        out = sparse_attention_decode(query, key, value, lengths, starts=starts, **options)
        return out.transpose(1, 2).contiguous(), None
    mask, bias = None, position_bias
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = masks.causal if causal and q_len > 1 else None
        if mask is not None and kv_len > q_len:  # what lies behind the queries is a static cache's empty part
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            bias = None if bias is None else bias[..., :q_len]
    elif isinstance(attention_mask, _hf_masks.AttentionMask):
        mask, (start, stop) = attention_mask.mask, attention_mask.keys
        if stop - start < kv_len:
            key, value = key[:, :, start:stop], value[:, :, start:stop]
            bias = None if bias is None else bias[..., start:stop]
    else:
        given = attention_mask[..., :kv_len].expand(-1, -1, q_len, -1)
        if given.is_floating_point():
            bias = given if bias is None else bias + given
        else:
            mask = _remember(_dense, attention_mask, kv_len, lambda: masks.dense(given.bool()))
    if cu_seq_lens_q is not None and not getattr(attention_mask, "packed", False):
        mask = _within_sequences(mask, cu_seq_lens_q, cu_seq_lens_k)
    out = sparse_attention(query, key, value, mask, bias=bias, **options)
    return out.transpose(1, 2).contiguous(), None


def _one_token(query, key, value, mask, position_bias, cu_seq_lens):
    """(starts, lengths) of the keys that the only query sees, where the decoding kernel can take the call.

    It splits a row's keys over threads, and needs no plan: a quarter of the time of sparse_attention's tile of rows.
    """
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.shape[2] != 1 or trained or position_bias is not None or cu_seq_lens is not None:
        return None
    if mask is None:
        return None, torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
    return getattr(mask, "rows", None)


def _within_sequences(mask, cu_q, cu_k):
    cu_k = cu_q if cu_k is None else cu_k

    def build():
        return masks.segments(cu_seqlens=cu_q, kv_cu_seqlens=None if cu_k is cu_q else cu_k)

    segments = _remember(_packed, cu_q, id(cu_k), build)
    return _hf_masks.intern(segments if mask is None else mask & segments)


def _remember(known, tensor, key, build):
    """One mask a tensor, until somebody writes into it."""
    found, of, mask = known.get(tensor, (None, None, None))
    now = tensor if tensor.is_inference() else tensor._version  # who writes into the former leaves no other trace
    if found != key or not (torch.equal(of, now) if tensor.is_inference() else of == now):
        mask = _hf_masks.intern(build())
        known[tensor] = key, now.clone() if tensor.is_inference() else now, mask
    return mask
