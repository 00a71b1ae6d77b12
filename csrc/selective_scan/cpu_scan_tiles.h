// Between the tensors of a scan and tiles of vectors in cache: inputs, states, B and C.
#pragma once
#include "selective_scan/cpu_scan_plan.h"

namespace {

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
static Vec<F> load_channels(const Plan& plan, const ScanTensor& x, Block k);

template <class F>
static inline void scale_rows(F* rows, int64_t count, Vec<F> scale) {
  for (int64_t i = 0; i < count; ++i) store(rows + i * kLanes<F>, load(rows + i * kLanes<F>) * scale);
}

// Calls body(place, first, n) for the stretches of `count` times from t that lie evenly apart: n of them, the first at
// element `place` of the tensor's row, number `first` of those asked for.
template <class Body>
static inline void for_lines(const ScanTensor& x, int64_t step, int64_t t, int64_t count, const Body& body) {
  for (int64_t first = 0, n; first < count; first += n) {
    const int64_t line = (t + first) / x.line, at = (t + first) % x.line;
    n = least(count - first, x.line - at);
    body(line * x.line_s + at * step, first, n);
  }
}

template <class F>
static void load_flat(
    const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t b, Block k, int64_t t, int64_t count, F* flat) {
  if (x.scale != nullptr) {
    const int8_t* p = reinterpret_cast<const int8_t*>(x.data) + b * x.s[0] + k.channel * x.s[1] + t * x.s[2];
    if (plan.state_lanes) load_line<F>(p, x.s[2], count, flat);
    else load_tile<F>(p, x.s[1], x.s[2], k.channels, count, flat);
    const ScanTensor steps{const_cast<char*>(x.scale), {x.scale_s}};
    return scale_rows<F>(flat, flat_rows<F>(plan, count), load_channels<F>(plan, steps, k));
  }
  with_storage<F>(a.io, [&](auto* type) {
    const auto* p = reinterpret_cast<decltype(type)>(x.data) + b * x.s[0] + k.channel * x.s[1];
    if (plan.state_lanes) store(flat + (flat_rows<F>(plan, count) - 1) * kLanes<F>, Vec<F>{});  // past the last time
    for_lines(x, x.s[2], t, count, [&](int64_t place, int64_t first, int64_t n) {
      if (plan.state_lanes) load_line<F>(p + place, x.s[2], n, flat + first);
      else load_tile<F>(p + place, x.s[1], x.s[2], k.channels, n, flat + first * kLanes<F>);
    });
  });
}

template <class F>
static void store_flat(
    const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t b, Block k, int64_t t, int64_t count,
    const F* flat) {
  with_storage<F>(a.io, [&](auto* type) {
    auto* p = reinterpret_cast<decltype(type)>(x.data) + b * x.s[0] + k.channel * x.s[1];
    for_lines(x, x.s[2], t, count, [&](int64_t place, int64_t first, int64_t n) {
      if (plan.state_lanes) store_line<F>(p + place, x.s[2], n, flat + first);
      else store_tile<F>(p + place, x.s[1], x.s[2], k.channels, n, flat + first * kLanes<F>);
    });
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
static void load_state(
    const ScanArgs& a, const Plan& plan, const S* data, int64_t d, int64_t n, Block k, int64_t v, int64_t count,
    F* state) {
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
static void store_state(
    const ScanArgs& a, const Plan& plan, S* data, int64_t d, int64_t n, Block k, int64_t v, int64_t count,
    const F* state) {
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
static void store_row_state(
    const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t row, Block k, const F* state) {
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

// view_matrix of codes: the numbers in `scratch`, as they lie there for half-precision matrices.
template <class O, class F = typename O::Scalar>
static MatrixView<F> view_codes(
    const ScanArgs& a, const Plan& plan, const ScanTensor& x, int64_t group, int64_t first, Block k, int64_t v,
    int64_t count, int64_t times, F* scratch) {
  constexpr int W = kLanes<F>;
  const int8_t* p = reinterpret_cast<const int8_t*>(x.data) + first + v * (plan.state_lanes ? W : 1) * x.s[2];
  const F scale = reinterpret_cast<const F*>(x.scale)[group * x.scale_s];
  if (plan.state_lanes) {
    load_tile<F>(p, x.s[2], x.s[3], lanes_of<F>(a, plan, k, v), times, scratch, O::row);
    scale_rows<F>(scratch, times, splat(scale));
    return {scratch, times, O::row};
  }
  for (int64_t i = 0; i < count; ++i) {
    load_line<F>(p + i * x.s[2], x.s[3], times, scratch + i * times);
    for (int64_t j = 0; j < times; ++j) scratch[i * times + j] *= scale;
  }
  return {scratch, times, 1};
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
  const int64_t row = b * x.s[0] + k.channel / (a.channels / groups) * x.s[1];
  if constexpr (comps == 1)
    if (x.scale != nullptr)
      return view_codes<O>(
          a, plan, x, k.channel / (a.channels / groups), row + t * x.s[3], k, v, count, times, scratch);
  const auto fill = [&](const auto* p, int64_t first, int64_t n) {
    for (int c = 0; c < comps; ++c) {
      const auto* q = p + c;
      if (plan.state_lanes) {
        load_tile<F>(q + v * W * x.s[2] * comps, x.s[2] * comps, x.s[3] * comps, lanes_of<F>(a, plan, k, v), n,
                     scratch + first * O::row + c * W, O::row);
      } else if (is_shared(a, plan)) {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < n; ++j)
            scratch[(i * times + first + j) * comps + c] = to_float(q[((v + i) * x.s[2] + j * x.s[3]) * comps]);
      } else {
        for (int64_t j = 0; j < n; ++j)
          store(scratch + (first + j) * O::row + c * W, splat(F(to_float(q[(v * x.s[2] + j * x.s[3]) * comps]))));
      }
    }
  };
  const bool same = sizeof(F) == 8 || a.io == 0 || comps == 2;
  // Scalars are read where they lie, whatever the strides. (Gathering slices of a projection, whose states are
  // contiguous, for every block and group of states was an eighth of the forward.)
  const int64_t place = row + t / x.line * x.line_s + t % x.line * x.s[3];
  if (same && is_shared(a, plan) && t % x.line + times <= x.line)
    return {reinterpret_cast<const F*>(x.data) + (place + v * x.s[2]) * comps, x.s[2] * comps, x.s[3] * comps};
  with_matrix_storage<O>(a.io, [&](auto* type) {
    const auto* p = reinterpret_cast<decltype(type)>(x.data) + row * comps;
    if (comps == 1 && is_shared(a, plan) && t % x.line + times <= x.line)
      for (int64_t i = 0; i < count; ++i)
        load_line<F>(p + place - row + (v + i) * x.s[2], x.s[3], times, scratch + i * times);
    else
      for_lines(x, x.s[3], t, times, [&](int64_t at, int64_t first, int64_t n) { fill(p + at * comps, first, n); });
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

}  // namespace
