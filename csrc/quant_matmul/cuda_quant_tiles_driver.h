// Which kernel of cuda_quant_tiles.cuh takes a call, and how many programs share it.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "quant_matmul/cuda_quant_tiles.cuh"

namespace scalekern::tiles {

constexpr int kLeastUnits = 4;  // of a program: fewer are not worth a part to add

template <class Kernel, class Exec>
void launch(Exec& exec, Args& a) {
  a.stage_bytes = Kernel::stage_bytes(a.scale_bytes, a.shifts != nullptr);
  const int64_t wanted = int64_t(exec.processors()) * Kernel::kBlocks;
  a.programs = int(std::max<int64_t>(1, std::min(wanted, a.units() / kLeastUnits)));
  const int64_t part_bytes = int64_t(2 * a.token_tiles) * kThreads * 16;
  a.parts = static_cast<float*>(exec.scratch((a.programs + a.tiles) * part_bytes));
  exec.template launch<Kernel>(a.programs, Kernel::kStages * a.stage_bytes, a);
  exec.template launch<SumParts>(int64_t(a.tiles) * 2 * a.token_tiles, 0, a);
}

template <class T, int kBits, int kTokenTiles, class Exec>
void of_groups(Exec& exec, Args& a, bool fine) {
  if (fine) launch<StreamK<T, kBits, kTokenTiles, true>>(exec, a);
  else launch<StreamK<T, kBits, kTokenTiles, false>>(exec, a);
}

template <class T, int kBits, class Exec>
void of_tokens(Exec& exec, Args& a, bool fine) {
  switch (a.token_tiles = power_of_two_from(ceil_div(a.tokens, 8))) {
    case 1: return of_groups<T, kBits, 1>(exec, a, fine);
    case 2: return of_groups<T, kBits, 2>(exec, a, fine);
    case 4: return of_groups<T, kBits, 4>(exec, a, fine);
    case 8: return of_groups<T, kBits, 8>(exec, a, fine);
  }
  throw std::invalid_argument("quant_matmul_tiles: 1 to 64 tokens");
}

template <class T, class Exec>
void of_bits(Exec& exec, Args& a, int64_t bits, bool fine) {
  if (bits == 4) return of_tokens<T, 4>(exec, a, fine);
  if (bits == 8) return of_tokens<T, 8>(exec, a, fine);
  throw std::invalid_argument("quant_matmul_tiles: codes of 4 or 8 bits");
}

// out (M, N); x (M, K), K a multiple of 8, rows aligned to 16 bytes; codes (tiles, steps, bytes), scales (tiles, G,
// kRows) float16, bfloat16 or float32 and shifts float32 of the layout; outer (N, 1), bias (N,). Dtypes are Kinds.
template <class Exec>
void quant_matmul_tiles(
    Exec& exec, const View& out, const View& x, const View& codes, const View& scales, const View& shifts,
    const View& outer, const View& bias, int64_t bits, int64_t group) {
  Args a{};
  a.codes = static_cast<const uint8_t*>(codes.data), a.scales = static_cast<const uint8_t*>(scales.data);
  a.shifts = static_cast<const uint8_t*>(shifts.data), a.x = static_cast<const uint16_t*>(x.data);
  a.x_row = x.size[0] == 1 ? 0 : x.stride[0];
  a.tokens = int(x.size[0]), a.columns = int(x.size[1]), a.rows = int(out.size[1]);
  a.tiles = int(codes.size[0]), a.steps = int(codes.size[1]), a.groups = int(scales.size[1]);
  a.scale_kind = scales.dtype, a.scale_bytes = scales.dtype == gemv::kF32 ? 4 : 2;
  a.by_group = Divisor(a.groups == 1 ? a.columns : group);
  a.outer = outer, a.bias = bias;
  a.out = out.data, a.out_kind = out.dtype, a.out_m = out.stride[0], a.out_n = out.stride[1];
  const bool fine = a.groups > 1 && group % kStep != 0;
  if (x.dtype == gemv::kF16) of_bits<f16>(exec, a, bits, fine);
  else of_bits<bf16>(exec, a, bits, fine);
}

}  // namespace scalekern::tiles
