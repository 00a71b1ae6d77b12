// What decoding does with a tile of keys: their rows in the caches, codes to numbers, products with queries and sums of
// values. Included by cpu_decode_kernel.cpp only; static like vec.h.
#pragma once
#include "selective_scan/cpu_tile.h"
#include "sparse_attention/decode.h"

namespace {

using scalekern::DecodeArgs;
using scalekern::DecodeCache;
using scalekern::DecodeHead;
using scalekern::DecodePart;
using scalekern::DecodeSplit;
using scalekern::kDecodeSplit;

constexpr int64_t kTile = 32;  // keys whose rows stay in L1 between blocks of rows

template <class F>
constexpr int kRowBlock = kLanes<F> < 4 ? kLanes<F> : 4;

// Two 4-bit codes, the even channel in the lower half.
struct Nibbles {
  int8_t both;
  int8_t low() const { return int8_t(int8_t(uint8_t(both) << 4) >> 4); }
  int8_t high() const { return int8_t(both >> 4); }
};

static int64_t slot_of(const DecodeArgs& a, const DecodeHead& head, int64_t position) {
  if (!a.circular || position < a.sink) return position;
  return a.sink + int64_t(uint64_t(position - a.sink) % uint64_t(head.capacity - a.sink));
}

// Where the keys of a split lie: batch row or page, key head, slot.
struct Slots {
  int64_t lead[kDecodeSplit], slot[kDecodeSplit], head;

  Slots(const DecodeArgs& a, const DecodeSplit& split) : head(split.head % a.key_heads) {
    const DecodeHead& own = a.heads[split.head];
    const int64_t b = split.head / a.key_heads;
    for (int64_t j = 0; j < split.count; ++j) {
      const int64_t i = split.first + j, position = i < own.sink ? i : own.low + i - own.sink;
      lead[j] = b, slot[j] = slot_of(a, own, position) + own.base;
      if (a.page) {
        const int64_t at = b * a.table_b + int64_t(uint64_t(slot[j]) / uint64_t(a.page)) * a.table_j;
        if (a.table_is_int64) lead[j] = static_cast<const int64_t*>(a.table)[at];
        else lead[j] = static_cast<const int32_t*>(a.table)[at];
        slot[j] = int64_t(uint64_t(slot[j]) % uint64_t(a.page));
      }
    }
  }
};

template <class S>
struct RowPointers {
  const S* at[kTile];
};

// A tile of them: keys first .. first + count - 1 of the split.
struct Keys {
  const Slots& slots;
  int64_t first, count;
  bool consecutive;  // slots beside each other

  Keys(const Slots& slots, int64_t first, int64_t count)
      : slots(slots), first(first), count(count), consecutive(true) {
    for (int64_t i = first + 1; i < first + count; ++i)
      consecutive &= slots.lead[i] == slots.lead[i - 1] && slots.slot[i] == slots.slot[i - 1] + 1;
  }

  int64_t offset(const DecodePart& part, int64_t i) const {
    return slots.lead[first + i] * part.b + slots.head * part.h + slots.slot[first + i] * part.s;
  }
  // Rows behind the last key are the first one's.
  template <class S>
  RowPointers<S> rows(const DecodePart& part) const {
    RowPointers<S> rows;
    for (int64_t i = 0; i < kTile; ++i) rows.at[i] = at<S>(part.data, offset(part, i < count ? i : 0));
    return rows;
  }
};

static inline float scale_at(const DecodeCache& cache, const DecodePart& part, int64_t offset) {
  return cache.half_scales ? to_float(*at<f16>(part.data, offset)) : *at<float>(part.data, offset);
}

template <class F>
static int64_t groups_of(const DecodeCache& cache, int64_t dim) {
  return cache.bits ? (dim + cache.group - 1) / cache.group : 0;
}

// Scales and offsets of a tile of keys, a group's side by side; 0 behind the last key.
template <class F>
class Scales {
 public:
  Scales(const DecodeCache& cache, int64_t dim)
      : groups_(groups_of<F>(cache, dim)),
        memory_(groups_ ? static_cast<F*>(__builtin_malloc(sizeof(F) * size_t(2 * groups_ * kTile))) : nullptr) {}
  ~Scales() { __builtin_free(memory_); }
  Scales(const Scales&) = delete;

  const F* scale(int64_t g) const { return memory_ + g * kTile; }
  const F* offset(int64_t g) const { return memory_ + (groups_ + g) * kTile; }

  void load(const DecodeCache& cache, const Keys& keys) {
    load_part(cache, cache.scales, keys, memory_);
    if (cache.offsets.data) return load_part(cache, cache.offsets, keys, memory_ + groups_ * kTile);
    zero(memory_ + groups_ * kTile, groups_ * kTile);
  }

 private:
  // Slots beside each other are widened a vector at a time: one by one, they took a sixth of decoding 4-bit codes.
  void load_part(const DecodeCache& cache, const DecodePart& part, const Keys& keys, F* to) {
    for (int64_t g = 0; g < groups_; ++g, to += kTile) {
      const int64_t first = keys.offset(part, 0) + g * part.p;
      if (!keys.consecutive)
        for (int64_t i = 0; i < keys.count; ++i) to[i] = scale_at(cache, part, keys.offset(part, i) + g * part.p);
      else if (cache.half_scales) widen(to, at<f16>(part.data, first), part.s, keys.count);
      else widen(to, at<float>(part.data, first), part.s, keys.count);
      zero(to + keys.count, kTile - keys.count);
    }
  }

  const int64_t groups_;
  F* memory_;
};

// kLanes<F> numbers or codes from channel p on, which for nibbles is even.
template <class F, class S>
static inline Vec<F> load_at(const S* row, int64_t p) {
  return load_as<F>(row + p);
}
template <class F>
static inline Vec<F> load_at(const int8_t* row, int64_t p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4)
    return (Vec<F>)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + p))));
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4)
    return (Vec<F>)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + p))));
#endif
  F lanes[kLanes<F>];
  for (int i = 0; i < kLanes<F>; ++i) lanes[i] = F(row[p + i]);
  return load(lanes);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// Eight nibbles of a word, each moved to the top of its lane and back with its sign: no mask, no table.
static inline __m256i eight_nibbles(const Nibbles* row) {
  int32_t word;
  __builtin_memcpy(&word, row, 4);
  const __m256i up = _mm256_sllv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
  return _mm256_srai_epi32(up, 28);
}
#endif
template <class F>
static inline Vec<F> load_at(const Nibbles* row, int64_t p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {  // each lane's nibble to its low bits, which is all that a look-up of 16 reads
    int32_t low, high;
    __builtin_memcpy(&low, row + (p >> 1), 4), __builtin_memcpy(&high, row + (p >> 1) + 4, 4);
    const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
    const __m512i down = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return (Vec<F>)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, down), values);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4) return (Vec<F>)_mm256_cvtepi32_ps(eight_nibbles(row + (p >> 1)));
#endif
  F lanes[kLanes<F>];
  for (int i = 0; i < kLanes<F>; i += 2) {
    const Nibbles pair = row[(p + i) / 2];
    lanes[i] = F(pair.low()), lanes[i + 1] = F(pair.high());
  }
  return load(lanes);
}

// Key i of a tile as numbers, whatever its strides, groups and number of channels.
template <class F>
static void dequantize(const DecodeCache& cache, const Keys& keys, int64_t i, int64_t dim, F* dst) {
  constexpr int W = kLanes<F>;
  const int8_t* row = at<int8_t>(cache.codes.data, keys.offset(cache.codes, i));
  const auto nibbles = reinterpret_cast<const Nibbles*>(row);
  const int64_t s = keys.offset(cache.scales, i), o = keys.offset(cache.offsets, i), step = cache.codes.p;
  const bool whole = step == 1 && cache.group % W == 0;
  for (int64_t first = 0, g = 0; first < dim; first += cache.group, ++g) {
    const F scale = scale_at(cache, cache.scales, s + g * cache.scales.p);
    const F offset = cache.offsets.data ? F(scale_at(cache, cache.offsets, o + g * cache.offsets.p)) : F(0);
    const int64_t end = first + cache.group < dim ? first + cache.group : dim;
    int64_t p = first;
    for (; whole && p + W <= end; p += W)
      store(dst + p, (cache.bits == 8 ? load_at<F>(row, p) : load_at<F>(nibbles, p)) * scale + offset);
    for (; p < end; ++p) {
      const Nibbles pair = nibbles[p / (cache.bits == 8 ? 1 : 2) * step];
      dst[p] = F(cache.bits == 8 ? pair.both : p % 2 ? pair.high() : pair.low()) * scale + offset;
    }
  }
}

static inline int64_t place(const void*, int64_t p) { return p; }
static inline int64_t place(const Nibbles*, int64_t p) { return p >> 1; }
// What the rows hold that come next if keys lie beside each other, as they mostly do: the hardware's own prefetching left
// decoding over bfloat16 at 1.26 times torch's attention over the whole cache (8 heads, 4,096 keys, P = 128), now 1.10.
template <class S>
static inline void fetch(const S* row, int64_t p) {
  __builtin_prefetch(row + place(row, p));
}

// s[r * pitch + j] = q_r . k_j over `length` channels from `first` on, for R rows `q_pitch` apart and lanes / R keys.
template <int R, class F, class S>
static inline void dots(
    const F* q, int64_t q_pitch, const S* const* keys, int64_t first, int64_t length, F* s, int64_t pitch) {
  constexpr int W = kLanes<F>, K = W / R;
  Vec<F> acc[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) acc[i] = Vec<F>{};  // = {} would be rep stos: 4 to 10 % of a call of 4 to 10 queries
  constexpr int N = R == 1 && K > 4 ? 4 : K;  // keys side by side: of more, the lines would come in no order
  const int64_t ahead = K > 1 ? K * (keys[1] - keys[0]) : 0;
#pragma GCC unroll 4
  for (int n = 0; n < K; n += N)
    for (int64_t p = first; p < first + length; p += W) {
      Vec<F> key[N];
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) fetch(keys[n + j] + ahead, p), key[j] = load_at<F>(keys[n + j], p);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<F> query = load(q + r * q_pitch + p);
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) acc[r * K + n + j] += query * key[j];
      }
    }
  F sums[W];
  store(sums, sum_lanes<F>(acc));
  for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * pitch, sums + r * K, K * sizeof(F));
}

// acc[r * acc_pitch + c] += sum_j p[r * pitch + j] v_j[c], columns c and the C - 1 vectors behind.
template <int R, int C, class F, class S>
static inline void weigh(
    const F* p, int64_t pitch, const S* const* values, int64_t c, int64_t begin, int64_t end, F* acc,
    int64_t acc_pitch) {
  constexpr int W = kLanes<F>;
  Vec<F> sum[R][C];
  const int64_t ahead = 8 * (values[1] - values[0]);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) sum[r][i] = load(acc + r * acc_pitch + c + i * W);
  for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) fetch(values[j] + ahead, c + i * W);
    if constexpr (R == 1) {
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) sum[0][i] += p[j] * load_at<F>(values[j], c + i * W);
      continue;
    }
    Vec<F> value[C];
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) value[i] = load_at<F>(values[j], c + i * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) sum[r][i] += p[r * pitch + j] * value[i];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) store(acc + r * acc_pitch + c + i * W, sum[r][i]);
}

// The same for `length` columns from `first` on.
template <int R, class F, class S>
static void weigh_rows(
    const F* p, int64_t pitch, const S* const* values, int64_t first, int64_t length, int64_t begin, int64_t end,
    F* acc, int64_t acc_pitch) {
  constexpr int C = 8 / R;
  for (int64_t c = first; c < first + length;) {
    if (c + C * kLanes<F> <= first + length) {
      weigh<R, C>(p, pitch, values, c, begin, end, acc, acc_pitch), c += C * kLanes<F>;
    } else if (R == 1 && c + 4 * kLanes<F> <= first + length) {  // a group of 32: one sum would wait for itself
      weigh<R, 4>(p, pitch, values, c, begin, end, acc, acc_pitch), c += 4 * kLanes<F>;
    } else {
      weigh<R, 1>(p, pitch, values, c, begin, end, acc, acc_pitch), c += kLanes<F>;
    }
  }
}

static inline VecF tanhv(VecF x) {  // the series where 1 - 2 / (1 + e^2x) would cancel
  const VecF q = x * x;
  VecF p = splat(-1382.0f / 155925);
  p = p * q + 62.0f / 2835;
  p = p * q - 17.0f / 315;
  p = p * q + 2.0f / 15;
  p = p * q - 1.0f / 3;
  return q < 0.09f ? x + x * q * p : 1 - 2 / (1 + expv(2 * x));
}
static inline VecD tanhv(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace
