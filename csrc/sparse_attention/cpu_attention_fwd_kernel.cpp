// Forward of sparse_attention: tiles of a plan, online softmax.
//
// Bound: multiply-adds, P + Pv a visible (query, key) pair. The products run at what the units can do (98 Gflop/s a
//   core of a Zen 3); softmax and packing are a quarter of the time at P = 64, evaluating masks 1 %.
//   B1 H4 N4096 P64, causal and window 256, two cores: 5.8 ms of products, 8.8 in all; dense causal attention of torch
//   73 ms. Of a Sapphire Rapids: 6.0 ms, dense 44, flex_attention compiled 16. bfloat16: cpu_attention_amx.h.
// Work: items (b, key head, query tile, head of the group), in stretches of one thread each: the keys of a window, read
//   for five query tiles, stay in its L2. Tile by tile over all heads, the next to whoever was free, took 1.16 times as
//   long for B8 H8 N1024, 1.02 to 1.05 for others; at N = 65,536 outputs in memory that had been written before took
//   1.07 times 16 times as long as at 4,096, now 1.00. That of fresh memory, cleared by the system, is 6 % more.
//   The last tiles of a sequence come first: under a causal mask these are the longest.
// A tile of keys goes through all panels of the query tile (W = 2 vectors of queries as lanes): keys and values stay in
//   L1 or L2 and are read as they lie. Of a partial tile a panel takes the keys from the first to the last that it
//   sees: its granularity is W queries by one key, whatever the block of the plan.
// A panel of one vector of queries or fewer is multiplied as that: 4 heads of 1,024 keys, P 64, float32, 16 queries
//   take 0.6 of the time, bfloat16 0.7.
// In registers: kRows x W scores or outputs during a product; a panel's scores (4 KiB), maxima, sums and outputs in L1.
// Blocks, forward and backward in ms: (64, 64) 9.1 21.6, (128, 64) 9.4 22.5, (64, 128) 8.7 22.5, (128, 128) 9.6 24.1,
//   (32, 64) 10.3 24.8, (64, 32) 10.5 24.1.
#include <type_traits>

#include "sparse_attention/cpu_attention_amx.h"
#include "sparse_attention/cpu_attention_scores.h"

namespace {

template <class T, class P>
struct Forward {
  using F = Compute<T>;
  static constexpr int V = kLanes<F>, W = kPanel<F>;
  const AttnArgs& a;
  const Logits<F> logits;
  const P products;
  const int64_t q_tiles, panels, out_rows;
  const F scale;  // of plain scores, applied here

  explicit Forward(const AttnArgs& args)
      : a(args), logits(args), products(args, false), q_tiles(ceil_div(args.q_len, args.block_q)),
        panels(ceil_div(args.block_q, W)), out_rows(P::padded(args.value_dim)),
        scale(logits.plain && !args.silu ? F(logits.factor()) : F(1)) {}

  struct Buffers {
    typename P::Memory operands;
    F *out, *max, *sum, *s;
    MaskWord *words, *stack;
    explicit Buffers(const Forward& f, Scratch& scratch) : operands(f.products, scratch) {
      const AttnArgs& a = f.a;
      out = scratch.take<F>(f.panels * W * f.out_rows);
      max = scratch.take<F>(f.panels * W), sum = scratch.take<F>(f.panels * W);
      s = scratch.take<F>(P::kTogether * a.block_k * W);
      words = scratch.take<MaskWord>(a.block_k * ceil_div(a.block_q, 64));
      stack = scratch.take<MaskWord>(a.mask_depth * kMaskBlock);
    }
  };

  // Logits become 2^(s - max), 0 where masked; maxima, sums and outputs follow. Of the panel's two vectors of queries,
  // N: a panel of one vector's queries or fewer has nothing in its second.
  template <bool kPartial, int N>
  void softmax(F* s, KeyRange range, const TileBits& bits, int64_t query, F* max, F* sum, F* out,
               typename P::Words words) const {
    Vec<F> old[N], top[N], total[N], shift[N], factor[N];
    for (int v = 0; v < N; ++v) old[v] = top[v] = load(max + v * V), total[v] = load(sum + v * V);
    for (int64_t k = range.first; k < range.last; ++k) {
      const uint64_t seen = kPartial ? bits.panel<W>(k, query) : 0;
      for (int v = 0; v < N; ++v) {
        Vec<F> x = P::kScaled ? load(s + k * W + v * V) : load(s + k * W + v * V) * scale;
        if constexpr (kPartial) {
          x = lane_mask<F>(seen >> v * V) ? x : splat(-kInfinity<F>);
          store(s + k * W + v * V, x);
        }
        top[v] = top[v] < x ? x : top[v];
      }
    }
    bool changed = false;
    for (int v = 0; v < N; ++v) {
      shift[v] = top[v] == -kInfinity<F> ? Vec<F>{} : top[v];
      const auto rose = top[v] > old[v];
      for (int i = 0; i < V; ++i) changed |= rose[i] != 0;
    }
    if (changed) {
      for (int v = 0; v < N; ++v) {
        factor[v] = exp2_of_nonpositive(old[v] - shift[v]);
        total[v] *= factor[v];
        store(max + v * V, top[v]);
      }
      for (int64_t j = 0; j < a.value_dim; ++j)
        for (int v = 0; v < N; ++v) store(out + j * W + v * V, load(out + j * W + v * V) * factor[v]);
    }
    P::template weigh<N>(range, s, words, [&](int64_t k, int v) {
      const Vec<F> x = load(s + k * W + v * V);
      const Vec<F> p = exp2_of_nonpositive((kPartial || P::kScaled ? x : x * scale) - shift[v]);
      total[v] += p;
      return p;
    });
    for (int v = 0; v < N; ++v) store(sum + v * V, total[v]);
  }

  template <int N>
  void silu(F* s, KeyRange range, const TileBits& bits, int64_t query, typename P::Words words) const {
    const F norm = F(a.norm);
    P::template weigh<N>(range, s, words, [&](int64_t k, int v) {
      const uint64_t seen = bits.partial ? bits.panel<W>(k, query) : ~uint64_t(0);
      const Vec<F> p = siluv(load(s + k * W + v * V)) * norm;
      return lane_mask<F>(seen >> v * V) ? p : Vec<F>{};
    });
  }

  // Sums become outputs and lse.
  void finish(const Buffers& m, int64_t b, int64_t h, int64_t q0, int64_t rows) const {
    for (int64_t i = 0; i < rows; i += W) {
      F factors[W] = {};
      const int64_t here = least(W, rows - i);
      for (int64_t r = 0; r < here; ++r) {
        double lse = 0;
        factors[r] = F(1);
        if (!a.silu) {
          double max = m.max[i + r], sum = m.sum[i + r], fade = 1;
          if (a.sinks) {
            const double sink = element<double>(a.sinks, h * a.sinks_stride, a.wide_lse ? kF64 : kF32) * kLog2e;
            const double top = max < sink ? sink : max;
            if (top > -__builtin_inf()) {
              fade = __builtin_exp2(max - top);
              sum = sum * fade + __builtin_exp2(sink - top), max = top;
            }
          }
          const bool empty = sum == 0;
          factors[r] = empty ? F(0) : F(fade / sum);
          lse = empty ? -__builtin_inf() : max * kLn2 + __builtin_log(sum);
        }
        const int64_t to = b * a.lse.s[0] + h * a.lse.s[1] + (q0 + i + r) * a.lse.s[2];
        if (a.wide_lse) static_cast<double*>(a.lse.data)[to] = lse;
        else static_cast<float*>(a.lse.data)[to] = float(lse);
      }
      unpack_panel<T, F>(
          m.out + i * out_rows, here, a.value_dim, factors, at<T>(a.out, b, h, q0 + i), a.out.s[2], a.out.s[3]);
    }
  }

  void tile(Buffers& m, const Place& at, int64_t k0, bool partial) const {
    const int64_t keys = least(a.block_k, a.kv_len - k0);
    products.load_keys(m.operands, at, k0, keys, partial);
    TileBits bits{m.words, ceil_div(a.block_q, 64), partial};
    if (partial) fill_bits(a, bits, at.b, at.h, at.q0, at.rows, k0, keys, m.stack);
    const TimeSpan times = logits.tables.span(k0, keys);
    KeyRange ranges[P::kTogether];
    for (int64_t first = 0; first < at.rows; first += P::kTogether * W) {
      const auto each = [&](const auto& body) {  // of the panels that see a key
        for (int64_t i = first, j = 0; i < least(first + P::kTogether * W, at.rows); i += W, ++j)
          if (ranges[j].first < ranges[j].last) body(i, ranges[j], m.s + j * a.block_k * W);
      };
      for (int64_t j = 0; j < P::kTogether; ++j) ranges[j] = key_range<W>(bits, keys, first + j * W);
      const auto vectors = [&](int64_t i, const auto& body) {  // of queries that the panel has
        if (at.rows - i <= V) body(std::integral_constant<int, 1>{});
        else body(std::integral_constant<int, 2>{});
      };
      each([&](int64_t i, KeyRange range, F* s) {
        vectors(i, [&](auto n) { products.template scores<n>(m.operands, i, range, s, W); });
      });
      each([&](int64_t i, KeyRange range, F* s) {
        if (!P::kScaled && (!logits.plain || a.silu)) logits.scale(s, W, range);
        if (!logits.plain)
          logits.finish(s, W, range, at.b, at.h, at.q0 + i, least(W, at.rows - i), k0, times, nullptr);
        const auto words = products.words(m.operands, i);
        F *max = m.max + i, *sum = m.sum + i, *out = m.out + i * out_rows;
        vectors(i, [&](auto n) {
          if (a.silu) silu<n>(s, range, bits, i, words);
          else if (partial) softmax<true, n>(s, range, bits, i, max, sum, out, words);
          else softmax<false, n>(s, range, bits, i, max, sum, out, words);
        });
      });
      each([&](int64_t i, KeyRange range, F* s) {
        vectors(i, [&](auto n) {
          products.template add_values<n>(m.operands, i, range, bits, s, m.out + i * out_rows);
        });
      });
    }
  }

  void item(int64_t index, Buffers& m) const {
    const int64_t group = a.heads / a.kv_heads, rest = index / group;
    const int64_t i = q_tiles - 1 - rest % q_tiles, bkv = rest / q_tiles;
    const int64_t q0 = i * a.block_q, h = bkv % a.kv_heads * group + index % group;
    const Place at{bkv / a.kv_heads, h, q0, least(a.block_q, a.q_len - q0), false, false};
    products.load_queries(m.operands, at, F(logits.factor()));
    for (int64_t j = 0; j < round_up(at.rows, W) * out_rows; ++j) m.out[j] = 0;
    for (int64_t j = 0; j < round_up(at.rows, W); ++j) m.max[j] = -kInfinity<F>, m.sum[j] = 0;
    const KeyRange runs = runs_of(a, at.b, at.h, i);
    for (int64_t r = runs.first; r < runs.last; ++r) {
      const int32_t* run = a.runs + 3 * r;
      for (int64_t j = run[0]; j < run[0] + run[1]; ++j) tile(m, at, j * a.block_k, run[2] != 0);
    }
    finish(m, at.b, at.h, at.q0, at.rows);
  }

  void run() const {
    for_items(q_tiles * a.batch * a.heads, worth_threads(a), [&](Scratch& scratch) { return Buffers(*this, scratch); },
              [&](int64_t index, Buffers& m) { item(index, m); });
  }
};

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void attention_fwd(const AttnArgs& a) {
#if defined(__AVX512F__)
  if (in_tiles(a)) return Forward<bf16, TileProducts>(a).run();
#endif
  for_dtype(a.dtype, [&](auto type) { Forward<decltype(type), Products<decltype(type)>>(a).run(); });
}

void attention_mask(const AttnArgs& a, bool* to) {
  Scratch scratch(a.mask_depth * kMaskBlock * int64_t(sizeof(MaskWord)));
  MaskWord* stack = scratch.take<MaskWord>(a.mask_depth * kMaskBlock);
  for (int64_t i = 0; i < a.batch * a.heads; ++i, to += a.q_len * a.kv_len)
    for (int64_t q0 = 0; q0 < a.q_len; q0 += 64)
      for (int64_t k0 = 0; k0 < a.kv_len; k0 += 64) {
        evaluate_mask(a.code, i / a.heads, i % a.heads, q0, k0, stack);
        for (int64_t q = q0; q < least(q0 + 64, a.q_len); ++q)
          for (int64_t k = k0; k < least(k0 + 64, a.kv_len); ++k)
            to[q * a.kv_len + k] = stack[q - q0] >> (k - k0) & 1;
      }
}

}  // namespace scalekern::SCALEKERN_ISA
