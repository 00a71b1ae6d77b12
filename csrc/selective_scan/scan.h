// Arguments of the selective scan, forward and backward, shared by the op and its per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// A tensor as the kernels see it. Strides in elements; of complex tensors in complex elements.
struct ScanTensor {
  char* data;  // nullptr: absent
  int64_t s[4];
  // Of int8 codes (u, B and C of the quantized forward): the steps, of the state's type, one a channel or group.
  const char* scale;
  int64_t scale_s;
  // Of a tensor over time: the times of a line, which lie one stride apart, and the stride from line to line. An image
  // whose lines do not follow each other at that stride has as many as its inner axis is long, all others one of L.
  int64_t line, line_s;
};

// Shape letters: B batch, D channels, L length, N state size, G groups, S sequences.
//
// Time runs in scan order. For a reverse scan the op has negated the time stride of every tensor and pointed it at
// the last token, and done the same to the checkpoints' slots and the sequences' state rows: a kernel knows no
// direction but `pad`. Chunk i holds the times [i chunk - pad, (i + 1) chunk - pad) that exist; slot i is its state.
struct ScanArgs {
  int64_t batch, channels, length, states, sequences, chunk, slots, pad;
  int64_t groups_B, groups_C;  // 0: constant in time, (D, N)
  const int64_t* starts;       // S + 1 times where sequences start; {0, L} when not packed
  int io;                      // enum Dtype of u, delta, z, out, and of B and C for a real A
  bool complex_A, softplus;
  ScanTensor u, delta, z, out;             // b d t
  ScanTensor A;                            // d n
  ScanTensor B, C;                         // d n, or b g n t
  ScanTensor D, bias;                      // d
  ScanTensor initial, last;                // row d n; row = b + s, one of them is 0
  ScanTensor checkpoints;                  // b slot d n
  ScanTensor dout, du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial, dlast;
  char* workspace;                         // of the size that selective_scan_*_workspace returns
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, selective_scan_fwd, (const scalekern::ScanArgs&))
SCALEKERN_DECLARE(void, selective_scan_bwd, (const scalekern::ScanArgs&))
SCALEKERN_DECLARE(int64_t, selective_scan_fwd_workspace, (const scalekern::ScanArgs&))
SCALEKERN_DECLARE(int64_t, selective_scan_bwd_workspace, (const scalekern::ScanArgs&))
