// Arguments of the diagonal recurrence, forward and backward, shared by the op and its per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

constexpr int kDiagScanAxes = 62;  // torch tensors have no more than 64

// A tensor as the kernels see it: strides in elements (of complex tensors in complex elements) along time, along the
// lanes, and along the axes that are left. Of a state `time` leads from one packed sequence to the next.
struct DiagScanTensor {
  char* data;  // nullptr: absent
  int64_t time, lane, axis[kDiagScanAxes];
};

// Time runs in the order of the recurrence: of h forward, of its gradient backward. Where that is from the last token
// to the first the op has negated the strides and pointed at the end.
struct DiagScanArgs {
  int64_t length, lanes, rows, sequences;  // rows: the product of `size`
  int axes;
  int64_t size[kDiagScanAxes];
  const int64_t* starts;        // S + 1 times where sequences start; {0, L} when not packed
  int io;                       // enum Dtype
  DiagScanTensor a, x, y;       // x: b, or dout; y: h, or db
  DiagScanTensor h, da;         // backward
  DiagScanTensor before, after; // states: what the recurrence starts from and ends with, in the dtype of its sums
  DiagScanTensor initial;       // backward: h before the first token
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, diag_scan_fwd, (const scalekern::DiagScanArgs&))
SCALEKERN_DECLARE(void, diag_scan_bwd, (const scalekern::DiagScanArgs&))
