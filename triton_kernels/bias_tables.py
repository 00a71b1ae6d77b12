"""Bias from small tables (HSTU, T5): what a pair of a query and a key adds to its score, gathered while a tile is made.

    position_table[h, clamp(k_pos[k] - q_pos[q], -R, R) + R]      time_table[h, n]

n: the number of edges, a sorted list of K integers, that are at most max(1, |q_time[q] - k_time[k]|). A table of one
row serves every head.

The bucket is exact. An integer's leading bit and the two after it name one of 252 cells, and a table of these says how
many edges lie at or below the cell's least integer; the rest is a bisection among the edges inside the cell. Where
edges grow by more than a quarter each, as HSTU's do (by 35 %), at most one lies inside, and the bisection is one
comparison: three gathers from L1 a pair, where one among K = 128 edges alone would take nine. A cell with n edges takes
bit_length(n) comparisons, at most 8 for 255, for all cells alike.

Kernels take all of it as one argument, a tuple (None: no tables), of which elements are named by the constants below.
"""

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from .common import index, meta

POSITION, Q_POS, K_POS, REACH, STRIDE_POSITION = (tl.constexpr(n) for n in range(5))
TIME, Q_TIME, K_TIME, EDGES, CELLS, K_EDGES, STRIDE_TIME, STEPS, STEP = (tl.constexpr(n) for n in range(5, 14))
PARTS = 4  # cells between two powers of two

# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def distance_of(tables, q, k, in_q, in_k):
    """k_pos - q_pos of [X, 1] and [1, Y], either way round; not clamped."""
    return tl.load(tables[K_POS] + k, mask=in_k, other=0) - tl.load(tables[Q_POS] + q, mask=in_q, other=0)


@triton.jit
def entry_of(tables, distance):
    reach = tables[REACH]
    return tl.minimum(tl.maximum(distance, -reach), reach) + reach


@triton.jit
def bucket_of(tables, q, k, in_q, in_k):
    """The bucket of the time between each query and key."""
    apart = tl.load(tables[Q_TIME] + q, mask=in_q, other=0) - tl.load(tables[K_TIME] + k, mask=in_k, other=0)
    apart = tl.maximum(tl.where(apart < 0, -apart, apart), 1)
    # The mask clears the eighth bit after the leading one and keeps those before it: no rounding carries into a cell.
    bits = (apart & ~(apart >> 8)).to(tl.float32).to(tl.int32, bitcast=True)
    found = tl.load(tables[CELLS] + ((bits >> 21) - 508))  # 1 is 127 << 23, cell 127 * PARTS
    step = tables[STEP]
    for _ in tl.static_range(tables[STEPS]):
        further = found + step
        inside = further <= tables[K_EDGES]
        edge = tl.load(tables[EDGES] + further - 1, mask=inside, other=0)
        found = tl.where(inside & (edge <= apart), further, found)
        step = step // 2
    return found


@triton.jit
def _gathered(tables, h, q, k, in_q, in_k):
    value = None
    if tables[POSITION] is not None:
        entry = entry_of(tables, distance_of(tables, q, k, in_q, in_k))
        value = tl.load(tables[POSITION] + h * tables[STRIDE_POSITION] + entry)
    if tables[TIME] is not None:
        more = tl.load(tables[TIME] + h * tables[STRIDE_TIME] + bucket_of(tables, q, k, in_q, in_k))
        value = more if value is None else value + more
    return value


@triton.jit
def bias_of(bias_ptr, stride_q, stride_k, tables, h, q, k, in_q, in_k, INT64: tl.constexpr):
    """What is added to the scores of q [X, 1] and k [1, Y], either way round: a dense bias, tables, or None."""
    bias = None
    if bias_ptr is not None:
        pointers = bias_ptr + index(q, INT64) * stride_q + index(k, INT64) * stride_k
        bias = tl.load(pointers, mask=in_q & in_k, other=0.0)
    if tables is not None:
        shape: tl.constexpr = (q + k).shape
        added = tl.zeros(shape, (tables[TIME] if tables[POSITION] is None else tables[POSITION]).dtype.element_ty)
        if h >= 0:  # always; the compiler would pipeline the gathers too, tiles of them through shared memory
            added = _gathered(tables, h, q, k, in_q, in_k)
        bias = added if bias is None else bias.to(added.dtype) + added
    return bias


# --- host side --------------------------------------------------------------------------------------------------------

_cells = WeakTensorKeyDictionary()


def cells_of(edges: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the edges at or below each cell's least integer, int32 (252,); the steps of the bisection inside a cell).

    Made once for a tensor of edges, whose values are read back then; it must not be changed in place.
    """
    if edges.is_meta:
        return meta(63 * PARTS, dtype=torch.int32), 1
    if edges not in _cells:
        least = [((PARTS + part) << power) // PARTS for power in range(63) for part in range(PARTS)]
        least = torch.tensor([*least, 2**63 - 1])
        host = edges.cpu()
        first = torch.searchsorted(host, least[:-1], right=True)
        last = torch.searchsorted(host, torch.cat([least[1:-1] - 1, least[-1:]]), right=True)
        inside = int((last - first).clamp(min=0).max())
        _cells[edges] = first.int().to(edges.device), inside.bit_length()
    return _cells[edges]


def tables_of(position_table, q_pos, k_pos, time_table, q_time, k_time, edges) -> tuple | None:
    """The kernels' argument."""
    if position_table is None and time_table is None:
        return None
    position, time = (None,) * 3 + (0, 0), (None,) * 5 + (0, 0, None, 0)
    if position_table is not None:
        rows, size = position_table.shape
        position = (*_contiguous(position_table, q_pos, k_pos), (size - 1) // 2, size if rows > 1 else 0)
    if time_table is not None:
        rows, size = time_table.shape
        cells, steps = cells_of(edges)
        time = (*_contiguous(time_table, q_time, k_time, edges), cells, size - 1, size if rows > 1 else 0)
        time += (tl.constexpr(steps), 1 << steps >> 1)
    return position + time


def _contiguous(*tensors):
    return (t.contiguous() for t in tensors)


def sample_tables(heads: int, length: int, dtype: torch.dtype) -> tuple:
    """Both tables on meta tensors."""
    pos, time = meta(length, dtype=torch.int32), meta(length, dtype=torch.int64)
    edges = meta(128, dtype=torch.int64)
    return tables_of(meta(heads, 2047, dtype=dtype), pos, pos, meta(heads, 129, dtype=dtype), time, time, edges)
