// What one tile of queries sees, found from the mask's bits when a call comes: the runs that a plan would list.
//
// A decoding loop shifts its mask by a token a step, and so no step finds the plan of the one before. Making it in
// Python takes 3 to 8 ms; the bits of 4,096 keys take 2 to 8 us for one query, 4 to 13 for twelve.
#pragma once
#include <vector>

#include "common/view.h"
#include "sparse_attention/mask.h"

namespace {

constexpr int64_t kKeyTile = kMaskBlock;

struct QueryTile {
  int64_t tiles;                   // of keys
  std::vector<int32_t> ptr, runs;  // as in a plan of (64, 64), for every batch and head that the mask tells apart
  std::vector<MaskWord> words;     // [list][query][tile], for `keep` only; 0 past the last key

  QueryTile(const int32_t* code, int64_t mask_depth, int64_t queries, int64_t keys, bool keep)
      : tiles(scalekern::ceil_div(keys, kKeyTile)) {
    std::vector<MaskWord> stack(mask_depth * kMaskBlock);
    const int64_t heads = code[0], lists = heads * code[1];
    if (keep) words.resize(lists * queries * tiles);
    ptr.push_back(0);
    for (int64_t list = 0; list < lists; ++list) {
      int32_t last = -1, end = 0;  // kind of the run that ends before tile `end`
      for (int64_t t = 0; t < tiles; ++t) {
        const MaskWord inside = low_bits(std::min(kKeyTile, keys - t * kKeyTile));
        evaluate_mask(code, list / heads, list % heads, 0, t * kKeyTile, stack.data(), int(queries));
        MaskWord some = 0, every = inside;
        for (int64_t i = 0; i < queries; ++i) {
          const MaskWord word = stack[i] & inside;
          some |= word, every &= word;
          if (keep) words[(list * queries + i) * tiles + t] = word;
        }
        if (some == 0) continue;
        const int32_t kind = every == inside ? 0 : 1;
        if (kind == last && end == t) ++runs[runs.size() - 2];
        else runs.insert(runs.end(), {int32_t(t), 1, kind});
        last = kind, end = int32_t(t + 1);
      }
      ptr.push_back(int32_t(runs.size() / 3));
    }
  }
};

}  // namespace
