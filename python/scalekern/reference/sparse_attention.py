"""The oracle of attention under a mask: every score is computed, and what the mask hides is put out.

Shape letters: B batch, Hq query heads, Hkv key heads, Lq, Lk lengths, P head dim, Pv of the values.
"""

import torch
import torch.nn.functional as F

from scalekern import masks
from scalekern.masks import _code
from scalekern.masks._packed import packed

SCORES = ("softmax", "silu", "cosine")
HOTTEST = 4.605170185988092  # log 100, where Swin V2 clamps its log temperatures


def sparse_attention(
    q, k, v, mask=None, *, scale=None, bias=None, score="softmax", temperature=None, norm=1.0, return_lse=False,
    empty_rows="zero", sinks=None, softcap=None, position_table=None, cu_seqlens=None,
    cu_seqlens_k=None,
):  # fmt: skip
    if cu_seqlens is not None:
        options = dict(scale=scale, score=score, temperature=temperature, norm=norm, sinks=sinks, softcap=softcap)
        options["position_table"] = position_table
        found = by_sequence(q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, options)
        return found if return_lse else found[0]
    io = q.dtype
    if score == "cosine":  # logits up to 100 show what rounding would do to the vectors
        q, k = unit(q, temperature, wide_dtype(q)), unit(k, None, wide_dtype(k))
        scale = 1.0 if scale is None else scale
    mask = masks.everything if mask is None else mask
    visible = mask.to_dense(q.shape[2], k.shape[2]).to(q.device)
    if empty_rows == "attend":
        visible = visible | ~visible.any(-1, keepdim=True)
    if position_table is not None and position_table.dim() == 3:
        relative = image_bias(position_table)
        bias = relative if bias is None else bias + relative
    elif position_table is not None:
        R = (position_table.shape[-1] - 1) // 2
        apart = (torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]).clamp(-R, R).to(q.device)
        relative = position_table[..., R + apart]
        bias = relative if bias is None else bias + relative
    out, lse = attend(q, k, v, visible, bias, sinks, scale, softcap or 0.0, score == "silu", norm)
    return (out.to(io), lse) if return_lse else out.to(io)


def image_bias(table):
    """(Hq or 1, 2 h - 1, 2 w - 1) by rows and columns between -> (1, Hq or 1, h w, h w), row after row of the image."""
    h, w = ((n + 1) // 2 for n in table.shape[1:])
    row, column = torch.arange(h, device=table.device), torch.arange(w, device=table.device)
    rows = (row - row[:, None] + h - 1)[:, None, :, None]  # of (query row, query column, key row, key column)
    columns = (column - column[:, None] + w - 1)[None, :, None, :]
    return table[:, rows, columns].reshape(1, table.shape[0], h * w, h * w)


def by_sequence(q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, options):
    """One packed sequence at a time: q (total, Hq, P) and so on -> out (total, Hq, Pv), lse (Hq, total)."""
    bounds = cu_seqlens.tolist()
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    mask = masks.everything if mask is None else mask
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0, dtype=wide_dtype(q))]
    for i, (begin, end, first, last) in enumerate(zip(bounds, bounds[1:], bounds_k, bounds_k[1:])):
        part = [x[a:b].transpose(0, 1)[None] for x, a, b in ((q, begin, end), (k, first, last), (v, first, last))]
        if bias is not None:
            options["bias"] = bias[:, :, begin:end, first:last]
        table = mask.to_dense(end - begin, last - first)
        rule = masks.dense(table[i if len(table) > 1 else 0][None]) if table.numel() else None
        out, lse = sparse_attention(*part, rule, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


def unit(x, temperature=None, dtype=None):
    """Each head's vector at length 1, or at its temperature, exp(min(t, log 100)) (Swin V2); dtype: x's when None."""
    wide = F.normalize(x.to(wide_dtype(x)), dim=-1, eps=1e-12)
    if temperature is not None:
        wide = wide * temperature.to(wide.dtype).clamp(max=HOTTEST).exp()[:, None, None]
    return wide.to(dtype or x.dtype)


def wide_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def group_of(q, k):
    """Query heads that share a key head."""
    return q.shape[1] // max(k.shape[1], 1)


def scale_of(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def attend(q, k, v, visible, bias, sinks, scale, softcap, silu, norm):
    """(out, lse), with gradients by autograd; visible broadcasts to (B, Hq, Lq, Lk)."""
    scale = scale_of(q, scale)
    wide, group = wide_dtype(q), group_of(q, k)
    k, v = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    s, _ = _scores(q.to(wide), _seen(k, visible), bias, scale, softcap)
    if silu:
        p = torch.where(visible, F.silu(s) * norm, 0)
        return _values(p, v, visible).to(q.dtype), s.new_zeros(s.shape[:-1])
    s = torch.where(visible, s, float("-inf"))
    some = visible.any(-1)
    # By way of the largest score, as kernels do it: both outputs are NaN where that is inf, but not where it is -inf.
    safe = torch.where(some[..., None], s, 0)
    top = safe.detach().amax(-1, keepdim=True) if s.shape[-1] else safe.new_zeros(*s.shape[:-1], 1)
    top = torch.where(top == float("-inf"), 0, top)
    lse = torch.where(some, (top + (safe - top).exp().sum(-1, keepdim=True).log())[..., 0], float("-inf"))
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide)[:, None])
    p = torch.where(visible, (s - torch.where(lse == float("-inf"), 0, lse)[..., None]).exp(), 0)
    return _values(p, v, visible).to(q.dtype), lse


def _scores(q, k, bias, scale, softcap):
    """Scores, and the derivative of the cap or None."""
    s = (q @ k.transpose(-1, -2)) * scale
    slope = None
    if softcap:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    return (s if bias is None else s + bias.to(s.dtype)), slope


def _seen(x, visible):
    """Keys without those that no row sees, whatever they hold."""
    return torch.where(visible.any(-2)[..., None], x, 0)


def _values(p, v, visible):
    """p v, in which a value that is not finite reaches the rows that see it alone: 0 NaN would be NaN."""
    finite = torch.isfinite(v)
    if finite.all():
        return p @ v
    out = p @ torch.where(finite, v, 0)
    for j in (~finite).any(-1).any(1).any(0).nonzero().flatten().tolist():
        special = torch.where(finite[..., j, :], 0, v[..., j, :])[..., None, :]
        out = out + torch.where(visible[..., j, None], p[..., j, None] * special, 0)
    return out


def sparse_attention_fwd(
    q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, sinks, position_table, q_pos, k_pos, time_table, q_time, k_time,
    edges, scale, softcap, silu, norm,
):  # fmt: skip
    """The registered op: the mask as its code, tables with what they are looked up by."""
    tables = Tables(q, position_table, q_pos, k_pos, time_table, q_time, k_time, edges)
    visible = dense_of(mask, cu_seqlens, cu_seqlens_k, q, k)
    return attend(q, k, v, visible, tables.added_to(bias), sinks, scale, softcap, silu, norm)


def sparse_attention_bwd(
    dout, dlse, q, k, v, mask, cu_seqlens, cu_seqlens_k, bias, sinks, position_table, q_pos, k_pos, time_table, q_time,
    k_time, edges, out, lse, scale, softcap, silu, norm, need_dbias,
):  # fmt: skip
    """Gradients of q, k, v, bias, sinks and the tables; an empty tensor for what is absent or not needed."""
    visible, wide, group = dense_of(mask, cu_seqlens, cu_seqlens_k, q, k), wide_dtype(q), group_of(q, k)
    tables = Tables(q, position_table, q_pos, k_pos, time_table, q_time, k_time, edges)
    scale = scale_of(q, scale)
    dout, wide_q = dout.to(wide), q.to(wide)
    wide_k, wide_v = (_seen(x.to(wide).repeat_interleave(group, 1), visible) for x in (k, v))
    s, slope = _scores(wide_q, wide_k, tables.added_to(bias), scale, softcap)
    dp = dout @ wide_v.transpose(-1, -2)
    dsinks = q.new_empty(0)
    if silu:
        sigmoid = torch.sigmoid(s)
        p = torch.where(visible, s * sigmoid * norm, 0)
        ds = torch.where(visible, dp * norm * sigmoid * (1 + s * (1 - sigmoid)), 0)
    else:
        some = lse != float("-inf")
        p = torch.where(visible & some[..., None], (s - torch.where(some, lse, 0)[..., None]).exp(), 0)
        delta = (dout * out.to(wide)).sum(-1)
        delta = delta if dlse is None else delta - torch.where(some, dlse, 0)
        ds = torch.where(visible, p * (dp - delta[..., None]), 0)
        if sinks is not None:
            dsinks = -((sinks.to(wide)[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if need_dbias else q.new_empty(0)
    dtables = tables.gradients(ds)
    ds = (ds if slope is None else ds * slope) * scale
    dq = (ds @ wide_k).to(q.dtype)
    dk, dv = ((x.transpose(-1, -2) @ y).unflatten(1, (k.shape[1], group)).sum(2) for x, y in ((ds, wide_q), (p, dout)))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks, *dtables


class Tables:
    """What is added to scores from small tables: (1 or Hq, T) by distance, (1 or Hq, K + 1) by the time between."""

    def __init__(self, q, position_table, q_pos, k_pos, time_table, q_time, k_time, edges):
        self.found, self.like = [], q
        if position_table is not None:
            R = (position_table.shape[1] - 1) // 2
            self.found.append((position_table, (k_pos - q_pos[:, None]).clamp(-R, R).long() + R))
        else:
            self.found.append(None)
        if time_table is not None:
            apart = (q_time[:, None] - k_time).abs().clamp(min=1)
            self.found.append((time_table, torch.searchsorted(edges, apart, right=True)))
        else:
            self.found.append(None)

    def added_to(self, bias):
        for entry in self.found:
            if entry is not None:
                table, index = entry
                bias = table[:, index] if bias is None else bias.to(table.dtype) + table[:, index]
        return bias

    def gradients(self, ds):
        """ds (B, Hq, Lq, Lk) -> the gradient of each table."""
        dtables = []
        for entry in self.found:
            if entry is None:
                dtables.append(self.like.new_empty(0))
                continue
            table, index = entry
            total = ds.new_zeros(ds.shape[1], table.shape[1]).index_add_(1, index.flatten(), ds.sum(0).flatten(1))
            dtables.append((total.sum(0, keepdim=True) if table.shape[0] == 1 else total).to(table.dtype))
        return dtables


def dense_of(code, cu_seqlens, cu_seqlens_k, q, k):
    """(1 or B, 1 or Hq, Lq, Lk), by the code itself, as kernels read it."""
    host = (code if cu_seqlens is None else packed(code, cu_seqlens, cu_seqlens_k, q.shape[2], k.shape[2])).cpu()
    programs, batches = _code.read(host)
    rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    b = torch.arange(batches)[:, None, None]
    found = [program(rows, keys, b, torch.tensor(head)) for head, program in enumerate(programs)]
    return torch.stack([f.expand(batches, len(rows), len(keys)) for f in found], 1).to(q.device)
