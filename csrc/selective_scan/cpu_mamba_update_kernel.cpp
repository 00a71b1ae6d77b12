// One decoding step of a whole Mamba mixer: four products of a few rows with a matrix, the convolution's and the
// scan's step.
//
// Bound: the weights are read once, 4 (2 M D + D (R + 2 N) + R D + D M) bytes in fp32; 15 MB at M 768, D 1536, which
//   no cache keeps from one token to the next in a model of some layers. Everything else is a few percent of that.
// Split: rows of a weight in blocks of as many as a vector has lanes, whose sums are taken together; threads take some
//   blocks at a time until none is left, so that a core that somebody else uses too does not hold up the other.
// Layout: lanes along a weight's row, four rows of the weight at a time (two where x has three rows or more). Up to
//   kRows rows of x share what is loaded of the weight.
// Measured, fp32, two threads, weights of (3072, 768) and (768, 1536) that the last-level cache holds, Sapphire Rapids:
//   four rows at a time 57 to 60 GB/s, eight the same, one row 45; torch (MKL) 39 to 44 where this kernel as a whole
//   reaches 39. Lost: prefetchnta, one row at a time, 33 to 40 GB/s there (it reads past the L2 and its prefetcher),
//   which an AMD Zen 3 had liked: 27 of 29 GB/s.
#include "selective_scan/cpu_tile.h"
#include "selective_scan/mamba_update.h"

namespace {

using scalekern::LinearArgs;
using scalekern::MambaUpdateArgs;

constexpr int kRows = 4, kStreams = 4;
// A multiplication costs about 0.1 ns, waking the other threads 5 to 20 us.
constexpr int64_t kParallelProducts = 65536, kParallelDecays = 8192;
constexpr int64_t kAheadBytes = 512, kTakenBytes = 1 << 17;

// Up to one vector of elements; lanes past `count` are 0.
template <class F, class T>
static inline Vec<F> load_first(const T* p, int64_t count) {
  alignas(64) F lanes[kLanes<F>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

// sums[r pitch + o] = the products of row o of the weight with row r of x, lane by lane, for O rows of the weight.
template <int R, int O, class T, class F = Compute<T>>
static inline void row_products(const T* w, int64_t w_o, const T* x, int64_t x_b, int64_t count, Vec<F>* sums,
                                int64_t pitch) {
  constexpr int V = kLanes<F>, U = R * O >= 8 ? 1 : 8 / (R * O);  // 8 chains of additions, each 4 cycles a link
  Vec<F> acc[R][O][U];
  for (int i = 0; i < R * O * U; ++i) acc[i / (O * U)][i / U % O][i % U] = Vec<F>{};  // = {} is rep stos, 5 % of a row
  const auto step = [&](const auto& of, int64_t i, int u) {
    Vec<F> in[R];
    for (int r = 0; r < R; ++r) in[r] = of(x + r * x_b + i);
    for (int o = 0; o < O; ++o) {
      const Vec<F> weight = of(w + o * w_o + i);
      for (int r = 0; r < R; ++r) acc[r][o][u] += weight * in[r];
    }
  };
  const auto whole = [](const T* p) { return load_as<F>(p); };
  int64_t i = 0;
  for (; i + U * V <= count; i += U * V) {
    for (int o = 0; o < O; ++o)
      for (int64_t line = 0; line < U * V; line += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(w + o * w_o + i + line + kAheadBytes / int64_t(sizeof(T)));
    for (int u = 0; u < U; ++u) step(whole, i + u * V, u);
  }
  for (; i + V <= count; i += V) step(whole, i, 0);
  if (i < count) step([&](const T* p) { return load_first<F>(p, count - i); }, i, U - 1);
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < O; ++o) {
      for (int u = 1; u < U; ++u) acc[r][o][0] += acc[r][o][u];
      sums[r * pitch + o] = acc[r][o][0];
    }
  }
}

// Outputs [first, first + count), at most a vector of them, of R rows.
template <int R, class T, class F = Compute<T>>
void outputs(const LinearArgs& a, int64_t row, int64_t first, int64_t count) {
  constexpr int V = kLanes<F>, O = R <= 2 ? kStreams : kStreams / 2;
  Vec<F> sums[R][V];
  const T *x = at<T>(a.x, row * a.x_b), *w = at<T>(a.weight, first * a.weight_o);
  int64_t o = 0;
  for (; o + O <= count; o += O) row_products<R, O>(w + o * a.weight_o, a.weight_o, x, a.x_b, a.inputs, &sums[0][o], V);
  for (; o < count; ++o) row_products<R, 1>(w + o * a.weight_o, a.weight_o, x, a.x_b, a.inputs, &sums[0][o], V);
  alignas(64) F y[V];
  for (int r = 0; r < R; ++r) {
    for (o = count; o < V; ++o) sums[r][o] = Vec<F>{};
    store(y, sum_lanes<F>(sums[r]));
    T* out = at<T>(a.out, (row + r) * a.out_b + first);
    const T* residual = a.residual ? at<T>(a.residual, (row + r) * a.residual_b + first) : nullptr;
    for (o = 0; o < count; ++o) {
      if (a.bias) y[o] += to_float(*at<T>(a.bias, first + o));
      from_float(out[o], residual ? y[o] + to_float(residual[o]) : y[o]);
    }
  }
}

template <class T, int R = kRows>
void outputs_of_rows(const LinearArgs& a, int64_t row, int64_t first, int64_t count) {
  if constexpr (R > 1) {
    if (a.rows - row < R) return outputs_of_rows<T, R - 1>(a, row, first, count);
  }
  outputs<R, T>(a, row, first, count);
}

template <class T>
void product(const LinearArgs& a) {
  constexpr int V = kLanes<Compute<T>>;
  const int64_t blocks = (a.outputs + V - 1) / V, threads = scalekern::num_threads();
  const int64_t taken = kTakenBytes / (a.inputs * V * int64_t(sizeof(T))), share = blocks / (4 * threads);
  const int64_t taken_at_once = 1 + (taken < share ? taken : share);
  int64_t next = 0;
  const auto work = [&](int64_t, int64_t) {
    while (true) {
      const int64_t begin = __atomic_fetch_add(&next, taken_at_once, __ATOMIC_RELAXED);
      if (begin >= blocks) return;
      for (int64_t block = begin; block < begin + taken_at_once && block < blocks; ++block) {
        const int64_t first = block * V, count = a.outputs - first < V ? a.outputs - first : V;
        for (int64_t row = 0; row < a.rows; row += kRows) outputs_of_rows<T>(a, row, first, count);
      }
    }
  };
  const bool worth_it = a.rows * a.inputs * a.outputs >= kParallelProducts;
  parallel_if(worth_it, worth_it ? threads : 1, work);
}

// out = x / sqrt(mean(x^2) + eps) weight, `count` numbers; without a weight if that is nullptr, in place if out is x.
template <class T, class F = Compute<T>>
void normalize(const T* x, const T* weight, int64_t count, double eps, T* out) {
  constexpr int64_t V = kLanes<F>;
  Vec<F> sums{};
  int64_t i = 0;
  for (; i + V <= count; i += V) sums += load_as<F>(x + i) * load_as<F>(x + i);
  const Vec<F> last = load_first<F>(x + i, count - i);
  const F total = sum_of<F>(sums + last * last);
  const F scale = 1 / F(__builtin_sqrt(double(total) / double(count) + eps));
  for (i = 0; i < count; ++i) from_float(out[i], F(to_float(x[i])) * scale * (weight ? F(to_float(weight[i])) : F(1)));
}

template <class T>
void normalize_projections(const MambaUpdateArgs& a) {
  for (int64_t b = 0; b < a.x_proj.rows; ++b) {
    T* row = at<T>(a.x_proj.out, b * a.x_proj.out_b);
    const auto part = [&](T* x, int64_t count) { normalize<T>(x, nullptr, count, a.rms_eps, x); };
    part(row, a.rank), part(row + a.rank, a.states), part(row + a.rank + a.states, a.states);
  }
}

template <class F>
void decays(const F* A_log, F* A, int64_t count) {
  constexpr int64_t V = kLanes<F>;
  parallel_if(count >= kParallelDecays, count / V, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * V; i < end * V; i += V) store(A + i, -expv(load(A_log + i)));
  });
  if (const int64_t i = count / V * V; i < count) {
    const Vec<F> rest = -expv(load_first<F>(A_log + i, count - i));
    for (int64_t k = 0; i + k < count; ++k) A[i + k] = rest[k];
  }
}

template <class T>
void update(const MambaUpdateArgs& a) {
  for (int64_t b = 0; a.norm_weight && b < a.in_proj.rows; ++b)
    normalize(at<T>(a.hidden, b * a.hidden_b), at<T>(a.norm_weight, 0), a.in_proj.inputs, a.norm_eps,
              at<T>(a.normed, b * a.in_proj.x_b));
  product<T>(a.in_proj);
  scalekern::SCALEKERN_ISA::conv1d_update(a.conv);
  product<T>(a.x_proj);
  if (a.rms_eps >= 0) normalize_projections<T>(a);
  product<T>(a.dt_proj);
  decays(at<Compute<T>>(a.A_log, 0), at<Compute<T>>(a.A, 0), a.scan.dim * a.scan.states);
  scalekern::SCALEKERN_ISA::selective_state_update(a.scan);
  product<T>(a.out_proj);
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void linear(const LinearArgs& a) {
  switch (a.dtype) {  // the order of enum Dtype
    case 0: return product<float>(a);
    case 1: return product<double>(a);
    case 2: return product<f16>(a);
    case 3: return product<bf16>(a);
  }
}

void decay_rates(const float* A_log, float* A, int64_t count) { decays(A_log, A, count); }

void mamba_update(const MambaUpdateArgs& a) {
  switch (a.in_proj.dtype) {  // the order of enum Dtype
    case 0: return update<float>(a);
    case 1: return update<double>(a);
    case 2: return update<f16>(a);
    case 3: return update<bf16>(a);
  }
}

}  // namespace scalekern::SCALEKERN_ISA
