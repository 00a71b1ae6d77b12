// Arguments of the long convolution by right-angle FFTs, shared by the op and its per-ISA kernel.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// One transform of n complex numbers: real polynomials modulo x^n - i, evaluated at the roots of that.
//
// n = radix[0] radix[1] .. W^2, W the lanes of a vector. Block number `b` of a level is a polynomial modulo
// x^size - e^(2 pi i f), f = f_b; `twiddles[level]` holds e^(2 pi i f m / radix), m = 1 .. radix - 1, block by block;
// the leaves' hold z^(W m), z = e^(2 pi i f / W^2), m = 1 .. W - 1, in (re, im) pairs, and then e^(2 pi i (f + j) m / W^2)
// as vectors over j, real parts and imaginary parts.
struct FftPlan {
  static constexpr int kMost = 24;
  int64_t size;   // n
  int64_t pitch;  // between the blocks of the first level, in complex numbers: more than their size, so that lines of
                  // all of them do not fall into one set of a cache
  int levels, radix[kMost];
  const float* twiddles[kMost + 1];

  int64_t child() const { return size / radix[0]; }
  int64_t floats() const { return 2 * pitch * radix[0]; }  // of a spectrum in memory
};

// (B, D, *) or (D, *), with strides in elements.
struct Rows {
  void* data;
  int64_t stride_b, stride_d, stride_l;
};

enum class Io : int { f32, f16, bf16 };

// Shape letters: B batch, D channels, L length, M count of outputs, K taps of k, R taps of k_reverse.
struct FftConvArgs {
  int64_t batch, channels, length, count, taps, reverse_taps;
  int64_t offset;     // k[s] meets the token s - offset back
  int per_sample;     // a filter for every sample, so that k or k_reverse differ along B
  Io io;              // of u, out, gates and their gradients; all else is float
  const FftPlan* plan;
  Rows u, pregate, postgate, mask;  // absent: data is null; mask is bytes
  Rows k, k_reverse, skip, bias;
  Rows spectrum;                    // of the filters, made before; written by fft_conv_spectrum
  Rows out, bad;                    // forward; bad: bytes (B, D), whether a row of y is not finite
  Rows dout, du, dpregate, dpostgate, dk, dk_reverse, dskip, dbias;  // backward
};

}  // namespace scalekern

SCALEKERN_DECLARE(int, fft_lanes, ())
SCALEKERN_DECLARE(void, fft_conv_spectrum, (const scalekern::FftConvArgs&))
SCALEKERN_DECLARE(void, fft_conv_fwd, (const scalekern::FftConvArgs&))
SCALEKERN_DECLARE(void, fft_conv_bwd, (const scalekern::FftConvArgs&))
