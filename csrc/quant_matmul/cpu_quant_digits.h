// Few float tokens with integer codes on AVX-512 VNNI: tokens as fixed point, in bytes, so that an instruction
// multiplies 64 codes by a digit of 64 activations, exactly.
//
// A part of the columns (a group, as a rule) has a unit: the power of two that holds all its numbers, where that loses
//   nothing, else the least unit that does. Three digits are 24 bits of the largest number, which float32's own
//   products do not have left either: 1.6e-7 to 2.2e-7 at K = 1000 to 5000, torch's 1.2e-7 to 1.8e-7. A
//   16-bit result takes two.
// What is left over must be small beside the usual number of the part, the one of the exponents' mean, so that a large
//   one does not hide the others where the weight has nothing for it: else the token takes one more, up to four
//   (numbers up to some 3000 times the usual one), else, as where a number is not finite or out of range, the kernels
//   of floats.
//   Each token by itself: it is the same in any company.
// 3.5 us for a token of 4096 (the units 1.2, the digits 2.3).
#pragma once
#include "quant_matmul/cpu_quant_float_bytes.h"
#include "quant_matmul/cpu_quant_tokens.h"

#if defined(__AVX512F__)
namespace {

// Columns of a weight. A line is 64 bytes of codes: as they are stored, plane p of it the p-th code of each byte, or
// spread (3, 5, 6 and 7 bits), each the top bits of a byte. A part is the columns that share a unit: a group, an equal
// piece of a long one, or, where a line holds several groups whole (shared), each of them. A section, which is joined
// from its digits, is a part, or a line of shared ones.
struct Sections {
  static constexpr int64_t kLineBytes = 64, kMost = 1024;  // columns of a piece: 128 x 128 x 1024 / 16 < 2^22
  bool spread, shared, fits;
  bool floats;      // small ones, multiplied as bfloat16, which holds them
  bool mapped;      // a table of 16 numbers that are whole ones of some step
  int middle;       // what is taken from a code, or from what it is mapped to
  float step;       // of codes
  uint8_t map[16];  // table[code] / step + middle
  int planes, vectors;         // vectors of a token's digit that a line of codes meets
  int64_t line, lines;         // columns of a line, lines
  int64_t part, parts, split;  // columns of a part, parts, parts of a group
  int64_t each, count;         // lines of a section, sections
  int64_t line_parts, padded;  // parts of a shared line; all, read 16 at a time
  alignas(64) int32_t lane_part[16];

  explicit Sections(const QuantWeight& w)
      : spread(8 % w.bits != 0), floats(w.table && w.bits > 4 && w.mantissa), mapped(w.table && !floats),
        middle(w.bits == 1 ? 0 : 1 << (w.bits - 1)), step(spread ? from_bits(uint32_t(127 - 8 + w.bits) << 23) : 1),
        planes(spread ? 1 : 8 / w.bits), vectors(floats ? 2 : planes), line(kLineBytes * planes),
        lines(pieces(w.columns, line)) {
    part = w.groups == 1 ? round_up(w.columns, line) : w.group, split = 1;
    shared = part < line;
    fits = w.columns > 0 && (shared ? part % (4 * planes) == 0 && line % part == 0 : part % line == 0);
    if (mapped) fits = fits && make_map(w);
    if (floats) fits = fits && part % 16 == 0, step = 1;
    if (part > kMost) {
      split = w.groups == 1 ? pieces(part, kMost) : part / kMost;
      fits = fits && (w.groups == 1 || part % kMost == 0);
      part = kMost;
    }
    parts = pieces(w.columns, part), padded = round_up(parts, 16) + 16;
    each = shared ? 1 : part / line, count = pieces(lines, each), line_parts = shared ? line / part : 1;
    for (int i = 0; i < 16; ++i) lane_part[i] = int32_t(shared ? i * 4 * planes / part : 0);
  }

 private:
  // float4_e2m1 has steps of 1/2 up to 6.
  bool make_map(const QuantWeight& w) {
    if (w.bits != 4) return false;
    middle = 64, step = 0.5f;
    for (int i = 0; i < 16; ++i) {
      const float steps = w.table[i] * 2;
      if (!(steps >= -64 && steps < 64) || steps != float(int(steps))) return false;
      map[i] = uint8_t(int(steps) + middle);
    }
    return true;
  }
};

// Digits of a number, the first one's unit 1 and each further one's 1 / 256 of the last: bytes from -128 to 127.
// A sum of a digit's products, which starts at kStart's bits, is a float's bits: that of kStart + sum digit / 256^i.
template <int D>
struct DigitSum;
template <>
struct DigitSum<1> {  // of activations that were rounded to bytes
  static constexpr float kStart[1] = {0x1.8p23f};
  static constexpr float kAll = 0x1.8p23f;
};
template <>
struct DigitSum<2> {
  static constexpr float kStart[2] = {0x1.8p23f, 0x1.8p15f};
  static constexpr float kAll = 0x1.8p23f + 0x1.8p15f;
};
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

static inline __mmask16 until(int64_t count) {
  return count < 16 ? __mmask16((1 << count) - 1) : __mmask16(0xffff);
}

// What decides on a part's unit.
struct Look {
  float largest, usual;  // the magnitude that the exponents' mean stands for
  int64_t count;         // of numbers that are not 0
  int lowest;            // no bit of any number is below 2^lowest
};
static Look look(const float* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512(), bits = most;
  __m512 exponents = _mm512_setzero_ps(), least_one = _mm512_set1_ps(200), floor = _mm512_set1_ps(-200);
  Look found{};
  for (int64_t k = 0; k < count; k += 16) {
    const __m512i v = _mm512_and_si512(_mm512_castps_si512(_mm512_maskz_loadu_ps(until(count - k), x + k)), magnitude);
    const __mmask16 some = _mm512_test_epi32_mask(v, v);
    const __m512 e = _mm512_max_ps(_mm512_getexp_ps(_mm512_castsi512_ps(v)), floor);
    most = _mm512_max_epu32(most, v), bits = _mm512_or_si512(bits, v);
    exponents = _mm512_mask_add_ps(exponents, some, exponents, e);
    least_one = _mm512_mask_min_ps(least_one, some, least_one, e);
    found.count += __builtin_popcount(some);
  }
  const uint32_t top = _mm512_reduce_max_epu32(most), all = uint32_t(_mm512_reduce_or_epi32(bits)) & 0x7fffff;
  found.largest = from_bits(top);
  found.lowest = int(_mm512_reduce_min_ps(least_one)) - 23 + __builtin_ctz(all | 0x800000);
  const float mean = found.count ? _mm512_reduce_add_ps(exponents) / float(found.count) : 0.0f;
  found.usual = from_bits(uint32_t((mean < -126 ? 1 : mean + 127) * 0x1p23f));
  return found;
}

struct Part {
  float unit, sum;  // of the first digit; of the digits (where it is asked for)
};
// A part's numbers in `digits` digits, `pitch` bytes apart, up to 15 bytes beyond; false where that does not hold them
// well enough: what is left over may be `allowed` times the usual number.
static bool split(const Look& seen, const float* x, int64_t count, int digits, float allowed, bool sum, int8_t* plain,
                  int64_t pitch, Part& part) {
  if (!(seen.largest < 0x1p100f) || (seen.count && seen.largest < 0x1p-80f)) return false;  // or NaN
  const float scale = from_bits(uint32_t(127 + 8 * (digits - 1)) << 23);
  const __m512i flip = _mm512_set1_epi32(int32_t(0x80808080u >> (32 - 8 * digits)));
  // 127.4 < 127 + 127 / 256. A power of two where that loses nothing, else the least.
  uint32_t bits;
  float own = seen.largest / 127.4f;
  __builtin_memcpy(&bits, &own, 4);
  const int exponent = int((bits + 0x7fffff) >> 23) - 127;
  if (seen.count == 0) own = 1;
  else if (seen.lowest >= exponent - 8 * (digits - 1)) own = from_bits(uint32_t(127 + exponent) << 23);
  const __m512 by = _mm512_set1_ps(1 / own), fine = _mm512_set1_ps(scale);
  __m512 left = _mm512_setzero_ps();
  __m512d low = _mm512_setzero_pd(), high = low;
  for (int64_t k = 0; k < count; k += 16) {
    const __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(until(count - k), x + k), by), fine);
    const __m512i whole = _mm512_cvtps_epi32(v);
    left = _mm512_add_ps(left, _mm512_abs_ps(_mm512_sub_ps(v, _mm512_cvtepi32_ps(whole))));
    if (sum) {
      low = _mm512_add_pd(low, _mm512_cvtepi32_pd(_mm512_castsi512_si256(whole)));
      high = _mm512_add_pd(high, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(whole, 1)));
    }
    __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, flip), flip);
    for (int d = digits - 1; d >= 0; --d, bytes = _mm512_srli_epi32(bytes, 8))
      _mm_storeu_si128(reinterpret_cast<__m128i*>(plain + d * pitch + k), _mm512_cvtepi32_epi8(bytes));
  }
  if (!(_mm512_reduce_add_ps(left) * (own / scale) <= allowed * float(seen.count) * seen.usual)) return false;
  part = {own, float(_mm512_reduce_add_pd(_mm512_add_pd(low, high)) * double(own / scale))};
  return true;
}

struct DigitTokens {
  static constexpr int kMostDigits = 4;
  const QuantWeight& w;
  const Sections& s;
  float middle;            // of the zeros: what they differ from it is taken from the sums
  bool more;               // w is more than scale (code - middle)
  int64_t pitch;           // bytes of a token
  Buffer<int8_t> x;        // [token][line][vector][digit][byte]
  Buffer<float> unit;      // [token][part], of the first digit
  Buffer<float> sum;       // [token][part]
  Buffer<int32_t> start;   // [token][section][digit][lane]
  int digits[4];           // of each token; 0: none hold it
  const float* scale;      // of tokens that are whole numbers up to 127, of one digit; else null

  DigitTokens(const QuantMatmulArgs& a, const Sections& s, const Tokens& tokens, const float* scale = nullptr)
      : w(a.w), s(s), middle(w.table ? 0.0f : float(s.middle)), more(w.has_rest(middle)),
        pitch((s.lines * s.vectors * kMostDigits + 1) * 64),
        x(a.tokens * pitch), unit(a.tokens * s.padded), sum(a.tokens * s.padded),
        start(a.tokens * s.count * kMostDigits * 16), scale(scale) {
    zero<float>(unit, a.tokens * s.padded), zero<float>(sum, a.tokens * s.padded);
    const bool half = a.out.dtype == QuantDtype::f16 || a.out.dtype == QuantDtype::bf16;
    const float allowed = half ? 1e-4f : 1e-6f;
    const Buffer<int8_t> plain(s.floats ? 0 : kMostDigits * plain_pitch());
    if (s.floats) zero<int32_t>(start, a.tokens * s.count * kMostDigits * 16);
    for (int64_t t = 0; t < a.tokens; ++t) {
      if (s.floats) {
        digits[t] = !fits_bf16(tokens[t]) ? 0 : scale || a.x.dtype == QuantDtype::bf16 ? 1 : half ? 2 : 3;
        if (digits[t] == 1) lay_floats<1>(t, tokens[t]);
        if (digits[t] == 2) lay_floats<2>(t, tokens[t]);
        if (digits[t] == 3) lay_floats<3>(t, tokens[t]);
        continue;
      }
      if (scale) {
        whole(tokens[t], t, plain), lay<1>(t, plain), digits[t] = 1;
        continue;
      }
      digits[t] = half ? 2 : 3;
      while (digits[t] && !split(tokens[t], t, digits[t], allowed, plain))
        digits[t] = digits[t] < kMostDigits ? digits[t] + 1 : 0;
      if (digits[t] == 2) lay<2>(t, plain);
      if (digits[t] == 3) lay<3>(t, plain);
      if (digits[t] == 4) lay<4>(t, plain);
    }
  }
  int64_t plain_pitch() const { return s.lines * s.line + 64; }  // vectors are stored whole
  const int32_t* starts(int64_t t, int64_t section) const { return start + (t * s.count + section) * kMostDigits * 16; }

 private:
  // Three parts of 8 bits are a float, where the smallest part is no subnormal that counts.
  bool fits_bf16(const float* from) const {
    const float largest = look(from, w.columns).largest;
    return largest == 0 || (largest > 0x1p-60f && largest < 0x1p100f);  // and no NaN, which is above them all
  }

  // What is left of a number, rounded, part by part. Bytes of codes part into 8 and 8 of each 16 (FloatBytes).
  template <int D>
  void lay_floats(int64_t t, const float* from) const {
    for (int64_t line = 0; line < s.lines; ++line)
      for (int v = 0; v < 2; ++v) {
        VecF low, high;  // columns 0 .. 7 (v = 0) of the first two 16s, of the last two
        alignas(64) float own[32];
        for (int i = 0; i < 4; ++i) {
          const int64_t k = line * 64 + i * 16 + v * 8, left = w.columns - k;
          _mm256_store_ps(own + i * 8, _mm256_maskz_loadu_ps(
              left >= 8 ? __mmask8(255) : left > 0 ? __mmask8((1 << left) - 1) : __mmask8(0), from + k));
        }
        low = load(own), high = load(own + 16);
        for (int d = 0; d < D; ++d) {
          const __m512i part = to_bf16((__m512)low, (__m512)high);
          _mm512_store_si512(x + t * pitch + ((line * 2 + v) * D + d) * 64, part);
          low -= (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(part)), 16);
          high -= (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part, 1)), 16);
        }
      }
    for (int64_t p = 0; p < s.parts; ++p) {
      double total = 0;
      for (int64_t k = p * s.part; more && k < least((p + 1) * s.part, w.columns); ++k) total += from[k];
      unit[t * s.padded + p] = 1, sum[t * s.padded + p] = float(total);
    }
  }

  // The digits of a token in the order of its columns; false where they do not hold it well enough.
  bool split(const float* from, int64_t t, int count, float allowed, int8_t* plain) const {
    for (int64_t p = 0; p < s.parts; ++p) {
      const int64_t first = p * s.part, here = least(s.part, w.columns - first);
      Part part;
      // Up to 15 bytes beyond: of the next part, or 0 at the end.
      const Look seen = look(from + first, here);
      if (!::split(seen, from + first, here, count, allowed, more, plain + first, plain_pitch(), part)) return false;
      unit[t * s.padded + p] = part.unit * s.step;
      sum[t * s.padded + p] = part.sum;
    }
    for (int d = 0; d < count; ++d)
      __builtin_memset(plain + d * plain_pitch() + w.columns, 0, size_t(plain_pitch() - w.columns));
    return true;
  }

  void whole(const float* from, int64_t t, int8_t* plain) const {
    for (int64_t k = 0; k < w.columns; ++k) plain[k] = int8_t(from[k]);
    __builtin_memset(plain + w.columns, 0, size_t(plain_pitch() - w.columns));
    for (int64_t p = 0; p < s.parts; ++p) {
      int total = 0;
      for (int64_t k = p * s.part; more && k < least((p + 1) * s.part, w.columns); ++k) total += plain[k];
      unit[t * s.padded + p] = s.step, sum[t * s.padded + p] = float(total);
    }
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
    const __m512i all = _mm512_set1_epi8(char(s.spread ? 128 : s.middle));
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

}  // namespace
#endif
