// FFTs of real polynomials modulo x^n - i, in place, for cpu_*_kernel.cpp; fft_conv.h says what a plan holds.
//
// A block of `size` numbers, a polynomial modulo x^size - c, splits into R blocks modulo x^(size / R) - w_j, w_j the
// R-th roots of c: multiply its j-th part with w^m, then a DFT of R points across the parts. Twiddles are one scalar a
// part and block, and input in natural order gives spectra in an order that only the inverse has to know. A leaf of W^2
// numbers has a step across vectors, a transpose, and another step across vectors: no other shuffle is needed.
// Memory: numbers lie in groups of W, real parts then imaginary parts, so that a group is whole cache lines.
#pragma once
#include "common/tile.h"
#include "fft_conv/fft_conv.h"

namespace {

using scalekern::FftPlan;
constexpr int kW = kLanes<float>;

struct Cx {
  VecF re, im;
};
static inline Cx operator+(Cx a, Cx b) { return {a.re + b.re, a.im + b.im}; }
static inline Cx operator-(Cx a, Cx b) { return {a.re - b.re, a.im - b.im}; }
template <class S>
static inline Cx times(Cx a, S re, S im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}
template <class S>
static inline Cx times_conj(Cx a, S re, S im) {
  return {a.re * re + a.im * im, a.im * re - a.re * im};
}
template <int kSign>  // i a or -i a
static inline Cx turned(Cx a) {
  if constexpr (kSign > 0) return {-a.im, a.re};
  else return {a.im, -a.re};
}

static inline Cx load_cx(const float* p) { return {load(p), load(p + kW)}; }
static inline void store_cx(float* p, Cx x) { store(p, x.re), store(p + kW, x.im); }

template <int R, int kSign>
static inline __attribute__((always_inline)) void dft(Cx* x);

// dft<8> of get(m) to put(j): taken when wanted, given when known, so that 16 registers do for most of it.
template <int kSign, class Get, class Put>
static inline __attribute__((always_inline)) void dft8(const Get& get, const Put& put) {
  Cx even[4], odd[4];
  even[0] = get(0), even[2] = get(4), even[1] = get(2), even[3] = get(6);
  dft<4, kSign>(even);
  odd[0] = get(1), odd[2] = get(5), odd[1] = get(3), odd[3] = get(7);
  dft<4, kSign>(odd);
  put(0, even[0] + odd[0]), put(4, even[0] - odd[0]);
  const Cx t2 = turned<kSign>(odd[2]);
  put(2, even[2] + t2), put(6, even[2] - t2);
  const float h = 0.707106781186547524f;
  const Cx s1 = odd[1] + turned<kSign>(odd[1]), t1 = {h * s1.re, h * s1.im};
  put(1, even[1] + t1), put(5, even[1] - t1);
  const Cx s3 = turned<kSign>(odd[3]) - odd[3], t3 = {h * s3.re, h * s3.im};
  put(3, even[3] + t3), put(7, even[3] - t3);
}

// x[j] = sum_m x[m] e^(kSign 2 pi i j m / R)
template <int R, int kSign>
static inline __attribute__((always_inline)) void dft(Cx* x) {
  if constexpr (R == 2) {
    const Cx a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  } else if constexpr (R == 3) {
    const Cx sum = x[1] + x[2], d = x[1] - x[2];
    const float s = 0.866025403784438647f;
    const Cx m = {x[0].re - 0.5f * sum.re, x[0].im - 0.5f * sum.im}, t = turned<kSign>({s * d.re, s * d.im});
    x[0] = x[0] + sum, x[1] = m + t, x[2] = m - t;
  } else if constexpr (R == 4) {
    const Cx a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = turned<kSign>(x[1] - x[3]);
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else if constexpr (R == 5) {
    const float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;
    const float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;
    const Cx a = x[1] + x[4], b = x[2] + x[3], c = x[1] - x[4], d = x[2] - x[3];
    const Cx m1 = {x[0].re + c1 * a.re + c2 * b.re, x[0].im + c1 * a.im + c2 * b.im};
    const Cx m2 = {x[0].re + c2 * a.re + c1 * b.re, x[0].im + c2 * a.im + c1 * b.im};
    const Cx t1 = turned<kSign>({s1 * c.re + s2 * d.re, s1 * c.im + s2 * d.im});
    const Cx t2 = turned<kSign>({s2 * c.re - s1 * d.re, s2 * c.im - s1 * d.im});
    x[0] = x[0] + (a + b), x[1] = m1 + t1, x[2] = m2 + t2, x[3] = m2 - t2, x[4] = m1 - t1;
  } else if constexpr (R == 8) {
    dft8<kSign>([&](int m) { return x[m]; }, [&](int m, Cx y) { x[m] = y; });
  } else {
    static_assert(R == 16);
    const float c = 0.923879532511286756f, s = 0.382683432365089772f, h = 0.707106781186547524f;
    const float re[10] = {1, c, h, s, 0, 0, -h, 0, 0, -c}, im[10] = {0, s, h, c, 1, 0, h, 0, 0, -s};
    Cx y[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      for (int m = 0; m < 4; ++m) y[j][m] = x[j + 4 * m];
      dft<4, kSign>(y[j]);
      if (j)
        for (int m = 1; m < 4; ++m) y[j][m] = times(y[j][m], re[j * m], kSign * im[j * m]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      Cx z[4] = {y[0][m], y[1][m], y[2][m], y[3][m]};
      dft<4, kSign>(z);
      for (int j = 0; j < 4; ++j) x[m + 4 * j] = z[j];
    }
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// 24 shuffles; transpose() takes 48 there, which have no interleaving across halves of a register.
static inline __attribute__((always_inline)) void transpose_lanes(VecF* v) {
  VecF a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#else
static inline __attribute__((always_inline)) void transpose_lanes(VecF* v) { transpose<float>(v); }
#endif

static inline __attribute__((always_inline)) void transpose_lanes(Cx* x) {
  VecF re[kW], im[kW];
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) re[i] = x[i].re, im[i] = x[i].im;
  transpose_lanes(re), transpose_lanes(im);
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) x[i] = {re[i], im[i]};
}

// The same for any R.
template <int R, int kSign, class Get, class Put>
static inline __attribute__((always_inline)) void dft_of(const Get& get, const Put& put) {
  if constexpr (R == 8) return dft8<kSign>(get, put);
  Cx x[R];
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m) x[m] = get(m);
  dft<R, kSign>(x);
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m) put(m, x[m]);
}

// --- leaves: W^2 numbers, block number `block` ---

struct Leaf {
  Cx x[kW];

  inline __attribute__((always_inline)) void forward(const FftPlan& plan, int64_t block, const float* p) {
    const float* across = plan.twiddles[plan.levels] + block * 2 * (kW - 1) * (kW + 1);
    const float* within = across + 2 * (kW - 1);
    dft_of<kW, 1>([&](int m) {
      const Cx y = load_cx(p + 2 * kW * m);
      return m ? times(y, across[2 * m - 2], across[2 * m - 1]) : y;
    }, [&](int m, Cx y) { x[m] = y; });
    transpose_lanes(x);
    dft_of<kW, 1>([&](int m) {
      if (m == 0) return x[0];
      const Cx w = load_cx(within + 2 * kW * (m - 1));
      return times(x[m], w.re, w.im);
    }, [&](int m, Cx y) { x[m] = y; });
  }
  inline __attribute__((always_inline)) void inverse(const FftPlan& plan, int64_t block, float* p) {
    const float* across = plan.twiddles[plan.levels] + block * 2 * (kW - 1) * (kW + 1);
    const float* within = across + 2 * (kW - 1);
    dft_of<kW, -1>([&](int m) { return x[m]; }, [&](int m, Cx y) {
      if (m == 0) return void(x[0] = y);
      const Cx w = load_cx(within + 2 * kW * (m - 1));
      x[m] = times_conj(y, w.re, w.im);
    });
    transpose_lanes(x);
    dft_of<kW, -1>([&](int m) { return x[m]; }, [&](int m, Cx y) {
      store_cx(p + 2 * kW * m, m ? times_conj(y, across[2 * m - 2], across[2 * m - 1]) : y);
    });
  }
  inline __attribute__((always_inline)) void load_from(const float* p) {
#pragma GCC unroll 16
    for (int m = 0; m < kW; ++m) x[m] = load_cx(p + 2 * kW * m);
  }
  inline __attribute__((always_inline)) void store_to(float* p) const {
#pragma GCC unroll 16
    for (int m = 0; m < kW; ++m) store_cx(p + 2 * kW * m, x[m]);
  }
};

// --- passes over a block ---

// part: numbers of a part.
template <int R, bool kForward>
static inline void pass(float* x, int64_t part, const float* twiddles) {
  for (int64_t t = 0; t < 2 * part; t += 2 * kW) {
    const auto turn = [&](int m, Cx y) {
      if (m == 0) return y;
      const float re = twiddles[2 * m - 2], im = twiddles[2 * m - 1];
      return kForward ? times(y, re, im) : times_conj(y, re, im);
    };
    dft_of<R, kForward ? 1 : -1>(
        [&](int m) {
          const Cx y = load_cx(x + 2 * part * m + t);
          return kForward ? turn(m, y) : y;
        },
        [&](int m, Cx y) { store_cx(x + 2 * part * m + t, kForward ? y : turn(m, y)); });
  }
}

// The first level forward, for vectors [begin, end) of every part: n real numbers `low` + i `high` into spectrum's
// memory; `high` may be absent.
template <int R, bool kHigh>
static void first_pass(const FftPlan& plan, const float* low, const float* high, float* x, int64_t begin, int64_t end) {
  const int64_t part = plan.child();
  const float* twiddles = plan.twiddles[0];
  for (int64_t t = begin * kW; t < end * kW; t += kW) {
    dft_of<R, 1>(
        [&](int m) {
          const VecF a = load(low + part * m + t);
          if constexpr (kHigh) {
            const Cx y = {a, load(high + part * m + t)};
            return m ? times(y, twiddles[2 * m - 2], twiddles[2 * m - 1]) : y;
          } else {
            return m ? Cx{a * twiddles[2 * m - 2], a * twiddles[2 * m - 1]} : Cx{a, VecF{}};
          }
        },
        [&](int m, Cx y) { store_cx(x + 2 * (plan.pitch * m + t), y); });
  }
}

// The way back, divided by n.
template <int R, bool kHigh>
static void last_pass(const FftPlan& plan, const float* x, float* low, float* high, int64_t begin, int64_t end) {
  const int64_t part = plan.child();
  const float* twiddles = plan.twiddles[0];
  const float scale = 1.0f / float(plan.size);
  float re[R], im[R];
  for (int m = 0; m < R; ++m) re[m] = m ? twiddles[2 * m - 2] * scale : scale, im[m] = m ? twiddles[2 * m - 1] * scale : 0;
  for (int64_t t = begin * kW; t < end * kW; t += kW) {
    dft_of<R, -1>(
        [&](int m) { return load_cx(x + 2 * (plan.pitch * m + t)); },
        [&](int m, Cx y) {
          store(low + part * m + t, m ? y.re * re[m] + y.im * im[m] : y.re * re[m]);
          if constexpr (kHigh) store(high + part * m + t, m ? y.im * re[m] - y.re * im[m] : y.im * re[m]);
        });
  }
}

template <class F>
static inline void with_radix(int radix, const F& f) {
  switch (radix) {
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 8: return f.template operator()<8>();
  }
}

static void first(const FftPlan& plan, const float* low, const float* high, float* x, int64_t begin, int64_t end) {
  with_radix(plan.radix[0], [&]<int R>() {
    high ? first_pass<R, true>(plan, low, high, x, begin, end) : first_pass<R, false>(plan, low, high, x, begin, end);
  });
}

static void last(const FftPlan& plan, const float* x, float* low, float* high, int64_t begin, int64_t end) {
  with_radix(plan.radix[0], [&]<int R>() {
    high ? last_pass<R, true>(plan, x, low, high, begin, end) : last_pass<R, false>(plan, x, low, high, begin, end);
  });
}

// Block `block` of a level, whose `size` numbers lie at x: down to its leaves, each given to leaf(at, block), and up.
// Depth first, so that a block that fits a cache is done there.
template <bool kForward, bool kInverse, class F>
static void descend(
    const FftPlan& plan, int level, int64_t block, float* x, int64_t at, int64_t size, const F& leaf) {
  if (level == plan.levels) return leaf(at, block);
  const int radix = plan.radix[level];
  const int64_t part = size / radix;
  const float* twiddles = plan.twiddles[level] + block * 2 * (radix - 1);
  if constexpr (kForward) with_radix(radix, [&]<int R>() { pass<R, true>(x + at, part, twiddles); });
  for (int j = 0; j < radix; ++j)
    descend<kForward, kInverse>(plan, level + 1, block * radix + j, x, at + 2 * part * j, part, leaf);
  if constexpr (kInverse) with_radix(radix, [&]<int R>() { pass<R, false>(x + at, part, twiddles); });
}

// Child `j` of the first level.
template <bool kForward, bool kInverse, class F>
static void child(const FftPlan& plan, int64_t j, float* x, const F& leaf) {
  descend<kForward, kInverse>(plan, 1, j, x, 2 * plan.pitch * j, plan.child(), leaf);
}

}  // namespace
