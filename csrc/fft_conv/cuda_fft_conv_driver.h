// Which kernel of cuda_fft_conv.cuh takes a call, and how many blocks share a channel's rows.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "common/view.h"
#include "fft_conv/cuda_fft_conv.cuh"

namespace scalekern::fft {

template <class T, int kN1, class Exec>
void launch(Exec& exec, Args& a) {
  using Kernel = FusedConv<T, kN1>;
  // A block begins with copying tables and spectrum, some two rows' worth: no more blocks than the GPU has room for.
  const int64_t room = std::max<int64_t>(1, int64_t(exec.processors()) * Kernel::kBlocks / a.channels);
  a.turns = int(ceil_div(a.batch, std::min<int64_t>(room, a.batch)));
  exec.template launch<Kernel>(ceil_div(a.batch, a.turns) * a.channels, Kernel::kShared, a);
}

// out (B, D, M), u and gates (B, D, L) and (B, D, M), samples next to each other; bias, scale (D,) float32; spectrum
// (D, N, 2) and tables float16.
template <class Exec>
void fft_conv(
    Exec& exec, const View& out, const View& u, const View& pregate, const View& postgate, const View& bias,
    const View& scale, const View& spectrum, const View& tables) {
  Args a{};
  a.x = u.data, a.gate = pregate.data, a.post = postgate.data, a.out = out.data;
  a.x_b = u.stride[0], a.x_d = u.stride[1], a.gate_b = pregate.stride[0], a.gate_d = pregate.stride[1];
  a.post_b = postgate.stride[0], a.post_d = postgate.stride[1], a.out_b = out.stride[0], a.out_d = out.stride[1];
  a.bias = static_cast<const float*>(bias.data), a.scale = static_cast<const float*>(scale.data);
  a.spectrum = static_cast<const uint16_t*>(spectrum.data), a.tables = static_cast<const uint16_t*>(tables.data);
  a.batch = int(u.size[0]), a.channels = int(u.size[1]), a.length_in = int(u.size[2]), a.length_out = int(out.size[2]);
  if (a.batch == 0 || a.channels == 0) return;
  a.aligned = true;
  for (const View* v : {&out, &u, &pregate, &postgate})
    if (*v) a.aligned &= (reinterpret_cast<uintptr_t>(v->data) / 2 | v->stride[0] | v->stride[1]) % 8 == 0;
  const int64_t points = spectrum.size[1];
  if (std::max(a.length_in, a.length_out) > points) throw std::invalid_argument("fft_conv: more samples than points");
  if (points != 4096 && points != 8192) throw std::invalid_argument("fft_conv: 4,096 or 8,192 points");
  const bool half = u.dtype == 2;  // enum Dtype: f16, else bf16
  if (points == 4096) half ? launch<f16, 16>(exec, a) : launch<bf16, 16>(exec, a);
  else half ? launch<f16, 32>(exec, a) : launch<bf16, 32>(exec, a);
}

}  // namespace scalekern::fft
