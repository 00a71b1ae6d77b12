// Forward selective scan of plain rows (takes_rows), the common case: at most 16 states, time contiguous on 16-byte
// bounds, nothing packed. cuda_scan_fwd.cuh has the general kernel, whose plan of chunks and JoinChunks this one shares.
#pragma once
#include "selective_scan/cuda_scan_fwd.cuh"
#include "selective_scan/cuda_scan_rows.cuh"

namespace scalekern::scan {

// One in kRowsPolyEvery exponentials leaves the special-function unit alone.
constexpr int kRowsPolyEvery = 16;

// Fewer than 16 states are filled up with copies of themselves, which share out C: with zeros, an infinite du would make
// NaN of the padding (0 * Inf) and of all outputs.
template <class T, int kLanes, bool kLocal>
struct ScanFwdRows {
  using F = Compute<T>;
  using Args = FwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = kLanes == 1 ? 3 : 4;
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
        d[j] = w.lane == 0 ? x[j] : other;
        d[kMine + j] = w.lane == 0 ? other : x[j];
      }
    }
  }

  // The outputs of this lane's tokens from both lanes' shares.
  static SK_DEVICE void finish(const Args& a, const Walk& w, const F (&y)[kGroup], const Raw<T, kMine>& z, T* out) {
    F mine[kMine];
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      mine[j] = y[j];
      if constexpr (kLanes == 2) {
        const F other = shuffle_xor(w.lane == 0 ? y[kMine + j] : y[j], kSwap);
        mine[j] = (w.lane == 0 ? y[j] : y[kMine + j]) + other;
      }
    }
    if (a.p.z.p) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) mine[j] *= silu(z.at(j));
    }
    Raw<T, kMine> packed;
    packed.set(mine);
    if (a.p.reverse) packed.turn();
    if (w.active) packed.store(out);
  }

  static SK_DEVICE void walk(const Args& a, Walk& w, int64_t chunk) {
    const bool reverse = a.p.reverse;
    const int64_t begin = (reverse ? a.chunks - 1 - chunk : chunk) * a.chunk_tokens;
    const int64_t left = a.p.length - begin;
    const int count = int(left < a.chunk_tokens ? left : a.chunk_tokens);  // tokens of this chunk
    const int first = reverse ? count - kGroup : 0, onward = reverse ? -kGroup : kGroup;
    const int own = (reverse ? kLanes - 1 - w.lane : w.lane) * kMine;  // of this lane's tokens in a group
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
      if (reverse) x.turn();
      to += (reverse ? kGroup - 1 - share : share) * kGroupPitch + place;
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

#pragma unroll 1
    for (int t = first; t >= 0 && t < count; t += onward) {
      const int tile = t / kRowTokens * kRowTokens, within = t % kRowTokens;
      F* const matrices = shared + (tile / kRowTokens & 1) * 2 * kTile;
      if (t == first || within == (reverse ? kRowTokens - kGroup : 0)) {
        // The other buffer may still be read: the barrier of the next tile comes before it is written again.
        spread(B, matrices, 1);
        if constexpr (!kLocal) spread(C, matrices + kTile, part);
        const int next = reverse ? tile - kRowTokens : tile + kRowTokens;
        if (next >= 0 && next < count) fetch(next);
        if (!kLocal && a.p.checkpoints)
          save_states(a, w, checkpoint<F>(a.p, w.batch, (begin + tile) / kRowTokens, w.channel), 1);
        sync_threads();
      }
      F x[kMine], d[kGroup], y[kGroup];
      if (reverse) u_next.turn(), delta_next.turn();
      const Raw<T, kGroup> u = u_next;
#pragma unroll
      for (int j = 0; j < kMine; ++j) x[j] = delta_next.at(j) + w.bias;
      Raw<T, kMine> z{};
      if (!kLocal && a.p.z.p) z.load(z_at);
      u_at += onward, delta_at += onward, z_at += onward;
      const int next = t + onward;
      if (next >= 0 && next < count) fetch_rows();
      sync_warp();  // or the compiler would move the loads down to where they are used
      step_sizes(a, w, x, d);
      const F* const tokens = matrices + (reverse ? kRowTokens - kGroup - within : within) / kGroup * kGroupPitch +
                              4 * w.lane;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const F* at = tokens + j * kRowStates;
        y[j] = step(w, d[j], d[j] * u.at(j), at, at + kTile);
        if (w.skips) y[j] = fused(w.D, u.at(j), y[j]);  // not by zero: u may be infinite
        if constexpr (kLocal) w.step_sum += d[j];
      }
      if (reverse) z.turn();
      if constexpr (!kLocal) finish(a, w, y, z, out_at);
      out_at += onward;
    }
  }

  static SK_DEVICE void run(const Args& a) {
    const int64_t scanned = kLocal ? a.chunks - 1 : a.chunks;
    const int64_t chunk = block_index() % scanned, rest = block_index() / scanned, blocks = a.p.channel_blocks();
    Walk w = begin_walk(a, rest / blocks, channels_of(a.p, rest % blocks), chunk);
    walk(a, w, chunk);
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
