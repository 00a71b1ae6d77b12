// The convolution of whole rows whose tokens are neighbours: no seq_idx, no packed sequences.
//
// Bound: memory, 2 elements a token and channel forward (x, out) and 3 backward (x, dout, dx). At 4.3 TB/s and bf16 a
// token of a warp has 32 issue slots forward and 48 backward; some 20 and 36 are used.
//
// Split: `lanes` threads (a power of two up to 32) share a row, each with 8 neighbouring tokens a step: 16-byte loads
// and stores in bf16, the tokens before them again from the L1. Forward a thread has 4 steps, all loaded before the
// first is used. Backward the lanes walk through a segment of the row from its end, so that the gradients before the
// activation of the tokens ahead come by shuffle from the next lane, or from the step before; the loads of the next
// step are under way meanwhile. Sums for the filter stay in registers until the lanes have walked through all of their
// segments. Rows that are not aligned, or not a multiple of 8 long, take the same path with loads of single elements.
//
// Measured on an H200 (bf16, B 8, D 4096, L 4096, W 4): 143 us forward, 88 % of the copy bandwidth; 273 us backward,
// 70 %.
//
// Lost, measured on an H200 (bf16, B 8, D 4096, L 4096, W 4): a thread for 8 tokens with 64-bit divisions for its
// place, the first 8 of a row element by element: 486 us forward and 67 instructions a token; backward the same rows'
// ends, and the slopes of the tokens ahead computed again: 2.07 ms.
//
// Shape letters: B batch, D channels, L length, W filter width.
#pragma once
#include "selective_scan/cuda_conv1d_rows.cuh"

namespace scalekern::conv {

struct TimeArgs : Args {
  int lane_bits, steps, segments, share;  // steps and segments of a row; backward: segments (of all rows) of a unit
  int units;                              // groups of lanes with work
  bool packed;
  Divisor by_segments, by_channels;
};

// What a group of lanes works on: unit = (row, segment) forward, (slice, channel) backward.
struct Unit {
  int number, lane, lanes;
  SK_DEVICE explicit Unit(const TimeArgs& a, int threads)
      : number(int(block_index()) * (threads >> a.lane_bits) + (thread_index() >> a.lane_bits)),
        lane(thread_index() & ((1 << a.lane_bits) - 1)),
        lanes(1 << a.lane_bits) {}
};

// kTokens tokens of a row from t on, raw. kPacked: t may lie past the end, and then the row's last ones come; otherwise
// there are zeros past the end.
template <bool kPacked, class T>
SK_DEVICE Group<T, kTokens> load_tokens(const T* row, int64_t l, int t, int length) {
  if constexpr (kPacked) return Group<T, kTokens>::load(row + (t < length ? t : length - kTokens));
  Group<T, kTokens> own{};
#pragma unroll
  for (int j = 0; j < kTokens; ++j)
    if (t + j < length) own.set(j, row[(t + j) * l]);
  return own;
}

template <bool kPacked, class T>
SK_DEVICE void store_tokens(T* row, int64_t l, int t, int length, const Compute<T> (&value)[kTokens]) {
  const auto own = Group<T, kTokens>::of(value);
  if constexpr (kPacked) {
    if (t < length) own.store(row + t);
  } else {
#pragma unroll
    for (int j = 0; j < kTokens; ++j)
      if (t + j < length) row[(t + j) * l] = own.get(j);
  }
}

// The tokens of a lane with the kWidth before them.
template <class T, int kWidth>
struct Window {
  Group<T, kWidth> head;
  Group<T, kTokens> own;

  // kFirst: t may be 0.
  template <bool kPacked, bool kFirst>
  SK_DEVICE void load(const Args& a, const T* row, int b, int d, int t, int length) {
    own = load_tokens<kPacked>(row, a.x.l, t, length);
    if (kPacked && !(kFirst && t == 0)) {
      head = Group<T, kWidth>::load(row + (t < length ? t : length) - kWidth);
    } else {
      head = {};
#pragma unroll
      for (int k = 1; k < kWidth; ++k) {
        const int position = t - kWidth + k, place = position + a.width - 1;
        if (position >= length) continue;
        if (position >= 0) head.set(k, row[position * a.x.l]);
        else if (a.initial.p && place >= 0) head.set(k, *at<T>(a.initial, b, d, place));
      }
    }
  }

  // Elements of `column`: tokens t - (kWidth - 1) .. t + kTokens.
  template <class F>
  SK_DEVICE void widen_to(F (&column)[kWidth - 1 + kTokens]) const {
#pragma unroll
    for (int k = 1; k < kWidth; ++k) column[k - 1] = widen(head.get(k));
#pragma unroll
    for (int j = 0; j < kTokens; ++j) column[kWidth - 1 + j] = widen(own.get(j));
  }
};

template <class T, int kWidth>
struct ConvTimeFwd {
  using F = Compute<T>;
  using Args = TimeArgs;
  static constexpr int kThreads = 128, kBlocks = sizeof(F) == 8 ? 1 : sizeof(T) * kWidth >= 32 ? 5 : 7;
  static constexpr int kSteps = 4;

  static SK_APART void final_state(const Args& a, int b, int d) {
    const Run run{0, a.length, b, false};
    const int taps = a.width - 1;
    for (int k = 0; k < taps; ++k)
      *at<T>(a.final, b, d, k) = narrow<T>(history<T>(a, run, b, d, a.length - taps + k));
  }

  static SK_DEVICE void run(const Args& a) {
    const Unit unit(a, kThreads);
    if (unit.number >= a.units) return;
    const int row = a.by_segments.quotient(unit.number), segment = unit.number - row * a.segments;
    const int b = a.by_channels.quotient(row), d = row - b * int(a.channels), length = int(a.length);
    const T* x = pinned(at<const T>(a.x, b, d, 0));
    T* out = pinned(at<T>(a.out, b, d, 0));
    const int stride = unit.lanes * kTokens, begin = segment * kSteps * stride + unit.lane * kTokens;
    F w[kWidth];
    load_filter(a, d, w);
    const F bias = bias_at<F>(a, d);
    const auto finish = [&]<bool kPacked>(const Window<T, kWidth>& window, int t) {
      F column[kWidth - 1 + kTokens], y[kTokens];
      window.widen_to(column);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) y[j] = convolve_column<kWidth>(a, w, bias, column + j);
      if (a.silu) {
#pragma unroll
        for (int j = 0; j < kTokens; ++j) y[j] = device::silu(y[j]);
      }
      store_tokens<kPacked>(out, a.out.l, t, length, y);
    };
    if (a.packed) {
      Window<T, kWidth> windows[kSteps];
      windows[0].template load<true, true>(a, x, b, d, begin, length);
#pragma unroll
      for (int s = 1; s < kSteps; ++s) windows[s].template load<true, false>(a, x, b, d, begin + s * stride, length);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) finish.template operator()<true>(windows[s], begin + s * stride);
    } else {
#pragma unroll 1
      for (int s = 0; s < kSteps; ++s) {
        Window<T, kWidth> window;
        window.template load<false, true>(a, x, b, d, begin + s * stride, length);
        finish.template operator()<false>(window, begin + s * stride);
      }
    }
    const int last = ((length - 1) & -kTokens) - begin;  // from this lane to the row's last group
    if (last >= 0 && last < kSteps * stride && (last & (stride - 1)) == 0) final_state(a, b, d);
  }
};

// dx, and this unit's share of dweight and dbias: a unit is a channel and `share` segments of its rows.
template <class T, int kWidth>
struct ConvTimeBwd {
  using F = Compute<T>;
  using Args = TimeArgs;
  static constexpr int kThreads = 128, kBlocks = sizeof(F) == 8 ? 1 : kWidth == 8 ? 4 : 5;
  static constexpr int kSums = kWidth + 1;

  static SK_APART F slope_at(const Args& a, int b, int d, int64_t t) {
    return slope<T>(a, Run{0, a.length, b, false}, b, d, t);
  }

  // The final state's gradient reaches the row's last W - 1 tokens.
  static SK_DEVICE void add_final(const Args& a, int b, int d, int t, F (&dx)[kTokens]) {
    const int64_t first = a.length - (a.width - 1);
#pragma unroll
    for (int j = 0; j < kTokens; ++j)
      if (t + j >= first && t + j < a.length) dx[j] += F(widen(*at<T>(a.final, b, d, t + j - first)));
  }

  template <bool kPacked>
  static SK_DEVICE void walk(const Args& a, const Unit& unit, int slice, int d, F (&sums)[kSums]) {
    const int length = int(a.length), stride = unit.lanes * kTokens;
    F w[kWidth];
    load_filter(a, d, w);
    const F bias = bias_at<F>(a, d);
    const int neighbour = (thread_index() & 31 & ~(unit.lanes - 1)) | ((unit.lane + 1) & (unit.lanes - 1));
#pragma unroll 1
    for (int q = 0; q < a.share; ++q) {
      const int piece = slice * a.share + q, row = a.by_segments.quotient(piece), segment = piece - row * a.segments;
      const bool active = unit.number < a.units && row < a.batch;
      const int b = active ? row : 0, end = active ? length : 0;  // inactive: all tokens lie past the end
      const T* x = pinned(at<const T>(a.x, b, d, 0));
      const T* dout = pinned(at<const T>(a.dout, b, d, 0));
      T* out = pinned(at<T>(a.out, b, d, 0));
      int t = ((segment + 1) * a.steps - 1) * stride + unit.lane * kTokens;

      F ahead[kWidth - 1];  // in lane 0: the gradients before the activation that follow the step
      const int64_t next = int64_t(segment + 1) * a.steps * stride;
#pragma unroll
      for (int j = 0; j < kWidth - 1; ++j) ahead[j] = next + j < end ? slope_at(a, b, d, next + j) : F(0);

      Window<T, kWidth> window;
      window.template load<kPacked, true>(a, x, b, d, t, length);
      Group<T, kTokens> gradients = load_tokens<kPacked>(dout, a.dout.l, t, length);
#pragma unroll 1
      for (int s = a.steps - 1; s >= 0; --s, t -= stride) {
        F column[kWidth - 1 + kTokens], g[kTokens + kWidth - 1], dx[kTokens];
        window.widen_to(column);
#pragma unroll
        for (int j = 0; j < kTokens; ++j) g[j] = t + (kPacked ? 0 : j) < end ? F(widen(gradients.get(j))) : F(0);
        if (s > 0) {
          window.template load<kPacked, true>(a, x, b, d, t - stride, length);
          gradients = load_tokens<kPacked>(dout, a.dout.l, t - stride, length);
          loads_begin_above();
        }
        if (a.silu) {
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            const F before = convolve_column<kWidth>(a, w, bias, column + j);
            g[j] *= silu_slope(before, sigmoid(before));
          }
        }
#pragma unroll
        for (int j = 0; j < kWidth - 1; ++j) {
          g[kTokens + j] = shuffle(unit.lane == 0 ? ahead[j] : g[j], neighbour);
          ahead[j] = g[j];
        }
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          dx[j] = 0;
#pragma unroll
          for (int i = 0; i < kWidth; ++i)
            if (i < a.width) dx[j] = fused(w[kWidth - 1 - i], g[j + i], dx[j]);
#pragma unroll
          for (int k = 0; k < kWidth; ++k)
            if (k >= kWidth - a.width) sums[k] = fused(g[j], column[j + k], sums[k]);
          sums[kWidth] += g[j];
        }
        if (a.final.p && t + kTokens > length - a.width) add_final(a, b, d, t, dx);
        store_tokens<kPacked>(out, a.out.l, t, end, dx);
      }
    }
  }

  static SK_DEVICE void run(const Args& a) {
    const Unit unit(a, kThreads);
    const int number = unit.number < a.units ? unit.number : 0;  // idle lanes shuffle with the others
    const int slice = a.by_channels.quotient(number), d = number - slice * int(a.channels);
    F sums[kSums] = {};
    if (a.packed) walk<true>(a, unit, slice, d, sums);
    else walk<false>(a, unit, slice, d, sums);
    F* partial = static_cast<F*>(a.partial) + (slice * a.channels + d) * (a.width + 1);
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      for (int m = 1; m < unit.lanes; m *= 2) sums[k] += shuffle_xor(sums[k], m);
      const int column = k == kWidth ? a.width : k - (kWidth - a.width);
      if (unit.lane == 0 && unit.number < a.units && column >= 0) partial[column] = sums[k];
    }
  }
};

}  // namespace scalekern::conv
