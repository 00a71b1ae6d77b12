// Backward selective scan.
//
// Bound: at N = 16 the special-function unit, the shuffles and the issue slots about alike. The states are computed
// twice from each checkpoint (once to leave one state in eight in shared memory, once more eight tokens at a time,
// whose 8 x 4 states and decays then stay in registers): 2 x 16 - 2 exponentials a token and channel, and some 8 for
// step sizes and gates, which are computed once a token and channel and shared through shared memory; 9 shuffles a
// token and warp (a warp: 8 channels). By count 40 unit operations against 18 forward, so at most 1.0e11 tokens x
// channels a second on an H200, and as much by issue slots (about 75 instructions a state quad and token).
// Predicted: 4e10 to 7e10. Measured on an H200: 8.6e9 (15.6 ms at B8 D4096 N16 L4096; 1,585 instructions a token of 32
// channels, five times the count, and half of the issue slots). Plain rows have their own, cuda_scan_bwd_rows.cuh.
//
// Split: a thread owns 4 states of a channel, N / 4 lanes a channel, 384 threads (96 channels at N = 16) a block;
// tokens in sequence, from the last chunk to the first. One block an SM: 168 registers, 146 KB. Compiled and not taken:
// 256 threads in two blocks (128 registers) spill 300 bytes; 256 threads in one block (200) leave 8 warps an SM.
// Time is not split here: below about 132 x 96 channels times batch SMs stay idle.
// dB and dC are sums over channels: a warp reduces its 8 values (4 of dB, 4 of dC) over its channels by halving
// exchanges (7 shuffles in place of 24), the warps meet in shared memory, and every channel block writes its sums to a
// slot of a partial buffer; ReduceMatrix adds the slots in a fixed order. Where the slots of all blocks would be larger
// than a float for every token and channel, the blocks come in rounds that add to the slots of the round before.
//
// A token beyond the end of its chunk is an identity: step size 0, u, dout, B and C 0.
#pragma once
#include "selective_scan/cuda_scan.cuh"

namespace scalekern::scan {

struct BwdArgs {
  Problem p;
  Sequences dout, du, ddelta, dz;
  States dlast, dinitial;
  void *dA, *dB_constant, *dC_constant;  // (B, D, N), summed over B afterwards
  void *dD, *dbias;                      // (B, D), likewise
  void* partial;                         // (B, segments, slots, L, 2 padded): dB, dC summed over the channels of a slot
  int64_t slots, round;                  // slots a segment; this launch takes its blocks from round * slots on
  // Plain rows only (cuda_scan_bwd_rows.cuh). All channel blocks but the first `whole` are split over time: chunks, in
  // scan order, of chunk_tiles tiles; the adjoint on entering each from its end (B, chunks, D, N), its sum of steps
  // (B, chunks, D).
  int64_t whole, chunks, chunk_tiles;
  void *entry, *step_sum;
  int tokens, padded, pitch;             // tokens of a tile; states padded to whole threads; pitch of a tile's row
  int delta_at, dy_at, B_at, C_at, saved_at, sums_at, shared_bytes;  // u's tile is at 0
};

template <class T>
struct ScanBwd {
  using F = Compute<T>;
  using Args = BwdArgs;
  static constexpr bool kDouble = sizeof(F) == 8;
  static constexpr int kThreads = kDouble ? 128 : 384;
  static constexpr int kBlocks = 1;
  static constexpr int kStates = 4;
  static constexpr int kSteps = kDouble ? 4 : 8;  // tokens whose states stay in registers

  template <class X = F>
  static SK_DEVICE X* shared_at(int offset) {
    return reinterpret_cast<X*>(shared_memory() + offset);
  }

  struct Walk {
    F A[kStates], h[kStates], g[kStates];
    F dA[kStates], dB[kStates], dC[kStates];
    F D, dD, dbias;
    Channels block;
    int64_t batch, channel, slot;
    Sequence sequence;
    int row, lane;
    bool active;
  };

  // Tokens [t0, t0 + tokens) of a tile.
  struct Span {
    int64_t t0;
    int tokens;
  };

  static SK_DEVICE Walk begin_walk(const Args& a) {
    Walk w{};
    const int64_t segments = a.p.channels / a.p.segment;
    const int64_t within = block_index() % a.slots, rest = block_index() / a.slots, segment = rest % segments;
    w.batch = rest / segments;
    w.slot = (w.batch * segments + segment) * a.slots + within;
    const int64_t number = a.round * a.slots + within;
    const bool exists = number < a.p.blocks_per_segment;
    w.block = channels_of(a.p, segment * a.p.blocks_per_segment + (exists ? number : 0));
    if (!exists) w.block.count = 0;
    w.row = thread_index() / a.p.lanes, w.lane = thread_index() % a.p.lanes;
    w.active = w.row < w.block.count;
    w.channel = w.block.first + (w.active ? w.row : 0);
    const F* A = static_cast<const F*>(a.p.A.p) + w.channel * a.p.A.d;
    for (int i = 0; i < kStates; ++i) {
      const int n = 4 * w.lane + i;
      w.A[i] = w.active && n < a.p.states ? scaled_A(A[n * a.p.A.n]) : F(0);
    }
    if (a.p.D.p) w.D = static_cast<const F*>(a.p.D.p)[w.channel * a.p.D.d];
    return w;
  }

  static SK_DEVICE void load_row(const Args& a, const Walk& w, const F* row, int64_t stride, F (&x)[kStates]) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = 4 * w.lane + i;
      x[i] = w.active && row != nullptr && n < a.p.states ? row[n * stride] : F(0);
    }
  }

  static SK_DEVICE void save_row(const Args& a, const Walk& w, F* row, int64_t stride, const F (&x)[kStates]) {
    if (!w.active) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = 4 * w.lane + i;
      if (n < a.p.states) row[n * stride] = x[i];
    }
  }

  static SK_DEVICE F* row_of(const States& s, int64_t row, int64_t channel) {
    return s.p ? static_cast<F*>(s.p) + row * s.s + channel * s.d : nullptr;
  }

  static SK_DEVICE F value(const Sequences& s, int64_t batch, int64_t channel, int64_t t) {
    return F(widen(static_cast<const T*>(s.p)[batch * s.b + channel * s.d + t * s.l]));
  }

  // Calls body(row, token) for each element of the tile, neighbouring threads along the axis that is contiguous.
  template <class Body>
  static SK_DEVICE void for_elements(const Args& a, int tokens, Body&& body) {
    const int rows = a.p.channels_per_block, count = rows * tokens;
    const bool by_time = a.p.u.l == 1;
    for (int i = thread_index(); i < count; i += kThreads) {
      const int row = by_time ? i / tokens : i % rows;
      body(row, by_time ? i - row * tokens : i / rows);
    }
  }

  // u, step size and dy = dout silu(z) of a tile as F; B and C as F; zeros beyond the end.
  static SK_DEVICE void stage_tile(const Args& a, const Walk& w, Span span) {
    F *u = shared_at(0), *d = shared_at(a.delta_at), *dy = shared_at(a.dy_at);
    for_elements(a, a.tokens, [&](int row, int t) {
      const int at = row * a.pitch + t;
      u[at] = d[at] = dy[at] = 0;
      if (t >= span.tokens || row >= w.block.count) return;
      const int64_t channel = w.block.first + row, time = span.t0 + t;
      const F bias = a.p.bias.p ? static_cast<const F*>(a.p.bias.p)[channel * a.p.bias.d] : F(0);
      u[at] = value(a.p.u, w.batch, channel, time);
      d[at] = step_size(value(a.p.delta, w.batch, channel, time), bias, a.p.softplus);
      const F dout = value(a.dout, w.batch, channel, time);
      dy[at] = a.p.z.p ? dout * silu(value(a.p.z, w.batch, channel, time)) : dout;
    });
    stage_matrix(a, a.p.B, a.B_at, w, span);
    stage_matrix(a, a.p.C, a.C_at, w, span);
  }

  static SK_DEVICE void stage_matrix(const Args& a, const Matrix& m, int at, const Walk& w, Span span) {
    if (m.constant) return;
    const T* from = static_cast<const T*>(m.p) + m.offset(w.batch, w.block.first) + span.t0 * m.l;
    const bool by_time = m.l == 1;
    for (int i = thread_index(); i < a.tokens * a.padded; i += kThreads) {
      const int n = by_time ? i / a.tokens : i % a.padded, t = by_time ? i - n * a.tokens : i / a.padded;
      const bool inside = n < a.p.states && t < span.tokens;
      shared_at(at)[t * a.padded + n] = inside ? F(widen(from[n * m.n + t * m.l])) : F(0);
    }
  }

  static SK_DEVICE Quad<F> quad_of(const Args& a, const Matrix& m, int at, const Walk& w, int t) {
    const int row = m.constant ? (w.active ? w.row : 0) * (a.padded + 4) : t * a.padded;
    return load_quad(shared_at(at) + row + 4 * w.lane);
  }

  // Place in the tile of the j-th token, in scan order, of group g.
  static SK_DEVICE int token_of(const Args& a, int g, int j) {
    const int i = g * kSteps + j;
    return a.p.reverse ? a.tokens - 1 - i : i;
  }

  // Which of a group's tokens begin (bit j) and end (bit 16 + j) a sequence. Almost always none, found without a loop.
  static SK_DEVICE unsigned edges_of(const Args& a, Walk& w, Span span, int g) {
    const bool reverse = a.p.reverse;
    const int64_t entering = span.t0 + token_of(a, g, 0), leaving = span.t0 + token_of(a, g, kSteps - 1);
    const int64_t low = reverse ? leaving : entering, high = reverse ? entering : leaving;
    if (low > w.sequence.begin && high < w.sequence.end - 1) return 0;
    unsigned edges = 0;
#pragma unroll 1
    for (int j = 0; j < kSteps; ++j) {
      const int t = token_of(a, g, j);
      if (t >= span.tokens) continue;
      if (!w.sequence.holds(span.t0 + t)) w.sequence = sequence_at(a.p, w.batch, span.t0 + t);
      if (span.t0 + t == w.sequence.first(reverse)) edges |= 1u << j;
      if (span.t0 + t == w.sequence.last(reverse)) edges |= 1u << (16 + j);
    }
    return edges;
  }

  static SK_DEVICE void load_initial(const Args& a, Walk& w, int64_t t) {
    load_row(a, w, row_of(a.p.initial, sequence_at(a.p, w.batch, t).row, w.channel), a.p.initial.n, w.h);
  }

  // Takes the state through the tile, leaving in shared memory the one on entering each group (if `save`).
  static SK_DEVICE void advance_tile(const Args& a, Walk& w, Span span, bool save) {
    const F *u = shared_at(0) + w.row * a.pitch, *d = shared_at(a.delta_at) + w.row * a.pitch;
    const int groups = a.tokens / kSteps;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      if (save) {
        for (int i = 0; i < kStates; ++i) shared_at(a.saved_at)[(g * kStates + i) * kThreads + thread_index()] = w.h[i];
        if (g == groups - 1) return;
      }
      const unsigned edges = edges_of(a, w, span, g);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const int t = token_of(a, g, j);
        if (edges >> j & 1) load_initial(a, w, span.t0 + t);
        const Quad<F> B = quad_of(a, a.p.B, a.B_at, w, t);
        const F step = d[t], du = step * u[t];
#pragma unroll
        for (int i = 0; i < kStates; ++i) w.h[i] = advance(decay_of(step, w.A[i], i), w.h[i], du, B.v[i]);
      }
    }
  }

  // Adds the 8 values of all channels of the warp by halving: after the k-th exchange a thread keeps half as many
  // values. They end at x[0 .. left), values base .. base + left of the 8.
  static SK_DEVICE int reduce_channels(const Args& a, F (&x)[2 * kStates], int& base) {
    int left = 2 * kStates;
    base = 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int mask = a.p.lanes << k, half = kStates >> k;
      if (mask >= 32) break;
      const bool upper = thread_index() & mask;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const F keep = upper ? x[half + i] : x[i], give = upper ? x[i] : x[half + i];
        x[i] = keep + shuffle_xor(give, mask);
      }
      base += upper ? half : 0;
      left = half;
    }
    for (int mask = a.p.lanes << 3; mask < 32; mask *= 2) x[0] += shuffle_xor(x[0], mask);
    return left;
  }

  // dB and dC of one token into this warp's row of the sums.
  static SK_DEVICE void add_matrix_gradients(const Args& a, const Walk& w, int j, F (&x)[2 * kStates]) {
    int base;
    const int left = reduce_channels(a, x, base);
    if (a.p.lanes << 3 < 32 && (thread_index() & 31) >= a.p.lanes << 3) return;  // holds a copy
    F* row = shared_at(a.sums_at) + (thread_index() / 32 * kSteps + j) * 2 * a.padded + 4 * w.lane;
#pragma unroll
    for (int i = 0; i < 2 * kStates; ++i) {
      if (i >= left) break;
      const int v = base + i;
      row[v / kStates * a.padded + v % kStates] = x[i];
    }
  }

  // Sums of the warps, in order, to this block's slot.
  static SK_DEVICE void store_matrix_gradients(const Args& a, const Walk& w, Span span, int g) {
    if (a.partial == nullptr) return;
    const int width = 2 * a.padded;
    for (int i = thread_index(); i < kSteps * width; i += kThreads) {
      const int j = i / width, t = token_of(a, g, j);
      if (t >= span.tokens) continue;
      F sum = 0;
      for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared_at(a.sums_at)[warp * kSteps * width + i];
      F& slot = static_cast<F*>(a.partial)[(w.slot * a.p.length + span.t0 + t) * width + i - j * width];
      slot = a.round == 0 ? sum : slot + sum;
    }
  }

  // Sums over the lanes of a channel of three values a token, by halving; then du, ddelta and y of the tokens that
  // fall to this thread replace u, the step size and dy in the tile.
  static SK_DEVICE void finish_tokens(
      const Args& a, Walk& w, Span span, int g, F (&y)[kSteps], F (&gB)[kSteps], F (&gA)[kSteps]) {
    int base = 0, left = kSteps;
#pragma unroll
    for (int k = 0; (kSteps >> k) > 1; ++k) {
      const int mask = 1 << k, half = kSteps >> (k + 1);
      if (mask >= a.p.lanes) break;
      const bool upper = thread_index() & mask;
      const auto exchange = [&](F(&x)[kSteps], int i) {
        const F keep = upper ? x[half + i] : x[i], give = upper ? x[i] : x[half + i];
        x[i] = keep + shuffle_xor(give, mask);
      };
#pragma unroll
      for (int i = 0; i < half; ++i) exchange(y, i), exchange(gB, i), exchange(gA, i);
      base += upper ? half : 0;
      left = half;
    }
    for (int mask = kSteps; mask < a.p.lanes; mask *= 2)
      y[0] += shuffle_xor(y[0], mask), gB[0] += shuffle_xor(gB[0], mask), gA[0] += shuffle_xor(gA[0], mask);
    sync_warp();  // every lane has read its channel's tokens
    if (w.lane >= kSteps) return;  // holds a copy
    F *u = shared_at(0) + w.row * a.pitch, *d = shared_at(a.delta_at) + w.row * a.pitch;
    F* dy = shared_at(a.dy_at) + w.row * a.pitch;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (j >= left) break;
      const int t = token_of(a, g, base + j);
      if (t >= span.tokens) continue;
      const F step = d[t], x = u[t], dyt = dy[t];
      F ddelta = fused(gB[j], x, gA[j] * F(0.69314718055994530942));  // A is scaled by log2 e
      if (a.p.softplus) ddelta *= softplus_slope(step);
      w.dbias += ddelta;
      w.dD = fused(dyt, x, w.dD);
      u[t] = fused(gB[j], step, w.D * dyt);
      d[t] = ddelta;
      dy[t] = fused(w.D, x, y[j]);
    }
  }

  // One group, backward in time: states and decays first, then the adjoint g.
  static SK_DEVICE void sweep_group(const Args& a, Walk& w, Span span, int g) {
    const F *u = shared_at(0) + w.row * a.pitch, *d = shared_at(a.delta_at) + w.row * a.pitch;
    const F* dy = shared_at(a.dy_at) + w.row * a.pitch;
    const unsigned edges = edges_of(a, w, span, g);
    F before[kSteps][kStates], decay[kSteps][kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i) w.h[i] = shared_at(a.saved_at)[(g * kStates + i) * kThreads + thread_index()];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int t = token_of(a, g, j);
      if (edges >> j & 1) load_initial(a, w, span.t0 + t);
      const Quad<F> B = quad_of(a, a.p.B, a.B_at, w, t);
      const F step = d[t], du = step * u[t];
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        before[j][i] = w.h[i];
        decay[j][i] = decay_of(step, w.A[i], i);
        w.h[i] = advance(decay[j][i], w.h[i], du, B.v[i]);
      }
    }
    F y[kSteps], gB[kSteps], gA[kSteps];
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      const int t = token_of(a, g, j);
      if (edges >> (16 + j) & 1)
        load_row(a, w, row_of(a.dlast, sequence_at(a.p, w.batch, span.t0 + t).row, w.channel), a.dlast.n, w.g);
      const Quad<F> B = quad_of(a, a.p.B, a.B_at, w, t), C = quad_of(a, a.p.C, a.C_at, w, t);
      const F step = d[t], du = step * u[t], dyt = dy[t];
      F x[2 * kStates];
      y[j] = gB[j] = gA[j] = 0;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const F carried = decay[j][i] * before[j][i], h = fused(du, B.v[i], carried);
        w.g[i] = fused(C.v[i], dyt, w.g[i]);
        y[j] = fused(C.v[i], h, y[j]);
        x[i] = w.g[i] * du, x[kStates + i] = h * dyt;
        const F dE = w.g[i] * carried;  // the gradient of step * A
        w.dA[i] = fused(dE, step, w.dA[i]);
        gA[j] = fused(dE, w.A[i], gA[j]);
        gB[j] = fused(w.g[i], B.v[i], gB[j]);
        w.g[i] *= decay[j][i];
      }
      if (a.p.B.constant) {
        for (int i = 0; i < kStates; ++i) w.dB[i] += x[i];
      }
      if (a.p.C.constant) {
        for (int i = 0; i < kStates; ++i) w.dC[i] += x[kStates + i];
      }
      if (a.partial != nullptr) add_matrix_gradients(a, w, j, x);
      if ((edges >> j & 1) && a.dinitial.p)
        save_row(a, w, row_of(a.dinitial, sequence_at(a.p, w.batch, span.t0 + t).row, w.channel), a.dinitial.n, w.g);
    }
    finish_tokens(a, w, span, g, y, gB, gA);
  }

  // The tile's gradients to global memory.
  static SK_DEVICE void store_tile(const Args& a, const Walk& w, Span span) {
    const F *du = shared_at(0), *ddelta = shared_at(a.delta_at), *y = shared_at(a.dy_at);
    const auto put = [&](const Sequences& s, int64_t channel, int64_t t, F x) {
      static_cast<T*>(s.p)[w.batch * s.b + channel * s.d + t * s.l] = narrow<T>(x);
    };
    for_elements(a, a.tokens, [&](int row, int t) {
      if (t >= span.tokens || row >= w.block.count) return;
      const int at = row * a.pitch + t;
      const int64_t channel = w.block.first + row, time = span.t0 + t;
      put(a.du, channel, time, du[at]);
      put(a.ddelta, channel, time, ddelta[at]);
      if (a.p.z.p) {
        const F z = value(a.p.z, w.batch, channel, time);
        put(a.dz, channel, time, value(a.dout, w.batch, channel, time) * y[at] * silu_slope(z, sigmoid(z)));
      }
    });
  }

  static SK_DEVICE Span span_of(const Args& a, int64_t chunk_begin, int64_t chunk_end, int64_t tile) {  // in scan order
    const int64_t tiles = (chunk_end - chunk_begin + a.tokens - 1) / a.tokens;
    const int64_t t0 = chunk_begin + (a.p.reverse ? tiles - 1 - tile : tile) * a.tokens;
    return {t0, int(chunk_end - t0 < a.tokens ? chunk_end - t0 : a.tokens)};
  }

  static SK_DEVICE void sweep_tile(const Args& a, Walk& w, Span span) {
#pragma unroll 1
    for (int g = a.tokens / kSteps - 1; g >= 0; --g) {
      sweep_group(a, w, span, g);
      sync_threads();
      store_matrix_gradients(a, w, span, g);
      sync_threads();
    }
    store_tile(a, w, span);
  }

  static SK_DEVICE void save_parameter_gradients(const Args& a, Walk& w) {
    for (int m = 1; m < a.p.lanes; m *= 2) w.dD += shuffle_xor(w.dD, m), w.dbias += shuffle_xor(w.dbias, m);
    const int64_t row = w.batch * a.p.channels + w.channel;
    save_row(a, w, static_cast<F*>(a.dA) + row * a.p.states, 1, w.dA);
    if (a.p.B.constant) save_row(a, w, static_cast<F*>(a.dB_constant) + row * a.p.states, 1, w.dB);
    if (a.p.C.constant) save_row(a, w, static_cast<F*>(a.dC_constant) + row * a.p.states, 1, w.dC);
    if (!w.active || w.lane != 0) return;
    static_cast<F*>(a.dD)[row] = w.dD;
    static_cast<F*>(a.dbias)[row] = w.dbias;
  }

  static SK_DEVICE void run(const Args& a) {
    Walk w = begin_walk(a);
    if (a.p.B.constant) load_constant<T>(shared_at(a.B_at), a.padded, a.p.B, w.block, a.p.states, kThreads);
    if (a.p.C.constant) load_constant<T>(shared_at(a.C_at), a.padded, a.p.C, w.block, a.p.states, kThreads);
    const int64_t chunks = (a.p.length + a.p.checkpoint_stride - 1) / a.p.checkpoint_stride;
#pragma unroll 1
    for (int64_t c = chunks - 1; c >= 0; --c) {  // in scan order, from the last
      const int64_t slot = a.p.reverse ? chunks - 1 - c : c, begin = slot * a.p.checkpoint_stride;
      const int64_t end = begin + a.p.checkpoint_stride < a.p.length ? begin + a.p.checkpoint_stride : a.p.length;
      const int64_t tiles = (end - begin + a.tokens - 1) / a.tokens;
#pragma unroll 1
      for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        load_row(a, w, checkpoint<F>(a.p, w.batch, slot, w.channel), 1, w.h);
#pragma unroll 1
        for (int64_t i = 0; i <= tile; ++i) {  // one tile a chunk where N is 9 to 32; else catch up
          const Span span = span_of(a, begin, end, i);
          sync_threads();
          stage_tile(a, w, span);
          sync_threads();
          advance_tile(a, w, span, i == tile);
        }
        sweep_tile(a, w, span_of(a, begin, end, tile));
      }
    }
    save_parameter_gradients(a, w);
  }
};

}  // namespace scalekern::scan
