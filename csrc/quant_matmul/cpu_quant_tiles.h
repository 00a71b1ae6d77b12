// Products of many tokens with a low-bit weight on the tile registers, in bfloat16 whatever the dtype (integer codes as
// bytes, most of them: cpu_quant_digit_tiles.h): a number is the sum of one to three bfloat16 parts, each the rest of
// what comes before it rounded, and a product that of parts.
//
//   out       parts of w   products                       relative error of a product
//   bfloat16  1 (2)        x_0 w_0 (x_0 w_1)              2^-9, of w too (of x alone)
//   float16   2            x_0 w_0, x_0 w_1, x_1 w_0      2^-17
//   float32   3            x_i w_j with i + j < 3: six    2^-26
//
// Codes that are exact in bfloat16 (integers, small floats), in groups of 32 columns and more (for bfloat16 of 128,
//   and 7 or 8 bits: int4 of 128 took 1.2 times as long, at 128 tokens 4.2 ms for 3.5), are one part, and a group's sum
//   is multiplied by its scale: 1, 2 or 3 products. What zeros and offsets differ from the middle code meets the sums
//   of the tokens' groups, as columns of their own.
// Tables whose numbers times their scales are exact in bfloat16 (MX: a power of two; NVFP4: a float8) are one part
//   again, and nothing is scaled but by `outer`, at the end.
// Otherwise, in bfloat16, one part of scale and code where a row has several groups: as exact as what eager torch
//   multiplies, 2.3e-3 with the result's own rounding, where two parts leave 1.7e-3 in 1.6 times as long. In one group
//   rounding errors of few numbers do not average (3.3e-3 of int2): two parts.
//
// A block of rows (block_rows x block_columns) is decoded into tiles in L2, 16 rows of 32 columns as they lie, and
// meets tokens that were laid out once a call, in pairs of columns; sums of `depth` columns leave the registers for
// float32 totals, which keeps float32's digits (1.3e-7 at K = 4096).
// Bound by decoding below 32 tokens, above by products (16 cycles for 16 x 16 x 32, 16 times the float32 rate) and the
// tiles' loads from L2. 4096 x 4096 of int4 in groups of 128, two cores of a Sapphire Rapids, ms, the least of turns:
//
//   tokens   dense bfloat16   bfloat16   float16   float32
//   16       1.7              1.9        2.4       2.8
//   128      3.5              3.7        5.0       6.4
//
// bfloat16 tokens, dense / this, medians in turns of 16, 64 and 128 tokens: groups of 32 1.1, 1.25, 1.4; nf4 in groups
//   of 64 1.0, 1.2, 1.45; mxfp4 1.1, 1.2, 1.4; nvfp4 1.05, 1.1, 1.35. At 128 0.8 to 0.9 and nvfp4 at 16 0.67 before
//   tile_steps (the general loop around a group keeps its variables on the stack: 60 instructions for 32 weights, of
//   which 10 are vectors') and before shares for whichever thread is free. Groups of 32 in float32 as digits of 8 bits,
//   cpu_quant_digit_tiles.h, take 1.2 times as long (half of each tile of bytes is empty).
// Lost: blocks of 64 rows for many tokens, which come from L3 for each (1.5 times as long); the next tiles prefetched
//   (512 tokens too: 1 to 3 % longer); 64 tokens or 128 columns in L1 at once (equal); 256 tokens a pass (8 % at 512);
//   a group's sums added to the totals behind the next group's products, two and four groups at once too (no faster at
//   16 and 128 tokens, though all stores and additions are 0.9 ms of 128's 3.9); blocks of 512 rows (4 %);
//   tiles of zeros loaded instead of tilezero: equal, int4 at 16 tokens 1.3 times as long;
// a table of scale and zero in three parts where codes are exact (float32 with zeros: 3 times as long at 16 tokens).
// An output's additions have one order, whatever the number of threads.
//
// Left to the float path: each token whose largest number is no number, or so large or small that a part of it or a sum
// of codes would leave bfloat16's range (its subnormals are 0 here), and rows of which another's result is not finite,
// because a weight or a scale is not: the parts of Inf are Inf and NaN.
#pragma once
#include "common/words.h"
#include "quant_matmul/cpu_quant_tile_rows.h"
#include "quant_matmul/cpu_quant_tokens.h"

#if defined(__AVX512F__)
namespace {

static inline int parts_of(QuantDtype dtype) {
  return dtype == QuantDtype::bf16 ? 1 : dtype == QuantDtype::f16 ? 2 : 3;
}

// Tiles of one side, [strip of 16][step of 32][part].
struct Side {
  const char* tiles;
  int64_t pitch;  // bytes of a strip
  int parts;
};

// Eight rows of a strip of a by C strips of b without tile registers; products of parts in the same order.
template <int C>
static __attribute__((noinline)) void multiply_words(
    const Side& a, const Side& b, int64_t steps, const float* scale, float* totals, int64_t next) {
  constexpr int R = 8;
  const int limit = a.parts > b.parts ? a.parts : b.parts;
  __m512 sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s)
    for (int j = 0; j < b.parts; ++j)
      for (int i = 0; i < a.parts && i + j < limit; ++i)
        add_words(a.tiles + (s * a.parts + i) * kTile, kTileBytes, b.tiles + (s * b.parts + j) * kTile, kTileBytes,
                  b.pitch, 16, sums);
#pragma GCC unroll 2
  for (int c = 0; c < C; ++c, totals += next)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      store(totals + r * 16, load(totals + r * 16) + scale[r] * (VecF)sums[r][c]);
}

// totals[r][t] += scale_r (sum over steps of a_r b_t): R strips of a, T of b, totals of 16 x 16, [t][r] a `next` apart.
template <int R, int T>
static __attribute__((noinline)) void multiply_tiles(
    const Side& a, const Side& b, int64_t steps, const float* scale, int64_t scale_pitch, float* totals, int64_t next) {
  static_assert((R == 2 && T == 2) || (R == 4 && T == 1));
  if (!scalekern::has_amx()) {
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 16; half += 8)
        multiply_words<T>({a.tiles + r * a.pitch + half * kTileBytes, a.pitch, a.parts}, b, steps,
                          scale + r * scale_pitch + half, totals + r * 256 + half * 16, next);
    return;
  }
  const int limit = a.parts > b.parts ? a.parts : b.parts;
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t s = 0; s < steps; ++s)
    for (int j = 0; j < b.parts; ++j) {
      const char* token = b.tiles + (s * b.parts + j) * kTile;
      load_tile<6>(token, kTileBytes);
      if constexpr (T == 2) load_tile<7>(token + b.pitch, kTileBytes);
      for (int i = 0; i < a.parts && i + j < limit; ++i) {
        const char* row = a.tiles + (s * a.parts + i) * kTile;
        if (T == 1 || a.parts > 1 || j == 0) {
          load_tile<4>(row, kTileBytes);
          load_tile<5>(row + a.pitch, kTileBytes);
        }
        add_bf16_products<0, 4, 6>();
        add_bf16_products<1, 5, 6>();
        if constexpr (T == 2) {
          add_bf16_products<2, 4, 7>();
          add_bf16_products<3, 5, 7>();
        } else {
          load_tile<7>(row + 2 * a.pitch, kTileBytes);
          load_tile<4>(row + 3 * a.pitch, kTileBytes);
          add_bf16_products<2, 7, 6>();
          add_bf16_products<3, 4, 6>();
        }
      }
    }
  alignas(64) float sums[4][256];
  store_tile<0>(sums[0], kTileBytes), store_tile<1>(sums[1], kTileBytes);
  store_tile<2>(sums[2], kTileBytes), store_tile<3>(sums[3], kTileBytes);
  for (int i = 0; i < 4; ++i) {
    float* to = totals + (i / R) * next + (i % R) * 256;
    const float* by = scale + (i % R) * scale_pitch;
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) store(to + row * 16, load(to + row * 16) + by[row] * load(sums[i] + row * 16));
  }
}

// The tokens in pairs of columns: row i of a tile is columns 2 i and 2 i + 1 of 16 tokens.
class TokenTiles {
 public:
  static constexpr int64_t kColumns = 512;  // of a piece of work

  TokenTiles(const QuantMatmulArgs& a, int parts)
      : parts_(parts), steps_(pieces(a.w.columns, kTileColumns)), strips_(pieces(a.tokens, 16)),
        tiles_(strips_ * steps_ * parts * kTile), scale_(strips_ * 16), largest_(strips_ * 16 * chunks(a)),
        held_(strips_ * 16) {
    for (int64_t m = 0; m < strips_ * 16; ++m) scale_[m] = 1, held_[m] = true;
    QuantMatmulArgs rounded_only = a;
    if (a.activation_max == 0) rounded_only.tokens = 0;
    const Tokens rounded(rounded_only, 1, scale_);
    parallel_if(a.tokens * a.w.columns >= kParallelWork, strips_ * chunks(a), [&](int64_t begin, int64_t end) {
      const Buffer<float> lines(16 * kColumns);
      for (int64_t piece = begin; piece < end; ++piece) lay(a, rounded, piece / chunks(a), piece % chunks(a), lines);
    });
    for (int64_t m = 0; m < a.tokens; ++m) {
      uint32_t most = 0;
      for (int64_t i = m * chunks(a); i < (m + 1) * chunks(a); ++i) most = largest_[i] > most ? largest_[i] : most;
      held_[m] = most == 0 || (most >= kSmallest && most <= kLargest);
    }
  }
  bool held(int64_t m) const { return held_[m]; }
  float scale(int64_t m) const { return scale_[m]; }
  int64_t strips() const { return strips_; }
  Side side(int64_t strip, int64_t step) const {
    return {tiles_ + (strip * steps_ + step) * parts_ * kTile, steps_ * parts_ * kTile, parts_};
  }

 private:
  static constexpr uint32_t kSmallest = (127u - 60) << 23, kLargest = (127u + 100) << 23;  // 2^-60, 2^100
  static int64_t chunks(const QuantMatmulArgs& a) { return pieces(a.w.columns, kColumns); }

  void lay(const QuantMatmulArgs& a, const Tokens& rounded, int64_t strip, int64_t chunk, float* lines) {
    const int64_t first = chunk * kColumns, count = least(kColumns, a.w.columns - first);
    const int64_t padded = round_up(count, kTileColumns), given = least(16, a.tokens - strip * 16);
    for (int64_t t = 0; t < given; ++t) {
      float* line = lines + t * kColumns;
      const int64_t m = strip * 16 + t;
      if (a.activation_max != 0) __builtin_memcpy(line, rounded[m] + first, sizeof(float) * size_t(count));
      else load_part(a.x, m * a.x.row + first * a.x.column, a.x.column, count, line);
      zero(line + count, padded - count);
      Words most = {};
      for (int64_t k = 0; k < padded; k += 16) {
        const Words magnitude = Words(load(line + k)) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
      }
      uint32_t all = 0;
      for (int i = 0; i < 16; ++i) all = most[i] > all ? most[i] : all;
      largest_[m * chunks(a) + chunk] = all;
    }
    zero(lines + given * kColumns, (16 - given) * kColumns);
    char* to = tiles_ + (strip * steps_ + first / kTileColumns) * parts_ * kTile;
    for (int64_t k = 0; k < padded; k += kTileColumns, to += parts_ * kTile) {
      for (int t = 0; t < 16; ++t) {
        const float* line = lines + t * kColumns + k;
        store_parts(load(line), load(line + 16), parts_, to + t * kTileBytes, kTile);
      }
      for (int i = 0; i < parts_; ++i) {
        VecF v[16];
        float* tile = reinterpret_cast<float*>(to + i * kTile);
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) v[t] = load(tile + t * 16);
        transpose<float>(v);
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) store(tile + t * 16, v[t]);
      }
    }
  }

  int parts_;
  int64_t steps_, strips_;
  Buffer<char> tiles_;
  Buffer<float> scale_;
  Buffer<uint32_t> largest_;
  Buffer<bool> held_;
};

struct TileProduct {
  static constexpr int64_t kMostRows = 256, kBlockTokens = 512, kStay = 256;

  const QuantMatmulArgs& a;
  const int out_parts = parts_of(a.out.dtype);
  const float middle = a.w.table ? 0.0f : float(a.w.bits == 1 ? 0 : 1 << (a.w.bits - 1));
  const bool exact = exact_when_scaled(a.w);  // but for `outer`
  const bool scaled = !exact && exact_in_bf16(a.w) && (a.activation_max == 0 || !a.w.has_rest(middle)) &&
      (a.w.groups == 1 || (a.w.group % kTileColumns == 0 && (out_parts > 1 || (a.w.bits > 6 && a.w.group >= 128))));
  const int w_parts = exact || scaled ? 1 : a.w.groups > 1 ? out_parts : int(most(2, out_parts));
  const bool rest = scaled && a.w.has_rest(middle);
  const int rest_parts = out_parts == 1 ? 2 : 3;
  const int x_parts = a.activation_max != 0 ? 1 : int(least(parts_of(a.x.dtype), out_parts + 1));
  // Few tokens: a block that meets them once stays in L2. Many: the more rows, the less often they come from L3.
  const int64_t block_rows =
      a.tokens <= 32 ? 64 : most(64, least(kMostRows, a.w.rows / (4 * scalekern::num_threads()) / 64 * 64));
  // Few tokens: long pieces of a row. 16 tokens, 512 to 2,048 columns: mxfp8 2.26 to 2.00 ms, e4m3 in groups of 64 2.43
  // to 2.07, nf4 2.13 to 1.68; 256 columns, which stay in L1, 5 to 20 % longer than 512.
  const int64_t block_columns = (a.tokens <= 32 ? 2048 : 512) / w_parts / kTileColumns * kTileColumns;
  // Columns of a sum: 32 tokens of them stay in L1, and float32 keeps its digits.
  const int64_t depth = x_parts > 2 || w_parts > 2 ? 128 : x_parts > 1 || w_parts > 1 ? 256 : 512;

  // Without tile registers a bfloat16 product takes half of a float32 one.
  bool is_faster_than_floats() const {
    return scalekern::has_amx() || (scalekern::has_bf16() && x_parts == 1 && w_parts == 1);
  }

  // Columns [k, k + count) of a block's rows as tiles.
  void decode_block(int64_t first, int64_t rows, int64_t k, int64_t count, const float* memory, float* line,
                    char* tiles) const {
    QuantWeight codes = a.w;
    float one[3] = {1, middle, 0};
    if (scaled) codes.groups = 1, codes.zeros = codes.offsets = {}, codes.zero = middle, codes.base = 0, codes.step = 1;
    const int64_t floats = GroupParts::floats(a.w.groups), pitch = block_columns / kTileColumns * w_parts * kTile;
    const auto own = [&](int64_t r) {
      return scaled ? GroupParts(one, 1) : GroupParts(const_cast<float*>(memory) + r * floats, a.w.groups);
    };
    // The next columns of these rows, after the last the first of the next.
    const bool last = k + count == a.w.columns;
    const int64_t ahead = (last ? -k : count) * a.w.bits / 8 + (last ? rows * a.w.pitch : 0);
    switch (w_parts) {
      case 1: return tile_rows<1>(codes, first, rows, own, k, count, ahead, line, tiles, pitch);
      case 2: return tile_rows<2>(codes, first, rows, own, k, count, ahead, line, tiles, pitch);
      case 3: return tile_rows<3>(codes, first, rows, own, k, count, ahead, line, tiles, pitch);
    }
  }

  // totals[t][r] += rest_r . sums of the groups of x_t, as columns of their own.
  void add_rest(const TokenTiles& sums, int64_t rows, int64_t strip, int64_t strips, const float* memory, float* line,
                char* tiles, float* totals) const {
    const int64_t G = a.w.groups, steps = pieces(G, kTileColumns), pitch = steps * rest_parts * kTile;
    const float one[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (int64_t r = 0; r < rows; ++r) {
      const GroupParts part(const_cast<float*>(memory) + r * GroupParts::floats(G), G);
      for (int64_t g = 0; g < G; ++g) line[g] = part.offset[g] - part.scale[g] * (part.zero[g] - middle);
      zero(line + G, steps * kTileColumns - G);
      char* to = tiles + r / 16 * pitch + r % 16 * kTileBytes;
      for (int64_t s = 0; s < steps; ++s)
        store_parts(load(line + s * 32), load(line + s * 32 + 16), rest_parts, to + s * rest_parts * kTile, kTile);
    }
    multiply_strips(rows, strips, {tiles, pitch, rest_parts}, sums.side(strip, 0), steps, one, 0, totals);
  }

  void multiply_strips(int64_t rows, int64_t strips, Side w, Side x, int64_t steps, const float* scale,
                       int64_t scale_pitch, float* totals) const {
    const int64_t next = block_rows * 16;
    for (int64_t t = 0; t < strips; t += 2)
      for (int64_t r = 0; r < pieces(rows, 16); r += t + 1 < strips ? 2 : 4) {
        const Side own{w.tiles + r * w.pitch, w.pitch, w.parts}, tokens{x.tiles + t * x.pitch, x.pitch, x.parts};
        float* sums = totals + t * next + r * 256;
        if (t + 1 < strips) multiply_tiles<2, 2>(own, tokens, steps, scale + r * scale_pitch, scale_pitch, sums, next);
        else multiply_tiles<4, 1>(own, tokens, steps, scale + r * scale_pitch, scale_pitch, sums, next);
      }
  }

  // Whether all results are finite.
  bool block(const TokenTiles& tokens, const TokenTiles& sums, int64_t first, int64_t strip, int64_t strips,
             char* tiles, float* totals, float* memory, float* scales, float* line) const {
    const QuantWeight& w = a.w;
    const int64_t rows = least(block_rows, w.rows - first), row_strips = block_rows / 16, next = row_strips * 256;
    const int64_t pitch = block_columns / kTileColumns * w_parts * kTile;
    QuantWeight inner = w;
    if (exact && w.outer.data) {
      load_part(w.outer, first * w.outer.row, w.outer.row, rows, scales);
      inner.outer = {};
    }
    for (int64_t r = 0; r < rows; ++r) {
      const GroupParts part(memory + r * GroupParts::floats(w.groups), w.groups);
      part.load(inner, first + r);
      for (int64_t g = 0; scaled && g < w.groups; ++g) scales[g * block_rows + r] = part.scale[g];
    }
    zero(totals, strips * next);
    for (int64_t k = 0; k < w.columns; k += block_columns) {
      const int64_t end = least(k + block_columns, w.columns);
      decode_block(first, rows, k, end - k, memory, line, tiles);
      // What stays of 32 tokens in L1 while all rows pass by: 16 KB beside as much of the rows (of 32 KB, 4 % slower),
      // where that cuts no sum.
      const bool short_groups = scaled && w.groups > 1 && kStay % w.group == 0;
      const int64_t stay = x_parts > 1 ? depth : short_groups ? kStay : block_columns;
      for (int64_t t = 0; t < strips; t += 2)
        for (int64_t part = k; part < end; part += stay)
          for (int64_t r = 0; r < pieces(rows, 16); r += t + 1 < strips ? 2 : 4)
            for (int64_t from = part, to; from < least(end, part + stay); from = to) {
              const int64_t g = scaled && w.groups > 1 ? from / w.group : 0;
              to = least(least(end, part + stay), from + depth);
              if (scaled && w.groups > 1) to = least(to, (g + 1) * w.group);
              const int64_t steps = pieces(to - from, kTileColumns), step = (from - k) / kTileColumns;
              const Side b = tokens.side(strip + t, from / kTileColumns);
              const Side weights{tiles + r * pitch + step * w_parts * kTile, pitch, w_parts};
              const float* scale = scales + g * block_rows + r * 16;
              float* to_sums = totals + t * next + r * 256;
              if (t + 1 < strips) multiply_tiles<2, 2>(weights, b, steps, scale, 16, to_sums, next);
              else multiply_tiles<4, 1>(weights, b, steps, scale, 16, to_sums, next);
            }
    }
    if (rest) add_rest(sums, rows, strip, strips, memory, line, tiles, totals);
    return store_block(tokens, sums, first, rows, strip, strips, totals);
  }

  bool store_block(const TokenTiles& tokens, const TokenTiles& sums, int64_t first, int64_t rows, int64_t strip,
                   int64_t strips, const float* totals) const {
    float bias[kMostRows];
    alignas(64) float lines[16][kMostRows];
    load_bias(a, first, rows, bias);
    VecF strange = {};
    for (int64_t t = 0; t < strips; ++t) {
      VecF own = {};
      for (int64_t r = 0; r < pieces(rows, 16); ++r) {
        VecF v[16];
        for (int i = 0; i < 16; ++i) v[i] = load(totals + (t * block_rows / 16 + r) * 256 + i * 16);
        for (int i = 0; i < 16 && r * 16 + i < rows; ++i) own += v[i] * 0.0f;
        transpose<float>(v);
        for (int i = 0; i < 16; ++i) store(lines[i] + r * 16, v[i]);
      }
      const int64_t m = (strip + t) * 16;
      for (int i = 0; i < 16; ++i) strange[i] += held(tokens, sums, m + i) ? own[i] : 0;
      for (int64_t i = 0; i < least(16, a.tokens - m); ++i)
        store_results(a, m + i, first, rows, lines[i], tokens.scale(m + i), bias);
    }
    return sum_of<float>(strange) == 0;
  }

  bool held(const TokenTiles& tokens, const TokenTiles& sums, int64_t m) const {
    return tokens.held(m) && (!rest || sums.held(m));
  }

  // Sums of the groups of each token, in lanes.
  void sum_groups(float* sums) const {
    const QuantWeight& w = a.w;
    parallel_if(a.tokens * w.columns >= kParallelWork, a.tokens, [&](int64_t begin, int64_t end) {
      const Buffer<float> line(TokenTiles::kColumns);
      for (int64_t m = begin; m < end; ++m)
        for (int64_t g = 0; g < w.groups; ++g) {
          const int64_t stop = w.groups == 1 ? w.columns : least(w.columns, (g + 1) * w.group);
          VecF sum = {};
          for (int64_t k = g * w.group; k < stop; k += TokenTiles::kColumns) {
            const int64_t count = least(TokenTiles::kColumns, stop - k);
            load_part(a.x, m * a.x.row + k * a.x.column, a.x.column, count, line);
            zero(line + count, round_up(count, 16) - count);
            for (int64_t i = 0; i < count; i += 16) sum += load(line + i);
          }
          sums[m * w.groups + g] = sum_of<float>(sum);
        }
    });
  }

  // What is not finite goes to `redo`, which takes a product of some rows, or of some tokens.
  template <class Redo>
  void run(const Redo& redo) const {
    const QuantWeight& w = a.w;
    const TokenTiles tokens(a, x_parts);
    const int64_t G = w.groups;
    const Buffer<float> group_sums(rest ? a.tokens * G : 0);
    QuantMatmulArgs of_sums = a;
    of_sums.w.columns = G, of_sums.x = {static_cast<float*>(group_sums), QuantDtype::f32, G, 1};
    if (rest) sum_groups(group_sums);
    else of_sums.tokens = 0;
    const TokenTiles sums(of_sums, rest_parts);
    const int64_t row_blocks = pieces(w.rows, block_rows), token_strips = kBlockTokens / 16;
    const int64_t token_blocks = pieces(tokens.strips(), token_strips);
    const Buffer<bool> strange(row_blocks * token_blocks);
    const bool worth_it = a.tokens * w.rows * w.columns >= kParallelWork;
    parallel_stretches(worth_it, row_blocks * token_blocks, 1, [&](const auto& take) {
      const int64_t most_strips = least(token_strips, tokens.strips());
      const int64_t columns = most(block_columns * w_parts, rest ? round_up(G, kTileColumns) * rest_parts : 0);
      const Buffer<char> tiles(block_rows * columns * 2);
      const Buffer<float> totals(most_strips * 16 * block_rows), memory(block_rows * GroupParts::floats(w.groups));
      const Buffer<float> scales(block_rows * w.groups), line(most(block_columns, G) + kTileColumns);
      for (int64_t i = 0; i < block_rows * w.groups; ++i) scales[i] = 1;
      const Tiles registers;
      take([&](int64_t i, int64_t) {
        const int64_t first = i / token_blocks * block_rows, strip = i % token_blocks * token_strips;
        const int64_t strips = least(token_strips, tokens.strips() - strip);
        strange[i] = !block(tokens, sums, first, strip, strips, tiles, totals, memory, scales, line);
      });
    });
    for (int64_t i = 0; i < row_blocks * token_blocks; ++i) {
      if (!strange[i]) continue;
      QuantMatmulArgs some = a;
      const int64_t first = i / token_blocks * block_rows;
      some.w = w.from(first, least(block_rows, w.rows - first));
      some.out = a.out.behind(first * a.out.column), some.bias = a.bias.behind(first * a.bias.column);
      redo(some);
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      QuantMatmulArgs some = a;
      for (some.tokens = 0; t < a.tokens && !held(tokens, sums, t); ++t) ++some.tokens;
      if (some.tokens == 0) continue;
      some.x = a.x.from(t - some.tokens), some.out = a.out.from(t - some.tokens);
      redo(some);
    }
  }
};

}  // namespace
#endif
