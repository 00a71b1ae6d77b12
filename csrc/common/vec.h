// Vectors of the level being compiled (SCALEKERN_ISA), through the compiler's vector extension: one register each.
// Included by cpu_*_kernel.cpp only; everything is static, so that no level's code is shared with another's.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SCALEKERN_VEC_BYTES 64
#elif defined(__AVX2__)
#define SCALEKERN_VEC_BYTES 32
#else
#define SCALEKERN_VEC_BYTES 16
#endif

namespace {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(SCALEKERN_VEC_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
using VecF = Vec<float>;
using VecD = Vec<double>;
using VecI = Vec<int32_t>;

template <class T>
constexpr int kLanes = SCALEKERN_VEC_BYTES / int(sizeof(T));

template <class T>
static inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// 2^x for float. Below -150 it is 0, above 128 inf, NaN stays NaN; within 2 ulp of the exact value elsewhere.
// A degree-6 polynomial on [-1/2, 1/2] (minimax, relative error 2e-8), then two exact scalings, so that
// subnormal results are right.
static inline VecF exp2v(VecF x) {
#if defined(__AVX512F__)
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const VecF r = x - n;
#else
  const VecF low = splat(-152.0f), high = splat(130.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF n = (x + magic) - magic;
  const VecF r = x - n;
#endif
  VecF p = splat(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  // x = +-inf makes r NaN; scalef of a clean 1 is what is meant there.
  p = (VecF)_mm512_mask_mov_ps((__m512)p, _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)x), _mm512_set1_ps(256.0f), _CMP_GT_OQ),
                               _mm512_set1_ps(1.0f));
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const VecI e = __builtin_convertvector(n, VecI);
  const VecI half = e >> 1;
  const VecF scale1 = (VecF)((half + 127) << 23), scale2 = (VecF)((e - half + 127) << 23);
  return p * scale1 * scale2;
#endif
}

static inline VecF expv(VecF x) {
  // x log2(e) in two parts: the product's rounding error would be multiplied by |x|.
  const VecF log2e_hi = splat(1.44269502f), log2e_lo = splat(1.92596299e-8f);
  const VecF y = x * log2e_hi;
#if defined(__FMA__)
  const VecF error = x * log2e_hi - y + x * log2e_lo;
#else
  const VecF error = x * log2e_lo;
#endif
  const VecF e = exp2v(y);
  // 2^(y + error) = 2^y (1 + error ln 2); where e is 0 or inf, or error is not finite, the correction is left out.
  const VecF correction = error * 0.693147181f;
  const VecF small = splat(1e-3f);
  const VecF safe = (correction < small) & (correction > -small) ? correction : VecF{};
  return e + e * safe;
}

static inline VecD expv(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

static inline VecD exp2v(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

template <class V>
static inline V sigmoidv(V x) {
  return 1 / (1 + expv(-x));
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). log1p on [0, 1] through s = w / (2 + w), |s| <= 1/3:
// log1p(w) = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...), accurate for tiny w too.
static inline VecF softplusv(VecF x) {
  const VecF zero{};
  const VecF magnitude = x < zero ? -x : x;
  const VecF w = expv(-magnitude);
  const VecF s = w / (2.0f + w), q = s * s;
  VecF p = splat(1.0f / 13);
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  const VecF log1p_w = 2.0f * (s + s * q * p);
  return (x > zero ? x : zero) + log1p_w + (x != x ? x : zero);
}

static inline VecD softplusv(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i)
    x[i] = x[i] > 0 ? x[i] + __builtin_log1p(__builtin_exp(-x[i])) : __builtin_log1p(__builtin_exp(x[i]));
  return x;
}

// --- storage types: conversions to and from float, element by element (the compiler vectorizes the loops) ---

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline double to_float(double x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
static inline float to_float(f16 x) {
  _Float16 h;
  __builtin_memcpy(&h, &x.bits, 2);
  return float(h);
}

static inline void from_float(float& out, float x) { out = x; }
static inline void from_float(double& out, double x) { out = x; }
static inline void from_float(bf16& out, float x) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
static inline void from_float(f16& out, float x) {
  const _Float16 h = _Float16(x);
  __builtin_memcpy(&out.bits, &h, 2);
}

// The type that a storage type is computed in.
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

}  // namespace
