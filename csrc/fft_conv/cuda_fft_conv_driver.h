// Which kernel of cuda_fft_conv.cuh takes a call, and how many blocks share a channel's rows.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "common/view.h"
#include "fft_conv/cuda_fft_conv.cuh"
#include "fft_conv/cuda_fft_filters.cuh"

namespace scalekern::fft {

template <class T, int kN1, int kTogether, int kParts, class Exec>
void launch(Exec& exec, Args& a) {
  using Kernel = FusedConv<T, kN1, kTogether, kParts>;
  // A block begins with copying tables and spectrum, some two rows' worth: no more blocks than the GPU has room for.
  const int64_t groups = ceil_div(a.batch, kTogether);
  const int64_t room = std::max<int64_t>(1, int64_t(exec.processors()) * Kernel::kBlocks / a.channels);
  a.turns = int(ceil_div(groups, std::min(room, groups)));
  exec.template launch<Kernel>(ceil_div(groups, a.turns) * a.channels, Kernel::shared_bytes(a.parts), a);
}

template <class T, class Exec>
void launch(Exec& exec, Args& a, int64_t points) {
  if (points == 256) return launch<T, 16, 16, 1>(exec, a);
  if (points == 512) return launch<T, 16, 8, 1>(exec, a);
  if (points == 1024) return launch<T, 16, 4, 1>(exec, a);
  if (points == 2048) return launch<T, 16, 2, 1>(exec, a);
  if (points == 4096) return launch<T, 16, 1, 1>(exec, a);
  if (a.parts == 1) return launch<T, 32, 1, 1>(exec, a);
  a.parts == 2 ? launch<T, 32, 1, 2>(exec, a) : launch<T, 32, 1, 4>(exec, a);
}

// Rows of these points that are transformed together.
inline int64_t together(int64_t points) {
  if (points < 256 || points > 8192 || (points & (points - 1)))
    throw std::invalid_argument("fft_conv: points must be a power of two from 256 to 8,192");
  return points < 4096 ? 4096 / points : 1;
}

// spectrum (D, parts, N, 2) float16 and scale (D,), from k (D, K), k_reverse (D, K') and skip (D,), all float32, taps
// next to each other. N: of the rows that are transformed together. The rest: see FilterArgs.
template <class Exec>
void fft_filters(
    Exec& exec, const View& spectrum, const View& scale, const View& k, const View& k_reverse, const View& skip,
    int64_t offset, int64_t period, int64_t behind, int64_t ahead, int64_t points) {
  FilterArgs a{};
  a.behind = int(behind), a.ahead = int(ahead);
  a.k = static_cast<const float*>(k.data), a.k_reverse = static_cast<const float*>(k_reverse.data);
  a.skip = static_cast<const float*>(skip.data), a.scale = static_cast<float*>(scale.data);
  a.spectrum = static_cast<uint16_t*>(spectrum.data), a.parts = int(spectrum.size[1]);
  a.k_d = k.stride[0], a.k_reverse_d = k_reverse.stride[0], a.taps = int(k.size[1]);
  a.reverse_taps = k_reverse ? int(k_reverse.size[1]) : 0, a.offset = int(offset), a.period = int(period);
  if (spectrum.size[2] != points * together(points))
    throw std::invalid_argument("fft_conv: a spectrum of another number of points");
  const int64_t blocks = k.size[0] * a.parts;
  if (points == 256) exec.template launch<Filters<1>>(blocks, Filters<1>::kShared, a);
  if (points == 512) exec.template launch<Filters<2>>(blocks, Filters<2>::kShared, a);
  if (points == 1024) exec.template launch<Filters<4>>(blocks, Filters<4>::kShared, a);
  if (points == 2048) exec.template launch<Filters<8>>(blocks, Filters<8>::kShared, a);
  if (points == 4096) exec.template launch<Filters<16>>(blocks, Filters<16>::kShared, a);
  if (points == 8192) exec.template launch<Filters<32>>(blocks, Filters<32>::kShared, a);
}

// out (B, D, M), u and gates (B, D, L) and (B, D, M), mask (B, L) of bool, samples next to each other; bias and scale
// (D,) float32; spectrum
// (D, parts, N, 2) of N points and tables float16. N: of the rows that are transformed together.
template <class Exec>
void fft_conv(
    Exec& exec, const View& out, const View& u, const View& pregate, const View& postgate, const View& mask,
    const View& bias, const View& scale, const View& spectrum, const View& tables, int64_t points) {
  Args a{};
  a.x = u.data, a.gate = pregate.data, a.post = postgate.data, a.out = out.data;
  a.x_b = u.stride[0], a.x_d = u.stride[1], a.gate_b = pregate.stride[0], a.gate_d = pregate.stride[1];
  a.post_b = postgate.stride[0], a.post_d = postgate.stride[1], a.out_b = out.stride[0], a.out_d = out.stride[1];
  a.mask = static_cast<const unsigned char*>(mask.data), a.mask_b = mask.stride[0];
  a.bias = static_cast<const float*>(bias.data), a.scale = static_cast<const float*>(scale.data);
  a.spectrum = static_cast<const uint16_t*>(spectrum.data), a.tables = static_cast<const uint16_t*>(tables.data);
  a.batch = int(u.size[0]), a.channels = int(u.size[1]), a.length_in = int(u.size[2]), a.length_out = int(out.size[2]);
  if (a.batch == 0 || a.channels == 0) return;
  a.aligned = true;
  for (const View* v : {&out, &u, &pregate, &postgate})
    if (*v) a.aligned &= (reinterpret_cast<uintptr_t>(v->data) / 2 | v->stride[0] | v->stride[1]) % 8 == 0;
  a.parts = int(spectrum.size[1]);
  if (a.parts < 1 || a.parts > 4 || (a.parts > 1 && points != 8192) || spectrum.size[2] != points * together(points))
    throw std::invalid_argument("fft_conv: a spectrum of another number of points, or of more than 4 parts");
  if (std::max(a.length_in, a.length_out) > points * a.parts)
    throw std::invalid_argument("fft_conv: more samples than points");
  u.dtype == 2 ? launch<f16>(exec, a, points) : launch<bf16>(exec, a, points);  // enum Dtype: f16, else bf16
}

}  // namespace scalekern::fft
