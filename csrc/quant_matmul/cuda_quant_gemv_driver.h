// Which kernel of cuda_quant_gemv.cuh takes a call.
#pragma once
#include "quant_matmul/cuda_quant_gemv.cuh"

namespace scalekern::gemv {

template <class Kernel, class Exec>
void launch(Exec& exec, Args& a, int64_t shared_bytes) {
  a.row_blocks = int(ceil_div(a.rows, Kernel::kRows));
  exec.template launch<Kernel>(a.row_blocks * ceil_div(a.tokens, Kernel::kTokens), shared_bytes, a);
}

// Whether whole chunks of `chunk` codes lie in one group, of the columns too; `apart`: four of them need not.
inline bool groups_fit(const Args& a, int64_t group, int chunk, bool apart) {
  if (a.columns % chunk) return false;
  return a.groups == 1 || group % (apart ? chunk : 4 * chunk) == 0;
}

// What Tiles can read.
inline bool as_column(const Part& p, Column& column) {
  static constexpr int kBytes[] = {4, 0, 2, 2, 0, 1, 0, 1};
  const int bytes = kBytes[p.kind];
  column = {static_cast<const uint8_t*>(p.data), p.kind, bytes, int(p.row * bytes), int(p.column * bytes)};
  return p.data == nullptr || (bytes != 0 && column.row == p.row * bytes && column.column == p.column * bytes);
}

template <class T, int kBits, int kCentre, class Exec>
bool tiles(Exec& exec, Args& a, int64_t group) {
  constexpr int kWide = kBits < 4 && 4 % kBits == 0 ? 4 / kBits : 1;  // units of 16 bytes and more
  constexpr int kAlign = kBits % 4 == 0 ? 16 : kBits % 2 == 0 ? 8 : 4;
  const auto aligned = [&](int bytes) { return (reinterpret_cast<uintptr_t>(a.data) | size_t(a.pitch)) % bytes == 0; };
  const auto run = [&]<int kUnits, bool kApart>(std::integral_constant<int, kUnits>, std::bool_constant<kApart>) {
    using Kernel = Tiles<T, kBits, kCentre, kUnits, kApart>;
    launch<Kernel>(exec, a, Kernel::kSharedBytes);
    return true;
  };
  using Wide = std::integral_constant<int, kWide>;
  using Narrow = std::integral_constant<int, 1>;
  const bool together = groups_fit(a, group, 32, false) && aligned(kAlign);
  // Groups that are no multiple of 128: of the formats that have such.
  constexpr bool kHasApart = kBits == 4 || (kBits <= 2 && kCentre != 1);
  const bool apart = kHasApart && groups_fit(a, group, 32 * kWide, true) && aligned(kWide > 1 ? 16 : kAlign);
  // Loads of 16 bytes first, as long as one pass takes all tokens; then the one that passes less often.
  if (apart && (!together || (kWide > 1 && a.tokens <= 2)))
    if constexpr (kHasApart) return run(Wide(), std::true_type());
  if (together) return run(Narrow(), std::false_type());
  return false;
}

// The formats of Tiles: integers around 2^(bits - 1), ternary, int1 as -1 and 1, tables of 16. It can do 5 and 7 bits
// (25 s of compilation are 31 with them and more groups of ternary), which nobody has in groups that fit.
template <class T, class Exec>
bool tiles_of(Exec& exec, Args& a, int64_t group) {
  if (a.bits == 4 && a.table) return tiles<T, 4, kTable>(exec, a, group);
  if (a.table) return false;
  if (a.bits == 1) return a.step == 2 && a.base == -1 && a.zero == 0 && tiles<T, 1, 0>(exec, a, group);
  if (a.step != 1 || a.base != 0) return false;
  if (a.bits == 2 && a.zero == 1) return tiles<T, 2, 1>(exec, a, group);
  if (a.zero != float(1 << (a.bits - 1))) return false;
  switch (a.bits) {
    case 2: return tiles<T, 2, 2>(exec, a, group);
    case 3: return tiles<T, 3, 4>(exec, a, group);
    case 4: return tiles<T, 4, 8>(exec, a, group);
    case 6: return tiles<T, 6, 32>(exec, a, group);
    case 8: return tiles<T, 8, 128>(exec, a, group);
  }
  return false;
}

// out (M, N), x (M, K), data (N, bytes) with its bytes side by side, scales (N, G), outer (N, 1), bias (N,), table
// (2^bits,) float32. Dtypes are Kinds.
template <class Exec>
void quant_matmul_gemv(
    Exec& exec, const View& out, const View& x, const View& data, const View& scales, const View& zeros,
    const View& offsets, const View& outer, const View& bias, const View& table, int64_t bits, double step, double base,
    double zero, int64_t group) {
  Args a{};
  a.data = static_cast<const uint8_t*>(data.data), a.far_pitch = data.stride[0];
  a.rows = int(data.size[0]), a.columns = int(x.size[1]), a.tokens = int(x.size[0]), a.groups = int(scales.size[1]);
  a.bits = int(bits), a.row_bytes = (int64_t(a.columns) * bits + 7) / 8;
  a.step = float(step), a.base = float(base), a.zero = float(zero), a.table = static_cast<const float*>(table.data);
  a.x = x, a.scales = scales, a.zeros = zeros, a.offsets = offsets, a.outer = outer, a.bias = bias;
  a.out = out.data, a.out_kind = out.dtype, a.out_m = out.stride[0], a.out_n = out.stride[1];
  a.by_group = Divisor(a.groups == 1 ? a.columns : group);
  const bool in_rows = (x.size[1] == 1 || x.stride[1] == 1) && (x.size[0] == 1 || x.stride[0] % 8 == 0) &&
                       reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  a.pitch = int(a.far_pitch);
  const bool near = a.pitch == a.far_pitch && as_column(a.scales, a.scale) && as_column(a.zeros, a.zeros_of) &&
                    as_column(a.offsets, a.offset);
  if (in_rows && near) {
    if (x.dtype == kF16 && tiles_of<f16>(exec, a, group)) return;
    if (x.dtype == kBf16 && tiles_of<bf16>(exec, a, group)) return;
  }
  launch<Plain>(exec, a, 0);
}

}  // namespace scalekern::gemv
