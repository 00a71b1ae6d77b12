// Both sides of an integer product in lines of 64 bytes, for AVX-512's and AMX's sums of byte products.
//
// Lines of codes are 64 columns of a row whatever its groups. A group has a line of activations for each line of codes
// that it meets, with 0 in the columns that are not its own: groups that share a line each multiply all of it.
// Rows whose lines all fill with codes of 1, 2, 4 or 8 bits are read 64 bytes at a time: plane p holds the p-th code of
// each, one plane behind the other. Other lines of 4 bits keep their planes to themselves: even columns, then odd ones
// (three operations; to spread them, 16 tokens with groups of 64 and 32 took 15 % longer). The rest is spread,
// 64 codes in seven operations, in the order of the columns.
// A code is the top bits of its byte, whose sums are 2^shift times what is wanted: to unpack is a shift and one
// operation more, and 1 to 8 bits are one kernel. Behind the last code of a row lies anything, and meets 0.
#pragma once
#include "common/amx.h"
#include "quant_matmul/cpu_quant_whole.h"

#if defined(__AVX512F__)
namespace {

constexpr int64_t kLine = 64;

struct LineLayout {
  bool stored;  // in planes, read as they are stored
  bool halves;  // else, of 4 bits: in each line its even columns before its odd ones
  int planes, shift;
  int64_t group, code_lines;  // of a row
  Buffer<int64_t> begin;      // of the activations of each group, and their end

  explicit LineLayout(const QuantWeight& w)
      : planes(8 / w.bits), shift(8 - w.bits), group(least(w.group, w.columns)), code_lines(pieces(w.columns, kLine)),
        begin(w.groups + 1) {
    stored = 8 % w.bits == 0 && group % (planes * kLine) == 0 && w.columns % (planes * kLine) == 0;
    if (!stored) planes = 1;
    halves = !stored && w.bits == 4;
    begin[0] = 0;
    for (int64_t g = 0; g < w.groups; ++g)
      begin[g + 1] = begin[g] + pieces(least((g + 1) * group, w.columns), kLine) - code_line(g);
  }
  int64_t code_line(int64_t g) const { return g * group / kLine; }
};

// The codes of 64 columns, each the top bits of its byte: 16 of a quarter of the bytes as 16-bit windows, even codes
// moved down to the lower byte's top, odd ones up to the upper's.
class Spread {
 public:
  explicit Spread(int bits) {
    alignas(64) uint16_t words[32], by[2][32];
    alignas(64) uint8_t from[2][64];
    for (int i = 0; i < 32; ++i) {
      words[i] = uint16_t(i / 8 * bits + i % 8);
      for (int odd = 0; odd < 2; ++odd) {
        const int bit = (i % 8 * 2 + odd) * bits, byte = (bit + bits + 7) / 8 - 2, at = bit - 8 * byte;  // byte >= -1
        from[odd][2 * i] = uint8_t(byte), from[odd][2 * i + 1] = uint8_t(byte + 1);
        by[odd][i] = uint16_t(odd ? 16 - bits - at : at - (8 - bits));
      }
    }
    words_ = _mm512_load_si512(words);
    even_ = _mm512_load_si512(from[0]), odd_ = _mm512_load_si512(from[1]);
    down_ = _mm512_load_si512(by[0]), up_ = _mm512_load_si512(by[1]);
  }
  __m512i operator()(__m512i bytes) const {
    const __m512i quarters = _mm512_permutexvar_epi16(words_, bytes);
    const __m512i even = _mm512_srlv_epi16(_mm512_shuffle_epi8(quarters, even_), down_);
    const __m512i odd = _mm512_sllv_epi16(_mm512_shuffle_epi8(quarters, odd_), up_);
    return _mm512_ternarylogic_epi64(_mm512_set1_epi16(0xff), even, odd, 0xca);  // the lower byte of even
  }

 private:
  __m512i words_, even_, odd_, down_, up_;
};

// Rows of codes in lines: code - middle times 2^shift with a flip of the top bit, without one the code times 2^shift.
class CodeLines {
 public:
  CodeLines(const QuantWeight& w, const LineLayout& layout, uint8_t flip)
      : w_(w), layout_(layout), spread_(w.bits), top_(_mm512_set1_epi8(char(0xff << layout.shift))),
        flip_(_mm512_set1_epi8(char(flip))) {}

  // The bytes of lines as they are stored, one behind the other.
  void copy(int64_t first, int64_t rows, int64_t line, int64_t lines, uint8_t* dst, int64_t pitch) const {
    const int64_t each = kLine / 8 * w_.bits, offset = line * each, bytes = lines * each;
    const int64_t ahead = offset + 2 * bytes <= w_.row_bytes() ? bytes : rows * w_.pitch - offset;
    const int64_t end = least(bytes, w_.row_bytes() - offset);
    const uint8_t* row = w_.data + first * w_.pitch + offset;
    for (int64_t r = 0; r < rows; ++r, row += w_.pitch, dst += pitch)
      for (int64_t i = 0; i < end; i += kLine) {
        __builtin_prefetch(row + i + ahead, 0, 2);
        if (end - i >= kLine) _mm512_storeu_si512(dst + i, _mm512_loadu_si512(row + i));
        else __builtin_memcpy(dst + i, row + i, size_t(end - i));
      }
  }

  // Lines of `rows` rows; of planes, all of the bytes they are of.
  void unpack(int64_t first, int64_t rows, int64_t line, int64_t lines, uint8_t* dst, int64_t pitch) const {
    if (layout_.halves) return unpack<-2>(first, rows, line, lines, dst, pitch);
    switch (layout_.stored ? layout_.planes : 0) {
      case 8: return unpack<8>(first, rows, line, lines, dst, pitch);
      case 4: return unpack<4>(first, rows, line, lines, dst, pitch);
      case 2: return unpack<2>(first, rows, line, lines, dst, pitch);
      case 1: return unpack<1>(first, rows, line, lines, dst, pitch);
      default: unpack<0>(first, rows, line, lines, dst, pitch);
    }
  }

 private:
  // P planes, spread (0), or halves of lines (-2). The machine does not foresee rows in short runs: the next run of
  // each is fetched, behind the last the next rows'.
  template <int P>
  __attribute__((noinline)) void unpack(
      int64_t first, int64_t rows, int64_t line, int64_t lines, uint8_t* dst, int64_t pitch) const {
    const int64_t each = P > 0 ? kLine : 8 * w_.bits, all = w_.row_bytes();  // bytes of P lines, or of one
    const int64_t offset = line / most(P, 1) * each, bytes = lines / most(P, 1) * each;
    const int64_t end = least(offset + bytes, all);
    const int64_t ahead = offset + 2 * bytes <= all ? bytes : rows * w_.pitch - offset;
    const uint8_t* row = w_.data + first * w_.pitch;
    const Spread spread = spread_;  // in registers: stores of bytes might change members
    const __m512i top = top_, flip = flip_;
    const auto store = [&](__m512i codes, uint8_t* to) __attribute__((always_inline)) {
      _mm512_storeu_si512(to, _mm512_ternarylogic_epi64(codes, top, flip, 0x6a));  // (codes & top) ^ flip
    };
    const auto read = [](int64_t count) { return ~__mmask64(0) >> (kLine - count); };
    const __mmask64 full = read(each);
    for (int64_t r = 0; r < rows; ++r, row += w_.pitch, dst += pitch) {
      uint8_t* to = dst;
      for (int64_t i = offset; i < end; i += each, to += most(P, 1) * kLine) {
        __builtin_prefetch(row + i + ahead, 0, 2);
        if (P == 0) {
          store(spread(_mm512_maskz_loadu_epi8(end - i < each ? read(end - i) : full, row + i)), to);
          continue;
        }
        if (P == -2) {
          __m512i bytes = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(
              end - i < each ? __mmask32(read(end - i)) : ~__mmask32(0), row + i));
          bytes = _mm512_inserti64x4(_mm512_slli_epi16(bytes, 4), _mm512_castsi512_si256(bytes), 1);
          store(bytes, to);
          continue;
        }
        const __m512i codes = _mm512_loadu_si512(row + i);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const int left = 8 - 8 / most(P, 1) - p * (8 / most(P, 1));
          store(left ? _mm512_slli_epi16(codes, unsigned(left)) : codes, to + p * kLine);
        }
      }
    }
  }

  const QuantWeight& w_;
  const LineLayout& layout_;
  const Spread spread_;
  const __m512i top_, flip_;
};

// Numbers of bytes in the order of the planes they will meet; whole lines of them.
template <int P>
static void place(const int8_t* __restrict src, int64_t count, int8_t* __restrict dst) {
  for (; count > 0; count -= P * kLine, src += P * kLine, dst += P * kLine)
    for (int i = 0; i < kLine; ++i)
      for (int p = 0; p < P; ++p) dst[p * kLine + i] = src[i * P + p];
}
static void place(const int8_t* src, int64_t count, int planes, int8_t* dst) {
  switch (planes) {
    case 8: return place<8>(src, count, dst);
    case 4: return place<4>(src, count, dst);
    case 2: return place<2>(src, count, dst);
    default: __builtin_memcpy(dst, src, size_t(count));
  }
}

// Lines whose even columns go before the odd ones.
static void halve(int8_t* lines, int64_t count) {
  const __m512i parted = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m512i joined = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  for (; count > 0; --count, lines += kLine)
    _mm512_storeu_si512(
        lines, _mm512_permutexvar_epi64(joined, _mm512_shuffle_epi8(_mm512_loadu_si512(lines), parted)));
}

// Tokens as whole numbers, in lines.
struct WholeLines {
  int64_t pitch;
  Buffer<int8_t> x;
  Buffer<float> scale;
  Buffer<int64_t> sum;  // of each group

  WholeLines(const QuantMatmulArgs& a, const LineLayout& layout)
      : pitch((layout.begin[a.w.groups] + 1) * kLine), x(a.tokens * pitch), scale(a.tokens),
        sum(a.tokens * a.w.groups) {
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
        round_to_bytes(token, K, scale[m], a.activation_max, plain);
        int8_t* line = x + m * pitch;
        __builtin_memset(line, 0, size_t(pitch));
        for (int64_t g = 0; g < w.groups; ++g) {
          const int64_t first = g * layout.group, count = least(layout.group, K - first);
          place(plain + first, count, layout.planes, line + layout.begin[g] * kLine + first % kLine);
          __m512i total = _mm512_setzero_si512();
          for (int64_t i = layout.begin[g]; i < layout.begin[g + 1]; ++i)
            total = add_byte_products(total, _mm512_set1_epi8(1), _mm512_load_si512(line + i * kLine));
          sum[m * w.groups + g] = _mm512_reduce_add_epi32(total);
        }
        if (layout.halves) halve(line, layout.begin[w.groups]);
      }
    });
  }

 private:
  // x / scale to the nearest whole number within +-top, halves to even; 0 where the scale is no number. The product
  // with 1 / scale is off by less than 5e-5 below 128: only beside a half, one vector in a thousand, is there a
  // division.
  static void round_to_bytes(const float* x, int64_t count, float scale, float top, int8_t* dst) {
    if (!(scale > 0)) return void(__builtin_memset(dst, 0, size_t(count)));
    const bool usual = scale > 0x1p-100f && scale < 0x1p100f;
    const __m512 most = _mm512_set1_ps(top), fewest = _mm512_set1_ps(-top), factor = _mm512_set1_ps(1 / scale);
    const auto within = [&](__m512 v) { return _mm512_min_ps(_mm512_max_ps(v, fewest), most); };
    for (int64_t k = 0; k < count; k += 16) {
      const __mmask16 some = count - k < 16 ? __mmask16((1 << (count - k)) - 1) : __mmask16(0xffff);
      const __m512 given = _mm512_maskz_loadu_ps(some, x + k);
      __m512 v = within(_mm512_mul_ps(given, factor));
      const __m512 off = _mm512_abs_ps(_mm512_sub_ps(v, _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT)));
      if (!usual || _mm512_cmp_ps_mask(off, _mm512_set1_ps(0.4999f), _CMP_GT_OQ))
        v = within(_mm512_div_ps(given, _mm512_set1_ps(scale)));
      _mm512_mask_cvtepi32_storeu_epi8(dst + k, some, _mm512_cvtps_epi32(v));
    }
  }
};

}  // namespace
#endif
