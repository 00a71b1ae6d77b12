// Attention of a few queries over a cache: the keys that a group of query heads sees, split over threads.
//
// Bound: bytes of the cache. A key row and a value row are read once for all rows (query heads x tokens) of the group.
// Codes: one scale a key leaves them codes until they are summed, so that a number costs a conversion (4 bits: two shifts
//   more) and its product. 8 key heads of 32,768 tokens, P = 128, on two cores of an EPYC with AVX2, beside a bf16 cache:
//   8 bits 0.89 of its time, 4 bits 0.66, where bytes alone would give 0.52 and 0.27: from 16 bits down it is the
//   conversions that bound. 4 bits in groups of 32 take 1.05: each group's dot products end in sums across lanes.
// Layout: lanes along P for the scores and along Pv for the values; blocks of rows share what was loaded. A split's
//   scores are all there before its first exponential, so that there is one maximum a split and nothing is rescaled.
// Split: at most kDecodeSplit keys, by the lists alone, never by the number of threads: what is merged, and in which
//   order, is the same on every machine of one ISA.
#include "sparse_attention/cpu_decode_tiles.h"

namespace {

constexpr int64_t kParallelElements = 32768;     // of the cache: 4 us on one core, about what waking another one takes
constexpr double kInfinity = __builtin_inf();

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

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One thread's buffers, and one split of a head on them.
template <class T, class F = Compute<T>>
class Worker {
 public:
  explicit Worker(const DecodeArgs& a)
      : a_(a), rows_(a.rows()), dim_(round_up(a.dim, W)), value_dim_(round_up(a.value_dim, W)),
        wide_k_(wide(a.k, a.dim)), wide_v_(wide(a.v, a.value_dim)), groups_(groups_of<F>(a.k, a.dim)),
        memory_(static_cast<F*>(__builtin_malloc(
            sizeof(F) * size_t(rows_ * (dim_ + groups_ + kDecodeSplit + value_dim_) + kTile * (dim_ + value_dim_))))),
        seen_(static_cast<Seen*>(__builtin_malloc(sizeof(Seen) * size_t(rows_)))), k_scales_(a.k, a.dim),
        v_scales_(a.v, a.value_dim) {
    q_ = memory_, scores_ = q_ + rows_ * dim_, acc_ = scores_ + rows_ * kDecodeSplit, tile_ = acc_ + rows_ * value_dim_;
    sums_ = tile_ + kTile * (dim_ + value_dim_);
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
      zero(sums_ + r * groups_, groups_);
      for (int64_t p = 0; groups_ && p < a_.dim; ++p) sums_[r * groups_ + p / a_.k.group] += q[p];
    }
    const Slots slots(a_, split);
    for (int64_t j = 0; j < split.count; j += kTile) {
      const Keys keys(slots, j, split.count - j < kTile ? split.count - j : kTile);
      if (wide_k_) score(split, keys, widened(a_.k, keys, a_.dim, dim_));
      else if (a_.k.bits == 8) score_codes<int8_t>(split, keys);
      else if (a_.k.bits == 4) score_codes<Nibbles>(split, keys);
      else score(split, keys, keys.template rows<T>(a_.k.codes).at);
    }
    F* partial = static_cast<F*>(a_.partials) + number * rows_ * (2 + a_.value_dim);
    for (int64_t r = 0; r < rows_; ++r) softmax(split, r, partial + r * (2 + a_.value_dim));
    zero(acc_, rows_ * value_dim_);
    for (int64_t j = 0; j < split.count; j += kTile) {
      const Keys keys(slots, j, split.count - j < kTile ? split.count - j : kTile);
      if (wide_v_) add(split, keys, widened(a_.v, keys, a_.value_dim, value_dim_));
      else if (a_.v.bits == 8) add_codes<int8_t>(split, keys);
      else if (a_.v.bits == 4) add_codes<Nibbles>(split, keys);
      else add(split, keys, keys.template rows<T>(a_.v.codes).at);
    }
    for (int64_t r = 0; r < rows_; ++r)
      __builtin_memcpy(partial + r * (2 + a_.value_dim) + 2, acc_ + r * value_dim_, sizeof(F) * size_t(a_.value_dim));
  }

 private:
  static constexpr int W = kLanes<F>;

  // Whether rows of this cache go through a tile of numbers: they have gaps, end within a vector, or would be widened
  // again for every block of rows. Codes also where a group ends within a vector, and for float64.
  bool wide(const DecodeCache& cache, int64_t dim) const {
    if ((cache.codes.p != 1 && dim > 1) || dim % W) return true;
    if (cache.bits) return sizeof(F) == 8 || cache.group % W || rows_ > kRowBlock<F>;
    return sizeof(T) == 2 && rows_ > kRowBlock<F>;
  }

  const F** widened(const DecodeCache& cache, const Keys& keys, int64_t dim, int64_t pitch) {
    for (int64_t i = 0; i < kTile; ++i) tile_rows_[i] = tile_ + (i < keys.count ? i : 0) * pitch;
    for (int64_t i = 0; i < keys.count; ++i) {
      F* row = tile_ + i * pitch;
      if (cache.bits) dequantize(cache, keys, i, dim, row);
      else widen(row, at<T>(cache.codes.data, keys.offset(cache.codes, i)), cache.codes.p, dim);
      zero(row + dim, pitch - dim);
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

  // s[r * pitch + i] = q_r . key_i over `length` channels from `first` on, for a block of `size` rows.
  template <class S>
  void dot(int64_t r, int64_t size, const S* const* keys, int64_t first, int64_t length, int64_t count, F* s,
           int64_t pitch) const {
    const F* q = q_ + r * dim_;
    if (size == 1) {
      for (int64_t i = 0; i < count; i += W) dots<1>(q, dim_, keys + i, first, length, s + i, pitch);
    } else if (size == 2) {
      for (int64_t i = 0; i < count; i += W / 2) dots<2>(q, dim_, keys + i, first, length, s + i, pitch);
    } else {
      constexpr int R = kRowBlock<F>;
      for (int64_t i = 0; i < count; i += W / R) dots<R>(q, dim_, keys + i, first, length, s + i, pitch);
    }
  }

  template <class S>
  void score(const DecodeSplit& split, const Keys& keys, const S* const* rows) {
    const int64_t begin = split.first + keys.first, end = begin + keys.count;
    const auto some = [&](const Seen& s) { return s.some(begin, end); };
    in_blocks(some, some, [&](int64_t r, int64_t size) {
      dot(r, size, rows, 0, dim_, keys.count, scores_ + r * kDecodeSplit + keys.first, kDecodeSplit);
    });
  }

  // q . (scale c + offset) = scale (q . c) + offset sum(q): a group's parts are met once a key, not once a channel.
  template <class S>
  void score_codes(const DecodeSplit& split, const Keys& keys) {
    const int64_t begin = split.first + keys.first, end = begin + keys.count;
    const auto some = [&](const Seen& s) { return s.some(begin, end); };
    const auto rows = keys.template rows<S>(a_.k.codes);
    k_scales_.load(a_.k, keys);
    in_blocks(some, some, [&](int64_t r, int64_t size) {
      F raw[kRowBlock<F> * kTile];
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t first = g * a_.k.group, left = a_.dim - first;
        const F *scale = k_scales_.scale(g), *offset = k_scales_.offset(g);
        dot(r, size, rows.at, first, left < a_.k.group ? left : a_.k.group, keys.count, raw, kTile);
        for (int64_t row = 0; row < size; ++row) {
          F* s = scores_ + (r + row) * kDecodeSplit + keys.first;
          const F sum = sums_[(r + row) * groups_ + g];
          for (int64_t i = 0; i < kTile; i += W) {
            const Vec<F> x = load(raw + row * kTile + i) * load(scale + i) + sum * load(offset + i);
            store(s + i, g ? load(s + i) + x : x);
          }
        }
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

  // Calls range(size, begin, end) for the keys that a block of rows sees, in one piece for several rows. A value that a
  // row does not see must not meet its weight of 0, which would make NaN of NaN and Inf.
  template <class Range>
  void in_ranges(const DecodeSplit& split, const Keys& keys, const Range& range) {
    const int64_t begin = split.first + keys.first, end = begin + keys.count;
    const auto all = [&](const Seen& s) { return s.all(begin, end); };
    const auto some = [&](const Seen& s) { return s.some(begin, end); };
    in_blocks(all, some, [&](int64_t r, int64_t size) {
      if (size > 1) return range(r, size, 0, keys.count);
      const Seen& s = seen_[r];
      const int64_t sink = clamp(s.sink - begin, 0, keys.count);
      if (sink) range(r, size, 0, sink);
      range(r, size, clamp(s.low - begin, 0, keys.count), clamp(s.high - begin, 0, keys.count));
    });
  }

  template <class S>
  void weigh_block(int64_t size, const F* p, int64_t pitch, const S* const* values, int64_t first, int64_t length,
                   int64_t begin, int64_t end, F* acc) const {
    if (size == 1) return weigh_rows<1>(p, pitch, values, first, length, begin, end, acc, value_dim_);
    if (size == 2) return weigh_rows<2>(p, pitch, values, first, length, begin, end, acc, value_dim_);
    weigh_rows<kRowBlock<F>>(p, pitch, values, first, length, begin, end, acc, value_dim_);
  }

  template <class S>
  void add(const DecodeSplit& split, const Keys& keys, const S* const* values) {
    in_ranges(split, keys, [&](int64_t r, int64_t size, int64_t begin, int64_t end) {
      const F* p = scores_ + r * kDecodeSplit + keys.first;
      weigh_block(size, p, kDecodeSplit, values, 0, value_dim_, begin, end, acc_ + r * value_dim_);
    });
  }

  // sum of p (scale c + offset): weights times scales for the codes, and one number a group for all of its channels.
  template <class S>
  void add_codes(const DecodeSplit& split, const Keys& keys) {
    const auto values = keys.template rows<S>(a_.v.codes);
    v_scales_.load(a_.v, keys);
    in_ranges(split, keys, [&](int64_t r, int64_t size, int64_t begin, int64_t end) {
      F scaled[kRowBlock<F> * kTile];
      for (int64_t g = 0, first = 0; first < a_.value_dim; ++g, first += a_.v.group) {
        const int64_t left = a_.value_dim - first, length = left < a_.v.group ? left : a_.v.group;
        const F *scale = v_scales_.scale(g), *offset = v_scales_.offset(g);
        F* acc = acc_ + r * value_dim_;
        for (int64_t row = 0; row < size; ++row) {
          const F* p = scores_ + (r + row) * kDecodeSplit + keys.first;
          F constant = 0;
          for (int64_t i = 0; i < kTile; ++i) scaled[row * kTile + i] = p[i] * scale[i];
          for (int64_t i = begin; i < end; ++i) constant += p[i] * offset[i];
          for (int64_t c = first; a_.v.offsets.data && c < first + length; ++c) acc[row * value_dim_ + c] += constant;
        }
        weigh_block(size, scaled, kTile, values.at, first, length, begin, end, acc);
      }
    });
  }

  const DecodeArgs& a_;
  const int64_t rows_, dim_, value_dim_;
  const bool wide_k_, wide_v_;
  const int64_t groups_;  // of codes of keys that stay codes
  F *memory_, *q_, *scores_, *acc_, *tile_, *sums_;  // sums_: of q, a group's channels
  Seen* seen_;
  Scales<F> k_scales_, v_scales_;
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
