// Arguments of one decoding step of the selective scan, shared by the op and its per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// Shape letters: S slots, B batch, H heads, P head dim, N state size, G groups. Strides in elements.
struct StateUpdateArgs {
  int64_t batch, heads, dim, states, heads_per_group;
  int io_dtype, state_dtype;   // enum Dtype (of int8 codes `other`); parameters are float, or double when io is
  int indices_are_int64;
  bool softplus;
  bool awake;                  // the other threads have just worked: waking them costs little
  void* state;
  void* out;                   // (B, H, P) contiguous
  const void *x, *dt, *A, *B, *C, *D, *z, *dt_bias, *indices;
  int64_t state_s, state_h, state_p, state_n;
  int64_t x_b, x_h, x_p, dt_b, dt_h, dt_p, z_b, z_h, z_p;
  int64_t A_h, A_p, A_n, B_b, B_g, B_n, C_b, C_g, C_n, D_h, D_p, bias_h, bias_p, indices_b;
  const void* state_scale;     // of an int8 state: its steps (H, P), of the parameters' type
  int64_t scale_h, scale_p;
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, selective_state_update, (const scalekern::StateUpdateArgs&))
