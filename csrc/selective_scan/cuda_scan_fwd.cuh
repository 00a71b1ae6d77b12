// Forward selective scan.
//
// Bound: at N = 16 the special-function unit, 16 exponentials a clock and SM. A token of a channel takes 16 for the
// decays and 3 for softplus and the gate (two exponentials, a reciprocal; the logarithm is a polynomial): with 2 of the
// 16 moved to the FMA pipe 17 unit operations, so at most 132 * 16 * 1.98e9 / 17 = 2.5e11 tokens x channels a second on
// an H200. Issue slots are as close: about 130 instructions a token and warp, 33 clocks against 34 of the unit.
// Memory: 8 bytes a token and channel in bf16 with a gate, 5.4e11 a second at 4.3 TB/s, is not the limit.
// Predicted from that: 1.2e11 to 1.6e11 at B8 D4096 N16 L4096. Measured on an H200: 7.1e10 (1.90 ms; 241 instructions a
// token of 32 channels in place of 130, half of the issue slots empty with two warps a scheduler). What plain rows need
// has its own kernel now (cuda_scan_fwd_rows.cuh, 0.84 ms); this one takes the rest.
//
// Split: a thread owns one channel and 16 of its states (4 when the channels alone do not fill the GPU or N <= 8),
// walks the tokens in sequence and keeps state and A in registers. 128 threads a block share B and C, widened to F in
// shared memory once a tile, so that a quad of them is one broadcast load. u, delta and z come in through asynchronous
// copies, one tile ahead, in the layout they have in memory; the output leaves through shared memory. A tile is 64
// bytes of a row: 72 KB a block at N = 16 in bf16, and some 230 registers a thread: two blocks an SM. B8 D4096 has 256
// blocks, two for nearly every SM, so that a scheduler has two warps of 16 independent states.
//
// Where B x D is too small to fill the GPU, time is split too, in chunks of whole checkpoints: every chunk is first
// scanned from zero (ScanFwd<.., true>: states and the sum of step sizes only), JoinChunks carries states across chunks
// with exp(A sum d), and the scan proper starts each chunk from its state. That costs the exponentials twice.
//
// Groups of 8 tokens inside one sequence take the unrolled path; the ragged end and groups that cross a packed boundary
// go token by token.
#pragma once
#include "selective_scan/cuda_scan.cuh"

namespace scalekern::scan {

struct FwdArgs {
  Problem p;
  Sequences out;
  States last;
  void* entry;     // (B, chunks, D, N): state on entering the chunk, in scan order; null without split
  void* step_sum;  // (B, chunks, D)
  int64_t chunk_tokens, chunks;
  int tokens, padded;  // a tile's tokens; states padded to whole threads
  Tile u, delta, z, out_tile, B_raw, C_raw;
  int u_at, delta_at, z_at, B_raw_at, C_raw_at, buffer_bytes;  // within one of the two buffers
  int out_at, B_at, C_at, shared_bytes;                        // out_at < 0: the output replaces u in its tile
};

template <class T, int kStates, bool kLocal>
struct ScanFwd {
  using F = Compute<T>;
  using Args = FwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;

  // Where this thread works.
  struct Place {
    int64_t batch, chunk, channel;  // chunk in scan order
    Channels block;
    int row, lane;
    bool active;
  };

  static SK_DEVICE Place place_of(const Args& a) {
    const int64_t scanned = kLocal ? a.chunks - 1 : a.chunks;
    const int64_t chunk = block_index() % scanned, rest = block_index() / scanned;
    const int64_t blocks = a.p.channel_blocks();
    const Channels block = channels_of(a.p, rest % blocks);
    const int row = thread_index() / a.p.lanes;
    const bool active = row < block.count;
    const int used = active ? row : 0;
    return {rest / blocks, chunk, block.first + used, block, used, thread_index() % a.p.lanes, active};
  }

  template <class X>
  static SK_DEVICE X* shared_at(int offset) {
    return reinterpret_cast<X*>(shared_memory() + offset);
  }

  static SK_DEVICE void stage_rows(
      const Sequences& s, const Tile& shape, int at, const Place& w, int64_t t, int tokens) {
    const T* src = static_cast<const T*>(s.p) + w.batch * s.b + w.block.first * s.d + t * s.l;
    stage(shared_at<T>(at), shape, src, s.d, s.l, w.block.count, tokens, kThreads);
  }

  static SK_DEVICE void stage_matrix(
      const Args& a, const Matrix& m, const Tile& shape, int at, const Place& w, int64_t t, int tokens) {
    if (m.constant) return;
    const T* src = static_cast<const T*>(m.p) + m.offset(w.batch, w.block.first) + t * m.l;
    stage(shared_at<T>(at), shape, src, m.n, m.l, a.p.states, tokens, kThreads);
  }

  static SK_DEVICE void stage_tile(const Args& a, const Place& w, int buffer, int64_t t, int tokens) {
    const int base = buffer * a.buffer_bytes;
    stage_rows(a.p.u, a.u, base + a.u_at, w, t, tokens);
    stage_rows(a.p.delta, a.delta, base + a.delta_at, w, t, tokens);
    stage_matrix(a, a.p.B, a.B_raw, base + a.B_raw_at, w, t, tokens);
    if constexpr (!kLocal) {
      if (a.p.z.p) stage_rows(a.p.z, a.z, base + a.z_at, w, t, tokens);
      stage_matrix(a, a.p.C, a.C_raw, base + a.C_raw_at, w, t, tokens);
    }
    copy_commit();
  }

  // Everything that a thread keeps while it walks.
  struct Walk {
    F h[kStates], A[kStates];
    F D, bias, step_sum;
    Sequence sequence;
    int64_t batch, channel;
    int lane, states;  // that are not padding
    bool active;
  };

  static SK_DEVICE void load_states(const Args& a, Walk& w, const F* row, int64_t stride) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = state_of(a.p.lanes, w.lane, i);
      w.h[i] = row != nullptr && n < a.p.states ? row[n * stride] : F(0);
    }
  }

  static SK_DEVICE void save_states(const Args& a, const Walk& w, F* row, int64_t stride) {
    if (!w.active) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = state_of(a.p.lanes, w.lane, i);
      if (n < a.p.states) row[n * stride] = w.h[i];
    }
  }

  static SK_DEVICE F* entry_row(const Args& a, const Walk& w, int64_t chunk) {
    return static_cast<F*>(a.entry) + ((w.batch * a.chunks + chunk) * a.p.channels + w.channel) * a.p.states;
  }

  static SK_DEVICE Walk begin_walk(const Args& a, const Place& place) {
    Walk w{};
    w.batch = place.batch, w.channel = place.channel, w.lane = place.lane, w.active = place.active;
    const F* A = static_cast<const F*>(a.p.A.p) + w.channel * a.p.A.d;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = state_of(a.p.lanes, w.lane, i);
      w.states += n < a.p.states ? 1 : 0;
      w.A[i] = n < a.p.states ? scaled_A(A[n * a.p.A.n]) : F(0);
    }
    if (a.p.D.p) w.D = static_cast<const F*>(a.p.D.p)[w.channel * a.p.D.d];
    if (a.p.bias.p) w.bias = static_cast<const F*>(a.p.bias.p)[w.channel * a.p.bias.d];
    load_states(a, w, !kLocal && place.chunk > 0 ? entry_row(a, w, place.chunk) : nullptr, 1);
    w.sequence = {0, 0, 0};
    return w;
  }

  // On entering token t: the sequence's initial state, the checkpoint.
  static SK_DEVICE void enter(const Args& a, Walk& w, int64_t t) {
    if (!w.sequence.holds(t)) w.sequence = sequence_at(a.p, w.batch, t);
    if (t == w.sequence.first(a.p.reverse)) {
      const States& s = a.p.initial;
      load_states(a, w, s.p ? static_cast<const F*>(s.p) + w.sequence.row * s.s + w.channel * s.d : nullptr, s.n);
    }
    if constexpr (!kLocal) {
      const int64_t slot = slot_at(a.p, t);
      if (slot >= 0) save_states(a, w, checkpoint<F>(a.p, w.batch, slot, w.channel), 1);
    }
  }

  static SK_DEVICE void leave(const Args& a, const Walk& w, int64_t t) {
    if constexpr (!kLocal) {
      if (t == w.sequence.last(a.p.reverse))
        save_states(a, w, static_cast<F*>(a.last.p) + w.sequence.row * a.last.s + w.channel * a.last.d, a.last.n);
    }
  }

  // One token: the state moves on, and this thread's share of C h comes back. b and c are its first quads. An infinite
  // du makes NaN of padded states (0 * Inf), which then must stay out of the sum: kPadded.
  template <bool kPadded>
  static SK_DEVICE F step(Walk& w, F d, F du, const F* b, const F* c, int quad_stride) {
    F y[4] = {0, 0, 0, 0};
#pragma unroll
    for (int q = 0; q < kStates / 4; ++q) {
      const Quad<F> B = load_quad(b + q * quad_stride);
      Quad<F> C{};
      if constexpr (!kLocal) C = load_quad(c + q * quad_stride);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 4 * q + e;
        w.h[i] = advance(decay_of(d, w.A[i], i), w.h[i], du, B.v[e]);
        if (!kLocal && (!kPadded || i < w.states)) y[e] = fused(C.v[e], w.h[i], y[e]);
      }
    }
    return (y[0] + y[1]) + (y[2] + y[3]);
  }

  // Pointers of one tile for one thread.
  struct Operands {
    const T *u, *delta, *z;
    T* out;
    const F *B, *C;
    int B_time, C_time, quad_stride, row;
  };

  static SK_DEVICE Operands operands_of(const Args& a, const Place& place, int buffer) {
    const int base = buffer * a.buffer_bytes, quad = 4 * place.lane;
    Operands o{};
    o.row = place.row, o.quad_stride = 4 * a.p.lanes;
    o.u = shared_at<T>(base + a.u_at), o.delta = shared_at<T>(base + a.delta_at);
    o.B = shared_at<F>(a.B_at) + quad + (a.p.B.constant ? place.row * (a.padded + 4) : 0);
    o.B_time = a.p.B.constant ? 0 : a.padded;
    if constexpr (!kLocal) {
      o.z = a.p.z.p ? shared_at<T>(base + a.z_at) : nullptr;
      o.out = shared_at<T>(a.out_at < 0 ? base + a.u_at : a.out_at);
      o.C = shared_at<F>(a.C_at) + quad + (a.p.C.constant ? place.row * (a.padded + 4) : 0);
      o.C_time = a.p.C.constant ? 0 : a.padded;
    }
    return o;
  }

  // Eight tokens of one sequence; `first` is the earliest one's place in the tile.
  template <bool kPadded>
  static SK_DEVICE void group(const Args& a, Walk& w, const Operands& o, int first) {
    const bool reverse = a.p.reverse;
    F u[kGroup], d[kGroup], y[kGroup];
    load_group(o.delta, a.delta, o.row, first, reverse, d);
    load_group(o.u, a.u, o.row, first, reverse, u);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) d[j] = step_size(d[j], w.bias, a.p.softplus);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int t = first + (reverse ? kGroup - 1 - j : j);
      y[j] = step<kPadded>(w, d[j], d[j] * u[j], o.B + t * o.B_time, o.C + t * o.C_time, o.quad_stride);
      if constexpr (kLocal) w.step_sum += d[j];
    }
    if constexpr (!kLocal) finish_group(a, w, o, first, y);
  }

  static SK_DEVICE void finish_group(const Args& a, const Walk& w, const Operands& o, int first, F (&y)[kGroup]) {
    const bool reverse = a.p.reverse;
    for (int m = 1; m < a.p.lanes; m *= 2) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) y[j] += shuffle_xor(y[j], m);
    }
    if (a.p.D.p) {
      F u[kGroup];  // read again, rather than kept in registers
      load_group(o.u, a.u, o.row, first, reverse, u);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) y[j] = fused(w.D, u[j], y[j]);
    }
    if (o.z) {
      F z[kGroup];
      load_group(o.z, a.z, o.row, first, reverse, z);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) y[j] *= silu(z[j]);
    }
    sync_warp();  // every lane has read u, whose place the output may take
    if (w.active && w.lane == 0) store_group(o.out, a.out_tile, o.row, first, reverse, y);
  }

  // One token by itself.
  static SK_DEVICE void token(const Args& a, Walk& w, const Operands& o, int t) {
    const F u = widen(o.u[o.row * a.u.row + t * a.u.time]);
    const F d = step_size(F(widen(o.delta[o.row * a.delta.row + t * a.delta.time])), w.bias, a.p.softplus);
    F y = step<true>(w, d, d * u, o.B + t * o.B_time, o.C + t * o.C_time, o.quad_stride);
    if constexpr (kLocal) {
      w.step_sum += d;
    } else {
      for (int m = 1; m < a.p.lanes; m *= 2) y += shuffle_xor(y, m);
      if (a.p.D.p) y = fused(w.D, u, y);
      if (o.z) y *= silu(F(widen(o.z[o.row * a.z.row + t * a.z.time])));
      sync_warp();
      if (w.active && w.lane == 0) o.out[o.row * a.out_tile.row + t * a.out_tile.time] = narrow<T>(y);
    }
  }

  // The tokens [t0, t0 + tokens) of one tile.
  static SK_DEVICE void walk_tile(const Args& a, Walk& w, const Operands& o, int64_t t0, int tokens) {
    const bool reverse = a.p.reverse;
    const int groups = (tokens + kGroup - 1) / kGroup;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      const int first = (reverse ? groups - 1 - g : g) * kGroup;
      const int64_t low = t0 + first, high = low + kGroup - 1;
      const int64_t entering = reverse ? high : low, leaving = reverse ? low : high;
      const bool whole = first + kGroup <= tokens;
      if (whole && !w.sequence.holds(entering)) w.sequence = sequence_at(a.p, w.batch, entering);
      if (whole && w.sequence.holds(leaving)) {
        enter(a, w, entering);
        kLocal || a.p.states == a.padded ? group<false>(a, w, o, first) : group<true>(a, w, o, first);
        leave(a, w, leaving);
        continue;
      }
#pragma unroll 1
      for (int j = 0; j < kGroup; ++j) {
        const int t = first + (reverse ? kGroup - 1 - j : j);
        if (t >= tokens) continue;
        enter(a, w, t0 + t);
        token(a, w, o, t);
        leave(a, w, t0 + t);
      }
    }
  }

  static SK_DEVICE void run(const Args& a) {
    const Place place = place_of(a);
    const int64_t chunk = a.p.reverse ? a.chunks - 1 - place.chunk : place.chunk;
    const int64_t begin = chunk * a.chunk_tokens;
    const int64_t end = begin + a.chunk_tokens < a.p.length ? begin + a.chunk_tokens : a.p.length;
    const int64_t tiles = (end - begin + a.tokens - 1) / a.tokens;
    const auto tile_begin = [&](int64_t i) { return begin + (a.p.reverse ? tiles - 1 - i : i) * a.tokens; };
    const auto tile_tokens = [&](int64_t t) { return int(end - t < a.tokens ? end - t : a.tokens); };

    stage_tile(a, place, 0, tile_begin(0), tile_tokens(tile_begin(0)));
    const auto constant = [&](const Matrix& m, int at) {
      if (m.constant) load_constant<T>(shared_at<F>(at), a.padded, m, place.block, a.p.states, kThreads);
    };
    constant(a.p.B, a.B_at);
    if constexpr (!kLocal) constant(a.p.C, a.C_at);
    Walk w = begin_walk(a, place);
#pragma unroll 1
    for (int64_t i = 0; i < tiles; ++i) {
      const int buffer = int(i & 1), base = buffer * a.buffer_bytes;
      const int64_t t = tile_begin(i);
      const int tokens = tile_tokens(t);
      copy_wait();
      sync_threads();  // the tile has landed; the last one's output is stored, its buffer is free
      if (i + 1 < tiles) stage_tile(a, place, buffer ^ 1, tile_begin(i + 1), tile_tokens(tile_begin(i + 1)));
      const auto widen_tile = [&](const Matrix& m, int at, int raw_at, const Tile& raw) {
        if (m.constant) return;
        widen_matrix(shared_at<F>(at), a.padded, shared_at<T>(base + raw_at), raw, a.p.states, tokens, kThreads);
      };
      widen_tile(a.p.B, a.B_at, a.B_raw_at, a.B_raw);
      if constexpr (!kLocal) widen_tile(a.p.C, a.C_at, a.C_raw_at, a.C_raw);
      sync_threads();
      walk_tile(a, w, operands_of(a, place, buffer), t, tokens);
      if constexpr (!kLocal) {
        sync_threads();
        T* out = static_cast<T*>(a.out.p) + place.batch * a.out.b + place.block.first * a.out.d + t * a.out.l;
        const T* from = shared_at<T>(a.out_at < 0 ? base + a.u_at : a.out_at);
        unstage(from, a.out_tile, out, a.out.d, a.out.l, place.block.count, tokens, kThreads);
      }
    }
    if constexpr (kLocal) {
      save_states(a, w, entry_row(a, w, place.chunk + 1), 1);
      if (w.active && w.lane == 0)
        static_cast<F*>(a.step_sum)[(w.batch * a.chunks + place.chunk) * a.p.channels + w.channel] = w.step_sum;
    }
  }
};

// Turns the states that chunks end with when they start from zero into the states that they start with.
template <class F>
struct JoinChunks {
  using Args = FwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index(), states = a.p.states;
    if (i >= a.p.batch * a.p.channels * states) return;
    const int64_t n = i % states, channel = i / states % a.p.channels, batch = i / states / a.p.channels;
    const F A = scaled_A(static_cast<const F*>(a.p.A.p)[channel * a.p.A.d + n * a.p.A.n]);
    F h = 0;
    for (int64_t chunk = 1; chunk < a.chunks; ++chunk) {
      const int64_t before = chunk - 1, place = a.p.reverse ? a.chunks - 1 - before : before;
      const int64_t begin = place * a.chunk_tokens, last = begin + a.chunk_tokens;
      F& entry = static_cast<F*>(a.entry)[((batch * a.chunks + chunk) * a.p.channels + channel) * states + n];
      const F sum = static_cast<const F*>(a.step_sum)[(batch * a.chunks + before) * a.p.channels + channel];
      // Where a sequence begins inside the chunk, what came before it does not matter.
      const bool cut = begins_within(a.p, begin, last < a.p.length ? last : a.p.length);
      h = cut ? entry : fused(exp2_unit(A * sum), h, entry);
      entry = h;
    }
  }
};

// A packed sequence without tokens ends in the state in which it began: to[s] = from[s], zero when from is absent.
template <class F>
struct EmptySequences {
  struct Args {
    Problem p;
    States to, from;
  };
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t s = block_index();
    if (a.p.cu[s] < a.p.cu[s + 1]) return;
    for (int64_t i = thread_index(); i < a.p.channels * a.p.states; i += kThreads) {
      const int64_t channel = i / a.p.states, n = i % a.p.states;
      const auto at = [&](const States& x) { return s * x.s + channel * x.d + n * x.n; };
      static_cast<F*>(a.to.p)[at(a.to)] = a.from.p ? static_cast<const F*>(a.from.p)[at(a.from)] : F(0);
    }
  }
};

}  // namespace scalekern::scan
