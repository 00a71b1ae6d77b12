// Both sides of an integer product in lines of 64 bytes, for AVX-512's and AMX's sums of byte products.
//
// Stored bytes of a group are read 64 at a time, or all of a shorter one: plane p holds the p-th code of each, one
// plane behind the other. A code is the top bits of its byte, whose sums are 2^shift times what is wanted: to unpack is
// a shift and one operation more, and 1 to 8 bits are one kernel. Behind the last code of a group lies anything, and
// meets activations of 0. Codes that bytes cut, and groups that cut bytes, get a byte each first.
#pragma once
#include "common/amx.h"
#include "quant_matmul/cpu_quant_whole.h"

#if defined(__AVX512F__)
namespace {

constexpr int64_t kLine = 64;

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
  int64_t lines_of(int64_t bytes) const {
    return bytes < kLine ? pieces(planes * bytes, kLine) : planes * pieces(bytes, kLine);
  }
  int64_t begin(int64_t g) const { return g * lines; }
  int64_t end(const QuantWeight& w, int64_t g) const { return g + 1 < w.groups ? begin(g + 1) : row_lines; }
};

// Rows of codes in lines: code - middle times 2^shift with a flip of the top bit, without one the code times 2^shift.
class CodeLines {
 public:
  CodeLines(const QuantWeight& w, const LineLayout& layout, int64_t rows, uint8_t flip)
      : w_(w), layout_(layout), all_(layout.stored ? w.row_bytes() : w.columns), plain_pitch_(w.columns + 8),
        flip_(flip), plain_(layout.stored ? 0 : rows * plain_pitch_) {}

  void load(int64_t first, int64_t rows) {
    first_ = first, rows_ = rows;
    for (int64_t r = 0; !layout_.stored && r < rows; ++r) ::unpack(w_, first + r, plain_ + r * plain_pitch_);
  }

  // Groups g .. stop. Writes up to 63 bytes beyond.
  void unpack(int64_t g, int64_t stop, uint8_t* dst, int64_t pitch) const {
    const int64_t each = layout_.bytes;
    while (g < stop) {  // full groups of whole lines are one run
      const int64_t end = each % kLine == 0 && g + 1 < w_.groups ? least(stop, w_.groups - 1) : g + 1;
      const int64_t group = g + 1 < w_.groups ? each : layout_.last_bytes;
      run(g * each, (end - g) * group, least(group, kLine), dst, pitch);
      dst += (end - g) * layout_.lines * kLine, g = end;
    }
  }
  // Some lines of a group of 64 bytes or more.
  void unpack_part(int64_t g, int64_t line, int64_t lines, uint8_t* dst, int64_t pitch) const {
    const int64_t bytes = g + 1 < w_.groups ? layout_.bytes : layout_.last_bytes, from = line / layout_.planes * kLine;
    const int64_t here = least(bytes - from, pieces(lines, layout_.planes) * kLine);
    run(g * layout_.bytes + from, here, least(bytes, kLine), dst, pitch);
  }

 private:
  void run(int64_t offset, int64_t bytes, int64_t plane, uint8_t* dst, int64_t pitch) const {
    switch (layout_.planes) {
      case 8: return run<8>(offset, bytes, plane, dst, pitch);
      case 4: return run<4>(offset, bytes, plane, dst, pitch);
      case 2: return run<2>(offset, bytes, plane, dst, pitch);
      default: run<1>(offset, bytes, plane, dst, pitch);
    }
  }
  // The machine does not foresee rows in short runs: the next run of each is fetched, behind the last the next rows'.
  template <int P>
  __attribute__((noinline)) void run(int64_t offset, int64_t bytes, int64_t plane, uint8_t* dst, int64_t pitch) const {
    const int64_t row_pitch = layout_.stored ? w_.pitch : plain_pitch_, whole = bytes / kLine * kLine;
    const uint8_t* row = (layout_.stored ? w_.data + first_ * w_.pitch : plain_) + offset;
    const int64_t ahead = !layout_.stored ? 0 : offset + 2 * bytes <= all_ ? bytes : rows_ * w_.pitch - offset;
    const __mmask64 rest = (__mmask64(1) << (bytes - whole)) - 1;
    const __m512i top = _mm512_set1_epi8(char(0xff << layout_.shift)), flip = _mm512_set1_epi8(char(flip_));
    const auto line = [&](__m512i codes, uint8_t* to) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const int left = 8 - 8 / P - p * (8 / P);
        const __m512i moved = P == 1 ? _mm512_sll_epi16(codes, _mm_cvtsi32_si128(layout_.shift))
                                     : left ? _mm512_slli_epi16(codes, unsigned(left)) : codes;
        _mm512_storeu_si512(to + p * plane, _mm512_ternarylogic_epi64(moved, top, flip, 0x6a));  // (moved & top) ^ flip
      }
    };
    for (int64_t r = 0; r < rows_; ++r, row += row_pitch, dst += pitch) {
      for (int64_t i = 0; i < whole; i += kLine) {
        __builtin_prefetch(row + i + ahead, 0, 2);
        line(_mm512_loadu_si512(row + i), dst + i * P);
      }
      if (rest) line(_mm512_maskz_loadu_epi8(rest, row + whole), dst + whole * P);
    }
  }

  const QuantWeight& w_;
  const LineLayout& layout_;
  int64_t all_, plain_pitch_;
  uint8_t flip_;
  Buffer<uint8_t> plain_;
  int64_t first_ = 0, rows_ = 0;
};

// Tokens as whole numbers, in lines.
struct WholeLines {
  int64_t pitch;
  Buffer<int8_t> x;
  Buffer<float> scale;
  Buffer<int64_t> sum;  // of each group

  WholeLines(const QuantMatmulArgs& a, const LineLayout& layout)
      : pitch((layout.row_lines + 1) * kLine), x(a.tokens * pitch), scale(a.tokens), sum(a.tokens * a.w.groups) {
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
          place(plain + g * w.group, least(w.group, K - g * w.group), layout.planes, line + layout.begin(g) * kLine);
          __m512i total = _mm512_setzero_si512();
          for (int64_t i = layout.begin(g); i < layout.end(w, g); ++i)
            total = add_byte_products(total, _mm512_set1_epi8(1), _mm512_load_si512(line + i * kLine));
          sum[m * w.groups + g] = _mm512_reduce_add_epi32(total);
        }
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
  static void place(const int8_t* src, int64_t count, int planes, int8_t* dst) {
    switch (planes) {
      case 8: return place<8>(src, count, dst);
      case 4: return place<4>(src, count, dst);
      case 2: return place<2>(src, count, dst);
      default: __builtin_memcpy(dst, src, size_t(count));
    }
  }
  template <int P>
  static void place(const int8_t* __restrict src, int64_t count, int8_t* __restrict dst) {
    const int64_t plane = least(pieces(count, P), kLine);
    for (; count >= P * kLine; count -= P * kLine, src += P * kLine, dst += P * kLine)
      for (int i = 0; i < kLine; ++i)
        for (int p = 0; p < P; ++p) dst[p * kLine + i] = src[i * P + p];
    for (int64_t i = 0; i < count; ++i) dst[i % P * plane + i / P] = src[i];
  }
};

}  // namespace
#endif
