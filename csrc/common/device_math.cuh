// Math and storage types of the CUDA kernels. Compiles for the host as well, where the tests check it against
// higher precision (scalekern._C.device_math) and the emulator (emulator.h) runs whole kernels on it.
//
// Two forms of 2^x: exp2_unit is one instruction of the special-function unit (16 a clock an SM, the limit of the
// scans), exp2_poly is about twelve of the FMA and integer pipes. The scans send a fixed share of their exponentials
// to the second one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SK_FN __host__ __device__ __forceinline__
#else
#define SK_FN inline __attribute__((always_inline))
#endif

namespace scalekern::device {

constexpr float kLog2e = 1.4426950408889634f;

struct alignas(2) f16 {
  uint16_t bits;
};
struct alignas(2) bf16 {
  uint16_t bits;
};

// The type in which a storage type is computed.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

SK_FN float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

SK_FN uint32_t as_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
#endif
}

SK_FN float widen(float x) { return x; }
SK_FN double widen(double x) { return x; }
SK_FN float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
SK_FN float widen(f16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return as_float(sign | as_bits(float(mantissa) * 0x1p-24f));
  return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

// To a storage type, to nearest even; NaN stays NaN, what is too large becomes infinite.
template <class T, class F>
SK_FN T narrow(F x) {
  return T(x);
}
template <>
SK_FN bf16 narrow<bf16, float>(float x) {
#if defined(__CUDA_ARCH__)
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
#endif
}
template <>
SK_FN f16 narrow<f16, float>(float x) {
#if defined(__CUDA_ARCH__)
  return f16{__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = as_bits(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{uint16_t(sign | 0x7fff)};
  if (magnitude >= 0x47800000u) return f16{uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return f16{uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u))};
  return f16{uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
#endif
}

// Two numbers of 16 bits in a word, the first one low: one instruction. (One alone goes through a slower pipe.)
template <class T>
SK_FN uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return narrow<T>(low).bits | uint32_t(narrow<T>(high).bits) << 16;
#endif
}

SK_FN float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
SK_FN double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// x into [low, high]; NaN stays NaN (fminf and fmaxf would lose it).
SK_FN float clamp_nan(float x, float low, float high) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(high));
  return x;
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

// 2^x, one instruction: relative error 2^-22, subnormal results are 0, exact at 0.
SK_FN float exp2_unit(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
SK_FN double exp2_unit(double x) { return exp2(x); }

// 2^x without the special-function unit: 2^n p(r), r in [-1/2, 1/2], p of degree 6 (minimax, 1.9e-9 relative, and
// p(0) = 1 exactly, so that a state that does not decay does not drift). Relative error 1.2e-7 (about 1 ulp) for x
// from -126 to 127.5, 0 below -127, infinite from 127.5 on, NaN for NaN.
SK_FN float exp2_poly(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  x = clamp_nan(x, -127.0f, 128.0f);
  const float shifted = x + magic;
  const float r = x - (shifted - magic);
  float p = fused(1.5345812e-4f, r, 1.3399931e-3f);
  p = fused(p, r, 9.618489e-3f);
  p = fused(p, r, 5.5503286e-2f);
  p = fused(p, r, 2.4022646e-1f);
  p = fused(p, r, 6.931472e-1f);
  p = fused(p, r, 1.0f);
  return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);  // a product, so that NaN survives
}
SK_FN double exp2_poly(double x) { return exp2(x); }

SK_FN float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
SK_FN double reciprocal(double x) { return 1.0 / x; }

SK_FN float exp_neg_abs(float x) { return exp2_unit(-fabsf(x) * kLog2e); }
SK_FN double exp_neg_abs(double x) { return exp(-fabs(x)); }

SK_FN float sigmoid(float x) { return reciprocal(1.0f + exp2_unit(x * -kLog2e)); }
SK_FN double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

template <class F>
SK_FN F silu(F x) {
  return x * sigmoid(x);
}

// d silu(x) / dx, given sigmoid(x).
template <class F>
SK_FN F silu_slope(F x, F gate) {
  return gate * (F(1) + x * (F(1) - gate));
}

// log(1 + e^x) = max(x, 0) + log1p(w), w = e^-|x|: log1p on [0, 1] is w times a polynomial of degree 9 (minimax,
// 4.7e-9 relative), so a large negative x keeps its relative accuracy and one exponential is all that it takes.
SK_FN float softplus(float x) {
  const float w = exp_neg_abs(x);
  float p = fused(-0.0032440252f, w, 0.019851463f);
  p = fused(p, w, -0.056959536f);
  p = fused(p, w, 0.10603655f);
  p = fused(p, w, -0.15305592f);
  p = fused(p, w, 0.19675939f);
  p = fused(p, w, -0.24954134f);
  p = fused(p, w, 0.33329964f);
  p = fused(p, w, -0.49999902f);
  p = fused(p, w, 1.0f);
  return fused(p, w, x > 0.0f ? x : 0.0f);
}
SK_FN double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(-fabs(x))); }

// The same with log1p of degree 6 (minimax, 1.3e-6 relative): three instructions less, for io of 16 bits.
SK_FN float softplus_short(float x) {
  const float w = exp_neg_abs(x);
  float p = fused(0.014141022f, w, -0.066401795f);
  p = fused(p, w, 0.14922386f);
  p = fused(p, w, -0.2350386f);
  p = fused(p, w, 0.33109447f);
  p = fused(p, w, -0.49986964f);
  p = fused(p, w, 0.99999875f);
  return fused(p, w, fmaxf(x, 0.0f));  // fmaxf turns NaN into 0, but then w is NaN
}

// d softplus(x) / dx = sigmoid(x), from d = softplus(x) alone: 1 - e^-d, by its series where that would cancel.
SK_FN float softplus_slope(float d) {
  float p = fused(1.0f / 5040, d, -1.0f / 720);
  p = fused(p, d, 1.0f / 120);
  p = fused(p, d, -1.0f / 24);
  p = fused(p, d, 1.0f / 6);
  p = fused(p, d, -0.5f);
  p = fused(p, d, 1.0f);
  return d < 0.35f ? p * d : 1.0f - exp2_unit(d * -kLog2e);
}
SK_FN double softplus_slope(double d) { return -expm1(-d); }

}  // namespace scalekern::device
