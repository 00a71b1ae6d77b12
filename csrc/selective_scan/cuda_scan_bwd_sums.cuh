// Sums over the channels of a warp in the backward scan of plain rows: dB and dC of a token.
//
// A lane brings 16 terms, dB and dC of its 8 states; the 16 lanes of a half warp hold the same states of 16 channels.
// Tensor cores do the first step: four products sum over the four lanes of a quad, and by ones in different columns
// leave 4 of the 16 sums in each lane (the terms are cut to tf32 for 2-byte types, split in two for float). Three
// exchanges do the rest. 16 instructions; 60 with shuffles alone, 28 with four independent products whose results are
// selected, which saves no time once several tokens are under way at once.
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
  float column[8];  // one in column lane / 4 of the 8 of a product, else zero

  static SK_DEVICE ChannelSums of_lane() {
    ChannelSums s;
#pragma unroll
    for (int i = 0; i < 8; ++i) s.column[i] = thread_index() % 32 / 4 == i ? 1.0f : 0.0f;
    return s;
  }

  // Lane q of every four gets the sums over the four of x[4 q .. 4 q + 3]: columns 2 q and 2 q + 1 are its own.
  template <bool kExact>
  SK_DEVICE void quad_sums(const float (&x)[16], float (&sums)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float high[4], low[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float term = x[4 * i + (k % 2 * 2 + k / 2)];  // rows l / 4 and l / 4 + 8, then the other half of the sum
        high[k] = kExact ? as_float(as_bits(term) & 0xffffe000u) : term;
        low[k] = term - high[k];
      }
      tf32_product(sums, high, column[2 * i], column[2 * i + 1]);
      if constexpr (kExact) tf32_product(sums, low, column[2 * i], column[2 * i + 1]);
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
