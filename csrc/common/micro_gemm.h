// Products of small matrices from L1 and L2, kRows x 2 vectors of the result in registers.
//
//   c[rows][W] (+)= a[rows][count] b[count][W],  W = kPanel: two vectors
//
// Numbers of a are broadcast, rows of b are loaded: neither side is transposed or copied for it. A step of AVX2 is 12
// multiply-adds (6 cycles of two units) for 8 loads (4 cycles).
#pragma once
#include "common/vec.h"

namespace {

constexpr int kRows = SCALEKERN_VEC_BYTES == 64 ? 8 : 6;
template <class F>
constexpr int kPanel = 2 * kLanes<F>;

// a[i][k] at a[i lda + k], or with kColumns at a[k lda + i]. N: of the panel's two vectors, the first alone or both.
template <class F, int R, bool kColumns, bool kAdd, int N>
static __attribute__((noinline)) void micro_gemm(
    const F* a, int64_t lda, const F* b, int64_t ldb, int64_t count, F* c, int64_t ldc) {
  constexpr int V = kLanes<F>;
  Vec<F> acc[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < N; ++v) acc[i][v] = kAdd ? load(c + i * ldc + v * V) : Vec<F>{};
  for (int64_t k = 0; k < count; ++k, a += kColumns ? lda : 1, b += ldb) {
    Vec<F> row[N];
    for (int v = 0; v < N; ++v) row[v] = load(b + v * V);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const F x = a[kColumns ? i : i * lda];
      for (int v = 0; v < N; ++v) acc[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < N; ++v) store(c + i * ldc + v * V, acc[i][v]);
}

// Rows of the next strip of `left`: `most`, but no strip of one or two, whose sums would wait for each other.
static inline int64_t strip_rows(int64_t left, int64_t most = kRows) {
  return left <= most ? left : left < most + 3 ? (left + 1) / 2 : most;
}

template <class F, bool kColumns, bool kAdd, int N = 2, int R = kRows * 2 / N>
static inline void strip_gemm(
    int64_t rows, const F* a, int64_t lda, const F* b, int64_t ldb, int64_t count, F* c, int64_t ldc) {
  if (rows == R) return micro_gemm<F, R, kColumns, kAdd, N>(a, lda, b, ldb, count, c, ldc);
  if constexpr (R > 1) strip_gemm<F, kColumns, kAdd, N, R - 1>(rows, a, lda, b, ldb, count, c, ldc);
}

template <class F, bool kColumns, bool kAdd, int N = 2>
static void panel_gemm(
    int64_t rows, const F* a, int64_t lda, const F* b, int64_t ldb, int64_t count, F* c, int64_t ldc) {
  for (int64_t i = 0; i < rows;) {
    const int64_t here = strip_rows(rows - i, kRows * 2 / N);
    strip_gemm<F, kColumns, kAdd, N>(here, a + (kColumns ? i : i * lda), lda, b, ldb, count, c + i * ldc, ldc);
    i += here;
  }
}

}  // namespace
