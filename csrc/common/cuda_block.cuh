// What a kernel may use of its block: thread and block numbers, barriers, shuffles, shared memory, asynchronous copies.
//
// Kernels are structs with `Args`, `kThreads` and `static SK_DEVICE void run(const Args&)`. nvcc makes a __global__
// function of each (cuda_launch.h); for the host compiler the same source runs, thread by thread, in emulator.h.
#pragma once
#include <type_traits>

#include "common/device_math.cuh"

#if defined(__CUDACC__)

#define SK_DEVICE __device__ __forceinline__
#define SK_APART __device__ __noinline__  // rare paths: out of the way of the registers of the common one

namespace scalekern::device {

SK_DEVICE int thread_index() { return int(threadIdx.x); }
SK_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
SK_DEVICE void sync_threads() { __syncthreads(); }
SK_DEVICE void sync_warp() { __syncwarp(); }

template <class F>
SK_DEVICE F shuffle_xor(F value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of another lane of the warp.
template <class F>
SK_DEVICE F shuffle(F value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

SK_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char scalekern_shared[];
  return scalekern_shared;
}

// 16 bytes from global to shared memory, both aligned; complete after copy_wait of their group.
SK_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
SK_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
SK_DEVICE void copy_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

}  // namespace scalekern::device

#else

#include "common/emulator.h"

#define SK_DEVICE inline
#define SK_APART inline

namespace scalekern::device {

inline int thread_index() { return emulator::block().thread; }
inline int64_t block_index() { return emulator::block().number; }
inline void sync_threads() { emulator::block().barrier(); }
inline void sync_warp() { emulator::block().warp_barrier(); }

template <class F>
inline F shuffle_xor(F value, int mask) {
  double wide = double(value);
  return F(emulator::block().exchange(wide, mask));
}

template <class F>
inline F shuffle(F value, int lane) {
  return shuffle_xor(value, (thread_index() & 31) ^ lane);
}

inline unsigned char* shared_memory() { return emulator::block().shared(); }
inline void copy_async(void* shared, const void* global) { emulator::block().copy_async(shared, global); }
inline void copy_commit() {}
inline void copy_wait() { emulator::block().copy_wait(); }

}  // namespace scalekern::device

#endif

namespace scalekern::device {

// Aligned pieces of 16 bytes, so that loads and stores of rows are one instruction.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / int(sizeof(T));
  T v[kSize];
};

// Makes the compiler compute a pointer to global memory once, instead of again from its parts at every access.
template <class T>
SK_FN T* pinned(T* p) {
#if defined(__CUDA_ARCH__)
  size_t address = __cvta_generic_to_global(p);
  asm("" : "+l"(address));
  p = static_cast<T*>(__cvta_global_to_generic(address));
#endif
  return p;
}

// Loads written before it are not moved down to where their values are used.
SK_FN void loads_begin_above() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

template <class T>
SK_FN bool aligned16(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// kCount neighbouring elements as stored, moved in pieces of up to 16 bytes. Those of 2 bytes stay in pairs: as
// elements each would take a register.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Group {
  static constexpr bool kPairs = sizeof(T) == 2;
  using Word = std::conditional_t<kPairs, uint32_t, T>;
  Word words[kPairs ? kCount / 2 : kCount];

  static SK_FN Group load(const T* p) { return *reinterpret_cast<const Group*>(p); }
  SK_FN void store(T* p) const { *reinterpret_cast<Group*>(p) = *this; }

  SK_FN T get(int i) const {
    if constexpr (kPairs) return T{uint16_t(words[i / 2] >> (i % 2 * 16))};
    else return words[i];
  }
  SK_FN void set(int i, T value) {  // of a group that began as zeros
    if constexpr (kPairs) words[i / 2] |= uint32_t(value.bits) << (i % 2 * 16);
    else words[i] = value;
  }
  template <class F>
  static SK_FN Group of(const F (&value)[kCount]) {
    Group group;
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) group.words[i / 2] = narrow_pair<T>(value[i], value[i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) group.words[i] = narrow<T>(value[i]);
    }
    return group;
  }
};

// n / d, 0 <= n < 2^31, by a multiplication: a division of 32 bits costs some 20 instructions, one of 64 bits 70.
struct Divisor {
  uint32_t magic = 1u << 31;
  int shift = 31;
  Divisor() = default;
  explicit Divisor(int64_t d) {
    while ((int64_t(1) << (shift - 31)) < d) ++shift;
    magic = uint32_t(((uint64_t(1) << shift) + d - 1) / d);
  }
  SK_FN int quotient(int n) const { return int((uint64_t(uint32_t(n)) * magic) >> shift); }
};

// Calls f with a null pointer of the type that `dtype` (enum Dtype) names.
template <class Call>
SK_FN void with_type(int dtype, Call&& f) {
  switch (dtype) {
    case 0: return f(static_cast<float*>(nullptr));
    case 1: return f(static_cast<double*>(nullptr));
    case 2: return f(static_cast<f16*>(nullptr));
    case 3: return f(static_cast<bf16*>(nullptr));
  }
}

// cu_seqlens or another index tensor of int32 or int64.
struct Indices {
  const void* data;
  int64_t stride;
  bool is64;
  SK_FN int64_t operator[](int64_t i) const {
    if (is64) return static_cast<const int64_t*>(data)[i * stride];
    return static_cast<const int32_t*>(data)[i * stride];
  }
};

// The first i in [0, count] with bounds[i] > value (count when there is none); bounds rise.
SK_FN int64_t first_above(const Indices& bounds, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bounds[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

}  // namespace scalekern::device
