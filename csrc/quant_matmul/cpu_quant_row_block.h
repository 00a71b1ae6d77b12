// A block of rows of a weight for the tile registers, whose C's rows they are: codes in lines, and their groups' parts.
#pragma once
#include "common/amx.h"
#include "common/tile.h"
#include "common/words.h"
#include "quant_matmul/cpu_quant_lines.h"

#if defined(__AVX512F__)
namespace {

constexpr int64_t kTileSize = kTileRows * kTileBytes, kTileSums = kTileRows * kTileLanes;

struct RowBlock {
  static constexpr int64_t kMost = 4, kRows = kMost * kTileRows;
  static constexpr int kWordRows = 8;  // at once, where there are no tile registers
  const bool in_registers = scalekern::has_amx();
  const QuantWeight& w;
  const LineLayout& layout;
  int64_t count, pitch;  // tiles of rows; bytes from row to row of codes
  Buffer<uint8_t> codes;
  Buffer<float> scale, zero, offset, rest;  // [g][rows]

  RowBlock(const QuantWeight& w, const LineLayout& layout, int64_t lines)
      : w(w), layout(layout), count(kMost), pitch((lines | 1) * kTileBytes), codes(kRows * pitch),
        scale(kRows * w.groups), zero(kRows * w.groups), offset(kRows * w.groups), rest(kRows * w.groups) {}

  // What the top bits of codes meet: signed in tile registers, in words unsigned.
  uint8_t flip() const { return in_registers ? 0x80 : 0; }

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

  // sums[r][c] += codes of R rows of a group times C vectors of numbers, `next` bytes apart. Of a line that others
  // share, the group's words alone: in order, or of halves two runs.
  template <int R, int C>
  inline __attribute__((always_inline)) void add_group(
      const uint8_t* code, const int8_t* x, int64_t next, int64_t g, __m512i (&sums)[R][C]) const {
    const int64_t lines = layout.begin[g + 1] - layout.begin[g], start = g * layout.group % kLine;
    const int64_t columns = least(layout.group, w.columns - g * layout.group), runs = layout.halves ? 2 : 1;
    if (lines > 1 || (start | columns) % (4 * runs) != 0)
      return add_words<ByteWords>(code, pitch, x, kTileBytes, next, lines * 16, sums);
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t from = i * kLine / 2 + start / runs;
      add_words<ByteWords>(code + from, pitch, x + from * 16, kTileBytes, next, columns / 4 / runs, sums);
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
