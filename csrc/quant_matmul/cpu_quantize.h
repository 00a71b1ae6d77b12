// Symmetric quantization of a line to integers of one scale: the largest magnitude becomes the largest integer.
#pragma once
#include "common/vec.h"

namespace {

// The larger magnitude; a NaN wins and stays.
template <class V>
static inline V larger(V most, V x) {
  const V magnitude = x < 0 ? -x : x;
  return (magnitude > most) | (magnitude != magnitude) ? magnitude : most;
}

template <class F>
static F largest_magnitude(const F* y, int64_t count) {
  constexpr int W = kLanes<F>;
  Vec<F> a{}, b{};
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) a = larger(a, load(y + i)), b = larger(b, load(y + i + W));
  a = larger(a, b);
  F most = 0;
  for (int lane = 0; lane < W; ++lane) {
    const F x = a[lane];
    most = (x > most) | (x != x) ? x : most;
  }
  for (; i < count; ++i) {
    const F x = y[i] < 0 ? -y[i] : y[i];
    most = (x > most) | (x != x) ? x : most;
  }
  return most;
}

// y / scale, at most `most` in magnitude, rounded half to even; 0 where that is not a number (a group of zeros).
template <class F>
static inline VecInt<F> quotient(Vec<F> y, Vec<F> scale, F most) {
  const Vec<F> zero{}, high = splat(most);
  Vec<F> v = y / scale;
  v = v > high ? high : v;
  v = v < -high ? -high : v;
  v = v == v ? v : zero;
  return (VecInt<F>)(v + kRoundMagic<F>) - (VecInt<F>)splat(kRoundMagic<F>);
}

template <class F>
static void quantize(int8_t* q, float* scale_out, const F* y, int64_t count, int most) {
  constexpr int W = kLanes<F>;
  typedef int8_t Bytes __attribute__((vector_size(W)));
  const float scale = float(largest_magnitude(y, count) / F(most));
  *scale_out = scale;
  const Vec<F> divisor = splat(F(scale));
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const Bytes b = __builtin_convertvector(quotient<F>(load(y + i), divisor, F(most)), Bytes);
    __builtin_memcpy(q + i, &b, W);
  }
  if (i == count) return;
  Vec<F> rest{};
  for (int lane = 0; lane < count - i; ++lane) rest[lane] = y[i + lane];
  const VecInt<F> last = quotient<F>(rest, divisor, F(most));
  for (int lane = 0; lane < count - i; ++lane) q[i + lane] = int8_t(last[lane]);
}

}  // namespace
