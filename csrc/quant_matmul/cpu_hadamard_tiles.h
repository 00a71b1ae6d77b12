// The first five stages of bfloat16 rows as products of tiles with H_32, whose signs are exact in bfloat16, and the
// last stages of what those leave. Where common/amx.h's has_amx(): sums are float, subnormals are 0.
//
// Bound: 16 blocks of 32 points make 32 vectors of sums in 42 clocks of products, 10 of loads and 35 of stores, which
//   overlap little: 75 in all, 2.3 a vector. In vectors their widening, a stage between them and four of lanes are 9.5
//   operations, 4.8 clocks; rounding takes 1.5 operations instead of 4.5. Rows in L2, one core at 2.8 GHz, without
//   tiles and with them: 64 points 14 to 7 ns, 512 126 to 75, 4,096 1.2 to 0.75 us, 8,192 2.8 to 1.9.
// Tried and lost: for long rows a block of each of 16 runs to a tile, whose rows the next pass takes at once: 1.08 us
//   of 8,192 points as before, since loads of what a tile has just stored wait, and x is no longer read in order. A
//   tile's products and stores spread over the last pass of another: up to 512 points 2.4 to 1.85 ns a vector on a core
//   alone, beside a busy thread 3.4 to 3.8; 1,024 points and more 3.0 to 3.4. Zeros loaded instead of tilezero (21 ns
//   of a product after it, 6 after a load, by itself): equal, since vectors come between. Stores past the caches: 15 %
//   less while a copy takes 5.5 ns a vector, 5 % more while it takes 3.3. Last passes of 8 blocks instead of 16: 2 %.
#pragma once
#include "common/amx.h"
#include "quant_matmul/cpu_hadamard_passes.h"

#if defined(__AVX512F__)
namespace {

constexpr int kTileStages = 5, kBlock = 1 << kTileStages, kTilePoints = 16 * kBlock;

// H_32 in two tiles: word 2 j + k % 2 of row k / 2 is the sign at k and j, or k and 16 + j.
struct alignas(64) Signs {
  uint16_t tile[2][16][32] = {};
  constexpr Signs() {
    for (int j = 0; j < 32; ++j)
      for (int k = 0; k < 32; ++k)
        tile[j / 16][k / 2][2 * (j % 16) + k % 2] = __builtin_parity(unsigned(k & j)) ? 0xbf80 : 0x3f80;
  }
};
constexpr Signs kSigns;

// The tile registers of this thread, the signs in 6 and 7.
struct BlockTiles : Tiles {
  BlockTiles() { load_tile<6>(kSigns.tile[0], kTileBytes), load_tile<7>(kSigns.tile[1], kTileBytes); }
};

// 16 blocks of 32 points that follow each other.
static inline void transform_blocks(float* to, const bf16* from) {
  load_tile<0>(from, 2 * kBlock);
  zero_tile<1>(), zero_tile<2>();
  add_bf16_products<1, 0, 6>(), add_bf16_products<2, 0, 7>();
  store_tile<1>(to, 4 * kBlock), store_tile<2>(to + kBlock / 2, 4 * kBlock);
}

// Stages between 2^bits neighbouring blocks of `size` points, scaled. Of 16 blocks the first stage is made as they are
// read, once for the upper eight of its results and once for the lower. With lanes: what RunProduct leaves, 2^lanes
// even points before as many odd ones, whose own stages come first.
template <int bits, int lanes>
static void last_of_tiles(bf16* to, const float* from, int64_t size, float scale) {
  constexpr int count = bits > 3 ? 8 : 1 << bits, all = 1 << bits, half = 1 << lanes;
  VecF v[2][count];
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / (2 * half) * (2 * half) + i % 2 * half + i / 2 % half);
  const __m512i in_order = _mm512_load_si512(order);
  const auto finish = [&](bf16* y) {
#pragma GCC unroll 16
    for (int j = 0; j < 2 * count; ++j) v[j % 2][j / 2] = lane_stages<float, lanes>(v[j % 2][j / 2]);
    butterflies<count>(v[0]), butterflies<count>(v[1]);
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) {
      const __m512i out = to_bf16((__m512)(v[0][j] * scale), (__m512)(v[1][j] * scale));
      _mm512_storeu_si512(y + 32 * j, lanes ? _mm512_permutexvar_epi16(in_order, out) : out);
    }
  };
  for (int64_t i = 0; i < size; i += 32 * all) {
#pragma GCC unroll 16
    for (int j = 0; j < 2 * count; ++j) {
      v[j % 2][j / 2] = load(from + i + 16 * j);
      if constexpr (bits > 3) v[j % 2][j / 2] += load(from + i + 256 + 16 * j);
    }
    finish(to + i);
    if constexpr (bits > 3) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) v[j % 2][j / 2] = load(from + i + 16 * j) - load(from + i + 256 + 16 * j);
      finish(to + i + 256);
    }
  }
}

template <int lanes>
static void last_of_blocks(bf16* to, const float* from, int64_t size, int bits, float scale) {
  switch (bits) {
    case 0: return last_of_tiles<0, lanes>(to, from, size, scale);
    case 1: return last_of_tiles<1, lanes>(to, from, size, scale);
    case 2: return last_of_tiles<2, lanes>(to, from, size, scale);
    case 3: return last_of_tiles<3, lanes>(to, from, size, scale);
    default: return last_of_tiles<4, lanes>(to, from, size, scale);
  }
}

}  // namespace
#endif
