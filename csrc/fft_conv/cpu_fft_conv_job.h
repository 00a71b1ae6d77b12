// One filter and its rows: what forward and backward of the long convolution share, for cpu_fft_conv*_kernel.cpp.
#pragma once
#include "common/parallel.h"
#include "fft_conv/cpu_right_angle_fft.h"

namespace {

using scalekern::FftConvArgs;
using scalekern::Io;
using scalekern::Rows;

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

struct Buffer {
  char* raw;
  float* data;
  explicit Buffer(int64_t floats)
      : raw(static_cast<char*>(__builtin_malloc(size_t(floats) * sizeof(float) + 64))),
        data(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64)) {}
  ~Buffer() { __builtin_free(raw); }
  Buffer(const Buffer&) = delete;
};

// --- rows of tensors ---

template <class S>
static S* at(const Rows& t, int64_t b, int64_t d) {
  return static_cast<S*>(t.data) + b * t.stride_b + d * t.stride_d;
}

static void read(const Rows& t, Io io, int64_t b, int64_t d, int64_t count, float* line) {
  switch (io) {
    case Io::f32: return load_line<float>(at<const float>(t, b, d), t.stride_l, count, line);
    case Io::f16: return load_line<float>(at<const f16>(t, b, d), t.stride_l, count, line);
    case Io::bf16: return load_line<float>(at<const bf16>(t, b, d), t.stride_l, count, line);
  }
}

static void write(const Rows& t, Io io, int64_t b, int64_t d, int64_t count, const float* line) {
  switch (io) {
    case Io::f32: return store_line<float>(at<float>(t, b, d), t.stride_l, count, line);
    case Io::f16: return store_line<float>(at<f16>(t, b, d), t.stride_l, count, line);
    case Io::bf16: return store_line<float>(at<bf16>(t, b, d), t.stride_l, count, line);
  }
}

static inline float scalar(const Rows& t, int64_t d) { return t.data ? *at<const float>(t, 0, d) : 0.0f; }

static void clear(float* p, int64_t count) { __builtin_memset(p, 0, size_t(max(0, count)) * sizeof(float)); }

static void hide(const Rows& mask, int64_t b, int64_t count, float* line) {
  if (!mask.data) return;
  const uint8_t* shown = at<const uint8_t>(mask, b, 0);
  for (int64_t t = 0; t < count; ++t) line[t] = shown[t * mask.stride_l] ? line[t] : 0.0f;
}

static void multiply(float* line, const float* by, int64_t count) {
  for (int64_t t = 0; t < count; ++t) line[t] *= by[t];
}

// --- one call ---

// Work on one filter and its rows; `inner`: by all threads, else by the calling one.
struct Job {
  const FftConvArgs& a;
  const FftPlan& plan;
  const bool inner;
  const int64_t n, whole, ahead, behind;
  Buffer filter_spectrum, x;  // of a filter, and of a row on its way
  const float* g = nullptr;   // the filter's, there or given
  Buffer line, gate, y;       // v and the pregate of a row, its result

  Job(const FftConvArgs& args, bool inner_)
      : a(args), plan(*args.plan), inner(inner_), n(plan.size), whole(2 * n), ahead(a.count - 1), behind(a.length - 1),
        filter_spectrum(plan.floats()), x(plan.floats()), line(whole), gate(whole), y(whole) {}

  template <class Body>
  void share(int64_t count, const Body& body) const {
    if (inner) return scalekern::parallel(count, body);
    body(int64_t(0), count);
  }
  // Numbers of one part of the first pass in pieces of vectors; long enough pieces are worth a thread.
  void enter(const float* low, const float* high, float* spectrum) const {
    share(plan.child() / kW, [&](int64_t begin, int64_t end) { first(plan, low, high, spectrum, begin, end); });
  }
  void leave(const float* spectrum, float* low, float* high) const {
    share(plan.child() / kW, [&](int64_t begin, int64_t end) { last(plan, spectrum, low, high, begin, end); });
  }
  template <class Body>
  void children(const Body& body) const {
    share(plan.radix[0], [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) body(j);
    });
  }

  // The kept taps of a filter: what can meet a token at all.
  template <class Body>
  void taps(const Rows& k, int64_t count, int sign, int64_t offset, const Body& body) const {
    if (!k.data) return;
    const int64_t first = max(0, offset - (sign > 0 ? behind : ahead));
    const int64_t end = min(count, offset + (sign > 0 ? ahead : behind) + 1);
    if (first < end) body(first, end);
  }

  // Whether the first n taps lie in the tensor as on the ring.
  bool is_ring(const Rows& k) const {
    return !a.k_reverse.data && a.offset == 0 && k.stride_l == 1 && min(a.taps, a.count) == n;
  }

  void filter(int64_t b, int64_t d) {
    g = a.spectrum.data ? at<const float>(a.spectrum, b, d) : filter_spectrum.data;
    if (!a.spectrum.data) transform_filter(b, d, filter_spectrum.data);
  }

  // The spectrum of the filters of (b, d): k[s] lies at s - offset, k_reverse[s] at -s, of a ring of 2 n.
  void transform_filter(int64_t b, int64_t d, float* to) {
    const float* low = y.data;
    const float* high = nullptr;
    if (is_ring(a.k)) {
      low = at<const float>(a.k, b, d);
    } else {
      clear(y.data, whole);
      taps(a.k, a.taps, 1, a.offset, [&](int64_t first, int64_t end) {
        const float* k = at<const float>(a.k, b, d);
        for (int64_t s = first; s < end; ++s) {
          const int64_t lag = s - a.offset;
          if (lag >= 0) y.data[lag] += k[s * a.k.stride_l];
          else y.data[whole + lag] -= k[s * a.k.stride_l];
        }
        if (end - a.offset > n || first < a.offset) high = y.data + n;
      });
      taps(a.k_reverse, a.reverse_taps, -1, 0, [&](int64_t first, int64_t end) {
        const float* k = at<const float>(a.k_reverse, b, d);
        for (int64_t s = first; s < end; ++s) {
          if (s == 0) y.data[0] += k[0];
          else y.data[whole - s] -= k[s * a.k_reverse.stride_l];
        }
        if (end > 1) high = y.data + n;
      });
    }
    enter(low, high, to);
    children([&](int64_t j) {
      child<true, false>(plan, j, to, [&](int64_t at, int64_t block) {
        Leaf z;
        z.forward(plan, block, to + at), z.store_to(to + at);
      });
    });
  }

  // A row of `count` elements in the tensor itself, if passes can read and write it there.
  float* in_place(const Rows& t, int64_t count, int64_t b, int64_t d) const {
    return a.io == Io::f32 && t.stride_l == 1 && (count == n || count == whole) ? at<float>(t, b, d) : nullptr;
  }

  // v of a row; `gate` then holds the gate, if there is one.
  const float* input(int64_t b, int64_t d) {
    const float* direct = in_place(a.u, a.length, b, d);
    if (direct && !a.pregate.data && !a.mask.data) return direct;
    read(a.u, a.io, b, d, a.length, line.data);
    if (a.pregate.data) {
      read(a.pregate, a.io, b, d, a.length, gate.data);
      multiply(line.data, gate.data, a.length);
    }
    hide(a.mask, b, a.length, line.data);
    fill_up(line.data, a.length);
    return line.data;
  }

  void fill_up(float* to, int64_t count) const { clear(to + count, (count > n ? whole : n) - count); }
  const float* high_of(const float* low, int64_t count) const { return count > n ? low + n : nullptr; }
  float* high_of(float* low, int64_t count) const { return count > n ? low + n : nullptr; }

  // Spectrum z of a leaf times the filter's, or its conjugate's, and back.
  template <bool kConj>
  inline __attribute__((always_inline)) void filtered(Leaf& z, int64_t at, int64_t block, float* to) const {
#pragma GCC unroll 16
    for (int m = 0; m < kW; ++m) {
      const Cx w = load_cx(g + at + 2 * kW * m);
      z.x[m] = kConj ? times_conj(z.x[m], w.re, w.im) : times(z.x[m], w.re, w.im);
    }
    z.inverse(plan, block, to + at);
  }

  void forward_row(int64_t b, int64_t d) {
    const float* low = input(b, d);
    enter(low, high_of(low, a.length), x.data);
    children([&](int64_t j) {
      child<true, true>(plan, j, x.data, [&](int64_t at, int64_t block) {
        Leaf z;
        z.forward(plan, block, x.data + at);
        filtered<false>(z, at, block, x.data);
      });
    });
    float* direct = in_place(a.out, a.count, b, d);
    float* result = direct ? direct : y.data;
    leave(x.data, result, high_of(result, a.count));
    finish(result, low, b, d);
    if (a.postgate.data) {
      read(a.postgate, a.io, b, d, a.count, gate.data);
      multiply(result, gate.data, a.count);
    }
    if (!direct) write(a.out, a.io, b, d, a.count, result);
  }

  // y from the convolution of v.
  void finish(float* y, const float* v, int64_t b, int64_t d) const {
    // What is not finite in v or in the filter is in every element by now.
    *at<uint8_t>(a.bad, b, d) = !(y[0] - y[0] == 0) || !(y[a.count - 1] - y[a.count - 1] == 0);
    if (a.skip.data) {
      const float skip = scalar(a.skip, d);
      for (int64_t t = 0; t < min(a.length, a.count); ++t) y[t] += skip * v[t];
    }
    if (a.bias.data) {
      const float bias = scalar(a.bias, d);
      for (int64_t t = 0; t < a.count; ++t) y[t] += bias;
    }
  }
};

// Channels over threads, or each over all of them.
template <class Body>
static void over_channels(const FftConvArgs& a, const Body& body) {
  if (a.channels < scalekern::num_threads() && a.plan->size >= 4096) {
    for (int64_t d = 0; d < a.channels; ++d) body(true, d, d + 1);
    return;
  }
  scalekern::parallel(a.channels, [&](int64_t begin, int64_t end) { body(false, begin, end); });
}

}  // namespace
