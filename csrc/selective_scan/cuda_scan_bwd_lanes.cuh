// What the two sweeps of the backward scan of plain rows share (cuda_scan_bwd_rows.cuh, cuda_scan_bwd_chunks.cuh):
// which thread holds which states of which channel, which part of time a block takes, B and C in shared memory.
#pragma once
#include "selective_scan/cuda_scan_bwd.cuh"
#include "selective_scan/cuda_scan_rows.cuh"

namespace scalekern::scan {

// A tile: tokens [t0, t0 + 8 groups), and where its g-th group in scan order begins.
template <bool kReverse>
struct BwdTile {
  int64_t t0;
  int groups;

  // The i-th in scan order.
  static SK_DEVICE BwdTile of(const Problem& p, int64_t i) {
    const int64_t slot = kReverse ? (p.length + kRowTokens - 1) / kRowTokens - 1 - i : i;
    const int64_t left = p.length - slot * kRowTokens;
    return {slot * kRowTokens, int(left < kRowTokens ? left : kRowTokens) / kGroup};
  }
  SK_FN int place(int g) const { return kReverse ? groups - 1 - g : g; }
  SK_FN int64_t token(int g) const { return t0 + place(g) * kGroup; }
};

struct BwdLanes {
  using F = float;
  using Args = BwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 3;
  static constexpr int kStates = kRowStates / 2;  // of a channel's two lanes, l and l ^ 16
  static constexpr int kChannels = kThreads / 2;
  static constexpr int kWarps = kThreads / 32;
  // B or C of a tile as F, as they lie in memory; groups are further apart than their states: threads that store then
  // meet in no bank.
  static constexpr int kGroupPitch = kGroup * kRowStates + 4;
  static constexpr int kMatrix = kRowTokens / kGroup * kGroupPitch;

  // Where this thread works.
  struct Place {
    int64_t slot, chunk, batch, channel;  // slot: of the channel blocks of all batches
    int64_t begin, end;                   // tiles, in scan order
    Channels block;
    int half;  // which 8 of the states
    bool active, split;

    SK_FN int64_t row(const Args& a, int64_t of_chunk) const {
      return (batch * a.chunks + of_chunk) * a.p.channels + channel;
    }
  };

  static SK_DEVICE Place place_of(const Args& a, int64_t slot, int64_t chunk) {
    Place w{};
    w.slot = slot, w.chunk = chunk, w.split = slot >= a.whole;
    const int64_t tiles = (a.p.length + kRowTokens - 1) / kRowTokens, end = (chunk + 1) * a.chunk_tiles;
    w.begin = chunk * a.chunk_tiles, w.end = w.split && end < tiles ? end : tiles;
    w.batch = slot / a.p.channel_blocks();
    w.block = channels_of(a.p, slot % a.p.channel_blocks());
    const int row = thread_index() / 32 * 16 + lane() % 16;
    w.half = lane() / 16;
    w.active = row < w.block.count;
    w.channel = w.block.first + (w.active ? row : 0);
    return w;
  }

  static SK_DEVICE int lane() { return thread_index() % 32; }

  static SK_DEVICE void load_states(const Args& a, const Place& w, const F* row, int64_t stride, F (&x)[kStates]) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = kStates * w.half + i;
      x[i] = w.active && row != nullptr && n < a.p.states ? row[n * stride] : F(0);
    }
  }

  static SK_DEVICE void save_states(const Args& a, const Place& w, F* row, int64_t stride, const F (&x)[kStates]) {
    if (!w.active) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = kStates * w.half + i;
      if (n < a.p.states) row[n * stride] = x[i];
    }
  }

  static SK_DEVICE void load_A(const Args& a, const Place& w, F (&A)[kStates]) {
    load_states(a, w, static_cast<const F*>(a.p.A.p) + w.channel * a.p.A.d, a.p.A.n, A);
#pragma unroll
    for (int i = 0; i < kStates; ++i) A[i] = scaled_A(A[i]);
  }

  static SK_DEVICE F* row_of(const States& s, const Place& w) {
    return s.p ? static_cast<F*>(s.p) + w.batch * s.s + w.channel * s.d : nullptr;
  }

  template <class T>
  static SK_DEVICE T* row_of(const Sequences& s, const Place& w) {
    return s.p ? static_cast<T*>(s.p) + w.batch * s.b + w.channel * s.d : nullptr;
  }

  static SK_DEVICE F vector_at(const Vector& v, const Place& w) {
    return v.p ? static_cast<const F*>(v.p)[w.channel * v.d] : F(0);
  }

  // This thread's share of a tile of B or C: 8 tokens of one state.
  template <class T>
  static SK_DEVICE void load_share(const Args& a, const Place& w, const Matrix& m, int64_t t0, Raw<T, kGroup>& share) {
    const int n = thread_index() / kGroup;
    const int64_t t = t0 + thread_index() % kGroup * kGroup;
    const T* from = static_cast<const T*>(m.p) + m.offset(w.batch, w.block.first) + n * m.n + t;
    share.load(from, n < a.p.states && t < a.p.length);
  }

  template <class T>
  static SK_DEVICE void store_share(const Raw<T, kGroup>& share, F* matrix) {
    F* to = matrix + thread_index() % kGroup * kGroupPitch + thread_index() / kGroup;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) to[j * kRowStates] = share.at(j);
  }

  // This lane's 8 states of B or C at the j-th token, in scan order, of the group that begins at `group`.
  template <bool kReverse>
  static SK_DEVICE void load_matrix(const F* group, int j, F (&x)[kStates]) {
    const F* from = group + (kReverse ? kGroup - 1 - j : j) * kRowStates;
#pragma unroll
    for (int q = 0; q < kStates; q += 4) {
      const Quad<F> quad = load_quad(from + q);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[q + e] = quad.v[e];
    }
  }
};

}  // namespace scalekern::scan
