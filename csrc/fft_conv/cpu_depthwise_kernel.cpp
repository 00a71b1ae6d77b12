// Depthwise convolution tap by tap, stride 1 (another is several of these): forward (the gradient of the image is
// the same with the filter turned around) and the gradient of the filter.
//
// Bound: multiply-adds, I J a pixel. B8 C64 56 x 56, 13 x 13 is 0.27 G: 1.6 ms on two cores of 64 flops a cycle at
//   2.6 GHz.
// Split: an item is a band of rows of a channel of an image; dw: some rows of taps of a channel, all images in turn.
//   Each is copied into memory of the thread's own first, as float, with the zeros around it: what the loops read is in
//   L1 or L2, aligned to nothing and never checked.
// Measured there: 5.2 ms with a fresh output, whose pages alone take 1.5; both gradients 12 ms.
// Forward, in registers: R rows x NV vectors of the output. A vector of the image, loaded once for row y and tap column
//   j, meets the R rows of the filter that reach from y to the tile's rows. Rows of zeros are not read.
// dw, in registers: kTapRows x JB taps, a vector each, summed over pixels in one order. A vector of the image meets
//   kTapRows rows of the other image, each of them JB vectors of this one.
// A zero around the image meets the filter and is multiplied: where that has a NaN, the caller asks torch.
#include "fft_conv/depthwise.h"
#include "selective_scan/cpu_tile.h"

namespace {

using scalekern::DepthwiseArgs;
using scalekern::Images;

constexpr bool kWideFile = SCALEKERN_VEC_BYTES == 64;  // 32 registers, else 16
constexpr int kVectors = kWideFile ? 4 : 3;
constexpr int kTapRows = kWideFile ? 4 : 3;
constexpr int rows_beside(int vectors) {
  return kWideFile ? (vectors == 1 ? 12 : vectors == 2 ? 8 : 6) : vectors == 3 ? 4 : 6 - vectors + 1;
}
constexpr int64_t kBandBytes = 1 << 18;  // of a copied band: L2 holds it beside the filter

static inline int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t more(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class F>
struct Memory {
  char* raw;
  explicit Memory(int64_t count) : raw(static_cast<char*>(__builtin_malloc(size_t(count) * sizeof(F) + 64))) {}
  Memory(const Memory&) = delete;
  ~Memory() { __builtin_free(raw); }
  operator F*() const { return reinterpret_cast<F*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64); }
};

// Rows [first, first + rows) of an image and columns from `left` before it, zeros around.
template <class T, class F>
static void copy_band(
    const Images& from, int64_t b, int64_t c, int64_t first, int64_t rows, int64_t left, int64_t pitch, F* to) {
  const T* image = static_cast<const T*>(from.data) + b * from.s_b + c * from.s_c;
  const int64_t begin = less(more(left, 0), pitch), end = more(less(left + from.columns, pitch), begin);
  for (int64_t i = 0; i < rows; ++i, to += pitch) {
    const int64_t y = first + i;
    if (y < 0 || y >= from.rows) {
      zero(to, pitch);
      continue;
    }
    zero(to, begin);
    widen(to + begin, image + y * from.s_h + (begin - left) * from.s_w, from.s_w, end - begin);
    zero(to + end, pitch - end);
  }
}

// --- forward ---

// Of one tile: rows [y, end) of the image for the R rows from the r-th on, all of which they reach.
template <class F, int R, int NV>
static inline __attribute__((always_inline)) void add_rows(
    const F* x, int64_t pitch, int64_t y, int64_t end, int64_t r, const F* w, int64_t J, int64_t d,
    Vec<F> (*sums)[NV]) {
  constexpr int W = kLanes<F>;
  Vec<F> acc[R][NV];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = sums[r + i][v];
  for (; y < end; ++y) {
    const F *row = x + y * pitch, *taps = w + (y - r) * J;  // row i: tap y - r - i
    for (int64_t j = 0; j < J; ++j, row += d) {
      Vec<F> pixels[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) pixels[v] = load(row + v * W);
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        const F tap = taps[j - i * J];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] += pixels[v] * tap;
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[r + i][v] = acc[i][v];
}
template <class F, int R, int NV>
static void add_rows_of(
    int64_t count, const F* x, int64_t pitch, int64_t y, int64_t end, int64_t r, const F* w, int64_t J, int64_t d,
    Vec<F> (*sums)[NV]) {
  if (count == R) return add_rows<F, R, NV>(x, pitch, y, end, r, w, J, d, sums);
  if constexpr (R > 1) add_rows_of<F, R - 1, NV>(count, x, pitch, y, end, r, w, J, d, sums);
}

// `rows` rows x NV vectors of the output; rows of x outside [first, last) are zero.
template <class F, int NV>
static __attribute__((noinline)) void tile(
    const F* x, int64_t pitch, int64_t first, int64_t last, int64_t rows, const F* w, int64_t I, int64_t J, int64_t d,
    Vec<F> (*sums)[NV]) {
  for (int64_t y = more(first, 0); y < less(last, rows + I - 1);) {
    const int64_t r = more(0, y - I + 1), end_r = less(rows, y + 1);  // rows that y reaches
    int64_t next = y + 1;
    if (r == 0 && end_r == rows) next = more(next, less(I, less(last, rows + I - 1)));  // so do those up to I
    add_rows_of<F, rows_beside(NV), NV>(end_r - r, x, pitch, y, next, r, w, J, d, sums);
    y = next;
  }
}

template <class T, class F>
struct Forward {
  const DepthwiseArgs& a;
  const int64_t I = a.taps[0], J = a.taps[1], dh = a.dilation[0], dw = a.dilation[1];
  const int64_t rows = a.small.rows, columns = a.small.columns;
  const int64_t pitch = up_to(columns, kLanes<F>) + up_to((J - 1) * dw, kLanes<F>) + kLanes<F>;

  int64_t band() const {
    const int64_t fit = kBandBytes / int64_t(sizeof(F)) / pitch - (I - 1) * dh;
    const int64_t all = a.batch * a.channels;
    const int64_t parts = all >= 4 * scalekern::num_threads() ? 1 : 4 * scalekern::num_threads() / all;
    return more(less(fit, (rows + parts - 1) / parts), 16);
  }

  // One tile of a band: output rows c, c + dh, .. from the p-th on; NV vectors from column q on.
  template <int NV>
  void one(const F* x, int64_t first, int64_t last, int64_t count, const F* w, F bias, int64_t q, T* out) const {
    constexpr int W = kLanes<F>;
    Vec<F> sums[rows_beside(NV)][NV];
    for (int64_t r = 0; r < count; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] = splat(bias);
    tile<F, NV>(x + q, pitch * dh, first, last, count, w, I, J, dw, sums);
    for (int64_t r = 0; r < count; ++r)
      narrow(out + r * dh * columns + q, 1, reinterpret_cast<const F*>(sums[r]), less(NV * W, columns - q));
  }
  template <int NV>
  int64_t columns_of(const F* x, int64_t first, int64_t last, int64_t count, const F* w, F bias, int64_t q,
                     T* out) const {
    constexpr int64_t R = rows_beside(NV);
    const int64_t even = (count + (count + R - 1) / R - 1) / ((count + R - 1) / R);  // tiles of nearly one height
    for (int64_t p = 0; p < count; p += even)
      one<NV>(x + p * dh * pitch, first - p, last - p, less(even, count - p), w, bias, q, out + p * dh * columns);
    return q + NV * kLanes<F>;
  }

  void run() const {
    const int64_t height = band(), bands = (rows + height - 1) / height;
    scalekern::parallel(a.channels * a.batch * bands, [&](int64_t begin, int64_t end) {
      const Memory<F> x((height + (I - 1) * dh) * pitch + kLanes<F>), turned(I * J);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t c = item / (a.batch * bands), b = item / bands % a.batch, top = item % bands * height;
        const int64_t here = less(height, rows - top), start = top - a.start[0];
        copy_band<T>(a.large, b, c, start, here + (I - 1) * dh, a.start[1], pitch, static_cast<F*>(x));
        const F* w = static_cast<const F*>(a.w) + c * I * J;
        for (int64_t i = 0; a.flipped && i < I * J; ++i) turned[i] = w[I * J - 1 - i];
        if (a.flipped) w = turned;
        const F bias = a.bias ? static_cast<const F*>(a.bias)[c] : F(0);
        T* out = static_cast<T*>(a.small.data) + ((b * a.channels + c) * rows + top) * columns;
        for (int64_t phase = 0; phase < less(dh, here); ++phase) {
          // Rows of x, in steps of dh from the phase on, that are in the image: [first, last).
          const int64_t first = more(0, -start - phase + dh - 1) / dh, past = a.large.rows - start - phase;
          const int64_t last = past <= 0 ? 0 : (past + dh - 1) / dh, count = (here - phase + dh - 1) / dh;
          const F* from = x + phase * pitch;
          T* to = out + phase * columns;
          for (int64_t q = 0; q < columns;) {
            const int64_t left = (columns - q + kLanes<F> - 1) / kLanes<F>;
            if (left >= kVectors) q = columns_of<kVectors>(from, first, last, count, w, bias, q, to);
            else if (kVectors > 3 && left == 3) q = columns_of<3>(from, first, last, count, w, bias, q, to);
            else if (left == 2) q = columns_of<2>(from, first, last, count, w, bias, q, to);
            else q = columns_of<1>(from, first, last, count, w, bias, q, to);
          }
        }
      }
    });
  }
};

// --- the filter's gradient ---

// sums[i][j] += over rows [first, last) of x and all columns; g has rows from -(kTapRows - 1) on.
template <class F, int JB>
static __attribute__((noinline)) void add_taps(
    const F* x, int64_t pitch, int64_t first, int64_t last, const F* g, int64_t g_pitch, int64_t columns, int64_t d,
    Vec<F> (*sums)[JB]) {
  constexpr int W = kLanes<F>;
  Vec<F> acc[kTapRows][JB];
#pragma GCC unroll 4
  for (int i = 0; i < kTapRows; ++i)
#pragma GCC unroll 5
    for (int j = 0; j < JB; ++j) acc[i][j] = sums[i][j];
  for (int64_t y = first; y < last; ++y)
    for (int64_t q = 0; q < columns; q += W) {
      const F *pixels = x + y * pitch + q, *others = g + y * g_pitch + q;
      Vec<F> other[kTapRows];
#pragma GCC unroll 4
      for (int i = 0; i < kTapRows; ++i) other[i] = load(others - i * g_pitch);
#pragma GCC unroll 5
      for (int j = 0; j < JB; ++j) {
        const Vec<F> pixel = load(pixels + j * d);
#pragma GCC unroll 4
        for (int i = 0; i < kTapRows; ++i) acc[i][j] += other[i] * pixel;
      }
    }
#pragma GCC unroll 4
  for (int i = 0; i < kTapRows; ++i)
#pragma GCC unroll 5
    for (int j = 0; j < JB; ++j) sums[i][j] = acc[i][j];
}

template <class T, class F>
struct Gradient {
  static constexpr int kMost = kWideFile ? 5 : 3;
  const DepthwiseArgs& a;
  const int64_t I = a.taps[0], J = a.taps[1], dh = a.dilation[0], dw = a.dilation[1];
  const int64_t rows = a.small.rows, columns = a.small.columns;
  const int64_t g_pitch = up_to(columns, kLanes<F>), pitch = g_pitch + up_to((J + kMost) * dw, kLanes<F>);
  const int64_t blocks = (I + kTapRows - 1) / kTapRows;

  template <int JB>
  void columns_of(const F* x, const F* g, int64_t here, int64_t start, int64_t i, F* taps) const {
    for (int64_t j = 0; j < J; j += JB) {
      Vec<F> sums[kTapRows][JB] = {};
      for (int64_t phase = 0; phase < less(dh, here); ++phase) {
        // Row y of x in steps of dh meets row y - i - i' of g: from i on, to kTapRows - 1 beyond the last.
        const int64_t count = (here - phase + dh - 1) / dh, past = a.large.rows - start - phase;
        const int64_t first = more(more(0, -start - phase + dh - 1) / dh, i);
        const int64_t last = less(past <= 0 ? 0 : (past + dh - 1) / dh, count + i + kTapRows - 1);
        add_taps<F, JB>(x + phase * pitch + j * dw, pitch * dh, first, last,
                        g + ((kTapRows - 1 - i) * dh + phase) * g_pitch, g_pitch * dh, columns, dw, sums);
      }
      for (int64_t k = 0; k < less(kTapRows, I - i); ++k)
        for (int64_t m = 0; m < less(JB, J - j); ++m) taps[(i + k) * J + j + m] += sum_of<F>(sums[k][m]);
    }
  }

  void run() const {
    const int64_t parts = a.channels >= 2 * scalekern::num_threads() ? 1 : blocks;
    const int64_t each = (blocks + parts - 1) / parts;
    const int64_t fit = kBandBytes / int64_t(sizeof(F)) / (pitch + g_pitch) - (I - 1) * dh;
    const int64_t height = less(more(fit, 4 * dh * kTapRows), rows), reach = (I + kTapRows) * dh;
    scalekern::parallel(a.channels * parts, [&](int64_t begin, int64_t end) {
      const Memory<F> x((height + reach) * pitch + kLanes<F>), g((height + 2 * kTapRows * dh) * g_pitch), taps(I * J);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t c = item / parts, first = item % parts * each, last = less(first + each, blocks);
        zero<F>(taps, I * J);
        for (int64_t b = 0; b < a.batch; ++b)
          for (int64_t top = 0; top < rows; top += height) {
            const int64_t here = less(height, rows - top), start = top - a.start[0], margin = (kTapRows - 1) * dh;
            copy_band<T>(a.large, b, c, start, here + reach, a.start[1], pitch, static_cast<F*>(x));
            Images band = a.small;  // nothing of the next band
            band.data = static_cast<T*>(band.data) + top * band.s_h, band.rows = here;
            copy_band<T>(band, b, c, -margin, here + 2 * margin + dh, 0, g_pitch, static_cast<F*>(g));
            for (int64_t k = first; k < last; ++k) {
              const int64_t i = k * kTapRows;
              if (kMost == 3) columns_of<3>(x, g, here, start, i, taps);
              else if (J <= 3 || J == 6 || J == 9) columns_of<3>(x, g, here, start, i, taps);
              else if ((J + 3) / 4 * 4 <= (J + 4) / 5 * 5) columns_of<4>(x, g, here, start, i, taps);
              else columns_of<kMost>(x, g, here, start, i, taps);
            }
          }
        F* to = static_cast<F*>(a.w) + c * I * J;
        for (int64_t i = first * kTapRows * J; i < less(last * kTapRows, I) * J; ++i) to[i] = taps[i];
      }
    });
  }
};

template <template <class, class> class Kind>
static void dispatch(const DepthwiseArgs& a) {
  switch (a.dtype) {
    case 0: return Kind<float, float>{a}.run();
    case 1: return Kind<double, double>{a}.run();
    case 2: return Kind<f16, float>{a}.run();
    default: return Kind<bf16, float>{a}.run();
  }
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void depthwise_conv(const DepthwiseArgs& a) { dispatch<Forward>(a); }
void depthwise_dw(const DepthwiseArgs& a) { dispatch<Gradient>(a); }

}  // namespace scalekern::SCALEKERN_ISA
