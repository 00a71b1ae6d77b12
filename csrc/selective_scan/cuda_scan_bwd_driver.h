// Plans and launches the backward scan. `Exec` is the GPU (cuda_launch.h) or the host emulator.
#pragma once
#include <algorithm>

#include "selective_scan/cuda_scan_bwd.cuh"
#include "selective_scan/cuda_scan_bwd_chunks.cuh"
#include "selective_scan/cuda_scan_bwd_rows.cuh"
#include "selective_scan/cuda_scan_fwd.cuh"
#include "selective_scan/cuda_scan_problem.h"
#include "selective_scan/cuda_scan_reduce.cuh"

namespace scalekern::scan {

struct Gradients {  // outputs; empty views for absent inputs
  View u, delta, A, B, C, D, z, bias, initial;
};

template <class T>
void plan_tiles(BwdArgs& a) {
  using F = Compute<T>;
  using Kernel = ScanBwd<T>;
  const Problem& p = a.p;
  a.padded = 4 * p.lanes;
  a.tokens = sizeof(F) == 8 || a.padded > 32 ? 32 : 64;
  // Few states a channel, many channels a block: shorter tiles.
  while (a.tokens > Kernel::kSteps && p.channels_per_block * a.tokens > 96 * 64) a.tokens /= 2;
  a.pitch = a.tokens + 4;
  int at = 0;
  const auto take = [&](int count) { return std::exchange(at, at + int(round_up(count * int(sizeof(F)), 16))); };
  take(p.channels_per_block * a.pitch);
  a.delta_at = take(p.channels_per_block * a.pitch), a.dy_at = take(p.channels_per_block * a.pitch);
  a.B_at = take(matrix_bytes<F>(p.B, a.padded, a.tokens, p.channels_per_block) / int(sizeof(F)));
  a.C_at = take(matrix_bytes<F>(p.C, a.padded, a.tokens, p.channels_per_block) / int(sizeof(F)));
  a.saved_at = take(a.tokens / Kernel::kSteps * 4 * Kernel::kThreads);
  a.sums_at = take(Kernel::kThreads / 32 * Kernel::kSteps * 2 * a.padded);
  a.shared_bytes = at;
}

template <class T, class Exec>
void reduce_matrix(Exec& exec, const BwdArgs& a, const Matrix& m, const View& out, int first) {
  if (m.constant) return;
  const Problem& p = a.p;
  typename ReduceMatrix<T>::Args r{};
  r.partial = a.partial, r.out = out.data;
  r.b = out.stride[0], r.g = out.stride[1], r.n = out.stride[2], r.l = out.stride[3];
  r.batch = p.batch, r.groups = p.channels / m.group, r.length = p.length;
  r.slots = m.group / p.segment * a.slots;
  r.states = p.states, r.width = 2 * a.padded, r.first = first;
  const int64_t count = r.batch * r.groups * r.length * r.states;
  exec.template launch<ReduceMatrix<T>>(ceil_div(count, ReduceMatrix<T>::kThreads), 0, r);
}

template <class F, class T, class Exec>
void reduce_batch(Exec& exec, const Problem& p, int64_t rows, const void* partial, const View& out, int64_t states) {
  using Kernel = ReduceBatch<F, T>;
  const typename Kernel::Args r{partial, out.data, out.stride[0], states > 1 || out.dims > 1 ? out.stride[1] : 0,
                                rows, p.channels, states};
  exec.template launch<Kernel>(ceil_div(p.channels * states, Kernel::kThreads), 0, r);
}

template <class T>
bool takes_rows(const BwdArgs& a) {
  return takes_rows<T>(a.p) && a.p.checkpoint_stride == kRowTokens && packable<T>(a.dout) && packable<T>(a.du) &&
         packable<T>(a.ddelta) && packable<T>(a.dz);
}

// Plain rows. Blocks that do not fill the places that the GPU has for them are split over time: those that are left for
// the last wave. Every chunk but the first costs its adjoint twice.
template <class T>
void plan_rows(BwdArgs& a, int64_t processors) {
  using Kernel = ScanBwdRows<T, false>;
  Problem& p = a.p;
  p.lanes = 2, p.channels_per_block = Kernel::kChannels;
  p.blocks_per_segment = ceil_div(p.segment, p.channels_per_block);
  a.padded = kRowStates, a.shared_bytes = Kernel::kSharedBytes, a.slots = p.blocks_per_segment;
  const int64_t blocks = p.batch * p.channel_blocks(), tiles = ceil_div(p.length, kRowTokens);
  const int64_t places = Kernel::kBlocks * processors, left = blocks % places;
  const int64_t most = blocks < places ? tiles : std::min<int64_t>(tiles, 8);  // shorter ones save little of all waves
  a.chunk_tiles = ceil_div(tiles, std::clamp<int64_t>(left ? places / left : 1, 1, most));
  a.chunks = ceil_div(tiles, a.chunk_tiles);
  a.whole = a.chunks > 1 ? blocks - left : blocks;
}

template <class T, bool kReverse, class Exec>
void launch_rows(Exec& exec, BwdArgs& a) {
  const Problem& p = a.p;
  const int64_t rows = int64_t(sizeof(float)) * p.batch * p.channels;
  const int64_t split = p.batch * p.channel_blocks() - a.whole;
  if (split > 0) {
    using Chunks = ScanBwdChunks<T, kReverse>;
    a.entry = exec.scratch(rows * a.chunks * p.states), a.step_sum = exec.scratch(rows * a.chunks);
    exec.template launch<Chunks>(split * (a.chunks - 1), Chunks::kSharedBytes, a);
    exec.template launch<JoinAdjoints>(split * JoinAdjoints::kRow / JoinAdjoints::kThreads, 0, a);
  }
  exec.template launch<ScanBwdRows<T, kReverse>>(a.whole + split * a.chunks, a.shared_bytes, a);
}

template <class T, class Exec>
void launch_general(Exec& exec, BwdArgs& a) {
  for (a.round = 0; a.round * a.slots < a.p.blocks_per_segment; ++a.round)
    exec.template launch<ScanBwd<T>>(a.p.batch * (a.p.channels / a.p.segment) * a.slots, a.shared_bytes, a);
}

template <class T, class Exec>
void launch_scan_bwd(Exec& exec, BwdArgs& a, const Inputs& in, const Gradients& d) {
  using F = Compute<T>;
  Problem& p = a.p;
  a.chunks = 1;
  const bool plain = takes_rows<T>(a);
  if (plain) {
    if constexpr (sizeof(F) == 4) plan_rows<T>(a, exec.processors());
  } else {
    split(p, ScanBwd<T>::kThreads, 4);
    plan_tiles<T>(a);
    // Slots for at most one F a token and channel, or one slot a segment.
    a.slots = std::clamp<int64_t>(p.segment / (2 * a.padded), 1, p.blocks_per_segment);
  }
  const int64_t rows = p.batch * a.chunks, bytes = int64_t(sizeof(F)) * rows * p.channels;
  a.dA = exec.scratch(bytes * p.states);
  a.dB_constant = p.B.constant ? exec.scratch(bytes * p.states) : nullptr;
  a.dC_constant = p.C.constant ? exec.scratch(bytes * p.states) : nullptr;
  a.dD = exec.scratch(bytes), a.dbias = exec.scratch(bytes);
  if (!p.B.constant || !p.C.constant) {
    const int64_t slots = p.batch * (p.channels / p.segment) * a.slots;
    a.partial = exec.scratch(int64_t(sizeof(F)) * slots * p.length * 2 * a.padded);
  }
  if constexpr (sizeof(F) == 4) {
    if (plain) p.reverse ? launch_rows<T, true>(exec, a) : launch_rows<T, false>(exec, a);
  }
  if (!plain) launch_general<T>(exec, a);
  reduce_matrix<T>(exec, a, p.B, d.B, 0);
  reduce_matrix<T>(exec, a, p.C, d.C, a.padded);
  reduce_batch<F, F>(exec, p, rows, a.dA, d.A, p.states);
  if (p.B.constant) reduce_batch<F, T>(exec, p, rows, a.dB_constant, d.B, p.states);
  if (p.C.constant) reduce_batch<F, T>(exec, p, rows, a.dC_constant, d.C, p.states);
  if (p.D.p) reduce_batch<F, F>(exec, p, rows, a.dD, d.D, 1);
  if (p.bias.p) reduce_batch<F, F>(exec, p, rows, a.dbias, d.bias, 1);
  if (in.cu && a.dinitial.p) exec.template launch<EmptySequences<F>>(p.sequences, 0, {p, a.dinitial, a.dlast});
}

template <class Exec>
void selective_scan_bwd(
    Exec& exec, const Gradients& d, const View& dout, const View& dlast, const View& checkpoints, const Inputs& in) {
  BwdArgs a{};
  a.p = problem_of(in, checkpoints);
  if (a.p.sequences == 0) return;
  a.dout = sequences_of(dout), a.dlast = states_of(dlast);
  a.du = sequences_of(d.u), a.ddelta = sequences_of(d.delta), a.dz = sequences_of(d.z);
  if (in.initial) a.dinitial = states_of(d.initial);
  with_type(in.u.dtype, [&]<class T>(T*) { launch_scan_bwd<T>(exec, a, in, d); });
}

}  // namespace scalekern::scan
