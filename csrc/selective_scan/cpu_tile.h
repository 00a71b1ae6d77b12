// Tiles of tensors in L1: strided elements of any storage type to contiguous compute-type numbers and back.
// Included by cpu_*_kernel.cpp only, after nothing but this file; static like vec.h, so that no level shares code.
#pragma once
#include "common/parallel.h"
#include "common/tile.h"

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
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes<F> <= count; i += kLanes<F>) store(dst + i, load_as<F>(src + i));
  else if (stride == 4)  // a filter or a decoding state of width 4: a stride that the compiler knows becomes permutes
    for (; i + kLanes<F> <= count; i += kLanes<F>)
      for (int j = 0; j < kLanes<F>; ++j) dst[i + j] = to_float(src[(i + j) * 4]);
  for (; i < count; ++i) dst[i] = to_float(src[i * stride]);
}

// dst[i * stride] = src[i], rounded.
template <class T, class F>
static inline void narrow(T* __restrict dst, int64_t stride, const F* __restrict src, int64_t count) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes<F> <= count; i += kLanes<F>) store_as<F>(dst + i, load(src + i));
  for (; i < count; ++i) from_float(dst[i * stride], src[i]);
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
