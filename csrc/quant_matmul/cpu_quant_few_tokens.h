// Products of up to four tokens with weights of any width, whose codes go from a row's bytes to multiply-adds in
// registers: every width that words of codes do not fit (cpu_quant_matmul_kernel.cpp), and every table.
//
// A step is 16 columns or 32, loaded into both halves of a register. Bound by operations on AVX2, cycles of a weight
// in brackets (measured: 1.8 times that, of the words of 4-bit codes too):
//   codes   each byte pair that holds a code is shuffled into its lane; a mask leaves code 2^shift, whose factor sits,
//           inverted, in the activation. Shuffle, and, subtract, convert, multiply-add: 5 for 8 weights (0.16).
//   floats  the same into 16-bit lanes, where a multiplication and a shift of the sign make them float16 of another
//           bias, converted exactly, subnormals too: 4 for 16 weights, a conversion and a multiply-add for 8 (0.18).
//   table   of 16 numbers, a byte of each in one shuffle: 4, and 8 to bring the bytes of 32 weights together (0.19).
//           Permutations of floats, two and a blend, took twice as long: one a cycle.
// Decoded into blocks of L1, as for more tokens, 4096 x 4096 took 2.6 ms (nf4) to 6.5 (fp8) on two cores of a Zen 3,
// the dense bfloat16 product 1.8; so 0.9 (nf4, 3 to 7 bits) to 1.6 (fp8, fp6), and 2.1 with nvfp4's groups of 16.
#pragma once
#include "quant_matmul/cpu_quant_tokens.h"

#if defined(__AVX2__)
namespace {

// 16 bytes in both halves of a register.
static inline __m256i load_twice(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

struct CodeLanes {
  static constexpr int kVectors = 2;  // of a step
  __m256i order[2], mask, middle;
  float factors[8 * kVectors];  // what an activation is multiplied by

  explicit CodeLanes(const QuantWeight& w) {
    alignas(32) uint8_t from[2][32];
    alignas(32) int32_t masks[8], middles[8];
    for (int i = 0; i < 8; ++i) {
      const int bit = i * w.bits, shift = bit % 8;
      for (int half = 0; half < 2; ++half)
        for (int j = 0; j < 4; ++j) from[half][4 * i + j] = j < 2 ? uint8_t(half * w.bits + bit / 8 + j) : 128;
      masks[i] = ((1 << w.bits) - 1) << shift, middles[i] = (1 << w.bits >> 1) << shift;
      factors[i] = factors[i + 8] = from_bits(uint32_t(127 - shift) << 23);
    }
    for (int half = 0; half < 2; ++half) order[half] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from[half]));
    mask = _mm256_load_si256(reinterpret_cast<const __m256i*>(masks));
    middle = _mm256_load_si256(reinterpret_cast<const __m256i*>(middles));
  }
  static float zero_of(const QuantWeight& w) { return float(1 << w.bits >> 1); }
  void operator()(const uint8_t* p, __m256 (&v)[kVectors]) const {
    const __m256i bytes = load_twice(p);
    v[0] = number(_mm256_shuffle_epi8(bytes, order[0])), v[1] = number(_mm256_shuffle_epi8(bytes, order[1]));
  }
  __m256 number(__m256i lanes) const {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(lanes, mask), middle));
  }
};

struct FloatLanes {
  static constexpr int kVectors = 2;
  __m256i order, up, mask, infinity, nan;
  __m128i down;
  float factors[8 * kVectors];

  explicit FloatLanes(const QuantWeight& w) {
    const int exponent = w.bits - 1 - w.mantissa, bias = (1 << (exponent - 1)) - 1;
    alignas(32) uint8_t from[32];
    alignas(32) int16_t multiples[16];
    for (int i = 0; i < 16; ++i) {
      const int bit = i * w.bits, shift = bit % 8, end = shift + w.bits;  // in a byte, or on into the next
      from[2 * i] = end > 8 ? uint8_t(bit / 8) : 128, from[2 * i + 1] = uint8_t(bit / 8 + (end > 8));
      multiples[i] = int16_t(1 << (end > 8 ? 16 - end : 8 - end));
      factors[i] = from_bits(uint32_t(127 + 15 - bias) << 23);
    }
    order = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    up = _mm256_load_si256(reinterpret_cast<const __m256i*>(multiples));
    down = _mm_cvtsi32_si128(5 - exponent);
    const int magnitude = ((1 << (w.bits - 1)) - 1) << (10 - w.mantissa);
    mask = _mm256_set1_epi16(int16_t(0x8000 | magnitude));
    // float8_e4m3 has no infinity; its largest magnitude is a NaN.
    nan = _mm256_set1_epi16(w.bits == 8 && w.mantissa == 3 ? int16_t(magnitude) : int16_t(-1));
    infinity = _mm256_set1_epi16(0x7fff);
  }
  static float zero_of(const QuantWeight&) { return 0; }
  void operator()(const uint8_t* p, __m256 (&v)[kVectors]) const {
    const __m256i top = _mm256_mullo_epi16(_mm256_shuffle_epi8(load_twice(p), order), up);
    __m256i half = _mm256_and_si256(_mm256_sra_epi16(top, down), mask);
    half = _mm256_or_si256(half, _mm256_cmpeq_epi16(_mm256_and_si256(half, infinity), nan));
    v[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half)), v[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  }
};

// Lanes 0 .. 3 of a vector are the even columns of eight, 4 .. 7 the odd ones: the low halves of bytes and the high.
struct TableLanes {
  static constexpr int kVectors = 4;
  __m256i bytes[4];  // byte b of the 16 numbers

  explicit TableLanes(const QuantWeight& w) {
    for (int b = 0; b < 4; ++b) {
      alignas(16) uint8_t all[16];
      for (int i = 0; i < 16; ++i) all[i] = reinterpret_cast<const uint8_t*>(w.table + i)[b];
      bytes[b] = load_twice(all);
    }
  }
  static float zero_of(const QuantWeight&) { return 0; }
  void operator()(const uint8_t* p, __m256 (&v)[kVectors]) const {
    const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(load_twice(p), shifts), _mm256_set1_epi8(15));
    __m256i part[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) part[b] = _mm256_shuffle_epi8(bytes[b], code);
    const __m256i low[2] = {_mm256_unpacklo_epi8(part[0], part[1]), _mm256_unpackhi_epi8(part[0], part[1])};
    const __m256i high[2] = {_mm256_unpacklo_epi8(part[2], part[3]), _mm256_unpackhi_epi8(part[2], part[3])};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      v[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
      v[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
    }
  }
};

template <class Lanes>
struct InLanes {
  static constexpr int V = Lanes::kVectors;
  static constexpr int64_t kStepColumns = 8 * V;
  static constexpr int S = 2;  // sums of a row: each waits 4 cycles for its last
  const QuantWeight& w;
  const Lanes lanes;
  const int64_t step_bytes, steps, whole;  // of a row: all steps, and those whose 16 bytes are the row's
  const int64_t pitch;
  Buffer<float> x, sums;  // [t][column], by its factor; of each group, [t][g][lane]

  static bool fit(const QuantWeight& w) { return w.groups == 1 || w.group % kStepColumns == 0; }

  InLanes(const QuantWeight& w, const Tokens& tokens, int64_t count)
      : w(w), lanes(w), step_bytes(V * w.bits), steps(pieces(w.columns, kStepColumns)),
        whole(w.row_bytes() < 16 ? 0 : (w.row_bytes() - 16) / step_bytes + 1), pitch(steps * kStepColumns),
        x(count * pitch), sums(count * w.groups * 8) {
    for (int64_t t = 0; t < count; ++t) {
      float* to = x + t * pitch;
      __builtin_memcpy(to, tokens[t], sizeof(float) * size_t(w.columns));
      zero(to + w.columns, pitch - w.columns);
      for (int64_t g = 0; g < w.groups; ++g) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t k = begin(g) * kStepColumns; k < end(g) * kStepColumns; k += 8) {
          const __m256 v = _mm256_loadu_ps(to + k);
          sum = _mm256_add_ps(sum, v);
          _mm256_storeu_ps(to + k, placed(v, k % kStepColumns));
        }
        _mm256_storeu_ps(sums + (t * w.groups + g) * 8, sum);
      }
    }
  }
  // Eight activations as the vectors of a step want them.
  __m256 placed(__m256 v, int64_t first) const {
    if constexpr (V == 4) return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    else return _mm256_mul_ps(v, _mm256_loadu_ps(lanes.factors + first));
  }
  int64_t begin(int64_t g) const { return g * w.group / kStepColumns; }
  int64_t end(int64_t g) const { return g + 1 < w.groups ? begin(g + 1) : steps; }

  template <int R, int T>
  inline __attribute__((always_inline)) void multiply(
      const uint8_t* const* row, int64_t offset, const float* token, __m256 (&acc)[R][S * T]) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m256 v[V];
      lanes(row[r] + offset, v);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          __m256& sum = acc[r][S * t + i % S];
          sum = _mm256_fmadd_ps(v[i], _mm256_loadu_ps(token + t * pitch + 8 * i), sum);
        }
    }
  }

  // results[t][r] of R rows and T tokens.
  template <int R, int T>
  __attribute__((noinline)) void rows(int64_t first, float* memory, float* results, int64_t ldr) const {
    constexpr int64_t kTail = 48;  // the last step may begin in the row's last 16 bytes and read 16
    uint8_t tails[R][kTail] = {};
    const uint8_t *row[R], *tail[R];
    GroupParts part[R];
    const int64_t left = w.row_bytes() - whole * step_bytes;
    for (int r = 0; r < R; ++r) {
      row[r] = w.data + (first + r) * w.pitch, tail[r] = tails[r];
      __builtin_memcpy(tails[r], row[r] + whole * step_bytes, size_t(left));
      if (const int used = int(w.columns * w.bits % 8)) tails[r][left - 1] &= uint8_t((1 << used) - 1);  // no NaN there
      part[r] = GroupParts(memory + r * GroupParts::floats(w.groups), w.groups);
      part[r].load(w, first + r);
    }
    __m256 total[R][T] = {};
    for (int64_t g = 0; g < w.groups; ++g) {
      __m256 acc[R][S * T] = {};
      int64_t s = begin(g);
      for (const int64_t stop = least(end(g), whole); s < stop; ++s) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + R * w.pitch + s * step_bytes);  // the next rows
        multiply<R, T>(row, s * step_bytes, x + s * kStepColumns, acc);
      }
      for (; s < end(g); ++s) multiply<R, T>(tail, (s - whole) * step_bytes, x + s * kStepColumns, acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          total[r][t] = _mm256_fmadd_ps(
              _mm256_broadcast_ss(part[r].scale + g), _mm256_add_ps(acc[r][S * t], acc[r][S * t + 1]), total[r][t]);
    }
    const float middle = Lanes::zero_of(w);
    if (w.has_rest(middle))
      for (int64_t g = 0; g < w.groups; ++g)
        for (int r = 0; r < R; ++r) {
          const __m256 rest = _mm256_set1_ps(part[r].offset[g] - part[r].scale[g] * (part[r].zero[g] - middle));
          for (int t = 0; t < T; ++t)
            total[r][t] = _mm256_fmadd_ps(rest, _mm256_loadu_ps(sums + (t * w.groups + g) * 8), total[r][t]);
        }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        float each[8], sum = 0;
        _mm256_storeu_ps(each, total[r][t]);
        for (float v : each) sum += v;
        results[t * ldr + r] = sum;
      }
  }

  template <int R, int T>
  void run(const QuantMatmulArgs& a) const {
    constexpr int64_t kRows = 16;  // of a piece of work
    parallel_stretches(T * w.rows * w.columns >= kParallelWork, pieces(w.rows, kRows), 4, [&](const auto& take) {
      const Buffer<float> memory(R * GroupParts::floats(w.groups));
      float bias[kRows], results[T * kRows];
      take([&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kRows; first < least(end * kRows, w.rows); first += kRows) {
          const int64_t count = least(kRows, w.rows - first);
          int64_t r = 0;
          for (; r + R <= count; r += R) rows<R, T>(first + r, memory, results + r, kRows);
          for (; r < count; ++r) rows<1, T>(first + r, memory, results + r, kRows);
          load_bias(a, first, count, bias);
          for (int t = 0; t < T; ++t) store_results(a, t, first, count, results + t * kRows, 1, bias);
        }
      });
    });
  }

  static bool try_run(const QuantMatmulArgs& a, const Tokens& tokens) {
    if (!fit(a.w)) return false;
    const InLanes self(a.w, tokens, a.tokens);
    switch (a.tokens) {
      case 1: self.template run<4, 1>(a); break;
      case 2: self.template run<2, 2>(a); break;
      case 3: self.template run<2, 3>(a); break;
      case 4: self.template run<2, 4>(a); break;
    }
    return true;
  }
};

}  // namespace
#endif
