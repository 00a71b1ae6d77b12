// The short causal convolution for the next tokens of a stream.
//
// Bound: memory and the launch: the state is read and written once, W - 1 to K elements a channel. A thread owns one
// channel of one row, whose K elements are neighbours in memory, so a warp's accesses cover whole lines between them.
// Never measured on a GPU.
#pragma once
#include "common/cuda_block.cuh"
#include "common/view.h"

namespace scalekern::conv {

using namespace scalekern::device;

struct UpdateArgs {
  int64_t batch, channels, steps, size;  // size: K tokens of the state
  int width, state_dtype;
  bool silu;
  void *out, *x, *state, *weight, *bias;  // out (B, D, T) contiguous
  int64_t x_b, x_d, x_t, state_s, state_d, state_k, weight_d, weight_w, bias_d;
  Indices lengths, slots;  // cache_seqlens, conv_state_indices
};

// T: tokens. The state's type is decided at run time.
template <class T>
struct ConvUpdate {
  using F = Compute<T>;
  using Args = UpdateArgs;
  static constexpr int kThreads = 128, kBlocks = 1;
  static constexpr int kWidth = 8;

  static SK_DEVICE void run(const Args& a) {
    with_type(a.state_dtype, [&]<class S>(S*) { with_state<S>(a); });
  }

  template <class S>
  static SK_DEVICE void with_state(const Args& a) {
    using Stored = Compute<S>;
    const int64_t i = block_index() * kThreads + thread_index();
    if (i >= a.batch * a.channels) return;
    const int64_t b = i / a.channels, d = i - b * a.channels;
    const int64_t slot = a.slots.data ? a.slots[b] : b;
    T* out = static_cast<T*>(a.out) + i * a.steps;
    if (slot < 0) {  // padding
      for (int64_t t = 0; t < a.steps; ++t) out[t] = narrow<T>(F(0));
      return;
    }
    const T* x = static_cast<const T*>(a.x) + b * a.x_b + d * a.x_d;
    S* state = static_cast<S*>(a.state) + slot * a.state_s + d * a.state_d;
    const bool circular = a.lengths.data != nullptr;
    // Place of the oldest token: token p lies at p % K, and the next one overwrites the oldest.
    const int64_t oldest = circular ? (a.lengths[b] % a.size + a.size) % a.size : 0;
    const auto place = [&](int64_t k) { return (oldest + k) % a.size * a.state_k; };  // of the k-th oldest token

    F w[kWidth], window[kWidth];  // right-aligned; `window` ends with the newest token
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int tap = k - (kWidth - a.width);
      w[k] = tap >= 0 ? static_cast<const F*>(a.weight)[d * a.weight_d + tap * a.weight_w] : F(0);
      window[k] = tap >= 0 && tap < a.width - 1 ? F(widen(state[place(a.size - (a.width - 1) + tap)])) : F(0);
    }
    const F bias = a.bias ? static_cast<const F*>(a.bias)[d * a.bias_d] : F(0);
    // A window state moves `steps` tokens to the left; a circular one is written in place below.
    for (int64_t k = 0; !circular && k + a.steps < a.size; ++k) state[k * a.state_k] = state[(k + a.steps) * a.state_k];
    for (int64_t t = 0; t < a.steps; ++t) {
      const T token = x[t * a.x_t];
      if (t > 0) {
#pragma unroll
        for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
      }
      F y = bias;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (k == kWidth - 1) window[k] = widen(token);
        if (k >= kWidth - a.width) y = fused(w[k], window[k], y);
      }
      out[t] = narrow<T>(a.silu ? device::silu(y) : y);
      // The last K of the old tokens and the new ones stay.
      const int64_t kept = a.size - a.steps + t;
      const int64_t to = circular ? (oldest + t) % a.size : kept;
      if (kept >= 0) state[to * a.state_k] = narrow<S>(Stored(widen(token)));
    }
  }
};

}  // namespace scalekern::conv
