// Products of int8 or int4 activations with a weight of integer codes: int32, exact, within a group; then float32.
//
// Codes stay unsigned. Below 8 bits, maddubs multiplies 32 of them with 32 signed bytes and adds pairs in int16, where
//   several such sums fit (kPairs codes of at most 2^bits - 1 times 127); 8-bit codes are widened to int16. Where 8 is
//   a multiple of the bits, a row is read as it is stored: plane p of a block of 32 bytes is the p-th code of each
//   byte, and the activations were laid out in that order. Other widths, and groups that cut blocks, are unpacked
//   first, each group to a multiple of a block.
// Groups of at most kLaneGroup codes keep 8 sums, which float32 holds exactly; longer ones are added up in int64. The
//   order is scale (sum code x - middle sum x), added over groups, then what zeros and offsets differ from that, times
//   the token's scale, plus bias; in a long group zeros are subtracted exactly.
// All of that is for AVX2; VNNI and AMX have their own (cpu_quant_int_lanes.h, or for short groups the digits of
//   cpu_quant_matmul_digits_kernel.cpp, one here; cpu_quant_int_tiles.h), whose sums of a group are the same integers.
#include "quant_matmul/cpu_quant_int_lanes.h"
#include "quant_matmul/cpu_quant_int_tiles.h"

namespace {

#if defined(__AVX2__)
static inline int64_t sum_of_lanes(__m256i v) {
  int32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), v);
  int64_t total = 0;
  for (int i = 0; i < 8; ++i) total += lanes[i];
  return total;
}
static inline float sum_of_lanes(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
template <class T>
static inline __m256i load_256(const T* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// acc[r][t] += codes of row r times token t, one block of P planes, pairs added up in int16.
template <int P, int R, int T>
static inline __attribute__((always_inline)) void add_block(
    const uint8_t* const* rows, const int8_t* x, int64_t pitch, int64_t b, __m256i (&acc)[R][T]) {
  constexpr int B = 8 / P;
  const __m256i mask = _mm256_set1_epi8(char((1 << B) - 1));
  const int8_t* token = x + b * P * kLaneBytes;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m256i bytes = load_256(rows[r] + b * kLaneBytes);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m256i code = P == 1 ? bytes : _mm256_and_si256(p ? _mm256_srli_epi16(bytes, p * B) : bytes, mask);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        acc[r][t] =
            _mm256_add_epi16(acc[r][t], _mm256_maddubs_epi16(code, load_256(token + t * pitch + p * kLaneBytes)));
    }
  }
}
template <int P, int R, int T>
static inline void add_block(const uint8_t* const*, const int16_t*, int64_t, int64_t, __m256i (&)[R][T]) {}

// sums[r][t] += codes of row r times token t, blocks begin .. end.
template <int P, int R, int T>
static inline void multiply(
    const uint8_t* const* rows, const int8_t* x, int64_t pitch, int64_t begin, int64_t end, int64_t pairs,
    __m256i (&sums)[R][T]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t b = begin; b < end;) {
    const int64_t stop = least(end, b + pairs);
    __m256i acc[R][T] = {};
    for (; b < stop; ++b) add_block<P, R, T>(rows, x, pitch, b, acc);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[r][t] = _mm256_add_epi32(sums[r][t], _mm256_madd_epi16(acc[r][t], ones));
  }
}
template <int P, int R, int T>
static inline void multiply(
    const uint8_t* const* rows, const int16_t* x, int64_t pitch, int64_t begin, int64_t end, int64_t,
    __m256i (&sums)[R][T]) {
  for (int64_t b = begin; b < end; ++b)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + b * 16)));
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        sums[r][t] = _mm256_add_epi32(sums[r][t], _mm256_madd_epi16(code, load_256(x + t * pitch + b * 16)));
    }
}

// code times 32 activations that are read where they lie: left to itself, the compiler keeps them for the next row in
// the registers that the sums need.
static inline __m256i multiply_pairs(__m256i code, const int8_t* x) {
  __m256i product;
  asm("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(code), "m"(*reinterpret_cast<const __m256i_u*>(x)));
  return product;
}

// total[r][t] += scale_r (code - middle) . x_t over all groups. A group's sums are in registers, the totals in L1.
template <int P, int R, int T>
static __attribute__((noinline)) void brief_groups(
    const Problem<int8_t>& p, const uint8_t* const* rows, const RowParts* parts, int64_t m, __m256 (&total)[R][T]) {
  const int64_t pitch = p.tokens.pitch, groups = p.w.groups, each = p.layout.group_blocks;
  const int64_t last = p.layout.blocks - (groups - 1) * each, next = R * p.w.pitch;
  const __m256i mask = _mm256_set1_epi8(char((1 << 8 / P) - 1)), ones = _mm256_set1_epi16(1);
  const float* start = p.tokens.middle + m * groups * 8;
  const int8_t* x = p.tokens.x + m * pitch;
  const uint8_t* row[R];
  const float* scales[R];
  for (int r = 0; r < R; ++r) row[r] = rows[r], scales[r] = parts[r].scale;
  int64_t offset = 0;
  for (int64_t g = 0; g < groups; ++g, start += 8) {
    __m256i acc[R][T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][t] = load_256(start + t * groups * 8);
    for (int64_t b = g + 1 < groups ? each : last; b > 0; --b, x += P * kLaneBytes, offset += kLaneBytes) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (T == 1) __builtin_prefetch(row[r] + offset + next);  // four short streams: the machine foresees none
        const __m256i bytes = load_256(row[r] + offset);
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) {
          const __m256i code = P == 1 ? bytes : _mm256_and_si256(i ? _mm256_srli_epi16(bytes, i * 8 / P) : bytes, mask);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            __m256i sum = _mm256_add_epi16(acc[r][t], multiply_pairs(code, x + t * pitch + i * kLaneBytes));
            asm("" : "+x"(sum));  // one after the other: sums of products are not added up first
            acc[r][t] = sum;
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256 scale = _mm256_broadcast_ss(scales[r] + g);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        total[r][t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(_mm256_madd_epi16(acc[r][t], ones)), total[r][t]);
    }
    if (R * T > 4) asm volatile("" ::: "memory");
  }
}
template <int P, int R, int T>
static inline void brief_groups(
    const Problem<int16_t>&, const uint8_t* const*, const RowParts*, int64_t, __m256 (&)[R][T]) {}

template <int P, int R, int T, class X>
static __attribute__((noinline)) void tile(
    const Problem<X>& p, const uint8_t* const* rows, const RowParts* parts, int64_t m, float* c, int64_t ldc) {
  const X* x = p.tokens.x + m * p.tokens.pitch;
  const int64_t pitch = p.tokens.pitch, groups = p.w.groups;
  if (p.w.group > kLaneGroup || groups == 1) {
    float total[R][T] = {};
    for (int64_t g = 0; g < groups; ++g) {
      int64_t exact[R][T] = {};
      for (int64_t b = p.layout.begin(g), end = p.layout.end(p.w, g); b < end; b += kRunColumns / p.layout.unit) {
        __m256i sums[R][T] = {};
        multiply<P, R, T>(rows, x, pitch, b, least(end, b + kRunColumns / p.layout.unit), p.layout.pairs, sums);
        for (int r = 0; r < R; ++r)
          for (int t = 0; t < T; ++t) exact[r][t] += sum_of_lanes(sums[r][t]);
      }
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) total[r][t] += grouped(p, parts[r], m + t, g, exact[r][t]);
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) c[t * ldc + r] = total[r][t];
    return;
  }
  __m256 total[R][T] = {};
  const auto add_group = [&](int64_t g, const __m256i (&sums)[R][T]) {
    __m256 scale[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) scale[r] = _mm256_broadcast_ss(parts[r].scale + g);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256 middle = _mm256_loadu_ps(p.tokens.middle + ((m + t) * groups + g) * 8);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        total[r][t] = _mm256_fmadd_ps(scale[r], _mm256_sub_ps(_mm256_cvtepi32_ps(sums[r][t]), middle), total[r][t]);
    }
  };
  if (p.layout.brief) {
    brief_groups<P, R, T>(p, rows, parts, m, total);
  } else {
    for (int64_t g = 0; g < groups; ++g) {
      __m256i sums[R][T] = {};
      multiply<P, R, T>(rows, x, pitch, p.layout.begin(g), p.layout.end(p.w, g), p.layout.pairs, sums);
      add_group(g, sums);
    }
  }
  if (p.w.has_rest(p.layout.middle))
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        for (int64_t g = 0; g < groups; g += 8)  // `rest` is 0 past the groups, the sums the next token's or 0
          total[r][t] = _mm256_fmadd_ps(_mm256_loadu_ps(parts[r].rest + g),
                                        _mm256_loadu_ps(p.tokens.sum + (m + t) * groups + g), total[r][t]);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) c[t * ldc + r] = sum_of_lanes(total[r][t]);
}
#else
template <int P, int R, int T, class X>
static void tile(
    const Problem<X>& p, const uint8_t* const* rows, const RowParts* parts, int64_t m, float* c, int64_t ldc) {
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      const X* x = p.tokens.x + (m + t) * p.tokens.pitch;
      float total = 0;
      for (int64_t g = 0; g < p.w.groups; ++g) {
        const int64_t begin = p.layout.begin(g) * p.layout.unit, end = p.layout.end(p.w, g) * p.layout.unit;
        int64_t exact = 0;
        for (int64_t k = begin; k < end; k += kRunColumns / 8) {
          int32_t sum = 0;
          for (int64_t i = k; i < least(end, k + kRunColumns / 8); ++i) sum += int(rows[r][i]) * int(x[i]);
          exact += sum;
        }
        total += grouped(p, parts[r], m + t, g, exact);
      }
      c[t * ldc + r] = total;
    }
}
#endif

template <int P, int R, int T, class X>
static void strip(
    const Problem<X>& p, int64_t rows, const uint8_t* const* codes, const RowParts* parts, int64_t m, float* c,
    int64_t ldc) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<P, R, T>(p, codes + r, parts + r, m, c + r, ldc);
  for (; r < rows; ++r) tile<P, 1, T>(p, codes + r, parts + r, m, c + r, ldc);
}

template <int P, class X>
static void block(
    const Problem<X>& p, int64_t rows, int64_t tokens, const uint8_t* const* codes, const RowParts* parts, float* c,
    int64_t ldc) {
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4) strip<P, 2, 4>(p, rows, codes, parts, m, c + m * ldc, ldc);
  switch (tokens - m) {
    case 1: return strip<P, 4, 1>(p, rows, codes, parts, m, c + m * ldc, ldc);
    case 2: return strip<P, 4, 2>(p, rows, codes, parts, m, c + m * ldc, ldc);
    case 3: return strip<P, 2, 3>(p, rows, codes, parts, m, c + m * ldc, ldc);
  }
}

template <int P, class X>
static void product(const QuantMatmulArgs& a, const Layout& layout) {
  constexpr int64_t kMostRows = 32, kBytes = 65536;  // of a block: it stays in L2 while the tokens pass by
  const QuantWeight& w = a.w;
  const Whole<X> tokens(a, layout);
  const int64_t block_rows = most(4, least(kMostRows, kBytes / layout.row_bytes() / 4 * 4));
  const Problem<X> problem{w, layout, tokens};
  parallel_if(a.tokens * w.rows * w.columns >= kParallelWork, pieces(w.rows, block_rows),
              [&](int64_t begin, int64_t end) {
    CodeRows rows(w, layout, block_rows);
    const Buffer<float> c(block_rows * a.tokens), memory(block_rows * RowParts::floats(w.groups));
    float bias[kMostRows];
    const uint8_t* codes[kMostRows];
    for (int64_t first = begin * block_rows; first < least(end * block_rows, w.rows); first += block_rows) {
      const int64_t count = least(block_rows, w.rows - first);
      rows.load(first, count);
      RowParts parts[kMostRows];
      for (int64_t r = 0; r < count; ++r) {
        parts[r] = RowParts(w, first + r, layout.middle, memory + r * RowParts::floats(w.groups));
        codes[r] = rows[r];
      }
      block<P>(problem, count, a.tokens, codes, parts, c, block_rows);
      load_bias(a, first, count, bias);
      for (int64_t m = 0; m < a.tokens; ++m)
        store_results(a, m, first, count, c + m * block_rows, tokens.scale[m], bias);
    }
  });
}

#if defined(__AVX512F__)
constexpr int64_t kFewLaneTokens = 4;  // up to here registers read the weight once, and AMX would multiply by zeros
constexpr int64_t kMostGroup = 1 << 17;  // 128 x 127 x 2^17 < 2^31
static bool sums_fit(const QuantWeight& w) {
  return w.rows > 0 && w.columns > 0 && least(w.group, w.columns) <= kMostGroup;
}
#endif

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void quant_matmul_integer(const QuantMatmulArgs& a) {
#if defined(__AVX512F__)
  if (sums_fit(a.w) && scalekern::has_vnni() && a.tokens > kFewLaneTokens) return tile_product(a);
  int digits[kFewLaneTokens];
  if (a.tokens <= kFewLaneTokens && quant_matmul_digits(a, digits)) return;
  if (sums_fit(a.w) && scalekern::has_vnni()) return lane_product(a);
#endif
  const Layout layout(a.w);
  if (a.w.bits == 8) return product<1, int16_t>(a, layout);
  switch (layout.planes) {
    case 8: return product<8, int8_t>(a, layout);
    case 4: return product<4, int8_t>(a, layout);
    case 2: return product<2, int8_t>(a, layout);
    default: return product<1, int8_t>(a, layout);
  }
}

}  // namespace scalekern::SCALEKERN_ISA
