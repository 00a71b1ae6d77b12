// One decoding step of the selective scan, one pass over the state.
//
// Bound: the state is read and written once, 8 N bytes a channel in fp32 (4 N in half precision), and one
// exponential an element; at N = 16 both are far below the cost of a call, so what counts is to do no more passes.
// Split: (batch, head, channel) rows over threads; lanes along N, whose state and A are contiguous in a row. What a
// row has one of (softplus of its step size, its gate) is computed for a vector of rows at once, lanes along rows:
// done row by row, they cost more than the rows themselves (D 1536, N 16, one thread, AVX-512: 155 us, so 31 us).
#include "selective_scan/state_update.h"

#include "common/parallel.h"
#include "common/vec.h"

namespace {

using scalekern::StateUpdateArgs;

template <class T>
const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

int64_t slot_of(const StateUpdateArgs& a, int64_t b) {
  if (a.indices == nullptr) return b;
  return a.indices_are_int64 ? *at<int64_t>(a.indices, b * a.indices_b) : *at<int32_t>(a.indices, b * a.indices_b);
}

// A piece of up to one vector of a strided row, widened; lanes past `count` are `fill`.
template <class S, class F>
Vec<F> gather(const S* p, int64_t stride, int count, F fill) {
  F lanes[kLanes<F>];
  if (count == kLanes<F> && stride == 1) {
    if constexpr (sizeof(S) == sizeof(F)) return load(reinterpret_cast<const F*>(p));
    for (int i = 0; i < kLanes<F>; ++i) lanes[i] = to_float(p[i]);
  } else {
    for (int i = 0; i < kLanes<F>; ++i) lanes[i] = i < count ? F(to_float(p[i * stride])) : fill;
  }
  return load(lanes);
}

template <class S, class F>
void scatter(S* p, int64_t stride, int count, Vec<F> v) {
  if constexpr (sizeof(S) == sizeof(F))
    if (count == kLanes<F> && stride == 1) return store(reinterpret_cast<F*>(p), v);
  F lanes[kLanes<F>];
  store(lanes, v);
  if (count == kLanes<F> && stride == 1) {
    for (int i = 0; i < kLanes<F>; ++i) from_float(p[i], lanes[i]);
  } else {
    for (int i = 0; i < count; ++i) from_float(p[i * stride], lanes[i]);
  }
}

// The sum of the lanes by halves: one after the other they would wait for each other, 64 cycles a row.
template <class F>
F total(Vec<F> v) {
  F lanes[kLanes<F>];
  store(lanes, v);
  for (int half = kLanes<F> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// What a vector of neighbouring rows (of one batch row and head) needs once a row.
template <class F>
struct RowScalars {
  F step[kLanes<F>], input[kLanes<F>], gate[kLanes<F>];
};

template <class T, class F>
RowScalars<F> row_scalars(const StateUpdateArgs& a, int64_t b, int64_t h, int64_t p, int count) {
  Vec<F> d = gather<T, F>(at<T>(a.dt, b * a.dt_b + h * a.dt_h + p * a.dt_p), a.dt_p, count, F(0));
  if (a.dt_bias) d += gather<F, F>(at<F>(a.dt_bias, h * a.bias_h + p * a.bias_p), a.bias_p, count, F(0));
  if (a.softplus) d = softplusv(d);
  RowScalars<F> r;
  store(r.step, d);
  store(r.input, gather<T, F>(at<T>(a.x, b * a.x_b + h * a.x_h + p * a.x_p), a.x_p, count, F(0)));
  if (a.z) {
    const Vec<F> z = gather<T, F>(at<T>(a.z, b * a.z_b + h * a.z_h + p * a.z_p), a.z_p, count, F(0));
    store(r.gate, z * sigmoidv(z));
  }
  return r;
}

// One row: the state moves on; returns C h. WHOLE: N is a multiple of the vector and everything is contiguous.
template <class T, class S, class F, bool WHOLE>
F advance(const StateUpdateArgs& a, S* state, const F* A, const T* B, const T* C, F d, F dx) {
  Vec<F> sum{};
  for (int64_t n = 0; n < a.states; n += kLanes<F>) {
    const int count = WHOLE || a.states - n > kLanes<F> ? kLanes<F> : int(a.states - n);
    const int64_t state_n = WHOLE ? 1 : a.state_n, A_n = WHOLE ? 1 : a.A_n;
    const int64_t B_n = WHOLE ? 1 : a.B_n, C_n = WHOLE ? 1 : a.C_n;
    const Vec<F> decay = expv(d * gather<F, F>(A + n * A_n, A_n, count, F(0)));
    Vec<F> hidden = gather<S, F>(state + n * state_n, state_n, count, F(0));
    hidden = decay * hidden + dx * gather<T, F>(B + n * B_n, B_n, count, F(0));
    scatter<S, F>(state + n * state_n, state_n, count, hidden);
    Vec<F> term = hidden * gather<T, F>(C + n * C_n, C_n, count, F(0));
    // A padded lane's state is 0, or NaN when d or x is: it must not reach the sum of a row that ends before it.
    if (!WHOLE)
      for (int i = count; i < kLanes<F>; ++i) term[i] = 0;
    sum += term;
  }
  return total<F>(sum);
}

template <class T, class S, class F, bool WHOLE>
void rows(const StateUpdateArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int64_t p = row % a.dim, h = row / a.dim % a.heads, b = row / (a.dim * a.heads), g = h / a.heads_per_group;
    int64_t count = a.dim - p < end - row ? a.dim - p : end - row;
    count = count < kLanes<F> ? count : kLanes<F>;
    T* out = static_cast<T*>(a.out) + row;
    row += count;
    const int64_t slot = slot_of(a, b);
    if (slot < 0) {
      for (int i = 0; i < count; ++i) from_float(out[i], F(0));
      continue;
    }
    const RowScalars<F> r = row_scalars<T, F>(a, b, h, p, int(count));
    const T* B = at<T>(a.B, b * a.B_b + g * a.B_g);
    const T* C = at<T>(a.C, b * a.C_b + g * a.C_g);
    for (int i = 0; i < count; ++i) {
      S* state = static_cast<S*>(a.state) + slot * a.state_s + h * a.state_h + (p + i) * a.state_p;
      const F* A = at<F>(a.A, h * a.A_h + (p + i) * a.A_p);
      F y = advance<T, S, F, WHOLE>(a, state, A, B, C, r.step[i], r.step[i] * r.input[i]);
      if (a.D) y += *at<F>(a.D, h * a.D_h + (p + i) * a.D_p) * r.input[i];
      if (a.z) y *= r.gate[i];
      from_float(out[i], y);
    }
  }
}

template <class T, class S>
void run(const StateUpdateArgs& a) {
  using F = Compute<T>;
  const bool whole = a.states % kLanes<F> == 0 && a.state_n == 1 && a.A_n == 1 && a.B_n == 1 && a.C_n == 1;
  scalekern::parallel(a.batch * a.heads * a.dim, [&](int64_t begin, int64_t end) {
    whole ? rows<T, S, F, true>(a, begin, end) : rows<T, S, F, false>(a, begin, end);
  });
}

template <class T>
void with_state(const StateUpdateArgs& a) {
  switch (a.state_dtype) {  // the order of enum Dtype
    case 0: return run<T, float>(a);
    case 1: return run<T, double>(a);
    case 2: return run<T, f16>(a);
    case 3: return run<T, bf16>(a);
  }
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void selective_state_update(const StateUpdateArgs& a) {
  switch (a.io_dtype) {
    case 0: return with_state<float>(a);
    case 1: return with_state<double>(a);
    case 2: return with_state<f16>(a);
    case 3: return with_state<bf16>(a);
  }
}

}  // namespace scalekern::SCALEKERN_ISA
