// What the forward and backward scan kernels share: arithmetic, blocks of lanes, tiles of the inputs, the split of work.
//
// Shape letters: B batch, D channels, L length, N state size, G groups; W lanes of a vector.
//
// Lanes run along channels, or, when a vector would be mostly empty that way, along the state of one channel:
//
//              lanes of a block   vectors of a state   d_t, u_t           B_t[n], C_t[n]         y_t
//   channels   W channels         N                    one a lane         one scalar for all     a sum over vectors
//   states     N of one channel   ceil(N / W)          one for all        one a lane             a sum over lanes
//
// A tile of inputs is "flat": [t][W] with channels as lanes, [t] with states as lanes (W times to a vector).
#pragma once
#include "common/parallel.h"
#include "common/tile.h"
#include "selective_scan/scan.h"

namespace {

using scalekern::ScanArgs;
using scalekern::ScanTensor;

// --- arithmetic on a state: real, or complex as two planes ---

template <class F>
struct RealState {
  using Scalar = F;
  using Value = Vec<F>;
  static constexpr int comps = 1;        // scalars of an element
  static constexpr int row = kLanes<F>;  // scalars of a vector of elements
  static constexpr F scale = 1;          // y = scale Re(C h)
  static Value get(const F* p) { return load(p); }
  static void put(F* p, Value v) { store(p, v); }
  static Value all(const F* p) { return splat(*p); }
  static Value conj(Value v) { return v; }
  static Vec<F> real(Value v) { return v; }
  // The form of A that decay() takes.
  static Value scaled_A(Value A) { return A * F(1.44269504088896340736); }
  static Vec<F> growth(Value A) { return A; }
  template <bool kBounded>
  static Value decay(Vec<F> d, Value scaled) {
    if constexpr (kBounded) return exp2_product_bounded<F>(d, scaled);
    else return exp2_product<F>(d, scaled);
  }
};

template <class F>
struct ComplexState {
  struct Value {
    Vec<F> re, im;
    friend Value operator+(Value a, Value b) { return {a.re + b.re, a.im + b.im}; }
    friend Value operator-(Value a, Value b) { return {a.re - b.re, a.im - b.im}; }
    friend Value operator*(Value a, Value b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
    friend Value operator*(Vec<F> a, Value b) { return {a * b.re, a * b.im}; }
    Value& operator+=(Value b) { return *this = *this + b; }
  };
  using Scalar = F;
  static constexpr int comps = 2;
  static constexpr int row = 2 * kLanes<F>;
  static constexpr F scale = 2;
  static Value get(const F* p) { return {load(p), load(p + kLanes<F>)}; }
  static void put(F* p, Value v) { store(p, v.re), store(p + kLanes<F>, v.im); }
  static Value all(const F* p) { return {splat(p[0]), splat(p[1])}; }
  static Value conj(Value v) { return {v.re, -v.im}; }
  static Vec<F> real(Value v) { return v.re; }
  static Value scaled_A(Value A) { return A; }  // scaling the rotation would cost it digits
  static Vec<F> growth(Value A) { return A.re * F(1.44269504088896340736); }
  template <bool kBounded>
  static Value decay(Vec<F> d, Value A) {
    const Vec<F> size = expv(d * A.re);
    Vec<F> sine, cosine;
    sincosv<F>(d * A.im, sine, cosine);
    return {size * cosine, size * sine};
  }
};

template <class F>
static inline bool all_true(VecInt<F> mask) {
  bool yes = true;
  for (int i = 0; i < kLanes<F>; ++i) yes &= mask[i] != 0;
  return yes;
}

template <class F>
static inline VecInt<F> first_lanes(int count) {
  VecInt<F> mask;
  for (int i = 0; i < kLanes<F>; ++i) mask[i] = i < count ? -1 : 0;
  return mask;
}

template <class F>
static inline Vec<F> keep(Vec<F> v, VecInt<F> mask) {
  return (Vec<F>)((VecInt<F>)v & mask);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- memory: one aligned allocation handed out in pieces ---

class Arena {
 public:
  explicit Arena(char* base) : next_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return next_ - static_cast<char*>(nullptr); }

 private:
  char* next_;
};

// Runs body(scratch) with `bytes` of aligned scratch memory.
template <class Body>
static void with_scratch(int64_t bytes, const Body& body) {
  char* raw = static_cast<char*>(__builtin_malloc(bytes + 64));
  body(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64));
  __builtin_free(raw);
}

// --- blocks and the split of work ---

struct Block {
  int64_t channel;  // the first one
  int channels;     // W or fewer with channels as lanes, 1 with states as lanes
};

// Work is cut into items (b, group, part of the group's blocks, segment of time).
constexpr int64_t kMaxBundle = 32;  // blocks that one item takes through time together

struct Plan {
  bool state_lanes;
  int64_t vectors;   // of a state
  int64_t groups;    // of channels that share both B and C, or that a cut of both respects
  int64_t blocks;    // of a group
  int64_t parts, segments, chunks, bundle;

  int64_t items(const ScanArgs& a) const { return a.batch * groups * parts * segments; }
};

struct Item {
  int64_t b, group, part, segment;
  int64_t begin, end;  // times
};

static inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// The block that starts at channel c: no group boundary of B or C inside it.
template <class F>
static Block block_at(const ScanArgs& a, const Plan& plan, int64_t c) {
  int64_t end = least(c + (plan.state_lanes ? 1 : kLanes<F>), a.channels);
  const int64_t size_B = a.channels / most(1, a.groups_B), size_C = a.channels / most(1, a.groups_C);
  end = least(end, least((c / size_B + 1) * size_B, (c / size_C + 1) * size_C));
  return {c, int(end - c)};
}

static inline Item item_at(const ScanArgs& a, const Plan& plan, int64_t index) {
  Item i;
  i.segment = index % plan.segments, index /= plan.segments;
  i.part = index % plan.parts, index /= plan.parts;
  i.group = index % plan.groups, i.b = index / plan.groups;
  const int64_t first = plan.chunks * i.segment / plan.segments, last = plan.chunks * (i.segment + 1) / plan.segments;
  i.begin = most(0, first * a.chunk - a.pad), i.end = least(a.length, last * a.chunk - a.pad);
  return i;
}

// Calls body(block) for the blocks of an item's part.
template <class F, class Body>
static void for_blocks(const ScanArgs& a, const Plan& plan, const Item& item, const Body& body) {
  const int64_t size = a.channels / plan.groups, first = plan.blocks * item.part / plan.parts;
  const int64_t last = plan.blocks * (item.part + 1) / plan.parts;
  int64_t c = item.group * size;
  for (int64_t i = 0; i < last; ++i) {
    const Block block = block_at<F>(a, plan, c);
    if (i >= first) body(block);
    c += block.channels;
  }
}

// `max_parts` bounds the parts of a group (the backward pays memory for each).
template <class F>
static Plan make_plan(const ScanArgs& a, int64_t max_parts) {
  constexpr int W = kLanes<F>;
  Plan p{};
  p.chunks = ceil_div(a.length, a.chunk);
  p.groups = most(1, gcd(a.groups_B, a.groups_C));
  const auto count_blocks = [&] {
    int64_t count = 0;
    for (int64_t c = 0; c < a.channels / p.groups; ++count) c += block_at<F>(a, p, c).channels;
    return count;
  };
  // A vector costs about half as much again with states as lanes: B and C are transposed, y is summed across.
  p.blocks = count_blocks();
  const int64_t by_channel = p.blocks * p.groups * a.states, by_state = a.channels * ceil_div(a.states, W);
  p.state_lanes = 3 * by_state < 2 * by_channel;
  if (p.state_lanes) p.blocks = count_blocks();
  p.vectors = p.state_lanes ? ceil_div(a.states, W) : a.states;
  const int64_t threads = scalekern::num_threads(), whole = a.batch * p.groups;
  p.parts = threads == 1 ? 1 : most(1, least(least(p.blocks, max_parts), ceil_div(4 * threads, whole)));
  // Time is cut when the threads would be idle otherwise, into segments of at least 1024 tokens.
  p.segments = 1;
  const auto efficiency = [&](int64_t segments) {
    const int64_t items = whole * p.parts * segments;
    return double(items) / double(threads * ceil_div(items, threads));
  };
  const int64_t max_segments = least(4 * threads, p.chunks * a.chunk / most(1024, 2 * a.chunk));
  for (int64_t s = 2; s <= max_segments && efficiency(p.segments) < 0.8; ++s)
    if (efficiency(s) > efficiency(p.segments)) p.segments = s;
  // With time contiguous, a few blocks at a time stream through memory; with channels contiguous, whole rows do.
  const bool rows = a.u.s[2] != 1 && a.u.s[2] != -1;
  p.bundle = rows ? kMaxBundle : 2;
  return p;
}

// --- sequences ---

// The sequence that time t belongs to (never an empty one).
static inline int64_t sequence_at(const ScanArgs& a, int64_t t) {
  int64_t low = 0, high = a.sequences;  // starts[low] <= t < starts[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.starts[middle] <= t ? low : high) = middle;
  }
  return low;
}

// --- tensors to tiles ---

// Calls body(null pointer of the storage type of u, delta, z, out).
template <class F, class Body>
static inline void with_storage(int io, const Body& body) {
  if constexpr (sizeof(F) == 8) return body(static_cast<double*>(nullptr));
  else if (io == 0) return body(static_cast<float*>(nullptr));
  else if (io == 2) return body(static_cast<f16*>(nullptr));
  else return body(static_cast<bf16*>(nullptr));
}

// The same for B, C and their gradients, which with a complex A are of the state's type.
template <class O, class Body>
static inline void with_matrix_storage(int io, const Body& body) {
  using F = typename O::Scalar;
  if constexpr (O::comps == 2) return body(static_cast<F*>(nullptr));
  else return with_storage<F>(io, body);
}

// Vectors of a flat tile of `count` times.
template <class F>
static inline int64_t flat_rows(const Plan& plan, int64_t count) {
  return plan.state_lanes ? ceil_div(count, kLanes<F>) : count;
}

template <class F>
static void load_flat(const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t b, Block k, int64_t t, int64_t count, F* flat) {
  with_storage<F>(a.io, [&](auto* type) {
    const auto* p = reinterpret_cast<decltype(type)>(x.data) + b * x.s[0] + k.channel * x.s[1] + t * x.s[2];
    if (plan.state_lanes) load_line<F>(p, x.s[2], count, flat);
    else load_tile<F>(p, x.s[1], x.s[2], k.channels, count, flat);
  });
}

template <class F>
static void store_flat(const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t b, Block k, int64_t t, int64_t count, const F* flat) {
  with_storage<F>(a.io, [&](auto* type) {
    auto* p = reinterpret_cast<decltype(type)>(x.data) + b * x.s[0] + k.channel * x.s[1] + t * x.s[2];
    if (plan.state_lanes) store_line<F>(p, x.s[2], count, flat);
    else store_tile<F>(p, x.s[1], x.s[2], k.channels, count, flat);
  });
}

// One value a channel (D, bias): a lane each, or the one channel's value in all lanes. 0 when absent.
template <class F>
static Vec<F> load_channels(const Plan& plan, const ScanTensor& x, Block k) {
  F lanes[kLanes<F>] = {};
  if (x.data == nullptr) return load(lanes);
  const F* p = reinterpret_cast<const F*>(x.data) + k.channel * x.s[0];
  for (int i = 0; i < kLanes<F>; ++i)
    if (plan.state_lanes || i < k.channels) lanes[i] = p[plan.state_lanes ? 0 : i * x.s[0]];
  return load(lanes);
}

// Valid lanes of vector v of a state.
template <class F>
static inline int lanes_of(const ScanArgs& a, const Plan& plan, Block k, int64_t v) {
  return plan.state_lanes ? int(least(kLanes<F>, a.states - v * kLanes<F>)) : k.channels;
}

// Vectors [v, v + count) of a (D, N) slice at `data` with strides (d, n), from or to memory.
template <class O, class S, class F = typename O::Scalar>
static void load_state(const ScanArgs& a, const Plan& plan, const S* data, int64_t d, int64_t n, Block k, int64_t v, int64_t count, F* state) {
  constexpr int W = kLanes<F>;
  d *= O::comps, n *= O::comps;
  for (int c = 0; c < O::comps; ++c) {
    const S* p = data + c + k.channel * d;
    if (!plan.state_lanes) load_tile<F>(p + v * n, d, n, k.channels, count, state + c * W, O::row);
    else
      for (int64_t i = 0; i < count; ++i)
        load_tile<F>(p + (v + i) * W * n, n, 0, lanes_of<F>(a, plan, k, v + i), 1, state + i * O::row + c * W);
  }
}

template <class O, class S, class F = typename O::Scalar>
static void store_state(const ScanArgs& a, const Plan& plan, S* data, int64_t d, int64_t n, Block k, int64_t v, int64_t count, const F* state) {
  constexpr int W = kLanes<F>;
  d *= O::comps, n *= O::comps;
  for (int c = 0; c < O::comps; ++c) {
    S* p = data + c + k.channel * d;
    if (!plan.state_lanes) store_tile<F>(p + v * n, d, n, k.channels, count, state + c * W, O::row);
    else
      for (int64_t i = 0; i < count; ++i)
        store_tile<F>(p + (v + i) * W * n, n, 0, lanes_of<F>(a, plan, k, v + i), 1, state + i * O::row + c * W);
  }
}

// The whole state in `row` of a state tensor (row, d, n); zeros when the tensor is absent.
template <class O, class F = typename O::Scalar>
static void load_row_state(const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t row, Block k, F* state) {
  if (x.data == nullptr) {
    for (int64_t i = 0; i < plan.vectors * O::row; ++i) state[i] = 0;
  } else {
    const F* p = reinterpret_cast<const F*>(x.data) + row * x.s[0] * O::comps;
    load_state<O>(a, plan, p, x.s[1], x.s[2], k, 0, plan.vectors, state);
  }
}

template <class O, class F = typename O::Scalar>
static void store_row_state(const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t row, Block k, const F* state) {
  if (x.data == nullptr) return;
  F* p = reinterpret_cast<F*>(x.data) + row * x.s[0] * O::comps;
  store_state<O>(a, plan, p, x.s[1], x.s[2], k, 0, plan.vectors, state);
}

// The rows of empty sequences: what enters is what leaves, zeros when `from` is absent.
template <class O, class F = typename O::Scalar>
static void copy_empty_sequences(const ScanArgs& a, const ScanTensor& from, const ScanTensor& to) {
  const auto at = [](const ScanTensor& x, int64_t row, int64_t d, int64_t n) {
    return reinterpret_cast<F*>(x.data) + (row * x.s[0] + d * x.s[1] + n / O::comps * x.s[2]) * O::comps + n % O::comps;
  };
  for (int64_t row = 0; row < a.sequences; ++row)
    for (int64_t d = 0; a.starts[row] == a.starts[row + 1] && d < a.channels; ++d)
      for (int64_t n = 0; n < a.states * O::comps; ++n) *at(to, row, d, n) = from.data ? *at(from, row, d, n) : F(0);
}

// Slot of the chunk that starts at time t.
template <class O, class F = typename O::Scalar>
static F* slot_at(const ScanArgs& a, int64_t b, int64_t t) {
  const ScanTensor& x = a.checkpoints;
  return reinterpret_cast<F*>(x.data) + (b * x.s[0] + (t + a.pad) / a.chunk * x.s[1]) * O::comps;
}

// --- B and C of some vectors of a state over some times ---

// Element (vector i, time t) is at p[i * vector + t * time]: a scalar for all lanes (kShared), else a vector.
template <class F>
struct MatrixView {
  const F* p;
  int64_t vector, time;
};

// Both B and C vary in time and lanes are channels: their elements are shared by all lanes.
static inline bool is_shared(const ScanArgs& a, const Plan& plan) {
  return !plan.state_lanes && a.groups_B > 0 && a.groups_C > 0;
}

// `scratch` has room for count * times elements (shared), else for max(times, 1) vectors; then count is 1.
template <class O, class F = typename O::Scalar>
static MatrixView<F> view_matrix(
    const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t groups, int64_t b, Block k, int64_t v,
    int64_t count, int64_t t, int64_t times, F* scratch) {
  constexpr int W = kLanes<F>, comps = O::comps;
  if (groups == 0) {
    with_matrix_storage<O>(a.io, [&](auto* type) {
      load_state<O>(a, plan, reinterpret_cast<decltype(type)>(x.data), x.s[0], x.s[1], k, v, 1, scratch);
    });
    return {scratch, 0, 0};
  }
  const int64_t first = b * x.s[0] + k.channel / (a.channels / groups) * x.s[1] + t * x.s[3];
  const auto fill = [&](const auto* p) {
    for (int c = 0; c < comps; ++c) {
      const auto* q = p + first * comps + c;
      if (plan.state_lanes) {
        load_tile<F>(q + v * W * x.s[2] * comps, x.s[2] * comps, x.s[3] * comps, lanes_of<F>(a, plan, k, v), times,
                     scratch + c * W, O::row);
      } else if (is_shared(a, plan)) {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < times; ++j)
            scratch[(i * times + j) * comps + c] = to_float(q[((v + i) * x.s[2] + j * x.s[3]) * comps]);
      } else {
        for (int64_t j = 0; j < times; ++j)
          store(scratch + j * O::row + c * W, splat(F(to_float(q[(v * x.s[2] + j * x.s[3]) * comps]))));
      }
    }
  };
  const bool same = sizeof(F) == 8 || a.io == 0 || comps == 2;
  if (same && is_shared(a, plan) && x.s[3] == 1)
    return {reinterpret_cast<const F*>(x.data) + (first + v * x.s[2]) * comps, x.s[2] * comps, comps};
  with_matrix_storage<O>(a.io, [&](auto* type) {
    const auto* p = reinterpret_cast<decltype(type)>(x.data);
    if (comps == 1 && is_shared(a, plan))
      for (int64_t i = 0; i < count; ++i)
        load_line<F>(p + first + (v + i) * x.s[2], x.s[3], times, scratch + i * times);
    else fill(p);
  });
  return {scratch, times * comps, is_shared(a, plan) ? comps : O::row};
}

// One element (shared) or vector of a view.
template <class O, bool kShared, class F>
static inline typename O::Value element(const MatrixView<F>& m, int64_t i, int64_t t) {
  const F* p = m.p + i * m.vector + t * m.time;
  if constexpr (kShared) return O::all(p);
  else return O::get(p);
}

// --- per-block constants and the step size ---

// Powers of two below which a contribution is left out when time is split: the smallest normal number and some.
constexpr int kNegligible = 130;

template <class O>
struct Decays {
  using F = typename O::Scalar;
  F* scaled;         // [vectors][row]
  Vec<F> magnitude;  // a bound on |A| log2 e that meets each lane of d; NaN or inf when an A is
  Vec<F> slowest;    // the largest growth

  void load_from(const ScanArgs& a, const Plan& plan, Block k, F* memory) {
    scaled = memory;
    load_state<O>(a, plan, reinterpret_cast<const F*>(a.A.data), a.A.s[0], a.A.s[1], k, 0, plan.vectors, scaled);
    magnitude = Vec<F>{};
    slowest = splat(F(-__builtin_inf()));
    Vec<F> probe{};
    for (int64_t v = 0; v < plan.vectors; ++v) {
      const auto A = O::scaled_A(O::get(scaled + v * O::row));
      O::put(scaled + v * O::row, A);
      const Vec<F> g = O::growth(A), size = g < 0 ? -g : g;
      probe += g * 0;
      magnitude = size > magnitude ? size : magnitude;
      const auto valid = first_lanes<F>(lanes_of<F>(a, plan, k, v));
      slowest = (g > slowest) & valid ? g : slowest;
    }
    magnitude += probe;
    if (!plan.state_lanes) return;
    for (int i = 1; i < kLanes<F>; ++i) {  // one d meets all lanes
      magnitude[0] = magnitude[i] > magnitude[0] || magnitude[i] != magnitude[i] ? magnitude[i] : magnitude[0];
      slowest[0] = slowest[i] > slowest[0] ? slowest[i] : slowest[0];
    }
    magnitude = splat(magnitude[0]), slowest = splat(slowest[0]);
  }
};

// delta becomes d in place. With `slope`, also softplus's derivative.
template <class F>
static void step_sizes(const ScanArgs& a, int64_t rows, Vec<F> bias, F* d, F* slope) {
  constexpr int W = kLanes<F>;
  for (int64_t i = 0; i < rows; ++i) {
    Vec<F> raw = load(d + i * W) + bias;
    if (slope) store(slope + i * W, a.softplus ? sigmoidv(raw) : splat(F(1)));
    if (a.softplus) raw = softplusv(raw);
    store(d + i * W, raw);
  }
}

template <class F>
static bool is_bounded(int64_t rows, const F* d, Vec<F> magnitude) {
  VecInt<F> fine = first_lanes<F>(kLanes<F>);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec<F> x = load(d + i * kLanes<F>) * magnitude;
    fine &= (x < kExp2Bound<F>) & (x > -kExp2Bound<F>);
  }
  return all_true<F>(fine);
}

// The sum of d over `count` times, one a lane; with states as lanes the one sum in all lanes.
template <class F>
static Vec<F> sum_flat(const Plan& plan, int64_t count, const F* d) {
  Vec<F> sum{};
  if (!plan.state_lanes) {
    for (int64_t i = 0; i < count; ++i) sum += load(d + i * kLanes<F>);
    return sum;
  }
  F total = 0;
  for (int64_t i = 0; i < count; ++i) total += d[i];
  return splat(total);
}

// Flat [t] to [t][W], each value in all lanes; and back, as sums over the lanes.
template <class F>
static void spread(int64_t count, const F* flat, F* rows) {
  for (int64_t i = 0; i < count; ++i) store(rows + i * kLanes<F>, splat(flat[i]));
}

// out[i * stride] (+)= the sum over masked lanes of row i, rows `pitch` apart.
template <class F>
static void sum_rows(int64_t count, const F* rows, int64_t pitch, VecInt<F> mask, F* out, bool add) {
  constexpr int W = kLanes<F>;
  for (int64_t i = 0; i < count; i += W) {
    const int n = int(least(W, count - i));
    Vec<F> v[W];
    for (int j = 0; j < W; ++j) v[j] = j < n ? keep<F>(load(rows + (i + j) * pitch), mask) : Vec<F>{};
    const Vec<F> sums = sum_lanes<F>(v);
    if (n == W) store(out + i, add ? load(out + i) + sums : sums);
    else
      for (int j = 0; j < n; ++j) out[i + j] = add ? out[i + j] + sums[j] : sums[j];
  }
}

// --- joining segments of time ---

// What a segment alone makes of its state, (B, segments, D, N); and, where a state that enters it still counts when it
// leaves, the sum of its steps, (B, segments, D).
template <class F>
struct Carries {
  F* state;
  F* steps;
  signed char* open;

  void take(Arena& arena, const ScanArgs& a, const Plan& plan, int comps) {
    if (plan.segments == 1) return;
    const int64_t rows = a.batch * plan.segments * a.channels;
    state = arena.take<F>(rows * a.states * comps), steps = arena.take<F>(rows), open = arena.take<signed char>(rows);
  }
};

template <class O, class F = typename O::Scalar>
static void save_carry(const ScanArgs& a, const Plan& plan, const Carries<F>& c, int64_t b, int64_t segment, Block k, const F* state, bool open, Vec<F> steps) {
  const int64_t row = (b * plan.segments + segment) * a.channels;
  store_state<O>(a, plan, c.state + row * a.states * O::comps, a.states, 1, k, 0, plan.vectors, state);
  c.open[row + k.channel] = open;
  for (int i = 0; i < k.channels; ++i) c.steps[row + k.channel + i] = steps[i];
}

// state = carry of `segment` + its decay * state
template <class O, bool kConj, class F = typename O::Scalar>
static void join_carry(const ScanArgs& a, const Plan& plan, const Carries<F>& c, int64_t b, int64_t segment, Block k, const Decays<O>& decays, F* state, F* scratch) {
  const int64_t row = (b * plan.segments + segment) * a.channels;
  load_state<O>(a, plan, c.state + row * a.states * O::comps, a.states, 1, k, 0, plan.vectors, scratch);
  const Vec<F> steps = load_channels<F>(plan, {reinterpret_cast<char*>(c.steps + row), {1}}, k);
  for (int64_t v = 0; v < plan.vectors; ++v) {
    auto joined = O::get(scratch + v * O::row);
    if (c.open[row + k.channel]) {
      const auto decay = O::template decay<false>(steps, O::get(decays.scaled + v * O::row));
      joined += (kConj ? O::conj(decay) : decay) * O::get(state + v * O::row);
    }
    O::put(state + v * O::row, joined);
  }
}

template <class O, class F = typename O::Scalar>
static bool is_finite(const ScanArgs& a, const Plan& plan, Block k, const F* state) {
  VecInt<F> fine = first_lanes<F>(kLanes<F>);
  for (int64_t v = 0; v < plan.vectors; ++v)
    for (int c = 0; c < O::comps; ++c) {
      const Vec<F> x = load(state + v * O::row + c * kLanes<F>);
      fine &= (x - x == 0) | ~first_lanes<F>(lanes_of<F>(a, plan, k, v));
    }
  return all_true<F>(fine);
}

}  // namespace
