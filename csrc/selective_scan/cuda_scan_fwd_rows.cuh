// Forward selective scan of plain rows (takes_rows), the common case: at most 16 states, time contiguous on 16-byte
// bounds, nothing packed. cuda_scan_fwd.cuh has the general kernel, whose split of time and JoinChunks this one shares.
//
// Bound: the special-function unit, 16 lanes a clock and SM, 8 clocks of a scheduler for a warp's instruction. A token
// of a channel takes 16 exponentials for the decays, one for softplus, two operations for the gate: 19, of which one
// lane a channel moves one to the FMA pipe (18: 144 clocks a token of 32 channels, 0.58 ms at B8 D4096 L4096 on an
// H200; two move none: 152 clocks, 0.61 ms). Issue slots come next, counted in the code for sm_90a, bf16, gated,
// with softplus: 129 instructions a token of 32 channels with one lane a channel, 135 with two (5 for each state, 8
// loads of B and C, 10 softplus, 12 the polynomial exponential, 7 the gate, 4 to widen and narrow, the rest addresses
// and the skip), and 2 to 4 for the turn of a tile. The general kernel takes 241, and 1.90 ms there.
//
// Split: a thread owns a channel and 16 states (kLanes 1: 168 registers, three blocks an SM), or two threads half a
// warp apart own 8 each (kLanes 2: 128 registers, four blocks of half as many channels); each then computes the step
// sizes and gates of 4 of the 8 tokens of a group. A group's u and delta are loaded while the one before is computed,
// its z when it begins; B and C of 64 tokens lie in shared memory in scan order, the next 64 in registers.
//
// Tried and lost: elements of 16 bits instead of words (a register each, 8 instructions a token to sort them); zeros
// for the padding with a branch for 0 * Inf (a second loop, spills); reverse as a flag in the loop (3 instructions a
// token); choices by lane without masks (the compiler makes a branch of them, with a shuffle on either side).
// Measured on an H200, B8 D4096 N16 L4096, bf16, gated: 0.844 ms, 1.6e11 tokens x channels a second, 74 % of what the
// exponentials allow and 2.7 times mamba_ssm 2.3.2; with two lanes a channel 1.02 ms, so one it is, for few channels
// too (B1 D1536 L16384: 0.31 against 0.37). Without the barrier that keeps the compiler from moving the loads of the
// next group down to their use: 1.13 ms.
#pragma once
#include "selective_scan/cuda_scan_fwd.cuh"
#include "selective_scan/cuda_scan_rows.cuh"

namespace scalekern::scan {

// One in kRowsPolyEvery of a lane's exponentials leaves the special-function unit alone: 1 of 16 with one lane a
// channel, none of 8 with two (each costs 13 issue slots and saves 8 clocks of the unit).
constexpr int kRowsPolyEvery = 16;

// Fewer than 16 states are filled up with copies of themselves, which share out C: with zeros, an infinite du would
// make NaN of the padding (0 * Inf) and of all outputs.
template <class T, int kLanes, bool kLocal>
struct ScanFwdRows {
  using F = Compute<T>;
  using Args = FwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = kLanes == 2 && sizeof(T) == 2 ? 4 : 3;
  static constexpr int kStates = kRowStates / kLanes;
  static constexpr int kMine = kGroup / kLanes;  // tokens of a group whose step sizes and gates this lane computes
  static constexpr int kSwap = 16;               // the other lane of a channel is this far away
  // B or C in scan order, groups of 8 tokens apart by more than their states: threads that store then meet in no bank.
  static constexpr int kGroupPitch = kGroup * kRowStates + 4;
  static constexpr int kTile = kRowTokens / kGroup * kGroupPitch;
  static constexpr int kSharedBytes = int(sizeof(float)) * 4 * kTile;

  struct Walk {
    F h[kStates], A[kStates];
    F D, bias, step_sum;
    int batch, channel, lane;
    bool active, skips;
  };

  static SK_DEVICE void load_states(const Args& a, Walk& w, const F* row, int64_t stride) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      w.h[i] = row != nullptr ? row[state_of(kLanes, w.lane, i) % a.p.states * stride] : F(0);
    }
  }

  static SK_DEVICE void save_states(const Args& a, const Walk& w, F* row, int64_t stride) {
    if (!w.active) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = state_of(kLanes, w.lane, i);
      if (n < a.p.states) row[n * stride] = w.h[i];
    }
  }

  static SK_DEVICE F* entry_row(const Args& a, const Walk& w, int64_t chunk) {
    return static_cast<F*>(a.entry) + ((w.batch * a.chunks + chunk) * a.p.channels + w.channel) * a.p.states;
  }

  static SK_DEVICE F* row_of(const Args& a, const Walk& w, const States& s) {
    return s.p ? static_cast<F*>(s.p) + w.batch * s.s + w.channel * s.d : nullptr;
  }

  static SK_DEVICE Walk begin_walk(const Args& a, int64_t batch, const Channels& block, int64_t chunk) {
    // The lanes of a channel are half a warp apart.
    const int thread = thread_index(), row = kLanes == 1 ? thread : thread / 32 * 16 + thread % 16;
    Walk w{};
    w.batch = int(batch), w.lane = kLanes == 1 ? 0 : thread / 16 % 2;
    w.active = row < block.count, w.channel = int(block.first) + (w.active ? row : 0);
    const F* A = static_cast<const F*>(a.p.A.p) + w.channel * a.p.A.d;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      w.A[i] = scaled_A(A[state_of(kLanes, w.lane, i) % a.p.states * a.p.A.n]);
    }
    w.skips = a.p.D.p && w.lane == 0;  // one lane adds D u
    if (w.skips) w.D = static_cast<const F*>(a.p.D.p)[w.channel * a.p.D.d];
    if (a.p.bias.p) w.bias = static_cast<const F*>(a.p.bias.p)[w.channel * a.p.bias.d];
    if (chunk == 0) load_states(a, w, row_of(a, w, a.p.initial), a.p.initial.n);
    else load_states(a, w, kLocal ? nullptr : entry_row(a, w, chunk), 1);
    return w;
  }

  static SK_DEVICE const T* row_of(const Walk& w, const Sequences& s) {
    return static_cast<const T*>(s.p) + w.batch * s.b + w.channel * s.d;
  }

  // One token: the state moves on, and this lane's share of C h comes back.
  static SK_DEVICE F step(Walk& w, F d, F du, const F* B, const F* C) {
    F y[2] = {0, 0};
#pragma unroll
    for (int q = 0; q < kStates / 4; ++q) {
      const Quad<F> b = load_quad(B + 4 * kLanes * q);
      Quad<F> c{};
      if constexpr (!kLocal) c = load_quad(C + 4 * kLanes * q);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 4 * q + e;
        const F decay = i % kRowsPolyEvery == kRowsPolyEvery / 2 ? exp2_poly(d * w.A[i]) : exp2_unit(d * w.A[i]);
        w.h[i] = advance(decay, w.h[i], du, b.v[e]);
        if constexpr (!kLocal) y[e % 2] = fused(c.v[e], w.h[i], y[e % 2]);
      }
    }
    return y[0] + y[1];
  }

  // first in lane 0, second in lane 1. In bits: the compiler makes a branch of a choice, with the shuffles inside.
  static SK_DEVICE F by_lane(const Walk& w, F first, F second) {
    const uint32_t mask = uint32_t(-w.lane);
    return as_float((as_bits(first) & ~mask) | (as_bits(second) & mask));
  }

  // The step sizes of a group's tokens, in scan order, from what this lane has loaded of them.
  static SK_DEVICE void step_sizes(const Args& a, const Walk& w, F (&x)[kMine], F (&d)[kGroup]) {
    if (a.p.softplus) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) x[j] = sizeof(T) == 2 ? softplus_short(x[j]) : softplus(x[j]);
    }
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      if constexpr (kLanes == 1) {
        d[j] = x[j];
      } else {
        const F other = shuffle_xor(x[j], kSwap);
        d[j] = by_lane(w, x[j], other);
        d[kMine + j] = by_lane(w, other, x[j]);
      }
    }
  }

  // The outputs of this lane's tokens from both lanes' shares.
  template <bool kReverse>
  static SK_DEVICE void finish(const Args& a, const Walk& w, const F (&y)[kGroup], const Raw<T, kMine>& z, T* out) {
    F mine[kMine];
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      mine[j] = y[j];
      if constexpr (kLanes == 2) {
        const F other = shuffle_xor(by_lane(w, y[kMine + j], y[j]), kSwap);
        mine[j] = by_lane(w, y[j], y[kMine + j]) + other;
      }
    }
    if (a.p.z.p) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) mine[j] *= silu(z.at(j));
    }
    Raw<T, kMine> packed;
    packed.set(mine);
    if constexpr (kReverse) packed.turn();
    if (w.active) packed.store(out);
  }

  template <bool kReverse>
  static SK_DEVICE void walk(const Args& a, Walk& w, int64_t chunk) {
    const int64_t begin = (kReverse ? a.chunks - 1 - chunk : chunk) * a.chunk_tokens;
    const int64_t left = a.p.length - begin;
    const int count = int(left < a.chunk_tokens ? left : a.chunk_tokens);  // tokens of this chunk
    const int first = kReverse ? count - kGroup : 0, onward = kReverse ? -kGroup : kGroup;
    const int own = (kReverse ? kLanes - 1 - w.lane : w.lane) * kMine;  // of this lane's tokens in a group
    const T* u_at = row_of(w, a.p.u) + begin + first;
    const T* delta_at = row_of(w, a.p.delta) + begin + first + own;
    const T* z_at = a.p.z.p ? row_of(w, a.p.z) + begin + first + own : nullptr;
    T* out_at = const_cast<T*>(row_of(w, a.out)) + begin + first + own;

    F* const shared = reinterpret_cast<F*>(shared_memory());
    // A thread's share of a tile of B or C: 8 tokens of one state, or of one of its copies, which divide C among them.
    const int place = thread_index() / kGroup, share = thread_index() % kGroup, state = place % a.p.states;
    const F part = F(1) / F((kRowStates - 1 - state) / a.p.states + 1);
    const auto share_of = [&](const Matrix& m) {
      return static_cast<const T*>(m.p) + m.offset(w.batch, w.channel) + state * m.n + begin + share * kGroup;
    };
    const T *const B_from = share_of(a.p.B), *const C_from = kLocal ? nullptr : share_of(a.p.C);
    Raw<T, kGroup> B, C;
    const auto fetch = [&](int tile) {
      const bool inside = tile + share * kGroup < count;
      B.load(B_from + tile, inside);
      if constexpr (!kLocal) C.load(C_from + tile, inside);
    };
    const auto spread = [&](Raw<T, kGroup>& x, F* to, F scale) {
      if constexpr (kReverse) x.turn();
      to += (kReverse ? kGroup - 1 - share : share) * kGroupPitch + place;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) to[j * kRowStates] = x.at(j) * scale;
    };
    fetch(first / kRowTokens * kRowTokens);

    Raw<T, kGroup> u_next;
    Raw<T, kMine> delta_next;
    const auto fetch_rows = [&] {
      u_next.load(u_at), delta_next.load(delta_at);
    };
    fetch_rows();
    const F* tokens = nullptr;  // of B; C lies kTile further

#pragma unroll 1
    for (int t = first; t >= 0 && t < count; t += onward) {
      const int tile = t / kRowTokens * kRowTokens, within = t % kRowTokens;
      if (t == first || within == (kReverse ? kRowTokens - kGroup : 0)) {
        // The other buffer may still be read: the barrier of the next tile comes before it is written again.
        F* const matrices = shared + (tile / kRowTokens & 1) * 2 * kTile;
        tokens = matrices + (kReverse ? kRowTokens - kGroup - within : 0) / kGroup * kGroupPitch + 4 * w.lane;
        spread(B, matrices, 1);
        if constexpr (!kLocal) spread(C, matrices + kTile, part);
        const int next = kReverse ? tile - kRowTokens : tile + kRowTokens;
        if (next >= 0 && next < count) fetch(next);
        if (!kLocal && a.p.checkpoints)
          save_states(a, w, checkpoint<F>(a.p, w.batch, (begin + tile) / kRowTokens, w.channel), 1);
        sync_threads();
      }
      F x[kMine], d[kGroup], y[kGroup];
      if constexpr (kReverse) u_next.turn(), delta_next.turn();
      const Raw<T, kGroup> u = u_next;
#pragma unroll
      for (int j = 0; j < kMine; ++j) x[j] = delta_next.at(j) + w.bias;
      Raw<T, kMine> z{};
      if (!kLocal && a.p.z.p) z.load(z_at);
      const int next = t + onward, further = next >= 0 && next < count ? onward : 0;
      u_at += further, delta_at += further, z_at += onward;
      fetch_rows();
      sync_warp();  // or the compiler would move the loads down to where they are used
      step_sizes(a, w, x, d);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const F* at = tokens + j * kRowStates;
        y[j] = step(w, d[j], d[j] * u.at(j), at, at + kTile);
        if (w.skips) y[j] = fused(w.D, u.at(j), y[j]);  // not by zero: u may be infinite
        if constexpr (kLocal) w.step_sum += d[j];
      }
      if constexpr (kReverse) z.turn();
      if constexpr (!kLocal) finish<kReverse>(a, w, y, z, out_at);
      out_at += onward, tokens += kGroupPitch;
    }
  }

  static SK_DEVICE void run(const Args& a) {
    const int64_t scanned = kLocal ? a.chunks - 1 : a.chunks;
    const int64_t chunk = block_index() % scanned, rest = block_index() / scanned, blocks = a.p.channel_blocks();
    Walk w = begin_walk(a, rest / blocks, channels_of(a.p, rest % blocks), chunk);
    a.p.reverse ? walk<true>(a, w, chunk) : walk<false>(a, w, chunk);
    if constexpr (kLocal) {
      save_states(a, w, entry_row(a, w, chunk + 1), 1);
      if (w.active && w.lane == 0)
        static_cast<F*>(a.step_sum)[(w.batch * a.chunks + chunk) * a.p.channels + w.channel] = w.step_sum;
    } else if (chunk == a.chunks - 1) {
      save_states(a, w, row_of(a, w, a.last), a.last.n);
    }
  }
};

}  // namespace scalekern::scan
