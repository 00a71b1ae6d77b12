// The products of forward and backward as multiply-adds of float or double. Their other rendering, of bfloat16 in tile
// registers, is cpu_attention_amx.h: the same functions of the same names.
#pragma once
#include "sparse_attention/cpu_attention_tiles.h"

namespace {

// A query tile of a head.
struct Place {
  int64_t b, h, q0, rows;
  bool careful;    // a query or gradient is not finite: it must not meet the keys that it does not see
  bool repairing;  // the gradients of scores, see the backward
};

template <class T>
struct Products {
  using F = Compute<T>;
  static constexpr int V = kLanes<F>, W = kPanel<F>;
  static constexpr bool kScaled = true;  // queries carry the logits' factor
  static constexpr int kTogether = 1;    // panels whose scores, weights and products take turns
  const AttnArgs& a;
  const bool train;
  const int64_t panels, group, ldk, ldv, ldp;

  Products(const AttnArgs& args, bool train)
      : a(args), train(train), panels(ceil_div(args.block_q, W)), group(args.heads / args.kv_heads),
        ldk(round_up(args.dim, W)), ldv(round_up(args.value_dim, W)), ldp(panels * W + V) {}
  static int64_t padded(int64_t columns) { return columns; }  // rows of a panel of them

  struct Memory {
    F *q, *dout, *q_rows, *do_rows, *k, *v;
    Rows<F> keys, values;
    bool finite;  // the rows of the product over keys, values or, backward, keys, need no care
    Memory(const Products& x, Scratch& scratch) {
      const int64_t queries = x.panels * W, dim = x.a.dim, value_dim = x.a.value_dim;
      q = scratch.take<F>(queries * dim), dout = x.train ? scratch.take<F>(queries * value_dim) : nullptr;
      q_rows = x.train ? scratch.take<F>(queries * x.ldk) : nullptr;
      do_rows = x.train ? scratch.take<F>(queries * x.ldv) : nullptr;
      k = scratch.take<F>(x.a.block_k * dim), v = scratch.take<F>(x.a.block_k * value_dim);
    }
  };

  void load_queries(Memory& m, const Place& at, F factor) const {
    pack_panels<T, F>(::at<T>(a.q, at.b, at.h, at.q0), a.q.s[2], a.q.s[3], at.rows, a.dim, factor, m.q);
  }

  // Queries and the output's gradient; whether all are finite.
  bool load_gradients(Memory& m, const Place& at, F factor) const {
    const T *q = ::at<T>(a.q, at.b, at.h, at.q0), *dout = ::at<T>(a.dout, at.b, at.h, at.q0);
    load_queries(m, at, factor);
    pack_panels<T, F>(dout, a.dout.s[2], a.dout.s[3], at.rows, a.value_dim, F(1), m.dout);
    copy_rows<T, F>(q, a.q.s[2], a.q.s[3], at.rows, a.dim, F(a.scale), m.q_rows, ldk);
    copy_rows<T, F>(dout, a.dout.s[2], a.dout.s[3], at.rows, a.value_dim, F(1), m.do_rows, ldv);
    const int64_t lanes = round_up(at.rows, W);
    return all_finite(m.q, lanes * a.dim) && all_finite(m.dout, lanes * a.value_dim);
  }

  void load_keys(Memory& m, const Place& at, int64_t k0, int64_t keys, bool partial) const {
    m.keys = tile_rows<T, F>(a.k, at.b, at.h / group, k0, keys, a.dim, m.k);
    m.values = tile_rows<T, F>(a.v, at.b, at.h / group, k0, keys, a.value_dim, m.v);
    m.finite = !partial || (train ? all_finite(m.keys, keys, a.dim) : all_finite(m.values, keys, a.value_dim));
  }

  // s [key][W] = keys times the panel from query i on, rows `range`; N: of its two vectors of queries, as below.
  template <int N = 2>
  void scores(const Memory& m, int64_t i, KeyRange range, F* s, int64_t ld) const {
    panel_gemm<F, false, false, N>(range.last - range.first, m.keys.data + range.first * m.keys.stride, m.keys.stride,
                                m.q + i * a.dim, W, a.dim, s + range.first * ld, ld);
  }

  void gradients_of_scores(const Memory& m, int64_t i, KeyRange range, F* dp) const {
    panel_gemm<F, false, false>(range.last - range.first, m.values.data + range.first * m.values.stride,
                                m.values.stride, m.dout + i * a.value_dim, W, a.value_dim, dp + range.first * ldp, ldp);
  }

  // weight(key, v), of a key of `range` and half v of the panel, to s [key][W].
  struct Words {};
  Words words(const Memory&, int64_t) const { return {}; }
  template <int N = 2, class Weight>
  static void weigh(KeyRange range, F* s, Words, const Weight& weight) {
    for (int64_t k = range.first; k < range.last; ++k)
      for (int v = 0; v < N; ++v) store(s + k * W + v * V, weight(k, v));
  }

  // out [column][W] += values^T p
  template <int N = 2>
  void add_values(const Memory& m, int64_t i, KeyRange range, const TileBits& bits, const F* p, F* out) const {
    add_rows<F, N>(m.values, range, a.value_dim, p, W, out, bits, i, m.finite);
  }

  void load_weights(Memory&, int64_t, KeyRange, const F*, const F*, int64_t) const {}  // of both, all keys

  // dq [column][W] += keys^T ds, of the panel from query i on
  void add_keys(const Memory& m, int64_t i, KeyRange range, const TileBits& bits, const F* ds, F* dq) const {
    add_rows<F>(m.keys, range, a.dim, ds, ldp, dq, bits, i, m.finite);
  }

  // dv += p^T dout, dk += ds^T q, of keys [0, count)
  void add_queries(const Memory& m, const Place& at, const KeyRange* ranges, int64_t count, const F* p, const F* ds,
                   F* dv, int64_t lddv, F* dk, int64_t lddk) const {
    sum_queries(p, m.do_rows, ldv, a.value_dim, ranges, count, at.rows, dv, lddv);
    sum_queries(ds, m.q_rows, ldk, a.dim, ranges, count, at.rows, dk, lddk);
  }

  // sums[key] += sum over queries of weights[key][query] rows[query], for keys [0, count) of a tile.
  void sum_queries(const F* weights, const F* rows, int64_t ld, int64_t columns, const KeyRange* ranges, int64_t count,
                   int64_t queries, F* sums, int64_t lds) const {
    for (int64_t c = 0; c < columns; c += W)
      for (int64_t k = 0; k < count;) {
        const int64_t strip = strip_rows(count - k);
        int64_t first = panels, last = 0;
        for (int64_t i = 0; i * W < queries; ++i)
          if (ranges[i].first < k + strip && ranges[i].last > k) first = least(first, i), last = i + 1;
        const int64_t begin = first * W, end = least(last * W, queries);
        if (begin < end)
          strip_gemm<F, false, true>(
              strip, weights + k * ldp + begin, ldp, rows + begin * ld + c, ld, end - begin, sums + k * lds + c, lds);
        k += strip;
      }
  }
};

}  // namespace
