"""What sparse_attention refuses, by name."""

import torch

from scalekern import _checks, masks
from scalekern.masks._traced import argument, constant, untraced
from scalekern.reference.sparse_attention import SCORES

NAME = "sparse_attention"


@constant
def _sizes_of(mask):
    mask = untraced(mask)
    return mask.heads, mask.batches


def check_packed(q, k, v, cu_seqlens, cu_seqlens_k, empty_rows):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, x, dims=3, dtypes=_checks.FLOATING)
    _checks.bounds(NAME, "cu_seqlens", cu_seqlens, q.shape[0])
    if cu_seqlens_k is not None:
        _checks.tensor(NAME, "cu_seqlens_k", cu_seqlens_k, dims=1)
        _checks.shape(NAME, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape))
    _checks.bounds(NAME, "cu_seqlens_k", cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, k.shape[0])
    if empty_rows != "zero":
        raise ValueError(f"{NAME}: empty_rows must be 'zero' for packed sequences, got {empty_rows!r}")
    _checks.same_device(NAME, "q", q, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)


def check(q, k, v, mask, cu_seqlens, bias, score, temperature, empty_rows, sinks, softcap, position_table):
    # The usual outcome of what follows is told in few expressions: 4 us of a decoding step's 34.
    dtype = getattr(q, "dtype", None)
    alike = all([isinstance(x, torch.Tensor) and x.dim() == 4 and x.dtype == dtype for x in (q, k, v)])
    if not alike or dtype not in _checks.FLOATING:
        for name, x in (("q", q), ("k", k), ("v", v)):
            _checks.tensor(NAME, name, x, dims=4, dtypes=_checks.FLOATING)
            _checks.dtype(NAME, name, x, q.dtype)
    (batch, heads, queries, dim), (key_batch, key_heads, keys, key_dim) = q.shape, k.shape
    value_batch, value_heads, value_keys, value_dim = v.shape
    if key_batch != batch or key_dim != dim:
        _checks.shape(NAME, "k", k, (batch, None, None, dim))
    if value_batch != batch or value_heads != key_heads or value_keys != keys:
        _checks.shape(NAME, "v", v, (batch, key_heads, keys, None))
    if not 1 <= dim <= 256 or not 1 <= value_dim <= 256:
        raise ValueError(f"{NAME}: the last axes of q and v must have 1 to 256 elements, got {dim} and {value_dim}")
    if heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"{NAME}: the heads of k must divide the {heads} heads of q, got {key_heads}")
    if not isinstance(mask, masks.Mask):
        raise TypeError(f"{NAME}: mask must be a scalekern.masks.Mask, got {type(mask).__name__}")
    mask_heads, mask_batches = _sizes_of(argument(mask))
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
    if position_table is not None:
        _check_table(position_table, heads, queries, keys, cu_seqlens is not None)
    if score != "softmax":
        _checks.choice(NAME, "score", score, SCORES)
    if empty_rows != "zero":
        _checks.choice(NAME, "empty_rows", empty_rows, ("zero", "attend"))
    if temperature is not None and score != "cosine":
        raise ValueError(f"{NAME}: temperature must be None unless score is 'cosine', got score {score!r}")
    if sinks is not None and score == "silu":
        raise ValueError(f"{NAME}: sinks must be None for score 'silu', which has no sum, got a tensor")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{NAME}: softcap must be positive, got {softcap!r}")
    more = bias is not None or temperature is not None or sinks is not None or position_table is not None
    if more or not q.device == k.device == v.device:
        _checks.same_device(NAME, "q", q, k=k, v=v, bias=bias, temperature=temperature, sinks=sinks,
                            position_table=position_table)  # fmt: skip


def _check_table(table, heads, queries, keys, packed):
    _checks.tensor(NAME, "position_table", table, dims=(1, 2) if packed else (1, 2, 3), dtypes=_checks.FLOATING)
    _checks.shape(NAME, "position_table", table, (None,), *((h, *sizes) for h in (heads, 1) for sizes in ((None,), (None, None))))
    sizes = table.shape[1:] if table.dim() == 3 else table.shape[-1:]
    if any(n % 2 == 0 for n in sizes):
        raise ValueError(f"{NAME}: position_table must have an odd number of entries an axis, got {tuple(table.shape)}")
    if table.dim() == 3 and not (sizes[0] + 1) * (sizes[1] + 1) == 4 * queries == 4 * keys:
        image = (sizes[0] + 1) // 2, (sizes[1] + 1) // 2
        raise ValueError(f"{NAME}: q and k must have the {image} tokens of position_table's image, got {queries} and {keys}")
