// The long convolution on a CPU, backward; cpu_fft_conv_kernel.cpp says how.
#include "fft_conv/cpu_fft_conv_job.h"

namespace {

// sum_t x[t] y[t], or of x alone: in float over stretches, which are summed in double.
static double dot(const float* x, const float* y, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += 1024) {
    const int64_t end = min(count, begin + 1024);
    float sum = 0;
    if (y) {
#pragma omp simd reduction(+ : sum)
      for (int64_t t = begin; t < end; ++t) sum += x[t] * y[t];
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t t = begin; t < end; ++t) sum += x[t];
    }
    total += double(sum);
  }
  return total;
}

// dy = dout postgate,  dv = transposed k * dy + skip dy,  du = dv pregate mask,  dpregate = dv u mask,
// dpostgate = dout y,  dk and dk_reverse = lags of the correlation of dy with v, summed as spectra over the rows.
struct BackwardJob : Job {
  Buffer v, sum;          // spectra of a row's v, and the filter's gradient
  Buffer dy_line, other;  // dy, and a row for a while
  double dskip = 0, dbias = 0;

  BackwardJob(const FftConvArgs& args, bool inner)
      : Job(args, inner), v(plan.floats()), sum(plan.floats()), dy_line(whole), other(whole) {}

  const float* gradient(int64_t b, int64_t d) {
    const float* direct = in_place(a.dout, a.count, b, d);
    if (direct && !a.postgate.data) return direct;
    read(a.dout, a.io, b, d, a.count, dy_line.data);
    if (a.postgate.data) {
      read(a.postgate, a.io, b, d, a.count, other.data);
      multiply(dy_line.data, other.data, a.count);
    }
    fill_up(dy_line.data, a.count);
    return dy_line.data;
  }

  void row(int64_t b, int64_t d, bool is_first) {
    const float *v_row = input(b, d), *dy = gradient(b, d);
    enter(v_row, high_of(v_row, a.length), v.data);
    enter(dy, high_of(dy, a.count), x.data);
    children([&](int64_t j) {
      child<true, false>(plan, j, v.data, [&](int64_t at, int64_t block) {
        Leaf z;
        z.forward(plan, block, v.data + at), z.store_to(v.data + at);
      });
      child<true, true>(plan, j, x.data, [&](int64_t at, int64_t block) {
        Leaf z;
        z.forward(plan, block, x.data + at);
#pragma GCC unroll 16
        for (int m = 0; m < kW; ++m) {
          const int64_t here = at + 2 * kW * m;
          const Cx w = load_cx(v.data + here), product = times_conj(z.x[m], w.re, w.im);
          store_cx(sum.data + here, is_first ? product : load_cx(sum.data + here) + product);
        }
        filtered<true>(z, at, block, x.data);
      });
      if (a.postgate.data)
        child<false, true>(plan, j, v.data, [&](int64_t at, int64_t block) {
          Leaf z;
          z.load_from(v.data + at), filtered<false>(z, at, block, v.data);
        });
    });
    if (a.postgate.data) {
      leave(v.data, y.data, high_of(y.data, a.count));
      finish(y.data, v_row, b, d);
      read(a.dout, a.io, b, d, a.count, other.data);
      multiply(y.data, other.data, a.count);
      write(a.dpostgate, a.io, b, d, a.count, y.data);
    }
    const int64_t near = min(a.length, a.count);
    if (a.dskip.data) dskip += dot(dy, v_row, near);
    if (a.dbias.data) dbias += dot(dy, nullptr, a.count);
    float* direct = a.pregate.data || a.mask.data ? nullptr : in_place(a.du, a.length, b, d);
    float* dv = direct ? direct : y.data;
    leave(x.data, dv, high_of(dv, a.length));
    if (a.skip.data) {
      const float skip = scalar(a.skip, d);
      for (int64_t t = 0; t < near; ++t) dv[t] += skip * dy[t];
    }
    hide(a.mask, b, a.length, dv);
    if (a.pregate.data) {
      read(a.u, a.io, b, d, a.length, other.data);
      multiply(other.data, dv, a.length);
      hide(a.mask, b, a.length, other.data);
      write(a.dpregate, a.io, b, d, a.length, other.data);
      multiply(dv, gate.data, a.length);
      hide(a.mask, b, a.length, dv);
    }
    if (!direct) write(a.du, a.io, b, d, a.length, dv);
  }

  // The gradient of the filters of (b, d), which the last row completed; added where it is that of a later sample.
  void filters(int64_t b, int64_t d) {
    children([&](int64_t j) {
      child<false, true>(plan, j, sum.data, [&](int64_t at, int64_t block) {
        Leaf z;
        z.load_from(sum.data + at), z.inverse(plan, block, sum.data + at);
      });
    });
    const auto is_added = [&](const Rows& dk) { return a.per_sample && b > 0 && dk.stride_b == 0; };
    if (is_ring(a.dk) && a.taps == n && !is_added(a.dk)) return leave(sum.data, at<float>(a.dk, b, d), nullptr);
    leave(sum.data, y.data, y.data + n);
    const auto put = [&](const Rows& dk, int64_t count, int sign, int64_t offset) {
      if (!dk.data) return;
      float* to = at<float>(dk, b, d);
      if (!is_added(dk))
        for (int64_t s = 0; s < count; ++s) to[s * dk.stride_l] = 0;
      taps(dk, count, sign, offset, [&](int64_t first, int64_t end) {
        for (int64_t s = first; s < end; ++s) {
          const int64_t lag = sign * (s - offset);
          to[s * dk.stride_l] += lag >= 0 ? y.data[lag] : -y.data[whole + lag];
        }
      });
    };
    put(a.dk, a.taps, 1, a.offset), put(a.dk_reverse, a.reverse_taps, -1, 0);
  }
};

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void fft_conv_bwd(const FftConvArgs& a) {
  over_channels(a, [&](bool inner, int64_t begin, int64_t end) {
    BackwardJob job(a, inner);
    for (int64_t d = begin; d < end; ++d) {
      job.dskip = job.dbias = 0;
      for (int64_t b = 0; b < a.batch; ++b) {
        if (b == 0 || a.per_sample) job.filter(b, d);
        job.row(b, d, b == 0 || a.per_sample);
        if (b == a.batch - 1 || a.per_sample) job.filters(b, d);
      }
      if (a.dskip.data) *at<float>(a.dskip, 0, d) = float(job.dskip);
      if (a.dbias.data) *at<float>(a.dbias, 0, d) = float(job.dbias);
    }
  });
}

}  // namespace scalekern::SCALEKERN_ISA
