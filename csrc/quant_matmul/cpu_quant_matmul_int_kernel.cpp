// Products of int8 or int4 activations with a weight of integer codes: int32, exact, within a group; then float32.
//
// Codes stay unsigned. Below 8 bits, maddubs multiplies 32 of them with 32 signed bytes and adds pairs in int16, where
//   several such sums fit (kPairs codes of at most 2^bits - 1 times 127); 8-bit codes are widened to int16. Where 8 is a
//   multiple of the bits, a row is read as it is stored: plane p of a block of 32 bytes is the p-th code of each byte,
//   and the activations were laid out in that order. Other widths, and groups that cut blocks, are unpacked first, each
//   group to a multiple of a block.
// Groups of at most kLaneGroup codes keep 8 sums, which float32 holds exactly; longer ones are added up in int64. The
//   order is scale (sum code x - middle sum x), added over groups, then what zeros and offsets differ from that, times
//   the token's scale, plus bias; in a long group zeros are subtracted exactly.
#include "quant_matmul/cpu_quant_tokens.h"

namespace {

constexpr int64_t kLaneGroup = 1024;   // 255 x 127 x 1024 / 8 < 2^24, and so is zero times the sum of activations
constexpr int64_t kRunColumns = 1 << 18;  // 255 x 127 x 2^18 / 8 < 2^31
constexpr int64_t kLaneBytes = 32;

// Where codes and activations lie: groups of `blocks` blocks, each of kLaneBytes codes x planes (16 codes of 8 bits).
struct Layout {
  int planes;
  bool direct;           // rows are read as they are stored
  int64_t unit;          // columns of a block
  int64_t group_blocks;  // of a full group
  int64_t blocks;        // of a row
  int64_t pairs;         // blocks between two widenings of the int16 sums
  float middle;          // of the codes: what zeros are near to
  bool brief;            // a group's sums fit in int16: they begin with -middle times the activations'

  explicit Layout(const QuantWeight& w) {
#if defined(__AVX2__)
    planes = w.bits == 8 ? 1 : 8 % w.bits == 0 ? 8 / w.bits : 1;
    direct = 8 % w.bits == 0 && (w.groups == 1 || w.group % (w.bits == 8 ? 16 : kLaneBytes * planes) == 0);
    if (!direct) planes = 1;
#else
    planes = 1, direct = false;
#endif
    unit = w.bits == 8 ? 16 : kLaneBytes * planes;
    middle = float(1 << w.bits >> 1);
    group_blocks = pieces(least(w.group, w.columns), unit);
    const int64_t last = w.columns - (w.groups - 1) * w.group;
    blocks = (w.groups - 1) * group_blocks + pieces(last, unit);
    pairs = most(1, 32767 / (2 * 127 * ((1 << w.bits) - 1)) / planes);
#if defined(__AVX2__)
    brief = w.bits < 8 && w.groups > 1 && w.group <= kLaneGroup && group_blocks <= pairs;
#else
    brief = false;
#endif
  }
  int64_t begin(int64_t g) const { return g * group_blocks; }
  int64_t end(const QuantWeight& w, int64_t g) const { return g + 1 < w.groups ? begin(g + 1) : blocks; }
  int64_t row_bytes() const { return blocks * (unit / planes); }
};

// Tokens as whole numbers: int8, or int16 beside 8-bit codes; their scales, and their sums over groups.
template <class X>
struct Whole {
  int64_t pitch, groups;
  Buffer<X> x;
  Buffer<float> scale, sum;
  Buffer<float> middle;  // the middle code times a group's sum in each of 8 lanes; brief: its negative in 16 of int16
  Buffer<int64_t> exact_sum;

  Whole(const QuantMatmulArgs& a, const Layout& layout)
      : pitch(layout.blocks * layout.unit), groups(a.w.groups), x(a.tokens * pitch), scale(a.tokens),
        sum(a.tokens * groups + 8), middle(a.tokens * groups * 8), exact_sum(a.tokens * groups) {
    const QuantWeight& w = a.w;
    const int64_t K = w.columns;
    zero(sum + a.tokens * groups, 8);
    parallel_if(a.tokens * K >= kParallelWork, a.tokens, [&](int64_t begin, int64_t end) {
      const Buffer<float> own(K);
      const Buffer<X> plain(K);
      for (int64_t m = begin; m < end; ++m) {
        const float* token = own;
        if (a.x.dtype == QuantDtype::f32 && a.x.column == 1) token = at<float>(a.x.data, m * a.x.row);
        else load_row(a.x, m, K, own);
        scale[m] = scale_of_token(token, K, a.activation_max, a.activation_scale);
        round_to_whole(token, K, scale[m], a.activation_max, own);
        for (int64_t k = 0; k < K; ++k) plain[k] = X(int(own[k]));
        X* dst = x + m * pitch;
        __builtin_memset(dst, 0, size_t(pitch) * sizeof(X));
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t first = g * w.group, count = least(w.group, K - first);
          int64_t total = 0;
          for (int64_t k = first; k < first + count; ++k) total += plain[k];
          exact_sum[m * groups + g] = total, sum[m * groups + g] = float(total);
          X* group = dst + layout.begin(g) * layout.unit;
          place(group, plain + first, count, layout);
          float* lanes = middle + (m * groups + g) * 8;
          if (layout.brief) minus_in_pairs(group, round_up(count, layout.unit), int(layout.middle), lanes);
          else sum_in_lanes(group, round_up(count, layout.unit), layout.middle, lanes);
        }
      }
    });
  }

  // As the products of a block fall into the 8 lanes of int32, 32 bytes of activations at a time.
  static void sum_in_lanes(const X* x, int64_t count, float middle, float* lanes) {
    int32_t sums[8] = {};
    constexpr int64_t kVector = kLaneBytes / int64_t(sizeof(X)), kEach = kVector / 8;
    for (int64_t k = 0; k < count; k += kVector)
      for (int64_t i = 0; i < kVector; ++i) sums[i / kEach] += x[k + i];
    for (int i = 0; i < 8; ++i) lanes[i] = float(sums[i]) * middle;
  }

  static void minus_in_pairs(const X* x, int64_t count, int middle, void* lanes) {
    int16_t sums[16] = {};
    for (int64_t k = 0; k < count; k += kLaneBytes)
      for (int i = 0; i < 16; ++i) sums[i] = int16_t(sums[i] - middle * (x[k + 2 * i] + x[k + 2 * i + 1]));
    __builtin_memcpy(lanes, sums, sizeof sums);
  }

  static void place(X* dst, const X* src, int64_t count, const Layout& layout) {
    switch (layout.planes) {
      case 1: return void(__builtin_memcpy(dst, src, size_t(count) * sizeof(X)));
      case 2: return place<2>(dst, src, count);
      case 4: return place<4>(dst, src, count);
      case 8: return place<8>(dst, src, count);
    }
  }
  template <int P>
  static void place(X* dst, const X* src, int64_t count) {
    int64_t k = 0;
    for (; k + P * kLaneBytes <= count; k += P * kLaneBytes)
      for (int p = 0; p < P; ++p)
        for (int i = 0; i < kLaneBytes; ++i) dst[k + p * kLaneBytes + i] = src[k + i * P + p];
    for (int64_t i = k; i < count; ++i) dst[k + (i - k) % P * kLaneBytes + (i - k) / P] = src[i];
  }
};

// Rows of codes in the layout: where they are, or copied and unpacked.
class CodeRows {
 public:
  CodeRows(const QuantWeight& w, const Layout& layout, int64_t rows)
      : w_(w), layout_(layout), in_place_(layout.direct && w.row_bytes() == layout.row_bytes()),
        own_(in_place_ ? 0 : rows * layout.row_bytes()), plain_(layout.direct ? 0 : w.columns + 8) {}

  void load(int64_t first, int64_t rows) {
    first_ = first;
    for (int64_t r = 0; !in_place_ && r < rows; ++r) {
      uint8_t* dst = own_ + r * layout_.row_bytes();
      if (layout_.direct) {
        __builtin_memcpy(dst, w_.data + (first + r) * w_.pitch, size_t(w_.row_bytes()));
        __builtin_memset(dst + w_.row_bytes(), 0, size_t(layout_.row_bytes() - w_.row_bytes()));
        continue;
      }
      unpack(w_, first + r, plain_);
      __builtin_memset(dst, 0, size_t(layout_.row_bytes()));
      for (int64_t g = 0; g < w_.groups; ++g)
        __builtin_memcpy(dst + layout_.begin(g) * layout_.unit, plain_ + g * w_.group,
                         size_t(least(w_.group, w_.columns - g * w_.group)));
    }
  }
  const uint8_t* operator[](int64_t r) const {
    return in_place_ ? w_.data + (first_ + r) * w_.pitch : own_ + r * layout_.row_bytes();
  }

 private:
  const QuantWeight& w_;
  const Layout& layout_;
  bool in_place_;
  Buffer<uint8_t> own_, plain_;
  int64_t first_ = 0;
};

// A row's parts, and what they leave beside scale (sum - middle sum x): rest sum x, eight groups at a time.
struct RowParts : GroupParts {
  float* rest;

  static int64_t floats(int64_t groups) { return GroupParts::floats(groups) + round_up(groups, 8); }
  RowParts() = default;
  RowParts(const QuantWeight& w, int64_t row, float middle, float* memory)
      : GroupParts(memory, w.groups), rest(memory + GroupParts::floats(w.groups)) {
    load(w, row);
    if (!w.has_rest(middle)) return;
    ::zero(rest, round_up(w.groups, 8));
    for (int64_t g = 0; g < w.groups; ++g) rest[g] = offset[g] - scale[g] * (zero[g] - middle);
  }
};

// The parts of a product of R rows and T tokens that do not depend on how its integers are multiplied.
template <class X>
struct Problem {
  const QuantWeight& w;
  const Layout& layout;
  const Whole<X>& tokens;
};

// scale (sum - zero sum x) + offset sum x, the difference in double, which holds it.
template <class X>
static inline float grouped(const Problem<X>& p, const GroupParts& part, int64_t t, int64_t g, int64_t sum) {
  const int64_t i = t * p.w.groups + g;
  const double difference = double(sum) - double(part.zero[g]) * double(p.tokens.exact_sum[i]);
  const float value = part.scale[g] * float(difference);
  return p.w.offsets.data ? value + part.offset[g] * p.tokens.sum[i] : value;
}

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

// code times 32 activations that are read where they lie: left to itself, the compiler keeps them for the next row in the
// registers that the sums need.
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
        if (T == 1) __builtin_prefetch(row[r] + offset + next);  // four short streams: nothing that the machine foresees
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
static inline void brief_groups(const Problem<int16_t>&, const uint8_t* const*, const RowParts*, int64_t, __m256 (&)[R][T]) {}

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
        for (int64_t g = 0; g < groups; g += 8)  // `rest` is 0 past the groups, where the sums are those of the next token or 0
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
  parallel_if(a.tokens * w.rows * w.columns >= kParallelWork, pieces(w.rows, block_rows), [&](int64_t begin, int64_t end) {
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
      for (int64_t m = 0; m < a.tokens; ++m) store_results(a, m, first, count, c + m * block_rows, tokens.scale[m], bias);
    }
  });
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void quant_matmul_integer(const QuantMatmulArgs& a) {
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
