// Rows of a low-bit weight as tiles of bfloat16 parts: what a number is, less the parts before, rounded.
//
// 32 codes come from a row's bytes into 16-bit lanes by a shuffle and a shift. Up to 6 bits, a table of bfloat16
// numbers in one register, or two, is permuted by them (it looks at no bits above), with the group's scale, zero and
// offset in the table: 4 operations for 32 weights, and one a further part. 7 and 8 bits become floats, 16 at a time,
// but small floats of 8 bits in one part (TileBytes).
// Two groups of 16 columns have half of the table each. Others that cut 32 columns are decoded as for the float path.
#pragma once
#include "quant_matmul/cpu_quant_float_bytes.h"

#if defined(__AVX512F__)
namespace {

constexpr int64_t kTile = kTileRows * kTileBytes, kTileColumns = 32;
constexpr int kMostParts = 3;

static inline VecF low_floats(__m512i both) {
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
}
static inline VecF high_floats(__m512i both) {
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
}

// 32 floats as their parts, `next` bytes apart.
static inline void store_parts(VecF low, VecF high, int parts, void* to, int64_t next) {
  for (int i = 0;; ++i) {
    const __m512i both = to_bf16((__m512)low, (__m512)high);
    _mm512_store_si512(static_cast<char*>(to) + i * next, both);
    if (i + 1 == parts) return;
    low -= low_floats(both), high -= high_floats(both);
  }
}

// 32 codes of a row in the lowest bits of 16-bit lanes, what follows them above.
struct Windows {
  __m512i order, shifts;
  int bits;

  explicit Windows(int bits) : bits(bits) {
    alignas(64) uint8_t from[64];
    alignas(64) uint16_t by[32];
    for (int i = 0; i < 32; ++i) {
      const int bit = (bits <= 4 ? i : i % 16) * bits, end = bit + bits;  // of the 16 bytes in its quarter
      from[2 * i] = uint8_t(bit / 8), from[2 * i + 1] = uint8_t(end > bit / 8 * 8 + 8 ? bit / 8 + 1 : 128);
      by[i] = uint16_t(bit % 8);
    }
    order = _mm512_load_si512(from), shifts = _mm512_load_si512(by);
  }
  int64_t reads() const { return bits <= 4 ? 16 : 2 * bits + 16; }  // bytes
  __m512i operator()(const uint8_t* p) const {
    const auto quarter = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    __m512i bytes = _mm512_broadcast_i32x4(quarter(p));
    if (bits > 4) bytes = _mm512_mask_broadcast_i32x4(bytes, 0xff00, quarter(p + 2 * bits));
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, order), shifts);
  }
};

// Groups of 16 columns and codes of up to 4 bits, of which a step meets two.
static bool in_pairs(const QuantWeight& w) { return w.groups > 1 && w.group == 16 && w.bits <= 4; }

enum TableKind { kPairs, k16, k32, k64 };  // groups in pairs, up to 4 bits, 5 and 6

// Of a weight; its Group, made of the parts of a group, or of two, stores the parts of 32 weights, tiles apart.
template <TableKind kKind, int P>
struct TileTable {
  VecF given[4];  // the numbers of codes, less the zero where it is one for all
  const bool same;
  __m512i mask, upper;  // where groups come in pairs: codes of the second look at the upper half

  explicit TileTable(const QuantWeight& w)
      : same(!w.zeros.data && !w.offsets.data), mask(_mm512_set1_epi16(15)),
        upper(_mm512_maskz_set1_epi16(0xffff0000, 16)) {
    const float zero = !same ? 0.0f : w.table ? w.zero : (w.zero - w.base) / w.step;
    float all[64];
    for (int i = 0; i < 64; ++i)
      all[i] = (w.table ? w.table[i & ((1 << w.bits) - 1)] : float(i & ((1 << w.bits) - 1))) - zero;
    for (int i = 0; i < 4; ++i) given[i] = load(all + 16 * i);
  }
  VecF numbers(int i, const GroupParts& of, int64_t g) const {
    return same ? given[i] * of.scale[g] : (given[i] - of.zero[g]) * of.scale[g] + of.offset[g];
  }
  struct Group {
    const TileTable& all;
    __m512i table[P][2];
    Group(const TileTable& all, const GroupParts& of, int64_t g, int64_t second) : all(all) {
#pragma GCC unroll 2
      for (int half = 0; half <= (kKind == k64); ++half) {
        VecF low = all.numbers(2 * half, of, g);
        VecF high = kKind == k16 ? low : all.numbers(2 * half + 1, of, second);
#pragma GCC unroll 3
        for (int i = 0; i < P; ++i) {
          table[i][half] = to_bf16((__m512)low, (__m512)high);
          if (i + 1 == P) break;
          low -= low_floats(table[i][half]);
          high = kKind == k16 ? low : high - high_floats(table[i][half]);
        }
      }
    }
    void operator()(__m512i codes, char* to) const {
      if (kKind == kPairs) codes = _mm512_ternarylogic_epi64(codes, all.mask, all.upper, 0xea);  // codes & mask | upper
#pragma GCC unroll 3
      for (int i = 0; i < P; ++i)
        _mm512_store_si512(to + i * kTile, kKind == k64 ? _mm512_permutex2var_epi16(table[i][0], codes, table[i][1])
                                                        : _mm512_permutexvar_epi16(codes, table[i][0]));
    }
  };
};
template <bool kFloats, int P>
struct TileWide {  // integers; small floats as in AsSmallFloat
  float power;
  __m128i sign_shift, shift;
  __m512i mask, sign, rest, nan;

  explicit TileWide(const QuantWeight& w) : mask(_mm512_set1_epi16(int16_t((1 << w.bits) - 1))) {
    const int bias = (1 << (w.bits - 2 - w.mantissa)) - 1;
    sign_shift = _mm_cvtsi32_si128(16 - w.bits), shift = _mm_cvtsi32_si128(10 - w.mantissa);
    sign = _mm512_set1_epi16(int16_t(1 << (w.bits - 1))), rest = _mm512_set1_epi16(int16_t((1 << (w.bits - 1)) - 1));
    nan = _mm512_set1_epi16(w.mantissa == 3 ? 0x7f : -1);
    power = kFloats ? from_bits(uint32_t(127 + 15 - bias) << 23) : 1;
  }
  VecF number(__m256i lanes) const {
    return kFloats ? (VecF)_mm512_cvtph_ps(lanes) : (VecF)_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(lanes));
  }
  struct Group {
    const TileWide& all;
    float scale, zero, offset;
    Group(const TileWide& all, const GroupParts& of, int64_t g, int64_t)
        : all(all), scale(of.scale[g] * all.power), zero(of.zero[g]),
          offset(kFloats ? of.offset[g] - of.scale[g] * zero : of.offset[g]) {}
    // Integers that are the zero become 0 exactly; floats have none as a rule.
    VecF value(VecF number) const { return (kFloats ? number : number - zero) * scale + offset; }
    void operator()(__m512i codes, char* to) const {
      __m512i lanes = _mm512_and_si512(codes, all.mask);
      if (kFloats) {
        const __m512i magnitude = _mm512_and_si512(codes, all.rest);
        lanes = _mm512_or_si512(_mm512_sll_epi16(_mm512_and_si512(codes, all.sign), all.sign_shift),
                                _mm512_sll_epi16(magnitude, all.shift));
        lanes = _mm512_mask_blend_epi16(_mm512_cmpeq_epi16_mask(magnitude, all.nan), lanes, _mm512_set1_epi16(0x7fff));
      }
      const VecF low = all.number(_mm512_castsi512_si256(lanes));
      const VecF high = all.number(_mm512_extracti64x4_epi64(lanes, 1));
      store_parts(value(low), value(high), P, to, kTile);
    }
  };
};

// Floats of 8 bits in one part, 64 at a time: the bytes of their bfloat16 numbers come from two tables of 128. 5
// operations for 32 weights; powers of two as scales are added to exponents, 3 more; other scales 7. As floats they
// were 20, put together in 16-bit lanes 13. 4096 x 4096, 16 bfloat16 tokens, in turns: e4m3 in groups of 128 2.3 to 1.9
// ms, of 64 2.9 to 2.4, of 32 3.7 to 3.1, mxfp8 2.8 to 2.4.
struct TileBytes : FloatBytes {
  enum Scales { kOnes, kPowers, kAny };
  __m512i exponents_low[2], exponents_high[2];  // of what powers are added to: less that of 1
  uint8_t special;

  explicit TileBytes(const QuantWeight& w) : FloatBytes(w), special(w.mantissa == 3 ? 0x7f : 0x7c) {
    tables([&](int i) { return uint16_t(number(w, i) - (i > 0 && i < special ? 0x3f80 : 0)); },
           exponents_low, exponents_high);
  }
  // Of groups [g, end).
  static Scales scales(const GroupParts& of, int64_t g, int64_t end) {
    const __m512i one = _mm512_set1_epi32(0x3f800000), rest = _mm512_set1_epi32(int32_t(0x807fffff));
    const __m512i least_power = _mm512_set1_epi32((127 - 64) << 23), range = _mm512_set1_epi32(128 << 23);
    bool ones = true, powers = true;
    for (; g < end; g += 16) {
      const __mmask16 here = __mmask16(end - g >= 16 ? 0xffff : (1 << (end - g)) - 1);
      const auto bits = [&](const float* p) { return _mm512_maskz_loadu_epi32(here, p + g); };
      const __m512i scale = bits(of.scale), others = _mm512_or_si512(bits(of.zero), bits(of.offset));
      const __m512i strange = _mm512_or_si512(_mm512_and_si512(scale, rest), others);
      ones = ones && _mm512_mask_cmpneq_epi32_mask(here, scale, one) == 0;
      powers = powers && _mm512_test_epi32_mask(strange, strange) == 0 &&
               _mm512_mask_cmpgt_epu32_mask(here, _mm512_sub_epi32(scale, least_power), range) == 0;
    }
    return !powers ? kAny : ones ? kOnes : kPowers;
  }
};

// Columns [first, first + count) of a row as tile_row has them.
template <TileBytes::Scales kScales>
static __attribute__((noinline)) void tile_bytes(const QuantWeight& w, const TileBytes& all, int64_t row,
                                                 const GroupParts& of, int64_t first, int64_t count, int64_t ahead,
                                                 char* to) {
  const __m512i* const l = kScales == TileBytes::kPowers ? all.exponents_low : all.low;
  const __m512i* const h = kScales == TileBytes::kPowers ? all.exponents_high : all.high;
  const __m512i low[2] = {l[0], l[1]}, high[2] = {h[0], h[1]};
  // Quarters hold 8 codes of the first 32 and 8 of the second; or two of 4, 16 columns apart, a byte in turns.
  alignas(64) uint8_t places[64];
  for (int i = 0; i < 64; ++i) {
    const int quarter = i / 16, second = i / 8 % 2 * 32, at = i % 8;
    places[i] = uint8_t(second + (kScales == TileBytes::kAny ? at % 2 * 16 + quarter * 4 + at / 2 : quarter * 8 + at));
  }
  const __m512i order = _mm512_load_si512(places), sign = _mm512_set1_epi8(int8_t(0x80));
  const __m512i one = _mm512_set1_epi8(1), normal = _mm512_set1_epi8(int8_t(all.special - 1));
  const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
  const int64_t steps = w.group / kTileColumns, end = w.groups == 1 ? 1 : w.groups;
  int64_t g = w.groups == 1 ? 0 : first / w.group, left = w.groups == 1 ? w.columns : steps - first % w.group / 32;
  const auto group = [&] {
    const int64_t own = g < end ? g : end - 1;
    if (--left == 0) ++g, left = steps;
    return own;
  };
  const uint8_t* p = w.data + row * w.pitch + first;
  for (; count > 0; count -= 64, p += 64, to += 2 * kTile) {
    __builtin_prefetch(p + ahead, 0, 2);
    const __m512i read = _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, p);
    const __m512i codes = permute_bytes(order, read);
    const __m512i numbers = _mm512_ternarylogic_epi64(codes, sign, from_bytes(codes, high[0], high[1]), 0x6a);
    const __m512i rest = from_bytes(codes, low[0], low[1]);
    __m512i both[2] = {_mm512_unpacklo_epi8(rest, numbers), _mm512_unpackhi_epi8(rest, numbers)};
    const int64_t own[2] = {group(), group()};
    if constexpr (kScales == TileBytes::kPowers) {
      const __m512i magnitude = _mm512_andnot_si512(sign, codes);
      const uint64_t most = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(magnitude, one), normal);
      // Quarters again: bytes 0 to 7 of each are the first 32's.
      const uint64_t mask[2] = {_pext_u64(most, 0x00ff00ff00ff00ff), _pext_u64(most, 0xff00ff00ff00ff00)};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        int16_t exponent;  // the float's upper half
        __builtin_memcpy(&exponent, reinterpret_cast<const char*>(of.scale + own[i]) + 2, 2);
        both[i] = _mm512_mask_add_epi16(both[i], uint32_t(mask[i]), both[i], _mm512_set1_epi16(exponent));
      }
    }
    if constexpr (kScales == TileBytes::kAny)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const float scale = of.scale[own[i]], offset = of.offset[own[i]] - scale * of.zero[own[i]];
        const VecF even = (VecF)_mm512_slli_epi32(both[i], 16), odd = (VecF)_mm512_and_si512(both[i], upper);
        both[i] = to_bf16((__m512)(even * scale + offset), (__m512)(odd * scale + offset));
      }
    _mm512_store_si512(to, both[0]);
    if (count > 32) _mm512_store_si512(to + kTile, both[1]);
  }
}

// `runs` groups, or pairs, each of `steps` steps with all of their bytes: a loop that stays in registers.
template <int P, class Value>
static __attribute__((noinline)) void tile_steps(const Windows& all, const Value& values, const GroupParts& of,
                                                 int64_t g, int64_t each, int64_t runs, int64_t steps,
                                                 const uint8_t* p, int64_t ahead, char* to) {
  const Windows windows = all;  // which no store can change
  const Value value = values;
  const GroupParts parts = of;
  const int64_t step = 4 * windows.bits;
  const auto next = [&](const typename Value::Group& group) __attribute__((always_inline)) {
    __builtin_prefetch(p + ahead, 0, 2);  // short pieces of many rows: nothing that the machine foresees
    group(windows(p), to);
    p += step, to += P * kTile;
  };
  for (; steps == 1 && runs > 0; --runs, g += each) next(typename Value::Group(value, parts, g, g + each - 1));
  for (; runs > 0; --runs, g += each) {
    const typename Value::Group group(value, parts, g, g + each - 1);
    for (int64_t i = 0; i < steps; ++i) next(group);
  }
}

// Columns [first, first + count) of a row, first a multiple of 32, to tiles `P kTile` apart; what follows the row's
// last column up to a multiple of 32 is some number. g is the first one's group; `runs` of `steps` are tile_steps'.
template <int P, class Value>
static void tile_row(const QuantWeight& w, const Windows& windows, const Value& value, int64_t row,
                     const GroupParts& parts, int64_t first, int64_t count, int64_t g, int64_t runs, int64_t steps,
                     int64_t ahead, char* to) {
  const uint8_t* data = w.data + row * w.pitch;
  const int64_t bytes = w.row_bytes(), end = first + count, step = 4 * w.bits;
  const int64_t each = in_pairs(w) ? 2 : 1;
  tile_steps<P>(windows, value, parts, g, each, runs, steps, data + first / 8 * w.bits, ahead, to);
  int64_t k = first + runs * steps * kTileColumns;
  to += runs * steps * P * kTile;
  if (w.groups > 1) g += runs * each;
  const uint8_t* p = data + k / 8 * w.bits;
  while (k < end) {
    const int64_t stop = w.groups == 1 ? end : least(end, (g + each) * w.group);
    const typename Value::Group group(value, parts, g, least(g + each, w.groups) - 1);
    for (; k < stop; k += kTileColumns, p += step, to += P * kTile) {
      __builtin_prefetch(p + ahead, 0, 2);  // short pieces of many rows: nothing that the machine foresees
      if (p - data + windows.reads() <= bytes) {
        group(windows(p), to);
        continue;
      }
      uint8_t tail[48] = {};
      __builtin_memcpy(tail, p, size_t(least(bytes - (p - data), step)));
      group(windows(tail), to);
    }
    g += each;
  }
}

template <class Own, class Place>
static void bytes_as_tiles(const QuantWeight& w, int64_t row, int64_t rows, const Own& own, int64_t first,
                           int64_t count, int64_t ahead, const Place& place) {
  using Bytes = TileBytes;
  const Bytes bytes(w);
  const int64_t g = w.groups == 1 ? 0 : first / w.group;
  const int64_t end = w.groups == 1 ? 1 : least(w.groups, pieces(first + count, w.group));
  for (int64_t r = 0; r < rows; ++r) {
    const GroupParts of = own(r);
    switch (Bytes::scales(of, g, end)) {
      case Bytes::kOnes: tile_bytes<Bytes::kOnes>(w, bytes, row + r, of, first, count, ahead, place(r)); break;
      case Bytes::kPowers: tile_bytes<Bytes::kPowers>(w, bytes, row + r, of, first, count, ahead, place(r)); break;
      case Bytes::kAny: tile_bytes<Bytes::kAny>(w, bytes, row + r, of, first, count, ahead, place(r)); break;
    }
  }
}

// Whether the numbers of a table, times others of `more` significant bits, are exact in bfloat16; integer codes are.
static bool exact_in_bf16(const QuantWeight& w, int more = 0) {
  for (int i = 0; w.table && i < 1 << w.bits; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, w.table + i, 4);
    if (24 - __builtin_ctz(bits | 0x800000) + more > 8) return false;
  }
  return true;
}

// A table's numbers times scales of few bits (block formats), what is outside of them aside.
static bool exact_when_scaled(const QuantWeight& w) {
  const int bits = w.scales.dtype == QuantDtype::e8m0 ? 0 : w.scales.dtype == QuantDtype::e4m3 ? 4 : 8;
  return w.table && exact_in_bf16(w, bits) && !w.has_rest(0);
}

// `rows` rows as strips of 16, `pitch` bytes apart; own(r) are a row's parts. `line`: count floats, and 32. What is
// `ahead` of them, in bytes, comes next.
template <int P, class Own>
static void tile_rows(const QuantWeight& w, int64_t row, int64_t rows, const Own& own, int64_t first, int64_t count,
                      int64_t ahead, float* line, char* tiles, int64_t pitch) {
  const auto place = [&](int64_t r) { return tiles + r / 16 * pitch + r % 16 * kTileBytes; };
  if (w.groups == 1 || w.group % kTileColumns == 0 || in_pairs(w)) {
    const Windows windows(w.bits);
    const int64_t g = w.groups == 1 ? 0 : first / w.group, each = in_pairs(w) ? 2 : 1;
    const int64_t inside = w.row_bytes() < windows.reads() ? 0 : (w.row_bytes() - windows.reads()) / (4 * w.bits) + 1;
    const int64_t whole = most(0, least(count / kTileColumns, inside - first / kTileColumns));
    const int64_t steps = w.groups == 1 ? whole : each * w.group / kTileColumns;
    const bool cut = w.groups > 1 && first % (steps * kTileColumns) != 0;
    const int64_t runs = w.groups == 1 ? 1 : cut ? 0 : least(whole / steps, (w.groups - g) / each);
    const auto all = [&](const auto& value) {
      for (int64_t r = 0; r < rows; ++r)
        tile_row<P>(w, windows, value, row + r, own(r), first, count, g, runs, steps, ahead, place(r));
    };
    if (in_pairs(w)) return all(TileTable<kPairs, P>(w));
    if (w.bits <= 4) return all(TileTable<k16, P>(w));
    if (w.bits == 5) return all(TileTable<k32, P>(w));
    if (w.bits == 6) return all(TileTable<k64, P>(w));
    if (w.table == nullptr) return all(TileWide<false, P>(w));
    if constexpr (P == 1)
      if (w.bits == 8) return bytes_as_tiles(w, row, rows, own, first, count, ahead, place);
    return all(TileWide<true, P>(w));
  }
  for (int64_t r = 0; r < rows; ++r) {
    decode(w, row + r, own(r), first, count, line);
    zero(line + count, round_up(count, kTileColumns) - count);
    char* to = place(r);
    for (int64_t k = 0; k < count; k += kTileColumns, to += P * kTile)
      store_parts(load(line + k), load(line + k + 16), P, to, kTile);
  }
}

}  // namespace
#endif
