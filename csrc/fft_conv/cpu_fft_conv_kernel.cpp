// The long convolution on a CPU: right-angle FFTs of one row at a time, forward and backward.
//
//   v = u pregate mask,  y = k * v + skip v + bias,  out = y postgate            (fft_conv.h has the shape letters)
//
// A real row of at most 2 n elements is v = low + x^n high. Modulo x^n - i that is low + i high: n complex numbers. A
// product of spectra is the convolution with a period of 2 n and the sign turned at each wrap, its halves again real
// and imaginary part. So rows of L <= n need no padding, no even and odd halves and no untangling of spectra: the first
// pass reads real numbers, and the last one writes as many. The transposed convolution takes conjugate spectra.
//
// Bound: arithmetic. Forward 2 transforms a row and 1 a filter, backward 3 and 2, of about 4 n log2 n operations each.
//   On one core of an AMD EPYC (Zen 3) a transform takes 0.09 to 0.1 ns times n log2 n from n = 1,024 to 262,144; two
//   cores of that take half the time. Predicted from operations and the 64 lines a leaf moves: 0.6 us at n = 1,024 and
//   75 us at 65,536; measured 0.9 and 95, the rest being spills (88 of a leaf's 620 vector instructions).
// Memory: spectra of one row and its filter, 16 n bytes a thread (forward), 32 n (backward), and lines of 2 n floats.
// Split: channels over threads; fewer channels than threads share the blocks of each transform instead. No sum depends
//   on the number of threads. A row meets no other row in a vector: its NaN stays with it.
// Error: 2e-7 to 3e-7 (relative L2) from n = 128 to 1,048,576; twiddles are computed in double.
// What lost, on that core: a leaf's twiddles as products of a scalar and a constant vector, a quarter of the table (5 %
//   slower); leaves and radix-8 passes that load all numbers before the first sum (178 spills, 9 %); radix 4 alone
//   (2 % at 65,536). Not built: rows as lanes, which needs no transposes in a leaf (96 of 620 instructions) but at load
//   and store, eight times the working set, and rows in eights.
#include "fft_conv/cpu_fft_conv_job.h"

namespace scalekern::SCALEKERN_ISA {

int fft_lanes() { return kW; }

void fft_conv_spectrum(const FftConvArgs& a) {
  over_channels(a, [&](bool inner, int64_t begin, int64_t end) {
    Job job(a, inner);
    const int64_t part = child_size(job.plan), pitch = job.plan.pitch;
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
