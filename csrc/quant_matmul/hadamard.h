// What the kernels of the Hadamard transform take. x (rows, n) of any strides is multiplied, row by row, by H_m (x)
// H_2^k, m 2^k >= n, zeros standing for the points that x lacks; the n first points are kept.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

struct HadamardArgs {
  static constexpr int kAxes = 8;  // leading axes of x after those that follow each other were joined
  const void* x;
  void* out;     // (rows, n) contiguous, of x's dtype; null: quantize
  int dtype;     // enum Dtype of common/tensor.h
  int64_t rows, n, m, k;
  int axes;
  int64_t size[kAxes], stride[kAxes], stride_n;
  const int64_t* signs;  // (m): bit l of word i is set where H_m[i, l] is -1; H_40 is H_2 (x) its first 20 rows and columns
  double scale;
  int8_t* q;      // (rows, n)
  float* scales;  // (rows, n / group)
  int64_t group;
  int most;  // the largest integer of q
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, hadamard, (const scalekern::HadamardArgs&))
