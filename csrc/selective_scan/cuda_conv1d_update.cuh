// The short causal convolution for the next tokens of a stream.
//
// Bound: memory and the launch: the state is read and written once, W - 1 to K elements a channel.
//
// Split: of the usual step (one token, a window of 3 or 4 that is contiguous, channels beside each other) a thread
// takes 4 channels of 2 rows: their windows are neighbours, so 8-byte loads (16 for fp32), all under way at once, and
// the filter comes once for both rows. Everything else: a thread for a channel of a row.
//
// Measured on an H200 (bf16, B 256, D 8192, W 4, K 3): 13.5 us, 59 % of the copy bandwidth.
//
// Lost, measured on an H200 (bf16, B 256, D 8192, W 4, K 3): that for the usual step too, with 64-bit remainders for
// the places in the window: 52 us and 514 instructions a channel; memory does it in 8.
#pragma once
#include "selective_scan/cuda_conv1d_rows.cuh"

namespace scalekern::conv {

using namespace scalekern::device;

struct UpdateArgs {
  int64_t batch, channels, steps, size;  // size: K tokens of the state
  int width, state_dtype;
  bool silu;
  void *out, *x, *state, *weight, *bias;  // out (B, D, T) contiguous
  int64_t x_b, x_d, x_t, state_s, state_d, state_k, weight_d, weight_w, bias_d;
  Indices lengths, slots;  // cache_seqlens, conv_state_indices
  Divisor by_packs;        // ConvStep: packs of channels of a row
  bool filter_packed;      // ConvStep: four taps and four biases are 16 bytes, aligned
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
    const int64_t b = quotient(i, a.channels), d = i - b * a.channels;
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
    const auto place = [&](int64_t k) {  // of the k-th oldest token, k < K
      k += oldest;
      return (k < a.size ? k : k - a.size) * a.state_k;
    };

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

// One token of a window of kSize, state and tokens of one type.
template <class T, int kSize>
struct ConvStep {
  using F = Compute<T>;
  using Args = UpdateArgs;
  static constexpr int kThreads = 128, kBlocks = sizeof(T) != 2 ? 5 : kSize == 3 ? 8 : 7;
  static constexpr int kChannels = 4, kRows = 2;
  using Channels = Group<T, kChannels>;

  static SK_DEVICE void run(const Args& a) {
    const int packs = int(a.channels) / kChannels, i = int(block_index()) * kThreads + thread_index();
    const int group = a.by_packs.quotient(i), d = (i - group * packs) * kChannels, begin = group * kRows;
    if (begin >= a.batch) return;
    const int rows = a.batch - begin < kRows ? int(a.batch) - begin : kRows;
    Channels x[kRows], old[kRows][kSize];
    T* states[kRows];  // nullptr: padding, or no such row
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) x[r] = Channels::load(static_cast<const T*>(a.x) + (begin + r) * a.x_b + d);
      const int64_t slot = r >= rows ? -1 : a.slots.data ? a.slots[begin + r] : begin + r;
      states[r] = slot < 0 ? nullptr : static_cast<T*>(a.state) + slot * a.state_s + d * kSize;
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        if (states[r]) old[r][k] = Channels::load(states[r] + k * kChannels);
    }
    Group<F, 4> w[kChannels], bias{};  // taps right-aligned
    const F* taps = static_cast<const F*>(a.weight) + d * a.weight_d;
#pragma unroll
    for (int c = 0; c < kChannels; ++c, taps += a.weight_d) {
      if (a.filter_packed) {
        w[c] = Group<F, 4>::load(taps);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) w[c].words[k] = k >= 4 - a.width ? taps[(k - (4 - a.width)) * a.weight_w] : F(0);
      }
    }
    if (a.bias) {
      const F* from = static_cast<const F*>(a.bias) + d * a.bias_d;
      if (a.filter_packed) {
        bias = Group<F, 4>::load(from);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) bias.words[c] = from[c * a.bias_d];
      }
    }
    loads_begin_above();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) return;
      F y[kChannels], fresh[kChannels * kSize];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        F window[4];  // ends with the new token
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const int e = c * kSize + kSize - 3 + k;
          window[k] = widen(old[r][e / kChannels].get(e % kChannels));
        }
        window[3] = widen(x[r].get(c));
        y[c] = bias.words[c];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (k >= 4 - a.width) y[c] = fused(w[c].words[k], window[k], y[c]);
        if (a.silu) y[c] = device::silu(y[c]);
        if (!states[r]) y[c] = 0;
#pragma unroll
        for (int k = 0; k < kSize; ++k) fresh[c * kSize + k] = window[4 - kSize + k];
      }
      Channels::of(y).store(static_cast<T*>(a.out) + (begin + r) * a.channels + d);
      if (!states[r]) continue;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        F part[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) part[c] = fresh[k * kChannels + c];
        Channels::of(part).store(states[r] + k * kChannels);
      }
    }
  }

  // Completes the arguments; false where this kernel does not take them.
  static bool plan(Args& a, int dtype) {
    const auto aligned = [](const void* p, int64_t bytes, int64_t to) {
      return (reinterpret_cast<uintptr_t>(p) | uintptr_t(bytes)) % to == 0;
    };
    const bool usual = a.state_dtype == dtype && !a.lengths.data && a.steps == 1 && a.size == kSize && a.width <= 4;
    if (!usual || a.width > kSize + 1 || a.channels % kChannels != 0 || a.batch * a.channels >= (int64_t(1) << 31) ||
        a.x_d != 1 || a.state_k != 1 || a.state_d != kSize || !aligned(a.x, a.x_b * sizeof(T), alignof(Channels)) ||
        !aligned(a.state, a.state_s * sizeof(T), alignof(Channels)))
      return false;
    a.by_packs = Divisor(a.channels / kChannels);
    a.filter_packed = a.width == 4 && a.weight_w == 1 && aligned(a.weight, a.weight_d * sizeof(F), 16) &&
                      (!a.bias || (a.bias_d == 1 && aligned(a.bias, 0, 16)));
    return true;
  }
};

}  // namespace scalekern::conv
