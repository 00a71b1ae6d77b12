// Arguments of the diagonal recurrence and of its discretization, shared by the ops and their per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// Shape letters: B batch, H heads, N states, L length. Everything is contiguous; parameters and states are double.
struct DiagSsmScanArgs {
  int64_t batch, heads, states, length;
  int wide;                    // u and out are double, not float
  int complex;                 // a, b, c and the states are complex128, not float64
  const void* u;               // (B, H, L)
  void* out;                   // (B, H, L)
  const double *a, *b, *c;     // (H, N)
  const double* skip;          // (H,) or null
  const double* initial;       // (B, H, N) or null
  double* last;                // (B, H, N) or null
};

struct DiscretizeArgs {
  int64_t heads, states;
  const double *A, *B, *dt;    // (H, N) complex128 twice, (H,)
  double *a, *b;               // (H, N) complex128
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, diag_ssm_scan, (const scalekern::DiagSsmScanArgs&))
SCALEKERN_DECLARE(void, discretize_zoh, (const scalekern::DiscretizeArgs&))
