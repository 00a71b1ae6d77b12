// Plans and launches the convolution kernels. `Exec` is the GPU (cuda_launch.h) or the host emulator.
#pragma once
#include <algorithm>
#include <type_traits>

#include "selective_scan/cuda_conv1d.cuh"
#include "selective_scan/cuda_conv1d_time.cuh"
#include "selective_scan/cuda_conv1d_update.cuh"

namespace scalekern::conv {

inline Rows rows_of(const View& v) { return {v.data, v.stride[0], v.stride[1], v.stride[2]}; }
inline Indices indices_of(const View& v, int dim) { return {v.data, v.stride[dim], v.dtype == 5}; }

struct Inputs {
  View x, weight, bias, ids, cu, initial;
  bool silu;
};

inline Args args_of(const Inputs& in) {
  Args a{};
  a.batch = in.x.size[0], a.channels = in.x.size[1], a.length = in.x.size[2];
  a.sequences = in.cu ? in.cu.size[0] - 1 : a.batch;
  a.width = int(in.weight.size[1]), a.silu = in.silu;
  a.by_time = in.x.stride[2] == 1 || in.x.stride[1] != 1;
  a.x = rows_of(in.x), a.initial = rows_of(in.initial);
  a.weight = in.weight.data, a.weight_d = in.weight.stride[0], a.weight_w = in.weight.stride[1];
  a.bias = in.bias.data, a.bias_d = in.bias.stride[0];
  a.cu = indices_of(in.cu, 0), a.ids = indices_of(in.ids, 1), a.ids_b = in.ids.stride[0];
  return a;
}

// Calls f(filter width 4 or 8, channels a thread) with compile-time values.
template <int kChannels, class F>
void with_shape(const Args& a, F&& f) {
  const auto with_width = [&](auto channels) {
    a.width <= 4 ? f(std::integral_constant<int, 4>{}, channels) : f(std::integral_constant<int, 8>{}, channels);
  };
  if constexpr (kChannels == 1) with_width(std::integral_constant<int, 1>{});
  else a.by_time ? with_width(std::integral_constant<int, 1>{}) : with_width(std::integral_constant<int, kChannels>{});
}

// Whether the kernels of cuda_conv1d_time.cuh take these rows: their places in a row are numbers of 32 bits.
inline bool takes_time(const Args& a) {
  return a.by_time && !a.ids.data && !a.cu.data && a.length > 0 && a.length < (1 << 30);
}

// Rows of packs that are contiguous and aligned.
template <class T>
bool packed(const Args& a, const Rows& r) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(r.p) | uintptr_t(r.b * sizeof(T)) | uintptr_t(r.d * sizeof(T));
  return r.l == 1 && bits % 16 == 0 && a.length % kTokens == 0;
}

inline TimeArgs time_args(const Args& a, bool packed) {
  TimeArgs t{a};
  const int64_t groups = ceil_div(a.length, kTokens);
  while (t.lane_bits < 5 && (1 << t.lane_bits) < groups) ++t.lane_bits;
  t.packed = packed, t.by_channels = Divisor(a.channels);
  t.steps = int(ceil_div(groups, 1 << t.lane_bits));
  return t;
}

template <class Kernel, class Exec>
void launch_units(Exec& exec, const TimeArgs& a) {
  exec.template launch<Kernel>(ceil_div(int64_t(a.units) << a.lane_bits, Kernel::kThreads), 0, a);
}

template <class T, class Exec>
bool launch_time_fwd(Exec& exec, const Args& args) {
  TimeArgs a = time_args(args, packed<T>(args, args.x) && packed<T>(args, args.out));
  const auto launch = [&]<int kWidth>(std::integral_constant<int, kWidth>) {
    using Kernel = ConvTimeFwd<T, kWidth>;
    a.segments = int(ceil_div(a.steps, Kernel::kSteps)), a.by_segments = Divisor(a.segments);
    const int64_t units = a.batch * a.channels * a.segments;
    if (units >= (1 << 30)) return false;
    a.units = int(units);
    launch_units<Kernel>(exec, a);
    return true;
  };
  return a.width <= 4 ? launch(std::integral_constant<int, 4>{}) : launch(std::integral_constant<int, 8>{});
}

template <class Exec>
void causal_conv1d_fwd(Exec& exec, const View& out, const View& final_states, const Inputs& in) {
  Args a = args_of(in);
  if (a.sequences == 0) return;
  a.out = rows_of(out), a.final = rows_of(final_states);
  with_type(in.x.dtype, [&]<class T>(T*) {
    if (takes_time(a) && launch_time_fwd<T>(exec, a)) return;
    with_shape<8 / int(sizeof(T))>(a, [&](auto width, auto channels) {
      using Kernel = ConvFwd<T, width.value, channels.value>;
      const int64_t threads = a.batch * ceil_div(a.channels, channels.value) * ceil_div(a.length, kTokens);
      exec.template launch<Kernel>(ceil_div(threads, Kernel::kThreads), 0, a);
    });
    const int64_t states = a.sequences * a.channels * (a.width - 1);
    exec.template launch<FinalStates<T>>(ceil_div(states, FinalStates<T>::kThreads), 0, a);
  });
}

// Slices of the sums in the order in which they are added, and the launch.
template <class T, class Exec>
bool launch_time_bwd(Exec& exec, Args& args) {
  const bool is_packed = packed<T>(args, args.x) && packed<T>(args, args.dout) && packed<T>(args, args.out);
  TimeArgs a = time_args(args, is_packed);
  // Enough warps for some 12 waves on the GPU, so that the last one costs little; a segment has at least 4 steps.
  const int64_t wanted = std::max<int64_t>(1, 256 * exec.processors() * (32 >> a.lane_bits) / a.channels);
  a.segments = int(std::clamp<int64_t>(wanted / a.batch, 1, ceil_div(a.steps, 4)));
  a.steps = int(ceil_div(a.steps, a.segments)), a.by_segments = Divisor(a.segments);
  const int64_t pieces = a.batch * a.segments;
  a.share = int(ceil_div(pieces, wanted));
  const int64_t slices = ceil_div(pieces, a.share), units = slices * a.channels;
  if (units >= (1 << 30) || pieces + a.share >= (1 << 30)) return false;
  args.slices = slices, a.units = int(units);
  args.partial = a.partial = exec.scratch(int64_t(sizeof(Compute<T>)) * units * (a.width + 1));
  a.width <= 4 ? launch_units<ConvTimeBwd<T, 4>>(exec, a) : launch_units<ConvTimeBwd<T, 8>>(exec, a);
  return true;
}

template <class T, class Exec>
void launch_strips_bwd(Exec& exec, Args& a) {
  using F = Compute<T>;
  with_shape<sizeof(T) == 8 ? 1 : 2>(a, [&](auto width, auto channels) {
    using Kernel = ConvBwd<T, width.value, channels.value>;
    constexpr int kV = channels.value;
    a.channel_lanes = a.by_time ? 1 : 32;
    const int64_t blocks = ceil_div(a.channels, a.channel_lanes * kV);
    const int64_t pieces = ceil_div(a.batch * ceil_div(a.length, kTokens), Kernel::kThreads / a.channel_lanes);
    a.slices = std::clamp<int64_t>(ceil_div(16 * exec.processors(), blocks), 1, pieces);
    a.partial = exec.scratch(int64_t(sizeof(F)) * a.slices * a.channels * (a.width + 1));
    const int64_t shared = int64_t(sizeof(F)) * Kernel::kThreads / 32 * a.channel_lanes * kV * Kernel::kSums;
    exec.template launch<Kernel>(blocks * a.slices, shared, a);
  });
}

template <class T, class Exec>
void launch_bwd(Exec& exec, Args& a, const View& dweight, const View& dbias) {
  using F = Compute<T>;
  if (!takes_time(a) || !launch_time_bwd<T>(exec, a)) launch_strips_bwd<T>(exec, a);
  const typename ReduceFilter<F>::Args r{a.partial, dweight.data, a.bias ? dbias.data : nullptr, a.slices, a.channels,
                                         dweight.stride[0], dweight.stride[1], dbias.stride[0], a.width};
  exec.template launch<ReduceFilter<F>>(ceil_div(a.channels * (a.width + 1), ReduceFilter<F>::kThreads), 0, r);
  if (!a.dinitial.p) return;
  const int64_t states = a.sequences * a.channels * (a.width - 1);
  exec.template launch<InitialGradient<T>>(ceil_div(states, InitialGradient<T>::kThreads), 0, a);
}

template <class Exec>
void causal_conv1d_bwd(
    Exec& exec, const View& dx, const View& dweight, const View& dbias, const View& dinitial, const View& dout,
    const View& dfinal, const Inputs& in) {
  Args a = args_of(in);
  if (a.sequences == 0) return;
  a.out = rows_of(dx), a.dout = rows_of(dout), a.final = rows_of(dfinal);
  if (in.initial) a.dinitial = rows_of(dinitial);
  with_type(in.x.dtype, [&]<class T>(T*) { launch_bwd<T>(exec, a, dweight, dbias); });
}

template <class Exec>
void causal_conv1d_update(
    Exec& exec, const View& out, const View& state, const View& x, const View& weight, const View& bias,
    const View& lengths, const View& slots, bool silu) {
  UpdateArgs a{};
  a.batch = x.size[0], a.channels = x.size[1], a.steps = x.size[2], a.size = state.size[2];
  a.width = int(weight.size[1]), a.state_dtype = state.dtype, a.silu = silu;
  a.out = out.data, a.x = x.data, a.state = state.data, a.weight = weight.data, a.bias = bias.data;
  a.x_b = x.stride[0], a.x_d = x.stride[1], a.x_t = x.stride[2];
  a.state_s = state.stride[0], a.state_d = state.stride[1], a.state_k = state.stride[2];
  a.weight_d = weight.stride[0], a.weight_w = weight.stride[1], a.bias_d = bias.stride[0];
  a.lengths = indices_of(lengths, 0), a.slots = indices_of(slots, 0);
  with_type(x.dtype, [&]<class T>(T*) {
    const auto step = [&]<class Kernel>(Kernel*) {
      if (!Kernel::plan(a, x.dtype)) return false;
      const int64_t threads = ceil_div(a.batch, Kernel::kRows) * (a.channels / Kernel::kChannels);
      exec.template launch<Kernel>(ceil_div(threads, Kernel::kThreads), 0, a);
      return true;
    };
    if constexpr (sizeof(T) <= 4) {
      if (step(static_cast<ConvStep<T, 3>*>(nullptr)) || step(static_cast<ConvStep<T, 4>*>(nullptr))) return;
    }
    using Kernel = ConvUpdate<T>;
    exec.template launch<Kernel>(ceil_div(a.batch * a.channels, Kernel::kThreads), 0, a);
  });
}

}  // namespace scalekern::conv
