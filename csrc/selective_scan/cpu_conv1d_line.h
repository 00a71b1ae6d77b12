// The loops of the short causal convolution over one tile, on L1 or on the tensors themselves.
#pragma once
#include "selective_scan/conv1d.h"
#include "selective_scan/cpu_tile.h"

namespace {

using scalekern::kConvMaxWidth;

constexpr int64_t kAhead = 24;  // vectors

// A few lines ahead of a loop that goes through memory: what it will read, and where it will write.
template <class T>
static inline void prefetch(const T* x, const T* out, int64_t step, int64_t out_step) {
  __builtin_prefetch(x + kAhead * step, 0);
  __builtin_prefetch(out + kAhead * out_step, 1);
}

// The forward loop: `steps` vectors, `step` apart in x and `out_step` in out; in x the next tap lies `tap` further.
// filter holds the taps and then the bias, `pitch` apart.
template <int W, bool silu, class T, class F = Compute<T>>
void forward_line(
    const T* x, T* out, int64_t tap, int64_t step, int64_t out_step, int64_t steps, const F* filter, int64_t pitch) {
  Vec<F> w[W];
  for (int k = 0; k < W; ++k) w[k] = load(filter + k * pitch);
  const Vec<F> bias = load(filter + W * pitch);
  for (int64_t s = 0; s < steps; ++s, x += step, out += out_step) {
    prefetch(x, out, step, out_step);
    Vec<F> y = bias;
    for (int k = 0; k < W; ++k) y += w[k] * load_as<F>(x + k * tap);
    store_as<F>(out, silu ? siluv(y) : y);
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

// --- backward ---

template <bool silu, class F>
static inline Vec<F> through_activation(Vec<F> dout, Vec<F> pre) {
  if (!silu) return dout;
  const Vec<F> gate = 1 / one_plus_exp_minus(pre);
  return dout * gate * (1 + pre * (1 - gate));
}

// Distances of the backward loop: vectors of x, of dout and of the tile of dpre; in x and dpre the next tap.
struct Walk {
  int64_t x_step, dout_step, dpre_step, tap;
};

// dpre = dout act'(pre). The first `steps` vectors add to the parameter gradients, the rest is halo.
template <int W, bool silu, class T, class F = Compute<T>>
void dpre_line(
    const T* x, const T* dout, F* dpre, const Walk& walk, int64_t steps, int64_t steps_with_halo, const F* filter,
    F* sums,
    int64_t pitch) {
  Vec<F> w[W], dw[W] = {}, dbias = {}, taps[W];
  for (int k = 0; k < W; ++k) w[k] = load(filter + k * pitch);
  const Vec<F> bias = load(filter + W * pitch);
  const auto next = [&] {
    Vec<F> pre = bias;
    for (int k = 0; k < W; ++k) taps[k] = load_as<F>(x + k * walk.tap), pre += w[k] * taps[k];
    const Vec<F> d = through_activation<silu, F>(load_as<F>(dout), pre);
    store(dpre, d);
    x += walk.x_step, dout += walk.dout_step, dpre += walk.dpre_step;
    return d;
  };
  for (int64_t s = 0; s < steps; ++s) {
    const Vec<F> d = next();
    for (int k = 0; k < W; ++k) dw[k] += d * taps[k];
    dbias += d;
  }
  for (int64_t s = steps; s < steps_with_halo; ++s) next();
  // Sums of tiles, not one long sum: a constant gradient over 1,024 tokens had lost 3e-6 in fp32.
  for (int k = 0; k < W; ++k) store(sums + k * pitch, load(sums + k * pitch) + dw[k]);
  store(sums + W * pitch, load(sums + W * pitch) + dbias);
}

// dx[t] = sum_w weight[w] dpre[t + (W - 1) - w]
template <int W, class T, class F = Compute<T>>
void dx_line(
    const F* dpre, T* dx, int64_t tap, int64_t step, int64_t dx_step, int64_t steps, const F* filter, int64_t pitch) {
  Vec<F> w[W];
  for (int k = 0; k < W; ++k) w[k] = load(filter + k * pitch);
  for (int64_t s = 0; s < steps; ++s, dpre += step, dx += dx_step) {
    Vec<F> d = w[W - 1] * load(dpre);
    for (int k = W - 2; k >= 0; --k) d += w[k] * load(dpre + (W - 1 - k) * tap);
    store_as<F>(dx, d);
  }
}

// The loops of one filter width. A `staged` one works on tiles in L1, a `direct` one on the tensors themselves.
template <class T, class F = Compute<T>>
struct Lines {
  ForwardLine<F> forward_staged;
  ForwardLine<T> forward_direct;
  decltype(&dpre_line<2, false, F>) dpre_staged;
  decltype(&dpre_line<2, false, T>) dpre_direct;
  decltype(&dx_line<2, F>) dx_staged;
  decltype(&dx_line<2, T>) dx_direct;
};

template <class T, int W = 2, class F = Compute<T>>
Lines<T> lines_for(int64_t width, bool silu) {
  if constexpr (W < kConvMaxWidth) {
    if (width > W) return lines_for<T, W + 1>(width, silu);
  }
  return {
      forward_line_for<F>(width, silu),
      forward_line_for<T>(width, silu),
      silu ? &dpre_line<W, true, F> : &dpre_line<W, false, F>,
      silu ? &dpre_line<W, true, T> : &dpre_line<W, false, T>,
      &dx_line<W, F>,
      &dx_line<W, T>,
  };
}

}  // namespace
