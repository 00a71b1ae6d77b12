// The diagonal recurrence h_t = a_t h_{t-1} + b_t and its gradient, which is the same recurrence from the last token to
// the first: g_t = dh_t + c_t with c_{t-1} = conj(a_t) g_t, db_t = g_t, da_t = g_t conj(h_{t-1}).
//
// Bound: memory; forward three streams (two read, one written, which a cache reads first: four), backward five (seven).
// Split: lanes are elements that stand beside each other in memory (channels), and a thread takes as many of them as
//   give every thread some: it then reads whole runs of memory a token, its states in L1. Where time is contiguous,
//   lanes are rows, and a block of tokens is transposed in registers on its way in and out. Where there are too few rows
//   for that, lanes are spans of one row's time, and where there is too little beside time, threads take spans of it:
//   a first pass leaves each span's product of a and its end from a zero state, from which the states on entering the
//   spans follow; the second pass runs them (five streams instead of three). A product that is not finite is not used:
//   the span is run from its state. What is split and where depends on shapes and the level, never on threads.
// B1 L2048 D1024 fp32 on two cores of an AMD EPYC (AVX2): 0.7 ms into memory that is there, 1.3 with a fresh output, whose
//   pages the system clears; a loop over time 16, torch's associative scan 21. Prefetching ahead: 2.0 to 1.3 ms there.
//   On a Sapphire Rapids, output recycled, D1024 and D256: 2.2 and 0.6 ms without, 1.0 to 1.3 and 0.5 at 8 KB ahead,
//   0.8 to 1.0 and 0.3 to 0.4 at 0.5 to 2 KB (three streams of 8 KB are half of an L1); not the output's 2.2 and 0.7.
//   Past the caches, D1024 there by turns: 0.95 to 0.67 ms, with the backward 3.9 to 2.6; the op that reads the output
//   next loses what this wins forward (1.23 to 1.22 with `mul_`).
// Complex numbers lie in vectors as in memory, real and imaginary part beside each other; time-contiguous complex64 is
//   transposed as doubles.
#include "common/parallel.h"
#include "common/past_caches.h"
#include "common/tile.h"
#include "selective_scan/diag_scan.h"

namespace {

using scalekern::DiagScanArgs;
using scalekern::DiagScanTensor;

constexpr int64_t kAhead = 2048;         // bytes
constexpr int kSteps = 64;               // tokens of a transposed block: 2 KB a tensor with 8 lanes
constexpr int64_t kWidth = 1024;         // channels that a thread takes at a time
constexpr int64_t kThreads = 1 << 15;    // elements from which threads pay
constexpr int64_t kSpan = 256, kSpans = 8;  // tokens of a span at least; spans wanted of a call that has nothing else
constexpr int64_t kFewBytes = 256;       // beside time, below which threads share time

template <int W>
struct Pairs {};  // of a vector of complex numbers: real parts twice, imaginary parts twice, parts swapped
#define SCALEKERN_PAIRS(W, EVEN, ODD, SWAP)                                       \
  template <>                                                                     \
  struct Pairs<W> {                                                               \
    template <class V>                                                            \
    static inline V even(V v) { return __builtin_shufflevector EVEN; }            \
    template <class V>                                                            \
    static inline V odd(V v) { return __builtin_shufflevector ODD; }              \
    template <class V>                                                            \
    static inline V swap(V v) { return __builtin_shufflevector SWAP; }            \
  };
SCALEKERN_PAIRS(2, (v, v, 0, 0), (v, v, 1, 1), (v, v, 1, 0))
SCALEKERN_PAIRS(4, (v, v, 0, 0, 2, 2), (v, v, 1, 1, 3, 3), (v, v, 1, 0, 3, 2))
SCALEKERN_PAIRS(8, (v, v, 0, 0, 2, 2, 4, 4, 6, 6), (v, v, 1, 1, 3, 3, 5, 5, 7, 7), (v, v, 1, 0, 3, 2, 5, 4, 7, 6))
SCALEKERN_PAIRS(16, (v, v, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14),
                (v, v, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15),
                (v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#undef SCALEKERN_PAIRS

struct Stream {  // of one item: where it begins, and steps in elements
  char* p;
  int64_t time, lane;
};

struct Piece {  // a span of a sequence
  int64_t begin, end, sequence;
  bool opens, closes;  // its sequence
};

struct Cut {  // pieces that are lanes of one vector; one, where lanes are rows
  int64_t piece;
  int lanes;
};

struct Plan {  // for a range of lanes
  int64_t lane, lanes, width;
  bool direct, in_time, split;
  Piece* pieces;
  Cut* cuts;
  int64_t piece_count, cut_count;
};

// S: storage, F: what is computed in.
template <class S, class F, bool complex, bool backward>
struct Scan {
  static constexpr int W = kLanes<F>, parts = complex ? 2 : 1, E = W / parts;
  static constexpr int64_t kBuffer = kWidth * parts + W;
  using V = Vec<F>;
  const DiagScanArgs& args;
  F *product = nullptr, *end = nullptr;  // of each piece, row and lane; then product: the state on entering it

  // --- elements ---

  static inline V times(V a, V s) {  // a s
    if constexpr (!complex) return a * s;
    else return Pairs<W>::even(a) * s + Pairs<W>::odd(a) * signs() * Pairs<W>::swap(s);
  }
  static inline V times_conj(V a, V s) {  // conj(a) s
    if constexpr (!complex) return a * s;
    else return Pairs<W>::even(a) * s - Pairs<W>::odd(a) * signs() * Pairs<W>::swap(s);
  }
  static inline V signs() {
    V v{};
    for (int i = 0; i < W; ++i) v[i] = i % 2 ? F(1) : F(-1);
    return v;
  }
  static inline V decay(V a, V s) { return backward ? times_conj(a, s) : times(a, s); }

  // One token: what is written, and the state after it.
  static inline V step(V a, V x, V& s) {
    const V y = (backward ? s : times(a, s)) + x;
    s = backward ? times_conj(a, y) : y;
    return y;
  }

  static inline const S* element(const char* p, int64_t i) { return reinterpret_cast<const S*>(p) + i * parts; }
  static inline S* element(char* p, int64_t i) { return reinterpret_cast<S*>(p) + i * parts; }

  static inline V load_some(const S* p, int64_t count) {
    S some[W] = {};
    __builtin_memcpy(some, p, sizeof(S) * size_t(count * parts));
    return load_as<F>(some);
  }
  static inline void store_some(S* p, V v, int64_t count) {
    S some[W];
    store_as<F>(some, v);
    __builtin_memcpy(p, some, sizeof(S) * size_t(count * parts));
  }
  static inline V load_one(const S* p) {
    V v{};
    for (int i = 0; i < W; ++i) v[i] = to_float(p[i % parts]);
    return v;
  }

  // --- lanes beside each other: `width` channels, their states in memory ---

  template <bool summary>
  static void channels(const Stream& a, const Stream& x, const Stream& y, const Stream& h, const Stream& da,
                       int64_t width, int64_t steps, F* s, F* product, const F* opening, bool past_caches) {
    const bool shared = a.lane == 0;
    // Where a thread's part of a row ends, so does what the hardware prefetches: some 2 KB ahead of each stream.
    const int64_t bytes = width * parts * int64_t(sizeof(S)), ahead = kAhead / bytes + 1;
    const int64_t pitch = parts * int64_t(sizeof(S));
    const bool past = past_caches && !summary && aligned_for_vectors(y.p, y.time * pitch) &&
        (!backward || aligned_for_vectors(da.p, da.time * pitch));
    for (int64_t t = 0; t < steps; ++t) {
      const S *at = element(a.p, t * a.time), *xt = element(x.p, t * x.time);
      S* yt = element(y.p, t * y.time);
      const S* ht = backward && !summary ? element(h.p, (t + 1) * h.time) : nullptr;
      S* dat = backward && !summary ? element(da.p, t * da.time) : nullptr;
      const bool first = opening && t + 1 == steps;  // before it there is no h, but an initial state
      const V one = shared ? load_one(at) : V{};
      const auto body = [&](int64_t i, auto get, auto put) __attribute__((always_inline)) {
        if (!shared) __builtin_prefetch(at + ahead * a.time * parts + i, 0);
        __builtin_prefetch(xt + ahead * x.time * parts + i, 0);
        if (!summary && !past) __builtin_prefetch(yt + ahead * y.time * parts + i, 1);
        const V av = shared ? one : get(at + i);
        V state = load(s + i);
        const V yv = step(av, get(xt + i), state);
        store(s + i, state);
        if constexpr (summary) store(product + i, decay(av, load(product + i)));
        else {
          put(yt + i, yv);
          if constexpr (backward) {
            const V before = first ? load(opening + i) : get(ht + i);
            put(dat + i, times_conj(before, yv));
          }
        }
      };
      int64_t i = 0;
      const int64_t whole = width / E * W;
      if constexpr (__is_same(S, F))
        for (; past && i < whole; i += W) body(i, load<F>, store_past_caches<F>);
      for (; i < whole; i += W)
        body(i, [](const S* p) { return load_as<F>(p); }, [](S* p, V v) { store_as<F>(p, v); });
      if (const int64_t rest = width % E)
        body(i, [&](const S* p) { return load_some(p, rest); }, [&](S* p, V v) { store_some(p, v, rest); });
    }
    if (past) finish_stores();
  }

  // --- lanes apart: a vector of them, blocks of tokens transposed ---

  static void load_block(const Stream& x, int64_t t, int lanes, int64_t steps, F* tile) {
    const S* p = element(x.p, t * x.time);
    if constexpr (!complex) load_tile<F>(p, x.lane, x.time, lanes, steps, tile);
    else if constexpr (sizeof(F) == 4)
      load_tile<double>(
          reinterpret_cast<const double*>(p), x.lane, x.time, lanes, steps, reinterpret_cast<double*>(tile));
    else
      for (int64_t k = 0; k < steps; ++k)
        for (int i = 0; i < E; ++i)
          for (int c = 0; c < 2; ++c) tile[k * W + 2 * i + c] = i < lanes ? p[2 * (k * x.time + i * x.lane) + c] : F(0);
  }
  static void store_block(const Stream& y, int64_t t, int lanes, int64_t steps, const F* tile) {
    S* p = element(y.p, t * y.time);
    if constexpr (!complex) store_tile<F>(p, y.lane, y.time, lanes, steps, tile);
    else if constexpr (sizeof(F) == 4)
      store_tile<double>(
          reinterpret_cast<double*>(p), y.lane, y.time, lanes, steps, reinterpret_cast<const double*>(tile));
    else
      for (int64_t k = 0; k < steps; ++k)
        for (int i = 0; i < lanes; ++i)
          for (int c = 0; c < 2; ++c) p[2 * (k * y.time + i * y.lane) + c] = tile[k * W + 2 * i + c];
  }

  template <bool summary>
  static void blocks(const Stream& a, const Stream& x, const Stream& y, const Stream& h, const Stream& da, int lanes,
                     int64_t steps, F* s, F* product, const F* opening, int opening_lane) {
    alignas(64) F ta[kSteps * W], tx[kSteps * W], th[kSteps * W];
    V state = load(s), all = summary ? load(product) : V{};
    for (int64_t t = 0; t < steps; t += kSteps) {
      const int64_t count = steps - t < kSteps ? steps - t : kSteps;
      load_block(a, t, lanes, count, ta), load_block(x, t, lanes, count, tx);
      if constexpr (backward && !summary) {
        // The lane of the sequence's first token (all lanes, where they are rows) has an initial state before it.
        const bool first = opening && t + count == steps;
        load_block(h, t + 1, lanes, first ? count - 1 : count, th);
        if (first) {
          F* row = th + (count - 1) * W;
          store(row, load(opening));
          for (int i = 0; i < lanes && opening_lane >= 0; ++i)
            for (int c = 0; c < parts && i != opening_lane; ++c)
              row[i * parts + c] = to_float(element(h.p, (t + count) * h.time + i * h.lane)[c]);
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        const V av = load(ta + k * W), yv = step(av, load(tx + k * W), state);
        if constexpr (summary) all = decay(av, all);
        else store(tx + k * W, yv);
        if constexpr (backward && !summary) store(th + k * W, times_conj(load(th + k * W), yv));
      }
      if constexpr (!summary) store_block(y, t, lanes, count, tx);
      if constexpr (backward && !summary) store_block(da, t, lanes, count, th);
    }
    store(s, state);
    if constexpr (summary) store(product, all);
  }

  // --- places ---

  int64_t base(const DiagScanTensor& t, int64_t row) const {
    int64_t at = 0;
    for (int k = args.axes; k-- > 0; row /= args.size[k]) at += row % args.size[k] * t.axis[k];
    return at;
  }
  Stream stream(const DiagScanTensor& t, int64_t row, int64_t lane, int64_t begin, int64_t span) const {
    if (!t.data) return {};
    const int64_t at = base(t, row) + lane * t.lane + begin * t.time;
    return {t.data + at * parts * int64_t(sizeof(S)), t.time, span ? span * t.time : t.lane};
  }
  static F* state(const DiagScanTensor& t, int64_t base, int64_t lane, int64_t sequence) {
    return reinterpret_cast<F*>(t.data) + (base + lane * t.lane + sequence * t.time) * parts;
  }
  F* kept(F* of, const Plan& plan, int64_t piece, int64_t row, int64_t lane) const {
    return of + ((piece * args.rows + row) * plan.lanes + lane - plan.lane) * parts;
  }

  // The `index`-th lane of an item: its piece and lane.
  struct Place {
    int64_t piece, lane;
  };

  template <bool summary>
  void item(const Plan& plan, int64_t row, int64_t lane, int64_t width, const Cut& cut, F* s, F* all, F* opening) const {
    const Piece& piece = plan.pieces[cut.piece];
    const int64_t steps = piece.end - piece.begin, span = plan.in_time ? steps : 0;
    const int64_t count = plan.in_time ? cut.lanes : width;
    const int64_t padded = (count * parts + W - 1) / W * W;
    const auto place = [&](int64_t i) {
      return plan.in_time ? Place{cut.piece + i, lane} : Place{cut.piece, lane + i};
    };
    const int64_t at_before = base(args.before, row), at_after = base(args.after, row);
    for (int64_t i = 0; i < padded; ++i) s[i] = 0;
    for (int64_t i = 0; !summary && i < count; ++i) {
      const auto [number, l] = place(i);
      const Piece& of = plan.pieces[number];
      const F* from = !of.opens ? kept(product, plan, number, row, l)
                      : args.before.data ? state(args.before, at_before, l, of.sequence) : nullptr;
      for (int c = 0; from && c < parts; ++c) s[i * parts + c] = from[c];
    }
    // Backward, a sequence's first token is the last of the piece that closes it.
    const bool first = backward && !summary && plan.pieces[cut.piece + (plan.in_time ? count - 1 : 0)].closes;
    if (first) {
      const int64_t at_initial = base(args.initial, row);
      for (int64_t i = 0; i < padded; ++i) opening[i] = 0;
      for (int64_t i = 0; args.initial.data && i < count; ++i)
        for (int c = 0; c < parts; ++c)
          opening[i * parts + c] = state(args.initial, at_initial, place(i).lane, piece.sequence)[c];
    }
    if (summary)
      for (int64_t i = 0; i < padded; ++i) all[i] = complex && i % 2 ? F(0) : F(1);
    const auto of = [&](const DiagScanTensor& t) { return stream(t, row, lane, piece.begin, span); };
    const Stream a = of(args.a), x = of(args.x), y = of(args.y), h = of(args.h), da = of(args.da);
    if (plan.direct)
      channels<summary>(a, x, y, h, da, width, steps, s, all, first ? opening : nullptr, past_caches());
    else
      blocks<summary>(a, x, y, h, da, int(count), steps, s, all, first ? opening : nullptr,
                      plan.in_time && count > 1 ? int(count) - 1 : -1);
    for (int64_t i = 0; i < count; ++i) {
      const auto [number, l] = place(i);
      const Piece& of_lane = plan.pieces[number];
      if (summary) {
        for (int c = 0; c < parts; ++c) {
          kept(product, plan, number, row, l)[c] = all[i * parts + c];
          kept(end, plan, number, row, l)[c] = s[i * parts + c];
        }
      } else if (of_lane.closes && args.after.data) {
        for (int c = 0; c < parts; ++c) state(args.after, at_after, l, of_lane.sequence)[c] = s[i * parts + c];
      }
    }
  }

  // From the pieces' products and ends the states on entering them, in place of the products.
  void enter(const Plan& plan, int64_t row, int64_t lane) const {
    F s[parts] = {}, next[parts] = {};
    for (int64_t p = 0; p < plan.piece_count; ++p) {
      const Piece& piece = plan.pieces[p];
      F *all = kept(product, plan, p, row, lane), *to = kept(end, plan, p, row, lane);
      if (piece.opens)
        for (int c = 0; c < parts; ++c)
          s[c] = args.before.data ? state(args.before, base(args.before, row), lane, piece.sequence)[c] : F(0);
      if (!piece.closes) {
        bool finite = true;
        for (int c = 0; c < parts; ++c) finite = finite && all[c] - all[c] == 0 && to[c] - to[c] == 0;
        if (finite) {
          for (int c = 0; c < parts; ++c) next[c] = to[c] + all[0] * s[c];
          if constexpr (complex) next[0] -= all[1] * s[1], next[1] += all[1] * s[0];
        } else {
          run(stream(args.a, row, lane, piece.begin, 0), stream(args.x, row, lane, piece.begin, 0),
              piece.end - piece.begin, s, next);
        }
      }
      for (int c = 0; c < parts; ++c) all[c] = s[c], s[c] = next[c];
    }
  }
  static void run(const Stream& a, const Stream& x, int64_t steps, const F* from, F* to) {
    V s{};
    for (int c = 0; c < parts; ++c) s[c] = from[c];
    for (int64_t t = 0; t < steps; ++t) step(load_one(element(a.p, t * a.time)), load_one(element(x.p, t * x.time)), s);
    for (int c = 0; c < parts; ++c) to[c] = s[c];
  }

  // --- plans ---

  // Pieces of `n` tokens and their size; the last may be shorter.
  int64_t cut_rows(bool split, int64_t n, int64_t& size) const {
    const int64_t spans = split && n >= 2 * kSpan ? (n / kSpan < kSpans ? n / kSpan : kSpans) : 1;
    size = (n + spans - 1) / spans;
    return size ? (n + size - 1) / size : 1;
  }
  // Vectors of E pieces; 0 where a sequence is too short for that. Lanes whole pages apart would share a set of L1.
  int64_t cut_time(int64_t rows, int64_t n, int64_t& size) const {
    const int64_t wanted = (kSpans + rows - 1) / rows, most = n / (E * kSteps), count = wanted < most ? wanted : most;
    if (count == 0) return 0;
    size = n / (E * count) / W * W;
    if (size % (4096 / int64_t(sizeof(S) * parts)) == 0) size -= W;
    return count;
  }

  void make(Plan& plan) const {
    int64_t most = 0;
    for (int64_t q = 0; q < args.sequences; ++q) {
      int64_t size, n = args.starts[q + 1] - args.starts[q];
      most += plan.in_time ? cut_time(plan.lanes * args.rows, n, size) * E + 1 : cut_rows(plan.split, n, size);
    }
    plan.pieces = static_cast<Piece*>(__builtin_malloc(sizeof(Piece) * size_t(most + 1)));
    plan.cuts = static_cast<Cut*>(__builtin_malloc(sizeof(Cut) * size_t(most + 1)));
    plan.piece_count = plan.cut_count = 0;
    const auto add = [&](int64_t& begin, int64_t size, int64_t q) {
      const int64_t stop = args.starts[q + 1], next = begin + size < stop ? begin + size : stop;
      plan.pieces[plan.piece_count++] = {begin, next, q, begin == args.starts[q], next == stop};
      begin = next;
    };
    bool any = false;
    for (int64_t q = 0; q < args.sequences; ++q) {
      int64_t begin = args.starts[q], size = 0, n = args.starts[q + 1] - begin;
      if (plan.in_time) {
        const int64_t vectors = cut_time(plan.lanes * args.rows, n, size);
        for (int64_t k = 0; k < vectors; ++k) {
          plan.cuts[plan.cut_count++] = {plan.piece_count, E};
          for (int i = 0; i < E; ++i) add(begin, size, q);
        }
        any = any || vectors;
        if (vectors && begin == args.starts[q + 1]) continue;
        plan.cuts[plan.cut_count++] = {plan.piece_count, 1};
        add(begin, args.length, q);
      } else {
        const int64_t count = cut_rows(plan.split, n, size);
        any = any || count > 1;
        for (int64_t k = 0; k < count; ++k) {
          plan.cuts[plan.cut_count++] = {plan.piece_count, 1};
          add(begin, size, q);
        }
      }
    }
    plan.split = any;
  }

  void run(Plan plan) {
    if (plan.lanes <= 0) return;
    make(plan);
    if (plan.split) {
      const size_t bytes = sizeof(F) * parts * size_t(plan.piece_count * args.rows * plan.lanes);
      product = static_cast<F*>(__builtin_malloc(bytes)), end = static_cast<F*>(__builtin_malloc(bytes));
    }
    const int64_t groups = (plan.lanes + plan.width - 1) / plan.width;
    const auto items = [&](auto summary) {
      each(args.rows * groups * plan.cut_count, [&](int64_t begin, int64_t stop) {
        alignas(64) F s[kBuffer], all[kBuffer], opening[kBuffer];
        for (int64_t i = begin; i < stop; ++i) {
          const Cut& cut = plan.cuts[i % plan.cut_count];
          const int64_t at = i / plan.cut_count, lane = plan.lane + at % groups * plan.width;
          if (summary.value && cut.lanes == 1 && plan.pieces[cut.piece].closes) continue;
          const int64_t left = plan.lane + plan.lanes - lane;
          item<summary.value>(plan, at / groups, lane, left < plan.width ? left : plan.width, cut, s, all, opening);
        }
      });
    };
    if (plan.split) {
      items(Constant<true>{});
      each(args.rows * plan.lanes, [&](int64_t begin, int64_t stop) {
        for (int64_t i = begin; i < stop; ++i) enter(plan, i / plan.lanes, plan.lane + i % plan.lanes);
      });
    }
    items(Constant<false>{});
    __builtin_free(plan.pieces), __builtin_free(plan.cuts), __builtin_free(product), __builtin_free(end);
    product = end = nullptr;
  }
  template <bool v>
  struct Constant {
    static constexpr bool value = v;
  };
  template <class B>
  void each(int64_t count, const B& body) const {
    if (args.rows * args.lanes * args.length >= kThreads) scalekern::parallel(count, body);
    else body(0, count);
  }

  bool past_caches() const {
    return args.rows * args.lanes * args.length * parts * int64_t(sizeof(S)) >= kPastCaches;
  }

  void run() {
    const int64_t across = args.rows * args.lanes;
    const bool beside = args.lanes == 1 ? false : args.x.lane == 1 && args.y.lane == 1 && args.a.lane >= 0 &&
        args.a.lane <= 1 && (!backward || (args.h.lane == 1 && args.da.lane == 1));
    const bool large = across * args.length >= kThreads;
    if (beside && (args.y.time != 1 && args.y.time != -1)) {
      // Enough groups for the threads, each a line of memory or more.
      const int64_t line = 64 / int64_t(sizeof(S) * parts), wanted = scalekern::num_threads();
      int64_t width = kWidth;
      while (width > line && args.rows * ((args.lanes + width - 1) / width) < wanted) width /= 2;
      const bool few = args.rows * args.lanes * parts * int64_t(sizeof(S)) < kFewBytes;
      return run(Plan{0, args.lanes, width, true, false, few && large, nullptr, nullptr, 0, 0});
    }
    const int64_t whole = across < 4 * E ? 0 : args.lanes / E * E;  // the rest by spans of time
    run(Plan{0, whole, E, false, false, false, nullptr, nullptr, 0, 0});
    run(Plan{whole, args.lanes - whole, 1, false, true, true, nullptr, nullptr, 0, 0});
  }
};

template <bool backward>
static void dispatch(const DiagScanArgs& args) {
  switch (args.io) {  // enum Dtype of common/tensor.h
    case 0: return Scan<float, float, false, backward>{args}.run();
    case 1: return Scan<double, double, false, backward>{args}.run();
    case 2: return Scan<f16, float, false, backward>{args}.run();
    case 3: return Scan<bf16, float, false, backward>{args}.run();
    case 6: return Scan<float, float, true, backward>{args}.run();
    default: return Scan<double, double, true, backward>{args}.run();
  }
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void diag_scan_fwd(const DiagScanArgs& args) { dispatch<false>(args); }
void diag_scan_bwd(const DiagScanArgs& args) { dispatch<true>(args); }

}  // namespace scalekern::SCALEKERN_ISA
