// Selective scan, backward: the formulas of scalekern/reference/selective_scan.py.
//
// Shape letters: B batch, D channels, L length, N state size, G groups; W lanes of a vector.
//
// Bound: arithmetic, about 30 operations a vector: the forward's 14 again to rebuild the states of a chunk from its
// checkpoint, 10 for the gradients, 6 to sum dB and dC over the channels of a vector.
// Split: items as in the forward; inside, chunks from the last to the first, up to 256 tokens to a load of the inputs.
// Two states at a time run forward through a chunk, leaving decays and states in a history in cache, then backward;
// dB and dC terms overwrite the entries that are used up, and are summed over lanes by transposed addition.
// Order of sums: over lanes in the vector, over the blocks of an item in order, over items in order. No atomics: the
// result does not depend on timing. What is summed over time is compensated (Kahan) from chunk to chunk: plain sums
// had twice eager torch's error in dD.
// Time: segments as in the forward, from the other side; only g runs ahead, so no sum sees a token twice.
//
// Measured, one thread of a 2-thread Xeon, AVX-512, in units of torch.exp on as many elements in cache, N = 16, fp32:
// D 1536 L 2048 gated 3.6, channels-last 4.7, bf16 3.9; D 16 L 8192 5.2, L 2^20 7.6: there 48 rows of L tokens and 64
// of B, C and their gradients lie in pages of their own, and 320 MB of fresh gradients are faulted in.
#include "selective_scan/cpu_scan_bwd_core.h"

namespace {

template <class O>
class Backward {
  using F = typename O::Scalar;
  static constexpr int W = kLanes<F>;

 public:
  Backward(const ScanArgs& a, const Plan& plan, Arena arena) : a_(a), plan_(plan) {
    const int64_t rows = a.batch * plan.segments * a.channels;
    carries_.take(arena, a, plan, O::comps);
    broken_ = arena.take<int>(1);
    dA_ = arena.take<F>(rows * a.states * O::comps);
    dD_ = arena.take<F>(rows), dbias_ = arena.take<F>(rows);
    take_matrix(arena, dB_, a.groups_B), take_matrix(arena, dC_, a.groups_C);
    bytes_ = arena.used();
  }

  int64_t bytes() const { return bytes_; }

  void run() {
    *broken_ = 0;
    if (a_.dinitial.data) copy_empty_sequences<O>(a_, a_.dlast, a_.dinitial);
    if (plan_.segments > 1) {
      for_items([&](const Item& item, Scratch<O>& s) { prepare(item, s); });
    }
    for_items([&](const Item& item, Scratch<O>& s) { scan(item, s); });
    if (*broken_) {  // as in the forward: a gradient that is not finite passes every boundary
      plan_.segments = 1;
      for_items([&](const Item& item, Scratch<O>& s) { scan(item, s); });
    }
    reduce();
  }

 private:
  void take_matrix(Arena& arena, MatrixGradient<F>& m, int64_t groups) {
    m.groups = groups, m.item_groups = groups / plan_.groups;
    m.rows = plan_.vectors * O::comps, m.width = plan_.state_lanes ? W : 1;
    m.slabs = m.partial = nullptr;
    if (groups == 0) m.partial = arena.take<F>(a_.batch * plan_.segments * a_.channels * a_.states * O::comps);
    else if (plan_.parts > 1 || plan_.bundle < plan_.blocks)
      m.slabs = arena.take<F>(plan_.parts * a_.batch * groups * m.rows * a_.length * m.width);
  }

  template <class Body>
  void for_items(const Body& body) {
    Arena size(nullptr);
    Scratch<O>(size, a_, plan_, dB_, dC_);
    scalekern::parallel(plan_.items(a_), [&](int64_t begin, int64_t end) {
      with_scratch(size.used(), [&](char* memory) {
        Arena arena(memory);
        Scratch<O> scratch(arena, a_, plan_, dB_, dC_);
        for (int64_t i = begin; i < end; ++i) body(item_at(a_, plan_, i), scratch);
      });
    });
  }

  // d (with its slope, if asked for), u and d u of a tile.
  void load_inputs(int64_t b, Block k, int64_t t, int64_t count, Scratch<O>& s) {
    const int64_t rows = flat_rows<F>(plan_, count);
    load_flat<F>(a_, plan_, a_.delta, b, k, t, count, s.d);
    step_sizes<F>(a_, rows, load_channels<F>(plan_, a_.bias, k), s.d, s.slope);
    load_flat<F>(a_, plan_, a_.u, b, k, t, count, s.u);
    for (int64_t i = 0; i < rows; ++i) store(s.x + i * W, load(s.d + i * W) * load(s.u + i * W));
    if (plan_.state_lanes) spread<F>(count, s.d, s.d_rows), spread<F>(count, s.x, s.x_rows);
  }

  // dy = dout silu(z), and dz = dout silu'(z), still without its factor y + D u.
  void load_dy(int64_t b, Block k, int64_t t, int64_t count, Scratch<O>& s) {
    load_flat<F>(a_, plan_, a_.dout, b, k, t, count, s.dy);
    if (a_.z.data != nullptr) {
      load_flat<F>(a_, plan_, a_.z, b, k, t, count, s.dz);
      for (int64_t i = 0; i < flat_rows<F>(plan_, count); ++i) {
        const Vec<F> z = load(s.dz + i * W), dout = load(s.dy + i * W), gate = sigmoidv(z);
        store(s.dz + i * W, dout * gate * (1 + z * (1 - gate)));
        store(s.dy + i * W, dout * z * gate);
      }
    }
    if (plan_.state_lanes) spread<F>(count, s.dy, s.dy_rows);
  }

  // What the first tokens of a segment pass to the one before it: as many as still count there.
  void prepare(const Item& item, Scratch<O>& s) {
    if (item.segment == 0) return;
    for_blocks<F>(a_, plan_, item, [&](Block k) {
      Decays<O> decays;
      decays.load_from(a_, plan_, k, s.scaled);
      const int64_t sequence = sequence_at(a_, item.begin), last = least(item.end, a_.starts[sequence + 1]);
      int64_t t = item.begin;
      Steps<F> steps;
      bool open = true;
      while (open && t < last) {
        const int64_t count = least(64, last - t);
        load_inputs(item.b, k, t, count, s);
        steps.add(plan_, count, s.d);
        open = !steps.forget(plan_, k, decays.slowest);
        t += count;
      }
      if (t == a_.starts[sequence + 1]) {
        load_row_state<O>(a_, plan_, a_.dlast, item.b + sequence, k, s.g);
        open = false;
      } else {
        for (int64_t i = 0; i < plan_.vectors * O::row; ++i) s.g[i] = 0;
      }
      for (int64_t first; t > item.begin; t = first) {
        first = item.begin + (t - item.begin - 1) / 64 * 64;
        load_inputs(item.b, k, first, t - first, s);
        load_dy(item.b, k, first, t - first, s);
        for (int64_t v = 0; v < plan_.vectors; ++v) {
          const auto C = view_matrix<O>(a_, plan_, a_.C, a_.groups_C, item.b, k, v, 1, first, t - first, s.C);
          if (is_shared(a_, plan_)) unwind_g<O, true>(
              s.d_rows, s.dy_rows, s.g + v * O::row, s.scaled + v * O::row, C, 0, t - first);
          else unwind_g<O, false>(s.d_rows, s.dy_rows, s.g + v * O::row, s.scaled + v * O::row, C, 0, t - first);
        }
      }
      save_carry<O>(a_, plan_, carries_, item.b, item.segment, k, s.g, open, steps);
    });
  }

  void scan(const Item& item, Scratch<O>& s) {
    int64_t count = 0;
    bool first = true;
    for_blocks<F>(a_, plan_, item, [&](Block k) {
      s.bundle[count++] = k;
      if (count == plan_.bundle) scan_bundle(item, count, first, s), count = 0, first = false;
    });
    if (count > 0) scan_bundle(item, count, first, s);
  }

  void scan_bundle(const Item& item, int64_t blocks, bool first_bundle, Scratch<O>& s) {
    const int64_t size = plan_.vectors * O::row;
    for (int64_t i = 0; i < blocks; ++i) {
      F* g = s.g + i * size;
      s.decays_of[i].load_from(a_, plan_, s.bundle[i], s.scaled + i * size);
      for (int64_t j = 0; j < size; ++j) g[j] = 0;
      for (int64_t j = plan_.segments - 1; j > item.segment; --j)
        join_carry<O, true>(a_, plan_, carries_, item.b, j, s.bundle[i], g, s.joined);
    }
    s.dA.clear(0, blocks * size), s.dD.clear(0, blocks * W), s.dbias.clear(0, blocks * W);
    for (MatrixGradient<F>* m : matrices(s))
      if (m->groups == 0) m->constant.clear(0, blocks * size);
    for (int64_t t = item.end, first; t > item.begin; t = first) {
      first = most(item.begin, (t - 1 + a_.pad) / plan_.span * plan_.span - a_.pad);
      for (MatrixGradient<F>* m : matrices(s))
        for (int64_t i = 0; m->groups && i < m->item_groups * m->rows * span() * m->width; ++i) m->chunk[i] = 0;
      for (int64_t i = 0; i < blocks; ++i) chunk(item, s.bundle[i], i, first, t, s.decays_of[i], s);
      flush(s.dB, a_.dB, item, first, t - first, first_bundle), flush(
          s.dC, a_.dC, item, first, t - first, first_bundle);
    }
    for (int64_t i = 0; i < blocks; ++i) store_sums(item, s.bundle[i], i, s);
  }

  struct Both {
    MatrixGradient<F>* m[2];
    MatrixGradient<F>** begin() { return m; }
    MatrixGradient<F>** end() { return m + 2; }
  };
  static Both matrices(Scratch<O>& s) { return {{&s.dB, &s.dC}}; }

  int64_t span() const { return least(plan_.span, a_.length); }

  // Block `k`, the i-th of its bundle, through a span [begin, end) of some chunks.
  void chunk(const Item& item, Block k, int64_t i, int64_t begin, int64_t end, const Decays<O>& decays, Scratch<O>& s) {
    const int64_t b = item.b, count = end - begin;
    F* g = s.g + i * plan_.vectors * O::row;
    load_inputs(b, k, begin, count, s);
    load_dy(b, k, begin, count, s);
    for (int64_t t = 0; t < count; ++t)
      store(s.y_rows + t * W, Vec<F>{}), store(s.dd_rows + t * W, Vec<F>{}), store(s.gb_rows + t * W, Vec<F>{});
    load_state<O>(a_, plan_, reinterpret_cast<const F*>(a_.A.data), a_.A.s[0], a_.A.s[1], k, 0, plan_.vectors, s.A);
    const bool bounded = is_bounded<F>(count, s.d_rows, decays.magnitude);
    for (int64_t t = end, first; t > begin; t = first) {
      const int64_t sequence = sequence_at(a_, t - 1), start = a_.starts[sequence];
      first = most((t - 1 + a_.pad) / a_.chunk * a_.chunk - a_.pad, most(begin, start));
      if (t == a_.starts[sequence + 1]) load_row_state<O>(a_, plan_, a_.dlast, b + sequence, k, g);
      if (first == start) load_row_state<O>(a_, plan_, a_.initial, b + sequence, k, s.entering);
      else load_state<O>(
          a_, plan_, slot_at<O>(a_, b, first), a_.checkpoints.s[2], a_.checkpoints.s[3], k, 0, plan_.vectors,
          s.entering);
      if (is_shared(a_, plan_)) states<true>(item, k, i, begin, first, t, decays.scaled, g, bounded, s);
      else states<false>(item, k, i, begin, first, t, decays.scaled, g, bounded, s);
      if (first == start) store_row_state<O>(a_, plan_, a_.dinitial, b + sequence, k, g);
    }
    finish(b, k, i, begin, count, s);
  }

  template <bool kShared>
  void states(
      const Item& item, Block k, int64_t i, int64_t begin, int64_t t0, int64_t t1, const F* scaled, F* g,
      bool bounded, Scratch<O>& s) {
    int64_t v = 0;
    if constexpr (kShared)
      for (; v + kStates <= plan_.vectors; v += kStates) group<kShared, kStates>(
          item, k, i, v, begin, t0, t1, scaled, g, bounded, s);
    for (; v < plan_.vectors; ++v) group<kShared, 1>(item, k, i, v, begin, t0, t1, scaled, g, bounded, s);
  }

  // kCount vectors of the state, from v, through the times [t0, t1) of a chunk, in the span that begins at `begin`.
  template <bool kShared, int kCount>
  void group(
      const Item& item, Block k, int64_t i, int64_t v, int64_t begin, int64_t t0, int64_t t1, const F* scaled, F* g,
      bool bounded, Scratch<O>& s) {
    const auto B = view_matrix<O>(a_, plan_, a_.B, a_.groups_B, item.b, k, v, kCount, t0, t1 - t0, s.B);
    const auto C = view_matrix<O>(a_, plan_, a_.C, a_.groups_C, item.b, k, v, kCount, t0, t1 - t0, s.C);
    const auto valid = first_lanes<F>(lanes_of<F>(a_, plan_, k, v));
    const int64_t history = t1 - t0 + 1, from = t0 - begin, row = from * W, at = v * O::row;
    const F *d = s.d_rows + row, *x = s.x_rows + row;
    constexpr bool can_be_bounded = O::comps == 1 && sizeof(F) == 4;
    if (can_be_bounded && bounded)
      rebuild<O, kShared, can_be_bounded, kCount>(
          d, x, s.y_rows + row, s.entering + at, scaled + at, B, C, s.decays, s.states, t1 - t0, valid);
    else rebuild<O, kShared, false, kCount>(
        d, x, s.y_rows + row, s.entering + at, scaled + at, B, C, s.decays, s.states, t1 - t0, valid);
    typename O::Value dA[kCount] = {};
    unwind<O, kShared, kCount>(
        d, x, s.dy_rows + row, s.dd_rows + row, s.gb_rows + row, g + at, s.A + at, B, C, s.decays, s.states, t1 - t0,
        valid, dA);
    for (int j = 0; j < kCount; ++j) {
      F planes[O::row];
      O::put(planes, dA[j]);
      for (int c = 0; c < O::comps; ++c) s.dA.add((i * plan_.vectors + v + j) * O::row + c * W, load(planes + c * W));
      absorb(s.dB, item, k, i, v + j, s.decays + j * history * O::row, from, t1 - t0);
      absorb(s.dC, item, k, i, v + j, s.states + (j * history + 1) * O::row, from, t1 - t0);
    }
  }

  // `count` rows of terms of the gradient for vector v, from time t of the chunk.
  void absorb(
      MatrixGradient<F>& m, const Item& item, Block k, int64_t i, int64_t v, const F* terms, int64_t t,
      int64_t count) {
    const auto valid = first_lanes<F>(lanes_of<F>(a_, plan_, k, v));
    for (int c = 0; c < O::comps; ++c, terms += W) {
      if (m.groups == 0) {
        Vec<F> sum{};
        for (int64_t j = 0; j < count; ++j) sum += load(terms + j * O::row);
        m.constant.add((i * plan_.vectors + v) * O::row + c * W, sum);
        continue;
      }
      const int64_t group = k.channel / (a_.channels / m.groups) - item.group * m.item_groups;
      F* out = m.chunk + ((group * m.rows + v * O::comps + c) * span() + t) * m.width;
      if (plan_.state_lanes)
        for (int64_t j = 0; j < count; ++j) store(out + j * W, load(out + j * W) + load(terms + j * O::row));
      else sum_rows<F>(count, terms, O::row, valid, out, true);
    }
  }

  // A chunk's rows of dB or dC, complete for this bundle, to the item's slab or, where nothing else adds to them, out.
  void flush(
      const MatrixGradient<F>& m, const ScanTensor& out, const Item& item, int64_t t, int64_t count, bool first) {
    for (int64_t i = 0; m.groups && i < m.item_groups * m.rows; ++i) {
      const int64_t group = item.group * m.item_groups + i / m.rows, row = i % m.rows;
      const F* rows = m.chunk + i * span() * m.width;
      if (m.slabs == nullptr) {
        store_matrix(m, out, item.b, group, row, t, count, rows);
        continue;
      }
      F* slab = slab_row(m, item.part, item.b, group, row) + t * m.width;
      for (int64_t j = 0; j < count * m.width; ++j) slab[j] = first ? rows[j] : slab[j] + rows[j];
    }
  }

  F* slab_row(const MatrixGradient<F>& m, int64_t part, int64_t b, int64_t group, int64_t row) const {
    return m.slabs + (((part * a_.batch + b) * m.groups + group) * m.rows + row) * a_.length * m.width;
  }

  void store_matrix(
      const MatrixGradient<F>& m, const ScanTensor& out, int64_t b, int64_t group, int64_t row, int64_t t,
      int64_t count, const F* rows) const {
    with_matrix_storage<O>(a_.io, [&](auto* type) {
      const int64_t v = row / O::comps * (plan_.state_lanes ? W : 1), n = out.s[2] * O::comps, l = out.s[3] * O::comps;
      auto* p = reinterpret_cast<decltype(type)>(out.data) + (
          b * out.s[0] + group * out.s[1]) * O::comps + v * n + row % O::comps;
      for_lines(out, out.s[3], t, count, [&](int64_t place, int64_t first, int64_t times) {
        auto* q = p + place * O::comps;
        if (plan_.state_lanes) store_tile<F>(q, n, l, int(least(W, a_.states - v)), times, rows + first * W);
        else store_line<F>(q, l, times, rows + first);
      });
    });
  }

  // Gradients of the inputs of a tile, once the states have gone through it.
  void finish(int64_t b, Block k, int64_t i, int64_t t, int64_t count, Scratch<O>& s) {
    const int64_t rows = flat_rows<F>(plan_, count);
    if (plan_.state_lanes) {
      F* flat[] = {s.y, s.dd, s.gb};
      const F* wide[] = {s.y_rows, s.dd_rows, s.gb_rows};
      for (int j = 0; j < 3; ++j) {
        store(flat[j] + (rows - 1) * W, Vec<F>{});  // the lanes past the last time
        sum_rows<F>(count, wide[j], W, first_lanes<F>(W), flat[j], false);
      }
    }
    const Vec<F> D = load_channels<F>(plan_, a_.D, k);
    const bool gated = a_.z.data != nullptr, skip = a_.D.data != nullptr;
    Compensated<Vec<F>> dD{load(s.dD.sum + i * W), load(s.dD.lost + i * W)}, dbias{load(s.dbias.sum + i * W), load(
        s.dbias.lost + i * W)};
    for (int64_t j = 0; j < rows * W; j += W) {
      const Vec<F> u = load(s.u + j), dy = load(s.dy + j), gb = load(s.gb + j);
      Vec<F> y = load(s.y + j) * O::scale, du = gb * load(s.d + j);
      const Vec<F> ddelta = (load(s.dd + j) + gb * u) * load(s.slope + j);
      if (skip) y += D * u, du += D * dy;
      dD.add(dy * u), dbias.add(ddelta);
      store(s.gb + j, du), store(s.dd + j, ddelta);
      if (gated) store(s.dz + j, load(s.dz + j) * y);
    }
    store(s.dD.sum + i * W, dD.sum), store(s.dD.lost + i * W, dD.lost);
    store(s.dbias.sum + i * W, dbias.sum), store(s.dbias.lost + i * W, dbias.lost);
    store_flat<F>(a_, plan_, a_.du, b, k, t, count, s.gb);
    store_flat<F>(a_, plan_, a_.ddelta, b, k, t, count, s.dd);
    if (gated) store_flat<F>(a_, plan_, a_.dz, b, k, t, count, s.dz);
  }

  // Sums over the item's time of a block, to the partials of (b, segment).
  void store_sums(const Item& item, Block k, int64_t i, Scratch<O>& s) {
    const int64_t size = plan_.vectors * O::row, row = (item.b * plan_.segments + item.segment) * a_.channels;
    const auto store_sum = [&](F* partial, const Sum<F>& sum) {
      store_state<O>(
          a_, plan_, partial + row * a_.states * O::comps, a_.states, 1, k, 0, plan_.vectors, sum.sum + i * size);
    };
    store_sum(dA_, s.dA);
    for (MatrixGradient<F>* m : matrices(s))
      if (m->groups == 0) store_sum(m->partial, m->constant);
    const auto store_lanes = [&](F* partial, const F* sum) {
      F total = 0;
      for (int j = 0; j < W; ++j) total += sum[j];
      for (int j = 0; j < k.channels; ++j) partial[row + k.channel + j] = plan_.state_lanes ? total : sum[j];
    };
    store_lanes(dD_, s.dD.sum + i * W), store_lanes(dbias_, s.dbias.sum + i * W);
    if (item.segment > 0 && !is_finite<O>(a_, plan_, k, s.g + i * size)) __atomic_store_n(broken_, 1, __ATOMIC_RELAXED);
  }

  void reduce() {
    reduce_constant(dA_, a_.dA, a_.states, O::comps, [](F* p, F x) { *p = x; }, static_cast<F*>(nullptr));
    if (a_.dD.data) reduce_constant(dD_, a_.dD, 1, 1, [](F* p, F x) { *p = x; }, static_cast<F*>(nullptr));
    if (a_.dbias.data) reduce_constant(dbias_, a_.dbias, 1, 1, [](F* p, F x) { *p = x; }, static_cast<F*>(nullptr));
    reduce_matrix(dB_, a_.dB), reduce_matrix(dC_, a_.dC);
  }

  // Partials (B, segments, D, columns) summed into (D, columns).
  template <class S, class Store>
  void reduce_constant(const F* partial, const ScanTensor& out, int64_t columns, int comps, const Store& put, S*) {
    const int64_t width = columns * comps, slice = a_.channels * width;
    scalekern::parallel(a_.channels, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d)
        for (int64_t n = 0; n < width; ++n) {
          F sum = 0;
          for (int64_t i = 0; i < a_.batch * plan_.segments; ++i) sum += partial[i * slice + d * width + n];
          put(reinterpret_cast<S*>(out.data) + (d * out.s[0] + n / comps * out.s[1]) * comps + n % comps, sum);
        }
    });
  }

  void reduce_matrix(const MatrixGradient<F>& m, const ScanTensor& out) {
    if (m.groups == 0) {
      with_matrix_storage<O>(a_.io, [&](auto* type) {
        reduce_constant(m.partial, out, a_.states, O::comps, [](auto* p, F x) { from_float(*p, x); }, type);
      });
      return;
    }
    if (m.slabs == nullptr) return;
    scalekern::parallel(a_.batch * m.groups * m.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % m.rows, group = i / m.rows % m.groups, b = i / m.rows / m.groups;
        F* sum = slab_row(m, 0, b, group, row);
        for (int64_t part = 1; part < plan_.parts; ++part) {
          const F* slab = slab_row(m, part, b, group, row);
          for (int64_t j = 0; j < a_.length * m.width; ++j) sum[j] += slab[j];
        }
        store_matrix(m, out, b, group, row, 0, a_.length, sum);
      }
    });
  }

  const ScanArgs& a_;
  Plan plan_;
  Carries<F> carries_{};
  int* broken_;
  F *dA_, *dD_, *dbias_;  // partials, (B, segments, D, N) and (B, segments, D)
  MatrixGradient<F> dB_{}, dC_{};
  int64_t bytes_;
};

// Parts of a group that the memory for their slabs of dB and dC allows: all temporaries and gradients together stay
// below twice the inputs.
template <class O>
int64_t affordable_parts(const ScanArgs& a) {
  using F = typename O::Scalar;
  const int64_t element = sizeof(F) == 8 ? 8 : a.io == 0 ? 4 : 2, matrix = O::comps == 2 ? 2 * int64_t(
      sizeof(F)) : element;
  const int64_t tokens = a.batch * a.length, matrices = tokens * a.states * (a.groups_B + a.groups_C);
  const int64_t inputs = tokens * a.channels * element * (a.z.data ? 4 : 3) + matrices * matrix;
  const int64_t gradients = inputs - tokens * a.channels * element;  // all inputs' but dout's
  const int64_t slab = matrices * O::comps * int64_t(sizeof(F));
  return slab == 0 ? a.channels : (2 * inputs - gradients) * 3 / 4 / slab;
}

template <class Body>
void with_backward(const ScanArgs& a, char* base, const Body& body) {
  const auto run = [&](auto operations) {
    using O = decltype(operations);
    const int64_t parts = affordable_parts<O>(a);
    Plan plan = make_plan<typename O::Scalar>(a, most(1, parts));
    plan.span = most(plan.span, a.chunk);
    if (parts < 1) plan.bundle = plan.blocks;  // no slab at all: chunks are final
    body(Backward<O>(a, plan, Arena(base)));
  };
  if (a.io == 1) a.complex_A ? run(ComplexState<double>{}) : run(RealState<double>{});
  else a.complex_A ? run(ComplexState<float>{}) : run(RealState<float>{});
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

int64_t selective_scan_bwd_workspace(const ScanArgs& a) {
  int64_t bytes = 0;
  with_backward(a, nullptr, [&](auto&& backward) { bytes = backward.bytes(); });
  return bytes;
}

void selective_scan_bwd(const ScanArgs& a) {
  with_backward(a, a.workspace, [&](auto&& backward) { backward.run(); });
}

}  // namespace scalekern::SCALEKERN_ISA
