// Bias from small tables: entries by the distance of positions and by the bucket of a time difference.
//
// Positions: for queries at consecutive positions, the entries that a key takes lie side by side in a reversed table;
//   its ends are repeated a panel's width, so that clamping the first of them is enough. Gradients of a tile are sums
//   along its diagonals.
// Times: buckets rise with the difference, so that extremes of a panel's and a tile's times bound the buckets of all
//   their pairs, sorted or not. Far from the diagonal of sorted times that is one bucket or two: a pair's bucket takes
//   a comparison for each edge between, of the key's time and bounds that a query has. Where many edges are between
//   (times in any order), the leading bits of the difference as a float index where to search.
// All comparisons are of integers and exact, for times within 2^62.
// Both tables, B1 H4 N4096 P64, causal silu, float, two cores of a Zen 3, medians of three noisy runs over the time
//   without: sorted times in seconds 1.04 to 1.19 forward and 1.03 to 1.22 backward, in milliseconds 1.23 to 1.34 and
//   1.21 to 1.34; times in random order, whose lookups are gathers, 1.55 to 1.79 and 1.60 to 1.82.
#pragma once
#include "sparse_attention/cpu_attention_tiles.h"

namespace {

// base[i] of kLanes<T> indices.
template <class T>
static inline Vec<T> gather(const T* base, VecI i) {
  static_assert(sizeof(T) == 4);
#if defined(__AVX512F__)
  return (Vec<T>)_mm512_i32gather_epi32((__m512i)i, base, 4);
#elif defined(__AVX2__)
  return (Vec<T>)_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), (__m256i)i, 4);
#else
  Vec<T> x;
  for (int j = 0; j < kLanes<T>; ++j) x[j] = base[i[j]];
  return x;
#endif
}

struct TimeSpan {
  int64_t min = 0, max = 0;
};

template <class F>
class Tables {
  using I = typename IntOf<F>::type;
  static constexpr int V = kLanes<F>, W = kPanel<F>;
  static constexpr int kChain = 8;    // edges that are compared with one by one
  static constexpr int kMaxBits = 8;  // of a float's mantissa that the index takes

  struct Memory {
    F *position = nullptr, *time = nullptr;  // times the unit of logits
    int32_t *q_pos = nullptr, *k_pos = nullptr, *q_run = nullptr, *k_run = nullptr;  // run: consecutive ones from here
    int64_t *q_time = nullptr, *k_time = nullptr, *edges = nullptr;
    int32_t *narrow_edges = nullptr, *bucket = nullptr, *index = nullptr;
    Memory(const AttnArgs& a, Scratch& scratch) {
      if (a.position) {
        position = scratch.take<F>(a.position_heads * (a.positions + 2 * W));
        q_pos = scratch.take<int32_t>(a.q_len + W), k_pos = scratch.take<int32_t>(a.kv_len);
        q_run = scratch.take<int32_t>(a.q_len + W), k_run = scratch.take<int32_t>(a.kv_len);
      }
      if (a.time) {
        const int64_t padded = 3 * a.edge_count + 4;
        time = scratch.take<F>(a.time_heads * (a.edge_count + 1));
        q_time = scratch.take<int64_t>(a.q_len + W), k_time = scratch.take<int64_t>(a.kv_len);
        edges = scratch.take<int64_t>(padded), narrow_edges = scratch.take<int32_t>(padded);
        bucket = scratch.take<int32_t>(a.edge_count + 1), index = scratch.take<int32_t>(64 << kMaxBits);
      }
    }
    static int64_t bytes(const AttnArgs& a) {
      Scratch measure(0);
      Memory unused(a, measure);
      return measure.taken();
    }
  };

  const AttnArgs& a;
  Scratch scratch;
  const Memory m;
  const int64_t reach;
  int64_t edge_count = 0;  // of edges that tell differences apart: above 1, unlike, within the times' span
  int shift = 0, steps = 0;

 public:
  Tables(const AttnArgs& args, F unit)
      : a(args), scratch(Memory::bytes(args)), m(args, scratch), reach((args.positions - 1) / 2) {
    if (a.position) prepare_positions(unit);
    if (a.time) prepare_times(unit);
  }

  int64_t time_entries() const { return edge_count + 1; }
  int64_t bucket(int64_t entry) const { return m.bucket[entry]; }  // its column in time_table

  TimeSpan span(int64_t k0, int64_t keys) const { return a.time ? extremes(m.k_time + k0, keys) : TimeSpan{}; }

  void add_positions(F* s, int64_t ld, KeyRange range, int64_t h, int64_t q, int64_t k0) const {
    const F* table = m.position + (a.position_heads == 1 ? 0 : h) * (a.positions + 2 * W) + W;
    const int64_t last = a.positions - 1;
    const bool consecutive = m.q_run[q] >= W;
    for (int64_t k = range.first; k < range.last; ++k) {
      const int64_t key = reach - m.k_pos[k0 + k];
      alignas(64) F lanes[W];
      const F* from = lanes;
      if (consecutive) from = table + clamp(key + m.q_pos[q], -W, last);
      else
        for (int i = 0; i < W; ++i) lanes[i] = table[clamp(key + m.q_pos[q + i], 0, last)];
      for (int v = 0; v < 2; ++v) store(s + k * ld + v * V, load(s + k * ld + v * V) + load(from + v * V));
    }
  }

  void add_times(F* s, int64_t ld, KeyRange range, int64_t h, int64_t q, int64_t k0, TimeSpan keys) const {
    const F* table = m.time + (a.time_heads == 1 ? 0 : h) * (a.edge_count + 1);
    const Panel panel(*this, q, keys);
    const int64_t* times = m.k_time + k0;
    if (!panel.chained) {
      return search(panel, times, range, [&](int64_t k, const int32_t* found) {
        for (int v = 0; v < 2; ++v) {
          Vec<F> x{};
          if constexpr (sizeof(F) == 4) x = gather(table, load(found + v * V));
          else
            for (int i = 0; i < V; ++i) x[i] = table[found[v * V + i]];
          store(s + k * ld + v * V, load(s + k * ld + v * V) + x);
        }
      });
    }
    table += panel.low;
    for (int64_t k = range.first; k < range.last; ++k)
      for (int v = 0; v < 2; ++v) {
        Vec<F> x = splat(table[0]);
        for (int e = 0; e < panel.edges; ++e) x = panel.reaches(times[k], e, v) ? splat(table[e + 1]) : x;
        store(s + k * ld + v * V, load(s + k * ld + v * V) + x);
      }
  }

  // sums[clamped distance] += ds of a tile, [key][ld], 0 in all columns from `rows` on; ld leaves V of these.
  void sum_positions(const F* ds, int64_t ld, int64_t q0, int64_t rows, int64_t k0, int64_t keys, F* sums) const {
    const int32_t *q = m.q_pos + q0, *k = m.k_pos + k0;
    const int64_t last = a.positions - 1;
    if (m.q_run[q0] < rows || m.k_run[k0] < keys) {
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t i = 0; i < rows; ++i)
          if (const F x = ds[j * ld + i]; x != 0) sums[clamp(reach + k[j] - int64_t(q[i]), 0, last)] += x;
      return;
    }
    for (int64_t d = -round_up(keys - 1, V); d < rows; d += V) {  // V diagonals at a time: query = key + d
      int64_t j = most(0, 1 - d - V);
      const int64_t end = least(keys, rows - d);
      Vec<F> total[4] = {};
      for (; j + 4 <= end; j += 4)
        for (int u = 0; u < 4; ++u) total[u] += load(ds + (j + u) * (ld + 1) + d);
      for (; j < end; ++j) total[0] += load(ds + j * (ld + 1) + d);
      total[0] = (total[0] + total[1]) + (total[2] + total[3]);
      const int64_t entry = reach + k[0] - int64_t(q[0]) - d;
      for (int i = 0; i < V; ++i) sums[clamp(entry - i, 0, last)] += total[0][i];
    }
  }

  // sums[entry][lane] += ds of a panel.
  void sum_times(const F* ds, int64_t ld, KeyRange range, int64_t q, int64_t k0, TimeSpan keys, F* sums) const {
    const Panel panel(*this, q, keys);
    const int64_t* times = m.k_time + k0;
    if (!panel.chained)
      return search(panel, times, range, [&](int64_t k, const int32_t* found) {
        for (int i = 0; i < W; ++i) sums[int64_t(found[i]) * W + i] += ds[k * ld + i];
      });
    for (int e = 0; e <= panel.edges; ++e)
      for (int v = 0; v < 2; ++v) {
        Vec<F> total{};
        for (int64_t k = range.first; k < range.last; ++k) {
          Vec<F> x = load(ds + k * ld + v * V);
          if (e > 0) x = panel.reaches(times[k], e - 1, v) ? x : Vec<F>{};
          if (e < panel.edges) x = panel.reaches(times[k], e, v) ? Vec<F>{} : x;
          total += x;
        }
        F* to = sums + (panel.low + e) * W + v * V;
        store(to, load(to) + total);
      }
  }

 private:
  static int64_t clamp(int64_t x, int64_t low, int64_t high) { return most(low, least(x, high)); }

  static TimeSpan extremes(const int64_t* times, int64_t count) {
    TimeSpan span{times[0], times[0]};
    for (int64_t i = 0; i < count; ++i) span.min = least(span.min, times[i]), span.max = most(span.max, times[i]);
    return span;
  }

  // The times of W queries beside those of a tile's keys. Of float, numbers compared are 32 bits: differences to the
  // first key's time, those of the queries saturated.
  struct Panel {
    int64_t low, high, base;  // entries that occur
    int edges;                // between them
    bool chained, narrow, before;  // narrow: all differences are less than 2^31; before: a query may precede a key
    const int64_t* q;
    alignas(64) I under[kChain][W], over[kChain][W];

    Panel(const Tables& t, int64_t query, TimeSpan k) : base(k.min), q(t.m.q_time + query) {
      const TimeSpan mine = extremes(q, W);
      const int64_t nearest = most(0, most(mine.min - k.max, k.min - mine.max));
      const int64_t farthest = most(mine.max - k.min, k.max - mine.min);
      low = t.entry(nearest), high = farthest == nearest ? low : t.entry(farthest);
      edges = int(least(high - low, kChain + 1)), before = mine.min < k.max;
      narrow = most(mine.max, k.max) - least(mine.min, k.min) < INT32_MAX;
      chained = edges == 0 || (edges <= kChain && (sizeof(I) == 8 || k.max - k.min < INT32_MAX));
      for (int e = 0; chained && e < edges; ++e)
        for (int i = 0; i < W; ++i) {
          const int64_t edge = t.m.edges[low + e], at = q[i] - base;
          under[e][i] = saturated(at - edge), over[e][i] = saturated(at + edge);
        }
    }
    static I saturated(int64_t x) { return I(sizeof(I) == 8 ? x : clamp(x, INT32_MIN, INT32_MAX)); }

    // Whether the difference to each of V queries is that of the edge or more.
    VecInt<F> reaches(int64_t time, int e, int v) const {
      const VecInt<F> key = I(time - base) - VecInt<F>{};
      const VecInt<F> after = key <= load_int(under[e] + v * V);
      return before ? after | (key >= load_int(over[e] + v * V)) : after;
    }
    static VecInt<F> load_int(const I* p) {
      VecInt<F> x;
      __builtin_memcpy(&x, p, sizeof x);
      return x;
    }
  };

  // body(key, the entries of W queries) for each key.
  template <class Body>
  void search(const Panel& panel, const int64_t* times, KeyRange range, const Body& body) const {
    constexpr int L = kLanes<int32_t>;
    alignas(64) int32_t q[W], found[W];
    for (int i = 0; i < W; ++i) q[i] = int32_t(panel.q[i] - panel.base);
    for (int64_t k = range.first; k < range.last; ++k) {
      const int32_t key = int32_t(times[k] - panel.base);
      for (int i = 0; panel.narrow && i < W; i += L) {
        const VecI difference = load(q + i) - key, apart = difference < 0 ? -difference : difference;
        const VecF x = __builtin_convertvector(apart < 1 ? apart + 1 : apart, VecF);
        VecI at = gather(m.index, ((VecI)x - 0x3f800000) >> shift);
        for (int32_t step = 1 << steps >> 1; step; step >>= 1)
          at += gather(m.narrow_edges, at + (step - 1)) <= apart ? splat(step) : VecI{};
        store(found + i, at);
      }
      for (int i = 0; !panel.narrow && i < W; ++i)
        found[i] = int32_t(entry(panel.q[i] < times[k] ? times[k] - panel.q[i] : panel.q[i] - times[k]));
      body(k, found);
    }
  }

  // Exponent and first bits of the mantissa of a difference: rises with it.
  int32_t leading(int64_t apart) const {
    const float x = float(most(apart, 1));
    int32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return (bits - 0x3f800000) >> shift;
  }

  int64_t entry(int64_t apart) const {
    int32_t found = m.index[leading(apart)];
    for (int32_t step = 1 << steps >> 1; step; step >>= 1) found += m.edges[found + step - 1] <= apart ? step : 0;
    return found;
  }

  template <class N>
  static void copy(const AttnTensor& from, int64_t count, N* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<const N*>(from.data)[i * from.s[0]];
  }
  static void find_runs(const int32_t* positions, int64_t count, int32_t* runs) {
    for (int64_t i = count - 1; i >= 0; --i)
      runs[i] = i + 1 < count && positions[i + 1] == int64_t(positions[i]) + 1 ? runs[i + 1] + 1 : 1;
  }

  void prepare_positions(F unit) {
    for (int64_t h = 0; h < a.position_heads; ++h) {
      F* to = m.position + h * (a.positions + 2 * W);
      const F* from = static_cast<const F*>(a.position.data) + h * a.position.s[0];
      for (int64_t x = -W; x < a.positions + W; ++x)
        to[W + x] = from[clamp(a.positions - 1 - x, 0, a.positions - 1) * a.position.s[1]] * unit;
    }
    copy(a.q_pos, a.q_len, m.q_pos), copy(a.k_pos, a.kv_len, m.k_pos);
    for (int64_t i = a.q_len; i < a.q_len + W; ++i) m.q_pos[i] = int32_t(uint32_t(m.q_pos[i - 1]) + 1);
    find_runs(m.q_pos, a.q_len + W, m.q_run), find_runs(m.k_pos, a.kv_len, m.k_run);
  }

  void prepare_times(F unit) {
    copy(a.q_time, a.q_len, m.q_time), copy(a.k_time, a.kv_len, m.k_time);
    for (int64_t i = 0; i < W; ++i) m.q_time[a.q_len + i] = m.q_time[a.q_len - 1];
    const TimeSpan q = extremes(m.q_time, a.q_len), k = extremes(m.k_time, a.kv_len);
    const int64_t farthest = most(q.max - k.min, k.max - q.min);
    m.bucket[0] = 0;
    for (int64_t i = 0; i < a.edge_count; ++i) {
      const int64_t edge = static_cast<const int64_t*>(a.edges.data)[i * a.edges.s[0]];
      if (edge > most(farthest, 1)) break;
      if (edge > 1 && (edge_count == 0 || edge > m.edges[edge_count - 1])) m.edges[edge_count++] = edge;
      m.bucket[edge_count] = int32_t(i + 1);
    }
    for (int64_t h = 0; h < a.time_heads; ++h)
      for (int64_t i = 0; i <= edge_count; ++i)
        m.time[h * (a.edge_count + 1) + i] =
            static_cast<const F*>(a.time.data)[h * a.time.s[0] + m.bucket[i] * a.time.s[1]] * unit;
    // As few bits as tell all edges apart, if there are such.
    int64_t crowd = 0;  // most edges of one index
    for (int bits = 2; bits <= kMaxBits; ++bits) {
      shift = 23 - bits, crowd = 0;
      for (int64_t i = 0, alike = 0; i < edge_count; ++i) {
        alike = i > 0 && leading(m.edges[i]) == leading(m.edges[i - 1]) ? alike + 1 : 1;
        crowd = most(crowd, alike);
      }
      if (crowd <= 1) break;
    }
    while (1 << steps <= crowd) ++steps;
    if (crowd == 0) steps = 0;
    for (int64_t i = 0; i < 1 << steps; ++i) m.edges[edge_count + i] = INT64_MAX;
    for (int64_t i = 0; i < edge_count + (1 << steps); ++i) m.narrow_edges[i] = int32_t(least(m.edges[i], INT32_MAX));
    int64_t before = 0;
    for (int32_t i = 0; i < 64 << (23 - shift); ++i) {
      while (before < edge_count && leading(m.edges[before]) < i) ++before;
      m.index[i] = int32_t(before);
    }
  }
};

}  // namespace
