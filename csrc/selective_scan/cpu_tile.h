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

// One vector of a storage type, widened.
template <class F, class T>
static inline Vec<F> load_as(const T* p) {
  if constexpr (sizeof(F) == 8 && sizeof(T) == 2) {  // the intrinsics of load_row make floats
    F lanes[kLanes<F>];
    for (int i = 0; i < kLanes<F>; ++i) lanes[i] = to_float(p[i]);
    return load(lanes);
  } else {
    return load_row<F>(p);
  }
}

typedef uint16_t Halves __attribute__((vector_size(SCALEKERN_VEC_BYTES / 2)));  // as many as floats in a vector
typedef uint32_t Words __attribute__((vector_size(SCALEKERN_VEC_BYTES)));

// The same back, rounded to nearest even; bf16 in registers, where a loop over from_float goes through memory in GCC 12.
template <class F, class T>
static inline void store_as(T* p, Vec<F> v) {
  if constexpr (__is_same(T, bf16) && __is_same(F, float)) {
    const Words bits = Words(v), high = bits >> 16;
    const Words rounded = (bits + 0x7fff + (high & 1)) >> 16;
    const Halves h = __builtin_convertvector(v != v ? high | 0x40 : rounded, Halves);
    __builtin_memcpy(p, &h, sizeof h);
  } else if constexpr (sizeof(F) == 8 && sizeof(T) == 2) {
    for (int i = 0; i < kLanes<F>; ++i) from_float(p[i], v[i]);
  } else {
    store_row<F>(p, v);
  }
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
