// The product of tokens in digits: R rows by T tokens of D digits in registers, a section at a time.
//
// 128 codes of 4 bits of a row are a load, 3 operations to part them, 2 D products, and D + 1 to join the digits'
//   sums and scale them, because those are born as the bits of floats (DigitSum): 13 at D = 3, where floats take 24 (a
//   shift, a permutation and a multiply-add for 16). One number of 8 bits: 3 for 64.
// Bound, 4096 x 4096 of 4 bits in groups of 128, one token, two cores of a Sapphire Rapids at 2.65 GHz: 6.5 cycles for
//   64 bytes and a scale, so 160 us (177 measured with rows that stay in L1), beside 200 for the 8.9 MB from L3: 200 to
//   215 measured of the native call, 230 to 270 with Python, between others' calls, which leave nothing of it in the
//   caches (37 us before the kernel, 10 where it is called alone), beside 150 to 165 of a loop that only reads. A
//   16-bit result: 30 less. With scales that nobody fetched: 25 more. Two to four tokens: two at a time, bound by
//   operations.
// Lost: rows that fetch past L2 (prefetchnta: 4 times as long); one queue of rows for all threads (260 us for 218: with
//   a stretch each they find some of their rows in their own L2 again); the upper codes by vgf2p8affineqb (one operation
//   of 13, no faster); sums of both planes in one from bytes as they lie (4 bits of precision, so a digit more); 16 rows
//   as a tile of AMX, whose columns are the digits of four groups (320 us for 195: a product and two loads of tiles wait).
//   On two Zen 5 cores, where the L3 gives these bytes in 36 us and one token takes 98: a token's digits one after the
//   other in one sum, which is shifted by 8 bits between them (98 to 103); 8 rows at once (84 to 95 for two digits);
//   bytes held in registers for both planes instead of read twice (181 to 190 on one core).
// Tables: fp4's numbers are whole ones of half a step, found by one more shuffle; floats of 8 and 6 bits become
//   bfloat16, which holds them, by two permutations of bytes, and meet a number's 8 bits at a time (float32 3 such parts,
//   a rounded token 1). Two Zen 5 cores, 4096 x 4096, one token, as float lanes (cpu_quant_few_tokens.h) and so: fp4
//   691 to 132 us, mxfp4 676 to 145, nvfp4 1230 to 220, e4m3 767 to 305, of bfloat16 tokens 161.
#include <optional>
#include <type_traits>

#include "common/tile.h"
#include "quant_matmul/cpu_quant_digits.h"
#include "quant_matmul/cpu_quant_lines.h"

#if defined(__AVX512F__)
namespace {

// What codes are: whole numbers, places in a table of such, or floats.
enum Codes { kWhole, kMapped, kFloats };

template <int P, Codes kCodes>
class DigitProduct {
 public:
  // Whether all results are finite: of floats that are not, and parts of the numbers they meet, come other such.
  static bool run(const QuantMatmulArgs& a, const Sections& s, const DigitTokens& tokens) {
    const DigitProduct self(a, s, tokens);
    const bool worth_it = a.tokens * a.w.rows * a.w.columns >= kParallelWork;
    parallel_stretches(worth_it, pieces(a.w.rows, kRows), 4, [&](const auto& take) {
      const Memory memory(self);
      take([&](int64_t begin, int64_t end) { self.rows(a, begin * kRows, least(end * kRows, a.w.rows), memory); });
    });
    return !self.strange;
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
  const __m512i map;
  struct None {
    explicit None(const QuantWeight&) {}
  };
  const std::conditional_t<kCodes == kFloats, FloatBytes, None> floats;
  mutable int strange = 0;

  DigitProduct(const QuantMatmulArgs& a, const Sections& s, const DigitTokens& tokens)
      : w(a.w), s(s), tokens(tokens),
        plain(w.scales.dtype == QuantDtype::f32 && (w.groups == 1 || w.scales.column == 1) && !w.outer.data &&
              w.step == 1),
        more(tokens.more), whole(s.spread ? s.lines : w.row_bytes() / 64),
        left(s.spread ? 0 : w.row_bytes() % 64), padded(s.padded),
        map(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.map)))), floats(a.w) {}

  template <int D, int R, int T>
  inline __attribute__((always_inline)) void multiply(
      const uint8_t* const* row, int64_t offset, int64_t ahead, const int8_t* x, int64_t pitch,
      __m512i (&acc)[R][T * D]) const {
    const __m512i mask = _mm512_set1_epi8(char((1 << 8 / P) - 1));
    __m512i bytes[R], code[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) bytes[r] = _mm512_loadu_si512(row[r] + offset);
    if constexpr (kCodes == kFloats) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m512i numbers[2];
        floats(bytes[r], numbers);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
#pragma GCC unroll 2
          for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int d = 0; d < D; ++d) {
              const __m512 sums = _mm512_castsi512_ps(acc[r][t * D + d]);
              const __m512i own = _mm512_load_si512(x + t * pitch + (v * D + d) * 64);
              acc[r][t * D + d] = _mm512_castps_si512(add_bf16_pairs(sums, numbers[v], own));
            }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; kCodes != kFloats && p < P; ++p) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i moved = p ? _mm512_srli_epi16(bytes[r], unsigned(p * 8 / P)) : bytes[r];
        code[r] = P == 1 ? bytes[r] : _mm512_and_si512(moved, mask);
        if (kCodes == kMapped) code[r] = _mm512_shuffle_epi8(map, code[r]);
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
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + ahead);
  }

  // Sections of several lines, of one, or of one that several groups share.
  enum Kind { kLong, kOne, kShared };

  template <int D, int R, int T, Kind kKind>
  __attribute__((noinline)) void tile(const Strip<R>& strip, int64_t m, VecF* totals) const {
    constexpr int64_t kStarts = DigitTokens::kMostDigits * 16;
    constexpr int64_t kStep = (kCodes == kFloats ? 2 : P) * D * 64;
    const int8_t* x = tokens.x + m * tokens.pitch;
    const int32_t* starts = tokens.starts(m, 0);
    const int64_t pitch = tokens.pitch, next = s.count * kStarts, ahead = s.spread ? 0 : R * w.pitch, pad = padded;
    const uint8_t* row[R];
    const float* scale[R];
    for (int r = 0; r < R; ++r) row[r] = strip.row[r], scale[r] = strip.scale[r];
    const __m512 all = _mm512_set1_ps(kCodes == kFloats ? 0.0f : DigitSum<D>::kAll);
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
      for (; offset < whole * 64; offset += 64, x += kStep)
        multiply<D, R, T>(row, offset, offset + ahead, x, pitch, acc);
      if (left) multiply<D, R, T>(strip.tail, 0, 0, x, pitch, acc);
    });
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        for (int64_t g = 0; more && g < s.parts; g += 16)
          total[r][t] = _mm512_fmadd_ps(
              _mm512_loadu_ps(strip.rest[r] + g), _mm512_loadu_ps(tokens.sum + (m + t) * pad + g), total[r][t]);
        totals[t * kRows + r] = (VecF)total[r][t];
      }
  }

  struct Spreading {  // 1 us to make
    const LineLayout layout;
    const CodeLines codes;
    explicit Spreading(const QuantWeight& w) : layout(w), codes(w, layout, 0) {}
  };
  // Memory of a thread for the rows it is at.
  struct Memory {
    const Buffer<float> parts, scaled, rest;
    const Buffer<uint8_t> tails, codes;
    const std::optional<Spreading> spreading;
    explicit Memory(const DigitProduct& own)
        : parts(4 * GroupParts::floats(own.w.groups)), scaled(8 * own.padded), rest(4 * own.padded), tails(4 * 64),
          codes(own.s.spread ? kRows * own.code_pitch() : 0),
          spreading(own.s.spread ? std::optional<Spreading>(own.w) : std::nullopt) {}
  };
  int64_t code_pitch() const { return (s.lines + 1) * 64; }

  void rows(const QuantMatmulArgs& a, int64_t begin, int64_t end, const Memory& memory) const {
    float bias[kRows], results[4 * kRows];
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t count = least(kRows, end - first);
      if (s.spread) memory.spreading->codes.unpack(first, count, 0, s.lines, memory.codes, code_pitch());
      for (int64_t m = 0; m < a.tokens;) {
        const int digits = tokens.digits[m];
        const bool two = digits % 4 && m + 1 < a.tokens && tokens.digits[m + 1] == digits;  // four are rare
        float* to = results + m * kRows;
        if (digits == 1 && two) strips<1, 4, 2>(first, count, m, memory, to);
        else if (digits == 1) strips<1, 4, 1>(first, count, m, memory, to);
        else if (digits == 2 && two) strips<2, 2, 2>(first, count, m, memory, to);
        else if (digits == 2) strips<2, 4, 1>(first, count, m, memory, to);
        else if (digits == 3 && two) strips<3, 2, 2>(first, count, m, memory, to);
        else if (digits == 3) strips<3, 4, 1>(first, count, m, memory, to);
        else if (digits == 4 && kCodes != kFloats) strips<4, 4, 1>(first, count, m, memory, to);
        m += 1 + two;
      }
      load_bias(a, first, count, bias);
      for (int64_t i = 0; kCodes == kFloats && i < a.tokens * kRows; ++i)
        if (tokens.digits[i / kRows] && i % kRows < count && !(results[i] * 0 == 0))
          __atomic_store_n(&strange, 1, __ATOMIC_RELAXED);
      for (int64_t m = 0; m < a.tokens; ++m)
        if (tokens.digits[m])
          store_results(a, m, first, count, results + m * kRows, tokens.scale ? tokens.scale[m] : 1, bias);
    }
  }

  // 16 parts from the i-th on: what their groups have, 0 behind the last.
  __m512 by_part(const float* of, int64_t i) const {
    if (s.split == 1) return _mm512_maskz_loadu_ps(until(s.parts - i), of + i);
    float each[16] = {};
    for (int64_t j = 0; j < least(16, s.parts - i); ++j) each[j] = of[(i + j) / s.split];
    return _mm512_loadu_ps(each);
  }

  // Scales of a row's parts by the units of a token's.
  static void scale_parts(const float* scale, const float* unit, int64_t parts, float* scaled) {
    for (int64_t i = 0; i < parts; i += 16)
      _mm512_storeu_ps(scaled + i, _mm512_mul_ps(_mm512_maskz_loadu_ps(until(parts - i), scale + i),
                                                 _mm512_loadu_ps(unit + i)));
  }

  template <int D, int R, int T>
  void strips(int64_t first, int64_t count, int64_t m, const Memory& memory, float* results) const {
    Strip<R> strip;
    VecF totals[T][kRows];
    const int64_t parts = s.parts, pad = padded, pitch = w.scales.row;
    const float* units = tokens.unit + m * pad;
    const bool in_place = plain && s.split == 1 && !more;
    for (int64_t begin = 0; begin < count; begin += R) {
      for (int r = 0; r < R; ++r) {
        const int64_t own = least(begin + r, count - 1), row = first + own;  // behind the last one: that again
        strip.row[r] = s.spread ? memory.codes + own * code_pitch() : w.data + row * w.pitch;
        strip.tail[r] = memory.tails + r * 64;
        if (left)
          _mm512_store_si512(memory.tails + r * 64,
                             _mm512_maskz_loadu_epi8(~__mmask64(0) >> (64 - left), strip.row[r] + whole * 64));
        float *scaled = memory.scaled + r * T * pad, *rest = memory.rest + r * pad;
        strip.scale[r] = scaled, strip.rest[r] = rest;
        const float* scale = plain ? at<float>(w.scales.data, row * pitch) : nullptr;
        for (int64_t i = 0; plain && i < parts; i += 16) __builtin_prefetch(scale + R * pitch + i);
        for (int t = 0; s.shared && t < T; ++t)  // lanes behind the last part
          _mm512_storeu_ps(scaled + (t + 1) * pad - 16, _mm512_setzero_ps());
        if (in_place) {
          for (int t = 0; t < T; ++t) scale_parts(scale, units + t * pad, parts, scaled + t * pad);
          continue;
        }
        const GroupParts part(memory.parts, w.groups);
        if (more) part.load(w, row);
        else part.load_scales(w, row);
        scale = part.scale;
        for (int64_t i = 0; i < parts; i += 16) {
          const __m512 own_scale = by_part(scale, i);
          for (int t = 0; t < T; ++t)
            _mm512_storeu_ps(scaled + t * pad + i, _mm512_mul_ps(own_scale, _mm512_loadu_ps(units + t * pad + i)));
          if (!more) continue;
          const __m512 from_zero = _mm512_sub_ps(by_part(part.zero, i), _mm512_set1_ps(tokens.middle));
          _mm512_storeu_ps(rest + i, _mm512_fnmadd_ps(own_scale, from_zero, by_part(part.offset, i)));
        }
      }
      // Four digits are rare, and take the loop for any number of lines.
      if (s.shared) tile<D, R, T, kShared>(strip, m, totals[0] + begin);
      else if (D < 4 && s.each == 1) tile<D, R, T, kOne>(strip, m, totals[0] + begin);
      else tile<D, R, T, kLong>(strip, m, totals[0] + begin);
    }
    for (int t = 0; t < T; ++t) {
      for (int64_t r = round_up(count, R); r < kRows; ++r) totals[t][r] = VecF{};
      store(results + t * kRows, sum_lanes<float>(totals[t]));
    }
  }
};

static bool multiply_digits(const QuantMatmulArgs& a, const Sections& s, const DigitTokens& digits) {
  if (s.floats) return DigitProduct<1, kFloats>::run(a, s, digits);
  if (s.mapped) return DigitProduct<2, kMapped>::run(a, s, digits);
  switch (s.planes) {
    case 8: return DigitProduct<8, kWhole>::run(a, s, digits);
    case 4: return DigitProduct<4, kWhole>::run(a, s, digits);
    case 2: return DigitProduct<2, kWhole>::run(a, s, digits);
    default: return DigitProduct<1, kWhole>::run(a, s, digits);
  }
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

// Activations rounded to bytes where groups are so short that several share a line. For cpu_quant_int_lanes.h each would
// be padded to a line of its own: 4096 x 4096, one token, int4 in groups of 64 0.73 ms to 0.26 to 0.36, of 32 0.96 to
// 0.27 to 0.37, of 16 2 to 0.45, int8 of 32 1.4 to 0.6; four tokens 1.0 to 0.6 of 64. Of other groups up to two, as
// their sums are joined here in two operations and no loop: two Zen 5 cores, int4 in groups of 128, 95 to 74 us for
// one, 119 to 105 for two; three and four, and bits that are spread, take up to 1.4 times as long.
bool quant_matmul_digits(const QuantMatmulArgs& a, int* digits) {
  const Sections s(a.w);
  if (!s.fits || !(s.floats ? has_bf16() : has_vnni())) return false;
  if (a.integer() && !s.shared && (a.tokens > 2 || s.split > 1 || s.spread)) return false;
  // Rounded, a token is bytes, or float8, without its scale.
  const bool bytes = a.activation_max == 127 || a.activation_max == 7;
  const bool alone = bytes || (s.floats && a.activation_max != 0);
  const Buffer<float> scale(alone ? a.tokens : 0);
  const Tokens tokens(a, 1, alone ? +scale : nullptr);
  const DigitTokens held(a, s, tokens, alone ? +scale : nullptr);
  const bool finite = multiply_digits(a, s, held);
  for (int64_t t = 0; t < a.tokens; ++t) digits[t] = finite ? held.digits[t] : 0;
  return true;
}

}  // namespace scalekern::SCALEKERN_ISA
#endif
