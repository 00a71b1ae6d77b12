// What the forward and backward scan kernels share (arithmetic, plan and tiles are in headers of their own).
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
#include "selective_scan/cpu_scan_tiles.h"

namespace {

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

// The sum of some steps, one a lane; with states as lanes the one sum in all lanes. In double: a complex A turns by
// many radians in a segment, and the digits of the angle past 2 pi count.
template <class F>
struct Steps {
  double sum[kLanes<F>] = {};

  void add(const Plan& plan, int64_t count, const F* d) {
    if (plan.state_lanes) {
      double total = 0;
      for (int64_t t = 0; t < count; ++t) total += d[t];
      for (double& lane : sum) lane += total;
    } else {
      for (int64_t t = 0; t < count; ++t)
        for (int i = 0; i < kLanes<F>; ++i) sum[i] += d[t * kLanes<F> + i];
    }
  }

  // Whether what was there before these steps is negligible after them, in every state of every channel.
  bool forget(const Plan& plan, Block k, Vec<F> slowest) const {
    bool all = true;
    for (int i = 0; i < (plan.state_lanes ? kLanes<F> : k.channels); ++i) all &= sum[i] * slowest[i] < -kNegligible;
    return all;
  }
};

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
  double* steps;
  signed char* open;

  void take(Arena& arena, const ScanArgs& a, const Plan& plan, int comps) {
    if (plan.segments == 1) return;
    const int64_t rows = a.batch * plan.segments * a.channels;
    state = arena.take<F>(rows * a.states * comps), steps = arena.take<double>(rows), open = arena.take<signed char>(
        rows);
  }
};

template <class O, class F = typename O::Scalar>
static void save_carry(
    const ScanArgs& a, const Plan& plan, const Carries<F>& c, int64_t b, int64_t segment, Block k, const F* state,
    bool open, const Steps<F>& steps) {
  const int64_t row = (b * plan.segments + segment) * a.channels;
  store_state<O>(a, plan, c.state + row * a.states * O::comps, a.states, 1, k, 0, plan.vectors, state);
  c.open[row + k.channel] = open;
  for (int i = 0; i < k.channels; ++i) c.steps[row + k.channel + i] = steps.sum[i];
}

// state = carry of `segment` + its decay * state. `scratch` has room for two states.
template <class O, bool kConj, class F = typename O::Scalar>
static void join_carry(
    const ScanArgs& a, const Plan& plan, const Carries<F>& c, int64_t b, int64_t segment, Block k, F* state,
    F* scratch) {
  const int64_t row = (b * plan.segments + segment) * a.channels;
  F* A = scratch + plan.vectors * O::row;
  load_state<O>(a, plan, c.state + row * a.states * O::comps, a.states, 1, k, 0, plan.vectors, scratch);
  load_state<O>(a, plan, reinterpret_cast<const F*>(a.A.data), a.A.s[0], a.A.s[1], k, 0, plan.vectors, A);
  for (int64_t v = 0; v < plan.vectors; ++v) {
    auto joined = O::get(scratch + v * O::row);
    if (c.open[row + k.channel]) {
      F decay[O::row] = {};
      for (int i = 0; i < lanes_of<F>(a, plan, k, v); ++i)
        O::wide_decay(c.steps[row + k.channel + (plan.state_lanes ? 0 : i)], A + v * O::row + i, decay + i);
      joined += (kConj ? O::conj(O::get(decay)) : O::get(decay)) * O::get(state + v * O::row);
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
