// Products of float activations with a low-bit weight.
//
// A few tokens (kFewTokens): bound by the weight's bytes, so the weight is read once and stays in registers. Integer
//   codes, fp4 and small floats where there are instructions for them: cpu_quant_matmul_digits_kernel.cpp, but rows of
//   up to kShort columns; elsewhere cpu_quant_words.h, nf4 with AVX-512 too; what is left: cpu_quant_few_tokens.h.
// More tokens: where there is VNNI, integer codes in cpu_quant_digit_tiles.h, as bytes; others, and what it leaves, in
//   cpu_quant_tiles.h, as bfloat16, where that is faster than floats.
// More tokens elsewhere, or groups that cut vectors, or what is not finite: rows of the weight are decoded into L2 a
//   block at a time (rows x kDepth) and meet all tokens there. Lanes run along K on both sides: nothing is transposed.
//   With AVX-512 a token is a lane (cpu_quant_token_lanes.h).
// An output's additions have one order, whatever the number of threads and its place among the others.
#include "quant_matmul/cpu_quant_digit_tiles.h"
#include "quant_matmul/cpu_quant_few_tokens.h"
#include "quant_matmul/cpu_quant_tiles.h"
#include "quant_matmul/cpu_quant_token_lanes.h"
#include "quant_matmul/cpu_quant_words.h"

namespace {

constexpr int64_t kFewTokens = 4;
constexpr int64_t kHalfLanes = 8;  // up to here lanes of tokens would be empty, and those along K are faster
// Columns up to which words beat digits, which read each row's parts by themselves: one token, 16-bit scales and zeros,
// 4 bits 1.9 times as fast at 128 and 1.5 at 512, 8 bits 1.4 and 1.0; with float32 scales alone 0.95 at 512.
constexpr int64_t kShort = 512;
// Columns and rows of a decoded block: 4 tokens of it fill half of L1, or for few tokens the block does.
constexpr int64_t kDepth = 1024, kBlockRows = 24, kFewDepth = 512, kFewRows = 12;

// --- decoded blocks ---

// c[t ldc + r] += w_r . x_t for R rows and T tokens; count is a multiple of 2 vectors. U: of one or two tokens sums
// would wait for each other; their additions have another order then than among many.
template <int R, int T, int U>
static __attribute__((noinline)) void dot_tile(
    const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t count, float* c, int64_t ldc) {
  constexpr int W = kLanes<float>, kSums = (R * T + W - 1) / W * W;
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

template <int R, int T, int U = 1>
static void dot_rows(
    int64_t rows, const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t count, float* c, int64_t ldc) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) dot_tile<R, T, U>(w + r * ldw, ldw, x, ldx, count, c + r, ldc);
  for (; r < rows; ++r) dot_tile<1, T, U>(w + r * ldw, ldw, x, ldx, count, c + r, ldc);
}

template <int U>
static void dot_block(
    int64_t rows, int64_t tokens, const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t count, float* c,
    int64_t ldc) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) dot_rows<3, 4>(rows, w, ldw, x + t * ldx, ldx, count, c + t * ldc, ldc);
  x += t * ldx, c += t * ldc;
  switch (tokens - t) {
    case 1: return dot_rows<4, 1, U>(rows, w, ldw, x, ldx, count, c, ldc);
    case 2: return dot_rows<4, 2, U>(rows, w, ldw, x, ldx, count, c, ldc);
    case 3: return dot_rows<4, 3>(rows, w, ldw, x, ldx, count, c, ldc);
  }
}

static void by_blocks(const QuantMatmulArgs& a, bool few) {
  constexpr int64_t kStep = 2 * kLanes<float>;
  const QuantWeight& w = a.w;
  const Tokens x(a, kStep);
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
        if (few) dot_block<2>(rows, a.tokens, block, ld, x[0] + k, x.pitch(), padded, c, block_rows);
        else dot_block<1>(rows, a.tokens, block, ld, x[0] + k, x.pitch(), padded, c, block_rows);
      }
      load_bias(a, first, rows, bias);
      for (int64_t m = 0; m < a.tokens; ++m) store_results(a, m, first, rows, c + m * block_rows, 1, bias);
    }
  });
}

static void by_blocks(const QuantMatmulArgs& a) {
#if defined(__AVX512F__)
  if (a.tokens > kHalfLanes) return TokenLanes::product(a);
#endif
  by_blocks(a, a.tokens <= kFewTokens);
}

// --- a few tokens ---

// Registers sum codes before scales: larger numbers could leave float32's range on the way, and Inf would be NaN beside
// a code of 0.
static bool in_range(const float* x, int64_t count) {
  constexpr int W = kLanes<float>;
  constexpr float kMost = 0x1p100f;
  VecI strange = {};
  int64_t k = 0;
  for (; k + W <= count; k += W) {
    const VecF v = load(x + k);
    strange |= ~((v < kMost) & (v > -kMost));
  }
  bool all = true;
  for (int i = 0; i < W; ++i) all = all && strange[i] == 0;
  for (; k < count; ++k) all = all && x[k] < kMost && x[k] > -kMost;
  return all;
}

template <int B>
static bool few(const QuantMatmulArgs& a, const Tokens& tokens) {
  if (!InWords<B>::fit(a.w)) return false;
  InWords<B>::run(a, tokens);
  return true;
}

static bool in_words(const QuantMatmulArgs& a, const Tokens& tokens) {
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

static bool all_in_range(const QuantMatmulArgs& a, const Tokens& tokens) {
  for (int64_t t = 0; t < a.tokens; ++t)
    if (!in_range(tokens[t], a.w.columns)) return false;
  return true;
}

static bool in_registers(const QuantMatmulArgs& a, const Tokens& tokens) {
  if (!all_in_range(a, tokens)) return false;
  return in_words(a, tokens) || in_lanes(a, tokens);
}

#if defined(__AVX512F__)
static bool few_tokens(const QuantMatmulArgs& a);

static QuantMatmulArgs token_of(const QuantMatmulArgs& a, int64_t t) {
  QuantMatmulArgs own = a;
  own.tokens = 1, own.x = a.x.from(t), own.out = a.out.from(t);
  return own;
}

// Each of several tokens by itself: it is the same in any company.
static bool one_by_one(const QuantMatmulArgs& a) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    const QuantMatmulArgs own = token_of(a, t);
    if (!few_tokens(own)) by_blocks(own);
  }
  return true;
}
#endif

static bool few_tokens(const QuantMatmulArgs& a) {
  if (a.tokens > kFewTokens) return false;
#if defined(__AVX512F__)
  if (a.w.columns <= kShort) {
    const Tokens tokens(a, 1);
    if (all_in_range(a, tokens)) {
      if (in_words(a, tokens)) return true;
    } else if (a.tokens > 1) {
      return one_by_one(a);
    }
  }
  int digits[kFewTokens];
  if (scalekern::SCALEKERN_ISA::quant_matmul_digits(a, digits)) {
    for (int64_t t = 0; t < a.tokens; ++t) {
      if (digits[t]) continue;
      const QuantMatmulArgs own = token_of(a, t);
      if (!in_registers(own, Tokens(own, 1))) by_blocks(own);
    }
    return true;
  }
#endif
  return in_registers(a, Tokens(a, 1));
}

#if defined(__AVX512F__)
// Of some of many tokens: each is the same in any company.
static void by_blocks_of_many(const QuantMatmulArgs& a) { TokenLanes::product(a); }

// Digits take half a bfloat16 product each: one for the two of a 16-bit result, as tiles need for bfloat16 tokens; they
// win there where unpacking is what counts, and codes part with a shift.
static bool worth_digits(const QuantMatmulArgs& a) {
  if (!TileProduct{a}.is_faster_than_floats()) return true;
  // Shorter groups leave most of a tile empty: 4 bits in groups of 16, 16 and 64 bfloat16 tokens, 2.8 and 10 ms for 2.2
  // and 3.6 in pairs; groups of 8 7 and 21 for 14 and 15, of which decoding is 13.
  if (a.w.groups > 1 && a.w.group < kTileColumns)
    return a.tokens <= (!in_pairs(a.w) ? 64 : a.x.dtype == QuantDtype::bf16 ? 0 : 32);
  const bool half_tiles = a.w.groups > 1 && a.w.group == kTileColumns;  // of bytes
  if (half_tiles && (a.tokens > 32 || a.x.dtype == QuantDtype::bf16)) return false;
  if (8 % a.w.bits != 0) return a.x.dtype == QuantDtype::f32 && a.tokens > 32;
  return a.x.dtype != QuantDtype::bf16 || a.tokens <= (scalekern::has_amx() ? DigitTiles::kMost : 16);
}
#endif

static bool in_tiles(const QuantMatmulArgs& a) {
#if defined(__AVX512F__)
  if (a.tokens <= kFewTokens || !scalekern::has_vnni()) return false;
  const auto in_floats = [](const QuantMatmulArgs& own) {
    const TileProduct product{own};
    if (product.is_faster_than_floats()) product.run(by_blocks_of_many);
    else by_blocks_of_many(own);
  };
  if (worth_digits(a) && in_digit_tiles(a, by_blocks_of_many, in_floats)) return true;
  if (a.tokens <= kHalfLanes && !TileProduct{a}.is_faster_than_floats()) by_blocks(a);
  else in_floats(a);
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
