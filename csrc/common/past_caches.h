// Stores that go past the caches, for outputs that no L2 would hold until they are read: an ordinary store first reads
// the line that it overwrites. Included by cpu_*_kernel.cpp only.
#pragma once
#include "common/vec.h"

namespace {

constexpr int64_t kPastCaches = 2 << 20;  // bytes of an output from which it pays

// Whether whole vectors from `p` on, `step` bytes apart, lie where such stores can go.
static inline bool aligned_for_vectors(const void* p, int64_t step) {
  return (reinterpret_cast<uintptr_t>(p) | uintptr_t(step)) % sizeof(VecF) == 0;
}

template <class T>
static inline void store_past_caches(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}

// After the last of them, before another thread is told of it.
static inline void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
