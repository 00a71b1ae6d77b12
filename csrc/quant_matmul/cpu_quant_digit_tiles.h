// Many float tokens with integer codes on AMX's byte products, or VNNI's (cpu_quant_row_block.h): tokens as fixed point
// in digits of a byte, as in cpu_quant_digits.h, codes as bytes, sums of a part (a group, as a rule) exact in int32.
//
// 16-bit results take two digits, float32 three, which is 1.5 of bfloat16's products where its parts are three; a part
//   of a token that needs more takes up to four, by itself: what it leaves is 0 beside others, and no bit differs.
//   What four do not hold goes to the tiles of bfloat16.
// A step is two tiles of rows, one of tokens, a part, and all its digits: codes stay in four registers. A tile of C is
//   stored behind the other's products, and the step before is joined and scaled in pieces between them. ns for 16 x 16
//   x 128 columns and three digits on a Sapphire Rapids, all in L1:
//
//                                                       a core for itself   beside another's work
//     products                                          35                  86
//     and their loads, no stores                        35                  107
//     stored as they end                                46                  112
//     stored behind the other's products                37                  103
//     to join alone (9 operations for 16 sums)          31                  31
//     all of it, joined behind a whole step             112                 185   (64 tokens in L2)
//     all of it, joined in pieces                       73 to 79            155 to 160
//     bfloat16's three parts, products and loads        72                  about 210   (counted)
//
//   The second column is the common one on a shared machine: nothing there hides behind anything else (a load of a tile
//   takes 28 cycles for 8, a product 32 for 16).
// Left out one by one, 128 tokens by 2048 rows on one core for itself, of 4.2 ms: products and loads of tiles 1.7 (the
//   products alone 1.16), unpacking 0.7, joins 0.6, tokens 0.5, stores 0.5, scales and results 0.25; they add up.
// Bound by products and joins: 65536 such steps for 128 tokens of 4096 x 4096 on two cores, 2.4 and 5.1 ms, and 0.4 a
//   pass over the weight. In turns with the dense bfloat16 product, ratio of medians (and of minima), groups of 128:
//
//     tokens   float32       float16       bfloat16      before: float32, float16, bfloat16
//     16       1.53 (2.04)   1.83 (2.47)   1.81 (2.43)   0.79, 0.94, 1.19
//     64       1.26 (1.25)                 1.65 (1.54)                    1.44
//     128      0.85 to 0.93  1.23 (1.12)   1.23 (1.15)   0.60, 0.80, 1.22
//
//   16 tokens, a scale a row, 8 bits: float32 1.36, bfloat16 1.60 (0.80, 0.90). Groups of 64: 1.00, 1.10 (0.95, 1.05);
//   of 32: bfloat16 0.75 (0.36).
// Lost: 128 tokens at once (1.5 MB, out of L2: 91 for 57 of products; fewer passes, no faster); blocks of 128 rows (6
//   to 10 %) and of 256 columns (5 %, out of L1); the next tokens prefetched, before joins were in pieces; one tile of
//   rows a step, a tile of C a digit (49 for 37). Sums that are born as floats, as in cpu_quant_digits.h (2 % faster
//   alone, 20 % slower beside another's work: their start is a load of a tile); the next part's rows unpacked between
//   steps (5 to 10 %); blocks of 96 rows (5 %); sums at other addresses modulo 4096 (equal).
// Not enough by count: two bfloat16 parts leave 2.2e-6 of a normal number, two digits 2.4e-5, where float32 may 1e-6.
// An output's additions have one order, whatever the number of threads and its place among the others.
#pragma once
#include "quant_matmul/cpu_quant_digits.h"
#include "quant_matmul/cpu_quant_row_block.h"

#if defined(__AVX512F__)
namespace {

// Columns of a weight in parts that share a unit: a group, or an equal piece of a long one. As a weight of its own.
struct TileParts {
  static constexpr int64_t kPiece = 256, kMostPart = 1024;  // 128 x 128 x 1024 = 2^24, which a float holds
  QuantWeight cut;
  int64_t each = 1;  // parts of a group
  bool fits;

  explicit TileParts(const QuantWeight& w) : cut(w), fits(w.columns > 0 && w.rows > 0) {
    if (w.groups == 1) {
      cut.group = kPiece, cut.groups = each = pieces(w.columns, kPiece);
    } else if (w.group > kPiece && w.group % kPiece == 0) {
      each = w.group / kPiece, cut.group = kPiece, cut.groups = pieces(w.columns, kPiece);
    } else {
      fits = fits && w.group <= kMostPart;
    }
  }
};

// Up to kMost tokens by 16: [tile][part][digit][line][16 quads][16 tokens][4], room for kDigits.
struct DigitTiles {
  static constexpr int64_t kMost = 64, kDigits = 4;
  const QuantWeight& cut;
  const LineLayout& layout;
  const bool more;
  int64_t count, tiles, lines, parts;
  Buffer<int8_t> x;
  Buffer<float> unit, sum;   // [tile][part][16]
  Buffer<uint8_t> digits;    // [tile][part], the most that one of the tokens takes
  bool held[kMost];          // of a token: else 0 is in its place

  DigitTiles(const QuantMatmulArgs& a, const TileParts& p, const LineLayout& layout, bool more)
      : cut(p.cut), layout(layout), more(more), count(a.tokens), tiles(pieces(a.tokens, kTileLanes)),
        lines(layout.begin[cut.groups]), parts(cut.groups), x(tiles * lines * kDigits * kTileSize),
        unit(tiles * parts * kTileLanes), sum(tiles * parts * kTileLanes), digits(tiles * parts) {
    for (bool& one : held) one = true;
    const int64_t chunk = most(1, 512 / layout.group), chunks = pieces(parts, chunk);
    parallel_if(count * cut.columns >= kParallelWork, tiles * chunks, [&](int64_t begin, int64_t end) {
      const Memory memory(layout.group);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * chunk;
        for (int64_t part = first; part < least(first + chunk, parts); ++part) lay(a, memory, i / chunks, part);
      }
    });
  }
  const int8_t* at(int64_t tile, int64_t part) const {
    return x + (tile * lines + layout.begin[part]) * kDigits * kTileSize;
  }

 private:
  struct Memory {
    const int64_t span;  // bytes of a digit
    const Buffer<float> numbers;
    const Buffer<int8_t> plain, lines;  // [digit][column]; [token][digit][byte of a line]
    explicit Memory(int64_t group)
        : span(round_up(group, kLine) + 2 * kLine), numbers(span), plain(kDigits * span),
          lines(kTileLanes * kDigits * span) {}
  };

  void lay(const QuantMatmulArgs& a, const Memory& memory, int64_t tile, int64_t part) {
    const bool half = a.out.dtype == QuantDtype::f16 || a.out.dtype == QuantDtype::bf16;
    const float allowed = half ? 1e-4f : 1e-6f;
    const int64_t first = part * layout.group, here = least(layout.group, cut.columns - first), span = memory.span;
    const int64_t line = layout.begin[part], bytes = (layout.begin[part + 1] - line) * kLine, start = first % kLine;
    const int64_t tokens = least(kTileLanes, count - tile * kTileLanes);
    float *units = unit + (tile * parts + part) * kTileLanes, *sums = sum + (tile * parts + part) * kTileLanes;
    zero(units, kTileLanes), zero(sums, kTileLanes);
    int most_digits = 2, own[kTileLanes];
    for (int64_t j = 0; j < tokens; ++j) {
      const int64_t m = tile * kTileLanes + j;
      load_part(a.x, m * a.x.row + first * a.x.column, a.x.column, here, memory.numbers);
      const Look seen = look(memory.numbers, here);
      int8_t* to = memory.lines + j * kDigits * span;
      int8_t* plain = layout.planes > 1 ? memory.plain : to + start;
      Part found{};
      own[j] = half ? 2 : 3;
      while (own[j] && !split(seen, memory.numbers, here, own[j], allowed, more, plain, span, found))
        own[j] = own[j] < kDigits ? own[j] + 1 : 0;
      if (own[j] == 0) __atomic_store_n(&held[m], false, __ATOMIC_RELAXED);
      else units[j] = found.unit, sums[j] = found.sum;
      for (int d = 0; d < own[j]; ++d, to += span) {
        if (layout.planes > 1) {
          __builtin_memset(plain + d * span + here, 0, size_t(span - here));
          place(plain + d * span, bytes, layout.planes, to);
        } else {
          __builtin_memset(to, 0, size_t(start));
          __builtin_memset(to + start + here, 0, size_t(bytes + kLine - start - here));
          if (layout.halves) halve(to, bytes / kLine);
        }
      }
      most_digits = own[j] > most_digits ? own[j] : most_digits;
    }
    digits[tile * parts + part] = uint8_t(most_digits);
    for (int64_t i = 0; i < bytes / kLine; ++i)
      for (int d = 0; d < most_digits; ++d) {
        VecF v[kTileLanes] = {};
        for (int64_t j = 0; j < tokens; ++j)
          if (d < own[j]) __builtin_memcpy(&v[j], memory.lines + (j * kDigits + d) * span + i * kLine, sizeof v[j]);
        transpose<float>(v);
        __builtin_memcpy(const_cast<int8_t*>(at(tile, part)) + (d * bytes / kLine + i) * kTileSize, v, sizeof v);
      }
  }
};

// A block of rows by all tokens of a DigitTiles. A step is two tiles of rows by one of tokens and a part: its digits'
// sums, one after the other in two tiles of C; what they are joined into the totals is behind the next step's products.
struct DigitRows : RowBlock {
  const DigitTiles& tokens;
  Buffer<float> totals;  // [tile of tokens][tile of rows][16 rows][16 tokens]
  Buffer<int32_t> sums;  // [step][digit][32 rows][16 tokens]
  int32_t* late = sums;
  static constexpr int64_t kPair = 2 * kTileSums, kStep = DigitTiles::kDigits * kPair;

  DigitRows(const QuantWeight& w, const LineLayout& layout, const DigitTiles& tokens, int64_t lines, bool packed)
      : RowBlock(w, layout, lines, packed), tokens(tokens), totals(tokens.tiles * kRows * kTileLanes),
        sums(2 * kStep) {}

  struct Pending {
    int digits = 0;
    const int32_t* sums = nullptr;
    const float *unit = nullptr, *sum = nullptr, *scale = nullptr, *rest = nullptr;
    float* totals = nullptr;
  } pending;
  int64_t step = 0;

  // Rows r .. end of the two tiles.
  template <int D, bool kRest>
  static inline __attribute__((always_inline)) void join(const Pending& p, int r, int end) {
    const VecF unit = load(p.unit), x = kRest ? load(p.sum) : VecF{};
#pragma GCC unroll 16
    for (; r < end; ++r) {
      const auto sum = [&](int d) {
        return (VecF)_mm512_cvtepi32_ps(_mm512_load_si512(p.sums + d * kPair + r * kTileLanes));
      };
      VecF v = sum(D - 1);
#pragma GCC unroll 4
      for (int d = D - 2; d >= 0; --d) v = v * 0x1p-8f + sum(d);
      VecF total = load(p.totals + r * kTileLanes) + p.scale[r] * (v * unit);
      if (kRest) total += p.rest[r] * x;
      store(p.totals + r * kTileLanes, total);
    }
  }

  // L lines, or `lines` (0). A tile of C is stored behind the products of the other: `late` is where the last one goes.
  // Between them, a piece at a time, what is pending is joined.
  template <int D, int L, bool kRest>
  __attribute__((noinline)) void multiply(const uint8_t* code, const int8_t* x, int64_t lines, int32_t* to) {
    const uint8_t* next = code + kTileRows * pitch;
    const Pending p = pending;
    const auto between = [&](int i) __attribute__((always_inline)) {
      if (p.digits) join<D, kRest>(p, 32 * i / (2 * D), 32 * (i + 1) / (2 * D));
    };
    if constexpr (L > 0) load_tile<2>(code, pitch), load_tile<3>(next, pitch);
    if constexpr (L > 1) load_tile<4>(code + kTileBytes, pitch), load_tile<5>(next + kTileBytes, pitch);
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d, x += (L ? L : lines) * kTileSize, to += kPair) {
      zero_tile<0>();
      load_tile<6>(x, kTileBytes);
      if constexpr (L == 0) load_tile<2>(code, pitch), load_tile<3>(next, pitch);
      if constexpr (L > 1) load_tile<7>(x + kTileSize, kTileBytes);
      add_products<0, 2, 6>();
      if constexpr (L > 1) add_products<0, 4, 7>();
      store_tile<1>(late, kTileBytes);
      between(2 * d);
      zero_tile<1>();
      add_products<1, 3, 6>();
      if constexpr (L > 1) add_products<1, 5, 7>();
      for (int64_t i = 1; L == 0 && i < lines; ++i) {
        load_tile<7>(x + i * kTileSize, kTileBytes);
        load_tile<4>(code + i * kTileBytes, pitch), add_products<0, 4, 7>();
        load_tile<5>(next + i * kTileBytes, pitch), add_products<1, 5, 7>();
      }
      store_tile<0>(to, kTileBytes);
      between(2 * d + 1);
      late = to + kTileSums;
    }
  }
  template <int D, bool kRest>
  void multiply(const uint8_t* code, const int8_t* x, int64_t lines, int32_t* to) {
    if (lines == 1) multiply<D, 1, kRest>(code, x, lines, to);
    else if (lines == 2) multiply<D, 2, kRest>(code, x, lines, to);
    else multiply<D, 0, kRest>(code, x, lines, to);
  }

  // totals += a part of one tile of tokens, R rows at a time, without tile registers. Codes are unsigned.
  template <int P, int D, bool kRest>
  __attribute__((noinline)) void in_words(
      const uint8_t* code, int64_t pitch, const int8_t* x, int64_t part, const Pending& p) {
    constexpr int R = kAtOnce<P, D>;
    const int64_t lines = layout.begin[part + 1] - layout.begin[part], next = lines * kTileSize;
    const VecF unit = load(p.unit), sum = kRest ? load(p.sum) : VecF{};
    __m512i start[D];
    starts(x, next, lines * 16, start);
    for (int64_t r = 0; r < count * kTileRows; r += R) {
      __m512i acc[R][1][D];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) acc[i][0][d] = start[d];
      multiply_group<P>(code + r * pitch, pitch, x, next, part, acc);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        VecF v = (VecF)_mm512_cvtepi32_ps(acc[i][0][D - 1]);
#pragma GCC unroll 4
        for (int d = D - 2; d >= 0; --d) v = v * 0x1p-8f + (VecF)_mm512_cvtepi32_ps(acc[i][0][d]);
        float* to = p.totals + (r + i) * kTileLanes;
        VecF total = load(to) + p.scale[r + i] * (v * unit);
        if (kRest) total += p.rest[r + i] * sum;
        store(to, total);
      }
    }
  }

  // Parts first .. end, which `from` begins with.
  template <bool kRest>
  void add_parts(const Source& from, int64_t first, int64_t end, int64_t each, int64_t tile) {
    for (int64_t part = first; part < end; ++part) {
      const int64_t g = part / each, lines = layout.begin[part + 1] - layout.begin[part];
      const uint8_t* code = from.at + (layout.code_line(part) - layout.code_line(first)) * from.line_bytes;
      const int8_t* x = tokens.at(tile, part);
      const int digits = tokens.digits[tile * tokens.parts + part];
      const int64_t own = (tile * tokens.parts + part) * kTileLanes;
      if (!in_registers) {
        const Pending part_of{digits, nullptr, tokens.unit + own, tokens.sum + own, scale + g * count * kTileRows,
                              rest + g * count * kTileRows, totals + tile * count * kTileSums};
        by_planes(from.planes, [&]<int P>() {
          if (digits == 2) in_words<P, 2, kRest>(code, from.pitch, x, part, part_of);
          else if (digits == 3) in_words<P, 3, kRest>(code, from.pitch, x, part, part_of);
          else in_words<P, 4, kRest>(code, from.pitch, x, part, part_of);
        });
        continue;
      }
      if (pending.digits != digits) finish<kRest>();
      for (int64_t r = 0; r < count; r += 2, ++step) {
        int32_t* to = sums + step % 2 * kStep;
        const uint8_t* rows = code + r * kTileRows * pitch;
        if (digits == 2) multiply<2, kRest>(rows, x, lines, to);
        else if (digits == 3) multiply<3, kRest>(rows, x, lines, to);
        else multiply<4, kRest>(rows, x, lines, to);
        const int64_t row = (g * count + r) * kTileRows;
        pending = {digits, to, tokens.unit + own, tokens.sum + own, scale + row, rest + row,
                   totals + (tile * count + r) * kTileSums};
      }
    }
  }
  template <bool kRest>
  void finish() {
    if (!in_registers) return;
    store_tile<1>(late, kTileBytes);
    late = sums;
    if (pending.digits == 2) join<2, kRest>(pending, 0, 32);
    else if (pending.digits == 3) join<3, kRest>(pending, 0, 32);
    else if (pending.digits == 4) join<4, kRest>(pending, 0, 32);
    pending.digits = 0;
  }
};

// What is not finite goes to `redo`, which takes some rows; tokens that digits do not hold to `otherwise`, which takes
// some tokens. False where the codes do not fit.
template <class Redo, class Otherwise>
static bool in_digit_tiles(const QuantMatmulArgs& all, const Redo& redo, const Otherwise& otherwise) {
  constexpr int64_t kBlock = 128;  // columns of codes in L1
  const TileParts parts(all.w);
  if (!parts.fits || all.w.table || all.activation_max != 0) return false;
  const QuantWeight& w = all.w;
  const LineLayout layout(parts.cut);
  const float middle = float(1 << w.bits >> 1);
  const bool more = w.has_rest(middle);
  // Three digits leave four rows in registers, with which it is 7 % slower.
  const bool packed = all.out.dtype != QuantDtype::f32 && RowBlock::may_stay(w, layout);
  const int64_t block = most(1, kBlock / layout.group);  // parts
  const int64_t lines = pieces(block * layout.group, kLine) + 1, row_blocks = pieces(w.rows, RowBlock::kRows);
  const Buffer<bool> strange(row_blocks);
  for (int64_t m = 0; m < all.tokens; m += DigitTiles::kMost) {
    QuantMatmulArgs a = all;
    a.tokens = least(DigitTiles::kMost, all.tokens - m), a.x = all.x.from(m), a.out = all.out.from(m);
    const DigitTiles tokens(a, parts, layout, more);
    parallel_stretches(a.tokens * w.rows * w.columns >= kParallelWork, row_blocks, 1, [&](const auto& take) {
      const Tiles registers;
      DigitRows rows(w, layout, tokens, lines, packed);
      const CodeLines codes(parts.cut, layout, rows.flip());
      const Buffer<float> memory(kTileRows * RowParts::floats(w.groups) + kTileLanes);
      const Buffer<float> results(kTileLanes * RowBlock::kRows);
      float bias[RowBlock::kRows];
      take([&](int64_t piece, int64_t) {
        const int64_t first = piece * RowBlock::kRows, count = least(RowBlock::kRows, w.rows - first);
        rows.load_parts(first, count, middle, memory, 2);
        zero<float>(rows.totals, tokens.tiles * rows.count * kTileSums);
        for (int64_t part = 0; part < tokens.parts; part += block) {
          const int64_t stop = least(part + block, tokens.parts), line = layout.code_line(part);
          const int64_t last = pieces(least(stop * layout.group, w.columns), kLine);
          const auto from = rows.source(codes, first, count, line, last);
          for (int64_t tile = 0; tile < tokens.tiles; ++tile)
            if (more) rows.add_parts<true>(from, part, stop, parts.each, tile);
            else rows.add_parts<false>(from, part, stop, parts.each, tile);
        }
        if (more) rows.finish<true>();
        else rows.finish<false>();
        load_bias(a, first, count, bias);
        bool finite = true;
        for (int64_t tile = 0; tile < tokens.tiles; ++tile)
          finite &= rows.write(a, rows.totals + tile * rows.count * kTileSums, first, count, tile * kTileLanes, nullptr,
                               bias, results);
        strange[piece] = !finite;
      });
    });
    for (int64_t i = 0; i < row_blocks; ++i) {
      if (!strange[i]) continue;
      QuantMatmulArgs some = a;
      const int64_t first = i * RowBlock::kRows;
      some.w = w.from(first, least(RowBlock::kRows, w.rows - first));
      some.out = a.out.behind(first * a.out.column), some.bias = a.bias.behind(first * a.bias.column);
      redo(some);
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      QuantMatmulArgs some = a;
      for (some.tokens = 0; t < a.tokens && !tokens.held[t]; ++t) ++some.tokens;
      if (some.tokens == 0) continue;
      some.x = a.x.from(t - some.tokens), some.out = a.out.from(t - some.tokens);
      otherwise(some);
    }
  }
  return true;
}

}  // namespace
#endif
