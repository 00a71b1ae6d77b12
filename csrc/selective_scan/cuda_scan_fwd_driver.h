// Plans and launches the forward scan. `Exec` is the GPU (cuda_launch.h) or the host emulator.
#pragma once
#include <algorithm>

#include "selective_scan/cuda_scan_fwd.cuh"
#include "selective_scan/cuda_scan_fwd_rows.cuh"
#include "selective_scan/cuda_scan_problem.h"

namespace scalekern::scan {

// Shared memory of a block: two buffers of raw tiles, then B and C as F, then the output where u's tile cannot hold it.
template <class T>
void plan_tiles(FwdArgs& a, int per_thread, const View& out) {
  using F = Compute<T>;
  const Problem& p = a.p;
  const int rows = p.channels_per_block;
  a.padded = per_thread * p.lanes;
  a.tokens = a.padded > 64 ? kGroup : std::max(kGroup, 64 / int(sizeof(T)));
  a.u = tile_of<T>(p.u.l, rows, a.tokens), a.delta = tile_of<T>(p.delta.l, rows, a.tokens);
  a.z = tile_of<T>(p.z.l, rows, a.tokens), a.out_tile = tile_of<T>(out.stride[2], rows, a.tokens);
  a.B_raw = tile_of<T>(p.B.l, p.states, a.tokens), a.C_raw = tile_of<T>(p.C.l, p.states, a.tokens);
  int at = 0;
  const auto take = [&](int bytes) { return std::exchange(at, at + int(round_up(bytes, 16))); };
  a.u_at = take(a.u.bytes), a.delta_at = take(a.delta.bytes), a.z_at = take(p.z.p ? a.z.bytes : 0);
  a.B_raw_at = take(p.B.constant ? 0 : a.B_raw.bytes), a.C_raw_at = take(p.C.constant ? 0 : a.C_raw.bytes);
  a.buffer_bytes = at;
  at *= 2;
  a.B_at = take(matrix_bytes<F>(p.B, a.padded, a.tokens, rows));
  a.C_at = take(matrix_bytes<F>(p.C, a.padded, a.tokens, rows));
  const bool in_place = a.u.time == a.out_tile.time && a.u.row == a.out_tile.row;
  a.out_at = in_place ? -1 : take(a.out_tile.bytes);
  a.shared_bytes = at;
}

// kernel<kLocal>: ScanFwd or ScanFwdRows, whose tiles and split of channels are planned.
template <class F, template <bool> class Kernel, class Exec>
void launch_over_time(Exec& exec, FwdArgs& a) {
  Problem& p = a.p;
  const int64_t blocks = p.batch * p.channel_blocks();
  // Time is split when half of the SMs would have no block; every chunk costs its exponentials twice, so at least four.
  const int64_t wanted = 2 * blocks > exec.processors() ? 1 : 2 * exec.processors() / blocks;
  const int64_t possible = ceil_div(p.length, p.checkpoint_stride), chunks = std::min(wanted, possible);
  a.chunk_tokens = round_up(ceil_div(p.length, chunks < 4 ? 1 : chunks), p.checkpoint_stride);
  a.chunks = ceil_div(p.length, a.chunk_tokens);
  if (a.chunks > 1) {
    a.entry = exec.scratch(int64_t(sizeof(F)) * p.batch * a.chunks * p.channels * p.states);
    a.step_sum = exec.scratch(int64_t(sizeof(F)) * p.batch * a.chunks * p.channels);
    exec.template launch<Kernel<true>>(blocks * (a.chunks - 1), a.shared_bytes, a);
    exec.template launch<JoinChunks<F>>(ceil_div(p.batch * p.channels * p.states, JoinChunks<F>::kThreads), 0, a);
  }
  exec.template launch<Kernel<false>>(blocks * a.chunks, a.shared_bytes, a);
}

template <class T, int kStates>
struct ScanFwdOf {
  template <bool kLocal>
  using Kernel = ScanFwd<T, kStates, kLocal>;
};

template <class T, int kLanes>
struct ScanFwdRowsOf {
  template <bool kLocal>
  using Kernel = ScanFwdRows<T, kLanes, kLocal>;
};

template <class T, int kStates, class Exec>
void launch_scan_fwd(Exec& exec, FwdArgs& a, const View& out) {
  split(a.p, 128, kStates);
  plan_tiles<T>(a, kStates, out);
  launch_over_time<Compute<T>, ScanFwdOf<T, kStates>::template Kernel>(exec, a);
}

constexpr int kRowLanes = 1;  // lanes of a channel

template <class T, int kLanes, class Exec>
void launch_scan_fwd_rows(Exec& exec, FwdArgs& a) {
  a.p.lanes = kLanes, a.p.channels_per_block = 128 / kLanes;
  a.p.blocks_per_segment = ceil_div(a.p.segment, a.p.channels_per_block);
  a.shared_bytes = ScanFwdRows<T, kLanes, false>::kSharedBytes;
  launch_over_time<Compute<T>, ScanFwdRowsOf<T, kLanes>::template Kernel>(exec, a);
}

template <class Exec>
void selective_scan_fwd(Exec& exec, const View& out, const View& last, const View& checkpoints, const Inputs& in) {
  FwdArgs a{};
  a.p = problem_of(in, checkpoints);
  a.out = sequences_of(out), a.last = states_of(last);
  if (a.p.sequences == 0) return;
  with_type(in.u.dtype, [&]<class T>(T*) {
    using F = Compute<T>;
    if constexpr (std::is_same_v<T, double>) {
      launch_scan_fwd<T, 4>(exec, a, out);
    } else if (takes_rows<T>(a.p) && packable<T>(a.out) && a.p.length < int64_t(1) << 31) {
      launch_scan_fwd_rows<T, kRowLanes>(exec, a);
    } else {
      split(a.p, 128, 16);
      // Four states a thread give four times the threads, at the price of the step sizes and gates four times over.
      const bool few = a.p.batch * a.p.channel_blocks() < exec.processors();
      const bool narrow = a.p.states <= 8 || (few && a.p.states <= 128);
      narrow ? launch_scan_fwd<T, 4>(exec, a, out) : launch_scan_fwd<T, 16>(exec, a, out);
    }
    if (in.cu) exec.template launch<EmptySequences<F>>(a.p.sequences, 0, {a.p, a.last, a.p.initial});
  });
}

}  // namespace scalekern::scan
