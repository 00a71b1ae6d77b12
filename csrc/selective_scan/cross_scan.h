// What the kernels of cross_scan and cross_merge take: an image and its pixels as lines in K directions.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// Shape letters: B batch, K directions, P channels of a direction, H x W image, L = H W. Strides in elements.
struct CrossArgs {
  const void* in;
  void* out;  // contiguous: lines (B, K, P, L) of a scan, the image (B, D, H, W) of a merge
  int dtype;  // enum Dtype of common/tensor.h
  int64_t batch, directions, channels, rows, columns;  // channels: P
  int64_t s[4];       // of `in`: b d h w of an image, b k p l of lines
  int64_t code;       // two bits a direction: 1 column by column, 2 from the last pixel to the first
  bool grouped;       // D = K P, else D = P

  int64_t image_channels() const { return grouped ? directions * channels : channels; }
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, cross_scan, (const scalekern::CrossArgs&))
SCALEKERN_DECLARE(void, cross_merge, (const scalekern::CrossArgs&))
