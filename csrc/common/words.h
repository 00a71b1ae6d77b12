// Products of tiles as common/amx.h has them, without tile registers: words of two bfloat16.
//
//   c[r][lane] += sum over words of a[r][word] . b[word][lane]     R rows of a, C vectors of 16 lanes of b
//
// Rows of a are read as they lie, a word broadcast to all lanes; b is in words of a column, as for tile registers.
// Bound: R C products for R + C loads, of which a cycle has two. 8 x 2 of a Zen 5 at 4.2 GHz, all in L1: 0.119 ns a
//   product, its limit; 8 x 3 and 12 x 2 the same; 8 x 1 0.139 and 16 x 1 0.13, by loads (two sets of sums, so that
//   none waits for itself: the same).
// Attention in bfloat16, 4 heads of 4,096, two cores of it, medians in turns, before (as floats) and now: window 3.7 to
//   2.6 ms, backward with it 12.6 to 8.7; causal 21 to 13, 78 to 48. float32 in three bfloat16 parts would take longer
//   than its own products. Bytes have products of their own, of codes as they are stored (cpu_quant_row_block.h).
#pragma once
#include "common/amx.h"

#if defined(__AVX512F__)
namespace {

// Rows of a are `pitch` bytes apart, words of b `step`, its vectors `next`.
template <int R, int C>
static inline __attribute__((always_inline)) void add_words(
    const void* a, int64_t pitch, const void* b, int64_t step, int64_t next, int64_t words, __m512 (&sums)[R][C]) {
  const char *word = static_cast<const char*>(a), *row = static_cast<const char*>(b);
  for (int64_t i = 0; i < words; ++i, word += 4, row += step) {
    __m512i lanes[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) lanes[c] = _mm512_loadu_si512(row + c * next);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t number;
      __builtin_memcpy(&number, word + r * pitch, 4);
      const __m512i all = _mm512_set1_epi32(number);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = add_bf16_pairs(sums[r][c], all, lanes[c]);
    }
  }
}

}  // namespace

#endif
