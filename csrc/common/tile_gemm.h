// Products of bfloat16 matrices in tile registers, added up in float.
//
//   c[rows][columns] (+)= a[rows][32 steps] b[32 steps][columns]
//
// Operands are made of tiles of 16 rows of 64 bytes, anywhere in memory: `pitch` bytes from row to row of a tile,
// `block` to the tile of the next 16 rows (columns of b), `step` to that of the next 32 numbers summed over. A tile of
// a holds 32 numbers of each row; one of b a pair of such numbers of 16 columns in each row. So
//   a matrix as it lies is an a;
//   words [p][column] = (b[2p][column], b[2p + 1][column]) are a b: `pair_rows` of a matrix whose rows are summed over,
//   `transpose_pairs` of one whose columns are.
//
// Bound: a product of tiles takes 15 cycles; a load 8 from L1 and 20 from L2, a store 13 (Sapphire Rapids). Two by two
//   tiles of c in registers: 4 loads beside 4 products, which hide them while they come from L1. Storing c is not
//   hidden: 64 x 32 x 64 takes 386 cycles, 240 of them products.
#pragma once
#include "common/words.h"

#if defined(__AVX512F__)
#include "common/tile.h"

namespace {

struct TileOperand {
  const void* data;
  int64_t pitch, block, step;  // bytes
  const char* at(int64_t block_index, int64_t step_index) const {
    return static_cast<const char*>(data) + block_index * block + step_index * step;
  }
  TileOperand from(int64_t block_index, int64_t step_index) const {
    return {at(block_index, step_index), pitch, block, step};
  }
};

// Without tile registers, half a tile of rows at a time.
template <int R, int C, bool kAdd>
static void word_products(const TileOperand& a, const TileOperand& b, int64_t steps, float* c, int64_t ldc) {
  constexpr int kHalf = 8;
  for (int half = 0; half < 2 * R; ++half, c += kHalf * ldc) {
    __m512 sums[kHalf][C];
#pragma GCC unroll 8
    for (int r = 0; r < kHalf; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < C; ++j) sums[r][j] = kAdd ? _mm512_loadu_ps(c + r * ldc + 16 * j) : _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s)
      add_words(a.at(half / 2, s) + half % 2 * kHalf * a.pitch, a.pitch, b.at(0, s), b.pitch, b.block, 16, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kHalf; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * ldc + 16 * j, sums[r][j]);
  }
}

// R x C tiles of c, in registers 2 i + j; a in 4 and 5, b in 6 and 7.
template <int R, int C, bool kAdd>
static inline void tile_products(const TileOperand& a, const TileOperand& b, int64_t steps, float* c, int64_t ldc) {
  if (!scalekern::has_amx()) return word_products<R, C, kAdd>(a, b, steps, c, ldc);
  const int64_t pitch = ldc * 4;
  if constexpr (kAdd) {
    load_tile<0>(c, pitch);
    if constexpr (C > 1) load_tile<1>(c + 16, pitch);
    if constexpr (R > 1) load_tile<2>(c + 16 * ldc, pitch);
    if constexpr (R > 1 && C > 1) load_tile<3>(c + 16 * ldc + 16, pitch);
  } else {
    zero_tile<0>();
    if constexpr (C > 1) zero_tile<1>();
    if constexpr (R > 1) zero_tile<2>();
    if constexpr (R > 1 && C > 1) zero_tile<3>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    load_tile<4>(a.at(0, s), a.pitch);
    load_tile<6>(b.at(0, s), b.pitch);
    add_bf16_products<0, 4, 6>();
    if constexpr (C > 1) load_tile<7>(b.at(1, s), b.pitch), add_bf16_products<1, 4, 7>();
    if constexpr (R > 1) load_tile<5>(a.at(1, s), a.pitch), add_bf16_products<2, 5, 6>();
    if constexpr (R > 1 && C > 1) add_bf16_products<3, 5, 7>();
  }
  store_tile<0>(c, pitch);
  if constexpr (C > 1) store_tile<1>(c + 16, pitch);
  if constexpr (R > 1) store_tile<2>(c + 16 * ldc, pitch);
  if constexpr (R > 1 && C > 1) store_tile<3>(c + 16 * ldc + 16, pitch);
}

// rows and columns in tiles of 16.
template <bool kAdd>
static void tile_gemm(
    int64_t rows, int64_t columns, int64_t steps, const TileOperand& a, const TileOperand& b, float* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < columns; j += 2) {
      const TileOperand left = a.from(i, 0), right = b.from(j, 0);
      float* to = c + 16 * (i * ldc + j);
      const bool tall = i + 1 < rows, wide = j + 1 < columns;
      if (tall && wide) tile_products<2, 2, kAdd>(left, right, steps, to, ldc);
      else if (tall) tile_products<2, 1, kAdd>(left, right, steps, to, ldc);
      else if (wide) tile_products<1, 2, kAdd>(left, right, steps, to, ldc);
      else tile_products<1, 1, kAdd>(left, right, steps, to, ldc);
    }
}

// --- operands ---

// (x[0], y[0], x[1], y[1] ...): 16 words of the lower or the upper 16 of 32 numbers.
template <int kHalf>
static inline __m512i pair_numbers(__m512i x, __m512i y) {
  typedef short Shorts __attribute__((vector_size(64)));
  Shorts order;
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = short(kHalf * 16 + i / 2 + i % 2 * 32);
  return _mm512_permutex2var_epi16(x, (__m512i)order, y);
}

// Floats of two rows, 16 columns, as 16 words of b.
static inline __m512i pair_floats(VecF x, VecF y) {
  typedef short Shorts __attribute__((vector_size(64)));
  Shorts order;
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = short(i / 2 + i % 2 * 16);
  return _mm512_permutexvar_epi16((__m512i)order, to_bf16((__m512)x, (__m512)y));
}

// Rows [0, 32 steps) of numbers `stride` apart, summed over, as words [row / 2][columns]; columns a multiple of 32.
static void pair_rows(const bf16* from, int64_t stride, int64_t steps, int64_t columns, uint32_t* to) {
  for (int64_t i = 0; i < 16 * steps; ++i, from += 2 * stride, to += columns)
    for (int64_t c = 0; c < columns; c += 32) {
      const __m512i x = _mm512_loadu_si512(from + c), y = _mm512_loadu_si512(from + stride + c);
      _mm512_storeu_si512(to + c, pair_numbers<0>(x, y));
      _mm512_storeu_si512(to + c + 16, pair_numbers<1>(x, y));
    }
}

static inline void transpose_words(__m512i* v) {
  Vec<float> rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = (VecF)v[i];
  transpose<float>(rows);
  for (int i = 0; i < 16; ++i) v[i] = (__m512i)rows[i];
}

// 16 rows of 32 numbers, `stride` apart, as a b whose columns they are: words [pair of numbers][row], `pitch` apart.
static inline void transpose_pairs(const bf16* from, int64_t stride, uint32_t* to, int64_t pitch) {
  __m512i v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(from + i * stride);
  transpose_words(v);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * pitch, v[i]);
}

// 32 rows of 32 numbers, `stride` apart, as two tiles of an a whose rows their columns are, `apart` numbers apart.
static inline void transpose_numbers(const bf16* from, int64_t stride, bf16* to, int64_t apart) {
  __m512i low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    const __m512i x = _mm512_loadu_si512(from + 2 * i * stride), y = _mm512_loadu_si512(from + (2 * i + 1) * stride);
    low[i] = pair_numbers<0>(x, y), high[i] = pair_numbers<1>(x, y);
  }
  transpose_words(low), transpose_words(high);
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(to + 32 * i, low[i]);
    _mm512_storeu_si512(to + apart + 32 * i, high[i]);
  }
}

// Whether none of the rows' numbers, a multiple of 32 a row, is Inf or NaN.
static inline bool all_finite(const bf16* from, int64_t stride, int64_t rows, int64_t columns) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; ++r, from += stride)
    for (int64_t c = 0; c < columns; c += 32)
      most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(from + c), _mm512_set1_epi16(0x7fff)));
  return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80)) == 0;
}

}  // namespace

#endif
