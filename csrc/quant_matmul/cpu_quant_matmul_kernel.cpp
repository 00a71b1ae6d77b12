// Products of float activations with a low-bit weight.
//
// A few tokens (kFewTokens): bound by the weight's bytes, so the weight is read once and stays in registers. Integer
//   codes where there is VNNI: cpu_quant_digits.h; tables: cpu_quant_few_tokens.h. Elsewhere, and what that leaves,
//   32-bit words of codes meet activations that were laid out for them: lane i of word vector b holds the codes of
//   columns b W J + i J + j, J = 32 / bits; a mask leaves code 2^(bits j), an exact integer, whose factor sits,
//   inverted, in the activation. And, subtraction of the middle code (it would cancel digits after the sum),
//   conversion, multiply-add: 4 operations for W weights (AVX-512, to 4 bits: shift, permutation of a table, multiply-add).
//   What zeros differ from the middle is taken from the sums of a group.
// More tokens, where there are tile registers: integer codes in cpu_quant_digit_tiles.h, as bytes; others, and what it
//   leaves, in cpu_quant_tiles.h, as bfloat16.
// More tokens elsewhere, or groups that cut vectors, or what is not finite: rows of the weight are decoded into L2 a
//   block at a time (rows x kDepth) and meet all tokens there. Lanes run along K on both sides: nothing is transposed.
// An output's additions have one order, whatever the number of threads and its place among the others.
#include "quant_matmul/cpu_quant_digit_product.h"
#include "quant_matmul/cpu_quant_digit_tiles.h"
#include "quant_matmul/cpu_quant_few_tokens.h"
#include "quant_matmul/cpu_quant_tiles.h"

namespace {

constexpr int64_t kFewTokens = 4;
// Columns and rows of a decoded block: 4 tokens of it fill half of L1, or for few tokens the block does.
constexpr int64_t kDepth = 1024, kBlockRows = 24, kFewDepth = 512, kFewRows = 12;

// --- decoded blocks ---

// c[t ldc + r] += w_r . x_t for R rows and T tokens; count is a multiple of 2 vectors.
template <int R, int T>
static __attribute__((noinline)) void dot_tile(
    const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t count, float* c, int64_t ldc) {
  constexpr int W = kLanes<float>, U = T <= 2 ? 2 : 1, kSums = (R * T + W - 1) / W * W;  // U: sums do not wait
  VecF acc[U][kSums] = {};
  for (int64_t k = 0; k < count; k += U * W)
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      VecF token[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) token[t] = load(x + t * ldx + k + u * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const VecF weight = load(w + r * ldw + k + u * W);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[u][r * T + t] += weight * token[t];
      }
    }
  float sums[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += W) {
    if (U == 2)
      for (int j = 0; j < W; ++j) acc[0][i + j] += acc[U - 1][i + j];
    store(sums + i, sum_lanes<float>(acc[0] + i));
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) c[t * ldc + r] += sums[r * T + t];
}

template <int R, int T>
static void dot_rows(
    int64_t rows, const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t count, float* c, int64_t ldc) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) dot_tile<R, T>(w + r * ldw, ldw, x, ldx, count, c + r, ldc);
  for (; r < rows; ++r) dot_tile<1, T>(w + r * ldw, ldw, x, ldx, count, c + r, ldc);
}

static void dot_block(
    int64_t rows, int64_t tokens, const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t count, float* c,
    int64_t ldc) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) dot_rows<3, 4>(rows, w, ldw, x + t * ldx, ldx, count, c + t * ldc, ldc);
  x += t * ldx, c += t * ldc;
  switch (tokens - t) {
    case 1: return dot_rows<4, 1>(rows, w, ldw, x, ldx, count, c, ldc);
    case 2: return dot_rows<4, 2>(rows, w, ldw, x, ldx, count, c, ldc);
    case 3: return dot_rows<4, 3>(rows, w, ldw, x, ldx, count, c, ldc);
  }
}

static void by_blocks(const QuantMatmulArgs& a) {
  constexpr int64_t kStep = 2 * kLanes<float>;
  const QuantWeight& w = a.w;
  const Tokens x(a, kStep);
  const bool few = a.tokens <= kFewTokens;
  const int64_t depth = least(few ? kFewDepth : kDepth, round_up(w.columns, kStep));
  const int64_t block_rows = few ? kFewRows : kBlockRows;
  const int64_t ld = depth + kStep;  // rows a power of two apart would share the sets of L1
  parallel_if(a.tokens * w.rows * w.columns >= kParallelWork, pieces(w.rows, block_rows),
              [&](int64_t begin, int64_t end) {
    const Buffer<float> block(block_rows * ld + 8), c(block_rows * a.tokens), parts(block_rows * 3 * w.groups);
    float bias[kBlockRows];
    for (int64_t first = begin * block_rows; first < least(end * block_rows, w.rows); first += block_rows) {
      const int64_t rows = least(block_rows, w.rows - first);
      const auto parts_of = [&](int64_t r) { return GroupParts(parts + r * 3 * w.groups, w.groups); };
      for (int64_t r = 0; r < rows; ++r) parts_of(r).load(w, first + r);
      zero<float>(c, block_rows * a.tokens);
      for (int64_t k = 0; k < w.columns; k += depth) {
        const int64_t count = least(depth, w.columns - k), padded = round_up(count, kStep);
        for (int64_t r = 0; r < rows; ++r) {
          decode(w, first + r, parts_of(r), k, count, block + r * ld);
          zero(block + r * ld + count, padded - count);
        }
        dot_block(rows, a.tokens, block, ld, x[0] + k, x.pitch(), padded, c, block_rows);
      }
      load_bias(a, first, rows, bias);
      for (int64_t m = 0; m < a.tokens; ++m) store_results(a, m, first, rows, c + m * block_rows, 1, bias);
    }
  });
}

// --- a few tokens ---

template <int B>
struct InWords {
  static constexpr int W = kLanes<float>, J = 32 / B;
  static constexpr int64_t kColumns = W * J, kBytes = SCALEKERN_VEC_BYTES;
  static constexpr int kMiddle = B == 1 ? 0 : 1 << (B - 1);
  // With AVX-512 a permutation of 16 floats, which looks at 4 bits of a lane and no further, is mask, subtraction and
  // conversion in one.
  static constexpr bool kTable = SCALEKERN_VEC_BYTES == 64 && B <= 4;
  struct Values {
    float of[16];
    constexpr Values() : of() {
      for (int i = 0; i < 16; ++i) of[i] = float((i & ((1 << B) - 1)) - kMiddle);
    }
  };
  static constexpr Values kValues{};

  // A lane's J columns are of one group: a vector of words is of one, or of several whole ones (shared).
  static bool fit(const QuantWeight& w) {
    return w.groups == 1 || w.group % kColumns == 0 || (w.group % J == 0 && kColumns % w.group == 0);
  }
  static bool shared(const QuantWeight& w) { return w.groups > 1 && w.group < kColumns; }

  // Each lane's scale in the b-th vector of words.
  static inline VecF scales_of(const QuantWeight& w, const float* scale, int64_t b, VecI lane_group) {
    const int64_t first = b * (kColumns / w.group);
#if defined(__AVX512F__)
    if (first + W <= w.groups) return (VecF)_mm512_permutexvar_ps((__m512i)lane_group, (__m512)load(scale + first));
#elif defined(__AVX2__)
    if (first + W <= w.groups) return (VecF)_mm256_permutevar8x32_ps((__m256)load(scale + first), (__m256i)lane_group);
#endif
    VecF v;
    for (int i = 0; i < W; ++i) v[i] = scale[least(first + lane_group[i], w.groups - 1)];
    return v;
  }

  // Tokens as their words of codes want them, [t][block][j][lane], with the sums of each group, [t][g][lane].
  struct Laid {
    int64_t pitch, groups;
    Buffer<float> x, sums;

    Laid(const QuantWeight& w, const Tokens& tokens, int64_t count)
        : pitch(round_up(w.columns, kColumns)), groups(w.groups), x(count * pitch), sums(count * w.groups * W) {
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
      const uint8_t* const* words, int64_t offset, const float* x, int64_t pitch, VecF (&acc)[R][T]) {
    Words code[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_memcpy(&code[r], words[r] + offset, sizeof(Words));
#if defined(__AVX512F__)
    if constexpr (kTable) {
      const VecF table = load(kValues.of);
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

  // sums[t][r] of R rows and T tokens.
  template <int R, int T>
  static __attribute__((noinline)) void rows(
      const QuantWeight& w, int64_t first, const Laid& laid, float* memory, float* sums, int64_t pitch) {
    const uint8_t *row[R], *tail[R];
    uint8_t tails[R][kBytes] = {};
    GroupParts part[R];
    const int64_t whole = w.row_bytes() / kBytes, left = w.row_bytes() % kBytes;
    for (int r = 0; r < R; ++r) {
      row[r] = w.data + (first + r) * w.pitch, tail[r] = tails[r];
      __builtin_memcpy(tails[r], row[r] + whole * kBytes, size_t(left));
      part[r] = GroupParts(memory + r * GroupParts::floats(w.groups), w.groups);
      part[r].load(w, first + r);
    }
    VecF total[R][T] = {};
    VecI lane_group = {};
    for (int i = 0; i < W && shared(w); ++i) lane_group[i] = int32_t(i * J / w.group);
    for (int64_t b = 0; shared(w) && b < whole + (left > 0); ++b) {
      VecF acc[R][T] = {};
      for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + R * w.pitch + b * kBytes);
      multiply<R, T>(b < whole ? row : tail, b < whole ? b * kBytes : 0, laid.x + b * kColumns, laid.pitch, acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const VecF scale = scales_of(w, part[r].scale, b, lane_group);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) total[r][t] += scale * acc[r][t];
      }
    }
    for (int64_t g = 0; !shared(w) && g < w.groups; ++g) {
      const int64_t end = g + 1 < w.groups ? (g + 1) * w.group / kColumns : whole;
      VecF acc[R][T] = {};
      int64_t b = g * w.group / kColumns;
      for (; b < end; ++b) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + R * w.pitch + b * kBytes);  // the next rows
        multiply<R, T>(row, b * kBytes, laid.x + b * kColumns, laid.pitch, acc);
      }
      if (g + 1 == w.groups && left) multiply<R, T>(tail, 0, laid.x + whole * kColumns, laid.pitch, acc);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) total[r][t] += part[r].scale[g] * acc[r][t];
    }
    if (w.has_rest(kMiddle))
      for (int64_t g = 0; g < w.groups; ++g)
        for (int r = 0; r < R; ++r) {
          const float rest = part[r].offset[g] - part[r].scale[g] * (part[r].zero[g] - kMiddle);
          for (int t = 0; t < T; ++t) total[r][t] += rest * load(laid.sums + (t * w.groups + g) * W);
        }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) sums[t * pitch + r] = sum_of<float>(total[r][t]);
  }

  template <int R, int T>
  static void run(const QuantMatmulArgs& a, const Laid& laid) {
    constexpr int64_t kRows = 16;  // of a piece of work
    const QuantWeight& w = a.w;
    parallel_if(T * w.rows * w.columns >= kParallelWork, pieces(w.rows, kRows), [&](int64_t begin, int64_t end) {
      const Buffer<float> memory(R * GroupParts::floats(w.groups));
      float bias[kRows], sums[T * kRows];
      for (int64_t first = begin * kRows; first < least(end * kRows, w.rows); first += kRows) {
        const int64_t count = least(kRows, w.rows - first);
        int64_t r = 0;
        for (; r + R <= count; r += R) rows<R, T>(w, first + r, laid, memory, sums + r, kRows);
        for (; r < count; ++r) rows<1, T>(w, first + r, laid, memory, sums + r, kRows);
        load_bias(a, first, count, bias);
        for (int t = 0; t < T; ++t) store_results(a, t, first, count, sums + t * kRows, 1, bias);
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

static bool finite(const float* x, int64_t count) {
  constexpr int W = kLanes<float>;
  VecF sum = {};
  int64_t k = 0;
  for (; k + W <= count; k += W) sum += load(x + k) * 0.0f;
  float all = sum_of<float>(sum);
  for (; k < count; ++k) all += x[k] * 0.0f;
  return all == 0;
}

template <int B>
static bool few(const QuantMatmulArgs& a, const Tokens& tokens) {
  if (!InWords<B>::fit(a.w)) return false;
  InWords<B>::run(a, tokens);
  return true;
}

static bool in_words(const QuantMatmulArgs& a, const Tokens& tokens) {
  if (a.w.table) return false;
  switch (a.w.bits) {
    case 1: return few<1>(a, tokens);
    case 2: return few<2>(a, tokens);
    case 4: return few<4>(a, tokens);
    case 8: return few<8>(a, tokens);
  }
  return false;
}

static bool in_lanes(const QuantMatmulArgs& a, const Tokens& tokens) {
#if defined(__AVX2__)
  if (a.w.table == nullptr) return InLanes<CodeLanes>::try_run(a, tokens);
  if (a.w.bits == 4 && InLanes<TableLanes>::try_run(a, tokens)) return true;
  if (a.w.mantissa) return InLanes<FloatLanes>::try_run(a, tokens);
#endif
  return false;
}

static bool in_registers(const QuantMatmulArgs& a, const Tokens& tokens) {
  for (int64_t t = 0; t < a.tokens; ++t)
    if (!finite(tokens[t], a.w.columns)) return false;  // Inf would be NaN beside a code of 0
  return in_words(a, tokens) || in_lanes(a, tokens);
}

static bool few_tokens(const QuantMatmulArgs& a) {
  if (a.tokens > kFewTokens) return false;
  const Tokens tokens(a, 1);
#if defined(__AVX512F__)
  const auto by_itself = [](const QuantMatmulArgs& own) {
    if (!in_registers(own, Tokens(own, 1))) by_blocks(own);
  };
  if (in_digits(a, tokens, by_itself)) return true;
#endif
  return in_registers(a, tokens);
}

#if defined(__AVX512F__)
// Digits take half a bfloat16 product each: one for the two of a 16-bit result, as tiles need for bfloat16 tokens; they
// win there where unpacking is what counts, and codes part with a shift.
static bool worth_digits(const QuantMatmulArgs& a) {
  if (a.w.groups > 1 && a.w.group == kTileColumns && a.tokens > 32) return false;  // half a tile of bytes
  if (8 % a.w.bits != 0) return a.x.dtype == QuantDtype::f32 && a.tokens > 32;
  return a.x.dtype != QuantDtype::bf16 || a.tokens <= DigitTiles::kMost;
}
#endif

static bool in_tiles(const QuantMatmulArgs& a) {
#if defined(__AVX512F__)
  if (a.tokens <= kFewTokens || !scalekern::has_amx()) return false;
  const auto in_floats = [](const QuantMatmulArgs& own) { TileProduct{own}.run(by_blocks); };
  if (!worth_digits(a) || !in_digit_tiles(a, by_blocks, in_floats)) in_floats(a);
  return true;
#else
  return false;
#endif
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void quant_matmul_float(const QuantMatmulArgs& a) {
  if (!few_tokens(a) && !in_tiles(a)) by_blocks(a);
}

}  // namespace scalekern::SCALEKERN_ISA
