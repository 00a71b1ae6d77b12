// Tokens of a product with a low-bit weight: as floats, rounded to their kind, and what a block of results goes to.
#pragma once
#include "common/stretches.h"
#include "quant_matmul/cpu_quant_decode.h"

namespace {

using scalekern::QuantMatmulArgs;

constexpr int64_t kParallelWork = 1 << 17;  // multiply-adds: some 10 us on one core, above what waking another takes

// max |x| / top, or the static scale; NaN where that leaves no numbers.
static inline float scale_of_token(const float* x, int64_t count, float top, float given) {
  constexpr int W = kLanes<float>;
  VecF largest = {};
  VecI strange = {};
  int64_t k = 0;
  for (; k + W <= count; k += W) {
    const VecF v = load(x + k), a = v < 0 ? -v : v;
    largest = a > largest ? a : largest;
    strange |= v != v;
  }
  float all = 0;
  bool nan = false;
  for (int i = 0; i < W; ++i) all = largest[i] > all ? largest[i] : all, nan = nan || strange[i];
  for (; k < count; ++k) {
    const float a = x[k] < 0 ? -x[k] : x[k];
    all = a > all ? a : all, nan = nan || x[k] != x[k];
  }
  if (given > 0) return nan ? __builtin_nanf("") : given;
  return nan || all == __builtin_inff() ? __builtin_nanf("") : all / top;
}

// x / scale to the nearest whole number within +-top, halves to even; 0 where the scale is no number.
static inline void round_to_whole(const float* x, int64_t count, float scale, float top, float* dst) {
  const bool usable = scale > 0;
  for (int64_t k = 0; k < count; ++k) {
    float v = usable ? x[k] / scale : 0.0f;
    v = v < -top ? -top : v;
    v = v > top ? top : v;
    dst[k] = (v + kRoundMagic<float>) - kRoundMagic<float>;
  }
}

// To the nearest float8_e4m3, halves to even, at most 448; what is not finite stays.
static inline float round_to_e4m3(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f800000) return v;
  const float a = from_bits(magnitude);
  float r = a < 0x1p-6f ? ((a * 512 + kRoundMagic<float>) - kRoundMagic<float>) / 512
                        : from_bits((magnitude + 0x7ffff + (magnitude >> 20 & 1)) & ~0xfffffu);
  r = r > 448 ? 448 : r;
  return bits >> 31 ? -r : r;
}

// The tokens as floats, rows `pitch` apart and 0 from K to the pitch: where they lie, when they lie so. With `scales`,
// rounded tokens are left without theirs, which go there.
class Tokens {
 public:
  Tokens(const QuantMatmulArgs& a, int64_t multiple, float* scales = nullptr)
      : K_(a.w.columns), pitch_(round_up(K_, multiple)), own_(in_place(a) ? 0 : a.tokens * pitch_) {
    if (in_place(a)) {
      data_ = static_cast<const float*>(a.x.data), pitch_ = a.x.row;
      return;
    }
    data_ = own_;
    parallel_if(a.tokens * K_ >= kParallelWork, a.tokens, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        float* x = own_ + m * pitch_;
        load_row(a.x, m, K_, x);
        zero(x + K_, pitch_ - K_);
        if (a.activation_max == 0) continue;
        const float scale = scale_of_token(x, K_, a.activation_max, a.activation_scale);
        if (a.activation_max != 448) round_to_whole(x, K_, scale, a.activation_max, x);
        else
          for (int64_t k = 0; k < K_; ++k) x[k] = scale == 0 ? 0.0f : round_to_e4m3(x[k] / scale);
        if (scales) scales[m] = scale;
        else
          for (int64_t k = 0; k < K_; ++k) x[k] *= scale;
      }
    });
  }
  const float* operator[](int64_t m) const { return data_ + m * pitch_; }
  int64_t pitch() const { return pitch_; }

 private:
  bool in_place(const QuantMatmulArgs& a) const {
    return a.activation_max == 0 && a.x.dtype == QuantDtype::f32 && (a.x.column == 1 || K_ == 1) && pitch_ == K_;
  }

  int64_t K_, pitch_;
  Buffer<float> own_;
  const float* data_;
};

// p[row, first .. first + count) = src, rounded.
static inline void store_row(const QuantPart& p, int64_t row, int64_t first, int64_t count, const float* src) {
  void* base = const_cast<void*>(p.data);
  const int64_t offset = row * p.row + first * p.column;
  switch (p.dtype) {
    case QuantDtype::f64:
      for (int64_t i = 0; i < count; ++i) at<double>(base, offset)[i * p.column] = double(src[i]);
      return;
    case QuantDtype::f16: return narrow(at<f16>(base, offset), p.column, src, count);
    case QuantDtype::bf16: return narrow(at<bf16>(base, offset), p.column, src, count);
    default: return narrow(at<float>(base, offset), p.column, src, count);
  }
}

// out[m, first .. first + count) = sums[i] scale + bias[i].
static inline void store_results(
    const QuantMatmulArgs& a, int64_t m, int64_t first, int64_t count, float* sums, float scale, const float* bias) {
  for (int64_t i = 0; i < count; ++i) sums[i] = sums[i] * scale + bias[i];
  store_row(a.out, m, first, count, sums);
}

// bias[first ..) of a block of outputs, 0 where there is none.
static inline void load_bias(const QuantMatmulArgs& a, int64_t first, int64_t count, float* bias) {
  if (a.bias.data) load_part(a.bias, first * a.bias.column, a.bias.column, count, bias);
  else zero(bias, count);
}

}  // namespace
