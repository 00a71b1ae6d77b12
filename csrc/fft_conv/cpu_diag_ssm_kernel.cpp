// Sums over states of powers of their eigenvalues, and the transposed sums over time.
//
//   powers_sum   y[l] = Re sum_n w_n a_n^l            moments   m0_n = sum_l g[l] a_n^l,  m1_n = sum_l l g[l] a_n^(l-1)
//
// Shape letters: N states, L length, F fine and Q coarse powers, K = 2 N real columns (N of a real a).
//
// With l = q F + j, a^l = a^(q F) a^j: y is the product [Q, K] [K, F] of Re, -Im of w a^(q F) and Re, Im of a^j; the
// moments begin with [K, Q] [Q, F], whose result is small enough to be finished in double.
//
// Bound: multiply-adds, K an element and 2 K backward, from registers: a tile of kRows x kColumns sums.
// Powers: by multiplication, in double, one rounding at the end; F is about sqrt(L), so N (Q + F) of them a head cost a
//   tenth of the products. Numbers below the smallest normal one become 0: decayed powers would be subnormal for most
//   of a long kernel, and arithmetic with those is a hundred times slower on some machines.
// Memory: tables of 64 states at most, 128 (Q + F) numbers a thread.
// Split: heads over threads; few heads are split along coarse rows, or states.
#include "common/parallel.h"
#include "common/vec.h"
#include "fft_conv/diag_ssm.h"

namespace {

using scalekern::PowersArgs;

constexpr int kRows = SCALEKERN_VEC_BYTES == 64 ? 8 : 4, kVectors = 3;
template <class F>
constexpr int kColumns = kVectors * kLanes<F>;
constexpr int kD = kLanes<double>;
constexpr int64_t kStates = 64;        // of a table
constexpr int64_t kMomentRows = 64;    // of g in a panel
constexpr int64_t kParallel = 1 << 16;  // multiply-adds from which threads pay

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class F>
constexpr double kTiny = sizeof(F) == 4 ? 1.2e-38 : 2.3e-308;

template <class F>
static inline VecD flushed(VecD x) {
  return (x < kTiny<F>) & (x > -kTiny<F>) ? VecD{} : x;  // NaN stays
}

static inline void store_as_real(double* p, VecD x) { store(p, x); }
static inline void store_as_real(float* p, VecD x) {
  typedef float Half __attribute__((vector_size(sizeof(VecD) / 2)));
  const Half narrow = __builtin_convertvector(x, Half);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
static inline VecD load_as_double(const double* p) { return load(p); }
static inline VecD load_as_double(const float* p) {
  typedef float Half __attribute__((vector_size(sizeof(VecD) / 2)));
  Half narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(narrow, VecD);
}

struct Complex {
  double re, im;
};
static inline Complex operator*(Complex x, Complex y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
static inline Complex power(Complex x, int64_t n) {
  Complex result{1, 0};
  for (; n > 0; n >>= 1, x = x * x)
    if (n & 1) result = result * x;
  return result;
}

template <bool complex>
static inline Complex element(const double* p, int64_t i) {
  return complex ? Complex{p[2 * i], p[2 * i + 1]} : Complex{p[i], 0};
}

// start, start x, start x^2, .. a vector at a time.
struct Chain {
  VecD re, im, step_re, step_im;
  void begin(Complex start, Complex x) {
    Complex step{1, 0};
    double first_re[kD], first_im[kD];
    for (int i = 0; i < kD; ++i) {
      first_re[i] = start.re, first_im[i] = start.im;
      start = start * x, step = step * x;
    }
    re = load(first_re), im = load(first_im);
    step_re = splat(step.re), step_im = splat(step.im);
  }
  template <class F, bool complex>
  void advance() {
    if constexpr (complex) {
      const VecD r = re * step_re - im * step_im;
      im = flushed<F>(re * step_im + im * step_re);
      re = flushed<F>(r);
    } else {
      re = flushed<F>(re * step_re);
    }
  }
};

// Panels [count / width][K][width] of start_n x_n^i for `states` states: row k is Re of state k / 2 or, odd, +-Im.
template <class F, bool complex, class Start, class Base>
static void fill_panels(F* to, int width, int64_t count, int64_t states, const Start& start, const Base& x, int sign) {
  constexpr int parts = complex ? 2 : 1, group = 4;  // chains side by side hide the latency of their products
  const int64_t K = parts * states;
  for (int64_t n = 0; n < states; n += group) {
    const int here = int(min(group, states - n));
    Chain chains[group];
    for (int i = 0; i < group; ++i) {
      const int64_t state = n + (i < here ? i : 0);
      chains[i].begin(start(state), x(state));
    }
    for (int64_t l = 0; l < count; l += kD) {
      F* p = to + l / width * K * width + l % width + n * parts * width;
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        if (i < here) {
          store_as_real(p + i * parts * width, chains[i].re);
          if constexpr (complex) store_as_real(p + (i * parts + 1) * width, sign * chains[i].im);
        }
        chains[i].template advance<F, complex>();
      }
    }
  }
}

// sums[i][v] = sum_k left[k][i] right[k][v]
template <class F>
static inline void tile(const F* left, const F* right, int64_t count, Vec<F> (&sums)[kRows][kVectors]) {
  constexpr int V = kLanes<F>;
  Vec<F> acc[kRows][kVectors] = {};
  for (int64_t k = 0; k < count; ++k, left += kRows, right += kColumns<F>) {
    const Vec<F> r0 = load(right), r1 = load(right + V), r2 = load(right + 2 * V);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] += left[i] * r0;
      acc[i][1] += left[i] * r1;
      acc[i][2] += left[i] * r2;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) sums[i][v] = acc[i][v];
}

// to[0 .. count) = sums, or += ; count <= kColumns.
template <class F>
static inline void put(F* to, const Vec<F>* sums, int64_t count, bool add) {
  constexpr int V = kLanes<F>;
  if (count == kColumns<F>) {
    for (int v = 0; v < kVectors; ++v) store(to + v * V, add ? load(to + v * V) + sums[v] : sums[v]);
    return;
  }
  alignas(64) F lanes[kColumns<F>];
  for (int v = 0; v < kVectors; ++v) store(lanes + v * V, sums[v]);
  for (int64_t j = 0; j < count; ++j) to[j] = add ? to[j] + lanes[j] : lanes[j];
}

// F: a multiple of the tile's columns, about sqrt(L).
template <class F>
static int64_t fine_powers(int64_t length) {
  int64_t root = 1;
  while (root * root < length) ++root;
  return round_up(root, kColumns<F>);
}

template <class T>
struct Buffer {
  char* raw;
  T* data;
  explicit Buffer(int64_t count)
      : raw(static_cast<char*>(__builtin_malloc(size_t(count) * sizeof(T) + 64))),
        data(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64)) {}
  ~Buffer() { __builtin_free(raw); }
  Buffer(const Buffer&) = delete;
};

template <class Body>
static void over(int64_t work, int64_t count, const Body& body) {
  if (work >= kParallel) return scalekern::parallel(count, body);
  body(int64_t(0), count);
}

// --- powers_sum ---

// Rows [first, first + count) of F elements each, of head h.
template <class F, bool complex>
static void head_sum(const PowersArgs& a, int64_t h, int64_t fine, int64_t first, int64_t count, F* left, F* right) {
  constexpr int parts = complex ? 2 : 1;
  const int64_t begin = first * fine, length = min(a.length, (first + count) * fine) - begin;
  for (int64_t n0 = 0; n0 < a.states; n0 += kStates) {
    const int64_t states = min(kStates, a.states - n0), K = parts * states;
    const double* base = a.a + (h * a.states + n0) * parts;
    const auto x = [&](int64_t n) { return element<complex>(base, n); };
    Complex coarse[kStates], skipped[kStates];
    for (int64_t n = 0; n < states; ++n) coarse[n] = power(x(n), fine), skipped[n] = power(coarse[n], first);
    fill_panels<F, complex>(right, kColumns<F>, fine, states, [](int64_t) { return Complex{1, 0}; }, x, 1);
    for (int64_t m = 0; m < a.rows; ++m) {
      const double* w = a.w + ((m * a.heads + h) * a.states + n0) * parts;
      F* out = static_cast<F*>(a.out) + (m * a.heads + h) * a.length + begin;
      fill_panels<F, complex>(
          left, kRows, round_up(count, kRows), states,
          [&](int64_t n) { return first ? element<complex>(w, n) * skipped[n] : element<complex>(w, n); },
          [&](int64_t n) { return coarse[n]; }, -1);
      for (int64_t j = 0; j < fine; j += kColumns<F>)
        for (int64_t q = 0; q < count; q += kRows) {
          Vec<F> sums[kRows][kVectors];
          tile<F>(left + q * K, right + j * K, K, sums);
          for (int i = 0; i < kRows; ++i) {
            const int64_t at = (q + i) * fine + j;
            if (at < length && q + i < count) put<F>(out + at, sums[i], min(kColumns<F>, length - at), n0 > 0);
          }
        }
    }
  }
}

template <class F, bool complex>
static void sums(const PowersArgs& a) {
  const int64_t fine = fine_powers<F>(a.length), coarse = (a.length + fine - 1) / fine;
  const int64_t threads = scalekern::num_threads();
  const int64_t pieces = a.heads >= threads ? 1 : min(max(1, coarse / kRows), (threads + a.heads - 1) / a.heads);
  const int64_t rows = round_up((coarse + pieces - 1) / pieces, kRows);
  over(a.rows * a.heads * a.states * a.length, a.heads * pieces, [&](int64_t begin, int64_t end) {
    const int64_t K = (complex ? 2 : 1) * min(kStates, a.states);
    Buffer<F> left(rows * K), right(fine * K);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * rows;
      const int64_t count = min(rows, coarse - first);
      if (count > 0) head_sum<F, complex>(a, i / pieces, fine, first, count, left.data, right.data);
    }
  });
}

// --- moments ---

// For states n0 .. of one head and row: their coarse powers, q by q, and the slopes of these.
template <class F, bool complex>
struct Coarse {
  static constexpr int parts = complex ? 2 : 1;
  int64_t states, padded, fine, index = 0;  // the next q
  bool slopes;
  alignas(64) double re[kStates], im[kStates], step_re[kStates], step_im[kStates], last_re[kStates], last_im[kStates];

  Coarse(const double* a, int64_t states_, int64_t fine_, bool slopes_)
      : states(states_), padded(round_up(states_, kRows)), fine(fine_), slopes(slopes_) {
    for (int64_t n = 0; n < padded; ++n) {
      const bool here = n < states;
      const Complex x = here ? element<complex>(a, n) : Complex{0, 0}, last = power(x, fine - 1), step = last * x;
      re[n] = here, im[n] = 0;
      step_re[n] = step.re, step_im[n] = step.im, last_re[n] = last.re, last_im[n] = last.im;
    }
  }

  // Panels [columns / kRows][count][kRows]: Re, Im, and with slopes those of q F a^(q F - 1), `padded` columns each.
  void fill(F* to, int64_t count) {
    for (int64_t q = 0; q < count; ++q, ++index) {
      const double factor = double(index) * double(fine);
      for (int64_t n = 0; n < padded; n += kD) {
        const auto write = [&](int part, VecD x) {
          const int64_t column = part * padded + n;
          store_as_real(to + column / kRows * count * kRows + q * kRows + column % kRows, x);
        };
        const VecD r = load(re + n), i = load(im + n), sr = load(step_re + n), si = load(step_im + n);
        write(0, r);
        if constexpr (complex) write(1, i);
        if (slopes) {  // of a^(q F) from a^((q - 1) F), the one before
          const VecD pr = load(before_re + n), pi = load(before_im + n), lr = load(last_re + n), li = load(last_im + n);
          const VecD dr = complex ? pr * lr - pi * li : pr * lr;
          write(parts, factor ? flushed<F>(factor * dr) : VecD{});
          if constexpr (complex) write(3, factor ? flushed<F>(factor * (pr * li + pi * lr)) : VecD{});
          store(before_re + n, r), store(before_im + n, i);
        }
        if constexpr (complex) {
          store(re + n, flushed<F>(r * sr - i * si));
          store(im + n, flushed<F>(r * si + i * sr));
        } else {
          store(re + n, flushed<F>(r * sr));
        }
      }
    }
  }

  alignas(64) double before_re[kStates] = {}, before_im[kStates] = {};
};

// m0 and m1 of state n from U0 = sum_q a^(q F) g[q, :] and U1, its slope: rows of `sums`, F long and followed by zeros.
template <class F, bool complex>
static void finish(
    Complex x, int64_t fine, const F* u0_re, const F* u0_im, const F* u1_re, const F* u1_im, Complex& m0, Complex& m1) {
  Chain chain;
  chain.begin({1, 0}, x);
  VecD m0_re{}, m0_im{}, m1_re{}, m1_im{}, counter{};
  for (int i = 0; i < kD; ++i) counter[i] = i + 1;
  for (int64_t j = 0; j < fine; j += kD, counter += double(kD)) {
    const VecD pr = chain.re, pi = chain.im;
    const auto add = [&](VecD& re, VecD& im, VecD r, VecD i) {
      if constexpr (complex) re += pr * r - pi * i, im += pr * i + pi * r;
      else re += pr * r;
    };
    add(m0_re, m0_im, load_as_double(u0_re + j), complex ? load_as_double(u0_im + j) : VecD{});
    if (u1_re != nullptr) {  // a^j has the slope j a^(j-1): a^(j-1) meets j U0[j]
      add(m1_re, m1_im, load_as_double(u1_re + j) + counter * load_as_double(u0_re + j + 1),
          complex ? load_as_double(u1_im + j) + counter * load_as_double(u0_im + j + 1) : VecD{});
    }
    chain.advance<double, complex>();
  }
  for (int i = 0; i < kD; ++i) {
    m0.re += m0_re[i], m0.im += m0_im[i];
    m1.re += m1_re[i], m1.im += m1_im[i];
  }
}

template <class F, bool complex>
static void row_moments(
    const PowersArgs& a, int64_t row, int64_t n0, int64_t states, int64_t fine, F* left, F* right, F* sums) {
  constexpr int parts = complex ? 2 : 1;
  const int64_t head = row % a.heads, coarse = (a.length + fine - 1) / fine;
  const bool slopes = a.m1 != nullptr;
  const double* base = a.a + (head * a.states + n0) * parts;
  const F* g = static_cast<const F*>(a.g) + row * a.length;
  Coarse<F, complex> powers(base, states, fine, slopes);
  const int64_t padded = powers.padded, columns = (slopes ? 2 : 1) * parts * padded, stride = fine + kD;
  for (int64_t q0 = 0; q0 < coarse; q0 += kMomentRows) {
    const int64_t count = min(kMomentRows, coarse - q0);
    powers.fill(left, count);
    for (int64_t j = 0; j < fine; j += kColumns<F>)  // [F / kColumns][count][kColumns], zeros behind the last element
      for (int64_t q = 0; q < count; ++q) {
        const int64_t at = (q0 + q) * fine + j, here = max(0, min(kColumns<F>, a.length - at));
        F* p = right + (j * count + q * kColumns<F>);
        __builtin_memcpy(p, g + at, size_t(here) * sizeof(F));
        for (int64_t i = here; i < kColumns<F>; ++i) p[i] = 0;
      }
    for (int64_t j = 0; j < fine; j += kColumns<F>)
      for (int64_t k = 0; k < columns; k += kRows) {
        Vec<F> found[kRows][kVectors];
        tile<F>(left + k * count, right + j * count, count, found);
        for (int i = 0; i < kRows; ++i) put<F>(sums + (k + i) * stride + j, found[i], kColumns<F>, q0 > 0);
      }
  }
  for (int64_t k = 0; k < columns; ++k)
    for (int64_t i = fine; i < stride; ++i) sums[k * stride + i] = 0;
  for (int64_t n = 0; n < states; ++n) {
    Complex m0{}, m1{};
    const auto part = [&](int p) { return p < (slopes ? 2 : 1) * parts ? sums + (p * padded + n) * stride : nullptr; };
    finish<F, complex>(
        element<complex>(base, n), fine, part(0), complex ? part(1) : nullptr, slopes ? part(parts) : nullptr,
        complex && slopes ? part(3) : nullptr, m0, m1);
    const int64_t to = (row * a.states + n0 + n) * parts;
    a.m0[to] = m0.re;
    if (complex) a.m0[to + 1] = m0.im;
    if (slopes) a.m1[to] = m1.re;
    if (slopes && complex) a.m1[to + 1] = m1.im;
  }
}

template <class F, bool complex>
static void all_moments(const PowersArgs& a) {
  const int64_t fine = fine_powers<F>(a.length), rows = a.rows * a.heads, threads = scalekern::num_threads();
  // 32 states: their sums, forward and slopes, are 128 F numbers.
  const int64_t share = rows >= threads ? a.states : (a.states + threads - 1) / threads;
  const int64_t most = min(kStates / 2, round_up(share, kRows));
  const int64_t blocks = (a.states + most - 1) / most, columns = 4 * round_up(min(most, a.states), kRows);
  over(a.rows * a.heads * a.states * a.length, rows * blocks, [&](int64_t begin, int64_t end) {
    Buffer<F> left(columns * kMomentRows), right(fine * kMomentRows), sums(columns * (fine + kD));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i % blocks * most;
      row_moments<F, complex>(a, i / blocks, n0, min(most, a.states - n0), fine, left.data, right.data, sums.data);
    }
  });
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void powers_sum(const PowersArgs& a) {
  if (a.wide) return a.complex ? sums<double, true>(a) : sums<double, false>(a);
  return a.complex ? sums<float, true>(a) : sums<float, false>(a);
}

void moments(const PowersArgs& a) {
  if (a.wide) return a.complex ? all_moments<double, true>(a) : all_moments<double, false>(a);
  return a.complex ? all_moments<float, true>(a) : all_moments<float, false>(a);
}

}  // namespace scalekern::SCALEKERN_ISA
