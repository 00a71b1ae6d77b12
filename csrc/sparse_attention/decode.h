// Arguments of attention over a cache (decoding), shared by the op and its per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// The keys of one batch row and key head that some query of its group sees, in ascending order of their positions: the
// first `sink` ones, then those from position `low` on. A split is a piece of that list, read by one thread.
struct DecodeHead {
  int64_t length, sink, low, count, capacity, base;  // base: of the head's slots in a ragged cache
  int64_t first_split, splits;
};

struct DecodeSplit {
  int64_t head, first, count;
};

// Numbers of every slot, (B or pages, Hkv, slots, channels); strides in elements.
struct DecodePart {
  const void* data;
  int64_t b, h, s, p;
};

// Keys or values: numbers of q's dtype, or for bits 8 and 4 codes with a scale and an offset (or none) a group of
// channels: number = scale * code + offset.
struct DecodeCache {
  DecodePart codes, scales, offsets;
  int bits;  // 0: no codes
  bool half_scales;
  int64_t group;
};

// Shape letters: B batch, Hq query heads, Hkv key heads, T new tokens, P head dim, Pv of the values. Strides in
// elements.
struct DecodeArgs {
  int64_t batch, key_heads, group, tokens, dim, value_dim;
  int64_t page;  // slots of one, 0: not paged
  int64_t sink;
  bool circular;
  int dtype;              // enum Dtype of q, caches without codes and out
  double scale, softcap;  // softcap 0: none
  void *out, *lse;        // (B, Hq, T, Pv) and (B, Hq, T), contiguous; lse is float, or double when the others are
  const void *q, *sinks, *table;
  DecodeCache k, v;
  bool table_is_int64;
  int64_t q_b, q_h, q_t, q_p, sinks_h, table_b, table_j;
  const int64_t* windows;  // (Hq,), of each query head; null: no limit
  const DecodeHead* heads;
  const DecodeSplit* splits;
  int64_t split_count;
  void* partials;  // split_count rows x (2 + Pv): running maximum, sum, and the values' sum, in the compute type

  int64_t rows() const { return group * tokens; }
};

constexpr int64_t kDecodeSplit = 256;

}  // namespace scalekern

SCALEKERN_DECLARE(void, sparse_attention_decode, (const scalekern::DecodeArgs&))
