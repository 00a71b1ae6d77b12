// What a decoding step of a Mamba mixer of low-bit weights has beside the kernels of its parts.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// out[b, o] = sum_i x[b, i] weight[o, i], all of one dtype (enum Dtype); rows of weight `weight_o` apart.
struct StepProjectionArgs {
  int64_t rows, inputs, outputs;
  int dtype;
  const void *x, *weight;
  void* out;
  int64_t x_b, weight_o, out_b;
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, step_projection, (const scalekern::StepProjectionArgs&))
// A = -exp(A_log), `count` floats each.
SCALEKERN_DECLARE(void, decay_rates, (const float* A_log, float* A, int64_t count))
