// The backward scan inside a chunk, its scratch memory, and sums over time. Used by cpu_scan_bwd_kernel.cpp.
#pragma once
#include "selective_scan/cpu_scan_common.h"

namespace {

constexpr int kStates = 2;  // vectors of a state at a time: their history of a chunk of 64 tokens takes 16 KiB

// A sum over time of some vectors, compensated (Kahan): it keeps what each addition loses.
template <class V>
struct Compensated {
  V sum{}, lost{};
  void add(V x) {
    const V y = x - lost, s = sum + y, rest = (s - sum) - y;
    lost = rest == rest ? rest : V{};  // once the sum is infinite, inf - inf would turn it into NaN
    sum = s;
  }
};

template <class F>
struct Sum {
  F *sum, *lost;
  void take(Arena& arena, int64_t count) { sum = arena.take<F>(count), lost = arena.take<F>(count); }
  void clear(int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) sum[i] = 0, lost[i] = 0;
  }
  void add(int64_t at, Vec<F> x) {
    Compensated<Vec<F>> c{load(sum + at), load(lost + at)};
    c.add(x);
    store(sum + at, c.sum), store(lost + at, c.lost);
  }
};

// The gradient of B or of C. Grouped: rows of a span, [group of the item][row][t] with a row for each n and
// component, or, with states as lanes, for each vector of n and component and then [t][W]. Constant: sums over time.
template <class F>
struct MatrixGradient {
  int64_t groups, item_groups, rows;  // groups 0: constant
  int width;                          // scalars of a row and time: 1, or W with states as lanes
  F* chunk;                           // of the item
  F* slabs;                           // (parts, B, G, rows, L, width): sums of the items; nullptr: chunks are final
  F* partial;                         // constant: (B, segments, D, N)
  Sum<F> constant;                    // of the bundle
};

template <class O, class F = typename O::Scalar>
struct Scratch {
  F *d, *x, *u, *dy, *slope, *dz, *y, *dd, *gb;                   // flat tiles
  F *d_rows, *x_rows, *dy_rows, *y_rows, *dd_rows, *gb_rows;      // [t][W]
  F *decays, *states;                                             // history, [kStates][t][row]
  F *B, *C, *entering, *joined;
  F *g, *scaled, *A;                                              // of a bundle
  Sum<F> dA, dD, dbias;                                           // of a bundle
  MatrixGradient<F> dB, dC;
  Block* bundle;
  Decays<O>* decays_of;

  Scratch(Arena& arena, const ScanArgs& a, const Plan& plan, const MatrixGradient<F>& B_, const MatrixGradient<F>& C_) {
    constexpr int W = kLanes<F>;
    const int64_t times = least(a.chunk, a.length) + 1, tile = least(
        plan.span, a.length) * W, vectors = plan.vectors * O::row;
    F** flat[] = {&d, &x, &u, &dy, &slope, &dz, &y, &dd, &gb};
    for (F** p : flat) *p = arena.take<F>(tile);
    d_rows = d, x_rows = x, dy_rows = dy, y_rows = y, dd_rows = dd, gb_rows = gb;
    if (plan.state_lanes) {
      F** rows[] = {&d_rows, &x_rows, &dy_rows, &y_rows, &dd_rows, &gb_rows};
      for (F** p : rows) *p = arena.take<F>(tile);
    }
    decays = arena.take<F>(kStates * times * O::row), states = arena.take<F>(kStates * times * O::row);
    const int64_t matrix = (is_shared(a, plan) ? kStates * times * O::comps + W : times * O::row);
    B = arena.take<F>(matrix), C = arena.take<F>(matrix);
    entering = arena.take<F>(vectors), joined = arena.take<F>(2 * vectors);
    g = arena.take<F>(vectors * plan.bundle), scaled = arena.take<F>(vectors * plan.bundle), A = arena.take<F>(vectors);
    dA.take(arena, vectors * plan.bundle), dD.take(arena, W * plan.bundle), dbias.take(arena, W * plan.bundle);
    bundle = arena.take<Block>(plan.bundle), decays_of = arena.take<Decays<O>>(plan.bundle);
    dB = B_, dC = C_;
    MatrixGradient<F>* gradients[] = {&dB, &dC};
    for (MatrixGradient<F>* m : gradients) {
      if (m->groups) m->chunk = arena.take<F>((m->item_groups * m->rows * least(plan.span, a.length) + W) * m->width);
      else m->constant.take(arena, vectors * plan.bundle);
    }
  }
};

// kCount vectors of the state forward through some times of a chunk, leaving decays and the states before each time.
template <class O, bool kShared, bool kBounded, int kCount, class F = typename O::Scalar>
void rebuild(
    const F* d_rows, const F* x_rows, F* y_rows, const F* entering, const F* scaled, MatrixView<F> B, MatrixView<F> C,
    F* decays, F* states, int64_t times, VecInt<F> valid) {
  constexpr int W = kLanes<F>;
  typename O::Value h[kCount], A[kCount];
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i) h[i] = O::get(entering + i * O::row), A[i] = O::get(scaled + i * O::row);
  for (int64_t t = 0; t < times; ++t) {
    const Vec<F> d = load(d_rows + t * W), x = load(x_rows + t * W);
    Vec<F> y = load(y_rows + t * W);
#pragma GCC unroll 2
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = (i * (times + 1) + t) * O::row;
      const auto decay = O::template decay<kBounded>(d, A[i]);
      O::put(decays + at, decay), O::put(states + at, h[i]);
      h[i] = decay * h[i] + x * element<O, kShared>(B, i, t);
      const Vec<F> term = O::real(element<O, kShared>(C, i, t) * h[i]);
      if constexpr (kShared) y += term;
      else y += keep<F>(term, valid);
    }
    store(y_rows + t * W, y);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i) O::put(states + (i * (times + 1) + times) * O::row, h[i]);
}

// The same vectors backward. dB terms end up in `decays` at t, dC terms in `states` at t + 1.
template <class O, bool kShared, int kCount, class F = typename O::Scalar>
void unwind(
    const F* d_rows, const F* x_rows, const F* dy_rows, F* dd_rows, F* gb_rows, F* g_state, const F* A_rows,
    MatrixView<F> B, MatrixView<F> C, F* decays, F* states, int64_t times, VecInt<F> valid,
    typename O::Value* dA) {
  constexpr int W = kLanes<F>;
  typename O::Value g[kCount], A[kCount], h[kCount];
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i) {
    g[i] = O::get(g_state + i * O::row), A[i] = O::conj(O::get(A_rows + i * O::row));
    h[i] = O::get(states + (i * (times + 1) + times) * O::row);
  }
  for (int64_t t = times - 1; t >= 0; --t) {
    const Vec<F> d = load(d_rows + t * W), x = load(x_rows + t * W), dy = load(dy_rows + t * W) * O::scale;
    Vec<F> dd = load(dd_rows + t * W), gb = load(gb_rows + t * W);
#pragma GCC unroll 2
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = (i * (times + 1) + t) * O::row;
      const auto decay = O::get(decays + at), previous = O::get(states + at);
      g[i] += dy * O::conj(element<O, kShared>(C, i, t));
      O::put(states + at + O::row, dy * O::conj(h[i]));
      O::put(decays + at, x * g[i]);
      const auto dE = g[i] * O::conj(decay * previous);
      dA[i] += d * dE;
      Vec<F> dd_term = O::real(dE * A[i]), gb_term = O::real(g[i] * O::conj(element<O, kShared>(B, i, t)));
      if constexpr (!kShared) dd_term = keep<F>(dd_term, valid), gb_term = keep<F>(gb_term, valid);
      dd += dd_term, gb += gb_term;
      g[i] = O::conj(decay) * g[i];
      h[i] = previous;
    }
    store(dd_rows + t * W, dd), store(gb_rows + t * W, gb);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i) O::put(g_state + i * O::row, g[i]);
}

// Only g, through [t0, t1): what a segment passes on to the one before it.
template <class O, bool kShared, class F = typename O::Scalar>
void unwind_g(const F* d_rows, const F* dy_rows, F* g_state, const F* scaled, MatrixView<F> C, int64_t t0, int64_t t1) {
  constexpr int W = kLanes<F>;
  const auto A = O::get(scaled);
  auto g = O::get(g_state);
  for (int64_t t = t1 - 1; t >= t0; --t) {
    g += load(dy_rows + t * W) * O::scale * O::conj(element<O, kShared>(C, 0, t - t0));
    g = O::conj(O::template decay<false>(load(d_rows + t * W), A)) * g;
  }
  O::put(g_state, g);
}

}  // namespace
