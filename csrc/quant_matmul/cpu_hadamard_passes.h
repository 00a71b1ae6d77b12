// Passes of the Hadamard transform over a row: several stages of butterflies each, their points in registers.
//
// A stage is one factor [[1, 1], [1, -1]] of the Kronecker product: it meets points whose indices differ in one bit.
#pragma once
#include "common/tile.h"

namespace {

// Stages in registers a pass: 2^3 vectors of 16 registers leave room for a sum and a difference, 2^4 of 32 likewise.
#if defined(__AVX512F__)
constexpr int kStages = 4, kMostStages = 4;
#else
constexpr int kStages = 3, kMostStages = 4;  // of passes without lanes to mix: 16 vectors spill one or two
#endif

constexpr int log2_of(int64_t x) { return x > 1 ? 1 + log2_of(x / 2) : 0; }
template <class F>
constexpr int kLaneBits = log2_of(kLanes<F>);

// bf16 as its passes take it: of 2 W points the even ones are a vector, a shift away, and the odd ones another, a mask
// away; on the way out they are laid over each other. Widening and packing in order takes 10 operations a vector, this 6,
// and the stages are the same in any order of the index's bits: 64 points 3.6 to 2.9 ns a vector on one Zen 3 core.
// Only where one pass is all: pairs read by the first of several passes lost (512 points 4.0 to 4.9, 2,048 4.3 to 5.1).
struct Paired {
  uint16_t bits;
};
template <class S>
constexpr int kVectors = __is_same(S, Paired) ? 2 : 1;  // that are read together

// W points: those from p on, or of the 2 W from p on the even or the odd ones.
template <class F, class S>
static inline Vec<F> take(const S* p, int odd) {
  if constexpr (__is_same(S, Paired)) {
    Words w;
    __builtin_memcpy(&w, p, sizeof w);
    return Vec<F>(odd ? w & 0xffff0000 : w << 16);
  } else {
    return load_as<F>(p + odd * kLanes<F>);
  }
}

// Two vectors to a storage type, rounded to nearest even. bf16 in fewer operations than store_as has: NaNs need no care,
// since those of bf16 inputs and of inf - inf have no low bits, out of which a carry could come.
template <class F, class S>
static inline void store_two(S* p, Vec<F> a, Vec<F> b) {
  const auto rounded = [](Vec<F> v) { return Words(v) + 0x7fff + (Words(v) >> 16 & 1); };
  if constexpr (__is_same(S, Paired)) {
    const Words w = rounded(a) >> 16 | (rounded(b) & 0xffff0000);
    __builtin_memcpy(p, &w, sizeof w);
    return;
  }
#if defined(__AVX2__)
  if constexpr (__is_same(S, bf16)) {
    const Words low = rounded(a) >> 16, high = rounded(b) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes<F>), _mm512_cvtepi32_epi16((__m512i)high));
#else
    const __m256i packed = _mm256_packus_epi32((__m256i)low, (__m256i)high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
#endif
    return;
  }
#endif
  if constexpr (!__is_same(S, Paired)) store_as<F>(p, a), store_as<F>(p + kLanes<F>, b);
}

// All stages of `count` vectors.
template <int count, class V>
static inline void butterflies(V* v) {
  if constexpr (count > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      const V a = v[i], b = v[i + count / 2];
      v[i] = a + b, v[i + count / 2] = a - b;
    }
    butterflies<count / 2>(v);
    butterflies<count / 2>(v + count / 2);
  }
}

template <int... lane>
struct Lanes {
  template <int bit, class V>
  static inline V swap(V v) { return __builtin_shufflevector(v, v, (lane ^ (1 << bit))...); }
};
template <int W>
struct LanesOf;
template <>
struct LanesOf<2> : Lanes<0, 1> {};
template <>
struct LanesOf<4> : Lanes<0, 1, 2, 3> {};
template <>
struct LanesOf<8> : Lanes<0, 1, 2, 3, 4, 5, 6, 7> {};
template <>
struct LanesOf<16> : Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> {};

// The stages of a vector's own lanes below 2^bits: a shuffle and one multiply-add each, v -> +-v + swapped v.
template <class F, int bits, int bit = 0>
static inline Vec<F> lane_stages(Vec<F> v) {
  if constexpr (bit < bits) {
    Vec<F> sign;
    for (int i = 0; i < kLanes<F>; ++i) sign[i] = i >> bit & 1 ? F(-1) : F(1);
    return lane_stages<F, bits, bit + 1>(v * sign + LanesOf<kLanes<F>>::template swap<bit>(v));
  }
  return v;
}

// `size` points in blocks of 2^vec_bits vectors: the lanes' stages below 2^lane_bits and those of the block, scaled.
// `ahead`: what will be read next, as many bytes as are written; nothing else asks for it while a row is computed. Moved
// on; may be null.
template <class F, int lane_bits, int vec_bits, class S, class D>
static void last_pass(D* to, const S* from, int64_t size, F scale, const char*& ahead) {
  constexpr int W = kLanes<F>, count = 1 << vec_bits;
  for (int64_t i = 0; i < size; i += W * count) {
    if (ahead) {
#pragma GCC unroll 16
      for (int byte = 0; byte < int(sizeof(D)) * W * count; byte += 64) __builtin_prefetch(ahead + byte);
      ahead += int(sizeof(D)) * W * count;
    }
    Vec<F> v[count];
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j)
      v[j] = lane_stages<F, lane_bits>(take<F>(from + i + j / kVectors<S> * kVectors<S> * W, j % kVectors<S>));
    butterflies<count>(v);
    if constexpr (count == 1 && kVectors<D> == 1) store_as<F>(to + i, v[0] * scale);
#pragma GCC unroll 8
    for (int j = 0; j + 1 < count; j += 2) store_two<F>(to + i + j * W, v[j] * scale, v[j + 1] * scale);
  }
}

// The stages of distances `apart` to 2^(bits - 1) apart, of 2^bits runs of points; runs of `to` begin `pitch` apart.
template <class F, int bits, class S>
static void pass(F* to, int64_t pitch, const S* from, int64_t apart) {
  constexpr int W = kLanes<F>, count = 1 << bits;
  for (int64_t i = 0; i < apart; i += W) {
    Vec<F> v[count];
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j) v[j] = load_as<F>(from + i + j * apart);
    butterflies<count>(v);
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j) store(to + i + j * pitch, v[j]);
  }
}

// H_m of m = 4 fours runs of `apart` points. The 16 signed sums of four runs, made once, serve all m outputs: m / 4 + 5
// additions an output instead of m. offsets[i][g]: which of the 16, in vectors.
template <class F, int fours, class S>
static void base_pass(F* to, int64_t pitch, const S* from, int64_t apart, const int32_t* offsets) {
  constexpr int W = kLanes<F>;
  Vec<F> sums[16 * fours];
  for (int64_t j = 0; j < apart; j += W) {
#pragma GCC unroll 10
    for (int g = 0; g < fours; ++g) {
      Vec<F> x[4], *s = sums + 16 * g;
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) x[l] = load_as<F>(from + (4 * g + l) * apart + j);
      const Vec<F> low[4] = {x[0] + x[1], x[1] - x[0], x[0] - x[1], -x[0] - x[1]};
      const Vec<F> high[4] = {x[2] + x[3], x[3] - x[2], x[2] - x[3], -x[2] - x[3]};
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) s[c] = low[c & 3] + high[c >> 2];
    }
    const int32_t* o = offsets;
    for (int i = 0; i < 4 * fours; ++i, o += fours) {
      Vec<F> sum = sums[o[0]];
#pragma GCC unroll 10
      for (int g = 1; g < fours; ++g) sum += sums[o[g]];
      store(to + i * pitch + j, sum);
    }
  }
}

}  // namespace
