// Passes of the Hadamard transform over a row: several stages of butterflies each, their points in registers.
//
// A stage is one factor [[1, 1], [1, -1]] of the Kronecker product: it meets points whose indices differ in one bit.
#pragma once
#include "common/amx.h"
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
// away; on the way out they are laid over each other. Widening and packing in order takes 10 operations a vector, this
// 6, and the stages are the same in any order of the index's bits. A Sapphire Rapids: vectors of 16 of rows of 512 4.6
// to 4.2 ns with AVX-512, 7.2 to 6.7 with AVX2; rows of 8,192 3.2 to 2.8 us.
struct Paired {
  uint16_t bits;
};
// The same by instructions of bfloat16 pairs (common/amx.h), for which numbers below 2^-126 are 0: a pair's sum and its
// difference are a product each, so that the stage of that bit is done as x is read; two vectors are rounded at once.
// Zen 5, cycles a vector of 16 in L2: rows of 64 points 7.9 to 6.2, of 1,024 9.3 to 8.3, of 8,192 11.4 to 10.4.
struct Dotted {
  uint16_t bits;
};
template <class S>
constexpr int kVectors = __is_same(S, Paired) || __is_same(S, Dotted) ? 2 : 1;  // that are read together

// W points: those from p on, or of the 2 W from p on the even or the odd ones, or their sums or differences (Dotted).
template <class F, class S>
static inline Vec<F> take(const S* p, int odd) {
#if defined(__AVX512F__)
  if constexpr (__is_same(S, Dotted)) {
    const __m512i signs = _mm512_set1_epi32(odd ? int(0xbf803f80) : 0x3f803f80);  // 1 and -1, or 1 and 1
    return (Vec<F>)add_bf16_pairs(_mm512_setzero_ps(), _mm512_loadu_si512(p), signs);
  } else
#endif
  if constexpr (__is_same(S, Paired)) {
    Words w;
    __builtin_memcpy(&w, p, sizeof w);
    return Vec<F>(odd ? w & 0xffff0000 : w << 16);
  } else {
    return load_as<F>(p + odd * kLanes<F>);
  }
}

// Two vectors to a storage type, rounded to nearest even. Pairs in fewer operations than store_as has: NaNs need no
// care, since those of bf16 inputs and of inf - inf have no low bits, out of which a carry could come.
template <class F, class S>
static inline void store_two(S* p, Vec<F> a, Vec<F> b) {
#if defined(__AVX512F__)
  if constexpr (__is_same(S, Dotted)) {
    alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = to_bf16((__m512)a, (__m512)b);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), both));
  } else
#endif
  if constexpr (__is_same(S, Paired)) {
    const auto rounded = [](Vec<F> v) { return Words(v) + 0x7fff + (Words(v) >> 16 & 1); };
    const Words w = rounded(a) >> 16 | (rounded(b) & 0xffff0000);
    __builtin_memcpy(p, &w, sizeof w);
  } else {
    store_as<F>(p, a), store_as<F>(p + kLanes<F>, b);
  }
}

// All stages of `count` vectors, or those above the last. Inlined by force: GCC 12 leaves calls, with all vectors in
// memory.
template <int count, int least = 1, class V>
[[gnu::always_inline]] static inline void butterflies(V* v) {
  if constexpr (count > least) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      const V a = v[i], b = v[i + count / 2];
      v[i] = a + b, v[i + count / 2] = a - b;
    }
    butterflies<count / 2, least>(v);
    butterflies<count / 2, least>(v + count / 2);
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

// 1 in the lanes whose bit is 0, -1 in the others.
template <class F, int bit>
static inline Vec<F> signs_of_bit() {
  Vec<F> sign;
  for (int i = 0; i < kLanes<F>; ++i) sign[i] = i >> bit & 1 ? F(-1) : F(1);
  return sign;
}

// The stages of a vector's own lanes below 2^bits: a shuffle and one multiply-add each, v -> +-v + swapped v.
template <class F, int bits>
[[gnu::always_inline]] static inline Vec<F> lane_stages(Vec<F> v) {
  if constexpr (bits > 0)
    return lane_stages<F, bits - 1>(v * signs_of_bit<F, bits - 1>() + LanesOf<kLanes<F>>::template swap<bits - 1>(v));
  return v;
}

// The same of W points in memory: the highest stage takes two loads that repeat a half, and no shuffle.
template <class F, int bits, class S>
[[gnu::always_inline]] static inline Vec<F> take_lanes(const S* p, int odd) {
#if defined(__AVX2__)
  if constexpr (bits == kLaneBits<F> && __is_same(S, F)) {
    const auto half = [](const F* h) {
#if defined(__AVX512F__)
      return (Vec<F>)_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(h)));
#else
      return (Vec<F>)_mm256_broadcast_pd(reinterpret_cast<const __m128d*>(h));
#endif
    };
    p += odd * kLanes<F>;
    return lane_stages<F, bits - 1>(half(p + kLanes<F> / 2) * signs_of_bit<F, bits - 1>() + half(p));
  }
#endif
  return lane_stages<F, bits>(take<F>(p, odd));
}

// `size` points in blocks of 2^vec_bits vectors: the lanes' stages below 2^lane_bits and those of the block, scaled.
// `ahead`: what will be read next, as many bytes as are written; moved on; may be null.
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
      v[j] = take_lanes<F, lane_bits>(from + i + j / kVectors<S> * kVectors<S> * W, j % kVectors<S>);
    butterflies<count, __is_same(D, Dotted) ? 2 : 1>(v);
    if constexpr (count == 1 && kVectors<D> == 1) store_as<F>(to + i, v[0] * scale);
#pragma GCC unroll 8
    for (int j = 0; j + 1 < count; j += 2) store_two<F>(to + i + j * W, v[j] * scale, v[j + 1] * scale);
  }
}

// An address that the compiler does not work out ahead of the loop: those of 16 runs it kept in vector registers.
template <class T>
[[gnu::always_inline]] static inline T* opaque(T* p) {
  asm("" : "+r"(p));
  return p;
}

// The stages of distances `apart` to 2^(bits - 1) apart, of 2^bits runs of points, which begin a pitch apart.
// Of 32 runs the first stage is made as they are read, once for the upper 16 of its results and once for the lower.
template <class F, int bits, class S>
static void pass(F* to, int64_t pitch, const S* from, int64_t from_pitch, int64_t apart) {
  constexpr int W = kLanes<F>, count = bits > 4 ? 16 : 1 << bits, four = count < 4 ? count : 4;
  Vec<F> v[count];
  const auto read = [&](const S* x, int odd, auto&& put) {
#pragma GCC unroll 4
    for (int j = 0; j < count; j += four, x = opaque(x + 4 * from_pitch))
#pragma GCC unroll 4
      for (int l = 0; l < four; ++l) put(j + l, take<F>(x + l * from_pitch, odd));
  };
  const auto finish = [&](F* y) {
    butterflies<count>(v);
#pragma GCC unroll 4
    for (int j = 0; j < count; j += four, y = opaque(y + 4 * pitch))
#pragma GCC unroll 4
      for (int l = 0; l < four; ++l) store(y + l * pitch, v[j + l]);
  };
  for (int64_t i = 0; i < apart; i += kVectors<S> * W)
#pragma GCC unroll 2
    for (int odd = 0; odd < kVectors<S>; ++odd) {
      read(from + i, odd, [&](int j, Vec<F> x) { v[j] = x; });
      if constexpr (bits > 4) read(from + i + 16 * from_pitch, odd, [&](int j, Vec<F> x) { v[j] += x; });
      finish(to + i + odd * W);
      if constexpr (bits > 4) {
        read(from + i, odd, [&](int j, Vec<F> x) { v[j] = x; });
        read(from + i + 16 * from_pitch, odd, [&](int j, Vec<F> x) { v[j] -= x; });
        finish(to + i + odd * W + 16 * pitch);
      }
    }
}

// H_m of m = 4 fours runs of `apart` points; with two halves, H_2 (x) H_m of 2 m runs. Of four runs' signed sums one
// half is the other's negative: eight, made once, serve all m outputs, at m / 4 + 3 additions an output instead of m.
// offsets[i][g]: which of them, and with which sign. J vectors at a time share what an output reads of those.
template <class F, int fours, int halves, int J, class S>
static void base_pass(
    F* to, int64_t pitch, const S* from, int64_t from_pitch, int64_t apart, const int32_t* offsets, const F* signs) {
  constexpr int W = kLanes<F>;
  Vec<F> sums[halves][8 * fours][J];
  for (int64_t j = 0; j < apart; j += J * W) {
#pragma GCC unroll 4
    for (int u = 0; u < J; ++u) {
      const S* x = from + j + u / kVectors<S> * kVectors<S> * W;
      for (int g = 0; g < fours; ++g, x += 4 * from_pitch) {
        const auto run = [&](int l) { return take<F>(x + l * from_pitch, u % kVectors<S>); };
        Vec<F> v[halves][4];
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          v[0][l] = run(l);
          if constexpr (halves == 2) {
            const Vec<F> other = run(4 * fours + l);
            v[1][l] = v[0][l] - other, v[0][l] += other;
          }
        }
#pragma GCC unroll 2
        for (int h = 0; h < halves; ++h) {
          const Vec<F> a = v[h][0], b = v[h][1], c = v[h][2], d = v[h][3];
          const Vec<F> low[2] = {a + b, a - b}, high[2] = {c + d, d - c};
          auto* const s = sums[h] + 8 * g;
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            s[i][u] = low[i] + high[0], s[2 + i][u] = low[i] + high[1];
            s[4 + i][u] = low[i] - high[1], s[6 + i][u] = low[i] - high[0];
          }
        }
      }
    }
    F* y = to + j;
    for (int h = 0; h < halves; ++h) {
      const int32_t* o = offsets;
      const F* s = signs;
      for (int i = 0; i < 4 * fours; ++i, o += fours, s += fours, y += pitch) {
        Vec<F> sum[J];
#pragma GCC unroll 10
        for (int g = 0; g < fours; ++g) {
#pragma GCC unroll 4
          for (int u = 0; u < J; ++u) sum[u] = g ? sum[u] + sums[h][o[g]][u] * s[g] : sums[h][o[0]][u] * s[0];
        }
#pragma GCC unroll 4
        for (int u = 0; u < J; ++u) store(y + u * W, sum[u]);
      }
    }
  }
}

// "fast_hadamard_transform"'s H_m: bit l of word i is set where H_m[i, l] is -1; of H_40 its first 20 rows and columns.
template <int m>
constexpr uint32_t kBase[] = {};
template <>
constexpr uint32_t kBase<12>[] = {
    0x2, 0xaab, 0x3c8, 0x96e, 0xf20, 0x5ba, 0xc8c, 0x6e6, 0x23c, 0xb96, 0x8f0, 0xe5a};
template <>
constexpr uint32_t kBase<28>[] = {
    0xcd69e7e, 0x9ad7c7d, 0x37ab8fb, 0x6d571f7, 0xd8ae3ef, 0xb3587df, 0x66b4f3f, 0xb467f43, 0x6acbe87, 0xd593d8e,
    0xab27b9c, 0x564f7b8, 0xac9aff0, 0x5b31fe1, 0x87fb325, 0xff66ca, 0x1decd95, 0x39ddb2a, 0x71bf654, 0xe17eca9,
    0xc2fd9d2, 0xfcf1299, 0xfbe2532, 0xf7c4ae4, 0xef8d549, 0xdf1ea13, 0xbe3d4a6, 0x7e7a94c};
template <>
constexpr uint32_t kBase<40>[] = {
    0xffffe, 0x615e4, 0xc2bc8, 0x85792, 0xaf26, 0x15e4c, 0x2bc98, 0x57930, 0xaf260, 0x5e4c2, 0xbc984, 0x7930a,
    0xf2614, 0xe4c2a, 0xc9856, 0x930ae, 0x2615e, 0x4c2bc, 0x98578, 0x30af2};

static bool known_signs(const int64_t* signs, int64_t m) {
  if (m != 12 && m != 28 && m != 40) return false;
  const uint32_t* const known = m == 12 ? kBase<12> : m == 28 ? kBase<28> : kBase<40>;
  const int64_t rows = m == 40 ? 20 : m, mask = (int64_t(1) << rows) - 1;
  for (int64_t i = 0; i < rows; ++i)
    if ((signs[i] & mask) != known[i]) return false;
  return true;
}

// The same as base_pass, bit for bit, where the signs are known: additions alone, no sign or place of a sum is read.
// Sums of H_12 stay in registers. Two cores of a Sapphire Rapids, 24 MB in turns, of a copy's rate: bfloat16 of 3,072
// points 0.46 to 0.65, 5,120 0.35 to 0.50, 896 0.50 to 0.60; float16 0.51 to 0.60, 0.39 to 0.49, 0.41 to 0.56.
template <class F, int m, class S>
static void known_pass(F* to, int64_t pitch, const S* from, int64_t from_pitch, int64_t apart) {
  constexpr int W = kLanes<F>, halves = m == 40 ? 2 : 1, rows = m / halves, fours = rows / 4;
  for (int64_t j = 0; j < apart; j += kVectors<S> * W)
#pragma GCC unroll 1
    for (int odd = 0; odd < kVectors<S>; ++odd) {
      Vec<F> s[halves][8 * fours];
      const S* x = from + j;
#pragma GCC unroll 7
      for (int g = 0; g < fours; ++g, x = opaque(x + 4 * from_pitch)) {
        Vec<F> v[halves][4];
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          v[0][l] = take<F>(x + l * from_pitch, odd);
          if constexpr (halves == 2) {
            const Vec<F> other = take<F>(x + (rows + l) * from_pitch, odd);
            v[1][l] = v[0][l] - other, v[0][l] += other;
          }
        }
#pragma GCC unroll 2
        for (int h = 0; h < halves; ++h) {
          const Vec<F> a = v[h][0], b = v[h][1], c = v[h][2], d = v[h][3];
          const Vec<F> low[2] = {a + b, a - b}, high[2] = {c + d, d - c};
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            s[h][8 * g + i] = low[i] + high[0], s[h][8 * g + 2 + i] = low[i] + high[1];
            s[h][8 * g + 4 + i] = low[i] - high[1], s[h][8 * g + 6 + i] = low[i] - high[0];
          }
        }
      }
      F* y = to + j + odd * W;
#pragma GCC unroll 1
      for (int h = 0; h < halves; ++h)
#pragma GCC unroll 28
        for (int i = 0; i < rows; ++i, y = i % 4 ? y + pitch : opaque(y + pitch)) {
          const uint32_t word = kBase<m>[i];
          const bool flip = word & 1;  // the first sum is taken as it is, so all others are
          Vec<F> sum;
#pragma GCC unroll 7
          for (int g = 0; g < fours; ++g) {
            const int four = int(word >> (4 * g) & 15);
            const Vec<F> term = s[h][8 * g + (four & 1 ? four ^ 15 : four) / 2];
            sum = g == 0 ? term : bool(four & 1) == flip ? sum + term : sum - term;
          }
          store(y, flip ? -sum : sum);
        }
    }
}

// H_m of m runs, m of 12, 20, 28 and 40, from its signs (hadamard.h). H_40 is H_2 (x) its first 20 rows and columns.
template <class F>
class BaseMatrix {
 public:
  BaseMatrix(const int64_t* signs, int64_t m) : m_(m), known_(known_signs(signs, m)) {
    const int64_t rows = m == 40 ? 20 : m;
    for (int64_t i = 0, term = 0; i < rows && m > 1; ++i)
      for (int64_t g = 0; g < rows / 4; ++g, ++term) {
        const int word = int(uint64_t(signs[i]) >> (4 * g) & 15), flipped = word & 1 ? word ^ 15 : word;
        offsets_[term] = int32_t(8 * g + flipped / 2);
        signs_[term] = word & 1 ? F(-1) : F(1);
      }
  }

  template <class T>
  void multiply(F* to, int64_t pitch, const T* from, int64_t from_pitch, int64_t apart) const {
    constexpr bool worth_it = __is_same(F, float) && kLanes<F> == 16;  // elsewhere not tried: seconds of compilation
    if constexpr (worth_it) if (known_ && apart % (kVectors<T> * kLanes<F>) == 0) {
      if (m_ == 12) return known_pass<F, 12>(to, pitch, from, from_pitch, apart);
      if (m_ == 28) return known_pass<F, 28>(to, pitch, from, from_pitch, apart);
      return known_pass<F, 40>(to, pitch, from, from_pitch, apart);
    }
    const auto by = [&]<int J>() {
      switch (m_) {
        case 12: return base_pass<F, 3, 1, J>(to, pitch, from, from_pitch, apart, offsets_, signs_);
        case 20: return base_pass<F, 5, 1, J>(to, pitch, from, from_pitch, apart, offsets_, signs_);
        case 28: return base_pass<F, 7, 1, J>(to, pitch, from, from_pitch, apart, offsets_, signs_);
        default: return base_pass<F, 5, 2, J>(to, pitch, from, from_pitch, apart, offsets_, signs_);
      }
    };
    if (apart % (2 * kLanes<F>) == 0) return by.template operator()<2>();
    if constexpr (kVectors<T> == 1) by.template operator()<1>();
  }

 private:
  const int64_t m_;
  const bool known_;
  int32_t offsets_[28 * 7];
  F signs_[28 * 7];
};

}  // namespace
