// Selective scan, forward.
//
// Shape letters: B batch, D channels, L length, N state size; W lanes of a vector.
//
// Bound: the exponentials. A vector of W elements (one state of W channels, one token) costs 14 operations, 11 of them
// 2^(d A'), A' = A log2 e. torch.exp alone needs about 10. Memory is far off: 16 bytes a channel and token, gated
// fp32, against N of these vectors for W channels.
// Split: items (b, part of the channels, segment of time) over threads; inside, tiles of 256 tokens of W channels (64
// where channels are contiguous). A tile's d, d u and y sit in cache as [t][W]; four states at a time run through 64
// tokens of it in registers, so that B and C are loads with a broadcast, and d, d u, y cost a quarter of a load each.
// Time: where channels are too few for the threads, a segment starts from what the tokens before it left, found by
// running the last of them, as many as still count (2^-130), ahead of the scan; where all of a segment's still count,
// the state before it is multiplied by its whole decay. No segment is scanned twice.
//
// Measured, one thread of a 2-thread Xeon, AVX-512, in units of torch.exp on as many elements in cache, N = 16, fp32:
// D 1536 L 2048 gated 1.7, without gate, D, bias 1.4, bf16 1.7; D 16 L 8192 1.8, L 2^20 2.1; one channel, whose states
// are the lanes, 2.6 (its exp has little to amortize a call over), L 2^20 1.1 times the time per element of L 8192.
//
// Tried and lost: a polynomial of degree 5 saves one operation of 14, and is off by 2.5e-7 of the exponent near 0,
// where slow decays add it up. Tiles of 64 tokens with time contiguous: 1.2 times slower at L = 2^20 (TLB).
#include "selective_scan/cpu_scan_common.h"

namespace {

constexpr int64_t kRun = 64;    // tokens that a group of states runs through at once; divides every chunk
#if defined(__AVX512F__)
constexpr int kStates = 4;      // vectors of a state in registers
#else
constexpr int kStates = 2;      // 16 registers
#endif

template <class O, class F = typename O::Scalar>
struct Scratch {
  F *d, *x, *u, *y, *z;         // flat tiles: step, d u, u, the sum over states, gate
  F *d_rows, *x_rows, *y_rows;  // [t][W]; the flat ones themselves with channels as lanes
  F *B, *C, *joined;
  F *state, *scaled;            // of a bundle of blocks

  Block* bundle;
  Decays<O>* decays_of;

  Scratch(Arena& arena, const Plan& plan) {
    constexpr int row = O::row;
    const int64_t tile = plan.span * kLanes<F>, vectors = plan.vectors * row;
    F** flat[] = {&d, &x, &u, &y, &z};
    for (F** p : flat) *p = arena.take<F>(tile);
    d_rows = d, x_rows = x, y_rows = y;
    if (plan.state_lanes) d_rows = arena.take<F>(tile), x_rows = arena.take<F>(tile), y_rows = arena.take<F>(tile);
    B = arena.take<F>((kRun + kStates) * row), C = arena.take<F>((kRun + kStates) * row);
    joined = arena.take<F>(2 * vectors);
    state = arena.take<F>(vectors * plan.bundle), scaled = arena.take<F>(vectors * plan.bundle);
    bundle = arena.take<Block>(plan.bundle), decays_of = arena.take<Decays<O>>(plan.bundle);
  }
};

// kCount vectors of the state through the times [t0, t1) of a tile.
template <class O, bool kShared, bool kBounded, int kCount, class F = typename O::Scalar>
void advance(
    const F* d_rows, const F* x_rows, F* y_rows, F* state, const F* scaled, MatrixView<F> B, MatrixView<F> C,
    int64_t t0, int64_t t1, VecInt<F> valid) {
  using Value = typename O::Value;
  constexpr int W = kLanes<F>;
  Value h[kCount], A[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) h[i] = O::get(state + i * O::row), A[i] = O::get(scaled + i * O::row);
  for (int64_t t = t0; t < t1; ++t) {
    const Vec<F> d = load(d_rows + t * W), x = load(x_rows + t * W);
    Vec<F> y = load(y_rows + t * W);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      h[i] = O::template decay<kBounded>(d, A[i]) * h[i] + x * element<O, kShared>(B, i, t - t0);
      const Vec<F> term = O::real(element<O, kShared>(C, i, t - t0) * h[i]);
      if constexpr (kShared) y += term;
      else y += keep<F>(term, valid);  // a lane past the state may hold NaN
    }
    store(y_rows + t * W, y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) O::put(state + i * O::row, h[i]);
}

template <class O>
class Forward {
  using F = typename O::Scalar;
  static constexpr int W = kLanes<F>;

 public:
  Forward(const ScanArgs& a, const Plan& plan, Arena arena) : a_(a), plan_(plan) {
    carries_.take(arena, a, plan, O::comps);
    broken_ = arena.take<int>(1);
    bytes_ = arena.used();
  }

  int64_t bytes() const { return bytes_; }

  void run() {
    *broken_ = 0;
    copy_empty_sequences<O>(a_, a_.initial, a_.last);
    if (plan_.segments > 1) {
      for_items([&](const Item& item, Scratch<O>& s) { prepare(item, s); });
    }
    for_items([&](const Item& item, Scratch<O>& s) { scan(item, s); });
    if (*broken_) {
      // A state left of a boundary is not finite: what lies right of it has to see that, however long ago it was.
      plan_.segments = 1;
      for_items([&](const Item& item, Scratch<O>& s) { scan(item, s); });
    }
  }

 private:
  template <class Body>
  void for_items(const Body& body) {
    Arena size(nullptr);
    Scratch<O>(size, plan_);
    scalekern::parallel(plan_.items(a_), [&](int64_t begin, int64_t end) {
      with_scratch(size.used(), [&](char* memory) {
        Arena arena(memory);
        Scratch<O> scratch(arena, plan_);
        for (int64_t i = begin; i < end; ++i) body(item_at(a_, plan_, i), scratch);
      });
    });
  }

  // Step sizes of a tile, into s.d.
  void load_steps(int64_t b, Block k, int64_t t, int64_t count, Scratch<O>& s) {
    load_flat<F>(a_, plan_, a_.delta, b, k, t, count, s.d);
    step_sizes<F>(a_, flat_rows<F>(plan_, count), load_channels<F>(plan_, a_.bias, k), s.d, nullptr);
  }

  // What the last tokens of a segment make of its state: as many as still count at its end.
  void prepare(const Item& item, Scratch<O>& s) {
    if (item.segment == plan_.segments - 1) return;
    for_blocks<F>(a_, plan_, item, [&](Block k) {
      Decays<O> decays;
      decays.load_from(a_, plan_, k, s.scaled);
      const int64_t start = most(item.begin, a_.starts[sequence_at(a_, item.end - 1)]);
      int64_t t = item.end;
      Steps<F> steps;
      bool open = true;
      while (open && t > start) {
        const int64_t count = least(plan_.span, t - start);
        t -= count;
        load_steps(item.b, k, t, count, s);
        steps.add(plan_, count, s.d);
        open = !steps.forget(plan_, k, decays.slowest);
      }
      if (start > item.begin || start == a_.starts[sequence_at(a_, start)]) open = false;
      for (int64_t i = 0; i < plan_.vectors * O::row; ++i) s.state[i] = 0;
      for (int64_t next; t < item.end; t = next) {
        next = least(t + plan_.span, item.end);
        tile(item.b, k, t, next, decays, s.state, false, s);
      }
      save_carry<O>(a_, plan_, carries_, item.b, item.segment, k, s.state, open, steps);
    });
  }

  void scan(const Item& item, Scratch<O>& s) {
    int64_t count = 0;
    for_blocks<F>(a_, plan_, item, [&](Block k) {
      s.bundle[count++] = k;
      if (count == plan_.bundle) scan_bundle(item, count, s), count = 0;
    });
    if (count > 0) scan_bundle(item, count, s);
  }

  void scan_bundle(const Item& item, int64_t blocks, Scratch<O>& s) {
    const int64_t size = plan_.vectors * O::row;
    for (int64_t i = 0; i < blocks; ++i) {
      s.decays_of[i].load_from(a_, plan_, s.bundle[i], s.scaled + i * size);
      for (int64_t j = 0; j < size; ++j) s.state[i * size + j] = 0;
      for (int64_t j = 0; j < item.segment; ++j)
        join_carry<O, false>(a_, plan_, carries_, item.b, j, s.bundle[i], s.state + i * size, s.joined);
    }
    for (int64_t t = item.begin, next; t < item.end; t = next) {
      next = least(t + plan_.span - (t + a_.pad) % plan_.span, item.end);
      for (int64_t i = 0; i < blocks; ++i) tile(
          item.b, s.bundle[i], t, next, s.decays_of[i], s.state + i * size, true, s);
    }
    if (item.segment == plan_.segments - 1) return;
    for (int64_t i = 0; i < blocks; ++i)
      if (!is_finite<O>(a_, plan_, s.bundle[i], s.state + i * size)) __atomic_store_n(broken_, 1, __ATOMIC_RELAXED);
  }

  // One block through the times [begin, end), at most a tile. Without `write` only the state is advanced.
  void tile(
      int64_t b, Block k, int64_t begin, int64_t end, const Decays<O>& decays, F* state, bool write, Scratch<O>& s) {
    const int64_t count = end - begin, rows = flat_rows<F>(plan_, count);
    load_steps(b, k, begin, count, s);
    load_flat<F>(a_, plan_, a_.u, b, k, begin, count, s.u);
    for (int64_t i = 0; i < rows; ++i) store(s.x + i * W, load(s.d + i * W) * load(s.u + i * W));
    for (int64_t i = 0; i < count; ++i) store(s.y_rows + i * W, Vec<F>{});
    if (plan_.state_lanes) spread<F>(count, s.d, s.d_rows), spread<F>(count, s.x, s.x_rows);
    const bool bounded = is_bounded<F>(count, s.d_rows, decays.magnitude);
    for (int64_t t = begin, next; t < end; t = next) {
      const int64_t sequence = sequence_at(a_, t);
      next = least(t + kRun - (t + a_.pad) % kRun, least(end, a_.starts[sequence + 1]));
      next = least(next, least(line_end(a_.B, t), line_end(a_.C, t)));  // where B and C are read in place
      if (t == a_.starts[sequence]) load_row_state<O>(a_, plan_, a_.initial, b + sequence, k, state);
      if (write && a_.slots && (t == 0 || (t + a_.pad) % a_.chunk == 0))
        store_state<O>(
            a_, plan_, slot_at<O>(a_, b, t), a_.checkpoints.s[2], a_.checkpoints.s[3], k, 0, plan_.vectors, state);
      if (is_shared(a_, plan_)) states<true>(b, k, begin, t, next, decays.scaled, state, bounded, s);
      else states<false>(b, k, begin, t, next, decays.scaled, state, bounded, s);
      if (write && next == a_.starts[sequence + 1]) store_row_state<O>(a_, plan_, a_.last, b + sequence, k, state);
    }
    if (write) finish(b, k, begin, count, s);
  }

  static int64_t line_end(const ScanTensor& x, int64_t t) { return x.line < kRun / 4 ? t + kRun : t - t % x.line + x.line; }

  // All vectors of the state through the times [t, next) of the tile that begins at `begin`.
  template <bool kShared>
  void states(
      int64_t b, Block k, int64_t begin, int64_t t, int64_t next, const F* scaled, F* state, bool bounded,
      Scratch<O>& s) {
    int64_t v = 0;
    if constexpr (kShared)
      for (; v + kStates <= plan_.vectors; v += kStates) group<kShared, kStates>(
          b, k, v, begin, t, next, scaled, state, bounded, s);
    for (; v < plan_.vectors; ++v) group<kShared, 1>(b, k, v, begin, t, next, scaled, state, bounded, s);
  }

  template <bool kShared, int kCount>
  void group(
      int64_t b, Block k, int64_t v, int64_t begin, int64_t t, int64_t next, const F* scaled, F* state, bool bounded,
      Scratch<O>& s) {
    const auto B = view_matrix<O>(a_, plan_, a_.B, a_.groups_B, b, k, v, kCount, t, next - t, s.B);
    const auto C = view_matrix<O>(a_, plan_, a_.C, a_.groups_C, b, k, v, kCount, t, next - t, s.C);
    const auto valid = first_lanes<F>(lanes_of<F>(a_, plan_, k, v));
    F* h = state + v * O::row;
    const F* A = scaled + v * O::row;
    constexpr bool can_be_bounded = O::comps == 1 && sizeof(F) == 4;  // the other types have one version
    if (can_be_bounded && bounded)
      advance<O, kShared, can_be_bounded, kCount>(
          s.d_rows, s.x_rows, s.y_rows, h, A, B, C, t - begin, next - begin, valid);
    else advance<O, kShared, false, kCount>(s.d_rows, s.x_rows, s.y_rows, h, A, B, C, t - begin, next - begin, valid);
  }

  // out = (y + D u) silu(z)
  void finish(int64_t b, Block k, int64_t t, int64_t count, Scratch<O>& s) {
    if (plan_.state_lanes) sum_rows<F>(count, s.y_rows, W, first_lanes<F>(W), s.y, false);
    const Vec<F> D = load_channels<F>(plan_, a_.D, k);
    const bool gated = a_.z.data != nullptr, skip = a_.D.data != nullptr;
    if (gated) load_flat<F>(a_, plan_, a_.z, b, k, t, count, s.z);
    for (int64_t i = 0; i < flat_rows<F>(plan_, count); ++i) {
      Vec<F> y = load(s.y + i * W) * O::scale;
      if (skip) y += D * load(s.u + i * W);
      if (gated) {
        y *= siluv(load(s.z + i * W));
      }
      store(s.y + i * W, y);
    }
    store_flat<F>(a_, plan_, a_.out, b, k, t, count, s.y);
  }

  const ScanArgs& a_;
  Plan plan_;
  Carries<F> carries_{};
  int* broken_;
  int64_t bytes_;
};

// The kernel of the tensors' types. `what` gets a Forward whose memory begins at `base`.
template <class Body>
void with_forward(const ScanArgs& a, char* base, const Body& body) {
  const auto run = [&](auto operations) {
    using O = decltype(operations);
    body(Forward<O>(a, make_plan<typename O::Scalar>(a, a.channels), Arena(base)));
  };
  if (a.io == 1) a.complex_A ? run(ComplexState<double>{}) : run(RealState<double>{});
  else a.complex_A ? run(ComplexState<float>{}) : run(RealState<float>{});
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

int64_t selective_scan_fwd_workspace(const ScanArgs& a) {
  int64_t bytes = 0;
  with_forward(a, nullptr, [&](auto&& forward) { bytes = forward.bytes(); });
  return bytes;
}

void selective_scan_fwd(const ScanArgs& a) {
  with_forward(a, a.workspace, [&](auto&& forward) { forward.run(); });
}

}  // namespace scalekern::SCALEKERN_ISA
