// One decoding step of the selective scan, one pass over the state.
//
// Bound: the state is read and written once, 8 N bytes a channel in fp32 (4 N in half precision), and one
// exponential an element; at N = 16 both are far below the cost of a call, so what counts is to do no more passes.
// Split: (batch, head, channel) rows over threads; lanes along N, whose state and A are contiguous in a row.
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
    for (int i = 0; i < kLanes<F>; ++i) lanes[i] = to_float(p[i]);
  } else {
    for (int i = 0; i < kLanes<F>; ++i) lanes[i] = i < count ? F(to_float(p[i * stride])) : fill;
  }
  return load(lanes);
}

template <class S, class F>
void scatter(S* p, int64_t stride, int count, Vec<F> v) {
  F lanes[kLanes<F>];
  store(lanes, v);
  if (count == kLanes<F> && stride == 1) {
    for (int i = 0; i < kLanes<F>; ++i) from_float(p[i], lanes[i]);
  } else {
    for (int i = 0; i < count; ++i) from_float(p[i * stride], lanes[i]);
  }
}

template <class T, class S, class F = Compute<T>>
void rows(const StateUpdateArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t p = row % a.dim, h = row / a.dim % a.heads, b = row / (a.dim * a.heads), g = h / a.heads_per_group;
    T& out = static_cast<T*>(a.out)[row];
    const int64_t slot = slot_of(a, b);
    if (slot < 0) {
      from_float(out, F(0));
      continue;
    }
    const F x = to_float(*at<T>(a.x, b * a.x_b + h * a.x_h + p * a.x_p));
    F d = to_float(*at<T>(a.dt, b * a.dt_b + h * a.dt_h + p * a.dt_p));
    if (a.dt_bias) d += *at<F>(a.dt_bias, h * a.bias_h + p * a.bias_p);
    if (a.softplus) d = softplusv(splat(d))[0];
    S* state = static_cast<S*>(a.state) + slot * a.state_s + h * a.state_h + p * a.state_p;
    const F* A = at<F>(a.A, h * a.A_h + p * a.A_p);
    const T* B = at<T>(a.B, b * a.B_b + g * a.B_g);
    const T* C = at<T>(a.C, b * a.C_b + g * a.C_g);
    Vec<F> sum{};
    for (int64_t n = 0; n < a.states; n += kLanes<F>) {
      const int count = int(a.states - n < kLanes<F> ? a.states - n : kLanes<F>);
      const Vec<F> decay = expv(d * gather<F, F>(A + n * a.A_n, a.A_n, count, F(0)));
      Vec<F> hidden = gather<S, F>(state + n * a.state_n, a.state_n, count, F(0));
      hidden = decay * hidden + (d * x) * gather<T, F>(B + n * a.B_n, a.B_n, count, F(0));
      scatter<S, F>(state + n * a.state_n, a.state_n, count, hidden);
      // A padded lane's state is 0, or NaN when d or x is: it must not reach the sum of a row that ends before it.
      const Vec<F> c = gather<T, F>(C + n * a.C_n, a.C_n, count, F(0));
      Vec<F> term = hidden * c;
      for (int i = count; i < kLanes<F>; ++i) term[i] = 0;
      sum += term;
    }
    F y = 0;
    for (int i = 0; i < kLanes<F>; ++i) y += sum[i];
    if (a.D) y += *at<F>(a.D, h * a.D_h + p * a.D_p) * x;
    if (a.z) {
      const F z = to_float(*at<T>(a.z, b * a.z_b + h * a.z_h + p * a.z_p));
      y *= z * sigmoidv(splat(z))[0];
    }
    from_float(out, y);
  }
}

template <class T, class S>
void run(const StateUpdateArgs& a) {
  scalekern::parallel(a.batch * a.heads * a.dim, [&](int64_t begin, int64_t end) { rows<T, S>(a, begin, end); });
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
