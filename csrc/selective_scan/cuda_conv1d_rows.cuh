// What the convolution kernels know about rows: which tokens a token may look back on (runs of seq_idx, packed
// sequences, initial states), and strips of tokens x channels in registers.
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
  const char* ids = static_cast<const char*>(a.ids.data) + b * a.ids_b * (a.ids.is64 ? 8 : 4);
  const Indices row{ids, a.ids.stride, a.ids.is64};
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
  for (int w = 0; w < a.width; ++w)
    sum = fused(weight_at<F>(a, d, w), history<T>(a, run, b, d, t - (a.width - 1) + w), sum);
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
  const F* tap = static_cast<const F*>(a.weight) + d * a.weight_d;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    w[k] = k >= kWidth - a.width ? *tap : F(0);
    if (k >= kWidth - a.width) tap += a.weight_w;
  }
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

}  // namespace scalekern::conv
