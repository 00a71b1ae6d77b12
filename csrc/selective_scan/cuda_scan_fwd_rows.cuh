// Forward selective scan of plain rows (takes_rows), the common case: at most 16 states, time contiguous on 16-byte
// bounds, nothing packed. cuda_scan_fwd.cuh has the general kernel, whose plan of chunks and JoinChunks this one shares.
#pragma once
#include "selective_scan/cuda_scan_fwd.cuh"
#include "selective_scan/cuda_scan_rows.cuh"

namespace scalekern::scan {

// One in kRowsPolyEvery exponentials leaves the special-function unit alone.
constexpr int kRowsPolyEvery = 16;

template <class T, int kLanes, bool kLocal>
struct ScanFwdRows {
  using F = Compute<T>;
  using Args = FwdArgs;
  using Share = MatrixShare<T>;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = kLanes == 1 ? 3 : 4;
  static constexpr int kStates = kRowStates / kLanes;
  static constexpr int kMine = kGroup / kLanes;  // tokens of a group whose step sizes and gates this lane computes
  static constexpr int kSwap = 16;               // the other lane of a channel is this far away
  static constexpr int kTile = kRowTokens / kGroup * Share::kGroupPitch;
  static constexpr int kSharedBytes = int(sizeof(float)) * 4 * kTile;

  // Tokens of a row as they lie in memory.
  template <int kCount>
  struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Raw {
    T v[kCount];

    SK_DEVICE void load(const T* p) { *this = *reinterpret_cast<const Raw*>(p); }
    SK_DEVICE void store(T* p) const { *reinterpret_cast<Raw*>(p) = *this; }
    SK_DEVICE void turn() {
#pragma unroll
      for (int j = 0; j < kCount / 2; ++j) {
        const T low = v[j];
        v[j] = v[kCount - 1 - j], v[kCount - 1 - j] = low;
      }
    }
  };

  struct Walk {
    F h[kStates], A[kStates];
    F D, bias, step_sum;
    int64_t batch, channel;
    int lane;
    bool active;
  };

  static SK_DEVICE void load_states(const Args& a, Walk& w, const F* row, int64_t stride) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = state_of(kLanes, w.lane, i);
      w.h[i] = row != nullptr && n < a.p.states ? row[n * stride] : F(0);
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
    w.batch = batch, w.lane = kLanes == 1 ? 0 : thread / 16 % 2;
    w.active = row < block.count, w.channel = block.first + (w.active ? row : 0);
    const F* A = static_cast<const F*>(a.p.A.p) + w.channel * a.p.A.d;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = state_of(kLanes, w.lane, i);
      w.A[i] = n < a.p.states ? scaled_A(A[n * a.p.A.n]) : F(0);
    }
    if (a.p.D.p) w.D = static_cast<const F*>(a.p.D.p)[w.channel * a.p.D.d];
    if (a.p.bias.p) w.bias = static_cast<const F*>(a.p.bias.p)[w.channel * a.p.bias.d];
    if (chunk == 0) load_states(a, w, row_of(a, w, a.p.initial), a.p.initial.n);
    else load_states(a, w, kLocal ? nullptr : entry_row(a, w, chunk), 1);
    return w;
  }

  static SK_DEVICE const T* row_of(const Walk& w, const Sequences& s) {
    return static_cast<const T*>(s.p) + w.batch * s.b + w.channel * s.d;
  }

  // One token: the state moves on, and this lane's share of C h comes back. Where states are padded, what an infinite
  // du makes of the padding (0 * Inf) stays out of it.
  template <bool kFull>
  static SK_DEVICE F step(const Args& a, Walk& w, F d, F du, const F* B, const F* C) {
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
        if (!kLocal && (kFull || state_of(kLanes, w.lane, i) < a.p.states)) y[e % 2] = fused(c.v[e], w.h[i], y[e % 2]);
      }
    }
    return y[0] + y[1];
  }

  // The step sizes of a group's tokens, in scan order.
  static SK_DEVICE void step_sizes(const Args& a, const Walk& w, const Raw<kMine>& delta, F (&d)[kGroup]) {
    F x[kMine];
#pragma unroll
    for (int j = 0; j < kMine; ++j) x[j] = widen(delta.v[j]) + w.bias;
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
  static SK_DEVICE void finish(
      const Args& a, const Walk& w, const F (&u)[kGroup], const F (&y)[kGroup], const Raw<kMine>& z, T* out) {
    F mine[kMine];
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      mine[j] = y[j];
      if constexpr (kLanes == 2) {
        const F other = shuffle_xor(w.lane == 0 ? y[kMine + j] : y[j], kSwap);
        mine[j] = (w.lane == 0 ? y[j] : y[kMine + j]) + other;
      }
    }
    if (a.p.D.p) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) mine[j] = fused(w.D, kLanes == 1 || w.lane == 0 ? u[j] : u[kMine + j], mine[j]);
    }
    if (a.p.z.p) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) mine[j] *= silu(F(widen(z.v[j])));
    }
    Raw<kMine> packed;
#pragma unroll
    for (int j = 0; j < kMine; ++j) packed.v[j] = narrow<T>(mine[j]);
    if (a.p.reverse) packed.turn();
    if (w.active) packed.store(out);
  }

  template <bool kFull>
  static SK_DEVICE void walk(const Args& a, Walk& w, int64_t chunk) {
    const bool reverse = a.p.reverse;
    const int64_t place = reverse ? a.chunks - 1 - chunk : chunk, begin = place * a.chunk_tokens;
    const int64_t left = a.p.length - begin;
    const int count = int(left < a.chunk_tokens ? left : a.chunk_tokens);  // tokens of this chunk
    const int first = reverse ? count - kGroup : 0, onward = reverse ? -kGroup : kGroup;
    const int own = (reverse ? kLanes - 1 - w.lane : w.lane) * kMine;  // of this lane's tokens in a group
    const T* u_row = row_of(w, a.p.u) + begin;
    const T* delta_row = row_of(w, a.p.delta) + begin + own;
    const T* z_row = a.p.z.p ? row_of(w, a.p.z) + begin + own : nullptr;
    T* out_row = const_cast<T*>(row_of(w, a.out)) + begin + own;
    F* checkpoints = kLocal || !a.p.checkpoints ? nullptr : checkpoint<F>(a.p, w.batch, 0, w.channel);
    const int64_t slot_pitch = a.p.channels * a.p.states, slot0 = begin / kRowTokens;

    F* const shared = reinterpret_cast<F*>(shared_memory());
    Share B, C;
    const T* const B_from = Share::start(a.p.B, w.batch, w.channel) + begin;
    const T* const C_from = Share::start(a.p.C, w.batch, w.channel) + begin;
    const auto fetch = [&](int tile) {
      const bool inside = thread_index() / kGroup < a.p.states && tile + thread_index() % kGroup * kGroup < count;
      B.fetch(B_from + tile, inside);
      if constexpr (!kLocal) C.fetch(C_from + tile, inside);
    };
    fetch(first / kRowTokens * kRowTokens);

    Raw<kGroup> u_next;
    Raw<kMine> delta_next, z_next;
    const auto fetch_rows = [&](int t) {
      u_next.load(u_row + t), delta_next.load(delta_row + t);
      if (!kLocal && z_row) z_next.load(z_row + t);
    };
    fetch_rows(first);

#pragma unroll 1
    for (int t = first; t >= 0 && t < count; t += onward) {
      const int tile = t / kRowTokens * kRowTokens, within = t % kRowTokens;
      F* const matrices = shared + (tile / kRowTokens & 1) * 2 * kTile;
      if (t == first || within == (reverse ? kRowTokens - kGroup : 0)) {
        // The other buffer may still be read: the barrier of the next tile comes before it is written again.
        B.store_scanned(matrices, reverse);
        if constexpr (!kLocal) C.store_scanned(matrices + kTile, reverse);
        const int next = reverse ? tile - kRowTokens : tile + kRowTokens;
        if (next >= 0 && next < count) fetch(next);
        if (checkpoints) save_states(a, w, checkpoints + (slot0 + tile / kRowTokens) * slot_pitch, 1);
        sync_threads();
      }
      F u[kGroup], d[kGroup], y[kGroup];
      Raw<kMine> z = z_next;
      if (reverse) u_next.turn(), delta_next.turn(), z.turn();
#pragma unroll
      for (int j = 0; j < kGroup; ++j) u[j] = widen(u_next.v[j]);
      step_sizes(a, w, delta_next, d);
      const int next = t + onward;
      if (next >= 0 && next < count) fetch_rows(next);
      const F* const tokens = matrices + (reverse ? kRowTokens - kGroup - within : within) / kGroup * Share::kGroupPitch +
                              4 * w.lane;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const F* at = tokens + j * kRowStates;
        y[j] = step<kFull>(a, w, d[j], d[j] * u[j], at, at + kTile);
        if constexpr (kLocal) w.step_sum += d[j];
      }
      if constexpr (!kLocal) finish(a, w, u, y, z, out_row + t);
    }
  }

  static SK_DEVICE void run(const Args& a) {
    const int64_t scanned = kLocal ? a.chunks - 1 : a.chunks;
    const int64_t chunk = block_index() % scanned, rest = block_index() / scanned, blocks = a.p.channel_blocks();
    Walk w = begin_walk(a, rest / blocks, channels_of(a.p, rest % blocks), chunk);
    kLocal || a.p.states == kRowStates ? walk<true>(a, w, chunk) : walk<false>(a, w, chunk);
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
