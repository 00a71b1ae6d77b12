// Products of tiles as common/amx.h has them, without tile registers: words of four bytes or of two bfloat16.
//
//   c[r][lane] += sum over words of a[r][word] . b[word][lane]     R rows of a, C vectors of 16 lanes of b
//
// Rows of a are read as they lie, a word broadcast to all lanes; b is in words of a column, as for tile registers.
// Bound: R C products for R + C loads. 8 x 2, or with rows at distances that are known when this is compiled 16 x 1,
//   keep the products' units busy where a cycle has two loads.
#pragma once
#include "common/amx.h"

#if defined(__AVX512F__)
namespace {

struct ByteWords {  // a unsigned, b signed; exact
  using Sum = __m512i;
  static Sum add(Sum sum, __m512i a, __m512i b) { return add_byte_products(sum, a, b); }
  static Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
};
struct Bf16Words {
  using Sum = __m512;
  static Sum add(Sum sum, __m512i a, __m512i b) { return add_bf16_pairs(sum, a, b); }
  static Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
};

// Some words. Rows of a are `pitch` bytes apart, words of b `step`, its vectors `next`.
template <class Words, int R, int C>
static inline __attribute__((always_inline)) void add_word(
    const char* a, int64_t pitch, const char* b, int64_t next, typename Words::Sum (&sums)[R][C]) {
  __m512i lanes[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) lanes[c] = _mm512_loadu_si512(b + c * next);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    int32_t number;
    __builtin_memcpy(&number, a + r * pitch, 4);
    const __m512i all = _mm512_set1_epi32(number);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = Words::add(sums[r][c], all, lanes[c]);
  }
}
// `words` of them, an even number: eight sums would wait for themselves, so there are two of each.
template <class Words, int R, int C>
static inline __attribute__((always_inline)) void add_words(
    const void* a, int64_t pitch, const void* b, int64_t step, int64_t next, int64_t words,
    typename Words::Sum (&sums)[R][C]) {
  const char *word = static_cast<const char*>(a), *row = static_cast<const char*>(b);
  if constexpr (R * C > 8) {
    for (int64_t i = 0; i < words; ++i, word += 4, row += step) add_word<Words>(word, pitch, row, next, sums);
  } else {
    typename Words::Sum odd[R][C] = {};
    for (int64_t i = 0; i < words; i += 2, word += 8, row += 2 * step) {
      add_word<Words>(word, pitch, row, next, sums);
      add_word<Words>(word + 4, pitch, row + step, next, odd);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = Words::join(sums[r][c], odd[r][c]);
  }
}

}  // namespace

#endif
