"""What the ops over a cache check of its layout: contiguous, ragged or paged."""

import torch

from scalekern import _checks

INDEX = (torch.int32, torch.int64)


def check_layout(op, batch, lengths, circular, head_offsets, block_table, starts):
    if head_offsets is not None and block_table is not None:
        raise ValueError(f"{op}: pass one of head_offsets and block_table, got both")
    _checks.tensor(op, "lengths", lengths, dims=1, dtypes=INDEX)
    _checks.shape(op, "lengths", lengths, (batch,))
    if head_offsets is not None:
        _checks.tensor(op, "head_offsets", head_offsets, dims=1, dtypes=INDEX)
    if block_table is not None:
        _checks.tensor(op, "block_table", block_table, dims=2, dtypes=INDEX)
        _checks.shape(op, "block_table", block_table, (batch, None))
        if circular:
            raise ValueError(f"{op}: circular must be False with a block_table, got True")
    if starts is not None:
        _checks.tensor(op, "starts", starts, dims=1, dtypes=INDEX)
        _checks.shape(op, "starts", starts, (batch,))
        if head_offsets is not None or block_table is not None or circular:
            raise ValueError(f"{op}: starts must be None for other layouts than contiguous ones, got a tensor")
