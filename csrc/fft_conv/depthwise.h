// Arguments of the direct depthwise convolution, shared by the op and its per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// B images of C channels, rows x columns; strides in elements.
struct Images {
  void* data;
  int64_t rows, columns;
  int64_t s_b, s_c, s_h, s_w;
};

// Shape letters: I x J taps, d dilation. Either of the two kinds:
//
//   conv   small[p, q] = bias + sum_ij w[i, j] large[p + i d - top, q + j d - left]     large is 0 outside
//   dw     w[i, j] = sum_bpq small[p, q] large[p + i d - top, q + j d - left]
struct DepthwiseArgs {
  int64_t batch, channels;
  int dtype;               // of both images, enum Dtype of common/tensor.h: f32, f64, f16, bf16
  Images large, small;     // the output of conv is contiguous
  void* w;                 // (C, I, J) contiguous, float or double
  const void* bias;        // (C,) or null, likewise
  int64_t taps[2], start[2], dilation[2];  // rows, columns
  bool flipped;            // conv with w[I - 1 - i, J - 1 - j]
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, depthwise_conv, (const scalekern::DepthwiseArgs&))
SCALEKERN_DECLARE(void, depthwise_dw, (const scalekern::DepthwiseArgs&))
