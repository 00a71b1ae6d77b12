"""The oracle of merging attention over disjoint sets of keys.

Shape letters: N parts, Pv head dim of the values.
"""

import torch


def merge_attention(outs, lses):
    outs, lses = (x if isinstance(x, torch.Tensor) else torch.stack(tuple(x)) for x in (outs, lses))
    return merge_attention_fwd(outs, lses)


def weights_of(lses, lse):
    """exp(lses - lse), 0 where nothing was seen."""
    return torch.where(lses == float("-inf"), 0, (lses - torch.where(lse == float("-inf"), 0, lse)).exp())


def merge_attention_fwd(outs, lses):
    wide, kept = torch.promote_types(torch.promote_types(outs.dtype, lses.dtype), torch.float32), lses.dtype
    lses = lses.to(wide)
    most = lses.detach().amax(0) if lses.shape[0] else lses.new_full(lses.shape[1:], float("-inf"))
    weights = weights_of(lses, most)
    total = weights.sum(0)
    none = total == 0
    total = torch.where(none, 1, total)
    out = torch.where((weights == 0)[..., None], 0, outs * weights[..., None]).sum(0) / total[..., None]
    return out.to(outs.dtype), torch.where(none, float("-inf"), most + total.log()).to(kept)


def merge_attention_bwd(dout, dlse, outs, lses, lse):
    """(douts, dlses): with w = exp(lses - lse), w dout and w (dout . outs - dout . out + dlse)."""
    wide = torch.promote_types(torch.promote_types(outs.dtype, lses.dtype), torch.float32)
    weights, dout = weights_of(lses.to(wide), lse.to(wide)), dout.to(wide)
    own = torch.where(weights == 0, 0, (outs * dout).sum(-1))
    dlses = weights * (own - (weights * own).sum(0) + torch.where(lse == float("-inf"), 0, dlse.to(wide)))
    return (weights[..., None] * dout).to(outs.dtype), dlses.to(lses.dtype)
