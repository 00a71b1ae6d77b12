// Scores of a panel, forward and backward: exponentials, softcap, bias.
#pragma once
#include "sparse_attention/cpu_attention_tables.h"

namespace {

// To the nearest integer, of |x| < 2^22; of NaN one whose lower half is 0: x + 1.5 x 2^23 has part of its payload.
static inline VecI nearest(VecF x) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtps_epi32((__m256)x);
#else
  return x == x ? (VecI)(x + kRoundMagic<float>) - 0x4b400000 : VecI{};
#endif
}

// 2^x for x <= 0, or above it by rounding errors; exactly 0 below the smallest normal number, where arithmetic can be a
// hundred times slower. The polynomial of exp2_beside_one (2e-7) without its bounds: what they would keep in order is
// either cleared or NaN.
static inline VecF exp2_of_nonpositive(VecF x) {
  const VecI n = nearest(x);
  const VecF r = x - __builtin_convertvector(n, VecF);
  VecF p = splat(1.32764725e-3f);
  p = p * r + 9.67554096e-3f;
  p = p * r + 5.55071309e-2f;
  p = p * r + 2.40221202e-1f;
  p = p * r + 6.93146944e-1f;
  p = p * r + 1.0f;
  return x < -126.0f ? VecF{} : (VecF)((VecI)p + (n << IntOf<float>::mantissa));
}
static inline VecD exp2_of_nonpositive(VecD x) { return x < -1022.0 ? VecD{} : exp2v(x); }

template <class F>
static inline Vec<F> tanh_of(Vec<F> x) {
  const Vec<F> q = x * x, far = 1 - 2 / (1 + expv(2 * x));
  if constexpr (sizeof(F) == 8) return far;  // 1e-16 beside a softcap of 50 is enough
  // Taylor to x^11 on [-1/4, 1/4], so that small logits keep their digits
  Vec<F> p = q * F(-1382.0 / 155925) + F(62.0 / 2835);
  p = p * q - F(17.0 / 315);
  p = p * q + F(2.0 / 15);
  p = p * q - F(1.0 / 3);
  return q < F(0.0625) ? x + x * q * p : far;
}

// Products k.q that carry a factor become logits in place: softcap, bias, tables. The factor on q is logit_factor.
// Logits of softmax are in base 2.
template <class F>
struct Logits {
  const AttnArgs& a;
  const F softcap, unit;  // of logits
  const Tables<F> tables;
  const bool plain;

  explicit Logits(const AttnArgs& args)
      : a(args), softcap(F(args.softcap)), unit(args.silu ? F(1) : F(kLog2e)), tables(args, unit),
        plain(!args.bias && !args.position && !args.time && args.softcap == 0) {}
  double factor() const { return a.softcap ? a.scale / a.softcap : a.silu ? a.scale : a.scale * kLog2e; }

  // Of products of queries that do not carry the factor.
  void scale(F* s, int64_t ld, KeyRange range) const {
    constexpr int V = kLanes<F>;
    const F by = F(factor());
    for (int64_t k = range.first; k < range.last; ++k)
      for (int v = 0; v < 2; ++v) store(s + k * ld + v * V, load(s + k * ld + v * V) * by);
  }

  // Rows `range` of s, W queries from q on, of which `queries` exist; `times` of the tile's keys. slopes gets
  // 1 - tanh^2 when there is a softcap.
  void finish(F* s, int64_t ld, KeyRange range, int64_t b, int64_t h, int64_t q, int64_t queries, int64_t k0,
              TimeSpan times, F* slopes) const {
    constexpr int V = kLanes<F>;
    for (int64_t k = range.first; softcap != 0 && k < range.last; ++k)
      for (int v = 0; v < 2; ++v) {
        const Vec<F> t = tanh_of<F>(load(s + k * ld + v * V));
        if (slopes) store(slopes + k * ld + v * V, 1 - t * t);
        store(s + k * ld + v * V, t * (softcap * unit));
      }
    if (a.bias)
      for_dtype(a.bias_dtype, [&](auto type) {
        using B = decltype(type);
        add_bias(s, ld, range, at<B>(a.bias, b, h, q) + k0 * a.bias.s[3], a.bias.s[2], a.bias.s[3], queries);
      });
    if (a.position) tables.add_positions(s, ld, range, h, q, k0);
    if (a.time) tables.add_times(s, ld, range, h, q, k0, times);
  }

  template <class B>
  void add_bias(F* s, int64_t ld, KeyRange range, const B* bias, int64_t sq, int64_t sk, int64_t queries) const {
    constexpr int V = kLanes<F>, W = kPanel<F>;
    alignas(64) F lanes[W] = {};
    for (int64_t k = range.first; k < range.last; ++k) {
      const B* from = bias + k * sk;
      if (queries == W)
        for (int i = 0; i < W; ++i) lanes[i] = F(to_float(from[i * sq]));
      else
        for (int i = 0; i < queries; ++i) lanes[i] = F(to_float(from[i * sq]));
      for (int v = 0; v < 2; ++v) store(s + k * ld + v * V, load(s + k * ld + v * V) + load(lanes + v * V) * unit);
    }
  }
};

}  // namespace
