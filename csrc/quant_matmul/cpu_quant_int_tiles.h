// Integer products on AMX: 16 rows of the weight by 16 tokens by 64 columns an instruction, int32, exact within a group.
#pragma once
#include "common/amx.h"
#include "common/tile.h"
#include "quant_matmul/cpu_quant_whole.h"

#if defined(__AVX512F__)
namespace {

// How the codes of a group lie once each has a byte, in lines of 64: plane p holds the p-th code of each stored byte,
// one plane behind the other. A code is the top bits of its byte, its sum 2^shift times what is wanted: to unpack is a
// shift and one operation more. What lies behind the last code meets activations of 0.
struct LineLayout {
  bool stored;  // read from rows as they are stored; else a code a byte first
  int planes, shift;
  int64_t bytes, last_bytes;  // read of a full group, and of the last
  int64_t lines, row_lines;   // of a full group, and of a row

  explicit LineLayout(const QuantWeight& w) : planes(8 / w.bits), shift(8 - w.bits) {
    const int64_t group = least(w.group, w.columns);
    stored = 8 % w.bits == 0 && (w.groups == 1 || group % planes == 0);
    if (!stored) planes = 1;
    bytes = pieces(group, planes), last_bytes = pieces(w.columns - (w.groups - 1) * w.group, planes);
    lines = lines_of(bytes), row_lines = (w.groups - 1) * lines + lines_of(last_bytes);
  }
  static int64_t plane(int64_t bytes) { return bytes < kTileBytes ? bytes : round_up(bytes, kTileBytes); }
  int64_t lines_of(int64_t bytes) const { return pieces(planes * plane(bytes), kTileBytes); }
  int64_t begin(int64_t g) const { return g * lines; }
  int64_t end(const QuantWeight& w, int64_t g) const { return g + 1 < w.groups ? begin(g + 1) : row_lines; }
};

template <int P>
static inline void spread(const int8_t* src, int64_t count, int64_t plane, int8_t* dst) {
  int64_t i = 0;
  for (; i < count / P; ++i)
    for (int p = 0; p < P; ++p) dst[p * plane + i] = src[i * P + p];
  for (int p = 0; p < int(count % P); ++p) dst[p * plane + i] = src[i * P + p];
}

// dst = the codes of 64 stored bytes, P planes; those of 2 bytes cross into each other only in bits that are masked.
template <int P>
static inline void unpack_line(__m512i bytes, int shift, __m512i flip, int64_t plane, uint8_t* dst) {
  const __m512i top = _mm512_set1_epi8(char(0xff << shift));
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const int left = P == 1 ? shift : 8 - 8 / P - p * (8 / P);
    const __m512i moved = left > 0 ? _mm512_sll_epi16(bytes, _mm_cvtsi32_si128(left)) : bytes;
    _mm512_storeu_si512(dst + p * plane, _mm512_ternarylogic_epi64(moved, top, flip, 0x6a));  // (moved & top) ^ flip
  }
}
template <int P>
static inline void unpack_group(
    const uint8_t* src, int64_t bytes, int64_t readable, int shift, __m512i flip, uint8_t* dst) {
  const int64_t plane = LineLayout::plane(bytes);
  for (int64_t i = 0; i < bytes; i += kTileBytes) {
    const int64_t left = readable - i;
    const __mmask64 some = left < kTileBytes ? (__mmask64(1) << left) - 1 : ~__mmask64(0);
    unpack_line<P>(_mm512_maskz_loadu_epi8(some, src + i), shift, flip, plane, dst + i);
  }
}

// Groups first .. end of a row in lines: code - middle in each byte, or with a flip of 0 the code, times 2^shift.
// `plain` has room for a row of codes. Writes up to 63 bytes beyond.
static void unpack_lines(
    const QuantWeight& w, const LineLayout& layout, int64_t row, int64_t first, int64_t end, __m512i flip,
    const uint8_t* plain, uint8_t* dst) {
  const uint8_t* src = layout.stored ? w.data + row * w.pitch : plain;
  const int64_t all = layout.stored ? w.row_bytes() : w.columns;
  for (int64_t g = first; g < end; ++g, dst += layout.lines * kTileBytes) {
    const int64_t offset = g * layout.bytes, bytes = g + 1 < w.groups ? layout.bytes : layout.last_bytes;
    switch (layout.planes) {
      case 8: unpack_group<8>(src + offset, bytes, all - offset, layout.shift, flip, dst); break;
      case 4: unpack_group<4>(src + offset, bytes, all - offset, layout.shift, flip, dst); break;
      case 2: unpack_group<2>(src + offset, bytes, all - offset, layout.shift, flip, dst); break;
      default: unpack_group<1>(src + offset, bytes, all - offset, layout.shift, flip, dst);
    }
  }
}

// Tokens as whole numbers, in lines.
struct WholeLines {
  int64_t pitch;
  Buffer<int8_t> x;
  Buffer<float> scale;
  Buffer<int64_t> sum;  // of each group

  WholeLines(const QuantMatmulArgs& a, const LineLayout& layout)
      : pitch(layout.row_lines * kTileBytes + kTileBytes), x(a.tokens * pitch), scale(a.tokens), sum(a.tokens * a.w.groups) {
    const QuantWeight& w = a.w;
    const int64_t K = w.columns;
    parallel_if(a.tokens * K >= kParallelWork, a.tokens, [&](int64_t begin, int64_t end) {
      const Buffer<float> own(K);
      const Buffer<int8_t> plain(K);
      for (int64_t m = begin; m < end; ++m) {
        const float* token = own;
        if (a.x.dtype == QuantDtype::f32 && a.x.column == 1) token = at<float>(a.x.data, m * a.x.row);
        else load_row(a.x, m, K, own);
        scale[m] = scale_of_token(token, K, a.activation_max, a.activation_scale);
        round_to_whole(token, K, scale[m], a.activation_max, own);
        const float* __restrict from = own;
        int8_t* __restrict to = plain;
        for (int64_t k = 0; k < K; ++k) to[k] = int8_t(int(from[k]));
        __builtin_memset(x + m * pitch, 0, size_t(pitch));
        for (int64_t g = 0; g < w.groups; ++g) {
          const int64_t first = g * w.group, count = least(w.group, K - first);
          const int64_t plane = LineLayout::plane(g + 1 < w.groups ? layout.bytes : layout.last_bytes);
          int64_t total = 0;
          for (int64_t k = first; k < first + count; ++k) total += plain[k];
          sum[m * w.groups + g] = total;
          int8_t* dst = x + m * pitch + layout.begin(g) * kTileBytes;
          switch (layout.planes) {
            case 8: spread<8>(plain + first, count, plane, dst); break;
            case 4: spread<4>(plain + first, count, plane, dst); break;
            case 2: spread<2>(plain + first, count, plane, dst); break;
            default: __builtin_memcpy(dst, plain + first, size_t(count));
          }
        }
      }
    });
  }
};

constexpr int64_t kTileSize = kTileRows * kTileBytes, kTileSums = kTileRows * kTileLanes;

// Tokens by 16, quads of columns across: [tile][line][16 quads][16 tokens][4]; sums [tile][g][16].
struct TokenTiles {
  int64_t tiles, lines, groups;
  Buffer<int8_t> x;
  Buffer<double> sum;

  TokenTiles(const WholeLines& tokens, int64_t count, const LineLayout& layout, int64_t groups)
      : tiles(pieces(count, kTileLanes)), lines(layout.row_lines), groups(groups), x(tiles * lines * kTileSize),
        sum(tiles * groups * kTileLanes) {
    parallel_if(count * lines * kTileBytes >= kParallelWork, tiles, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * kTileLanes;
        for (int64_t line = 0; line < lines; ++line) {
          VecF v[kTileLanes] = {};
          for (int64_t j = 0; j < least(kTileLanes, count - first); ++j)
            __builtin_memcpy(&v[j], tokens.x + (first + j) * tokens.pitch + line * kTileBytes, sizeof v[j]);
          transpose<float>(v);
          __builtin_memcpy(x + (t * lines + line) * kTileSize, v, sizeof v);
        }
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t j = 0; j < kTileLanes; ++j)
            sum[(t * groups + g) * kTileLanes + j] = first + j < count ? double(tokens.sum[(first + j) * groups + g]) : 0;
      }
    });
  }
};

// What a group's sums become: scale times them; that and a rest; or a long group's zeros, subtracted exactly.
enum class Flush { plain, rest, exact };

// A block of rows by all tokens.
template <Flush kFlush>
struct TileProduct {
  static constexpr int64_t kRows = 2 * kTileRows;
  const QuantWeight& w;
  const LineLayout& layout;
  const TokenTiles& tokens;
  int64_t pitch;          // of rows of codes
  const uint8_t* codes;   // of the groups first ..
  const RowParts* parts;
  float* totals;          // [tile of tokens][kRows][16 tokens]
  int32_t* sums;          // two times [r][t][16][16]
  const float power;

  template <int R, int T>
  __attribute__((noinline)) void multiply(int64_t first, int64_t end, int64_t tile) const {
    const int8_t* x = tokens.x + (tile * tokens.lines + layout.begin(first)) * kTileSize;
    const uint8_t* code = codes;
    for (int64_t g = first; g < end; ++g) {
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      for (int64_t line = layout.begin(g), stop = layout.end(w, g); line < stop; ++line) {
        load_tile<4>(code, pitch);
        load_tile<6>(x, kTileBytes);
        add_products<0, 4, 6>();
        if (T > 1) load_tile<7>(x + tokens.lines * kTileSize, kTileBytes), add_products<1, 4, 7>();
        if (R > 1) load_tile<5>(code + kTileRows * pitch, pitch), add_products<2, 5, 6>();
        if (R > 1 && T > 1) add_products<3, 5, 7>();
        code += kTileBytes, x += kTileSize;
      }
      int32_t* to = sums + g % 2 * 4 * kTileSums;
      store_tile<0>(to, kTileBytes);
      if (T > 1) store_tile<1>(to + kTileSums, kTileBytes);
      if (R > 1) store_tile<2>(to + 2 * kTileSums, kTileBytes);
      if (R > 1 && T > 1) store_tile<3>(to + 3 * kTileSums, kTileBytes);
      if (g > first) flush<R, T>(g - 1, tile);  // the tiles of this group are on their way
    }
    flush<R, T>(end - 1, tile);
  }

  template <int R, int T>
  inline __attribute__((always_inline)) void flush(int64_t g, int64_t tile) const {
    const int32_t* from = sums + g % 2 * 4 * kTileSums;
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      for (int64_t i = 0; i < kTileRows; ++i) {
        const RowParts& part = parts[r * kTileRows + i];
        const float scale = part.scale[g];
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          const __m512i sum = _mm512_load_si512(from + (2 * r + t) * kTileSums + i * kTileLanes);
          float* at = totals + ((tile + t) * kRows + r * kTileRows + i) * kTileLanes;
          const double* x = tokens.sum + ((tile + t) * tokens.groups + g) * kTileLanes;
          VecF total = load(at);
          if (kFlush == Flush::exact) {
            const double zero = 1 / double(power) * (double(1 << w.bits >> 1) - double(part.zero[g]));
            float value[kTileLanes];
            for (int64_t j = 0; j < kTileLanes; ++j)
              value[j] = float(double(from[(2 * r + t) * kTileSums + i * kTileLanes + j]) + zero * x[j]);
            total += scale * load(value);
            if (w.offsets.data)
              for (int64_t j = 0; j < kTileLanes; ++j) total[j] += part.offset[g] * float(x[j]);
          } else {
            total += scale * (VecF)_mm512_cvtepi32_ps(sum);
          }
          if (kFlush == Flush::rest) total += part.rest[g] * __builtin_convertvector(load_sums(x), VecF);
          store(at, total);
        }
      }
  }
  typedef double Sixteen __attribute__((vector_size(128)));
  static Sixteen load_sums(const double* x) {
    Sixteen v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }
};

template <Flush kFlush>
static void tile_product(const QuantMatmulArgs& a) {
  constexpr int64_t kRows = TileProduct<kFlush>::kRows, kBlockLines = 8;
  const QuantWeight& w = a.w;
  const LineLayout layout(w);
  const WholeLines whole(a, layout);
  const TokenTiles tokens(whole, a.tokens, layout, w.groups);
  const int64_t block = most(1, kBlockLines / layout.lines);  // groups
  const int64_t pitch = (layout.begin(least(block, w.groups) - 1) + most(layout.lines, 1)) * kTileBytes + kTileBytes;
  const float middle = float(1 << w.bits >> 1), power = from_bits(uint32_t(127 - layout.shift) << 23);
  parallel_if(true, pieces(w.rows, kRows), [&](int64_t begin, int64_t end) {
    const Tiles registers;
    const Buffer<uint8_t> codes(kRows * pitch), plain(layout.stored ? 0 : kRows * (w.columns + 8));
    const Buffer<float> totals(tokens.tiles * kRows * kTileLanes), memory(kRows * RowParts::floats(w.groups));
    const Buffer<int32_t> sums(8 * kTileSums);
    float bias[kRows], results[kTileLanes][kRows];
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    RowParts parts[kRows];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * kRows, count = least(kRows, w.rows - first);
      for (int64_t r = 0; r < kRows; ++r) {  // those past the end repeat the last
        parts[r] = RowParts(w, first + least(r, count - 1), middle, memory + r * RowParts::floats(w.groups));
        for (int64_t g = 0; g < w.groups; ++g) parts[r].scale[g] *= power;
        if (!layout.stored && r < count) unpack(w, first + r, plain + r * (w.columns + 8));
      }
      zero<float>(totals, tokens.tiles * kRows * kTileLanes);
      const TileProduct<kFlush> product{w, layout, tokens, pitch, codes, parts, totals, sums, power};
      for (int64_t g = 0; g < w.groups; g += block) {
        const int64_t stop = least(g + block, w.groups);
        for (int64_t r = 0; r < count; ++r)
          unpack_lines(w, layout, first + r, g, stop, flip, plain + r * (w.columns + 8), codes + r * pitch);
        int64_t tile = 0;
        if (count > kTileRows) {
          for (; tile + 2 <= tokens.tiles; tile += 2) product.template multiply<2, 2>(g, stop, tile);
          if (tile < tokens.tiles) product.template multiply<2, 1>(g, stop, tile);
        } else {
          for (; tile + 2 <= tokens.tiles; tile += 2) product.template multiply<1, 2>(g, stop, tile);
          if (tile < tokens.tiles) product.template multiply<1, 1>(g, stop, tile);
        }
      }
      load_bias(a, first, count, bias);
      for (int64_t tile = 0; tile < tokens.tiles; ++tile) {
        for (int64_t half = 0; half < kRows; half += kTileRows) {
          VecF v[kTileRows];
          __builtin_memcpy(v, totals + (tile * kRows + half) * kTileLanes, sizeof v);
          transpose<float>(v);
          for (int64_t j = 0; j < kTileLanes; ++j) store(results[j] + half, v[j]);
        }
        for (int64_t j = 0, m = tile * kTileLanes; j < kTileLanes && m < a.tokens; ++j, ++m)
          store_results(a, m, first, count, results[j], whole.scale[m], bias);
      }
    }
  });
}

constexpr int64_t kMostTileGroup = 1 << 17;  // 128 x 127 x 2^17 < 2^31

static bool try_tiles(const QuantMatmulArgs& a) {
  const QuantWeight& w = a.w;
  if (!scalekern::has_amx() || a.tokens < 5 || w.rows == 0 || w.columns == 0) return false;
  if (least(w.group, w.columns) > kMostTileGroup) return false;
  const bool rest = w.has_rest(float(1 << w.bits >> 1)), brief = w.groups > 1 && w.group <= kLaneGroup;
  if (!rest) tile_product<Flush::plain>(a);
  else if (brief) tile_product<Flush::rest>(a);
  else tile_product<Flush::exact>(a);
  return true;
}

}  // namespace
#endif
