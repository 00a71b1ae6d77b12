// The right-angle spectra of filters for the fused transform (cuda_fft_conv.cuh), in float32 to its float16.
//
// Shape letters: D channels, K taps, N points, P parts; t = 256 n1 + c, c = 16 n2 + n3, k = k1 + N1 (k2 + 16 k3).
//
// h[j] is what the sample at t adds to the output at t + j: taps of both filters and skip. From a part to the p-th
// after it counts z[t] = h[p N + t] + i h[(p - 1) N + t], 0 <= t < N, whose transform is z[t] exp(-2 pi i t (k + 1/4) /
// N).
//
// What bounds it: nothing that matters beside the convolution of a few dozen rows. D768 N8,192: 25 MB read, 25 MB
// written, 0.4 GFLOP, 19 M sines and cosines, some 100 MB through shared memory twice: 30 us by count, never measured.
// As some 15 of torch's own operations it was 16 passes over 50 MB, and at N = 1,024 their launches took longer than
// the convolution.
//
// Split: a block has a part's spectrum of a channel. A thread transforms the n1 of a column c, then the n2 of (k1, n3),
// then the n3 of (k1, k2), each in registers, and writes its 16 numbers where side II of the fused transform reads
// them. Spectra are scaled by a bound of each, the sum of |h|. (In parts a lag counts in two spectra: sums of
// products come to 2 kFull, times 2 / pi, since the row is real: below float16's 65,504.)
#pragma once
#include "fft_conv/cuda_fft_numbers.cuh"

namespace scalekern::fft {

struct FilterArgs {
  const float *k, *k_reverse, *skip;  // (D, K), (D, K'), (D,); the last two may be absent
  uint16_t* spectrum;                 // (D, P, N of all rows that are transformed together, 2)
  float* scale;                       // (D,): what results of the fused transform are multiplied by
  int64_t k_d, k_reverse_d;
  int taps, reverse_taps, offset, period, parts;  // offset: the tap of lag 0; period: 0, or that of a circular filter
  int behind, ahead;                              // lags below -behind or above ahead meet no sample
};

constexpr float kFull = 32768;  // the largest product of a spectrum and a row: float16's range is filled from the top

struct Complex {
  float re, im;
};
SK_DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
SK_DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
SK_DEVICE Complex operator*(Complex a, Complex b) {
  return {fused(a.re, b.re, -(a.im * b.im)), fused(a.re, b.im, a.im * b.re)};
}

// exp(-2 pi i numerator / denominator), 0 <= numerator < denominator, a power of two.
SK_DEVICE Complex unit(int numerator, int denominator) {
  const float half_turns = -2 * float(numerator) / float(denominator);
  Complex z;
#if defined(__CUDA_ARCH__)
  sincospif(half_turns, &z.im, &z.re);
#else
  z = {float(std::cos(double(half_turns) * M_PI)), float(std::sin(double(half_turns) * M_PI))};
#endif
  return z;
}

// cos(2 pi n / 32), known when compiled.
constexpr SK_FN float cosine(int n) {
  constexpr float kQuarter[9] = {1,           .980785280f, .923879533f, .831469612f, .707106781f,
                                 .555570233f, .382683432f, .195090322f, 0};
  n = n % 32 > 16 ? 32 - n % 32 : n % 32;
  return n > 8 ? -kQuarter[16 - n] : kQuarter[n];
}

// The transform of R numbers in place: R = 4 R', fours whose results are turned, then R'.
template <int R>
SK_DEVICE void transform(Complex (&x)[R]) {
  if constexpr (R == 2) {
    const Complex a = x[0];
    x[0] = a + x[1], x[1] = a - x[1];
  } else if constexpr (R > 2) {
    constexpr int kRest = R / 4;
    Complex turned[4][kRest > 1 ? kRest : 1];
#pragma unroll
    for (int b = 0; b < kRest; ++b) {
      const Complex p = x[b] + x[b + 2 * kRest], m = x[b] - x[b + 2 * kRest];
      const Complex q = x[b + kRest] + x[b + 3 * kRest], n = x[b + kRest] - x[b + 3 * kRest];
      const Complex four[4] = {p + q, {m.re + n.im, m.im - n.re}, p - q, {m.re - n.im, m.im + n.re}};
#pragma unroll
      for (int a = 0; a < 4; ++a)
        turned[a][b] = a == 0 || b == 0 ? four[a]
                                        : four[a] * Complex{cosine(a * b * (32 / R)), -cosine(a * b * (32 / R) + 24)};
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      if constexpr (kRest > 1) transform<kRest>(turned[a]);
#pragma unroll
      for (int b = 0; b < kRest; ++b) x[a + 4 * b] = turned[a][b];
    }
  }
}

template <int kN1>
struct Filters {
  using Args = FilterArgs;
  static constexpr int kThreads = 256, kBlocks = 2, kN = 256 * kN1, kTogether = kN1 < 16 ? 16 / kN1 : 1;
  static constexpr int kSums = (kN + kN / 16) * 8, kShared = kSums + kThreads / 32 * 4;

  const Args& a;
  const int part = int(block_index() % a.parts);
  const int64_t d = block_index() / a.parts;
  unsigned char* const shared = shared_memory();

  // Padded, so that 16 threads that read every 16th number find them in different banks.
  SK_DEVICE Complex& at(int k1, int c) const {
    const int i = k1 * 256 + c;
    return reinterpret_cast<Complex*>(shared)[i + i / 16];
  }

  SK_DEVICE float filter(int lag) const {
    if (lag < -a.behind || lag > a.ahead) return 0;
    float h = lag == 0 && a.skip ? a.skip[d] : 0.f;
    const float *k = a.k + d * a.k_d, *k_reverse = a.k_reverse + (a.k_reverse ? d * a.k_reverse_d : 0);
    if (a.period) {
      const int ahead = lag < 0 ? lag + a.period : lag, behind = ahead ? a.period - ahead : 0;
      for (int s = ahead; s < a.taps; s += a.period) h += k[s];
      for (int s = behind; s < a.reverse_taps; s += a.period) h += k_reverse[s];
      return h;
    }
    if (lag + a.offset >= 0 && lag + a.offset < a.taps) h += k[lag + a.offset];
    return lag <= 0 && -lag < a.reverse_taps ? h + k_reverse[-lag] : h;
  }

  // The sum of |h| from lag -N on. A barrier.
  SK_DEVICE float sum_of_all() const {
    float sum = 0;
#pragma unroll 1
    for (int lag = thread_index() - kN; lag < a.parts * kN; lag += kThreads) sum += fabsf(filter(lag));
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    float* sums = reinterpret_cast<float*>(shared + kSums);
    if (thread_index() % 32 == 0) sums[thread_index() / 32] = sum;
    sync_threads();
    sum = 0;
    for (int i = 0; i < kThreads / 32; ++i) sum += sums[i];
    return sum;
  }

  SK_DEVICE void columns() const {
    const int c = thread_index();
    Complex x[kN1];
#pragma unroll
    for (int n1 = 0; n1 < kN1; ++n1) {
      const int t = 256 * n1 + c;
      x[n1] = Complex{filter(part * kN + t), filter(part * kN + t - kN)} * unit(t, 4 * kN);
    }
    transform(x);
#pragma unroll
    for (int k1 = 0; k1 < kN1; ++k1) at(k1, c) = x[k1] * unit(c * k1, kN);
  }

  // The transform of 16 numbers of a k1, kStep apart, from each of 16 places: then(k1, place, numbers).
  template <int kStep, class Then>
  SK_DEVICE void sixteens(Then then) const {
#pragma unroll 1
    for (int i = thread_index(); i < kN1 * 16; i += kThreads) {
      const int k1 = i / 16, place = i % 16;
      Complex x[16];
#pragma unroll
      for (int n = 0; n < 16; ++n) x[n] = at(k1, place * (16 / kStep) + n * kStep);
      transform(x);
      then(k1, place, x);
    }
  }

  // n2 of (k1, n3), in place.
  SK_DEVICE void middle() const {
    sixteens<16>([&](int k1, int n3, const Complex(&x)[16]) {
#pragma unroll
      for (int k2 = 0; k2 < 16; ++k2) at(k1, 16 * k2 + n3) = x[k2] * unit(n3 * k2, 256);
    });
  }

  // n3 of (k1, k2).
  SK_DEVICE void last(float by) const {
    uint16_t* spectrum = a.spectrum + (d * a.parts + part) * (int64_t(kN) * kTogether * 2);
    sixteens<1>([&](int k1, int k2, const Complex(&x)[16]) {
#pragma unroll
      for (int together = 0; together < kTogether; ++together) {
        const int row = k1 + together * kN1;  // rho and its lanes: see cuda_fft_conv.cuh
        const int rho = 32 * (8 * (row / 16) + 4 * (row / 8 % 2) + 2 * (k2 / 8) + k2 % 2) + 4 * (row % 8) + k2 % 8 / 2;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          Group<uint32_t, 4> four;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const Complex even = x[8 * j + 2 * q], odd = x[8 * j + 2 * q + 1];
            four.words[2 * j] = narrow_pair<f16>(even.re * by, odd.re * by);
            four.words[2 * j + 1] = narrow_pair<f16>(even.im * by, odd.im * by);
          }
          four.store(reinterpret_cast<uint32_t*>(spectrum) + (rho * 4 + q) * 4);
        }
      }
    });
  }

  static SK_DEVICE void run(const Args& args) {
    const Filters f{args};
    float bound = f.sum_of_all();
    bound = bound < 1e-30f ? 1.f : bound;
    if (f.part == 0 && thread_index() == 0) args.scale[f.d] = bound * (256 / kFull);
    f.columns();
    sync_threads();
    f.middle();
    sync_threads();
    f.last(kFull / kN / bound);
  }
};

}  // namespace scalekern::fft
