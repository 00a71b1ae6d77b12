// Arguments of one decoding step of a whole Mamba mixer, shared by the op and its per-ISA kernels.
#pragma once
#include "selective_scan/conv1d.h"
#include "selective_scan/state_update.h"

namespace scalekern {

// out[b, o] = sum_i x[b, i] weight[o, i] + bias[o] + residual[b, o]; all of one dtype, i and o contiguous.
struct LinearArgs {
  int64_t rows, inputs, outputs;
  int dtype;  // enum Dtype
  const void *x, *weight, *bias, *residual;  // the last two may be absent
  void* out;
  int64_t x_b, weight_o, residual_b, out_b;
};

// The parts of the step in order; each one's output is the next one's input.
struct MambaUpdateArgs {
  const void* norm_weight;  // (M,); nullptr: in_proj reads hidden_states themselves, and nothing is added to the output
  double norm_eps;
  void* normed;             // (B, M) contiguous, what in_proj reads
  const void* hidden;
  int64_t hidden_b;
  LinearArgs in_proj;
  ConvUpdateArgs conv;
  LinearArgs x_proj;
  int64_t rank, states;
  double rms_eps;  // of the three parts of x_proj's output; negative: they are not normalized
  LinearArgs dt_proj;
  const void* A_log;
  void* A;  // -exp(A_log), (D, N) contiguous like it
  StateUpdateArgs scan;
  LinearArgs out_proj;
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, mamba_update, (const scalekern::MambaUpdateArgs&))
// Parts of it that the step of low-bit weights has as well: one product; A = -exp(A_log), `count` floats each.
SCALEKERN_DECLARE(void, linear, (const scalekern::LinearArgs&))
SCALEKERN_DECLARE(void, decay_rates, (const float* A_log, float* A, int64_t count))
