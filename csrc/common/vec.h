// Vectors of the level being compiled (SCALEKERN_ISA), through the compiler's vector extension: one register each.
// Included by cpu_*_kernel.cpp only; everything is static, so that no level's code is shared with another's.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // GCC 12 warns of its own headers' undefined operands when they are inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
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

// Integers of a float type's width, and where its exponent sits.
template <class F>
struct IntOf {
  using type = int32_t;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct IntOf<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
};
template <class F>
using VecInt = Vec<typename IntOf<F>::type>;

// 1.5 * 2^mantissa: adding it to a small number rounds that to an integer, which the low bits of the sum then hold.
template <class F>
constexpr F kRoundMagic = F(int64_t(3) << (IntOf<F>::mantissa - 1));

// 2^r on [-1/2, 1/2] as 1 + r q(r): exactly 1 at 0, so that a decay close to 1 keeps the digits of its distance from 1.
// float: degree 6, fitted to 2e-9 relative before rounding. double: the Taylor series to degree 13, 1e-17.
static inline VecF exp2_fraction(VecF r) {
  VecF p = splat(1.5353362e-4f);
  p = p * r + 1.3398875e-3f;
  p = p * r + 9.6184369e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314718e-1f;
  return p * r + 1.0f;
}
static inline VecD exp2_fraction(VecD r) {
  const double ln2 = 0.693147180559945309417;
  const VecD x = r * ln2;
  VecD p = splat(1.0 / 6227020800.0);
  const double factorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                               720.0,       120.0,      24.0,      6.0,      2.0,     1.0};
  for (double f : factorials) p = p * x + 1.0 / f;
  return p * x + 1.0;
}

// p * 2^n, n an integer in magic + n form; the exponent is added in two exact steps, so subnormal results are right.
template <class F>
static inline Vec<F> scale_by_pow2(Vec<F> p, Vec<F> n_plus_magic) {
#if defined(__AVX512F__)
  const Vec<F> n = n_plus_magic - kRoundMagic<F>;
  if constexpr (sizeof(F) == 4) return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
  else return (VecD)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  using I = IntOf<F>;
  const F magic = kRoundMagic<F>;
  typename I::type magic_bits;
  __builtin_memcpy(&magic_bits, &magic, sizeof magic);
  const VecInt<F> e = (VecInt<F>)n_plus_magic - magic_bits, half = e >> 1;
  return p * (Vec<F>)((half + I::bias) << I::mantissa) * (Vec<F>)((e - half + I::bias) << I::mantissa);
#endif
}

// 2^x: 0 below the subnormals, inf above the largest number, NaN for NaN; within 2 ulp elsewhere.
template <class F>
static inline Vec<F> exp2_any(Vec<F> x) {
  const Vec<F> low = splat(F(-IntOf<F>::bias - IntOf<F>::mantissa - 3)), high = splat(F(IntOf<F>::bias + 3));
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<F> t = x + kRoundMagic<F>;
  return scale_by_pow2<F>(exp2_fraction(x - (t - kRoundMagic<F>)), t);
}
static inline VecF exp2v(VecF x) { return exp2_any<float>(x); }
static inline VecD exp2v(VecD x) { return exp2_any<double>(x); }

// 2^(x y) where |x y| is known to stay below kExp2Bound: one rounding less than exp2v(x * y), and 11 operations.
template <class F>
static inline Vec<F> exp2_product_bounded(Vec<F> x, Vec<F> y) {
  const Vec<F> t = x * y + kRoundMagic<F>;
  const Vec<F> r = x * y - (t - kRoundMagic<F>);
  return (Vec<F>)((VecInt<F>)exp2_fraction(r) + ((VecInt<F>)t << IntOf<F>::mantissa));
}

// The same for any x and y.
template <class F>
static inline Vec<F> exp2_product(Vec<F> x, Vec<F> y) {
  const Vec<F> low = splat(F(-IntOf<F>::bias - IntOf<F>::mantissa - 3)), high = splat(F(IntOf<F>::bias + 3));
  const Vec<F> product = x * y;
  Vec<F> clamped = product < low ? low : product;
  clamped = clamped > high ? high : clamped;
  const Vec<F> t = clamped + kRoundMagic<F>, n = t - kRoundMagic<F>;
  return scale_by_pow2<F>(exp2_fraction(clamped == product ? x * y - n : clamped - n), t);
}

template <class F>
constexpr F kExp2Bound = F(IntOf<F>::bias - 2);

// min and max that keep a NaN of x: one instruction each, which GCC 12 does not make of a comparison.
static inline VecF at_most(VecF x, VecF bound) {
#if defined(__AVX512F__)
  return (VecF)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)bound, (__m256)x);
#else
  return bound < x ? bound : x;
#endif
}
static inline VecF at_least(VecF x, VecF bound) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return bound > x ? bound : x;
#endif
}

// 2^x where it is added to 1 (the denominator of a sigmoid): within 2e-7 of its value, no less than 2^-126, inf from
// 2^128 on, NaN for NaN. A polynomial of degree 5 and one shift: 13 operations, exp2v has 19 without AVX-512.
static inline VecF exp2_beside_one(VecF x) {
  const VecF low = splat(-126.0f), high = splat(128.0f);
  x = at_least(at_most(x, high), low);
  const VecF t = x + kRoundMagic<float>, r = x - (t - kRoundMagic<float>);
  VecF p = splat(1.32764725e-3f);
  p = p * r + 9.67554096e-3f;
  p = p * r + 5.55071309e-2f;
  p = p * r + 2.40221202e-1f;
  p = p * r + 6.93146944e-1f;
  p = p * r + 1.0f;
  return (VecF)((VecI)p + ((VecI)t << IntOf<float>::mantissa));
}

// e^x = 2^n 2^r with n = round(x log2 e) and r from x - n ln 2, ln 2 in two parts: exact for large |x| too.
template <class F>
static inline Vec<F> exp_any(Vec<F> x) {
  constexpr bool f32 = sizeof(F) == 4;
  const F log2e = F(1.44269504088896340736), ln2_hi = f32 ? F(0.693359375) : F(0x1.62e42feep-1);
  const F ln2_lo = f32 ? F(-2.12194440e-4) : F(1.9082149292705877e-10);
  const Vec<F> low = splat(F(f32 ? -106 : -750)), high = splat(F(f32 ? 91 : 712));
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<F> t = x * log2e + kRoundMagic<F>, n = t - kRoundMagic<F>;
  const Vec<F> r = ((x - n * ln2_hi) - n * ln2_lo) * log2e;
  return scale_by_pow2<F>(exp2_fraction(r), t);
}
static inline VecF expv(VecF x) { return exp_any<float>(x); }
static inline VecD expv(VecD x) { return exp_any<double>(x); }

// 1 / x for x in [1, inf]: an estimate and one Newton step (2 ulp) where the machine has one, else a division.
template <class F>
static inline Vec<F> reciprocal_of_at_least_one(Vec<F> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    const Vec<F> y = (VecF)_mm512_rcp14_ps((__m512)x);
    const Vec<F> better = y + y * (1 - x * y);
    return x < 1e37f ? better : y;  // 0 * inf would be NaN; x != x takes y, a NaN
  }
#endif
  return 1 / x;
}

template <class V>
struct ScalarOf {
  using type = float;
};
template <>
struct ScalarOf<VecD> {
  using type = double;
};
template <class V>
static inline V sigmoidv(V x) {
  return reciprocal_of_at_least_one<typename ScalarOf<V>::type>(1 + expv(-x));
}

// y / (1 + e^-y). Plain 2^(-y log2 e) will do: where its error grows with |y|, silu is y or next to nothing.
static inline VecF one_plus_exp_minus(VecF y) { return 1 + exp2_beside_one(y * -1.44269504088896340736f); }
static inline VecD one_plus_exp_minus(VecD y) { return 1 + expv(-y); }
template <class V>
static inline V siluv(V y) {
  return y / one_plus_exp_minus(y);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), which stays accurate on both sides.
static inline VecF softplusv(VecF x) {
  const VecF zero{};
  const VecF w = expv(x > zero ? -x : x);
  // log1p(w) / w on [0, 1], degree 8, 3e-8 relative
  VecF p = splat(5.2326946e-3f);
  p = p * w - 2.9505244e-2f;
  p = p * w + 7.8225963e-2f;
  p = p * w - 1.3663247e-1f;
  p = p * w + 1.9106008e-1f;
  p = p * w - 2.4842982e-1f;
  p = p * w + 3.3319098e-1f;
  p = p * w - 4.9999493e-1f;
  p = p * w + 9.9999994e-1f;
  return p * w + (x > zero ? x : zero) + (x != x ? x : zero);
}

static inline VecD softplusv(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i)
    x[i] = x[i] > 0 ? x[i] + __builtin_log1p(__builtin_exp(-x[i])) : __builtin_log1p(__builtin_exp(x[i]));
  return x;
}

// Sine and cosine: x - n pi / 2 with pi / 2 in parts, then Taylor series on an eighth of a turn; NaN for inf and NaN.
template <class F>
static inline void sincosv(Vec<F> x, Vec<F>& sine, Vec<F>& cosine) {
  constexpr bool f32 = sizeof(F) == 4;
  const auto round = [](Vec<F> v) {
    const F limit = F(int64_t(1) << (IntOf<F>::mantissa - 1));  // above it v has at most one fractional bit
    const Vec<F> rounded = (v + kRoundMagic<F>) - kRoundMagic<F>;
    return (v < limit) & (v > -limit) ? rounded : v;
  };
  const F high = F(f32 ? 1.5703125 : 1.57079632673412561417), middle = F(
      f32 ? 4.837512969970703e-4 : 6.07710050650619224932e-11);
  const F low = F(f32 ? 7.549789948768648e-8 : 0);
  const Vec<F> n = round(x * F(0.63661977236758134308));
  const Vec<F> y = ((x - n * high) - n * middle) - n * low, q = y * y;
  const Vec<F> quadrant = n - 4 * round(n * F(0.25));  // -2 .. 2
  Vec<F> s = splat(F(1)), c = splat(F(1));
  for (int k = f32 ? 5 : 9; k >= 1; --k) {
    s = 1 - s * q * F(1.0 / (2 * k * (2 * k + 1)));
    c = 1 - c * q * F(1.0 / (2 * k * (2 * k - 1)));
  }
  s = s * y;
  const auto odd = (quadrant == 1) | (quadrant == -1);
  const auto flip_s = (quadrant == 2) | (quadrant == -2) | (quadrant == -1);
  const auto flip_c = (quadrant == 2) | (quadrant == -2) | (quadrant == 1);
  const Vec<F> s_abs = odd ? c : s, c_abs = odd ? s : c;
  sine = flip_s ? -s_abs : s_abs;
  cosine = flip_c ? -c_abs : c_abs;
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
static inline float to_float(int8_t x) { return x; }
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
