// Attention of a few queries over a cache: the keys that a group of query heads sees, split over threads.
//
// Bound: bytes of the cache. A key row and a value row are read once for all rows (query heads x tokens) of the group.
// Layout: lanes along P for the scores and along Pv for the values; blocks of rows share what was loaded. A split's
//   scores are all there before its first exponential, so that there is one maximum a split and nothing is rescaled.
// Split: at most kDecodeSplit keys, by the lists alone, never by the number of threads: what is merged, and in which
//   order, is the same on every machine of one ISA.
#include "selective_scan/cpu_tile.h"
#include "sparse_attention/decode.h"

namespace {

using scalekern::DecodeArgs;
using scalekern::DecodeHead;
using scalekern::DecodeSplit;
using scalekern::kDecodeSplit;

constexpr int64_t kTile = 32;                    // keys whose rows stay in L1 between blocks of rows
constexpr int64_t kParallelElements = 32768;     // of the cache: 4 us on one core, about what waking another one takes
constexpr double kInfinity = __builtin_inf();

template <class F>
constexpr int kRowBlock = kLanes<F> < 4 ? kLanes<F> : 4;

// What one query row sees of a head's list: [0, sink) and [low, high).
struct Seen {
  int64_t sink, low, high;
  bool some(int64_t begin, int64_t end) const { return begin < sink || (begin < high && end > low); }
  bool all(int64_t begin, int64_t end) const { return end <= sink || (low <= begin && end <= high); }
};

static inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

static Seen seen(const DecodeArgs& a, const DecodeHead& head, int64_t h, int64_t t) {
  const int64_t own = head.length - a.tokens + t, past = own + 1 - head.low;
  Seen s;
  s.sink = clamp(own + 1, 0, head.sink);
  s.high = clamp(head.sink + past, s.sink, head.count);
  s.low = a.windows == nullptr ? s.sink : clamp(head.sink + past - a.windows[h], s.sink, s.high);
  if (s.low == s.sink) s.sink = s.low = s.high;
  return s;
}

static int64_t slot_of(const DecodeArgs& a, const DecodeHead& head, int64_t position) {
  if (!a.circular || position < a.sink) return position;
  return a.sink + int64_t(uint64_t(position - a.sink) % uint64_t(head.capacity - a.sink));
}

// Offsets of the split's rows in one of the caches.
struct Rows {
  int64_t k[kDecodeSplit], v[kDecodeSplit];

  Rows(const DecodeArgs& a, const DecodeSplit& split) {
    const DecodeHead& head = a.heads[split.head];
    const int64_t b = split.head / a.key_heads, g = split.head % a.key_heads;
    for (int64_t j = 0; j < split.count; ++j) {
      const int64_t i = split.first + j, position = i < head.sink ? i : head.low + i - head.sink;
      int64_t slot = slot_of(a, head, position) + head.base, lead = b;
      if (a.page) {
        const int64_t at = b * a.table_b + int64_t(uint64_t(slot) / uint64_t(a.page)) * a.table_j;
        lead = a.table_is_int64 ? static_cast<const int64_t*>(a.table)[at] : static_cast<const int32_t*>(a.table)[at];
        slot = int64_t(uint64_t(slot) % uint64_t(a.page));
      }
      k[j] = lead * a.k_b + g * a.k_h + slot * a.k_s, v[j] = lead * a.v_b + g * a.v_h + slot * a.v_s;
    }
  }
};

// s[r * pitch + j] = q_r . k_j for R rows and lanes / R keys.
template <int R, class F, class S>
static inline void dots(const F* q, int64_t dim, const S* const* keys, F* s, int64_t pitch) {
  constexpr int W = kLanes<F>, K = W / R;
  Vec<F> acc[W] = {};
  for (int64_t p = 0; p < dim; p += W) {
    Vec<F> key[K];
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) key[j] = load_as<F>(keys[j] + p);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<F> query = load(q + r * dim + p);
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) acc[r * K + j] += query * key[j];
    }
  }
  F sums[W];
  store(sums, sum_lanes<F>(acc));
  for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * pitch, sums + r * K, K * sizeof(F));
}

// acc[r * dim + c] += sum_j p[r * pitch + j] v_j[c], columns c and the C - 1 vectors behind.
template <int R, int C, class F, class S>
static inline void weigh(
    const F* p, int64_t pitch, const S* const* values, int64_t begin, int64_t end, F* acc, int64_t dim) {
  constexpr int W = kLanes<F>;
  Vec<F> sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = load(acc + r * dim + c * W);
  for (int64_t j = begin; j < end; ++j) {
    Vec<F> value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = load_as<F>(values[j] + c * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] += p[r * pitch + j] * value[c];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(acc + r * dim + c * W, sum[r][c]);
}

template <int R, class F, class S>
static void weigh_rows(const F* p, int64_t pitch, const S** values, int64_t begin, int64_t end, F* acc, int64_t dim) {
  constexpr int C = 8 / R;
  const S* at[kTile];
  for (int64_t c = 0; c < dim;) {
    for (int64_t j = begin; j < end; ++j) at[j] = values[j] + c;
    if (c + C * kLanes<F> <= dim) {
      weigh<R, C>(p, pitch, at, begin, end, acc + c, dim), c += C * kLanes<F>;
    } else {
      weigh<R, 1>(p, pitch, at, begin, end, acc + c, dim), c += kLanes<F>;
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

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One thread's buffers, and one split of a head on them.
template <class T, class F = Compute<T>>
class Worker {
 public:
  explicit Worker(const DecodeArgs& a)
      : a_(a), rows_(a.rows()), dim_(round_up(a.dim, W)), value_dim_(round_up(a.value_dim, W)),
        wide_k_(wide(a.k_p, a.dim)), wide_v_(wide(a.v_p, a.value_dim)),
        memory_(static_cast<F*>(__builtin_malloc(
            sizeof(F) * size_t(rows_ * (dim_ + kDecodeSplit + value_dim_) + kTile * (dim_ + value_dim_))))),
        seen_(static_cast<Seen*>(__builtin_malloc(sizeof(Seen) * size_t(rows_)))) {
    q_ = memory_, scores_ = q_ + rows_ * dim_, acc_ = scores_ + rows_ * kDecodeSplit, tile_ = acc_ + rows_ * value_dim_;
  }
  ~Worker() { __builtin_free(memory_), __builtin_free(seen_); }
  Worker(const Worker&) = delete;

  void run(int64_t number) {
    const DecodeSplit& split = a_.splits[number];
    const DecodeHead& head = a_.heads[split.head];
    const int64_t b = split.head / a_.key_heads, g = split.head % a_.key_heads;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t h = g * a_.group + r / a_.tokens, t = r % a_.tokens;
      seen_[r] = seen(a_, head, h, t);
      F* q = q_ + r * dim_;
      widen(q, at<T>(a_.q, b * a_.q_b + h * a_.q_h + t * a_.q_t), a_.q_p, a_.dim);
      for (int64_t p = 0; p < a_.dim; ++p) q[p] *= F(a_.scale);
      zero(q + a_.dim, dim_ - a_.dim);
    }
    const Rows offsets(a_, split);
    for (int64_t j = 0; j < split.count; j += kTile) {
      const int64_t count = split.count - j < kTile ? split.count - j : kTile;
      if (wide_k_) {
        score<F>(split, j, count, widened(a_.k, offsets.k + j, count, a_.k_p, a_.dim, dim_));
      } else {
        const T* keys[kTile];
        for (int64_t i = 0; i < kTile; ++i) keys[i] = at<T>(a_.k, offsets.k[j + (i < count ? i : 0)]);
        score<T>(split, j, count, keys);
      }
    }
    F* partial = static_cast<F*>(a_.partials) + number * rows_ * (2 + a_.value_dim);
    for (int64_t r = 0; r < rows_; ++r) softmax(split, r, partial + r * (2 + a_.value_dim));
    zero(acc_, rows_ * value_dim_);
    for (int64_t j = 0; j < split.count; j += kTile) {
      const int64_t count = split.count - j < kTile ? split.count - j : kTile;
      if (wide_v_) {
        add<F>(split, j, count, widened(a_.v, offsets.v + j, count, a_.v_p, a_.value_dim, value_dim_));
      } else {
        const T* values[kTile];
        for (int64_t i = 0; i < count; ++i) values[i] = at<T>(a_.v, offsets.v[j + i]);
        add<T>(split, j, count, values);
      }
    }
    for (int64_t r = 0; r < rows_; ++r)
      __builtin_memcpy(partial + r * (2 + a_.value_dim) + 2, acc_ + r * value_dim_, sizeof(F) * size_t(a_.value_dim));
  }

 private:
  static constexpr int W = kLanes<F>;

  // Whether rows of this cache go through a tile of numbers: they have gaps, end within a vector, or would be widened
  // again for every block of rows.
  bool wide(int64_t stride, int64_t dim) const {
    return (stride != 1 && dim > 1) || dim % W || (sizeof(T) == 2 && rows_ > kRowBlock<F>);
  }

  const F** widened(
      const void* cache, const int64_t* offsets, int64_t count, int64_t stride, int64_t dim, int64_t pitch) {
    for (int64_t i = 0; i < kTile; ++i) tile_rows_[i] = tile_ + (i < count ? i : 0) * pitch;
    for (int64_t i = 0; i < count; ++i) {
      widen(tile_ + i * pitch, at<T>(cache, offsets[i]), stride, dim);
      zero(tile_ + i * pitch + dim, pitch - dim);
    }
    return tile_rows_;
  }

  // Calls block(first row, number of rows) for blocks of rows that all see something of the tile, of several rows
  // only where `shared(row)` holds for each of them.
  template <class Shared, class Some, class Block>
  void in_blocks(const Shared& shared, const Some& some, const Block& block) {
    for (int64_t r = 0; r < rows_;) {
      int64_t size = kRowBlock<F>;
      while (size > 1) {
        bool fits = r + size <= rows_;
        for (int64_t i = 0; fits && i < size; ++i) fits = shared(seen_[r + i]);
        if (fits) break;
        size /= 2;
      }
      if (size > 1 || some(seen_[r])) block(r, size);
      r += size;
    }
  }

  template <class S>
  void score(const DecodeSplit& split, int64_t j, int64_t count, const S* const* keys) {
    const int64_t begin = split.first + j, end = begin + count;
    const auto some = [&](const Seen& s) { return s.some(begin, end); };
    in_blocks(some, some, [&](int64_t r, int64_t size) {
      const F* q = q_ + r * dim_;
      F* s = scores_ + r * kDecodeSplit + j;
      if (size == 1) {
        for (int64_t i = 0; i < count; i += W) dots<1>(q, dim_, keys + i, s + i, kDecodeSplit);
      } else if (size == 2) {
        for (int64_t i = 0; i < count; i += W / 2) dots<2>(q, dim_, keys + i, s + i, kDecodeSplit);
      } else {
        constexpr int R = kRowBlock<F>;
        for (int64_t i = 0; i < count; i += W / R) dots<R>(q, dim_, keys + i, s + i, kDecodeSplit);
      }
    });
  }

  // Scores of a row to weights; its maximum and the weights' sum to partial[0] and [1].
  void softmax(const DecodeSplit& split, int64_t r, F* partial) {
    F* s = scores_ + r * kDecodeSplit;
    const Seen& own = seen_[r];
    const int64_t padded = round_up(split.count, W);
    const auto hide = [&](int64_t from, int64_t to) {
      const int64_t end = clamp(to - split.first, 0, padded);
      for (int64_t j = clamp(from - split.first, 0, padded); j < end; ++j) s[j] = F(-kInfinity);
    };
    if (a_.softcap != 0)
      for (int64_t j = 0; j < padded; j += W) store(s + j, F(a_.softcap) * tanhv(load(s + j) / F(a_.softcap)));
    hide(own.sink, own.low), hide(own.high, split.first + padded);
    hide(split.first + split.count, split.first + padded);
    Vec<F> most = splat(F(0)) - F(kInfinity);
    VecInt<F> strange = {};
    for (int64_t j = 0; j < padded; j += W) {
      const Vec<F> x = load(s + j);
      most = x > most ? x : most;
      strange |= x != x;
    }
    F maximum = most[0];
    for (int i = 0; i < W; ++i) maximum = strange[i] ? F(__builtin_nan("")) : most[i] > maximum ? most[i] : maximum;
    Vec<F> sum = {};
    const F shift = maximum == F(-kInfinity) ? F(0) : maximum;
    for (int64_t j = 0; j < padded; j += W) {
      const Vec<F> p = expv(load(s + j) - shift);
      store(s + j, p);
      sum += p;
    }
    partial[0] = maximum, partial[1] = sum_of<F>(sum);
  }

  // A value that a row does not see must not meet its weight of 0, which would make NaN of NaN and Inf.
  template <class S>
  void add(const DecodeSplit& split, int64_t j, int64_t count, const S** values) {
    const int64_t begin = split.first + j, end = begin + count;
    const auto all = [&](const Seen& s) { return s.all(begin, end); };
    const auto some = [&](const Seen& s) { return s.some(begin, end); };
    in_blocks(all, some, [&](int64_t r, int64_t size) {
      const F* p = scores_ + r * kDecodeSplit + j;
      F* acc = acc_ + r * value_dim_;
      if (size > 2) return weigh_rows<kRowBlock<F>>(p, kDecodeSplit, values, 0, count, acc, value_dim_);
      if (size == 2) return weigh_rows<2>(p, kDecodeSplit, values, 0, count, acc, value_dim_);
      const Seen& s = seen_[r];
      const int64_t low = clamp(s.low - begin, 0, count), high = clamp(s.high - begin, 0, count);
      weigh_rows<1>(p, kDecodeSplit, values, 0, clamp(s.sink - begin, 0, count), acc, value_dim_);
      weigh_rows<1>(p, kDecodeSplit, values, low, high, acc, value_dim_);
    });
  }

  const DecodeArgs& a_;
  const int64_t rows_, dim_, value_dim_;
  const bool wide_k_, wide_v_;
  F *memory_, *q_, *scores_, *acc_, *tile_;
  Seen* seen_;
  const F* tile_rows_[kTile];
};

static inline float exp_of(float x) { return __builtin_expf(x); }
static inline double exp_of(double x) { return __builtin_exp(x); }
static inline float log_of(float x) { return __builtin_logf(x); }
static inline double log_of(double x) { return __builtin_log(x); }

// One query row of a head: its splits in their order, and the sink's score.
template <class T, class F = Compute<T>>
void merge(const DecodeArgs& a, int64_t number, int64_t r, F* sum) {
  const DecodeHead& head = a.heads[number];
  const int64_t b = number / a.key_heads, h = number % a.key_heads * a.group + r / a.tokens;
  const int64_t row = (b * a.key_heads * a.group + h) * a.tokens + r % a.tokens, pitch = 2 + a.value_dim;
  const F* partial = static_cast<const F*>(a.partials) + (head.first_split * a.rows() + r) * pitch;
  const int64_t step = a.rows() * pitch;
  F most = a.sinks ? *at<F>(a.sinks, h * a.sinks_h) : F(-kInfinity);
  for (int64_t s = 0; s < head.splits; ++s) {
    const F next = partial[s * step];
    most = most != most || next <= most ? most : next;  // a NaN stays
  }
  zero(sum, a.value_dim);
  F total = most == F(-kInfinity) ? F(1) : a.sinks ? exp_of(*at<F>(a.sinks, h * a.sinks_h) - most) : F(0);
  for (int64_t s = 0; s < head.splits; ++s) {
    const F* part = partial + s * step;
    if (part[0] == F(-kInfinity)) continue;
    const F weight = exp_of(part[0] - most);
    total += weight * part[1];
    for (int64_t c = 0; c < a.value_dim; ++c) sum[c] += weight * part[2 + c];
  }
  for (int64_t c = 0; c < a.value_dim; ++c) sum[c] /= total;
  narrow(at<T>(a.out, row * a.value_dim), 1, sum, a.value_dim);
  // An infinite score makes the output NaN, and its lse likewise.
  *at<F>(a.lse, row) = most == F(-kInfinity)  ? most
                       : most == F(kInfinity) ? F(__builtin_nan(""))
                                              : most + log_of(total);
}

template <class T>
void run(const DecodeArgs& a) {
  using F = Compute<T>;
  const auto cost = [&](const DecodeSplit& s) { return s.count + 16; };
  int64_t total = 0, keys = 0;
  for (int64_t i = 0; i < a.split_count; ++i) total += cost(a.splits[i]), keys += a.splits[i].count;
  const bool parallel = keys * (a.dim + a.value_dim) >= kParallelElements;
  const int64_t threads = parallel ? scalekern::num_threads() : 1;
  parallel_if(parallel, threads, [&](int64_t begin, int64_t end) {  // pieces of equal cost, not of equal number
    Worker<T> worker(a);
    int64_t before = 0;
    for (int64_t i = 0; i < a.split_count; ++i) {
      const int64_t piece = before * threads / total;
      if (begin <= piece && piece < end) worker.run(i);
      before += cost(a.splits[i]);
    }
  });
  const int64_t heads = a.batch * a.key_heads, rows = a.rows();
  parallel_if(a.split_count * rows * a.value_dim >= kParallelElements, heads * rows, [&](int64_t begin, int64_t end) {
    F* sum = static_cast<F*>(__builtin_malloc(sizeof(F) * size_t(a.value_dim)));
    for (int64_t i = begin; i < end; ++i) merge<T>(a, i / rows, i % rows, sum);
    __builtin_free(sum);
  });
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void sparse_attention_decode(const DecodeArgs& a) {
  switch (a.dtype) {  // the order of enum Dtype
    case 0: return run<float>(a);
    case 1: return run<double>(a);
    case 2: return run<f16>(a);
    case 3: return run<bf16>(a);
  }
}

}  // namespace scalekern::SCALEKERN_ISA
