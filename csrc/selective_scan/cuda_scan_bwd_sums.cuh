// Sums over the channels of a warp in the backward scan of plain rows: dB and dC of a token.
//
// A lane brings 16 terms, dB and dC of its 8 states; the 16 lanes of a half warp hold the same states of 16 channels.
// Tensor cores do the first step: four products with ones sum over the four lanes of a quad, and each lane keeps 4 of
// the 16 sums (the terms are cut to tf32 for 2-byte types, split in two for float). Three exchanges do the rest: 28
// instructions, 60 with shuffles alone.
//
// A product takes two terms and zeros, so an infinite one makes NaN of its neighbour's sum too. Not taken for that:
// ones and zeros that sort all sums into their lanes, which spread it to all 16 (16 instructions; 3 % of the kernel's
// time by the replay of cuda_scan_bwd_rows.cuh). Free of it: eight products of 16 x 4 (32, but 280 bytes spilled).
#pragma once
#include "selective_scan/cuda_scan.cuh"
#if !defined(__CUDACC__)
#include "common/emulator_matrix.h"
#endif

namespace scalekern::scan {

// sum += a b in tf32 of 16 x 8 and 8 x 8, laid out over the warp as mma.m16n8k8 has it.
SK_DEVICE void tf32_product(float (&sum)[4], const float (&a)[4], float b0, float b1) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#else
  emulator::multiply_accumulate_tf32(sum, a, b0, b1);
#endif
}

struct ChannelSums {
  float even;  // 1 in the lanes whose lane / 4 is even

  static SK_DEVICE ChannelSums of_lane() { return {thread_index() / 4 % 2 == 0 ? 1.0f : 0.0f}; }

  // Lane q of every four gets the sums over the four of x[4 q .. 4 q + 3].
  template <bool kExact>
  SK_DEVICE void quad_sums(const float (&x)[16], float (&sums)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float high[4], low[4], sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float term = x[4 * i + (k % 2 * 2 + k / 2)];  // rows l / 4 and l / 4 + 8, then the other half of the sum
        high[k] = kExact ? as_float(as_bits(term) & 0xffffe000u) : term;
        low[k] = term - high[k];
      }
      tf32_product(sum, high, even, 1.0f - even);
      if constexpr (kExact) tf32_product(sum, low, even, 1.0f - even);
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] = i == 0 || thread_index() % 4 == i ? sum[k] : sums[k];
    }
  }

  // Which of the 16 terms of(x) sums in this lane.
  static SK_DEVICE int term() {
    const int lane = thread_index();
    return lane % 4 * 4 + (lane & 4 ? 2 : 0) + (lane & 8 ? 1 : 0);
  }

  // The sum over the 16 lanes of this half warp of one of x.
  template <bool kExact>
  SK_DEVICE float of(const float (&x)[16]) const {
    float sums[4];
    quad_sums<kExact>(x, sums);
    const bool high = thread_index() & 4, odd = thread_index() & 8;  // keep two of the four, then one
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float keep = high ? sums[2 + i] : sums[i], give = high ? sums[i] : sums[2 + i];
      sums[i] = keep + shuffle_xor(give, 4);
    }
    const float keep = odd ? sums[1] : sums[0], give = odd ? sums[0] : sums[1];
    return keep + shuffle_xor(give, 8);
  }
};

}  // namespace scalekern::scan
