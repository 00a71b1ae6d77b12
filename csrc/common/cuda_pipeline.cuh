// What a pipeline from global to shared memory and into the tensor cores uses: copies in groups, rows of matrices.
#pragma once
#include "common/cuda_block.cuh"
#if !defined(__CUDACC__)
#include "common/emulator_matrix.h"
#endif

namespace scalekern::device {

// Makes the compiler keep a number instead of computing it again from its parts wherever it is used.
SK_DEVICE int kept(int x) {
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(x));
#endif
  return x;
}

// kBytes (16, or 8) to shared memory, 16 past the L1; zeros unless `on` (`global` is a valid address all the same). Both
// aligned.
template <int kBytes = 16>
SK_DEVICE void copy_in_group(void* shared, const void* global, bool on = true) {
  static_assert(kBytes == 8 || kBytes == 16);
#if defined(__CUDA_ARCH__)
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  const int bytes = on ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#elif !defined(__CUDACC__)
  emulator::block().copy_in_group(shared, on ? global : nullptr, kBytes);
#endif
}

// Ends a group of this thread's copies, be it empty.
SK_DEVICE void copy_group() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  emulator::block().copy_group();
#endif
}

// Until all groups but the newest kNewest have landed. Other threads see them behind a barrier.
template <int kNewest>
SK_DEVICE void copy_wait_but() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#elif !defined(__CUDACC__)
  emulator::block().copy_wait_but(kNewest);
#endif
}

// 2 or 4 matrices of 8 x 8 elements of 16 bits in shared memory: lane 8 i + r brings the address of row r of matrix i
// (of 2 matrices, lanes from 16 on bring any), and gets of matrix i row lane / 4, elements 2 (lane % 4) and the next:
// what lane / 4 as a column and lane % 4 need of the right operand of a product.
template <int kCount>
SK_DEVICE void load_matrices(uint32_t (&words)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4);
#if defined(__CUDA_ARCH__)
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
#elif !defined(__CUDACC__)
  emulator::load_matrices(words, row);
#endif
}

// Four bytes of a (0 to 3) and b (4 to 7), chosen by the nibbles of `which`.
SK_FN uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, which);
#else
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= uint32_t(bytes >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
  return word;
#endif
}

// acc (16 x 8) += a (16 x 16) b (16 x 8), in float32. Lane 4 g + t: a of rows g, g + 8, g, g + 8 in its words, of
// inner indices 2 t and 2 t + 1, in the latter two 8 more; b likewise for column g; acc of rows g, g, g + 8, g + 8 and
// columns 2 t, 2 t + 1.
template <class T>
SK_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#elif !defined(__CUDACC__)
  const uint32_t b[2] = {b0, b1};
  emulator::multiply_accumulate(acc, a, b, [](uint16_t bits) { return widen(T{bits}); });
#endif
}

}  // namespace scalekern::device
