// Many tokens by rows that were decoded to floats, on AVX-512: a token a lane, a number of a row to all of them.
//
// Bound: multiply-adds, 12 rows by 2 vectors of tokens in registers, 0.119 ns each on a Zen 5 of 4.2 GHz: 8.0 ms for
//   128 tokens of 4096 x 4096 on two cores. One core, 2048 rows, ms, with lanes along K (three rows by four tokens, whose
//   numbers come from L2) and here: nf4 16 tokens 2.6 and 2.0, 128 15.5 and 9.8; e4m3 3.2 and 2.4, 15.9 and 10.2.
// Lost: 128, 256 and 1,024 columns at a time (shorter runs of a row wait for memory: up to 20 %; equal); 24 rows
//   (equal); AVX2, 6 x 2 of 8 lanes: 16 tokens 7 % slower than along K, 128 6 % faster.
// Split: a block of kRows rows is decoded kDepth columns at a time; kChunk of them and of two vectors of tokens lie in
//   L1 together. Sums of a chunk go to totals in memory, so that float32's digits are kept (2e-7 at K = 4096).
// A token's additions have one order, whatever the others and the number of threads.
#pragma once
#include "common/tile.h"
#include "quant_matmul/cpu_quant_tokens.h"

#if defined(__AVX512F__)
namespace {

struct TokenLanes {
  static constexpr int W = kLanes<float>;
  static constexpr int64_t kRows = 48, kDepth = 512, kChunk = 128;
  static constexpr int64_t kMost = 256;           // tokens of a pass
  static constexpr int64_t kPitch = kDepth + 16;  // rows a power of two apart would share the sets of L1
  static constexpr int R = 12;  // rows at once
  const QuantMatmulArgs& a;
  const int64_t tiles, next;  // floats from a vector of tokens to the next
  const Buffer<float> x;      // [tile][K][W]

  explicit TokenLanes(const QuantMatmulArgs& a)
      : a(a), tiles(pieces(a.tokens, W)), next(a.w.columns * W), x(tiles * next) {
    const Tokens tokens(a, 1);
    const int64_t columns = round_up(pieces(a.w.columns, 16), W), parts = pieces(a.w.columns, columns);
    parallel_if(a.tokens * a.w.columns >= kParallelWork, tiles * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = i / parts, k = i % parts * columns, count = least(columns, a.w.columns - k);
        const int lanes = int(least(W, a.tokens - tile * W));
        load_tile(tokens[tile * W] + k, tokens.pitch(), 1, lanes, count, x + tile * next + k * W);
      }
    });
  }

  // totals[c][r] += rows of w times C vectors of tokens, `count` columns.
  template <int R, int C>
  static __attribute__((noinline)) void add_rows(
      const float* w, const float* x, int64_t next, int64_t count, float* totals) {
    VecF acc[R][C] = {};
    for (int64_t k = 0; k < count; ++k, ++w, x += W) {
      VecF lanes[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) lanes[c] = load(x + c * next);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) acc[r][c] += w[r * kPitch] * lanes[c];
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        float* to = totals + (c * kRows + r) * W;
        store(to, load(to) + acc[r][c]);
      }
  }
  template <int C>
  void add_rows(int64_t rows, const float* w, int64_t tile, int64_t k, int64_t count, float* totals) const {
    const float* from = x + tile * next + k * W;
    totals += tile * kRows * W;
    int64_t r = 0;
    for (; r + R <= rows; r += R) add_rows<R, C>(w + r * kPitch, from, next, count, totals + r * W);
    for (; r < rows; ++r) add_rows<1, C>(w + r * kPitch, from, next, count, totals + r * W);
  }

  // What a row's next columns are read from, or behind its end the next block's row: the machine foresees neither.
  void fetch(int64_t row, int64_t k) const {
    if (k >= a.w.columns) row += kRows, k = 0;
    const uint8_t* from = a.w.data + row * a.w.pitch + k * a.w.bits / 8;
    for (int64_t i = 0; i < kDepth * a.w.bits / 8; i += 64) __builtin_prefetch(from + i, 0, 2);
  }

  void run() const {
    const QuantWeight& w = a.w;
    parallel_stretches(a.tokens * w.rows * w.columns >= kParallelWork, pieces(w.rows, kRows), 1, [&](const auto& take) {
      const Buffer<float> block(kRows * kPitch), totals(tiles * kRows * W), results(W * kRows);
      const Buffer<float> parts(kRows * GroupParts::floats(w.groups));
      float bias[kRows];
      take([&](int64_t begin, int64_t) {
        const int64_t first = begin * kRows, rows = least(kRows, w.rows - first);
        const auto parts_of = [&](int64_t r) {
          return GroupParts(parts + r * GroupParts::floats(w.groups), w.groups);
        };
        for (int64_t r = 0; r < rows; ++r) parts_of(r).load(w, first + r);
        zero<float>(totals, tiles * kRows * W);
        for (int64_t k = 0; k < w.columns; k += kDepth) {
          const int64_t depth = least(kDepth, w.columns - k);
          for (int64_t r = 0; r < rows; ++r) {
            fetch(first + r, k + kDepth);
            decode(w, first + r, parts_of(r), k, depth, block + r * kPitch);
          }
          for (int64_t j = 0; j < depth; j += kChunk) {
            const int64_t count = least(kChunk, depth - j);
            int64_t tile = 0;
            for (; tile + 2 <= tiles; tile += 2) add_rows<2>(rows, block + j, tile, k + j, count, totals);
            if (tile < tiles) add_rows<1>(rows, block + j, tile, k + j, count, totals);
          }
        }
        load_bias(a, first, rows, bias);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          for (int64_t r = 0; r < kRows; r += W) {
            VecF v[W];
            for (int i = 0; i < W; ++i) v[i] = load(totals + (tile * kRows + r + i) * W);
            transpose<float>(v);
            for (int i = 0; i < W; ++i) store(results + i * kRows + r, v[i]);
          }
          for (int64_t m = tile * W; m < least((tile + 1) * W, a.tokens); ++m)
            store_results(a, m, first, rows, results + (m - tile * W) * kRows, 1, bias);
        }
      });
    });
  }

  static void product(const QuantMatmulArgs& all) {
    for (int64_t m = 0; m < all.tokens; m += kMost) {
      QuantMatmulArgs a = all;
      a.tokens = least(kMost, all.tokens - m), a.x = all.x.from(m), a.out = all.out.from(m);
      TokenLanes(a).run();
    }
  }
};

}  // namespace
#endif
