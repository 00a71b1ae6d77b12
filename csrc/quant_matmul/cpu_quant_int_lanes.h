// Integer products of a few tokens on AVX-512 VNNI: 64 codes by 64 activations an instruction, straight to int32.
//
// Bound by the weight's bytes: 4096 x 4096 of 4 bits are 8.9 MB with their scales. 128 codes of a row take a load, two
//   shifts or masks, two products, a conversion and a multiply-add (AVX2: 4 loads' worth of bytes, twice the
//   operations).
// Codes are unsigned, so a group's lanes begin with minus the middle times the activations that they will meet. Groups
//   of at most kLaneGroup keep 16 lanes, exact in float32, to the end of the row; longer ones are added up exactly
//   first.
#pragma once
#include "common/amx.h"
#include "quant_matmul/cpu_quant_lines.h"

#if defined(__AVX512F__)
namespace {

struct LaneProduct {
  const QuantWeight& w;
  const LineLayout& layout;
  const WholeLines& tokens;
  float middle;
  bool more, brief;
  Buffer<int32_t> start;  // [token][g][16]
  Buffer<float> sum;      // [token][g]

  LaneProduct(const QuantMatmulArgs& a, const LineLayout& layout, const WholeLines& tokens)
      : w(a.w), layout(layout), tokens(tokens), middle(float(1 << w.bits >> 1)), more(w.has_rest(middle)),
        brief(w.groups > 1 && w.group <= kLaneGroup),
        start(a.tokens * w.groups * 16), sum(a.tokens * w.groups + 8) {
    zero<float>(sum + a.tokens * w.groups, 8);
    const __m512i half = _mm512_set1_epi8(char(0x80));
    for (int64_t i = 0; i < a.tokens * w.groups; ++i) {
      const int8_t* x = tokens.x + i / w.groups * tokens.pitch;
      const int64_t g = i % w.groups;
      __m512i total = _mm512_setzero_si512();
      for (int64_t line = layout.begin[g]; line < layout.begin[g + 1]; ++line)
        total = add_byte_products(total, half, _mm512_load_si512(x + line * kLine));
      _mm512_store_si512(start + i * 16, _mm512_sub_epi32(_mm512_setzero_si512(), total));
      sum[i] = float(tokens.sum[i]);
    }
  }

  // acc[r][t] += codes of row r times token t, all of a group; P planes of a stored line.
  template <int P, int R, int T>
  inline __attribute__((always_inline)) void multiply(
      const uint8_t* const* rows, const int8_t* x, int64_t g, __m512i (&acc)[R][T]) const {
    const __m512i top = _mm512_set1_epi8(char(0xff << (8 - 8 / P)));
    const int64_t next = R * w.pitch;
    int64_t offset = layout.code_line(g) / P * kLine;
    for (int64_t line = layout.begin[g]; line < layout.begin[g + 1]; line += P, offset += kLine) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (T == 1) __builtin_prefetch(rows[r] + offset + next);
        const __m512i bytes = _mm512_loadu_si512(rows[r] + offset);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const int left = 8 - 8 / P - p * (8 / P);
          const __m512i moved = left ? _mm512_slli_epi16(bytes, unsigned(left)) : bytes;
          const __m512i code = P == 1 ? bytes : _mm512_and_si512(moved, top);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t)
            acc[r][t] =
                add_byte_products(acc[r][t], code, _mm512_load_si512(x + t * tokens.pitch + (line + p) * kLine));
        }
      }
    }
  }

  template <int P, int R, int T>
  __attribute__((noinline)) void tile(
      const uint8_t* const* rows, const RowParts* parts, int64_t m, float* c, int64_t ldc) const {
    const int8_t* x = tokens.x + m * tokens.pitch;
    const float power = from_bits(uint32_t(127 - layout.shift) << 23);
    const auto starts = [&](int64_t g, __m512i (&acc)[R][T]) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[r][t] = _mm512_load_si512(start + ((m + t) * w.groups + g) * 16);
    };
    if (!brief) {
      float total[R][T] = {};
      for (int64_t g = 0; g < w.groups; ++g) {
        __m512i acc[R][T];
        starts(g, acc);
        multiply<P>(rows, x, g, acc);
        for (int r = 0; r < R; ++r)
          for (int t = 0; t < T; ++t) {
            const int64_t i = (m + t) * w.groups + g;
            const double all = double(_mm512_reduce_add_epi32(acc[r][t])) * double(power);
            const double from_zero = (double(middle) - double(parts[r].zero[g])) * double(tokens.sum[i]);
            total[r][t] += parts[r].scale[g] * float(more ? all + from_zero : all);
            if (w.offsets.data) total[r][t] += parts[r].offset[g] * sum[i];
          }
      }
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) c[t * ldc + r] = total[r][t];
      return;
    }
    __m512 total[R][T] = {};
    for (int64_t g = 0; g < w.groups; ++g) {
      __m512i acc[R][T];
      starts(g, acc);
      multiply<P>(rows, x, g, acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512 scale = _mm512_set1_ps(parts[r].scale[g]);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) total[r][t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(acc[r][t]), total[r][t]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        __m256 rest = _mm256_setzero_ps();
        const float* x_sums = sum + (m + t) * w.groups;
        for (int64_t g = 0; more && g < w.groups; g += 8)  // 0 past the groups; the sums there: the next token's, or 0
          rest = _mm256_fmadd_ps(_mm256_loadu_ps(parts[r].rest + g), _mm256_loadu_ps(x_sums + g), rest);
        c[t * ldc + r] = _mm512_reduce_add_ps(_mm512_fmadd_ps(
            total[r][t], _mm512_set1_ps(power), _mm512_zextps256_ps512(rest)));
      }
  }

  template <int P, int R, int T>
  void strip(int64_t count, const uint8_t* const* rows, const RowParts* parts, int64_t m, float* c, int64_t ldc) const {
    int64_t r = 0;
    for (; r + R <= count; r += R) tile<P, R, T>(rows + r, parts + r, m, c + r, ldc);
    for (; r < count; ++r) tile<P, 1, T>(rows + r, parts + r, m, c + r, ldc);
  }
  template <int P>
  void block(
      int64_t count, int64_t all, const uint8_t* const* rows, const RowParts* parts, float* c, int64_t ldc) const {
    int64_t m = 0;
    for (; m + 4 <= all; m += 4) strip<P, 4, 4>(count, rows, parts, m, c + m * ldc, ldc);
    switch (all - m) {
      case 1: return strip<P, 4, 1>(count, rows, parts, m, c + m * ldc, ldc);
      case 2: return strip<P, 4, 2>(count, rows, parts, m, c + m * ldc, ldc);
      case 3: return strip<P, 4, 3>(count, rows, parts, m, c + m * ldc, ldc);
    }
  }
};

static void lane_product(const QuantMatmulArgs& a) {
  constexpr int64_t kRows = 16;
  const QuantWeight& w = a.w;
  const LineLayout layout(w);
  const WholeLines whole(a, layout);
  const LaneProduct product(a, layout, whole);
  parallel_stretches(a.tokens * w.rows * w.columns >= kParallelWork, pieces(w.rows, kRows), 4, [&](const auto& take) {
    const int64_t pitch = (layout.code_lines + 1) * kLine;
    const CodeLines codes(w, layout, 0);
    const Buffer<uint8_t> own(layout.stored ? 0 : kRows * pitch);
    const Buffer<float> c(kRows * a.tokens), memory(kRows * RowParts::floats(w.groups));
    float bias[kRows];
    const uint8_t* rows[kRows];
    RowParts parts[kRows];
    take([&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kRows; first < least(end * kRows, w.rows); first += kRows) {
        const int64_t count = least(kRows, w.rows - first);
        if (!layout.stored) codes.unpack(first, count, 0, layout.code_lines, own, pitch);
        for (int64_t r = 0; r < count; ++r) {
          parts[r] = RowParts(w, first + r, product.middle, memory + r * RowParts::floats(w.groups));
          rows[r] = layout.stored ? w.data + (first + r) * w.pitch : own + r * pitch;
        }
        switch (layout.planes) {
          case 8: product.block<8>(count, a.tokens, rows, parts, c, kRows); break;
          case 4: product.block<4>(count, a.tokens, rows, parts, c, kRows); break;
          case 2: product.block<2>(count, a.tokens, rows, parts, c, kRows); break;
          default: product.block<1>(count, a.tokens, rows, parts, c, kRows);
        }
        load_bias(a, first, count, bias);
        for (int64_t m = 0; m < a.tokens; ++m) store_results(a, m, first, count, c + m * kRows, whole.scale[m], bias);
      }
    });
  });
}

}  // namespace
#endif
