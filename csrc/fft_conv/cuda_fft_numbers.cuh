// Complex numbers of the fused transform (cuda_fft_conv.cuh): in float32, and two at a time in float16.
#pragma once
#include "common/cuda_pipeline.cuh"

namespace scalekern::fft {

using namespace scalekern::device;

// Of two float16 numbers each: a b, a b + c, -a.
#if defined(__CUDA_ARCH__)
SK_DEVICE uint32_t product_of(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
SK_DEVICE uint32_t fused_of(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
SK_DEVICE uint32_t negative(uint32_t a) {
  uint32_t result;
  asm("neg.f16x2 %0, %1;" : "=r"(result) : "r"(a));
  return result;
}
#else
SK_DEVICE float half_of(uint32_t word, int i) { return widen(f16{uint16_t(word >> 16 * i)}); }
SK_DEVICE uint32_t fused_of(uint32_t a, uint32_t b, uint32_t c) {
  return narrow_pair<f16>(
      fused(half_of(a, 0), half_of(b, 0), half_of(c, 0)), fused(half_of(a, 1), half_of(b, 1), half_of(c, 1)));
}
SK_DEVICE uint32_t product_of(uint32_t a, uint32_t b) { return fused_of(a, b, 0x80008000u); }
SK_DEVICE uint32_t negative(uint32_t a) { return a ^ 0x80008000u; }
#endif

// Two complex numbers in float16: their real parts, their imaginary parts. A product is 4 instructions, where float32
// took 12 with the conversions, and a rounding more of each part.
struct Pair {
  uint32_t re, im;
};

SK_DEVICE Pair pair_of(float re0, float re1, float im0, float im1) {
  return {narrow_pair<f16>(re0, re1), narrow_pair<f16>(im0, im1)};
}
// Two of k3 (half 0) or of 8 + k3 in the words of a transform or a spectrum.
SK_DEVICE Pair pair_of(const Pack<uint32_t>& words, int half) { return {words.v[2 * half], words.v[2 * half + 1]}; }

// z w, with kConjugate z times the conjugate of w.
template <bool kConjugate>
SK_DEVICE Pair times(Pair z, Pair w) {
  const uint32_t im = kConjugate ? negative(w.im) : w.im;
  return {fused_of(z.re, w.re, negative(product_of(z.im, im))), fused_of(z.re, im, product_of(z.im, w.re))};
}
SK_DEVICE Pair plus_product(Pair sum, Pair z, Pair w) {
  return {fused_of(z.re, w.re, fused_of(negative(z.im), w.im, sum.re)),
          fused_of(z.re, w.im, fused_of(z.im, w.re, sum.im))};
}
SK_DEVICE Pair weighed(Pair z, uint32_t weight) { return {product_of(z.re, weight), product_of(z.im, weight)}; }

// The low halves of two words, and their high halves.
SK_DEVICE uint32_t lows(uint32_t a, uint32_t b) { return permute(a, b, 0x5410); }
SK_DEVICE uint32_t highs(uint32_t a, uint32_t b) { return permute(a, b, 0x7632); }

constexpr uint32_t kSigns = 0x80008000u;

}  // namespace scalekern::fft
