// Backward selective scan of plain rows, where time is split: the adjoints on entering each chunk from its end.
//
// Of every chunk but the first, the adjoint is swept once from zero (ScanBwdChunks), which leaves its value at the
// chunk's first token and the chunk's sum of step sizes; JoinAdjoints carries the adjoint across chunks with
// exp(A sum d). The sweep proper (cuda_scan_bwd_rows.cuh) begins each chunk with it.
//
// Bound: as there, at a fifth of its instructions. A group's delta, dout and z come while the one after it is computed,
// C of the tile before while a tile is swept.
#pragma once
#include "selective_scan/cuda_scan_bwd_lanes.cuh"

namespace scalekern::scan {

template <class T, bool kReverse>
struct ScanBwdChunks : BwdLanes {
  static constexpr int kSharedBytes = int(sizeof(F)) * 2 * kMatrix;

  static SK_DEVICE void run(const Args& a) {
    const int64_t scanned = a.chunks - 1;  // nothing comes before the first chunk
    const Place place = place_of(a, a.whole + block_index() / scanned, block_index() % scanned + 1);
    F A[kStates], g[kStates] = {}, step_sum = 0;
    load_A(a, place, A);
    const F bias = vector_at(a.p.bias, place);
    const auto last = BwdTile<kReverse>::of(a.p, place.end - 1);
    const int64_t t = last.token(last.groups - 1);
    const T *delta_at = row_of<T>(a.p.delta, place) + t, *dout_at = row_of<T>(a.dout, place) + t;
    const T* z_at = a.p.z.p ? row_of<T>(a.p.z, place) + t : nullptr;
    Raw<T, kGroup> delta_next, dout_next, z_next{}, C_next;
    const auto fetch = [&] {
      delta_next.load(delta_at), dout_next.load(dout_at);
      if (z_at) z_next.load(z_at);
    };
    fetch();
    load_share(a, place, a.p.C, last.t0, C_next);
#pragma unroll 1
    for (int64_t i = place.end - 1; i >= place.begin; --i) {  // in scan order, from the last
      const auto tile = BwdTile<kReverse>::of(a.p, i);
      // The other buffer may still be read: the barrier of the next tile comes before it is written again.
      F* const C_tile = reinterpret_cast<F*>(shared_memory()) + (i & 1) * kMatrix;
      store_share(C_next, C_tile);
      load_share(a, place, a.p.C, BwdTile<kReverse>::of(a.p, i - 1).t0, C_next);
      sync_threads();
#pragma unroll 1
      for (int at = tile.groups - 1; at >= 0; --at) {
        Raw<T, kGroup> delta = delta_next, dout = dout_next, z = z_next;
        constexpr int kOnward = kReverse ? kGroup : -kGroup;
        delta_at += kOnward, dout_at += kOnward, z_at += z_at ? kOnward : 0;
        fetch();  // the last time of the chunk before, which there always is
        sync_warp();  // or the compiler would move the loads down to where they are used
        if constexpr (kReverse) delta.turn(), dout.turn(), z.turn();
        F step[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) step[j] = delta.at(j) + bias;
        if (a.p.softplus) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) step[j] = softplus(step[j]);
        }
        F dy[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) dy[j] = dout.at(j);
        if (z_at) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) dy[j] *= silu(z.at(j));
        }
        const F* C_group = C_tile + tile.place(at) * kGroupPitch + kStates * place.half;
#pragma unroll
        for (int j = kGroup - 1; j >= 0; --j) {
          step_sum += step[j];
          F C[kStates];
          load_matrix<kReverse>(C_group, j, C);
#pragma unroll
          for (int n = 0; n < kStates; ++n) g[n] = fused(C[n], dy[j], g[n]) * exp2_unit(step[j] * A[n]);
        }
      }
    }
    F* before = static_cast<F*>(a.entry) + place.row(a, place.chunk - 1) * a.p.states;
    save_states(a, place, before, 1, g);
    if (place.active && place.half == 0) static_cast<F*>(a.step_sum)[place.row(a, place.chunk)] = step_sum;
  }
};

// Turns what ScanBwdChunks left of zero adjoints into the adjoints on entering each chunk from its end.
struct JoinAdjoints {
  using Args = BwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr int kRow = BwdLanes::kChannels * kRowStates;  // threads of a channel block, some idle

  static SK_DEVICE void run(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index(), slot = a.whole + i / kRow;
    const Channels block = channels_of(a.p, slot % a.p.channel_blocks());
    const int64_t n = i % kRowStates, within = i % kRow / kRowStates, batch = slot / a.p.channel_blocks();
    if (within >= block.count || n >= a.p.states) return;
    const int64_t channel = block.first + within;
    const float A = scaled_A(static_cast<const float*>(a.p.A.p)[channel * a.p.A.d + n * a.p.A.n]);
    const auto row = [&](int64_t chunk) { return (batch * a.chunks + chunk) * a.p.channels + channel; };
    const States& s = a.dlast;
    float g = s.p ? static_cast<const float*>(s.p)[batch * s.s + channel * s.d + n * s.n] : 0.0f;
    float* entry = static_cast<float*>(a.entry) + n;
    entry[row(a.chunks - 1) * a.p.states] = g;
    for (int64_t chunk = a.chunks - 1; chunk > 0; --chunk) {
      float& before = entry[row(chunk - 1) * a.p.states];
      before = g = fused(exp2_unit(A * static_cast<const float*>(a.step_sum)[row(chunk)]), g, before);
    }
  }
};

}  // namespace scalekern::scan
