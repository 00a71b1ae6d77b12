// The diagonal recurrence x = a x + b u, y = Re sum c x, token by token, and its zero-order hold.
//
// Bound: 8 multiply-adds a state and token (3 for a real a), from L1; lanes are states, four tokens a pass, so that a
//   state and its coefficients are loaded once for them. All in double: rounding a to float would be an error that
//   grows with the memory of a state, 1 / |Re z| tokens.
// Split: rows (b, h) over threads.
#include "common/parallel.h"
#include "common/vec.h"
#include "fft_conv/diag_ssm_scan.h"

namespace {

using scalekern::DiagSsmScanArgs;
using scalekern::DiscretizeArgs;

constexpr int kD = kLanes<double>, kTokens = 4;
constexpr int64_t kParallel = 1 << 16;  // states and tokens from which threads pay

static inline double get(const double* p, double) { return *p; }
static inline VecD get(const double* p, VecD) { return load(p); }
static inline void set(double* p, double x) { *p = x; }
static inline void set(double* p, VecD x) { store(p, x); }

// Re and Im of a, b, c and x of one row, each N long.
struct Row {
  double *a, *b, *c, *x;
  int64_t states;
};

// V states from n on, `tokens` tokens; y[k] += their part of the outputs.
template <class V, bool complex, int tokens>
static inline void advance(const Row& row, int64_t n, const double* u, V* y) {
  const int64_t N = row.states;
  const V ar = get(row.a + n, V{}), br = get(row.b + n, V{}), cr = get(row.c + n, V{});
  V xr = get(row.x + n, V{});
  if constexpr (complex) {
    const V ai = get(row.a + N + n, V{}), bi = get(row.b + N + n, V{}), ci = get(row.c + N + n, V{});
    V xi = get(row.x + N + n, V{});
#pragma GCC unroll 4
    for (int k = 0; k < tokens; ++k) {
      const V r = ar * xr - ai * xi + br * u[k];
      xi = ar * xi + ai * xr + bi * u[k];
      xr = r;
      y[k] += cr * xr - ci * xi;
    }
    set(row.x + N + n, xi);
  } else {
#pragma GCC unroll 4
    for (int k = 0; k < tokens; ++k) {
      xr = ar * xr + br * u[k];
      y[k] += cr * xr;
    }
  }
  set(row.x + n, xr);
}

template <bool complex, int tokens>
static inline void pass(const Row& row, const double* u, double* y) {
  VecD lanes[tokens] = {};
  double rest[tokens] = {};
  int64_t n = 0;
  for (; n + kD <= row.states; n += kD) advance<VecD, complex, tokens>(row, n, u, lanes);
  // One by one: a padded lane would make NaN of an infinite input.
  for (; n < row.states; ++n) advance<double, complex, tokens>(row, n, u, rest);
  for (int k = 0; k < tokens; ++k) {
    y[k] = rest[k];
    for (int i = 0; i < kD; ++i) y[k] += lanes[k][i];
  }
}

// (N) complex numbers as N real and N imaginary parts, or back.
template <bool complex>
static inline void split(double* to, const double* from, int64_t N) {
  for (int64_t n = 0; n < N; ++n) {
    to[n] = complex ? from[2 * n] : from[n];
    if constexpr (complex) to[N + n] = from[2 * n + 1];
  }
}

template <class F, bool complex>
static void scan(const DiagSsmScanArgs& a) {
  constexpr int parts = complex ? 2 : 1;
  const int64_t N = a.states, size = parts * N;
  const auto rows = [&](int64_t begin, int64_t end) {
    double* memory = static_cast<double*>(__builtin_malloc(sizeof(double) * size_t(4 * size)));
    const Row row{memory, memory + size, memory + 2 * size, memory + 3 * size, N};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i % a.heads;
      split<complex>(row.a, a.a + h * size, N), split<complex>(row.b, a.b + h * size, N);
      split<complex>(row.c, a.c + h * size, N);
      if (a.initial) split<complex>(row.x, a.initial + i * size, N);
      else __builtin_memset(row.x, 0, sizeof(double) * size_t(size));
      const F* u = static_cast<const F*>(a.u) + i * a.length;
      F* out = static_cast<F*>(a.out) + i * a.length;
      for (int64_t t = 0; t < a.length;) {
        double in[kTokens], y[kTokens];
        const int count = t + kTokens <= a.length ? kTokens : 1;
        for (int k = 0; k < count; ++k) in[k] = double(u[t + k]);
        count == kTokens ? pass<complex, kTokens>(row, in, y) : pass<complex, 1>(row, in, y);
        for (int k = 0; k < count; ++k) out[t + k] = F(a.skip ? y[k] + a.skip[h] * in[k] : y[k]);
        t += count;
      }
      for (int64_t n = 0; a.last && n < N; ++n) {
        a.last[i * size + parts * n] = row.x[n];
        if constexpr (complex) a.last[i * size + 2 * n + 1] = row.x[N + n];
      }
    }
    __builtin_free(memory);
  };
  const int64_t count = a.batch * a.heads;
  if (count * N * a.length >= kParallel) scalekern::parallel(count, rows);
  else rows(0, count);
}

struct VecComplex {
  VecD re, im;
};
static inline VecComplex operator*(VecComplex x, VecComplex y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}

// e^z and (e^z - 1) / z, the latter from its series where |z| is below 1/2: there e^z - 1 would cancel.
static inline void exp_and_phi(VecComplex z, VecComplex& power, VecComplex& phi) {
  VecD sine, cosine;
  sincosv<double>(z.im, sine, cosine);
  const VecD magnitude = expv(z.re), square = z.re * z.re + z.im * z.im;
  power = {magnitude * cosine, magnitude * sine};
  const VecD nr = power.re - 1, ni = power.im, inverse = 1 / square;
  phi = {(nr * z.re + ni * z.im) * inverse, (ni * z.re - nr * z.im) * inverse};
  const auto small = square < 0.25;
  bool any = false;
  for (int i = 0; i < kD; ++i) any = any || small[i];
  if (!any) return;
  double inverse_factorials[17] = {1};  // 1 / (k + 1)!
  for (int k = 1; k < 17; ++k) inverse_factorials[k] = inverse_factorials[k - 1] / (k + 1);
  VecComplex series{};
  for (int k = 16; k >= 0; --k) {
    series = series * z;
    series.re += inverse_factorials[k];
  }
  phi.re = small ? series.re : phi.re, phi.im = small ? series.im : phi.im;
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void diag_ssm_scan(const DiagSsmScanArgs& a) {
  if (a.wide) return a.complex ? scan<double, true>(a) : scan<double, false>(a);
  return a.complex ? scan<float, true>(a) : scan<float, false>(a);
}

void discretize_zoh(const DiscretizeArgs& a) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      for (int64_t n = 0; n < a.states; n += kD) {
        const int64_t at = 2 * (h * a.states + n), count = a.states - n < kD ? a.states - n : kD;
        VecComplex z{}, B{}, power, phi;
        for (int64_t i = 0; i < count; ++i) {
          z.re[i] = a.A[at + 2 * i] * a.dt[h], z.im[i] = a.A[at + 2 * i + 1] * a.dt[h];
          B.re[i] = a.B[at + 2 * i] * a.dt[h], B.im[i] = a.B[at + 2 * i + 1] * a.dt[h];
        }
        exp_and_phi(z, power, phi);
        const VecComplex b = B * phi;
        for (int64_t i = 0; i < count; ++i) {
          a.a[at + 2 * i] = power.re[i], a.a[at + 2 * i + 1] = power.im[i];
          a.b[at + 2 * i] = b.re[i], a.b[at + 2 * i + 1] = b.im[i];
        }
      }
  };
  if (a.heads * a.states >= 1 << 14) scalekern::parallel(a.heads, run);
  else run(0, a.heads);
}

}  // namespace scalekern::SCALEKERN_ISA
