// Backward of sparse_attention in one pass: five products a tile.
//
//   S^T = K Q^T   P = exp(S - lse)   dP^T = V dO^T   dS = P (dP - delta)
//   dQ^T += K^T dS^T   dV += P^T dO   dK += dS^T Q
//
// Bound: multiply-adds, 3 P + 2 Pv a visible (query, key) pair. B1 H4 N4096 P64, causal and window 256, two cores of a
//   Zen 3: 14.5 ms of products, 21 in all; the backward of torch's dense causal attention 190. Of a Sapphire Rapids: 14
//   in all, dense 104.
// Work: query tile by query tile, so queries are packed once and dq stays in L1; dk and dv are added to in memory.
//   Items are (split of the query tiles, b, key head). A split's sums are its own, unless it alone adds to a tile of
//   keys (cpu_attention_bwd_sums.h), and are added up in order afterwards: the result is the same bits for any number
//   of threads. The alternative, one pass over query tiles for dq and another over key tiles for dk and dv, takes seven
//   products instead of five.
//   Where dbias is summed over batches or heads, an item walks these in order; it may hold a partial sum of its own.
// A query tile's P^T and dS^T lie [key][query] in L1 or L2, so that they serve dV and dK as they are.
// delta = dO . O, and O may be rounded to a half: where one key has most of a row's weight, dP - delta cancels and that
//   error is all of dS (bfloat16, weights of 0.97 on average: dq off by 4 %, of 0.998 by 16 %, as in
//   scaled_dot_product_attention). But sum_j dS_ij is known, 0 without sinks and dlse: what it is instead is the error
//   of delta, and P times it repairs dS, in another visit to the tiles of a query tile that needs it, at 4 of 5
//   products. Visiting all of them first for an exact delta would cost each call 2 products of 7.
#include "sparse_attention/cpu_attention_amx.h"
#include "sparse_attention/cpu_attention_bwd_sums.h"
#include "sparse_attention/cpu_attention_scores.h"

namespace {

template <class T, class P>
struct Backward {
  using F = Compute<T>;
  static constexpr int V = kLanes<F>, W = kPanel<F>;
  static constexpr bool kHalves = sizeof(T) == 2;
  const AttnArgs& a;
  const Logits<F> logits;
  const P products;
  const int64_t panels, group, ldk, ldv, ldp, dq_rows;
  const F scale;  // of plain scores, applied here
  const Sums<T> all;
  explicit Backward(const AttnArgs& args)
      : a(args), logits(args), products(args, true), panels(products.panels), group(products.group), ldk(products.ldk),
        ldv(products.ldv), ldp(products.ldp), dq_rows(P::padded(args.dim)),
        scale(logits.plain && !args.silu ? F(logits.factor()) : F(1)),
        all(args, logits.tables, ldk, ldv) {}

  struct Buffers {
    typename P::Memory operands;
    F *dq, *lse, *delta, *p, *ds, *slopes;
    F *sums, *slope_squares, *weight_squares;  // of each query's dS and P, where delta may need repair
    KeyRange* ranges;  // of each panel
    bool* begun;       // of a tile of keys, whether its sums have been cleared
    MaskWord *words, *stack;
    explicit Buffers(const Backward& f, Scratch& scratch) : operands(f.products, scratch) {
      const AttnArgs& a = f.a;
      const int64_t queries = f.panels * W;
      dq = scratch.take<F>(queries * f.dq_rows);
      lse = scratch.take<F>(queries), delta = scratch.take<F>(queries);
      p = scratch.take<F>(a.block_k * f.ldp), ds = scratch.take<F>(a.block_k * f.ldp);
      slopes = a.softcap ? scratch.take<F>(a.block_k * f.ldp) : nullptr;
      sums = scratch.take<F>(queries), slope_squares = scratch.take<F>(queries);
      weight_squares = scratch.take<F>(queries);
      ranges = scratch.take<KeyRange>(f.panels), begun = scratch.take<bool>(ceil_div(a.kv_len, a.block_k));
      words = scratch.take<MaskWord>(a.block_k * ceil_div(a.block_q, 64));
      stack = scratch.take<MaskWord>(a.mask_depth * kMaskBlock);
    }
  };

  // Logits and dP become P and dS for one panel. Repairing, dP is left out and P, which has been used, becomes 0.
  void scores(const Buffers& m, KeyRange range, const TileBits& bits, int64_t i, bool repairing) const {
    const F norm = F(a.norm);
    const Vec<F> shift[2] = {load(m.lse + i), load(m.lse + i + V)};
    const Vec<F> mean[2] = {load(m.delta + i), load(m.delta + i + V)};
    Vec<F> total[2] = {}, slope_squares[2] = {}, weight_squares[2] = {};
    for (int64_t k = range.first; k < range.last; ++k) {
      const uint64_t seen = bits.partial ? bits.panel<W>(k, i) : ~uint64_t(0);
      for (int v = 0; v < 2; ++v) {
        F *p_at = m.p + i + k * ldp + v * V, *ds_at = m.ds + i + k * ldp + v * V;
        const Vec<F> s = load(p_at), dp = repairing ? Vec<F>{} : load(ds_at);
        Vec<F> weight, slope;
        if (a.silu) {
          const Vec<F> gate = sigmoidv(s);
          weight = s * gate * norm;
          slope = dp * (gate * (1 + s * (1 - gate)) * norm);
        } else {
          weight = exp2_of_nonpositive((P::kScaled ? s : s * scale) - shift[v]);
          slope = weight * (dp - mean[v]);
        }
        if (bits.partial) {
          const VecInt<F> mask = lane_mask<F>(seen >> v * V);
          weight = mask ? weight : Vec<F>{}, slope = mask ? slope : Vec<F>{};
        }
        if constexpr (kHalves)
          total[v] += slope, slope_squares[v] += slope * slope, weight_squares[v] += weight * weight;
        store(p_at, repairing ? Vec<F>{} : weight), store(ds_at, slope);
      }
    }
    if constexpr (kHalves)
      for (int v = 0; v < 2; ++v) {
        const int64_t to = i + v * V;
        store(m.sums + to, load(m.sums + to) + total[v]);
        store(m.slope_squares + to, load(m.slope_squares + to) + slope_squares[v]);
        store(m.weight_squares + to, load(m.weight_squares + to) + weight_squares[v]);
      }
  }

  void add_bias_gradient(const AttnTensor& t, const Place& at, const F* ds, KeyRange range, int64_t query,
                         int64_t k0) const {
    for (int64_t i = query; i < least(query + W, at.rows); ++i) {
      F* to = static_cast<F*>(t.data) + at.b * t.s[0] + at.h * t.s[1] + (at.q0 + i) * t.s[2] + k0 * t.s[3];
      for (int64_t k = range.first; k < range.last; ++k) to[k * t.s[3]] += ds[k * ldp + i];
    }
  }

  void add_table_gradients(F* ds, const KeyRange* ranges, const Place& at, const ItemSums<F>& sums, int64_t k0,
                           int64_t keys, TimeSpan times) const {
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t i = at.rows; i < ldp; ++i) ds[k * ldp + i] = 0;
    if (sums.position)
      logits.tables.sum_positions(ds, ldp, at.q0, at.rows, k0, keys, sums.position + at.h * all.position_stride);
    for (int64_t i = 0; sums.time && i < at.rows; i += W)
      if (ranges[i / W].first < ranges[i / W].last)
        logits.tables.sum_times(
            ds + i, ldp, ranges[i / W], at.q0 + i, k0, times, sums.time + at.h * all.time_stride);
  }

  // sums[key] += sum over queries of weights[key][query] rows[query], of visible pairs only, for keys [0, count).
  void add_keys_carefully(const F* weights, const F* rows, int64_t ld, int64_t columns, const TileBits& bits,
                          int64_t count, int64_t queries, F* sums, int64_t lds) const {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < queries; ++i)
        if (!bits.partial || (bits.words[k * bits.stride + i / 64] >> i % 64 & 1))
          for (int64_t c = 0; c < columns; ++c) sums[k * lds + c] += weights[k * ldp + i] * rows[i * ld + c];
  }

  // Keys that a panel does not see: products may have written theirs.
  void clear_beside(const Buffers& m, int64_t i, KeyRange range, int64_t keys) const {
    for (int64_t k = 0; k < keys; ++k) {
      if (k == range.first) k = range.last;
      if (k >= keys) return;
      for (int v = 0; v < 2; ++v) {
        const int64_t to = k * ldp + i + v * V;
        store(m.p + to, Vec<F>{}), store(m.ds + to, Vec<F>{});
        if (m.slopes) store(m.slopes + to, Vec<F>{});
      }
    }
  }

  // Products become P and dS, of one panel.
  void panel(const Buffers& m, const Place& at, const ItemSums<F>& sums, const TileBits& bits, KeyRange range,
             int64_t i, int64_t k0, TimeSpan times) const {
    F *p = m.p + i, *ds = m.ds + i, *slopes = m.slopes ? m.slopes + i : nullptr;
    if (!P::kScaled && (!logits.plain || a.silu)) logits.scale(p, ldp, range);
    if (!logits.plain)
      logits.finish(p, ldp, range, at.b, at.h, at.q0 + i, least(W, at.rows - i), k0, times, slopes);
    scores(m, range, bits, i, at.repairing);
    if (sums.dbias) add_bias_gradient(sums.dbias, at, m.ds, range, i, k0);
    for (int64_t k = range.first; slopes && k < range.last; ++k)
      for (int v = 0; v < 2; ++v) {
        F *to = ds + k * ldp + v * V, *slope = slopes + k * ldp + v * V;
        const Vec<F> x = load(to);  // 0 where masked, and the slope there may be NaN
        store(to, x == 0 ? x : x * load(slope)), store(slope, x);  // the tables' gradients are before the cap
      }
  }

  void tile(Buffers& m, const Place& at, const ItemSums<F>& sums, int64_t k0, bool partial) const {
    const int64_t keys = least(a.block_k, a.kv_len - k0);
    partial |= !P::kScaled && at.rows % W != 0;  // lanes past the end are multiplied too: they see nothing
    products.load_keys(m.operands, at, k0, keys, partial);
    TileBits bits{m.words, ceil_div(a.block_q, 64), partial};
    if (partial) fill_bits(a, bits, at.b, at.h, at.q0, at.rows, k0, keys, m.stack);
    const TimeSpan times = logits.tables.span(k0, keys);
    for (int64_t first = 0; first < at.rows; first += P::kTogether * W) {
      const auto each = [&](const auto& body) {
        for (int64_t i = first; i < least(first + P::kTogether * W, at.rows); i += W) body(i, m.ranges[i / W]);
      };
      each([&](int64_t i, KeyRange& range) {
        range = key_range<W>(bits, keys, i);
        if (range.first == range.last) return;
        products.scores(m.operands, i, range, m.p + i, ldp);
        if (!at.repairing) products.gradients_of_scores(m.operands, i, range, m.ds + i);
      });
      each([&](int64_t i, KeyRange range) {
        clear_beside(m, i, range, keys);
        if (range.first < range.last) panel(m, at, sums, bits, range, i, k0, times);
        products.load_weights(m.operands, i, range, m.p + i, m.ds + i, keys);
      });
      each([&](int64_t i, KeyRange range) {
        products.add_keys(m.operands, i, range, bits, m.ds + i, m.dq + i * dq_rows);
      });
    }
    if (sums.position || sums.time)
      add_table_gradients(m.slopes ? m.slopes : m.ds, m.ranges, at, sums, k0, keys, times);
    const int64_t index = k0 / a.block_k, kv = at.h / group;
    begin(m, sums, at.b, kv, index);
    const auto dk = all.dk.at(sums.slots[index], at.b, kv, index), dv = all.dv.at(sums.slots[index], at.b, kv, index);
    if (at.careful) {
      add_keys_carefully(m.p, m.operands.do_rows, ldv, a.value_dim, bits, keys, at.rows, dv.data, dv.stride);
      add_keys_carefully(m.ds, m.operands.q_rows, ldk, a.dim, bits, keys, at.rows, dk.data, dk.stride);
    } else {
      products.add_queries(m.operands, at, m.ranges, keys, m.p, m.ds, dv.data, dv.stride, dk.data, dk.stride);
    }
  }

  // Before an item adds to the gradients of a tile of keys.
  void begin(const Buffers& m, const ItemSums<F>& sums, int64_t b, int64_t kv, int64_t tile) const {
    if (m.begun[tile]) return;
    m.begun[tile] = true;
    all.dk.clear(sums.slots[tile], b, kv, tile), all.dv.clear(sums.slots[tile], b, kv, tile);
  }

  F number(const AttnTensor& t, const Place& at, int64_t r) const {  // of lse or dlse
    return element<F>(t.data, at.b * t.s[0] + at.h * t.s[1] + (at.q0 + r) * t.s[2], sizeof(F) == 8 ? kF64 : kF32);
  }

  F dot(const T* x, int64_t sx, const T* y, int64_t sy) const {
    Vec<F> sums{};
    int64_t c = 0;
    for (; sx == 1 && sy == 1 && c + V <= a.value_dim; c += V) sums += load_as<F>(x + c) * load_as<F>(y + c);
    F sum = 0;
    for (; c < a.value_dim; ++c) sum += F(to_float(x[c * sx])) * F(to_float(y[c * sy]));
    for (int i = 0; i < V; ++i) sum += sums[i];
    return sum;
  }

  // lse in base 2, delta; adds to the sink's gradient. Lanes past the end get p = 0.
  void row_terms(const Buffers& m, const Place& at, F* dsink) const {
    for (int64_t r = 0; r < round_up(at.rows, W); ++r) {
      m.lse[r] = kInfinity<F>, m.delta[r] = 0;
      if (r >= at.rows || a.silu) continue;
      const F lse = number(a.lse, at, r);
      const T *dout = ::at<T>(a.dout, at.b, at.h, at.q0 + r), *out = ::at<T>(a.out, at.b, at.h, at.q0 + r);
      F delta = dot(dout, a.dout.s[3], out, a.out.s[3]);
      if (a.dlse) delta -= number(a.dlse, at, r);
      m.lse[r] = lse * F(kLog2e), m.delta[r] = delta;
      *dsink -= sink_weight(at, lse) * delta;
    }
  }

  F sink_weight(const Place& at, F lse) const {
    if (!a.sinks) return 0;
    const double sink = element<double>(a.sinks, at.h * a.sinks_stride, sizeof(F) == 8 ? kF64 : kF32);
    return sink > -__builtin_inf() ? F(__builtin_exp(sink - double(lse))) : F(0);
  }

  // delta becomes the error that the sums of dS show; whether that is worth another visit. 3e-3 of dS, beside the
  // 2.4e-3 that rounding P, dS and gradients to bfloat16 costs, is met where a row's largest weight is a half on
  // average; float16 has three more digits. The sink's gradient, the sum of its weights times delta, is put right anyway:
  // where the rows' deltas cancel in it, it would be off by as much as there is.
  bool find_errors(const Buffers& m, const Place& at, F* dsink) const {
    F errors = 0, all = 0;
    for (int64_t r = 0; r < at.rows; ++r) {
      const F weight = sink_weight(at, number(a.lse, at, r));
      const F error = m.sums[r] - m.delta[r] * weight - (a.dlse ? number(a.dlse, at, r) : F(0));
      const F square = error * error * m.weight_squares[r], slopes = m.slope_squares[r];
      const bool finite = F(0) * square == 0 && F(0) * slopes == 0;  // another's NaN leaves a row its repair
      m.delta[r] = finite ? error : F(0);
      if (finite) errors += square, all += slopes, *dsink -= error * weight;
    }
    constexpr F kMost = __is_same(T, bf16) ? F(3e-3) : F(3e-3) / 8;
    return errors > kMost * kMost * all;
  }

  void query_tile(Buffers& m, Place at, const ItemSums<F>& sums, F* dsink) const {
    at.careful = !products.load_gradients(m.operands, at, F(logits.factor()));
    row_terms(m, at, dsink);
    for (int64_t j = 0; j < round_up(at.rows, W) * dq_rows; ++j) m.dq[j] = 0;
    if constexpr (kHalves)
      for (int64_t r = 0; r < round_up(at.rows, W); ++r) m.sums[r] = m.slope_squares[r] = m.weight_squares[r] = 0;
    const KeyRange runs = runs_of(a, at.b, at.h, at.q0 / a.block_q);
    const auto visit = [&] {
      for (int64_t r = runs.first; r < runs.last; ++r) {
        const int32_t* run = a.runs + 3 * r;
        for (int64_t j = run[0]; j < run[0] + run[1]; ++j) tile(m, at, sums, j * a.block_k, run[2] != 0);
      }
    };
    visit();
    at.repairing = kHalves && !a.silu && find_errors(m, at, dsink);
    if (at.repairing) visit();
    F factors[W];
    for (int i = 0; i < W; ++i) factors[i] = F(a.scale);
    for (int64_t i = 0; i < at.rows; i += W)
      unpack_panel<T, F>(m.dq + i * dq_rows, least(W, at.rows - i), a.dim, factors,
                         ::at<T>(a.dq, at.b, at.h, at.q0 + i), a.dq.s[2], a.dq.s[3]);
  }

  // One split of one (b, kv head), all of its query heads.
  void part(Buffers& m, const ItemSums<F>& sums, int64_t b, int64_t kv) const {
    const scalekern::AttnSplit& split = a.splits[sums.split];
    const int64_t tiles = ceil_div(a.kv_len, a.block_k);
    for (int64_t t = 0; t < tiles; ++t) m.begun[t] = sums.slots[t] == kNoSlot;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      F dsink = 0;
      for (int64_t i = split.begin; i < split.end; ++i) {
        const int64_t q0 = i * a.block_q;
        query_tile(m, {b, h, q0, least(a.block_q, a.q_len - q0), false, false}, sums, &dsink);
      }
      all.dsinks.data[(sums.split * a.batch + b) * a.heads + h] = dsink;
    }
    for (int64_t t = 0; t < tiles; ++t) begin(m, sums, b, kv, t);  // where other heads or batches add, and these do not
  }

  void run() const {
    for_items(
        all.items, worth_threads(a), [&](Scratch& scratch) { return Buffers(*this, scratch); },
        [&](int64_t index, Buffers& m) {
          const ItemSums<F> sums = all.item(index);
          for (int64_t b = sums.first_b; b < sums.last_b; ++b)
            for (int64_t kv = sums.first_kv; kv < sums.last_kv; ++kv) part(m, sums, b, kv);
        });
    all.join(P::kScaled ? F(1) : F(a.scale));
  }
};

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void attention_bwd(const AttnArgs& a) {
#if defined(__AVX512F__)
  if (in_tiles(a)) return Backward<bf16, TileProducts>(a).run();
#endif
  for_dtype(a.dtype, [&](auto type) { Backward<decltype(type), Products<decltype(type)>>(a).run(); });
}

}  // namespace scalekern::SCALEKERN_ISA
