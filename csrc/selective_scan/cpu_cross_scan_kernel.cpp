// Images to lines in up to four directions, and their sum back: moves of bytes, in tiles.
//
// Bound: memory. A scan reads the image once and writes it K times; a merge reads it K times and writes it once.
// Split: an item is a band of kBand rows of one channel of one image, so that one image of one channel keeps all
// threads busy. A band is taken in tiles of kBand x kTile pixels, whose cache lines (kBand of x, kTile of the columns)
// stay in L1; every direction of a tile is made before the next tile is read. A merge sums a tile in float (double)
// in L1, rows and columns apart, and rounds it once.
// Channels beside each other in memory: the items' inner axis is then the channel, whose lines the next one reads too.
#include "common/parallel.h"
#include "common/tile.h"
#include "selective_scan/cross_scan.h"

namespace {

using scalekern::CrossArgs;

constexpr int64_t kBand = 32, kTile = 32;  // multiples of every vector's lanes

struct Tile {
  int64_t h, w, rows, columns;  // the first pixel, the size
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// body(b, channel of the image, tile) for all tiles.
template <class Body>
static void for_tiles(const CrossArgs& a, bool channels_inside, const Body& body) {
  const int64_t bands = (a.rows + kBand - 1) / kBand, channels = a.image_channels();
  scalekern::parallel(a.batch * channels * bands, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (channels * bands), rest = i % (channels * bands);
      const int64_t c = channels_inside ? rest % channels : rest / bands;
      const int64_t band = channels_inside ? rest / channels : rest % bands;
      const int64_t h = band * kBand;
      for (int64_t w = 0; w < a.columns; w += kTile)
        body(b, c, Tile{h, w, smaller(kBand, a.rows - h), smaller(kTile, a.columns - w)});
    }
  });
}

// body(k, channel of direction k, its bits) for the directions that read channel c of the image.
template <class Body>
static inline void for_directions(const CrossArgs& a, int64_t c, const Body& body) {
  const int64_t first = a.grouped ? c / a.channels : 0, last = a.grouped ? first + 1 : a.directions;
  for (int64_t k = first; k < last; ++k) body(k, a.grouped ? c % a.channels : c, int(a.code >> 2 * k & 3));
}

// Where the tile's pixel (i, j) lies in a line: first + i step_i + j step_j.
struct Places {
  int64_t first, step_i, step_j;
};
static inline Places places(const CrossArgs& a, int direction, const Tile& t) {
  const bool columns = direction & 1;
  Places p{columns ? t.w * a.rows + t.h : t.h * a.columns + t.w, columns ? 1 : a.columns, columns ? a.rows : 1};
  if (direction & 2) p = {a.rows * a.columns - 1 - p.first, -p.step_i, -p.step_j};
  return p;
}

// n neighbours of a line, from p on in steps of STEP (1, -1; 0: of `step`): body(i, p[i * step]). The compiler
// vectorizes what it knows the step of: a merge of bfloat16 lines took 2.3 times as long without.
template <int STEP, class T, class Body>
static inline void run(T* p, int64_t n, int64_t step, const Body& body) {
  for (int64_t i = 0; i < n; ++i) body(i, p[i * (STEP ? STEP : step)]);
}
template <class T, class Body>
static inline void neighbours(T* p, int64_t n, int64_t step, const Body& body) {
  if (step == 1) run<1>(p, n, 1, body);
  else if (step == -1) run<-1>(p, n, -1, body);
  else run<0>(p, n, step, body);
}

template <class T>
static void scan(const CrossArgs& a) {
  const auto* x = static_cast<const T*>(a.in);
  auto* out = static_cast<T*>(a.out);
  const int64_t length = a.rows * a.columns, s_h = a.s[2], s_w = a.s[3];
  for_tiles(a, a.s[1] < s_w, [&](int64_t b, int64_t c, const Tile& t) {
    const T* from = x + b * a.s[0] + c * a.s[1] + t.h * s_h + t.w * s_w;
    for_directions(a, c, [&](int64_t k, int64_t p, int direction) {
      const Places at = places(a, direction, t);
      T* to = out + ((b * a.directions + k) * a.channels + p) * length + at.first;
      if (direction & 1) {
        for (int64_t j = 0; j < t.columns; ++j)
          neighbours(to + j * at.step_j, t.rows, at.step_i, [&](int64_t i, T& y) { y = from[i * s_h + j * s_w]; });
      } else if (s_w == 1) {
        for (int64_t i = 0; i < t.rows; ++i)
          neighbours(to + i * at.step_i, t.columns, at.step_j, [&](int64_t j, T& y) { y = from[i * s_h + j]; });
      } else {
        for (int64_t i = 0; i < t.rows; ++i)
          neighbours(to + i * at.step_i, t.columns, at.step_j, [&](int64_t j, T& y) { y = from[i * s_h + j * s_w]; });
      }
    });
  });
}

// As many elements as a vector has from p on, or before it (step -1), the n first of them meant; in steps of one both
// ways a vector is read whole. What lies beyond n is anything.
template <class F, class T>
static inline Vec<F> neighbours_as(const T* p, int64_t n, int64_t step) {
  constexpr int W = kLanes<F>;
  if (n >= W && step == 1) return load_as<F>(p);
  if (n >= W && step == -1) {
    const Vec<F> v = load_as<F>(p - (W - 1));
    if constexpr (W == 16) return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    if constexpr (W == 8) return __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0);
    if constexpr (W == 4) return __builtin_shufflevector(v, v, 3, 2, 1, 0);
    if constexpr (W == 2) return __builtin_shufflevector(v, v, 1, 0);
  }
  T few[W] = {};
  for (int64_t i = 0; i < n && i < W; ++i) few[i] = p[i * step];
  return load_as<F>(few);
}

// sum[i][j] = or += the element j of run i of a line; the rows of `sum` are whole vectors.
template <int64_t N, class F, class T>
static inline void add(F (*sum)[N], bool more, const T* from, int64_t runs, int64_t step_i, int64_t n, int64_t step_j) {
  for (int64_t i = 0; i < runs; ++i)
    for (int64_t j = 0; j < n; j += kLanes<F>) {
      const Vec<F> v = neighbours_as<F>(from + i * step_i + j * step_j, n - j, step_j);
      store(sum[i] + j, more ? load(sum[i] + j) + v : v);
    }
}

// sum = or += the transpose of sum_t, in blocks of vectors.
template <class F>
static inline void add_transposed(F (*sum)[kTile], bool more, const F (*sum_t)[kBand], const Tile& t) {
  constexpr int W = kLanes<F>;
  for (int64_t i = 0; i < t.rows; i += W)
    for (int64_t j = 0; j < t.columns; j += W) {
      Vec<F> v[W];
      for (int k = 0; k < W; ++k) v[k] = load(sum_t[j + k] + i);
      transpose<F>(v);
      for (int k = 0; k < W; ++k) store(sum[i + k] + j, more ? load(sum[i + k] + j) + v[k] : v[k]);
    }
}

// The lines along columns are summed the other way round, so that every line is read in vectors.
template <class T>
static void merge(const CrossArgs& a) {
  const auto* y = static_cast<const T*>(a.in);
  auto* out = static_cast<T*>(a.out);
  for_tiles(a, a.s[2] < a.s[3], [&](int64_t b, int64_t c, const Tile& t) {
    using F = Compute<T>;
    F sum[kBand][kTile], sum_t[kTile][kBand];
    bool rows = false, columns = false;
    for_directions(a, c, [&](int64_t k, int64_t p, int direction) {
      const Places at = places(a, direction, t);
      const int64_t s_l = a.s[3], step_i = at.step_i * s_l, step_j = at.step_j * s_l;
      const T* from = y + b * a.s[0] + k * a.s[1] + p * a.s[2] + at.first * s_l;
      if (direction & 1) add<kBand>(sum_t, columns, from, t.columns, step_j, t.rows, step_i), columns = true;
      else add<kTile>(sum, rows, from, t.rows, step_i, t.columns, step_j), rows = true;
    });
    T* to = out + ((b * a.image_channels() + c) * a.rows + t.h) * a.columns + t.w;
    if (columns) add_transposed(sum, rows, sum_t, t);
    for (int64_t i = 0; i < t.rows; ++i) {
      int64_t j = 0;
      for (; j + kLanes<F> <= t.columns; j += kLanes<F>) store_as<F>(to + i * a.columns + j, load(sum[i] + j));
      for (; j < t.columns; ++j) from_float(to[i * a.columns + j], sum[i][j]);
    }
  });
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

// enum Dtype of common/tensor.h: f32, f64, f16, bf16. A scan moves bits whatever they mean.
void cross_scan(const CrossArgs& a) {
  a.dtype == 0 ? scan<uint32_t>(a) : a.dtype == 1 ? scan<uint64_t>(a) : scan<uint16_t>(a);
}

void cross_merge(const CrossArgs& a) {
  a.dtype == 0 ? merge<float>(a) : a.dtype == 1 ? merge<double>(a) : a.dtype == 2 ? merge<f16>(a) : merge<bf16>(a);
}

}  // namespace scalekern::SCALEKERN_ISA
