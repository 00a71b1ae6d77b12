// Products of up to four tokens with integer codes of 1, 2, 4 or 8 bits as words of 32 bits, one a lane.
//
// Lane i of word vector b holds the codes of columns b W J + i J + j, J = 32 / bits, and activations are laid out for
//   them; a mask leaves code 2^(bits j), an exact integer, whose factor sits, inverted, in the activation. And,
//   subtraction of the middle code (it would cancel digits after the sum), conversion, multiply-add: 4 operations for W
//   weights (AVX-512, to 4 bits: shift, permutation of a table, multiply-add). What zeros differ from the middle is
//   taken from the sums of a group.
// Short rows are bound by what a row has beside its codes: parts of 16 rows are read at once and their lanes summed at
//   once. One token, 384 x 128 of 4 bits in groups of 64, fp16 scales and zeros, with the call: 7.0 us, 15.1 before
#pragma once
#include "common/tile.h"
#include "quant_matmul/cpu_quant_tokens.h"

namespace {

template <int N>
struct Size {
  static constexpr int value = N;
};

template <int B>
struct InWords {
  static constexpr int W = kLanes<float>, J = 32 / B;
  static constexpr int64_t kColumns = W * J, kBytes = SCALEKERN_VEC_BYTES;
  static constexpr int kMiddle = B == 1 ? 0 : 1 << (B - 1);
  // With AVX-512 a permutation of 16 floats, which looks at 4 bits of a lane and no further, is mask, subtraction and
  // conversion in one.
  static constexpr bool kTable = SCALEKERN_VEC_BYTES == 64 && B <= 4;

  // A lane's J columns are of one group: a vector of words is of one, or of several whole ones (shared).
  static bool fit(const QuantWeight& w) {
    if (w.table && !(kTable && w.bits == 4)) return false;
    return w.groups == 1 || w.group % kColumns == 0 || (w.group % J == 0 && kColumns % w.group == 0);
  }
  // Zeros of a table's numbers are such numbers.
  static float middle_of(const QuantWeight& w) { return w.table ? 0.0f : float(kMiddle); }
  static bool shared(const QuantWeight& w) { return w.groups > 1 && w.group < kColumns; }

  // Each lane's scale in the vector of words that begins with a row's group `first`.
  static inline VecF scales_of(const QuantWeight& w, const float* scale, int64_t first, VecI lane_group) {
    const int32_t last = int32_t(w.groups - 1 - first);  // lanes behind the row have codes of nothing
    lane_group = lane_group < last ? lane_group : last;
#if defined(__AVX512F__)
    return (VecF)_mm512_permutexvar_ps((__m512i)lane_group, (__m512)load(scale + first));
#elif defined(__AVX2__)
    return (VecF)_mm256_permutevar8x32_ps((__m256)load(scale + first), (__m256i)lane_group);
#else
    VecF v;
    for (int i = 0; i < W; ++i) v[i] = scale[first + lane_group[i]];
    return v;
#endif
  }

  // Tokens as their words of codes want them, [t][block][j][lane], with the sums of each group, [t][g][lane].
  struct Laid {
    int64_t pitch, groups;
    int64_t of_words;  // groups of a vector of words that several share, and each lane's: divisions take long
    alignas(64) int32_t lane_group[W];
    alignas(64) float values[16];  // of codes (kTable)
    Buffer<float> x, sums;

    Laid(const QuantWeight& w, const Tokens& tokens, int64_t count)
        : pitch(round_up(w.columns, kColumns)), groups(w.groups), of_words(shared(w) ? kColumns / w.group : 0),
          x(count * pitch), sums(count * w.groups * W) {
      for (int i = 0; i < W; ++i) lane_group[i] = int32_t(i * of_words / W);
      for (int i = 0; i < 16; ++i) values[i] = w.table ? w.table[i] : float((i & ((1 << B) - 1)) - kMiddle);
      const Buffer<float> padded(pitch);
      for (int64_t t = 0; t < count; ++t) {
        __builtin_memcpy(padded, tokens[t], sizeof(float) * size_t(w.columns));
        zero(padded + w.columns, pitch - w.columns);
        VecF sum = {};
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t begin = g * w.group, first = begin / kColumns * kColumns;
          const int64_t end = shared(w) ? first + kColumns : g + 1 < groups ? begin + w.group : pitch;
          if (first == begin) sum = VecF{};
          for (int64_t k = first; first == begin && k < end; k += kColumns)
            for (int j = 0; j < J; ++j) {
              float lanes[W];
              for (int i = 0; i < W; ++i) lanes[i] = padded[k + i * J + j];
              const VecF v = load(lanes);
              sum += v;
              store(x + t * pitch + k + j * W, kTable ? v : v * from_bits(uint32_t(127 - B * (j % (J / 2))) << 23));
            }
          VecF own = sum;
          for (int i = 0; shared(w) && i < W; ++i)
            if (first + i * J < begin || first + i * J >= begin + w.group) own[i] = 0;
          store(sums + (t * groups + g) * W, own);
        }
      }
    }
  };

  template <int R, int T>
  static inline void multiply(
      const uint8_t* const* words, int64_t offset, const float* x, int64_t pitch, const float* values,
      VecF (&acc)[R][T]) {
    Words code[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_memcpy(&code[r], words[r] + offset, sizeof(Words));
#if defined(__AVX512F__)
    if constexpr (kTable) {
      const VecF table = load(values);
#pragma GCC unroll 32
      for (int j = 0; j < J; ++j) {
        VecF v[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          v[r] = (VecF)_mm512_permutexvar_ps((__m512i)(code[r] >> (B * j)), (__m512)table);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const VecF token = load(x + t * pitch + j * W);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][t] += v[r] * token;
        }
      }
      return;
    }
#endif
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
      for (int j = 0; j < J / 2; ++j) {
        const uint32_t mask = ((1u << B) - 1) << (B * j);
        VecF v[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) v[r] = __builtin_convertvector((VecI)(code[r] & mask) - (kMiddle << (B * j)), VecF);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const VecF token = load(x + t * pitch + (half * J / 2 + j) * W);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][t] += v[r] * token;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) code[r] >>= 16;
    }
  }

  static constexpr int64_t kRows = 16;  // of a piece of work

  // Of up to kRows rows, [row][group]: the scales, and what is beside scale (code - middle).
  struct Parts {
    const Buffer<float> memory;
    float *scale, *rest;
    float middle;
    bool has_rest, in_one;

    explicit Parts(const QuantWeight& w)
        : memory(GroupParts::floats(kRows * w.groups)), middle(middle_of(w)), has_rest(w.has_rest(middle)),
          in_one(!w.outer.data && follow(w, w.scales) && follow(w, w.zeros) && follow(w, w.offsets)) {}

    void load(const QuantWeight& w, int64_t first, int64_t rows) {
      const int64_t count = rows * w.groups;
      const GroupParts all(memory, kRows * w.groups);
      if (in_one) {
        QuantWeight line = w.from(first, 1);
        line.groups = count;
        line.scales.column = line.zeros.column = line.offsets.column = 1;
        all.load(line, 0);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          GroupParts row;
          row.scale = all.scale + r * w.groups, row.zero = all.zero + r * w.groups;
          row.offset = all.offset + r * w.groups;
          row.load(w, first + r);
        }
      }
      scale = all.scale, rest = all.offset;
      for (int64_t i = 0; has_rest && i < count; ++i) rest[i] -= scale[i] * (all.zero[i] - middle);
    }

   private:
    // Whether rows of a part are one row of all their groups.
    static bool follow(const QuantWeight& w, const QuantPart& p) {
      return !p.data || (p.row == w.groups && (w.groups == 1 || p.column == 1));
    }
  };

  // totals[t][r], to be summed over its lanes, of R rows and T tokens; `parts` begin with the first row's.
  template <int R, int T>
  static __attribute__((noinline)) void rows(
      const QuantWeight& w, int64_t first, const Laid& laid, const float* scale, const float* rest,
      VecF (*totals)[kRows]) {
    const uint8_t *row[R], *tail[R];
    uint8_t tails[R][kBytes];
    const int64_t whole = w.row_bytes() / kBytes, left = w.row_bytes() % kBytes;
    for (int r = 0; r < R; ++r) {
      row[r] = w.data + (first + r) * w.pitch, tail[r] = row[r] + whole * kBytes;
      if (left == 0 || (first + r) * w.pitch + (whole + 1) * kBytes <= (w.rows - 1) * w.pitch + w.row_bytes()) continue;
      // The last rows: behind them may be no memory. The other rows' bytes meet zeros.
      __builtin_memset(tails[r], 0, kBytes);
      __builtin_memcpy(tails[r], tail[r], size_t(left));
      tail[r] = tails[r];
    }
    VecF total[R][T] = {};
    VecI lane_group;
    __builtin_memcpy(&lane_group, laid.lane_group, sizeof lane_group);
    for (int64_t b = 0; shared(w) && b < whole + (left > 0); ++b) {
      VecF acc[R][T] = {};
      for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + R * w.pitch + b * kBytes);
      multiply<R, T>(b < whole ? row : tail, b < whole ? b * kBytes : 0, laid.x + b * kColumns, laid.pitch, laid.values, acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const VecF own = scales_of(w, scale + r * w.groups, b * laid.of_words, lane_group);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) total[r][t] += own * acc[r][t];
      }
    }
    for (int64_t g = 0; !shared(w) && g < w.groups; ++g) {
      const int64_t end = g + 1 < w.groups ? (g + 1) * w.group / kColumns : whole;
      VecF acc[R][T] = {};
      int64_t b = g * w.group / kColumns;
      for (; b < end; ++b) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + R * w.pitch + b * kBytes);  // the next rows
        multiply<R, T>(row, b * kBytes, laid.x + b * kColumns, laid.pitch, laid.values, acc);
      }
      if (g + 1 == w.groups && left) multiply<R, T>(tail, 0, laid.x + whole * kColumns, laid.pitch, laid.values, acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) total[r][t] += scale[r * w.groups + g] * acc[r][t];
    }
    if (rest)
      for (int64_t g = 0; g < w.groups; ++g)
        for (int r = 0; r < R; ++r)
          for (int t = 0; t < T; ++t)
            total[r][t] += rest[r * w.groups + g] * load(laid.sums + (t * w.groups + g) * W);
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) totals[t][r] = total[r][t];
  }

  template <int R, int T>
  static void run(const QuantMatmulArgs& a, const Laid& laid) {
    const QuantWeight& w = a.w;
    parallel_if(T * w.rows * w.columns >= kParallelWork, pieces(w.rows, kRows), [&](int64_t begin, int64_t end) {
      Parts parts(w);
      for (int64_t first = begin * kRows; first < least(end * kRows, w.rows); first += kRows) {
        const int64_t count = least(kRows, w.rows - first);
        parts.load(w, first, count);
        VecF totals[T][kRows];
        for (int64_t r = count; r < kRows; ++r)
          for (int t = 0; t < T; ++t) totals[t][r] = VecF{};
        const auto strip = [&](auto size, int64_t r) {
          const int64_t at = r * w.groups;
          rows<size.value, T>(w, first + r, laid, parts.scale + at, parts.has_rest ? parts.rest + at : nullptr,
                              reinterpret_cast<VecF(*)[kRows]>(&totals[0][r]));
        };
        int64_t r = 0;
        for (; r + R <= count; r += R) strip(Size<R>{}, r);
        for (; r < count; ++r) strip(Size<1>{}, r);
        float bias[kRows], sums[kRows];
        load_bias(a, first, count, bias);
        for (int t = 0; t < T; ++t) {
          for (int64_t i = 0; i < kRows; i += W) store(sums + i, sum_lanes<float>(totals[t] + i));
          store_results(a, t, first, count, sums, 1, bias);
        }
      }
    });
  }

  static void run(const QuantMatmulArgs& a, const Tokens& tokens) {
    const Laid laid(a.w, tokens, a.tokens);
    switch (a.tokens) {
      case 1: return run<4, 1>(a, laid);
      case 2: return run<2, 2>(a, laid);
      case 3: return run<2, 3>(a, laid);
      case 4: return run<2, 4>(a, laid);
    }
  }
};

}  // namespace
