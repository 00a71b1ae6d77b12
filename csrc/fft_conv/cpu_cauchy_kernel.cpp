// Cauchy sums over the states at roots of unity, and the transposed sums over the roots.
//
//   M_v(w) = sum_n V_nv rho_n(w)     rho_n = 1 / (2 i sin - cos z_n)     sin, cos of half of w's angle
//   dV_nv  = sum_w dM_v conj(rho_n)  S_nv  = sum_w cos dM_v conj(rho_n^2)
//
// With 2 i sin - cos z = p + i q: rho = (p - i q) / (p^2 + q^2). The conjugate of a state has the same p and another q;
// the two halves of a pair share one division, and what they multiply V with are four real numbers instead of eight:
//
//   V rho + conj(V) rho' = (Re V x1 + Im V x2) + i (Im V x3 - Re V x4)
//   x1, x3 = p (alpha +- beta)     x4, x2 = alpha q +- beta q'     alpha, beta = 1 / (p^2 + q^2), 1 / (p^2 + q'^2)
//
// All in double: near a resonance q is a difference of numbers that are larger by Im z / Re z.
// Bound: per pair and root one division, 15 operations and 4 V multiply-adds, from registers; lanes are roots.
// Split: heads and blocks of roots over threads; backward, heads and blocks of states.
#include "common/parallel.h"
#include "common/vec.h"
#include "fft_conv/cauchy.h"

namespace {

using scalekern::CauchyArgs;

constexpr int kD = kLanes<double>;
constexpr int64_t kRoots = 256, kStates = 8;  // of a block
constexpr int64_t kParallel = 1 << 13;        // pairs of a state and a root from which threads pay

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// sin and cos of kD roots; lanes behind the last one repeat it.
static inline VecD roots(const double* p, int64_t first, int64_t count) {
  if (first + kD <= count) return load(p + first);
  VecD v{};
  for (int i = 0; i < kD; ++i) v[i] = p[min(first + i, count - 1)];
  return v;
}

// What a state, with its other half if it has one, multiplies Re V and Im V with.
struct Weights {
  VecD x1, x2, x3, x4;
};
struct Fractions {
  VecD p, q, other_q, alpha, beta;

  Fractions(double re, double im, VecD cosine, VecD sine, bool pairs) {
    p = cosine * -re, q = 2 * sine - cosine * im, other_q = 2 * sine + cosine * im;
    const VecD square = p * p, a = square + q * q, b = square + other_q * other_q;
    if (pairs) {
      const VecD inverse = 1 / (a * b);
      alpha = b * inverse, beta = a * inverse;
    } else {
      alpha = 1 / a, beta = VecD{};
    }
  }
  Weights of_rho() const { return combined(alpha * p, alpha * q, beta * p, beta * other_q); }
  Weights of_square() const {
    const VecD a = alpha * alpha, b = beta * beta;
    return combined(a * (p * p - q * q), a * (2 * p * q), b * (p * p - other_q * other_q), b * (2 * p * other_q));
  }
  // rho = r - i s, and r' - i s' of the other half
  static Weights combined(VecD r, VecD s, VecD other_r, VecD other_s) {
    return {r + other_r, s - other_s, r - other_r, s + other_s};
  }
};

template <int count, bool pairs>
static void sums_of(const CauchyArgs& a, int64_t h, int64_t first, int64_t end, int64_t v0) {
  const double* z = a.z + 2 * h * a.states;
  for (int64_t j = first; j < end; j += kD) {
    const VecD cosine = roots(a.cosine, j, a.count), sine = roots(a.sine, j, a.count);
    VecD re[count] = {}, im[count] = {};
    const double* V = a.products_of + 2 * (h * a.states * a.products + v0);
    for (int64_t n = 0; n < a.states; ++n, V += 2 * a.products) {
      const Weights x = Fractions(z[2 * n], z[2 * n + 1], cosine, sine, pairs).of_rho();
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        re[v] += V[2 * v] * x.x1 + V[2 * v + 1] * x.x2;
        im[v] += V[2 * v + 1] * x.x3 - V[2 * v] * x.x4;
      }
    }
    for (int v = 0; v < count; ++v) {
      double* to = a.sums + 2 * ((h * a.products + v0 + v) * a.count + j);
      for (int64_t i = 0; i < min(kD, end - j); ++i) to[2 * i] = re[v][i], to[2 * i + 1] = im[v][i];
    }
  }
}

template <bool pairs>
static void all_sums(const CauchyArgs& a, int64_t h, int64_t first, int64_t end) {
  int64_t v = 0;
  for (; v + 4 <= a.products; v += 4) sums_of<4, pairs>(a, h, first, end, v);
  for (; v < a.products; ++v) sums_of<1, pairs>(a, h, first, end, v);
}

static inline double sum_of(VecD x) {
  double total = 0;
  for (int i = 0; i < kD; ++i) total += x[i];
  return total;
}

// Adds the roots [first, end) to dproducts and square of `count` products of one state. dre, dim: [products][kRoots].
template <int count, bool pairs>
static void gradients_of(
    const CauchyArgs& a, int64_t h, int64_t n, int64_t v0, int64_t first, int64_t end, const double* dre,
    const double* dim) {
  const double *z = a.z + 2 * (h * a.states + n);
  VecD d_re[count] = {}, d_im[count] = {}, s_re[count] = {}, s_im[count] = {};
  for (int64_t j = first; j < end; j += kD) {
    const VecD cosine = roots(a.cosine, j, a.count), sine = roots(a.sine, j, a.count);
    const Fractions fractions(z[0], z[1], cosine, sine, pairs);
    const Weights x = fractions.of_rho();
    Weights y = fractions.of_square();
    y.x1 *= cosine, y.x2 *= cosine, y.x3 *= cosine, y.x4 *= cosine;
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) {
      const VecD r = load(dre + (v0 + v) * kRoots + j - first), i = load(dim + (v0 + v) * kRoots + j - first);
      d_re[v] += r * x.x1 - i * x.x4, d_im[v] += r * x.x2 + i * x.x3;
      s_re[v] += r * y.x1 - i * y.x4, s_im[v] += r * y.x2 + i * y.x3;
    }
  }
  for (int v = 0; v < count; ++v) {
    const int64_t at = 2 * ((h * a.states + n) * a.products + v0 + v);
    a.dproducts[at] += sum_of(d_re[v]), a.dproducts[at + 1] += sum_of(d_im[v]);
    a.square[at] += sum_of(s_re[v]), a.square[at + 1] += sum_of(s_im[v]);
  }
}

template <bool pairs>
static void all_gradients(const CauchyArgs& a, int64_t h, int64_t n0, int64_t states, double* dre, double* dim) {
  for (int64_t i = 2 * (h * a.states + n0) * a.products; i < 2 * (h * a.states + n0 + states) * a.products; ++i)
    a.dproducts[i] = a.square[i] = 0;
  for (int64_t first = 0; first < a.count; first += kRoots) {
    const int64_t end = min(first + kRoots, a.count);
    for (int64_t v = 0; v < a.products; ++v)  // zeros behind the last root
      for (int64_t j = 0; j < kRoots; ++j) {
        const double* d = a.dsums + 2 * ((h * a.products + v) * a.count + first + j);
        const bool here = first + j < end;
        dre[v * kRoots + j] = here ? d[0] : 0, dim[v * kRoots + j] = here ? d[1] : 0;
      }
    for (int64_t n = n0; n < n0 + states; ++n) {
      int64_t v = 0;
      for (; v + 2 <= a.products; v += 2) gradients_of<2, pairs>(a, h, n, v, first, end, dre, dim);
      for (; v < a.products; ++v) gradients_of<1, pairs>(a, h, n, v, first, end, dre, dim);
    }
  }
}

template <class Body>
static void over(const CauchyArgs& a, int64_t count, const Body& body) {
  if (a.heads * a.states * a.count >= kParallel) return scalekern::parallel(count, body);
  body(int64_t(0), count);
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void cauchy_sums(const CauchyArgs& a) {
  const int64_t blocks = (a.count + kRoots - 1) / kRoots;
  over(a, a.heads * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kRoots, last = min(first + kRoots, a.count);
      a.pairs ? all_sums<true>(a, i / blocks, first, last) : all_sums<false>(a, i / blocks, first, last);
    }
  });
}

void cauchy_sums_bwd(const CauchyArgs& a) {
  const int64_t blocks = (a.states + kStates - 1) / kStates;
  over(a, a.heads * blocks, [&](int64_t begin, int64_t end) {
    double* planes = static_cast<double*>(__builtin_malloc(sizeof(double) * size_t(2 * a.products * kRoots)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i % blocks * kStates, states = min(kStates, a.states - n0);
      const auto run = a.pairs ? &all_gradients<true> : &all_gradients<false>;
      run(a, i / blocks, n0, states, planes, planes + a.products * kRoots);
    }
    __builtin_free(planes);
  });
}

}  // namespace scalekern::SCALEKERN_ISA
