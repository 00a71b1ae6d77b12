// What the kernels of few tokens read (parts of a weight in the dtypes they come in, its words) and how they end.
#pragma once
#include <utility>

#include "common/view.h"
#include "quant_matmul/cuda_quant_decode.cuh"

namespace scalekern::gemv {

// What a part is stored as, in the order of QuantDtype (quant_matmul.h).
enum Kind : int { kF32, kF64, kF16, kBf16, kE4m3, kE8m0, kI8, kU8 };

// A matrix (or a column, or a row) of one of those; strides in elements, 0 where all share one. No data: absent.
struct Part {
  const void* data = nullptr;
  int kind = 0;
  int64_t row = 0, column = 0;

  Part() = default;
  Part(const View& v) : data(v.data), kind(v.dtype) {
    if (v.dims == 1) column = v.stride[0];
    if (v.dims == 2) row = v.size[0] == 1 ? 0 : v.stride[0], column = v.size[1] == 1 ? 0 : v.stride[1];
  }
};

// The same for Tiles: strides in bytes, and of 1, 2 or 4 bytes an element.
struct Column {
  const uint8_t* data = nullptr;
  int kind = 0, bytes = 0, row = 0, column = 0;
};

SK_DEVICE uint32_t raw_at(const Part& p, int64_t i) {
  if (p.kind == kF32) return static_cast<const uint32_t*>(p.data)[i];
  if (p.kind == kF16 || p.kind == kBf16) return static_cast<const uint16_t*>(p.data)[i];
  return static_cast<const uint8_t*>(p.data)[i];
}

SK_DEVICE float e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7f, sign = (code & 0x80) << 24;
  const float normal = as_float((magnitude << 20) + (120u << 23)), small = float(magnitude) * 0x1p-9f;
  const float x = magnitude >= 8 ? normal : small;
  return as_float((magnitude == 0x7f ? 0x7fc00000u : as_bits(x)) | sign);
}

SK_DEVICE float number(uint32_t raw, int kind) {
  switch (kind) {
    case kF32: return as_float(raw);
    case kF16: return widen(f16{uint16_t(raw)});
    case kBf16: return widen(bf16{uint16_t(raw)});
    case kE4m3: return e4m3(raw);
    case kE8m0: return raw == 255 ? as_float(0x7fc00000u) : as_float(raw ? raw << 23 : 0x400000u);
    case kI8: return float(int8_t(raw));
    default: return float(raw);
  }
}

SK_DEVICE float number_at(const Part& p, int64_t i) {
  if (p.kind == kF64) return float(static_cast<const double*>(p.data)[i]);
  return number(raw_at(p, i), p.kind);
}

// kWords words at p, zeros if it is not `on`. In pieces of up to 16 bytes, aligned to those; whole ones bypass the L1,
// where x is to stay. Not moved by the compiler, which would load a stage when it is used.
template <int kWords>
SK_DEVICE void load_words(uint32_t* w, const uint8_t* p, bool on) {
  constexpr int kPiece = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kWords; i += kPiece) {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) w[i + j] = 0;
    if (!on) continue;
#if defined(__CUDA_ARCH__)
    const size_t from = __cvta_generic_to_global(p + 4 * i);
    if constexpr (kPiece == 4)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[i]), "=r"(w[i + 1]), "=r"(w[i + 2]), "=r"(w[i + 3]) : "l"(from));
    else if constexpr (kPiece == 2)
      asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(w[i]), "=r"(w[i + 1]) : "l"(from));
    else asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(w[i]) : "l"(from));
#elif !defined(__CUDACC__)
    if (reinterpret_cast<uintptr_t>(p) % (4 * kPiece)) emulator::block().fail("a misaligned load");
    std::memcpy(w + i, p + 4 * i, 4 * kPiece);
#endif
  }
}

// Element `at` of some rows, as bits.
template <int kCount>
SK_DEVICE void fetch(uint32_t (&raw)[kCount], const Column& p, int at, const int (&rows)[kCount]) {
  const uint8_t* from = p.data + int64_t(at) * p.column;
  const auto each = [&](auto* type) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      raw[i] = *reinterpret_cast<decltype(type)>(from + int64_t(rows[i]) * p.row);
  };
  if (p.bytes == 2) each(static_cast<const uint16_t*>(nullptr));
  else if (p.bytes == 4) each(static_cast<const uint32_t*>(nullptr));
  else each(static_cast<const uint8_t*>(nullptr));
}

template <int kCount>
SK_DEVICE void convert(float (&to)[kCount], const uint32_t (&raw)[kCount], int kind) {
  const auto each = [&](auto&& number) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = number(raw[i]);
  };
  if (kind == kF16) each([](uint32_t r) { return widen(f16{uint16_t(r)}); });
  else if (kind == kBf16) each([](uint32_t r) { return as_float(r << 16); });
  else if (kind == kF32) each([](uint32_t r) { return as_float(r); });
  else if (kind == kE8m0) each([](uint32_t r) { return number(r, kE8m0); });
  else each([](uint32_t r) { return float(r); });
}

// out[m, n] of a sum that is ready.
template <class Args>
SK_DEVICE void finish(const Args& a, int m, int n, float sum) {
  if (a.outer.data) sum *= number_at(a.outer, n * a.outer.row);
  if (a.bias.data) sum += number_at(a.bias, n * a.bias.column);
  const int64_t at = m * a.out_m + n * a.out_n;
  if (a.out_kind == kF32) static_cast<float*>(a.out)[at] = sum;
  else if (a.out_kind == kF64) static_cast<double*>(a.out)[at] = sum;
  else if (a.out_kind == kF16) static_cast<f16*>(a.out)[at] = narrow<f16>(sum);
  else static_cast<bf16*>(a.out)[at] = narrow<bf16>(sum);
}

template <class F, int... i>
SK_DEVICE void unrolled(F&& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}

}  // namespace scalekern::gemv
