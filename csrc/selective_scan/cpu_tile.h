// Tiles of tensors in L1: strided elements of any storage type to contiguous compute-type numbers and back.
// Included by cpu_*_kernel.cpp only, after nothing but this file; static like vec.h, so that no level shares code.
#pragma once
#include "common/parallel.h"
#include "common/vec.h"

namespace {

template <class T>
static inline T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}
template <class T>
static inline const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

template <class F>
static inline void zero(F* p, int64_t count) {
  if (count > 0) __builtin_memset(p, 0, size_t(count) * sizeof(F));
}

// dst[i] = src[i * stride], widened.
template <class T, class F>
static inline void widen(F* __restrict dst, const T* __restrict src, int64_t stride, int64_t count) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) dst[i] = to_float(src[i * stride]);
    return;
  }
  int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(F)) {
    for (; i + kLanes<F> <= count; i += kLanes<F>) store(dst + i, load(reinterpret_cast<const F*>(src) + i));
  }
#if defined(__AVX512F__)
  if constexpr (__is_same(T, f16) && __is_same(F, float)) {  // GCC 12 converts halves one by one
    for (; i + 16 <= count; i += 16)
      store(dst + i, VecF(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)))));
  }
#elif defined(__F16C__)
  if constexpr (__is_same(T, f16) && __is_same(F, float)) {
    for (; i + 8 <= count; i += 8)
      store(dst + i, VecF(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)))));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j) dst[j] = to_float(src[j]);
}

// dst[i * stride] = src[i], rounded to nearest even.
template <class T, class F>
static inline void narrow(T* __restrict dst, int64_t stride, const F* __restrict src, int64_t count) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) from_float(dst[i * stride], src[i]);
    return;
  }
  int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(F)) {
    for (; i + kLanes<F> <= count; i += kLanes<F>) store(reinterpret_cast<F*>(dst) + i, load(src + i));
  }
#if defined(__AVX512F__)
  if constexpr (__is_same(T, f16) && __is_same(F, float)) {
    for (; i + 16 <= count; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), _mm512_cvtps_ph(__m512(load(src + i)), 0));
  }
#elif defined(__F16C__)
  if constexpr (__is_same(T, f16) && __is_same(F, float)) {
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), _mm256_cvtps_ph(__m256(load(src + i)), 0));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j) from_float(dst[j], src[j]);
}

template <class F>
static inline F sum_of(Vec<F> v) {
  F total = 0;
  for (int i = 0; i < kLanes<F>; ++i) total += v[i];
  return total;
}

// Small calls stay on the calling thread: waking the others costs as much as the work would.
template <class Body>
static inline void parallel_if(bool worth_it, int64_t count, const Body& body) {
  if (worth_it) {
    scalekern::parallel(count, body);
  } else if (count > 0) {
    body(int64_t(0), count);
  }
}

}  // namespace
