// Short causal depthwise convolution, forward and backward, and its step for decoding.
//
// These kernels take channels-last tensors, seq_idx and packed sequences; cuda_conv1d_time.cuh has whole rows along
// time.
//
// Bound: memory, 2 elements a token and channel forward (x, out) and 3 backward (x, dout, dx).
//
// Split: a thread makes 8 tokens of V channels. Where time is contiguous, V is 1 and the 8 tokens and the 8 before them
// are 16-byte loads; where channels are, V fill 8 bytes (2 channels backward, for the registers) and a warp reads up to
// 256 bytes in a row for each token. The tokens before are read again by the neighbour, from L1 or L2, which costs no
// memory traffic.
// Threads whose tokens and history lie inside one run or sequence take this path; the others (at the ends of rows, runs
// and packed sequences) go element by element through `history`, which knows the rules.
//
// Shape letters: B batch, D channels, L length, W filter width, S packed sequences.
#pragma once
#include "selective_scan/cuda_conv1d_rows.cuh"

namespace scalekern::conv {

template <class T, int kWidth, int V>
struct ConvFwd {
  using F = Compute<T>;
  using Args = conv::Args;
  static constexpr int kThreads = 128, kBlocks = 1;

  // Neighbouring threads along the axis that is contiguous.
  static SK_DEVICE Place place_of(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index();
    const int64_t groups = (a.length + kTokens - 1) / kTokens, packs = (a.channels + V - 1) / V;
    const int64_t fast = a.by_time ? groups : packs, slow = a.by_time ? packs : groups;
    const int64_t rest = quotient(i, fast), inner = i - rest * fast, b = quotient(rest, slow), outer = rest - b * slow;
    const int64_t d = (a.by_time ? outer : inner) * V, left = a.channels - d;
    return {b, (a.by_time ? inner : outer) * kTokens, d, int(left < V ? left : V)};
  }

  static SK_APART void by_element(const Args& a, const Place& p) {
    for (int j = 0; j < kTokens && p.t0 + j < a.length; ++j) {
      const Run run = run_at(a, p.b, p.t0 + j);
      for (int v = 0; v < p.count; ++v) {
        F y = run.padding ? F(0) : convolve<T>(a, run, p.b, p.d + v, p.t0 + j);
        *at<T>(a.out, p.b, p.d + v, p.t0 + j) = narrow<T>(a.silu ? device::silu(y) : y);
      }
    }
  }

  static SK_DEVICE void run(const Args& a) {
    constexpr int kHead = kBefore<kWidth, V>;
    const Place p = place_of(a);
    if (p.b >= a.batch) return;
    if (!inside_run(a, run_at(a, p.b, p.t0), p.t0, kHead, kTokens)) return by_element(a, p);
    Strip<T, kHead + kTokens, V> x;
    x.load(at<T>(a.x, p.b, p.d, p.t0 - kHead), a.x.d, a.x.l, p.count);
    Strip<T, kTokens, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      F w[kWidth], column[kWidth - 1 + kTokens];
      const int64_t d = v < p.count ? p.d + v : p.d;
      load_filter(a, d, w);
      const F bias = bias_at<F>(a, d);
#pragma unroll
      for (int i = 0; i < kWidth - 1 + kTokens; ++i) column[i] = widen(x.v[kHead - (kWidth - 1) + i][v]);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const F y = convolve_column<kWidth>(a, w, bias, column + j);
        out.v[j][v] = narrow<T>(a.silu ? device::silu(y) : y);
      }
    }
    out.store(at<T>(a.out, p.b, p.d, p.t0), a.out.d, a.out.l, p.count);
  }
};

// A block owns channel_lanes * V channels and one slice of the (batch, group of tokens) pairs.
template <class T, int kWidth, int V>
struct ConvBwd {
  using F = Compute<T>;
  using Args = conv::Args;
  static constexpr int kThreads = 128, kBlocks = 1;
  static constexpr int kSums = kWidth + 1;  // dweight and dbias of a channel

  // dL/dx at `position` by the tokens of its run, or of the run that follows its initial state.
  static SK_DEVICE F input_gradient(const Args& a, const Run& run, int64_t b, int64_t d, int64_t position) {
    F sum = 0;
    for (int j = 0; j < a.width; ++j) {
      const int64_t t = position + j;
      if (t < run.begin || t >= run.end) continue;
      sum = fused(weight_at<F>(a, d, a.width - 1 - j), slope<T>(a, run, b, d, t), sum);
    }
    return sum;
  }

  // The gradient that reaches `position` through the final state; end: of its sequence, or of the row's last run.
  static SK_DEVICE F final_gradient(const Args& a, int64_t row, int64_t d, int64_t position, int64_t end) {
    const int64_t k = position - (end - (a.width - 1));
    return a.final.p && k >= 0 && k < a.width - 1 ? F(widen(*at<T>(a.final, row, d, k))) : F(0);
  }

  static SK_DEVICE void by_element(const Args& a, const Place& p, F (&sums)[V][kSums]) {
    for (int j = 0; j < kTokens && p.t0 + j < a.length; ++j) {
      const int64_t t = p.t0 + j;
      const Run run = run_at(a, p.b, t);
      const int64_t row = a.cu.data ? run.initial : p.b;
      const bool last = a.cu.data || run.end == a.length;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v >= p.count) continue;
        const int64_t d = p.d + v;
        F dx = input_gradient(a, run, p.b, d, t);
        if (last) dx += final_gradient(a, row, d, t, run.end);
        *at<T>(a.out, p.b, d, t) = narrow<T>(dx);
        const F g = slope<T>(a, run, p.b, d, t);
        if (run.padding) continue;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const int w = k - (kWidth - a.width);
          if (w >= 0) sums[v][k] = fused(g, history<T>(a, run, p.b, d, t - (a.width - 1) + w), sums[v][k]);
        }
        sums[v][kWidth] += g;
      }
    }
  }

  static SK_DEVICE void inside(const Args& a, const Place& p, F (&sums)[V][kSums]) {
    constexpr int kHead = kBefore<kWidth, V>, kAhead = kHead, kAll = kHead + kTokens + kAhead;
    Strip<T, kAll, V> x;
    Strip<T, kTokens + kAhead, V> dout;
    x.load(at<T>(a.x, p.b, p.d, p.t0 - kHead), a.x.d, a.x.l, p.count);
    dout.load(at<T>(a.dout, p.b, p.d, p.t0), a.dout.d, a.dout.l, p.count);
    Strip<T, kTokens, V> dx;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      constexpr int kSlopes = kTokens + kWidth - 1;
      F w[kWidth], column[kWidth - 1 + kSlopes], g[kSlopes];
      const int64_t d = v < p.count ? p.d + v : p.d;
      load_filter(a, d, w);
      const F bias = bias_at<F>(a, d);
#pragma unroll
      for (int i = 0; i < kWidth - 1 + kSlopes; ++i) column[i] = widen(x.v[kHead - (kWidth - 1) + i][v]);
#pragma unroll
      for (int j = 0; j < kSlopes; ++j) {
        g[j] = widen(dout.v[j][v]);
        if (a.silu) g[j] = through_activation(a, g[j], convolve_column<kWidth>(a, w, bias, column + j));
      }
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        F sum = 0;
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          if (i < a.width) sum = fused(w[kWidth - 1 - i], g[j + i], sum);
        dx.v[j][v] = narrow<T>(sum);
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (k >= kWidth - a.width) sums[v][k] = fused(g[j], column[j + k], sums[v][k]);
        sums[v][kWidth] += g[j];
      }
    }
    dx.store(at<T>(a.out, p.b, p.d, p.t0), a.out.d, a.out.l, p.count);
  }

  // Sums over the threads of a channel in a fixed order, to this slice's row.
  static SK_DEVICE void save_sums(const Args& a, int64_t slice, int64_t first, F (&sums)[V][kSums]) {
    F* shared = reinterpret_cast<F*>(shared_memory());
    const int lanes = a.channel_lanes, lane = thread_index() % lanes, warp = thread_index() / 32;
    const int count = lanes * V * kSums;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        for (int m = lanes; m < 32; m *= 2) sums[v][k] += shuffle_xor(sums[v][k], m);
        if ((thread_index() & 31) < lanes) shared[warp * count + (lane * V + v) * kSums + k] = sums[v][k];
      }
    }
    sync_threads();
    for (int i = thread_index(); i < count; i += kThreads) {
      const int k = i % kSums;
      const int64_t d = first + i / kSums;
      F sum = 0;
      for (int w = 0; w < kThreads / 32; ++w) sum += shared[w * count + i];
      const int column = k == kWidth ? a.width : k - (kWidth - a.width);
      if (d < a.channels && column >= 0)
        static_cast<F*>(a.partial)[(slice * a.channels + d) * (a.width + 1) + column] = sum;
    }
  }

  static SK_DEVICE void run(const Args& a) {
    const int lanes = a.channel_lanes, token_lanes = kThreads / lanes;
    const int64_t slice = block_index() % a.slices, first = block_index() / a.slices * lanes * V;
    const int64_t d = first + thread_index() % lanes * V, left = a.channels - d;
    const int64_t groups = (a.length + kTokens - 1) / kTokens;
    const int64_t all = a.batch * groups, share = (all + a.slices - 1) / a.slices;
    const int64_t begin = slice * share, end = begin + share < all ? begin + share : all;
    F sums[V][kSums] = {};
    for (int64_t i = begin + thread_index() / lanes; left > 0 && i < end; i += token_lanes) {
      const int64_t b = quotient(i, groups);
      const Place p{b, (i - b * groups) * kTokens, d, int(left < V ? left : V)};
      constexpr int kHead = kBefore<kWidth, V>;
      const Run run = run_at(a, p.b, p.t0);
      // Tokens up to W - 1 ahead give gradients, and the last W - 1 of a row may feed the final state.
      if (inside_run(a, run, p.t0, kHead, kTokens + kHead)) inside(a, p, sums);
      else by_element(a, p, sums);
    }
    save_sums(a, slice, first, sums);
  }
};

// The last W - 1 inputs of each row or packed sequence, the initial state included where it is short.
template <class T>
struct FinalStates {
  using Args = conv::Args;
  static constexpr int kThreads = 128, kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index(), taps = a.width - 1;
    if (i >= a.sequences * a.channels * taps) return;
    const int64_t k = i % taps, d = i / taps % a.channels, row = i / taps / a.channels;
    const Run run = a.cu.data ? Run{a.cu[row], a.cu[row + 1], row, false} : run_at(a, row, a.length - 1);
    const int64_t b = a.cu.data ? 0 : row;
    *at<T>(a.final, row, d, k) = narrow<T>(history<T>(a, run, b, d, run.end - taps + k));
  }
};

// dL/d(initial state): by the first tokens of the row or sequence, and by its final state where it is short.
template <class T>
struct InitialGradient {
  using F = Compute<T>;
  using Args = conv::Args;
  static constexpr int kThreads = 128, kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index(), taps = a.width - 1;
    if (i >= a.sequences * a.channels * taps) return;
    const int64_t k = i % taps, d = i / taps % a.channels, row = i / taps / a.channels;
    const Run run = a.cu.data ? Run{a.cu[row], a.cu[row + 1], row, false} : run_at(a, row, 0);
    const int64_t position = run.begin - taps + k, b = a.cu.data ? 0 : row;
    F sum = ConvBwd<T, 8, 1>::input_gradient(a, run, b, d, position);
    if (a.cu.data || run.end == a.length) sum += ConvBwd<T, 8, 1>::final_gradient(a, row, d, position, run.end);
    *at<T>(a.dinitial, row, d, k) = narrow<T>(sum);
  }
};

// dweight and dbias from the slices, added in order.
template <class F>
struct ReduceFilter {
  struct Args {
    const void* partial;
    void *dweight, *dbias;
    int64_t slices, channels, weight_d, weight_w, bias_d;
    int width;
  };
  static constexpr int kThreads = 128, kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t columns = a.width + 1, i = block_index() * kThreads + thread_index();
    if (i >= a.channels * columns) return;
    F sum = 0;
#pragma unroll 16  // loads under way at once; added in order all the same
    for (int64_t s = 0; s < a.slices; ++s) sum += static_cast<const F*>(a.partial)[s * a.channels * columns + i];
    const int64_t d = i / columns, w = i % columns;
    if (w < a.width) static_cast<F*>(a.dweight)[d * a.weight_d + w * a.weight_w] = sum;
    else if (a.dbias) static_cast<F*>(a.dbias)[d * a.bias_d] = sum;
  }
};

}  // namespace scalekern::conv
