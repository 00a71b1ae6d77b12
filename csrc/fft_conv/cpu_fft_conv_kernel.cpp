// The long convolution on a CPU: right-angle FFTs of one row at a time, forward and backward.
//
//   v = u pregate mask,  y = k * v + skip v + bias,  out = y postgate            (fft_conv.h has the shape letters)
//
// A real row of at most 2 n elements is v = low + x^n high. Modulo x^n - i that is low + i high: n complex numbers whose
// product of spectra is the convolution with a period of 2 n and the sign turned at each wrap, low and high half again
// as real and imaginary part. So rows of L <= n need no padding, no even and odd halves and no untangling of spectra: the
// first pass reads real numbers, and the last one writes as many. The transposed convolution takes conjugate spectra.
//
// Bound: arithmetic, (4 + 3 / radix ..) n log2 n operations a transform; forward 2 a row and 1 a filter, backward 3 and 2.
// Memory: spectra of one row and its filter, 16 n bytes a thread (forward), 32 n (backward), and lines of 2 n floats.
// Split: channels over threads; fewer channels than threads share the blocks of each transform instead. No sum depends
//   on the number of threads.
#include "fft_conv/cpu_fft_conv_job.h"

namespace scalekern::SCALEKERN_ISA {

int fft_lanes() { return kW; }

void fft_conv_spectrum(const FftConvArgs& a) {
  over_channels(a, [&](bool inner, int64_t begin, int64_t end) {
    Job job(a, inner);
    const int64_t part = job.plan.child(), pitch = job.plan.pitch;
    for (int64_t d = begin; d < end; ++d)
      for (int64_t b = 0; b < a.batch; ++b) {
        float* to = at<float>(a.spectrum, b, d);
        job.transform_filter(b, d, to);
        for (int j = 0; j < job.plan.radix[0]; ++j) clear(to + 2 * (pitch * j + part), 2 * (pitch - part));
      }
  });
}

void fft_conv_fwd(const FftConvArgs& a) {
  over_channels(a, [&](bool inner, int64_t begin, int64_t end) {
    Job job(a, inner);
    for (int64_t d = begin; d < end; ++d)
      for (int64_t b = 0; b < a.batch; ++b) {
        if (b == 0 || a.per_sample) job.filter(b, d);
        job.forward_row(b, d);
      }
  });
}

}  // namespace scalekern::SCALEKERN_ISA
