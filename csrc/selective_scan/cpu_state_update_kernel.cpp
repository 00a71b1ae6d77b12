// One decoding step of the selective scan, one pass over the state.
//
// Bound: the state is read and written once, 8 N bytes a channel in fp32 (4 N in half precision), and one
//   exponential an element; at D = 1536, N = 16 that is about 10 us on one core, less than the call around it.
// Layout: lanes along N, whose state and A are contiguous in a row; B and C stay in registers for a block of channels.
//   What there is once a channel (softplus, gate, skip) has its lanes along the channels of the block instead, and the
//   sums over N of a block's channels are taken together, as a transpose.
// Split: blocks of channels over threads, where that pays.
// Tried and lost: one channel at a time, softplus and gate as splats: three exponentials a channel instead of 1.1.
#include "selective_scan/cpu_tile.h"
#include "selective_scan/state_update.h"

namespace {

using scalekern::StateUpdateArgs;

// An element of the state costs about 0.4 ns, waking the other threads 5 to 20 us.
constexpr int64_t kParallelElements = 65536, kParallelAwake = 8192;

int64_t slot_of(const StateUpdateArgs& a, int64_t b) {
  if (a.indices == nullptr) return b;
  return a.indices_are_int64 ? *at<int64_t>(a.indices, b * a.indices_b) : *at<int32_t>(a.indices, b * a.indices_b);
}

// `count` elements of a strided row as a vector; lanes past them are 0.
template <class F, class S>
static inline Vec<F> gather(const S* p, int64_t stride, int64_t count) {
  if (count == kLanes<F> && stride == 1) return load_as<F>(p);
  alignas(64) F lanes[kLanes<F>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i * stride]);
  return load(lanes);
}

template <class F, class S>
static inline void scatter(S* p, int64_t stride, int64_t count, Vec<F> v) {
  if (count == kLanes<F> && stride == 1) return store_as<F>(p, v);
  alignas(64) F lanes[kLanes<F>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) from_float(p[i * stride], lanes[i]);
}

typedef int8_t Bytes __attribute__((vector_size(SCALEKERN_VEC_BYTES / 4)));  // as many as floats in a vector

// v / step as codes, rounded half to even; 0 for NaN and where the step is 0 (passed as Inf).
template <class F>
static inline void scatter_codes(int8_t* p, int64_t stride, int64_t count, Vec<F> v, F step) {
  const Vec<F> most = splat(F(127));
  Vec<F> code = v / splat(step);
  code = code > most ? most : code;
  code = code < -most ? -most : code;
  code = (code + kRoundMagic<F>) - kRoundMagic<F>;
  code = code == code ? code : Vec<F>{};
  if constexpr (sizeof(F) == 4)
    if (count == kLanes<F> && stride == 1) {
      const Bytes bytes = __builtin_convertvector(__builtin_convertvector(code, VecInt<F>), Bytes);
      __builtin_memcpy(p, &bytes, sizeof bytes);
      return;
    }
  alignas(64) F lanes[kLanes<F>];
  store(lanes, code);
  for (int64_t i = 0; i < count; ++i) p[i * stride] = int8_t(lanes[i]);
}

// A padded lane's state is NaN when d or x is not finite: it must not reach the sum of a row that ends before it.
template <class F>
static inline Vec<F> first_lanes(Vec<F> v, int64_t count) {
  for (int64_t i = count; i < kLanes<F>; ++i) v[i] = 0;
  return v;
}

// One vector of states, from n on, of `channels` channels: moves them on and adds C h to each channel's `sums`.
template <bool whole, class T, class S, class F>
void states(
    const StateUpdateArgs& a, const T* B, const T* C, const F* A, S* state, int64_t left, int64_t channels,
    const F* rate, const F* input, const F* step, Vec<F>* sums) {
  const int64_t count = whole ? kLanes<F> : left;
  const int64_t A_n = whole ? 1 : a.A_n, state_n = whole ? 1 : a.state_n;
  const Vec<F> b = gather<F>(B, a.B_n, count), c = gather<F>(C, a.C_n, count);
  for (int64_t p = 0; p < channels; ++p, A += a.A_p, state += a.state_p) {
    const Vec<F> decay = exp2v(rate[p] * gather<F>(A, A_n, count));
    Vec<F> before = gather<F>(state, state_n, count);
    if constexpr (__is_same(S, int8_t)) before *= step[p];
    const Vec<F> hidden = decay * before + input[p] * b;
    if constexpr (__is_same(S, int8_t))
      scatter_codes<F>(state, state_n, count, hidden, step[p] == 0 ? F(__builtin_inf()) : step[p]);
    else scatter<F>(state, state_n, count, hidden);
    const Vec<F> term = hidden * c;
    sums[p] += whole ? term : first_lanes<F>(term, count);
  }
}

// `channels` channels of one row and head, at most one vector of them.
template <class T, class S, class F = Compute<T>>
void block(const StateUpdateArgs& a, int64_t b, int64_t h, int64_t first, int64_t channels) {
  constexpr int64_t V = kLanes<F>;
  T* out = at<T>(a.out, (b * a.heads + h) * a.dim + first);
  const int64_t slot = slot_of(a, b), g = h / a.heads_per_group;
  if (slot < 0) return scatter<F>(out, 1, channels, Vec<F>{});  // padding
  const auto row = [&](const void* base, int64_t b_, int64_t h_, int64_t p_) {
    return gather<F>(at<T>(base, b * b_ + h * h_ + first * p_), p_, channels);
  };
  const auto parameter = [&](const void* base, int64_t h_, int64_t p_) {
    return gather<F>(at<F>(base, h * h_ + first * p_), p_, channels);
  };
  const Vec<F> x = row(a.x, a.x_b, a.x_h, a.x_p);
  Vec<F> d = row(a.dt, a.dt_b, a.dt_h, a.dt_p);
  if (a.dt_bias) d += parameter(a.dt_bias, a.bias_h, a.bias_p);
  if (a.softplus) d = softplusv(d);
  alignas(64) F rate[V], input[V], step[V];
  if (a.state_scale) store(step, parameter(a.state_scale, a.scale_h, a.scale_p));
  store(rate, d * F(1.44269504088896340736));  // decay = 2^(rate A)
  store(input, d * x);
  const F* A = at<F>(a.A, h * a.A_h + first * a.A_p);
  const T *B = at<T>(a.B, b * a.B_b + g * a.B_g), *C = at<T>(a.C, b * a.C_b + g * a.C_g);
  S* state = at<S>(a.state, slot * a.state_s + h * a.state_h + first * a.state_p);
  Vec<F> sums[V] = {};
  for (int64_t n = 0; n < a.states; n += V) {
    const int64_t left = a.states - n < V ? a.states - n : V;
    const auto loop = left == V && a.A_n == 1 && a.state_n == 1 ? &states<true, T, S, F> : &states<false, T, S, F>;
    loop(
        a, B + n * a.B_n, C + n * a.C_n, A + n * a.A_n, state + n * a.state_n, left, channels, rate, input, step, sums);
  }
  Vec<F> y = sum_lanes<F>(sums);
  if (a.D) y += parameter(a.D, a.D_h, a.D_p) * x;
  if (a.z) {
    y *= siluv(row(a.z, a.z_b, a.z_h, a.z_p));
  }
  scatter<F>(out, 1, channels, y);
}

template <class T, class S>
void run(const StateUpdateArgs& a) {
  constexpr int64_t V = kLanes<Compute<T>>;
  const int64_t blocks = (a.dim + V - 1) / V, rows = a.batch * a.heads;
  parallel_if(rows * a.dim * a.states >= (a.awake ? kParallelAwake : kParallelElements), rows * blocks,
              [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                  const int64_t row = i / blocks, first = i % blocks * V, left = a.dim - first;
                  block<T, S>(a, row / a.heads, row % a.heads, first, left < V ? left : V);
                }
              });
}

template <class T>
void with_state(const StateUpdateArgs& a) {
  switch (a.state_dtype) {  // the order of enum Dtype
    case 0: return run<T, float>(a);
    case 1: return run<T, double>(a);
    case 2: return run<T, f16>(a);
    case 3: return run<T, bf16>(a);
    default: return run<T, int8_t>(a);
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
