// Integer products on AMX: 16 rows of the weight by 16 tokens by 64 columns an instruction, int32, exact within a
// group. Without tile registers, in words (cpu_quant_row_block.h has those figures).
//
// Rows of C are rows of the weight, so that a scale is one number beside a vector of 16 tokens. A block of 64 rows is
//   unpacked a few lines at a time, stays in L1 and meets all tokens; tokens are laid for it once a call.
// Groups of at most kLaneGroup: B stays in two tiles, C is one tile: its products, the store of the one before, and the
//   float additions of the one before that. Alone, two products take 11 ns, the additions 9: so together 18, and 32
//   with four tiles of C stored and added up at once, which the core's window does not see past; 26 with the totals in
//   registers, where both sides are loaded for each group.
// Longer groups: 2 x 2 tiles, their sums in memory between parts of some lines; zeros subtracted exactly at the end.
//
// Bound, 4096 x 4096 of 4 bits in groups of 128, by the bytes at M = 16 (8.9 MB at 23 GB/s: 0.4 ms; products 0.07), at
//   M = 128 by products and additions (65536 times 18 ns on two cores: 0.6 ms; to unpack 0.1, tokens 0.2). Measured on
//   two virtual Sapphire Rapids cores that slow each other, minimum and median: 0.8, 0.9 and 2.3, 2.5 ms, where
//   bfloat16's dense product takes 1.6, 1.8 and 3.5, 3.8. 8 bits, a scale a row, M = 128: 4.6, 5.1, and torch._int_mm
//   of activations that are rounded already 4.5, 5.2. M = 16, groups of 128, times as fast as bfloat16: 2 bits 1.7; 3,
//   5 and 7 bits 1.3 (8 codes at a time by pdep: 0.7). 4 bits in groups of 64: 1.6, of 32 1.15. Shorter ones are still
//   slower, by a product, a store and the additions of each: 16 0.7, 7 0.4 (a line each: 0.3, 0.15).
// Lost: blocks of 32 rows (5 % at M = 128), parts of 512 to 1024 columns (5 to 20 %), codes fetched to L1, not L2;
//   up to four tokens (8 bits: 1.1 ms on one core, cpu_quant_int_lanes.h 0.7).
#pragma once
#include "quant_matmul/cpu_quant_row_block.h"

#if defined(__AVX512F__)
namespace {

// Tokens by 16, quads of columns across: [tile][line][16 quads][16 tokens][4]. Sums of their groups [tile][g][16].
struct TokenTiles {
  int64_t tiles, lines, groups;
  Buffer<int8_t> x;
  Buffer<float> sum;
  Buffer<double> exact;

  TokenTiles(const WholeLines& tokens, int64_t count, const LineLayout& layout, int64_t groups)
      : tiles(pieces(count, kTileLanes)), lines(layout.begin[groups]), groups(groups), x(tiles * lines * kTileSize),
        sum(tiles * groups * kTileLanes), exact(tiles * groups * kTileLanes) {
    parallel_if(count * lines * kTileBytes >= kParallelWork, tiles, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * kTileLanes, here = least(kTileLanes, count - first);
        for (int64_t line = 0; line < lines; ++line) {
          VecF v[kTileLanes] = {};
          for (int64_t j = 0; j < here; ++j)
            __builtin_memcpy(&v[j], tokens.x + (first + j) * tokens.pitch + line * kTileBytes, sizeof v[j]);
          transpose<float>(v);
          __builtin_memcpy(x + (t * lines + line) * kTileSize, v, sizeof v);
        }
        for (int64_t i = 0; i < groups * kTileLanes; ++i) {
          const int64_t j = i % kTileLanes, at = t * groups * kTileLanes + i;
          exact[at] = j < here ? double(tokens.sum[(first + j) * groups + i / kTileLanes]) : 0;
          sum[at] = float(exact[at]);
        }
      }
    });
  }
};

// A block of rows and what it is multiplied into. Results: [tile of tokens][tile of rows][16 rows][16 tokens].
struct RowTiles : RowBlock {
  const TokenTiles& tokens;
  Buffer<float> totals;
  Buffer<int32_t> sums;  // of two tiles; of all, for long groups

  RowTiles(const QuantWeight& w, const LineLayout& layout, const TokenTiles& tokens, int64_t lines, bool packed)
      : RowBlock(w, layout, lines, packed), tokens(tokens), totals(tokens.tiles * kRows * kTileLanes),
        sums(most(2, tokens.tiles * kMost) * kTileSums) {}

  const int8_t* token(int64_t tile, int64_t line) const { return tokens.x + (tile * tokens.lines + line) * kTileSize; }

  // totals += scale sums (+ rest sum x), groups first .. end of the codes by one tile of tokens. A product takes 50
  // cycles, of which the window of the core hides few: a tile is stored after the next one's products, and added after
  // those of the one behind. Tokens of up to two lines stay in registers.
  template <bool kRest>
  __attribute__((noinline)) void brief_groups(int64_t first, int64_t end, int64_t tile) const {
    int64_t n = 0, r = 0, g = first;  // r, g: what is added next
    const auto add = [&](const int32_t* from) {
      const float* s = scale + (g * count + r) * kTileRows;
      const float* o = rest + (g * count + r) * kTileRows;
      float* to = totals + (tile * count + r) * kTileSums;
      const VecF x = kRest ? load(tokens.sum + (tile * tokens.groups + g) * kTileLanes) : VecF{};
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        VecF total = load(to + i * kTileLanes);
        total += s[i] * (VecF)_mm512_cvtepi32_ps(_mm512_load_si512(from + i * kTileLanes));
        if (kRest) total += o[i] * x;
        store(to + i * kTileLanes, total);
      }
      if (++r == count) r = 0, ++g;
    };
    const auto step = [&]<int L, int C>(const uint8_t* code, const int8_t* x, int64_t lines)
                          __attribute__((always_inline)) {
      zero_tile<C>();
      if (L == 1 || L == 2) load_tile<4>(code, pitch), add_products<C, 4, 6>();
      if (L == 2) load_tile<5>(code + kTileBytes, pitch), add_products<C, 5, 7>();
      for (int64_t i = 0; L == 0 && i < lines; ++i) {
        load_tile<4>(code + i * kTileBytes, pitch), load_tile<6>(x + i * kTileSize, kTileBytes);
        add_products<C, 4, 6>();
      }
      if (n > 0) store_tile<1 - C>(sums + (1 - C) * kTileSums, kTileBytes);
      if (n > 1) add(sums + C * kTileSums);
    };
    const auto steps = [&]<int L>(const uint8_t* code, const int8_t* x, int64_t lines) {
      if (L >= 1) load_tile<6>(x, kTileBytes);
      if (L == 2) load_tile<7>(x + kTileSize, kTileBytes);
      for (int64_t row = 0; row < count; ++row, ++n, code += kTileRows * pitch) {
        if (n % 2) step.template operator()<L, 1>(code, x, lines);
        else step.template operator()<L, 0>(code, x, lines);
      }
    };
    for (int64_t group = first; group < end; ++group) {
      const int64_t lines = layout.begin[group + 1] - layout.begin[group];
      const uint8_t* code = codes + (layout.code_line(group) - layout.code_line(first)) * kTileBytes;
      const int8_t* x = token(tile, layout.begin[group]);
      if (lines == 1) steps.template operator()<1>(code, x, lines);
      else if (lines == 2) steps.template operator()<2>(code, x, lines);
      else steps.template operator()<0>(code, x, lines);
    }
    if (n % 2) store_tile<0>(sums, kTileBytes);
    else store_tile<1>(sums + kTileSums, kTileBytes);
    if (n > 1) add(sums + n % 2 * kTileSums);
    add(sums + (n + 1) % 2 * kTileSums);
  }

  template <bool kRest>
  void brief_groups(const Source& from, int64_t first, int64_t end) const {
    for (int64_t tile = 0; in_registers && tile < tokens.tiles; ++tile) brief_groups<kRest>(first, end, tile);
    for (int64_t tile = 0; !in_registers && tile < tokens.tiles; tile += 2)
      by_planes(from.planes, [&]<int P>() {
        if (tile + 1 < tokens.tiles) in_words<kRest, P, 2>(from, first, end, tile);
        else in_words<kRest, P, 1>(from, first, end, tile);
      });
  }

  // The same without tile registers: R rows by T tiles of tokens, their totals in registers; of unpacked codes (P = 0)
  // or P planes. Codes are unsigned: sums start with minus the middle one times a group's.
  template <bool kRest, int P, int T>
  __attribute__((noinline)) void in_words(const Source& from, int64_t first, int64_t end, int64_t tile) const {
    constexpr int R = kAtOnce<P, T>, Q = kApart<P, T>;
    const int64_t rows = count * kTileRows, next = tokens.lines * kTileSize, pitch = from.pitch;
    for (int64_t r = 0; r < rows; r += R) {
      float* to = totals + (tile * rows + r) * kTileLanes;
      VecF total[R][T];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) total[i][t] = load(to + (t * rows + i) * kTileLanes);
      const float *s = scale + first * rows + r, *o = rest + first * rows + r;
      const float* x_sums = tokens.sum + (tile * tokens.groups + first) * kTileLanes;
      for (int64_t g = first; g < end; ++g, s += rows, o += rows, x_sums += kTileLanes) {
        const uint8_t* code = from.at + r * pitch + (layout.code_line(g) - layout.code_line(first)) * from.line_bytes;
        const int8_t* x = token(tile, layout.begin[g]);
        VecF sum[T];
        __m512i acc[R][Q][T] = {};
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          sum[t] = load(x_sums + t * tokens.groups * kTileLanes);
#pragma GCC unroll 16
          for (int i = 0; i < R; ++i) acc[i][Q - 1][t] = _mm512_cvtps_epi32((__m512)(sum[t] * -128.0f));
        }
        multiply_group<P>(code, pitch, x, next, g, acc);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
          for (int t = 0; t < T; ++t) {
            total[i][t] += s[i] * (VecF)_mm512_cvtepi32_ps(join_planes(acc[i], t));
            if (kRest) total[i][t] += o[i] * sum[t];
          }
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) store(to + (t * rows + i) * kTileLanes, total[i][t]);
    }
  }

  template <int P, int T>
  __attribute__((noinline)) void lines_in_words(
      const Source& from, int64_t line, int64_t lines, bool fresh, int64_t tile) const {
    constexpr int R = kAtOnce<P, T>, Q = kApart<P, T>;
    const int64_t next = tokens.lines * kTileSize, rows = count * kTileRows;
    const int8_t* x = token(tile, line);
    __m512i start[T];
    starts(x, next, lines * 16, start);
    for (int64_t r = 0; r < rows; r += R) {
      const auto own = [&](int i, int t) { return sums + ((tile + t) * rows + r + i) * kTileLanes; };
      __m512i acc[R][Q][T] = {};
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t)
          acc[i][Q - 1][t] = fresh ? start[t] : _mm512_add_epi32(start[t], _mm512_load_si512(own(i, t)));
      multiply_lines<P>(from.at + r * from.pitch, from.pitch, x, next, lines, acc);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) _mm512_store_si512(own(i, t), join_planes(acc[i], t));
    }
  }

  // sums (+)= R tiles of rows from `row` on by T of tokens, some lines of a long group.
  template <int R, int T>
  __attribute__((noinline)) void add_lines(int64_t line, int64_t lines, bool fresh, int64_t row, int64_t tile) const {
    int32_t *c0 = sums + (tile * count + row) * kTileSums, *c1 = c0 + count * kTileSums;
    if (fresh) {
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    } else {
      load_tile<0>(c0, kTileBytes);
      if (T > 1) load_tile<1>(c1, kTileBytes);
      if (R > 1) load_tile<2>(c0 + kTileSums, kTileBytes);
      if (R > 1 && T > 1) load_tile<3>(c1 + kTileSums, kTileBytes);
    }
    const uint8_t* code = codes + row * kTileRows * pitch;
    const int8_t *x0 = token(tile, line), *x1 = token(tile + T - 1, line);
    for (int64_t i = 0; i < lines; ++i, code += kTileBytes, x0 += kTileSize, x1 += kTileSize) {
      load_tile<4>(code, pitch), load_tile<6>(x0, kTileBytes);
      add_products<0, 4, 6>();
      if (T > 1) load_tile<7>(x1, kTileBytes), add_products<1, 4, 7>();
      if (R > 1) load_tile<5>(code + kTileRows * pitch, pitch), add_products<2, 5, 6>();
      if (R > 1 && T > 1) add_products<3, 5, 7>();
    }
    store_tile<0>(c0, kTileBytes);
    if (T > 1) store_tile<1>(c1, kTileBytes);
    if (R > 1) store_tile<2>(c0 + kTileSums, kTileBytes);
    if (R > 1 && T > 1) store_tile<3>(c1 + kTileSums, kTileBytes);
  }
  void add_lines(const Source& from, int64_t line, int64_t lines, bool fresh) const {
    for (int64_t tile = 0; !in_registers && tile < tokens.tiles; tile += 2)
      by_planes(from.planes, [&]<int P>() {
        if (tile + 1 < tokens.tiles) lines_in_words<P ? P : 1, 2>(from, line, lines, fresh, tile);
        else lines_in_words<P ? P : 1, 1>(from, line, lines, fresh, tile);
      });
    for (int64_t tile = 0; in_registers && tile < tokens.tiles; tile += 2)
      for (int64_t row = 0; row < count; row += 2) {
        const bool two_rows = row + 1 < count, two = tile + 1 < tokens.tiles;
        if (two_rows && two) add_lines<2, 2>(line, lines, fresh, row, tile);
        else if (two_rows) add_lines<2, 1>(line, lines, fresh, row, tile);
        else if (two) add_lines<1, 2>(line, lines, fresh, row, tile);
        else add_lines<1, 1>(line, lines, fresh, row, tile);
      }
  }

  // totals += scale (sums - zero sum x) + offset sum x, the difference in double, which holds it.
  void add_long_group(int64_t g, float middle, bool more) const {
    for (int64_t tile = 0; tile < tokens.tiles; ++tile) {
      const double* x = tokens.exact + (tile * tokens.groups + g) * kTileLanes;
      for (int64_t r = 0; r < count * kTileRows; ++r) {
        const int64_t at = (tile * count * kTileRows + r) * kTileLanes, i = g * count * kTileRows + r;
        float* __restrict to = totals + at;
        const int32_t* __restrict from = sums + at;
        if (more) {
          const double from_zero = (double(middle) - double(zero[i])) * double(1 << layout.shift);
          for (int64_t j = 0; j < kTileLanes; ++j) to[j] += scale[i] * float(double(from[j]) + from_zero * x[j]);
          if (w.offsets.data)
            for (int64_t j = 0; j < kTileLanes; ++j) to[j] += offset[i] * float(x[j]);
        } else {
          for (int64_t j = 0; j < kTileLanes; ++j) to[j] += scale[i] * float(from[j]);
        }
      }
    }
  }
};

static void tile_product(const QuantMatmulArgs& a) {
  constexpr int64_t kRows = RowTiles::kRows;
  const QuantWeight& w = a.w;
  const LineLayout layout(w);
  const WholeLines whole(a, layout);
  const TokenTiles tokens(whole, a.tokens, layout, w.groups);
  const float middle = float(1 << w.bits >> 1);
  const bool more = w.has_rest(middle), brief = w.groups > 1 && w.group <= kLaneGroup;
  // Lines of groups, and of a long one, that a block's rows have at a time: unpacked in L1, or only their tokens.
  const bool packed = RowTiles::may_stay(w, layout);
  const int64_t block_lines = packed ? 16 : 4, part_lines = packed ? 16 : 8;
  const int64_t block = most(1, block_lines * kLine / layout.group);  // groups
  const int64_t lines = brief ? pieces(block * layout.group, kLine) + 1 : part_lines;
  parallel_stretches(a.tokens * w.rows * w.columns >= kParallelWork, pieces(w.rows, kRows), 1, [&](const auto& take) {
    const Tiles registers;
    RowTiles rows(w, layout, tokens, lines, packed);
    const CodeLines codes(w, layout, rows.flip());
    const Buffer<float> memory(kTileRows * RowParts::floats(w.groups) + kTileLanes), results(kTileLanes * kRows);
    float bias[kRows];
    take([&](int64_t piece, int64_t) {
      const int64_t first = piece * kRows, count = least(kRows, w.rows - first);
      rows.load_parts(first, count, middle, memory);
      zero<float>(rows.totals, tokens.tiles * rows.count * kTileSums);
      for (int64_t g = 0; g < w.groups;) {
        const int64_t stop = brief ? least(g + block, w.groups) : g + 1;
        if (brief) {
          const int64_t line = layout.code_line(g), end = pieces(least(stop * layout.group, w.columns), kLine);
          const auto from = rows.source(codes, first, count, line, end);
          if (more) rows.brief_groups<true>(from, g, stop);
          else rows.brief_groups<false>(from, g, stop);
        } else {
          const int64_t start = layout.begin[g], all = layout.begin[g + 1] - start;
          for (int64_t line = 0; line < all; line += part_lines) {
            const int64_t here = least(part_lines, all - line), own = layout.code_line(g) + line;
            rows.add_lines(rows.source(codes, first, count, own, own + here), start + line, here, line == 0);
          }
          rows.add_long_group(g, middle, more);
        }
        g = stop;
      }
      load_bias(a, first, count, bias);
      for (int64_t tile = 0; tile < tokens.tiles; ++tile)
        rows.write(a, rows.totals + tile * rows.count * kTileSums, first, count, tile * kTileLanes, whole.scale, bias,
                   results);
    });
  });
}

}  // namespace
#endif
