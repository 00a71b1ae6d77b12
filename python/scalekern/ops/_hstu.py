"""The mask of HSTU as code, from tensors: no value is read on the host before a plan is made.

Within a sequence a row sees one interval of keys (two when the attention is not causal), and itself.
"""

import torch

from scalekern.masks._code import AND, BLOCKS, NOT, OR, SAME, WINDOW, WORDS


def places(offsets, total: int):
    """Of each packed token its sequence and its place in it, (total,) each."""
    token = torch.arange(total, device=offsets.device)
    sequence = torch.searchsorted(offsets.to(token.dtype), token, right=True) - 1
    return sequence, token - offsets[sequence]


def rows_of(offsets, queries: int, keys: int):
    """Of each query its sequence, its place in it, and which key it is: (queries,) each.

    Fewer queries than keys: the newest of each sequence, equally many of each.
    """
    offsets = offsets.long()
    row = torch.arange(queries, device=offsets.device)
    if queries == keys:
        return *places(offsets, keys), row
    new = queries // (offsets.shape[0] - 1)
    sequence = row // new
    place = offsets[1:][sequence] - offsets[:-1][sequence] - new + row % new
    return sequence, place, offsets[:-1][sequence] + place


def code(offsets, num_targets, queries: int, keys: int, causal, max_attn_len, contextual_len, min_full_attn_len):
    """int32, as _code describes it."""
    offsets = offsets.long()
    lengths = offsets[1:] - offsets[:-1]
    key_sequence, _ = places(offsets, keys)
    sequence, place, _ = rows_of(offsets, queries, keys)
    start, length = offsets[:-1][sequence], lengths[sequence]
    context = contextual_len - 1 if contextual_len else 0
    last = length - context
    if num_targets is not None:
        last = last - num_targets.long()[sequence]
    number = (place - context).clamp(min=0)
    number = torch.minimum(number, last) if num_targets is not None else number
    first_of = lambda n: torch.where(n > 0, n + context, 0)  # the first token with a number of at least n
    low, high = torch.zeros_like(number), first_of(number)
    reach = max_attn_len if max_attn_len else None
    full = (
        number >= last - min_full_attn_len
        if reach and min_full_attn_len
        else torch.zeros_like(number, dtype=torch.bool)
    )
    if reach:
        low = torch.where(full, 0, first_of(number - reach))
    if contextual_len:
        context_row = number == 0
        low, high = torch.where(context_row, 0, low), torch.where(context_row, (last + context) * (last > 0), high)
    intervals = [(low, high)]
    if not causal:
        beyond = number + 1 + context
        if num_targets is not None:  # whoever has the last number sees nobody after it
            beyond = torch.where(number < last, beyond, length)
        until = length if not reach else torch.where(full, length, number + reach + 1 + context)
        if num_targets is not None and reach:
            until = torch.where(number + reach >= last, length, until)
        intervals.append((beyond, until))
    tables, rows = [], []
    absolute = lambda limit: start + torch.minimum(limit.clamp(min=0), length)
    for number_of, (low, high) in enumerate(intervals):
        rows += [(BLOCKS, absolute(high)), (BLOCKS, absolute(low)), (NOT,), (AND,)]
        rows += [(OR,)] if number_of else []
    rows += [(BLOCKS, absolute(place + 1)), (BLOCKS, absolute(place)), (NOT,), (AND,), (OR,)]
    count, at = len(rows) + 2, 3 + 2 + WORDS * (len(rows) + 2)
    head = [1, 1, 3, count, 0]
    for opcode, *table in rows:
        head += [opcode, 0, 0, 0, *([at + sum(map(len, tables)), queries] if table else [0, 0]), *[0] * (WORDS - 6)]
        tables += table
    first = at + sum(map(len, tables))
    head += [SAME, 0, 0, 0, first, queries, first + queries, keys, 1, *[0] * (WORDS - 9), AND, *[0] * (WORDS - 1)]
    tables += [sequence, key_sequence]
    return torch.cat([torch.tensor(head, device=offsets.device), *tables]).int()
