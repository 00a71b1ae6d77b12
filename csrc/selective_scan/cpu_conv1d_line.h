// The loop of the short causal convolution over a tile in L1, shared by its sequence form and its update.
#pragma once
#include "selective_scan/conv1d.h"
#include "selective_scan/cpu_tile.h"

namespace {

using scalekern::kConvMaxWidth;

// y / (1 + e^-y). Plain 2^(-y log2 e) will do: where its error grows with |y|, silu is y or next to nothing.
template <class V>
static inline V one_plus_exp_minus(V y) {
  return 1 + exp2v(y * -1.44269504088896340736f);
}
static inline VecD one_plus_exp_minus(VecD y) { return 1 + expv(-y); }

// The forward loop: `steps` vectors, `step` apart in x and `out_step` in out; in x the next tap lies `tap` further.
// filter holds the taps and then the bias, `pitch` apart.
template <int W, bool silu, class T, class F = Compute<T>>
void forward_line(
    const T* x, T* out, int64_t tap, int64_t step, int64_t out_step, int64_t steps, const F* filter, int64_t pitch) {
  Vec<F> w[W];
  for (int k = 0; k < W; ++k) w[k] = load(filter + k * pitch);
  const Vec<F> bias = load(filter + W * pitch);
  for (int64_t s = 0; s < steps; ++s, x += step, out += out_step) {
    Vec<F> y = bias;
    for (int k = 0; k < W; ++k) y += w[k] * load_as<F>(x + k * tap);
    store_as<F>(out, silu ? y / one_plus_exp_minus(y) : y);
  }
}

template <class T>
using ForwardLine = decltype(&forward_line<2, false, T>);

template <class T, int W = 2>
ForwardLine<T> forward_line_for(int64_t width, bool silu) {
  if constexpr (W < kConvMaxWidth) {
    if (width > W) return forward_line_for<T, W + 1>(width, silu);
  }
  return silu ? &forward_line<W, true, T> : &forward_line<W, false, T>;
}

}  // namespace
