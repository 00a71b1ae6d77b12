// A block of rows of a weight, whose rows C's are: codes, as lines of bytes or as they are stored, and their groups'
// parts. For tile registers (common/amx.h); and without them for words of four bytes, each to all lanes.
//
// Words, 4096 x 4096 of int4 in groups of 128 on two cores of a Zen 5 at 4.2 GHz. Bound by products, 8.4 a ns and core:
//   16 tokens of int8 0.25 ms, 128 1.98; of two digits (bfloat16 tokens) twice that, of three (float32) three times.
//   ms, medians in turns, of codes unpacked to lines and as they are stored; the dense bfloat16 product beside them:
//
//   tokens   dense   int8          bfloat16      float16       float32
//   16       1.51    0.45   0.36   0.78   0.70   0.78   0.70   1.07
//   128      5.8     2.7    2.6    5.0    5.0    5.8    5.4    8.0
//
//   What is left: the end of a group for each 16 tokens and row (groups of 1024: 0.33 and 2.45), tokens and results.
// Lost: codes copied to lines as they are, for rows 2 KB apart share their sets of L1 (16 tokens 15 % slower, 128 the
//   same); blocks of 256 and 512 columns for many int8 tokens (1,024: up to 15 % faster); three digits as they are
//   stored, of which the registers hold four rows' sums (7 % slower than unpacked, eight rows).
#pragma once
#include "common/amx.h"
#include "common/tile.h"
#include "quant_matmul/cpu_quant_lines.h"

#if defined(__AVX512F__)
namespace {

constexpr int64_t kTileSize = kTileRows * kTileBytes, kTileSums = kTileRows * kTileLanes;

// How many sums a product has, of P codes in a byte and C vectors of numbers: one vector leaves no time to shift codes.
template <int P, int C>
constexpr int kApart = C == 1 && P > 1 ? P : 1;

// sums[r][..][c] += codes of R rows, P in a byte, times C vectors of numbers for each plane of codes. Words of four
// bytes are read as they are stored. Codes are taken as the top bits of their bytes, where a shift and a mask put them; or
// they stay where they are, and each plane has sums of its own, 2^(bits p) times what is wanted. Planes of numbers are
// `plane` bytes apart, their vectors `next`.
// ns a product of a Zen 5, groups of 128 in L1, 0.119 its limit: shifts 0.125 (8 x 2), 0.13 (4 x 3; 8 x 3 0.16, the
// compiler spills), 0.18 (8 x 1); sums apart 0.133 (8 x 1).
template <int P, int R, int C>
static inline __attribute__((always_inline)) void add_planes(
    const uint8_t* code, int64_t pitch, const int8_t* x, int64_t plane, int64_t next, int64_t words,
    __m512i (&sums)[R][kApart<P, C>][C]) {
  constexpr int kBits = 8 / P;
  const auto read = [&](int r) __attribute__((always_inline)) {
    int32_t word;
    __builtin_memcpy(&word, code + r * pitch, 4);
    __m512i all = _mm512_set1_epi32(word);
    if (P > 1) asm("" : "+v"(all));  // by itself: with an operation it would be read for each
    return all;
  };
  for (int64_t i = 0; i < words; ++i, code += 4, x += kTileBytes) {
    if constexpr (kApart<P, C> > 1) {
      __m512i lanes[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) lanes[p] = _mm512_load_si512(x + p * plane);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i all = read(r);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const __m512i own = _mm512_set1_epi8(char(((1 << kBits) - 1) << p * kBits));
          sums[r][p][0] = add_byte_products(sums[r][p][0], _mm512_and_si512(all, own), lanes[p]);
        }
      }
    } else {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        __m512i lanes[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) lanes[c] = _mm512_load_si512(x + p * plane + c * next);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512i all = read(r), top = _mm512_set1_epi8(char(0xff << (8 - kBits)));
          const __m512i moved = p < P - 1 ? _mm512_slli_epi16(all, unsigned(8 - kBits - p * kBits)) : all;
          const __m512i codes = P > 1 ? _mm512_and_si512(moved, top) : all;
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sums[r][0][c] = add_byte_products(sums[r][0][c], codes, lanes[c]);
        }
      }
    }
  }
}

// What sums that are apart come to, as of codes in the top bits of their bytes.
template <int P, int C>
static inline __attribute__((always_inline)) __m512i join_planes(const __m512i (&sums)[P][C], int c) {
  __m512i all = sums[P - 1][c];
#pragma GCC unroll 8
  for (int p = 0; p < P - 1; ++p)
    all = _mm512_add_epi32(all, _mm512_slli_epi32(sums[p][c], unsigned((P - 1 - p) * (8 / P))));
  return all;
}

struct RowBlock {
  static constexpr int64_t kMost = 4, kRows = kMost * kTileRows;
  const bool in_registers = scalekern::has_amx();
  const QuantWeight& w;
  const LineLayout& layout;
  const bool packed;      // codes are not unpacked
  int64_t count, pitch;  // tiles of rows; bytes from row to row of codes
  Buffer<uint8_t> codes;
  Buffer<float> scale, zero, offset, rest;  // [g][rows]

  RowBlock(const QuantWeight& w, const LineLayout& layout, int64_t lines, bool packed)
      : w(w), layout(layout), packed(packed), count(kMost), pitch((lines | 1) * kTileBytes), codes(kRows * pitch),
        scale(kRows * w.groups), zero(kRows * w.groups), offset(kRows * w.groups), rest(kRows * w.groups) {}

  // What the top bits of codes meet: signed in tile registers, in words unsigned.
  uint8_t flip() const { return in_registers ? 0x80 : 0; }

  // Whether codes are multiplied as they are stored. Those of 8 bits are not: 16 rows 4 KB apart are more than a set of
  // L1 has (16 tokens 0.60 ms from lines, 0.65 where they lie).
  static bool may_stay(const QuantWeight& w, const LineLayout& layout) {
    return !scalekern::has_amx() && w.bits < 8 && (layout.stored || layout.halves);
  }

  // Rows of codes from a line on: in lines (planes = 0), or as they are stored, `planes` of them in a byte.
  struct Source {
    const uint8_t* at;
    int64_t pitch, line_bytes;
    int planes;
  };
  // Lines line .. end of `rows` rows. In words they are read where they lie, but for what ends within a line or a tile
  // of rows: behind it lies anything, or nothing.
  Source source(const CodeLines& from, int64_t first, int64_t rows, int64_t line, int64_t end) const {
    const int64_t bytes = kLine / 8 * w.bits;
    if (!packed) return from.unpack(first, rows, line, end - line, codes, pitch), Source{codes, pitch, kLine, 0};
    const int planes = 8 / w.bits;
    if (rows == count * kTileRows && w.columns % kLine == 0)
      return {w.data + first * w.pitch + line * bytes, w.pitch, bytes, planes};
    from.copy(first, rows, line, end - line, codes, pitch);
    return {codes, pitch, bytes, planes};
  }

  template <class F>
  static void by_planes(int planes, const F& f) {
    switch (planes) {
      case 8: return f.template operator()<8>();
      case 4: return f.template operator()<4>();
      case 2: return f.template operator()<2>();
      default: return f.template operator()<0>();
    }
  }
  // Of products with C vectors, P as in Source: the registers hold their sums.
  template <int P, int C>
  static constexpr int kAtOnce = C == 1 ? 16 / kApart<P, C> : C == 2 ? 8 : C == 3 && P < 2 ? 8 : 4;  // rows

  // sums[r][..][c] += lines of codes of R rows times C vectors of numbers, `next` bytes apart; P as in Source, or 1.
  template <int P, int R, int C>
  inline __attribute__((always_inline)) void multiply_lines(
      const uint8_t* code, int64_t pitch, const int8_t* x, int64_t next, int64_t lines,
      __m512i (&sums)[R][kApart<P, C>][C]) const {
    if (P == 1) return add_planes<P>(code, pitch, x, 0, next, lines * 16, sums);
    const int64_t block = layout.stored ? P : 1, step = kLine / P * block;
    for (int64_t i = 0; i < lines; i += block, code += step, x += block * kTileSize)
      add_planes<P>(code, pitch, x, layout.stored ? kTileSize : kTileSize / 2, next, step / 4, sums);
  }
  // Those of a group. Of a line that others share, the group's words alone: in order, or of halves two runs.
  template <int P, int R, int C>
  inline __attribute__((always_inline)) void multiply_group(
      const uint8_t* code, int64_t pitch, const int8_t* x, int64_t next, int64_t g,
      __m512i (&sums)[R][kApart<P, C>][C]) const {
    const int64_t lines = layout.begin[g + 1] - layout.begin[g], start = g * layout.group % kLine;
    const int64_t columns = least(layout.group, w.columns - g * layout.group), runs = layout.halves ? 2 : 1;
    if (P == 1 || lines > 1 || layout.stored || (start | columns) % (4 * runs) != 0)
      return multiply_lines<P ? P : 1>(code, pitch, x, next, lines, sums);
    if constexpr (P == 2)
      return add_planes<2>(code + start / 2, pitch, x + start / 8 * kTileBytes, kTileSize / 2, next, columns / 8, sums);
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t from = i * kLine / 2 + start / runs;
      if constexpr (P == 0) add_planes<1>(code + from, pitch, x + from * 16, 0, next, columns / 4 / runs, sums);
    }
  }

  // What sums of unsigned codes start with: minus the middle one times C vectors of the numbers that they will meet.
  template <int C>
  static inline void starts(const int8_t* x, int64_t next, int64_t words, __m512i (&start)[C]) {
    const __m512i middle = _mm512_set1_epi8(char(0x80));
    for (int c = 0; c < C; ++c) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < words; ++i)
        sum = add_byte_products(sum, middle, _mm512_load_si512(x + c * next + i * kTileBytes));
      start[c] = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
    }
  }

  // Rows past the end repeat the last; `tiles` of them at once. `memory`: of kTileRows rows, and a vector.
  void load_parts(int64_t first, int64_t rows, float middle, float* memory, int64_t tiles = 1) {
    count = round_up(pieces(rows, kTileRows), tiles);
    const VecF power = VecF{} + from_bits(uint32_t(127 - layout.shift) << 23), one = VecF{} + 1.0f;
    const bool more = w.has_rest(middle);
    RowParts part[kTileRows];
    for (int64_t tile = 0; tile < count; ++tile) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = first + least(tile * kTileRows + r, rows - 1);
        float* own = memory + r * RowParts::floats(w.groups);
        if (more) part[r] = RowParts(w, row, middle, own);
        else part[r].scale = own, part[r].load_scales(w, row);
      }
      const auto lay = [&](float* to, float* RowParts::*from, VecF factor) {
        for (int64_t g = 0; g < w.groups; g += kTileLanes) {
          VecF v[kTileLanes];
          for (int64_t r = 0; r < kTileRows; ++r) v[r] = load(part[r].*from + g) * factor;
          transpose<float>(v);
          for (int64_t i = 0; i < least(kTileLanes, w.groups - g); ++i)
            store(to + ((g + i) * count + tile) * kTileRows, v[i]);
        }
      };
      lay(scale, static_cast<float* RowParts::*>(&RowParts::scale), power);
      if (!more) continue;
      lay(zero, static_cast<float* RowParts::*>(&RowParts::zero), one);
      lay(offset, static_cast<float* RowParts::*>(&RowParts::offset), one);
      lay(rest, &RowParts::rest, one);
    }
  }

  // Outputs of these rows for the tokens from m on, up to 16. `totals`: [tile of rows][16 rows][16 tokens]; `results`:
  // 16 x kRows. Whether all are finite.
  bool write(const QuantMatmulArgs& a, const float* totals, int64_t first, int64_t rows, int64_t m, const float* scales,
             const float* bias, float* results) const {
    VecF strange = {};
    for (int64_t r = 0; r < count; ++r) {
      VecF v[kTileRows];
      __builtin_memcpy(v, totals + r * kTileSums, sizeof v);
      for (int64_t i = 0; i < least(kTileRows, rows - r * kTileRows); ++i) strange += v[i] * 0.0f;
      transpose<float>(v);
      for (int64_t j = 0; j < kTileLanes; ++j) store(results + j * kRows + r * kTileRows, v[j]);
    }
    for (int64_t j = 0; j < kTileLanes && m + j < a.tokens; ++j)
      store_results(a, m + j, first, rows, results + j * kRows, scales ? scales[m + j] : 1, bias);
    return sum_of<float>(strange) == 0;
  }
};

}  // namespace
#endif
