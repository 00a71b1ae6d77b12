// Arithmetic of the scan kernels on vectors of states, and their scratch memory.
#pragma once
#include "common/tile.h"

namespace {

// --- arithmetic on a state: real, or complex as two planes ---

template <class F>
struct RealState {
  using Scalar = F;
  using Value = Vec<F>;
  static constexpr int comps = 1;        // scalars of an element
  static constexpr int row = kLanes<F>;  // scalars of a vector of elements
  static constexpr F scale = 1;          // y = scale Re(C h)
  // exp(s A) of one lane in double.
  static void wide_decay(double s, const F* A, F* out) { *out = F(__builtin_exp(s * A[0])); }
  static Value get(const F* p) { return load(p); }
  static void put(F* p, Value v) { store(p, v); }
  static Value all(const F* p) { return splat(*p); }
  static Value conj(Value v) { return v; }
  static Vec<F> real(Value v) { return v; }
  // The form of A that decay() takes.
  static Value scaled_A(Value A) { return A * F(1.44269504088896340736); }
  static Vec<F> growth(Value A) { return A; }
  template <bool kBounded>
  static Value decay(Vec<F> d, Value scaled) {
    if constexpr (kBounded) return exp2_product_bounded<F>(d, scaled);
    else return exp2_product<F>(d, scaled);
  }
};

template <class F>
struct ComplexState {
  struct Value {
    Vec<F> re, im;
    friend Value operator+(Value a, Value b) { return {a.re + b.re, a.im + b.im}; }
    friend Value operator-(Value a, Value b) { return {a.re - b.re, a.im - b.im}; }
    friend Value operator*(Value a, Value b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
    friend Value operator*(Vec<F> a, Value b) { return {a * b.re, a * b.im}; }
    Value& operator+=(Value b) { return *this = *this + b; }
  };
  using Scalar = F;
  static constexpr int comps = 2;
  static constexpr int row = 2 * kLanes<F>;
  static constexpr F scale = 2;
  static void wide_decay(double s, const F* A, F* out) {
    const double size = __builtin_exp(s * A[0]), angle = s * A[kLanes<F>];
    out[0] = F(size * __builtin_cos(angle)), out[kLanes<F>] = F(size * __builtin_sin(angle));
  }
  static Value get(const F* p) { return {load(p), load(p + kLanes<F>)}; }
  static void put(F* p, Value v) { store(p, v.re), store(p + kLanes<F>, v.im); }
  static Value all(const F* p) { return {splat(p[0]), splat(p[1])}; }
  static Value conj(Value v) { return {v.re, -v.im}; }
  static Vec<F> real(Value v) { return v.re; }
  static Value scaled_A(Value A) { return A; }  // scaling the rotation would cost it digits
  static Vec<F> growth(Value A) { return A.re * F(1.44269504088896340736); }
  template <bool kBounded>
  static Value decay(Vec<F> d, Value A) {
    const Vec<F> size = expv(d * A.re);
    Vec<F> sine, cosine;
    sincosv<F>(d * A.im, sine, cosine);
    return {size * cosine, size * sine};
  }
};

template <class F>
static inline bool all_true(VecInt<F> mask) {
  bool yes = true;
  for (int i = 0; i < kLanes<F>; ++i) yes &= mask[i] != 0;
  return yes;
}

template <class F>
static inline VecInt<F> first_lanes(int count) {
  VecInt<F> mask;
  for (int i = 0; i < kLanes<F>; ++i) mask[i] = i < count ? -1 : 0;
  return mask;
}

template <class F>
static inline Vec<F> keep(Vec<F> v, VecInt<F> mask) {
  return (Vec<F>)((VecInt<F>)v & mask);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- memory: one aligned allocation handed out in pieces ---

class Arena {
 public:
  explicit Arena(char* base) : next_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return next_ - static_cast<char*>(nullptr); }

 private:
  char* next_;
};

// Runs body(scratch) with `bytes` of aligned scratch memory.
template <class Body>
static void with_scratch(int64_t bytes, const Body& body) {
  char* raw = static_cast<char*>(__builtin_malloc(bytes + 64));
  body(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64));
  __builtin_free(raw);
}

}  // namespace
