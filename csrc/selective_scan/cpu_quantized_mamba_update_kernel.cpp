// The parts of a decoding step of low-bit weights that no other kernel has: the projection of the step size, which
// keeps its few columns in floating point, and A.
//
// Bound: D R weights are read once, and R is a sixteenth of the model's width: 2 MB of fp32 at D 4096, R 128.
// Split: rows of the weight over threads, in blocks of as many as a vector has lanes, whose sums are taken together, so
//   an output's additions have one order.
// Layout: lanes along a weight's row; a short row of R 8 is one vector.
#include "selective_scan/cpu_tile.h"
#include "selective_scan/quantized_mamba_update.h"

namespace {

using scalekern::StepProjectionArgs;

// A multiplication costs about 0.1 ns, an exponential 0.5 ns, waking the other threads 5 to 20 us.
constexpr int64_t kParallelProducts = 1 << 17, kParallelDecays = 1 << 15;

template <class T>
static inline VecF products(const T* w, const T* x, int64_t count) {
  constexpr int V = kLanes<float>;
  VecF acc[2] = {};
  int64_t i = 0;
  for (; i + 2 * V <= count; i += 2 * V)
    for (int u = 0; u < 2; ++u) acc[u] += load_as<float>(w + i + u * V) * load_as<float>(x + i + u * V);
  for (; i + V <= count; i += V) acc[0] += load_as<float>(w + i) * load_as<float>(x + i);
  if (i < count) {
    alignas(64) float a[V] = {}, b[V] = {};
    for (int64_t j = i; j < count; ++j) a[j - i] = to_float(w[j]), b[j - i] = to_float(x[j]);
    acc[1] += load(a) * load(b);
  }
  return acc[0] + acc[1];
}

template <class T>
void project(const StepProjectionArgs& a) {
  constexpr int V = kLanes<float>;
  const bool worth_it = a.rows * a.inputs * a.outputs >= kParallelProducts;
  parallel_if(worth_it, (a.outputs + V - 1) / V, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * V; first < end * V && first < a.outputs; first += V) {
      const int64_t count = a.outputs - first < V ? a.outputs - first : V;
      for (int64_t b = 0; b < a.rows; ++b) {
        VecF sums[V] = {};
        for (int64_t o = 0; o < count; ++o)
          sums[o] = products(at<T>(a.weight, (first + o) * a.weight_o), at<T>(a.x, b * a.x_b), a.inputs);
        alignas(64) float y[V];
        store(y, sum_lanes<float>(sums));
        narrow(at<T>(a.out, b * a.out_b + first), 1, y, count);
      }
    }
  });
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void step_projection(const StepProjectionArgs& a) {
  switch (a.dtype) {  // the order of enum Dtype; doubles are not decoded here
    case 0: return project<float>(a);
    case 2: return project<f16>(a);
    case 3: return project<bf16>(a);
  }
}

void decay_rates(const float* A_log, float* A, int64_t count) {
  constexpr int64_t V = kLanes<float>;
  parallel_if(count >= kParallelDecays, count / V, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * V; i < end * V; i += V) store(A + i, -expv(load(A_log + i)));
  });
  if (const int64_t i = count / V * V; i < count) {
    alignas(64) float rest[V] = {};
    __builtin_memcpy(rest, A_log + i, sizeof(float) * size_t(count - i));
    store(rest, -expv(load(rest)));
    __builtin_memcpy(A + i, rest, sizeof(float) * size_t(count - i));
  }
}

}  // namespace scalekern::SCALEKERN_ISA
