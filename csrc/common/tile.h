// Tiles of strided tensors as vectors in cache, for cpu_*_kernel.cpp: a tile is `rows` vectors of kLanes<F> elements.
// Element (row, lane) comes from p[row * row_stride + lane * lane_stride], converted from its storage type.
#pragma once
#include "common/vec.h"

namespace {

// kLanes<F> consecutive elements of a storage type, widened.
template <class F, class S>
static inline Vec<F> load_as(const S* p) {
  if constexpr (__is_same(S, F)) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2 && sizeof(F) == 4) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (__is_same(S, f16)) return (Vec<F>)_mm512_cvtph_ps(raw);
    else return (Vec<F>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
  }
  if constexpr (__is_same(S, int8_t) && sizeof(F) == 4)
    return (Vec<F>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 2 && sizeof(F) == 4) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(S, f16)) return (Vec<F>)_mm256_cvtph_ps(raw);
    else return (Vec<F>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
  }
  if constexpr (__is_same(S, int8_t) && sizeof(F) == 4)
    return (Vec<F>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
  F lanes[kLanes<F>];
  for (int i = 0; i < kLanes<F>; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

typedef uint16_t Halves __attribute__((vector_size(SCALEKERN_VEC_BYTES / 2)));  // as many as floats in a vector
typedef uint32_t Words __attribute__((vector_size(SCALEKERN_VEC_BYTES)));

// The same back, rounded to nearest even; bf16 in registers: a loop over from_float goes through memory in GCC 12.
template <class F, class S>
static inline void store_as(S* p, Vec<F> v) {
  if constexpr (__is_same(S, F)) return store(p, v);
  if constexpr (__is_same(S, bf16) && sizeof(F) == 4) {
    const Words bits = Words(v), high = bits >> 16;
    const Words rounded = (bits + 0x7fff + (high & 1)) >> 16;
    const Halves h = __builtin_convertvector(v != v ? high | 0x40 : rounded, Halves);
    __builtin_memcpy(p, &h, sizeof h);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (__is_same(S, f16) && sizeof(F) == 4) {
    const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  }
#elif defined(__AVX2__)
  if constexpr (__is_same(S, f16) && sizeof(F) == 4) {
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
  }
#endif
  F lanes[kLanes<F>];
  store(lanes, v);
  for (int i = 0; i < kLanes<F>; ++i) from_float(p[i], lanes[i]);
}

template <int W>
struct Interleave;  // lane orders of (a0 b0 a1 b1 ...), lower and upper half
#define SCALEKERN_INTERLEAVE(W, LOW, HIGH)                                        \
  template <>                                                                     \
  struct Interleave<W> {                                                          \
    template <class V>                                                            \
    static inline V low(V a, V b) { return __builtin_shufflevector LOW; }         \
    template <class V>                                                            \
    static inline V high(V a, V b) { return __builtin_shufflevector HIGH; }       \
  };
SCALEKERN_INTERLEAVE(2, (a, b, 0, 2), (a, b, 1, 3))
SCALEKERN_INTERLEAVE(4, (a, b, 0, 4, 1, 5), (a, b, 2, 6, 3, 7))
SCALEKERN_INTERLEAVE(8, (a, b, 0, 8, 1, 9, 2, 10, 3, 11), (a, b, 4, 12, 5, 13, 6, 14, 7, 15))
SCALEKERN_INTERLEAVE(16, (a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                     (a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
#undef SCALEKERN_INTERLEAVE

// Transpose kLanes<F> vectors: log2(lanes) rounds of interleaving each vector with the one half the set away.
template <class F>
static inline void transpose(Vec<F>* v) {
  constexpr int W = kLanes<F>;
  Vec<F> other[W];
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      other[2 * i] = Interleave<W>::low(v[i], v[i + W / 2]);
      other[2 * i + 1] = Interleave<W>::high(v[i], v[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = other[i];
  }
}

// out[i] = sum of the lanes of vector i: halves the vectors of a set, adding pairs, until one is left.
template <class F>
static inline Vec<F> sum_lanes(Vec<F>* v) {
  constexpr int W = kLanes<F>;
#pragma GCC unroll 4
  for (int count = W / 2; count >= 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      v[i] = Interleave<W>::low(v[i], v[i + count]) + Interleave<W>::high(v[i], v[i + count]);
  return v[0];
}

// Lanes past `lanes` are 0. The tile's rows are `pitch` apart.
template <class F, class S>
static void load_tile(
    const S* p, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, F* tile, int64_t pitch = kLanes<F>) {
  constexpr int W = kLanes<F>;
  int64_t row = 0;
  if (lanes == W && lane_stride == 1) {
    for (; row < rows; ++row) {
      __builtin_prefetch(p + row * row_stride + 64 / int64_t(sizeof(S)), 0);  // for the row's next lanes
      store(tile + row * pitch, load_as<F>(p + row * row_stride));
    }
  } else if (lanes == W && (row_stride == 1 || row_stride == -1) && lane_stride != 0) {
    const bool up = row_stride == 1;
    for (; row + W <= rows; row += W) {
      Vec<F> v[W];
      const S* first = up ? p + row : p - row - (W - 1);
      for (int i = 0; i < W; ++i) v[i] = load_as<F>(first + i * lane_stride);
      transpose<F>(v);
      for (int i = 0; i < W; ++i) store(tile + (row + (up ? i : W - 1 - i)) * pitch, v[i]);
    }
  }
  for (; row < rows; ++row)
    for (int i = 0; i < W; ++i)
      tile[row * pitch + i] = i < lanes ? F(to_float(p[row * row_stride + i * lane_stride])) : F(0);
}

template <class F, class S>
static void store_tile(
    S* p, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, const F* tile, int64_t pitch = kLanes<F>) {
  constexpr int W = kLanes<F>;
  int64_t row = 0;
  if (lanes == W && lane_stride == 1) {
    for (; row < rows; ++row) {
      __builtin_prefetch(p + row * row_stride + 64 / int64_t(sizeof(S)), 1);
      store_as<F>(p + row * row_stride, load(tile + row * pitch));
    }
  } else if (lanes == W && (row_stride == 1 || row_stride == -1)) {
    const bool up = row_stride == 1;
    for (; row + W <= rows; row += W) {
      Vec<F> v[W];
      for (int i = 0; i < W; ++i) v[i] = load(tile + (row + (up ? i : W - 1 - i)) * pitch);
      transpose<F>(v);
      S* first = up ? p + row : p - row - (W - 1);
      for (int i = 0; i < W; ++i) store_as<F>(first + i * lane_stride, v[i]);
    }
  }
  for (; row < rows; ++row)
    for (int i = 0; i < lanes; ++i) from_float(p[row * row_stride + i * lane_stride], tile[row * pitch + i]);
}

// The same for a line of `count` elements, W to a row: lanes run along the line.
template <class F, class S>
static void load_line(const S* p, int64_t stride, int64_t count, F* line) {
  constexpr int W = kLanes<F>;
  const int64_t whole = count / W;
  load_tile(p, stride, W * stride, W, whole, line);
  if (count % W) load_tile(p + whole * W * stride, stride, 0, int(count % W), 1, line + whole * W);
}

template <class F, class S>
static void store_line(S* p, int64_t stride, int64_t count, const F* line) {
  constexpr int W = kLanes<F>;
  const int64_t whole = count / W;
  store_tile(p, stride, W * stride, W, whole, line);
  if (count % W) store_tile(p + whole * W * stride, stride, 0, int(count % W), 1, line + whole * W);
}

}  // namespace
