// Rows of a low-bit weight as floats or as one code a byte. Included by cpu_*_kernel.cpp only; static like vec.h.
#pragma once
#include "quant_matmul/quant_matmul.h"
#include "selective_scan/cpu_tile.h"

namespace {

using scalekern::QuantDtype;
using scalekern::QuantPart;
using scalekern::QuantWeight;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }
static inline int64_t round_up(int64_t n, int64_t to) { return pieces(n, to) * to; }

// Memory of one thread or one call.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(__builtin_malloc(sizeof(T) * size_t(count + 64) + 64))) {}
  ~Buffer() { __builtin_free(data_); }
  Buffer(const Buffer&) = delete;
  operator T*() const {  // a vector's alignment: no load crosses a line
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data_) + 63) / 64 * 64);
  }

 private:
  T* data_;
};

static inline float from_bits(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Without branches: nvfp4 has a scale for every 16 weights, and a loop of this becomes vectors.
static inline float e4m3_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7f, sign = uint32_t(code & 0x80) << 24;
  const float normal = from_bits((magnitude << 20) + (120u << 23)), small = float(int32_t(magnitude)) * 0x1p-9f;
  const float x = magnitude >= 8 ? normal : small;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return from_bits((magnitude == 0x7f ? 0x7fc00000u : bits) | sign);
}
static inline float e8m0_to_float(uint8_t code) {
  return code == 255 ? __builtin_nanf("") : from_bits(code ? uint32_t(code) << 23 : 0x400000u);
}

static inline void load_part(const QuantPart& p, int64_t offset, int64_t step, int64_t count, float* dst) {
  const auto each = [&](const auto* __restrict data, const auto& convert) {
    float* __restrict to = dst;
    if (step == 1)
      for (int64_t i = 0; i < count; ++i) to[i] = float(convert(data[offset + i]));
    else
      for (int64_t i = 0; i < count; ++i) to[i] = float(convert(data[offset + i * step]));
  };
  const auto plain = [](auto x) { return float(x); };
  switch (p.dtype) {
    case QuantDtype::f32:  // copied in one: it is what a product of one token has beside the codes
      if (step == 1) return void(__builtin_memcpy(dst, at<float>(p.data, offset), size_t(count) * sizeof(float)));
      return each(static_cast<const float*>(p.data), plain);
    case QuantDtype::f64: return each(static_cast<const double*>(p.data), plain);
    case QuantDtype::f16: return widen(dst, static_cast<const f16*>(p.data) + offset, step, count);
    case QuantDtype::bf16: return widen(dst, static_cast<const bf16*>(p.data) + offset, step, count);
    case QuantDtype::e4m3: return each(static_cast<const uint8_t*>(p.data), e4m3_to_float);
    case QuantDtype::e8m0: return each(static_cast<const uint8_t*>(p.data), e8m0_to_float);
    case QuantDtype::i8: return each(static_cast<const int8_t*>(p.data), plain);
    case QuantDtype::u8: return each(static_cast<const uint8_t*>(p.data), plain);
  }
}

// The same for all elements of a row of a matrix.
static inline void load_row(const QuantPart& p, int64_t row, int64_t count, float* dst) {
  load_part(p, row * p.row, p.column, count, dst);
}

// Of one row, a number a group: w = scale (v - zero) + offset with v = code, or table[code].
struct GroupParts {
  float *scale, *zero, *offset;

  static constexpr int64_t floats(int64_t groups) { return 3 * groups; }
  GroupParts() = default;
  GroupParts(float* memory, int64_t groups) : scale(memory), zero(memory + groups), offset(memory + 2 * groups) {}

  void load_scales(const QuantWeight& w, int64_t row) const {
    load_row(w.scales, row, w.groups, scale);
    const float by = outer(w, row) * (w.table == nullptr ? w.step : 1);
    for (int64_t g = 0; by != 1 && g < w.groups; ++g) scale[g] *= by;
  }
  void load(const QuantWeight& w, int64_t row) const {
    load_scales(w, row);
    if (w.zeros.data) {
      load_row(w.zeros, row, w.groups, zero);
    } else {
      const float all = w.zero;
      for (int64_t g = 0; g < w.groups; ++g) zero[g] = all;
    }
    if (w.table == nullptr && (w.step != 1 || w.base != 0)) {
      const float step = w.step, base = w.base;
      for (int64_t g = 0; g < w.groups; ++g) zero[g] = (zero[g] - base) / step;
    }
    if (!w.offsets.data) return ::zero(offset, w.groups);
    load_row(w.offsets, row, w.groups, offset);
    const float by = outer(w, row);
    for (int64_t g = 0; by != 1 && g < w.groups; ++g) offset[g] *= by;
  }

 private:
  static float outer(const QuantWeight& w, int64_t row) {
    float of = 1;
    if (w.outer.data) load_row(w.outer, row, 1, &of);
    return of;
  }
};

static inline int code_at(const uint8_t* row, int64_t row_bytes, int bits, int64_t k) {
  const int64_t bit = k * bits, byte = bit / 8;
  const int word = row[byte] | (byte + 1 < row_bytes ? row[byte + 1] << 8 : 0);
  return word >> (bit % 8) & ((1 << bits) - 1);
}

#if defined(__AVX2__)
// The codes k .. k + 7 of a row; k is a multiple of 8, so that they begin with a byte.
struct EightCodes {
  const uint8_t* row;
  int64_t bytes;
  int bits;
  uint64_t places;  // where each code goes when there is one a byte
  __m256i shifts;   // where each code is, for up to 4 bits

  EightCodes(const uint8_t* row, int64_t bytes, int bits)
      : row(row), bytes(bytes), bits(bits), places(0x0101010101010101ull * uint64_t((1 << bits) - 1)),
        shifts(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits))) {}

  // From here on eight bytes cannot be read: the row ends.
  int64_t safe() const { return bytes < 8 ? 0 : (bytes - 8) / bits * 8 + 8; }
  uint64_t word(int64_t k) const {
    uint64_t word;
    __builtin_memcpy(&word, row + k / 8 * bits, 8);
    return word;
  }
  uint64_t last_word(int64_t k) const {
    uint64_t word = 0;
    const int64_t first = k / 8 * bits;
    __builtin_memcpy(&word, row + first, size_t(least(bytes - first, 8)));
    return word;
  }
  uint64_t in_bytes(uint64_t word) const { return _pdep_u64(word, places); }
  __m256i in_lanes(uint64_t word) const {
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(in_bytes(word))));
  }
};

#if defined(__AVX512F__)
// Sixteen codes to what they stand for, scale (value - zero) + offset: `of` takes a group's parts, `operator()` the
// words of the first and the last eight.
struct AsCode {
  __m512 s, z, o;
  void of(float scale, float zero, float offset) {
    s = _mm512_set1_ps(scale), z = _mm512_set1_ps(zero), o = _mm512_set1_ps(offset);
  }
  __m512 affine(__m512 value) const { return _mm512_fmadd_ps(_mm512_sub_ps(value, z), s, o); }
  static __m512i in_lanes(const EightCodes& codes, uint64_t first, uint64_t last) {
    return _mm512_cvtepu8_epi32(_mm_set_epi64x(int64_t(codes.in_bytes(last)), int64_t(codes.in_bytes(first))));
  }
  __m512 operator()(const EightCodes& codes, uint64_t first, uint64_t last) const {
    return affine(_mm512_cvtepi32_ps(in_lanes(codes, first, last)));
  }
};
// Up to 4 bits: the parts go into the table. Permutations look at the lowest 4 bits of a lane: nothing is masked.
template <bool>
struct AsTable {
  __m512 table, given;
  AsTable(const float* table, int bits) {
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i code = _mm512_and_si512(places, _mm512_set1_epi32((1 << bits) - 1));
    const __mmask16 all = __mmask16((1 << (1 << bits)) - 1);
    given = table ? _mm512_permutexvar_ps(code, _mm512_maskz_loadu_ps(all, table)) : _mm512_cvtepi32_ps(code);
  }
  void of(float scale, float zero, float offset) {
    AsCode parts;
    parts.of(scale, zero, offset);
    table = parts.affine(given);
  }
  __m512 operator()(const EightCodes& codes, uint64_t first, uint64_t last) const {
    const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(int32_t(first)), 0xff00, int32_t(last));
    const __m512i shifts = _mm512_broadcast_i64x4(codes.shifts);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), table);
  }
};
// Sign, exponent and mantissa moved to where float16 has them, which has as many or more bits of both: its conversion
// is exact for subnormals too, and 2^(difference of the biases) puts the exponent right. e4m3 has no Inf but a NaN.
struct AsSmallFloat : AsCode {
  int sign_shift, shift;
  __m512i sign, rest, nan;
  __m512 power;
  AsSmallFloat(int bits, int mantissa) : sign_shift(16 - bits), shift(10 - mantissa) {
    const int exponent = bits - 1 - mantissa, bias = (1 << (exponent - 1)) - 1;
    sign = _mm512_set1_epi32(1 << (bits - 1)), rest = _mm512_set1_epi32((1 << (bits - 1)) - 1);
    nan = _mm512_set1_epi32(bits == 8 && mantissa == 3 ? 0x7f : -1);
    power = _mm512_set1_ps(from_bits(uint32_t(127 + 15 - bias) << 23));
  }
  __m512 operator()(const EightCodes& codes, uint64_t first, uint64_t last) const {
    const __m512i code = in_lanes(codes, first, last), magnitude = _mm512_and_si512(code, rest);
    const __m512i half = _mm512_or_si512(_mm512_sll_epi32(_mm512_and_si512(code, sign), _mm_cvtsi32_si128(sign_shift)),
                                         _mm512_sll_epi32(magnitude, _mm_cvtsi32_si128(shift)));
    const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half)), power);
    return affine(_mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(magnitude, nan), value,
                                       _mm512_set1_ps(__builtin_nanf(""))));
  }
};

// dst[i] = what code first + i stands for; first is a multiple of 8.
template <class Value>
static inline void decode_run(const EightCodes& codes, const Value& value, int64_t first, int64_t count, float* dst) {
  const int64_t safe = least(codes.safe() - first, count) - 15;
  int64_t i = 0;
  for (; i < safe; i += 16) _mm512_storeu_ps(dst + i, value(codes, codes.word(first + i), codes.word(first + i + 8)));
  for (; i < count; i += 16) {
    const uint64_t last = count - i > 8 ? codes.last_word(first + i + 8) : 0;
    const __mmask16 some = count - i < 16 ? __mmask16((1 << (count - i)) - 1) : __mmask16(0xffff);
    _mm512_mask_storeu_ps(dst + i, some, value(codes, codes.last_word(first + i), last));
  }
}
#else
// Eight codes to what they stand for, scale (value - zero) + offset: `of` takes a group's parts, `operator()` a word.
struct AsCode {
  __m256 s, z, o;
  void of(float scale, float zero, float offset) {
    s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero), o = _mm256_set1_ps(offset);
  }
  __m256 affine(__m256 value) const { return _mm256_fmadd_ps(_mm256_sub_ps(value, z), s, o); }
  __m256 operator()(const EightCodes& codes, uint64_t word) const {
    return affine(_mm256_cvtepi32_ps(codes.in_lanes(word)));
  }
};
// Up to 4 bits: the parts go into the table. Permutations look at the lowest 3 bits of a lane: nothing is masked.
template <bool kSixteen>
struct AsTable {
  __m256 low, high, given_low, given_high;
  AsTable(const float* table, int bits) {
    float all[16];
    for (int i = 0; i < 16; ++i) all[i] = table ? table[i & ((1 << bits) - 1)] : float(i & ((1 << bits) - 1));
    given_low = _mm256_loadu_ps(all), given_high = _mm256_loadu_ps(all + 8);
  }
  void of(float scale, float zero, float offset) {
    AsCode parts;
    parts.of(scale, zero, offset);
    low = parts.affine(given_low), high = parts.affine(given_high);
  }
  __m256 operator()(const EightCodes& codes, uint64_t word) const {
    const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(int32_t(word)), codes.shifts);
    const __m256 a = _mm256_permutevar8x32_ps(low, code);
    if (!kSixteen) return a;
    const __m256 b = _mm256_permutevar8x32_ps(high, code);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
};
// Sign, exponent and mantissa moved to where float16 has them, which has as many or more bits of both: its conversion
// is exact for subnormals too, and 2^(difference of the biases) puts the exponent right. e4m3 has no Inf but a NaN.
struct AsSmallFloat : AsCode {
  int sign_shift, shift;
  __m256i sign, rest, nan;
  __m256 power;
  AsSmallFloat(int bits, int mantissa) : sign_shift(16 - bits), shift(10 - mantissa) {
    const int exponent = bits - 1 - mantissa, bias = (1 << (exponent - 1)) - 1;
    sign = _mm256_set1_epi32(1 << (bits - 1)), rest = _mm256_set1_epi32((1 << (bits - 1)) - 1);
    nan = _mm256_set1_epi32(bits == 8 && mantissa == 3 ? 0x7f : -1);
    power = _mm256_set1_ps(from_bits(uint32_t(127 + 15 - bias) << 23));
  }
  __m256 operator()(const EightCodes& codes, uint64_t word) const {
    const __m256i code = codes.in_lanes(word), magnitude = _mm256_and_si256(code, rest);
    const __m256i half = _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(code, sign), sign_shift),
                                         _mm256_slli_epi32(magnitude, shift));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(words), power);
    return affine(_mm256_or_ps(value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, nan))));
  }
};

// dst[i] = what code first + i stands for; first is a multiple of 8. Writes up to 7 elements beyond.
template <class Value>
static inline void decode_run(const EightCodes& codes, const Value& value, int64_t first, int64_t count, float* dst) {
  const int64_t safe = least(codes.safe() - first, count);
  int64_t i = 0;
  for (; i < safe; i += 8) _mm256_storeu_ps(dst + i, value(codes, codes.word(first + i)));
  for (; i < count; i += 8) _mm256_storeu_ps(dst + i, value(codes, codes.last_word(first + i)));
}

#endif

template <class Value>
static inline void decode_with(
    const QuantWeight& w, Value value, int64_t row, const GroupParts& parts, int64_t first, int64_t count,
    float* dst) {
  const EightCodes codes(w.data + row * w.pitch, w.row_bytes(), w.bits);
  if (w.group % 8 == 0 || w.groups == 1) {
    for (int64_t k = first; k < first + count;) {
      const int64_t g = w.groups == 1 ? 0 : k / w.group;
      const int64_t end = w.groups == 1 ? first + count : least(first + count, (g + 1) * w.group);
      value.of(parts.scale[g], parts.zero[g], parts.offset[g]);
      decode_run(codes, value, k, end - k, dst + k - first);
      k = end;
    }
    return;
  }
  value.of(1, 0, 0);
  decode_run(codes, value, first, count, dst);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t g = (first + i) / w.group;
    dst[i] = parts.scale[g] * (dst[i] - parts.zero[g]) + parts.offset[g];
  }
}

// dst[0 .. count) = w[row, first ..); first is a multiple of 8. Writes up to 7 elements beyond.
static inline void decode(
    const QuantWeight& w, int64_t row, const GroupParts& parts, int64_t first, int64_t count, float* dst) {
  if (w.bits <= 3) return decode_with(w, AsTable<false>(w.table, w.bits), row, parts, first, count, dst);
  if (w.bits == 4) return decode_with(w, AsTable<true>(w.table, w.bits), row, parts, first, count, dst);
  if (w.table == nullptr) return decode_with(w, AsCode(), row, parts, first, count, dst);
  return decode_with(w, AsSmallFloat(w.bits, w.mantissa), row, parts, first, count, dst);
}

// dst[0 .. K) = the codes of a row, one a byte. Writes up to 7 bytes beyond.
static inline void unpack(const QuantWeight& w, int64_t row, uint8_t* dst) {
  const EightCodes codes(w.data + row * w.pitch, w.row_bytes(), w.bits);
  int64_t k = 0;
  const int64_t safe = least(codes.safe(), w.columns);
  for (; k < safe; k += 8) {
    const uint64_t eight = codes.in_bytes(codes.word(k));
    __builtin_memcpy(dst + k, &eight, 8);
  }
  for (; k < w.columns; k += 8) {
    const uint64_t eight = codes.in_bytes(codes.last_word(k));
    __builtin_memcpy(dst + k, &eight, 8);
  }
}
#else
static inline void decode(
    const QuantWeight& w, int64_t row, const GroupParts& parts, int64_t first, int64_t count, float* dst) {
  const uint8_t* data = w.data + row * w.pitch;
  for (int64_t i = 0; i < count; ++i) {
    const int code = code_at(data, w.row_bytes(), w.bits, first + i);
    const int64_t g = (first + i) / w.group;
    const float value = w.table ? w.table[code] : float(code);
    dst[i] = parts.scale[g] * (value - parts.zero[g]) + parts.offset[g];
  }
}

static inline void unpack(const QuantWeight& w, int64_t row, uint8_t* dst) {
  const uint8_t* data = w.data + row * w.pitch;
  for (int64_t k = 0; k < w.columns; ++k) dst[k] = uint8_t(code_at(data, w.row_bytes(), w.bits, k));
}
#endif

}  // namespace
