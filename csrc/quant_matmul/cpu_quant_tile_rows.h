// Rows of a low-bit weight as tiles of bfloat16 parts: what a number is, less the parts before, rounded.
//
// 32 codes come from a row's bytes into 16-bit lanes by a shuffle and a shift. Up to 6 bits, a table of bfloat16
// numbers in one register, or two, is permuted by them (it looks at no bits above), with the group's scale, zero and
// offset in the table: 4 operations for 32 weights, and one a further part. 7 and 8 bits become floats, 16 at a time.
// Two groups of 16 columns have half of the table each. Others that cut 32 columns are decoded as for the float path.
#pragma once
#include "common/amx.h"
#include "quant_matmul/cpu_quant_decode.h"

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

// Floats of 8 bits in one part, times a power of two: bfloat16's sign, exponent and mantissa put together in 16-bit
// lanes, subnormals from a table: 11 operations for 32 weights where floats take 20. 4096 x 4096, 16 bfloat16 tokens,
// dense / this: e4m3 in groups of 128 0.59 to 0.71 before, 0.88 to 1.07; e5m2 0.63 to 0.77, 0.90; mxfp8 0.7, 0.8 to 1.0.
struct TileBytes {
  static constexpr bool kBytes = true;
  using Wide = TileWide<true, 1>;
  const Wide wide;  // times anything else
  __m128i shift;
  __m512i magnitude, bias, below, subnormal, special, infinity, sign;

  explicit TileBytes(const QuantWeight& w)
      : wide(w), shift(_mm_cvtsi32_si128(7 - w.mantissa)), magnitude(_mm512_set1_epi16(0x7f)),
        bias(_mm512_set1_epi16(int16_t((128 - (1 << (w.bits - 2 - w.mantissa))) << 7))),
        below(_mm512_set1_epi16(int16_t(1 << w.mantissa))),
        subnormal(to_bf16((__m512)load(w.table), (__m512)load(w.table + 16))),
        special(_mm512_set1_epi16(w.mantissa == 3 ? 0x7f : 0x7c)), infinity(_mm512_set1_epi16(0x7f80)),
        sign(_mm512_set1_epi16(int16_t(0x8000))) {}
  struct Group {
    const TileBytes& all;
    const GroupParts& of;
    const int64_t g;
    bool power;
    __m512i exponent;
    Group(const TileBytes& all, const GroupParts& of, int64_t g, int64_t) : all(all), of(of), g(g) {
      uint32_t bits;
      __builtin_memcpy(&bits, of.scale + g, 4);
      const int by = int(bits >> 23) - 127;  // of a negative number above 127
      power = (bits & 0x7fffff) == 0 && by >= -64 && by <= 64 && of.zero[g] == 0 && of.offset[g] == 0;
      exponent = _mm512_set1_epi16(int16_t(by << 7));
    }
    void operator()(__m512i codes, char* to) const {
      if (!power) return Wide::Group(all.wide, of, g, g)(codes, to);
      const __m512i code = _mm512_and_si512(codes, all.magnitude);
      __m512i lanes = _mm512_add_epi16(_mm512_sll_epi16(code, all.shift), all.bias);
      lanes = _mm512_mask_permutexvar_epi16(lanes, _mm512_cmplt_epu16_mask(code, all.below), code, all.subnormal);
      lanes = _mm512_mask_add_epi16(lanes, _mm512_test_epi16_mask(code, code), lanes, exponent);
      const __m512i marked = _mm512_or_si512(lanes, all.infinity);
      lanes = _mm512_mask_blend_epi16(_mm512_cmpge_epu16_mask(code, all.special), lanes, marked);
      _mm512_store_si512(to, _mm512_ternarylogic_epi64(_mm512_slli_epi16(codes, 8), all.sign, lanes, 0xea));
    }
  };
};

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
    if constexpr (requires { Value::kBytes; })
      group(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), to);
    else group(windows(p), to);
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
      if (w.bits == 8) return all(TileBytes(w));
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
