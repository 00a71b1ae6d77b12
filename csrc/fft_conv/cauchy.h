// Arguments of the Cauchy sums of S4's convolution kernel, shared by the ops and their per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// Shape letters: H heads, N states, V products of a state, J frequencies. All complex128 or float64, contiguous.
struct CauchyArgs {
  int64_t heads, states, products, count;
  bool pairs;                  // every state has a conjugate beside it, with conjugate products
  const double *z, *products_of;  // (H, N), dt Lambda; (H, N, V)
  const double *cosine, *sine;    // (J,) of half the angle of a root of unity
  double* sums;                // (H, V, J)
  const double* dsums;         // (H, V, J), backward
  double *dproducts, *square;  // (H, N, V)
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, cauchy_sums, (const scalekern::CauchyArgs&))
SCALEKERN_DECLARE(void, cauchy_sums_bwd, (const scalekern::CauchyArgs&))
