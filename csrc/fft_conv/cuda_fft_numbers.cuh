// Complex numbers of the fused transform (cuda_fft_conv.cuh): in float32, and two at a time in float16.
#pragma once
#include "common/cuda_pipeline.cuh"

namespace scalekern::fft {

using namespace scalekern::device;

struct Complex {
  float re, im;
};

SK_DEVICE Complex complex_of(uint32_t word) {
#if defined(__CUDA_ARCH__)  // two conversions; with shifts of the word it would be four instructions
  Complex z;
  asm("{.reg .b16 re, im; mov.b32 {re, im}, %2; cvt.f32.f16 %0, re; cvt.f32.f16 %1, im;}"
      : "=f"(z.re), "=f"(z.im) : "r"(word));
  return z;
#else
  return {widen(f16{uint16_t(word)}), widen(f16{uint16_t(word >> 16)})};
#endif
}
SK_DEVICE Complex times(Complex a, Complex b) {
  return {fused(a.re, b.re, -(a.im * b.im)), fused(a.re, b.im, a.im * b.re)};
}
SK_DEVICE Complex scaled(Complex z, float by) { return {z.re * by, z.im * by}; }
// z + a b
SK_DEVICE Complex plus_product(Complex z, Complex a, Complex b) {
  return {fused(a.re, b.re, fused(-a.im, b.im, z.re)), fused(a.re, b.im, fused(a.im, b.re, z.im))};
}

// Two complex numbers in float16: their real parts, their imaginary parts.
struct Pair {
  uint32_t re, im;
};

SK_DEVICE Pair pair_of(float re0, float re1, float im0, float im1) {
  return {narrow_pair<f16>(re0, re1), narrow_pair<f16>(im0, im1)};
}

// z w, with kConjugate z times the conjugate of w, in float16: 4 instructions, where float32 took 12 with w's
// conversion, and a rounding more of each part.
template <bool kConjugate>
SK_DEVICE Pair times(Pair z, Pair w) {
#if defined(__CUDA_ARCH__)
  Pair result;
  if constexpr (kConjugate) {
    asm("{.reg .b32 t; mul.rn.f16x2 t, %1, %2; fma.rn.f16x2 %0, %3, %4, t;}"
        : "=r"(result.re) : "r"(z.im), "r"(w.im), "r"(z.re), "r"(w.re));
    asm("{.reg .b32 t; mul.rn.f16x2 t, %1, %2; neg.f16x2 t, t; fma.rn.f16x2 %0, %3, %4, t;}"
        : "=r"(result.im) : "r"(z.re), "r"(w.im), "r"(z.im), "r"(w.re));
  } else {
    asm("{.reg .b32 t; mul.rn.f16x2 t, %1, %2; neg.f16x2 t, t; fma.rn.f16x2 %0, %3, %4, t;}"
        : "=r"(result.re) : "r"(z.im), "r"(w.im), "r"(z.re), "r"(w.re));
    asm("{.reg .b32 t; mul.rn.f16x2 t, %1, %2; fma.rn.f16x2 %0, %3, %4, t;}"
        : "=r"(result.im) : "r"(z.im), "r"(w.re), "r"(z.re), "r"(w.im));
  }
  return result;
#else
  float re[2], im[2];
  for (int i = 0; i < 2; ++i) {
    const auto half = [&](uint32_t word) { return widen(f16{uint16_t(word >> 16 * i)}); };
    const auto rounded = [](float x) { return widen(narrow<f16>(x)); };
    const float z_re = half(z.re), z_im = half(z.im), w_re = half(w.re), w_im = half(w.im);
    re[i] = fused(z_re, w_re, kConjugate ? rounded(z_im * w_im) : -rounded(z_im * w_im));
    im[i] = kConjugate ? fused(z_im, w_re, -rounded(z_re * w_im)) : fused(z_re, w_im, rounded(z_im * w_re));
  }
  return pair_of(re[0], re[1], im[0], im[1]);
#endif
}

// The low halves of two words, and their high halves.
SK_DEVICE uint32_t lows(uint32_t a, uint32_t b) { return permute(a, b, 0x5410); }
SK_DEVICE uint32_t highs(uint32_t a, uint32_t b) { return permute(a, b, 0x7632); }

constexpr uint32_t kSigns = 0x80008000u;

}  // namespace scalekern::fft
