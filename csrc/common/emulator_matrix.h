// Operations of a whole warp on matrices for the emulator, written from the PTX ISA's description of which lane holds
// what ("Matrix Fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k8", "ldmatrix"), in its terms
// and order, and from nothing that a kernel says about its own layout: a kernel that packs its operands wrongly gets
// wrong numbers.
#pragma once
#include <cstring>

#include "common/emulator.h"

namespace scalekern::emulator {

// d = a b + d of m16n8k16, in float32. value(bits): the number that 16 bits of an operand stand for.
template <class Value>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value&& value) {
  struct Operands {
    float a[16][16], b[16][8];
  };
  static thread_local Operands of_warp[32];
  const int lane = block().thread % 32, group = lane >> 2, in_group = lane % 4;
  Operands& all = of_warp[block().thread / 32];
  const auto element = [&](const uint32_t* words, int i) { return value(uint16_t(words[i / 2] >> i % 2 * 16)); };
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    all.a[row][column] = element(a, i);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    all.b[row][group] = element(b, i);
  }
  block().warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) d[i] += all.a[row][k] * all.b[k][column];
  }
  block().warp_barrier();
}

// d = a b + d of m16n8k8 in tf32: the 13 low bits of an operand do not count.
inline void multiply_accumulate_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  struct Operands {
    float a[16][8], b[8][8];
  };
  static thread_local Operands of_warp[32];
  const int lane = block().thread % 32, group = lane >> 2, in_group = lane % 4;
  Operands& all = of_warp[block().thread / 32];
  const auto cut = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0xffffe000u;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  for (int i = 0; i < 4; ++i) all.a[i % 2 == 0 ? group : group + 8][i < 2 ? in_group : in_group + 4] = cut(a[i]);
  all.b[in_group][group] = cut(b0), all.b[in_group + 4][group] = cut(b1);
  block().warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    for (int k = 0; k < 8; ++k) d[i] += all.a[row][k] * all.b[k][column];
  }
  block().warp_barrier();
}

// ldmatrix .x1, .x2, .x4 of 8 x 8 elements of 16 bits: lane 8 i + r says where row r of matrix i is; of matrix i every
// lane gets row lane / 4, elements 2 (lane % 4) and the next.
template <int kCount>
void load_matrices(uint32_t (&words)[kCount], const void* row) {
  static thread_local const char* rows[1024];
  const int thread = block().thread, lane = thread % 32;
  if (lane < 8 * kCount && reinterpret_cast<uintptr_t>(row) % 16) block().fail("a misaligned row of a matrix");
  rows[thread] = static_cast<const char*>(row);
  block().warp_barrier();
  for (int i = 0; i < kCount; ++i)
    std::memcpy(&words[i], rows[thread - lane + 8 * i + lane / 4] + 2 * (2 * (lane % 4)), 4);
  block().warp_barrier();
}

}  // namespace scalekern::emulator
