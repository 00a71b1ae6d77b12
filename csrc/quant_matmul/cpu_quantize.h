// Symmetric quantization of a line to integers of one scale: the largest magnitude becomes the largest integer.
#pragma once
#include "common/vec.h"

namespace {

// Magnitudes as integers, whose order is the magnitudes' with NaN above infinity: the largest is a NaN if there is one.
template <class F>
static inline VecInt<F> magnitude_bits(Vec<F> x) {
  using I = typename IntOf<F>::type;
  return (VecInt<F>)x & splat(I(~(I(1) << (8 * sizeof(I) - 1))));
}

template <class V>
static inline V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_max_epi32((__m256i)a, (__m256i)b);
#endif
  return a > b ? a : b;
}

template <class F>
static F largest_magnitude(const F* y, int64_t count) {
  constexpr int W = kLanes<F>;
  VecInt<F> a{}, b{};
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W)
    a = larger(a, magnitude_bits<F>(load(y + i))), b = larger(b, magnitude_bits<F>(load(y + i + W)));
  for (; i < count; i += W) {
    Vec<F> rest{};
    for (int lane = 0; lane < W && i + lane < count; ++lane) rest[lane] = y[i + lane];
    a = larger(a, magnitude_bits<F>(rest));
  }
  a = larger(a, b);
  auto most = a[0];
  for (int lane = 1; lane < W; ++lane) most = a[lane] > most ? a[lane] : most;
  F value;
  __builtin_memcpy(&value, &most, sizeof value);
  return value;
}

// y / scale, at most `most` in magnitude, rounded half to even; 0 where that is not a number (a group of zeros).
template <class F>
static inline VecInt<F> quotient(Vec<F> y, Vec<F> scale, Vec<F> most) {
  Vec<F> v = y / scale;
  v = (Vec<F>)((VecInt<F>)v & (VecInt<F>)(v == v));
  v = most < v ? most : v;
  v = -most > v ? -most : v;
  return (VecInt<F>)(v + kRoundMagic<F>) - (VecInt<F>)splat(kRoundMagic<F>);
}

template <class F>
static void quantize(int8_t* q, float* scale_out, const F* y, int64_t count, int most_integer) {
  constexpr int W = kLanes<F>;
  const float scale = float(largest_magnitude(y, count) / F(most_integer));
  *scale_out = scale;
  const Vec<F> divisor = splat(F(scale)), most = splat(F(most_integer));
  int64_t i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within halves of a register
    for (; i + 4 * W <= count; i += 4 * W) {
      __m256i v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = (__m256i)quotient<F>(load(y + i + j * W), divisor, most);
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
  }
#elif defined(__AVX512F__)
  if constexpr (sizeof(F) == 4)
    for (; i + W <= count; i += W)
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(q + i),
          _mm512_cvtepi32_epi8((__m512i)quotient<F>(load(y + i), divisor, most)));
#endif
  for (; i < count; i += W) {
    const int lanes = int(count - i < W ? count - i : W);
    Vec<F> rest{};
    for (int lane = 0; lane < lanes; ++lane) rest[lane] = y[i + lane];
    const VecInt<F> last = quotient<F>(rest, divisor, most);
    for (int lane = 0; lane < lanes; ++lane) q[i + lane] = int8_t(last[lane]);
  }
}

}  // namespace
