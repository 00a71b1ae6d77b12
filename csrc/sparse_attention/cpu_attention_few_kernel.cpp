// Forward of sparse_attention for few queries (few_queries of cpu_attention.cpp; softmax): decoding with a mask.
//
// Bound: bytes of the keys and values, read once for all query heads of a key head; from about four rows (heads x
//   queries) a key head on, multiply-adds and the sums across lanes that a score ends in.
// Panels of the other forward hold 32 queries as lanes (AVX-512), so that one query pays for 32.
// Layout: that of decoding (cpu_decode_tiles.h): lanes along P for the scores and along Pv for the values, blocks of
//   four rows share what was loaded. All scores of a piece are there before its first exponential: one maximum a piece,
//   nothing is rescaled.
// Work: pieces of at most kPieceTiles tiles of keys that some row sees, the next one to whoever is free; the partial
//   sums of a row are merged in order, so that neither threads nor their number change a bit.
#include "sparse_attention/cpu_attention_scores.h"
#include "sparse_attention/cpu_decode_tiles.h"

namespace {

using scalekern::AttnHeads;
using scalekern::AttnPiece;

constexpr int64_t kKeys = kMaskBlock;  // of a tile
constexpr int64_t kPieceKeys = scalekern::kPieceTiles * kKeys;

template <class T>
class Few {
  using F = Compute<T>;
  static constexpr int W = kLanes<F>, R = kRowBlock<F>;

 public:
  explicit Few(const AttnArgs& a) : a_(a), dim_(round_up(a.dim, W)), value_dim_(round_up(a.value_dim, W)) {
    for (int64_t i = 0; i < a.group_count; ++i) rows_ = most(rows_, a.groups[i].heads * a.q_len);
  }

  void run() const {
    Scratch partials(a_.partial_count * pitch() * int64_t(sizeof(F)) + 64);
    F* sums = partials.take<F>(a_.partial_count * pitch());
    int64_t tiles = 0;
    for (int64_t i = 0; i < a_.piece_count; ++i) tiles += a_.pieces[i].count;
    const int64_t elements = tiles * kKeys * (dim_ + value_dim_) * ceil_div(rows_, R);
    for_items(
        a_.piece_count, elements > kWorthThreads, [&](Scratch& scratch) { return Buffers(*this, scratch); },
        [&](int64_t i, Buffers& m) { piece(m, a_.pieces[i], sums + a_.pieces[i].partial * pitch()); });
    for (int64_t i = 0; i < a_.group_count; ++i) merge(a_.groups[i], sums);
  }

 private:
  static constexpr int64_t kWorthThreads = 32768;  // elements of the cache, times blocks of rows: 4 us of one core
  int64_t pitch() const { return 2 + value_dim_; }  // maximum, sum of exponentials, sum of values

  struct Buffers {
    F *q, *scores, *k, *v;
    const MaskWord** words;  // of a row, by tile
    Buffers(const Few& f, Scratch& scratch) {
      q = scratch.take<F>(f.rows_ * f.dim_), scores = scratch.take<F>(f.rows_ * kPieceKeys);
      k = scratch.take<F>(kKeys * f.dim_), v = scratch.take<F>(kKeys * f.value_dim_);
      words = scratch.take<const MaskWord*>(f.rows_);
    }
  };

  // Pointers to the rows of a tile, those past its last key the first one's.
  template <class S>
  struct Pointers {
    const S* at[kKeys];
    Pointers(const S* first, int64_t stride, int64_t keys) {
      for (int64_t i = 0; i < kKeys; ++i) at[i] = first + (i < keys ? i : 0) * stride;
    }
  };

  // body(pointers) of a tile as it lies, if its rows are whole vectors and `as_is`; else of its numbers in `to`.
  template <class Body>
  static void with_rows(const AttnTensor& t, int64_t b, int64_t h, int64_t k0, int64_t keys, int64_t columns,
                        int64_t padded, bool as_is, F* to, const Body& body) {
    const T* from = ::at<T>(t, b, h, k0);
    if (as_is && t.s[3] == 1 && columns == padded) return body(Pointers<T>(from, t.s[2], keys).at);
    for (int64_t i = 0; i < keys; ++i) {
      widen(to + i * padded, from + i * t.s[2], t.s[3], columns);
      zero(to + i * padded + columns, padded - columns);
    }
    body(Pointers<F>(to, padded, keys).at);
  }

  // block(first row, rows) for all rows that see something of tile t, R, 2 or 1 at a time.
  template <class Block>
  static void in_blocks(const Buffers& m, int64_t rows, int64_t t, const Block& block) {
    for (int64_t r = 0, size; r < rows; r += size) {
      size = rows - r >= R ? R : rows - r >= 2 ? 2 : 1;
      MaskWord some = 0;
      for (int64_t i = 0; i < size; ++i) some |= m.words[r + i][t];
      if (some) block(r, size);
    }
  }

  void piece(Buffers& m, const AttnPiece& p, F* sums) const {
    const AttnHeads& g = a_.groups[p.group];
    const int64_t rows = g.heads * a_.q_len, kv = g.h / (a_.heads / a_.kv_heads);
    const F factor = F(a_.softcap ? a_.scale / a_.softcap : a_.scale * kLog2e);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = g.h + r / a_.q_len, i = r % a_.q_len;
      const int64_t list = (a_.plan_batches == 1 ? 0 : g.b) * a_.plan_heads + (a_.plan_heads == 1 ? 0 : h);
      m.words[r] = a_.bits + (list * a_.q_len + i) * a_.key_tiles;
      widen(m.q + r * dim_, ::at<T>(a_.q, g.b, h, i), a_.q.s[3], a_.dim);
      for (int64_t c = 0; c < a_.dim; ++c) m.q[r * dim_ + c] *= factor;
      zero(m.q + r * dim_ + a_.dim, dim_ - a_.dim);
      sums[r * pitch()] = -kInfinity<F>;
      zero(sums + r * pitch() + 1, pitch() - 1);
    }
    const bool few_blocks = sizeof(T) == sizeof(F) || rows <= R;  // else halves would be widened for every block
    for (int64_t j = 0; j < p.count; ++j) {
      const int64_t t = a_.tiles[p.first + j], k0 = t * kKeys, keys = least(kKeys, a_.kv_len - k0);
      with_rows(a_.k, g.b, kv, k0, keys, a_.dim, dim_, few_blocks, m.k, [&](const auto* const* from) {
        in_blocks(m, rows, t, [&](int64_t r, int64_t size) {
          F* s = m.scores + r * kPieceKeys + j * kKeys;
          const F* q = m.q + r * dim_;
          for (int64_t i = 0; i < keys; i += W / size) {
            if (size == 1) dots<1>(q, dim_, from + i, 0, dim_, s + i, kPieceKeys);
            else if (size == 2) dots<2>(q, dim_, from + i, 0, dim_, s + i, kPieceKeys);
            else dots<R>(q, dim_, from + i, 0, dim_, s + i, kPieceKeys);
          }
        });
      });
    }
    for (int64_t r = 0; r < rows; ++r) softmax(m, p, g, r, sums + r * pitch());
    for (int64_t j = 0; j < p.count; ++j) {
      const int64_t t = a_.tiles[p.first + j], k0 = t * kKeys, keys = least(kKeys, a_.kv_len - k0);
      bool full = true;
      for (int64_t r = 0; r < rows; ++r) full &= m.words[r][t] == low_bits(keys);
      with_rows(a_.v, g.b, kv, k0, keys, a_.value_dim, value_dim_, few_blocks, m.v, [&](const auto* const* from) {
        // A weight of 0 times NaN or infinity is NaN: a key that a row does not see must not meet it.
        const bool whole = full || finite(from, keys);
        in_blocks(m, rows, t, [&](int64_t r, int64_t size) {
          const F* w = m.scores + r * kPieceKeys + j * kKeys;
          F* acc = sums + r * pitch() + 2;
          if (!whole) {
            for (int64_t i = 0; i < size; ++i, w += kPieceKeys, acc += pitch())
              for (int64_t k = 0; k < keys; ++k)
                if (m.words[r + i][t] >> k & 1)
                  weigh_rows<1>(w, kPieceKeys, from, 0, value_dim_, k, k + 1, acc, pitch());
          } else if (size == 1) {
            weigh_rows<1>(w, kPieceKeys, from, 0, value_dim_, 0, keys, acc, pitch());
          } else if (size == 2) {
            weigh_rows<2>(w, kPieceKeys, from, 0, value_dim_, 0, keys, acc, pitch());
          } else {
            weigh_rows<R>(w, kPieceKeys, from, 0, value_dim_, 0, keys, acc, pitch());
          }
        });
      });
    }
  }

  template <class S>
  bool finite(const S* const* rows, int64_t keys) const {
    Vec<F> sum{};
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t c = 0; c < value_dim_; c += W) sum += F(0) * load_as<F>(rows[k] + c);
    F total = 0;
    for (int i = 0; i < W; ++i) total += sum[i];
    return total == 0;
  }

  // Products of a row to weights, 0 where masked; their maximum and sum.
  void softmax(const Buffers& m, const AttnPiece& p, const AttnHeads& g, int64_t r, F* sums) const {
    const int64_t h = g.h + r / a_.q_len, i = r % a_.q_len;
    Vec<F> top = splat(-kInfinity<F>), total{};
    const auto each = [&](const auto& body) {
      for (int64_t j = 0; j < p.count; ++j)
        for (int64_t k = 0; k < kKeys; k += W)
          body(m.scores + r * kPieceKeys + j * kKeys + k, m.words[r][a_.tiles[p.first + j]] >> k,
               a_.tiles[p.first + j] * kKeys + k);
    };
    each([&](F* s, MaskWord seen, int64_t k0) {
      Vec<F> x = load(s);
      if (a_.softcap != 0) x = tanh_of<F>(x) * F(a_.softcap * kLog2e);
      if (a_.bias || a_.position) x += terms(g.b, h, i, k0);
      x = lane_mask<F>(seen) ? x : splat(-kInfinity<F>);
      store(s, x);
      top = top < x ? x : top;
    });
    F max = top[0];
    for (int v = 1; v < W; ++v) max = max < top[v] ? top[v] : max;
    const F shift = max == -kInfinity<F> ? F(0) : max;
    each([&](F* s, MaskWord, int64_t) {
      const Vec<F> x = exp2_of_nonpositive(load(s) - shift);
      store(s, x);
      total += x;
    });
    sums[0] = max, sums[1] = sum_of<F>(total);
  }

  // Bias and entries of the position table for W keys, in base 2.
  Vec<F> terms(int64_t b, int64_t h, int64_t i, int64_t k0) const {
    alignas(64) F lanes[W] = {};
    const int64_t keys = least(W, a_.kv_len - k0);
    const int64_t row = b * a_.bias.s[0] + h * a_.bias.s[1] + i * a_.bias.s[2];
    for (int64_t k = 0; a_.bias && k < keys; ++k)
      lanes[k] = element<F>(a_.bias.data, row + (k0 + k) * a_.bias.s[3], a_.bias_dtype);
    if (a_.position) {
      const F* table = static_cast<const F*>(a_.position.data) + (a_.position_heads == 1 ? 0 : h) * a_.position.s[0];
      const auto place = [](const AttnTensor& t, int64_t n) -> int64_t {
        return static_cast<const int32_t*>(t.data)[n * t.s[0]];
      };
      const int64_t zero = a_.positions / 2 - place(a_.q_pos, i);
      for (int64_t k = 0; k < keys; ++k)
        lanes[k] += table[most(0, least(zero + place(a_.k_pos, k0 + k), a_.positions - 1)) * a_.position.s[1]];
    }
    return load(lanes) * F(kLog2e);
  }

  // The pieces of each row in their order, and the sink's score.
  void merge(const AttnHeads& g, F* sums) const {
    const int64_t rows = g.heads * a_.q_len;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = g.h + r / a_.q_len, i = r % a_.q_len;
      const auto part = [&](int64_t p) { return sums + (a_.pieces[g.first_piece + p].partial + r) * pitch(); };
      alignas(64) F acc[256] = {};
      F max = -kInfinity<F>, total = 0;
      if (a_.sinks) max = element<F>(a_.sinks, h * a_.sinks_stride, sizeof(F) == 8 ? kF64 : kF32) * F(kLog2e);
      const F sink = max;
      for (int64_t p = 0; p < g.pieces; ++p) max = max < part(p)[0] ? part(p)[0] : max;
      const F shift = max == -kInfinity<F> ? F(0) : max;
      const auto fade = [&](F x) { return F(__builtin_exp2(double(x - shift))); };
      if (a_.sinks) total = fade(sink);
      for (int64_t p = 0; p < g.pieces; ++p) {
        const F* from = part(p);
        const F factor = fade(from[0]);
        total += factor * from[1];
        for (int64_t c = 0; c < value_dim_; ++c) acc[c] += factor * from[2 + c];
      }
      const bool empty = total == 0;
      for (int64_t c = 0; c < value_dim_; ++c) acc[c] = empty ? F(0) : acc[c] / total;
      narrow(::at<T>(a_.out, g.b, h, i), a_.out.s[3], acc, a_.value_dim);
      const double lse = empty ? -__builtin_inf() : double(max) * kLn2 + __builtin_log(double(total));
      const int64_t to = g.b * a_.lse.s[0] + h * a_.lse.s[1] + i * a_.lse.s[2];
      if (a_.wide_lse) static_cast<double*>(a_.lse.data)[to] = lse;
      else static_cast<float*>(a_.lse.data)[to] = float(lse);
    }
  }

  const AttnArgs& a_;
  const int64_t dim_, value_dim_;
  int64_t rows_ = 0;  // of the largest group
};

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void attention_few(const AttnArgs& a) {
  for_dtype(a.dtype, [&](auto type) { Few<decltype(type)>(a).run(); });
}

}  // namespace scalekern::SCALEKERN_ISA
