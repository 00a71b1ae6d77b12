// Arguments of the products with powers of eigenvalues, shared by the ops and their per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// Shape letters: M rows of a head, H heads, N states, L length. Everything is contiguous.
struct PowersArgs {
  int64_t rows, heads, states, length;
  int wide;           // out or g is double, not float
  int complex;        // a, w, m0, m1 are complex128, not float64
  const double* a;    // (H, N)
  const double* w;    // (M, H, N), of powers_sum
  void* out;          // (M, H, L), likewise
  const void* g;      // (M, H, L), of moments
  double *m0, *m1;    // (M, H, N), likewise; m1 may be null
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, powers_sum, (const scalekern::PowersArgs&))
SCALEKERN_DECLARE(void, moments, (const scalekern::PowersArgs&))
