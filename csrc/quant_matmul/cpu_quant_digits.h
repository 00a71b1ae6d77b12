// Products of up to four float tokens with codes of 1, 2, 4 or 8 bits on AVX-512 VNNI: tokens as fixed point, in bytes,
// so that an instruction multiplies 64 codes by a digit of 64 activations, exactly.
#pragma once
#include "common/amx.h"
#include "quant_matmul/cpu_quant_tokens.h"

#if defined(__AVX512F__)
namespace {

// Columns of a weight as its stored bytes hold them: a line is 64 bytes, plane p of it the p-th code of each byte.
// A part is the columns that share a unit: a group, an equal piece of a long one, or, where a line holds several groups
// whole (shared), each of them. A section, one part or a line of shared ones, is joined from its digits.
struct Sections {
  static constexpr int64_t kLineBytes = 64, kMost = 1024;  // columns of a piece: its sums stay below 2^22
  int planes;
  int64_t line, lines, part, parts, split;  // columns of a line, lines; columns of a part, parts, parts of a group
  bool shared, fits;
  int64_t each, count;  // lines of a section, sections
  int64_t line_parts;   // of a shared line
  int64_t padded;       // parts, read 16 at a time
  alignas(64) int32_t lane_part[16];

  explicit Sections(const QuantWeight& w) {
    planes = 8 / w.bits, line = kLineBytes * planes, lines = pieces(w.columns, line);
    const int64_t group = w.groups == 1 ? round_up(w.columns, line) : w.group;
    shared = group < line;
    fits = 8 % w.bits == 0 && w.columns > 0 && (shared ? group % (4 * planes) == 0 && line % group == 0 : group % line == 0);
    part = group, split = 1;
    if (group > kMost) {
      part = w.groups == 1 || group % kMost == 0 ? kMost : group;
      split = w.groups == 1 ? pieces(group, part) : group / part;
      fits = fits && part <= kMost;
    }
    parts = pieces(w.columns, part), each = shared ? 1 : part / line, count = pieces(lines, each);
    padded = round_up(parts, 16) + 16, line_parts = shared ? line / part : 1;
    for (int i = 0; i < 16; ++i) lane_part[i] = int32_t(shared ? i * 4 * planes / part : 0);
  }
};

// Digits of a number, the first one's unit 1 and each further one's 1 / 256 of the last: bytes from -128 to 127.
// A sum of a digit's products, which starts at kStart's bits, is a float's bits: that of kStart + sum digit / 256^i.
template <int D>
struct DigitSum;
template <>
struct DigitSum<3> {
  static constexpr float kStart[3] = {0x1.8p23f, 0x1.8p15f, 0x1.8p7f};
  static constexpr float kAll = 0x1.8p23f + 0x1.8p15f + 0x1.8p7f;
};
template <>
struct DigitSum<4> {
  static constexpr float kStart[4] = {0x1.8p23f, 0x1.8p15f, 0x1.8p7f + 0x1p-2f, 0x1.8p-1f};  // together a whole number
  static constexpr float kAll = 0x1.8p23f + 0x1.8p15f + 193;
};

struct DigitTokens {
  static constexpr int kMostDigits = 4;
  const QuantWeight& w;
  const Sections& s;
  int middle;
  bool more;               // w is more than scale (code - middle)
  int64_t pitch;           // bytes of a token
  Buffer<int8_t> x;        // [token][line][plane][digit][byte]
  Buffer<float> unit;      // [token][part], of the first digit
  Buffer<float> sum;       // [token][part]
  Buffer<int32_t> start;   // [token][section][digit][lane]
  int digits[4];           // of each token; 0: none hold it

  DigitTokens(const QuantMatmulArgs& a, const Sections& s, const Tokens& tokens)
      : w(a.w), s(s), middle(w.bits == 1 ? 0 : 1 << (w.bits - 1)), more(w.has_rest(float(middle))),
        pitch((s.lines * s.planes * kMostDigits + 1) * 64),
        x(a.tokens * pitch), unit(a.tokens * s.padded), sum(a.tokens * s.padded),
        start(a.tokens * s.count * kMostDigits * 16) {
    zero<float>(unit, a.tokens * s.padded), zero<float>(sum, a.tokens * s.padded);
    const bool half = a.out.dtype == QuantDtype::f16 || a.out.dtype == QuantDtype::bf16;
    const float allowed = half ? 1e-4f : 1e-6f;
    const Buffer<int8_t> plain(kMostDigits * plain_pitch());
    for (int64_t t = 0; t < a.tokens; ++t) {
      digits[t] = 3;
      while (digits[t] && !split(tokens[t], t, digits[t], allowed, plain)) digits[t] = digits[t] == 3 ? 4 : 0;
      if (digits[t] == 3) lay<3>(t, plain);
      if (digits[t] == 4) lay<4>(t, plain);
    }
  }
  int64_t plain_pitch() const { return s.lines * s.line + 64; }  // vectors are stored whole
  const int32_t* starts(int64_t t, int64_t section) const { return start + (t * s.count + section) * kMostDigits * 16; }

 private:
  // What decides on a part's unit.
  struct Look {
    float largest, usual;  // the magnitude that the exponents' mean stands for
    int64_t count;         // of numbers that are not 0
    int lowest;            // no bit of any number is below 2^lowest
    bool finite;
  };
  Look look(const float* x, int64_t first, int64_t last) const {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512(), bits = most;
    __m512 exponents = _mm512_setzero_ps(), least_one = _mm512_set1_ps(200), floor = _mm512_set1_ps(-200);
    Look found{};
    for (int64_t k = first; k < last; k += 16) {
      const __m512i v = _mm512_and_si512(_mm512_castps_si512(_mm512_maskz_loadu_ps(until(last - k), x + k)), magnitude);
      const __mmask16 some = _mm512_test_epi32_mask(v, v);
      const __m512 e = _mm512_max_ps(_mm512_getexp_ps(_mm512_castsi512_ps(v)), floor);
      most = _mm512_max_epu32(most, v), bits = _mm512_or_si512(bits, v);
      exponents = _mm512_mask_add_ps(exponents, some, exponents, e), least_one = _mm512_mask_min_ps(least_one, some, least_one, e);
      found.count += __builtin_popcount(some);
    }
    const uint32_t top = _mm512_reduce_max_epu32(most), all = uint32_t(_mm512_reduce_or_epi32(bits)) & 0x7fffff;
    found.largest = from_bits(top), found.finite = top < 0x7f800000;
    found.lowest = int(_mm512_reduce_min_ps(least_one)) - 23 + __builtin_ctz(all | 0x800000);
    const float mean = found.count ? _mm512_reduce_add_ps(exponents) / float(found.count) : 0.0f;
    found.usual = from_bits(uint32_t((mean < -126 ? 1 : mean + 127) * 0x1p23f));
    return found;
  }
  static __mmask16 until(int64_t count) { return count < 16 ? __mmask16((1 << count) - 1) : __mmask16(0xffff); }

  // The digits of a token in the order of its columns; false where they do not hold it well enough.
  bool split(const float* from, int64_t t, int count, float allowed, int8_t* plain) const {
    const float scale = from_bits(uint32_t(127 + 8 * (count - 1)) << 23);
    const __m512i flip = _mm512_set1_epi32(int32_t(0x80808080u >> (32 - 8 * count)));
    for (int64_t p = 0; p < s.parts; ++p) {
      const int64_t first = p * s.part, last = least(first + s.part, w.columns);
      const Look seen = look(from, first, last);
      if (!seen.finite || seen.largest > 0x1p100f || (seen.count && seen.largest < 0x1p-80f)) return false;
      // 127.4 < 127 + 127 / 256 + 127 / 65536. A power of two where that loses nothing, else the least.
      uint32_t bits;
      float own = seen.largest / 127.4f;
      __builtin_memcpy(&bits, &own, 4);
      const int exponent = int((bits + 0x7fffff) >> 23) - 127;
      if (seen.count == 0) own = 1;
      else if (seen.lowest >= exponent - 8 * (count - 1)) own = from_bits(uint32_t(127 + exponent) << 23);
      const __m512 by = _mm512_set1_ps(1 / own), fine = _mm512_set1_ps(scale);
      __m512 left = _mm512_setzero_ps();
      __m512d low = _mm512_setzero_pd(), high = low;
      for (int64_t k = first; k < last; k += 16) {
        const __mmask16 some = until(last - k);
        const __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, from + k), by), fine);
        const __m512i whole = _mm512_cvtps_epi32(v);
        left = _mm512_add_ps(left, _mm512_abs_ps(_mm512_sub_ps(v, _mm512_cvtepi32_ps(whole))));
        if (more) {
          low = _mm512_add_pd(low, _mm512_cvtepi32_pd(_mm512_castsi512_si256(whole)));
          high = _mm512_add_pd(high, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(whole, 1)));
        }
        __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, flip), flip);
        for (int d = count - 1; d >= 0; --d, bytes = _mm512_srli_epi32(bytes, 8)) {
          int8_t* to = plain + d * plain_pitch() + k;  // up to 15 beyond: of the next part, or 0 at the end
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bytes));
        }
      }
      if (!(_mm512_reduce_add_ps(left) * (own / scale) <= allowed * float(seen.count) * seen.usual)) return false;
      unit[t * s.padded + p] = own;
      sum[t * s.padded + p] = float(_mm512_reduce_add_pd(_mm512_add_pd(low, high)) * double(own / scale));
    }
    for (int d = 0; d < count; ++d)
      __builtin_memset(plain + d * plain_pitch() + w.columns, 0, size_t(plain_pitch() - w.columns));
    return true;
  }

  template <int D>
  void lay(int64_t t, const int8_t* plain) const {
    for (int d = 0; d < D; ++d) {
      const int8_t* from = plain + d * plain_pitch();
      int8_t* to = x + t * pitch + d * 64;
      switch (s.planes) {
        case 8: place<8, D>(from, to); break;
        case 4: place<4, D>(from, to); break;
        case 2: place<2, D>(from, to); break;
        default: place<1, D>(from, to);
      }
    }
    // Codes are unsigned: sums start with minus the middle one times the digits they will meet.
    const __m512i all = _mm512_set1_epi8(char(middle));
    for (int64_t i = 0; i < s.count; ++i)
      for (int d = 0; d < D; ++d) {
        __m512i total = _mm512_setzero_si512();
        for (int64_t j = i * s.each * s.planes; j < least((i + 1) * s.each, s.lines) * s.planes; ++j)
          total = add_byte_products(total, all, _mm512_load_si512(x + t * pitch + (j * D + d) * 64));
        const __m512i bits = _mm512_castps_si512(_mm512_set1_ps(DigitSum<D>::kStart[d]));
        _mm512_store_si512(start + ((t * s.count + i) * kMostDigits + d) * 16, _mm512_sub_epi32(bits, total));
      }
  }
  template <int P, int D>
  void place(const int8_t* __restrict from, int8_t* __restrict to) const {
    for (int64_t line = 0; line < s.lines; ++line, from += P * 64, to += P * D * 64)
      for (int i = 0; i < 64; ++i)
        for (int p = 0; p < P; ++p) to[p * D * 64 + i] = from[i * P + p];
  }
};

template <int P>
class DigitProduct {
 public:
  static void run(const QuantMatmulArgs& a, const Sections& s, const DigitTokens& tokens) {
    const DigitProduct self(a, s, tokens);
    parallel_if(a.tokens * a.w.rows * a.w.columns >= kParallelWork, pieces(a.w.rows, kRows), [&](int64_t begin, int64_t end) {
      self.rows(a, begin * kRows, least(end * kRows, a.w.rows));
    });
  }

 private:
  static constexpr int64_t kRows = 16;  // of a piece of work
  // Rows that are multiplied at once.
  template <int R>
  struct Strip {
    const uint8_t *row[R], *tail[R];
    const float* scale[R];    // by their token's units: [token][part]
    const float* rest[R];
  };
  const QuantWeight& w;
  const Sections& s;
  const DigitTokens& tokens;
  const bool plain, more;     // scales are read where they lie
  const int64_t whole, left;  // lines of a row, and the bytes behind them
  const int64_t padded;

  DigitProduct(const QuantMatmulArgs& a, const Sections& s, const DigitTokens& tokens)
      : w(a.w), s(s), tokens(tokens),
        plain(w.scales.dtype == QuantDtype::f32 && (w.groups == 1 || w.scales.column == 1) && !w.outer.data && w.step == 1),
        more(tokens.more), whole(w.row_bytes() / 64), left(w.row_bytes() % 64), padded(s.padded) {}

  template <int D, int R, int T>
  static inline __attribute__((always_inline)) void multiply(
      const uint8_t* const* row, int64_t offset, int64_t ahead, const int8_t* x, int64_t pitch, __m512i (&acc)[R][T * D]) {
    const __m512i mask = _mm512_set1_epi8(char((1 << 8 / P) - 1));
    __m512i bytes[R], code[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      bytes[r] = _mm512_loadu_si512(row[r] + offset);
      __builtin_prefetch(row[r] + ahead);
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i moved = p ? _mm512_srli_epi16(bytes[r], unsigned(p * 8 / P)) : bytes[r];
        code[r] = P == 1 ? bytes[r] : _mm512_and_si512(moved, mask);
      }
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) {
          const __m512i digits = _mm512_load_si512(x + t * pitch + (p * D + d) * 64);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][t * D + d] = add_byte_products(acc[r][t * D + d], code[r], digits);
        }
    }
  }

  // Sections of several lines, of one, or of one that several groups share.
  enum Kind { kLong, kOne, kShared };

  template <int D, int R, int T, Kind kKind>
  __attribute__((noinline)) void tile(const Strip<R>& strip, int64_t m, float (&results)[T][R]) const {
    constexpr int64_t kStarts = DigitTokens::kMostDigits * 16, kStep = P * D * 64;
    const int8_t* x = tokens.x + m * tokens.pitch;
    const int32_t* starts = tokens.starts(m, 0);
    const int64_t pitch = tokens.pitch, next = s.count * kStarts, ahead = R * w.pitch, pad = padded;
    const uint8_t* row[R];
    const float* scale[R];
    for (int r = 0; r < R; ++r) row[r] = strip.row[r], scale[r] = strip.scale[r];
    const __m512 all = _mm512_set1_ps(DigitSum<D>::kAll);
    const __m512i own = _mm512_load_si512(s.lane_part);
    __m512 total[R][T];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) total[r][t] = _mm512_setzero_ps();
    const auto section = [&](int64_t i, const auto& lines) __attribute__((always_inline)) {
      __m512i acc[R][T * D];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < T * D; ++v) acc[r][v] = _mm512_load_si512(starts + v / D * next + v % D * 16);
      starts += kStarts;
      lines(acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          __m512 joined = _mm512_sub_ps(_mm512_castsi512_ps(acc[r][t * D]), all);
#pragma GCC unroll 4
          for (int d = 1; d < D; ++d) joined = _mm512_add_ps(joined, _mm512_castsi512_ps(acc[r][t * D + d]));
          const __m512 by = kKind == kShared
              ? _mm512_permutexvar_ps(own, _mm512_loadu_ps(scale[r] + t * pad + i * s.line_parts))
              : _mm512_set1_ps(scale[r][t * pad + i]);
          total[r][t] = _mm512_fmadd_ps(by, joined, total[r][t]);
        }
    };
    // All but the last, which may end with part of a line.
    const int64_t last = s.count - 1;
    int64_t offset = 0;
    for (int64_t i = 0; i < last; ++i)
      section(i, [&](auto& acc) __attribute__((always_inline)) {
        if constexpr (kKind == kLong) {
          for (const int64_t end = offset + s.each * 64; offset < end; offset += 64, x += kStep)
            multiply<D, R, T>(row, offset, offset + ahead, x, pitch, acc);
        } else {
          multiply<D, R, T>(row, offset, offset + ahead, x, pitch, acc);
          offset += 64, x += kStep;
        }
      });
    section(last, [&](auto& acc) {
      for (; offset < whole * 64; offset += 64, x += kStep) multiply<D, R, T>(row, offset, offset + ahead, x, pitch, acc);
      if (left) multiply<D, R, T>(strip.tail, 0, 0, x, pitch, acc);
    });
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        for (int64_t g = 0; more && g < s.parts; g += 16)
          total[r][t] = _mm512_fmadd_ps(
              _mm512_loadu_ps(strip.rest[r] + g), _mm512_loadu_ps(tokens.sum + (m + t) * pad + g), total[r][t]);
        results[t][r] = _mm512_reduce_add_ps(total[r][t]);
      }
  }

  void rows(const QuantMatmulArgs& a, int64_t begin, int64_t end) const {
    const Buffer<float> memory(4 * GroupParts::floats(w.groups)), scaled(4 * padded), rest(4 * padded);
    const Buffer<uint8_t> tails(4 * 64);
    float bias[kRows], results[4 * kRows];
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t count = least(kRows, end - first);
      for (int64_t m = 0; m < a.tokens;) {
        const int digits = tokens.digits[m];
        const bool two = digits && m + 1 < a.tokens && tokens.digits[m + 1] == digits;
        float* to = results + m * kRows;
        if (digits == 3 && two) strips<3, 2, 2>(first, count, m, memory, scaled, rest, tails, to);
        else if (digits == 3) strips<3, 4, 1>(first, count, m, memory, scaled, rest, tails, to);
        else if (digits == 4 && two) strips<4, 2, 2>(first, count, m, memory, scaled, rest, tails, to);
        else if (digits == 4) strips<4, 4, 1>(first, count, m, memory, scaled, rest, tails, to);
        m += 1 + two;
      }
      load_bias(a, first, count, bias);
      for (int64_t m = 0; m < a.tokens; ++m)
        if (tokens.digits[m]) store_results(a, m, first, count, results + m * kRows, 1, bias);
    }
  }

  template <int D, int R, int T>
  void strips(
      int64_t first, int64_t count, int64_t m, float* memory, float* scaled, float* rest, uint8_t* tails,
      float* results) const {
    for (int64_t begin = 0; begin < count; begin += R) {
      Strip<R> strip;
      for (int r = 0; r < R; ++r) {
        const int64_t row = first + least(begin + r, count - 1);  // behind the last one: that again
        strip.row[r] = w.data + row * w.pitch, strip.tail[r] = tails + r * 64;
        if (left) _mm512_store_si512(tails + r * 64, _mm512_maskz_loadu_epi8(~__mmask64(0) >> (64 - left), strip.row[r] + whole * 64));
        const GroupParts part(memory + r * GroupParts::floats(w.groups), w.groups);
        if (!plain || more) part.load(w, row);
        const float* scale = plain ? at<float>(w.scales.data, row * w.scales.row) : part.scale;
        strip.scale[r] = scaled + r * T * padded, strip.rest[r] = rest + r * padded;
        for (int t = 0; t < T; ++t) {
          float* __restrict to = scaled + (r * T + t) * padded;
          const float* unit = tokens.unit + (m + t) * padded;
          for (int64_t i = 0; i < s.parts; i += 16) {
            const int64_t here = s.parts - i;
            const __mmask16 some = here < 16 ? __mmask16((1 << here) - 1) : __mmask16(0xffff);
            __m512 own;
            if (s.split == 1) {
              own = _mm512_maskz_loadu_ps(some, scale + i);
            } else {
              float each[16];
              for (int64_t j = 0; j < 16; ++j) each[j] = scale[least(i + j, s.parts - 1) / s.split];
              own = _mm512_maskz_loadu_ps(some, each);
            }
            _mm512_storeu_ps(to + i, _mm512_mul_ps(own, _mm512_loadu_ps(unit + i)));
          }
          _mm512_storeu_ps(to + padded - 16, _mm512_setzero_ps());
        }
        if (more)
          for (int64_t i = 0; i < padded; ++i) {
            const int64_t g = least(i / s.split, w.groups - 1);
            rest[r * padded + i] =
                i < s.parts ? part.offset[g] - part.scale[g] * (part.zero[g] - float(tokens.middle)) : 0;
          }
      }
      float own[T][R];
      if (s.shared) tile<D, R, T, kShared>(strip, m, own);
      else if (s.each == 1) tile<D, R, T, kOne>(strip, m, own);
      else tile<D, R, T, kLong>(strip, m, own);
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < least(R, count - begin); ++r) results[t * kRows + begin + r] = own[t][r];
    }
  }
};

// The tokens that fixed point holds; `otherwise` gets each of the others by itself. False where the codes do not fit.
template <class Otherwise>
static bool in_digits(const QuantMatmulArgs& a, const Tokens& tokens, const Otherwise& otherwise) {
  if (!scalekern::has_vnni() || a.w.table) return false;
  const Sections s(a.w);
  if (!s.fits) return false;
  const DigitTokens digits(a, s, tokens);
  switch (s.planes) {
    case 8: DigitProduct<8>::run(a, s, digits); break;
    case 4: DigitProduct<4>::run(a, s, digits); break;
    case 2: DigitProduct<2>::run(a, s, digits); break;
    default: DigitProduct<1>::run(a, s, digits);
  }
  for (int64_t m = 0; m < a.tokens; ++m)
    if (!digits.digits[m]) {
      QuantMatmulArgs own = a;
      own.tokens = 1, own.x = a.x.from(m), own.out = a.out.from(m);
      otherwise(own);
    }
  return true;
}

}  // namespace
#endif
