// Arguments of sparse_attention on a CPU, shared by the ops and their per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

struct AttnTensor {
  void* data = nullptr;
  int64_t s[4] = {0, 0, 0, 0};  // strides, in elements; 0 along a dimension that is shared
  explicit operator bool() const { return data != nullptr; }
};

struct AttnSplit {  // of the query tiles
  int64_t begin, end;
};
// Where a split adds up the gradients of a tile of keys, if not in a slot of its own: where they belong, since it is
// alone in adding to them, or nowhere, since it does not.
constexpr int32_t kInPlace = -1, kNoSlot = -2;

// Of few queries: query heads [h, h + heads) of one key head, which read its keys together, and a piece of these keys,
// tiles[first] to tiles[first + count - 1] of 64, which one thread reads.
struct AttnHeads {
  int64_t b, h, heads, first_piece, pieces;
};
struct AttnPiece {
  int64_t group, first, count;
  int64_t partial;  // row of its partial sums
};

// Shape letters: B batch, Hq and Hkv heads, Lq and Lk lengths, P head dim, Pv value head dim.
struct AttnArgs {
  int64_t batch, heads, kv_heads, q_len, kv_len, dim, value_dim;
  int64_t plan_heads, plan_batches, block_q, block_k;
  int dtype, bias_dtype, wide_lse;  // enum Dtype of common/tensor.h
  bool silu;
  double scale, softcap, norm;
  const int32_t *code, *ptr, *runs;
  int64_t mask_depth;  // blocks of 64 words that the evaluation of a program stacks up
  AttnTensor q, k, v, out, lse, bias;
  const void* sinks;
  int64_t sinks_stride;
  // Tables (1 or Hq, entries), absent or numbers of the type of lse; all their vectors' strides are s[0].
  AttnTensor position, q_pos, k_pos, time, q_time, k_time, edges;
  int64_t position_heads, positions, time_heads, edge_count;
  // backward
  AttnTensor dout, dlse, dq, dk, dv, dbias, dposition, dtime;
  void* dsinks;
  int64_t dsinks_stride;
  const AttnSplit* splits;
  const int32_t* slots;  // [split][key tile]
  int64_t split_count, slot_count;  // of one (b, kv head)
  // Items of the backward along B and Hkv: as many, or fewer where dbias or tables are summed. Summed over B by several
  // items, dbias has a partial sum for each.
  int64_t batch_groups, head_groups;
  bool partial_dbias;
  int64_t bias_heads;  // 1 or Hq
  // few queries: the mask's bits [list][query][tile of 64 keys], the groups of heads, the pieces of their keys
  const uint64_t* bits;
  int64_t key_tiles;
  const int32_t* tiles;
  const AttnHeads* groups;
  const AttnPiece* pieces;
  int64_t group_count, piece_count, partial_count;
};

constexpr int64_t kPieceTiles = 4;  // of 64 keys

}  // namespace scalekern

SCALEKERN_DECLARE(void, attention_fwd, (const scalekern::AttnArgs&))
SCALEKERN_DECLARE(void, attention_few, (const scalekern::AttnArgs&))
SCALEKERN_DECLARE(void, attention_bwd, (const scalekern::AttnArgs&))
// to (B, H, Lq, Lk) contiguous bools; only code, mask_depth, batch, heads, q_len, kv_len are read.
SCALEKERN_DECLARE(void, attention_mask, (const scalekern::AttnArgs&, bool* to))
