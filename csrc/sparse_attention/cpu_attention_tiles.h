// What forward and backward share: panels of queries, tiles of keys and values, mask bits by key, work.
//
// Scores are computed transposed, S^T = K Q^T: a panel holds W = kPanel queries as lanes, so that maxima, sums and
// corrections are vectors too, nothing is summed across lanes, and keys and values are used as they lie in memory.
#pragma once
#include "common/micro_gemm.h"
#include "common/stretches.h"
#include "common/tile.h"
#include "sparse_attention/attention.h"
#include "sparse_attention/mask.h"

namespace {

using scalekern::AttnArgs;
using scalekern::AttnTensor;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;
template <class F>
constexpr F kInfinity = F(__builtin_inf());

// Memory of one thread, handed out in pieces that begin on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : raw_(bytes ? __builtin_malloc(size_t(bytes) + 64) : nullptr) {}
  ~Scratch() { __builtin_free(raw_); }
  Scratch(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    const uintptr_t here = (reinterpret_cast<uintptr_t>(raw_) + 63) / 64 * 64 + uintptr_t(taken_);
    taken_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(here);
  }
  int64_t taken() const { return taken_; }  // of Scratch(0): the bytes that the same calls need

 private:
  void* raw_;
  int64_t taken_ = 0;
};

template <class T>
static inline T* at(const AttnTensor& t, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<T*>(t.data) + b * t.s[0] + h * t.s[1] + row * t.s[2];
}

// Numbers of a tensor of float, double or half types.
enum ElementType : int { kF32, kF64, kF16, kBf16 };  // the order of enum Dtype of common/tensor.h
template <class F>
static inline F element(const void* data, int64_t i, int dtype) {
  switch (dtype) {
    case kF64: return F(static_cast<const double*>(data)[i]);
    case kF16: return F(to_float(static_cast<const f16*>(data)[i]));
    case kBf16: return F(to_float(static_cast<const bf16*>(data)[i]));
    default: return F(static_cast<const float*>(data)[i]);
  }
}

template <class Body>
static void for_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case kF32: return body(float{});
    case kF64: return body(double{});
    case kF16: return body(f16{});
    default: return body(bf16{});
  }
}

// --- tiles as they lie in memory, or copied ---

// Rows of keys or values as F with channels side by side.
template <class F>
struct Rows {
  const F* data;
  int64_t stride;
};

template <class T, class F>
static void copy_rows(
    const T* from, int64_t rs, int64_t cs, int64_t rows, int64_t columns, F factor, F* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, from += rs, to += ld) {
    if (cs == 1)
      for (int64_t c = 0; c < columns; ++c) to[c] = to_float(from[c]) * factor;
    else
      for (int64_t c = 0; c < columns; ++c) to[c] = to_float(from[c * cs]) * factor;
  }
}

// Rows as far apart as those of (B, L, H, D) are read where they lie, too: copying a tile first cost 0 to 15 % at
// strides from 1 to 16 KiB.
template <class T, class F>
static Rows<F> tile_rows(
    const AttnTensor& t, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t columns, F* to) {
  const T* from = at<T>(t, b, h, first);
  if constexpr (sizeof(T) == sizeof(F))
    if (t.s[3] == 1) return {from, t.s[2]};
  copy_rows<T, F>(from, t.s[2], t.s[3], rows, columns, F(1), to, columns);
  return {to, columns};
}

// Whether all numbers are finite: 0 x is NaN where x is not.
template <class F>
static bool all_finite(const F* p, int64_t count) {
  constexpr int V = kLanes<F>;
  Vec<F> sums[4] = {};
  F rest = 0;
  int64_t i = 0;
  for (; i + 4 * V <= count; i += 4 * V)
    for (int j = 0; j < 4; ++j) sums[j] += F(0) * load(p + i + j * V);
  for (; i < count; ++i) rest += F(0) * p[i];
  const Vec<F> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int j = 0; j < V; ++j) rest += sum[j];
  return rest == 0;
}

template <class F>
static bool all_finite(Rows<F> rows, int64_t count, int64_t columns) {
  if (rows.stride == columns) return all_finite(rows.data, count * columns);
  for (int64_t r = 0; r < count; ++r)
    if (!all_finite(rows.data + r * rows.stride, columns)) return false;
  return true;
}

// Queries [0, rows) as panels [panel][column][W], times a factor; lanes past the end are zero.
template <class T, class F>
static void pack_panels(
    const T* from, int64_t rs, int64_t cs, int64_t rows, int64_t columns, F factor, F* to) {
  constexpr int V = kLanes<F>, W = kPanel<F>;
  for (int64_t r = 0; r < round_up(rows, W); r += V) {
    F* lanes = to + r / W * W * columns + r % W;
    load_tile(from + r * rs, rs, cs, int(most(0, least(V, rows - r))), columns, lanes, W);
    for (int64_t c = 0; c < columns; ++c) store(lanes + c * W, load(lanes + c * W) * factor);
  }
}

// One panel [column][W], multiplied in place, back to rows, each times its factor.
template <class T, class F>
static void unpack_panel(F* from, int64_t rows, int64_t columns, const F* factors, T* to, int64_t rs, int64_t cs) {
  constexpr int V = kLanes<F>, W = kPanel<F>;
  for (int64_t r = 0; r < rows; r += V) {
    const Vec<F> factor = load(factors + r);
    for (int64_t c = 0; c < columns; ++c) store(from + c * W + r, load(from + c * W + r) * factor);
    store_tile(to + r * rs, rs, cs, int(least(V, rows - r)), columns, from + r, W);
  }
}

// --- mask bits of a tile, by key ---

struct TileBits {
  MaskWord* words;  // [key][word of 64 queries]
  int64_t stride;
  bool partial;

  template <int W>
  uint64_t panel(int64_t key, int64_t query) const {
    return words[key * stride + query / 64] >> (query % 64) & (W == 64 ? ~MaskWord(0) : (MaskWord(1) << W % 64) - 1);
  }
};

// Of queries [q0, q0 + rows) and keys [k0, k0 + keys); rows past the end see nothing.
static inline void fill_bits(const AttnArgs& a, TileBits& bits, int64_t b, int64_t h, int64_t q0, int64_t rows,
                             int64_t k0, int64_t keys, MaskWord* stack) {
  for (int64_t q = 0; q < rows; q += kMaskBlock)
    for (int64_t k = 0; k < keys; k += kMaskBlock) {
      evaluate_mask(a.code, b, h, q0 + q, k0 + k, stack);
      transpose_bits(stack);
      const MaskWord inside = low_bits(least(64, rows - q));
      for (int64_t i = 0; i < least(64, keys - k); ++i) bits.words[(k + i) * bits.stride + q / 64] = stack[i] & inside;
    }
}

// The mask of the V lanes whose bits are the lowest.
template <class F>
static inline VecInt<F> lane_mask(uint64_t bits) {
  using I = typename IntOf<F>::type;
  VecInt<F> one_each;
  for (int i = 0; i < kLanes<F>; ++i) one_each[i] = I(1) << i;
  return (((I)bits - VecInt<F>{}) & one_each) != 0;
}

// Keys of a panel, [first, last): from the first to the last that any of its queries sees.
struct KeyRange {
  int64_t first, last;
};
template <int W>
static inline KeyRange key_range(const TileBits& bits, int64_t keys, int64_t query) {
  KeyRange range{0, keys};
  if (!bits.partial) return range;
  while (range.first < keys && bits.panel<W>(range.first, query) == 0) ++range.first;
  while (range.last > range.first && bits.panel<W>(range.last - 1, query) == 0) --range.last;
  return range;
}

// --- products over keys that must not meet the non-finite row of a key that a query does not see ---

// c[columns][W] += rows^T p: rows `range` of a tile, p [key][W]. `finite`: no number of the tile needs care.
template <class F, int N = 2>
static void add_rows(Rows<F> rows, KeyRange range, int64_t columns, const F* p, int64_t ldp, F* c, const TileBits& bits,
                     int64_t query, bool finite) {
  constexpr int V = kLanes<F>, W = kPanel<F>;
  const auto product = [&](int64_t first, int64_t last) {
    if (first < last)
      panel_gemm<F, true, true, N>(
          columns, rows.data + first * rows.stride, rows.stride, p + first * ldp, ldp, last - first, c, W);
  };
  if (finite || !bits.partial) return product(range.first, range.last);
  int64_t done = range.first;
  for (int64_t k = range.first; k < range.last; ++k) {
    const F* row = rows.data + k * rows.stride;
    if (all_finite(row, columns)) continue;
    product(done, k);
    done = k + 1;
    const uint64_t seen = bits.panel<W>(k, query);
    const VecInt<F> mask[2] = {lane_mask<F>(seen), lane_mask<F>(seen >> V)};
    for (int64_t j = 0; j < columns; ++j)
      for (int v = 0; v < 2; ++v) {
        F* to = c + j * W + v * V;
        store(to, mask[v] ? load(to) + row[j] * load(p + k * ldp + v * V) : load(to));
      }
  }
  product(done, range.last);
}

// --- work ---

// body(item, buffers) of each item once: a thread walks a stretch of its own, then what others have left of theirs.
// Its buffers are what make(scratch) returns.
template <class Make, class Body>
static void for_items(int64_t items, bool threads, const Make& make, const Body& body) {
  Scratch measure(0);
  make(measure);
  parallel_stretches(threads, items, 1, [&](const auto& take) {
    Scratch scratch(measure.taken());
    auto buffers = make(scratch);
    take([&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) body(item, buffers);
    });
  });
}

// Under 2^20 multiply-adds (20 us), waking the other threads may take longer.
static inline bool worth_threads(const AttnArgs& a) {
  return double(a.batch * a.heads) * double(a.q_len) * double(a.kv_len) * double(a.dim + a.value_dim) > 1 << 20;
}

// Runs of query tile i for batch b and head h, [first, last).
static inline KeyRange runs_of(const AttnArgs& a, int64_t b, int64_t h, int64_t i) {
  const int64_t bm = a.plan_batches == 1 ? 0 : b, hm = a.plan_heads == 1 ? 0 : h;
  const int64_t j = (bm * a.plan_heads + hm) * ceil_div(a.q_len, a.block_q) + i;
  return {a.ptr[j], a.ptr[j + 1]};
}

}  // namespace
