// Short causal depthwise convolution, forward and backward, and its step for decoding.
//
// Bound: memory, 2 elements a token and channel forward (x, out) and 3 backward (x, dout, dx): with bf16 at 4.3 TB/s
// 8e9 outputs a second and SM, 4.1 a clock, so some 30 instructions a thread and output are the budget; W products, silu
// and conversions take about 15 at W = 4. Predicted: 85 to 90 % of the copy bandwidth forward, 75 to 85 % backward
// (which recomputes W - 1 of 8 + W - 1 tokens). Never measured on a GPU.
//
// Split: a thread makes 8 tokens of kChannels channels. Where time is contiguous, kChannels is 1 and the 8 tokens and the 8
// before them are 16-byte loads; where channels are, kChannels fill 8 bytes and a warp reads 256 bytes in a row for each
// token. The tokens before are read again by the neighbour, from L1 or L2, which costs no memory traffic.
// Threads whose tokens and history lie inside one run or sequence take this path; the others (at the ends of rows, runs
// and packed sequences) go element by element through `history`, which knows the rules.
//
// Shape letters: B batch, D channels, L length, W filter width, S packed sequences.
#pragma once
#include "common/cuda_block.cuh"
#include "common/view.h"

namespace scalekern::conv {

using namespace scalekern::device;

constexpr int kTokens = 8;

// a / b of numbers that are not negative: a 64-bit division costs some 70 instructions, and few need it.
SK_FN int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

struct Rows {  // (B, D, L), or (rows, D, W - 1) for states
  void* p;
  int64_t b, d, l;
};

struct Args {
  int64_t batch, channels, length, sequences;
  int width;
  bool silu, by_time;
  Rows x, out, initial, final;   // out: the output forward, dx backward; initial, final: states, or their gradients
  Rows dout, dinitial;           // backward; `final` is then dfinal_states
  void *weight, *bias;           // F
  int64_t weight_d, weight_w, bias_d;
  Indices ids, cu;               // ids: (B, L), with the batch's stride beside it
  int64_t ids_b;
  void* partial;                 // backward: (slices, D, W + 1), of dweight and dbias
  int64_t slices;
  int channel_lanes;             // threads along the channels in a block
};

// What a token may look back on: tokens from `begin` on (which is exact only within the filter's reach), then the
// initial state of row `initial`, or zeros when that is negative.
struct Run {
  int64_t begin, end, initial;
  bool padding;
};

SK_FN Run run_at(const Args& a, int64_t b, int64_t t) {
  if (a.cu.data) {
    int64_t s = first_above(a.cu, a.sequences + 1, t) - 1;
    s = s < 0 ? 0 : s >= a.sequences ? a.sequences - 1 : s;  // bounds that do not cover t: wrong, but in memory
    return {a.cu[s], a.cu[s + 1], s, false};
  }
  if (!a.ids.data) return {0, a.length, b, false};
  const Indices row{static_cast<const char*>(a.ids.data) + b * a.ids_b * (a.ids.is64 ? 8 : 4), a.ids.stride, a.ids.is64};
  const int64_t id = row[t];
  Run run{t, t + 1, -1, id < 0};
  while (run.begin > 0 && t - run.begin < a.width && row[run.begin - 1] == id) --run.begin;
  while (run.end < a.length && run.end - t < 2 * kTokens && row[run.end] == id) ++run.end;
  if (run.begin == 0) run.initial = b;
  return run;
}

template <class T>
SK_DEVICE T* at(const Rows& r, int64_t b, int64_t d, int64_t l) {
  return static_cast<T*>(r.p) + b * r.b + d * r.d + l * r.l;
}

// x at `position` as a token of `run` sees it; position may lie up to W - 1 before the run.
template <class T, class F = Compute<T>>
SK_DEVICE F history(const Args& a, const Run& run, int64_t b, int64_t d, int64_t position) {
  if (position >= run.begin) return widen(*at<T>(a.x, b, d, position));
  if (!a.initial.p || run.initial < 0) return 0;
  return widen(*at<T>(a.initial, run.initial, d, a.width - 1 + position - run.begin));
}

template <class F>
SK_DEVICE F weight_at(const Args& a, int64_t d, int w) {
  return static_cast<const F*>(a.weight)[d * a.weight_d + w * a.weight_w];
}

template <class F>
SK_DEVICE F bias_at(const Args& a, int64_t d) {
  return a.bias ? static_cast<const F*>(a.bias)[d * a.bias_d] : F(0);
}

// Before the activation, one element.
template <class T, class F = Compute<T>>
SK_DEVICE F convolve(const Args& a, const Run& run, int64_t b, int64_t d, int64_t t) {
  F sum = bias_at<F>(a, d);
  for (int w = 0; w < a.width; ++w) sum = fused(weight_at<F>(a, d, w), history<T>(a, run, b, d, t - (a.width - 1) + w), sum);
  return sum;
}

// dL/d(before the activation), one element; 0 for padding.
template <class F>
SK_DEVICE F through_activation(const Args& a, F dout, F before) {
  return a.silu ? dout * silu_slope(before, sigmoid(before)) : dout;
}

template <class T, class F = Compute<T>>
SK_DEVICE F slope(const Args& a, const Run& run, int64_t b, int64_t d, int64_t t) {
  if (run.padding) return 0;
  const F dout = widen(*at<T>(a.dout, b, d, t));
  return a.silu ? through_activation(a, dout, convolve<T>(a, run, b, d, t)) : dout;
}

// Where a thread works: kTokens tokens from t0 of channels d .. d + count.
struct Place {
  int64_t b, t0, d;
  int count;
};

// kCount tokens x V channels, raw, as a thread holds them.
template <class T, int kCount, int V>
struct Strip {
  T v[kCount][V];

  // src is (first token, first channel).
  SK_DEVICE void load(const T* src, int64_t d, int64_t l, int count) {
    constexpr int kPack = Pack<T>::kSize;
    if constexpr (V == 1 && kCount % kPack == 0) {
      if (l == 1 && aligned16(src)) {
#pragma unroll
        for (int i = 0; i < kCount; i += kPack) {
          const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(src + i);
#pragma unroll
          for (int e = 0; e < kPack; ++e) v[i + e][0] = pack.v[e];
        }
        return;
      }
    }
    struct alignas(V * sizeof(T)) Part {
      T v[V];
    };
    const bool whole = d == 1 && count == V && (reinterpret_cast<uintptr_t>(src) | (l * sizeof(T))) % sizeof(Part) == 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (whole) {
        const Part part = *reinterpret_cast<const Part*>(src + i * l);
#pragma unroll
        for (int e = 0; e < V; ++e) v[i][e] = part.v[e];
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) v[i][e] = e < count ? src[i * l + e * d] : T{};
      }
    }
  }

  SK_DEVICE void store(T* dst, int64_t d, int64_t l, int count) const {
    constexpr int kPack = Pack<T>::kSize;
    if constexpr (V == 1 && kCount % kPack == 0) {
      if (l == 1 && aligned16(dst)) {
#pragma unroll
        for (int i = 0; i < kCount; i += kPack) {
          Pack<T> pack;
#pragma unroll
          for (int e = 0; e < kPack; ++e) pack.v[e] = v[i + e][0];
          *reinterpret_cast<Pack<T>*>(dst + i) = pack;
        }
        return;
      }
    }
    struct alignas(V * sizeof(T)) Part {
      T v[V];
    };
    const bool whole = d == 1 && count == V && (reinterpret_cast<uintptr_t>(dst) | (l * sizeof(T))) % sizeof(Part) == 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (whole) {
        Part part;
#pragma unroll
        for (int e = 0; e < V; ++e) part.v[e] = v[i][e];
        *reinterpret_cast<Part*>(dst + i * l) = part;
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e)
          if (e < count) dst[i * l + e * d] = v[i][e];
      }
    }
  }
};

// Tokens before t0 that a strip holds: whole packs where time is contiguous.
template <int kWidth, int V>
constexpr int kBefore = V == 1 ? kTokens : kWidth - 1;

// Whether everything that tokens [t0 - before, t0 + ahead) take part in lies in one run.
SK_DEVICE bool inside_run(const Args& a, const Run& run, int64_t t0, int before, int ahead) {
  if (run.padding || t0 - before < 0 || t0 + ahead > a.length) return false;
  if (a.ids.data) return run.begin <= t0 - (a.width - 1) && run.end >= t0 + ahead;
  return run.begin <= t0 - (a.width - 1) && t0 + ahead <= run.end;
}

template <class F, int kWidth>
SK_DEVICE void load_filter(const Args& a, int64_t d, F (&w)[kWidth]) {  // right-aligned, zeros in front
#pragma unroll
  for (int k = 0; k < kWidth; ++k) w[k] = k >= kWidth - a.width ? weight_at<F>(a, d, k - (kWidth - a.width)) : F(0);
}

// Before the activation, from a strip's column whose element i is token t - (kWidth - 1) + i. Elements before the
// filter are left out and not multiplied by zero: they may be infinite.
template <int kWidth, class F>
SK_DEVICE F convolve_column(const Args& a, const F (&w)[kWidth], F bias, const F* column) {
  F sum = bias;
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    if (k >= kWidth - a.width) sum = fused(w[k], column[k], sum);
  return sum;
}

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
      if (d < a.channels && column >= 0) static_cast<F*>(a.partial)[(slice * a.channels + d) * (a.width + 1) + column] = sum;
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
    for (int64_t s = 0; s < a.slices; ++s) sum += static_cast<const F*>(a.partial)[s * a.channels * columns + i];
    const int64_t d = i / columns, w = i % columns;
    if (w < a.width) static_cast<F*>(a.dweight)[d * a.weight_d + w * a.weight_w] = sum;
    else if (a.dbias) static_cast<F*>(a.dbias)[d * a.bias_d] = sum;
  }
};

}  // namespace scalekern::conv
