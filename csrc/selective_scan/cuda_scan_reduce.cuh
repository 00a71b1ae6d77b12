// The backward scan's last step: sums of the partial gradients that its blocks left behind, in a fixed order.
//
// Bound: memory, at most one float a token and channel read once (cuda_scan_bwd.cuh says why it is no more).
#pragma once
#include "selective_scan/cuda_scan.cuh"

namespace scalekern::scan {

// dB or dC (B, G, N, L) from the slots of the channel blocks, added in order.
template <class T>
struct ReduceMatrix {
  using F = Compute<T>;
  struct Args {
    const void* partial;  // (B, segments, slots, L, width)
    void* out;
    int64_t b, g, n, l;   // strides of out
    int64_t batch, groups, length, slots;  // slots: of all segments of one group
    int states, width, first;              // first: 0 for dB, padded for dC
  };
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index();
    if (i >= a.batch * a.groups * a.length * a.states) return;
    const int64_t n = i % a.states, t = i / a.states % a.length, row = i / a.states / a.length;
    const F* from = static_cast<const F*>(a.partial) + (row * a.slots * a.length + t) * a.width + a.first + n;
    F sum = 0;
    for (int64_t s = 0; s < a.slots; ++s) sum += from[s * a.length * a.width];
    static_cast<T*>(a.out)[row / a.groups * a.b + row % a.groups * a.g + n * a.n + t * a.l] = narrow<T>(sum);
  }
};

// A parameter's gradient (D, N) from its rows (B, D, N), added in order; N = 1 for vectors.
template <class F, class T>
struct ReduceBatch {
  struct Args {
    const void* partial;
    void* out;
    int64_t d, n, batch, channels, states;
  };
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index(), count = a.channels * a.states;
    if (i >= count) return;
    F sum = 0;
    for (int64_t b = 0; b < a.batch; ++b) sum += static_cast<const F*>(a.partial)[b * count + i];
    static_cast<T*>(a.out)[i / a.states * a.d + i % a.states * a.n] = narrow<T>(sum);
  }
};

}  // namespace scalekern::scan
