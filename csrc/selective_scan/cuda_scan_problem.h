// From tensors to the Problem of the scan kernels: strides, and the split of channels and states over threads.
#pragma once
#include <type_traits>

#include "selective_scan/cuda_scan.cuh"

namespace scalekern::scan {

inline Sequences sequences_of(const View& v) { return {v.data, v.stride[0], v.stride[1], v.stride[2]}; }
inline States states_of(const View& v) { return {v.data, v.stride[0], v.stride[1], v.stride[2]}; }
inline Vector vector_of(const View& v) { return {v.data, v.stride[0]}; }

inline Matrix matrix_of(const View& v, int64_t channels) {
  if (v.dims == 2) return {v.data, 0, v.stride[0], v.stride[1], 0, 1, true};
  return {v.data, v.stride[0], v.stride[1], v.stride[2], v.stride[3], channels / v.size[1], false};
}

inline Indices indices_of(const View& v) { return {v.data, v.stride[0], v.dtype == 5}; }

inline int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

struct Inputs {
  View u, delta, A, B, C, D, z, bias, initial, cu;
  bool softplus, reverse;
};

inline Problem problem_of(const Inputs& in, const View& checkpoints) {
  Problem p{};
  p.batch = in.u.size[0], p.channels = in.u.size[1], p.length = in.u.size[2], p.states = int(in.A.size[1]);
  p.sequences = in.cu ? in.cu.size[0] - 1 : p.batch;
  p.softplus = in.softplus, p.reverse = in.reverse;
  p.u = sequences_of(in.u), p.delta = sequences_of(in.delta), p.z = sequences_of(in.z);
  p.B = matrix_of(in.B, p.channels), p.C = matrix_of(in.C, p.channels);
  p.A = {in.A.data, 0, in.A.stride[0], in.A.stride[1]};
  p.initial = states_of(in.initial), p.D = vector_of(in.D), p.bias = vector_of(in.bias), p.cu = indices_of(in.cu);
  const int64_t B_group = p.B.constant ? p.channels : p.B.group, C_group = p.C.constant ? p.channels : p.C.group;
  p.segment = greatest_common_divisor(B_group, C_group);
  p.slots = checkpoints.size[1];
  p.checkpoints = p.slots ? checkpoints.data : nullptr;
  p.checkpoint_stride = 64;  // as scalekern._packing.checkpoint_stride has it
  while (p.checkpoint_stride < 2 * p.states) p.checkpoint_stride *= 2;
  return p;
}

// Gives every thread `per_thread` states and says how many threads a channel then needs.
inline void split(Problem& p, int threads, int per_thread) {
  p.lanes = power_of_two_from(ceil_div(p.states, per_thread));
  p.channels_per_block = threads / p.lanes;
  p.blocks_per_segment = ceil_div(p.segment, p.channels_per_block);
}

}  // namespace scalekern::scan
