// The products of forward and backward of bfloat16 in tile registers or words (common/tile_gemm.h), added up in float:
// what cpu_attention_products.h does with multiply-adds. P and dS are rounded to bfloat16 for theirs, as in
// FlashAttention.
//
//   S^T = K Q^T, dP^T = V dO^T          a: keys as they lie            b: words of queries, turned once a query tile
//   dV += P^T dO, dK += dS^T Q          a: P^T, dS^T, rounded          b: pairs of rows of queries, once a query tile
//   O^T += V^T P^T, dQ^T += K^T dS^T    a: V^T, K^T, made once a key   b: pairs of rows of P^T and dS^T
//
// Bound: 2 (5) products of 64 x 64 x 64 a pair of tiles, 430 (1080) ns at 2.4 GHz; forward, 660 with the loads and
//   stores of their sums. Softmax, at 9 to 10 cycles for 16 scores, takes as long again or longer. Measured: 2.9 us for
//   all of it, more than these since scores, weights, sums and operands (64 KB) do not fit in L1.
//   B1 H4 N4096 P64, causal and window 256, two cores of a Sapphire Rapids, forward and backward in ms: 3.0 and 6.2 (by
//   multiply-adds 6.7 and 16); causal 13 and 37 (38 and 91); torch's dense causal attention in bfloat16 17 and 80.
// V^T (K^T, backward) is a copy, whose tiles a thread makes when it visits a block, and keeps, 64 blocks and 512 KB of
//   them at most: query tiles beside each other see the same. One copy a head for all threads, B Hkv Lk Pv of fresh
//   memory, took 1.1 to 1.3 times as long forward for windows, 1.03 to 1.1 for causal masks, as long backward. A block
//   that is visited once, for one query tile of one head, is made in L1: 32 heads, 8,192 keys, 7 to 32 queries, 0.6 to
//   0.9 of the time.
// Two panels take turns in scores, weights and sums: 4 % less time than one after the other, since a tile is then not
//   loaded from what is still on its way to L1. Of other blocks than (64, 64), (64, 32) and (32, 64) lose 7 to 20 %,
//   (128, 64) 2 %, and 16 in the backward of a window.
// A tile of values of which one is not finite and that a query does not see whole is multiplied as floats, with care.
#pragma once
#include "sparse_attention/cpu_attention_products.h"

#if defined(__AVX512F__)
#include "common/tile_gemm.h"

namespace {

// Rows of bfloat16, and zeros up to whole steps of 32 rows and columns.
static Rows<bf16> half_rows(
    const AttnTensor& t, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t columns, bf16* to) {
  const bf16* from = at<bf16>(t, b, h, first);
  const int64_t wide = round_up(columns, 32);
  if (t.s[3] == 1 && rows % 32 == 0 && columns == wide) return {from, t.s[2]};
  for (int64_t r = 0; r < round_up(rows, 32); ++r) {
    bf16* row = to + r * wide;
    const int64_t here = r < rows ? columns : 0;
    if (t.s[3] == 1) __builtin_memcpy(row, from + r * t.s[2], size_t(here) * 2);
    for (int64_t c = t.s[3] == 1 ? here : 0; c < here; ++c) row[c] = from[r * t.s[2] + c * t.s[3]];
    __builtin_memset(row + here, 0, size_t(wide - here) * 2);
  }
  return {to, wide};
}

// Keys or values with channels as rows, an a: tiles [channel][32 keys] of a block of keys side by side. A thread's, who
// keeps those of the last blocks.
class Transposed {
  static constexpr int64_t kMost = 64, kBytes = 512 << 10;
  const AttnArgs& a;
  const AttnTensor& t;
  const int64_t columns, steps, size, count;
  bf16* const data;
  int64_t held[kMost];
  bool all_of[kMost];  // of it are finite

 public:
  Transposed(const AttnArgs& a, const AttnTensor& t, int64_t columns, Scratch& scratch)
      : a(a), t(t), columns(columns), steps(ceil_div(a.block_k, 32)), size(steps * round_up(columns, 32) * 32),
        count(a.q_len > a.block_q || a.heads > a.kv_heads ? most(1, least(kMost, kBytes / 2 / size)) : 1),
        data(scratch.take<bf16>(count * size)) {
    for (int64_t& index : held) index = -1;
  }

  // The block of keys from k0 on, and whether it is finite.
  TileOperand get(int64_t b, int64_t kv, int64_t k0, int64_t keys, bf16* space, bool& finite) {
    const int64_t block = k0 / a.block_k, index = (b * a.kv_heads + kv) * ceil_div(a.kv_len, a.block_k) + block;
    bf16* to = data + block % count * size;
    if (held[block % count] != index) {
      held[block % count] = index;
      const Rows<bf16> rows = half_rows(t, b, kv, k0, keys, columns, space);
      for (int64_t s = 0; s * 32 < keys; ++s)
        for (int64_t c = 0; c < columns; c += 32)
          transpose_numbers(rows.data + 32 * s * rows.stride + c, rows.stride, to + (c / 16 * steps + s) * 512,
                            steps * 512);
      all_of[block % count] = all_finite(rows.data, rows.stride, round_up(keys, 32), round_up(columns, 32));
    }
    finite = all_of[block % count];
    return {to, 64, steps * 1024, 1024};
  }
};

struct TileProducts {
  using T = bf16;
  using F = float;
  static constexpr int V = kLanes<F>, W = kPanel<F>;  // W: a step of a product over queries, two tiles of others
  static constexpr bool kScaled = false;
  static constexpr int kTogether = 2;  // a tile is not loaded from what is still on its way to L1
  const AttnArgs& a;
  const bool train;
  const int64_t panels, group, ldk, ldv, ldp, key_rows;

  TileProducts(const AttnArgs& args, bool train)
      : a(args), train(train), panels(ceil_div(args.block_q, W)), group(args.heads / args.kv_heads),
        ldk(round_up(args.dim, W)), ldv(round_up(args.value_dim, W)), ldp(panels * W + V),
        key_rows(round_up(args.block_k, 32)) {}
  static int64_t padded(int64_t columns) { return round_up(columns, 16); }

  struct Memory {
    Tiles tiles;
    uint32_t *q, *dout, *q_pairs, *do_pairs;  // [panel][pair of channels][W], [pair of queries][channel]
    uint32_t* pairs;                          // of P or dS, [panel][pair of keys][W]
    bf16 *p, *ds;                             // [key][query]
    bf16 *k, *v, *space;                      // where they have to be copied
    F *q_rows, *do_rows, *rows;               // where care is needed
    Rows<bf16> keys, values;
    Rows<F> careful;
    Transposed transposed;
    TileOperand turned;
    bool finite;
    Memory(const TileProducts& x, Scratch& scratch)
        : transposed(x.a, x.train ? x.a.k : x.a.v, x.train ? x.a.dim : x.a.value_dim, scratch) {
      const int64_t queries = x.panels * W, widest = most(x.ldk, x.ldv);
      const auto of_training = [&]<class N>(N*, int64_t count) -> N* {
        return x.train ? scratch.take<N>(count) : nullptr;
      };
      q = scratch.take<uint32_t>(queries * x.ldk / 2), dout = of_training(q, queries * x.ldv / 2);
      q_pairs = of_training(q, queries * x.ldk / 2), do_pairs = of_training(q, queries * x.ldv / 2);
      pairs = scratch.take<uint32_t>(x.key_rows * queries / 2);
      k = scratch.take<bf16>(x.key_rows * x.ldk), v = scratch.take<bf16>(x.key_rows * x.ldv);
      p = of_training(k, x.key_rows * queries), ds = of_training(k, x.key_rows * queries);
      space = scratch.take<bf16>(most(x.key_rows, queries) * widest);
      rows = scratch.take<F>(x.key_rows * widest);
      q_rows = of_training(rows, queries * x.ldk), do_rows = of_training(rows, queries * x.ldv);
    }
  };

  static TileOperand panel(const uint32_t* words, int64_t i, int64_t ld) {
    return {words + i * ld / 2, 4 * W, 64, 64 * W};
  }

  // Words of pairs of channels, by panel.
  static void turn(Rows<bf16> rows, int64_t count, int64_t ld, uint32_t* to) {
    for (int64_t i = 0; i < count; i += 16)
      for (int64_t c = 0; c < ld; c += 32)
        transpose_pairs(rows.data + i * rows.stride + c, rows.stride, to + i / W * W * ld / 2 + c / 2 * W + i % W, W);
  }

  void load_queries(Memory& m, const Place& at, F) const {
    turn(half_rows(a.q, at.b, at.h, at.q0, at.rows, a.dim, m.space), round_up(at.rows, W), ldk, m.q);
  }

  bool load_gradients(Memory& m, const Place& at, F) const {
    const int64_t lanes = round_up(at.rows, W);
    const auto load = [&](const AttnTensor& t, int64_t columns, int64_t ld, uint32_t* words, uint32_t* pairs) {
      const Rows<bf16> rows = half_rows(t, at.b, at.h, at.q0, at.rows, columns, m.space);
      turn(rows, lanes, ld, words);
      pair_rows(rows.data, rows.stride, lanes / 32, ld, pairs);
      return all_finite(rows.data, rows.stride, lanes, ld);
    };
    const bool q = load(a.q, a.dim, ldk, m.q, m.q_pairs), dout = load(a.dout, a.value_dim, ldv, m.dout, m.do_pairs);
    if (q && dout) return true;
    const auto copy = [&](const AttnTensor& t, int64_t columns, F* to, int64_t ld) {
      copy_rows<T, F>(::at<T>(t, at.b, at.h, at.q0), t.s[2], t.s[3], at.rows, columns, F(1), to, ld);
    };
    copy(a.q, a.dim, m.q_rows, ldk), copy(a.dout, a.value_dim, m.do_rows, ldv);
    return false;
  }

  void load_keys(Memory& m, const Place& at, int64_t k0, int64_t keys, bool partial) const {
    const int64_t kv = at.h / group;
    m.keys = half_rows(a.k, at.b, kv, k0, keys, a.dim, m.k);
    if (train) m.values = half_rows(a.v, at.b, kv, k0, keys, a.value_dim, m.v);
    m.turned = m.transposed.get(at.b, kv, k0, keys, m.space, m.finite);
    m.finite |= !partial;
    if (m.finite) return;
    m.careful = tile_rows<T, F>(train ? a.k : a.v, at.b, kv, k0, keys, train ? a.dim : a.value_dim, m.rows);
  }

  // Rows of `range` and those beside them in tiles of 16.
  template <int N>
  static void multiply(Rows<bf16> rows, KeyRange range, int64_t ld, const TileOperand& words, F* to, int64_t ldt) {
    const int64_t first = range.first / 16;
    tile_gemm<false>(ceil_div(range.last, 16) - first, N, ld / 32,
                     {rows.data + 16 * first * rows.stride, 2 * rows.stride, 32 * rows.stride, 64}, words,
                     to + 16 * first * ldt, ldt);
  }
  template <int N = 2>
  void scores(const Memory& m, int64_t i, KeyRange range, F* s, int64_t ld) const {
    multiply<N>(m.keys, range, ldk, panel(m.q, i, ldk), s, ld);
  }
  void gradients_of_scores(const Memory& m, int64_t i, KeyRange range, F* dp) const {
    multiply<2>(m.values, range, ldv, panel(m.dout, i, ldv), dp, ldp);
  }

  // Pairs of keys of weights, with zeros beside `range` in steps of 32; as floats where care is needed.
  using Words = uint32_t*;
  Words words(const Memory& m, int64_t i) const { return m.finite ? m.pairs + i * key_rows / 2 : nullptr; }
  template <int N = 2, class Weight>
  static void weigh(KeyRange range, F* s, Words words, const Weight& weight) {
    if (!words) return Products<T>::template weigh<N>(range, s, {}, weight);
    const auto pair = [&](int64_t k, bool low, bool high) {
      for (int v = 0; v < N; ++v)
        _mm512_storeu_si512(words + k / 2 * W + v * V,
                            pair_floats(low ? weight(k, v) : Vec<F>{}, high ? weight(k + 1, v) : Vec<F>{}));
    };
    int64_t k = range.first / 32 * 32;
    for (; k + 1 < range.first; k += 2) pair(k, false, false);
    if (k < range.first) pair(k, false, true), k += 2;
    for (; k + 1 < range.last; k += 2) pair(k, true, true);
    if (k < range.last) pair(k, true, false), k += 2;
    for (; k < round_up(range.last, 32); k += 2) pair(k, false, false);
  }

  // Of the backward; p and ds in rows, too, and 0 where the panel has no key.
  void load_weights(Memory& m, int64_t i, KeyRange range, const F* p, const F* ds, int64_t keys) const {
    const int64_t queries = panels * W;
    for (int64_t k = 0; k < round_up(keys, 16); ++k) {
      const bool inside = k >= range.first && k < range.last;
      const auto rounded = [&](const F* from) {
        from += k * ldp;
        return inside ? to_bf16((__m512)load(from), (__m512)load(from + V)) : _mm512_setzero_si512();
      };
      _mm512_storeu_si512(m.p + k * queries + i, rounded(p));
      _mm512_storeu_si512(m.ds + k * queries + i, rounded(ds));
    }
    if (Words to = words(m, i))
      weigh(range, nullptr, to, [&](int64_t k, int v) { return load(ds + k * ldp + v * V); });
  }

  // c [column][W] += rows^T weights
  template <int N>
  void sum_keys(const Memory& m, int64_t i, KeyRange range, const TileBits& bits, const F* weights, int64_t ld,
                int64_t columns, F* c) const {
    if (!m.finite) return add_rows<F, N>(m.careful, range, columns, weights, ld, c, bits, i, false);
    const int64_t first = range.first / 32, last = ceil_div(range.last, 32);
    tile_gemm<true>(ceil_div(columns, 16), N, last - first, m.turned.from(0, first),
                    {m.pairs + i * key_rows / 2 + 16 * first * W, 4 * W, 64, 64 * W}, c, W);
  }
  template <int N = 2>
  void add_values(const Memory& m, int64_t i, KeyRange range, const TileBits& bits, const F* p, F* out) const {
    sum_keys<N>(m, i, range, bits, p, W, a.value_dim, out);
  }
  void add_keys(const Memory& m, int64_t i, KeyRange range, const TileBits& bits, const F* ds, F* dq) const {
    if (range.first < range.last) sum_keys<2>(m, i, range, bits, ds, ldp, a.dim, dq);
  }

  void add_queries(const Memory& m, const Place& at, const KeyRange* ranges, int64_t count, const F*, const F*, F* dv,
                   int64_t lddv, F* dk, int64_t lddk) const {
    const int64_t queries = panels * W, blocks = ceil_div(count, 16);
    for (int64_t block = 0; block < blocks; block += 2) {
      int64_t first = panels, last = 0;
      for (int64_t i = 0; i * W < at.rows; ++i)
        if (ranges[i].first < 16 * block + 32 && ranges[i].last > 16 * block) first = least(first, i), last = i + 1;
      if (first >= last) continue;
      const auto sum = [&](const bf16* weights, const uint32_t* pairs, int64_t ld, int64_t columns, F* to,
                           int64_t ldt) {
        tile_gemm<true>(least(2, blocks - block), ceil_div(columns, 16), last - first,
                        {weights + 16 * block * queries + first * W, 2 * queries, 32 * queries, 64},
                        {pairs + 16 * first * ld, 4 * ld, 64, 64 * ld}, to + 16 * block * ldt, ldt);
      };
      sum(m.p, m.do_pairs, ldv, a.value_dim, dv, lddv);
      sum(m.ds, m.q_pairs, ldk, a.dim, dk, lddk);
    }
  }
};

// Blocks of keys of whole tiles: gradients of keys are added to 16 at a time, and a block is one thread's.
static inline bool in_tiles(const AttnArgs& a) {
  return a.dtype == kBf16 && a.block_k % 16 == 0 && scalekern::has_bf16();
}

}  // namespace

#endif
