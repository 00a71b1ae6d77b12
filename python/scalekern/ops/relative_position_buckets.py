"""T5's buckets of distances, by which a learned table becomes sparse_attention's position_table."""

import math

import torch

NAME = "relative_position_buckets"


def relative_position_buckets(num_buckets=32, max_distance=128, *, bidirectional=True, device=None):
    """Of each distance k - q from -max_distance to max_distance its bucket, which is that of all distances beyond, too.

    `position_table=weight[buckets].T`, with T5's `relative_attention_bias.weight` (num_buckets, Hq), is T5's bias for
    sequences of any length, and gives the weight its gradient. T5 does not scale its scores: `scale=1`.

    Args:
        num_buckets: even, at least 4. Half of a side's buckets hold one distance each, the rest grow by a constant factor.
        max_distance: from which on all distances share a side's last bucket; more than a side's single distances.
        bidirectional: the first half of the buckets is for keys up to the query, the second for those after it (T5's
            encoder); else all are for keys up to the query, and those after it have bucket 0 (its decoder).
        device: of the result.

    Returns:
        int64 (2 max_distance + 1,).

    Raises:
        ValueError: num_buckets or max_distance is something else, named in the message.

    Source: Raffel et al., Exploring the Limits of Transfer Learning (T5), 2020, section 2.1.
    """
    if not isinstance(num_buckets, int) or num_buckets < 4 or num_buckets % 2:
        raise ValueError(f"{NAME}: num_buckets must be an even integer of at least 4, got {num_buckets!r}")
    side = num_buckets // 2 if bidirectional else num_buckets
    single = side // 2
    if not isinstance(max_distance, int) or max_distance <= single:
        raise ValueError(f"{NAME}: max_distance must be an integer above {single}, got {max_distance!r}")
    distance = torch.arange(-max_distance, max_distance + 1, device=device)
    apart = distance.abs() if bidirectional else (-distance).clamp(min=0)
    # In float32, in this order: T5's own edges, where a rounding decides.
    octaves = torch.log(apart.clamp(min=1).float() / single) / math.log(max_distance / single)
    grown = (single + (octaves * (side - single)).long()).clamp(max=side - 1)
    return torch.where(apart < single, apart, grown) + side * (distance > 0).long() * bool(bidirectional)
